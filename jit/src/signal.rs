//! Host faults as guest events: one process-wide signal handler, a recovery hook per thread.
//!
//! Translated code and single-instruction stubs may fault on purpose: poison in the delta table, `#XM`, `#MF`,
//! `#DE`, `#UD`. The kernel turns those exceptions (SDM 3A, chapter 6) into SIGSEGV, SIGBUS, SIGFPE, SIGILL and
//! SIGTRAP. [`install`] takes these five signals once; the handler offers each fault that the CPU raised on this
//! thread to the thread's [`FaultScope`]s, innermost first. A callback that returns `true` has dealt with it, usually
//! by changing registers of the [`FaultContext`]; execution goes on with these. A fault that nobody claims is
//! our own bug: the registers are printed and the previous disposition of the signal is invoked.
//!
//! What a callback may rely on:
//! * It runs on the alternate stack, so the interrupted RSP may hold anything. Every thread whose code
//!   changes RSP must have called [`prepare_thread`]; the standard library's small stack serves the others.
//! * The kernel has saved x87, SSE and AVX state in the frame (see [`FaultContext::xsave_area`]) and cleared DF
//!   and TF; the entry stub clears AC. MXCSR and the x87 control word have their defaults, so Rust code may run.
//! * It must be async-signal-safe: no allocation, no lock, no panic. FS must hold the host's thread pointer.
//! * A fault inside a callback kills the process: the signal is blocked while it runs.
//!
//! Invariants the `unsafe` blocks rely on: hooks form a per-thread stack of nodes that live in
//! [`FaultScope`]s borrowed for as long as they are registered; `PREVIOUS` is written once, before any handler can run.

use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

/// The signals that stand for processor exceptions.
const SIGNALS: [libc::c_int; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP];

/// Dispositions in force before ours, by position in [`SIGNALS`].
static PREVIOUS: OnceLock<[libc::sigaction; 5]> = OnceLock::new();

/// Decides about one fault: `true` if it is dealt with and execution may go on with the context's registers.
/// The first argument is the pointer given to [`FaultScope::new`].
pub type FaultCallback = unsafe fn(*mut (), &mut FaultContext) -> bool;

/// A registered callback and the one it shadows.
struct Node {
    callback: FaultCallback,
    data: *mut (),
    outer: *const Node,
}

thread_local! {
    /// The innermost hook. Constant-initialised and without destructor: reading it in a handler is a plain load.
    static HOOK: Cell<*const Node> = const { Cell::new(std::ptr::null()) };
    /// What [`prepare_thread`] made.
    static STACK: RefCell<Option<SignalStack>> = const { RefCell::new(None) };
}

/// Gives the calling thread an alternate stack for as long as it lives, unless it has one.
pub fn prepare_thread() -> std::io::Result<()> {
    STACK.with_borrow_mut(|stack| {
        if stack.is_none() {
            *stack = Some(SignalStack::new()?);
        }
        Ok(())
    })
}

/// Registers of the interrupted code, changeable.
pub struct FaultContext {
    signal: libc::c_int,
    context: *mut libc::ucontext_t,
}

/// Positions of the general registers in `gregs`, by encoding number.
const GREGS: [usize; 16] = [
    libc::REG_RAX as usize,
    libc::REG_RCX as usize,
    libc::REG_RDX as usize,
    libc::REG_RBX as usize,
    libc::REG_RSP as usize,
    libc::REG_RBP as usize,
    libc::REG_RSI as usize,
    libc::REG_RDI as usize,
    libc::REG_R8 as usize,
    libc::REG_R9 as usize,
    libc::REG_R10 as usize,
    libc::REG_R11 as usize,
    libc::REG_R12 as usize,
    libc::REG_R13 as usize,
    libc::REG_R14 as usize,
    libc::REG_R15 as usize,
];

impl FaultContext {
    fn greg(&self, index: usize) -> u64 {
        // SAFETY: the kernel passed this context to the handler, which is still running.
        unsafe { (*self.context).uc_mcontext.gregs[index] as u64 }
    }

    fn set_greg(&mut self, index: usize, value: u64) {
        // SAFETY: as above; nothing else refers to the frame.
        unsafe { (*self.context).uc_mcontext.gregs[index] = value as i64 }
    }

    /// The signal's number.
    pub fn signal(&self) -> i32 {
        self.signal
    }

    /// The exception's vector: 0 `#DE`, 1 `#DB`, 3 `#BP`, 6 `#UD`, 13 `#GP`, 14 `#PF`, 16 `#MF`, 17 `#AC`, 19 `#XM`, …
    /// A non-canonical address gives 13 with error code 0 (12 through RSP or RBP), and no address.
    pub fn vector(&self) -> u8 {
        self.greg(libc::REG_TRAPNO as usize) as u8
    }

    /// The exception's error code: for `#PF` bit 0 present, 1 write, 2 user, 4 instruction fetch.
    pub fn error_code(&self) -> u32 {
        self.greg(libc::REG_ERR as usize) as u32
    }

    /// CR2: the faulting address, meaningful for vector 14 only.
    pub fn address(&self) -> u64 {
        self.greg(libc::REG_CR2 as usize)
    }

    /// RIP: of the faulting instruction, or after it for `#BP` and most `#DB`.
    pub fn rip(&self) -> u64 {
        self.greg(libc::REG_RIP as usize)
    }

    /// Sets where execution goes on.
    pub fn set_rip(&mut self, value: u64) {
        self.set_greg(libc::REG_RIP as usize, value);
    }

    /// General register `number` (0–15, encoding order). Panics beyond.
    pub fn gpr(&self, number: usize) -> u64 {
        self.greg(GREGS[number])
    }

    /// Sets general register `number` (0–15, encoding order). Panics beyond.
    pub fn set_gpr(&mut self, number: usize, value: u64) {
        self.set_greg(GREGS[number], value);
    }

    /// RFLAGS.
    pub fn rflags(&self) -> u64 {
        self.greg(libc::REG_EFL as usize)
    }

    /// Sets RFLAGS; the kernel takes the status flags, TF, DF, AC and RF from it.
    pub fn set_rflags(&mut self, value: u64) {
        self.set_greg(libc::REG_EFL as usize, value);
    }

    /// The CS selector.
    pub fn cs(&self) -> u16 {
        self.greg(libc::REG_CSGSFS as usize) as u16
    }

    /// Sets CS and SS, to come back from a 32-bit code segment.
    pub fn set_cs_ss(&mut self, cs: u16, ss: u16) {
        let others = self.greg(libc::REG_CSGSFS as usize) & 0x0000_FFFF_FFFF_0000;
        self.set_greg(libc::REG_CSGSFS as usize, others | u64::from(cs) | (u64::from(ss) << 48));
    }

    /// The interrupted x87, SSE and AVX state: an XSAVE area in standard format, restored on return.
    /// Bytes 0–511 are always there; what lies beyond, bytes 464–511 tell (`struct _fpx_sw_bytes`). May be null.
    pub fn xsave_area(&mut self) -> *mut u8 {
        // SAFETY: the kernel passed this context to the handler, which is still running.
        unsafe { (*self.context).uc_mcontext.fpregs.cast() }
    }
}

/// A recovery hook of the calling thread, registered until dropped. Scopes nest: the innermost is asked first.
///
/// Cheap (two thread-local accesses), so it may be set up around every entry into translated code. Kept in
/// place by a pinned borrow: build it with [`FaultScope::new`] and call [`FaultScope::enter`].
pub struct FaultScope {
    node: Node,
    _thread_bound: PhantomData<*mut ()>,
}

impl FaultScope {
    /// A hook that is not registered yet.
    pub fn new(callback: FaultCallback, data: *mut ()) -> FaultScope {
        FaultScope { node: Node { callback, data, outer: std::ptr::null() }, _thread_bound: PhantomData }
    }

    /// Runs `body` with this hook registered.
    ///
    /// # Safety
    ///
    /// The callback must be async-signal-safe and sound for any fault at any point of `body` that it claims;
    /// `data` must be valid for it throughout. A callback may redirect RIP only inside code that `body` entered.
    pub unsafe fn enter<R>(&mut self, body: impl FnOnce() -> R) -> R {
        self.node.outer = HOOK.get();
        let node: *const Node = &self.node;
        HOOK.set(node);
        let _leave = Leave { outer: self.node.outer };
        body()
    }
}

/// Takes the innermost hook off again, on unwinding too.
struct Leave {
    outer: *const Node,
}

impl Drop for Leave {
    fn drop(&mut self) {
        HOOK.set(self.outer);
    }
}

/// Takes over the five signals, once per process; later calls do nothing. Chains to what was there before.
pub fn install() {
    PREVIOUS.get_or_init(|| SIGNALS.map(previous_disposition));
    static TAKEN: OnceLock<()> = OnceLock::new();
    TAKEN.get_or_init(|| SIGNALS.iter().for_each(|&signal| take_over(signal)));
}

fn previous_disposition(signal: libc::c_int) -> libc::sigaction {
    let mut old = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: a query with a valid out-pointer; all-zero is a valid `sigaction` (SIG_DFL) should it fail.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), old.as_mut_ptr());
        old.assume_init()
    }
}

fn take_over(signal: libc::c_int) {
    // SAFETY: `entry` has the signature of an SA_SIGINFO handler and is async-signal-safe.
    let result = unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = entry as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        libc::sigemptyset(&mut action.sa_mask);
        libc::sigaction(signal, &action, std::ptr::null_mut())
    };
    assert_eq!(result, 0, "sigaction refuses signal {signal}");
}

/// Clears EFLAGS.AC, which the kernel leaves as the interrupted code had it, then goes on in [`handle`].
#[unsafe(naked)]
extern "C" fn entry(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    std::arch::naked_asm!(
        "pushfq",
        "and dword ptr [rsp], {mask}",
        "popfq",
        "jmp {handle}",
        mask = const !0x4_0000_i32,
        handle = sym handle,
    )
}

extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: errno is thread-local; the kernel's `info` is valid.
    let (errno, code) = unsafe { (*libc::__errno_location(), (*info).si_code) };
    let mut fault = FaultContext { signal, context: context.cast() };
    // Positive codes are the kernel's own: raised by this thread's instruction, not sent by `kill`.
    if code <= 0 || !offer(&mut fault) {
        unclaimed(&fault, code, info, context);
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Asks the thread's hooks, innermost first.
fn offer(fault: &mut FaultContext) -> bool {
    let innermost = HOOK.get();
    let mut node = innermost;
    let mut claimed = false;
    while !claimed && !node.is_null() {
        // SAFETY: registered nodes are alive (see `enter`), and `enter`'s caller vouches for the callback.
        unsafe {
            // A callback that needs hooks of its own starts from those outside it.
            HOOK.set((*node).outer);
            claimed = ((*node).callback)((*node).data, fault);
            node = (*node).outer;
        }
    }
    HOOK.set(innermost);
    claimed
}

/// Not ours: says where, then does what would have happened without us.
fn unclaimed(
    fault: &FaultContext,
    code: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    if code > 0 {
        report(fault);
    }
    let previous = PREVIOUS.get().and_then(|all| {
        let position = SIGNALS.iter().position(|&s| s == fault.signal)?;
        Some(&all[position])
    });
    let handler = previous.map_or(libc::SIG_DFL, |p| p.sa_sigaction);
    // SAFETY: `handler` was a valid disposition of this signal; resetting and raising are async-signal-safe.
    unsafe {
        if handler == libc::SIG_IGN && code <= 0 {
            return;
        }
        if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
            libc::signal(fault.signal, libc::SIG_DFL);
            libc::raise(fault.signal);
        } else if previous.is_some_and(|p| p.sa_flags & libc::SA_SIGINFO != 0) {
            let call: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                std::mem::transmute(handler);
            call(fault.signal, info, context);
        } else {
            let call: extern "C" fn(libc::c_int) = std::mem::transmute(handler);
            call(fault.signal);
        }
    }
}

/// Prints the registers of a fault that nobody claims, without allocating.
fn report(fault: &FaultContext) {
    const NAMES: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
        "r14", "r15",
    ];
    let mut text = Text { bytes: [0; 1024], length: 0 };
    text.push("paravane: unexpected host fault, vector ");
    text.hex(u64::from(fault.vector()));
    text.field(" error ", u64::from(fault.error_code()));
    text.field(" address ", fault.address());
    text.field("\n  rip ", fault.rip());
    text.field(" rflags ", fault.rflags());
    for (number, name) in NAMES.iter().enumerate() {
        text.push(if number % 4 == 0 { "\n  " } else { " " });
        text.push(name);
        text.field(" ", fault.gpr(number));
    }
    text.push("\n");
    // SAFETY: `write` is async-signal-safe and the bytes are initialised.
    unsafe {
        libc::write(libc::STDERR_FILENO, text.bytes.as_ptr().cast(), text.length);
    }
}

/// A message under construction; what does not fit is cut.
struct Text {
    bytes: [u8; 1024],
    length: usize,
}

impl Text {
    fn push(&mut self, text: &str) {
        for &byte in text.as_bytes() {
            if let Some(slot) = self.bytes.get_mut(self.length) {
                *slot = byte;
                self.length += 1;
            }
        }
    }

    fn hex(&mut self, value: u64) {
        let digits = (u64::BITS - value.leading_zeros()).div_ceil(4).max(1);
        for digit in (0..digits).rev() {
            let nibble = ((value >> (digit * 4)) & 15) as usize;
            self.push(&"0123456789abcdef"[nibble..=nibble]);
        }
    }

    fn field(&mut self, name: &str, value: u64) {
        self.push(name);
        self.hex(value);
    }
}

/// An alternate signal stack of the calling thread, with a guard page; the former one comes back on drop.
pub struct SignalStack {
    mapping: *mut libc::c_void,
    length: usize,
    former: libc::stack_t,
}

impl SignalStack {
    /// Room for handlers beyond the kernel's frame.
    const ROOM: usize = 64 << 10;
    const GUARD: usize = 4096;

    /// Maps a stack and makes it the calling thread's.
    pub fn new() -> std::io::Result<SignalStack> {
        // SAFETY: plain queries and a fresh anonymous mapping; the pointers are valid.
        unsafe {
            let frame = libc::getauxval(libc::AT_MINSIGSTKSZ) as usize;
            let length = (Self::ROOM + frame + Self::GUARD).next_multiple_of(4096);
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_STACK;
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let mapping = libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0);
            if mapping == libc::MAP_FAILED {
                return Err(std::io::Error::last_os_error());
            }
            let mut former: libc::stack_t = MaybeUninit::zeroed().assume_init();
            let stack = libc::stack_t {
                ss_sp: mapping.byte_add(Self::GUARD),
                ss_flags: 0,
                ss_size: length - Self::GUARD,
            };
            let refused = libc::mprotect(mapping, Self::GUARD, libc::PROT_NONE) != 0
                || libc::sigaltstack(&stack, &mut former) != 0;
            if refused {
                let error = std::io::Error::last_os_error();
                libc::munmap(mapping, length);
                return Err(error);
            }
            Ok(SignalStack { mapping, length, former })
        }
    }

    fn base(&self) -> *mut libc::c_void {
        self.mapping.wrapping_byte_add(Self::GUARD)
    }
}

impl Drop for SignalStack {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours; it is unmapped only when no longer the thread's signal stack.
        unsafe {
            let mut current: libc::stack_t = MaybeUninit::zeroed().assume_init();
            libc::sigaltstack(std::ptr::null(), &mut current);
            // At thread exit the standard library may have disabled it already, and its own stack is gone.
            if current.ss_sp == self.base() && current.ss_flags & libc::SS_DISABLE == 0 {
                libc::sigaltstack(&self.former, std::ptr::null_mut());
            }
            libc::munmap(self.mapping, self.length);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::arch::asm;

    /// Claims `#UD` at the address in `data` and steps over the two bytes of UD2.
    unsafe fn skip_ud2(data: *mut (), fault: &mut FaultContext) -> bool {
        // SAFETY: the tests pass a pointer to a live `Seen`.
        let seen = unsafe { &mut *data.cast::<Seen>() };
        seen.vector = fault.vector();
        seen.stack_pointer = fault.gpr(4);
        if fault.vector() == 6 {
            fault.set_rip(fault.rip() + 2);
            fault.set_gpr(3, 77);
        }
        fault.vector() == 6
    }

    #[derive(Default)]
    struct Seen {
        vector: u8,
        stack_pointer: u64,
    }

    #[test]
    fn a_claimed_fault_goes_on_with_changed_registers() {
        install();
        let _stack = SignalStack::new().unwrap();
        let mut seen = Seen::default();
        let mut scope = FaultScope::new(skip_ud2, (&raw mut seen).cast());
        let rbx: u64;
        // SAFETY: the hook skips the UD2; RBX is saved by hand because the compiler reserves it, RSP is wild meanwhile.
        unsafe {
            rbx = scope.enter(|| {
                let out: u64;
                asm!(
                    "mov {saved}, rbx", "mov {stack}, rsp", "mov rsp, 0x1230", "ud2", "mov rsp, {stack}",
                    "mov {out}, rbx", "mov rbx, {saved}",
                    saved = out(reg) _, stack = out(reg) _, out = out(reg) out,
                );
                out
            });
        }
        assert_eq!((rbx, seen.vector, seen.stack_pointer), (77, 6, 0x1230));
    }

    #[test]
    fn hooks_nest_and_the_outer_is_asked_when_the_inner_declines() {
        unsafe fn decline(data: *mut (), _: &mut FaultContext) -> bool {
            // SAFETY: points to a live counter.
            unsafe { *data.cast::<u32>() += 1 };
            false
        }
        install();
        let (mut seen, mut asked) = (Seen::default(), 0u32);
        let mut outer = FaultScope::new(skip_ud2, (&raw mut seen).cast());
        let mut inner = FaultScope::new(decline, (&raw mut asked).cast());
        // SAFETY: the outer hook skips the UD2 and changes RBX, which is saved around it.
        unsafe {
            outer.enter(|| {
                inner.enter(|| asm!("push rbx", "ud2", "pop rbx"));
            });
        }
        assert_eq!((asked, seen.vector), (1, 6));
    }

    #[test]
    fn texts_show_hexadecimal_without_leading_zeros() {
        let mut text = Text { bytes: [0; 1024], length: 0 };
        text.field("x ", 0);
        text.field(" y ", 0xDEAD_0000_0000_BEEF);
        assert_eq!(&text.bytes[..text.length], b"x 0 y dead00000000beef");
    }
}

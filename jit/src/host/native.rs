//! The native oracle: user-mode code run by the host CPU itself, with every register given and returned.
//!
//! The code lies at a fixed linear address in a page of INT3, its operands in an arena at another; both are mapped
//! at just these addresses in this process, with guard pages around the arena, so that the same code sees the same
//! addresses in an engine. Control comes back by an exception only: the INT3 behind the code at the latest.
//!
//! 32-bit code runs in compatibility mode, through the flat code segment that Linux keeps in every GDT; 16-bit code through
//! segments in this process's LDT, with a 16-bit stack (the kernel brings back all of ESP: espfix64).
//!
//! Invariants the `unsafe` code relies on: both mappings are ours alone and live as long as [`Native`];
//! `Frame` is laid out as the assembly expects; every exception raised while [`enter`] is active belongs to the
//! code under test. That code itself is the caller's responsibility ([`Native::run`] is unsafe): it must not
//! enter the kernel, change FS or GS, or reach memory of this process outside the arena.

use super::area::memfd;
use super::ldt::{self, Content};
use crate::signal::{self, FaultContext, FaultScope, SignalStack};
use paravane_cpu::{FpuState, flags};
use std::arch::naked_asm;
use std::io;
use std::mem::offset_of;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// Linux's selectors: 32-bit user code, user data, 64-bit user code.
const USER32_CS: u64 = 0x23;
const USER_DS: u16 = 0x2B;
const USER_CS: u16 = 0x33;

const PAGE: u64 = 4096;

/// In 16-bit mode: what DS, ES and SS show below the arena, and how far they reach. CS starts at the code page.
pub const DATA_BASE_16: u64 = 0x2000;
/// Their limit, behind the arena of three pages and what is unmapped there.
pub const DATA_LIMIT_16: u16 = 0x7FFF;
/// The limit of CS.
pub const CODE_LIMIT_16: u16 = 0xFFFF;
/// Selectors of CS and of DS, ES and SS.
pub const SELECTORS_16: (u16, u16) = (0x7, 0xF);

/// Where the jump to the code under test lies in its page.
const PROLOGUE: usize = 0x20;

/// Where code and operands lie. Page-aligned, below 2 GiB, apart from each other by more than a page.
#[derive(Clone, Copy, Debug)]
pub struct NativeLayout {
    /// Linear address of the code page.
    pub code: u64,
    /// Linear address of the arena.
    pub data: u64,
    /// Pages of the arena that may be read and written.
    pub writable_pages: u64,
    /// Pages behind these that may only be read.
    pub read_only_pages: u64,
}

impl NativeLayout {
    /// Bytes of the arena.
    pub fn data_len(&self) -> u64 {
        (self.writable_pages + self.read_only_pages) * PAGE
    }
}

/// In which mode the code runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NativeMode {
    /// 64-bit mode.
    Long,
    /// Compatibility mode with a 32-bit code segment.
    Protected32,
    /// Compatibility mode with 16-bit code, data and stack segments.
    Protected16,
}

impl NativeMode {
    /// 64, 32 or 16.
    pub fn bits(self) -> u32 {
        match self {
            NativeMode::Long => 64,
            NativeMode::Protected32 => 32,
            NativeMode::Protected16 => 16,
        }
    }

    /// `layout` as the code addresses it: offsets into its segments.
    pub fn seen(self, layout: NativeLayout) -> NativeLayout {
        match self {
            NativeMode::Protected16 => NativeLayout { code: 0, data: DATA_BASE_16, ..layout },
            _ => layout,
        }
    }
}

/// Registers before and after.
#[derive(Clone, PartialEq, Debug)]
pub struct NativeState {
    /// By encoding number; RSP may hold anything.
    pub gpr: [u64; 16],
    /// Status flags, DF and ID are loaded; all of RFLAGS is returned.
    pub rflags: u64,
    /// x87, SSE and AVX state.
    pub fpu: FpuState,
}

/// The exception that ended a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NativeStop {
    /// Its vector.
    pub vector: u8,
    /// Its error code; zero for exceptions that have none.
    pub error_code: u32,
    /// CR2, for page faults: linear.
    pub address: u64,
    /// RIP as the exception pushes it: an offset into CS.
    pub rip: u64,
}

/// Code and arena at fixed addresses, and the way in and out.
pub struct Native {
    layout: NativeLayout,
    /// The code page and the arena as one sees them from Rust, writable.
    code: Mapping,
    data: Mapping,
    _executable: Mapping,
    _arena: Mapping,
    _stack: SignalStack,
    /// What of the code page is not INT3.
    used: Range<usize>,
    has_ldt: bool,
}

/// What [`enter`] and [`leave`] work on.
#[repr(C)]
struct Frame {
    gpr: [u64; 16],
    rflags: u64,
    fpu: *mut FpuState,
    /// Where to go; the code there loads RSP.
    start: u64,
    start_cs: u64,
    /// Loaded into DS, ES and SS.
    start_data: u64,
    rsp: u64,
    host_mxcsr: u32,
    host_fcw: u32,
    components: u32,
    avx: u32,
}

struct Hook {
    frame: *mut Frame,
    stop: Option<NativeStop>,
}

impl Native {
    /// Maps code and arena. Fails where these addresses are taken.
    pub fn new(layout: NativeLayout) -> io::Result<Native> {
        signal::install();
        let read = libc::PROT_READ;
        let write = libc::PROT_READ | libc::PROT_WRITE;
        let code_file = memfd()?;
        code_file.set_len(PAGE)?;
        let data_file = memfd()?;
        data_file.set_len(layout.data_len())?;
        let code = Mapping::anywhere(code_file.as_raw_fd(), PAGE, write)?;
        let executable = Mapping::fixed(code_file.as_raw_fd(), layout.code, PAGE, read | libc::PROT_EXEC)?;
        let data = Mapping::anywhere(data_file.as_raw_fd(), layout.data_len(), write)?;
        let guarded = layout.data_len() + 2 * PAGE;
        let arena = Mapping::reserve(layout.data - PAGE, guarded)?;
        arena.show(data_file.as_raw_fd(), PAGE, layout.data_len(), read)?;
        arena.show(data_file.as_raw_fd(), PAGE, layout.writable_pages * PAGE, write)?;
        let stack = SignalStack::new()?;
        let mut native = Native {
            layout,
            code,
            data,
            _executable: executable,
            _arena: arena,
            _stack: stack,
            used: 0..PAGE as usize,
            has_ldt: false,
        };
        native.set_code(PROLOGUE, &[]);
        Ok(native)
    }

    /// Makes the segments that 16-bit code needs. The error tells that this host does not allow them.
    pub fn allow_sixteen_bits(&mut self) -> io::Result<()> {
        let code = ldt::set_sixteen_bit(0, Content::Code, self.layout.code as u32, CODE_LIMIT_16)?;
        let base = (self.layout.data - DATA_BASE_16) as u32;
        let data = ldt::set_sixteen_bit(1, Content::Data, base, DATA_LIMIT_16)?;
        assert_eq!((code, data), SELECTORS_16, "selectors follow from the entries");
        self.has_ldt = true;
        Ok(())
    }

    /// Where things lie.
    pub fn layout(&self) -> NativeLayout {
        self.layout
    }

    /// The arena's bytes, read-only pages included.
    pub fn arena(&mut self) -> &mut [u8] {
        // SAFETY: our own mapping of the arena's file; code under test runs only inside `run`, which borrows all.
        unsafe { std::slice::from_raw_parts_mut(self.data.start.cast(), self.data.length) }
    }

    /// The same, to look at.
    pub fn arena_bytes(&self) -> &[u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.data.start.cast(), self.data.length) }
    }

    /// Puts `code` at `offset`, which must be at least 64, in a page of INT3.
    pub fn set_code(&mut self, offset: usize, code: &[u8]) {
        let end = offset + code.len();
        assert!(offset >= PROLOGUE && end < PAGE as usize, "code outside its page");
        let used = std::mem::replace(&mut self.used, offset..end);
        let page = self.code_page_mut();
        page[used].fill(0xCC);
        page[offset..end].copy_from_slice(code);
    }

    fn code_page_mut(&mut self) -> &mut [u8] {
        // SAFETY: our own writable mapping of the code page, borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.code.start.cast::<u8>(), self.code.length) }
    }

    /// The code page as it was last executed.
    pub fn code_page(&self) -> &[u8] {
        // SAFETY: our own mapping; only `set_code` and `run` write to it, which borrow it exclusively.
        unsafe { std::slice::from_raw_parts(self.code.start.cast(), self.code.length) }
    }

    /// Runs what [`Self::set_code`] put at `offset` until an exception, and returns it.
    ///
    /// # Safety
    ///
    /// The code must not enter the kernel otherwise, must not change FS or GS, must not run forever, and with
    /// these registers must not reach memory of this process outside the arena.
    pub unsafe fn run(&mut self, mode: NativeMode, offset: usize, state: &mut NativeState) -> NativeStop {
        assert!(mode != NativeMode::Protected16 || self.has_ldt, "16-bit code needs its segments");
        let start = self.prologue(mode, offset, state.gpr[4]);
        super::vector::loadable(&mut state.fpu);
        let components = super::vector::enabled_components();
        let mut frame = Frame {
            gpr: state.gpr,
            rflags: (state.rflags & (flags::STATUS | flags::DF | flags::ID)) | flags::FIXED,
            fpu: &mut state.fpu,
            start,
            start_cs: match mode {
                NativeMode::Long => 0,
                NativeMode::Protected32 => USER32_CS,
                NativeMode::Protected16 => u64::from(SELECTORS_16.0),
            },
            start_data: u64::from(if mode == NativeMode::Protected16 { SELECTORS_16.1 } else { USER_DS }),
            rsp: 0,
            host_mxcsr: 0,
            host_fcw: 0,
            components,
            avx: components & 4,
        };
        let mut hook = Hook { frame: &raw mut frame, stop: None };
        let mut scope = FaultScope::new(recover, (&raw mut hook).cast());
        // SAFETY: `recover` captures the registers into `frame` and redirects to `leave`; the caller vouches for the
        // code. While it runs every exception is its own, but for those in `enter` that would be our bugs.
        unsafe { scope.enter(|| enter(hook.frame)) };
        state.gpr = frame.gpr;
        state.rflags = frame.rflags;
        state.fpu.0[6..24].fill(0);
        hook.stop.take().expect("the only way out is an exception")
    }

    /// Writes `mov rsp, value` and a jump to the code at `offset`, and returns where CS has it.
    fn prologue(&mut self, mode: NativeMode, offset: usize, value: u64) -> u64 {
        let mut bytes = match mode {
            NativeMode::Long => vec![0x48, 0xBC],
            NativeMode::Protected32 => vec![0xBC],
            NativeMode::Protected16 => vec![0x66, 0xBC],
        };
        bytes.extend_from_slice(&value.to_le_bytes()[..if mode == NativeMode::Long { 8 } else { 4 }]);
        bytes.push(0xE9);
        let displacement = if mode == NativeMode::Protected16 { 2 } else { 4 };
        let distance = (offset - (PROLOGUE + bytes.len() + displacement)) as u32;
        bytes.extend_from_slice(&distance.to_le_bytes()[..displacement]);
        self.code_page_mut()[PROLOGUE..PROLOGUE + bytes.len()].copy_from_slice(&bytes);
        mode.seen(self.layout).code + PROLOGUE as u64
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        if self.has_ldt {
            // Nothing uses the segments any more; if they stayed, the next user would overwrite them.
            ldt::clear(0).and_then(|()| ldt::clear(1)).ok();
        }
    }
}

/// Takes every exception for the end of the run.
unsafe fn recover(data: *mut (), context: &mut FaultContext) -> bool {
    // SAFETY: `run` passes its live hook and frame; nothing else touches them meanwhile.
    let (hook, frame) = unsafe {
        let hook = &mut *data.cast::<Hook>();
        (&mut hook.stop, &mut *hook.frame)
    };
    let vector = context.vector();
    let address = if vector == 14 { context.address() } else { 0 };
    *hook = Some(NativeStop { vector, error_code: context.error_code(), address, rip: context.rip() });
    for (number, register) in frame.gpr.iter_mut().enumerate() {
        *register = context.gpr(number);
    }
    frame.rflags = context.rflags();
    context.set_gpr(7, &raw mut *frame as u64);
    context.set_rip(leave as *const () as u64);
    context.set_rflags(flags::FIXED);
    context.set_cs_ss(USER_CS, USER_DS);
    true
}

/// Loads the frame's state and jumps to its code; comes back through [`leave`].
///
/// # Safety
///
/// See [`Native::run`].
#[unsafe(naked)]
unsafe extern "C" fn enter(frame: *mut Frame) {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "mov [rdi + {rsp}], rsp",
        "stmxcsr [rdi + {mxcsr}]",
        "fnstcw [rdi + {fcw}]",
        "mov rcx, [rdi + {fpu}]",
        "mov eax, [rdi + {components}]",
        "xor edx, edx",
        "test eax, eax",
        "jz 2f",
        "xrstor64 [rcx]",
        "jmp 3f",
        "2: fxrstor64 [rcx]",
        // Null selectors serve 64-bit code, not compatibility mode; it ignores the base and limit of all others.
        "3: mov rdx, [rdi + {data}]", "mov ds, edx", "mov es, edx", "mov ss, edx",
        "mov rax, [rdi + {cs}]",
        "test rax, rax",
        "jz 4f",
        "push rax",
        "push qword ptr [rdi + {start}]",
        "jmp 5f",
        "4: push qword ptr [rdi + {start}]",
        "5: push qword ptr [rdi + {rflags}]",
        "cmp qword ptr [rdi + {cs}], 0",
        "mov rax, [rdi]", "mov rcx, [rdi + 8]", "mov rdx, [rdi + 16]", "mov rbx, [rdi + 24]",
        "mov rbp, [rdi + 40]", "mov rsi, [rdi + 48]",
        "mov r8, [rdi + 64]", "mov r9, [rdi + 72]", "mov r10, [rdi + 80]", "mov r11, [rdi + 88]",
        "mov r12, [rdi + 96]", "mov r13, [rdi + 104]", "mov r14, [rdi + 112]", "mov r15, [rdi + 120]",
        "mov rdi, [rdi + 56]",
        "jnz 6f",
        "popfq",
        "ret",
        "6: popfq",
        "retfq",
        rsp = const offset_of!(Frame, rsp),
        mxcsr = const offset_of!(Frame, host_mxcsr),
        fcw = const offset_of!(Frame, host_fcw),
        fpu = const offset_of!(Frame, fpu),
        components = const offset_of!(Frame, components),
        start = const offset_of!(Frame, start),
        cs = const offset_of!(Frame, start_cs),
        rflags = const offset_of!(Frame, rflags),
        data = const offset_of!(Frame, start_data),
    )
}

/// Stores extended state, puts the host's back and returns from [`enter`]; RDI is the frame.
///
/// # Safety
///
/// Only after [`enter`].
#[unsafe(naked)]
unsafe extern "C" fn leave(frame: *mut Frame) {
    naked_asm!(
        "mov rsp, [rdi + {rsp}]",
        "mov rcx, [rdi + {fpu}]",
        "mov eax, [rdi + {components}]",
        "xor edx, edx",
        "test eax, eax",
        "jz 2f",
        "xsave64 [rcx]",
        "jmp 3f",
        "2: fxsave64 [rcx]",
        "3: fninit",
        "fldcw [rdi + {fcw}]",
        "ldmxcsr [rdi + {mxcsr}]",
        "cmp dword ptr [rdi + {avx}], 0",
        "jz 4f",
        "vzeroupper",
        "4: pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        components = const offset_of!(Frame, components),
        fcw = const offset_of!(Frame, host_fcw),
        mxcsr = const offset_of!(Frame, host_mxcsr),
        avx = const offset_of!(Frame, avx),
        fpu = const offset_of!(Frame, fpu),
        rsp = const offset_of!(Frame, rsp),
    )
}

/// A mapping, unmapped on drop.
struct Mapping {
    start: *mut libc::c_void,
    length: usize,
}

impl Mapping {
    fn map(at: u64, length: u64, protection: i32, flags: i32, fd: i32) -> io::Result<Mapping> {
        // SAFETY: without MAP_FIXED no existing mapping is touched.
        let start = unsafe { libc::mmap(at as *mut _, length as usize, protection, flags, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping { start, length: length as usize })
    }

    fn anywhere(fd: i32, length: u64, protection: i32) -> io::Result<Mapping> {
        Self::map(0, length, protection, libc::MAP_SHARED, fd)
    }

    fn fixed(fd: i32, at: u64, length: u64, protection: i32) -> io::Result<Mapping> {
        Self::map(at, length, protection, libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE, fd)
    }

    /// Address space without access.
    fn reserve(at: u64, length: u64) -> io::Result<Mapping> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
        Self::map(at, length, libc::PROT_NONE, flags, -1)
    }

    /// Shows the first `length` bytes of a file at `offset` of this reservation.
    fn show(&self, fd: i32, offset: u64, length: u64, protection: i32) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        assert!(offset + length <= self.length as u64, "outside the reservation");
        let at = self.start.wrapping_byte_add(offset as usize);
        // Present from the start: error codes tell absent pages from protected ones.
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE;
        // SAFETY: replaces only a part of our own reservation, as just checked.
        let shown = unsafe { libc::mmap(at, length as usize, protection, flags, fd, 0) };
        if shown == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: ours, and nothing refers to it any more.
        unsafe { libc::munmap(self.start, self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn native(slot: u64) -> Native {
        let base = 0x6000_0000 + 0x100_0000 * slot;
        let layout =
            NativeLayout { code: base, data: base + 0x10_0000, writable_pages: 2, read_only_pages: 1 };
        Native::new(layout).unwrap()
    }

    fn state() -> NativeState {
        let gpr = std::array::from_fn(|n| 0x1111_1111_1111_1111 * n as u64);
        NativeState { gpr, rflags: flags::FIXED, fpu: FpuState::initial() }
    }

    fn run(native: &mut Native, mode: NativeMode, code: &[u8], state: &mut NativeState) -> NativeStop {
        native.set_code(64, code);
        // SAFETY: the tests' code computes, touches the arena and guard pages, and ends.
        unsafe { native.run(mode, 64, state) }
    }

    #[test]
    fn all_registers_go_in_and_out() {
        let mut n = native(0);
        let mut s = state();
        let stop = run(&mut n, NativeMode::Long, &[0x4C, 0x01, 0xFC], &mut s); // add rsp, r15
        assert_eq!(stop, NativeStop { vector: 3, rip: n.layout().code + 64 + 4, ..Default::default() });
        let mut expected = state().gpr;
        expected[4] = expected[4].wrapping_add(expected[15]);
        assert_eq!(s.gpr, expected);
        // 0x44… + 0xFF…: carry, sign clear (0x4444444444444443), odd low-byte parity.
        assert_eq!(s.rflags & flags::STATUS, flags::CF | flags::AF);
    }

    #[test]
    fn the_arena_is_read_written_and_guarded() {
        let mut n = native(1);
        let data = n.layout().data;
        n.arena()[8..16].copy_from_slice(&5u64.to_le_bytes());
        let mut s = state();
        s.gpr[3] = data;
        let stop = run(&mut n, NativeMode::Long, &[0x48, 0xFF, 0x43, 0x08], &mut s); // inc qword [rbx+8]
        assert_eq!((stop.vector, n.arena()[8]), (3, 6));
        s.gpr[3] = data + 2 * PAGE; // read-only
        let stop = run(&mut n, NativeMode::Long, &[0x48, 0xFF, 0x03], &mut s);
        let here = n.layout().code + 64;
        assert_eq!(stop, NativeStop { vector: 14, error_code: 7, address: data + 2 * PAGE, rip: here });
        s.gpr[3] = data - 8;
        let stop = run(&mut n, NativeMode::Long, &[0x48, 0xFF, 0x03], &mut s);
        assert_eq!((stop.vector, stop.error_code & !2, stop.address), (14, 4, data - 8));
        s.gpr[3] = 1 << 63;
        let stop = run(&mut n, NativeMode::Long, &[0x48, 0xFF, 0x03], &mut s);
        assert_eq!((stop.vector, stop.error_code), (13, 0));
    }

    #[test]
    fn floating_point_state_goes_in_and_out() {
        let mut n = native(2);
        let mut s = state();
        s.fpu.0[160] = 9;
        let code = [0xD9, 0xEB, 0x66, 0x0F, 0x6F, 0xC8]; // fldpi; movdqa xmm1, xmm0
        assert_eq!(run(&mut n, NativeMode::Long, &code, &mut s).vector, 3);
        assert_eq!((s.fpu.0[32], s.fpu.0[176]), (0x35, 9));
        s.fpu.set_mxcsr(0);
        let stop = run(&mut n, NativeMode::Long, &[0x0F, 0x5E, 0xC9], &mut s); // divps xmm1, xmm1: 0/0
        assert_eq!((stop.vector, s.fpu.mxcsr() & 0x3F), (19, 3));
    }

    #[test]
    fn thirty_two_bit_code_runs_in_compatibility_mode() {
        let mut n = native(3);
        let mut s = state();
        s.gpr = [0; 16];
        s.gpr[4] = n.layout().data + 64;
        s.gpr[0] = 0x19;
        let code = [0x40, 0x50, 0x27]; // inc eax; push eax; daa
        let stop = run(&mut n, NativeMode::Protected32, &code, &mut s);
        assert_eq!((stop.vector, stop.rip), (3, n.layout().code + 64 + 4));
        assert_eq!((s.gpr[0] & 0xFFFF_FFFF, s.gpr[4] & 0xFFFF_FFFF), (0x20, n.layout().data + 60));
        assert_eq!(n.arena()[60..64], [0x1A, 0, 0, 0]);
    }

    #[test]
    fn sixteen_bit_code_runs_in_segments_of_the_ldt() {
        let mut n = native(4);
        if let Err(error) = n.allow_sixteen_bits() {
            println!("NOT RUN: this host refuses modify_ldt: {error}");
            return;
        }
        let mut s = state();
        s.gpr = [0; 16];
        s.gpr[0] = 0x1234_5678;
        s.gpr[3] = DATA_BASE_16 + 8;
        // The upper half of ESP is garbage that a 16-bit stack does not look at.
        s.gpr[4] = 0xABCD_0000 | (DATA_BASE_16 + 64);
        // push ax; mov [bx], eax; push cs; push ss; add sp, bx
        let code = [0x50, 0x66, 0x89, 0x07, 0x0E, 0x16, 0x01, 0xDC];
        let stop = run(&mut n, NativeMode::Protected16, &code, &mut s);
        assert_eq!((stop.vector, stop.rip), (3, 64 + 9));
        assert_eq!(n.arena()[8..12], [0x78, 0x56, 0x34, 0x12]);
        assert_eq!(n.arena()[58..64], [0xF, 0, 0x7, 0, 0x78, 0x56]);
        assert_eq!(s.gpr[4], 0xABCD_0000 | (2 * DATA_BASE_16 + 64 - 6 + 8));
        // Beyond the limit: #GP through DS, #SS through the stack.
        s.gpr[3] = u64::from(DATA_LIMIT_16);
        let stop = run(&mut n, NativeMode::Protected16, &[0x89, 0x07], &mut s);
        assert_eq!((stop.vector, stop.error_code), (13, 0));
        s.gpr[4] = 0x9000;
        let stop = run(&mut n, NativeMode::Protected16, &[0x50], &mut s);
        assert_eq!((stop.vector, stop.error_code), (12, 0));
        // A page fault reports the linear address.
        s.gpr[3] = DATA_BASE_16 - 8;
        let stop = run(&mut n, NativeMode::Protected16, &[0x8B, 0x07], &mut s);
        assert_eq!((stop.vector, stop.address), (14, n.layout().data - 8));
    }
}

//! The way into code under test and out of it, with every register given and returned.
//!
//! [`Gate::pass`] loads all registers and jumps. Out leads a fault, or an *exit*: a jump to a stub of 64-bit code
//! ([`Gate::stub`]) that stores all registers without touching the stack or a flag. A signal takes microseconds; an exit does not.
//!
//! Invariants the `unsafe` code relies on: [`Frame`] is laid out as the assembly expects, and lives as long as its [`Gate`],
//! whose stubs know its address; every exception raised between [`enter`] and [`leave`] belongs to the code under test.

use super::native::{NativeState, NativeStop};
use crate::signal::{FaultContext, FaultScope};
use paravane_cpu::{FpuState, flags};
use std::arch::naked_asm;
use std::mem::offset_of;

/// Linux's selectors: user data, 64-bit user code.
pub(super) const USER_DS: u16 = 0x2B;
pub(super) const USER_CS: u16 = 0x33;

/// Flags that code under test begins with; the others are the kernel's.
const LOADED: u64 = flags::STATUS | flags::DF | flags::NT | flags::AC | flags::ID;

/// Where [`Gate::pass`] begins.
#[derive(Clone, Copy)]
pub(super) struct Start {
    /// Offset in the code segment; the code there loads RSP.
    pub(super) rip: u64,
    /// The code segment; zero for that of 64-bit code.
    pub(super) cs: u16,
    /// Loaded into DS, ES and SS.
    pub(super) data: u16,
}

/// How it ended.
pub(super) enum End {
    /// Through the stub of this number.
    Exit(usize),
    /// With an exception.
    Stop(NativeStop),
}

/// What the assembly works on.
#[repr(C)]
struct Frame {
    gpr: [u64; 16],
    rflags: u64,
    fpu: *mut FpuState,
    start: u64,
    start_cs: u64,
    start_data: u64,
    rsp: u64,
    /// Where stubs go on: [`exit`].
    exit: u64,
    number: u32,
    host_mxcsr: u32,
    host_fcw: u32,
    components: u32,
    avx: u32,
}

/// The frame, at one address for good.
pub(super) struct Gate {
    frame: *mut Frame,
}

struct Hook {
    frame: *mut Frame,
    stop: Option<NativeStop>,
}

impl Gate {
    pub(super) fn new() -> Gate {
        let components = super::vector::enabled_components();
        let frame = Frame {
            gpr: [0; 16],
            rflags: 0,
            fpu: std::ptr::null_mut(),
            start: 0,
            start_cs: 0,
            start_data: 0,
            rsp: 0,
            exit: exit as *const () as u64,
            number: 0,
            host_mxcsr: 0,
            host_fcw: 0,
            components,
            avx: components & 4,
        };
        Gate { frame: Box::into_raw(Box::new(frame)) }
    }

    /// 64-bit code that ends a pass as exit `number` (below 128), with all registers as it finds them.
    pub(super) fn stub(&self, number: u8) -> Vec<u8> {
        let frame = self.frame as u64;
        let field = |at: usize| (at as u32).to_le_bytes();
        [
            &[0x48, 0xA3][..], // mov [frame.gpr], rax
            &(frame + offset_of!(Frame, gpr) as u64).to_le_bytes(),
            &[0x48, 0xB8], // mov rax, frame
            &frame.to_le_bytes(),
            &[0xC7, 0x80], // mov dword [rax + number], number
            &field(offset_of!(Frame, number)),
            &u32::from(number).to_le_bytes(),
            &[0xFF, 0xA0], // jmp [rax + exit]
            &field(offset_of!(Frame, exit)),
        ]
        .concat()
    }

    /// Loads `state`, goes to `start`, and comes back with the state behind.
    ///
    /// # Safety
    ///
    /// The code there must not enter the kernel otherwise, must not change FS or GS, must end in an exit or a fault, and
    /// must not reach memory of this process that it does not own.
    pub(super) unsafe fn pass(&mut self, start: Start, state: &mut NativeState) -> End {
        // SAFETY: the frame is ours alone; no code under test runs now.
        let frame = unsafe { &mut *self.frame };
        frame.gpr = state.gpr;
        frame.rflags = (state.rflags & LOADED) | flags::FIXED;
        frame.fpu = &raw mut state.fpu;
        frame.start = start.rip;
        frame.start_cs = u64::from(start.cs);
        frame.start_data = u64::from(start.data);
        let mut hook = Hook { frame: self.frame, stop: None };
        let mut scope = FaultScope::new(recover, (&raw mut hook).cast());
        // SAFETY: `recover` captures the registers into the frame and redirects to `leave`; the caller vouches for the
        // code. While it runs every exception is its own, but for those in `enter` that would be our bugs.
        unsafe { scope.enter(|| enter(hook.frame)) };
        // SAFETY: as above; code under test has ended.
        let frame = unsafe { &*self.frame };
        state.gpr = frame.gpr;
        state.rflags = frame.rflags;
        match hook.stop {
            Some(stop) => End::Stop(stop),
            None => End::Exit(frame.number as usize),
        }
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        // SAFETY: from `Box::into_raw`; nothing runs that could still come through a stub.
        drop(unsafe { Box::from_raw(self.frame) });
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
/// See [`Gate::pass`].
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

/// Where stubs go on, RAX is the frame and its own value stored there: stores what else [`recover`] would, and leaves.
///
/// # Safety
///
/// Only from a stub.
#[unsafe(naked)]
unsafe extern "C" fn exit() {
    naked_asm!(
        "mov [rax + 8], rcx", "mov [rax + 16], rdx", "mov [rax + 24], rbx", "mov [rax + 32], rsp",
        "mov [rax + 40], rbp", "mov [rax + 48], rsi", "mov [rax + 56], rdi",
        "mov [rax + 64], r8", "mov [rax + 72], r9", "mov [rax + 80], r10", "mov [rax + 88], r11",
        "mov [rax + 96], r12", "mov [rax + 104], r13", "mov [rax + 112], r14", "mov [rax + 120], r15",
        "mov rdi, rax",
        "mov rsp, [rdi + {rsp}]",
        "pushfq",
        "pop qword ptr [rdi + {rflags}]",
        "push {fixed}",
        "popfq",
        "mov ecx, {ss}",
        "mov ss, ecx",
        "jmp {leave}",
        rsp = const offset_of!(Frame, rsp),
        rflags = const offset_of!(Frame, rflags),
        fixed = const flags::FIXED,
        ss = const USER_DS,
        leave = sym leave,
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

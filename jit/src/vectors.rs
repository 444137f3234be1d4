//! Guest x87, SSE and AVX state while the translator runs: XMM/YMM in the context between runs of translated code,
//! x87 and MMX left in the host's unit, which Rust code never touches.
//!
//! Invariants this unsafe island relies on: `context` outlives the value, and both are used on one thread.

use crate::context::JitContext;
use crate::host::HostVectorUnit;
use paravane_cpu::{Fault, FpuState, VectorUnit};
use paravane_memory::VpIndex;
use std::arch::asm;

/// The vector unit behind the translator's interpreter core.
pub(crate) struct LiveVectors {
    context: *mut JitContext,
    host: HostVectorUnit,
}

// SAFETY: the context is owned by the same translator and moves with it.
unsafe impl Send for LiveVectors {}

#[repr(C, align(64))]
struct Legacy([u8; 512]);

/// Bytes of x87 state proper in the legacy area: control and status, then the registers.
const X87: [std::ops::Range<usize>; 2] = [0..6, 32..160];

impl LiveVectors {
    pub(crate) fn new(context: *mut JitContext, host: HostVectorUnit) -> LiveVectors {
        LiveVectors { context, host }
    }
}

/// Copies the live state into `fpu`.
///
/// # Safety
/// `context` must be valid.
pub(crate) unsafe fn save(context: *const JitContext, fpu: &mut FpuState) {
    let mut x = Legacy([0; 512]);
    // SAFETY: 512 aligned bytes.
    unsafe { asm!("fxsave64 [{}]", in(reg) &raw mut x, options(nostack, preserves_flags)) };
    for r in X87 {
        fpu.0[r.clone()].copy_from_slice(&x.0[r]);
    }
    // The opcode and the instruction and data pointers are the host's: the guest's are in its `CpuState`.
    fpu.0[6..24].fill(0);
    // SAFETY: the caller's promise.
    let c = unsafe { &*context };
    fpu.set_mxcsr(c.mxcsr);
    for i in 0..16 {
        fpu.0[160 + i * 16..176 + i * 16].copy_from_slice(&c.ymm[i][..16]);
        fpu.0[576 + i * 16..592 + i * 16].copy_from_slice(&c.ymm[i][16..]);
    }
    fpu.0[512] = 7;
}

/// Makes `fpu` the live state.
///
/// # Safety
/// `context` must be valid.
pub(crate) unsafe fn load(context: *mut JitContext, fpu: &FpuState) {
    let mut x = Legacy([0; 512]);
    // SAFETY: 512 aligned bytes; keeps the host's MXCSR in the image.
    unsafe { asm!("fxsave64 [{}]", in(reg) &raw mut x, options(nostack, preserves_flags)) };
    for r in X87 {
        x.0[r.clone()].copy_from_slice(&fpu.0[r]);
    }
    x.0[6..24].fill(0);
    // SAFETY: the image is valid: MXCSR is the host's own, the rest is x87 state without reserved bits. XMM registers
    // are reloaded with what they held.
    unsafe { asm!("fxrstor64 [{}]", in(reg) &raw const x, options(nostack, preserves_flags)) };
    // SAFETY: the caller's promise.
    let c = unsafe { &mut *context };
    c.mxcsr = fpu.mxcsr();
    for i in 0..16 {
        c.ymm[i][..16].copy_from_slice(&fpu.0[160 + i * 16..176 + i * 16]);
        c.ymm[i][16..].copy_from_slice(&fpu.0[576 + i * 16..592 + i * 16]);
    }
}

/// Where the live x87 unit stands with an unmasked error: host addresses of the instruction that raised it and of its
/// operand. `None` if nothing is pending.
pub(crate) fn pending_error() -> Option<(u64, u64)> {
    let mut status: u16;
    // SAFETY: FNSTSW reads the status word and changes nothing.
    unsafe { asm!("fnstsw ax", out("ax") status, options(nomem, nostack, preserves_flags)) };
    if status & 1 << 7 == 0 {
        return None;
    }
    let mut x = Legacy([0; 512]);
    // SAFETY: 512 aligned bytes.
    unsafe { asm!("fxsave64 [{}]", in(reg) &raw mut x, options(nostack, preserves_flags)) };
    let qword = |at: usize| u64::from_le_bytes(x.0[at..at + 8].try_into().expect("eight bytes"));
    Some((qword(8), qword(16)))
}

impl VectorUnit for LiveVectors {
    fn execute(
        &mut self,
        code: &[u8],
        fpu: &mut FpuState,
        gpr: &mut [u64; 16],
        rflags: &mut u64,
        operand: &mut [u8; 512],
    ) -> Result<(), Fault> {
        // SAFETY: `context` is valid by the invariant of this module.
        unsafe { save(self.context, fpu) };
        let result = self.host.execute(code, fpu, gpr, rflags, operand);
        // SAFETY: as above.
        unsafe { load(self.context, fpu) };
        result
    }

    fn sync(&mut self, fpu: &mut FpuState, _vp: VpIndex) {
        // SAFETY: `context` is valid by the invariant of this module.
        unsafe { save(self.context, fpu) };
    }

    fn changed(&mut self, fpu: &FpuState, _vp: VpIndex) {
        // SAFETY: `context` is valid by the invariant of this module.
        unsafe { load(self.context, fpu) };
    }
}

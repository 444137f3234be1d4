//! FXSAVE, FXRSTOR, XSAVE, XSAVEOPT, XSAVEC and XRSTOR (SDM 1, chapters 10.5 and 13).
//!
//! Done on [`FpuState`], whose contents always count. State components: x87 (0), SSE (1), AVX (2). The 64-bit forms
//! (REX.W) differ in how FIP and FDP are stored ([`x87`]).

use super::masked::MXCSR_MASK;
use super::operand::address;
use super::vector::misaligned;
use super::x87;
use crate::exec::Exec;
use crate::fault::Fault;
use crate::state::{CpuState, FpuPointers, FpuState, SegReg, cr0, cr4, gpr};
use iced_x86::{Instruction, Mnemonic};

const X87: u64 = 1 << 0;
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;
/// XCOMP_BV bit 63: the compacted format.
const COMPACTED: u64 = 1 << 63;

/// MXCSR and MXCSR_MASK in the legacy area.
const MXCSR: usize = 24;
/// FOP, FIP and FDP.
const POINTERS: std::ops::Range<usize> = 6..24;
const MXCSR_INITIAL: u32 = 0x1F80;
const ST: usize = 32;
const XMM: usize = 160;
const HEADER: usize = 512;
const YMM: usize = 576;

/// How XSAVE and its variants write.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// XSAVE: every requested component.
    Standard,
    /// XSAVEOPT: those in use.
    Optimized,
    /// XSAVEC: those in use, header rewritten, compacted format.
    Compacted,
}

/// Bytes of XMM registers (and of their upper halves) visible in the current mode.
fn register_bytes(ex: &Exec<'_>) -> usize {
    if ex.cpu.code64() { 256 } else { 128 }
}

/// Segment and offset of the area, aligned to `align`.
fn area(ex: &Exec<'_>, i: &Instruction, align: u64) -> Result<(SegReg, u64), Fault> {
    let (seg, at) = address(ex.cpu, i);
    if misaligned(ex, seg, at, align) {
        return Err(Fault::GP0);
    }
    Ok((seg, at))
}

/// The legacy region as FXSAVE and XSAVE store it.
fn legacy_image(ex: &mut Exec<'_>, wide: bool) -> [u8; 512] {
    ex.vector.sync(&mut ex.cpu.fpu, ex.vp);
    let mut image = [0; 512];
    image.copy_from_slice(&ex.cpu.fpu.0[..512]);
    image[5] = 0;
    image[POINTERS].copy_from_slice(&x87::fxsave_pointers(&ex.cpu.fpu_pointers, wide));
    image[MXCSR + 4..ST].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    image
}

fn fx_available(ex: &Exec<'_>) -> Result<(), Fault> {
    if ex.cpu.cr0 & (cr0::EM | cr0::TS) != 0 { Err(Fault::NM) } else { Ok(()) }
}

/// FXSAVE.
pub(super) fn fxsave(ex: &mut Exec<'_>, i: &Instruction) -> Result<(), Fault> {
    fx_available(ex)?;
    let (seg, at) = area(ex, i, 16)?;
    ex.probe_write(seg, at, 512)?;
    let image = legacy_image(ex, wide(i));
    ex.store_bytes(seg, at, &image[..XMM + register_bytes(ex)])
}

/// FXRSTOR.
pub(super) fn fxrstor(ex: &mut Exec<'_>, i: &Instruction) -> Result<(), Fault> {
    fx_available(ex)?;
    let (seg, at) = area(ex, i, 16)?;
    let mut image = [0; 512];
    ex.load_bytes(seg, at, &mut image)?;
    let mxcsr = dword(&image, MXCSR);
    if mxcsr & !MXCSR_MASK != 0 {
        return Err(Fault::GP0);
    }
    let bytes = register_bytes(ex);
    ex.cpu.fpu_pointers = x87::fxrstor_pointers(&image[POINTERS], wide(i));
    change(ex, |fpu| {
        load_x87(fpu, &image);
        fpu.set_mxcsr(mxcsr);
        fpu.0[XMM..XMM + bytes].copy_from_slice(&image[XMM..XMM + bytes]);
    });
    Ok(())
}

/// REX.W: FIP and FDP have 64 bits and no selectors.
fn wide(i: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(i.mnemonic(), Fxsave64 | Fxrstor64 | Xsave64 | Xsaveopt64 | Xsavec64 | Xrstor64)
}

fn change(ex: &mut Exec<'_>, f: impl FnOnce(&mut FpuState)) {
    ex.vector.sync(&mut ex.cpu.fpu, ex.vp);
    f(&mut ex.cpu.fpu);
    ex.vector.changed(&ex.cpu.fpu, ex.vp);
}

fn load_x87(fpu: &mut FpuState, image: &[u8]) {
    fpu.0[..5].copy_from_slice(&image[..5]);
    fpu.0[5..MXCSR].fill(0);
    fpu.0[ST..XMM].copy_from_slice(&image[ST..XMM]);
}

fn dword(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn qword(bytes: &[u8], at: usize) -> u64 {
    u64::from(dword(bytes, at)) | u64::from(dword(bytes, at + 4)) << 32
}

/// Checks common to the XSAVE family; the requested-feature bitmap.
fn requested(ex: &Exec<'_>) -> Result<u64, Fault> {
    if ex.cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Fault::UD);
    }
    if ex.cpu.cr0 & cr0::TS != 0 {
        return Err(Fault::NM);
    }
    let instruction = u64::from(ex.cpu.gpr[gpr::RAX] as u32) | ex.cpu.gpr[gpr::RDX] << 32;
    Ok(ex.cpu.xcr0 & instruction & (X87 | SSE | AVX))
}

/// XINUSE: components not in their initial configuration, of which `bytes` of registers are visible (SDM 1, 13.6). A changed
/// MXCSR counts as SSE in use.
fn in_use(cpu: &CpuState, bytes: usize) -> u64 {
    let fpu = &cpu.fpu;
    let zero = |r: std::ops::Range<usize>| fpu.0[r].iter().all(|&b| b == 0);
    let x87 = qword(&fpu.0, 0) & 0xFF_FFFF_FFFF != 0x37F
        || !zero(ST..XMM)
        || cpu.fpu_pointers != FpuPointers::default();
    let sse = !zero(XMM..XMM + bytes) || fpu.mxcsr() != MXCSR_INITIAL;
    let avx = !zero(YMM..YMM + bytes);
    u64::from(x87) | u64::from(sse) << 1 | u64::from(avx) << 2
}

/// XSAVE, XSAVEOPT, XSAVEC.
pub(super) fn xsave(ex: &mut Exec<'_>, i: &Instruction, form: Form) -> Result<(), Fault> {
    let wanted = requested(ex)?;
    let (seg, at) = area(ex, i, 64)?;
    let end = if wanted & AVX != 0 { YMM + 256 } else { YMM };
    ex.probe_write(seg, at, end)?;
    let image = legacy_image(ex, wide(i));
    let bytes = register_bytes(ex);
    let used = in_use(ex.cpu, bytes) & wanted;
    let written = if form == Form::Standard { wanted } else { used };
    if written & X87 != 0 {
        ex.store_bytes(seg, at, &image[..MXCSR])?;
        ex.store_bytes(seg, at.wrapping_add(ST as u64), &image[ST..XMM])?;
    }
    let mxcsr = if form == Form::Compacted { written & SSE } else { wanted & (SSE | AVX) };
    if mxcsr != 0 {
        ex.store_bytes(seg, at.wrapping_add(MXCSR as u64), &image[MXCSR..ST])?;
    }
    if written & SSE != 0 {
        ex.store_bytes(seg, at.wrapping_add(XMM as u64), &image[XMM..XMM + bytes])?;
    }
    if written & AVX != 0 {
        let mut high = [0; 256];
        high.copy_from_slice(&ex.cpu.fpu.0[YMM..YMM + 256]);
        ex.store_bytes(seg, at.wrapping_add(YMM as u64), &high[..bytes])?;
    }
    let header = at.wrapping_add(HEADER as u64);
    if form == Form::Compacted {
        ex.store(seg, header, 8, used)?;
        return ex.store(seg, header.wrapping_add(8), 8, COMPACTED | wanted);
    }
    let old = ex.load(seg, header, 8)?;
    ex.store(seg, header, 8, (old & !wanted) | used)
}

/// Checks the header; XSTATE_BV and whether the format is compacted.
fn checked_header(header: &[u8], xcr0: u64) -> Result<(u64, bool), Fault> {
    let (present, format) = (qword(header, 0), qword(header, 8));
    let zero = |from: usize, to: usize| header[from..to].iter().all(|&b| b == 0);
    let legal = if format & COMPACTED != 0 {
        let listed = format & !COMPACTED;
        listed & !xcr0 == 0 && present & !listed == 0 && zero(16, 64)
    } else {
        present & !xcr0 == 0 && zero(8, 24)
    };
    if legal { Ok((present, format & COMPACTED != 0)) } else { Err(Fault::GP0) }
}

/// XRSTOR, both formats.
pub(super) fn xrstor(ex: &mut Exec<'_>, i: &Instruction) -> Result<(), Fault> {
    let wanted = requested(ex)?;
    let (seg, at) = area(ex, i, 64)?;
    let mut image = [0; YMM];
    ex.load_bytes(seg, at, &mut image)?;
    let (present, compacted) = checked_header(&image[HEADER..], ex.cpu.xcr0)?;
    let mut high = [0; 256];
    let bytes = register_bytes(ex);
    let loaded = wanted & present;
    if loaded & AVX != 0 {
        // The only extended component: it is first in the compacted format too.
        ex.load_bytes(seg, at.wrapping_add(YMM as u64), &mut high[..bytes])?;
    }
    let mxcsr = match compacted {
        true if wanted & SSE == 0 => None,
        true if loaded & SSE == 0 => Some(MXCSR_INITIAL),
        false if wanted & (SSE | AVX) == 0 => None,
        _ => Some(dword(&image, MXCSR)),
    };
    if mxcsr.is_some_and(|v| v & !MXCSR_MASK != 0) {
        return Err(Fault::GP0);
    }
    if wanted & X87 != 0 {
        let given = loaded & X87 != 0;
        let pointers = given.then(|| x87::fxrstor_pointers(&image[POINTERS], wide(i)));
        ex.cpu.fpu_pointers = pointers.unwrap_or_default();
    }
    change(ex, |fpu| {
        let initial = FpuState::initial();
        if wanted & X87 != 0 {
            load_x87(fpu, if loaded & X87 != 0 { &image } else { &initial.0 });
        }
        if let Some(v) = mxcsr {
            fpu.set_mxcsr(v);
        }
        if wanted & SSE != 0 {
            let from: &[u8] = if loaded & SSE != 0 { &image } else { &initial.0 };
            fpu.0[XMM..XMM + bytes].copy_from_slice(&from[XMM..XMM + bytes]);
        }
        if wanted & AVX != 0 {
            fpu.0[YMM..YMM + bytes].copy_from_slice(&high[..bytes]);
        }
    });
    Ok(())
}

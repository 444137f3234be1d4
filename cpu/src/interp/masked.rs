//! Vector instructions whose memory accesses depend on a mask or a vector index, and the loads and stores of
//! MXCSR (SDM 2: VGATHERxxx, VPGATHERxx, VMASKMOV, VPMASKMOV, MASKMOVQ, MASKMOVDQU, LDMXCSR, STMXCSR).
//!
//! They are done here and not by the host, because each element has its own fault.

use super::alu::sign_extend;
use super::operand::{address, address_mask, memory_segment};
use super::vector::enter_mmx;
use crate::cpuid::HostVendor;
use crate::exec::Exec;
use crate::fault::Fault;
use crate::state::{FpuState, SegReg, gpr};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

/// MXCSR bits that may be set.
pub(super) const MXCSR_MASK: u32 = 0xFFFF;

/// Executes `i` if it is one of these; the checks of its class have passed.
pub(super) fn execute(ex: &mut Exec<'_>, i: &Instruction) -> Option<Result<(), Fault>> {
    use Mnemonic::*;
    let (index, element) = match i.mnemonic() {
        Ldmxcsr | Vldmxcsr => return Some(ldmxcsr(ex, i)),
        Stmxcsr | Vstmxcsr => return Some(stmxcsr(ex, i)),
        Maskmovdqu | Vmaskmovdqu => return Some(store_bytes_by_mask(ex, i, 16)),
        Maskmovq => return Some(store_bytes_by_mask(ex, i, 8)),
        Vmaskmovps | Vpmaskmovd => return Some(maskmov(ex, i, 4)),
        Vmaskmovpd | Vpmaskmovq => return Some(maskmov(ex, i, 8)),
        Vgatherdps | Vpgatherdd => (4, 4),
        Vgatherdpd | Vpgatherdq => (4, 8),
        Vgatherqps | Vpgatherqd => (8, 4),
        Vgatherqpd | Vpgatherqq => (8, 8),
        _ => return None,
    };
    Some(gather(ex, i, index, element))
}

/// A vector register's value, 32 bytes.
type Lanes = [u8; 32];

fn lanes(fpu: &FpuState, r: Register) -> Lanes {
    let mut v = [0; 32];
    v[..16].copy_from_slice(&fpu.0[FpuState::xmm_range(r.number())]);
    v[16..].copy_from_slice(&fpu.0[FpuState::ymm_high_range(r.number())]);
    v
}

/// Writes `bytes` bytes of `v` and zeroes what lies above, as VEX instructions do.
fn set_lanes(fpu: &mut FpuState, r: Register, mut v: Lanes, bytes: usize) {
    v[bytes..].fill(0);
    fpu.0[FpuState::xmm_range(r.number())].copy_from_slice(&v[..16]);
    fpu.0[FpuState::ymm_high_range(r.number())].copy_from_slice(&v[16..]);
}

fn element(v: &Lanes, k: usize, size: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes[..size].copy_from_slice(&v[k * size..(k + 1) * size]);
    u64::from_le_bytes(bytes)
}

fn set_element(v: &mut Lanes, k: usize, size: usize, value: u64) {
    v[k * size..(k + 1) * size].copy_from_slice(&value.to_le_bytes()[..size]);
}

/// The sign bit of element `k`.
fn selected(mask: &Lanes, k: usize, size: usize) -> bool {
    mask[(k + 1) * size - 1] & 0x80 != 0
}

/// Gathers: a fault leaves the elements done so far in the destination and their mask elements cleared; the mask
/// elements still to be done hold their sign throughout.
fn gather(ex: &mut Exec<'_>, i: &Instruction, index: usize, size: usize) -> Result<(), Fault> {
    let (to, by, at) = (i.op0_register(), i.op2_register(), i.memory_index());
    if to.number() == by.number() || to.number() == at.number() || by.number() == at.number() {
        return Err(Fault::UD);
    }
    ex.vector.sync(&mut ex.cpu.fpu, ex.vp);
    let (mut result, mut mask) = (lanes(&ex.cpu.fpu, to), lanes(&ex.cpu.fpu, by));
    let indices = lanes(&ex.cpu.fpu, at);
    let count = (to.size() / size).min(at.size() / index);
    let (mut fault, mut loaded) = (None, false);
    let vector = if to.is_ymm() || at.is_ymm() { 32 } else { 16 };
    for k in 0..vector / size {
        let extended = if selected(&mask, k, size) { u64::MAX } else { 0 };
        set_element(&mut mask, k, size, extended);
    }
    for k in 0..count {
        if selected(&mask, k, size) {
            match gather_element(ex, i, element(&indices, k, index), index, size) {
                Ok(v) => {
                    set_element(&mut result, k, size, v);
                    loaded = true;
                }
                Err(f) => {
                    fault = Some(f);
                    break;
                }
            }
        }
        set_element(&mut mask, k, size, 0);
    }
    match fault {
        None => {
            set_lanes(&mut ex.cpu.fpu, to, result, count * size);
            set_lanes(&mut ex.cpu.fpu, by, mask, 0);
        }
        Some(_) => {
            if loaded {
                set_lanes(&mut ex.cpu.fpu, to, result, vector);
            }
            set_lanes(&mut ex.cpu.fpu, by, mask, vector);
        }
    }
    ex.vector.changed(&ex.cpu.fpu, ex.vp);
    fault.map_or(Ok(()), Err)
}

fn gather_element(
    ex: &mut Exec<'_>,
    i: &Instruction,
    index: u64,
    index_size: usize,
    size: usize,
) -> Result<u64, Fault> {
    let (seg, at) = (memory_segment(i), vector_base(ex, i));
    let offset = sign_extend(index, index_size).wrapping_mul(u64::from(i.memory_index_scale()));
    load_unchecked(ex, seg, at.wrapping_add(offset) & address_mask(i), size)
}

/// An element's load: gathers and masked moves are exempt from alignment checking (SDM 2C, VPGATHER, VMASKMOV).
fn load_unchecked(ex: &mut Exec<'_>, seg: SegReg, at: u64, size: usize) -> Result<u64, Fault> {
    let mut buf = [0; 8];
    ex.load_bytes(seg, at, &mut buf[..size])?;
    Ok(u64::from_le_bytes(buf))
}

/// Base and displacement of a VSIB operand.
fn vector_base(ex: &Exec<'_>, i: &Instruction) -> u64 {
    let base = i.memory_base();
    let base = if base == Register::None { 0 } else { super::operand::read_gpr(ex.cpu, base) };
    base.wrapping_add(i.memory_displacement64())
}

/// VMASKMOVPS/PD, VPMASKMOVD/Q: elements whose mask is clear are not accessed.
fn maskmov(ex: &mut Exec<'_>, i: &Instruction, size: usize) -> Result<(), Fault> {
    ex.vector.sync(&mut ex.cpu.fpu, ex.vp);
    let by = i.op1_register();
    let mask = lanes(&ex.cpu.fpu, by);
    let (seg, base) = address(ex.cpu, i);
    // The address size bounds where the operand begins, not its elements; but outside 64-bit code offsets have 32 bits.
    let wrap = if ex.cpu.code64() { u64::MAX } else { 0xFFFF_FFFF };
    let at = |k: usize| base.wrapping_add((k * size) as u64) & wrap;
    let wanted = (0..by.size() / size).filter(|&k| selected(&mask, k, size));
    let stores = i.op0_kind() == OpKind::Memory;
    // Limits of all elements come before pages of any (measured on Emerald Rapids).
    for k in wanted.clone() {
        ex.linear(seg, at(k), size, stores)?;
    }
    if stores {
        let v = lanes(&ex.cpu.fpu, i.op2_register());
        for k in wanted.clone() {
            ex.probe_write(seg, at(k), size)?;
        }
        for k in wanted {
            ex.store_bytes(seg, at(k), &element(&v, k, size).to_le_bytes()[..size])?;
        }
        return Ok(());
    }
    let mut v = [0; 32];
    for k in wanted {
        let value = load_unchecked(ex, seg, at(k), size)?;
        set_element(&mut v, k, size, value);
    }
    set_lanes(&mut ex.cpu.fpu, i.op0_register(), v, by.size());
    ex.vector.changed(&ex.cpu.fpu, ex.vp);
    Ok(())
}

/// The value of XMM or, after [`enter_mmx`], MMX register `r`.
fn bytes_of(fpu: &FpuState, r: Register) -> [u8; 16] {
    let mut v = [0; 16];
    if r.is_mm() {
        let place = 32 + 16 * r.number();
        v[..8].copy_from_slice(&fpu.0[place..place + 8]);
    } else {
        v.copy_from_slice(&fpu.0[FpuState::xmm_range(r.number())]);
    }
    v
}

/// MASKMOVQ, MASKMOVDQU: bytes at segment:rDI.
fn store_bytes_by_mask(ex: &mut Exec<'_>, i: &Instruction, size: usize) -> Result<(), Fault> {
    if size == 8 && !enter_mmx(ex)? {
        return Ok(());
    }
    ex.vector.sync(&mut ex.cpu.fpu, ex.vp);
    let v = bytes_of(&ex.cpu.fpu, i.op1_register());
    let mask = bytes_of(&ex.cpu.fpu, i.op2_register());
    let wrap = match i.op0_kind() {
        OpKind::MemorySegDI => 0xFFFF,
        OpKind::MemorySegEDI => 0xFFFF_FFFF,
        _ => u64::MAX,
    };
    let (seg, base): (SegReg, u64) = (memory_segment(i), ex.cpu.gpr[gpr::RDI] & wrap);
    if let Ok(lin) = ex.linear(seg, base, size, true) {
        // Of all 16 bytes on Zen 5, of 8 on Emerald Rapids.
        let checked = if ex.model.host() == HostVendor::Amd { size } else { 8 };
        ex.check_alignment(lin, checked as u64)?;
    }
    let wanted = (0..size).filter(|&k| mask[k] & 0x80 != 0);
    // The whole operand is probed, whatever the mask (SDM 2B leaves that to the implementation), its upper half first.
    for half in (0..size / 8).rev() {
        ex.probe_write(seg, base.wrapping_add(8 * half as u64), 8)?;
    }
    for k in wanted.clone() {
        ex.probe_write(seg, base.wrapping_add(k as u64), 1)?;
    }
    for k in wanted {
        ex.store(seg, base.wrapping_add(k as u64), 1, u64::from(v[k]))?;
    }
    Ok(())
}

/// LDMXCSR: reserved bits are `#GP(0)`.
fn ldmxcsr(ex: &mut Exec<'_>, i: &Instruction) -> Result<(), Fault> {
    let (seg, at) = address(ex.cpu, i);
    let v = ex.load(seg, at, 4)? as u32;
    if v & !MXCSR_MASK != 0 {
        return Err(Fault::GP0);
    }
    ex.vector.sync(&mut ex.cpu.fpu, ex.vp);
    ex.cpu.fpu.set_mxcsr(v);
    ex.vector.changed(&ex.cpu.fpu, ex.vp);
    Ok(())
}

/// STMXCSR.
fn stmxcsr(ex: &mut Exec<'_>, i: &Instruction) -> Result<(), Fault> {
    ex.vector.sync(&mut ex.cpu.fpu, ex.vp);
    let (seg, at) = address(ex.cpu, i);
    let v = u64::from(ex.cpu.fpu.mxcsr());
    ex.store(seg, at, 4, v)
}

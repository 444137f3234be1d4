//! Operands: registers by name, effective addresses, immediates (SDM 1, section 3.7; SDM 2A, chapter 2).

use super::alu::mask;
use crate::exec::Exec;
use crate::fault::Fault;
use crate::state::{CpuState, SegReg, flags};
use iced_x86::{CodeSize, Instruction, OpKind, Register};

const AL: u32 = Register::AL as u32;
const AH: u32 = Register::AH as u32;
const BH: u32 = Register::BH as u32;
const SPL: u32 = Register::SPL as u32;
const AX: u32 = Register::AX as u32;
const EAX: u32 = Register::EAX as u32;
const RAX: u32 = Register::RAX as u32;
const R15: u32 = Register::R15 as u32;

/// Number of the general register that `r` is part of; `None` for every other register.
#[inline]
pub(super) const fn gpr_number(r: Register) -> Option<usize> {
    let n = r as u32;
    Some(match n {
        RAX..=R15 => n - RAX,
        EAX..RAX => n - EAX,
        AX..EAX => n - AX,
        SPL..AX => n - SPL + 4,
        AH..=BH => n - AH,
        AL..AH => n - AL,
        _ => return None,
    } as usize)
}

/// Bytes of general register `r`.
#[inline(always)]
pub(super) const fn gpr_size(r: Register) -> usize {
    match r as u32 {
        RAX..=R15 => 8,
        EAX..RAX => 4,
        AX..EAX => 2,
        _ => 1,
    }
}

/// Reads general register `r`, zero-extended.
#[inline(always)]
pub(super) fn read_gpr(cpu: &CpuState, r: Register) -> u64 {
    let n = r as u32;
    match n {
        RAX..=R15 => cpu.gpr[(n - RAX) as usize],
        EAX..RAX => u64::from(cpu.gpr[(n - EAX) as usize] as u32),
        AX..EAX => u64::from(cpu.gpr[(n - AX) as usize] as u16),
        SPL..AX => u64::from(cpu.gpr[(n - SPL + 4) as usize] as u8),
        AH..=BH => u64::from((cpu.gpr[(n - AH) as usize] >> 8) as u8),
        AL..AH => u64::from(cpu.gpr[(n - AL) as usize] as u8),
        _ => 0,
    }
}

/// Writes general register `r`: 32-bit writes clear the upper half, narrower ones leave it alone.
#[inline(always)]
pub(super) fn write_gpr(cpu: &mut CpuState, r: Register, v: u64) {
    let n = r as u32;
    match n {
        RAX..=R15 => cpu.gpr[(n - RAX) as usize] = v,
        EAX..RAX => cpu.gpr[(n - EAX) as usize] = u64::from(v as u32),
        AX..EAX => merge(&mut cpu.gpr[(n - AX) as usize], v, 0xFFFF, 0),
        SPL..AX => merge(&mut cpu.gpr[(n - SPL + 4) as usize], v, 0xFF, 0),
        AH..=BH => merge(&mut cpu.gpr[(n - AH) as usize], v, 0xFF, 8),
        AL..AH => merge(&mut cpu.gpr[(n - AL) as usize], v, 0xFF, 0),
        _ => {}
    }
}

#[inline(always)]
fn merge(whole: &mut u64, v: u64, mask: u64, shift: u32) {
    *whole = (*whole & !(mask << shift)) | ((v & mask) << shift);
}

/// Writes `size` bytes of general register number `n` with the rules of [`write_gpr`].
#[inline]
pub(super) fn write_sized(cpu: &mut CpuState, n: usize, size: usize, v: u64) {
    match size {
        8 => cpu.gpr[n] = v,
        4 => cpu.gpr[n] = u64::from(v as u32),
        _ => merge(&mut cpu.gpr[n], v, mask(size), 0),
    }
}

/// Replaces the status flags.
#[inline(always)]
pub(super) fn set_status(cpu: &mut CpuState, f: u64) {
    cpu.rflags = (cpu.rflags & !flags::STATUS) | f;
}

/// The segment register iced calls `r` (DS for anything else).
#[inline]
pub(super) const fn segment(r: Register) -> SegReg {
    match r {
        Register::ES => SegReg::Es,
        Register::CS => SegReg::Cs,
        Register::SS => SegReg::Ss,
        Register::FS => SegReg::Fs,
        Register::GS => SegReg::Gs,
        _ => SegReg::Ds,
    }
}

/// Segment of the memory operand. 64-bit code ignores all overrides but FS and GS.
#[inline]
pub(super) fn memory_segment(i: &Instruction) -> SegReg {
    let prefix = i.segment_prefix();
    if prefix == Register::None
        || i.code_size() != CodeSize::Code64
        || matches!(prefix, Register::FS | Register::GS)
    {
        return segment(i.memory_segment());
    }
    match i.memory_base() {
        Register::RSP | Register::RBP | Register::ESP | Register::EBP => SegReg::Ss,
        _ => SegReg::Ds,
    }
}

/// Mask of the address size of `i`'s memory operand.
#[inline]
pub(super) fn address_mask(i: &Instruction) -> u64 {
    let of = |r: Register| match r as u32 {
        RAX..=R15 => Some(u64::MAX),
        EAX..RAX => Some(0xFFFF_FFFF),
        AX..EAX => Some(0xFFFF),
        _ if r == Register::RIP => Some(u64::MAX),
        _ if r == Register::EIP => Some(0xFFFF_FFFF),
        _ => None,
    };
    if let Some(m) = of(i.memory_base()).or_else(|| of(i.memory_index())) {
        return m;
    }
    match (i.memory_displ_size(), i.code_size()) {
        (2, _) => 0xFFFF,
        (4, _) => 0xFFFF_FFFF,
        (8, _) | (_, CodeSize::Code64) => u64::MAX,
        (_, CodeSize::Code16) => 0xFFFF,
        _ => 0xFFFF_FFFF,
    }
}

/// Effective address of the memory operand, truncated to the address size. For RIP-relative operands iced's
/// displacement is already the target. A vector index (VSIB) counts as zero.
#[inline]
pub(super) fn effective(cpu: &CpuState, i: &Instruction) -> u64 {
    let base = i.memory_base();
    let mut at = i.memory_displacement64();
    if base as u32 <= R15 {
        at = at.wrapping_add(read_gpr(cpu, base));
    }
    let index = i.memory_index();
    if index != Register::None {
        at = at.wrapping_add(read_gpr(cpu, index).wrapping_mul(u64::from(i.memory_index_scale())));
    }
    at & address_mask(i)
}

/// Segment and offset of the memory operand.
#[inline]
pub(super) fn address(cpu: &CpuState, i: &Instruction) -> (SegReg, u64) {
    (memory_segment(i), effective(cpu, i))
}

/// Bytes of operand `n`, a register or memory.
#[inline]
pub(super) fn operand_size(i: &Instruction, n: u32) -> usize {
    if i.op_kind(n) == OpKind::Register { gpr_size(i.op_register(n)) } else { i.memory_size().size() }
}

/// Reads operand `n` (general register, memory or immediate) as `size` bytes, zero-extended.
#[inline]
pub(super) fn read(ex: &mut Exec<'_>, i: &Instruction, n: u32, size: usize) -> Result<u64, Fault> {
    match i.op_kind(n) {
        OpKind::Register => Ok(read_gpr(ex.cpu, i.op_register(n))),
        OpKind::Memory => {
            let (seg, at) = address(ex.cpu, i);
            ex.load(seg, at, size)
        }
        OpKind::Immediate8 => Ok(u64::from(i.immediate8())),
        _ => Ok(i.immediate(n) & mask(size)),
    }
}

/// Writes operand `n` (general register or memory).
#[inline]
pub(super) fn write(ex: &mut Exec<'_>, i: &Instruction, n: u32, size: usize, v: u64) -> Result<(), Fault> {
    if i.op_kind(n) == OpKind::Register {
        write_gpr(ex.cpu, i.op_register(n), v);
        return Ok(());
    }
    let (seg, at) = address(ex.cpu, i);
    ex.store(seg, at, size, v)
}

/// Replaces operand 0 by `f` of it together with the status flags; nothing changes on a fault.
#[inline(always)]
pub(super) fn update(
    ex: &mut Exec<'_>,
    i: &Instruction,
    size: usize,
    f: impl Fn(u64) -> (u64, u64),
) -> Result<(), Fault> {
    let status = if i.op0_kind() == OpKind::Register {
        let r = i.op0_register();
        let (v, status) = f(read_gpr(ex.cpu, r));
        write_gpr(ex.cpu, r, v);
        status
    } else {
        let (seg, at) = address(ex.cpu, i);
        let mut status = 0;
        ex.rmw(seg, at, size, i.has_lock_prefix(), &mut |old| {
            let (v, s) = f(old);
            status = s;
            v
        })?;
        status
    };
    set_status(ex.cpu, status);
    Ok(())
}

/// Whether offset `at` is canonical (48-bit linear addresses).
#[inline]
pub(super) const fn canonical(at: u64) -> bool {
    (((at << 16) as i64) >> 16) as u64 == at
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn decode(bits: u32, ip: u64, code: &[u8]) -> Instruction {
        Decoder::with_ip(bits, code, ip, DecoderOptions::NONE).decode()
    }

    fn cpu() -> CpuState {
        let mut cpu = CpuState::reset(0);
        for (n, r) in cpu.gpr.iter_mut().enumerate() {
            *r = 0x1111_1111_1111_1111 * n as u64;
        }
        cpu
    }

    #[test]
    fn partial_registers() {
        let mut cpu = cpu();
        write_gpr(&mut cpu, Register::BH, 0x1AB);
        assert_eq!(cpu.gpr[3], 0x3333_3333_3333_AB33);
        write_gpr(&mut cpu, Register::SIL, 0xEE);
        assert_eq!(cpu.gpr[6], 0x6666_6666_6666_66EE);
        write_gpr(&mut cpu, Register::R8D, u64::MAX);
        assert_eq!(cpu.gpr[8], 0xFFFF_FFFF);
        assert_eq!(read_gpr(&cpu, Register::R9W), 0x9999);
        assert_eq!((gpr_number(Register::DIL), gpr_number(Register::BH)), (Some(7), Some(3)));
        assert_eq!(gpr_number(Register::XMM0), None);
    }

    #[test]
    fn effective_addresses_wrap_at_the_address_size() {
        let mut cpu = cpu();
        // mov ax,[bx+si+7FFFh] in 16-bit code.
        let i = decode(16, 0, &[0x8B, 0x80, 0xFF, 0x7F]);
        assert_eq!(address(&cpu, &i), (SegReg::Ds, (0x3333 + 0x6666 + 0x7FFF) & 0xFFFF));
        // mov eax,[ebp-1] in 64-bit code with 67h.
        cpu.gpr[5] = 0;
        let i = decode(64, 0, &[0x67, 0x8B, 0x45, 0xFF]);
        assert_eq!(address(&cpu, &i), (SegReg::Ss, 0xFFFF_FFFF));
        let i = decode(64, 0, &[0x8B, 0x45, 0xFF]);
        assert_eq!(address(&cpu, &i).1, u64::MAX);
        // mov eax,[rip-16] at 8, with and without 67h.
        let i = decode(64, 8, &[0x8B, 0x05, 0xF0, 0xFF, 0xFF, 0xFF]);
        assert_eq!(address(&cpu, &i).1, 0xFFFF_FFFF_FFFF_FFFE);
        let i = decode(64, 8, &[0x67, 0x8B, 0x05, 0xF0, 0xFF, 0xFF, 0xFF]);
        assert_eq!(address(&cpu, &i).1, 0xFFFF_FFFF);
        // mov eax,[80000000h] (SIB without base) is sign-extended, with 67h it is not.
        let i = decode(64, 0, &[0x8B, 0x04, 0x25, 0, 0, 0, 0x80]);
        assert_eq!(address(&cpu, &i).1, 0xFFFF_FFFF_8000_0000);
        let i = decode(64, 0, &[0x67, 0x8B, 0x04, 0x25, 0, 0, 0, 0x80]);
        assert_eq!(address(&cpu, &i).1, 0x8000_0000);
        // mov al,[moffs64] and xlat with GS.
        let i = decode(64, 0, &[0xA0, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(address(&cpu, &i).1, 0x0807_0605_0403_0201);
        cpu.gpr[0] = 0x1FF;
        let i = decode(64, 0, &[0x65, 0xD7]);
        assert_eq!(address(&cpu, &i), (SegReg::Gs, 0x3333_3333_3333_3333 + 0xFF));
    }
}

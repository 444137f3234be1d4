//! PUSH, POP, PUSHA, POPA, ENTER, LEAVE and near control transfers (SDM 1, chapter 6; SDM 2).
//!
//! Nothing an instruction did to RSP survives its fault.

use super::alu::mask;
use super::operand::{address, canonical, gpr_size, operand_size, read, read_gpr, write_gpr, write_sized};
use crate::exec::Exec;
use crate::fault::Fault;
use crate::state::{SegReg, gpr};
use iced_x86::{Code, Instruction, OpKind};

/// Runs `f`; if it faults RSP and RBP are as before.
fn restoring<T>(ex: &mut Exec<'_>, f: impl FnOnce(&mut Exec<'_>) -> Result<T, Fault>) -> Result<T, Fault> {
    let (sp, bp) = (ex.cpu.gpr[gpr::RSP], ex.cpu.gpr[gpr::RBP]);
    let result = f(ex);
    if result.is_err() {
        ex.cpu.gpr[gpr::RSP] = sp;
        ex.cpu.gpr[gpr::RBP] = bp;
    }
    result
}

/// Sets the stack pointer under the stack's address size.
fn set_sp(ex: &mut Exec<'_>, v: u64) {
    let m = ex.stack_mask();
    let sp = &mut ex.cpu.gpr[gpr::RSP];
    *sp = if m == 0xFFFF { (*sp & !m) | (v & m) } else { v & m };
}

/// Makes `target` (truncated to `size` bytes) the next RIP, with the checks of a near transfer.
#[inline]
pub(super) fn branch(ex: &mut Exec<'_>, target: u64, size: usize) -> Result<(), Fault> {
    let target = target & mask(size);
    let legal = if ex.cpu.code64() {
        canonical(target)
    } else {
        target <= u64::from(ex.cpu.segment(SegReg::Cs).limit)
    };
    if !legal {
        return Err(Fault::GP0);
    }
    ex.next_rip = target;
    ex.branched = true;
    Ok(())
}

/// Operand size of a relative branch.
#[inline]
fn branch_size(i: &Instruction) -> usize {
    match i.op0_kind() {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        _ => 8,
    }
}

/// A taken relative branch.
#[inline]
pub(super) fn branch_relative(ex: &mut Exec<'_>, i: &Instruction) -> Result<(), Fault> {
    branch(ex, i.near_branch_target(), branch_size(i))
}

/// Target and operand size of a near JMP or CALL.
fn near_target(ex: &mut Exec<'_>, i: &Instruction) -> Result<(u64, usize), Fault> {
    match i.op0_kind() {
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
            Ok((i.near_branch_target(), branch_size(i)))
        }
        _ => {
            let size = operand_size(i, 0);
            Ok((read(ex, i, 0, size)?, size))
        }
    }
}

/// Whether a JMP or CALL is a far one.
#[inline]
pub(super) fn is_far(i: &Instruction) -> bool {
    matches!(i.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32)
        || matches!(
            i.code(),
            Code::Jmp_m1616
                | Code::Jmp_m1632
                | Code::Jmp_m1664
                | Code::Call_m1616
                | Code::Call_m1632
                | Code::Call_m1664
        )
}

/// JMP near.
#[inline]
pub(super) fn jmp(ex: &mut Exec<'_>, i: &Instruction) -> Result<(), Fault> {
    let (target, size) = near_target(ex, i)?;
    branch(ex, target, size)
}

/// CALL near. The return address is written even where the target then turns out illegal, as hardware does.
#[inline]
pub(super) fn call(ex: &mut Exec<'_>, i: &Instruction) -> Result<(), Fault> {
    let (target, size) = near_target(ex, i)?;
    restoring(ex, |ex| {
        ex.push(size, ex.next_rip)?;
        branch(ex, target, size)
    })
}

/// RET near.
pub(super) fn ret(ex: &mut Exec<'_>, i: &Instruction) -> Result<(), Fault> {
    let size = match i.code() {
        Code::Retnw | Code::Retnw_imm16 => 2,
        Code::Retnd | Code::Retnd_imm16 => 4,
        _ => 8,
    };
    let release = if i.op_count() == 0 { 0 } else { u64::from(i.immediate16()) };
    restoring(ex, |ex| {
        let target = ex.pop(size)?;
        branch(ex, target, size)?;
        if release != 0 {
            set_sp(ex, ex.cpu.gpr[gpr::RSP].wrapping_add(release));
        }
        Ok(())
    })
}

/// Operand size of PUSH and POP of anything but a register.
fn transfer_size(i: &Instruction) -> usize {
    match i.stack_pointer_increment().unsigned_abs() {
        2 => 2,
        4 => 4,
        _ => 8,
    }
}

/// PUSH of a general register, memory or an immediate.
#[inline]
pub(super) fn push(ex: &mut Exec<'_>, i: &Instruction) -> Result<(), Fault> {
    if i.op0_kind() == OpKind::Register {
        let r = i.op0_register();
        return ex.push(gpr_size(r), read_gpr(ex.cpu, r));
    }
    let size = transfer_size(i);
    let v = match i.op0_kind() {
        OpKind::Memory => read(ex, i, 0, size)?,
        _ => i.immediate(0) & mask(size),
    };
    ex.push(size, v)
}

/// POP of a general register or memory; a memory operand based on RSP uses the incremented value.
#[inline]
pub(super) fn pop(ex: &mut Exec<'_>, i: &Instruction) -> Result<(), Fault> {
    if i.op0_kind() == OpKind::Register {
        let r = i.op0_register();
        let v = ex.pop(gpr_size(r))?;
        write_gpr(ex.cpu, r, v);
        return Ok(());
    }
    let size = transfer_size(i);
    restoring(ex, |ex| {
        let v = ex.pop(size)?;
        let (seg, at) = address(ex.cpu, i);
        ex.store(seg, at, size, v)
    })
}

/// PUSHA, PUSHAD.
pub(super) fn pusha(ex: &mut Exec<'_>, size: usize) -> Result<(), Fault> {
    let regs = ex.cpu.gpr;
    restoring(ex, |ex| regs[..8].iter().try_for_each(|&v| ex.push(size, v & mask(size))))
}

/// POPA, POPAD: the slot of SP is skipped.
pub(super) fn popa(ex: &mut Exec<'_>, size: usize) -> Result<(), Fault> {
    let mut values = [0; 8];
    restoring(ex, |ex| {
        for v in values.iter_mut().rev() {
            *v = ex.pop(size)?;
        }
        Ok(())
    })?;
    for (n, &v) in values.iter().enumerate().filter(|&(n, _)| n != gpr::RSP) {
        write_sized(ex.cpu, n, size, v);
    }
    Ok(())
}

/// ENTER.
pub(super) fn enter(ex: &mut Exec<'_>, i: &Instruction) -> Result<(), Fault> {
    let size = match i.code() {
        Code::Enterw_imm16_imm8 => 2,
        Code::Enterd_imm16_imm8 => 4,
        _ => 8,
    };
    let (alloc, level) = (u64::from(i.immediate16()), i.immediate8_2nd() & 31);
    restoring(ex, |ex| {
        let stack = ex.stack_mask();
        let old = ex.cpu.gpr[gpr::RBP];
        ex.push(size, old & mask(size))?;
        let frame = ex.cpu.gpr[gpr::RSP];
        if level > 0 {
            let mut link = old;
            for _ in 1..level {
                link = link.wrapping_sub(size as u64);
                let v = ex.load(SegReg::Ss, link & stack, size)?;
                ex.push(size, v)?;
            }
            ex.push(size, frame & mask(size))?;
        }
        let sp = ex.cpu.gpr[gpr::RSP].wrapping_sub(alloc);
        // ENTER faults where a write at the new stack top would, alignment included.
        let top = ex.linear(SegReg::Ss, sp & stack, size, true)?;
        ex.check_alignment(top, size as u64)?;
        ex.probe_write(SegReg::Ss, sp & stack, size)?;
        set_sp(ex, sp);
        write_sized(ex.cpu, gpr::RBP, size, frame & mask(size));
        Ok(())
    })
}

/// LEAVE.
pub(super) fn leave(ex: &mut Exec<'_>, i: &Instruction) -> Result<(), Fault> {
    let size = match i.code() {
        Code::Leavew => 2,
        Code::Leaved => 4,
        _ => 8,
    };
    restoring(ex, |ex| {
        set_sp(ex, ex.cpu.gpr[gpr::RBP]);
        let v = ex.pop(size)?;
        write_sized(ex.cpu, gpr::RBP, size, v);
        Ok(())
    })
}

/// Mask of the count register of LOOP, LOOPE and LOOPNE.
fn loop_mask(code: Code) -> u64 {
    use Code::*;
    match code {
        Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX | Loopne_rel8_16_CX
        | Loopne_rel8_32_CX => 0xFFFF,
        Loop_rel8_16_RCX | Loop_rel8_64_RCX | Loope_rel8_16_RCX | Loope_rel8_64_RCX | Loopne_rel8_16_RCX
        | Loopne_rel8_64_RCX => u64::MAX,
        _ => 0xFFFF_FFFF,
    }
}

/// LOOP, LOOPE, LOOPNE; `wanted` is the condition besides the count.
pub(super) fn loop_(ex: &mut Exec<'_>, i: &Instruction, wanted: bool) -> Result<(), Fault> {
    let m = loop_mask(i.code());
    let old = ex.cpu.gpr[gpr::RCX];
    let count = old.wrapping_sub(1) & m;
    if count != 0 && wanted {
        branch_relative(ex, i)?;
    }
    ex.cpu.gpr[gpr::RCX] = if m == 0xFFFF { (old & !m) | count } else { count };
    Ok(())
}

/// JCXZ, JECXZ, JRCXZ.
pub(super) fn jump_if_count_zero(ex: &mut Exec<'_>, i: &Instruction, size: usize) -> Result<(), Fault> {
    if ex.cpu.gpr[gpr::RCX] & mask(size) == 0 { branch_relative(ex, i) } else { Ok(()) }
}

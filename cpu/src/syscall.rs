//! SYSCALL, SYSRET, SYSENTER and SYSEXIT (SDM 3A, 5.8.7 and 5.8.8).

use crate::exec::Exec;
use crate::fault::Fault;
use crate::segment::canonical;
use crate::state::{SegReg, Segment, efer, flags, gpr};

/// Flat code and data attributes, DPL 0: 64-bit code, 32-bit code, data.
const CODE64: u16 = 0xA09B;
const CODE32: u16 = 0xC09B;
const DATA: u16 = 0xC093;
/// DPL 3 in attributes.
const USER: u16 = 0x60;
/// Flags that SYSRET loads from R11.
const SYSRET_FLAGS: u64 = 0x3C_7FD7;

fn enter(ex: &mut Exec<'_>, selector: u16, code: u16, cpl: u8) {
    let user = if cpl == 3 { USER } else { 0 };
    ex.cpu.seg[SegReg::Cs as usize] = Segment::flat(selector, code | user);
    ex.cpu.cpl = cpl;
}

fn stack(ex: &mut Exec<'_>, selector: u16, cpl: u8) {
    let user = if cpl == 3 { USER } else { 0 };
    ex.cpu.seg[SegReg::Ss as usize] = Segment::flat(selector, DATA | user);
}

/// SYSCALL.
pub(crate) fn syscall(ex: &mut Exec<'_>) -> Result<(), Fault> {
    if !ex.cpu.code64() || ex.cpu.efer & efer::SCE == 0 {
        return Err(Fault::UD);
    }
    let base = (ex.cpu.msr.star >> 32) as u16 & !3;
    ex.cpu.gpr[gpr::RCX] = ex.next_rip;
    ex.cpu.gpr[11] = ex.cpu.rflags & !flags::RF;
    ex.next_rip = ex.cpu.msr.lstar;
    // With TF masked by FMASK the handler is not single-stepped into.
    ex.delivered = ex.cpu.msr.sfmask & flags::TF != 0;
    ex.cpu.rflags = (ex.cpu.rflags & !ex.cpu.msr.sfmask & !flags::RF) | flags::FIXED;
    enter(ex, base, CODE64, 0);
    stack(ex, base.wrapping_add(8), 0);
    Ok(())
}

/// SYSRET; `wide` with a 64-bit operand size.
pub(crate) fn sysret(ex: &mut Exec<'_>, wide: bool) -> Result<(), Fault> {
    if !ex.cpu.code64() || ex.cpu.efer & efer::SCE == 0 {
        return Err(Fault::UD);
    }
    let rcx = ex.cpu.gpr[gpr::RCX];
    if ex.cpu.cpl != 0 || (wide && !canonical(rcx)) {
        return Err(Fault::GP0);
    }
    let base = (ex.cpu.msr.star >> 48) as u16;
    ex.cpu.rflags = (ex.cpu.gpr[11] & SYSRET_FLAGS) | flags::FIXED;
    if wide {
        enter(ex, base.wrapping_add(16) | 3, CODE64, 3);
        ex.next_rip = rcx;
    } else {
        enter(ex, base | 3, CODE32, 3);
        ex.next_rip = rcx & 0xFFFF_FFFF;
    }
    stack(ex, base.wrapping_add(8) | 3, 3);
    Ok(())
}

/// SYSENTER.
pub(crate) fn sysenter(ex: &mut Exec<'_>) -> Result<(), Fault> {
    let base = ex.cpu.msr.sysenter_cs as u16 & !3;
    if !ex.cpu.protected() || base == 0 {
        return Err(Fault::GP0);
    }
    ex.cpu.rflags &= !(flags::VM | flags::IF | flags::RF);
    let (rsp, rip) = (ex.cpu.msr.sysenter_esp, ex.cpu.msr.sysenter_eip);
    if ex.cpu.long_mode() {
        enter(ex, base, CODE64, 0);
        ex.cpu.gpr[gpr::RSP] = rsp;
        ex.next_rip = rip;
    } else {
        enter(ex, base, CODE32, 0);
        ex.cpu.gpr[gpr::RSP] = rsp & 0xFFFF_FFFF;
        ex.next_rip = rip & 0xFFFF_FFFF;
    }
    stack(ex, base.wrapping_add(8), 0);
    Ok(())
}

/// SYSEXIT; `wide` with a 64-bit operand size.
pub(crate) fn sysexit(ex: &mut Exec<'_>, wide: bool) -> Result<(), Fault> {
    let base = ex.cpu.msr.sysenter_cs as u16;
    if !ex.cpu.protected() || ex.cpu.cpl != 0 || base & !3 == 0 {
        return Err(Fault::GP0);
    }
    let (rcx, rdx) = (ex.cpu.gpr[gpr::RCX], ex.cpu.gpr[gpr::RDX]);
    if wide {
        if !canonical(rcx) || !canonical(rdx) {
            return Err(Fault::GP0);
        }
        enter(ex, base.wrapping_add(32) | 3, CODE64, 3);
        stack(ex, base.wrapping_add(40) | 3, 3);
        ex.cpu.gpr[gpr::RSP] = rcx;
        ex.next_rip = rdx;
    } else {
        enter(ex, base.wrapping_add(16) | 3, CODE32, 3);
        stack(ex, base.wrapping_add(24) | 3, 3);
        ex.cpu.gpr[gpr::RSP] = rcx & 0xFFFF_FFFF;
        ex.next_rip = rdx & 0xFFFF_FFFF;
    }
    Ok(())
}

//! Virtual interrupts: virtual-8086 mode extensions (CR4.VME) and protected-mode virtual interrupts (CR4.PVI), SDM 3B,
//! 20.3 and 20.4.
//!
//! Below IOPL 3 instructions that touch IF work on VIF instead; INT n in virtual-8086 mode goes to the handler that the
//! program's own vector table names, where the redirection bitmap of the TSS has a zero.

use crate::exec::Exec;
use crate::fault::Fault;
use crate::segment;
use crate::state::{CpuState, SegReg, cr4, flags};

/// IF stands for VIF: virtual-8086 mode below IOPL 3 under VME.
pub(crate) fn virtual_if(cpu: &CpuState) -> bool {
    cpu.v8086() && cpu.iopl() < 3 && cpu.cr4 & cr4::VME != 0
}

/// CLI and STI act on VIF: [`virtual_if`], or CPL 3 below IOPL 3 under PVI.
fn virtual_cli_sti(cpu: &CpuState) -> bool {
    let user = !cpu.v8086() && cpu.cpl == 3 && cpu.iopl() < 3;
    virtual_if(cpu) || (user && cpu.protected() && cpu.cr4 & cr4::PVI != 0)
}

/// A pending interrupt that may be let in: `#GP(0)` before the next instruction, so that the monitor handles it. IRET and task
/// switches lead to this (SDM 3B, 20.3.2).
#[inline]
pub fn virtual_interrupt_due(cpu: &CpuState) -> bool {
    const DUE: u64 = flags::VIF | flags::VIP;
    cpu.rflags & DUE == DUE && virtual_cli_sti(cpu)
}

/// CLI (`set` false) or STI at a privilege that may not change IF.
pub(crate) fn set_virtual_if(cpu: &mut CpuState, set: bool) -> Result<(), Fault> {
    if !virtual_cli_sti(cpu) || (set && cpu.rflags & flags::VIP != 0) {
        return Err(Fault::GP0);
    }
    cpu.rflags &= !flags::VIF;
    if set {
        cpu.rflags |= flags::VIF;
    }
    Ok(())
}

/// FLAGS as PUSHF and redirected interrupts push them under [`virtual_if`]: VIF in the place of IF, IOPL 3.
pub(crate) fn image(cpu: &CpuState) -> u64 {
    let shown = if cpu.rflags & flags::VIF != 0 { flags::IF } else { 0 };
    (cpu.rflags & !flags::IF) | flags::IOPL | shown
}

/// RFLAGS after POPF or IRET of the 16-bit `image` under [`virtual_if`].
pub(crate) fn popped(cpu: &CpuState, image: u64) -> Result<u64, Fault> {
    let on = image & flags::IF != 0;
    if image & flags::TF != 0 || (on && cpu.rflags & flags::VIP != 0) {
        return Err(Fault::GP0);
    }
    let mask = flags::STATUS | flags::DF | flags::NT;
    let vif = if on { flags::VIF } else { 0 };
    Ok((cpu.rflags & !(mask | flags::TF | flags::VIF)) | (image & mask) | vif | flags::FIXED)
}

/// INT `vector` in virtual-8086 mode under VME: true if it was delivered through the program's own vector table.
pub(crate) fn redirect(ex: &mut Exec<'_>, vector: u8, rip: u64) -> Result<bool, Fault> {
    if !ex.cpu.v8086() || ex.cpu.cr4 & cr4::VME == 0 || bit(ex, vector)? {
        return Ok(false);
    }
    let virtualized = virtual_if(ex.cpu);
    let saved = if virtualized { image(ex.cpu) } else { ex.cpu.rflags };
    let entry = ex.sys_load(u64::from(vector) * 4, 4)?;
    let cs = u64::from(ex.cpu.segment(SegReg::Cs).selector);
    ex.push(2, saved)?;
    ex.push(2, cs)?;
    ex.push(2, rip)?;
    ex.cpu.seg[SegReg::Cs as usize] = segment::virtual8086((entry >> 16) as u16);
    ex.next_rip = entry & 0xFFFF;
    ex.cpu.rflags &= !(flags::TF | if virtualized { flags::VIF } else { flags::IF });
    ex.delivered = true;
    Ok(true)
}

/// The vector's bit in the interrupt redirection bitmap, the 32 bytes below the I/O permission bitmap.
fn bit(ex: &mut Exec<'_>, vector: u8) -> Result<bool, Fault> {
    let tr = ex.cpu.tr;
    if tr.limit < 103 {
        return Err(Fault::GP0);
    }
    let io_map = ex.sys_load(tr.base.wrapping_add(102), 2)?;
    let at = io_map.wrapping_sub(32).wrapping_add(u64::from(vector / 8));
    if at > u64::from(tr.limit) {
        return Err(Fault::GP0);
    }
    Ok(ex.sys_load(tr.base.wrapping_add(at), 1)? >> (vector % 8) & 1 != 0)
}

//! SYSCALL and SYSRET in 64-bit mode: what translated code needs to do them, what it did, and those that it leaves to the run
//! loop.

use super::{Translator, canonical};
use crate::block::Mode;
use paravane_cpu::{CpuState, SegReg, Segment, attr, efer, flags, gpr};

impl Translator {
    /// Lets SYSCALL and SYSRET be done in translated code if nothing about them is unusual: flags beyond the status
    /// flags and IF are clear at CPL 3, and SYSCALL clears IF.
    pub(super) fn prepare_system_calls(&mut self, cpu: &CpuState, mode: Mode) {
        let plain = mode.code64()
            && mode.0 & (Mode::MIDDLE | Mode::DOWN) == 0
            && cpu.efer & efer::SCE != 0
            && cpu.msr.sfmask & flags::IF != 0
            && (cpu.cpl == 0 || cpu.rflags & !(flags::STATUS | flags::IF | flags::RF) == flags::FIXED);
        self.context().cpl = u32::from(cpu.cpl);
        self.context().system_calls = u32::from(plain);
        if !plain {
            return;
        }
        let modes = [0, 3].map(|cpl| self.mode_at(cpu, cpl));
        // A cache that is made anew may take the place of another one, but not of the last one made.
        self.pages.jump_cache(modes[0]);
        let user = self.pages.jump_cache(modes[1]);
        let jump_caches = [self.pages.jump_cache(modes[0]), user];
        let keeps = !cpu.msr.sfmask;
        let selectors = [call_selectors(cpu), return_selectors(cpu)];
        let c = self.context();
        c.jump_cache = jump_caches[usize::from(cpu.cpl == 3)];
        c.jump_caches = jump_caches;
        c.level_selectors = selectors;
        c.syscall_keeps = (keeps & 0xFF) as u32 * 256 + u32::from(keeps & flags::OF != 0);
        c.lstar = cpu.msr.lstar;
    }

    /// Brings CPL, CS and SS up to date behind SYSCALLs and SYSRETs in translated code; whether CPL changed.
    pub(super) fn follow_level(&mut self, cpu: &mut CpuState) -> bool {
        let cpl = self.context().cpl as u8;
        if cpl == cpu.cpl {
            return false;
        }
        match cpl {
            0 => load_call_segments(cpu),
            _ => load_return_segments(cpu),
        }
        true
    }
}

/// Selectors of CS and SS behind SYSCALL.
fn call_selectors(cpu: &CpuState) -> [u16; 2] {
    let selector = (cpu.msr.star >> 32) as u16 & !3;
    [selector, selector.wrapping_add(8)]
}

/// The same behind SYSRETQ.
fn return_selectors(cpu: &CpuState) -> [u16; 2] {
    let selector = (cpu.msr.star >> 48) as u16;
    [selector.wrapping_add(16) | 3, selector.wrapping_add(8) | 3]
}

fn load_call_segments(cpu: &mut CpuState) {
    let [cs, ss] = call_selectors(cpu);
    cpu.seg[SegReg::Cs as usize] = Segment::flat(cs, CODE64);
    cpu.seg[SegReg::Ss as usize] = Segment::flat(ss, DATA);
    cpu.cpl = 0;
}

fn load_return_segments(cpu: &mut CpuState) {
    let [cs, ss] = return_selectors(cpu);
    cpu.seg[SegReg::Cs as usize] = Segment::flat(cs, CODE64 | DPL3);
    cpu.seg[SegReg::Ss as usize] = Segment::flat(ss, DATA | DPL3);
    cpu.cpl = 3;
}

/// SYSCALL in 64-bit mode (SDM 2B); false if the interpreter must raise its fault.
pub(super) fn syscall(cpu: &mut CpuState) -> bool {
    if cpu.efer & efer::SCE == 0 {
        return false;
    }
    cpu.gpr[gpr::RCX] = cpu.rip.wrapping_add(SYSCALL_LEN);
    cpu.gpr[R11] = cpu.rflags;
    cpu.rip = cpu.msr.lstar;
    cpu.rflags &= !(cpu.msr.sfmask | flags::RF);
    load_call_segments(cpu);
    true
}

/// SYSRETQ (SDM 2B); false if the interpreter must raise its fault or knows flags we do not handle.
pub(super) fn sysret(cpu: &mut CpuState) -> bool {
    let (rip, rflags) = (cpu.gpr[gpr::RCX], cpu.gpr[R11]);
    if cpu.efer & efer::SCE == 0 || !canonical(rip) || rflags & (flags::TF | flags::NT | flags::VIP) != 0 {
        return false;
    }
    cpu.rip = rip;
    cpu.rflags = (rflags & 0x3C_7FD7) | flags::FIXED;
    load_return_segments(cpu);
    true
}

const R11: usize = 11;
const SYSCALL_LEN: u64 = 2;
/// Attributes that SYSCALL and SYSRET load: accessed 64-bit code, accessed writable 32-bit data.
const CODE64: u16 = attr::G | attr::L | attr::P | attr::S | attr::CODE | attr::READ_WRITE | attr::ACCESSED;
const DATA: u16 = attr::G | attr::DB | attr::P | attr::S | attr::READ_WRITE | attr::ACCESSED;
const DPL3: u16 = 3 << attr::DPL_SHIFT;

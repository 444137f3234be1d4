//! Privilege levels in 64-bit mode: what translated code needs to change them by SYSCALL, SYSRET and IRET, what it did, and the
//! system calls that it leaves to the run loop.

use super::{Translator, canonical};
use crate::block::Mode;
use crate::context::{Level, RETURNS, Return};
use crate::delta::View;
use paravane_cpu::{
    Access, CpuState, DescriptorTable, LinAddr, Privilege, SegReg, Segment, attr, efer, flags, gpr, inspect,
};
use paravane_memory::Mapped;

/// Values of `JitContext::loaded`.
const NOTHING: u32 = 0;
const CALLED: u32 = 1;
const RETURNED: u32 = 2;
const FIRST: u32 = 3;

/// Indices of `JitContext::returns`: to CPL 3, to CPL 0, to CPL 0 with a null SS.
const OUTER: usize = 0;
const SAME: usize = 1;
const NULL_STACK: usize = 2;

/// What the [`Return`]s of the context came from and lead to.
#[derive(Default)]
pub(super) struct Returns {
    table: DescriptorTable,
    /// CS and SS.
    segments: [[Segment; 2]; RETURNS],
    /// The selectors of the one to CPL 3, which is out of force where the return takes data segments away.
    outer: u64,
}

impl Translator {
    /// Lets SYSCALL, SYSRET and IRET be done in translated code where nothing about them is unusual: flags beyond the status
    /// flags and IF are clear at CPL 3, and SYSCALL clears IF; IRET opens no door to NMIs and takes no data segment away.
    /// Sets the jump cache.
    pub(super) fn prepare_levels(&mut self, cpu: &CpuState, mode: Mode) {
        let plain = mode.code64()
            && (cpu.cpl == 3 || !self.candidates.is_due())
            && mode.0 & (Mode::MIDDLE | Mode::DOWN) == 0
            && (cpu.cpl == 0 || cpu.rflags & !(flags::STATUS | flags::IF | flags::RF) == flags::FIXED);
        let calls = plain && cpu.efer & efer::SCE != 0 && cpu.msr.sfmask & flags::IF != 0;
        let returns = plain && !cpu.nmi_blocked;
        let c = self.context();
        c.loaded = NOTHING;
        (c.system_calls, c.interrupt_returns) = (u32::from(calls), u32::from(returns));
        if !plain {
            let jump_cache = self.pages.jump_cache(mode);
            self.context().jump_cache = jump_cache;
            return;
        }
        let modes = [0, 3].map(|cpl| self.mode_of_level(cpu, mode, cpl));
        let [kernel, user] = self.pages.jump_caches(modes);
        let level = |view, jump_cache| Level {
            read_base: self.delta.read_base(view),
            write_base: self.delta.write_base(view),
            jump_cache,
            stack_mask: 0,
            stack: 0,
        };
        let mut levels = [level(View::Supervisor, kernel), level(View::User, user)];
        if modes[1].has(Mode::WINDOW) {
            levels[1].write_base = self.windows.base();
            (levels[1].stack_mask, levels[1].stack) = self.windows.stack();
        }
        let c = self.context();
        c.levels = levels;
        c.jump_cache = if cpu.cpl == 3 { user } else { kernel };
        if calls {
            let keeps = !cpu.msr.sfmask;
            c.call_selectors = [call_selectors(cpu), return_selectors(cpu)].map(|[cs, ss]| pair(cs, ss));
            c.syscall_keeps = (keeps & 0xFF) as u32 * 256 + u32::from(keeps & flags::OF != 0);
            c.lstar = cpu.msr.lstar;
        }
        if self.returns.table != cpu.gdtr {
            self.forget_returns(cpu.gdtr);
        }
        let outer = if keeps_segments(cpu) { self.returns.outer } else { Return::NONE };
        self.context().returns[OUTER].selectors = outer;
    }

    /// What IRET loaded before, if anything, came from another table.
    pub(super) fn forget_returns(&mut self, table: DescriptorTable) {
        self.returns.table = table;
        self.returns.outer = Return::NONE;
        self.context().returns = [UNKNOWN; RETURNS];
    }

    /// Brings CPL, CS and SS up to date where translated code changed them.
    pub(super) fn follow_level(&mut self, cpu: &mut CpuState) {
        match std::mem::replace(&mut self.context().loaded, NOTHING) {
            NOTHING => {}
            CALLED => load_call_segments(cpu),
            RETURNED => load_return_segments(cpu),
            number => {
                let [cs, ss] = self.returns.segments[(number - FIRST) as usize];
                cpu.seg[SegReg::Cs as usize] = cs;
                cpu.seg[SegReg::Ss as usize] = ss;
                cpu.cpl = (cs.selector & 3) as u8;
            }
        }
    }

    /// The interpreter executed IRETQ: the next one like it may be done in translated code.
    pub(super) fn learn_return(&mut self, cpu: &CpuState) {
        let (cs, ss) = (cpu.seg[SegReg::Cs as usize], cpu.seg[SegReg::Ss as usize]);
        let (level, n) = match (cpu.cpl, ss.selector) {
            (3, _) => (size_of::<Level>() as u32, OUTER),
            (0, 0) => (0, NULL_STACK),
            (0, _) => (0, SAME),
            _ => return,
        };
        if !cpu.code64() || self.returns.table != cpu.gdtr {
            return;
        }
        let Some(code) = self.show_descriptor(cpu, &cs) else { return };
        let stack = if ss.selector == 0 { Some(code) } else { self.show_descriptor(cpu, &ss) };
        let Some(stack) = stack else { return };
        let selectors = u64::from(pair(cs.selector, ss.selector));
        let entry = Return { selectors, level, number: FIRST + n as u32, descriptors: [code, stack] };
        self.context().returns[n] = entry;
        self.returns.segments[n] = [cs, ss];
        if n == OUTER {
            self.returns.outer = selectors;
        }
    }

    /// Lets translated code at CPL 0 read the descriptor of `segment` in the GDT: the cell of the table, the linear address,
    /// and what is there. `None` if it has none there: what SYSCALL loads need not.
    fn show_descriptor(&mut self, cpu: &CpuState, segment: &Segment) -> Option<[u64; 3]> {
        const LOCAL: u16 = 4;
        let selector = segment.selector;
        if selector & LOCAL != 0 || selector & !3 == 0 || selector | 7 > cpu.gdtr.limit {
            return None;
        }
        let at = cpu.gdtr.base.wrapping_add(u64::from(selector & !7));
        if !at.is_multiple_of(8) {
            return None;
        }
        let paging = self.core.paging();
        let t = inspect(cpu, &self.mem, paging, LinAddr(at), Access::Read, Privilege::Supervisor)?;
        let Mapped::Ram(ram) = self.mem.resolve(t.phys.page()) else { return None };
        if self.core.watches_page(LinAddr(at), t.phys).0 {
            return None;
        }
        let page = at & !0xFFF;
        let delta = (self.mem.host_base() as u64 + ram.0).wrapping_sub(page);
        self.delta.set(View::Supervisor, false, page, delta, t.global, t.page_shift);
        let raw = self.mem.read_u64(t.phys).ok()?;
        (Segment::of_descriptor(selector, raw) == *segment)
            .then(|| [self.delta.read_cell(View::Supervisor, at), at, raw])
    }
}

/// Empty.
const UNKNOWN: Return = Return { selectors: Return::NONE, level: 0, number: 0, descriptors: [[0; 3]; 2] };

/// Whether ES, DS, FS and GS stay as they are in a return to CPL 3 (SDM 2A, IRET).
fn keeps_segments(cpu: &CpuState) -> bool {
    [SegReg::Es, SegReg::Ds, SegReg::Fs, SegReg::Gs].iter().all(|&s| {
        let segment = cpu.segment(s);
        !segment.present() || segment.dpl() == 3
    })
}

/// Two selectors as the context holds them.
fn pair(cs: u16, ss: u16) -> u32 {
    u32::from(cs) | u32::from(ss) << 16
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

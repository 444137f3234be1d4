//! Filling the delta tables: misses of translated code, which pages are shown writable and the end of that when they hold
//! code, and flushes.
//!
//! Invariants this unsafe island relies on, beside those of [`super`]:
//! * [`miss_helper`] gets the context whose `engine` is the running translator, which nothing else borrows then;
//! * `fill` is called only while `running` points to the `CpuState` of the run.

use super::{Translator, canonical};
use crate::block::Mode;
use crate::classify::Class;
use crate::context::{JitContext, XSLOTS};
use crate::stubs::{JMP_BYTES, MissInfo};
use iced_x86::{Instruction, OpAccess, Register};
use paravane_cpu::{
    Access, CpuState, Flushes, LinAddr, Privilege, SegReg, flags, inspect, operand_alignment, translate,
};
use paravane_memory::{Mapped, PAGE_SHIFT, RamOffset};

/// Which write-view entries show a RAM page: up to two linear pages (| 1), or [`MANY`].
pub(super) type Writers = [u64; 2];
const MANY: u64 = u64::MAX;

/// Fills the delta table for a missed access.
///
/// # Safety
/// Called only by the miss stub, with the context of a running translator.
pub(super) unsafe extern "sysv64" fn miss_helper(context: *mut JitContext) -> u64 {
    // SAFETY: `engine` is set by `run` to the translator that owns the context, which holds no borrow now.
    let (this, ea, info) =
        unsafe { (&mut *((*context).engine as *mut Translator), (*context).miss_ea, (*context).miss_info) };
    if this.fill(ea, info) { JMP_BYTES } else { 0 }
}

impl Translator {
    /// Fills the delta table for an access of kind `info` at `ea`; false if the interpreter must do it.
    fn fill(&mut self, ea: u64, info: u64) -> bool {
        self.stats.misses += 1;
        let (size, write, soft) = (info & 0xFF, info & MissInfo::WRITE != 0, info & MissInfo::SOFT != 0);
        // SAFETY: set while translated code runs, and only then is this called.
        let cpu = unsafe { &mut *self.running };
        // STAC and CLAC change AC without leaving translated code.
        let ac = if self.context().access_flag != 0 { flags::AC } else { 0 };
        cpu.rflags = (cpu.rflags & !flags::AC) | ac;
        let wraps = !cpu.code64() && ea >> 32 != 0;
        if (ea & 0xFFF) + size > 4096 || !canonical(ea) || wraps {
            self.stats.miss_crossing += 1;
            return false;
        }
        if info & MissInfo::ALIGNED != 0 && !ea.is_multiple_of(size) {
            self.stats.miss_fault += 1;
            return false;
        }
        // A soft access must not set accessed and dirty bits: it asks only what is allowed as things are.
        let privilege = if cpu.cpl == 3 { Privilege::User } else { Privilege::Supervisor };
        let t = if soft {
            inspect(cpu, &self.mem, LinAddr(ea), Access::Read, privilege)
        } else {
            let access = if write { Access::Write } else { Access::Read };
            translate(cpu, &self.mem, LinAddr(ea), access, privilege).ok()
        };
        let Some(t) = t else {
            self.stats.miss_fault += 1;
            return false;
        };
        let view = self.view(cpu);
        let (ram, rom) = match self.mem.resolve(t.phys.page()) {
            Mapped::Ram(o) => (o, false),
            Mapped::Rom(o) => (o, true),
            Mapped::Mmio => {
                self.stats.miss_mmio += 1;
                return false;
            }
        };
        let page = ea & !0xFFF;
        let delta = (self.mem.host_base() as u64 + ram.0).wrapping_sub(page);
        let large = t.page_shift > 12;
        let code = self.mem.has_code(ram);
        let (watch_reads, watch_writes) = self.core.watches_page(LinAddr(ea), t.phys);
        if (write && watch_writes) || (!write && watch_reads) {
            return false;
        }
        if write && (rom || code || (soft && !t.writable)) {
            self.stats.miss_code += u64::from(code);
            self.stats.miss_soft += u64::from(soft);
            return false;
        }
        if write || (t.writable && !rom && !code && !watch_writes) {
            self.mem.wrote(ram, 1);
            self.remember_writer(ram, page);
            self.delta.set(view, true, page, delta, t.global, large);
        }
        if !watch_reads {
            self.delta.set(view, false, page, delta, t.global, large);
        }
        true
    }

    /// An unaligned address plus poison can look aligned: the access then faults on the host instead of missing. Fills
    /// the table for the memory operand of the instruction at RIP; true if it may be tried again.
    pub(super) fn fill_operand(&mut self, cpu: &mut CpuState, mode: Mode) -> bool {
        let base = if mode.code64() { 0 } else { cpu.segment(SegReg::Cs).base };
        let Some((instr, _)) = self.instruction_at(cpu, mode, base.wrapping_add(cpu.rip)) else {
            return false;
        };
        let form = self.forms.form(&instr);
        let Some(op) = (0..instr.op_count()).find(|&i| instr.op_kind(i) == iced_x86::OpKind::Memory) else {
            return false;
        };
        let Some(ea) = operand_address(cpu, &instr) else { return false };
        let size = instr.memory_size().size() as u64;
        if size == 0 || size > 64 {
            return false;
        }
        if !ea.is_multiple_of(operand_alignment(&instr)) {
            return false;
        }
        let read = matches!(form.access[op as usize], OpAccess::Read | OpAccess::CondRead);
        if form.class == Class::BitString || self.delta.holds(self.view(cpu), !read, ea) {
            // Not poison: the access itself is at fault.
            return false;
        }
        self.running = cpu;
        let filled = self.fill(ea, size | if read { 0 } else { MissInfo::WRITE });
        self.running = std::ptr::null_mut();
        filled
    }

    fn shows(&self, ram: RamOffset, lin: u64) -> bool {
        let host = self.mem.host_base() as u64 + ram.0;
        (0..3).any(|v| self.delta.written_host(v, lin) == Some(host))
    }

    fn remember_writer(&mut self, ram: RamOffset, lin: u64) {
        let n = (ram.0 >> PAGE_SHIFT) as usize;
        let w = self.writers[n];
        let tag = lin | 1;
        if w[0] == MANY || w[0] == tag || w[1] == tag {
            return;
        }
        for (i, &old) in w.iter().enumerate() {
            if old == 0 || !self.shows(ram, old & !1) {
                self.writers[n][i] = tag;
                return;
            }
        }
        self.writers[n][0] = MANY;
    }

    /// The page starts to hold translated code: no view may write it from now on.
    pub(super) fn protect(&mut self, ram: RamOffset) {
        if self.mem.has_code(ram) {
            return;
        }
        self.mem.set_code(ram, true);
        let n = (ram.0 >> PAGE_SHIFT) as usize;
        let w = std::mem::take(&mut self.writers[n]);
        if w[0] == MANY {
            self.delta.flush(false);
            return;
        }
        for tag in w {
            if tag != 0 {
                self.delta.revoke_write(tag & !1);
            }
        }
    }

    pub(super) fn flush(&mut self, keep_global: bool) {
        self.stats.translation_flushes += 1;
        self.delta.flush(keep_global);
        // SAFETY: by the module's invariant; a field borrow beside `pages`.
        let cells: &mut [u32; XSLOTS] = unsafe { &mut (*self.context).xslots };
        self.pages.flush(cells, keep_global);
    }

    fn apply_flushes(&mut self, f: &Flushes) {
        if f.all {
            return self.flush(false);
        }
        if f.non_global || f.switched || f.all_non_global {
            self.flush(true);
        }
        for &lin in &f.pages {
            self.stats.page_flushes += 1;
            self.delta.flush_page(lin.0);
            // SAFETY: as in `flush`.
            let cells: &mut [u32; XSLOTS] = unsafe { &mut (*self.context).xslots };
            self.pages.flush_page(cells, lin.0);
        }
    }

    /// Everything the core did that the tables must follow.
    pub(super) fn follow_core(&mut self) {
        let f = self.core.take_flushes();
        if !f.is_empty() {
            self.apply_flushes(&f);
        }
        if self.mem.code_writes_pending() {
            for page in self.mem.take_code_writes() {
                self.invalidate_page(page);
            }
        }
        if self.layout_generation != self.mem.layout_generation() {
            self.layout_generation = self.mem.layout_generation();
            self.flush(false);
            self.core.flush_translations();
        }
    }
}

/// Linear address of the memory operand of `instr`, if it has one.
pub(super) fn operand_address(cpu: &CpuState, instr: &Instruction) -> Option<u64> {
    let op = (0..instr.op_count()).find(|&i| instr.op_kind(i) == iced_x86::OpKind::Memory)?;
    let ea = instr.virtual_address(op, 0, |r, _, _| {
        if r.is_segment_register() {
            return Some(applied_base(cpu, r));
        }
        let v = *cpu.gpr.get(r.full_register().number())?;
        Some(match r.size() {
            2 => v & 0xFFFF,
            4 => v & 0xFFFF_FFFF,
            _ => v,
        })
    })?;
    Some(if cpu.code64() { ea } else { ea & 0xFFFF_FFFF })
}

/// The base that segment register `r` adds to offsets.
pub(super) fn applied_base(cpu: &CpuState, r: Register) -> u64 {
    match cpu.seg.get(r.number()) {
        Some(s) if r.number() >= 4 || !cpu.code64() => s.base,
        _ => 0,
    }
}

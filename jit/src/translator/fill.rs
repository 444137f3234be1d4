//! Filling the delta tables: misses of translated code, which pages are shown writable and the end of that when they hold
//! code, and flushes.
//!
//! Invariants this unsafe island relies on, beside those of [`super`]:
//! * [`miss_helper`] gets the context whose `engine` is the running translator, which nothing else borrows then;
//! * `fill` is called only while `running` points to the `CpuState` of the run.

use super::{Translator, canonical};
use crate::block::{Granules, Mode};
use crate::classify::Class;
use crate::context::{JitContext, XSLOTS};
use crate::pages::CodePages;
use crate::spaces::Switch;
use crate::stubs::{JMP_BYTES, MissInfo};
use iced_x86::{Instruction, OpAccess, Register};
use paravane_cpu::{
    Access, Attention, CpuState, Flushes, LinAddr, Privilege, SegReg, TraceEvent, flags, inspect,
    operand_alignment, translate,
};
use paravane_memory::{Mapped, Notice, PAGE_SHIFT, RamOffset};

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
    pub(super) fn fill(&mut self, ea: u64, info: u64) -> bool {
        self.stats.misses += 1;
        let (size, write, soft) = (info & 0xFF, info & MissInfo::WRITE != 0, info & MissInfo::SOFT != 0);
        // SAFETY: set while translated code runs, and only then is this called.
        let cpu = unsafe { &mut *self.running };
        // SYSCALL, SYSRET and IRET change CPL, STAC and CLAC change AC without leaving translated code.
        self.follow_level(cpu);
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
            inspect(cpu, &self.mem, self.core.paging(), LinAddr(ea), Access::Read, privilege)
        } else {
            let access = if write { Access::Write } else { Access::Read };
            translate(cpu, &self.mem, self.core.paging(), LinAddr(ea), access, privilege).ok()
        };
        let Some(t) = t else {
            self.stats.miss_fault += 1;
            return false;
        };
        if !soft {
            let access = if write { Access::Write } else { Access::Read };
            let walk = TraceEvent::Walk { linear: ea, access, physical: Some(t.phys.0) };
            self.core.trace(cpu, walk);
        }
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
        let (watch_reads, watch_writes) = self.core.watches_page(LinAddr(ea), t.phys);
        if (write && watch_writes) || (!write && watch_reads) {
            return false;
        }
        if write && soft && !t.writable {
            self.stats.miss_soft += 1;
            return false;
        }
        let writable = (write || t.writable) && !rom && !watch_writes && self.claims.claim_write(ram);
        if write && !writable {
            self.stats.miss_code += u64::from(!rom);
            return false;
        }
        if writable {
            self.remember_writer(ram, page);
            self.delta.set(view, true, page, delta, t.global, t.page_shift);
        }
        if !watch_reads {
            self.delta.set(view, false, page, delta, t.global, t.page_shift);
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

    pub(super) fn remember_writer(&mut self, ram: RamOffset, lin: u64) {
        let n = (ram.0 >> PAGE_SHIFT) as usize;
        let w = self.writers[n];
        let tag = lin | 1;
        let host = self.mem.host_base() as u64 + ram.0;
        if w[0] == MANY || w[0] == tag || w[1] == tag {
            return;
        }
        for (i, &old) in w.iter().enumerate() {
            let page = old & !1;
            let shown = self.delta.writes(page, host) || self.windows.writes(page, ram.0 >> PAGE_SHIFT);
            if old == 0 || !shown {
                self.writers[n][i] = tag;
                return;
            }
        }
        self.writers[n][0] = MANY;
    }

    /// Makes the page one that holds translated code: no view writes it from now on. False while another vCPU's views may;
    /// it was asked to give that up.
    pub(super) fn protect(&mut self, ram: RamOffset) -> bool {
        if !self.claims.has_code(ram) {
            self.copies.forget(ram);
        }
        self.revoke(ram);
        let claimed = self.claims.claim_code(ram);
        self.stats.code_waits += u64::from(!claimed);
        claimed
    }

    /// No view writes the page any more.
    fn revoke(&mut self, ram: RamOffset) {
        let n = (ram.0 >> PAGE_SHIFT) as usize;
        let w = std::mem::take(&mut self.writers[n]);
        if w[0] == MANY {
            self.windows.hide_all();
            self.delta.flush(false);
            return;
        }
        for tag in w {
            if tag != 0 {
                self.delta.revoke_write(tag & !1);
                self.windows.protect(tag & !1);
            }
        }
    }

    /// Does what writers of code, and other translators, ask for.
    pub(super) fn obey_notices(&mut self) {
        if !self.claims.has_notices() {
            return;
        }
        self.attention.take(Attention::CODE_WRITTEN);
        for notice in self.claims.take_notices() {
            match notice {
                Notice::Written(page, parts) => self.invalidate(page, Granules(parts)),
                Notice::Revoke(page) => {
                    self.stats.revocations += 1;
                    self.revoke(page);
                    self.claims.release_write(page);
                }
            }
        }
    }

    /// Forgets the translations of all address spaces; `keep_global` spares those of global pages.
    pub(super) fn flush(&mut self, keep_global: bool) {
        self.stats.translation_flushes += 1;
        self.delta.flush(keep_global);
        (0..self.delta.spaces()).for_each(|space| self.spoil_window(space));
        let (pages, cells) = self.code_pages();
        pages.flush(cells, keep_global);
    }

    /// Forgets the non-global translations of one space.
    fn flush_space(&mut self, space: usize) {
        self.stats.translation_flushes += 1;
        self.delta.flush_space(space);
        self.spoil_window(space);
        let (pages, cells) = self.code_pages();
        pages.flush_space(cells, space);
    }

    fn flush_page(&mut self, tag: u16, lin: u64) {
        self.stats.page_flushes += 1;
        let space = self.spaces.find(tag);
        // A page that is global goes everywhere; that others go, too, is allowed.
        self.windows.hide_page(lin, self.delta.is_large(lin));
        self.delta.flush_page(space, lin);
        let (pages, cells) = self.code_pages();
        pages.flush_page(cells, space, lin);
    }

    /// From now on the tables are those of the address space with this PCID.
    pub(super) fn switch_space(&mut self, tag: u16) {
        if self.spaces.is_current(tag) {
            return;
        }
        self.stats.space_switches += 1;
        let Switch { to, replaced } = self.spaces.switch(tag);
        if replaced {
            self.stats.spaces_replaced += 1;
            // What is global holds in any space.
            self.flush_space(to);
        }
        self.delta.switch(to);
        self.switch_window(to, replaced);
        let (pages, cells) = self.code_pages();
        pages.switch(cells, to);
    }

    /// Validation cells and jump caches.
    pub(super) fn code_pages(&mut self) -> (&mut CodePages, &mut [u32; XSLOTS]) {
        // SAFETY: by the module's invariant; `pages` lies outside the context.
        (&mut self.pages, unsafe { &mut (*self.context).xslots })
    }

    fn apply_flushes(&mut self, f: &Flushes) {
        if f.all {
            self.flush(false);
        } else {
            if f.all_non_global {
                self.flush(true);
            }
            for &tag in &f.spaces {
                if let Some(space) = self.spaces.find(tag) {
                    self.flush_space(space);
                }
            }
            for &(tag, lin) in &f.pages {
                self.flush_page(tag, lin.0);
            }
        }
        if let Some(tag) = f.switched {
            self.switch_space(tag);
        }
    }

    /// Everything the core did that the tables must follow.
    pub(super) fn follow_core(&mut self) {
        if self.core.has_flushes() {
            let mut f = std::mem::take(&mut self.flushes);
            self.core.take_flushes(&mut f);
            self.apply_flushes(&f);
            self.flushes = f;
        }
        self.obey_notices();
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

//! The translator as an [`Engine`]: finds or makes the block at RIP, runs it, and deals with why it came back.
//!
//! The guest's registers live in the [`JitContext`] between runs of translated code and are copied to the
//! [`CpuState`] only when the interpreter core or the machine must see them.
//!
//! Invariants this unsafe island relies on:
//! * `context` points into `stack` and lives as long as the translator;
//! * `running` is set exactly while translated code may run on this thread; the miss helper and the fault callback reach
//!   the translator and the `CpuState` through raw pointers only then, when `run` holds no other borrow of them.

use crate::block::{Block, BlockId, BlockKey, BlockTable, Link, Mode};
use crate::classify::{Class, Forms};
use crate::code_cache::{CodeCache, CodeOffset};
use crate::context::{ContextStack, JitContext, Reason, XSLOTS};
use crate::delta::{DeltaTables, View};
use crate::emit::{self, Emitter};
use crate::frontend::{Crossing, Frontend, Source};
use crate::host::HostVectorUnit;
use crate::pages::CodePages;
use crate::signal::{self, FaultContext, FaultScope, SignalStack};
use crate::stubs::{self, JMP_BYTES, MissInfo, Stubs};
use crate::vectors::{self, LiveVectors};
use iced_x86::OpAccess;
use paravane_cpu::{
    Access, Attention, Budget, Core, CpuBus, CpuModel, CpuState, Engine, Exit, Flushes, LinAddr, Privilege,
    SegReg, Segment, Shadow, Step, attr, cr0, cr4, efer, flags, gpr, translate,
};
use paravane_memory::{GuestMemory, Mapped, PAGE_SHIFT, RamOffset, VpIndex};
use std::io;

/// What the user may choose about the translator.
#[derive(Clone, Copy, Debug)]
pub struct JitOptions {
    /// Bytes of code cache.
    pub code_cache: usize,
    /// Count retired instructions in translated code.
    pub count_instructions: bool,
    /// The guest's time-stamp counter is the host's minus this (before IA32_TSC_ADJUST), so that RDTSC can be translated.
    pub tsc_base: Option<u64>,
}

impl Default for JitOptions {
    fn default() -> JitOptions {
        JitOptions { code_cache: 64 << 20, count_instructions: false, tsc_base: None }
    }
}

/// Space that must be free before a block is translated.
const BLOCK_RESERVE: usize = 64 << 10;
/// Blocks kept at most; bounds the tables beside the code.
const MAX_BLOCKS: usize = 1 << 20;

/// What the translator counts.
#[derive(Default, Debug)]
struct Stats {
    blocks: u64,
    instructions: u64,
    guest_bytes: u64,
    code_bytes: u64,
    links: u64,
    link_exits: u64,
    indirect_exits: u64,
    interpreted: u64,
    attention_exits: u64,
    misses: u64,
    miss_crossing: u64,
    miss_fault: u64,
    miss_mmio: u64,
    miss_code: u64,
    miss_soft: u64,
    host_faults: u64,
    invalidated: u64,
    cache_flushes: u64,
    translation_flushes: u64,
    page_flushes: u64,
}

/// Which write-view entries show a RAM page: up to two linear pages (| 1), or [`MANY`].
type Writers = [u64; 2];
const MANY: u64 = u64::MAX;

/// The binary translator of one vCPU.
pub struct Translator {
    core: Core,
    attention: Attention,
    mem: GuestMemory,
    cache: CodeCache,
    stubs: Stubs,
    delta: DeltaTables,
    /// Owns what `context` points to.
    _stack: ContextStack,
    context: *mut JitContext,
    forms: Forms,
    emitter: Emitter,
    frontend: Frontend,
    blocks: BlockTable,
    pages: CodePages,
    writers: Vec<Writers>,
    options: JitOptions,
    stats: Stats,
    /// Interpreted instructions by mnemonic.
    interpreted: Box<[u64]>,
    layout_generation: u64,
    /// The processor state while translated code runs; null otherwise.
    running: *mut CpuState,
    signal_stack: Option<SignalStack>,
    /// The last exit was a host fault that an unaligned access to a poisoned page explains.
    poison_hit: bool,
    /// An interrupt was signalled but could not be taken yet.
    interrupt_pending: bool,
    /// An NMI likewise.
    nmi_pending: bool,
    code: Vec<u8>,
    page_bytes: Box<[u8; 4096]>,
}

// SAFETY: the raw pointers point into values owned by the translator, or are null while it may move.
unsafe impl Send for Translator {}

/// Fills the delta table for a missed access.
///
/// # Safety
/// Called only by the miss stub, with the context of a running translator.
unsafe extern "sysv64" fn miss_helper(context: *mut JitContext) -> u64 {
    // SAFETY: `engine` is set by `run` to the translator that owns the context, which holds no borrow now.
    let (this, ea, info) =
        unsafe { (&mut *((*context).engine as *mut Translator), (*context).miss_ea, (*context).miss_info) };
    if this.fill(ea, info) { JMP_BYTES } else { 0 }
}

/// Decides about a host fault in translated code.
///
/// # Safety
/// Called only by the signal layer while `FaultScope::enter` of this translator is active.
unsafe fn fault_callback(data: *mut (), fault: &mut FaultContext) -> bool {
    // SAFETY: `data` is the translator; `run` holds no borrow while translated code runs.
    let this = unsafe { &mut *data.cast::<Translator>() };
    let Some(at) = this.cache.offset_of(fault.rip()) else { return false };
    if fault.signal() == libc::SIGSEGV && this.delta.handle_fault(fault.address()) {
        return true;
    }
    let Some(block) = this.blocks.by_code(at) else { return false };
    let Some(rip) = block.rip_at(at) else { return false };
    this.stats.host_faults += 1;
    this.poison_hit = fault.signal() == libc::SIGSEGV;
    // SAFETY: the context lives as long as the translator.
    unsafe { (*this.context).rip = rip };
    fault.set_rip(this.cache.address(this.stubs.interpret));
    true
}

impl Translator {
    /// A translator for vCPU `vp` of the given model.
    pub fn new(
        model: CpuModel,
        mem: &GuestMemory,
        attention: Attention,
        vp: VpIndex,
        options: JitOptions,
    ) -> io::Result<Translator> {
        if !std::is_x86_feature_detected!("bmi2") || !std::is_x86_feature_detected!("avx") {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the translator needs a host CPU with BMI2 and AVX; use --engine interp",
            ));
        }
        signal::install();
        let mut stack = ContextStack::new()?;
        let context = stack.context();
        let mut cache = CodeCache::new(options.code_cache.clamp(1 << 20, 1 << 30))?;
        let stubs = stubs::emit(&mut cache, miss_helper);
        let vectors = LiveVectors::new(context, HostVectorUnit::new()?);
        let pages = CodePages::new(cache.address(stubs.indirect));
        // SAFETY: freshly mapped zeroed memory of the right size and alignment; all-zero is a valid context.
        unsafe { (*context).mxcsr = 0x1F80 };
        Ok(Translator {
            core: Core::new(model.clone(), Box::new(vectors), attention.clone(), vp),
            attention,
            mem: mem.clone(),
            stubs,
            delta: DeltaTables::new()?,
            _stack: stack,
            context,
            forms: Forms::new(model),
            emitter: Emitter::new(stubs),
            frontend: Frontend::default(),
            blocks: BlockTable::default(),
            pages,
            writers: vec![[0; 2]; (mem.backing_len() >> PAGE_SHIFT) as usize],
            options,
            stats: Stats::default(),
            interpreted: vec![0; iced_x86::Mnemonic::values().len()].into(),
            layout_generation: mem.layout_generation(),
            running: std::ptr::null_mut(),
            signal_stack: None,
            poison_hit: false,
            interrupt_pending: false,
            nmi_pending: false,
            code: Vec::new(),
            page_bytes: Box::new([0; 4096]),
            cache,
        })
    }

    fn context(&mut self) -> &mut JitContext {
        // SAFETY: by the module's invariant; `&mut self` keeps other users away.
        unsafe { &mut *self.context }
    }

    // ---- state between CpuState and context -------------------------------------------------------------

    fn load_registers(&mut self, cpu: &CpuState, mode: Mode) {
        let view = self.view(cpu);
        let (read_base, write_base) = (self.delta.read_base(view), self.delta.write_base(view));
        let jump_cache = self.pages.jump_cache(mode);
        let views = [View::Supervisor, View::SupervisorAc]
            .map(|v| [self.delta.read_base(v), self.delta.write_base(v)]);
        let pending = u32::from(self.interrupt_pending);
        let tsc_offset = cpu.msr.tsc_adjust.wrapping_sub(self.options.tsc_base.unwrap_or(0));
        let c = self.context();
        c.views = views;
        c.interrupt_pending = pending;
        for (selector, seg) in c.selectors.iter_mut().zip(&cpu.seg) {
            *selector = seg.selector;
        }
        // RF covers one instruction; translated code takes no instruction breakpoints.
        c.system_flags = cpu.rflags & !(flags::STATUS | flags::IF | flags::AC | flags::RF);
        c.interrupt_flag = u8::from(cpu.rflags & flags::IF != 0);
        c.access_flag = u8::from(cpu.rflags & flags::AC != 0);
        c.tsc_offset = tsc_offset;
        c.tsc_aux = cpu.msr.tsc_aux as u32;
        c.kernel_gs_base = cpu.msr.kernel_gs_base;
        c.spill[..10].copy_from_slice(&cpu.gpr[..10]);
        c.home.copy_from_slice(&cpu.gpr[10..]);
        c.rip = cpu.rip;
        c.status = cpu.rflags & flags::STATUS;
        for (base, seg) in c.seg_base.iter_mut().zip(&cpu.seg) {
            *base = seg.base;
        }
        c.read_base = read_base;
        c.write_base = write_base;
        c.jump_cache = jump_cache;
    }

    fn store_registers(&mut self, cpu: &mut CpuState) {
        let c = self.context();
        cpu.gpr[..10].copy_from_slice(&c.spill[..10]);
        cpu.gpr[10..].copy_from_slice(&c.home);
        cpu.rip = c.rip;
        cpu.rflags = c.system_flags | (c.status & flags::STATUS);
        if c.interrupt_flag != 0 {
            cpu.rflags |= flags::IF;
        }
        if c.access_flag != 0 {
            cpu.rflags |= flags::AC;
        }
        cpu.seg[SegReg::Gs as usize].base = c.seg_base[SegReg::Gs as usize];
        cpu.msr.kernel_gs_base = c.kernel_gs_base;
        cpu.instructions += std::mem::take(&mut c.instructions);
    }

    fn view(&self, cpu: &CpuState) -> View {
        if cpu.cpl == 3 {
            View::User
        } else if cpu.cr4 & cr4::SMAP != 0 && cpu.rflags & flags::AC != 0 {
            View::SupervisorAc
        } else {
            View::Supervisor
        }
    }

    /// The mode bits of `cpu`, or `None` where the interpreter must run.
    fn mode(&self, cpu: &CpuState) -> Option<Mode> {
        const AWKWARD: u64 = flags::TF | flags::VM | flags::DF;
        if cpu.rflags & AWKWARD != 0
            || !cpu.protected()
            || cpu.dr[7] & 0xFF != 0
            || cpu.shadow != Shadow::None
            || !cpu.a20
            || (cpu.cr0 & cr0::AM != 0 && cpu.rflags & flags::AC != 0 && cpu.cpl == 3)
        {
            return None;
        }
        let mut m = 0;
        if !cpu.code64() {
            let flat = |s: SegReg| {
                let s = cpu.segment(s);
                s.base == 0 && s.limit == u32::MAX && s.present()
            };
            let writable = |s: SegReg| cpu.segment(s).attributes & 0xE == 0x2;
            if cpu.code_bits() != 32
                || ![SegReg::Cs, SegReg::Ss, SegReg::Ds, SegReg::Es].into_iter().all(flat)
                || ![SegReg::Ss, SegReg::Ds, SegReg::Es].into_iter().all(writable)
                || !cpu.segment(SegReg::Ss).big()
            {
                return None;
            }
            m |= Mode::CODE32;
            for (s, bit) in [(SegReg::Fs, Mode::FS_FLAT), (SegReg::Gs, Mode::GS_FLAT)] {
                if cpu.segment(s).limit == u32::MAX && cpu.segment(s).present() && writable(s) {
                    m |= bit;
                }
            }
        }
        match cpu.cpl {
            0 => {}
            3 => m |= Mode::USER,
            _ => return None,
        }
        if cpu.cr4 & cr4::SMAP != 0 {
            m |= Mode::SMAP;
        }
        if cpu.cr0 & (cr0::EM | cr0::TS) == 0 {
            m |= Mode::X87;
            if cpu.cr4 & cr4::OSFXSR != 0 {
                m |= Mode::SSE;
            }
            if cpu.cr4 & cr4::OSXSAVE != 0 && cpu.xcr0 & 6 == 6 {
                m |= Mode::AVX;
            }
        }
        if self.options.tsc_base.is_some() && (cpu.cr4 & cr4::TSD == 0 || cpu.cpl == 0) {
            m |= Mode::TSC;
        }
        if self.options.count_instructions {
            m |= Mode::COUNTED;
        }
        Some(Mode(m))
    }

    // ---- memory -----------------------------------------------------------------------------------------

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
        // A soft write must not set the dirty bit: it asks only whether a write would be allowed as things are.
        let access = if write && !soft { Access::Write } else { Access::Read };
        let privilege = if cpu.cpl == 3 { Privilege::User } else { Privilege::Supervisor };
        let Ok(t) = translate(cpu, &self.mem, LinAddr(ea), access, privilege) else {
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
        if write && (rom || code || (soft && !t.writable)) {
            self.stats.miss_code += u64::from(code);
            self.stats.miss_soft += u64::from(soft);
            return false;
        }
        if write || (t.writable && !rom && !code) {
            self.mem.wrote(ram, 1);
            self.remember_writer(ram, page);
            self.delta.set(view, true, page, delta, t.global, large);
        }
        self.delta.set(view, false, page, delta, t.global, large);
        true
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
    fn protect(&mut self, ram: RamOffset) {
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

    // ---- code pages -------------------------------------------------------------------------------------

    /// The backing page of code at `lin` and its validation cell; `None` if fetching faults or is not from memory.
    fn fetch_page(&mut self, cpu: &CpuState, lin: u64) -> Option<(RamOffset, u32)> {
        let user = cpu.cpl == 3;
        let slot = match self.pages.slot(lin, user) {
            Some(s) => s,
            None => {
                self.reset_cache();
                self.pages.slot(lin, user)?
            }
        };
        let cell = self.context().xslots[slot as usize];
        if cell != 0 {
            return Some((RamOffset(u64::from(cell - 1) << PAGE_SHIFT), slot));
        }
        if !canonical(lin) {
            return None;
        }
        let privilege = if user { Privilege::User } else { Privilege::Supervisor };
        let t = translate(cpu, &self.mem, LinAddr(lin), Access::Execute, privilege).ok()?;
        let (Mapped::Ram(o) | Mapped::Rom(o)) = self.mem.resolve(t.phys.page()) else { return None };
        self.context().xslots[slot as usize] = (o.0 >> PAGE_SHIFT) as u32 + 1;
        self.pages.validated(slot, t.global);
        Some((o, slot))
    }

    /// The block at `lin`, translated if need be, and the validation cell of its page.
    fn block_at(&mut self, cpu: &CpuState, lin: u64, mode: Mode) -> Option<(BlockId, u32)> {
        let (page, slot) = self.fetch_page(cpu, lin)?;
        let key = BlockKey { at: RamOffset(page.0 + (lin & 0xFFF)), lin, mode };
        if let Some(id) = self.blocks.find(&key) {
            let Some(second) = self.blocks.blocks[id as usize].crosses_into else { return Some((id, slot)) };
            // An instruction on two pages: the second must still be what it was.
            let (next, _) = self.fetch_page(cpu, (lin & !0xFFF).wrapping_add(4096))?;
            if next.0 >> PAGE_SHIFT == second {
                return Some((id, slot));
            }
            self.retire(id);
        }
        if self.cache.free() < BLOCK_RESERVE || self.blocks.blocks.len() >= MAX_BLOCKS {
            self.reset_cache();
            return self.block_at(cpu, lin, mode);
        }
        self.translate_block(cpu, key, page).map(|id| (id, slot))
    }

    fn translate_block(&mut self, cpu: &CpuState, key: BlockKey, page: RamOffset) -> Option<BlockId> {
        self.protect(page);
        self.mem.ram_read(page, &mut self.page_bytes[..]);
        let at = (key.lin & 0xFFF) as usize;
        let mut crossing = None;
        let mut extra = None;
        let mut joined = [0u8; 32];
        let mut bytes = &self.page_bytes[..];
        let mut source_at = at;
        if at > 4096 - 15 && !complete(&bytes[at..], key.mode) {
            let next_lin = (key.lin & !0xFFF).wrapping_add(4096);
            let (next, slot) = self.fetch_page(cpu, next_lin)?;
            self.protect(next);
            let head = 4096 - at;
            joined[..head].copy_from_slice(&self.page_bytes[at..]);
            self.mem.ram_read(next, &mut joined[head..head + 15]);
            bytes = &joined[..head + 15];
            source_at = 0;
            crossing = Some(Crossing { slot, page: (next.0 >> PAGE_SHIFT) as u32 + 1 });
            extra = Some(next.0 >> PAGE_SHIFT);
        }
        let options = self.core.model().decoder_options();
        let source = Source { bytes, at: source_at, lin: key.lin, mode: key.mode, options };
        let first_link = self.blocks.links.len() as u32;
        let t = self.frontend.translate(&source, &mut self.forms, &mut self.emitter, first_link, crossing);
        let start = self.cache.next();
        self.emitter.finish(start, &mut self.code);
        if self.code.len() > self.cache.free() {
            return None;
        }
        self.cache.append(&self.code);
        for l in &self.emitter.links {
            self.blocks.links.push(Link {
                site: CodeOffset(start.0 + self.emitter.offset(l.site)),
                stub: CodeOffset(start.0 + self.emitter.offset(l.stub)),
                flags_live: l.flags_live,
                same_page: l.same_page && extra.is_none(),
                ungrouped: l.ungrouped,
            });
        }
        self.stats.blocks += 1;
        self.stats.instructions += u64::from(t.instructions);
        self.stats.guest_bytes += u64::from(t.len);
        self.stats.code_bytes += self.code.len() as u64;
        let block = Block {
            key,
            start,
            entry: CodeOffset(start.0 + t.entry),
            code_len: self.code.len() as u32,
            sites: t.sites.into_boxed_slice(),
            incoming: Vec::new(),
            cached: false,
            live: true,
            crosses_into: extra,
        };
        Some(self.blocks.insert(block))
    }

    /// Chains link `number` to block `to`.
    fn chain(&mut self, number: u32, to: BlockId, slot: u32, page: RamOffset) {
        let link = &self.blocks.links[number as usize];
        let (site, stub) = (link.site, link.stub);
        let entry = self.blocks.blocks[to as usize].entry;
        let target = if link.same_page {
            entry
        } else {
            let at = self.cache.next();
            let value = (page.0 >> PAGE_SHIFT) as u32 + 1;
            let thunk = emit::link_thunk(at, slot, value, link.flags_live, stub, entry);
            if thunk.len() + 64 > self.cache.free() {
                return;
            }
            self.cache.append(&thunk)
        };
        self.cache.patch_rel32(site, target);
        self.blocks.blocks[to as usize].incoming.push(number);
        self.stats.links += 1;
    }

    /// Removes a block: nothing jumps to it any more.
    fn retire(&mut self, id: BlockId) {
        let block = &mut self.blocks.blocks[id as usize];
        if !block.live {
            return;
        }
        let incoming = std::mem::take(&mut block.incoming);
        let (lin, start, cached) = (block.key.lin, block.start, block.cached);
        for number in incoming {
            let link = &self.blocks.links[number as usize];
            self.cache.patch_rel32(link.site, link.stub);
        }
        if cached {
            let entry = self.cache.address(start);
            self.pages.uncache(lin, entry);
        }
        self.blocks.retire(id);
        self.stats.invalidated += 1;
    }

    /// Removes all blocks with bytes on the page at `ram`; the page is an ordinary page again.
    fn invalidate_page(&mut self, ram: RamOffset) {
        let page = ram.0 >> PAGE_SHIFT;
        for id in self.blocks.take_page(page) {
            self.retire(id);
        }
        self.mem.set_code(RamOffset(page << PAGE_SHIFT), false);
        self.core.invalidate_code(RamOffset(page << PAGE_SHIFT));
    }

    /// Starts over with an empty code cache.
    fn reset_cache(&mut self) {
        let pages: Vec<u64> = self.blocks.pages().collect();
        for p in pages {
            self.mem.set_code(RamOffset(p << PAGE_SHIFT), false);
        }
        self.blocks.clear();
        // SAFETY: by the module's invariant; a field borrow beside `pages`.
        let cells = unsafe { &mut (*self.context).xslots };
        self.pages.clear(cells);
        self.cache.truncate(CodeOffset(0));
        self.stubs = stubs::emit(&mut self.cache, miss_helper);
        self.stats.cache_flushes += 1;
    }

    // ---- flushes ----------------------------------------------------------------------------------------

    fn flush(&mut self, keep_global: bool) {
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
    fn follow_core(&mut self) {
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

    // ---- running ----------------------------------------------------------------------------------------

    /// One instruction by the interpreter core.
    fn step(&mut self, cpu: &mut CpuState, bus: &dyn CpuBus) -> Step {
        self.stats.interpreted += 1;
        let step = self.core.step(cpu, &self.mem, bus);
        self.interpreted[self.core.last_instruction() as usize] += 1;
        self.follow_core();
        step
    }

    /// Deals with the attention word; `Some` ends the run.
    fn attend(&mut self) -> Option<Exit> {
        let a = self.attention.get();
        if a & (Attention::STOP | Attention::INIT | Attention::STARTUP) != 0 {
            return Some(Exit::Stop);
        }
        if a & Attention::LAYOUT != 0 {
            self.attention.take(Attention::LAYOUT);
            self.flush(false);
            self.core.flush_translations();
        }
        if a & Attention::CODE_WRITTEN != 0 {
            self.attention.take(Attention::CODE_WRITTEN);
        }
        self.follow_core();
        // Kept aside while the guest does not let them in, so that polls in translated code stay quiet.
        self.interrupt_pending |= self.attention.take(Attention::INTERRUPT) != 0;
        self.nmi_pending |= self.attention.take(Attention::NMI) != 0;
        None
    }

    /// Takes pending interrupts if the guest lets them in.
    fn interrupts(&mut self, cpu: &mut CpuState, bus: &dyn CpuBus) -> Step {
        let nmi = if self.nmi_pending { Attention::NMI } else { 0 };
        let interrupt = if self.interrupt_pending { Attention::INTERRUPT } else { 0 };
        self.attention.set(nmi | interrupt);
        let step = self.core.poll(cpu, &self.mem, bus);
        // What the core did not take waits on.
        self.nmi_pending = self.attention.take(Attention::NMI) != 0;
        self.interrupt_pending = self.attention.take(Attention::INTERRUPT) != 0;
        self.follow_core();
        step
    }

    /// Runs translated code from the code at `entry` until an exit; returns why.
    fn enter(&mut self, cpu: &mut CpuState, entry: u64) -> Reason {
        let code = self.cache.address(self.stubs.enter);
        let this: *mut Translator = self;
        let context = self.context;
        self.running = cpu;
        // SAFETY: the context is valid; the engine pointer is good until `running` is cleared.
        unsafe {
            (*context).entry = entry;
            (*context).engine = this as u64;
        }
        // SAFETY: `enter` is a sysv64 function of one pointer emitted by `stubs`.
        let enter: unsafe extern "sysv64" fn(*mut JitContext) = unsafe { std::mem::transmute(code) };
        let mut scope = FaultScope::new(fault_callback, this.cast());
        // SAFETY: translated code keeps to the context's private stack and restores the host's state; the callback's
        // pointer is valid, and nothing else borrows the translator until it returns.
        unsafe { scope.enter(|| enter(context)) };
        self.running = std::ptr::null_mut();
        match self.context().reason {
            0 => Reason::Link,
            1 => Reason::Indirect,
            3 => Reason::Attention,
            4 => Reason::Syscall,
            5 => Reason::Sysret,
            _ => Reason::Interpret,
        }
    }

    /// Runs translated code, chaining and caching on the way, until the interpreter or attention is needed.
    /// On return all registers are in `cpu`.
    fn run_translated(&mut self, cpu: &mut CpuState, mode: Mode) -> bool {
        self.load_registers(cpu, mode);
        // The jump cache holds the indirect entry, which checks the address, or the way to `Reason::Indirect`.
        let mut entry = self.pages.lookup(mode, cpu.rip);
        loop {
            let reason = self.enter(cpu, entry);
            if self.attention.get() != 0 && matches!(reason, Reason::Link | Reason::Indirect) {
                self.store_registers(cpu);
                return false;
            }
            let rip = self.context().rip;
            let resets = self.stats.cache_flushes;
            match reason {
                Reason::Interpret => {
                    self.store_registers(cpu);
                    return !(std::mem::take(&mut self.poison_hit) && self.fill_operand(cpu, mode));
                }
                Reason::Attention => {
                    self.stats.attention_exits += 1;
                    self.store_registers(cpu);
                    return false;
                }
                Reason::Link => {
                    self.stats.link_exits += 1;
                    let number = self.context().link;
                    let ungrouped = self.blocks.links[number as usize].ungrouped;
                    let to_mode = if ungrouped { Mode(mode.0 | Mode::UNGROUPED) } else { mode };
                    let Some((to, slot)) = self.block_at(cpu, rip, to_mode) else {
                        self.store_registers(cpu);
                        return true;
                    };
                    if resets == self.stats.cache_flushes {
                        let page = RamOffset(self.blocks.blocks[to as usize].key.at.0 & !0xFFF);
                        self.chain(number, to, slot, page);
                    }
                    entry = self.cache.address(self.blocks.blocks[to as usize].entry);
                }
                Reason::Syscall | Reason::Sysret => {
                    self.store_registers(cpu);
                    let done = if reason == Reason::Syscall { syscall(cpu) } else { sysret(cpu) };
                    cpu.instructions += u64::from(done);
                    return !done;
                }
                Reason::Indirect if !mode.has(Mode::CODE32) && !canonical(rip) => {
                    self.store_registers(cpu);
                    self.undo_branch(cpu);
                    return true;
                }
                Reason::Indirect => {
                    self.stats.indirect_exits += 1;
                    let Some((to, slot)) = self.block_at(cpu, rip, mode) else {
                        self.store_registers(cpu);
                        return true;
                    };
                    let block = &mut self.blocks.blocks[to as usize];
                    block.cached = true;
                    let start = self.cache.address(block.start);
                    self.pages.cache(mode, rip, start, slot);
                    entry = self.cache.address(self.blocks.blocks[to as usize].entry);
                }
            }
            if resets != self.stats.cache_flushes {
                self.context().jump_cache = self.pages.jump_cache(mode);
            }
        }
    }

    /// A near branch led to a non-canonical address: #GP at the branch itself, with the stack as before it. Goes back
    /// to the branch, which the interpreter then executes.
    fn undo_branch(&mut self, cpu: &mut CpuState) {
        let source = self.context().source;
        let Some(at) = self.cache.offset_of(source) else { return };
        let Some(block) = self.blocks.by_code(at) else { return };
        let Some(rip) = block.rip_at(at) else { return };
        let mut bytes = [0; 15];
        let n = (4096 - (rip & 0xFFF)).min(15) as usize;
        let Some((page, _)) = self.fetch_page(cpu, rip) else { return };
        self.mem.ram_read(RamOffset(page.0 + (rip & 0xFFF)), &mut bytes[..n]);
        let instr = iced_x86::Decoder::with_ip(64, &bytes[..n], rip, 0).decode();
        let moved = match instr.flow_control() {
            iced_x86::FlowControl::Return => {
                8 + if instr.op_count() > 0 { u64::from(instr.immediate16()) } else { 0 }
            }
            iced_x86::FlowControl::IndirectCall => 8u64.wrapping_neg(),
            _ => 0,
        };
        cpu.gpr[gpr::RSP] = cpu.gpr[gpr::RSP].wrapping_sub(moved);
        cpu.rip = rip;
    }

    /// An unaligned address plus poison can look aligned: the access then faults on the host instead of missing. Fills
    /// the table for the memory operand of the instruction at RIP; true if it may be tried again.
    fn fill_operand(&mut self, cpu: &mut CpuState, mode: Mode) -> bool {
        let Some((page, _)) = self.fetch_page(cpu, cpu.rip) else { return false };
        let mut bytes = [0; 15];
        let n = (4096 - (cpu.rip & 0xFFF)).min(15) as usize;
        self.mem.ram_read(RamOffset(page.0 + (cpu.rip & 0xFFF)), &mut bytes[..n]);
        let bits = if mode.has(Mode::CODE32) { 32 } else { 64 };
        let options = self.core.model().decoder_options();
        let instr = iced_x86::Decoder::with_ip(bits, &bytes[..n], cpu.rip, options).decode();
        let form = self.forms.form(&instr);
        let Some(op) = (0..instr.op_count()).find(|&i| instr.op_kind(i) == iced_x86::OpKind::Memory) else {
            return false;
        };
        let register = |r: iced_x86::Register, _: usize, _: usize| {
            if r.is_segment_register() {
                let s = cpu.seg.get(r.number())?;
                return Some(if r.number() >= 4 || bits == 32 { s.base } else { 0 });
            }
            let v = *cpu.gpr.get(r.full_register().number())?;
            Some(if r.size() == 4 { v & 0xFFFF_FFFF } else { v })
        };
        let Some(ea) = instr.virtual_address(op, 0, register) else { return false };
        let size = instr.memory_size().size() as u64;
        if size == 0 || size > 64 {
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

    fn begin(&mut self, cpu: &CpuState) -> io::Result<()> {
        if self.signal_stack.is_none() {
            self.signal_stack = Some(SignalStack::new()?);
        }
        let attention = self.attention.cell().as_ptr() as u64;
        self.context().attention = attention;
        // SAFETY: the context is valid.
        unsafe { vectors::load(self.context, &cpu.fpu) };
        Ok(())
    }
}

/// SYSCALL in 64-bit mode (SDM 2B); false if the interpreter must raise its fault.
fn syscall(cpu: &mut CpuState) -> bool {
    if cpu.efer & efer::SCE == 0 {
        return false;
    }
    cpu.gpr[gpr::RCX] = cpu.rip.wrapping_add(SYSCALL_LEN);
    cpu.gpr[R11] = cpu.rflags;
    cpu.rip = cpu.msr.lstar;
    cpu.rflags &= !(cpu.msr.sfmask | flags::RF);
    let selector = (cpu.msr.star >> 32) as u16 & !3;
    cpu.seg[SegReg::Cs as usize] = Segment::flat(selector, CODE64);
    cpu.seg[SegReg::Ss as usize] = Segment::flat(selector.wrapping_add(8), DATA);
    cpu.cpl = 0;
    true
}

/// SYSRETQ (SDM 2B); false if the interpreter must raise its fault or knows flags we do not handle.
fn sysret(cpu: &mut CpuState) -> bool {
    let (rip, rflags) = (cpu.gpr[gpr::RCX], cpu.gpr[R11]);
    if cpu.efer & efer::SCE == 0 || !canonical(rip) || rflags & (flags::TF | flags::NT) != 0 {
        return false;
    }
    cpu.rip = rip;
    cpu.rflags = (rflags & 0x3C_7FD7) | flags::FIXED;
    let selector = (cpu.msr.star >> 48) as u16;
    cpu.seg[SegReg::Cs as usize] = Segment::flat(selector.wrapping_add(16) | 3, CODE64 | DPL3);
    cpu.seg[SegReg::Ss as usize] = Segment::flat(selector.wrapping_add(8) | 3, DATA | DPL3);
    cpu.cpl = 3;
    true
}

const R11: usize = 11;
const SYSCALL_LEN: u64 = 2;
/// Attributes that SYSCALL and SYSRET load: accessed 64-bit code, accessed writable 32-bit data.
const CODE64: u16 = attr::G | attr::L | attr::P | attr::S | attr::CODE | attr::READ_WRITE | attr::ACCESSED;
const DATA: u16 = attr::G | attr::DB | attr::P | attr::S | attr::READ_WRITE | attr::ACCESSED;
const DPL3: u16 = 3 << attr::DPL_SHIFT;

/// Whether bits 63–47 are all equal.
fn canonical(lin: u64) -> bool {
    ((lin << 16) as i64 >> 16) as u64 == lin
}

/// Whether the first instruction in `bytes` is whole.
fn complete(bytes: &[u8], mode: Mode) -> bool {
    let bits = if mode.has(Mode::CODE32) { 32 } else { 64 };
    let mut d = iced_x86::Decoder::new(bits, bytes, iced_x86::DecoderOptions::NONE);
    let _ = d.decode();
    d.last_error() != iced_x86::DecoderError::NoMoreBytes
}

impl Engine for Translator {
    fn run(&mut self, cpu: &mut CpuState, _mem: &GuestMemory, bus: &dyn CpuBus, budget: Budget) -> Exit {
        if self.begin(cpu).is_err() {
            return Exit::Unsupported;
        }
        let limit = cpu.instructions.saturating_add(budget.instructions);
        let exit = loop {
            if self.attention.get() != 0
                && let Some(exit) = self.attend()
            {
                break exit;
            }
            let open = cpu.shadow == Shadow::None;
            let interrupt = self.interrupt_pending && cpu.rflags & flags::IF != 0;
            let nmi = self.nmi_pending && !cpu.nmi_blocked;
            if open && (interrupt || nmi) {
                match self.interrupts(cpu, bus) {
                    Step::TripleFault => break Exit::TripleFault,
                    Step::Unsupported => break Exit::Unsupported,
                    Step::Done | Step::Halt => {}
                }
            }
            if cpu.halted {
                break Exit::Halt;
            }
            let interpret = match self.mode(cpu) {
                Some(mode) if budget == Budget::UNLIMITED => self.run_translated(cpu, mode),
                _ => true,
            };
            if interpret {
                match self.step(cpu, bus) {
                    Step::Done => {}
                    Step::Halt => {}
                    Step::TripleFault => break Exit::TripleFault,
                    Step::Unsupported => break Exit::Unsupported,
                }
            }
            if budget != Budget::UNLIMITED && cpu.instructions >= limit {
                break Exit::Budget;
            }
        };
        // SAFETY: the context is valid.
        unsafe { vectors::save(self.context, &mut cpu.fpu) };
        exit
    }

    fn invalidate(&mut self, page: RamOffset) {
        self.invalidate_page(page);
    }

    fn flush_translations(&mut self) {
        self.flush(false);
        self.core.flush_translations();
    }

    fn counters(&self) -> Vec<(String, u64)> {
        let s = &self.stats;
        let own = [
            ("blocks_translated", s.blocks),
            ("instructions_translated", s.instructions),
            ("guest_bytes_translated", s.guest_bytes),
            ("code_bytes", s.code_bytes),
            ("code_cache_used", self.cache.used() as u64),
            ("links", s.links),
            ("link_exits", s.link_exits),
            ("indirect_exits", s.indirect_exits),
            ("interpreted_instructions", s.interpreted),
            ("attention_exits", s.attention_exits),
            ("delta_misses", s.misses),
            ("delta_miss_crossing", s.miss_crossing),
            ("delta_miss_fault", s.miss_fault),
            ("delta_miss_mmio", s.miss_mmio),
            ("delta_miss_code", s.miss_code),
            ("delta_miss_soft", s.miss_soft),
            ("delta_fills", self.delta.fills),
            ("delta_table_pages", self.delta.pages),
            ("host_faults", s.host_faults),
            ("blocks_invalidated", s.invalidated),
            ("code_cache_flushes", s.cache_flushes),
            ("translation_flushes", s.translation_flushes),
            ("page_flushes", s.page_flushes),
        ];
        let interpreted = iced_x86::Mnemonic::values()
            .zip(&self.interpreted)
            .filter(|&(_, &n)| n > 0)
            .map(|(m, &n)| (format!("interpreted.{m:?}").to_lowercase(), n));
        let core = self.core.counters();
        own.into_iter().chain(core).map(|(name, n)| (name.to_owned(), n)).chain(interpreted).collect()
    }
}

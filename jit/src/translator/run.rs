//! Running: between `CpuState` and the context, in and out of translated code, and what each exit asks for. Also attention.
//!
//! Invariants this unsafe island relies on, beside those of [`super`]:
//! * the `enter` stub keeps the host's callee-saved registers and stack;
//! * [`fault_callback`] runs only inside the [`FaultScope`] of `enter`, when nothing else borrows the translator.

use super::fill::{applied_base, operand_address};
use super::traces::Recorder;
use super::{Translator, canonical, level};
use crate::block::Mode;
use crate::context::{JitContext, Reason};
use crate::delta::View;
use crate::regs::{HOMES, HOST_RSP};
use crate::segments::{self, Bounds, CodeSegment, CodeSegments};
use crate::signal::{self, FaultContext, FaultScope};
use crate::vectors;
use iced_x86::Mnemonic;
use paravane_cpu::{
    Attention, CpuBus, CpuState, Exit, Fault, SegReg, Shadow, Step, cr0, cr4, flags, gpr,
    virtual_interrupt_due, x87_opcode,
};
use std::io;
use std::sync::atomic::Ordering;

/// What is left to do about the instruction at RIP after translated code was left.
pub(super) enum Rest {
    Nothing,
    /// It may be tried again.
    Again,
    /// The interpreter executes it.
    Interpret,
    /// It raised this.
    Raise(Fault),
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
    let Some((rip, remaining)) = this.blocks.rip_at(block, at) else { return false };
    this.stats.host_faults += 1;
    this.poison_hit = fault.signal() == libc::SIGSEGV;
    this.candidates.fault =
        (fault.vector() == PAGE_FAULT).then(|| (fault.address(), fault.error_code() & WRITE != 0));
    // SAFETY: the context lives as long as the translator.
    unsafe {
        (*this.context).rip = rip;
        // The block does not execute these after all.
        (*this.context).instructions = (*this.context).instructions.wrapping_sub(u64::from(remaining));
    }
    let pending = this.blocks.pending_rsp_at(block, at);
    if pending != 0 {
        let rsp = fault.gpr(HOST_RSP as usize).wrapping_add(pending as u64);
        fault.set_gpr(HOST_RSP as usize, block.key.mode.linear(rsp));
    }
    let saved = at.0 >= block.flags_saved.0;
    let stub = if saved { this.stubs.interpret_saved } else { this.stubs.interpret };
    fault.set_rip(this.cache.address(stub));
    true
}

impl Translator {
    /// From now on translated code may run, on this thread; [`Self::end`] ends that.
    pub(super) fn begin(&mut self, cpu: &CpuState) -> io::Result<()> {
        signal::prepare_thread()?;
        self.claims.enter();
        self.obey_notices();
        let attention = self.attention.cell().as_ptr() as u64;
        self.context().attention = attention;
        self.switch_space(cpu.pcid());
        // SAFETY: the context is valid.
        unsafe { vectors::load(self.context, &cpu.fpu) };
        Ok(())
    }

    /// The state is all in `cpu` again, and what this vCPU holds may be taken from it.
    pub(super) fn end(&mut self, cpu: &mut CpuState) {
        // SAFETY: the context is valid.
        unsafe { vectors::save(self.context, &mut cpu.fpu) };
        self.claims.leave();
    }

    /// One instruction by the interpreter core.
    pub(super) fn interpret(&mut self, cpu: &mut CpuState, bus: &dyn CpuBus) -> Step {
        self.stats.interpreted += 1;
        if let Some((host_ip, host_dp)) = vectors::pending_error() {
            self.x87_pointers(cpu, host_ip, host_dp);
        }
        let step = self.core.step(cpu, &self.mem, bus);
        let last = self.core.last_instruction();
        if last == Mnemonic::Iretq {
            self.learn_return(cpu);
        }
        self.interpreted[last as usize] += 1;
        if last == Mnemonic::Pause && self.options.vcpus > 1 {
            self.context().pauses = PAUSES;
            std::thread::yield_now();
        }
        self.follow_core();
        step
    }

    /// Delivers what the instruction at RIP raised in translated code.
    pub(super) fn raise(&mut self, cpu: &mut CpuState, bus: &dyn CpuBus, fault: Fault) -> Step {
        let step = self.core.raise(cpu, &self.mem, bus, fault);
        self.follow_core();
        step
    }

    /// An unmasked x87 error waits: if translated code raised it, the guest's pointers are those of its instruction. The
    /// operand's page is what the address registers say now; they may have changed since.
    #[cold]
    fn x87_pointers(&mut self, cpu: &mut CpuState, host_ip: u64, host_dp: u64) {
        let Some(at) = self.cache.offset_of(host_ip) else { return };
        let Some(block) = self.blocks.by_code(at) else { return };
        let Some((address, _)) = self.blocks.rip_at(block, at) else { return };
        let mode = block.key.mode;
        let Some((instr, bytes)) = self.instruction_at(cpu, mode, address) else { return };
        let ip = self.rip_of(cpu, address);
        let pointers = &mut cpu.fpu_pointers;
        pointers.ip = ip;
        pointers.cs = cpu.seg[SegReg::Cs as usize].selector;
        pointers.opcode = x87_opcode(&bytes);
        if let Some(ea) = operand_address(cpu, &instr) {
            let base = applied_base(cpu, instr.memory_segment());
            cpu.fpu_pointers.dp = mode.linear(((ea & !0xFFF) | (host_dp & 0xFFF)).wrapping_sub(base));
            cpu.fpu_pointers.ds = cpu.seg.get(instr.memory_segment().number()).map_or(0, |s| s.selector);
        }
    }

    /// Deals with the attention word; `Some` ends the run.
    pub(super) fn attend(&mut self) -> Option<Exit> {
        let a = self.attention.get();
        if a & (Attention::STOP | Attention::INIT | Attention::STARTUP) != 0 {
            return Some(Exit::Stop);
        }
        self.follow_attention(a);
        None
    }

    /// Does what the attention flags `a` ask of the engine.
    pub(super) fn follow_attention(&mut self, a: u32) {
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
    }

    /// Takes pending interrupts if the guest lets them in.
    pub(super) fn interrupts(&mut self, cpu: &mut CpuState, bus: &dyn CpuBus) -> Step {
        self.offering_interrupts(|this| this.core.poll(cpu, &this.mem, bus))
    }

    /// Lets the core see the interrupts that were set aside.
    pub(super) fn offering_interrupts(&mut self, run: impl FnOnce(&mut Self) -> Step) -> Step {
        let nmi = if self.nmi_pending { Attention::NMI } else { 0 };
        let interrupt = if self.interrupt_pending { Attention::INTERRUPT } else { 0 };
        self.attention.set(nmi | interrupt);
        let step = run(self);
        // What the core did not take waits on.
        self.nmi_pending = self.attention.take(Attention::NMI) != 0;
        self.interrupt_pending = self.attention.take(Attention::INTERRUPT) != 0;
        self.follow_core();
        step
    }

    /// The mode bits of `cpu`, or `None` where the interpreter must run.
    pub(super) fn mode(&self, cpu: &CpuState) -> Option<Mode> {
        if cpu.rflags & flags::TF != 0
            || cpu.dr[7] & 0xFF != 0
            || cpu.shadow != Shadow::None
            || !cpu.a20
            || self.interprets_all
            || cpu.ignne
            || virtual_interrupt_due(cpu)
            || (cpu.cr0 & cr0::AM != 0 && cpu.rflags & flags::AC != 0 && cpu.cpl == 3)
        {
            return None;
        }
        Some(self.mode_at(cpu, cpu.cpl))
    }

    /// The mode bits of `cpu` where translated code may run, with `cpl` for CPL.
    pub(super) fn mode_at(&self, cpu: &CpuState, cpl: u8) -> Mode {
        let mut m = if cpu.code64() { 0 } else { segments::mode_bits(cpu) };
        m |= match cpl {
            0 => 0,
            3 => Mode::USER,
            _ => Mode::MIDDLE,
        };
        if cpu.rflags & flags::DF != 0 {
            m |= Mode::DOWN;
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
        if self.reads_tsc(cpu, cpl) {
            m |= Mode::TSC;
        }
        if cpu.cr4 & cr4::FSGSBASE != 0 {
            m |= Mode::FSGSBASE;
        }
        if self.options.vcpus > 1 {
            m |= Mode::YIELDS;
        }
        if self.budgeted() {
            m |= Mode::COUNTED | Mode::BUDGETED;
        } else if self.options.count_instructions {
            m |= Mode::COUNTED;
        }
        if cpl == 3 && self.windows.serves(Mode(m)) {
            m |= Mode::WINDOW;
        }
        Mode(m)
    }

    /// The mode bits at another privilege level than `mode` has.
    pub(super) fn mode_of_level(&self, cpu: &CpuState, mode: Mode, cpl: u8) -> Mode {
        let bit = |on, bit| if on { bit } else { 0 };
        let kept = mode.0 & !(Mode::USER | Mode::TSC | Mode::WINDOW);
        let window = cpl == 3 && self.windows.serves(mode);
        Mode(
            kept | bit(window, Mode::WINDOW)
                | bit(cpl == 3, Mode::USER)
                | bit(self.reads_tsc(cpu, cpl), Mode::TSC),
        )
    }

    /// Whether RDTSC may be translated at `cpl`.
    fn reads_tsc(&self, cpu: &CpuState, cpl: u8) -> bool {
        self.options.tsc_base.is_some() && (cpu.cr4 & cr4::TSD == 0 || cpl == 0)
    }

    pub(super) fn view(&self, cpu: &CpuState) -> View {
        if cpu.cpl == 3 {
            View::User
        } else if cpu.cr4 & cr4::SMAP != 0 && cpu.rflags & flags::AC != 0 {
            View::SupervisorAc
        } else {
            View::Supervisor
        }
    }

    /// The code address of CS:RIP.
    pub(super) fn code_address(&mut self, cpu: &CpuState) -> u64 {
        if cpu.code64() {
            return cpu.rip;
        }
        let segment = CodeSegment::of(cpu);
        let number = self.segments.number(segment).unwrap_or_else(|| {
            // No block may outlive the numbers.
            self.reset_cache();
            self.segments = CodeSegments::new();
            self.segments.number(segment).unwrap_or(0)
        });
        u64::from(segment.base.wrapping_add(cpu.rip as u32)) | u64::from(number) << 32
    }

    /// RIP at code address `at`.
    fn rip_of(&self, cpu: &CpuState, at: u64) -> u64 {
        if cpu.code64() { at } else { u64::from((at as u32).wrapping_sub(self.segments.of(at).base)) }
    }

    /// Whether a near branch may lead to code address `at` (SDM 2A, JMP).
    fn reachable(&self, mode: Mode, at: u64) -> bool {
        if mode.code64() {
            return canonical(at);
        }
        let segment = self.segments.of(at);
        (at as u32).wrapping_sub(segment.base) <= segment.limit
    }

    /// The engine must stop at an exact instruction.
    pub(super) fn budgeted(&self) -> bool {
        self.limit != u64::MAX
    }

    fn load_registers(&mut self, cpu: &CpuState, mode: Mode, address: u64) {
        let view = self.view(cpu);
        let (read_base, write_table) = (self.delta.read_base(view), self.delta.write_base(view));
        let window_probes = self.windows.base();
        let write_base = if mode.has(Mode::WINDOW) { window_probes } else { write_table };
        let user_table = self.delta.write_base(View::User);
        self.windows.enter();
        let views = [View::Supervisor, View::SupervisorAc]
            .map(|v| [self.delta.read_base(v), self.delta.write_base(v)]);
        let pending = u32::from(self.interrupt_pending);
        let tsc_base = self.options.tsc_base.as_ref().map_or(0, |base| base.load(Ordering::Relaxed));
        let tsc_offset = cpu.msr.tsc_adjust.wrapping_sub(tsc_base);
        let budget = if self.budgeted() { self.limit.saturating_sub(cpu.instructions) } else { u64::MAX };
        let c = self.context();
        c.views = views;
        (c.window_probes, c.write_table) = (window_probes, user_table);
        c.interrupt_pending = pending;
        for (selector, seg) in c.selectors.iter_mut().zip(&cpu.seg) {
            *selector = seg.selector;
        }
        // RF covers one instruction; translated code takes no instruction breakpoints.
        c.system_flags = cpu.rflags & !(flags::STATUS | flags::IF | flags::AC | flags::RF);
        c.interrupt_flag = u8::from(cpu.rflags & flags::IF != 0);
        c.access_flag = u8::from(cpu.rflags & flags::AC != 0);
        c.budget = budget;
        c.tsc_offset = tsc_offset;
        c.tsc_aux = cpu.msr.tsc_aux as u32;
        c.kernel_gs_base = cpu.msr.kernel_gs_base;
        c.spill.copy_from_slice(&cpu.gpr);
        c.home = HOMES.map(|n| cpu.gpr[n]);
        c.control = [cpu.cr0, 0, cpu.cr2, cpu.cr3, cpu.cr4];
        c.rip = address;
        c.status = cpu.rflags & flags::STATUS;
        if !mode.code64() {
            let protected = cpu.protected();
            for (bounds, seg) in c.bounds.iter_mut().zip(&cpu.seg) {
                *bounds = Bounds::new(seg, protected);
            }
        }
        for (base, seg) in c.seg_base.iter_mut().zip(&cpu.seg) {
            *base = seg.base;
        }
        c.read_base = read_base;
        c.write_base = write_base;
        self.prepare_levels(cpu, mode);
    }

    fn store_registers(&mut self, cpu: &mut CpuState) {
        let rip = self.context().rip;
        cpu.rip = self.rip_of(cpu, rip);
        let c = self.context();
        cpu.gpr.copy_from_slice(&c.spill);
        for (n, home) in HOMES.into_iter().zip(c.home) {
            cpu.gpr[n] = home;
        }
        cpu.rflags = c.system_flags | (c.status & flags::STATUS);
        if c.interrupt_flag != 0 {
            cpu.rflags |= flags::IF;
        }
        if c.access_flag != 0 {
            cpu.rflags |= flags::AC;
        }
        // SWAPGS, WRFSBASE, WRGSBASE, or loads in real mode.
        let changing = if cpu.code64() { 4..6 } else { 0..6 };
        for i in changing {
            cpu.seg[i].base = c.seg_base[i];
            cpu.seg[i].selector = c.selectors[i];
        }
        cpu.msr.kernel_gs_base = c.kernel_gs_base;
        cpu.instructions = cpu.instructions.wrapping_add(std::mem::take(&mut c.instructions));
    }

    /// Runs translated code, chaining and caching on the way, until the interpreter or attention is needed.
    /// On return all registers are in `cpu`.
    pub(super) fn run_translated(&mut self, cpu: &mut CpuState, mut mode: Mode) -> Rest {
        if self.recorder.is_some() && self.record(cpu, mode) {
            return Rest::Interpret;
        }
        let address = self.code_address(cpu);
        self.load_registers(cpu, mode, address);
        let known = self.pages.lookup(mode, address);
        let mut entry = known.unwrap_or_else(|| self.cache.address(self.stubs.indirect));
        if self.options.single_blocks {
            let Some((id, _)) = self.block_at(cpu, address, mode) else {
                self.store_registers(cpu);
                return Rest::Interpret;
            };
            entry = self.cache.address(self.blocks.blocks[id as usize].entry);
        }
        self.core.passed(mode.linear(address));
        loop {
            if !self.may_enter(mode) {
                self.store_registers(cpu);
                return Rest::Interpret;
            }
            let reason = self.enter(cpu, entry);
            self.follow_level(cpu);
            // A miss since the level changed may have followed it before.
            if mode.has(Mode::USER) != (cpu.cpl == 3) {
                mode = self.mode_at(cpu, cpu.cpl);
            }
            if self.options.single_blocks && self.ends_block(reason, mode) {
                self.store_registers(cpu);
                return Rest::Nothing;
            }
            if self.attention.get() != 0 && matches!(reason, Reason::Link | Reason::Indirect) {
                self.store_registers(cpu);
                return Rest::Nothing;
            }
            let address = self.context().rip;
            self.core.left(mode.linear(address));
            let resets = self.stats.cache_flushes;
            match reason {
                Reason::Interpret => {
                    self.store_registers(cpu);
                    let hit = std::mem::take(&mut self.poison_hit);
                    let shown = hit && mode.has(Mode::WINDOW) && self.fill_window(cpu);
                    let filled = shown || hit && self.fill_operand(cpu, mode);
                    return if filled { Rest::Again } else { Rest::Interpret };
                }
                Reason::Attention => {
                    self.stats.attention_exits += 1;
                    self.store_registers(cpu);
                    self.found_running(cpu);
                    return Rest::Nothing;
                }
                Reason::Budget => {
                    self.store_registers(cpu);
                    self.budget_short = true;
                    return Rest::Interpret;
                }
                Reason::Link => {
                    self.stats.link_exits += 1;
                    let number = self.context().link;
                    let ungrouped = self.blocks.links[number as usize].ungrouped;
                    let to_mode = if ungrouped { Mode(mode.0 | Mode::UNGROUPED) } else { mode };
                    let Some((to, slot)) = self.block_at(cpu, address, to_mode) else {
                        self.store_registers(cpu);
                        return Rest::Interpret;
                    };
                    // The link may be gone, or have moved.
                    if resets == self.stats.cache_flushes && self.leads_to(number, address) {
                        self.chain(number, to, slot);
                        if self.is_hot(number, to) {
                            self.store_registers(cpu);
                            self.recorder = Some(Recorder::new(address, mode));
                            return Rest::Nothing;
                        }
                    }
                    entry = self.cache.address(self.blocks.blocks[to as usize].entry);
                }
                Reason::Syscall | Reason::Sysret => {
                    self.store_registers(cpu);
                    let done = match reason {
                        Reason::Syscall => level::syscall(cpu),
                        _ => level::sysret(cpu),
                    };
                    cpu.instructions += u64::from(done);
                    return if done { Rest::Nothing } else { Rest::Interpret };
                }
                Reason::Indirect if !self.reachable(mode, address) => {
                    self.store_registers(cpu);
                    self.undo_branch(cpu, mode);
                    return Rest::Raise(Fault::gp(0));
                }
                Reason::Indirect => {
                    self.stats.indirect_exits += 1;
                    // It was for an interrupt right behind IRET.
                    self.context().system_flags &= !flags::RF;
                    let Some((to, slot)) = self.block_at(cpu, address, mode) else {
                        self.store_registers(cpu);
                        return Rest::Interpret;
                    };
                    let block = &mut self.blocks.blocks[to as usize];
                    block.cached = true;
                    let saved_entry = self.cache.address(block.saved_entry);
                    self.pages.cache(mode, address, saved_entry, slot);
                    entry = self.cache.address(self.blocks.blocks[to as usize].entry);
                }
            }
            if resets != self.stats.cache_flushes {
                self.prepare_levels(cpu, mode);
            }
        }
    }

    /// Whether RSP is where code of `mode` expects it to be (see [`crate::windows`]).
    fn may_enter(&mut self, mode: Mode) -> bool {
        if !(mode.has(Mode::WINDOW) && mode.code64()) {
            return true;
        }
        let rsp = self.context().spill[gpr::RSP];
        let (mask, stack) = self.windows.stack();
        if rsp & mask == stack {
            return true;
        }
        let admitted = self.admit_stack(rsp);
        self.context().levels[1].stack = self.windows.stack().1;
        admitted
    }

    fn leads_to(&self, link: u32, address: u64) -> bool {
        self.blocks.links[link as usize].target == address
    }

    /// Whether a block came to its end, other than by going on in its ungrouped copy.
    fn ends_block(&mut self, reason: Reason, mode: Mode) -> bool {
        let link = self.context().link as usize;
        match reason {
            Reason::Link => !self.blocks.links[link].ungrouped,
            Reason::Indirect => {
                let to = self.context().rip;
                self.reachable(mode, to)
            }
            _ => false,
        }
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
            0 => {
                let number = self.context().link;
                self.context().rip = self.blocks.links[number as usize].target;
                Reason::Link
            }
            1 => Reason::Indirect,
            3 => Reason::Attention,
            4 => Reason::Syscall,
            5 => Reason::Sysret,
            6 => Reason::Budget,
            _ => Reason::Interpret,
        }
    }

    /// A near branch led to a non-canonical address or beyond the segment's limit: #GP at the branch itself, with the
    /// registers as before it. A CALL has written below the stack pointer, perhaps over its own operand, so it
    /// cannot be executed again.
    fn undo_branch(&mut self, cpu: &mut CpuState, mode: Mode) {
        let source = self.context().source;
        let Some(at) = self.cache.offset_of(source) else { return };
        let Some(block) = self.blocks.by_code(at) else { return };
        let Some((address, remaining)) = self.blocks.rip_at(block, at) else { return };
        cpu.instructions = cpu.instructions.wrapping_sub(u64::from(remaining));
        let Some((instr, _)) = self.instruction_at(cpu, mode, address) else { return };
        let moved = i64::from(instr.stack_pointer_increment()) as u64;
        let used = match mode.0 & (Mode::STACK16 | Mode::CODE32 | Mode::CODE16) {
            0 => u64::MAX,
            m if m & Mode::STACK16 != 0 => 0xFFFF,
            _ => 0xFFFF_FFFF,
        };
        let rsp = &mut cpu.gpr[gpr::RSP];
        *rsp = *rsp & !used | rsp.wrapping_sub(moved) & used;
        cpu.rip = self.rip_of(cpu, address);
    }
}

/// The host's page faults, and the bit of their error code that says that it was a write.
const PAGE_FAULT: u8 = 14;
const WRITE: u32 = 2;
/// PAUSEs in a row before the host's processor is given away: some microseconds.
const PAUSES: i32 = 100;

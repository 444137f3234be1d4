//! The stepping core: fetch, decode, execute, deliver (SDM 3A, chapter 6; 3B, chapter 17).
//!
//! Decoded instructions are cached by RIP and checked against the bytes in memory at every use, so code that was
//! modified is never executed stale, whoever modified it.

use crate::bus::CpuBus;
use crate::cpuid::CpuModel;
use crate::debug::{self, debugctl, dr6, dr7};
use crate::engine::{Attention, Exit, VectorUnit};
use crate::exception::{self, Event, Source};
use crate::exec::{Exec, Outcome};
use crate::fault::{Fault, Vector};
use crate::fetch::{Decoded, Fetcher};
use crate::interp;
use crate::mmu::{Flushes, PagingFeatures, Tlb};
use crate::plan::{DebugPlan, DebugStop, WatchHit};
use crate::post_mortem::{Attempt, Chain, PostMortem, Trail, Visit};
use crate::state::{CpuState, LinAddr, SegReg, Shadow, cr0, flags, gpr};
use crate::trace::{TraceContext, TraceEvent, TracedBus, Tracer};
use crate::vme::virtual_interrupt_due;
use iced_x86::{FlowControl, Mnemonic};
use paravane_memory::{GuestMemory, PhysAddr, RamOffset, VpIndex};
use std::sync::Arc;

/// How a step ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Go on at `CpuState::rip`.
    Done,
    /// HLT was executed; `CpuState::halted` is set and RIP is after it.
    Halt,
    /// Shutdown: a fault while delivering a double fault.
    TripleFault,
    /// An instruction no engine implements, at `CpuState::rip`.
    Unsupported,
}

/// What the core keeps between instructions apart from the fetcher.
pub(crate) struct Unit {
    pub model: CpuModel,
    pub vector: Box<dyn VectorUnit>,
    pub attention: Attention,
    pub vp: VpIndex,
    pub tlb: Tlb,
    pub flushes: Flushes,
    /// What the debugger asks for.
    pub plan: Arc<DebugPlan>,
    /// Who traces, and where the processor was at the instruction's start.
    pub tracer: Option<Arc<dyn Tracer>>,
    pub traced_at: TraceContext,
}

impl Unit {
    /// An instruction in progress on this unit.
    pub(crate) fn exec<'a>(
        &'a mut self,
        cpu: &'a mut CpuState,
        mem: &'a GuestMemory,
        bus: &'a dyn CpuBus,
        next_rip: u64,
    ) -> Exec<'a> {
        Exec {
            cpu,
            mem,
            bus,
            vp: self.vp,
            model: &self.model,
            attention: &self.attention,
            tlb: &mut self.tlb,
            vector: &mut *self.vector,
            next_rip,
            flushes: &mut self.flushes,
            outcome: Outcome::Done,
            debug_hits: 0,
            plan: (!self.plan.watch.is_empty()).then_some(&*self.plan),
            watch_hit: None,
            delivering: None,
            failing: "",
            transferred: false,
            branched: false,
            delivered: false,
        }
    }
}

/// Executes single instructions and delivers interrupts, for both engines.
pub struct Core {
    unit: Unit,
    fetcher: Fetcher,
    /// Invalidations the owner has not taken yet.
    record: Flushes,
    /// Breakpoints hit by an instruction that loaded SS.
    held_back: u64,
    /// A watched access nobody was told of yet.
    hit: Option<WatchHit>,
    /// Exceptions that could not be delivered.
    chain: Chain,
    trail: Trail,
    /// The linear address after the last instruction.
    sequel: u64,
    faults: u64,
    interrupts: u64,
    last: Mnemonic,
}

impl Core {
    /// A core of `model` for processor `vp`.
    pub fn new(model: CpuModel, vector: Box<dyn VectorUnit>, attention: Attention, vp: VpIndex) -> Core {
        let fetcher = Fetcher::new(model.decoder_options());
        let (tlb, flushes, plan) = (Tlb::new(model.paging()), Flushes::default(), Arc::default());
        let (tracer, traced_at) = (None, TraceContext::default());
        let unit = Unit { model, vector, attention, vp, tlb, flushes, plan, tracer, traced_at };
        Core {
            unit,
            fetcher,
            record: Flushes::default(),
            held_back: 0,
            hit: None,
            chain: Chain::default(),
            trail: Trail::new(),
            sequel: u64::MAX,
            faults: 0,
            interrupts: 0,
            last: Mnemonic::INVALID,
        }
    }

    /// The instruction executed last, for statistics.
    pub fn last_instruction(&self) -> Mnemonic {
        self.last
    }

    /// The model this core was made with.
    pub fn model(&self) -> &CpuModel {
        &self.unit.model
    }

    /// What paging has, as the model says.
    #[inline]
    pub fn paging(&self) -> PagingFeatures {
        self.unit.tlb.features
    }

    /// The flags that ask for attention.
    pub fn attention(&self) -> &Attention {
        &self.unit.attention
    }

    /// The vector unit, for an engine that shares it.
    pub fn vector(&mut self) -> &mut dyn VectorUnit {
        &mut *self.unit.vector
    }

    /// Tells `tracer` what happens from now on; nobody, if that is `None`.
    pub fn set_tracer(&mut self, tracer: Option<Arc<dyn Tracer>>) {
        self.unit.tlb.tracer.clone_from(&tracer);
        self.unit.tracer = tracer;
    }

    /// Tells of something that is found out outside of the core.
    pub fn trace(&self, cpu: &CpuState, event: TraceEvent<'_>) {
        if let Some(tracer) = &self.unit.tracer {
            tracer.event(&TraceContext::of(cpu), event);
        }
    }

    /// Executes one instruction, or one bounded part of a REP, and delivers what it raises.
    pub fn step(&mut self, cpu: &mut CpuState, mem: &GuestMemory, bus: &dyn CpuBus) -> Step {
        if let Some(tracer) = &self.unit.tracer {
            let tracer = Arc::clone(tracer);
            return self.step_traced(cpu, mem, bus, &*tracer);
        }
        self.step_untraced(cpu, mem, bus)
    }

    /// The same, with everything told that is seen from outside of the instruction.
    #[cold]
    fn step_traced(
        &mut self,
        cpu: &mut CpuState,
        mem: &GuestMemory,
        bus: &dyn CpuBus,
        tracer: &dyn Tracer,
    ) -> Step {
        let at = TraceContext::of(cpu);
        self.unit.traced_at = at;
        let before = [cpu.cr0, cpu.cr3, cpu.cr4];
        let step = self.step_untraced(cpu, mem, &TracedBus { bus, tracer, at });
        for ((number, before), after) in [0, 3, 4].into_iter().zip(before).zip([cpu.cr0, cpu.cr3, cpu.cr4]) {
            if before != after {
                tracer.event(&at, TraceEvent::Control(number, after));
            }
        }
        if self.last == Mnemonic::Wrmsr && cpu.instructions != at.instructions {
            let value = cpu.gpr[gpr::RDX] << 32 | cpu.gpr[gpr::RAX] & 0xFFFF_FFFF;
            tracer.event(&at, TraceEvent::Msr(cpu.gpr[gpr::RCX] as u32, value));
        }
        step
    }

    fn step_untraced(&mut self, cpu: &mut CpuState, mem: &GuestMemory, bus: &dyn CpuBus) -> Step {
        self.unit.tlb.check_layout(cpu, mem);
        let shadow = std::mem::take(&mut cpu.shadow);
        if cpu.dr[7] & 0xFF != 0 && cpu.rflags & flags::RF == 0 && shadow != Shadow::MovSs {
            let hits = debug::fetch_hits(cpu, instruction_address(cpu));
            if hits != 0 {
                cpu.dr[6] |= hits;
                return self.raise(cpu, mem, bus, Fault::new(Vector::DB));
            }
        }
        if virtual_interrupt_due(cpu) {
            return self.raise(cpu, mem, bus, Fault::GP0);
        }
        let at = instruction_address(cpu).0;
        if at != self.sequel {
            self.trail.push(at);
            if let Some(tracer) = &self.unit.tracer {
                tracer.event(&self.unit.traced_at, TraceEvent::Block);
            }
        }
        let decoded = match self.fetcher.fetch(&mut self.unit, cpu, mem, bus) {
            Ok(decoded) => decoded,
            Err(fault) => return self.raise(cpu, mem, bus, fault),
        };
        if let Some(tracer) = &self.unit.tracer {
            tracer.event(&TraceContext::of(cpu), TraceEvent::Instruction(decoded.bytes()));
        }
        self.last = decoded.instr.mnemonic();
        self.sequel = at.wrapping_add(decoded.len as u64);
        let (rsp, trap) = (cpu.gpr[gpr::RSP], cpu.rflags & flags::TF != 0);
        cpu.rflags &= !flags::RF;
        let mut next = cpu.rip.wrapping_add(decoded.len as u64);
        if decoded.bits != 64 {
            next &= 0xFFFF_FFFF;
        }
        let rip = cpu.rip;
        // Under BTF only branches trap (SDM 3B, 17.4.3).
        let branches = trap && cpu.msr.debugctl & debugctl::BTF != 0;
        let flow = decoded.instr.flow_control();
        let mut ex = self.unit.exec(cpu, mem, bus, next);
        let result = interp::execute(&mut ex, &decoded.instr, decoded.bytes());
        if ex.cpu.ignne || (ex.cpu.cr0 & cr0::NE == 0 && matches!(self.last, Mnemonic::Out)) {
            interp::follow_ignne(&mut ex);
        }
        let end = End {
            rsp,
            trap: trap && !ex.delivered && (!branches || branched(flow, ex.branched)),
            next: ex.next_rip,
            outcome: ex.outcome,
            hits: ex.debug_hits,
            transferred: ex.transferred,
            partial: ex.next_rip == rip && decoded.instr.is_string_instruction(),
        };
        let (hit, software) = (ex.watch_hit, ex.delivering.map(|vector| (vector, ex.failing)));
        match result {
            Ok(()) => {
                self.hit = self.hit.or(hit);
                self.retire(cpu, mem, bus, &end)
            }
            Err(fault) => {
                if !end.transferred {
                    cpu.gpr[gpr::RSP] = rsp;
                    cpu.shadow = Shadow::None;
                }
                if fault.vector == Vector::DB {
                    // General detect is a fault: RF is pushed as one, unlike for instruction breakpoints (17.3.1.1).
                    cpu.rflags |= flags::RF;
                }
                self.obey();
                self.chain.restart();
                if let Some((vector, failed)) = software {
                    let fault_of = Fault::new(Vector(vector));
                    self.chain.push(Attempt { fault: fault_of, rip: cpu.rip, failed, second: fault });
                }
                self.escalate(cpu, mem, bus, fault)
            }
        }
    }

    /// Finishes an instruction that did not fault.
    #[inline]
    fn retire(&mut self, cpu: &mut CpuState, mem: &GuestMemory, bus: &dyn CpuBus, end: &End) -> Step {
        if end.outcome == Outcome::Unsupported {
            cpu.gpr[gpr::RSP] = end.rsp;
            return Step::Unsupported;
        }
        cpu.rip = end.next;
        if end.partial {
            cpu.rflags |= flags::RF;
        } else {
            cpu.instructions = cpu.instructions.wrapping_add(1);
        }
        self.obey();
        let mut hits = end.hits | std::mem::take(&mut self.held_back);
        if cpu.shadow == Shadow::MovSs {
            self.held_back = hits;
            hits = 0;
        } else if end.trap {
            hits |= dr6::BS;
        }
        if end.outcome == Outcome::Halt {
            cpu.halted = true;
        }
        if hits != 0 {
            cpu.dr[6] |= hits;
            return self.raise(cpu, mem, bus, Fault::new(Vector::DB));
        }
        if cpu.halted { Step::Halt } else { Step::Done }
    }

    /// Applies invalidations to the own cache and remembers them for the owner.
    #[inline]
    fn obey(&mut self) {
        if !self.unit.flushes.is_empty() {
            if let Some(tracer) = &self.unit.tracer {
                tracer.event(&self.unit.traced_at, TraceEvent::Flush(&self.unit.flushes));
            }
            self.unit.tlb.obey(&self.unit.flushes);
            self.record.merge(&self.unit.flushes);
            self.unit.flushes.clear();
        }
    }

    /// Delivers an exception for the instruction at `cpu.rip`, double and triple faults included.
    pub fn raise(&mut self, cpu: &mut CpuState, mem: &GuestMemory, bus: &dyn CpuBus, fault: Fault) -> Step {
        self.chain.restart();
        self.escalate(cpu, mem, bus, fault)
    }

    fn escalate(&mut self, cpu: &mut CpuState, mem: &GuestMemory, bus: &dyn CpuBus, fault: Fault) -> Step {
        let mut fault = fault;
        loop {
            self.faults += 1;
            self.trace(
                cpu,
                TraceEvent::Exception {
                    vector: fault.vector.0,
                    error: fault.error_code,
                    address: fault.cr2.map(|at| at.0),
                },
            );
            note_address(cpu, &fault);
            if fault.vector == Vector::DB {
                cpu.dr[7] &= !dr7::GD;
                cpu.msr.debugctl &= !debugctl::BTF;
            }
            let event = Event {
                vector: fault.vector.0,
                error: fault.error_code.filter(|_| cpu.protected()),
                source: Source::Hardware,
                rip: cpu.rip,
                resume: !matches!(fault.vector, Vector::DB | Vector::BP | Vector::OF | Vector::DF),
            };
            match self.deliver(cpu, mem, bus, &event) {
                Ok(()) => return Step::Done,
                Err((second, failed)) => {
                    note_address(cpu, &second);
                    self.chain.push(Attempt { fault, rip: event.rip, failed, second });
                    match exception::combine(fault.vector, second) {
                        Some(next) => fault = next,
                        None => return Step::TripleFault,
                    }
                }
            }
        }
    }

    fn deliver(
        &mut self,
        cpu: &mut CpuState,
        mem: &GuestMemory,
        bus: &dyn CpuBus,
        event: &Event,
    ) -> Result<(), (Fault, &'static str)> {
        self.unit.tlb.check_layout(cpu, mem);
        let mut ex = self.unit.exec(cpu, mem, bus, event.rip);
        let result = exception::deliver(&mut ex, event);
        let (hits, hit, failed) = (ex.debug_hits, ex.watch_hit, ex.failing);
        self.held_back |= hits;
        self.hit = self.hit.or(hit);
        cpu.shadow = Shadow::None;
        self.obey();
        result.map_err(|fault| (fault, failed))
    }

    /// Takes an NMI or external interrupt if one is pending and allowed now; wakes a halted processor.
    pub fn poll(&mut self, cpu: &mut CpuState, mem: &GuestMemory, bus: &dyn CpuBus) -> Step {
        let pending = self.unit.attention.get();
        if pending & (Attention::NMI | Attention::INTERRUPT) == 0 {
            return Step::Done;
        }
        if pending & Attention::NMI != 0 && !cpu.nmi_blocked && cpu.shadow == Shadow::None {
            self.unit.attention.take(Attention::NMI);
            cpu.nmi_blocked = true;
            return self.interrupt(cpu, mem, bus, Vector::NMI.0);
        }
        let open = cpu.rflags & flags::IF != 0 && cpu.shadow == Shadow::None;
        if pending & Attention::INTERRUPT != 0 && open {
            self.unit.attention.take(Attention::INTERRUPT);
            if let Some(vector) = bus.acknowledge(self.unit.vp) {
                // There may be more behind it.
                self.unit.attention.set(Attention::INTERRUPT);
                return self.interrupt(cpu, mem, bus, vector);
            }
        }
        Step::Done
    }

    fn interrupt(&mut self, cpu: &mut CpuState, mem: &GuestMemory, bus: &dyn CpuBus, vector: u8) -> Step {
        self.interrupts += 1;
        self.trace(cpu, TraceEvent::Interrupt(vector));
        cpu.halted = false;
        let event = Event { vector, error: None, source: Source::Hardware, rip: cpu.rip, resume: false };
        match self.deliver(cpu, mem, bus, &event) {
            Ok(()) => Step::Done,
            // Interrupts are benign: their delivery's fault is handled on its own.
            Err((second, failed)) => {
                let fault = Fault::new(Vector(vector));
                self.chain.restart();
                self.chain.push(Attempt { fault, rip: event.rip, failed, second });
                self.escalate(cpu, mem, bus, second)
            }
        }
    }

    /// How the processor came to where it is.
    pub fn post_mortem(&self) -> PostMortem {
        self.post_mortem_with(|_, _| Vec::new())
    }

    /// The same; `between` tells by what places translated code came from one linear address to another.
    pub fn post_mortem_with(&self, between: impl FnMut(u64, u64) -> Vec<Visit>) -> PostMortem {
        PostMortem::new(self.chain.list(), &self.trail, between)
    }

    /// Notes that execution goes on at linear `at`, by an engine that runs code itself.
    #[inline]
    pub fn passed(&mut self, at: u64) {
        self.trail.push(at);
    }

    /// Notes that translated code, entered at the place noted before, was left at linear `at`.
    #[inline]
    pub fn left(&mut self, at: u64) {
        self.trail.push_left(at);
    }

    /// One instruction for a debugger: see [`crate::Engine::step`]. A halted processor stays so until something wakes it.
    pub fn single_step(
        &mut self,
        cpu: &mut CpuState,
        mem: &GuestMemory,
        bus: &dyn CpuBus,
        interrupts: bool,
    ) -> Step {
        if interrupts || cpu.halted {
            let before = self.interrupts;
            let step = self.poll(cpu, mem, bus);
            if step != Step::Done || self.interrupts != before {
                return step;
            }
        }
        if cpu.halted {
            return Step::Halt;
        }
        loop {
            let before = (cpu.rip, cpu.instructions, self.faults);
            let step = self.step(cpu, mem, bus);
            let same = step == Step::Done && before == (cpu.rip, cpu.instructions, self.faults);
            if !same || self.hit.is_some() || self.unit.attention.get() & Attention::STOP != 0 {
                return step;
            }
        }
    }

    /// What the debugger is told of a step of its own.
    pub fn step_exit(&mut self, step: Step) -> Exit {
        match (self.take_hit(), step) {
            (_, Step::TripleFault) => Exit::TripleFault,
            (_, Step::Unsupported) => Exit::Unsupported,
            (Some(stop), _) => Exit::Debug(stop),
            (None, Step::Halt) => Exit::Halt,
            (None, Step::Done) => Exit::Budget,
        }
    }

    /// What the debugger asks for.
    pub fn plan(&self) -> &Arc<DebugPlan> {
        &self.unit.plan
    }

    /// Stops where `plan` says, and returns the plan before. The engine around this must drop what it derived from that.
    pub fn set_plan(&mut self, plan: &Arc<DebugPlan>) -> Arc<DebugPlan> {
        self.hit = None;
        std::mem::replace(&mut self.unit.plan, Arc::clone(plan))
    }

    /// The breakpoint at the next instruction.
    pub fn breakpoint(&self, cpu: &CpuState, mem: &GuestMemory) -> Option<DebugStop> {
        if !self.unit.plan.breaks() {
            return None;
        }
        self.unit.plan.stops_at(cpu, mem).map(DebugStop::Breakpoint)
    }

    /// The watched access of the last step, once.
    #[inline]
    pub fn take_hit(&mut self) -> Option<DebugStop> {
        self.hit.take().map(DebugStop::Watch)
    }

    /// Which accesses to a page the debugger watches: see [`DebugPlan::watches_page`].
    pub fn watches_page(&self, lin: LinAddr, phys: PhysAddr) -> (bool, bool) {
        self.unit.plan.watches_page(lin, phys)
    }

    /// Puts what translations the guest asked to forget since the last call into `taken`, whatever it held.
    pub fn take_flushes(&mut self, taken: &mut Flushes) {
        taken.clear();
        std::mem::swap(&mut self.record, taken);
    }

    /// The same, for an owner that caches no translations.
    pub fn ignore_flushes(&mut self) {
        self.record.clear();
    }

    /// Whether [`Self::take_flushes`] would return anything.
    pub fn has_flushes(&self) -> bool {
        !self.record.is_empty()
    }

    /// Forgets every cached address translation.
    pub fn flush_translations(&mut self) {
        self.unit.tlb.flush();
    }

    /// Forgets what it keeps between instructions, but for what the debugger asked for.
    pub fn start_over(&mut self) {
        self.unit.tlb.flush();
        self.unit.flushes.clear();
        self.record.clear();
        (self.held_back, self.hit, self.sequel) = (0, None, u64::MAX);
    }

    /// Code in `page` changed. Cached instructions are compared with memory at every use, so this only frees them.
    pub fn invalidate_code(&mut self, _page: RamOffset) {}

    /// Values of the core's counters by name.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("core.exceptions", self.faults),
            ("core.interrupts", self.interrupts),
            ("core.tlb_misses", self.unit.tlb.misses),
            ("core.decodes", self.fetcher.decodes()),
        ]
    }
}

/// CR2 follows every page fault, even one that becomes a double fault or shutdown (SDM 3A, 6.15, interrupt 14).
fn note_address(cpu: &mut CpuState, fault: &Fault) {
    if let (Vector::PF, Some(at)) = (fault.vector, fault.cr2) {
        cpu.cr2 = at.0;
    }
}

/// Whether an instruction of this kind transferred control, `taken` telling whether a near branch did.
fn branched(flow: FlowControl, taken: bool) -> bool {
    match flow {
        FlowControl::Next => false,
        FlowControl::ConditionalBranch => taken,
        _ => true,
    }
}

/// What is left to do after an instruction.
struct End {
    rsp: u64,
    trap: bool,
    next: u64,
    outcome: Outcome,
    hits: u64,
    transferred: bool,
    partial: bool,
}

/// Linear address of the instruction at CS:RIP.
#[inline]
pub fn instruction_address(cpu: &CpuState) -> LinAddr {
    if cpu.code64() {
        LinAddr(cpu.rip)
    } else {
        LinAddr(cpu.segment(SegReg::Cs).base.wrapping_add(cpu.rip) & 0xFFFF_FFFF)
    }
}

impl Decoded {
    /// The instruction's bytes.
    #[inline]
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.raw[..self.len]
    }
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;

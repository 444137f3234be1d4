//! `--engine interp`: the stepping core run in a loop.

use crate::bus::CpuBus;
use crate::core::{Core, Step};
use crate::cpuid::CpuModel;
use crate::engine::{Attention, Budget, Engine, Exit, HostCode, VectorUnit};
use crate::plan::DebugPlan;
use crate::post_mortem::PostMortem;
use crate::state::{CpuState, flags};
use crate::trace::Tracer;
use paravane_memory::{GuestMemory, RamOffset, VpIndex};
use std::sync::Arc;

/// Executes guest code one instruction at a time.
pub struct Interpreter {
    core: Core,
    /// An interrupt request set aside while IF is clear, so that polls stay quiet.
    aside: bool,
}

impl Interpreter {
    /// An interpreter of `model` for processor `vp`.
    pub fn new(
        model: CpuModel,
        vector: Box<dyn VectorUnit>,
        attention: Attention,
        vp: VpIndex,
    ) -> Interpreter {
        Interpreter { core: Core::new(model, vector, attention, vp), aside: false }
    }

    /// The core inside.
    pub fn core(&mut self) -> &mut Core {
        &mut self.core
    }

    /// Handles what asked for attention; `Some` leaves the loop.
    #[cold]
    fn attend(&mut self, cpu: &mut CpuState, mem: &GuestMemory, bus: &dyn CpuBus) -> Option<Exit> {
        let now = self.core.attention().get();
        if now & (Attention::STOP | Attention::INIT | Attention::STARTUP) != 0 {
            return Some(Exit::Stop);
        }
        if now & Attention::LAYOUT != 0 {
            self.core.attention().take(Attention::LAYOUT);
            self.core.flush_translations();
        }
        if now & Attention::CODE_WRITTEN != 0 {
            self.core.attention().take(Attention::CODE_WRITTEN);
            // Decoded instructions are checked at every use: nothing to drop.
        }
        if now & Attention::INTERRUPT != 0 && cpu.rflags & flags::IF == 0 {
            self.core.attention().take(Attention::INTERRUPT);
            self.aside = true;
        }
        match self.core.poll(cpu, mem, bus) {
            Step::TripleFault => Some(Exit::TripleFault),
            _ => None,
        }
    }
}

impl Engine for Interpreter {
    fn run(&mut self, cpu: &mut CpuState, mem: &GuestMemory, bus: &dyn CpuBus, budget: Budget) -> Exit {
        let start = cpu.instructions;
        loop {
            if self.aside && cpu.rflags & flags::IF != 0 {
                self.aside = false;
                self.core.attention().set(Attention::INTERRUPT);
            }
            if self.core.attention().get() != 0
                && let Some(exit) = self.attend(cpu, mem, bus)
            {
                return exit;
            }
            if cpu.halted {
                return Exit::Halt;
            }
            if cpu.instructions.wrapping_sub(start) >= budget.instructions {
                return Exit::Budget;
            }
            if let Some(stop) = self.core.breakpoint(cpu, mem) {
                return Exit::Debug(stop);
            }
            match self.core.step(cpu, mem, bus) {
                Step::Done | Step::Halt => {}
                Step::TripleFault => return Exit::TripleFault,
                Step::Unsupported => return Exit::Unsupported,
            }
            self.core.ignore_flushes();
            if let Some(stop) = self.core.take_hit() {
                return Exit::Debug(stop);
            }
        }
    }

    fn step(&mut self, cpu: &mut CpuState, mem: &GuestMemory, bus: &dyn CpuBus, interrupts: bool) -> Exit {
        if std::mem::take(&mut self.aside) {
            self.core.attention().set(Attention::INTERRUPT);
        }
        let step = self.core.single_step(cpu, mem, bus, interrupts);
        self.core.ignore_flushes();
        self.core.step_exit(step)
    }

    fn set_debug(&mut self, plan: &Arc<DebugPlan>) {
        self.core.set_plan(plan);
    }

    fn invalidate(&mut self, page: RamOffset) {
        self.core.invalidate_code(page);
    }

    fn flush_translations(&mut self) {
        self.core.flush_translations();
    }

    fn reset(&mut self) {
        self.aside = false;
        self.core.attention().take(Attention::NMI | Attention::INTERRUPT);
        self.core.flush_translations();
    }

    fn post_mortem(&self) -> PostMortem {
        self.core.post_mortem()
    }

    fn host_code(&self, _lin: u64) -> Vec<HostCode> {
        Vec::new()
    }

    fn set_tracer(&mut self, tracer: Option<Arc<dyn Tracer>>) {
        self.core.set_tracer(tracer);
    }

    fn nmi_waits(&self) -> bool {
        self.core.attention().get() & Attention::NMI != 0
    }

    fn start_over(&mut self, _cpu: &CpuState) {
        if std::mem::take(&mut self.aside) {
            self.core.attention().set(Attention::INTERRUPT);
        }
        self.core.start_over();
    }

    fn counters(&self) -> Vec<(String, u64)> {
        self.core.counters().into_iter().map(|(name, n)| (name.to_owned(), n)).collect()
    }
}

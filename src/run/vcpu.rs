//! One vCPU: runs the engine, sleeps while halted, and tells the machine how it ends.

use super::dossier;
use super::lifecycle::{Lifecycle, Request};
use super::park::Vcpu;
use crate::debug::{self, Armed, Link, Stop, Symbols};
use crate::machine::{InstructionClock, LockstepDisk, Machine, MachineBus, MachineError};
use paravane_cpu::{Attention, Budget, CpuState, DebugPlan, Engine, Exit, flags};
use paravane_devices::{Clock, TimerQueue};
use paravane_memory::{GuestMemory, VpIndex};
use std::sync::Arc;

/// Instructions in one slice under the instruction clock: how far machine time may lag behind inside guest code.
const SLICE: u64 = 10_000;

/// Who moves machine time.
#[derive(Clone)]
pub enum TimeKeeper {
    /// The host; the event loop fires timers.
    Host,
    /// This vCPU.
    Instructions(Lockstep),
}

/// What a vCPU does between two slices under the instruction clock, so that every run is the same.
#[derive(Clone)]
pub struct Lockstep {
    /// The clock it moves.
    pub clock: Arc<InstructionClock>,
    /// The timers it fires.
    pub timers: Arc<TimerQueue>,
    /// The disks whose requests it completes.
    pub disks: Vec<Arc<LockstepDisk>>,
}

impl Lockstep {
    /// How many instructions the next slice may have.
    fn budget(&self) -> Budget {
        let left = self.timers.next_deadline().map_or(SLICE, |at| at.since(self.clock.now()));
        Budget { instructions: left.clamp(1, SLICE) }
    }

    /// `instructions` have retired: what became due happens.
    fn passed(&self, instructions: u64) {
        self.clock.retire(instructions);
        self.disks.iter().for_each(|disk| disk.settle());
        self.timers.run_expired(self.clock.now());
    }

    /// Jumps to the next deadline; false if there is none.
    fn skip(&self) -> bool {
        let Some(next) = self.timers.next_deadline() else { return false };
        self.clock.skip_to(next);
        self.timers.run_expired(self.clock.now());
        true
    }
}

/// Looks at a vCPU between two instructions.
pub type Probe = Box<dyn FnMut(&CpuState, &dyn Engine) + Send>;

/// A virtual processor and everything it needs to run.
pub struct VcpuRunner {
    /// Architectural state.
    pub cpu: CpuState,
    /// What executes.
    pub engine: Box<dyn Engine>,
    /// RAM.
    pub mem: GuestMemory,
    /// The machine.
    pub bus: Arc<MachineBus>,
    /// The mailbox.
    pub vcpu: Arc<Vcpu>,
    /// Where the end is told.
    pub lifecycle: Lifecycle,
    /// Who moves time.
    pub time: TimeKeeper,
    /// Called when the vCPU was stopped though nobody asked for the end.
    pub probe: Option<Probe>,
    /// Who may debug it.
    pub debug: Option<Arc<Link>>,
    /// What the debugger armed.
    pub armed: Arc<Armed>,
    /// A triple fault resets the machine.
    pub reset_at_shutdown: bool,
    /// Names for addresses, for people.
    pub symbols: Arc<Symbols>,
    /// What of it the engine has.
    pub plan: Arc<DebugPlan>,
}

impl VcpuRunner {
    /// The processor of `machine`, which is started.
    pub fn new(machine: &Machine) -> Result<VcpuRunner, MachineError> {
        Ok(VcpuRunner {
            cpu: machine.start()?,
            engine: machine.engine()?,
            mem: machine.memory().clone(),
            bus: machine.bus(),
            vcpu: machine.vcpu(),
            lifecycle: machine.lifecycle().clone(),
            time: machine.time_keeper(),
            probe: None,
            debug: None,
            armed: Arc::default(),
            reset_at_shutdown: false,
            symbols: Arc::default(),
            plan: Arc::default(),
        })
    }

    /// Runs until a lifecycle request is there.
    pub fn run(&mut self) {
        if self.debug.as_ref().is_some_and(|link| link.wants_stop()) {
            self.vcpu.stop();
        }
        self.engine.set_debug(&self.plan);
        while !self.slice(u64::MAX) {}
    }

    /// Runs up to the next timer's deadline under the instruction clock, but `limit` instructions at most, or until
    /// something needs the machine; true if the run ends.
    pub fn slice(&mut self, limit: u64) -> bool {
        let budget = Budget { instructions: self.budget().instructions.min(limit) };
        let before = self.cpu.instructions;
        let exit = self.engine.run(&mut self.cpu, &self.mem, &*self.bus, budget);
        self.time_passed(self.cpu.instructions.wrapping_sub(before));
        match exit {
            Exit::Halt => self.halted(),
            Exit::Budget => {}
            Exit::Stop => return self.stopped(),
            Exit::Debug(stop) => return self.debug_event(stop),
            Exit::TripleFault => {
                self.shut_down();
                return true;
            }
            Exit::Unsupported => {
                self.lifecycle.request(Request::Host(self.unsupported()));
                return true;
            }
        }
        false
    }

    fn budget(&self) -> Budget {
        match &self.time {
            TimeKeeper::Host => Budget::UNLIMITED,
            TimeKeeper::Instructions(lockstep) => lockstep.budget(),
        }
    }

    pub(super) fn time_passed(&self, instructions: u64) {
        if let TimeKeeper::Instructions(lockstep) = &self.time {
            lockstep.passed(instructions);
        }
    }

    /// Waits for attention; under the instruction clock time jumps to the next deadline instead.
    pub(super) fn halted(&self) {
        let wanted = self.awaited();
        if let TimeKeeper::Instructions(lockstep) = &self.time
            && (self.vcpu.attention().get() & wanted != 0 || lockstep.skip())
        {
            return;
        }
        self.vcpu.park(wanted, None);
    }

    /// What can wake the processor from HLT.
    fn awaited(&self) -> u32 {
        let mut awaited = Attention::STOP | Attention::INIT | Attention::STARTUP;
        if !self.cpu.nmi_blocked {
            awaited |= Attention::NMI;
        }
        if self.cpu.rflags & flags::IF != 0 {
            awaited |= Attention::INTERRUPT;
        }
        awaited
    }

    /// Handles STOP and INIT; true if the run ends.
    fn stopped(&mut self) -> bool {
        let asked = self.vcpu.attention().take(Attention::STOP | Attention::INIT | Attention::STARTUP);
        if asked & Attention::INIT != 0 {
            self.lifecycle.request(Request::Reset("INIT"));
        }
        self.follow_a20();
        if self.lifecycle.requested() {
            return true;
        }
        if self.debug.as_ref().is_some_and(|link| link.wants_stop()) && self.debugged(Stop::Paused) {
            return true;
        }
        if let Some(probe) = &mut self.probe {
            probe(&self.cpu, &*self.engine);
        }
        false
    }

    pub(super) fn follow_a20(&mut self) {
        if let Some(on) = self.vcpu.take_a20() {
            self.cpu.a20 = on;
            self.engine.flush_translations();
        }
    }

    /// Shutdown: with a debugger at hand everything stays as it is until it was looked at.
    fn shut_down(&mut self) {
        let dossier = self.dossier();
        if self.debug.is_some() {
            let told = "the guest's processor shut down and is kept for the debugger";
            eprintln!("paravane: triple fault: {told}\n{}", dossier.trim_end());
            self.debugged(Stop::TripleFault(dossier.into()));
        } else {
            self.end_shut_down(dossier);
        }
    }

    /// As hardware: the chipset answers a shutdown with a reset; or the run is over.
    pub(super) fn end_shut_down(&self, dossier: String) {
        if self.reset_at_shutdown {
            eprintln!(
                "paravane: triple fault: the guest's processor shut down and is reset\n{}",
                dossier.trim_end()
            );
            self.lifecycle.request(Request::Reset("triple fault"));
        } else {
            self.lifecycle.request(Request::TripleFault(dossier));
        }
    }

    /// What is known about how the processor came to where it is.
    pub fn dossier(&self) -> String {
        let history = self.engine.post_mortem();
        debug::dossier(&self.cpu, &self.mem, &history, &self.bus.last_accesses(), &self.symbols)
    }

    pub(super) fn unsupported(&self) -> String {
        format!(
            "the guest ran an instruction that paravane does not know, at cs:rip {:#x}:{:#x} in {}",
            self.cpu.seg[1].selector,
            self.cpu.rip,
            dossier::mode(&self.cpu)
        )
    }
}

/// Ends the run if the thread that holds this panics.
pub struct PanicGuard(pub Lifecycle);

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.request(Request::Host("a thread of paravane panicked: please report this".into()));
        }
    }
}

/// The first (and so far only) processor.
pub const BOOT_VP: VpIndex = VpIndex(0);

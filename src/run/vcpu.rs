//! One vCPU: runs the engine, sleeps while halted, and tells the machine how it ends.

use super::dossier;
use super::lifecycle::{Lifecycle, Request};
use super::park::Vcpu;
use crate::debug::{self, Armed, Link, Stop, Symbols};
use crate::machine::{InstructionClock, LockstepDisk, Machine, MachineBus, MachineError};
use crate::replay::{Outside, Stamp, Timeline, Wishes};
use crate::trace::Trace;
use paravane_cpu::{Attention, Budget, CpuState, DebugPlan, Engine, Exit, Tracer, flags};
use paravane_devices::{Clock, TimerQueue};
use paravane_memory::{GuestMemory, VpIndex};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Instructions in one slice under the instruction clock: how far machine time may lag behind inside guest code.
const SLICE: u64 = 10_000;

/// Who moves machine time.
#[derive(Clone)]
pub enum TimeKeeper {
    /// The host, whose event loop fires timers; or whoever gives the vCPU its turns.
    Elsewhere,
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
    /// Where input comes in.
    pub outside: Arc<Outside>,
    /// The slice that is under way.
    pub slice: Arc<Slice>,
}

/// A slice: where it ends is decided when it begins, whoever interrupts it meanwhile.
#[derive(Default, Debug)]
pub struct Slice {
    /// Instructions it has; 0 between two slices.
    length: AtomicU64,
    /// Those of them that have retired.
    done: AtomicU64,
    /// All instructions that retired in this run.
    retired: AtomicU64,
}

impl Lockstep {
    /// How many instructions the next slice may have.
    pub(super) fn budget(&self) -> Budget {
        let Slice { length, done, .. } = &*self.slice;
        if length.load(Ordering::Relaxed) == 0 {
            let left = self.timers.next_deadline().map_or(SLICE, |at| at.since(self.clock.now()));
            length.store(left.clamp(1, SLICE), Ordering::Relaxed);
            done.store(0, Ordering::Relaxed);
        }
        Budget { instructions: length.load(Ordering::Relaxed) - done.load(Ordering::Relaxed) }
    }

    /// `instructions` have retired, and the processor `halted` if it did: at the end of the slice what became due happens. Whether
    /// it was the end.
    pub(super) fn passed(&self, instructions: u64, halted: bool) -> bool {
        let Slice { length, done, retired } = &*self.slice;
        let so_far = done.fetch_add(instructions, Ordering::Relaxed) + instructions;
        let retired = retired.fetch_add(instructions, Ordering::Relaxed) + instructions;
        if !halted && so_far < length.load(Ordering::Relaxed) {
            return false;
        }
        length.store(0, Ordering::Relaxed);
        done.store(0, Ordering::Relaxed);
        self.clock.retire(so_far);
        self.disks.iter().for_each(|disk| disk.settle());
        self.timers.run_expired(self.clock.now());
        self.outside.deliver(Stamp { ns: self.clock.now().0, instructions: retired });
        true
    }

    /// The run goes on elsewhere: between two slices, after `instructions`.
    pub fn jumped(&self, instructions: u64) {
        let Slice { length, done, retired } = &*self.slice;
        length.store(0, Ordering::Relaxed);
        done.store(0, Ordering::Relaxed);
        retired.store(instructions, Ordering::Relaxed);
    }

    /// Jumps to the next deadline; false if there is none.
    pub(super) fn skip(&self) -> bool {
        let Some(next) = self.timers.next_deadline() else { return false };
        self.clock.skip_to(next);
        self.timers.run_expired(self.clock.now());
        true
    }
}

/// Looks at a vCPU between two instructions.
pub type Probe = Box<dyn FnMut(&CpuState, &dyn Engine) + Send>;

/// How a turn in guest code came to its end.
pub(super) enum Turn {
    /// There is more to do.
    On,
    /// Nothing is to be done before somebody calls.
    Idle,
    /// The run is over.
    Ended,
}

/// A virtual processor and everything it needs to run.
pub struct VcpuRunner {
    /// Its number.
    pub vp: VpIndex,
    /// Architectural state.
    pub cpu: CpuState,
    /// INIT was received and no start-up IPI since (SDM 3A, 9.4.3).
    pub waiting: bool,
    /// What EDX holds after INIT.
    signature: u32,
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
    /// What happens between slices by the instruction clock.
    pub timeline: Option<Box<Timeline>>,
    /// Who traces.
    tracer: Option<Arc<Trace>>,
}

impl VcpuRunner {
    /// The boot processor of `machine`, which is started.
    pub fn new(machine: &Machine) -> Result<VcpuRunner, MachineError> {
        VcpuRunner::number(machine, BOOT_VP, &machine.start()?)
    }

    /// All processors of `machine`, which is started.
    pub fn all(machine: &Machine) -> Result<Vec<VcpuRunner>, MachineError> {
        let boot = machine.start()?;
        let numbers = 0..machine.vcpus().len() as u32;
        numbers.map(|n| VcpuRunner::number(machine, VpIndex(n), &boot)).collect()
    }

    fn number(machine: &Machine, vp: VpIndex, boot: &CpuState) -> Result<VcpuRunner, MachineError> {
        let (cpu, waiting) = at_power_on(vp, boot);
        Ok(VcpuRunner {
            vp,
            cpu,
            waiting,
            signature: machine.model().signature(),
            engine: machine.engine(vp)?,
            mem: machine.memory().clone(),
            bus: machine.bus(),
            vcpu: Arc::clone(&machine.vcpus()[vp.0 as usize]),
            lifecycle: machine.lifecycle().clone(),
            time: machine.time_keeper(),
            probe: None,
            debug: None,
            armed: Arc::default(),
            reset_at_shutdown: false,
            symbols: Arc::default(),
            plan: Arc::default(),
            timeline: machine.timeline(Wishes::default()).map(Box::new),
            tracer: None,
        })
    }

    /// Starts again after a reset of the machine, whose boot processor is at `boot`.
    pub fn power_on(&mut self, machine: &Machine, boot: &CpuState) -> Result<(), MachineError> {
        let retired = self.cpu.instructions;
        (self.cpu, self.waiting) = at_power_on(self.vp, boot);
        self.cpu.instructions = retired;
        self.engine = machine.engine(self.vp)?;
        self.trace(self.tracer.clone());
        self.changed();
        Ok(())
    }

    /// `trace` hears of what happens from now on.
    pub fn trace(&mut self, trace: Option<Arc<Trace>>) {
        self.engine.set_tracer(trace.clone().map(|t| t as Arc<dyn Tracer>));
        self.tracer = trace;
    }

    /// Runs until a lifecycle request is there.
    pub fn run(&mut self) {
        self.begin();
        while !self.slice(u64::MAX) {}
    }

    /// Before the first turn.
    pub(super) fn begin(&mut self) {
        if self.debugger_wants_stop() {
            self.vcpu.stop();
        }
        self.engine.set_debug(&self.plan);
        if let Some(timeline) = &mut self.timeline {
            timeline.between(&self.cpu, &mut *self.engine, &self.lifecycle);
        }
    }

    /// Runs up to the next timer's deadline under the instruction clock, but `limit` instructions at most, or until
    /// something needs the machine; sleeps if there is nothing to do. True if the run ends.
    pub fn slice(&mut self, limit: u64) -> bool {
        let budget = Budget { instructions: self.budget().instructions.min(limit) };
        match self.turn(budget) {
            Turn::On => false,
            Turn::Idle => {
                self.sleep();
                false
            }
            Turn::Ended => true,
        }
    }

    /// Runs for `budget`, or until something needs the machine.
    pub(super) fn turn(&mut self, budget: Budget) -> Turn {
        if self.waiting {
            return if self.called() { self.stopped() } else { Turn::Idle };
        }
        let before = self.cpu.instructions;
        let exit = self.engine.run(&mut self.cpu, &self.mem, &*self.bus, budget);
        self.time_passed(self.cpu.instructions.wrapping_sub(before), exit == Exit::Halt);
        match exit {
            Exit::Halt => Turn::Idle,
            Exit::Budget => Turn::On,
            Exit::Stop => self.stopped(),
            Exit::Debug(stop) if self.debug_event(stop) => Turn::Ended,
            Exit::Debug(_) => Turn::On,
            Exit::TripleFault => {
                self.shut_down();
                Turn::Ended
            }
            Exit::Unsupported => {
                self.lifecycle.request(Request::Host(self.unsupported()));
                Turn::Ended
            }
        }
    }

    pub(super) fn budget(&self) -> Budget {
        match &self.time {
            TimeKeeper::Elsewhere => Budget::UNLIMITED,
            TimeKeeper::Instructions(lockstep) => lockstep.budget(),
        }
    }

    pub(super) fn time_passed(&mut self, instructions: u64, halted: bool) {
        if let TimeKeeper::Instructions(lockstep) = &self.time
            && lockstep.passed(instructions, halted)
            && let Some(timeline) = &mut self.timeline
        {
            timeline.between(&self.cpu, &mut *self.engine, &self.lifecycle);
        }
    }

    /// Waits for attention; under the instruction clock time jumps to the next deadline instead.
    pub(super) fn sleep(&self) {
        if let TimeKeeper::Instructions(lockstep) = &self.time
            && (self.called() || lockstep.skip())
        {
            return;
        }
        self.vcpu.park(self.awaited(), None);
    }

    /// Whether there is something that ends a halt.
    pub(super) fn called(&self) -> bool {
        self.vcpu.attention().cell().load(Ordering::SeqCst) & self.awaited() != 0
    }

    /// What can wake the processor from HLT, or while it waits for a start-up IPI.
    fn awaited(&self) -> u32 {
        let mut awaited = Attention::STOP | Attention::INIT | Attention::STARTUP;
        if self.waiting {
            return awaited;
        }
        if !self.cpu.nmi_blocked {
            awaited |= Attention::NMI;
        }
        if self.cpu.rflags & flags::IF != 0 {
            awaited |= Attention::INTERRUPT;
        }
        awaited
    }

    pub(super) fn debugger_wants_stop(&self) -> bool {
        self.debug.as_ref().is_some_and(|link| link.wants_stop(self.vp))
    }

    /// Does what STOP, INIT and STARTUP are about as far as the processor is concerned.
    pub(super) fn take_calls(&mut self) {
        let asked = self.vcpu.attention().take(Attention::STOP | Attention::INIT | Attention::STARTUP);
        if asked & Attention::INIT != 0 {
            self.init();
        }
        if asked & Attention::STARTUP != 0 && self.waiting {
            self.cpu.start_up(self.vcpu.startup_vector());
            self.waiting = false;
        }
        self.follow_a20();
    }

    /// Somebody called.
    fn stopped(&mut self) -> Turn {
        self.take_calls();
        if self.lifecycle.requested() {
            return if self.ending() { Turn::Ended } else { Turn::On };
        }
        if self.debugger_wants_stop() && self.debugged(Stop::Paused) {
            return Turn::Ended;
        }
        if let Some(probe) = &mut self.probe {
            probe(&self.cpu, &*self.engine);
        }
        Turn::On
    }

    /// INIT: the boot processor would go to the reset vector, where firmware starts the machine again.
    fn init(&mut self) {
        if self.vp == BOOT_VP {
            self.lifecycle.request(Request::Reset("INIT"));
        } else {
            self.cpu.init(self.signature);
            self.engine.reset();
            self.waiting = true;
        }
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

/// A processor after the machine's power-on and firmware, and whether it waits for a start-up IPI.
fn at_power_on(vp: VpIndex, boot: &CpuState) -> (CpuState, bool) {
    match vp {
        BOOT_VP => (boot.clone(), false),
        _ => (CpuState::reset(vp.0), true),
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

/// The processor that firmware starts the operating system on.
pub const BOOT_VP: VpIndex = VpIndex(0);

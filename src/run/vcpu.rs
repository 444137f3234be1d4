//! One vCPU: runs the engine, sleeps while halted, and tells the machine how it ends.

use super::dossier;
use super::lifecycle::{Lifecycle, Request};
use super::park::Vcpu;
use crate::debug::{self, Armed, Link, Stop, Symbols};
use crate::machine::{Dma, Machine, MachineBus, MachineError};
use crate::trace::Trace;
use paravane_cpu::{Attention, Budget, CpuState, DebugPlan, DebugStop, Engine, Exit, Tracer, flags};
use paravane_memory::{GuestMemory, VpIndex};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Looks at a vCPU between two instructions.
pub type Probe = Box<dyn FnMut(&CpuState, &dyn Engine) + Send>;

/// How a vCPU's past can be looked at.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Past {
    /// What ran can be gone back in.
    pub goes_back: bool,
    /// What happens must not be changed: the run is recorded, or is a recorded one.
    pub fixed: bool,
    /// The debugger changed something: what was before leads elsewhere.
    pub changed: bool,
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
    /// Its past.
    pub past: Past,
    /// Who keeps devices' accesses to memory while any is watched.
    pub dma: Arc<Dma>,
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
            probe: None,
            debug: None,
            armed: Arc::default(),
            reset_at_shutdown: false,
            symbols: Arc::default(),
            plan: Arc::default(),
            past: Past::default(),
            dma: Arc::clone(machine.dma()),
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
        self.past.changed = false;
        Ok(())
    }

    /// `trace` hears of what happens from now on.
    pub fn trace(&mut self, trace: Option<Arc<Trace>>) {
        self.engine.set_tracer(trace.clone().map(|t| t as Arc<dyn Tracer>));
        self.tracer = trace;
    }

    /// Runs by the host's clock until a lifecycle request is there.
    pub fn run(&mut self) {
        self.begin();
        while !self.turn() {}
    }

    /// Before the first turn.
    pub(super) fn begin(&mut self) {
        if self.debugger_wants_stop() {
            self.vcpu.stop();
        }
        self.set_debug(&Arc::clone(&self.plan));
    }

    /// The processor and the devices stop where `plan` says.
    pub(super) fn set_debug(&mut self, plan: &Arc<DebugPlan>) {
        self.engine.set_debug(plan);
        self.dma.watch(self.vp, plan);
    }

    /// A watched access that a device made since the last look.
    pub(super) fn device_hit(&self) -> Option<DebugStop> {
        // A processor that was not started has no address space.
        let cpu = (!self.waiting).then_some(&self.cpu);
        self.dma.hit(self.vp, cpu, &self.mem).map(DebugStop::Watch)
    }

    /// Runs until something needs the machine; sleeps if there is nothing to do. True if the run ends.
    fn turn(&mut self) -> bool {
        if let Some(stop) = self.device_hit() {
            return self.debug_event(stop);
        }
        if self.waiting {
            self.sleep();
            return self.stopped();
        }
        match self.engine.run(&mut self.cpu, &self.mem, &*self.bus, Budget::UNLIMITED) {
            Exit::Halt => {
                self.sleep();
                false
            }
            Exit::Budget => false,
            Exit::Stop => self.stopped(),
            Exit::Debug(stop) => self.debug_event(stop),
            Exit::TripleFault => {
                self.shut_down();
                true
            }
            Exit::Unsupported => {
                self.lifecycle.request(Request::Host(self.unsupported()));
                true
            }
        }
    }

    /// Waits for attention.
    pub(super) fn sleep(&self) {
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
    fn stopped(&mut self) -> bool {
        self.take_calls();
        if self.lifecycle.requested() || self.debugger_wants_stop() && self.debugged(Stop::Paused) {
            return true;
        }
        self.look();
        false
    }

    /// Whoever looks at it does.
    pub(super) fn look(&mut self) {
        if let Some(probe) = &mut self.probe {
            probe(&self.cpu, &*self.engine);
        }
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
            tell_kept(&dossier);
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

/// Says that a processor shut down and can be looked at.
pub(super) fn tell_kept(dossier: &str) {
    let told = "the guest's processor shut down and is kept for the debugger";
    eprintln!("paravane: triple fault: {told}\n{}", dossier.trim_end());
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

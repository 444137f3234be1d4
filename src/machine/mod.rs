//! From configuration to a machine: memory map, devices, processors. The only place that knows interrupt numbers, ports and
//! PCI slots.

mod access_log;
mod board;
mod boot;
mod clock;
mod config;
mod cpubus;
mod dma;
mod engine;
mod entropy;
mod error;
mod inspect;
mod lab_port;
mod lockstep;
mod post;
mod serial;
mod storage;
mod tsc;

pub use access_log::DeviceAccess;
pub use clock::{HostClock, InstructionClock};
pub use config::{
    Boot, ClockKind, DiskBus, DiskConfig, EngineKind, MAX_CPUS, MachineConfig, SerialConfig, WindowUse,
};
pub use cpubus::MachineBus;
pub use dma::Dma;
pub use engine::probe_translator;
pub use error::MachineError;
pub use inspect::{Fields, Inspector, PciFunction};
pub use lab_port::LabPort;
pub use lockstep::{DiskUndo, LockstepDisk};
pub use serial::{SerialEnd, SerialInput};

use crate::replay::{Outside, Parts, Timeline, Wishes};
use crate::run::{BOOT_VP, Lifecycle, Lockstep, Vcpu};
use crate::trace::Switch;
use board::{Board, Wiring};
use boot::Payload;
use paravane_cpu::{CpuModel, CpuState, Engine};
use paravane_devices::{ByteSink, Clock, Counters, TimerQueue, TscClock};
use paravane_jit::JitOptions;
use paravane_memory::{GuestMemory, MemoryConfig, VpIndex};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use xxhash_rust::xxh3::xxh3_64;

/// The least RAM in which anything of ours starts.
const MIN_MEMORY: u64 = 2 << 20;
/// The most RAM: what the tables beside it are sized for.
const MAX_MEMORY: u64 = 256 << 30;

/// What the machine is connected to outside of itself.
pub struct HostEnds {
    /// COM1, COM2, …; `None`: nothing is plugged in.
    pub serial: Vec<Option<SerialEnd>>,
    /// Who hears the lab guest's marks.
    pub lab_port: Option<LabPort>,
    /// Guest instructions must be counted exactly.
    pub count_instructions: bool,
    /// The translator returns from every block (see [`JitOptions`]).
    pub single_blocks: bool,
    /// Where port 0xE9 goes.
    pub debug_console: ByteSink,
}

/// Machine time by its source.
#[derive(Clone)]
pub enum Time {
    /// The host's.
    Host(Arc<HostClock>),
    /// Retired instructions.
    Instructions(Arc<InstructionClock>),
}

impl Time {
    fn new(kind: ClockKind) -> Time {
        match kind {
            ClockKind::Host => Time::Host(Arc::new(HostClock::start())),
            ClockKind::Instructions => Time::Instructions(Arc::default()),
        }
    }

    fn clock(&self) -> Arc<dyn Clock> {
        match self {
            Time::Host(clock) => Arc::clone(clock) as Arc<dyn Clock>,
            Time::Instructions(clock) => Arc::clone(clock) as Arc<dyn Clock>,
        }
    }

    /// See [`HostClock::tsc_base`].
    fn tsc_base(&self) -> Option<Arc<AtomicU64>> {
        match self {
            Time::Host(clock) => clock.tsc_base(),
            Time::Instructions(_) => None,
        }
    }

    fn tsc(&self) -> TscClock {
        match self {
            Time::Host(clock) => TscClock::new(clock.tsc_hz()),
            Time::Instructions(_) => TscClock::new(tsc::INSTRUCTION_HZ),
        }
    }
}

/// A machine, ready to be started.
pub struct Machine {
    config: MachineConfig,
    payload: Payload,
    model: CpuModel,
    mem: GuestMemory,
    time: Time,
    timers: Arc<TimerQueue>,
    counters: Counters,
    lifecycle: Lifecycle,
    vcpus: Vec<Arc<Vcpu>>,
    board: Board,
    /// Input by the instruction clock.
    outside: Arc<Outside>,
    /// Who traces the devices.
    trace: Arc<Switch>,
    /// Who listens to their accesses to memory.
    dma: Arc<Dma>,
    /// Instructions are counted exactly.
    counting: bool,
    /// The translator returns from every block.
    single_blocks: bool,
    /// What else the user chose about the translator.
    tuning: JitOptions,
}

impl Machine {
    /// Builds the machine of `config`. Everything that can be refused is, before any image is opened.
    pub fn new(
        config: &MachineConfig,
        lifecycle: Lifecycle,
        ends: HostEnds,
    ) -> Result<Machine, MachineError> {
        check_memory(config.memory)?;
        let time = Time::new(config.clock);
        let tsc = time.tsc();
        let model = engine::model(&config.model)?.with_tsc(tsc.hz(), board::APIC_HZ).with_cpus(config.cpus);
        let payload = Payload::read(&config.boot)?;
        let mem = GuestMemory::new(MemoryConfig::pc(config.memory)).map_err(MachineError::NoHostMemory)?;
        let disks = storage::open(config)?;
        let (timers, counters) = (TimerQueue::new(), Counters::default());
        let vcpus: Vec<Arc<Vcpu>> = (0..config.cpus).map(|_| Arc::default()).collect();
        vcpus.iter().for_each(|vcpu| lifecycle.watch(Arc::clone(vcpu)));
        let (counting, single_blocks) = (ends.count_instructions, ends.single_blocks);
        let trace = Arc::default();
        let dma = Dma::new(&trace, &vcpus);
        let wiring = Wiring {
            config,
            mem: &mem,
            clock: time.clock(),
            tsc,
            timers: &timers,
            counters: &counters,
            lifecycle: &lifecycle,
            trace: &trace,
            dma: &dma,
            vcpus: &vcpus,
        };
        let board = Board::build(wiring, disks, ends)?;
        let outside = Arc::new(Outside::new(board.gates.clone()));
        Ok(Machine {
            config: config.clone(),
            payload,
            model,
            mem,
            time,
            timers,
            counters,
            lifecycle,
            vcpus,
            board,
            outside,
            trace,
            dma,
            counting,
            single_blocks,
            tuning: JitOptions::default(),
        })
    }

    /// Does what firmware does after power-on or reset, loads the kernel, and returns the boot processor at its entry. The
    /// others wait for a start-up IPI.
    pub fn start(&self) -> Result<CpuState, MachineError> {
        self.board.post();
        Ok(self.payload.load(&self.mem, &self.config)?)
    }

    /// How engines made from now on keep translated code, and whether `perf` is told about it.
    pub fn tune(&mut self, code_cache: usize, perf_map: bool) {
        self.tuning = JitOptions { code_cache, perf_map, ..self.tuning.clone() };
    }

    /// A fresh engine for processor `vp`.
    pub fn engine(&self, vp: VpIndex) -> Result<Box<dyn Engine>, MachineError> {
        let counting = self.counting || self.config.clock == ClockKind::Instructions;
        let attention = self.mailbox(vp).attention().clone();
        let options = JitOptions {
            count_instructions: counting,
            tsc_base: self.time.tsc_base(),
            single_blocks: self.single_blocks,
            vcpus: self.vcpus.len(),
            ..self.tuning.clone()
        };
        let options = match self.config.windows {
            WindowUse::Auto => options,
            WindowUse::Always => JitOptions { window_after: 0, ..options },
            WindowUse::Never => JitOptions { window_after: u32::MAX, ..options },
        };
        engine::build(self.config.engine, self.model.clone(), &self.mem, vp, attention, options)
    }

    /// Pulses the reset line of every device.
    pub fn reset(&self) {
        self.board.reset();
        self.vcpus.iter().for_each(|vcpu| vcpu.forget());
    }

    /// Whether a reset starts the machine again.
    pub fn reboots(&self) -> bool {
        self.config.reboot
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.mem
    }

    /// The machine as its processor sees it.
    pub fn bus(&self) -> Arc<MachineBus> {
        Arc::clone(&self.board.cpu_bus)
    }

    /// The processors' mailboxes, by number.
    pub fn vcpus(&self) -> &[Arc<Vcpu>] {
        &self.vcpus
    }

    /// The boot processor's mailbox.
    pub fn boot_vcpu(&self) -> Arc<Vcpu> {
        Arc::clone(self.mailbox(BOOT_VP))
    }

    fn mailbox(&self, vp: VpIndex) -> &Arc<Vcpu> {
        &self.vcpus[vp.0 as usize]
    }

    /// What every processor is.
    pub fn model(&self) -> &CpuModel {
        &self.model
    }

    /// Everything that is counted.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The machine's devices, to look at.
    pub fn inspector(&self) -> Inspector {
        Inspector::new(&self.board, &self.counters, &self.trace, &self.dma, self.vcpus.len() as u32)
    }

    /// Where the end is told.
    pub fn lifecycle(&self) -> &Lifecycle {
        &self.lifecycle
    }

    /// All timers.
    pub fn timers(&self) -> &Arc<TimerQueue> {
        &self.timers
    }

    /// Makes machine time stand still (true) or go on, while no vCPU runs. Retired instructions stand still by themselves.
    pub fn stand_still(&self) -> Box<dyn Fn(bool) + Send + Sync> {
        let Time::Host(clock) = &self.time else { return Box::new(|_| {}) };
        let (clock, timers) = (Arc::clone(clock), Arc::clone(&self.timers));
        Box::new(move |still| {
            if still {
                clock.stop();
            } else {
                clock.go_on();
                timers.look_again();
            }
        })
    }

    /// Machine time.
    pub fn time(&self) -> &Time {
        &self.time
    }
}

impl Machine {
    /// Who listens to devices' accesses to memory.
    pub fn dma(&self) -> &Arc<Dma> {
        &self.dma
    }

    /// Who traces the devices.
    pub fn trace(&self) -> &Arc<Switch> {
        &self.trace
    }

    /// A number that two processor models share only if they are the same.
    pub fn model_digest(&self) -> u64 {
        xxh3_64(format!("{:?}", self.model).as_bytes())
    }

    /// What happens between the slices of this machine's run; `None` where the host's time decides about it.
    pub fn lockstep(&self, wishes: Wishes) -> Option<Lockstep> {
        let parts = self.parts()?;
        Some(Lockstep {
            clock: Arc::clone(&parts.clock),
            timers: Arc::clone(&self.timers),
            disks: parts.disks.clone(),
            outside: Arc::clone(&self.outside),
            timeline: Timeline::new(parts, Arc::clone(&self.outside), &self.mem, wishes),
        })
    }

    /// What has state, where there is [`Self::lockstep`].
    pub(crate) fn parts(&self) -> Option<Parts> {
        let Time::Instructions(clock) = &self.time else { return None };
        let board = &self.board;
        Some(Parts {
            clock: Arc::clone(clock),
            fabric: Arc::clone(&board.fabric),
            bus: Arc::clone(&board.cpu_bus),
            devices: board.devices.clone(),
            wires: board.wires.clone(),
            ports: board.gates.clone(),
            disks: board.lockstep.clone(),
        })
    }
}

fn check_memory(bytes: u64) -> Result<(), MachineError> {
    let problem = match bytes {
        ..MIN_MEMORY => "too little; 2M is the least, Linux wants 64M",
        n if n > MAX_MEMORY => "too much; 256G is the most",
        n if !n.is_multiple_of(4096) => "not a multiple of 4K",
        _ => return Ok(()),
    };
    Err(MachineError::Memory { bytes, problem })
}

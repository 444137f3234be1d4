//! Running a machine: threads, time, the terminal, and how it ends.

mod backwards;
mod command;
mod crew;
mod debugged;
pub mod dossier;
mod event_loop;
mod held;
mod lifecycle;
mod output;
mod park;
mod rota;
mod serial;
mod signals;
pub mod terminal;
mod vcpu;

pub use command::command;
pub use dossier::{general_registers, mode, segment_registers};
pub use event_loop::EventLoop;
pub use lifecycle::{Lifecycle, Request};
pub use output::{Output, OutputHandle};
pub use park::{Calls, Vcpu};
pub use rota::{Lockstep, Rota};
pub use serial::remove_stale_socket;
pub use vcpu::{BOOT_VP, PanicGuard, Past, Probe, VcpuRunner};

use crate::debug::{Link, Symbols};
use crate::machine::{Machine, MachineError, Time};
use crate::replay::Wishes;
use crate::stats::{self, Snapshot};
use crate::trace::Trace;
use std::sync::Arc;
use std::time::Duration;

/// How often the main thread looks whether the user wants to leave.
const TICK: Duration = Duration::from_millis(100);
/// How long a vCPU may take to hear of it.
const PATIENCE: Duration = Duration::from_secs(2);

/// How a run ended.
#[derive(Debug)]
pub struct Finished {
    /// Why.
    pub request: Request,
    /// Every counter at the end.
    pub stats: Snapshot,
}

/// Who looks at a machine while it runs.
#[derive(Default)]
pub struct Watchers {
    /// Called on the vCPU's thread whenever it was stopped though nobody asked for the end.
    pub probe: Option<Probe>,
    /// Who may debug it.
    pub debug: Option<Arc<Link>>,
    /// Names for addresses, for people.
    pub symbols: Arc<Symbols>,
    /// A triple fault resets the machine.
    pub reset_at_shutdown: bool,
    /// What is asked of a run by the instruction clock.
    pub wishes: Wishes,
    /// Who traces the processors.
    pub trace: Option<Arc<Trace>>,
}

/// Runs `machine` to its end, through as many resets as the guest asks for.
pub fn drive(machine: &mut Machine, watchers: Watchers) -> Result<Finished, MachineError> {
    let _events = match machine.time() {
        Time::Host(clock) => {
            let events = EventLoop::start(Arc::clone(machine.timers()), Arc::clone(clock));
            Some(events.map_err(|e| MachineError::Host("the event loop's thread", e))?)
        }
        Time::Instructions(_) => None,
    };
    let mut vcpus = VcpuRunner::all(machine)?;
    vcpus[0].probe = watchers.probe;
    for vcpu in &mut vcpus {
        vcpu.debug = watchers.debug.clone();
        vcpu.symbols = Arc::clone(&watchers.symbols);
        vcpu.reset_at_shutdown = watchers.reset_at_shutdown;
    }
    for vcpu in &mut vcpus {
        vcpu.trace(watchers.trace.clone());
    }
    let mut crews = (vcpus, machine.lockstep(watchers.wishes));
    let mut resets = 0;
    let mut last = (Vec::new(), None);
    while let Some(mut ended) = crew::run(crews, machine.lifecycle())? {
        if !machine.reboots() || machine.lifecycle().take_reset().is_none() {
            last = ended;
            break;
        }
        resets += 1;
        machine.reset();
        let boot = machine.start()?;
        ended.0.iter_mut().try_for_each(|vcpu| vcpu.power_on(machine, &boot))?;
        crews = ended;
    }
    let request =
        machine.lifecycle().peek().unwrap_or_else(|| Request::Host("the vCPUs stopped by themselves".into()));
    let (vcpus, mut lockstep) = last;
    if let Some(lockstep) = &mut lockstep {
        // A machine at rest has a state that can be hashed.
        lockstep.rest();
        lockstep.timeline.end(&vcpus, request.to_string());
    }
    let stats = final_stats(machine, &vcpus, lockstep.as_ref(), resets);
    Ok(Finished { request, stats })
}

/// The engines' counters are summed up.
fn final_stats(
    machine: &Machine,
    vcpus: &[VcpuRunner],
    lockstep: Option<&Lockstep>,
    resets: u64,
) -> Snapshot {
    let one = |name: &str, value| vec![(name.to_owned(), value)];
    let mut more: Vec<(String, Vec<(String, u64)>)> = vec![
        ("cpu0".into(), one("resets", resets)),
        ("memory".into(), one("ram_bytes", machine.memory().ram_size())),
        ("host".into(), one("cpu_ns", stats::process_cpu_ns())),
    ];
    for vcpu in vcpus {
        more.push((format!("cpu{}", vcpu.vp.0), one("instructions", vcpu.cpu.instructions)));
    }
    more.push(("engine".into(), stats::sums(vcpus.iter().map(|vcpu| vcpu.engine.counters()))));
    if let Some(hash) = lockstep.and_then(|lockstep| lockstep.timeline.hash(vcpus).ok()) {
        let halves = [("hash_high".to_owned(), (hash >> 64) as u64), ("hash_low".to_owned(), hash as u64)];
        more.push(("state".into(), halves.into()));
    }
    stats::snapshot(machine.counters(), &more)
}

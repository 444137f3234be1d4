//! Running a machine: threads, time, the terminal, and how it ends.

mod command;
mod debugged;
pub mod dossier;
mod event_loop;
mod lifecycle;
mod output;
mod park;
mod serial;
mod signals;
pub mod terminal;
mod vcpu;

pub use command::command;
pub use dossier::{general_registers, mode, segment_registers};
pub use event_loop::EventLoop;
pub use lifecycle::{Lifecycle, Request};
pub use output::{Output, OutputHandle};
pub use park::Vcpu;
pub use serial::remove_stale_socket;
pub use vcpu::{BOOT_VP, Lockstep, PanicGuard, Probe, TimeKeeper, VcpuRunner};

use crate::debug::{Link, Symbols};
use crate::machine::{Machine, MachineError, Time};
use crate::stats::{self, Snapshot};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
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
    let mut runner = VcpuRunner::new(machine)?;
    runner.probe = watchers.probe;
    runner.debug = watchers.debug;
    runner.symbols = watchers.symbols;
    runner.reset_at_shutdown = watchers.reset_at_shutdown;
    let mut resets = 0;
    let mut last = None;
    while let Some(mut ended) = on_own_thread(runner)? {
        if !machine.reboots() || machine.lifecycle().take_reset().is_none() {
            last = Some(ended);
            break;
        }
        resets += 1;
        machine.reset();
        ended.cpu = machine.start()?;
        ended.engine = machine.engine()?;
        runner = ended;
    }
    let request =
        machine.lifecycle().peek().unwrap_or_else(|| Request::Host("the vCPU stopped by itself".into()));
    Ok(Finished { request, stats: final_stats(machine, last.as_ref(), resets) })
}

/// Runs the vCPU on a thread of its own and gives it back; `None` if it does not hear that the user wants to leave.
fn on_own_thread(runner: VcpuRunner) -> Result<Option<VcpuRunner>, MachineError> {
    let lifecycle = runner.lifecycle.clone();
    let (give_back, given_back) = mpsc::channel();
    std::thread::Builder::new()
        .name("vcpu0".into())
        .spawn(move || {
            let _guard = PanicGuard(runner.lifecycle.clone());
            let mut runner = runner;
            runner.run();
            // Nobody waits any more if we were too late.
            let _late = give_back.send(runner);
        })
        .map_err(|e| MachineError::Host("the vCPU's thread", e))?;
    let mut patience = PATIENCE;
    loop {
        match given_back.recv_timeout(TICK) {
            Ok(runner) => return Ok(Some(runner)),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(MachineError::Wiring("the vCPU's thread panicked: please report this".into()));
            }
            Err(RecvTimeoutError::Timeout) if lifecycle.user_wants_out() => {
                patience = patience.saturating_sub(TICK);
                if patience.is_zero() {
                    return Ok(None);
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

fn final_stats(machine: &Machine, runner: Option<&VcpuRunner>, resets: u64) -> Snapshot {
    let engine = runner.map(|r| r.engine.counters()).unwrap_or_default();
    let mut cpu = vec![("resets".to_owned(), resets)];
    cpu.extend(runner.map(|r| ("instructions".to_owned(), r.cpu.instructions)));
    let memory = vec![("ram_bytes".to_owned(), machine.memory().ram_size())];
    let host = vec![("cpu_ns".to_owned(), stats::process_cpu_ns())];
    stats::snapshot(
        machine.counters(),
        &[("engine", engine), ("cpu0", cpu), ("memory", memory), ("host", host)],
    )
}

//! Running a machine: threads, time, the terminal, and how it ends.

mod command;
mod dossier;
mod event_loop;
mod lifecycle;
mod output;
mod park;
mod serial;
mod signals;
pub mod terminal;
mod vcpu;

pub use command::command;
pub use event_loop::EventLoop;
pub use lifecycle::{Lifecycle, Request};
pub use output::{Output, OutputHandle};
pub use park::Vcpu;
pub use vcpu::{BOOT_VP, Lockstep, PanicGuard, Probe, TimeKeeper, VcpuRunner};

use crate::machine::{Machine, MachineError, Time};
use crate::stats::{self, Snapshot};
use std::sync::Arc;

/// How a run ended.
#[derive(Debug)]
pub struct Finished {
    /// Why.
    pub request: Request,
    /// Every counter at the end.
    pub stats: Snapshot,
}

/// Runs `machine` to its end, through as many resets as the guest asks for. `probe` is called on the vCPU's thread
/// whenever it was stopped though nobody asked for the end.
pub fn drive(machine: &mut Machine, probe: Option<Probe>) -> Result<Finished, MachineError> {
    let _events = match machine.time() {
        Time::Host(clock) => {
            let events = EventLoop::start(Arc::clone(machine.timers()), Arc::clone(clock));
            Some(events.map_err(|e| MachineError::Host("the event loop's thread", e))?)
        }
        Time::Instructions(_) => None,
    };
    let mut runner = VcpuRunner {
        cpu: machine.start()?,
        engine: machine.engine()?,
        mem: machine.memory().clone(),
        bus: machine.bus(),
        vcpu: machine.vcpu(),
        lifecycle: machine.lifecycle().clone(),
        time: machine.time_keeper(),
        probe,
    };
    let mut resets = 0;
    loop {
        runner = on_own_thread(runner)?;
        if !machine.reboots() || machine.lifecycle().take_reset().is_none() {
            break;
        }
        resets += 1;
        machine.reset();
        runner.cpu = machine.start()?;
        runner.engine = machine.engine()?;
    }
    let request =
        machine.lifecycle().peek().unwrap_or_else(|| Request::Host("the vCPU stopped by itself".into()));
    Ok(Finished { request, stats: final_stats(machine, &runner, resets) })
}

/// Runs the vCPU on a thread of its own and gives it back.
fn on_own_thread(runner: VcpuRunner) -> Result<VcpuRunner, MachineError> {
    let lifecycle = runner.lifecycle.clone();
    let thread = std::thread::Builder::new()
        .name("vcpu0".into())
        .spawn(move || {
            let _guard = PanicGuard(lifecycle);
            let mut runner = runner;
            runner.run();
            runner
        })
        .map_err(|e| MachineError::Host("the vCPU's thread", e))?;
    thread.join().map_err(|_| MachineError::Wiring("the vCPU's thread panicked: please report this".into()))
}

fn final_stats(machine: &Machine, runner: &VcpuRunner, resets: u64) -> Snapshot {
    let engine = runner.engine.counters();
    let cpu = vec![("instructions", runner.cpu.instructions), ("resets", resets)];
    let memory = vec![("ram_bytes", machine.memory().ram_size())];
    let host = vec![("cpu_ns", stats::process_cpu_ns())];
    stats::snapshot(
        machine.counters(),
        &[("engine", engine), ("cpu0", cpu), ("memory", memory), ("host", host)],
    )
}

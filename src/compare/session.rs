//! One boot of a measuring guest, in this process.

use super::CompareError;
use super::lines::Lines;
use super::marks::{End, Marks};
use crate::machine::{HostEnds, LabPort, Machine, MachineConfig, SerialEnd};
use crate::run::{self, Lifecycle, Request};
use crate::stats;
use std::sync::Arc;
use std::time::Duration;

/// A guest that says nothing for so long is given up.
const PATIENCE: Duration = Duration::from_secs(600);

/// A machine in which nothing happens for so long waits for something that was lost. Far more than a host's disk takes for
/// one request.
const STILL: Duration = Duration::from_secs(60);

/// A guest and where its words go.
pub(super) struct GuestRun {
    pub(super) config: MachineConfig,
    pub(super) lines: Arc<Lines>,
    pub(super) lab_port: Option<LabPort>,
    pub(super) marks: Arc<Marks>,
}

/// Boots it and waits for its end; `step` is called for every job done.
pub(super) fn run(guest: GuestRun, step: &(dyn Fn() + Send + Sync)) -> Result<Option<End>, CompareError> {
    let lifecycle = Lifecycle::new();
    let lines = guest.lines;
    let ends = HostEnds {
        serial: vec![Some(SerialEnd::sink(move |bytes| lines.push(bytes)))],
        lab_port: guest.lab_port,
        count_instructions: true,
        single_blocks: false,
        debug_console: Box::new(|_| ()),
    };
    let mut machine = Machine::new(&guest.config, lifecycle.clone(), ends)?;
    guest.marks.attach(machine.boot_vcpu());
    let counters = machine.counters().clone();
    let marks = Arc::clone(&guest.marks);
    let ended = lifecycle.clone();
    let probe: run::Probe = Box::new(move |cpu, _engine| {
        if marks.settle(cpu, || counters.snapshot()).is_some() {
            ended.request(Request::Done);
        }
    });
    let registry = machine.counters().clone();
    let activity = move || {
        registry
            .snapshot()
            .values()
            .flat_map(|group| group.values())
            .fold(0u64, |sum, &n| sum.wrapping_add(n))
    };
    let watch = Progress { marks: &guest.marks, lifecycle: &lifecycle, activity: &activity };
    let request = std::thread::scope(|scope| {
        scope.spawn(|| watch.run(step));
        let result = run::drive(&mut machine, run::Watchers { probe: Some(probe), ..Default::default() });
        // However it ended, the watcher ends too.
        lifecycle.request(Request::Done);
        result
    })?
    .request;
    match request {
        Request::Done | Request::PowerOff => Ok(guest.marks.end()),
        Request::Quit | Request::Signal(_) => Err(CompareError::Interrupted),
        Request::TripleFault(dossier) => Err(CompareError::Guest(format!("triple fault\n{dossier}"))),
        Request::Reset(how) => Err(CompareError::Guest(format!("it asked for a reset ({how})"))),
        Request::DebugExit(_) => Err(CompareError::Guest("it wrote to the debug-exit port".into())),
        Request::Host(text) => Err(CompareError::Guest(text)),
    }
}

/// Watches the jobs go by.
struct Progress<'a> {
    marks: &'a Marks,
    lifecycle: &'a Lifecycle,
    /// Changes whenever a device does anything.
    activity: &'a (dyn Fn() -> u64 + Sync),
}

impl Progress<'_> {
    fn run(&self, step: &(dyn Fn() + Send + Sync)) {
        const TICK: Duration = Duration::from_millis(50);
        let mut seen = 0;
        let mut silent = Duration::ZERO;
        let mut stillness = Stillness::default();
        while !self.lifecycle.wait(TICK) {
            let done = self.marks.progress();
            silent = if done > seen { Duration::ZERO } else { silent + TICK };
            (seen..done).for_each(|_| step());
            seen = seen.max(done);
            if stillness.lasts((self.activity)(), stats::process_cpu_ns(), TICK) >= STILL {
                let text = format!(
                    "after {seen} jobs it has been waiting for {} seconds, with no device at work: an interrupt was lost",
                    STILL.as_secs()
                );
                self.lifecycle.request(Request::Host(text));
            } else if silent > PATIENCE {
                let text = format!("no job ended within {} seconds", PATIENCE.as_secs());
                self.lifecycle.request(Request::Host(text));
            }
        }
        (seen..self.marks.progress()).for_each(|_| step());
    }
}

/// For how long no device was used and the guest did not compute.
#[derive(Default)]
struct Stillness {
    activity: u64,
    cpu_ns: u64,
    lasted: Duration,
}

impl Stillness {
    /// `tick` has passed, and these are the counters now. A guest that computes takes most of a processor; our own looking
    /// takes little of it.
    fn lasts(&mut self, activity: u64, cpu_ns: u64, tick: Duration) -> Duration {
        let computed = u128::from(cpu_ns.saturating_sub(self.cpu_ns)) * 4 > tick.as_nanos();
        let still = activity == self.activity && !computed;
        self.lasted = if still { self.lasted + tick } else { Duration::ZERO };
        (self.activity, self.cpu_ns) = (activity, cpu_ns);
        self.lasted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stillness_is_neither_computing_nor_using_devices() {
        let (tick, ms) = (Duration::from_millis(50), 1_000_000);
        let mut s = Stillness::default();
        let lasted: Vec<u128> =
            [(1, 0), (1, ms), (1, 2 * ms), (2, 3 * ms), (2, 4 * ms), (2, 44 * ms), (2, 45 * ms)]
                .into_iter()
                .map(|(activity, cpu)| s.lasts(activity, cpu, tick).as_millis())
                .collect();
        assert_eq!(lasted, [0, 50, 100, 0, 50, 0, 50]);
    }
}

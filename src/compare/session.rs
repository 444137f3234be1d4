//! One boot of a measuring guest, in this process.

use super::CompareError;
use super::lines::Lines;
use super::marks::{End, Marks};
use crate::machine::{HostEnds, LabPort, Machine, MachineConfig, SerialEnd};
use crate::run::{self, Lifecycle, Request};
use std::sync::Arc;
use std::time::Duration;

/// A guest that says nothing for so long is given up.
const PATIENCE: Duration = Duration::from_secs(600);

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
        debug_console: Box::new(|_| ()),
    };
    let mut machine = Machine::new(&guest.config, lifecycle.clone(), ends)?;
    guest.marks.attach(machine.vcpu());
    let counters = machine.counters().clone();
    let marks = Arc::clone(&guest.marks);
    let ended = lifecycle.clone();
    let probe: run::Probe = Box::new(move |cpu, _engine| {
        if marks.settle(cpu, || counters.snapshot()).is_some() {
            ended.request(Request::Done);
        }
    });
    let watch = Progress { marks: &guest.marks, lifecycle: &lifecycle };
    let request = std::thread::scope(|scope| {
        scope.spawn(|| watch.run(step));
        let result = run::drive(&mut machine, Some(probe));
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
}

impl Progress<'_> {
    fn run(&self, step: &(dyn Fn() + Send + Sync)) {
        const TICK: Duration = Duration::from_millis(50);
        let mut seen = 0;
        let mut silent = Duration::ZERO;
        while !self.lifecycle.wait(TICK) {
            let done = self.marks.progress();
            silent = if done > seen { Duration::ZERO } else { silent + TICK };
            (seen..done).for_each(|_| step());
            seen = seen.max(done);
            if silent > PATIENCE {
                let text = format!("no job ended within {} seconds", PATIENCE.as_secs());
                self.lifecycle.request(Request::Host(text));
            }
        }
        (seen..self.marks.progress()).for_each(|_| step());
    }
}

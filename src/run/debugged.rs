//! A vCPU under a debugger, by the host's clock: what it does when it is stopped, and how it goes on.

use super::lifecycle::Request;
use super::rota::Ended;
use super::vcpu::VcpuRunner;
use crate::debug::{Armed, Link, Resume, Stop};
use paravane_cpu::{DebugStop, Exit, LinAddr, instruction_address};
use std::ops::Range;
use std::sync::Arc;

impl VcpuRunner {
    /// Whether what ran can be gone back in.
    pub fn goes_back(&self) -> bool {
        self.past.goes_back
    }

    /// The debugger changes something: what was before leads elsewhere. False: it may not.
    pub fn change(&mut self) -> bool {
        self.past.changed |= !self.past.fixed;
        !self.past.fixed
    }

    /// Stops where `armed` says from now on. The debugger takes its breakpoints out at every stop and puts them back: what did
    /// not change in the end costs nothing.
    fn arm(&mut self, armed: &Arc<Armed>) {
        self.armed = Arc::clone(armed);
        let plan = armed.plan();
        if plan != *self.plan {
            self.plan = Arc::new(plan);
            self.set_debug(&Arc::clone(&self.plan));
        }
    }

    /// As [`Self::arm`], for what `resume` may meet: one step meets no breakpoint.
    pub fn arm_for(&mut self, armed: &Arc<Armed>, resume: Resume) {
        let one_step = matches!(resume, Resume::Step { start, end, .. } if start == end);
        if !one_step || armed.plan().watch != self.plan.watch {
            self.arm(armed);
        }
    }

    /// The engine stopped for the debugger; true if the run ends.
    pub(super) fn debug_event(&mut self, stop: DebugStop) -> bool {
        let stop = match self.relevant(stop) {
            Some(stop) => Ok(stop),
            None => self.step(false),
        };
        match stop {
            Ok(Stop::Stepped) => false,
            Ok(stop) => self.debugged(stop),
            Err(Ended) => true,
        }
    }

    /// What the debugger is told; nothing where a condition does not hold.
    pub(super) fn relevant(&self, stop: DebugStop) -> Option<Stop> {
        match stop {
            DebugStop::Breakpoint(at) => {
                self.armed.stops(at, &self.cpu, &self.mem).map(|owner| Stop::Breakpoint(at, owner))
            }
            DebugStop::Watch(hit) => Some(Stop::Watch(hit)),
        }
    }

    /// The breakpoint at the instruction that is next, if the engine has one there.
    pub(super) fn at_breakpoint(&self) -> Option<LinAddr> {
        self.plan.stops_at(&self.cpu, &self.mem)
    }

    /// Stands still until the debugger lets it go on; true if the run ends.
    pub(super) fn debugged(&mut self, stop: Stop) -> bool {
        let Some(link) = self.debug.clone() else { return false };
        let mut stop = stop;
        loop {
            let at = instruction_address(&self.cpu);
            let reported = matches!(stop, Stop::Breakpoint(..)).then_some(at);
            if self.lifecycle.requested() {
                return true;
            }
            link.stopped(self.vp, stop.clone());
            let resume =
                link.serve(std::slice::from_mut(self)).and_then(|resume| resume.first().copied().flatten());
            let Some(resume) = resume else { return true };
            if let Some(untold) = link.take_untold(self.vp) {
                stop = untold;
                continue;
            }
            let reported = reported.filter(|_| link.was_told(self.vp));
            if let Stop::TripleFault(dossier) = stop {
                self.end_shut_down(dossier.to_string());
                return true;
            }
            let next = match resume {
                Resume::Step { start, end, interrupts } => self.steps(&link, start..end, interrupts),
                // What was reported is executed before it can be reported again.
                Resume::Continue if self.at_breakpoint() == reported && reported.is_some() => {
                    match self.step(false) {
                        Ok(Stop::Stepped) => return false,
                        other => other,
                    }
                }
                // By the host's clock nothing is gone back to, and nobody is told that it could be.
                Resume::Continue | Resume::ReverseStep | Resume::ReverseContinue => return false,
            };
            match next {
                Ok(next) => stop = next,
                Err(Ended) => return true,
            }
        }
    }

    /// Steps at least once, and on while RIP is in `range`.
    fn steps(&mut self, link: &Link, range: Range<u64>, interrupts: bool) -> Result<Stop, Ended> {
        loop {
            let stop = self.step(interrupts)?;
            if stop != Stop::Stepped || !range.contains(&instruction_address(&self.cpu).0) {
                return Ok(stop);
            }
            if link.wants_stop(self.vp) {
                return Ok(Stop::Paused);
            }
            let here = self.at_breakpoint().map(DebugStop::Breakpoint);
            if let Some(stop) = here.and_then(|stop| self.relevant(stop)) {
                return Ok(stop);
            }
        }
    }

    /// Sleeps until something happens to a processor that was not started.
    fn wait_for_startup(&mut self) -> Result<Option<Stop>, Ended> {
        self.sleep();
        self.take_calls();
        if self.lifecycle.requested() {
            return Err(Ended);
        }
        let stop = if self.waiting { Stop::Paused } else { Stop::Stepped };
        Ok((!self.waiting || self.debugger_wants_stop()).then_some(stop))
    }

    /// A watched access of a device ends what ran just as the processor's own do.
    fn with_devices(&self, exit: Exit) -> Exit {
        match exit {
            Exit::Halt | Exit::Budget | Exit::Stop => self.device_hit().map_or(exit, Exit::Debug),
            _ => exit,
        }
    }

    /// One instruction. A halted processor waits for what wakes it, or for the debugger; so does one that waits for a
    /// start-up IPI, which is the step then.
    fn step(&mut self, interrupts: bool) -> Result<Stop, Ended> {
        loop {
            if self.waiting {
                match self.wait_for_startup()? {
                    Some(stop) => return Ok(stop),
                    None => continue,
                }
            }
            let before = self.cpu.instructions;
            let exit = self.engine.step(&mut self.cpu, &self.mem, &*self.bus, interrupts);
            let passed = self.cpu.instructions.wrapping_sub(before);
            self.follow_a20();
            if self.lifecycle.requested() {
                return Err(Ended);
            }
            match self.with_devices(exit) {
                Exit::Halt if passed == 0 => {
                    self.sleep();
                    if self.debugger_wants_stop() {
                        return Ok(Stop::Paused);
                    }
                }
                Exit::Halt | Exit::Budget | Exit::Stop => return Ok(Stop::Stepped),
                Exit::Debug(stop) => return Ok(self.relevant(stop).unwrap_or(Stop::Stepped)),
                Exit::TripleFault => return Ok(Stop::TripleFault(self.dossier().into())),
                Exit::Unsupported => {
                    self.lifecycle.request(Request::Host(self.unsupported()));
                    return Err(Ended);
                }
            }
        }
    }
}

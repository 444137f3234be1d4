//! vCPUs that take turns under a debugger: they stop together between two instructions of one of them, and go on in the same order.
//!
//! A step of one that is not at turn begins with the turns of those before it. Where the debugger holds some back the run is another one
//! from then on; where it may not become another one (it is recorded, or a recorded one) nobody is held back.

use super::rota::{Ended, Rota};
use super::vcpu::tell_kept;
use crate::debug::{Link, Resume, Stop};
use paravane_cpu::{DebugStop, Exit, LinAddr, instruction_address};
use paravane_memory::VpIndex;
use std::ops::Range;

/// A stop, and whose it is.
pub(super) type Met = (usize, Stop);

impl Rota {
    pub(super) fn debugger_wants_stop(&self) -> bool {
        self.link().is_some_and(|link| link.wants_any_stop())
    }

    /// The engine of `who` stopped for the debugger; true if the run ends.
    pub(super) fn debug_event(&mut self, who: usize, stop: DebugStop) -> bool {
        match self.relevant(who, stop) {
            Ok((_, Stop::Stepped)) => false,
            Ok((who, stop)) => self.debugged(who, stop),
            Err(Ended) => self.ending(),
        }
    }

    /// What the debugger is told of `stop`; where a condition does not hold, of the step beyond it.
    fn relevant(&mut self, who: usize, stop: DebugStop) -> Result<Met, Ended> {
        match self.vcpus[who].relevant(stop) {
            Some(stop) => Ok((who, stop)),
            None => self.step(who, false),
        }
    }

    /// Somebody wants all to stop.
    pub(super) fn paused(&mut self, who: usize) -> bool {
        self.debugged(who, Stop::Paused)
    }

    /// The run is to end. A recorded one is kept for the debugger, who may go back; true if it ends.
    pub(super) fn ending(&mut self) -> bool {
        let kept = self.link().is_some() && self.time.timeline.goes_back() && self.time.timeline.replays();
        if !kept {
            return true;
        }
        let turn = self.turn();
        self.lifecycle().withdraw().is_none_or(|request| self.debugged(turn, Stop::End(request)))
    }

    /// Shutdown of `who`: with a debugger at hand everything stays as it is until it was looked at. True if the run ends.
    pub(super) fn shut_down(&mut self, who: usize) -> bool {
        let dossier = self.vcpus[who].dossier();
        if self.link().is_none() {
            self.vcpus[who].end_shut_down(dossier);
            return true;
        }
        tell_kept(&dossier);
        self.debugged(who, Stop::TripleFault(dossier.into()))
    }

    /// All stand still until the debugger lets them go on; true if the run ends.
    fn debugged(&mut self, who: usize, stop: Stop) -> bool {
        let Some(link) = self.link() else { return false };
        let (mut who, mut stop) = (who, stop);
        loop {
            let at = instruction_address(&self.vcpus[who].cpu);
            let reported = matches!(stop, Stop::Breakpoint(..)).then_some((who, at));
            if self.lifecycle().requested() {
                return true;
            }
            link.stopped_together(VpIndex(who as u32), &stop);
            let Some(resume) = link.serve(&mut self.vcpus) else { return true };
            self.follow_changes();
            let fixed = self.time.timeline.is_fixed();
            self.held = resume.iter().map(|resume| resume.is_none() && !fixed).collect();
            let back = |r: &Option<Resume>| matches!(r, Some(Resume::ReverseStep | Resume::ReverseContinue));
            match stop {
                Stop::TripleFault(dossier) if !resume.iter().any(back) => {
                    self.vcpus[who].end_shut_down(dossier.to_string());
                    return true;
                }
                Stop::End(request) if !resume.iter().any(back) => {
                    self.lifecycle().request(request);
                    return true;
                }
                _ => {}
            }
            match self.go_on(&link, &resume, reported) {
                Some(Ok(met)) => (who, stop) = met,
                Some(Err(Ended)) => return self.ending(),
                None => return false,
            }
        }
    }

    /// Goes on as the debugger says, to the next stop; `None`: until something stops it. At the place that was `reported` no
    /// breakpoint is reported again.
    fn go_on(
        &mut self,
        link: &Link,
        resume: &[Option<Resume>],
        reported: Option<(usize, LinAddr)>,
    ) -> Option<Result<Met, Ended>> {
        for (who, resume) in resume.iter().enumerate() {
            match *resume {
                Some(Resume::Step { start, end, interrupts }) => {
                    return Some(self.steps(link, who, start..end, interrupts));
                }
                Some(Resume::ReverseStep) => return Some(self.reverse_step(who)),
                Some(Resume::ReverseContinue) => return Some(self.reverse_continue()),
                Some(Resume::Continue) | None => {}
            }
        }
        let (who, at) = reported?;
        if self.held[who] || self.vcpus[who].at_breakpoint() != Some(at) {
            return None;
        }
        match self.step(who, false) {
            Ok((_, Stop::Stepped)) => None,
            other => Some(other),
        }
    }

    /// Steps `who` at least once, and on while RIP is in `range`.
    fn steps(&mut self, link: &Link, who: usize, range: Range<u64>, interrupts: bool) -> Result<Met, Ended> {
        loop {
            let met = self.step(who, interrupts)?;
            let at = instruction_address(&self.vcpus[who].cpu);
            if met != (who, Stop::Stepped) || !range.contains(&at.0) {
                return Ok(met);
            }
            if link.wants_any_stop() {
                return Ok((who, Stop::Paused));
            }
            let here = self.vcpus[who].at_breakpoint().map(DebugStop::Breakpoint);
            if let Some(stop) = here.and_then(|stop| self.vcpus[who].relevant(stop)) {
                return Ok((who, stop));
            }
        }
    }

    /// One instruction of `who`, after the turns of those before it. A halted vCPU waits for what wakes it, or for the debugger; so
    /// does one that waits for a start-up IPI, which is the step then. In a run that can be repeated interrupts come when they come.
    pub(super) fn step(&mut self, who: usize, interrupts: bool) -> Result<Met, Ended> {
        let interrupts = interrupts || self.time.timeline.goes_back() || self.time.timeline.is_fixed();
        loop {
            let waits = self.vcpus[who].waiting;
            let stop = if self.turn() != who || waits {
                let (other, exit) = self.advance(u64::MAX);
                self.told(other, exit)?.map(|stop| (other, stop))
            } else {
                let (_, exit, retired) = self.step_turn(interrupts);
                let stop = self.told(who, exit)?;
                let stepped = exit != Exit::Halt || retired > 0;
                stop.or(stepped.then_some(Stop::Stepped)).map(|stop| (who, stop))
            };
            if stop.is_some() {
                return Ok(stop.unwrap_or((who, Stop::Stepped)));
            }
            if waits && !self.vcpus[who].waiting {
                return Ok((who, Stop::Stepped));
            }
            if self.debugger_wants_stop() {
                return Ok((who, Stop::Paused));
            }
        }
    }

    /// What the debugger is told of the end of a turn, or of a step; nothing where a condition does not hold.
    fn told(&mut self, who: usize, exit: Exit) -> Result<Option<Stop>, Ended> {
        if self.lifecycle().requested() {
            return Err(Ended);
        }
        match exit {
            Exit::Halt | Exit::Budget | Exit::Stop => Ok(None),
            Exit::Debug(stop) => match self.vcpus[who].relevant(stop) {
                Some(stop) => Ok(Some(stop)),
                None if matches!(stop, DebugStop::Breakpoint(_)) => {
                    let (who, exit, _) = self.step_turn(true);
                    self.told(who, exit)
                }
                None => Ok(None),
            },
            Exit::TripleFault => Ok(Some(Stop::TripleFault(self.vcpus[who].dossier().into()))),
            Exit::Unsupported => {
                self.unsupported(who);
                Err(Ended)
            }
        }
    }
}

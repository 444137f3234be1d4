//! A vCPU under a debugger that goes back: to a point of the run's history, and forward again to just before where it was.
//!
//! Time runs forward only. What happened last before a place is found by running from the nearest point before it, stopping where the
//! debugger would have, and remembering the last time; a second run from the same point ends there.

use super::debugged::Ended;
use super::vcpu::{TimeKeeper, VcpuRunner};
use crate::debug::Stop;
use crate::replay::Stamp;
use paravane_cpu::{Budget, DebugPlan, DebugStop, Exit, gpr};
use std::sync::Arc;

/// Where the processor is between two instructions, as far as it takes to know the place again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Place {
    instructions: u64,
    rip: u64,
    rsp: u64,
    rcx: u64,
    cs: u16,
}

/// Something the debugger would have stopped at.
struct Event {
    stop: Stop,
    /// Where the processor was then.
    place: Place,
}

/// Why running through the past came to an end too early.
enum Cut {
    /// The run is to end.
    Ended,
    /// The processor shut down, as it did at the end of what ran.
    ShutDown,
}

impl From<Ended> for Cut {
    fn from(_: Ended) -> Cut {
        Cut::Ended
    }
}

impl VcpuRunner {
    /// Whether what ran can be gone back in.
    pub fn goes_back(&self) -> bool {
        self.timeline.as_ref().is_some_and(|t| t.goes_back())
    }

    fn place(&self) -> Place {
        let cpu = &self.cpu;
        Place {
            instructions: cpu.instructions,
            rip: cpu.rip,
            rsp: cpu.gpr[gpr::RSP],
            // A repeated string instruction can stop in the middle.
            rcx: cpu.gpr[gpr::RCX],
            cs: cpu.seg[1].selector,
        }
    }

    /// To before the last instruction.
    pub(super) fn reverse_step(&mut self) -> Result<Stop, Ended> {
        let here = self.place();
        let stop =
            self.step_before(here).map(|stepped| if stepped { Stop::Stepped } else { Stop::Beginning });
        self.arrived(stop)
    }

    /// To the last place at which the debugger would have stopped, or to the beginning.
    pub(super) fn reverse_continue(&mut self) -> Result<Stop, Ended> {
        let stop = self.find_back();
        self.arrived(stop)
    }

    fn arrived(&self, stop: Result<Stop, Cut>) -> Result<Stop, Ended> {
        match stop {
            Ok(stop) => Ok(stop),
            Err(Cut::Ended) => Err(Ended),
            Err(Cut::ShutDown) => Ok(Stop::TripleFault(self.dossier().into())),
        }
    }

    fn find_back(&mut self) -> Result<Stop, Cut> {
        let here = self.place();
        let stamps: Vec<Stamp> = self.timeline.as_ref().map(|t| t.points()).unwrap_or_default();
        let mut until = here;
        for at in stamps.into_iter().rev().filter(|at| at.instructions <= here.instructions) {
            self.rewind(at.instructions)?;
            let beginning = self.place();
            if beginning != until
                && let Some(event) = self.last_event(until)?
            {
                return self.go_to(event);
            }
            until = beginning;
        }
        let Some(oldest) = self.timeline.as_ref().and_then(|t| t.points().first().copied()) else {
            return Ok(Stop::Beginning);
        };
        self.rewind(oldest.instructions)?;
        Ok(Stop::Beginning)
    }

    fn go_to(&mut self, event: Event) -> Result<Stop, Cut> {
        match event.stop {
            // An access is undone: the instruction that makes it is the next.
            Stop::Watch(_) => drop(self.step_before(event.place)?),
            _ => drop(self.steps_to(event.place)?),
        }
        self.engine.set_debug(&self.plan);
        Ok(event.stop)
    }

    /// What the guest asked of the machine at the end of what ran is known; only the user ends the run now.
    fn still_wanted(&self) -> Result<(), Cut> {
        match self.lifecycle.requested() && self.lifecycle.withdraw().is_none() {
            true => Err(Cut::Ended),
            false => Ok(()),
        }
    }

    /// One step of what ran before.
    fn step_again(&mut self) -> Result<Stop, Cut> {
        match self.step(true) {
            Ok(Stop::TripleFault(_)) => Err(Cut::ShutDown),
            Ok(stop) => Ok(stop),
            Err(Ended) => self.still_wanted().map(|()| Stop::Stepped),
        }
    }

    /// Runs from here to `until`; what the debugger would have stopped at last before that.
    fn last_event(&mut self, until: Place) -> Result<Option<Event>, Cut> {
        self.engine.set_debug(&self.plan);
        let mut last = None;
        loop {
            let stop = match self.advance(until.instructions) {
                Err(Cut::ShutDown) => return Ok(last),
                Err(cut) => return Err(cut),
                Ok(Some(stop)) => Some(stop),
                // The last steps one by one: there may be exceptions and interrupts, which retire nothing.
                Ok(None) if self.place() == until || self.cpu.instructions > until.instructions => {
                    return Ok(last);
                }
                Ok(None) => self.plan.stops_at(&self.cpu, &self.mem).map(DebugStop::Breakpoint),
            };
            let place = self.place();
            if place == until && !matches!(stop, Some(DebugStop::Watch(_))) {
                return Ok(last);
            }
            let watched = matches!(stop, Some(DebugStop::Watch(_)));
            if let Some(stop) = stop.and_then(|stop| self.relevant(stop)) {
                last = Some(Event { stop, place });
            }
            if watched && place == until {
                return Ok(last);
            }
            if !watched && let stop @ Stop::Watch(_) = self.step_again()? {
                last = Some(Event { stop, place: self.place() });
            }
        }
    }

    /// Puts everything into the state of the last point at or before `instructions`.
    fn rewind(&mut self, instructions: u64) -> Result<(), Cut> {
        let Some(timeline) = &mut self.timeline else { return Err(Cut::Ended) };
        if !timeline.go_back(instructions, &mut self.cpu, &mut *self.engine, &self.lifecycle) {
            return Err(Cut::Ended);
        }
        if let TimeKeeper::Instructions(lockstep) = &self.time {
            lockstep.jumped(self.cpu.instructions);
        }
        Ok(())
    }

    /// To the last place before `place`; false if there is none, and the beginning is reached.
    fn step_before(&mut self, place: Place) -> Result<bool, Cut> {
        let steps = self.steps_to(place)?;
        self.near(place)?;
        self.engine.set_debug(&self.plan);
        for _ in 1..steps {
            self.step_again()?;
        }
        Ok(steps > 0)
    }

    /// To `place`, from an instruction before it; how many steps that took.
    fn steps_to(&mut self, place: Place) -> Result<u64, Cut> {
        self.near(place)?;
        self.engine.set_debug(&self.plan);
        let mut steps = 0;
        while self.place() != place && self.cpu.instructions <= place.instructions {
            match self.step_again() {
                Err(Cut::ShutDown) => break,
                stepped => stepped?,
            };
            steps += 1;
        }
        Ok(steps)
    }

    /// To one instruction before `place`, or to the beginning.
    fn near(&mut self, place: Place) -> Result<(), Cut> {
        let before = place.instructions.saturating_sub(1);
        self.rewind(before)?;
        // Nothing stops it on the way.
        self.engine.set_debug(&Arc::new(DebugPlan::default()));
        while self.cpu.instructions < before {
            self.advance(before)?;
        }
        Ok(())
    }

    /// Runs until `to` instructions have retired, or something is to be told.
    fn advance(&mut self, to: u64) -> Result<Option<DebugStop>, Cut> {
        while self.cpu.instructions < to {
            let left = to - self.cpu.instructions;
            let budget = Budget { instructions: self.budget().instructions.min(left) };
            let before = self.cpu.instructions;
            let exit = self.engine.run(&mut self.cpu, &self.mem, &*self.bus, budget);
            self.time_passed(self.cpu.instructions.wrapping_sub(before), exit == Exit::Halt);
            self.follow_a20();
            self.still_wanted()?;
            match exit {
                Exit::Debug(stop) => return Ok(Some(stop)),
                Exit::Halt => self.sleep(),
                Exit::Stop => drop(self.vcpu.attention().take(paravane_cpu::Attention::STOP)),
                Exit::Budget => {}
                Exit::TripleFault => return Err(Cut::ShutDown),
                Exit::Unsupported => return Err(Cut::Ended),
            }
        }
        Ok(None)
    }

    /// The debugger changed something: what was before leads elsewhere.
    pub fn changed(&mut self) {
        if let Some(timeline) = &mut self.timeline {
            timeline.changed(&self.cpu);
        }
    }

    /// Whether what happens must not be changed: the run is recorded, or is a recorded one.
    pub fn is_fixed(&self) -> bool {
        self.timeline.as_ref().is_some_and(|t| t.is_fixed())
    }
}

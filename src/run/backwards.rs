//! vCPUs under a debugger that go back: to a point of the run's history, and forward again to just before where they were.
//!
//! Time runs forward only. What happened last before a place is found by running from the nearest point before it, stopping where the
//! debugger would have, and remembering the last time; a second run from the same point ends there. There is one order in which the
//! instructions of all vCPUs were executed, and a place is between two of them.

use super::held::Met;
use super::rota::{Ended, Rota};
use crate::debug::Stop;
use paravane_cpu::{DebugPlan, DebugStop, Exit, gpr};
use std::sync::Arc;

/// Where a run is between two instructions, as far as it takes to know the place again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Place {
    /// Retired by all.
    instructions: u64,
    now: u64,
    /// Whose turn it is, and where he is.
    turn: usize,
    rip: u64,
    rsp: u64,
    rcx: u64,
    cs: u16,
}

impl Place {
    /// Whether this is an earlier iteration of the repeated string instruction that stands still at `other`.
    fn iterates_to(&self, other: &Place) -> bool {
        self.rcx > other.rcx && Place { rcx: other.rcx, now: other.now, ..*self } == *other
    }
}

/// One step of what ran before: whose it was, whether it was one, and what was watched and accessed.
type Stepped = (usize, bool, Option<DebugStop>);

/// Something the debugger would have stopped at.
struct Event {
    who: usize,
    stop: Stop,
    /// Where the run was then.
    place: Place,
}

/// Why running through the past came to an end too early.
enum Cut {
    /// The run is to end.
    Ended,
    /// A processor shut down, as it did at the end of what ran.
    ShutDown(usize),
    /// The debugger wants no more of it.
    Paused,
}

impl Rota {
    fn place(&self) -> Place {
        let turn = self.turn();
        let cpu = &self.vcpus[turn].cpu;
        Place {
            instructions: self.retired(),
            now: self.now(),
            turn,
            rip: cpu.rip,
            rsp: cpu.gpr[gpr::RSP],
            // A repeated string instruction can stop in the middle.
            rcx: cpu.gpr[gpr::RCX],
            cs: cpu.seg[1].selector,
        }
    }

    /// To before the last instruction of `who`.
    pub(super) fn reverse_step(&mut self, who: usize) -> Result<Met, Ended> {
        self.held.fill(false);
        let here = self.place();
        let stop = self.step_before(here, who);
        self.arrived(stop.map(|stepped| (who, if stepped { Stop::Stepped } else { Stop::Beginning })))
    }

    /// To the last place at which the debugger would have stopped, or to the beginning.
    pub(super) fn reverse_continue(&mut self) -> Result<Met, Ended> {
        self.held.fill(false);
        let stop = self.find_back();
        self.arrived(stop)
    }

    fn arrived(&mut self, met: Result<Met, Cut>) -> Result<Met, Ended> {
        self.arm_again();
        met.or_else(|cut| match cut {
            Cut::Ended => Err(Ended),
            Cut::Paused => Ok((self.turn(), Stop::Paused)),
            Cut::ShutDown(who) => Ok((who, Stop::TripleFault(self.vcpus[who].dossier().into()))),
        })
    }

    /// When points were taken that lie at or before `instructions`, the latest first.
    fn points_before(&self, instructions: u64) -> Vec<u64> {
        let points = self.time.timeline.points().into_iter().rev().map(|at| at.instructions);
        points.filter(|&at| at <= instructions).collect()
    }

    fn find_back(&mut self) -> Result<Met, Cut> {
        let here = self.place();
        let mut until = here;
        let points = self.points_before(here.instructions);
        for &at in &points {
            self.rewind(at)?;
            let beginning = self.place();
            if beginning != until
                && let Some(event) = self.last_event(until)?
            {
                return self.go_to(event);
            }
            until = beginning;
        }
        self.go_to_oldest(&points)?;
        Ok((self.turn(), Stop::Beginning))
    }

    /// To the oldest of `points`; where there is none what ran is not known.
    fn go_to_oldest(&mut self, points: &[u64]) -> Result<(), Cut> {
        points.last().map_or(Ok(()), |&oldest| self.rewind(oldest))
    }

    fn go_to(&mut self, event: Event) -> Result<Met, Cut> {
        let Event { who, stop, place } = event;
        match stop {
            // An access is undone: the instruction that makes it is the next.
            Stop::Watch(_) => drop(self.step_before(place, who)?),
            _ => self.go_to_place(place)?,
        }
        Ok((who, stop))
    }

    /// Engines stop where the debugger wants them to.
    fn arm_again(&mut self) {
        self.vcpus.iter_mut().for_each(|vcpu| vcpu.set_debug(&Arc::clone(&vcpu.plan)));
    }

    /// Nothing stops engines.
    fn disarm(&mut self) {
        let nothing = Arc::new(DebugPlan::default());
        self.vcpus.iter_mut().for_each(|vcpu| vcpu.set_debug(&nothing));
    }

    /// What the guest asked of the machine at the end of what ran is known; only the user ends the run now.
    fn still_wanted(&self) -> Result<(), Cut> {
        if self.lifecycle().requested() && self.lifecycle().withdraw().is_none() {
            return Err(Cut::Ended);
        }
        if self.debugger_wants_stop() { Err(Cut::Paused) } else { Ok(()) }
    }

    /// As [`Self::step_again`], but not beyond `until`, inside a repetition; whether that was reached by it.
    fn step_towards(&mut self, until: Place) -> Result<(Stepped, bool), Cut> {
        let here = self.place();
        if !here.iterates_to(&until) {
            return Ok((self.step_again()?, false));
        }
        // The iterations behind `until` are put aside. What the counter says nobody but the instruction sees.
        let turn = self.turn();
        let before = self.vcpus[turn].cpu.instructions;
        self.vcpus[turn].cpu.gpr[gpr::RCX] = here.rcx - until.rcx;
        let stepped = self.step_again();
        let cpu = &mut self.vcpus[turn].cpu;
        cpu.gpr[gpr::RCX] = cpu.gpr[gpr::RCX].wrapping_add(until.rcx);
        let reached = cpu.instructions != before;
        if reached {
            (cpu.rip, cpu.instructions) = (here.rip, before);
        }
        Ok((stepped?, reached))
    }

    /// One step of what ran before, whoever's turn it is.
    fn step_again(&mut self) -> Result<Stepped, Cut> {
        let turn = self.turn();
        if self.vcpus[turn].waiting {
            self.ran(u64::MAX)?;
            return Ok((turn, !self.vcpus[turn].waiting, None));
        }
        let (who, exit, retired) = self.step_turn(true);
        self.still_wanted()?;
        match exit {
            Exit::TripleFault => Err(Cut::ShutDown(who)),
            Exit::Unsupported => Err(Cut::Ended),
            Exit::Debug(stop) => Ok((who, true, Some(stop))),
            Exit::Halt => Ok((who, retired > 0, None)),
            Exit::Budget | Exit::Stop => Ok((who, true, None)),
        }
    }

    /// Runs on for `limit` instructions at most; who stopped for the debugger.
    fn ran(&mut self, limit: u64) -> Result<Option<(usize, DebugStop)>, Cut> {
        let (who, exit) = self.advance(limit);
        self.still_wanted()?;
        match exit {
            Exit::Debug(stop) => Ok(Some((who, stop))),
            Exit::TripleFault => Err(Cut::ShutDown(who)),
            Exit::Unsupported => Err(Cut::Ended),
            Exit::Halt | Exit::Stop | Exit::Budget => Ok(None),
        }
    }

    /// Runs until `to` instructions have retired, or something is to be told.
    fn advance_to(&mut self, to: u64) -> Result<Option<(usize, DebugStop)>, Cut> {
        while self.retired() < to {
            if let Some(stop) = self.ran(to - self.retired())? {
                return Ok(Some(stop));
            }
        }
        Ok(None)
    }

    /// Runs from here to `until`; what the debugger would have stopped at last before that.
    fn last_event(&mut self, until: Place) -> Result<Option<Event>, Cut> {
        self.arm_again();
        let mut last = None;
        loop {
            let met = match self.advance_to(until.instructions) {
                Err(Cut::ShutDown(_)) => return Ok(last),
                Err(cut) => return Err(cut),
                Ok(Some(met)) => Some(met),
                // The last steps one by one: there may be exceptions and interrupts, which retire nothing.
                Ok(None) if self.place() == until || self.retired() > until.instructions => return Ok(last),
                Ok(None) => {
                    let turn = self.turn();
                    self.vcpus[turn].at_breakpoint().map(|at| (turn, DebugStop::Breakpoint(at)))
                }
            };
            let place = self.place();
            let watched = matches!(met, Some((_, DebugStop::Watch(_))));
            if place == until && !watched {
                return Ok(last);
            }
            last = met.and_then(|(who, stop)| self.event(who, stop)).or(last);
            if watched && place == until {
                return Ok(last);
            }
            if !watched {
                let ((who, _, stop), reached) = self.step_towards(until)?;
                last = stop.and_then(|stop| self.event(who, stop)).or(last);
                if reached {
                    return Ok(last);
                }
            }
        }
    }

    /// `stop` of `who`, here, if the debugger is told of it.
    fn event(&self, who: usize, stop: DebugStop) -> Option<Event> {
        let stop = self.vcpus[who].relevant(stop)?;
        Some(Event { who, stop, place: self.place() })
    }

    /// Puts everything into the state of the last point at or before `instructions`.
    fn rewind(&mut self, instructions: u64) -> Result<(), Cut> {
        let lifecycle = self.lifecycle().clone();
        if !self.time.timeline.go_back(instructions, &mut self.vcpus, &lifecycle) {
            return Err(Cut::Ended);
        }
        self.vcpus[0].dma.forget();
        self.jumped();
        Ok(())
    }

    /// To before the last step of `who` before `place`; false if there is none, and the beginning is reached.
    fn step_before(&mut self, place: Place, who: usize) -> Result<bool, Cut> {
        let retired = self.vcpus[who].cpu.instructions;
        let points = self.points_before(place.instructions);
        for &at in &points {
            self.near(at, place, who, retired)?;
            let Some(steps) = self.last_step(place, who)? else { continue };
            self.near(at, place, who, retired)?;
            self.arm_again();
            for _ in 0..steps {
                self.step_again()?;
            }
            return Ok(true);
        }
        self.go_to_oldest(&points)?;
        Ok(false)
    }

    /// From the point at `at` to where `who` has retired all but one of `retired` instructions, but not as far as `place`.
    fn near(&mut self, at: u64, place: Place, who: usize, retired: u64) -> Result<(), Cut> {
        self.rewind(at)?;
        self.disarm();
        loop {
            let own = retired.saturating_sub(self.vcpus[who].cpu.instructions + 1);
            let left = place.instructions.saturating_sub(self.retired() + 1);
            match (own, left) {
                (0, _) | (_, 0) => return Ok(()),
                _ if self.turn() == who => drop(self.ran(own.min(left))?),
                _ => drop(self.ran(left)?),
            }
        }
    }

    /// Steps from here to `place`; after how many of these steps the last of `who` began.
    fn last_step(&mut self, place: Place, who: usize) -> Result<Option<u64>, Cut> {
        self.arm_again();
        let (mut steps, mut last) = (0, None);
        while self.place() != place && self.retired() <= place.instructions {
            match self.step_towards(place) {
                Ok(((stepped, stepped_on, _), reached)) => {
                    last = (stepped == who && stepped_on).then_some(steps).or(last);
                    if reached {
                        return Ok(last);
                    }
                }
                Err(Cut::ShutDown(down)) => {
                    // Nothing was done but what shut it down.
                    return Ok(if down == who { Some(steps) } else { last });
                }
                Err(cut) => return Err(cut),
            }
            steps += 1;
        }
        Ok(last)
    }

    /// To `place`, from an instruction before it.
    fn go_to_place(&mut self, place: Place) -> Result<(), Cut> {
        self.rewind(place.instructions.saturating_sub(1))?;
        self.disarm();
        self.advance_to(place.instructions.saturating_sub(1))?;
        while self.place() != place && self.retired() <= place.instructions {
            match self.step_again() {
                Err(Cut::ShutDown(_)) => break,
                stepped => drop(stepped?),
            }
        }
        Ok(())
    }
}

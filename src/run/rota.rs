//! vCPUs by the instruction clock: they take turns on one thread, always in the same order, so that every run is the same.
//!
//! In a round every vCPU has a slice from the same machine time on; then time moves by the longest of them, and what became due
//! happens. How long the slices are is decided when the round begins, whoever interrupts it meanwhile. With one vCPU a round is a slice.

use super::lifecycle::{Lifecycle, Request};
use super::vcpu::VcpuRunner;
use crate::debug::Link;
use crate::machine::{InstructionClock, LockstepDisk};
use crate::replay::{Outside, Stamp, Timeline};
use paravane_cpu::{Budget, Exit};
use paravane_devices::block::BlockBackend;
use paravane_devices::{Clock, TimerQueue, VmTime};
use std::sync::Arc;

/// Instructions in one slice: how far machine time may lag behind inside guest code.
const SLICE: u64 = 10_000;

/// What happens between two rounds.
pub struct Lockstep {
    /// The clock that is moved.
    pub clock: Arc<InstructionClock>,
    /// The timers that are fired.
    pub timers: Arc<TimerQueue>,
    /// The disks whose requests are completed.
    pub disks: Vec<Arc<LockstepDisk>>,
    /// Where input comes in.
    pub outside: Arc<Outside>,
    /// Checkpoints, and whatever else depends on them.
    pub timeline: Timeline,
}

impl Lockstep {
    /// Does what disks were asked for, at the end of the run.
    pub(super) fn rest(&self) {
        self.disks.iter().for_each(|disk| disk.drain());
    }

    /// How many instructions the next slices may have.
    fn length(&self) -> u64 {
        let left = self.timers.next_deadline().map_or(SLICE, |at| at.since(self.clock.now()));
        left.clamp(1, SLICE)
    }

    /// Time passes by `instructions`, and what became due happens.
    fn passed(&self, instructions: u64) {
        self.clock.retire(instructions);
        self.disks.iter().for_each(|disk| disk.settle());
        self.timers.run_expired(self.clock.now());
    }

    /// Jumps to the next deadline, or lets a slice pass where a disk has something to do yet: a completion can lead to another request
    /// without the guest. False if nothing will happen.
    fn skip(&self) -> bool {
        let next = match self.disks.iter().all(|disk| disk.idle()) {
            true => self.timers.next_deadline(),
            false => Some(VmTime(self.clock.now().0 + self.length())),
        };
        let Some(next) = next else { return false };
        self.clock.skip_to(next);
        self.timers.run_expired(self.clock.now());
        true
    }
}

/// The round that is under way.
#[derive(Default, Debug)]
struct Round {
    /// Instructions that each slice has; 0 between two rounds.
    length: u64,
    /// Whose turn it is.
    turn: usize,
    /// Instructions of his slice that have retired.
    done: u64,
    /// The longest slice so far.
    longest: u64,
    /// Somebody has more to do.
    busy: bool,
}

/// The run is to end.
pub(super) struct Ended;

/// vCPUs that take turns.
pub struct Rota {
    /// All of them, at least one.
    pub vcpus: Vec<VcpuRunner>,
    /// What happens between rounds.
    pub time: Lockstep,
    /// Those that the debugger holds back.
    pub(super) held: Vec<bool>,
    round: Round,
    /// Nobody had more to do when the last round ended.
    idle: bool,
    /// When that was.
    last: Option<Stamp>,
}

impl Rota {
    /// `vcpus` at the beginning of a round.
    pub fn new(mut vcpus: Vec<VcpuRunner>, mut time: Lockstep) -> Rota {
        if let [sleeper, others @ ..] = vcpus.as_slice() {
            others.iter().for_each(|other| other.vcpu.sleep_with(&sleeper.vcpu));
        }
        for vcpu in &mut vcpus {
            vcpu.past.goes_back = time.timeline.goes_back();
            vcpu.past.fixed = time.timeline.is_fixed();
        }
        time.timeline.starts_again(&vcpus);
        Rota { held: vec![false; vcpus.len()], vcpus, time, round: Round::default(), idle: false, last: None }
    }

    pub(super) fn lifecycle(&self) -> &Lifecycle {
        &self.vcpus[0].lifecycle
    }

    pub(super) fn link(&self) -> Option<Arc<Link>> {
        self.vcpus[0].debug.clone()
    }

    /// Runs until a lifecycle request is there.
    pub fn run(&mut self) {
        self.begin();
        while !self.slice(u64::MAX) {}
    }

    fn begin(&mut self) {
        self.vcpus.iter_mut().for_each(VcpuRunner::begin);
        let lifecycle = self.lifecycle().clone();
        self.time.timeline.between(&mut self.vcpus, &lifecycle);
    }

    /// Whoever's turn it is goes on, for `limit` instructions at most; true if the run ends.
    pub fn slice(&mut self, limit: u64) -> bool {
        let (who, exit) = self.advance(limit);
        self.met(who, exit)
    }

    /// Instructions that have retired in this run.
    pub(super) fn retired(&self) -> u64 {
        self.vcpus.iter().map(|vcpu| vcpu.cpu.instructions).sum()
    }

    /// Machine time; it stands still inside a round.
    pub(super) fn now(&self) -> u64 {
        self.time.clock.now().0
    }

    /// Whose turn it is.
    pub(super) fn turn(&self) -> usize {
        self.round.turn
    }

    /// The run goes on elsewhere, at a point between two rounds, before what comes in there.
    pub(super) fn jumped(&mut self) {
        let at = self.stamp();
        (self.round, self.idle, self.last) = (Round::default(), false, Some(at));
        self.time.outside.deliver(at);
    }

    fn stamp(&self) -> Stamp {
        Stamp { ns: self.now(), instructions: self.retired() }
    }

    /// Sees to it that a round is under way. Where nobody has anything to do time jumps to the next deadline, or everybody sleeps.
    fn begin_round(&mut self) {
        if self.round.length > 0 {
            return;
        }
        if std::mem::take(&mut self.idle) && !self.anybody_called() && !self.time.skip() {
            self.vcpus[0].vcpu.sleep_until(|| self.anybody_called());
        }
        self.round.length = self.time.length();
    }

    /// Whoever's turn it is goes on, for `limit` instructions at most, or passes; who it was, and how it came to its end.
    pub(super) fn advance(&mut self, limit: u64) -> (usize, Exit) {
        let (who, exit) = self.take_turn(limit);
        self.with_devices(who, exit)
    }

    /// A watched access of a device, be it at the end of the round, ends what ran just as the processors' own do.
    fn with_devices(&self, who: usize, exit: Exit) -> (usize, Exit) {
        if !matches!(exit, Exit::Halt | Exit::Budget | Exit::Stop) {
            return (who, exit);
        }
        let mut all = std::iter::once(who).chain(0..self.vcpus.len());
        let hit = all.find_map(|n| self.vcpus[n].device_hit().map(|stop| (n, Exit::Debug(stop))));
        hit.unwrap_or((who, exit))
    }

    fn take_turn(&mut self, limit: u64) -> (usize, Exit) {
        self.begin_round();
        let who = self.round.turn;
        let vcpu = &mut self.vcpus[who];
        if self.held[who] {
            // It would have had its turn.
            vcpu.past.changed = true;
            self.passed(0, true);
            return (who, Exit::Budget);
        }
        if vcpu.waiting && !vcpu.called() {
            self.passed(0, true);
            return (who, Exit::Halt);
        }
        let before = vcpu.cpu.instructions;
        let left = self.round.length - self.round.done;
        let exit = match vcpu.waiting {
            true => Exit::Stop,
            false => {
                let budget = Budget { instructions: left.min(limit) };
                vcpu.engine.run(&mut vcpu.cpu, &vcpu.mem, &*vcpu.bus, budget)
            }
        };
        if exit == Exit::Stop {
            vcpu.take_calls();
        }
        self.passed(self.vcpus[who].cpu.instructions.wrapping_sub(before), exit == Exit::Halt);
        (who, exit)
    }

    /// Whoever's turn it is executes one instruction. `interrupts`: it takes pending ones.
    pub(super) fn step_turn(&mut self, interrupts: bool) -> (usize, Exit, u64) {
        self.begin_round();
        let who = self.round.turn;
        let vcpu = &mut self.vcpus[who];
        let before = vcpu.cpu.instructions;
        let exit = vcpu.engine.step(&mut vcpu.cpu, &vcpu.mem, &*vcpu.bus, interrupts);
        let retired = vcpu.cpu.instructions.wrapping_sub(before);
        vcpu.follow_a20();
        self.passed(retired, exit == Exit::Halt);
        let (who, exit) = self.with_devices(who, exit);
        (who, exit, retired)
    }

    /// `retired` more of the slice have; `over`: there is no more to do in it.
    fn passed(&mut self, retired: u64, over: bool) {
        let round = &mut self.round;
        round.done += retired;
        if !over && round.done < round.length {
            return;
        }
        round.busy |= !over;
        round.longest = round.longest.max(round.done);
        (round.turn, round.done) = (round.turn + 1, 0);
        if round.turn == self.vcpus.len() {
            self.end_round();
        }
    }

    /// What became due happens, then there may be a checkpoint, then input comes in. A round in which nothing happened at the time of the
    /// last one is none: somebody outside called everybody up. So whatever comes in at one time does so at the end of its first round.
    fn end_round(&mut self) {
        let Round { longest, busy, .. } = std::mem::take(&mut self.round);
        self.idle = !busy;
        if busy || longest > 0 || self.last != Some(self.stamp()) {
            self.follow_changes();
            self.time.passed(longest);
            let lifecycle = self.lifecycle().clone();
            self.time.timeline.between(&mut self.vcpus, &lifecycle);
        }
        let at = self.stamp();
        self.last = Some(at);
        self.time.outside.deliver(at);
    }

    fn anybody_called(&self) -> bool {
        self.vcpus.iter().zip(&self.held).any(|(vcpu, held)| !held && vcpu.called())
    }

    /// What the debugger changed leads elsewhere than what was before.
    pub(super) fn follow_changes(&mut self) {
        let changed = |vcpu: &mut VcpuRunner| std::mem::take(&mut vcpu.past.changed);
        if self.vcpus.iter_mut().map(changed).fold(false, |any, one| any | one) {
            self.time.timeline.changed(&self.vcpus);
        }
    }

    /// Does what there is to do about the end of a turn; true if the run ends.
    fn met(&mut self, who: usize, exit: Exit) -> bool {
        match exit {
            Exit::Halt | Exit::Budget => false,
            Exit::Stop => self.stopped(who),
            Exit::Debug(stop) => self.debug_event(who, stop),
            Exit::TripleFault => self.shut_down(who),
            Exit::Unsupported => {
                self.unsupported(who);
                true
            }
        }
    }

    pub(super) fn unsupported(&self, who: usize) {
        self.lifecycle().request(Request::Host(self.vcpus[who].unsupported()));
    }

    /// Somebody called.
    fn stopped(&mut self, who: usize) -> bool {
        if self.lifecycle().requested() {
            return self.ending();
        }
        if self.debugger_wants_stop() {
            return self.paused(who);
        }
        self.vcpus[who].look();
        false
    }
}

//! What happens between two slices of a run by the instruction clock, beside timers, disks and input: checkpoints, state hashes, the
//! comparison with a recorded run, and points to go back to.

use super::history::History;
use super::journal::Stamp;
use super::port::Outside;
use super::ram::Ram;
use super::record::{Check, End, Recorder, Recording};
use super::state::{PartError, Parts, whole};
use crate::run::{Lifecycle, Request};
use paravane_cpu::{CpuState, Engine, Shadow};
use paravane_memory::GuestMemory;
use std::collections::VecDeque;
use std::sync::Arc;

/// Instructions between two checkpoints.
const INTERVAL: u64 = 1 << 24;

/// What is asked of a timeline.
#[derive(Default)]
pub struct Wishes {
    /// Tell the hash of all state once this many instructions have retired.
    pub hash_at: Option<u64>,
    /// Write what comes in.
    pub record: Option<Recorder>,
    /// Run this again.
    pub replay: Option<Recording>,
    /// Take points to go back to.
    pub history: bool,
}

/// What is left of a recorded run.
struct Recorded {
    checks: VecDeque<Check>,
    /// Where it ends, and why.
    end: End,
    /// Where the last comparison found no difference.
    agreed: Stamp,
}

/// See the module's documentation.
pub struct Timeline {
    parts: Parts,
    outside: Arc<Outside>,
    mem: GuestMemory,
    ram: Ram,
    /// Instructions at which the next checkpoint is due.
    next_check: u64,
    hash_at: Option<u64>,
    /// Hashes are written up to here.
    written: Stamp,
    recorded: Option<Recorded>,
    /// That the recording ended was told.
    told_end: bool,
    history: Option<History>,
}

impl Timeline {
    /// The timeline of the machine that `parts`, `outside` and `mem` belong to.
    pub fn new(parts: Parts, outside: Arc<Outside>, mem: &GuestMemory, wishes: Wishes) -> Timeline {
        let Wishes { hash_at, record, replay, history } = wishes;
        if history {
            outside.journal().keep();
            parts.disks.iter().for_each(|disk| disk.keep_undo());
        }
        if let Some(recorder) = record {
            outside.journal().record(recorder);
        }
        let recorded = replay.map(|recording| {
            let last = recording.last();
            let cut = || End { at: last, why: "the recording was cut off".to_owned() };
            let Recording { machine: _, inputs, checks, end } = recording;
            outside.journal().replay(inputs);
            Recorded { checks: checks.into(), end: end.unwrap_or_else(cut), agreed: Stamp::default() }
        });
        Timeline {
            parts,
            outside,
            mem: mem.clone(),
            ram: Ram::new(mem),
            next_check: 0,
            hash_at,
            written: Stamp::default(),
            recorded,
            told_end: false,
            history: history.then(History::default),
        }
    }

    /// Where the run is, between two slices.
    pub(super) fn stamp(&self, cpu: &CpuState) -> Stamp {
        Stamp { ns: self.parts.now().0, instructions: cpu.instructions }
    }

    /// Whether points to go back to are taken.
    pub fn goes_back(&self) -> bool {
        self.history.is_some()
    }

    /// Whether the run is a recorded one.
    pub fn replays(&self) -> bool {
        self.recorded.is_some()
    }

    /// Whether the run is a recorded one, or one that is recorded.
    pub fn is_fixed(&self) -> bool {
        self.recorded.is_some() || self.outside.journal().recorder().is_some()
    }

    /// Between two slices.
    pub fn between(&mut self, cpu: &CpuState, engine: &mut dyn Engine, lifecycle: &Lifecycle) {
        if self.hash_at.is_some_and(|n| cpu.instructions >= n) && self.parts.at_rest() {
            self.tell_hash(cpu);
        }
        if cpu.instructions >= self.next_check && self.parts.at_rest() && cpu.shadow == Shadow::None {
            self.checkpoint(cpu, engine, lifecycle);
        }
        if self.recorded.is_some() {
            self.follow_recording(cpu, lifecycle);
        }
    }

    /// When points to go back to were taken, the oldest first.
    pub fn points(&self) -> Vec<Stamp> {
        self.history.as_ref().map_or(Vec::new(), |h| h.stamps().collect())
    }

    /// Puts the machine into the state of the last point at or before `instructions`, or of the oldest. False: it cannot be done, and the
    /// run is over.
    pub fn go_back(
        &mut self,
        instructions: u64,
        cpu: &mut CpuState,
        engine: &mut dyn Engine,
        lifecycle: &Lifecycle,
    ) -> bool {
        let now = self.stamp(cpu);
        let Some(history) = &mut self.history else { return false };
        let Some(i) = history.at_or_before(instructions) else { return false };
        // What it set aside belongs to the present.
        engine.start_over(cpu);
        match history.restore(i, now, cpu, &self.parts, &mut self.ram) {
            Ok(at) => {
                engine.start_over(cpu);
                self.outside.journal().rewind(at);
                self.next_check = next_check(at.instructions);
                true
            }
            Err(e) => {
                lifecycle.request(Request::Host(format!("the machine's state cannot be put back: {e}")));
                false
            }
        }
    }

    /// The run was changed by hand, or starts again: what was before does not lead here.
    pub fn changed(&mut self, cpu: &CpuState) {
        let now = self.stamp(cpu);
        if let Some(history) = &mut self.history {
            history.restart(now);
            self.parts.disks.iter().for_each(|disk| drop(disk.take_undo()));
            self.outside.journal().forget_future();
            self.outside.ports().iter().for_each(|port| port.forget_future());
            self.next_check = 0;
        }
    }

    fn tell_hash(&mut self, cpu: &CpuState) {
        match self.hash(cpu) {
            Ok(hash) => {
                println!("state after {} instructions: {hash:032x}", cpu.instructions);
                self.hash_at = None;
            }
            // A device in the middle of something: a slice later it is not.
            Err(_busy) => {}
        }
    }

    /// A hash of all state of the machine.
    pub fn hash(&self, cpu: &CpuState) -> Result<u128, PartError> {
        Ok(whole(&self.parts.digest(cpu, Ram::hash_now(&self.mem))?))
    }

    fn checkpoint(&mut self, cpu: &CpuState, engine: &mut dyn Engine, lifecycle: &Lifecycle) {
        self.next_check = next_check(cpu.instructions);
        engine.start_over(cpu);
        let at = self.stamp(cpu);
        if let Some(history) = &mut self.history {
            if let Err(e) = history.take(at, cpu, &self.parts, &mut self.ram) {
                lifecycle.request(Request::Host(format!("the machine's state cannot be kept: {e}")));
            }
            if let Some(oldest) = history.stamps().next() {
                self.outside.journal().forget_before(oldest);
            }
        } else if self.is_fixed() {
            self.ram.look(|_, _| ());
        }
        if self.is_fixed() {
            self.compare(at, cpu, lifecycle);
        }
    }

    /// Writes the state's hashes, or compares them with those that were written.
    fn compare(&mut self, at: Stamp, cpu: &CpuState, lifecycle: &Lifecycle) {
        let digest = match self.parts.digest(cpu, self.ram.hash()) {
            Ok(digest) => digest,
            Err(e) => {
                return lifecycle.request(Request::Host(format!("the machine's state has no hash: {e}")));
            }
        };
        let check = Check::new(at, cpu.rip, &digest);
        if at > self.written || at == Stamp::default() {
            self.written = at;
            if let Some(recorder) = self.outside.journal().recorder() {
                recorder.check(&check);
            }
        }
        let Some(recorded) = &mut self.recorded else { return };
        let Some(expected) = recorded.checks.front() else { return };
        if expected.at > at {
            return;
        }
        if *expected == check {
            recorded.agreed = at;
            recorded.checks.pop_front();
            return;
        }
        let text = difference(expected, &check, recorded.agreed);
        lifecycle.request(Request::Host(text));
    }

    /// Notices the end of a recorded run, and input that found no place in this one.
    fn follow_recording(&mut self, cpu: &CpuState, lifecycle: &Lifecycle) {
        let at = self.stamp(cpu);
        let Some(recorded) = &self.recorded else { return };
        if let Some(input) = self.outside.journal().take_missed() {
            let text = format!(
                "the replay differs from the recorded run after {} instructions (rip {:#x}): input came in after {} instructions \
                 at {} ns, this run is at {} ns",
                at.instructions, cpu.rip, input.at.instructions, input.at.ns, at.ns
            );
            lifecycle.request(Request::Host(text));
        } else if at >= recorded.end.at && !lifecycle.requested() {
            if !std::mem::replace(&mut self.told_end, true) {
                eprintln!(
                    "paravane: the recording ends after {} instructions: {}",
                    recorded.end.at.instructions, recorded.end.why
                );
            }
            lifecycle.request(Request::Done);
        }
    }

    /// The run is over; `why`, for people.
    pub fn end(&mut self, cpu: &CpuState, why: String) {
        let end = End { at: self.stamp(cpu), why };
        if let Some(recorder) = self.outside.journal().recorder() {
            recorder.end(&end);
        }
    }
}

fn next_check(instructions: u64) -> u64 {
    (instructions / INTERVAL + 1) * INTERVAL
}

fn difference(expected: &Check, found: &Check, agreed: Stamp) -> String {
    let parts: Vec<&str> = expected
        .parts
        .iter()
        .filter(|(name, hash)| found.parts.get(*name) != Some(hash))
        .map(|(name, _)| name.as_str())
        .collect();
    let parts = if parts.is_empty() { "nothing but the time" } else { &parts.join(", ") };
    let point = |c: &Check| format!("{} instructions, {} ns, rip {:#x}", c.at.instructions, c.at.ns, c.rip);
    format!(
        "the replay differs from the recorded run, somewhere after {} instructions: expected {}; found {}; what differs: {parts}",
        agreed.instructions,
        point(expected),
        point(found)
    )
}

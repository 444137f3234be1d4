//! What happens between two slices of a run by the instruction clock, beside timers, disks and input: checkpoints, state hashes, the
//! comparison with a recorded run, and points to go back to.

use super::cpu::Processor;
use super::difference;
use super::history::History;
use super::journal::Stamp;
use super::port::Outside;
use super::ram::{Changed, Ram};
use super::record::{Check, End, Recorder, Recording};
use super::state::{PartError, Parts, digest, whole};
use crate::run::{Lifecycle, Request, VcpuRunner};
use paravane_cpu::Shadow;
use paravane_devices::Named;
use paravane_memory::GuestMemory;
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

/// A recorded run, and how far this one has come in it.
struct Recorded {
    checks: Vec<Check>,
    /// The next of them.
    next: usize,
    /// Where it ends, and why.
    end: End,
}

impl Recorded {
    /// The run is at `at` again, behind what was compared there.
    fn rewind(&mut self, at: Stamp) {
        self.next = self.checks.partition_point(|check| check.at <= at);
    }

    /// The bytes of its parts at the next check.
    fn bytes(&self) -> difference::Recorded {
        let until = self.checks.iter().take(self.next + 1);
        until.flat_map(|check| check.bytes.clone()).collect()
    }

    /// Compares `found` with the next check, if it is due: whether there is a difference.
    fn differs(&mut self, found: &Check) -> bool {
        match self.checks.get(self.next) {
            Some(expected) if expected.at <= found.at => {
                let agrees = expected.agrees(found);
                self.next += usize::from(agrees);
                !agrees
            }
            _ => false,
        }
    }

    /// What is different in `found`, whose parts are `now`, from the next check.
    fn difference(&self, found: &Check, now: &[(String, Named)]) -> String {
        let expected = &self.checks[self.next];
        let agreed = self.next.checked_sub(1).map_or(Stamp::default(), |last| self.checks[last].at);
        let point =
            |c: &Check| format!("{} instructions, {} ns, rip {:#x}", c.at.instructions, c.at.ns, c.rip);
        format!(
            "the replay differs from the recorded run, somewhere after {} instructions: expected {}; found {}; what differs: {}",
            agreed.instructions,
            point(expected),
            point(found),
            difference::parts(expected, found, &self.bytes(), now)
        )
    }
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
            Recorded { checks, next: 0, end: end.unwrap_or_else(cut) }
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
    pub(super) fn stamp(&self, vcpus: &[VcpuRunner]) -> Stamp {
        Stamp { ns: self.parts.now().0, instructions: retired(vcpus) }
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

    /// Between two slices, or rounds of slices.
    pub fn between(&mut self, vcpus: &mut [VcpuRunner], lifecycle: &Lifecycle) {
        let retired = retired(vcpus);
        if self.hash_at.is_some_and(|n| retired >= n) && self.parts.at_rest() {
            self.tell_hash(vcpus);
        }
        let in_shadow = || vcpus.iter().any(|vcpu| vcpu.cpu.shadow != Shadow::None);
        if retired >= self.next_check && self.parts.at_rest() && !in_shadow() {
            self.checkpoint(vcpus, lifecycle);
        }
        if self.recorded.is_some() {
            self.follow_recording(vcpus, lifecycle);
        }
    }

    /// When points to go back to were taken, the oldest first.
    pub fn points(&self) -> Vec<Stamp> {
        self.history.as_ref().map_or(Vec::new(), |h| h.stamps().collect())
    }

    /// Puts the machine into the state of the last point at or before `instructions`, or of the oldest. False: it cannot be done, and the
    /// run is over.
    pub fn go_back(&mut self, instructions: u64, vcpus: &mut [VcpuRunner], lifecycle: &Lifecycle) -> bool {
        let now = self.stamp(vcpus);
        let Some(history) = &mut self.history else { return false };
        let Some(i) = history.at_or_before(instructions) else { return false };
        // What engines set aside belongs to the present.
        start_over(vcpus);
        let mut processors = processors(vcpus);
        match history.restore(i, now, &mut processors, &self.parts, &mut self.ram) {
            Ok(at) => {
                vcpus.iter_mut().zip(processors).for_each(|(vcpu, processor)| processor.put(vcpu));
                start_over(vcpus);
                self.outside.journal().rewind(at);
                if let Some(recorded) = &mut self.recorded {
                    recorded.rewind(at);
                }
                self.next_check = next_check(at.instructions);
                true
            }
            Err(e) => {
                lifecycle.request(Request::Host(format!("the machine's state cannot be put back: {e}")));
                false
            }
        }
    }

    /// The run was changed by hand: what was before does not lead here, and what lay ahead never happens.
    pub fn changed(&mut self, vcpus: &[VcpuRunner]) {
        if self.history.is_some() {
            self.starts_again(vcpus);
            self.outside.journal().forget_future();
            self.outside.ports().iter().for_each(|port| port.forget_future());
        }
    }

    /// The machine was reset: what was before is not gone back to.
    pub fn starts_again(&mut self, vcpus: &[VcpuRunner]) {
        let now = self.stamp(vcpus);
        self.next_check = 0;
        if let Some(history) = &mut self.history {
            history.restart(now);
            self.parts.disks.iter().for_each(|disk| drop(disk.take_undo()));
        }
    }

    fn tell_hash(&mut self, vcpus: &[VcpuRunner]) {
        match self.hash(vcpus) {
            Ok(hash) => {
                println!("state after {} instructions: {hash:032x}", retired(vcpus));
                self.hash_at = None;
            }
            // A device in the middle of something: a slice later it is not.
            Err(_busy) => {}
        }
    }

    /// A hash of all state of the machine.
    pub fn hash(&self, vcpus: &[VcpuRunner]) -> Result<u128, PartError> {
        let sections = self.parts.comparable(&processors(vcpus))?;
        Ok(whole(&digest(&sections, Ram::hash_now(&self.mem))))
    }

    fn checkpoint(&mut self, vcpus: &mut [VcpuRunner], lifecycle: &Lifecycle) {
        self.next_check = next_check(retired(vcpus));
        start_over(vcpus);
        let (at, processors) = (self.stamp(vcpus), processors(vcpus));
        let fixed = self.is_fixed();
        let changes = match &mut self.history {
            Some(history) => history.take(at, &processors, &self.parts, &mut self.ram),
            None if fixed => Ok(self.ram.changes()),
            None => return,
        };
        if let Some(oldest) = self.history.as_ref().and_then(|history| history.stamps().next()) {
            self.outside.journal().forget_before(oldest);
        }
        let compared = changes.and_then(|pages| match fixed {
            true => self.compare(at, &processors, pages),
            false => Ok(None),
        });
        match compared {
            Ok(None) => {}
            Ok(Some(difference)) => lifecycle.request(Request::Host(difference)),
            Err(e) => lifecycle.request(Request::Host(format!("the machine's state cannot be kept: {e}"))),
        }
    }

    /// Writes the state's hashes, or compares them with those that were written: the difference, if there is one.
    fn compare(
        &mut self,
        at: Stamp,
        processors: &[Processor],
        pages: Vec<Changed>,
    ) -> Result<Option<String>, PartError> {
        let sections = self.parts.comparable(processors)?;
        let rip = processors.first().map_or(0, |first| first.cpu.rip);
        let check = Check { pages, ..Check::new(at, rip, &digest(&sections, self.ram.hash())) };
        if at > self.written || at == Stamp::default() {
            self.written = at;
            if let Some(recorder) = self.outside.journal().recorder() {
                recorder.check(&Check { bytes: sections.into_iter().collect(), ..check.clone() });
            }
        }
        let Some(recorded) = &mut self.recorded else { return Ok(None) };
        if !recorded.differs(&check) {
            return Ok(None);
        }
        Ok(Some(recorded.difference(&check, &self.parts.named(processors)?)))
    }

    /// Notices the end of a recorded run, and input that found no place in this one.
    fn follow_recording(&mut self, vcpus: &[VcpuRunner], lifecycle: &Lifecycle) {
        let at = self.stamp(vcpus);
        let Some(recorded) = &self.recorded else { return };
        if let Some(input) = self.outside.journal().take_missed() {
            let text = format!(
                "the replay differs from the recorded run after {} instructions (rip {:#x}): input came in after {} instructions \
                 at {} ns, this run is at {} ns",
                at.instructions, vcpus[0].cpu.rip, input.at.instructions, input.at.ns, at.ns
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
    pub fn end(&mut self, vcpus: &[VcpuRunner], why: String) {
        let end = End { at: self.stamp(vcpus), why };
        if let Some(recorder) = self.outside.journal().recorder() {
            recorder.end(&end);
        }
    }
}

fn next_check(instructions: u64) -> u64 {
    (instructions / INTERVAL + 1) * INTERVAL
}

/// Instructions that all of `vcpus` have retired.
fn retired(vcpus: &[VcpuRunner]) -> u64 {
    vcpus.iter().map(|vcpu| vcpu.cpu.instructions).sum()
}

fn start_over(vcpus: &mut [VcpuRunner]) {
    vcpus.iter_mut().for_each(|vcpu| vcpu.engine.start_over(&vcpu.cpu));
}

fn processors(vcpus: &[VcpuRunner]) -> Vec<Processor> {
    vcpus.iter().map(Processor::of).collect()
}

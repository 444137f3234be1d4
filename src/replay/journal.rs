//! What came in from outside, in order: kept so that a part of the run, or all of it, can be run again.

use super::record::Recorder;
use std::cmp::Ordering;

/// A point between two slices of a run.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Debug)]
pub struct Stamp {
    /// Machine time in nanoseconds; it never goes back.
    pub ns: u64,
    /// Instructions retired.
    pub instructions: u64,
}

/// Bytes that came in at a serial port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Input {
    /// When.
    pub at: Stamp,
    /// The port's number.
    pub port: usize,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// All input of a run, and how far it has come.
#[derive(Default)]
pub(super) struct Journal {
    inputs: Vec<Input>,
    next: usize,
    /// Whether inputs are kept, to go back to.
    keeps: bool,
    /// Nothing comes from the host: the run is a recorded one.
    replays: bool,
    recorder: Option<Recorder>,
    /// An input that was due at a point the run never came to.
    missed: Option<Input>,
}

impl Journal {
    /// Keeps what comes in from now on.
    pub(super) fn keep(&mut self) {
        self.keeps = true;
    }

    /// Writes what comes in from now on.
    pub(super) fn record(&mut self, recorder: Recorder) {
        self.recorder = Some(recorder);
    }

    /// `inputs` come in, and nothing else.
    pub(super) fn replay(&mut self, inputs: Vec<Input>) {
        (self.inputs, self.next, self.replays) = (inputs, 0, true);
    }

    /// Who writes, if anybody does.
    pub(super) fn recorder(&mut self) -> Option<&mut Recorder> {
        self.recorder.as_mut()
    }

    /// The host is listened to, now or once the present is reached again.
    pub(super) fn is_live(&self) -> bool {
        !self.replays
    }

    /// All that came in once has come in again.
    pub(super) fn is_present(&self) -> bool {
        self.next == self.inputs.len()
    }

    /// The next input that comes in at `at`.
    pub(super) fn due(&mut self, at: Stamp) -> Option<Input> {
        let input = self.inputs.get(self.next)?;
        match input.at.cmp(&at) {
            Ordering::Greater => return None,
            Ordering::Equal => {}
            Ordering::Less => self.missed = self.missed.take().or_else(|| Some(input.clone())),
        }
        self.next += 1;
        Some(input.clone())
    }

    /// Something came in.
    pub(super) fn note(&mut self, input: Input) {
        if let Some(recorder) = &mut self.recorder {
            recorder.input(&input);
        }
        if self.keeps {
            self.inputs.push(input);
            self.next = self.inputs.len();
        }
    }

    /// The run is at `at` again, before what came in there.
    pub(super) fn rewind(&mut self, at: Stamp) {
        self.next = self.inputs.partition_point(|input| input.at < at);
    }

    /// What came in before `at` is not gone back to.
    pub(super) fn forget_before(&mut self, at: Stamp) {
        if self.keeps && !self.replays {
            let gone = self.inputs.partition_point(|input| input.at < at).min(self.next);
            self.inputs.drain(..gone);
            self.next -= gone;
        }
    }

    /// What lies ahead never happens: the run was changed.
    pub(super) fn forget_future(&mut self) {
        self.inputs.truncate(self.next);
    }

    /// An input whose time the run passed by, once.
    pub(super) fn take_missed(&mut self) -> Option<Input> {
        self.missed.take()
    }
}

//! All state of a machine, part by part: what a snapshot holds and what a state hash covers.

use super::cpu::Processor;
use super::port::SerialGate;
use crate::machine::{InstructionClock, LockstepDisk, MachineBus};
use paravane_devices::{
    Clock, DeviceHandle, InterruptFabric, Named, Snapshot, StateError, StateStream, VmTime, WiredOr,
};
use std::fmt;
use std::sync::{Arc, PoisonError};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// Everything of a machine that has state, but for the processors and RAM.
#[derive(Clone)]
pub struct Parts {
    /// Machine time.
    pub clock: Arc<InstructionClock>,
    /// Interrupt controllers.
    pub fabric: Arc<InterruptFabric>,
    /// What the processors see of the machine.
    pub bus: Arc<MachineBus>,
    /// All devices.
    pub devices: Vec<DeviceHandle>,
    /// Where serial ports share an interrupt.
    pub wires: Vec<Arc<WiredOr>>,
    /// The serial ports' ends.
    pub ports: Vec<Arc<SerialGate>>,
    /// Back ends of the disks.
    pub disks: Vec<Arc<LockstepDisk>>,
}

/// The bytes of each part by name.
pub(super) type Sections = Vec<(String, Vec<u8>)>;

/// A hash of each part by name.
pub(super) type Digest = Vec<(String, u64)>;

/// A part that has no state now, or not this one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PartError {
    part: String,
    why: StateError,
}

impl fmt::Display for PartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.part, self.why)
    }
}

impl std::error::Error for PartError {}

/// A part that is walked over by a function.
struct Walk<F>(F);

impl<F: FnMut(&mut StateStream<'_>) -> Result<(), StateError>> Snapshot for Walk<F> {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        (self.0)(s)
    }
}

fn time(clock: &InstructionClock, s: &mut StateStream<'_>) -> Result<(), StateError> {
    let mut now = clock.now();
    now.state(s)?;
    clock.set(now);
    Ok(())
}

impl Parts {
    /// Calls `each` with every part, in an order that never changes.
    fn walk(
        &self,
        processors: &mut [Processor],
        mut each: impl FnMut(&str, &mut dyn Snapshot) -> Result<(), StateError>,
    ) -> Result<(), PartError> {
        let mut each = |name: &str, part: &mut dyn Snapshot| {
            each(name, part).map_err(|why| PartError { part: name.to_owned(), why })
        };
        for (n, processor) in processors.iter_mut().enumerate() {
            each(&format!("cpu{n}"), processor)?;
        }
        each("time", &mut Walk(|s: &mut StateStream<'_>| time(&self.clock, s)))?;
        each("interrupts", &mut Walk(|s: &mut StateStream<'_>| self.fabric.shared_state(s)))?;
        for device in &self.devices {
            let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
            let name = device.label().to_owned();
            let missing = || PartError { part: name.clone(), why: StateError::Missing("the device") };
            each(&name, device.as_snapshot().ok_or_else(missing)?)?;
        }
        each(
            "serial wires",
            &mut Walk(|s: &mut StateStream<'_>| self.wires.iter().try_for_each(|w| w.shared_state(s))),
        )?;
        each(
            "serial lines",
            &mut Walk(|s: &mut StateStream<'_>| self.ports.iter().try_for_each(|p| p.shared_state(s))),
        )?;
        each(
            "disks",
            &mut Walk(|s: &mut StateStream<'_>| self.disks.iter().try_for_each(|d| d.shared_state(s))),
        )
    }

    /// The state of every part. An error while a part is at work; a moment later it may be at rest.
    pub(super) fn save(&self, processors: &[Processor]) -> Result<Sections, PartError> {
        let mut sections = Sections::new();
        self.walk(&mut processors.to_vec(), |name, part| {
            let mut bytes = Vec::new();
            part.state(&mut StateStream::save(&mut bytes))?;
            sections.push((name.to_owned(), bytes));
            Ok(())
        })?;
        Ok(sections)
    }

    /// Puts every part and `processors` into a state that was saved.
    pub(super) fn load(&self, processors: &mut [Processor], sections: &Sections) -> Result<(), PartError> {
        let mut left = sections.iter();
        self.walk(processors, |name, part| {
            let (_, bytes) = left.next().filter(|s| s.0 == name).ok_or(StateError::Short)?;
            let mut s = StateStream::load(bytes);
            part.state(&mut s)?;
            s.end()
        })?;
        self.bus.follow_state();
        Ok(())
    }

    /// The state of every part as far as it counts when two runs are compared.
    pub(super) fn comparable(&self, processors: &[Processor]) -> Result<Sections, PartError> {
        let processors: Vec<Processor> = processors.iter().map(Processor::comparable).collect();
        self.save(&processors)
    }

    /// As [`Self::comparable`], with the names of all fields.
    pub(super) fn named(&self, processors: &[Processor]) -> Result<Vec<(String, Named)>, PartError> {
        let mut processors: Vec<Processor> = processors.iter().map(Processor::comparable).collect();
        let mut all = Vec::new();
        self.walk(&mut processors, |name, part| {
            all.push((name.to_owned(), Named::of(part)?));
            Ok(())
        })?;
        Ok(all)
    }

    /// Whether no disk has anything in hand.
    pub(super) fn at_rest(&self) -> bool {
        self.disks.iter().all(|disk| disk.idle())
    }

    /// Machine time.
    pub(super) fn now(&self) -> VmTime {
        self.clock.now()
    }
}

/// A hash of each section, and of RAM, which is `ram`.
pub(super) fn digest(sections: &Sections, ram: u64) -> Digest {
    let hashes = sections.iter().map(|(name, bytes)| (name.clone(), xxh3_64(bytes)));
    hashes.chain([("memory".to_owned(), ram)]).collect()
}

/// One hash over all parts.
pub(super) fn whole(digest: &Digest) -> u128 {
    let mut hasher = Xxh3::new();
    for (name, hash) in digest {
        hasher.update(name.as_bytes());
        hasher.update(&hash.to_le_bytes());
    }
    hasher.digest128()
}

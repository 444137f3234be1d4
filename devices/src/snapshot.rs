//! The state of a machine's parts as bytes.
//!
//! Each part lists its fields once, and the same list is walked to save and to load ([`StateStream`]), so the two cannot disagree. The
//! lists destructure their type ([`snapshot!`](crate::snapshot!)): a field that is added must be named as state or as wiring.
//!
//! Integers are little-endian, sequences begin with their length as a `u32`, optional values and choices with a byte. There are no
//! tags: bytes belong to the version of paravane that wrote them, and whoever keeps them longer than a run says which that was.

use crate::irq::IrqLine;
use crate::time::{Timer, VmTime};
use paravane_memory::{PhysAddr, Port};
use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Why bytes are not the state of this part.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StateError {
    /// They end too early.
    Short,
    /// They go on after the last field.
    Long,
    /// A value that the named type does not have.
    Value(&'static str),
    /// The part has something under way that has no form at rest.
    Busy(&'static str),
    /// The part cannot be saved at all.
    Missing(&'static str),
}

impl fmt::Display for StateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StateError::Short => f.write_str("the saved state ends too early"),
            StateError::Long => f.write_str("the saved state is too long"),
            StateError::Value(what) => write!(f, "the saved state has a bad value for {what}"),
            StateError::Busy(what) => write!(f, "{what} is at work"),
            StateError::Missing(what) => write!(f, "{what} cannot be saved"),
        }
    }
}

impl std::error::Error for StateError {}

/// A walk over state: it writes each field, or replaces each by what was written.
pub struct StateStream<'a>(Way<'a>);

enum Way<'a> {
    Save(&'a mut Vec<u8>),
    Load(&'a [u8]),
    Name(&'a mut Named),
}

/// State with the names of its fields.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Named {
    /// What [`StateStream::save`] writes.
    pub bytes: Vec<u8>,
    /// The names of the smallest parts that have one, and where in `bytes` they are.
    pub fields: Vec<(String, Range<usize>)>,
    path: String,
}

impl Named {
    /// `part` with names.
    pub fn of(part: &mut dyn Snapshot) -> Result<Named, StateError> {
        let mut named = Named::default();
        part.state(&mut StateStream(Way::Name(&mut named)))?;
        Ok(named)
    }
}

impl<'a> StateStream<'a> {
    /// Appends to `bytes`.
    pub fn save(bytes: &'a mut Vec<u8>) -> StateStream<'a> {
        StateStream(Way::Save(bytes))
    }

    /// Takes from `bytes`.
    pub fn load(bytes: &'a [u8]) -> StateStream<'a> {
        StateStream(Way::Load(bytes))
    }

    /// Whether fields are replaced.
    pub fn loads(&self) -> bool {
        matches!(self.0, Way::Load(_))
    }

    /// Writes `bytes`, or fills them.
    pub fn bytes(&mut self, bytes: &mut [u8]) -> Result<(), StateError> {
        match &mut self.0 {
            Way::Save(to) => to.extend_from_slice(bytes),
            Way::Name(to) => to.bytes.extend_from_slice(bytes),
            Way::Load(from) => {
                let (head, rest) = from.split_at_checked(bytes.len()).ok_or(StateError::Short)?;
                bytes.copy_from_slice(head);
                *from = rest;
            }
        }
        Ok(())
    }

    /// Walks over `part`, which is called `name`.
    pub fn field(
        &mut self,
        name: impl fmt::Display,
        part: &mut (impl Snapshot + ?Sized),
    ) -> Result<(), StateError> {
        let Way::Name(named) = &mut self.0 else { return part.state(self) };
        let (above, start, fields) = (named.path.len(), named.bytes.len(), named.fields.len());
        let dot = if above > 0 { "." } else { "" };
        named.path.push_str(&format!("{dot}{name}"));
        part.state(self)?;
        let Way::Name(named) = &mut self.0 else { return Ok(()) };
        if named.fields.len() == fields {
            named.fields.push((named.path.clone(), start..named.bytes.len()));
        }
        named.path.truncate(above);
        Ok(())
    }

    /// Walks over `items`, which are numbered.
    fn items<'i, T: Snapshot + 'i>(
        &mut self,
        items: impl Iterator<Item = &'i mut T>,
    ) -> Result<(), StateError> {
        items.enumerate().try_for_each(|(n, item)| self.field(n, item))
    }

    /// The length of a sequence whose items take at least `least` bytes each.
    fn len(&mut self, now: usize, least: usize) -> Result<usize, StateError> {
        let mut n = now as u32;
        n.state(self)?;
        match &self.0 {
            Way::Load(from) if from.len() < (n as usize).saturating_mul(least) => Err(StateError::Short),
            _ => Ok(n as usize),
        }
    }

    /// Nothing may be left.
    pub fn end(&self) -> Result<(), StateError> {
        match &self.0 {
            Way::Load(from) if !from.is_empty() => Err(StateError::Long),
            _ => Ok(()),
        }
    }
}

/// Something whose state can be saved and loaded.
pub trait Snapshot {
    /// Walks over all of it with `s`. After an error while loading the state is neither the old nor the new one.
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError>;
}

/// Lists the fields of a type: those that are state, and behind the bar those that are not (wiring, configuration, counters).
#[macro_export]
macro_rules! snapshot {
    ($type:ty { $($field:ident),* $(,)? $(| $($wiring:ident),* $(,)?)? }) => {
        impl $crate::Snapshot for $type {
            fn state(
                &mut self,
                _s: &mut $crate::StateStream<'_>,
            ) -> Result<(), $crate::StateError> {
                let Self { $($field,)* $($($wiring: _,)*)? } = self;
                $(_s.field(stringify!($field), $field)?;)*
                Ok(())
            }
        }
    };
}

/// Gives a number to each variant of a plain enumeration.
#[macro_export]
macro_rules! snapshot_enum {
    ($type:ident { $($variant:ident),* $(,)? }) => {
        impl $crate::Snapshot for $type {
            fn state(
                &mut self,
                s: &mut $crate::StateStream<'_>,
            ) -> Result<(), $crate::StateError> {
                const ALL: &[$type] = &[$($type::$variant),*];
                match self {
                    $($type::$variant)|* => {}
                }
                let mut n = ALL.iter().position(|v| v == self).unwrap_or(0) as u8;
                $crate::Snapshot::state(&mut n, s)?;
                *self = *ALL.get(usize::from(n)).ok_or($crate::StateError::Value(stringify!($type)))?;
                Ok(())
            }
        }
    };
}

macro_rules! integers {
    ($($t:ty),*) => {$(
        impl Snapshot for $t {
            fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
                let mut bytes = self.to_le_bytes();
                s.bytes(&mut bytes)?;
                *self = <$t>::from_le_bytes(bytes);
                Ok(())
            }
        }
    )*};
}

integers!(u8, u16, u32, u64, u128, i64);

impl Snapshot for usize {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        let mut n = *self as u64;
        n.state(s)?;
        *self = usize::try_from(n).map_err(|_| StateError::Value("usize"))?;
        Ok(())
    }
}

impl Snapshot for bool {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        let mut n = u8::from(*self);
        n.state(s)?;
        *self = match n {
            0 => false,
            1 => true,
            _ => return Err(StateError::Value("bool")),
        };
        Ok(())
    }
}

impl Snapshot for VmTime {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        self.0.state(s)
    }
}

impl Snapshot for PhysAddr {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        self.0.state(s)
    }
}

impl Snapshot for Port {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        self.0.state(s)
    }
}

impl<A: Snapshot, B: Snapshot> Snapshot for (A, B) {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        self.0.state(s)?;
        self.1.state(s)
    }
}

impl<T: Snapshot, const N: usize> Snapshot for [T; N] {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        s.items(self.iter_mut())
    }
}

/// The number of items is not state.
impl<T: Snapshot> Snapshot for [T] {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        s.items(self.iter_mut())
    }
}

impl<T: Snapshot + ?Sized> Snapshot for Box<T> {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        (**self).state(s)
    }
}

impl<T: Snapshot + Default> Snapshot for Option<T> {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        let mut present = self.is_some();
        present.state(s)?;
        match present {
            true => self.get_or_insert_default().state(s),
            false => {
                *self = None;
                Ok(())
            }
        }
    }
}

impl<T: Snapshot + Default> Snapshot for Vec<T> {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        let n = s.len(self.len(), 1)?;
        self.resize_with(n, T::default);
        self.as_mut_slice().state(s)
    }
}

impl<T: Snapshot + Default> Snapshot for VecDeque<T> {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        let n = s.len(self.len(), 1)?;
        self.resize_with(n, T::default);
        s.items(self.iter_mut())
    }
}

impl<T: Snapshot + ?Sized> Snapshot for Arc<Mutex<T>> {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        self.lock().unwrap_or_else(PoisonError::into_inner).state(s)
    }
}

/// The level; what is at the other end has its own state, so nothing is driven.
impl Snapshot for IrqLine {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        self.shared_state(s)
    }
}

impl Snapshot for Timer {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        self.shared_state(s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::TimerQueue;

    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    enum Phase {
        #[default]
        Idle,
        Busy,
    }
    snapshot_enum!(Phase { Idle, Busy });

    #[derive(Default, PartialEq, Debug)]
    struct Part {
        number: u16,
        phase: Phase,
        queue: VecDeque<u8>,
        limit: Option<u32>,
        label: &'static str,
    }
    snapshot!(Part { number, phase, queue, limit | label });

    fn saved(part: &mut dyn Snapshot) -> Vec<u8> {
        let mut bytes = Vec::new();
        part.state(&mut StateStream::save(&mut bytes)).expect("saved");
        bytes
    }

    #[test]
    fn what_is_loaded_is_what_was_saved() {
        let mut part =
            Part { number: 0x1234, phase: Phase::Busy, queue: [7, 8].into(), limit: Some(9), label: "a" };
        let bytes = saved(&mut part);
        assert_eq!(bytes, [0x34, 0x12, 1, 2, 0, 0, 0, 7, 8, 1, 9, 0, 0, 0]);
        let mut other = Part { queue: [1, 2, 3].into(), label: "b", ..Part::default() };
        let mut s = StateStream::load(&bytes);
        other.state(&mut s).and_then(|()| s.end()).expect("loaded");
        assert_eq!(other, Part { label: "b", ..part });
    }

    #[test]
    fn fields_have_names() {
        #[derive(Default)]
        struct Whole {
            part: Part,
            pair: [u16; 2],
        }
        snapshot!(Whole { part, pair });
        let mut whole = Whole { pair: [1, 2], ..Whole::default() };
        let named = Named::of(&mut whole).expect("named");
        assert_eq!(named.bytes, saved(&mut whole));
        let names: Vec<_> = named.fields.iter().map(|(name, at)| (name.as_str(), at.clone())).collect();
        let expected = [
            ("part.number", 0..2),
            ("part.phase", 2..3),
            ("part.queue", 3..7),
            ("part.limit", 7..8),
            ("pair.0", 8..10),
            ("pair.1", 10..12),
        ];
        assert_eq!(names, expected);
    }

    #[test]
    fn damaged_bytes_are_refused() {
        let good = saved(&mut Part { limit: Some(1), ..Part::default() });
        let load = |bytes: &[u8]| {
            let mut s = StateStream::load(bytes);
            Part::default().state(&mut s).and_then(|()| s.end())
        };
        for n in 0..good.len() {
            assert_eq!(load(&good[..n]), Err(StateError::Short), "{n} bytes");
        }
        assert_eq!(load(&[good.clone(), vec![0]].concat()), Err(StateError::Long));
        let with = |at: usize, value| {
            let mut bytes = good.clone();
            bytes[at] = value;
            bytes
        };
        assert_eq!(load(&with(2, 2)), Err(StateError::Value("Phase")));
        assert_eq!(load(&with(7, 2)), Err(StateError::Value("bool")));
        // A length beyond what is there allocates nothing.
        assert_eq!(load(&with(6, 0xFF)), Err(StateError::Short));
    }

    #[test]
    fn timers_wait_again_and_wires_drive_nothing() {
        let queue = TimerQueue::new();
        let mut timer = queue.timer();
        timer.arm(VmTime(30));
        let armed = saved(&mut timer);
        timer.disarm();
        let disarmed = saved(&mut timer);
        timer.state(&mut StateStream::load(&armed)).expect("loaded");
        assert_eq!(queue.next_deadline(), Some(VmTime(30)));
        timer.state(&mut StateStream::load(&disarmed)).expect("loaded");
        assert_eq!(queue.next_deadline(), None);
        let mut line = IrqLine::unconnected();
        line.state(&mut StateStream::load(&[1])).expect("loaded");
        assert!(line.is_high());
    }
}

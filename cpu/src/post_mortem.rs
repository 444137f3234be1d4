//! What is kept for the case that the processor shuts down: the exceptions on the way there, and where it was before.

use crate::fault::Fault;

/// An exception or interrupt whose delivery failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Attempt {
    /// What was to be delivered.
    pub fault: Fault,
    /// The instruction pointer it was to push.
    pub rip: u64,
    /// What failed.
    pub failed: &'static str,
    /// The exception that raised.
    pub second: Fault,
}

/// The attempts since the first failure.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Chain {
    attempts: [Option<Attempt>; Chain::MAX],
    len: usize,
}

impl Chain {
    /// No chain is longer: an interrupt, two benign exceptions, a contributory one or two, the double fault.
    const MAX: usize = 8;

    /// An instruction or interrupt starts anew.
    #[inline]
    pub(crate) fn restart(&mut self) {
        self.len = 0;
    }

    pub(crate) fn push(&mut self, attempt: Attempt) {
        if let Some(free) = self.attempts.get_mut(self.len) {
            *free = Some(attempt);
            self.len += 1;
        }
    }

    pub(crate) fn list(&self) -> Vec<Attempt> {
        self.attempts[..self.len].iter().flatten().copied().collect()
    }
}

/// How it is known that execution came by a place.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Evidence {
    /// It was written down.
    Recorded,
    /// Translated code ran from the recorded place before to the one after, and its jumps lead there by no other way.
    Inferred,
    /// The same, but there are several ways, or ways that are not known: the place behind this gap was reached from one of these.
    OneOf(Vec<u64>),
}

/// A place where execution went on other than in sequence.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Visit {
    /// Linear address; of no meaning for [`Evidence::OneOf`].
    pub at: u64,
    /// How it is known.
    pub evidence: Evidence,
}

/// The linear addresses where execution went on other than in sequence, or came back to from translated code: the last few.
#[derive(Clone, Debug)]
pub struct Trail {
    at: [u64; Trail::LEN],
    /// A bit for each: translated code ran from the address before up to here.
    left: u64,
    next: usize,
}

impl Trail {
    /// How many are kept; a power of two.
    pub const LEN: usize = 64;

    pub(crate) fn new() -> Trail {
        Trail { at: [u64::MAX; Trail::LEN], left: 0, next: 0 }
    }

    /// Execution goes on at `at`.
    #[inline]
    pub fn push(&mut self, at: u64) {
        let slot = self.next % Trail::LEN;
        self.at[slot] = at;
        self.left &= !(1 << slot);
        self.next = self.next.wrapping_add(1);
    }

    /// Execution goes on at `at`, where translated code that was entered at the address before was left.
    #[inline]
    pub fn push_left(&mut self, at: u64) {
        let slot = self.next % Trail::LEN;
        self.push(at);
        self.left |= 1 << slot;
    }

    /// The addresses, the latest last, and whether translated code ran from the one before up to it.
    pub fn list(&self) -> Vec<(u64, bool)> {
        (0..Trail::LEN)
            .map(|i| self.next.wrapping_add(i) % Trail::LEN)
            .map(|slot| (self.at[slot], self.left >> slot & 1 != 0))
            .filter(|&(at, _)| at != u64::MAX)
            .collect()
    }
}

/// What an engine can tell of a processor that shut down.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PostMortem {
    /// The exceptions that could not be delivered, in order.
    pub attempts: Vec<Attempt>,
    /// See [`Trail`]; an engine adds what it can infer.
    pub trail: Vec<Visit>,
}

impl PostMortem {
    /// Of what was recorded; `between` tells by what places translated code came from one address to another.
    pub(crate) fn new(
        attempts: Vec<Attempt>,
        trail: &Trail,
        mut between: impl FnMut(u64, u64) -> Vec<Visit>,
    ) -> PostMortem {
        let mut visits: Vec<Visit> = Vec::new();
        let mut before = None;
        for (at, left) in trail.list() {
            if let Some(from) = before.filter(|_| left) {
                visits.extend(between(from, at));
            }
            visits.push(Visit { at, evidence: Evidence::Recorded });
            before = Some(at);
        }
        PostMortem { attempts, trail: visits }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trail_keeps_the_latest() {
        let mut t = Trail::new();
        assert!(t.list().is_empty());
        (0..99).for_each(|at| t.push(at));
        t.push_left(99);
        assert_eq!(t.list(), (36..100).map(|at| (at, at == 99)).collect::<Vec<_>>());
        (100..164).for_each(|at| t.push(at));
        assert!(t.list().iter().all(|(_, left)| !left));
    }

    #[test]
    fn gaps_are_filled_where_translated_code_ran() {
        let mut t = Trail::new();
        t.push(1);
        t.push(2);
        t.push_left(5);
        let inferred = |from, to| {
            assert_eq!((from, to), (2, 5));
            vec![Visit { at: 3, evidence: Evidence::Inferred }]
        };
        let all: Vec<u64> = PostMortem::new(Vec::new(), &t, inferred).trail.iter().map(|v| v.at).collect();
        assert_eq!(all, [1, 2, 3, 5]);
    }
}

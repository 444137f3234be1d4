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

/// The linear addresses where execution went on other than in sequence, or came back to from translated code: the last few.
#[derive(Clone, Debug)]
pub struct Trail {
    at: [u64; Trail::LEN],
    next: usize,
}

impl Trail {
    /// How many are kept; a power of two.
    pub const LEN: usize = 64;

    pub(crate) fn new() -> Trail {
        Trail { at: [u64::MAX; Trail::LEN], next: 0 }
    }

    /// Execution goes on at `at`.
    #[inline]
    pub fn push(&mut self, at: u64) {
        self.at[self.next % Trail::LEN] = at;
        self.next = self.next.wrapping_add(1);
    }

    /// The addresses, the latest last.
    pub fn list(&self) -> Vec<u64> {
        (0..Trail::LEN)
            .map(|i| self.at[self.next.wrapping_add(i) % Trail::LEN])
            .filter(|&at| at != u64::MAX)
            .collect()
    }
}

/// What an engine can tell of a processor that shut down.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PostMortem {
    /// The exceptions that could not be delivered, in order.
    pub attempts: Vec<Attempt>,
    /// See [`Trail`].
    pub trail: Vec<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trail_keeps_the_latest() {
        let mut t = Trail::new();
        assert!(t.list().is_empty());
        (0..100).for_each(|at| t.push(at));
        assert_eq!(t.list(), (36..100).collect::<Vec<_>>());
    }
}

//! Where translations came from large pages: to drop one of these, all that was cached of the page must go (SDM 3A, 4.10.4.1).

use hashbrown::HashSet;

/// What an invalidation of one address covers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Extent {
    /// A 4 KiB page.
    Page,
    /// The 4 MiB around it: a page of 4 MiB, or one or two of 2 MiB.
    Large,
    /// Everything: a page of 1 GiB.
    All,
}

/// A note for each large page of which something was cached.
#[derive(Default, Debug)]
pub(crate) struct LargePages {
    /// Linear addresses without their low 22 bits.
    large: HashSet<u64>,
    /// Without their low 30 bits.
    huge: HashSet<u64>,
}

impl LargePages {
    /// Something of the page of `1 << shift` bytes around `lin` is being cached.
    pub(crate) fn note(&mut self, lin: u64, shift: u8) {
        match shift {
            0..=12 => {}
            13..=22 => drop(self.large.insert(lin >> 22)),
            _ => drop(self.huge.insert(lin >> 30)),
        }
    }

    /// What goes when `lin` is invalidated.
    pub(crate) fn extent(&self, lin: u64) -> Extent {
        if self.huge.contains(&(lin >> 30)) {
            Extent::All
        } else if self.large.contains(&(lin >> 22)) {
            Extent::Large
        } else {
            Extent::Page
        }
    }

    /// Nothing is cached any more.
    pub(crate) fn clear(&mut self) {
        self.large.clear();
        self.huge.clear();
    }
}

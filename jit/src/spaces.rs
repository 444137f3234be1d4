//! Which address spaces the translator remembers: a few slots, each with the tag (PCID, SDM 3A, 4.10.1) whose translations
//! it holds. The one unused for longest gives way.

/// Slots there are at most. Linux uses PCIDs 0 to 6.
const SPACES: usize = 8;
/// Slots that each of `vcpus` translators should have in a process that may reserve `room` TiB of address space.
pub(crate) fn slots(vcpus: usize, room: usize) -> usize {
    let (shared, each) = (1, 2);
    ((room / vcpus.max(1)).saturating_sub(shared) / each).clamp(1, SPACES)
}

/// A slot: what is in its tables and lists belongs to `tag`, or is nothing.
#[derive(Clone, Copy, Default)]
struct Slot {
    tag: Option<u16>,
    used: u64,
}

/// See the module's documentation.
pub(crate) struct Spaces {
    slots: Vec<Slot>,
    current: usize,
    clock: u64,
}

/// What a switch found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Switch {
    /// The slot that is the current one now.
    pub(crate) to: usize,
    /// It held another tag's translations: those that are not global must go.
    pub(crate) replaced: bool,
}

impl Spaces {
    /// `count` slots; none has a tag yet.
    pub(crate) fn new(count: usize) -> Spaces {
        Spaces { slots: vec![Slot::default(); count.max(1)], current: 0, clock: 0 }
    }

    /// Whether `tag` is current.
    pub(crate) fn is_current(&self, tag: u16) -> bool {
        self.slots[self.current].tag == Some(tag)
    }

    /// The slot that is current.
    pub(crate) fn current(&self) -> usize {
        self.current
    }

    /// The slot of `tag`.
    pub(crate) fn find(&self, tag: u16) -> Option<usize> {
        self.slots.iter().position(|s| s.tag == Some(tag))
    }

    /// Makes `tag` current.
    pub(crate) fn switch(&mut self, tag: u16) -> Switch {
        self.clock += 1;
        let found = self.find(tag);
        let to = found.unwrap_or_else(|| self.oldest());
        let replaced = found.is_none() && self.slots[to].tag.is_some();
        self.slots[to] = Slot { tag: Some(tag), used: self.clock };
        self.current = to;
        Switch { to, replaced }
    }

    fn oldest(&self) -> usize {
        (0..self.slots.len()).min_by_key(|&i| self.slots[i].used).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slot_unused_for_longest_gives_way() {
        let mut s = Spaces::new(3);
        let mut to = |tag| s.switch(tag);
        let (a, b, c) = (to(5), to(6), to(7));
        assert!(![a, b, c].iter().any(|s| s.replaced));
        assert_eq!(to(5), Switch { to: a.to, replaced: false });
        assert_eq!(to(8), Switch { to: b.to, replaced: true });
        assert_eq!(to(7), Switch { to: c.to, replaced: false });
        assert_eq!((s.find(6), s.find(8)), (None, Some(b.to)));
        assert!(s.is_current(7) && !s.is_current(8));
    }

    #[test]
    fn all_translators_fit_into_the_room_there_is() {
        assert_eq!([1, 4, 6, 8, 16, 31].map(|n| slots(n, 112)), [8, 8, 8, 6, 3, 1]);
        assert!((1..=31).all(|n| n * (1 + 2 * slots(n, 112)) <= 112));
        assert_eq!([20, 4, 0].map(|room| slots(2, room)), [4, 1, 1]);
    }

    #[test]
    fn one_slot_takes_turns() {
        let mut s = Spaces::new(1);
        assert_eq!(s.switch(0), Switch { to: 0, replaced: false });
        assert_eq!(s.switch(1), Switch { to: 0, replaced: true });
        assert_eq!(s.switch(1), Switch { to: 0, replaced: false });
    }
}

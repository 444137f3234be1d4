//! Blocks at other linear addresses. Under address-space randomization each program maps the pages of its libraries somewhere
//! else. Most of a block does not depend on where it is: what does are addresses in its code, its key, and where its jumps
//! lead. So the blocks made from a page for one linear page, an *instance*, can be moved to another.
//!
//! Several programs may run by turns. A page that is wanted back where its blocks were before has one more instance from then on,
//! so that nobody's blocks are moved for long; up to a limit, for a program can map a page wherever it likes.

use super::{Block, BlockId, BlockKey, BlockTable, Mode, NONE, PageBlocks};
use crate::code_cache::CodeOffset;
use paravane_memory::PAGE_SHIFT;
use std::ops::Range;

/// Instances of a page before any other is wanted back.
const INSTANCES: usize = 1;
/// Linear pages, that the blocks of a page left, which are remembered, and instances that it has more than [`INSTANCES`] at most.
const LEFT: usize = 32;

/// The linear pages for which a page has blocks that can be moved, and those that they were moved from.
#[derive(Default)]
pub(super) struct Instances {
    present: Vec<u64>,
    left: Vec<u64>,
    /// How often one was wanted back.
    returns: usize,
}

impl Instances {
    fn note(&mut self, page: u64) {
        if !self.present.contains(&page) {
            self.present.push(page);
        }
    }

    /// Which instance moves to `page`, if none is there and no more shall be made; `used` says when each was used last.
    fn replace(&mut self, page: u64, used: impl Fn(u64) -> u64) -> Option<u64> {
        if self.present.contains(&page) {
            return None;
        }
        if let Some(i) = self.left.iter().position(|&left| left == page) {
            self.left.swap_remove(i);
            self.returns = (self.returns + 1).min(LEFT);
        }
        if self.present.len() < INSTANCES + self.returns {
            return None;
        }
        let oldest = self.present.iter_mut().min_by_key(|page| used(**page))?;
        let from = std::mem::replace(oldest, page);
        if self.left.len() == LEFT {
            self.left.remove(0);
        }
        self.left.push(from);
        Some(from)
    }
}

impl Mode {
    /// Code addresses of blocks that can be moved: so far inside the lower half that nothing near them is outside.
    const MOVABLE: Range<u64> = 1 << 32..(1 << 47) - (1 << 32);

    /// Whether a block at `address` can be moved: one of 64-bit programs.
    pub(crate) fn movable(self, address: u64) -> bool {
        self.code64() && self.has(Mode::USER) && Mode::MOVABLE.contains(&address)
    }
}

impl BlockKey {
    /// Whether the block can be moved.
    fn movable(&self) -> bool {
        self.mode.movable(self.address)
    }

    fn page(&self) -> u64 {
        self.at.0 >> PAGE_SHIFT
    }

    /// Which of the two kinds of instances it belongs to: blocks that use a window move by themselves, for short programs
    /// never need them.
    fn kind(&self) -> usize {
        usize::from(self.mode.has(Mode::WINDOW))
    }

    fn linear_page(&self) -> u64 {
        self.address >> PAGE_SHIFT
    }
}

impl Block {
    /// Numbers of its links.
    pub(crate) fn links(&self) -> Range<u32> {
        self.links.0..self.links.0 + u32::from(self.links.1)
    }
}

impl PageBlocks {
    /// A block of the page was made.
    pub(super) fn note_instance(&mut self, key: &BlockKey) {
        if key.movable() {
            self.instances[key.kind()].note(key.linear_page());
        }
    }
}

impl BlockTable {
    /// Puts the blocks into `moved` that shall move so that there is one at `key`; returns how far. `used` says when a linear
    /// page was used last.
    pub(crate) fn replace_instance(
        &mut self,
        key: &BlockKey,
        used: impl Fn(u64) -> u64,
        moved: &mut Vec<BlockId>,
    ) -> Option<u64> {
        if !key.movable() {
            return None;
        }
        let on_page = self.pages.get_mut(&key.page())?;
        let from = on_page.instances[key.kind()].replace(key.linear_page(), used)?;
        let of_instance =
            |other: &BlockKey| other.movable() && other.linear_page() == from && other.kind() == key.kind();
        let ids = on_page.blocks.iter().map(|&(_, id)| id);
        moved.extend(ids.filter(|&id| {
            let other = &self.blocks[id as usize].key;
            other.page() == key.page() && of_instance(other)
        }));
        Some((key.linear_page() << PAGE_SHIFT).wrapping_sub(from << PAGE_SHIFT))
    }

    /// Moves block `id` and where its links lead by `by`.
    pub(crate) fn rekey(&mut self, id: BlockId, by: u64) {
        self.forget(id);
        let block = &mut self.blocks[id as usize];
        block.key.address = block.key.address.wrapping_add(by);
        for number in block.links() {
            let link = &mut self.links[number as usize];
            link.target = link.target.wrapping_add(by);
        }
        let key = self.blocks[id as usize].key;
        self.know(&key, id);
    }

    /// Where the code of a block has addresses that move with it.
    pub(crate) fn constants(&self, id: BlockId) -> &[CodeOffset] {
        let (at, n) = self.blocks[id as usize].constants;
        &self.constants[at as usize..at as usize + usize::from(n)]
    }

    /// Puts those links to block `to` into `links` that come from other pages; forgets those that jump elsewhere by now.
    pub(crate) fn incoming_from_pages(&mut self, to: BlockId, links: &mut Vec<u32>) {
        let mut at = std::mem::replace(&mut self.blocks[to as usize].incoming, NONE);
        while let Some(incoming) = self.incoming.get_mut(at as usize) {
            let (here, link) = (at, &self.links[incoming.link as usize]);
            at = incoming.next;
            if link.to == Some(to) {
                incoming.next = std::mem::replace(&mut self.blocks[to as usize].incoming, here);
                if !link.same_page {
                    links.push(incoming.link);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{insert_at, link};
    use super::*;
    use crate::block::Granules;
    use paravane_memory::RamOffset;

    const FAR: u64 = 1 << 40;
    const USER: Mode = Mode(Mode::USER);

    fn key(at: u64, address: u64) -> BlockKey {
        BlockKey { at: RamOffset(at), address, mode: USER }
    }

    fn add(table: &mut BlockTable, at: u64, address: u64) -> BlockId {
        insert_at(table, key(at, address), Granules::ALL, None)
    }

    /// Moves what shall be moved for a block at `key`; which blocks those are.
    fn make_way(table: &mut BlockTable, key: BlockKey, used: impl Fn(u64) -> u64) -> Vec<BlockId> {
        let mut moved = Vec::new();
        let by = table.replace_instance(&key, used, &mut moved);
        moved.iter().for_each(|&id| table.rekey(id, by.expect("a distance")));
        moved
    }

    #[test]
    fn only_far_blocks_of_64_bit_programs_move() {
        for (mode, address, movable) in [
            (USER, FAR, true),
            (USER, (1 << 32) - 1, false),
            (USER, 1 << 32, true),
            (USER, (1 << 47) - (1 << 32), false),
            (USER, u64::MAX - 0xFFF, false),
            (Mode(0), FAR, false),
            (Mode(Mode::USER | Mode::CODE32), FAR, false),
            (Mode(Mode::USER | Mode::UNGROUPED), FAR, true),
        ] {
            assert_eq!(mode.movable(address), movable, "{mode:?} {address:#x}");
        }
    }

    #[test]
    fn an_instance_is_found_where_it_moved_to() {
        let mut t = BlockTable::default();
        let [a, b] = [0x5010, 0x5020].map(|at| add(&mut t, at, FAR + at));
        let other = add(&mut t, 0x6010, FAR + 0x6010);
        let near = add(&mut t, 0x5010, 0x5010);
        assert_eq!(make_way(&mut t, key(0x5030, 2 * FAR + 0x5030), |_| 0), [a, b]);
        let places = [(a, 0x5010, 2 * FAR), (b, 0x5020, 2 * FAR), (other, 0x6010, FAR), (near, 0x5010, 0)];
        for (id, at, base) in places {
            assert_eq!(t.find(&key(at, base + at)), Some(id), "{at:#x}");
        }
        assert_eq!(t.find(&key(0x5010, FAR + 0x5010)), None);
        // There it is: nothing more to do.
        assert_eq!(make_way(&mut t, key(0x5040, 2 * FAR + 0x5040), |_| 0).len(), 0);
        // What is written goes from where it is now.
        let mut taken = Vec::new();
        t.take(5, Granules::ALL, &mut taken);
        taken.iter().for_each(|&id| t.retire(id));
        assert_eq!(t.find(&key(0x5010, 2 * FAR + 0x5010)), None);
    }

    #[test]
    fn who_comes_back_stays() {
        let mut t = BlockTable::default();
        let at = |n: u64| key(0x5000, n * FAR + 0x5000);
        add(&mut t, 0x5000, FAR + 0x5000);
        assert_eq!(make_way(&mut t, at(2), |_| 0).len(), 1);
        // Back at 1, which is made anew; then the older of the two moves.
        assert_eq!(make_way(&mut t, at(1), |_| 0).len(), 0);
        let second = add(&mut t, 0x5000, FAR + 0x5000);
        let older_first = |page: u64| u64::from(page >> 28 != 1);
        assert_eq!(make_way(&mut t, at(3), older_first), [second]);
        for n in [2, 3] {
            assert_eq!(make_way(&mut t, at(n), |_| 0).len(), 0, "{n}");
        }
    }

    #[test]
    fn however_many_take_turns_they_stop_moving() {
        for programs in 2..=LEFT as u64 {
            let mut instances = Instances::default();
            let mut moves = 0;
            for round in 0..64 {
                moves = 0;
                for page in 0..programs {
                    moves += u32::from(instances.replace(page, |_| round).is_some());
                    instances.note(page);
                }
            }
            assert_eq!((moves, instances.present.len() as u64), (0, programs));
        }
    }

    #[test]
    fn there_are_not_more_instances_than_are_of_use() {
        let mut instances = Instances::default();
        let mut want = |page| {
            let first = instances.present.first().copied();
            instances.replace(page, |_| 0);
            instances.note(page);
            first
        };
        for page in 0..10 * LEFT as u64 {
            // Who has to go for a new one comes back at once.
            want(page).map(&mut want);
        }
        assert_eq!(instances.present.len(), INSTANCES + LEFT);
        assert!(instances.left.len() <= LEFT);
    }

    #[test]
    fn links_move_with_their_block_and_those_from_other_pages_are_told() {
        let mut t = BlockTable::default();
        t.links.extend([link(FAR + 0x5020, true), link(FAR + 0x6010, false)]);
        let a = insert_at(&mut t, key(0x5010, FAR + 0x5010), Granules::ALL, None);
        t.blocks[a as usize].links = (0, 2);
        t.links.extend([link(FAR + 0x5010, false), link(FAR + 0x5010, false), link(FAR + 0x5010, true)]);
        let b = add(&mut t, 0x6010, FAR + 0x6010);
        for (to, number) in [(a, 2), (b, 1), (a, 3), (a, 4), (b, 3)] {
            t.add_incoming(to, number);
        }
        t.rekey(a, FAR);
        let targets = t.links.iter().map(|link| link.target - FAR).collect::<Vec<_>>();
        assert_eq!(targets, [FAR + 0x5020, FAR + 0x6010, 0x5010, 0x5010, 0x5010]);
        for _ in 0..2 {
            let mut links = Vec::new();
            t.incoming_from_pages(a, &mut links);
            assert_eq!(links, [2], "3 leads to another block by now, 4 comes from the same page");
        }
        let rest = std::iter::from_fn(|| t.take_incoming(a).map(|l| l.same_page)).collect::<Vec<_>>();
        assert_eq!(rest.len(), 2);
    }
}

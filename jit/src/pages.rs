//! How control finds blocks: validated code pages, and jump caches for indirect transfers.
//!
//! Each linear code page in use owns a cell of `JitContext::xslots`, which holds its backing page number + 1 while
//! that translation is known to hold. Jumps chained across pages compare it; whatever drops translations (CR3, INVLPG, …)
//! clears it. A jump cache maps 16 bits made from a linear address to a code address and the host code for it, which indirect
//! transfers compare; it holds only blocks whose page is validated. A target whose place another one takes moves to a second,
//! smaller part of it, where a stub looks.

use crate::block::Mode;
use crate::context::XSLOTS;
use crate::large::{Extent, LargePages};
use hashbrown::HashMap;

type Cells = [u32; XSLOTS];

/// Where `lin` is in a jump cache: translated code computes the same (`emit::flow`). The 65,536 multiples of 16 in 1 MiB differ,
/// and so do neighbours.
fn index(lin: u64) -> usize {
    usize::from((lin.wrapping_mul(17) >> 4) as u16)
}

/// Where `lin` is when another one took its place there: the way in `stubs` computes the same.
fn second_index(lin: u64) -> usize {
    ENTRIES + (lin.wrapping_mul(SECOND_FACTOR) >> 32) as usize % SECOND_ENTRIES
}

/// Entries of a jump cache, and those behind them for addresses that lost theirs.
pub(crate) const ENTRIES: usize = 1 << 16;
pub(crate) const SECOND_ENTRIES: usize = 1 << 12;
/// What spreads addresses over the second entries; it fits into an immediate of IMUL.
pub(crate) const SECOND_FACTOR: u64 = 0x6A09_E667;

/// A code address, and the host address of the code to go to there. Host pages of a table come as it fills: an empty entry is
/// zero.
pub(crate) type Entry = [u64; 2];

/// The empty entry number `at`. Only the first ones could be taken for those of code address 0.
fn empty(at: usize) -> Entry {
    if at == 0 || at == ENTRIES { NEVER } else { [0; 2] }
}

/// An entry that no address is compared with, in its place.
const NEVER: Entry = [u64::MAX, 0];

/// Jump caches kept at a time; modes beyond share by eviction.
const MAX_CACHES: usize = 24;

/// Blocks by the low bits of their linear address, for one mode; in user mode, for one address space too.
struct JumpCache {
    mode: Mode,
    space: Option<usize>,
    table: Box<[Entry]>,
    /// Entries and the linear pages they lead to: non-global, global.
    filled: [Vec<(u32, u64)>; 2],
}

impl JumpCache {
    fn new(mode: Mode, space: Option<usize>) -> JumpCache {
        let mut table: Box<[Entry]> = vec![[0; 2]; ENTRIES + SECOND_ENTRIES].into();
        table[0] = empty(0);
        table[ENTRIES] = NEVER;
        JumpCache { mode, space, table, filled: [Vec::new(), Vec::new()] }
    }

    fn clear(&mut self, global: bool) {
        for (at, _) in self.filled[usize::from(global)].drain(..) {
            self.table[at as usize] = empty(at as usize);
        }
    }

    /// Puts an entry at `at`, for an address on linear page `page`.
    fn put(&mut self, at: usize, entry: Entry, page: u64, global: bool) {
        self.table[at] = entry;
        self.filled[usize::from(global)].push((at as u32, page));
    }

    fn clear_page(&mut self, global: bool, page: u64) {
        let JumpCache { mode, table, filled, .. } = self;
        filled[usize::from(global)].retain(|&(at, of)| {
            let at = at as usize;
            // Another page may have it by now.
            if of == page && mode.linear(table[at][0]) >> 12 == page {
                table[at] = empty(at);
            }
            of != page
        });
    }
}

/// A code page as instruction fetch sees it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct PageKey {
    page: u64,
    user: bool,
}

/// What a validation cell is for, and whether the page was global when it was validated last.
struct Slot {
    key: PageKey,
    global: bool,
    /// When it became valid last, by [`CodePages::clock`].
    used: u64,
}

/// Validation cells and jump caches of one vCPU.
///
/// Cells show the current address space. What was valid for user pages of the others is kept aside, and their jump caches
/// stay as they are. A jump cache holds an entry for a page only while the page's cell is valid in that space.
pub(crate) struct CodePages {
    numbers: HashMap<PageKey, u32>,
    slots: Vec<Slot>,
    /// Slots that were validated: non-global, global.
    valid: [Vec<u32>; 2],
    /// Valid cells of the spaces that are not current: slots and values.
    aside: Vec<Vec<(u32, u32)>>,
    active: usize,
    large: LargePages,
    caches: Vec<JumpCache>,
    /// The caches found last: supervisor, user.
    recent: [usize; 2],
    next_victim: usize,
    /// Counts what became valid.
    clock: u64,
}

impl CodePages {
    /// For `spaces` address spaces.
    pub(crate) fn new(spaces: usize) -> CodePages {
        CodePages {
            numbers: HashMap::new(),
            slots: Vec::new(),
            valid: [Vec::new(), Vec::new()],
            aside: vec![Vec::new(); spaces],
            active: 0,
            large: LargePages::default(),
            caches: Vec::new(),
            recent: [0; 2],
            next_victim: 0,
            clock: 0,
        }
    }

    /// The cell of a linear page; `None` when all cells are taken (the caller starts over).
    pub(crate) fn slot(&mut self, lin: u64, user: bool) -> Option<u32> {
        let key = PageKey { page: lin >> 12, user };
        if let Some(&s) = self.numbers.get(&key) {
            return Some(s);
        }
        let s = self.slots.len();
        if s >= XSLOTS {
            return None;
        }
        self.slots.push(Slot { key, global: false, used: 0 });
        self.numbers.insert(key, s as u32);
        Some(s as u32)
    }

    /// Records that `slot` was validated, by a page of `1 << page_shift` bytes.
    pub(crate) fn validated(&mut self, slot: u32, global: bool, page_shift: u8) {
        let s = &mut self.slots[slot as usize];
        s.global = global;
        self.large.note(s.key.page << 12, page_shift);
        self.mark_valid(slot, global);
    }

    fn mark_valid(&mut self, slot: u32, global: bool) {
        self.clock += 1;
        self.slots[slot as usize].used = self.clock;
        let valid = &mut self.valid[usize::from(global)];
        if valid.len() >= 4 * XSLOTS {
            // Single pages were dropped and validated again and again.
            valid.sort_unstable();
            valid.dedup();
        }
        valid.push(slot);
    }

    /// When the user's linear page number `page` became valid last, in an order.
    pub(crate) fn used(&self, page: u64) -> u64 {
        self.numbers.get(&PageKey { page, user: true }).map_or(0, |&slot| self.slots[slot as usize].used)
    }

    /// The cache for `mode` in the current space.
    fn find(&mut self, mode: Mode) -> Option<usize> {
        let user = mode.has(Mode::USER);
        let space = user.then_some(self.active);
        let fits = |c: &JumpCache| c.mode == mode && c.space == space;
        let recent = &mut self.recent[usize::from(user)];
        if !self.caches.get(*recent).is_some_and(fits) {
            *recent = self.caches.iter().position(fits)?;
        }
        Some(*recent)
    }

    /// Address of the jump cache for `mode`.
    pub(crate) fn jump_cache(&mut self, mode: Mode) -> u64 {
        let at = self.find(mode).unwrap_or_else(|| self.add_cache(mode));
        self.caches[at].table.as_ptr() as u64
    }

    /// Addresses of the jump caches for two modes.
    pub(crate) fn jump_caches(&mut self, [first, second]: [Mode; 2]) -> [u64; 2] {
        if let (Some(a), Some(b)) = (self.find(first), self.find(second)) {
            return [a, b].map(|at| self.caches[at].table.as_ptr() as u64);
        }
        self.jump_cache(first);
        // A cache that is made anew may take the place of another one, but not of the last one made.
        let second = self.jump_cache(second);
        [self.jump_cache(first), second]
    }

    fn add_cache(&mut self, mode: Mode) -> usize {
        let space = mode.has(Mode::USER).then_some(self.active);
        let cache = JumpCache::new(mode, space);
        if self.caches.len() < MAX_CACHES {
            self.caches.push(cache);
            return self.caches.len() - 1;
        }
        let victim = self.next_victim;
        self.next_victim = (victim + 1) % MAX_CACHES;
        self.caches[victim] = cache;
        victim
    }

    /// Where an indirect jump to code address `address` goes now.
    pub(crate) fn lookup(&mut self, mode: Mode, address: u64) -> Option<u64> {
        let cache = self.find(mode)?;
        let found = [index(address), second_index(address)].map(|at| self.caches[cache].table[at]);
        found.into_iter().find(|[known, _]| *known == address).map(|[_, entry]| entry)
    }

    /// Lets indirect jumps to `address` go straight to `entry`; `slot` validates its page.
    pub(crate) fn cache(&mut self, mode: Mode, address: u64, entry: u64, slot: u32) {
        let global = self.slots[slot as usize].global;
        let Some(cache) = self.find(mode) else { return };
        let at = index(address);
        let old = self.caches[cache].table[at];
        let displaced = old != empty(at) && old[0] != address;
        let c = &mut self.caches[cache];
        if c.filled.iter().any(|filled| filled.len() + 2 > 2 * ENTRIES) {
            // Targets that share entries took turns: start over, so that the record stays bounded.
            c.clear(false);
            c.clear(true);
        } else if displaced {
            let page = mode.linear(old[0]) >> 12;
            // Global or not: one that goes too early does no harm.
            for global in [false, true] {
                c.put(second_index(old[0]), old, page, global);
            }
        }
        c.put(at, [address, entry], mode.linear(address) >> 12, global);
    }

    /// Removes `entry`, a block of `mode`, wherever indirect jumps to `address` may find it.
    pub(crate) fn uncache(&mut self, mode: Mode, address: u64, entry: u64) {
        for c in self.caches.iter_mut().filter(|c| c.mode == mode) {
            for at in [index(address), second_index(address)] {
                if c.table[at] == [address, entry] {
                    c.table[at] = empty(at);
                }
            }
        }
    }

    /// Caches of `space`, and if that is the current one, the supervisor's.
    fn caches_of(&mut self, space: usize) -> impl Iterator<Item = &mut JumpCache> {
        let active = self.active;
        self.caches.iter_mut().filter(move |c| c.space.map_or(space == active, |s| s == space))
    }

    /// Makes `space` the current one: puts aside and takes out what is valid for user pages. What is valid for non-global
    /// pages of the supervisor goes.
    pub(crate) fn switch(&mut self, cells: &mut Cells, space: usize) {
        let old = &mut self.aside[self.active];
        for slot in self.valid[0].drain(..) {
            let s = &self.slots[slot as usize];
            let cell = &mut cells[slot as usize];
            // A slot may be listed twice, or have become global since.
            if *cell != 0 && !s.global {
                if s.key.user {
                    old.push((slot, *cell));
                }
                *cell = 0;
            }
        }
        self.caches.iter_mut().filter(|c| c.space.is_none()).for_each(|c| c.clear(false));
        self.active = space;
        let mut new = std::mem::take(&mut self.aside[space]);
        for (slot, value) in new.drain(..) {
            let s = &mut self.slots[slot as usize];
            if cells[slot as usize] == 0 {
                s.global = false;
                cells[slot as usize] = value;
                self.mark_valid(slot, false);
            } else {
                // Another space says the page is global.
                let page = s.key.page;
                self.caches_of(space).for_each(|c| c.clear_page(false, page));
            }
        }
        self.aside[space] = new;
    }

    fn invalidate_listed(&mut self, cells: &mut Cells, global: bool) {
        for slot in self.valid[usize::from(global)].drain(..) {
            if self.slots[slot as usize].global == global {
                cells[slot as usize] = 0;
            }
        }
    }

    /// The non-global translations of `space` were dropped.
    pub(crate) fn flush_space(&mut self, cells: &mut Cells, space: usize) {
        if space == self.active {
            self.invalidate_listed(cells, false);
        }
        self.aside[space].clear();
        self.caches_of(space).for_each(|c| c.clear(false));
    }

    /// Translations of all spaces were dropped; `keep_global` spares global pages.
    pub(crate) fn flush(&mut self, cells: &mut Cells, keep_global: bool) {
        for space in 0..self.aside.len() {
            self.flush_space(cells, space);
        }
        if !keep_global {
            self.invalidate_listed(cells, true);
            self.caches.iter_mut().for_each(|c| c.clear(true));
            self.large.clear();
        }
    }

    /// The translation of one page was dropped in `space` and, if it is global, in all others.
    pub(crate) fn flush_page(&mut self, cells: &mut Cells, space: Option<usize>, lin: u64) {
        if self.large.extent(lin) != Extent::Page {
            return self.flush(cells, false);
        }
        let page = lin >> 12;
        for user in [false, true] {
            let Some(&slot) = self.numbers.get(&PageKey { page, user }) else { continue };
            if let Some(space) = space.filter(|&space| space != self.active) {
                self.aside[space].retain(|&(s, _)| s != slot);
                self.caches_of(space).for_each(|c| c.clear_page(false, page));
            }
            let global = self.slots[slot as usize].global;
            if cells[slot as usize] == 0 || !(global || space == Some(self.active)) {
                continue;
            }
            cells[slot as usize] = 0;
            self.caches_of(self.active).for_each(|c| c.clear_page(false, page));
            self.caches.iter_mut().for_each(|c| c.clear_page(true, page));
        }
    }

    /// Forgets everything (the code cache starts over).
    pub(crate) fn clear(&mut self, cells: &mut Cells) {
        self.flush(cells, false);
        self.numbers.clear();
        self.slots.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USER: Mode = Mode(Mode::USER);
    const SUPERVISOR: Mode = Mode(0);

    /// Code pages of three spaces, with their cells.
    struct Bed {
        pages: CodePages,
        cells: Box<Cells>,
    }

    impl Bed {
        fn new() -> Bed {
            Bed { pages: CodePages::new(3), cells: Box::new([0; XSLOTS]) }
        }

        /// Validates the page of `lin` with `value` and caches a jump to `lin` that goes to `value` too.
        fn use_code(&mut self, mode: Mode, lin: u64, value: u32, global: bool) {
            let slot = self.pages.slot(lin, mode.has(Mode::USER)).expect("slot");
            self.cells[slot as usize] = value;
            self.pages.validated(slot, global, 12);
            self.pages.jump_cache(mode);
            self.pages.cache(mode, lin, u64::from(value), slot);
        }

        /// What cell and jump cache say of `lin`; they must agree.
        fn known(&mut self, mode: Mode, lin: u64) -> Option<u32> {
            let slot = self.pages.slot(lin, mode.has(Mode::USER)).expect("slot");
            let cell = Some(self.cells[slot as usize]).filter(|&v| v != 0);
            let cached = self.pages.lookup(mode, lin).map(|v| v as u32);
            assert_eq!(cell, cached, "{lin:#x}");
            cell
        }

        fn switch(&mut self, space: usize) {
            self.pages.switch(&mut self.cells, space);
        }
    }

    #[test]
    fn targets_that_take_turns_do_not_grow_the_record() {
        let mut b = Bed::new();
        let taking_turns = [0x1000, 0x10_1000];
        assert_eq!(index(taking_turns[0]), index(taking_turns[1]));
        b.use_code(SUPERVISOR, 0x1000, 1, false);
        let slot = b.pages.slot(0x1000, false).expect("slot");
        for i in 0..3 * ENTRIES {
            b.pages.cache(SUPERVISOR, taking_turns[i & 1], 100, slot);
        }
        assert!(b.pages.caches[0].filled.iter().all(|filled| filled.len() <= 2 * ENTRIES));
    }

    #[test]
    fn targets_that_share_an_entry_are_both_found() {
        let mut b = Bed::new();
        let [first, second, third] = [0x1000, 0x10_1000, 0x20_1000];
        assert_eq!((index(first), index(second)), (index(second), index(third)));
        for (lin, value) in [(first, 1), (second, 2)] {
            b.use_code(USER, lin, value, lin == first);
        }
        assert_eq!((b.known(USER, first), b.known(USER, second)), (Some(1), Some(2)));
        // The first place is the last one's.
        assert_eq!(b.pages.caches[0].table[index(first)], [second, 2]);
        assert_eq!(b.pages.caches[0].table[second_index(first)], [first, 1]);
        b.pages.uncache(USER, first, 1);
        assert_eq!((b.pages.lookup(USER, first), b.pages.lookup(USER, second)), (None, Some(2)));
        b.use_code(USER, third, 3, false);
        b.pages.flush_page(&mut b.cells, Some(0), second);
        assert_eq!((b.known(USER, second), b.known(USER, third)), (None, Some(3)));
    }

    #[test]
    fn what_lost_its_place_goes_with_its_page_global_or_not() {
        for global in [false, true] {
            let mut b = Bed::new();
            let [lin, other] = [0x1000, 0x10_1000];
            b.use_code(USER, lin, 1, global);
            b.use_code(USER, other, 2, !global);
            b.pages.flush_page(&mut b.cells, Some(0), lin);
            assert_eq!((b.known(USER, lin), b.known(USER, other)), (None, Some(2)), "global: {global}");
            b.pages.flush(&mut b.cells, false);
            assert_eq!(b.known(USER, other), None);
        }
    }

    #[test]
    fn an_empty_entry_is_no_block_at_address_0() {
        let mut b = Bed::new();
        for round in 0..2 {
            for lin in [0, 1, 0xFFFF, u64::MAX] {
                assert_eq!(b.pages.lookup(USER, lin), None, "{lin:#x}, round {round}");
            }
            b.use_code(USER, 0, 1, false);
            assert_eq!(b.known(USER, 0), Some(1));
            b.pages.flush(&mut b.cells, false);
        }
        b.use_code(USER, 0, 1, false);
        b.pages.uncache(USER, 0, 1);
        assert_eq!(b.pages.lookup(USER, 0), None);
    }

    #[test]
    fn a_flushed_page_is_found_no_more_and_others_are() {
        let mut b = Bed::new();
        for lin in [0x1000, 0x2000] {
            b.use_code(USER, lin, 1, false);
        }
        b.pages.flush_page(&mut b.cells, Some(0), 0x1000);
        assert_eq!((b.known(USER, 0x1000), b.known(USER, 0x2000)), (None, Some(1)));
        b.pages.flush(&mut b.cells, false);
        assert_eq!(b.known(USER, 0x2000), None);
    }

    #[test]
    fn user_pages_come_back_with_their_space() {
        let mut b = Bed::new();
        b.use_code(USER, 0x1000, 1, false);
        b.use_code(USER, 0x3000, 1, false);
        b.use_code(SUPERVISOR, 0x1000, 8, false);
        b.use_code(SUPERVISOR, 0x2000, 9, true);
        b.switch(1);
        assert_eq!((b.known(USER, 0x1000), b.known(SUPERVISOR, 0x1000)), (None, None));
        assert_eq!(b.known(SUPERVISOR, 0x2000), Some(9));
        b.use_code(USER, 0x1000, 2, false);
        b.pages.flush_page(&mut b.cells, Some(0), 0x3000);
        b.switch(0);
        assert_eq!((b.known(USER, 0x1000), b.known(USER, 0x3000)), (Some(1), None));
        b.pages.flush_space(&mut b.cells, 1);
        b.switch(1);
        assert_eq!(b.known(USER, 0x1000), None);
        b.switch(0);
        assert_eq!(b.known(USER, 0x1000), Some(1));
    }

    #[test]
    fn global_pages_are_known_in_all_spaces_and_flushed_in_all() {
        let mut b = Bed::new();
        for space in [0, 1] {
            b.switch(space);
            b.use_code(USER, 0x1000, 1, true);
        }
        b.pages.flush(&mut b.cells, true);
        assert_eq!(b.known(USER, 0x1000), Some(1));
        b.pages.flush_page(&mut b.cells, None, 0x1000);
        for space in [0, 1] {
            b.switch(space);
            assert_eq!(b.known(USER, 0x1000), None);
        }
    }

    #[test]
    fn a_page_that_becomes_global_leaves_nothing_behind() {
        let mut b = Bed::new();
        b.use_code(USER, 0x1000, 1, false);
        b.pages.flush_page(&mut b.cells, Some(0), 0x1000);
        b.use_code(USER, 0x1000, 2, true);
        b.pages.flush_space(&mut b.cells, 0);
        assert_eq!(b.known(USER, 0x1000), Some(2));
        b.pages.flush_page(&mut b.cells, Some(0), 0x1000);
        assert_eq!(b.known(USER, 0x1000), None);
        // The same page is one space's own and another's global one.
        b.use_code(USER, 0x1000, 3, false);
        b.switch(1);
        b.use_code(USER, 0x1000, 4, true);
        b.switch(0);
        b.pages.flush_page(&mut b.cells, Some(0), 0x1000);
        for space in [0, 1] {
            b.switch(space);
            assert_eq!(b.known(USER, 0x1000), None);
        }
    }

    #[test]
    fn one_address_of_a_large_page_stands_for_all() {
        let mut b = Bed::new();
        b.use_code(USER, 0x20_1000, 1, false);
        b.pages.large.note(0x20_1000, 21);
        b.pages.flush_page(&mut b.cells, Some(0), 0x3F_F000);
        assert_eq!(b.known(USER, 0x20_1000), None);
    }
}

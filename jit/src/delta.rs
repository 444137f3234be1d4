//! The delta tables ("FLAT"): `table[linear >> 12]` holds what to add to a linear address to get the host address
//! of the byte, for the whole 48-bit linear space, a table for reads and one for writes for each [`View`].
//!
//! Translated code looks up `table[EA bits 12 to 47]`: the index is bounded by construction, whatever the guest
//! computes. A page without a usable translation holds *poison*: a value that depends on the index so that for
//! every effective address that finds it, canonical or not, the sum is non-canonical, or lies in our guard
//! region, or in the kernel half: it can never reach host memory. Poison has its low six bits set, so that the
//! alignment test of the fast path sends aligned accesses to the slow path without a host fault.
//!
//! Table pages nobody touched are inaccessible, so that they never read as delta 0; a host fault there
//! initializes the page ([`crate::tables`]).
//!
//! **Address spaces.** The views in which user pages are seen exist once per space, so that a switch between spaces that
//! [`crate::spaces`] remembers is a reload of base addresses. The plain supervisor view is one for all spaces: under SMAP
//! it holds supervisor pages only, which are global in common kernels. Its non-global entries belong to the current
//! space and go at every switch. What is global may be filled into the views of several spaces.

use crate::large::{Extent, LargePages};
use crate::spaces;
use crate::tables::{self, ENTRIES, TableMemory};
use std::io;
use std::ops::Range;

/// What the read base holds beyond the table's address: the shift count of the index computation that keeps flags. It is the
/// smaller of the two, since most look-ups are for reads: their displacement takes a byte.
pub(crate) const READ_BIAS: u64 = 28;
/// The same of the write base: the control of BEXTR that takes bits 12 to 47.
pub(crate) const WRITE_BIAS: u64 = 12 | 36 << 8;

/// Whose accesses a table serves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum View {
    /// CPL 3.
    User = 0,
    /// CPL 0–2, SMAP not overridden.
    Supervisor = 1,
    /// CPL 0–2 with EFLAGS.AC set under SMAP.
    SupervisorAc = 2,
}

/// Tables that all spaces share: supervisor, for reads and for writes.
const SHARED: u64 = 2;
/// Tables of a space: user and supervisor with AC, each for reads and for writes.
const PER_SPACE: u64 = 4;
/// Entries remembered one by one before a flush goes over all of the group's memory.
const LOG_MAX: usize = 16_384;

/// What was filled into tables that are flushed together.
struct Group {
    tables: Range<u64>,
    /// Cells of non-global and of global pages.
    log: [Vec<u64>; 2],
    overflow: bool,
    /// The sixty-fourths of the linear space (by number) with entries of global pages.
    global_parts: u64,
}

fn part(lin: u64) -> u64 {
    1 << (lin >> 42 & 63)
}

impl Group {
    fn new(tables: Range<u64>) -> Group {
        Group { tables, log: [Vec::new(), Vec::new()], overflow: false, global_parts: 0 }
    }

    fn record(&mut self, cell: u64, lin: u64, global: bool) {
        let log = &mut self.log[usize::from(global)];
        if log.len() < LOG_MAX {
            log.push(cell);
        } else {
            self.overflow = true;
        }
        if global {
            self.global_parts |= part(lin);
        }
    }

    fn forget(&mut self) {
        self.log.iter_mut().for_each(Vec::clear);
        (self.overflow, self.global_parts) = (false, 0);
    }

    fn flush(&mut self, memory: &mut TableMemory, keep_global: bool) {
        if self.overflow {
            memory.clear_tables(self.tables.clone());
            return self.forget();
        }
        self.log[0].drain(..).for_each(|cell| memory.clear(cell));
        if !keep_global {
            self.log[1].drain(..).for_each(|cell| memory.clear(cell));
            self.forget();
        }
    }
}

/// All delta tables of one vCPU.
pub(crate) struct DeltaTables {
    memory: TableMemory,
    /// The shared tables, then those of each space.
    groups: Vec<Group>,
    active: usize,
    /// The current space's tables, by view, for reads and for writes.
    tables: [[u64; 2]; 3],
    large: LargePages,
    /// Entries filled since start.
    pub(crate) fills: u64,
}

impl DeltaTables {
    /// Tables for one of `vcpus` translators in this process; no memory yet.
    pub(crate) fn for_one_of(vcpus: usize) -> io::Result<DeltaTables> {
        DeltaTables::new(spaces::slots(vcpus, tables::address_space()), tables::share_of_mappings(vcpus))
    }

    /// Reserves address space for `spaces` spaces, or for fewer if the host allows no more; `pages` of it may be in use.
    fn new(spaces: usize, pages: usize) -> io::Result<DeltaTables> {
        let mut n = spaces as u64;
        let memory = loop {
            match TableMemory::new(SHARED + n * PER_SPACE, pages) {
                Ok(memory) => break memory,
                Err(_) if n <= 1 => {
                    return Err(io::Error::new(
                        io::ErrorKind::OutOfMemory,
                        "the translator needs 3 TiB of address space for each processor, which this host does not give \
                         (ulimit -v); use --engine interp",
                    ));
                }
                Err(_) => n /= 2,
            }
        };
        let own = (0..n as usize).map(|space| DeltaTables::tables_of(space)[0][0]).map(|t| t..t + PER_SPACE);
        let groups = std::iter::once(0..SHARED).chain(own).map(Group::new).collect();
        let tables = DeltaTables::tables_of(0);
        Ok(DeltaTables { memory, groups, active: 0, tables, large: LargePages::default(), fills: 0 })
    }

    /// Spaces there are tables for.
    pub(crate) fn spaces(&self) -> usize {
        self.groups.len() - 1
    }

    /// Table pages initialized since start.
    pub(crate) fn pages(&self) -> u64 {
        self.memory.initialized
    }

    fn group_of(view: View, space: usize) -> usize {
        if view == View::Supervisor { 0 } else { 1 + space }
    }

    fn tables_of(space: usize) -> [[u64; 2]; 3] {
        let own = SHARED + space as u64 * PER_SPACE;
        [[own, own + 1], [0, 1], [own + 2, own + 3]]
    }

    #[inline]
    fn table(&self, view: View, write: bool) -> u64 {
        self.tables[view as usize][usize::from(write)]
    }

    fn cell(table: u64, lin: u64) -> u64 {
        table * ENTRIES + ((lin << 16) >> 28)
    }

    /// What the read-view base register holds for `view`.
    #[inline]
    pub(crate) fn read_base(&self, view: View) -> u64 {
        self.memory.address(self.table(view, false)) + READ_BIAS
    }

    /// What the write-view base register holds for `view`.
    #[inline]
    pub(crate) fn write_base(&self, view: View) -> u64 {
        self.memory.address(self.table(view, true)) + WRITE_BIAS
    }

    fn forget_all(&mut self) {
        self.groups.iter_mut().for_each(Group::forget);
        self.large.clear();
    }

    /// A host fault at `address`: if it lies in a table, makes the page usable and returns true.
    pub(crate) fn handle_fault(&mut self, address: u64) -> bool {
        let Some(dropped) = self.memory.handle_fault(address) else { return false };
        if dropped {
            self.forget_all();
        }
        true
    }

    /// Lets `view` read (`write` false) or write the page of `lin`, which is part of one of `1 << page_shift` bytes, at host
    /// address `lin + delta` in the current space.
    pub(crate) fn set(
        &mut self,
        view: View,
        write: bool,
        lin: u64,
        delta: u64,
        global: bool,
        page_shift: u8,
    ) {
        let cell = DeltaTables::cell(self.table(view, write), lin);
        if self.memory.write(cell, delta) {
            self.forget_all();
        }
        self.fills += 1;
        self.large.note(lin, page_shift);
        self.groups[DeltaTables::group_of(view, self.active)].record(cell, lin, global);
    }

    /// Host address of the cell in which `view` has what is to be read at `lin`.
    pub(crate) fn read_cell(&self, view: View, lin: u64) -> u64 {
        self.memory.address(0) + 8 * DeltaTables::cell(self.table(view, false), lin)
    }

    /// The pages that programs of the current space may access by table, some more than once.
    pub(crate) fn known(&self, pages: &mut Vec<u64>) {
        let user = self.table(View::User, false);
        let group = &self.groups[1 + self.active];
        let cells = group.log.iter().flatten().filter(|&&cell| cell / ENTRIES == user);
        // Bit 47 is the sign.
        pages.extend(cells.map(|cell| (((cell % ENTRIES) << 28) as i64 >> 16) as u64));
    }

    /// Whether an invalidation at `lin` covers more than a page.
    pub(crate) fn is_large(&self, lin: u64) -> bool {
        self.large.extent(lin) != Extent::Page
    }

    /// Whether `view` has a usable entry for `lin`.
    pub(crate) fn holds(&self, view: View, write: bool, lin: u64) -> bool {
        self.memory.read(DeltaTables::cell(self.table(view, write), lin)).is_some()
    }

    /// The tables that serve writes, of all spaces.
    fn write_tables(&self) -> impl Iterator<Item = u64> + use<> {
        (1..self.groups.last().map_or(0, |g| g.tables.end)).step_by(2)
    }

    /// Revokes write access to the page of `lin` in every view of every space.
    pub(crate) fn revoke_write(&mut self, lin: u64) {
        for table in self.write_tables() {
            self.memory.clear(DeltaTables::cell(table, lin));
        }
    }

    /// Whether some view of some space writes `host` at `lin` (for reverse look-ups).
    pub(crate) fn writes(&self, lin: u64, host: u64) -> bool {
        let delta = host.wrapping_sub(lin);
        self.write_tables().any(|t| self.memory.read(DeltaTables::cell(t, lin)) == Some(delta))
    }

    /// Makes `space` the current one.
    pub(crate) fn switch(&mut self, space: usize) {
        debug_assert!(space < self.spaces());
        self.groups[0].flush(&mut self.memory, true);
        self.active = space;
        self.tables = DeltaTables::tables_of(space);
    }

    /// Forgets the page of `lin` in `space` and, if it is global, in all others: what INVLPG drops there.
    pub(crate) fn flush_page(&mut self, space: Option<usize>, lin: u64) {
        let extent = self.large.extent(lin);
        if extent == Extent::All {
            return self.flush(false);
        }
        for (i, group) in self.groups.iter().enumerate() {
            let own = space == Some(if i == 0 { self.active } else { i - 1 });
            if !own && group.global_parts & part(lin) == 0 {
                continue;
            }
            for table in group.tables.clone() {
                if extent == Extent::Page {
                    self.memory.clear(DeltaTables::cell(table, lin));
                } else {
                    for half in [lin & !(1 << 21), lin | 1 << 21] {
                        self.memory.clear_page(DeltaTables::cell(table, half));
                    }
                }
            }
        }
    }

    /// Forgets the non-global translations of `space`.
    pub(crate) fn flush_space(&mut self, space: usize) {
        if space == self.active {
            self.groups[0].flush(&mut self.memory, true);
        }
        self.groups[1 + space].flush(&mut self.memory, true);
    }

    /// Forgets the translations of all spaces; `keep_global` spares those of global pages.
    pub(crate) fn flush(&mut self, keep_global: bool) {
        for group in &mut self.groups {
            group.flush(&mut self.memory, keep_global);
        }
        if !keep_global {
            self.large.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables() -> DeltaTables {
        DeltaTables::new(3, 1000).expect("reservation")
    }

    /// What translated code computes for `ea`; the entry must have been filled before.
    fn sum(t: &DeltaTables, view: View, write: bool, ea: u64) -> u64 {
        let table = if write { t.write_base(view) - WRITE_BIAS } else { t.read_base(view) - READ_BIAS };
        ea.wrapping_add(t.memory.at(table + ((ea << 16) >> 28) * 8))
    }

    #[test]
    fn a_filled_entry_maps_its_page_and_no_other_alias() {
        let mut t = tables();
        let lin = 0xFFFF_8880_0000_3000u64;
        t.set(View::Supervisor, false, lin, 0x7000_0000_0000u64.wrapping_sub(lin), true, 12);
        assert_eq!(sum(&t, View::Supervisor, false, lin + 5), 0x7000_0000_0005);
        let alias = sum(&t, View::Supervisor, false, (lin + 5) & 0xFFFF_FFFF_FFFF);
        assert!(alias >> 47 != 0, "an alias must not be a user address: {alias:#x}");
    }

    #[test]
    fn poison_reaches_only_the_guard_for_any_top_bits() {
        let mut t = tables();
        for lin in [0x40_0000u64, 0x7FFF_FFFF_F000, 0xFFFF_8000_0000_0000, 0xFFFF_FFFF_FFFF_F000] {
            t.set(View::User, true, lin, 0, false, 12);
            t.flush(true);
            for top in 0..=0xFFFFu64 {
                let ea = (lin & 0xFFFF_FFFF_FFFF) | top << 48 | 0x123;
                let s = sum(&t, View::User, true, ea);
                assert!(t.memory.in_guard(s) || s >> 47 != 0, "{ea:#x} -> {s:#x}");
            }
            assert!((sum(&t, View::User, true, lin) as i64) < 0, "the sign test must see poison");
            assert_ne!(sum(&t, View::User, true, lin) & 7, 0);
        }
    }

    #[test]
    fn entries_come_back_with_their_space() {
        let mut t = tables();
        let user = |t: &DeltaTables| t.holds(View::User, false, 0x1000);
        t.set(View::User, false, 0x1000, 0, false, 12);
        t.set(View::SupervisorAc, true, 0x1000, 0, false, 12);
        t.switch(1);
        assert!(!user(&t) && !t.holds(View::SupervisorAc, true, 0x1000));
        t.switch(0);
        assert!(user(&t) && t.holds(View::SupervisorAc, true, 0x1000));
        t.switch(2);
        t.flush_space(0);
        t.switch(0);
        assert!(!user(&t) && !t.holds(View::SupervisorAc, true, 0x1000));
    }

    #[test]
    fn supervisor_entries_cross_a_switch_only_if_global() {
        let mut t = tables();
        let (local, global) = (0xFFFF_8000_0000_0000, 0xFFFF_8000_0000_1000);
        t.set(View::Supervisor, true, local, 0, false, 12);
        t.set(View::Supervisor, true, global, 0, true, 12);
        t.switch(1);
        assert!(!t.holds(View::Supervisor, true, local) && t.holds(View::Supervisor, true, global));
        t.flush_space(1);
        assert!(t.holds(View::Supervisor, true, global));
        t.flush(false);
        assert!(!t.holds(View::Supervisor, true, global));
    }

    #[test]
    fn a_flush_of_all_spaces_spares_global_entries() {
        let mut t = tables();
        for space in [1, 0] {
            t.switch(space);
            t.set(View::User, false, 0x1000, 0, false, 12);
            t.set(View::User, false, 0x2000, 0, true, 12);
        }
        t.flush(true);
        for space in [0, 1] {
            t.switch(space);
            assert!(!t.holds(View::User, false, 0x1000) && t.holds(View::User, false, 0x2000));
        }
    }

    #[test]
    fn a_page_is_flushed_in_its_space_and_where_it_is_global() {
        let mut t = tables();
        for (space, global) in [(0, false), (1, false), (2, true)] {
            t.switch(space);
            // Far apart, so that what is flushed with global pages beside it does not hide what is not.
            t.set(View::User, false, 0x5000_0000_0000, 0, global, 12);
            t.set(View::User, false, 0x1000, 0, false, 12);
        }
        for lin in [0x5000_0000_0123, 0x1FFF] {
            t.flush_page(Some(1), lin);
        }
        t.flush_page(None, 0x1000);
        for (space, far, near) in [(0, true, true), (1, false, false), (2, false, true)] {
            t.switch(space);
            assert_eq!(t.holds(View::User, false, 0x5000_0000_0000), far, "far, space {space}");
            assert_eq!(t.holds(View::User, false, 0x1000), near, "near, space {space}");
        }
    }

    #[test]
    fn flushing_a_page_of_a_large_page_flushes_all_of_it() {
        let mut t = tables();
        for (lin, shift, other) in
            [(0x20_1000, 21, 0x20_5000), (0x80_0000, 22, 0xBF_F000), (0x4000_0000, 30, 0x7FFF_F000)]
        {
            t.set(View::User, false, lin, 0, false, shift);
            t.flush_page(Some(0), other);
            assert!(!t.holds(View::User, false, lin), "{lin:#x}");
        }
    }

    #[test]
    fn more_entries_than_are_remembered_are_flushed_all_the_same() {
        let mut t = tables();
        let last = 2 * LOG_MAX as u64;
        for page in 0..=last {
            t.set(View::User, false, page << 12, 0, false, 12);
        }
        t.switch(1);
        t.set(View::User, false, 0x1000, 0, false, 12);
        t.flush_space(0);
        assert!(t.holds(View::User, false, 0x1000));
        t.switch(0);
        assert!(!(0..=last).any(|page| t.holds(View::User, false, page << 12)));
    }

    #[test]
    fn a_host_without_room_for_all_spaces_gives_fewer() {
        // 1000 spaces need 2001 TiB; a process has 128.
        let t = DeltaTables::new(1000, 1000).expect("reservation");
        assert!((1..64).contains(&t.spaces()));
    }

    #[test]
    fn write_access_is_revoked_in_every_space() {
        let mut t = tables();
        for space in 0..3 {
            t.switch(space);
            t.set(View::User, true, 0x1000, 0x9000, false, 12);
        }
        t.switch(0);
        assert!(t.writes(0x1000, 0xA000) && !t.writes(0x1000, 0xB000));
        t.revoke_write(0x1000);
        assert!(!t.writes(0x1000, 0xA000));
    }
}

//! The memory of the delta tables: one reservation of address space, whose pages become accessible when they are first
//! touched, full of poison.
//!
//! Cells are numbered over all tables: cell `n` of table `t` is `t * ENTRIES + n`.
//!
//! Invariants this unsafe island relies on:
//! * `base..base + count * TABLE_BYTES` is part of our own reservation, which `reserved` begins, for the life of the value;
//! * a page of it is accessible exactly if `ready` holds its number, and then has only poison or what [`TableMemory::write`]
//!   put there;
//! * `guard..guard + GUARD_BYTES` is never mapped accessible.

use crate::windows::reserve_aside;
use std::io;

/// Entries per table: one for each page of a 48-bit space.
pub(crate) const ENTRIES: u64 = 1 << 36;
const TABLE_BYTES: u64 = ENTRIES * 8;
const GUARD_BYTES: u64 = 1 << 16;
/// Of the tables' addresses: base registers hold constants in the low bits.
const ALIGNMENT: u64 = 1 << 16;
/// Entries on one page of a table.
const PAGE_ENTRIES: u64 = 512;
/// Table pages that one translator may have accessible at a time (48 MiB).
const MAX_READY: usize = 12_288;
/// The same for all of a process. Each page may take two of the mappings that the host allows (vm.max_map_count, 65,530), and so
/// may the pages of windows.
const ALL_READY: usize = 12_288;

/// How many pages each of `vcpus` translators in a process may have accessible.
pub(crate) fn share_of_mappings(vcpus: usize) -> usize {
    (ALL_READY / vcpus.max(1)).min(MAX_READY)
}

/// TiB of address space that the tables of all translators may reserve: the host has 128, if it is not limited.
pub(crate) fn address_space() -> usize {
    let mut limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: a query with a valid out-pointer, which is left alone should it fail.
    unsafe { libc::getrlimit(libc::RLIMIT_AS, &mut limit) };
    (limit.rlim_cur >> 40).min(112) as usize
}

/// A set of page numbers in memory that was allocated before: the host-fault path must not allocate.
struct PageSet {
    /// Open addressing; page number + 1, or 0. A power of two.
    slots: Box<[u64]>,
}

impl PageSet {
    fn new(members: usize) -> PageSet {
        PageSet { slots: vec![0; (2 * members).next_power_of_two()].into() }
    }

    /// The slot that holds `page`, or where it belongs.
    #[inline]
    fn slot(&self, page: u64) -> usize {
        let mask = self.slots.len() - 1;
        let mut at = (page.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as usize & mask;
        while self.slots[at] != 0 && self.slots[at] != page + 1 {
            at = (at + 1) & mask;
        }
        at
    }

    #[inline]
    fn contains(&self, page: u64) -> bool {
        self.slots[self.slot(page)] != 0
    }

    fn insert(&mut self, page: u64) {
        let at = self.slot(page);
        self.slots[at] = page + 1;
    }
}

/// See the module's documentation.
pub(crate) struct TableMemory {
    /// The reservation, and the first multiple of [`ALIGNMENT`] in it.
    reserved: *mut u8,
    base: *mut u8,
    count: u64,
    guard: u64,
    ready: PageSet,
    touched: Vec<u64>,
    /// Pages ready before all are dropped (bounds host memory and mappings).
    max_ready: usize,
    /// Pages initialized since start.
    pub(crate) initialized: u64,
}

// SAFETY: owned reservations, used from one thread at a time.
unsafe impl Send for TableMemory {}

/// Inaccessible address space at `at` (which is ours), or at a place of the kernel's choice.
fn reserve(at: Option<*mut u8>, len: u64) -> io::Result<*mut u8> {
    let fixed = if at.is_some() { libc::MAP_FIXED } else { 0 };
    // SAFETY: an anonymous reservation; MAP_FIXED only over one that the caller owns.
    let p = unsafe {
        libc::mmap(
            at.unwrap_or(std::ptr::null_mut()).cast(),
            len as usize,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | fixed,
            -1,
            0,
        )
    };
    if p == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(p.cast()) }
}

impl TableMemory {
    /// Reserves address space for `count` tables, of which up to `max_ready` pages are accessible at a time; no memory yet.
    pub(crate) fn new(count: u64, max_ready: usize) -> io::Result<TableMemory> {
        let guard = reserve(None, GUARD_BYTES)? as u64;
        let reserved = reserve_aside(count * TABLE_BYTES + ALIGNMENT).inspect_err(|_| {
            // SAFETY: the reservation made just now.
            unsafe { libc::munmap(guard as *mut libc::c_void, GUARD_BYTES as usize) };
        })?;
        let base = reserved.wrapping_add(reserved.align_offset(ALIGNMENT as usize));
        Ok(TableMemory {
            reserved,
            base,
            count,
            guard,
            ready: PageSet::new(max_ready),
            touched: Vec::with_capacity(max_ready),
            max_ready,
            initialized: 0,
        })
    }

    /// Address of table `table`.
    #[inline]
    pub(crate) fn address(&self, table: u64) -> u64 {
        self.base as u64 + table * TABLE_BYTES
    }

    /// Poison: for every effective address that finds the cell, canonical or not, the sum is non-canonical, or in the
    /// guard, or in the kernel half.
    fn poison(&self, cell: u64) -> u64 {
        // Sign-extend the page address from bit 47, as canonical effective addresses are.
        let page = (((cell % ENTRIES) << 28) as i64 >> 16) as u64;
        ((self.guard + GUARD_BYTES / 2) | 0x3F).wrapping_add(1 << 63).wrapping_sub(page)
    }

    fn pointer(&self, cell: u64) -> *mut u64 {
        assert!(cell < self.count * ENTRIES);
        // SAFETY: inside the reservation.
        unsafe { self.base.cast::<u64>().add(cell as usize) }
    }

    fn fill_poison(&mut self, page: u64) {
        let first = page * PAGE_ENTRIES;
        let (p, start) = (self.pointer(first), self.poison(first));
        for i in 0..PAGE_ENTRIES {
            // SAFETY: the page is ready and holds 512 cells; poison falls by one page per entry.
            unsafe { p.add(i as usize).write(start.wrapping_sub(i << 12)) };
        }
    }

    /// Makes the page of `cell` accessible and poisoned; true if all others had to be dropped for that.
    fn ensure(&mut self, cell: u64) -> bool {
        let page = cell / PAGE_ENTRIES;
        if self.ready.contains(page) {
            return false;
        }
        let mut full = self.touched.len() >= self.max_ready;
        if full {
            self.drop_all();
        }
        if !self.open(page) {
            // Others use up the host's mappings: do with what our own were.
            full = true;
            self.drop_all();
            assert!(self.open(page), "delta table page: {}", io::Error::last_os_error());
        }
        self.ready.insert(page);
        self.touched.push(page);
        self.initialized += 1;
        self.fill_poison(page);
        full
    }

    /// Makes a page accessible, if the host has a mapping to spare.
    fn open(&mut self, page: u64) -> bool {
        let at = self.pointer(page * PAGE_ENTRIES);
        // SAFETY: one page of our own reservation.
        unsafe { libc::mprotect(at.cast(), 4096, libc::PROT_READ | libc::PROT_WRITE) == 0 }
    }

    /// Gives all memory back.
    fn drop_all(&mut self) {
        self.ready.slots.fill(0);
        self.touched.clear();
        reserve(Some(self.base), self.count * TABLE_BYTES).expect("the delta tables' own address space");
    }

    /// Writes a cell; true if all others were dropped for that.
    pub(crate) fn write(&mut self, cell: u64, delta: u64) -> bool {
        let dropped = self.ensure(cell);
        // SAFETY: the page was made ready just now.
        unsafe { self.pointer(cell).write(delta) };
        dropped
    }

    /// The delta in a cell, unless that is poison.
    pub(crate) fn read(&self, cell: u64) -> Option<u64> {
        if !self.ready.contains(cell / PAGE_ENTRIES) {
            return None;
        }
        // SAFETY: the page is ready.
        let delta = unsafe { self.pointer(cell).read() };
        (delta & 0xFFF == 0).then_some(delta)
    }

    /// Poisons a cell.
    pub(crate) fn clear(&mut self, cell: u64) {
        if self.ready.contains(cell / PAGE_ENTRIES) {
            let poison = self.poison(cell);
            // SAFETY: the page is ready.
            unsafe { self.pointer(cell).write(poison) };
        }
    }

    /// Poisons the page of `cell`, which covers 2 MiB.
    pub(crate) fn clear_page(&mut self, cell: u64) {
        if self.ready.contains(cell / PAGE_ENTRIES) {
            self.fill_poison(cell / PAGE_ENTRIES);
        }
    }

    /// Poisons all of the given tables.
    pub(crate) fn clear_tables(&mut self, tables: std::ops::Range<u64>) {
        for i in 0..self.touched.len() {
            if tables.contains(&(self.touched[i] * PAGE_ENTRIES / ENTRIES)) {
                self.fill_poison(self.touched[i]);
            }
        }
    }

    /// A host fault at `address`: whether it lies on a table page that was not ready, and is now; and whether all others
    /// were dropped for that. Allocates nothing.
    pub(crate) fn handle_fault(&mut self, address: u64) -> Option<bool> {
        let cell = address.checked_sub(self.base as u64)? / 8;
        if cell >= self.count * ENTRIES || self.ready.contains(cell / PAGE_ENTRIES) {
            return None;
        }
        Some(self.ensure(cell))
    }

    /// What the cell at host address `at`, which must be on a page in use, holds.
    #[cfg(test)]
    pub(crate) fn at(&self, at: u64) -> u64 {
        let cell = (at - self.base as u64) / 8;
        assert!(self.ready.contains(cell / PAGE_ENTRIES));
        // SAFETY: the page is ready.
        unsafe { self.pointer(cell).read() }
    }

    #[cfg(test)]
    pub(crate) fn in_guard(&self, address: u64) -> bool {
        address.wrapping_sub(self.guard) < GUARD_BYTES
    }
}

impl Drop for TableMemory {
    fn drop(&mut self) {
        // SAFETY: our own reservations, unmapped once.
        unsafe {
            libc::munmap(self.reserved.cast(), (self.count * TABLE_BYTES + ALIGNMENT) as usize);
            libc::munmap(self.guard as *mut libc::c_void, GUARD_BYTES as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_poison_until_written_and_after_they_are_cleared() {
        let mut t = TableMemory::new(3, 10).expect("reservation");
        let cell = 2 * ENTRIES + 5;
        assert_eq!(t.read(cell), None);
        assert!(!t.write(cell, 0x1000));
        assert_eq!((t.read(cell), t.read(cell + 1), t.read(5)), (Some(0x1000), None, None));
        t.clear_tables(0..2);
        assert_eq!(t.read(cell), Some(0x1000));
        t.clear_tables(2..3);
        assert_eq!(t.read(cell), None);
    }

    #[test]
    fn the_memory_in_use_is_bounded() {
        let mut t = TableMemory::new(2, MAX_READY).expect("reservation");
        let mut dropped = 0;
        for page in 0..2 * MAX_READY as u64 + 10 {
            dropped += u32::from(t.write(page * PAGE_ENTRIES * 77 % ENTRIES, 0));
            assert!(t.touched.len() <= MAX_READY);
        }
        assert_eq!(dropped, 2);
        assert_eq!(t.read(0), None);
    }
}

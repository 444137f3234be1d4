//! The delta tables ("FLAT"): `table[linear >> 12]` holds what to add to a linear address to get the host address
//! of the byte, for the whole 48-bit linear space, one table per [`View`].
//!
//! Translated code looks up `table[(EA << 16) >> 28]`: the index is bounded by construction, whatever the guest
//! computes. A page without a usable translation holds *poison*: a value that depends on the index so that for
//! every effective address that finds it, canonical or not, the sum is non-canonical, or lies in our guard
//! region, or in the kernel half: it can never reach host memory. Poison has its low six bits set, so that the
//! alignment test of the fast path sends aligned accesses to the slow path without a host fault.
//!
//! Table pages nobody touched are inaccessible, so that they never read as delta 0; a host fault there
//! initializes the page.
//!
//! Invariants this unsafe island relies on:
//! * `base..base + TABLES * TABLE_BYTES` is our own reservation for the life of the value;
//! * a table page is accessible exactly if its bit in `ready` is set, and then holds only poison or deltas that
//!   map a linear page to a page of the guest memory backing;
//! * `guard..guard + GUARD_BYTES` is never mapped accessible.

use std::io;

/// Entries per table: one for each page of a 48-bit space.
const ENTRIES: u64 = 1 << 36;
const TABLE_BYTES: u64 = ENTRIES * 8;
const TABLES: u64 = 6;
const GUARD_BYTES: u64 = 1 << 16;
/// Table pages accessible at a time before all are dropped (bounds host memory and mappings).
const MAX_READY: usize = 12_288;
/// What the base registers hold beyond the table's address: the shift count of the index computation.
pub(crate) const BASE_BIAS: u64 = 28;

/// Whose accesses a table serves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum View {
    /// CPL 3.
    User = 0,
    /// CPL 0–2, SMAP not overridden.
    Supervisor = 1,
    /// CPL 0–2 with EFLAGS.AC set under SMAP.
    SupervisorAc = 2,
}

/// All delta tables of one vCPU.
pub(crate) struct DeltaTables {
    base: *mut u8,
    guard: u64,
    ready: Vec<u64>,
    touched: Vec<u32>,
    log: [Vec<u64>; 2],
    log_overflow: [bool; 2],
    large: hashbrown::HashSet<u64>,
    /// Entries filled since start.
    pub(crate) fills: u64,
    /// Table pages initialized since start.
    pub(crate) pages: u64,
}

// SAFETY: owned reservation, used from one thread at a time.
unsafe impl Send for DeltaTables {}

fn reserve(len: u64) -> io::Result<*mut u8> {
    // SAFETY: an inaccessible anonymous reservation at an address of the kernel's choice.
    let p = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len as usize,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if p == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(p.cast()) }
}

const LOG_MAX: usize = 16_384;

/// Which of an entry's two tables.
const WRITE: u64 = 3;

impl DeltaTables {
    /// Reserves address space; no memory yet.
    pub(crate) fn new() -> io::Result<DeltaTables> {
        let base = reserve(TABLES * TABLE_BYTES)?;
        let guard = reserve(GUARD_BYTES)? as u64;
        Ok(DeltaTables {
            base,
            guard: guard + GUARD_BYTES / 2,
            ready: vec![0; (TABLES * TABLE_BYTES / 4096 / 64) as usize],
            touched: Vec::with_capacity(MAX_READY),
            log: [Vec::new(), Vec::new()],
            log_overflow: [false; 2],
            large: hashbrown::HashSet::new(),
            fills: 0,
            pages: 0,
        })
    }

    /// What the read-view base register holds for `view`.
    pub(crate) fn read_base(&self, view: View) -> u64 {
        self.base as u64 + u64::from(view as u8) * TABLE_BYTES + BASE_BIAS
    }

    /// What the write-view base register holds for `view`.
    pub(crate) fn write_base(&self, view: View) -> u64 {
        self.read_base(view) + WRITE * TABLE_BYTES
    }

    fn poison(&self, index: u64) -> u64 {
        // Sign-extend the page address from bit 47, as canonical effective addresses are.
        let page = ((index << 28) as i64 >> 16) as u64;
        (self.guard | 0x3F).wrapping_add(1 << 63).wrapping_sub(page)
    }

    /// `cell` counts entries over all tables.
    fn cell_ptr(&self, cell: u64) -> *mut u64 {
        debug_assert!(cell < TABLES * ENTRIES);
        // SAFETY: inside the reservation, for every cell number below TABLES * ENTRIES.
        unsafe { self.base.cast::<u64>().add(cell as usize) }
    }

    fn cell(view: u64, lin: u64) -> u64 {
        view * ENTRIES + ((lin << 16) >> 28)
    }

    fn is_ready(&self, page: u64) -> bool {
        self.ready[(page / 64) as usize] & (1 << (page % 64)) != 0
    }

    fn fill_poison(&mut self, page: u64) {
        let first = page * 512;
        let start = self.poison(first % ENTRIES);
        let p = self.cell_ptr(first);
        for i in 0..512u64 {
            // SAFETY: the page is ready (accessible) and holds 512 cells; poison falls by one page per entry.
            unsafe { p.add(i as usize).write(start.wrapping_sub(i << 12)) };
        }
    }

    /// Makes table page `page` accessible and poisoned.
    fn ensure(&mut self, page: u64) {
        if self.is_ready(page) {
            return;
        }
        if self.touched.len() >= MAX_READY {
            self.drop_all();
        }
        // SAFETY: one page of our own reservation.
        let rc = unsafe {
            libc::mprotect(
                self.base.add((page * 4096) as usize).cast(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
            )
        };
        assert_eq!(rc, 0, "delta table page: {}", io::Error::last_os_error());
        self.ready[(page / 64) as usize] |= 1 << (page % 64);
        self.touched.push(page as u32);
        self.pages += 1;
        self.fill_poison(page);
    }

    /// Gives all table memory back.
    fn drop_all(&mut self) {
        for &page in &self.touched {
            self.ready[(page / 64) as usize] &= !(1 << (page % 64));
        }
        self.touched.clear();
        // SAFETY: replaces our own reservation by a fresh inaccessible one at the same place.
        let p = unsafe {
            libc::mmap(
                self.base.cast(),
                (TABLES * TABLE_BYTES) as usize,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        assert_ne!(p, libc::MAP_FAILED, "delta tables: {}", io::Error::last_os_error());
        self.log.iter_mut().for_each(Vec::clear);
        self.log_overflow = [false; 2];
        self.large.clear();
    }

    /// A host fault at `address`: if it lies in a table, makes the page usable and returns true.
    pub(crate) fn handle_fault(&mut self, address: u64) -> bool {
        let Some(off) = address.checked_sub(self.base as u64) else { return false };
        if off >= TABLES * TABLE_BYTES {
            return false;
        }
        let page = off / 4096;
        if self.is_ready(page) {
            return false;
        }
        self.ensure(page);
        true
    }

    /// Lets `view` read (`write` false) or write the page of `lin` at host address `lin + delta`.
    pub(crate) fn set(&mut self, view: View, write: bool, lin: u64, delta: u64, global: bool, large: bool) {
        let table = u64::from(view as u8) + if write { WRITE } else { 0 };
        let cell = Self::cell(table, lin);
        self.ensure(cell / 512);
        // SAFETY: the table page was made ready just now.
        unsafe { self.cell_ptr(cell).write(delta) };
        self.fills += 1;
        if large {
            self.large.insert((lin << 16) >> 37);
        }
        let g = usize::from(global);
        if self.log[g].len() < LOG_MAX {
            self.log[g].push(cell);
        } else {
            self.log_overflow[g] = true;
        }
    }

    fn poison_cell(&mut self, cell: u64) {
        if self.is_ready(cell / 512) {
            let p = self.poison(cell % ENTRIES);
            // SAFETY: the table page is ready.
            unsafe { self.cell_ptr(cell).write(p) };
        }
    }

    /// Revokes write access to the page of `lin` in every view.
    pub(crate) fn revoke_write(&mut self, lin: u64) {
        for view in 0..3 {
            self.poison_cell(Self::cell(view + WRITE, lin));
        }
    }

    /// The host address that write view `view` gives for `lin`, if any (for reverse look-ups).
    pub(crate) fn written_host(&self, view: u64, lin: u64) -> Option<u64> {
        let cell = Self::cell(view + WRITE, lin);
        if !self.is_ready(cell / 512) {
            return None;
        }
        // SAFETY: the table page is ready.
        let d = unsafe { self.cell_ptr(cell).read() };
        (d & 0xFFF == 0).then(|| d.wrapping_add(lin))
    }

    /// Whether `view` has a usable entry for `lin`.
    pub(crate) fn holds(&self, view: View, write: bool, lin: u64) -> bool {
        let cell = Self::cell(u64::from(view as u8) + if write { WRITE } else { 0 }, lin);
        // SAFETY: read only if the table page is ready.
        self.is_ready(cell / 512) && unsafe { self.cell_ptr(cell).read() } & 0xFFF == 0
    }

    /// Forgets the translation of the page of `lin` (INVLPG), of its whole 2 MiB where a large page may be.
    pub(crate) fn flush_page(&mut self, lin: u64) {
        let large = self.large.contains(&((lin << 16) >> 37));
        for table in 0..TABLES {
            let cell = Self::cell(table, lin);
            if !large {
                self.poison_cell(cell);
            } else if self.is_ready(cell / 512) {
                self.fill_poison(cell / 512);
            }
        }
    }

    fn flush_log(&mut self, g: usize) {
        for cell in std::mem::take(&mut self.log[g]) {
            self.poison_cell(cell);
        }
    }

    /// Forgets all translations; `keep_global` spares those of global pages.
    pub(crate) fn flush(&mut self, keep_global: bool) {
        if self.log_overflow[0] || (!keep_global && self.log_overflow[1]) {
            for i in 0..self.touched.len() {
                self.fill_poison(u64::from(self.touched[i]));
            }
            self.log[0].clear();
            self.log[1].clear();
            self.log_overflow = [false; 2];
            self.large.clear();
            return;
        }
        self.flush_log(0);
        if !keep_global {
            self.flush_log(1);
            self.large.clear();
        }
    }
}

impl Drop for DeltaTables {
    fn drop(&mut self) {
        // SAFETY: our own reservations, unmapped once.
        unsafe {
            libc::munmap(self.base.cast(), (TABLES * TABLE_BYTES) as usize);
            libc::munmap((self.guard - GUARD_BYTES / 2) as *mut libc::c_void, GUARD_BYTES as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What translated code computes for `ea`.
    fn sum(t: &DeltaTables, view: View, write: bool, ea: u64) -> u64 {
        let base = if write { t.write_base(view) } else { t.read_base(view) };
        let cell = (base - BASE_BIAS) + ((ea << 16) >> 28) * 8;
        // SAFETY: tests ask only for cells of ready pages.
        ea.wrapping_add(unsafe { (cell as *const u64).read() })
    }

    #[test]
    fn a_filled_entry_maps_its_page_and_no_other_alias() {
        let mut t = DeltaTables::new().expect("reservation");
        let lin = 0xFFFF_8880_0000_3000u64;
        t.set(View::Supervisor, false, lin, 0x7000_0000_0000u64.wrapping_sub(lin), true, false);
        assert_eq!(sum(&t, View::Supervisor, false, lin + 5), 0x7000_0000_0005);
        let alias = sum(&t, View::Supervisor, false, (lin + 5) & 0xFFFF_FFFF_FFFF);
        assert!(alias >> 47 != 0, "an alias must not be a user address: {alias:#x}");
    }

    #[test]
    fn poison_reaches_only_the_guard_for_any_top_bits() {
        let mut t = DeltaTables::new().expect("reservation");
        for lin in [0x40_0000u64, 0x7FFF_FFFF_F000, 0xFFFF_8000_0000_0000, 0xFFFF_FFFF_FFFF_F000] {
            t.set(View::User, true, lin, 0, false, false);
            t.flush(true);
            for top in 0..=0xFFFFu64 {
                let ea = (lin & 0xFFFF_FFFF_FFFF) | top << 48 | 0x123;
                let s = sum(&t, View::User, true, ea);
                let in_guard = s.wrapping_sub(t.guard) < 0x2000;
                assert!(in_guard || s >> 47 != 0, "{ea:#x} -> {s:#x}");
            }
            assert!((sum(&t, View::User, true, lin) as i64) < 0, "the sign test must see poison");
            assert_ne!(sum(&t, View::User, true, lin) & 7, 0);
        }
    }

    #[test]
    fn global_entries_survive_an_address_space_switch() {
        let mut t = DeltaTables::new().expect("reservation");
        t.set(View::User, false, 0x1000, 0x1000, false, false);
        t.set(View::User, false, 0x2000, 0x1000, true, false);
        t.flush(true);
        assert!((sum(&t, View::User, false, 0x1000) as i64) < 0);
        assert_eq!(sum(&t, View::User, false, 0x2000), 0x3000);
        t.flush(false);
        assert!((sum(&t, View::User, false, 0x2000) as i64) < 0);
    }

    #[test]
    fn flushing_a_page_of_a_large_page_flushes_all_of_it() {
        let mut t = DeltaTables::new().expect("reservation");
        t.set(View::User, false, 0x20_1000, 0, false, true);
        t.flush_page(0x20_5000);
        assert!((sum(&t, View::User, false, 0x20_1000) as i64) < 0);
    }
}

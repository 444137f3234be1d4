//! Windows: the lower half of an address space as the host's own page tables show it, so that translated code of programs reaches a
//! byte at its linear address plus a constant, which is the base of the host's GS, without a look-up.
//!
//! A window shows pages of guest memory one by one, as the delta tables have them, when they are first accessed: a host fault
//! asks for that, which costs some microseconds, so windows are for programs that run for some time (`translator::window`
//! decides). What is not shown, or shown for reading only, makes the host fault.
//!
//! **No address leads elsewhere.** The lower half is divided into *regions*. Translated code *probes* an address before it uses it: it reads
//! the address's byte in [`Probes`], a reservation with a host page for each region. The page can be read only if the region is *admitted*: all of
//! its image on the host, and of its two neighbours' images, is our own reservation (or is not for programs at all). Else the probe faults,
//! with flags and registers as they were. Operands may be [`REACH`] behind an address that was probed, which makes one probe do for most of a block.
//!
//! **The stack pointer needs no probe** in most blocks: where a block is entered, it is in an admitted region, or not further than
//! [`STACK_REACH`] from one. Blocks see to that for the next one: a word that was pushed or popped lies in such a region, and where RSP went
//! further since, it is probed. Who comes from elsewhere (the run loop, SYSRET, IRET) is checked ([`Windows::stack`]).
//!
//! 32-bit code needs no probes: addresses have 32 bits, to which the host cuts them itself, and *all* 4 GiB of its window, with
//! a region before and behind, are our own reservation. So there are two kinds of windows ([`Reach`]), and code of one size has none
//! of the other's kind.
//!
//! Invariants this unsafe island relies on:
//! * what a window lists in `reserved` is address space of its own, in which there is nothing but pages of guest memory that it
//!   mapped there; an admitted region and its neighbours are listed, as far as the host has such addresses for programs;
//! * a window for 32-bit code lists the 4 GiB and their neighbours.

mod probes;
mod reservation;

use crate::block::Mode;
use hashbrown::HashMap;
pub(crate) use probes::PROBE_SHIFT;
use probes::{Probes, REGION_SHIFT, REGIONS};
pub(crate) use reservation::reserve_aside;
use reservation::{release, reserve};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};

/// How far behind a probed address an operand may begin.
pub(crate) const REACH: u64 = 1 << 23;
/// How far the stack pointer may be from an admitted region, in 64-bit code that enters a block.
pub(crate) const STACK_REACH: u64 = 1 << 17;
/// Where the host has addresses for programs: not below vm.mmap_min_addr, and not on the last page of the lower half.
const USABLE: Range<u64> = 1 << 16..(1 << 47) - 4096;
/// Pages that the windows of all translators in a process may show, each at worst with two of the mappings that the host allows.
const ALL_PAGES: usize = 12_288;
/// Regions that the windows of all translators may have, and those of one; each may take a mapping, too, and two more among the probes.
const ALL_REGIONS: usize = 4_096;
const MAX_REGIONS: usize = 1_024;
/// Pages of a chunk, which one page table shows.
const CHUNK: usize = 512;
/// Windows lie this far apart: randomization moves programs and libraries by up to 1 TiB.
const STEP: u64 = 1 << 41;
const STEPS: u64 = 40;

/// A page that is shown: its number in guest memory + 1 and, in bit 0, whether it may be written; 0 for none.
type Shown = u32;

fn shown(ram: u64, write: bool) -> Shown {
    (ram as u32 + 1) << 1 | u32::from(write)
}

/// What is shown of 2 MiB.
struct Chunk {
    pages: Box<[Shown; CHUNK]>,
    count: usize,
}

/// What a window may show.
enum Admitted {
    Regions(Vec<u64>, Probes),
    All32,
}

/// Bits of an address that say which region it is in.
const REGION: u64 = !((1 << REGION_SHIFT) - 1);
/// Regions that 32-bit code has.
const ALL_32: u64 = 1 << (32 - REGION_SHIFT);

impl Admitted {
    fn has(&self, lin: u64) -> bool {
        let region = lin >> REGION_SHIFT;
        match self {
            Admitted::Regions(regions, _) => regions.contains(&region),
            Admitted::All32 => region < ALL_32,
        }
    }

    fn probes(&self) -> Option<&Probes> {
        match self {
            Admitted::Regions(_, probes) => Some(probes),
            Admitted::All32 => None,
        }
    }
}

/// The window of one address space.
struct Window {
    /// What to add to a linear address.
    delta: u64,
    /// The page tables' root.
    root: u64,
    /// Regions of 64-bit code's addresses that are admitted, or all that 32-bit code has.
    admitted: Admitted,
    /// Ranges of the host's regions that are reserved.
    reserved: Vec<Range<u64>>,
    /// The first address of the admitted region in which RSP was found last.
    stack: u64,
    chunks: HashMap<u64, Chunk>,
    pages: usize,
    /// The guest flushed translations: what is shown must be compared with its page tables before it is used.
    stale: bool,
}

/// See the module's documentation.
pub(crate) struct Windows {
    ram: OwnedFd,
    spaces: Vec<Option<Window>>,
    active: usize,
    /// This translator's number, the pages it may show, and the regions that each window may have.
    vp: u64,
    max_pages: usize,
    max_regions: usize,
    /// The current window cannot serve its space.
    pub(crate) unfit: bool,
    /// There shall be none.
    forbidden: bool,
    /// Since start: windows, pages shown, and times that windows were compared with page tables.
    pub(crate) opened: u64,
    pub(crate) shown: u64,
    pub(crate) compared: u64,
}

/// Where a window must be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Reach {
    /// All of the program lies below 4 GiB.
    Low,
    /// All of it lies above.
    High,
    /// Some of it lies below, some above, perhaps at the end of the lower half: linear addresses are the host's.
    Everywhere,
    /// It is 32-bit code: all it can reach lies below 4 GiB.
    All32,
}

impl Reach {
    /// For a 64-bit program with all of these addresses.
    pub(crate) fn of(addresses: &[u64]) -> Reach {
        let low = |lin: &u64| lin >> 32 == 0;
        match (addresses.iter().any(low), addresses.iter().all(low)) {
            (true, true) => Reach::Low,
            (true, false) => Reach::Everywhere,
            (false, _) => Reach::High,
        }
    }
}

/// Whether the host lets programs set the base of GS.
fn can_set_gs() -> bool {
    const HWCAP2_FSGSBASE: u64 = 1 << 1;
    // SAFETY: a query.
    unsafe { libc::getauxval(libc::AT_HWCAP2) & HWCAP2_FSGSBASE != 0 }
}

/// The addresses of some of the host's regions that programs can have.
fn extent(regions: &Range<u64>) -> Range<u64> {
    (regions.start << REGION_SHIFT).max(USABLE.start)..(regions.end << REGION_SHIFT).min(USABLE.end)
}

impl Window {
    fn host(&self, lin: u64) -> u64 {
        lin.wrapping_add(self.delta)
    }

    fn page(&self, lin: u64) -> Shown {
        self.chunks.get(&(lin >> 21)).map_or(0, |c| c.pages[(lin >> 12) as usize % CHUNK])
    }

    fn set(&mut self, lin: u64, page: Shown) {
        let chunk = || Chunk { pages: Box::new([0; CHUNK]), count: 0 };
        let chunk = self.chunks.entry(lin >> 21).or_insert_with(chunk);
        let cell = &mut chunk.pages[(lin >> 12) as usize % CHUNK];
        let change = usize::from(page != 0).wrapping_sub(usize::from(*cell != 0));
        *cell = page;
        chunk.count = chunk.count.wrapping_add(change);
        self.pages = self.pages.wrapping_add(change);
    }

    /// Shows nothing in `n` pages from `lin` on any more.
    fn hide(&mut self, lin: u64, n: u64) {
        for i in 0..n {
            self.set(lin + i * 4096, 0);
        }
        if reserve(self.host(lin), n * 4096, libc::MAP_FIXED).is_err() {
            // It would have divided a mapping, and the host allows no more: with all of them gone there are less.
            self.hide_all();
        }
    }

    fn hide_all(&mut self) {
        if self.pages == 0 {
            return;
        }
        self.chunks.clear();
        self.pages = 0;
        for regions in &self.reserved {
            let e = extent(regions);
            reserve(e.start, e.end - e.start, libc::MAP_FIXED).expect("a window's own address space");
        }
    }

    /// Whether the host's region `r` is reserved.
    fn reserves(&self, r: u64) -> bool {
        self.reserved.iter().any(|regions| regions.contains(&r))
    }

    /// Reserves the host's `regions`, of which none is; false if the host has something there.
    fn reserve(&mut self, regions: Range<u64>) -> bool {
        let e = extent(&regions);
        let free = reserve(e.start, e.end - e.start, libc::MAP_FIXED_NOREPLACE).is_ok();
        if free {
            self.reserved.push(regions);
        }
        free
    }

    /// Reserves the host's region `r`, if it is not yet and the host has such addresses.
    fn reserve_one(&mut self, r: u64) -> bool {
        r >= REGIONS || self.reserves(r) || self.reserve(r..r + 1)
    }

    /// Reserves what all addresses of 32-bit code lead to, and a region on either side.
    fn reserve_all_32(&mut self) -> bool {
        let first = self.delta >> REGION_SHIFT;
        self.reserve(first - 1..first + ALL_32 + 1)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        for regions in &self.reserved {
            let e = extent(regions);
            release(e.start, e.end - e.start);
        }
    }
}

impl Windows {
    /// For `spaces` address spaces of the translator with number `vp`, one of `vcpus` in this process, over guest memory `ram`.
    pub(crate) fn new(spaces: usize, vp: u64, vcpus: usize, ram: &File) -> io::Result<Windows> {
        Ok(Windows {
            ram: ram.try_clone()?.into(),
            spaces: (0..spaces).map(|_| None).collect(),
            active: 0,
            vp,
            max_pages: ALL_PAGES / vcpus.max(1),
            max_regions: (ALL_REGIONS / (vcpus * spaces).max(1)).min(MAX_REGIONS),
            unfit: false,
            forbidden: false,
            opened: 0,
            shown: 0,
            compared: 0,
        })
    }

    /// What r14 holds in code that uses the current window: where the probes are, and as its low bits [`PROBE_SHIFT`].
    pub(crate) fn base(&self) -> u64 {
        let probes = self.current().and_then(|w| w.admitted.probes());
        probes.map_or(0, |probes| probes.at) + u64::from(PROBE_SHIFT)
    }

    fn current(&self) -> Option<&Window> {
        self.spaces[self.active].as_ref()
    }

    /// Whether the current space has a window.
    pub(crate) fn is_open(&self) -> bool {
        self.current().is_some()
    }

    /// Whether it is one that code must probe.
    pub(crate) fn is_probed(&self) -> bool {
        self.current().is_some_and(|w| w.admitted.probes().is_some())
    }

    /// Whether programs of the current space use its window in `mode`.
    pub(crate) fn serves(&self, mode: Mode) -> bool {
        self.current().is_some_and(|w| match w.admitted {
            Admitted::Regions(..) => mode.code64(),
            Admitted::All32 => mode.bits() == 32 && !mode.has(Mode::SEGMENTED),
        })
    }

    /// Whether it must be compared with page tables first.
    pub(crate) fn is_stale(&self) -> bool {
        self.current().is_some_and(|w| w.stale)
    }

    /// Whether it is that of the page tables with this root.
    pub(crate) fn belongs_to(&self, root: u64) -> bool {
        self.current().is_some_and(|w| w.root == root)
    }

    /// Lets translated code on this thread use the current window.
    pub(crate) fn enter(&self) {
        if let Some(w) = self.current() {
            // SAFETY: windows are open only where the host allows this; nothing else uses GS.
            unsafe {
                std::arch::asm!("wrgsbase {}", in(reg) w.delta, options(nostack, nomem, preserves_flags))
            };
        }
    }

    /// Makes `space` the current one.
    pub(crate) fn switch(&mut self, space: usize) {
        self.active = space;
        self.unfit = false;
    }

    /// Opens a window for the current space, with page tables at `root`, that can show the addresses of `wanted`; false if that
    /// cannot be.
    pub(crate) fn open(&mut self, root: u64, reach: Reach, wanted: &[u64]) -> bool {
        debug_assert!(!self.is_open());
        if self.forbidden || !can_set_gs() {
            return false;
        }
        let deltas = match reach {
            Reach::Everywhere => {
                // There is room for one.
                (0..self.spaces.len()).for_each(|space| {
                    if self.spaces[space].as_ref().is_some_and(|w| w.delta == 0) {
                        self.close(space);
                    }
                });
                0..1
            }
            Reach::Low | Reach::High | Reach::All32 => 1..STEPS,
        };
        let first = self.vp * self.spaces.len() as u64 + self.active as u64;
        for n in deltas {
            let step = if n == 0 { 0 } else { STEP * (1 + (first + n - 1) % STEPS) };
            let low = matches!(reach, Reach::Low | Reach::All32);
            let delta = if low { step } else { step.wrapping_neg() };
            let mut window = Window {
                delta,
                root,
                admitted: Admitted::All32,
                reserved: Vec::new(),
                stack: u64::MAX,
                chunks: HashMap::new(),
                pages: 0,
                stale: false,
            };
            if reach != Reach::All32 {
                let Ok(probes) = Probes::new() else { return false };
                window.admitted = Admitted::Regions(Vec::new(), probes);
            } else if !window.reserve_all_32() {
                continue;
            }
            self.spaces[self.active] = Some(window);
            if wanted.iter().all(|&lin| self.admit(lin)) {
                self.opened += 1;
                self.unfit = false;
                return true;
            }
            self.close(self.active);
        }
        false
    }

    /// Closes the window of `space`, if it has one.
    pub(crate) fn close(&mut self, space: usize) {
        if space == self.active {
            self.unfit = false;
        }
        self.spaces[space] = None;
    }

    /// Closes all windows, and opens none from now on.
    pub(crate) fn forbid(&mut self) {
        if !self.forbidden {
            self.forbidden = true;
            self.close_all();
        }
    }

    /// Closes all windows.
    pub(crate) fn close_all(&mut self) {
        (0..self.spaces.len()).for_each(|space| self.close(space));
    }

    /// Admits the region of `lin` to the current window; false if that cannot be.
    pub(crate) fn admit(&mut self, lin: u64) -> bool {
        let region = lin >> REGION_SHIFT;
        let Some(w) = &mut self.spaces[self.active] else { return false };
        if w.admitted.has(lin) {
            return true;
        }
        let Admitted::Regions(regions, _) = &w.admitted else { return false };
        if region >= REGIONS {
            return false;
        }
        let full = regions.len() >= self.max_regions;
        let host = w.host(region << REGION_SHIFT) >> REGION_SHIFT;
        let reserved = !full
            && host < REGIONS
            && [host.wrapping_sub(1), host, host + 1].into_iter().all(|r| w.reserve_one(r));
        if let Admitted::Regions(regions, probes) = &mut w.admitted
            && reserved
            && probes.admit(region)
        {
            regions.push(region);
            return true;
        }
        self.unfit = true;
        false
    }

    /// Lets 64-bit code run with `rsp` in RSP; false if it must not use the current window then.
    pub(crate) fn admit_stack(&mut self, rsp: u64) -> bool {
        let admitted = self.admit(rsp);
        if let Some(w) = self.spaces[self.active].as_mut().filter(|_| admitted) {
            w.stack = rsp & REGION;
        }
        admitted
    }

    /// What [`Self::admit_stack`] admitted last, as a mask for RSP and what it leaves of it: nothing where there are no probes.
    pub(crate) fn stack(&self) -> (u64, u64) {
        match self.current() {
            Some(w) if w.admitted.probes().is_some() => (REGION, w.stack),
            _ => (0, 0),
        }
    }

    /// The address, to a page, that code of the current window probed when it read the host's byte at `at`, if that is a probe's.
    pub(crate) fn probed(&self, at: u64) -> Option<u64> {
        self.current()?.admitted.probes()?.probed(at)
    }

    /// The linear address that the current window has at host address `at`, if its region is reserved.
    pub(crate) fn linear(&self, at: u64) -> Option<u64> {
        let w = self.current()?;
        w.reserves(at >> REGION_SHIFT).then(|| at.wrapping_sub(w.delta))
    }

    /// Whether the current window shows the page of `lin`.
    pub(crate) fn shows(&self, lin: u64) -> bool {
        self.current().is_some_and(|w| w.page(lin) != 0)
    }

    /// Whether some window shows the page of `lin` for writing, as page `ram` of guest memory.
    pub(crate) fn writes(&self, lin: u64, ram: u64) -> bool {
        self.spaces.iter().flatten().any(|w| w.page(lin) == shown(ram, true))
    }

    /// Whether the current window may show `n` pages more, at the cost of the others.
    fn make_room(&mut self, n: usize) -> bool {
        let pages: usize = self.spaces.iter().flatten().map(|w| w.pages).sum();
        if pages + n > self.max_pages {
            let active = self.active;
            let others = self.spaces.iter_mut().enumerate().filter(|&(space, _)| space != active);
            others.for_each(|(_, w)| w.iter_mut().for_each(Window::hide_all));
        }
        self.current().is_some_and(|w| w.pages + n <= self.max_pages)
    }

    /// Whether a program that uses `pages` pages fits into a window, with room to grow.
    pub(crate) fn is_roomy_for(&self, pages: usize) -> bool {
        pages <= self.max_pages / 2
    }

    /// Pages that the current window shows.
    pub(crate) fn pages(&self) -> usize {
        self.current().map_or(0, |w| w.pages)
    }

    /// Shows pages from that of `lin` on, in an admitted region: pages of guest memory from number `ram` on, as many as `n`.
    /// False if they cannot be shown.
    pub(crate) fn show(&mut self, lin: u64, ram: u64, n: u64, write: bool) -> bool {
        let Some(w) = &self.spaces[self.active] else { return false };
        let lin = lin & !0xFFF;
        let at = w.host(lin);
        let inside = at >= USABLE.start && at + n * 4096 <= USABLE.end;
        let admitted = [lin, lin + n * 4096 - 1].iter().all(|&at| w.admitted.has(at));
        if !inside || !admitted {
            return false;
        }
        if !self.make_room(n as usize) {
            self.unfit = true;
            return false;
        }
        let Some(w) = &mut self.spaces[self.active] else { return false };
        let access = if write { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE;
        let offset = (ram << 12) as libc::off_t;
        // SAFETY: in place of our own reservation.
        let p = unsafe {
            libc::mmap(
                at as *mut libc::c_void,
                n as usize * 4096,
                access,
                flags,
                self.ram.as_raw_fd(),
                offset,
            )
        };
        if p == libc::MAP_FAILED {
            // The host has no mapping to spare.
            self.unfit = true;
            return false;
        }
        for i in 0..n {
            w.set(lin + i * 4096, shown(ram + i, write));
        }
        self.shown += n;
        true
    }

    /// Hides the page of `lin` in all windows; with `large`, all pages that may belong to the same large page.
    pub(crate) fn hide_page(&mut self, lin: u64, large: bool) {
        for w in self.spaces.iter_mut().flatten() {
            if large {
                w.hide_all();
            } else if w.page(lin) != 0 {
                w.hide(lin & !0xFFF, 1);
            }
        }
    }

    /// No window writes the page of `lin` any more.
    pub(crate) fn protect(&mut self, lin: u64) {
        for w in self.spaces.iter_mut().flatten() {
            let page = w.page(lin);
            if page & 1 != 0 {
                w.hide(lin & !0xFFF, 1);
            }
        }
    }

    /// The guest forgot the translations of `space`.
    pub(crate) fn spoil(&mut self, space: usize) {
        if let Some(w) = &mut self.spaces[space] {
            w.stale = true;
        }
    }

    /// Shows nothing any more, in any space.
    pub(crate) fn hide_all(&mut self) {
        self.spaces.iter_mut().flatten().for_each(Window::hide_all);
    }

    /// Hides what the current window shows unless `holds` says, of a chunk's first address, what it may show: a page of guest memory
    /// for each of its 512, and whether it may be written.
    pub(crate) fn compare(&mut self, mut holds: impl FnMut(u64, usize) -> Option<(u64, bool)>) {
        let Some(w) = &mut self.spaces[self.active] else { return };
        w.stale = false;
        self.compared += 1;
        let mut gone: Vec<(u64, u64)> = Vec::new();
        for (&number, chunk) in &w.chunks {
            if chunk.count == 0 {
                continue;
            }
            for (i, &page) in chunk.pages.iter().enumerate().filter(|&(_, &page)| page != 0) {
                let base = number << 21;
                let good = holds(base, i)
                    .is_some_and(|(ram, write)| page == shown(ram, write) || page == shown(ram, false));
                if good {
                    continue;
                }
                let lin = base + i as u64 * 4096;
                match gone.last_mut() {
                    Some((from, n)) if *from + *n * 4096 == lin => *n += 1,
                    _ => gone.push((lin, 1)),
                }
            }
        }
        for (lin, n) in gone {
            w.hide(lin, n);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use paravane_memory::{GuestMemory, MemoryConfig, PhysAddr};

    const FAR: u64 = 0x5555 << 32;
    const REGION: u64 = 1 << REGION_SHIFT;

    fn windows() -> (Windows, GuestMemory) {
        let mem = GuestMemory::new(MemoryConfig::pc(1 << 20)).expect("memory");
        let windows = Windows::new(3, 5, 1, mem.backing_file()).expect("windows");
        (windows, mem)
    }

    /// Whether a probe of `lin` passes.
    fn passes(w: &Windows, lin: u64) -> bool {
        let at = w.base().wrapping_add(lin >> (w.base() & 63)) - u64::from(PROBE_SHIFT);
        assert_eq!(w.probed(at), (lin >> 48 == 0).then_some(lin & !0xFFF));
        is_readable(at)
    }

    fn byte(w: &Windows, lin: u64) -> u8 {
        let at = w.current().expect("a window").host(lin) as *const u8;
        // SAFETY: a page that is shown.
        unsafe { at.read_volatile() }
    }

    /// Whether the host has something at the address of `lin` that may be read.
    fn readable(w: &Windows, lin: u64) -> bool {
        is_readable(w.current().expect("a window").host(lin))
    }

    fn is_readable(at: u64) -> bool {
        let mut pipe = [0; 2];
        // SAFETY: the kernel reads the byte, or says that it cannot.
        unsafe {
            assert_eq!(libc::pipe(pipe.as_mut_ptr()), 0);
            let written = libc::write(pipe[1], at as *const libc::c_void, 1);
            for end in pipe {
                libc::close(end);
            }
            written == 1
        }
    }

    #[test]
    fn regions_are_admitted_with_their_neighbours() {
        let (mut w, _mem) = windows();
        assert!(!w.admit(FAR), "no window");
        assert!(w.open(1, Reach::High, &[FAR]));
        assert!(passes(&w, FAR) && !passes(&w, FAR + REGION) && !passes(&w, FAR - 1));
        assert!(
            passes(&w, FAR + REGION - 1) && !passes(&w, FAR | 1 << 47) && !passes(&w, FAR | 0xFFFF << 48)
        );
        let window = w.current().expect("open");
        for lin in [FAR - REACH, FAR + REGION + REACH] {
            assert!(window.reserves(window.host(lin) >> REGION_SHIFT));
            assert_eq!(w.linear(window.host(lin)), Some(lin));
        }
        for lin in [1 << 47, 1 << 63, u64::MAX, 0] {
            assert!(!w.admit(lin), "{lin:#x}");
        }
        let probes = w.base();
        w.switch(1);
        assert!(w.base() != probes && !w.is_open() && w.probed(probes).is_none());
        w.switch(0);
        assert!(passes(&w, FAR));
        w.close(0);
        assert!(w.base() != probes && !is_readable(probes + (FAR >> PROBE_SHIFT)) && !w.is_open());
    }

    #[test]
    fn the_host_is_never_replaced() {
        let (mut w, _mem) = windows();
        let here = std::ptr::from_ref(&w) as u64;
        assert!(!w.open(1, Reach::Everywhere, &[here]), "our own stack");
        assert!(w.open(1, Reach::Everywhere, &[0x1234_5678_9000]));
        assert!(!w.admit(here) && w.unfit && !passes(&w, here));
        assert!(!w.show(here, 0, 1, true));
    }

    #[test]
    fn pages_come_and_go() {
        let (mut w, mem) = windows();
        for n in 0..8u8 {
            mem.write(PhysAddr(u64::from(n) * 4096), &[n + 1]).expect("RAM");
        }
        assert!(w.open(1, Reach::High, &[FAR]));
        assert!(w.show(FAR + 5, 2, 3, false) && w.show(FAR + 0x8000, 7, 1, true));
        assert!(
            !w.show(FAR + REGION, 2, 1, false) && !w.show(FAR + REGION - 4096, 2, 2, false),
            "another region"
        );
        let seen = [0, 0x1000, 0x2FFF, 0x8000].map(|at| byte(&w, (FAR + at) & !0xFFF));
        assert_eq!(seen, [3, 4, 5, 8]);
        assert!(w.writes(FAR + 0x8000, 7) && !w.writes(FAR, 2) && !w.writes(FAR + 0x8000, 6));
        w.protect(FAR);
        assert!(readable(&w, FAR), "it was not written");
        w.protect(FAR + 0x8000);
        assert!(!readable(&w, FAR + 0x8000) && !w.shows(FAR + 0x8000));
        w.hide_page(FAR + 0x1234, false);
        assert!(!readable(&w, FAR + 0x1000) && readable(&w, FAR) && readable(&w, FAR + 0x2000));
        w.spoil(0);
        assert!(w.is_stale());
        w.compare(|base, i| (i == 0 && base == FAR).then_some((2, true)));
        assert!(readable(&w, FAR) && !readable(&w, FAR + 0x2000) && !w.is_stale());
        w.compare(|_, _| Some((3, false)));
        assert!(!readable(&w, FAR), "another page of memory");
    }

    #[test]
    fn the_current_window_goes_first_when_there_is_no_room() {
        let (mut w, _mem) = windows();
        w.max_pages = 3;
        assert!(w.open(1, Reach::High, &[FAR]) && w.show(FAR, 0, 2, true));
        w.switch(1);
        assert!(w.open(1, Reach::High, &[FAR]) && w.show(FAR, 4, 1, true) && w.pages() == 1);
        assert!(w.show(FAR + 0x4000, 5, 2, true) && w.pages() == 3 && !w.unfit);
        assert!(!w.show(FAR + 0x8000, 7, 1, true) && w.unfit);
        w.switch(0);
        assert!(w.pages() == 0 && !readable(&w, FAR));
        assert!(w.is_roomy_for(1) && !w.is_roomy_for(2));
    }

    #[test]
    fn a_window_has_few_regions() {
        let (mut w, _mem) = windows();
        w.max_regions = 3;
        assert!(w.open(1, Reach::High, &[FAR]));
        assert!(w.admit(FAR + 8 * REGION) && w.admit(FAR + 4 * REGION) && !w.unfit);
        assert!(!w.admit(FAR + 12 * REGION) && w.unfit);
        assert!(w.admit(FAR), "it is there");
    }

    #[test]
    fn all_that_32_bit_code_reaches_is_reserved() {
        let (mut w, mem) = windows();
        mem.write(PhysAddr(0x3000), &[9]).expect("RAM");
        assert!(w.open(1, Reach::All32, &[0x1000, 0xFFFF_FFFF]));
        let window = w.current().expect("open");
        let (first, last) = (0u64.wrapping_sub(REGION), (1 << 32) + REGION - 1);
        for lin in [first, 0, 0xFFFF_FFFF, last] {
            assert_eq!(w.linear(window.host(lin)), Some(lin));
        }
        assert!([first - 1, last + 1].iter().all(|&lin| w.linear(window.host(lin)).is_none()));
        assert!(!w.is_probed());
        let modes = [0, Mode::CODE32, Mode::CODE16, Mode::CODE32 | Mode::SEGMENTED];
        assert_eq!(modes.map(|mode| w.serves(Mode(mode))), [false, true, false, false]);
        assert!(w.admit(0xFFFF_F000) && !w.admit(1 << 32) && !w.unfit);
        assert!(w.show(0xFFFF_F000, 3, 1, false) && !w.show(1 << 32, 3, 1, false));
        assert_eq!((byte(&w, 0xFFFF_F000), readable(&w, 1 << 32), readable(&w, 0)), (9, false, false));
        w.hide_all();
        assert!(!readable(&w, 0xFFFF_F000));
        w.switch(1);
        assert!(w.open(1, Reach::Low, &[FAR >> 20]) && w.serves(Mode(0)) && !w.serves(Mode(Mode::CODE32)));
    }

    #[test]
    fn windows_lie_apart() {
        let (mut w, _mem) = windows();
        let mut deltas = Vec::new();
        for space in 0..3 {
            w.switch(space);
            assert!(w.open(1, Reach::High, &[FAR, 0x7F12 << 32]));
            deltas.push(w.current().expect("open").delta);
        }
        deltas.dedup();
        assert_eq!(deltas.len(), 3);
        w.close_all();
        assert!((0..3).all(|space| w.spaces[space].is_none()));
        assert_eq!(
            [&[1, 2][..], &[1, 1 << 40], &[1 << 40, 1 << 41]].map(Reach::of),
            [Reach::Low, Reach::Everywhere, Reach::High]
        );
    }
}

//! The guest's physical memory as processors and devices use it.

use crate::addr::{PAGE_SHIFT, PAGE_SIZE, PhysAddr, PhysPage, RamOffset};
use crate::backing::Backing;
use crate::claims::{Claims, CodeWatcher, Pages};
use crate::layout::{Layout, Mapped, OverlayId};
use crate::split::Split;
use std::fmt;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

/// Backing bytes kept for ROMs and overlay pages.
const OVERLAY_STORAGE: u64 = 64 << 20;

/// How much RAM, and where it lies.
#[derive(Clone, Copy, Debug)]
pub struct MemoryConfig {
    /// Bytes of RAM, a multiple of 4 KiB.
    pub ram: u64,
    /// Where RAM below 4 GiB must end at the latest (start of the PCI hole).
    pub hole_start: u64,
}

impl MemoryConfig {
    /// `ram` bytes with the PC's hole from 3 GiB to 4 GiB.
    pub const fn pc(ram: u64) -> MemoryConfig {
        MemoryConfig { ram, hole_start: 3 << 30 }
    }
}

/// Why an access to guest memory was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MemoryError {
    /// Some byte of `len` bytes at `at` is neither RAM nor ROM.
    OutOfRange {
        /// First byte asked for.
        at: PhysAddr,
        /// Bytes asked for.
        len: u64,
    },
    /// ROM and overlay storage is used up.
    OverlayStorageFull,
}

impl fmt::Display for MemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MemoryError::OutOfRange { at, len } => write!(f, "{len} bytes at {at} are not guest memory"),
            MemoryError::OverlayStorageFull => f.write_str("no storage left for ROMs and overlay pages"),
        }
    }
}

impl std::error::Error for MemoryError {}

struct Inner {
    backing: Backing,
    pages: Pages,
    layout: RwLock<Layout>,
    /// The layout without ROM and overlays, and whether that is all there is: processors walk page tables here.
    plain: Layout,
    is_plain: AtomicBool,
    generation: AtomicU64,
    overlay_next: Mutex<u64>,
    /// Held by locked operations on memory that no single host instruction reaches.
    apart: Mutex<()>,
    ram: u64,
}

/// A cheap handle on the guest's physical memory, shared by processors, devices and workers.
#[derive(Clone)]
pub struct GuestMemory(Arc<Inner>);

impl GuestMemory {
    /// Reserves guest memory; pages are touched by the host only when the guest does.
    pub fn new(config: MemoryConfig) -> io::Result<GuestMemory> {
        let pages = config.ram >> PAGE_SHIFT;
        let low_pages = pages.min(config.hole_start >> PAGE_SHIFT);
        let layout = Layout::new(low_pages, pages - low_pages);
        let total = (pages << PAGE_SHIFT)
            .checked_add(OVERLAY_STORAGE)
            .ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let backing = Backing::new(total)?;
        Ok(GuestMemory(Arc::new(Inner {
            backing,
            pages: Pages::new(total >> PAGE_SHIFT),
            plain: layout.clone(),
            is_plain: AtomicBool::new(true),
            layout: RwLock::new(layout),
            generation: AtomicU64::new(0),
            overlay_next: Mutex::new(pages << PAGE_SHIFT),
            apart: Mutex::new(()),
            ram: pages << PAGE_SHIFT,
        })))
    }

    pub(crate) fn backing(&self) -> &Backing {
        &self.0.backing
    }

    pub(crate) fn pages(&self) -> &Pages {
        &self.0.pages
    }

    /// Bytes of RAM.
    pub fn ram_size(&self) -> u64 {
        self.0.ram
    }

    /// RAM as (first address, bytes), low part then high part; overlays not subtracted.
    pub fn ram_ranges(&self) -> Vec<(PhysAddr, u64)> {
        let l = self.0.layout.read().expect("layout lock");
        let mut ranges = vec![(PhysAddr(0), l.low_pages << PAGE_SHIFT)];
        if l.high_pages > 0 {
            ranges.push((PhysPage(l.high_first).addr(), l.high_pages << PAGE_SHIFT));
        }
        ranges
    }

    /// What lies behind `page`.
    #[inline]
    pub fn resolve(&self, page: PhysPage) -> Mapped {
        if self.0.is_plain.load(Ordering::Acquire) {
            return self.0.plain.resolve(page);
        }
        self.0.layout.read().expect("layout lock").resolve(page)
    }

    /// Counts layout changes; cached translations older than this are stale.
    pub fn layout_generation(&self) -> u64 {
        self.0.generation.load(Ordering::Acquire)
    }

    fn allocate_overlay(&self, pages: u64) -> Result<RamOffset, MemoryError> {
        let mut next = self.0.overlay_next.lock().expect("overlay lock");
        let at = *next;
        let end = pages
            .checked_mul(PAGE_SIZE)
            .and_then(|n| at.checked_add(n))
            .filter(|&end| end <= self.0.backing.len())
            .ok_or(MemoryError::OverlayStorageFull)?;
        *next = end;
        Ok(RamOffset(at))
    }

    fn map(&self, first: PhysPage, pages: u64, storage: RamOffset, writable: bool) -> OverlayId {
        let mut layout = self.0.layout.write().expect("layout lock");
        let id = layout.add(first, pages, storage, writable);
        self.0.is_plain.store(false, Ordering::Release);
        drop(layout);
        self.0.generation.fetch_add(1, Ordering::Release);
        id
    }

    /// Lays a ROM holding `image` (padded with zeroes to whole pages) over `first`.
    pub fn map_rom(&self, first: PhysPage, image: &[u8]) -> Result<OverlayId, MemoryError> {
        let pages = (image.len() as u64).div_ceil(PAGE_SIZE);
        let storage = self.allocate_overlay(pages)?;
        self.0.backing.write(storage, image);
        Ok(self.map(first, pages, storage, false))
    }

    /// Lays `pages` zeroed RAM-like pages over `first`; what was beneath reappears when removed.
    pub fn map_overlay(&self, first: PhysPage, pages: u64) -> Result<OverlayId, MemoryError> {
        let storage = self.allocate_overlay(pages)?;
        Ok(self.map(first, pages, storage, true))
    }

    /// Removes a ROM or overlay.
    pub fn unmap(&self, id: OverlayId) {
        let mut layout = self.0.layout.write().expect("layout lock");
        layout.remove(id);
        self.0.is_plain.store(layout.is_plain(), Ordering::Release);
        drop(layout);
        self.0.generation.fetch_add(1, Ordering::Release);
    }

    /// Calls `each` with every in-page piece of `len` bytes at `at`: what is mapped there, its length, and
    /// the bytes already done. Nothing is called unless the whole range is RAM or ROM.
    fn for_pieces(
        &self,
        at: PhysAddr,
        len: u64,
        mut each: impl FnMut(Mapped, u64, u64),
    ) -> Result<(), MemoryError> {
        let error = MemoryError::OutOfRange { at, len };
        let end = at.0.checked_add(len).ok_or(error)?;
        let layout = self.0.layout.read().expect("layout lock");
        for check in [true, false] {
            let mut pos = at.0;
            while pos < end {
                let here = PhysAddr(pos);
                let n = (PAGE_SIZE - here.page_offset()).min(end - pos);
                let piece = match layout.resolve(here.page()) {
                    Mapped::Mmio => return Err(error),
                    Mapped::Ram(o) => Mapped::Ram(RamOffset(o.0 + here.page_offset())),
                    Mapped::Rom(o) => Mapped::Rom(RamOffset(o.0 + here.page_offset())),
                };
                if !check {
                    each(piece, n, pos - at.0);
                }
                pos += n;
            }
        }
        Ok(())
    }

    /// Reads RAM or ROM; on error nothing was read.
    pub fn read(&self, at: PhysAddr, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.for_pieces(at, buf.len() as u64, |m, n, done| {
            let (Mapped::Ram(o) | Mapped::Rom(o)) = m else { return };
            self.0.backing.read(o, &mut buf[done as usize..(done + n) as usize]);
        })
    }

    /// Writes RAM (ROM ignores it); on error nothing was written. Marks pages dirty and reports code writes.
    pub fn write(&self, at: PhysAddr, buf: &[u8]) -> Result<(), MemoryError> {
        self.for_pieces(at, buf.len() as u64, |m, n, done| {
            let Mapped::Ram(o) = m else { return };
            self.0.backing.write(o, &buf[done as usize..(done + n) as usize]);
            self.wrote(o, n);
        })
    }

    /// Fills RAM with `byte`.
    pub fn fill(&self, at: PhysAddr, byte: u8, len: u64) -> Result<(), MemoryError> {
        self.for_pieces(at, len, |m, n, _| {
            let Mapped::Ram(o) = m else { return };
            self.0.backing.fill(o, byte, n);
            self.wrote(o, n);
        })
    }

    /// Reads a little-endian integer of `N` bytes, in one access where it lies in one page.
    fn read_le<const N: usize>(&self, at: PhysAddr) -> Result<u64, MemoryError> {
        if at.page_offset() + N as u64 <= PAGE_SIZE
            && let Mapped::Ram(page) | Mapped::Rom(page) = self.resolve(at.page())
        {
            return Ok(self.ram_load(RamOffset(page.0 + at.page_offset()), N));
        }
        let mut b = [0; 8];
        self.read(at, &mut b[..N])?;
        Ok(u64::from_le_bytes(b))
    }

    /// Reads a little-endian `u8`.
    pub fn read_u8(&self, at: PhysAddr) -> Result<u8, MemoryError> {
        self.read_le::<1>(at).map(|v| v as u8)
    }

    /// Reads a little-endian `u16`.
    pub fn read_u16(&self, at: PhysAddr) -> Result<u16, MemoryError> {
        self.read_le::<2>(at).map(|v| v as u16)
    }

    /// Reads a little-endian `u32`.
    pub fn read_u32(&self, at: PhysAddr) -> Result<u32, MemoryError> {
        self.read_le::<4>(at).map(|v| v as u32)
    }

    /// Reads a little-endian `u64`.
    pub fn read_u64(&self, at: PhysAddr) -> Result<u64, MemoryError> {
        self.read_le::<8>(at)
    }

    // ---- the processors' own access, by backing offset --------------------------------------------------

    /// Host address of the backing; `base + RamOffset` is a byte of guest memory. For the translator.
    pub fn host_base(&self) -> *mut u8 {
        self.0.backing.base()
    }

    /// The file behind the backing, in which a `RamOffset` is the offset of a byte: for mapping pages elsewhere, too.
    pub fn backing_file(&self) -> &File {
        self.0.backing.file()
    }

    /// Bytes of the backing (RAM, ROM and overlay storage).
    pub fn backing_len(&self) -> u64 {
        self.0.backing.len()
    }

    /// Little-endian load of 1, 2, 4 or 8 bytes at a backing offset.
    #[inline]
    pub fn ram_load(&self, at: RamOffset, size: usize) -> u64 {
        self.0.backing.load(at, size)
    }

    /// Little-endian store of 1, 2, 4 or 8 bytes at a backing offset; the caller reports it with [`Self::wrote`].
    #[inline]
    pub fn ram_store(&self, at: RamOffset, size: usize, value: u64) {
        self.0.backing.store(at, size, value);
    }

    /// Reads bytes at a backing offset.
    #[inline]
    pub fn ram_read(&self, at: RamOffset, buf: &mut [u8]) {
        self.0.backing.read(at, buf);
    }

    /// Writes bytes at a backing offset; the caller reports it with [`Self::wrote`].
    #[inline]
    pub fn ram_write(&self, at: RamOffset, buf: &[u8]) {
        self.0.backing.write(at, buf);
    }

    /// Copies inside guest memory, overlap allowed; the caller reports it with [`Self::wrote`].
    pub fn ram_copy(&self, from: RamOffset, to: RamOffset, len: u64) {
        self.0.backing.copy(from, to, len);
    }

    /// Fills bytes at a backing offset; the caller reports it with [`Self::wrote`].
    pub fn ram_fill(&self, at: RamOffset, byte: u8, len: u64) {
        self.0.backing.fill(at, byte, len);
    }

    /// Atomic compare-exchange of 1, 2, 4 or 8 bytes anywhere, also across lines and pages; `Err` holds what was there.
    #[inline]
    pub fn ram_compare_exchange(&self, at: RamOffset, size: usize, old: u64, new: u64) -> Result<u64, u64> {
        self.0.backing.compare_exchange(at, size, old, new)
    }

    /// Atomic compare-exchange of 16 bytes; `at` is a multiple of 16.
    pub fn ram_compare_exchange_16(&self, at: RamOffset, old: u128, new: u128) -> Result<u128, u128> {
        self.0.backing.compare_exchange_16(at, old, new)
    }

    /// Replaces the 2, 4 or 8 bytes at `at`, which lie on two cache lines, by what `update` makes of them, without a split lock;
    /// returns the old ones. What `update` leaves alone on one of the lines is not written. Atomic towards other such operations; towards
    /// everything else where only one line changes, otherwise one line after the other.
    pub fn ram_update_split(&self, at: RamOffset, size: usize, update: &mut dyn FnMut(u64) -> u64) -> u64 {
        let split = Split::new(at, size);
        self.exclusive(|| {
            loop {
                if let Some(old) = split.try_update(&self.0.backing, update) {
                    return old;
                }
            }
        })
    }

    /// Runs `operation` while no other such operation runs: a locked access to two places.
    pub fn exclusive<R>(&self, operation: impl FnOnce() -> R) -> R {
        let _alone = self.0.apart.lock().expect("locked operations");
        operation()
    }

    // ---- who wrote where --------------------------------------------------------------------------------

    /// Tells of a store of `len` bytes at `at`, after it: marks pages dirty and leaves notices with translators that have code
    /// of them. A full barrier.
    #[inline]
    pub fn wrote(&self, at: RamOffset, len: u64) {
        if len > 0 {
            self.0.pages.wrote(at, len);
        }
    }

    /// A place for one more translator; `None` if all are taken.
    pub fn claims(&self, watcher: Box<dyn CodeWatcher>) -> Option<Claims> {
        Claims::new(self, watcher)
    }

    /// Whether some translator has code of the page of `at`.
    #[inline]
    pub fn has_code(&self, at: RamOffset) -> bool {
        self.0.pages.has_code(at.0 >> PAGE_SHIFT)
    }

    /// Returns and clears the set of dirty RAM pages, as guest physical pages.
    pub fn take_dirty(&self) -> Vec<PhysPage> {
        let layout = self.0.layout.read().expect("layout lock");
        let dirty = self.0.pages.take_dirty();
        dirty.filter_map(|page| layout.page_of(RamOffset(page << PAGE_SHIFT))).collect()
    }

    /// The same by where the pages begin in RAM.
    pub fn take_dirty_ram(&self) -> Vec<RamOffset> {
        let ram = self.0.ram >> PAGE_SHIFT;
        self.0
            .pages
            .take_dirty()
            .filter(|&page| page < ram)
            .map(|page| RamOffset(page << PAGE_SHIFT))
            .collect()
    }
}

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestMemory").field("ram", &self.0.ram).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemory {
        GuestMemory::new(MemoryConfig { ram: 16 << 20, hole_start: 8 << 20 }).expect("memory")
    }

    #[test]
    fn ram_lies_below_the_hole_and_above_four_gib() {
        let m = memory();
        assert_eq!(m.ram_ranges(), vec![(PhysAddr(0), 8 << 20), (PhysAddr(4 << 30), 8 << 20)]);
        m.write(PhysAddr((4 << 30) + 5), b"high").expect("high RAM");
        assert_eq!(m.resolve(PhysPage((4 << 30) >> 12)), Mapped::Ram(RamOffset(8 << 20)));
        assert!(m.read_u8(PhysAddr(8 << 20)).is_err());
    }

    #[test]
    fn an_access_that_leaves_memory_does_nothing() {
        let m = memory();
        assert!(m.write(PhysAddr((8 << 20) - 2), &[1; 4]).is_err());
        assert_eq!(m.read_u16(PhysAddr((8 << 20) - 2)), Ok(0));
        assert!(m.read(PhysAddr(u64::MAX), &mut [0; 2]).is_err());
    }

    #[test]
    fn rom_ignores_writes_and_overlays_give_back_what_was_beneath() {
        let m = memory();
        m.write(PhysAddr(0xF000), &[7]).expect("RAM");
        let rom = m.map_rom(PhysPage(0xF), &[1, 2, 3]).expect("ROM");
        m.write(PhysAddr(0xF000), &[9]).expect("ignored");
        assert_eq!(m.read_u8(PhysAddr(0xF000)), Ok(1));
        m.unmap(rom);
        assert_eq!(m.read_u8(PhysAddr(0xF000)), Ok(7));
    }

    #[test]
    fn dirty_pages_are_reported_by_physical_page() {
        let m = memory();
        m.write(PhysAddr((4 << 30) + 0x1000), &[1]).expect("RAM");
        assert_eq!(m.take_dirty(), vec![PhysPage((1 << 20) + 1)]);
        assert!(m.take_dirty().is_empty());
    }
}

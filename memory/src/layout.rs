//! What answers at which guest physical page.

use crate::addr::{PAGE_SHIFT, PhysPage, RamOffset};

/// What lies behind one guest physical page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mapped {
    /// Readable and writable memory; the offset of the page's first byte.
    Ram(RamOffset),
    /// Readable memory whose writes are ignored.
    Rom(RamOffset),
    /// No memory: the bus answers.
    Mmio,
}

/// Handle of a ROM or overlay, for moving or removing it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct OverlayId(pub(crate) u32);

#[derive(Clone, Debug)]
struct Overlay {
    id: OverlayId,
    first: PhysPage,
    pages: u64,
    storage: RamOffset,
    writable: bool,
}

/// RAM ranges plus overlays; later overlays cover earlier ones.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub(crate) low_pages: u64,
    pub(crate) high_first: u64,
    pub(crate) high_pages: u64,
    overlays: Vec<Overlay>,
    next_id: u32,
}

impl Layout {
    /// `low_pages` of RAM from 0 and `high_pages` from 4 GiB.
    pub(crate) fn new(low_pages: u64, high_pages: u64) -> Layout {
        Layout { low_pages, high_first: 1 << 20, high_pages, overlays: Vec::new(), next_id: 0 }
    }

    /// No ROM and no overlay.
    pub(crate) fn is_plain(&self) -> bool {
        self.overlays.is_empty()
    }

    #[inline]
    pub(crate) fn resolve(&self, page: PhysPage) -> Mapped {
        for o in self.overlays.iter().rev() {
            if page >= o.first && page.0 - o.first.0 < o.pages {
                let at = RamOffset(o.storage.0 + ((page.0 - o.first.0) << PAGE_SHIFT));
                return if o.writable { Mapped::Ram(at) } else { Mapped::Rom(at) };
            }
        }
        match self.ram_page(page) {
            Some(at) => Mapped::Ram(at),
            None => Mapped::Mmio,
        }
    }

    fn ram_page(&self, page: PhysPage) -> Option<RamOffset> {
        if page.0 < self.low_pages {
            return Some(RamOffset(page.0 << PAGE_SHIFT));
        }
        let high = page.0.checked_sub(self.high_first)?;
        (high < self.high_pages).then(|| RamOffset((self.low_pages + high) << PAGE_SHIFT))
    }

    /// The guest physical page at which plain RAM offset `at` appears.
    pub(crate) fn page_of(&self, at: RamOffset) -> Option<PhysPage> {
        let page = at.0 >> PAGE_SHIFT;
        if page < self.low_pages {
            return Some(PhysPage(page));
        }
        let high = page - self.low_pages;
        (high < self.high_pages).then_some(PhysPage(self.high_first + high))
    }

    pub(crate) fn add(
        &mut self,
        first: PhysPage,
        pages: u64,
        storage: RamOffset,
        writable: bool,
    ) -> OverlayId {
        let id = OverlayId(self.next_id);
        self.next_id += 1;
        self.overlays.push(Overlay { id, first, pages, storage, writable });
        id
    }

    pub(crate) fn remove(&mut self, id: OverlayId) {
        self.overlays.retain(|o| o.id != id);
    }
}

//! Copies of the pages that blocks were made from last: the guest may write to its memory while it is decoded. Control goes to and
//! fro between pages, so several are kept.

use crate::block::Granules;
use paravane_memory::{GuestMemory, PAGE_SHIFT, RamOffset};

/// How many.
const COPIES: usize = 8;

type Page = [u8; 1 << PAGE_SHIFT];

/// A copy is good while the claim on its page stands that it was made under.
pub(super) struct PageCopies {
    pages: [Option<RamOffset>; COPIES],
    bytes: Box<[Page; COPIES]>,
    /// Which goes next.
    oldest: usize,
}

impl PageCopies {
    pub(super) fn new() -> PageCopies {
        PageCopies { pages: [None; COPIES], bytes: Box::new([[0; 1 << PAGE_SHIFT]; COPIES]), oldest: 0 }
    }

    /// The copy of the page at `ram`.
    pub(super) fn find(&self, ram: RamOffset) -> Option<usize> {
        self.pages.iter().position(|page| *page == Some(ram))
    }

    pub(super) fn bytes(&self, copy: usize) -> &Page {
        &self.bytes[copy]
    }

    /// Copies the page at `ram`, again if there was a copy.
    pub(super) fn copy(&mut self, ram: RamOffset, mem: &GuestMemory) -> usize {
        let copy = self.find(ram).unwrap_or_else(|| {
            let oldest = self.oldest;
            self.oldest = (oldest + 1) % COPIES;
            oldest
        });
        mem.ram_read(ram, &mut self.bytes[copy][..]);
        self.pages[copy] = Some(ram);
        copy
    }

    /// The page at `ram` may have been written unseen.
    pub(super) fn forget(&mut self, ram: RamOffset) {
        if let Some(copy) = self.find(ram) {
            self.pages[copy] = None;
        }
    }

    /// The page at `ram` was `written`, while the claim on it stands.
    pub(super) fn refresh(&mut self, ram: RamOffset, written: Granules, mem: &GuestMemory) {
        let Some(copy) = self.find(ram) else { return };
        if written == Granules::ALL {
            self.pages[copy] = None;
            return;
        }
        for part in written.parts() {
            mem.ram_read(RamOffset(ram.0 + part.start as u64), &mut self.bytes[copy][part]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use paravane_memory::MemoryConfig;

    #[test]
    fn the_last_pages_are_kept() {
        let mem = GuestMemory::new(MemoryConfig::pc(1 << 20)).expect("memory");
        let ram = |page: u64| RamOffset(page << PAGE_SHIFT);
        for page in 0..20 {
            mem.ram_write(RamOffset(page << PAGE_SHIFT), &[page as u8]);
        }
        let mut copies = PageCopies::new();
        for page in 0..20 {
            let copy = copies.copy(ram(page), &mem);
            assert_eq!(copies.bytes(copy)[0], page as u8);
        }
        let kept = |copies: &PageCopies| (0..20).filter(|&page| copies.find(ram(page)).is_some()).count();
        assert_eq!(kept(&copies), COPIES);
        assert!((20 - COPIES as u64..20).all(|page| copies.find(ram(page)).is_some()));
        // Only what is said to be written is looked at again.
        mem.ram_write(RamOffset(19 << PAGE_SHIFT), &[77; 4096]);
        copies.refresh(ram(19), Granules::of(64, 65), &mem);
        let copy = copies.find(ram(19)).expect("a copy");
        assert_eq!((copies.bytes(copy)[0], copies.bytes(copy)[64]), (19, 77));
        assert_eq!(copies.copy(ram(19), &mem), copy);
        assert_eq!(copies.bytes(copy)[0], 77);
        copies.refresh(ram(19), Granules::ALL, &mem);
        copies.forget(ram(18));
        assert_eq!(kept(&copies), COPIES - 2);
    }
}

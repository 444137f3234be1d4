//! RAM as state: which pages changed, and a hash of all of it that costs only what changed.

use paravane_memory::{GuestMemory, PAGE_SIZE, RamOffset};
use xxhash_rust::xxh3::xxh3_128;

/// The bytes of one page.
pub(super) type Page = [u8; PAGE_SIZE as usize];

/// A page that changed, and a part of its hash.
pub(super) type Changed = (u32, u32);

/// Follows RAM by memory's dirty log; it is the log's only reader.
pub(super) struct Ram {
    mem: GuestMemory,
    /// By page.
    hashes: Vec<u128>,
}

impl Ram {
    /// All zeroes, until the first look.
    pub(super) fn new(mem: &GuestMemory) -> Ram {
        let zero = xxh3_128(&[0; PAGE_SIZE as usize]);
        Ram { mem: mem.clone(), hashes: vec![zero; (mem.ram_size() / PAGE_SIZE) as usize] }
    }

    /// Looks at every page that was written since the last time; `changed` gets those that are different now, with their hashes. The
    /// engines must have forgotten their translations before they write again.
    pub(super) fn look(&mut self, mut changed: impl FnMut(u32, &Page, u128)) {
        let mut page = [0; PAGE_SIZE as usize];
        for at in self.mem.take_dirty_ram() {
            let n = (at.0 / PAGE_SIZE) as usize;
            self.mem.ram_read(at, &mut page);
            let hash = xxh3_128(&page);
            if std::mem::replace(&mut self.hashes[n], hash) != hash {
                changed(n as u32, &page, hash);
            }
        }
    }

    /// As [`Self::look`]: what changed.
    pub(super) fn changes(&mut self) -> Vec<Changed> {
        let mut changes = Vec::new();
        self.look(|n, _, hash| changes.push((n, hash as u32)));
        changes
    }

    /// The hash of all pages as of the last look.
    pub(super) fn hash(&self) -> u64 {
        let bytes: Vec<u8> = self.hashes.iter().flat_map(|h| h.to_le_bytes()).collect();
        xxh3_128(&bytes) as u64
    }

    /// The hash of all pages now, without the log.
    pub(super) fn hash_now(mem: &GuestMemory) -> u64 {
        let mut page = [0; PAGE_SIZE as usize];
        let mut bytes = Vec::with_capacity((mem.ram_size() / PAGE_SIZE) as usize * size_of::<u128>());
        for at in (0..mem.ram_size()).step_by(PAGE_SIZE as usize) {
            mem.ram_read(RamOffset(at), &mut page);
            bytes.extend(xxh3_128(&page).to_le_bytes());
        }
        xxh3_128(&bytes) as u64
    }

    /// Whether page `n` had this hash at the last look.
    pub(super) fn is(&self, n: u32, hash: u128) -> bool {
        self.hashes[n as usize] == hash
    }

    /// Puts `page` back as page `n`.
    pub(super) fn restore(&mut self, n: u32, page: &Page) {
        let at = RamOffset(u64::from(n) * PAGE_SIZE);
        self.mem.ram_write(at, page);
        self.mem.wrote(at, PAGE_SIZE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use paravane_memory::{MemoryConfig, PhysAddr};

    #[test]
    fn the_hash_depends_on_contents_alone() {
        let mem = || GuestMemory::new(MemoryConfig::pc(1 << 20)).expect("memory");
        let (a, b) = (mem(), mem());
        let (mut x, mut y) = (Ram::new(&a), Ram::new(&b));
        assert_eq!(x.hash(), y.hash());
        a.write(PhysAddr(0x5432), &[1, 2, 3]).expect("RAM");
        let mut changed = Vec::new();
        x.look(|n, page, _| changed.push((n, page[0x432])));
        assert_eq!(changed, [(5, 1)]);
        assert_ne!(x.hash(), y.hash());
        // The same by another way.
        b.write(PhysAddr(0x5432), &[9, 9, 9]).expect("RAM");
        y.look(|_, _, _| ());
        b.write(PhysAddr(0x5432), &[1, 2, 3]).expect("RAM");
        y.look(|_, _, _| ());
        assert_eq!(x.hash(), y.hash());
        // Written, but not different.
        b.write(PhysAddr(0x5432), &[1]).expect("RAM");
        y.look(|n, _, _| panic!("page {n} did not change"));
    }
}

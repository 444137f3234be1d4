//! The interpreter's own translation cache: direct mapped, by access and privilege.

use super::{Access, Flushes, PagingFeatures, Privilege, Translation};
use crate::fault::Fault;
use crate::state::{CpuState, LinAddr, flags};
use crate::trace::{TraceContext, TraceEvent, Tracer};
use hashbrown::HashSet;
use paravane_memory::{GuestMemory, Mapped, PAGE_SHIFT, PhysAddr, RamOffset};
use std::sync::Arc;

const SLOTS: usize = 512;
const CLASSES: usize = 9;
const INVALID: u64 = u64::MAX;
/// [`Entry::base`] of pages that are not plain memory for the access.
const NOT_MEMORY: u64 = u64::MAX;

/// One cached page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    /// Linear page number.
    tag: u64,
    /// Backing offset of the page, or `NOT_MEMORY`.
    base: u64,
    /// Physical address of the page; bit 0: global.
    phys: u64,
}

impl Entry {
    /// The backing offset of byte `in_page` where plain loads or stores may be made.
    #[inline]
    pub(crate) fn ram(&self, in_page: u64) -> Option<RamOffset> {
        (self.base != NOT_MEMORY).then(|| RamOffset(self.base + in_page))
    }

    /// The physical address of byte `in_page`.
    pub(crate) fn phys(&self, in_page: u64) -> PhysAddr {
        PhysAddr((self.phys & !0xFFF) | in_page)
    }
}

const EMPTY: Entry = Entry { tag: INVALID, base: NOT_MEMORY, phys: 0 };

/// Software TLB.
#[derive(Debug)]
pub(crate) struct Tlb {
    /// What the model's page walk knows.
    pub(crate) features: PagingFeatures,
    entries: Box<[Entry]>,
    /// Slots that may hold something, so that a flush costs what was used.
    filled: Vec<u32>,
    /// 2 MiB regions of which a part was cached from a large page.
    large: HashSet<u64>,
    /// 1 GiB regions likewise.
    huge: HashSet<u64>,
    generation: u64,
    a20: bool,
    pub(crate) misses: u64,
    /// Who is told of walks.
    pub(crate) tracer: Option<Arc<dyn Tracer>>,
}

impl Tlb {
    pub(crate) fn new(features: PagingFeatures) -> Tlb {
        Tlb {
            features,
            entries: vec![EMPTY; SLOTS * CLASSES].into_boxed_slice(),
            filled: Vec::new(),
            large: HashSet::new(),
            huge: HashSet::new(),
            generation: 0,
            a20: true,
            misses: 0,
            tracer: None,
        }
    }

    /// The array for an access: supervisor accesses with EFLAGS.AC set see user pages under SMAP, others do not.
    #[inline]
    fn class(cpu: &CpuState, access: Access, privilege: Privilege) -> usize {
        let row = match privilege {
            Privilege::User => 0,
            Privilege::Supervisor if cpu.rflags & flags::AC != 0 => 2,
            Privilege::Supervisor | Privilege::Implicit => 1,
        };
        row * 3 + access as usize
    }

    /// Finds or makes the entry for the page of `lin`.
    #[inline]
    pub(crate) fn lookup(
        &mut self,
        cpu: &CpuState,
        mem: &GuestMemory,
        lin: LinAddr,
        access: Access,
        privilege: Privilege,
    ) -> Result<Entry, Fault> {
        let page = lin.0 >> PAGE_SHIFT;
        let slot = Tlb::class(cpu, access, privilege) * SLOTS + (page as usize & (SLOTS - 1));
        let entry = self.entries[slot];
        if entry.tag == page {
            return Ok(entry);
        }
        self.fill(cpu, mem, lin, access, privilege, slot)
    }

    #[cold]
    fn fill(
        &mut self,
        cpu: &CpuState,
        mem: &GuestMemory,
        lin: LinAddr,
        access: Access,
        privilege: Privilege,
        slot: usize,
    ) -> Result<Entry, Fault> {
        self.misses += 1;
        let found = super::translate(cpu, mem, self.features, lin, access, privilege);
        if let Some(tracer) = &self.tracer {
            let physical = found.as_ref().ok().map(|t| t.phys.0);
            tracer.event(&TraceContext::of(cpu), TraceEvent::Walk { linear: lin.0, access, physical });
        }
        let t: Translation = found?;
        let base = match mem.resolve(t.phys.page()) {
            Mapped::Ram(at) => at.0,
            Mapped::Rom(at) if access != Access::Write => at.0,
            Mapped::Rom(_) | Mapped::Mmio => NOT_MEMORY,
        };
        let phys = (t.phys.0 & !0xFFF) | u64::from(t.global);
        let entry = Entry { tag: lin.0 >> PAGE_SHIFT, base, phys };
        if cpu.paging() && t.page_shift > 12 {
            self.large.insert(lin.0 >> 21);
            if t.page_shift > 22 {
                self.huge.insert(lin.0 >> 30);
            } else if t.page_shift == 22 {
                self.large.insert((lin.0 >> 21) ^ 1);
            }
        }
        if self.entries[slot].tag == EMPTY.tag {
            if self.filled.len() > 2 * self.entries.len() {
                // Single pages were dropped and filled again and again: the list holds duplicates.
                self.flush();
            }
            self.filled.push(slot as u32);
        }
        self.entries[slot] = entry;
        Ok(entry)
    }

    /// Drops everything.
    pub(crate) fn flush(&mut self) {
        for slot in self.filled.drain(..) {
            self.entries[slot as usize] = EMPTY;
        }
        self.large.clear();
        self.huge.clear();
    }

    /// Drops everything if the physical layout or the A20 gate changed.
    #[inline]
    pub(crate) fn check_layout(&mut self, cpu: &CpuState, mem: &GuestMemory) {
        let generation = mem.layout_generation();
        if generation != self.generation || cpu.a20 != self.a20 {
            self.generation = generation;
            self.a20 = cpu.a20;
            self.flush();
        }
    }

    fn flush_non_global(&mut self) {
        let entries = &mut self.entries;
        self.filled.retain(|&slot| {
            let e = &mut entries[slot as usize];
            let global = e.phys & 1 != 0;
            if !global {
                *e = EMPTY;
            }
            global
        });
    }

    fn flush_page(&mut self, lin: LinAddr) {
        if self.huge.contains(&(lin.0 >> 30)) {
            return self.flush();
        }
        if self.large.contains(&(lin.0 >> 21)) {
            // A 4 MiB page covers two neighbours.
            let region = lin.0 >> 22;
            for e in self.entries.iter_mut().filter(|e| e.tag >> 10 == region) {
                *e = EMPTY;
            }
            return;
        }
        let page = lin.0 >> PAGE_SHIFT;
        for class in 0..CLASSES {
            let e = &mut self.entries[class * SLOTS + (page as usize & (SLOTS - 1))];
            if e.tag == page {
                *e = EMPTY;
            }
        }
    }

    /// Obeys the guest's invalidations. Entries carry no PCID, so only the current space is ever held.
    pub(crate) fn obey(&mut self, f: &Flushes) {
        if f.all {
            return self.flush();
        }
        if f.switched.is_some() || f.all_non_global || !f.spaces.is_empty() {
            self.flush_non_global();
        }
        for &(_, page) in &f.pages {
            self.flush_page(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{cr0, cr4};
    use paravane_memory::MemoryConfig;

    #[test]
    fn a_page_stays_cached_until_invalidated() {
        let mem = GuestMemory::new(MemoryConfig::pc(1 << 20)).expect("memory");
        let mut cpu = CpuState::reset(0);
        cpu.cr0 |= cr0::PE | cr0::PG;
        cpu.cr4 |= cr4::PGE;
        cpu.cr3 = 0x1000;
        mem.write(PhysAddr(0x1000), &0x2007u32.to_le_bytes()).expect("PDE");
        mem.write(PhysAddr(0x2000), &0x5007u32.to_le_bytes()).expect("PTE 0");
        mem.write(PhysAddr(0x2004), &0x6107u32.to_le_bytes()).expect("PTE 1, global");
        let mut tlb = Tlb::new(PagingFeatures::ALL);
        let get = |tlb: &mut Tlb, lin| {
            tlb.lookup(&cpu, &mem, LinAddr(lin), Access::Read, Privilege::User).expect("mapped").phys(0).0
        };
        assert_eq!((get(&mut tlb, 0), get(&mut tlb, 0x1000)), (0x5000, 0x6000));
        mem.write(PhysAddr(0x2000), &0x8007u32.to_le_bytes()).expect("PTE 0");
        mem.write(PhysAddr(0x2004), &0x9007u32.to_le_bytes()).expect("PTE 1");
        assert_eq!((get(&mut tlb, 0), get(&mut tlb, 0x1000)), (0x5000, 0x6000));
        tlb.obey(&Flushes { switched: Some(1), ..Flushes::default() });
        assert_eq!((get(&mut tlb, 0), get(&mut tlb, 0x1000)), (0x8000, 0x6000));
        tlb.obey(&Flushes { pages: vec![(1, LinAddr(0x1234))], ..Flushes::default() });
        assert_eq!(get(&mut tlb, 0x1000), 0x9000);
    }
}

//! A page walk that only looks: no accessed or dirty bit is set, no permission is asked (SDM 3A, 4.3 to 4.5).

use super::walk::{ADDRESS, P, PS};
use super::{PagingFeatures, mask_a20};
use crate::state::{CpuState, LinAddr, cr4};
use paravane_memory::{GuestMemory, Mapped, PhysAddr, RamOffset};

/// One paging-structure entry that a walk read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PeekStep {
    /// 4 PML4E, 3 PDPTE, 2 PDE, 1 PTE.
    pub level: u8,
    /// Where it is; `None` for a PDPTE held in the processor (PAE paging).
    pub at: Option<PhysAddr>,
    /// Its value.
    pub value: u64,
}

/// How a walk ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PeekEnd {
    /// At this physical address, in a page of 2 to the power of `page_shift` bytes.
    Mapped {
        /// The byte asked for.
        phys: PhysAddr,
        /// log2 of the page's size; 0 while paging is off.
        page_shift: u8,
    },
    /// The last entry is not present.
    NotPresent,
    /// The last entry has reserved bits set: using it is a page fault.
    Reserved,
    /// The next table is outside memory.
    NoMemory(PhysAddr),
    /// Bits 63 to 47 of the linear address differ: #GP or #SS before any walk. Outside long mode: it has more than 32 bits.
    NotCanonical,
}

/// What a walk saw.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Peek {
    steps: [Option<PeekStep>; 4],
    /// How it ended.
    pub end: PeekEnd,
}

impl Peek {
    /// The entries in the order they were read.
    pub fn steps(&self) -> impl Iterator<Item = &PeekStep> {
        self.steps.iter().flatten()
    }

    /// The physical address, where there is one.
    pub fn phys(&self) -> Option<PhysAddr> {
        match self.end {
            PeekEnd::Mapped { phys, .. } => Some(phys),
            _ => None,
        }
    }
}

/// Walks the paging structures for `lin` as they are in memory now, disturbing nothing. What is reserved on some models
/// only is taken as if it were not.
pub fn peek(cpu: &CpuState, mem: &GuestMemory, lin: LinAddr) -> Peek {
    let mut walk = Looker { cpu, mem, steps: [None; 4] };
    let end = walk.run(lin.0);
    Peek { steps: walk.steps, end }
}

struct Looker<'a> {
    cpu: &'a CpuState,
    mem: &'a GuestMemory,
    steps: [Option<PeekStep>; 4],
}

impl Looker<'_> {
    fn run(&mut self, lin: u64) -> PeekEnd {
        let cpu = self.cpu;
        if !cpu.long_mode() && lin >> 32 != 0 {
            return PeekEnd::NotCanonical;
        }
        if !cpu.paging() {
            return self.mapped(lin & 0xFFFF_FFFF, 0);
        }
        if cpu.long_mode() {
            if ((lin << 16) as i64 >> 16) as u64 != lin {
                return PeekEnd::NotCanonical;
            }
            return self.wide(lin, cpu.cr3 & ADDRESS, 4);
        }
        if cpu.cr4 & cr4::PAE == 0 {
            return self.narrow(lin & 0xFFFF_FFFF);
        }
        let value = cpu.pdptes[(lin >> 30 & 3) as usize];
        self.steps[0] = Some(PeekStep { level: 3, at: None, value });
        if value & P == 0 { PeekEnd::NotPresent } else { self.wide(lin & 0xFFFF_FFFF, value & ADDRESS, 2) }
    }

    fn wide(&mut self, lin: u64, mut table: u64, top: u32) -> PeekEnd {
        for level in (1..=top).rev() {
            let shift = 12 + 9 * (level - 1);
            let value = match self.read(level as u8, table + (lin >> shift & 511) * 8, 8) {
                Ok(value) => value,
                Err(end) => return end,
            };
            if value & (PagingFeatures::ALL.beyond() | if level == 4 { PS } else { 0 }) != 0 {
                return PeekEnd::Reserved;
            }
            if level == 1 || value & PS != 0 {
                let mask = (1 << shift) - 1;
                return self.mapped((value & ADDRESS & !mask) | (lin & mask), shift as u8);
            }
            table = value & ADDRESS;
        }
        PeekEnd::NotPresent
    }

    fn narrow(&mut self, lin: u64) -> PeekEnd {
        let pde = match self.read(2, (self.cpu.cr3 & 0xFFFF_F000) + (lin >> 22) * 4, 4) {
            Ok(value) => value,
            Err(end) => return end,
        };
        if pde & PS != 0 && self.cpu.cr4 & cr4::PSE != 0 {
            if pde & PagingFeatures::ALL.large_pde_reserved() != 0 {
                return PeekEnd::Reserved;
            }
            return self.mapped((pde & 0xFFC0_0000) | (pde >> 13 & 0xFF) << 32 | (lin & 0x3F_FFFF), 22);
        }
        match self.read(1, (pde & 0xFFFF_F000) + (lin >> 12 & 1023) * 4, 4) {
            Ok(pte) => self.mapped((pte & 0xFFFF_F000) | (lin & 0xFFF), 12),
            Err(end) => end,
        }
    }

    /// Reads and notes an entry; `Err` if the walk ends there.
    fn read(&mut self, level: u8, at: u64, size: usize) -> Result<u64, PeekEnd> {
        let at = PhysAddr(mask_a20(self.cpu, at));
        let (Mapped::Ram(page) | Mapped::Rom(page)) = self.mem.resolve(at.page()) else {
            return Err(PeekEnd::NoMemory(at));
        };
        let value = self.mem.ram_load(RamOffset(page.0 + at.page_offset()), size);
        if let Some(free) = self.steps.iter_mut().find(|s| s.is_none()) {
            *free = Some(PeekStep { level, at: Some(at), value });
        }
        if value & P == 0 { Err(PeekEnd::NotPresent) } else { Ok(value) }
    }

    fn mapped(&self, phys: u64, page_shift: u8) -> PeekEnd {
        PeekEnd::Mapped { phys: PhysAddr(mask_a20(self.cpu, phys)), page_shift }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mmu::{Access, Privilege, translate};
    use crate::state::{cr0, efer};
    use paravane_memory::MemoryConfig;

    #[test]
    fn a_look_finds_what_a_walk_finds_and_leaves_no_trace() {
        let mem = GuestMemory::new(MemoryConfig::pc(1 << 20)).expect("memory");
        let entries = [
            (0x1000u64, 0x2007u64),
            (0x2000, 0x3007),
            (0x3000, 0x4007),
            (0x3008, 0x20_0087),
            (0x4000, 0x5007),
        ];
        for (at, entry) in entries {
            mem.write(PhysAddr(at), &entry.to_le_bytes()).expect("RAM");
        }
        let mut cpu = CpuState::reset(0);
        cpu.cr0 |= cr0::PE | cr0::PG;
        cpu.cr4 |= cr4::PAE;
        cpu.efer = efer::LME | efer::LMA;
        cpu.cr3 = 0x1000;
        let seen = peek(&cpu, &mem, LinAddr(0x123));
        assert_eq!(seen.end, PeekEnd::Mapped { phys: PhysAddr(0x5123), page_shift: 12 });
        assert_eq!(seen.steps().map(|s| s.value).collect::<Vec<_>>(), [0x2007, 0x3007, 0x4007, 0x5007]);
        assert_eq!(mem.read_u64(PhysAddr(0x4000)), Ok(0x5007));
        let end = peek(&cpu, &mem, LinAddr(0x20_0456)).end;
        assert_eq!(end, PeekEnd::Mapped { phys: PhysAddr(0x20_0456), page_shift: 21 });
        assert_eq!(peek(&cpu, &mem, LinAddr(0x1000)).end, PeekEnd::NotPresent);
        assert_eq!(peek(&cpu, &mem, LinAddr(1 << 47)).end, PeekEnd::NotCanonical);
        let walked =
            translate(&cpu, &mem, PagingFeatures::ALL, LinAddr(0x123), Access::Read, Privilege::Supervisor);
        assert_eq!(walked.expect("mapped").phys, PhysAddr(0x5123));
    }
}

//! The page walk: no paging, 32-bit, PAE and 4-level (SDM 3A, 4.3 to 4.7).

use super::{Access, PagingFeatures, Privilege, Translation};
use crate::fault::Fault;
use crate::state::{CpuState, LinAddr, cr0, cr4, efer, flags};
use paravane_memory::{GuestMemory, Mapped, PhysAddr, RamOffset};

pub(super) const P: u64 = 1 << 0;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
pub(super) const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const XD: u64 = 1 << 63;
/// What PAE paging reserves beyond the addresses that any processor has.
const PAE_RESERVED: u64 = 0x7FF << 52;
/// Address bits of 8-byte entries, the reserved ones included.
pub(super) const ADDRESS: u64 = ((1 << 52) - 1) & !0xFFF;

/// Page-fault error code bits.
mod code {
    pub const PRESENT: u32 = 1;
    pub const WRITE: u32 = 2;
    pub const USER: u32 = 4;
    pub const RESERVED: u32 = 8;
    pub const FETCH: u32 = 16;
}

/// A paging-structure entry that was used: where it is, its size and value.
#[derive(Clone, Copy)]
struct Used {
    at: Option<RamOffset>,
    size: usize,
    value: u64,
}

/// How a walk ended early.
enum Stop {
    Fault(Fault),
    /// An entry changed under the walk: start again.
    Retry,
}

/// Masks address line 20 while the gate is closed.
pub(crate) fn mask_a20(cpu: &CpuState, phys: u64) -> u64 {
    if cpu.a20 { phys } else { phys & !(1 << 20) }
}

/// Walks the paging structures for `lin`, checks permissions and sets accessed and dirty bits. Canonicality is
/// the caller's business.
pub fn translate(
    cpu: &CpuState,
    mem: &GuestMemory,
    features: PagingFeatures,
    lin: LinAddr,
    access: Access,
    privilege: Privilege,
) -> Result<Translation, Fault> {
    if !cpu.paging() {
        return Ok(Translation {
            phys: PhysAddr(mask_a20(cpu, lin.0 & 0xFFFF_FFFF)),
            page_shift: 12,
            writable: true,
            user: true,
            global: false,
            executable: true,
        });
    }
    let walk = Walk { cpu, mem, features, lin: lin.0, access, privilege, marks: true };
    loop {
        match walk.run() {
            Ok(t) => return Ok(t),
            Err(Stop::Fault(f)) => return Err(f),
            Err(Stop::Retry) => {}
        }
    }
}

/// What [`translate`] would answer, where it would answer without changing any entry: the page may be accessed, and its
/// accessed bits (and dirty bit, for a write) are set already.
pub fn inspect(
    cpu: &CpuState,
    mem: &GuestMemory,
    features: PagingFeatures,
    lin: LinAddr,
    access: Access,
    privilege: Privilege,
) -> Option<Translation> {
    if !cpu.paging() {
        return translate(cpu, mem, features, lin, access, privilege).ok();
    }
    Walk { cpu, mem, features, lin: lin.0, access, privilege, marks: false }.run().ok()
}

/// What shows the 2 MiB around a linear address to programs: a page table, half of one, or the entry of a larger page.
pub struct PageTable<'a> {
    mem: &'a GuestMemory,
    /// The first entry, or nothing where there is a larger page.
    at: Option<RamOffset>,
    /// Bytes of an entry.
    size: usize,
    /// The larger page's entry, with its address for the 2 MiB.
    entry: u64,
    rights: u64,
    reserved: u64,
}

/// The page table for `lin` at CPL 3, if all entries that lead to it are accessed already.
pub fn page_table<'a>(
    cpu: &CpuState,
    mem: &'a GuestMemory,
    features: PagingFeatures,
    lin: LinAddr,
) -> Option<PageTable<'a>> {
    let tables = Tables { cpu, mem, features };
    if !cpu.paging() {
        None
    } else if cpu.cr4 & cr4::PAE == 0 {
        tables.table32(lin.0 & 0xFFFF_FFFF)
    } else if cpu.long_mode() {
        tables.table64(lin.0, cpu.cr3 & ADDRESS, &[4, 3, 2])
    } else {
        let pdpte = cpu.pdptes[(lin.0 >> 30 & 3) as usize];
        (pdpte & P != 0).then(|| tables.table64(lin.0, pdpte & ADDRESS, &[2]))?
    }
}

/// Looks for [`PageTable`]s.
struct Tables<'a, 'c> {
    cpu: &'c CpuState,
    mem: &'a GuestMemory,
    features: PagingFeatures,
}

impl<'a> Tables<'a, '_> {
    /// Where an entry or a table lies in RAM.
    fn place(&self, at: u64) -> Option<RamOffset> {
        let at = PhysAddr(mask_a20(self.cpu, at));
        let Mapped::Ram(page) = self.mem.resolve(at.page()) else { return None };
        Some(RamOffset(page.0 + at.page_offset()))
    }

    /// Entries of 8 bytes (SDM 3A, 4.4 and 4.5), from `table` of the first of `levels` on.
    fn table64(&self, lin: u64, mut table: u64, levels: &[u32]) -> Option<PageTable<'a>> {
        let mut reserved = self.features.beyond();
        if self.cpu.efer & efer::NXE == 0 {
            reserved |= XD;
        }
        if levels.len() == 1 {
            reserved |= PAE_RESERVED;
        }
        let mut rights = P | W | U;
        for &level in levels {
            let shift = 12 + 9 * (level - 1);
            let value = self.mem.ram_load(self.place(table + (lin >> shift & 511) * 8)?, 8);
            let large = value & PS != 0;
            let unused = if level == 4 || level == 3 && !self.features.page_1g { PS } else { 0 };
            if value & (P | A) != P | A || value & (reserved | unused) != 0 {
                return None;
            }
            rights &= value;
            if large {
                let size = 1u64 << shift;
                if value & (size - 1) & !0x1FFF != 0 {
                    return None;
                }
                let inside = lin & (size - 1) & !0x1F_FFFF;
                let entry = value & !(ADDRESS & (size - 1)) | inside;
                return Some(PageTable { mem: self.mem, at: None, size: 8, entry, rights, reserved: 0 });
            }
            table = value & ADDRESS;
        }
        let at = self.place(table)?;
        Some(PageTable { mem: self.mem, at: Some(at), size: 8, entry: 0, rights, reserved })
    }

    /// Entries of 4 bytes (SDM 3A, 4.3).
    fn table32(&self, lin: u64) -> Option<PageTable<'a>> {
        let directory = self.cpu.cr3 & 0xFFFF_F000;
        let value = self.mem.ram_load(self.place(directory + (lin >> 22) * 4)?, 4);
        if value & (P | A) != P | A {
            return None;
        }
        let mut found = PageTable { mem: self.mem, at: None, size: 4, entry: 0, rights: value, reserved: 0 };
        if value & PS != 0 && self.cpu.cr4 & cr4::PSE != 0 {
            found.entry = large_page32(value) | value & 0xFFF | lin & 0x20_0000;
            return (value & self.features.large_pde_reserved() == 0).then_some(found);
        }
        found.at = Some(self.place((value & 0xFFFF_F000) + (lin >> 21 & 1) * 2048)?);
        Some(found)
    }
}

/// The address of a 4-MiB page (SDM 3A, table 4-4).
fn large_page32(pde: u64) -> u64 {
    (pde & 0xFFC0_0000) | (pde >> 13 & 0xFF) << 32
}

impl PageTable<'_> {
    /// What [`inspect`] would answer of page `i` (0 to 511): where it is, and whether it may be written; `None` if it may not be
    /// read. Panics beyond.
    pub fn page(&self, i: usize) -> Option<(PhysAddr, bool)> {
        assert!(i < 512);
        let (entry, phys) = match self.at {
            Some(at) => {
                let entry = self.mem.ram_load(RamOffset(at.0 + (i * self.size) as u64), self.size);
                (entry, entry & ADDRESS)
            }
            None => (self.entry, (self.entry & ADDRESS) + ((i as u64) << 12)),
        };
        let rights = self.rights & entry;
        let good = entry & (P | A) == P | A && rights & U != 0 && entry & self.reserved == 0;
        good.then_some((PhysAddr(phys), rights & W != 0 && entry & D != 0))
    }
}

struct Walk<'a> {
    cpu: &'a CpuState,
    mem: &'a GuestMemory,
    features: PagingFeatures,
    lin: u64,
    access: Access,
    privilege: Privilege,
    /// Sets accessed and dirty bits.
    marks: bool,
}

impl Walk<'_> {
    fn run(&self) -> Result<Translation, Stop> {
        if self.cpu.cr4 & cr4::PAE == 0 {
            return self.walk32();
        }
        let all = P | W | U;
        if self.cpu.long_mode() {
            self.walk64(self.cpu.cr3 & ADDRESS, 4, all)
        } else {
            let pdpte = self.cpu.pdptes[(self.lin >> 30 & 3) as usize];
            if pdpte & P == 0 {
                return Err(self.fault(0));
            }
            self.walk64(pdpte & ADDRESS, 2, all)
        }
    }

    /// From the table at `table` of `level`; the walk's rights start as `rights`.
    fn walk64(&self, mut table: u64, top: u32, mut rights: u64) -> Result<Translation, Stop> {
        let mut used = [Used { at: None, size: 8, value: 0 }; 4];
        let nx = self.cpu.efer & efer::NXE != 0;
        let mut xd = 0;
        for level in (1..=top).rev() {
            let shift = 12 + 9 * (level - 1);
            let entry = self.read(PhysAddr(table + (self.lin >> shift & 511) * 8), 8);
            let value = entry.value;
            if value & P == 0 {
                return Err(self.fault(0));
            }
            let leaf = level == 1 || value & PS != 0;
            let mut reserved = self.features.beyond();
            if !nx {
                reserved |= XD;
            }
            if top == 2 {
                reserved |= PAE_RESERVED;
            }
            if level == 4 || (level == 3 && !self.features.page_1g) {
                reserved |= PS;
            } else if leaf && level > 1 {
                reserved |= ((1 << shift) - 1) & !0x1FFF;
            }
            if value & reserved != 0 {
                return Err(self.fault(code::PRESENT | code::RESERVED));
            }
            rights &= value | P;
            xd |= value & XD;
            used[(top - level) as usize] = entry;
            if leaf {
                let mask = (1 << shift) - 1;
                let phys = (value & ADDRESS & !mask) | (self.lin & mask);
                return self.finish(&used[..=(top - level) as usize], rights, xd != 0, phys, shift);
            }
            table = value & ADDRESS;
        }
        Err(self.fault(0))
    }

    fn walk32(&self) -> Result<Translation, Stop> {
        let lin = self.lin & 0xFFFF_FFFF;
        let pde = self.read(PhysAddr((self.cpu.cr3 & 0xFFFF_F000) + (lin >> 22) * 4), 4);
        if pde.value & P == 0 {
            return Err(self.fault(0));
        }
        if pde.value & PS != 0 && self.cpu.cr4 & cr4::PSE != 0 {
            if pde.value & self.features.large_pde_reserved() != 0 {
                return Err(self.fault(code::PRESENT | code::RESERVED));
            }
            let phys = large_page32(pde.value) | (lin & 0x3F_FFFF);
            return self.finish(&[pde], pde.value, false, phys, 22);
        }
        let pte = self.read(PhysAddr((pde.value & 0xFFFF_F000) + (lin >> 12 & 1023) * 4), 4);
        if pte.value & P == 0 {
            return Err(self.fault(0));
        }
        let phys = (pte.value & 0xFFFF_F000) | (lin & 0xFFF);
        self.finish(&[pde, pte], pde.value & pte.value, false, phys, 12)
    }

    /// Reads an entry; one outside memory reads as not present.
    fn read(&self, at: PhysAddr, size: usize) -> Used {
        let at = PhysAddr(mask_a20(self.cpu, at.0));
        match self.mem.resolve(at.page()) {
            Mapped::Ram(page) => {
                let at = RamOffset(page.0 + at.page_offset());
                Used { at: Some(at), size, value: self.mem.ram_load(at, size) }
            }
            Mapped::Rom(page) => {
                let at = RamOffset(page.0 + at.page_offset());
                Used { at: None, size, value: self.mem.ram_load(at, size) }
            }
            Mapped::Mmio => Used { at: None, size, value: 0 },
        }
    }

    /// Checks rights, sets A and D, and builds the result.
    fn finish(
        &self,
        used: &[Used],
        rights: u64,
        xd: bool,
        phys: u64,
        shift: u32,
    ) -> Result<Translation, Stop> {
        let allowed = |access| self.allowed(rights, xd, access);
        if !allowed(self.access) {
            return Err(self.fault(code::PRESENT));
        }
        let (leaf, tables) = used.split_last().expect("a leaf");
        for entry in tables {
            self.mark(entry, A)?;
        }
        let write = self.access == Access::Write;
        self.mark(leaf, if write { A | D } else { A })?;
        Ok(Translation {
            phys: PhysAddr(mask_a20(self.cpu, phys)),
            page_shift: shift as u8,
            writable: allowed(Access::Write) && (write || leaf.value & D != 0),
            user: rights & U != 0,
            global: leaf.value & G != 0 && self.cpu.cr4 & cr4::PGE != 0,
            executable: allowed(Access::Execute),
        })
    }

    /// SDM 3A, 4.6.1.
    fn allowed(&self, rights: u64, xd: bool, access: Access) -> bool {
        let user_page = rights & U != 0;
        let cpu = self.cpu;
        if self.privilege == Privilege::User {
            return user_page
                && match access {
                    Access::Read => true,
                    Access::Write => rights & W != 0,
                    Access::Execute => !xd,
                };
        }
        if access == Access::Execute {
            let prevented = user_page && cpu.cr4 & cr4::SMEP != 0;
            return !(xd || prevented);
        }
        let lifted = self.privilege == Privilege::Supervisor && cpu.rflags & flags::AC != 0;
        if user_page && cpu.cr4 & cr4::SMAP != 0 && !lifted {
            return false;
        }
        access == Access::Read || rights & W != 0 || cpu.cr0 & cr0::WP == 0
    }

    fn mark(&self, entry: &Used, bits: u64) -> Result<(), Stop> {
        let Some(at) = entry.at else { return Ok(()) };
        if entry.value & bits == bits {
            return Ok(());
        }
        if !self.marks {
            return Err(self.fault(0));
        }
        self.mem
            .ram_compare_exchange(at, entry.size, entry.value, entry.value | bits)
            .map_err(|_| Stop::Retry)?;
        self.mem.wrote(at, entry.size as u64);
        Ok(())
    }

    fn fault(&self, mut error: u32) -> Stop {
        let cpu = self.cpu;
        if self.access == Access::Write {
            error |= code::WRITE;
        }
        if self.privilege == Privilege::User {
            error |= code::USER;
        }
        let nx = cpu.cr4 & cr4::PAE != 0 && cpu.efer & efer::NXE != 0;
        if self.access == Access::Execute && (nx || cpu.cr4 & cr4::SMEP != 0) {
            error |= code::FETCH;
        }
        Stop::Fault(Fault::page(LinAddr(self.lin), error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use paravane_memory::MemoryConfig;

    /// 4-level tables at 1000–4000H mapping linear 0 with `pte`.
    fn long(pte: u64) -> (CpuState, GuestMemory) {
        let mem = GuestMemory::new(MemoryConfig::pc(1 << 20)).expect("memory");
        for (at, entry) in [(0x1000u64, 0x2007u64), (0x2000, 0x3007), (0x3000, 0x4007), (0x4000, pte)] {
            mem.write(PhysAddr(at), &entry.to_le_bytes()).expect("RAM");
        }
        let mut cpu = CpuState::reset(0);
        cpu.cr0 |= cr0::PE | cr0::PG | cr0::WP;
        cpu.cr4 |= cr4::PAE | cr4::PGE;
        cpu.efer = efer::LME | efer::LMA | efer::NXE;
        cpu.cr3 = 0x1000;
        (cpu, mem)
    }

    fn error(r: Result<Translation, Fault>) -> u32 {
        r.expect_err("a page fault").error_code.expect("a code")
    }

    const ALL: PagingFeatures = PagingFeatures::ALL;
    use Access::{Execute, Read, Write};
    use Privilege::{Implicit, Supervisor, User};

    #[test]
    fn accessed_and_dirty_bits_are_set_on_use() {
        let (cpu, mem) = long(0x5007);
        let t = translate(&cpu, &mem, ALL, LinAddr(0x123), Read, User).expect("mapped");
        assert_eq!((t.phys, t.writable), (PhysAddr(0x5123), false));
        assert_eq!(mem.read_u64(PhysAddr(0x4000)), Ok(0x5027));
        assert_eq!(mem.read_u64(PhysAddr(0x1000)), Ok(0x2027));
        assert!(translate(&cpu, &mem, ALL, LinAddr(0), Write, User).expect("mapped").writable);
        assert_eq!(mem.read_u64(PhysAddr(0x4000)), Ok(0x5067));
    }

    #[test]
    fn looking_changes_nothing() {
        let (cpu, mem) = long(0x5007);
        let look = |access| inspect(&cpu, &mem, ALL, LinAddr(0x123), access, User);
        assert_eq!(look(Read), None);
        assert_eq!(mem.read_u64(PhysAddr(0x1000)), Ok(0x2007));
        assert_eq!(mem.read_u64(PhysAddr(0x4000)), Ok(0x5007));
        translate(&cpu, &mem, ALL, LinAddr(0), Read, User).expect("mapped");
        assert_eq!(look(Read).expect("accessed").phys, PhysAddr(0x5123));
        assert_eq!(look(Write), None, "not dirty");
        assert_eq!(mem.read_u64(PhysAddr(0x4000)), Ok(0x5027));
    }

    /// What a table says of its pages is what looking at each says.
    #[test]
    fn a_page_table_says_what_looking_does() {
        let big = 0x20_0000u64;
        for (pte, pde, pml4) in [
            (0x5067u64, 0x4027u64, 0x2027u64),
            (0x5067, 0x4007, 0x2027),
            (0x5067, 0x4023, 0x2027),
            (0x5067, 0x4025, 0x2027),
            (0x5047, 0x4027, 0x2027),
            (0x5027, 0x4027, 0x2027),
            (0x5065, 0x4027, 0x2027),
            (0x5063, 0x4027, 0x2027),
            (0x5067 | 1 << 45, 0x4027, 0x2027),
            (0x5067 | XD, 0x4027, 0x2027),
            (0x5067, 0x4027, 0x2027 | PS),
            (0x5067, 0x4027, 0x2026),
            (0, 0x4027, 0x2027),
            (0, big | 0xE7, 0x2027),
            (0, big | 0xA7, 0x2027),
            (0, big | 0xC7, 0x2027),
            (0, big | 0x40E7, 0x2027),
        ] {
            let (mut cpu, mem) = long(pte);
            for (at, entry) in [(0x1000u64, pml4), (0x2000, 0x3027), (0x3000, pde)] {
                mem.write(PhysAddr(at), &entry.to_le_bytes()).expect("RAM");
            }
            for efer in [efer::LME | efer::LMA | efer::NXE, efer::LME | efer::LMA] {
                cpu.efer = efer;
                let table = page_table(&cpu, &mem, ALL, LinAddr(0));
                for i in [0usize, 1, 511] {
                    let lin = LinAddr(i as u64 * 4096);
                    let look = inspect(&cpu, &mem, ALL, lin, Read, User);
                    let expected = look.map(|t| (t.phys, t.writable));
                    let found = table.as_ref().and_then(|table| table.page(i));
                    assert_eq!(found, expected, "{pte:#x} {pde:#x} {pml4:#x} {efer:#x} page {i}");
                }
            }
        }
    }

    /// The same outside long mode, where a table of 4-byte entries shows twice as much.
    #[test]
    fn page_tables_of_32_bit_modes_say_what_looking_does() {
        let lins = [0u64, 0x1000, 0x1F_F000, 0x20_0000, 0x3F_F000];
        let compare = |cpu: &CpuState, mem: &GuestMemory, what: &str| {
            for lin in lins {
                let look = inspect(cpu, mem, ALL, LinAddr(lin), Read, User).map(|t| (t.phys, t.writable));
                let table = page_table(cpu, mem, ALL, LinAddr(lin));
                let found = table.as_ref().and_then(|table| table.page((lin >> 12) as usize & 511));
                assert_eq!(found, look, "{what}, {lin:#x}");
            }
        };
        let mut found = 0;
        for pte in
            [0x5067u64, 0x5027, 0x5047, 0x5065, 0x5063, 0, 0x5067 | 1 << 45, 0x5067 | 1 << 60, 0x5067 | XD]
        {
            for pde in [0x4027u64, 0x4007, 0x4023, 0x4025, 0x80_00E7, 0x80_00A7, 0x80_20E7, 0xC0_00E5] {
                let (mut cpu, mem) = long(0);
                (cpu.efer, cpu.cr3) = (efer::NXE, 0x3000);
                for (size, cr4) in [(8, cr4::PAE), (4, 0), (4, cr4::PSE)] {
                    cpu.cr4 = cr4;
                    cpu.pdptes = [0x3001, 0, 0, 0];
                    let entries = |at: u64, entry: u64, last: u64| {
                        for i in [0, 1, last] {
                            let entry = if entry & P == 0 { 0 } else { entry + i * 0x1000 };
                            mem.write(PhysAddr(at + i * size), &entry.to_le_bytes()[..size as usize])
                                .expect("RAM");
                        }
                    };
                    mem.write(PhysAddr(0x3000), &[0; 4096]).expect("RAM");
                    mem.write(PhysAddr(0x4000), &[0; 4096]).expect("RAM");
                    mem.write(PhysAddr(0x3000), &pde.to_le_bytes()).expect("RAM");
                    entries(0x4000, pte, 4096 / size - 1);
                    compare(&cpu, &mem, &format!("{pte:#x} {pde:#x} {size} {cr4:#x}"));
                    found += usize::from(
                        page_table(&cpu, &mem, ALL, LinAddr(0)).is_some_and(|t| t.page(0).is_some()),
                    );
                }
                cpu.cr0 = cr0::PE;
                assert!(page_table(&cpu, &mem, ALL, LinAddr(0)).is_none());
            }
        }
        assert!(found > 50, "{found}");
    }

    #[test]
    fn error_codes_name_the_cause() {
        let (cpu, mem) = long(0);
        assert_eq!(error(translate(&cpu, &mem, ALL, LinAddr(0), Read, Supervisor)), 0);
        assert_eq!(error(translate(&cpu, &mem, ALL, LinAddr(0), Write, User)), 6);
        assert_eq!(error(translate(&cpu, &mem, ALL, LinAddr(0), Execute, User)), 0x14);
        let (cpu, mem) = long(0x5003 | XD);
        assert_eq!(error(translate(&cpu, &mem, ALL, LinAddr(0), Read, User)), 5);
        assert_eq!(error(translate(&cpu, &mem, ALL, LinAddr(0), Execute, Supervisor)), 0x11);
        let (mut cpu, mem) = long(0x5003 | XD);
        cpu.efer &= !efer::NXE;
        assert_eq!(error(translate(&cpu, &mem, ALL, LinAddr(0), Read, Supervisor)), 9);
        let (cpu, mem) = long(0x5003 | 1 << 45);
        assert_eq!(error(translate(&cpu, &mem, ALL, LinAddr(0), Read, Supervisor)), 9);
    }

    #[test]
    fn write_protection_smep_and_smap() {
        let (mut cpu, mem) = long(0x5005);
        assert_eq!(error(translate(&cpu, &mem, ALL, LinAddr(0), Write, Supervisor)), 3);
        cpu.cr0 &= !cr0::WP;
        assert!(translate(&cpu, &mem, ALL, LinAddr(0), Write, Supervisor).is_ok());
        assert_eq!(error(translate(&cpu, &mem, ALL, LinAddr(0), Write, User)), 7);
        cpu.cr4 |= cr4::SMEP | cr4::SMAP;
        assert_eq!(error(translate(&cpu, &mem, ALL, LinAddr(0), Execute, Supervisor)), 0x11);
        assert_eq!(error(translate(&cpu, &mem, ALL, LinAddr(0), Read, Supervisor)), 1);
        cpu.rflags |= flags::AC;
        assert!(translate(&cpu, &mem, ALL, LinAddr(0), Read, Supervisor).is_ok());
        assert_eq!(error(translate(&cpu, &mem, ALL, LinAddr(0), Read, Implicit)), 1);
    }

    #[test]
    fn pae_and_pse_large_pages() {
        let (mut cpu, mem) = long(0);
        cpu.efer = 0;
        cpu.pdptes[0] = 0x3001;
        mem.write(PhysAddr(0x3008), &0x0040_00E3u64.to_le_bytes()).expect("PDE");
        let t = translate(&cpu, &mem, ALL, LinAddr(0x20_0345), Read, Supervisor).expect("2 MiB page");
        assert_eq!((t.phys, t.page_shift, t.user), (PhysAddr(0x40_0345), 21, false));
        assert_eq!(error(translate(&cpu, &mem, ALL, LinAddr(0x4000_0000), Read, Supervisor)), 0);
        cpu.cr4 = cr4::PSE;
        cpu.cr3 = 0x1000;
        mem.write(PhysAddr(0x1000), &0x0080_2083u32.to_le_bytes()).expect("PDE");
        let t = translate(&cpu, &mem, ALL, LinAddr(0x1234), Read, Supervisor).expect("4 MiB page");
        assert_eq!((t.phys, t.page_shift), (PhysAddr(0x1_0080_1234), 22));
    }
}

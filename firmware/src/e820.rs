//! The physical memory map as INT 15h, AX=E820h reports it (ACPI 6.5, chapter 15).

use std::ops::Range;

/// First byte of the extended BIOS data area: the top KiB of base memory.
pub const EBDA: u64 = 0x9_FC00;
/// End of base memory, start of the VGA window and the option ROM area.
pub const BASE_MEMORY_END: u64 = 0xA_0000;
/// First byte of extended memory.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// First byte above the 32-bit address space.
pub const ABOVE_4G: u64 = 1 << 32;

/// What a range of physical addresses holds; the values are those of ACPI table 15.7.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Kind {
    /// Free for the operating system.
    Ram = 1,
    /// Never to be used.
    Reserved = 2,
    /// ACPI tables: free once they were read.
    AcpiReclaim = 3,
    /// To be kept over sleep.
    AcpiNvs = 4,
}

/// One range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// What is there.
    pub kind: Kind,
}

/// The map, in ascending order and without overlaps.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct E820 {
    entries: Vec<Entry>,
    low_end: u64,
}

impl E820 {
    /// A PC with RAM in `0..low_end` (below the PCI hole) and `high_bytes` from 4 GiB. `acpi`, the end of low RAM or
    /// empty, is set aside for tables.
    pub fn new(low_end: u64, high_bytes: u64, acpi: Range<u64>) -> E820 {
        let mut map = E820 { entries: Vec::new(), low_end };
        map.push(0, low_end.min(EBDA), Kind::Ram);
        map.push(EBDA, BASE_MEMORY_END, Kind::Reserved);
        map.push(BASE_MEMORY_END, HIGH_MEMORY, Kind::Reserved);
        if acpi.is_empty() {
            map.push(HIGH_MEMORY, low_end, Kind::Ram);
        } else {
            map.low_end = acpi.start;
            map.push(HIGH_MEMORY, acpi.start, Kind::Ram);
            map.push(acpi.start, acpi.end.min(low_end), Kind::AcpiReclaim);
            map.push(acpi.end, low_end, Kind::Ram);
        }
        map.push(ABOVE_4G, ABOVE_4G.saturating_add(high_bytes), Kind::Ram);
        map
    }

    /// A PC with RAM in `0..low_end` and `high_bytes` from 4 GiB, all tables below 1 MiB.
    pub fn pc(low_end: u64, high_bytes: u64) -> E820 {
        E820::new(low_end, high_bytes, 0..0)
    }

    fn push(&mut self, start: u64, end: u64, kind: Kind) {
        if start < end {
            self.entries.push(Entry { start, len: end - start, kind });
        }
    }

    /// The ranges.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// End of usable RAM below 4 GiB: where a loader puts things "high".
    pub fn low_end(&self) -> u64 {
        self.low_end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pc_with_five_gib_has_base_memory_holes_and_high_ram() {
        let map = E820::pc(0xC000_0000, 0x8000_0000);
        let want = [
            (0, 0x9_FC00, Kind::Ram),
            (0x9_FC00, 0x400, Kind::Reserved),
            (0xA_0000, 0x6_0000, Kind::Reserved),
            (0x10_0000, 0xBFF0_0000, Kind::Ram),
            (0x1_0000_0000, 0x8000_0000, Kind::Ram),
        ];
        assert_eq!(map.entries(), want.map(|(start, len, kind)| Entry { start, len, kind }));
        assert_eq!(map.low_end(), 0xC000_0000);
    }

    #[test]
    fn acpi_area_is_cut_from_low_ram() {
        let map = E820::new(0x800_0000, 0, 0x7FF_0000..0x800_0000);
        assert_eq!(map.low_end(), 0x7FF_0000);
        assert_eq!(
            map.entries().last(),
            Some(&Entry { start: 0x7FF_0000, len: 0x1_0000, kind: Kind::AcpiReclaim })
        );
    }

    #[test]
    fn tiny_machines_make_no_empty_ranges() {
        for low in [0, 0x1000, 0x9_FC00, 0x10_0000] {
            assert!(E820::pc(low, 0).entries().iter().all(|e| e.len > 0), "{low:#x}");
        }
    }
}

//! The MP table (Intel MultiProcessor Specification 1.4, chapter 4) with the wiring that ACPI describes too.

use super::{Config, checksum, wiring};

const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

const PCI_BUS: u8 = 0;
const ISA_BUS: u8 = 1;
const INT: u8 = 0;
const NMI: u8 = 1;
const EXTINT: u8 = 3;
const CONFORMING: u16 = 0;
/// Polarity in bits 1:0, trigger mode in bits 3:2 (table 4-10).
const ACTIVE_HIGH_LEVEL: u16 = 0b1101;

const APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;
/// Family 6, model 0, stepping 0; FPU and APIC: readers ask CPUID.
const CPU_SIGNATURE: u32 = 0x600;
const CPU_FEATURES: u32 = 1 << 0 | 1 << 9;

/// 4.1, pointing at the configuration table at `table`.
pub(super) fn floating_pointer(table: u64) -> Vec<u8> {
    let mut p = b"_MP_".to_vec();
    p.extend_from_slice(&(table as u32).to_le_bytes());
    // Length in 16-byte units, revision 1.4, checksum, five feature bytes: a table is present, virtual wire mode.
    p.extend_from_slice(&[1, 4, 0, 0, 0, 0, 0, 0]);
    p[10] = checksum(&p);
    p
}

#[derive(Default)]
struct Entries {
    count: u16,
    bytes: Vec<u8>,
}

impl Entries {
    fn push(&mut self, bytes: &[u8]) {
        self.count += 1;
        self.bytes.extend_from_slice(bytes);
    }

    fn interrupt(&mut self, entry: u8, kind: u8, flags: u16, source: (u8, u8), to: (u8, u8)) {
        let [low, high] = flags.to_le_bytes();
        self.push(&[entry, kind, low, high, source.0, source.1, to.0, to.1]);
    }
}

/// 4.2 and 4.3.
pub(super) fn configuration(config: &Config) -> Vec<u8> {
    let io_apic = config.cpus;
    let mut e = Entries::default();
    for id in 0..config.cpus {
        let flags = if id == 0 { 0b11 } else { 0b01 };
        let mut entry = vec![PROCESSOR, id, APIC_VERSION, flags];
        entry.extend_from_slice(&CPU_SIGNATURE.to_le_bytes());
        entry.extend_from_slice(&CPU_FEATURES.to_le_bytes());
        entry.extend_from_slice(&[0; 8]);
        e.push(&entry);
    }
    e.push(&[&[BUS, PCI_BUS][..], b"PCI   "].concat());
    e.push(&[&[BUS, ISA_BUS][..], b"ISA   "].concat());
    e.push(&[&[IO_APIC, io_apic, IO_APIC_VERSION, 1][..], &wiring::IO_APIC.to_le_bytes()].concat());
    for slot in wiring::PCI_SLOTS {
        for pin in 0..4 {
            let source = (PCI_BUS, slot << 2 | pin);
            e.interrupt(IO_INTERRUPT, INT, ACTIVE_HIGH_LEVEL, source, (io_apic, wiring::pci_gsi(slot, pin)));
        }
    }
    // ISA interrupts; 2 is the cascade, 10 and 11 belong to PCI.
    for irq in (0..16).filter(|irq| ![2, 10, 11].contains(irq)) {
        let input = if irq == 0 { 2 } else { irq };
        let flags = if irq == wiring::SCI { ACTIVE_HIGH_LEVEL } else { CONFORMING };
        e.interrupt(IO_INTERRUPT, INT, flags, (ISA_BUS, irq), (io_apic, input));
    }
    e.interrupt(LOCAL_INTERRUPT, EXTINT, CONFORMING, (ISA_BUS, 0), (0xFF, 0));
    e.interrupt(LOCAL_INTERRUPT, NMI, CONFORMING, (ISA_BUS, 0), (0xFF, 1));
    with_header(&e)
}

fn with_header(entries: &Entries) -> Vec<u8> {
    let length = 44 + entries.bytes.len() as u16;
    let mut t = b"PCMP".to_vec();
    t.extend_from_slice(&length.to_le_bytes());
    t.extend_from_slice(&[4, 0]);
    t.extend_from_slice(b"PARAVANE");
    t.extend_from_slice(b"PARAVANE PC ");
    // No OEM table.
    t.extend_from_slice(&[0; 6]);
    t.extend_from_slice(&entries.count.to_le_bytes());
    t.extend_from_slice(&wiring::LOCAL_APIC.to_le_bytes());
    t.extend_from_slice(&[0; 4]);
    t.extend_from_slice(&entries.bytes);
    t[7] = checksum(&t);
    t
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_structures_sum_to_zero_and_say_their_length() {
        let pointer = floating_pointer(0xF_8000);
        assert_eq!((pointer.len(), checksum(&pointer)), (16, 0));
        assert_eq!(pointer[4..8], 0xF_8000u32.to_le_bytes());
        for cpus in [1, 4, 250] {
            let table = configuration(&Config { cpus, memory: 0, com2: false });
            assert_eq!(checksum(&table), 0);
            assert_eq!(table[4..6], (table.len() as u16).to_le_bytes());
        }
    }

    #[test]
    fn entries_follow_each_other_to_the_end() {
        let table = configuration(&Config { cpus: 3, memory: 0, com2: false });
        let mut at = 44;
        let mut kinds = Vec::new();
        while at < table.len() {
            kinds.push(table[at]);
            at += if table[at] == PROCESSOR { 20 } else { 8 };
        }
        assert_eq!(at, table.len());
        assert_eq!(table[34..36], (kinds.len() as u16).to_le_bytes());
        assert!(kinds.is_sorted(), "ascending by type, as 4.3 asks");
        assert_eq!(kinds.iter().filter(|k| **k == PROCESSOR).count(), 3);
    }
}

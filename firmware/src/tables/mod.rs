//! The tables that describe the machine to its operating system: ACPI, MP, SMBIOS and the BIOS data area.
//!
//! | address           | content                                             |
//! |-------------------|-----------------------------------------------------|
//! | 0x00400..0x00500  | BIOS data area                                      |
//! | 0x9FC00..0xA0000  | EBDA: its size, MP floating pointer                 |
//! | 0xE0000..0xF0000  | ACPI: RSDP first, then FACS, then the other tables  |
//! | 0xF0000..0x100000 | SMBIOS entry point and structures, MP configuration |

mod acpi;
mod bda;
mod dsdt;
mod mp;
mod smbios;

use vm_memory::{Bytes, GuestAddress};

/// Where the ACPI root pointer is.
pub const RSDP: u64 = 0xE_0000;
const SMBIOS: u64 = 0xF_0000;
const MP_CONFIGURATION: u64 = 0xF_8000;

/// The machine's fixed wiring, as every table tells it.
pub mod wiring {
    /// Local APICs.
    pub const LOCAL_APIC: u32 = 0xFEE0_0000;
    /// The I/O APIC; its id is the number of processors.
    pub const IO_APIC: u32 = 0xFEC0_0000;
    /// HPET register block.
    pub const HPET: u32 = 0xFED0_0000;
    /// PM1a event block, 4 bytes.
    pub const PM1A_EVENT: u16 = 0x600;
    /// PM1a control, 2 bytes.
    pub const PM1A_CONTROL: u16 = 0x604;
    /// Power management timer, 32 bits.
    pub const PM_TIMER: u16 = 0x608;
    /// General-purpose event block 0: two bytes of status, two of enables; the end of the block of 16 ports at 0x600.
    pub const GPE0: u16 = 0x60C;
    /// SMI command port.
    pub const SMI_COMMAND: u16 = 0xB2;
    /// Written to [`SMI_COMMAND`]: set SCI_EN.
    pub const ACPI_ENABLE: u8 = 0xF1;
    /// Written to [`SMI_COMMAND`]: clear SCI_EN.
    pub const ACPI_DISABLE: u8 = 0xF0;
    /// The system control interrupt.
    pub const SCI: u8 = 9;
    /// SLP_TYP for power-off.
    pub const SLP_TYP_S5: u8 = 5;
    /// SLP_TYP for working.
    pub const SLP_TYP_S0: u8 = 0;
    /// Reset control register.
    pub const RESET_PORT: u16 = 0xCF9;
    /// What resets the machine there.
    pub const RESET_VALUE: u8 = 6;
    /// First byte of the PCI memory window.
    pub const PCI_MEMORY: u32 = 0xC000_0000;
    /// Last byte of the PCI memory window.
    pub const PCI_MEMORY_LAST: u32 = 0xFEBF_FFFF;
    /// Inputs of the interrupt controllers that PIRQ A to D are routed to, level-triggered, active high.
    pub const PIRQ_GSI: [u8; 4] = [10, 11, 10, 11];
    /// PCI device numbers with interrupt routing.
    pub const PCI_SLOTS: core::ops::Range<u8> = 1..32;

    /// The PIRQ (0 is A) of pin `pin` (0 is INTA) of the device in `slot` on bus 0.
    pub const fn pirq(slot: u8, pin: u8) -> u8 {
        slot.wrapping_add(pin) & 3
    }

    /// The interrupt controller input of a PCI pin.
    pub const fn pci_gsi(slot: u8, pin: u8) -> u8 {
        PIRQ_GSI[pirq(slot, pin) as usize]
    }
}

/// What the tables say that differs between machines.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// Number of processors, their local APIC ids counting from 0; at least 1, at most [`MAX_CPUS`].
    pub cpus: u8,
    /// RAM in bytes.
    pub memory: u64,
    /// There is a second serial port.
    pub com2: bool,
}

/// With more, APIC ids and the MP table's entry count do not fit their fields.
pub const MAX_CPUS: u8 = 250;

/// All tables, ready to be written.
#[derive(Clone, Debug)]
pub struct Tables {
    pieces: Vec<Piece>,
}

/// Bytes for one place in guest memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Piece {
    /// Physical address.
    pub at: u64,
    /// Content.
    pub bytes: Vec<u8>,
}

impl Tables {
    /// Builds the tables of a machine; `cpus` outside its bounds is brought inside.
    pub fn build(config: &Config) -> Tables {
        let config = Config { cpus: config.cpus.clamp(1, MAX_CPUS), ..*config };
        let mut pieces = bda::build(&config);
        pieces.push(Piece { at: RSDP, bytes: acpi::build(&config, RSDP) });
        pieces.push(Piece { at: SMBIOS, bytes: smbios::build(&config, SMBIOS) });
        pieces.push(Piece { at: bda::MP_POINTER, bytes: mp::floating_pointer(MP_CONFIGURATION) });
        pieces.push(Piece { at: MP_CONFIGURATION, bytes: mp::configuration(&config) });
        Tables { pieces }
    }

    /// What goes where.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Physical address for boot protocols that pass the ACPI root pointer.
    pub fn rsdp(&self) -> u64 {
        RSDP
    }

    /// Writes everything into guest memory.
    pub fn write<M: Bytes<GuestAddress> + ?Sized>(&self, mem: &M) -> Result<(), M::E> {
        self.pieces.iter().try_for_each(|p| mem.write_slice(&p.bytes, GuestAddress(p.at)))
    }
}

/// The byte that makes the sum of `bytes` zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_do_not_overlap_and_stay_below_one_mib() {
        for cpus in [0, 1, 64, 255] {
            let tables = Tables::build(&Config { cpus, memory: 8 << 30, com2: true });
            let mut pieces = tables.pieces().to_vec();
            pieces.sort_by_key(|p| p.at);
            for pair in pieces.windows(2) {
                assert!(pair[0].at + pair[0].bytes.len() as u64 <= pair[1].at, "{cpus} {:#x}", pair[1].at);
            }
            let last = &pieces[pieces.len() - 1];
            assert!(last.at + last.bytes.len() as u64 <= 0x10_0000);
            let ebda = pieces.iter().rfind(|p| p.at < 0xA_0000).unwrap();
            assert!(ebda.at + ebda.bytes.len() as u64 <= 0xA_0000);
        }
    }

    #[test]
    fn swizzle_rotates_by_slot() {
        assert_eq!([0, 1, 2, 3].map(|pin| wiring::pci_gsi(1, pin)), [11, 10, 11, 10]);
        assert_eq!(wiring::pirq(3, 1), 0);
    }
}

//! The ACPI tables (ACPI 6.5, chapter 5): RSDP, RSDT, XSDT, FADT, FACS, MADT, HPET; the DSDT is in [`super::dsdt`].

use super::{Config, checksum, dsdt, wiring};
use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::sdt::{GenericAddress, Sdt};

pub(super) const OEM_ID: [u8; 6] = *b"PARAVN";
pub(super) const OEM_TABLE_ID: [u8; 8] = *b"PARAVANE";
const HEADER_LEN: u32 = 36;
const FACS_OFFSET: u64 = 0x40;
const FACS_LEN: u64 = 64;

/// Builds all tables for the address `base` of the root pointer, which comes first.
pub(super) fn build(config: &Config, base: u64) -> Vec<u8> {
    let mut area = vec![0; FACS_OFFSET as usize];
    acpi_tables::facs::FACS::new().to_aml_bytes(&mut area);
    let mut next = base + FACS_OFFSET + FACS_LEN;
    let mut place = |bytes: Vec<u8>| {
        let at = next;
        next = (at + bytes.len() as u64).next_multiple_of(16);
        area.extend_from_slice(&bytes);
        area.resize((next - base) as usize, 0);
        at as u32
    };
    let dsdt = place(dsdt::build(config));
    let fadt = place(fadt(dsdt, (base + FACS_OFFSET) as u32));
    let tables = [fadt, place(madt(config)), place(hpet())];
    let rsdt = place(root(*b"RSDT", 1, &tables.map(u32::to_le_bytes).concat()));
    let xsdt = place(root(*b"XSDT", 1, &tables.map(|t| u64::from(t).to_le_bytes()).concat()));
    let pointer = rsdp(rsdt, xsdt);
    area[..pointer.len()].copy_from_slice(&pointer);
    area
}

/// 5.2.5.3: the first 20 bytes are the ACPI 1.0 structure with its own checksum, so both kinds of readers are served.
fn rsdp(rsdt: u32, xsdt: u32) -> Vec<u8> {
    let mut p = b"RSD PTR \0".to_vec();
    p.extend_from_slice(&OEM_ID);
    p.push(2);
    p.extend_from_slice(&rsdt.to_le_bytes());
    p[8] = checksum(&p);
    p.extend_from_slice(&36u32.to_le_bytes());
    p.extend_from_slice(&u64::from(xsdt).to_le_bytes());
    p.extend_from_slice(&[0; 4]);
    p[32] = checksum(&p);
    p
}

fn table(signature: [u8; 4], revision: u8) -> Sdt {
    Sdt::new(signature, HEADER_LEN, revision, OEM_ID, OEM_TABLE_ID, 1)
}

fn root(signature: [u8; 4], revision: u8, entries: &[u8]) -> Vec<u8> {
    let mut sdt = table(signature, revision);
    sdt.append_slice(entries);
    sdt.as_slice().to_vec()
}

fn port(address: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, u64::from(address))
}

/// 5.2.9. C2 and C3 are refused by their latencies; RTC wake is not in the fixed registers; no sleep button.
fn fadt(dsdt: u32, facs: u32) -> Vec<u8> {
    const LEGACY_DEVICES: u16 = 1 << 0;
    const I8042: u16 = 1 << 1;
    const CMOS_CENTURY: u8 = 0x32;
    const NO_C2: u16 = 0xFFF;
    const NO_C3: u16 = 0xFFFF;
    let mut f = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, 1)
        .firmware_ctrl_32(facs)
        .preferred_pm_profile(PmProfile::Desktop)
        .gpe_info(u32::from(wiring::GPE0), 0, 4, 0, 0);
    for flag in
        [Flags::Wbinvd, Flags::ProcC1, Flags::SlpButton, Flags::FixRtc, Flags::TmrValExt, Flags::ResetRegSup]
    {
        f = f.flag(flag);
    }
    // Both fields, for readers of either revision; the builder's methods set one and clear the other.
    f.dsdt = dsdt.into();
    f.x_dsdt = u64::from(dsdt).into();
    f.sci_int = u16::from(wiring::SCI).into();
    f.smi_cmd = u32::from(wiring::SMI_COMMAND).into();
    f.acpi_enable = wiring::ACPI_ENABLE;
    f.acpi_disable = wiring::ACPI_DISABLE;
    f.pm1a_evt_blk = u32::from(wiring::PM1A_EVENT).into();
    f.pm1a_cnt_blk = u32::from(wiring::PM1A_CONTROL).into();
    f.pm_tmr_blk = u32::from(wiring::PM_TIMER).into();
    (f.pm1_evt_len, f.pm1_cnt_len, f.pm_tmr_len) = (4, 2, 4);
    f.p_lvl2_lat = NO_C2.into();
    f.p_lvl3_lat = NO_C3.into();
    f.century = CMOS_CENTURY;
    f.iapc_boot_arch = (LEGACY_DEVICES | I8042).into();
    f.reset_reg = port(wiring::RESET_PORT, 8, AccessSize::ByteAccess);
    f.reset_value = wiring::RESET_VALUE;
    f.x_pm1a_evt_blk = port(wiring::PM1A_EVENT, 32, AccessSize::WordAccess);
    f.x_pm1a_cnt_blk = port(wiring::PM1A_CONTROL, 16, AccessSize::WordAccess);
    f.x_pm_tmr_blk = port(wiring::PM_TIMER, 32, AccessSize::DwordAccess);
    f.x_gpe0_blk = port(wiring::GPE0, 32, AccessSize::ByteAccess);
    let mut bytes = Vec::new();
    f.finalize().to_aml_bytes(&mut bytes);
    bytes
}

/// 5.2.12.5: polarity in bits 1:0, trigger mode in bits 3:2.
const ACTIVE_HIGH_LEVEL: u16 = 0b1101;
const CONFORMING: u16 = 0;

/// 5.2.12. The PIT is wired to input 2; SCI and PCI interrupts are level-triggered and active high.
fn madt(config: &Config) -> Vec<u8> {
    const PCAT_COMPAT: u32 = 1;
    let mut m = table(*b"APIC", 3);
    m.append(wiring::LOCAL_APIC);
    m.append(PCAT_COMPAT);
    for id in 0..config.cpus {
        ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut m);
    }
    IoApic::new(config.cpus, wiring::IO_APIC, 0).to_aml_bytes(&mut m);
    interrupt_source_override(&mut m, 0, 2, CONFORMING);
    for line in [wiring::SCI, 10, 11] {
        interrupt_source_override(&mut m, line, line, ACTIVE_HIGH_LEVEL);
    }
    // LINT1 of every processor is NMI.
    m.append_slice(&[4, 6, 0xFF, 0, 0, 1]);
    m.as_slice().to_vec()
}

fn interrupt_source_override(madt: &mut Sdt, isa: u8, gsi: u8, flags: u16) {
    let [low, high] = flags.to_le_bytes();
    madt.append_slice(&[2, 10, 0, isa, gsi, 0, 0, 0, low, high]);
}

/// IA-PC HPET specification 1.0a, 3.2.4: three comparators, 64-bit counter, legacy replacement; vendor 8086.
fn hpet() -> Vec<u8> {
    const EVENT_TIMER_BLOCK_ID: u32 = 0x8086_A201;
    const MINIMUM_TICK: u16 = 0x80;
    let mut h = table(*b"HPET", 1);
    h.append(EVENT_TIMER_BLOCK_ID);
    h.append(GenericAddress {
        address_space_id: 0,
        register_bit_width: 64,
        register_bit_offset: 0,
        access_size: 0,
        address: u64::from(wiring::HPET),
    });
    h.append(0u8);
    h.append(MINIMUM_TICK);
    h.append(0u8);
    h.as_slice().to_vec()
}

#[cfg(test)]
mod tests;

//! The DSDT: the PCI root with its windows and interrupt routing, the ISA devices, and the sleep states (ACPI 6.5,
//! chapters 6, 7 and 19).

use super::acpi::{OEM_ID, OEM_TABLE_ID};
use super::{Config, wiring};
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name,
    Package, PackageBuilder, Path, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

/// Revision 2: integers are 64 bits wide.
const REVISION: u8 = 2;
/// Interrupt links, one for each PIRQ.
const LINKS: [&str; 4] = ["LNKA", "LNKB", "LNKC", "LNKD"];
const STA_PRESENT_ENABLED_FUNCTIONING: u8 = 0xB;

/// An ISA interrupt: edge-triggered, active high, not shared (small resource type 4, 6.4.2.1).
struct Irq(u8);

impl Aml for Irq {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let [low, high] = (1u16 << (self.0 & 15)).to_le_bytes();
        for byte in [0x22, low, high] {
            sink.byte(byte);
        }
    }
}

pub(super) fn build(config: &Config) -> Vec<u8> {
    let mut sdt = Sdt::new(*b"DSDT", 36, REVISION, OEM_ID, OEM_TABLE_ID, 1);
    let mut body = Vec::new();
    Scope::new("\\_SB_".into(), vec![&PciRoot(config), &Links, &Hpet]).to_aml_bytes(&mut body);
    sleep_state("\\_S0_", wiring::SLP_TYP_S0, &mut body);
    sleep_state("\\_S5_", wiring::SLP_TYP_S5, &mut body);
    sdt.append_slice(&body);
    sdt.as_slice().to_vec()
}

/// 7.4.2: SLP_TYPa, SLP_TYPb and two reserved values.
fn sleep_state(name: &str, slp_typ: u8, sink: &mut dyn AmlSink) {
    Name::new(name.into(), &Package::new(vec![&slp_typ, &0u8, &0u8, &0u8])).to_aml_bytes(sink);
}

fn hid(id: &str) -> Name {
    Name::new("_HID".into(), &EISAName::new(id))
}

struct PciRoot<'a>(&'a Config);

impl Aml for PciRoot<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let windows = ResourceTemplate::new(vec![
            &BUS_NUMBERS,
            &CONFIG_PORTS,
            &LOW_IO,
            &HIGH_IO,
            &VgaWindow,
            &MemoryWindow,
        ]);
        Device::new(
            "PCI0".into(),
            vec![
                &hid("PNP0A03"),
                &Name::new("_UID".into(), &0u8),
                &Name::new("_CRS".into(), &windows),
                &Name::new("_PRT".into(), &routing()),
                &IsaBridge(self.0),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// A window that is made when it is written, so that lists can name it.
macro_rules! window {
    ($name:ident, $value:expr) => {
        struct $name;
        impl Aml for $name {
            fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
                $value.to_aml_bytes(sink);
            }
        }
    };
}

window!(BusNumbers, AddressSpace::new_bus_number(0u16, 0xFF));
window!(ConfigPorts, IO::new(0xCF8, 0xCF8, 1, 8));
window!(LowIo, AddressSpace::new_io(0u16, 0xCF7, None));
window!(HighIo, AddressSpace::new_io(0xD00u16, 0xFFFF, None));
window!(
    VgaWindow,
    AddressSpace::new_memory(AddressSpaceCacheable::Cacheable, true, 0xA_0000u32, 0xB_FFFF, None)
);
window!(
    MemoryWindow,
    AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        wiring::PCI_MEMORY,
        wiring::PCI_MEMORY_LAST,
        None
    )
);
const BUS_NUMBERS: BusNumbers = BusNumbers;
const CONFIG_PORTS: ConfigPorts = ConfigPorts;
const LOW_IO: LowIo = LowIo;
const HIGH_IO: HighIo = HighIo;

/// 6.2.13: for each slot and pin the link that the PIRQ is wired to.
fn routing() -> PackageBuilder {
    let mut prt = PackageBuilder::new();
    for slot in wiring::PCI_SLOTS {
        for pin in 0..4u8 {
            let address = u32::from(slot) << 16 | 0xFFFF;
            let link = Path::new(LINKS[usize::from(wiring::pirq(slot, pin))]);
            prt.add_element(&Package::new(vec![&address, &pin, &link, &0u8]));
        }
    }
    prt
}

/// PCI interrupt links (PNP0C0F) with one fixed setting each: level-triggered, active high, shared.
struct Links;

impl Aml for Links {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        for (i, name) in LINKS.iter().enumerate() {
            let gsi = Interrupt::new(true, false, false, true, u32::from(wiring::PIRQ_GSI[i]));
            let setting = ResourceTemplate::new(vec![&gsi]);
            let uid = i as u8 + 1;
            Device::new(
                (*name).into(),
                vec![
                    &hid("PNP0C0F"),
                    &Name::new("_UID".into(), &uid),
                    &Name::new("_STA".into(), &STA_PRESENT_ENABLED_FUNCTIONING),
                    &Name::new("_PRS".into(), &setting),
                    &Name::new("_CRS".into(), &setting),
                    &Method::new("_DIS".into(), 0, false, vec![]),
                    &Method::new("_SRS".into(), 1, false, vec![]),
                ],
            )
            .to_aml_bytes(sink);
        }
    }
}

struct Hpet;

impl Aml for Hpet {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let registers = Memory32Fixed::new(false, wiring::HPET, 0x400);
        Device::new(
            "HPET".into(),
            vec![
                &hid("PNP0103"),
                &Name::new("_UID".into(), &0u8),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&registers])),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// A device behind the ISA bridge: name, PNP id, unit, port ranges (first, count), interrupt.
struct IsaDevice {
    name: &'static str,
    id: &'static str,
    unit: u8,
    ports: &'static [(u16, u8)],
    irq: Option<u8>,
}

const ISA_DEVICES: [IsaDevice; 8] = [
    IsaDevice {
        name: "PIC_",
        id: "PNP0000",
        unit: 0,
        ports: &[(0x20, 2), (0xA0, 2), (0x4D0, 2)],
        irq: Some(2),
    },
    IsaDevice { name: "TIMR", id: "PNP0100", unit: 0, ports: &[(0x40, 4)], irq: Some(0) },
    IsaDevice { name: "KBD_", id: "PNP0303", unit: 0, ports: &[(0x60, 1), (0x64, 1)], irq: Some(1) },
    IsaDevice { name: "MOU_", id: "PNP0F13", unit: 0, ports: &[], irq: Some(12) },
    IsaDevice { name: "RTC_", id: "PNP0B00", unit: 0, ports: &[(0x70, 2)], irq: Some(8) },
    IsaDevice { name: "COM1", id: "PNP0501", unit: 1, ports: &[(0x3F8, 8)], irq: Some(4) },
    IsaDevice { name: "COM2", id: "PNP0501", unit: 2, ports: &[(0x2F8, 8)], irq: Some(3) },
    // Motherboard resources: power management, SMI command, reset control.
    IsaDevice {
        name: "MBRD",
        id: "PNP0C02",
        unit: 0,
        ports: &[(wiring::PM1A_EVENT, 0x40), (wiring::SMI_COMMAND, 2), (0x61, 1), (0x92, 1), (0x80, 1)],
        irq: None,
    },
];

impl Aml for IsaDevice {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let ports: Vec<_> = self.ports.iter().map(|&(at, count)| IO::new(at, at, 1, count)).collect();
        let irq = self.irq.map(Irq);
        let mut resources: Vec<&dyn Aml> = ports.iter().map(|p| p as &dyn Aml).collect();
        resources.extend(irq.iter().map(|i| i as &dyn Aml));
        Device::new(
            self.name.into(),
            vec![
                &hid(self.id),
                &Name::new("_UID".into(), &self.unit),
                &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Function 0 of slot 1.
struct IsaBridge<'a>(&'a Config);

impl Aml for IsaBridge<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let address = Name::new("_ADR".into(), &0x1_0000u32);
        let mut children: Vec<&dyn Aml> = vec![&address];
        let present = |d: &&IsaDevice| self.0.com2 || d.name != "COM2";
        children.extend(ISA_DEVICES.iter().filter(present).map(|d| d as &dyn Aml));
        Device::new("ISA_".into(), children).to_aml_bytes(sink);
    }
}

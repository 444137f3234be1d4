//! The PCI bus behind configuration mechanism 1 (PCI 3.0, section 3.2.2.3.2): ports 0xCF8-0xCFF.
//!
//! Port 0xCF9 lies inside the address register's dword and is the PIIX3's reset control register (82371SB,
//! section 2.5.5): dword accesses at 0xCF8 go to CONFADD, byte accesses at 0xCF9 to RC.

use super::bars::{BarRange, BarSpace, BarWindow};
use super::{PciDevice, PciHandle};
use crate::bus::{Bus, Claim};
use crate::control::MachineControl;
use crate::device::{Device, Inspect, PioDevice, ResetKind, share};
use crate::snapshot::{Snapshot, StateError, StateStream};
use crate::{Port, Width};
use paravane_memory::PhysAddr;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, Weak};

const CONFADD: u16 = 0xCF8;
const RC: u16 = 0xCF9;
const CONFDATA: u16 = 0xCFC;

const CONFADD_ENABLE: u32 = 1 << 31;
/// RC: reset the processor (a rising edge acts).
const RC_RCPU: u8 = 1 << 2;
const RC_WRITABLE: u8 = 0x06;

/// Why a function cannot be added.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PciError {
    /// The slot and function are taken.
    Occupied {
        /// Slot.
        slot: u8,
        /// Function.
        function: u8,
    },
    /// Slots go to 31, functions to 7.
    OutOfRange,
}

impl fmt::Display for PciError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PciError::Occupied { slot, function } => write!(f, "PCI {slot:02x}.{function} is taken"),
            PciError::OutOfRange => f.write_str("PCI slots go to 31, functions to 7"),
        }
    }
}

impl std::error::Error for PciError {}

struct Slot {
    function: PciHandle,
    label: String,
    mapped: [Option<(BarRange, Claim)>; 6],
}

/// Bus 0 and its functions.
pub struct PciBus {
    /// The bus owns this device, not the other way round: a strong reference would keep both for ever.
    bus: Weak<Bus>,
    control: Arc<dyn MachineControl>,
    slots: BTreeMap<(u8, u8), Slot>,
    confadd: u32,
    rc: u8,
}

impl PciBus {
    /// An empty PCI bus that claims BARs on `bus`; `control` hears of resets written to port 0xCF9.
    pub fn new(bus: &Arc<Bus>, control: Arc<dyn MachineControl>) -> PciBus {
        PciBus { bus: Arc::downgrade(bus), control, slots: BTreeMap::new(), confadd: 0, rc: 0 }
    }

    /// The ports to claim for the bus: first and count.
    pub const PORTS: (Port, u16) = (Port(CONFADD), 8);

    /// Adds a function; a device with more than function 0 is marked multi-function.
    pub fn insert<D: PciDevice + 'static>(
        &mut self,
        slot: u8,
        function: u8,
        device: Arc<Mutex<D>>,
    ) -> Result<(), PciError> {
        if slot > 31 || function > 7 {
            return Err(PciError::OutOfRange);
        }
        if self.slots.contains_key(&(slot, function)) {
            return Err(PciError::Occupied { slot, function });
        }
        let label = device.lock().expect("PCI function").label().to_owned();
        self.slots.insert((slot, function), Slot { function: device, label, mapped: [None; 6] });
        if self.slots.keys().any(|&(s, f)| s == slot && f > 0)
            && let Some(first) = self.slots.get(&(slot, 0))
        {
            first.function.lock().expect("PCI function").config_mut().set_multi_function();
        }
        Ok(())
    }

    /// The function at `slot`.`function`.
    pub fn function(&self, slot: u8, function: u8) -> Option<PciHandle> {
        self.slots.get(&(slot, function)).map(|s| Arc::clone(&s.function))
    }

    /// Reads configuration space; ones where nothing answers.
    pub fn config_load(&self, slot: u8, function: u8, offset: u8, width: Width) -> u32 {
        match self.slots.get(&(slot, function)) {
            Some(s) => s.function.lock().expect("PCI function").config_load(offset, width),
            None => width.mask() as u32,
        }
    }

    /// Writes configuration space and moves BARs whose decoding changed.
    pub fn config_store(&mut self, slot: u8, function: u8, offset: u8, width: Width, value: u32) {
        if let Some(s) = self.slots.get_mut(&(slot, function)) {
            s.function.lock().expect("PCI function").config_store(offset, width, value);
            s.refresh(&self.bus);
        }
    }

    /// The function addressed by CONFADD and the register its low bits select.
    fn target(&self, port: Port) -> Option<(u8, u8, u8)> {
        let a = self.confadd;
        if a & CONFADD_ENABLE == 0 || (a >> 16) & 0xFF != 0 {
            return None;
        }
        let offset = (a & 0xFC) as u8 | (port.0 & 3) as u8;
        Some((((a >> 11) & 31) as u8, ((a >> 8) & 7) as u8, offset))
    }

    fn write_rc(&mut self, value: u8) {
        let rising = value & !self.rc & RC_RCPU != 0;
        self.rc = value & RC_WRITABLE;
        if rising {
            self.control.reset("PCI reset control register (port 0xCF9)");
        }
    }
}

impl Slot {
    fn refresh(&mut self, bus: &Weak<Bus>) {
        let Some(bus) = bus.upgrade() else { return };
        let now: [Option<BarRange>; 6] = {
            let f = self.function.lock().expect("PCI function");
            std::array::from_fn(|bar| f.config().bar_range(bar as u8))
        };
        for (old, new) in self.mapped.iter_mut().zip(now) {
            if old.map(|(range, _)| range) != new
                && let Some((_, claim)) = old.take()
            {
                bus.release(claim);
            }
        }
        for (bar, range) in now.into_iter().enumerate() {
            if self.mapped[bar].is_none() {
                self.mapped[bar] = range.map(|range| (range, self.claim(&bus, bar as u8, range)));
            }
        }
    }

    fn claim(&self, bus: &Bus, bar: u8, range: BarRange) -> Claim {
        let window =
            BarWindow { function: Arc::clone(&self.function), bar, range, label: self.label.clone() };
        let window = bus.attach_as(share(window), &self.label);
        match range.space {
            BarSpace::Io => bus.claim_ports(&window, Port(range.base as u16), range.len as u32, Width::W32),
            BarSpace::Memory => bus.claim_mmio(&window, PhysAddr(range.base), range.len, Width::W64),
        }
    }
}

impl PioDevice for PciBus {
    fn port_in(&mut self, port: Port, width: Width) -> u32 {
        match (port.0, width) {
            (CONFADD, Width::W32) => self.confadd,
            (RC, Width::W8) => u32::from(self.rc),
            (CONFDATA..=0xCFF, _) => match self.target(port) {
                Some((slot, function, offset)) => self.config_load(slot, function, offset, width),
                None => width.mask() as u32,
            },
            _ => width.mask() as u32,
        }
    }

    fn port_out(&mut self, port: Port, width: Width, value: u32) {
        match (port.0, width) {
            (CONFADD, Width::W32) => self.confadd = value & 0x80FF_FFFC,
            (RC, Width::W8) => self.write_rc(value as u8),
            (CONFDATA..=0xCFF, _) => {
                if let Some((slot, function, offset)) = self.target(port) {
                    self.config_store(slot, function, offset, width, value);
                }
            }
            // Other byte and word writes to CONFADD pass to the I/O space behind it, where nothing answers.
            _ => {}
        }
    }
}

/// The functions' state is part of it; their BARs move to where they were.
impl Snapshot for PciBus {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        let PciBus { bus, control: _, slots, confadd, rc } = self;
        s.field("confadd", confadd)?;
        s.field("rc", rc)?;
        for slot in slots.values_mut() {
            let mut function = slot.function.lock().expect("PCI function");
            let state = function.as_snapshot().ok_or(StateError::Missing("a PCI function"))?;
            s.field(&slot.label, state)?;
            drop(function);
            if s.loads() {
                slot.refresh(bus);
            }
        }
        Ok(())
    }
}

impl Inspect for PciBus {
    fn inspect(&self, field: &mut dyn FnMut(&str, &dyn fmt::Display)) {
        field("confadd", &format_args!("{:#010x}", self.confadd));
        for ((slot, function), s) in &self.slots {
            field(&format!("{slot:02x}.{function}"), &s.label);
        }
    }
}

impl Device for PciBus {
    fn label(&self) -> &str {
        "pci"
    }

    /// Resets every function as well: RST# is wired to all slots.
    fn reset(&mut self, kind: ResetKind) {
        self.confadd = 0;
        self.rc = 0;
        for s in self.slots.values_mut() {
            s.function.lock().expect("PCI function").reset(kind);
            s.refresh(&self.bus);
        }
    }

    fn as_snapshot(&mut self) -> Option<&mut dyn Snapshot> {
        Some(self)
    }

    fn as_pio(&mut self) -> Option<&mut dyn PioDevice> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::{BarKind, PciConfig, PciIdentity};
    use super::*;
    use crate::counters::Counters;
    use std::sync::atomic::{AtomicU32, Ordering};

    struct Probe(PciConfig, Vec<(u8, u64, u64)>);

    impl Inspect for Probe {
        fn inspect(&self, _field: &mut dyn FnMut(&str, &dyn fmt::Display)) {}
    }

    impl Device for Probe {
        fn label(&self) -> &str {
            "probe"
        }
        fn reset(&mut self, _kind: ResetKind) {
            self.0.reset();
        }
    }

    impl PciDevice for Probe {
        fn config(&self) -> &PciConfig {
            &self.0
        }
        fn config_mut(&mut self) -> &mut PciConfig {
            &mut self.0
        }
        fn bar_load(&mut self, bar: u8, offset: u64, _width: Width) -> u64 {
            u64::from(bar) << 8 | offset
        }
        fn bar_store(&mut self, bar: u8, offset: u64, _width: Width, value: u64) {
            self.1.push((bar, offset, value));
        }
    }

    #[derive(Default)]
    struct Control(AtomicU32);

    impl MachineControl for Control {
        fn power_off(&self) {}
        fn reset(&self, _reason: &'static str) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
        fn debug_exit(&self, _value: u32) {}
        fn set_a20(&self, _on: bool) {}
    }

    fn bus() -> (PciBus, Arc<Bus>, Arc<Mutex<Probe>>) {
        let system = Bus::new(&Counters::default());
        let mut bus = PciBus::new(&system, Arc::new(Control::default()));
        let mut config = PciConfig::new(PciIdentity {
            vendor: 0x1234,
            device: 0x5678,
            class: 0x02_00_00,
            revision: 9,
            subsystem: (1, 2),
        });
        config.set_bar(0, BarKind::Io, 0x20);
        config.set_bar(1, BarKind::Memory32, 0x1000);
        config.set_bar(4, BarKind::Memory64 { prefetchable: true }, 0x4000);
        config.add_capability(9, &[1, 2, 3]);
        config.add_capability(0x11, &[0; 10]);
        let probe = share(Probe(config, Vec::new()));
        bus.insert(3, 0, Arc::clone(&probe)).expect("free slot");
        (bus, system, probe)
    }

    fn read(bus: &mut PciBus, offset: u8) -> u32 {
        bus.port_out(Port(0xCF8), Width::W32, 0x8000_1800 | u32::from(offset));
        bus.port_in(Port(0xCFC), Width::W32)
    }

    fn write(bus: &mut PciBus, offset: u8, value: u32) {
        bus.port_out(Port(0xCF8), Width::W32, 0x8000_1800 | u32::from(offset));
        bus.port_out(Port(0xCFC), Width::W32, value);
    }

    #[test]
    fn mechanism_1_reads_bytes_words_and_dwords() {
        let (mut bus, ..) = bus();
        assert_eq!(read(&mut bus, 0), 0x5678_1234);
        assert_eq!(bus.port_in(Port(0xCFE), Width::W16), 0x5678);
        assert_eq!(bus.port_in(Port(0xCFD), Width::W8), 0x12);
        assert_eq!(read(&mut bus, 8), 0x0200_0009);
        bus.port_out(Port(0xCF8), Width::W32, 0x8000_2000);
        assert_eq!(bus.port_in(Port(0xCFC), Width::W32), 0xFFFF_FFFF, "an empty slot");
        bus.port_out(Port(0xCF8), Width::W32, 0x0000_1800);
        assert_eq!(bus.port_in(Port(0xCFC), Width::W32), 0xFFFF_FFFF, "enable bit clear");
    }

    #[test]
    fn bars_answer_the_sizing_protocol() {
        let (mut bus, ..) = bus();
        for (offset, expected) in [(0x10, 0xFFFF_FFE1), (0x14, 0xFFFF_F000), (0x20, 0xFFFF_C00C)] {
            write(&mut bus, offset, 0xFFFF_FFFF);
            assert_eq!(read(&mut bus, offset), expected);
        }
        write(&mut bus, 0x24, 0xFFFF_FFFF);
        assert_eq!(read(&mut bus, 0x24), 0xFFFF_FFFF, "upper half of the 64-bit BAR");
        write(&mut bus, 0x18, 0xFFFF_FFFF);
        assert_eq!(read(&mut bus, 0x18), 0, "no such BAR");
    }

    #[test]
    fn decoding_follows_command_and_base() {
        let (mut bus, system, probe) = bus();
        let high = PhysAddr(0x1_E000_0010);
        write(&mut bus, 0x10, 0xC000);
        write(&mut bus, 0x20, 0xE000_0000);
        write(&mut bus, 0x24, 1);
        assert!(!system.is_mmio_claimed(high), "decoders are off");
        write(&mut bus, 4, 3);
        assert_eq!(system.mmio_load(high, Width::W64), 0x410);
        system.port_out(Port(0xC012), Width::W16, 0x2345);
        assert_eq!(probe.lock().unwrap().1, [(0, 0x12, 0x2345)]);
        write(&mut bus, 0x10, 0xD000);
        write(&mut bus, 4, 1);
        assert!(!system.is_mmio_claimed(high));
        assert_eq!(system.port_in(Port(0xC004), Width::W32), 0xFFFF_FFFF);
        assert_eq!(system.port_in(Port(0xD004), Width::W32), 4);
        bus.reset(ResetKind::Bus);
        assert_eq!(system.port_in(Port(0xD004), Width::W32), 0xFFFF_FFFF);
    }

    #[test]
    fn capabilities_are_chained() {
        let (mut bus, ..) = bus();
        assert_eq!(read(&mut bus, 4) >> 16 & 0x10, 0x10);
        assert_eq!(read(&mut bus, 0x34) & 0xFF, 0x40);
        assert_eq!(read(&mut bus, 0x40), 0x0201_4809);
        assert_eq!(read(&mut bus, 0x48) & 0xFFFF, 0x0011);
    }

    #[test]
    fn cf9_resets_on_a_rising_edge() {
        let control = Arc::new(Control::default());
        let mut bus = PciBus::new(&Bus::new(&Counters::default()), Arc::clone(&control) as _);
        for v in [2, 6, 6] {
            bus.port_out(Port(0xCF9), Width::W8, v);
        }
        assert_eq!(control.0.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn the_last_owner_of_the_bus_takes_everything_with_it() {
        let (pci, system, probe) = bus();
        let pci = share(pci);
        let on_bus = system.attach(Arc::clone(&pci) as crate::DeviceHandle);
        system.claim_ports(&on_bus, PciBus::PORTS.0, PciBus::PORTS.1.into(), Width::W32);
        write(&mut pci.lock().expect("PCI bus"), 4, 3);
        let seen = Arc::downgrade(&probe);
        drop((pci, on_bus, system, probe));
        assert!(seen.upgrade().is_none(), "bus, PCI bus and function keep each other");
    }
}

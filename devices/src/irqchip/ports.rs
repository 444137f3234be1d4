//! The bus windows of the fabric: ports of the 8259A pair and the I/O APIC's page.

use super::InterruptFabric;
use crate::device::{Device, Inspect, MmioDevice, PioDevice, ResetKind};
use crate::snapshot::{Snapshot, StateError, StateStream};
use paravane_memory::{Port, Width};
use std::fmt::Display;
use std::sync::Arc;

/// Ports 20h–21h, A0h–A1h and 4D0h–4D1h; claim them with `Width::W8`.
#[derive(Debug)]
pub struct PicPorts(Arc<InterruptFabric>);

impl PicPorts {
    /// (first port, count) of the ranges to claim.
    pub const RANGES: [(Port, u32); 3] = [(Port(0x20), 2), (Port(0xA0), 2), (Port(0x4D0), 2)];

    /// The ports of `fabric`'s 8259A pair.
    pub fn new(fabric: Arc<InterruptFabric>) -> PicPorts {
        PicPorts(fabric)
    }
}

/// The pair itself is part of the fabric's state.
impl Snapshot for PicPorts {
    fn state(&mut self, _s: &mut StateStream<'_>) -> Result<(), StateError> {
        Ok(())
    }
}

impl Inspect for PicPorts {
    fn inspect(&self, field: &mut dyn FnMut(&str, &dyn Display)) {
        self.0.lock().pic.inspect(field);
    }
}

impl Device for PicPorts {
    fn label(&self) -> &str {
        "pic"
    }

    fn reset(&mut self, _kind: ResetKind) {
        self.0.reset_pic();
    }

    fn as_snapshot(&mut self) -> Option<&mut dyn Snapshot> {
        Some(self)
    }

    fn as_pio(&mut self) -> Option<&mut dyn PioDevice> {
        Some(self)
    }
}

impl PioDevice for PicPorts {
    fn port_in(&mut self, port: Port, _width: Width) -> u32 {
        self.0.with(|chips| chips.pic.read(port.0)).into()
    }

    fn port_out(&mut self, port: Port, _width: Width, value: u32) {
        self.0.with(|chips| chips.pic.write(port.0, value as u8));
    }
}

/// The I/O APIC's registers, 4 KiB at FEC0_0000h; claim them with `Width::W32`.
#[derive(Debug)]
pub struct IoApicWindow(Arc<InterruptFabric>);

impl IoApicWindow {
    /// Where the first I/O APIC of a PC lies.
    pub const BASE: u64 = 0xFEC0_0000;
    /// Size of the window.
    pub const LEN: u64 = 0x1000;

    /// The registers of `fabric`'s I/O APIC.
    pub fn new(fabric: Arc<InterruptFabric>) -> IoApicWindow {
        IoApicWindow(fabric)
    }
}

/// The I/O APIC itself is part of the fabric's state.
impl Snapshot for IoApicWindow {
    fn state(&mut self, _s: &mut StateStream<'_>) -> Result<(), StateError> {
        Ok(())
    }
}

impl Inspect for IoApicWindow {
    fn inspect(&self, field: &mut dyn FnMut(&str, &dyn Display)) {
        self.0.lock().ioapic.inspect(field);
    }
}

impl Device for IoApicWindow {
    fn label(&self) -> &str {
        "ioapic"
    }

    fn reset(&mut self, _kind: ResetKind) {
        self.0.reset_ioapic();
    }

    fn as_snapshot(&mut self) -> Option<&mut dyn Snapshot> {
        Some(self)
    }

    fn as_mmio(&mut self) -> Option<&mut dyn MmioDevice> {
        Some(self)
    }
}

impl MmioDevice for IoApicWindow {
    fn mmio_load(&mut self, offset: u64, width: Width) -> u64 {
        let value = self.0.with(|chips| chips.ioapic.load(offset & !3));
        u64::from(value) >> ((offset & 3) * 8) & width.mask()
    }

    fn mmio_store(&mut self, offset: u64, _width: Width, value: u64) {
        if offset & 3 != 0 {
            return;
        }
        self.0.with(|chips| {
            for message in chips.ioapic.store(offset, value as u32) {
                chips.deliver(&message, None);
            }
        });
    }
}

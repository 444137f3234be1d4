//! How decoded base addresses reach the bus.

use super::PciHandle;
use crate::device::{Device, Inspect, MmioDevice, PioDevice, ResetKind};
use crate::{Port, Width};

/// The address space of a BAR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BarSpace {
    /// Ports.
    Io,
    /// Memory.
    Memory,
}

/// A decoded range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BarRange {
    /// Ports or memory.
    pub space: BarSpace,
    /// First address.
    pub base: u64,
    /// Bytes.
    pub len: u64,
}

/// One mapped BAR as the bus sees it.
pub(super) struct BarWindow {
    pub(super) function: PciHandle,
    pub(super) bar: u8,
    pub(super) range: BarRange,
    pub(super) label: String,
}

impl BarWindow {
    fn inside(&self, offset: u64, width: Width) -> bool {
        offset.checked_add(width.bytes() as u64).is_some_and(|end| end <= self.range.len)
    }

    fn load(&self, offset: u64, width: Width) -> u64 {
        if !self.inside(offset, width) {
            return width.mask();
        }
        self.function.lock().expect("PCI function").bar_load(self.bar, offset, width) & width.mask()
    }

    fn store(&self, offset: u64, width: Width, value: u64) {
        if self.inside(offset, width) {
            let value = value & width.mask();
            self.function.lock().expect("PCI function").bar_store(self.bar, offset, width, value);
        }
    }

    fn port_offset(&self, port: Port) -> u64 {
        u64::from(port.0).wrapping_sub(self.range.base)
    }
}

impl Inspect for BarWindow {
    fn inspect(&self, field: &mut dyn FnMut(&str, &dyn std::fmt::Display)) {
        field("base", &format_args!("{:#x}", self.range.base));
        field("len", &format_args!("{:#x}", self.range.len));
    }
}

impl Device for BarWindow {
    fn label(&self) -> &str {
        &self.label
    }

    /// The function is reset through its bus; a window has no state.
    fn reset(&mut self, _kind: ResetKind) {}

    fn as_pio(&mut self) -> Option<&mut dyn PioDevice> {
        (self.range.space == BarSpace::Io).then_some(self)
    }

    fn as_mmio(&mut self) -> Option<&mut dyn MmioDevice> {
        (self.range.space == BarSpace::Memory).then_some(self)
    }
}

impl PioDevice for BarWindow {
    fn port_in(&mut self, port: Port, width: Width) -> u32 {
        self.load(self.port_offset(port), width) as u32
    }

    fn port_out(&mut self, port: Port, width: Width, value: u32) {
        self.store(self.port_offset(port), width, u64::from(value));
    }
}

impl MmioDevice for BarWindow {
    fn mmio_load(&mut self, offset: u64, width: Width) -> u64 {
        self.load(offset, width)
    }

    fn mmio_store(&mut self, offset: u64, width: Width, value: u64) {
        self.store(offset, width, value);
    }
}

//! The port at which the lab guest marks what is measured.

use paravane_devices::{Device, Inspect, PioDevice, ResetKind, Snapshot};
use paravane_memory::{Port, Width};
use std::fmt::Display;
use std::sync::Arc;

/// Hears every value written.
pub type LabPort = Arc<dyn Fn(u8) + Send + Sync>;

/// The port as a device.
pub(super) struct LabDevice {
    heard: LabPort,
}

impl LabDevice {
    pub(super) const PORT: Port = Port(paravane_firmware::lab::LAB_PORT);

    pub(super) fn new(heard: LabPort) -> LabDevice {
        LabDevice { heard }
    }
}

paravane_devices::snapshot!(LabDevice { | heard });

impl Inspect for LabDevice {
    fn inspect(&self, _field: &mut dyn FnMut(&str, &dyn Display)) {}
}

impl Device for LabDevice {
    fn label(&self) -> &str {
        "lab"
    }

    fn reset(&mut self, _kind: ResetKind) {}

    fn as_snapshot(&mut self) -> Option<&mut dyn Snapshot> {
        Some(self)
    }

    fn as_pio(&mut self) -> Option<&mut dyn PioDevice> {
        Some(self)
    }
}

impl PioDevice for LabDevice {
    fn port_in(&mut self, _port: Port, width: Width) -> u32 {
        width.mask() as u32
    }

    fn port_out(&mut self, _port: Port, _width: Width, value: u32) {
        (self.heard)(value as u8);
    }
}

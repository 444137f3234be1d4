//! PCI: configuration mechanism 1, functions, BARs, interrupt routing and MSI-X.
//!
//! After the PCI Local Bus Specification 3.0 (chapter 6: configuration space; 6.8.2: MSI-X) and the Intel
//! 82441FX, 82371SB (PIIX3) and 82371AB (PIIX4) datasheets.

mod bars;
mod bus;
mod config;
mod functions;
mod msix;
mod pirq;

pub use bars::{BarRange, BarSpace};
pub use bus::{PciBus, PciError};
pub use config::{BarKind, PciConfig, PciIdentity, command, reg};
pub use functions::{HostBridge, IsaBridge, PowerFunction};
pub use msix::{MSIX_CAPABILITY_LEN, MsixTable};
pub use pirq::{DEFAULT_ROUTES, PirqRouter, pirq_of};

use crate::Width;
use crate::device::Device;
use std::sync::{Arc, Mutex};

/// One function of a PCI device.
pub trait PciDevice: Device {
    /// Its configuration space.
    fn config(&self) -> &PciConfig;
    /// Its configuration space, to change.
    fn config_mut(&mut self) -> &mut PciConfig;
    /// Reads `width` inside the access window of BAR `bar`.
    fn bar_load(&mut self, bar: u8, offset: u64, width: Width) -> u64;
    /// Writes `width` inside the access window of BAR `bar`.
    fn bar_store(&mut self, bar: u8, offset: u64, width: Width, value: u64);
    /// Reads configuration space; functions with live registers there override it.
    fn config_load(&mut self, offset: u8, width: Width) -> u32 {
        self.config().load(offset, width)
    }
    /// Writes configuration space; functions with live registers there override it.
    fn config_store(&mut self, offset: u8, width: Width, value: u32) {
        self.config_mut().store(offset, width, value);
    }
}

/// A function as the bus holds it.
pub type PciHandle = Arc<Mutex<dyn PciDevice>>;

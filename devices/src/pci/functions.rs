//! The chipset's own functions: i440FX host bridge, PIIX3 ISA bridge, PIIX4 power management.

use super::PciDevice;
use super::config::{PciConfig, PciIdentity, command, reg};
use super::pirq::{DEFAULT_ROUTES, PirqRouter};
use crate::Width;
use crate::device::{Device, Inspect, ResetKind};
use crate::snapshot::{Snapshot, StateError, StateStream};
use std::sync::Arc;

const INTEL: u16 = 0x8086;

fn intel(device: u16, class: u32, revision: u8) -> PciIdentity {
    PciIdentity { vendor: INTEL, device, class, revision, subsystem: (0, 0) }
}

/// A function whose registers all live in configuration space.
macro_rules! config_only {
    ($name:ident, $label:literal) => {
        impl Inspect for $name {
            fn inspect(&self, field: &mut dyn FnMut(&str, &dyn std::fmt::Display)) {
                field("command", &format_args!("{:#06x}", self.config.command()));
            }
        }

        impl Device for $name {
            fn label(&self) -> &str {
                $label
            }

            fn reset(&mut self, _kind: ResetKind) {
                self.config.reset();
                self.after_reset();
            }

            fn as_snapshot(&mut self) -> Option<&mut dyn Snapshot> {
                Some(self)
            }
        }

        impl PciDevice for $name {
            fn config(&self) -> &PciConfig {
                &self.config
            }

            fn config_mut(&mut self) -> &mut PciConfig {
                &mut self.config
            }

            /// No BARs: open bus.
            fn bar_load(&mut self, _bar: u8, _offset: u64, width: Width) -> u64 {
                width.mask()
            }

            /// No BARs: nothing decodes the write.
            fn bar_store(&mut self, _bar: u8, _offset: u64, _width: Width, _value: u64) {}

            fn config_store(&mut self, offset: u8, width: Width, value: u32) {
                self.config.store(offset, width, value);
                self.after_store();
            }
        }
    };
}

/// 82441FX PMC (8086:1237), function 0.0: what guests look at to know the chipset. The PAM and SMRAM registers keep what is
/// written; shadowing is fixed (ROM stays ROM).
pub struct HostBridge {
    config: PciConfig,
}

impl HostBridge {
    /// The bridge at reset.
    pub fn new() -> HostBridge {
        let mut config = PciConfig::new(intel(0x1237, 0x06_00_00, 2));
        config.preset(reg::COMMAND, &(command::MEMORY | command::MASTER).to_le_bytes());
        config.allow_writes(reg::COMMAND, &command::SERR.to_le_bytes());
        config.preset(0x72, &[0x02]); // SMRAM: C_BASE_SEG
        config.allow_writes(0x59, &[0x30, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33]); // PAM0-6
        config.allow_writes(0x72, &[0x78]);
        HostBridge { config }
    }

    fn after_reset(&mut self) {}

    fn after_store(&mut self) {}
}

impl Default for HostBridge {
    fn default() -> Self {
        HostBridge::new()
    }
}

crate::snapshot!(HostBridge { config });
config_only!(HostBridge, "i440fx");

/// 82371SB PCI-to-ISA bridge (8086:7000): PIRQ routing.
pub struct IsaBridge {
    config: PciConfig,
    router: Arc<PirqRouter>,
}

/// PIRQRC[A]; B, C and D follow.
const PIRQRC: u8 = 0x60;

impl IsaBridge {
    /// A bridge that steers `router`.
    pub fn new(router: Arc<PirqRouter>) -> IsaBridge {
        let mut config = PciConfig::new(intel(0x7000, 0x06_01_00, 0));
        config.preset(reg::COMMAND, &7u16.to_le_bytes());
        config.allow_writes(reg::COMMAND, &(command::SERR | 8).to_le_bytes());
        config.preset(PIRQRC, &DEFAULT_ROUTES);
        config.allow_writes(PIRQRC, &[0x8F; 4]);
        config.preset(0x4C, &[0x4D]); // IORT
        config.preset(0x4E, &[0x03, 0x00]); // XBCS
        config.allow_writes(0x4C, &[0x7F, 0, 0xFF, 0x03]);
        config.preset(0x69, &[0x02]); // TOM
        config.allow_writes(0x69, &[0xFE]);
        let mut bridge = IsaBridge { config, router };
        bridge.after_store();
        bridge
    }

    fn after_reset(&mut self) {
        self.after_store();
    }

    fn after_store(&mut self) {
        for pirq in 0..4 {
            self.router.set_route(pirq, self.config.byte(PIRQRC + pirq));
        }
    }
}

impl Snapshot for IsaBridge {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        let IsaBridge { config, router } = self;
        s.field("config", config)?;
        router.shared_state(s)
    }
}

config_only!(IsaBridge, "piix3-isa");

/// 82371AB power management function (8086:7113). Its I/O base is fixed at [`PowerFunction::PM_BASE`] and always
/// decoded, as our firmware leaves it; the registers there belong to the ACPI device.
pub struct PowerFunction {
    config: PciConfig,
}

impl PowerFunction {
    /// First port of the power management registers.
    pub const PM_BASE: u16 = 0x600;

    /// The function as the firmware leaves it.
    pub fn new() -> PowerFunction {
        let mut config = PciConfig::new(intel(0x7113, 0x06_80_00, 3));
        config.preset(reg::COMMAND, &command::IO.to_le_bytes());
        config.allow_writes(reg::COMMAND, &[0, 0]);
        config.preset(reg::STATUS, &0x0280u16.to_le_bytes());
        config.preset(reg::INTERRUPT_LINE, &[9, 1]);
        config.preset(0x40, &(u32::from(PowerFunction::PM_BASE) | 1).to_le_bytes()); // PMBA
        config.preset(0x80, &[1]); // PMREGMISC: PMIOSE
        PowerFunction { config }
    }

    fn after_reset(&mut self) {}

    fn after_store(&mut self) {}
}

impl Default for PowerFunction {
    fn default() -> Self {
        PowerFunction::new()
    }
}

crate::snapshot!(PowerFunction { config });
config_only!(PowerFunction, "piix4-pm");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::IrqSink;

    struct Nowhere;

    impl IrqSink for Nowhere {
        fn set_level(&self, _input: u32, _high: bool) {}
    }

    #[test]
    fn pirqrc_steers_the_router() {
        let router = PirqRouter::new(&(Arc::new(Nowhere) as Arc<dyn IrqSink>));
        let mut isa = IsaBridge::new(Arc::clone(&router));
        assert_eq!(isa.config_load(0x60, Width::W32), 0x0B0A_0B0A);
        isa.config_store(0x61, Width::W8, 0x05);
        assert_eq!(router.route(1), Some(5));
        isa.reset(ResetKind::Bus);
        assert_eq!(router.route(1), Some(11));
    }

    #[test]
    fn the_power_function_decodes_its_fixed_base() {
        let mut pm = PowerFunction::new();
        pm.config_store(0x40, Width::W32, 0xFFFF_FFFF);
        assert_eq!(pm.config_load(0x40, Width::W32), 0x601);
        assert_eq!(pm.config_load(0, Width::W32), 0x7113_8086);
    }
}

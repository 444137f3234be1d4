//! PIIX3 IDE function: two channels in compatibility mode, up to four ATA disks, bus master DMA.
//!
//! After ATA/ATAPI-7 (INCITS 397), 82371SB (PIIX3) section 2.7, and "Programming Interface for Bus Master IDE
//! Controller" 1.0. The legacy ports are always decoded; IDETIM says so and keeps what is written.
//! Wiring: [`IdeController::claim_ports`], IRQ 14 and 15; BAR 4 carries the bus master registers.

mod channel;
mod command;
mod dma;
mod drive;
mod spec;
#[cfg(test)]
mod tests;

pub use channel::Channel;

use crate::block::BlockBackend;
use crate::bus::Bus;
use crate::counters::Counters;
use crate::device::{Device, DeviceHandle, Inspect, ResetKind};
use crate::dma::DmaTap;
use crate::irq::IrqLine;
use crate::pci::{BarKind, PciConfig, PciDevice, PciIdentity};
use crate::snapshot::Snapshot;
use crate::{Port, Width};
use paravane_memory::GuestMemory;
use std::fmt;
use std::sync::{Arc, Mutex};

/// Command block (8 ports, up to 32 bits wide) and control block (1 port) of each channel; IRQ 14 and 15.
pub const LEGACY_PORTS: [(Port, Port); 2] = [(Port(0x1F0), Port(0x3F6)), (Port(0x170), Port(0x376))];

const BUS_MASTER_BAR: u8 = 4;

/// Why a disk cannot be attached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IdeError {
    /// There are two channels with two units each.
    NoSuchUnit,
    /// A disk is there already.
    Occupied,
}

impl fmt::Display for IdeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            IdeError::NoSuchUnit => f.write_str("IDE has two channels with two units each"),
            IdeError::Occupied => f.write_str("the IDE unit has a disk already"),
        }
    }
}

impl std::error::Error for IdeError {}

/// 82371SB IDE interface (8086:7010).
pub struct IdeController {
    config: PciConfig,
    channels: [Arc<Mutex<Channel>>; 2],
}

impl IdeController {
    /// A controller without disks; `irqs` are the wires to ISA IRQ 14 and 15, `taps` hear of the channels' accesses to memory.
    pub fn new(
        memory: &GuestMemory,
        irqs: [IrqLine; 2],
        taps: [DmaTap; 2],
        counters: &Counters,
    ) -> IdeController {
        let mut config = PciConfig::new(PciIdentity {
            vendor: 0x8086,
            device: 0x7010,
            class: 0x01_01_80,
            revision: 0,
            subsystem: (0, 0),
        });
        config.set_bar(BUS_MASTER_BAR, BarKind::Io, 16);
        config.preset(0x06, &0x0280u16.to_le_bytes());
        config.preset(0x40, &[0x00, 0x80, 0x00, 0x80]); // IDETIM: IDE decode enable
        config.allow_writes(0x40, &[0xFF, 0xF3, 0xFF, 0xF3, 0xFF]);
        let ([primary, secondary], [first, second]) = (irqs, taps);
        let channels = [
            Channel::new("ide0", memory.clone(), first, primary, counters),
            Channel::new("ide1", memory.clone(), second, secondary, counters),
        ];
        IdeController { config, channels }
    }

    /// Connects `backend` as unit 0 (master) or 1 (slave) of `channel`.
    pub fn attach(&mut self, channel: u8, unit: u8, backend: Arc<dyn BlockBackend>) -> Result<(), IdeError> {
        let c = self.channels.get(usize::from(channel)).ok_or(IdeError::NoSuchUnit)?;
        let mut c = c.lock().expect("IDE channel");
        match c.drives.get(usize::from(unit)) {
            None => Err(IdeError::NoSuchUnit),
            Some(Some(_)) => Err(IdeError::Occupied),
            Some(None) => {
                c.attach(unit, backend);
                Ok(())
            }
        }
    }

    /// Claims the legacy ports of both channels on `bus`.
    pub fn claim_ports(&self, bus: &Bus) {
        for (channel, (commands, control)) in self.channels.iter().zip(LEGACY_PORTS) {
            let device = bus.attach(Arc::clone(channel) as DeviceHandle);
            bus.claim_ports(&device, commands, 8, Width::W32);
            bus.claim_ports(&device, control, 1, Width::W8);
        }
    }

    /// The device behind the legacy ports of channel 0 or 1.
    pub fn channel(&self, channel: usize) -> Arc<Mutex<Channel>> {
        Arc::clone(&self.channels[channel & 1])
    }
}

crate::snapshot!(IdeController { config, channels });

impl Inspect for IdeController {
    fn inspect(&self, field: &mut dyn FnMut(&str, &dyn fmt::Display)) {
        for (i, c) in self.channels.iter().enumerate() {
            let c = c.lock().expect("IDE channel");
            for (unit, d) in c.drives.iter().enumerate() {
                let sectors = d.as_ref().map_or(0, |d| d.sectors());
                field(&format!("ide{i}.{unit} sectors"), &sectors);
            }
        }
    }
}

impl Device for IdeController {
    fn label(&self) -> &str {
        "ide"
    }

    /// Resets both channels as well. With requests in flight, drain their back ends first.
    fn reset(&mut self, kind: ResetKind) {
        self.config.reset();
        self.channels.iter().for_each(|c| c.lock().expect("IDE channel").reset(kind));
    }

    fn as_snapshot(&mut self) -> Option<&mut dyn Snapshot> {
        Some(self)
    }
}

impl PciDevice for IdeController {
    fn config(&self) -> &PciConfig {
        &self.config
    }

    fn config_mut(&mut self) -> &mut PciConfig {
        &mut self.config
    }

    fn bar_load(&mut self, _bar: u8, offset: u64, width: Width) -> u64 {
        let c = self.channels[usize::from(offset >= 8)].lock().expect("IDE channel");
        (0..width.bytes()).fold(0, |value, i| {
            let register = (offset as usize + i) & 7;
            value | (u64::from(c.bus_master_load(register as u8)) << (8 * i))
        })
    }

    fn bar_store(&mut self, _bar: u8, offset: u64, width: Width, value: u64) {
        let mut c = self.channels[usize::from(offset >= 8)].lock().expect("IDE channel");
        for i in 0..width.bytes() {
            c.bus_master_store(((offset as usize + i) & 7) as u8, (value >> (8 * i)) as u8);
        }
    }
}

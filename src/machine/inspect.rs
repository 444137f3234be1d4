//! The machine as a debugger looks at it: what devices say of themselves, without touching a register.

use super::board::Board;
use super::cpubus::MachineBus;
use super::dma::Dma;
use crate::trace::Switch;
use paravane_devices::pci::PciBus;
use paravane_devices::{Counters, DeviceHandle, InterruptFabric};
use paravane_memory::Width;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Name and value, in the order to show them.
pub type Fields = Vec<(String, String)>;

/// Looks at devices and counters from any thread.
pub struct Inspector {
    devices: Vec<DeviceHandle>,
    fabric: Arc<InterruptFabric>,
    pci: Arc<Mutex<PciBus>>,
    counters: Counters,
    trace: Arc<Switch>,
    dma: Arc<Dma>,
    bus: Arc<MachineBus>,
    vcpus: u32,
}

/// One PCI function.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PciFunction {
    /// Slot and function.
    pub address: (u8, u8),
    /// What it calls itself.
    pub label: String,
    /// Vendor and device.
    pub id: (u16, u16),
    /// Class, subclass, programming interface.
    pub class: u32,
    /// COMMAND.
    pub command: u16,
    /// The six BARs as they read.
    pub bars: [u32; 6],
    /// Interrupt line and pin.
    pub interrupt: (u8, u8),
}

impl Inspector {
    /// Who traces the devices.
    pub fn trace(&self) -> &Arc<Switch> {
        &self.trace
    }

    /// Who listens to devices' accesses to memory.
    pub fn dma(&self) -> &Dma {
        &self.dma
    }

    /// What processors see of the machine.
    pub fn bus(&self) -> &Arc<MachineBus> {
        &self.bus
    }

    /// How many processors there are.
    pub fn vcpus(&self) -> u32 {
        self.vcpus
    }

    pub(super) fn new(
        board: &Board,
        counters: &Counters,
        trace: &Arc<Switch>,
        dma: &Arc<Dma>,
        vcpus: u32,
    ) -> Inspector {
        Inspector {
            devices: board.devices.clone(),
            fabric: Arc::clone(&board.fabric),
            pci: Arc::clone(&board.pci),
            counters: counters.clone(),
            trace: Arc::clone(trace),
            dma: Arc::clone(dma),
            bus: Arc::clone(&board.cpu_bus),
            vcpus,
        }
    }

    /// Every device with its label and its state.
    pub fn devices(&self) -> Vec<(String, Fields)> {
        self.devices
            .iter()
            .map(|device| {
                let device = device.lock().unwrap_or_else(PoisonError::into_inner);
                let mut fields = Fields::new();
                device.inspect(&mut |name, value| fields.push((name.to_owned(), value.to_string())));
                (device.label().to_owned(), fields)
            })
            .collect()
    }

    /// PIC, I/O APIC and local APICs.
    pub fn interrupts(&self) -> Fields {
        let mut fields = Fields::new();
        self.fabric.inspect(&mut |name, value| fields.push((name.to_owned(), value.to_string())));
        fields
    }

    /// Every counter by group and name.
    pub fn counters(&self) -> BTreeMap<String, BTreeMap<String, u64>> {
        self.counters.snapshot()
    }

    /// Every function of bus 0.
    pub fn pci(&self) -> Vec<PciFunction> {
        let pci = self.pci.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all = Vec::new();
        for address in (0..32).flat_map(|slot| (0..8).map(move |function| (slot, function))) {
            let Some(handle) = pci.function(address.0, address.1) else { continue };
            let device = handle.lock().unwrap_or_else(PoisonError::into_inner);
            // The plain content: a function with registers that change by being read is not asked.
            let load = |offset, width| device.config().load(offset, width);
            let id = load(0, Width::W32);
            all.push(PciFunction {
                address,
                label: device.label().to_owned(),
                id: (id as u16, (id >> 16) as u16),
                class: load(8, Width::W32) >> 8,
                command: load(4, Width::W16) as u16,
                bars: std::array::from_fn(|n| load(0x10 + 4 * n as u8, Width::W32)),
                interrupt: (load(0x3C, Width::W8) as u8, load(0x3D, Width::W8) as u8),
            });
        }
        all
    }
}

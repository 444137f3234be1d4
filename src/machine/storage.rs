//! Disks: images opened and locked, each behind the front end asked for.

use super::MachineError;
use super::config::{DiskBus, DiskConfig, MachineConfig};
use super::dma::Dma;
use paravane_devices::Counters;
use paravane_devices::block::{
    BlockBackend, BlockCounters, BlockQueue, ImageOptions, QueueOptions, RawImage,
};
use paravane_devices::ide::{IdeController, IdeError};
use paravane_memory::GuestMemory;
use std::sync::Arc;

/// An opened disk.
pub(super) struct Disk {
    pub(super) config: DiskConfig,
    image: RawImage,
}

/// Opens and locks every image, before anything is started or changed.
pub(super) fn open(config: &MachineConfig) -> Result<Vec<Disk>, MachineError> {
    config
        .disks
        .iter()
        .map(|disk| {
            let options = ImageOptions { read_only: disk.readonly, snapshot: disk.snapshot };
            Ok(Disk { config: disk.clone(), image: RawImage::open(&disk.file, options)? })
        })
        .collect()
}

/// Starts the back end of `disk`, the `number`-th of the machine.
pub(super) fn back_end(
    disk: Disk,
    number: usize,
    mem: &GuestMemory,
    counters: &Counters,
    dma: &Arc<Dma>,
) -> Result<Arc<dyn BlockBackend>, MachineError> {
    let label = format!("disk{number}");
    let (serial, dma) = (format!("PV{number:06}"), dma.tap(&label));
    let options = QueueOptions { serial, dma, ..QueueOptions::default() };
    let queue = BlockQueue::new(disk.image, mem.clone(), BlockCounters::new(counters, &label), None, options)
        .map_err(|e| MachineError::Host("disk worker threads", e))?;
    Ok(Arc::new(queue))
}

/// Puts back ends on the IDE channels: primary master, primary slave, secondary master, secondary slave.
pub(super) struct IdeSlots(u8);

impl IdeSlots {
    pub(super) fn new() -> IdeSlots {
        IdeSlots(0)
    }

    pub(super) fn attach(
        &mut self,
        controller: &mut IdeController,
        config: &DiskConfig,
        backend: Arc<dyn BlockBackend>,
    ) -> Result<(), MachineError> {
        let (channel, unit) = (self.0 / 2, self.0 % 2);
        self.0 += 1;
        controller.attach(channel, unit, backend).map_err(|e| {
            let problem = match e {
                IdeError::NoSuchUnit => "IDE takes four disks; give this one bus=virtio".to_owned(),
                e => e.to_string(),
            };
            MachineError::Disk(config.file.clone(), problem)
        })
    }
}

/// Whether `disk` is for the IDE controller.
pub(super) fn is_ide(disk: &DiskConfig) -> bool {
    disk.bus == DiskBus::Ide
}

//! virtio over PCI: transport, split virtqueues, block and entropy devices.
//!
//! After VIRTIO 1.2 (OASIS, 2022): split virtqueues (2.7), PCI transport (4.1), block (5.2), entropy (5.4), and the
//! legacy interfaces of each. A doorbell takes descriptors off the ring and submits; it does no host I/O. The back end's worker
//! returns them and interrupts. All state of one device lies behind the one mutex that the PCI bus locks as well.

mod blk;
mod memory;
mod pci;
mod rings;
mod rng;
mod spec;
#[cfg(test)]
mod tests;

pub use blk::VirtioBlk;
pub use pci::{DoorbellWatch, VirtioPci, VirtioPciOptions, VirtioWiring};
pub use rings::{Chain, Piece, Rings, VirtioCounters};
pub use rng::{EntropySource, HostEntropy, VirtioRng};

use paravane_devices::Snapshot;
use paravane_devices::block::{BlockError, BlockRequest, Completion};
use std::sync::Arc;

/// A device type behind a transport.
pub trait VirtioDevice: Snapshot + Send {
    /// Device type number (VIRTIO 1.2, section 5).
    fn device_type(&self) -> u16;
    /// PCI class code of the function.
    fn class(&self) -> u32;
    /// Transitional PCI device ID.
    fn transitional_id(&self) -> u16;
    /// Feature bits of the device type.
    fn features(&self) -> u64;
    /// Sizes of its queues, powers of two.
    fn queue_sizes(&self) -> &[u16];
    /// Device configuration as it reads now.
    fn config(&self) -> &[u8];
    /// The driver writes one byte of the device configuration.
    fn config_store(&mut self, rings: &Rings, offset: u64, value: u8);
    /// Gives the device what completes its back-end requests.
    fn connect(&mut self, completion: Arc<dyn Completion>);
    /// The driver accepted features and is up.
    fn start(&mut self, rings: &Rings);
    /// The driver rang queue `queue`.
    fn doorbell(&mut self, rings: &mut Rings, queue: usize);
    /// A back-end request is done.
    fn completed(&mut self, rings: &mut Rings, request: BlockRequest, result: Result<(), BlockError>);
    /// Requests with the back end.
    fn in_flight(&self) -> usize;
    /// Forgets the driver; requests still in flight end in silence.
    fn reset(&mut self);
}

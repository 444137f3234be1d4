//! What a device is, and what it may be able to do.

use crate::snapshot::Snapshot;
use crate::time::VmTime;
use paravane_memory::{Port, Width};
use std::sync::{Arc, Mutex};

/// Why a device is reset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ResetKind {
    /// Power was just applied.
    PowerOn,
    /// The machine's reset line was pulsed; what the datasheet keeps over reset is kept.
    Bus,
}

/// Shows a device's state to people: name and value, in the order to print them.
pub trait Inspect {
    /// Calls `field` for every piece of state worth showing.
    fn inspect(&self, field: &mut dyn FnMut(&str, &dyn std::fmt::Display));
}

/// A device. Abilities are asked for; the default answer is "I cannot".
pub trait Device: Inspect + Send {
    /// A short unique name: `pit`, `ide0`, `virtio-blk1`.
    fn label(&self) -> &str;
    /// Returns to the state the datasheet gives for `kind`.
    fn reset(&mut self, kind: ResetKind);
    /// The device as something with I/O ports.
    fn as_pio(&mut self) -> Option<&mut dyn PioDevice> {
        None
    }
    /// The device as something that moves whole buffers through a port (REP INS, REP OUTS).
    fn as_string_pio(&mut self) -> Option<&mut dyn StringPio> {
        None
    }
    /// The device as something with memory-mapped registers.
    fn as_mmio(&mut self) -> Option<&mut dyn MmioDevice> {
        None
    }
    /// The device as something that waits for points in time.
    fn as_timed(&mut self) -> Option<&mut dyn TimedDevice> {
        None
    }
    /// The device as something whose state can be saved and loaded.
    fn as_snapshot(&mut self) -> Option<&mut dyn Snapshot> {
        None
    }
}

/// Port-mapped registers. The bus passes only widths that lie inside the claimed range.
pub trait PioDevice {
    /// Reads `width` at `port` (absolute).
    fn port_in(&mut self, port: Port, width: Width) -> u32;
    /// Writes `value` at `port` (absolute).
    fn port_out(&mut self, port: Port, width: Width, value: u32);
}

/// Port access by the buffer: what a repeated string instruction would move, in one call.
pub trait StringPio {
    /// Fills as much of `buf` as the port gives without a pause, in units of `width`; returns the bytes filled.
    fn pio_in_string(&mut self, port: Port, width: Width, buf: &mut [u8]) -> usize;
    /// Takes as much of `buf` as the port accepts without a pause, in units of `width`; returns the bytes taken.
    fn pio_out_string(&mut self, port: Port, width: Width, buf: &[u8]) -> usize;
}

/// Memory-mapped registers; offsets are relative to the start of the mapped region.
pub trait MmioDevice {
    /// Reads `width` at `offset`.
    fn mmio_load(&mut self, offset: u64, width: Width) -> u64;
    /// Writes `value` at `offset`.
    fn mmio_store(&mut self, offset: u64, width: Width, value: u64);
}

/// A device with a [`crate::Timer`].
pub trait TimedDevice {
    /// The armed time is reached (it may be later than asked for, never earlier).
    fn expired(&mut self, now: VmTime);
}

/// A device as the bus and the timers hold it.
pub type DeviceHandle = Arc<Mutex<dyn Device>>;

/// Makes a device shareable, keeping its own type for the caller.
pub fn share<D: Device>(device: D) -> Arc<Mutex<D>> {
    Arc::new(Mutex::new(device))
}

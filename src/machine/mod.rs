//! From configuration to a machine: memory map, devices, processors. The only place that knows interrupt numbers, ports and
//! PCI slots.

mod clock;
mod config;
mod tsc;

pub use clock::{HostClock, InstructionClock};
pub use config::{Boot, ClockKind, DiskBus, DiskConfig, EngineKind, MachineConfig, SerialConfig};

//! Bus, interrupt lines, clock, and every legacy device of the PC.
//!
//! A device is a plain struct built with its wiring ([`IrqLine`]s, [`Timer`]s, guest memory, a back end). It
//! knows no bus address, no IRQ number, no thread and no host time. Optional abilities are optional traits.
#![forbid(unsafe_code)]

pub mod acpi_pm;
pub mod block;
mod bus;
mod control;
mod counters;
mod device;
mod dma;
pub mod hpet;
pub mod i8042;
pub mod ide;
mod irq;
pub mod irqchip;
pub mod pci;
pub mod pit;
pub mod rtc;
mod snapshot;
mod sysports;
mod time;
mod timed;
pub mod uart;

pub use acpi_pm::{AcpiPm, AcpiPmWiring};
pub use bus::{Bus, BusDevice, Claim};
pub use control::{A20Gate, A20Source, MachineControl};
pub use counters::{Counter, Counters};
pub use device::{
    Device, DeviceHandle, Inspect, MmioDevice, PioDevice, ResetKind, StringPio, TimedDevice, share,
};
pub use dma::{DmaAccess, DmaPurpose, DmaTap, DmaWatch};
pub use hpet::{Hpet, HpetWiring, LegacyRoute};
pub use i8042::{I8042, I8042Wiring};
pub use irq::{IrqLine, IrqSink, MsiSink};
pub use irqchip::{FabricConfig, InterruptFabric, IoApicWindow, PicPorts, TscClock, VcpuKick, WiredOr};
pub use paravane_memory::{Port, VpIndex, Width};
pub use pit::Pit;
pub use rtc::Rtc;
pub use snapshot::{Named, Snapshot, StateError, StateStream};
pub use sysports::{ByteSink, CoprocessorError, CoprocessorPins, DebugConsole, DebugExit, SystemPorts};
pub use time::{Clock, ManualClock, Timer, TimerQueue, VmTime};
pub use timed::bind_timer;
pub use uart::{CharSink, CharSource, NoInput, Uart, UartWiring};

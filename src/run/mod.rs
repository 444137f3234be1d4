//! Running a machine: threads, time, the terminal, and how it ends.

mod dossier;
mod event_loop;
mod lifecycle;
mod output;
mod park;
mod signals;
pub mod terminal;
mod vcpu;

pub use event_loop::EventLoop;
pub use lifecycle::{Lifecycle, Request};
pub use output::{Output, OutputHandle};
pub use park::Vcpu;
pub use vcpu::{BOOT_VP, PanicGuard, Probe, TimeKeeper, VcpuRunner};

//! The debugger's way in: a GDB stub whose breakpoints live in the engines, never in guest memory or guest registers.
//!
//! * [`link`]: how a session stops the vCPU, runs commands on its thread, and lets it go on;
//! * [`armed`]: breakpoints, watchpoints and conditions, made into the engine's `DebugPlan`;
//! * [`registers`], [`memory`], [`show`]: what there is to look at, without disturbing it;
//! * [`listing`]: guest code beside the host code made of it;
//! * [`post_mortem`], [`symbols`]: the dossier of a processor that shut down;
//! * [`target`], [`monitor`]: the stub's operations in these terms; [`listen`], [`session`]: sockets and packets.

mod armed;
mod expr;
mod link;
mod listen;
pub mod listing;
mod memory;
mod monitor;
pub mod perf_map;
mod post_mortem;
mod registers;
mod session;
mod show;
mod symbols;
mod target;
mod wire;

pub use armed::{Armed, MonitorBreak, MonitorWatch, Owner};
pub use link::{Event, Gone, Link, Resume, Stop};
pub use listen::{Debugger, GdbAddress};
pub use post_mortem::dossier;
pub use symbols::{SymbolError, Symbols};

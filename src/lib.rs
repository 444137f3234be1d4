//! paravane: a userspace x86 PC that needs no virtualization hardware, and a bench for paravirtual devices.
//!
//! This package joins the parts: [`cli`] says what is wanted, [`machine`] wires memory, devices and processors
//! together (the only place that knows addresses, ports and interrupt numbers), [`run`] drives them, [`compare`]
//! measures, [`debug`] lets a debugger in, [`doctor`] looks at the host, [`stats`] writes the counters down.

pub mod cli;
pub mod compare;
pub mod debug;
pub mod doctor;
pub mod lockstep;
pub mod machine;
pub mod replay;
pub mod run;
pub mod stats;
pub mod trace;

//! Architectural x86 state, decoding, segmentation, the MMU, exceptions and the interpreter.
//!
//! The processor sees no device: everything that is not RAM goes through [`CpuBus`], which the machine
//! implements. Guest faults are values ([`Fault`]), never panics.
#![forbid(unsafe_code)]

mod bus;
mod cpuid;
mod engine;
mod exec;
mod fault;
mod interp;
mod mmu;
mod state;

pub use bus::{CpuBus, CpuidResult, MsrFault};
pub use engine::{Attention, Budget, Engine, Exit, VectorUnit};
pub use fault::{Fault, Vector};
pub use paravane_memory::{Port, VpIndex};
pub use state::*;

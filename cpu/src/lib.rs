//! Architectural x86 state, decoding, segmentation, the MMU, exceptions and the interpreter.
//!
//! The processor sees no device: everything that is not RAM goes through [`CpuBus`], which the machine
//! implements. Guest faults are values ([`Fault`]), never panics.
#![forbid(unsafe_code)]

#[cfg(any(test, feature = "testbed"))]
mod board;
mod bus;
mod control;
mod core;
mod cpuid;
mod debug;
mod engine;
mod exception;
mod exec;
mod fault;
mod fetch;
mod interp;
mod interpreter;
pub mod mmu;
mod msr;
mod plan;
mod post_mortem;
mod segment;
mod state;
mod syscall;
mod task;
#[cfg(test)]
mod testbed;
mod trace;
mod transfer;
mod vme;

pub use self::core::{Core, Step, instruction_address};
#[cfg(any(test, feature = "testbed"))]
pub use board::Board;
pub use bus::{CpuBus, CpuidResult, MsrFault};
pub use cpuid::{CpuModel, HostFeatures, HostVendor, MODEL_NAMES, model_by_name};
pub use engine::{Attention, Budget, Engine, Exit, HostCode, VectorUnit};
pub use fault::{Fault, Vector};
pub use interp::{operand_alignment, x87_opcode};
pub use interpreter::Interpreter;
pub use mmu::{
    Access, Flushes, PageTable, PagingFeatures, Peek, PeekEnd, PeekStep, Privilege, Translation, inspect,
    page_table, peek, translate,
};
pub use paravane_memory::{Port, VpIndex};
pub use plan::{DEVICE_PAGES, DebugPlan, DebugStop, Space, WatchHit, WatchKind, Watchpoint};
pub use post_mortem::{Attempt, Evidence, PostMortem, Trail, Visit};
pub use state::*;
pub use trace::{TraceContext, TraceEvent, Tracer};
pub use vme::virtual_interrupt_due;

//! The binary translator, and single guest instructions executed by the host itself.
//!
//! Guest and host have the same instruction set: a block is decoded ([`frontend`]), instructions that need no
//! change are copied ([`emit`]), memory operands go through the delta tables ([`delta`]), and what is not on the
//! allow-list ([`classify`]) runs in the interpreter core of `paravane-cpu`. [`translator`] is the engine: it keeps
//! the blocks, runs them, and serves their misses and exits.
#![allow(clippy::useless_conversion, reason = "dynasm! converts every register it is given")]

mod assembler;
mod block;
mod classify;
mod code_cache;
mod context;
mod delta;
mod emit;
mod flags;
mod frontend;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod groups;
pub mod host;
mod large;
mod pages;
pub mod perf_map;
mod regs;
mod segments;
pub mod signal;
mod spaces;
mod stubs;
mod tables;
mod translator;
mod vectors;
mod windows;

pub use host::HostVectorUnit;
pub use translator::{JitOptions, Translator};

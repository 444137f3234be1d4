//! Guest instructions executed one at a time by the host CPU.
//!
//! Host and guest have the same instruction set, so whatever the interpreter need not understand (x87, MMX,
//! SSE, AVX: SDM 1, chapters 8 to 14) the host executes itself with the guest's registers loaded, bit-exact.
//! [`HostVectorUnit`] does that for the interpreter. [`Native`] runs whole user-mode instructions, memory
//! operands and faults included, and is the oracle the engines are compared with.

mod area;
#[cfg(feature = "fuzz")]
mod canary;
mod gate;
mod ldt;
mod mapping;
mod native;
mod vector;

pub use area::CodeArea;
#[cfg(feature = "fuzz")]
pub use canary::{Canaries, HostMapping, host_mappings};
pub use native::{
    CODE_LIMIT_16, CODE_ROOM, DATA_BASE_16, DATA_LIMIT_16, Native, NativeLayout, NativeMode, NativeState,
    NativeStop, SELECTORS_16,
};
pub use vector::HostVectorUnit;

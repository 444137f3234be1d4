//! Small self-checking guests for what the host CPU cannot be asked: modes, exceptions, paging, tasks, debugging.
//!
//! Every test runs in the interpreter and in the translator. What it expects is written down from the SDM; the
//! chapter is named at each module's top.

#[path = "system/bed.rs"]
#[macro_use]
mod bed;
#[path = "system/alignment.rs"]
mod alignment;
#[path = "system/crossing.rs"]
mod crossing;
#[path = "system/debug.rs"]
mod debug;
#[path = "system/debug_registers.rs"]
mod debug_registers;
#[path = "system/delivery.rs"]
mod delivery;
#[path = "system/deviations.rs"]
mod deviations;
#[path = "system/exceptions.rs"]
mod exceptions;
#[path = "system/fpu.rs"]
mod fpu;
#[path = "system/gates.rs"]
mod gates;
#[path = "system/illegal.rs"]
mod illegal;
#[path = "system/interrupts.rs"]
mod interrupts;
#[path = "system/models.rs"]
mod models;
#[path = "system/modes.rs"]
mod modes;
#[path = "system/modified.rs"]
mod modified;
#[path = "system/paging.rs"]
mod paging;
#[path = "system/plan.rs"]
mod plan;
#[path = "system/post_mortem.rs"]
mod post_mortem;
#[path = "system/registers.rs"]
mod registers;
#[path = "system/segmented.rs"]
mod segmented;
#[path = "system/segments.rs"]
mod segments;
#[path = "system/spaces.rs"]
mod spaces;
#[path = "system/switches.rs"]
mod switches;
#[path = "system/syscalls.rs"]
mod syscalls;
#[path = "system/tasks.rs"]
mod tasks;
#[path = "system/tlb.rs"]
mod tlb;
#[path = "system/transfers.rs"]
mod transfers;
#[path = "system/vme.rs"]
mod vme;
#[path = "system/wild.rs"]
mod wild;
#[path = "system/wraps.rs"]
mod wraps;
#[path = "system/xsave.rs"]
mod xsave;

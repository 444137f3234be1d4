//! Several engines on threads of their own over one memory: what processors promise each other (SDM 3A, chapter 8).
//!
//! `PARAVANE_SMP_SECONDS=60` makes every test that counts rounds last as long.

#[macro_use]
#[path = "smp/bed.rs"]
mod bed;
#[path = "smp/atomic.rs"]
mod atomic;
#[path = "smp/code.rs"]
mod code;
#[path = "smp/litmus.rs"]
mod litmus;
#[path = "smp/paging.rs"]
mod paging;

//! Paging: from linear to physical addresses (SDM 3A, chapter 4).

mod flushes;
mod peek;
mod tlb;
mod walk;

pub use flushes::Flushes;
pub use peek::{Peek, PeekEnd, PeekStep, peek};
pub(crate) use tlb::{Entry, Tlb};
pub(crate) use walk::mask_a20;
pub use walk::{PHYS_BITS, inspect, translate};

use paravane_memory::PhysAddr;

/// What an access does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "plain words")]
pub enum Access {
    Read,
    Write,
    Execute,
}

/// On whose behalf an access is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Privilege {
    /// CPL 3.
    User,
    /// CPL below 3, by an instruction's own operand: EFLAGS.AC lifts SMAP.
    Supervisor,
    /// By the processor itself (descriptor tables, TSS): supervisor at any CPL, SMAP always applies.
    Implicit,
}

/// Where a linear address leads, and what is allowed there without another walk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// The physical address of the byte asked for.
    pub phys: PhysAddr,
    /// log2 of the page size.
    pub page_shift: u8,
    /// A write at this privilege is allowed and the dirty bit is already set.
    pub writable: bool,
    /// A user page.
    pub user: bool,
    /// Survives a reload of CR3.
    pub global: bool,
    /// Instructions may be fetched at this privilege.
    pub executable: bool,
}

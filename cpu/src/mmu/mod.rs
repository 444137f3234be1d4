//! Paging: from linear to physical addresses (SDM 3A, chapter 4).

mod flushes;
mod peek;
mod tlb;
mod walk;

pub use flushes::Flushes;
pub use peek::{Peek, PeekEnd, PeekStep, peek};
pub(crate) use tlb::{Entry, Tlb};
pub(crate) use walk::mask_a20;
pub use walk::{PageTable, inspect, page_table, translate};

use paravane_memory::PhysAddr;

/// What a processor model's paging has: the rest of an entry's bits is reserved (SDM 3A, 4.1.4).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PagingFeatures {
    /// MAXPHYADDR: physical address bits.
    pub phys_bits: u32,
    /// 1-GiB pages (CPUID Page1GB).
    pub page_1g: bool,
    /// 4-MiB pages above 4 GiB (CPUID PSE-36).
    pub pse36: bool,
}

impl PagingFeatures {
    /// Everything there is.
    pub const ALL: PagingFeatures = PagingFeatures { phys_bits: 40, page_1g: true, pse36: true };

    /// Bits 51 to MAXPHYADDR, reserved in 8-byte entries.
    pub(crate) fn beyond(self) -> u64 {
        ((1 << 52) - 1) & !((1 << self.phys_bits) - 1)
    }

    /// Reserved bits of an entry for a 4-MiB page: bits 20 to 13 are bits 39 to 32 of its address, where that has them
    /// (SDM 3A, table 4-4).
    pub(crate) fn large_pde_reserved(self) -> u64 {
        let address_bits = if self.pse36 { self.phys_bits.min(40) - 32 } else { 0 };
        0x3F_E000 & !(((1 << address_bits) - 1) << 13)
    }
}

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

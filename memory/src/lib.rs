//! Guest physical memory: RAM, ROM, overlay pages, and who wrote where.
//!
//! All RAM, ROM and overlay storage lives in one host mapping, the *backing*, so that a host address
//! is always `backing base + RamOffset` and can be bounds-checked with one comparison. The guest's
//! physical address space is laid over it: RAM below and above the 32-bit hole, ROM and overlays on
//! top; everything else is MMIO and never comes here.
//!
//! Writers that bypass the processor's own write view (devices, slow paths, debuggers) go through
//! [`GuestMemory::write`], which marks pages dirty and reports writes to pages holding translated code.

mod addr;
mod backing;
mod guest;
mod layout;
mod transfer;
mod vm;

pub use addr::{PAGE_SHIFT, PAGE_SIZE, PhysAddr, PhysPage, Port, RamOffset, VpIndex, Width};
pub use guest::{CodeWatcher, GuestMemory, MemoryConfig, MemoryError};
pub use layout::{Mapped, OverlayId};
pub use transfer::Patience;
pub use vm::{RegionHook, VmMemory, VmRegion, WriteHook};

//! Guest physical memory: RAM, ROM, overlay pages, and who wrote where.
//!
//! All RAM, ROM and overlay storage lives in one host mapping, the *backing*, so that a host address
//! is always `backing base + RamOffset` and can be bounds-checked with one comparison. The guest's
//! physical address space is laid over it: RAM below and above the 32-bit hole, ROM and overlays on
//! top; everything else is MMIO and never comes here.
//!
//! Writers that bypass a processor's own write view (devices, slow paths, debuggers) go through
//! [`GuestMemory::write`], which marks pages dirty and reports writes to pages holding translated code ([`Claims`]).
//!
//! **Several processors** and devices use it at once, as they do real memory, and the host's is as strong as theirs:
//! * loads and stores of 1, 2, 4 and 8 bytes are one host instruction each: whole where they are aligned, or inside a
//!   cache line, as the guest's own are;
//! * compare-exchanges are the host's locked instructions, also where they cross a line or a page: atomic towards
//!   everything, translated code and other host threads included. Who asks for one avoids those that cross a line where
//!   the host punishes them ([`split_locks_are_dear`]);
//! * copies and fills keep no order inside, as string instructions may; what they race with is torn at worst. All of this
//!   is done by machine instructions that the compiler cannot see into, so that races with the guest are none of the language's;
//! * what must be done in two places ([`GuestMemory::exclusive`]) excludes other such operations only.

mod addr;
mod backing;
mod claims;
mod guest;
mod layout;
mod split;
mod transfer;
mod vm;

pub use addr::{PAGE_SHIFT, PAGE_SIZE, PhysAddr, PhysPage, Port, RamOffset, VpIndex, Width};
pub use claims::{Claims, CodeWatcher, MAX_TRANSLATORS, Notice};
pub use guest::{GuestMemory, MemoryConfig, MemoryError};
pub use layout::{Mapped, OverlayId};
pub use split::{crosses_line, split_locks_are_dear};
pub use transfer::Patience;
pub use vm::{RegionHook, VmMemory, VmRegion, WriteHook};

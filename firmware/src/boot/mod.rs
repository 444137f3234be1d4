//! Loaders: a kernel file goes into guest memory, and an [`Entry`] says in what state the processor starts it.
//!
//! The format is found by content ([`detect`]): Linux bzImage by its 64-bit or 32-bit boot protocol, ELF with the PVH
//! note, Multiboot 1 (ELF or the address fields of its header), boot sectors and flat images. Loaders are generic over
//! vm-memory's traits; every refusal is one line that names the file and what to do.
//!
//! There is no BIOS in between, so the machine leaves its devices as one would: PIRQs routed and level-triggered as in
//! [`crate::tables::wiring`], interrupt lines and BARs of PCI functions assigned, the bootstrap processor's local APIC in
//! virtual wire mode (LINT0 ExtINT, LINT1 NMI), the 8259A pair initialised and masked.

mod elf;
mod entry;
mod error;
mod file;
mod flat;
mod linux;
mod multiboot;
mod place;
mod pvh;
#[cfg(test)]
mod tests;

pub use entry::{DescriptorTable, Entry, Mode, Registers, Segment};
pub use error::BootError;
pub use file::{MAX_FILE, NamedFile};

use crate::e820::E820;
use vm_memory::GuestMemoryBackend;

/// What kind of file a kernel is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// Linux bzImage, boot protocol 2.00 or later.
    BzImage,
    /// ELF with the note of the PVH boot protocol.
    Pvh,
    /// Multiboot 1.
    Multiboot,
    /// Boot sector: loaded at 0x7C00 and started in real mode.
    BootSector,
}

/// Which of Linux's entry points is used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LinuxProtocol {
    /// 64-bit where the kernel has it, else 32-bit.
    #[default]
    Auto,
    /// The 32-bit entry point.
    Protected32,
    /// The 64-bit entry point.
    Long64,
}

/// Forces a flat image instead of detection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlatImage {
    /// Where the image's first byte goes; it is also the entry point.
    pub at: u64,
    /// The processor mode it starts in.
    pub mode: Mode,
}

/// What to boot.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The kernel.
    pub kernel: &'a NamedFile,
    /// The initial RAM disk of Linux, and the first module of other kernels.
    pub initrd: Option<&'a NamedFile>,
    /// Further Multiboot or PVH modules.
    pub modules: &'a [NamedFile],
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// The memory map given to the kernel.
    pub memory: &'a E820,
    /// Physical address of the ACPI root pointer, 0 if there is none.
    pub rsdp: u64,
    /// Which Linux entry point.
    pub protocol: LinuxProtocol,
    /// Load as this flat image, whatever the content looks like.
    pub flat: Option<FlatImage>,
}

impl<'a> Request<'a> {
    /// Boots `kernel` on a machine with this memory; nothing else given.
    pub fn new(kernel: &'a NamedFile, memory: &'a E820) -> Request<'a> {
        Request {
            kernel,
            initrd: None,
            modules: &[],
            cmdline: "",
            memory,
            rsdp: 0,
            protocol: LinuxProtocol::Auto,
            flat: None,
        }
    }
}

/// Finds out what kind of kernel `file` is.
pub fn detect(file: &NamedFile) -> Result<Format, BootError> {
    let bytes = file.bytes();
    if linux::is_bzimage(bytes) {
        return Ok(Format::BzImage);
    }
    if elf::is_elf(bytes) && pvh::entry_point(file)?.is_some() {
        return Ok(Format::Pvh);
    }
    if multiboot::find_header(bytes).is_some() {
        return Ok(Format::Multiboot);
    }
    if flat::is_boot_sector(bytes) {
        return Ok(Format::BootSector);
    }
    Err(file.unknown_format())
}

/// Loads what `request` names into `mem` and returns how to start it.
pub fn load<M: GuestMemoryBackend>(mem: &M, request: &Request<'_>) -> Result<Entry, BootError> {
    if let Some(flat) = request.flat {
        return flat::load(mem, request, flat);
    }
    match detect(request.kernel)? {
        Format::BzImage => linux::load(mem, request),
        Format::Pvh => pvh::load(mem, request),
        Format::Multiboot => multiboot::load(mem, request),
        Format::BootSector => {
            flat::load(mem, request, FlatImage { at: flat::BOOT_SECTOR_AT, mode: Mode::Real16 })
        }
    }
}

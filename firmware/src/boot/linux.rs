//! Linux bzImage by the 64-bit and 32-bit boot protocols (Linux `Documentation/arch/x86/boot.rst`).

use super::entry::{Entry, Mode, Registers};
use super::{BootError, LinuxProtocol, NamedFile, Request, place};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, GuestMemoryBackend};

/// Offset of the setup header in the file and in the zero page.
const SETUP_HEADER: usize = 0x1F1;
const HDRS: u32 = u32::from_le_bytes(*b"HdrS");
const LOADED_HIGH: u8 = 1 << 0;
const CAN_USE_HEAP: u8 = 1 << 7;
const XLF_KERNEL_64: u16 = 1 << 0;
/// Offset of the 64-bit entry point from the load address.
const ENTRY_64: u64 = 0x200;
/// `type_of_loader` of loaders without a number of their own.
const LOADER_UNDEFINED: u8 = 0xFF;
const VGA_MODE_NORMAL: u16 = 0xFFFF;

pub(super) fn is_bzimage(bytes: &[u8]) -> bool {
    bytes.get(0x1FE..0x200) == Some(&[0x55, 0xAA]) && bytes.get(0x202..0x206) == Some(b"HdrS")
}

struct Image<'a> {
    header: setup_header,
    kernel: &'a [u8],
    load_at: u64,
    /// End of the memory that the kernel uses before it reads the memory map.
    end: u64,
}

pub(super) fn load<M: GuestMemoryBackend>(mem: &M, request: &Request<'_>) -> Result<Entry, BootError> {
    let file = request.kernel;
    let image = parse(file, request.memory.low_end())?;
    let mode = choose_mode(file, &image.header, request.protocol)?;
    place::put(mem, file, image.load_at, image.kernel)?;

    let mut header = image.header;
    header.type_of_loader = LOADER_UNDEFINED;
    header.vid_mode = VGA_MODE_NORMAL;
    header.loadflags &= !CAN_USE_HEAP;
    header.code32_start = image.load_at as u32;
    place::put_command_line(mem, request, command_line_limit(&header))?;
    header.cmd_line_ptr = place::STRINGS as u32;
    if let Some(initrd) = request.initrd {
        let at = place::put_high(mem, request, initrd, image.end, initrd_limit(&header))?;
        header.ramdisk_image = at as u32;
        header.ramdisk_size = initrd.bytes().len() as u32;
    }
    place::put(mem, file, place::INFO, zero_page(header, request).as_slice())?;

    let gdtr = place::put_gdt(mem, file, mode)?;
    let registers = Registers { rsi: place::INFO, ..Registers::default() };
    let entry = match mode {
        Mode::Long64 => Entry::long64(image.load_at + ENTRY_64, gdtr, place::put_identity_map(mem, file)?),
        _ => Entry::protected32(image.load_at, gdtr),
    };
    Ok(Entry { registers, ..entry })
}

fn parse(file: &NamedFile, low_end: u64) -> Result<Image<'_>, BootError> {
    let bytes = file.bytes();
    // The jump at 0x200 tells where the header of this protocol version ends.
    let end = 0x202 + usize::from(bytes.get(0x201).copied().unwrap_or(0));
    let end = end.min(SETUP_HEADER + size_of::<setup_header>());
    let raw = file.slice(SETUP_HEADER as u64, (end - SETUP_HEADER) as u64, "the setup header")?;
    let mut header = setup_header::default();
    header.as_mut_slice()[..raw.len()].copy_from_slice(raw);
    if header.version < 0x0202 || header.loadflags & LOADED_HIGH == 0 {
        return Err(file.wrong("a zImage or a kernel before Linux 2.4; give a bzImage"));
    }
    let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let start = (sectors + 1) * 512;
    // `syssize` counts 16-byte units from 2.04 on; before, only its low half is meaningful.
    let promised = if header.version >= 0x0204 { u64::from(header.syssize) * 16 } else { 1 };
    let available = (bytes.len() as u64).saturating_sub(start);
    // The size is rounded up to a whole unit; a signature may follow.
    if available == 0 || available + 15 < promised {
        return Err(file.truncated("the end of the kernel"));
    }
    let kernel = file.slice(start, available, "the kernel")?;
    let (load_at, end) = placement(&header, available);
    if end > low_end {
        return Err(file.no_room(
            end - load_at,
            "in guest RAM together with what it needs to start; give more --memory",
        ));
    }
    Ok(Image { header, kernel, load_at, end })
}

/// Load address, and the end of what the kernel needs. A relocatable kernel goes where it wants to run, so that it need
/// not move itself; none runs below its preferred address.
fn placement(header: &setup_header, size: u64) -> (u64, u64) {
    let default = u64::from(header.code32_start);
    if header.version < 0x020A {
        // These do not say what they need; compressed kernels grow about fourfold.
        return (default, default.saturating_add(size.saturating_mul(4)));
    }
    let preferred = header.pref_address;
    let end = preferred.saturating_add(u64::from(header.init_size).max(size));
    if header.relocatable_kernel != 0 { (preferred, end) } else { (default, end.max(default + size)) }
}

fn choose_mode(file: &NamedFile, header: &setup_header, wanted: LinuxProtocol) -> Result<Mode, BootError> {
    let has_64 = header.version >= 0x020C && header.xloadflags & XLF_KERNEL_64 != 0;
    match (wanted, has_64) {
        (LinuxProtocol::Protected32, _) | (LinuxProtocol::Auto, false) => Ok(Mode::Protected32),
        (_, true) => Ok(Mode::Long64),
        (LinuxProtocol::Long64, false) => {
            Err(BootError::NoSuchEntry { file: file.name().to_string(), what: "64-bit entry point" })
        }
    }
}

fn command_line_limit(header: &setup_header) -> usize {
    if header.version >= 0x0206 { header.cmdline_size as usize } else { 255 }
}

/// First address past the highest that an initrd may occupy.
fn initrd_limit(header: &setup_header) -> u64 {
    let max = if header.version >= 0x0203 { header.initrd_addr_max } else { 0x37FF_FFFF };
    u64::from(max) + 1
}

fn zero_page(header: setup_header, request: &Request<'_>) -> boot_params {
    let mut page = boot_params { hdr: header, acpi_rsdp_addr: request.rsdp, ..Default::default() };
    page.hdr.header = HDRS;
    let map = request.memory.entries();
    let mut table = page.e820_table;
    for (slot, e) in table.iter_mut().zip(map) {
        *slot = boot_e820_entry { addr: e.start, size: e.len, r#type: e.kind as u32 };
    }
    page.e820_table = table;
    page.e820_entries = map.len().min(table.len()) as u8;
    page
}

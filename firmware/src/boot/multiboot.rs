//! Multiboot 1 (Multiboot Specification 0.6.96): a header in the first 8 KiB, 32-bit entry, information in EBX.

use super::elf::{self, Elf};
use super::entry::{Entry, Mode, Registers};
use super::file::le;
use super::{BootError, NamedFile, Request, place};
use crate::e820::{EBDA, HIGH_MEMORY};
use vm_memory::GuestMemoryBackend;

const HEADER_MAGIC: u32 = 0x1BAD_B002;
const BOOT_MAGIC: u64 = 0x2BAD_B002;
const SEARCH: usize = 8192;

const WANTS_VIDEO: u32 = 1 << 2;
const HAS_ADDRESSES: u32 = 1 << 16;
/// Requirement bits that are understood: page-aligned modules (always so) and memory information (always given).
const KNOWN_REQUIREMENTS: u32 = 0b11;

const INFO_MEMORY: u32 = 1 << 0;
const INFO_CMDLINE: u32 = 1 << 2;
const INFO_MODS: u32 = 1 << 3;
const INFO_MMAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;
const MAX_MODULES: usize = 128;

/// The header: its offset in the file and its fields.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    offset: u64,
    flags: u32,
    header_addr: u64,
    load_addr: u64,
    load_end_addr: u64,
    bss_end_addr: u64,
    entry_addr: u64,
}

/// Finds the header: magic, flags and a checksum that makes their sum zero, on a 4-byte boundary.
pub(super) fn find_header(bytes: &[u8]) -> Option<Header> {
    let head = &bytes[..bytes.len().min(SEARCH)];
    let word = |at: usize| le::<4>(head, at) as u32;
    let at = (0..head.len().saturating_sub(11)).step_by(4).find(|&at| {
        word(at) == HEADER_MAGIC && word(at).wrapping_add(word(at + 4)).wrapping_add(word(at + 8)) == 0
    })?;
    let field = |i: usize| u64::from(word(at + 4 * i));
    Some(Header {
        offset: at as u64,
        flags: word(at + 4),
        header_addr: field(3),
        load_addr: field(4),
        load_end_addr: field(5),
        bss_end_addr: field(6),
        entry_addr: field(7),
    })
}

pub(super) fn load<M: GuestMemoryBackend>(mem: &M, request: &Request<'_>) -> Result<Entry, BootError> {
    let kernel = request.kernel;
    let header = find_header(kernel.bytes()).ok_or_else(|| kernel.wrong("no Multiboot header"))?;
    if header.flags & WANTS_VIDEO != 0 {
        return Err(kernel.wrong("a Multiboot kernel that requires a video mode, which is not supported"));
    }
    if header.flags & 0xFFFF & !KNOWN_REQUIREMENTS != 0 {
        return Err(kernel.wrong("a Multiboot kernel that requires an unknown feature"));
    }
    let (entry, end) = if header.flags & HAS_ADDRESSES != 0 {
        load_by_addresses(mem, kernel, &header)?
    } else if elf::is_elf(kernel.bytes()) {
        let elf = Elf::parse(kernel)?;
        (elf.entry, elf.load(mem, kernel)?)
    } else {
        return Err(kernel.wrong("a Multiboot kernel that is neither ELF nor gives load addresses"));
    };
    put_information(mem, request, end)?;
    let gdtr = place::put_gdt(mem, kernel, Mode::Protected32)?;
    let registers = Registers { rax: BOOT_MAGIC, rbx: place::INFO, ..Registers::default() };
    Ok(Entry { registers, ..Entry::protected32(entry, gdtr) })
}

/// The a.out kludge: the header says where its file belongs.
fn load_by_addresses<M: GuestMemoryBackend>(
    mem: &M,
    file: &NamedFile,
    h: &Header,
) -> Result<(u64, u64), BootError> {
    let wrong = || file.wrong("a Multiboot header with contradictory addresses; the kernel is damaged");
    let into = h.header_addr.checked_sub(h.load_addr).ok_or_else(wrong)?;
    let start = h.offset.checked_sub(into).ok_or_else(wrong)?;
    let len = match h.load_end_addr {
        0 => file.bytes().len() as u64 - start,
        end => end.checked_sub(h.load_addr).ok_or_else(wrong)?,
    };
    let bytes = file.slice(start, len, "the kernel's text and data")?;
    let size = h.bss_end_addr.saturating_sub(h.load_addr).max(len);
    place::put_image(mem, file, h.load_addr, bytes, size)?;
    Ok((h.entry_addr, h.load_addr + size))
}

/// Writes the information structure (specification 3.3), memory map, module list and strings.
fn put_information<M: GuestMemoryBackend>(
    mem: &M,
    request: &Request<'_>,
    kernel_end: u64,
) -> Result<(), BootError> {
    let kernel = request.kernel;
    let length = place::put_command_line(mem, request, usize::MAX)?;
    let name_at = place::STRINGS + length + 1;
    place::put(mem, kernel, name_at, b"paravane\0")?;
    let modules = place::put_modules(mem, request, kernel_end)?;
    if modules.len() > MAX_MODULES {
        return Err(kernel.no_room(modules.len() as u64, "in the module list; give fewer modules"));
    }
    let list = module_list(mem, request, &modules, name_at + 9)?;
    place::put(mem, kernel, place::MODULE_LIST, &list)?;
    let map = memory_map(request);
    place::put(mem, kernel, place::MEMORY_MAP, &map)?;

    let flags = INFO_MEMORY | INFO_CMDLINE | INFO_MODS | INFO_MMAP | INFO_LOADER_NAME;
    let upper = request.memory.low_end().saturating_sub(HIGH_MEMORY) / 1024;
    let mut info = [0u32; 29];
    info[0] = flags;
    info[1] = (EBDA / 1024) as u32;
    info[2] = upper as u32;
    info[4] = place::STRINGS as u32;
    info[5] = modules.len() as u32;
    info[6] = place::MODULE_LIST as u32;
    info[11] = map.len() as u32;
    info[12] = place::MEMORY_MAP as u32;
    info[16] = name_at as u32;
    let bytes: Vec<u8> = info.iter().flat_map(|w| w.to_le_bytes()).collect();
    place::put(mem, kernel, place::INFO, &bytes)
}

/// Entries of start, end, string and zero; the strings, the modules' names, go to `strings`.
fn module_list<M: GuestMemoryBackend>(
    mem: &M,
    request: &Request<'_>,
    modules: &[(u64, u64)],
    mut strings: u64,
) -> Result<Vec<u8>, BootError> {
    let mut list = Vec::new();
    for (file, &(at, len)) in place::modules(request).zip(modules) {
        let name = file.name().as_bytes();
        if strings + name.len() as u64 + 1 > place::STRINGS_END {
            return Err(file.no_room(name.len() as u64, "in the area for module names; use shorter paths"));
        }
        place::put(mem, file, strings, name)?;
        place::put(mem, file, strings + name.len() as u64, &[0])?;
        for word in [at, at + len, strings, 0] {
            list.extend_from_slice(&(word as u32).to_le_bytes());
        }
        strings += name.len() as u64 + 1;
    }
    Ok(list)
}

fn memory_map(request: &Request<'_>) -> Vec<u8> {
    let mut map = Vec::new();
    for e in request.memory.entries() {
        map.extend_from_slice(&20u32.to_le_bytes());
        map.extend_from_slice(&e.start.to_le_bytes());
        map.extend_from_slice(&e.len.to_le_bytes());
        map.extend_from_slice(&(e.kind as u32).to_le_bytes());
    }
    map
}

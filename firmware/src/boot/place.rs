//! Where loaders put their own structures, and bounded copies into guest memory.
//!
//! | range             | content                                              |
//! |-------------------|------------------------------------------------------|
//! | 0x05000..0x06000  | stack                                                |
//! | 0x06000..0x07000  | GDT                                                  |
//! | 0x07000..0x08000  | zero page, `hvm_start_info` or Multiboot information |
//! | 0x08000..0x0A000  | memory map and module list                           |
//! | 0x0A000..0x10000  | page tables                                          |
//! | 0x20000..0x30000  | command line and module strings                      |

use super::entry::{self, DescriptorTable, Mode};
use super::{BootError, NamedFile, Request};
use crate::e820::HIGH_MEMORY;
use std::ops::Range;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

pub(super) const STACK_TOP: u64 = 0x6000;
pub(super) const GDT: u64 = 0x6000;
pub(super) const INFO: u64 = 0x7000;
pub(super) const MEMORY_MAP: u64 = 0x8000;
pub(super) const MODULE_LIST: u64 = 0x9000;
pub(super) const PAGE_TABLES: u64 = 0xA000;
pub(super) const STRINGS: u64 = 0x2_0000;
pub(super) const STRINGS_END: u64 = 0x3_0000;

const PAGE: u64 = 4096;
/// What the table above uses.
const RESERVED: [Range<u64>; 2] = [0x5000..0x1_0000, STRINGS..STRINGS_END];

/// Copies `bytes` to `at`; `file` is named if there is no RAM.
pub(super) fn put<M: GuestMemoryBackend>(
    mem: &M,
    file: &NamedFile,
    at: u64,
    bytes: &[u8],
) -> Result<(), BootError> {
    mem.write_slice(bytes, GuestAddress(at)).map_err(|_| {
        file.no_room(bytes.len() as u64, "in guest RAM at the address the image asks for; give more --memory")
    })
}

/// Copies a part of an image to `at` and zero-fills up to `memsz`; refuses what would lie on the loader's structures.
pub(super) fn put_image<M: GuestMemoryBackend>(
    mem: &M,
    file: &NamedFile,
    at: u64,
    bytes: &[u8],
    memsz: u64,
) -> Result<(), BootError> {
    let end = at.saturating_add(memsz);
    if RESERVED.iter().any(|r| at < r.end && r.start < end) {
        return Err(
            file.no_room(memsz, "beside the boot information in low memory; link the kernel above 1 MiB")
        );
    }
    put(mem, file, at, bytes)?;
    zero(mem, file, at.saturating_add(bytes.len() as u64), memsz.saturating_sub(bytes.len() as u64))
}

/// Zero-fills `at..at + len` without allocating more than a page.
fn zero<M: GuestMemoryBackend>(mem: &M, file: &NamedFile, at: u64, len: u64) -> Result<(), BootError> {
    let page = [0u8; PAGE as usize];
    let mut done = 0;
    while done < len {
        let n = (len - done).min(PAGE);
        put(mem, file, at.saturating_add(done), &page[..n as usize])?;
        done += n;
    }
    Ok(())
}

/// Writes the GDT for `mode`.
pub(super) fn put_gdt<M: GuestMemoryBackend>(
    mem: &M,
    file: &NamedFile,
    mode: Mode,
) -> Result<DescriptorTable, BootError> {
    let bytes: Vec<u8> = entry::gdt(mode).iter().flat_map(|d| d.to_le_bytes()).collect();
    put(mem, file, GDT, &bytes)?;
    Ok(DescriptorTable { base: GDT, limit: (bytes.len() - 1) as u16 })
}

/// Writes page tables that map the low 4 GiB to themselves with 2 MiB pages (SDM 3A 4.5); returns CR3.
pub(super) fn put_identity_map<M: GuestMemoryBackend>(mem: &M, file: &NamedFile) -> Result<u64, BootError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let mut words = vec![0u64; 6 * 512];
    words[0] = (PAGE_TABLES + PAGE) | PRESENT_WRITABLE;
    for gib in 0..4u64 {
        words[512 + gib as usize] = (PAGE_TABLES + (2 + gib) * PAGE) | PRESENT_WRITABLE;
    }
    for (i, entry) in words[1024..].iter_mut().enumerate() {
        *entry = (i as u64) << 21 | LARGE | PRESENT_WRITABLE;
    }
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    put(mem, file, PAGE_TABLES, &bytes)?;
    Ok(PAGE_TABLES)
}

/// Writes the command line, NUL-terminated, at [`STRINGS`]; refuses more than `max` bytes. Returns its length.
pub(super) fn put_command_line<M: GuestMemoryBackend>(
    mem: &M,
    request: &Request<'_>,
    max: usize,
) -> Result<u64, BootError> {
    let line = request.cmdline.as_bytes();
    let max = max.min((STRINGS_END - STRINGS) as usize / 2);
    if line.len() > max {
        let file = request.kernel.name().to_string();
        return Err(BootError::CommandLine { file, len: line.len(), max });
    }
    put(mem, request.kernel, STRINGS, line)?;
    put(mem, request.kernel, STRINGS + line.len() as u64, &[0])?;
    Ok(line.len() as u64)
}

/// Copies `file` as high as possible below `limit` and low RAM's end, but not below `floor`; returns its address.
pub(super) fn put_high<M: GuestMemoryBackend>(
    mem: &M,
    request: &Request<'_>,
    file: &NamedFile,
    floor: u64,
    limit: u64,
) -> Result<u64, BootError> {
    let size = file.bytes().len() as u64;
    let top = limit.min(request.memory.low_end()) & !(PAGE - 1);
    let at = top.checked_sub(size).map(|at| at & !(PAGE - 1)).filter(|&at| at >= floor.max(HIGH_MEMORY));
    let at = at.ok_or_else(|| {
        file.no_room(size, "between the kernel and the end of low memory; give more --memory")
    })?;
    put(mem, file, at, file.bytes())?;
    Ok(at)
}

/// Initrd first, then the modules.
pub(super) fn modules<'a>(request: &Request<'a>) -> impl Iterator<Item = &'a NamedFile> {
    request.initrd.into_iter().chain(request.modules)
}

/// Puts all modules high, the first highest; returns their addresses.
pub(super) fn put_modules<M: GuestMemoryBackend>(
    mem: &M,
    request: &Request<'_>,
    floor: u64,
) -> Result<Vec<(u64, u64)>, BootError> {
    let mut limit = u64::from(u32::MAX);
    let mut placed = Vec::new();
    for file in modules(request) {
        let at = put_high(mem, request, file, floor, limit)?;
        placed.push((at, file.bytes().len() as u64));
        limit = at;
    }
    Ok(placed)
}

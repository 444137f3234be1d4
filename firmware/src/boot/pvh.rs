//! The PVH boot protocol (Xen `docs/misc/pvh.pandoc`): an ELF note names a 32-bit entry point that gets
//! `hvm_start_info` in EBX.

use super::elf::Elf;
use super::entry::{Entry, Mode, Registers};
use super::file::le;
use super::{BootError, NamedFile, Request, place};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, GuestMemoryBackend};

const XEN_ELFNOTE_PHYS32_ENTRY: u64 = 18;
const XEN_HVM_START_MAGIC_VALUE: u32 = 0x336E_C578;
const MAX_MODULES: usize = 64;

/// The entry point that the PVH note of an ELF file names.
pub(super) fn entry_point(file: &NamedFile) -> Result<Option<u64>, BootError> {
    let elf = Elf::parse(file)?;
    Ok(elf.notes(file)?.into_iter().find_map(find_note))
}

/// Walks one note segment: name size, descriptor size, type, then both padded to four bytes.
fn find_note(mut notes: &[u8]) -> Option<u64> {
    let padded = |size: u64| size.next_multiple_of(4) as usize;
    while notes.len() >= 12 {
        let (namesz, descsz, kind) = (le::<4>(notes, 0), le::<4>(notes, 4), le::<4>(notes, 8));
        let desc_at = 12 + padded(namesz);
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && notes.get(12..16) == Some(b"Xen\0") && descsz >= 4 {
            return notes.get(desc_at..desc_at + 4).map(|d| le::<4>(d, 0));
        }
        notes = notes.get(desc_at + padded(descsz)..)?;
    }
    None
}

pub(super) fn load<M: GuestMemoryBackend>(mem: &M, request: &Request<'_>) -> Result<Entry, BootError> {
    let kernel = request.kernel;
    let elf = Elf::parse(kernel)?;
    let rip = entry_point(kernel)?.unwrap_or(elf.entry);
    let end = elf.load(mem, kernel)?;
    place::put_command_line(mem, request, usize::MAX)?;
    let modules = place::put_modules(mem, request, end)?;
    if modules.len() > MAX_MODULES {
        return Err(kernel.no_room(modules.len() as u64, "in the module list; give fewer modules"));
    }
    let list: Vec<u8> = modules
        .iter()
        .flat_map(|&(paddr, size)| {
            hvm_modlist_entry { paddr, size, ..Default::default() }.as_slice().to_vec()
        })
        .collect();
    place::put(mem, kernel, place::MODULE_LIST, &list)?;
    let map = request.memory.entries();
    let table: Vec<u8> = map
        .iter()
        .flat_map(|e| {
            hvm_memmap_table_entry { addr: e.start, size: e.len, type_: e.kind as u32, reserved: 0 }
                .as_slice()
                .to_vec()
        })
        .collect();
    place::put(mem, kernel, place::MEMORY_MAP, &table)?;
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        flags: 0,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { place::MODULE_LIST },
        cmdline_paddr: place::STRINGS,
        rsdp_paddr: request.rsdp,
        memmap_paddr: place::MEMORY_MAP,
        memmap_entries: map.len() as u32,
        reserved: 0,
    };
    place::put(mem, kernel, place::INFO, info.as_slice())?;
    let gdtr = place::put_gdt(mem, kernel, Mode::Protected32)?;
    let registers = Registers { rbx: place::INFO, ..Registers::default() };
    Ok(Entry { registers, ..Entry::protected32(rip, gdtr) })
}

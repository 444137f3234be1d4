//! Boot sectors and flat images.

use super::entry::{Entry, Mode};
use super::{BootError, FlatImage, Request, place};
use vm_memory::GuestMemoryBackend;

/// Where a BIOS puts a boot sector.
pub(super) const BOOT_SECTOR_AT: u64 = 0x7C00;

/// One sector or a few that end in the boot signature. Larger files are disk images, which no BIOS loads whole.
pub(super) fn is_boot_sector(bytes: &[u8]) -> bool {
    (512..=0x8000).contains(&bytes.len()) && bytes[510..512] == [0x55, 0xAA]
}

pub(super) fn load<M: GuestMemoryBackend>(
    mem: &M,
    request: &Request<'_>,
    flat: FlatImage,
) -> Result<Entry, BootError> {
    let file = request.kernel;
    if file.bytes().is_empty() {
        return Err(file.unknown_format());
    }
    if flat.mode == Mode::Real16 && flat.at >= 0x10_0000 {
        return Err(file.no_room(
            file.bytes().len() as u64,
            "below 1 MiB, where real mode reaches; choose a lower address",
        ));
    }
    // Real mode needs none of the loader's structures.
    match flat.mode {
        Mode::Real16 => place::put(mem, file, flat.at, file.bytes())?,
        _ => place::put_image(mem, file, flat.at, file.bytes(), file.bytes().len() as u64)?,
    }
    Ok(match flat.mode {
        Mode::Real16 => {
            // DL: the BIOS number of the boot drive.
            let mut entry = Entry::real16(flat.at);
            entry.registers.rdx = 0x80;
            entry
        }
        Mode::Protected32 => Entry::protected32(flat.at, place::put_gdt(mem, file, Mode::Protected32)?),
        Mode::Long64 => {
            let gdtr = place::put_gdt(mem, file, Mode::Long64)?;
            Entry::long64(flat.at, gdtr, place::put_identity_map(mem, file)?)
        }
    })
}

//! Hostile kernels: small images of every format that is loaded, with any bytes changed.

use crate::script::Script;
use paravane_firmware::boot::{FlatImage, LinuxProtocol, Mode, NamedFile, Request, load};
use paravane_firmware::e820::E820;
use paravane_memory::{GuestMemory, MemoryConfig, VmMemory};

const RAM: u64 = 8 << 20;
/// Longer files differ from shorter ones in nothing but time.
const LONGEST: usize = 0x4000;

fn set(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Linux's boot protocol 2.15, 64-bit, relocatable.
fn bzimage() -> Vec<u8> {
    let mut f = vec![0; 0x1400];
    for (at, bytes) in [
        (0x1F1, &[1][..]),
        (0x1F4, &0x100u32.to_le_bytes()),
        (0x1FE, &[0x55, 0xAA, 0xEB, 0x66]),
        (0x202, b"HdrS"),
        (0x206, &0x020Fu16.to_le_bytes()),
        (0x211, &[1]),
        (0x214, &0x10_0000u32.to_le_bytes()),
        (0x22C, &0x7FFF_FFFFu32.to_le_bytes()),
        (0x230, &0x20_0000u32.to_le_bytes()),
        (0x234, &[1]),
        (0x236, &1u16.to_le_bytes()),
        (0x238, &2047u32.to_le_bytes()),
        (0x258, &0x10_0000u64.to_le_bytes()),
        (0x260, &0x20_0000u32.to_le_bytes()),
    ] {
        set(&mut f, at, bytes);
    }
    f
}

/// ELF64 with one segment of 16 bytes at 2 MiB and the PVH note.
fn pvh() -> Vec<u8> {
    let mut f = vec![0; 0x200];
    for (at, bytes) in [
        (0, &[0x7F, b'E', b'L', b'F', 2, 1, 1][..]),
        (16, &[2, 0, 62, 0]),
        (24, &0x20_0000u64.to_le_bytes()),
        (32, &64u64.to_le_bytes()),
        (54, &[56, 0, 2, 0]),
        (0x180, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0, 0, 0, 0x20, 0]),
    ] {
        set(&mut f, at, bytes);
    }
    for (at, kind, offset, paddr, size) in [(64, 1u32, 0x100u64, 0x20_0000u64, 16u64), (120, 4, 0x180, 0, 20)]
    {
        set(&mut f, at, &kind.to_le_bytes());
        for (field, value) in [(8, offset), (24, paddr), (32, size), (40, size)] {
            set(&mut f, at + field, &value.to_le_bytes());
        }
    }
    f
}

/// Multiboot 1 with the address fields, at 1 MiB.
fn multiboot() -> Vec<u8> {
    let mut f = vec![0; 0x100];
    let flags = 0x1_0003u32;
    let checksum = 0u32.wrapping_sub(0x1BAD_B002).wrapping_sub(flags);
    let header = [0x1BAD_B002, flags, checksum, 0x10_0000, 0x10_0000, 0x10_0100, 0x10_0200, 0x10_0040];
    for (i, word) in header.iter().enumerate() {
        set(&mut f, i * 4, &word.to_le_bytes());
    }
    f
}

fn boot_sector() -> Vec<u8> {
    let mut f = vec![0x90; 512];
    set(&mut f, 510, &[0x55, 0xAA]);
    f
}

/// A template, changed by the script.
fn image(s: &mut Script<'_>, template: u8) -> Vec<u8> {
    let mut f = match template & 7 {
        0..3 => bzimage(),
        3 | 4 => pvh(),
        5 => multiboot(),
        6 => boot_sector(),
        _ => return s.rest().to_vec(),
    };
    while let Some(op) = s.next() {
        if op == 0xFF {
            f.resize(usize::from(s.u16()) % LONGEST + 1, op);
            continue;
        }
        // Mostly in the headers.
        let base = if template & 7 < 3 && op & 0x80 == 0 { 0x1F0 } else { 0 };
        let at = base + if op & 0x40 != 0 { usize::from(s.u16()) } else { usize::from(s.u8()) };
        let value = if op & 0x20 != 0 { s.wild() } else { s.number(1 << (op & 3)) };
        let bytes = &value.to_le_bytes()[..1 << (op & 3)];
        if at + bytes.len() <= f.len() {
            set(&mut f, at, bytes);
        }
    }
    f
}

/// Loads an image; the first bytes choose format, protocol, command line and modules.
pub fn run(input: &[u8]) {
    let mut s = Script::new(input);
    let (template, choice, cmdline) = (s.u8(), s.u8(), usize::from(s.u8()));
    let initrd_len = if choice & 1 != 0 { s.wild() } else { 0 };
    let flat = (choice & 0x30 == 0x30)
        .then(|| FlatImage { at: s.wild(), mode: s.of(&[Mode::Real16, Mode::Protected32, Mode::Long64]) });
    let kernel = NamedFile::new("kernel", image(&mut s, template));
    let initrd = NamedFile::new("initrd", vec![0x5A; (initrd_len % (2 * RAM)) as usize]);
    let module = [NamedFile::new("module", vec![0xA5; 5000])];
    let memory = GuestMemory::new(MemoryConfig::pc(RAM)).expect("guest memory");
    let map = E820::pc(RAM, 0);
    let line = "x".repeat(cmdline * 64);
    let request = Request {
        initrd: (choice & 1 != 0).then_some(&initrd),
        modules: if choice & 2 != 0 { &module } else { &[] },
        cmdline: &line,
        protocol: [LinuxProtocol::Auto, LinuxProtocol::Protected32, LinuxProtocol::Long64]
            [usize::from(choice >> 2 & 3) % 3],
        flat,
        ..Request::new(&kernel, &map)
    };
    match load(&VmMemory::new(&memory), &request) {
        Ok(entry) => assert!(entry.cs.base.checked_add(entry.rip).is_some(), "{entry:x?}"),
        // What a user would see: one line.
        Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use paravane_firmware::boot::{Format, detect};

    /// Unchanged, every template is loaded: what the script changes is behind the format's first check.
    #[test]
    fn templates_are_kernels() {
        for (template, format) in
            [(0, Format::BzImage), (3, Format::Pvh), (5, Format::Multiboot), (6, Format::BootSector)]
        {
            let file = NamedFile::new("kernel", image(&mut Script::new(&[]), template));
            assert_eq!(detect(&file).unwrap(), format);
            let memory = GuestMemory::new(MemoryConfig::pc(RAM)).unwrap();
            load(&VmMemory::new(&memory), &Request::new(&file, &E820::pc(RAM, 0))).unwrap();
        }
    }
}

//! Loaders on small made-up images; expected values from the boot protocols' documents.

use super::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

type Memory = GuestMemoryMmap<()>;

const MIB: u64 = 1 << 20;
const LOW_END: u64 = 64 * MIB;

fn memory() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), LOW_END as usize)]).unwrap()
}

fn u32_at(mem: &Memory, at: u64) -> u32 {
    mem.read_obj(GuestAddress(at)).unwrap()
}

fn u64_at(mem: &Memory, at: u64) -> u64 {
    mem.read_obj(GuestAddress(at)).unwrap()
}

fn bytes_at<const N: usize>(mem: &Memory, at: u64) -> [u8; N] {
    let mut bytes = [0; N];
    mem.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

fn set<const N: usize>(image: &mut [u8], at: usize, bytes: [u8; N]) {
    image[at..at + N].copy_from_slice(&bytes);
}

/// A bzImage of protocol 2.15 with one setup sector and a kernel of 0x1000 bytes `0xCC`.
fn bzimage(xloadflags: u16) -> Vec<u8> {
    let mut f = vec![0; 0x400];
    f[0x1F1] = 1;
    set(&mut f, 0x1F4, 0x100u32.to_le_bytes());
    set(&mut f, 0x1FE, [0x55, 0xAA, 0xEB, 0x66]);
    set(&mut f, 0x202, *b"HdrS");
    set(&mut f, 0x206, 0x020Fu16.to_le_bytes());
    f[0x211] = 1;
    set(&mut f, 0x214, 0x10_0000u32.to_le_bytes());
    set(&mut f, 0x22C, 0x7FFF_FFFFu32.to_le_bytes());
    set(&mut f, 0x230, 0x20_0000u32.to_le_bytes());
    f[0x234] = 1;
    set(&mut f, 0x236, xloadflags.to_le_bytes());
    set(&mut f, 0x238, 2047u32.to_le_bytes());
    set(&mut f, 0x258, (16 * MIB).to_le_bytes());
    set(&mut f, 0x260, (8 * MIB as u32).to_le_bytes());
    f.resize(0x400 + 0x1000, 0xCC);
    f
}

/// An ELF64 with one segment of 16 bytes at 2 MiB (32 in memory), and a PVH note if `entry` is given.
fn elf64(entry: Option<u32>) -> Vec<u8> {
    let mut f = vec![0; 0x200];
    set(&mut f, 0, [0x7F, b'E', b'L', b'F', 2, 1, 1]);
    set(&mut f, 16, [2, 0, 62, 0]);
    set(&mut f, 24, 0x1234u64.to_le_bytes());
    set(&mut f, 32, 64u64.to_le_bytes());
    set(&mut f, 54, [56, 0, 2, 0]);
    let mut header = |at: usize, kind: u32, offset: u64, paddr: u64, filesz: u64, memsz: u64| {
        set(&mut f, at, kind.to_le_bytes());
        for (i, v) in [(8, offset), (24, paddr), (32, filesz), (40, memsz)] {
            set(&mut f, at + i, v.to_le_bytes());
        }
    };
    header(64, 1, 0x100, 2 * MIB, 16, 32);
    header(120, 4, 0x180, 0, 0x2C, 0x2C);
    set(&mut f, 0x100, [0xAB; 16]);
    // Another note first: "GNU", type 3, five bytes padded to eight.
    set(&mut f, 0x180, [4, 0, 0, 0, 5, 0, 0, 0, 3, 0, 0, 0, b'G', b'N', b'U', 0]);
    if let Some(entry) = entry {
        set(&mut f, 0x198, [4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0]);
        set(&mut f, 0x1A8, entry.to_le_bytes());
    }
    f
}

/// A Multiboot image whose header gives its own addresses: 0x20 bytes into the file, at 1 MiB.
fn multiboot(flags: u32) -> Vec<u8> {
    let mut f = vec![0x90; 0x100];
    let sum = 0u32.wrapping_sub(0x1BAD_B002).wrapping_sub(flags);
    let words = [0x1BAD_B002, flags, sum, 0x10_0020, 0x10_0000, 0x10_0080, 0x10_0100, 0x10_0040];
    for (i, word) in words.into_iter().enumerate() {
        set(&mut f, 0x20 + 4 * i, word.to_le_bytes());
    }
    f
}

fn file(name: &str, bytes: Vec<u8>) -> NamedFile {
    NamedFile::new(name, bytes)
}

#[test]
fn formats_are_told_apart_by_content() {
    let mut sector = vec![0; 512];
    set(&mut sector, 510, [0x55, 0xAA]);
    for (bytes, want) in [
        (bzimage(1), Format::BzImage),
        (elf64(Some(0x20_0000)), Format::Pvh),
        (multiboot(0x1_0003), Format::Multiboot),
        (sector, Format::BootSector),
    ] {
        assert_eq!(detect(&file("k", bytes)).unwrap(), want);
    }
}

#[test]
fn linux_by_the_64_bit_protocol() {
    let mem = memory();
    let map = E820::pc(LOW_END, 0);
    let (kernel, initrd) = (file("vmlinuz", bzimage(1)), file("initrd", vec![0x77; 5000]));
    let request = Request {
        initrd: Some(&initrd),
        cmdline: "console=ttyS0",
        rsdp: 0xE_0000,
        ..Request::new(&kernel, &map)
    };
    let entry = load(&mem, &request).unwrap();
    assert_eq!((entry.mode, entry.rip), (Mode::Long64, 16 * MIB + 0x200));
    assert_eq!((entry.cs.selector, entry.data.selector), (0x10, 0x18));
    assert_eq!(entry.cs.attributes & 0x6000, 0x2000, "64-bit code");
    assert_eq!(entry.efer, 0x500);
    assert_eq!(bytes_at::<4>(&mem, 16 * MIB), [0xCC; 4]);

    let page = entry.registers.rsi;
    assert_eq!(bytes_at::<4>(&mem, page + 0x202), *b"HdrS");
    assert_eq!(bytes_at::<1>(&mem, page + 0x210), [0xFF], "type_of_loader");
    assert_eq!(u64_at(&mem, page + 0x070), 0xE_0000, "acpi_rsdp_addr");
    let at = u64::from(u32_at(&mem, page + 0x218));
    assert_eq!((at, u32_at(&mem, page + 0x21C)), (LOW_END - 8192, 5000), "ramdisk_image, ramdisk_size");
    assert_eq!(bytes_at::<1>(&mem, at + 4999), [0x77]);
    let line = u64::from(u32_at(&mem, page + 0x228));
    assert_eq!(&bytes_at::<14>(&mem, line), b"console=ttyS0\0");
    assert_eq!(bytes_at::<1>(&mem, page + 0x1E8), [map.entries().len() as u8], "e820_entries");
    assert_eq!((u64_at(&mem, page + 0x2D0), u64_at(&mem, page + 0x2D8)), (0, 0x9_FC00), "e820_table");

    // CR3 -> PML4 -> PDPT -> PD: the last 2 MiB below 4 GiB, mapped to themselves.
    let pdpt = u64_at(&mem, entry.cr3) & !0xFFF;
    let pd = u64_at(&mem, pdpt + 3 * 8) & !0xFFF;
    assert_eq!(u64_at(&mem, pd + 511 * 8), 0xFFE0_0083);
}

#[test]
fn linux_by_the_32_bit_protocol() {
    let mem = memory();
    let map = E820::pc(LOW_END, 0);
    let kernel = file("vmlinuz", bzimage(0));
    let entry = load(&mem, &Request::new(&kernel, &map)).unwrap();
    assert_eq!((entry.mode, entry.rip), (Mode::Protected32, 16 * MIB));
    assert_eq!((entry.cr0 & 0x8000_0001, entry.cr3, entry.efer), (1, 0, 0));
    assert_eq!(u64_at(&mem, entry.gdtr.base + 0x10), 0x00CF_9B00_0000_FFFF);
    let request = Request { protocol: LinuxProtocol::Long64, ..Request::new(&kernel, &map) };
    assert!(matches!(load(&mem, &request), Err(BootError::NoSuchEntry { .. })));
}

#[test]
fn a_kernel_that_cannot_move_is_loaded_at_one_mib() {
    let mem = memory();
    let map = E820::pc(LOW_END, 0);
    let mut image = bzimage(0);
    image[0x234] = 0;
    let kernel = file("vmlinuz", image);
    assert_eq!(load(&mem, &Request::new(&kernel, &map)).unwrap().rip, MIB);
}

#[test]
fn pvh_gets_start_info_and_zeroed_bss() {
    let mem = memory();
    mem.write_slice(&[0xFF; 64], GuestAddress(2 * MIB)).unwrap();
    let map = E820::pc(LOW_END, 0);
    let (kernel, module) = (file("vmlinux", elf64(Some(0x20_0004))), file("m", vec![1; 100]));
    let request = Request { initrd: Some(&module), cmdline: "a b", rsdp: 7, ..Request::new(&kernel, &map) };
    let entry = load(&mem, &request).unwrap();
    assert_eq!((entry.mode, entry.rip), (Mode::Protected32, 0x20_0004));
    assert_eq!(bytes_at::<33>(&mem, 2 * MIB)[15..], [&[0xAB][..], &[0; 16], &[0xFF]].concat()[..]);
    let info = entry.registers.rbx;
    assert_eq!([0, 4, 12].map(|o| u32_at(&mem, info + o)), [0x336E_C578, 1, 1], "magic, version, modules");
    let list = u64_at(&mem, info + 16);
    assert_eq!((u64_at(&mem, list), u64_at(&mem, list + 8)), (LOW_END - 4096, 100));
    assert_eq!(&bytes_at::<4>(&mem, u64_at(&mem, info + 24)), b"a b\0");
    assert_eq!(u64_at(&mem, info + 32), 7);
    let table = u64_at(&mem, info + 40);
    assert_eq!(u32_at(&mem, info + 48), map.entries().len() as u32);
    assert_eq!((u64_at(&mem, table + 8), u32_at(&mem, table + 16)), (0x9_FC00, 1));
}

#[test]
fn multiboot_gets_memory_map_and_modules() {
    let mem = memory();
    let map = E820::pc(LOW_END, 0);
    let kernel = file("kernel", multiboot(0x1_0003));
    let modules = [file("one", vec![1; 10]), file("two", vec![2; 5000])];
    let request = Request { modules: &modules, cmdline: "x", ..Request::new(&kernel, &map) };
    let entry = load(&mem, &request).unwrap();
    assert_eq!((entry.rip, entry.registers.rax), (0x10_0040, 0x2BAD_B002));
    // File offset 0 is load_addr; 0x80 bytes are loaded, the rest up to bss_end is zero.
    assert_eq!(u32_at(&mem, 0x10_0020), 0x1BAD_B002);
    assert_eq!(u32_at(&mem, 0x10_007C), 0x9090_9090);
    assert_eq!(u32_at(&mem, 0x10_0080), 0);
    let info = entry.registers.rbx;
    assert_eq!(u32_at(&mem, info) & 0x4D, 0x4D, "memory, command line, modules, map");
    assert_eq!([4, 8].map(|o| u32_at(&mem, info + o)), [639, 63 * 1024]);
    assert_eq!(u32_at(&mem, info + 20), 2);
    let list = u64::from(u32_at(&mem, info + 24));
    let second = u64::from(u32_at(&mem, list + 16));
    assert_eq!(u64::from(u32_at(&mem, list + 20)) - second, 5000);
    assert_eq!(bytes_at::<2>(&mem, second), [2, 2]);
    assert_eq!(&bytes_at::<4>(&mem, u64::from(u32_at(&mem, list + 24))), b"two\0");
    let mmap = u64::from(u32_at(&mem, info + 48));
    assert_eq!((u32_at(&mem, mmap), u32_at(&mem, mmap + 20)), (20, 1));
}

#[test]
fn flat_images_start_where_they_are_put() {
    let mem = memory();
    let map = E820::pc(LOW_END, 0);
    let image = file("boot.bin", vec![0xF4; 512]);
    let at = |at, mode| Request { flat: Some(FlatImage { at, mode }), ..Request::new(&image, &map) };
    let entry = load(&mem, &at(0x7C00, Mode::Real16)).unwrap();
    assert_eq!((entry.cs.base + entry.rip, entry.registers.rdx), (0x7C00, 0x80));
    assert_eq!(load(&mem, &at(4 * MIB, Mode::Protected32)).unwrap().rip, 4 * MIB);
    assert_eq!(bytes_at::<1>(&mem, 4 * MIB), [0xF4]);
    assert!(load(&mem, &at(2 * MIB, Mode::Real16)).is_err());
    assert!(load(&mem, &at(u64::MAX - 4, Mode::Long64)).is_err());
}

/// The message of a refusal.
fn refusal(kernel: Vec<u8>, change: impl Fn(&mut Request<'_>)) -> String {
    let map = E820::pc(LOW_END, 0);
    let kernel = file("the-file", kernel);
    let mut request = Request::new(&kernel, &map);
    change(&mut request);
    let text = load(&memory(), &request).unwrap_err().to_string();
    assert!(!text.contains('\n'), "{text}");
    text
}

#[test]
fn every_refusal_names_the_file_and_the_reason() {
    let cut = |mut f: Vec<u8>, len| {
        f.truncate(len);
        f
    };
    let mut wild_segment = elf64(Some(0x20_0000));
    set(&mut wild_segment, 64 + 24, (u64::MAX - 8).to_le_bytes());
    let mut endless_bss = elf64(Some(0x20_0000));
    set(&mut endless_bss, 64 + 40, u64::MAX.to_le_bytes());
    let mut low_segment = elf64(Some(0x20_0000));
    set(&mut low_segment, 64 + 24, 0xFFF0u64.to_le_bytes());
    let mut wild_table = elf64(Some(0x20_0000));
    set(&mut wild_table, 32, (u64::MAX - 3).to_le_bytes());
    let mut arm = elf64(None);
    set(&mut arm, 18, [0xB7, 0]);
    let mut zimage = bzimage(1);
    zimage[0x211] = 0;
    for (kernel, want) in [
        (vec![], "empty"),
        (b"hello, world, this is a text".to_vec(), "not a kernel"),
        (vec![0x1F, 0x8B, 8, 0], "compressed"),
        (elf64(None), "without PVH note"),
        (arm, "another processor"),
        (cut(elf64(Some(1)), 100), "truncated"),
        (cut(elf64(Some(1)), 0x1A0), "truncated"),
        (cut(bzimage(1), 0x210), "truncated"),
        (cut(bzimage(1), 0x1300), "truncated"),
        (zimage, "give a bzImage"),
        (wild_segment, "do not fit"),
        (endless_bss, "do not fit"),
        (low_segment, "above 1 MiB"),
        (wild_table, "truncated"),
        (multiboot(0x1_0007), "video"),
    ] {
        let text = refusal(kernel, |_| {});
        assert!(text.starts_with("the-file: ") && text.contains(want), "{want}: {text}");
    }
}

#[test]
fn too_long_command_lines_and_too_large_initrds_are_refused() {
    let line = "x".repeat(2048);
    let text = refusal(bzimage(1), |r| r.cmdline = Box::leak(line.clone().into_boxed_str()));
    assert!(text.contains("2048") && text.contains("2047"), "{text}");
    let big = Box::leak(Box::new(file("big.gz", vec![0; 41 * MIB as usize])));
    let text = refusal(bzimage(1), |r| r.initrd = Some(big));
    assert!(text.starts_with("big.gz: ") && text.contains("--memory"), "{text}");
    let small = Box::leak(Box::new(E820::pc(20 * MIB, 0)));
    let text = refusal(bzimage(1), |r| r.memory = small);
    assert!(text.starts_with("the-file: ") && text.contains("--memory"), "{text}");
}

#[test]
fn files_are_read_with_bounds() {
    let missing = NamedFile::read("/no/such/kernel".as_ref()).unwrap_err();
    assert!(missing.to_string().starts_with("/no/such/kernel: cannot read"), "{missing}");
    assert!(matches!(NamedFile::read("/dev/null".as_ref()), Err(BootError::Empty { .. })));
    assert!(matches!(NamedFile::read("/tmp".as_ref()), Err(BootError::Read { .. })));
}

/// Damaged images are refused or loaded, but never anything worse.
#[test]
fn damaged_images_do_no_harm() {
    let mem = memory();
    let map = E820::pc(LOW_END, 0);
    let mut state = 0x1234_5678_9ABC_DEF1u64;
    for base in [bzimage(1), elf64(Some(0x20_0000)), multiboot(0x1_0003)] {
        for _ in 0..500 {
            let mut image = base.clone();
            for _ in 0..4 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                let at = state as usize % image.len().min(0x280);
                image[at] = (state >> 32) as u8;
            }
            let kernel = file("damaged", image);
            let _ = load(&mem, &Request::new(&kernel, &map));
        }
    }
}

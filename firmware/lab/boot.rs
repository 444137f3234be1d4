//! From the PVH entry point to 64-bit Rust, and what the loader tells (Xen `docs/misc/pvh.pandoc`).
//!
//! Safety: the loader's structures lie below 4 GiB, which the stub maps to itself, and are read once, before anything else
//! uses that memory.

use crate::cell::Fixed;
use core::arch::global_asm;

// 32-bit entry, paging off, EBX = hvm_start_info. Builds identity page tables of 2 MiB pages for 4 GiB, enables SSE, enters
// long mode.
global_asm!(
    r#"
    .section .note.pvh, "a", @note
    .align 4
    .long 4, 4, 18
    .asciz "Xen"
    .long lab_start

    .section .text.start, "ax"
    .code32
    .global lab_start
lab_start:
    cld
    cli
    mov esp, offset lab_stack_end
    mov edi, ebx

    mov eax, offset lab_tables
    lea ecx, [eax + 0x1003]
    mov [eax], ecx
    lea edx, [eax + 0x1000]
    lea ecx, [eax + 0x2003]
    mov ebx, 4
2:  mov [edx], ecx
    add edx, 8
    add ecx, 0x1000
    dec ebx
    jnz 2b
    lea edx, [eax + 0x2000]
    mov ecx, 0x83
    mov ebx, 2048
3:  mov [edx], ecx
    add edx, 8
    add ecx, 0x200000
    dec ebx
    jnz 3b

    mov cr3, eax
    mov eax, cr4
    or eax, 0x620
    mov cr4, eax
    mov ecx, 0xC0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    and eax, 0x9FFFFFF3
    or eax, 0x80000003
    mov cr0, eax
    lgdt [lab_gdtr]
    .byte 0xEA
    .long lab_long
    .word 8

    .code64
lab_long:
    mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov fs, eax
    mov gs, eax
    mov edi, edi
    lea rsp, [lab_stack_end]
    xor ebp, ebp
    fninit
    call lab_main
    ud2

    .section .rodata.gdt, "a"
    .align 8
lab_gdt:
    .quad 0
    .quad 0x00AF9B000000FFFF
    .quad 0x00CF93000000FFFF
lab_gdtr:
    .word 23
    .long lab_gdt

    .section .bss.start, "aw", @nobits
    .align 4096
lab_tables:
    .skip 6 * 4096
    .skip 65536
lab_stack_end:
    "#
);

unsafe extern "C" {
    static lab_end: u8;
}

const CMDLINE_MAX: usize = 32 << 10;
static CMDLINE: Fixed<[u8; CMDLINE_MAX]> = Fixed::new([0; CMDLINE_MAX]);

/// Data lives above this, away from the image and the loader's structures.
const ARENA_FLOOR: u64 = 16 << 20;
/// More data than this is handled in portions.
const ARENA_MAX: u64 = 16 << 20;
const RAM: u32 = 1;

#[repr(C)]
struct HvmStartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    nr_modules: u32,
    modlist_paddr: u64,
    cmdline_paddr: u64,
    rsdp_paddr: u64,
    memmap_paddr: u64,
    memmap_entries: u32,
    reserved: u32,
}

#[repr(C)]
struct MemoryRange {
    start: u64,
    len: u64,
    kind: u32,
    reserved: u32,
}

/// What of the loader's information is used.
pub struct StartInfo {
    cmdline_len: usize,
    arena: (u64, u64),
}

impl StartInfo {
    /// Copies what is needed, so that the loader's memory is free afterwards.
    pub fn read(at: u64) -> StartInfo {
        // SAFETY: the boot protocol: a valid structure below 4 GiB.
        let info = unsafe { (at as *const HvmStartInfo).read_unaligned() };
        let cmdline_len = copy_string(info.cmdline_paddr);
        let mut arena = (ARENA_FLOOR, 0);
        if info.version >= 1 {
            for i in 0..u64::from(info.memmap_entries) {
                let entry = (info.memmap_paddr + i * size_of::<MemoryRange>() as u64) as *const MemoryRange;
                // SAFETY: as above.
                let range = unsafe { entry.read_unaligned() };
                arena = larger(arena, &range);
            }
        }
        StartInfo { cmdline_len, arena }
    }

    pub fn cmdline(&self) -> &'static str {
        // SAFETY: written by `read` alone.
        let bytes: &'static [u8] = unsafe { &*CMDLINE.get() };
        core::str::from_utf8(&bytes[..self.cmdline_len]).unwrap_or("")
    }

    pub fn arena_start(&self) -> u64 {
        self.arena.0
    }

    pub fn arena_len(&self) -> u64 {
        self.arena.1
    }
}

/// The larger of `arena` and what `range` offers above the floor and below 4 GiB.
fn larger(arena: (u64, u64), range: &MemoryRange) -> (u64, u64) {
    let image_end = (&raw const lab_end) as u64;
    let start = range.start.max(ARENA_FLOOR).max(image_end).next_multiple_of(4096);
    let end = range.start.saturating_add(range.len).min(1 << 32);
    let len = end.saturating_sub(start).min(ARENA_MAX);
    if range.kind == RAM && len > arena.1 { (start, len) } else { arena }
}

fn copy_string(at: u64) -> usize {
    let mut len = 0;
    while at != 0 && len < CMDLINE_MAX {
        // SAFETY: a NUL-terminated string below 4 GiB; the buffer's end is checked.
        unsafe {
            let byte = ((at + len as u64) as *const u8).read_volatile();
            if byte == 0 {
                break;
            }
            (*CMDLINE.get())[len] = byte;
        }
        len += 1;
    }
    len
}

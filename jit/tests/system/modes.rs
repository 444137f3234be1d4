//! Mode switches (SDM 3A, 9.8 and 9.9).

use crate::bed::{DATA, Start, both};
use paravane_cpu::{efer, gpr};

#[test]
fn real_to_long_and_back() {
    both(Start::Real, |bed| {
        let tour = program!(16:
            "cli",
            // GDTR and IDTR
            "lgdt [0x9F00]",
            "mov eax, cr0",
            "or al, 1",
            "mov cr0, eax",
            ".byte 0xEA", ".word 2f - 770b + 0x9000", ".word 0x08",
            ".code32",
            "2: mov eax, 0x18",
            "mov ds, eax", "mov es, eax", "mov ss, eax",
            "mov esp, 0x70000",
            "mov dword ptr [0x200000], 0x11111111",
            // PAE paging
            "mov eax, 0x620", "mov cr4, eax",
            "mov eax, 0x2F000", "mov cr3, eax",
            "mov eax, cr0", "or eax, 0x80000000", "mov cr0, eax",
            "jmp 3f",
            "3: mov dword ptr [0x200004], 0x22222222",
            // off, long mode on
            "mov eax, cr0", "and eax, 0x7FFFFFFF", "mov cr0, eax",
            "mov eax, 0x30000", "mov cr3, eax",
            "mov ecx, 0xC0000080", "rdmsr", "or eax, 0x900", "wrmsr",
            "mov eax, cr0", "or eax, 0x80000000", "mov cr0, eax",
            // compatibility mode now
            "mov dword ptr [0x200008], 0x33333333",
            "rdmsr", "mov ebx, eax",
            ".byte 0xEA", ".long 4f - 770b + 0x9000", ".word 0x10",
            ".code64",
            "4: mov rax, 0x4444444444444444",
            "mov [0x200010], rax",
            "mov ecx, 100",
            "41: add r9, rcx", "dec ecx", "jnz 41b",
            "mov [0x200018], r9",
            // to compatibility mode by RETF
            "push 0x08", "lea rax, [rip + 5f]", "push rax", "retfq",
            ".code32",
            "5: mov dword ptr [0x200020], 0x55555555",
            "mov ecx, 100",
            "51: add esi, ecx", ".byte 0x49", "jnz 51b", // DEC ECX, not a REX prefix
            "mov [0x200024], esi",
            // leave long mode
            "mov eax, cr0", "and eax, 0x7FFFFFFF", "mov cr0, eax",
            "mov ecx, 0xC0000080", "rdmsr", "mov edi, eax", "and eax, 0xFFFFFEFF", "wrmsr",
            // real mode
            ".byte 0xEA", ".long 6f - 770b + 0x9000", ".word 0x38",
            ".code16",
            "6: mov eax, 0x40", "mov ds, ax", "mov es, ax", "mov ss, ax",
            "mov eax, cr0", "and al, 0xFE", "mov cr0, eax",
            ".byte 0xEA", ".word 7f - 770b + 0x9000", ".word 0",
            "7: xor ax, ax", "mov ds, ax", "mov ss, ax", "mov sp, 0x7000",
            "mov ax, 0x2000", "mov es, ax",
            "mov word ptr es:[0x10], 0x6666",
            "int 0x21"
        );
        bed.put16(0x9F00, 0xFFF);
        bed.put32(0x9F02, 0x1000);
        // Descriptors are of the protected-mode kind: written by the bed for the GDT in any mode.
        bed.run(&tour);
        assert_eq!(bed.taken().vector, 0x21);
        assert_eq!([0, 4, 8].map(|i| bed.get32(DATA + i)), [0x1111_1111, 0x2222_2222, 0x3333_3333]);
        assert_eq!(bed.get64(DATA + 0x10), 0x4444_4444_4444_4444);
        assert_eq!(bed.get64(DATA + 0x18), 5050);
        assert_eq!((bed.get32(DATA + 0x20), bed.get32(DATA + 0x24)), (0x5555_5555, 5050));
        assert_eq!(bed.get16(0x2_0010), 0x6666);
        assert_eq!(bed.cpu.gpr[gpr::RBX] & (efer::LMA | efer::LME), efer::LMA | efer::LME);
        assert_eq!(bed.cpu.gpr[gpr::RDI] & (efer::LMA | efer::LME), efer::LME);
        assert_eq!((bed.cpu.efer, bed.cpu.cr0 & 0x8000_0001), (efer::NXE, 0));
    });
}

#[test]
fn what_mode_bits_refuse() {
    both(Start::Long, |bed| {
        // Clearing PAE in long mode; PG from 64-bit code; LME while paging.
        bed.faults(&program!(64: "mov rax, cr4", "and al, 0xDF"; "mov cr4, rax"), 13, 0);
        bed.faults(&program!(64: "mov rax, cr0", "btr rax, 31"; "mov cr0, rax"), 13, 0);
        bed.faults(&program!(64: "mov ecx, 0xC0000080", "rdmsr", "and ah, 0xFE"; "wrmsr"), 13, 0);
        // CD clear with NW set
        bed.faults(&program!(64: "mov rax, cr0", "btr rax, 30", "bts rax, 29"; "mov cr0, rax"), 13, 0);
    });
    both(Start::Protected, |bed| {
        // Long mode without PAE.
        bed.cpu.efer = efer::LME;
        bed.faults(&program!(32: "mov eax, cr0", "bts eax, 31"; "mov cr0, eax"), 13, 0);
    });
}

#[test]
fn real_mode_wraps_and_limits() {
    both(Start::Real, |bed| {
        // The segment limit is FFFFH: a word at FFFFH raises #GP, on the stack #SS.
        bed.faults(&program!(16: "mov bx, 0xFFFF"; "mov ax, [bx]"), 13, None);
        bed.faults(&program!(16: "mov bp, 0xFFFF"; "mov ax, [bp]"), 12, None);
        // IP wraps through a 16-bit jump; offsets wrap at 64 KiB.
        bed.put16(0x1234, 0xABCD);
        bed.finish(&program!(16: "mov bx, 0xFFF0", "mov si, 0x1244", "mov ax, [bx + si]"));
        assert_eq!(bed.cpu.gpr[gpr::RAX] & 0xFFFF, 0xABCD);
        bed.reset();
        bed.run(
            &program!(16: "mov ax, 0x9000", "mov ss, ax", "xor sp, sp", "push ax", "mov bx, sp", "int 0x30"),
        );
        assert_eq!(bed.cpu.gpr[gpr::RBX] & 0xFFFF, 0xFFFE);
    });
}

#[test]
fn unreal_mode_keeps_limits() {
    both(Start::Real, |bed| {
        bed.put16(0x9F00, 0xFFF);
        bed.put32(0x9F02, 0x1000);
        bed.put32(DATA, 0xCAFE_F00D);
        bed.finish(
            &program!(16: "lgdt [0x9F00]", "mov eax, cr0", "or al, 1", "mov cr0, eax", "mov bx, 0x18",
            "mov fs, bx", "and al, 0xFE", "mov cr0, eax", "mov ebx, 0x200000", "mov edx, fs:[ebx]"),
        );
        assert_eq!(bed.cpu.gpr[gpr::RDX], 0xCAFE_F00D);
    });
}

#[test]
fn address_size_prefixes() {
    both(Start::Long, |bed| {
        bed.put64(DATA, 77);
        bed.finish(&program!(64: "mov rsi, 0xFFFFFFFF00200000", "mov rax, [esi]",
            "mov rbx, 0x1FFFFFFFF", "lea rdx, [ebx + 2]", "mov rcx, 0xFFFFFFFF00000003", "2: inc edi", "addr32 loop 2b"));
        assert_eq!(bed.cpu.gpr[gpr::RAX], 77);
        assert_eq!(bed.cpu.gpr[gpr::RDX], 1);
        assert_eq!((bed.cpu.gpr[gpr::RCX], bed.cpu.gpr[gpr::RDI]), (0, 3));
    });
    both(Start::Pae, |bed| {
        bed.put32(0x1234, 99);
        bed.finish(&program!(32: "mov ebx, 0xAAAA1230", "mov eax, [bx + 4]", "mov ecx, 0x70002", "2: inc edi", "addr16 loop 2b"));
        assert_eq!(bed.cpu.gpr[gpr::RAX], 99);
        assert_eq!((bed.cpu.gpr[gpr::RCX], bed.cpu.gpr[gpr::RDI]), (0x7_0000, 2));
    });
}

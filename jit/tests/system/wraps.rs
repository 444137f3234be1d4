//! The top of the first megabyte: A20, wrap-around, big real mode (SDM 3A, 9.1.4 and 20.1.1; 3B, 22.33).

use crate::bed::{DATA, GDT, Start, both, pte, sel};
use paravane_cpu::{flags, gpr};

#[test]
fn the_a20_gate_in_real_mode() {
    both(Start::Real, |bed| {
        let p = program!(16: "mov ax, 0xFFFF", "mov es, ax", "mov word ptr es:[0x510], 0xBEEF", "mov cx, 3", "2: inc byte ptr es:[0x510]", "loop 2b");
        for (open, at, other) in [(true, 0x10_0500u64, 0x500u64), (false, 0x500, 0x10_0500)] {
            bed.reset();
            bed.cpu.a20 = open;
            bed.put32(0x500, 0);
            bed.put32(0x10_0500, 0);
            bed.finish(&p);
            assert_eq!((bed.get16(at), bed.get16(other)), (0xBEF2, 0), "A20 {open}");
        }
        // Code runs there too.
        for (open, at) in [(true, 0x10_0600u64), (false, 0x600)] {
            bed.reset();
            bed.cpu.a20 = open;
            bed.put(0x600, &[0xB8, 1, 0, 0xF4]);
            bed.put(0x10_0600, &[0xB8, 2, 0, 0xF4]);
            bed.load(&program!(16: ".byte 0xEA", ".word 0x610", ".word 0xFFFF"));
            bed.go();
            assert_eq!(bed.cpu.gpr[gpr::RAX], if at == 0x600 { 1 } else { 2 });
        }
    });
}

/// The gate masks physical addresses: under paging, those of pages and of tables.
#[test]
fn the_a20_gate_under_paging() {
    both(Start::Pae, |bed| {
        bed.map(0x30_0000, 0x10_0000 + 0x5000, pte::ALL);
        bed.put32(0x10_5000, 0x1111);
        bed.put32(0x5000, 0x2222);
        // The code itself lies above 1 MiB: a copy where the gate leads it.
        let p = program!(32: "mov eax, [0x300000]", "hlt");
        bed.load(&p);
        bed.map(0x20_0000 - 0x1000, 0x8000, pte::ALL);
        bed.put(0x8000, p.bytes);
        bed.cpu.rip = 0x1F_F000;
        for (open, value) in [(true, 0x1111), (false, 0x2222), (true, 0x1111)] {
            bed.cpu.rip = 0x1F_F000;
            bed.cpu.a20 = open;
            bed.flush();
            bed.go();
            assert_eq!(bed.cpu.gpr[gpr::RAX], value);
        }
    });
}

#[test]
fn offsets_in_real_mode() {
    both(Start::Real, |bed| {
        // Sixteen-bit sums wrap; 32-bit addresses beyond the limit fault; instruction fetch at the limit, too.
        bed.put16(0x5678, 0x1357);
        bed.finish(&program!(16: "mov bx, 0xFFFF", "mov si, 0x5679", "mov ax, [bx + si]", "mov ebx, 0x5678", "mov cx, [ebx]"));
        assert_eq!((bed.cpu.gpr[gpr::RAX] & 0xFFFF, bed.cpu.gpr[gpr::RCX] & 0xFFFF), (0x1357, 0x1357));
        bed.reset();
        bed.faults(&program!(16: "mov ebx, 0x10000"; "mov al, [ebx]"), 13, None);
        bed.faults(&program!(16: "mov esp, 0x17000"; "mov eax, [esp]"), 12, None);
        bed.faults(&program!(16: "nop"; ".byte 0x66, 0xE9", ".long 0x10000"), 13, None);
        // A string that runs over the end of its segment.
        bed.faults(&program!(16: "mov di, 0xFFFF"; "stosw"), 13, None);
        // IP does not wrap within an instruction: the last byte of the segment is the last one fetched.
        bed.put(0x9_0000 + 0xFFFE, &[0x90, 0xB0]);
        bed.put(0x1000, &[0xF4]);
        bed.reset();
        bed.load(&program!(16: ".byte 0xEA", ".word 0xFFFE", ".word 0x9000"));
        bed.go();
        assert_eq!((bed.taken().vector, bed.taken().rip, bed.taken().cs), (13, 0xFFFF, 0x9000));
    });
}

/// Limits and the B flag survive in real mode until they are loaded in protected mode again.
#[test]
fn big_real_mode() {
    both(Start::Real, |bed| {
        bed.put16(0x9F00, 0xFFF);
        bed.put32(0x9F02, GDT as u32);
        bed.put32(DATA, 0x600D);
        let p = program!(16: "lgdt [0x9F00]", "mov eax, cr0", "or al, 1", "mov cr0, eax", "mov bx, 0x18", "mov ds, bx", "and al, 0xFE", "mov cr0, eax",
            // A new selector changes the base only.
            "mov ax, 0x10", "mov ds, ax", "mov ebx, 0x1FFF00", "mov ecx, [ebx]", "mov dword ptr [ebx + 4], 0x77", "mov edx, [ebx + 4]",
            "mov edi, 0x200000"; "mov dword ptr es:[edi], 1");
        // ES was not loaded: its limit is FFFFH still.
        bed.faults(&p, 13, None);
        assert_eq!((bed.cpu.gpr[gpr::RCX], bed.cpu.gpr[gpr::RDX], bed.get32(DATA + 4)), (0x600D, 0x77, 0x77));
        // A small limit survives as well.
        bed.gdt(sel::FREE, 0x0000_9300_0000_00FF);
        bed.reset();
        bed.faults(&program!(16: "lgdt [0x9F00]", "mov eax, cr0", "or al, 1", "mov cr0, eax", "mov bx, 0x58", "mov ds, bx", "and al, 0xFE", "mov cr0, eax",
            "xor ax, ax", "mov ds, ax", "mov cl, [0xFF]"; "mov cl, [0x100]"), 13, None);
    });
}

/// The flags image in real mode: IOPL and NT can be written, bits 15, 5 and 3 stay zero, bit 1 one.
#[test]
fn flags_in_real_mode() {
    both(Start::Real, |bed| {
        bed.cpu.rflags &= !flags::TF;
        bed.finish(
            &program!(16: "push 0xFEFF", "popf", "pushf", "pop ax", "push 0", "popf", "pushf", "pop bx"),
        );
        assert_eq!((bed.cpu.gpr[gpr::RAX] & 0xFFFF, bed.cpu.gpr[gpr::RBX] & 0xFFFF), (0x7ED7, 2));
    });
}

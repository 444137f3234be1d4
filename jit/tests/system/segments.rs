//! Limits, types and null selectors (SDM 3A, 5.3 to 5.5).

use crate::bed::{Bed, CODE, DATA, GDT, Start, both, pf, pte, sel};
use paravane_cpu::{SegReg, Segment, gpr};

/// A descriptor: base, limit in its granularity, and the attributes of bits 40–47 and 52–55 as in `Segment`.
pub fn descriptor(base: u64, limit: u64, attributes: u64) -> u64 {
    (limit & 0xFFFF)
        | (base & 0xFF_FFFF) << 16
        | (attributes & 0xFF) << 40
        | (limit >> 16 & 0xF) << 48
        | (attributes >> 12 & 0xF) << 52
        | (base >> 24 & 0xFF) << 56
}

#[test]
fn limits_of_data_segments() {
    for start in [Start::Protected, Start::Pae, Start::Compat] {
        both(start, |bed| {
            bed.gdt(sel::FREE, descriptor(DATA, 0xFFF, 0x4093));
            bed.put32(DATA + 0xFFC, 0x1234_5678);
            bed.finish(&program!(32: "mov eax, 0x58", "mov fs, eax", "mov ecx, 10", "2: mov eax, fs:[0xFFC]", "dec ecx", "jnz 2b"));
            assert_eq!(bed.cpu.gpr[gpr::RAX], 0x1234_5678);
            bed.reset();
            bed.faults(
                &program!(32: "mov eax, 0x58", "mov fs, eax", "mov bl, fs:[0xFFF]"; "mov ebx, fs:[0xFFD]"),
                13,
                0,
            );
            bed.faults(&program!(32: "mov eax, 0x58", "mov ds, eax"; "mov [0x1000], al"), 13, 0);
            bed.faults(&program!(32: "mov eax, 0x58", "mov ds, eax"; "movups xmm0, [0xFF8]"), 13, 0);
            bed.faults(
                &program!(32: "mov eax, 0x58", "mov es, eax", "mov edi, 0xFFC", "stosd"; "stosd"),
                13,
                0,
            );
            bed.faults(
                &program!(32: "mov eax, 0x58", "mov fs, eax", "mov ebp, 0x1000"; "mov eax, fs:[ebp]"),
                13,
                0,
            );
            bed.faults(&program!(32: "mov eax, 0x58", "mov gs, eax"; "mov eax, gs:[0xFFFFFFFD]"), 13, 0);
        });
    }
}

#[test]
fn stack_segments_raise_ss() {
    both(Start::Protected, |bed| {
        bed.gdt(sel::FREE, descriptor(DATA, 0xFFF, 0x4093));
        bed.faults(&program!(32: "mov eax, 0x58", "mov ss, eax", "mov esp, 0x1000", "push eax", "pop eax", "mov ebp, 0x1000"; "mov eax, [ebp]"), 12, 0);
        bed.faults(
            &program!(32: "mov eax, 0x58", "mov ss, eax", "mov esp, 0x800"; "mov eax, [esp + 0x800]"),
            12,
            0,
        );
    });
}

#[test]
fn expand_down_segments() {
    both(Start::Protected, |bed| {
        // Offsets 1000H to FFFF_FFFFH are inside; byte granularity with B set.
        bed.gdt(sel::FREE, descriptor(DATA, 0xFFF, 0x4097));
        bed.put32(DATA + 0x1000, 0x77);
        bed.finish(&program!(32: "mov eax, 0x58", "mov fs, eax", "mov ebx, fs:[0x1000]"));
        assert_eq!(bed.cpu.gpr[gpr::RBX], 0x77);
        bed.reset();
        bed.faults(&program!(32: "mov eax, 0x58", "mov fs, eax"; "mov ebx, fs:[0xFFF]"), 13, 0);
        bed.faults(&program!(32: "mov eax, 0x58", "mov fs, eax"; "mov ebx, fs:[0]"), 13, 0);
        // B clear: the upper bound is FFFFH.
        bed.gdt(sel::FREE, descriptor(DATA, 0xFFF, 0x0097));
        bed.faults(
            &program!(32: "mov eax, 0x58", "mov fs, eax", "mov ebx, fs:[0xFFFC]"; "mov ebx, fs:[0xFFFD]"),
            13,
            0,
        );
        // A flat-looking expand-down segment holds nothing below its limit.
        bed.gdt(sel::FREE, descriptor(0, 0xF_FFFF, 0xC097));
        bed.faults(&program!(32: "mov eax, 0x58", "mov ds, eax"; "mov ebx, [0x200000]"), 13, 0);
    });
}

#[test]
fn types_of_segments() {
    for start in [Start::Protected, Start::Compat] {
        both(start, |bed| {
            bed.gdt(sel::FREE, descriptor(0, 0xF_FFFF, 0xC091)); // read-only
            bed.faults(
                &program!(32: "mov eax, 0x58", "mov ds, eax", "mov ebx, [0x200000]"; "mov [0x200000], ebx"),
                13,
                0,
            );
            bed.faults(&program!(32: "mov eax, 0x58", "mov ds, eax"; "add dword ptr [0x200000], 0"), 13, 0);
            bed.faults(&program!(32: "mov eax, 0x58"; "mov ss, eax"), 13, 0x58);
            bed.gdt(sel::FREE, descriptor(0, 0xF_FFFF, 0xC099)); // execute-only
            bed.faults(&program!(32: "mov eax, 0x58"; "mov ds, eax"), 13, 0x58);
            bed.faults(&program!(32: "mov ebx, cs:[0x200000]"; "mov cs:[0x200000], ebx"), 13, 0);
            bed.faults(&program!(32: "nop"; "inc dword ptr cs:[0x200000]"), 13, 0);
        });
    }
    both(Start::Protected, |bed| {
        // Execute-only code cannot be read.
        bed.cpu.seg[SegReg::Cs as usize].attributes = 0xC099;
        bed.faults(&program!(32: "nop"; "mov ebx, cs:[0x200000]"), 13, 0);
    });
}

#[test]
fn null_selectors() {
    for start in [Start::Protected, Start::Compat] {
        both(start, |bed| {
            bed.faults(&program!(32: "xor eax, eax", "mov ds, eax"; "mov ebx, [0x200000]"), 13, 0);
            bed.faults(&program!(32: "mov eax, 3", "mov es, eax", "mov edi, 0x200000"; "stosb"), 13, 0);
            bed.faults(&program!(32: "xor eax, eax", "mov gs, eax"; "mov gs:[0x200000], eax"), 13, 0);
            bed.reset();
            bed.finish(&program!(32: "xor eax, eax", "mov fs, eax", "mov ecx, 3", "2: mov ebx, [0x200000]", "lea edx, fs:[4]", "dec ecx", "jnz 2b"));
        });
    }
    both(Start::Long, |bed| {
        // In 64-bit mode null selectors do not matter; FS and GS bases do.
        bed.put64(DATA + 0x10, 0xABCD);
        bed.finish(&program!(64: "xor eax, eax", "mov ds, eax", "mov es, eax", "mov ss, eax", "mov ecx, 0xC0000100", "mov eax, 0x200000", "xor edx, edx", "wrmsr",
            "mov rbx, fs:[0x10]", "mov rsi, 0x200000", "mov rdi, [rsi + 0x10]"));
        assert_eq!((bed.cpu.gpr[gpr::RBX], bed.cpu.gpr[gpr::RDI]), (0xABCD, 0xABCD));
    });
}

#[test]
fn code_segment_limit() {
    both(Start::Protected, |bed| {
        // A code segment that ends within a program: fetching beyond raises #GP(0).
        bed.gdt(sel::FREE, descriptor(CODE, 0x10, 0x409B));
        bed.put(CODE + 0xF, &[0x90, 0x90, 0x90, 0xF4]);
        bed.put(CODE + 0x800, program!(32: ".byte 0xEA", ".long 0xF", ".word 0x58").bytes);
        bed.cpu.rip = CODE + 0x800;
        bed.go();
        let t = bed.taken();
        assert_eq!((t.vector, t.error, t.rip, t.cs), (13, Some(0), 0x11, 0x58));
        // The branch itself checks its target.
        bed.reset();
        bed.put(CODE, program!(32: ".byte 0xEB, 0x40").bytes);
        bed.put(CODE + 0x800, program!(32: ".byte 0xEA", ".long 0", ".word 0x58").bytes);
        bed.cpu.rip = CODE + 0x800;
        bed.go();
        let t = bed.taken();
        assert_eq!((t.vector, t.error, t.rip), (13, Some(0), 0));
        // So does a far jump.
        bed.reset();
        bed.put(CODE + 0x800, program!(32: ".byte 0xEA", ".long 0x11", ".word 0x58").bytes);
        bed.cpu.rip = CODE + 0x800;
        bed.go();
        let t = bed.taken();
        assert_eq!((t.vector, t.error, t.rip, t.cs), (13, Some(0), CODE + 0x800, 8));
    });
}

#[test]
fn non_zero_bases() {
    both(Start::Pae, |bed| {
        bed.gdt(sel::FREE, descriptor(0x10_0000, 0xF_FFFF, 0xC093));
        bed.put32(DATA + 4, 41);
        bed.finish(&program!(32: "mov eax, 0x58", "mov ds, eax", "mov ecx, 50", "2: inc dword ptr [0x100004]", "dec ecx", "jnz 2b", "mov ebx, ss:[0x200004]"));
        assert_eq!(bed.cpu.gpr[gpr::RBX], 91);
        // base + offset wraps at 4 GiB
        bed.reset();
        bed.finish(&program!(32: "mov eax, 0x58", "mov gs, eax", "mov esi, 0xFFF00000", "mov ebx, gs:[esi + 0x200004]"));
        assert_eq!(bed.cpu.gpr[gpr::RBX], 91);
    });
}

#[test]
fn accessed_bits_of_descriptors() {
    both(Start::Protected, |bed| {
        bed.gdt(sel::FREE, descriptor(0, 0xF_FFFF, 0xC092));
        bed.finish(&program!(32: "mov eax, 0x58", "mov es, eax"));
        assert_eq!(bed.get64(GDT + 0x58) >> 40 & 0xFF, 0x93);
    });
}

#[test]
fn sixteen_bit_code_and_stacks() {
    both(Start::Protected, |bed| {
        // SP wraps in 64 KiB while the upper half of ESP stays.
        bed.finish(&program!(32: "mov eax, 0x40", "mov ss, eax", "mov esp, 0x56780002", "push ax", "push ax", "mov ebx, esp", "pop ax"));
        assert_eq!(bed.cpu.gpr[gpr::RBX], 0x5678_FFFE);
        bed.reset();
        bed.put(0x9000, program!(16: "mov eax, 0x12345678", "mov ecx, 5", "2: inc si", "loop 2b").bytes);
        bed.load(&program!(32: ".byte 0xEA", ".long 0x9000", ".word 0x38"));
        bed.go();
        assert_eq!(
            (bed.cpu.gpr[gpr::RAX], bed.cpu.gpr[gpr::RSI], bed.cpu.rip & 0xF000),
            (0x1234_5678, 5, 0x9000)
        );
    });
}

#[test]
fn segment_changes_reach_translated_code() {
    both(Start::Protected, |bed| {
        // The same code with flat and with limited DS, in turns.
        bed.gdt(sel::FREE, descriptor(0, 0x1FF, 0xC093)); // 2 MiB: ends below DATA + 4
        bed.gdt(sel::FREE + 8, descriptor(DATA, 0xFFF, 0x4093));
        bed.put32(DATA + 0x800, 5);
        bed.put32(0x800, 0);
        let p = program!(32: "mov edi, 30", "mov esi, 0x18", "2: mov ds, esi", "mov ecx, 3", "3: add eax, [0x800]", "dec ecx", "jnz 3b",
            "xor esi, 0x78", "dec edi", "jnz 2b", "mov eax, eax"; "nop");
        bed.finish(&p);
        assert_eq!(bed.cpu.gpr[gpr::RAX], 15 * 3 * 5, "every second round reads through the segment at DATA");
        bed.reset();
        bed.faults(&program!(32: "mov ebx, [0x200000]", "mov esi, 0x58", "mov ds, esi", "mov ebx, [0x1FFFFC]"; "mov ebx, [0x1FFFFD]"), 13, 0);
    });
}

#[test]
fn lar_lsl_verr_verw() {
    for start in [Start::Protected, Start::Long] {
        both(start, |bed| {
            bed.gdt(sel::FREE, descriptor(0, 0x1234, 0x40F1)); // DPL 3, read-only
            bed.gdt(sel::FREE + 8, 0);
            bed.finish(&program!(64: "mov ecx, 0x5B", "lar eax, ecx", "setz bl", "lsl edx, ecx", "verr cx", "setz bh", "verw cx", "setz ch"));
            let g = &bed.cpu.gpr;
            assert_eq!((g[gpr::RAX], g[gpr::RDX]), (0x0040_F100, 0x1234));
            assert_eq!((g[gpr::RBX] & 0xFFFF, g[gpr::RCX] >> 8 & 1), (0x101, 0));
            bed.reset();
            bed.finish(&program!(64: "mov eax, 7", "mov ecx, 0x60", "lar eax, ecx", "setz bl"));
            assert_eq!((bed.cpu.gpr[gpr::RAX], bed.cpu.gpr[gpr::RBX]), (7, 0), "an empty descriptor");
        });
    }
}

/// LDS, LES, LFS, LGS and LSS: the offset comes first; nothing is loaded if the selector is refused (SDM 2A, LDS).
#[test]
fn far_pointers() {
    let refused = u32::from(sel::FREE);
    for start in [Start::Protected, Start::Compat] {
        both(start, |bed| {
            bed.put32(DATA, 0x1122_3344);
            bed.put16(DATA + 4, sel::USER_DATA & !3);
            bed.put16(DATA + 8, 0x5566);
            bed.put16(DATA + 10, sel::USER_DATA & !3);
            bed.put32(DATA + 16, 0x7_0000);
            bed.put16(DATA + 20, sel::DATA);
            bed.put32(DATA + 24, 1);
            bed.put16(DATA + 28, sel::FREE);
            bed.gdt(sel::FREE, descriptor(0, 0xF_FFFF, 0xC013)); // not present
            bed.finish(&program!(32: "mov esi, 0x200000", "lds eax, [esi]", "les ecx, [esi]", "lfs edx, [esi]", "lgs ebp, [esi]", "mov ebx, -1", "les bx, [esi + 8]", "lss esp, [esi + 16]", "push eax"));
            let g = bed.cpu.gpr;
            assert_eq!([gpr::RAX, gpr::RCX, gpr::RDX, gpr::RBP].map(|r| g[r]), [0x1122_3344; 4]);
            assert_eq!((g[gpr::RBX], g[gpr::RSP]), (0xFFFF_5566, 0x6_FFFC));
            let selectors =
                [SegReg::Ds, SegReg::Es, SegReg::Fs, SegReg::Gs].map(|s| bed.cpu.segment(s).selector);
            assert_eq!(selectors, [sel::USER_DATA & !3; 4]);
            assert_eq!(bed.cpu.segment(SegReg::Ss).selector, sel::DATA);
            bed.reset();
            bed.cpu.gpr[gpr::RAX] = 77;
            for p in [
                program!(32: "mov esi, 0x200000"; "lds eax, [esi + 24]"),
                program!(32: "mov esi, 0x200000"; "lgs eax, [esi + 24]"),
            ] {
                bed.faults(&p, 11, refused);
                assert_eq!(bed.cpu.gpr[gpr::RAX], 77);
            }
            bed.faults(&program!(32: "mov esi, 0x200000"; "lss eax, [esi + 24]"), 12, refused);
            bed.faults(
                &program!(32: "mov esi, 0x200000"; "lss eax, [esi]"),
                13,
                u32::from(sel::USER_DATA & !3),
            );
            bed.faults(&program!(32: "nop"; ".byte 0x0F, 0xB2, 0xC0"), 6, None); // of a register
            if start == Start::Compat {
                bed.page_faults(&program!(32: "nop"; "les eax, [0x40000000]"), 0x4000_0000, 0);
            }
        });
    }
    both(Start::Long, |bed| {
        // Six bytes, ten with REX.W; the base of FS is the descriptor's.
        bed.gdt(sel::FREE, descriptor(0x1234_5678, 0xF_FFFF, 0xC0F3));
        bed.put64(DATA, 0x99AA_BBCC_1122_3344);
        bed.put16(DATA + 8, sel::FREE);
        bed.put16(DATA + 0x24, sel::FREE | 3);
        bed.put32(DATA + 0x20, 0x8877_6655);
        bed.finish(&program!(64: "mov esi, 0x200000", ".byte 0x48, 0x0F, 0xB4, 0x06", "mov rbx, -1", ".byte 0x0F, 0xB5, 0x5E, 0x20")); // LFS RAX, LGS EBX
        assert_eq!((bed.cpu.gpr[gpr::RAX], bed.cpu.gpr[gpr::RBX]), (0x99AA_BBCC_1122_3344, 0x8877_6655));
        let bases = [SegReg::Fs, SegReg::Gs].map(|s| (bed.cpu.segment(s).base, bed.cpu.segment(s).selector));
        assert_eq!(bases, [(0x1234_5678, sel::FREE), (0x1234_5678, sel::FREE | 3)]);
    });
    both(Start::Real, |bed| {
        bed.put16(0x8000, 0x0010);
        bed.put16(0x8002, 0x3000);
        bed.put16(0x3_0010, 0xBEEF);
        bed.finish(&program!(16: "mov si, 0x8000", "les di, [si]", "mov ax, es:[di]", "lds bx, [si]", "mov cx, [bx]"));
        let g = bed.cpu.gpr.map(|v| v & 0xFFFF);
        assert_eq!((g[gpr::RAX], g[gpr::RCX], bed.cpu.segment(SegReg::Ds).base), (0xBEEF, 0xBEEF, 0x3_0000));
    });
}

/// 16-bit code at linear addresses above 64 KiB, with ES at `es`.
fn small_code(bed: &mut Bed, es: u64, limit: u32) {
    bed.cpu.seg[SegReg::Cs as usize].attributes = 0x809B;
    bed.cpu.seg[SegReg::Es as usize] = Segment { base: es, limit, attributes: 0x93, selector: sel::DATA16 };
}

#[test]
fn repetitions_end_at_pages_and_limits() {
    let program = program!(16: "mov al, 0x5A", "mov di, 0x10", "mov cx, 0x20", "rep stosb", "mov di, 0xF0", "mov cx, 0x20"; "rep stosb");
    both(Start::Paged32, |bed| {
        small_code(bed, DATA + 0xF00, 0xFFFF);
        bed.map(DATA + 0x1000, DATA + 0x1000, pte::P);
        bed.page_faults(&program, DATA + 0x1000, pf::P | pf::W);
        assert_eq!((bed.cpu.gpr[gpr::RDI], bed.cpu.gpr[gpr::RCX]), (0x100, 0x10));
        assert_eq!(bed.get64(DATA + 0xFF8), 0x5A5A_5A5A_5A5A_5A5A);
    });
    both(Start::Protected, |bed| {
        small_code(bed, DATA, 0xFF);
        bed.faults(&program, 13, 0);
        assert_eq!((bed.cpu.gpr[gpr::RDI], bed.cpu.gpr[gpr::RCX]), (0x100, 0x10));
        assert_eq!((bed.get64(DATA + 0xF8), bed.get64(DATA + 0x100)), (0x5A5A_5A5A_5A5A_5A5A, 0));
    });
}

#[test]
fn repetitions_wrap_at_64_kib() {
    both(Start::Real, |bed| {
        let program = program!(16: "mov ax, 0x8000", "mov es, ax", "mov edi, 0x12340010", "mov ecx, 0x56780004", "rep stosb",
            "mov di, 0xFFFC", "mov cx, 8", "rep stosb");
        for _ in 0..2 {
            bed.reset();
            bed.cpu.gpr[gpr::RAX] = 0;
            bed.finish(&program);
            assert_eq!((bed.cpu.gpr[gpr::RDI], bed.cpu.gpr[gpr::RCX]), (0x1234_0004, 0x5678_0000));
        }
    });
}

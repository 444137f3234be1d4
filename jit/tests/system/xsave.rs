//! FXSAVE and the XSAVE family: areas, formats, XCR0, what each refuses (SDM 1, 10.5 and chapter 13; 2D, XSAVE ff.).

use crate::bed::{Bed, DATA, Start, both, pf, pte};
use paravane_cpu::{cr4, gpr};

const AREA: u64 = DATA + 0x1000;
const BV: u64 = AREA + 512;

/// Fills the area with AAH bytes and a clean header.
fn prepare(bed: &Bed) {
    bed.put(AREA, &[0xAA; 1024]);
    bed.put(BV, &[0; 64]);
    bed.put64(DATA, 0x1111_1111_1111_1111);
    bed.put64(DATA + 8, 0x2222_2222_2222_2222);
}

#[test]
fn the_standard_format() {
    both(Start::Long, |bed| {
        prepare(bed);
        bed.finish(&program!(64: "mov esi, 0x200000", "fninit", "fld1", "vbroadcastf128 ymm3, [rsi]", "movups xmm15, [rsi]", "xor edx, edx", "mov eax, 7", "xsave [rsi + 0x1000]"));
        assert_eq!(bed.get64(BV), 7);
        assert_eq!([8, 16, 24, 56].map(|i| bed.get64(BV + i)), [0; 4], "XSAVE writes XSTATE_BV only");
        assert_eq!((bed.get16(AREA), bed.get16(AREA + 2) >> 11), (0x37F, 7), "FCW, TOP");
        assert_eq!(bed.get16(AREA + 4) & 0xFF, 0x80, "abridged tags");
        assert_eq!((bed.get32(AREA + 24), bed.get32(AREA + 28)), (0x1F80, 0xFFFF), "MXCSR and its mask");
        assert_eq!(bed.get16(AREA + 32 + 8), 0x3FFF, "ST0");
        assert_eq!(bed.get64(AREA + 160 + 3 * 16), 0x1111_1111_1111_1111);
        assert_eq!(bed.get64(AREA + 160 + 15 * 16 + 8), 0x2222_2222_2222_2222);
        assert_eq!(bed.get64(AREA + 576 + 3 * 16 + 8), 0x2222_2222_2222_2222);
        assert_eq!(
            [416, 464, 504].map(|i| bed.get64(AREA + i)),
            [0xAAAA_AAAA_AAAA_AAAA; 3],
            "bytes 416 to 511"
        );
        assert_eq!(bed.get64(AREA + 832), 0xAAAA_AAAA_AAAA_AAAA);
        // A part: RFBM 4 leaves x87 and SSE alone, but stores MXCSR; the other bits of XSTATE_BV stay.
        prepare(bed);
        bed.reset();
        bed.put64(BV, 3);
        bed.finish(&program!(64: "mov esi, 0x200000", "vbroadcastf128 ymm3, [rsi]", "xor edx, edx", "mov eax, 4", "xsave [rsi + 0x1000]"));
        assert_eq!((bed.get64(BV), bed.get32(AREA), bed.get32(AREA + 24)), (7, 0xAAAA_AAAA, 0x1F80));
        assert_eq!(bed.get64(AREA + 160 + 3 * 16), 0xAAAA_AAAA_AAAA_AAAA);
        assert_eq!(bed.get64(AREA + 576 + 3 * 16), 0x1111_1111_1111_1111);
    });
    both(Start::Protected, |bed| {
        // Outside 64-bit mode registers 8 to 15 are not there.
        prepare(bed);
        bed.finish(&program!(32: "mov esi, 0x200000", "movups xmm7, [esi]", "xor edx, edx", "mov eax, 7", "xsave [esi + 0x1000]"));
        assert_eq!(bed.get64(AREA + 160 + 7 * 16), 0x1111_1111_1111_1111);
        assert_eq!(bed.get64(AREA + 160 + 8 * 16), 0xAAAA_AAAA_AAAA_AAAA);
        assert_eq!(bed.get64(AREA + 576 + 8 * 16), 0xAAAA_AAAA_AAAA_AAAA);
    });
}

/// XSAVEOPT and XSAVEC leave out what is in its initial configuration; XSAVEC rewrites the header (13.9, 13.10).
#[test]
fn the_init_optimization_and_compaction() {
    both(Start::Long, |bed| {
        prepare(bed);
        bed.put64(BV, 7);
        bed.finish(&program!(64: "mov esi, 0x200000", "fninit", "vzeroall", "movups xmm2, [rsi]", "xor edx, edx", "mov eax, 7", "xsaveopt [rsi + 0x1000]"));
        assert_eq!(bed.get64(BV), 2, "only SSE is in use");
        assert_eq!((bed.get32(AREA), bed.get64(AREA + 576)), (0xAAAA_AAAA, 0xAAAA_AAAA_AAAA_AAAA));
        assert_eq!(bed.get64(AREA + 160 + 32), 0x1111_1111_1111_1111);
        prepare(bed);
        bed.put(BV, &[0xAA; 16]);
        bed.reset();
        bed.finish(&program!(64: "mov esi, 0x200000", "fninit", "vzeroall", "vbroadcastf128 ymm2, [rsi]", "vpxor xmm4, xmm4, xmm4", "xor edx, edx", "mov eax, 6", "xsavec [rsi + 0x1000]"));
        assert_eq!((bed.get64(BV), bed.get64(BV + 8)), (6, 1 << 63 | 6));
        assert_eq!(bed.get32(AREA), 0xAAAA_AAAA, "x87 was not asked for");
        assert_eq!(
            bed.get64(AREA + 576 + 32 + 8),
            0x2222_2222_2222_2222,
            "AVX is the first extended component"
        );
        // XRSTOR takes both formats.
        bed.reset();
        bed.finish(&program!(64: "mov esi, 0x200000", "vzeroall", "xor edx, edx", "mov eax, 7", "fld1", "xrstor [rsi + 0x1000]", "vmovups [rsi + 0x40], ymm2", "fnstsw ax"));
        assert_eq!([0x40, 0x48, 0x50, 0x58].map(|i| bed.get64(DATA + i) >> 60), [1, 2, 1, 2]);
        assert_eq!(bed.cpu.gpr[gpr::RAX] & 0xFFFF, 0, "x87 is initial again");
    });
}

/// Outside 64-bit mode registers 8 to 15 do not put SSE and AVX state in use (SDM 1, 13.6; measured on Intel's Emerald Rapids).
#[test]
fn high_registers_are_not_in_use_outside_64_bit_mode() {
    both(Start::Compat, |bed| {
        for (component, legacy) in [(0, false), (2, true), (6, true)] {
            prepare(bed);
            bed.reset();
            // The upper eight registers, and one of the lower eight for each component that is to be in use.
            bed.cpu.fpu.0[160 + 128..160 + 256].fill(1);
            bed.cpu.fpu.0[576 + 128..576 + 256].fill(1);
            bed.cpu.fpu.0[160 + 16 * 7] = u8::from(component & 2 != 0);
            bed.cpu.fpu.0[576 + 16 * 7] = u8::from(component & 4 != 0);
            bed.finish(
                &program!(32: "mov esi, 0x200000", "xor edx, edx", "mov eax, 6", "xsavec [esi + 0x1000]"),
            );
            assert_eq!(bed.get64(BV), component);
            assert_eq!(bed.get64(AREA + 160) == 0, legacy, "{component}");
        }
    });
}

/// REX.W: FIP and FDP have 64 bits; without, selectors lie in their upper halves (SDM 1, 13.5.1).
#[test]
fn pointers_by_operand_size() {
    both(Start::Long, |bed| {
        prepare(bed);
        for area in 1..5 {
            bed.put(DATA + 0x1000 * area + 512, &[0; 64]);
        }
        bed.put32(DATA + 0x20, 0);
        bed.put16(DATA + 0x28, 0x37B);
        let p = program!(64: "mov esi, 0x200000", "fninit", "fldcw [rsi + 0x28]", "fld1", "nop"; "fdiv dword ptr [rsi + 0x20]", "mov eax, 1", "xor edx, edx",
            "xsaveopt [rsi + 0x1000]", ".byte 0x48", "xsaveopt [rsi + 0x2000]", "xsavec [rsi + 0x3000]", ".byte 0x48", "xsavec [rsi + 0x4000]");
        bed.finish(&p);
        let at = crate::bed::CODE + p.at;
        for (area, wide) in [(0x1000, false), (0x2000, true), (0x3000, false), (0x4000, true)] {
            let expected =
                if wide { [at, DATA + 0x20] } else { [at | 0x10 << 32, (DATA + 0x20) | 0x18 << 32] };
            assert_eq!([8, 16].map(|i| bed.get64(DATA + area + i)), expected, "{area:x}");
        }
        assert_eq!([0x1000, 0x3000].map(|a| bed.get64(DATA + a + 520) >> 63), [0, 1]);
    });
}

#[test]
fn restoring_initial_states() {
    both(Start::Long, |bed| {
        prepare(bed);
        // XSTATE_BV 0: all that is asked for becomes initial; MXCSR is loaded even so in the standard format.
        bed.put32(AREA + 24, 0x1FBF);
        bed.finish(&program!(64: "mov esi, 0x200000", "fld1", "vbroadcastf128 ymm1, [rsi]", "xor edx, edx", "mov eax, 7", "xrstor [rsi + 0x1000]",
            "vmovups [rsi + 0x40], ymm1", "stmxcsr [rsi + 0x80]", "fnstenv [rsi + 0xA0]"));
        assert_eq!([0x40, 0x58].map(|i| bed.get64(DATA + i)), [0; 2]);
        assert_eq!((bed.get32(DATA + 0x80), bed.get16(DATA + 0xA8)), (0x1FBF, 0xFFFF));
        // What is not asked for stays.
        bed.reset();
        bed.finish(&program!(64: "mov esi, 0x200000", "vbroadcastf128 ymm1, [rsi]", "xor edx, edx", "mov eax, 4", "xrstor [rsi + 0x1000]", "vmovups [rsi + 0x40], ymm1"));
        assert_eq!([0x40, 0x48, 0x50, 0x58].map(|i| bed.get64(DATA + i) >> 60), [1, 2, 0, 0]);
    });
}

#[test]
fn what_xsave_and_xrstor_refuse() {
    both(Start::Long, |bed| {
        prepare(bed);
        bed.faults(&program!(64: "mov esi, 0x200000", "mov eax, 7"; "xsave [rsi + 0x1020]"), 13, 0);
        bed.faults(&program!(64: "mov esi, 0x200000", "mov eax, 7"; "xrstor [rsi + 0x1008]"), 13, 0);
        bed.faults(&program!(64: "mov esi, 0x200000"; "fxsave [rsi + 0x1008]"), 13, 0);
        bed.faults(&program!(64: "mov esi, 0x200000"; "fxrstor [rsi + 0x1008]"), 13, 0);
        let restore =
            program!(64: "mov esi, 0x200000", "mov eax, 7", "xor edx, edx"; "xrstor [rsi + 0x1000]");
        // XSTATE_BV beyond XCR0; bits in the reserved part; XCOMP_BV without bit 63, beyond XCR0, short of XSTATE_BV.
        for (at, value) in [(0, 8), (8, 1), (16, 1), (8, 1 << 63 | 8), (8, 1 << 62)] {
            prepare(bed);
            bed.put64(BV + at, value);
            bed.faults(&restore, 13, 0);
        }
        prepare(bed);
        bed.put64(BV, 7);
        bed.put64(BV + 8, 1 << 63 | 3);
        bed.faults(&restore, 13, 0);
        // In the compacted format all of bytes 63:16 count.
        prepare(bed);
        bed.put64(BV + 8, 1 << 63 | 7);
        bed.put64(BV + 56, 1);
        bed.faults(&restore, 13, 0);
        // Reserved bits of MXCSR.
        prepare(bed);
        bed.put64(BV, 2);
        bed.put32(AREA + 24, 0x1_0000);
        bed.faults(&restore, 13, 0);
        bed.faults(&program!(64: "mov esi, 0x200000"; "fxrstor [rsi + 0x1000]"), 13, 0);
        // CR4.OSXSAVE clear: #UD. XSAVES and XRSTORS are not offered.
        bed.cpu.cr4 &= !cr4::OSXSAVE;
        bed.faults(&restore, 6, None);
        bed.faults(&program!(64: "mov esi, 0x200000"; "xsaveopt [rsi + 0x1000]"), 6, None);
        bed.reset();
        bed.faults(&program!(64: "mov esi, 0x200000"; "xsaves [rsi + 0x1000]"), 6, None);
        bed.faults(&program!(64: "mov esi, 0x200000"; "xrstors [rsi + 0x1000]"), 6, None);
        bed.faults(&program!(64: "mov esi, 0x200000"; ".byte 0xF0", "xsave [rsi + 0x1000]"), 6, None);
    });
}

/// An area of which the second page is missing: #PF there, nothing stored or loaded.
#[test]
fn areas_over_a_missing_page() {
    both(Start::Long, |bed| {
        bed.map(DATA + 0x2000, 0, 0);
        bed.put(DATA + 0x1E00, &[0x55; 0x200]);
        for p in [
            program!(64: "mov esi, 0x200000", "mov eax, 7", "xor edx, edx"; "xsave [rsi + 0x1E00]"),
            program!(64: "mov esi, 0x200000", "mov eax, 7", "xor edx, edx"; "xsavec [rsi + 0x1E00]"),
        ] {
            bed.page_faults(&p, DATA + 0x2000, pf::W);
            assert_eq!(bed.get64(DATA + 0x1E00), 0x5555_5555_5555_5555);
        }
        bed.page_faults(
            &program!(64: "mov esi, 0x200000", "mov eax, 7", "xor edx, edx"; "xrstor [rsi + 0x1E00]"),
            DATA + 0x2000,
            0,
        );
        bed.map(DATA + 0x2000, DATA + 0x2000, pte::ALL);
    });
}

#[test]
fn xcr0() {
    both(Start::Long, |bed| {
        bed.finish(&program!(64: "xor ecx, ecx", "xgetbv", "mov ebx, eax", "mov eax, 3", "xor edx, edx", "xsetbv", "xgetbv"));
        assert_eq!((bed.cpu.gpr[gpr::RBX], bed.cpu.gpr[gpr::RAX], bed.cpu.xcr0), (7, 3, 3));
        // Without AVX in XCR0 its instructions are undefined, legacy SSE is not; x87 alone leaves SSE usable too.
        bed.faults(&program!(64: "addps xmm0, xmm0"; "vaddps xmm0, xmm0, xmm0"), 6, None);
        bed.reset();
        for (low, high) in [(0u32, 0u32), (2, 0), (5, 0), (8 | 7, 0), (7, 1)] {
            bed.reset();
            bed.cpu.gpr[gpr::RDI] = u64::from(low);
            bed.cpu.gpr[gpr::RDX] = u64::from(high);
            bed.faults(&program!(64: "xor ecx, ecx", "mov eax, edi"; "xsetbv"), 13, 0);
        }
        bed.reset();
        bed.faults(&program!(64: "mov ecx, 1", "mov eax, 7", "xor edx, edx"; "xsetbv"), 13, 0);
        bed.faults(&program!(64: "mov ecx, 2"; "xgetbv"), 13, 0);
        bed.user();
        bed.faults(&program!(64: "xor ecx, ecx", "mov eax, 7", "xor edx, edx"; "xsetbv"), 13, 0);
        bed.reset();
        bed.cpu.cr4 &= !cr4::OSXSAVE;
        bed.faults(&program!(64: "xor ecx, ecx", "mov eax, 7", "xor edx, edx"; "xsetbv"), 6, None);
    });
}

/// XGETBV with ECX 1 may say of a component in its initial configuration that it is in use (SDM 1, 13.2 and 13.6): of all in XCR0.
#[test]
fn components_in_use() {
    both(Start::Long, |bed| {
        let get = program!(64: "mov eax, 13", "mov ecx, 1", "cpuid", "mov ebx, eax", "vzeroall", "fninit", "mov ecx, 1"; "xgetbv");
        bed.run(&get);
        if bed.cpu.gpr[gpr::RBX] & 4 == 0 {
            assert_eq!((bed.taken().vector, bed.taken().error), (13, Some(0)), "not offered on this host");
            return;
        }
        assert_eq!((bed.cpu.gpr[gpr::RAX], bed.cpu.gpr[gpr::RDX]), (7, 0));
        bed.reset();
        bed.cpu.xcr0 = 3;
        bed.finish(&program!(64: "fninit", "mov ecx, 1", "xgetbv"));
        assert_eq!(bed.cpu.gpr[gpr::RAX], 3);
    });
}

/// CPUID leaves 1 and 0DH (SDM 2A, CPUID; 1, 13.2).
#[test]
fn what_cpuid_says() {
    both(Start::Long, |bed| {
        let p = program!(64: "mov esi, 0x200000", "mov eax, 1", "cpuid", "mov [rsi], ecx",
            "mov eax, 13", "xor ecx, ecx", "cpuid", "mov [rsi + 4], eax", "mov [rsi + 8], ebx", "mov [rsi + 12], ecx",
            "mov eax, 13", "mov ecx, 1", "cpuid", "mov [rsi + 16], eax", "mov [rsi + 20], ebx",
            "mov eax, 13", "mov ecx, 2", "cpuid", "mov [rsi + 24], eax", "mov [rsi + 28], ebx");
        bed.finish(&p);
        let word = |bed: &Bed, n: u64| bed.get32(DATA + 4 * n);
        assert_eq!(word(bed, 0) >> 26 & 3, 3, "XSAVE and OSXSAVE");
        assert_eq!([1, 2, 3].map(|n| word(bed, n)), [7, 832, 832]);
        assert_eq!(word(bed, 4) & 8, 0, "no XSAVES");
        assert_eq!((word(bed, 6), word(bed, 7)), (256, 576));
        bed.reset();
        bed.cpu.cr4 &= !cr4::OSXSAVE;
        bed.cpu.xcr0 = 3;
        bed.finish(&p);
        assert_eq!(word(bed, 0) >> 27 & 1, 0);
        assert_eq!([1, 2, 3].map(|n| word(bed, n)), [7, 576, 832]);
    });
}

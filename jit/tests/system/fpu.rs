//! x87 and SSE: when they fault, what they leave, how they round (SDM 1, chapters 8, 9 and 11; 3A, 2.5 and chapter 13).

use crate::bed::{Bed, CODE, DATA, HANDLERS, Program, STACK, Start, both, pf};
use paravane_cpu::{cr0, cr4, flags, gpr};

/// SDM 3A, table 13-1 and SDM 2A, tables 2-18 ff.: EM, MP and TS against x87, WAIT, MMX, SSE and state instructions.
#[test]
fn availability() {
    both(Start::Long, |bed| {
        let x87 = program!(64: ; "fld1");
        let init = program!(64: ; "fninit");
        let wait = program!(64: ; "fwait");
        let mmx = program!(64: ; "paddb mm0, mm1");
        let sse = program!(64: ; "addps xmm0, xmm1");
        let avx = program!(64: ; "vaddps ymm0, ymm0, ymm1");
        let fxsave = program!(64: ; "fxsave [0x200000]");
        let xsave = program!(64: ; "xsave [0x200000]");
        let (ok, nm, ud) = (None, Some(7), Some(6));
        let table = [
            // EM, MP, TS:        x87 init wait mmx sse avx fxsave xsave
            (0, [ok, ok, ok, ok, ok, ok, ok, ok]),
            (cr0::MP, [ok, ok, ok, ok, ok, ok, ok, ok]),
            (cr0::TS, [nm, nm, ok, nm, nm, nm, nm, nm]),
            (cr0::MP | cr0::TS, [nm, nm, nm, nm, nm, nm, nm, nm]),
            (cr0::EM, [nm, nm, ok, ud, ud, ok, nm, ok]),
            (cr0::EM | cr0::TS, [nm, nm, ok, ud, ud, nm, nm, nm]),
            (cr0::EM | cr0::MP | cr0::TS, [nm, nm, nm, ud, ud, nm, nm, nm]),
        ];
        for (bits, want) in table {
            for (program, want) in [x87, init, wait, mmx, sse, avx, fxsave, xsave].iter().zip(want) {
                bed.reset();
                bed.cpu.cr0 = bed.cpu.cr0 & !(cr0::MP | cr0::EM | cr0::TS) | bits;
                eprintln!("{bits:x} {:x?}", program.bytes);
                match want {
                    None => bed.finish(program),
                    Some(vector) => drop(bed.faults(program, vector, None)),
                }
            }
        }
        // CLTS makes the unit available at once.
        bed.reset();
        bed.cpu.cr0 |= cr0::TS;
        bed.finish(&program!(64: "clts", "fld1", "addps xmm0, xmm1"));
    });
}

/// Code that divides 1 by the zero at DATA with ZE unmasked: the division is what is marked.
fn divide(bed: &mut Bed) -> Program {
    bed.put32(DATA, 0);
    bed.put16(DATA + 8, 0x37B);
    program!(64: "mov esi, 0x200000", "fninit", "fldcw [rsi + 8]", "fld1"; "fdiv dword ptr [rsi]",
        "fnstenv [rsi + 0x100]", "fxsave [rsi + 0x200]", ".byte 0x48", "fxsave [rsi + 0x400]", "fnsave [rsi + 0x600]", "fnstenv [rsi + 0x700]")
}

#[test]
fn instruction_and_data_pointers_of_an_error() {
    both(Start::Long, |bed| {
        let p = divide(bed);
        bed.finish(&p);
        let at = (CODE + p.at) as u32;
        // FDIV m32 [RSI] is D8 36.
        let environment = [0x100, 0x600].map(|o| [12, 16, 20].map(|i| bed.get32(DATA + o + i)));
        assert_eq!(environment, [[at, 0x036 << 16 | 0x10, 0x20_0000]; 2]);
        assert_eq!(bed.get16(DATA + 0x100 + 24), 0x18, "FDS");
        assert_eq!(bed.get16(DATA + 0x206), 0x036);
        assert_eq!([8, 12, 16, 20].map(|i| bed.get32(DATA + 0x200 + i)), [at, 0x10, 0x20_0000, 0x18]);
        assert_eq!([8, 16].map(|i| bed.get64(DATA + 0x400 + i)), [u64::from(at), 0x20_0000]);
        // FNSAVE initialises.
        assert_eq!([12, 16, 20].map(|i| bed.get32(DATA + 0x700 + i)), [0; 3]);
        // An instruction without memory operand.
        bed.reset();
        let p = program!(64: "mov esi, 0x200000", "fninit", "fldcw [rsi + 8]", "fld1", "fldz"; "fdivp",
            "fnclex", "fld1", "fnstenv [rsi + 0x100]", "fninit", "fnstenv [rsi + 0x140]");
        bed.finish(&p);
        assert_eq!(
            bed.get32(DATA + 0x10C),
            (CODE + p.at) as u32,
            "neither FNCLEX nor what raises nothing counts"
        );
        assert_eq!(bed.get32(DATA + 0x110) >> 16, 0x6F9);
        assert_eq!([12, 16, 20].map(|i| bed.get32(DATA + 0x140 + i)), [0; 3]);
    });
}

/// Every x87 exception alone unmasked: #MF at the next waiting instruction (SDM 1, 8.5).
#[test]
fn every_error_unmasked() {
    both(Start::Long, |bed| {
        let large = (0x7FFEu16, 1u64 << 63);
        let small = (1u16, 1u64 << 63);
        for (at, (exponent, mantissa)) in [(0x20, large), (0x30, small)] {
            bed.put64(DATA + at, mantissa);
            bed.put16(DATA + at + 8, exponent);
        }
        bed.put32(DATA + 0x40, 1); // a denormal
        let cases = [
            (
                0x37E,
                0x01,
                program!(64: "mov esi, 0x200000", "fninit", "fldcw [rsi]", "fldz", "fldz", "fdivp"; "fwait"),
            ),
            (0x37E, 0x41, program!(64: "mov esi, 0x200000", "fninit", "fldcw [rsi]", "fstp st"; "fwait")),
            (
                0x37D,
                0x02,
                program!(64: "mov esi, 0x200000", "fninit", "fldcw [rsi]", "fld dword ptr [rsi + 0x40]"; "fwait"),
            ),
            (
                0x37B,
                0x04,
                program!(64: "mov esi, 0x200000", "fninit", "fldcw [rsi]", "fld1", "fldz", "fdivp"; "fwait"),
            ),
            (
                0x377,
                0x08,
                program!(64: "mov esi, 0x200000", "fninit", "fldcw [rsi]", "fld tbyte ptr [rsi + 0x20]", "fmul st, st"; "fwait"),
            ),
            (
                0x36F,
                0x10,
                program!(64: "mov esi, 0x200000", "fninit", "fldcw [rsi]", "fld tbyte ptr [rsi + 0x30]", "fmul st, st"; "fwait"),
            ),
            (
                0x35F,
                0x20,
                program!(64: "mov esi, 0x200000", "fninit", "fldcw [rsi]", "fld1", "fldpi", "fdivp"; "fwait"),
            ),
        ];
        for (fcw, flags, p) in cases {
            bed.reset();
            bed.put16(DATA, fcw);
            bed.faults(&p, 16, None);
            assert_eq!(bed.cpu.fpu.0[2], 0x80 | flags, "FCW {fcw:x}");
            // Masked, nothing is raised.
            bed.reset();
            bed.put16(DATA, 0x37F);
            bed.finish(&p);
        }
    });
}

#[test]
fn an_error_handler_sees_the_pointers() {
    both(Start::Long, |bed| {
        bed.put32(DATA, 0);
        bed.put16(DATA + 8, 0x37B);
        bed.put(
            crate::bed::HANDLERS + 0x100,
            program!(64: "mov rdi, 0x201000", "fnstenv [rdi]", "hlt").bytes,
        );
        let p = program!(64: "mov esi, 0x200000", "fninit", "fldcw [rsi + 8]", "mov ecx, 10", "2: fld1", "fstp st", "dec ecx", "jnz 2b", "fld1",
            "fdiv dword ptr [rsi]", "inc eax", "inc ebx"; "fld1");
        bed.load(&p);
        bed.go();
        assert_eq!(bed.get64(STACK - 40), CODE + p.at, "#MF comes at the next waiting instruction");
        assert_eq!(u64::from(bed.get32(DATA + 0x100C)), CODE + p.at - 6);
        assert_eq!(bed.get32(DATA + 0x1014), DATA as u32);
        assert_eq!(bed.get16(DATA + 0x1004) & 0x84, 0x84, "ES and ZE");
    });
}

/// SDM 1, figures 8-9 to 8-12.
#[test]
fn environments_in_every_format() {
    both(Start::Protected, |bed| {
        bed.put32(DATA, 0);
        bed.put16(DATA + 8, 0x37B);
        let p = program!(32: "mov esi, 0x200000", "fninit", "fldcw [esi + 8]", "fld1"; "fdiv dword ptr [esi]",
            "fnstenv [esi + 0x100]", ".byte 0x66", "fnstenv [esi + 0x140]");
        bed.finish(&p);
        let at = (CODE + p.at) as u32;
        assert_eq!([12, 16, 20].map(|i| bed.get32(DATA + 0x100 + i)), [at, 0x036 << 16 | 8, 0x20_0000]);
        assert_eq!([6, 8, 10, 12].map(|i| u32::from(bed.get16(DATA + 0x140 + i))), [at & 0xFFFF, 8, 0, 0x18]);
    });
    both(Start::Real, |bed| {
        // Linear addresses: DS is 2000H.
        bed.put16(0x2_0008, 0x37B);
        let p = program!(16: "mov ax, 0x2000", "mov ds, ax", "mov si, 0", "fninit", "fldcw [si + 8]", "fld1"; "fdiv dword ptr [si]",
            "fnstenv [si + 0x100]", ".byte 0x66", "fnstenv [si + 0x140]", ".byte 0x66", "fldenv [si + 0x140]", "fnstenv [si + 0x180]");
        bed.cpu.seg[3] = paravane_cpu::Segment::real(0x2000);
        bed.finish(&p);
        let at = bed.code() + p.at;
        // FDIV m32 [SI] is D8 34.
        assert_eq!([6, 8, 10, 12].map(|i| bed.get16(0x2_0100 + i)), [at as u16, 0x034, 0, 0x2000]);
        assert_eq!(
            [12, 16, 20, 24].map(|i| bed.get32(0x2_0140 + i) & 0x0FFF_FFFF),
            [at as u32 | 0xFFF_0000, 0x034, 0xFFF_0000, 0x2000]
        );
        assert_eq!(
            [6, 8, 10, 12].map(|i| bed.get16(0x2_0180 + i)),
            [at as u16, 0x034, 0, 0x2000],
            "as loaded"
        );
    });
}

#[test]
fn pointers_go_through_loads_and_stores() {
    both(Start::Long, |bed| {
        bed.put32(DATA, 0);
        bed.put16(DATA + 8, 0x37B);
        bed.finish(&program!(64: "mov esi, 0x200000", "fninit", "fldcw [rsi + 8]", "fld1", "fdiv dword ptr [rsi]",
            "fxsave64 [rsi + 0x400]", "fnstenv [rsi + 0x100]", "mov eax, 7", "xor edx, edx", "xsave64 [rsi + 0x800]",
            "fninit", "fldenv [rsi + 0x100]", "fnstenv [rsi + 0x140]",
            "fninit", "fxrstor64 [rsi + 0x400]", "fnstenv [rsi + 0x180]",
            "fninit", "xrstor64 [rsi + 0x800]", "fnstenv [rsi + 0x1C0]", "fninit"));
        let environment = |o: u64| [12, 16, 20].map(|i| bed.get32(DATA + o + i));
        let first = environment(0x100);
        assert_ne!(first[0], 0);
        assert_eq!(environment(0x140), first);
        // 64-bit images have no selectors.
        let flat = [first[0], first[1] & !0xFFFF, first[2]];
        assert_eq!([environment(0x180), environment(0x1C0)], [flat; 2]);
    });
}

/// CR0.NE clear: FERR# reports the error; the waiting instruction stands still until the interrupt (SDM 1, 8.7.2).
#[test]
fn errors_by_irq_13() {
    for start in [Start::Long, Start::Protected, Start::Real] {
        both(start, |bed| {
            bed.put16(0x8000, 0x37B);
            bed.cpu.cr0 &= !cr0::NE;
            bed.cpu.rflags |= flags::IF;
            bed.interrupt_on_fpu_error(0x75);
            let p = if start == Start::Real {
                program!(16: "fninit", "fldcw [0x8000]", "fld1", "fldz", "fdivp", "inc bx"; "fld1")
            } else {
                program!(64: "fninit", "mov esi, 0x8000", "fldcw [rsi]", "fld1", "fldz", "fdivp", "add ebx, 1"; "fld1")
            };
            bed.run(&p);
            assert_eq!((bed.taken().vector, bed.taken().rip), (0x75, bed.code() + p.at));
            assert!(*bed.board.fpu_errors.lock().expect("count") > 0);
            // The handler clears the error and returns: the instruction goes on.
            bed.put(
                bed.cpu.rip,
                if start == Start::Real { &[0xDB, 0xE2, 0xCF] } else { &[0xDB, 0xE2, 0x48, 0xCF] },
            );
            if start == Start::Protected {
                bed.put(bed.cpu.rip, &[0xDB, 0xE2, 0xCF]);
            }
            bed.go();
            assert_eq!(bed.cpu.rip, bed.code() + p.bytes.len() as u64);
            assert_eq!(bed.cpu.gpr[gpr::RBX] & 0xFF, 1);
        });
    }
}

/// A write to port F0H drives IGNNE# while FERR# is up: x87 instructions go on though the error is pending, until it is
/// cleared; the next one stops them again (SDM 1, 8.7.2 and D.2; 82371SB, CERR register).
#[test]
fn ignored_errors() {
    both(Start::Protected, |bed| {
        bed.cpu.cr0 &= !cr0::NE;
        bed.cpu.rflags |= flags::IF;
        bed.put16(DATA + 8, 0x37B);
        bed.interrupt_on_fpu_error(0x75);
        // The handler: 1.0 + 1.0 and a second division by zero, both stored; FNSTSW before and after FNCLEX.
        let handler = program!(32: "out 0xF0, al", "fnstsw [esi + 0x10]", "fwait", "fld1", "fld1", "faddp", "fstp dword ptr [esi + 0x14]",
            "fld1", "fldz", "fdivp", "fst dword ptr [esi + 0x18]", "fldcw [esi + 8]", "fnstsw [esi + 0x1C]", "paddb mm0, mm1", "emms", "fnclex", "fnstsw [esi + 0x1E]", "iretd");
        bed.put(HANDLERS + 0x750, handler.bytes);
        let p = program!(32: "mov esi, 0x200000", "fninit", "fldcw [esi + 8]", "fld1", "fldz", "fdivp", "mov edi, 77"; "fldl2e");
        bed.finish(&p);
        // ES, ZE; B and TOP 6: 1.0 and 0 are as they were, nothing was popped.
        assert_eq!(bed.get16(DATA + 0x10) & 0xB8FF, 0xB084);
        assert_eq!(bed.get32(DATA + 0x14), 2.0f32.to_bits());
        assert_eq!(bed.get32(DATA + 0x18), 0, "an unmasked division by zero leaves the operands");
        assert_eq!((bed.get16(DATA + 0x1C) & 0x8084, bed.get16(DATA + 0x1E) & 0x80FF), (0x8084, 0));
        assert_eq!(*bed.board.fpu_errors.lock().expect("count"), 1);
        // FERR# fell with FNCLEX, and IGNNE# with it: the next error waits for its own interrupt.
        bed.interrupt_on_fpu_error(0x75);
        let again =
            program!(32: "fninit", "fldcw [esi + 8]", "fld1", "fldz", "fdivp", "mov edi, 78"; "fldl2e");
        bed.put(HANDLERS + 0x750, program!(32: "hlt").bytes);
        bed.run(&again);
        assert_eq!((bed.taken().vector, bed.taken().rip), (0x75, bed.code() + again.at));
        // Without FERR# the port does nothing.
        bed.cpu.gpr[gpr::RSP] += 12;
        bed.cpu.rflags |= flags::IF;
        bed.interrupt_on_fpu_error(0x75);
        let early =
            program!(32: "fninit", "out 0xF0, al", "fldcw [esi + 8]", "fld1", "fldz", "fdivp"; "fldl2e");
        bed.run(&early);
        assert_eq!((bed.taken().vector, bed.taken().rip), (0x75, bed.code() + early.at));
    });
}

/// A pending error comes before anything the memory operand could raise, and only at waiting instructions.
#[test]
fn where_a_pending_error_is_raised() {
    both(Start::Long, |bed| {
        bed.put16(DATA + 8, 0x37B);
        bed.finish(&program!(64: "mov esi, 0x200000", "fninit", "fldcw [rsi + 8]", "fld1", "fldz", "fdivp",
            "fnstcw [rsi]", "fnstsw ax", "fnstsw [rsi]", "addps xmm0, xmm1", "fxsave [rsi + 0x100]", "mov eax, 7", "xor edx, edx", "xsave [rsi + 0x400]", "fnstenv [rsi + 0x80]"));
        bed.reset();
        bed.faults(&program!(64: "mov esi, 0x200000", "fninit", "fldcw [rsi + 8]", "fld1", "fldz", "fdivp"; "fadd dword ptr [0x40000000]"), 16, None);
        bed.faults(&program!(64: "mov esi, 0x200000", "fninit", "fldcw [rsi + 8]", "fld1", "fldz", "fdivp"; "paddb mm0, mm1"), 16, None);
        bed.faults(&program!(64: "mov esi, 0x200000", "fninit", "fldcw [rsi + 8]", "fld1", "fldz", "fdivp"; "fldcw [rsi + 8]"), 16, None);
        bed.page_faults(&program!(64: "mov esi, 0x200000", "fninit", "fldcw [rsi + 8]", "fld1", "fldz", "fdivp"; "fnstsw [0x40000000]"), 0x4000_0000, pf::W);
        // Masked, FSW says so and nothing is raised; unmasking it later makes it pending (SDM 1, 8.1.5).
        bed.reset();
        bed.faults(&program!(64: "mov esi, 0x200000", "fninit", "fld1", "fldz", "fdivp", "fld1", "fldcw [rsi + 8]"; "fld1"), 16, None);
    });
}

/// Rounding and precision control (SDM 1, 4.8.4 and 8.1.5.2): 1/3 and integers half way between.
#[test]
fn rounding_and_precision_control() {
    both(Start::Long, |bed| {
        // FCW, 1/3 as an extended real (mantissa), and 2.5 and -2.5 as integers.
        let table: [(u16, u64, i16, i16); 6] = [
            (0x037F, 0xAAAA_AAAA_AAAA_AAAB, 2, -2),
            (0x077F, 0xAAAA_AAAA_AAAA_AAAA, 2, -3),
            (0x0B7F, 0xAAAA_AAAA_AAAA_AAAB, 3, -2),
            (0x0F7F, 0xAAAA_AAAA_AAAA_AAAA, 2, -2),
            (0x027F, 0xAAAA_AAAA_AAAA_A800, 2, -2),
            (0x007F, 0xAAAA_AB00_0000_0000, 2, -2),
        ];
        bed.put32(DATA + 4, 3.0f32.to_bits());
        bed.put32(DATA + 8, 2.5f32.to_bits());
        for (fcw, third, up, down) in table {
            bed.reset();
            bed.put16(DATA, fcw);
            bed.finish(&program!(64: "mov esi, 0x200000", "fninit", "fldcw [rsi]", "fld1", "fdiv dword ptr [rsi + 4]", "fstp tbyte ptr [rsi + 0x10]",
                "fld dword ptr [rsi + 8]", "fist word ptr [rsi + 0x20]", "fchs", "fistp word ptr [rsi + 0x22]", "fnstsw ax"));
            let got = (
                bed.get64(DATA + 0x10),
                bed.get16(DATA + 0x18),
                bed.get16(DATA + 0x20) as i16,
                bed.get16(DATA + 0x22) as i16,
            );
            assert_eq!(got, (third, 0x3FFD, up, down), "FCW {fcw:#x}");
            assert_eq!(bed.cpu.gpr[gpr::RAX] & 0x3F, 0x20, "PE");
        }
    });
}

#[test]
fn denormals() {
    both(Start::Long, |bed| {
        bed.put32(DATA, 1); // the smallest denormal
        bed.put32(DATA + 4, 0x0080_0000); // the smallest normal number
        bed.put32(DATA + 8, 0.5f32.to_bits());
        bed.put16(DATA + 16, 0x37D);
        bed.finish(&program!(64: "mov esi, 0x200000", "fninit", "fld dword ptr [rsi]", "fnstsw ax"));
        assert_eq!(bed.cpu.gpr[gpr::RAX] & 0x3F, 2, "DE");
        bed.reset();
        bed.faults(
            &program!(64: "mov esi, 0x200000", "fninit", "fldcw [rsi + 16]", "fld dword ptr [rsi]"; "fwait"),
            16,
            None,
        );
        // MXCSR: as it is, with DAZ, with FTZ.
        for (mxcsr, sum, product, raised) in
            [(0x1F80u32, 2u32, 0x0040_0000u32, 2), (0x1FC0, 0, 0x0040_0000, 0), (0x9F80, 0, 0, 0x32)]
        {
            bed.reset();
            bed.put32(DATA + 20, mxcsr);
            bed.finish(&program!(64: "mov esi, 0x200000", "ldmxcsr [rsi + 20]", "movss xmm0, [rsi]", "addss xmm0, xmm0", "movd ebx, xmm0",
                "movss xmm1, [rsi + 4]", "mulss xmm1, [rsi + 8]", "movd ecx, xmm1", "stmxcsr [rsi + 24]"));
            let g = bed.cpu.gpr;
            assert_eq!((g[gpr::RBX] as u32, g[gpr::RCX] as u32), (sum, product), "MXCSR {mxcsr:#x}");
            assert_eq!(bed.get32(DATA + 24), mxcsr | raised);
        }
    });
}

/// Every SSE exception alone unmasked: #XM before the destination changes, its flag set (SDM 1, 11.5).
#[test]
fn simd_exceptions() {
    both(Start::Long, |bed| {
        let numbers = [0x7F80_0001u32, 1, 0, 0x7F7F_FFFF, 0x0080_0000, 3.0f32.to_bits(), 1.0f32.to_bits()];
        for (i, v) in numbers.into_iter().enumerate() {
            bed.put32(DATA + i as u64 * 4, v);
        }
        let cases = [
            // A signalling NaN, a denormal, division by zero, overflow, underflow, inexact.
            (
                0,
                program!(64: "mov esi, 0x200000", "ldmxcsr [rsi + 32]", "movss xmm0, [rsi + 24]"; "addss xmm0, [rsi]"),
            ),
            (
                1,
                program!(64: "mov esi, 0x200000", "ldmxcsr [rsi + 32]", "movss xmm0, [rsi + 24]"; "addss xmm0, [rsi + 4]"),
            ),
            (
                2,
                program!(64: "mov esi, 0x200000", "ldmxcsr [rsi + 32]", "movss xmm0, [rsi + 24]"; "divss xmm0, [rsi + 8]"),
            ),
            (
                3,
                program!(64: "mov esi, 0x200000", "ldmxcsr [rsi + 32]", "movss xmm0, [rsi + 12]"; "addss xmm0, xmm0"),
            ),
            (
                4,
                program!(64: "mov esi, 0x200000", "ldmxcsr [rsi + 32]", "movss xmm0, [rsi + 16]"; "divss xmm0, [rsi + 20]"),
            ),
            (
                5,
                program!(64: "mov esi, 0x200000", "ldmxcsr [rsi + 32]", "movss xmm0, [rsi + 24]"; "divss xmm0, [rsi + 20]"),
            ),
        ];
        for (bit, program) in cases {
            bed.reset();
            bed.put32(DATA + 32, 0x1F80 & !(0x80 << bit));
            bed.faults(&program, 19, None);
            let before = bed.cpu.fpu.0[160..164].to_vec();
            assert_ne!(bed.cpu.fpu.mxcsr() & 1 << bit, 0, "exception {bit}");
            assert_ne!(before, [0; 4], "the destination is as it was");
            // Masked it goes through.
            bed.reset();
            bed.put32(DATA + 32, 0x1F80);
            bed.finish(&program);
            assert_ne!(bed.cpu.fpu.mxcsr() & 1 << bit, 0);
        }
        // Flags that are set already raise nothing by being unmasked; reserved bits do.
        bed.reset();
        bed.put32(DATA + 32, 0x3F);
        bed.finish(&program!(64: "mov esi, 0x200000", "ldmxcsr [rsi + 32]", "movss xmm0, [rsi + 24]", "addss xmm0, xmm0"));
        bed.reset();
        bed.put32(DATA + 32, 0x1_1F80);
        bed.faults(&program!(64: "mov esi, 0x200000"; "ldmxcsr [rsi + 32]"), 13, 0);
    });
}

/// SDM 1, 9.5: MMX instructions mark all registers valid and clear TOP; EMMS empties them.
#[test]
fn mmx_and_the_x87_stack() {
    both(Start::Long, |bed| {
        bed.finish(&program!(64: "mov esi, 0x200000", "fninit", "fld1", "fld1", "mov eax, -1", "movd mm3, eax", "fnstenv [rsi]", "emms", "fnstenv [rsi + 0x40]", "fld1", "fstp tbyte ptr [rsi + 0x80]"));
        // FNSTENV derives the tags from the contents: 1.0, 1.0, zeroes and what MOVD made, an infinity's exponent.
        let tags = 0b00_00_01_01_10_01_01_01;
        assert_eq!((bed.get16(DATA + 8), bed.get16(DATA + 4) >> 11 & 7), (tags, 0), "FTW and TOP after MOVD");
        assert_eq!(bed.get16(DATA + 0x48), 0xFFFF);
        assert_eq!(bed.get16(DATA + 0x88), 0x3FFF);
        // An overflow of the stack: IE, SF and C1.
        bed.reset();
        bed.finish(&program!(64: "fninit", "mov ecx, 9", "2: fld1", "dec ecx", "jnz 2b", "fnstsw ax"));
        assert_eq!(bed.cpu.gpr[gpr::RAX] & 0x241, 0x241);
        bed.reset();
        bed.finish(&program!(64: "fninit", "fstp st", "fnstsw ax"));
        assert_eq!(bed.cpu.gpr[gpr::RAX] & 0x241, 0x041, "underflow");
    });
}

#[test]
fn mmx_needs_no_osfxsr() {
    both(Start::Long, |bed| {
        bed.cpu.cr4 &= !cr4::OSFXSR;
        bed.finish(&program!(64: "movd mm0, eax", "paddb mm0, mm1", "emms"));
        bed.faults(&program!(64: ; "cvtps2pi mm0, xmm0"), 6, None);
    });
}

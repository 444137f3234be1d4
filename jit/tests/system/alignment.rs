//! Alignment checking (SDM 3A, 6.15, interrupt 17 and table 6-7). What the manual leaves open of 16- and 32-byte operands is
//! as the host's processor does it.

use crate::bed::{Bed, DATA, HANDLERS, Program, Start, both};
use paravane_cpu::{HostVendor, cr0, flags, gpr};

fn checking(bed: &mut Bed) {
    bed.reset();
    bed.gate(0x50, 14, 3, HANDLERS + 0x500);
    bed.user();
    bed.cpu.cr0 |= cr0::AM;
    bed.cpu.rflags |= flags::AC;
    bed.cpu.gpr[gpr::RSI] = DATA;
    bed.cpu.gpr[gpr::RDI] = 0x4000_0000;
    bed.put(DATA, &[0; 256]);
}

fn refused(bed: &mut Bed, vector: u64, programs: &[Program]) {
    for p in programs {
        checking(bed);
        eprintln!("{:x?}", p.bytes);
        bed.faults(p, vector, 0);
    }
}

fn allowed(bed: &mut Bed, programs: &[Program]) {
    for p in programs {
        checking(bed);
        bed.run(p);
        assert_eq!(bed.taken().vector, 0x50, "{:x?}", p.bytes);
    }
}

#[test]
fn operands_by_size() {
    both(Start::Long, |bed| {
        refused(
            bed,
            17,
            &[
                program!(64: ; "mov ax, [rsi + 1]"),
                program!(64: ; "add [rsi + 2], eax"),
                program!(64: ; "lock inc qword ptr [rsi + 4]"),
                program!(64: ; "movbe eax, [rsi + 1]"),
                program!(64: ; "bt dword ptr [rsi + 2], eax"),
                program!(64: ; "lock cmpxchg8b [rsi + 4]"),
                program!(64: ; "movnti [rsi + 2], eax"),
                program!(64: "sub rsp, 4"; "push rax"),
                program!(64: "sub rsp, 4"; "enter 0, 0"),
                program!(64: "lea rdi, [rsi + 64]", "add rsi, 2"; "movsd"),
                program!(64: ; "jmp [rsi + 4]"),
            ],
        );
        allowed(
            bed,
            &[
                program!(64: "mov al, [rsi + 1]", "mov eax, [rsi + 4]", "mov rax, [rsi + 8]", "lock inc word ptr [rsi + 2]", "int 0x50"),
                program!(64: "sidt [rsi + 17]", "lea rax, [rsi + 1]", "prefetcht0 [rsi + 1]", "int 0x50"),
            ],
        );
    });
}

#[test]
fn x87_and_vector_operands() {
    both(Start::Long, |bed| {
        refused(
            bed,
            17,
            &[
                program!(64: ; "fld qword ptr [rsi + 4]"),
                program!(64: ; "fld tbyte ptr [rsi + 4]"),
                program!(64: ; "fnstcw [rsi + 1]"),
                program!(64: ; "fnstenv [rsi + 2]"),
                program!(64: ; "fnsave [rsi + 2]"),
                program!(64: ; "paddb mm0, [rsi + 4]"),
                program!(64: ; "movss xmm0, [rsi + 2]"),
                program!(64: ; "movsd xmm0, [rsi + 4]"),
                program!(64: ; "vbroadcastss xmm0, [rsi + 1]"),
                program!(64: ; "pextrd [rsi + 1], xmm0, 0"),
                program!(64: ; "stmxcsr [rsi + 2]"),
                program!(64: "lea rdi, [rsi + 1]"; "maskmovdqu xmm1, xmm0"),
            ],
        );
        // Instructions that ask for alignment themselves: #GP.
        refused(
            bed,
            13,
            &[
                program!(64: ; "movaps xmm0, [rsi + 8]"),
                program!(64: ; "lock cmpxchg16b [rsi + 8]"),
                program!(64: ; "fxsave [rsi + 8]"),
                program!(64: "mov eax, 7", "xor edx, edx"; "xsave [rsi + 1]"),
            ],
        );
        allowed(
            bed,
            &[
                program!(64: "fld tbyte ptr [rsi + 8]", "fnstenv [rsi + 4]", "fnsave [rsi + 68]", "int 0x50"),
                program!(64: "vmovups ymm0, [rsi + 16]", "vpminuw ymm0, ymm0, [rsi + 16]", "vmovups [rsi + 48], ymm0", "int 0x50"),
                program!(64: "vmaskmovps xmm0, xmm0, [rsi + 1]", "vpcmpeqd xmm3, xmm3, xmm3", "vmaskmovps xmm0, xmm3, [rsi + 1]", "vmaskmovps [rsi + 1], xmm3, xmm0",
                "vpxor xmm1, xmm1, xmm1", "vpgatherdd xmm0, [rsi + xmm1 + 1], xmm3", "int 0x50"),
            ],
        );
    });
}

/// Measured on Zen 5, where 16 bytes are checked, also of 32; and on Emerald Rapids, where none are.
#[test]
fn operands_that_need_no_alignment() {
    let checked = HostVendor::detect() == HostVendor::Amd;
    both(Start::Long, |bed| {
        let programs = [
            program!(64: ; "movups xmm0, [rsi + 8]", "int 0x50"),
            program!(64: ; "movups [rsi + 1], xmm0", "int 0x50"),
            program!(64: ; "lddqu xmm0, [rsi + 1]", "int 0x50"),
            program!(64: ; "vmovups ymm0, [rsi + 1]", "int 0x50"),
            program!(64: ; "vpminuw ymm0, ymm0, [rsi + 8]", "int 0x50"),
            program!(64: ; "vaddps xmm0, xmm0, [rsi + 1]", "int 0x50"),
            program!(64: ; "pcmpistri xmm0, [rsi + 1], 0", "int 0x50"),
            program!(64: "lea rdi, [rsi + 8]"; "maskmovdqu xmm1, xmm0", "int 0x50"),
            program!(64: ; "vcvtph2ps xmm0, [rsi + 4]", "int 0x50"),
            program!(64: ; "vcvtps2ph [rsi + 4], xmm0, 0", "int 0x50"),
        ];
        if checked {
            refused(bed, 17, &programs)
        } else {
            allowed(bed, &programs)
        }
        allowed(bed, &[program!(64: "movups xmm0, [rsi + 16]", "vmovups ymm0, [rsi + 16]", "int 0x50")]);
    });
}

/// A store that an unmasked error suppresses does not look at its operand.
#[test]
fn numeric_errors_come_first() {
    both(Start::Long, |bed| {
        checking(bed);
        // IM unmasked: minus infinity does not fit an integer.
        let p = program!(64: "fninit", "fld1", "fchs", "fldz", "fdivp st(1), st", "mov word ptr [rsi + 16], 0x37E", "fldcw [rsi + 16]",
            "fist dword ptr [rsi + 2]", "fnstsw ax", "int 0x50");
        bed.run(&p);
        assert_eq!(bed.taken().vector, 0x50);
        assert_eq!(bed.cpu.gpr[gpr::RAX] & 0x81, 0x81);
    });
}

#[test]
fn when_it_is_in_force() {
    both(Start::Long, |bed| {
        let p = program!(64: "mov eax, [rsi + 2]", "movups xmm0, [rsi + 1]", "int 0x50");
        // Not without AM, not without AC, not below CPL 3.
        for case in 0..3 {
            checking(bed);
            match case {
                0 => bed.cpu.cr0 &= !cr0::AM,
                1 => bed.cpu.rflags &= !flags::AC,
                _ => {
                    let rsi = bed.cpu.gpr[gpr::RSI];
                    bed.reset();
                    bed.cpu.gpr[gpr::RSI] = rsi;
                    bed.cpu.cr0 |= cr0::AM;
                    bed.cpu.rflags |= flags::AC;
                }
            }
            bed.run(&p);
            assert_eq!(bed.taken().vector, 0x50, "case {case}");
        }
        // Before the page is looked at; behind non-canonical addresses.
        refused(bed, 17, &[program!(64: ; "mov eax, [rdi + 2]")]);
        refused(bed, 13, &[program!(64: "mov rdi, 0x800000000001"; "mov eax, [rdi]")]);
        // The program turns it on and off by itself.
        checking(bed);
        bed.cpu.rflags &= !flags::AC;
        bed.run(&program!(64: "mov eax, [rsi + 2]", "pushfq", "or dword ptr [rsp], 0x40000", "popfq", "mov eax, [rsi + 4]", "pushfq", "and dword ptr [rsp], ~0x40000", "popfq",
            "mov eax, [rsi + 2]", "pushfq", "or dword ptr [rsp], 0x40000", "popfq", "mov eax, [rsi + 1]", "int 0x50"));
        assert_eq!((bed.taken().vector, bed.taken().error), (17, Some(0)));
        // The handler runs with AC still set in EFLAGS, but at CPL 0.
        assert_ne!(bed.cpu.rflags & flags::AC, 0);
    });
    both(Start::Protected, |bed| {
        checking(bed);
        bed.faults(&program!(32: "mov esi, 0x200000"; "les eax, [esi + 2]"), 17, 0);
        checking(bed);
        bed.faults(&program!(32: "sub esp, 2"; "push eax"), 17, 0);
        checking(bed);
        bed.faults(&program!(32: "sub esp, 2"; "pushad"), 17, 0);
        // The top of the stack that ENTER leaves.
        checking(bed);
        bed.faults(&program!(32: ; "enter 1, 0"), 17, 0);
        // Each side of a repetition, from its first element.
        for (from, to) in [(1, 64), (0, 65)] {
            checking(bed);
            bed.cpu.gpr[gpr::RSI] += from;
            bed.cpu.gpr[gpr::RDI] = bed.cpu.gpr[gpr::RSI] - from + to;
            bed.faults(&program!(32: "mov ecx, 8"; "rep movsd"), 17, 0);
            assert_eq!(bed.cpu.gpr[gpr::RCX], 8);
        }
        checking(bed);
        bed.cpu.gpr[gpr::RDI] = bed.cpu.gpr[gpr::RSI] + 1;
        bed.faults(&program!(32: "mov ecx, 8"; "rep stosd"), 17, 0);
        assert_eq!(bed.cpu.gpr[gpr::RCX], 8);
    });
}

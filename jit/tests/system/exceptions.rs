//! Every exception that instructions raise: vector, error code, pushed RIP and flags (SDM 3A, 6.15).

use crate::bed::{CODE, DATA, HANDLERS, IDT, IST_STACK, STACK, Start, USER_STACK, both, sel};
use paravane_cpu::{Exit, cr0, cr4, flags, gpr};

#[test]
fn divide_errors() {
    for start in [Start::Protected, Start::Pae, Start::Compat, Start::Real] {
        both(start, |bed| {
            if start == Start::Real {
                bed.faults(&program!(16: "xor dx, dx", "mov ax, 5", "xor cx, cx"; "div cx"), 0, None);
            } else {
                bed.faults(&program!(32: "mov edx, 1", "mov eax, 5", "mov ecx, 1"; "div ecx"), 0, None);
                bed.faults(&program!(32: "mov eax, 5"; "aam 0"), 0, None);
            }
        });
    }
    both(Start::Long, |bed| {
        bed.faults(&program!(64: "mov edx, 7", "mov eax, 5", "xor ecx, ecx"; "div rcx"), 0, None);
        assert_eq!((bed.cpu.gpr[gpr::RAX], bed.cpu.gpr[gpr::RDX]), (5, 7));
        let overflow = program!(64: "mov edx, -1", "mov rdx, -1", "mov rax, 1", "shl rax, 63", "mov rcx, -1";
            "idiv rcx");
        bed.faults(&overflow, 0, None);
        bed.faults(
            &program!(64: "mov esi, 0x200000", "mov dword ptr [rsi], 0"; "idiv dword ptr [rsi]"),
            0,
            None,
        );
    });
}

#[test]
fn software_interrupts_push_the_next_address() {
    both(Start::Protected, |bed| {
        for v in [3, 4] {
            bed.gate(v, 14, 0, HANDLERS + v * 16);
        }
        bed.run(&program!(32: "nop", "int3"));
        let t = bed.taken();
        assert_eq!((t.vector, t.rip, t.cs), (3, CODE + 2, u64::from(sel::CODE32)));
        bed.reset();
        bed.run(&program!(32: "mov al, 0x7F", "add al, 1", "into"));
        let t = bed.taken();
        assert_eq!((t.vector, t.rip), (4, CODE + 5));
        assert_eq!(t.flags & flags::OF, flags::OF);
        bed.reset();
        bed.finish(&program!(32: "xor eax, eax", "into"));
        bed.reset();
        bed.run(&program!(32: "int 0x42"));
        assert_eq!((bed.taken().vector, bed.taken().rip), (0x42, CODE + 2));
        bed.reset();
        bed.run(&program!(32: ".byte 0xF1"));
        assert_eq!((bed.taken().vector, bed.taken().rip), (1, CODE + 1));
    });
}

#[test]
fn bound_ranges() {
    both(Start::Protected, |bed| {
        bed.put32(DATA, (-5i32) as u32);
        bed.put32(DATA + 4, 9);
        let ok = program!(32: "mov eax, -5", "bound eax, [0x200000]", "mov eax, 9", "bound eax, [0x200000]");
        bed.finish(&ok);
        bed.reset();
        bed.faults(&program!(32: "mov eax, 10"; "bound eax, [0x200000]"), 5, None);
        bed.reset();
        bed.faults(&program!(32: "mov eax, -6"; "bound eax, [0x200000]"), 5, None);
    });
}

#[test]
fn undefined_instructions() {
    both(Start::Long, |bed| {
        bed.faults(&program!(64: "nop"; "ud2"), 6, None);
        bed.faults(&program!(64: ; ".byte 0x06"), 6, None); // PUSH ES
        bed.faults(&program!(64: ; ".byte 0xF0, 0x90"), 6, None); // LOCK NOP
        bed.faults(&program!(64: ; ".byte 0xF0, 0x01, 0xC3"), 6, None); // LOCK ADD EBX, EAX
        bed.faults(&program!(64: "swapgs", "swapgs"; ".byte 0xEA"), 6, None); // JMP far, immediate
    });
}

#[test]
fn device_not_available() {
    both(Start::Long, |bed| {
        bed.finish(&program!(64: "movaps xmm0, xmm1", "fld1", "fwait"));
        bed.reset();
        bed.cpu.cr0 |= cr0::TS;
        bed.faults(&program!(64: ; "movaps xmm0, xmm1"), 7, None);
        bed.faults(&program!(64: ; "fld1"), 7, None);
        bed.faults(&program!(64: ; "fwait"), 7, None);
        bed.faults(
            &program!(64: "mov rax, cr0", "and al, 0xF5", "mov cr0, rax", "or al, 8", "mov cr0, rax", "fwait";
            "fld1"),
            7,
            None,
        );
        bed.reset();
        bed.cpu.cr0 |= cr0::EM;
        bed.faults(&program!(64: ; "fld1"), 7, None);
        bed.faults(&program!(64: ; "movaps xmm0, xmm1"), 6, None);
        bed.reset();
        bed.cpu.cr4 &= !cr4::OSFXSR;
        bed.faults(&program!(64: ; "movaps xmm0, xmm1"), 6, None);
        bed.reset();
        bed.cpu.cr4 &= !cr4::OSXSAVE;
        bed.faults(&program!(64: ; "vaddps ymm0, ymm0, ymm0"), 6, None);
        bed.faults(&program!(64: ; "xgetbv"), 6, None);
    });
}

#[test]
fn x87_errors_wait_for_the_next_instruction() {
    both(Start::Long, |bed| {
        let program = program!(64: "fninit", "push 0x37B", "fldcw [rsp]", "fld1", "fldz", "fdivp"; "fld1");
        bed.faults(&program, 16, None);
        bed.faults(
            &program!(64: "fninit", "push 0x37B", "fldcw [rsp]", "fld1", "fldz", "fdivp"; "fwait"),
            16,
            None,
        );
        bed.reset();
        bed.finish(
            &program!(64: "fninit", "push 0x37B", "fldcw [rsp]", "fld1", "fldz", "fdivp", "fnclex", "fld1"),
        );
    });
}

#[test]
fn simd_floating_point_errors() {
    both(Start::Long, |bed| {
        let text = program!(64: "push 0x1D80", "ldmxcsr [rsp]", "mov eax, 0x3F800000", "movd xmm0, eax", "xorps xmm1, xmm1";
            "divss xmm0, xmm1");
        bed.faults(&text, 19, None);
        assert_eq!(bed.cpu.fpu.mxcsr(), 0x1D84, "ZE is set, ZM is clear");
        bed.reset();
        bed.cpu.cr4 &= !cr4::OSXMMEXCPT;
        bed.faults(&text, 6, None);
    });
}

#[test]
fn segments_not_present_and_bad_selectors() {
    for start in [Start::Protected, Start::Compat] {
        both(start, |bed| {
            bed.gdt(sel::FREE, 0x00CF_1300_0000_FFFF); // not present
            bed.faults(&program!(32: "mov eax, 0x58"; "mov ds, eax"), 11, 0x58);
            bed.faults(&program!(32: "mov eax, 0x59"; "mov ss, eax"), 13, 0x58);
            bed.faults(&program!(32: "mov eax, 0x58"; "mov ss, eax"), 12, 0x58);
            bed.faults(&program!(32: "xor eax, eax"; "mov ss, eax"), 13, 0);
            bed.faults(&program!(32: "mov eax, 0x1008"; "mov es, eax"), 13, 0x1008);
            bed.faults(&program!(32: "mov eax, 0x0C"; "mov es, eax"), 13, 0x0C);
            bed.faults(&program!(32: ; ".byte 0xEA", ".long 0", ".word 0"), 13, 0);
            bed.faults(&program!(32: ; ".byte 0xEA", ".long 0", ".word 0x18"), 13, 0x18);
            bed.faults(&program!(32: ; "mov cs, eax"), 6, None);
        });
    }
}

#[test]
fn interrupts_through_bad_gates() {
    both(Start::Protected, |bed| {
        bed.put64(IDT + 0x50 * 8, 0);
        bed.faults(&program!(32: ; "int 0x50"), 13, 0x50 * 8 + 2);
        bed.put64(IDT + 0x50 * 8, 0x0000_0E00_0008_0000); // not present
        bed.faults(&program!(32: ; "int 0x50"), 11, 0x50 * 8 + 2);
        bed.put64(IDT + 0x50 * 8, 0x0000_8E00_0000_0000); // null selector
        bed.faults(&program!(32: ; "int 0x50"), 13, 0);
        bed.user();
        bed.faults(&program!(32: ; "int 0x51"), 13, 0x51 * 8 + 2);
        bed.faults(&program!(32: ; "hlt"), 13, 0);
        bed.faults(&program!(32: ; "cli"), 13, 0);
        bed.faults(&program!(32: ; "in al, 0x60"), 13, 0);
        bed.faults(&program!(32: ; "mov eax, cr0"), 13, 0);
    });
}

#[test]
fn alignment_checks() {
    for start in [Start::Protected, Start::Long] {
        both(start, |bed| {
            bed.user();
            bed.cpu.cr0 |= cr0::AM;
            bed.cpu.rflags |= flags::AC;
            bed.cpu.gpr[gpr::RSI] = DATA;
            bed.gate(0x50, 14, 3, HANDLERS + 0x500);
            if start == Start::Long {
                bed.faults(
                    &program!(64: "mov eax, [rsi + 4]", "mov rax, [rsi + 8]"; "mov rax, [rsi + 4]"),
                    17,
                    0,
                );
                bed.faults(&program!(64: "movups xmm0, [rsi + 16]"; "mov [rsi + 1], ax"), 17, 0);
            } else {
                bed.faults(
                    &program!(32: "mov eax, [esi + 4]", "mov al, [esi + 1]"; "mov eax, [esi + 2]"),
                    17,
                    0,
                );
            }
            bed.cpu.rflags = flags::FIXED;
            bed.user();
            bed.cpu.gpr[gpr::RSI] = DATA;
            if start == Start::Long {
                bed.run(&program!(64: "mov rax, [rsi + 3]", "int 0x50"));
            } else {
                bed.run(&program!(32: "mov eax, [esi + 3]", "int 0x50"));
            }
            assert_eq!(bed.taken().vector, 0x50);
        });
    }
}

#[test]
fn general_protection_has_no_side_effects() {
    both(Start::Long, |bed| {
        bed.faults(&program!(64: "mov eax, 1", "shl rax, 62", "mov rcx, [0x200000]"; "mov cr4, rax"), 13, 0);
        bed.faults(&program!(64: "mov rax, cr0", "btr rax, 0"; "mov cr0, rax"), 13, 0); // PG without PE
        bed.faults(&program!(64: "mov ecx, 0x123456"; "rdmsr"), 13, 0);
        bed.faults(&program!(64: "mov ecx, 0xC0000080", "mov eax, -1", "mov edx, -1"; "wrmsr"), 13, 0);
    });
}

#[test]
fn unaligned_moves_that_are_allowed() {
    both(Start::Long, |bed| {
        bed.put64(DATA + 8, 0x1122_3344_5566_7788);
        bed.finish(&program!(64: "mov esi, 0x200001", "movdqu xmm0, [rsi + 7]", "movups [rsi + 0x30], xmm0",
            "vmovdqu ymm1, [rsi]", "vpaddd ymm2, ymm1, [rsi + 2]", "lddqu xmm3, [rsi]"));
        assert_eq!(bed.get64(DATA + 0x31), 0x1122_3344_5566_7788);
    });
}

#[test]
fn flags_pushed_by_faults_have_rf() {
    both(Start::Long, |bed| {
        let t = bed.faults(&program!(64: "stc", "std"; "ud2"), 6, None);
        assert_eq!(t.flags & (flags::RF | flags::CF | flags::DF), flags::RF | flags::CF | flags::DF);
        bed.reset();
        bed.run(&program!(64: "stc", "int3"));
        assert_eq!(bed.taken().flags & (flags::RF | flags::CF), flags::CF);
    });
}

#[test]
fn double_fault_by_the_interrupt_stack_table() {
    both(Start::Long, |bed| {
        bed.ist(8);
        // The stack is not there: the page fault cannot be pushed.
        let p = program!(64: "mov rsp, 0x40000000"; "push rax");
        let t = bed.faults(&p, 8, 0);
        assert_eq!((t.sp, bed.cpu.cr2), (0x4000_0000, 0x3FFF_FFF8));
        assert!(bed.cpu.gpr[gpr::RSP] < IST_STACK && bed.cpu.gpr[gpr::RSP] >= IST_STACK - 64);
        // A missing gate under a contributory fault.
        bed.reset();
        bed.put64(IDT + 13 * 16, 0);
        bed.put64(IDT + 11 * 16, 0);
        let t = bed.faults(&program!(64: "mov ecx, 0x123456"; "rdmsr"), 8, 0);
        assert_eq!(t.sp, STACK);
    });
}

#[test]
fn triple_fault_ends_the_run() {
    for start in [Start::Protected, Start::Long] {
        both(start, |bed| {
            bed.cpu.idtr.limit = 0;
            bed.load(&program!(64: "nop", "ud2"));
            assert_eq!(bed.go(), Exit::TripleFault);
        });
    }
}

#[test]
fn faults_in_user_code_switch_stacks() {
    both(Start::Long, |bed| {
        bed.user();
        let t = bed.faults(&program!(64: "stc"; "hlt"), 13, 0);
        assert_eq!((t.cs, t.ss, t.sp), (0x33, 0x2B, USER_STACK));
        assert_eq!(bed.cpu.gpr[gpr::RSP], STACK - 48);
        assert_eq!((bed.cpu.cpl, bed.cpu.seg[2].selector), (0, 0), "SS is null with RPL 0");
    });
    both(Start::Pae, |bed| {
        bed.user();
        let t = bed.faults(&program!(32: "stc"; "hlt"), 13, 0);
        assert_eq!((t.cs, t.ss, t.sp), (0x23, 0x2B, USER_STACK));
        assert_eq!(bed.cpu.gpr[gpr::RSP], STACK - 24);
    });
}

#[test]
fn vector_operands_must_be_aligned_and_valid() {
    both(Start::Long, |bed| {
        bed.faults(&program!(64: "mov esi, 0x200008"; "movaps xmm0, [rsi]"), 13, 0);
        bed.faults(&program!(64: "push -1"; "ldmxcsr [rsp]"), 13, 0);
        bed.faults(&program!(64: "mov esi, 0x200008"; "movaps [rsi], xmm0"), 13, 0);
        bed.faults(&program!(64: "mov esi, 0x200008"; "paddd xmm0, [rsi]"), 13, 0);
        bed.faults(&program!(64: "mov esi, 0x200008"; "vmovdqa ymm0, [rsi + 8]"), 13, 0);
        bed.faults(&program!(64: "mov esi, 0x200008"; "fxsave [rsi]"), 13, 0);
        bed.faults(&program!(64: "mov esi, 0x200008"; "cmpxchg16b [rsi]"), 13, 0);
    });
}

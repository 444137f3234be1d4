//! Interrupt and trap gates, privilege changes and every form of IRET (SDM 3A, 6.12 and 6.14).

use crate::bed::{CODE, DATA, HANDLERS, IST_STACK, STACK, Start, USER_STACK, both};
use paravane_cpu::{SegReg, flags, gpr};

#[test]
fn interrupt_gates_clear_if_and_trap_gates_do_not() {
    for start in [Start::Protected, Start::Long] {
        both(start, |bed| {
            bed.gate(0x40, 14, 0, HANDLERS + 0x400);
            bed.gate(0x41, 15, 0, HANDLERS + 0x410);
            for (vector, kept) in [(0x40, 0), (0x41, flags::IF)] {
                bed.reset();
                bed.cpu.rflags |= flags::IF | flags::CF;
                bed.run(&if vector == 0x40 { program!(64: "int 0x40") } else { program!(64: "int 0x41") });
                assert_eq!(bed.taken().vector, vector);
                assert_eq!(bed.taken().flags & (flags::IF | flags::CF), flags::IF | flags::CF);
                assert_eq!(bed.cpu.rflags & flags::IF, kept);
            }
        });
    }
}

#[test]
fn handlers_return_to_where_they_were_called() {
    both(Start::Long, |bed| {
        let handler = program!(64: "add r8, 1", "mov [0x200000], rsp", "iretq");
        bed.put(HANDLERS + 0x400, handler.bytes);
        bed.finish(&program!(64: "mov ecx, 1000", "mov rsp, 0x6FFF3", "2: stc", "int 0x40", "adc rbx, 0", "dec ecx", "jnz 2b"));
        assert_eq!((bed.cpu.gpr[gpr::R8], bed.cpu.gpr[gpr::RBX]), (1000, 1000));
        assert_eq!(bed.cpu.gpr[gpr::RSP], 0x6_FFF3);
        assert_eq!(bed.get64(DATA), 0x6_FFF0 - 40, "the stack is aligned to 16 before pushing");
    });
    both(Start::Protected, |bed| {
        let handler = program!(32: "add esi, 1", "iretd");
        bed.put(HANDLERS + 0x400, handler.bytes);
        bed.finish(&program!(32: "mov ecx, 1000", "2: stc", "int 0x40", "adc ebx, 0", "dec ecx", "jnz 2b"));
        assert_eq!((bed.cpu.gpr[gpr::RSI], bed.cpu.gpr[gpr::RBX]), (1000, 1000));
        assert_eq!(bed.cpu.gpr[gpr::RSP], STACK);
    });
}

#[test]
fn users_call_the_kernel_by_interrupt() {
    both(Start::Long, |bed| {
        bed.put(HANDLERS + 0x400, program!(64: "inc r8", "iretq").bytes);
        bed.gate(0x40, 15, 3, HANDLERS + 0x400);
        bed.gate(0x50, 14, 3, HANDLERS + 0x500);
        bed.user();
        bed.run(&program!(64: "mov ecx, 500", "2: push rcx", "int 0x40", "pop rcx", "dec ecx", "jnz 2b", "int 0x50"));
        let t = bed.taken();
        assert_eq!((bed.cpu.gpr[gpr::R8], t.vector, t.sp, t.cs, t.ss), (500, 0x50, USER_STACK, 0x33, 0x2B));
    });
    both(Start::Pae, |bed| {
        bed.put(HANDLERS + 0x400, program!(32: "inc esi", "iretd").bytes);
        bed.gate(0x40, 15, 3, HANDLERS + 0x400);
        bed.gate(0x50, 14, 3, HANDLERS + 0x500);
        bed.user();
        bed.run(&program!(32: "mov ecx, 500", "2: push ecx", "int 0x40", "pop ecx", "dec ecx", "jnz 2b", "int 0x50"));
        let t = bed.taken();
        assert_eq!((bed.cpu.gpr[gpr::RSI], t.vector, t.sp, t.cs, t.ss), (500, 0x50, USER_STACK, 0x23, 0x2B));
    });
}

#[test]
fn iret_to_compatibility_mode_and_back() {
    both(Start::Long, |bed| {
        bed.gate(0x50, 14, 3, HANDLERS + 0x500);
        bed.run(&program!(64: "push 0x2B", "push 0x78000", "push 0x202", "push 0x23", "lea rax, [rip + 2f]", "push rax", "iretq",
            ".code32", "2: mov ecx, 5", "3: .byte 0x40", "dec ecx", "jnz 3b", "push eax", "int 0x50", ".code64"));
        let t = bed.taken();
        assert_eq!((t.cs, t.ss, t.sp, t.flags & flags::IF), (0x23, 0x2B, USER_STACK - 4, flags::IF));
        // INC EAX five times, not REX.
        assert_eq!(bed.get32(USER_STACK - 4) as u64, bed.cpu.gpr[gpr::RAX]);
        assert_eq!(bed.cpu.gpr[gpr::RAX] & 0xF_0000, 0);
    });
}

#[test]
fn iret_checks_what_it_loads() {
    both(Start::Long, |bed| {
        let bad_cs = program!(64: "push 0x18", "push 0x70000", "push 2", "push 0x18", "push 0"; "iretq");
        bed.faults(&bad_cs, 13, 0x18);
        let null_cs = program!(64: "push 0x18", "push 0x70000", "push 2", "push 0", "push 0"; "iretq");
        bed.faults(&null_cs, 13, 0);
        let bad_ss = program!(64: "push 0x18", "push 0x70000", "push 2", "push 0x33", "push 0"; "iretq");
        bed.faults(&bad_ss, 13, 0x18);
        let high = program!(64: "push 0x18", "push 0x70000", "push 2", "push 0x10", "mov rax, 0x800000000000", "push rax"; "iretq");
        bed.faults(&high, 13, 0);
        bed.cpu.rflags |= flags::NT;
        bed.faults(&program!(64: ; "iretq"), 13, 0);
    });
}

#[test]
fn users_cannot_change_iopl_or_if_by_iret_and_popf() {
    both(Start::Long, |bed| {
        bed.gate(0x50, 14, 3, HANDLERS + 0x500);
        bed.user();
        bed.run(&program!(64: "push 0x2B", "push 0x78000", "push 0x3202", "push 0x33", "lea rax, [rip + 2f]", "push rax", "iretq", "2: int 0x50"));
        assert_eq!(bed.taken().flags & (flags::IF | flags::IOPL), 0);
        bed.reset();
        bed.user();
        bed.run(&program!(64: "push 0x3ED7", "popfq", "int 0x50"));
        assert_eq!(bed.taken().vector, 0x50);
        assert_eq!(bed.taken().flags & 0xFFFF & !flags::TF, 0x0CD7);
    });
}

#[test]
fn data_segments_of_the_kernel_are_nulled_on_the_way_out() {
    both(Start::Protected, |bed| {
        bed.gate(0x50, 14, 3, HANDLERS + 0x500);
        bed.run(&program!(32: "push 0x2B", "push 0x78000", "push 2", "push 0x23", ".byte 0x68", ".long 2f - 770b + 0x100000", "iretd", "2: int 0x50"));
        assert_eq!(bed.cpu.segment(SegReg::Ds).selector, 0);
        assert_eq!(bed.taken().sp, USER_STACK);
        bed.reset();
        bed.run(&program!(32: "push 0x2B", "push 0x78000", "push 2", "push 0x23", ".byte 0x68", ".long 2f - 770b + 0x100000", "iretd", "2: mov eax, [0x200000]"));
        let t = bed.taken();
        assert_eq!((t.vector, t.error), (13, Some(0)), "access by a null selector");
    });
}

#[test]
fn interrupt_stack_switch_to_a_missing_page() {
    both(Start::Long, |bed| {
        bed.gate(0x40, 14, 3, HANDLERS + 0x400);
        bed.ist(8);
        bed.put64(crate::bed::TSS + 4, 0x4000_0000);
        bed.user();
        let t = bed.faults(&program!(64: "nop"; "int 0x40"), 8, 0);
        assert_eq!((t.cs, t.rip), (0x33, CODE + 1));
        // Non-canonical: #SS(0), whose delivery fails likewise.
        bed.put64(crate::bed::TSS + 4, 0x8000_0000_0000_0000);
        bed.faults(&program!(64: "nop"; "int 0x40"), 8, 0);
    });
}

#[test]
fn sixteen_bit_gates_and_iret() {
    both(Start::Protected, |bed| {
        bed.gate(0x40, 6, 0, HANDLERS + 0x400);
        bed.run(&program!(32: "int 0x40"));
        assert_eq!(bed.cpu.gpr[gpr::RSP], STACK - 6);
        let frame = [0, 2, 4].map(|i| bed.get16(STACK - 6 + i));
        assert_eq!(frame, [2, 8, 2], "IP, CS, FLAGS: the upper half of EIP is lost");
    });
}

#[test]
fn real_mode_handlers_return() {
    both(Start::Real, |bed| {
        bed.put(HANDLERS + 0x400, program!(16: "inc si", "iret").bytes);
        bed.finish(
            &program!(16: "mov cx, 50", "2: stc", "int 0x40", "adc bx, 0", "call 4f", "loop 2b", "jmp 3f",
            "4: push cs", "push 0x1234", "add sp, 4", "ret", "3:"),
        );
        assert_eq!((bed.cpu.gpr[gpr::RSI], bed.cpu.gpr[gpr::RBX]), (50, 50));
        assert_eq!(bed.cpu.gpr[gpr::RSP], 0x7000);
    });
}

#[test]
fn iret_in_16_and_32_bit_forms() {
    both(Start::Protected, |bed| {
        // IRETW pops words: EIP is zero-extended, the upper half of EFLAGS stays.
        bed.put(0x9000, &[0xF4]);
        bed.run(&program!(32: "push 0x00089000", "sub esp, 2", "mov word ptr [esp], 0x9000", "mov word ptr [esp + 2], 8",
            "mov word ptr [esp + 4], 0xCD7", ".byte 0x66", "iretd"));
        assert_eq!(bed.cpu.rip, 0x9001);
        assert_eq!(bed.cpu.rflags & 0xFFFF, 0xCD7);
    });
    both(Start::Long, |bed| {
        // IRETD in 64-bit mode pops five double words.
        bed.gate(0x50, 14, 3, HANDLERS + 0x500);
        bed.run(&program!(64: "sub rsp, 20", "lea rax, [rip + 2f]", "mov [rsp], eax", "mov dword ptr [rsp + 4], 0x33",
            "mov dword ptr [rsp + 8], 0x202", "mov dword ptr [rsp + 12], 0x78000", "mov dword ptr [rsp + 16], 0x2B",
            "iretd", "2: int 0x50"));
        let t = bed.taken();
        assert_eq!((t.vector, t.cs, t.ss, t.sp), (0x50, 0x33, 0x2B, USER_STACK));
    });
}

#[test]
fn far_returns_to_the_outer_ring() {
    both(Start::Pae, |bed| {
        bed.gate(0x50, 14, 3, HANDLERS + 0x500);
        bed.run(&program!(32: "push 0x2B", "push 0x78000", "push 0", "push 0", "push 0x23", ".byte 0x68",
            ".long 2f - 770b + 0x100000", "retf 8", "2: int 0x50"));
        let t = bed.taken();
        assert_eq!((t.vector, t.cs, t.ss, t.sp), (0x50, 0x23, 0x2B, USER_STACK + 8));
        // To an inner ring: #GP.
        bed.reset();
        bed.user();
        bed.faults(&program!(32: "push 8", "push 0"; "retf"), 13, 8);
    });
}

#[test]
fn the_interrupt_stack_table_is_used_from_any_ring() {
    both(Start::Long, |bed| {
        bed.gate(0x40, 14, 3, HANDLERS + 0x400);
        bed.ist(0x40);
        bed.run(&program!(64: "int 0x40"));
        assert_eq!((bed.taken().sp, bed.cpu.gpr[gpr::RSP]), (STACK, IST_STACK - 40));
        bed.reset();
        bed.user();
        bed.run(&program!(64: "int 0x40"));
        assert_eq!((bed.taken().sp, bed.cpu.gpr[gpr::RSP]), (USER_STACK, IST_STACK - 40));
    });
}

//! Debug registers in detail: what can be written, I/O breakpoints, RF, BTF, traps that come together (SDM 3B, 17.2 to
//! 17.4; 3A, table 6-2).

use crate::bed::{CODE, DATA, HANDLERS, IDT, STACK, Start, TSS, both, pte};
use crate::debug::{BS, log, logged};
use paravane_cpu::{cr4, flags, gpr};

#[test]
fn fixed_and_reserved_bits() {
    both(Start::Long, |bed| {
        bed.finish(&program!(64: "xor eax, eax", "mov dr6, rax", "mov rbx, dr6", "mov dr7, rax", "mov rcx, dr7",
            "mov eax, -1", "mov dr6, rax", "mov rdx, dr6", "mov rsi, 0xFFFFDFFF", "mov dr7, rsi", "mov rsi, dr7", "mov dr7, rbp"));
        let g = bed.cpu.gpr;
        assert_eq!((g[gpr::RBX], g[gpr::RDX]), (0xFFFF_0FF0, 0xFFFF_EFFF));
        assert_eq!((g[gpr::RCX], g[gpr::RSI]), (0x400, 0xFFFF_07FF));
        bed.reset();
        // Addresses may be anything; DR6 and DR7 have 32 bits.
        bed.finish(&program!(64: "mov rax, 0x8000000000000001", "mov dr3, rax", "mov rbx, dr3"));
        assert_eq!(bed.cpu.gpr[gpr::RBX], 1 << 63 | 1);
        bed.faults(&program!(64: "mov rax, 0x100000000"; "mov dr6, rax"), 13, 0);
        bed.faults(&program!(64: "mov rax, 0x100000000"; "mov dr7, rax"), 13, 0);
        bed.user();
        bed.faults(&program!(64: ; "mov rax, dr0"), 13, 0);
        bed.faults(&program!(64: ; "mov dr7, rax"), 13, 0);
    });
}

#[test]
fn dr4_and_dr5_are_aliases_without_de() {
    both(Start::Protected, |bed| {
        // MOV EAX, DR4 / DR5; MOV DR5, EAX: 0F 21, 0F 23.
        bed.finish(&program!(32: ".byte 0x0F, 0x21, 0xE3", ".byte 0x0F, 0x21, 0xE9", "mov eax, 0x20000", ".byte 0x0F, 0x23, 0xE8", "mov edx, dr7"));
        let g = bed.cpu.gpr;
        assert_eq!((g[gpr::RBX], g[gpr::RCX], g[gpr::RDX]), (0xFFFF_0FF0, 0x400, 0x2_0400));
        bed.reset();
        bed.cpu.cr4 |= cr4::DE;
        bed.faults(&program!(32: ; ".byte 0x0F, 0x21, 0xE3"), 6, None);
        bed.faults(&program!(32: ; ".byte 0x0F, 0x23, 0xE8"), 6, None);
        // #UD comes before general detect.
        bed.cpu.dr[7] |= 1 << 13;
        bed.faults(&program!(32: ; ".byte 0x0F, 0x21, 0xE3"), 6, None);
    });
    both(Start::Long, |bed| {
        bed.faults(&program!(64: ; ".byte 0x44, 0x0F, 0x21, 0xC0"), 6, None); // MOV RAX, DR8
    });
}

#[test]
fn general_detect_is_a_fault_with_rf() {
    both(Start::Long, |bed| {
        bed.cpu.dr[7] |= 1 << 13;
        let t = bed.faults(&program!(64: "nop"; "mov dr1, rax"), 1, None);
        assert_eq!(t.flags & flags::RF, flags::RF);
    });
}

#[test]
fn io_breakpoints() {
    both(Start::Long, |bed| {
        log(bed);
        bed.cpu.cr4 |= cr4::DE;
        // DR0: port 42H, two bytes; DR1: port 50H, one byte.
        bed.cpu.dr[0] = 0x42;
        bed.cpu.dr[1] = 0x50;
        bed.cpu.dr[7] = 0x400 | 0b0101 | 0b0110 << 16 | 0b0010 << 20;
        let p = program!(64: ; "out 0x41, al", "in al, 0x43", "out 0x41, ax", "in al, 0x44", "mov edx, 0x4F", "out dx, ax", "out 0x51, al",
            "mov eax, [0x50]");
        bed.finish(&p);
        let a = p.at;
        assert_eq!(logged(bed), vec![(a + 4, 1), (a + 7, 1), (a + 16, 2)]);
        // Each iteration of a repetition traps, with RF set (17.3.1.1) and RIP at the instruction until the last.
        bed.cpu.gpr[gpr::R15] = DATA + 0x8000;
        let p = program!(64: "mov edx, 0x50", "mov esi, 0x200000", "mov ecx, 3"; "rep outsb");
        bed.finish(&p);
        assert_eq!(logged(bed), vec![(p.at, 2), (p.at, 2), (p.at + 2, 2)]);
        // Without CR4.DE the encoding means nothing.
        bed.cpu.gpr[gpr::R15] = DATA + 0x8000;
        bed.cpu.cr4 &= !cr4::DE;
        bed.finish(&program!(64: "out 0x50, al", "in al, 0x42"));
        assert_eq!(logged(bed), vec![]);
    });
}

#[test]
fn causes_add_up_in_dr6() {
    both(Start::Long, |bed| {
        // A data breakpoint and the single-step trap of one instruction; DR6 keeps what it had.
        bed.cpu.dr[0] = DATA;
        bed.cpu.dr[6] |= 1 << 3;
        bed.cpu.dr[7] = 0x400 | 1 | 0b1101 << 16;
        bed.cpu.rflags |= flags::TF;
        let p = program!(64: "mov dword ptr [0x200000], 7"; "nop");
        bed.run(&p);
        let t = bed.taken();
        assert_eq!((t.vector, t.rip, t.flags & flags::RF), (1, CODE + p.at, 0));
        assert_eq!(bed.cpu.dr[6], 0xFFFF_0FF0 | BS | 1 << 3 | 1);
        // INT1 changes nothing in DR6.
        bed.reset();
        bed.run(&program!(64: ".byte 0xF1"));
        assert_eq!((bed.taken().vector, bed.cpu.dr[6]), (1, 0xFFFF_0FF0));
    });
}

#[test]
fn a_data_breakpoint_of_mov_ss_waits_one_instruction() {
    both(Start::Long, |bed| {
        log(bed);
        bed.put16(DATA, 0x18);
        bed.cpu.dr[0] = DATA;
        bed.cpu.dr[7] = 0x400 | 1 | 0b0111 << 16;
        let p = program!(64: "mov esi, 0x200000"; "mov ss, [rsi]", "nop", "nop");
        bed.finish(&p);
        assert_eq!(logged(bed), vec![(p.at + 3, 1)], "behind the NOP");
    });
}

#[test]
fn repeated_strings_trap_at_the_iteration_that_hits() {
    both(Start::Long, |bed| {
        log(bed);
        bed.cpu.dr[0] = DATA + 2;
        bed.cpu.dr[7] = 0x400 | 1 | 0b0001 << 16;
        let p = program!(64: "mov edi, 0x200000", "mov ecx, 5"; "rep stosb", "nop");
        bed.finish(&p);
        assert_eq!(logged(bed), vec![(p.at, 1)]);
        // The pushed RF lets the rest run without an instruction breakpoint on it hitting again.
        bed.reset();
        bed.cpu.dr[0] = DATA + 2;
        bed.cpu.dr[7] = 0x400 | 1 | 0b0001 << 16;
        bed.put64(IDT + 16 + 8, 0);
        bed.gate(1, 14, 0, HANDLERS + 0x10);
        bed.run(&program!(64: "mov edi, 0x200000", "mov ecx, 5", "rep stosb"));
        let t = bed.taken();
        assert_eq!((t.vector, t.flags & flags::RF, bed.cpu.gpr[gpr::RCX]), (1, flags::RF, 2));
    });
}

#[test]
fn rf_is_for_one_instruction() {
    both(Start::Long, |bed| {
        log(bed);
        // IRET with RF set onto a breakpoint: no hit. POPF cannot set RF: a hit.
        let p = program!(64: "lea rax, [rip + 2f]", "mov dr0, rax", "mov eax, 0x401", "mov dr7, rax",
            "push 0x18", "push 0x70000", "push 0x10002", "push 0x10", "lea rax, [rip + 2f]", "push rax", "iretq",
            "nop"; "2: inc ebx", "cmp ebx, 2", "je 3f", "push 0x10002", "popfq", "jmp 2b", "3:");
        bed.finish(&p);
        assert_eq!(logged(bed), vec![(p.at, 1)], "only the second time");
        // A fault at the instruction pushes RF; the breakpoint itself does not.
        bed.reset();
        bed.gate(1, 14, 0, HANDLERS + 0x10);
        bed.cpu.dr[0] = CODE;
        bed.cpu.dr[7] = 0x401;
        assert_eq!(bed.faults(&program!(64: ; "ud2"), 1, None).flags & flags::RF, 0);
        bed.cpu.rflags |= flags::RF;
        bed.cpu.rip = CODE;
        bed.go();
        assert_eq!((bed.taken().vector, bed.taken().flags & flags::RF), (6, flags::RF));
    });
}

#[test]
fn an_instruction_breakpoint_comes_before_fetch_faults() {
    both(Start::Long, |bed| {
        bed.map(0x30_0000, 0, 0);
        bed.cpu.dr[2] = 0x30_0000;
        bed.cpu.dr[7] = 0x400 | 1 << 5;
        bed.run(&program!(64: "mov eax, 0x300000", "jmp rax"));
        assert_eq!((bed.taken().vector, bed.taken().rip), (1, 0x30_0000));
        assert_eq!(bed.cpu.dr[6] & 0xF, 4);
        bed.cpu.rflags |= flags::RF;
        bed.cpu.rip = 0x30_0000;
        bed.go();
        assert_eq!((bed.taken().vector, bed.taken().error), (14, Some(0x10)));
        bed.map(0x30_0000, 0x30_0000, pte::ALL);
    });
}

#[test]
fn branch_steps() {
    both(Start::Long, |bed| {
        log(bed);
        // The handler of `log`, then BTF on again, which the exception cleared.
        let at = HANDLERS + 0x2400;
        bed.put(at, program!(64: "push rax", "push rcx", "push rdx", "mov ecx, 0x1D9", "rdmsr", "or r14d, eax", "mov eax, 2", "xor edx, edx", "wrmsr",
            "pop rdx", "pop rcx", "pop rax", ".byte 0xE9", ".long 0xFFFFFBE2").bytes);
        bed.put32(at + 30, (HANDLERS as i32 + 0x2000 - (at as i32 + 34)) as u32);
        bed.gate(1, 14, 0, at);
        bed.finish(&program!(64: "mov ecx, 0x1D9", "mov eax, 2", "xor edx, edx", "wrmsr", "mov ebx, 2", "pushfq", "or dword ptr [rsp], 0x100", "popfq",
            "2: nop", "dec ebx", "jnz 2b", "test rsp, rsp", "jnz 5f", "5: call 3f", "jnz 4f", "3: ret", "4: pushfq", "and dword ptr [rsp], ~0x100", "popfq", "nop"));
        // JNZ taken once; JNZ to the next instruction; CALL; RET; JNZ taken.
        let steps = logged(bed);
        assert!(steps.iter().all(|s| s.1 == BS));
        let at: Vec<u64> = steps.iter().map(|s| s.0 - steps[0].0).collect();
        assert_eq!(at, [0, 10, 17, 15, 18]);
        assert_eq!(bed.cpu.gpr[14] & 2, 0, "#DB clears BTF");
        // Reserved bits of IA32_DEBUGCTL.
        bed.reset();
        bed.faults(&program!(64: "mov ecx, 0x1D9", "mov eax, 0x10000", "xor edx, edx"; "wrmsr"), 13, 0);
    });
}

/// The T bit of a TSS: #DB with DR6.BT before the new task's first instruction (SDM 3A, 7.2.1; 3B, 17.3.1.5).
#[test]
fn the_t_bit_of_a_task() {
    both(Start::Protected, |bed| {
        crate::tasks::second_task(bed);
        bed.put16(crate::tasks::TSS2 + 100, 1);
        bed.cpu.dr[7] |= 0b11;
        bed.run(&program!(32: "nop", ".byte 0x9A", ".long 0", ".word 0x68"));
        let t = bed.taken();
        assert_eq!((t.vector, t.rip), (1, u64::from(bed.get32(crate::tasks::TSS2 + 32))));
        assert_eq!(bed.cpu.dr[6] & 0xE00F, 1 << 15);
        assert_eq!(bed.cpu.dr[7] & 3, 2, "local enables end with the task, global ones do not");
        assert_eq!(bed.get32(TSS + 32), CODE as u32 + 8);
        assert_ne!(bed.cpu.gpr[gpr::RSP], STACK);
    });
}

/// Breakpoints are linear addresses: segment bases count, in every mode.
#[test]
fn breakpoints_are_linear_addresses() {
    both(Start::Real, |bed| {
        // The same byte by CS 0 and by CS 900H.
        let p = program!(16: ".byte 0xEA", ".word 2f - 770b", ".word 0x900"; "2: nop");
        bed.cpu.dr[0] = bed.code() + p.at;
        bed.cpu.dr[7] = 0x401;
        bed.run(&p);
        assert_eq!((bed.taken().vector, bed.taken().cs, bed.taken().rip), (1, 0x900, p.at));
        // A byte that is written through DS 2000H.
        bed.reset();
        bed.cpu.dr[1] = 0x2_0011;
        bed.cpu.dr[7] = 0x400 | 1 << 2 | 0b0001 << 20;
        let p = program!(16: "mov ax, 0x2000", "mov ds, ax", "mov [0x10], al", "mov [0x12], ax", "mov al, [0x11]", "mov [0x10], ax"; "nop");
        bed.run(&p);
        assert_eq!((bed.taken().vector, bed.taken().rip), (1, bed.code() + p.at));
        assert_eq!(bed.cpu.dr[6] & 0xE00F, 2);
    });
    both(Start::Protected, |bed| {
        bed.gdt(crate::bed::sel::FREE, crate::segments::descriptor(DATA, 0xFFFF, 0x4093));
        bed.cpu.dr[2] = DATA + 0x20;
        bed.cpu.dr[7] = 0x400 | 1 << 4 | 0b1111 << 24;
        let p = program!(32: "mov eax, 0x58", "mov fs, eax", "mov ecx, 3", "2: mov eax, [0x20]", "mov eax, fs:[0x24]", "mov eax, fs:[0x1C]", "dec ecx", "jnz 2b", "inc dword ptr fs:[0x20]"; "nop");
        bed.run(&p);
        assert_eq!((bed.taken().vector, bed.taken().rip, bed.cpu.dr[6] & 0xE00F), (1, CODE + p.at, 4));
    });
    both(Start::Protected, |bed| {
        // Virtual-8086 mode.
        bed.cpu.dr[0] = 0x9_0001;
        bed.cpu.dr[7] = 0x401;
        crate::tasks::v8086_with(bed, 0, program!(16: "nop", "nop").bytes);
        assert_eq!((bed.taken().vector, bed.taken().cs, bed.taken().rip), (1, 0x9000, 1));
    });
}

/// An instruction that faults has accessed nothing: its data breakpoint is not reported (SDM 3B, 17.2.4 and 17.3.1.2).
#[test]
fn no_trap_of_an_instruction_that_faults() {
    both(Start::Long, |bed| {
        bed.ist(14);
        bed.cpu.dr[0] = DATA;
        bed.cpu.dr[7] = 0x400 | 1 | 0b1111 << 16;
        bed.page_faults(
            &program!(64: "mov esi, 0x200000", "mov esp, 0x40000000"; "push [rsi]"),
            0x3FFF_FFF8,
            2,
        );
        assert_eq!(bed.cpu.dr[6] & 0xE00F, 0);
        bed.page_faults(&program!(64: "mov esi, 0x200000", "mov edi, 0x40000000"; "movsd"), 0x4000_0000, 2);
        assert_eq!(bed.cpu.dr[6] & 0xE00F, 0);
    });
}

/// Data breakpoints against accesses of every kind: read-modify-write, locked, wide, strings, the stack.
#[test]
fn data_breakpoints_by_kind_of_access() {
    both(Start::Long, |bed| {
        let cell = DATA + 0x48;
        for (p, reads, writes) in [
            (program!(64: ; "mov al, [rsi + 0x4B]"), true, false),
            (program!(64: ; "add [rsi + 0x44], rax"), true, true),
            (program!(64: ; "cmp [rsi + 0x44], rax"), true, false),
            (program!(64: ; "lock xadd [rsi + 0x48], eax"), true, true),
            (program!(64: ; "lock cmpxchg16b [rsi + 0x40]"), true, true),
            (program!(64: ; "bt dword ptr [rsi + 0x48], 3"), true, false),
            (program!(64: ; "movups [rsi + 0x3C], xmm0"), false, true),
            (program!(64: ; "vmovups [rsi + 0x2C], ymm0"), false, true),
            (program!(64: ; "vmovups ymm0, [rsi + 0x2C]"), true, false),
            (program!(64: ; "fld tbyte ptr [rsi + 0x40]"), true, false),
            (program!(64: ; "fxsave [rsi]"), false, true),
            (program!(64: ; "xchg rsp, rbx", "push rax", "xchg rsp, rbx"), false, true),
            (program!(64: ; "xchg rsp, rdi", "pop rax", "xchg rsp, rdi"), true, false),
            (program!(64: ; "lea rdi, [rsi + 0x44]", "mov ecx, 2", "rep stosd"), false, true),
            (
                program!(64: ; "lea rdi, [rsi + 0x100]", "lea rsi, [rsi + 0x44]", "mov ecx, 2", "rep movsd"),
                true,
                false,
            ),
            (program!(64: ; "movnti [rsi + 0x48], eax"), false, true),
        ] {
            // Writes, then reads and writes, of four bytes.
            for (kind, hits) in [(0b1101u64, writes), (0b1111, reads || writes)] {
                bed.reset();
                bed.gate(1, 14, 0, HANDLERS + 0x10);
                bed.cpu.gpr[gpr::RSI] = DATA;
                bed.cpu.gpr[gpr::RBX] = cell + 8;
                bed.cpu.gpr[gpr::RDI] = cell;
                bed.cpu.dr[3] = cell;
                bed.cpu.dr[7] = 0x400 | 1 << 6 | kind << 28;
                bed.load(&p);
                bed.go();
                let note = format!("{:x?} {kind:b}", p.bytes);
                if hits {
                    assert_eq!((bed.taken().vector, bed.cpu.dr[6] & 0xE00F), (1, 8), "{note}");
                } else {
                    assert_eq!(
                        (bed.cpu.rip, bed.cpu.dr[6] & 0xF),
                        (CODE + p.bytes.len() as u64, 0),
                        "{note}"
                    );
                }
            }
        }
        // Neighbours.
        for p in [
            program!(64: ; "mov eax, [rsi + 0x44]", "mov [rsi + 0x4C], eax", "mov [rsi + 0x40], rax", "movups [rsi + 0x38], xmm0", "vmovups [rsi + 0x4C], ymm0"),
            program!(64: ; "fstp tbyte ptr [rsi + 0x3E]", "lock inc dword ptr [rsi + 0x44]", "mov byte ptr [rsi + 0x47], 1"),
        ] {
            bed.reset();
            bed.cpu.gpr[gpr::RSI] = DATA;
            bed.cpu.dr[3] = cell;
            bed.cpu.dr[7] = 0x400 | 1 << 6 | 0b1111 << 28;
            bed.finish(&p);
            assert_eq!(bed.cpu.dr[6] & 0xF, 0);
        }
    });
}

/// SYSENTER leaves TF: the trap comes at the kernel's first instruction (SDM 2B, SYSENTER: only VM and IF are cleared).
#[test]
fn single_step_over_sysenter() {
    both(Start::Pae, |bed| {
        bed.cpu.msr.sysenter_cs = 8;
        bed.cpu.msr.sysenter_esp = STACK;
        bed.cpu.msr.sysenter_eip = CODE + 0x800;
        bed.put(CODE + 0x800, &[0x90, 0xF4]);
        bed.user();
        bed.cpu.rflags |= flags::TF;
        bed.run(&program!(32: "sysenter"));
        let t = bed.taken();
        assert_eq!((t.vector, t.cs, t.rip, bed.cpu.dr[6] & 0xE00F), (1, 8, CODE + 0x800, BS));
    });
}

/// HLT under TF: the single-step trap ends it (SDM 2A, HLT: "a debug exception" resumes execution).
#[test]
fn single_step_ends_hlt() {
    for start in [Start::Long, Start::Protected] {
        both(start, |bed| {
            bed.cpu.rflags |= flags::TF;
            bed.put(bed.code(), &[0xF4, 0x90]);
            bed.cpu.rip = bed.code();
            bed.go();
            let t = bed.taken();
            assert_eq!((t.vector, t.rip, bed.cpu.dr[6] & 0xE00F), (1, CODE + 1, BS));
        });
    }
}

/// A data breakpoint of MOV SS is held back over SYSCALL and SYSENTER too: #DB comes at the kernel's first instruction
/// (SDM 3A, 6.8.3).
#[test]
fn a_trap_held_back_over_system_calls() {
    let prepare = |bed: &mut crate::bed::Bed| {
        bed.user();
        bed.put16(DATA, crate::bed::sel::USER_DATA);
        bed.put(CODE + 0x800, &[0xF4]);
        bed.cpu.dr[0] = DATA;
        bed.cpu.dr[7] = 0x400 | 1 | 0b0111 << 16;
    };
    both(Start::Long, |bed| {
        prepare(bed);
        bed.cpu.msr.star = 0x0023_0010 << 32;
        bed.cpu.msr.lstar = CODE + 0x800;
        bed.ist(1);
        bed.run(&program!(64: "mov esi, 0x200000", "mov ss, [rsi]", "syscall"));
        let t = bed.taken();
        assert_eq!((t.vector, t.cs, t.rip, bed.cpu.dr[6] & 0xE00F), (1, 0x10, CODE + 0x800, 1));
    });
    both(Start::Protected, |bed| {
        prepare(bed);
        bed.cpu.msr.sysenter_cs = 8;
        bed.cpu.msr.sysenter_esp = STACK;
        bed.cpu.msr.sysenter_eip = CODE + 0x800;
        bed.run(&program!(32: "mov esi, 0x200000", "mov ss, [esi]", "sysenter"));
        let t = bed.taken();
        assert_eq!((t.vector, t.cs, t.rip, bed.cpu.dr[6] & 0xE00F), (1, 8, CODE + 0x800, 1));
    });
}

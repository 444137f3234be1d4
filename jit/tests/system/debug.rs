//! Single-stepping and debug registers (SDM 3B, chapter 17).

use crate::bed::{Bed, CODE, DATA, HANDLERS, Start, both};
use paravane_cpu::{flags, gpr};

/// A #DB handler that logs the pushed RIP at [R15] and DR6 at [R15 + 8], clears DR6, sets RF and returns.
pub fn log(bed: &mut Bed) {
    bed.put(HANDLERS + 0x2000, program!(64: "push rax", "mov rax, [rsp + 8]", "mov [r15], rax", "mov rax, dr6", "mov [r15 + 8], rax",
        "add r15, 16", "mov eax, 0xFFFF0FF0", "mov dr6, rax", "or dword ptr [rsp + 24], 0x10000", "pop rax", "iretq").bytes);
    bed.gate(1, 14, 0, HANDLERS + 0x2000);
    bed.cpu.gpr[gpr::R15] = DATA + 0x8000;
}

/// The logged addresses relative to the program, and causes.
pub fn logged(bed: &Bed) -> Vec<(u64, u64)> {
    let n = (bed.cpu.gpr[gpr::R15] - DATA - 0x8000) / 16;
    let at = |i| DATA + 0x8000 + i * 16;
    (0..n).map(|i| (bed.get64(at(i)).wrapping_sub(CODE), bed.get64(at(i) + 8) & 0xE00F)).collect()
}

pub const BS: u64 = 1 << 14;

#[test]
fn single_step_over_a_loop() {
    both(Start::Long, |bed| {
        log(bed);
        // PUSHFQ; OR [RSP], TF; POPFQ: the instruction after POPFQ is the first that traps.
        let p = program!(64: "mov ecx, 2", "pushfq", "or dword ptr [rsp], 0x100", "popfq"; "2: dec ecx", "jnz 2b", "pushfq", "and dword ptr [rsp], ~0x100", "popfq", "nop");
        bed.finish(&p);
        let a = p.at;
        let want = [a + 2, a, a + 2, a + 4, a + 5, a + 12, a + 13].map(|at| (at, BS));
        assert_eq!(logged(bed), want);
    });
}

#[test]
fn single_step_over_mov_ss_and_repeats() {
    both(Start::Long, |bed| {
        log(bed);
        let p = program!(64: "mov eax, 0x18", "mov edi, 0x200000", "mov ecx, 3", "pushfq", "or dword ptr [rsp], 0x100", "popfq";
            "mov ss, eax", "nop", "rep stosb", "pushfq", "and dword ptr [rsp], ~0x100", "popfq");
        bed.finish(&p);
        let a = p.at;
        // No trap between MOV SS and the instruction behind it; REP traps after every iteration.
        let want = [a + 3, a + 3, a + 3, a + 5, a + 6, a + 13, a + 14];
        assert_eq!(logged(bed).iter().map(|l| l.0).collect::<Vec<_>>(), want);
    });
}

#[test]
fn single_step_into_an_interrupt_and_a_fault() {
    both(Start::Long, |bed| {
        log(bed);
        bed.put(HANDLERS + 0x400, program!(64: "nop", "iretq").bytes);
        let p = program!(64: "pushfq", "or dword ptr [rsp], 0x100", "popfq"; "int 0x40", "nop", "pushfq", "and dword ptr [rsp], ~0x100", "popfq");
        bed.finish(&p);
        let a = p.at;
        // INT clears TF and traps only after IRET restored it... which then traps after the next instruction.
        let at: Vec<u64> = logged(bed).iter().map(|l| l.0).collect();
        assert_eq!(at, [a + 3, a + 4, a + 11, a + 12]);
    });
}

#[test]
fn pushed_flags_have_tf() {
    both(Start::Long, |bed| {
        bed.cpu.rflags |= flags::TF;
        bed.run(&program!(64: "nop"; "nop"));
        let t = bed.taken();
        assert_eq!((t.vector, t.rip, t.flags & flags::TF, t.flags & flags::RF), (1, CODE + 1, flags::TF, 0));
        assert_eq!((bed.cpu.rflags & flags::TF, bed.cpu.dr[6] & 0xE00F), (0, BS));
    });
    both(Start::Protected, |bed| {
        bed.cpu.rflags |= flags::TF;
        bed.run(&program!(32: "nop"; "nop"));
        assert_eq!((bed.taken().vector, bed.taken().rip), (1, CODE + 1));
    });
    both(Start::Real, |bed| {
        bed.cpu.rflags |= flags::TF;
        bed.run(&program!(16: "nop"; "nop"));
        assert_eq!((bed.taken().vector, bed.taken().rip), (1, bed.code() + 1));
    });
}

#[test]
fn execution_breakpoints() {
    both(Start::Long, |bed| {
        log(bed);
        let p = program!(64: "lea rax, [rip + 2f]", "mov dr1, rax", "mov eax, 0x404", "mov dr7, rax", "mov ecx, 5", "8: nop"; "2: inc rbx", "dec ecx", "jnz 8b", "xor eax, eax", "mov dr7, rax");
        bed.finish(&p);
        assert_eq!(bed.cpu.gpr[gpr::RBX], 5, "RF lets the instruction run after its breakpoint");
        assert_eq!(logged(bed), vec![(p.at, 2); 5]);
    });
}

#[test]
fn data_breakpoints() {
    both(Start::Long, |bed| {
        log(bed);
        // DR0: writes of 4 bytes at DATA; DR2: reads or writes of 8 bytes at DATA + 40H.
        let p = program!(64: "mov esi, 0x200000", "mov ecx, 3", "8: mov [rsi], ecx", "mov eax, [rsi + 0x40]", "dec ecx", "jnz 8b",
            "mov dr0, rsi", "lea rax, [rsi + 0x40]", "mov dr2, rax", "mov eax, 0x0B0D0411", "mov dr7, rax";
            "mov eax, [rsi]", "mov [rsi + 2], cx", "mov [rsi + 4], ecx", "mov eax, [rsi + 0x44]", "movups [rsi + 0x3F], xmm0", "mov [rsi - 1], ax", "mov al, [rsi + 0x48]",
            "push qword ptr [rsi + 0x41]", "xor eax, eax", "mov dr7, rax");
        bed.finish(&p);
        let a = p.at;
        // Traps: RIP is behind the access.
        assert_eq!(logged(bed), vec![(a + 6, 1), (a + 12, 4), (a + 16, 4), (a + 20, 1), (a + 26, 4)]);
    });
}

#[test]
fn general_detect() {
    both(Start::Long, |bed| {
        bed.cpu.dr[7] |= 1 << 13;
        bed.faults(&program!(64: "nop"; "mov rax, dr0"), 1, None);
        assert_eq!(bed.cpu.dr[6] & 0xE00F, 1 << 13);
        assert_eq!(bed.cpu.dr[7] & 1 << 13, 0);
    });
}

#[test]
fn single_step_over_syscall() {
    both(Start::Long, |bed| {
        log(bed);
        // SFMASK clears TF: no trap in the kernel; SYSRET restores TF from R11 and traps at the user's next instruction.
        bed.cpu.msr.star = 0x0023_0010 << 32;
        bed.cpu.msr.lstar = CODE + 0x800;
        bed.cpu.msr.sfmask = flags::TF;
        bed.put(CODE + 0x800, program!(64: "inc r8", "sysretq").bytes);
        bed.gate(0x50, 14, 3, HANDLERS + 0x500);
        bed.user();
        bed.cpu.gpr[gpr::R15] = DATA + 0x8000;
        let p = program!(64: "pushfq", "or dword ptr [rsp], 0x100", "popfq"; "syscall", "nop", "int 0x50");
        bed.run(&p);
        assert_eq!((bed.taken().vector, bed.cpu.gpr[gpr::R8]), (0x50, 1));
        let at: Vec<u64> = logged(bed).iter().map(|l| l.0).collect();
        assert_eq!(at, [p.at + 3]);
    });
}

#[test]
fn single_step_in_32_bit_code_and_at_cpl_3() {
    both(Start::Pae, |bed| {
        // The handler counts and returns; INT 50H ends it.
        bed.put(HANDLERS + 0x2000, program!(32: "inc dword ptr ss:[0x208000]", "iretd").bytes);
        bed.gate(1, 14, 0, HANDLERS + 0x2000);
        bed.gate(0x50, 14, 3, HANDLERS + 0x500);
        bed.user();
        bed.cpu.rflags |= flags::TF;
        bed.run(&program!(32: "mov ecx, 10", "2: dec ecx", "jnz 2b", "int 0x50"));
        assert_eq!((bed.taken().vector, bed.get32(DATA + 0x8000)), (0x50, 21));
        assert_eq!(bed.taken().flags & flags::TF, flags::TF);
        assert_eq!(bed.cpu.rflags & flags::TF, 0, "the gate clears it");
    });
}

#[test]
fn breakpoints_switch_on_and_off_under_translated_code() {
    both(Start::Long, |bed| {
        log(bed);
        // The same loop body without, with and again without a write breakpoint.
        let p = program!(64: "mov esi, 0x200000", "mov dr0, rsi", "mov r8d, 3", "8: mov ecx, 4", "2: mov [rsi], ecx"; "dec ecx", "jnz 2b",
            "mov eax, 0xD0701", "cmp r8d, 3", "je 3f", "mov eax, 0x400", "3: mov dr7, rax", "dec r8d", "jnz 8b");
        bed.finish(&p);
        assert_eq!(logged(bed), vec![(p.at, 1); 4]);
    });
}

#[test]
fn icebp_and_int3_are_traps() {
    both(Start::Long, |bed| {
        bed.gate(1, 14, 0, HANDLERS + 0x10);
        bed.user();
        // INT1 asks for no privilege of its gate; INT3 does.
        bed.run(&program!(64: "nop", ".byte 0xF1"));
        assert_eq!((bed.taken().vector, bed.taken().rip), (1, CODE + 2));
        bed.reset();
        bed.user();
        bed.faults(&program!(64: "nop"; "int3"), 13, 3 * 8 + 2);
    });
}

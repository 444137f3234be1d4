//! IRETQ over and over, as translated code does it, and what ends that (SDM 2A, IRET; 3A, 6.14.3): each case changes the frame, a
//! flag, a segment or a descriptor in the middle of a loop of interrupts.

use crate::bed::{Bed, CODE, DATA, HANDLERS, Program, STACK, Start, USER_STACK, both, pte, sel};
use paravane_cpu::{Exit, SegReg, flags, gpr};

/// A handler that does something the sixteenth time.
macro_rules! handler {
    ($($line:literal),*) => {
        program!(64: "inc r9", "cmp ebx, 5", "jne 2f", $($line,)* "2: iretq")
    };
}

const RING: u64 = 0x50;

/// Interrupts at CPL 3, twenty of them, with `handler` at CPL 0; `r8` counts the returns.
fn loop_with(bed: &mut Bed, handler: &Program) {
    bed.gate(0x51, 14, 3, CODE + 0x800);
    bed.gate(RING, 14, 3, HANDLERS + RING * 16);
    bed.put(CODE + 0x800, handler.bytes);
    bed.reset();
    bed.user();
    bed.cpu.rflags |= flags::IF;
    bed.run(&program!(64: "mov ebx, 20", "2: stc", "int 0x51", "adc r8, 0", "dec ebx", "jnz 2b", "int 0x50"));
    // The interpreter does the first ones.
    assert!(bed.counter("interpreted.iretq").is_none_or(|n| n < 8));
}

#[test]
fn plain_returns() {
    both(Start::Long, |bed| {
        loop_with(bed, &handler!("nop"));
        let (t, g) = (bed.taken(), bed.cpu.gpr);
        assert_eq!((t.vector, g[gpr::R8], g[9]), (RING, 20, 20));
        assert_eq!((t.cs, t.ss, t.sp, t.flags & flags::IF), (0x33, 0x2B, USER_STACK, flags::IF));
        // What the frame says is done.
        loop_with(
            bed,
            &handler!(
                "btr dword ptr [rsp + 16], 0",
                "bts dword ptr [rsp + 16], 18",
                "sub qword ptr [rsp + 24], 64"
            ),
        );
        let (t, g) = (bed.taken(), bed.cpu.gpr);
        assert_eq!((t.vector, g[gpr::R8], t.sp, t.flags & flags::AC), (RING, 19, USER_STACK - 64, flags::AC));
    });
}

#[test]
fn frames_that_must_be_refused() {
    let cases: [(Program, u64, u32); 7] = [
        // Descriptors as they are now: CS not present, SS not writable.
        (handler!("btr dword ptr [0x1034], 15"), 11, 0x30),
        (handler!("btr dword ptr [0x102C], 9"), 13, 0x28),
        // Null selectors, one beyond the table, an address that is not canonical.
        (handler!("mov word ptr [rsp + 8], 0"), 13, 0),
        (handler!("mov word ptr [rsp + 32], 0"), 13, 0),
        (handler!("mov word ptr [rsp + 8], 0xFFFB"), 13, 0xFFF8),
        (handler!("bts qword ptr [rsp], 47"), 13, 0),
        // NT: nested tasks do not exist in long mode.
        (handler!("pushfq", "bts dword ptr [rsp], 14", "popfq"), 13, 0),
    ];
    for (n, (handler, vector, error)) in cases.into_iter().enumerate() {
        println!("case {n}");
        both(Start::Long, |bed| {
            loop_with(bed, &handler);
            let (t, g) = (bed.taken(), bed.cpu.gpr);
            assert_eq!((t.vector, t.error, t.cs), (vector, Some(error), u64::from(sel::CODE64)));
            // Nothing of the return was done.
            assert_eq!((g[gpr::R8], g[9]), (15, 16));
            let iret = bed.get16(t.rip);
            assert_eq!(iret, 0xCF48);
        });
    }
}

#[test]
fn returns_that_do_more() {
    both(Start::Long, |bed| {
        // A trap behind the next instruction.
        loop_with(bed, &handler!("bts dword ptr [rsp + 16], 8"));
        assert_eq!((bed.taken().vector, bed.cpu.gpr[gpr::R8], bed.taken().cs), (1, 16, 0x33));
    });
    both(Start::Long, |bed| {
        // CPL 3 cannot keep the data segment of CPL 0.
        loop_with(bed, &handler!("mov eax, 0x18", "mov ds, eax"));
        assert_eq!((bed.taken().vector, bed.cpu.gpr[gpr::R8]), (RING, 20));
        assert_eq!((bed.cpu.segment(SegReg::Ds).selector, bed.cpu.segment(SegReg::Es).selector), (0, 0x2B));
    });
    both(Start::Long, |bed| {
        // A frame on two pages.
        loop_with(
            bed,
            &handler!("mov rsi, rsp", "mov edi, 0x200FEC", "mov ecx, 10", "rep movsd", "mov esp, 0x200FEC"),
        );
        assert_eq!((bed.taken().vector, bed.cpu.gpr[gpr::R8], bed.taken().sp), (RING, 20, USER_STACK));
    });
    both(Start::Long, |bed| {
        // An interrupt that waits for IF comes first; it finds RF as the frame had it.
        bed.interrupt_at_port(0x60);
        loop_with(bed, &handler!("bts dword ptr [rsp + 16], 16", "out 0x80, al"));
        let t = bed.taken();
        assert_eq!((t.vector, t.cs, t.sp, bed.cpu.gpr[gpr::R8]), (0x60, 0x33, USER_STACK, 15));
        assert_eq!(t.flags & (flags::RF | flags::IF), flags::RF | flags::IF);
    });
    both(Start::Long, |bed| {
        // The return from an NMI lets in the next one.
        bed.nmi_at_port();
        bed.gate(0x51, 14, 0, CODE + 0x800);
        bed.put(CODE + 0x800, handler!("out 0x80, al", "hlt").bytes);
        bed.put(CODE + 0x900, program!(64: "inc r10", "iretq").bytes);
        bed.gate(2, 14, 0, CODE + 0x900);
        bed.run(&program!(64: "mov ebx, 20", "2: int 0x51", "dec ebx", "jnz 2b", "int 0x50"));
        assert_eq!((bed.cpu.gpr[9], bed.cpu.gpr[10], bed.cpu.nmi_blocked), (16, 1, false));
    });
    both(Start::Long, |bed| {
        // Behind the return CPL is 3: a page of the supervisor's is out of reach, and was not before.
        bed.map(DATA, DATA, pte::P | pte::RW);
        bed.gate(0x51, 14, 3, CODE + 0x800);
        bed.put(CODE + 0x800, program!(64: "inc dword ptr [0x200000]", "iretq").bytes);
        bed.user();
        bed.run(&program!(64: "mov ebx, 20", "2: int 0x51", "dec ebx", "jnz 2b", "mov eax, [0x200000]"));
        assert_eq!((bed.taken().vector, bed.taken().error, bed.get32(DATA)), (14, Some(5), 20));
    });
}

/// To the next instruction, as kernels do it to serialize. SS is null in handlers entered from CPL 3.
#[test]
fn returns_to_the_same_level() {
    both(Start::Long, |bed| {
        let code = program!(64: "mov ebx, 20", "2: mov eax, ss", "push rax", "push rsp", "add qword ptr [rsp], 8", "pushfq", "mov eax, cs",
            "push rax", "call 3f", "dec ebx", "jnz 2b", "mov ecx, ss", "int 0x50", "3: iretq");
        bed.run(&code);
        assert!(bed.counter("interpreted.iretq").is_none_or(|n| n < 4));
        assert_eq!((bed.taken().vector, bed.taken().sp, bed.cpu.gpr[gpr::RCX]), (RING, STACK, 0x18));
        bed.gate(0x51, 14, 3, CODE + 0x800);
        bed.put(CODE + 0x800, code.bytes);
        bed.user();
        bed.run(&program!(64: "int 0x51"));
        assert_eq!((bed.taken().vector, bed.taken().cs, bed.cpu.gpr[gpr::RCX]), (RING, 0x10, 0));
    });
    // The table moves, or another page takes its place: descriptors are those of now.
    both(Start::Long, |bed| {
        bed.put(DATA + 0x10, &0x00AF_1B00_0000_FFFF_u64.to_le_bytes());
        bed.put(DATA + 0x18, &0x00CF_9300_0000_FFFF_u64.to_le_bytes());
        bed.put16(DATA + 0x100, 0x7F);
        bed.put64(DATA + 0x102, DATA);
        bed.load(&program!(64: "mov ebx, 20", "2: cmp ebx, 5", "jne 4f", "lgdt [0x200100]", "4: mov eax, ss", "push rax", "push rsp",
            "add qword ptr [rsp], 8", "pushfq", "mov eax, cs", "push rax", "call 3f", "dec ebx", "jnz 2b", "int 0x50", "3: iretq"));
        // The gate of #NP needs the segment, too: a double fault, and shutdown.
        assert_eq!((bed.go(), bed.cpu.gpr[gpr::RBX]), (Exit::TripleFault, 5));
    });
}

/// A frame of zeros matches nothing that was loaded before: in the first IRETQ of all, nothing was.
#[test]
fn a_frame_of_zeros() {
    both(Start::Long, |bed| {
        bed.faults(&program!(64: "push 0", "push 0x78000", "push 2", "push 0", "push 0"; "iretq"), 13, 0);
    });
}

/// SS may hold what no table has: SYSCALL loads it by arithmetic. IRET reads the table, and beyond its limit there is nothing, the
/// second time as well as the first; null selectors name no descriptor, whatever lies in entry 0.
#[test]
fn segments_that_no_table_has() {
    both(Start::Long, |bed| {
        bed.cpu.gdtr.limit = sel::DATA - 1;
        let p = program!(64: "mov rax, rsp", "push 0x18", "push rax", "pushfq", "push 0x10", "lea rax, [rip + 2f]", "push rax"; "iretq", "2: nop");
        bed.faults(&p, 13, u32::from(sel::DATA));
    });
    both(Start::Long, |bed| {
        bed.gdt(0, 0x00CF_F300_0000_FFFF);
        bed.cpu.seg[SegReg::Ss as usize].selector = 3;
        let p = program!(64: "mov rax, rsp", "push 3", "push rax", "pushfq", "push 0x33", "lea rax, [rip + 2f]", "push rax"; "iretq", "2: nop");
        bed.faults(&p, 13, 0);
    });
}

//! Interrupts from outside, shadows, HLT and NMI (SDM 3A, 6.6 to 6.8).

use crate::bed::{CODE, DATA, HANDLERS, STACK, Start, both};
use paravane_cpu::{Attention, Exit, flags, gpr};

#[test]
fn an_interrupt_waits_for_if() {
    for start in [Start::Long, Start::Protected, Start::Compat] {
        both(start, |bed| {
            bed.interrupt_at_port(0x60);
            let p =
                program!(64: "out 0x80, al", "mov ecx, 1000", "2: dec ecx", "jnz 2b", "sti"; "nop", "nop");
            bed.run(&p);
            let t = bed.taken();
            assert_eq!(
                (t.vector, t.rip, bed.cpu.gpr[gpr::RCX]),
                (0x60, CODE + p.at + 1, 0),
                "one instruction after STI"
            );
            assert_eq!((t.flags & flags::IF, bed.cpu.rflags & flags::IF), (flags::IF, 0));
        });
    }
    both(Start::Real, |bed| {
        bed.interrupt_at_port(0x60);
        let p = program!(16: "out 0x80, al", "nop", "sti"; "nop", "nop");
        bed.run(&p);
        assert_eq!((bed.taken().vector, bed.taken().rip), (0x60, bed.code() + p.at + 1));
    });
}

#[test]
fn sti_cli_lets_nothing_in() {
    both(Start::Long, |bed| {
        bed.interrupt_at_port(0x60);
        bed.finish(&program!(64: "out 0x80, al", "sti", "cli", "mov ecx, 500", "2: dec ecx", "jnz 2b"));
    });
}

#[test]
fn mov_ss_holds_interrupts_back() {
    both(Start::Long, |bed| {
        bed.interrupt_at_port(0x60);
        // POPFQ enables interrupts without a shadow; MOV SS right behind it takes one only if not reached.
        let p =
            program!(64: "mov eax, 0x18", "out 0x80, al", "sti"; "mov ss, eax", "mov rsp, 0x6FF00", "nop");
        bed.run(&p);
        let t = bed.taken();
        assert_eq!((t.vector, t.rip, t.sp), (0x60, CODE + p.at + 9, 0x6_FF00));
    });
}

#[test]
fn popf_and_iret_enable_at_once() {
    both(Start::Long, |bed| {
        bed.interrupt_at_port(0x60);
        let p = program!(64: "out 0x80, al", "push 0x202", "popfq"; "nop");
        bed.run(&p);
        assert_eq!((bed.taken().vector, bed.taken().rip), (0x60, CODE + p.at));
    });
    both(Start::Long, |bed| {
        bed.interrupt_at_port(0x60);
        let p = program!(64: "out 0x80, al", "push 0x18", "push 0x70000", "push 0x202", "push 0x10", "lea rax, [rip + 2f]", "push rax", "iretq"; "2: nop");
        bed.run(&p);
        assert_eq!((bed.taken().vector, bed.taken().rip), (0x60, CODE + p.at));
    });
}

#[test]
fn hlt_wakes_by_interrupt_and_goes_on_behind() {
    both(Start::Long, |bed| {
        bed.put(HANDLERS + 0x600, program!(64: "inc r8", "iretq").bytes);
        bed.load(&program!(64: "sti", "hlt", "inc r9", "hlt", "inc r9"));
        assert_eq!(bed.go(), Exit::Halt);
        assert_eq!((bed.cpu.gpr[gpr::R8], bed.cpu.gpr[9]), (0, 0));
        assert_eq!(bed.wait(), Exit::Halt, "nothing came");
        assert_eq!(bed.cpu.rip, CODE + 2);
        for round in 1..3 {
            bed.board.pending.lock().expect("queue").push_back(0x60);
            bed.attention.set(Attention::INTERRUPT);
            assert_eq!(bed.wait(), Exit::Halt);
            assert_eq!((bed.cpu.gpr[gpr::R8], bed.cpu.gpr[9]), (round, round));
        }
    });
}

#[test]
fn interrupts_of_a_busy_loop() {
    // A loop without any exit must be left for an interrupt that arrives while it runs.
    both(Start::Long, |bed| {
        bed.put(HANDLERS + 0x600, program!(64: "mov r9d, 1", "iretq").bytes);
        bed.load(&program!(64: "sti", "2: test r9d, r9d", "jz 2b", "cli"));
        let (attention, board) = (bed.attention.clone(), bed.board.clone());
        let other = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            board.pending.lock().expect("queue").push_back(0x60);
            attention.set(Attention::INTERRUPT);
        });
        assert_eq!(bed.go(), Exit::Halt);
        other.join().expect("thread");
        assert_eq!(bed.cpu.gpr[9], 1);
        assert_eq!(bed.cpu.gpr[gpr::RSP], STACK);
    });
}

#[test]
fn interrupts_in_user_code_switch_stacks() {
    both(Start::Long, |bed| {
        bed.put(HANDLERS + 0x600, program!(64: "mov r9d, 1", "iretq").bytes);
        bed.gate(0x50, 14, 3, HANDLERS + 0x500);
        bed.user();
        bed.cpu.rflags |= flags::IF;
        bed.load(&program!(64: "2: test r9d, r9d", "jz 2b", "int 0x50"));
        let (attention, board) = (bed.attention.clone(), bed.board.clone());
        let other = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            board.pending.lock().expect("queue").push_back(0x60);
            attention.set(Attention::INTERRUPT);
        });
        assert_eq!(bed.go(), Exit::Halt);
        other.join().expect("thread");
        assert_eq!((bed.taken().vector, bed.cpu.gpr[9]), (0x50, 1));
    });
}

/// An interrupt between two iterations of a repetition: RIP at the instruction, registers as far as it came, RF set; behind the
/// last one it is like any other (SDM 3B, 17.3.1.1; 1, 7.3.9.2).
#[test]
fn interrupts_of_a_repetition() {
    let p = program!(64: "mov edx, 0x80", "mov esi, 0x200000"; "rep outsb");
    both(Start::Long, |bed| {
        for (count, left, rip, rf) in [(5, 4, CODE + p.at, flags::RF), (1, 0, CODE + p.at + 2, 0)] {
            bed.restore();
            bed.cpu.rflags |= flags::IF;
            bed.cpu.gpr[gpr::RCX] = count;
            bed.interrupt_at_port(0x60);
            bed.run(&p);
            let t = bed.taken();
            assert_eq!((t.vector, t.rip, t.flags & flags::RF), (0x60, rip, rf));
            assert_eq!((bed.cpu.gpr[gpr::RCX], bed.cpu.gpr[gpr::RSI]), (left, DATA + 1));
            // It goes on where it was.
            bed.put(HANDLERS + 0x601, program!(64: "iretq").bytes);
            bed.go();
            assert_eq!(bed.cpu.rip, CODE + p.bytes.len() as u64);
            assert_eq!((bed.cpu.gpr[gpr::RCX], bed.cpu.gpr[gpr::RSI]), (0, DATA + count));
        }
    });
}

/// Memory repetitions, translated or not, left by an interrupt that comes at any time.
#[test]
fn interrupts_of_a_long_repetition() {
    both(Start::Long, |bed| {
        let p = program!(64: "sti", "2: mov edi, 0x200000", "mov ecx, 0x180000"; "rep stosq", "jmp 2b");
        let copy = bed.mem.clone();
        bed.load(&p);
        let (attention, board) = (bed.attention.clone(), bed.board.clone());
        let other = std::thread::spawn(move || {
            // When the first round is under way.
            while copy.read_u64(paravane_memory::PhysAddr(0x20_1000)) != Ok(0x5A) {
                std::thread::yield_now();
            }
            board.interrupt(&attention, 0x60);
        });
        bed.cpu.gpr[gpr::RAX] = 0x5A;
        bed.go();
        other.join().expect("thread");
        let (t, left) = (bed.taken(), bed.cpu.gpr[gpr::RCX]);
        let inside = t.rip == CODE + p.at && left != 0x18_0000;
        assert_eq!(t.flags & flags::RF, if inside { flags::RF } else { 0 });
        if inside {
            assert_eq!(bed.cpu.gpr[gpr::RDI], 0x20_0000 + (0x18_0000 - left) * 8);
        }
    });
}

/// IRET lets NMIs in again even if it faults: the next one comes before the fault's handler (SDM 3A, 6.7.1).
#[test]
fn an_iret_that_faults_unblocks_nmis() {
    both(Start::Long, |bed| {
        bed.gate(2, 14, 0, CODE + 0x800);
        let handler = program!(64: "hlt", "pushfq", "or dword ptr [rsp], 0x4000", "popfq", "iretq");
        bed.put(CODE + 0x800, handler.bytes);
        bed.nmi_at_port();
        bed.load(&program!(64: "out 0x80, al", "nop"));
        bed.go();
        assert_eq!((bed.cpu.rip, bed.cpu.nmi_blocked), (CODE + 0x801, true));
        bed.attention.set(Attention::NMI);
        bed.go();
        assert_eq!(bed.cpu.rip, CODE + 0x801, "the second NMI");
        assert_eq!(bed.get64(bed.cpu.gpr[gpr::RSP]), HANDLERS + 0xD0, "before the handler of #GP");
    });
    both(Start::Protected, |bed| {
        // IRET in virtual-8086 mode with IOPL 0.
        bed.cpu.nmi_blocked = true;
        crate::tasks::v8086_with(bed, 0, program!(16: "iret").bytes);
        assert_eq!((bed.taken().vector, bed.taken().error, bed.cpu.nmi_blocked), (13, Some(0), false));
    });
}

#[test]
fn nmi_is_taken_with_if_clear_and_blocked_until_iret() {
    both(Start::Long, |bed| {
        bed.nmi_at_port();
        let p = program!(64: "out 0x80, al"; "mov ecx, 3", "2: dec ecx", "jnz 2b");
        bed.run(&p);
        assert_eq!((bed.taken().vector, bed.taken().rip), (2, CODE + p.at));
        assert!(bed.cpu.nmi_blocked);
        // Another one waits until IRET.
        bed.put(
            HANDLERS + 0x21,
            program!(64: "mov ecx, 100", "3: dec ecx", "jnz 3b", "inc r8", "iretq").bytes,
        );
        bed.attention.set(Attention::NMI);
        bed.put(HANDLERS + 0x20, &[0x90]);
        bed.go();
        assert_eq!(bed.cpu.rip, CODE + p.bytes.len() as u64);
        assert_eq!(bed.cpu.gpr[gpr::R8], 2);
        assert!(!bed.cpu.nmi_blocked);
    });
}

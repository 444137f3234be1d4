//! What a debugger asks of an engine: breakpoints that are in no memory, watched accesses, steps. Expected values follow from the
//! programs: which instruction touches which bytes.

use crate::bed::{Bed, CODE, DATA, HANDLERS, Start, both, pte};
use paravane_cpu::{DebugPlan, DebugStop, Exit, LinAddr, Space, WatchKind, Watchpoint, flags, gpr};

fn breaks(at: &[u64]) -> DebugPlan {
    DebugPlan { linear: at.iter().copied().collect(), ..DebugPlan::default() }
}

fn watch(space: Space, first: u64, len: u64, kind: WatchKind) -> DebugPlan {
    DebugPlan { watch: [Watchpoint { space, first, len, kind }].into(), ..DebugPlan::default() }
}

fn at(lin: u64) -> Exit {
    Exit::Debug(DebugStop::Breakpoint(LinAddr(lin)))
}

/// The address and direction of a reported access.
fn hit(exit: Exit) -> (u64, bool) {
    match exit {
        Exit::Debug(DebugStop::Watch(hit)) => (hit.at, hit.write),
        other => panic!("{other:?}"),
    }
}

/// Past the breakpoint where it stands.
fn on(bed: &mut Bed) -> Exit {
    assert_eq!(bed.step(false), Exit::Budget);
    bed.go()
}

#[test]
fn a_breakpoint_stops_every_time_before_its_instruction_in_every_mode() {
    for start in [Start::Real, Start::Protected, Start::Paged32, Start::Pae, Start::Compat, Start::Long] {
        both(start, |bed| {
            let p = match start {
                Start::Real => program!(16: "mov cx, 3", "2: inc ax"; "dec cx", "jnz 2b"),
                Start::Long => program!(64: "mov ecx, 3", "2: inc eax"; "dec ecx", "jnz 2b"),
                _ => program!(32: "mov ecx, 3", "2: inc eax"; "dec ecx", "jnz 2b"),
            };
            let armed = bed.code() + p.at;
            // Once more with translated code, which must not go on past what is armed now.
            for round in 0..2 {
                bed.reset();
                bed.load(&p);
                if round == 1 {
                    bed.arm(DebugPlan::default());
                    assert_eq!(bed.go(), Exit::Halt);
                    bed.reset();
                    bed.load(&p);
                }
                bed.arm(breaks(&[armed]));
                assert_eq!(bed.go(), at(armed));
                assert_eq!(bed.go(), at(armed), "nothing was executed in between");
                assert_eq!(bed.cpu.gpr[gpr::RAX] & 0xFFFF, 1);
                assert_eq!(on(bed), at(armed));
                assert_eq!(on(bed), at(armed));
                assert_eq!((bed.cpu.gpr[gpr::RAX] & 0xFFFF, bed.cpu.gpr[gpr::RCX] & 0xFFFF), (3, 1));
                assert_eq!(on(bed), Exit::Halt);
            }
        });
    }
}

#[test]
fn flags_are_right_at_a_breakpoint_though_the_guest_never_reads_them() {
    both(Start::Long, |bed| {
        // ADD leaves CF and ZF; XOR kills them unread.
        let p = program!(64: "mov edi, 0x200000", "mov eax, -1", "add eax, 1", "mov [rdi], ecx", "jmp 3f", "3:"; "xor edx, edx", "cmp ecx, 5");
        let armed = CODE + p.at;
        bed.run(&p);
        bed.reset();
        bed.load(&p);
        bed.arm(breaks(&[armed]));
        assert_eq!(bed.go(), at(armed));
        let status = bed.cpu.rflags & flags::STATUS;
        assert_eq!(status, flags::CF | flags::ZF | flags::PF | flags::AF);
    });
}

#[test]
fn a_breakpoint_outlives_the_code_under_it() {
    both(Start::Long, |bed| {
        // Copies a new instruction over the armed one, then runs into it.
        let p = program!(64: "mov byte ptr [rip + 2f], 0x90", "jmp 2f", "2:"; "hlt", "nop");
        let armed = CODE + p.at;
        bed.load(&p);
        bed.arm(breaks(&[armed]));
        assert_eq!(bed.go(), at(armed));
        assert_eq!(bed.get16(armed) & 0xFF, 0x90, "memory holds what the guest wrote");
        assert_eq!(on(bed), Exit::Halt);
        assert_eq!(bed.cpu.rip, armed + 3);
    });
}

#[test]
fn a_physical_breakpoint_stops_at_every_alias() {
    both(Start::Long, |bed| {
        let p = program!(64: "mov eax, 0x300000", "call rax", "mov eax, 0x301000", "call rax");
        for lin in [0x30_0000, 0x30_1000] {
            bed.map(lin, 0x40_0000, pte::ALL);
        }
        bed.put(0x40_0000, program!(64: "nop", "ret").bytes);
        let plan = DebugPlan { physical: [0x40_0001].into(), ..DebugPlan::default() };
        bed.run(&p);
        bed.reset();
        bed.load(&p);
        bed.arm(plan);
        assert_eq!(bed.go(), at(0x30_0001));
        assert_eq!(on(bed), at(0x30_1001));
        assert_eq!(on(bed), Exit::Halt);
    });
}

#[test]
fn watched_writes_are_reported_after_the_instruction_and_neighbours_are_not() {
    both(Start::Long, |bed| {
        let p = program!(64: "mov edi, 0x200000", "mov [rdi + 8], rax", "mov eax, [rdi + 4]", "mov [rdi + 3], al",
            "mov [rdi + 1], rax"; "mov word ptr [rdi + 4], 7", "add dword ptr [rdi + 6], 1", "xchg [rdi + 7], al", "nop");
        bed.run(&p);
        bed.reset();
        bed.load(&p);
        bed.arm(watch(Space::Linear, DATA + 4, 4, WatchKind::Write));
        assert_eq!(hit(bed.go()), (DATA + 4, true));
        assert_eq!(bed.cpu.rip, CODE + p.at, "after MOV [RDI+1], RAX");
        assert_eq!(hit(bed.go()), (DATA + 4, true));
        assert_eq!(bed.get16(DATA + 4), 7);
        assert_eq!(hit(bed.go()), (DATA + 6, true));
        assert_eq!(hit(bed.go()), (DATA + 7, true));
        assert_eq!(bed.go(), Exit::Halt);
        bed.arm(DebugPlan::default());
        bed.run(&p);
    });
}

#[test]
fn reads_pushes_and_vector_accesses_are_seen() {
    both(Start::Long, |bed| {
        let p = program!(64: "mov edi, 0x200000", "mov [rdi], rax", "mov eax, [rdi + 4]", "movups xmm0, [rdi - 8]", "inc dword ptr [rdi]");
        bed.run(&p);
        bed.reset();
        bed.load(&p);
        bed.arm(watch(Space::Linear, DATA + 2, 4, WatchKind::Read));
        assert_eq!(hit(bed.go()), (DATA + 4, false));
        assert_eq!(hit(bed.go()), (DATA + 2, false));
        assert_eq!(hit(bed.go()), (DATA + 2, false), "INC reads, too");
        assert_eq!(bed.go(), Exit::Halt);
        let p = program!(64: "mov esp, 0x200010", "call 2f", "2: push 5", "pop rax");
        bed.reset();
        bed.load(&p);
        bed.arm(watch(Space::Linear, DATA, 16, WatchKind::Access));
        assert_eq!(hit(bed.go()), (DATA + 8, true));
        assert_eq!(hit(bed.go()), (DATA, true));
        assert_eq!(hit(bed.go()), (DATA, false));
        assert_eq!(bed.go(), Exit::Halt);
    });
}

#[test]
fn a_range_over_pages_is_watched_whole_and_by_its_physical_place() {
    both(Start::Long, |bed| {
        let p = program!(64: "mov edi, 0x200000", "mov byte ptr [rdi + 0xFFF], 1", "mov byte ptr [rdi + 0x5000], 2",
            "mov qword ptr [rdi + 0x1FFC], 3", "mov edi, 0x300000", "mov byte ptr [rdi + 5], 4");
        bed.run(&p);
        bed.reset();
        bed.load(&p);
        bed.arm(watch(Space::Linear, DATA + 0xFFF, 0x1003, WatchKind::Write));
        assert_eq!(hit(bed.go()), (DATA + 0xFFF, true));
        assert_eq!(hit(bed.go()), (DATA + 0x1FFC, true));
        assert_eq!(bed.go(), Exit::Halt);
        bed.map(0x30_0000, DATA, pte::ALL);
        bed.flush();
        bed.reset();
        bed.load(&p);
        bed.arm(watch(Space::Physical, DATA + 4, 4, WatchKind::Write));
        assert_eq!(hit(bed.go()), (DATA + 5, true));
        assert_eq!(bed.go(), Exit::Halt);
    });
}

#[test]
fn a_repetition_stops_at_the_iteration_that_touches() {
    both(Start::Long, |bed| {
        let p = program!(64: "mov edi, 0x200000", "mov ecx, 0x3000", "mov eax, 9"; "rep stosb", "nop");
        bed.load(&p);
        bed.arm(watch(Space::Linear, DATA + 0x1234, 2, WatchKind::Write));
        assert_eq!(hit(bed.go()), (DATA + 0x1234, true));
        assert_eq!((bed.cpu.rip, bed.cpu.gpr[gpr::RCX]), (CODE + p.at, 0x3000 - 0x1235));
        assert_eq!(hit(bed.go()), (DATA + 0x1235, true));
        assert_eq!(bed.go(), Exit::Halt);
        assert_eq!((bed.cpu.gpr[gpr::RDI], bed.get16(DATA + 0x2FFE)), (DATA + 0x3000, 0x0909));
    });
}

#[test]
fn an_access_that_faults_was_not_made_and_device_registers_and_ports_are_watched() {
    both(Start::Long, |bed| {
        bed.map(0x30_0000, 0x30_0000, 0);
        bed.gate(14, 14, 0, HANDLERS + 0xE0);
        let p = program!(64: "mov edi, 0x300000"; "mov [rdi], eax");
        bed.arm(watch(Space::Linear, 0x30_0000, 8, WatchKind::Access));
        bed.faults(&p, 14, 2);
        // Physical E000_0000H is no memory.
        bed.reset();
        bed.map(0x30_1000, 0xE000_0000, pte::ALL);
        bed.flush();
        let p = program!(64: "mov edi, 0x301000", "mov eax, [rdi]", "mov [rdi + 4], eax", "in al, 0x60", "out 0x61, ax", "mov edx, 0x62", "mov esi, 0x200000", "mov ecx, 3", "rep outsb");
        bed.load(&p);
        let mut plan = watch(Space::Physical, 0xE000_0004, 1, WatchKind::Write);
        plan.watch.insert(Watchpoint { space: Space::Port, first: 0x62, len: 1, kind: WatchKind::Write });
        bed.arm(plan);
        assert_eq!(hit(bed.go()), (0xE000_0004, true));
        assert_eq!(hit(bed.go()), (0x62, true), "the second byte of OUT 61H, AX");
        for left in [2, 1, 0] {
            assert_eq!(hit(bed.go()), (0x62, true));
            assert_eq!(bed.cpu.gpr[gpr::RCX], left);
        }
        assert_eq!(bed.go(), Exit::Halt);
    });
}

#[test]
fn the_processors_own_writes_are_watched() {
    both(Start::Long, |bed| {
        // The frame of INT 40H lies at the top of the stack.
        let p = program!(64: "mov esp, 0x200100", "int 0x40");
        bed.load(&p);
        bed.arm(watch(Space::Linear, DATA + 0xE8, 8, WatchKind::Write));
        assert_eq!(hit(bed.go()), (DATA + 0xE8, true));
        assert_eq!(bed.cpu.rip, HANDLERS + 0x400);
    });
}

#[test]
fn a_step_is_one_instruction_whatever_it_is() {
    both(Start::Long, |bed| {
        bed.gate(6, 14, 0, HANDLERS + 0x60);
        let p = program!(64: "mov edi, 0x200000", "mov ecx, 0x20000", "rep stosb", "sti", "nop", "nop", "int 0x40", "nop");
        bed.load(&p);
        bed.arm(breaks(&[CODE, CODE + 10]));
        let rips: Vec<u64> = (0..5)
            .map(|_| {
                assert_eq!(bed.step(true), Exit::Budget);
                bed.cpu.rip - CODE
            })
            .collect();
        assert_eq!(rips, [5, 10, 12, 13, 14]);
        assert_eq!(bed.cpu.gpr[gpr::RCX], 0, "all of the repetition");
        assert_eq!((bed.step(false), bed.step(false)), (Exit::Budget, Exit::Budget));
        assert_eq!(bed.cpu.rip, HANDLERS + 0x400, "INT leads to its handler");
        assert_eq!(bed.step(false), Exit::Halt);
        // A fault leads to its handler, too.
        bed.reset();
        bed.load(&program!(64: "ud2"));
        assert_eq!(bed.step(false), Exit::Budget);
        assert_eq!(bed.cpu.rip, HANDLERS + 0x60);
    });
}

#[test]
fn steps_take_interrupts_only_if_asked_to_and_a_halted_processor_wakes() {
    both(Start::Long, |bed| {
        let p = program!(64: "out 0x80, al", "sti", "nop", "nop", "hlt", "nop");
        for (interrupts, rips) in [(true, [2, 3, 4]), (false, [2, 3, 4])] {
            bed.reset();
            bed.interrupt_at_port(0x50);
            bed.load(&p);
            for rip in rips {
                assert_eq!(bed.step(interrupts), Exit::Budget);
                assert_eq!(bed.cpu.rip, CODE + rip, "the shadow of STI");
            }
            assert_eq!(bed.step(interrupts), Exit::Budget);
            let handler = HANDLERS + 0x500;
            assert_eq!(bed.cpu.rip, if interrupts { handler } else { CODE + 5 });
        }
        assert_eq!(bed.step(false), Exit::Halt);
        assert_eq!(bed.step(false), Exit::Budget, "nothing but the interrupt can happen now");
        assert_eq!(bed.cpu.rip, HANDLERS + 0x500);
    });
}

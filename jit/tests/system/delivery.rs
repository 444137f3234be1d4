//! Faults while an interrupt is delivered, error codes with EXT, double faults, shutdown; which interrupt comes first
//! (SDM 3A, 6.7 to 6.15, tables 6-2, 6-4 and 6-5).

use crate::bed::{Bed, CODE, DATA, GDT, HANDLERS, IDT, IST_STACK, STACK, Start, TSS, both, pte, sel};
use crate::segments::descriptor;
use paravane_cpu::{Attention, Exit, flags, gpr};

/// Clears the present bit of a gate.
fn absent(bed: &Bed, vector: u64) {
    let at = IDT + vector * if bed.bits() == 64 { 16 } else { 8 };
    bed.put64(at, bed.get64(at) & !(1 << 47));
}

#[test]
fn the_second_fault_replaces_or_doubles_the_first() {
    for start in [Start::Long, Start::Protected] {
        both(start, |bed| {
            // Benign, then contributory: the second alone. The code names the gate: IDT, EXT.
            absent(bed, 6);
            bed.faults(&program!(64: "nop"; "ud2"), 11, 6 * 8 + 3);
            // Contributory twice.
            bed.restore();
            absent(bed, 0);
            bed.faults(&program!(64: "xor ecx, ecx"; "div ecx"), 8, 0);
            bed.restore();
            absent(bed, 13);
            bed.faults(&program!(64: "mov ecx, 0x123456"; "rdmsr"), 8, 0);
            // An empty gate is #GP; a benign one behind it is not doubled.
            bed.restore();
            bed.put64(IDT + 6 * if start == Start::Long { 16 } else { 8 }, 0);
            bed.faults(&program!(64: "nop"; "ud2"), 13, 6 * 8 + 3);
            // Software interrupts are benign, and their code has no EXT.
            bed.restore();
            absent(bed, 0x50);
            bed.faults(&program!(64: "nop"; "int 0x50"), 11, 0x50 * 8 + 2);
            bed.restore();
            bed.cpu.idtr.limit = 0x4FF;
            bed.faults(&program!(64: "nop"; "int 0xF0"), 13, 0xF0 * 8 + 2);
        });
    }
}

#[test]
fn page_faults_in_delivery() {
    for start in [Start::Long, Start::Pae, Start::Paged32] {
        both(start, |bed| {
            let long = start == Start::Long;
            let size = if long { 16 } else { 8 };
            // The IDT moves so that gates 14 and up are in a page, those before in another.
            let base = 0x30_0000 - 14 * size;
            let gates: Vec<u8> =
                (0..256 * size).step_by(8).flat_map(|i| bed.get64(IDT + i).to_le_bytes()).collect();
            let prepare = |bed: &mut Bed, first: bool, second: bool| {
                bed.reset();
                for (page, present) in [(0x2F_F000, first), (0x30_0000, second)] {
                    bed.map(page, page, if present { pte::ALL } else { 0 });
                }
                bed.flush();
                bed.cpu.idtr.base = base;
            };
            bed.put(base, &gates);
            // Benign and contributory faults whose gate is not there: #PF, supervisor read.
            prepare(bed, false, true);
            bed.page_faults(&program!(64: "nop"; "ud2"), base + 6 * size, 0);
            prepare(bed, false, true);
            bed.page_faults(&program!(64: "mov ecx, 0x123456"; "rdmsr"), base + 13 * size, 0);
            // A page fault within a page fault.
            prepare(bed, true, false);
            bed.faults(&program!(64: "mov esi, 0x40000000"; "mov eax, [rsi]"), 8, 0);
            assert_eq!(bed.cpu.cr2, base + 14 * size, "of the second");
            // A contributory fault within a page fault.
            prepare(bed, true, true);
            bed.put64(base + 14 * size, bed.get64(base + 14 * size) & !(1 << 47));
            bed.faults(&program!(64: "mov esi, 0x40000000"; "mov eax, [rsi]"), 8, 0);
            assert_eq!(bed.cpu.cr2, 0x4000_0000);
            // Shutdown: the double fault cannot be delivered either.
            prepare(bed, false, false);
            bed.load(&program!(64: "nop", "mov eax, [0x40000000]"));
            assert_eq!(bed.go(), Exit::TripleFault);
        });
    }
}

/// What gates may name (SDM 3A, 6.12.1.1 and 6.14.1); hardware interrupts set EXT in the code.
#[test]
fn gates_to_bad_code_segments() {
    both(Start::Long, |bed| {
        let gate = |bed: &Bed, selector: u16, offset: u64| {
            bed.gate(0x50, 14, 0, offset);
            let at = IDT + 0x50 * 16;
            bed.put64(at, bed.get64(at) & !(0xFFFF << 16) | u64::from(selector) << 16);
        };
        let int = program!(64: "nop"; "int 0x50");
        let free = u32::from(sel::FREE);
        for (code, vector, error) in [
            (descriptor(0, 0xF_FFFF, 0xA01B), 11, free), // not present
            (descriptor(0, 0xF_FFFF, 0xA0FB), 13, free), // DPL 3
            (descriptor(0, 0xF_FFFF, 0xC09B), 13, free), // no 64-bit code
            (descriptor(0, 0xF_FFFF, 0xE09B), 13, free), // L and D
            (descriptor(0, 0xF_FFFF, 0xA093), 13, free), // data
            (0, 13, free),
        ] {
            bed.restore();
            bed.gdt(sel::FREE, code);
            gate(bed, sel::FREE, HANDLERS);
            bed.faults(&int, vector, error);
            // The same for an external interrupt.
            bed.reset();
            bed.interrupt_at_port(0x50);
            bed.run(&program!(64: "out 0x80, al", "sti", "nop", "nop"));
            assert_eq!((bed.taken().vector, bed.taken().error), (vector, Some(error | 1)));
        }
        bed.restore();
        gate(bed, 0x1008, HANDLERS);
        bed.faults(&int, 13, 0x1008);
        gate(bed, 0, HANDLERS);
        bed.faults(&int, 13, 0);
        gate(bed, 0x14, HANDLERS); // an LDT that is not there
        bed.faults(&int, 13, 0x14);
        gate(bed, sel::CODE64, 0x8000_0000_0000);
        bed.faults(&int, 13, 0);
        // Task gates and 16-bit gates do not exist in long mode.
        for kind in [5, 6, 7, 0xC, 0xD, 9] {
            bed.restore();
            bed.gate(0x50, kind, 0, HANDLERS);
            bed.faults(&int, 13, 0x50 * 8 + 2);
        }
        // IST entries beyond the TSS; a non-canonical one.
        bed.restore();
        bed.gate(0x50, 14, 0, HANDLERS + 0x500);
        bed.ist(0x50);
        bed.cpu.tr.limit = 36 + 6;
        bed.faults(&int, 10, u32::from(sel::TSS));
        bed.reset();
        bed.put64(TSS + 36, 1 << 63);
        bed.faults(&int, 12, 0);
    });
    both(Start::Protected, |bed| {
        // A handler beyond its segment's limit.
        bed.gdt(sel::FREE, descriptor(0, 0x3FFF, 0x409B));
        bed.put64(IDT + 0x50 * 8, bed.get64(IDT + 0x50 * 8) & !(0xFFFF << 16) | u64::from(sel::FREE) << 16);
        bed.faults(&program!(32: "nop"; "int 0x50"), 13, 0);
    });
}

/// A conforming handler runs at the interrupted privilege, on its stack.
#[test]
fn conforming_handlers() {
    for start in [Start::Protected, Start::Long] {
        both(start, |bed| {
            let attributes = if start == Start::Long { 0xA09F } else { 0xC09F };
            bed.gdt(sel::FREE, descriptor(0, 0xF_FFFF, attributes));
            bed.gate(0x50, 14, 3, CODE + 0x800);
            let at = IDT + 0x50 * if start == Start::Long { 16 } else { 8 };
            bed.put64(at, bed.get64(at) & !(0xFFFF << 16) | u64::from(sel::FREE) << 16);
            bed.gate(0x51, 14, 3, HANDLERS + 0x510);
            bed.put(CODE + 0x800, program!(64: "mov eax, cs", "mov ebx, esp", "int 0x51").bytes);
            bed.user();
            bed.run(&program!(64: "nop", "int 0x50"));
            assert_eq!(bed.taken().vector, 0x51);
            assert_eq!(bed.cpu.gpr[gpr::RAX] & 0xFFFF, u64::from(sel::FREE) | 3);
            let frame = if start == Start::Long { 40 } else { 12 };
            assert_eq!(bed.cpu.gpr[gpr::RBX], crate::bed::USER_STACK - frame);
        });
    }
}

/// Stacks for a more privileged handler (SDM 3A, 6.12.1): #TS and #SS name the selector. They are handled by a task,
/// which needs none.
#[test]
fn bad_inner_stacks() {
    both(Start::Protected, |bed| {
        for (ss, limit, vector, error) in [
            (0, 0x67, 10, 0),
            (sel::CODE32, 0x67, 10, u32::from(sel::CODE32)),
            (sel::USER_DATA & !3, 0x67, 10, u32::from(sel::USER_DATA & !3)),
            (sel::DATA | 1, 0x67, 10, u32::from(sel::DATA)),
            (0x1000, 0x67, 10, 0x1000),
            (sel::FREE, 0x67, 12, u32::from(sel::FREE)),
            (sel::FREE + 0x18, 0x67, 12, u32::from(sel::FREE + 0x18)),
            (sel::DATA, 8, 10, u32::from(sel::TSS)),
        ] {
            eprintln!("SS0 {ss:x}");
            bed.restore();
            crate::tasks::second_task(bed);
            bed.gdt(sel::FREE, descriptor(0, 0xF_FFFF, 0xC013)); // not present
            bed.gdt(sel::FREE + 0x18, descriptor(0, 0xFFF, 0x4093)); // ESP0 lies beyond the limit
            bed.put32(TSS + 8, u32::from(ss));
            for v in [10, 12] {
                bed.put64(IDT + v * 8, 0x0000_8500_0068_0000);
            }
            bed.gate(0x50, 14, 3, HANDLERS + 0x500);
            bed.put(CODE + 0x800, program!(32: "pop dword ptr [0x200000]").bytes);
            bed.user();
            bed.cpu.tr.limit = 0x67;
            bed.load(&program!(32: "nop", "int 0x50"));
            bed.cpu.tr.limit = limit;
            assert_eq!(bed.go(), Exit::Halt);
            assert_eq!((bed.get32(DATA), bed.get32(TSS + 32)), (error, CODE as u32 + 1), "#{vector}");
        }
    });
}

#[test]
fn nmis() {
    both(Start::Long, |bed| {
        // An absent gate: EXT is set.
        absent(bed, 2);
        bed.nmi_at_port();
        bed.run(&program!(64: "out 0x80, al", "nop"));
        assert_eq!((bed.taken().vector, bed.taken().error), (11, Some(2 * 8 + 3)));
        // HLT ends with IF clear.
        bed.restore();
        bed.put(HANDLERS + 0x20, program!(64: "inc r8", "iretq").bytes);
        bed.load(&program!(64: "cli", "hlt", "inc r9"));
        assert_eq!(bed.go(), Exit::Halt);
        assert_eq!(bed.cpu.gpr[gpr::R8], 0);
        bed.attention.set(Attention::NMI);
        assert_eq!(bed.wait(), Exit::Halt);
        assert_eq!((bed.cpu.gpr[gpr::R8], bed.cpu.gpr[9]), (1, 1));
        // Before a maskable interrupt at the same boundary, which then waits for IRET's IF.
        bed.restore();
        bed.put(HANDLERS + 0x20, program!(64: "mov r10, r8", "iretq").bytes);
        bed.put(HANDLERS + 0x600, program!(64: "inc r8", "iretq").bytes);
        bed.load(&program!(64: "nop", "nop"));
        bed.cpu.rflags |= flags::IF;
        bed.board.pending.lock().expect("queue").push_back(0x60);
        bed.attention.set(Attention::INTERRUPT | Attention::NMI);
        bed.go();
        assert_eq!((bed.cpu.gpr[gpr::R8], bed.cpu.gpr[10]), (1, 0));
        // MOV SS holds it back for one instruction.
        bed.restore();
        bed.nmi_at_port();
        let p = program!(64: "mov eax, 0x18", "out 0x80, al");
        bed.run(&p);
        assert_eq!((bed.taken().vector, bed.taken().rip), (2, CODE + 7));
        bed.restore();
        bed.cpu.shadow = paravane_cpu::Shadow::MovSs;
        bed.attention.set(Attention::NMI);
        bed.run(&program!(64: "nop", "nop"));
        assert_eq!((bed.taken().vector, bed.taken().rip), (2, CODE + 1));
    });
}

#[test]
fn sti_and_hlt() {
    for start in [Start::Long, Start::Protected, Start::Real] {
        both(start, |bed| {
            // STI's shadow covers HLT: the interrupt ends it and returns behind.
            bed.interrupt_at_port(0x60);
            bed.run(&if start == Start::Real {
                program!(16: "out 0x80, al", "sti", "hlt", "nop")
            } else {
                program!(64: "out 0x80, al", "sti", "hlt", "nop")
            });
            assert_eq!((bed.taken().vector, bed.taken().rip), (0x60, bed.code() + 4));
        });
    }
    both(Start::Protected, |bed| {
        // STI with IF set already has no shadow; LSS has none either, POP SS has.
        bed.interrupt_at_port(0x60);
        bed.cpu.rflags |= flags::IF;
        bed.put32(DATA, 0x6_F000);
        bed.put16(DATA + 4, sel::DATA);
        let p = program!(32: "cli", "out 0x80, al", "sti", "lss esp, [0x200000]"; "nop");
        bed.run(&p);
        assert_eq!((bed.taken().vector, bed.taken().rip), (0x60, CODE + p.at));
        bed.reset();
        bed.interrupt_at_port(0x60);
        let p = program!(32: "out 0x80, al", "push 0x18", "sti", "pop ss", "nop"; "nop");
        bed.run(&p);
        assert_eq!((bed.taken().vector, bed.taken().rip), (0x60, CODE + p.at));
    });
}

/// Traps of the instruction before, then interrupts, then breakpoints of the next instruction.
#[test]
fn interrupts_against_debug_exceptions() {
    both(Start::Long, |bed| {
        // The interrupt comes before the instruction breakpoint, which is not lost.
        bed.interrupt_at_port(0x60);
        bed.cpu.rflags |= flags::IF;
        let p = program!(64: "out 0x80, al"; "nop");
        bed.cpu.dr[0] = CODE + p.at;
        bed.cpu.dr[7] = 0x401;
        bed.run(&p);
        assert_eq!(
            (bed.taken().vector, bed.taken().rip, bed.taken().flags & flags::RF),
            (0x60, CODE + p.at, 0)
        );
        bed.put(HANDLERS + 0x601, &[0x48, 0xCF]);
        bed.go();
        assert_eq!((bed.taken().vector, bed.taken().rip), (1, CODE + p.at));
        // The single-step trap comes before the interrupt: its handler is entered, with IF clear.
        bed.restore();
        bed.interrupt_at_port(0x60);
        bed.cpu.rflags |= flags::IF | flags::TF;
        bed.run(&p);
        assert_eq!((bed.taken().vector, bed.taken().rip), (1, CODE + p.at));
    });
}

/// A data breakpoint of MOV SS is taken behind INT n, at the handler's first instruction (SDM 3A, 6.8.3).
#[test]
fn a_trap_held_back_over_int() {
    both(Start::Long, |bed| {
        bed.put16(DATA, 0x18);
        bed.cpu.dr[0] = DATA;
        bed.cpu.dr[7] = 0x400 | 1 | 0b0111 << 16;
        bed.run(&program!(64: "mov esi, 0x200000", "mov ss, [rsi]", "int 0x40"));
        assert_eq!((bed.taken().vector, bed.taken().rip), (1, HANDLERS + 0x400));
        // Instruction breakpoints behind MOV SS are suppressed.
        bed.reset();
        let p = program!(64: "mov eax, 0x18", "mov ss, eax"; "nop");
        bed.cpu.dr[0] = CODE + p.at;
        bed.cpu.dr[7] = 0x401;
        bed.finish(&p);
    });
}

#[test]
fn real_mode_interrupts() {
    both(Start::Real, |bed| {
        // Beyond the table: #GP, which pushes no error code; IP is the instruction's.
        bed.cpu.idtr.limit = 0x3F;
        let t = bed.faults(&program!(16: "nop"; "int 0x21"), 13, None);
        assert_eq!(t.rip, bed.code() + 1);
        assert_eq!(bed.cpu.gpr[gpr::RSP], 0x6FFA);
        // No room for #GP and #DF either.
        bed.reset();
        bed.cpu.idtr.limit = 0x1F;
        bed.load(&program!(16: "int 0x21"));
        assert_eq!(bed.go(), Exit::TripleFault);
        // The table may be elsewhere; flags: IF, TF and AC are cleared.
        bed.reset();
        bed.cpu.idtr.base = 0x5000;
        bed.put32(0x5000 + 0x21 * 4, 0x0400_0000 | 0x210);
        bed.put(0x4210, &[0xF4]);
        bed.cpu.rflags |= flags::IF | flags::AC | flags::CF;
        bed.load(&program!(16: "int 0x21"));
        assert_eq!(bed.go(), Exit::Halt);
        assert_eq!((bed.cpu.seg[1].base, bed.cpu.rip), (0x4000, 0x211));
        assert_eq!(bed.cpu.rflags & (flags::IF | flags::AC | flags::CF), flags::CF);
        // SP 1: the push wraps around FFFFH in pieces and raises #SS, whose push fails too.
        bed.reset();
        bed.cpu.gpr[gpr::RSP] = 1;
        bed.load(&program!(16: "int 0x21"));
        assert_eq!(bed.go(), Exit::TripleFault);
    });
}

/// Where the handler's stack is, from every privilege.
#[test]
fn stacks_by_privilege() {
    both(Start::Protected, |bed| {
        // Ring 1 handler, ring 3 program: SS1:ESP1.
        bed.gdt(sel::FREE, descriptor(0, 0xF_FFFF, 0xC0BB));
        bed.gdt(sel::FREE + 0x18, descriptor(0, 0xF_FFFF, 0xC0B3));
        bed.put32(TSS + 12, 0x6_8000);
        bed.put32(TSS + 16, u32::from(sel::FREE + 0x18) | 1);
        bed.gate(0x50, 14, 3, CODE + 0x800);
        bed.put64(IDT + 0x50 * 8, bed.get64(IDT + 0x50 * 8) & !(0xFFFF << 16) | u64::from(sel::FREE) << 16);
        bed.gate(0x51, 14, 1, HANDLERS + 0x510);
        bed.put(CODE + 0x800, program!(32: "mov ebx, ss", "int 0x51").bytes);
        bed.user();
        bed.run(&program!(32: "nop", "int 0x50"));
        let t = bed.taken();
        assert_eq!(
            (t.vector, t.cs, t.ss, t.sp),
            (0x51, u64::from(sel::FREE) | 1, u64::from(sel::FREE + 0x18) | 1, 0x6_8000 - 20)
        );
        assert_eq!(bed.cpu.gpr[gpr::RSP], STACK - 20);
        assert_eq!(bed.cpu.gpr[gpr::RBX] & 0xFFFF, u64::from(sel::FREE + 0x18) | 1);
    });
    both(Start::Long, |bed| {
        // A nested interrupt on the same IST entry overwrites the first frame.
        bed.ist(0x40);
        bed.ist(0x41);
        bed.put(HANDLERS + 0x400, program!(64: "int 0x41").bytes);
        bed.run(&program!(64: "nop", "int 0x40"));
        assert_eq!((bed.taken().rip, bed.cpu.gpr[gpr::RSP]), (HANDLERS + 0x402, IST_STACK - 40));
        assert_eq!(bed.taken().sp, IST_STACK - 40);
        assert_eq!(bed.get64(GDT), 0);
    });
}

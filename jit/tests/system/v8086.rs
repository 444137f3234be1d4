//! Virtual-8086 mode and its monitor: how it is entered and left (SDM 3B, 20.2 and 20.3; 2A, INT n and IRET; 2B, SYSENTER).

use crate::bed::{Bed, CODE, HANDLERS, IDT, STACK, Start, TSS, both, sel};
use crate::debug::BS;
use crate::segments::descriptor;
use crate::tasks::v8086_with;
use paravane_cpu::{SegReg, cr4, flags, gpr};

const IOPL3: u64 = flags::IOPL;
const FREE: u32 = sel::FREE as u32;

/// Gate `vector` leads to the code segment at [`sel::FREE`], described by `attributes`.
fn gate_to(bed: &Bed, vector: u64, kind: u64, attributes: u64, offset: u64) {
    bed.gdt(sel::FREE, descriptor(0, 0xF_FFFF, attributes));
    bed.gate(vector, kind, 3, offset);
    let at = IDT + vector * 8;
    bed.put64(at, bed.get64(at) & !(0xFFFF << 16) | u64::from(sel::FREE) << 16);
}

/// The monitor runs at CPL 0, in a segment that does not conform; else #GP names it, with EXT where the interrupt is external.
#[test]
fn handlers_must_be_of_ring_0() {
    both(Start::Protected, |bed| {
        for attributes in [0xC09F, 0xC0FF, 0xC0BB, 0xC0FB] {
            bed.reset();
            gate_to(bed, 0x50, 14, attributes, HANDLERS + 0x500);
            v8086_with(bed, IOPL3, program!(16: "nop", "int 0x50").bytes);
            let t = bed.taken();
            assert_eq!((t.vector, t.error, t.cs, t.rip), (13, Some(FREE), 0x9000, 1), "{attributes:x}");
            bed.reset();
            bed.interrupt_at_port(0x50);
            bed.put(TSS + 104, &[0; 0x20]);
            bed.put(TSS + 104 + 0x20, &[0xFF]);
            bed.cpu.tr.limit = 104 + 0x20;
            v8086_with(bed, flags::IF, program!(16: "out 0x80, al", "nop").bytes);
            let t = bed.taken();
            assert_eq!((t.vector, t.error, t.rip), (13, Some(FREE | 1), 2), "{attributes:x}");
        }
        gate_to(bed, 0x50, 14, 0xC09B, HANDLERS + 0x500);
        bed.reset();
        v8086_with(bed, IOPL3, program!(16: "nop", "int 0x50").bytes);
        assert_eq!(bed.taken().vector, 0x50);
    });
}

/// A 16-bit gate saves nine words.
#[test]
fn sixteen_bit_gates() {
    both(Start::Protected, |bed| {
        bed.gate(0x50, 6, 3, HANDLERS + 0x500);
        v8086_with(bed, IOPL3, program!(16: "mov ax, 0x1111", "mov fs, ax", "stc", "int 0x50").bytes);
        assert_eq!((bed.cpu.rip, bed.cpu.gpr[gpr::RSP]), (HANDLERS + 0x501, STACK - 18));
        let word = |i: u64| bed.get16(STACK - 18 + 2 * i);
        // IP, CS, FLAGS, SP, SS, ES, DS, FS, GS.
        assert_eq!([0, 1, 2, 3, 4].map(word), [8, 0x9000, 0x3003, 0xFFF0, 0x8000]);
        assert_eq!([5, 6, 7, 8].map(word), [0x2000, 0x2000, 0x1111, 0]);
        assert_eq!(bed.cpu.rflags & flags::VM, 0);
    });
}

/// External interrupts and exceptions go to the monitor whatever IOPL and the redirection bitmap say.
#[test]
fn what_is_never_redirected() {
    both(Start::Protected, |bed| {
        let prepare = |bed: &mut Bed| {
            bed.restore();
            bed.cpu.cr4 |= cr4::VME;
            bed.put16(TSS + 102, 136);
            bed.put(TSS + 104, &[0; 0x60]);
            bed.put(TSS + 136 + 0x20, &[0xFF]);
            bed.cpu.tr.limit = 136 + 0x20;
        };
        prepare(bed);
        bed.interrupt_at_port(0x60);
        v8086_with(bed, flags::IF, program!(16: "out 0x80, al", "nop").bytes);
        assert_eq!((bed.taken().vector, bed.taken().cs, bed.taken().rip), (0x60, 0x9000, 2));
        prepare(bed);
        bed.interrupt_at_port(0x60);
        v8086_with(bed, 0, program!(16: "out 0x80, al", "sti", "hlt").bytes);
        assert_eq!((bed.taken().vector, bed.taken().rip), (13, 3), "IF is clear: STI set VIF only");
        prepare(bed);
        bed.nmi_at_port();
        v8086_with(bed, 0, program!(16: "out 0x80, al", "nop").bytes);
        assert_eq!((bed.taken().vector, bed.taken().rip), (2, 2));
        for (code, vector) in [(&[0xF6, 0xF1][..], 0), (&[0x0F, 0x0B], 6), (&[0xF1], 1)] {
            prepare(bed);
            v8086_with(bed, 0, code); // DIV CL, UD2, INT1
            assert_eq!(bed.taken().vector, vector);
        }
    });
}

/// Single-stepping: the monitor gets #DB behind the instruction, and the frame tells.
#[test]
fn single_step() {
    both(Start::Protected, |bed| {
        v8086_with(bed, flags::TF, program!(16: "nop", "nop").bytes);
        let t = bed.taken();
        assert_eq!((t.vector, t.cs, t.rip, t.flags & flags::TF), (1, 0x9000, 1, flags::TF));
        assert_eq!((bed.cpu.dr[6] & 0xE00F, bed.cpu.rflags & (flags::TF | flags::VM)), (BS, 0));
    });
}

/// SYSENTER leaves the mode.
#[test]
fn sysenter() {
    both(Start::Protected, |bed| {
        bed.cpu.msr.sysenter_cs = sel::CODE32.into();
        bed.cpu.msr.sysenter_esp = STACK - 0x100;
        bed.cpu.msr.sysenter_eip = CODE + 0x800;
        bed.put(CODE + 0x800, &[0xF4]);
        v8086_with(bed, flags::IF, program!(16: "nop", "sysenter").bytes);
        assert_eq!((bed.cpu.rip, bed.cpu.gpr[gpr::RSP], bed.cpu.cpl), (CODE + 0x801, STACK - 0x100, 0));
        assert_eq!(bed.cpu.rflags & (flags::VM | flags::IF), 0);
        assert_eq!([SegReg::Cs, SegReg::Ss].map(|s| bed.cpu.segment(s).selector), [8, 0x10]);
    });
}

/// POPF and IRET of the mode itself change neither VM nor IOPL, VIF or VIP.
#[test]
fn flags_that_the_program_cannot_change() {
    both(Start::Protected, |bed| {
        bed.gate(0x50, 14, 3, HANDLERS + 0x500);
        let kept = flags::VM | flags::IOPL | flags::VIF | flags::VIP;
        v8086_with(bed, IOPL3, program!(16: "push 0x1A", "push 0x0ED7", "popfd", "int 0x50").bytes);
        assert_eq!((bed.taken().vector, bed.taken().flags & kept), (0x50, flags::VM | IOPL3));
        assert_eq!(bed.taken().flags & 0xFFFF & !flags::TF, 0x3ED7);
        bed.reset();
        let iret = program!(16: "push 0x0ED7", "push 0x9000", ".byte 0x68", ".word 2f - 770b", "iret"; "2: int 0x50");
        v8086_with(bed, IOPL3, iret.bytes);
        assert_eq!((bed.taken().vector, bed.taken().rip), (0x50, iret.at + 2));
        assert_eq!(bed.taken().flags & (kept | 0xFFFF), flags::VM | 0x3ED7);
    });
}

/// Only IRET of CPL 0 outside IA-32e mode enters the mode.
#[test]
fn where_the_mode_cannot_be_entered() {
    for start in [Start::Protected, Start::Compat] {
        both(start, |bed| {
            bed.gate(0x50, 14, 3, HANDLERS + 0x500);
            bed.put(CODE + 0x800, &[0xCD, 0x50]);
            // POPFD at any CPL; IRETD in compatibility mode at CPL 0.
            bed.run(&program!(32: "push 0x20002", "popfd", "int 0x50"));
            assert_eq!((bed.taken().vector, bed.taken().flags & flags::VM), (0x50, 0));
            bed.reset();
            if start == Start::Protected {
                bed.user();
                bed.run(&program!(32: "push 0x20202", "push 0x23", "push 0x100800", "iretd"));
            } else {
                bed.run(&program!(32: "push 0x20002", "push 8", "push 0x100800", "iretd"));
            }
            let t = bed.taken();
            assert_eq!((t.vector, t.flags & flags::VM, t.rip), (0x50, 0, CODE + 0x802));
        });
    }
}

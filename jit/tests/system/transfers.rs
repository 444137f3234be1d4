//! Far transfers: conforming and non-conforming code, call gates, outer returns, LDT and LTR (SDM 3A, 3.5, 5.5 to 5.8; 2A,
//! CALL, JMP, RET, IRET, LLDT, LTR).

use crate::bed::{Bed, CODE, DATA, GDT, HANDLERS, STACK, Start, TSS, USER_STACK, both, sel};
use crate::segments::descriptor;
use paravane_cpu::{SegReg, gpr};

const FREE: u32 = sel::FREE as u32;

/// A far jump to CODE + 800H in 32-bit code; the selector is assembled.
macro_rules! jump {
    ($selector:literal) => {
        program!(32: "nop"; ".byte 0xEA", ".long 0x100800", $selector)
    };
}

fn handlers(bed: &mut Bed) {
    bed.gate(0x50, 14, 3, HANDLERS + 0x500);
    bed.put(CODE + 0x800, program!(32: "mov eax, cs", "int 0x50").bytes);
}

#[test]
fn conforming_code() {
    for start in [Start::Protected, Start::Compat] {
        both(start, |bed| {
            handlers(bed);
            // From CPL 3: CPL and RPL stay 3, whatever RPL the selector had.
            bed.gdt(sel::FREE, descriptor(0, 0xF_FFFF, 0xC09F));
            for p in [jump!(".word 0x58"), jump!(".word 0x5B")] {
                bed.reset();
                bed.user();
                bed.run(&p);
                assert_eq!(
                    (bed.taken().vector, bed.taken().cs, bed.cpu.gpr[gpr::RAX] & 0xFFFF),
                    (0x50, 0x5B, 0x5B)
                );
            }
            // A CALL pushes CS and EIP, no privilege changes; RETF comes back.
            bed.reset();
            bed.put(CODE + 0x800, program!(32: "mov eax, cs", "retf").bytes);
            bed.user();
            bed.run(&program!(32: ".byte 0x9A", ".long 0x100800", ".word 0x58", "int 0x50"));
            assert_eq!((bed.taken().vector, bed.taken().cs, bed.taken().sp), (0x50, 0x23, USER_STACK));
            assert_eq!(bed.cpu.gpr[gpr::RAX] & 0xFFFF, 0x5B);
            // Conforming code of less privilege: #GP.
            bed.gdt(sel::FREE, descriptor(0, 0xF_FFFF, 0xC0FF));
            bed.reset();
            bed.faults(&jump!(".word 0x58"), 13, FREE);
        });
    }
}

#[test]
fn direct_transfers_refused() {
    for start in [Start::Protected, Start::Compat] {
        both(start, |bed| {
            let case = |bed: &mut Bed, code: u64, user: bool, vector: u64, error: u32| {
                bed.reset();
                bed.gdt(sel::FREE, code);
                if user {
                    bed.user();
                }
                bed.faults(&jump!(".word 0x58"), vector, error);
                // CALL checks the same before it pushes.
                bed.faults(&program!(32: "nop"; ".byte 0x9A", ".long 0x100800", ".word 0x58"), vector, error);
            };
            case(bed, descriptor(0, 0xF_FFFF, 0xC09B), true, 13, FREE); // DPL 0 from CPL 3
            case(bed, descriptor(0, 0xF_FFFF, 0xC0FB), false, 13, FREE); // DPL 3 from CPL 0
            case(bed, descriptor(0, 0xF_FFFF, 0xC01B), false, 11, FREE); // not present
            case(bed, descriptor(0, 0xF_FFFF, 0xC093), false, 13, FREE); // data
            case(bed, descriptor(0, 0xFFF, 0x409B), false, 13, 0); // the target lies beyond the limit
            case(bed, 0x0000_8200_0000_0000, false, 13, FREE); // an LDT
            case(bed, 0x0000_8E00_0008_0000, false, 13, FREE); // an interrupt gate
            // RPL above CPL.
            bed.reset();
            bed.gdt(sel::FREE, descriptor(0, 0xF_FFFF, 0xC09B));
            bed.faults(&jump!(".word 0x5B"), 13, FREE);
            bed.faults(&jump!(".word 0"), 13, 0);
            bed.faults(&jump!(".word 3"), 13, 0);
            bed.faults(&jump!(".word 0x1000"), 13, 0x1000);
        });
    }
    both(Start::Long, |bed| {
        // L and D both set; TSS and task gate as targets; a non-canonical target.
        let indirect = program!(64: "mov esi, 0x200000"; ".byte 0xFF, 0x2E"); // JMP FAR [RSI], 32-bit
        for (raw, error) in [
            (descriptor(0, 0xF_FFFF, 0xE09B), FREE),
            (0x0000_8900_3800_0067, FREE),
            (0x0000_8500_0048_0000, FREE),
            (0x0000_8400_0008_0000, FREE),
        ] {
            bed.reset();
            bed.gdt(sel::FREE, raw);
            bed.gdt(sel::FREE + 8, 0);
            bed.put64(DATA, 0x58_0000_0800 | 0x10_0000);
            bed.faults(&indirect, 13, error);
        }
        bed.put64(DATA, 0x8000_0000_0000);
        bed.put64(DATA + 8, u64::from(sel::CODE64));
        bed.faults(&program!(64: "mov esi, 0x200000"; ".byte 0x48, 0xFF, 0x2E"), 13, 0);
        // To compatibility mode and on.
        bed.put64(DATA, 0x08_0000_0000 | (CODE + 0x800));
        bed.put(CODE + 0x800, &[0x40, 0xF4]); // INC EAX there
        bed.reset();
        bed.run(&indirect);
        assert_eq!((bed.cpu.gpr[gpr::RAX], bed.cpu.rip), (1, CODE + 0x802));
    });
}

#[test]
fn call_gates() {
    both(Start::Protected, |bed| {
        let call = program!(32: "push 0x11111111", "push 0x22222222"; ".byte 0x9A", ".long 0", ".word 0x5B");
        let jump = program!(32: "nop"; ".byte 0xEA", ".long 0", ".word 0x5B");
        handlers(bed);
        // 16-bit gate with two words of parameters.
        bed.gdt(sel::FREE, 0x0000_E402_0070_0000 | 0x4500);
        bed.gdt(sel::FREE + 0x18, descriptor(0, 0xF_FFFF, 0xC09B));
        bed.put(HANDLERS + 0x500, &[0xF4]);
        bed.user();
        bed.run(&call);
        assert_eq!(bed.cpu.rip, HANDLERS + 0x501);
        let rsp = bed.cpu.gpr[gpr::RSP];
        assert_eq!(rsp, STACK - 12);
        // The parameters are the words of the last push.
        assert_eq!(
            [0, 2, 4, 6, 8, 10].map(|i| bed.get16(rsp + i)),
            [(call.at + 7) as u16, 0x23, 0x2222, 0x2222, (USER_STACK - 8) as u16, 0x2B]
        );
        // To conforming code: no stack switch, no parameters.
        bed.reset();
        bed.gdt(sel::FREE, 0x0010_EC02_0070_0800);
        bed.gdt(sel::FREE + 0x18, descriptor(0, 0xF_FFFF, 0xC09F));
        bed.user();
        bed.run(&call);
        assert_eq!((bed.taken().vector, bed.taken().cs, bed.taken().sp), (0x50, 0x73, USER_STACK - 16));
        // A jump may use a gate to conforming code, not to an inner ring.
        bed.reset();
        bed.user();
        bed.run(&jump);
        assert_eq!((bed.taken().vector, bed.taken().sp), (0x50, USER_STACK));
        bed.gdt(sel::FREE + 0x18, descriptor(0, 0xF_FFFF, 0xC09B));
        bed.reset();
        bed.user();
        bed.faults(&jump, 13, 0x70);
        // RPL of the selector against the gate's DPL.
        bed.reset();
        bed.gdt(sel::FREE, 0x0010_8C00_0070_0800);
        bed.faults(&jump, 13, FREE);
        // What the gate names.
        for (code, vector, error) in [
            (descriptor(0, 0xF_FFFF, 0xC01B), 11, 0x70),
            (descriptor(0, 0xF_FFFF, 0xC093), 13, 0x70),
            (descriptor(0, 0xFF, 0x409B), 13, 0),
            (0, 13, 0x70),
        ] {
            bed.reset();
            bed.gdt(sel::FREE, 0x0010_EC00_0070_0800);
            bed.gdt(sel::FREE + 0x18, code);
            bed.user();
            bed.faults(&call, vector, error);
        }
        bed.gdt(sel::FREE, 0x0010_EC00_0000_0800);
        bed.faults(&call, 13, 0);
    });
}

#[test]
fn call_gate_stacks() {
    both(Start::Protected, |bed| {
        let call = program!(32: "nop"; ".byte 0x9A", ".long 0", ".word 0x5B");
        // #TS and #SS are delivered to a task: SS0 is what is wrong.
        for (ss, esp, vector, error) in [
            (0u16, 0x7_0000u32, 10, 0),
            (sel::CODE32, 0x7_0000, 10, u32::from(sel::CODE32)),
            (sel::DATA | 3, 0x7_0000, 10, u32::from(sel::DATA)),
            (0x78, 0x7_0000, 12, 0x78),
        ] {
            bed.restore();
            crate::tasks::second_task(bed);
            for v in [10, 12] {
                bed.put64(crate::bed::IDT + v * 8, 0x0000_8500_0068_0000);
            }
            bed.gdt(sel::FREE, 0x0010_EC00_0008_0800);
            bed.gdt(0x78, descriptor(0, 0xF_FFFF, 0xC013));
            bed.put32(TSS + 4, esp);
            bed.put32(TSS + 8, u32::from(ss));
            bed.put(CODE + 0x800, program!(32: "pop dword ptr [0x200000]").bytes);
            bed.user();
            bed.run(&call);
            assert_eq!(
                (bed.get32(DATA), bed.get32(TSS + 32)),
                (error, CODE as u32 + 1),
                "#{vector} for {ss:x}"
            );
        }
    });
}

#[test]
fn outer_returns() {
    for start in [Start::Protected, Start::Compat] {
        both(start, |bed| {
            bed.gdt(sel::FREE, descriptor(0, 0xF_FFFF, 0xC073)); // not present, DPL 3
            bed.gdt(sel::FREE + 0x18, descriptor(0, 0xFFF, 0x40FB)); // a short code segment
            let frames = [
                (sel::USER_CODE32, 0x10_0800u32, 0u16, 13, 0),
                (sel::USER_CODE32, 0x10_0800, 3, 13, 0),
                (sel::USER_CODE32, 0x10_0800, sel::USER_DATA & !3, 13, u32::from(sel::USER_DATA & !3)),
                (sel::USER_CODE32, 0x10_0800, sel::DATA | 3, 13, u32::from(sel::DATA)),
                (sel::USER_CODE32, 0x10_0800, sel::USER_CODE32, 13, u32::from(sel::USER_CODE32 & !3)),
                (sel::USER_CODE32, 0x10_0800, sel::FREE | 3, 12, FREE),
                (sel::CODE32 | 3, 0x10_0800, sel::USER_DATA, 13, u32::from(sel::CODE32)),
                (sel::FREE + 0x1B, 0x10_0800, sel::USER_DATA, 13, 0),
                (0x1003, 0, sel::USER_DATA, 13, 0x1000),
                (3, 0, sel::USER_DATA, 13, 0),
            ];
            for (cs, eip, ss, vector, error) in frames {
                eprintln!("{cs:x} {ss:x}");
                for iret in [false, true] {
                    bed.reset();
                    let top = STACK - 0x100;
                    let frame = if iret {
                        vec![eip, cs.into(), 2, 0x7_8000, ss.into()]
                    } else {
                        vec![eip, cs.into(), 0x7_8000, ss.into()]
                    };
                    for (i, v) in frame.iter().enumerate() {
                        bed.put32(top + 4 * i as u64, *v);
                    }
                    bed.cpu.gpr[gpr::RSP] = top;
                    let p = if iret { program!(32: "nop"; "iretd") } else { program!(32: "nop"; "retf") };
                    bed.faults(&p, vector, error);
                }
            }
        });
    }
    both(Start::Long, |bed| {
        // A null SS: allowed to CPL 0 with RPL 0, not to CPL 3.
        bed.finish(&program!(64: "push 0", "push 0x70000", "push 2", "push 0x10", "lea rax, [rip + 2f]", "push rax", "iretq", "2: nop"));
        assert_eq!(bed.cpu.segment(SegReg::Ss).selector, 0);
        bed.reset();
        bed.faults(&program!(64: "push 0", "push 0x70000", "push 2", "push 0x33", "push 0"; "iretq"), 13, 0);
        bed.faults(&program!(64: "push 3", "push 0x70000", "push 2", "push 0x33", "push 0"; "iretq"), 13, 0);
        bed.faults(&program!(64: "push 3", "push 0x70000", "push 2", "push 0x10", "push 0"; "iretq"), 13, 0);
        // A non-canonical RSP is loaded as it is.
        bed.run(&program!(64: "push 0x18", "mov rax, 0x800000000000", "push rax", "push 2", "push 0x10", "lea rax, [rip + 2f]", "push rax", "iretq", "2: hlt"));
        assert_eq!(bed.cpu.gpr[gpr::RSP], 0x8000_0000_0000);
    });
}

/// Data segments that the outer ring may not have become null; conforming code and its own stay (SDM 2B, RET).
#[test]
fn segments_after_an_outer_return() {
    both(Start::Protected, |bed| {
        bed.gdt(sel::FREE, descriptor(0, 0xF_FFFF, 0xC09F)); // conforming, readable, DPL 0
        bed.gdt(sel::FREE + 0x18, descriptor(0, 0xF_FFFF, 0xC09B)); // non-conforming, readable, DPL 0
        handlers(bed);
        bed.run(&program!(32: "mov eax, 0x58", "mov ds, eax", "mov eax, 0x70", "mov es, eax", "mov eax, 0x2B", "mov fs, eax", "mov eax, 0x18", "mov gs, eax",
            "push 0x2B", "push 0x78000", "push 0x23", "push 0x100800", "retf"));
        assert_eq!(bed.taken().vector, 0x50);
        assert_eq!(
            [SegReg::Ds, SegReg::Es, SegReg::Fs, SegReg::Gs].map(|s| bed.cpu.segment(s).selector),
            [0x58, 0, 0x2B, 0]
        );
    });
}

#[test]
fn local_descriptor_tables() {
    for start in [Start::Protected, Start::Compat] {
        both(start, |bed| {
            let long = start == Start::Compat;
            bed.put(DATA, &[0; 64]);
            bed.put64(DATA + 8, descriptor(0x8000, 0xFFF, 0x4093));
            bed.put32(0x8000 + 0x10, 0xFEED);
            bed.gdt(sel::FREE, descriptor(DATA, 0xF, 0x0082));
            bed.gdt(sel::FREE + 8, 0);
            bed.finish(&program!(32: "mov eax, 0x58", "lldt ax", "sldt ebx", "mov ecx, 0xC", "mov fs, ecx", "mov edx, fs:[0x10]", "lsl esi, ecx"));
            let g = bed.cpu.gpr;
            assert_eq!((g[gpr::RBX], g[gpr::RDX], g[gpr::RSI]), (u64::from(FREE), 0xFEED, 0xFFF));
            // Beyond its limit; after a null LLDT there is no table at all.
            bed.reset();
            bed.faults(&program!(32: "mov eax, 0x58", "lldt ax", "mov ecx, 0x14"; "mov fs, ecx"), 13, 0x14);
            bed.faults(&program!(32: "mov eax, 0x58", "lldt ax", "xor eax, eax", "lldt ax", "mov ecx, 0xC"; "mov fs, ecx"), 13, 0xC);
            for (raw, vector) in [
                (descriptor(DATA, 0xF, 0x0002), 11),
                (descriptor(DATA, 0xF, 0x0089), 13),
                (descriptor(DATA, 0xF, 0x0093), 13),
            ] {
                bed.gdt(sel::FREE, raw);
                bed.reset();
                bed.faults(&program!(32: "mov eax, 0x58"; "lldt ax"), vector, FREE);
            }
            bed.faults(&program!(32: "mov eax, 0xC"; "lldt ax"), 13, 0xC);
            // LTR: null, local, busy, absent, no TSS; it marks the descriptor busy.
            bed.faults(&program!(32: "xor eax, eax"; "ltr ax"), 13, 0);
            bed.faults(&program!(32: "mov eax, 0xC"; "ltr ax"), 13, 0xC);
            bed.faults(&program!(32: "mov eax, 0x48"; "ltr ax"), 13, 0x48);
            bed.gdt(sel::FREE, 0x0000_0900_3800_0067);
            bed.faults(&program!(32: "mov eax, 0x58"; "ltr ax"), 11, FREE);
            bed.gdt(sel::FREE, 0x0000_8900_3800_0067);
            bed.reset();
            bed.finish(&program!(32: "mov eax, 0x58", "ltr ax", "str ebx"));
            assert_eq!((bed.cpu.gpr[gpr::RBX], bed.cpu.tr.base), (u64::from(FREE), 0x3800));
            assert_eq!(bed.get64(GDT + 0x58) >> 40 & 0xF, 11);
            if long {
                // 16 bytes: bits 12:8 of the upper half's second word must be zero.
                bed.gdt(sel::FREE, 0x0000_8900_3800_0067);
                bed.gdt(sel::FREE + 8, 1 << 40);
                bed.reset();
                bed.faults(&program!(32: "mov eax, 0x58"; "ltr ax"), 13, FREE);
            }
        });
    }
}

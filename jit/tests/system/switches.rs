//! Task switches in detail: busy bits, back links, NT, 16-bit TSSs, what the new task's state refuses (SDM 3A, chapter 7,
//! tables 7-1 and 7-2).

use crate::bed::{Bed, CODE, DATA, GDT, HANDLERS, IDT, Start, TSS, both, pte, sel};
use crate::segments::descriptor;
use crate::tasks::{TSS2, second_task};
use paravane_cpu::{cr0, cr4, flags, gpr};

const JUMP: &[u8] = &[0xEA, 0, 0, 0, 0, 0x68, 0];
const CALL: &[u8] = &[0x9A, 0, 0, 0, 0, 0x68, 0];

fn busy(bed: &Bed, selector: u64) -> bool {
    bed.get64(GDT + selector) >> 41 & 1 != 0
}

/// Starts `code` at CODE with a HLT behind and lets it run.
fn start(bed: &mut Bed, code: &[u8]) {
    bed.put(CODE, &[0xF4; 32]);
    bed.put(CODE, code);
    bed.cpu.rip = CODE;
    bed.go();
}

/// Table 7-2: busy flags, NT and the back link by JMP, CALL, an interrupt and IRET.
#[test]
fn effects_on_busy_nt_and_link() {
    both(Start::Protected, |bed| {
        let fresh = |bed: &mut Bed| {
            bed.restore();
            second_task(bed);
            bed.put16(TSS2, 0xAAAA);
            bed.put(CODE + 0x800, &[0xF4]);
            bed.put64(IDT + 0x50 * 8, 0x0000_E500_0068_0000);
        };
        fresh(bed);
        start(bed, JUMP);
        assert_eq!((busy(bed, 0x48), busy(bed, 0x68), bed.get16(TSS2)), (false, true, 0xAAAA));
        assert_eq!(bed.cpu.rflags & flags::NT, 0);
        for code in [CALL, &[0xCD, 0x50]] {
            fresh(bed);
            bed.cpu.rflags |= flags::NT | flags::CF;
            start(bed, code);
            assert_eq!((busy(bed, 0x48), busy(bed, 0x68), bed.get16(TSS2)), (true, true, sel::TSS));
            assert_ne!(bed.cpu.rflags & flags::NT, 0);
            assert_eq!(
                u64::from(bed.get32(TSS + 36)) & (flags::NT | flags::CF),
                flags::NT | flags::CF,
                "the old task's NT is saved"
            );
            assert_eq!(bed.get32(TSS + 32), CODE as u32 + code.len() as u32);
            // IRET: back, this one available again, its saved NT clear.
            bed.put(CODE + 0x801, &[0xCF]);
            bed.go();
            assert_eq!((busy(bed, 0x48), busy(bed, 0x68), bed.cpu.tr.selector), (true, false, sel::TSS));
            assert_eq!(u64::from(bed.get32(TSS2 + 36)) & flags::NT, 0);
            assert_eq!(bed.cpu.rip, CODE + code.len() as u64 + 1);
            assert_ne!(bed.cpu.cr0 & cr0::TS, 0);
        }
        // The FPU is to be switched lazily.
        bed.restore();
        second_task(bed);
        bed.put(CODE + 0x800, &[0xD9, 0xE8]);
        start(bed, JUMP);
        assert_eq!((bed.taken().vector, bed.taken().rip), (7, CODE + 0x800));
    });
}

#[test]
fn back_links_that_lead_nowhere() {
    both(Start::Protected, |bed| {
        for (link, raw, vector, error) in [
            (0x68u16, 0x0000_8900_3800_0067u64, 10, 0x68), // not busy
            (0x68, 0x0000_8200_3800_0067, 10, 0x68),       // no TSS
            (0x68, 0x0000_0B00_3800_0067, 11, 0x68),       // not present
            (0x68, 0x0000_8B00_3800_0066, 10, 0x68),       // too short
            (0x6C, 0, 10, 0x6C),                           // local
            (0x1000, 0, 10, 0x1000),
        ] {
            bed.restore();
            bed.gdt(0x68, raw);
            bed.put16(TSS, link);
            bed.cpu.rflags |= flags::NT;
            bed.faults(&program!(32: "nop"; "iretd"), vector, error);
        }
    });
}

/// Privilege of TSS descriptors and task gates (SDM 3A, 7.2.5 and 7.3).
#[test]
fn who_may_switch() {
    both(Start::Protected, |bed| {
        second_task(bed);
        bed.put(CODE + 0x800, &[0xF4]);
        bed.user();
        start(bed, JUMP);
        assert_eq!((bed.taken().vector, bed.taken().error), (13, Some(0x68)), "a TSS of DPL 0");
        // A task gate of DPL 3 leads to it all the same.
        bed.reset();
        bed.gdt(sel::FREE, 0x0000_E500_0068_0000);
        bed.user();
        start(bed, &[0xEA, 0, 0, 0, 0, 0x5B, 0]);
        assert_eq!((bed.cpu.tr.selector, bed.cpu.rip, bed.cpu.cpl), (0x68, CODE + 0x801, 0));
        // A gate that is not present, or names a local or null selector.
        for (gate, vector, error) in [
            (0x0000_6500_0068_0000u64, 11, 0x58),
            (0x0000_E500_006C_0000, 13, 0x6C),
            (0x0000_E500_0000_0000, 13, 0),
        ] {
            bed.restore();
            second_task(bed);
            bed.gdt(sel::FREE, gate);
            bed.faults(&program!(32: "nop"; ".byte 0xEA, 0, 0, 0, 0, 0x58, 0"), vector, error);
        }
    });
}

#[test]
fn sixteen_bit_tasks() {
    both(Start::Protected, |bed| {
        // A 16-bit TSS: IP at 14, FLAGS, AX…DI, ES CS SS DS, LDT at 42.
        bed.gdt(0x68, 0x0000_8100_3800_002B);
        bed.put(TSS2, &[0; 44]);
        let words: [u16; 15] =
            [0x4800, 0x0002, 1, 2, 3, 4, 0x7F00, 6, 7, 8, sel::DATA, sel::CODE16, sel::DATA16, sel::DATA, 0];
        for (i, w) in words.into_iter().enumerate() {
            bed.put16(TSS2 + 14 + 2 * i as u64, w);
        }
        bed.put(0x4800, program!(16: "mov ax, cx", "hlt", "iret").bytes);
        bed.cpu.gpr[gpr::RBX] = 0x1234_5678;
        start(bed, CALL);
        let g = bed.cpu.gpr;
        assert_eq!(
            (bed.cpu.rip, g[gpr::RAX] & 0xFFFF, g[gpr::RBX] & 0xFFFF, g[gpr::RSP] & 0xFFFF),
            (0x4803, 2, 4, 0x7F00)
        );
        assert_eq!(bed.get32(TSS + 40 + 12), 0x1234_5678, "the old task's 32-bit TSS has all of EBX");
        assert_eq!(bed.get16(TSS2), sel::TSS);
        // Back to the 32-bit task: its registers are whole.
        bed.go();
        assert_eq!((bed.cpu.gpr[gpr::RBX], bed.cpu.rip), (0x1234_5678, CODE + 8));
        assert_eq!(bed.get16(TSS2 + 14), 0x4804);
    });
}

/// Segments of the new task are loaded after the switch: faults are the new task's (SDM 3A, table 7-1).
#[test]
fn bad_segments_in_the_new_task() {
    both(Start::Protected, |bed| {
        for (offset, value, vector, error) in [
            (76, sel::DATA, 10, u32::from(sel::DATA)),         // CS is data
            (76, 0, 10, 0),                                    // CS is null
            (76, sel::CODE32 | 3, 10, u32::from(sel::CODE32)), // DPL of CS
            (76, sel::FREE, 11, 0x58),                         // CS is not present
            (80, sel::CODE32, 10, u32::from(sel::CODE32)),     // SS is code
            (80, 0, 10, 0),
            (80, sel::FREE + 0x18, 12, 0x70),          // SS is not present
            (84, sel::FREE + 0x20, 10, 0x78),          // DS is execute-only
            (84, sel::FREE + 0x18, 11, 0x70),          // DS is not present
            (72, 0x1000, 10, 0x1000),                  // ES beyond the GDT
            (96, sel::DATA, 10, u32::from(sel::DATA)), // LDT
            (96, 0x0C, 10, 0x0C),
        ] {
            // By a jump, and by an external interrupt, which sets EXT.
            for external in [false, true] {
                eprintln!("{offset} {value:x} {external}");
                bed.restore();
                second_task(bed);
                bed.gdt(sel::FREE, descriptor(0, 0xF_FFFF, 0xC01B));
                bed.gdt(sel::FREE + 0x18, descriptor(0, 0xF_FFFF, 0xC013));
                bed.gdt(sel::FREE + 0x20, descriptor(0, 0xF_FFFF, 0xC099));
                bed.put16(TSS2 + offset, value);
                // The handler is a third task: the second one's stack may be what is wrong.
                bed.gdt(0x80, 0x0000_8900_3900_0067);
                let tss: Vec<u8> =
                    (0..104).step_by(8).flat_map(|i| bed.get64(TSS2 + i).to_le_bytes()).collect();
                bed.put(0x3900, &tss);
                for (at, v) in [
                    (32, (CODE + 0x900) as u32),
                    (56, 0x6_4000),
                    (76, 8),
                    (80, 0x18),
                    (84, 0x18),
                    (72, 0x18),
                    (96, 0),
                ] {
                    bed.put32(0x3900 + at, v);
                }
                for v in [10, 11, 12] {
                    bed.put64(IDT + v * 8, 0x0000_8500_0080_0000);
                }
                bed.put(CODE + 0x900, program!(32: "pop dword ptr [0x200000]", "hlt").bytes);
                if external {
                    bed.put64(IDT + 0x60 * 8, 0x0000_8500_0068_0000);
                    bed.interrupt_at_port(0x60);
                    start(bed, &[0xE6, 0x80, 0xFB, 0x90, 0x90]); // OUT 80H, AL; STI; NOP; NOP
                } else {
                    start(bed, JUMP);
                }
                assert_eq!((bed.cpu.tr.selector, bed.get16(0x3900)), (0x80, 0x68), "raised in the new task");
                assert_eq!(bed.get32(DATA), error | u32::from(external), "#{vector}");
                assert_eq!(u64::from(bed.get32(TSS2 + 32)), CODE + 0x800);
            }
        }
    });
}

/// CR3 comes from the TSS; faults of the TSS itself are the old task's.
#[test]
fn tasks_and_paging() {
    both(Start::Paged32, |bed| {
        second_task(bed);
        // Another directory in which DATA is elsewhere.
        let (directory, table) = (crate::bed::SPARE, crate::bed::SPARE + 0x1000);
        for i in 0..4 {
            bed.put32(directory + i * 4, bed.get32(crate::bed::PD32 + i * 4));
        }
        for i in 0..1024 {
            bed.put32(table + i * 4, bed.get32(crate::bed::PT32 + i * 4));
        }
        bed.put32(directory, (table | pte::ALL) as u32);
        bed.put32(table + (DATA >> 12) * 4, (0x30_0000 | pte::ALL) as u32);
        bed.put32(DATA, 1);
        bed.put32(0x30_0000, 2);
        bed.put32(TSS2 + 28, directory as u32);
        bed.put(CODE + 0x800, program!(32: "mov ebx, [0x200000]", "hlt").bytes);
        start(bed, &[&[0xA1, 0, 0, 0x20, 0][..], JUMP].concat());
        assert_eq!((bed.cpu.gpr[gpr::RBX], bed.get32(TSS + 40), bed.cpu.cr3), (2, 1, directory));
        // The new TSS is not there: #PF before anything changes.
        bed.restore();
        second_task(bed);
        bed.map(0x30_1000, 0, 0);
        bed.gdt(0x68, descriptor(0x30_0FC0, 0x67, 0x89));
        bed.flush();
        bed.page_faults(&program!(32: "nop"; ".byte 0xEA, 0, 0, 0, 0, 0x68, 0"), 0x30_1000, 0);
        assert_eq!((bed.cpu.tr.selector, busy(bed, 0x68)), (sel::TSS, false));
    });
}

/// EFLAGS.VM in the TSS: a virtual-8086 task.
#[test]
fn a_virtual_8086_task() {
    both(Start::Protected, |bed| {
        second_task(bed);
        bed.put32(TSS2 + 32, 0x10);
        bed.put32(TSS2 + 36, (flags::VM | flags::IOPL | 2) as u32);
        bed.put32(TSS2 + 56, 0xFF00);
        for (i, s) in [0x2000u16, 0x9000, 0x8000, 0x2000, 0, 0].into_iter().enumerate() {
            bed.put32(TSS2 + 72 + 4 * i as u64, s.into());
        }
        bed.put32(TSS2 + 4, 0x6_8000);
        bed.put32(TSS2 + 8, u32::from(sel::DATA));
        bed.put(0x9_0010, program!(16: "mov ax, ds", "mov word ptr [8], 0x4321", "int 0x50").bytes);
        bed.gate(0x50, 14, 3, HANDLERS + 0x500);
        start(bed, JUMP);
        let t = bed.taken();
        assert_eq!((t.vector, t.cs, t.ss, t.sp), (0x50, 0x9000, 0x8000, 0xFF00));
        assert_eq!((bed.get16(0x2_0008), bed.cpu.gpr[gpr::RAX] & 0xFFFF), (0x4321, 0x2000));
        assert_eq!(bed.cpu.gpr[gpr::RSP], 0x6_8000 - 36);
        // Under VME with a virtual interrupt pending: #GP before its first instruction.
        bed.restore();
        bed.cpu.cr4 |= cr4::VME;
        bed.put32(TSS2 + 36, (flags::VM | flags::VIF | flags::VIP | 2) as u32);
        bed.gdt(0x68, descriptor(TSS2, 0x67, 0x89));
        start(bed, JUMP);
        let t = bed.taken();
        assert_eq!((t.vector, t.error, t.cs, t.rip), (13, Some(0), 0x9000, 0x10));
    });
}

/// Faults whose handlers are tasks: the error code is pushed onto the new stack (SDM 3A, 6.12.2, 6.13 and 7.3).
#[test]
fn double_faults_and_page_faults_by_task_gate() {
    for start in [Start::Protected, Start::Paged32] {
        both(start, |bed| {
            let prepare = |bed: &mut Bed, vector: u64| {
                bed.restore();
                second_task(bed);
                bed.put32(TSS + 28, bed.cpu.cr3 as u32);
                bed.put64(IDT + vector * 8, 0x0000_8500_0068_0000);
                bed.put(CODE + 0x800, program!(32: "pop ebx", "mov edx, cr2").bytes);
            };
            prepare(bed, 8);
            bed.put64(IDT, 0);
            bed.put64(IDT + 13 * 8, 0);
            bed.run(&program!(32: "mov ebx, 77", "xor ecx, ecx", "div ecx"));
            assert_eq!((bed.cpu.tr.selector, bed.cpu.gpr[gpr::RBX], bed.get16(TSS2)), (0x68, 0, sel::TSS));
            assert!(busy(bed, 0x48) && busy(bed, 0x68) && bed.cpu.rflags & flags::NT != 0);
            assert_eq!((bed.get32(TSS + 52), bed.cpu.gpr[gpr::RSP]), (77, 0x6_8000), "EBX was saved");
            if start == Start::Protected {
                return;
            }
            prepare(bed, 14);
            let p = program!(32: "mov ebx, 77", "stc"; "mov [0x40000000], eax");
            bed.run(&p);
            assert_eq!((bed.cpu.tr.selector, bed.cpu.gpr[gpr::RBX]), (0x68, 2), "a write");
            assert_eq!((bed.cpu.gpr[gpr::RDX], u64::from(bed.get32(TSS + 32))), (0x4000_0000, CODE + p.at));
            assert_eq!(u64::from(bed.get32(TSS + 36)) & flags::CF, flags::CF);
        });
    }
}

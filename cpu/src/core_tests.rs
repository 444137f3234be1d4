//! Delivery, returns, debug traps and system calls through the core.

use super::*;
use crate::state::{Segment, attr, cr0, cr4, efer};
use crate::testbed::{Bed, CODE, IDT, TSS};
use paravane_memory::PhysAddr;

/// 64-bit mode at CPL 0 with the first 2 MiB mapped for everybody. Selectors as in [`Bed::protected`], code 64-bit;
/// RSP0 is 6000H, IST1 5000H.
fn long() -> Bed {
    let mut bed = Bed::protected();
    for (at, entry) in [(0x10_0000u64, 0x10_1007u64), (0x10_1000, 0x10_2007), (0x10_2000, 0x87)] {
        bed.put(at, &entry.to_le_bytes());
    }
    bed.gdt(1, 0x00AF_9B00_0000_FFFF);
    bed.gdt(3, 0x00AF_FB00_0000_FFFF);
    bed.put(TSS + 4, &0x6000u64.to_le_bytes());
    bed.put(TSS + 36, &0x5000u64.to_le_bytes());
    bed.cpu.cr0 |= cr0::PG | cr0::WP;
    bed.cpu.cr4 = cr4::PAE;
    bed.cpu.cr3 = 0x10_0000;
    bed.cpu.efer = efer::LME | efer::LMA | efer::SCE;
    bed.cpu.seg[SegReg::Cs as usize] = Segment::flat(8, 0xA09B);
    bed
}

fn user64(bed: &mut Bed) {
    bed.user();
    bed.cpu.seg[SegReg::Cs as usize] = Segment::flat(0x1B, 0xA0FB);
}

fn gate64(bed: &mut Bed, vector: u64, offset: u64, ist: u64, dpl: u64) {
    let low = (offset & 0xFFFF) | 8 << 16 | ist << 32 | (0x8E | dpl << 5) << 40;
    bed.put(IDT + vector * 16, &low.to_le_bytes());
    bed.put(IDT + vector * 16 + 8, &[0; 8]);
}

#[test]
fn real_mode_interrupts_push_three_words() {
    let mut bed = Bed::real();
    bed.put(0x21 * 4, &[0x34, 0x12, 0x00, 0xF0]);
    bed.cpu.rflags |= flags::IF | flags::TF;
    bed.run(&[0xCD, 0x21]);
    assert_eq!((bed.cpu.rip, bed.cpu.segment(SegReg::Cs).base), (0x1234, 0xF0000));
    assert_eq!(bed.cpu.gpr[gpr::RSP], 0x6FFA);
    assert_eq!(bed.get32(0x6FFA), CODE as u32 + 2);
    assert_eq!(bed.get32(0x6FFE) as u16, 0x302);
    assert_eq!(bed.cpu.rflags & (flags::IF | flags::TF), 0);
    bed.put(0xF1234, &[0xCF]);
    bed.step();
    assert_eq!((bed.cpu.rip, bed.cpu.segment(SegReg::Cs).selector), (CODE + 2, 0));
    assert_eq!(bed.cpu.rflags, 0x302);
}

#[test]
fn inner_privilege_gates_switch_stacks_and_iret_goes_back() {
    let mut bed = Bed::protected();
    bed.gate(0x80, 14, 3, 8, 0x9000);
    bed.user();
    bed.cpu.rflags |= flags::IF;
    bed.run(&[0xCD, 0x80]);
    assert_eq!((bed.cpu.rip, bed.cpu.cpl, bed.cpu.gpr[gpr::RSP]), (0x9000, 0, 0x6000 - 20));
    let frame: Vec<u32> = (0..5).map(|i| bed.get32(0x6000 - 20 + i * 4)).collect();
    assert_eq!(frame, [CODE as u32 + 2, 0x1B, 0x202, 0x7000, 0x3B]);
    assert_eq!(bed.cpu.rflags & flags::IF, 0);
    bed.run(&[0xCF]);
    assert_eq!((bed.cpu.rip, bed.cpu.cpl, bed.cpu.gpr[gpr::RSP]), (CODE + 2, 3, 0x7000));
    assert_eq!(bed.cpu.segment(SegReg::Ss).selector, 0x3B);
    assert_eq!(bed.cpu.rflags, 0x202);
}

#[test]
fn gates_check_privilege_presence_and_limit() {
    let mut bed = Bed::protected();
    bed.gate(13, 14, 0, 8, 0x9000);
    bed.gate(11, 14, 0, 8, 0xA000);
    bed.gate(0x30, 14, 0, 8, 0x9000);
    bed.user();
    bed.run(&[0xCD, 0x30]);
    assert_eq!((bed.cpu.rip, bed.get32(0x6000 - 24)), (0x9000, 0x30 * 8 + 2));
    assert_eq!(bed.get32(0x6000 - 20), CODE as u32, "a fault returns to the INT");
    assert_ne!(bed.get32(0x6000 - 12) & flags::RF as u32, 0, "faults push RF");
    let mut bed = Bed::protected();
    bed.gate(11, 14, 0, 8, 0xA000);
    bed.gate(0x30, 0, 3, 8, 0);
    bed.put(IDT + 0x30 * 8 + 5, &[0x6E]);
    bed.run(&[0xCD, 0x30]);
    assert_eq!((bed.cpu.rip, bed.get32(bed.cpu.gpr[gpr::RSP])), (0xA000, 0x30 * 8 + 2));
}

#[test]
fn double_and_triple_faults() {
    let mut bed = Bed::protected();
    bed.gate(8, 14, 0, 8, 0xB000);
    // #GP whose gate is missing gives #GP while delivering #GP.
    bed.run(&[0x8E, 0xD8]); // MOV DS, AX
    assert_eq!(bed.cpu.rip, CODE + 2, "a null selector is fine");
    bed.cpu.gpr[gpr::RAX] = 0xFFF8;
    assert_eq!(bed.run(&[0x8E, 0xD8]), Step::Done);
    assert_eq!((bed.cpu.rip, bed.get32(bed.cpu.gpr[gpr::RSP])), (0xB000, 0));
    bed.cpu.idtr.limit = 0;
    bed.cpu.gpr[gpr::RAX] = 0xFFF8;
    assert_eq!(bed.run(&[0x8E, 0xD8]), Step::TripleFault);
}

#[test]
fn long_mode_delivery_aligns_and_uses_the_ist() {
    let mut bed = long();
    gate64(&mut bed, 3, 0x9000, 0, 3);
    gate64(&mut bed, 6, 0xA000, 1, 0);
    user64(&mut bed);
    bed.cpu.gpr[gpr::RSP] = 0x7003;
    bed.run(&[0xCC]);
    assert_eq!((bed.cpu.rip, bed.cpu.cpl, bed.cpu.gpr[gpr::RSP]), (0x9000, 0, 0x6000 - 40));
    let frame: Vec<u64> = (0..5).map(|i| bed.get64(0x6000 - 40 + i * 8)).collect();
    assert_eq!(frame, [CODE + 1, 0x1B, 2, 0x7003, 0x3B]);
    assert_eq!(bed.cpu.segment(SegReg::Ss).selector, 0);
    bed.run(&[0x48, 0xCF]);
    assert_eq!((bed.cpu.rip, bed.cpu.cpl, bed.cpu.gpr[gpr::RSP]), (CODE + 1, 3, 0x7003));
    bed.run(&[0x0F, 0x0B]);
    assert_eq!((bed.cpu.rip, bed.cpu.gpr[gpr::RSP]), (0xA000, 0x5000 - 40));
    assert_eq!(bed.get64(0x5000 - 40), CODE + 1);
}

#[test]
fn page_faults_set_cr2_and_push_their_code() {
    let mut bed = long();
    gate64(&mut bed, 14, 0x9000, 0, 0);
    user64(&mut bed);
    bed.cpu.gpr[gpr::RBX] = 0x40_0010;
    bed.run(&[0x48, 0x89, 0x03]); // MOV [RBX], RAX
    assert_eq!((bed.cpu.rip, bed.cpu.cr2), (0x9000, 0x40_0010));
    assert_eq!(bed.get64(bed.cpu.gpr[gpr::RSP]), 6);
}

#[test]
fn syscall_and_sysret() {
    let mut bed = long();
    user64(&mut bed);
    bed.cpu.msr.star = 0x23 << 48 | 8 << 32;
    bed.cpu.msr.lstar = 0x9000;
    bed.cpu.msr.sfmask = flags::IF;
    bed.cpu.rflags |= flags::IF;
    bed.run(&[0x0F, 0x05]);
    assert_eq!(
        (bed.cpu.rip, bed.cpu.cpl, bed.cpu.gpr[gpr::RCX], bed.cpu.gpr[11]),
        (0x9000, 0, CODE + 2, 0x202)
    );
    assert_eq!(bed.cpu.rflags & flags::IF, 0);
    assert_eq!(bed.cpu.segment(SegReg::Ss).selector, 0x10);
    bed.run(&[0x48, 0x0F, 0x07]);
    assert_eq!((bed.cpu.rip, bed.cpu.cpl, bed.cpu.rflags), (CODE + 2, 3, 0x202));
    assert_eq!(bed.cpu.segment(SegReg::Cs).selector, 0x33);
    assert!(bed.cpu.code64());
}

#[test]
fn interrupts_wait_for_the_shadow_and_wake_from_halt() {
    let mut bed = Bed::protected();
    bed.gate(0x40, 14, 0, 8, 0x9000);
    bed.bus.pending.lock().expect("queue").push_back(0x40);
    bed.attention.set(Attention::INTERRUPT);
    bed.poll();
    assert_eq!(bed.cpu.rip, CODE, "IF is clear");
    bed.run(&[0xFB]);
    bed.poll();
    assert_eq!(bed.cpu.rip, CODE + 1, "STI's shadow");
    assert_eq!(bed.run(&[0xF4]), Step::Halt);
    assert!(bed.cpu.halted);
    bed.poll();
    assert_eq!((bed.cpu.rip, bed.cpu.halted), (0x9000, false));
    assert_eq!(bed.get32(bed.cpu.gpr[gpr::RSP]), CODE as u32 + 2);
    assert_eq!(bed.cpu.rflags & flags::IF, 0);
}

#[test]
fn nmi_is_blocked_until_iret() {
    let mut bed = Bed::protected();
    bed.gate(2, 14, 0, 8, 0x9000);
    bed.attention.set(Attention::NMI);
    bed.poll();
    assert_eq!(bed.cpu.rip, 0x9000);
    bed.attention.set(Attention::NMI);
    bed.poll();
    assert_eq!(bed.cpu.rip, 0x9000);
    bed.run(&[0xCF]);
    assert_eq!((bed.cpu.rip, bed.cpu.nmi_blocked), (CODE, false));
    bed.poll();
    assert_eq!(bed.cpu.rip, 0x9000);
}

#[test]
fn single_step_traps_after_the_instruction() {
    let mut bed = Bed::protected();
    bed.gate(1, 14, 0, 8, 0x9000);
    bed.cpu.rflags |= flags::TF;
    bed.run(&[0x90]);
    assert_eq!(bed.cpu.rip, 0x9000);
    assert_eq!(bed.cpu.dr[6] & dr6::BS, dr6::BS);
    let frame: Vec<u32> = (0..3).map(|i| bed.get32(bed.cpu.gpr[gpr::RSP] + i * 4)).collect();
    assert_eq!(frame, [CODE as u32 + 1, 8, 0x102]);
}

#[test]
fn instruction_breakpoints_respect_rf() {
    let mut bed = Bed::protected();
    bed.gate(1, 14, 0, 8, 0x9000);
    bed.cpu.dr[0] = CODE;
    bed.cpu.dr[7] = 0x401;
    bed.run(&[0x90]);
    assert_eq!((bed.cpu.rip, bed.cpu.dr[6] & 1), (0x9000, 1));
    bed.cpu.rip = CODE;
    bed.cpu.rflags |= flags::RF;
    bed.run(&[0x90]);
    assert_eq!((bed.cpu.rip, bed.cpu.rflags & flags::RF), (CODE + 1, 0));
}

#[test]
fn task_switch_saves_and_loads_everything() {
    let mut bed = Bed::protected();
    let new = 0x3200u64;
    bed.gdt(9, 0x0000_8900_3200_0067);
    for (at, v) in [
        (0x20, 0x9000u32),
        (0x24, 2),
        (0x28, 0x1111),
        (0x38, 0x5800),
        (0x48, 0x10),
        (0x4C, 8),
        (0x50, 0x10),
        (0x54, 0x10),
    ] {
        bed.put(new + at, &v.to_le_bytes());
    }
    bed.cpu.gpr[gpr::RBX] = 0xABCD;
    bed.run(&[0x9A, 0, 0, 0, 0, 0x48, 0]); // CALL 48H:0
    assert_eq!((bed.cpu.rip, bed.cpu.gpr[gpr::RAX], bed.cpu.gpr[gpr::RSP]), (0x9000, 0x1111, 0x5800));
    assert_eq!((bed.cpu.tr.selector, bed.get32(new)), (0x48, 0x40));
    assert_ne!(bed.cpu.rflags & flags::NT, 0);
    assert_ne!(bed.cpu.cr0 & cr0::TS, 0);
    assert_eq!((bed.get32(TSS + 0x20), bed.get32(TSS + 0x34)), (CODE as u32 + 7, 0xABCD));
    assert_eq!(bed.gdt_entry(9) >> 40 & 0xF, 11);
    for (at, v) in [(0x48u64, 0x10u32), (0x4C, 8), (0x50, 0x10), (0x54, 0x10)] {
        assert_eq!(bed.get32(TSS + at), v);
    }
    bed.run(&[0xCF]);
    assert_eq!((bed.cpu.rip, bed.cpu.gpr[gpr::RBX], bed.cpu.tr.selector), (CODE + 7, 0xABCD, 0x40));
    assert_eq!(bed.gdt_entry(9) >> 40 & 0xF, 9, "no longer busy");
    assert_eq!(bed.cpu.rflags & flags::NT, 0);
}

#[test]
fn call_gates_copy_parameters_and_return_outward() {
    let mut bed = Bed::protected();
    let offset = 0x9000u64;
    bed.gdt(9, offset | 8 << 16 | 1 << 32 | 0xEC << 40);
    bed.user();
    bed.put(0x7000, &0x5555_AAAAu32.to_le_bytes());
    bed.run(&[0x9A, 0, 0, 0, 0, 0x4B, 0]);
    assert_eq!((bed.cpu.rip, bed.cpu.cpl, bed.cpu.gpr[gpr::RSP]), (0x9000, 0, 0x6000 - 20));
    let frame: Vec<u32> = (0..5).map(|i| bed.get32(0x6000 - 20 + i * 4)).collect();
    assert_eq!(frame, [CODE as u32 + 7, 0x1B, 0x5555_AAAA, 0x7000, 0x3B]);
    bed.cpu.seg[SegReg::Es as usize] = Segment::flat(0x10, 0xC093);
    bed.run(&[0xCA, 4, 0]);
    assert_eq!((bed.cpu.rip, bed.cpu.cpl, bed.cpu.gpr[gpr::RSP]), (CODE + 7, 3, 0x7004));
    assert!(!bed.cpu.segment(SegReg::Es).present(), "inner data segments are dropped");
}

#[test]
fn v8086_enters_by_iret_and_leaves_by_interrupt() {
    let mut bed = Bed::protected();
    bed.gate(13, 14, 0, 8, 0x9000);
    let stack = 0x6800u64;
    let image = [0x100u32, 0x800, 0x2_0002, 0x1000, 0x200, 0x300, 0x400, 0x500, 0x600];
    for (i, v) in image.iter().enumerate() {
        bed.put(stack + i as u64 * 4, &v.to_le_bytes());
    }
    bed.cpu.gpr[gpr::RSP] = stack;
    bed.run(&[0xCF]);
    assert!(bed.cpu.v8086() && bed.cpu.cpl == 3);
    assert_eq!((bed.cpu.segment(SegReg::Cs).base, bed.cpu.rip), (0x8000, 0x100));
    assert_eq!(bed.cpu.segment(SegReg::Gs).base, 0x6000);
    bed.run(&[0xFA]); // CLI with IOPL 0
    assert_eq!((bed.cpu.rip, bed.cpu.cpl, bed.cpu.gpr[gpr::RSP]), (0x9000, 0, 0x6000 - 40));
    let frame: Vec<u32> = (0..10).map(|i| bed.get32(0x6000 - 40 + i * 4)).collect();
    assert_eq!(frame, [0, 0x100, 0x800, 0x3_0002, 0x1000, 0x200, 0x300, 0x400, 0x500, 0x600]);
    assert!(!bed.cpu.segment(SegReg::Ds).present());
}

#[test]
fn io_permission_follows_the_bitmap() {
    let mut bed = Bed::protected();
    bed.gate(13, 14, 0, 8, 0x9000);
    bed.cpu.tr.limit = 0x88;
    bed.put(TSS + 102, &0x68u16.to_le_bytes());
    bed.put(TSS + 0x68, &[0xFF; 0x21]);
    bed.put(TSS + 0x68 + 0x60 / 8, &[0b1111_1110]);
    bed.user();
    bed.run(&[0xE4, 0x60]);
    assert_eq!((bed.cpu.rip, bed.cpu.gpr[gpr::RAX] as u8), (CODE + 2, 0x60));
    bed.run(&[0xE4, 0x61]);
    assert_eq!(bed.cpu.rip, 0x9000);
}

#[test]
fn modified_code_is_seen_at_once() {
    let mut bed = Bed::protected();
    bed.run(&[0x40]); // INC EAX
    bed.cpu.rip = CODE;
    bed.run(&[0x43]); // INC EBX
    assert_eq!((bed.cpu.gpr[gpr::RAX], bed.cpu.gpr[gpr::RBX]), (1, 1));
}

#[test]
fn string_output_repeats() {
    let mut bed = Bed::protected();
    bed.put(0x4000, &[1, 2, 3]);
    bed.cpu.gpr[gpr::RSI] = 0x4000;
    bed.cpu.gpr[gpr::RCX] = 3;
    bed.cpu.gpr[gpr::RDX] = 0xE9;
    bed.run(&[0xF3, 0x6E]);
    assert_eq!(*bed.bus.written.lock().expect("log"), [(0xE9, 1), (0xE9, 2), (0xE9, 3)]);
    assert_eq!((bed.cpu.gpr[gpr::RCX], bed.cpu.gpr[gpr::RSI], bed.cpu.rip), (0, 0x4003, CODE + 2));
}

#[test]
fn a_32_bit_guest_walks_into_long_mode() {
    let mut bed = long();
    bed.cpu.cr0 &= !(cr0::PG | cr0::WP);
    bed.cpu.efer = efer::LME;
    bed.cpu.seg[SegReg::Cs as usize] = Segment::flat(0x28, 0xC09B);
    bed.gdt(5, 0x00CF_9B00_0000_FFFF);
    bed.cpu.gpr[gpr::RAX] = bed.cpu.cr0 | cr0::PG;
    bed.run(&[0x0F, 0x22, 0xC0]); // MOV CR0, EAX
    assert!(bed.cpu.long_mode() && !bed.cpu.code64());
    bed.run(&[0xEA, 0x00, 0x90, 0, 0, 8, 0]); // JMP 8:9000H
    assert!(bed.cpu.code64());
    assert_eq!(bed.cpu.rip, 0x9000);
    assert_eq!(bed.cpu.segment(SegReg::Cs).attributes & attr::L, attr::L);
    assert_eq!(bed.mem.read_u64(PhysAddr(0x10_2000)).expect("PDE") & 0x20, 0x20);
    let mut flushes = crate::Flushes::default();
    assert!(bed.core.has_flushes());
    bed.core.take_flushes(&mut flushes);
    assert!(flushes.all);
}

#[test]
fn sysenter_and_sysexit() {
    let mut bed = Bed::protected();
    bed.user();
    bed.cpu.msr.sysenter_cs = 8;
    bed.cpu.msr.sysenter_eip = 0x9000;
    bed.cpu.msr.sysenter_esp = 0x6000;
    bed.cpu.rflags |= flags::IF;
    bed.run(&[0x0F, 0x34]);
    assert_eq!((bed.cpu.rip, bed.cpu.cpl, bed.cpu.gpr[gpr::RSP]), (0x9000, 0, 0x6000));
    assert_eq!(bed.cpu.rflags & flags::IF, 0);
    bed.cpu.gpr[gpr::RDX] = 0x9100;
    bed.cpu.gpr[gpr::RCX] = 0x6500;
    bed.run(&[0x0F, 0x35]);
    assert_eq!((bed.cpu.rip, bed.cpu.cpl, bed.cpu.gpr[gpr::RSP]), (0x9100, 3, 0x6500));
    assert_eq!((bed.cpu.segment(SegReg::Cs).selector, bed.cpu.segment(SegReg::Ss).selector), (0x1B, 0x23));
}

#[test]
fn loading_ss_holds_traps_and_interrupts_back() {
    let mut bed = Bed::protected();
    bed.gate(1, 14, 0, 8, 0x9000);
    bed.cpu.rflags |= flags::TF;
    bed.cpu.gpr[gpr::RAX] = 0x10;
    bed.run(&[0x8E, 0xD0, 0x90]); // MOV SS, AX; NOP
    assert_eq!((bed.cpu.rip, bed.cpu.shadow), (CODE + 2, Shadow::MovSs));
    bed.step();
    assert_eq!(bed.cpu.rip, 0x9000);
    assert_eq!(bed.get32(bed.cpu.gpr[gpr::RSP]), CODE as u32 + 3);
}

#[test]
fn popf_respects_privilege() {
    let mut bed = Bed::protected();
    bed.user();
    bed.put(0x6FFC, &0xFFFF_FFFFu32.to_le_bytes());
    bed.cpu.gpr[gpr::RSP] = 0x6FFC;
    bed.run(&[0x9D]);
    let may = flags::STATUS | flags::TF | flags::DF | flags::NT | flags::AC | flags::ID | flags::FIXED;
    assert_eq!(bed.cpu.rflags, may, "neither IF nor IOPL");
    bed.cpu.rflags = flags::FIXED | 3 << 12;
    bed.cpu.gpr[gpr::RSP] = 0x6FFC;
    bed.run(&[0x9D]);
    assert_eq!(bed.cpu.rflags, may | flags::IF | 3 << 12);
}

#[test]
fn descriptor_queries() {
    let mut bed = Bed::protected();
    bed.user();
    bed.cpu.gpr[gpr::RAX] = 0x38;
    bed.run(&[0x0F, 0x02, 0xD8]); // LAR EBX, EAX
    assert_eq!((bed.cpu.gpr[gpr::RBX] & 0xF0_FF00, bed.cpu.rflags & flags::ZF), (0xC0_F300, flags::ZF));
    bed.run(&[0x0F, 0x03, 0xD8]); // LSL
    assert_eq!(bed.cpu.gpr[gpr::RBX], 0xFFFF_FFFF);
    bed.cpu.gpr[gpr::RAX] = 0x10;
    bed.run(&[0x0F, 0x02, 0xD8]);
    assert_eq!(
        (bed.cpu.gpr[gpr::RBX], bed.cpu.rflags & flags::ZF),
        (0xFFFF_FFFF, 0),
        "DPL 0 is out of sight"
    );
    bed.cpu.gpr[gpr::RAX] = 0x1B;
    bed.run(&[0x0F, 0x00, 0xE0]); // VERR
    assert_eq!(bed.cpu.rflags & flags::ZF, flags::ZF);
    bed.run(&[0x0F, 0x00, 0xE8]); // VERW of code
    assert_eq!(bed.cpu.rflags & flags::ZF, 0);
}

#[test]
fn what_the_model_lacks_is_undefined() {
    let mut bed = long();
    gate64(&mut bed, 6, 0x9000, 0, 0);
    for nop in
        [[0xF3, 0x0F, 0x1E, 0xFA, 0x90], [0x0F, 0x18, 0x08, 0x90, 0x90], [0x0F, 0x0D, 0x08, 0x90, 0x90]]
    {
        bed.cpu.rip = CODE;
        bed.run(&nop);
        assert_ne!(bed.cpu.rip, 0x9000, "{nop:x?} is a no-operation");
    }
    let undefined: [&[u8]; 5] = [
        &[0x0F, 0x01, 0xC8],                   // MONITOR
        &[0x62, 0xF1, 0x7C, 0x48, 0x10, 0xC1], // EVEX
        &[0x0F, 0x01, 0xC1],                   // VMCALL
        &[0xF0, 0x90],                         // LOCK NOP
        &[0x0F, 0x01, 0xEE],                   // RDPKRU
    ];
    for code in undefined {
        bed.cpu.rip = CODE;
        bed.run(code);
        assert_eq!(bed.cpu.rip, 0x9000, "{code:x?}");
        assert_eq!(bed.get64(bed.cpu.gpr[gpr::RSP]), CODE);
    }
}

#[test]
fn pae_entries_load_with_cr3_and_refuse_reserved_bits() {
    let mut bed = Bed::protected();
    bed.gate(13, 14, 0, 8, 0x9000);
    bed.put(0x10_0000, &0x10_1001u64.to_le_bytes());
    bed.put(0x10_1000, &0x83u64.to_le_bytes());
    bed.cpu.cr4 = cr4::PAE;
    bed.cpu.cr3 = 0x10_0000;
    bed.cpu.gpr[gpr::RAX] = bed.cpu.cr0 | cr0::PG;
    bed.run(&[0x0F, 0x22, 0xC0]);
    assert_eq!((bed.cpu.rip, bed.cpu.pdptes), (CODE + 3, [0x10_1001, 0, 0, 0]));
    bed.put(0x10_2000, &0x10_1003u64.to_le_bytes());
    bed.cpu.gpr[gpr::RAX] = 0x10_2000;
    bed.run(&[0x0F, 0x22, 0xD8]);
    assert_eq!((bed.cpu.rip, bed.cpu.cr3), (0x9000, 0x10_0000));
}

#[test]
fn alignment_checks_apply_to_users() {
    let mut bed = Bed::protected();
    bed.gate(17, 14, 0, 8, 0x9000);
    bed.cpu.cr0 |= cr0::AM;
    bed.cpu.rflags |= flags::AC;
    bed.run(&[0xA1, 1, 0x40, 0, 0]); // MOV EAX, [4001H]
    assert_eq!(bed.cpu.rip, CODE + 5, "not at CPL 0");
    bed.user();
    bed.run(&[0xA1, 1, 0x40, 0, 0]);
    assert_eq!((bed.cpu.rip, bed.get32(bed.cpu.gpr[gpr::RSP])), (0x9000, 0));
}

#[test]
fn a_page_crossing_store_faults_as_a_whole() {
    let mut bed = long();
    gate64(&mut bed, 14, 0x9000, 0, 0);
    bed.put(0x1F_FFFC, &[0x55; 4]);
    bed.cpu.gpr[gpr::RBX] = 0x1F_FFFC;
    bed.run(&[0x48, 0x89, 0x03]);
    assert_eq!((bed.cpu.rip, bed.cpu.cr2), (0x9000, 0x20_0000));
    assert_eq!(bed.get32(0x1F_FFFC), 0x5555_5555);
}

#[test]
fn msrs_unknown_to_core_and_machine_fault() {
    let mut bed = long();
    gate64(&mut bed, 13, 0x9000, 0, 0);
    bed.cpu.gpr[gpr::RCX] = 0x10;
    bed.run(&[0x0F, 0x32]);
    assert_eq!((bed.cpu.rip, bed.cpu.gpr[gpr::RAX]), (CODE + 2, 1000));
    bed.cpu.gpr[gpr::RCX] = 0x10A;
    bed.run(&[0x0F, 0x32]);
    assert_eq!(bed.cpu.gpr[gpr::RAX] & 0x23, 0x23, "RDCL_NO, IBRS_ALL, MDS_NO");
    bed.cpu.gpr[gpr::RCX] = 0xDEAD;
    bed.run(&[0x0F, 0x32]);
    assert_eq!(bed.cpu.rip, 0x9000);
}

#[test]
fn the_engine_runs_to_halt_and_keeps_interrupts_for_later() {
    use crate::engine::{Budget, Engine, Exit};
    let mut bed = Bed::protected();
    bed.gate(0x40, 14, 0, 8, 0x9000);
    bed.put(CODE, &[0x43, 0xFB, 0x43, 0xF4]); // INC EBX; STI; INC EBX; HLT
    bed.put(0x9000, &[0x41, 0xCF]); // INC ECX; IRET
    bed.bus.pending.lock().expect("queue").push_back(0x40);
    bed.attention.set(Attention::INTERRUPT);
    let model = bed.core.model().clone();
    let vector = Box::new(crate::testbed::NoVector);
    let mut engine = crate::Interpreter::new(model, vector, bed.attention.clone(), VpIndex(0));
    let mut run = |bed: &mut Bed, n| engine.run(&mut bed.cpu, &bed.mem, &bed.bus, Budget { instructions: n });
    assert_eq!(run(&mut bed, 2), Exit::Budget);
    assert_eq!((bed.cpu.rip, bed.cpu.instructions), (CODE + 2, 2));
    assert_eq!(run(&mut bed, u64::MAX), Exit::Halt);
    assert_eq!((bed.cpu.gpr[gpr::RBX], bed.cpu.gpr[gpr::RCX], bed.cpu.rip), (2, 1, CODE + 4));
    assert_eq!(bed.attention.get(), 0);
    bed.attention.set(Attention::STOP);
    assert_eq!(run(&mut bed, u64::MAX), Exit::Stop);
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
}

/// Second opcode bytes of system instructions, to favour them.
const SYSTEM: [u8; 12] = [0x00, 0x01, 0x02, 0x20, 0x22, 0x23, 0x30, 0x32, 0xA2, 0xB2, 0xAE, 0xC7];

#[test]
fn a_guest_that_runs_wild_never_panics() {
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    for round in 0..300 {
        let mut bed = match round % 3 {
            0 => Bed::real(),
            1 => Bed::protected(),
            _ => long(),
        };
        for v in 0..48 {
            match round % 3 {
                1 => bed.gate(
                    v,
                    random.next() & 15,
                    random.next() & 3,
                    (random.next() & 15) << 3,
                    CODE + v * 64,
                ),
                2 => gate64(&mut bed, v, CODE + v * 64, random.next() & 7, random.next() & 3),
                _ => {}
            }
        }
        for i in 0..16 {
            bed.cpu.gpr[i] = if random.next() & 1 == 0 { random.next() } else { random.next() & 0xFFFF };
        }
        for i in 9..14 {
            let raw = random.next() | 0x80 << 40;
            bed.gdt(i, raw);
        }
        for _ in 0..100 {
            let mut code = random.next().to_le_bytes().to_vec();
            code.extend(random.next().to_le_bytes());
            if random.next() & 1 == 0 {
                code[0] = 0x0F;
                code[1] = SYSTEM[random.next() as usize % SYSTEM.len()];
            }
            let at = instruction_address(&bed.cpu).0 & 0xF_FFF0;
            bed.put(at, &code);
            bed.cpu.halted = false;
            if matches!(bed.step(), Step::TripleFault | Step::Unsupported) {
                break;
            }
        }
    }
}

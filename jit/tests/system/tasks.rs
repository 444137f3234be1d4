//! Call gates, hardware tasks, virtual-8086 mode (SDM 3A, 5.8, chapters 7 and 20).

use crate::bed::{Bed, CODE, DATA, GDT, HANDLERS, IDT, STACK, Start, TSS, USER_STACK, both, sel};
use paravane_cpu::{SegReg, flags, gpr};

const CALL_GATE: u16 = 0x60;
pub const TSS2: u64 = 0x3800;
const TSS2_SEL: u16 = 0x68;

#[test]
fn call_gates_to_the_inner_ring_and_back() {
    both(Start::Protected, |bed| {
        // Two parameters, DPL 3, to CODE + 800H.
        bed.gdt(CALL_GATE, 0x0010_EC02_0008_0800);
        bed.gate(0x50, 14, 3, HANDLERS + 0x500);
        bed.put(CODE + 0x800, program!(32: "mov eax, [esp + 8]", "mov ebx, [esp + 12]", "mov edx, cs", "add esi, eax", "retf 8").bytes);
        bed.user();
        bed.run(&program!(32: "mov ecx, 20", "2: push 33", "push 11", ".byte 0x9A", ".long 0", ".word 0x63", "dec ecx", "jnz 2b", "int 0x50"));
        let t = bed.taken();
        assert_eq!((t.vector, t.cs, t.sp), (0x50, 0x23, USER_STACK));
        let g = &bed.cpu.gpr;
        assert_eq!((g[gpr::RAX], g[gpr::RBX], g[gpr::RDX], g[gpr::RSI]), (11, 33, 8, 220));
        // A gate of DPL 0 is not for users.
        bed.reset();
        bed.gdt(CALL_GATE, 0x0010_8C02_0008_0800);
        bed.user();
        bed.faults(&program!(32: ; ".byte 0x9A", ".long 0", ".word 0x63"), 13, u32::from(CALL_GATE));
        bed.gdt(CALL_GATE, 0x0010_6C02_0008_0800);
        bed.faults(&program!(32: ; ".byte 0x9A", ".long 0", ".word 0x63"), 11, u32::from(CALL_GATE));
    });
}

#[test]
fn call_gates_of_64_bit_mode() {
    both(Start::Long, |bed| {
        bed.gdt(CALL_GATE, 0x0010_EC00_0010_0800);
        bed.gdt(CALL_GATE + 8, 0);
        bed.gate(0x50, 14, 3, HANDLERS + 0x500);
        bed.put(
            CODE + 0x800,
            program!(64: "mov rax, [rsp + 16]", "mov rbx, [rsp + 24]", "mov edx, ss", "retfq").bytes,
        );
        bed.user();
        bed.put64(DATA, 0x0063_0000_0000);
        bed.run(&program!(64: "mov esi, 0x200000", ".byte 0xFF, 0x1E", "int 0x50")); // CALL FAR [RSI], 32-bit form
        let t = bed.taken();
        assert_eq!((t.vector, t.cs, t.sp), (0x50, 0x33, USER_STACK));
        assert_eq!(
            (bed.cpu.gpr[gpr::RAX], bed.cpu.gpr[gpr::RBX], bed.cpu.gpr[gpr::RDX]),
            (USER_STACK, 0x2B, 0)
        );
    });
}

pub fn second_task(bed: &mut Bed) {
    bed.gdt(TSS2_SEL, 0x0000_8900_3800_0067);
    let t = TSS2;
    bed.put(t, &[0; 104]);
    bed.put32(t + 28, bed.cpu.cr3 as u32);
    bed.put32(t + 32, (CODE + 0x800) as u32);
    bed.put32(t + 36, 0x2);
    for (i, v) in [1u32, 2, 3, 4, 0x6_8000, 6, 7, 8].into_iter().enumerate() {
        bed.put32(t + 40 + i as u64 * 4, v);
    }
    for i in 0..6 {
        bed.put32(t + 72 + i * 4, u32::from(if i == 1 { sel::CODE32 } else { sel::DATA }));
    }
    bed.put16(t + 102, 104);
}

#[test]
fn task_switch_by_jump_and_by_call() {
    for start in [Start::Protected, Start::Pae, Start::Paged32] {
        both(start, |bed| {
            second_task(bed);
            bed.put32(TSS + 28, bed.cpu.cr3 as u32);
            // The second task counts and jumps back.
            bed.put(CODE + 0x800, program!(32: "2: add dword ptr [0x200000], eax", ".byte 0xEA", ".long 0", ".word 0x48", "jmp 2b").bytes);
            bed.finish(&program!(32: "mov edi, 0x1234", "mov ecx, 10", "2: .byte 0xEA", ".long 0", ".word 0x68", "dec ecx", "jnz 2b"));
            assert_eq!((bed.get32(DATA), bed.cpu.gpr[gpr::RDI]), (10, 0x1234));
            assert_eq!(bed.cpu.tr.selector, sel::TSS);
            assert_eq!(bed.get64(GDT + u64::from(TSS2_SEL)) >> 40 & 0xF, 9, "available again");
            assert_eq!(bed.get32(TSS2 + 40), 1, "EAX was saved");
            assert_ne!(bed.cpu.cr0 & 8, 0, "TS is set");
            // CALL nests: NT and the back link, IRET returns.
            bed.reset();
            second_task(bed);
            bed.put(
                CODE + 0x800,
                program!(32: "2: pushfd", "pop dword ptr [0x200004]", "str [0x200008]", "iretd", "jmp 2b")
                    .bytes,
            );
            bed.finish(&program!(32: ".byte 0x9A", ".long 0", ".word 0x68", "pushfd", "pop eax", ".byte 0x9A", ".long 0", ".word 0x68"));
            assert_eq!(u64::from(bed.get32(DATA + 4)) & flags::NT, flags::NT);
            assert_eq!((bed.get32(DATA + 8) & 0xFFFF, bed.get16(TSS2)), (u32::from(TSS2_SEL), sel::TSS));
            assert_eq!(bed.cpu.gpr[gpr::RAX] & flags::NT, 0);
            // A busy task cannot be entered.
            bed.reset();
            bed.gdt(TSS2_SEL, 0x0000_8B00_3800_0067);
            bed.faults(&program!(32: ; ".byte 0xEA", ".long 0", ".word 0x68"), 13, u32::from(TSS2_SEL));
            bed.gdt(TSS2_SEL, 0x0000_8900_3800_0050);
            bed.faults(&program!(32: ; ".byte 0xEA", ".long 0", ".word 0x68"), 10, u32::from(TSS2_SEL));
            bed.gdt(TSS2_SEL, 0x0000_0900_3800_0067);
            bed.faults(&program!(32: ; ".byte 0xEA", ".long 0", ".word 0x68"), 11, u32::from(TSS2_SEL));
        });
    }
}

#[test]
fn exceptions_by_task_gate() {
    both(Start::Protected, |bed| {
        second_task(bed);
        bed.put64(IDT + 13 * 8, 0x0000_8500_0068_0000);
        bed.put(
            CODE + 0x800,
            program!(32: "2: pop dword ptr [0x200000]", "add dword ptr [0x3020], 2", "iretd", "jmp 2b").bytes,
        );
        // RDMSR of an unknown register: #GP(0), whose handler skips it in the saved EIP.
        bed.finish(&program!(32: "mov ecx, 0x123456", "mov ebx, 77", "rdmsr", "inc ebx", "rdmsr", "inc ebx"));
        assert_eq!((bed.cpu.gpr[gpr::RBX], bed.get32(DATA)), (79, 0));
        assert_eq!(
            bed.get32(TSS2 + 56),
            0x6_8000,
            "the error code was pushed on the task's stack and popped"
        );
    });
}

#[test]
fn a_bad_stack_segment_in_the_tss() {
    both(Start::Protected, |bed| {
        // SS0 names a code segment; #TS is handled by a task, which needs no SS0.
        second_task(bed);
        bed.put32(TSS + 8, u32::from(sel::CODE32));
        bed.put64(IDT + 10 * 8, 0x0000_8500_0068_0000);
        bed.gate(0x50, 14, 3, HANDLERS + 0x500);
        bed.put(CODE + 0x800, program!(32: "pop dword ptr [0x200000]").bytes);
        bed.user();
        bed.run(&program!(32: "nop", "int 0x50"));
        assert_eq!(
            (bed.cpu.tr.selector, bed.get32(DATA), bed.get32(TSS + 32)),
            (TSS2_SEL, 8, CODE as u32 + 1)
        );
    });
}

/// Virtual-8086 code at 9000:0 (linear 9_0000) with this IOPL, entered by IRET.
fn v8086(bed: &mut Bed, iopl: u64, code: &[u8]) {
    v8086_with(bed, iopl << 12, code);
}

/// The same with these bits of EFLAGS.
pub fn v8086_with(bed: &mut Bed, eflags: u64, code: &[u8]) {
    bed.put(0x9_0000, code);
    let top = STACK;
    let frame = [0, 0x9000, flags::VM | 2 | eflags, 0xFFF0, 0x8000, 0x2000, 0x2000, 0, 0];
    for (i, v) in frame.into_iter().enumerate() {
        bed.put32(top - 36 + i as u64 * 4, v as u32);
    }
    bed.cpu.gpr[gpr::RSP] = top - 36;
    bed.load(&program!(32: "iretd"));
    bed.go();
}

#[test]
fn virtual_8086_mode() {
    for start in [Start::Protected, Start::Pae, Start::Paged32] {
        both(start, |bed| {
            bed.gate(0x30, 14, 3, HANDLERS + 0x300);
            // Addresses are 16 x selector + offset; the frame has the data segments too.
            v8086(bed, 3, program!(16: "mov ax, ds", "mov word ptr [0x10], 0x1234", "mov bx, 0x10", "mov cx, [bx]", "mov ax, 0x3000", "mov gs, ax", "cli", "sti", "int 0x30").bytes);
            let t = bed.taken();
            assert_eq!((t.vector, t.cs, t.rip, t.ss, t.sp), (0x30, 0x9000, 0x16, 0x8000, 0xFFF0));
            assert_ne!(t.flags & flags::VM, 0);
            assert_eq!((bed.get16(0x2_0010), bed.cpu.gpr[gpr::RCX] & 0xFFFF), (0x1234, 0x1234));
            let rsp = bed.cpu.gpr[gpr::RSP];
            assert_eq!(rsp, STACK - 36);
            assert_eq!(
                [20, 24, 28, 32].map(|i| bed.get32(rsp + i)),
                [0x2000, 0x2000, 0, 0x3000],
                "ES DS FS GS"
            );
            assert_eq!(bed.cpu.rflags & flags::VM, 0);
            assert_eq!(
                [SegReg::Ds, SegReg::Es, SegReg::Fs, SegReg::Gs].map(|s| bed.cpu.segment(s).selector),
                [0; 4]
            );
            // IOPL 0: CLI, PUSHF, INT and IRET trap; HLT and MOV CR0 always do.
            for code in [&[0xFAu8][..], &[0x9C], &[0xCD, 0x30], &[0xCF], &[0xFB], &[0x9D]] {
                bed.reset();
                v8086(bed, 0, code);
                let t = bed.taken();
                assert_eq!((t.vector, t.error, t.rip, t.cs), (13, Some(0), 0, 0x9000), "{code:x?}");
            }
            bed.reset();
            v8086(bed, 3, &[0xF4]);
            assert_eq!((bed.taken().vector, bed.taken().error), (13, Some(0)));
            // INT 3 does not ask for IOPL, but for the gate's DPL.
            bed.reset();
            bed.gate(3, 14, 3, HANDLERS + 0x30);
            v8086(bed, 0, &[0xCC]);
            assert_eq!((bed.taken().vector, bed.taken().rip), (3, 1));
            // Ports follow the permission bitmap whatever IOPL says.
            bed.reset();
            v8086(bed, 3, &[0xE6, 0xE9]);
            assert_eq!((bed.taken().vector, bed.taken().error), (13, Some(0)));
            // The limit is 64 KiB.
            bed.reset();
            v8086(bed, 3, &[0xBB, 0xFF, 0xFF, 0x8B, 0x07]);
            assert_eq!((bed.taken().vector, bed.taken().rip), (13, 3));
        });
    }
}

#[test]
fn io_permission_bitmap() {
    for start in [Start::Protected, Start::Long] {
        both(start, |bed| {
            bed.cpu.tr.limit = 0x67 + 0x40;
            bed.put(TSS + 104, &[0xFF; 0x42]);
            bed.put(TSS + 104 + 0xE9 / 8, &[!(1 << (0xE9 % 8))]);
            bed.gate(0x50, 14, 3, HANDLERS + 0x500);
            bed.user();
            bed.run(&program!(64: "mov al, 7", "out 0xE9, al", "int 0x50"));
            assert_eq!((bed.taken().vector, bed.reports()), (0x50, vec![7]));
            bed.user();
            bed.faults(&program!(64: ; "out 0xE8, al"), 13, 0);
            bed.faults(&program!(64: ; "out 0xE9, ax"), 13, 0);
            bed.faults(&program!(64: "mov dx, 0x300"; "in al, dx"), 13, 0);
            bed.cpu.rflags |= flags::IOPL;
            bed.run(&program!(64: "out 0xE8, al", "int 0x50"));
            assert_eq!(bed.taken().vector, 0x50);
        });
    }
}

/// The ends of the permission bitmap: two bytes are always read, and must lie within the TSS (SDM 1, 19.5.2).
#[test]
fn ends_of_the_permission_bitmap() {
    both(Start::Protected, |bed| {
        bed.put(TSS + 104, &[0; 0x42]);
        bed.gate(0x50, 14, 3, HANDLERS + 0x500);
        let allowed = |bed: &mut Bed, limit: u32, port: u64| {
            bed.reset();
            bed.user();
            bed.cpu.tr.limit = limit;
            bed.cpu.gpr[gpr::RDX] = port;
            bed.run(&program!(32: "in al, dx", "int 0x50"));
            match bed.taken().vector {
                0x50 => true,
                v => {
                    assert_eq!((v, bed.taken().error), (13, Some(0)));
                    false
                }
            }
        };
        // Byte 0x3F of the map is the last within the limit: ports 0x1F0 and on need a byte more.
        assert!(allowed(bed, 104 + 0x3F, 0x1F7));
        assert!(!allowed(bed, 104 + 0x3F, 0x1F8));
        assert!(!allowed(bed, 104 + 0x3E, 0x1F0));
        // A word over two bytes of the map.
        bed.put(TSS + 104 + 2, &[1]);
        bed.reset();
        bed.user();
        bed.cpu.tr.limit = 104 + 0x3F;
        bed.faults(&program!(32: "mov edx, 0xF"; "in ax, dx"), 13, 0);
        bed.faults(&program!(32: "mov edx, 0xD"; "in eax, dx"), 13, 0);
        assert!(allowed(bed, 104 + 0x3F, 0xF));
        // The map's base beyond the limit; a 16-bit TSS has no map; a TSS of 103 bytes has no base.
        bed.put16(TSS + 102, 0x200);
        assert!(!allowed(bed, 104 + 0x3F, 0));
        bed.put16(TSS + 102, 104);
        assert!(!allowed(bed, 102, 0));
        bed.reset();
        bed.user();
        bed.cpu.tr.attributes = 0x83;
        bed.put16(TSS + 2, 0x6F00);
        bed.put16(TSS + 4, sel::DATA);
        bed.cpu.tr.limit = 104 + 0x3F;
        bed.faults(&program!(32: "nop"; "in al, 0x10"), 13, 0);
    });
    both(Start::Pae, |bed| {
        // The map lies in a page that is not there: #PF on the processor's behalf, supervisor read.
        bed.cpu.tr.base = 0x30_0F00;
        bed.cpu.tr.limit = 0x1FF;
        let tss: Vec<u8> = (0..104).step_by(8).flat_map(|i| bed.get64(TSS + i).to_le_bytes()).collect();
        bed.put(0x30_0F00, &tss);
        bed.put16(0x30_0F00 + 102, 0x100);
        bed.map(0x30_1000, 0, 0);
        bed.user();
        bed.page_faults(&program!(32: "nop"; "in al, 0x10"), 0x30_1002, 0);
    });
}

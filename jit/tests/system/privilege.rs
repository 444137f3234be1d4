//! Who may do what: privileged instructions, loads of segment registers, and the instructions that ask about descriptors
//! (SDM 3A, 5.5 to 5.10; 2A, LAR, LSL, VERR; 3B, 20.2).

use crate::bed::{Bed, HANDLERS, Program, Start, both, sel};
use crate::illegal::of_protected_mode;
use crate::segments::descriptor;
use paravane_cpu::{SegReg, Segment, cr4, flags, gpr};

/// 32-bit code at CPL `ring`; the entries from [`sel::FREE`] on are its code and data.
fn at_ring(bed: &mut Bed, ring: u64) {
    let dpl = ring << 5;
    let (code, data) = (sel::FREE | ring as u16, (sel::FREE + 0x18) | ring as u16);
    bed.gdt(code, descriptor(0, 0xF_FFFF, 0xC09B | dpl));
    bed.gdt(data, descriptor(0, 0xF_FFFF, 0xC093 | dpl));
    bed.cpu.seg = [Segment::flat(data, (0xC093 | dpl) as u16); 6];
    bed.cpu.seg[SegReg::Cs as usize] = Segment::flat(code, (0xC09B | dpl) as u16);
    bed.cpu.cpl = ring as u8;
}

/// Privileged in 32-bit and in 64-bit code. The bytes are the same.
fn privileged() -> [Program; 24] {
    [
        program!(32: ; "hlt"),
        program!(32: ; "clts"),
        program!(32: ; "invd"),
        program!(32: ; "wbinvd"),
        program!(32: ; "lmsw ax"),
        program!(32: ; "lldt ax"),
        program!(32: ; "ltr ax"),
        program!(32: ; "lgdt [esi]"),
        program!(32: ; "lidt [esi]"),
        program!(32: ; "invlpg [esi]"),
        program!(32: ; "invpcid eax, [esi]"),
        program!(32: ; ".byte 0x0F, 0x20, 0xC0"), // MOV EAX, CR0
        program!(32: ; ".byte 0x0F, 0x22, 0xC0"), // MOV CR0, EAX
        program!(32: ; ".byte 0x0F, 0x20, 0xD0"), // CR2
        program!(32: ; ".byte 0x0F, 0x22, 0xD0"),
        program!(32: ; ".byte 0x0F, 0x20, 0xD8"), // CR3
        program!(32: ; ".byte 0x0F, 0x22, 0xD8"),
        program!(32: ; ".byte 0x0F, 0x20, 0xE0"), // CR4
        program!(32: ; ".byte 0x0F, 0x22, 0xE0"),
        program!(32: ; ".byte 0x0F, 0x21, 0xC0"), // MOV EAX, DR0
        program!(32: ; ".byte 0x0F, 0x23, 0xF8"), // MOV DR7, EAX
        program!(32: ; "rdmsr"),
        program!(32: ; "wrmsr"),
        program!(32: ; "xsetbv"),
    ]
}

/// Allowed by IOPL or, the latter four, by the I/O bitmap.
fn by_iopl() -> [Program; 6] {
    [
        program!(32: ; "cli"),
        program!(32: ; "sti"),
        program!(32: ; "in al, dx"),
        program!(32: ; "out dx, eax"),
        program!(32: ; "insb"),
        program!(32: ; "outsw"),
    ]
}

/// IOPL does not matter to instructions that need CPL 0 (SDM 3A, 5.9); rings 1 and 2 are no better than 3.
#[test]
fn instructions_of_ring_0() {
    for start in [Start::Protected, Start::Pae, Start::Compat, Start::Long] {
        both(start, |bed| {
            let rings = if matches!(start, Start::Protected | Start::Pae) { 1..=3 } else { 3..=3 };
            for ring in rings {
                for iopl in [0, flags::IOPL] {
                    for p in privileged() {
                        bed.reset();
                        if ring == 3 {
                            bed.user()
                        } else {
                            at_ring(bed, ring)
                        }
                        bed.cpu.rflags |= iopl;
                        eprintln!("ring {ring} {:x?}", p.bytes);
                        bed.faults(&p, 13, 0);
                    }
                }
            }
        });
    }
}

#[test]
fn instructions_of_iopl() {
    for start in [Start::Protected, Start::Compat, Start::Long] {
        both(start, |bed| {
            bed.gate(0x50, 14, 3, HANDLERS + 0x500);
            for p in by_iopl() {
                for iopl in 0..=3u64 {
                    bed.reset();
                    bed.user();
                    bed.cpu.rflags |= iopl << 12;
                    bed.cpu.gpr[gpr::RSI] = crate::bed::DATA;
                    bed.cpu.gpr[gpr::RDI] = crate::bed::DATA;
                    eprintln!("IOPL {iopl} {:x?}", p.bytes);
                    if iopl < 3 {
                        bed.faults(&p, 13, 0);
                        continue;
                    }
                    bed.load(&p);
                    bed.put(bed.code() + p.bytes.len() as u64 - 1, &[0xCD, 0x50]); // INT 50H instead of HLT
                    bed.go();
                    assert_eq!(bed.taken().vector, 0x50);
                }
            }
        });
    }
}

/// Virtual-8086 mode is CPL 3; what names selectors is not recognized at all (SDM 3B, 20.2.7 and 20.2.8; 2A to 2D).
#[test]
fn instructions_of_virtual_8086_mode() {
    let others = [
        program!(16: ; ".byte 0xC5, 0xF8, 0x58, 0xC0"), // VADDPS
        program!(16: ; "ud2"),
    ];
    let refused = [
        program!(16: ; "hlt"),
        program!(16: ; "clts"),
        program!(16: ; "invd"),
        program!(16: ; "wbinvd"),
        program!(16: ; "lmsw ax"),
        program!(16: ; "lgdt [si]"),
        program!(16: ; "lidt [si]"),
        program!(16: ; "invlpg [si]"),
        program!(16: ; ".byte 0x66, 0x0F, 0x38, 0x82, 0x04"), // INVPCID EAX, [SI]
        program!(16: ; "mov eax, cr0"),
        program!(16: ; "mov cr3, eax"),
        program!(16: ; "mov eax, dr7"),
        program!(16: ; "mov dr0, eax"),
        program!(16: ; "rdmsr"),
        program!(16: ; "wrmsr"),
        program!(16: ; "xsetbv"),
        program!(16: ; "sysexit"),
    ];
    for start in [Start::Protected, Start::Pae] {
        both(start, |bed| {
            for (list, vector, error) in
                [(&of_protected_mode()[..], 6, None), (&others[..], 6, None), (&refused[..], 13, Some(0))]
            {
                for p in list {
                    for iopl in [0, flags::IOPL] {
                        bed.reset();
                        crate::tasks::v8086_with(bed, iopl, p.bytes);
                        let t = bed.taken();
                        assert_eq!((t.vector, t.error, t.rip), (vector, error, 0), "{:x?}", p.bytes);
                        assert_eq!(t.flags & (flags::RF | flags::VM), flags::RF | flags::VM);
                    }
                }
            }
            // UMIP concerns it too; without, they are for everybody.
            for p in [
                program!(16: "nop"; "sgdt [si]"),
                program!(16: "nop"; "sidt [si]"),
                program!(16: "nop"; "smsw ax"),
            ] {
                for (umip, rip) in [(cr4::UMIP, p.at), (0, p.bytes.len() as u64 - 1)] {
                    bed.reset();
                    bed.cpu.cr4 |= umip;
                    crate::tasks::v8086_with(bed, 0, p.bytes);
                    assert_eq!((bed.taken().vector, bed.taken().rip), (13, rip), "{:x?}", p.bytes);
                }
            }
        });
    }
}

/// What a segment register may be loaded with, by CPL, RPL, DPL and type (SDM 3A, 5.5 to 5.7).
#[test]
fn loads_of_data_and_stack_segments() {
    // MOV DS, EBX and MOV SS, EBX; INT 50H in the same shadow.
    let data = program!(32: ; "mov ds, ebx", "int 0x50");
    let stack = program!(32: ; "mov ss, ebx", "int 0x50");
    for start in [Start::Protected, Start::Compat, Start::Long] {
        both(start, |bed| {
            bed.gate(0x50, 14, 3, HANDLERS + 0x500);
            for case in 0..2 * 4 * 4 * 8u16 {
                let (cpl, rpl, dpl) = (u64::from(case & 1) * 3, case >> 1 & 3, u64::from(case >> 3 & 3));
                // Data read-only and writable, expand-down; code; an LDT.
                let kind = [0x91, 0x93, 0x95, 0x97, 0x99, 0x9B, 0x9D, 0x9F][usize::from(case >> 5)];
                let code = kind & 8 != 0;
                let conforming = code && kind & 4 != 0;
                let readable = !code || kind & 2 != 0;
                let privileged = conforming || (cpl <= dpl && u64::from(rpl) <= dpl);
                let to_ss = !code && kind & 2 != 0 && u64::from(rpl) == cpl && dpl == cpl;
                for (p, allowed) in [(&data, readable && privileged), (&stack, to_ss)] {
                    bed.reset();
                    // Expand-down: all of 4 GiB but the first page.
                    let limit = if code || kind & 4 == 0 { 0xF_FFFF } else { 0 };
                    bed.gdt(sel::FREE, descriptor(0, limit, 0xC000 | kind | dpl << 5));
                    if cpl == 3 {
                        bed.user();
                    }
                    bed.cpu.gpr[gpr::RBX] = u64::from(sel::FREE | rpl);
                    eprintln!("CPL {cpl} RPL {rpl} DPL {dpl} type {kind:x} {:x?}", p.bytes);
                    if allowed {
                        bed.run(p);
                        assert_eq!(bed.taken().vector, 0x50);
                    } else {
                        bed.faults(p, 13, u32::from(sel::FREE));
                    }
                }
            }
            // System descriptors.
            for kind in 0..16 {
                bed.reset();
                bed.gdt(sel::FREE, descriptor(0, 0xF_FFFF, 0x80 | kind));
                bed.cpu.gpr[gpr::RBX] = u64::from(sel::FREE);
                bed.faults(&data, 13, u32::from(sel::FREE));
                bed.faults(&stack, 13, u32::from(sel::FREE));
            }
        });
    }
}

/// SDM 2A, tables of LAR and LSL: the system types that they accept, in IA-32e mode or not.
fn accepts(long: bool, load_limit: bool, kind: u64) -> bool {
    match kind {
        2 | 9 | 0xB => true,
        1 | 3 => !long,
        4 | 5 => !long && !load_limit,
        0xC => !load_limit,
        _ => false,
    }
}

#[test]
fn questions_about_descriptors() {
    let p = program!(32: "mov eax, 0x11111111", "mov edx, 0x22222222",
        "lar eax, ebx", "setz byte ptr [esi]", "lsl edx, ebx", "setz byte ptr [esi + 1]", "verr bx", "setz byte ptr [esi + 2]", "verw bx", "setz byte ptr [esi + 3]", "int 0x50");
    for start in [Start::Protected, Start::Pae, Start::Compat, Start::Long] {
        both(start, |bed| {
            let long = matches!(start, Start::Compat | Start::Long);
            bed.gate(0x50, 14, 3, HANDLERS + 0x500);
            for case in 0..2 * 4 * 4 * 32u64 {
                let (cpl, rpl, dpl, kind) = ((case & 1) * 3, case >> 1 & 3, case >> 3 & 3, case >> 5);
                let (code, data) = (kind & 0x18 == 0x18, kind & 0x18 == 0x10);
                let conforming = code && kind & 4 != 0;
                let privileged = conforming || (cpl <= dpl && rpl <= dpl);
                let segment = code || data;
                // Not present: LAR and LSL, VERR and VERW do not ask.
                let attributes = 0xC000 | kind | dpl << 5 | (case & 4) << 5;
                bed.reset();
                bed.gdt(sel::FREE, descriptor(0x12_3456, 0x8_0001, attributes));
                bed.gdt(sel::FREE + 8, 0);
                if cpl == 3 {
                    bed.user();
                }
                bed.cpu.gpr[gpr::RBX] = u64::from(sel::FREE) | rpl;
                bed.cpu.gpr[gpr::RSI] = crate::bed::DATA;
                bed.run(&p);
                assert_eq!(bed.taken().vector, 0x50);
                let note = format!("CPL {cpl} RPL {rpl} DPL {dpl} type {kind:x}");
                let lar = privileged && (segment || accepts(long, false, kind));
                let lsl = privileged && (segment || accepts(long, true, kind));
                let verr = privileged && (data || (code && kind & 2 != 0));
                let verw = privileged && data && kind & 2 != 0;
                let zf = bed.get32(crate::bed::DATA).to_le_bytes();
                assert_eq!(zf, [lar, lsl, verr, verw].map(u8::from), "{note}");
                let (rax, rdx) = (bed.cpu.gpr[gpr::RAX], bed.cpu.gpr[gpr::RDX]);
                // Bits 19:16 of LAR's result are undefined.
                let rights = (attributes & 0xFF) << 8 | (attributes & 0xF000) << 8;
                assert_eq!(rax & !0xF_0000, if lar { rights } else { 0x1111_1111 & !0xF_0000 }, "{note}");
                assert_eq!(rdx, if lsl { 0x8000_1FFF } else { 0x2222_2222 }, "{note}");
            }
            // Null selectors, and those beyond the table, are valid for nothing.
            for selector in [0u64, 3, 0x1000, 0x0C] {
                bed.reset();
                bed.put32(crate::bed::DATA, 0x0101_0101);
                bed.cpu.gpr[gpr::RBX] = selector;
                bed.cpu.gpr[gpr::RSI] = crate::bed::DATA;
                bed.run(&p);
                assert_eq!((bed.taken().vector, bed.get32(crate::bed::DATA)), (0x50, 0), "{selector:x}");
            }
        });
    }
}

//! Invalid opcodes, LOCK, instruction length, and which fault comes first (SDM 3A, table 6-2 and 6.15, interrupts 6 and
//! 13; 2A, LOCK).

use crate::bed::{DATA, Program, Start, both, pf, pte, sel};
use paravane_cpu::{cr0, cr4, flags, gpr};

#[test]
fn undefined_in_64_bit_mode() {
    both(Start::Long, |bed| {
        for bytes in [
            &[0x06][..],
            &[0x07],
            &[0x0E],
            &[0x16],
            &[0x17],
            &[0x1E],
            &[0x1F], // PUSH and POP of segment registers
            &[0x27],
            &[0x2F],
            &[0x37],
            &[0x3F],
            &[0xD4, 10],
            &[0xD5, 10], // DAA, DAS, AAA, AAS, AAM, AAD
            &[0x60],
            &[0x61],
            &[0x82, 0xC0, 0],
            &[0xCE],
            &[0xD6], // PUSHA, POPA, group 1 at 82H, INTO, SALC
            &[0x9A, 0, 0, 0, 0, 0, 0],
            &[0xEA, 0, 0, 0, 0, 0, 0], // far CALL and JMP with an immediate
            &[0x62, 0x06],             // BOUND: here an incomplete EVEX
        ] {
            bed.reset();
            bed.put(bed.code(), &[0x90; 32]);
            bed.put(bed.code(), bytes);
            bed.cpu.rip = bed.code();
            bed.go();
            assert_eq!((bed.taken().vector, bed.taken().rip), (6, bed.code()), "{bytes:x?}");
        }
    });
}

#[test]
fn undefined_in_every_mode() {
    for start in [Start::Long, Start::Protected, Start::Compat, Start::Real] {
        both(start, |bed| {
            for bytes in [
                &[0x0F, 0x0B][..],
                &[0x0F, 0xB9, 0xC0],
                &[0x0F, 0xFF, 0xC0], // UD2, UD1, UD0
                &[0x0F, 0x04],
                &[0x0F, 0x0A],
                &[0x0F, 0x24, 0xC0],
                &[0x0F, 0x26, 0xC0],
                &[0x0F, 0x36], // no instructions
                &[0xFE, 0xD0],
                &[0xFF, 0xF8],
                &[0xC6, 0xC8, 0],
                &[0x8F, 0xC8], // undefined members of groups
                &[0x0F, 0xBA, 0xC0, 0],
                &[0x0F, 0xC7, 0x00], // BT group /0, group 9 /0
                &[0x8E, 0xC8],
                &[0x8C, 0xF0],
                &[0x8E, 0xF8], // MOV to CS, from and to segment registers 6 and 7
                &[0x0F, 0x20, 0xC8],
                &[0x0F, 0x20, 0xE8],
                &[0x0F, 0x22, 0xF8], // CR1, CR5, CR7
                &[0x0F, 0x01, 0xC8],
                &[0x0F, 0x01, 0xC9],
                &[0x0F, 0x01, 0xC1],
                &[0x0F, 0x01, 0xD8], // MONITOR, MWAIT, VMCALL, VMRUN: not offered
                &[0x0F, 0xAA],
                &[0x0F, 0x38, 0xFF, 0xC0],
                &[0x0F, 0x0F, 0xC0, 0x9E], // RSM, no SSSE3, 3DNow!
                &[0xC4, 0xC0, 0x00, 0x58, 0xC0],
                &[0x0F, 0x01, 0xEE], // VEX map 0, RDPKRU
                &[0x8D, 0xC0],
                &[0xF3, 0x0F, 0xC7, 0x30], // LEA of a register, VMXON
            ] {
                bed.reset();
                bed.put(bed.code(), &[0x90; 32]);
                bed.put(bed.code(), bytes);
                bed.cpu.rip = bed.code();
                bed.go();
                assert_eq!((bed.taken().vector, bed.taken().rip), (6, bed.code()), "{bytes:x?}");
            }
        });
    }
}

/// What names selectors, which real-address and virtual-8086 mode do not recognize (SDM 3B, 20.1.1 and 20.2.7).
pub fn of_protected_mode() -> [Program; 9] {
    [
        program!(16: ; "sldt ax"),
        program!(16: ; "str ax"),
        program!(16: ; "lldt ax"),
        program!(16: ; "ltr ax"),
        program!(16: ; "verr ax"),
        program!(16: ; "verw ax"),
        program!(16: ; "lar ax, bx"),
        program!(16: ; "lsl ax, bx"),
        program!(16: ; "arpl ax, bx"),
    ]
}

#[test]
fn undefined_in_real_mode() {
    both(Start::Real, |bed| {
        let extensions = [
            program!(16: ; ".byte 0xC4, 0xE2, 0x78, 0xF2, 0xC0"), // ANDN
            program!(16: ; ".byte 0xC5, 0xF8, 0x58, 0xC0"),       // VADDPS
        ];
        for p in of_protected_mode().iter().chain(&extensions) {
            bed.faults(p, 6, None);
        }
        bed.finish(&program!(16: "sgdt [0x8000]", "smsw ax", "mov ecx, 0x10", "rdmsr", "mov eax, cr0", "invd", "clts", "wbinvd"));
    });
}

/// LOCK is for read-modify-write of memory by these instructions only.
#[test]
fn lock() {
    both(Start::Long, |bed| {
        for text in [
            program!(64: "mov esi, 0x200000", "lock add [rsi], eax", "lock or [rsi], al", "lock adc word ptr [rsi], 1", "lock sbb [rsi], rax", "lock and [rsi], eax",
                "lock sub [rsi], eax", "lock xor [rsi], eax", "lock not byte ptr [rsi]", "lock neg dword ptr [rsi]", "lock inc word ptr [rsi]", "lock dec qword ptr [rsi]"),
            program!(64: "mov esi, 0x200000", "lock bts [rsi], eax", "lock btr dword ptr [rsi], 3", "lock btc [rsi], ax", "lock xchg [rsi], eax", "lock xadd [rsi], eax",
                "lock cmpxchg [rsi], ebx", "lock cmpxchg8b [rsi]", "lock cmpxchg16b [rsi]"),
        ] {
            bed.reset();
            bed.finish(&text);
        }
        for bytes in [
            &[0x01, 0xC3][..],
            &[0x03, 0x06],
            &[0x39, 0x06],
            &[0x83, 0x3E, 1], // ADD to a register, ADD from memory, CMP twice
            &[0x85, 0x06],
            &[0x89, 0x06],
            &[0x8B, 0x06],
            &[0x0F, 0xA3, 0x06],
            &[0x0F, 0xBA, 0x26, 1], // TEST, MOV, BT
            &[0x87, 0xC3],
            &[0x0F, 0xB1, 0xC3],
            &[0x0F, 0xC1, 0xC3],
            &[0xF7, 0xD0],
            &[0xFF, 0xC0], // register forms
            &[0xFF, 0x36],
            &[0x8F, 0x06],
            &[0xC1, 0x26, 1],
            &[0xF7, 0x26],
            &[0xA4],
            &[0xAB], // PUSH, POP, SHL, MUL, MOVS, STOS
            &[0x90],
            &[0xC3],
            &[0xEB, 0],
            &[0x0F, 0x0D, 0x06],
            &[0xD9, 0x06],
            &[0x0F, 0x28, 0x06],
            &[0x0F, 0xC3, 0x06], // MOVNTI last
            &[0x0F, 0xC7, 0xF0],
            &[0xF4],
            &[0x0F, 0x01, 0x3E], // RDRAND, HLT, INVLPG
        ] {
            bed.reset();
            bed.cpu.gpr[gpr::RSI] = DATA;
            bed.put(bed.code(), &[0xF0]);
            bed.put(bed.code() + 1, bytes);
            bed.cpu.rip = bed.code();
            bed.go();
            assert_eq!((bed.taken().vector, bed.taken().rip), (6, bed.code()), "LOCK {bytes:x?}");
        }
    });
}

/// Encodings with a memory operand of instructions that take LOCK (SDM 2A, LOCK): the opcode behind the escapes, its register
/// field if that is part of it.
fn takes_lock(map: &[u8], opcode: u8, field: u8) -> bool {
    match (map, opcode) {
        // ADD, OR, ADC, SBB, AND, SUB, XOR of a register to memory, then of an immediate
        ([], 0x00..=0x37) => opcode & 7 < 2 && opcode >> 3 < 7,
        ([], 0x80 | 0x81 | 0x83) => field < 7,
        ([], 0x86 | 0x87) => true,                   // XCHG
        ([], 0xF6 | 0xF7) => matches!(field, 2 | 3), // NOT, NEG
        ([], 0xFE | 0xFF) => field < 2,              // INC, DEC
        ([0x0F], 0xAB | 0xB3 | 0xBB) => true,        // BTS, BTR, BTC
        ([0x0F], 0xBA) => matches!(field, 5..=7),
        ([0x0F], 0xB0 | 0xB1 | 0xC0 | 0xC1) => true, // CMPXCHG, XADD
        ([0x0F], 0xC7) => field == 1,                // CMPXCHG8B
        _ => false,
    }
}

/// LOCK before every opcode of every map, with memory and register operands.
#[test]
fn lock_before_everything() {
    for start in [Start::Long, Start::Protected] {
        both(start, |bed| {
            let is_prefix = |map: &[u8], b: u8| {
                map.is_empty()
                    && (matches!(b, 0x0F | 0x26 | 0x2E | 0x36 | 0x3E | 0x64..=0x67 | 0xF0 | 0xF2 | 0xF3)
                        || (start == Start::Long && b & 0xF0 == 0x40))
            };
            for map in [&[][..], &[0x0F], &[0x0F, 0x38], &[0x0F, 0x3A]] {
                for opcode in (0..=255u8).filter(|&b| !is_prefix(map, b)) {
                    if map == [0x0F] && matches!(opcode, 0x38 | 0x3A) {
                        continue;
                    }
                    // The longer maps have no register fields.
                    for field in 0..if map.len() < 2 { 8 } else { 1 } {
                        for memory in [true, false] {
                            let modrm = field << 3 | if memory { 6 } else { 0xC0 };
                            bed.reset();
                            bed.cpu.gpr[gpr::RSI] = DATA;
                            bed.put(bed.code(), &[0xF4; 16]);
                            bed.put(bed.code(), &[&[0xF0], map, &[opcode, modrm]].concat());
                            bed.cpu.rip = bed.code();
                            bed.go();
                            let legal = (memory && takes_lock(map, opcode, field))
                                || (start == Start::Protected
                                    && memory
                                    && opcode == 0x82
                                    && field < 7
                                    && map.is_empty());
                            let note = format!("LOCK {map:02x?} {opcode:02x} {modrm:02x}");
                            if legal {
                                assert!((bed.code()..bed.code() + 16).contains(&bed.cpu.rip), "{note}");
                            } else {
                                assert_eq!((bed.taken().vector, bed.taken().rip), (6, bed.code()), "{note}");
                            }
                        }
                    }
                }
            }
        });
    }
}

/// The holes of the two-byte opcode map (SDM 2D, table A-3), and what in it is not offered (GETSEC, VMREAD, VMWRITE, 3DNow!,
/// FEMMS, PadLock).
#[test]
fn holes_of_the_two_byte_map() {
    for start in [Start::Long, Start::Protected, Start::Real] {
        both(start, |bed| {
            let holes = [
                0x04, 0x0A, 0x0C, 0x24, 0x25, 0x26, 0x27, 0x36, 0x39, 0x3B, 0x3C, 0x3D, 0x3E, 0x3F, 0x7A,
                0x7B, 0xB8,
            ];
            let absent = [0x37, 0x78, 0x79, 0x0E, 0x0F, 0xA6, 0xA7];
            for opcode in holes.into_iter().chain(absent) {
                for modrm in [0x06, 0xC0, 0xE8, 0xFF] {
                    bed.reset();
                    bed.put(bed.code(), &[0x90; 32]);
                    bed.put(bed.code(), &[0x0F, opcode, modrm]);
                    bed.cpu.rip = bed.code();
                    bed.go();
                    let note = format!("0F {opcode:02x} {modrm:02x}");
                    assert_eq!((bed.taken().vector, bed.taken().rip), (6, bed.code()), "{note}");
                }
            }
        });
    }
}

#[test]
fn instructions_of_15_bytes() {
    for start in [Start::Long, Start::Protected, Start::Compat] {
        both(start, |bed| {
            // 66H prefixes in front of ADD EAX, EAX (2 bytes): 13 are legal, 14 are not, nor is it a #UD first.
            let case = |n: usize, tail: &[u8]| [vec![0x66; n], tail.to_vec()].concat();
            bed.put(bed.code(), &case(13, &[0x01, 0xC0, 0xF4]));
            bed.cpu.rip = bed.code();
            bed.go();
            assert_eq!(bed.cpu.rip, bed.code() + 16);
            for bytes in [
                case(14, &[0x01, 0xC0]),
                case(14, &[0x0F, 0x0B]),
                case(15, &[0x90]),
                case(20, &[0x90]),
                case(9, &[0x69, 0x84, 0x88, 0, 0, 0, 0, 1, 0]),
            ] {
                bed.reset();
                bed.put(bed.code(), &bytes);
                bed.cpu.rip = bed.code();
                bed.go();
                assert_eq!((bed.taken().vector, bed.taken().error), (13, Some(0)), "{bytes:x?}");
            }
            // 15 bytes up to the end of a page, nothing behind it.
            bed.reset();
            bed.map(0x30_1000, 0, 0);
            bed.put(0x30_0FF1, &case(13, &[0x01, 0xC0]));
            bed.put(0x30_0FFF + 1, &[0xF4]);
            bed.cpu.rip = 0x30_0FF1;
            bed.go();
            if start == Start::Protected {
                return;
            }
            assert_eq!((bed.taken().vector, bed.taken().rip, bed.cpu.cr2), (14, 0x30_1000, 0x30_1000));
            // 15 prefixes: #GP without looking at the next page; 14: it has to look.
            for (n, want) in [(15, 13), (14, 14)] {
                bed.reset();
                bed.put(0x30_1000 - n, &[0x66; 15][..n as usize]);
                bed.cpu.rip = 0x30_1000 - n;
                bed.go();
                assert_eq!(bed.taken().vector, want, "{n} prefixes");
            }
            bed.map(0x30_1000, 0x30_1000, pte::ALL);
        });
    }
}

/// Table 6-2: of several faults of one instruction the first in this order.
#[test]
fn which_fault_comes_first() {
    both(Start::Long, |bed| {
        let first = |bed: &mut crate::bed::Bed, program: Program, vector: u64, error: Option<u32>| {
            bed.faults(&program, vector, error);
        };
        // #UD before #NM, for legacy and VEX encodings.
        bed.cpu.cr0 |= cr0::TS;
        first(bed, program!(64: ; ".byte 0xF0", "fld1"), 6, None);
        first(bed, program!(64: ; ".byte 0xF0", "addps xmm0, xmm0"), 6, None);
        bed.cpu.cr4 &= !(cr4::OSXSAVE | cr4::OSFXSR);
        first(bed, program!(64: ; "vaddps xmm0, xmm0, xmm0"), 6, None);
        first(bed, program!(64: ; "addps xmm0, xmm0"), 6, None);
        // #NM before what the operand raises.
        bed.reset();
        bed.cpu.cr0 |= cr0::TS;
        first(bed, program!(64: ; "fld dword ptr [0x40000000]"), 7, None);
        first(bed, program!(64: ; "movaps xmm0, [0x40000001]"), 7, None);
        // Privilege before operands; what does not exist before privilege.
        bed.reset();
        bed.user();
        first(bed, program!(64: ; "lgdt [0x40000000]"), 13, Some(0));
        first(bed, program!(64: ; "lldt word ptr [0x40000000]"), 13, Some(0));
        first(bed, program!(64: ; "invlpg [0x40000000]"), 13, Some(0));
        first(bed, program!(64: ; ".byte 0x0F, 0x20, 0xC8"), 6, None);
        first(bed, program!(64: ; "in al, dx"), 13, Some(0));
        first(bed, program!(64: "mov edi, 0x40000000"; "insb"), 13, Some(0));
        // The destination's page before the division's result; the operand's page before #DE.
        bed.reset();
        bed.page_faults(&program!(64: "xor ecx, ecx"; "div dword ptr [0x40000000]"), 0x4000_0000, 0);
        // A non-canonical address before its page.
        first(bed, program!(64: "mov rsi, 0x800000000000"; "mov rax, [rsi]"), 13, Some(0));
        // CALL of a memory pointer: its operand before the stack.
        bed.ist(14);
        bed.page_faults(&program!(64: "mov rsp, 0x50000000"; "call [0x40000000]"), 0x4000_0000, 0);
        // PUSH of memory likewise; MOVS: source before destination.
        bed.reset();
        bed.page_faults(&program!(64: "mov esp, 0x50000000"; "push [0x40000000]"), 0x4000_0000, 0);
        bed.reset();
        bed.page_faults(&program!(64: "mov esi, 0x40000000", "mov edi, 0x50000000"; "movsb"), 0x4000_0000, 0);
        bed.page_faults(
            &program!(64: "mov esi, 0x200000", "mov edi, 0x50000000"; "movsb"),
            0x5000_0000,
            pf::W,
        );
    });
    both(Start::Protected, |bed| {
        // The limit before anything behind it.
        bed.gdt(sel::FREE, 0x0040_9300_0000_0FFF);
        bed.user();
        bed.cpu.cr0 |= cr0::AM;
        bed.cpu.rflags |= flags::AC;
        bed.gdt(sel::FREE, 0x0040_F300_0000_0FFF);
        bed.faults(&program!(32: "push 0x5B", "pop es"; "mov eax, es:[0xFFE]"), 13, 0);
    });
}

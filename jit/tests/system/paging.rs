//! Page permissions, accessed and dirty bits, page sizes (SDM 3A, 4.6 to 4.8).

use crate::bed::{Bed, CODE, DATA, HANDLERS, PD, PD32, PDPT, PML4, STACK, Start, both, pf, pte};
use paravane_cpu::{Segment, cr0, cr4, efer, flags, gpr};

/// What an access does.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Do {
    Read,
    Write,
    Execute,
    /// Reads first, so that translated code knows the page, then writes.
    ReadWrite,
}

fn access(bed: &Bed, what: Do) -> crate::bed::Program {
    match (bed.bits(), what) {
        (64, Do::Read) => program!(64: "mov esi, 0x200000"; "mov eax, [rsi + 8]", "int 0x50"),
        (64, Do::Write) => program!(64: "mov esi, 0x200000"; "mov [rsi + 8], eax", "int 0x50"),
        (64, Do::ReadWrite) => {
            program!(64: "mov esi, 0x200000", "mov eax, [rsi + 8]"; "mov [rsi + 8], eax", "int 0x50")
        }
        (64, Do::Execute) => program!(64: "mov esi, 0x200000", "jmp rsi"; "nop"),
        (_, Do::Read) => program!(32: "mov esi, 0x200000"; "mov eax, [esi + 8]", "int 0x50"),
        (_, Do::Write) => program!(32: "mov esi, 0x200000"; "mov [esi + 8], eax", "int 0x50"),
        (_, Do::ReadWrite) => {
            program!(32: "mov esi, 0x200000", "mov eax, [esi + 8]"; "mov [esi + 8], eax", "int 0x50")
        }
        (_, Do::Execute) => program!(32: "mov esi, 0x200000", "jmp esi"; "nop"),
    }
}

/// The error code that accessing a present page with `bits` gives (SDM 3A, 4.6.1 and 4.7), if it faults.
fn expected(bed: &Bed, what: Do, bits: u64) -> Option<u32> {
    let user = bed.cpu.cpl == 3;
    let (c0, c4, ac) = (bed.cpu.cr0, bed.cpu.cr4, bed.cpu.rflags & flags::AC != 0);
    let (writable, user_page, xd) = (bits & pte::RW != 0, bits & pte::US != 0, bits & pte::XD != 0);
    let smap = c4 & cr4::SMAP != 0 && !user && user_page && !ac;
    let refused = match what {
        Do::Read => (user && !user_page) || smap,
        Do::Write | Do::ReadWrite => {
            (user && !(user_page && writable)) || (!user && !writable && c0 & cr0::WP != 0) || smap
        }
        Do::Execute => xd || (user && !user_page) || (!user && user_page && c4 & cr4::SMEP != 0),
    };
    let code = match what {
        Do::Read => 0,
        Do::Write | Do::ReadWrite => pf::W,
        // The I bit exists where NX or SMEP does.
        Do::Execute if bed.cpu.efer & efer::NXE != 0 || c4 & cr4::SMEP != 0 => pf::I,
        Do::Execute => 0,
    };
    refused.then_some(pf::P | code | if user { pf::U } else { 0 })
}

/// Every combination of U/S, R/W and XD for every access, of user and supervisor, with and without WP, SMEP, SMAP and AC.
fn matrix(start: Start) {
    both(start, |bed| {
        bed.gate(0x50, 14, 3, HANDLERS + 0x500);
        bed.put(DATA, &[0xCD, 0x50]); // INT 50H
        for case in 0..1024u32 {
            let bit = |n: u32| case >> n & 1 != 0;
            let what = [Do::Read, Do::Write, Do::Execute, Do::ReadWrite][(case & 3) as usize];
            let mut bits = pte::P;
            bits |= if bit(2) { pte::RW } else { 0 };
            bits |= if bit(3) { pte::US } else { 0 };
            bits |= if bit(4) && start != Start::Paged32 { pte::XD } else { 0 };
            bed.reset();
            if bit(5) {
                bed.user();
            }
            bed.cpu.cr0 &= if bit(6) { !cr0::WP } else { u64::MAX };
            bed.cpu.cr4 |= if bit(7) { cr4::SMEP } else { 0 } | if bit(8) { cr4::SMAP } else { 0 };
            bed.cpu.rflags |= if bit(9) { flags::AC } else { 0 };
            // The program's page is its own, the tables, handlers and their stack are the supervisor's.
            let supervisor = pte::P | pte::RW;
            for page in [0x1000, 0x2000, 0x3000, 0x4000, 0x6_F000] {
                bed.map(page, page, supervisor);
            }
            bed.map(CODE, CODE, if bit(5) { pte::ALL } else { supervisor });
            bed.map(DATA, DATA, bits);
            bed.flush();
            if what == Do::ReadWrite && expected(bed, Do::Read, bits).is_some() {
                continue;
            }
            let want = expected(bed, what, bits);
            let program = access(bed, what);
            let start_state = bed.cpu.clone();
            for round in 0..2 {
                bed.cpu = start_state.clone();
                bed.run(&program);
                let t = bed.taken();
                let note = format!("{what:?} bits {bits:#x} case {case} round {round} {:x?}", t);
                match want {
                    None => assert_eq!(t.vector, 0x50, "{note}"),
                    Some(code) => {
                        assert_eq!((t.vector, t.error), (14, Some(code)), "{note}");
                        assert_eq!(bed.cpu.cr2, DATA + if what == Do::Execute { 0 } else { 8 }, "{note}");
                        assert_eq!(
                            t.rip,
                            if what == Do::Execute { DATA } else { CODE + program.at },
                            "{note}"
                        );
                    }
                }
            }
        }
    });
}

#[test]
fn permission_matrix_in_long_mode() {
    matrix(Start::Long);
}

#[test]
fn permission_matrix_with_pae() {
    matrix(Start::Pae);
}

#[test]
fn permission_matrix_with_32_bit_tables() {
    matrix(Start::Paged32);
}

#[test]
fn permission_matrix_in_compatibility_mode() {
    matrix(Start::Compat);
}

#[test]
fn upper_levels_restrict() {
    both(Start::Long, |bed| {
        bed.gate(0x50, 14, 3, HANDLERS + 0x500);
        let pd = PD + (DATA >> 21) * 8;
        let entry = bed.get64(pd);
        bed.put64(pd, entry & !pte::US);
        bed.user();
        bed.page_faults(&access(bed, Do::Read), DATA + 8, pf::P | pf::U);
        bed.put64(pd, entry & !pte::RW);
        bed.flush();
        bed.page_faults(&access(bed, Do::ReadWrite), DATA + 8, pf::P | pf::U | pf::W);
        bed.put64(pd, entry | pte::XD);
        bed.flush();
        bed.reset();
        bed.user();
        bed.run(&access(bed, Do::Execute));
        assert_eq!(bed.taken().error, Some(pf::P | pf::U | pf::I));
        bed.put64(pd, 0);
        bed.flush();
        bed.user();
        bed.page_faults(&access(bed, Do::Write), DATA + 8, pf::U | pf::W);
        // A reserved bit: bit 51 lies above the physical address width.
        bed.put64(pd, entry | 1 << 51);
        bed.flush();
        bed.user();
        bed.page_faults(&access(bed, Do::Read), DATA + 8, pf::P | pf::U | pf::RSVD);
    });
}

#[test]
fn stac_and_clac() {
    both(Start::Long, |bed| {
        bed.cpu.cr4 |= cr4::SMAP;
        for page in [0x1000, 0x2000, 0x3000, 0x4000, 0x6_F000, CODE] {
            bed.map(page, page, pte::P | pte::RW);
        }
        bed.page_faults(&program!(64: "mov esi, 0x200000"; "mov eax, [rsi]"), DATA, pf::P);
        bed.reset();
        bed.cpu.cr4 |= cr4::SMAP;
        let window = program!(64: "mov esi, 0x200000", "mov ecx, 100", "2: stac", "mov [rsi], ecx", "add eax, [rsi]", "clac",
            "dec ecx", "jnz 2b"; "mov [rsi + 4], eax");
        bed.page_faults(&window, DATA + 4, pf::P | pf::W);
        assert_eq!(bed.cpu.gpr[gpr::RAX], 5050);
        assert_eq!(bed.cpu.rflags & flags::AC, 0);
    });
}

/// Accesses by the processor itself (here to the LDT) are supervisor accesses at any CPL, and EFLAGS.AC does not lift SMAP
/// for them (SDM 3A, 4.6).
#[test]
fn implicit_accesses() {
    for start in [Start::Pae, Start::Compat] {
        both(start, |bed| {
            let load = program!(32: "mov eax, 0x0F"; "mov es, eax");
            let loads = program!(32: "mov eax, 0x0F", "mov es, eax", "int 0x50");
            let prepare = |bed: &mut Bed, bits: u64, user: bool| {
                bed.restore();
                bed.gate(0x50, 14, 3, HANDLERS + 0x500);
                for page in [0x1000, 0x2000, 0x3000, 0x4000, 0x6_F000] {
                    bed.map(page, page, pte::P | pte::RW);
                }
                bed.map(CODE, CODE, pte::P | pte::RW | if user { pte::US } else { 0 });
                bed.map(DATA, DATA, bits);
                bed.flush();
                bed.put64(DATA + 8, 0x00CF_F200_0000_FFFF);
                if user {
                    bed.user();
                }
                bed.cpu.ldtr = Segment { base: DATA, limit: 0xF, attributes: 0x82, selector: 0x70 };
                bed.cpu.cr4 |= cr4::SMAP;
                bed.cpu.rflags |= flags::AC;
            };
            let supervisor = pte::P | pte::RW;
            for user in [false, true] {
                prepare(bed, pte::ALL, user);
                bed.page_faults(&load, DATA + 8, pf::P);
                // A page of the supervisor's is open to the processor. The descriptor's accessed bit is written.
                prepare(bed, supervisor, user);
                bed.run(&loads);
                assert_eq!(bed.taken().vector, 0x50);
                assert_eq!(bed.get64(DATA + 8), 0x00CF_F300_0000_FFFF);
                assert_eq!(bed.pte(DATA) & AD, AD);
                // Under WP it must be writable, for the supervisor.
                prepare(bed, pte::P, user);
                bed.page_faults(&load, DATA + 8 + 5, pf::P | pf::W);
                prepare(bed, pte::P, user);
                bed.cpu.cr0 &= !cr0::WP;
                bed.run(&loads);
                assert_eq!((bed.taken().vector, bed.get64(DATA + 8)), (0x50, 0x00CF_F300_0000_FFFF));
                // Written once: the accessed bit that is set already asks for nothing.
                prepare(bed, pte::P, user);
                bed.put64(DATA + 8, 0x00CF_F300_0000_FFFF);
                bed.run(&loads);
                assert_eq!((bed.taken().vector, bed.pte(DATA) & AD), (0x50, pte::A));
            }
        });
    }
}

/// A handler in a user page under SMEP: the fault is the handler's first fetch.
#[test]
fn a_handler_in_a_user_page() {
    both(Start::Long, |bed| {
        for page in [0x1000, 0x2000, 0x3000, 0x4000, 0x6_F000, CODE] {
            bed.map(page, page, pte::P | pte::RW);
        }
        bed.gate(0x40, 14, 0, DATA);
        bed.cpu.cr4 |= cr4::SMEP;
        bed.run(&program!(64: "int 0x40"));
        let t = bed.taken();
        assert_eq!((t.vector, t.error, t.rip, bed.cpu.cr2), (14, Some(pf::P | pf::I), DATA, DATA));
        assert_eq!(t.sp, STACK - 40, "the first frame stands");
    });
}

/// Accessed and dirty bits of what an instruction used before it faulted (SDM 3A, 4.8: a page's A says that it was used, its D
/// that it was written).
#[test]
fn bits_of_instructions_that_fault_later() {
    both(Start::Long, |bed| {
        let prepare = |bed: &mut Bed| {
            bed.reset();
            bed.map(DATA, DATA, pte::ALL);
            bed.map(DATA + 0x1000, DATA + 0x1000, pte::P);
            bed.map(DATA + 0x2000, 0, 0);
            bed.flush();
        };
        // The source is read, the destination refused.
        for (p, cr2, error) in [
            (program!(64: "mov esi, 0x200000", "mov edi, 0x202000"; "movsq"), 0x20_2000, pf::W),
            (program!(64: "mov esi, 0x200000", "mov edi, 0x201000"; "movsq"), 0x20_1000, pf::W | pf::P),
            (program!(64: "mov esi, 0x200000", "mov rsp, 0x202008"; "push [rsi]"), 0x20_2000, pf::W),
            (program!(64: "mov esi, 0x200000", "mov rsp, 0x201008"; "call [rsi]"), 0x20_1000, pf::W | pf::P),
        ] {
            prepare(bed);
            bed.ist(14);
            bed.page_faults(&p, cr2, error);
            assert_eq!(bed.pte(DATA) & AD, pte::A, "{:x?}", p.bytes);
            assert_eq!(bed.pte(DATA + 0x1000) & pte::D, 0, "{:x?}", p.bytes);
        }
        // Nothing is written by a store of which the second page refuses.
        prepare(bed);
        bed.put64(DATA + 0xFF8, 0x1111_1111_1111_1111);
        bed.page_faults(&program!(64: "mov esi, 0x200FFC"; "mov [rsi], rsp"), DATA + 0x1000, pf::W | pf::P);
        assert_eq!(bed.get64(DATA + 0xFF8), 0x1111_1111_1111_1111);
        // REP: the iterations before the fault are done, their pages dirty, the next one is not begun.
        prepare(bed);
        bed.page_faults(
            &program!(64: "mov edi, 0x200FF0", "mov ecx, 9", "mov eax, 0x77"; "rep stosq"),
            DATA + 0x1000,
            pf::W | pf::P,
        );
        assert_eq!((bed.cpu.gpr[gpr::RCX], bed.cpu.gpr[gpr::RDI]), (7, DATA + 0x1000));
        assert_eq!((bed.pte(DATA) & AD, bed.pte(DATA + 0x1000) & pte::D), (AD, 0));
    });
}

const AD: u64 = pte::A | pte::D;

#[test]
fn accessed_and_dirty_bits_exactly_when_used() {
    for start in [Start::Long, Start::Compat, Start::Pae, Start::Paged32] {
        both(start, |bed| {
            bed.gate(0x50, 14, 3, HANDLERS + 0x500);
            let bits = |bed: &Bed| bed.pte(DATA) & AD;
            bed.run(&access(bed, Do::Read));
            assert_eq!(bits(bed), pte::A, "a read sets A only");
            bed.reset();
            bed.run(&access(bed, Do::Read));
            assert_eq!(bits(bed), pte::A, "another read sets nothing more");
            bed.reset();
            bed.run(&access(bed, Do::Write));
            assert_eq!(bits(bed), AD, "a write sets D");
            // Cleared and flushed: the next write sets it again, though translated code knew the page.
            bed.map(DATA, DATA, pte::ALL);
            bed.flush();
            bed.reset();
            bed.run(&access(bed, Do::Read));
            assert_eq!(bits(bed), pte::A);
            bed.reset();
            bed.run(&access(bed, Do::ReadWrite));
            assert_eq!(bits(bed), AD);
            // A refused write sets no D.
            bed.map(DATA, DATA, pte::P | pte::US);
            bed.flush();
            bed.reset();
            bed.run(&access(bed, Do::ReadWrite));
            assert_eq!((bed.taken().vector, bits(bed)), (14, pte::A));
            // Execution sets A.
            bed.put(DATA, &[0xCD, 0x50]);
            bed.map(DATA, DATA, pte::ALL);
            bed.flush();
            bed.reset();
            bed.run(&access(bed, Do::Execute));
            assert_eq!((bed.taken().vector, bits(bed)), (0x50, pte::A));
        });
    }
}

#[test]
fn read_modify_write_and_failed_compare_set_d() {
    both(Start::Long, |bed| {
        let clean = |bed: &mut Bed| {
            bed.map(DATA, DATA, pte::ALL);
            bed.flush();
            bed.reset();
        };
        for p in [
            program!(64: "mov esi, 0x200000", "mov eax, [rsi]", "add dword ptr [rsi], 0"),
            program!(64: "mov esi, 0x200000", "mov eax, [rsi]", "mov eax, 1", "lock cmpxchg [rsi], ecx"),
            program!(64: "mov esi, 0x200000", "mov eax, [rsi]", "xchg [rsi], eax"),
            program!(64: "mov edi, 0x200000", "mov eax, [rdi]", "mov ecx, 3", "rep stosb"),
            program!(64: "mov esi, 0x200000", "movups xmm0, [rsi]", "movups [rsi], xmm0"),
            program!(64: "mov esi, 0x200000", "fld1", "mov eax, [rsi]", "fstp qword ptr [rsi]"),
            program!(64: "mov esp, 0x200100", "mov eax, [rsp]", "push rax"),
            program!(64: "mov esp, 0x200100", "mov eax, [rsp]", "call 2f", "2:"),
        ] {
            clean(bed);
            bed.finish(&p);
            assert_eq!(bed.pte(DATA) & AD, AD, "{:x?}", p.bytes);
        }
        for p in [
            program!(64: "mov esi, 0x200000", "test dword ptr [rsi], -1", "cmp [rsi], eax", "bt dword ptr [rsi], 3"),
            program!(64: "mov esi, 0x200000", "mov edi, 0x200800", "mov ecx, 10", "repe cmpsb"),
            program!(64: "mov edi, 0x200000", "xor ecx, ecx", "mov al, [rdi]", "rep stosb"),
            program!(64: "mov esp, 0x200100", "pop rax", "pop rbx"),
            program!(64: "mov esi, 0x200000", "prefetcht0 [rsi]", "clflush [rsi]", "mov al, [rsi]"),
        ] {
            clean(bed);
            bed.finish(&p);
            assert_eq!(bed.pte(DATA) & AD, pte::A, "{:x?}", p.bytes);
        }
    });
}

#[test]
fn tables_get_their_accessed_bits() {
    both(Start::Long, |bed| {
        bed.run(&access(bed, Do::Read));
        for (name, at) in [("PML4E", PML4), ("PDPTE", PDPT), ("PDE", PD + 8)] {
            assert_eq!(bed.get64(at) & AD, pte::A, "{name}");
        }
        assert_eq!(bed.pte(DATA + 0x1000) & AD, 0, "a page nobody touched");
    });
}

#[test]
fn large_pages() {
    both(Start::Long, |bed| {
        // 2 MiB: linear 100_0000 -> 20_0000.
        bed.put64(PD + 8 * 8, DATA | pte::ALL | pte::PS);
        let program = program!(64: "mov esi, 0x1000000", "mov eax, [rsi + 0x1FFFFC]", "mov dword ptr [rsi + 0x123456], 0xABCD");
        bed.put32(DATA + 0x1F_FFFC, 0x1234_5678);
        bed.finish(&program);
        assert_eq!((bed.get32(DATA + 0x12_3456), bed.cpu.gpr[gpr::RAX]), (0xABCD, 0x1234_5678));
        assert_eq!(bed.get64(PD + 8 * 8) & AD, AD);
        // 1 GiB: linear 4000_0000 -> 0.
        bed.put64(PDPT + 8, pte::ALL | pte::PS);
        bed.reset();
        bed.finish(&program!(64: "mov esi, 0x40200000", "mov eax, [rsi + 0x123456]"));
        assert_eq!(bed.cpu.gpr[gpr::RAX], 0xABCD);
        assert_eq!(bed.get64(PDPT + 8) & AD, pte::A);
        bed.reset();
        bed.finish(&program!(64: "mov esi, 0x40200000", "mov [rsi + 0x10], esi"));
        assert_eq!(bed.get64(PDPT + 8) & AD, AD);
        // Reserved: bits 20:13 of a 2 MiB entry.
        bed.put64(PD + 9 * 8, (DATA + 0x2000) | pte::ALL | pte::PS);
        bed.reset();
        bed.page_faults(&program!(64: "mov esi, 0x1200000"; "mov eax, [rsi]"), 0x120_0000, pf::P | pf::RSVD);
    });
    both(Start::Paged32, |bed| {
        bed.put32(PD32 + 4 * 4, (0x40_0000 | pte::ALL | pte::PS) as u32);
        bed.finish(
            &program!(32: "mov esi, 0x1000000", "mov eax, [esi]", "mov dword ptr [esi + 0x3FFFFC], 0xABCD"),
        );
        assert_eq!(bed.get32(0x7F_FFFC), 0xABCD);
        assert_eq!(u64::from(bed.get32(PD32 + 16)) & AD, AD);
    });
}

/// #GP for alignment comes before anything the page could say (SDM 3A, table 6-2: both are faults on an operand, and
/// the walk that would set A and D is not made).
#[test]
fn misaligned_operands_leave_accessed_and_dirty_bits_alone() {
    both(Start::Long, |bed| {
        for p in [
            program!(64: "mov esi, 0x200000"; "lock cmpxchg16b [rsi + 8]"),
            program!(64: "mov esi, 0x200000"; "movaps [rsi + 8], xmm0"),
            program!(64: "mov esi, 0x200000"; "movdqa xmm0, [rsi + 4]"),
            program!(64: "mov esi, 0x200000"; "paddd xmm0, [rsi + 1]"),
            program!(64: "mov esi, 0x200000"; "vmovaps [rsi + 16], ymm0"),
            program!(64: "mov esi, 0x200000"; "movntps [rsi + 0xFF8], xmm0"),
            // Several accesses off one base are checked together.
            program!(64: "mov esi, 0x200000"; "movaps [rsi + 8], xmm0", "mov [rsi], rax", "mov [rsi + 64], rax", "mov rcx, [rsi + 32]"),
            program!(64: "mov esi, 0x200000"; "movaps xmm1, [rsi + 8]", "mov rax, [rsi]", "mov rbx, [rsi + 64]", "mov rcx, [rsi + 32]"),
        ] {
            bed.map(DATA, DATA, pte::ALL);
            bed.flush();
            bed.faults(&p, 13, 0);
            assert_eq!(bed.pte(DATA) & AD, 0, "{:x?}", p.bytes);
            // A page that is not there makes no difference.
            bed.map(DATA, DATA, 0);
            bed.flush();
            bed.faults(&p, 13, 0);
        }
        for p in [
            program!(64: "mov esi, 0x200000"; "movups [rsi + 8], xmm0"),
            program!(64: "mov esi, 0x200000"; "lock cmpxchg16b [rsi + 16]"),
        ] {
            let displacement = p.bytes[p.bytes.len() - 2];
            bed.page_faults(&p, DATA + u64::from(displacement), pf::W);
        }
    });
}

#[test]
fn two_views_of_one_page_agree() {
    both(Start::Long, |bed| {
        bed.map(0x30_0000, DATA, pte::ALL);
        bed.map(0x30_1000, DATA, pte::P);
        bed.finish(&program!(64: "mov esi, 0x200000", "mov edi, 0x300000", "mov ecx, 100",
            "2: mov [rsi], ecx", "add eax, [rdi]", "add ebx, [rdi + 0x1000]", "dec ecx", "jnz 2b"));
        assert_eq!((bed.cpu.gpr[gpr::RAX], bed.cpu.gpr[gpr::RBX]), (5050, 5050));
    });
}

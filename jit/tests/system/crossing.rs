//! Accesses and instructions on two pages (SDM 3A, 4.7; 1, 4.1.1).

use crate::bed::{Bed, CODE, DATA, Kind, PD, Start, both, pf, pte};
use paravane_cpu::{cr4, gpr};

/// The first page is present; the second is not.
const BORDER: u64 = DATA + 0x1000;

fn border(bed: &mut Bed, second: u64) {
    bed.map(BORDER, BORDER, second);
    bed.flush();
    bed.put(DATA + 0xFC0, &[0x5A; 64]);
    bed.cpu.gpr[gpr::RSI] = BORDER;
}

#[test]
fn loads_and_stores_into_a_missing_page() {
    both(Start::Long, |bed| {
        border(bed, 0);
        for (program, write) in [
            (program!(64: ; "mov rax, [rsi - 1]"), false),
            (program!(64: "mov rbx, [rsi - 8]"; "mov rax, [rsi - 7]"), false),
            (program!(64: "mov rax, [rsi - 8]"; "mov [rsi - 3], rax"), true),
            (program!(64: "mov [rsi - 8], rbx"; "mov [rsi - 1], ax"), true),
            (program!(64: "movups xmm0, [rsi - 16]"; "movups xmm0, [rsi - 15]"), false),
            (program!(64: "movups xmm0, [rsi - 16]"; "movups [rsi - 1], xmm0"), true),
            (program!(64: ; "vmovdqu [rsi - 31], ymm0"), true),
            (program!(64: "fld1"; "fstp tbyte ptr [rsi - 9]"), true),
            (program!(64: ; "add [rsi - 3], rax"), true),
            (program!(64: ; "lock xadd [rsi - 3], rax"), true),
            (program!(64: ; "lock cmpxchg [rsi - 3], ecx"), true),
            (program!(64: "lea rsp, [rsi + 5]"; "push rax"), true),
            (program!(64: "lea rsp, [rsi - 3]"; "pop rax"), false),
            (program!(64: "lea rsp, [rsi + 1]"; "call 2f", "2: nop"), true),
            (program!(64: "lea rsp, [rsi - 7]"; "ret"), false),
            (program!(64: "lea rbp, [rsi - 1]"; "leave"), false),
            (program!(64: "lea rdi, [rsi - 3]"; "stosq"), true),
            (program!(64: "sub rsi, 3"; "lodsq"), false),
            (program!(64: "lea rdi, [rsi - 3]"; "fnsave [rdi]"), true),
        ] {
            bed.put(DATA + 0xFC0, &[0x5A; 64]);
            let before: Vec<u64> = (0..8).map(|i| bed.get64(DATA + 0xFC0 + i * 8)).collect();
            let start = bed.cpu.clone();
            // What runs before (and the frame on a stack there) may store; the marked instruction alone must not.
            let first = program.at > 0;
            bed.faults(&program, 14, if write { pf::W } else { 0 });
            assert_eq!(bed.cpu.cr2, BORDER, "{:x?}", program.bytes);
            let after: Vec<u64> = (0..8).map(|i| bed.get64(DATA + 0xFC0 + i * 8)).collect();
            if !first {
                assert_eq!(before, after, "{:x?}", program.bytes);
            }
            bed.cpu = start;
        }
    });
}

#[test]
fn stores_into_a_read_only_page() {
    both(Start::Long, |bed| {
        border(bed, pte::P | pte::US);
        for program in [
            program!(64: "mov rax, [rsi - 3]"; "mov [rsi - 3], rax"),
            program!(64: "movups xmm0, [rsi - 5]"; "movups [rsi - 15], xmm0"),
            program!(64: "mov eax, [rsi - 3]"; "add [rsi - 2], eax"),
        ] {
            bed.page_faults(&program, BORDER, pf::P | pf::W);
            assert_eq!(bed.get64(DATA + 0xFF8), 0x5A5A_5A5A_5A5A_5A5A, "nothing was written");
            assert_eq!(bed.pte(BORDER) & pte::D, 0);
            bed.reset();
            bed.cpu.gpr[gpr::RSI] = BORDER;
        }
    });
}

#[test]
fn the_first_page_faults_first() {
    both(Start::Long, |bed| {
        bed.map(DATA, 0, 0);
        bed.flush();
        bed.cpu.gpr[gpr::RSI] = BORDER;
        bed.page_faults(&program!(64: ; "mov rax, [rsi - 3]"), BORDER - 3, 0);
        bed.page_faults(&program!(64: ; "mov [rsi - 5], rax"), BORDER - 5, pf::W);
    });
}

#[test]
fn crossing_accesses_to_pages_that_are_not_neighbours() {
    both(Start::Long, |bed| {
        bed.map(BORDER, 0x40_0000, pte::ALL);
        bed.put64(DATA + 0xFF8, 0x1122_3344_5566_7788);
        bed.put64(0x40_0000, 0x99AA_BBCC_DDEE_FF00);
        bed.cpu.gpr[gpr::RSI] = BORDER;
        bed.finish(&program!(64: "mov ecx, 50", "2: mov rax, [rsi - 4]", "mov [rsi - 4], rax", "movups xmm0, [rsi - 8]", "movups [rsi - 8], xmm0",
            "lock add qword ptr [rsi - 4], 0", "dec ecx", "jnz 2b"));
        assert_eq!(bed.cpu.gpr[gpr::RAX], 0xDDEE_FF00_1122_3344);
        assert_eq!(
            (bed.get64(DATA + 0xFF8), bed.get64(0x40_0000)),
            (0x1122_3344_5566_7788, 0x99AA_BBCC_DDEE_FF00)
        );
        assert_eq!((bed.pte(DATA) & pte::D, bed.pte(BORDER) & pte::D), (pte::D, pte::D));
    });
}

#[test]
fn instructions_that_run_into_a_missing_page() {
    both(Start::Long, |bed| {
        // MOV EAX, imm32 whose last byte is missing.
        bed.map(BORDER, 0, 0);
        bed.put(BORDER - 6, &[0x90, 0x90, 0xB8, 1, 2, 3]);
        bed.run(&program!(64: "mov esi, 0x200FFA", "jmp rsi"));
        let t = bed.taken();
        assert_eq!((t.vector, t.error, t.rip, bed.cpu.cr2), (14, Some(pf::I), BORDER - 4, BORDER));
        // A complete instruction at the end: the fault is of the next.
        bed.put(BORDER - 6, &[0x90, 0xB8, 1, 2, 3, 4]);
        bed.reset();
        bed.run(&program!(64: "mov esi, 0x200FFA", "jmp rsi"));
        let t = bed.taken();
        assert_eq!((t.vector, t.rip, bed.cpu.cr2, bed.cpu.gpr[gpr::RAX]), (14, BORDER, BORDER, 0x0403_0201));
        // The fetch fault has the I bit where NX is on and the page is there.
        bed.map(BORDER, BORDER, pte::ALL | pte::XD);
        bed.flush();
        bed.put(BORDER - 6, &[0x90, 0x90, 0xB8, 1, 2, 3]);
        bed.reset();
        bed.run(&program!(64: "mov esi, 0x200FFA", "jmp rsi"));
        let t = bed.taken();
        assert_eq!((t.error, t.rip, bed.cpu.cr2), (Some(pf::P | pf::I), BORDER - 4, BORDER));
    });
}

#[test]
fn an_invalid_opcode_wins_over_the_missing_page_behind_it() {
    both(Start::Long, |bed| {
        bed.map(BORDER, 0, 0);
        bed.put(BORDER - 2, &[0x0F, 0x0B]);
        bed.run(&program!(64: "mov esi, 0x200FFE", "jmp rsi"));
        assert_eq!((bed.taken().vector, bed.taken().rip), (6, BORDER - 2));
        // Sixteen bytes of prefixes: #GP, not #PF, though more would follow.
        bed.put(BORDER - 16, &[0x66; 16]);
        bed.reset();
        bed.run(&program!(64: "mov esi, 0x200FF0", "jmp rsi"));
        assert_eq!((bed.taken().vector, bed.taken().error), (13, Some(0)));
    });
}

#[test]
fn string_instructions_stop_at_the_page_that_faults() {
    both(Start::Long, |bed| {
        border(bed, 0);
        bed.cpu.gpr[gpr::RDI] = BORDER - 100;
        let program = program!(64: "mov ecx, 200", "mov eax, 0x11"; "rep stosb");
        bed.run(&program);
        let t = bed.taken();
        assert_eq!((t.vector, t.rip, bed.cpu.cr2), (14, CODE + program.at, BORDER));
        assert_eq!((bed.cpu.gpr[gpr::RCX], bed.cpu.gpr[gpr::RDI]), (100, BORDER));
        assert_eq!(bed.get32(BORDER - 4), 0x1111_1111);
        // MOVS: the source is there, the destination is not.
        bed.reset();
        border(bed, 0);
        bed.cpu.gpr[gpr::RDI] = BORDER - 8;
        bed.cpu.gpr[gpr::RSI] = DATA;
        bed.run(&program!(64: "mov ecx, 5", "rep movsq"));
        assert_eq!(
            (bed.cpu.gpr[gpr::RCX], bed.cpu.gpr[gpr::RSI], bed.cpu.gpr[gpr::RDI]),
            (4, DATA + 8, BORDER)
        );
    });
}

/// Repeated moves and stores over several pages that lie in another order in memory, both ways, with elements on two pages,
/// and onto themselves (SDM 1, 7.3.9).
#[test]
fn repetitions_go_from_page_to_page() {
    let moves = [program!(64: ; "rep movsb"), program!(64: ; "rep movsd"), program!(64: ; "rep movsq")];
    let down = [
        program!(64: "std"; "rep movsb", "cld"),
        program!(64: "std"; "rep movsd", "cld"),
        program!(64: "std"; "rep movsq", "cld"),
    ];
    both(Start::Long, |bed| {
        let pages = [(0, 0), (1, 3), (2, 1), (3, 2)].map(|(lin, phys)| (lin * 0x1000, DATA + phys * 0x1000));
        for (lin, phys) in pages {
            bed.map(DATA + lin, phys, pte::ALL);
        }
        bed.flush();
        let pattern: Vec<u8> = (0..0x4000u32).map(|n| (n * 7 + n / 251) as u8).collect();
        for (from, to, len) in
            [(0x10, 0x1008, 0x1FF0), (0x13, 0x1FF5, 0x1808), (0x800, 0x801, 0x1400), (0xFF9, 0x20, 0x2008)]
        {
            for (size, (up, down)) in [1u64, 4, 8].into_iter().zip(moves.iter().zip(&down)) {
                let n = len / size;
                for (program, step) in [(up, size), (down, size.wrapping_neg())] {
                    for (lin, phys) in pages {
                        bed.put(phys, &pattern[lin as usize..][..0x1000]);
                    }
                    // The first element: the lowest one upwards, the highest one downwards.
                    let first = if step == size { 0 } else { (n - 1) * size };
                    bed.cpu.gpr[gpr::RCX] = n;
                    bed.cpu.gpr[gpr::RSI] = DATA + from + first;
                    bed.cpu.gpr[gpr::RDI] = DATA + to + first;
                    bed.finish(program);
                    let mut expected = pattern.clone();
                    for i in 0..n {
                        let at = first.wrapping_add(i.wrapping_mul(step));
                        let (s, d) = ((from + at) as usize, (to + at) as usize);
                        expected.copy_within(s..s + size as usize, d);
                    }
                    let moved = n.wrapping_mul(step);
                    assert_eq!(bed.cpu.gpr[gpr::RCX], 0);
                    assert_eq!(bed.cpu.gpr[gpr::RSI], (DATA + from + first).wrapping_add(moved));
                    assert_eq!(bed.cpu.gpr[gpr::RDI], (DATA + to + first).wrapping_add(moved));
                    for at in (0..0x4000).step_by(8) {
                        let (lin, phys) = pages[at / 0x1000];
                        let wanted = u64::from_le_bytes(expected[at..][..8].try_into().expect("eight bytes"));
                        let seen = bed.get64(phys + at as u64 - lin);
                        assert_eq!(
                            seen, wanted,
                            "{size} bytes by {step:#x}, {from:#x} to {to:#x}, at {at:#x}"
                        );
                    }
                }
            }
        }
    });
}

#[test]
fn linear_addresses_wrap_at_4_gib() {
    both(Start::Paged32, |bed| {
        // The last page of the space and the first one.
        bed.put32(crate::bed::PD32 + 1023 * 4, (crate::bed::SPARE | pte::ALL) as u32);
        bed.put32(crate::bed::SPARE + 1023 * 4, (DATA | pte::ALL) as u32);
        bed.put32(DATA + 0xFFC, 0x4433_2211);
        bed.put32(0, 0x8877_6655);
        bed.finish(&program!(32: "mov esi, 0xFFFFFFFF", "mov ecx, 20", "2: mov eax, [esi - 3]", "mov ebx, [esi + 0x200FFD]", "dec ecx", "jnz 2b"));
        assert_eq!(bed.cpu.gpr[gpr::RAX], 0x4433_2211);
        assert_eq!(bed.cpu.gpr[gpr::RBX], 0x4433_2211);
    });
}

/// Elements of a masked move that lie behind the end of the space are the first ones of it, as on the host (a 16-bit program of the
/// conformance campaign).
#[test]
fn masked_elements_wrap_at_4_gib() {
    both(Start::Paged32, |bed| {
        (bed.cpu.cr4, bed.cpu.xcr0) = (bed.cpu.cr4 | cr4::OSFXSR | cr4::OSXSAVE, 7);
        bed.put32(0, 0x4433_2211);
        bed.put32(4, 0x8877_6655);
        bed.finish(&program!(32: "vpcmpeqd xmm3, xmm3, xmm3", "vpslldq xmm3, xmm3, 8", "mov esi, 0xFFFFFFF8", "vmaskmovps xmm0, xmm3, [esi]",
            "vpextrd eax, xmm0, 2", "vpextrd ebx, xmm0, 3", "add esi, 4", "vmaskmovps [esi], xmm3, xmm0"));
        assert_eq!((bed.cpu.gpr[gpr::RAX], bed.cpu.gpr[gpr::RBX]), (0x4433_2211, 0x8877_6655));
        assert_eq!((bed.get32(4), bed.get32(8)), (0x4433_2211, 0x8877_6655));
    });
}

/// Elements of a masked move that lie beyond the limit are refused before the pages of others are looked at (a 16-bit program of
/// the conformance campaign).
#[test]
fn limits_of_masked_elements_come_before_pages() {
    both(Start::Paged32, |bed| {
        bed.gdt(crate::bed::sel::FREE, crate::segments::descriptor(DATA, 0x1007, 0x4093));
        bed.map(DATA + 0x1000, 0, 0);
        // Elements 1 and 2 lie in the missing page, element 3 begins behind the limit.
        let load = program!(32: "mov eax, 0x58", "mov fs, eax", "mov esi, 0xFFC", "movups xmm3, [edi]"; "vmaskmovps xmm0, xmm3, fs:[esi]");
        let store = program!(32: "mov eax, 0x58", "mov fs, eax", "mov esi, 0xFFC", "movups xmm3, [edi]"; "vmaskmovps fs:[esi], xmm3, xmm0");
        for (mask, page) in
            [(0b1000u32, false), (0b1010, false), (0b1111, false), (0b0011, true), (0b0100, true)]
        {
            bed.reset();
            bed.cpu.gpr[gpr::RDI] = DATA + 0x100;
            for k in 0..4 {
                bed.put32(DATA + 0x100 + 4 * k, (mask >> k & 1) << 31);
            }
            for (p, error) in [(&load, 0), (&store, pf::W)] {
                if page {
                    let first = u64::from(mask.trailing_zeros().max(1));
                    bed.page_faults(p, DATA + 0xFFC + 4 * first, error);
                } else {
                    bed.faults(p, 13, 0);
                }
            }
        }
        bed.map(DATA + 0x1000, DATA + 0x1000, pte::ALL);
    });
}

/// An instruction whose second page may be read but not executed, or is the supervisor's: #PF there, at the instruction.
#[test]
fn instructions_that_run_into_a_forbidden_page() {
    both(Start::Long, |bed| {
        for (user, bits, error) in [
            (false, pte::ALL | pte::XD, pf::P | pf::I),
            (true, pte::ALL | pte::XD, pf::P | pf::U | pf::I),
            (true, pte::P | pte::RW, pf::P | pf::U | pf::I),
        ] {
            bed.restore();
            bed.gate(0x50, 14, 3, crate::bed::HANDLERS + 0x500);
            // MOV EAX, imm32 over the border; a NOP before it makes a block of two.
            bed.put(0x30_0FFD, &[0x90, 0xB8, 0x11, 0x22, 0x33, 0x44, 0xCD, 0x50]);
            if user {
                bed.user();
            }
            let start = bed.cpu.clone();
            for (bits, fault) in [(pte::ALL, false), (bits, true), (pte::ALL, false)] {
                bed.map(0x30_1000, 0x30_1000, bits);
                bed.flush();
                bed.cpu = start.clone();
                bed.cpu.rip = 0x30_0FFD;
                bed.go();
                let t = bed.taken();
                if fault {
                    assert_eq!(
                        (t.vector, t.error, t.rip, bed.cpu.cr2),
                        (14, Some(error), 0x30_0FFE, 0x30_1000)
                    );
                } else {
                    assert_eq!((t.vector, bed.cpu.gpr[gpr::RAX]), (0x50, 0x4433_2211));
                }
            }
        }
    });
}

/// The translator knows 65,536 pages of code at a time and starts over with the next one. Where that is the second page of an
/// instruction, stores to its first page are still seen, whether that has other code or not.
#[test]
fn an_instruction_whose_second_page_is_one_too_many() {
    for kind in [Kind::Interpreter, Kind::Tables] {
        for (pages, beside) in (PAGES - 4..PAGES).flat_map(|pages| [(pages, true), (pages, false)]) {
            crosses_into_one_too_many(kind, pages, beside);
        }
    }
}

const PAGES: u64 = 65_536;

/// Runs code on so many `pages`, then an instruction on two pages, of which the first has other code if `beside`.
fn crosses_into_one_too_many(kind: Kind, pages: u64, beside: bool) {
    const FIRST: u64 = 0x30_0000;
    const CROSSING: u64 = FIRST + 0xFFC;
    const RETURNS: u64 = 0xA0_0000;
    const MANY: u64 = 32 << 20;
    let mut bed = Bed::with_code_cache("max", Start::Long, kind, 64 << 20);
    for page in 0..512 {
        bed.put(RETURNS + page * 4096, &[0xC3]);
    }
    for n in 0..=PAGES / 512 {
        bed.put64(PD + (MANY >> 21) * 8 + n * 8, RETURNS | pte::PS | pte::P | pte::RW);
    }
    // MOV EAX, 1; RET: the number begins on the first page.
    bed.put(CROSSING, &[0xB8, 1, 0, 0, 0, 0xC3]);
    bed.put(FIRST, &[0xC3]);
    bed.cpu.gpr[gpr::RBX] = MANY;
    bed.cpu.gpr[gpr::RCX] = pages;
    bed.cpu.gpr[gpr::RSI] = if beside { FIRST } else { RETURNS };
    bed.cpu.gpr[gpr::RDI] = CROSSING;
    bed.finish(&program!(64: "call rsi", "2: call rbx", "add rbx, 4096", "dec ecx", "jnz 2b",
        "call rdi", "mov edx, eax", "mov byte ptr [rdi + 1], 7", "call rdi"));
    assert_eq!((bed.cpu.gpr[gpr::RDX], bed.cpu.gpr[gpr::RAX]), (1, 7), "{kind:?}, {pages} pages, {beside}");
}

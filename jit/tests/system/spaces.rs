//! Address spaces with process-context identifiers (SDM 3A, 4.10.1 and 4.10.4): what belongs to one PCID is never used for
//! another, and what the guest invalidates is gone, whichever space is current. Stale entries that the manual allows are
//! never asserted.

use crate::bed::{Bed, DATA, HANDLERS, Program, Start, both, pte};
use paravane_cpu::{cr4, flags, gpr};

/// Paging structures of space `n`: PML4, PDPT, page directory, page table of [`DATA`]'s 2 MiB.
const TREES: u64 = 0x80_0000;
/// The physical pages behind [`DATA`] and [`ROUTINE`] in space 0; those of the others follow.
const PAGES: u64 = 0x90_0000;
/// Mapped differently in each space: a page of data at [`DATA`], one with a routine here.
const ROUTINE: u64 = DATA + 0x1000;
/// Values for CR3, one after the other.
const LIST: u64 = 0x40_0000;
/// The mapping of everything repeats here.
const UPPER: u64 = 0xFFFF_8000_0000_0000;
/// MOV to CR3 keeps what is cached.
const KEEP: u64 = 1 << 63;
/// More than the translator remembers.
const MANY: u64 = 12;

fn root(space: u64) -> u64 {
    TREES + space * 0x4000
}

/// Where the entries for [`DATA`] and [`ROUTINE`] are.
fn entry(space: u64, lin: u64) -> u64 {
    root(space) + 0x3000 + (lin - DATA) / 4096 * 8
}

fn page(space: u64, lin: u64) -> u64 {
    PAGES + space * 0x2000 + (lin - DATA)
}

/// CR3 for space `n`: PCID `n + 1`.
fn cr3(space: u64) -> u64 {
    root(space) | (space + 1)
}

/// Builds [`MANY`] spaces. Data and routine of space `n` say `100 + n`; their entries have `bits`.
fn build(bed: &mut Bed, bits: u64) {
    bed.cpu.cr4 |= cr4::PCIDE | cr4::PGE;
    for space in 0..MANY {
        let root = root(space);
        for slot in [0, 256] {
            bed.put64(root + slot * 8, (root + 0x1000) | pte::ALL);
        }
        bed.put64(root + 0x1000, (root + 0x2000) | pte::ALL);
        for i in 0..8 {
            bed.put64(root + 0x2000 + i * 8, bed.get64(crate::bed::PD + i * 8));
        }
        bed.put64(root + 0x2000 + 8, (root + 0x3000) | pte::ALL);
        for lin in [DATA, ROUTINE] {
            bed.put64(entry(space, lin), page(space, lin) | bits);
        }
        bed.put64(page(space, DATA), 100 + space);
        bed.put64(page(space, DATA) + 8, 0);
        // MOV EAX, imm32; RET
        bed.put(page(space, ROUTINE), &[0xB8, 100 + space as u8, 0, 0, 0, 0xC3]);
    }
    bed.cpu.gpr[gpr::RSI] = DATA;
    bed.cpu.gpr[gpr::RDI] = ROUTINE;
    bed.cpu.gpr[gpr::RBX] = LIST;
    bed.flush();
}

/// An order in which spaces come back after few and after many others.
fn order() -> Vec<u64> {
    (0..60).map(|i| if i % 3 == 0 { i / 3 % MANY } else { i * i % 7 }).collect()
}

/// Puts CR3 values on the list.
fn list(bed: &mut Bed, cr3: impl Fn(u64) -> u64) {
    for (i, &space) in order().iter().enumerate() {
        bed.put64(LIST + i as u64 * 8, cr3(space));
    }
}

/// INT 40H does `program`, at CPL 0.
fn service(bed: &mut Bed, number: u64, program: &Program) {
    let at = HANDLERS + number * 16;
    bed.gate(number, 14, 3, at);
    bed.put(at, program.bytes);
}

/// To CPL 3; registers stay.
fn user(bed: &mut Bed) {
    let gpr = bed.cpu.gpr;
    bed.user();
    let rsp = bed.cpu.gpr[gpr::RSP];
    bed.cpu.gpr = gpr;
    bed.cpu.gpr[gpr::RSP] = rsp;
}

/// What the loops over [`order`] must have left: the sum of the values seen, and how often each space was visited.
fn check_visits(bed: &Bed) {
    let order = order();
    let sum: u64 = order.iter().map(|space| 100 + space).sum();
    assert_eq!((bed.cpu.gpr[10], bed.cpu.gpr[11]), (sum, sum), "data and routines");
    for space in 0..MANY {
        let visits = order.iter().filter(|&&s| s == space).count() as u64;
        assert_eq!(bed.get64(page(space, DATA) + 8), visits, "space {space}");
    }
}

/// A user program asks for one space after the other, whose CR3 is `cr3`, and uses each.
fn visit(bed: &mut Bed, cr3: impl Fn(u64) -> u64) {
    list(bed, cr3);
    service(
        bed,
        0x40,
        &program!(64: "push rax", "mov rax, [rbx]", "add rbx, 8", "mov cr3, rax", "pop rax", "iretq"),
    );
    user(bed);
    bed.cpu.gpr[gpr::RCX] = order().len() as u64;
    bed.run(&program!(64: "2: int 0x40", "mov rax, [rsi]", "add r10, rax", "inc qword ptr [rsi + 8]",
        "call rdi", "add r11, rax", "dec ecx", "jnz 2b"));
    assert_eq!(bed.taken().vector, 13, "HLT at CPL 3");
    check_visits(bed);
}

#[test]
fn a_user_program_sees_each_space() {
    both(Start::Long, |bed| {
        build(bed, pte::ALL);
        visit(bed, |space| cr3(space) | KEEP);
    });
}

#[test]
fn the_supervisor_sees_each_space_at_both_ends_of_the_linear_space() {
    for (offset, smap) in [(0, false), (UPPER, false), (0, true), (UPPER, true)] {
        both(Start::Long, |bed| {
            build(bed, pte::ALL);
            list(bed, |space| cr3(space) | KEEP);
            if smap {
                // User pages are reached through the view with EFLAGS.AC.
                bed.cpu.cr4 |= cr4::SMAP;
                bed.cpu.rflags |= flags::AC;
            }
            for r in [gpr::RSI, gpr::RDI] {
                bed.cpu.gpr[r] = bed.cpu.gpr[r].wrapping_add(offset);
            }
            bed.cpu.gpr[gpr::RCX] = order().len() as u64;
            bed.finish(&program!(64: "2: mov rax, [rbx]", "add rbx, 8", "mov cr3, rax",
                "mov rax, [rsi]", "add r10, rax", "inc qword ptr [rsi + 8]",
                "call rdi", "add r11, rax", "dec ecx", "jnz 2b"));
            check_visits(bed);
        });
    }
}

/// How a space's translations are invalidated while another is current. R8 and R9 hold CR3 of spaces 0 and 1, each to
/// keep what is cached; R14 points to an INVPCID descriptor for space 1 and [`DATA`]. Ends in space 1.
fn invalidations() -> Vec<(&'static str, Program)> {
    vec![
        (
            "INVPCID 0",
            program!(64: "xor eax, eax", "invpcid rax, [r14]", "add qword ptr [r14 + 8], 0x1000", "invpcid rax, [r14]",
                "mov cr3, r9", "iretq"),
        ),
        ("INVPCID 1", program!(64: "mov eax, 1", "invpcid rax, [r14]", "mov cr3, r9", "iretq")),
        ("INVPCID 2", program!(64: "mov eax, 2", "invpcid rax, [r14]", "mov cr3, r9", "iretq")),
        ("INVPCID 3", program!(64: "mov eax, 3", "invpcid rax, [r14]", "mov cr3, r9", "iretq")),
        ("MOV CR3 without bit 63", program!(64: "mov rax, r9", "btr rax, 63", "mov cr3, rax", "iretq")),
        (
            "INVLPG",
            program!(64: "mov cr3, r9", "invlpg [rsi + 0x123]", "invlpg [rdi]", "mov cr3, r8", "mov cr3, r9", "iretq"),
        ),
        (
            "CR4.PGE",
            program!(64: "mov rax, cr4", "btc rax, 7", "mov cr4, rax", "btc rax, 7", "mov cr4, rax", "mov cr3, r9", "iretq"),
        ),
        (
            "CR4.PCIDE",
            program!(64: "mov rax, r8", "shr rax, 12", "shl rax, 12", "btr rax, 63", "mov cr3, rax", "mov rax, cr4",
                "btr rax, 17", "mov cr4, rax", "bts rax, 17", "mov cr4, rax", "mov cr3, r9", "iretq"),
        ),
    ]
}

/// Whose entries are changed under its feet: space 1 is used, then space 0; there, the entries of space 1 are made to lead to
/// the pages of space 2, and `invalidate` drops and goes back. The user must see the new pages.
fn changed_while_away(bed: &mut Bed, bits: u64, name: &str, invalidate: &Program) {
    build(bed, bits);
    for (r, space) in [(8, 0), (9, 1)] {
        bed.cpu.gpr[r] = cr3(space) | KEEP;
    }
    (bed.cpu.gpr[12], bed.cpu.gpr[13]) = (entry(1, DATA), entry(1, ROUTINE));
    bed.cpu.gpr[14] = LIST;
    bed.put64(LIST, 2);
    bed.put64(LIST + 8, DATA);
    bed.put64(LIST + 16, page(2, DATA) | bits);
    bed.put64(LIST + 24, page(2, ROUTINE) | bits);
    service(bed, 0x40, &program!(64: "mov cr3, r9", "iretq"));
    service(bed, 0x41, &program!(64: "mov cr3, r8", "iretq"));
    service(
        bed,
        0x42,
        &program!(64: "mov rax, [r14 + 16]", "mov [r12], rax", "mov rax, [r14 + 24]", "mov [r13], rax", "int 0x48", "iretq"),
    );
    service(bed, 0x48, invalidate);
    user(bed);
    bed.cpu.gpr[gpr::RCX] = 3;
    bed.run(&program!(64:
        "int 0x40", "2: mov r10, [rsi]", "mov [rsi + 16], rcx", "call rdi", "mov r11, rax", "dec ecx", "jnz 2b",
        "int 0x41", "mov rbx, [rsi]", "call rdi", "mov rbp, rax",
        "int 0x42", "mov rdx, [rsi]", "mov [rsi + 24], rdx", "call rdi", "mov r15, rax"));
    assert_eq!(bed.taken().vector, 13, "HLT at CPL 3");
    let g = &bed.cpu.gpr;
    assert_eq!((g[10], g[11]), (101, 101), "{name}: space 1");
    if bits & pte::G == 0 {
        assert_eq!((g[gpr::RBX], g[gpr::RBP]), (100, 100), "{name}: space 0");
    }
    assert_eq!((g[gpr::RDX], g[15]), (102, 102), "{name}: space 1 after the change");
    assert_eq!(bed.get64(page(2, DATA) + 24), 102, "{name}: written to the new page");
    assert_eq!(bed.get64(page(1, DATA) + 24), 0, "{name}: not to the old one");
}

#[test]
fn what_is_invalidated_is_gone_whichever_space_is_current() {
    for (name, program) in invalidations() {
        both(Start::Long, |bed| changed_while_away(bed, pte::ALL, name, &program));
    }
}

#[test]
fn global_pages_are_invalidated_in_all_spaces() {
    let everywhere = [
        // In space 0, for every PCID: what is global goes.
        ("INVLPG", program!(64: "invlpg [rsi]", "invlpg [rdi + 0x123]", "mov cr3, r9", "iretq")),
        ("INVPCID 2", program!(64: "mov eax, 2", "invpcid rax, [r14]", "mov cr3, r9", "iretq")),
        (
            "CR4.PGE",
            program!(64: "mov rax, cr4", "btc rax, 7", "mov cr4, rax", "btc rax, 7", "mov cr4, rax", "mov cr3, r9", "iretq"),
        ),
    ];
    for (name, program) in everywhere {
        both(Start::Long, |bed| changed_while_away(bed, pte::ALL | pte::G, name, &program));
    }
}

#[test]
fn without_pcids_every_load_of_cr3_is_another_space() {
    both(Start::Long, |bed| {
        build(bed, pte::ALL);
        bed.cpu.cr4 &= !cr4::PCIDE;
        visit(bed, root);
    });
}

#[test]
fn low_bits_of_cr3_are_no_pcid_once_pcide_is_clear() {
    both(Start::Long, |bed| {
        // PCIDE is cleared while the PCID is 1; the reload of CR3 then flushes PCID 0, which is current.
        build(bed, pte::ALL);
        bed.cpu.gpr[gpr::R8] = cr3(0);
        bed.cpu.gpr[9] = entry(0, DATA);
        bed.cpu.gpr[12] = page(1, DATA) | pte::ALL;
        bed.finish(&program!(64: "mov cr3, r8", "mov rax, cr4", "btr rax, 17", "mov cr4, rax",
            "mov ecx, [rsi]", "mov [r9], r12", "mov rax, cr3", "mov cr3, rax", "mov edx, [rsi]"));
        assert_eq!((bed.cpu.gpr[gpr::RCX], bed.cpu.gpr[gpr::RDX]), (100, 101));
    });
}

#[test]
fn a_pcid_for_another_tree_starts_empty_without_bit_63() {
    both(Start::Long, |bed| {
        // One PCID for all trees, as a kernel reuses them for new processes.
        build(bed, pte::ALL);
        visit(bed, |space| root(space) | 5);
    });
}

#[test]
fn code_translated_in_one_space_protects_the_page_in_all() {
    both(Start::Long, |bed| {
        // Space 1 can write the routine of space 0 through DATA; space 0 runs it; then space 1 changes it.
        build(bed, pte::ALL);
        bed.put64(entry(1, DATA), page(0, ROUTINE) | pte::ALL);
        for (r, space) in [(8, 0), (9, 1)] {
            bed.cpu.gpr[r] = cr3(space) | KEEP;
        }
        service(bed, 0x40, &program!(64: "mov cr3, r9", "iretq"));
        service(bed, 0x41, &program!(64: "mov cr3, r8", "iretq"));
        user(bed);
        bed.cpu.gpr[gpr::RDX] = 20;
        // The immediate of MOV EAX is the byte after the opcode.
        bed.run(&program!(64: "int 0x40", "mov byte ptr [rsi + 1], 1",
            "2: int 0x41", "call rdi", "add r10, rax", "int 0x40", "inc byte ptr [rsi + 1]", "dec edx", "jnz 2b"));
        assert_eq!(bed.taken().vector, 13, "HLT at CPL 3");
        assert_eq!(bed.cpu.gpr[10], (1..=20).sum::<u64>());
    });
}

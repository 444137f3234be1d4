//! Programs whose memory the host's page tables show (`windows` of the translator): what the guest's page tables say holds for them
//! as it does for look-ups in tables, and no address leads elsewhere.

use crate::bed::{
    Bed, CODE, DATA, HANDLERS, Kind, MAPPED, PD, PDPT, PML4, PT, Program, Start, both, pf, pte, sel,
};
use paravane_cpu::{DebugPlan, DebugStop, Exit, Space, WatchKind, Watchpoint, cr0, cr4, flags, gpr};

/// INT 40H does `program`, at CPL 0.
pub fn service(bed: &mut Bed, program: &Program) {
    let at = HANDLERS + 0x40 * 16;
    bed.gate(0x40, 14, 3, at);
    bed.put(at, program.bytes);
}

/// A machine with a window open, and nothing shown in it yet: [`DATA`] is in RSI, the entry that maps it in RDI.
fn open() -> Bed {
    let mut bed = Bed::of_kind("max", Start::Long, Kind::Windows);
    start(&mut bed);
    bed.run(&program!(64: "mov eax, [rip]"));
    assert_eq!((bed.taken().vector, bed.counter("windows_opened")), (13, Some(1)));
    bed.flush();
    bed
}

pub fn start(bed: &mut Bed) {
    bed.reset();
    bed.user();
    bed.cpu.gpr[gpr::RSI] = DATA;
    bed.cpu.gpr[gpr::RDI] = bed.pte_at(DATA);
}

/// Runs `program` from the start to its HLT.
fn run(bed: &mut Bed, program: &Program) {
    start(bed);
    bed.run(program);
    let (t, hlt) = (bed.taken(), CODE + program.bytes.len() as u64 - 1);
    assert_eq!((t.vector, t.rip), (13, hlt), "HLT at CPL 3; CR2 {:#x}", bed.cpu.cr2);
}

/// Pages cost a fault each, and neighbours that were accessed before none.
#[test]
fn a_page_is_shown_once() {
    let mut bed = open();
    let p = program!(64: "mov ecx, 1000", "2: add [rsi], rcx", "push rcx", "pop rax", "add rax, [rsi + 0xFFC]", "mov rdx, [rsi + rcx * 4]",
        "dec ecx", "jnz 2b");
    run(&mut bed, &p);
    assert_eq!(bed.get64(DATA), 500_500);
    let faults = bed.counter("window_faults").expect("a counter");
    // The stack, two pages of data, which are written first, and code that is read.
    assert!((3..8).contains(&faults), "{faults}");
    run(&mut bed, &p);
    assert_eq!(bed.get64(DATA), 1_001_000);
    assert_eq!(bed.counter("window_faults"), Some(faults));
    // All of it was accessed: one fault shows everything around.
    bed.flush();
    run(&mut bed, &p);
    assert_eq!(bed.counter("window_faults"), Some(faults), "nothing changed in the page tables");
}

#[test]
fn accessed_and_dirty_bits() {
    let mut bed = open();
    for page in 0..4 {
        bed.map(DATA + page * 4096, DATA + page * 4096, pte::ALL);
    }
    run(&mut bed, &program!(64: "mov al, [rsi]", "mov [rsi + 0x2010], al", "mov al, [rsi + 0x2FFF]"));
    let bits = |bed: &Bed, page: u64| bed.pte(DATA + page * 4096) & (pte::A | pte::D);
    assert_eq!([0, 1, 2, 3].map(|page| bits(&bed, page)), [pte::A, 0, pte::A | pte::D, 0]);
    run(&mut bed, &program!(64: "mov [rsi], al", "mov al, [rsi + 0x1000]"));
    assert_eq!([0, 1, 2, 3].map(|page| bits(&bed, page)), [pte::A | pte::D, pte::A, pte::A | pte::D, 0]);
}

/// INVLPG and MOV to CR3 show what the entry says now.
#[test]
fn pages_that_are_mapped_elsewhere() {
    for kernel in [
        program!(64: "mov [rdi], rbx", "invlpg [rsi]", "iretq"),
        program!(64: "mov [rdi], rbx", "mov rax, cr3", "mov cr3, rax", "iretq"),
    ] {
        let mut bed = open();
        service(&mut bed, &kernel);
        for page in 0..8 {
            bed.put64(DATA + 0x10_0000 + page * 4096, 100 + page);
        }
        run(
            &mut bed,
            &program!(64: "lea rbx, [rsi + 0x100067]", "xor r9d, r9d", "mov ecx, 8", "2: int 0x40", "add r9, [rsi]",
            "mov [rsi + 8], rcx", "add rbx, 0x1000", "dec ecx", "jnz 2b"),
        );
        assert_eq!(bed.cpu.gpr[9], (100..108).sum::<u64>());
        let written: Vec<u64> = (0..8).map(|page| bed.get64(DATA + 0x10_0008 + page * 4096)).collect();
        assert_eq!(written, [8, 7, 6, 5, 4, 3, 2, 1]);
    }
}

/// A page becomes read-only, goes, and is the supervisor's.
#[test]
fn pages_that_are_taken_away() {
    for (bits, error) in [
        (pte::P | pte::US | pte::A | pte::D, pf::P | pf::W | pf::U),
        (0, pf::W | pf::U),
        (pte::P | pte::RW | pte::A | pte::D, pf::P | pf::W | pf::U),
    ] {
        let mut bed = open();
        service(&mut bed, &program!(64: "mov [rdi], rbx", "mov rax, cr3", "mov cr3, rax", "iretq"));
        bed.put64(DATA + 8, 5);
        let p = program!(64: "mov qword ptr [rsi + 8], 6", "int 0x40"; "add qword ptr [rsi + 8], 7");
        start(&mut bed);
        bed.cpu.gpr[gpr::RBX] = DATA | bits;
        bed.run(&p);
        let t = bed.taken();
        assert_eq!((t.vector, t.error, t.rip, bed.cpu.cr2), (14, Some(error), CODE + p.at, DATA + 8));
        assert_eq!(bed.get64(DATA + 8), 6);
    }
}

/// An access to two pages of which the second is missing changes neither.
#[test]
fn accesses_to_two_pages() {
    let mut bed = open();
    bed.map(DATA + 0x1000, 0, 0);
    bed.put64(DATA + 0xFF8, 1);
    let p = program!(64: "mov al, [rsi]", "mov [rsi], al"; "mov [rsi + 0xFFC], rsi");
    start(&mut bed);
    bed.run(&p);
    let t = bed.taken();
    assert_eq!((t.vector, t.rip, bed.cpu.cr2), (14, CODE + p.at, DATA + 0x1000));
    assert_eq!(bed.get64(DATA + 0xFF8), 1);
    bed.map(DATA + 0x1000, DATA + 0x8000, pte::ALL);
    run(&mut bed, &p_to_hlt());
    assert_eq!((bed.get32(DATA + 0xFFC), bed.get32(DATA + 0x8000)), (DATA as u32, (DATA >> 32) as u32));
}

/// Runs of words on the stack move the host's stack pointer once; one of them that faults finds it where it belongs, and goes on from there
/// when its page has come.
#[test]
fn words_that_fault_in_a_run() {
    const EDGE: u64 = DATA + 0x1000;
    let pushes = program!(64: "push 1", "push rbx", "inc rbx", "push 3", "push 4", "push 5", "push 6", "push 7", "push 8", "push 9", "push 10",
        "push 11", "push 12", "push 13", "push 14", "push 15", "push 16", "push 17", "push 18", "push 19", "push 20", "pop rax", "pop rcx", "pop rdx");
    let pops = program!(64: "pop rax", "pop rbx", "lea r9, [rbx + 1]", "pop rcx", "pop rdx", "push rdx", "pop rdx", "pop rbp", "pop r8", "pop r10",
        "pop r11", "pop r12", "pop r13", "pop r14", "pop r15", "pop rax", "pop rax", "pop rax", "pop rax", "pop rax", "push 7");
    let calls = program!(64: "push 1", "push 2", "call 2f", "2:", "push 3", "ret");
    both(Start::Long, |bed| {
        for (n, p) in [&pushes, &pops, &calls].into_iter().enumerate() {
            let words = [20, 17, 4][n];
            for done in 0..words {
                // The word behind `done` of them is on the page that is missing.
                let down = n != 1;
                let (missing, rsp) =
                    if down { (EDGE - 0x1000, EDGE + 8 * done) } else { (EDGE, EDGE - 8 * done) };
                start(bed);
                bed.map(missing, 0, 0);
                bed.flush();
                bed.cpu.gpr[gpr::RSP] = rsp;
                bed.cpu.gpr[gpr::RBX] = 2;
                bed.run(p);
                let (t, cr2) = (bed.taken(), if down { EDGE - 8 } else { EDGE });
                let rip = first_word_on(p, missing >> 12, rsp);
                assert_eq!((t.vector, t.rip, t.sp, bed.cpu.cr2), (14, rip, EDGE, cr2), "program {n}, {done}");
                bed.map(missing, missing, pte::ALL);
                bed.flush();
            }
        }
    });
}

/// Where `program` first pushes or pops a word on `page`, straight on.
fn first_word_on(program: &Program, page: u64, mut rsp: u64) -> u64 {
    for instr in &mut iced_x86::Decoder::with_ip(64, program.bytes, CODE, 0) {
        let by = i64::from(instr.stack_pointer_increment());
        let word = if by < 0 { rsp.wrapping_add_signed(by) } else { rsp };
        if by != 0 && word >> 12 == page {
            return instr.ip();
        }
        rsp = rsp.wrapping_add_signed(by);
    }
    panic!("no word on the page");
}

fn p_to_hlt() -> Program {
    program!(64: "mov [rsi + 0xFFC], rsi")
}

/// Programs may write what they run, also where the page was written before.
#[test]
fn code_that_changes() {
    let mut bed = open();
    run(
        &mut bed,
        &program!(64: "mov ecx, 50", "xor eax, eax", "2: mov dword ptr [rip + 3f + 1], ecx", "3: mov edx, 0", "add eax, edx",
        "dec ecx", "jnz 2b"),
    );
    assert_eq!(bed.cpu.gpr[gpr::RAX], 1275);
    // Code in a page of data that is shown as writable.
    bed.put(DATA, &[0]);
    run(
        &mut bed,
        &program!(64: "mov ecx, 50", "xor r9d, r9d", "2: mov byte ptr [rsi + 0x100], 0xB8", "mov [rsi + 0x101], ecx",
        "mov byte ptr [rsi + 0x105], 0xC3", "lea rdx, [rsi + 0x100]", "call rdx", "add r9, rax", "dec ecx", "jnz 2b"),
    );
    assert_eq!(bed.cpu.gpr[9], 1275);
}

/// Addresses without a page, without a region and without a form: faults at the instruction, with all registers and flags as before
/// it, whichever flags are live.
#[test]
fn wild_addresses() {
    const WILD: [u64; 12] = [
        0,
        0x10,
        0xFFFF,
        0x1_0000,
        0x7FFF_FFFF_EFF8,
        0x7FFF_FFFF_F000,
        0x7FFF_FFFF_FFFE,
        0x8000_0000_0000,
        0xFFFF_7FFF_FFFF_FFF8,
        0xFFFF_8000_0000_0000,
        0xFFFF_FFFF_FFFF_FFF0,
        0x5555_5555_5000,
    ];
    let programs = [
        program!(64: "cmp eax, ebx"; "mov rdx, [r9]", "setc cl", "jo 2f", "js 2f", "jp 2f", "2: jz 3f", "3:"),
        program!(64: "add eax, ebx"; "mov [r9 + 1], rdx", "adc ecx, 0"),
        program!(64: "test eax, ebx"; "add [r9], edx"),
        program!(64: "sub eax, ebx"; "movups xmm0, [r9 + rbp]", "setz cl"),
        program!(64: "sub eax, ebx"; "lock xadd [r9], rdx", "setc cl"),
        program!(64: "cmp eax, ebx"; "xchg ah, [rdi]", "setz cl"),
    ];
    both(Start::Long, |bed| {
        // Where bits beyond those of addresses are set, too, whatever the host has there.
        let aliases = (48..64).flat_map(|bit| [DATA | 1 << bit, 0x5555_5555_5000 | 1 << bit]);
        for at in WILD.into_iter().chain([1 << 40, 3 << 32]).chain(aliases) {
            for (n, p) in programs.iter().enumerate() {
                start(bed);
                bed.map(0, 0, 0);
                bed.map(0x1_0000, 0, 0);
                bed.map(0xF000, 0, 0);
                bed.flush();
                let g = &mut bed.cpu.gpr;
                (g[9], g[gpr::RDI], g[gpr::RAX], g[gpr::RBX], g[gpr::RDX]) =
                    (at, at, 0x8765_4321, 0x1234_5678, 9);
                g[gpr::RBP] = 0;
                let before = *g;
                bed.run(p);
                let t = bed.taken();
                let last = at.wrapping_add([7, 8, 3, 15, 7, 0][n]);
                let first = at.wrapping_add(u64::from(n == 1));
                let canonical = |lin: u64| ((lin << 16) as i64 >> 16) as u64 == lin;
                let vector = if canonical(first) && canonical(last) { 14 } else { 13 };
                assert_eq!((t.vector, t.rip), (vector, CODE + p.at), "{at:#x}, program {n}");
                let mut now = bed.cpu.gpr;
                now[gpr::RAX] = if matches!(n, 1 | 3 | 4) { before[gpr::RAX] } else { now[gpr::RAX] };
                now[gpr::RSP] = before[gpr::RSP];
                assert_eq!(now, before, "{at:#x}, program {n}");
                let sum = 0x8765_4321u64 + 0x1234_5678;
                let (a, b) = (0x8765_4321u32, 0x1234_5678u32);
                let carry = match n {
                    1 => sum >> 32 != 0,
                    2 => false,
                    _ => a < b,
                };
                assert_eq!(t.flags & flags::CF != 0, carry, "{at:#x}, program {n}");
                bed.map(0, 0, pte::ALL);
                bed.map(0x1_0000, 0x1_0000, pte::ALL);
                bed.map(0xF000, 0xF000, pte::ALL);
            }
        }
    });
}

/// Operands that are far from their base registers, which point to nothing, or are no addresses at all.
#[test]
fn operands_far_from_their_bases() {
    both(Start::Long, |bed| {
        for turn in 1..4u64 {
            start(bed);
            for n in 0..4 {
                bed.put64(DATA + n * 8, 1 << (16 * n));
            }
            let g = &mut bed.cpu.gpr;
            g[gpr::RDI] = DATA.wrapping_sub(0x70_0000);
            g[gpr::RDX] = DATA + 0x78_0000;
            g[gpr::RBX] = DATA.wrapping_sub(0x4000_0000);
            g[gpr::RBP] = (DATA.wrapping_sub(16) as i64 >> 3) as u64;
            (g[9], g[8]) = (1 << 63, (1 << 63) + DATA);
            bed.run(&program!(64: "mov ecx, 100", "xor eax, eax", "2: add rax, [rdi + 0x700000]", "add rax, [rdx - 0x780000 + 8]",
                "add rax, [rbx + 0x40000010]", "add rax, [rbp * 8 + 40]", "add rax, [r9 + r8]", "add rdi, 8", "sub rax, [rdi + 0x700000]",
                "sub rdi, 8", "dec ecx", "jnz 2b"));
            let t = bed.taken();
            assert_eq!(
                (t.vector, bed.cpu.gpr[gpr::RAX]),
                (13, 100 * (2 + (1 << 32) + (1 << 48))),
                "turn {turn}"
            );
        }
    });
}

/// A negative index into a table at a fixed address is no reason to leave translated code.
#[test]
fn negative_indices_into_tables() {
    let mut bed = open();
    for n in 0..100 {
        bed.put64(DATA + n * 8, n);
    }
    let p =
        program!(64: "mov rax, -800", "xor ebx, ebx", "2: add rbx, [rax + 0x200320]", "add rax, 8", "jnz 2b");
    run(&mut bed, &p);
    let faults = bed.counter("host_faults").expect("a counter");
    run(&mut bed, &p);
    assert_eq!((bed.cpu.gpr[gpr::RBX], bed.counter("host_faults")), (4950, Some(faults)));
}

/// Prefetches do nothing that a program can see, wherever they lead.
#[test]
fn prefetches() {
    let p64 = program!(64: "mov ecx, 100", "2: cmp rcx, 100", "prefetcht0 [rdi]", "prefetchnta [rdi + rcx * 8 + 0x1000]", "prefetchw [r12 - 8]",
        "prefetcht1 [r12 + rcx]", "prefetcht2 fs:[rdi]", "prefetcht0 [edi]", "setc al", "add rbx, rax", "dec ecx", "jnz 2b", "mov rdx, [rsi]");
    let mut bed = open();
    for at in [0, DATA, MAPPED, 0x7FFF_FFFF_F000, 1 << 47, u64::MAX, &raw const p64 as u64] {
        start(&mut bed);
        let g = &mut bed.cpu.gpr;
        (g[gpr::RDI], g[12], g[gpr::RAX], g[gpr::RBX]) = (at, at, 0, 0);
        bed.put64(DATA, at);
        bed.run(&p64);
        let (t, g) = (bed.taken(), bed.cpu.gpr);
        assert_eq!((t.vector, g[gpr::RBX], g[gpr::RDX], g[12]), (13, 99, at, at), "{at:#x}");
    }
    let faults = bed.counter("host_faults").expect("a counter");
    assert!(faults < 10, "{faults}");
    let p32 = program!(32: "mov ecx, 100", "2: cmp ecx, 100", "prefetcht0 [edi]", "prefetchnta [edi + ecx * 8 + 0x1000]", "setc al", "add ebx, eax",
        "dec ecx", "jnz 2b");
    for start in MODES_32 {
        both(start, |bed| {
            for at in [0, 0x2000_0000u32, 0xFFFF_FFF0] {
                bed.reset();
                bed.user();
                let g = &mut bed.cpu.gpr;
                (g[gpr::RDI], g[gpr::RAX], g[gpr::RBX]) = (u64::from(at), 0, 0);
                bed.run(&p32);
                assert_eq!((bed.taken().vector, bed.cpu.gpr[gpr::RBX]), (13, 99), "{at:#x}");
            }
        });
    }
}

/// A register that held an address may hold another one the next moment: the one that counts is reached, or not.
#[test]
fn bases_that_change() {
    let programs = [
        program!(64: "mov rbx, rsi", "mov rax, [rbx]"; "mov rbx, [rsi + 8]", "mov rdx, [rbx]"),
        program!(64: "mov rbx, rsi", "mov rax, [rbx]"; "xchg rbx, r9", "mov rdx, [rbx]"),
        program!(64: "mov rbx, rsi", "mov rax, [rbx]"; "add rbx, r12", "mov rdx, [rbx]"),
        program!(64: "mov rbx, rsi", "mov rax, [rbx]", "cmp rsi, rsi"; "cmovz rbx, r9", "mov rdx, [rbx]"),
        program!(64: "mov rbx, rsi", "mov rax, [rbx]"; "lea rbx, [rbx + r12]", "mov rdx, [rbx]"),
        program!(64: "mov rbx, rsi", "mov rax, [rbx]", "push r9"; "pop rbx", "mov rdx, [rbx]"),
        program!(64: "mov rbx, rsi", "mov rax, [rbx + rbp * 2]"; "mov rbp, r12", "mov rdx, [rbx + rbp * 2]"),
        program!(64: "push rax"; "mov rsp, r9", "pop rdx"),
        program!(64: "mov rbp, rsi", "mov rax, [rbp]", "mov [rsi], r9", "leave"; "mov rdx, [rbp]"),
    ];
    both(Start::Long, |bed| {
        for at in [0x5555_5555_5000, 0x7FFF_FFFF_E000, DATA | 1 << 57, 0xFFFF_8000_0000_0000] {
            for (n, p) in programs.iter().enumerate() {
                start(bed);
                bed.put64(DATA + 8, at);
                let g = &mut bed.cpu.gpr;
                (g[9], g[12], g[gpr::RBP]) = (at, at.wrapping_sub(DATA), 0);
                bed.run(p);
                let t = bed.taken();
                // HLT would be 13, too.
                let hlt = CODE + p.bytes.len() as u64 - 1;
                assert!(
                    matches!(t.vector, 12..=14) && t.rip != hlt,
                    "{at:#x}, program {n}: {} at {:#x}",
                    t.vector,
                    t.rip
                );
                assert!(t.rip >= CODE + p.at, "{at:#x}, program {n}: {:#x}", t.rip);
            }
        }
    });
}

/// A program that begins low and goes on at the end of the lower half has a window still, or goes on without.
#[test]
fn programs_at_both_ends() {
    both(Start::Long, |bed| {
        let place = 0x7FFE_0000_0000 | 1 << 30;
        bed.put64(PDPT + (place >> 30 & 511) * 8, PD | pte::ALL);
        bed.put64(PML4 + (place >> 39) * 8, PDPT | pte::ALL);
        bed.flush();
        for turn in 1..4 {
            start(bed);
            bed.cpu.gpr[9] = place;
            bed.run(&program!(64: "mov ecx, 100", "2: inc qword ptr [rsi]", "add [r9 + rsi], rcx", "mov rax, rsp", "lea rsp, [r9 + rsp]",
                "push rcx", "pop rdx", "mov rsp, rax", "dec ecx", "jnz 2b", "int 0x50"));
            assert_eq!(bed.get64(DATA), turn * (100 + 5050));
        }
    });
}

/// As many pages as there are, over and over, with regions that come late.
#[test]
fn all_pages_by_turns() {
    let mut bed = open();
    for page in 0..0x700 {
        bed.put64(DATA + page * 4096, page);
    }
    let p = program!(64: "mov ecx, 0x700", "xor eax, eax", "mov rdx, rsi", "2: add rax, [rdx]", "mov [rdx + 8], rcx", "add rdx, 0x1000", "dec ecx",
        "jnz 2b");
    for _ in 0..3 {
        run(&mut bed, &p);
        assert_eq!(bed.cpu.gpr[gpr::RAX], 0x700 * 0x6FF / 2);
        bed.flush();
    }
    let last = DATA + 0x6FF * 4096;
    assert_eq!((bed.get64(DATA + 8), bed.get64(last + 8)), (0x700, 1));
    assert!(bed.counter("window_comparisons") >= Some(2));
}

/// Where programs have global pages there are no windows: what is known of their code outlives a switch to a space whose window does
/// not have its region.
#[test]
fn global_pages_of_programs() {
    let mut bed = open();
    let p = program!(64: "mov ecx, 10", "2: inc qword ptr [rsi]", "dec ecx", "jnz 2b");
    start(&mut bed);
    bed.map(CODE, CODE, pte::ALL | pte::G);
    bed.cpu.cr4 |= cr4::PGE;
    bed.flush();
    bed.run(&p);
    assert_eq!(bed.get64(DATA), 10);
    bed.map(CODE, CODE, pte::ALL);
    bed.flush();
    let before = ["windows_opened", "window_faults"].map(|name| bed.counter(name));
    run(&mut bed, &program!(64: "mov ecx, 10", "2: inc qword ptr [rsi + 0x5000]", "dec ecx", "jnz 2b"));
    assert_eq!(bed.get64(DATA + 0x5000), 10);
    assert_eq!(["windows_opened", "window_faults"].map(|name| bed.counter(name)), before);
}

/// The debugger's eyes see what programs do in windows: a watched page is never shown.
#[test]
fn watched_bytes() {
    let mut bed = open();
    let p = program!(64: "mov ecx, 10", "2: mov [rsi], rcx", "dec ecx", "jnz 2b", "mov [rsi + 0x20], rcx");
    run(&mut bed, &p);
    let watch = Watchpoint { space: Space::Linear, first: DATA + 0x20, len: 8, kind: WatchKind::Write };
    bed.arm(DebugPlan { watch: [watch].into(), ..DebugPlan::default() });
    start(&mut bed);
    bed.load(&p);
    assert!(matches!(bed.go(), Exit::Debug(DebugStop::Watch(_))));
    assert_eq!(bed.cpu.rip, CODE + p.bytes.len() as u64 - 1);
}

/// 32-bit programs have windows without a check: addresses wrap at 4 GiB, where nothing else is, and what crosses the end is the
/// interpreter's.
#[test]
fn the_end_of_32_bit_addresses() {
    both(Start::Compat, |bed| {
        // The last 2 MiB below 4 GiB are the second 2 MiB.
        const FREE: u64 = MAPPED;
        const FIRST: u64 = 0x60_0000;
        let (last, low) = (0xFFFF_F000, 0x20_0000 + 0x1F_F000);
        bed.put64(PDPT + 3 * 8, FREE | pte::ALL);
        bed.put64(FREE + 511 * 8, (PT + 4096) | pte::ALL);
        bed.map(0, FIRST, pte::ALL);
        bed.flush();
        for turn in 0..3u32 {
            bed.reset();
            bed.user();
            bed.put32(low + 0xFF8, 7);
            bed.put32(low + 0xFFC, 0x1122_3344);
            bed.put64(FIRST, 0x99AA_BBCC_DDEE_FF00 + u64::from(turn));
            let g = &mut bed.cpu.gpr;
            (g[gpr::RSI], g[gpr::RDI], g[gpr::RBX], g[gpr::RCX]) =
                (last + 0xFFC, 0x8000_0001, 8, 0x4000_0000);
            bed.run(&program!(32: "mov eax, [esi + ebx - 4]", "mov edx, [edi + ecx * 2 - 5]", "add dword ptr [esi - 4], 5",
                "mov ebp, [esi + ebx * 4 - 32]",  "mov [esi + 10], cx", "mov esp, esi", "push edx", "xor esp, esp", "push ebp",
                "add esp, 8", "push eax", "mov esp, 4", "pop ecx"));
            let t = bed.taken();
            assert_eq!(t.vector, 13, "HLT at CPL 3; CR2 {:#x} at {:#x}", bed.cpu.cr2, t.rip);
            let g = bed.cpu.gpr;
            assert_eq!(g[gpr::RAX], u64::from(0xDDEE_FF00 + turn));
            assert_eq!(g[gpr::RDX], 0x1122_3344);
            assert_eq!(g[gpr::RBP], 0x1122_3344);
            assert_eq!((bed.get32(low + 0xFF8), bed.get32(low + 0xFFC)), (0x1122_3344, 0x1122_3344));
            assert_eq!(bed.get64(FIRST), 0xBBCC_DDEE_FF00 + u64::from(turn));
            assert_eq!(g[gpr::RCX], 0xBBCC);
            // What lies on both sides of the end is outside the segment.
            bed.reset();
            bed.user();
            bed.cpu.gpr[gpr::RSI] = last + 0xFFC;
            let p = program!(32: "mov edx, [esi]"; "mov edx, [esi + 2]");
            bed.run(&p);
            let t = bed.taken();
            assert_eq!((t.vector, t.rip, bed.cpu.gpr[gpr::RDX]), (13, CODE + p.at, 0x1122_3344));
        }
        if bed.kind == Kind::Windows {
            assert_eq!(bed.counter("windows_opened"), Some(1));
        }
    });
}

/// Where programs are 32-bit code: under each kind of page tables.
const MODES_32: [Start; 3] = [Start::Compat, Start::Pae, Start::Paged32];

/// Faults of 32-bit code that has nothing checked: at the instruction, with registers and flags as before it.
#[test]
fn wild_addresses_of_32_bit_code() {
    let programs = [
        program!(32: "cmp eax, ebx"; "mov edx, [edi]", "setc cl"),
        program!(32: "add eax, ebx"; "mov [edi], edx", "adc ecx, 0"),
        program!(32: "sub eax, ebx"; "movups xmm0, [edi + ebp]", "setz cl"),
        program!(32: "cmp eax, ebx"; "lock xadd [edi], edx", "setc cl"),
        program!(32: "cmp eax, ebx"; "xchg ah, [edi]", "setz cl"),
        program!(32: "cmp eax, ebx", "mov esp, edi"; "pop edx", "setz cl"),
    ];
    for start in MODES_32 {
        both(start, |bed| {
            for at in [0x10u32, 0x2000_0000, 0x7FFF_FFF8, 0xC000_0000, 0xFFFF_FFF0] {
                for (n, p) in programs.iter().enumerate() {
                    bed.reset();
                    bed.user();
                    bed.map(0, 0, 0);
                    bed.flush();
                    let g = &mut bed.cpu.gpr;
                    (g[gpr::RDI], g[gpr::RAX], g[gpr::RBX], g[gpr::RDX], g[gpr::RBP]) =
                        (u64::from(at), 0x8765_4321, 0x1234_5678, 9, 0);
                    bed.run(p);
                    let t = bed.taken();
                    assert_eq!(
                        (t.vector, t.rip, bed.cpu.cr2),
                        (14, CODE + p.at, u64::from(at)),
                        "program {n}"
                    );
                    let g = bed.cpu.gpr;
                    let rax = [0x8765_4321, 0x9999_9999, 0x7530_ECA9][match n {
                        1 => 1,
                        2 => 2,
                        _ => 0,
                    }];
                    assert_eq!(
                        (g[gpr::RAX], g[gpr::RDX], t.flags & flags::CF),
                        (rax, 9, 0),
                        "{at:#x}, program {n}"
                    );
                    bed.map(0, 0, pte::ALL);
                }
            }
        });
    }
}

/// Pages of 32-bit programs that are mapped elsewhere, by INVLPG and by MOV to CR3.
#[test]
fn pages_of_32_bit_programs_that_are_mapped_elsewhere() {
    for start in MODES_32 {
        let wide = [
            program!(64: "mov [rdi], ebx", "invlpg [rsi]", "iretq"),
            program!(64: "mov [rdi], ebx", "mov rax, cr3", "mov cr3, rax", "iretq"),
        ];
        let narrow = [
            program!(32: "mov [edi], ebx", "invlpg [esi]", "iretd"),
            program!(32: "mov [edi], ebx", "mov eax, cr3", "mov cr3, eax", "iretd"),
        ];
        for kernel in if start == Start::Compat { wide } else { narrow } {
            both(start, |bed| {
                service(bed, &kernel);
                for page in 0..8 {
                    bed.put64(DATA + 0x10_0000 + page * 4096, 100 + page);
                }
                bed.reset();
                bed.user();
                bed.cpu.gpr[gpr::RSI] = DATA;
                bed.cpu.gpr[gpr::RDI] = bed.pte_at(DATA);
                bed.run(
                    &program!(32: "lea ebx, [esi + 0x100067]", "xor ebp, ebp", "mov ecx, 8", "2: int 0x40", "add ebp, [esi]",
                    "mov [esi + 8], ecx", "add ebx, 0x1000", "dec ecx", "jnz 2b"),
                );
                assert_eq!((bed.taken().vector, bed.cpu.gpr[gpr::RBP]), (13, (100..108).sum::<u64>()));
                let written: Vec<u64> =
                    (0..8).map(|page| bed.get64(DATA + 0x10_0008 + page * 4096)).collect();
                assert_eq!(written, [8, 7, 6, 5, 4, 3, 2, 1]);
                if bed.kind == Kind::Windows {
                    assert_eq!(bed.counter("windows_opened"), Some(1));
                }
            });
        }
    }
}

/// Where paging ends, so does what page tables showed.
#[test]
fn programs_without_page_tables() {
    for start in [Start::Pae, Start::Paged32] {
        both(start, |bed| {
            bed.put32(DATA, 1);
            bed.put32(DATA + 0x10_0000, 2);
            bed.map(DATA, DATA + 0x10_0000, pte::ALL);
            let p = program!(32: "mov eax, [esi]", "add eax, [esi]", "mov [esi + 4], eax");
            for (paging, at) in [(true, DATA + 0x10_0000), (false, DATA), (true, DATA + 0x10_0000)] {
                bed.reset();
                bed.user();
                bed.cpu.gpr[gpr::RSI] = DATA;
                if !paging {
                    bed.cpu.cr0 &= !cr0::PG;
                }
                bed.flush();
                bed.run(&p);
                assert_eq!((bed.taken().vector, bed.get32(at + 4)), (13, 2 * bed.get32(at)), "{paging}");
                bed.put32(at + 4, 0);
            }
        });
    }
}

/// Programs of both sizes of code in one address space: one of the two has a window.
#[test]
fn programs_that_change_size() {
    for start in [Start::Compat, Start::Long] {
        both(start, |bed| {
            for turn in 1..4 {
                bed.reset();
                bed.user();
                bed.cpu.gpr[gpr::RSI] = DATA;
                let bytes = [NARROW, WIDE, NARROW, WIDE, NARROW];
                let p = match start {
                    Start::Compat => &bytes[..],
                    _ => &bytes[1..],
                };
                let p = [&p.concat()[..], &[0xF4]].concat();
                bed.run(&Program { bytes: p.leak(), at: 0 });
                assert_eq!(bed.taken().vector, 13, "CR2 {:#x}", bed.cpu.cr2);
                let narrow = if start == Start::Compat { 3 } else { 2 };
                assert_eq!(bed.get64(DATA), turn * (100 * narrow + 7 * 100 * 2), "{start:?}");
            }
            if bed.kind == Kind::Windows {
                assert_eq!(bed.counter("windows_opened"), Some(1));
            }
        });
    }
}

/// mov ecx, 100; 2: inc dword ptr [esi]; push ecx; pop edx; dec ecx; jnz 2b; call 3f; 3: pop eax; add eax, 8; push USER_CODE64; push eax; retf
const NARROW: &[u8] = &[
    0xB9,
    100,
    0,
    0,
    0,
    0xFF,
    0x06,
    0x51,
    0x5A,
    0x49,
    0x75,
    0xF9,
    0xE8,
    0,
    0,
    0,
    0,
    0x58,
    0x83,
    0xC0,
    8,
    0x6A,
    sel::USER_CODE64 as u8,
    0x50,
    0xCB,
];

/// mov ecx, 100; 2: add qword ptr [rsi], 7; push rcx; pop rdx; dec ecx; jnz 2b; lea rax, [rip + 5]; push USER_CODE32; push rax; retfq
const WIDE: &[u8] = &[
    0xB9,
    100,
    0,
    0,
    0,
    0x48,
    0x83,
    0x06,
    7,
    0x51,
    0x5A,
    0xFF,
    0xC9,
    0x75,
    0xF6,
    0x48,
    0x8D,
    0x05,
    5,
    0,
    0,
    0,
    0x6A,
    sel::USER_CODE32 as u8,
    0x50,
    0x48,
    0xCB,
];

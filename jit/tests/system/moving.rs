//! Programs at other linear addresses, one after the other and by turns, on the same pages (under address-space
//! randomization each run of a program is elsewhere): whatever counts from RIP counts from the new one, and little is
//! translated again.

use crate::bed::{
    Bed, CODE, DATA, HANDLERS, Kind, PD, PDPT, PML4, Program, SPARE, Start, USER_STACK, both, pte,
};
use crate::wild::Random;
use paravane_cpu::{Exit, cr4, flags, gpr};
use std::time::Duration;

/// Where programs are among the first pages: the first turns of a loop are on one page, the last on the next.
pub const AT: u64 = CODE + 0xF40;
/// Linear addresses at which the first GiB is seen again, one at a time.
pub const PLACES: [u64; 8] = [
    1 << 32,
    2 << 32,
    5 << 39 | 7 << 32,
    6 << 39,
    0x55 << 40,
    0x7F00 << 32,
    0x7FFE << 32,
    0x7FFE << 32 | 1 << 30,
];

/// The first GiB is seen again at `place`, and no more anywhere else.
pub fn only_at(bed: &mut Bed, place: u64) {
    for n in 1..512 {
        bed.put64(PDPT + n * 8, 0);
        bed.put64(PML4 + n * 8, 0);
    }
    bed.put64(PDPT + (place >> 30 & 511) * 8, PD | pte::ALL);
    bed.put64(PML4 + (place >> 39) * 8, PDPT | pte::ALL);
    bed.flush();
}

fn set_up(bed: &mut Bed) {
    bed.cpu.msr.star = 0x0023_0010 << 32;
    bed.cpu.msr.lstar = CODE + 0x4000;
    bed.cpu.msr.sfmask = flags::IF;
    bed.put(CODE + 0x4000, program!(64: "add rax, 3", "sysretq").bytes);
    bed.flush();
}

/// Starts the program at [`AT`] of `place`, at CPL 3.
fn start(bed: &mut Bed, place: u64) {
    let msr = bed.cpu.msr.clone();
    bed.reset();
    bed.cpu.msr = msr;
    only_at(bed, place);
    bed.user();
    bed.cpu.gpr[gpr::RSI] = DATA;
    bed.cpu.rip = place + AT;
}

/// Runs it to the instruction that faults, at `at` of the program.
fn run(bed: &mut Bed, place: u64, vector: u64, at: u64) {
    start(bed, place);
    assert_eq!(bed.go(), Exit::Halt);
    let t = bed.taken();
    assert_eq!((t.vector, t.rip), (vector, place + AT + at), "at {place:#x}");
}

/// Runs `program` to its HLT.
fn run_through(bed: &mut Bed, place: u64, program: &Program) {
    run(bed, place, 13, program.bytes.len() as u64 - 1);
}

/// Blocks translated, blocks moved, and traces. Not with windows: there is one in a process for programs that lie low and high, as
/// these do, so that other tests decide which blocks are made.
fn counters(bed: &Bed) -> Option<[u64; 3]> {
    let of = |name| bed.counter(name);
    if bed.kind == Kind::Windows {
        return None;
    }
    Some([of("blocks_translated")?, of("blocks_rebased")?, of("traces")?])
}

/// A loop on two pages with calls, jumps and system calls, that leaves in RAX and [RIP + …] what depends on where it is.
fn walk() -> Program {
    program!(64: "xor eax, eax", "mov ebx, 40", "2: lea rdx, [rip + 2b]", "add rax, rdx", "lea rdx, [eip + 2b]", "add rax, rdx", "call 5f", "syscall",
        "add [rip + 770b + 0x1000C0], rcx", "mov rdi, [rip + 770b + 0x1000C0]", "lea r9, [rip + 3f]", "jmp r9",
        ".skip 100, 0xCC",
        "3: .skip 50, 0x90", "dec ebx", "jz 4f", "jmp 2b", "5: mov rdx, [rsp]", "add rax, rdx", "test ebx, 1", "jz 6f", "call 7f", "6: ret",
        "7: add qword ptr [rip + 770b + 0x1000C8], 5", "ret", "4: nop")
}

/// What [`walk`] leaves in RAX, and the word that it adds to: less what they are at the first place, if all is right.
fn walked(bed: &Bed) -> [u64; 3] {
    [bed.cpu.gpr[gpr::RAX], bed.get64(AT + 0x1000C0), bed.get64(AT + 0x1000C8)]
}

fn clear(bed: &Bed) {
    bed.put(AT + 0x1000C0, &[0; 16]);
}

#[test]
fn one_after_another() {
    both(Start::Long, |bed| {
        set_up(bed);
        let p = walk();
        bed.put(AT, p.bytes);
        run_through(bed, 0, &p);
        let first = walked(bed);
        let mut translated = None;
        for (n, place) in PLACES.into_iter().enumerate() {
            clear(bed);
            let before = counters(bed);
            run_through(bed, place, &p);
            again_without_exits(bed, place);
            // RAX: 40 times the address of label 2 and its lower half, and 40 return addresses; then 40 times RCX of SYSCALL.
            let in_rax = 80 * place + 40 * (place & 0xFFFF_FFFF);
            let moved = [first[0].wrapping_add(in_rax), first[1].wrapping_add(40 * place), first[2]];
            assert_eq!(walked(bed), moved, "at {place:#x}");
            let (Some(before), Some(after)) = (before, counters(bed)) else { continue };
            match translated {
                // Low programs do not move.
                None => translated = Some(after[0] - before[0]),
                Some(_) => assert_eq!(after[0], before[0], "place {n}: {before:?} {after:?}"),
            }
            assert!(
                n == 0 || after[1] >= before[1] + translated.unwrap_or(0),
                "place {n}: {before:?} {after:?}"
            );
            assert!(n == 0 || after[2] == before[2], "traces move, too");
        }
    });
}

/// Once more, and nothing was forgotten: jumps from page to page stay chained.
fn again_without_exits(bed: &mut Bed, place: u64) {
    if counters(bed).is_none() {
        return;
    }
    clear(bed);
    let exits = bed.counter("link_exits");
    bed.user();
    bed.cpu.rip = place + AT;
    bed.go();
    assert_eq!(bed.counter("link_exits"), exits, "at {place:#x}");
}

/// Nothing moves any more after a while, and nothing is translated.
#[test]
fn by_turns() {
    for places in 2..=PLACES.len() {
        both(Start::Long, |bed| {
            set_up(bed);
            let p = walk();
            bed.put(AT, p.bytes);
            let mut last = None;
            for round in 0..20 {
                for place in &PLACES[..places] {
                    run_through(bed, *place, &p);
                }
                let now = counters(bed);
                assert!(round < 15 || last == now, "{places} places, round {round}: {last:?} {now:?}");
                last = now;
            }
        });
    }
}

/// All places are there at once, with one page of code at one and the next at another: no jump leads from here to there.
#[test]
fn at_once() {
    let p = program!(64: "lea rax, [rip + 770b]", "jmp 2f", "3: lea rbx, [rip + 770b]", "inc ecx", "jz 4f", "stc", "jc 5f",
        ".skip 0xC0 - (. - 770b), 0x90"; "2: lea rdx, [rip + 770b]", "test ecx, ecx", "js 3b", "hlt",
        "4: lea rdi, [rip + 770b]", "call 3b", "5: lea rbp, [rip + 770b]", "pop r9");
    const REGISTERS: [usize; 5] = [gpr::RAX, gpr::RBX, gpr::RDX, gpr::RDI, gpr::RBP];
    both(Start::Long, |bed| {
        set_up(bed);
        for n in 1..512 {
            bed.put64(PDPT + n * 8, PD | pte::ALL);
            bed.put64(PML4 + n * 8, PDPT | pte::ALL);
        }
        bed.flush();
        let mut random = Random(1);
        for n in 0..400 {
            if n % 40 == 0 {
                // Nothing is known of the pages any more.
                bed.put(AT, p.bytes);
            }
            let place = random.of(&PLACES);
            // From the first page to both, or on the second only.
            let whole = n % 40 < 8 || random.below(2) == 0;
            bed.reset();
            bed.user();
            bed.cpu.gpr[gpr::RCX] = if whole { u64::MAX } else { 0 };
            bed.cpu.rip = place + AT + if whole { 0 } else { p.at };
            bed.go();
            assert_eq!(bed.taken().vector, 13);
            let seen = if whole { &REGISTERS[..] } else { &REGISTERS[2..3] };
            for &r in seen {
                assert_eq!(bed.cpu.gpr[r], place + AT, "run {n}, whole: {whole}, register {r}");
            }
        }
    });
}

/// The frames of faults, of every kind of way out of translated code.
#[test]
fn faults() {
    let programs = [
        (14, program!(64: "mov ecx, 7", "2: dec ecx", "jnz 2b"; "mov rax, [0x7FFFFFF0]")),
        (14, program!(64: "clc"; "adc [rip + 770b + 0x7F000000], rax")),
        (
            14,
            program!(64: "mov rbx, [rip + 770b + 0x100080]", "add rbx, [rip + 770b + 0x100088]", "mov edi, 0x7FFFF000"; "stosq"),
        ),
        (14, program!(64: "mov edi, 0x7FFFF000", "mov ecx, 9"; "rep stosb")),
        (14, program!(64: "mov esp, 0x7FFFF000"; "push rax")),
        (14, program!(64: "mov esp, 0x7FFFF000"; "call 2f", "2: nop")),
        (14, program!(64: "mov esp, 0x7FFFF000"; "ret")),
        (
            13,
            program!(64: "mov rax, [rip + 770b + 0x1000BD]", "mov rax, [rip + 770b + 0x1000FD]"; "movaps xmm0, [rip + 770b + 0x1000C1]"),
        ),
        (13, program!(64: "bts rbx, 63", "btr rbx, 62"; "mov rax, [rbx]")),
        (13, program!(64: "bts rbx, 63", "btr rbx, 62", "cmp rax, rbx"; "jmp rbx")),
        (13, program!(64: "nop"; "cli")),
        (6, program!(64: "nop"; "ud2")),
        (0, program!(64: "xor ecx, ecx", "xor edx, edx"; "div ecx")),
        (3, program!(64: "cpuid", "mov eax, 5", "nop"; "int3")),
    ];
    both(Start::Long, |bed| {
        set_up(bed);
        bed.gate(3, 14, 3, HANDLERS + 0x30);
        for (vector, p) in &programs {
            bed.put(AT, p.bytes);
            for place in PLACES {
                // A trap's frame shows what follows.
                run(bed, place, *vector, p.at + u64::from(*vector == 3));
            }
        }
        let moved = counters(bed).map(|[_, moved, _]| moved);
        assert!(moved.is_none_or(|moved| moved >= programs.len() as u64 * 7), "{moved:?}");
    });
}

#[test]
fn stopped_in_a_loop() {
    both(Start::Long, |bed| {
        set_up(bed);
        let p = program!(64: "2: inc rax", "jmp 2b");
        bed.put(AT, p.bytes);
        for place in PLACES {
            start(bed, place);
            assert_eq!(bed.run_for(Duration::from_millis(5), "stopped_in_a_loop"), Exit::Stop);
            assert!((place + AT..place + AT + 5).contains(&bed.cpu.rip), "{:#x}", bed.cpu.rip);
        }
    });
}

/// What is not at the address that a block was made for is found out at the next place.
#[test]
fn code_that_changes_between() {
    both(Start::Long, |bed| {
        set_up(bed);
        let p = walk();
        bed.put(AT, p.bytes);
        let body = p.bytes.iter().position(|&b| b == 0x90).expect("NOPs") as u64;
        for (n, place) in PLACES.into_iter().cycle().take(40).enumerate() {
            clear(bed);
            // ADD DWORD [RSI], n
            bed.put(AT + body + n as u64, &[0x83, 0x06, n as u8]);
            bed.put32(DATA, 0);
            run_through(bed, place, &p);
            assert_eq!((bed.get32(DATA), bed.get64(AT + 0x1000C8)), (40 * n as u32, 100), "{n}");
            bed.put(AT + body + n as u64, &[0x90; 3]);
        }
    });
}

/// An instruction on two pages, the second of which is another one at each place.
#[test]
fn instructions_on_two_pages() {
    both(Start::Long, |bed| {
        set_up(bed);
        let code = CODE + 0x5000;
        let second = |n: usize| CODE + 0x1_0000 + n as u64 * 0x1000;
        // MOV EAX, imm32 goes on with `n`, and HLT.
        bed.put(code + 0xFF0, &[0x90; 15]);
        bed.put(code + 0xFFF, &[0xB8]);
        for n in 0..PLACES.len() {
            bed.put(second(n), &[n as u8, 0, 0, 0, 0xF4]);
        }
        for _ in 0..3 {
            for (n, place) in PLACES.into_iter().enumerate() {
                bed.map(code + 0x1000, second(n / 2), pte::ALL);
                start(bed, place);
                bed.cpu.rip = place + code + 0xFF0;
                assert_eq!(bed.go(), Exit::Halt);
                let (t, rax) = (bed.taken(), bed.cpu.gpr[gpr::RAX]);
                assert_eq!((t.vector, t.rip, rax), (13, place + code + 0x1004, n as u64 / 2));
            }
        }
    });
}

/// Several linear pages in a row are one page, whose code goes from one to the next: where a jump leads wants the blocks that it
/// comes from.
#[test]
fn a_page_behind_itself() {
    let p = program!(64: "lea rax, [rip + 770b]", "add rbx, rax", "dec ecx", "jnz 770b + 0x1000");
    both(Start::Long, |bed| {
        set_up(bed);
        let code = CODE + 0x8000;
        for n in 0..8 {
            bed.map(code + n * 0x1000, code, pte::ALL);
        }
        bed.put(code, p.bytes);
        for place in PLACES {
            for _ in 0..2 {
                start(bed, place);
                bed.cpu.rip = place + code;
                (bed.cpu.gpr[gpr::RCX], bed.cpu.gpr[gpr::RBX]) = (8, 0);
                bed.go();
                assert_eq!(
                    (bed.taken().vector, bed.cpu.gpr[gpr::RBX]),
                    (13, 8 * (place + code) + 28 * 0x1000)
                );
            }
        }
    });
}

/// A routine is at another address in each of two address spaces that take turns, and a third comes now and then.
#[test]
fn address_spaces() {
    const LIST: u64 = DATA + 0x4000;
    both(Start::Long, |bed| {
        set_up(bed);
        bed.cpu.cr4 |= cr4::PCIDE;
        let root = |space: u64| SPARE + space * 0x1000;
        let places = [PLACES[2], PLACES[3], PLACES[4]];
        for space in 0..3 {
            bed.put64(root(space), PDPT | pte::ALL);
            let place = places[space as usize];
            bed.put64(root(space) + (place >> 39) * 8, PDPT | pte::ALL);
            bed.put64(PDPT + (place >> 30 & 511) * 8, PD | pte::ALL);
        }
        // Its parts are on two pages.
        let routine = program!(64: "lea rax, [rip]", "call 2f", "ret", ".skip 200, 0x90", "2: add qword ptr [rip + 770b + 0x1000C8], 5", "ret");
        bed.put(AT, routine.bytes);
        let (mut sum, mut visits) = (0u64, 0);
        for n in 0..120u64 {
            let space = if n % 13 == 5 { 2 } else { n & 1 };
            let place = places[space as usize];
            bed.put64(LIST + n * 16, root(space) | (space + 1) | 1 << 63);
            bed.put64(LIST + n * 16 + 8, place + AT);
            sum = sum.wrapping_add(place + AT + 7);
            visits += 1;
        }
        bed.gate(0x40, 14, 3, HANDLERS + 0x400);
        bed.put(
            HANDLERS + 0x400,
            program!(64: "mov rax, [rbx]", "mov cr3, rax", "add rbx, 16", "iretq").bytes,
        );
        bed.user();
        bed.cpu.gpr[gpr::RBX] = LIST;
        bed.cpu.gpr[gpr::RCX] = visits;
        bed.cpu.gpr[gpr::RSP] = USER_STACK;
        bed.run(&program!(64: "2: int 0x40", "call [rbx - 8]", "add r10, rax", "dec ecx", "jnz 2b"));
        assert_eq!((bed.taken().vector, bed.cpu.gpr[10], bed.get64(AT + 0x1000C8)), (13, sum, visits * 5));
        assert!(counters(bed).is_none_or(|c| c[1] > 0), "{:?}", counters(bed));
    });
}

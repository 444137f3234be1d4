//! Hot loops, which the translator makes traces of: every way out of one, faults in its middle, code that changes under it.
//! Expected values are those of the loops' arithmetic.

use crate::bed::{Bed, CODE, DATA, Program, Start, both, pte};
use paravane_cpu::{flags, gpr};

/// Turns of the loops here, far beyond where a loop is hot.
const TURNS: u32 = 60;

/// Runs `program` with `setting` as 32-bit words at [`DATA`]; the translator must make a trace.
fn run(bed: &mut Bed, program: &Program, setting: &[u32]) {
    let before = bed.counter("traces");
    for (n, word) in setting.iter().enumerate() {
        bed.put32(DATA + 4 * n as u64, *word);
    }
    bed.reset();
    bed.cpu.gpr[gpr::RSI] = DATA;
    bed.run(program);
    assert!(before.is_none() || bed.counter("traces") > before, "no trace was made");
}

/// Each branch leaves the usual path in one turn, at the end or in the middle, and comes back.
#[test]
fn every_side_exit() {
    let p = program!(64: "xor ecx, ecx", "xor eax, eax", "xor edx, edx",
        "2: inc ecx", "add eax, 1", "cmp ecx, [rsi]", "je 40f",
        "20: add eax, 2", "cmp [rsi + 4], ecx", "jne 3f", "add edx, 0x100", "pushfq", "pop r9",
        "3: add eax, 4", "cmp ecx, [rsi + 8]", "mov r15d, ecx", "je 12f",
        "22: adc eax, 8", "mov ebx, ecx", "sub ebx, [rsi + 12]", "jz 13f",
        "23: adc edx, 0", "mov r14, [rsi + 16]", "cmp r15, r14", "jae 24f", "inc r12d",
        "24: cmp ecx, 60", "jb 2b", "hlt",
        "40: setz r8b", "add edx, 0x10000", "jmp 20b",
        "12: pushfq", "pop r10", "add edx, 0x1000000", "cmp r15, r15", "jmp 22b",
        "13: mov r11d, ebx", "add edx, 0x10", "jmp 23b");
    const NEVER: u32 = 1_000;
    both(Start::Long, |bed| {
        for way in 0..5 {
            for turn in [1, 2, 7, 30, TURNS - 1, TURNS] {
                let mut setting = [NEVER, NEVER, NEVER, NEVER, 0, 0];
                setting[way] = turn;
                run(bed, &p, &setting);
                // CF before ADC EAX: ECX is below [RSI + 8]; before ADC EDX: below [RSI + 12].
                let below = |limit: u32| TURNS.min(limit.saturating_sub(1));
                let first = below(setting[2]);
                let carried_on = below(setting[3]);
                let away = match way {
                    0 => 0x1_0000,
                    1 => 0x100,
                    2 => 0x100_0000,
                    3 => 0x10,
                    _ => 0,
                };
                assert_eq!(bed.cpu.gpr[gpr::RAX], u64::from(TURNS * 15 + first), "way {way}, turn {turn}");
                assert_eq!(bed.cpu.gpr[gpr::RDX], u64::from(carried_on + away), "way {way}, turn {turn}");
                assert_eq!(bed.cpu.gpr[12], u64::from(below(setting[4])), "way {way}, turn {turn}");
                let equal = flags::ZF | flags::PF;
                match way {
                    0 => assert_eq!(bed.cpu.gpr[8], 1),
                    // ADD EDX replaced the flags of CMP: no carry, not zero.
                    1 => assert_eq!(bed.cpu.gpr[9] & (flags::ZF | flags::CF), 0),
                    2 => assert_eq!(bed.cpu.gpr[10] & flags::STATUS, equal),
                    _ => {}
                }
            }
        }
    });
}

/// An access runs into a page that is not there, or a divisor is zero, in some turn: the fault shows the registers of that turn.
#[test]
fn faults_in_the_middle() {
    let loops: [(Program, u64); 8] = [
        (
            program!(64: "2: inc ecx", "add eax, 3"; "add ebx, [rsi]", "add rsi, 64", "cmp ecx, 4000", "jb 2b"),
            14,
        ),
        (
            program!(64: "2: inc ecx", "add eax, 3"; "mov [rsi], ecx", "add rsi, 64", "cmp ecx, 4000", "jb 2b"),
            14,
        ),
        (
            program!(64: "2: inc ecx", "add eax, 3"; "add [rsi + 8], ecx", "add rsi, 64", "cmp ecx, 4000", "jb 2b"),
            14,
        ),
        (
            program!(64: "2: inc ecx", "add eax, 3", "cmp eax, 5"; "cmova rbx, [rsi]", "lea rsi, [rsi + 64]", "ja 3f", "nop", "3: cmp ecx, 4000", "jb 2b"),
            14,
        ),
        (
            program!(64: "2: inc ecx", "add eax, 3"; "movups xmm0, [rsi + 4]", "add rsi, 64", "cmp ecx, 4000", "jb 2b"),
            14,
        ),
        (
            program!(64: "2: inc ecx", "add eax, 3"; "fild qword ptr [rsi]", "fstp st(0)", "add rsi, 64", "cmp ecx, 4000", "jb 2b"),
            14,
        ),
        (
            program!(64: "2: inc ecx", "add eax, 3", "mov ebx, ecx", "and ebx, 1", "jz 3f", "nop", "3:"; "lock inc qword ptr [rsi + 16]", "add rsi, 64", "cmp ecx, 4000", "jb 2b"),
            14,
        ),
        (
            program!(64: "2: inc ecx", "add eax, 3", "mov r14, rax", "xor edx, edx", "mov ebx, 40", "sub ebx, ecx"; "div ebx", "mov rax, r14", "cmp ecx, 4000", "jb 2b"),
            0,
        ),
    ];
    both(Start::Long, |bed| {
        for (number, (program, vector)) in loops.iter().enumerate() {
            for turns in [3, 40, 41] {
                let page = DATA + 0x1_0000;
                bed.map(page, page, 0);
                bed.flush();
                bed.reset();
                bed.cpu.gpr[gpr::RCX] = 0;
                bed.cpu.gpr[gpr::RAX] = 0;
                bed.cpu.gpr[gpr::RSI] = page - 64 * (turns - 1);
                let before = bed.counter("traces");
                bed.run(program);
                let taken = bed.taken();
                assert_eq!((taken.vector, taken.rip), (*vector, CODE + program.at), "loop {number}");
                let turn = if *vector == 0 { 40 } else { turns };
                assert_eq!(bed.cpu.gpr[gpr::RCX], turn, "loop {number}");
                assert_eq!(bed.cpu.gpr[gpr::RAX], 3 * turn, "loop {number}");
                if *vector == 14 {
                    assert_eq!(bed.cpu.cr2 & !0xFFF, page, "loop {number}");
                    assert_eq!(bed.cpu.gpr[gpr::RSI], page, "loop {number}");
                }
                assert!(
                    turn < 10 || before.is_none() || bed.counter("traces") > before,
                    "no trace in loop {number}"
                );
                // The page comes back, and so does the loop.
                if *vector == 14 {
                    bed.map(page, page, pte::ALL);
                    bed.cpu.rip = taken.rip;
                    bed.cpu.gpr[gpr::RSP] = taken.sp;
                    bed.cpu.rflags = taken.flags;
                    bed.go();
                    let at_end = CODE + program.bytes.len() as u64;
                    assert_eq!((bed.cpu.rip, bed.cpu.gpr[gpr::RCX]), (at_end, 4_000), "loop {number}");
                    assert_eq!(bed.cpu.gpr[gpr::RAX], 12_000, "loop {number}");
                }
            }
        }
    });
}

/// In one turn the loop changes an instruction of its own: one that comes, one that was, or its first; or the way back.
#[test]
fn loops_that_change_themselves() {
    // R8 is where each turn stores R9: nowhere that matters, and in turn [RSI] the immediate of label 4 to 6.
    let changed = [
        program!(64: "lea r10, [rip + 4f + 1]", "lea r8, [rsi + 64]", "xor ecx, ecx", "xor eax, eax", "mov r9d, 7",
            "2: inc ecx", "cmp ecx, [rsi]", "cmove r8, r10", "mov [r8], r9d", "4: mov edx, 1", "add eax, edx",
            "lea r8, [rsi + 64]", "cmp ecx, 60", "jb 2b"),
        program!(64: "lea r10, [rip + 4f + 1]", "lea r8, [rsi + 64]", "xor ecx, ecx", "xor eax, eax", "mov r9d, 7",
            "2: inc ecx", "4: mov edx, 1", "add eax, edx", "cmp ecx, [rsi]", "cmove r8, r10", "mov [r8], r9d",
            "lea r8, [rsi + 64]", "cmp ecx, 60", "jb 2b"),
        program!(64: "lea r10, [rip + 4f + 1]", "lea r8, [rsi + 64]", "xor ecx, ecx", "xor eax, eax", "mov r9d, 7",
            "4: mov edx, 1", "inc ecx", "add eax, edx", "cmp ecx, [rsi]", "cmove r8, r10", "mov [r8], r9d",
            "lea r8, [rsi + 64]", "cmp ecx, 60", "jb 4b"),
    ];
    both(Start::Long, |bed| {
        for (number, program) in changed.iter().enumerate() {
            for turn in [1, 5, 30, TURNS] {
                run(bed, program, &[turn]);
                // From the turn on, or from the next.
                let sevens = TURNS - turn + u32::from(number == 0);
                let sum = TURNS - sevens + 7 * sevens;
                assert_eq!(bed.cpu.gpr[gpr::RAX], u64::from(sum), "loop {number}, turn {turn}");
            }
        }
    });
    // The jump back becomes two NOPs.
    let p = program!(64: "lea r10, [rip + 5f]", "lea r8, [rsi + 64]", "xor ecx, ecx",
        "2: inc ecx", "cmp ecx, [rsi]", "cmove r8, r10", "mov word ptr [r8], 0x9090", "lea r8, [rsi + 64]", "cmp ecx, 60", "5: jb 2b");
    both(Start::Long, |bed| {
        for turn in [1, 5, 30, TURNS] {
            if turn > 10 {
                run(bed, &p, &[turn]);
            } else {
                bed.put32(DATA, turn);
                bed.reset();
                bed.cpu.gpr[gpr::RSI] = DATA;
                bed.run(&p);
            }
            assert_eq!(bed.cpu.gpr[gpr::RCX], u64::from(turn));
        }
    });
}

/// An inner loop that becomes hot before the outer one, in 32-bit code too, with partial registers and flags over both.
#[test]
fn loops_in_loops() {
    let long = program!(64: "xor eax, eax", "mov ecx, 50", "xor ebx, ebx", "2: mov edx, 30", "clc", "3: adc eax, 1", "mov bl, dl", "add bh, bl", "dec edx", "jnz 3b",
        "dec ecx", "jnz 2b");
    let flat = program!(32: "xor eax, eax", "mov ecx, 50", "xor ebx, ebx", "2: mov edx, 30", "clc", "3: adc eax, 1", "mov bl, dl", "add bh, bl", "dec edx", "jnz 3b",
        "dec ecx", "jnz 2b");
    // BH is the sum of 30 to 1, 465, each turn; its carries go into EAX in the next inner turn, but for the last of a row.
    let (mut eax, mut bh) = (0u32, 0u8);
    for _ in 0..50 {
        let mut carry = false;
        for bl in (1..=30u8).rev() {
            eax += 1 + u32::from(carry);
            (bh, carry) = bh.overflowing_add(bl);
        }
    }
    for (start, p) in [(Start::Long, long), (Start::Protected, flat)] {
        both(start, |bed| {
            run(bed, &p, &[]);
            assert_eq!(bed.cpu.gpr[gpr::RAX], u64::from(eax));
            assert_eq!(bed.cpu.gpr[gpr::RBX], u64::from(bh) << 8 | 1);
        });
    }
}

/// A pass through an inner loop that happens to be its last says little: the trace comes back to its beginning, however
/// often the inner loop goes round before it ends.
#[test]
fn a_last_pass_makes_no_trace() {
    let p = program!(64: "xor eax, eax", "xor edx, edx", "3: mov ecx, [rsi]", "2: inc eax", "dec ecx", "jnz 2b",
        "inc edx", "cmp edx, 20", "jb 3b", "hlt");
    let head = CODE + 6;
    both(Start::Long, |bed| {
        for turns in 3..=9 {
            run(bed, &p, &[turns]);
            assert_eq!(bed.cpu.gpr[gpr::RAX], u64::from(turns * 20));
            let code = bed.host_code(head);
            let times = code.iter().filter(|c| c.guest == Some(head)).count();
            assert!(code.is_empty() || times > 1, "{turns} turns: {code:x?}");
        }
    });
}

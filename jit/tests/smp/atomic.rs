//! Locked instructions (SDM 3A, 8.1) of several processors on one operand: nothing is lost, whatever engine they run on.

use crate::bed::{Bed, CODE, DATA, I, Job, Kind, T};
use paravane_cpu::gpr;

const TIMES: u64 = 20_000;

/// All processors run `program` on the operand that RDI names, RCX times.
fn all_at(kinds: &[Kind], program: &[u8], rdi: u64) -> Bed {
    let mut bed = Bed::new(kinds);
    let jobs: Vec<Job> = (0..kinds.len() as u64)
        .map(|n| bed.job(CODE + n * 0x1000, program, &[(gpr::RCX, TIMES), (gpr::RDI, rdi), (gpr::RSI, n)]))
        .collect();
    bed.race(&jobs);
    bed
}

/// The sum that `program` builds in 32 bits at RDI, `add` each time, comes out right on every mixture of engines, at each
/// alignment: inside a cache line, over two, and over two pages.
fn counts(program: &[u8], add: u64) {
    for kinds in [&[T, T][..], &[T, I], &[I, I], &[T, I, T, I]] {
        for at in [DATA, DATA + 62, DATA + 0xFFE] {
            let bed = all_at(kinds, program, at);
            let expected = kinds.len() as u64 * TIMES * add;
            assert_eq!(u64::from(bed.get32(at)), expected, "{kinds:?} at {at:#x}");
        }
    }
}

#[test]
fn increments() {
    counts(racer!("2: lock inc dword ptr [rdi]", "dec ecx", "jnz 2b"), 1);
}

#[test]
fn increments_where_flags_live() {
    counts(racer!("2: stc", "lock inc dword ptr [rdi]", "adc eax, 0", "dec ecx", "jnz 2b"), 1);
}

#[test]
fn additions_that_return() {
    counts(racer!("2: mov eax, 3", "lock xadd [rdi], eax", "dec ecx", "jnz 2b"), 3);
}

#[test]
fn compared_exchanges() {
    counts(
        racer!(
            "2: mov eax, [rdi]",
            "3: lea ebx, [rax + 5]",
            "lock cmpxchg [rdi], ebx",
            "jnz 3b",
            "dec ecx",
            "jnz 2b"
        ),
        5,
    );
}

#[test]
fn exchanges_of_eight_bytes() {
    // A 64-bit counter by CMPXCHG8B.
    counts(
        racer!(
            "mov r8d, ecx",
            "2: mov eax, [rdi]",
            "mov edx, [rdi + 4]",
            "3: lea rbx, [rax + 1]",
            "mov ecx, edx",
            "lock cmpxchg8b [rdi]",
            "jnz 3b",
            "dec r8d",
            "jnz 2b"
        ),
        1,
    );
}

#[test]
fn exchanges_of_sixteen_bytes() {
    // Both halves count, or none does.
    let program = racer!(
        "mov r8d, ecx",
        "mov rax, [rdi]",
        "mov rdx, [rdi + 8]",
        "2: lea rbx, [rax + 1]",
        "lea rcx, [rdx + 2]",
        "lock cmpxchg16b [rdi]",
        "jnz 2b",
        "mov rax, [rdi]",
        "mov rdx, [rdi + 8]",
        "dec r8d",
        "jnz 2b"
    );
    for kinds in [[T, T], [T, I], [I, I]] {
        let bed = all_at(&kinds, program, DATA + 0x40);
        assert_eq!((bed.get64(DATA + 0x40), bed.get64(DATA + 0x48)), (2 * TIMES, 4 * TIMES), "{kinds:?}");
    }
}

#[test]
fn bit_locks() {
    // A lock by BTS and BTR around a sum that is no atomic.
    counts(
        racer!(
            "lea rbx, [rdi + 0x2000]",
            "mov edx, 37",
            "2: lock bts [rbx], rdx",
            "jnc 3f",
            "pause",
            "jmp 2b",
            "3: inc dword ptr [rdi]",
            "lock btr [rbx], edx",
            "jnc 4f",
            "dec ecx",
            "jnz 2b",
            "4:"
        ),
        1,
    );
}

#[test]
fn locks_by_exchange() {
    counts(
        racer!(
            "lea rbx, [rdi + 0x2000]",
            "2: mov eax, 1",
            "xchg [rbx], eax",
            "test eax, eax",
            "jz 3f",
            "pause",
            "jmp 2b",
            "3: add dword ptr [rdi], 2",
            "mov dword ptr [rbx], 0",
            "dec ecx",
            "jnz 2b"
        ),
        2,
    );
}

#[test]
fn every_size() {
    let program = racer!(
        "2: lock inc byte ptr [rdi]",
        "lock add word ptr [rdi + 0x101], 3",
        "lock add qword ptr [rdi + 0x201], 5",
        "lock sub qword ptr [rdi + 0xFFC], 1",
        "dec ecx",
        "jnz 2b"
    );
    for kinds in [[T, T], [T, I], [I, I]] {
        let bed = all_at(&kinds, program, DATA);
        let sums = [bed.get64(DATA) & 0xFF, bed.get64(DATA + 0x101) & 0xFFFF, bed.get64(DATA + 0x201)];
        assert_eq!(sums, [(2 * TIMES) & 0xFF, (6 * TIMES) & 0xFFFF, 10 * TIMES], "{kinds:?}");
        assert_eq!(bed.get64(DATA + 0xFFC), (2 * TIMES).wrapping_neg(), "{kinds:?}");
    }
}

/// Two pages that do not follow each other: locked accesses to the same operand exclude each other.
#[test]
fn operands_on_pages_that_lie_apart() {
    let program = racer!("2: lock add qword ptr [rdi], 0x1000003", "dec ecx", "jnz 2b");
    for kinds in [&[T, T][..], &[T, I], &[I, I], &[T, I, T, I]] {
        let mut bed = Bed::new(kinds);
        bed.map(DATA + 0x1000, DATA + 0x8000);
        let registers = [(gpr::RCX, TIMES), (gpr::RDI, DATA + 0xFFD)];
        let jobs: Vec<Job> =
            (0..kinds.len() as u64).map(|n| bed.job(CODE + n * 0x1000, program, &registers)).collect();
        bed.race(&jobs);
        let (low, high) = (bed.get32(DATA + 0xFFC) >> 8, bed.get64(DATA + 0x8000));
        let sum = u64::from(low) | high << 24;
        assert_eq!(sum, kinds.len() as u64 * TIMES * 0x100_0003, "{kinds:?}");
    }
}

/// A split access and an aligned one to a part of it (SDM 3A, 8.1.2.2).
#[test]
fn split_locks_are_seen_whole() {
    // One processor adds to the low half of what the others add to as a whole, without carries.
    let whole = racer!("mov rax, 0x100000000", "2: lock add [rdi - 4], rax", "dec ecx", "jnz 2b");
    let part = racer!("2: lock inc dword ptr [rdi - 4]", "dec ecx", "jnz 2b");
    for kinds in [[T, T], [I, T], [T, I], [I, I]] {
        for end in [DATA + 0x40, DATA + 0x1000] {
            let mut bed = Bed::new(&kinds);
            let registers = [(gpr::RCX, TIMES), (gpr::RDI, end)];
            let jobs = [bed.job(CODE, whole, &registers), bed.job(CODE + 0x1000, part, &registers)];
            bed.race(&jobs);
            assert_eq!(bed.get64(end - 4), TIMES << 32 | TIMES, "{kinds:?} at {end:#x}");
        }
    }
}

/// Aligned plain accesses are never seen in parts (SDM 3A, 8.1.1), not even the interpreter's.
#[test]
fn aligned_accesses_are_whole() {
    let write = racer!(
        "2: mov qword ptr [rdi], 0",
        "mov rax, -1",
        "mov [rdi], rax",
        "dec ecx",
        "jnz 2b",
        "mov qword ptr [rdi + 64], 1"
    );
    let read = racer!(
        "2: mov rax, [rdi]",
        "lea rdx, [rax + 1]",
        "cmp rdx, 1",
        "ja 3f",
        "cmp qword ptr [rdi + 64], 0",
        "jz 2b",
        "xor edx, edx",
        "3:"
    );
    for kinds in [[T, T], [I, T], [T, I], [I, I]] {
        let mut bed = Bed::new(&kinds);
        let registers = [(gpr::RCX, 10 * TIMES), (gpr::RDI, DATA)];
        let jobs = [bed.job(CODE, write, &registers), bed.job(CODE + 0x1000, read, &registers)];
        let ends = bed.race(&jobs);
        assert_eq!(ends[1].gpr[gpr::RDX], 0, "{kinds:?}: half of {:#x}", ends[1].gpr[gpr::RAX]);
    }
}

//! Memory ordering (SDM 3A, 8.2.3): each round two or four processors meet at a barrier, then access x and y, which lie in cache lines
//! of their own. What they read is looked at by the host.

use crate::bed::{self, Bed, CODE, DATA, I, Job, Kind, T};
use paravane_cpu::gpr;
use std::time::{Duration, Instant};

/// Rounds in one run of the guests.
const ROUNDS: u64 = 256;
const BARRIERS: u64 = DATA;
const CELLS: u64 = DATA + 0x10_0000;
const RESULTS: u64 = DATA + 0x20_0000;
/// Bytes between the results, and the code, of two processors.
const APART: u64 = 0x1_0000;

/// A processor's part: x is [r9], y [r9 + 64]; what it reads is left in EAX and EBX.
macro_rules! part {
    ($($line:literal),*) => {
        program!(
            "2: lock inc dword ptr [r8]", "meet [r8], ebp, jae",
            $($line,)*
            "mov [r10], eax", "mov [r10 + 4], ebx",
            "add r8, 64", "sub r9, -128", "add r10, 8", "dec ecx", "jnz 2b",
        )
    };
}

/// The same, without PAUSE at the barrier.
macro_rules! spinning {
    ($($line:literal),*) => {
        program!(
            "2: lock inc dword ptr [r8]", "3: cmp [r8], ebp", "jb 3b",
            $($line,)*
            "mov [r10], eax", "mov [r10 + 4], ebx",
            "add r8, 64", "sub r9, -128", "add r10, 8", "dec ecx", "jnz 2b",
        )
    };
}

/// What a processor read.
type Read = (u32, u32);

struct Litmus {
    bed: Bed,
    jobs: Vec<Job>,
}

impl Litmus {
    fn new(kinds: &[Kind], parts: &[&[u8]]) -> Litmus {
        let bed = Bed::new(kinds);
        let job = |(n, part): (usize, &&[u8])| {
            let n = n as u64;
            let registers = [
                (gpr::RCX, ROUNDS),
                (gpr::RBP, kinds.len() as u64),
                (8, BARRIERS),
                (9, CELLS),
                (10, RESULTS + n * APART),
            ];
            bed.job(CODE + n * APART, part, &registers)
        };
        let jobs = parts.iter().enumerate().map(job).collect();
        Litmus { bed, jobs }
    }

    /// Runs all rounds once; `see` gets what each processor read in a round.
    fn run(&mut self, mut see: impl FnMut(&[Read])) {
        self.bed.zero(BARRIERS, ROUNDS * 64);
        self.bed.zero(CELLS, ROUNDS * 128);
        self.bed.run(&self.jobs);
        for round in 0..ROUNDS {
            let at = |n: usize| RESULTS + n as u64 * APART + round * 8;
            let read = |n| (self.bed.get32(at(n)), self.bed.get32(at(n) + 4));
            see(&(0..self.jobs.len()).map(read).collect::<Vec<_>>());
        }
    }
}

const PAIRS: [[Kind; 2]; 4] = [[T, T], [T, I], [I, T], [I, I]];

/// `forbidden` is never seen, whoever plays the parts.
fn never(parts: [&[u8]; 2], forbidden: fn(Read, Read) -> bool) {
    for kinds in PAIRS {
        let mut litmus = Litmus::new(&kinds, &parts);
        bed::rounds(|| false, || litmus.run(|r| assert!(!forbidden(r[0], r[1]), "{kinds:?}: {r:?}")));
    }
}

#[test]
fn message_passing() {
    let write = part!("mov dword ptr [r9], 1", "mov dword ptr [r9 + 64], 1");
    let read = part!("mov eax, [r9 + 64]", "mov ebx, [r9]");
    never([write, read], |_, r| r == (1, 0));
}

#[test]
fn message_passing_from_where_flags_live() {
    // The fast path of accesses with live flags is another one.
    let write = part!("stc", "mov dword ptr [r9], 1", "mov dword ptr [r9 + 64], 1", "adc edx, 0");
    let read = part!("stc", "mov eax, [r9 + 64]", "mov ebx, [r9]", "adc edx, 0");
    never([write, read], |_, r| r == (1, 0));
}

#[test]
fn load_buffering() {
    let one = part!("mov eax, [r9]", "mov dword ptr [r9 + 64], 1");
    let other = part!("mov eax, [r9 + 64]", "mov dword ptr [r9], 1");
    never([one, other], |a, b| a.0 == 1 && b.0 == 1);
}

/// Both store, then load what the other stored, with something in between.
macro_rules! store_buffering {
    ($($between:literal),*) => {
        [
            part!("mov dword ptr [r9], 1", $($between,)* "mov eax, [r9 + 64]"),
            part!("mov dword ptr [r9 + 64], 1", $($between,)* "mov eax, [r9]"),
        ]
    };
}

fn neither_sees(a: Read, b: Read) -> bool {
    a.0 == 0 && b.0 == 0
}

/// What the processors may do to each other does happen: the rounds are close enough for the other tests to fail. Here nobody
/// gives its host processor away while it waits: on a busy host they would hardly ever meet.
#[test]
fn store_buffering_is_seen() {
    if std::thread::available_parallelism().is_ok_and(|n| n.get() < 2) {
        return;
    }
    let parts = [
        spinning!("mov dword ptr [r9], 1", "mov eax, [r9 + 64]"),
        spinning!("mov dword ptr [r9 + 64], 1", "mov eax, [r9]"),
    ];
    let mut litmus = Litmus::new(&[T, T], &parts);
    let (start, mut seen) = (Instant::now(), 0);
    while seen == 0 && start.elapsed() < Duration::from_secs(100) {
        litmus.run(|r| seen += u32::from(neither_sees(r[0], r[1])));
    }
    assert!(seen > 0);
}

#[test]
fn store_buffering_ends_at_a_fence() {
    never(store_buffering!("mfence"), neither_sees);
}

#[test]
fn store_buffering_ends_at_a_locked_instruction() {
    never(store_buffering!("lock or dword ptr [rsp], 0"), neither_sees);
}

#[test]
fn store_buffering_ends_at_a_serializing_instruction() {
    never(store_buffering!("push rcx", "xor eax, eax", "cpuid", "pop rcx"), neither_sees);
}

#[test]
fn exchanges_are_fences() {
    let parts = [
        part!("mov ebx, 1", "xchg [r9], ebx", "mov eax, [r9 + 64]"),
        part!("mov ebx, 1", "xchg [r9 + 64], ebx", "mov eax, [r9]"),
    ];
    never(parts, neither_sees);
}

#[test]
fn independent_reads_of_independent_writes() {
    let parts: [&[u8]; 4] = [
        part!("mov dword ptr [r9], 1"),
        part!("mov dword ptr [r9 + 64], 1"),
        part!("mov eax, [r9]", "mov ebx, [r9 + 64]"),
        part!("mov eax, [r9 + 64]", "mov ebx, [r9]"),
    ];
    for kinds in [[T, T, T, T], [I, T, T, I]] {
        let mut litmus = Litmus::new(&kinds, &parts);
        let forbidden = |r: &[Read]| r[2] == (1, 0) && r[3] == (1, 0);
        bed::rounds(|| false, || litmus.run(|r| assert!(!forbidden(r), "{kinds:?}: {r:?}")));
    }
}

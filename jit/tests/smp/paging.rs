//! Bits that processors set in memory on their own, while others write beside them: accessed and dirty bits of page-table entries
//! (SDM 3A, 4.8) and of descriptors (8.1.2.1) are set by locked accesses.

use crate::bed::{Bed, CODE, DATA, DESCRIPTORS, GDT, I, Kind, T};
use paravane_cpu::gpr;

/// Linear pages that the test may touch.
const PAGES: u64 = 1024;
const FIRST: u64 = 0x80_0000;

const PAIRS: [[Kind; 2]; 4] = [[T, T], [T, I], [I, T], [I, I]];

#[test]
fn accessed_and_dirty_bits_lose_nothing() {
    let touch = racer!("2: mov eax, [rdi]", "mov [rdi], ecx", "add rdi, 0x1000", "dec ecx", "jnz 2b");
    // A bit that belongs to software.
    let mark = racer!("2: lock or qword ptr [rsi], 0x200", "add rsi, 8", "dec ecx", "jnz 2b");
    for kinds in PAIRS {
        let mut bed = Bed::new(&kinds);
        for _ in 0..10 {
            for page in 0..PAGES {
                bed.map(FIRST + page * 0x1000, DATA);
            }
            let registers = [(gpr::RCX, PAGES), (gpr::RDI, FIRST), (gpr::RSI, Bed::pte(FIRST))];
            // Nothing is remembered of the entries before: CR3 is loaded.
            let flush = bed.job(CODE + 0x2000, program!("mov rax, cr3", "mov cr3, rax"), &[]);
            bed.run(&[flush.clone(), flush]);
            let jobs = [bed.job(CODE, touch, &registers), bed.job(CODE + 0x1000, mark, &registers)];
            bed.race(&jobs);
            for page in 0..PAGES {
                let entry = bed.get64(Bed::pte(FIRST + page * 0x1000));
                assert_eq!(entry, DATA | 0x267, "{kinds:?}: page {page}");
            }
        }
    }
}

#[test]
fn accessed_bits_of_descriptors_lose_nothing() {
    let load = racer!("2: mov es, edi", "add edi, 8", "dec ecx", "jnz 2b");
    // Read-only data becomes writable.
    let mark = racer!("2: lock or byte ptr [rsi + 5], 2", "add rsi, 8", "dec ecx", "jnz 2b");
    for kinds in PAIRS {
        let mut bed = Bed::new(&kinds);
        let count = DESCRIPTORS - 3;
        for _ in 0..5 {
            for n in 3..DESCRIPTORS {
                bed.put64(GDT + n * 8, 0x00CF_9000_0000_FFFF);
            }
            let registers = [(gpr::RCX, count), (gpr::RDI, 3 * 8), (gpr::RSI, GDT + 3 * 8)];
            let jobs = [bed.job(CODE, load, &registers), bed.job(CODE + 0x1000, mark, &registers)];
            bed.race(&jobs);
            for n in 3..DESCRIPTORS {
                assert_eq!(bed.get64(GDT + n * 8), 0x00CF_9300_0000_FFFF, "{kinds:?}: descriptor {n}");
            }
        }
    }
}

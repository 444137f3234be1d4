//! Indirect jumps whose targets share a place in the translator's jump cache, which they have where they are 1 MiB apart.

use crate::bed::{Bed, Start, both};
use paravane_cpu::{Exit, gpr};
use std::time::Duration;

const TARGETS: [u64; 2] = [0x14_0000, 0x24_0000];
const STARTS: [Start; 4] = [Start::Protected, Start::Paged32, Start::Compat, Start::Long];

/// RBX and RBP lead to `code`, at both targets.
fn targets(bed: &mut Bed, code: &[u8]) {
    for (at, register) in TARGETS.into_iter().zip([gpr::RBX, gpr::RBP]) {
        bed.put(at, code);
        bed.cpu.gpr[register] = at;
    }
}

#[test]
fn both_targets_are_found_without_leaving() {
    for start in STARTS {
        both(start, |bed| {
            let p64 = program!(64: "mov ecx, 1000", "2: call rbx", "call rbp", "dec ecx", "jnz 2b");
            let p32 = program!(32: "mov ecx, 1000", "2: call ebx", "call ebp", "dec ecx", "jnz 2b");
            let long = start == Start::Long;
            let (p, target) = if long {
                (p64, program!(64: "lea rax, [rax + 1]", "ret"))
            } else {
                (p32, program!(32: "lea eax, [eax + 1]", "ret"))
            };
            for round in 0..2 {
                bed.reset();
                targets(bed, target.bytes);
                bed.cpu.gpr[gpr::RAX] = 0;
                let before = bed.counter("indirect_exits");
                bed.finish(&p);
                assert_eq!(bed.cpu.gpr[gpr::RAX], 2000);
                let exits = before.and_then(|before| Some(bed.counter("indirect_exits")? - before));
                assert!(exits.is_none_or(|exits| exits < 20), "{start:?}, round {round}: {exits:?}");
            }
        });
    }
}

/// Each jump to either of them hears of what asks for attention: when they have the place by turns, and when a third one has it.
#[test]
fn two_targets_that_lead_to_each_other_can_be_stopped() {
    const THIRD: u64 = 0x34_0000;
    for start in STARTS {
        both(start, |bed| {
            let (to_and_fro, to_third, to_first) = if start == Start::Long {
                (program!(64: "xchg rbx, rbp", "jmp rbp"), program!(64: "jmp rsi"), program!(64: "jmp rbx"))
            } else {
                (program!(32: "xchg ebx, ebp", "jmp ebp"), program!(32: "jmp esi"), program!(32: "jmp ebx"))
            };
            bed.reset();
            targets(bed, to_and_fro.bytes);
            bed.put(THIRD, to_first.bytes);
            bed.cpu.gpr[gpr::RSI] = THIRD;
            bed.put(bed.code(), to_third.bytes);
            for at in [TARGETS[0], bed.code(), bed.code()] {
                bed.cpu.rip = at;
                assert_eq!(
                    bed.run_for(Duration::from_millis(20), "jumps to and fro"),
                    Exit::Stop,
                    "{start:?}"
                );
                assert!(TARGETS.contains(&(bed.cpu.rip & !15)), "{start:?} from {at:#x}: {:#x}", bed.cpu.rip);
            }
        });
    }
}

//! What is remembered of a shutdown (SDM 3A, 6.13 and table 6-5; interrupt 8).

use crate::bed::{CODE, DATA, IDT, Start, both, sel};
use paravane_cpu::{Attempt, DescriptorTable, Exit, Fault, LinAddr, Vector};

/// Vector, what it raised, and a word of why.
type Expected = (Fault, Fault, &'static str);

fn chain(attempts: &[Attempt], expected: &[Expected]) {
    assert_eq!(attempts.len(), expected.len(), "{attempts:x?}");
    for (a, (fault, second, why)) in attempts.iter().zip(expected) {
        assert_eq!((a.fault, a.second), (*fault, *second), "{attempts:x?}");
        assert!(a.failed.contains(why), "'{}' says nothing of '{why}'", a.failed);
    }
}

/// #GP for an IDT entry: vector x 8, IDT, EXT (SDM 3A, figure 6-7).
fn idt(vector: u32) -> Fault {
    Fault::with_code(Vector::GP, vector * 8 + 3)
}

#[test]
fn an_empty_idt() {
    both(Start::Long, |bed| {
        bed.cpu.idtr = DescriptorTable { base: IDT, limit: 0 };
        let p = program!(64: "jmp 2f", "hlt", "2: nop"; "ud2");
        bed.load(&p);
        assert_eq!(bed.go(), Exit::TripleFault);
        let history = bed.post_mortem();
        let double = Fault::with_code(Vector::DF, 0);
        chain(
            &history.attempts,
            &[(Fault::UD, idt(6), "limit"), (idt(6), idt(13), "limit"), (double, idt(8), "limit")],
        );
        assert!(history.attempts.iter().all(|a| a.rip == CODE + p.at));
        let trail: Vec<u64> = history.trail.iter().map(|visit| visit.at).collect();
        assert_eq!(trail.first(), Some(&CODE));
        assert!(trail.contains(&(CODE + p.at)) || trail.contains(&(CODE + 3)), "{trail:x?}");
    });
}

/// The third time through the same three blocks ends in the last of them: the way there is told block by block, by jumps that were taken
/// straight from one to the next before.
#[test]
fn the_way_through_blocks_that_are_chained() {
    both(Start::Long, |bed| {
        bed.cpu.idtr = DescriptorTable { base: IDT, limit: 0 };
        let p = program!(64:
            "mov ebx, 0x200000", "xor ecx, ecx",
            "2: call 4f", "3: inc ecx", "cmp ecx, 2", "jne 2b", "mov rbx, 0x0100000000000000", "jmp 2b",
            "4: jmp 5f", "nop",
            "5: jmp 6f", "nop",
            "6: nop"; "mov [rbx], cl", "ret");
        bed.load(&p);
        assert_eq!(bed.go(), Exit::TripleFault);
        let history = bed.post_mortem();
        // The last block begins with the NOP before the fault; the jumps have two bytes each, and a NOP behind.
        let last = CODE + p.at - 1;
        let way = [last - 6, last - 3, last];
        let named: Vec<u64> =
            history.trail.iter().map(|visit| visit.at).filter(|at| way.contains(at)).collect();
        assert_eq!(named.last_chunk(), Some(&way), "{:x?}", history.trail);
    });
}

#[test]
fn gates_that_are_not_present_lead_nowhere_or_to_no_stack() {
    both(Start::Long, |bed| {
        for vector in 0..32 {
            bed.put64(IDT + vector * 16, bed.get64(IDT + vector * 16) & !(1 << 47));
        }
        bed.gate(8, 14, 0, 0x4080);
        bed.gate(11, 14, 0, 0x40B0);
        bed.map(DATA, DATA, 0);
        bed.flush();
        let p = program!(64: "mov esp, 0x200100"; "ud2");
        bed.load(&p);
        assert_eq!(bed.go(), Exit::TripleFault);
        let page = |at| Fault::page(LinAddr(at), 2);
        let missing = |vector: u32| Fault::with_code(Vector::NP, vector * 8 + 3);
        let top = DATA + 0x100 - 8;
        let double = Fault::with_code(Vector::DF, 0);
        // #NP finds its handler, but no stack; #PF has no gate; #DF has no stack either.
        chain(
            &bed.post_mortem().attempts,
            &[
                (Fault::UD, missing(6), "not present"),
                (missing(6), page(top), "pushed"),
                (page(top), missing(14), "not present"),
                (double, page(top), "pushed"),
            ],
        );
    });
}

#[test]
fn a_gate_to_data_is_no_handler() {
    both(Start::Protected, |bed| {
        for vector in [6, 8, 13] {
            let at = IDT + vector * 8;
            bed.put64(at, bed.get64(at) & !0xFFFF_0000 | u64::from(sel::DATA) << 16);
        }
        bed.load(&program!(32: "ud2"));
        assert_eq!(bed.go(), Exit::TripleFault);
        let data = Fault::with_code(Vector::GP, u32::from(sel::DATA) | 1);
        let double = Fault::with_code(Vector::DF, 0);
        let why = "no code segment";
        chain(&bed.post_mortem().attempts, &[(Fault::UD, data, why), (data, data, why), (double, data, why)]);
    });
}

//! Cross-modifying code (SDM 3A, 8.1.3): one processor stores code and then a flag, another sees the flag, serializes, and runs what
//! was stored.

use crate::bed::{self, Bed, CODE, DATA, I, Job, Kind, T};
use paravane_cpu::{CpuState, gpr};

/// Handshakes in one run of the guests.
const TIMES: u64 = 100;
/// The routine `mov eax, number; ret`, on a page of its own.
const ROUTINE: u64 = DATA + 0x4000;
/// Cells of their own lines, on a page apart.
const FLAG: u64 = DATA + 0x8000;
const ACK: u64 = DATA + 0x8100;

const PAIRS: [[Kind; 2]; 4] = [[T, T], [T, I], [I, T], [I, I]];

/// Stores a number into the routine at RDI, tells it through the flag at R8, and waits for the answer at R9.
fn writer() -> &'static [u8] {
    program!("2: mov [rdi + 1], ecx", "mov [r8], ecx", "meet [r9], ecx, je", "dec ecx", "jnz 2b")
}

/// Waits for the flag, serializes, calls the routine at RSI, and answers; ends with what is left in EDI.
macro_rules! runner {
    ($($serialize:literal),*) => {
        program!(
            "mov edi, ecx", "2: meet [r8], edi, je",
            $($serialize,)*
            "call rsi", "cmp eax, edi", "jne 9f", "mov [r9], edi", "dec edi", "jnz 2b", "jmp 8f",
            // The other one waits for ever: let it go.
            "9: mov ecx, edi", "4: mov [r9], ecx", "pause", "dec ecx", "jns 4b", "8:"
        )
    };
}

fn by_cpuid() -> &'static [u8] {
    runner!("xor eax, eax", "cpuid")
}

fn put_routine(bed: &Bed, at: u64) {
    bed.put(at, &[0xB8, 0, 0, 0, 0, 0xC3]);
}

fn registers(write: u64, run: u64, flag: u64, ack: u64) -> [(usize, u64); 5] {
    [(gpr::RCX, TIMES), (gpr::RDI, write), (gpr::RSI, run), (8, flag), (9, ack)]
}

/// The runner saw every number.
fn assert_all_seen(kinds: &[Kind], runner: &CpuState) {
    let (left, got) = (runner.gpr[gpr::RDI], runner.gpr[gpr::RAX]);
    assert_eq!(left, 0, "{kinds:?}: {got:#x} in place of the number before");
}

/// A writer and a runner, for as long as time allows.
fn pass_code(kinds: [Kind; 2], runner: &[u8], write: u64, run: u64, ack: u64) -> Bed {
    let mut bed = Bed::new(&kinds);
    bed.map(0x80_0000, ROUTINE);
    put_routine(&bed, run);
    let registers = registers(write, run, FLAG, ack);
    let jobs = [bed.job(CODE, writer(), &registers), bed.job(CODE + 0x1000, runner, &registers)];
    bed::rounds(|| false, || assert_all_seen(&kinds, &bed.run(&jobs)[1]));
    bed
}

#[test]
fn stored_code_runs_after_a_serializing_instruction() {
    let by_iret = runner!(
        "mov rax, rsp",
        "push 0x10",
        "push rax",
        "pushfq",
        "push 8",
        "lea rax, [rip + 5f]",
        "push rax",
        "iretq",
        "5:"
    );
    let by_cr3 = runner!("mov rax, cr3", "mov cr3, rax");
    for runner in [by_cpuid(), by_iret, by_cr3] {
        for kinds in PAIRS {
            pass_code(kinds, runner, ROUTINE, ROUTINE, ACK);
        }
    }
}

#[test]
fn through_another_linear_address() {
    for kinds in PAIRS {
        pass_code(kinds, by_cpuid(), 0x80_0000, ROUTINE, ACK);
    }
}

/// The page of the routine also holds a cell that both write all the time.
#[test]
fn code_beside_data() {
    for kinds in PAIRS {
        pass_code(kinds, by_cpuid(), ROUTINE, ROUTINE, ROUTINE + 0x800);
    }
}

#[test]
fn a_routine_on_two_pages() {
    for kinds in PAIRS {
        pass_code(kinds, by_cpuid(), DATA + 0x4FFE, DATA + 0x4FFE, ACK);
    }
}

/// Two that store into each other's code at the same time: nobody waits for ever.
#[test]
fn each_stores_what_the_other_runs() {
    // Writes the routine at RDI for the other, tells it (R8), waits to be told (R9), serializes, runs the one at RSI.
    let both = program!(
        "mov ebp, ecx",
        "2: mov [rdi + 1], ebp",
        "mov [r8], ebp",
        "meet [r9], ebp, jbe",
        "xor eax, eax",
        "cpuid",
        "call rsi",
        "cmp eax, ebp",
        "jne 9f",
        // The other has run what was stored before it stores anew.
        "mov [r8 + 64], ebp",
        "meet [r9 + 64], ebp, jbe",
        "dec ebp",
        "jnz 2b",
        "jmp 8f",
        "9: mov dword ptr [r8], 0",
        "mov dword ptr [r8 + 64], 0",
        "8:"
    );
    for second in [ROUTINE + 0x1000, ROUTINE + 0x100] {
        for kinds in PAIRS {
            let mut bed = Bed::new(&kinds);
            bed::rounds(
                || false,
                || {
                    for cell in [FLAG, FLAG + 64, ACK, ACK + 64] {
                        bed.put64(cell, u64::MAX);
                    }
                    put_routine(&bed, ROUTINE);
                    put_routine(&bed, second);
                    let jobs = [
                        bed.job(CODE, both, &registers(ROUTINE, second, FLAG, ACK)),
                        bed.job(CODE + 0x1000, both, &registers(second, ROUTINE, ACK, FLAG)),
                    ];
                    for end in bed.run(&jobs) {
                        let (left, got) = (end.gpr[gpr::RBP], end.gpr[gpr::RAX]);
                        assert_eq!(left, 0, "{kinds:?}: {got:#x} in place of {left:#x}");
                    }
                },
            );
        }
    }
}

/// A page that one fills from end to end and the other runs from somewhere in it, in turns.
#[test]
fn a_page_written_by_one_and_run_by_the_other() {
    // `add eax, 1` 1023 times, but for a count that falls with ECX: NOPs before it, then RET.
    let fill = program!(
        "2: mov r10d, ecx",
        "lea r11, [rdi + 0xFF0]",
        "mov rax, rdi",
        "3: mov dword ptr [rax], 0x9001C083",
        "add rax, 4",
        "dec r10d",
        "jnz 3b",
        "4: mov dword ptr [rax], 0x909090C3",
        "add rax, 4",
        "cmp rax, r11",
        "jb 4b",
        "mov [r8], ecx",
        "meet [r9], ecx, je",
        "dec ecx",
        "jnz 2b"
    );
    let run = runner!("xor eax, eax", "cpuid", "xor eax, eax");
    for kinds in PAIRS {
        let mut bed = Bed::new(&kinds);
        let registers = registers(ROUTINE, ROUTINE, FLAG, ACK);
        let jobs = [bed.job(CODE, fill, &registers), bed.job(CODE + 0x1000, run, &registers)];
        bed::rounds(|| false, || assert_all_seen(&kinds, &bed.run(&jobs)[1]));
        if kinds == [T, T] {
            assert!(bed.counter("write_revocations") > 0, "the writer was asked for the page");
        }
    }
}

/// What was stored while a processor slept is what it runs when it wakes.
#[test]
fn stores_into_the_code_of_a_sleeper() {
    let store = program!("mov [rdi + 1], ecx", "mov [rdi + 0x100], ecx");
    let call = program!("call rsi");
    let idle = program!("nop");
    for kinds in PAIRS {
        let mut bed = Bed::new(&kinds);
        put_routine(&bed, ROUTINE);
        for number in 1..50u64 {
            let mut registers = registers(ROUTINE, ROUTINE, FLAG, ACK);
            registers[0].1 = number;
            let job = |at, program| bed.job(at, program, &registers);
            let (store, call) = (job(CODE, store), job(CODE + 0x1000, call));
            let (idle, idler) = (job(CODE + 0x2000, idle), job(CODE + 0x3000, idle));
            bed.run(&[store, idler]);
            let ends = bed.run(&[idle, call]);
            assert_eq!(ends[1].gpr[gpr::RAX], number, "{kinds:?}");
        }
    }
}

/// Devices write code too, while two processors run it.
#[test]
fn code_from_a_device() {
    for kinds in PAIRS {
        let mut bed = Bed::new(&kinds);
        put_routine(&bed, ROUTINE);
        bed::rounds(
            || false,
            || {
                for n in 0..2 {
                    bed.put64(ACK + n * 0x100, u64::MAX);
                }
                let jobs: Vec<Job> = (0..2)
                    .map(|n| {
                        let registers = registers(0, ROUTINE, FLAG, ACK + n * 0x100);
                        bed.job(CODE + n * 0x1000, by_cpuid(), &registers)
                    })
                    .collect();
                let memory = bed.mem.clone();
                let device = std::thread::spawn(move || {
                    let at = |a| paravane_memory::PhysAddr(a);
                    for number in (1..=TIMES as u32).rev() {
                        memory.write(at(ROUTINE + 1), &number.to_le_bytes()).expect("RAM");
                        memory.write(at(FLAG), &number.to_le_bytes()).expect("RAM");
                        let done = |n: u64| memory.read_u32(at(ACK + n * 0x100)).expect("RAM") <= number;
                        while !(done(0) && done(1)) {
                            std::thread::yield_now();
                        }
                    }
                });
                let ends = bed.run(&jobs);
                device.join().expect("the device");
                ends.iter().for_each(|end| assert_all_seen(&kinds, end));
            },
        );
    }
}

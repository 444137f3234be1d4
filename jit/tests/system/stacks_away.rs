//! Programs with windows whose stack pointer leaves the memory that it was known to be in: what the host has there stays as it is.
//!
//! Invariant: a [`Secrets`] page is our own from `mmap` to its drop, and only volatile accesses reach it.

use crate::bed::{CODE, DATA, Start, both};
use crate::windows::{service, start};
use paravane_cpu::{flags, gpr};

/// Windows for programs below 4 GiB may begin at multiples.
const STEP: usize = 1 << 41;
const WORDS: usize = 512;

/// Pages of the host's own where windows may have the linear address `away`.
struct Secrets(Vec<*mut u64>);

impl Secrets {
    fn new(away: u64) -> Secrets {
        let page = |n: usize| {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
            let at = (n * STEP + away as usize) as *mut libc::c_void;
            // SAFETY: nothing is replaced.
            let p = unsafe { libc::mmap(at, 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
            (p != libc::MAP_FAILED).then(|| p.cast::<u64>())
        };
        let pages: Vec<*mut u64> = (0..40).filter_map(page).collect();
        // Tables of other tests have some of the places, where there is no window then either.
        assert!(!pages.is_empty(), "the host has no address space left to look for windows in");
        for (p, n) in pages.iter().flat_map(|p| (0..WORDS).map(move |n| (p, n))) {
            // SAFETY: mapped above, and nobody else's.
            unsafe { p.add(n).write_volatile(Self::word(n)) };
        }
        Secrets(pages)
    }

    fn word(n: usize) -> u64 {
        0x5EC2_E7A5_0000 + n as u64
    }

    fn check(&self) {
        for (p, n) in self.0.iter().flat_map(|p| (0..WORDS).map(move |n| (p, n))) {
            // SAFETY: mapped until `self` goes.
            assert_eq!(unsafe { p.add(n).read_volatile() }, Self::word(n), "{p:p}");
        }
    }
}

impl Drop for Secrets {
    fn drop(&mut self) {
        for p in &self.0 {
            // SAFETY: ours, and nothing refers to it.
            unsafe { libc::munmap(p.cast(), 4096) };
        }
    }
}

/// By steps of which none is large, with and without words in between.
#[test]
fn stacks_that_walk_away() {
    const AWAY: u64 = 0x1_0600_0000;
    let secrets = Secrets::new(AWAY);
    // All of it is translated and chained when R9 steps are due.
    let programs = [
        program!(64: "mov ebx, 5", "4: mov rsp, r8", "mov ecx, 1", "dec ebx", "cmovz rcx, r9", "2: add rsp, 0x10000", "dec ecx", "jnz 2b"; "push rax", "jmp 4b"),
        program!(64: "mov ebx, 5", "4: mov rsp, r8", "mov ecx, 1", "dec ebx", "cmovz rcx, r9", "2: add rsp, 0x10000", "dec ecx", "jnz 2b"; "pop rax", "jmp 4b"),
        program!(64: "mov ebx, 5", "4: mov rsp, r8", "mov ecx, 1", "dec ebx", "cmovz rcx, r9", "2: add rsp, 0x10000", "dec ecx", "jnz 2b"; "mov rax, [rsp]", "jmp 4b"),
        program!(64: "mov ebx, 5", "4: mov rsp, r8", "mov ecx, 1", "dec ebx", "cmovz rcx, r9", "2: lea rsp, [rsp + 0x10000]", "loop 2b"; "call 3f", "3: jmp 4b"),
        program!(64: "mov ebx, 5", "4: mov rsp, r8", "mov ecx, 1", "dec ebx", "cmovz rcx, r9", "2: add rsp, 0x10000", "lea rbp, [rip + 3f]", "jmp rbp", "3: dec ecx", "jnz 2b"; "push qword ptr [rsi]", "jmp 4b"),
        program!(64: "mov ebx, 5", "4: mov rsp, r8", "mov ecx, 1", "dec ebx", "cmovz rcx, r9", "shl rcx, 16", "mov rdx, rsp", "add rdx, rcx", "mov rsp, rdx", "jmp 2f", "2:"; "push 5", "jmp 4b"),
        program!(64: "mov ebx, 5", "4: mov rsp, r8", "mov ecx, 1", "dec ebx", "cmovz rcx, r9", "shl rcx, 16", "lea rbp, [rsp + rcx - 8]", "mov rsp, rbp", "nop", "add rsp, 8", "test rsp, rsp", "jz 2f", "2:"; "mov [rsp + 8], rax", "jmp 4b"),
        program!(64: "mov ebx, 5", "4: mov rsp, r8", "mov ecx, 1", "dec ebx", "cmovz rcx, r9", "shl rcx, 16", "add rcx, rsp", "xchg rcx, rsp", "xor eax, eax", "jrcxz 2f", "2:"; "pop rax", "jmp 4b"),
    ];
    both(Start::Long, |bed| {
        for (n, p) in programs.iter().enumerate() {
            for to in [AWAY + 0x800, AWAY + 0x40_0000, 0x7FFF_0000_0000] {
                start(bed);
                let steps = (to - DATA) >> 16;
                let steps = if n < 5 { steps.min(0x2_0000) } else { steps };
                let home = DATA + (to & 0xFFFF);
                let g = &mut bed.cpu.gpr;
                (g[gpr::R8], g[9], g[gpr::RSI]) = (home, steps, DATA);
                bed.run(p);
                let (t, rsp) = (bed.taken(), home + (steps << 16));
                let word = match n {
                    0 | 3 | 4 | 5 => rsp - 8,
                    6 => rsp + 8,
                    _ => rsp,
                };
                let seen = (t.vector, t.rip, t.sp, bed.cpu.cr2);
                assert_eq!(seen, (14, CODE + p.at, rsp, word), "program {n}, {to:#x}");
            }
        }
    });
    secrets.check();
}

/// By steps so small that blocks know how far they went.
#[test]
fn stacks_that_are_followed_away() {
    const AWAY: u64 = 0x1_1400_0000;
    const NEAR: u64 = AWAY - 0x200_0000;
    let secrets = Secrets::new(AWAY);
    // The loops are hot before they lead away.
    let programs = [
        program!(64: "mov ebx, 5", "4: mov rsp, r8", "mov ecx, 1500", "dec ebx", "cmovz rcx, r9", "cmovz rsp, r10", "2: add rsp, 0x400", "dec ecx", "jnz 2b"; "push rax", "jmp 4b"),
        program!(64: "mov ebx, 5", "4: mov rsp, r8", "mov ecx, 1500", "dec ebx", "cmovz rcx, r9", "cmovz rsp, r10", "2: lea rsp, [rsp + 0x400]", "loop 2b"; "pop rax", "jmp 4b"),
        program!(64: "mov ebx, 5", "4: mov rsp, r8", "mov ecx, 1500", "dec ebx", "cmovz rcx, r9", "cmovz rsp, r10", "2: sub rsp, -0x400", "dec ecx", "jz 3f", "jmp 2b", "3:"; "mov [rsp], rax", "jmp 4b"),
    ];
    both(Start::Long, |bed| {
        for (n, p) in programs.iter().enumerate() {
            start(bed);
            let steps = ((AWAY - NEAR) >> 10) + 2;
            let g = &mut bed.cpu.gpr;
            (g[gpr::R8], g[9], g[10]) = (DATA + 0x800, steps, NEAR);
            bed.run(p);
            let (t, rsp) = (bed.taken(), NEAR + (steps << 10));
            let word = if n == 0 { rsp - 8 } else { rsp };
            assert_eq!((t.vector, t.rip, t.sp, bed.cpu.cr2), (14, CODE + p.at, rsp, word), "program {n}");
        }
    });
    secrets.check();
}

/// The kernel puts it there, when it has returned to the program a few times, or a debugger does.
#[test]
fn stacks_that_are_put_away() {
    const AWAY: u64 = 0x1_0900_0000;
    let secrets = Secrets::new(AWAY);
    let programs = [
        program!(64: "mov ebx, 9", "2: dec ebx", "mov rdx, rsp", "cmovz rdx, rdi", "int 0x40"; "push rax", "pop rcx", "test ebx, ebx", "jnz 2b"),
        program!(64: "mov ebx, 9", "2: dec ebx", "mov rdx, rsp", "cmovz rdx, rdi", "syscall"; "push rax", "pop rcx", "test ebx, ebx", "jnz 2b"),
        program!(64: ; "push rax"),
    ];
    both(Start::Long, |bed| {
        for (n, p) in programs.iter().enumerate() {
            for to in [AWAY + 0x800, AWAY + 0x40_0000, 0x7FFF_0000_0000, 0x7FFF_FFFF_FFF8, 1 << 63] {
                start(bed);
                service(bed, &program!(64: "mov [rsp + 24], rdx", "iretq"));
                bed.cpu.msr.star = 0x0023_0010 << 32;
                (bed.cpu.msr.lstar, bed.cpu.msr.sfmask) = (CODE + 0x800, flags::IF);
                bed.put(CODE + 0x800, program!(64: "mov rsp, rdx", "sysretq").bytes);
                bed.cpu.gpr[gpr::RDI] = to;
                if n == 2 {
                    bed.cpu.gpr[gpr::RSP] = to;
                }
                bed.run(p);
                let t = bed.taken();
                // Through RSP what is not canonical is the stack segment's fault.
                let vector = if to >> 47 != 0 { 12 } else { 14 };
                assert_eq!((t.vector, t.rip, t.sp), (vector, CODE + p.at, to), "program {n}, {to:#x}");
            }
        }
    });
    secrets.check();
}

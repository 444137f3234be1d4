//! Self-modifying and cross-modifying code (SDM 3A, 8.1.3): seen at the latest after a branch, by one processor at once.

use crate::bed::{CODE, DATA, Start, both, pte};
use paravane_cpu::gpr;

#[test]
fn the_next_instruction() {
    for start in [Start::Long, Start::Pae, Start::Protected, Start::Compat] {
        both(start, |bed| {
            if start == Start::Long {
                bed.finish(
                    &program!(64: "lea rsi, [rip + 2f]", "mov byte ptr [rsi + 1], 7", "2: mov eax, 1"),
                );
            } else {
                bed.finish(&program!(32: ".byte 0xBE", ".long 2f - 770b + 0x100000", "mov byte ptr [esi + 1], 7", "2: mov eax, 1"));
            }
            assert_eq!(bed.cpu.gpr[gpr::RAX], 7);
        });
    }
    both(Start::Real, |bed| {
        bed.finish(&program!(16: ".byte 0xBE", ".word 2f - 770b + 0x9000", "mov byte ptr [si + 1], 7", "2: mov ax, 1"));
        assert_eq!(bed.cpu.gpr[gpr::RAX], 7);
    });
}

#[test]
fn a_loop_that_rewrites_its_own_body() {
    both(Start::Long, |bed| {
        // The immediate of ADD counts up each round, by every kind of store.
        bed.finish(&program!(64: "lea rsi, [rip + 2f]", "mov ecx, 40",
            "8: mov [rsi + 1], cl", "2: add al, 0", "movzx eax, al", "add rbx, rax", "xor eax, eax",
            "push rcx", "pop qword ptr [rip + 9f]",
            "lock inc byte ptr [rsi + 1]", "dec ecx", "jnz 8b", "jmp 77f", "9: .quad 0", "77:"));
        assert_eq!(bed.cpu.gpr[gpr::RBX], (1..=40).sum::<u64>());
    });
}

#[test]
fn string_and_vector_stores_into_code() {
    both(Start::Long, |bed| {
        // Copies a routine over another one, forth and back.
        bed.finish(&program!(64: "mov r12d, 10",
            "8: lea rsi, [rip + 20f]", "lea rdi, [rip + 30f]", "mov ecx, 16", "rep movsb", "call 30f", "add r8, rax",
            "movups xmm0, [rip + 21f]", "movups [rip + 30f], xmm0", "call 30f", "add r9, rax",
            "dec r12d", "jnz 8b", "jmp 77f",
            ".balign 16", "20: mov eax, 3", "ret", ".balign 16", "21: mov eax, 5", "ret", ".balign 16",
            "30: mov eax, 9", "ret", ".balign 16", "77:"));
        assert_eq!((bed.cpu.gpr[gpr::R8], bed.cpu.gpr[9]), (30, 50));
    });
}

#[test]
fn code_modified_through_another_linear_address() {
    both(Start::Long, |bed| {
        bed.map(0x30_0000, DATA, pte::ALL);
        bed.put(DATA, &[0xB8, 0, 0, 0, 0, 0xC3]);
        bed.finish(&program!(64: "mov esi, 0x200000", "mov edi, 0x300000", "mov ecx, 30",
            "2: mov [rdi + 1], ecx", "call rsi", "add ebx, eax", "dec ecx", "jnz 2b"));
        assert_eq!(bed.cpu.gpr[gpr::RBX], (1..=30).sum::<u64>());
    });
}

#[test]
fn a_page_of_code_and_data() {
    both(Start::Long, |bed| {
        // Data beside code in its page: stores must work and code must go on.
        bed.finish(&program!(64: "lea rsi, [rip + 9f]", "mov ecx, 300", "2: inc qword ptr [rsi]", "mov rax, [rsi]", "dec ecx", "jnz 2b", "jmp 3f",
            "9: .quad 0", "3:"));
        assert_eq!(bed.cpu.gpr[gpr::RAX], 300);
    });
}

#[test]
fn an_instruction_on_two_pages_of_which_either_changes() {
    both(Start::Long, |bed| {
        // MOV EAX, imm32 at 2FFFFE: the immediate's last three bytes lie in the next page.
        bed.put(0x2F_FFFE, &[0xB8, 1, 0, 0, 0, 0xC3]);
        bed.finish(&program!(64: "mov esi, 0x2FFFFE", "mov ecx, 20",
            "2: mov [rsi + 2], cl", "call rsi", "shr eax, 8", "add ebx, eax",
            "mov [rsi + 1], cl", "call rsi", "movzx eax, al", "add edx, eax", "dec ecx", "jnz 2b"));
        assert_eq!((bed.cpu.gpr[gpr::RBX], bed.cpu.gpr[gpr::RDX]), (210, 210));
    });
}

#[test]
fn an_instruction_whose_second_page_is_remapped() {
    both(Start::Long, |bed| {
        bed.put(0x2F_FFFE, &[0xB8, 1]);
        bed.put(0x30_0000, &[0, 0, 0, 0xC3]);
        bed.put(0x31_0000, &[1, 0, 0, 0xC3]);
        bed.cpu.gpr[gpr::RDI] = bed.pte_at(0x30_0000);
        bed.finish(&program!(64: "mov esi, 0x2FFFFE", "mov ebx, 0x300000", "mov ecx, 20",
            "2: mov qword ptr [rdi], 0x300007", "invlpg [rbx]", "call rsi", "add r8, rax",
            "mov qword ptr [rdi], 0x310007", "invlpg [rbx]", "call rsi", "add r9, rax", "dec ecx", "jnz 2b"));
        assert_eq!((bed.cpu.gpr[gpr::R8], bed.cpu.gpr[9]), (20, 20 * 257));
    });
}

#[test]
fn code_that_runs_on_into_a_remapped_page() {
    both(Start::Long, |bed| {
        // INC RAX at the end of one page runs on into the next: ADD RAX, 1; RET or ADD RAX, 100; RET.
        bed.put(0x2F_FFFD, &[0x48, 0xFF, 0xC0]);
        bed.put(0x30_0000, &[0x48, 0x83, 0xC0, 1, 0xC3]);
        bed.put(0x31_0000, &[0x48, 0x83, 0xC0, 100, 0xC3]);
        bed.cpu.gpr[gpr::RDI] = bed.pte_at(0x30_0000);
        bed.finish(&program!(64: "mov esi, 0x2FFFFD", "mov ebx, 0x300000", "mov ecx, 20",
            "2: mov qword ptr [rdi], 0x300007", "invlpg [rbx]", "xor eax, eax", "call rsi", "add r8, rax",
            "mov qword ptr [rdi], 0x310007", "invlpg [rbx]", "xor eax, eax", "call rsi", "add r9, rax", "dec ecx", "jnz 2b"));
        assert_eq!((bed.cpu.gpr[gpr::R8], bed.cpu.gpr[9]), (40, 20 * 101));
    });
}

#[test]
fn writes_from_outside_are_seen() {
    both(Start::Long, |bed| {
        let program = program!(64: "mov ecx, 100", "2: mov eax, 1", "add ebx, eax", "dec ecx", "jnz 2b");
        bed.finish(&program);
        bed.put(CODE + 6, &[3]);
        bed.cpu.rip = CODE;
        bed.cpu.gpr[gpr::RBX] = 0;
        bed.go();
        assert_eq!(bed.cpu.gpr[gpr::RBX], 300);
    });
}

#[test]
fn code_that_erases_itself() {
    both(Start::Long, |bed| {
        // REP STOSW over itself and what follows: three bytes on it meets UD2.
        let p = program!(64: "lea rdi, [rip + 2f]", "mov eax, 0x0F0B", "mov ecx, 8"; "2: rep stosw", "nop", "nop");
        bed.run(&p);
        assert_eq!((bed.taken().vector, bed.taken().rip), (6, CODE + p.at + 3));
    });
}

#[test]
fn a_patch_that_reads_flags_reaches_the_code_before_it() {
    both(Start::Long, |bed| {
        // What is patched lies 64 bytes behind code that was translated when nobody wanted its flags.
        bed.finish(&program!(64: "lea rsi, [rip + 40f]", "call 20f", "mov word ptr [rsi], 0x920F",
            "mov byte ptr [rsi + 2], 0xC0", "mov eax, 0", "call 20f", "movzx ebx, al", "jmp 77f",
            ".skip 64, 0x90", "20: stc", "mov rdx, [rsp]", "jmp 40f", ".skip 128, 0x90",
            "40: xor eax, eax", "nop", "ret", ".skip 64, 0x90", "77:"));
        assert_eq!(bed.cpu.gpr[gpr::RBX], 1, "SETC sees the carry of STC");
    });
}

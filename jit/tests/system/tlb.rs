//! Translations must not outlive the flush that the guest asks for (SDM 3A, 4.10).

use crate::bed::{Bed, DATA, HANDLERS, PML4, SPARE, Start, both, pf, pte};
use paravane_cpu::{cr4, gpr};

const OTHER: u64 = 0x21_0000;

/// The physical pages of [`DATA`] and [`OTHER`] hold 1 and 2; the PTE of the former is at RDI, its new value in RDX.
fn two_pages(bed: &mut Bed) {
    bed.put32(DATA, 1);
    bed.put32(OTHER, 2);
    bed.cpu.gpr[gpr::RSI] = DATA;
    bed.cpu.gpr[gpr::RDI] = bed.pte_at(DATA);
    bed.cpu.gpr[gpr::RDX] = OTHER | pte::ALL;
}

#[test]
fn invlpg() {
    both(Start::Long, |bed| {
        two_pages(bed);
        bed.finish(&program!(64: "mov eax, [rsi]", "mov [rsi + 4], eax", "mov [rdi], rdx", "invlpg [rsi + 0x123]", "mov ebx, [rsi]", "mov [rsi + 4], ebx"));
        assert_eq!((bed.cpu.gpr[gpr::RAX], bed.cpu.gpr[gpr::RBX]), (1, 2));
        assert_eq!((bed.get32(DATA + 4), bed.get32(OTHER + 4)), (1, 2));
    });
    both(Start::Pae, |bed| {
        two_pages(bed);
        bed.finish(&program!(32: "mov eax, [esi]", "mov [edi], edx", "invlpg [esi]", "mov ebx, [esi]"));
        assert_eq!((bed.cpu.gpr[gpr::RAX], bed.cpu.gpr[gpr::RBX]), (1, 2));
    });
}

#[test]
fn invlpg_of_a_global_and_of_a_large_page() {
    both(Start::Long, |bed| {
        bed.map(DATA, DATA, pte::ALL | pte::G);
        bed.cpu.cr4 |= cr4::PGE;
        two_pages(bed);
        bed.finish(&program!(64: "mov eax, [rsi]", "mov [rdi], rdx", "invlpg [rsi]", "mov ebx, [rsi]"));
        assert_eq!((bed.cpu.gpr[gpr::RAX], bed.cpu.gpr[gpr::RBX]), (1, 2));
    });
    both(Start::Long, |bed| {
        let pde = crate::bed::PD + 8 * 8;
        bed.put64(pde, DATA | pte::ALL | pte::PS);
        bed.put32(DATA, 1);
        bed.put32(0x40_0000, 2);
        bed.cpu.gpr[gpr::RDI] = pde;
        bed.cpu.gpr[gpr::RDX] = 0x40_0000 | pte::ALL | pte::PS;
        bed.finish(&program!(64: "mov esi, 0x1000000", "mov eax, [rsi]", "mov eax, [rsi + 0x10000]", "mov eax, [rsi]",
            "mov [rdi], rdx", "invlpg [rsi + 0x10000]", "mov ebx, [rsi]"));
        assert_eq!((bed.cpu.gpr[gpr::RAX], bed.cpu.gpr[gpr::RBX]), (1, 2));
    });
}

#[test]
fn cr3_reload_spares_global_pages_only() {
    both(Start::Long, |bed| {
        two_pages(bed);
        bed.finish(
            &program!(64: "mov eax, [rsi]", "mov [rdi], rdx", "mov r8, cr3", "mov cr3, r8", "mov ebx, [rsi]"),
        );
        assert_eq!((bed.cpu.gpr[gpr::RAX], bed.cpu.gpr[gpr::RBX]), (1, 2));
        // Toggling PGE flushes global pages too.
        bed.reset();
        bed.map(DATA, DATA, pte::ALL | pte::G);
        bed.flush();
        bed.cpu.cr4 |= cr4::PGE;
        two_pages(bed);
        bed.finish(&program!(64: "mov eax, [rsi]", "mov [rdi], rdx", "mov r8, cr4", "btr r8, 7", "mov cr4, r8", "mov ebx, [rsi]"));
        assert_eq!((bed.cpu.gpr[gpr::RAX], bed.cpu.gpr[gpr::RBX]), (1, 2));
    });
}

#[test]
fn switching_address_spaces() {
    both(Start::Long, |bed| {
        // A second tree in which DATA's 1 GiB maps DATA to OTHER.
        let (pml4, pdpt, pd, pt) = (SPARE, SPARE + 0x1000, SPARE + 0x2000, SPARE + 0x3000);
        bed.put64(pml4, pdpt | pte::ALL);
        bed.put64(pdpt, pd | pte::ALL);
        for i in 0..8 {
            bed.put64(pd + i * 8, bed.get64(crate::bed::PD + i * 8));
        }
        bed.put64(pd + 8, pt | pte::ALL);
        bed.put64(pt, OTHER | pte::ALL);
        two_pages(bed);
        bed.cpu.gpr[gpr::R8] = PML4;
        bed.cpu.gpr[9] = pml4;
        bed.finish(&program!(64: "mov ecx, 50",
            "2: mov cr3, r8", "add r10d, [rsi]", "mov cr3, r9", "add r11d, [rsi]", "inc dword ptr [rsi]", "dec ecx", "jnz 2b"));
        assert_eq!(bed.cpu.gpr[10], 50);
        assert_eq!(bed.cpu.gpr[11], (2..52).sum::<u64>());
    });
}

#[test]
fn process_context_identifiers() {
    both(Start::Long, |bed| {
        let (pml4, pdpt, pd, pt) = (SPARE, SPARE + 0x1000, SPARE + 0x2000, SPARE + 0x3000);
        bed.put64(pml4, pdpt | pte::ALL);
        bed.put64(pdpt, pd | pte::ALL);
        for i in 0..8 {
            bed.put64(pd + i * 8, bed.get64(crate::bed::PD + i * 8));
        }
        bed.put64(pd + 8, pt | pte::ALL);
        bed.put64(pt, OTHER | pte::ALL);
        bed.cpu.cr4 |= cr4::PCIDE;
        two_pages(bed);
        bed.cpu.gpr[gpr::R8] = PML4 | 1 | 1 << 63;
        bed.cpu.gpr[9] = pml4 | 2 | 1 << 63;
        bed.finish(&program!(64: "mov ecx, 50",
            "2: mov cr3, r8", "add r10d, [rsi]", "mov cr3, r9", "add r11d, [rsi]", "dec ecx", "jnz 2b"));
        assert_eq!((bed.cpu.gpr[10], bed.cpu.gpr[11]), (50, 100));
        // INVPCID of the other space's address; a switch without flush must see the new entry.
        for kind in [0u64, 1, 2, 3] {
            bed.reset();
            bed.cpu.cr4 |= cr4::PCIDE;
            bed.put64(pt, OTHER | pte::ALL);
            bed.flush();
            two_pages(bed);
            bed.put64(0x20_2000, 2);
            bed.put64(0x20_2008, DATA);
            bed.cpu.gpr[gpr::R8] = PML4 | 1 | 1 << 63;
            bed.cpu.gpr[9] = pml4 | 2 | 1 << 63;
            bed.cpu.gpr[gpr::RDI] = pt;
            bed.cpu.gpr[gpr::RDX] = DATA | pte::ALL;
            bed.cpu.gpr[10] = kind;
            bed.finish(&program!(64: "mov cr3, r9", "mov eax, [rsi]", "mov cr3, r8", "mov [rdi], rdx",
                "mov r12d, 0x202000", "invpcid r10, [r12]", "mov cr3, r9", "mov ebx, [rsi]"));
            assert_eq!((bed.cpu.gpr[gpr::RAX], bed.cpu.gpr[gpr::RBX]), (2, 1), "type {kind}");
        }
        bed.reset();
        bed.cpu.cr4 |= cr4::PCIDE;
        bed.put64(0x20_2000, 0x1000);
        bed.faults(&program!(64: "mov eax, 1", "mov esi, 0x202000"; "invpcid rax, [rsi]"), 13, 0);
        bed.faults(&program!(64: "mov eax, 4", "mov esi, 0x202000"; "invpcid rax, [rsi]"), 13, 0);
        // The descriptor's bits 63:12 are reserved for the types that do not use it, too; a PCID needs CR4.PCIDE.
        bed.faults(&program!(64: "mov eax, 2", "mov esi, 0x202000"; "invpcid rax, [rsi]"), 13, 0);
        bed.put64(0x20_2000, 7);
        bed.finish(&program!(64: "mov eax, 3", "mov esi, 0x202000", "invpcid rax, [rsi]"));
        bed.reset();
        bed.finish(&program!(64: "mov eax, 2", "mov esi, 0x202000", "invpcid rax, [rsi]"));
        bed.faults(&program!(64: "mov eax, 1", "mov esi, 0x202000"; "invpcid rax, [rsi]"), 13, 0);
        bed.put64(0x20_2008, 1 << 47);
        bed.put64(0x20_2000, 0);
        bed.faults(&program!(64: "xor eax, eax", "mov esi, 0x202000"; "invpcid rax, [rsi]"), 13, 0);
    });
}

#[test]
fn cr3_without_bit_63_flushes_its_pcid() {
    both(Start::Long, |bed| {
        bed.cpu.cr4 |= cr4::PCIDE;
        two_pages(bed);
        bed.finish(
            &program!(64: "mov eax, [rsi]", "mov [rdi], rdx", "mov r8, cr3", "mov cr3, r8", "mov ebx, [rsi]"),
        );
        assert_eq!((bed.cpu.gpr[gpr::RAX], bed.cpu.gpr[gpr::RBX]), (1, 2));
    });
}

#[test]
fn permissions_taken_away() {
    both(Start::Long, |bed| {
        two_pages(bed);
        bed.cpu.gpr[gpr::RDX] = DATA | pte::P;
        bed.page_faults(&program!(64: "mov qword ptr [rdi], 0x200007", "invlpg [rsi]", "mov [rsi], eax", "mov [rdi], rdx", "invlpg [rsi]", "mov eax, [rsi]";
            "mov [rsi], eax"), DATA, pf::P | pf::W);
        two_pages(bed);
        bed.reset();
        two_pages(bed);
        bed.cpu.gpr[gpr::RDX] = 0;
        bed.page_faults(&program!(64: "mov qword ptr [rdi], 0x200007", "invlpg [rsi]", "mov [rsi], eax", "mov [rdi], rdx", "invlpg [rsi]"; "mov eax, [rsi]"), DATA, 0);
    });
}

#[test]
fn a_page_made_present_needs_no_flush() {
    both(Start::Long, |bed| {
        two_pages(bed);
        bed.map(DATA, 0, 0);
        bed.flush();
        // The handler maps the page and returns; #PF itself drops what may be cached.
        bed.put(HANDLERS + 14 * 16, program!(64: "inc r8", "mov [rdi], rdx", "add rsp, 8", "iretq").bytes);
        bed.finish(&program!(64: "mov ebx, [rsi]", "mov [rsi + 8], ebx"));
        assert_eq!((bed.cpu.gpr[gpr::RBX], bed.cpu.gpr[gpr::R8]), (2, 1));
        assert_eq!(bed.get32(OTHER + 8), 2);
    });
}

#[test]
fn code_follows_its_mapping() {
    both(Start::Long, |bed| {
        // RSI holds MOV EAX, 1; RET in one physical page, MOV EAX, 2; RET in the other.
        two_pages(bed);
        bed.put(DATA, &[0xB8, 1, 0, 0, 0, 0xC3]);
        bed.put(OTHER, &[0xB8, 2, 0, 0, 0, 0xC3]);
        bed.cpu.gpr[9] = DATA | pte::ALL;
        bed.finish(&program!(64: "mov ecx, 20",
            "2: call rsi", "add r10d, eax", "mov [rdi], rdx", "invlpg [rsi]", "call rsi", "add r11d, eax",
            "mov [rdi], r9", "invlpg [rsi]", "dec ecx", "jnz 2b"));
        assert_eq!((bed.cpu.gpr[10], bed.cpu.gpr[11]), (20, 40));
    });
}

#[test]
fn execute_permission_taken_away() {
    both(Start::Long, |bed| {
        bed.put(DATA, &[0xC3]);
        two_pages(bed);
        bed.put(DATA, &[0xC3]);
        bed.cpu.gpr[gpr::RDX] = DATA | pte::ALL | pte::XD;
        bed.run(&program!(64: "mov ecx, 10", "2: call rsi", "dec ecx", "jnz 2b", "mov [rdi], rdx", "invlpg [rsi]", "call rsi"));
        let t = bed.taken();
        assert_eq!((t.vector, t.error, t.rip, bed.cpu.cr2), (14, Some(pf::P | pf::I), DATA, DATA));
    });
}

#[test]
fn user_and_supervisor_see_one_change() {
    both(Start::Long, |bed| {
        // A user writes its page; the kernel takes the page away and flushes; the user faults.
        two_pages(bed);
        bed.gate(0x40, 14, 3, HANDLERS + 0x400);
        bed.put(HANDLERS + 0x400, program!(64: "mov qword ptr [rdi], 0", "invlpg [rsi]", "iretq").bytes);
        let (rsi, rdi) = (bed.cpu.gpr[gpr::RSI], bed.cpu.gpr[gpr::RDI]);
        bed.user();
        (bed.cpu.gpr[gpr::RSI], bed.cpu.gpr[gpr::RDI]) = (rsi, rdi);
        let p = program!(64: "mov ecx, 100", "2: mov [rsi], ecx", "mov eax, [rsi]", "dec ecx", "jnz 2b", "int 0x40"; "mov [rsi], ecx");
        bed.run(&p);
        let t = bed.taken();
        assert_eq!((t.vector, t.error, bed.cpu.cr2), (14, Some(pf::U | pf::W), DATA));
        // Nor does the supervisor reach it.
        bed.reset();
        bed.map(DATA, DATA, pte::ALL);
        bed.flush();
        two_pages(bed);
        bed.run(&program!(64: "mov [rsi], ecx", "mov qword ptr [rdi], 0", "invlpg [rsi]", "add [rsi], ecx"));
        assert_eq!((bed.taken().vector, bed.taken().error), (14, Some(pf::W)));
    });
}

#[test]
fn write_protection_changes_with_cr0() {
    both(Start::Long, |bed| {
        bed.map(DATA, DATA, pte::P | pte::US);
        two_pages(bed);
        // WP clear: the supervisor writes; set again: it must not, though its tables know the page.
        bed.page_faults(&program!(64: "mov rax, cr0", "btr rax, 16", "mov cr0, rax", "mov ecx, 20", "2: mov [rsi], ecx", "dec ecx", "jnz 2b",
            "bts rax, 16", "mov cr0, rax", "mov edx, [rsi]"; "mov [rsi], eax"), DATA, pf::P | pf::W);
        assert_eq!(bed.cpu.gpr[gpr::RDX], 1);
    });
}

#[test]
fn smap_and_smep_change_with_cr4() {
    both(Start::Long, |bed| {
        two_pages(bed);
        for page in [0x1000, 0x2000, 0x3000, 0x4000, 0x6_F000, 0x10_0000] {
            bed.map(page, page, pte::P | pte::RW);
        }
        bed.put(DATA, &[0xC3]);
        bed.page_faults(&program!(64: "mov ecx, 20", "2: add eax, [rsi]", "dec ecx", "jnz 2b", "mov rax, cr4", "bts rax, 21", "mov cr4, rax";
            "mov eax, [rsi]"), DATA, pf::P);
        bed.reset();
        two_pages(bed);
        bed.put(DATA, &[0xC3]);
        bed.run(
            &program!(64: "call rsi", "call rsi", "mov rax, cr4", "bts rax, 20", "mov cr4, rax", "call rsi"),
        );
        assert_eq!((bed.taken().error, bed.cpu.cr2), (Some(pf::P | pf::I), DATA));
    });
}

//! Control registers, MSRs, and what identifies and measures the processor (SDM 3A, 2.5 and chapter 4; 2A, CPUID; 4).

use crate::bed::{Bed, DATA, PD, Start, both, pf, pte};
use paravane_cpu::{cr0, cr4, efer, flags, gpr};

#[test]
fn cr0_bits() {
    both(Start::Protected, |bed| {
        // Reserved bits are ignored, ET is one.
        bed.finish(&program!(32: "mov eax, cr0", "or eax, 0x1FFAFFC0", "and eax, 0xFFFFFFEF", "mov cr0, eax", "mov ebx, cr0"));
        assert_eq!(bed.cpu.gpr[gpr::RBX], cr0::PE | cr0::ET | cr0::NE | cr0::MP | cr0::WP);
        bed.faults(&program!(32: "mov eax, 0x80000010"; "mov cr0, eax"), 13, 0); // PG without PE
        bed.faults(&program!(32: "mov eax, cr0", "bts eax, 29"; "mov cr0, eax"), 13, 0); // NW without CD
        bed.faults(&program!(32: ; ".byte 0x0F, 0x22, 0xC8"), 6, None); // MOV CR1, EAX
        bed.faults(&program!(32: ; ".byte 0x0F, 0x20, 0xE8"), 6, None); // MOV EAX, CR5
        // LMSW sets PE, MP, EM, TS and cannot clear PE.
        bed.reset();
        bed.finish(&program!(32: "mov eax, 8", "lmsw ax", "smsw ebx", "mov ecx, cr0"));
        assert_eq!((bed.cpu.gpr[gpr::RBX] & 0xF, bed.cpu.gpr[gpr::RCX] & 0xF), (9, 9));
    });
    both(Start::Long, |bed| {
        bed.faults(&program!(64: "mov rax, cr0", "bts rax, 32"; "mov cr0, rax"), 13, 0);
        bed.user();
        bed.faults(&program!(64: ; "mov cr0, rax"), 13, 0);
        bed.faults(&program!(64: ; "lmsw ax"), 13, 0);
        bed.faults(&program!(64: ; "clts"), 13, 0);
        // SMSW is for everybody without UMIP.
        bed.reset();
        bed.cpu.cr4 |= cr4::UMIP;
        bed.user();
        for p in [
            program!(64: ; "smsw eax"),
            program!(64: ; "sgdt [0x200000]"),
            program!(64: ; "sidt [0x200000]"),
            program!(64: ; "sldt eax"),
            program!(64: ; "str eax"),
        ] {
            bed.faults(&p, 13, 0);
        }
    });
}

#[test]
fn cr3_and_cr4_bits() {
    both(Start::Long, |bed| {
        // Physical addresses have 40 bits.
        bed.faults(&program!(64: "mov rax, cr3", "bts rax, 40"; "mov cr3, rax"), 13, 0);
        bed.faults(&program!(64: "mov rax, cr3", "bts rax, 63"; "mov cr3, rax"), 13, 0); // PCIDE is clear
        for bit in [12u64, 13, 14, 15, 19, 22, 23, 24, 25, 31, 32, 63] {
            // LA57, VMXE, SMXE, reserved, key locker, PKE, CET, PKS, UINTR, reserved.
            bed.reset();
            bed.cpu.gpr[gpr::RBX] = 1 << bit;
            bed.faults(&program!(64: "mov rax, cr4", "or rax, rbx"; "mov cr4, rax"), 13, 0);
        }
        bed.reset();
        bed.finish(&program!(64: "mov eax, 7", "xor ecx, ecx", "cpuid", "mov esi, ecx"));
        assert_eq!(bed.cpu.gpr[gpr::RSI] >> 16 & 1, 0, "LA57 is not offered");
    });
}

/// CR8 is the task priority, of four bits.
#[test]
fn cr8() {
    both(Start::Long, |bed| {
        bed.finish(&program!(64: "mov eax, 9", "mov cr8, rax", "mov rbx, -1", "mov rbx, cr8"));
        assert_eq!(bed.cpu.gpr[gpr::RBX], 9);
        bed.faults(&program!(64: "mov eax, 16"; "mov cr8, rax"), 13, 0);
        bed.user();
        bed.faults(&program!(64: ; "mov rax, cr8"), 13, 0);
    });
}

#[test]
fn efer_bits() {
    both(Start::Long, |bed| {
        for bit in [1u32, 9, 12, 14, 31] {
            bed.reset();
            bed.cpu.gpr[gpr::RBX] = 1 << bit;
            bed.faults(&program!(64: "mov ecx, 0xC0000080", "rdmsr", "or eax, ebx"; "wrmsr"), 13, 0);
        }
        // LMA cannot be written.
        bed.reset();
        bed.finish(&program!(64: "mov ecx, 0xC0000080", "rdmsr", "btr eax, 10", "wrmsr", "rdmsr"));
        assert_eq!(bed.cpu.gpr[gpr::RAX], efer::SCE | efer::LME | efer::LMA | efer::NXE);
    });
    both(Start::Protected, |bed| {
        bed.finish(&program!(32: "mov ecx, 0xC0000080", "mov eax, 0x500", "xor edx, edx", "wrmsr", "rdmsr"));
        assert_eq!(bed.cpu.gpr[gpr::RAX], efer::LME);
    });
}

/// MSRs with addresses must be canonical, others have reserved bits (SDM 4, chapter 2).
#[test]
fn msr_values() {
    both(Start::Long, |bed| {
        let write = program!(64: "mov ecx, edi", "mov rdx, rax", "shr rdx, 32"; "wrmsr");
        for (msr, value) in [
            (0xC000_0082u64, 0x8000_0000_0000u64),
            (0xC000_0083, 0x8000_0000_0000),
            (0xC000_0100, 0xFFFF_0000_0000_0000),
            (0xC000_0101, 1 << 63),
            (0xC000_0102, 0x8000_0000_0000),
            (0x175, 0x8000_0000_0000),
            (0x176, 1 << 47),
            (0xC000_0084, 1 << 32),
            (0xC000_0103, 1 << 32),
            (0x277, 0x0007_0406_0007_0402),
            (0x2FF, 0x100C),
            (0x2FF, 2),
            (0x250, 7),
            (0x200, 0x206),
            (0x200, 1 << 40),
            (0x201, 0x400),
            (0xFE, 0),
            (0x1D9, 1 << 20),
            (0x48, 8),
            (0x123_4567, 0),
        ] {
            bed.reset();
            bed.cpu.gpr[gpr::RDI] = msr;
            bed.cpu.gpr[gpr::RAX] = value;
            eprintln!("{msr:x} {value:x}");
            bed.faults(&write, 13, 0);
        }
        for (msr, value) in [
            (0xC000_0082u64, 0xFFFF_8000_0000_0000u64),
            (0xC000_0084, 0x4_7700),
            (0x277, 0x0007_0406_0007_0501),
            (0x200, 0x10_0006),
            (0x201, 0xFF_FFF0_0800),
            (0x174, 0x10),
        ] {
            bed.reset();
            bed.cpu.gpr[gpr::RDI] = msr;
            bed.cpu.gpr[gpr::RAX] = value;
            bed.finish(&program!(64: "mov ecx, edi", "mov rdx, rax", "shr rdx, 32", "wrmsr", "xor eax, eax", "rdmsr", "shl rdx, 32", "or rax, rdx"));
            assert_eq!(bed.cpu.gpr[gpr::RAX], value, "MSR {msr:x}");
        }
        bed.user();
        bed.faults(&program!(64: "mov ecx, 0x277"; "rdmsr"), 13, 0);
        bed.faults(&program!(64: "mov ecx, 0x277"; "wrmsr"), 13, 0);
    });
}

/// The four PDPTEs are loaded, and checked, by MOV to CR3 and by changes of CR0 and CR4 (SDM 3A, 4.4.1).
#[test]
fn pae_pointers_are_loaded_and_checked() {
    both(Start::Pae, |bed| {
        let root = crate::bed::SPARE;
        let load = program!(32: "mov eax, 0x42000"; "mov cr3, eax");
        for bit in [1, 2, 5, 6, 7, 8, 40, 51, 63] {
            bed.put64(root, PD | pte::P | 1 << bit);
            bed.faults(&load, 13, 0);
            assert_eq!(bed.cpu.cr3, crate::bed::PAE_ROOT, "CR3 is as before");
        }
        // Not present: no bit is reserved; an access faults.
        bed.put64(root, PD | pte::P);
        bed.put64(root + 8, 0xFFFF_FFFF_FFFF_FFFE);
        bed.page_faults(
            &program!(32: "mov eax, 0x42000", "mov cr3, eax"; "mov ebx, [0x40000000]"),
            0x4000_0000,
            0,
        );
        // Memory may change behind the registers: nothing is read again until a load.
        bed.reset();
        bed.put64(root + 8, PD | pte::P);
        bed.put32(DATA, 0x77);
        bed.finish(&program!(32: "mov eax, 0x42000", "mov cr3, eax", "mov ebx, [0x40200000]", "mov dword ptr [0x42008], 0", "mov ecx, [0x40201000]"));
        assert_eq!(bed.cpu.gpr[gpr::RBX], 0x77);
        bed.page_faults(
            &program!(32: "mov eax, cr3", "mov cr3, eax"; "mov ecx, [0x40201000]"),
            0x4020_1000,
            0,
        );
        // Enabling PAE paging checks them too.
        bed.put64(root, PD | pte::P | pte::RW);
        bed.reset();
        bed.cpu.cr0 &= !cr0::PG;
        bed.cpu.cr3 = root;
        bed.faults(&program!(32: "mov eax, cr0", "bts eax, 31"; "mov cr0, eax"), 13, 0);
        assert_eq!(bed.cpu.cr0 & cr0::PG, 0);
        bed.put64(root, PD | pte::P);
    });
}

/// What else loads the PDPTEs: CD and NW of CR0; PGE, PSE, SMEP of CR4. Other bits do not (SDM 3A, 4.4.1).
#[test]
fn other_loads_of_pae_pointers() {
    both(Start::Pae, |bed| {
        let read = program!(32: "mov dword ptr [0x2F008], 0x32001", "mov eax, cr4", "xor eax, ebx", "mov cr4, eax",
            "mov eax, cr0", "xor eax, esi", "mov cr0, eax"; "mov edx, [0x40201000]");
        bed.put32(DATA + 0x1000, 0x77);
        for page in [crate::bed::CODE, crate::bed::HANDLERS] {
            bed.map(page, page, pte::P | pte::RW); // for SMEP
        }
        let second = crate::bed::PAE_ROOT + 8;
        for (cr4, cr0, loads) in [
            (cr4::PGE, 0, true),
            (cr4::PSE, 0, true),
            (cr4::SMEP, 0, true),
            (0, cr0::CD, true),
            (cr4::TSD, 0, false),
            (cr4::DE, 0, false),
            (0, cr0::TS, false),
            (0, cr0::AM, false),
            (0, 0, false),
        ] {
            bed.reset();
            bed.put64(second, 0);
            bed.flush();
            bed.cpu.gpr[gpr::RBX] = cr4;
            bed.cpu.gpr[gpr::RSI] = cr0;
            bed.run(&read);
            if loads {
                assert_eq!(bed.cpu.gpr[gpr::RDX], 0x77, "CR4 {cr4:x} CR0 {cr0:x}");
            } else {
                assert_eq!((bed.taken().vector, bed.cpu.cr2), (14, 0x4020_1000), "CR4 {cr4:x} CR0 {cr0:x}");
            }
        }
        // Reserved bits: #GP, and the register as it was.
        bed.put64(second, PD | pte::P | pte::RW);
        bed.reset();
        bed.faults(&program!(32: "mov eax, cr4", "xor eax, 0x80"; "mov cr4, eax"), 13, 0);
        bed.faults(&program!(32: "mov eax, cr0", "xor eax, 0x40000000"; "mov cr0, eax"), 13, 0);
        assert_eq!((bed.cpu.cr4 & cr4::PGE, bed.cpu.cr0 & cr0::CD), (0, 0));
        bed.put64(second, 0);
    });
}

/// Bits that are reserved in page-table entries: #PF with RSVD, for whomever (SDM 3A, 4.7).
#[test]
fn reserved_bits_of_entries() {
    both(Start::Long, |bed| {
        let read = program!(64: "mov esi, 0x1000000"; "mov eax, [rsi]");
        let at = PD + 8 * 8;
        for entry in [
            1 << 13 | pte::PS | pte::ALL, // bit 13 of a 2 MiB page
            1 << 20 | pte::PS | pte::ALL, // bit 20
            1 << 40 | pte::ALL,           // beyond MAXPHYADDR
            DATA | 1 << 51 | pte::PS | pte::ALL,
        ] {
            bed.put64(at, entry);
            bed.page_faults(&read, 0x100_0000, pf::P | pf::RSVD);
        }
        // PAT of a 2 MiB page is bit 12: not reserved. Bits 62:52 are the program's.
        bed.put64(at, DATA | 1 << 12 | 0x7FF << 52 | pte::PS | pte::ALL);
        bed.finish(&read);
        // PS in a PML4E; 1 GiB pages with bits 29:13.
        bed.reset();
        bed.put64(crate::bed::PML4 + 8, crate::bed::PDPT | pte::ALL | pte::PS);
        bed.page_faults(
            &program!(64: "mov rsi, 0x8000000000"; "mov eax, [rsi]"),
            0x80_0000_0000,
            pf::P | pf::RSVD,
        );
        bed.put64(crate::bed::PDPT + 8, 1 << 29 | pte::ALL | pte::PS);
        bed.page_faults(
            &program!(64: "mov esi, 0x40000000"; "mov [rsi], eax"),
            0x4000_0000,
            pf::P | pf::W | pf::RSVD,
        );
        // XD without EFER.NXE.
        bed.put64(at, DATA | pte::PS | pte::ALL | pte::XD);
        bed.cpu.efer &= !efer::NXE;
        bed.flush();
        bed.page_faults(&read, 0x100_0000, pf::P | pf::RSVD);
    });
    both(Start::Pae, |bed| {
        let at = PD + 8 * 8;
        for entry in [1 << 52 | pte::ALL, 1 << 62 | DATA | pte::PS | pte::ALL] {
            bed.put64(at, entry);
            bed.page_faults(
                &program!(32: "mov esi, 0x1000000"; "mov eax, [esi]"),
                0x100_0000,
                pf::P | pf::RSVD,
            );
        }
    });
    both(Start::Paged32, |bed| {
        // Bit 21 of a 4 MiB page; without CR4.PSE the bit is ignored.
        let at = crate::bed::PD32 + 4 * 4;
        bed.put32(at, (1 << 21 | pte::PS | pte::ALL) as u32);
        bed.page_faults(&program!(32: "mov esi, 0x1000000"; "mov eax, [esi]"), 0x100_0000, pf::P | pf::RSVD);
        bed.put32(at, (crate::bed::PT32 | pte::PS | pte::ALL) as u32);
        bed.cpu.cr4 &= !cr4::PSE;
        bed.put32(0, 0x1234);
        bed.finish(&program!(32: "mov esi, 0x1000000", "mov eax, [esi]"));
        assert_eq!(bed.cpu.gpr[gpr::RAX], 0x1234);
    });
}

#[test]
fn time_stamps_and_counters() {
    both(Start::Long, |bed| {
        bed.cpu.msr.tsc_aux = 0xABCD;
        bed.finish(&program!(64: "mov rax, -1", "mov rdx, -1", "mov rcx, -1", "rdtscp", "mov rbx, rax", "rdtsc", "mov ebp, ecx", "rdpid rdi"));
        let g = bed.cpu.gpr;
        assert_eq!((g[gpr::RDX], g[gpr::RBP], g[gpr::RDI]), (0, 0xABCD, 0xABCD));
        assert!(g[gpr::RAX] >= g[gpr::RBX] && g[gpr::RAX] >> 32 == 0);
        // IA32_TSC_ADJUST moves with IA32_TIME_STAMP_COUNTER (SDM 3B, 17.17.3).
        bed.reset();
        bed.finish(&program!(64: "mov ecx, 0x10", "mov eax, 0x12345678", "mov edx, 0x9A", "wrmsr", "rdtsc", "mov esi, edx", "mov ebx, eax",
            "mov ecx, 0x3B", "rdmsr", "mov edi, eax", "xor eax, eax", "xor edx, edx", "wrmsr", "rdtsc"));
        let g = bed.cpu.gpr;
        assert_eq!((g[gpr::RSI], g[gpr::RBX] >> 16, g[gpr::RDI]), (0x9A, 0x1234, 0x1234_5678 - 1000));
        assert_eq!((g[gpr::RDX], g[gpr::RAX]), (0, 1000), "the bed's counter stands at 1000");
        // CR4.TSD and CR4.PCE at CPL 3; no counter exists.
        bed.reset();
        bed.cpu.cr4 |= cr4::TSD;
        bed.finish(&program!(64: "rdtsc", "rdtscp"));
        bed.user();
        bed.faults(&program!(64: ; "rdtsc"), 13, 0);
        bed.faults(&program!(64: ; "rdtscp"), 13, 0);
        bed.faults(&program!(64: "xor ecx, ecx"; "rdpmc"), 13, 0);
        bed.reset();
        bed.faults(&program!(64: "xor ecx, ecx"; "rdpmc"), 13, 0);
    });
}

#[test]
fn random_numbers() {
    both(Start::Long, |bed| {
        bed.cpu.rflags |= flags::STATUS;
        bed.finish(&program!(64: "rdrand rax", "pushfq", "pop rbx", "rdrand rcx", "rdseed rdx", "rdrand r8d", "mov r9, -1", "rdrand r9w"));
        let g = bed.cpu.gpr;
        assert_eq!(g[gpr::RBX] & flags::STATUS, flags::CF, "the others are cleared");
        assert!(g[gpr::RAX] != g[gpr::RCX] && g[gpr::RCX] != g[gpr::RDX]);
        assert_eq!((g[gpr::R8] >> 32, g[9] >> 16), (0, 0xFFFF_FFFF_FFFF));
    });
}

/// Leaves beyond the highest basic one answer like that one; unknown extended ones are zero (SDM 2A, CPUID).
#[test]
fn cpuid_leaves() {
    both(Start::Long, |bed| {
        bed.finish(&program!(64: "mov esi, 0x200000", "mov rax, 0xFFFFFFFF00000000", "mov rcx, -1", "cpuid", "mov [rsi], eax", "mov [rsi + 4], ebx", "mov [rsi + 8], rcx",
            "mov eax, [rsi]", "xor ecx, ecx", "cpuid", "mov [rsi + 16], eax", "mov [rsi + 20], ebx", "mov [rsi + 24], ecx", "mov [rsi + 28], edx",
            "mov eax, 0x3FFFFFFF", "xor ecx, ecx", "cpuid", "mov [rsi + 32], eax", "mov [rsi + 36], ebx", "mov [rsi + 40], ecx", "mov [rsi + 44], edx",
            "mov eax, 0x80000000", "cpuid", "lea eax, [eax + 1]", "cpuid"));
        let word = |n: u64| bed.get32(DATA + n);
        assert!(word(0) >= 0xD);
        assert_eq!((word(4), word(12)), (u32::from_le_bytes(*b"Genu"), 0), "upper halves are cleared");
        assert_eq!([16, 20, 24, 28].map(word), [32, 36, 40, 44].map(word));
        assert_eq!([gpr::RAX, gpr::RBX, gpr::RCX, gpr::RDX].map(|r| bed.cpu.gpr[r]), [0; 4]);
    });
}

/// A global page needs CR4.PGE, in force when the entry was used.
#[test]
fn global_pages_need_pge() {
    let run = |bed: &mut Bed, pge: bool| {
        bed.reset();
        bed.cpu.cr4 |= if pge { cr4::PGE } else { 0 };
        bed.put32(DATA, 1);
        bed.put32(0x30_0000, 2);
        bed.map(DATA, DATA, pte::ALL | pte::G);
        bed.flush();
        bed.cpu.gpr[gpr::RDI] = bed.pte_at(DATA);
        bed.finish(&program!(64: "mov esi, 0x200000", "mov eax, [rsi]", "mov qword ptr [rdi], 0x300107", "mov rcx, cr3", "mov cr3, rcx", "mov ebx, [rsi]",
            "mov rcx, cr4", "btc rcx, 7", "mov cr4, rcx", "mov edx, [rsi]"));
        (bed.cpu.gpr[gpr::RBX], bed.cpu.gpr[gpr::RDX])
    };
    both(Start::Long, |bed| {
        assert_eq!(run(bed, false), (2, 2));
        assert_eq!(run(bed, true), (1, 2), "it survives CR3, not a change of PGE");
    });
}

/// CR4.PCIDE can be set in IA-32e mode only, while CR3[11:0] is zero; PG cannot be cleared under it (SDM 3A, 2.5 and 4.10.1).
#[test]
fn when_pcids_can_be_enabled() {
    both(Start::Long, |bed| {
        let set = program!(64: "mov rax, cr4", "bts rax, 17"; "mov cr4, rax");
        bed.finish(&set);
        assert_ne!(bed.cpu.cr4 & cr4::PCIDE, 0);
        for low in [1, 0x18, 0x800] {
            bed.reset();
            bed.cpu.cr3 |= low;
            bed.faults(&set, 13, 0);
            assert_eq!(bed.cpu.cr4 & cr4::PCIDE, 0);
        }
    });
    for start in [Start::Protected, Start::Pae, Start::Paged32] {
        both(start, |bed| {
            bed.faults(&program!(32: "mov eax, cr4", "bts eax, 17"; "mov cr4, eax"), 13, 0);
        });
    }
    both(Start::Compat, |bed| {
        bed.cpu.cr4 |= cr4::PCIDE;
        bed.faults(&program!(32: "mov eax, cr0", "btr eax, 31"; "mov cr0, eax"), 13, 0);
    });
}

/// SGDT and SIDT store six bytes, ten in 64-bit mode; LGDT and LIDT load 24 bits of the base with 16-bit operands, a canonical
/// one in 64-bit mode (SDM 2A, LGDT, SGDT).
#[test]
fn descriptor_table_registers() {
    both(Start::Protected, |bed| {
        bed.put64(DATA, 0xAAAA_AAAA_AAAA_AAAA);
        bed.put16(DATA + 8, 0x0FFF);
        bed.put32(DATA + 10, 0xAB00_1000);
        bed.finish(&program!(32: "mov esi, 0x200000", "sidt [esi]", ".byte 0x66", "lgdt [esi + 8]", "mov eax, 0x18", "mov es, eax"));
        assert_eq!(bed.get64(DATA), 0xAAAA_0000_2000_0FFF);
        assert_eq!((bed.cpu.gdtr.base, bed.cpu.gdtr.limit), (0x1000, 0xFFF));
        bed.finish(&program!(32: "mov esi, 0x200000", ".byte 0x66", "lidt [esi + 8]"));
        assert_eq!((bed.cpu.idtr.base, bed.cpu.idtr.limit), (0x1000, 0xFFF));
        bed.finish(&program!(32: "mov esi, 0x200000", "lidt [esi + 8]"));
        assert_eq!(bed.cpu.idtr.base, 0xAB00_1000);
    });
    both(Start::Long, |bed| {
        bed.put(DATA, &[0xAA; 16]);
        bed.put16(DATA + 0x20, 0x0FFF);
        bed.put64(DATA + 0x22, 0xFFFF_8000_0000_1000);
        // The operand-size prefix means nothing here.
        bed.finish(&program!(64: "mov esi, 0x200000", ".byte 0x66", "sgdt [rsi]", "mov eax, [rsi + 10]", ".byte 0x66", "lidt [rsi + 0x20]"));
        assert_eq!((bed.get16(DATA), bed.get64(DATA + 2)), (0xFFF, 0x1000));
        assert_eq!((bed.cpu.gpr[gpr::RAX], bed.cpu.idtr.base), (0xAAAA_AAAA, 0xFFFF_8000_0000_1000));
        bed.reset();
        bed.put64(DATA + 0x22, 0x8000_0000_1000);
        bed.faults(&program!(64: "mov esi, 0x200000"; "lgdt [rsi + 0x20]"), 13, 0);
        bed.faults(&program!(64: "mov esi, 0x200000"; "lidt [rsi + 0x20]"), 13, 0);
    });
}

/// SLDT, STR and SMSW store two bytes to memory whatever the operand size; into registers selectors are zero-extended.
#[test]
fn stores_of_selectors_and_the_status_word() {
    for start in [Start::Protected, Start::Compat, Start::Long] {
        both(start, |bed| {
            bed.put(DATA, &[0xAA; 16]);
            bed.cpu.ldtr.selector = 0x1230;
            bed.finish(&program!(32: "mov esi, 0x200000", "sldt [esi]", "str [esi + 4]", "smsw [esi + 8]", "mov eax, -1", "sldt eax", "mov ecx, -1", "str ecx"));
            assert_eq!([0, 4].map(|i| bed.get32(DATA + i)), [0xAAAA_1230, 0xAAAA_0048]);
            assert_eq!(bed.get32(DATA + 8), 0xAAAA_0000 | bed.cpu.cr0 as u32 & 0xFFFF);
            assert_eq!((bed.cpu.gpr[gpr::RAX], bed.cpu.gpr[gpr::RCX]), (0x1230, 0x48));
        });
    }
}

/// MOV to and from control and debug registers takes the ModRM byte for two registers whatever its mod field says (SDM 2B).
#[test]
fn moves_of_control_registers_have_no_memory_form() {
    both(Start::Long, |bed| {
        // MOV RBP, CR3 as mod 0, rm 5; MOV RSP, CR0 as mod 1, rm 4; MOV RDX, DR7 as mod 2.
        bed.finish(&program!(64: "mov rcx, rsp", ".byte 0x0F, 0x20, 0x1D", ".byte 0x0F, 0x20, 0x44", "mov rax, rsp", "mov rsp, rcx", ".byte 0x0F, 0x21, 0xBA"));
        let g = bed.cpu.gpr;
        assert_eq!((g[gpr::RBP], g[gpr::RAX], g[gpr::RDX]), (bed.cpu.cr3, bed.cpu.cr0, 0x400));
    });
}

/// INVLPG of an address that is not canonical does nothing (SDM 2A).
#[test]
fn invlpg_of_any_address() {
    both(Start::Long, |bed| {
        bed.finish(&program!(64: "mov rsi, 0x8000000000000000", "invlpg [rsi]", "mov rsi, 0x7FFFFFFFFFFF", "invlpg [rsi + 1]", "invlpg [0x40000000]"));
        bed.faults(&program!(64: "nop"; ".byte 0x0F, 0x01, 0xFF"), 6, None); // of a register
    });
    both(Start::Protected, |bed| bed.finish(&program!(32: "invlpg [0x40000000]")));
}

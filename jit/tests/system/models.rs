//! What older processor models do not have: paging features, control bits, MSRs, instructions (SDM 3A, 2.5 and 4.1.4; 2A,
//! CPUID; 4).

use crate::bed::{Bed, CODE, DATA, PAE_ROOT, PD, PD32, PDPT, Program, Start, both_as, pf, pte};
use crate::wild::{Random, remains};
use paravane_cpu::{Exit, cr0, cr4, efer, flags, gpr};
use std::time::Duration;

/// Without CPUID Page1GB, PS of a PDPTE is reserved.
#[test]
fn pages_of_1_gib() {
    let read = program!(64: "mov esi, 0x40200000"; "mov eax, [rsi]");
    let execute = program!(64: "mov esi, 0x40200000", "jmp rsi"; "nop");
    let run = |bed: &mut Bed| bed.put64(PDPT + 8, pte::ALL | pte::PS);
    both_as("x86-64-v2", Start::Long, |bed| {
        run(bed);
        bed.put(DATA, &[0x90, 0xF4]);
        bed.finish(&read);
        bed.run(&execute);
        assert_eq!(bed.cpu.rip, 0x4020_0002);
    });
    both_as("x86-64", Start::Long, |bed| {
        run(bed);
        bed.page_faults(&read, 0x4020_0000, pf::P | pf::RSVD);
        bed.page_faults(
            &program!(64: "mov esi, 0x40200000"; "add [rsi], eax"),
            0x4020_0000,
            pf::P | pf::RSVD | pf::W,
        );
        bed.run(&execute);
        assert_eq!((bed.taken().error, bed.cpu.cr2), (Some(pf::P | pf::RSVD | pf::I), 0x4020_0000));
        assert_eq!(bed.get64(PDPT + 8), pte::ALL | pte::PS, "neither accessed nor dirty");
    });
}

/// MAXPHYADDR is 36 on a processor with PAE that has no leaf 8000_0008H.
#[test]
fn physical_addresses_of_36_bits() {
    let read = program!(32: "mov esi, 0x1000000"; "mov eax, [esi]");
    both_as("pentium3", Start::Pae, |bed| {
        bed.put64(PD + 8 * 8, 0xF_FFC0_0000 | pte::ALL | pte::PS);
        bed.finish(&read);
        assert_eq!(bed.cpu.gpr[gpr::RAX], 0xFFFF_FFFF, "nothing is there");
        bed.put64(PD + 8 * 8, 1 << 36 | pte::ALL | pte::PS);
        bed.flush();
        bed.page_faults(&read, 0x100_0000, pf::P | pf::RSVD);
        // XD is reserved, and the fault says nothing of fetches.
        bed.put64(PD + 8 * 8, DATA | pte::ALL | pte::PS | pte::XD);
        bed.flush();
        bed.run(&program!(32: "mov esi, 0x1000000", "jmp esi"; "nop"));
        assert_eq!((bed.taken().error, bed.cpu.cr2), (Some(pf::P | pf::RSVD), 0x100_0000));
        bed.reset();
        bed.put64(PAE_ROOT + 8, PD | 1 << 36 | pte::P);
        bed.faults(&program!(32: "mov eax, cr3"; "mov cr3, eax"), 13, 0);
        bed.put64(PAE_ROOT + 8, 0);
        // The mask of a memory type range.
        bed.faults(&program!(32: "mov ecx, 0x201", "mov eax, 0x800", "mov edx, 0x10"; "wrmsr"), 13, 0);
        bed.finish(&program!(32: "mov ecx, 0x201", "mov eax, 0x800", "mov edx, 0xF", "wrmsr"));
    });
    // Bits 16:13 of a 4-MiB page are address bits 35:32, bits 21:17 reserved (SDM 3A, table 4-4).
    both_as("pentium3", Start::Paged32, |bed| {
        let at = PD32 + 4 * 4;
        bed.put32(at, (1 << 16 | pte::PS | pte::ALL) as u32);
        bed.finish(&read);
        assert_eq!(bed.cpu.gpr[gpr::RAX], 0xFFFF_FFFF, "nothing is there");
        for bit in 17..22 {
            bed.put32(at, (1 << bit | pte::PS | pte::ALL) as u32);
            bed.flush();
            bed.page_faults(&read, 0x100_0000, pf::P | pf::RSVD);
        }
    });
}

/// Control bits of what is not offered are reserved.
#[test]
fn control_bits() {
    let set = program!(32: "mov eax, cr4", "or eax, ebx"; "mov cr4, eax");
    let refused = |bed: &mut Bed, bits: &[u64]| {
        for &bit in bits {
            bed.reset();
            bed.cpu.cr0 &= !cr0::PG;
            bed.cpu.gpr[gpr::RBX] = bit;
            bed.faults(&set, 13, 0);
        }
    };
    both_as("pentium3", Start::Protected, |bed| {
        refused(bed, &[cr4::UMIP, cr4::FSGSBASE, cr4::PCIDE, cr4::OSXSAVE, cr4::SMEP, cr4::SMAP]);
        bed.reset();
        bed.cpu.gpr[gpr::RBX] = cr4::PAE | cr4::PGE | cr4::PSE | cr4::OSFXSR | cr4::OSXMMEXCPT;
        bed.finish(&set);
        // No long mode, no NX: no EFER. SYSCALL's MSRs are not there either.
        for msr in [0xC000_0080u64, 0xC000_0081, 0xC000_0102, 0xC000_0103, 0x3B, 0x48, 0x10A] {
            bed.reset();
            bed.cpu.gpr[gpr::RCX] = msr;
            bed.faults(&program!(32: ; "rdmsr"), 13, 0);
        }
    });
    both_as("i486", Start::Protected, |bed| {
        let bits = [cr4::VME, cr4::PVI, cr4::TSD, cr4::DE, cr4::PSE, cr4::PAE, cr4::MCE, cr4::PGE];
        refused(bed, &bits);
        refused(bed, &[cr4::PCE, cr4::OSFXSR, cr4::OSXMMEXCPT]);
    });
    both_as("x86-64", Start::Long, |bed| {
        let set = program!(64: "mov rax, cr4", "or rax, rbx"; "mov cr4, rax");
        for bit in [cr4::PCIDE, cr4::SMEP, cr4::SMAP, cr4::UMIP, cr4::FSGSBASE, cr4::OSXSAVE] {
            bed.reset();
            bed.cpu.gpr[gpr::RBX] = bit;
            bed.faults(&set, 13, 0);
        }
        bed.reset();
        bed.finish(&program!(64: "mov ecx, 0xC0000080", "rdmsr", "wrmsr"));
        assert_eq!(bed.cpu.efer, efer::SCE | efer::LME | efer::LMA | efer::NXE);
    });
}

fn undefined(bed: &mut Bed, programs: &[Program]) {
    for p in programs {
        bed.reset();
        eprintln!("{:02x?}", p.bytes);
        bed.faults(p, 6, None);
    }
}

/// Instructions of what is not offered are undefined; prefixes that mean nothing yet are ignored.
#[test]
fn instructions() {
    both_as("i486", Start::Protected, |bed| {
        let table = [
            program!(32: ; "cmovz eax, ebx"),
            program!(32: ; "rdtsc"),
            program!(32: ; "rdmsr"),
            program!(32: ; "wrmsr"),
            program!(32: ; "rdpmc"),
            program!(32: "mov esi, 0x200000"; "cmpxchg8b [esi]"),
            program!(32: ; "sysenter"),
            program!(32: ; "paddb mm0, mm1"),
            program!(32: ; "addps xmm0, xmm1"),
            program!(32: ; "fcmovb st, st(1)"),
            program!(32: ; "fcomi st, st(1)"),
            program!(32: "mov esi, 0x200000"; "fxsave [esi]"),
            program!(32: ; "rsm"),
        ];
        undefined(bed, &table);
        bed.reset();
        bed.finish(&program!(32: "mov eax, 1", "mov ebx, 1", "lock cmpxchg [0x200000], ebx", "xadd eax, ebx", "bswap eax", "wbinvd", "invlpg [0x200000]", "xor eax, eax", "cpuid", "fldpi"));
    });
    both_as("pentium3", Start::Protected, |bed| {
        let table = [
            program!(32: ; "addpd xmm0, xmm1"),
            program!(32: ; "paddb xmm0, xmm1"),
            program!(32: ; "syscall"),
            program!(32: ; "rdtscp"),
            program!(32: "mov esi, 0x200000"; "clflush [esi]"),
            program!(32: ; "lfence"),
            program!(32: ; "xgetbv"),
            program!(32: "mov esi, 0x200000"; "xsave [esi]"),
            program!(32: ; "pshufb mm0, mm1"),
            program!(32: ; "popcnt eax, ebx"),
            program!(32: ; "rdrand eax"),
            program!(32: ; "clac"),
            program!(32: "mov esi, 0x200000"; "invpcid eax, [esi]"),
            program!(32: ; "monitor"),
            program!(32: ; "mwait"),
        ];
        undefined(bed, &table);
        bed.reset();
        bed.finish(
            &program!(32: "cmovz eax, ebx", "addps xmm0, xmm1", "sfence", "pause", "rdtsc", "xor ecx, ecx"),
        );
    });
    both_as("x86-64", Start::Long, |bed| {
        let table = [
            program!(64: ; "pshufb xmm0, xmm1"),
            program!(64: ; "pblendw xmm0, xmm1, 1"),
            program!(64: ; "crc32 eax, bl"),
            program!(64: ; "popcnt eax, ebx"),
            program!(64: ; "rdtscp"),
            program!(64: ; "rdfsbase rax"),
            program!(64: "mov esi, 0x200000"; "invpcid rax, [rsi]"),
            program!(64: ; "stac"),
        ];
        undefined(bed, &table);
        bed.reset();
        bed.finish(&program!(64: "mov esi, 0x200000", "cmpxchg16b [rsi]", "lahf", "addsubps xmm0, xmm1"));
    });
    both_as("x86-64-v2", Start::Long, |bed| {
        let table = [
            program!(64: ; "vaddps xmm0, xmm1, xmm2"),
            program!(64: ; "andn eax, ebx, ecx"),
            program!(64: ; "mulx eax, ebx, ecx"),
            program!(64: "mov esi, 0x200000"; "movbe eax, [rsi]"),
            program!(64: ; "xgetbv"),
            program!(64: ; "rdrand eax"),
            program!(64: ; "aesenc xmm0, xmm1"),
        ];
        undefined(bed, &table);
        // TZCNT and LZCNT are BSF and BSR with a prefix.
        bed.reset();
        bed.finish(&program!(64: "mov eax, 0x50", "push rax", "tzcnt ebx, eax", "lzcnt ecx, eax", "lzcnt edx, [rsp]", "mov r9d, eax", "lzcnt r10w, r9w",
            "xor esi, esi", "mov edi, 1", "tzcnt esi, edi", "setz sil"));
        let g = bed.cpu.gpr;
        assert_eq!((g[gpr::RBX], g[gpr::RCX], g[gpr::RDX], g[10]), (4, 6, 6, 6));
        // ZF tells of the source; TZCNT's would tell of the result.
        assert_eq!(g[gpr::RSI] & 0xFF, 0);
    });
}

/// An instruction of any opcode map with any prefixes.
fn any_instruction(random: &mut Random, bits: u32) -> Vec<u8> {
    let mut code = Vec::new();
    for _ in 0..random.below(3) {
        code.push(random.of(&[0x66, 0xF2, 0xF3, 0xF3, 0x67, 0xF0, 0x2E]));
    }
    if bits == 64 && random.below(3) == 0 {
        code.push(0x40 | random.below(16) as u8);
    }
    code.extend(random.of(&[&[][..], &[0x0F], &[0x0F], &[0x0F, 0x38], &[0x0F, 0x3A]]));
    code.push(random.next() as u8);
    // A register, or [RSI], [RDI + disp8].
    let field = (random.below(8) as u8) << 3;
    match random.below(3) {
        0 => code.push(field | 6),
        1 => code.extend([field | 0x47, random.next() as u8]),
        _ => code.push(0xC0 | field | random.below(8) as u8),
    }
    code.extend(random.next().to_le_bytes());
    code.truncate(15);
    let instruction = iced_x86::Decoder::new(bits, &code, 0).decode();
    code.truncate(if instruction.is_invalid() { code.len() } else { instruction.len() });
    code
}

/// Whether the manual says what it does: not RDRAND and RDSEED, nor SHLD and SHRD of words, whose count may be too large.
fn is_defined(code: &[u8]) -> bool {
    let Some(at) = code.iter().position(|&b| b == 0x0F) else { return true };
    match code.get(at + 1) {
        Some(0xC7) => false,
        Some(0xA4 | 0xA5 | 0xAC | 0xAD) => !code[..at].contains(&0x66),
        _ => true,
    }
}

/// Both engines on single instructions, on every model: the same exception or the same result. `PARAVANE_MODEL_SEEDS` for more,
/// `PARAVANE_MODEL_FIRST` for others.
#[test]
fn engines_agree_on_every_model() {
    let number =
        |name: &str, default| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    let first: u64 = number("PARAVANE_MODEL_FIRST", 1);
    for (model, start) in [
        ("i486", Start::Protected),
        ("pentium3", Start::Pae),
        ("x86-64", Start::Long),
        ("x86-64-v2", Start::Long),
        ("x86-64-v3", Start::Compat),
    ] {
        let mut beds = [false, true].map(|translated| Bed::of_model(model, start, translated));
        let mut clean = vec![0; 0x22_0000];
        beds[0].mem.read(paravane_memory::PhysAddr(0), &mut clean).expect("RAM");
        for seed in first..first + number("PARAVANE_MODEL_SEEDS", 120) {
            let code = any_instruction(&mut Random(seed * 2 + 1), if start == Start::Long { 64 } else { 32 });
            if !is_defined(&code) {
                continue;
            }
            let note = format!("{model} seed {seed} {code:02x?}");
            let results = beds.each_mut().map(|bed| {
                let mut random = Random(seed * 2 + 1);
                bed.put(0, &clean);
                bed.put(CODE, &[0xF4; 64]);
                bed.put(CODE, &code);
                bed.reset();
                for r in [gpr::RAX, gpr::RCX, gpr::RDX, gpr::RBX, gpr::RBP, gpr::R8, 9, 10] {
                    bed.cpu.gpr[r] = random.next() >> random.below(64);
                }
                bed.cpu.gpr[gpr::RSI] = DATA + 0x100;
                bed.cpu.gpr[gpr::RDI] = DATA + 0x200;
                for at in (0..0x400).step_by(8) {
                    bed.put64(DATA + at, random.next());
                }
                for byte in &mut bed.cpu.fpu.0[160..416] {
                    *byte = random.next() as u8;
                }
                bed.cpu.rflags |= random.next() & flags::STATUS;
                bed.cpu.rip = CODE;
                bed.flush();
                let exit = bed.run_for(Duration::from_millis(100), &note);
                // Control, status and tag words, MXCSR, the registers.
                let image = &bed.cpu.fpu.0;
                let vectors = [&image[..5], &image[24..28], &image[32..416], &image[576..]].concat();
                (exit, remains(bed), vectors)
            });
            let [a, b] = &results;
            if a.0 == Exit::Stop || b.0 == Exit::Stop {
                continue;
            }
            assert_eq!((a.0, &a.1.0), (b.0, &b.1.0), "{note}");
            assert_eq!(a.2, b.2, "{note}");
            if let Some(i) = (0..clean.len()).find(|&i| a.1.1[i] != b.1.1[i]) {
                panic!("{note}: memory at {i:#x}: {:x?} {:x?}", &a.1.1[i..i + 8], &b.1.1[i..i + 8]);
            }
        }
    }
}

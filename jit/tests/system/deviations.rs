//! What `cpu/DEVIATIONS.md` says and no other module shows: each test holds one row of its tables.
//!
//! Invariant of the unsafe lines: the host's instructions here use registers, which they name, and one local.

use crate::bed::{CODE, DATA, Start, TSS, both, pte, sel};
use crate::tasks::{TSS2, second_task};
use paravane_cpu::{Exit, gpr};

/// Every test that the tables name exists.
#[test]
fn the_tables_name_tests_that_exist() {
    let modules = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/system");
    let text = include_str!("../../../cpu/DEVIATIONS.md");
    let rows = text.lines().filter(|l| l.starts_with("| ") && !l.starts_with("| what"));
    let mut named = 0;
    for row in rows {
        let cell = row.trim_end_matches('|').rsplit('|').next().expect("a cell").trim();
        // In parentheses stand tests that are elsewhere.
        let name = cell.strip_prefix('`').and_then(|c| c.strip_suffix('`'));
        let Some((module, test)) = name.and_then(|n| n.split_once("::")) else { continue };
        let source = std::fs::read_to_string(format!("{modules}/{module}.rs")).expect(module);
        assert!(source.contains(&format!("fn {test}()")), "{cell}");
        named += 1;
    }
    assert!(named > 15, "{named} rows");
}

#[test]
fn pointers_of_an_error_unmasked_later() {
    both(Start::Long, |bed| {
        bed.put16(DATA + 8, 0x37B);
        bed.finish(&program!(64: "mov esi, 0x200000", "fninit", "fld1", "fldz", "fdivp", "fldcw [rsi + 8]", "fnstsw ax", "fnstenv [rsi + 0x100]"));
        assert_ne!(bed.cpu.gpr[gpr::RAX] & 0x80, 0, "the error is pending");
        // Translated code has them right where the host's processor has: FDIVP, 6F9H.
        let pointers = [12, 16, 20].map(|i| bed.get32(DATA + 0x100 + i));
        let right = [CODE as u32 + 11, 0x6F9 << 16 | u32::from(sel::CODE64), 0];
        assert!([[0; 3], right].contains(&pointers), "{pointers:x?}");
    });
}

#[test]
fn approximations_are_the_hosts() {
    both(Start::Long, |bed| {
        bed.finish(&program!(64: "mov esi, 0x200000", "fninit", "fld1", "fsin", "fstp qword ptr [rsi]", "mov eax, 0x40400000", "movd xmm0, eax", "rcpss xmm1, xmm0", "movd ebx, xmm1"));
        let (sine, third): (f64, u32);
        let three = 3f32;
        // SAFETY: arithmetic on registers and one local.
        unsafe {
            let mut result = 0f64;
            std::arch::asm!("fld1", "fsin", "fstp qword ptr [{}]", in(reg) &raw mut result, out("st(0)") _, options(nostack));
            std::arch::asm!("movd {x}, {v:e}", "rcpss {x}, {x}", "movd {v:e}, {x}", v = inout(reg) three.to_bits() => third, x = out(xmm_reg) _, options(nostack, nomem));
            sine = result;
        }
        assert_eq!((bed.get64(DATA), bed.cpu.gpr[gpr::RBX] as u32), (sine.to_bits(), third));
    });
}

#[test]
fn caches_lose_nothing() {
    both(Start::Long, |bed| {
        bed.finish(&program!(64: "mov esi, 0x200000", "mov dword ptr [rsi], 0x1234", "invd", "mov eax, [rsi]", "wbinvd", "clflush [rsi]", "add eax, [rsi]",
            "mov rcx, cr0", "bts rcx, 30", "mov cr0, rcx", "mov dword ptr [rsi], 1", "add eax, [rsi]", "mov rbx, cr0"));
        assert_eq!(bed.cpu.gpr[gpr::RAX], 0x2469);
        assert_ne!(bed.cpu.gpr[gpr::RBX] & 1 << 30, 0);
        // All of memory uncacheable by MTRR makes no difference, and the register says what was written.
        bed.reset();
        bed.finish(&program!(64: "mov ecx, 0x2FF", "mov eax, 0x800", "xor edx, edx", "wrmsr", "rdmsr", "mov ebx, [0x200000]"));
        assert_eq!((bed.cpu.gpr[gpr::RAX], bed.cpu.gpr[gpr::RBX]), (0x800, 1));
    });
}

#[test]
fn branch_records_stay_empty() {
    both(Start::Long, |bed| {
        bed.finish(&program!(64: "mov ecx, 0x1D9", "mov eax, 1", "xor edx, edx", "wrmsr", "jmp 2f", "2: rdmsr", "mov ebx, eax", "mov ecx, 0x1DB", "rdmsr", "mov esi, eax", "mov ecx, 0x1DC", "rdmsr", "or esi, eax"));
        assert_eq!((bed.cpu.gpr[gpr::RBX], bed.cpu.gpr[gpr::RSI]), (1, 0));
    });
}

#[test]
fn misc_enable_is_memory() {
    both(Start::Long, |bed| {
        // Bit 22 would limit CPUID to leaf 3.
        bed.finish(&program!(64: "mov ecx, 0x1A0", "rdmsr", "bts eax, 22", "wrmsr", "rdmsr", "mov ebx, eax", "shr ebx, 22", "mov esi, ebx", "xor eax, eax", "cpuid"));
        assert_eq!(bed.cpu.gpr[gpr::RSI] & 1, 1);
        assert!(bed.cpu.gpr[gpr::RAX] > 3);
    });
}

#[test]
fn speculation_controls_are_accepted() {
    both(Start::Long, |bed| {
        bed.finish(&program!(64: "mov ecx, 0x48", "mov eax, 7", "xor edx, edx", "wrmsr", "rdmsr", "mov ebx, eax", "mov ecx, 0x49", "mov eax, 1", "wrmsr"));
        assert_eq!(bed.cpu.gpr[gpr::RBX], 7);
        bed.faults(&program!(64: "mov ecx, 0x49"; "rdmsr"), 13, 0);
    });
}

#[test]
fn the_old_tss_is_written_whole() {
    both(Start::Protected, |bed| {
        second_task(bed);
        bed.put(CODE + 0x800, &[0xF4]);
        bed.cpu.tr.limit = 0x20;
        bed.cpu.gpr[gpr::RDI] = 0x1234;
        bed.run(&program!(32: ".byte 0xEA, 0, 0, 0, 0, 0x68, 0"));
        assert_eq!((bed.get32(TSS + 32), bed.get32(TSS + 68)), (CODE as u32 + 7, 0x1234));
    });
}

#[test]
fn bad_pdptes_in_a_tss() {
    both(Start::Pae, |bed| {
        second_task(bed);
        bed.put32(TSS2 + 28, crate::bed::SPARE as u32);
        bed.put64(crate::bed::SPARE, crate::bed::PD | pte::P | pte::RW); // RW is reserved
        bed.load(&program!(32: ".byte 0xEA, 0, 0, 0, 0, 0x68, 0"));
        // Neither the new task's segments nor any handler can be reached.
        assert_eq!(bed.go(), Exit::TripleFault);
        assert_eq!((bed.cpu.tr.selector, bed.cpu.pdptes), (0x68, [0; 4]));
        assert_eq!(bed.get32(TSS + 32), CODE as u32 + 7);
    });
}

#[test]
fn sti_holds_nmis_back() {
    both(Start::Long, |bed| {
        bed.cpu.shadow = paravane_cpu::Shadow::Sti;
        bed.attention.set(paravane_cpu::Attention::NMI);
        bed.run(&program!(64: "nop", "nop"));
        assert_eq!((bed.taken().vector, bed.taken().rip), (2, CODE + 1));
    });
}

#[test]
fn dr6_shows_enabled_breakpoints_only() {
    both(Start::Long, |bed| {
        // DR0 and DR1 at one address, DR1 enabled.
        bed.cpu.dr[0] = DATA;
        bed.cpu.dr[1] = DATA;
        bed.cpu.dr[7] = 0x400 | 1 << 2 | 0b0011 << 16 | 0b0011 << 20;
        bed.run(&program!(64: "mov al, [0x200000]", "nop"));
        assert_eq!((bed.taken().vector, bed.cpu.dr[6] & 0xF), (1, 2));
    });
}

#[test]
fn push_of_a_selector_writes_two_bytes() {
    both(Start::Protected, |bed| {
        // PUSH DS and PUSH FS by their bytes: the assembler has 16-bit ones in mind.
        bed.finish(&program!(32: "mov dword ptr [esp - 4], -1", ".byte 0x1E", "pop eax", "mov dword ptr [esp - 4], -1", ".byte 0x0F, 0xA0", "pop ebx"));
        let want = 0xFFFF_0000 | u64::from(sel::DATA);
        assert_eq!((bed.cpu.gpr[gpr::RAX], bed.cpu.gpr[gpr::RBX]), (want, want));
    });
}

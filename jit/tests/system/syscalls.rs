//! SYSCALL, SYSRET, SYSENTER, SYSEXIT and canonical addresses (SDM 2B; 3A, 5.8.7 and 5.8.8; 1, 3.3.7.1).

use crate::bed::{Bed, CODE, DATA, HANDLERS, PML4, SPARE, STACK, Start, USER_STACK, both, pf, pte};
use paravane_cpu::{SegReg, cr4, flags, gpr};

fn set_up(bed: &mut Bed) {
    bed.cpu.msr.star = 0x0023_0010 << 32;
    bed.cpu.msr.lstar = CODE + 0x800;
    bed.cpu.msr.cstar = CODE + 0x900;
    bed.cpu.msr.sfmask = flags::DF | flags::CF;
    bed.cpu.msr.sysenter_cs = 0x10;
    bed.cpu.msr.sysenter_esp = STACK;
    bed.cpu.msr.sysenter_eip = CODE + 0x800;
    bed.gate(0x50, 14, 3, HANDLERS + 0x500);
}

#[test]
fn syscall_and_sysret() {
    both(Start::Long, |bed| {
        set_up(bed);
        bed.put(CODE + 0x800, program!(64: "inc r8", "mov r9, r11", "mov edx, ss", "sysretq").bytes);
        bed.user();
        bed.run(
            &program!(64: "mov ebx, 300", "2: stc", "syscall", "adc r10, 0", "dec ebx", "jnz 2b", "int 0x50"),
        );
        let (t, g) = (bed.taken(), bed.cpu.gpr);
        assert_eq!((t.vector, g[gpr::R8], g[10], t.cs, t.ss, t.sp), (0x50, 300, 300, 0x33, 0x2B, USER_STACK));
        assert_eq!((g[9] & flags::CF, g[gpr::RDX], g[gpr::RCX]), (1, 0x18, CODE + 8));
    });
}

/// R11 has the flags of the instruction before, also where that left what they come from.
#[test]
fn syscall_saves_the_flags_before_it() {
    both(Start::Long, |bed| {
        set_up(bed);
        bed.put(CODE + 0x800, program!(64: "mov r9, r11", "sysretq").bytes);
        bed.user();
        bed.run(&program!(64: "mov ebx, 100", "2:", "mov eax, 1", "sub eax, 2", "syscall", "mov r12, r9",
            "mov eax, 0x7FFFFFFF", "add eax, 1", "syscall", "mov r13, r9",
            "mov eax, 5", "cmp eax, 5", "syscall", "mov r14, r9",
            "mov eax, 0x81", "and al, 0x80", "syscall", "pushfq", "pop r15", "dec ebx", "jnz 2b", "int 0x50"));
        let status = |value: u64| value & flags::STATUS;
        let g = bed.cpu.gpr;
        assert_eq!(status(g[12]), flags::CF | flags::SF | flags::AF | flags::PF);
        assert_eq!(status(g[13]), flags::OF | flags::SF | flags::AF | flags::PF);
        assert_eq!(status(g[14]), flags::ZF | flags::PF);
        assert_eq!(status(g[9]) & !flags::AF, flags::SF);
        assert_eq!(status(g[15]) & !flags::AF, flags::SF);
    });
}

/// The kernel's code is entered anew, returns in place, and the program misses a page before it jumps to new code.
#[test]
fn behind_sysret_code_is_the_programs() {
    both(Start::Long, |bed| {
        set_up(bed);
        bed.cpu.msr.sfmask |= flags::IF;
        bed.put(CODE + 0x800, program!(64: "sldt eax", "sysretq").bytes);
        bed.user();
        bed.cpu.gpr[gpr::RSI] = DATA;
        let program = program!(64: "mov ebx, 5", "2: syscall", "mov rax, [rsi]", "add rsi, 0x1000", "dec ebx", "jz 3f",
            "jmp 2b", "3:"; "cli");
        bed.run(&program);
        let t = bed.taken();
        assert_eq!((t.vector, t.rip, bed.cpu.gpr[gpr::RBX]), (13, CODE + program.at, 0));
    });
}

#[test]
fn syscall_without_sce_is_undefined() {
    both(Start::Long, |bed| {
        set_up(bed);
        bed.cpu.efer &= !1;
        bed.user();
        bed.faults(&program!(64: "nop"; "syscall"), 6, None);
    });
}

#[test]
fn sysret_to_compatibility_mode() {
    both(Start::Long, |bed| {
        set_up(bed);
        bed.put(CODE + 0xA00, program!(32: ".byte 0x40", "int 0x50").bytes);
        bed.run(&program!(64: "mov esp, 0x78000", "xor eax, eax", "mov ecx, 0x100A00", "mov r11d, 0x202", "sysret"));
        let t = bed.taken();
        assert_eq!((t.vector, t.cs, t.ss, bed.cpu.gpr[gpr::RAX]), (0x50, 0x23, 0x2B, 1));
        bed.reset();
        set_up(bed);
        bed.faults(&program!(64: "mov rcx, 0x800000000000"; "sysretq"), 13, 0);
        bed.user();
        bed.faults(&program!(64: "nop"; "sysretq"), 13, 0);
    });
}

#[test]
fn sysenter_and_sysexit() {
    both(Start::Pae, |bed| {
        set_up(bed);
        bed.put(CODE + 0x800, program!(32: "inc esi", "mov edi, esp", "mov ecx, ebp", "sysexit").bytes);
        bed.user();
        bed.run(&program!(32: "mov ebx, 200", "2: mov ebp, esp", ".byte 0xBA", ".long 3f - 770b + 0x100000", "sysenter", "3: dec ebx", "jnz 2b", "int 0x50"));
        let (t, g) = (bed.taken(), bed.cpu.gpr);
        assert_eq!((t.vector, g[gpr::RSI], t.cs, t.ss, t.sp), (0x50, 200, 0x23, 0x2B, USER_STACK));
        assert_eq!(g[gpr::RDI], STACK);
        bed.reset();
        bed.user();
        bed.faults(&program!(32: "nop"; "sysenter"), 13, 0);
        bed.faults(&program!(32: "nop"; "sysexit"), 13, 0);
        // SYSCALL does not exist outside 64-bit mode on these processors.
        bed.faults(&program!(32: "nop"; "syscall"), 6, None);
    });
    both(Start::Long, |bed| {
        set_up(bed);
        bed.put(CODE + 0x800, program!(64: "inc r8", "mov rcx, rbp", "sysexitq").bytes);
        bed.user();
        bed.run(&program!(64: "mov ebx, 200", "2: mov rbp, rsp", "lea rdx, [rip + 3f]", "sysenter", "3: dec ebx", "jnz 2b", "int 0x50"));
        let t = bed.taken();
        assert_eq!((t.vector, bed.cpu.gpr[gpr::R8], t.cs, t.ss), (0x50, 200, 0x33, 0x3B));
    });
}

/// SDM 2B, RDFSBASE to WRGSBASE: flags stay, 32-bit forms zero the upper half, a base that is not canonical is #GP(0).
#[test]
fn bases_of_fs_and_gs() {
    both(Start::Long, |bed| {
        bed.cpu.cr4 |= cr4::FSGSBASE;
        bed.put64(DATA, 0x11);
        bed.put64(DATA + 0x1000, 0x22);
        bed.finish(&program!(64: "mov ecx, 20", "mov r8, 0xFFFFFFFF00000000", "mov r14d, 0x200000", "lea rax, [r14 + 0x1000]",
            "2: cmp rcx, 10", "wrfsbase r14", "wrgsbase rax", "adc rbx, 0", "add rdx, fs:[0]", "add rdi, gs:[0]",
            "rdfsbase r15", "rdgsbase rsi", "xchg rax, r14", "dec ecx", "jnz 2b",
            "mov r9, -1", "wrgsbase r9d", "rdgsbase r10", "rdfsbase r8d"));
        let r = bed.cpu.gpr;
        assert_eq!((r[gpr::RBX], r[gpr::RDX], r[gpr::RDI]), (9, 10 * 0x33, 10 * 0x33));
        assert_eq!((r[15], r[gpr::RSI]), (DATA + 0x1000, DATA));
        assert_eq!((r[10], r[gpr::R8]), (0xFFFF_FFFF, DATA + 0x1000));
        assert_eq!(bed.cpu.segment(SegReg::Fs).base, DATA + 0x1000);
        bed.faults(&program!(64: "mov rax, 0x800000000000"; "wrfsbase rax"), 13, 0);
        assert_eq!(bed.cpu.segment(SegReg::Fs).base, DATA + 0x1000);
    });
    both(Start::Long, |bed| {
        bed.faults(&program!(64: "nop"; "rdgsbase rax"), 6, None);
    });
}

#[test]
fn swapgs() {
    both(Start::Long, |bed| {
        bed.cpu.seg[SegReg::Gs as usize].base = DATA;
        bed.cpu.msr.kernel_gs_base = DATA + 0x1000;
        bed.put64(DATA, 1);
        bed.put64(DATA + 0x1000, 2);
        bed.finish(&program!(64: "mov ecx, 21", "2: swapgs", "add rax, gs:[0]", "dec ecx", "jnz 2b"));
        assert_eq!(bed.cpu.gpr[gpr::RAX], 11 * 2 + 10);
        assert_eq!((bed.cpu.segment(SegReg::Gs).base, bed.cpu.msr.kernel_gs_base), (DATA + 0x1000, DATA));
        bed.user();
        bed.faults(&program!(64: "nop"; "swapgs"), 13, 0);
    });
}

#[test]
fn non_canonical_data() {
    both(Start::Long, |bed| {
        for _ in 0..2 {
            bed.faults(&program!(64: "mov rsi, 0x800000000000"; "mov rax, [rsi]"), 13, 0);
            bed.faults(&program!(64: "mov rsi, 0x8000000000200000"; "mov [rsi], rax"), 13, 0);
            bed.faults(&program!(64: "mov rsi, 0xFFFF000000200000"; "movups xmm0, [rsi]"), 13, 0);
            bed.faults(&program!(64: "mov rbp, 0x1000000200000"; "mov rax, [rbp]"), 12, 0);
            bed.faults(
                &program!(64: "mov esp, 0x70000", "mov rbx, 0x1000000000000"; "mov rax, [rsp + rbx]"),
                12,
                0,
            );
            // Overrides by DS and SS do not count.
            bed.faults(&program!(64: "mov rbp, 0x1000000200000"; ".byte 0x3E", "mov rax, [rbp]"), 12, 0);
            bed.faults(&program!(64: "mov rsi, 0x1000000200000"; ".byte 0x36", "mov rax, [rsi]"), 13, 0);
            bed.faults(&program!(64: "mov rsi, 0x7FFFFFFFFFF9"; "mov rax, [rsi + 7]"), 13, 0);
            bed.faults(&program!(64: "mov rdi, 0x800000000000", "mov al, [0x200000]"; "stosb"), 13, 0);
            bed.faults(&program!(64: "mov rsi, 0x800000000000"; "lock inc qword ptr [rsi]"), 13, 0);
            // The address below the hole is canonical: #PF.
            bed.page_faults(&program!(64: "mov rsi, 0x7FFFFFFFFFF8"; "mov rax, [rsi]"), 0x7FFF_FFFF_FFF8, 0);
            bed.page_faults(
                &program!(64: "mov rsi, 0xFFFF800000000000"; "mov [rsi], rax"),
                0xFFFF_8000_0000_0000,
                pf::W,
            );
        }
    });
}

/// Code that runs on past the lower half's last byte: #GP there. Past the upper half's it goes on at 0.
#[test]
fn code_at_the_ends_of_both_halves() {
    both(Start::Long, |bed| {
        let (pdpt, pd, pt) = (SPARE, SPARE + 0x1000, SPARE + 0x2000);
        bed.put64(PML4 + 255 * 8, pdpt | pte::ALL);
        bed.put64(PML4 + 511 * 8, pdpt | pte::ALL);
        bed.put64(pdpt + 511 * 8, pd | pte::ALL);
        bed.put64(pd + 511 * 8, pt | pte::ALL);
        bed.put64(pt + 511 * 8, DATA | pte::ALL);
        let end = DATA + 0x1000;
        bed.put(end - 3, &[0x90, 0x90, 0x90]);
        let jump = program!(64: "jmp rbx");
        let start = bed.cpu.clone();
        let go = |bed: &mut Bed, at: u64| {
            for _ in 0..2 {
                bed.cpu = start.clone();
                bed.cpu.gpr[gpr::RBX] = at;
                bed.run(&jump);
            }
        };
        go(bed, 0x7FFF_FFFF_FFFD);
        let t = bed.taken();
        assert_eq!((t.vector, t.error, t.rip), (13, Some(0), 1 << 47));
        // An instruction of which a part lies beyond.
        bed.put(end - 3, &[0x90, 0xB8, 1]);
        go(bed, 0x7FFF_FFFF_FFFD);
        let t = bed.taken();
        assert_eq!((t.vector, t.error, t.rip), (13, Some(0), (1 << 47) - 2));
        // MOV EBX, 4030201H over the end; HLT.
        bed.put(end - 3, &[0x90, 0xBB, 1]);
        bed.put(0, &[2, 3, 4, 0xF4]);
        go(bed, 0xFFFF_FFFF_FFFF_FFFD);
        assert_eq!((bed.cpu.rip, bed.cpu.gpr[gpr::RBX]), (4, 0x0403_0201));
        // A loop over it.
        bed.put(end - 2, &[0xFF, 0xC1]); // INC ECX
        bed.put(0, &[0x83, 0xF9, 9, 0x75, 0xF9, 0xF4]); // CMP ECX, 9; JNZ -7; HLT
        go(bed, 0xFFFF_FFFF_FFFF_FFFE);
        assert_eq!((bed.cpu.rip, bed.cpu.gpr[gpr::RCX]), (6, 9));
    });
}

#[test]
fn non_canonical_stacks() {
    both(Start::Long, |bed| {
        bed.ist(12);
        bed.faults(&program!(64: "mov rsp, 0x800000000004"; "pop rax"), 12, 0);
        bed.faults(&program!(64: "mov rsp, 0xFFFF800000000000"; "push rax"), 12, 0);
        bed.faults(&program!(64: "mov rsp, 0xFFFF800000000000"; "call 2f", "2:"), 12, 0);
        bed.faults(&program!(64: "mov rsp, 0x1000000000000"; "ret"), 12, 0);
        bed.faults(&program!(64: "mov rbp, 0x1000000000000"; "leave"), 12, 0);
        bed.faults(&program!(64: "mov rsp, 0x1000000000000"; "popfq"), 12, 0);
        bed.faults(&program!(64: "mov rsp, 0x1000000000000"; "pushfq"), 12, 0);
    });
}

#[test]
fn non_canonical_branch_targets_fault_at_the_branch() {
    both(Start::Long, |bed| {
        bed.faults(&program!(64: "mov rax, 0x800000000000"; "jmp rax"), 13, 0);
        bed.faults(&program!(64: "mov rax, 0x8000000000100000", "xor ebx, ebx"; "call rax"), 13, 0);
        assert_eq!(bed.taken().sp, STACK, "nothing was pushed");
        bed.faults(&program!(64: "mov rax, 0x1000000000000", "push rax"; "ret"), 13, 0);
        assert_eq!(bed.taken().sp, STACK - 8);
        bed.faults(&program!(64: "mov rax, 0x1000000000000", "push rbx", "push rax"; "ret 16"), 13, 0);
        assert_eq!(bed.taken().sp, STACK - 16);
        bed.put64(DATA, 0x9000_0000_0000_0000);
        bed.faults(&program!(64: "mov esi, 0x200000"; "jmp [rsi]"), 13, 0);
        bed.faults(&program!(64: "mov esi, 0x200000"; "call [rsi]"), 13, 0);
        assert_eq!(bed.taken().sp, STACK);
        // The return address would be written over the operand.
        let over = program!(64: "mov rax, 0x9000000000000000", "push rax", "pop rbx"; "call [rsp - 8]");
        bed.faults(&over, 13, 0);
        assert_eq!(bed.taken().sp, STACK);
    });
}

/// What SYSCALL and SYSRET load, whatever the tables say: selectors by arithmetic, flags by mask (SDM 2B, SYSCALL, SYSRET).
#[test]
fn selectors_and_flags_of_syscall() {
    both(Start::Long, |bed| {
        set_up(bed);
        // RPL bits in STAR: SYSCALL forces them to zero, SYSRET to three.
        bed.cpu.msr.star = 0x0020_0013 << 32;
        bed.cpu.msr.sfmask = flags::IF | flags::IOPL | flags::NT | flags::AC | flags::CF;
        bed.put(CODE + 0x800, program!(64: "pushfq", "pop r8", "mov r9d, cs", "mov r10d, ss", "mov rbx, r11", "mov r11, -1", "sysretq").bytes);
        bed.user();
        bed.cpu.rflags |= flags::IF | flags::ID | flags::AC | flags::NT;
        bed.run(&program!(64: "stc", "std", "syscall", "cld", "int 0x50"));
        let (t, g) = (bed.taken(), bed.cpu.gpr);
        assert_eq!((g[9], g[10], t.cs, t.ss), (0x10, 0x18, 0x33, 0x2B));
        assert_eq!(
            g[gpr::R8]
                & (flags::IF | flags::IOPL | flags::NT | flags::AC | flags::CF | flags::DF | flags::ID),
            flags::DF | flags::ID
        );
        assert_eq!(
            g[gpr::RBX] & (flags::IF | flags::NT | flags::AC | flags::CF | flags::DF),
            flags::IF | flags::NT | flags::AC | flags::CF | flags::DF
        );
        // All of R11 but RF, VM and reserved bits; TF among them: #DB behind the next instruction.
        assert_eq!((t.vector, t.flags & 0xFF_FFFF), (1, 0x3C_7BD7 & !flags::DF | flags::TF));
    });
}

#[test]
fn where_system_calls_do_not_exist() {
    both(Start::Long, |bed| {
        set_up(bed);
        bed.cpu.efer &= !1;
        bed.faults(&program!(64: "nop"; "sysretq"), 6, None);
    });
    for start in [Start::Compat, Start::Protected] {
        both(start, |bed| {
            set_up(bed);
            bed.faults(&program!(32: "nop"; "syscall"), 6, None);
            bed.faults(&program!(32: "nop"; "sysret"), 6, None);
        });
    }
    both(Start::Real, |bed| {
        bed.cpu.msr.sysenter_cs = 0x10;
        bed.faults(&program!(16: "nop"; "sysenter"), 13, None);
        bed.faults(&program!(16: "nop"; "sysexit"), 13, None);
    });
}

/// SYSENTER from compatibility mode enters 64-bit mode; SYSEXIT goes to either. A null IA32_SYSENTER_CS is #GP(0).
#[test]
fn sysenter_and_sysexit_in_long_mode() {
    both(Start::Compat, |bed| {
        set_up(bed);
        bed.put(CODE + 0x800, program!(64: "mov r8, -1", "mov r9d, cs", "mov r10, rsp", "pushfq", "pop r11", "mov rcx, 0x78000", "mov edx, 0x100A00", "sysexit").bytes);
        bed.put(CODE + 0xA00, program!(32: "mov eax, 1", ".byte 0x40", "int 0x50").bytes);
        bed.user();
        bed.cpu.rflags |= flags::IF;
        bed.run(&program!(32: "sysenter"));
        let (t, g) = (bed.taken(), bed.cpu.gpr);
        assert_eq!((g[gpr::R8], g[9], g[10], g[11] & flags::IF), (u64::MAX, 0x10, STACK, 0));
        // The 32-bit code segment is 16 above, its stack 24 above IA32_SYSENTER_CS.
        assert_eq!((t.vector, t.cs, t.ss, t.sp, g[gpr::RAX]), (0x50, 0x23, 0x2B, USER_STACK, 2));
        for cs in [0, 3] {
            bed.reset();
            set_up(bed);
            bed.cpu.msr.sysenter_cs = cs;
            bed.faults(&program!(32: "nop"; "sysenter"), 13, 0);
            bed.faults(&program!(32: "nop"; "sysexit"), 13, 0);
        }
    });
    both(Start::Long, |bed| {
        set_up(bed);
        bed.faults(&program!(64: "mov rdx, 0x800000000000", "xor ecx, ecx"; "sysexitq"), 13, 0);
        bed.faults(&program!(64: "mov rcx, 0x800000000000", "xor edx, edx"; "sysexitq"), 13, 0);
        bed.user();
        bed.faults(&program!(64: "nop"; "sysexitq"), 13, 0);
    });
}

#[test]
fn segment_bases() {
    both(Start::Long, |bed| {
        bed.faults(&program!(64: "nop"; "rdfsbase rax"), 6, None);
        bed.cpu.cr4 |= paravane_cpu::cr4::FSGSBASE;
        bed.put64(DATA, 77);
        bed.finish(&program!(64: "mov eax, 0x200000", "wrgsbase rax", "mov rbx, gs:[0]", "mov rcx, -1", "wrfsbase ecx", "rdfsbase rdx", "rdgsbase esi"));
        let g = bed.cpu.gpr;
        assert_eq!((g[gpr::RBX], g[gpr::RDX], g[gpr::RSI]), (77, 0xFFFF_FFFF, DATA));
        bed.faults(&program!(64: "mov rax, 0x800000000000"; "wrgsbase rax"), 13, 0);
    });
    both(Start::Compat, |bed| {
        bed.cpu.cr4 |= paravane_cpu::cr4::FSGSBASE;
        bed.faults(&program!(32: ; ".byte 0xF3, 0x0F, 0xAE, 0xC0"), 6, None);
        bed.faults(&program!(32: ; ".byte 0x0F, 0x01, 0xF8"), 6, None); // SWAPGS
    });
}

/// The plain case, over and over: flags travel through R11 one by one, IF is clear in between, and privilege
/// follows: what either level may not touch is refused with its own error code (SDM 2B, SYSCALL and SYSRET; 3A, 4.7).
#[test]
fn levels_follow_system_calls() {
    for masked in
        [flags::IF, flags::IF | flags::CF | flags::OF, flags::STATUS | flags::IF | flags::DF | flags::TF]
    {
        for image in [0x202, 0xAD7, 0x203, 0x206, 0x212, 0x242, 0x282, 0xA02, 0x2] {
            both(Start::Long, |bed| {
                set_up(bed);
                bed.cpu.msr.sfmask = masked;
                let kernel = program!(64: "pushfq", "pop r8", "mov r9, r11", "mov esi, cs", "mov edi, ss", "mov r11, r14", "sysretq");
                bed.put(CODE + 0x800, kernel.bytes);
                bed.user();
                bed.cpu.gpr[14] = image;
                bed.run(&program!(64: "mov ebx, 40", "2: xor eax, eax", "stc", "syscall", "pushfq", "pop r13", "mov r15d, cs", "dec ebx", "jnz 2b", "int 0x50"));
                let (t, g) = (bed.taken(), bed.cpu.gpr);
                assert_eq!((t.vector, t.cs, t.ss, t.sp), (0x50, 0x33, 0x2B, USER_STACK));
                // XOR leaves AF undefined.
                let before = flags::ZF | flags::PF | flags::CF | flags::FIXED | image & flags::IF;
                assert_eq!(g[9] & !flags::AF, before, "R11");
                assert_eq!(g[gpr::R8] & !flags::AF, before & !masked, "flags at CPL 0 with {masked:#x}");
                assert_eq!((g[gpr::RSI], g[gpr::RDI], g[15]), (0x10, 0x18, 0x33));
                assert_eq!(g[13], image, "flags at CPL 3");
            });
        }
    }
    both(Start::Long, |bed| {
        set_up(bed);
        bed.cpu.msr.sfmask = flags::IF;
        bed.map(DATA, DATA, pte::P | pte::RW);
        bed.put(CODE + 0x800, program!(64: "inc dword ptr [0x200000]", "sysretq").bytes);
        bed.user();
        bed.run(&program!(64: "mov ebx, 20", "2: syscall", "dec ebx", "jnz 2b", "mov eax, [0x200000]"));
        assert_eq!((bed.taken().vector, bed.taken().error, bed.get32(DATA)), (14, Some(pf::P | pf::U), 20));
    });
    // An interrupt that waits for IF is taken behind SYSRET, at CPL 3.
    both(Start::Long, |bed| {
        set_up(bed);
        bed.cpu.msr.sfmask = flags::IF;
        bed.put(
            CODE + 0x800,
            program!(64: "test ebx, ebx", "jnz 2f", "out 0x80, al", "2: inc r8", "sysretq").bytes,
        );
        bed.gate(0x60, 14, 0, HANDLERS + 0x600);
        bed.interrupt_at_port(0x60);
        bed.user();
        bed.cpu.rflags |= flags::IF;
        bed.run(&program!(64: "mov ebx, 20", "2: syscall", "dec ebx", "jns 2b", "inc r8", "int 0x50"));
        let t = bed.taken();
        assert_eq!((t.vector, t.cs, t.sp, bed.cpu.gpr[gpr::R8]), (0x60, 0x33, USER_STACK, 21));
    });
}

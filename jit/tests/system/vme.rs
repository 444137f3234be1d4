//! Virtual interrupts: CR4.VME and CR4.PVI (SDM 3B, 20.3 and 20.4; tables 20-2 and 20-3).

use crate::bed::{Bed, CODE, HANDLERS, Start, TSS, both};
use crate::tasks::v8086_with;
use paravane_cpu::{cr4, flags, gpr};

/// Where the program's own handlers are: A000:0 and on, in its vector table at 0.
const OWN: u64 = 0xA_0000;

/// VME on; INT 21H and INT 10H have handlers in the program's vector table; the redirection bitmap sends INT 10H to the
/// monitor and INT 21H to the program.
fn vme(bed: &mut Bed) {
    bed.reset();
    bed.cpu.cr4 |= cr4::VME;
    bed.put16(TSS + 102, 136);
    bed.put(TSS + 104, &[0; 32]);
    bed.put(TSS + 104 + 0x10 / 8, &[1 << (0x10 % 8)]);
    bed.put(TSS + 136, &[0xFF; 0x40]);
    bed.cpu.tr.limit = 136 + 0x3F;
    bed.put32(0x21 * 4, 0xA000_0000);
    bed.put32(0x10 * 4, 0xA000_0000);
    bed.gate(0x10, 14, 3, HANDLERS + 0x100);
    bed.gate(0x30, 14, 3, HANDLERS + 0x300);
    bed.put(TSS + 104 + 0x30 / 8, &[1 << (0x30 % 8)]);
}

fn run(bed: &mut Bed, eflags: u64, program: &crate::bed::Program) -> crate::bed::Taken {
    vme(bed);
    v8086_with(bed, eflags, program.bytes);
    bed.taken()
}

const IOPL3: u64 = flags::IOPL;

#[test]
fn the_feature_is_offered() {
    both(Start::Protected, |bed| {
        bed.finish(&program!(32: "mov eax, 1", "cpuid", "mov eax, cr4", "or eax, 3", "mov cr4, eax"));
        assert_ne!(bed.cpu.gpr[gpr::RDX] & 2, 0);
        assert_eq!(bed.cpu.cr4 & 3, 3);
    });
}

#[test]
fn interrupts_go_to_the_programs_own_table() {
    for start in [Start::Protected, Start::Pae, Start::Paged32] {
        both(start, |bed| {
            // Method 6: IOPL below 3. FLAGS are pushed with VIF for IF and IOPL 3; VIF is cleared.
            bed.put(OWN, program!(16: "pushf", "pop dx", "pop ax", "pop bx", "pop cx", "hlt").bytes);
            let t = run(bed, flags::VIF | flags::CF, &program!(16: "nop", "int 0x21"));
            assert_eq!((t.vector, t.error, t.cs, t.rip), (13, Some(0), 0xA000, 5), "HLT is the monitor's");
            let g = bed.cpu.gpr.map(|v| v & 0xFFFF);
            assert_eq!((g[gpr::RAX], g[gpr::RBX]), (3, 0x9000));
            assert_eq!(g[gpr::RCX], 0x3203 & 0xFFFF, "IOPL 3, IF set, CF");
            assert_eq!(g[gpr::RDX], 0x3003, "in the handler VIF is clear");
            assert_eq!(t.flags & (flags::VIF | flags::IF | flags::IOPL), 0);
            assert_eq!(t.sp, 0xFFF0);
            // Method 5: IOPL 3 works on IF itself.
            let t = run(bed, IOPL3 | flags::IF | flags::VIF, &program!(16: "int 0x21"));
            assert_eq!(bed.cpu.gpr[gpr::RCX] & 0xFFFF, 0x3202);
            assert_eq!(t.flags & (flags::IF | flags::VIF), flags::VIF, "IF was cleared, VIF was not");
        });
    }
}

#[test]
fn interrupts_go_to_the_monitor() {
    both(Start::Protected, |bed| {
        // Method 4: the bit is set, IOPL 3.
        let t = run(bed, IOPL3, &program!(16: "nop", "int 0x10"));
        assert_eq!((t.vector, t.rip, t.cs), (0x10, 3, 0x9000));
        // The same below IOPL 3: #GP(0), method 3.
        let t = run(bed, 0, &program!(16: "nop", "int 0x10"));
        assert_eq!((t.vector, t.error, t.rip), (13, Some(0), 1));
        // INT3 and INTO are not redirected.
        vme(bed);
        bed.gate(3, 14, 3, HANDLERS + 0x30);
        v8086_with(bed, 0, &[0xCC]);
        assert_eq!(bed.taken().vector, 3);
        // A bitmap outside the TSS: #GP(0).
        vme(bed);
        bed.put16(TSS + 102, 0x400);
        v8086_with(bed, 0, &[0xCD, 0x21]);
        assert_eq!((bed.taken().vector, bed.taken().error, bed.taken().rip), (13, Some(0), 0));
        // Without VME: #GP(0) below IOPL 3 whatever the bitmap says, method 2 (1, with IOPL 3: `tasks`).
        vme(bed);
        bed.cpu.cr4 &= !cr4::VME;
        v8086_with(bed, 0, &[0xCD, 0x21]);
        assert_eq!((bed.taken().vector, bed.taken().error), (13, Some(0)));
    });
}

#[test]
fn flags_instructions_work_on_vif() {
    both(Start::Protected, |bed| {
        let vif = |t: crate::bed::Taken| t.flags & (flags::VIF | flags::IF);
        assert_eq!(vif(run(bed, 0, &program!(16: "sti", "hlt"))), flags::VIF);
        assert_eq!(vif(run(bed, flags::VIF | flags::IF, &program!(16: "cli", "hlt"))), flags::IF);
        let t = run(
            bed,
            flags::VIF,
            &program!(16: "pushf", "pop ax", "cli", "pushf", "pop bx", "push 0x0ED7", "popf", "hlt"),
        );
        assert_eq!(t.vector, 13);
        let g = bed.cpu.gpr.map(|v| v & 0xFFFF);
        assert_eq!((g[gpr::RAX], g[gpr::RBX]), (0x3202, 0x3002));
        assert_eq!(t.flags & (flags::VIF | flags::IF | 0xFD7 | flags::IOPL), flags::VIF | 0xCD7);
        // IRET does what POPF does.
        let iret = program!(16: "push 0x72D7", "push 0x9000", ".byte 0x68", ".word 2f - 770b", "iret", "nop"; "2: hlt");
        let t = run(bed, 0, &iret);
        assert_eq!((t.vector, t.rip), (13, iret.at));
        assert_eq!(t.flags & (flags::VIF | flags::IF | flags::IOPL | flags::NT), flags::VIF | flags::NT);
        // IOPL 3: everything works on IF.
        let t = run(bed, IOPL3 | flags::VIF, &program!(16: "sti", "pushf", "pop ax", "cli", "hlt"));
        assert_eq!((vif(t), bed.cpu.gpr[gpr::RAX] & 0xFFFF), (flags::VIF, 0x3202));
    });
}

#[test]
fn what_virtual_interrupts_refuse() {
    both(Start::Protected, |bed| {
        let gp = |bed: &mut Bed, eflags: u64, p: crate::bed::Program| {
            let t = run(bed, eflags, &p);
            assert_eq!((t.vector, t.error, t.rip), (13, Some(0), p.at), "{:x?}", p.bytes);
            assert_eq!(t.flags & flags::VIP, eflags & flags::VIP);
        };
        // A pending interrupt, as soon as it would be let in.
        gp(bed, flags::VIP, program!(16: ; "sti"));
        gp(bed, flags::VIP, program!(16: "cli", "push 0x202"; "popf"));
        gp(bed, flags::VIP, program!(16: "push 0x202", "push 0x9000", "push 0"; "iret"));
        let t = run(bed, flags::VIP, &program!(16: "push 2", "popf", "hlt"));
        assert_eq!((t.vector, t.rip), (13, 3), "IF stays clear: nothing is let in");
        // Both set by the monitor: before the first instruction. They mean nothing with IOPL 3, nor without VME.
        gp(bed, flags::VIP | flags::VIF, program!(16: ; "nop", "hlt"));
        let t = run(bed, IOPL3 | flags::VIP | flags::VIF, &program!(16: "nop", "hlt"));
        assert_eq!((t.vector, t.rip), (13, 1));
        bed.reset();
        v8086_with(bed, flags::VIP | flags::VIF, program!(16: "nop", "hlt").bytes);
        assert_eq!((bed.taken().vector, bed.taken().rip), (13, 1));
        // TF cannot be set behind the monitor's back.
        gp(bed, 0, program!(16: "push 0x102"; "popf"));
        gp(bed, 0, program!(16: "push 0x102", "push 0x9000", "push 0"; "iret"));
        // The 32-bit forms have no virtual version.
        gp(bed, 0, program!(16: ; "pushfd"));
        gp(bed, 0, program!(16: "push 0", "push 0"; "popfd"));
        gp(bed, 0, program!(16: "push 0", "push 0"; "iretd"));
    });
}

#[test]
fn single_step_does_not_follow_into_a_redirected_interrupt() {
    both(Start::Protected, |bed| {
        bed.put(OWN, program!(16: "nop", "hlt").bytes);
        let t = run(bed, flags::TF, &program!(16: "int 0x21"));
        assert_eq!((t.vector, t.cs, t.rip), (13, 0xA000, 1), "not #DB");
        let sp = 0x8_0000 + 0xFFF0;
        assert_ne!(u64::from(bed.get16(sp - 2)) & flags::TF, 0, "TF is pushed");
    });
}

/// CPL 3 in protected mode: CLI and STI alone.
#[test]
fn protected_mode_virtual_interrupts() {
    for start in [Start::Protected, Start::Pae, Start::Long] {
        both(start, |bed| {
            let pvi = |bed: &mut Bed, eflags: u64| {
                bed.reset();
                bed.gate(0x50, 14, 3, HANDLERS + 0x500);
                bed.cpu.cr4 |= cr4::PVI;
                bed.user();
                bed.cpu.rflags |= eflags;
            };
            pvi(bed, flags::VIF | flags::VIP);
            bed.faults(&program!(64: ; "nop", "int 0x50"), 13, 0);
            pvi(bed, flags::VIF | flags::VIP);
            bed.cpu.cr4 &= !cr4::PVI;
            bed.run(&program!(64: "nop", "int 0x50"));
            assert_eq!(bed.taken().vector, 0x50);
            pvi(bed, flags::IF);
            bed.run(&program!(64: "sti", "int 0x50"));
            assert_eq!(bed.taken().flags & (flags::VIF | flags::IF), flags::VIF | flags::IF);
            pvi(bed, flags::IF | flags::VIF);
            bed.run(&program!(64: "cli", "int 0x50"));
            assert_eq!(bed.taken().flags & (flags::VIF | flags::IF), flags::IF);
            pvi(bed, flags::VIP);
            bed.faults(&program!(64: "nop"; "sti"), 13, 0);
            // IOPL 3: IF itself.
            pvi(bed, IOPL3);
            bed.run(&program!(64: "sti", "int 0x50"));
            assert_eq!(bed.taken().flags & (flags::VIF | flags::IF), flags::IF);
            // PUSHF and POPF know nothing of it.
            pvi(bed, flags::VIF);
            bed.run(&program!(64: "pushf", "pop rax", "push 0x202", "popf", "int 0x50"));
            assert_eq!(bed.taken().flags & (flags::VIF | flags::IF), flags::VIF);
            assert_eq!(bed.cpu.gpr[gpr::RAX] & flags::IF, 0);
            // Without PVI they fault.
            pvi(bed, flags::VIF);
            bed.cpu.cr4 &= !cr4::PVI;
            let t = bed.faults(&program!(64: "nop"; "cli"), 13, 0);
            assert_eq!((t.rip, t.flags & flags::VIF), (CODE + 1, flags::VIF));
        });
    }
}

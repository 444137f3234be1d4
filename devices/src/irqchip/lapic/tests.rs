//! The local APIC, register by register (SDM 3A, chapter 11; x2APIC: 11.12), through the fabric.

use super::super::tests::{AP, BSP, Rig};
use super::*;
use crate::irq::{IrqSink, MsiSink};
use paravane_memory::VpIndex;

const BASE: u32 = 0x1B;
const X2APIC: u64 = 0xFEE0_0C00;

fn x2apic(vcpus: u32) -> Rig {
    let r = Rig::new(vcpus);
    for vp in 0..vcpus {
        let base = r.fabric.read_msr(VpIndex(vp), BASE).unwrap();
        r.fabric.write_msr(VpIndex(vp), BASE, base | BASE_EXTD).unwrap();
    }
    r
}

fn msr(offset: u32) -> u32 {
    MSR_X2APIC + (offset >> 4)
}

fn take(r: &Rig) -> Option<u8> {
    r.fabric.acknowledge(BSP)
}

fn send(r: &Rig, vector: u32) {
    r.fabric.msi(0xFEE0_0000, vector);
}

/// Table 11-1 and figures 11-6 … 11-8, 11-18 …: what reads back of all ones, in xAPIC mode, and after reset.
#[test]
fn registers_after_reset_and_all_ones() {
    let r = Rig::new(1);
    r.fabric.reset();
    for (offset, reset, ones) in [
        (ID, 0, 0xFF00_0000),
        (VERSION, 0x0005_0014, 0x0005_0014),
        (PPR, 0, 0),
        (TPR, 0, 0xFF),
        (LDR, 0, 0xFF00_0000),
        (DFR, u32::MAX, u32::MAX),
        (SVR, 0xFF, 0x3FF),
        (ICR_HIGH, 0, 0xFF00_0000),
        (LVT_TIMER, LVT_MASKED, 0x0007_00FF),
        (LVT_THERMAL, LVT_MASKED, 0x0001_07FF),
        (LVT_PERF, LVT_MASKED, 0x0001_07FF),
        (LVT_LINT0, LVT_MASKED, 0x0001_A7FF),
        (LVT_LINT1, LVT_MASKED, 0x0001_A7FF),
        (LVT_ERROR, LVT_MASKED, 0x0001_00FF),
        (DIVIDE, 0, 0xB),
        (CURRENT_COUNT, 0, 0),
    ] {
        assert_eq!(r.load(offset), reset, "{offset:x} after reset");
        r.store(offset, u32::MAX);
        assert_eq!(r.load(offset), ones, "{offset:x} all ones");
    }
    r.store(ICR_LOW, 0xFFF3_3000 | 0xCF00);
    assert_eq!(r.load(ICR_LOW), 0xCF00, "reserved bits and delivery status are not written");
    r.store(DFR, 0);
    assert_eq!(r.load(DFR), 0x0FFF_FFFF);
}

/// 11.8.3: classes; the task priority's lower half counts for nothing but PPR.
#[test]
fn processor_priority_is_the_higher_of_task_and_service() {
    let r = Rig::new(1);
    for v in [0x35, 0x51, 0x5F, 0x83] {
        send(&r, v);
    }
    r.store(TPR, 0x5F);
    assert_eq!(r.load(PPR), 0x5F);
    assert_eq!(take(&r), Some(0x83));
    assert_eq!(r.load(PPR), 0x80, "a higher class in service: its lower half is 0");
    r.store(TPR, 0x93);
    assert_eq!(r.load(PPR), 0x93);
    r.store(EOI, 0);
    assert_eq!(take(&r), None);
    r.store(TPR, 0x4F);
    assert_eq!(take(&r), Some(0x5F), "5 is above 4, the halves do not count");
    assert_eq!(take(&r), None, "51 is of the class in service");
    r.store(EOI, 0);
    assert_eq!(take(&r), Some(0x51));
    r.store(EOI, 0);
    r.store(TPR, 0);
    assert_eq!(take(&r), Some(0x35));
    assert_eq!((r.load(ISR + 0x10), r.load(IRR + 0x10)), (1 << (0x35 - 32), 0));
}

/// 11.8.4: one vector waits in IRR while the same is in service, and no more than one.
#[test]
fn irr_and_isr_hold_one_each() {
    let r = Rig::new(1);
    send(&r, 0x61);
    assert_eq!(take(&r), Some(0x61));
    for _ in 0..3 {
        send(&r, 0x61);
    }
    assert_eq!((r.load(ISR + 0x30), r.load(IRR + 0x30)), (2, 2));
    r.store(EOI, 0);
    assert_eq!(take(&r), Some(0x61));
    r.store(EOI, 0);
    assert_eq!(take(&r), None);
    r.store(EOI, 0); // without an interrupt: nothing
}

/// 11.8.5: EOI goes to the highest in service, and out to the I/O APIC for level vectors alone.
#[test]
fn eoi_ends_the_highest_in_service() {
    let r = Rig::new(1);
    r.redirect(20, 0x8041);
    r.fabric.set_level(20, true);
    assert_eq!(take(&r), Some(0x41));
    assert_eq!(r.load(TMR + 0x20), 2, "level");
    send(&r, 0x62);
    assert_eq!(take(&r), Some(0x62));
    r.store(EOI, 0);
    assert_ne!(r.redirection(20) & 1 << 14, 0, "62 ended, 41 not");
    r.fabric.set_level(20, false);
    r.store(EOI, 0);
    assert_eq!(r.redirection(20) & 1 << 14, 0);
    send(&r, 0x41);
    assert_eq!(r.load(TMR + 0x20), 0, "the same vector by an edge");
}

/// 11.4.7.2: what was accepted stays and is delivered; nothing fixed is accepted; LVTs cannot be unmasked.
#[test]
fn disabled_by_software() {
    let r = Rig::new(2);
    send(&r, 0x55);
    r.store(SVR, 0xFF);
    assert_eq!(take(&r), Some(0x55), "held, to be handled");
    send(&r, 0x66);
    assert_eq!(r.load(IRR + 0x30), 0);
    r.log.take();
    r.fabric.msi(0xFEE0_0000, 0x400);
    assert_eq!(r.log.take(), ["nmi 0"], "NMI, INIT, SIPI come through");
    r.store(LVT_LINT0, 0x700);
    assert_eq!(r.load(LVT_LINT0), 0x1_0700);
    r.store(EOI, 0);
    assert_eq!(r.load(ISR + 0x20), 0);
}

/// 11.4.3, 11.4.7.3 … 11.4.7.4: without the APIC the pins are INTR and NMI; enabling it again finds it reset.
#[test]
fn disabled_globally() {
    let r = Rig::new(1);
    r.store(TPR, 0x20);
    r.fabric.write_msr(BSP, BASE, 0xFEE0_0100).unwrap();
    r.log.take();
    r.fabric.set_nmi_line(true);
    r.fabric.set_nmi_line(false);
    assert_eq!(r.log.take(), ["nmi 0"]);
    send(&r, 0x55);
    assert_eq!((take(&r), r.load(TPR)), (None, u32::MAX), "no page, no messages");
    assert!(r.fabric.write_msr(BSP, BASE, X2APIC | 0x100).is_err(), "disabled to x2APIC");
    r.fabric.write_msr(BSP, BASE, 0xFEE0_0900).unwrap();
    assert_eq!((r.load(TPR), r.load(SVR)), (0, 0xFF));
}

/// 11.6.1: illegal vectors, and the sender's view; ESR is written before it is read (11.5.3).
#[test]
fn errors_are_latched_by_writing_and_interrupt_once() {
    let r = Rig::new(1);
    r.store(LVT_ERROR, 0xFE);
    r.store(ICR_LOW, 0x4_000F);
    assert_eq!(take(&r), Some(0xFE));
    r.store(EOI, 0);
    send(&r, 0x0F);
    assert_eq!(take(&r), None, "no second interrupt before ESR is written");
    assert_eq!(r.load(ESR), 0);
    r.store(ESR, 0);
    assert_eq!(r.load(ESR), 0x60);
    r.store(LVT_TIMER, 0x0F);
    r.store(DIVIDE, 0xB);
    r.store(INITIAL_COUNT, 10);
    r.run_to(10);
    r.store(ESR, 0);
    assert_eq!(r.load(ESR), 0x40, "an illegal vector in the LVT");
    assert_eq!(take(&r), Some(0xFE), "armed again");
    r.load(0x3F0);
    r.store(ESR, 0);
    assert_eq!(r.load(ESR), 0x80, "SELF IPI is not there in xAPIC mode");
    r.store(ESR, 0);
    assert_eq!(r.load(ESR), 0);
}

/// Table 11-3: shorthands with the modes that matter; lowest priority to the others is not for the sender.
#[test]
fn shorthands() {
    let r = Rig::new(3);
    r.log.take();
    r.store(ICR_LOW, 0x8_0041);
    assert_eq!(r.log.take(), ["int 0", "int 1", "int 2"]);
    r.store(ICR_LOW, 0xC_0400);
    assert_eq!(r.log.take(), ["nmi 1", "nmi 2"]);
    r.store(ICR_LOW, 0xC_0142);
    assert_eq!(r.fabric.acknowledge(AP), Some(0x42), "lowest priority among the others");
    assert_eq!(r.load(IRR + 0x20), 2, "41 alone");
    r.log.take();
    r.store(ICR_LOW, 0xC_C500);
    assert_eq!(r.log.take(), ["init 1", "init 2"]);
}

/// 11.6.2.2: flat and cluster, and cluster broadcast.
#[test]
fn logical_destinations() {
    let r = Rig::new(2);
    let set = |vp, dfr, ldr: u32| {
        r.fabric.lapic_store(vp, DFR.into(), dfr);
        r.fabric.lapic_store(vp, LDR.into(), ldr << 24);
    };
    let reached = |mda: u32| {
        r.store(ICR_HIGH, mda << 24);
        r.store(ICR_LOW, 0x841);
        [BSP, AP].map(|vp| {
            let got = r.fabric.acknowledge(vp).is_some();
            r.fabric.lapic_store(vp, EOI.into(), 0);
            got
        })
    };
    set(BSP, u32::MAX, 0x01);
    set(AP, u32::MAX, 0x82);
    for (mda, expected) in [
        (0x01, [true, false]),
        (0x80, [false, true]),
        (0x03, [true, true]),
        (0x40, [false, false]),
        (0xFF, [true, true]),
        (0x00, [false, false]),
    ] {
        assert_eq!(reached(mda), expected, "flat {mda:x}");
    }
    set(BSP, 0, 0x11);
    set(AP, 0, 0x22);
    for (mda, expected) in [
        (0x11, [true, false]),
        (0x22, [false, true]),
        (0x13, [true, false]),
        (0x21, [false, false]),
        (0xF1, [true, false]),
        (0xFF, [true, true]),
    ] {
        assert_eq!(reached(mda), expected, "cluster {mda:x}");
    }
}

/// 11.6.2.4: to whom the processor priority is lowest.
#[test]
fn lowest_priority_goes_to_the_idlest() {
    let r = Rig::new(2);
    let lowest = |vector: u32| r.fabric.msi(0xFEE0_0000 | 0xFF << 12, 0x100 | vector);
    r.store(TPR, 0x20);
    lowest(0x61);
    assert_eq!(r.fabric.acknowledge(AP), Some(0x61));
    lowest(0x62);
    assert_eq!(take(&r), Some(0x62), "the other one has 61 in service");
    r.fabric.lapic_store(AP, EOI.into(), 0);
    r.fabric.lapic_store(AP, SVR.into(), 0xFF);
    r.store(EOI, 0);
    lowest(0x63);
    assert_eq!(take(&r), Some(0x63), "one that is disabled does not take part");
}

/// 11.5.1: delivery modes of the LVT; LINT1 knows edges only; the performance entry masks itself.
#[test]
fn lvt_delivery_modes() {
    let r = Rig::new(1);
    r.log.take();
    for (mode, seen) in [(0x400, "nmi 0"), (0x500, "init 0")] {
        r.store(LVT_LINT1, mode);
        r.fabric.set_nmi_line(true);
        r.fabric.set_nmi_line(false);
        assert_eq!(r.log.take(), [seen]);
    }
    r.store(SVR, 0x1FF);
    r.store(LVT_LINT1, 0x8000 | 0x71);
    for _ in 0..2 {
        r.fabric.set_nmi_line(true);
        assert_eq!(take(&r), Some(0x71));
        assert_eq!(r.load(LVT_LINT1) & LVT_REMOTE_IRR, 0);
        r.store(EOI, 0);
        assert_eq!(take(&r), None, "the level does not ask again");
        r.fabric.set_nmi_line(false);
    }
    r.store(LVT_PERF, 0x72);
    r.fabric.performance_event(BSP);
    r.fabric.performance_event(BSP);
    assert_eq!((take(&r), r.load(LVT_PERF)), (Some(0x72), 0x1_0072));
    r.store(LVT_THERMAL, 0x83);
    r.fabric.thermal_event(BSP);
    assert_eq!((take(&r), r.load(LVT_THERMAL)), (Some(0x83), 0x83));
}

/// 11.5.1, remote IRR of LINT0: set when a fixed level is accepted, cleared by EOI, which looks at the pin again.
#[test]
fn lint0_as_a_level() {
    let r = Rig::new(1);
    r.init_pics();
    r.store(LVT_LINT0, 0x8000 | 0x91);
    r.fabric.set_level(4, true);
    assert_eq!(take(&r), Some(0x91));
    assert_ne!(r.load(LVT_LINT0) & LVT_REMOTE_IRR, 0);
    r.store(EOI, 0);
    assert_eq!(take(&r), Some(0x91), "INT is still high");
    r.fabric.set_level(4, false);
    r.store(EOI, 0);
    assert_eq!((take(&r), r.load(LVT_LINT0)), (None, 0x8091));
}

// --- timer (11.5.4) ---

#[test]
fn every_divisor() {
    for (code, divisor) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (0xA, 128), (0xB, 1)] {
        let r = Rig::new(1);
        r.store(LVT_TIMER, 0x31);
        r.store(DIVIDE, code);
        r.store(INITIAL_COUNT, 10);
        r.run_to(10 * divisor - 1);
        assert_eq!((r.load(CURRENT_COUNT), take(&r)), (1, None), "{code:x}");
        r.run_to(10 * divisor);
        assert_eq!((r.load(CURRENT_COUNT), take(&r)), (0, Some(0x31)), "{code:x}");
    }
}

#[test]
fn writing_the_initial_count_starts_over_and_zero_stops() {
    let r = Rig::new(1);
    r.store(LVT_TIMER, 0x31);
    r.store(DIVIDE, 0xB);
    r.store(INITIAL_COUNT, 1000);
    r.run_to(900);
    r.store(INITIAL_COUNT, 1000);
    r.run_to(1899);
    assert_eq!(take(&r), None);
    r.run_to(1900);
    assert_eq!(take(&r), Some(0x31));
    r.store(EOI, 0);
    r.store(INITIAL_COUNT, 1000);
    r.store(INITIAL_COUNT, 0);
    assert_eq!((r.load(CURRENT_COUNT), r.queue.next_deadline()), (0, None));
}

#[test]
fn periodic_counts_reload_and_masked_expiries_are_lost() {
    let r = Rig::new(1);
    r.store(LVT_TIMER, 0x3_0031);
    r.store(DIVIDE, 0xB);
    r.store(INITIAL_COUNT, 100);
    r.run_to(250);
    assert_eq!(r.load(CURRENT_COUNT), 50);
    r.store(LVT_TIMER, 0x2_0031);
    assert_eq!(take(&r), None, "what happened while it was masked is gone");
    r.run_to(299);
    assert_eq!(r.load(CURRENT_COUNT), 1);
    r.run_to(300);
    assert_eq!((r.load(CURRENT_COUNT), take(&r)), (100, Some(0x31)), "reloaded");
}

/// 11.5.4.1: the mode excludes the other registers, and leaving or entering it disarms.
#[test]
fn tsc_deadline_and_the_counts_exclude_each_other() {
    let r = Rig::new(1);
    r.store(LVT_TIMER, 0x4_0031);
    r.store(INITIAL_COUNT, 1000);
    assert_eq!((r.load(INITIAL_COUNT), r.load(CURRENT_COUNT)), (0, 0));
    r.fabric.write_msr(BSP, MSR_TSC_DEADLINE, 1_000_000).unwrap();
    r.fabric.write_msr(BSP, MSR_TSC_DEADLINE, 0).unwrap();
    assert_eq!(r.queue.next_deadline(), None, "zero disarms");
    r.fabric.write_msr(BSP, MSR_TSC_DEADLINE, 1_000_000).unwrap();
    r.store(LVT_TIMER, 0x31);
    assert_eq!((r.fabric.read_msr(BSP, MSR_TSC_DEADLINE), r.queue.next_deadline()), (Ok(0), None));
    r.store(DIVIDE, 0xB);
    r.store(INITIAL_COUNT, 1000);
    r.store(LVT_TIMER, 0x4_0031);
    assert_eq!(r.queue.next_deadline(), None);
}

// --- x2APIC (11.12) ---

/// Table 11-6 and 11.12.1.3: which MSRs are there, which way, and what reserved bits do.
#[test]
fn x2apic_msrs_and_their_reserved_bits() {
    let r = x2apic(1);
    let f = &r.fabric;
    let read_only = [ID, VERSION, PPR, LDR, CURRENT_COUNT, ISR, TMR, IRR, IRR + 0x70];
    let write_only = [EOI, SELF_IPI];
    let both = [
        TPR,
        SVR,
        ESR,
        ICR_LOW,
        LVT_TIMER,
        LVT_THERMAL,
        LVT_PERF,
        LVT_LINT0,
        LVT_LINT1,
        LVT_ERROR,
        INITIAL_COUNT,
        DIVIDE,
    ];
    for offset in (0..0x400).step_by(0x10) {
        let listed = |list: &[u32]| list.contains(&offset);
        let bitmap = (ISR..ESR).contains(&offset);
        let (reads, writes) =
            (listed(&both) || listed(&read_only) || bitmap, listed(&both) || listed(&write_only));
        assert_eq!(f.read_msr(BSP, msr(offset)).is_ok(), reads, "RDMSR {offset:x}");
        if offset != SELF_IPI {
            assert_eq!(f.write_msr(BSP, msr(offset), 0).is_ok(), writes, "WRMSR {offset:x}");
        }
    }
    for (offset, allowed) in [
        (TPR, 0xFF),
        (SVR, 0x3FF),
        (EOI, 0),
        (ESR, 0),
        (LVT_TIMER, 0x7_10FF),
        (LVT_THERMAL, 0x1_17FF),
        (LVT_PERF, 0x1_17FF),
        (LVT_LINT0, 0x1_F7FF),
        (LVT_LINT1, 0x1_F7FF),
        (LVT_ERROR, 0x1_10FF),
        (INITIAL_COUNT, 0xFFFF_FFFF),
        (DIVIDE, 0xB),
        (SELF_IPI, 0xFF),
        (ICR_LOW, 0xFFFF_FFFF_000C_DFFF),
    ] {
        for bit in 0..64 {
            // Interrupts that go out go to an APIC that is not there, or to ourselves.
            let value = 1u64 << bit;
            let expected = allowed & value != 0;
            assert_eq!(f.write_msr(BSP, msr(offset), value).is_ok(), expected, "{offset:x} bit {bit}");
        }
    }
}

/// 11.12.5.1: the ways between the three modes; 11.12.2.1: BASE's reserved bits.
#[test]
fn mode_changes_that_are_allowed() {
    let r = Rig::new(1);
    let f = &r.fabric;
    for (value, allowed) in [
        (0xFEE0_0D00, true),  // xAPIC to x2APIC
        (0xFEE0_0D00, true),  // stays
        (0xFEE0_0900, false), // back
        (0xFEE0_0500, false), // EXTD without EN
        (0xFEE0_0100, true),  // off
        (0xFEE0_0D00, false), // straight on
        (0xFEE0_0900, true),
        (0xFEE0_0D01, false),
        (0xFEE0_0B00, false),
        (1 << 60 | 0xFEE0_0900, false),
    ] {
        assert_eq!(f.write_msr(BSP, BASE, value).is_ok(), allowed, "{value:x}");
    }
    assert_eq!(f.read_msr(BSP, BASE), Ok(0xFEE0_0900));
    f.write_msr(BSP, BASE, 0xFEE0_0800).unwrap();
    assert_eq!(f.read_msr(BSP, BASE), Ok(0xFEE0_0800), "BSP is an ordinary bit");
}

/// 11.12.9, 11.12.10.2: 32-bit destinations and the derived logical ID, cluster by cluster.
#[test]
fn x2apic_destinations() {
    let r = x2apic(18);
    let vp = VpIndex;
    let reached = |icr: u64| -> Vec<u32> {
        r.fabric.write_msr(BSP, msr(ICR_LOW), icr | 0x41).unwrap();
        let taken = |n: &u32| {
            let got = r.fabric.acknowledge(vp(*n)).is_some();
            _ = r.fabric.write_msr(vp(*n), msr(EOI), 0);
            got
        };
        (0..18).filter(taken).collect()
    };
    for n in 0..18 {
        r.fabric.write_msr(vp(n), msr(SVR), 0x1FF).unwrap();
        assert_eq!(r.fabric.read_msr(vp(n), msr(LDR)), Ok(u64::from(n >> 4) << 16 | 1 << (n & 15)));
    }
    assert_eq!(reached(17 << 32), [17]);
    assert_eq!(reached(0xFF << 32), [] as [u32; 0], "FFh is an ID like any other");
    assert_eq!(reached(0xFFFF_FFFF << 32).len(), 18);
    assert_eq!(reached(0x0000_8001 << 32 | 0x800), [0, 15]);
    assert_eq!(reached(0x0001_0003 << 32 | 0x800), [16, 17]);
    assert_eq!(reached(0x0002_0001 << 32 | 0x800), [] as [u32; 0]);
}

/// 11.12.11: SELF IPI is a fixed, edge triggered interrupt.
#[test]
fn self_ipi() {
    let r = x2apic(1);
    r.fabric.write_msr(BSP, msr(SELF_IPI), 0x77).unwrap();
    assert_eq!(take(&r), Some(0x77));
    assert_eq!(r.fabric.read_msr(BSP, msr(TMR + 0x30)), Ok(0));
    r.fabric.write_msr(BSP, msr(SELF_IPI), 0x0F).unwrap();
    r.fabric.write_msr(BSP, msr(ESR), 0).unwrap();
    assert_eq!(r.fabric.read_msr(BSP, msr(ESR)), Ok(0x20), "send illegal vector");
}

#[test]
fn icr_reads_back_whole_and_idle() {
    let r = x2apic(1);
    r.fabric.write_msr(BSP, msr(ICR_LOW), 9 << 32 | 0x1041).unwrap();
    assert_eq!(r.fabric.read_msr(BSP, msr(ICR_LOW)), Ok(9 << 32 | 0x41));
}

/// 11.4.7.3: INIT leaves ID, base and mode.
#[test]
fn init_keeps_the_mode() {
    let r = x2apic(2);
    r.fabric.write_msr(AP, msr(TPR), 0x30).unwrap();
    r.fabric.write_msr(BSP, msr(ICR_LOW), 1 << 32 | 0x500).unwrap();
    assert_eq!(r.fabric.read_msr(AP, BASE), Ok(X2APIC));
    assert_eq!(r.fabric.read_msr(AP, msr(TPR)), Ok(0));
    assert_eq!(r.fabric.read_msr(AP, msr(SVR)), Ok(0xFF));
    assert_eq!(r.fabric.read_msr(AP, msr(ID)), Ok(1));
}

/// CR8 is TPR 7:4 (SDM 3A, 11.8.6).
#[test]
fn cr8_and_tpr_are_one() {
    let r = Rig::new(1);
    r.store(TPR, 0x7F);
    assert_eq!(r.fabric.cr8(BSP), 7);
    r.fabric.set_cr8(BSP, 9);
    assert_eq!(r.load(TPR), 0x90);
}

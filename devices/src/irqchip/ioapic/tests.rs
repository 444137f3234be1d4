//! The I/O APIC, register by register (82093AA, 3.2; EOI register: 82801, I/O APIC), through the fabric.

use super::super::tests::{AP, BSP, Rig};
use super::*;
use crate::device::MmioDevice;
use crate::irq::IrqSink;
use crate::irqchip::IoApicWindow;
use paravane_memory::Width;

fn register(r: &Rig, select: u8) -> u32 {
    let mut w = IoApicWindow::new(r.fabric.clone());
    w.mmio_store(IOREGSEL, Width::W32, select.into());
    w.mmio_load(IOWIN, Width::W32) as u32
}

fn write(r: &Rig, select: u8, value: u32) {
    let mut w = IoApicWindow::new(r.fabric.clone());
    w.mmio_store(IOREGSEL, Width::W32, select.into());
    w.mmio_store(IOWIN, Width::W32, value.into());
}

/// Lets `pin` rise.
fn edge(r: &Rig, gsi: u32) {
    r.fabric.set_level(gsi, false);
    r.fabric.set_level(gsi, true);
}

#[test]
fn registers_after_reset_and_all_ones() {
    let r = Rig::new(1);
    for (select, reset, ones) in [
        (ID, 0, 0x0F00_0000),
        (VER, 0x0017_0020, 0x0017_0020),
        (ARB, 0x0F00_0000, 0x0F00_0000), // loaded with the ID
        (REDTBL, 0x0001_0000, 0x0001_AFFF),
        (REDTBL + 1, 0, 0xFF00_0000),
        (REDTBL + 47, 0, 0xFF00_0000),
        (REDTBL + 48, 0, 0),
        (0xFF, 0, 0),
    ] {
        assert_eq!(register(&r, select), reset, "{select:x}");
        write(&r, select, u32::MAX);
        assert_eq!(register(&r, select), ones, "{select:x}");
    }
    let mut w = IoApicWindow::new(r.fabric.clone());
    w.mmio_store(IOREGSEL, Width::W32, 0x1_2301);
    assert_eq!(w.mmio_load(IOREGSEL, Width::W32), 1, "bits 7:0");
    assert_eq!(w.mmio_load(0x20, Width::W32), 0);
}

/// "Interrupt mask": edges are neither delivered nor held pending; levels are looked at when unmasked.
#[test]
fn masked_edges_are_lost_and_masking_afterwards_changes_nothing() {
    let r = Rig::new(1);
    r.redirect(21, 0x1_0052);
    edge(&r, 21);
    r.redirect(21, 0x0052);
    assert_eq!(r.fabric.acknowledge(BSP), None);
    edge(&r, 21);
    r.redirect(21, 0x1_0052);
    assert_eq!(r.fabric.acknowledge(BSP), Some(0x52), "accepted before it was masked");
}

#[test]
fn an_edge_asks_once_and_again_while_in_service() {
    let r = Rig::new(1);
    r.redirect(21, 0x0052);
    edge(&r, 21);
    assert_eq!(r.fabric.acknowledge(BSP), Some(0x52));
    assert_eq!(r.redirection(21) & REMOTE_IRR, 0, "edges have no remote IRR");
    edge(&r, 21);
    edge(&r, 21);
    r.store(super::super::spec::lapic::EOI, 0);
    assert_eq!(r.fabric.acknowledge(BSP), Some(0x52));
    r.store(super::super::spec::lapic::EOI, 0);
    assert_eq!(r.fabric.acknowledge(BSP), None);
}

/// "Remote IRR": set when a level is accepted, reset by the EOI with its vector; nothing is sent in between.
#[test]
fn remote_irr_holds_back_a_level() {
    let r = Rig::new(1);
    r.redirect(20, 0x8061);
    r.fabric.set_level(20, true);
    assert_eq!(r.fabric.acknowledge(BSP), Some(0x61));
    r.fabric.set_level(20, false);
    r.fabric.set_level(20, true);
    r.redirect(20, 0x8061);
    assert_eq!(r.load(0x230), 0, "neither the line nor the register sends it again");
    r.redirect(20, 0x1_8061);
    r.store(0xB0, 0);
    assert_eq!(
        (r.redirection(20) & REMOTE_IRR, r.fabric.acknowledge(BSP)),
        (0, None),
        "masked in the handler"
    );
    r.redirect(20, 0x8061);
    assert_eq!(r.fabric.acknowledge(BSP), Some(0x61), "unmasked, still asserted");
}

/// An EOI for a vector that two inputs share ends both.
#[test]
fn two_inputs_with_one_vector() {
    let r = Rig::new(1);
    for pin in [20, 21] {
        r.redirect(pin, 0x8061);
        r.fabric.set_level(pin as u32, true);
    }
    assert_eq!(r.fabric.acknowledge(BSP), Some(0x61));
    r.fabric.set_level(20, false);
    r.store(0xB0, 0);
    assert_eq!(r.redirection(20) & REMOTE_IRR, 0);
    assert_ne!(r.redirection(21) & REMOTE_IRR, 0, "asks again");
    assert_eq!(r.fabric.acknowledge(BSP), Some(0x61));
}

/// "Delivery mode": NMI and INIT are edges even if programmed as levels, and the vector does not matter.
#[test]
fn modes_without_an_eoi_are_edges() {
    let r = Rig::new(2);
    r.log.take();
    r.redirect(20, 1 << 56 | 0x8400);
    r.fabric.set_level(20, true);
    r.redirect(20, 1 << 56 | 0x8400);
    assert_eq!(r.log.take(), ["nmi 1"], "once, however often the entry is written");
    assert_eq!(r.redirection(20) & REMOTE_IRR, 0);
    r.redirect(21, 1 << 56 | 0x8500);
    r.fabric.set_level(21, true);
    assert_eq!(r.log.take(), ["init 1"]);
}

/// "Destination": physical, logical, and everybody.
#[test]
fn destinations() {
    let r = Rig::new(2);
    r.redirect(20, 1 << 56 | 0x41);
    edge(&r, 20);
    assert_eq!((r.fabric.acknowledge(BSP), r.fabric.acknowledge(AP)), (None, Some(0x41)));
    r.redirect(20, 0xFF << 56 | 0x52);
    edge(&r, 20);
    assert_eq!((r.fabric.acknowledge(BSP), r.fabric.acknowledge(AP)), (Some(0x52), Some(0x52)));
    r.store(0xD0, 0x40 << 24);
    r.redirect(20, 0x40 << 56 | 0x863);
    edge(&r, 20);
    assert_eq!((r.fabric.acknowledge(BSP), r.fabric.acknowledge(AP)), (Some(0x63), None));
}

#[test]
fn the_eoi_register_ends_levels_only() {
    let r = Rig::new(1);
    r.redirect(20, 0x8061);
    r.fabric.set_level(20, true);
    let mut w = IoApicWindow::new(r.fabric.clone());
    w.mmio_store(EOI, Width::W32, 0x62);
    assert_ne!(r.redirection(20) & REMOTE_IRR, 0, "another vector");
    r.fabric.set_level(20, false);
    w.mmio_store(EOI, Width::W32, 0x61);
    assert_eq!(r.redirection(20) & REMOTE_IRR, 0);
    assert_eq!(w.mmio_load(EOI, Width::W32), 0, "write-only");
}

#[test]
fn reset_masks_everything_and_keeps_the_levels() {
    let r = Rig::new(1);
    r.redirect(20, 0x8061);
    r.fabric.set_level(20, true);
    r.fabric.reset();
    assert_eq!(r.redirection(20), MASKED);
    r.store(0xF0, 0x1FF);
    r.redirect(20, 0x8061);
    assert_eq!(r.fabric.acknowledge(BSP), Some(0x61));
}

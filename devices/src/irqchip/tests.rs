//! Scenes across the controllers, from the SDM, the 82093AA datasheet and what kernels do.

use super::*;
use crate::device::{MmioDevice, PioDevice};
use crate::time::ManualClock;
use paravane_memory::{Port, Width};

#[derive(Default)]
pub(super) struct Log(Mutex<Vec<String>>);

impl Log {
    pub(super) fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
    fn push(&self, s: String) {
        self.0.lock().unwrap().push(s);
    }
}

impl VcpuKick for Log {
    fn interrupt(&self, vp: VpIndex) {
        self.push(format!("int {}", vp.0));
    }
    fn nmi(&self, vp: VpIndex) {
        self.push(format!("nmi {}", vp.0));
    }
    fn init(&self, vp: VpIndex) {
        self.push(format!("init {}", vp.0));
    }
    fn startup(&self, vp: VpIndex, vector: u8) {
        self.push(format!("sipi {} {vector:02x}", vp.0));
    }
}

pub(super) struct Rig {
    clock: Arc<ManualClock>,
    pub(super) queue: Arc<TimerQueue>,
    pub(super) log: Arc<Log>,
    pub(super) fabric: Arc<InterruptFabric>,
}

pub(super) const BSP: VpIndex = VpIndex(0);
pub(super) const AP: VpIndex = VpIndex(1);

impl Rig {
    pub(super) fn new(vcpus: u32) -> Rig {
        let clock = Arc::new(ManualClock::default());
        let queue = TimerQueue::new();
        let log = Arc::new(Log::default());
        let config = FabricConfig { vcpus, apic_hz: 1_000_000_000, tsc: TscClock::new(2_000_000_000) };
        let fabric = InterruptFabric::new(config, clock.clone(), &queue, log.clone(), &Counters::default());
        for vp in 0..vcpus {
            fabric.lapic_store(VpIndex(vp), u64::from(reg::SVR), 0x1FF);
        }
        Rig { clock, queue, log, fabric }
    }

    pub(super) fn run_to(&self, ns: u64) {
        self.clock.set(VmTime(ns));
        self.queue.run_expired(VmTime(ns));
    }

    pub(super) fn store(&self, offset: u32, value: u32) {
        self.fabric.lapic_store(BSP, offset.into(), value);
    }

    pub(super) fn load(&self, offset: u32) -> u32 {
        self.fabric.lapic_load(BSP, offset.into())
    }

    pub(super) fn redirect(&self, pin: u64, entry: u64) {
        let mut w = IoApicWindow::new(self.fabric.clone());
        for (i, half) in [entry >> 32, entry & 0xFFFF_FFFF].into_iter().enumerate() {
            w.mmio_store(0, Width::W32, 0x11 + pin * 2 - i as u64);
            w.mmio_store(0x10, Width::W32, half);
        }
    }

    pub(super) fn redirection(&self, pin: u64) -> u64 {
        let mut w = IoApicWindow::new(self.fabric.clone());
        w.mmio_store(0, Width::W32, 0x10 + pin * 2);
        w.mmio_load(0x10, Width::W32)
    }

    pub(super) fn init_pics(&self) {
        let mut p = PicPorts::new(self.fabric.clone());
        for (port, value) in [
            (0x20, 0x11),
            (0x21, 0x30),
            (0x21, 4),
            (0x21, 1),
            (0xA0, 0x11),
            (0xA1, 0x38),
            (0xA1, 2),
            (0xA1, 1),
        ] {
            p.port_out(Port(port), Width::W8, value);
        }
    }
}

#[test]
fn level_input_asks_again_after_eoi_while_asserted() {
    let r = Rig::new(1);
    r.redirect(20, 0x8000 | 0x51);
    r.fabric.set_level(20, true);
    assert!(r.fabric.has_interrupt(BSP));
    assert_eq!(r.fabric.acknowledge(BSP), Some(0x51));
    assert_eq!(r.redirection(20) & 1 << 14, 1 << 14, "remote IRR");
    assert!(!r.fabric.has_interrupt(BSP));
    r.store(reg::EOI, 0);
    assert_eq!(r.fabric.acknowledge(BSP), Some(0x51));
    r.fabric.set_level(20, false);
    r.store(reg::EOI, 0);
    assert_eq!(r.redirection(20) & 1 << 14, 0);
    assert!(!r.fabric.has_interrupt(BSP));
}

#[test]
fn masked_level_input_is_delivered_when_unmasked_and_edge_is_lost() {
    let r = Rig::new(1);
    r.redirect(20, 0x1_8051);
    r.redirect(21, 0x1_0052);
    r.fabric.set_level(20, true);
    r.fabric.set_level(21, true);
    assert!(!r.fabric.has_interrupt(BSP));
    r.redirect(20, 0x8051);
    r.redirect(21, 0x52);
    assert_eq!(r.fabric.acknowledge(BSP), Some(0x51));
    r.fabric.set_level(20, false);
    r.store(reg::EOI, 0);
    assert!(!r.fabric.has_interrupt(BSP));
}

#[test]
fn writing_edge_mode_clears_a_stuck_remote_irr_and_the_eoi_register_ends_one() {
    let r = Rig::new(1);
    r.redirect(17, 0x8061);
    r.fabric.set_level(17, true);
    r.redirect(17, 0x1_0061);
    assert_eq!(r.redirection(17) & 1 << 14, 0);
    r.redirect(17, 0x8061);
    assert_ne!(r.redirection(17) & 1 << 14, 0);
    r.fabric.set_level(17, false);
    IoApicWindow::new(r.fabric.clone()).mmio_store(0x40, Width::W32, 0x61);
    assert_eq!(r.redirection(17) & 1 << 14, 0);
}

#[test]
fn ioapic_version_is_20h_with_24_entries() {
    let r = Rig::new(1);
    let mut w = IoApicWindow::new(r.fabric.clone());
    w.mmio_store(0, Width::W32, 1);
    assert_eq!(w.mmio_load(0x10, Width::W32), 0x0017_0020);
}

#[test]
fn timer_irq_reaches_pin_2_as_linux_check_timer_wants() {
    let r = Rig::new(1);
    r.init_pics();
    r.redirect(2, 0x30);
    r.fabric.set_level(0, true);
    r.fabric.set_level(0, false);
    assert_eq!(r.fabric.acknowledge(BSP), Some(0x30));
}

#[test]
fn pic_reaches_the_processor_through_lint0_in_virtual_wire_mode() {
    let r = Rig::new(2);
    r.init_pics();
    r.log.take();
    r.fabric.set_level(4, true);
    assert!(!r.fabric.has_interrupt(BSP), "LINT0 is masked after reset");
    r.fabric.enter_virtual_wire_mode();
    assert_eq!(r.log.take(), ["int 0"]);
    assert!(!r.fabric.has_interrupt(AP));
    assert_eq!(r.fabric.acknowledge(BSP), Some(0x34));
    assert!(!r.fabric.has_interrupt(BSP));
    r.fabric.set_nmi_line(true);
    assert_eq!(r.log.take(), ["nmi 0", "nmi 1"]);
}

#[test]
fn a_second_request_is_told_after_the_first_is_taken() {
    let r = Rig::new(1);
    r.init_pics();
    r.fabric.enter_virtual_wire_mode();
    r.fabric.set_level(4, true);
    r.fabric.set_level(3, true);
    r.log.take();
    assert_eq!(r.fabric.acknowledge(BSP), Some(0x33));
    assert!(r.log.take().is_empty(), "IR4 waits for the EOI of IR3");
    r.fabric.set_level(0, true);
    assert_eq!(r.log.take(), ["int 0"]);
    r.fabric.set_level(1, true);
    assert_eq!(r.fabric.acknowledge(BSP), Some(0x30));
    PicPorts::new(r.fabric.clone()).port_out(Port(0x20), Width::W8, 0x20);
    assert_eq!(r.log.take(), ["int 0"]);
    assert_eq!(r.fabric.acknowledge(BSP), Some(0x31));
}

#[test]
fn pic_works_with_the_apic_globally_disabled() {
    let r = Rig::new(1);
    r.fabric.write_msr(BSP, 0x1B, 0xFEE0_0100).unwrap();
    assert_eq!(r.fabric.read_msr(BSP, 0x1B), Ok(0xFEE0_0100));
    r.init_pics();
    r.fabric.set_level(0, true);
    assert_eq!(r.fabric.acknowledge(BSP), Some(0x30));
}

#[test]
fn extint_through_ioapic_pin_0_as_a_last_resort() {
    let r = Rig::new(1);
    r.init_pics();
    r.redirect(0, 0x700);
    r.fabric.set_level(0, true);
    assert_eq!(r.fabric.acknowledge(BSP), Some(0x30));
    assert!(!r.fabric.has_interrupt(BSP));
}

#[test]
fn priorities_follow_tpr_and_isr() {
    let r = Rig::new(1);
    r.fabric.msi(0xFEE0_0000, 0x41);
    r.fabric.msi(0xFEE0_0000, 0x62);
    r.store(reg::TPR, 0x50);
    assert_eq!(r.fabric.cr8(BSP), 5);
    assert_eq!(r.fabric.acknowledge(BSP), Some(0x62));
    assert_eq!(r.load(reg::PPR), 0x60);
    r.fabric.msi(0xFEE0_0000, 0x68);
    assert!(!r.fabric.has_interrupt(BSP), "same class waits");
    r.store(reg::EOI, 0);
    assert_eq!(r.fabric.acknowledge(BSP), Some(0x68));
    r.store(reg::EOI, 0);
    assert!(!r.fabric.has_interrupt(BSP));
    r.fabric.set_cr8(BSP, 3);
    assert_eq!(r.fabric.acknowledge(BSP), Some(0x41));
}

#[test]
fn one_shot_timer_counts_down_with_its_divider() {
    let r = Rig::new(1);
    r.store(reg::LVT_TIMER, 0xEC);
    r.store(reg::DIVIDE, 0x3); // 16
    r.store(reg::INITIAL_COUNT, 1000);
    r.run_to(8000);
    assert_eq!(r.load(reg::CURRENT_COUNT), 500);
    r.run_to(15_999);
    assert!(!r.fabric.has_interrupt(BSP));
    r.run_to(16_000);
    assert_eq!(r.fabric.acknowledge(BSP), Some(0xEC));
    assert_eq!(r.load(reg::CURRENT_COUNT), 0);
    assert_eq!(r.queue.next_deadline(), None);
}

#[test]
fn periodic_timer_does_not_drift_when_noticed_late() {
    let r = Rig::new(1);
    r.store(reg::LVT_TIMER, 1 << 17 | 0xEC);
    r.store(reg::DIVIDE, 0xB); // 1
    r.store(reg::INITIAL_COUNT, 1000);
    r.run_to(1300);
    assert_eq!(r.fabric.acknowledge(BSP), Some(0xEC));
    r.store(reg::EOI, 0);
    assert_eq!(r.queue.next_deadline(), Some(VmTime(2000)));
    r.run_to(7999);
    assert_eq!(r.load(reg::CURRENT_COUNT), 1);
    assert_eq!(r.queue.next_deadline(), Some(VmTime(8000)));
}

#[test]
fn masked_timer_still_counts_as_linux_calibrates_it() {
    let r = Rig::new(1);
    r.store(reg::LVT_TIMER, 0x1_00EC);
    r.store(reg::DIVIDE, 0xB);
    r.store(reg::INITIAL_COUNT, u32::MAX);
    r.run_to(1_000_000);
    assert_eq!(r.load(reg::CURRENT_COUNT), u32::MAX - 1_000_000);
    assert!(!r.fabric.has_interrupt(BSP));
}

#[test]
fn tsc_deadline_fires_once_and_reads_zero_afterwards() {
    let r = Rig::new(1);
    r.fabric.write_msr(BSP, 0x6E0, 5000).unwrap();
    assert_eq!(r.fabric.read_msr(BSP, 0x6E0), Ok(0), "ignored in other modes");
    r.store(reg::LVT_TIMER, 2 << 17 | 0xEC);
    r.fabric.write_msr(BSP, 0x6E0, 5000).unwrap();
    assert_eq!(r.fabric.read_msr(BSP, 0x6E0), Ok(5000));
    r.run_to(2499);
    assert!(!r.fabric.has_interrupt(BSP));
    r.run_to(2500);
    assert_eq!(r.fabric.acknowledge(BSP), Some(0xEC));
    assert_eq!(r.fabric.read_msr(BSP, 0x6E0), Ok(0));
    r.store(reg::EOI, 0);
    r.fabric.write_msr(BSP, 0x6E0, 1).unwrap();
    assert_eq!(r.fabric.acknowledge(BSP), Some(0xEC), "a past deadline fires at once");
    r.store(reg::EOI, 0);
    r.fabric.set_tsc_offset(BSP, 0u64.wrapping_sub(1000));
    r.fabric.write_msr(BSP, 0x6E0, 5000).unwrap();
    assert_eq!(r.queue.next_deadline(), Some(VmTime(3000)));
    r.fabric.write_msr(BSP, 0x6E0, u64::MAX).unwrap();
    assert!(r.queue.next_deadline().is_some());
}

#[test]
fn init_and_startup_ipis_wake_a_processor() {
    let r = Rig::new(2);
    r.store(reg::ICR_HIGH, 1 << 24);
    r.store(reg::ICR_LOW, 0xC500);
    r.store(reg::ICR_LOW, 0x8500); // de-assert
    r.store(reg::ICR_LOW, 0x0608);
    assert_eq!(r.log.take(), ["init 1", "sipi 1 08"]);
    assert_eq!(r.fabric.lapic_load(AP, reg::SVR.into()), 0xFF);
    assert_eq!(r.load(reg::ICR_LOW) & 1 << 12, 0, "delivery status idle");
}

#[test]
fn shorthands_and_logical_destinations() {
    let r = Rig::new(3);
    for vp in 0..3 {
        r.fabric.lapic_store(VpIndex(vp), reg::LDR.into(), 1 << (24 + vp));
    }
    r.log.take();
    r.store(reg::ICR_LOW, 0xC_0041); // all but me
    assert_eq!(r.log.take(), ["int 1", "int 2"]);
    r.store(reg::ICR_LOW, 0x4_0042); // me
    assert_eq!(r.log.take(), ["int 0"]);
    r.store(reg::ICR_HIGH, 0x06 << 24);
    r.store(reg::ICR_LOW, 0x0843); // logical, flat
    assert_eq!(r.fabric.acknowledge(AP), Some(0x43));
    for vp in 0..3 {
        r.fabric.lapic_store(VpIndex(vp), reg::DFR.into(), 0);
        r.fabric.lapic_store(VpIndex(vp), reg::LDR.into(), 0x21 << 24 | (vp << 25));
    }
    r.log.take();
    r.store(reg::ICR_HIGH, 0x22 << 24);
    r.store(reg::ICR_LOW, 0x0854); // cluster 2, member 1
    assert_eq!(r.log.take(), ["int 1"]);
    r.fabric.msi(0xFEE0_0008 | 0xFF << 12, 0x65); // redirection hint: one of all
    assert_eq!(r.log.take().len(), 1);
}

#[test]
fn x2apic_registers_and_mode_changes() {
    let r = Rig::new(2);
    let f = &r.fabric;
    assert!(f.read_msr(BSP, 0x802).is_err(), "xAPIC mode");
    assert!(f.write_msr(BSP, 0x1B, 0xFEE0_0400).is_err(), "EXTD without EN");
    f.write_msr(BSP, 0x1B, 0xFEE0_0C00).unwrap();
    f.write_msr(AP, 0x1B, 0xFEE0_0C00).unwrap();
    assert!(f.write_msr(BSP, 0x1B, 0xFEE0_0800).is_err(), "x2APIC to xAPIC");
    assert_eq!(f.read_msr(AP, 0x802), Ok(1));
    assert_eq!(f.read_msr(AP, 0x80D), Ok(2));
    f.write_msr(BSP, 0x830, 1 << 32 | 0x41).unwrap();
    assert_eq!(f.acknowledge(AP), Some(0x41));
    assert!(f.write_msr(AP, 0x80B, 1).is_err());
    f.write_msr(AP, 0x80B, 0).unwrap();
    f.write_msr(AP, 0x83F, 0x77).unwrap();
    assert_eq!(f.acknowledge(AP), Some(0x77));
    assert!(f.write_msr(BSP, 0x80E, 0).is_err(), "no DFR in x2APIC mode");
    assert_eq!(f.lapic_load(BSP, reg::ID.into()), u32::MAX);
}

#[test]
fn illegal_vectors_show_in_esr_after_a_write() {
    let r = Rig::new(1);
    r.store(reg::LVT_ERROR, 0xFE);
    r.store(reg::ICR_LOW, 0x4_0005);
    r.fabric.msi(0xFEE0_0000, 0x03);
    assert_eq!(r.load(reg::ESR), 0);
    r.store(reg::ESR, 0);
    assert_eq!(r.load(reg::ESR), reg::ESR_SEND_ILLEGAL | reg::ESR_RECEIVE_ILLEGAL);
    assert_eq!(r.fabric.acknowledge(BSP), Some(0xFE));
}

#[test]
fn lvt_masks_follow_the_software_enable() {
    let r = Rig::new(1);
    r.store(reg::LVT_PERF, 0x400);
    assert_eq!(r.load(reg::LVT_PERF), 0x400);
    r.fabric.performance_event(BSP);
    assert_eq!(r.log.take(), ["nmi 0"]);
    r.store(reg::SVR, 0xFF);
    assert_eq!(r.load(reg::LVT_PERF), 0x1_0400);
    r.store(reg::LVT_PERF, 0x400);
    assert_eq!(r.load(reg::LVT_PERF), 0x1_0400);
}

#[test]
fn hostile_accesses_do_nothing_bad() {
    let r = Rig::new(1);
    let mut w = IoApicWindow::new(r.fabric.clone());
    for select in 0..=255 {
        w.mmio_store(0, Width::W32, select);
        w.mmio_store(0x10, Width::W32, u64::from(u32::MAX));
        w.mmio_load(0x10, Width::W32);
    }
    for offset in (0..0x1000).step_by(4) {
        r.fabric.lapic_store(BSP, offset, u32::MAX);
        r.fabric.lapic_load(BSP, offset);
    }
    r.fabric.set_level(u32::MAX, true);
    r.fabric.msi(u64::MAX, u32::MAX);
    assert_eq!(r.fabric.acknowledge(VpIndex(9)), None);
}

#[test]
fn wired_or_is_high_while_any_source_is() {
    let r = Rig::new(1);
    let or = WiredOr::new(crate::irq::IrqLine::new(r.fabric.clone(), 16, Counter::detached()));
    r.redirect(16, 0x8055);
    or.set_level(0, true);
    or.set_level(1, true);
    or.set_level(0, false);
    assert_eq!(r.fabric.acknowledge(BSP), Some(0x55));
    r.store(reg::EOI, 0);
    assert!(r.fabric.has_interrupt(BSP));
    or.set_level(1, false);
    or.set_level(64, true);
}

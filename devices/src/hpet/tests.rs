//! What the specification's programming examples and Linux's hpet.c do.

use super::*;
use crate::counters::Counter;
use crate::time::{ManualClock, TimerQueue};
use std::sync::Mutex;

#[derive(Default)]
struct Levels(Mutex<[bool; 32]>);
impl IrqSink for Levels {
    fn set_level(&self, input: u32, high: bool) {
        self.0.lock().unwrap()[input as usize] = high;
    }
}

struct Rig {
    clock: Arc<ManualClock>,
    queue: Arc<TimerQueue>,
    levels: Arc<Levels>,
    edges: [Counter; 3],
    legacy: Arc<LegacyRoute>,
    hpet: Arc<Mutex<Hpet>>,
}

impl Rig {
    fn new() -> Rig {
        let clock = Arc::new(ManualClock::default());
        let queue = TimerQueue::new();
        let levels = Arc::new(Levels::default());
        let edges = std::array::from_fn(|_| Counter::detached());
        let line = |n: u32, i: usize| IrqLine::new(levels.clone(), n, Counter::clone(&edges[i]));
        let legacy = LegacyRoute::new(line(0, 0), line(8, 1));
        let timer = queue.timer();
        let key = timer.key();
        let wiring = HpetWiring { routes: vec![(20, line(20, 2))], legacy: legacy.clone() };
        let hpet = crate::share(Hpet::new(clock.clone(), timer, wiring));
        crate::bind_timer(&queue, key, &hpet);
        Rig { clock, queue, levels, edges, legacy, hpet }
    }
    fn load(&self, offset: u64) -> u64 {
        self.hpet.lock().unwrap().mmio_load(offset, Width::W64)
    }
    fn store32(&self, offset: u64, value: u64) {
        self.hpet.lock().unwrap().mmio_store(offset, Width::W32, value);
    }
    fn run_to(&self, ns: u64) {
        self.clock.set(VmTime(ns));
        self.queue.run_expired(VmTime(ns));
    }
    fn level(&self, n: usize) -> bool {
        self.levels.0.lock().unwrap()[n]
    }
}

#[test]
fn capabilities_are_what_drivers_accept() {
    let r = Rig::new();
    assert_eq!(r.load(GCAP_ID), 0x0098_9680_8086_A201);
    const { assert!(PERIOD_FS <= 0x05F5_E100, "at most 100 ns") };
    assert_eq!(r.load(TIMER0), 0x0010_0000_0000_0030);
    let upper = r.hpet.lock().unwrap().mmio_load(4, Width::W32);
    assert_eq!(upper, PERIOD_FS);
}

#[test]
fn counter_runs_only_while_enabled_and_is_written_only_while_halted() {
    let r = Rig::new();
    r.run_to(1000);
    assert_eq!(r.load(MAIN_CNT), 0);
    r.store32(MAIN_CNT, 7);
    r.store32(GEN_CONF, 1);
    r.run_to(3000);
    assert_eq!(r.load(MAIN_CNT), 207);
    r.store32(MAIN_CNT, 0);
    assert_eq!(r.load(MAIN_CNT), 207);
    r.store32(GEN_CONF, 0);
    r.run_to(9000);
    assert_eq!(r.load(MAIN_CNT), 207);
}

#[test]
fn periodic_legacy_tick_as_linux_programs_it() {
    let r = Rig::new();
    r.store32(GEN_CONF, ENABLE_CNF | LEG_RT_CNF);
    r.run_to(500);
    r.store32(TIMER0, TN_INT_ENB_CNF | TN_TYPE_CNF | TN_VAL_SET_CNF | TN_32MODE_CNF);
    r.store32(TIMER0 + 8, 50 + 100); // first match
    r.store32(TIMER0 + 8, 100); // period
    for k in 1..=10 {
        r.run_to(500 + k * 1000 - 1);
        assert_eq!(r.edges[0].get(), k - 1);
        r.run_to(500 + k * 1000);
        assert_eq!(r.edges[0].get(), k);
    }
    r.run_to(500 + 15_300);
    assert_eq!(r.edges[0].get(), 11, "late ones merge");
    assert_eq!(r.queue.next_deadline(), Some(VmTime(500 + 16_000)), "and the period does not drift");
}

#[test]
fn legacy_replacement_cuts_off_the_pit() {
    let r = Rig::new();
    r.legacy.set_level(LegacyRoute::PIT, true);
    assert!(r.level(0));
    r.store32(GEN_CONF, LEG_RT_CNF);
    assert!(!r.level(0));
    r.legacy.set_level(LegacyRoute::RTC, true);
    assert!(!r.level(8));
    r.store32(GEN_CONF, 0);
    assert!(r.level(0) && r.level(8));
}

#[test]
fn level_one_shot_holds_the_line_until_status_is_cleared() {
    let r = Rig::new();
    r.store32(GEN_CONF, ENABLE_CNF);
    r.store32(TIMER0 + 0x40, TN_INT_ENB_CNF | TN_INT_TYPE_CNF | 20 << 9);
    r.hpet.lock().unwrap().mmio_store(TIMER0 + 0x48, Width::W64, 1000);
    r.run_to(9_999);
    assert!(!r.level(20));
    r.run_to(10_000);
    assert!(r.level(20));
    assert_eq!(r.load(GINTR_STA), 4);
    r.store32(GINTR_STA, 4);
    assert!(!r.level(20));
    assert_eq!(r.queue.next_deadline(), None);
}

#[test]
fn thirty_two_bit_one_shot_wraps() {
    let r = Rig::new();
    r.store32(MAIN_CNT, 0xFFFF_FFF0);
    r.store32(TIMER0 + 0x40, TN_INT_ENB_CNF | TN_32MODE_CNF | 20 << 9);
    r.store32(TIMER0 + 0x48, 0x10);
    r.store32(GEN_CONF, ENABLE_CNF);
    r.run_to(319);
    assert_eq!(r.edges[2].get(), 0);
    r.run_to(320);
    assert_eq!(r.edges[2].get(), 1);
}

#[test]
fn garbage_does_no_harm() {
    let r = Rig::new();
    for offset in (0..LEN).step_by(4) {
        for v in [u64::from(u32::MAX), 0, 0x4E] {
            r.store32(offset, v);
            r.store32(GEN_CONF, 3);
            r.clock.advance(1_000_000_000_000);
            r.load(offset & !7);
        }
    }
}

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

// --- register by register (specification 1.0a, section 2.3) ---

impl Rig {
    fn store64(&self, offset: u64, value: u64) {
        self.hpet.lock().unwrap().mmio_store(offset, Width::W64, value);
    }
    /// Comparator 2, routed to input 20.
    const T2: u64 = TIMER0 + 0x40;
}

#[test]
fn reserved_and_read_only_bits_stay() {
    let r = Rig::new();
    let capabilities = r.load(GCAP_ID);
    for offset in (0..LEN).step_by(8) {
        r.store64(offset, u64::MAX);
    }
    assert_eq!(r.load(GCAP_ID), capabilities);
    assert_eq!(r.load(GEN_CONF), 3);
    assert_eq!(r.load(GINTR_STA), 0, "writing ones clears");
    // 2.3.8: the FSB bits are not there; the route 31 is not either, so the old one reads back; VAL_SET has cleared itself.
    assert_eq!(r.load(TIMER0) & 0xFFFF_FFFF, 0x13E);
    for offset in [0x008, 0x018, 0x028, 0x0F8, TIMER0 + 0x10, TIMER0 + 0x60, 0x3F8] {
        assert_eq!(r.load(offset), 0, "{offset:x}");
    }
}

/// 2.3.8, Tn_INT_ROUTE_CNF: a value that is not supported does not read back.
#[test]
fn only_routes_that_exist_can_be_chosen() {
    let r = Rig::new();
    assert_eq!(r.load(Rig::T2) >> 32, 1 << 20);
    r.store32(Rig::T2, 20 << 9);
    assert_eq!(r.load(Rig::T2) & TN_INT_ROUTE_CNF, 20 << 9);
    r.store32(Rig::T2, 5 << 9);
    assert_eq!(r.load(Rig::T2) & TN_INT_ROUTE_CNF, 20 << 9);
}

#[test]
fn registers_are_reached_by_halves() {
    let r = Rig::new();
    r.store32(MAIN_CNT, 0x89AB_CDEF);
    r.store32(MAIN_CNT + 4, 0x0123_4567);
    assert_eq!(r.load(MAIN_CNT), 0x0123_4567_89AB_CDEF);
    let high = r.hpet.lock().unwrap().mmio_load(MAIN_CNT + 4, Width::W32);
    assert_eq!(high, 0x0123_4567);
    r.store32(Rig::T2 + 8, 0x1111_2222);
    assert_eq!(r.load(Rig::T2 + 8), 0xFFFF_FFFF_1111_2222, "comparators are all ones after reset");
    r.store32(Rig::T2 + 12, 0x3333_4444);
    assert_eq!(r.load(Rig::T2 + 8), 0x3333_4444_1111_2222);
}

/// 2.3.9.2.2: without VAL_SET a write sets the period alone; with it the accumulator too, once.
#[test]
fn val_set_lets_one_write_reach_the_accumulator() {
    let r = Rig::new();
    r.store64(Rig::T2, TN_TYPE_CNF | TN_VAL_SET_CNF | TN_INT_ENB_CNF | 20 << 9);
    r.store64(Rig::T2 + 8, 500);
    assert_eq!(r.load(Rig::T2) & TN_VAL_SET_CNF, 0, "clears itself");
    r.store64(Rig::T2 + 8, 100);
    assert_eq!(r.load(Rig::T2 + 8), 500, "the accumulator is what reads");
    r.store32(GEN_CONF, ENABLE_CNF);
    for (ns, edges) in [(4_999, 0), (5_000, 1), (5_999, 1), (6_000, 2)] {
        r.run_to(ns);
        assert_eq!(r.edges[2].get(), edges, "at {ns}");
    }
    assert_eq!(r.load(Rig::T2 + 8), 700);
    r.store64(Rig::T2 + 8, 300);
    r.run_to(7_000);
    assert_eq!(r.load(Rig::T2 + 8), 1000, "the new period counts from the next match on");
}

/// 2.3.9.2.2: a 64-bit period written by halves, VAL_SET before each, lower half first.
#[test]
fn a_64_bit_period_by_halves() {
    let r = Rig::new();
    for (half, value) in [(0, 0u64), (4, 2)] {
        r.store32(Rig::T2, TN_TYPE_CNF | TN_VAL_SET_CNF | TN_INT_ENB_CNF | 20 << 9);
        r.store32(Rig::T2 + 8 + half, value);
    }
    assert_eq!(r.load(Rig::T2 + 8), 2 << 32);
    r.store32(GEN_CONF, ENABLE_CNF);
    assert_eq!(r.queue.next_deadline(), Some(VmTime((2 << 32) * 10)));
    r.run_to((2 << 32) * 10);
    assert_eq!((r.edges[2].get(), r.load(Rig::T2 + 8)), (1, 4 << 32));
}

/// 2.3.9.2.1: a one-shot fires when the counter equals it, which a comparator behind the counter does not until the wrap.
#[test]
fn one_shots_fire_once_per_wrap() {
    let r = Rig::new();
    r.store32(GEN_CONF, ENABLE_CNF);
    r.run_to(10_000);
    r.store32(Rig::T2, TN_INT_ENB_CNF | 20 << 9);
    r.store64(Rig::T2 + 8, 999);
    r.run_to(10_000_000);
    assert_eq!(r.edges[2].get(), 0, "in the past");
    r.store32(Rig::T2, TN_INT_ENB_CNF | TN_32MODE_CNF | 20 << 9);
    assert_eq!(r.load(Rig::T2 + 8) >> 32, 0);
    let wrap = (1u64 << 32) * 10;
    for k in 1..=3 {
        r.run_to(k * wrap + 9_990);
        assert_eq!(r.edges[2].get(), k, "32-bit mode fires at every wrap");
    }
}

/// 2.3.6: the status bit is set by the match whether or not the interrupt is enabled; edges have none.
#[test]
fn status_bits_belong_to_level_interrupts() {
    let r = Rig::new();
    r.store32(Rig::T2, TN_INT_TYPE_CNF | 20 << 9);
    r.store64(Rig::T2 + 8, 10);
    r.store32(TIMER0 + 0x28, 10);
    r.store32(TIMER0 + 0x2C, 0);
    r.store32(GEN_CONF, ENABLE_CNF);
    r.run_to(1000);
    assert_eq!((r.load(GINTR_STA), r.level(20)), (4, false));
    r.store32(Rig::T2, TN_INT_TYPE_CNF | TN_INT_ENB_CNF | 20 << 9);
    assert!(r.level(20), "enabled while active");
    r.store32(GINTR_STA, 3);
    assert!(r.level(20), "other bits");
    r.store32(GEN_CONF, 0);
    assert!(!r.level(20), "ENABLE_CNF = 0: no interrupts");
    r.store32(GEN_CONF, ENABLE_CNF);
    assert!(r.level(20));
    r.store32(Rig::T2, TN_INT_ENB_CNF | 20 << 9);
    assert_eq!((r.load(GINTR_STA), r.level(20)), (0, false), "edge triggered now");
}

#[test]
fn two_levels_share_a_route() {
    let r = Rig::new();
    for (n, compare) in [(0u64, 100), (2, 50)] {
        r.store32(TIMER0 + n * 0x20, TN_INT_TYPE_CNF | TN_INT_ENB_CNF | 20 << 9);
        r.store64(TIMER0 + n * 0x20 + 8, compare);
    }
    r.store32(GEN_CONF, ENABLE_CNF);
    r.run_to(500);
    assert!(r.level(20));
    r.run_to(1000);
    r.store32(GINTR_STA, 4);
    assert!(r.level(20), "timer 0 still asks");
    r.store32(GINTR_STA, 1);
    assert!(!r.level(20));
}

/// 2.4.2: in legacy mode timers 0 and 1 are IRQ 0 and 8 whatever their routes say, timer 2 keeps its own. An edge stays up
/// until the next, so that an 8259A that is slow to ask finds it.
#[test]
fn legacy_mode_replaces_the_routes_of_two_timers() {
    let r = Rig::new();
    for n in 0..3 {
        r.store32(TIMER0 + n * 0x20, TN_INT_ENB_CNF | 20 << 9);
        r.store64(TIMER0 + n * 0x20 + 8, 100 * (n + 1));
    }
    r.store32(GEN_CONF, ENABLE_CNF | LEG_RT_CNF);
    r.run_to(1000);
    assert_eq!((r.level(0), r.level(8), r.edges[2].get()), (true, false, 0));
    r.run_to(2000);
    assert_eq!((r.level(0), r.level(8), r.edges[2].get()), (true, true, 0));
    r.run_to(3000);
    assert_eq!(r.edges[2].get(), 1);
    r.store32(GEN_CONF, ENABLE_CNF);
    assert!(!r.level(0) && !r.level(8));
}

#[test]
fn reset_is_the_power_on_state() {
    let r = Rig::new();
    r.store32(TIMER0, TN_INT_TYPE_CNF | TN_INT_ENB_CNF);
    r.store64(TIMER0 + 8, 10);
    r.store32(GEN_CONF, ENABLE_CNF | LEG_RT_CNF);
    r.run_to(1000);
    assert!(r.level(0));
    r.hpet.lock().unwrap().reset(ResetKind::Bus);
    assert!(!r.level(0));
    assert_eq!([GEN_CONF, GINTR_STA, MAIN_CNT, TIMER0 + 8].map(|o| r.load(o)), [0, 0, 0, u64::MAX]);
    assert_eq!(r.queue.next_deadline(), None);
}

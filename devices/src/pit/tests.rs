//! Waveforms of the 8254 datasheet, clock by clock.

use super::*;
use crate::counters::Counter as Count;
use crate::irq::IrqSink;
use crate::time::{ManualClock, TimerQueue};
use std::sync::Mutex;

struct NoSink;
impl IrqSink for NoSink {
    fn set_level(&self, _input: u32, _high: bool) {}
}

struct Rig {
    clock: Arc<ManualClock>,
    queue: Arc<TimerQueue>,
    edges: Count,
    pit: Arc<Mutex<Pit>>,
    tick: u64,
}

impl Rig {
    fn new() -> Rig {
        let clock = Arc::new(ManualClock::default());
        let queue = TimerQueue::new();
        let timer = queue.timer();
        let key = timer.key();
        let edges = Count::detached();
        let line = IrqLine::new(Arc::new(NoSink), 0, edges.clone());
        let pit = crate::share(Pit::new(clock.clone(), timer, line));
        crate::bind_timer(&queue, key, &pit);
        Rig { clock, queue, edges, pit, tick: 0 }
    }
    fn out(&self, port: u16, value: u8) {
        self.pit.lock().unwrap().port_out(Port(port), Width::W8, value.into());
    }
    fn read(&self, port: u16) -> u8 {
        self.pit.lock().unwrap().port_in(Port(port), Width::W8) as u8
    }
    fn run(&mut self, ticks: u64) {
        self.tick += ticks;
        let t = VmTime::from_ticks(self.tick, HZ);
        self.clock.set(t);
        self.queue.run_expired(t);
    }
    fn out2(&self) -> bool {
        self.read(0x61) & 0x20 != 0
    }
    /// OUT2 for each of the next `n` clocks.
    fn wave(&mut self, n: usize) -> String {
        (0..n)
            .map(|_| {
                self.run(1);
                if self.out2() { '1' } else { '0' }
            })
            .collect()
    }
    fn count2(&self) -> u16 {
        self.out(0x43, 0x80);
        u16::from_le_bytes([self.read(0x42), self.read(0x42)])
    }
}

#[test]
fn mode_0_rises_n_plus_1_clocks_after_the_count() {
    let mut r = Rig::new();
    r.out(0x61, 1);
    r.out(0x43, 0xB0);
    r.out(0x42, 4);
    r.out(0x42, 0);
    assert_eq!(r.wave(6), "000011");
    assert_eq!(r.count2(), 0xFFFF, "counts on through zero");
    r.out(0x42, 4);
    assert!(!r.out2(), "the first byte of a new count disables counting");
}

#[test]
fn mode_0_gate_pauses() {
    let mut r = Rig::new();
    r.out(0x61, 1);
    r.out(0x43, 0x90);
    r.out(0x42, 4);
    r.run(3);
    r.out(0x61, 0);
    r.run(100);
    assert_eq!(r.read(0x42), 2);
    r.out(0x61, 1);
    assert_eq!(r.wave(3), "011");
}

#[test]
fn mode_1_is_a_retriggerable_one_shot() {
    let mut r = Rig::new();
    r.out(0x43, 0x92);
    r.out(0x42, 3);
    assert_eq!(r.wave(3), "111");
    r.out(0x61, 1);
    assert_eq!(r.wave(5), "00011");
    r.out(0x61, 0);
    r.out(0x61, 1);
    r.run(2);
    r.out(0x61, 0);
    r.out(0x61, 1);
    assert_eq!(r.wave(4), "0001");
}

#[test]
fn mode_2_is_low_for_one_clock_in_n() {
    let mut r = Rig::new();
    r.out(0x61, 1);
    r.out(0x43, 0x94);
    r.out(0x42, 3);
    assert_eq!(r.wave(8), "11011011");
    r.out(0x42, 4); // takes effect after the current period
    assert_eq!(r.wave(6), "011101");
    r.out(0x61, 0);
    assert!(r.out2());
    r.out(0x61, 1);
    assert_eq!(r.wave(5), "11101");
}

#[test]
fn mode_3_square_wave_even_and_odd() {
    let mut r = Rig::new();
    r.out(0x61, 1);
    r.out(0x43, 0x96);
    r.out(0x42, 4);
    assert_eq!(r.wave(9), "110011001");
    r.out(0x43, 0x96);
    r.out(0x42, 5);
    assert_eq!(r.wave(11), "11100111001");
    r.out(0x43, 0xB6);
    r.out(0x42, 8);
    r.out(0x42, 0);
    let counts: Vec<u16> = (0..6)
        .map(|_| {
            r.run(1);
            r.count2()
        })
        .collect();
    assert_eq!(counts, [8, 6, 4, 2, 8, 6]);
}

#[test]
fn modes_4_and_5_strobe_once() {
    let mut r = Rig::new();
    r.out(0x61, 1);
    r.out(0x43, 0x98);
    r.out(0x42, 3);
    assert_eq!(r.wave(7), "1110111");
    r.out(0x61, 0);
    r.out(0x43, 0x9A);
    r.out(0x42, 3);
    assert_eq!(r.wave(4), "1111");
    r.out(0x61, 1);
    assert_eq!(r.wave(7), "1110111");
}

#[test]
fn bcd_counts_in_decimal() {
    let mut r = Rig::new();
    r.out(0x61, 1);
    r.out(0x43, 0xB5);
    r.out(0x42, 0);
    r.out(0x42, 0x10); // 1000
    r.run(2);
    assert_eq!(r.count2(), 0x0999);
}

#[test]
fn read_back_gives_status_then_count() {
    let mut r = Rig::new();
    r.out(0x43, 0x34);
    r.out(0x43, 0xE2);
    assert_eq!(r.read(0x40), 0xF4, "OUT high, null count, both bytes, mode 2");
    r.out(0x40, 0x00);
    r.out(0x40, 0x10);
    r.run(1);
    r.out(0x43, 0xC2); // status and count of counter 0
    r.run(500);
    r.out(0x43, 0xC2); // ignored: already latched
    assert_eq!([r.read(0x40), r.read(0x40), r.read(0x40)], [0xB4, 0x00, 0x10]);
    r.out(0x43, 0x00);
    r.run(7);
    assert_eq!(u16::from_le_bytes([r.read(0x40), r.read(0x40)]), 0x1000 - 500);
}

#[test]
fn out0_gives_one_edge_per_period_without_drift() {
    let mut r = Rig::new();
    r.out(0x43, 0x34);
    r.out(0x40, 0x9C);
    r.out(0x40, 0x2E); // 11932: 100 Hz
    let before = r.edges.get();
    for _ in 0..100 {
        r.run(11_932);
    }
    assert_eq!(r.edges.get() - before, 99, "the first period ends one clock after the count was written");
    r.run(1);
    assert_eq!(r.edges.get() - before, 100);
    r.run(11_932 * 1000 + 5);
    assert_eq!(r.edges.get() - before, 101, "late periods merge");
    assert_eq!(r.queue.next_deadline(), Some(VmTime::from_ticks(11_932 * 1101 + 1, HZ)));
}

#[test]
fn tsc_calibration_sees_out2_after_50_ms() {
    let mut r = Rig::new();
    r.out(0x61, r.read(0x61) & !2 | 1);
    r.out(0x43, 0xB0);
    let latch = 59_659u16.to_le_bytes();
    r.out(0x42, latch[0]);
    r.out(0x42, latch[1]);
    r.run(59_659);
    assert!(!r.out2());
    r.run(1);
    assert!(r.out2());
}

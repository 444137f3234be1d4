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

// --- awkward cases of the modes (231164-005, "Mode definitions"); N is the count, counter 2 has the gate ---

/// Control word for counter 2, both bytes.
fn mode2(mode: u8) -> u8 {
    0xB0 | mode << 1
}

impl Rig {
    fn load2(&self, count: u16) {
        let [low, high] = count.to_le_bytes();
        self.out(0x42, low);
        self.out(0x42, high);
    }
    fn gate2(&self, high: bool) {
        self.out(0x61, high.into());
    }
    fn status2(&self) -> u8 {
        self.out(0x43, 0xE8);
        self.read(0x42)
    }
}

/// "The control word ... OUT is initially low" in mode 0, high in all others; null count until the first load.
#[test]
fn control_words_set_out_and_null_count() {
    let mut r = Rig::new();
    for mode in 0..6 {
        r.out(0x43, mode2(mode));
        r.run(100);
        let out = if mode == 0 { 0 } else { 0x80 };
        assert_eq!(r.status2(), out | 0x40 | 0x30 | mode << 1, "mode {mode}");
    }
    for (bits, written) in [(6, 0x3C), (7, 0x3E)] {
        r.out(0x43, mode2(bits));
        assert_eq!(r.status2() & 0x3F, written, "D5-D0 exactly as written");
    }
}

/// Read-back status: null count is set by the control word and by a count, and cleared when the element is loaded.
#[test]
fn null_count_lasts_until_the_element_is_loaded() {
    let mut r = Rig::new();
    r.gate2(true);
    r.out(0x43, mode2(2));
    r.out(0x42, 4);
    assert_eq!(r.status2() & 0x40, 0x40, "one byte of two");
    r.out(0x42, 0);
    assert_eq!(r.status2() & 0x40, 0x40);
    r.run(1);
    assert_eq!(r.status2() & 0x40, 0);
    r.load2(6);
    r.run(3);
    assert_eq!(r.status2() & 0x40, 0x40, "a new count waits for the end of the period");
    r.run(1);
    assert_eq!(r.status2() & 0x40, 0);
    r.out(0x43, mode2(1));
    r.load2(3);
    r.run(10);
    assert_eq!(r.status2() & 0x40, 0x40, "mode 1 waits for a trigger");
    r.gate2(false);
    r.gate2(true);
    r.run(1);
    assert_eq!(r.status2() & 0x40, 0);
}

#[test]
fn mode_0_loads_without_the_gate_and_counts_with_it() {
    let mut r = Rig::new();
    r.out(0x43, mode2(0));
    r.load2(3);
    r.run(10);
    assert_eq!((r.count2(), r.out2()), (3, false), "loaded on the next clock, gate or not");
    r.gate2(true);
    assert_eq!(r.wave(4), "0011", "N clocks after the gate");
    r.load2(2);
    assert!(!r.out2(), "a new count takes OUT down again");
    assert_eq!(r.wave(4), "0011");
}

#[test]
fn mode_0_single_byte_counts_start_at_once() {
    let mut r = Rig::new();
    r.gate2(true);
    r.out(0x43, 0xA0); // most significant byte only
    r.out(0x42, 1);
    r.run(1);
    assert_eq!(r.read(0x42), 1);
    r.run(255);
    assert!(!r.out2());
    r.run(1);
    assert!(r.out2(), "256 clocks and the one for loading");
}

#[test]
fn mode_1_keeps_its_pulse_when_a_count_is_written() {
    let mut r = Rig::new();
    r.out(0x43, mode2(1));
    r.load2(3);
    r.gate2(true);
    r.run(2);
    r.load2(5);
    assert_eq!(r.wave(3), "011", "the pulse under way is as long as it was");
    r.gate2(false);
    assert_eq!(r.wave(2), "11", "the gate's level means nothing");
    r.gate2(true);
    assert_eq!(r.wave(7), "0000011");
    assert_eq!(r.count2(), 0xFFFF, "and counts on");
}

#[test]
fn mode_2_gate_raises_out_at_once_and_a_trigger_reloads() {
    let mut r = Rig::new();
    r.gate2(true);
    r.out(0x43, mode2(2));
    r.load2(4);
    assert_eq!(r.wave(4), "1110");
    r.gate2(false);
    assert!(r.out2(), "during the low pulse");
    r.run(50);
    r.gate2(true);
    assert_eq!(r.wave(5), "11101", "one clock to load, then as from the start");
    r.gate2(false);
    r.load2(2);
    r.gate2(true);
    assert_eq!(r.wave(5), "10101", "the trigger takes the new count");
}

#[test]
fn mode_2_and_3_load_without_the_gate() {
    for mode in [2, 3] {
        let mut r = Rig::new();
        r.out(0x43, mode2(mode));
        r.load2(8);
        r.run(20);
        assert_eq!((r.status2() & 0x40, r.count2(), r.out2()), (0, 8, true), "mode {mode}");
        r.gate2(true);
        assert_eq!(r.wave(8), if mode == 2 { "11111110" } else { "11110000" });
    }
}

#[test]
fn mode_3_takes_a_new_count_at_the_half_cycle() {
    let mut r = Rig::new();
    r.gate2(true);
    r.out(0x43, mode2(3));
    r.load2(6);
    assert_eq!(r.wave(2), "11");
    r.load2(4);
    assert_eq!(r.wave(8), "10011001");
    r.gate2(false);
    assert!(r.out2());
    r.gate2(true);
    assert_eq!(r.wave(5), "11001");
}

/// "Mode 3 ... odd counts": N-1 is loaded, one extra clock while OUT is high.
#[test]
fn mode_3_odd_counts_read_even() {
    let mut r = Rig::new();
    r.gate2(true);
    r.out(0x43, mode2(3));
    r.load2(5);
    let counts: Vec<u16> = (0..10)
        .map(|_| {
            r.run(1);
            r.count2()
        })
        .collect();
    assert_eq!(counts, [4, 2, 0, 4, 2, 4, 2, 0, 4, 2]);
}

#[test]
fn mode_4_strobe_ends_even_with_the_gate_low_or_a_new_count() {
    let mut r = Rig::new();
    r.gate2(true);
    r.out(0x43, mode2(4));
    r.load2(2);
    assert_eq!(r.wave(3), "110");
    r.gate2(false);
    assert_eq!(r.wave(2), "11", "GATE has no effect on OUT");
    r.gate2(true);
    r.load2(2);
    assert_eq!(r.wave(3), "110");
    r.load2(2);
    assert_eq!(r.wave(4), "1101");
    r.load2(3);
    r.run(2);
    r.out(0x42, 9);
    assert_eq!(r.wave(3), "101", "the first byte of two has no effect");
}

#[test]
fn mode_5_is_retriggered_even_in_its_strobe() {
    let mut r = Rig::new();
    r.out(0x43, mode2(5));
    r.load2(2);
    r.gate2(true);
    assert_eq!(r.wave(2), "11");
    r.gate2(false);
    r.gate2(true);
    assert_eq!(r.wave(3), "110");
    r.gate2(false);
    r.gate2(true);
    assert_eq!(r.wave(4), "1101");
}

#[test]
fn zero_is_the_largest_count() {
    let mut r = Rig::new();
    r.gate2(true);
    for (word, clocks) in [(mode2(0), 65_536), (mode2(0) | 1, 10_000)] {
        r.out(0x43, word);
        r.load2(0);
        r.run(clocks);
        assert!(!r.out2(), "{clocks}");
        r.run(1);
        assert!(r.out2(), "{clocks}");
        r.run(1);
        assert_eq!(r.count2(), if word & 1 != 0 { 0x9999 } else { 0xFFFF });
    }
}

/// "Counter latch command": held until read or reprogrammed, and a second command is ignored.
#[test]
fn latches_hold_until_read_or_reprogrammed() {
    let mut r = Rig::new();
    r.gate2(true);
    r.out(0x43, mode2(2));
    r.load2(0x1234);
    r.run(1);
    r.out(0x43, 0x80);
    r.run(100);
    r.out(0x43, 0x80);
    assert_eq!(r.read(0x42), 0x34);
    r.run(100);
    assert_eq!(r.read(0x42), 0x12, "both bytes of one moment");
    r.out(0x43, 0x80);
    r.out(0x43, mode2(2));
    r.load2(0x5678);
    r.run(1);
    assert_eq!([r.read(0x42), r.read(0x42)], [0x78, 0x56]);
    // Read and write of one counter interleave: each has its own byte order.
    r.out(0x42, 0x11);
    assert_eq!(r.read(0x42), 0x78);
    r.out(0x42, 0x22);
    assert_eq!(r.read(0x42), 0x56);
}

/// "Read-back command": status first, whichever was latched first; several counters at once.
#[test]
fn read_back_of_several_counters() {
    let mut r = Rig::new();
    r.gate2(true);
    for (word, port) in [(0x34, 0x40), (0x54, 0x41), (0xB4, 0x42)] {
        r.out(0x43, word);
        r.out(port, 0x10);
        if port != 0x41 {
            r.out(port, 0x20);
        }
    }
    r.run(1);
    r.out(0x43, 0xDE); // count of all three
    r.out(0x43, 0xEC); // status of 1 and 2
    r.run(5);
    assert_eq!([r.read(0x40), r.read(0x40)], [0x10, 0x20]);
    assert_eq!([r.read(0x41), r.read(0x41)], [0x94, 0x10], "OUT high, low byte only, mode 2; then the count");
    assert_eq!([r.read(0x42), r.read(0x42), r.read(0x42)], [0xB4, 0x10, 0x20]);
    r.out(0x43, 0xF2); // neither count nor status
    assert_eq!(r.read(0x40), 0x10 - 5, "not latched");
}

#[test]
fn port_b_keeps_four_bits_and_shows_refresh_and_out2() {
    let mut r = Rig::new();
    r.out(0x61, 0xFF);
    assert_eq!(r.read(0x61) & 0xCF, 0x0F);
    let toggles = |r: &mut Rig| {
        let first = r.read(0x61) & 0x10;
        r.run(18); // 15.085 us
        first != r.read(0x61) & 0x10
    };
    assert!(toggles(&mut r) && toggles(&mut r));
    r.out(0x43, mode2(3));
    r.load2(4);
    r.run(2);
    assert!(r.pit.lock().unwrap().speaker());
    r.out(0x61, 1);
    assert!(!r.pit.lock().unwrap().speaker(), "data bit off");
}

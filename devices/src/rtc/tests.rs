//! The MC146818 datasheet's update cycle, alarms and formats.

use super::*;
use crate::time::{ManualClock, TimerQueue};

struct Rig {
    clock: Arc<ManualClock>,
    queue: Arc<TimerQueue>,
    rtc: Arc<std::sync::Mutex<Rtc>>,
}

/// 2023-12-31 23:59:58 UTC, a Sunday.
const START: i64 = 1_704_067_198;

impl Rig {
    fn new() -> Rig {
        let clock = Arc::new(ManualClock::default());
        let queue = TimerQueue::new();
        let timer = queue.timer();
        let key = timer.key();
        let rtc = crate::share(Rtc::new(clock.clone(), timer, IrqLine::unconnected(), START));
        crate::bind_timer(&queue, key, &rtc);
        Rig { clock, queue, rtc }
    }
    fn read(&self, index: usize) -> u8 {
        let mut rtc = self.rtc.lock().unwrap();
        rtc.port_out(Port(INDEX), Width::W8, index as u32);
        rtc.port_in(Port(DATA), Width::W8) as u8
    }
    fn write(&self, index: usize, value: u8) {
        let mut rtc = self.rtc.lock().unwrap();
        rtc.port_out(Port(INDEX), Width::W8, index as u32);
        rtc.port_out(Port(DATA), Width::W8, value.into());
    }
    fn run_to(&self, ns: u64) {
        self.clock.set(VmTime(ns));
        self.queue.run_expired(VmTime(ns));
    }
    fn irq(&self) -> bool {
        self.rtc.lock().unwrap().irq.is_high()
    }
}

#[test]
fn new_year_in_bcd() {
    let r = Rig::new();
    assert_eq!([SECONDS, MINUTES, HOURS].map(|i| r.read(i)), [0x58, 0x59, 0x23]);
    assert_eq!([WEEKDAY, DAY, MONTH, YEAR, CENTURY].map(|i| r.read(i)), [1, 0x31, 0x12, 0x23, 0x20]);
    r.run_to(2 * SECOND);
    assert_eq!([SECONDS, MINUTES, HOURS].map(|i| r.read(i)), [0, 0, 0]);
    assert_eq!([WEEKDAY, DAY, MONTH, YEAR, CENTURY].map(|i| r.read(i)), [2, 1, 1, 0x24, 0x20]);
    assert_eq!(r.read(D), 0x80);
}

#[test]
fn uip_precedes_the_update() {
    let r = Rig::new();
    r.run_to(SECOND - UIP_NS - 1);
    assert_eq!(r.read(A), 0x26);
    r.run_to(SECOND - 1);
    assert_eq!(r.read(A), 0xA6);
    assert_eq!(r.read(SECONDS), 0x58);
    r.run_to(SECOND);
    assert_eq!(r.read(A), 0x26);
    assert_eq!(r.read(SECONDS), 0x59);
}

#[test]
fn set_stops_the_clock_and_twelve_hours_and_binary_are_honoured() {
    let r = Rig::new();
    r.write(B, B_SET | B_DM);
    r.write(HOURS, 0x80 | 11);
    r.write(MINUTES, 59);
    r.write(SECONDS, 59);
    for (i, v) in [(DAY, 28), (MONTH, 2), (YEAR, 24), (CENTURY, 20)] {
        r.write(i, v);
    }
    r.run_to(10 * SECOND);
    assert_eq!(r.read(SECONDS), 59);
    r.write(B, B_DM);
    r.run_to(11 * SECOND);
    assert_eq!([SECONDS, MINUTES, HOURS, DAY].map(|i| r.read(i)), [0, 0, 12, 29]);
}

#[test]
fn update_ended_interrupt_every_second() {
    let r = Rig::new();
    r.read(C);
    r.write(B, B_24H | B_UIE);
    r.run_to(SECOND);
    assert!(r.irq());
    assert_eq!(r.read(C) & !C_PF, C_IRQF | C_UF);
    assert!(!r.irq());
    assert_eq!(r.read(C), 0);
    r.run_to(2 * SECOND);
    assert!(r.irq());
}

#[test]
fn alarm_matches_with_wild_cards() {
    let r = Rig::new();
    r.write(SECONDS + 1, 0x05);
    r.write(MINUTES + 1, 0x01);
    r.write(HOURS + 1, 0xFF);
    r.write(B, B_24H | B_AIE);
    for s in 1..67 {
        r.run_to(s * SECOND);
        assert!(!r.irq(), "second {s}");
    }
    r.run_to(67 * SECOND);
    assert!(r.irq());
    assert_eq!(r.read(C) & C_AF, C_AF);
}

/// The alarm against what the clock shows in every second that passed.
#[test]
fn alarm_is_when_the_registers_say_so() {
    for (hour, minute, second) in
        [(0xFF, 0xFF, 0xFF), (0xC0, 0x30, 0xC0), (0x13, 0xFF, 0x59), (0, 0, 0), (0x7F, 0, 0)]
    {
        let r = Rig::new();
        for (register, value) in [(HOURS, hour), (MINUTES, minute), (SECONDS, second)] {
            r.write(register + 1, value);
        }
        let is_alarm = |is: [u8; 3]| {
            is.iter().zip([hour, minute, second]).all(|(&is, wanted)| wanted >= 0xC0 || is == wanted)
        };
        r.read(C);
        let mut at = 0;
        for step in [1, 1, 2, 59, 60, 61, 3599, 3600, 7200, 86_399, 1, 1, 1, 86_400] {
            let due = (1..=step).any(|s| {
                let later = Rig::new();
                later.write(B, B_24H);
                later.run_to((at + s) * SECOND);
                is_alarm([HOURS, MINUTES, SECONDS].map(|i| later.read(i)))
            });
            at += step;
            r.run_to(at * SECOND);
            assert_eq!(r.read(C) & C_AF != 0, due, "{hour:x}:{minute:x}:{second:x} at {at}");
        }
    }
}

#[test]
fn periodic_interrupt_at_1024_hz() {
    let r = Rig::new();
    r.read(C);
    r.write(B, B_24H | B_PIE);
    assert_eq!(r.queue.next_deadline(), Some(VmTime(976_563)));
    r.run_to(976_563);
    assert!(r.irq());
    assert_eq!(r.read(C), C_IRQF | C_PF);
    assert!(!r.irq());
    r.run_to(3 * 976_563);
    assert!(r.irq());
    r.rtc.lock().unwrap().reset(ResetKind::Bus);
    assert!(!r.irq());
    assert_eq!(r.queue.next_deadline(), None);
}

#[test]
fn leaving_divider_reset_updates_half_a_second_later() {
    let r = Rig::new();
    r.write(A, 0x76);
    r.run_to(5 * SECOND);
    assert_eq!(r.read(SECONDS), 0x58);
    r.write(A, 0x26);
    r.run_to(5 * SECOND + SECOND / 2);
    assert_eq!(r.read(SECONDS), 0x59);
}

#[test]
fn memory_size_nmi_mask_and_garbage() {
    let r = Rig::new();
    r.rtc.lock().unwrap().set_memory_size(3 << 30, 1 << 30);
    assert_eq!([r.read(0x15), r.read(0x16)], [0x80, 0x02]);
    assert_eq!([r.read(0x34), r.read(0x35)], [0x00, 0xBF]);
    assert_eq!([r.read(0x5B), r.read(0x5C), r.read(0x5D)], [0x00, 0x40, 0x00]);
    r.read(0x8F);
    assert!(r.rtc.lock().unwrap().nmi_masked());
    for i in 0..128 {
        r.write(i, 0xFF);
        r.run_to((i as u64 + 20) * SECOND);
    }
    r.write(B, 0);
    r.run_to(1000 * SECOND);
    r.read(SECONDS);
}

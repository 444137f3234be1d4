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

// --- register by register (DS9718) ---

/// "Register A", rate selection, and the periodic flag whether or not it is enabled.
#[test]
fn periodic_rates_are_those_of_the_table() {
    // RS3-RS0 to crystal cycles at 32.768 kHz: 0001 is 3.90625 ms, 0011 is 122.070 us, 1111 is 500 ms.
    let cycles = [128, 256, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384];
    for (rate, cycles) in (1..16).zip(cycles) {
        let r = Rig::new();
        r.write(A, 0x20 | rate);
        r.read(C);
        let due = VmTime::from_ticks(cycles, CRYSTAL_HZ).0;
        r.run_to(due - 1);
        assert_eq!(r.read(C), 0, "rate {rate}");
        r.run_to(due);
        assert_eq!(r.read(C), C_PF, "rate {rate}: PF without PIE is no request");
        r.write(B, B_24H | B_PIE);
        r.run_to(due * 2);
        assert!(r.irq(), "rate {rate}");
    }
    let r = Rig::new();
    r.write(A, 0x20);
    r.write(B, B_24H | B_PIE);
    r.read(C);
    r.run_to(100 * SECOND);
    assert!(!r.irq(), "rate 0 is none");
}

#[test]
fn periodic_interrupts_do_not_drift() {
    let r = Rig::new();
    r.write(A, 0x2F);
    r.write(B, B_24H | B_PIE);
    let mut taken = 0;
    for step in 1..=2000u64 {
        r.run_to(step * 50_000_003);
        taken += u64::from(r.irq());
        r.read(C);
    }
    assert_eq!(taken, 2000 * 50_000_003 / 500_000_000, "2 Hz over 100 s, noticed late every time");
}

#[test]
fn enabling_what_is_flagged_interrupts_at_once() {
    let r = Rig::new();
    r.run_to(SECOND);
    for (enable, flag) in [(B_PIE, C_PF), (B_UIE, C_UF)] {
        assert!(!r.irq());
        r.write(B, B_24H | enable);
        assert!(r.irq(), "{flag:x}");
        r.write(B, B_24H);
        assert!(!r.irq(), "IRQF follows the enables");
    }
    r.write(B, B_24H | B_UIE | B_PIE);
    assert_eq!(r.read(C) & (C_IRQF | C_PF | C_UF), C_IRQF | C_PF | C_UF);
    assert_eq!(r.read(C), 0, "reading clears all flags");
    assert!(!r.irq());
}

#[test]
fn registers_keep_what_they_should() {
    let r = Rig::new();
    r.write(A, 0xA6);
    assert_eq!(r.read(A), 0x26, "UIP is read-only");
    r.write(C, 0xFF);
    r.write(D, 0);
    assert_eq!([r.read(C), r.read(D)], [0, D_VRT]);
    r.write(B, 0x7F);
    assert_eq!(r.read(B), 0x7F);
    r.write(B, 0xFF);
    assert_eq!(r.read(B), !B_UIE, "SET clears UIE");
    let pattern = |i: usize| (i as u8) ^ 0x5A;
    for i in D + 1..CENTURY {
        r.write(i, pattern(i));
    }
    assert!((D + 1..CENTURY).all(|i| r.read(i) == pattern(i)));
    assert_eq!(r.rtc.lock().unwrap().port_in(Port(INDEX), Width::W8), 0xFF);
    r.rtc.lock().unwrap().reset(ResetKind::Bus);
    assert_eq!(r.read(B), !(B_PIE | B_AIE | B_UIE | B_SQWE), "RESET clears enables and SQWE");
    assert_eq!(r.read(D + 1), pattern(D + 1), "and leaves the battery's part alone");
}

/// "Time, calendar and alarm locations": the twelve-hour clock counts 12, 1, 2 … 11, bit 7 is PM.
#[test]
fn twelve_hour_clock_in_both_formats() {
    for (mode, hours) in
        [(0, [0x12, 0x01, 0x11, 0x92, 0x81, 0x91]), (B_DM, [12, 1, 11, 0x80 | 12, 0x81, 0x80 | 11])]
    {
        let r = Rig::new();
        r.write(B, B_SET | mode);
        for (register, value) in [(SECONDS, 58), (MINUTES, 59), (HOURS, 11 | 0x80)] {
            let bcd = |v: u8| (v & 0x80) | ((v & 0x7F) / 10) << 4 | ((v & 0x7F) % 10);
            r.write(register, if mode == 0 { bcd(value) } else { value });
        }
        r.write(B, mode);
        for (hour, expected) in [(0, 0), (1, 1), (11, 2), (12, 3), (13, 4), (23, 5)] {
            r.run_to((2 + hour * 3600) * SECOND);
            assert_eq!(r.read(HOURS), hours[expected], "hour {hour}");
        }
    }
}

#[test]
fn twelve_hour_alarm_knows_pm() {
    let r = Rig::new();
    r.write(B, B_SET | B_DM);
    for (register, value) in [(SECONDS, 59), (MINUTES, 59), (HOURS, 11)] {
        r.write(register, value);
    }
    for (register, value) in [(SECONDS, 0), (MINUTES, 0), (HOURS, 0x80 | 12)] {
        r.write(register + 1, value);
    }
    r.read(C);
    r.write(B, B_DM | B_AIE);
    r.run_to(SECOND);
    assert!(r.irq(), "noon is 12 PM");
    r.read(C);
    r.run_to(SECOND + 43_200 * SECOND);
    assert!(!r.irq(), "midnight is 12 AM");
    r.run_to(SECOND + 86_400 * SECOND);
    assert!(r.irq());
}

/// The weekday is a counter that midnight moves, not a function of the date.
#[test]
fn weekday_counts_for_itself() {
    let r = Rig::new();
    r.write(WEEKDAY, 6);
    for (day, expected) in [(0, 6), (1, 7), (2, 1), (9, 1)] {
        r.run_to(day * 86_400 * SECOND);
        assert_eq!(r.read(WEEKDAY), expected, "after {day} days");
    }
}

#[test]
fn calendar_rolls_over_leap_days_years_and_centuries() {
    for (from, to) in [
        ([0x28, 0x02, 0x23, 0x20], [0x01, 0x03, 0x23, 0x20]),
        ([0x28, 0x02, 0x24, 0x20], [0x29, 0x02, 0x24, 0x20]),
        ([0x28, 0x02, 0x00, 0x20], [0x29, 0x02, 0x00, 0x20]),
        ([0x30, 0x04, 0x26, 0x20], [0x01, 0x05, 0x26, 0x20]),
        ([0x31, 0x12, 0x99, 0x19], [0x01, 0x01, 0x00, 0x20]),
    ] {
        let r = Rig::new();
        r.write(B, B_SET | B_24H);
        let date = [DAY, MONTH, YEAR, CENTURY];
        for (register, value) in
            date.into_iter().zip(from).chain([(HOURS, 0x23), (MINUTES, 0x59), (SECONDS, 0x59)])
        {
            r.write(register, value);
        }
        r.write(B, B_24H);
        r.run_to(SECOND);
        assert_eq!(date.map(|i| r.read(i)), to);
    }
}

/// "Update cycle": SET, and the divider in reset, leave no update and no UIP.
#[test]
fn no_update_in_progress_while_the_clock_stands() {
    for (register, value) in [(B, B_SET | B_24H), (A, 0x66), (A, 0x76)] {
        let r = Rig::new();
        r.read(C);
        r.write(register, value);
        for ns in (0..3 * SECOND).step_by(1_000_003) {
            r.run_to(ns);
            assert_eq!(r.read(A) & A_UIP, 0);
        }
        assert_eq!(r.read(C) & C_UF, 0);
        assert_eq!(r.read(SECONDS), 0x58);
    }
}

//! The MC146818 real-time clock with 128 bytes of CMOS RAM (Motorola DS9718), as in the PC/AT.
//!
//! The time registers are brought up to date whenever somebody looks; a timer runs only while an interrupt is
//! enabled. Alarm "don't care" codes are C0h–FFh.

mod calendar;
pub mod spec;

#[cfg(test)]
mod tests;

use crate::device::{Device, Inspect, PioDevice, ResetKind, TimedDevice};
use crate::irq::IrqLine;
use crate::snapshot::Snapshot;
use crate::time::{Clock, Timer, VmTime};
use calendar::Fields;
use paravane_memory::{Port, Width};
use spec::*;
use std::fmt::Display;
use std::sync::Arc;

const SECOND: u64 = 1_000_000_000;
/// Seconds.
const DAY_LEN: i64 = 86_400;

/// The clock chip; claim [`Rtc::RANGE`] with `Width::W8`.
pub struct Rtc {
    // wiring
    clock: Arc<dyn Clock>,
    timer: Timer,
    irq: IrqLine,
    // bookkeeping
    /// When the last update ended.
    updated: VmTime,
    /// When the divider chain was started; the periodic interrupt counts from here.
    divider_start: VmTime,
    /// Periods of the periodic interrupt seen since then.
    periods: u64,
    // guest-visible state
    index: u8,
    nmi_masked: bool,
    ram: [u8; 128],
}

impl Rtc {
    /// (first port, count) of the range to claim.
    pub const RANGE: (Port, u32) = (Port(INDEX), 2);

    /// A clock that shows `unix_seconds` (UTC) now; bind `timer` to it with [`crate::bind_timer`].
    pub fn new(clock: Arc<dyn Clock>, timer: Timer, irq: IrqLine, unix_seconds: i64) -> Rtc {
        let now = clock.now();
        let mut ram = [0; 128];
        ram[A] = 0x26;
        ram[B] = B_24H;
        ram[D] = D_VRT;
        let mut rtc = Rtc {
            clock,
            timer,
            irq,
            updated: now,
            divider_start: now,
            periods: 0,
            index: 0,
            nmi_masked: false,
            ram,
        };
        rtc.show(unix_seconds);
        rtc
    }

    /// Writes a byte of CMOS RAM, as a setup program would have (not the clock's own registers).
    pub fn set_cmos(&mut self, index: u8, value: u8) {
        if (D + 1..128).contains(&usize::from(index)) {
            self.ram[usize::from(index)] = value;
        }
    }

    /// Reads a byte of CMOS RAM.
    pub fn cmos(&self, index: u8) -> u8 {
        self.ram[usize::from(index & 0x7F)]
    }

    /// Describes RAM in the bytes BIOSes use: `below_4g` bytes from 0 and `above_4g` bytes from 4 GiB.
    pub fn set_memory_size(&mut self, below_4g: u64, above_4g: u64) {
        let extended_kib = (below_4g.saturating_sub(1 << 20) >> 10).min(0xFFFF);
        let above_16m = (below_4g.saturating_sub(16 << 20) >> 16).min(0xFFFF);
        let above_4g = (above_4g >> 16).min(0xFF_FFFF);
        for (low, value) in [(0x15, 640), (0x17, extended_kib), (0x30, extended_kib), (0x34, above_16m)] {
            self.set_cmos(low, value as u8);
            self.set_cmos(low + 1, (value >> 8) as u8);
        }
        for (i, byte) in above_4g.to_le_bytes().into_iter().take(3).enumerate() {
            self.set_cmos(0x5B + i as u8, byte);
        }
    }

    /// Makes the standard checksum (2Eh, 2Fh) of bytes 10h–2Dh right.
    pub fn update_checksum(&mut self) {
        let sum = self.ram[0x10..=0x2D].iter().map(|&b| u16::from(b)).sum::<u16>();
        [self.ram[0x2E], self.ram[0x2F]] = sum.to_be_bytes();
    }

    /// Whether bit 7 of port 70h masks the NMI.
    pub fn nmi_masked(&self) -> bool {
        self.nmi_masked
    }

    // --- the registers as a date ---

    fn encode(&self, value: u8) -> u8 {
        if self.ram[B] & B_DM != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, raw: u8) -> u8 {
        if self.ram[B] & B_DM != 0 { raw } else { (raw >> 4).wrapping_mul(10).wrapping_add(raw & 0xF) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.ram[B] & B_24H != 0 {
            return self.encode(hour);
        }
        let pm = if hour >= 12 { 0x80 } else { 0 };
        self.encode((hour + 11) % 12 + 1) | pm
    }

    fn decode_hour(&self, raw: u8) -> u8 {
        if self.ram[B] & B_24H != 0 {
            return self.decode(raw);
        }
        self.decode(raw & 0x7F) % 12 + if raw & 0x80 != 0 { 12 } else { 0 }
    }

    fn shown(&self) -> i64 {
        let century = i64::from(self.decode(self.ram[CENTURY]));
        calendar::to_unix(&Fields {
            year: century * 100 + i64::from(self.decode(self.ram[YEAR])),
            month: self.decode(self.ram[MONTH]),
            day: self.decode(self.ram[DAY]),
            weekday: 0,
            hour: self.decode_hour(self.ram[HOURS]),
            minute: self.decode(self.ram[MINUTES]),
            second: self.decode(self.ram[SECONDS]),
        })
    }

    fn show(&mut self, unix_seconds: i64) {
        let f = calendar::from_unix(unix_seconds);
        self.ram[SECONDS] = self.encode(f.second);
        self.ram[MINUTES] = self.encode(f.minute);
        self.ram[HOURS] = self.encode_hour(f.hour);
        self.ram[WEEKDAY] = f.weekday;
        self.ram[DAY] = self.encode(f.day);
        self.ram[MONTH] = self.encode(f.month);
        self.ram[YEAR] = self.encode(f.year.rem_euclid(100) as u8);
        self.ram[CENTURY] = self.encode(f.year.div_euclid(100).rem_euclid(100) as u8);
    }

    // --- time ---

    /// The divider runs with DV = 010 and is held in reset with 11x; other codes are for other crystals.
    fn divider_runs(&self) -> bool {
        self.ram[A] >> 4 & 7 == 2
    }

    fn updates(&self) -> bool {
        self.divider_runs() && self.ram[B] & B_SET == 0
    }

    fn update_in_progress(&self, now: VmTime) -> bool {
        self.updates() && now.since(self.updated) % SECOND >= SECOND - UIP_NS
    }

    fn sync(&mut self, now: VmTime) {
        self.count_periods(now);
        let seconds = now.since(self.updated) / SECOND;
        if seconds == 0 {
            return;
        }
        self.updated = self.updated.plus(seconds * SECOND);
        if self.updates() {
            let before = self.shown();
            let weekday = self.weekday_after(before, seconds);
            self.show(before + seconds as i64);
            self.ram[WEEKDAY] = weekday;
            self.ram[C] |= C_UF;
            if self.ram[C] & C_AF == 0 && self.alarm_within(before, seconds) {
                self.ram[C] |= C_AF;
            }
        }
    }

    /// The weekday is a counter of its own, which midnight moves; it need not fit the date.
    fn weekday_after(&self, before: i64, seconds: u64) -> u8 {
        let midnights = (before + seconds as i64).div_euclid(DAY_LEN) - before.div_euclid(DAY_LEN);
        let today = i64::from(self.decode(self.ram[WEEKDAY]));
        self.encode((today - 1 + midnights).rem_euclid(7) as u8 + 1)
    }

    /// Whether one of the `seconds` after `before` is the alarm's; goes from candidate to candidate.
    fn alarm_within(&self, before: i64, seconds: u64) -> bool {
        let wanted = |register: usize, is: u8| self.ram[register + 1] >= ANY || self.ram[register + 1] == is;
        let end = before + seconds.min(DAY_LEN as u64) as i64;
        let mut at = before + 1;
        while at <= end {
            let of_day = at.rem_euclid(DAY_LEN);
            let part = |unit: i64, count: i64| (of_day / unit % count) as u8;
            let skip = if !wanted(HOURS, self.encode_hour(part(3600, 24))) {
                3600
            } else if !wanted(MINUTES, self.encode(part(60, 60))) {
                60
            } else if !wanted(SECONDS, self.encode(part(1, 60))) {
                1
            } else {
                return true;
            };
            at += skip - of_day % skip;
        }
        false
    }

    /// Period of the periodic interrupt in crystal cycles; the two highest rates repeat lower ones.
    fn period(&self) -> Option<u64> {
        if !self.divider_runs() {
            return None;
        }
        match self.ram[A] & 0xF {
            0 => None,
            rate @ 1..=2 => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    fn count_periods(&mut self, now: VmTime) {
        let Some(period) = self.period() else { return };
        let periods = VmTime(now.since(self.divider_start)).ticks(CRYSTAL_HZ) / period;
        if periods > self.periods {
            self.ram[C] |= C_PF;
        }
        self.periods = periods;
    }

    /// Drives the interrupt line and waits for the next event that may raise it.
    fn finish(&mut self) {
        let enabled = self.ram[B] & (B_PIE | B_AIE | B_UIE);
        let request = self.ram[C] & enabled != 0;
        self.ram[C] = self.ram[C] & !C_IRQF | if request { C_IRQF } else { 0 };
        self.irq.set(request);
        let periodic = self.period().filter(|_| enabled & B_PIE != 0).map(|period| {
            let cycles = (self.periods + 1) * period;
            self.divider_start.plus(VmTime::from_ticks(cycles, CRYSTAL_HZ).0)
        });
        let update = (enabled & (B_AIE | B_UIE) != 0 && self.updates()).then(|| self.updated.plus(SECOND));
        self.timer.set(periodic.into_iter().chain(update).min());
    }

    // --- accesses ---

    fn read(&mut self, now: VmTime) -> u8 {
        match usize::from(self.index) {
            A => self.ram[A] | if self.update_in_progress(now) { A_UIP } else { 0 },
            C => std::mem::take(&mut self.ram[C]),
            i => self.ram[i],
        }
    }

    fn write(&mut self, value: u8, now: VmTime) {
        match usize::from(self.index) {
            A => self.write_a(value & !A_UIP, now),
            B => {
                let stopped = self.ram[B] & B_SET != 0 && value & B_SET == 0;
                if stopped {
                    // The chain below the seconds went on: the next update is due within a second.
                    self.updated = VmTime(now.0 - now.since(self.updated) % SECOND);
                }
                self.ram[B] = if value & B_SET != 0 { value & !B_UIE } else { value };
            }
            C | D => {} // read-only
            i => self.ram[i] = value,
        }
    }

    /// Leaving divider reset, the first update comes half a second later.
    fn write_a(&mut self, value: u8, now: VmTime) {
        let before = (self.divider_runs(), self.period());
        self.ram[A] = value;
        if self.divider_runs() && !before.0 {
            self.divider_start = now;
            self.updated = VmTime(now.0.saturating_sub(SECOND / 2));
        }
        if self.period() != before.1 {
            self.periods = self
                .period()
                .map_or(0, |period| VmTime(now.since(self.divider_start)).ticks(CRYSTAL_HZ) / period);
        }
    }
}

crate::snapshot!(Rtc { timer, irq, updated, divider_start, periods, index, nmi_masked, ram | clock });

impl Inspect for Rtc {
    fn inspect(&self, field: &mut dyn FnMut(&str, &dyn Display)) {
        field("unix", &self.shown());
        field("index", &format_args!("{:02x}", self.index));
        for (name, i) in [("a", A), ("b", B), ("c", C)] {
            field(name, &format_args!("{:02x}", self.ram[i]));
        }
    }
}

impl Device for Rtc {
    fn label(&self) -> &str {
        "rtc"
    }

    /// Clears interrupt enables and flags; the clock and the RAM are on the battery.
    fn reset(&mut self, _kind: ResetKind) {
        self.sync(self.clock.now());
        self.ram[B] &= !(B_PIE | B_AIE | B_UIE | B_SQWE);
        self.ram[C] = 0;
        (self.index, self.nmi_masked) = (0, false);
        self.finish();
    }

    fn as_snapshot(&mut self) -> Option<&mut dyn Snapshot> {
        Some(self)
    }

    fn as_pio(&mut self) -> Option<&mut dyn PioDevice> {
        Some(self)
    }

    fn as_timed(&mut self) -> Option<&mut dyn TimedDevice> {
        Some(self)
    }
}

impl PioDevice for Rtc {
    fn port_in(&mut self, port: Port, _width: Width) -> u32 {
        if port.0 != DATA {
            return 0xFF; // the index register is write-only
        }
        let now = self.clock.now();
        self.sync(now);
        let value = self.read(now);
        self.finish();
        value.into()
    }

    fn port_out(&mut self, port: Port, _width: Width, value: u32) {
        if port.0 != DATA {
            self.index = value as u8 & 0x7F;
            self.nmi_masked = value & 0x80 != 0;
            return;
        }
        let now = self.clock.now();
        self.sync(now);
        self.write(value as u8, now);
        self.finish();
    }
}

impl TimedDevice for Rtc {
    fn expired(&mut self, now: VmTime) {
        self.sync(now);
        self.finish();
    }
}

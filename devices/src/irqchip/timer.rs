//! The local APIC timer (SDM 3A 11.5.4): one-shot, periodic and TSC-deadline.
//!
//! Counting is a function of the time it started, so a period never drifts however late it is noticed.

use super::spec::lapic::DIVIDE_WRITABLE;
use crate::time::VmTime;

/// Relates the time-stamp counter to machine time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TscClock {
    hz: u64,
}

impl TscClock {
    /// A TSC of `hz` (at least 1) that is 0 at power-on.
    pub const fn new(hz: u64) -> TscClock {
        TscClock { hz: if hz == 0 { 1 } else { hz } }
    }

    /// Ticks per second.
    pub const fn hz(self) -> u64 {
        self.hz
    }

    /// The counter at `t`.
    pub const fn at(self, t: VmTime) -> u64 {
        t.ticks(self.hz)
    }

    /// The first time at which the counter is at least `tsc`, saturating.
    pub fn time_of(self, tsc: u64) -> VmTime {
        time_of_ticks(u128::from(tsc), self.hz)
    }
}

fn time_of_ticks(ticks: u128, hz: u64) -> VmTime {
    let ns = ticks.saturating_mul(1_000_000_000).div_ceil(u128::from(hz));
    VmTime(u64::try_from(ns).unwrap_or(u64::MAX))
}

/// What the LVT timer entry selects (bits 18:17).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TimerMode {
    /// Counts down once.
    OneShot,
    /// Reloads at zero.
    Periodic,
    /// Waits for a TSC value.
    TscDeadline,
}

impl TimerMode {
    /// The mode of an LVT value; the reserved encoding acts as TSC-deadline.
    pub const fn of_lvt(lvt: u32) -> TimerMode {
        match lvt >> 17 & 3 {
            0 => TimerMode::OneShot,
            1 => TimerMode::Periodic,
            _ => TimerMode::TscDeadline,
        }
    }
}

/// A count in progress. Units are bus clocks after the divider.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    origin: VmTime,
    /// Units from `origin` to the next expiry.
    next: u128,
}

crate::snapshot_enum!(TimerMode { OneShot, Periodic, TscDeadline });
crate::snapshot!(Count { origin, next });
crate::snapshot!(ApicTimer { mode, initial, divide, count, deadline, tsc_offset | hz, tsc });

/// The timer of one local APIC.
#[derive(Debug)]
pub struct ApicTimer {
    // configuration
    hz: u64,
    tsc: TscClock,
    // guest-visible state
    mode: TimerMode,
    initial: u32,
    divide: u32,
    count: Option<Count>,
    deadline: u64,
    /// What the guest's TSC_ADJUST adds to the counter.
    pub(super) tsc_offset: u64,
}

impl ApicTimer {
    pub(super) fn new(hz: u64, tsc: TscClock) -> ApicTimer {
        let hz = hz.max(1);
        ApicTimer {
            hz,
            tsc,
            mode: TimerMode::OneShot,
            initial: 0,
            divide: 0,
            count: None,
            deadline: 0,
            tsc_offset: 0,
        }
    }

    pub(super) fn reset(&mut self) {
        *self = ApicTimer { tsc_offset: self.tsc_offset, ..ApicTimer::new(self.hz, self.tsc) };
    }

    /// Divide configuration 000 … 111 is 2, 4, …, 128, 1 (bits 3, 1 and 0).
    fn divisor(&self) -> u64 {
        let code = self.divide >> 1 & 4 | self.divide & 3;
        1 << ((code + 1) & 7)
    }

    fn elapsed(&self, origin: VmTime, now: VmTime) -> u128 {
        let clocks = u128::from(now.since(origin)) * u128::from(self.hz) / 1_000_000_000;
        clocks / u128::from(self.divisor())
    }

    pub(super) fn initial_count(&self) -> u32 {
        self.initial
    }

    pub(super) fn set_initial_count(&mut self, value: u32, now: VmTime) {
        if self.mode == TimerMode::TscDeadline {
            return;
        }
        self.initial = value;
        self.count = (value != 0).then_some(Count { origin: now, next: value.into() });
    }

    pub(super) fn current_count(&self, now: VmTime) -> u32 {
        let Some(count) = self.count else { return 0 };
        let elapsed = self.elapsed(count.origin, now);
        if elapsed < count.next {
            (count.next - elapsed) as u32
        } else if self.mode == TimerMode::Periodic {
            let initial = u128::from(self.initial.max(1));
            (initial - (elapsed - count.next) % initial) as u32
        } else {
            0
        }
    }

    pub(super) fn divide(&self) -> u32 {
        self.divide
    }

    /// Changes the divider; a running count goes on from where it is.
    pub(super) fn set_divide(&mut self, value: u32, now: VmTime) {
        let left = self.current_count(now);
        self.divide = value & DIVIDE_WRITABLE;
        if let Some(count) = &mut self.count {
            *count = Count { origin: now, next: left.into() };
        }
    }

    /// Follows the LVT. Going to or from TSC-deadline mode stops the timer (SDM 11.5.4.1).
    pub(super) fn set_mode(&mut self, mode: TimerMode) {
        if (mode == TimerMode::TscDeadline) != (self.mode == TimerMode::TscDeadline) {
            self.count = None;
            self.initial = 0;
            self.deadline = 0;
        }
        self.mode = mode;
    }

    pub(super) fn deadline(&self) -> u64 {
        self.deadline
    }

    pub(super) fn set_deadline(&mut self, value: u64) {
        if self.mode == TimerMode::TscDeadline {
            self.deadline = value;
        }
    }

    /// When the timer expires next.
    pub(super) fn next_expiry(&self) -> Option<VmTime> {
        if self.mode == TimerMode::TscDeadline {
            let behind = self.tsc_offset as i64; // guest TSC = machine TSC + offset
            let raw = match behind < 0 {
                true => self.deadline.saturating_add(behind.unsigned_abs()),
                false => self.deadline.saturating_sub(self.tsc_offset),
            };
            return (self.deadline != 0).then(|| self.tsc.time_of(raw));
        }
        let count = self.count?;
        let clocks = count.next * u128::from(self.divisor());
        let after = time_of_ticks(clocks, self.hz);
        Some(count.origin.plus(after.0))
    }

    /// Whether the timer expired by `now`; moves on to the next expiry, merging the missed ones.
    pub(super) fn take_expired(&mut self, now: VmTime) -> bool {
        if self.next_expiry().is_none_or(|at| at > now) {
            return false;
        }
        self.deadline = 0;
        if let (TimerMode::Periodic, Some(mut count)) = (self.mode, self.count) {
            let initial = u128::from(self.initial.max(1));
            let late = self.elapsed(count.origin, now).saturating_sub(count.next);
            count.next += (late / initial + 1) * initial;
            self.count = Some(count);
        } else {
            self.count = None;
        }
        true
    }
}

//! Machine time: from the host's monotonic clock, or from retired instructions.

use super::tsc;
use paravane_devices::{Clock, VmTime};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Time that passes as the host's does, from the making of this clock.
///
/// Where the host's time-stamp counter is invariant it *is* the clock, so that the guest's counter is the host's minus
/// a constant and translated code can read it in place; elsewhere the monotonic clock serves.
#[derive(Debug)]
pub struct HostClock {
    source: Source,
    hz: u64,
}

#[derive(Debug)]
enum Source {
    /// The counter's value at time zero.
    Tsc(u64),
    Monotonic(Instant),
}

impl HostClock {
    /// A clock that starts now.
    pub fn start() -> HostClock {
        let hz = tsc::host_hz();
        let source =
            if tsc::is_invariant() { Source::Tsc(tsc::read()) } else { Source::Monotonic(Instant::now()) };
        HostClock { source, hz }
    }

    /// Ticks per second of the guest's time-stamp counter.
    pub fn tsc_hz(&self) -> u64 {
        self.hz
    }

    /// What the host's counter read when the guest's was zero, if the one is the other minus a constant.
    pub fn tsc_base(&self) -> Option<u64> {
        match self.source {
            Source::Tsc(base) => Some(base),
            Source::Monotonic(_) => None,
        }
    }

    /// The host's time at machine time `at`.
    pub fn instant(&self, at: VmTime) -> Instant {
        // A deadline centuries ahead is as good as none: one day, and the sleeper looks again.
        let now = Instant::now();
        now.checked_add(Duration::from_nanos(at.since(self.now())))
            .unwrap_or_else(|| now + Duration::from_secs(86_400))
    }
}

impl Clock for HostClock {
    fn now(&self) -> VmTime {
        match self.source {
            Source::Tsc(base) => {
                let ticks = u128::from(tsc::read().wrapping_sub(base));
                VmTime((ticks * 1_000_000_000 / u128::from(self.hz)) as u64)
            }
            Source::Monotonic(start) => VmTime(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)),
        }
    }
}

/// Time that passes by one nanosecond for each retired instruction; moved by the run loop alone, between two
/// slices of execution, and while the processor is halted to the next deadline.
#[derive(Default, Debug)]
pub struct InstructionClock(AtomicU64);

impl InstructionClock {
    /// `n` instructions have retired.
    pub fn retire(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Time is `at`, whatever it was: the machine is another one now.
    pub fn set(&self, at: VmTime) {
        self.0.store(at.0, Ordering::Relaxed);
    }

    /// Nothing happens until `at`.
    pub fn skip_to(&self, at: VmTime) {
        self.0.fetch_max(at.0, Ordering::Relaxed);
    }
}

impl Clock for InstructionClock {
    fn now(&self) -> VmTime {
        VmTime(self.0.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instruction_time_never_goes_back() {
        let c = InstructionClock::default();
        c.retire(10);
        c.skip_to(VmTime(5));
        assert_eq!(c.now(), VmTime(10));
        c.skip_to(VmTime(50));
        assert_eq!(c.now(), VmTime(50));
    }

    #[test]
    fn host_deadlines_lie_where_time_will_be() {
        let c = HostClock::start();
        assert!(c.instant(c.now().plus(1_000_000_000)) > Instant::now());
        let _no_overflow = c.instant(VmTime(u64::MAX));
    }
}

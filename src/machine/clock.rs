//! Machine time: from the host's monotonic clock, or from retired instructions.

use paravane_devices::{Clock, VmTime};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Time that passes as the host's does, from the making of this clock.
#[derive(Debug)]
pub struct HostClock {
    start: Instant,
}

impl HostClock {
    /// A clock that starts now.
    pub fn start() -> HostClock {
        HostClock { start: Instant::now() }
    }

    /// The host's time at machine time `at`.
    pub fn instant(&self, at: VmTime) -> Instant {
        // A deadline centuries ahead is as good as none: one day, and the sleeper looks again.
        self.start
            .checked_add(Duration::from_nanos(at.0))
            .unwrap_or_else(|| Instant::now() + Duration::from_secs(86_400))
    }
}

impl Clock for HostClock {
    fn now(&self) -> VmTime {
        VmTime(u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX))
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

//! Machine time: from the host's monotonic clock, or from retired instructions.

use super::tsc;
use paravane_devices::{Clock, VmTime};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Time that passes as the host's does, from the making of this clock, and stands still while a debugger holds the guest.
///
/// Where the host's time-stamp counter is invariant it *is* the clock, so that the guest's counter is the host's minus
/// a base that changes only while no vCPU runs, and translated code can read it in place; elsewhere the monotonic clock
/// serves.
#[derive(Debug)]
pub struct HostClock {
    source: Source,
    /// Ticks of the source per second.
    source_hz: u64,
    tsc_hz: u64,
    /// What the source reads at machine time zero.
    base: Arc<AtomicU64>,
    /// The ticks since then at which the clock stands still, or `RUNNING`.
    still: AtomicU64,
}

#[derive(Debug)]
enum Source {
    Tsc,
    Monotonic(Instant),
}

impl Source {
    fn read(&self) -> u64 {
        match self {
            Source::Tsc => tsc::read(),
            Source::Monotonic(start) => start.elapsed().as_nanos() as u64,
        }
    }
}

const RUNNING: u64 = u64::MAX;
const NANOSECONDS: u64 = 1_000_000_000;
/// A deadline centuries ahead is as good as none: the sleeper looks again after a day.
const FAR: Duration = Duration::from_secs(86_400);

impl HostClock {
    /// A clock that starts now.
    pub fn start() -> HostClock {
        let tsc_hz = tsc::host_hz();
        let (source, source_hz) = if tsc::is_invariant() {
            (Source::Tsc, tsc_hz)
        } else {
            (Source::Monotonic(Instant::now()), NANOSECONDS)
        };
        let base = Arc::new(AtomicU64::new(source.read()));
        HostClock { source, source_hz, tsc_hz, base, still: AtomicU64::new(RUNNING) }
    }

    /// Ticks per second of the guest's time-stamp counter.
    pub fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }

    /// What the host's counter read when the guest's was zero, if the one is the other minus that; it changes only while
    /// the clock stands still.
    pub fn tsc_base(&self) -> Option<Arc<AtomicU64>> {
        matches!(self.source, Source::Tsc).then(|| Arc::clone(&self.base))
    }

    /// Time stands still. No vCPU runs.
    pub fn stop(&self) {
        self.still.store(self.ticks(), Ordering::SeqCst);
    }

    /// Time goes on from where it stood. No vCPU runs yet.
    pub fn go_on(&self) {
        let ticks = self.ticks();
        self.base.store(self.source.read().wrapping_sub(ticks), Ordering::SeqCst);
        self.still.store(RUNNING, Ordering::SeqCst);
    }

    fn ticks(&self) -> u64 {
        match self.still.load(Ordering::Relaxed) {
            RUNNING => self.source.read().wrapping_sub(self.base.load(Ordering::Relaxed)),
            still => still,
        }
    }

    /// The host's time at machine time `at`; `None` while the clock stands still.
    pub fn instant(&self, at: VmTime) -> Option<Instant> {
        if self.still.load(Ordering::SeqCst) != RUNNING {
            return None;
        }
        let now = Instant::now();
        let left = Duration::from_nanos(at.since(self.now()));
        Some(now.checked_add(left).unwrap_or_else(|| now + FAR))
    }
}

impl Clock for HostClock {
    fn now(&self) -> VmTime {
        let ticks = u128::from(self.ticks());
        VmTime((ticks * u128::from(NANOSECONDS) / u128::from(self.source_hz)) as u64)
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
        assert!(c.instant(c.now().plus(1_000_000_000)).is_some_and(|at| at > Instant::now()));
        let _no_overflow = c.instant(VmTime(u64::MAX));
    }

    #[test]
    fn host_time_stands_still_and_goes_on_from_there() {
        let c = HostClock::start();
        c.stop();
        let (then, base) = (c.now(), c.base.load(Ordering::Relaxed));
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(c.now(), then);
        assert_eq!(c.instant(then.plus(1)), None);
        c.go_on();
        let slept = 20_000_000 * u128::from(c.source_hz) / u128::from(NANOSECONDS);
        assert!(u128::from(c.base.load(Ordering::Relaxed) - base) >= slept);
        assert!(c.now() >= then);
    }
}

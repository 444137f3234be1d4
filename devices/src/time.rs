//! The machine's time and the timers that wait for it.

use crate::snapshot::{Snapshot, StateError, StateStream};
use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

/// Nanoseconds of machine time since power-on.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct VmTime(pub u64);

impl VmTime {
    /// `self + ns`, saturating.
    pub const fn plus(self, ns: u64) -> VmTime {
        VmTime(self.0.saturating_add(ns))
    }

    /// Nanoseconds since `earlier`, zero if that lies ahead.
    pub const fn since(self, earlier: VmTime) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// How many ticks of `hz` fit into this time, exactly.
    pub const fn ticks(self, hz: u64) -> u64 {
        (self.0 as u128 * hz as u128 / 1_000_000_000) as u64
    }

    /// The first time at which `ticks` ticks of `hz` have passed.
    pub const fn from_ticks(ticks: u64, hz: u64) -> VmTime {
        VmTime(((ticks as u128 * 1_000_000_000).div_ceil(hz as u128)) as u64)
    }
}

/// The only source of time.
pub trait Clock: Send + Sync {
    /// Machine time now.
    fn now(&self) -> VmTime;
}

/// A clock that tests move by hand.
#[derive(Default, Debug)]
pub struct ManualClock(AtomicU64);

impl ManualClock {
    /// Moves to `t`.
    pub fn set(&self, t: VmTime) {
        self.0.store(t.0, Ordering::Relaxed);
    }

    /// Moves ahead by `ns`.
    pub fn advance(&self, ns: u64) {
        self.0.fetch_add(ns, Ordering::Relaxed);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> VmTime {
        VmTime(self.0.load(Ordering::Relaxed))
    }
}

type Expire = Arc<dyn Fn(VmTime) + Send + Sync>;
type Wake = Box<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct Pending {
    armed: BTreeSet<(VmTime, usize)>,
    slots: Vec<(Option<VmTime>, Option<Expire>)>,
}

/// All timers of a machine; the event loop (or the instruction clock) runs them.
#[derive(Default)]
pub struct TimerQueue {
    pending: Mutex<Pending>,
    wake: OnceLock<Wake>,
}

impl TimerQueue {
    /// An empty queue.
    pub fn new() -> Arc<TimerQueue> {
        Arc::default()
    }

    /// A new, disarmed timer; bind it before it can expire.
    pub fn timer(self: &Arc<Self>) -> Timer {
        let mut p = self.pending.lock().expect("timer queue");
        p.slots.push((None, None));
        Timer { queue: Arc::clone(self), id: p.slots.len() - 1 }
    }

    /// Sets what is called when a timer became the earliest; may be set once.
    pub fn on_earlier(&self, wake: Wake) {
        let _already_set = self.wake.set(wake);
    }

    /// Machine time moves otherwise than it did: whoever sleeps looks again.
    pub fn look_again(&self) {
        if let Some(wake) = self.wake.get() {
            wake();
        }
    }

    /// The earliest armed time.
    pub fn next_deadline(&self) -> Option<VmTime> {
        self.pending.lock().expect("timer queue").armed.first().map(|&(t, _)| t)
    }

    /// Fires every timer due at `now`, outside the queue's lock, each disarmed first; returns how many.
    pub fn run_expired(&self, now: VmTime) -> usize {
        let mut fired = 0;
        loop {
            let expire = {
                let mut p = self.pending.lock().expect("timer queue");
                let Some(&(t, id)) = p.armed.first() else { return fired };
                if t > now {
                    return fired;
                }
                p.armed.pop_first();
                p.slots[id].0 = None;
                p.slots[id].1.clone()
            };
            fired += 1;
            if let Some(expire) = expire {
                expire(now);
            }
        }
    }

    fn arm(&self, id: usize, at: Option<VmTime>) {
        let earliest_moved = {
            let mut p = self.pending.lock().expect("timer queue");
            let before = p.armed.first().copied();
            if let Some(old) = p.slots[id].0.take() {
                p.armed.remove(&(old, id));
            }
            if let Some(at) = at {
                p.armed.insert((at, id));
                p.slots[id].0 = Some(at);
            }
            at.is_some() && p.armed.first() != before.as_ref() && p.armed.first().is_some_and(|f| f.1 == id)
        };
        if earliest_moved && let Some(wake) = self.wake.get() {
            wake();
        }
    }
}

impl fmt::Debug for TimerQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TimerQueue").field("next", &self.next_deadline()).finish()
    }
}

/// One timer of one device.
#[derive(Debug)]
pub struct Timer {
    queue: Arc<TimerQueue>,
    id: usize,
}

impl Timer {
    /// Fires at `at`, once; replaces an earlier arming.
    pub fn arm(&self, at: VmTime) {
        self.queue.arm(self.id, Some(at));
    }

    /// Fires no more.
    pub fn disarm(&self) {
        self.queue.arm(self.id, None);
    }

    /// Arms or disarms.
    pub fn set(&self, at: Option<VmTime>) {
        self.queue.arm(self.id, at);
    }

    /// Walks over the time it waits for.
    pub fn shared_state(&self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        let mut at = self.queue.pending.lock().expect("timer queue").slots[self.id].0;
        at.state(s)?;
        if s.loads() {
            self.set(at);
        }
        Ok(())
    }

    /// A key for [`TimerQueue::bind`], usable after the timer moved into its device.
    pub fn key(&self) -> usize {
        self.id
    }
}

impl TimerQueue {
    /// Sets what timer `key` does when it expires (usually: lock the device, call `TimedDevice::expired`).
    pub fn bind(&self, key: usize, expire: impl Fn(VmTime) + Send + Sync + 'static) {
        self.pending.lock().expect("timer queue").slots[key].1 = Some(Arc::new(expire));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_and_back_lose_nothing() {
        for n in [0, 1, 2, 3, 1_193_181, 1_193_182, 987_654_321] {
            assert_eq!(VmTime::from_ticks(n, 1_193_182).ticks(1_193_182), n);
        }
    }

    #[test]
    fn timers_fire_in_order_and_once() {
        let q = TimerQueue::new();
        let log = Arc::new(Mutex::new(Vec::new()));
        let timers: Vec<Timer> = (0..3)
            .map(|i| {
                let t = q.timer();
                let log = Arc::clone(&log);
                q.bind(t.key(), move |_| log.lock().expect("log").push(i));
                t
            })
            .collect();
        timers[0].arm(VmTime(30));
        timers[1].arm(VmTime(10));
        timers[2].arm(VmTime(20));
        timers[2].disarm();
        assert_eq!(q.next_deadline(), Some(VmTime(10)));
        assert_eq!(q.run_expired(VmTime(29)), 1);
        assert_eq!(q.run_expired(VmTime(40)), 1);
        assert_eq!(*log.lock().expect("log"), [1, 0]);
        assert_eq!(q.next_deadline(), None);
    }
}

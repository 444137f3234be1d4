//! The event loop under the host's clock: sleeps until the next timer is due, and fires it.

use crate::machine::HostClock;
use paravane_devices::{Clock, TimerQueue, VmTime};
use std::num::NonZeroU64;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

#[derive(Default)]
struct Sleep {
    /// What the loop sleeps for; `VmTime(u64::MAX)`: until woken; `VmTime(0)`: it does not sleep.
    until: VmTime,
    woken: bool,
    stop: bool,
}

struct Shared {
    sleep: Mutex<Sleep>,
    bell: Condvar,
    timers: Arc<TimerQueue>,
    clock: Arc<HostClock>,
}

/// The event-loop thread; it ends when this is dropped.
pub struct EventLoop {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl EventLoop {
    /// Starts firing the timers of `timers` by `clock`.
    pub fn start(timers: Arc<TimerQueue>, clock: Arc<HostClock>) -> std::io::Result<EventLoop> {
        let shared = Arc::new(Shared {
            sleep: Mutex::default(),
            bell: Condvar::new(),
            timers: Arc::clone(&timers),
            clock,
        });
        let waker = Arc::downgrade(&shared);
        timers.on_earlier(Box::new(move || {
            if let Some(shared) = waker.upgrade() {
                shared.earlier();
            }
        }));
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("events".into()).spawn(move || of_thread.run())?;
        Ok(EventLoop { shared, thread: Some(thread) })
    }
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.shared.sleep.lock().expect("event loop").stop = true;
        self.shared.bell.notify_all();
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

impl Shared {
    /// A timer became the earliest: cut the sleep short if it is due before the sleep would end.
    fn earlier(&self) {
        let Some(next) = self.timers.next_deadline() else { return };
        let mut sleep = self.sleep.lock().expect("event loop");
        if next < sleep.until {
            sleep.woken = true;
            self.bell.notify_all();
        }
    }

    fn run(&self) {
        // Timers are late by as little as the host can: the default slack is 50 us. A host that refuses costs accuracy.
        let _refused = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
        while self.sleep_until_due() {
            self.timers.run_expired(self.clock.now());
        }
    }

    /// Sleeps until a timer is due (true) or the loop is to end (false).
    fn sleep_until_due(&self) -> bool {
        let mut sleep = self.sleep.lock().expect("event loop");
        loop {
            if sleep.stop {
                return false;
            }
            // Armed timers are looked up under our lock, after which `earlier` reports what is armed later.
            sleep.until = VmTime(u64::MAX);
            sleep.woken = false;
            drop(sleep);
            let next = self.timers.next_deadline();
            sleep = self.sleep.lock().expect("event loop");
            if sleep.woken {
                continue;
            }
            // Nothing is armed, or time stands still.
            let Some((next, at)) = next.and_then(|next| Some((next, self.clock.instant(next)?))) else {
                sleep = self.bell.wait(sleep).expect("event loop");
                continue;
            };
            let left = at.saturating_duration_since(Instant::now());
            if left < Duration::from_micros(1) {
                sleep.until = VmTime(0);
                return !sleep.stop;
            }
            sleep.until = next;
            if !sleep.stop {
                sleep = self.bell.wait_timeout(sleep, left).expect("event loop").0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn timers_wait_while_time_stands_still() {
        let (timers, clock) = (TimerQueue::new(), Arc::new(HostClock::start()));
        let _running = EventLoop::start(Arc::clone(&timers), Arc::clone(&clock)).expect("thread");
        let (timer, (fired, fires)) = (timers.timer(), channel());
        timers.bind(timer.key(), move |now| fired.send(now).expect("receiver"));
        clock.stop();
        timer.arm(clock.now().plus(1_000_000));
        assert!(fires.recv_timeout(Duration::from_millis(50)).is_err());
        clock.go_on();
        timers.look_again();
        assert!(fires.recv_timeout(Duration::from_secs(60)).is_ok());
    }

    #[test]
    fn timers_fire_when_due_and_an_earlier_one_is_not_overslept() {
        let (timers, clock) = (TimerQueue::new(), Arc::new(HostClock::start()));
        let _running = EventLoop::start(Arc::clone(&timers), Arc::clone(&clock)).expect("thread");
        let (late, soon) = (timers.timer(), timers.timer());
        let (sender, receiver) = channel();
        timers.bind(soon.key(), move |now| sender.send(now).expect("receiver"));
        late.arm(clock.now().plus(60_000_000_000));
        for _ in 0..20 {
            let due = clock.now().plus(200_000);
            soon.arm(due);
            let fired = receiver.recv_timeout(Duration::from_secs(10)).expect("fired");
            assert!(fired >= due);
        }
    }
}

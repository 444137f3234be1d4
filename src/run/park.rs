//! Where a halted vCPU sleeps, and how any thread gets its attention.
//!
//! The waker sets the attention flag and then looks whether the vCPU is parked; the vCPU declares itself parked and
//! then looks at its flags. Both sides are sequentially consistent, so one of them sees the other. The word of flags is itself
//! the futex: a flag set between the look and the sleep keeps the kernel from putting the vCPU to sleep.

use paravane_cpu::Attention;
use rustix::thread::futex;
use rustix::time::Timespec;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Instant;

/// The mailbox of one vCPU: attention flags and its bed.
#[derive(Default, Debug)]
pub struct Vcpu {
    attention: Attention,
    /// What the A20 gate became: 0 nothing new, 1 held low, 2 enabled.
    a20: AtomicU8,
    parked: AtomicBool,
}

impl Vcpu {
    /// A mailbox with no flag set.
    pub fn new() -> Vcpu {
        Vcpu::default()
    }

    /// The flags the engine polls.
    pub fn attention(&self) -> &Attention {
        &self.attention
    }

    /// Sets `flags` and wakes the vCPU if it sleeps.
    pub fn notify(&self, flags: u32) {
        self.attention.set(flags);
        self.wake();
    }

    /// Asks the vCPU to return from guest code.
    pub fn stop(&self) {
        self.notify(Attention::STOP);
    }

    /// Clears every flag: the machine was reset.
    pub fn forget(&self) {
        self.attention.take(u32::MAX);
        self.a20.store(0, Ordering::SeqCst);
    }

    /// The A20 gate changed: the vCPU learns of it before its next instruction.
    pub fn set_a20(&self, on: bool) {
        self.a20.store(1 + u8::from(on), Ordering::SeqCst);
        self.stop();
    }

    /// The A20 gate's new state, once.
    pub fn take_a20(&self) -> Option<bool> {
        match self.a20.swap(0, Ordering::SeqCst) {
            0 => None,
            n => Some(n == 2),
        }
    }

    fn wake(&self) {
        if self.parked.load(Ordering::SeqCst) {
            // A wake can only fail for a bad address.
            let _woken = futex::wake(self.attention.cell(), futex::Flags::PRIVATE, 1);
        }
    }

    /// Sleeps until one of `flags` is set, or `until` is reached; true if one is set. Only the vCPU's own thread parks.
    pub fn park(&self, flags: u32, until: Option<Instant>) -> bool {
        self.parked.store(true, Ordering::SeqCst);
        let awake = loop {
            let seen = self.attention.cell().load(Ordering::SeqCst);
            if seen & flags != 0 {
                break true;
            }
            let left = until.map(|t| t.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                break false;
            }
            let timeout = left.map(|left| Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            });
            // Every way to wake, an interruption included, leads to another look.
            let _woken = futex::wait(self.attention.cell(), futex::Flags::PRIVATE, seen, timeout.as_ref());
        };
        self.parked.store(false, Ordering::SeqCst);
        awake
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Duration;

    #[test]
    fn a_flag_set_before_parking_is_seen() {
        let v = Vcpu::new();
        v.notify(Attention::INTERRUPT);
        assert!(v.park(Attention::INTERRUPT, None));
    }

    #[test]
    fn a_parked_vcpu_wakes_for_every_notification() {
        let v = Arc::new(Vcpu::new());
        for _ in 0..200 {
            let waker = Arc::clone(&v);
            let t = std::thread::spawn(move || waker.notify(Attention::INTERRUPT));
            assert!(v.park(Attention::INTERRUPT, Some(Instant::now() + Duration::from_secs(10))));
            assert_eq!(v.attention().take(Attention::INTERRUPT), Attention::INTERRUPT);
            t.join().expect("waker");
        }
    }

    #[test]
    fn a_deadline_ends_the_sleep() {
        assert!(!Vcpu::new().park(u32::MAX, Some(Instant::now() + Duration::from_millis(5))));
    }
}

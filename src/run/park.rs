//! Where a halted vCPU sleeps, and how any thread gets its attention.
//!
//! The waker sets the attention flag and then looks whether the vCPU is parked; the vCPU declares itself parked and
//! then looks at its flags. Both sides are sequentially consistent, so one of them sees the other.

use paravane_cpu::Attention;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Instant;

/// The mailbox of one vCPU: attention flags and its bed.
#[derive(Default, Debug)]
pub struct Vcpu {
    attention: Attention,
    /// What the A20 gate became: 0 nothing new, 1 held low, 2 enabled.
    a20: AtomicU8,
    parked: AtomicBool,
    lock: Mutex<()>,
    bell: Condvar,
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
            let _guard = self.lock.lock().expect("park lock");
            self.bell.notify_all();
        }
    }

    /// Sleeps until one of `flags` is set, or `until` is reached; true if one is set.
    pub fn park(&self, flags: u32, until: Option<Instant>) -> bool {
        let mut guard = self.lock.lock().expect("park lock");
        self.parked.store(true, Ordering::SeqCst);
        let awake = loop {
            if self.attention.cell().load(Ordering::SeqCst) & flags != 0 {
                break true;
            }
            guard = match until.map(|t| t.saturating_duration_since(Instant::now())) {
                None => self.bell.wait(guard).expect("park lock"),
                Some(left) if left.is_zero() => break false,
                Some(left) => self.bell.wait_timeout(guard, left).expect("park lock").0,
            };
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

//! Where a halted vCPU sleeps, and how any thread gets its attention.
//!
//! The waker sets the attention flag and then looks whether the vCPU is parked; the vCPU declares itself parked and
//! then looks at its flags. Both sides are sequentially consistent, so one of them sees the other. The word of flags is itself
//! the futex: a flag set between the look and the sleep keeps the kernel from putting the vCPU to sleep.

use paravane_cpu::Attention;
use paravane_devices::{Snapshot, StateError, StateStream};
use rustix::thread::futex;
use rustix::time::Timespec;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

/// The mailbox of one vCPU: attention flags and its bed.
#[derive(Default, Debug)]
pub struct Vcpu {
    attention: Attention,
    /// What the A20 gate became: 0 nothing new, 1 held low, 2 enabled.
    a20: AtomicU8,
    /// The vector of the last start-up IPI.
    startup: AtomicU8,
    /// Who sleeps for both: they run on one thread.
    sleeper: OnceLock<Arc<Vcpu>>,
    parked: AtomicBool,
}

/// What others ask of a vCPU.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Calls {
    /// Those of [`Calls::FLAGS`] that are set.
    pub flags: u32,
    startup: u8,
    a20: u8,
}

impl Calls {
    /// The attention flags that are state of the machine.
    pub const FLAGS: u32 = Attention::INTERRUPT | Attention::NMI | Attention::INIT | Attention::STARTUP;
}

impl Snapshot for Calls {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        let Calls { flags, startup, a20 } = self;
        s.field("flags", flags)?;
        s.field("startup", startup)?;
        s.field("a20", a20)
    }
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

    /// INIT arrived; a start-up IPI before it is void.
    pub fn init(&self) {
        self.attention.take(Attention::STARTUP);
        self.notify(Attention::INIT);
    }

    /// A start-up IPI arrived.
    pub fn start_up(&self, vector: u8) {
        self.startup.store(vector, Ordering::SeqCst);
        self.notify(Attention::STARTUP);
    }

    /// What is asked of the processor and not done yet, but for who wants it to stop.
    pub fn calls(&self) -> Calls {
        Calls {
            flags: self.attention.get() & Calls::FLAGS,
            startup: self.startup_vector(),
            a20: self.a20.load(Ordering::SeqCst),
        }
    }

    /// `calls` are asked of the processor, and nothing else.
    pub fn set_calls(&self, calls: Calls) {
        self.attention.take(Calls::FLAGS);
        self.startup.store(calls.startup, Ordering::SeqCst);
        self.a20.store(calls.a20, Ordering::SeqCst);
        self.attention.set(calls.flags & Calls::FLAGS);
        if calls.a20 != 0 {
            self.stop();
        }
    }

    /// The vector of the start-up IPI that [`Attention::STARTUP`] is about.
    pub fn startup_vector(&self) -> u8 {
        self.startup.load(Ordering::SeqCst)
    }

    /// From now on `sleeper`'s thread runs this vCPU too, and is woken by what wakes this one.
    pub fn sleep_with(&self, sleeper: &Arc<Vcpu>) {
        let _still_the_same = self.sleeper.set(Arc::clone(sleeper));
    }

    fn wake(&self) {
        if let Some(sleeper) = self.sleeper.get() {
            if sleeper.parked.load(Ordering::SeqCst) {
                sleeper.stop();
            }
        } else if self.parked.load(Ordering::SeqCst) {
            // A wake can only fail for a bad address.
            let _woken = futex::wake(self.attention.cell(), futex::Flags::PRIVATE, 1);
        }
    }

    /// Sleeps until one of `flags` is set, or `until` is reached; true if one is set. Only the vCPU's own thread parks.
    pub fn park(&self, flags: u32, until: Option<Instant>) -> bool {
        self.sleep(|| self.attention.cell().load(Ordering::SeqCst) & flags != 0, until)
    }

    /// Sleeps until `called`, which looks at the flags of this vCPU and of those that sleep with it.
    pub fn sleep_until(&self, called: impl Fn() -> bool) {
        self.sleep(called, None);
    }

    fn sleep(&self, called: impl Fn() -> bool, until: Option<Instant>) -> bool {
        self.parked.store(true, Ordering::SeqCst);
        let awake = loop {
            let seen = self.attention.cell().load(Ordering::SeqCst);
            if called() {
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
    fn init_voids_a_start_up_ipi_before_it() {
        let v = Vcpu::new();
        v.start_up(0x9A);
        assert_eq!((v.attention().get(), v.startup_vector()), (Attention::STARTUP, 0x9A));
        v.init();
        assert_eq!(v.attention().get(), Attention::INIT);
    }

    #[test]
    fn who_sleeps_for_another_is_woken_for_it() {
        let (sleeper, other) = (Arc::new(Vcpu::new()), Arc::new(Vcpu::new()));
        other.sleep_with(&sleeper);
        for _ in 0..100 {
            let waker = Arc::clone(&other);
            let t = std::thread::spawn(move || waker.notify(Attention::INTERRUPT));
            sleeper.sleep_until(|| other.attention().get() != 0);
            other.attention().take(Attention::INTERRUPT);
            t.join().expect("waker");
        }
    }

    #[test]
    fn a_deadline_ends_the_sleep() {
        assert!(!Vcpu::new().park(u32::MAX, Some(Instant::now() + Duration::from_millis(5))));
    }
}

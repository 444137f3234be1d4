//! Ends a case that an engine does not end by itself, so that a hang is a finding like any other.
//!
//! Time is what this process spends on a processor: a busy host is no hang.
//!
//! Invariant of the unsafe line: the kernel only fills in the local it is given.

use paravane_cpu::Attention;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often the thread looks.
const LOOK: Duration = Duration::from_millis(50);
/// Processor time without progress that is a hang. (A case takes microseconds.)
const PATIENCE: Duration = Duration::from_secs(3);

/// What this process has used so far.
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: fills in `time`.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// A thread that stops the engine when cases stop coming.
pub(super) struct Watch {
    attention: Attention,
    cases: Arc<AtomicU64>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Watches the engine that listens to `attention`.
    pub(super) fn start(attention: Attention) -> Watch {
        let (cases, ended) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let thread = {
            let (attention, cases, ended) = (attention.clone(), Arc::clone(&cases), Arc::clone(&ended));
            std::thread::spawn(move || {
                let (mut seen, mut since) = (0, processor_time());
                while !ended.load(Ordering::Relaxed) {
                    std::thread::sleep(LOOK);
                    let (now, time) = (cases.load(Ordering::Relaxed), processor_time());
                    if now != seen {
                        (seen, since) = (now, time);
                    }
                    if time.saturating_sub(since) >= PATIENCE {
                        attention.set(Attention::STOP);
                    }
                }
            })
        };
        Watch { attention, cases, ended, thread: Some(thread) }
    }

    /// The next case begins.
    pub(super) fn next_case(&self) {
        self.cases.fetch_add(1, Ordering::Relaxed);
        self.attention.take(Attention::STOP);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It never panics; if it did, there is nobody left to watch.
            thread.join().ok();
        }
    }
}

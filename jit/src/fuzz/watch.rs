//! Ends a case that an engine does not end by itself, so that a hang is a finding like any other.

use paravane_cpu::Attention;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often the thread looks, and how many looks without progress are a hang. (A case takes microseconds.)
const LOOK: Duration = Duration::from_millis(50);
const PATIENCE: u32 = 60;

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
                let (mut seen, mut looks) = (0, 0);
                while !ended.load(Ordering::Relaxed) {
                    std::thread::sleep(LOOK);
                    let now = cases.load(Ordering::Relaxed);
                    looks = if now == seen { looks + 1 } else { 0 };
                    seen = now;
                    if looks >= PATIENCE {
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

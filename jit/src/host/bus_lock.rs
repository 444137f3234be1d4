//! Locked accesses to operands on two cache lines lock the bus. Hosts may detect that and make whoever does it wait
//! (SDM 3B, 17.3.1.6; virtual machines too).
//!
//! Invariant of the unsafe line: the operand lies in the buffer, which is ours alone.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// A processor needs less than a microsecond.
const SLOW: Duration = Duration::from_micros(50);

#[repr(align(64))]
struct Lines([u8; 128]);

/// Whether this host makes locked accesses to operands on two cache lines slow.
pub fn split_locks_are_slow() -> bool {
    static SLOW_HERE: OnceLock<bool> = OnceLock::new();
    *SLOW_HERE.get_or_init(|| (0..5).map(|_| one_split_lock()).min() > Some(SLOW))
}

fn one_split_lock() -> Duration {
    let mut lines = Lines([0; 128]);
    let start = Instant::now();
    // SAFETY: four bytes in the buffer, over the end of its first line.
    unsafe { std::arch::asm!("lock inc dword ptr [{}]", in(reg) lines.0.as_mut_ptr().add(62)) };
    start.elapsed()
}

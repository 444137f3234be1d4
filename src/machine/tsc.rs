//! The rate of the guest's time-stamp counter.
//!
//! TSC, timers and deadlines are views of one machine time; the rate is the host's.
//!
//! Unsafe island. Invariant: RDTSC exists on every x86-64 processor and is not disabled for us (CR4.TSD is clear
//! under Linux unless a process asks for PR_SET_TSC, which we do not).

use std::time::{Duration, Instant};

/// The rate under `--clock instructions`: one tick for each instruction.
pub const INSTRUCTION_HZ: u64 = 1_000_000_000;

/// How long the host's counter is watched.
const SAMPLE: Duration = Duration::from_millis(1);
/// Measured rates are rounded to this.
const GRAIN: u64 = 1_000_000;

/// The host's counter now.
#[inline]
pub fn read() -> u64 {
    // SAFETY: see the invariant at the top.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Whether the host's counter runs at one rate in all power states (CPUID 8000_0007H, EDX bit 8).
pub fn is_invariant() -> bool {
    const POWER: u32 = 0x8000_0007;
    let highest = core::arch::x86_64::__cpuid(0x8000_0000).eax;
    highest >= POWER && core::arch::x86_64::__cpuid(POWER).edx & (1 << 8) != 0
}

/// Ticks per second of the host's counter, measured within about a millisecond.
pub fn host_hz() -> u64 {
    let (start, first) = (Instant::now(), read());
    while start.elapsed() < SAMPLE {
        std::hint::spin_loop();
    }
    let (ticks, ns) = (u128::from(read().wrapping_sub(first)), start.elapsed().as_nanos());
    let hz = (ticks * 1_000_000_000 / ns.max(1)) as u64;
    (hz.div_ceil(GRAIN) * GRAIN).clamp(100 * GRAIN, 10_000 * GRAIN)
}

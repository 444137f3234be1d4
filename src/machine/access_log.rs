//! The last accesses to devices, for the dossier of a processor that shut down.
//!
//! Written by vCPU threads without a lock: an entry that is overwritten while it is read is told wrongly, which hurts nobody.

use paravane_memory::{VpIndex, Width};
use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

const LEN: usize = 32;
const WRITE: u64 = 1 << 63;
const PORT: u64 = 1 << 62;
const USED: u64 = 1 << 61;
const WIDTH_SHIFT: u32 = 56;
const VP_SHIFT: u32 = 48;
/// Physical addresses have no more bits.
const ADDRESS: u64 = (1 << 48) - 1;

/// The last accesses.
#[derive(Debug)]
pub(super) struct AccessLog {
    next: AtomicUsize,
    entries: [[AtomicU64; 2]; LEN],
}

/// One access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DeviceAccess {
    /// Whose.
    pub vp: VpIndex,
    /// A port (a physical address otherwise).
    pub port: bool,
    /// A store or OUT.
    pub write: bool,
    /// Where.
    pub at: u64,
    /// Bytes.
    pub size: u64,
    /// What was written, or read.
    pub value: u64,
}

impl Default for AccessLog {
    fn default() -> AccessLog {
        AccessLog {
            next: AtomicUsize::new(0),
            entries: std::array::from_fn(|_| [AtomicU64::new(0), AtomicU64::new(0)]),
        }
    }
}

impl AccessLog {
    /// Notes an access to a port.
    pub(super) fn port(&self, vp: VpIndex, at: u16, width: Width, write: bool, value: u32) {
        self.note(vp, PORT | u64::from(at), width, write, u64::from(value));
    }

    /// Notes an access to a physical address.
    pub(super) fn mmio(&self, vp: VpIndex, at: u64, width: Width, write: bool, value: u64) {
        self.note(vp, at & ADDRESS, width, write, value);
    }

    fn note(&self, vp: VpIndex, what: u64, width: Width, write: bool, value: u64) {
        let entry = &self.entries[self.next.fetch_add(1, Ordering::Relaxed) % LEN];
        let size = (width.bytes() as u64) << WIDTH_SHIFT | (u64::from(vp.0) & 0xFF) << VP_SHIFT;
        entry[0].store(what | size | USED | if write { WRITE } else { 0 }, Ordering::Relaxed);
        entry[1].store(value & width.mask(), Ordering::Relaxed);
    }

    /// The accesses, the latest last.
    pub(super) fn list(&self) -> Vec<DeviceAccess> {
        let next = self.next.load(Ordering::Relaxed);
        let entry = |i| &self.entries[next.wrapping_add(i) % LEN];
        (0..LEN)
            .map(|i| (entry(i)[0].load(Ordering::Relaxed), entry(i)[1].load(Ordering::Relaxed)))
            .filter(|(what, _)| what & USED != 0)
            .map(|(what, value)| DeviceAccess {
                vp: VpIndex((what >> VP_SHIFT) as u32 & 0xFF),
                port: what & PORT != 0,
                write: what & WRITE != 0,
                at: what & ADDRESS,
                size: what >> WIDTH_SHIFT & 0xF,
                value,
            })
            .collect()
    }
}

impl fmt::Display for DeviceAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match (self.port, self.write) {
            (true, false) => "in",
            (true, true) => "out",
            (false, false) => "load",
            (false, true) => "store",
        };
        write!(
            f,
            "vcpu{} {what:<5} {:#x} {:#0width$x}",
            self.vp.0,
            self.at,
            self.value,
            width = 2 + 2 * self.size as usize
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_accesses_are_kept() {
        let log = AccessLog::default();
        (0..40).for_each(|n| log.port(VpIndex(3), n, Width::W8, n % 2 == 1, u32::from(n)));
        log.mmio(VpIndex(15), 0xFEE0_00B0, Width::W32, true, 0);
        let all = log.list();
        assert_eq!(all.len(), LEN);
        assert_eq!((all[0].at, all[30].at), (9, 39));
        assert_eq!(all[31].to_string(), "vcpu15 store 0xfee000b0 0x00000000");
        assert_eq!(all[30].to_string(), "vcpu3 out   0x27 0x27");
    }
}

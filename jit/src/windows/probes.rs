//! What translated code reads before it uses an address in a window: a byte on a page that can be read if the address's region is admitted.
//!
//! Invariants this unsafe island relies on:
//! * `at..at + PROBES` is a reservation of our own, for addresses below 2^48, in which at most whole pages can be read;
//! * beyond, a probe may read any byte the host has, which nobody sees, and pass, but not from 2^59 on: there the probe's own address is not
//!   canonical. What passes so is, with a window's delta of at most 80 TiB either way, no address that programs have on the host, and faults
//!   when it is used.

use super::reservation::{release, reserve_aside};
use std::io;

/// A byte of [`Probes`] is for 4 KiB, a page of them for a region.
pub(crate) const PROBE_SHIFT: u32 = 12;
/// Regions have 16 MiB.
pub(super) const REGION_SHIFT: u32 = PROBE_SHIFT + 12;
/// Regions of the lower half.
pub(super) const REGIONS: u64 = 1 << (47 - REGION_SHIFT);
/// Bytes of address space for probes.
const PROBES: u64 = 1 << (48 - PROBE_SHIFT);

/// What translated code reads before it uses an address: the byte [`PROBE_SHIFT`] says, on a page that can be read if the address's
/// region is admitted.
pub(super) struct Probes {
    pub(super) at: u64,
}

impl Probes {
    /// Probes of which none passes; an error if the host does not give the address space.
    pub(super) fn new() -> io::Result<Probes> {
        reserve_aside(PROBES).map(|at| Probes { at: at as u64 })
    }

    /// Lets probes of `region`, one of the lower half, pass; false if the host has no mapping to spare.
    pub(super) fn admit(&mut self, region: u64) -> bool {
        assert!(region < REGIONS);
        let page = self.at + (region << (REGION_SHIFT - PROBE_SHIFT));
        // SAFETY: a page of the reservation.
        unsafe { libc::mprotect(page as *mut libc::c_void, 4096, libc::PROT_READ) == 0 }
    }

    /// The address, to a page, whose probe reads the byte at `at`, if one does.
    pub(super) fn probed(&self, at: u64) -> Option<u64> {
        let byte = at.wrapping_sub(self.at);
        (byte < PROBES).then_some(byte << PROBE_SHIFT)
    }
}

impl Drop for Probes {
    fn drop(&mut self) {
        release(self.at, PROBES);
    }
}

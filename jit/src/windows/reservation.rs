//! Address space of the host that is ours, in which there is nothing yet.
//!
//! Invariant this unsafe island relies on: who reserves with MAP_FIXED, or releases, owns the range, and nothing refers to what is there.

use std::io;

/// Inaccessible address space at `at`, which must be ours with MAP_FIXED, or free with MAP_FIXED_NOREPLACE.
pub(super) fn reserve(at: u64, len: u64, how: libc::c_int) -> io::Result<*mut u8> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | how;
    // SAFETY: a reservation that replaces nothing but what the caller owns.
    let p = unsafe { libc::mmap(at as *mut libc::c_void, len as usize, libc::PROT_NONE, flags, -1, 0) };
    if p == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    if p as u64 != at {
        // Hosts that do not know MAP_FIXED_NOREPLACE take the address for a hint.
        release(p as u64, len);
        return Err(io::Error::from(io::ErrorKind::AddrInUse));
    }
    Ok(p.cast())
}

/// Gives address space of ours back.
pub(super) fn release(at: u64, len: u64) {
    // SAFETY: by the caller, the range is ours, and nothing refers to it.
    unsafe { libc::munmap(at as *mut libc::c_void, len as usize) };
}

/// Reserves `len` bytes where programs have nothing, if it can be: between where they begin and where randomization puts them.
/// The host chooses else.
pub(crate) fn reserve_aside(len: u64) -> io::Result<*mut u8> {
    const TIB: u64 = 1 << 40;
    let free = (8..72).map(|n| n * TIB).find_map(|at| reserve(at, len, libc::MAP_FIXED_NOREPLACE).ok());
    if let Some(p) = free {
        return Ok(p);
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a reservation at a place of the kernel's choice.
    let p = unsafe { libc::mmap(std::ptr::null_mut(), len as usize, libc::PROT_NONE, flags, -1, 0) };
    if p == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(p.cast()) }
}

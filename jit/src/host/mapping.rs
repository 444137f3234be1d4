//! Mappings of files, some at addresses that matter.
//!
//! Invariant: a [`Mapping`] is ours alone; only its own reservation is ever replaced.

use std::io;

/// A mapping, unmapped on drop.
pub(super) struct Mapping {
    pub(super) start: *mut libc::c_void,
    pub(super) length: usize,
}

impl Mapping {
    fn map(at: u64, length: u64, protection: i32, flags: i32, fd: i32) -> io::Result<Mapping> {
        // SAFETY: without MAP_FIXED no existing mapping is touched.
        let start = unsafe { libc::mmap(at as *mut _, length as usize, protection, flags, fd, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping { start, length: length as usize })
    }

    pub(super) fn anywhere(fd: i32, length: u64, protection: i32) -> io::Result<Mapping> {
        Self::map(0, length, protection, libc::MAP_SHARED, fd)
    }

    pub(super) fn fixed(fd: i32, at: u64, length: u64, protection: i32) -> io::Result<Mapping> {
        Self::map(at, length, protection, libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE, fd)
    }

    /// Address space without access.
    pub(super) fn reserve(at: u64, length: u64) -> io::Result<Mapping> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
        Self::map(at, length, libc::PROT_NONE, flags, -1)
    }

    /// Shows the first `length` bytes of a file at `offset` of this reservation.
    pub(super) fn show(&self, fd: i32, offset: u64, length: u64, protection: i32) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        assert!(offset + length <= self.length as u64, "outside the reservation");
        let at = self.start.wrapping_byte_add(offset as usize);
        // Present from the start: error codes tell absent pages from protected ones.
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE;
        // SAFETY: replaces only a part of our own reservation, as just checked.
        let shown = unsafe { libc::mmap(at, length as usize, protection, flags, fd, 0) };
        if shown == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl Mapping {
    /// Changes what may be done with `length` bytes at `offset` of this reservation.
    pub(super) fn protect(&self, offset: u64, length: u64, protection: i32) -> io::Result<()> {
        assert!(offset + length <= self.length as u64, "outside the reservation");
        let at = self.start.wrapping_byte_add(offset as usize);
        // SAFETY: changes only a part of our own reservation, as just checked, which Rust code does not refer to.
        let changed = unsafe { libc::mprotect(at, length as usize, protection) };
        if changed == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: ours, and nothing refers to it any more.
        unsafe { libc::munmap(self.start, self.length) };
    }
}

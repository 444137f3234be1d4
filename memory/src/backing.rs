//! The one host mapping behind all guest memory.
//!
//! Invariants this unsafe island relies on:
//! * `base..base + len` is one live anonymous mapping, readable and writable, for the life of `Backing`;
//! * no Rust reference into it is ever made: guest and devices write it at any time, so every access is a
//!   raw-pointer copy or an atomic;
//! * every public method checks `offset + size <= len` before touching memory.

use crate::addr::RamOffset;
use crate::transfer::PIECES;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// Which way a file transfer goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Direction {
    ToMemory,
    ToFile,
}

pub(crate) struct Backing {
    base: *mut u8,
    len: u64,
}

// SAFETY: `Backing` hands out no references; concurrent access is by raw copies and atomics.
unsafe impl Send for Backing {}
// SAFETY: as above.
unsafe impl Sync for Backing {}

impl Backing {
    /// Reserves `len` bytes (a multiple of the page size), zero-filled and touched lazily.
    pub(crate) fn new(len: u64) -> io::Result<Backing> {
        let size = usize::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Backing { base: base.cast(), len })
    }

    pub(crate) fn base(&self) -> *mut u8 {
        self.base
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    #[inline]
    fn ptr(&self, at: RamOffset, size: u64) -> *mut u8 {
        assert!(at.0 <= self.len && size <= self.len - at.0, "guest memory offset out of range");
        // SAFETY: within the mapping, by the check above.
        unsafe { self.base.add(at.0 as usize) }
    }

    #[inline]
    pub(crate) fn read(&self, at: RamOffset, buf: &mut [u8]) {
        let p = self.ptr(at, buf.len() as u64);
        // SAFETY: `p` is valid for `buf.len()` bytes and `buf` never overlaps guest memory.
        unsafe { std::ptr::copy_nonoverlapping(p, buf.as_mut_ptr(), buf.len()) }
    }

    #[inline]
    pub(crate) fn write(&self, at: RamOffset, buf: &[u8]) {
        let p = self.ptr(at, buf.len() as u64);
        // SAFETY: as in `read`.
        unsafe { std::ptr::copy_nonoverlapping(buf.as_ptr(), p, buf.len()) }
    }

    /// Overlapping-safe copy inside guest memory.
    pub(crate) fn copy(&self, from: RamOffset, to: RamOffset, len: u64) {
        let (s, d) = (self.ptr(from, len), self.ptr(to, len));
        // SAFETY: both ranges lie in the mapping; `copy` allows overlap.
        unsafe { std::ptr::copy(s, d, len as usize) }
    }

    pub(crate) fn fill(&self, at: RamOffset, byte: u8, len: u64) {
        let p = self.ptr(at, len);
        // SAFETY: `p` is valid for `len` bytes.
        unsafe { std::ptr::write_bytes(p, byte, len as usize) }
    }

    /// Little-endian load of `size` bytes (1, 2, 4 or 8); one host access, so aligned loads are atomic.
    #[inline]
    pub(crate) fn load(&self, at: RamOffset, size: usize) -> u64 {
        let p = self.ptr(at, size as u64);
        // SAFETY: `p` is valid for `size` bytes; unaligned reads are allowed.
        unsafe {
            match size {
                1 => u64::from(p.read_volatile()),
                2 => u64::from(p.cast::<u16>().read_unaligned()),
                4 => u64::from(p.cast::<u32>().read_unaligned()),
                8 => p.cast::<u64>().read_unaligned(),
                _ => panic!("load of {size} bytes"),
            }
        }
    }

    /// Little-endian store of `size` bytes (1, 2, 4 or 8).
    #[inline]
    pub(crate) fn store(&self, at: RamOffset, size: usize, value: u64) {
        let p = self.ptr(at, size as u64);
        // SAFETY: as in `load`.
        unsafe {
            match size {
                1 => p.write_volatile(value as u8),
                2 => p.cast::<u16>().write_unaligned(value as u16),
                4 => p.cast::<u32>().write_unaligned(value as u32),
                8 => p.cast::<u64>().write_unaligned(value),
                _ => panic!("store of {size} bytes"),
            }
        }
    }

    /// Atomic compare-exchange of an aligned 1, 2, 4 or 8 byte cell; `Err` holds what was there.
    #[inline]
    pub(crate) fn compare_exchange(
        &self,
        at: RamOffset,
        size: usize,
        old: u64,
        new: u64,
    ) -> Result<u64, u64> {
        let p = self.ptr(at, size as u64);
        assert!(at.0.is_multiple_of(size as u64), "unaligned compare-exchange");
        macro_rules! cas {
            ($a:ty, $t:ty) => {
                // SAFETY: in bounds and aligned (checked above); all other writers use atomics or raw copies.
                unsafe { <$a>::from_ptr(p.cast()) }
                    .compare_exchange(old as $t, new as $t, Ordering::SeqCst, Ordering::SeqCst)
                    .map(u64::from)
                    .map_err(u64::from)
            };
        }
        match size {
            1 => cas!(AtomicU8, u8),
            2 => cas!(AtomicU16, u16),
            4 => cas!(AtomicU32, u32),
            8 => cas!(AtomicU64, u64),
            _ => panic!("compare-exchange of {size} bytes"),
        }
    }

    /// One `preadv2` or `pwritev2` at `pos` for `pieces` (at most [`PIECES`] of them); `now` adds RWF_NOWAIT. Returns the
    /// bytes moved, 0 at the end of a file that is read.
    pub(crate) fn transfer(
        &self,
        file: &File,
        pos: u64,
        pieces: &[(RamOffset, u64)],
        direction: Direction,
        now: bool,
    ) -> io::Result<u64> {
        let mut vectors = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; PIECES];
        for (vector, &(at, len)) in vectors.iter_mut().zip(pieces) {
            *vector = libc::iovec { iov_base: self.ptr(at, len).cast(), iov_len: len as usize };
        }
        let count = pieces.len().min(PIECES) as libc::c_int;
        let flags = if now { libc::RWF_NOWAIT } else { 0 };
        loop {
            // SAFETY: the first `count` vectors lie in the mapping, as `ptr` checked; the kernel touches nothing else.
            let n = unsafe {
                match direction {
                    Direction::ToMemory => {
                        libc::preadv2(file.as_raw_fd(), vectors.as_ptr(), count, pos as i64, flags)
                    }
                    Direction::ToFile => {
                        libc::pwritev2(file.as_raw_fd(), vectors.as_ptr(), count, pos as i64, flags)
                    }
                }
            };
            match u64::try_from(n) {
                Ok(n) => return Ok(n),
                Err(_) => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e => return Err(e),
                },
            }
        }
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, unmapped once.
        unsafe { libc::munmap(self.base.cast(), self.len as usize) };
    }
}

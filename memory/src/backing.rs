//! The one host mapping behind all guest memory.
//!
//! Invariants this unsafe island relies on:
//! * `base..base + len` is one live mapping of all of `file`, readable and writable, for the life of `Backing`;
//! * no Rust reference into it is ever made, and no Rust load or store: guest and devices write it at any time, so every
//!   access is assembly, which is no part of Rust's memory model;
//! * every public method checks `offset + size <= len` before touching memory.

use crate::addr::RamOffset;
use crate::transfer::PIECES;
use std::arch::asm;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

/// Which way a file transfer goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Direction {
    ToMemory,
    ToFile,
}

pub(crate) struct Backing {
    file: File,
    base: *mut u8,
    len: u64,
}

// SAFETY: `Backing` hands out no references; concurrent access is by raw copies and atomics.
unsafe impl Send for Backing {}
// SAFETY: as above.
unsafe impl Sync for Backing {}

/// A file of `len` bytes that is memory alone and has no name.
fn memory_file(len: u64) -> io::Result<File> {
    let mut limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: a query with a valid out-pointer, which is left alone should it fail.
    unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &mut limit) };
    if limit.rlim_cur < len {
        // The kernel would end the process.
        return Err(io::Error::other(
            "guest memory is a file for the host, whose size is limited (ulimit -f)",
        ));
    }
    // SAFETY: the name is a C string; the descriptor is new, so that `File` owns it alone.
    let file = unsafe {
        let fd = libc::memfd_create(c"guest-memory".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        File::from_raw_fd(fd)
    };
    file.set_len(len)?;
    Ok(file)
}

impl Backing {
    /// Reserves `len` bytes (a multiple of the page size), zero-filled and touched lazily.
    pub(crate) fn new(len: u64) -> io::Result<Backing> {
        let size = usize::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let file = memory_file(len)?;
        // SAFETY: a fresh mapping of our own file at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Backing { file, base: base.cast(), len })
    }

    /// What is mapped: offsets in it are those of guest memory.
    pub(crate) fn file(&self) -> &File {
        &self.file
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
        if let Ok(buf) = <&mut [u8; 16]>::try_from(&mut *buf) {
            buf[..8].copy_from_slice(&self.load(at, 8).to_le_bytes());
            buf[8..].copy_from_slice(&self.load(RamOffset(at.0 + 8), 8).to_le_bytes());
            return;
        }
        let p = self.ptr(at, buf.len() as u64);
        // SAFETY: `p` is valid for `buf.len()` bytes and `buf` never overlaps guest memory.
        unsafe { copy_up(p, buf.as_mut_ptr(), buf.len()) }
    }

    #[inline]
    pub(crate) fn write(&self, at: RamOffset, buf: &[u8]) {
        let p = self.ptr(at, buf.len() as u64);
        // SAFETY: as in `read`.
        unsafe { copy_up(buf.as_ptr(), p, buf.len()) }
    }

    /// Overlapping-safe copy inside guest memory.
    pub(crate) fn copy(&self, from: RamOffset, to: RamOffset, len: u64) {
        let (s, d) = (self.ptr(from, len), self.ptr(to, len));
        // SAFETY: both ranges lie in the mapping; each way reads no byte that it wrote before.
        unsafe {
            if from < to && to.0 - from.0 < len {
                copy_down(s, d, len as usize);
            } else {
                copy_up(s, d, len as usize);
            }
        }
    }

    pub(crate) fn fill(&self, at: RamOffset, byte: u8, len: u64) {
        let p = self.ptr(at, len);
        // SAFETY: `p` is valid for `len` bytes; DF is clear in Rust code.
        unsafe {
            asm!("rep stosb", inout("rcx") len => _, inout("rdi") p => _, in("al") byte, options(nostack, preserves_flags));
        }
    }

    /// Little-endian load of `size` bytes (1, 2, 4 or 8): one host instruction.
    #[inline]
    pub(crate) fn load(&self, at: RamOffset, size: usize) -> u64 {
        let p = self.ptr(at, size as u64);
        let v: u64;
        // SAFETY: `p` is valid for `size` bytes.
        unsafe {
            match size {
                1 => {
                    asm!("movzx {v:e}, byte ptr [{p}]", p = in(reg) p, v = out(reg) v, options(nostack, preserves_flags, readonly))
                }
                2 => {
                    asm!("movzx {v:e}, word ptr [{p}]", p = in(reg) p, v = out(reg) v, options(nostack, preserves_flags, readonly))
                }
                4 => {
                    asm!("mov {v:e}, [{p}]", p = in(reg) p, v = out(reg) v, options(nostack, preserves_flags, readonly))
                }
                8 => {
                    asm!("mov {v}, [{p}]", p = in(reg) p, v = out(reg) v, options(nostack, preserves_flags, readonly))
                }
                _ => panic!("load of {size} bytes"),
            }
        }
        v
    }

    /// Little-endian store of `size` bytes (1, 2, 4 or 8): one host instruction.
    #[inline]
    pub(crate) fn store(&self, at: RamOffset, size: usize, value: u64) {
        let p = self.ptr(at, size as u64);
        // SAFETY: as in `load`.
        unsafe {
            match size {
                1 => {
                    asm!("mov [{p}], {v}", p = in(reg) p, v = in(reg_byte) value as u8, options(nostack, preserves_flags))
                }
                2 => {
                    asm!("mov [{p}], {v:x}", p = in(reg) p, v = in(reg) value, options(nostack, preserves_flags))
                }
                4 => {
                    asm!("mov [{p}], {v:e}", p = in(reg) p, v = in(reg) value, options(nostack, preserves_flags))
                }
                8 => {
                    asm!("mov [{p}], {v}", p = in(reg) p, v = in(reg) value, options(nostack, preserves_flags))
                }
                _ => panic!("store of {size} bytes"),
            }
        }
    }

    /// Atomic compare-exchange of 1, 2, 4 or 8 bytes at any address; `Err` holds what was there.
    #[inline]
    pub(crate) fn compare_exchange(
        &self,
        at: RamOffset,
        size: usize,
        old: u64,
        new: u64,
    ) -> Result<u64, u64> {
        let p = self.ptr(at, size as u64);
        let old = old & (u64::MAX >> (64 - 8 * size as u32));
        let seen: u64;
        // SAFETY: `p` is valid for `size` bytes. RAX keeps its upper part where the operand is smaller.
        unsafe {
            match size {
                1 => {
                    asm!("lock cmpxchg [{p}], {new}", p = in(reg) p, new = in(reg_byte) new as u8, inout("rax") old => seen, options(nostack))
                }
                2 => {
                    asm!("lock cmpxchg [{p}], {new:x}", p = in(reg) p, new = in(reg) new, inout("rax") old => seen, options(nostack))
                }
                4 => {
                    asm!("lock cmpxchg [{p}], {new:e}", "mov eax, eax", p = in(reg) p, new = in(reg) new, inout("rax") old => seen, options(nostack))
                }
                8 => {
                    asm!("lock cmpxchg [{p}], {new}", p = in(reg) p, new = in(reg) new, inout("rax") old => seen, options(nostack))
                }
                _ => panic!("compare-exchange of {size} bytes"),
            }
        }
        if seen == old { Ok(seen) } else { Err(seen) }
    }

    /// Atomic compare-exchange of 16 aligned bytes; `Err` holds what was there.
    pub(crate) fn compare_exchange_16(&self, at: RamOffset, old: u128, new: u128) -> Result<u128, u128> {
        let p = self.ptr(at, 16);
        assert!(at.0.is_multiple_of(16), "unaligned compare-exchange of 16 bytes");
        let (low, high): (u64, u64);
        // SAFETY: `p` is valid for 16 bytes and aligned, and all but the first 64-bit hosts have the instruction. RBX, which
        // the compiler keeps for itself, is put back.
        unsafe {
            asm!(
                "xchg rbx, rsi",
                "lock cmpxchg16b [rdi]",
                "mov rbx, rsi",
                in("rdi") p,
                inout("rsi") new as u64 => _,
                in("rcx") (new >> 64) as u64,
                inout("rax") old as u64 => low,
                inout("rdx") (old >> 64) as u64 => high,
                options(nostack),
            );
        }
        let seen = u128::from(high) << 64 | u128::from(low);
        if seen == old { Ok(seen) } else { Err(seen) }
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

/// Copies upwards.
///
/// # Safety
/// `from` and `to` are valid for `len` bytes, and `to` does not lie inside `from..from + len`.
#[inline]
unsafe fn copy_up(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: by the caller; DF is clear in Rust code.
    unsafe {
        asm!("rep movsb", inout("rcx") len => _, inout("rsi") from => _, inout("rdi") to => _, options(nostack, preserves_flags));
    }
}

/// Copies downwards.
///
/// # Safety
/// `from` and `to` are valid for `len` bytes, and `from` does not lie inside `to..to + len`.
unsafe fn copy_down(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: by the caller; for no bytes the addresses before the ranges are not used. DF is clear again afterwards.
    unsafe {
        let (from, to) = (from.wrapping_add(len).wrapping_sub(1), to.wrapping_add(len).wrapping_sub(1));
        asm!("std", "rep movsb", "cld", inout("rcx") len => _, inout("rsi") from => _, inout("rdi") to => _, options(nostack));
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, unmapped once.
        unsafe { libc::munmap(self.base.cast(), self.len as usize) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [usize; 4] = [1, 2, 4, 8];

    fn backing() -> Backing {
        let b = Backing::new(0x3000).expect("a mapping");
        b.write(RamOffset(0), &(0..0x3000).map(|i: u32| (i * 7) as u8).collect::<Vec<_>>());
        b
    }

    fn bytes(b: &Backing, at: u64, len: usize) -> Vec<u8> {
        let mut v = vec![0; len];
        b.read(RamOffset(at), &mut v);
        v
    }

    #[test]
    fn loads_and_stores_touch_their_bytes_alone() {
        for size in SIZES {
            for at in [0x100, 0x103, 0xFFD] {
                let b = backing();
                let before = bytes(&b, at - 8, 24);
                let mut expected = [0; 8];
                expected[..size].copy_from_slice(&before[8..8 + size]);
                assert_eq!(b.load(RamOffset(at), size), u64::from_le_bytes(expected));
                b.store(RamOffset(at), size, 0x1122_3344_5566_7788);
                let mut after = before.clone();
                after[8..8 + size].copy_from_slice(&0x1122_3344_5566_7788u64.to_le_bytes()[..size]);
                assert_eq!(bytes(&b, at - 8, 24), after);
            }
        }
    }

    #[test]
    fn compare_exchanges_at_any_address() {
        for size in SIZES {
            for at in [0x100, 0x13F, 0xFFF, 0xFFD] {
                let b = backing();
                let (there, before) = (b.load(RamOffset(at), size), bytes(&b, at - 8, 24));
                assert_eq!(b.compare_exchange(RamOffset(at), size, there ^ 1, 5), Err(there));
                assert_eq!(bytes(&b, at - 8, 24), before);
                // What lies above the operand does not count.
                let wide = if size < 8 { there | 1 << 63 } else { there };
                assert_eq!(b.compare_exchange(RamOffset(at), size, wide, u64::MAX), Ok(there));
                let mut after = before;
                after[8..8 + size].fill(0xFF);
                assert_eq!(bytes(&b, at - 8, 24), after);
            }
        }
        let b = backing();
        let there = u128::from_le_bytes(bytes(&b, 0x110, 16).try_into().expect("16"));
        assert_eq!(b.compare_exchange_16(RamOffset(0x110), there ^ 1 << 100, 0), Err(there));
        assert_eq!(b.compare_exchange_16(RamOffset(0x110), there, !there), Ok(there));
        assert_eq!(bytes(&b, 0x110, 16), (!there).to_le_bytes());
    }

    #[test]
    fn copies_may_overlap_both_ways() {
        for (from, to, len) in [(0x100, 0x108, 0x40), (0x108, 0x100, 0x40), (0x100, 0x1000, 0x800), (5, 6, 0)]
        {
            let b = backing();
            let mut expected = bytes(&b, 0, 0x3000);
            expected.copy_within(from as usize..(from + len) as usize, to as usize);
            b.copy(RamOffset(from), RamOffset(to), len);
            assert!(bytes(&b, 0, 0x3000) == expected, "{from:#x} to {to:#x}");
        }
    }
}

//! Executable memory: shared memory mapped twice, writable here and executable there, never both on one address. It is
//! anonymous, because `perf` looks into `/tmp/perf-PID.map` for no other.
//!
//! Invariants this unsafe island relies on:
//! * `rw` and `rx` map the same `len` bytes for the life of the cache;
//! * bytes below `used` and from `cold` on belong to emitted code; only the owning vCPU thread writes, and it never writes
//!   bytes that it may be executing except by aligned or single-instruction patches of jump displacements.
//!
//! What runs lies together at the beginning, what seldom does at the end, so that the host's caches hold little else.

use std::io;

/// An offset into the code cache.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub(crate) struct CodeOffset(pub u32);

/// Hot code begins at multiples of this.
pub(crate) const ALIGNMENT: usize = 16;
/// Bytes for which host pages are asked for at a time.
const POPULATE: usize = 128 << 10;

/// The code cache of one vCPU.
pub(crate) struct CodeCache {
    rw: *mut u8,
    rx: *mut u8,
    len: usize,
    used: usize,
    /// Where the cold code begins, which grows downwards.
    cold: usize,
    /// Bytes between these have no host pages yet, in either mapping.
    unpopulated: std::ops::Range<usize>,
}

// SAFETY: the mappings are owned by this value and used from one thread at a time.
unsafe impl Send for CodeCache {}

impl CodeCache {
    /// A cache of `len` bytes (touched as it fills).
    pub(crate) fn new(len: usize) -> io::Result<CodeCache> {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let rw = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
        if rw == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: an old size of 0 leaves a shared mapping as it is and maps its memory once more (mremap(2)).
        let rx = unsafe { libc::mremap(rw, 0, len, libc::MREMAP_MAYMOVE) };
        // SAFETY: the second mapping was just made, and nothing is in it yet.
        let executable = rx != libc::MAP_FAILED
            && unsafe { libc::mprotect(rx, len, libc::PROT_READ | libc::PROT_EXEC) } == 0;
        if !executable {
            let error = io::Error::last_os_error();
            for mapping in [rw, rx].into_iter().filter(|&m| m != libc::MAP_FAILED) {
                // SAFETY: ours, and used by nobody.
                unsafe { libc::munmap(mapping, len) };
            }
            return Err(error);
        }
        Ok(CodeCache { rw: rw.cast(), rx: rx.cast(), len, used: 0, cold: len, unpopulated: 0..len })
    }

    /// Bytes still free.
    pub(crate) fn free(&self) -> usize {
        self.cold - self.used
    }

    /// Bytes in use.
    pub(crate) fn used(&self) -> usize {
        self.used + self.len - self.cold
    }

    /// Where the next code will go.
    pub(crate) fn next(&self) -> CodeOffset {
        CodeOffset(self.used as u32)
    }

    /// Where the next `len` bytes of cold code will go.
    pub(crate) fn next_cold(&self, len: usize) -> CodeOffset {
        CodeOffset(self.cold.saturating_sub(len) as u32)
    }

    /// Appends code; the caller checked [`Self::free`]. Returns where it starts.
    pub(crate) fn append(&mut self, code: &[u8]) -> CodeOffset {
        assert!(code.len() <= self.free(), "code cache overrun");
        let at = self.used;
        if at + code.len() > self.unpopulated.start {
            let to = (at + code.len()).next_multiple_of(POPULATE).min(self.unpopulated.end);
            self.populate(self.unpopulated.start..to);
            self.unpopulated.start = to;
        }
        self.write(at, code);
        self.used = (at + code.len()).next_multiple_of(ALIGNMENT).min(self.cold);
        CodeOffset(at as u32)
    }

    /// Adds cold code before what there is of it; the caller checked [`Self::free`]. Returns where it starts.
    pub(crate) fn append_cold(&mut self, code: &[u8]) -> CodeOffset {
        assert!(code.len() <= self.free(), "code cache overrun");
        let at = self.next_cold(code.len()).0 as usize;
        if at < self.unpopulated.end {
            let from = (at / POPULATE * POPULATE).max(self.unpopulated.start);
            self.populate(from..self.unpopulated.end);
            self.unpopulated.end = from;
        }
        self.write(at, code);
        self.cold = at;
        CodeOffset(at as u32)
    }

    fn write(&mut self, at: usize, code: &[u8]) {
        assert!(self.used <= at && at + code.len() <= self.cold, "not free");
        // SAFETY: in bounds by the line above; the source is a Rust slice outside the cache.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.rw.add(at), code.len()) };
    }

    /// Asks for host pages, many at a time: two page faults for each cost more than to translate a page of code.
    #[cold]
    fn populate(&mut self, range: std::ops::Range<usize>) {
        for (mapping, advice) in [(self.rw, libc::MADV_POPULATE_WRITE), (self.rx, libc::MADV_POPULATE_READ)] {
            // SAFETY: the range lies in the mapping and begins at a page. Where the host does not know the advice, pages come
            // when they are touched.
            unsafe { libc::madvise(mapping.add(range.start).cast(), range.len(), advice) };
        }
    }

    /// Whether emitted code lies at `at`.
    fn is_code(&self, at: usize) -> bool {
        at < self.used || (self.cold..self.len).contains(&at)
    }

    /// A copy of `len` bytes of code, or what there is of them.
    pub(crate) fn bytes(&self, at: CodeOffset, len: u32) -> Vec<u8> {
        let at = (at.0 as usize).min(self.len);
        let end = if at < self.used { self.used } else { self.len };
        let len = if self.is_code(at) { (len as usize).min(end - at) } else { 0 };
        // SAFETY: in bounds by the two lines above; the mapping is readable, and only `&mut self` writes to it.
        unsafe { std::slice::from_raw_parts(self.rw.add(at), len) }.to_vec()
    }

    /// Drops everything.
    pub(crate) fn clear(&mut self) {
        (self.used, self.cold) = (0, self.len);
    }

    /// Rewrites the 32-bit displacement at `site` so that the jump ending right after it reaches `target`.
    pub(crate) fn patch_rel32(&mut self, site: CodeOffset, target: CodeOffset) {
        let first = site.0 as usize;
        assert!(self.is_code(first) && self.is_code(first + 3), "patch outside emitted code");
        let rel = target.0.wrapping_sub(site.0 + 4);
        // SAFETY: in bounds by the check above.
        unsafe { self.rw.add(site.0 as usize).cast::<u32>().write_unaligned(rel) };
    }

    /// Adds `by` to the 64 bits at `at`.
    pub(crate) fn add(&mut self, at: CodeOffset, by: u64) {
        let first = at.0 as usize;
        assert!(self.is_code(first) && self.is_code(first + 7), "patch outside emitted code");
        // SAFETY: in bounds by the check above.
        unsafe {
            let at = self.rw.add(first).cast::<u64>();
            at.write_unaligned(at.read_unaligned().wrapping_add(by));
        }
    }

    /// Replaces code by as much other code.
    pub(crate) fn replace(&mut self, at: CodeOffset, code: &[u8]) {
        let first = at.0 as usize;
        assert!(first + code.len() <= self.used, "patch outside emitted code");
        // SAFETY: in bounds by the check above; the source is a Rust slice outside the cache.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.rw.add(first), code.len()) };
    }

    /// Executable address of `at`.
    pub(crate) fn address(&self, at: CodeOffset) -> u64 {
        self.rx as u64 + u64::from(at.0)
    }

    /// The offset of executable address `pc`, if it lies in emitted code.
    pub(crate) fn offset_of(&self, pc: u64) -> Option<CodeOffset> {
        let off = pc.checked_sub(self.rx as u64)?;
        self.is_code(usize::try_from(off).ok()?).then_some(CodeOffset(off as u32))
    }
}

impl Drop for CodeCache {
    fn drop(&mut self) {
        // SAFETY: both mappings were made in `new` and are unmapped once.
        unsafe {
            libc::munmap(self.rw.cast(), self.len);
            libc::munmap(self.rx.cast(), self.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_grows_from_both_ends_and_lies_where_it_was_said_to() {
        let mut cache = CodeCache::new(1 << 20).expect("code cache");
        for round in 0..2 {
            for n in 1..=64 {
                let (hot, cold) = (vec![n; 3000], vec![n | 0x80; 5001]);
                let (next, next_cold) = (cache.next(), cache.next_cold(cold.len()));
                assert_eq!((cache.append(&hot), cache.append_cold(&cold)), (next, next_cold));
                assert_eq!(cache.bytes(next, 3000), hot);
                assert_eq!(cache.bytes(next_cold, 5001), cold);
                assert_eq!(
                    cache.offset_of(cache.address(next_cold) + 5000),
                    Some(CodeOffset(next_cold.0 + 5000))
                );
            }
            assert_eq!(
                (cache.used(), cache.free()),
                (64 * (3008 + 5001), (1 << 20) - 64 * (3008 + 5001)),
                "{round}"
            );
            assert_eq!(cache.offset_of(cache.address(cache.next())), None, "between the ends");
            assert!(cache.bytes(cache.next(), 8).is_empty());
            cache.clear();
            assert_eq!(cache.free(), 1 << 20);
        }
    }

    #[test]
    fn what_is_written_here_is_read_there_and_perf_knows_it_for_anonymous() {
        let mut cache = CodeCache::new(1 << 20).expect("code cache");
        for byte in 0..40 {
            cache.append(&[byte; 4096]);
        }
        assert_eq!(cache.used(), 40 * 4096);
        for page in 0..40 {
            // SAFETY: within what was appended.
            let seen = unsafe { *(cache.address(CodeOffset(page * 4096 + 7)) as *const u8) };
            assert_eq!(u32::from(seen), page);
        }
        let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
        let of = |at: *mut u8| {
            maps.lines().find(|l| l.starts_with(&format!("{:x}-", at as u64))).expect("mapping")
        };
        assert!(of(cache.rw).contains(" rw-s ") && of(cache.rx).contains(" r-xs "), "{maps}");
        // What perf takes for anonymous (tools/perf, is_anon_memory).
        assert!(of(cache.rx).contains("/dev/zero"), "{maps}");
    }
}

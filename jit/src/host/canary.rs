//! Canary pages around every mapping of this process: accesses that leave a mapping by less than a page read a pattern
//! that cannot be mistaken, or leave a trace.
//!
//! Invariant: each page is mapped where nothing was (MAP_FIXED_NOREPLACE) and belongs to [`Canaries`] alone.

use std::io;

const PAGE: u64 = 4096;
/// What the pages hold.
const PATTERN: u8 = 0xA7;

/// The pages, unmapped on drop.
pub struct Canaries {
    pages: Vec<*mut u8>,
}

/// One line of `/proc/self/maps`.
#[derive(Clone, Debug)]
pub struct HostMapping {
    /// Its first byte.
    pub start: u64,
    /// The byte behind it.
    pub end: u64,
    /// The stack's, which grows.
    pub grows: bool,
}

/// What is mapped now.
pub fn host_mappings() -> io::Result<Vec<HostMapping>> {
    let text = std::fs::read_to_string("/proc/self/maps")?;
    let parse = |line: &str| {
        let (start, rest) = line.split_once('-')?;
        let (end, rest) = rest.split_once(' ')?;
        let [start, end] = [start, end].map(|n| u64::from_str_radix(n, 16));
        // The kernel's vsyscall page is no mapping of ours.
        let ours = !rest.contains("[vsyscall]");
        Some(HostMapping { start: start.ok()?, end: end.ok()?, grows: rest.contains("[stack]") })
            .filter(|_| ours)
    };
    Ok(text.lines().filter_map(parse).collect())
}

impl Canaries {
    /// Puts a page before and behind every mapping that has room there.
    pub fn new() -> io::Result<Canaries> {
        let mut canaries = Canaries { pages: Vec::new() };
        for mapping in host_mappings()? {
            for at in [mapping.start.wrapping_sub(PAGE), mapping.end] {
                if !mapping.grows && at != 0 {
                    canaries.pages.extend(page_at(at));
                }
            }
        }
        Ok(canaries)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Addresses of bytes that somebody changed.
    pub fn hurt(&self) -> Vec<u64> {
        let changed = |&page: &*mut u8| {
            // SAFETY: our own page, which nobody else knows.
            let bytes = unsafe { std::slice::from_raw_parts(page, PAGE as usize) };
            bytes.iter().position(|&b| b != PATTERN).map(|at| page as u64 + at as u64)
        };
        self.pages.iter().filter_map(changed).collect()
    }
}

/// A page of the pattern at `at`, if nothing is there.
fn page_at(at: u64) -> Option<*mut u8> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: NOREPLACE: no existing mapping is touched; the page is filled while it is ours alone.
    unsafe {
        let page = libc::mmap(at as *mut _, PAGE as usize, protection, flags, -1, 0);
        if page == libc::MAP_FAILED {
            return None;
        }
        page.cast::<u8>().write_bytes(PATTERN, PAGE as usize);
        Some(page.cast())
    }
}

impl Drop for Canaries {
    fn drop(&mut self) {
        for &page in &self.pages {
            // SAFETY: ours, and nothing refers to it.
            unsafe { libc::munmap(page.cast(), PAGE as usize) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canaries_notice_a_write_next_to_a_mapping() {
        let canaries = Canaries::new().unwrap();
        assert!(canaries.len() > 4, "{}", canaries.len());
        assert!(canaries.hurt().is_empty());
        let page = canaries.pages[3];
        // SAFETY: the page is mapped; this is the access that the canary is there for.
        unsafe { page.add(4095).write_volatile(1) };
        assert_eq!(canaries.hurt(), [page as u64 + 4095]);
    }
}

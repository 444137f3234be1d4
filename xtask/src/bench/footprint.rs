//! Host memory that a machine needs beside its guest's RAM (proc(5), `smaps` and `status`). Memory mapped twice, as code
//! caches are, counts once: `Pss` divides it among its mappings.

use std::fs;

/// What lies on top of guest RAM in its mapping at most: ROMs and the like.
const OVERLAYS: u64 = 128 << 20;

/// Resident bytes of a process without the mapping that holds `ram` bytes of guest RAM, page tables included.
pub fn beyond_ram(pid: u32, ram: u64) -> Option<u64> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let tables = status.lines().find_map(|line| kilobytes(line, "VmPTE:"))?;
    Some(resident(&smaps, ram) + tables)
}

/// The name of the memory that paravane maps as guest RAM, some pages of it more than once.
const GUEST: &str = "/memfd:guest-memory";

/// Resident bytes in all mappings but guest RAM's.
fn resident(smaps: &str, ram: u64) -> u64 {
    let (mut sum, mut counts, mut guest) = (0, true, false);
    for line in smaps.lines() {
        if line.split(' ').next().is_some_and(|range| range.contains('-')) {
            guest = line.contains(GUEST);
        } else if let Some(size) = kilobytes(line, "Size:") {
            counts = !guest && !(ram..=ram + OVERLAYS).contains(&size);
        } else if let Some(bytes) = kilobytes(line, "Pss:").filter(|_| counts) {
            sum += bytes;
        }
    }
    sum
}

/// `NAME   12 kB` in bytes.
fn kilobytes(line: &str, name: &str) -> Option<u64> {
    let number = line.strip_prefix(name)?.trim().strip_suffix(" kB")?;
    Some(number.parse::<u64>().ok()? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_left_out() {
        let smaps = "7f00-7f01 rw-p 0 00:00 0\nSize:   589824 kB\nKernelPageSize:   4 kB\nRss:   100000 kB\nPss:   100000 kB\n\
                     7f02-7f03 rw-p 0 00:00 0\nSize: 4294967296 kB\nRss:    80 kB\nPss:   40 kB\n\
                     7f03-7f04 rw-s 0 00:01 9 /memfd:guest-memory (deleted)\nSize:   4 kB\nRss:   4 kB\nPss:   2 kB\n\
                     7f04-7f05 r-xp 0 00:00 0 /bin/x\nSize:   12 kB\nRss:   8 kB\nPss:   8 kB\n";
        assert_eq!(resident(smaps, 512 << 20), 48 << 10);
        assert_eq!(resident(smaps, 8 << 30), 100_048 << 10, "no mapping has the size of RAM");
    }

    #[test]
    fn our_own_memory() {
        let before = beyond_ram(std::process::id(), 512 << 20).expect("proc");
        let touched = std::hint::black_box(vec![1_u8; 64 << 20]);
        let after = beyond_ram(std::process::id(), 512 << 20).expect("proc");
        assert!(after > before + (48 << 20), "{before} {after} {}", touched.len());
    }
}

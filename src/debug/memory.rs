//! Guest memory as a debugger sees it: through the page tables as they are, or physical; nothing is disturbed. Device registers
//! are not read: most change by being looked at.

use paravane_cpu::{CpuState, LinAddr, peek};
use paravane_memory::{GuestMemory, Mapped, PAGE_SIZE, PhysAddr, RamOffset};

/// Where the byte at `at` is backed, and how many bytes up to the end of its page.
fn place(cpu: &CpuState, mem: &GuestMemory, at: u64, physical: bool) -> Option<(RamOffset, usize)> {
    let phys = if physical { PhysAddr(at) } else { peek(cpu, mem, LinAddr(at)).phys()? };
    let (Mapped::Ram(page) | Mapped::Rom(page)) = mem.resolve(phys.page()) else { return None };
    Some((RamOffset(page.0 + phys.page_offset()), (PAGE_SIZE - phys.page_offset()) as usize))
}

/// Reads at `at`; the bytes read before the first that cannot be.
pub fn read(cpu: &CpuState, mem: &GuestMemory, at: u64, buf: &mut [u8], physical: bool) -> usize {
    let mut done = 0;
    while done < buf.len() {
        let Some((from, room)) = place(cpu, mem, at.wrapping_add(done as u64), physical) else { break };
        let n = room.min(buf.len() - done);
        mem.ram_read(from, &mut buf[done..done + n]);
        done += n;
    }
    done
}

/// Writes at `at`, whatever the page tables allow the guest; nothing is written if any byte has no memory behind it.
pub fn write(cpu: &CpuState, mem: &GuestMemory, at: u64, data: &[u8], physical: bool) -> bool {
    let mut parts = Vec::new();
    let mut done = 0;
    while done < data.len() {
        let Some((to, room)) = place(cpu, mem, at.wrapping_add(done as u64), physical) else { return false };
        let n = room.min(data.len() - done);
        parts.push((to, done..done + n));
        done += n;
    }
    for (to, range) in parts {
        mem.ram_write(to, &data[range.clone()]);
        mem.wrote(to, range.len() as u64);
    }
    true
}

/// The little-endian value of `size` bytes at linear `at`.
pub fn value(cpu: &CpuState, mem: &GuestMemory, at: u64, size: usize) -> Option<u64> {
    let mut buf = [0; 8];
    (read(cpu, mem, at, &mut buf[..size], false) == size).then(|| u64::from_le_bytes(buf))
}

#[cfg(test)]
mod tests {
    use super::*;
    use paravane_memory::MemoryConfig;

    #[test]
    fn reads_end_where_memory_does_and_writes_are_whole() {
        let mem = GuestMemory::new(MemoryConfig::pc(2 << 20)).expect("memory");
        let cpu = CpuState::reset(0);
        let mut buf = [0; 16];
        assert_eq!(read(&cpu, &mem, (2 << 20) - 4, &mut buf, false), 4);
        assert_eq!(read(&cpu, &mem, 0xFEC0_0000, &mut buf, true), 0);
        assert!(!write(&cpu, &mem, (2 << 20) - 4, &[1; 8], false));
        assert_eq!(mem.read_u32(PhysAddr((2 << 20) - 4)), Ok(0));
        assert!(write(&cpu, &mem, 0xFFE, &[1, 2, 3, 4], false));
        assert_eq!(value(&cpu, &mem, 0xFFE, 4), Some(0x0403_0201));
    }
}

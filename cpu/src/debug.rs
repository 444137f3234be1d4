//! Debug registers: breakpoint matching (SDM 3B, 17.2).

use crate::state::{CpuState, LinAddr, cr4};
use paravane_memory::Port;

/// DR6 bits.
pub(crate) mod dr6 {
    pub const BD: u64 = 1 << 13;
    pub const BS: u64 = 1 << 14;
    pub const BT: u64 = 1 << 15;
    /// Bits that always read as one.
    pub const ONES: u64 = 0xFFFF_0FF0;
}

/// DR7 bits.
pub(crate) mod dr7 {
    /// Always one.
    pub const ONE: u64 = 1 << 10;
    pub const GD: u64 = 1 << 13;
    /// The local enables.
    pub const LOCAL: u64 = 0x155;
}

/// IA32_DEBUGCTL bits.
pub(crate) mod debugctl {
    pub const LBR: u64 = 1 << 0;
    pub const BTF: u64 = 1 << 1;
}

fn enabled(cpu: &CpuState, i: usize) -> bool {
    cpu.dr[7] >> (2 * i) & 3 != 0
}

fn kind(cpu: &CpuState, i: usize) -> u64 {
    cpu.dr[7] >> (16 + 4 * i) & 3
}

fn len(cpu: &CpuState, i: usize) -> u64 {
    match cpu.dr[7] >> (18 + 4 * i) & 3 {
        0 => 1,
        1 => 2,
        2 => 8,
        _ => 4,
    }
}

/// Breakpoints of `kinds` that overlap `size` bytes at `at`, as DR6 bits.
fn hits(cpu: &CpuState, at: u64, size: u64, kinds: &[u64]) -> u64 {
    (0..4)
        .filter(|&i| enabled(cpu, i) && kinds.contains(&kind(cpu, i)))
        .filter(|&i| {
            let n = len(cpu, i);
            let start = cpu.dr[i] & !(n - 1);
            start < at.saturating_add(size) && at < start.saturating_add(n)
        })
        .fold(0, |bits, i| bits | 1 << i)
}

/// Data breakpoints hit by an access.
#[cold]
pub(crate) fn data_hits(cpu: &CpuState, lin: LinAddr, size: u64, write: bool) -> u64 {
    hits(cpu, lin.0, size, if write { &[1, 3] } else { &[3] })
}

/// I/O breakpoints hit by an access.
pub(crate) fn io_hits(cpu: &CpuState, port: Port, size: u64) -> u64 {
    if cpu.dr[7] & 0xFF == 0 || cpu.cr4 & cr4::DE == 0 {
        return 0;
    }
    hits(cpu, u64::from(port.0), size, &[2])
}

/// Instruction breakpoints at `lin`.
#[cold]
pub(crate) fn fetch_hits(cpu: &CpuState, lin: LinAddr) -> u64 {
    (0..4)
        .filter(|&i| enabled(cpu, i) && kind(cpu, i) == 0 && cpu.dr[i] == lin.0)
        .fold(0, |bits, i| bits | 1 << i)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_breakpoints_match_by_kind_and_overlap() {
        let mut cpu = CpuState::reset(0);
        cpu.dr[0] = 0x1000;
        cpu.dr[1] = 0x2000;
        // L0, G1; DR0 writes of 4 bytes, DR1 reads and writes of 2 bytes.
        cpu.dr[7] = 0x400 | 1 | 8 | (0b1101 << 16) | (0b0111 << 20);
        assert_eq!(data_hits(&cpu, LinAddr(0x1003), 1, true), 1);
        assert_eq!(data_hits(&cpu, LinAddr(0x1004), 4, true), 0);
        assert_eq!(data_hits(&cpu, LinAddr(0x1000), 4, false), 0);
        assert_eq!(data_hits(&cpu, LinAddr(0x1FFF), 2, false), 2);
    }
}

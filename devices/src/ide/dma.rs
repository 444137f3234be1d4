//! Physical region descriptor tables (Programming Interface for Bus Master IDE Controller, section 1.2).

use crate::block::Segment;
use crate::dma::{DmaPurpose, DmaTap};
use paravane_memory::{GuestMemory, PhysAddr};

/// A table lies inside 64 KiB, eight bytes a descriptor.
const MAX_DESCRIPTORS: u64 = 8192;
const END_OF_TABLE: u32 = 1 << 31;

/// How a table's regions compare with a command's data.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fit {
    /// All data and no more.
    Exact,
    /// The table goes on behind the data.
    Longer,
    /// The table ends first, or is not in memory.
    Short,
}

/// Reads the table at `table` into `segments` until `bytes` are covered, and tells `tap` of what was read.
pub(super) fn regions(
    memory: &GuestMemory,
    tap: &DmaTap,
    table: u32,
    bytes: u64,
    segments: &mut Vec<Segment>,
) -> Fit {
    let fit = read(memory, table, bytes, segments);
    tap.read(DmaPurpose::Prd, PhysAddr(u64::from(table & !3)), segments.len() as u64 * 8);
    fit
}

fn read(memory: &GuestMemory, table: u32, bytes: u64, segments: &mut Vec<Segment>) -> Fit {
    segments.clear();
    let mut left = bytes;
    for i in 0..MAX_DESCRIPTORS {
        let Ok(raw) = memory.read_u64(PhysAddr(u64::from(table & !3) + i * 8)) else { return Fit::Short };
        let (base, word) = (raw as u32 & !1, (raw >> 32) as u32);
        let count = u64::from(word & 0xFFFE);
        let count = if count == 0 { 0x1_0000 } else { count };
        let n = count.min(left);
        segments.push(Segment { at: PhysAddr(u64::from(base)), len: n });
        left -= n;
        let last = word & END_OF_TABLE != 0;
        if left == 0 {
            return if last && n == count { Fit::Exact } else { Fit::Longer };
        }
        if last {
            return Fit::Short;
        }
    }
    Fit::Short
}

//! Locked accesses that cross a cache line (split locks) on hosts that punish them.

use crate::addr::RamOffset;
use crate::backing::Backing;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

/// Bytes of a cache line.
const LINE: u64 = 64;

/// Whether a split lock may cost milliseconds here. Processors that report them (SDM 3A, 8.1.2.3: exceptions for split locks or
/// bus locks) let the operating system punish them: Linux makes the thread sleep, hypervisors throttle bus locks; 118 ms each
/// have been measured.
pub fn split_locks_are_dear() -> bool {
    static DEAR: OnceLock<bool> = OnceLock::new();
    *DEAR.get_or_init(|| {
        let features = __cpuid_count(7, 0);
        // Bus-lock detection; IA32_CORE_CAPABILITIES, which has split-lock detection.
        features.ecx >> 24 & 1 != 0 || features.edx >> 30 & 1 != 0
    })
}

/// Whether `size` bytes at `at`, an address or an offset from a line's beginning, lie on two lines.
pub fn crosses_line(at: u64, size: u64) -> bool {
    at % LINE + size > LINE
}

/// An operand on two cache lines, as part of the two aligned words at the lines' common end.
pub(crate) struct Split {
    words: [RamOffset; 2],
    /// Bits before the operand.
    shift: u32,
    /// The operand's bits.
    mask: u128,
}

impl Split {
    /// The `size` bytes at `at`, of which some lie on each line.
    pub(crate) fn new(at: RamOffset, size: usize) -> Split {
        assert!(size <= 8 && crosses_line(at.0, size as u64), "{size} bytes at {at:?} do not cross a line");
        let end = at.0.next_multiple_of(LINE);
        let shift = 8 * (at.0 - (end - 8)) as u32;
        let mask = (u128::MAX >> (128 - 8 * size)) << shift;
        Split { words: [RamOffset(end - 8), RamOffset(end)], shift, mask }
    }

    /// One try; `None` if others were faster.
    pub(crate) fn try_update(&self, backing: &Backing, update: &mut dyn FnMut(u64) -> u64) -> Option<u64> {
        let [low, high] = self.words;
        let was = [backing.load(low, 8), backing.load(high, 8)];
        let both = u128::from(was[1]) << 64 | u128::from(was[0]);
        let old = ((both & self.mask) >> self.shift) as u64;
        let new = both & !self.mask | u128::from(update(old)) << self.shift & self.mask;
        let now = [new as u64, (new >> 64) as u64];
        let exchange = |at, was, now| was == now || backing.compare_exchange(at, 8, was, now).is_ok();
        if !exchange(low, was[0], now[0]) {
            return None;
        }
        if exchange(high, was[1], now[1]) {
            return Some(old);
        }
        self.take_back(backing, was[0], now[0]);
        None
    }

    /// Undoes the first half of an update, unless others wrote over it meanwhile.
    fn take_back(&self, backing: &Backing, was: u64, now: u64) {
        let (at, ours) = (self.words[0], self.mask as u64);
        let mut seen = now;
        while (seen ^ now) & ours == 0 {
            match backing.compare_exchange(at, 8, seen, seen & !ours | was & ours) {
                Ok(_) => return,
                Err(other) => seen = other,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Split, crosses_line};
    use crate::addr::RamOffset;
    use crate::backing::Backing;
    use crate::{GuestMemory, MemoryConfig};

    #[test]
    fn a_split_operand_is_replaced_and_nothing_beside_it() {
        let mem = GuestMemory::new(MemoryConfig::pc(1 << 20)).expect("memory");
        for (size, first) in [(2, 1), (4, 1), (4, 3), (8, 1), (8, 5), (8, 7)] {
            let at = RamOffset(128 - first);
            mem.ram_fill(RamOffset(64), 0x55, 128);
            mem.ram_store(at, size, 0x8877_6655_4433_2211);
            let old = mem.ram_update_split(at, size, &mut |old| old.wrapping_add(u64::MAX / 255));
            let kept = u64::MAX >> (64 - 8 * size);
            assert_eq!(old, 0x8877_6655_4433_2211 & kept, "{size} bytes, {first} before the end");
            assert_eq!(mem.ram_load(at, size), 0x8978_6756_4534_2312 & kept);
            let beside =
                [mem.ram_load(RamOffset(at.0 - 1), 1), mem.ram_load(RamOffset(at.0 + size as u64), 1)];
            assert_eq!(beside, [0x55; 2]);
        }
    }

    #[test]
    fn what_others_write_over_half_an_update_stays() {
        let mem = Backing::new(1 << 20).expect("memory");
        let (at, high) = (RamOffset(62), RamOffset(64));
        let split = Split::new(at, 4);
        // The second line changes under the update: nothing of the update is left.
        mem.store(at, 4, 0x4444_3333);
        let mut others = |old: u64| {
            mem.store(high, 2, 0x7777);
            old ^ 0x1111_1111
        };
        assert_eq!(split.try_update(&mem, &mut others), None);
        assert_eq!(mem.load(at, 4), 0x7777_3333);
        // It does not change: it is not written, whoever writes there.
        assert_eq!(split.try_update(&mem, &mut |old| old ^ 0x22), Some(0x7777_3333));
        assert_eq!(mem.load(at, 4), 0x7777_3311);
    }

    #[test]
    fn lines_are_crossed_by_what_begins_in_one_and_ends_in_the_next() {
        assert_eq!([(0, 64), (60, 4), (56, 8)].map(|(at, size)| crosses_line(at, size)), [false; 3]);
        assert_eq!([(61, 4), (4095, 2), (57, 8)].map(|(at, size)| crosses_line(at, size)), [true; 3]);
    }
}

//! Segmentation outside 64-bit code (SDM 3A, chapter 3): what translated code takes for granted about the segment registers
//! ([`mode_bits`]), what it looks up in the context ([`Bounds`]), and the code segments that blocks belong to.
//!
//! Blocks are found by *code address*. In 64-bit code that is the linear address. Elsewhere the low half is the linear
//! address and the high half the number of the code segment's base and limit in [`CodeSegments`]: offsets,
//! and with them return addresses, wrap-around and limits, depend on these. The flat segment has number 0.

use crate::block::Mode;
use hashbrown::HashMap;
use paravane_cpu::{CpuState, SegReg, Segment, attr};

/// Segment registers by number.
const ALL: [SegReg; 6] = [SegReg::Es, SegReg::Cs, SegReg::Ss, SegReg::Ds, SegReg::Fs, SegReg::Gs];

fn is_expand_down(s: &Segment) -> bool {
    s.present() && s.attributes & (attr::CODE | attr::CONFORM_EXPAND) == attr::CONFORM_EXPAND
}

fn is_writable(s: &Segment, protected: bool) -> bool {
    s.present() && (!protected || s.attributes & (attr::CODE | attr::READ_WRITE) == attr::READ_WRITE)
}

fn is_readable(s: &Segment, protected: bool) -> bool {
    s.present() && (!protected || s.attributes & (attr::CODE | attr::READ_WRITE) != attr::CODE)
}

/// Whether loading a selector in real mode, or in virtual-8086 mode under protection, changes nothing of data segment `s`
/// but selector and base (SDM 3B, 21.1 and 21.2).
fn is_reloadable(s: &Segment, protected: bool) -> bool {
    const DATA: u16 = attr::P | attr::S | attr::READ_WRITE | attr::ACCESSED;
    if protected {
        s.attributes == DATA | 3 << attr::DPL_SHIFT && s.limit == 0xFFFF
    } else {
        s.attributes & !(attr::DB | attr::G) == DATA
    }
}

/// Offsets at which a segment may be accessed: from `lower` to below `read_end` or `write_end`. What is not readable, not
/// writable or not present ends at 0.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Bounds {
    pub(crate) lower: u64,
    pub(crate) read_end: u64,
    pub(crate) write_end: u64,
}

impl Bounds {
    /// Of segment `s`; `protected` is CR0.PE.
    pub(crate) fn new(s: &Segment, protected: bool) -> Bounds {
        let beyond = u64::from(s.limit) + 1;
        let (lower, end) = match is_expand_down(s) {
            true => (beyond, if s.big() { 1 << 32 } else { 1 << 16 }),
            false => (0, beyond),
        };
        let end_if = |allowed: bool| if allowed { end } else { 0 };
        Bounds {
            lower,
            read_end: end_if(is_readable(s, protected)),
            write_end: end_if(is_writable(s, protected)),
        }
    }
}

/// The [`Mode`] bits about segments, of a processor outside 64-bit mode.
pub(crate) fn mode_bits(cpu: &CpuState) -> u32 {
    let protected = cpu.protected();
    let legacy = !protected || cpu.v8086();
    let code32 = cpu.code_bits() == 32;
    let mut bits = if code32 { Mode::CODE32 } else { Mode::CODE16 };
    let whole = |s: &Segment| s.limit == u32::MAX && is_writable(s, protected) && !is_expand_down(s);
    let flat = |r: SegReg| cpu.segment(r).base == 0 && whole(cpu.segment(r));
    let stack32 = cpu.segment(SegReg::Ss).big();
    if code32 && stack32 && [SegReg::Ss, SegReg::Ds, SegReg::Es].into_iter().all(flat) {
        for r in [SegReg::Fs, SegReg::Gs] {
            bits |= if whole(cpu.segment(r)) { Mode::plain(r as u8) } else { 0 };
        }
    } else {
        bits |= Mode::SEGMENTED;
        bits |= if stack32 { 0 } else { Mode::STACK16 };
        let holds_64k = |s: &Segment| {
            s.limit >= 0xFFFF && s.base & 0xF == 0 && is_writable(s, protected) && !is_expand_down(s)
        };
        for r in ALL {
            let s = cpu.segment(r);
            // On page-aligned bases, what wraps at 4 GiB crosses a page, and leaves the fast path.
            let plain = if code32 { whole(s) && s.base & 0xFFF == 0 } else { holds_64k(s) };
            let plain = plain && (!legacy || r == SegReg::Cs || is_reloadable(s, protected));
            bits |= if plain { Mode::plain(r as u8) } else { 0 };
        }
    }
    if cpu.seg.iter().any(is_expand_down) {
        bits |= Mode::EXPAND_DOWN;
    }
    if legacy {
        bits |= Mode::LEGACY;
    }
    bits
}

/// What blocks depend on in the code segment beside its size.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct CodeSegment {
    pub(crate) base: u32,
    pub(crate) limit: u32,
}

impl CodeSegment {
    const FLAT: CodeSegment = CodeSegment { base: 0, limit: u32::MAX };

    /// CS of `cpu`, which is not in 64-bit mode.
    pub(crate) fn of(cpu: &CpuState) -> CodeSegment {
        let s = cpu.segment(SegReg::Cs);
        CodeSegment { base: s.base as u32, limit: s.limit }
    }
}

/// Code segments known at a time; the guest decides how many it uses.
const MAX_SEGMENTS: usize = 8192;

/// Numbers of code segments.
pub(crate) struct CodeSegments {
    list: Vec<CodeSegment>,
    numbers: HashMap<CodeSegment, u32>,
    last: (CodeSegment, u32),
}

impl CodeSegments {
    /// Only the flat one.
    pub(crate) fn new() -> CodeSegments {
        let flat = CodeSegment::FLAT;
        CodeSegments { list: vec![flat], numbers: HashMap::from([(flat, 0)]), last: (flat, 0) }
    }

    /// The number of `segment`; `None` if there is no room for it.
    pub(crate) fn number(&mut self, segment: CodeSegment) -> Option<u32> {
        if self.last.0 == segment {
            return Some(self.last.1);
        }
        let next = self.list.len() as u32;
        let number = match self.numbers.get(&segment) {
            Some(&n) => n,
            None if self.list.len() >= MAX_SEGMENTS => return None,
            None => {
                self.list.push(segment);
                self.numbers.insert(segment, next);
                next
            }
        };
        self.last = (segment, number);
        Some(number)
    }

    /// The segment that code address `at`, which is not of 64-bit code, belongs to.
    pub(crate) fn of(&self, at: u64) -> CodeSegment {
        self.list.get((at >> 32) as usize).copied().unwrap_or(CodeSegment::FLAT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_by_type() {
        let data = Segment { base: 0, limit: 0xFFF, attributes: 0x93, selector: 8 };
        let of = |attributes: u16, protected: bool| {
            let b = Bounds::new(&Segment { attributes, ..data }, protected);
            (b.lower, b.read_end, b.write_end)
        };
        assert_eq!(of(0x93, true), (0, 0x1000, 0x1000));
        assert_eq!(of(0x91, true), (0, 0x1000, 0));
        assert_eq!(of(0x91, false), (0, 0x1000, 0x1000));
        assert_eq!(of(0x97, true), (0x1000, 1 << 16, 1 << 16));
        assert_eq!(of(0x97 | attr::DB, true), (0x1000, 1 << 32, 1 << 32));
        assert_eq!(of(0x9B, true), (0, 0x1000, 0), "readable code");
        assert_eq!(of(0x99, true), (0, 0, 0), "code that is not readable");
        assert_eq!(of(0x13, true), (0, 0, 0), "not present");
    }

    #[test]
    fn code_segments_are_numbered_and_bounded() {
        let mut c = CodeSegments::new();
        assert_eq!(c.number(CodeSegment::FLAT), Some(0));
        let real = CodeSegment { base: 0xF_0000, limit: 0xFFFF };
        assert_eq!(
            (c.number(real), c.number(CodeSegment::FLAT), c.number(real)),
            (Some(1), Some(0), Some(1))
        );
        assert_eq!(c.of(1 << 32 | 0xF_1234), real);
        let taken =
            (0..1 << 16).filter(|&i| c.number(CodeSegment { base: i << 4, limit: 1 }).is_some()).count();
        assert_eq!(taken, MAX_SEGMENTS - 2);
    }
}

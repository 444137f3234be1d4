//! Shifts and rotates (SDM 2B, RCL/RCR/ROL/ROR, SAL/SAR/SHL/SHR, SHLD, SHRD).
//!
//! Pure functions of the operand, the count already masked to 5 or 6 bits and the old status flags. A masked count
//! of zero changes nothing, flags included. OF for counts above one and AF are undefined;
//! [`undefined`](super::undefined) has the last word.

use super::alu::{mask, sign_extend, szp, top, when};
use crate::cpuid::HostVendor;
use crate::state::flags::{CF, OF};

/// Masks a shift count: 6 bits for 64-bit operands, 5 otherwise.
#[inline(always)]
pub(super) const fn count(raw: u64, size: usize) -> u32 {
    (raw & if size == 8 { 63 } else { 31 }) as u32
}

#[inline(always)]
const fn bit(v: u64, n: u32) -> u64 {
    if n < 64 { (v >> n) & 1 } else { 0 }
}

/// SHL/SAL.
#[inline(always)]
pub(super) const fn shl(v: u64, n: u32, old: u64, size: usize) -> (u64, u64) {
    if n == 0 {
        return (v, old);
    }
    let bits = 8 * size as u32;
    let r = (v << n) & mask(size);
    let cf = if n <= bits { bit(v, bits - n) } else { 0 };
    (r, szp(r, size) | cf | (bit(r, top(size)) ^ cf) << 11)
}

/// SHR; OF is the operand's sign bit.
#[inline(always)]
pub(super) const fn shr(v: u64, n: u32, old: u64, size: usize) -> (u64, u64) {
    if n == 0 {
        return (v, old);
    }
    let r = v >> n;
    (r, szp(r, size) | bit(v, n - 1) | bit(v, top(size)) << 11)
}

/// SAR; OF is cleared.
#[inline(always)]
pub(super) const fn sar(v: u64, n: u32, old: u64, size: usize) -> (u64, u64) {
    if n == 0 {
        return (v, old);
    }
    let wide = sign_extend(v, size) as i64;
    let r = (wide >> n) as u64 & mask(size);
    (r, szp(r, size) | (wide >> (n - 1)) as u64 & 1)
}

/// ROL: only CF and OF change.
pub(super) const fn rol(v: u64, n: u32, old: u64, size: usize) -> (u64, u64) {
    if n == 0 {
        return (v, old);
    }
    let bits = 8 * size as u32;
    let n = n % bits;
    let r = if n == 0 { v } else { ((v << n) | (v >> (bits - n))) & mask(size) };
    let cf = r & 1;
    (r, (old & !(CF | OF)) | cf | (bit(r, top(size)) ^ cf) << 11)
}

/// ROR: only CF and OF change.
pub(super) const fn ror(v: u64, n: u32, old: u64, size: usize) -> (u64, u64) {
    if n == 0 {
        return (v, old);
    }
    let bits = 8 * size as u32;
    let n = n % bits;
    let r = if n == 0 { v } else { ((v >> n) | (v << (bits - n))) & mask(size) };
    let cf = bit(r, top(size));
    (r, (old & !(CF | OF)) | cf | (cf ^ bit(r, top(size) - 1)) << 11)
}

/// RCL: a rotate through CF, over one bit more than the operand.
pub(super) const fn rcl(v: u64, n: u32, old: u64, size: usize) -> (u64, u64) {
    if n == 0 {
        return (v, old);
    }
    let bits = 8 * size as u32;
    let n = n % (bits + 1);
    let wide = (((old & CF) as u128) << bits) | v as u128;
    let turned = if n == 0 { wide } else { (wide << n) | (wide >> (bits + 1 - n)) };
    let r = turned as u64 & mask(size);
    let cf = (turned >> bits) as u64 & 1;
    (r, (old & !(CF | OF)) | cf | (bit(r, top(size)) ^ cf) << 11)
}

/// RCR.
pub(super) const fn rcr(v: u64, n: u32, old: u64, size: usize) -> (u64, u64) {
    if n == 0 {
        return (v, old);
    }
    let bits = 8 * size as u32;
    let n = n % (bits + 1);
    let wide = (((old & CF) as u128) << bits) | v as u128;
    let turned = if n == 0 { wide } else { (wide >> n) | (wide << (bits + 1 - n)) };
    let r = turned as u64 & mask(size);
    let cf = (turned >> bits) as u64 & 1;
    (r, (old & !(CF | OF)) | cf | (bit(r, top(size)) ^ bit(r, top(size) - 1)) << 11)
}

/// SHLD. For 16-bit operands and counts above 16 (undefined) the destination's bits follow the source's; on processors of
/// AMD's, the source's once more.
pub(super) const fn shld(v: u64, fill: u64, n: u32, old: u64, size: usize, host: HostVendor) -> (u64, u64) {
    if n == 0 {
        return (v, old);
    }
    let bits = 8 * size as u32;
    let (r, cf) = if size == 2 {
        let last = if matches!(host, HostVendor::Amd) { fill & 0xFFFF } else { v };
        let all = (v << 32) | ((fill & 0xFFFF) << 16) | last;
        ((all >> (32 - n)) & 0xFFFF, bit(all, 48 - n))
    } else {
        (((v << n) | (fill >> (bits - n))) & mask(size), bit(v, bits - n))
    };
    let of = bit(v, top(size)) ^ bit(v, top(size) - 1);
    (r, szp(r, size) | cf | when(of != 0, OF))
}

/// SHRD, with the same choice for 16-bit operands.
pub(super) const fn shrd(v: u64, fill: u64, n: u32, old: u64, size: usize, host: HostVendor) -> (u64, u64) {
    if n == 0 {
        return (v, old);
    }
    let bits = 8 * size as u32;
    let (r, cf) = if size == 2 {
        let last = if matches!(host, HostVendor::Amd) { fill & 0xFFFF } else { v };
        let all = (last << 32) | ((fill & 0xFFFF) << 16) | v;
        ((all >> n) & 0xFFFF, bit(all, n - 1))
    } else {
        (((v >> n) | (fill << (bits - n))) & mask(size), bit(v, n - 1))
    };
    let of = bit(v, top(size)) ^ (fill & 1);
    (r, szp(r, size) | cf | when(of != 0, OF))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::flags::{PF, SF, ZF};

    /// One bit at a time, as the manual's pseudo code does.
    fn step(mut v: u64, n: u32, mut f: u64, size: usize, left: bool, through: bool) -> (u64, u64) {
        for _ in 0..n {
            let out = if left { (v >> top(size)) & 1 } else { v & 1 };
            let fed = if through { f & CF } else { out };
            v = if left { ((v << 1) | fed) & mask(size) } else { (v >> 1) | (fed << top(size)) };
            f = (f & !CF) | out;
        }
        (v, f & CF)
    }

    #[test]
    fn rotates_agree_with_single_bit_steps() {
        for size in [1, 2, 4, 8] {
            for v in [0u64, 1, 0x8000_0000_0000_0080, 0xA5A5_5A5A_1234_8765] {
                for n in 1..=count(u64::MAX, size) {
                    for f in [0, CF] {
                        let v = v & mask(size);
                        for (got, left, through) in [
                            (rol(v, n, f, size), true, false),
                            (ror(v, n, f, size), false, false),
                            (rcl(v, n, f, size), true, true),
                            (rcr(v, n, f, size), false, true),
                        ] {
                            let want = step(v, n, f, size, left, through);
                            assert_eq!((got.0, got.1 & CF), want, "{v:#x} {n} {f} {size} {left} {through}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn shifts_of_the_manual() {
        assert_eq!(shl(0x81, 1, 0, 1), (0x02, CF | OF));
        assert_eq!(shl(0x80, 8, 0, 1), (0, ZF | PF));
        assert_eq!(shr(0x81, 1, 0, 1), (0x40, CF | OF));
        assert_eq!(sar(0x81, 1, 0, 1), (0xC0, SF | PF | CF));
        assert_eq!(sar(0x80, 31, 0, 1), (0xFF, SF | PF | CF));
        assert_eq!(shl(5, 0, ZF | CF, 4), (5, ZF | CF));
    }

    #[test]
    fn double_shifts() {
        const INTEL: HostVendor = HostVendor::Intel;
        assert_eq!(shld(0x1234_5678, 0x9ABC_DEF0, 8, 0, 4, INTEL).0, 0x3456_789A);
        assert_eq!(shrd(0x1234_5678, 0x9ABC_DEF0, 8, 0, 4, INTEL).0, 0xF012_3456);
        assert_eq!(shld(1, 0, 63, 0, 8, INTEL).0, 1 << 63);
        // Counts above 16: Sapphire Rapids, Zen 5.
        assert_eq!(shld(0xD962, 0x5250, 20, 0, 2, INTEL).0, 0x250D);
        assert_eq!(shrd(0x4F5F, 0xAA01, 21, 0, 2, INTEL).0, 0xFD50);
        assert_eq!(shld(0xD962, 0x5250, 20, 0, 2, HostVendor::Amd).0, 0x2505);
        assert_eq!(shrd(0x4F5F, 0xAA01, 21, 0, 2, HostVendor::Amd).0, 0x0D50);
    }
}

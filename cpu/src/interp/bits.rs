//! Bit counting, extraction and scattering, CRC32 (SDM 2, BSF, BSR, TZCNT, LZCNT, POPCNT, BMI1, BMI2, CRC32).
//!
//! Pure functions; status flags out, undefined ones as Intel's cores leave them.

use super::alu::{mask, parity, top};
use crate::state::flags::{CF, PF, SF, ZF};

/// BSF: `None` leaves the destination alone.
pub(super) const fn bsf(v: u64) -> (Option<u64>, u64) {
    if v == 0 {
        return (None, ZF | PF);
    }
    let r = v.trailing_zeros() as u64;
    (Some(r), parity(r))
}

/// BSR: `None` leaves the destination alone.
pub(super) const fn bsr(v: u64) -> (Option<u64>, u64) {
    if v == 0 {
        return (None, ZF | PF);
    }
    let r = 63 - v.leading_zeros() as u64;
    (Some(r), parity(r))
}

/// TZCNT.
pub(super) const fn tzcnt(v: u64, size: usize) -> (u64, u64) {
    if v == 0 {
        return (8 * size as u64, CF);
    }
    let r = v.trailing_zeros() as u64;
    (r, ((r == 0) as u64) << 6)
}

/// LZCNT.
pub(super) const fn lzcnt(v: u64, size: usize) -> (u64, u64) {
    if v == 0 {
        return (8 * size as u64, CF);
    }
    let r = v.leading_zeros() as u64 - (64 - 8 * size as u64);
    (r, ((r == 0) as u64) << 6)
}

/// POPCNT.
pub(super) const fn popcnt(v: u64) -> (u64, u64) {
    (v.count_ones() as u64, ((v == 0) as u64) << 6)
}

/// SF and ZF; what every BMI1 instruction sets, PF and AF (undefined) cleared.
pub(super) const fn sz(r: u64, size: usize) -> u64 {
    ((r >> top(size)) & 1) << 7 | ((r == 0) as u64) << 6
}

/// BLSI.
pub(super) const fn blsi(v: u64, size: usize) -> (u64, u64) {
    let r = v & v.wrapping_neg();
    (r, sz(r, size) | (v != 0) as u64)
}

/// BLSMSK: ZF is cleared.
pub(super) const fn blsmsk(v: u64, size: usize) -> (u64, u64) {
    let r = (v ^ v.wrapping_sub(1)) & mask(size);
    (r, (sz(r, size) & SF) | (v == 0) as u64)
}

/// BLSR.
pub(super) const fn blsr(v: u64, size: usize) -> (u64, u64) {
    let r = v & v.wrapping_sub(1);
    (r, sz(r, size) | (v == 0) as u64)
}

/// BEXTR; SF (undefined) is cleared.
pub(super) const fn bextr(v: u64, control: u64) -> (u64, u64) {
    let (start, len) = (control as u8 as u32, (control >> 8) as u8 as u32);
    let shifted = if start < 64 { v >> start } else { 0 };
    let r = if len < 64 { shifted & !(u64::MAX << len) } else { shifted };
    (r, ((r == 0) as u64) << 6)
}

/// BZHI.
pub(super) const fn bzhi(v: u64, index: u64, size: usize) -> (u64, u64) {
    let n = index as u8 as u32;
    if n >= 8 * size as u32 {
        return (v, sz(v, size) | CF);
    }
    let r = v & !(u64::MAX << n);
    (r, sz(r, size))
}

/// PDEP: the low bits of `v` go where `m` has ones.
pub(super) const fn pdep(v: u64, mut m: u64) -> u64 {
    let (mut r, mut from) = (0, v);
    while m != 0 {
        let lowest = m & m.wrapping_neg();
        if from & 1 != 0 {
            r |= lowest;
        }
        from >>= 1;
        m ^= lowest;
    }
    r
}

/// PEXT: the bits of `v` where `m` has ones, gathered low.
pub(super) const fn pext(v: u64, mut m: u64) -> u64 {
    let (mut r, mut to) = (0, 1u64);
    while m != 0 {
        let lowest = m & m.wrapping_neg();
        if v & lowest != 0 {
            r |= to;
        }
        to = to.wrapping_shl(1);
        m ^= lowest;
    }
    r
}

/// CRC32 (polynomial 11EDC6F41H, bit-reflected) over `size` bytes of `v`.
pub(super) const fn crc32c(crc: u32, v: u64, size: usize) -> u32 {
    let mut r = crc;
    let mut i = 0;
    while i < size {
        r ^= (v >> (8 * i)) as u8 as u32;
        let mut k = 0;
        while k < 8 {
            r = (r >> 1) ^ (0x82F6_3B78 & (r & 1).wrapping_neg());
            k += 1;
        }
        i += 1;
    }
    r
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts() {
        assert_eq!(bsf(0x50), (Some(4), 0));
        assert_eq!(bsr(0x50), (Some(6), PF));
        assert_eq!(bsr(0).0, None);
        assert_eq!(tzcnt(0, 2), (16, CF));
        assert_eq!(lzcnt(1, 4), (31, 0));
        assert_eq!(lzcnt(0x8000, 2), (0, ZF));
        assert_eq!(popcnt(u64::MAX), (64, 0));
    }

    #[test]
    fn bmi_rows() {
        assert_eq!(blsi(0x58, 4), (8, CF));
        assert_eq!(blsr(0x58, 4), (0x50, 0));
        assert_eq!(blsr(0, 4), (0, ZF | CF));
        assert_eq!(blsmsk(0x58, 4), (0xF, 0));
        assert_eq!(blsmsk(0, 4), (0xFFFF_FFFF, SF | CF));
        assert_eq!(bextr(0x1234_5678, 0x0804).0, 0x67);
        assert_eq!(bextr(0x1234_5678, 0x0040), (0, ZF));
        assert_eq!(bzhi(0xFFFF_FFFF, 8, 4), (0xFF, 0));
        assert_eq!(bzhi(0xFFFF_FFFF, 32, 4), (0xFFFF_FFFF, SF | CF));
    }

    #[test]
    fn pdep_undoes_pext() {
        let (v, m) = (0xDEAD_BEEF_0123_4567, 0x00FF_F0F0_1111_8001);
        assert_eq!(pdep(pext(v, m), m), v & m);
        assert_eq!(pext(0xABCD, 0xF0F0), 0xAC);
        assert_eq!(pdep(0xAC, 0xF0F0), 0xA0C0);
        assert_eq!(pext(v, u64::MAX), v);
    }

    #[test]
    fn crc32c_check_value() {
        // RFC 3720, B.4: CRC32C of "123456789".
        let crc = b"123456789".iter().fold(u32::MAX, |c, &b| crc32c(c, u64::from(b), 1));
        assert_eq!(!crc, 0xE306_9283);
        let wide = crc32c(u32::MAX, u64::from_le_bytes(*b"12345678"), 8);
        assert_eq!(!crc32c(wide, u64::from(b'9'), 1), 0xE306_9283);
    }
}

//! Arithmetic and logic with exact status flags (SDM 1, section 3.4.3.1; SDM 2, each instruction's page).
//!
//! Pure functions: operands of `size` bytes in, result (truncated to `size`) and the six status flags out. Where
//! the manual leaves a flag undefined, [`undefined`](super::undefined) has the last word.

use crate::state::flags::{AF, CF, OF, PF, SF, ZF};

/// All ones over `size` bytes.
#[inline(always)]
pub(super) const fn mask(size: usize) -> u64 {
    u64::MAX >> (64 - 8 * size as u32)
}

/// Number of the most significant bit of `size` bytes.
#[inline(always)]
pub(super) const fn top(size: usize) -> u32 {
    8 * size as u32 - 1
}

/// Sign-extends `size` bytes.
#[inline(always)]
pub(super) const fn sign_extend(v: u64, size: usize) -> u64 {
    let s = 64 - 8 * size as u32;
    (((v << s) as i64) >> s) as u64
}

/// `flag` if `condition`.
#[inline(always)]
pub(super) const fn when(condition: bool, flag: u64) -> u64 {
    if condition { flag } else { 0 }
}

/// PF of the low byte of `r`.
#[inline(always)]
pub(super) const fn parity(r: u64) -> u64 {
    let nibble = (r ^ (r >> 4)) & 15;
    ((0x9669 >> nibble) & 1) << 2
}

/// SF, ZF and PF of a result already truncated to `size`.
#[inline(always)]
pub(super) const fn szp(r: u64, size: usize) -> u64 {
    ((r >> top(size)) & 1) << 7 | ((r == 0) as u64) << 6 | parity(r)
}

/// ADD and ADC.
#[inline(always)]
pub(super) const fn add(a: u64, b: u64, carry: u64, size: usize) -> (u64, u64) {
    let r = a.wrapping_add(b).wrapping_add(carry) & mask(size);
    let out = (a & b) | ((a | b) & !r);
    let cf = (out >> top(size)) & 1;
    let of = (((a ^ r) & (b ^ r)) >> top(size)) & 1;
    (r, cf | ((a ^ b ^ r) & AF) | szp(r, size) | of << 11)
}

/// SUB, SBB and CMP.
#[inline(always)]
pub(super) const fn sub(a: u64, b: u64, borrow: u64, size: usize) -> (u64, u64) {
    let r = a.wrapping_sub(b).wrapping_sub(borrow) & mask(size);
    let out = (!a & b) | ((!a | b) & r);
    let cf = (out >> top(size)) & 1;
    let of = (((a ^ b) & (a ^ r)) >> top(size)) & 1;
    (r, cf | ((a ^ b ^ r) & AF) | szp(r, size) | of << 11)
}

/// Flags of AND, OR, XOR and TEST; AF is undefined and cleared.
#[inline(always)]
pub(super) const fn logic(r: u64, size: usize) -> u64 {
    szp(r, size)
}

/// INC: CF is kept.
#[inline(always)]
pub(super) const fn inc(a: u64, old: u64, size: usize) -> (u64, u64) {
    let (r, f) = add(a, 1, 0, size);
    (r, (f & !CF) | (old & CF))
}

/// DEC: CF is kept.
#[inline(always)]
pub(super) const fn dec(a: u64, old: u64, size: usize) -> (u64, u64) {
    let (r, f) = sub(a, 1, 0, size);
    (r, (f & !CF) | (old & CF))
}

/// MUL: (low, high, flags). SF and PF (undefined) come from the low half, ZF and AF are cleared.
pub(super) const fn mul(a: u64, b: u64, size: usize) -> (u64, u64, u64) {
    let p = (a as u128) * (b as u128);
    let low = p as u64 & mask(size);
    let high = (p >> (8 * size)) as u64 & mask(size);
    (low, high, (szp(low, size) & !ZF) | when(high != 0, CF | OF))
}

/// IMUL: (low, high, flags), undefined flags as for MUL.
pub(super) const fn imul(a: u64, b: u64, size: usize) -> (u64, u64, u64) {
    let p = (sign_extend(a, size) as i64 as i128) * (sign_extend(b, size) as i64 as i128);
    let low = p as u64 & mask(size);
    let high = (p >> (8 * size)) as u64 & mask(size);
    let overflow = sign_extend(low, size) as i64 as i128 != p;
    (low, high, (szp(low, size) & !ZF) | when(overflow, CF | OF))
}

/// DIV: (quotient, remainder) of `high:low`, or `None` for `#DE`. Flags are undefined and kept.
pub(super) const fn div(low: u64, high: u64, divisor: u64, size: usize) -> Option<(u64, u64)> {
    if divisor == 0 || high >= divisor {
        return None;
    }
    if size < 8 || high == 0 {
        let n = if size < 8 { (high << (8 * size)) | low } else { low };
        return Some((n / divisor, n % divisor));
    }
    let n = (high as u128) << 64 | low as u128;
    let d = divisor as u128;
    Some(((n / d) as u64, (n % d) as u64))
}

/// IDIV: as [`div`], signed.
pub(super) const fn idiv(low: u64, high: u64, divisor: u64, size: usize) -> Option<(u64, u64)> {
    let bits = 8 * size as u32;
    let n = ((sign_extend(high, size) as i64 as i128) << bits) | (low & mask(size)) as i128;
    let d = sign_extend(divisor, size) as i64 as i128;
    if d == 0 {
        return None;
    }
    // `i128::MIN / -1` cannot be represented; its quotient does not fit either.
    let Some(q) = n.checked_div(d) else { return None };
    let r = n.wrapping_rem(d);
    if sign_extend(q as u64, size) as i64 as i128 != q {
        return None;
    }
    Some((q as u64 & mask(size), r as u64 & mask(size)))
}

/// The sixteen conditions of Jcc, SETcc and CMOVcc by encoding number (SDM 1, appendix B).
#[inline(always)]
pub(super) const fn condition(cc: u8, f: u64) -> bool {
    let less = ((f >> 7) ^ (f >> 11)) & 1 != 0;
    let base = match cc >> 1 {
        0 => f & OF != 0,
        1 => f & CF != 0,
        2 => f & ZF != 0,
        3 => f & (CF | ZF) != 0,
        4 => f & SF != 0,
        5 => f & PF != 0,
        6 => less,
        _ => less || f & ZF != 0,
    };
    base ^ (cc & 1 != 0)
}

/// DAA: (AL, flags); OF is undefined and cleared.
pub(super) const fn daa(al: u8, f: u64) -> (u8, u64) {
    let low = al & 15 > 9 || f & AF != 0;
    let high = al > 0x99 || f & CF != 0;
    let r = al.wrapping_add(if low { 6 } else { 0 }).wrapping_add(if high { 0x60 } else { 0 });
    (r, szp(r as u64, 1) | when(low, AF) | when(high, CF))
}

/// DAS: (AL, flags); OF is undefined and cleared.
pub(super) const fn das(al: u8, f: u64) -> (u8, u64) {
    let low = al & 15 > 9 || f & AF != 0;
    let high = al > 0x99 || f & CF != 0;
    let r = al.wrapping_sub(if low { 6 } else { 0 }).wrapping_sub(if high { 0x60 } else { 0 });
    let cf = high || (low && al < 6);
    (r, szp(r as u64, 1) | when(low, AF) | when(cf, CF))
}

/// AAA: (AX, flags); SF, ZF, PF (undefined) from AL, OF cleared.
pub(super) const fn aaa(ax: u16, f: u64) -> (u16, u64) {
    let adjust = ax & 15 > 9 || f & AF != 0;
    let r = if adjust { ax.wrapping_add(0x106) } else { ax } & 0xFF0F;
    (r, szp((r & 0xFF) as u64, 1) | when(adjust, AF | CF))
}

/// AAS: (AX, flags); SF, ZF, PF (undefined) from AL, OF cleared.
pub(super) const fn aas(ax: u16, f: u64) -> (u16, u64) {
    let adjust = ax & 15 > 9 || f & AF != 0;
    let r = if adjust { ax.wrapping_sub(6).wrapping_sub(0x100) } else { ax } & 0xFF0F;
    (r, szp((r & 0xFF) as u64, 1) | when(adjust, AF | CF))
}

/// AAM: (AX, flags), `None` for `#DE`; CF, OF, AF are undefined and cleared.
pub(super) const fn aam(al: u8, base: u8) -> Option<(u16, u64)> {
    if base == 0 {
        return None;
    }
    let r = ((al / base) as u16) << 8 | (al % base) as u16;
    Some((r, szp((r & 0xFF) as u64, 1)))
}

/// AAD: (AX, flags); CF, OF, AF are undefined and left to [`undefined`](super::undefined).
pub(super) const fn aad(ax: u16, base: u8) -> (u16, u64) {
    let al = ((ax >> 8) as u8).wrapping_mul(base).wrapping_add(ax as u8);
    (al as u16, szp(al as u64, 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLES: [u64; 14] = [
        0,
        1,
        2,
        0x0F,
        0x10,
        0x7F,
        0x80,
        0xFF,
        0x7FFF,
        0x8000,
        0x7FFF_FFFF,
        0x8000_0000,
        0x7FFF_FFFF_FFFF_FFFF,
        u64::MAX,
    ];

    #[test]
    fn add_and_sub_agree_with_overflowing_arithmetic() {
        for a in SAMPLES {
            for b in SAMPLES {
                let (r, f) = add(a & 0xFFFF_FFFF, b & 0xFFFF_FFFF, 0, 4);
                let (u, c) = (a as u32).overflowing_add(b as u32);
                let (_, o) = (a as i32).overflowing_add(b as i32);
                assert_eq!((r, f & CF != 0, f & OF != 0), (u64::from(u), c, o));
                assert_eq!(f & PF != 0, (u as u8).count_ones().is_multiple_of(2));
                assert_eq!(f & AF != 0, (a & 15) + (b & 15) > 15);
                let (r, f) = sub(a, b, 0, 8);
                let (u, c) = a.overflowing_sub(b);
                let (_, o) = (a as i64).overflowing_sub(b as i64);
                assert_eq!((r, f & CF != 0, f & OF != 0), (u, c, o));
                assert_eq!((f & ZF != 0, f & SF != 0), (u == 0, (u as i64) < 0));
                assert_eq!(f & AF != 0, (a & 15) < (b & 15));
                for carry in [0, 1] {
                    let (r, f) = add(a & 0xFF, b & 0xFF, carry, 1);
                    let wide = (a & 0xFF) + (b & 0xFF) + carry;
                    let signed = i32::from(a as i8) + i32::from(b as i8) + carry as i32;
                    assert_eq!((r, f & CF != 0), (wide & 0xFF, wide > 0xFF));
                    assert_eq!(f & OF != 0, i8::try_from(signed).is_err());
                    let (_, f) = sub(a & 0xFFFF, b & 0xFFFF, carry, 2);
                    assert_eq!(f & CF != 0, (a & 0xFFFF) < (b & 0xFFFF) + carry);
                    let signed = i32::from(a as i16) - i32::from(b as i16) - carry as i32;
                    assert_eq!(f & OF != 0, i16::try_from(signed).is_err());
                }
            }
        }
    }

    #[test]
    fn inc_and_dec_keep_carry() {
        assert_eq!(inc(0xFF, CF, 1), (0, CF | ZF | PF | AF));
        assert_eq!(inc(0x7F, 0, 1), (0x80, OF | SF | AF));
        assert_eq!(dec(0x8000, CF, 2), (0x7FFF, CF | OF | PF | AF));
    }

    #[test]
    fn division_faults_on_overflow() {
        assert_eq!(div(0, 1, 1, 4), None);
        assert_eq!(div(7, 0, 0, 1), None);
        assert_eq!(div(5, 1, 2, 8), Some(((1 << 63) + 2, 1)));
        assert_eq!(idiv(0x80, 0xFF, 0xFF, 1), None);
        assert_eq!(idiv(0x81, 0xFF, 0xFF, 1), Some((0x7F, 0)));
        assert_eq!(idiv(0, 1 << 63, u64::MAX, 8), None);
        assert_eq!(idiv(0xFFF9, 0xFFFF, 2, 2), Some((0xFFFD, 0xFFFF)));
    }

    #[test]
    fn multiplication_sets_carry_when_the_high_half_matters() {
        assert_eq!(mul(0xFF, 0xFF, 1), (0x01, 0xFE, CF | OF));
        assert_eq!(imul(0xFF, 0xFF, 1), (1, 0, 0));
        assert_eq!(imul(0x80, 0xFF, 1), (0x80, 0, SF | CF | OF));
        assert_eq!(mul(u64::MAX, u64::MAX, 8).1, u64::MAX - 1);
    }

    #[test]
    fn decimal_adjust_rows_of_the_manual() {
        // SDM 2A, DAA and DAS examples: ADD AL=79H,BL=35H; DAA; and SUB AL=35H,BL=47H; DAS.
        assert_eq!(daa(0xAE, SF | OF | PF), (0x14, AF | CF | PF));
        assert_eq!(das(0xEE, SF | CF | AF | PF), (0x88, SF | AF | CF | PF));
        assert_eq!(aaa(0x000B, 0), (0x0101, AF | CF));
        assert_eq!(aas(0x0200 | 0xFE, AF), (0x0108, AF | CF));
        assert_eq!(aam(63, 10), Some((0x0603, PF)));
        assert_eq!(aam(63, 0), None);
        assert_eq!(aad(0x0603, 10).0, 63);
    }

    #[test]
    fn conditions_by_number() {
        assert!(condition(0x4, ZF) && !condition(0x5, ZF));
        assert!(condition(0xC, SF) && condition(0xC, OF) && !condition(0xC, SF | OF));
        assert!(condition(0xE, ZF) && condition(0xF, SF | OF) && condition(0x7, 0));
    }
}

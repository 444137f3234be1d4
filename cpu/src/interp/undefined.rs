//! Status flags that the manual leaves undefined, as processors of AMD's leave them.
//!
//! [`alu`](super::alu), [`shift`](super::shift) and [`bits`](super::bits) give what Intel's leave. Translated code has the
//! host's own flags, so on an AMD host the interpreter must leave these for both engines to agree bit for bit. Measured on
//! family 1AH (Zen 5) over all operand sizes and counts; `cargo xtask fuzz cpu` compares them there.
//!
//! | instruction              | OF                | SF, ZF          | AF       | PF       | CF           |
//! |--------------------------|-------------------|-----------------|----------|----------|--------------|
//! | SHL, SAR                 | as Intel          | defined         | set      | defined  | as Intel     |
//! | SHR                      | bit below the top | defined         | set      | defined  | as Intel     |
//! | SHLD, SHRD               | see [`shld`]      | defined         | set      | defined  | see [`shld`] |
//! | MUL, IMUL                | defined           | kept            | kept     | kept     | defined      |
//! | DIV, IDIV                | kept              | cleared         | set      | cleared  | kept         |
//! | TZCNT, LZCNT             | kept              | cleared/defined | cleared  | cleared  | defined      |
//! | BLSI, BLSMSK, BLSR, BZHI, ANDN | defined     | defined         | cleared  | result's | defined      |
//! | DAA, DAS, AAA, AAS, AAD  | see [`decimal`]   |                 |          |          |              |
//! | BEXTR                    | defined           | cleared/defined | set      | result's | defined      |
//!
//! Each function takes the result and the flags an Intel processor leaves, and returns the flags.

use super::alu::{self, parity, top};
use crate::cpuid::HostVendor;
use crate::state::flags::{AF, CF, OF, SF};
use iced_x86::Code;

const AMD: HostVendor = HostVendor::Amd;

/// SHL, SAR by `n`.
#[inline(always)]
pub(super) const fn shift(host: HostVendor, _r: u64, f: u64, n: u32, _size: usize) -> u64 {
    if matches!(host, AMD) && n != 0 { f | AF } else { f }
}

/// SHR by `n`.
#[inline(always)]
pub(super) const fn shr(host: HostVendor, r: u64, f: u64, n: u32, size: usize) -> u64 {
    if matches!(host, AMD) && n != 0 { (f & !OF) | ((r >> (top(size) - 1)) & 1) << 11 | AF } else { f }
}

/// Rotates leave what Intel's do.
#[inline(always)]
pub(super) const fn rotate(_host: HostVendor, _r: u64, f: u64, _n: u32, _size: usize) -> u64 {
    f
}

/// SHLD by `n`. OF compares the top bit with CF; of 16 bits by 16 and more it is CF, and by more CF is cleared.
pub(super) const fn shld(host: HostVendor, r: u64, f: u64, n: u32, size: usize) -> u64 {
    if !matches!(host, AMD) || n == 0 {
        return f;
    }
    let cf = if size == 2 && n > 16 { 0 } else { f & CF };
    let sign = if size == 2 && n >= 16 { 0 } else { (r >> top(size)) & 1 };
    (f & !(CF | OF)) | cf | (sign ^ cf) << 11 | AF
}

/// SHRD by `n`. OF compares the two top bits of the result; of 16 bits by more than 16 CF is cleared.
pub(super) const fn shrd(host: HostVendor, r: u64, f: u64, n: u32, size: usize) -> u64 {
    if !matches!(host, AMD) || n == 0 {
        return f;
    }
    let cf = if size == 2 && n > 16 { 0 } else { f & CF };
    let of = ((r >> top(size)) ^ (r >> (top(size) - 1))) & 1;
    (f & !(CF | OF)) | cf | of << 11 | AF
}

/// MUL, IMUL; `old` are the flags before.
pub(super) const fn mul(host: HostVendor, f: u64, old: u64) -> u64 {
    if matches!(host, AMD) { (old & !(CF | OF)) | (f & (CF | OF)) } else { f }
}

/// DIV, IDIV; Intel's keep all flags.
pub(super) const fn div(host: HostVendor, old: u64) -> u64 {
    if matches!(host, AMD) { (old & (CF | OF)) | AF } else { old }
}

/// TZCNT, LZCNT; `old` are the flags before.
pub(super) const fn count(host: HostVendor, _r: u64, f: u64, old: u64) -> u64 {
    if matches!(host, AMD) { (f & !OF) | (old & OF) } else { f }
}

/// BLSI, BLSMSK, BLSR, BZHI, ANDN.
pub(super) const fn lowest(host: HostVendor, r: u64, f: u64, _old: u64) -> u64 {
    if matches!(host, AMD) { f | parity(r) } else { f }
}

/// BEXTR.
pub(super) const fn extract(host: HostVendor, r: u64, f: u64, _old: u64) -> u64 {
    if matches!(host, AMD) { (f & !SF) | parity(r) | AF } else { f }
}

/// DAA, DAS, AAA, AAS and AAD of `ax` to `r`: the flags of the addition or subtraction they make, of 16 bits for AAA and
/// AAS. AAM leaves what Intel's do.
pub(super) fn decimal(host: HostVendor, code: Code, ax: u16, r: u16, f: u64) -> u64 {
    if host != AMD {
        return f;
    }
    let (ax, r) = (u64::from(ax), u64::from(r));
    let (al, adjusted) = (ax & 0xFF, r & 0xFF);
    let step = if f & AF != 0 { 0x106 } else { 0 };
    match code {
        Code::Daa => f | alu::add(al, adjusted.wrapping_sub(al) & 0xFF, 0, 1).1 & OF,
        Code::Das => f | alu::sub(al, al.wrapping_sub(adjusted) & 0xFF, 0, 1).1 & OF,
        Code::Aaa => (f & (AF | CF)) | alu::add(ax, step, 0, 2).1 & !(AF | CF),
        Code::Aas => (f & (AF | CF)) | alu::sub(ax, step, 0, 2).1 & !(AF | CF),
        Code::Aad_imm8 => alu::add(al, adjusted.wrapping_sub(al) & 0xFF, 0, 1).1,
        _ => f,
    }
}

/// Defined all.
pub(super) const fn nothing(_host: HostVendor, _r: u64, f: u64, _old: u64) -> u64 {
    f
}

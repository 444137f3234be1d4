//! Status flags that the manual leaves undefined, as the host's processor leaves them.
//!
//! Translated code has the host's own flags, so the interpreter must leave the same for both engines to agree bit for bit.
//! [`alu`](super::alu), [`shift`](super::shift) and [`bits`](super::bits) give what most processors leave, here is the
//! rest. Measured over all operand sizes and counts on Intel's family 6, model CFH (Emerald Rapids), and on AMD's family
//! 1AH (Zen 5); `cargo xtask fuzz cpu` compares them there.
//!
//! Intel:
//!
//! | instruction              | what                                                                        |
//! |--------------------------|-----------------------------------------------------------------------------|
//! | SHL, SHR, SAR, ROL, ROR  | OF is that of the same shift by one; rotates of registers by constants keep it |
//! | RCL, RCR                 | OF is that of the same shift by one; by all bits and CF, or that again, kept |
//! | AAD                      | OF, AF, CF of the addition it makes                                         |
//!
//! AMD:
//!
//! | instruction              | OF                | SF, ZF          | AF       | PF       | CF           |
//! |--------------------------|-------------------|-----------------|----------|----------|--------------|
//! | SHL, SAR                 | top bit ^ CF, 0   | defined         | set      | defined  | defined      |
//! | SHR                      | bit below the top | defined         | set      | defined  | defined      |
//! | SHLD, SHRD               | see [`shld`]      | defined         | set      | defined  | see [`shld`] |
//! | MUL, IMUL                | defined           | kept            | kept     | kept     | defined      |
//! | DIV, IDIV                | kept              | cleared         | set      | cleared  | kept         |
//! | TZCNT, LZCNT             | kept              | cleared/defined | cleared  | cleared  | defined      |
//! | BLSI, BLSMSK, BLSR, BZHI, ANDN | defined     | defined         | cleared  | result's | defined      |
//! | DAA, DAS, AAA, AAS, AAD  | see [`decimal`]   |                 |          |          |              |
//! | BEXTR                    | defined           | cleared/defined | set      | result's | defined      |
//!
//! Each function takes the result and the flags that the general functions leave, and returns the flags.

use super::alu::{self, parity, top};
use crate::cpuid::HostVendor;
use crate::state::flags::{AF, CF, OF, SF};
use iced_x86::Code;

const AMD: HostVendor = HostVendor::Amd;

/// A shift or rotate that was made.
#[derive(Clone, Copy)]
pub(super) struct Shifted {
    /// The result.
    pub r: u64,
    /// Its flags.
    pub f: u64,
    /// The flags of the same shift by one.
    pub once: u64,
    /// The flags before.
    pub old: u64,
    /// The count, masked.
    pub n: u32,
    /// Bytes of the operand.
    pub size: usize,
    /// Whether it is of a register, by a constant in the instruction.
    pub constant: bool,
}

impl Shifted {
    /// With OF as in `from`.
    #[inline(always)]
    const fn overflow_of(self, from: u64) -> u64 {
        if self.n == 0 { self.f } else { (self.f & !OF) | (from & OF) }
    }
}

/// SHL, SAR.
#[inline(always)]
pub(super) const fn shift(host: HostVendor, s: Shifted) -> u64 {
    match host {
        HostVendor::Intel => s.overflow_of(s.once),
        HostVendor::Amd if s.n != 0 => s.f | AF,
        HostVendor::Amd => s.f,
    }
}

/// SHR.
#[inline(always)]
pub(super) const fn shr(host: HostVendor, s: Shifted) -> u64 {
    match host {
        HostVendor::Amd if s.n != 0 => (s.f & !OF) | ((s.r >> (top(s.size) - 1)) & 1) << 11 | AF,
        _ => s.f,
    }
}

/// ROL, ROR.
#[inline(always)]
pub(super) const fn rotate(host: HostVendor, s: Shifted) -> u64 {
    match host {
        HostVendor::Intel if s.constant && s.n != 1 => s.overflow_of(s.old),
        HostVendor::Intel => s.overflow_of(s.once),
        HostVendor::Amd => s.f,
    }
}

/// RCL, RCR.
#[inline(always)]
pub(super) const fn rotate_through_carry(host: HostVendor, s: Shifted) -> u64 {
    match host {
        HostVendor::Intel if s.n.is_multiple_of(8 * s.size as u32 + 1) => s.overflow_of(s.old),
        HostVendor::Intel => s.overflow_of(s.once),
        HostVendor::Amd => s.f,
    }
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

/// DAA, DAS, AAA, AAS and AAD of `ax` to `r`. AAD leaves the flags of the addition it makes; on AMD's the others too, of
/// 16 bits for AAA and AAS. AAM leaves what it leaves everywhere.
pub(super) fn decimal(host: HostVendor, code: Code, ax: u16, r: u16, f: u64) -> u64 {
    let (ax, r) = (u64::from(ax), u64::from(r));
    let (al, adjusted) = (ax & 0xFF, r & 0xFF);
    let step = if f & AF != 0 { 0x106 } else { 0 };
    match (host, code) {
        (_, Code::Aad_imm8) => alu::add(al, adjusted.wrapping_sub(al) & 0xFF, 0, 1).1,
        (AMD, Code::Daa) => f | alu::add(al, adjusted.wrapping_sub(al) & 0xFF, 0, 1).1 & OF,
        (AMD, Code::Das) => f | alu::sub(al, al.wrapping_sub(adjusted) & 0xFF, 0, 1).1 & OF,
        (AMD, Code::Aaa) => (f & (AF | CF)) | alu::add(ax, step, 0, 2).1 & !(AF | CF),
        (AMD, Code::Aas) => (f & (AF | CF)) | alu::sub(ax, step, 0, 2).1 & !(AF | CF),
        _ => f,
    }
}

/// Defined all.
pub(super) const fn nothing(_host: HostVendor, _r: u64, f: u64, _old: u64) -> u64 {
    f
}

//! Random registers.

use super::random::Random;
use crate::host::NativeState;
use paravane_cpu::{FpuState, flags};

/// Random registers. Control words mostly mask everything, as programs do.
/// `pool` holds vectors.
pub(super) fn random_state(bits: u32, pool: &[u8], random: &mut Random) -> NativeState {
    let gpr = std::array::from_fn(|n| match bits {
        16 | 32 if n >= 8 => 0,
        16 | 32 => random.integer() & 0xFFFF_FFFF,
        _ => random.integer(),
    });
    let mut rflags = flags::FIXED | flags::IF | (random.bits() & flags::STATUS);
    if random.one_in(4) {
        rflags |= flags::DF;
    }
    if random.one_in(48) {
        rflags |= flags::AC;
    }
    NativeState { gpr, rflags, fpu: random_fpu(pool, random) }
}

fn random_fpu(pool: &[u8], random: &mut Random) -> FpuState {
    let mut fpu = FpuState::initial();
    let masks = |random: &mut Random| if random.one_in(6) { random.bits() as u16 & 0x3F } else { 0x3F };
    let control =
        0x40 | masks(random) | (random.bits() as u16 & 0xC00) | random.pick(&[0x300, 0x300, 0x200, 0]);
    let mut status = random.bits() as u16 & 0x7F00 & !0x8000;
    if random.one_in(4) {
        status |= random.bits() as u16 & 0x7F;
    }
    if status & !control & 0x3F != 0 {
        status |= 0x8080;
    }
    let any = random.bits() as u8;
    let tags = random.pick(&[0xFF, 0, any]);
    fpu.0[0..2].copy_from_slice(&control.to_le_bytes());
    fpu.0[2..4].copy_from_slice(&status.to_le_bytes());
    fpu.0[4] = tags;
    for register in 0..8 {
        let (significand, exponent) = random.extended();
        let at = 32 + 16 * register;
        fpu.0[at..at + 8].copy_from_slice(&significand.to_le_bytes());
        fpu.0[at + 8..at + 10].copy_from_slice(&exponent.to_le_bytes());
    }
    let simd = u32::from(masks(random)) << 7;
    let rounding = if random.one_in(2) { random.bits() as u32 & 0x6000 } else { 0 };
    let special = if random.one_in(6) { random.bits() as u32 & 0x807F } else { 0 };
    fpu.set_mxcsr(simd | rounding | special);
    for registers in [160..416, 576..832] {
        let start = random.below(((pool.len() - 256) / 16) as u64) as usize * 16;
        fpu.0[registers].copy_from_slice(&pool[start..start + 256]);
    }
    fpu
}

//! Pseudo-random numbers and the operand values that instructions trip over.

/// SplitMix64: small, seedable, the same everywhere.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A sequence determined by `seed`.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let a = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let b = (a ^ (a >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        b ^ (b >> 31)
    }

    /// A number below `n`, which is not zero.
    pub fn below(&mut self, n: u64) -> u64 {
        self.bits() % n
    }

    /// True once in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// One element.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// An integer at or near the limits of some operand size, small, or anything.
    pub fn integer(&mut self) -> u64 {
        const EDGES: [u64; 17] = [
            0,
            1,
            u64::MAX,
            0x7F,
            0x80,
            0xFF,
            0x7FFF,
            0x8000,
            0xFFFF,
            0x7FFF_FFFF,
            0x8000_0000,
            0xFFFF_FFFF,
            i64::MAX as u64,
            i64::MIN as u64,
            0xFFFF_FFFF_8000_0000,
            0x5555_5555_5555_5555,
            0x0F0F_0F0F_F0F0_F0F0,
        ];
        match self.below(8) {
            0..3 => self.pick(&EDGES).wrapping_add(self.below(3)).wrapping_sub(1),
            3 => self.below(256),
            4 => self.below(1 << 16) << self.below(48),
            _ => self.bits(),
        }
    }

    /// The bits of a single-precision number: zeros, denormals, infinities, NaNs, ties and small values favoured.
    pub fn single(&mut self) -> u32 {
        const EDGES: [u32; 14] = [
            0,
            1,
            0x007F_FFFF,
            0x0080_0000,
            0x3F80_0000,
            0x3F00_0000,
            0x4020_0000,
            0x7F7F_FFFF,
            0x7F80_0000,
            0x7F80_0001,
            0x7FC0_0000,
            0x7FFF_FFFF,
            0x4F00_0000,
            0x4B00_0001,
        ];
        match self.below(4) {
            0 | 1 => self.pick(&EDGES) | ((self.bits() as u32) & 0x8000_0000),
            2 => (self.below(4000) as f32 / 8.0 - 250.0).to_bits(),
            _ => self.bits() as u32,
        }
    }

    /// The bits of a double-precision number, likewise.
    pub fn double(&mut self) -> u64 {
        const EDGES: [u64; 15] = [
            0,
            1,
            0x000F_FFFF_FFFF_FFFF,
            0x0010_0000_0000_0000,
            0x3FF0_0000_0000_0000,
            0x3FE0_0000_0000_0000,
            0x4004_0000_0000_0000,
            0x7FEF_FFFF_FFFF_FFFF,
            0x7FF0_0000_0000_0000,
            0x7FF0_0000_0000_0001,
            0x7FF8_0000_0000_0000,
            0x41E0_0000_0000_0000,
            0x43E0_0000_0000_0000,
            0x3810_0000_0000_0000,
            0x36A0_0000_0000_0000,
        ];
        match self.below(4) {
            0 | 1 => self.pick(&EDGES) | (self.bits() & (1 << 63)),
            2 => (self.below(4000) as f64 / 8.0 - 250.0).to_bits(),
            _ => self.bits(),
        }
    }

    /// Significand, then sign and exponent, of an extended-precision number, unsupported encodings included.
    pub fn extended(&mut self) -> (u64, u16) {
        const EDGES: [(u64, u16); 14] = [
            (0, 0),
            (1, 0),
            (i64::MIN as u64, 0),
            (i64::MIN as u64, 1),
            (i64::MIN as u64, 0x3FFF),
            (i64::MIN as u64, 0x3FFE),
            (0xA000_0000_0000_0000, 0x4000),
            (u64::MAX, 0x7FFE),
            (i64::MIN as u64, 0x7FFF),
            (0x8000_0000_0000_0001, 0x7FFF),
            (0xC000_0000_0000_0000, 0x7FFF),
            (0x4000_0000_0000_0000, 0x7FFF),
            (0x4000_0000_0000_0000, 0x3FFF),
            (0xC90F_DAA2_2168_C235, 0x4000),
        ];
        let sign = (self.bits() as u16) & 0x8000;
        match self.below(4) {
            0 | 1 => {
                let (significand, exponent) = self.pick(&EDGES);
                (significand, exponent | sign)
            }
            2 => (self.bits() | (1 << 63), (0x3FF0 + self.below(0x50) as u16) | sign),
            _ => (self.bits(), self.bits() as u16),
        }
    }

    /// Eight bytes of one lane type.
    pub fn lanes(&mut self) -> u64 {
        match self.below(4) {
            0 => u64::from(self.single()) | (u64::from(self.single()) << 32),
            1 => self.double(),
            2 => self.integer(),
            _ => self.bits(),
        }
    }
}

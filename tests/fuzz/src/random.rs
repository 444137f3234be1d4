//! Reproducible random inputs.

/// xorshift64*.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Numbers that depend on `seed` alone.
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.number() >> 11) as usize % n
    }

    /// An input of up to `most` bytes: noise, with a liking for bytes that were there before.
    pub fn input(&mut self, most: usize) -> Vec<u8> {
        let len = self.below(most) + 1;
        let mut bytes: Vec<u8> = Vec::with_capacity(len);
        while bytes.len() < len {
            let at = self.below(bytes.len() + 1);
            match (self.below(4), bytes.get(at..)) {
                (0, Some(tail)) if !tail.is_empty() => {
                    let again = tail[..tail.len().min(8)].to_vec();
                    bytes.extend(again);
                }
                (1, _) => bytes.push(0),
                _ => bytes.push(self.number() as u8),
            }
        }
        bytes
    }
}

//! Entropy of a deterministic machine: the same bytes in every run, and said so in the name.

use paravane_devices::{Snapshot, StateError, StateStream};
use paravane_pv::virtio::EntropySource;
use std::io;

/// SplitMix64 (Steele, Lea, Flood 2014) from a fixed seed.
pub(super) struct SeededEntropy(u64);

impl SeededEntropy {
    pub(super) fn new() -> SeededEntropy {
        SeededEntropy(0x7061_7261_7661_6E65)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
}

impl Snapshot for SeededEntropy {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        self.0.state(s)
    }
}

impl EntropySource for SeededEntropy {
    fn fill(&mut self, buf: &mut [u8]) -> io::Result<()> {
        for chunk in buf.chunks_mut(8) {
            let bytes = self.next().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
        Ok(())
    }
}

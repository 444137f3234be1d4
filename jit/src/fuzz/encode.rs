//! Bytes of instructions, with the prefixes that programs should not use and processors must take: redundant, meaningless,
//! illegal, too many (SDM 2A, 2.1.1 and 2.2.1).

use super::generate::Generator;
use super::random::Random;
use iced_x86::{Decoder, DecoderOptions, Encoder, Instruction, OpKind};

/// The legacy prefixes that do not lead to FS or GS.
const PREFIXES: [u8; 9] = [0x66, 0x67, 0xF2, 0xF3, 0xF0, 0x2E, 0x36, 0x3E, 0x26];

/// Whether `byte` is a legacy prefix.
pub fn is_prefix(byte: u8) -> bool {
    PREFIXES.contains(&byte) || matches!(byte, 0x64 | 0x65)
}

/// What remains of an instruction of more than 15 bytes without prefixes that mean nothing.
pub(super) fn shortened(bytes: &[u8]) -> Option<Vec<u8>> {
    if bytes.len() <= 15 {
        return None;
    }
    let mut rest = bytes.to_vec();
    while rest.len() > 15 {
        let prefixes = rest.iter().take_while(|&&b| is_prefix(b)).count();
        let is_idle =
            |&n: &usize| matches!(rest[n], 0x26 | 0x2E | 0x36 | 0x3E) || rest[..n].contains(&rest[n]);
        let idle = (0..prefixes).find(is_idle).unwrap_or(0);
        rest.remove(idle);
    }
    Some(rest)
}

impl Generator {
    /// What the processor sees: `bytes`, then INT3.
    pub(super) fn decode(&self, bytes: &[u8], ip: u64) -> Instruction {
        let mut window = [0xCC; 48];
        let length = bytes.len().min(window.len());
        window[..length].copy_from_slice(&bytes[..length]);
        Decoder::with_ip(self.bits, &window, ip, DecoderOptions::NONE).decode()
    }

    /// Whether undefined `bytes` are longer than 15 as well, with what follows them: without the prefixes that make it undefined it
    /// would be an instruction of so many.
    pub(super) fn is_too_long(&self, bytes: &[u8], ip: u64) -> bool {
        let prefixes = bytes.iter().take_while(|&&b| is_prefix(b)).count();
        let sizes: Vec<u8> = bytes[..prefixes].iter().copied().filter(|b| matches!(b, 0x66 | 0x67)).collect();
        let bare = self.decode(&[&sizes, &bytes[prefixes..]].concat(), ip);
        !bare.is_invalid() && bare.len() + prefixes - sizes.len() > 15
    }

    pub(super) fn encode(&self, i: &Instruction, ip: u64, random: &mut Random) -> Option<Vec<u8>> {
        let mut encoder = Encoder::new(self.bits);
        encoder.encode(i, ip).ok()?;
        let mut bytes = encoder.take_buffer();
        // Relative operands would mean something else.
        if i.is_ip_rel_memory_operand() || has_branch(i) {
            return Some(bytes);
        }
        if random.one_in(12) {
            for _ in 0..=random.below(4).saturating_sub(1) {
                bytes.insert(0, random.pick(&PREFIXES));
            }
        }
        if self.bits == 64 && is_prefix(bytes[0]) && random.one_in(8) {
            // Not right before the opcode, it counts for nothing.
            bytes.insert(0, 0x40 + random.below(16) as u8);
        }
        if random.one_in(256) {
            let prefix = random.pick(&[0x2E, 0x36, 0x3E, 0x26, 0x66]);
            let length = 14 + random.below(4) as usize;
            let missing = length.saturating_sub(bytes.len());
            bytes.splice(0..0, std::iter::repeat_n(prefix, missing));
        }
        (bytes.len() <= 15 || random.one_in(4)).then_some(bytes)
    }

    /// Bytes that no processor defines, in one of the opcode maps.
    pub(super) fn undefined(&self, ip: u64, random: &mut Random) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        if random.one_in(4) {
            bytes.push(random.pick(&PREFIXES));
        }
        if self.bits == 64 && random.one_in(4) {
            bytes.push(0x40 + random.below(16) as u8);
        }
        match random.below(5) {
            0 => {}
            1 => bytes.push(0x0F),
            2 => bytes.extend([0x0F, random.pick(&[0x38, 0x3A])]),
            3 => bytes.extend([0xC5, random.bits() as u8]),
            _ => bytes.extend([0xC4, random.bits() as u8 & 0xE3, random.bits() as u8]),
        }
        bytes.extend(random.bits().to_le_bytes().iter().take(3));
        self.decode(&bytes, ip).is_invalid().then_some(bytes)
    }
}

fn has_branch(i: &Instruction) -> bool {
    (0..i.op_count())
        .any(|n| matches!(i.op_kind(n), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::NativeLayout;

    #[test]
    fn what_is_undefined_may_be_too_long_as_well() {
        let layout =
            NativeLayout { code: 0x4000_0000, data: 0x5000_0000, writable_pages: 2, read_only_pages: 1 };
        let generator = Generator::new(16, layout);
        // PHSUBD with F2 and a displacement that 67H makes longer than what was written.
        let mut bytes =
            vec![0x2E, 0x2E, 0x2E, 0x2E, 0x2E, 0x2E, 0xF3, 0xF2, 0x67, 0x0F, 0x38, 6, 0x9B, 0xFF, 0x7F];
        assert!(generator.decode(&bytes, 0).is_invalid());
        assert!(generator.is_too_long(&bytes, 0));
        bytes.drain(..2);
        assert!(generator.decode(&bytes, 0).is_invalid());
        assert!(!generator.is_too_long(&bytes, 0));
    }
}

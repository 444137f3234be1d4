//! BIOS data area and extended BIOS data area, as far as operating systems still read them.

use super::{Config, Piece};
use crate::e820::EBDA;

/// The MP floating pointer: on a 16-byte boundary in the first KiB of the EBDA.
pub(super) const MP_POINTER: u64 = EBDA + 16;

const COM_PORTS: u64 = 0x400;
const EBDA_SEGMENT: u64 = 0x40E;
const BASE_MEMORY_KIB: u64 = 0x413;

pub(super) fn build(config: &Config) -> Vec<Piece> {
    let com = [0x3F8u16, if config.com2 { 0x2F8 } else { 0 }];
    let word = |at, value: u16| Piece { at, bytes: value.to_le_bytes().to_vec() };
    vec![
        Piece { at: COM_PORTS, bytes: com.iter().flat_map(|p| p.to_le_bytes()).collect() },
        word(EBDA_SEGMENT, (EBDA >> 4) as u16),
        word(BASE_MEMORY_KIB, (EBDA >> 10) as u16),
        // The EBDA's first byte is its size in KiB.
        Piece { at: EBDA, bytes: vec![1] },
    ]
}

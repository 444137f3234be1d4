//! What the translator made of a block: guest instructions beside the host's.

use super::memory;
use super::symbols::Symbols;
use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
use paravane_cpu::{CpuState, Engine};
use paravane_memory::GuestMemory;
use std::fmt::Write;
use std::ops::Range;

/// `bytes` at `ip` in the manual's syntax, `most` instructions at most; `address` writes the first column. In `block`, jumps
/// name their targets by the distance from its first byte; what lies outside is the translator's own code.
fn instructions(
    bits: u32,
    ip: u64,
    bytes: &[u8],
    most: usize,
    block: &Range<u64>,
    mut address: impl FnMut(u64) -> String,
) -> String {
    let mut out = String::new();
    let mut formatter = IntelFormatter::new();
    for instr in Decoder::with_ip(bits, bytes, ip, DecoderOptions::NONE).iter().take(most) {
        let mut text = String::new();
        if instr.near_branch_target() != 0 && !block.is_empty() {
            formatter.format_mnemonic(&instr, &mut text);
            let target = instr.near_branch_target();
            let inside = block.contains(&target).then(|| format!(" +{:x}", target - block.start));
            text.push_str(&inside.unwrap_or_else(|| " (out)".into()));
        } else {
            formatter.format(&instr, &mut text);
        }
        let _infallible = writeln!(out, "{}  {text}", address(instr.ip()));
    }
    out
}

/// Guest code at linear `ip`.
pub fn disassembly(bits: u32, ip: u64, bytes: &[u8], most: usize) -> String {
    instructions(bits, ip, bytes, most, &(0..0), |at| format!("  {at:016x}"))
}

/// The newest block that begins at linear `at` or else holds it: every guest instruction, and under it, by its distance
/// from the block's first byte, the host code made of it. `None` where the engine has no such block.
pub fn translated(
    cpu: &CpuState,
    mem: &GuestMemory,
    engine: &dyn Engine,
    symbols: &Symbols,
    at: u64,
) -> Option<String> {
    let pieces = engine.host_code(at);
    let start = pieces.first()?.host;
    let first = pieces.iter().find_map(|piece| piece.guest)?;
    let len: usize = pieces.iter().map(|piece| piece.bytes.len()).sum();
    let block = start..start + len as u64;
    let name = symbols.name(first).map_or(String::new(), |s| format!(" <{s}>"));
    let mut out = format!("block at {first:#x}{name}: {len} bytes of host code at {start:#x}\n");
    for piece in pieces {
        match piece.guest {
            None => out.push_str("entry\n"),
            Some(lin) => {
                let mut bytes = [0; 15];
                let n = memory::read(cpu, mem, lin, &mut bytes, false);
                let guest =
                    instructions(cpu.code_bits(), lin, &bytes[..n], 1, &(0..0), |at| format!("{at:x}"));
                out.push_str(&guest);
            }
        }
        let distance = |at: u64| format!("    +{:<4x}", at - start);
        out.push_str(&instructions(64, piece.host, &piece.bytes, usize::MAX, &block, distance));
    }
    Some(out)
}

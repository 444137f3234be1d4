//! What the translator made of a block: guest instructions beside the host's.

use super::memory;
use super::symbols::Symbols;
use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
use paravane_cpu::{CpuState, Engine, HostCode};
use paravane_memory::GuestMemory;
use std::fmt::Write;
use std::ops::Range;

/// Where the host code of a block is.
#[derive(Default)]
struct Parts {
    hot: Range<u64>,
    cold: Range<u64>,
}

impl Parts {
    /// The name of host address `at`, if it is in the block: its distance from the first byte of its part.
    fn name(&self, at: u64) -> Option<String> {
        let within = |part: &Range<u64>| part.contains(&at).then(|| at - part.start);
        let cold = || within(&self.cold).map(|n| format!("cold+{n:x}"));
        within(&self.hot).map(|n| format!("+{n:x}")).or_else(cold)
    }
}

/// `bytes` at `ip` in the manual's syntax, `most` instructions at most; `address` writes the first column. In `block`, if
/// there is one, jumps name their targets as it does; what lies outside is the translator's own code.
fn instructions(
    bits: u32,
    ip: u64,
    bytes: &[u8],
    most: usize,
    block: Option<&Parts>,
    mut address: impl FnMut(u64) -> String,
) -> String {
    let mut out = String::new();
    let mut formatter = IntelFormatter::new();
    for instr in Decoder::with_ip(bits, bytes, ip, DecoderOptions::NONE).iter().take(most) {
        let mut text = String::new();
        match block.filter(|_| instr.near_branch_target() != 0) {
            Some(block) => {
                formatter.format_mnemonic(&instr, &mut text);
                let target = block.name(instr.near_branch_target());
                let _infallible = write!(text, " {}", target.as_deref().unwrap_or("(out)"));
            }
            None => formatter.format(&instr, &mut text),
        }
        let _infallible = writeln!(out, "{}  {text}", address(instr.ip()));
    }
    out
}

/// Guest code at linear `ip`.
pub fn disassembly(bits: u32, ip: u64, bytes: &[u8], most: usize) -> String {
    instructions(bits, ip, bytes, most, None, |at| format!("  {at:016x}"))
}

/// The newest block that begins at linear `at` or else holds it: every guest instruction, and under it, by its distance
/// from the block's first byte, the host code made of it; then what lies apart from it. `None` where the engine has no such block.
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
    let extent = |cold: bool| {
        let mut part = pieces.iter().filter(|piece| piece.cold == cold);
        let ends = |piece: &HostCode| piece.host..piece.host + piece.bytes.len() as u64;
        let first = part.next().map_or(0..0, ends);
        first.start..part.next_back().map_or(first.end, |last| ends(last).end)
    };
    let block = Parts { hot: extent(false), cold: extent(true) };
    let len: usize = pieces.iter().map(|piece| piece.bytes.len()).sum();
    let name = symbols.name(first).map_or(String::new(), |s| format!(" <{s}>"));
    let mut out = format!("block at {first:#x}{name}: {len} bytes of host code at {start:#x}\n");
    for piece in pieces {
        match piece.guest {
            None if piece.cold => out.push_str("apart\n"),
            None => out.push_str("entry\n"),
            Some(lin) => {
                let mut bytes = [0; 15];
                let n = memory::read(cpu, mem, lin, &mut bytes, false);
                let guest = instructions(cpu.code_bits(), lin, &bytes[..n], 1, None, |at| format!("{at:x}"));
                out.push_str(&guest);
            }
        }
        let distance = |at: u64| format!("    {:<7}", block.name(at).unwrap_or_default());
        out.push_str(&instructions(64, piece.host, &piece.bytes, usize::MAX, Some(&block), distance));
    }
    Some(out)
}

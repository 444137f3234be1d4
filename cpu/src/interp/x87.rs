//! The x87 instruction and data pointers and the last opcode (SDM 1, 8.1.8, 8.1.9 and 8.1.10).
//!
//! They are those of the last instruction that raised an unmasked exception, the only ones a handler asks for, or as
//! FLDENV, FRSTOR, FXRSTOR and XRSTOR loaded them; FNINIT and FNSAVE clear them. Processors that say so in CPUID do the
//! same for FDP (leaf 7, FDP_EXCPTN_ONLY) and FOP; the reason to do it for FIP is that translated code then runs as is.

use super::operand::{effective, memory_segment};
use crate::exec::Exec;
use crate::state::{CpuState, FpuPointers, SegReg};
use iced_x86::{Instruction, Mnemonic, OpKind};

/// Bits of the opcode that are kept: the low three of the first byte, and the second.
const OPCODE: u16 = 0x7FF;

/// Unused halves of an environment's double words are stored as ones.
const RESERVED: u32 = 0xFFFF_0000;

/// Notes `i`, whose bytes are `bytes`, as the instruction that raised what is now pending.
pub(super) fn record(ex: &mut Exec<'_>, i: &Instruction, bytes: &[u8]) {
    let memory = i.op0_kind() == OpKind::Memory || i.op1_kind() == OpKind::Memory;
    let data = memory.then(|| {
        let selector = ex.cpu.segment(memory_segment(i)).selector;
        (selector, effective(ex.cpu, i))
    });
    let pointers = &mut ex.cpu.fpu_pointers;
    pointers.ip = ex.cpu.rip;
    pointers.cs = ex.cpu.seg[SegReg::Cs as usize].selector;
    pointers.opcode = opcode(bytes);
    if let Some((selector, offset)) = data {
        (pointers.ds, pointers.dp) = (selector, offset);
    }
}

/// The eleven bits of an x87 instruction's opcode, behind its prefixes.
pub fn opcode(bytes: &[u8]) -> u16 {
    let at = bytes.iter().position(|b| b & 0xF8 == 0xD8).unwrap_or(0);
    let byte = |n: usize| u16::from(bytes.get(at + n).copied().unwrap_or(0));
    (byte(0) << 8 | byte(1)) & OPCODE
}

/// Whether FNSTENV and its kin use the format of real and virtual-8086 mode, with linear addresses.
fn real_format(cpu: &CpuState) -> bool {
    !cpu.protected() || cpu.v8086()
}

/// Instructions that move the whole environment, or reset it.
pub(super) fn moves_environment(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(m, Fnstenv | Fstenv | Fnsave | Fsave | Fldenv | Frstor | Fninit | Finit)
}

/// Puts the pointers into the environment at the start of `image` (of FNSTENV or FNSAVE), with fields of two bytes
/// (`narrow`) or four (SDM 1, figures 8-9 to 8-12).
pub(super) fn store_environment(cpu: &CpuState, image: &mut [u8], narrow: bool) {
    let p = &cpu.fpu_pointers;
    let (ip, dp) = (p.ip as u32, p.dp as u32);
    let fields: [u32; 4] = if real_format(cpu) {
        let ip = ip.wrapping_add(u32::from(p.cs) << 4);
        let dp = dp.wrapping_add(u32::from(p.ds) << 4);
        let high = |v: u32| v >> 16 << 12;
        let (ip_high, dp_high) =
            if narrow { (high(ip) & 0xF000, high(dp) & 0xF000) } else { (high(ip), high(dp)) };
        [ip | RESERVED, ip_high | u32::from(p.opcode), dp | RESERVED, dp_high]
    } else if narrow {
        [ip, u32::from(p.cs), dp, u32::from(p.ds)]
    } else {
        [ip, u32::from(p.opcode) << 16 | u32::from(p.cs), dp, u32::from(p.ds) | RESERVED]
    };
    for (n, field) in fields.iter().enumerate() {
        if narrow {
            image[6 + 2 * n..8 + 2 * n].copy_from_slice(&field.to_le_bytes()[..2]);
        } else {
            image[12 + 4 * n..16 + 4 * n].copy_from_slice(&field.to_le_bytes());
        }
    }
}

/// The pointers of an environment that FLDENV or FRSTOR loads.
pub(super) fn load_environment(cpu: &CpuState, image: &[u8], narrow: bool) -> FpuPointers {
    let field = |n: usize| {
        if narrow {
            u32::from(u16::from_le_bytes([image[6 + 2 * n], image[7 + 2 * n]]))
        } else {
            let at = 12 + 4 * n;
            u32::from_le_bytes([image[at], image[at + 1], image[at + 2], image[at + 3]])
        }
    };
    let [ip, second, dp, fourth] = [field(0), field(1), field(2), field(3)];
    if real_format(cpu) {
        let linear = |low: u32, high: u32| u64::from(low & 0xFFFF | (high >> 12 & 0xFFFF) << 16);
        let opcode = second as u16 & OPCODE;
        return FpuPointers { ip: linear(ip, second), dp: linear(dp, fourth), cs: 0, ds: 0, opcode };
    }
    let opcode = if narrow { cpu.fpu_pointers.opcode } else { (second >> 16) as u16 & OPCODE };
    FpuPointers { ip: u64::from(ip), dp: u64::from(dp), cs: second as u16, ds: fourth as u16, opcode }
}

/// Bytes 6 to 23 of the FXSAVE image: FOP, FIP and FDP, whole (`wide`) or with their selectors (SDM 1, table 10-2).
pub(super) fn fxsave_pointers(p: &FpuPointers, wide: bool) -> [u8; 18] {
    let mut image = [0; 18];
    image[..2].copy_from_slice(&p.opcode.to_le_bytes());
    for (at, offset, selector) in [(2, p.ip, p.cs), (10, p.dp, p.ds)] {
        image[at..at + 8].copy_from_slice(&offset.to_le_bytes());
        if !wide {
            image[at + 4..at + 6].copy_from_slice(&selector.to_le_bytes());
            image[at + 6..at + 8].fill(0);
        }
    }
    image
}

/// What an image of [`fxsave_pointers`] says.
pub(super) fn fxrstor_pointers(image: &[u8], wide: bool) -> FpuPointers {
    let word = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
    let pair = |at: usize| {
        let low = u64::from(word(at)) | u64::from(word(at + 2)) << 16;
        let high = u64::from(word(at + 4)) | u64::from(word(at + 6)) << 16;
        if wide { (low | high << 32, 0) } else { (low, word(at + 4)) }
    };
    let ((ip, cs), (dp, ds)) = (pair(2), pair(10));
    FpuPointers { ip, dp, cs, ds, opcode: word(0) & OPCODE }
}

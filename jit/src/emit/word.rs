//! Moves of words between a host register and memory at a register plus a constant, and that sum, as short as they can
//! be encoded: the assembler's forms for registers chosen at run time have a SIB byte and four bytes of displacement.

use crate::assembler::SimpleAssembler;
use dynasmrt::DynasmApi;

/// Opcodes of `r, r/m` forms.
#[derive(Clone, Copy)]
pub(super) enum Op {
    Load = 0x8B,
    Store = 0x89,
    Lea = 0x8D,
}

/// `op` with `size` bytes (2, 4 or 8) of host register `reg` and `[base + disp]`.
pub(super) fn word(ops: &mut SimpleAssembler, op: Op, size: i32, reg: u8, base: u8, disp: i32) {
    operand(ops, op as u8, size, reg, base, disp);
}

/// Stores `value`, sign-extended, to the `size` bytes (4 or 8) at `[base + disp]`.
pub(super) fn store_constant(ops: &mut SimpleAssembler, size: i32, base: u8, disp: i32, value: i32) {
    operand(ops, 0xC7, size, 0, base, disp);
    ops.push_i32(value);
}

/// `opcode` with register field `reg` (of a byte: AL, CL, DL, BL or from SPL on) and `[base + disp]`.
pub(super) fn operand(ops: &mut SimpleAssembler, opcode: u8, size: i32, reg: u8, base: u8, disp: i32) {
    if size == 2 {
        ops.push(0x66);
    }
    let rex = u8::from(size == 8) << 3 | reg >> 3 << 2 | base >> 3;
    if rex != 0 || size == 1 && reg >= 4 {
        ops.push(0x40 | rex);
    }
    ops.push(opcode);
    let short = i8::try_from(disp);
    // RBP and R13 have no form without displacement; RSP and R12 need a SIB byte.
    let form = match short {
        Ok(0) if base & 7 != 5 => 0x00,
        Ok(_) => 0x40,
        Err(_) => 0x80,
    };
    ops.push(form | (reg & 7) << 3 | base & 7);
    if base & 7 == 4 {
        ops.push(0x24);
    }
    match (form, short) {
        (0x00, _) => {}
        (_, Ok(disp)) => ops.push(disp as u8),
        (_, Err(_)) => ops.push_i32(disp),
    }
}

/// Compares the double word at `base`, a register but RSP, RBP, R12 and R13, with zero.
pub(super) fn compare_with_zero(ops: &mut SimpleAssembler, base: u8) {
    debug_assert!(!matches!(base & 7, 4 | 5));
    if base >= 8 {
        ops.push(0x41);
    }
    ops.extend([0x83, 0x38 | base & 7, 0]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Mnemonic, OpKind, Register};

    /// Every encoding means what it should, and none is longer than it must be.
    #[test]
    fn as_decoded() {
        for op in [Op::Load, Op::Store, Op::Lea] {
            for size in [2, 4, 8] {
                for (reg, base, disp) in (0..16)
                    .flat_map(|r| (0..16).map(move |b| (r, b)))
                    .flat_map(|(r, b)| [0, 1, -8, 127, -128, 128, -129, i32::MIN].map(|d| (r, b, d)))
                {
                    let mut ops = SimpleAssembler::new();
                    word(&mut ops, op, size, reg, base, disp);
                    let i = Decoder::new(64, &ops.ops, DecoderOptions::NONE).decode();
                    assert_eq!(i.len(), ops.ops.len());
                    let (register, memory) = match op {
                        Op::Store => (i.op1_register(), i.op0_kind()),
                        _ => (i.op0_register(), i.op1_kind()),
                    };
                    assert_eq!((register.number(), register.size() as i32), (usize::from(reg), size));
                    assert_eq!((memory, i.memory_base().number()), (OpKind::Memory, usize::from(base)));
                    assert_eq!((i.memory_index(), i.memory_displacement64() as i32), (Register::None, disp));
                    assert_eq!(i.memory_base().size(), 8);
                    assert!(
                        ops.ops.len()
                            <= 4 + usize::from(base & 7 == 4)
                                + if i8::try_from(disp).is_ok() { 1 } else { 4 }
                    );
                }
            }
        }
    }

    #[test]
    fn constants_as_decoded() {
        for (size, base, disp, value) in [4, 8]
            .into_iter()
            .flat_map(|size| (0..16).map(move |base| (size, base)))
            .flat_map(|(size, base)| [0, -8, 128].map(|disp| (size, base, disp)))
            .flat_map(|(size, base, disp)| [0, -1, i32::MAX].map(|value| (size, base, disp, value)))
        {
            let mut ops = SimpleAssembler::new();
            store_constant(&mut ops, size, base, disp, value);
            let i = Decoder::new(64, &ops.ops, DecoderOptions::NONE).decode();
            assert_eq!(
                (i.len(), i.mnemonic(), i.memory_size().size() as i32),
                (ops.ops.len(), Mnemonic::Mov, size)
            );
            assert_eq!(
                (i.memory_base().number(), i.memory_displacement64() as i32),
                (usize::from(base), disp)
            );
            assert_eq!((i.memory_index(), i.immediate(1) as i32), (Register::None, value));
        }
        for base in (0..16).filter(|base| !matches!(base & 7, 4 | 5)) {
            let mut ops = SimpleAssembler::new();
            compare_with_zero(&mut ops, base);
            let i = Decoder::new(64, &ops.ops, DecoderOptions::NONE).decode();
            assert_eq!((i.len(), i.mnemonic(), i.memory_size().size()), (ops.ops.len(), Mnemonic::Cmp, 4));
            assert_eq!(
                (i.memory_base().number(), i.memory_displacement64(), i.immediate(1)),
                (usize::from(base), 0, 0)
            );
        }
    }
}

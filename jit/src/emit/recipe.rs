//! Recipes: status flags put aside as what they come from, two stores, where the instruction that set them left it in a
//! register. Hardly anybody wants flags behind an indirect transfer; who does has them made (`stubs`, `flags`).

use crate::assembler::SimpleAssembler;
use crate::context::ctx;
use crate::regs;
use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

/// In AL where `saved_flags` is a recipe; LAHF and SETO AL leave no such bit.
pub(crate) const MARK: i8 = 1 << 1;
/// Bits of a recipe that number its [`Kind`] and the operand's size, from bit 3 on.
pub(crate) const NUMBERED: i32 = 0x78;

/// How the flags come from the value put aside and the immediate operand in bits 16 to 31.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// The value is the result of AND, OR, XOR or TEST.
    Logic,
    /// It is the sum of an ADD of the operand.
    Sum,
    /// It is what a SUB of the operand left.
    Difference,
    /// It was compared with the operand.
    Compared,
}

/// All of them, by number.
pub(crate) const KINDS: [Kind; 4] = [Kind::Logic, Kind::Sum, Kind::Difference, Kind::Compared];

/// The recipe for the status flags that `instr` leaves, and the register with the value.
pub(super) fn recipe(instr: &Instruction) -> Option<(i32, Register)> {
    use Mnemonic as M;
    let register = instr.op0_register();
    if instr.op0_kind() != OpKind::Register || !register.is_gpr() || regs::is_high_byte(register) {
        return None;
    }
    let kind = match instr.mnemonic() {
        M::And | M::Or | M::Xor => Kind::Logic,
        M::Test if instr.op1_kind() == OpKind::Register && instr.op1_register() == register => Kind::Logic,
        M::Add => Kind::Sum,
        M::Sub => Kind::Difference,
        M::Cmp => Kind::Compared,
        _ => return None,
    };
    let operand = match kind {
        Kind::Logic => 0,
        _ => i16::try_from(immediate(instr)?).ok()?,
    };
    let number = (kind as i32) << 2 | register.size().trailing_zeros() as i32;
    Some((i32::from(operand) << 16 | number << 3 | i32::from(MARK), register))
}

/// Whether the flags of `instr` can be put aside as a recipe.
pub(crate) fn is_recipe(instr: &Instruction) -> bool {
    recipe(instr).is_some()
}

/// The second operand, if it is an immediate: sign-extended.
fn immediate(instr: &Instruction) -> Option<i64> {
    let size = match instr.op1_kind() {
        OpKind::Immediate8
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => instr.op0_register().size(),
        _ => return None,
    };
    let unused = 64 - 8 * size as u32;
    Some((instr.immediate(1) << unused) as i64 >> unused)
}

/// Puts recipe `recipe` and the value in `host` aside.
pub(super) fn put_aside(ops: &mut SimpleAssembler, recipe: i32, host: u8) {
    let (at, value) = (ctx!(saved_flags) as i8, ctx!(flags_value));
    super::store(ops, value, host);
    dynasm!(ops ; .arch x64 ; mov DWORD [BYTE rsp + at], recipe);
}

//! Recipes: status flags put aside as what they come from, two or three stores, where the instruction that set them left it in a
//! register. Hardly anybody wants flags behind an indirect transfer; who does has them made (`stubs`, `flags`).

use super::{Emitter, store};
use crate::context::ctx;
use crate::regs::{self, R10};
use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

/// In AL where `saved_flags` is a recipe; LAHF and SETO AL leave no such bit.
pub(crate) const MARK: i8 = 1 << 1;
/// Bits of a recipe that number its [`Kind`] and the operand's size, from bit 3 on.
pub(crate) const NUMBERED: i32 = 0x78;

/// In AL where the operand is in `flags_operand`. It is in bits 16 to 31 of the recipe otherwise.
pub(crate) const OPERAND: i8 = i8::MIN;

/// How the flags come from the value put aside and an operand.
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

/// The recipe for the flags of an instruction, the register with the value, and that with the operand if it is in one.
pub(super) struct Recipe {
    word: i32,
    value: Register,
    operand: Option<Register>,
}

/// The recipe for the status flags that `instr` leaves.
pub(super) fn recipe(instr: &Instruction) -> Option<Recipe> {
    use Mnemonic as M;
    let value = plain_register(instr, 0)?;
    let kind = match instr.mnemonic() {
        M::And | M::Or | M::Xor => Kind::Logic,
        M::Test if plain_register(instr, 1) == Some(value) => Kind::Logic,
        M::Add => Kind::Sum,
        M::Sub => Kind::Difference,
        M::Cmp => Kind::Compared,
        _ => return None,
    };
    let number = (kind as i32) << 2 | value.size().trailing_zeros() as i32;
    let word = number << 3 | i32::from(MARK);
    if kind == Kind::Logic {
        return Some(Recipe { word, value, operand: None });
    }
    if let Some(operand) = plain_register(instr, 1) {
        // What it was is lost where it is the destination, too.
        let there = operand != value || kind == Kind::Compared;
        let word = word | i32::from(OPERAND as u8);
        return there.then_some(Recipe { word, value, operand: Some(operand) });
    }
    let operand = i16::try_from(immediate(instr)?).ok()?;
    Some(Recipe { word: i32::from(operand) << 16 | word, value, operand: None })
}

/// Operand `n`, if it is a general register from its lowest byte on.
fn plain_register(instr: &Instruction, n: u32) -> Option<Register> {
    let register = instr.op_register(n);
    let plain = instr.op_count() > n
        && instr.op_kind(n) == OpKind::Register
        && register.is_gpr()
        && !regs::is_high_byte(register);
    plain.then_some(register)
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

impl Emitter {
    /// Puts the flags aside right behind the instruction of the recipe. Uses r10.
    pub(super) fn put_aside(&mut self, recipe: &Recipe) {
        let at = ctx!(saved_flags) as i8;
        let registers = [(Some(recipe.value), ctx!(flags_value)), (recipe.operand, ctx!(flags_operand))];
        for (register, at) in registers {
            let Some(register) = register else { continue };
            let host = self.guest(regs::number(register), R10);
            store(&mut self.hot, at, host);
        }
        dynasm!(self.hot ; .arch x64 ; mov DWORD [BYTE rsp + at], recipe.word);
    }
}

//! Host instructions with other registers and memory operands than the guest's. The encoder library can encode all of them; this
//! does it with less than half the work for legacy encodings, which nearly all are, by what the library says of their opcode, asked
//! once for each.

use crate::assembler::SimpleAssembler;
use crate::regs;
use iced_x86::{
    Code, EncodingKind, Instruction, MandatoryPrefix, OpCodeInfo, OpCodeOperandKind, OpCodeTableKind, OpKind,
    Register,
};

/// No operand has this part.
const NONE: u8 = 0xFF;
/// Bytes of an instruction at most, and of all its parts if it had each.
const MAX_LEN: usize = 15;
const ALL_PARTS: usize = 19;

/// How an opcode is encoded: which operand is where.
#[derive(Clone, Copy)]
struct Shape {
    /// 66H before the others: operands of 16 bits. Then F2, F3, 66 or 0 as a part of the opcode.
    words: bool,
    prefix: u8,
    rex_w: bool,
    /// How many of 0F and `second` come before the opcode.
    escapes: u8,
    second: u8,
    opcode: u8,
    /// In the register field where no operand is.
    digit: u8,
    /// Operands in the register field, as `r/m`, in the opcode's low bits, and as an immediate of so many bytes.
    reg: u8,
    rm: u8,
    low: u8,
    immediate: u8,
    immediate_len: u8,
    /// Operands that are bytes, one bit each.
    bytes: u8,
}

impl Shape {
    fn of(code: Code) -> Option<Shape> {
        let info = code.op_code();
        let plain = info.is_instruction()
            && info.encoding() == EncodingKind::Legacy
            && info.mode64()
            && info.op_code_len() == 1
            && info.rm_group_index() < 0
            && info.address_size() == 0
            && !info.fwait();
        if !plain {
            return None;
        }
        let (escapes, second) = match info.table() {
            OpCodeTableKind::Normal => (0, 0),
            OpCodeTableKind::T0F => (1, 0),
            OpCodeTableKind::T0F38 => (2, 0x38),
            OpCodeTableKind::T0F3A => (2, 0x3A),
            _ => return None,
        };
        let prefix = match info.mandatory_prefix() {
            MandatoryPrefix::None | MandatoryPrefix::PNP => 0,
            MandatoryPrefix::P66 => 0x66,
            MandatoryPrefix::PF3 => 0xF3,
            MandatoryPrefix::PF2 => 0xF2,
        };
        let shape = Shape {
            words: info.operand_size() == 16 && prefix != 0x66,
            prefix,
            rex_w: info.operand_size() == 64 && !info.default_op_size64() && !info.force_op_size64(),
            escapes,
            second,
            opcode: info.op_code() as u8,
            digit: info.group_index().max(0) as u8,
            reg: NONE,
            rm: NONE,
            low: NONE,
            immediate: NONE,
            immediate_len: 0,
            bytes: 0,
        };
        shape.with_operands(info)
    }

    fn with_operands(mut self, info: &OpCodeInfo) -> Option<Shape> {
        use OpCodeOperandKind as K;
        for (i, kind) in (0..).zip(info.op_kinds()) {
            let place = match kind {
                K::r8_reg | K::r16_reg | K::r32_reg | K::r64_reg | K::xmm_reg => &mut self.reg,
                K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem | K::xmm_or_mem | K::mem => {
                    &mut self.rm
                }
                K::r8_opcode | K::r16_opcode | K::r32_opcode | K::r64_opcode => &mut self.low,
                K::imm8
                | K::imm8sex16
                | K::imm8sex32
                | K::imm8sex64
                | K::imm16
                | K::imm32
                | K::imm32sex64 => {
                    self.immediate_len = match kind {
                        K::imm16 => 2,
                        K::imm32 | K::imm32sex64 => 4,
                        _ => 1,
                    };
                    &mut self.immediate
                }
                K::cl | K::imm8_const_1 => continue,
                _ => return None,
            };
            if std::mem::replace(place, i) != NONE {
                return None;
            }
            if matches!(kind, K::r8_reg | K::r8_or_mem | K::r8_opcode) {
                self.bytes |= 1 << i;
            }
        }
        // Either there is a ModRM byte or the opcode has a register.
        ((self.rm == NONE) != (self.low == NONE)).then_some(self)
    }
}

/// Which opcodes have which shape, as they are met.
pub(super) struct Shapes(Vec<Option<Option<Shape>>>);

impl Shapes {
    pub(super) fn new() -> Shapes {
        Shapes(vec![None; Code::values().len()])
    }

    /// Appends `instr`, of registers and addresses in 64-bit code, to `ops`; `false`, and nothing appended, if it is for the library.
    pub(super) fn put(&mut self, instr: &Instruction, ops: &mut SimpleAssembler) -> bool {
        let code = instr.code();
        let Some(shape) = *self.0[code as usize].get_or_insert_with(|| Shape::of(code)) else { return false };
        if instr.has_rep_prefix() || instr.has_repne_prefix() {
            return false;
        }
        let mut bytes = Bytes::default();
        let put = bytes.instruction(instr, &shape).is_some();
        if put {
            ops.ops.extend_from_slice(bytes.as_slice());
        }
        put
    }
}

/// A memory operand of host registers.
#[derive(Clone, Copy)]
pub(super) struct Memory {
    pub(super) base: Option<u8>,
    pub(super) index: Option<u8>,
    /// 1, 2, 4 or 8.
    pub(super) scale: u32,
    pub(super) disp: i32,
}

impl Memory {
    /// That of `instr`, and whether its address has 32 bits.
    fn of(instr: &Instruction) -> Option<(Memory, bool)> {
        let (base, index) = (instr.memory_base(), instr.memory_index());
        let named = [base, index].into_iter().filter(|&r| r != Register::None);
        let narrow = match named.clone().next() {
            Some(r) => r.is_gpr32(),
            None => instr.memory_displ_size() == 4,
        };
        let size = if narrow { 4 } else { 8 };
        if named.clone().any(|r| !r.is_gpr() || r.size() != size) {
            return None;
        }
        let number = |r: Register| (r != Register::None).then(|| regs::number(r));
        let disp = instr.memory_displacement64();
        let disp = if narrow { disp as i32 } else { i32::try_from(disp as i64).ok()? };
        let scale = instr.memory_index_scale();
        Some((Memory { base: number(base), index: number(index), scale, disp }, narrow))
    }

    /// REX.X and REX.B.
    fn rex(self) -> u8 {
        let high = |r: Option<u8>| r.is_some_and(|r| r >= 8);
        u8::from(high(self.index)) << 1 | u8::from(high(self.base))
    }
}

/// The bytes of one instruction.
#[derive(Default)]
struct Bytes {
    bytes: [u8; ALL_PARTS],
    len: usize,
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn push(&mut self, byte: u8) {
        self.bytes[self.len] = byte;
        self.len += 1;
    }

    fn push_some(&mut self, value: u64, len: usize) {
        for byte in &value.to_le_bytes()[..len] {
            self.push(*byte);
        }
    }

    fn instruction(&mut self, instr: &Instruction, shape: &Shape) -> Option<()> {
        let register = |operand: u8| {
            let r = instr.op_register(u32::from(operand));
            (!regs::is_high_byte(r)).then(|| regs::number(r))
        };
        let reg = if shape.reg == NONE { shape.digit } else { register(shape.reg)? };
        let memory = shape.rm != NONE && instr.op_kind(u32::from(shape.rm)) == OpKind::Memory;
        let (operand, narrow) = if memory {
            let (operand, narrow) = Memory::of(instr)?;
            (Some(operand), narrow)
        } else {
            (None, false)
        };
        let rm = match (memory, shape.rm) {
            (true, _) => 0,
            (false, NONE) => register(shape.low)?,
            (false, rm) => register(rm)?,
        };
        let byte = |operand: u8, number: u8| operand < 8 && shape.bytes >> operand & 1 != 0 && number >= 4;
        let spl = byte(shape.reg, reg) || !memory && (byte(shape.rm, rm) || byte(shape.low, rm));
        match instr.segment_prefix() {
            Register::None => {}
            Register::GS if memory => self.push(0x65),
            _ => return None,
        }
        if narrow {
            self.push(0x67);
        }
        if instr.has_lock_prefix() {
            self.push(0xF0);
        }
        if shape.words {
            self.push(0x66);
        }
        if shape.prefix != 0 {
            self.push(shape.prefix);
        }
        let rex = u8::from(shape.rex_w) << 3 | reg >> 3 << 2 | operand.map_or(rm >> 3, Memory::rex);
        if rex != 0 || spl {
            self.push(0x40 | rex);
        }
        if shape.escapes > 0 {
            self.push(0x0F);
        }
        if shape.escapes > 1 {
            self.push(shape.second);
        }
        match operand {
            Some(operand) => {
                self.push(shape.opcode);
                self.memory(reg, operand);
            }
            None if shape.rm == NONE => self.push(shape.opcode | rm & 7),
            None => {
                self.push(shape.opcode);
                self.push(0xC0 | (reg & 7) << 3 | rm & 7);
            }
        }
        if shape.immediate != NONE {
            let value = instr.immediate(u32::from(shape.immediate));
            self.push_some(value, usize::from(shape.immediate_len));
        }
        (self.len <= MAX_LEN).then_some(())
    }

    /// ModRM, SIB and displacement.
    fn memory(&mut self, reg: u8, operand: Memory) {
        let Memory { base, index, scale, disp } = operand;
        let short = i8::try_from(disp);
        // RBP and R13 have no form without displacement; without a base there are four bytes of it.
        let (form, len) = match (base, short) {
            (None, _) => (0x00, 4),
            (Some(base), Ok(0)) if base & 7 != 5 => (0x00, 0),
            (_, Ok(_)) => (0x40, 1),
            (_, Err(_)) => (0x80, 4),
        };
        let reg = (reg & 7) << 3;
        match (base, index) {
            (Some(base), None) if base & 7 != 4 => self.push(form | reg | base & 7),
            _ => {
                self.push(form | reg | 4);
                let scale = if index.is_some() { scale.trailing_zeros() as u8 } else { 0 };
                self.push(scale << 6 | (index.unwrap_or(4) & 7) << 3 | base.unwrap_or(5) & 7);
            }
        }
        self.push_some(disp as u64, len);
    }
}

/// LEA of host register `dst`, of 32 bits if `narrow`.
pub(super) fn lea(ops: &mut SimpleAssembler, dst: u8, operand: Memory, narrow: bool) {
    let mut bytes = Bytes::default();
    let rex = u8::from(!narrow) << 3 | dst >> 3 << 2 | operand.rex();
    if rex != 0 {
        bytes.push(0x40 | rex);
    }
    bytes.push(0x8D);
    bytes.memory(dst, operand);
    ops.ops.extend_from_slice(bytes.as_slice());
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Encoder};

    fn decode(bytes: &[u8]) -> Instruction {
        Decoder::with_ip(64, bytes, 0x1000, DecoderOptions::NONE).decode()
    }

    /// What an instruction does, whatever bytes it has.
    fn meaning(bytes: &[u8]) -> Instruction {
        let mut instr = decode(bytes);
        assert_eq!(instr.len(), bytes.len(), "{bytes:x?} is {instr:?}");
        // How long displacements are is free.
        let size = u32::from(instr.memory_displ_size() != 0 && instr.memory_displacement64() != 0);
        instr.set_memory_displ_size(size);
        if instr.memory_index() == Register::None {
            instr.set_memory_index_scale(1);
        }
        instr.set_len(0);
        instr.set_next_ip(0);
        instr
    }

    #[test]
    fn means_what_the_library_encodes() {
        let mut random = 0x9E37_79B9_7F4A_7C15_u64;
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        let (mut shapes, mut encoder) = (Shapes::new(), Encoder::new(64));
        let mut seen = std::collections::HashMap::<Code, u32>::new();
        for n in 0..3_000_000_u32 {
            let mut bytes = [next().to_le_bytes(), next().to_le_bytes()].concat();
            // Often behind prefixes and escapes.
            let start: &[u8] = match n % 16 {
                0 => &[0x0F],
                1 => &[0x66],
                2 => &[0x66, 0x0F],
                3 => &[0xF3, 0x0F],
                4 => &[0xF2, 0x48, 0x0F],
                5 => &[0x66, 0x0F, 0x38],
                6 => &[0x66, 0x0F, 0x3A],
                7 => &[0xF0],
                8 => &[0x65, 0x4F],
                9 => &[0x4D],
                10 => &[0x40],
                11 => &[0x66, 0xF3, 0x0F],
                12 => &[0x66, 0xF2, 0x0F, 0x38],
                13 => &[0x65, 0x67, 0x41],
                14 => &[0x67],
                _ => &[],
            };
            bytes.splice(..0, start.iter().copied());
            let instr = decode(&bytes);
            let mut ops = SimpleAssembler::new();
            if instr.is_invalid() || !shapes.put(&instr, &mut ops) {
                assert!(ops.ops.is_empty());
                continue;
            }
            // Segments that mean nothing in 64-bit code were dropped before.
            encoder.encode(&instr, 0x1000).expect("encodable");
            let library = encoder.take_buffer();
            assert_eq!(meaning(&ops.ops), meaning(&library), "{instr:?}: {:x?}, {library:x?}", ops.ops);
            assert!(ops.ops.len() <= library.len(), "{instr:?}: {:x?}, {library:x?}", ops.ops);
            *seen.entry(instr.code()).or_default() += 1;
        }
        // Of the commonest opcodes none is missing.
        use Code as C;
        for code in [
            C::Mov_r64_rm64,
            C::Mov_rm64_r64,
            C::Mov_r32_rm32,
            C::Mov_rm8_r8,
            C::Mov_rm32_imm32,
            C::Movzx_r32_rm8,
            C::Add_rm64_imm8,
            C::Cmp_rm64_r64,
            C::Test_rm8_imm8,
            C::Lea_r64_m,
            C::Sete_rm8,
            C::Cmovne_r64_rm64,
            C::Shl_rm32_imm8,
            C::Shl_rm32_CL,
            C::Movups_xmm_xmmm128,
            C::Addsd_xmm_xmmm64,
            C::Mov_r32_imm32,
            C::Cmpxchg_rm64_r64,
            C::Bswap_r64,
            C::Popcnt_r16_rm16,
            C::Crc32_r32_rm16,
        ] {
            assert!(seen.contains_key(&code), "{code:?}");
        }
        assert!(seen.len() > 400, "{} opcodes", seen.len());
    }

    #[test]
    fn sums_of_registers() {
        for (base, index) in (0..17).flat_map(|base| (0..17).map(move |index| (base, index))) {
            let register = |n: u8| (n < 16).then_some(n);
            let (base, index) = (register(base), register(index).filter(|&index| index != 4));
            for (disp, scale) in [(0, 1), (127, 2), (-129, 4), (i32::MIN, 8)] {
                let operand = Memory { base, index, scale: if index.is_some() { scale } else { 1 }, disp };
                for narrow in [false, true] {
                    let mut ops = SimpleAssembler::new();
                    lea(&mut ops, 9, operand, narrow);
                    let instr = decode(&ops.ops);
                    let name = |r: Option<u8>| r.map_or(Register::None, |r| Register::RAX + u32::from(r));
                    assert_eq!(instr.code(), if narrow { Code::Lea_r32_m } else { Code::Lea_r64_m });
                    assert_eq!(instr.op0_register(), if narrow { Register::R9D } else { Register::R9 });
                    assert_eq!((instr.memory_base(), instr.memory_index()), (name(base), name(index)));
                    assert_eq!(instr.memory_displacement64(), i64::from(disp) as u64);
                    assert_eq!(instr.memory_index_scale(), operand.scale);
                    assert_eq!(instr.len(), ops.ops.len());
                }
            }
        }
    }
}

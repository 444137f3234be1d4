//! Random instructions of a given form, and states in which their operands lie where they may.

use super::encode::{is_prefix, shortened};
use super::random::Random;
use super::safety::{Exits, Situation};
use crate::host::{NativeLayout, NativeState};
use iced_x86::{Code, CodeSize, Instruction, InstructionInfoFactory, OpCodeOperandKind, OpKind, Register};
use std::ops::Range;
use std::sync::Arc;

/// Where in the code page the instruction lies.
pub const OFFSET: u64 = 0x400;

/// Code with everything it starts from.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its bytes, from [`OFFSET`] in the code page.
    pub code: Vec<u8>,
    /// The last instruction that is executed, as iced-x86 decodes it.
    pub instruction: Instruction,
    /// Registers before.
    pub state: NativeState,
    /// The arena before.
    pub arena: Arc<[u8]>,
    /// Status flags left undefined by what ran before it.
    pub open_before: u64,
    /// Status flags undefined after it.
    pub open: u64,
    /// Bytes of the arena that depend on the processor: pointers of x87 environments.
    pub open_memory: Vec<Range<usize>>,
    /// Whether code lies behind the last instruction, so that flags may be known to be dead there.
    pub followed: bool,
    /// The forms executed, in order; the natural unit of coverage.
    pub executed: Vec<Code>,
    /// How it ended when it was traced.
    pub end: Option<TraceEnd>,
}

impl Case {
    /// A case of one instruction.
    pub(super) fn alone(
        code: Vec<u8>,
        instruction: Instruction,
        state: NativeState,
        arena: Arc<[u8]>,
    ) -> Case {
        let open = super::compare::undefined_flags(&instruction, state.gpr[1]);
        Case {
            code,
            instruction,
            state,
            arena,
            open_before: 0,
            open,
            open_memory: Vec::new(),
            followed: false,
            executed: vec![instruction.code()],
            end: None,
        }
    }
}

/// Where a trace ended.
#[derive(Clone, Debug)]
pub struct TraceEnd {
    /// The host's registers.
    pub state: NativeState,
    /// Where it would go on, if no exception ended it.
    pub exits: Exits,
}

/// Draws cases for one mode and layout.
pub struct Generator {
    /// 16, 32 or 64.
    pub bits: u32,
    /// Where code and arena lie, as the code addresses them.
    pub layout: NativeLayout,
    /// Addresses to point operands at rather than at the arena; usually none.
    pub(super) aims: Vec<u64>,
    /// Operands of all kinds, to cut arenas and vector registers from.
    pool: Vec<u8>,
}

/// Bytes of operands prepared once.
const POOL: usize = 256 << 10;

impl Generator {
    /// For code of `bits` in `layout`.
    pub fn new(bits: u32, layout: NativeLayout) -> Generator {
        let mut random = Random::new(0);
        let pool = (0..POOL / 8).flat_map(|_| random.lanes().to_le_bytes()).collect();
        Generator { bits, layout, aims: Vec::new(), pool }
    }

    /// A case of form `code`, or none if the dice produced nothing encodable and harmless.
    pub fn case(&self, code: Code, random: &mut Random) -> Option<Case> {
        let mut state = self.random_state(random);
        let mut arena = self.random_arena(random);
        let drawn = self.draw(code, OFFSET, &mut state, random)?;
        if let Some(drawn) = &drawn {
            self.favour(drawn, &mut state, Arc::make_mut(&mut arena), random);
        }
        let (bytes, instruction) = self.finish(code, drawn, OFFSET, random)?;
        let case = Case::alone(bytes, instruction, state, arena);
        self.is_acceptable(&case).then_some(case)
    }

    /// Whether a case of one instruction may run natively, and to some purpose.
    pub(super) fn is_acceptable(&self, case: &Case) -> bool {
        let now = self.situation(case);
        let accesses = now.accesses(&mut InstructionInfoFactory::new(), &[]);
        accesses.harmless && !super::vendor::differs(&now)
    }

    /// A case of one instruction as it begins.
    pub(super) fn situation<'a>(&self, case: &'a Case) -> Situation<'a> {
        Situation {
            instruction: &case.instruction,
            bytes: &case.code,
            state: &case.state,
            arena: &case.arena,
            layout: self.layout,
            bits: self.bits,
        }
    }

    /// Random registers.
    pub fn random_state(&self, random: &mut Random) -> NativeState {
        super::state::random_state(self.bits, &self.pool, random)
    }

    /// Operands of all kinds.
    pub fn random_arena(&self, random: &mut Random) -> Arc<[u8]> {
        let length = self.layout.data_len() as usize;
        let start = random.below(((POOL - length) / 8) as u64) as usize * 8;
        let mut arena: Arc<[u8]> = self.pool[start..start + length].into();
        let bytes = Arc::make_mut(&mut arena);
        for _ in 0..16 {
            let at = random.below((length / 8) as u64) as usize * 8;
            bytes[at..at + 8].copy_from_slice(&random.lanes().to_le_bytes());
        }
        arena
    }

    /// An instruction of form `code` for `offset` in the code page; registers are changed where operands would not
    /// lie anywhere useful otherwise. The inner none stands for [`Code::INVALID`], which has no operands.
    pub(super) fn draw(
        &self,
        code: Code,
        offset: u64,
        state: &mut NativeState,
        random: &mut Random,
    ) -> Option<Option<Instruction>> {
        if code == Code::INVALID {
            return Some(None);
        }
        let mut instruction = self.instruction(code, self.layout.code + offset, random)?;
        self.place(&mut instruction, state, random);
        Some(Some(instruction))
    }

    /// Bytes of what [`Self::draw`] drew, for `offset`, and what they decode to.
    pub(super) fn finish(
        &self,
        code: Code,
        drawn: Option<Instruction>,
        offset: u64,
        random: &mut Random,
    ) -> Option<(Vec<u8>, Instruction)> {
        let ip = self.layout.code + offset;
        let bytes = match drawn {
            Some(instruction) => self.encode(&instruction, ip, random)?,
            None => self.undefined(ip, random)?,
        };
        let decoded = self.decode(&bytes, ip);
        let acceptable = if decoded.is_invalid() {
            // Too long, a prefix that the form does not take, or the undefined opcode that was asked for. What is both too
            // long and undefined is #GP or #UD as the processor likes.
            match shortened(&bytes) {
                Some(short) => !self.decode(&short, ip).is_invalid(),
                None => (code == Code::INVALID || is_prefix(bytes[0])) && !self.is_too_long(&bytes, ip),
            }
        } else {
            decoded.len() == bytes.len() && super::forms::admit(decoded.code(), self.bits).is_ok()
        };
        acceptable.then_some((bytes, decoded))
    }

    fn instruction(&self, code: Code, ip: u64, random: &mut Random) -> Option<Instruction> {
        let op = code.op_code();
        let mut instruction = Instruction::default();
        instruction.set_code(code);
        instruction.set_code_size(match self.bits {
            64 => CodeSize::Code64,
            32 => CodeSize::Code32,
            _ => CodeSize::Code16,
        });
        let mut immediates = 0;
        for (operand, &kind) in op.op_kinds().iter().enumerate() {
            let number = operand as u32;
            if !self.operand(&mut instruction, number, kind, ip, &mut immediates, random) {
                return None;
            }
        }
        let memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
        if op.can_use_lock_prefix() && (memory && random.one_in(4) || random.one_in(64)) {
            instruction.set_has_lock_prefix(true);
        }
        if op.can_use_rep_prefix() && random.one_in(2) {
            instruction.set_has_rep_prefix(true);
        } else if op.can_use_repne_prefix() && random.one_in(2) {
            instruction.set_has_repne_prefix(true);
        }
        Some(instruction)
    }

    /// Chooses operand `number`; false for kinds that no admitted form has.
    fn operand(
        &self,
        i: &mut Instruction,
        number: u32,
        kind: OpCodeOperandKind,
        ip: u64,
        immediates: &mut u32,
        random: &mut Random,
    ) -> bool {
        use OpCodeOperandKind as K;
        let register = |i: &mut Instruction, r: Register| {
            i.set_op_kind(number, OpKind::Register);
            i.set_op_register(number, r);
            true
        };
        let count = if self.bits == 64 { 16 } else { 8 };
        let memory = random.one_in(2);
        match kind {
            K::mem | K::mem_mib | K::sibmem => self.memory(i, number, None, random),
            K::mem_vsib32x | K::mem_vsib64x => self.memory(i, number, Some(Register::XMM0), random),
            K::mem_vsib32y | K::mem_vsib64y => self.memory(i, number, Some(Register::YMM0), random),
            K::mem_offs => self.absolute(i, number),
            K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::mm_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem
                if memory =>
            {
                self.memory(i, number, None, random)
            }
            K::r8_or_mem | K::r8_reg | K::r8_opcode => {
                let count = if self.bits == 64 { 20 } else { 8 };
                register(i, Register::AL + random.below(count) as u32)
            }
            K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_opcode => {
                register(i, Register::AX + random.below(count) as u32)
            }
            K::r32_or_mem | K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv => {
                register(i, Register::EAX + random.below(count) as u32)
            }
            K::r64_or_mem | K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv => {
                register(i, Register::RAX + random.below(count) as u32)
            }
            K::seg_reg => register(i, Register::ES + random.below(6) as u32),
            K::mm_or_mem | K::mm_reg | K::mm_rm => register(i, Register::MM0 + random.below(8) as u32),
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => {
                register(i, Register::XMM0 + random.below(count) as u32)
            }
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => {
                register(i, Register::YMM0 + random.below(count) as u32)
            }
            K::cr_reg => register(i, Register::CR0 + random.pick(&[0, 2, 3, 4])),
            K::dr_reg => register(i, Register::DR0 + random.below(8) as u32),
            K::es => register(i, Register::ES),
            K::cs => register(i, Register::CS),
            K::ss => register(i, Register::SS),
            K::ds => register(i, Register::DS),
            K::fs => register(i, Register::FS),
            K::gs => register(i, Register::GS),
            K::al => register(i, Register::AL),
            K::cl => register(i, Register::CL),
            K::ax => register(i, Register::AX),
            K::dx => register(i, Register::DX),
            K::eax => register(i, Register::EAX),
            K::rax => register(i, Register::RAX),
            K::st0 => register(i, Register::ST0),
            K::sti_opcode => register(i, Register::ST0 + random.below(8) as u32),
            K::seg_rSI | K::es_rDI | K::seg_rDI | K::seg_rBX_al => self.implicit(i, number, kind, random),
            K::br16_1 | K::br32_1 | K::br64_1 | K::br16_2 | K::br32_4 | K::br64_4 => {
                let short = matches!(kind, K::br16_1 | K::br32_1 | K::br64_1);
                let distance = 16 + random.below(if short { 90 } else { 900 });
                let (kind, mask) = match kind {
                    K::br16_1 | K::br16_2 => (OpKind::NearBranch16, 0xFFFF),
                    K::br32_1 | K::br32_4 => (OpKind::NearBranch32, 0xFFFF_FFFF),
                    _ => (OpKind::NearBranch64, u64::MAX),
                };
                i.set_op_kind(number, kind);
                i.set_near_branch64((ip + distance) & mask);
                true
            }
            _ => immediate(i, number, kind, immediates, random),
        }
    }

    fn implicit(
        &self,
        i: &mut Instruction,
        number: u32,
        kind: OpCodeOperandKind,
        random: &mut Random,
    ) -> bool {
        use OpCodeOperandKind as K;
        let width = self.address_bytes(random);
        let chosen = match (kind, width) {
            (K::seg_rSI, 8) => OpKind::MemorySegRSI,
            (K::seg_rSI, 4) => OpKind::MemorySegESI,
            (K::seg_rSI, _) => OpKind::MemorySegSI,
            (K::es_rDI, 8) => OpKind::MemoryESRDI,
            (K::es_rDI, 4) => OpKind::MemoryESEDI,
            (K::es_rDI, _) => OpKind::MemoryESDI,
            (K::seg_rDI, 8) => OpKind::MemorySegRDI,
            (K::seg_rDI, 4) => OpKind::MemorySegEDI,
            (K::seg_rDI, _) => OpKind::MemorySegDI,
            _ => OpKind::Memory,
        };
        i.set_op_kind(number, chosen);
        if chosen == OpKind::Memory {
            i.set_memory_base(match width {
                8 => Register::RBX,
                4 => Register::EBX,
                _ => Register::BX,
            });
            i.set_memory_index(Register::AL);
        }
        true
    }

    /// `mov al, [moffs]`: an absolute address in the arena.
    fn absolute(&self, i: &mut Instruction, number: u32) -> bool {
        i.set_op_kind(number, OpKind::Memory);
        i.set_memory_displ_size(self.bits / 8);
        i.set_memory_displacement64(self.layout.data + 0x123);
        true
    }

    /// ModRM and SIB forms: every base, index, scale and displacement.
    fn memory(&self, i: &mut Instruction, number: u32, vsib: Option<Register>, random: &mut Random) -> bool {
        i.set_op_kind(number, OpKind::Memory);
        let width = match self.address_bytes(random) {
            2 if vsib.is_some() => 4,
            width => width,
        };
        if width == 2 {
            return short_memory(i, random);
        }
        let wide = width == 8;
        let first = if wide { Register::RAX } else { Register::EAX };
        let count = if self.bits == 64 { 16 } else { 8 };
        if self.bits == 64 && vsib.is_none() && random.one_in(12) {
            i.set_memory_base(if wide { Register::RIP } else { Register::EIP });
            i.set_memory_displ_size(if wide { 8 } else { 4 });
            i.set_memory_displacement64(self.layout.data);
            return true;
        }
        let base = !random.one_in(10);
        if base {
            i.set_memory_base(first + random.below(count) as u32);
        }
        if let Some(vector) = vsib {
            i.set_memory_index(vector + random.below(count) as u32);
        } else if random.one_in(2) {
            let index = random.below(count) as u32;
            if index != 4 {
                i.set_memory_index(first + index);
            }
        }
        if i.memory_index() != Register::None {
            i.set_memory_index_scale(1 << random.below(4));
        }
        let wide_displacement = if wide { 8 } else { 4 };
        let (size, displacement) = match random.below(3) {
            0 if base => (0, 0),
            1 => (1, i64::from(random.bits() as i8)),
            _ => (wide_displacement, i64::from(random.integer() as i32)),
        };
        i.set_memory_displ_size(if base || vsib.is_some() { size } else { size.max(1) });
        i.set_memory_displacement64(if wide { displacement as u64 } else { displacement as u32 as u64 });
        true
    }

    /// The address size: mostly the mode's own.
    fn address_bytes(&self, random: &mut Random) -> u64 {
        match self.bits {
            64 if random.one_in(8) => 4,
            64 => 8,
            32 if random.one_in(12) => 2,
            32 => 4,
            _ if random.one_in(3) => 4,
            _ => 2,
        }
    }
}

/// The eight forms of 16-bit addressing, and a displacement alone (SDM 2A, table 2-1).
fn short_memory(i: &mut Instruction, random: &mut Random) -> bool {
    use Register as R;
    const FORMS: [(R, R); 9] = [
        (R::BX, R::SI),
        (R::BX, R::DI),
        (R::BP, R::SI),
        (R::BP, R::DI),
        (R::SI, R::None),
        (R::DI, R::None),
        (R::BP, R::None),
        (R::BX, R::None),
        (R::None, R::None),
    ];
    let (base, index) = random.pick(&FORMS);
    i.set_memory_base(base);
    i.set_memory_index(index);
    let (size, displacement) = match random.below(3) {
        0 if base != R::None && base != R::BP => (0, 0),
        1 if base != R::None => (1, i64::from(random.bits() as i8) as u64 & 0xFFFF),
        _ => (2, random.integer() & 0xFFFF),
    };
    i.set_memory_displ_size(size);
    i.set_memory_displacement64(displacement);
    true
}

/// Immediates; false for kinds that are none.
fn immediate(
    i: &mut Instruction,
    number: u32,
    kind: OpCodeOperandKind,
    before: &mut u32,
    random: &mut Random,
) -> bool {
    use OpCodeOperandKind as K;
    let value = random.integer();
    *before += 1;
    let small = value as u8 as i8;
    match kind {
        K::imm8 if *before == 2 => {
            i.set_op_kind(number, OpKind::Immediate8_2nd);
            i.set_immediate8_2nd(value as u8 & if random.one_in(4) { 0xFF } else { 3 });
        }
        K::imm8 => {
            i.set_op_kind(number, OpKind::Immediate8);
            i.set_immediate8(value as u8);
        }
        K::imm8_const_1 => {
            i.set_op_kind(number, OpKind::Immediate8);
            i.set_immediate8(1);
        }
        K::imm8sex16 => {
            i.set_op_kind(number, OpKind::Immediate8to16);
            i.set_immediate8to16(i16::from(small));
        }
        K::imm8sex32 => {
            i.set_op_kind(number, OpKind::Immediate8to32);
            i.set_immediate8to32(i32::from(small));
        }
        K::imm8sex64 => {
            i.set_op_kind(number, OpKind::Immediate8to64);
            i.set_immediate8to64(i64::from(small));
        }
        K::imm16 => {
            i.set_op_kind(number, OpKind::Immediate16);
            i.set_immediate16(value as u16);
        }
        K::imm32 => {
            i.set_op_kind(number, OpKind::Immediate32);
            i.set_immediate32(value as u32);
        }
        K::imm32sex64 => {
            i.set_op_kind(number, OpKind::Immediate32to64);
            i.set_immediate32to64(i64::from(value as i32));
        }
        K::imm64 => {
            i.set_op_kind(number, OpKind::Immediate64);
            i.set_immediate64(value);
        }
        _ => return false,
    }
    true
}

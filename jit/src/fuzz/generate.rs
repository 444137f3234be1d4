//! Random instructions of a given form, and states in which their operands lie where they may.

use super::random::Random;
use crate::host::{NativeLayout, NativeState};
use iced_x86::{Code, Decoder, DecoderOptions, Encoder, Instruction, OpCodeOperandKind, OpKind, Register};
use paravane_cpu::{FpuState, flags};

/// Where in the code page the instruction lies.
pub const OFFSET: u64 = 0x400;

/// One instruction with everything it starts from.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its bytes.
    pub code: Vec<u8>,
    /// As iced-x86 decodes them.
    pub instruction: Instruction,
    /// Registers before.
    pub state: NativeState,
    /// The arena before.
    pub arena: Vec<u8>,
    /// Status flags left undefined by what ran before it.
    pub open_before: u64,
    /// Status flags undefined after it.
    pub open: u64,
}

/// Draws cases for one mode and layout.
pub struct Generator {
    /// 32 or 64.
    pub bits: u32,
    /// Where code and arena lie.
    pub layout: NativeLayout,
}

impl Generator {
    /// A case of form `code`, or none if the dice produced nothing encodable and harmless.
    pub fn case(&self, code: Code, random: &mut Random) -> Option<Case> {
        let state = random_state(self.bits, random);
        self.case_in(code, OFFSET, state, self.random_arena(random), random)
    }

    /// Operands of all kinds.
    pub fn random_arena(&self, random: &mut Random) -> Vec<u8> {
        let mut arena = vec![0; self.layout.data_len() as usize];
        for word in arena.chunks_exact_mut(8) {
            word.copy_from_slice(&random.lanes().to_le_bytes());
        }
        arena
    }

    /// The same at `offset` in the code page with registers and arena given; these are changed where
    /// operands would not lie anywhere useful otherwise.
    pub fn case_in(
        &self,
        code: Code,
        offset: u64,
        mut state: NativeState,
        mut arena: Vec<u8>,
        random: &mut Random,
    ) -> Option<Case> {
        let ip = self.layout.code + offset;
        let mut instruction = self.instruction(code, ip, random)?;
        self.place(&mut instruction, &mut state, random);
        self.favour(&instruction, &mut state, &mut arena, random);
        let bytes = self.encode(&instruction, ip, random)?;
        let decoded = self.decode(&bytes, ip);
        let acceptable = if decoded.is_invalid() {
            // Processor and decoder agree on #UD where only LOCK is to blame.
            bytes.contains(&0xF0) && self.decode_unlocked(&bytes, ip).code() == code
        } else {
            decoded.len() == bytes.len() && super::forms::admit(decoded.code(), self.bits).is_ok()
        };
        let open = super::compare::undefined_flags(&decoded, state.gpr[1]);
        let case = Case { code: bytes, instruction: decoded, state, arena, open_before: 0, open };
        let differs = super::vendor::differs(&case.instruction, &case.code, &case.state);
        (acceptable && !differs && super::safety::is_harmless(&case, self.bits)).then_some(case)
    }

    pub(super) fn decode(&self, bytes: &[u8], ip: u64) -> Instruction {
        Decoder::with_ip(self.bits, bytes, ip, DecoderOptions::NONE).decode()
    }

    fn decode_unlocked(&self, bytes: &[u8], ip: u64) -> Instruction {
        let rest: Vec<u8> = bytes.iter().copied().filter(|&b| b != 0xF0).collect();
        self.decode(&rest, ip)
    }

    fn encode(&self, instruction: &Instruction, ip: u64, random: &mut Random) -> Option<Vec<u8>> {
        let mut encoder = Encoder::new(self.bits);
        encoder.encode(instruction, ip).ok()?;
        let mut bytes = encoder.take_buffer();
        // A redundant or meaningless prefix now and then; relative operands would mean something else.
        if random.one_in(12) && !instruction.is_ip_rel_memory_operand() && !has_branch(instruction) {
            let prefix = random.pick(&[0x66, 0x67, 0xF2, 0xF3, 0xF0, 0x2E, 0x36, 0x3E, 0x26]);
            bytes.insert(0, prefix);
        }
        (bytes.len() <= 15).then_some(bytes)
    }

    fn instruction(&self, code: Code, ip: u64, random: &mut Random) -> Option<Instruction> {
        let op = code.op_code();
        let mut instruction = Instruction::default();
        instruction.set_code(code);
        instruction.set_code_size(if self.bits == 64 {
            iced_x86::CodeSize::Code64
        } else {
            iced_x86::CodeSize::Code32
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
            K::br32_1 | K::br64_1 | K::br32_4 | K::br64_4 => {
                let distance =
                    16 + random.below(if matches!(kind, K::br32_1 | K::br64_1) { 90 } else { 900 });
                i.set_op_kind(
                    number,
                    if self.bits == 64 { OpKind::NearBranch64 } else { OpKind::NearBranch32 },
                );
                i.set_near_branch64(ip + distance);
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
        let short = random.one_in(8);
        // The address size chooses between the 64- and the 32-bit registers (32 and 16 are not worth a low arena).
        let wide = self.bits == 64 && !short;
        let chosen = match kind {
            K::seg_rSI if wide => OpKind::MemorySegRSI,
            K::seg_rSI => OpKind::MemorySegESI,
            K::es_rDI if wide => OpKind::MemoryESRDI,
            K::es_rDI => OpKind::MemoryESEDI,
            K::seg_rDI if wide => OpKind::MemorySegRDI,
            K::seg_rDI => OpKind::MemorySegEDI,
            _ => OpKind::Memory,
        };
        i.set_op_kind(number, chosen);
        if chosen == OpKind::Memory {
            i.set_memory_base(if wide { Register::RBX } else { Register::EBX });
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
        let wide = self.bits == 64 && !random.one_in(8);
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

    /// Where memory operands may lie: aligned, anywhere, across a page, at the arena's ends, read-only.
    fn target(&self, size: u64, random: &mut Random) -> u64 {
        let data = self.layout.data;
        let length = self.layout.data_len();
        let writable = self.layout.writable_pages * 4096;
        match random.below(16) {
            0 => data + 4096 - random.below(size + 1),
            1 => data + length - random.below(size + 1),
            2 => data.wrapping_sub(random.below(size + 1)),
            3 => data + writable + random.below(length - writable),
            4..8 => data + random.below(writable - size),
            _ => data + (random.below(writable - size) & !63),
        }
    }

    /// Makes the effective addresses of all memory operands meet their targets.
    fn place(&self, i: &mut Instruction, state: &mut NativeState, random: &mut Random) {
        let size = (i.memory_size().size() as u64).clamp(1, 512);
        let middle = self.layout.data + 0x800;
        for register in [6, 7] {
            let string = (0..i.op_count()).any(|n| is_string(i.op_kind(n)));
            if string {
                state.gpr[register] = self.target(size.min(64), random);
            }
        }
        if !random.one_in(16) {
            state.gpr[4] = middle + random.below(0x100) * if random.one_in(4) { 1 } else { 8 };
        }
        if i.is_stack_instruction() && !random.one_in(8) {
            state.gpr[5] = middle + random.below(0x100) * 8;
        }
        let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
        if memory && !random.one_in(24) {
            let target = self.target(size, random);
            if !self.reuse(i, state, target, random) {
                solve(i, state, target, random);
            }
        }
    }

    /// Now and then takes a base that points into the arena already, as fields of one structure have: in sequences
    /// several accesses then share it.
    fn reuse(&self, i: &mut Instruction, state: &NativeState, target: u64, random: &mut Random) -> bool {
        let base = i.memory_base();
        let inside = |value: u64| value.wrapping_sub(self.layout.data) < self.layout.data_len();
        let count = if self.bits == 64 { 16 } else { 8 };
        let pointers: Vec<usize> = (0..count).filter(|&n| inside(state.gpr[n])).collect();
        let plain = (base.is_gpr64() || base.is_gpr32()) && !i.memory_index().is_vector_register();
        if !plain || i.memory_index() == Register::AL || pointers.is_empty() || random.one_in(2) {
            return false;
        }
        let number = random.pick(&pointers);
        let (first, size) = if base.is_gpr64() { (Register::RAX, 8) } else { (Register::EAX, 4) };
        let displacement = target.wrapping_sub(state.gpr[number]);
        i.set_memory_base(first + number as u32);
        i.set_memory_index(Register::None);
        i.set_memory_displ_size(size);
        i.set_memory_displacement64(if size == 8 { displacement } else { displacement & 0xFFFF_FFFF });
        true
    }

    /// Values without which interesting outcomes would be rare.
    fn favour(&self, i: &Instruction, state: &mut NativeState, arena: &mut [u8], random: &mut Random) {
        use iced_x86::Mnemonic as M;
        match i.mnemonic() {
            M::Div | M::Idiv if random.one_in(2) => state.gpr[2] = random.below(3),
            M::Cmpxchg | M::Cmpxchg8b | M::Cmpxchg16b | M::Scasb | M::Scasw | M::Scasd | M::Scasq
                if random.one_in(2) =>
            {
                let (rax, rdx) = (state.gpr[0], state.gpr[2]);
                let high = if i.mnemonic() == M::Cmpxchg8b { 4 } else { 8 };
                for chunk in arena.chunks_exact_mut(64) {
                    chunk[..8].copy_from_slice(&rax.to_le_bytes());
                    chunk[high..high + 8].copy_from_slice(&rdx.to_le_bytes());
                }
            }
            M::Bt | M::Bts | M::Btr | M::Btc if i.op1_kind() == OpKind::Register && random.one_in(2) => {
                let register = i.op1_register().full_register().number();
                if !matches!(i.op0_kind(), OpKind::Memory) {
                    state.gpr[register] = random.below(0x2000).wrapping_sub(0x1000);
                }
            }
            _ => {}
        }
        if i.has_rep_prefix() || i.has_repne_prefix() {
            state.gpr[1] = if random.one_in(8) { random.integer() } else { random.below(70) };
        }
    }
}

fn has_branch(i: &Instruction) -> bool {
    (0..i.op_count())
        .any(|n| matches!(i.op_kind(n), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64))
}

fn is_string(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::MemorySegRSI
            | OpKind::MemorySegESI
            | OpKind::MemoryESRDI
            | OpKind::MemoryESEDI
            | OpKind::MemorySegRDI
            | OpKind::MemorySegEDI
    )
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

/// Chooses registers, or the displacement where there is none, so that the operand lies at `target`.
fn solve(i: &mut Instruction, state: &mut NativeState, target: u64, random: &mut Random) {
    let (base, index) = (i.memory_base(), i.memory_index());
    if matches!(base, Register::RIP | Register::EIP) {
        i.set_memory_displacement64(target);
        return;
    }
    if index == Register::AL {
        let offset = state.gpr[0] & 0xFF;
        set_address(state, base, target.wrapping_sub(offset));
        return;
    }
    let scale = u64::from(i.memory_index_scale());
    if index.is_vector_register() {
        scatter_indices(state, index, random);
        if base == Register::None {
            i.set_memory_displ_size(8);
            i.set_memory_displacement64(target);
        } else {
            set_address(state, base, target.wrapping_sub(i.memory_displacement64()));
        }
        return;
    }
    if base == Register::None && index == Register::None {
        i.set_memory_displ_size(i.memory_displ_size().max(4));
        i.set_memory_displacement64(target);
        return;
    }
    if base != Register::None && base != index {
        let scaled = if index == Register::None { 0 } else { state.gpr[index.number()].wrapping_mul(scale) };
        set_address(state, base, target.wrapping_sub(i.memory_displacement64()).wrapping_sub(scaled));
        return;
    }
    let factor = scale + u64::from(base != Register::None);
    set_address(state, index, target / factor);
    i.set_memory_displ_size(i.memory_displ_size().max(1));
    i.set_memory_displacement64(target % factor);
}

/// Sets an address register; of a 32-bit one the upper half stays, which addressing must ignore.
fn set_address(state: &mut NativeState, register: Register, value: u64) {
    let slot = &mut state.gpr[register.number()];
    *slot = if register.size() == 4 { (*slot & !0xFFFF_FFFF) | (value & 0xFFFF_FFFF) } else { value };
}

/// Small signed indices in all elements, as doublewords or quadwords.
fn scatter_indices(state: &mut NativeState, register: Register, random: &mut Random) {
    let number = register.number();
    let wide = random.one_in(2);
    let mut bytes = [0u8; 32];
    for element in bytes.chunks_exact_mut(8) {
        let (low, high) = (random.below(64) as i64 - 8, random.below(64) as i64 - 8);
        let value = if wide { low as u64 } else { u64::from(low as u32) | u64::from(high as u32) << 32 };
        element.copy_from_slice(&value.to_le_bytes());
    }
    state.fpu.0[160 + 16 * number..][..16].copy_from_slice(&bytes[..16]);
    state.fpu.0[576 + 16 * number..][..16].copy_from_slice(&bytes[16..]);
}

/// Random registers. Control words mostly mask everything, as programs do.
pub fn random_state(bits: u32, random: &mut Random) -> NativeState {
    let gpr = std::array::from_fn(|n| match bits {
        32 if n >= 8 => 0,
        32 => random.integer() & 0xFFFF_FFFF,
        _ => random.integer(),
    });
    let mut rflags = flags::FIXED | flags::IF | (random.bits() & flags::STATUS);
    if random.one_in(4) {
        rflags |= flags::DF;
    }
    NativeState { gpr, rflags, fpu: random_fpu(random) }
}

fn random_fpu(random: &mut Random) -> FpuState {
    let mut fpu = FpuState::initial();
    let masks = |random: &mut Random| if random.one_in(6) { random.bits() as u16 & 0x3F } else { 0x3F };
    let control =
        0x40 | masks(random) | (random.bits() as u16 & 0xC00) | random.pick(&[0x300, 0x300, 0x200, 0]);
    let mut status = random.bits() as u16 & 0x7F00 & !0x8000;
    if random.one_in(4) {
        status |= random.bits() as u16 & 0x7F;
    }
    if status & !control & 0x3F != 0 {
        status |= 0x8080;
    }
    let any = random.bits() as u8;
    let tags = random.pick(&[0xFF, 0, any]);
    fpu.0[0..2].copy_from_slice(&control.to_le_bytes());
    fpu.0[2..4].copy_from_slice(&status.to_le_bytes());
    fpu.0[4] = tags;
    for register in 0..8 {
        let (significand, exponent) = random.extended();
        let at = 32 + 16 * register;
        fpu.0[at..at + 8].copy_from_slice(&significand.to_le_bytes());
        fpu.0[at + 8..at + 10].copy_from_slice(&exponent.to_le_bytes());
    }
    let simd = u32::from(masks(random)) << 7;
    let rounding = if random.one_in(2) { random.bits() as u32 & 0x6000 } else { 0 };
    let special = if random.one_in(6) { random.bits() as u32 & 0x807F } else { 0 };
    fpu.set_mxcsr(simd | rounding | special);
    for at in (160..416).chain(576..832).step_by(8) {
        fpu.0[at..at + 8].copy_from_slice(&random.lanes().to_le_bytes());
    }
    fpu
}

//! Register values with which an instruction's operands lie where it is interesting: aligned, anywhere, across a page, at the
//! arena's ends, on read-only pages, on each other.

use super::generate::Generator;
use super::random::Random;
use crate::groups;
use crate::host::NativeState;
use iced_x86::{CodeSize, Instruction, Mnemonic, OpKind, Register};
use paravane_memory::split_locks_are_dear;

impl Generator {
    /// Where memory operands may lie: aligned, anywhere, across a page, at the arena's ends, read-only.
    fn target(&self, size: u64, random: &mut Random) -> u64 {
        if !self.aims.is_empty() && !random.one_in(4) {
            return random.pick(&self.aims).wrapping_add(random.below(3) * 4);
        }
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
    pub(super) fn place(&self, i: &mut Instruction, state: &mut NativeState, random: &mut Random) {
        let size = (i.memory_size().size() as u64).clamp(1, 512);
        self.place_strings(i, size, state, random);
        self.place_stack(i, state, random);
        let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
        if memory && !random.one_in(24) {
            let mut target = self.target(size, random);
            if groups::is_locked(i) && split_locks_are_dear() && !random.one_in(2_000) {
                // The host itself executes it, too.
                target &= !(size.next_power_of_two() - 1);
            }
            if !self.reuse(i, state, target, random) {
                solve(i, state, target, random);
            }
        }
    }

    /// RSI and RDI, near each other now and then; a count that is small, or anything.
    fn place_strings(&self, i: &Instruction, size: u64, state: &mut NativeState, random: &mut Random) {
        if !(0..i.op_count()).any(|n| is_string(i.op_kind(n))) {
            return;
        }
        state.gpr[6] = self.target(size.min(64), random);
        state.gpr[7] = if random.one_in(3) {
            state.gpr[6].wrapping_add(random.below(48)).wrapping_sub(24)
        } else {
            self.target(size.min(64), random)
        };
        if i.has_rep_prefix() || i.has_repne_prefix() {
            state.gpr[1] = match random.below(8) {
                0 if self.bits == 64 => random.integer(),
                0 => random.integer() & 0xFFFF_FFFF,
                1 => random.below(3000),
                _ => random.below(70),
            };
        }
    }

    /// A stack pointer inside the arena, where it is not there already, and a frame pointer for LEAVE and ENTER.
    fn place_stack(&self, i: &Instruction, state: &mut NativeState, random: &mut Random) {
        let kept = if self.bits == 16 { state.gpr[4] & 0xFFFF_0000 } else { 0 };
        let writable = self.layout.writable_pages * 4096;
        let inside = (state.gpr[4] - kept).wrapping_sub(self.layout.data + 128) < writable - 256;
        let middle = self.layout.data + 0x800;
        if i.is_stack_instruction() && random.one_in(24) {
            state.gpr[4] = kept | self.target(16, random);
        } else if !inside {
            state.gpr[4] = kept | (middle + random.below(0x100) * if random.one_in(4) { 1 } else { 8 });
        }
        if matches!(i.mnemonic(), Mnemonic::Leave | Mnemonic::Enter) && !random.one_in(8) {
            state.gpr[5] = middle + random.below(0x100) * 8;
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
    pub(super) fn favour(
        &self,
        i: &Instruction,
        state: &mut NativeState,
        arena: &mut [u8],
        random: &mut Random,
    ) {
        use Mnemonic as M;
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
    }
}

fn is_string(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::MemorySegSI
            | OpKind::MemoryESDI
            | OpKind::MemorySegDI
            | OpKind::MemorySegRSI
            | OpKind::MemorySegESI
            | OpKind::MemoryESRDI
            | OpKind::MemoryESEDI
            | OpKind::MemorySegRDI
            | OpKind::MemorySegEDI
    )
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
            i.set_memory_displ_size(if i.code_size() == CodeSize::Code64 { 8 } else { 4 });
            i.set_memory_displacement64(target);
        } else {
            set_address(state, base, target.wrapping_sub(i.memory_displacement64()));
        }
        return;
    }
    if base == Register::None && index == Register::None {
        if i.memory_displ_size() != 2 {
            i.set_memory_displ_size(i.memory_displ_size().max(4));
        }
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

/// Sets an address register; of a shorter one the upper part stays, which addressing must ignore.
fn set_address(state: &mut NativeState, register: Register, value: u64) {
    let slot = &mut state.gpr[register.number()];
    *slot = match register.size() {
        2 => (*slot & !0xFFFF) | (value & 0xFFFF),
        4 => (*slot & !0xFFFF_FFFF) | (value & 0xFFFF_FFFF),
        _ => value,
    };
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

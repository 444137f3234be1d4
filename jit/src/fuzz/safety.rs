//! Which instructions may run natively: those whose every access stays in the arena or hits what is surely unmapped.

use super::generate::OFFSET;
use crate::host::{CODE_ROOM, NativeLayout, NativeState};
use iced_x86::{
    Code, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register, UsedMemory,
};

use paravane_cpu::flags;
use std::ops::Range;

/// Below 4 GiB this process maps nothing but code page and arena.
const LOW: u64 = 1 << 32;
const PAGE: u64 = 4096;

/// Offsets in the code page at which code is expected to end.
#[derive(Clone, Copy, Default, Debug)]
pub struct Exits {
    at: [usize; 2],
    count: usize,
}

impl Exits {
    /// Adds the offset `at`, if code may lie there; up to two.
    pub fn add(&mut self, at: u64) {
        if CODE_ROOM.contains(&(at as usize)) && !self.offsets().contains(&(at as usize)) {
            self.at[self.count] = at as usize;
            self.count += 1;
        }
    }

    /// All of them.
    pub fn offsets(&self) -> &[usize] {
        &self.at[..self.count]
    }
}

/// One instruction about to run.
#[derive(Clone, Copy)]
pub struct Situation<'a> {
    /// As iced-x86 decodes it.
    pub instruction: &'a Instruction,
    /// Its bytes.
    pub bytes: &'a [u8],
    /// Registers before.
    pub state: &'a NativeState,
    /// The arena before.
    pub arena: &'a [u8],
    /// Code and arena as the code addresses them.
    pub layout: NativeLayout,
    /// 16, 32 or 64.
    pub bits: u32,
}

/// What an instruction does to memory.
#[derive(Clone, Copy)]
pub struct Accesses {
    /// It can do no harm to the process.
    pub harmless: bool,
    /// It may read the code page, whose bytes depend on what else lies there.
    pub code: bool,
    /// It may write.
    pub writes: bool,
    /// It may read bytes that are open.
    pub open: bool,
    /// It surely faults, unless it is one that leaves out accesses.
    pub faults: bool,
}

/// Of a gather there may be eight.
fn elements(memory: &UsedMemory) -> usize {
    if memory.index().is_vector_register() { 8 } else { 1 }
}

impl Situation<'_> {
    /// Whether it can do no harm to the process, and what else its accesses are. The bytes at `open` (addresses) depend on the
    /// processor.
    pub fn accesses(&self, factory: &mut InstructionInfoFactory, open: &[Range<u64>]) -> Accesses {
        // The limits of its segments keep 16-bit code in.
        let kept_in = self.bits == 16;
        let own = !matches!(self.instruction.segment_prefix(), Register::FS | Register::GS);
        let mut all = Accesses {
            harmless: own && self.branch_is_harmless() && (kept_in || self.bit_offset_is_harmless()),
            code: kept_in && self.instruction.segment_prefix() == Register::CS,
            writes: false,
            open: false,
            faults: false,
        };
        for memory in factory.info(self.instruction).used_memory() {
            all.writes |= memory.access() != OpAccess::Read;
            all.faults |= self.faults(memory);
            all.open |= memory.access() != OpAccess::Write && self.meets(memory, open);
            if !kept_in {
                all.harmless &= self.is_harmless(memory);
                let near = |n| self.used(memory, n).is_none_or(|a| self.is_near_code(a));
                all.code |= (0..elements(memory)).any(near);
            }
        }
        all.code |=
            !kept_in && self.has_far_bit_offset() && self.far_bit().is_none_or(|a| self.is_near_code(a));
        all
    }

    fn is_harmless(&self, memory: &UsedMemory) -> bool {
        let size = match memory.memory_size().size() as u64 {
            0 => 1024,
            n => n,
        };
        (0..elements(memory)).all(|n| self.used(memory, n).is_some_and(|a| is_reachable(a, size, self.bits)))
    }

    /// Whether `memory` may lie in one of `ranges`.
    fn meets(&self, memory: &UsedMemory, ranges: &[Range<u64>]) -> bool {
        let size = memory.memory_size().size() as u64;
        let anywhere = size == 0
            || memory.index().is_vector_register()
            || self.instruction.has_rep_prefix()
            || self.instruction.has_repne_prefix()
            || self.has_far_bit_offset();
        let lies_in = |range: &Range<u64>| match self.used(memory, 0) {
            Some(at) if !anywhere => at < range.end && range.start < at + size,
            _ => true,
        };
        ranges.iter().any(lies_in)
    }

    /// Whether `memory` begins where it cannot be accessed.
    fn faults(&self, memory: &UsedMemory) -> bool {
        let pages = match memory.access() {
            OpAccess::NoMemAccess | OpAccess::None => return false,
            OpAccess::Read | OpAccess::CondRead => self.layout.writable_pages + self.layout.read_only_pages,
            _ => self.layout.writable_pages,
        };
        let size = memory.memory_size().size() as u64;
        let inside = |at: u64| at.wrapping_sub(self.layout.data).saturating_add(size) <= pages * PAGE;
        !memory.index().is_vector_register() && !self.used(memory, 0).is_some_and(inside)
    }

    fn is_near_code(&self, address: u64) -> bool {
        address.wrapping_sub(self.layout.code).wrapping_add(2 * PAGE) < 4 * PAGE
    }

    /// Whether it sets TF, so that the instruction behind it traps.
    pub fn sets_trap(&self) -> bool {
        let pops = matches!(self.instruction.mnemonic(), Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq);
        let mask = if self.bits == 16 { 0xFFFF } else { u64::MAX };
        let image = self.read(self.state.gpr[4] & mask, 2);
        pops && image.is_some_and(|image| image & flags::TF != 0)
    }

    /// Whether it locks an operand on two cache lines.
    pub fn splits_a_lock(&self) -> bool {
        let i = self.instruction;
        let locked = i.has_lock_prefix() || i.mnemonic() == Mnemonic::Xchg;
        let Some(operand) = (0..i.op_count()).find(|&n| locked && i.op_kind(n) == OpKind::Memory) else {
            return false;
        };
        let (at, size) = match self.has_far_bit_offset() {
            true => (self.far_bit(), 16),
            false => (self.address(operand), i.memory_size().size() as u64),
        };
        at.is_some_and(|at| paravane_memory::crosses_line(at, size))
    }

    /// Where it goes on if it does not fault: behind it, or where it branches to. Nowhere if it traps there.
    pub fn exits(&self) -> Exits {
        let mut exits = Exits::default();
        if !self.sets_trap() {
            let end = self.instruction.ip().wrapping_add(self.bytes.len() as u64);
            exits.add(end.wrapping_sub(self.layout.code));
            if let Some(target) = self.target() {
                exits.add(target.wrapping_sub(self.layout.code));
            }
        }
        exits
    }

    fn used(&self, memory: &UsedMemory, element: usize) -> Option<u64> {
        memory.virtual_address(element, |register, element, element_size| {
            register_value(self.state, register, element, element_size)
        })
    }

    /// Where memory operand `operand` lies in its segment.
    pub fn address(&self, operand: u32) -> Option<u64> {
        self.instruction.virtual_address(operand, 0, |register, element, size| {
            register_value(self.state, register, element, size)
        })
    }

    /// `size` bytes of the arena, if all of them lie there.
    pub fn read(&self, address: u64, size: usize) -> Option<u64> {
        let at = usize::try_from(address.wrapping_sub(self.layout.data)).ok()?;
        let bytes = self.arena.get(at..at.checked_add(size)?)?;
        let mut value = [0; 8];
        value.get_mut(..size)?.copy_from_slice(bytes);
        Some(u64::from_le_bytes(value))
    }

    fn has_far_bit_offset(&self) -> bool {
        let i = self.instruction;
        matches!(i.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
            && i.op0_kind() == OpKind::Memory
            && i.op1_kind() == OpKind::Register
    }

    /// About where BT and its kin with a register bit offset access memory, up to 2^60 bytes away from their operand.
    fn far_bit(&self) -> Option<u64> {
        let i = self.instruction;
        let value = self.state.gpr[i.op1_register().full_register().number()];
        let offset = match i.op1_register().size() {
            2 => i64::from(value as i16),
            4 => i64::from(value as i32),
            _ => value as i64,
        };
        Some(self.address(0)?.wrapping_add((offset >> 3) as u64 & !7))
    }

    fn bit_offset_is_harmless(&self) -> bool {
        !self.has_far_bit_offset()
            || self.far_bit().is_some_and(|a| is_reachable(a.wrapping_sub(8), 24, self.bits))
    }

    /// Branches must not land in this process's code, nor on themselves, on the way in or on the ways out.
    fn branch_is_harmless(&self) -> bool {
        let Some(target) = self.target() else { return true };
        let inside = target.wrapping_sub(self.layout.code) < PAGE;
        let (ip, length) = (self.instruction.ip(), self.bytes.len() as u64);
        if inside {
            let room = self.layout.code + OFFSET..self.layout.code + CODE_ROOM.end as u64;
            return room.contains(&target) && target.wrapping_sub(ip) >= length;
        }
        self.bits == 16 || is_reachable(target, 16, 64)
    }

    /// Where a branch goes if it is taken; none where reading that faults.
    pub fn target(&self) -> Option<u64> {
        match self.instruction.near_branch_target() {
            0 => self.indirect_target(),
            target => Some(target),
        }
    }

    /// Where an indirect branch or a near return goes; none for other instructions and where reading it faults.
    fn indirect_target(&self) -> Option<u64> {
        let i = self.instruction;
        match i.flow_control() {
            FlowControl::IndirectBranch | FlowControl::IndirectCall if i.op0_kind() == OpKind::Register => {
                register_value(self.state, i.op0_register(), 0, 0)
            }
            FlowControl::IndirectBranch | FlowControl::IndirectCall => {
                self.read(self.address(0)?, i.memory_size().size().min(8))
            }
            FlowControl::Return => {
                let size = if self.bits == 64 {
                    8
                } else if matches!(i.code(), Code::Retnw | Code::Retnw_imm16) {
                    2
                } else {
                    4
                };
                let mask = if self.bits == 16 { 0xFFFF } else { u64::MAX };
                self.read(self.state.gpr[4] & mask, size)
            }
            _ => None,
        }
    }
}

fn is_reachable(address: u64, size: u64, bits: u32) -> bool {
    let end = address.wrapping_add(size);
    let non_canonical = |a: u64| (a as i64) << 16 >> 16 != a as i64;
    // Wrapping around 4 GiB is up to the implementation, even in 32-bit mode (SDM 3A, 5.3).
    (address < LOW && end < LOW) || (bits == 64 && non_canonical(address) && non_canonical(end))
}

/// Register values as address computation wants them.
fn register_value(
    state: &NativeState,
    register: Register,
    element: usize,
    element_size: usize,
) -> Option<u64> {
    if register.is_segment_register() {
        return Some(0);
    }
    if register.is_vector_register() {
        let number = register.number();
        let byte = element * element_size;
        let at = if byte < 16 { 160 + 16 * number + byte } else { 576 + 16 * number + byte - 16 };
        let bytes = state.fpu.0.get(at..at + element_size)?;
        return Some(match element_size {
            4 => i64::from(i32::from_le_bytes(bytes.try_into().ok()?)) as u64,
            _ => u64::from_le_bytes(bytes.try_into().ok()?),
        });
    }
    let value = state.gpr[register.full_register().number()];
    Some(match register.size() {
        1 => value & 0xFF,
        2 => value & 0xFFFF,
        4 => value & 0xFFFF_FFFF,
        _ => value,
    })
}

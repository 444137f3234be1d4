//! Which cases may run natively: those whose every access stays in the arena or hits what is surely unmapped.

use super::generate::Case;
use crate::host::NativeState;
use iced_x86::{FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register};

/// Below 4 GiB this process maps nothing but code page and arena.
const LOW: u64 = 1 << 32;

/// Whether `case` can do no harm to the process.
pub fn is_harmless(case: &Case, bits: u32) -> bool {
    let i = &case.instruction;
    if matches!(i.segment_prefix(), Register::FS | Register::GS) {
        return false;
    }
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(i);
    for memory in info.used_memory() {
        let elements = if memory.index().is_vector_register() { 8 } else { 1 };
        let size = match memory.memory_size().size() as u64 {
            0 => 1024,
            n => n,
        };
        for element in 0..elements {
            let address = memory.virtual_address(element, |register, element, element_size| {
                register_value(&case.state, register, element, element_size)
            });
            let harmless = address.is_some_and(|a| is_reachable(a, size, bits));
            if !harmless {
                return false;
            }
        }
    }
    bit_offset_is_harmless(case, bits) && branch_is_harmless(case)
}

fn is_reachable(address: u64, size: u64, bits: u32) -> bool {
    let end = address.wrapping_add(size);
    let non_canonical = |a: u64| (a as i64) << 16 >> 16 != a as i64;
    // Wrapping around 4 GiB is up to the implementation, even in 32-bit mode (SDM 3A, 5.3).
    (address < LOW && end < LOW) || (bits == 64 && non_canonical(address) && non_canonical(end))
}

/// The linear address of memory operand `operand` of `i`, in flat segments.
pub fn address(i: &Instruction, operand: u32, state: &NativeState) -> Option<u64> {
    i.virtual_address(operand, 0, |register, element, size| register_value(state, register, element, size))
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

/// BT and its kin with a register bit offset reach up to 2^60 bytes away from their operand.
fn bit_offset_is_harmless(case: &Case, bits: u32) -> bool {
    let i = &case.instruction;
    let far = matches!(i.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
        && i.op0_kind() == OpKind::Memory
        && i.op1_kind() == OpKind::Register;
    if !far {
        return true;
    }
    let value = case.state.gpr[i.op1_register().full_register().number()];
    let offset = match i.op1_register().size() {
        2 => i64::from(value as i16),
        4 => i64::from(value as i32),
        _ => value as i64,
    };
    address(i, 0, &case.state).is_some_and(|a| {
        let a = a.wrapping_add((offset >> 3) as u64 & !7);
        is_reachable(a.wrapping_sub(8), 24, bits)
    })
}

/// Indirect branches must not land in this process's code, nor any branch on itself.
fn branch_is_harmless(case: &Case) -> bool {
    let i = &case.instruction;
    let register = match i.flow_control() {
        FlowControl::IndirectBranch | FlowControl::IndirectCall if i.op0_kind() == OpKind::Register => {
            i.op0_register()
        }
        _ => return true,
    };
    let target = case.state.gpr[register.full_register().number()];
    let inside = target.wrapping_sub(code_page(case)) < 4096;
    !inside && is_reachable(target, 16, 64)
}

/// The code page's address, from where the instruction was decoded.
fn code_page(case: &Case) -> u64 {
    case.instruction.ip() & !4095
}

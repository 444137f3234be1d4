//! What AMD's processors do differently from Intel's manual (SDM), which the engines follow. On such hosts, and only there,
//! these cases are left out, or the difference is allowed:
//!
//! | instruction                             | SDM, engines                       | AMD                                |
//! |-----------------------------------------|------------------------------------|------------------------------------|
//! | `0F 0D` with a register                 | reserved NOP                       | `#UD` (APM 3, PREFETCH)            |
//! | `F3 REX.B 90`                           | PAUSE                              | XCHG with R8                       |
//! | SHA with a misaligned memory operand    | `#GP`                              | done                               |
//! | INT1                                    | `#DB` behind the instruction       | under a hypervisor, in front of it |
//! | REP CMPS/SCAS that faults               | flags as before (SDM 2B, REP)      | flags of the last comparison       |
//! | REP with 32-bit addresses and count 0   | RCX's upper half cleared           | RCX unchanged                      |
//! | x87 store, numeric exception and `#PF`  | numeric exception                  | `#PF`                              |
//! | MOVSXD of 16 bits from memory           | reads 16 bits                      | reads 32 bits                      |
//! | LDMXCSR with bit 17                     | `#GP`                              | misaligned exception mask          |
//! | near branch with 66 in 64-bit mode      | 66 ignored                         | 16-bit operands (APM 3, CALL, JMP) |

use super::safety;
use crate::host::NativeState;
use iced_x86::{Code, CodeSize, CpuidFeature, FlowControl, Instruction, Mnemonic, OpKind};
use std::sync::OnceLock;

/// Whether the host is AMD's.
pub fn is_amd() -> bool {
    static AMD: OnceLock<bool> = OnceLock::new();
    *AMD.get_or_init(|| {
        let id = std::arch::x86_64::__cpuid(0);
        [id.ebx, id.edx, id.ecx].iter().flat_map(|r| r.to_le_bytes()).eq(*b"AuthenticAMD")
    })
}

/// Forms that the host executes differently throughout.
pub fn has_other_form(code: Code) -> bool {
    is_amd()
        && matches!(code, Code::Int1 | Code::Ldmxcsr_m32 | Code::VEX_Vldmxcsr_m32 | Code::Movsxd_r16_rm16)
}

/// Whether the host executes `i`, encoded as `bytes`, differently when it starts from `state`.
pub fn differs(i: &Instruction, bytes: &[u8], state: &NativeState) -> bool {
    if !is_amd() {
        return false;
    }
    let reserved = matches!(
        i.code(),
        Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D
    );
    let long_pause = i.code() == Code::Pause && i.len() > 2;
    let branches = i.flow_control() != FlowControl::Next && i.code_size() == CodeSize::Code64;
    let narrow_branch = branches && bytes[..bytes.len() - 1].contains(&0x66);
    (reserved && i.op0_kind() == OpKind::Register)
        || long_pause
        || narrow_branch
        || has_misaligned_sha(i, state)
        || counts_nothing(i, state)
}

fn has_misaligned_sha(i: &Instruction, state: &NativeState) -> bool {
    i.cpuid_features() == [CpuidFeature::SHA]
        && i.op1_kind() == OpKind::Memory
        && safety::address(i, 1, state).is_none_or(|a| a & 15 != 0)
}

fn counts_nothing(i: &Instruction, state: &NativeState) -> bool {
    let repeats = i.has_rep_prefix() || i.has_repne_prefix();
    let narrow = (0..i.op_count())
        .any(|n| matches!(i.op_kind(n), OpKind::MemorySegESI | OpKind::MemoryESEDI | OpKind::MemorySegEDI));
    repeats && narrow && state.gpr[1] as u32 == 0
}

/// Whether flags behind a fault in `i` are the host's own affair.
pub fn leaves_flags_at_faults(i: &Instruction) -> bool {
    use Mnemonic as M;
    let compares = matches!(
        i.mnemonic(),
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq | M::Scasb | M::Scasw | M::Scasd | M::Scasq
    );
    is_amd() && compares && (i.has_rep_prefix() || i.has_repne_prefix())
}

/// Whether the host checks memory before `i`'s numeric exception.
pub fn accesses_come_first(i: &Instruction) -> bool {
    use Mnemonic as M;
    let stores = matches!(i.mnemonic(), M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp);
    is_amd() && (stores || i.mnemonic() == M::Vcvtps2ph)
}

//! What the host's processor does differently from Intel's manual (SDM), which the engines follow, or where that leaves a
//! choice. On such hosts, and only there, these cases are left out, or the difference is allowed.
//!
//! Everywhere POPA that faults may have loaded some registers; ours are as before.
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
//! | LOCK MOV with CR0                       | `#UD`                              | MOV with CR8: `#GP` at CPL 3       |
//! | UD0, UD1 that their ModRM makes too long | `#GP`                              | `#UD`: they have no ModRM          |
//! | misaligned access with AC, and `#PF`    | open; `#AC`                        | `#PF`                              |
//! | near branch with 66 in 64-bit mode      | 66 ignored                         | 16-bit operands (APM 3, CALL, JMP) |
//!
//! | instruction                             | engines                            | Intel (Emerald Rapids)             |
//! |-----------------------------------------|------------------------------------|------------------------------------|
//! | x87 store of 80 bits, second page faults | writes nothing                     | writes the bytes on the first page |

use super::safety::Situation;
use iced_x86::{Code, CpuidFeature, FlowControl, Instruction, Mnemonic, OpKind};
use paravane_cpu::HostVendor;
use std::sync::OnceLock;

/// Whether the host is AMD's.
pub fn is_amd() -> bool {
    static AMD: OnceLock<bool> = OnceLock::new();
    *AMD.get_or_init(|| HostVendor::detect() == HostVendor::Amd)
}

/// Whether the interpreter knows how this host leaves undefined flags, so that these must be equal too.
pub fn leaves_known_flags() -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    *KNOWN.get_or_init(HostVendor::undefined_flags_are_measured)
}

/// Forms that the host executes differently throughout.
pub fn has_other_form(code: Code) -> bool {
    let differs = matches!(
        code,
        Code::Int1
            | Code::Reservednop_rm16_r16_0F0D
            | Code::Reservednop_rm32_r32_0F0D
            | Code::Reservednop_rm64_r64_0F0D
    );
    is_amd() && differs
}

/// Whether the host executes this differently.
pub fn differs(now: &Situation<'_>) -> bool {
    if !is_amd() {
        return false;
    }
    let i = now.instruction;
    let leads_on =
        matches!(i.flow_control(), FlowControl::Next | FlowControl::Exception | FlowControl::Interrupt);
    let branches = !leads_on && now.bits == 64;
    has_rex_pause(now)
        || has_long_ud1(now)
        || names_cr8(now)
        || (branches && now.bytes[..now.bytes.len() - 1].contains(&0x66))
        || (i.code() == Code::Movsxd_r16_rm16 && i.op1_kind() == OpKind::Memory)
        || has_misaligned_sha(now)
        || sets_misaligned_mask(now)
        || counts_nothing(now)
}

fn has_rex_pause(now: &Situation<'_>) -> bool {
    let rex = now.bytes.iter().rev().nth(1).is_some_and(|b| b & 0xF1 == 0x41);
    now.bits == 64 && now.instruction.code() == Code::Pause && rex
}

fn has_long_ud1(now: &Situation<'_>) -> bool {
    now.bytes.len() > 15 && now.bytes.windows(2).any(|b| b[0] == 0x0F && matches!(b[1], 0xB9 | 0xFF))
}

fn names_cr8(now: &Situation<'_>) -> bool {
    now.bytes.contains(&0xF0) && now.bytes.windows(2).any(|b| b[0] == 0x0F && matches!(b[1], 0x20 | 0x22))
}

fn has_misaligned_sha(now: &Situation<'_>) -> bool {
    let i = now.instruction;
    i.cpuid_features() == [CpuidFeature::SHA]
        && i.op1_kind() == OpKind::Memory
        && now.address(1).is_none_or(|a| a & 15 != 0)
}

fn sets_misaligned_mask(now: &Situation<'_>) -> bool {
    let loads = matches!(now.instruction.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr);
    loads && now.address(0).and_then(|a| now.read(a, 4)).is_some_and(|v| v & 1 << 17 != 0)
}

fn counts_nothing(now: &Situation<'_>) -> bool {
    let i = now.instruction;
    let repeats = i.has_rep_prefix() || i.has_repne_prefix();
    let narrow = (0..i.op_count())
        .any(|n| matches!(i.op_kind(n), OpKind::MemorySegESI | OpKind::MemoryESEDI | OpKind::MemorySegEDI));
    now.bits == 64 && repeats && narrow && now.state.gpr[1] as u32 == 0
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

/// Whether `i` may have loaded some of its registers when it faults.
pub fn leaves_registers_at_faults(i: &Instruction) -> bool {
    matches!(i.mnemonic(), Mnemonic::Popa | Mnemonic::Popad)
}

/// Whether the host's exception `theirs` stands for the engine's `ours` where an access raises both.
pub fn prefers(theirs: u8, ours: u8) -> bool {
    is_amd() && (theirs, ours) == (14, 17)
}

/// Whether the host checks memory before `i`'s numeric exception.
pub fn accesses_come_first(i: &Instruction) -> bool {
    use Mnemonic as M;
    let stores = matches!(i.mnemonic(), M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp);
    is_amd() && (stores || i.mnemonic() == M::Vcvtps2ph)
}

/// Whether `i` may have written to its first page when its second one faults.
pub fn tears_stores(i: &Instruction) -> bool {
    !is_amd() && (i.mnemonic() == Mnemonic::Fbstp || i.code() == Code::Fstp_m80fp)
}

//! Which instruction forms can be compared with the host, and why the others cannot.

use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, Mnemonic, OpCodeOperandKind};
use paravane_cpu::{CpuModel, HostFeatures, MODEL_NAMES, model_by_name};
use std::sync::OnceLock;

/// Why a form is not executed on the host.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum LeftOut {
    /// Not of this mode, or not of Intel's processors.
    Mode,
    /// EVEX, XOP, 3DNow! and MVEX: no model offers them.
    Encoding,
    /// No model offers the feature (on this host).
    NotOffered(CpuidFeature),
    /// An assembler's name for two instructions, WAIT and another, which are executed each.
    TwoInstructions,
    /// It enters or leaves the kernel: interrupts, system calls, far transfers. The guests of `jit/tests/system` do.
    Transfer,
    /// It loads a segment register from the kernel's tables, or FS or GS, on which the process lives. Likewise.
    Segments,
    /// Its result depends on time, the processor's identity or the kernel's tables. Likewise.
    NotReproducible,
    /// It stores or loads all state of the host, which has more than the models, or addresses that only the interpreter
    /// tracks: `jit/tests/system`, and the tests of `paravane-cpu`.
    State,
    /// This host executes it differently from the manual.
    Vendor,
}

impl LeftOut {
    /// One line for the coverage report.
    pub fn reason(self) -> String {
        match self {
            LeftOut::Mode => "not of this mode".into(),
            LeftOut::Encoding => "EVEX, XOP, 3DNow! or MVEX".into(),
            LeftOut::NotOffered(feature) => format!("not offered: {feature:?}"),
            LeftOut::TwoInstructions => "WAIT and another instruction, executed each".into(),
            LeftOut::Transfer => "enters or leaves the kernel: jit/tests/system".into(),
            LeftOut::Segments => "loads a segment: jit/tests/system".into(),
            LeftOut::NotReproducible => {
                "depends on time, identity or the kernel's tables: jit/tests/system".into()
            }
            LeftOut::State => "the host's whole state: jit/tests/system, paravane-cpu".into(),
            LeftOut::Vendor => "this host differs from the manual (jit/src/fuzz/vendor.rs)".into(),
        }
    }
}

/// A table of every form: `Ok` where it can be exercised.
pub fn forms(bits: u32) -> Vec<(Code, Result<(), LeftOut>)> {
    Code::values().filter(|c| c.op_code().is_instruction()).map(|c| (c, admit(c, bits))).collect()
}

/// The models that have `code`, by name.
pub fn offered_by(code: Code) -> Vec<&'static str> {
    static MODELS: OnceLock<Vec<(&'static str, CpuModel)>> = OnceLock::new();
    let models = MODELS.get_or_init(|| {
        let host = HostFeatures::detect();
        MODEL_NAMES.iter().filter_map(|&name| Some((name, model_by_name(name, &host).ok()?))).collect()
    });
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    models.iter().filter(|(_, model)| model.allows(&instruction)).map(|(name, _)| *name).collect()
}

/// Whether `code` can be exercised in code of `bits`.
pub fn admit(code: Code, bits: u32) -> Result<(), LeftOut> {
    static TABLES: [OnceLock<Vec<Result<(), LeftOut>>>; 3] = [const { OnceLock::new() }; 3];
    let table = TABLES[bits as usize / 32].get_or_init(|| Code::values().map(|c| judge(c, bits)).collect());
    table[code as usize]
}

fn judge(code: Code, bits: u32) -> Result<(), LeftOut> {
    let op = code.op_code();
    let mode = match bits {
        64 => op.mode64() && op.intel_decoder64(),
        32 => op.mode32() && op.intel_decoder32(),
        _ => op.mode16() && op.intel_decoder16(),
    };
    if !mode || op.op_kinds().iter().any(|&k| bits == 64 && is_sixteen_bit_branch(k)) {
        return Err(LeftOut::Mode);
    }
    if !matches!(op.encoding(), EncodingKind::Legacy | EncodingKind::VEX) {
        return Err(LeftOut::Encoding);
    }
    if offered_by(code).is_empty() {
        let feature = code.cpuid_features().first().copied().unwrap_or(CpuidFeature::INTEL8086);
        return Err(LeftOut::NotOffered(feature));
    }
    match code.mnemonic() {
        _ if op.fwait() => Err(LeftOut::TwoInstructions),
        m if enters_kernel(m) || is_far(code) => Err(LeftOut::Transfer),
        m if is_irreproducible(m) => Err(LeftOut::NotReproducible),
        m if keeps_state(m) => Err(LeftOut::State),
        _ if super::vendor::has_other_form(code) => Err(LeftOut::Vendor),
        m if loads_segment(code, m) => Err(LeftOut::Segments),
        _ => Ok(()),
    }
}

fn is_sixteen_bit_branch(kind: OpCodeOperandKind) -> bool {
    matches!(kind, OpCodeOperandKind::br16_1 | OpCodeOperandKind::br16_2)
}

fn enters_kernel(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Int
            | M::Syscall
            | M::Sysenter
            | M::Sysret
            | M::Sysretq
            | M::Sysexit
            | M::Sysexitq
            | M::Iret
            | M::Iretd
            | M::Iretq
            | M::Retf
            | M::Vmcall
            | M::Vmmcall
            | M::Vmfunc
            | M::Xbegin
            | M::Xend
            | M::Xabort
    )
}

fn is_irreproducible(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Rdtsc
            | M::Rdtscp
            | M::Rdpmc
            | M::Rdpid
            | M::Rdrand
            | M::Rdseed
            | M::Cpuid
            | M::Xgetbv
            | M::Lar
            | M::Lsl
            | M::Verr
            | M::Verw
            | M::Sgdt
            | M::Sidt
            | M::Sldt
            | M::Str
            | M::Smsw
            | M::Monitor
            | M::Mwait
            | M::Ud0
            | M::Rdfsbase
            | M::Rdgsbase
    )
}

fn keeps_state(mnemonic: Mnemonic) -> bool {
    let name = format!("{mnemonic:?}");
    ["Fxsave", "Fxrstor", "Xsave", "Xrstor"].iter().any(|beginning| name.starts_with(beginning))
}

/// The kernel's tables decide, and FS holds the thread pointer.
fn loads_segment(code: Code, mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    let op = code.op_code();
    matches!(mnemonic, M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss | M::Wrfsbase | M::Wrgsbase)
        || (mnemonic == M::Mov && op.op0_kind() == OpCodeOperandKind::seg_reg)
        || (mnemonic == M::Pop && is_segment(op.op0_kind()))
}

fn is_far(code: Code) -> bool {
    let kind = code.op_code().op0_kind();
    matches!(kind, OpCodeOperandKind::farbr2_2 | OpCodeOperandKind::farbr4_2)
        || matches!(
            code,
            Code::Jmp_m1616
                | Code::Jmp_m1632
                | Code::Jmp_m1664
                | Code::Call_m1616
                | Code::Call_m1632
                | Code::Call_m1664
        )
}

fn is_segment(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(kind, K::es | K::cs | K::ss | K::ds | K::fs | K::gs)
}

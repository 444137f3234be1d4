//! Which instruction forms can be compared with the host, and why the others cannot.

use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic, OpCodeOperandKind};

/// Why a form is left out.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum LeftOut {
    /// Not of this mode, or not of Intel's processors.
    Mode,
    /// EVEX, XOP, 3DNow! and MVEX: no model offers them.
    Encoding,
    /// The host's CPUID or the model's lacks the feature.
    NotOffered(CpuidFeature),
    /// It enters the kernel or changes what the process lives on.
    NotUser,
    /// Its result depends on time, the processor's identity or the kernel's tables.
    NotReproducible,
    /// This host executes it differently from the manual.
    Vendor,
}

/// A table of every form: `Ok` where it can be exercised.
pub fn forms(bits: u32) -> Vec<(Code, Result<(), LeftOut>)> {
    Code::values().filter(|c| c.op_code().is_instruction()).map(|c| (c, admit(c, bits))).collect()
}

/// Whether `code` can be exercised in code of `bits`.
pub fn admit(code: Code, bits: u32) -> Result<(), LeftOut> {
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
    if let Some(&missing) = code.cpuid_features().iter().find(|&&f| !is_offered(f)) {
        return Err(LeftOut::NotOffered(missing));
    }
    match code.mnemonic() {
        m if enters_kernel(m) => Err(LeftOut::NotUser),
        m if is_irreproducible(m) => Err(LeftOut::NotReproducible),
        _ if super::vendor::has_other_form(code) => Err(LeftOut::Vendor),
        m if changes_segments(code, m) => Err(LeftOut::NotUser),
        _ => Ok(()),
    }
}

fn is_sixteen_bit_branch(kind: OpCodeOperandKind) -> bool {
    matches!(kind, OpCodeOperandKind::br16_1 | OpCodeOperandKind::br16_2)
}

/// Features of the model `max` that this host has.
fn is_offered(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    use std::is_x86_feature_detected as host;
    match feature {
        F::INTEL8086 | F::INTEL186 | F::INTEL286 | F::INTEL386 | F::INTEL486 | F::X64 | F::CMOV | F::CX8 => {
            true
        }
        F::INTEL8086_ONLY | F::INTEL286_ONLY | F::INTEL386_ONLY | F::INTEL386_A0_ONLY => false,
        F::FPU
        | F::FPU287
        | F::FPU387
        | F::MMX
        | F::SSE
        | F::SSE2
        | F::CLFSH
        | F::MULTIBYTENOP
        | F::PAUSE => true,
        F::SSE3 => host!("sse3"),
        F::SSSE3 => host!("ssse3"),
        F::SSE4_1 => host!("sse4.1"),
        F::SSE4_2 => host!("sse4.2"),
        F::POPCNT => host!("popcnt"),
        F::LZCNT => host!("lzcnt"),
        F::AES => host!("aes"),
        F::PCLMULQDQ => host!("pclmulqdq"),
        F::AVX => host!("avx"),
        F::AVX2 => host!("avx2"),
        F::F16C => host!("f16c"),
        F::FMA => host!("fma"),
        F::BMI1 => host!("bmi1"),
        F::BMI2 => host!("bmi2"),
        F::ADX => host!("adx"),
        F::MOVBE => host!("movbe"),
        F::SHA => host!("sha"),
        F::CMPXCHG16B => host!("cmpxchg16b"),
        F::PREFETCHW => true,
        _ => false,
    }
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
        M::Rdtsc | M::Rdtscp | M::Rdpmc | M::Rdpid | M::Rdrand | M::Rdseed | M::Cpuid | M::Xgetbv | M::Lar | M::Lsl
            | M::Verr | M::Verw | M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw | M::Monitor | M::Mwait | M::Ud0
            // FXSAVE shows addresses that engines do not track; FXRSTOR takes garbage from memory as state.
            | M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64
    )
}

/// Loads of segment registers and far transfers: the kernel's tables decide, and FS holds the thread pointer.
fn changes_segments(code: Code, mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    let op = code.op_code();
    let loads = matches!(mnemonic, M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss)
        || (mnemonic == M::Mov && op.op0_kind() == OpCodeOperandKind::seg_reg)
        || (mnemonic == M::Pop && is_segment(op.op0_kind()));
    let far = matches!(op.op0_kind(), OpCodeOperandKind::farbr2_2 | OpCodeOperandKind::farbr4_2)
        || matches!(
            code,
            Code::Jmp_m1616
                | Code::Jmp_m1632
                | Code::Jmp_m1664
                | Code::Call_m1616
                | Code::Call_m1632
                | Code::Call_m1664
        );
    loads || far
}

fn is_segment(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(kind, K::es | K::cs | K::ss | K::ds | K::fs | K::gs)
}

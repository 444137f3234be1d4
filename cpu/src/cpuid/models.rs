//! The named processor models.

use super::bits::{self, Feature, Features};
use super::{CpuModel, HostVendor};

/// What the host's own units can execute, for the instructions the engines hand to them.
#[derive(Clone, Copy, Debug)]
pub struct HostFeatures {
    features: Features,
    vendor: HostVendor,
}

impl HostFeatures {
    /// Asks the host.
    pub fn detect() -> HostFeatures {
        let mut set = Features::of(&[bits::ALL]);
        macro_rules! need {
            ($($feature:ident $name:tt),* $(,)?) => {
                $(if !std::is_x86_feature_detected!($name) { set.remove(bits::$feature); })*
            };
        }
        need!(
            SSE3 "sse3", SSSE3 "ssse3", SSE4_1 "sse4.1", SSE4_2 "sse4.2", PCLMULQDQ "pclmulqdq", AES "aes",
            AVX "avx", AVX2 "avx2", FMA "fma", F16C "f16c", BMI1 "bmi1", BMI2 "bmi2", LZCNT "lzcnt",
            POPCNT "popcnt", MOVBE "movbe", ADX "adx", SHA "sha", CX16 "cmpxchg16b", RDRAND "rdrand",
            RDSEED "rdseed", XSAVE "xsave", XSAVEOPT "xsaveopt", XSAVEC "xsavec",
        );
        // VEX encodings go together.
        if !set.has(bits::AVX) {
            [bits::AVX2, bits::FMA, bits::F16C, bits::BMI1, bits::BMI2]
                .into_iter()
                .for_each(|f| set.remove(f));
        }
        HostFeatures { features: set, vendor: HostVendor::detect() }
    }

    /// A host that has everything (tests).
    #[cfg(test)]
    pub(crate) fn everything() -> HostFeatures {
        HostFeatures { features: Features::of(&[bits::ALL]), vendor: HostVendor::Intel }
    }
}

/// Names that [`model_by_name`] knows.
pub const MODEL_NAMES: &[&str] = &["max", "x86-64-v3", "x86-64-v2", "x86-64", "pentium3", "i486"];

const PENTIUM3: &[Feature] = &[
    bits::FPU,
    bits::VME,
    bits::DE,
    bits::PSE,
    bits::TSC,
    bits::MSR,
    bits::PAE,
    bits::MCE,
    bits::CX8,
    bits::APIC,
    bits::SEP,
    bits::MTRR,
    bits::PGE,
    bits::MCA,
    bits::CMOV,
    bits::PAT,
    bits::PSE36,
    bits::MMX,
    bits::FXSR,
    bits::SSE,
];

const X86_64: &[Feature] = &[
    bits::SSE2,
    bits::CLFSH,
    bits::SSE3,
    bits::CX16,
    bits::LAHF,
    bits::SYSCALL,
    bits::NX,
    bits::LM,
    bits::ARCH_CAPABILITIES,
    bits::SPEC_CTRL,
    bits::STIBP,
    bits::SSBD,
    bits::TSC_ADJUST,
    bits::FDP_EXCPTN_ONLY,
];

const V2: &[Feature] = &[
    bits::SSSE3,
    bits::SSE4_1,
    bits::SSE4_2,
    bits::POPCNT,
    bits::PCID,
    bits::INVPCID,
    bits::X2APIC,
    bits::TSC_DEADLINE,
    bits::RDTSCP,
    bits::PAGE_1G,
    bits::FSGSBASE,
    bits::SMEP,
    bits::SMAP,
    bits::UMIP,
    bits::ERMS,
    bits::SS,
];

const V3: &[Feature] = &[
    bits::AVX,
    bits::AVX2,
    bits::BMI1,
    bits::BMI2,
    bits::F16C,
    bits::FMA,
    bits::LZCNT,
    bits::MOVBE,
    bits::XSAVE,
    bits::XSAVEOPT,
    bits::XSAVEC,
    bits::XGETBV1,
];

const BEYOND_V3: &[Feature] = &[
    bits::PCLMULQDQ,
    bits::AES,
    bits::SHA,
    bits::RDRAND,
    bits::RDSEED,
    bits::ADX,
    bits::CLFLUSHOPT,
    bits::PREFETCHW,
    bits::RDPID,
    bits::FSRM,
];

/// Family 6, model 1CH, stepping 10: an in-order part. Kernels know that family to be free of speculation and leave all
/// their mitigations out (a translator has none of the flaws); newer parts get branch-history clearing on each system
/// call whatever IA32_ARCH_CAPABILITIES says.
const MODERN: u32 = 0x0001_06CA;

/// The model called `name`, as far as the host can carry it.
pub fn model_by_name(name: &str, host: &HostFeatures) -> Result<CpuModel, String> {
    let (signature, brand, features): (u32, &str, Features) = match name {
        "i486" => (0x480, "", Features::of(&[&[bits::FPU]])),
        "pentium3" => (0x686, "", Features::of(&[PENTIUM3])),
        "x86-64" => (MODERN, "paravane x86-64", Features::of(&[PENTIUM3, X86_64])),
        "x86-64-v2" => (MODERN, "paravane x86-64-v2", Features::of(&[PENTIUM3, X86_64, V2])),
        "x86-64-v3" => (MODERN, "paravane x86-64-v3", Features::of(&[PENTIUM3, X86_64, V2, V3])),
        "max" => (MODERN, "paravane max", Features::of(&[PENTIUM3, X86_64, V2, V3, BEYOND_V3])),
        _ => return Err(format!("unknown CPU model '{name}'; known are {}", MODEL_NAMES.join(", "))),
    };
    let mut offered = features;
    for (word, have) in offered.0.iter_mut().zip(host.features.0) {
        *word &= have;
    }
    if name != "max" && offered != features {
        let missing: Vec<&str> =
            bits::ALL.iter().filter(|&&f| features.has(f) && !offered.has(f)).map(|f| f.2).collect();
        return Err(format!("CPU model '{name}' needs what this host lacks: {}", missing.join(", ")));
    }
    if !offered.has(bits::XSAVE) {
        let saved = [bits::XSAVEOPT, bits::XSAVEC, bits::XGETBV1];
        let vex = [bits::AVX, bits::AVX2, bits::FMA, bits::F16C, bits::BMI1, bits::BMI2];
        saved.into_iter().chain(vex).for_each(|f| offered.remove(f));
    }
    Ok(CpuModel::new(signature, brand, offered, host.vendor))
}

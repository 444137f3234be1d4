//! Which instructions a model has: what CPUID does not offer is `#UD`.

use super::{CpuModel, bits};
use iced_x86::{CpuidFeature, DecoderOptions, Instruction};

impl CpuModel {
    /// Options for decoding as this model does: encodings of missing extensions keep their older meaning.
    pub fn decoder_options(&self) -> u32 {
        let mut options = DecoderOptions::FORCE_RESERVED_NOP | DecoderOptions::NO_WBNOINVD;
        if !self.has(bits::BMI1) {
            options |= DecoderOptions::NO_MPFX_0FBC;
        }
        if !self.has(bits::LZCNT) {
            options |= DecoderOptions::NO_MPFX_0FBD;
        }
        if !self.has(bits::SSE2) {
            options |= DecoderOptions::NO_PAUSE;
        }
        options
    }

    /// Whether the model has `instr`.
    pub fn allows(&self, instr: &Instruction) -> bool {
        instr.cpuid_features().iter().all(|&f| self.offers(f))
    }

    fn offers(&self, f: CpuidFeature) -> bool {
        use CpuidFeature::*;
        let feature = match f {
            INTEL8086 | INTEL186 | INTEL286 | INTEL386 | INTEL486 | CPUID | PAUSE | SMM => return true,
            MULTIBYTENOP => bits::CMOV,
            FPU | FPU287 | FPU387 => bits::FPU,
            X64 => bits::LM,
            ADX => bits::ADX,
            AES => bits::AES,
            AVX => bits::AVX,
            AVX2 => bits::AVX2,
            BMI1 => bits::BMI1,
            BMI2 => bits::BMI2,
            CLFLUSHOPT => bits::CLFLUSHOPT,
            CLFSH => bits::CLFSH,
            CMOV => bits::CMOV,
            CMPXCHG16B => bits::CX16,
            CX8 => bits::CX8,
            F16C => bits::F16C,
            FMA => bits::FMA,
            FSGSBASE => bits::FSGSBASE,
            FXSR => bits::FXSR,
            INVPCID => bits::INVPCID,
            LZCNT => bits::LZCNT,
            MMX => bits::MMX,
            MOVBE => bits::MOVBE,
            MSR => bits::MSR,
            PCLMULQDQ => bits::PCLMULQDQ,
            POPCNT => bits::POPCNT,
            PREFETCHW => bits::PREFETCHW,
            RDPID => bits::RDPID,
            RDPMC => bits::MMX,
            RDRAND => bits::RDRAND,
            RDSEED => bits::RDSEED,
            RDTSCP => bits::RDTSCP,
            SEP => bits::SEP,
            SHA => bits::SHA,
            SMAP => bits::SMAP,
            SSE => bits::SSE,
            SSE2 => bits::SSE2,
            SSE3 => bits::SSE3,
            SSE4_1 => bits::SSE4_1,
            SSE4_2 => bits::SSE4_2,
            SSSE3 => bits::SSSE3,
            SYSCALL => bits::SYSCALL,
            TSC => bits::TSC,
            XSAVE => bits::XSAVE,
            XSAVEC => bits::XSAVEC,
            XSAVEOPT => bits::XSAVEOPT,
            _ => return false,
        };
        self.has(feature)
    }
}

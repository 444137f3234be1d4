//! What the guest's processor says it is: models and CPUID leaves (SDM 2A, CPUID).
//!
//! CPUID never lies: a bit is set only where both engines carry the feature out.

pub(crate) mod bits;
mod gate;
mod models;
mod vendor;

pub use models::{HostFeatures, MODEL_NAMES, model_by_name};
pub use vendor::HostVendor;

use crate::bus::{CpuBus, CpuidResult};
use crate::mmu::PagingFeatures;
use crate::msr::index as msr;
use crate::state::{CpuState, cr4, efer};
use bits::{Features, Word};
use paravane_memory::VpIndex;

/// IA32_ARCH_CAPABILITIES: RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, PSCHANGE_MC_NO, TAA_NO,
/// SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO.
const ARCH_CAPABILITIES: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

/// A processor model: what CPUID reports and which instructions, control bits and MSRs exist.
#[derive(Clone, Debug)]
pub struct CpuModel {
    signature: u32,
    brand: [u8; 48],
    features: Features,
    tsc: Option<(u64, u64)>,
    cpus: u32,
    host: HostVendor,
}

impl CpuModel {
    fn new(signature: u32, name: &str, features: Features, host: HostVendor) -> CpuModel {
        let mut brand = [0; 48];
        brand[..name.len()].copy_from_slice(name.as_bytes());
        CpuModel { signature, brand, features, tsc: None, cpus: 1, host }
    }

    /// Reports the TSC frequency in leaf 15H. `crystal_hz` must be the local APIC timer's input clock: guests
    /// derive it from there.
    pub fn with_tsc(mut self, tsc_hz: u64, crystal_hz: u64) -> CpuModel {
        self.tsc = Some((tsc_hz, crystal_hz));
        self
    }

    /// Reports `cpus` processors in the topology leaves.
    pub fn with_cpus(mut self, cpus: u32) -> CpuModel {
        self.cpus = cpus.max(1);
        self
    }

    /// Family, model and stepping as CPUID leaf 1 has them in EAX.
    pub fn signature(&self) -> u32 {
        self.signature
    }

    /// Whose flags the guest sees where the manual leaves them undefined.
    pub(crate) fn host(&self) -> HostVendor {
        self.host
    }

    fn has(&self, f: bits::Feature) -> bool {
        self.features.has(f)
    }

    /// Long mode exists.
    pub fn has_long_mode(&self) -> bool {
        self.has(bits::LM)
    }

    /// What paging has. MAXPHYADDR without leaf 8000_0008H is 36 with PAE and 32 without (SDM 3A, 4.1.4).
    pub fn paging(&self) -> PagingFeatures {
        let phys_bits = match (self.has(bits::LM), self.has(bits::PAE)) {
            (true, _) => PagingFeatures::ALL.phys_bits,
            (false, true) => 36,
            (false, false) => 32,
        };
        PagingFeatures { phys_bits, page_1g: self.has(bits::PAGE_1G), pse36: self.has(bits::PSE36) }
    }

    /// XGETBV with ECX = 1 exists.
    pub fn has_xgetbv1(&self) -> bool {
        self.has(bits::XGETBV1)
    }

    /// XCR0 bits that may be set.
    pub fn xcr0_allowed(&self) -> u64 {
        if self.has(bits::AVX) { 7 } else { 3 }
    }

    /// CR4 bits that may be set.
    pub fn cr4_allowed(&self) -> u64 {
        let table = [
            (bits::VME, cr4::VME | cr4::PVI),
            (bits::TSC, cr4::TSD),
            (bits::DE, cr4::DE),
            (bits::PSE, cr4::PSE),
            (bits::PAE, cr4::PAE),
            (bits::MCE, cr4::MCE),
            (bits::PGE, cr4::PGE),
            (bits::MMX, cr4::PCE),
            (bits::FXSR, cr4::OSFXSR),
            (bits::SSE, cr4::OSXMMEXCPT),
            (bits::UMIP, cr4::UMIP),
            (bits::FSGSBASE, cr4::FSGSBASE),
            (bits::PCID, cr4::PCIDE),
            (bits::XSAVE, cr4::OSXSAVE),
            (bits::SMEP, cr4::SMEP),
            (bits::SMAP, cr4::SMAP),
        ];
        table.iter().filter(|(f, _)| self.has(*f)).fold(0, |all, (_, bit)| all | bit)
    }

    /// EFER bits that may be written.
    pub fn efer_allowed(&self) -> u64 {
        let table = [(bits::SYSCALL, efer::SCE), (bits::LM, efer::LME), (bits::NX, efer::NXE)];
        table.iter().filter(|(f, _)| self.has(*f)).fold(0, |all, (_, bit)| all | bit)
    }

    /// IA32_ARCH_CAPABILITIES.
    pub fn arch_capabilities(&self) -> u64 {
        ARCH_CAPABILITIES
    }

    /// Whether the core has the MSR; those it does not know at all are the machine's.
    pub(crate) fn has_msr(&self, n: u32) -> bool {
        let feature = match n {
            msr::SYSENTER_CS..=msr::SYSENTER_EIP => bits::SEP,
            msr::MTRRCAP | msr::MTRR_DEF_TYPE => bits::MTRR,
            msr::MTRR_VARIABLE..=msr::MTRR_FIX4K_LAST => bits::MTRR,
            msr::MCG_CAP | msr::MCG_STATUS => bits::MCA,
            msr::PAT => bits::PAT,
            msr::EFER => bits::NX,
            msr::STAR..=msr::FMASK => bits::SYSCALL,
            msr::FS_BASE..=msr::KERNEL_GS_BASE => bits::LM,
            msr::TSC_AUX => bits::RDTSCP,
            msr::TSC_ADJUST => bits::TSC_ADJUST,
            msr::SPEC_CTRL | msr::PRED_CMD => bits::SPEC_CTRL,
            msr::ARCH_CAPABILITIES => bits::ARCH_CAPABILITIES,
            _ => return true,
        };
        self.has(feature)
    }

    fn max_basic(&self) -> u32 {
        if !self.has(bits::MSR) {
            1
        } else if !self.has(bits::LM) {
            3
        } else {
            0x16
        }
    }

    /// CPUID as the guest of `cpu` sees it.
    pub fn cpuid(&self, cpu: &CpuState, bus: &dyn CpuBus, vp: VpIndex, leaf: u32, sub: u32) -> CpuidResult {
        match leaf {
            0x4000_0000..=0x4FFF_FFFF => return bus.cpuid(vp, leaf, sub).unwrap_or_default(),
            0x8000_0000..=0x8FFF_FFFF if self.has(bits::LM) => return self.extended(leaf),
            _ => {}
        }
        // Past the highest basic leaf the processor answers with that leaf.
        match leaf.min(self.max_basic()) {
            0 => result(self.max_basic(), *b"Genu", *b"ntel", *b"ineI"),
            1 => self.leaf1(cpu, bus, vp),
            2 => CpuidResult { eax: 0xFF01, ..Default::default() },
            4 => self.caches(sub),
            6 => CpuidResult { eax: 4, ..Default::default() },
            7 if sub == 0 => CpuidResult {
                eax: 0,
                ebx: self.features.word(Word::Leaf7Ebx),
                ecx: self.features.word(Word::Leaf7Ecx),
                edx: self.features.word(Word::Leaf7Edx),
            },
            0xB => self.topology(vp, sub),
            0xD => self.xsave(cpu, sub),
            0x15 => self.frequency(),
            0x16 => self.megahertz(),
            _ => CpuidResult::default(),
        }
    }

    fn leaf1(&self, cpu: &CpuState, bus: &dyn CpuBus, vp: VpIndex) -> CpuidResult {
        let mut ecx = self.features.word(Word::Leaf1Ecx);
        if cpu.cr4 & cr4::OSXSAVE != 0 {
            ecx |= 1 << 27;
        }
        if bus.cpuid(vp, 0x4000_0000, 0).is_some() {
            ecx |= 1 << 31;
        }
        let mut edx = self.features.word(Word::Leaf1Edx);
        if self.cpus > 1 {
            edx |= 1 << 28;
        }
        let ebx = vp.0 << 24 | self.cpus.next_power_of_two().min(255) << 16 | 8 << 8;
        CpuidResult { eax: self.signature, ebx, ecx, edx }
    }

    /// Leaf 4: 32 KiB + 32 KiB, 1 MiB, 8 MiB shared; all of 64-byte lines.
    fn caches(&self, sub: u32) -> CpuidResult {
        let (kind, level, ways, sets, shared) = match sub {
            0 => (1, 1, 8, 64, 0),
            1 => (2, 1, 8, 64, 0),
            2 => (3, 2, 16, 1024, 0),
            3 => (3, 3, 16, 8192, self.cpus.next_power_of_two() - 1),
            _ => return CpuidResult::default(),
        };
        let cores = (self.cpus.next_power_of_two() - 1).min(63);
        CpuidResult {
            eax: kind | level << 5 | 1 << 8 | (shared & 0xFFF) << 14 | cores << 26,
            ebx: 63 | (ways - 1) << 22,
            ecx: sets - 1,
            edx: 0,
        }
    }

    /// Leaf 0BH: one thread per core, all cores in one package.
    fn topology(&self, vp: VpIndex, sub: u32) -> CpuidResult {
        let bits = self.cpus.next_power_of_two().trailing_zeros();
        let (eax, ebx, kind) = match sub {
            0 => (0, 1, 1),
            1 => (bits, self.cpus, 2),
            _ => (0, 0, 0),
        };
        CpuidResult { eax, ebx, ecx: kind << 8 | sub & 0xFF, edx: vp.0 }
    }

    fn xsave(&self, cpu: &CpuState, sub: u32) -> CpuidResult {
        if !self.has(bits::XSAVE) {
            return CpuidResult::default();
        }
        let size = |xcr0: u64| if xcr0 & 4 != 0 { 832 } else { 576 };
        match sub {
            0 => CpuidResult {
                eax: self.xcr0_allowed() as u32,
                ebx: size(cpu.xcr0),
                ecx: size(self.xcr0_allowed()),
                edx: 0,
            },
            1 => CpuidResult {
                eax: self.features.word(Word::LeafD1Eax),
                ebx: size(cpu.xcr0),
                ..Default::default()
            },
            2 if self.has(bits::AVX) => CpuidResult { eax: 256, ebx: 576, ..Default::default() },
            _ => CpuidResult::default(),
        }
    }

    /// Leaf 15H, if the ratio is exact and small enough for guests that multiply in 32 bits.
    fn frequency(&self) -> CpuidResult {
        let Some((tsc, crystal)) = self.tsc.filter(|&(t, c)| t > 0 && c > 0) else {
            return CpuidResult::default();
        };
        let divisor = gcd(tsc, crystal);
        let (numerator, denominator) = (tsc / divisor, crystal / divisor);
        if (crystal / 1000).saturating_mul(numerator) > u64::from(u32::MAX) || crystal > u64::from(u32::MAX) {
            return CpuidResult::default();
        }
        CpuidResult { eax: denominator as u32, ebx: numerator as u32, ecx: crystal as u32, edx: 0 }
    }

    fn megahertz(&self) -> CpuidResult {
        match self.tsc {
            Some((tsc, _)) => {
                let mhz = (tsc / 1_000_000).min(0xFFFF) as u32;
                CpuidResult { eax: mhz, ebx: mhz, ecx: 100, edx: 0 }
            }
            None => CpuidResult::default(),
        }
    }

    fn extended(&self, leaf: u32) -> CpuidResult {
        match leaf {
            0x8000_0000 => CpuidResult { eax: 0x8000_0008, ..Default::default() },
            0x8000_0001 => CpuidResult {
                ecx: self.features.word(Word::Ext1Ecx),
                edx: self.features.word(Word::Ext1Edx),
                ..Default::default()
            },
            0x8000_0002..=0x8000_0004 => {
                let at = (leaf - 0x8000_0002) as usize * 16;
                let word = |i: usize| {
                    let mut bytes = [0; 4];
                    bytes.copy_from_slice(&self.brand[at + i * 4..at + i * 4 + 4]);
                    u32::from_le_bytes(bytes)
                };
                CpuidResult { eax: word(0), ebx: word(1), ecx: word(2), edx: word(3) }
            }
            0x8000_0006 => CpuidResult { ecx: 1024 << 16 | 8 << 12 | 64, ..Default::default() },
            0x8000_0007 => CpuidResult { edx: 1 << 8, ..Default::default() },
            0x8000_0008 => CpuidResult { eax: 48 << 8 | self.paging().phys_bits, ..Default::default() },
            _ => CpuidResult::default(),
        }
    }
}

fn result(eax: u32, ebx: [u8; 4], ecx: [u8; 4], edx: [u8; 4]) -> CpuidResult {
    CpuidResult {
        eax,
        ebx: u32::from_le_bytes(ebx),
        ecx: u32::from_le_bytes(ecx),
        edx: u32::from_le_bytes(edx),
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::Board;

    fn leaf(name: &str, leaf: u32, sub: u32) -> CpuidResult {
        let model = model_by_name(name, &HostFeatures::everything()).expect("a model");
        model.cpuid(&CpuState::reset(0), &Board::default(), VpIndex(0), leaf, sub)
    }

    #[test]
    fn models_say_what_they_are() {
        let v = leaf("max", 0, 0);
        let name = [v.ebx, v.edx, v.ecx].map(u32::to_le_bytes).concat();
        assert_eq!(name, b"GenuineIntel");
        assert_eq!(leaf("max", 1, 0).eax, 0x106CA);
        assert_eq!(leaf("max", 1, 0).ecx >> 31, 0, "no hypervisor unless the machine has one");
        assert_eq!(leaf("i486", 1, 0).edx, 1);
        assert_eq!(leaf("pentium3", 0x8000_0000, 0).edx, leaf("pentium3", 3, 0).edx);
        assert_eq!(leaf("max", 0x8000_0008, 0).eax, 0x3028);
        assert_eq!(leaf("max", 0xD, 0).ecx, 832);
        assert_eq!(leaf("x86-64-v2", 1, 0).ecx >> 28 & 1, 0, "no AVX");
    }

    #[test]
    fn unknown_models_are_refused_with_the_list() {
        let e = model_by_name("z80", &HostFeatures::everything()).expect_err("unknown");
        assert!(e.contains("z80") && e.contains("x86-64-v3") && !e.contains('\n'));
    }

    #[test]
    fn the_tsc_leaf_is_exact_or_absent() {
        let model = model_by_name("max", &HostFeatures::everything()).expect("max");
        let exact = model.clone().with_tsc(2_000_000_000, 1_000_000_000).frequency();
        assert_eq!((exact.eax, exact.ebx, exact.ecx), (1, 2, 1_000_000_000));
        assert_eq!(model.with_tsc(2_099_999_123, 1_000_000_000).frequency(), CpuidResult::default());
    }
}

//! CPUID feature bits by word (SDM 2A, CPUID, tables 3-8 to 3-19).
#![allow(missing_docs)]

/// Which register of which leaf a feature bit lies in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub(crate) enum Word {
    Leaf1Ecx,
    Leaf1Edx,
    Leaf7Ebx,
    Leaf7Ecx,
    Leaf7Edx,
    Ext1Ecx,
    Ext1Edx,
    LeafD1Eax,
}

pub(crate) const WORDS: usize = 8;

/// One feature bit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Feature(pub Word, pub u32, pub &'static str);

macro_rules! features {
    ($($name:ident = $word:ident $bit:literal;)*) => {
        $(pub(crate) const $name: Feature = Feature(Word::$word, $bit, stringify!($name));)*
        /// Every feature this module names.
        pub(crate) const ALL: &[Feature] = &[$($name),*];
    };
}

features! {
    SSE3 = Leaf1Ecx 0;
    PCLMULQDQ = Leaf1Ecx 1;
    SSSE3 = Leaf1Ecx 9;
    FMA = Leaf1Ecx 12;
    CX16 = Leaf1Ecx 13;
    PCID = Leaf1Ecx 17;
    SSE4_1 = Leaf1Ecx 19;
    SSE4_2 = Leaf1Ecx 20;
    X2APIC = Leaf1Ecx 21;
    MOVBE = Leaf1Ecx 22;
    POPCNT = Leaf1Ecx 23;
    TSC_DEADLINE = Leaf1Ecx 24;
    AES = Leaf1Ecx 25;
    XSAVE = Leaf1Ecx 26;
    AVX = Leaf1Ecx 28;
    F16C = Leaf1Ecx 29;
    RDRAND = Leaf1Ecx 30;
    FPU = Leaf1Edx 0;
    VME = Leaf1Edx 1;
    DE = Leaf1Edx 2;
    PSE = Leaf1Edx 3;
    TSC = Leaf1Edx 4;
    MSR = Leaf1Edx 5;
    PAE = Leaf1Edx 6;
    MCE = Leaf1Edx 7;
    CX8 = Leaf1Edx 8;
    APIC = Leaf1Edx 9;
    SEP = Leaf1Edx 11;
    MTRR = Leaf1Edx 12;
    PGE = Leaf1Edx 13;
    MCA = Leaf1Edx 14;
    CMOV = Leaf1Edx 15;
    PAT = Leaf1Edx 16;
    PSE36 = Leaf1Edx 17;
    CLFSH = Leaf1Edx 19;
    MMX = Leaf1Edx 23;
    FXSR = Leaf1Edx 24;
    SSE = Leaf1Edx 25;
    SSE2 = Leaf1Edx 26;
    SS = Leaf1Edx 27;
    FSGSBASE = Leaf7Ebx 0;
    TSC_ADJUST = Leaf7Ebx 1;
    BMI1 = Leaf7Ebx 3;
    AVX2 = Leaf7Ebx 5;
    FDP_EXCPTN_ONLY = Leaf7Ebx 6;
    SMEP = Leaf7Ebx 7;
    BMI2 = Leaf7Ebx 8;
    ERMS = Leaf7Ebx 9;
    INVPCID = Leaf7Ebx 10;
    RDSEED = Leaf7Ebx 18;
    ADX = Leaf7Ebx 19;
    SMAP = Leaf7Ebx 20;
    CLFLUSHOPT = Leaf7Ebx 23;
    SHA = Leaf7Ebx 29;
    UMIP = Leaf7Ecx 2;
    RDPID = Leaf7Ecx 22;
    FSRM = Leaf7Edx 4;
    SPEC_CTRL = Leaf7Edx 26;
    STIBP = Leaf7Edx 27;
    ARCH_CAPABILITIES = Leaf7Edx 29;
    SSBD = Leaf7Edx 31;
    LAHF = Ext1Ecx 0;
    LZCNT = Ext1Ecx 5;
    PREFETCHW = Ext1Ecx 8;
    SYSCALL = Ext1Edx 11;
    NX = Ext1Edx 20;
    PAGE_1G = Ext1Edx 26;
    RDTSCP = Ext1Edx 27;
    LM = Ext1Edx 29;
    XSAVEOPT = LeafD1Eax 0;
    XSAVEC = LeafD1Eax 1;
    XGETBV1 = LeafD1Eax 2;
}

/// A set of feature bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Features(pub [u32; WORDS]);

impl Features {
    pub(crate) fn of(list: &[&[Feature]]) -> Features {
        let mut set = Features::default();
        list.iter().copied().flatten().for_each(|&f| set.insert(f));
        set
    }

    pub(crate) fn insert(&mut self, f: Feature) {
        self.0[f.0 as usize] |= 1 << f.1;
    }

    pub(crate) fn remove(&mut self, f: Feature) {
        self.0[f.0 as usize] &= !(1 << f.1);
    }

    pub(crate) fn has(&self, f: Feature) -> bool {
        self.0[f.0 as usize] >> f.1 & 1 != 0
    }

    pub(crate) fn word(&self, w: Word) -> u32 {
        self.0[w as usize]
    }
}

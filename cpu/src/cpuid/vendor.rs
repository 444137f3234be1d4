//! Whose the host's processor is: what the manual leaves undefined, processors of one vendor leave alike.

/// Who made the host's processor.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum HostVendor {
    /// Intel, or anybody of whom no more is known.
    #[default]
    Intel,
    /// AMD.
    Amd,
}

impl HostVendor {
    /// Asks the host (CPUID leaf 0).
    pub fn detect() -> HostVendor {
        let id = std::arch::x86_64::__cpuid(0);
        let name = [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes);
        if name.as_flattened() == b"AuthenticAMD" { HostVendor::Amd } else { HostVendor::Intel }
    }

    /// Whether the interpreter is known to leave undefined flags just as the host does: it was measured on AMD's family 1AH
    /// (Zen 5) and on Intel's family 6, model CFH (Emerald Rapids).
    pub fn undefined_flags_are_measured() -> bool {
        let signature = std::arch::x86_64::__cpuid(1).eax;
        let family = (signature >> 8 & 15) + (signature >> 20 & 0xFF);
        let model = (signature >> 4 & 15) | (signature >> 12 & 0xF0);
        match HostVendor::detect() {
            HostVendor::Amd => family == 0x1A,
            HostVendor::Intel => (family, model) == (6, 0xCF),
        }
    }
}

//! What the translation of a block depends on besides its bytes.

/// Everything the translation of a block depends on besides its bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) struct Mode(pub u32);

impl Mode {
    /// 32-bit code.
    pub(crate) const CODE32: u32 = 1 << 0;
    /// CPL 3.
    pub(crate) const USER: u32 = 1 << 1;
    /// x87 and MMX usable (CR0.EM and TS clear).
    pub(crate) const X87: u32 = 1 << 2;
    /// SSE usable.
    pub(crate) const SSE: u32 = 1 << 3;
    /// AVX usable.
    pub(crate) const AVX: u32 = 1 << 4;
    /// 16-bit code.
    pub(crate) const CODE16: u32 = 1 << 5;
    /// DF is set.
    pub(crate) const DOWN: u32 = 1 << 6;
    /// Count retired instructions.
    pub(crate) const COUNTED: u32 = 1 << 7;
    /// Leave before more instructions are counted than the budget has.
    pub(crate) const BUDGETED: u32 = 1 << 22;
    /// The copy of a block that uses no base group.
    pub(crate) const UNGROUPED: u32 = 1 << 8;
    /// CR4.SMAP.
    pub(crate) const SMAP: u32 = 1 << 9;
    /// RDTSC may be translated.
    pub(crate) const TSC: u32 = 1 << 10;
    /// CR4.FSGSBASE.
    pub(crate) const FSGSBASE: u32 = 1 << 23;
    /// Repeated PAUSEs give the host's processor away.
    pub(crate) const YIELDS: u32 = 1 << 24;
    /// Memory is accessed through a window (see [`crate::windows`]).
    pub(crate) const WINDOW: u32 = 1 << 25;
    /// CPL 1 or 2.
    pub(crate) const MIDDLE: u32 = 1 << 11;
    /// Real-address or virtual-8086 mode.
    pub(crate) const LEGACY: u32 = 1 << 12;
    /// Not 64-bit code, and ES, SS or DS are not the flat, writable segments of 32-bit systems.
    pub(crate) const SEGMENTED: u32 = 1 << 13;
    /// The stack pointer is SP.
    pub(crate) const STACK16: u32 = 1 << 14;
    /// Some segment expands down.
    pub(crate) const EXPAND_DOWN: u32 = 1 << 15;

    /// Accesses through segment register `number` need few checks. 32-bit code: readable and writable up to 4 GiB. 16-bit
    /// code: readable and writable up to 64 KiB at least, with a base that keeps the alignment of offsets; in real-address and
    /// virtual-8086 mode also after other selectors are loaded. Not used for what is flat anyway.
    pub(crate) const fn plain(number: u8) -> u32 {
        1 << (16 + number)
    }

    /// Operand and address size of the code.
    pub(crate) fn bits(self) -> u32 {
        match self.0 & (Mode::CODE16 | Mode::CODE32) {
            0 => 64,
            Mode::CODE16 => 16,
            _ => 32,
        }
    }

    /// 64-bit code.
    pub(crate) fn code64(self) -> bool {
        self.bits() == 64
    }

    /// The linear address of a code address (see `segments`).
    pub(crate) fn linear(self, address: u64) -> u64 {
        if self.code64() { address } else { address & 0xFFFF_FFFF }
    }

    /// The code address `n` bytes behind `address`; linear addresses have 32 bits outside 64-bit code.
    pub(crate) fn advance(self, address: u64, n: u64) -> u64 {
        let sum = address.wrapping_add(n);
        if self.code64() { sum } else { address & !0xFFFF_FFFF | sum & 0xFFFF_FFFF }
    }

    /// Whether `bit` is set.
    pub(crate) fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }
}

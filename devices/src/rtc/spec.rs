//! Registers of the MC146818 (Motorola DS9718) and the PC/AT's use of its RAM.

/// Index register (and NMI mask in bit 7).
pub const INDEX: u16 = 0x70;
/// Data register.
pub const DATA: u16 = 0x71;

/// Seconds; alarm at +1.
pub const SECONDS: usize = 0;
/// Minutes; alarm at +1.
pub const MINUTES: usize = 2;
/// Hours; alarm at +1.
pub const HOURS: usize = 4;
/// Day of the week, Sunday is 1.
pub const WEEKDAY: usize = 6;
/// Day of the month.
pub const DAY: usize = 7;
/// Month.
pub const MONTH: usize = 8;
/// Year in the century.
pub const YEAR: usize = 9;
/// Register A.
pub const A: usize = 10;
/// Register B.
pub const B: usize = 11;
/// Register C.
pub const C: usize = 12;
/// Register D.
pub const D: usize = 13;
/// Century (ACPI FADT names this index).
pub const CENTURY: usize = 0x32;

/// Alarm registers: this value and above match anything.
pub const ANY: u8 = 0xC0;

/// A: update in progress.
pub const A_UIP: u8 = 1 << 7;
/// B: set; the clock stands still.
pub const B_SET: u8 = 1 << 7;
/// B: periodic interrupt enable.
pub const B_PIE: u8 = 1 << 6;
/// B: alarm interrupt enable.
pub const B_AIE: u8 = 1 << 5;
/// B: update-ended interrupt enable.
pub const B_UIE: u8 = 1 << 4;
/// B: square wave enable.
pub const B_SQWE: u8 = 1 << 3;
/// B: binary, not BCD.
pub const B_DM: u8 = 1 << 2;
/// B: 24 hours, not 12.
pub const B_24H: u8 = 1 << 1;
/// C: interrupt request.
pub const C_IRQF: u8 = 1 << 7;
/// C: periodic flag.
pub const C_PF: u8 = 1 << 6;
/// C: alarm flag.
pub const C_AF: u8 = 1 << 5;
/// C: update-ended flag.
pub const C_UF: u8 = 1 << 4;
/// D: valid RAM and time.
pub const D_VRT: u8 = 1 << 7;

/// Time base.
pub const CRYSTAL_HZ: u64 = 32_768;
/// UIP rises 244 us before an update of 1984 us.
pub const UIP_NS: u64 = 244_000 + 1_984_000;

//! Registers of the IA-PC HPET specification 1.0a.

/// Where the block lies on a PC.
pub const BASE: u64 = 0xFED0_0000;
/// Size of the block.
pub const LEN: u64 = 0x400;
/// Number of comparators.
pub const TIMERS: usize = 3;
/// Main counter period in femtoseconds: 10 ns, 100 MHz.
pub const PERIOD_FS: u64 = 10_000_000;
/// The same in hertz.
pub const HZ: u64 = 1_000_000_000_000_000 / PERIOD_FS;

/// General capabilities and ID.
pub const GCAP_ID: u64 = 0x000;
/// General configuration.
pub const GEN_CONF: u64 = 0x010;
/// General interrupt status.
pub const GINTR_STA: u64 = 0x020;
/// Main counter value.
pub const MAIN_CNT: u64 = 0x0F0;
/// First timer block; each is 20h long: configuration, comparator, FSB route.
pub const TIMER0: u64 = 0x100;

/// GCAP: revision 1, three timers, 64-bit counter, legacy replacement, vendor 8086h.
pub const GCAP: u64 = PERIOD_FS << 32 | 0x8086 << 16 | 1 << 15 | 1 << 13 | (TIMERS as u64 - 1) << 8 | 1;
/// GEN_CONF: counter runs, interrupts allowed.
pub const ENABLE_CNF: u64 = 1 << 0;
/// GEN_CONF: timer 0 is IRQ 0, timer 1 is IRQ 8.
pub const LEG_RT_CNF: u64 = 1 << 1;

/// Timer: level triggered.
pub const TN_INT_TYPE_CNF: u64 = 1 << 1;
/// Timer: interrupt enable.
pub const TN_INT_ENB_CNF: u64 = 1 << 2;
/// Timer: periodic.
pub const TN_TYPE_CNF: u64 = 1 << 3;
/// Timer: periodic capable.
pub const TN_PER_INT_CAP: u64 = 1 << 4;
/// Timer: 64 bits wide.
pub const TN_SIZE_CAP: u64 = 1 << 5;
/// Timer: the next comparator write sets the accumulator.
pub const TN_VAL_SET_CNF: u64 = 1 << 6;
/// Timer: 32-bit mode.
pub const TN_32MODE_CNF: u64 = 1 << 8;
/// Timer: interrupt route, bits 13:9.
pub const TN_INT_ROUTE_SHIFT: u32 = 9;
/// Timer: interrupt route, where it lies.
pub const TN_INT_ROUTE_CNF: u64 = 0x1F << TN_INT_ROUTE_SHIFT;
/// Timer: bits software can write.
pub const TN_WRITABLE: u64 =
    TN_INT_TYPE_CNF | TN_INT_ENB_CNF | TN_TYPE_CNF | TN_VAL_SET_CNF | TN_32MODE_CNF | TN_INT_ROUTE_CNF;
/// Bit of the route capability mask of input 0.
pub const TN_ROUTE_CAP_SHIFT: u32 = 32;

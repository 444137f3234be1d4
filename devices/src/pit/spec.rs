//! Intel 8254 (231164-005) control words, and port 61h of the PC/AT (IBM 6183355).

/// Input clock of all three counters: 14.31818 MHz / 12.
pub const HZ: u64 = 1_193_182;
/// Counter 0; counters 1 and 2 follow.
pub const COUNTER0: u16 = 0x40;
/// Control word register.
pub const CONTROL: u16 = 0x43;
/// System control port B.
pub const PORT_B: u16 = 0x61;

/// Read-back command: do not latch the count.
pub const READBACK_NO_COUNT: u8 = 1 << 5;
/// Read-back command: do not latch the status.
pub const READBACK_NO_STATUS: u8 = 1 << 4;
/// Status byte: the OUT pin.
pub const STATUS_OUT: u8 = 1 << 7;
/// Status byte: the count written is not yet in the counting element.
pub const STATUS_NULL: u8 = 1 << 6;

/// Port B: gate of counter 2.
pub const B_GATE2: u8 = 1 << 0;
/// Port B: speaker data.
pub const B_SPEAKER: u8 = 1 << 1;
/// Port B: bits software can write (gate, speaker, parity and channel check disable).
pub const B_WRITABLE: u8 = 0x0F;
/// Port B: toggles with every memory refresh.
pub const B_REFRESH: u8 = 1 << 4;
/// Port B: OUT of counter 2.
pub const B_OUT2: u8 = 1 << 5;
/// Half period of the refresh toggle in nanoseconds.
pub const REFRESH_NS: u64 = 15_085;

//! COM1, polled (16550A data sheet).

use crate::port::{in8, out8};
use core::fmt;

const COM1: u16 = 0x3F8;
const LSR_THRE: u8 = 1 << 5;
const LSR_TEMT: u8 = 1 << 6;
/// Gives up on a port that is not there.
const PATIENCE: u32 = 100_000;

/// 115200 baud, 8N1, FIFO on, no interrupts.
pub fn init() {
    for (register, value) in [(1, 0x00), (3, 0x80), (0, 0x01), (1, 0x00), (3, 0x03), (2, 0x07), (4, 0x03)] {
        out8(COM1 + register, value);
    }
}

fn wait(bit: u8) {
    for _ in 0..PATIENCE {
        if in8(COM1 + 5) & bit != 0 {
            return;
        }
    }
}

/// Waits until everything is on the wire.
pub fn drain() {
    wait(LSR_TEMT);
}

pub struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            wait(LSR_THRE);
            out8(COM1, byte);
        }
        Ok(())
    }
}

macro_rules! println {
    ($($argument:tt)*) => {{
        use core::fmt::Write;
        let _ = write!($crate::serial::Serial, $($argument)*);
        let _ = $crate::serial::Serial.write_str("\r\n");
    }};
}
pub(crate) use println;

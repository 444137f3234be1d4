//! PCI configuration mechanism 1 (PCI 2.3, 3.2.2.3.2), and addresses for BARs that no firmware assigned.
//!
//! Invariant: BARs are assigned by one thread, in [`init`].

use crate::cell::Fixed;
use crate::port::{in32, out32};

const CONFIG_ADDRESS: u16 = 0xCF8;
const CONFIG_DATA: u16 = 0xCFC;

const COMMAND: u8 = 0x04;
const CLASS: u8 = 0x08;
const HEADER_TYPE: u8 = 0x0C;
const BAR0: u8 = 0x10;
const CAPABILITIES: u8 = 0x34;
const INTERRUPT: u8 = 0x3C;
const COMMAND_IO_MEMORY_MASTER: u32 = 0b111;
const STATUS_CAPABILITIES: u32 = 1 << 20;

/// Where unassigned BARs go: above what firmware uses of the same windows.
const IO_WINDOW: u32 = 0xD000;
const MEMORY_WINDOW: u32 = 0xFE00_0000;

static NEXT: Fixed<(u32, u32)> = Fixed::new((IO_WINDOW, MEMORY_WINDOW));

/// A function of bus 0.
#[derive(Clone, Copy)]
pub struct Function {
    devfn: u8,
}

impl Function {
    pub fn read(self, register: u8) -> u32 {
        out32(CONFIG_ADDRESS, 1 << 31 | u32::from(self.devfn) << 8 | u32::from(register & 0xFC));
        in32(CONFIG_DATA)
    }

    pub fn write(self, register: u8, value: u32) {
        out32(CONFIG_ADDRESS, 1 << 31 | u32::from(self.devfn) << 8 | u32::from(register & 0xFC));
        out32(CONFIG_DATA, value);
    }

    /// Vendor in the low half, device in the high one.
    pub fn id(self) -> u32 {
        self.read(0)
    }

    /// Base class and subclass.
    pub fn class(self) -> u16 {
        (self.read(CLASS) >> 16) as u16
    }

    /// The address in BAR `index`; memory BARs are below 4 GiB after `init`.
    pub fn bar(self, index: u8) -> u64 {
        let value = self.read(BAR0 + 4 * index);
        u64::from(if value & 1 != 0 { value & !3 } else { value & !15 })
    }

    /// Interrupt line as firmware routed it, or by the PIIX wiring (PIRQ A-D to 10, 11, 10, 11) if it did not.
    pub fn interrupt_line(self) -> u8 {
        let [line, pin, ..] = self.read(INTERRUPT).to_le_bytes();
        if (1..16).contains(&line) {
            return line;
        }
        let pirq = (self.devfn >> 3).wrapping_add(pin.wrapping_sub(1)) & 3;
        if pirq & 1 == 0 { 10 } else { 11 }
    }

    /// Offsets of the capabilities with `id`.
    pub fn capabilities(self, id: u8) -> impl Iterator<Item = u8> {
        let has = self.read(COMMAND) & STATUS_CAPABILITIES != 0;
        let mut at = if has { self.read(CAPABILITIES) as u8 & 0xFC } else { 0 };
        let mut left = 48;
        core::iter::from_fn(move || {
            while at != 0 && left > 0 {
                let here = at;
                let head = self.read(here);
                at = (head >> 8) as u8 & 0xFC;
                left -= 1;
                if head as u8 == id {
                    return Some(here);
                }
            }
            None
        })
    }

    fn assign_bars(self) {
        let mut index = 0;
        while index < 6 {
            let register = BAR0 + 4 * index;
            let old = self.read(register);
            let wide = old & 0b111 == 0b100;
            let high = if wide { self.read(register + 4) } else { 0 };
            if old & !0xF == 0 || high != 0 {
                self.assign_bar(register, wide);
            }
            index += if wide { 2 } else { 1 };
        }
    }

    fn assign_bar(self, register: u8, wide: bool) {
        self.write(register, u32::MAX);
        let mask = self.read(register);
        if mask == 0 {
            return;
        }
        let io = mask & 1 != 0;
        let size = if io { (!(mask & !3) & 0xFFFF) + 1 } else { (!(mask & !15)).wrapping_add(1) };
        // SAFETY: one thread, during `init`.
        let next = unsafe { &mut *NEXT.get() };
        let next = if io { &mut next.0 } else { &mut next.1 };
        let size = size.max(16);
        let at = next.next_multiple_of(size);
        *next = at + size;
        self.write(register, at);
        if wide {
            self.write(register + 4, 0);
        }
    }

    /// Answers to I/O, memory and masters the bus.
    fn enable(self) {
        self.write(COMMAND, self.read(COMMAND) & 0xFFFF | COMMAND_IO_MEMORY_MASTER);
    }
}

/// Every function of bus 0.
pub fn functions() -> impl Iterator<Item = Function> {
    (0..32u8).flat_map(|slot| {
        let first = Function { devfn: slot << 3 };
        let count = match first.id() as u16 {
            0xFFFF => 0,
            _ if first.read(HEADER_TYPE) & 1 << 23 != 0 => 8,
            _ => 1,
        };
        (0..count).map(move |f| Function { devfn: slot << 3 | f }).filter(|f| f.id() as u16 != 0xFFFF)
    })
}

/// Assigns what firmware left unassigned and enables all storage functions.
pub fn init() {
    for function in functions() {
        if function.class() >> 8 == 1 {
            function.assign_bars();
            function.enable();
        }
    }
}

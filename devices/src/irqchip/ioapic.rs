//! The 82093AA I/O APIC (Intel 290566), with the EOI register of version 0x20.
//!
//! Inputs are "asserted" or not; the polarity bit is kept and has no effect.

use super::spec::delivery;
use super::spec::ioapic::*;

/// An interrupt message on its way to local APICs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Message {
    /// Destination field; `u32::MAX` is everyone (physical mode).
    pub destination: u32,
    /// Destination mode is logical.
    pub logical: bool,
    /// Delivery mode ([`delivery`]).
    pub delivery: u32,
    /// Vector.
    pub vector: u8,
    /// Level triggered.
    pub level: bool,
}

impl Message {
    /// A message with an 8-bit destination, where physical FFh is everyone.
    pub fn with_8bit_destination(destination: u8, logical: bool, rest: Message) -> Message {
        let everyone = destination == 0xFF && !logical;
        Message { destination: if everyone { u32::MAX } else { destination.into() }, logical, ..rest }
    }
}

fn delivery_mode(entry: u64) -> u32 {
    (entry >> 8 & 7) as u32
}

/// Whether a redirection entry is level triggered: the modes without an EOI never are, whatever bit 15 says (82093AA,
/// delivery mode).
fn is_level(entry: u64) -> bool {
    let has_eoi = matches!(delivery_mode(entry), delivery::FIXED | delivery::LOWEST_PRIORITY);
    has_eoi && entry & LEVEL != 0
}

/// The I/O APIC.
#[derive(Debug)]
pub struct IoApic {
    id: u32,
    select: u8,
    entries: [u64; PINS],
    lines: u32,
}

crate::snapshot!(IoApic { id, select, entries, lines });

impl IoApic {
    pub(super) fn new() -> IoApic {
        IoApic { id: 0, select: 0, entries: [MASKED; PINS], lines: 0 }
    }

    pub(super) fn reset(&mut self) {
        *self = IoApic { lines: self.lines, ..IoApic::new() };
    }

    /// Drives an input; the message to deliver, if one results.
    pub(super) fn set_line(&mut self, pin: usize, high: bool) -> Option<Message> {
        let entry = *self.entries.get(pin)?;
        let bit = 1 << pin;
        let rising = high && self.lines & bit == 0;
        self.lines = if high { self.lines | bit } else { self.lines & !bit };
        if is_level(entry) { self.level_message(pin) } else { self.edge_message(pin, rising) }
    }

    fn edge_message(&self, pin: usize, rising: bool) -> Option<Message> {
        (rising && self.entries[pin] & MASKED == 0).then(|| self.message(pin))
    }

    /// A level input asks while it is asserted, unmasked and not already waiting for an EOI.
    fn level_message(&mut self, pin: usize) -> Option<Message> {
        let entry = self.entries[pin];
        if self.lines & 1 << pin == 0 || entry & (MASKED | REMOTE_IRR) != 0 || !is_level(entry) {
            return None;
        }
        self.entries[pin] |= REMOTE_IRR;
        Some(self.message(pin))
    }

    fn message(&self, pin: usize) -> Message {
        let entry = self.entries[pin];
        let rest = Message {
            destination: 0,
            logical: false,
            delivery: delivery_mode(entry),
            vector: entry as u8,
            level: is_level(entry),
        };
        Message::with_8bit_destination((entry >> 56) as u8, entry & LOGICAL != 0, rest)
    }

    /// An EOI for `vector`: inputs still asserted ask again.
    pub(super) fn end_of_interrupt(&mut self, vector: u8) -> Vec<Message> {
        let mut again = Vec::new();
        for pin in 0..PINS {
            let entry = self.entries[pin];
            if entry as u8 == vector && entry & LEVEL != 0 && entry & REMOTE_IRR != 0 {
                self.entries[pin] &= !REMOTE_IRR;
                again.extend(self.level_message(pin));
            }
        }
        again
    }

    pub(super) fn load(&self, offset: u64) -> u32 {
        match offset & 0xFF {
            IOREGSEL => self.select.into(),
            IOWIN => self.read_register(),
            _ => 0,
        }
    }

    fn read_register(&self) -> u32 {
        match self.select {
            ID | ARB => self.id << 24,
            VER => VERSION | (PINS as u32 - 1) << 16,
            _ => match self.selected_entry() {
                Some((pin, true)) => (self.entries[pin] >> 32) as u32,
                Some((pin, false)) => self.entries[pin] as u32,
                None => 0,
            },
        }
    }

    /// Entry and "high half" that the select register points at.
    fn selected_entry(&self) -> Option<(usize, bool)> {
        let n = usize::from(self.select.checked_sub(REDTBL)?);
        (n / 2 < PINS).then_some((n / 2, n & 1 != 0))
    }

    pub(super) fn store(&mut self, offset: u64, value: u32) -> Vec<Message> {
        match offset & 0xFF {
            IOREGSEL => self.select = value as u8,
            IOWIN => return self.write_register(value).into_iter().collect(),
            EOI => return self.end_of_interrupt(value as u8),
            _ => {}
        }
        Vec::new()
    }

    fn write_register(&mut self, value: u32) -> Option<Message> {
        if self.select == ID {
            self.id = value >> 24 & 0xF;
        }
        let (pin, high) = self.selected_entry()?;
        let old = self.entries[pin];
        let new = match high {
            true => old & 0xFFFF_FFFF | u64::from(value) << 32,
            false => old & !0xFFFF_FFFF | u64::from(value),
        };
        let mut entry = new & WRITABLE | old & REMOTE_IRR;
        if entry & LEVEL == 0 {
            entry &= !REMOTE_IRR; // an edge entry has none; Linux clears a stuck one this way
        }
        self.entries[pin] = entry;
        self.level_message(pin)
    }

    pub(super) fn inspect(&self, field: &mut dyn FnMut(&str, &dyn std::fmt::Display)) {
        field("lines", &format_args!("{:06x}", self.lines));
        for (pin, entry) in self.entries.iter().enumerate().filter(|(_, e)| **e != MASKED) {
            field(&format!("pin{pin}"), &format_args!("{entry:016x}"));
        }
    }
}

#[cfg(test)]
mod tests;

//! Configuration space of one function, header type 0 (PCI 3.0, section 6.1).

use super::bars::{BarRange, BarSpace};
use crate::Width;

/// Register offsets of the type 0 header.
pub mod reg {
    /// Vendor ID.
    pub const VENDOR_ID: u8 = 0x00;
    /// Device ID.
    pub const DEVICE_ID: u8 = 0x02;
    /// Command.
    pub const COMMAND: u8 = 0x04;
    /// Status.
    pub const STATUS: u8 = 0x06;
    /// Revision ID; the class code follows.
    pub const REVISION_ID: u8 = 0x08;
    /// Header type.
    pub const HEADER_TYPE: u8 = 0x0E;
    /// First base address register.
    pub const BAR0: u8 = 0x10;
    /// Subsystem vendor ID.
    pub const SUBSYSTEM_VENDOR_ID: u8 = 0x2C;
    /// Subsystem ID.
    pub const SUBSYSTEM_ID: u8 = 0x2E;
    /// First capability.
    pub const CAPABILITIES: u8 = 0x34;
    /// Interrupt line: scratch for the guest's firmware.
    pub const INTERRUPT_LINE: u8 = 0x3C;
    /// Interrupt pin: 1 is INTA#.
    pub const INTERRUPT_PIN: u8 = 0x3D;
}

/// Bits of the command register.
pub mod command {
    /// I/O space enable.
    pub const IO: u16 = 1;
    /// Memory space enable.
    pub const MEMORY: u16 = 2;
    /// Bus master enable.
    pub const MASTER: u16 = 4;
    /// SERR# enable.
    pub const SERR: u16 = 0x100;
    /// INTx disable.
    pub const INTX_DISABLE: u16 = 0x400;
}

const STATUS_INTERRUPT: u16 = 1 << 3;
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// What a base address register decodes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes two registers.
    Memory64 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
}

#[derive(Clone, Copy, Debug)]
struct Bar {
    kind: BarKind,
    len: u64,
}

/// Who a function says it is.
#[derive(Clone, Copy, Debug)]
pub struct PciIdentity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Class, subclass, programming interface: 24 bits.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Subsystem vendor and subsystem IDs.
    pub subsystem: (u16, u16),
}

/// 256 bytes of configuration space with per-bit write masks.
pub struct PciConfig {
    bytes: [u8; 256],
    writable: [u8; 256],
    write_1_clears: [u8; 256],
    power_on: [u8; 256],
    bars: [Option<Bar>; 6],
    last_capability: u8,
    free: u8,
}

crate::snapshot!(PciConfig { bytes | writable, write_1_clears, power_on, bars, last_capability, free });

impl PciConfig {
    /// A function without BARs, interrupt pin or capabilities.
    pub fn new(id: PciIdentity) -> PciConfig {
        let mut c = PciConfig {
            bytes: [0; 256],
            writable: [0; 256],
            write_1_clears: [0; 256],
            power_on: [0; 256],
            bars: [None; 6],
            last_capability: reg::CAPABILITIES,
            free: 0x40,
        };
        c.preset(reg::VENDOR_ID, &id.vendor.to_le_bytes());
        c.preset(reg::DEVICE_ID, &id.device.to_le_bytes());
        c.preset(reg::REVISION_ID, &((id.class << 8) | u32::from(id.revision)).to_le_bytes());
        c.preset(reg::SUBSYSTEM_VENDOR_ID, &id.subsystem.0.to_le_bytes());
        c.preset(reg::SUBSYSTEM_ID, &id.subsystem.1.to_le_bytes());
        let writable =
            command::IO | command::MEMORY | command::MASTER | command::SERR | command::INTX_DISABLE;
        c.allow_writes(reg::COMMAND, &writable.to_le_bytes());
        c.write_1_clears[usize::from(reg::STATUS) + 1] = 0xF9;
        c.allow_writes(reg::INTERRUPT_LINE, &[0xFF]);
        c
    }

    /// Sets bytes now and after every reset.
    pub fn preset(&mut self, offset: u8, bytes: &[u8]) {
        for (at, &b) in (usize::from(offset)..256).zip(bytes) {
            self.bytes[at] = b;
            self.power_on[at] = b;
        }
    }

    /// Lets the guest write the bits set in `mask`.
    pub fn allow_writes(&mut self, offset: u8, mask: &[u8]) {
        for (at, &m) in (usize::from(offset)..256).zip(mask) {
            self.writable[at] = m;
        }
    }

    /// Gives the function BAR `index` of `len` bytes (a power of two, at least 4 for I/O and 16 for memory).
    pub fn set_bar(&mut self, index: u8, kind: BarKind, len: u64) {
        let registers = if matches!(kind, BarKind::Memory64 { .. }) { 2 } else { 1 };
        assert!(len.is_power_of_two() && len >= 4 && index + registers <= 6, "bad BAR");
        let at = reg::BAR0 + index * 4;
        let low = match kind {
            BarKind::Io => 1,
            BarKind::Memory32 => 0,
            BarKind::Memory64 { prefetchable } => 4 | if prefetchable { 8 } else { 0 },
        };
        self.preset(at, &[low]);
        let mask = !(len - 1) & if kind == BarKind::Io { !3 } else { !0xF };
        self.allow_writes(at, &mask.to_le_bytes()[..usize::from(registers) * 4]);
        self.bars[usize::from(index)] = Some(Bar { kind, len });
    }

    /// Declares the interrupt pin: 0 is INTA#.
    pub fn set_interrupt_pin(&mut self, pin: u8) {
        self.preset(reg::INTERRUPT_PIN, &[pin + 1]);
    }

    /// Marks the device as having more than one function.
    pub fn set_multi_function(&mut self) {
        let header = self.bytes[usize::from(reg::HEADER_TYPE)] | 0x80;
        self.preset(reg::HEADER_TYPE, &[header]);
    }

    /// Appends a capability: its ID, then `body` from its third byte on; returns its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> u8 {
        let at = self.free;
        let len = (body.len() + 2).next_multiple_of(4);
        assert!(usize::from(at) + len <= 256, "capabilities overflow");
        self.preset(self.last_capability, &[at]);
        self.preset(at, &[id, 0]);
        self.preset(at + 2, body);
        let status = self.word(reg::STATUS) | STATUS_CAPABILITIES;
        self.preset(reg::STATUS, &status.to_le_bytes());
        self.last_capability = at + 1;
        self.free = at.wrapping_add(len as u8);
        at
    }

    /// Back to the preset values.
    pub fn reset(&mut self) {
        self.bytes = self.power_on;
    }

    /// Reads `width`; a read past the end gives ones there.
    pub fn load(&self, offset: u8, width: Width) -> u32 {
        (0..width.bytes().min(4)).fold(0, |value, i| {
            let b = self.bytes.get(usize::from(offset) + i).copied().unwrap_or(0xFF);
            value | (u32::from(b) << (8 * i))
        })
    }

    /// Writes the bits that the guest may write.
    pub fn store(&mut self, offset: u8, width: Width, value: u32) {
        for i in 0..width.bytes().min(4) {
            let at = usize::from(offset) + i;
            if at > 255 {
                return;
            }
            let (new, mask) = ((value >> (8 * i)) as u8, self.writable[at]);
            self.bytes[at] = ((self.bytes[at] & !mask) | (new & mask)) & !(new & self.write_1_clears[at]);
        }
    }

    /// One byte.
    pub fn byte(&self, offset: u8) -> u8 {
        self.bytes[usize::from(offset)]
    }

    /// A word.
    pub fn word(&self, offset: u8) -> u16 {
        self.load(offset, Width::W16) as u16
    }

    /// Sets one byte, whatever the guest may do.
    pub fn set_byte(&mut self, offset: u8, value: u8) {
        self.bytes[usize::from(offset)] = value;
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.word(reg::COMMAND)
    }

    /// Shows the level of INTx in the status register.
    pub fn set_interrupt_status(&mut self, high: bool) {
        let s = &mut self.bytes[usize::from(reg::STATUS)];
        *s = (*s & !(STATUS_INTERRUPT as u8)) | if high { STATUS_INTERRUPT as u8 } else { 0 };
    }

    /// Whether BAR `index` exists, and how long it is.
    pub fn bar_len(&self, index: u8) -> Option<u64> {
        self.bars.get(usize::from(index)).copied().flatten().map(|b| b.len)
    }

    /// What BAR `index` decodes now; `None` while its decoder is off or its address cannot be decoded.
    pub fn bar_range(&self, index: u8) -> Option<BarRange> {
        let bar = self.bars.get(usize::from(index)).copied().flatten()?;
        let at = reg::BAR0 + index * 4;
        let low = u64::from(self.load(at, Width::W32));
        let (enable, space, base, limit) = match bar.kind {
            BarKind::Io => (command::IO, BarSpace::Io, low & !3, 1 << 16),
            BarKind::Memory32 => (command::MEMORY, BarSpace::Memory, low & !0xF, 1 << 32),
            BarKind::Memory64 { .. } => {
                let high = u64::from(self.load(at + 4, Width::W32));
                (command::MEMORY, BarSpace::Memory, (high << 32) | (low & !0xF), 1 << 52)
            }
        };
        let end = base.checked_add(bar.len)?;
        (self.command() & enable != 0 && base != 0 && end <= limit).then_some(BarRange {
            space,
            base,
            len: bar.len,
        })
    }
}

//! The 8259A interrupt controller pair (Intel 231468-003) with the edge/level registers of a PCI chipset.
//!
//! A request is an input that is high and, where it is edge triggered, rose since it was last served: one whose input
//! falls before INTA is gone ("Edge and level triggered modes").

use super::spec::pic::*;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Expect {
    Command,
    Icw2,
    Icw3,
    Icw4,
}

/// One 8259A.
#[derive(Debug)]
pub struct Pic {
    // configuration
    slave: bool,
    // bookkeeping
    /// Levels of the inputs.
    lines: u8,
    /// Edge sense latches: set by a rising input; reset by INTA, by a falling input and by ICW1.
    edges: u8,
    // guest-visible state
    isr: u8,
    imr: u8,
    elcr: u8,
    icw1: u8,
    icw2: u8,
    icw3: u8,
    icw4: u8,
    expect: Expect,
    lowest: u8,
    special_mask: bool,
    rotate_in_aeoi: bool,
    read_isr: bool,
    poll: bool,
}

crate::snapshot_enum!(Expect { Command, Icw2, Icw3, Icw4 });
crate::snapshot!(Pic {
    lines,
    edges,
    isr,
    imr,
    elcr,
    icw1,
    icw2,
    icw3,
    icw4,
    expect,
    lowest,
    special_mask,
    rotate_in_aeoi,
    read_isr,
    poll
    | slave
});
crate::snapshot!(PicPair { master, slave });

impl Pic {
    fn new(slave: bool) -> Pic {
        Pic {
            slave,
            lines: 0,
            edges: 0,
            isr: 0,
            imr: 0xFF,
            elcr: 0,
            icw1: ICW1_IC4,
            icw2: 0,
            icw3: 0,
            icw4: 1,
            expect: Expect::Command,
            lowest: 7,
            special_mask: false,
            rotate_in_aeoi: false,
            read_isr: false,
            poll: false,
        }
    }

    fn level_triggered(&self) -> u8 {
        if self.icw1 & ICW1_LTIM != 0 { 0xFF } else { self.elcr }
    }

    fn set_line(&mut self, n: u8, high: bool) {
        let bit = 1 << n;
        if !high {
            (self.lines, self.edges) = (self.lines & !bit, self.edges & !bit);
        } else if self.lines & bit == 0 {
            (self.lines, self.edges) = (self.lines | bit, self.edges | bit);
        }
    }

    /// The interrupt request register.
    fn irr(&self) -> u8 {
        self.lines & (self.edges | self.level_triggered())
    }

    /// Whether ICW3 says that a slave is at input `n`.
    fn has_slave(&self, n: u8) -> bool {
        !self.slave && self.icw1 & ICW1_SNGL == 0 && self.icw3 & 1 << n != 0
    }

    /// The request that INT is raised for: highest priority first, down to what is in service. In special fully nested
    /// mode a slave in service does not block itself.
    fn pending(&self) -> Option<u8> {
        let requests = self.irr() & !self.imr;
        let in_service = if self.special_mask { self.isr & !self.imr } else { self.isr };
        for k in 1..=8 {
            let n = (self.lowest + k) & 7;
            let blocks = in_service & 1 << n != 0;
            let nests = self.icw4 & ICW4_SFNM != 0 && self.has_slave(n);
            if requests & 1 << n != 0 && (!blocks || nests) {
                return Some(n);
            }
            if blocks {
                return None;
            }
        }
        None
    }

    /// INTA: the input taken, or 7 when the request is gone (spurious, not marked in service).
    fn acknowledge(&mut self) -> u8 {
        let Some(n) = self.pending() else { return 7 };
        self.edges &= !(1 << n);
        if self.icw4 & ICW4_AEOI == 0 {
            self.isr |= 1 << n;
        } else if self.rotate_in_aeoi {
            self.lowest = n;
        }
        n
    }

    fn vector(&self, n: u8) -> u8 {
        self.icw2 & 0xF8 | n
    }

    fn read(&mut self, a0: bool) -> u8 {
        if std::mem::take(&mut self.poll) {
            return if self.pending().is_some() { 0x80 | self.acknowledge() } else { 0 };
        }
        match (a0, self.read_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr(),
        }
    }

    fn write(&mut self, a0: bool, value: u8) {
        match (a0, self.expect) {
            (false, _) if value & ICW1_INIT != 0 => self.initialize(value),
            (false, _) if value & OCW3 != 0 => self.ocw3(value),
            (false, _) => self.ocw2(value),
            (true, Expect::Command) => self.imr = value,
            (true, Expect::Icw2) => {
                self.icw2 = value;
                self.expect = if self.icw1 & ICW1_SNGL == 0 { Expect::Icw3 } else { self.after_icw3() };
            }
            (true, Expect::Icw3) => {
                self.icw3 = value;
                self.expect = self.after_icw3();
            }
            (true, Expect::Icw4) => {
                self.icw4 = value;
                self.expect = Expect::Command;
            }
        }
    }

    fn after_icw3(&self) -> Expect {
        if self.icw1 & ICW1_IC4 != 0 { Expect::Icw4 } else { Expect::Command }
    }

    fn initialize(&mut self, icw1: u8) {
        let (slave, lines, elcr) = (self.slave, self.lines, self.elcr);
        let icw3 = if slave { 7 } else { 0 }; // "the slave mode address is set to 7"
        *self = Pic { imr: 0, icw1, icw3, icw4: 0, expect: Expect::Icw2, lines, elcr, ..Pic::new(slave) };
    }

    fn ocw3(&mut self, value: u8) {
        if value & OCW3_ESMM != 0 {
            self.special_mask = value & OCW3_SMM != 0;
        }
        self.poll |= value & OCW3_P != 0;
        if value & OCW3_RR != 0 {
            self.read_isr = value & OCW3_RIS != 0;
        }
    }

    fn ocw2(&mut self, value: u8) {
        let n = value & 7;
        match value >> 5 {
            0b000 => self.rotate_in_aeoi = false,
            0b100 => self.rotate_in_aeoi = true,
            0b001 => {
                self.end_of_interrupt();
            }
            0b101 => {
                if let Some(n) = self.end_of_interrupt() {
                    self.lowest = n;
                }
            }
            0b011 => self.isr &= !(1 << n),
            0b111 => {
                self.isr &= !(1 << n);
                self.lowest = n;
            }
            0b110 => self.lowest = n,
            _ => {} // 010: no operation
        }
    }

    /// Non-specific EOI: clears the highest-priority bit in service, but none that special mask mode hides.
    fn end_of_interrupt(&mut self) -> Option<u8> {
        let isr = if self.special_mask { self.isr & !self.imr } else { self.isr };
        let n = (1..=8).map(|k| (self.lowest + k) & 7).find(|n| isr & 1 << n != 0)?;
        self.isr &= !(1 << n);
        Some(n)
    }
}

/// Master and slave, wired as in the PC/AT.
#[derive(Debug)]
pub struct PicPair {
    pub(super) master: Pic,
    pub(super) slave: Pic,
}

impl PicPair {
    pub(super) fn new() -> PicPair {
        PicPair { master: Pic::new(false), slave: Pic::new(true) }
    }

    /// Back to power-on, keeping the levels of the lines.
    pub(super) fn reset(&mut self) {
        for pic in [&mut self.master, &mut self.slave] {
            *pic = Pic { lines: pic.lines, ..Pic::new(pic.slave) };
        }
    }

    pub(super) fn set_line(&mut self, irq: u8, high: bool) {
        match irq {
            CASCADE => {}
            0..8 => self.master.set_line(irq, high),
            _ => self.slave.set_line(irq & 7, high),
        }
        self.cascade();
    }

    /// The slave's INT pin drives the master's input 2.
    fn cascade(&mut self) {
        self.master.set_line(CASCADE, self.slave.pending().is_some());
    }

    /// The master's INT pin.
    pub(super) fn int(&self) -> bool {
        self.master.pending().is_some()
    }

    /// INTA cycle: the vector on the data bus.
    pub(super) fn acknowledge(&mut self) -> u8 {
        let n = self.master.acknowledge();
        let vector = if !self.master.has_slave(n) {
            self.master.vector(n)
        } else if n == CASCADE && self.slave.icw3 & 7 == CASCADE {
            // The slave lowers INT between the two pulses: what it asks for next is a new edge for the master.
            let n = self.slave.acknowledge();
            self.master.set_line(CASCADE, false);
            self.slave.vector(n)
        } else {
            FLOATING // no slave answers to the address on the cascade lines
        };
        self.cascade();
        vector
    }

    /// Ports 20h, 21h, A0h, A1h, 4D0h, 4D1h.
    pub(super) fn read(&mut self, port: u16) -> u8 {
        let value = match port {
            0x20 | 0x21 => self.master.read(port & 1 != 0),
            0xA0 | 0xA1 => self.slave.read(port & 1 != 0),
            0x4D0 => self.master.elcr,
            0x4D1 => self.slave.elcr,
            _ => 0xFF,
        };
        self.cascade();
        value
    }

    pub(super) fn write(&mut self, port: u16, value: u8) {
        match port {
            0x20 | 0x21 => self.master.write(port & 1 != 0, value),
            0xA0 | 0xA1 => self.slave.write(port & 1 != 0, value),
            0x4D0 => self.master.elcr = value & ELCR_MASTER,
            0x4D1 => self.slave.elcr = value & ELCR_SLAVE,
            _ => {}
        }
        self.cascade();
    }

    pub(super) fn inspect(&self, field: &mut dyn FnMut(&str, &dyn std::fmt::Display)) {
        for (name, pic) in [("master", &self.master), ("slave", &self.slave)] {
            let text = format!(
                "irr {:02x} isr {:02x} imr {:02x} lines {:02x} elcr {:02x} base {:02x} lowest {}",
                pic.irr(),
                pic.isr,
                pic.imr,
                pic.lines,
                pic.elcr,
                pic.icw2,
                pic.lowest
            );
            field(name, &text);
        }
    }
}

#[cfg(test)]
mod tests;

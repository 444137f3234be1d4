//! What a BIOS does to PCI at power-on: an address for every BAR, interrupt lines, decoders on (PCI 3.0, section
//! 6.2.5.1 and the PCI Firmware Specification, chapter 3).

use paravane_devices::Width;
use paravane_devices::pci::{PciBus, PirqRouter, command, pirq_of, reg};

/// Ports handed out to BARs: above everything fixed.
const IO_SPACE: (u64, u64) = (0xC000, 0x1_0000);
/// Addresses handed out to BARs: in the hole, below the fixed APIC and HPET pages.
const MEMORY_SPACE: (u64, u64) = (0xE000_0000, 0xFEC0_0000);

/// The address space left.
struct Space {
    next: u64,
    end: u64,
}

impl Space {
    /// A naturally aligned piece of `len` bytes.
    fn take(&mut self, len: u64) -> Option<u64> {
        let at = self.next.checked_next_multiple_of(len.max(1))?;
        let end = at.checked_add(len).filter(|&e| e <= self.end)?;
        self.next = end;
        Some(at)
    }
}

/// One function during assignment.
struct Function<'a> {
    pci: &'a mut PciBus,
    slot: u8,
    function: u8,
}

impl Function<'_> {
    fn load(&self, offset: u8, width: Width) -> u32 {
        self.pci.config_load(self.slot, self.function, offset, width)
    }

    fn store(&mut self, offset: u8, width: Width, value: u32) {
        self.pci.config_store(self.slot, self.function, offset, width, value);
    }

    /// Writes ones, returns what stuck.
    fn size_bits(&mut self, bar: u8) -> u32 {
        self.store(bar, Width::W32, u32::MAX);
        self.load(bar, Width::W32)
    }

    /// Assigns every BAR; returns the decoders to enable.
    fn assign_bars(&mut self, io: &mut Space, memory: &mut Space) -> u16 {
        let mut decoders = 0;
        let mut bar = reg::BAR0;
        while bar < reg::BAR0 + 24 {
            let bits = self.size_bits(bar);
            let is_io = bits & 1 != 0;
            let wide = !is_io && bits & 6 == 4;
            let mask = u64::from(bits & if is_io { !3 } else { !0xF });
            let mask = mask | if is_io { 0xFFFF_0000 } else { 0 } | !0xFFFF_FFFF;
            if bits != 0 && mask & 0xFFFF_FFFF != 0 {
                let len = mask.wrapping_neg();
                let place = if is_io { io.take(len) } else { memory.take(len) };
                // What does not fit stays unassigned; a guest may do better.
                self.store(bar, Width::W32, place.unwrap_or(0) as u32);
                if place.is_some() {
                    decoders |= if is_io { command::IO } else { command::MEMORY };
                }
            }
            if wide {
                self.store(bar + 4, Width::W32, 0);
                bar += 4;
            }
            bar += 4;
        }
        decoders
    }

    /// Tells the guest which ISA interrupt the function's pin reaches.
    fn set_interrupt_line(&mut self, router: &PirqRouter) {
        let pin = self.load(reg::INTERRUPT_PIN, Width::W8) as u8;
        if (1..=4).contains(&pin)
            && let Some(irq) = router.route(pirq_of(self.slot, pin - 1))
        {
            self.store(reg::INTERRUPT_LINE, Width::W8, u32::from(irq));
        }
    }
}

/// Assigns every function on `pci` and switches decoding on.
pub(super) fn assign(pci: &mut PciBus, router: &PirqRouter) {
    let mut io = Space { next: IO_SPACE.0, end: IO_SPACE.1 };
    let mut memory = Space { next: MEMORY_SPACE.0, end: MEMORY_SPACE.1 };
    for (slot, function) in (0..32).flat_map(|s| (0..8).map(move |f| (s, f))) {
        let mut f = Function { pci, slot, function };
        if f.load(reg::VENDOR_ID, Width::W16) == 0xFFFF {
            continue;
        }
        let before = f.load(reg::COMMAND, Width::W16);
        f.store(reg::COMMAND, Width::W16, before & !u32::from(command::IO | command::MEMORY));
        let decoders = f.assign_bars(&mut io, &mut memory);
        f.store(reg::COMMAND, Width::W16, before | u32::from(decoders));
        f.set_interrupt_line(router);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_aligned_and_bounded() {
        let mut s = Space { next: 0xC008, end: 0xC100 };
        assert_eq!(s.take(0x20), Some(0xC020));
        assert_eq!(s.take(0x10), Some(0xC040));
        assert_eq!(s.take(0x80), Some(0xC080));
        assert_eq!(s.take(1), None);
    }
}

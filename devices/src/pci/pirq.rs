//! INTx routing: pins of slots to PIRQ wires, PIRQ wires to ISA interrupts (82371SB, section 2.2.6, PIRQRC).
//!
//! Pin `p` (0 is INTA#) of slot `s` drives PIRQ `(s + p) & 3`. A PIRQ is the wired OR of its pins. PIRQ A, B, C
//! and D go to ISA IRQ 10, 11, 10, 11 as the firmware leaves PIRQRC; a guest may reroute them. The same
//! wires reach the 8259s and I/O APIC inputs of the same number, so _PRT and the MP table say: GSI 10 and 11,
//! level triggered, active high at the controllers' inputs.

use crate::counters::Counter;
use crate::irq::{IrqLine, IrqSink};
use crate::snapshot::{Snapshot, StateError, StateStream};
use std::sync::{Arc, Mutex};

/// PIRQRC[A-D] as the firmware leaves them.
pub const DEFAULT_ROUTES: [u8; 4] = [10, 11, 10, 11];

/// PIRQRC bit 7: the wire goes nowhere.
const DISABLED: u8 = 0x80;

/// The PIRQ wire (0 is A) that pin `pin` (0 is INTA#) of `slot` drives.
pub const fn pirq_of(slot: u8, pin: u8) -> u8 {
    slot.wrapping_add(pin) & 3
}

struct Wires {
    drivers: [u32; 4],
    routes: [u8; 4],
}

crate::snapshot!(Wires { drivers, routes });

/// Joins the slots' interrupt pins to interrupt controller inputs.
pub struct PirqRouter {
    outputs: [IrqLine; 16],
    wires: Mutex<Wires>,
}

impl PirqRouter {
    /// A router that drives inputs 0-15 of `sink` (ISA IRQ numbers, wired to PIC and I/O APIC alike).
    pub fn new(sink: &Arc<dyn IrqSink>) -> Arc<PirqRouter> {
        let outputs = std::array::from_fn(|i| IrqLine::new(Arc::clone(sink), i as u32, Counter::detached()));
        Arc::new(PirqRouter { outputs, wires: Mutex::new(Wires { drivers: [0; 4], routes: DEFAULT_ROUTES }) })
    }

    /// Walks over the routes and the levels on both sides.
    pub fn shared_state(&self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        let PirqRouter { outputs, wires } = self;
        wires.lock().expect("PIRQ wires").state(s)?;
        outputs.iter().try_for_each(|line| line.shared_state(s))
    }

    /// The wire of pin `pin` (0 is INTA#) of `slot`; its assertions are counted in `raised`.
    pub fn intx(self: &Arc<Self>, slot: u8, pin: u8, raised: Counter) -> IrqLine {
        IrqLine::new(Arc::clone(self) as Arc<dyn IrqSink>, u32::from(pirq_of(slot, pin)), raised)
    }

    /// Sets PIRQRC register `pirq` (0 is A).
    pub fn set_route(&self, pirq: u8, value: u8) {
        let mut w = self.wires.lock().expect("PIRQ wires");
        w.routes[usize::from(pirq & 3)] = value;
        self.drive(&w);
    }

    /// The ISA IRQ that PIRQ `pirq` reaches now.
    pub fn route(&self, pirq: u8) -> Option<u8> {
        destination(self.wires.lock().expect("PIRQ wires").routes[usize::from(pirq & 3)])
    }

    fn drive(&self, w: &Wires) {
        for (irq, line) in self.outputs.iter().enumerate() {
            let high = (0..4).any(|p| w.drivers[p] > 0 && destination(w.routes[p]) == Some(irq as u8));
            line.set(high);
        }
    }
}

/// IRQ 0, 1, 2, 8 and 13 are reserved values of PIRQRC.
fn destination(route: u8) -> Option<u8> {
    let irq = route & 0xF;
    (route & DISABLED == 0 && !matches!(irq, 0 | 1 | 2 | 8 | 13)).then_some(irq)
}

impl IrqSink for PirqRouter {
    fn set_level(&self, input: u32, high: bool) {
        let mut w = self.wires.lock().expect("PIRQ wires");
        let drivers = &mut w.drivers[(input & 3) as usize];
        *drivers = if high { drivers.saturating_add(1) } else { drivers.saturating_sub(1) };
        self.drive(&w);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Pic(Mutex<u16>);

    impl IrqSink for Pic {
        fn set_level(&self, input: u32, high: bool) {
            let mut levels = self.0.lock().unwrap();
            *levels = (*levels & !(1 << input)) | (u16::from(high) << input);
        }
    }

    #[test]
    fn pins_share_wires_and_follow_pirqrc() {
        let pic = Arc::new(Pic::default());
        let router = PirqRouter::new(&(Arc::clone(&pic) as Arc<dyn IrqSink>));
        let levels = || *pic.0.lock().unwrap();
        let (a, c, d) = (
            router.intx(4, 0, Counter::detached()),
            router.intx(5, 1, Counter::detached()),
            router.intx(7, 0, Counter::detached()),
        );
        a.set(true);
        c.set(true);
        assert_eq!(levels(), 1 << 10, "PIRQ A and C both reach IRQ 10");
        a.set(false);
        assert_eq!(levels(), 1 << 10, "the other driver holds the wire");
        router.set_route(2, 5);
        assert_eq!(levels(), 1 << 5);
        router.set_route(2, 0x80);
        d.set(true);
        assert_eq!(levels(), 1 << 11);
    }
}

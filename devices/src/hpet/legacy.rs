//! Who drives IRQ 0 and IRQ 8: the PIT and the RTC, or the HPET in legacy replacement mode.

use crate::irq::{IrqLine, IrqSink};
use crate::snapshot::{Snapshot, StateError, StateStream};
use std::sync::{Arc, Mutex, PoisonError};

#[derive(Default)]
struct State {
    replaced: bool,
    high: [bool; 4],
}

/// The switch between the two. Its inputs are the constants below; its outputs are the IRQ lines.
pub struct LegacyRoute {
    state: Mutex<State>,
    irq0: IrqLine,
    irq8: IrqLine,
}

crate::snapshot!(State { replaced, high });

impl LegacyRoute {
    /// Walks over the switch and the levels at both of its sides.
    pub fn shared_state(&self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        let LegacyRoute { state, irq0, irq8 } = self;
        state.lock().unwrap_or_else(PoisonError::into_inner).state(s)?;
        irq0.shared_state(s)?;
        irq8.shared_state(s)
    }

    /// Input for the PIT's OUT0.
    pub const PIT: u32 = 0;
    /// Input for the RTC's IRQ.
    pub const RTC: u32 = 1;
    /// Input for HPET timer 0.
    pub const HPET0: u32 = 2;
    /// Input for HPET timer 1.
    pub const HPET1: u32 = 3;

    /// A switch set to PIT and RTC.
    pub fn new(irq0: IrqLine, irq8: IrqLine) -> Arc<LegacyRoute> {
        Arc::new(LegacyRoute { state: Mutex::default(), irq0, irq8 })
    }

    /// Hands the lines to the HPET, or back.
    pub fn set_replaced(&self, replaced: bool) {
        let mut s = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        s.replaced = replaced;
        self.drive(&s);
    }

    fn drive(&self, s: &State) {
        let first = if s.replaced { LegacyRoute::HPET0 } else { LegacyRoute::PIT } as usize;
        self.irq0.set(s.high[first]);
        self.irq8.set(s.high[first + 1]);
    }
}

impl IrqSink for LegacyRoute {
    fn set_level(&self, input: u32, high: bool) {
        // Held while the lines are driven, so that two sources cannot overtake each other.
        let mut s = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(level) = s.high.get_mut(input as usize) {
            *level = high;
            self.drive(&s);
        }
    }
}

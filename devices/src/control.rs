//! What devices may ask of the machine as a whole: power, reset, the A20 gate.

use crate::snapshot::{Snapshot, StateError, StateStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// The machine's side of power-off, reset, debug exit and A20. Calls record a request and return.
pub trait MachineControl: Send + Sync {
    /// Soft-off (S5) was entered.
    fn power_off(&self);
    /// The reset line was pulsed; `reason` names the register that did it.
    fn reset(&self, reason: &'static str);
    /// The guest wrote `value` to the debug-exit port.
    fn debug_exit(&self, value: u32);
    /// Address line 20 is enabled (`on`) or held low.
    fn set_a20(&self, on: bool);
}

/// Who may enable address line 20.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum A20Source {
    /// Output port of the keyboard controller, bit 1.
    KeyboardController,
    /// Port 92h, bit 1.
    Port92,
}

impl A20Source {
    const fn bit(self) -> u8 {
        match self {
            A20Source::KeyboardController => 1,
            A20Source::Port92 => 2,
        }
    }
}

/// The A20 gate: the line is enabled while any source enables it.
pub struct A20Gate {
    control: Arc<dyn MachineControl>,
    enabled_by: AtomicU8,
}

impl A20Gate {
    /// A gate that tells `control` about changes. A20 starts enabled: the keyboard controller's output port is
    /// high after reset, or the processor could not fetch from its reset vector.
    pub fn new(control: Arc<dyn MachineControl>) -> Arc<A20Gate> {
        Arc::new(A20Gate { control, enabled_by: AtomicU8::new(A20Source::KeyboardController.bit()) })
    }

    /// Drives one source.
    pub fn set(&self, source: A20Source, on: bool) {
        let bit = source.bit();
        let before = if on {
            self.enabled_by.fetch_or(bit, Ordering::AcqRel)
        } else {
            self.enabled_by.fetch_and(!bit, Ordering::AcqRel)
        };
        let after = if on { before | bit } else { before & !bit };
        if (before != 0) != (after != 0) {
            self.control.set_a20(after != 0);
        }
    }

    /// Walks over who enables the line; loading it tells nobody, for processors have a state of their own.
    pub fn shared_state(&self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        let mut bits = self.enabled_by.load(Ordering::Acquire);
        bits.state(s)?;
        self.enabled_by.store(bits, Ordering::Release);
        Ok(())
    }

    /// Whether `source` enables the line.
    pub fn is_set(&self, source: A20Source) -> bool {
        self.enabled_by.load(Ordering::Acquire) & source.bit() != 0
    }

    /// Whether the line is enabled.
    pub fn is_enabled(&self) -> bool {
        self.enabled_by.load(Ordering::Acquire) != 0
    }
}

/// A machine that records what it was asked for; for tests.
#[cfg(test)]
#[derive(Default)]
pub(crate) struct RecordedControl(pub(crate) std::sync::Mutex<Vec<String>>);

#[cfg(test)]
impl RecordedControl {
    pub(crate) fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().expect("control log"))
    }

    fn push(&self, what: String) {
        self.0.lock().expect("control log").push(what);
    }
}

#[cfg(test)]
impl MachineControl for RecordedControl {
    fn power_off(&self) {
        self.push("power-off".into());
    }

    fn reset(&self, reason: &'static str) {
        self.push(format!("reset {reason}"));
    }

    fn debug_exit(&self, value: u32) {
        self.push(format!("exit {value}"));
    }

    fn set_a20(&self, on: bool) {
        self.push(format!("a20 {on}"));
    }
}

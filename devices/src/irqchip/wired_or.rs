//! Several wires on one input: high while any of them is.

use crate::irq::{IrqLine, IrqSink};
use crate::snapshot::{Snapshot, StateError, StateStream};
use std::sync::{Arc, Mutex, PoisonError};

/// Joins up to 64 sources onto one line; its own inputs are the sources' numbers.
pub struct WiredOr {
    high: Mutex<u64>,
    line: IrqLine,
}

impl WiredOr {
    /// Walks over who drives the line, and its level.
    pub fn shared_state(&self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        let WiredOr { high, line } = self;
        high.lock().unwrap_or_else(PoisonError::into_inner).state(s)?;
        line.shared_state(s)
    }

    /// Joins sources onto `line`.
    pub fn new(line: IrqLine) -> Arc<WiredOr> {
        Arc::new(WiredOr { high: Mutex::new(0), line })
    }
}

impl IrqSink for WiredOr {
    fn set_level(&self, input: u32, high: bool) {
        let Some(bit) = 1u64.checked_shl(input) else { return };
        // Held while the line is driven, so that two sources cannot overtake each other.
        let mut sources = self.high.lock().unwrap_or_else(PoisonError::into_inner);
        *sources = if high { *sources | bit } else { *sources & !bit };
        self.line.set(*sources != 0);
    }
}

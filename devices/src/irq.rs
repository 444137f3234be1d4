//! Interrupt wires. A device owns the wire, never the number at its other end.

use crate::counters::Counter;
use crate::snapshot::{Snapshot, StateError, StateStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Where interrupt wires end: the interrupt controllers behind the machine's wiring.
pub trait IrqSink: Send + Sync {
    /// Drives input `input` high or low.
    fn set_level(&self, input: u32, high: bool);
}

/// Takes message-signalled interrupts: a 32-bit store to the local APIC address range.
pub trait MsiSink: Send + Sync {
    /// Delivers the message.
    fn msi(&self, address: u64, data: u32);
}

/// One interrupt wire.
pub struct IrqLine {
    sink: Option<Arc<dyn IrqSink>>,
    input: u32,
    high: AtomicBool,
    raised: Counter,
}

impl IrqLine {
    /// A wire to `input` of `sink`; rising edges are counted in `raised`.
    pub fn new(sink: Arc<dyn IrqSink>, input: u32, raised: Counter) -> IrqLine {
        IrqLine { sink: Some(sink), input, high: AtomicBool::new(false), raised }
    }

    /// A wire that ends nowhere.
    pub fn unconnected() -> IrqLine {
        IrqLine { sink: None, input: 0, high: AtomicBool::new(false), raised: Counter::detached() }
    }

    /// Drives the wire; repeating a level does nothing.
    pub fn set(&self, high: bool) {
        if self.high.swap(high, Ordering::AcqRel) == high {
            return;
        }
        if high {
            self.raised.add(1);
        }
        if let Some(sink) = &self.sink {
            sink.set_level(self.input, high);
        }
    }

    /// Low to high to low: one edge.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }

    /// Walks over the level; loading it drives nothing, for what is at the other end has a state of its own.
    pub fn shared_state(&self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        let mut high = self.is_high();
        high.state(s)?;
        self.high.store(high, Ordering::Release);
        Ok(())
    }

    /// The level last driven.
    pub fn is_high(&self) -> bool {
        self.high.load(Ordering::Acquire)
    }
}

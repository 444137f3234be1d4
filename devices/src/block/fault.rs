//! Faults on demand, for tests and for seeing how guests take them.

use super::{BlockError, BlockRequest};
use std::time::Duration;

/// What goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The operation is not done and fails.
    Error(BlockError),
    /// The operation is done this much later; the worker sleeps.
    Delay(Duration),
}

/// Decides which operations go wrong; asked on the worker thread before each.
pub trait FaultInjector: Send + Sync {
    /// The fault of `request`, if any.
    fn fault(&self, request: &BlockRequest) -> Option<Fault>;
}

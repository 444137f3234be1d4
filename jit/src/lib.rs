//! The binary translator, and single guest instructions executed by the host itself.

#[cfg(feature = "fuzz")]
pub mod fuzz;
pub mod host;
pub mod signal;

//! The binary translator, and single guest instructions executed by the host itself.

pub mod host;
pub mod signal;

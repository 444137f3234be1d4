//! `paravane compare`: the same work through an emulated and a paravirtual device over one back end, measured.

pub mod report;
pub mod result;

use crate::machine::EngineKind;
use std::path::PathBuf;

/// Which guest does the work.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Guest {
    /// The freestanding guest inside paravane.
    Lab,
    /// Linux with its own drivers.
    Linux {
        /// bzImage.
        kernel: PathBuf,
        /// Made by `cargo xtask guests`.
        initrd: PathBuf,
    },
}

/// What is compared, and how.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CompareConfig {
    /// The guest.
    pub guest: Guest,
    /// Measured runs of every device.
    pub runs: u32,
    /// Less data.
    pub quick: bool,
    /// Where the results go besides the table.
    pub json: Option<PathBuf>,
    /// What executes guest code.
    pub engine: EngineKind,
}

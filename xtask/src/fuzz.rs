//! `cargo xtask fuzz`: refused by name until the instruction generator is there.

use crate::host::{Failure, Outcome};

/// What to fuzz.
#[derive(clap::Args)]
pub struct Options {
    /// What to fuzz: `cpu` compares random instructions with the host CPU
    #[arg(value_parser = ["cpu"])]
    target: String,
    /// Further options of the target
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

/// Refuses: no fuzzer is there yet.
pub fn run(options: &Options) -> Outcome<()> {
    let asked = std::iter::once(options.target.as_str()).chain(options.rest.iter().map(String::as_str));
    Err(Failure::new(format!("fuzz {}: not there yet", asked.collect::<Vec<_>>().join(" "))))
}

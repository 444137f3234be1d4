//! `cargo xtask fuzz cpu | devices | TARGET…`: random instructions against the host CPU, and hostile guests and files.

mod corpus;
mod cpu;
mod targets;

use crate::host::{Failure, Outcome};

/// What to fuzz, and how long.
#[derive(clap::Args)]
pub struct Options {
    /// `cpu` compares random instructions with the host CPU; `devices` is every libFuzzer target; a target's name is one
    #[arg(required = true)]
    what: Vec<String>,
    /// Seconds for each width of `cpu`, or for each target
    #[arg(long, default_value_t = 300)]
    seconds: u64,
    /// Afterwards, keep the fewest inputs that reach as much as the committed corpus of each target
    #[arg(long)]
    keep: bool,
    #[command(flatten)]
    cpu: cpu::Options,
}

/// Runs what is asked for, one after the other; a finding is a failure.
pub fn run(options: &Options) -> Outcome<()> {
    let known = targets::all()?;
    for what in &options.what {
        match what.as_str() {
            "cpu" => cpu::run(&options.cpu, options.seconds)?,
            "devices" => known.iter().try_for_each(|name| target(name, options))?,
            name if known.iter().any(|k| k == name) => target(name, options)?,
            name => {
                let known = known.join(", ");
                return Err(Failure::new(format!("no fuzz target is called {name}: cpu, devices, {known}")));
            }
        }
    }
    Ok(())
}

fn target(name: &str, options: &Options) -> Outcome<()> {
    targets::run(name, options.seconds)?;
    if options.keep { targets::keep(name) } else { Ok(()) }
}

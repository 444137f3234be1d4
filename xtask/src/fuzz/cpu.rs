//! `cargo xtask fuzz cpu`: random instructions on the host CPU and in both engines, for as long as you like.
//!
//! The work is done by `jit/tests/conformance.rs`, which also runs, briefly, in `cargo xtask test`.

use crate::host::{self, Context, Outcome};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

/// Which instructions, where, and how many.
#[derive(clap::Args)]
#[group(skip)]
pub struct Options {
    /// cpu: which engine
    #[arg(long, value_parser = ["interpreter", "translator", "both"], default_value = "both")]
    engine: String,
    /// cpu: code of which width
    #[arg(long, value_parser = ["16", "32", "64", "all"], default_value = "all")]
    bits: String,
    /// cpu: where the random numbers start [default: the time; it is printed]
    #[arg(long)]
    seed: Option<u64>,
    /// cpu: cases per instruction form; programs follow them
    #[arg(long, default_value_t = 50)]
    rounds: u64,
    /// cpu: programs of up to thirty instructions, before loops turn; they end with the time
    #[arg(long, default_value_t = 1_000_000)]
    programs: u64,
    /// cpu: take only forms whose names (iced-x86's) begin with one of these, by commas: `Add_,Sub_`; programs add their
    /// own branches and moves
    #[arg(long)]
    only: Option<String>,
    /// cpu: leave out forms whose names begin with one of these
    #[arg(long)]
    skip: Option<String>,
    /// cpu: append all findings to this file; the terminal shows the first ten
    #[arg(long)]
    report: Option<PathBuf>,
    /// cpu: write to this file, for every instruction form that some CPU model offers, how often it ran or why never
    #[arg(long)]
    coverage: Option<PathBuf>,
}

/// Runs the campaign; a finding is a failure.
pub fn run(options: &Options, seconds: u64) -> Outcome<()> {
    let seed = options.seed.unwrap_or_else(fresh_seed);
    println!("fuzz cpu: seed {seed}");
    let mut tests = host::cargo();
    tests.args(["test", "--quiet", "--release", "--package", "paravane-jit", "--test", "conformance"]);
    tests.args(["--", "--nocapture", "--test-threads=1"]).args(names(&options.bits));
    tests.env("PARAVANE_FUZZ_ENGINE", &options.engine);
    tests.env("PARAVANE_FUZZ_SEED", seed.to_string());
    tests.env("PARAVANE_FUZZ_SECONDS", seconds.to_string());
    tests.env("PARAVANE_FUZZ_ROUNDS", options.rounds.to_string());
    tests.env("PARAVANE_FUZZ_PROGRAMS", options.programs.to_string());
    for (name, value) in [("PARAVANE_FUZZ_ONLY", &options.only), ("PARAVANE_FUZZ_SKIP", &options.skip)] {
        if let Some(value) = value {
            tests.env(name, value);
        }
    }
    if let Some(path) = &options.coverage {
        // Each width appends its part.
        std::fs::write(path, "bits\tform\texecuted\tmodels\n").context(path.display())?;
    }
    for (name, path) in
        [("PARAVANE_FUZZ_REPORT", &options.report), ("PARAVANE_FUZZ_COVERAGE", &options.coverage)]
    {
        if let Some(path) = path {
            // The tests start in their crate's folder.
            tests.env(name, std::path::absolute(path).unwrap_or_else(|_| path.clone()));
        }
    }
    host::run(&mut tests)
}

/// A seed below 2^32, so that it is easy to copy.
fn fresh_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_nanos() as u64 >> 16 & 0xFFFF_FFFF
}

/// The tests' names.
fn names(bits: &str) -> Vec<String> {
    let widths = ["16", "32", "64"].into_iter().filter(|&width| ["all", width].contains(&bits));
    widths.map(|width| format!("engines_in_{width}_bit_mode")).collect()
}

#[cfg(test)]
mod tests {
    use super::names;

    #[test]
    fn width_chooses_the_tests() {
        assert_eq!(names("all").len(), 3);
        assert_eq!(names("16"), ["engines_in_16_bit_mode"]);
    }
}

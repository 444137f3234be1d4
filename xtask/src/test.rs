//! `cargo xtask test`: unit tests of every crate, then whole machines.

use crate::guests;
use crate::host::{self, Outcome};

/// Which tests to run.
#[derive(clap::Args)]
pub struct Options {
    /// Only the unit tests: no guest is downloaded or booted
    #[arg(long)]
    fast: bool,
    /// Passed on to `cargo test`, for instance a test's name, or `-- --nocapture`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

/// Runs the tests; whole-machine tests (`tests/*.rs`) find their guests in `guests/manifest.json`.
pub fn run(options: &Options) -> Outcome<()> {
    if options.fast {
        return host::run(host::cargo().args(["test", "--workspace", "--lib", "--bins"]).args(&options.rest));
    }
    guests::bring(false)?;
    // --no-fail-fast: one broken crate does not hide what the others have to say.
    host::run(host::cargo().args(["test", "--workspace", "--no-fail-fast"]).args(&options.rest))
}

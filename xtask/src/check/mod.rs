//! `cargo xtask check`: everything that can be said about the tree without running the product.

mod manifests;
mod mask;
mod sources;

use crate::host::{self, Failure, Outcome};

/// What to leave out.
#[derive(clap::Args)]
pub struct Options {
    /// Leave out clippy, which compiles the whole workspace
    #[arg(long)]
    no_clippy: bool,
}

/// Runs every check, even after one failed, and names at the end what failed.
pub fn run(options: &Options) -> Outcome<()> {
    let mut broken = Vec::new();
    let mut step = |name: &'static str, outcome: Outcome<()>| match outcome {
        Ok(()) => println!("ok      {name}"),
        Err(failure) => {
            println!("FAILED  {name}\n{failure}");
            broken.push(name);
        }
    };
    step("format", host::run(host::cargo().args(["fmt", "--all", "--check"])));
    step("crate arrows", manifests::arrows());
    step("licences", manifests::licences());
    let sources = sources::load()?;
    step("unsafe inventory", sources::unsafe_inventory(&sources));
    step("leftovers", sources::leftovers(&sources));
    sources::print_long_files(&sources);
    sources::print_longest_functions(&sources);
    if !options.no_clippy {
        let mut clippy = host::cargo();
        clippy.args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]);
        step("clippy", host::run(&mut clippy));
    }
    if broken.is_empty() { Ok(()) } else { Err(Failure::new(format!("check failed: {}", broken.join(", ")))) }
}

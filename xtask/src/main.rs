//! The project's habits as commands: `cargo xtask check | test | guests | bench | boots | fuzz`.
//!
//! Nothing here is part of the product; a plain `cargo run` never needs it.
#![forbid(unsafe_code)]

mod bench;
mod boots;
mod check;
mod fuzz;
mod guests;
mod host;
mod test;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Checks, tests and measures paravane, and brings the guests that the tests boot.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    habit: Habit,
}

#[derive(Subcommand)]
enum Habit {
    /// Format, lints, crate arrows, `unsafe` inventory, licences, lengths and leftovers
    Check(check::Options),
    /// Every test: unit tests of all crates, then whole machines that boot real guests
    Test(test::Options),
    /// Download the Debian kernels and busybox, and build the initramfs images
    Guests(guests::Options),
    /// Measure host CPU time per unit of work: native, paravane, QEMU
    Bench(bench::Options),
    /// Boot a guest again and again; a hang is told with how every processor came to it
    Boots(boots::Options),
    /// Compare random instructions with the host CPU; let hostile guests and files at the devices, loaders and engines
    Fuzz(fuzz::Options),
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().habit {
        Habit::Check(options) => check::run(&options),
        Habit::Test(options) => test::run(&options),
        Habit::Guests(options) => guests::run(&options),
        Habit::Bench(options) => bench::run(&options),
        Habit::Boots(options) => boots::run(&options),
        Habit::Fuzz(options) => fuzz::run(&options),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {failure}");
            ExitCode::FAILURE
        }
    }
}

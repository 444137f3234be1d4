//! The programs on the host itself: beside each sample of a machine, or alone where there is no machine.

use super::engine::progress;
use super::sample::{Sample, parse_end};
use super::suite::Program;
use crate::host::{self, Failure, Outcome};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Times a program is run in a row: native runs are short.
const REPEAT: usize = 3;

/// Once the runs beside a sample have taken so long, no other begins: the guest stands still meanwhile, and what it has
/// missed it has to catch up with.
const ENOUGH: Duration = Duration::from_secs(1);

/// The programs, how many units of each are a run, and the folder they are in.
#[derive(Clone, Copy)]
pub struct Native<'a> {
    /// Programs and units
    pub programs: &'a [(Program, u64)],
    /// Where they are
    pub folder: &'a Path,
}

impl Native<'_> {
    /// Runs all of them, one after the other.
    pub fn all(&self) -> Outcome<Vec<Sample>> {
        let mut samples = Vec::new();
        for (program, units) in self.programs {
            progress(&program.name);
            for _ in 0..REPEAT {
                samples.push(self.once(program, *units)?);
            }
        }
        progress("");
        Ok(samples)
    }

    /// Whether this is one of the programs.
    pub fn has(&self, name: &str) -> bool {
        self.programs.iter().any(|(program, _)| program.name == name)
    }

    /// Runs the program that is called so, less often if it takes long; at least once.
    pub fn beside(&self, name: &str) -> Outcome<Vec<Sample>> {
        let start = Instant::now();
        let mut samples = Vec::new();
        for (program, units) in self.programs.iter().filter(|(program, _)| program.name == name) {
            while samples.is_empty() || (samples.len() < REPEAT && start.elapsed() < ENOUGH) {
                samples.push(self.once(program, *units)?);
            }
        }
        Ok(samples)
    }

    fn once(&self, program: &Program, units: u64) -> Outcome<Sample> {
        let words = program.words(units);
        let mut command = host::command(self.folder.join(words[0].trim_start_matches("./")));
        let text = host::text(command.args(&words[1..]).current_dir(self.folder).stdin(Stdio::null()))?;
        let own_time = text.lines().filter_map(parse_end).next_back();
        own_time.ok_or_else(|| Failure::new(format!("{}: no end mark", program.name)))
    }
}

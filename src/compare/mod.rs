//! `paravane compare`: the same work through an emulated and a paravirtual device over one back end, measured.

mod image;
mod lab;
mod lines;
mod linux;
mod marks;
pub mod report;
pub mod result;
mod session;

use crate::cli::CompareArgs;
use crate::machine::{EngineKind, MachineError};
use image::ScratchImage;
use indicatif::{ProgressBar, ProgressStyle};
use report::Report;
use result::{Key, Path, Sample, Samples};
use std::error::Error;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

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

/// Why a comparison failed.
#[derive(Debug)]
pub enum CompareError {
    /// The machine cannot be built.
    Machine(MachineError),
    /// The image cannot be made or read.
    Image(io::Error),
    /// The guest did not finish its work.
    Guest(String),
    /// Data that went through a device is not what it should be.
    Mismatch {
        /// Which device.
        device: &'static str,
        /// How much of it.
        sectors: u64,
    },
    /// The user ended it.
    Interrupted,
}

impl fmt::Display for CompareError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CompareError::Machine(e) => e.fmt(f),
            CompareError::Image(e) => write!(f, "the temporary disk image: {e} (TMPDIR says where it goes)"),
            CompareError::Guest(text) => write!(f, "the guest failed: {text}"),
            CompareError::Mismatch { device, sectors } => {
                write!(f, "{device}: {sectors} sectors hold wrong data: the comparison is void")
            }
            CompareError::Interrupted => f.write_str("interrupted"),
        }
    }
}

impl Error for CompareError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            CompareError::Machine(e) => Some(e),
            CompareError::Image(e) => Some(e),
            _ => None,
        }
    }
}

impl From<MachineError> for CompareError {
    fn from(e: MachineError) -> CompareError {
        CompareError::Machine(e)
    }
}

/// Runs the command.
pub fn command(args: &CompareArgs) -> Result<ExitCode, Box<dyn Error>> {
    let config = args.config()?;
    let samples = measure(&config)?;
    let lines = result::lines(&samples);
    print!("{}", report::table(&lines));
    println!(
        "\nCosts are for each operation; spread is half the range of {} runs; all data verified.",
        config.runs
    );
    if let Some(path) = &config.json {
        let guest = if config.guest == Guest::Lab { "lab" } else { "linux" };
        let report = Report {
            paravane: env!("CARGO_PKG_VERSION"),
            what: "disk",
            guest,
            runs: config.runs,
            verified: true,
            results: &lines,
        };
        report::write_json(path, &report).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Every run of every device, the devices taking turns so that the host's moods hit them alike.
pub fn measure(config: &CompareConfig) -> Result<Samples, CompareError> {
    let per_run = match config.guest {
        Guest::Lab => lab::steps(lab::Amount::of(config.quick, 1)),
        Guest::Linux { .. } => linux::steps(),
    };
    let progress = bar(per_run * u64::from(config.runs));
    let mut samples = Samples::new();
    for run in 1..=config.runs {
        for path in Path::ALL {
            progress.set_message(format!("{}, run {run} of {}", path.name(), config.runs));
            for (key, sample) in run_once(config, path, run, &|| progress.inc(1))? {
                samples.entry(key).or_default().push(sample);
            }
        }
    }
    progress.finish_and_clear();
    Ok(samples)
}

fn run_once(
    config: &CompareConfig,
    path: Path,
    run: u32,
    step: &(dyn Fn() + Send + Sync),
) -> Result<Vec<(Key, Sample)>, CompareError> {
    match &config.guest {
        Guest::Lab => {
            let amount = lab::Amount::of(config.quick, run);
            let image = amount.image().map_err(CompareError::Image)?;
            lab::run(config, amount, path, &image, step)
        }
        Guest::Linux { kernel, initrd } => {
            let image =
                ScratchImage::new(linux::image_size(config.quick), 0, 0).map_err(CompareError::Image)?;
            linux::run(config, (kernel, initrd), path, &image, step)
        }
    }
}

/// The progress bar on standard error; plain silence where that is no terminal.
fn bar(steps: u64) -> ProgressBar {
    let bar = ProgressBar::new(steps);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len}  {msg}  {elapsed}") {
        bar.set_style(style);
    }
    bar
}

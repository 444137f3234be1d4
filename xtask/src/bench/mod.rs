//! `cargo xtask bench`: one suite of small C programs, natively, in paravane and in QEMU.
//!
//! All engines run in one session, A B A B, so that a slow minute of the host hits each of them. What is compared is
//! host CPU time per unit of work: the guest prints a mark before and after each program, and the emulator's CPU
//! time is read from `/proc` when a mark arrives. A guest has no say in what it cost.

mod cputime;
mod engine;
mod image;
mod report;
mod suite;

use crate::guests::{self, Manifest};
use crate::host::{self, Context, Failure, Outcome};
use clap::ValueEnum;
use engine::{Boot, Engine, MachineRun};
use report::{Measured, Report};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use suite::{CLASSES, Program, SUITE};

/// What to measure.
#[derive(clap::Args)]
pub struct Options {
    /// Only these classes
    #[arg(long, value_delimiter = ',', value_parser = clap::builder::PossibleValuesParser::new(CLASSES))]
    classes: Vec<String>,
    /// Only these programs
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    only: Vec<String>,
    /// Rounds; each runs every engine once, and the median counts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// What to measure on [default: all that are there]
    #[arg(long, value_delimiter = ',', value_enum)]
    engines: Vec<Kind>,
    /// Leave QEMU out
    #[arg(long)]
    no_qemu: bool,
    /// Multiplies the units of work of each program
    #[arg(long, default_value_t = 1.0, value_parser = positive)]
    scale: f64,
    /// The paravane binary [default: the release build, made first]
    #[arg(long, value_name = "FILE")]
    paravane: Option<PathBuf>,
    /// The guest kernel, by its name in `guests/manifest.json`
    #[arg(long, default_value = "cloud", value_name = "NAME")]
    guest: String,
    /// Seconds after which a machine is given up
    #[arg(long, default_value_t = 900)]
    limit: u64,
    /// Write everything that was measured to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the table into BENCHMARKS.md, between its markers
    #[arg(long)]
    write: bool,
    /// Print the programs with their classes and units, and measure nothing
    #[arg(long)]
    list: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    Native,
    Paravane,
    Qemu,
}

fn positive(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    if value > 0.0 && value <= 1000.0 { Ok(value) } else { Err("must lie between 0 and 1000".into()) }
}

/// Runs the suite and prints the table; unequal results and failing engines fail the command.
pub fn run(options: &Options) -> Outcome<()> {
    let programs = choose(options)?;
    if options.list {
        for program in programs {
            println!("{:8} {:16} {:>6} units", program.class, program.name, program.units);
        }
        return Ok(());
    }
    let report = measure(options, &programs)?;
    let table = report.markdown();
    println!("\n{table}");
    if let Some(path) = &options.json {
        host::write(path, &serde_json::to_vec_pretty(&report).context("report")?)?;
    }
    if options.write {
        let path = host::root().join("BENCHMARKS.md");
        let document = fs::read_to_string(&path).unwrap_or_default();
        host::write(&path, report::insert(&document, &table).as_bytes())?;
    }
    if report.problems.is_empty() { Ok(()) } else { Err(Failure::new(report.problems.join("\n"))) }
}

fn choose(options: &Options) -> Outcome<Vec<&'static Program>> {
    let known = |name: &String| name == "boot" || SUITE.iter().any(|program| program.name == name);
    if let Some(name) = options.only.iter().find(|name| !known(name)) {
        return Err(Failure::new(format!("no program is called `{name}`; see `cargo xtask bench --list`")));
    }
    let chosen = |program: &&Program| {
        (options.only.is_empty() || options.only.iter().any(|name| name == program.name))
            && (options.classes.is_empty() || options.classes.iter().any(|class| class == program.class))
    };
    Ok(SUITE.iter().filter(chosen).collect())
}

fn boot_wanted(options: &Options) -> bool {
    let named =
        options.only.iter().any(|name| name == "boot") || options.classes.iter().any(|class| class == "boot");
    named || (options.only.is_empty() && options.classes.is_empty())
}

/// All that a round needs.
struct Session<'a> {
    programs: Vec<(&'a Program, u64)>,
    folder: PathBuf,
    kernel: PathBuf,
    plain: PathBuf,
    loaded: PathBuf,
    limit: Duration,
    boot: bool,
}

fn measure(options: &Options, programs: &[&'static Program]) -> Outcome<Report> {
    let mut problems = Vec::new();
    let mut engines = engines(options, &mut problems)?;
    let session = prepare(options, programs)?;
    let mut measured = Measured::default();
    let columns = engines.iter().map(Engine::name).collect();
    for round in 1..=options.runs {
        engines.retain(|engine| {
            println!("bench: round {round} of {}: {}", options.runs, engine.name());
            let run = session.round(engine).unwrap_or_else(|failure| MachineRun {
                samples: Vec::new(),
                problems: vec![format!("{}: {failure}", engine.name())],
            });
            measured.add(&engine.name(), run.samples);
            run.problems.iter().for_each(|problem| println!("bench: {problem}"));
            let clean = run.problems.is_empty();
            problems.extend(run.problems);
            clean
        });
    }
    Ok(measured.report(columns, about(options), problems))
}

fn engines(options: &Options, problems: &mut Vec<String>) -> Outcome<Vec<Engine>> {
    let wanted = |kind| options.engines.is_empty() || options.engines.contains(&kind);
    let mut engines = Vec::new();
    if wanted(Kind::Native) {
        engines.push(Engine::Native);
    }
    if wanted(Kind::Paravane) {
        match paravane(options) {
            Ok(path) => engines.push(Engine::Paravane(path)),
            Err(failure) => {
                println!("bench: no paravane binary ({failure}); going on without it");
                problems.push(format!("paravane was not measured: {failure}"));
            }
        }
    }
    if wanted(Kind::Qemu) && !options.no_qemu {
        if host::installed("qemu-system-x86_64") {
            engines.extend([Engine::Qemu("max"), Engine::Qemu("qemu64")]);
        } else if options.engines.is_empty() {
            println!("bench: qemu-system-x86_64 is not installed; going on without it");
        } else {
            return Err(Failure::new("qemu-system-x86_64 is not installed; apt-get install qemu-system-x86"));
        }
    }
    if engines.is_empty() { Err(Failure::new("nothing to measure on")) } else { Ok(engines) }
}

fn paravane(options: &Options) -> Outcome<PathBuf> {
    if let Some(path) = &options.paravane {
        return fs::canonicalize(path).context(path.display());
    }
    host::run(host::cargo().args([
        "build",
        "--release",
        "--quiet",
        "--package",
        "paravane",
        "--bin",
        "paravane",
    ]))?;
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| host::root().join("target"), PathBuf::from);
    let path = host::root().join(target).join("release/paravane");
    if path.is_file() { Ok(path) } else { Err(Failure::new(format!("{} is missing", path.display()))) }
}

fn prepare<'a>(options: &Options, programs: &[&'a Program]) -> Outcome<Session<'a>> {
    let manifest = guests::bring(false)?;
    let guest =
        manifest.guests.get(&options.guest).ok_or_else(|| unknown_guest(&options.guest, &manifest))?;
    let folder = image::build(programs, &manifest)?;
    let scaled = |program: &&'a Program| (*program, ((program.units as f64 * options.scale) as u64).max(1));
    let programs: Vec<_> = programs.iter().map(scaled).collect();
    let plain = guests::folder().join(&guest.initrd);
    let loaded = folder.join("initrd.gz");
    // Linux unpacks one archive after the other, compressed members included.
    let both = [host::read(&plain)?, image::archive(&programs, &folder)?].concat();
    host::write(&loaded, &both)?;
    Ok(Session {
        programs,
        folder,
        kernel: guests::folder().join(&guest.kernel),
        plain,
        loaded,
        limit: Duration::from_secs(options.limit),
        boot: boot_wanted(options),
    })
}

fn unknown_guest(name: &str, manifest: &Manifest) -> Failure {
    let known: Vec<&str> = manifest.guests.keys().map(String::as_str).collect();
    Failure::new(format!("no guest is called `{name}`; there are {}", known.join(", ")))
}

impl Session<'_> {
    fn round(&self, engine: &Engine) -> Outcome<MachineRun> {
        if *engine == Engine::Native {
            let samples = engine::run_native(&self.programs, &self.folder, 3)?;
            return Ok(MachineRun { samples, problems: Vec::new() });
        }
        let mut run = MachineRun::default();
        if self.boot {
            run = self.machine(engine, &self.plain, "console=ttyS0 panic=-1 pv.run=poweroff")?;
        }
        if !self.programs.is_empty() {
            let suite = self.machine(engine, &self.loaded, "console=ttyS0 quiet panic=-1 pv.run=bench")?;
            run.samples.extend(suite.samples.into_iter().filter(|sample| !sample.name.starts_with("boot-")));
            run.problems.extend(suite.problems);
        }
        Ok(run)
    }

    fn machine(&self, engine: &Engine, initrd: &Path, append: &str) -> Outcome<MachineRun> {
        let boot = Boot { kernel: &self.kernel, initrd, append: append.into(), limit: self.limit };
        engine::run_machine(engine, &boot)
    }
}

fn about(options: &Options) -> BTreeMap<String, String> {
    let first_line = |text: String| text.lines().next().unwrap_or_default().to_owned();
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = processor.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let command = std::iter::once("cargo xtask".to_owned()).chain(std::env::args().skip(1));
    let mut about = BTreeMap::from([
        ("host".into(), model.map_or("unknown", |(_, name)| name).to_owned()),
        ("made by".into(), format!("`{}`", command.collect::<Vec<_>>().join(" "))),
        ("rounds".into(), options.runs.to_string()),
    ]);
    if let Some(manifest) = guests::load()
        && let Some(guest) = manifest.guests.get(&options.guest)
    {
        about.insert("guest kernel".into(), guest.release.clone());
    }
    if !options.no_qemu && host::installed("qemu-system-x86_64") {
        let version = host::text(host::command("qemu-system-x86_64").arg("--version")).unwrap_or_default();
        about.insert("qemu".into(), first_line(version));
    }
    about
}

//! `cargo xtask bench`: one suite of small C programs, natively, in paravane and in QEMU.
//!
//! All machines run in one session, A B A B. What is compared is host CPU time per unit of work: the guest prints a mark
//! before and after each program, and the emulator's CPU time is read from `/proc` when a mark arrives. A guest has no
//! say in what it cost.
//!
//! A host's speed changes from minute to minute. So at a program's end mark the machine is stopped, the host runs the
//! same program natively, and the machine goes on: each sample has native ones beside it, taken in the same seconds. A
//! machine's multiple of native is the median of its samples' multiples of the native ones beside them.

mod cputime;
mod engine;
mod footprint;
mod image;
mod native;
mod pause;
mod report;
mod sample;
mod suite;

use crate::guests::{self, Manifest};
use crate::host::{self, Context, Failure, Outcome};
use clap::ValueEnum;
use engine::{Boot, DiskBus, Engine, MachineRun};
use native::Native;
use report::{Measured, Report};
use sample::Sample;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use suite::{BOOTS, CLASSES, COLD_FUNCTIONS, DISK, DISK_MEGABYTES, DISK_OPERATIONS, MACHINE_ROWS, Program};

/// What to measure.
#[derive(clap::Args)]
pub struct Options {
    /// Only these classes
    #[arg(long, value_delimiter = ',', value_parser = clap::builder::PossibleValuesParser::new(CLASSES))]
    classes: Vec<String>,
    /// Only these programs
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    only: Vec<String>,
    /// Rounds; each runs every machine once, and the median counts
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
    /// The guest kernel of all but the boots, by its name in `guests/manifest.json`
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
            println!("{:10} {:20} {:>6} units", program.class, program.name, program.units);
        }
        for (name, class) in MACHINE_ROWS {
            println!("{class:10} {name}");
        }
        for name in disk_rows(options) {
            println!("{:10} {name}", "disk");
        }
        return Ok(());
    }
    let report = measure(options, programs)?;
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

fn choose(options: &Options) -> Outcome<Vec<Program>> {
    let suite = suite::suite();
    let known = |name: &String| {
        name == "boot" || DISK.contains(&name.as_str()) || suite.iter().any(|program| program.name == *name)
    };
    if let Some(name) = options.only.iter().find(|name| !known(name)) {
        return Err(Failure::new(format!("no program is called `{name}`; see `cargo xtask bench --list`")));
    }
    let chosen = |program: &Program| {
        (options.only.is_empty() || options.only.contains(&program.name))
            && (options.classes.is_empty() || options.classes.iter().any(|class| class == program.class))
    };
    Ok(suite.into_iter().filter(chosen).collect())
}

/// Leaves out what needs a program that this host lacks.
fn keep_available(programs: &mut Vec<Program>) {
    programs.retain(|program| {
        let there = match program.host_program() {
            Some(path) => Path::new(path).exists(),
            None if program.name == "lua" => {
                image::bring_lua().inspect_err(|failure| println!("bench: {failure}")).is_ok()
            }
            None => true,
        };
        if !there {
            println!("bench: going on without {}, which this host lacks", program.name);
        }
        there
    });
}

fn boots_wanted(options: &Options) -> bool {
    let classes = |wanted: &str| options.classes.iter().any(|class| class == wanted);
    let named = options.only.iter().any(|name| name == "boot") || classes("boot") || classes("host");
    named || (options.only.is_empty() && options.classes.is_empty())
}

/// Which disk tests are wanted.
fn disk_rows(options: &Options) -> Vec<&'static str> {
    let wanted = options.classes.is_empty() || options.classes.iter().any(|class| class == "disk");
    let chosen = |name: &&&str| options.only.is_empty() || options.only.iter().any(|only| only == **name);
    DISK.iter().filter(|_| wanted).filter(chosen).copied().collect()
}

/// All that a round needs.
struct Session {
    programs: Vec<(Program, u64)>,
    folder: PathBuf,
    /// Whether the programs are run natively beside the machines' samples
    beside: bool,
    kernel: PathBuf,
    plain: PathBuf,
    /// The initrd with the programs, and the one with those for two processors
    loaded: Option<PathBuf>,
    threaded: Option<PathBuf>,
    limit: Duration,
    /// Name, kernel and initrd of the guests whose boot is measured
    boots: Vec<(&'static str, PathBuf, PathBuf)>,
    /// Instructions of a function of the program `cold`
    cold_instructions: f64,
    /// The disk tests, random operations of each, and the image they work on
    disk: Vec<&'static str>,
    operations: u64,
    image: ScratchImage,
}

/// A raw image of zeroes, every block allocated, gone when this is dropped.
struct ScratchImage(PathBuf);

impl ScratchImage {
    fn new() -> Outcome<Self> {
        let image = Self(std::env::temp_dir().join(format!("paravane-bench-{}.img", std::process::id())));
        host::write(&image.0, &vec![0; (DISK_MEGABYTES << 20) as usize])?;
        Ok(image)
    }
}

impl Drop for ScratchImage {
    fn drop(&mut self) {
        fs::remove_file(&self.0).ok();
    }
}

fn measure(options: &Options, programs: Vec<Program>) -> Outcome<Report> {
    let mut problems = Vec::new();
    let mut engines = engines(options, &mut problems)?;
    let columns = engines.iter().map(Engine::name).collect();
    let beside = engines.len() > 1 && engines.contains(&Engine::Native);
    if beside {
        engines.retain(|engine| *engine != Engine::Native);
    }
    let session = prepare(options, programs, beside)?;
    let mut measured = Measured::default();
    for round in 1..=options.runs {
        engines.retain(|engine| {
            println!("bench: round {round} of {}: {}", options.runs, engine.name());
            let run = session.round(engine, round).unwrap_or_else(|failure| MachineRun {
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
    host::release_build()
}

fn prepare(options: &Options, mut programs: Vec<Program>, beside: bool) -> Outcome<Session> {
    let manifest = guests::bring(false)?;
    let guest =
        manifest.guests.get(&options.guest).ok_or_else(|| unknown_guest(&options.guest, &manifest))?;
    keep_available(&mut programs);
    let folder = image::build(&programs, &manifest)?;
    let cold = programs.iter().any(|program| program.name == "cold");
    let cold_instructions = if cold { image::cold_instructions(&folder)? } else { 1.0 };
    let scaled = |program: Program| {
        let units = ((program.units as f64 * options.scale) as u64).max(1);
        (program, units)
    };
    let programs: Vec<_> = programs.into_iter().map(scaled).collect();
    let plain = guests::folder().join(&guest.initrd);
    let image = |name: &str, threaded: bool| {
        let programs: Vec<_> =
            programs.iter().filter(|(p, _)| p.is_threaded() == threaded).cloned().collect();
        if programs.is_empty() {
            return Ok(None);
        }
        // Linux unpacks one archive after the other, compressed members included.
        let both = [host::read(&plain)?, image::archive(&programs, &folder)?].concat();
        host::write(&folder.join(name), &both)?;
        Ok(Some(folder.join(name)))
    };
    let (loaded, threaded) = (image("initrd.gz", false)?, image("threads.gz", true)?);
    let boots = BOOTS.iter().filter(|_| boots_wanted(options)).filter_map(|name| {
        let guest = manifest.guests.get(*name)?;
        Some((*name, guests::folder().join(&guest.kernel), guests::folder().join(&guest.initrd)))
    });
    Ok(Session {
        programs,
        folder,
        beside,
        kernel: guests::folder().join(&guest.kernel),
        plain,
        loaded,
        threaded,
        limit: Duration::from_secs(options.limit),
        boots: boots.collect(),
        cold_instructions,
        disk: disk_rows(options),
        operations: ((DISK_OPERATIONS as f64 * options.scale) as u64).max(1),
        image: ScratchImage::new()?,
    })
}

fn unknown_guest(name: &str, manifest: &Manifest) -> Failure {
    let known: Vec<&str> = manifest.guests.keys().map(String::as_str).collect();
    Failure::new(format!("no guest is called `{name}`; there are {}", known.join(", ")))
}

impl Session {
    fn round(&self, engine: &Engine, round: u32) -> Outcome<MachineRun> {
        let mut run = self.programs_and_machines(engine, round)?;
        for sample in run.samples.iter_mut().filter(|sample| sample.name == "cold") {
            sample.beside.iter_mut().for_each(|native| self.count_instructions(native));
            self.count_instructions(sample);
        }
        Ok(run)
    }

    /// Of the program `cold`, whose own units are functions.
    fn count_instructions(&self, sample: &mut Sample) {
        sample.units = (sample.units.min(COLD_FUNCTIONS) as f64 * self.cold_instructions) as u64;
    }

    fn native(&self) -> Native<'_> {
        Native { programs: &self.programs, folder: &self.folder }
    }

    fn programs_and_machines(&self, engine: &Engine, round: u32) -> Outcome<MachineRun> {
        if *engine == Engine::Native {
            return Ok(MachineRun { samples: self.native().all()?, problems: Vec::new() });
        }
        let mut run = MachineRun::default();
        for (name, kernel, initrd) in &self.boots {
            let append = "console=ttyS0 panic=-1 pv.run=poweroff";
            let boot = self.machine(engine, 1, kernel, initrd, append, None)?;
            let named = boot.samples.into_iter().filter_map(|sample| {
                let what = sample.name.strip_prefix("boot-")?;
                Some(Sample { name: format!("{name}-{what}"), ..sample })
            });
            run.samples.extend(named);
            run.problems.extend(boot.problems);
        }
        let mut append = "console=ttyS0 quiet panic=-1 pv.run=bench".to_owned();
        if let Some(modules) = security_modules() {
            append += &format!(" lsm={modules}");
        }
        for (cpus, loaded) in [(1, &self.loaded), (2, &self.threaded)] {
            let Some(loaded) = loaded else { continue };
            let suite = self.machine(engine, cpus, &self.kernel, loaded, &append, None)?;
            let of_machine = |name: &str| name.starts_with("boot-") || (cpus > 1 && name == "suite-memory");
            run.samples.extend(suite.samples.into_iter().filter(|sample| !of_machine(&sample.name)));
            run.problems.extend(suite.problems);
        }
        for bus in [DiskBus::Ide, DiskBus::Virtio] {
            let prefix = format!("{}/", bus.name());
            if self.disk.iter().any(|row| row.starts_with(&prefix)) {
                let tests = self.disk_tests(engine, bus, round)?;
                run.samples.extend(tests.samples);
                run.problems.extend(tests.problems);
            }
        }
        Ok(run)
    }

    /// Boots once with the image behind `bus`. Every engine writes the pattern of a seed of its own.
    fn disk_tests(&self, engine: &Engine, bus: DiskBus, round: u32) -> Outcome<MachineRun> {
        let name = engine.name();
        let seed = name.bytes().fold(u64::from(round), |seed, byte| seed * 31 % 1_000_003 + u64::from(byte));
        let append = format!(
            "console=ttyS0 quiet panic=-1 pv.run=compare pv.compare={device} pv.wait={device} \
             pv.megabytes={DISK_MEGABYTES} pv.operations={} pv.seed={seed}",
            self.operations,
            device = bus.device(),
        );
        let mut run =
            self.machine(engine, 1, &self.kernel, &self.plain, &append, Some((&self.image.0, bus)))?;
        let rows = run.samples.into_iter().filter_map(|sample| {
            let row =
                format!("{}/{}", bus.name(), sample.name.strip_prefix(bus.device())?.strip_prefix('/')?);
            let name = self.disk.iter().find(|wanted| **wanted == row)?;
            Some(Sample { name: (*name).into(), ..sample })
        });
        run.samples = rows.collect();
        let wanted = self.disk.iter().filter(|row| row.starts_with(bus.name())).count();
        if run.problems.is_empty() && run.samples.len() != wanted {
            run.problems.push(format!("{name}: {} of {wanted} disk tests ended", run.samples.len()));
        }
        Ok(run)
    }

    fn machine(
        &self,
        engine: &Engine,
        cpus: u32,
        kernel: &Path,
        initrd: &Path,
        append: &str,
        disk: Option<(&Path, DiskBus)>,
    ) -> Outcome<MachineRun> {
        let native = self.beside.then(|| self.native());
        let boot = Boot { cpus, kernel, initrd, append: append.into(), limit: self.limit, native, disk };
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
        ("security modules".into(), security_modules().unwrap_or_else(|| "each kernel's own".into())),
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

/// The host kernel's security modules, which the guest's gets too, so that both do the same work in a system call; `None` if the
/// host does not say.
fn security_modules() -> Option<String> {
    let modules = fs::read_to_string("/sys/kernel/security/lsm").ok()?;
    let modules = modules.trim().to_owned();
    (!modules.is_empty()).then_some(modules)
}

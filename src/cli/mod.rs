//! The command line (DESIGN section 7): what can be asked for, and what is refused by name.

mod values;

use crate::compare::{CompareConfig, Guest};
use crate::debug::GdbAddress;
use crate::machine::{
    Boot, ClockKind, DiskConfig, EngineKind, MAX_CPUS, MachineConfig, SerialConfig, WindowUse,
};
use crate::trace::{self, Filter};
use clap::{Args, Parser, Subcommand};
use std::fmt;
use std::path::PathBuf;
pub use values::{parse_port, parse_size};

/// Runs unmodified x86 guests by binary translation: no KVM, no root, no kernel module.
#[derive(Parser, Debug)]
#[command(name = "paravane", version, about, max_term_width = 110)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run a guest.
    #[command(after_help = RUN_HELP)]
    Run(Box<RunArgs>),
    /// Measure the emulated against the paravirtual device of one kind, over one and the same back end.
    #[command(after_help = COMPARE_HELP)]
    Compare(CompareArgs),
    /// Create, show, check or convert disk images (not there yet).
    Image {
        /// create, info, check, convert, trim and their operands.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Run a guest in the translator and in the interpreter, side by side by the instruction clock, and stop at
    /// the first difference.
    #[command(after_help = LOCKSTEP_HELP)]
    Lockstep(Box<LockstepArgs>),
    /// Print a trace that was written with `--trace FILE,binary` as JSON lines.
    #[command(after_help = TRACE_HELP)]
    Trace(TraceArgs),
    /// Say what this host offers, which engine runs and what is missing.
    Doctor,
}

const RUN_HELP: &str = "\
Keys on the terminal: Ctrl-A x quits, Ctrl-A h helps, Ctrl-A Ctrl-A sends Ctrl-A.

Exit status: 0 the guest powered off (or asked for a reset under --no-reboot); 1 usage or host error;
3 triple fault; (value << 1) | 1 for a value written to the --debug-exit port; 128 + n for signal n.

Example:
  paravane run --kernel vmlinuz --initrd initrd.gz --append 'console=ttyS0' \\
               --disk a.img --disk b.img,bus=virtio";

const COMPARE_HELP: &str = "\
Without --guest linux the lab guest that is part of paravane runs: no file is needed.
The disk image is made in the temporary directory and removed afterwards.

Example:
  paravane compare disk --runs 5 --json result.json";

const TRACE_HELP: &str = "\
Without kinds everything in the file is printed. The last line says how many events the file has, and how many were
dropped when it was written.

Example:
  paravane trace t.bin port,mmio device=pit";

const LOCKSTEP_HELP: &str = "\
Two whole machines with the same guest: after every block (or every --stride instructions, by which blocks stay
chained) the processors are compared; memory is compared every 20 million instructions and at the end.

Exit status: 0 no difference; 1 a difference, with the guest's code and both states, or an error.

Example:
  paravane lockstep --kernel vmlinuz --initrd initrd.gz --append 'console=ttyS0' --instructions 100000000";

/// Options of `paravane lockstep`.
#[derive(Args, Debug)]
pub struct LockstepArgs {
    /// The guest, as for `paravane run`; what is not about the guest is refused.
    #[command(flatten)]
    pub run: RunArgs,
    /// Compare this many instructions.
    #[arg(long, value_name = "N", default_value_t = 100_000_000)]
    pub instructions: u64,
    /// Compare every N instructions instead of after every block.
    #[arg(long, value_name = "N")]
    pub stride: Option<u64>,
}

/// Options of `paravane run`.
#[derive(Args, Debug, Default)]
pub struct RunArgs {
    /// Linux kernel (bzImage), PVH or multiboot ELF, or flat image.
    #[arg(long, value_name = "F")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk for --kernel.
    #[arg(long, value_name = "F", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    #[arg(long, value_name = "S", requires = "kernel")]
    pub append: Option<String>,
    /// CD-ROM image (not there yet).
    #[arg(long, value_name = "F")]
    pub cdrom: Option<PathBuf>,
    /// Floppy image (not there yet).
    #[arg(long, value_name = "F")]
    pub floppy: Option<PathBuf>,
    /// BIOS image to start at reset (not there yet).
    #[arg(long, value_name = "F")]
    pub bios: Option<PathBuf>,
    /// RAM, with K, M, G or T; a bare number means MiB.
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    pub memory: String,
    /// Number of processors, 1 to 16, each with a host thread of its own.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,
    /// Processor model: max (what the host has), x86-64-v3, x86-64-v2, x86-64, pentium3 or i486.
    #[arg(long, value_name = "MODEL", default_value = "max")]
    pub cpu: String,
    /// What executes guest code.
    #[arg(long, value_enum, default_value_t = EngineKind::Jit)]
    pub engine: EngineKind,
    /// Let the host's page tables show the memory of programs, 64-bit or 32-bit in flat segments: of those that run for some milliseconds, of all (slow
    /// where processes come and go), or of none. By the instruction clock `auto` means never.
    #[arg(long, value_enum, default_value_t = WindowUse::Auto)]
    pub windows: WindowUse,
    /// Where time comes from: the host, or retired instructions (1 ns each; deterministic).
    #[arg(long, value_enum, default_value_t = ClockKind::Host)]
    pub clock: ClockKind,
    /// A disk: FILE[,bus=ide|virtio][,format=raw][,readonly=on][,snapshot=on]; repeatable. The default bus is
    /// ide, where every guest has a driver; snapshot=on keeps writes in memory; ',,' is a comma in a name.
    #[arg(long, value_name = "SPEC")]
    pub disk: Vec<String>,
    /// A network card (only `none` for now); repeatable.
    #[arg(long, value_name = "SPEC")]
    pub net: Vec<String>,
    /// Which hypervisor the guest sees (only none for now).
    #[arg(long, value_name = "NAME", default_value = "none")]
    pub personality: String,
    /// A serial port: stdio, file=F, unix=F (a socket we listen on) or none; repeatable: COM1, COM2 …
    /// [default: stdio]
    #[arg(long, value_name = "SPEC")]
    pub serial: Vec<String>,
    /// Paravirtual console (not there yet).
    #[arg(long, value_name = "F")]
    pub console: Option<String>,
    /// Display (only none for now).
    #[arg(long, value_name = "SPEC", default_value = "none")]
    pub display: String,
    /// Write the screen to a PNG file at exit (not there yet).
    #[arg(long, value_name = "F.png")]
    pub screenshot: Option<PathBuf>,
    /// Let a debugger in at HOST:PORT or unix=F (a socket), for `target remote` of a stock gdb; a triple fault is kept for it.
    #[arg(long, value_name = "ADDR")]
    pub gdb: Option<String>,
    /// Stop before the first instruction, until the debugger lets the guest go on.
    #[arg(long, requires = "gdb")]
    pub wait: bool,
    /// Control socket (not there yet).
    #[arg(long, value_name = "SPEC")]
    pub control: Option<String>,
    /// A value written to this I/O port ends the process with (value << 1) | 1.
    #[arg(long, value_name = "PORT")]
    pub debug_exit: Option<String>,
    /// End with 0 instead of rebooting when the guest asks for a reset (and with 3, as always, after a triple fault).
    #[arg(long, conflicts_with = "reboot")]
    pub no_reboot: bool,
    /// Reset the machine after a triple fault, as a PC does, instead of ending with 3.
    #[arg(long)]
    pub reboot: bool,
    /// An ELF file with symbols, for names in the dossier of a triple fault.
    #[arg(long, value_name = "ELF")]
    pub symbols: Option<PathBuf>,
    /// Write every counter to this file at exit: by device, by processor (cpu0, cpu1, …), the engines' summed up.
    #[arg(long, value_name = "F.json")]
    pub stats: Option<PathBuf>,
    /// Bytes of host code that a vCPU keeps; when they are full it starts over.
    #[arg(long, value_name = "SIZE", default_value = "32M")]
    pub code_cache: String,
    /// Write /tmp/perf-PID.map, so that `perf report` names translated code: by guest address, and by --symbols. What ran before the
    /// code cache started over (code_cache_flushes in --stats) gets wrong names; --code-cache 1G makes that rare.
    #[arg(long)]
    pub perf_map: bool,
    /// Tell the hash of all the machine's state once N instructions have retired (at the end of that slice).
    #[arg(long, value_name = "N")]
    pub hash_at: Option<u64>,
    /// Write everything that comes in from outside to this file, with the instruction count at which it did.
    #[arg(long, value_name = "F", conflicts_with = "replay")]
    pub record: Option<PathBuf>,
    /// Run what --record wrote again: the same machine, files and input; a difference ends the run and is told.
    #[arg(long, value_name = "F")]
    pub replay: Option<PathBuf>,
    /// Write events as JSON lines: FILE[,KIND]…[,FILTER]…; kinds: exception, interrupt, cr, msr, walk, flush, port, mmio, dma, doorbell,
    /// hypercall (all of these by default), block, insn (these interpret the guest); filters: device=NAME, addr=FIRST-LAST, cpl=N, cr3=N, vcpu=N;
    /// `wait`: nothing is dropped, the guest waits; `binary`: a compact form, for `paravane trace`.
    #[arg(long, value_name = "SPEC")]
    pub trace: Option<String>,
}

/// Options of `paravane trace`.
#[derive(Args, Debug)]
pub struct TraceArgs {
    /// The trace.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Kinds and filters, as in --trace: exception, port, …, device=NAME, addr=FIRST-LAST, cpl=N, cr3=N, vcpu=N.
    #[arg(value_name = "KIND|FILTER")]
    pub filters: Vec<String>,
}

impl TraceArgs {
    /// What of it is printed.
    pub fn filter(&self) -> Result<Filter, CliError> {
        Filter::for_reading(&self.filters).map_err(|p| bad("trace", p))
    }
}

/// Options of `paravane compare`.
#[derive(Args, Debug)]
pub struct CompareArgs {
    /// disk (net, console, clock and all are not there yet).
    #[arg(value_name = "WHAT", default_value = "disk")]
    pub what: String,
    /// Which guest does the work.
    #[arg(long, value_enum, default_value_t = GuestName::Lab)]
    pub guest: GuestName,
    /// Kernel for --guest linux.
    #[arg(long, value_name = "F")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk for --guest linux, made by `cargo xtask guests`.
    #[arg(long, value_name = "F")]
    pub initrd: Option<PathBuf>,
    /// Measured runs of every device.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub runs: u32,
    /// Less data, for a first look or a test.
    #[arg(long)]
    pub quick: bool,
    /// Also write the results to this file.
    #[arg(long, value_name = "F")]
    pub json: Option<PathBuf>,
    /// HTML report (not there yet).
    #[arg(long, value_name = "F")]
    pub html: Option<PathBuf>,
    /// What executes guest code.
    #[arg(long, value_enum, default_value_t = EngineKind::Jit)]
    pub engine: EngineKind,
}

/// Guests of `paravane compare`.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestName {
    /// The freestanding guest inside paravane.
    Lab,
    /// A Linux kernel with its own drivers.
    Linux,
}

/// Why a command line was refused.
#[derive(Debug, PartialEq, Eq)]
pub enum CliError {
    /// The option is known, and nothing stands behind it yet.
    NotYet(String),
    /// The value makes no sense; what is wrong and what would be right.
    Value {
        /// The option's name.
        option: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CliError::NotYet(what) => write!(f, "{what}: not there yet"),
            CliError::Value { option, problem } => write!(f, "{option}: {problem}"),
        }
    }
}

impl std::error::Error for CliError {}

pub(crate) fn bad(option: &'static str, problem: impl Into<String>) -> CliError {
    CliError::Value { option, problem: problem.into() }
}

impl LockstepArgs {
    /// Checks everything that can be checked without opening a file.
    pub fn config(&self) -> Result<MachineConfig, CliError> {
        let run = &self.run;
        let given = [
            ("--engine", run.engine != EngineKind::Jit),
            ("--serial", !run.serial.is_empty()),
            ("--gdb", run.gdb.is_some()),
            ("--stats", run.stats.is_some()),
            ("--symbols", run.symbols.is_some()),
            ("--perf-map", run.perf_map),
            ("--reboot", run.reboot),
            ("--hash-at", run.hash_at.is_some()),
            ("--record", run.record.is_some()),
            ("--replay", run.replay.is_some()),
            ("--trace", run.trace.is_some()),
        ];
        if run.cpus > 1 {
            return Err(bad(
                "--cpus",
                "not for lockstep: two processors do not meet in the same order twice",
            ));
        }
        if let Some((name, _)) = given.iter().find(|g| g.1) {
            return Err(bad(
                name,
                "not for lockstep: both engines run, with nothing plugged in, to the first reset",
            ));
        }
        if self.stride == Some(0) {
            return Err(bad("--stride", "0 instructions lead nowhere; 1 or more"));
        }
        run.config()
    }
}

impl RunArgs {
    /// Bytes of code cache.
    pub fn code_cache(&self) -> Result<usize, CliError> {
        match parse_size(&self.code_cache).map_err(|p| bad("--code-cache", p))? {
            bytes @ 0x10_0000..=0x4000_0000 => Ok(bytes as usize),
            _ => Err(bad("--code-cache", "between 1M and 1G")),
        }
    }

    /// The options nothing stands behind yet.
    fn refuse(&self) -> Result<(), CliError> {
        let given = [
            ("--cdrom", self.cdrom.is_some()),
            ("--floppy", self.floppy.is_some()),
            ("--bios", self.bios.is_some()),
            ("--console", self.console.is_some()),
            ("--screenshot", self.screenshot.is_some()),
            ("--control", self.control.is_some()),
        ];
        if let Some((name, _)) = given.iter().find(|g| g.1) {
            return Err(CliError::NotYet((*name).into()));
        }
        if let Some(net) = self.net.iter().find(|n| *n != "none") {
            return Err(values::not_yet("--net", net, &["user", "tap"]));
        }
        if self.personality != "none" {
            return Err(values::not_yet(
                "--personality",
                &self.personality,
                &["kvm", "xen", "hyperv", "vmware"],
            ));
        }
        if self.display != "none" {
            return Err(values::not_yet("--display", &self.display, &["terminal", "vnc"]));
        }
        Ok(())
    }

    /// The number of processors.
    fn processors(&self) -> Result<u32, CliError> {
        match self.cpus {
            n @ 1..=MAX_CPUS => Ok(n),
            n => Err(bad("--cpus", format!("{n} processors are not to be had: 1 to {MAX_CPUS}"))),
        }
    }

    /// Refuses what makes a run that cannot be repeated, where it has to be.
    fn check_repeatable(&self, disks: &[DiskConfig]) -> Result<(), CliError> {
        let given = [
            ("--hash-at", self.hash_at.is_some()),
            ("--record", self.record.is_some()),
            ("--replay", self.replay.is_some()),
        ];
        let Some((name, _)) = given.into_iter().find(|g| g.1) else { return Ok(()) };
        if self.clock != ClockKind::Instructions {
            return Err(bad(name, "no two runs by the host's clock are the same: add --clock instructions"));
        }
        let written = disks.iter().find(|d| !d.snapshot && !d.readonly);
        if let Some(disk) = written.filter(|_| name != "--hash-at") {
            let file = disk.file.display();
            return Err(bad(
                name,
                format!(
                    "{file} would be another disk at the next run: add snapshot=on (or readonly=on) to --disk"
                ),
            ));
        }
        Ok(())
    }

    /// What is traced, and where to.
    pub fn trace(&self) -> Result<Option<(PathBuf, Filter)>, CliError> {
        self.trace.as_deref().map(|spec| trace::parse(spec).map_err(|p| bad("--trace", p))).transpose()
    }

    /// Where a debugger may connect.
    pub fn gdb_address(&self) -> Result<Option<GdbAddress>, CliError> {
        self.gdb.as_deref().map(values::parse_gdb).transpose()
    }

    /// Checks everything that can be checked without opening a file.
    pub fn config(&self) -> Result<MachineConfig, CliError> {
        self.refuse()?;
        self.gdb_address()?;
        let Some(kernel) = self.kernel.clone() else {
            return Err(if self.disk.is_empty() {
                bad("--kernel", "nothing to run: give --kernel F (and --initrd, --disk)")
            } else {
                CliError::NotYet("booting from a disk: give --kernel F as well".into())
            });
        };
        let boot = Boot::Kernel {
            kernel,
            initrd: self.initrd.clone(),
            append: self.append.clone().unwrap_or_default(),
        };
        let disks =
            self.disk.iter().map(|s| values::parse_disk(s)).collect::<Result<Vec<DiskConfig>, _>>()?;
        let serial = values::parse_serials(&self.serial)?;
        self.trace()?;
        self.check_repeatable(&disks)?;
        Ok(MachineConfig {
            memory: parse_size(&self.memory).map_err(|p| bad("--memory", p))?,
            cpus: self.processors()?,
            model: self.cpu.clone(),
            engine: self.engine,
            windows: self.windows,
            clock: self.clock,
            boot,
            disks,
            serial,
            debug_exit: self.debug_exit.as_deref().map(parse_port).transpose()?,
            reboot: !self.no_reboot,
        })
    }
}

impl CompareArgs {
    /// Checks the combination of options.
    pub fn config(&self) -> Result<CompareConfig, CliError> {
        match self.what.as_str() {
            "disk" => {}
            "net" | "console" | "clock" | "all" => {
                return Err(CliError::NotYet(format!("compare {}", self.what)));
            }
            other => {
                return Err(bad("compare", format!("'{other}' is none of disk, net, console, clock, all")));
            }
        }
        if self.html.is_some() {
            return Err(CliError::NotYet("--html".into()));
        }
        if !(1..=1000).contains(&self.runs) {
            return Err(bad("--runs", format!("{} is not between 1 and 1000", self.runs)));
        }
        let guest = match (self.guest, &self.kernel, &self.initrd) {
            (GuestName::Lab, None, None) => Guest::Lab,
            (GuestName::Lab, ..) => {
                return Err(bad("--guest", "--kernel and --initrd belong to --guest linux"));
            }
            (GuestName::Linux, Some(kernel), Some(initrd)) => {
                Guest::Linux { kernel: kernel.clone(), initrd: initrd.clone() }
            }
            (GuestName::Linux, ..) => {
                return Err(bad(
                    "--guest",
                    "linux needs --kernel F and --initrd F (`cargo xtask guests` makes them)",
                ));
            }
        };
        Ok(CompareConfig {
            guest,
            runs: self.runs,
            quick: self.quick,
            json: self.json.clone(),
            engine: self.engine,
        })
    }
}

/// What `SerialConfig` a run without `--serial` has.
pub fn default_serial() -> Vec<SerialConfig> {
    vec![SerialConfig::Stdio]
}

//! What runs the suite: the host itself, paravane, QEMU. Each run gives samples: name, units, result, CPU time; those of
//! a machine with native ones beside them.

use super::cputime::CpuTime;
use super::footprint;
use super::native::Native;
use super::pause::{self, Pause};
use super::sample::{Sample, parse_end};
use crate::host::{Context, Failure, Outcome};
use rustix::process::Pid;
use std::io::{BufRead, BufReader, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// Guest RAM of every machine.
const MEGABYTES: u64 = 512;

/// One way to run the programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Engine {
    /// The host CPU, no emulator
    Native,
    /// Our binary, at this path
    Paravane(PathBuf),
    /// `qemu-system-x86_64 -accel tcg` with this CPU model
    Qemu(&'static str),
}

/// How a machine's disk is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskBus {
    /// PIIX IDE, bus-master DMA
    Ide,
    /// virtio-blk on PCI
    Virtio,
}

impl DiskBus {
    /// As rows and `--disk` call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ide => "ide",
            Self::Virtio => "virtio",
        }
    }

    /// As Linux calls the first disk there.
    pub fn device(self) -> &'static str {
        match self {
            Self::Ide => "sda",
            Self::Virtio => "vda",
        }
    }
}

/// What a machine boots.
pub struct Boot<'a> {
    /// Processors
    pub cpus: u32,
    /// A raw image and its bus
    pub disk: Option<(&'a Path, DiskBus)>,
    /// The bzImage
    pub kernel: &'a Path,
    /// The initramfs
    pub initrd: &'a Path,
    /// The kernel command line
    pub append: String,
    /// A machine that takes longer is killed; while it stands still no time passes
    pub limit: Duration,
    /// What the host runs beside the samples, if anything
    pub native: Option<Native<'a>>,
}

impl Engine {
    /// The column's name.
    pub fn name(&self) -> String {
        match self {
            Self::Native => "native".into(),
            Self::Paravane(_) => "paravane".into(),
            Self::Qemu(model) => format!("qemu-{model}"),
        }
    }

    fn machine(&self, boot: &Boot<'_>) -> Option<Command> {
        let mut command = match self {
            Self::Native => return None,
            Self::Paravane(binary) => {
                let mut command = pause::tied(binary);
                command.args([
                    "run",
                    "--memory",
                    &format!("{MEGABYTES}M"),
                    "--serial",
                    "stdio",
                    "--no-reboot",
                ]);
                command.arg("--cpus").arg(boot.cpus.to_string());
                if let Some((image, bus)) = boot.disk {
                    let disk = format!("{},bus={}", image.display(), bus.name());
                    command.args(["--disk", disk.as_str()]);
                }
                command.arg("--kernel").arg(boot.kernel).arg("--initrd").arg(boot.initrd).arg("--append");
                command
            }
            Self::Qemu(model) => {
                let mut command = pause::tied("qemu-system-x86_64");
                command.args([
                    "-machine",
                    "pc,accel=tcg",
                    "-cpu",
                    model,
                    "-m",
                    &MEGABYTES.to_string(),
                    "-nodefaults",
                    "-no-reboot",
                ]);
                command.args(["-display", "none", "-monitor", "none", "-serial", "stdio"]);
                command.arg("-smp").arg(boot.cpus.to_string());
                if let Some((image, bus)) = boot.disk {
                    // The default cache mode, writeback, is what paravane does.
                    let drive = format!("file={},format=raw,if=none,id=disk", image.display());
                    let device = match bus {
                        DiskBus::Ide => "ide-hd,drive=disk",
                        DiskBus::Virtio => "virtio-blk-pci,drive=disk",
                    };
                    command.args(["-drive", drive.as_str(), "-device", device]);
                }
                command.arg("-kernel").arg(boot.kernel).arg("-initrd").arg(boot.initrd).arg("-append");
                command
            }
        };
        command.arg(&boot.append);
        Some(command)
    }
}

/// What a machine gave: samples, and what went wrong on the way.
#[derive(Default)]
pub struct MachineRun {
    /// One per program that finished
    pub samples: Vec<Sample>,
    /// One line each; empty for a clean run
    pub problems: Vec<String>,
}

/// Boots a machine and samples its CPU time at the guest's marks, until it ends. What was measured before
/// something went wrong is kept.
pub fn run_machine(engine: &Engine, boot: &Boot<'_>) -> Outcome<MachineRun> {
    let mut command = engine.machine(boot).ok_or_else(|| Failure::new("the host is no machine"))?;
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().context(engine.name())?;
    let stderr = child.stderr.take().map(drain);
    let mut watch = Watch::of(&child, boot.native);
    let in_time = watch.follow(&lines_of(&mut child)?, boot.limit);
    if !in_time {
        child.kill().ok();
    }
    progress("");
    let status = child.wait().context(engine.name())?;
    let said = stderr.and_then(|thread| thread.join().ok()).unwrap_or_default();
    if !in_time {
        watch.problem(&format!("not finished after {} s", boot.limit.as_secs()), &said);
    } else if !watch.finished || !status.success() {
        watch.problem(&format!("ended early ({status})"), &said);
    }
    for problem in &mut watch.run.problems {
        problem.insert_str(0, &format!("{}: ", engine.name()));
    }
    Ok(watch.run)
}

/// Reads a machine's console.
struct Watch<'a> {
    machine: Pid,
    native: Option<Native<'a>>,
    time: CpuTime,
    start: Instant,
    /// How long it has stood still since then
    paused: Duration,
    begun: Option<(String, u64)>,
    finished: bool,
    last_line: String,
    run: MachineRun,
}

impl<'a> Watch<'a> {
    fn of(child: &Child, native: Option<Native<'a>>) -> Self {
        Self {
            machine: Pid::from_child(child),
            native,
            time: CpuTime::of(child.id()),
            start: Instant::now(),
            paused: Duration::ZERO,
            begun: None,
            finished: false,
            last_line: String::new(),
            run: MachineRun::default(),
        }
    }

    /// Reads to the end; `false` when the limit is reached first.
    fn follow(&mut self, lines: &Receiver<String>, limit: Duration) -> bool {
        loop {
            match lines.recv_timeout(limit.saturating_sub(self.wall())) {
                Ok(line) => self.line(line.trim()),
                Err(RecvTimeoutError::Disconnected) => return true,
                Err(RecvTimeoutError::Timeout) => return false,
            }
        }
    }

    /// How long the machine has run.
    fn wall(&self) -> Duration {
        self.start.elapsed().saturating_sub(self.paused)
    }

    fn line(&mut self, line: &str) {
        let now = self.time.look();
        let wall = self.wall().as_nanos() as u64;
        // Programs with several threads are timed, as native ones time themselves.
        let clock = |name: &str| if name.starts_with("threads-") { wall } else { now };
        if let Some((_, name)) = line.split_once("@@begin ") {
            progress(name);
            self.begun = Some((name.to_owned(), clock(name)));
        } else if let Some(sample) = parse_end(line) {
            let end = clock(&sample.name);
            self.end(sample, end);
        } else if line.contains("@@boot init") {
            self.run.samples.extend([machine_sample("boot-cpu", now), machine_sample("boot-wall", wall)]);
            self.footprint("boot-memory");
        } else if let Some((_, name)) = line.split_once("@@failed ") {
            let what = format!("{name} failed in the guest");
            self.problem(&what, "");
        }
        if let Some((_, wrong)) = line.split_once("mismatches=").filter(|(_, wrong)| *wrong != "0") {
            self.problem(&format!("{wrong} sectors hold wrong data"), "");
        }
        if line.contains("@@done") {
            self.footprint("suite-memory");
        }
        self.finished |= line.contains("@@done") || line.contains("paravane: init reached");
        if !line.is_empty() {
            line.clone_into(&mut self.last_line);
        }
    }

    fn footprint(&mut self, name: &str) {
        let bytes = footprint::beyond_ram(self.machine.as_raw_pid() as u32, MEGABYTES << 20);
        self.run.samples.extend(bytes.map(|bytes| machine_sample(name, bytes)));
    }

    fn end(&mut self, sample: Sample, now: u64) {
        match self.begun.take() {
            Some((name, begun)) if name == sample.name => {
                let beside = self.beside(&sample);
                self.run.samples.push(Sample { cost: now.saturating_sub(begun), beside, ..sample });
            }
            _ => self.problem(&format!("{} ended without having begun", sample.name), ""),
        }
    }

    /// Runs natively what the guest has just run, while the machine stands still. Its timers catch up between this
    /// program and the next.
    fn beside(&mut self, sample: &Sample) -> Vec<Sample> {
        let Some(native) = self.native.filter(|native| sample.measured() && native.has(&sample.name)) else {
            return Vec::new();
        };
        let ran = Pause::of(self.machine).and_then(|pause| {
            let ran = native.beside(&sample.name);
            self.paused += pause.lasted();
            ran
        });
        ran.unwrap_or_else(|failure| {
            self.run.problems.push(format!("{} natively beside it: {failure}", sample.name));
            Vec::new()
        })
    }

    fn problem(&mut self, what: &str, said: &str) {
        let last = telling(said).unwrap_or_else(|| self.last_line.clone());
        let during = self.begun.as_ref().map(|(name, _)| format!(" in {name}")).unwrap_or_default();
        self.run.problems.push(format!("{what}{during}; last it said: {last}"));
    }
}

/// What of a program's error output tells most: its panic, else its last line.
fn telling(said: &str) -> Option<String> {
    let mut lines = said.lines().filter(|line| !line.trim().is_empty());
    if let Some(panic) = lines.clone().position(|line| line.contains(" panicked at ")) {
        return Some(lines.skip(panic).take(2).collect::<Vec<_>>().join(" "));
    }
    lines.next_back().map(str::to_owned)
}

/// Shows on a terminal what is running; a log stays free of it.
pub fn progress(name: &str) {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K{name}{}", if name.is_empty() { "" } else { " ..." });
    }
}

fn machine_sample(name: &str, cost: u64) -> Sample {
    Sample { name: name.into(), units: 1, result: "none".into(), cost, beside: Vec::new() }
}

fn drain(mut pipe: impl Read + Send + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).ok();
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Lines as they come, so that each can be waited for with a limit.
fn lines_of(child: &mut Child) -> Outcome<Receiver<String>> {
    let stdout = child.stdout.take().ok_or_else(|| Failure::new("no pipe from the machine"))?;
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        let mut reader = BufReader::with_capacity(4096, stdout);
        let mut line = Vec::new();
        while matches!(reader.read_until(b'\n', &mut line), Ok(count) if count > 0) {
            if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                break;
            }
            line.clear();
        }
    });
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::super::suite::{Kind, Program};
    use super::*;
    use crate::host;

    #[test]
    fn a_panic_tells_more_than_the_last_line() {
        assert_eq!(telling("warning\n\nno such file\n").as_deref(), Some("no such file"));
        let panic = "thread 'vcpu0' panicked at a.rs:1:2:\nout of range\nstack backtrace:\n";
        assert_eq!(telling(panic).as_deref(), Some("thread 'vcpu0' panicked at a.rs:1:2: out of range"));
        assert_eq!(telling("\n"), None);
    }

    #[test]
    fn the_host_runs_beside_a_machine_that_stands_still() {
        // `echo` as a program of the suite: it says its end mark.
        let kind = Kind::Compiled { source: "echo", variant: "@@end sort 2 r 7", narrow: false };
        let programs = [(Program { name: "sort".into(), class: "integer", units: 2, kind }, 2)];
        let native = Native { programs: &programs, folder: Path::new("/bin") };
        let mut child = host::command("sleep").arg("60").spawn().expect("sleep");
        let mut watch = Watch::of(&child, Some(native));
        for line in ["@@begin sort", "@@end sort 2 r 9", "@@begin avx2", "@@end avx2 2 r 9"] {
            watch.line(line);
        }
        let ran = watch.wall() + watch.paused;
        child.kill().ok();
        child.wait().expect("status");
        let beside = watch.run.samples.iter().map(|sample| sample.beside.as_slice());
        let costs: Vec<Vec<u64>> = beside.map(|all| all.iter().map(|native| native.cost).collect()).collect();
        assert_eq!(costs, [vec![7; 3], vec![]], "avx2 is none of the programs");
        assert!(!watch.paused.is_zero() && watch.paused < ran && watch.run.problems.is_empty());
    }
}

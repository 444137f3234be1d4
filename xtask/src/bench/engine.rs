//! What runs the suite: the host itself, paravane, QEMU. Each run gives samples: name, units, result, CPU time.

use super::cputime::CpuTime;
use super::footprint;
use super::suite::Program;
use crate::host::{self, Context, Failure, Outcome};
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

/// What one program did in one run, or what a machine needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The program
    pub name: String,
    /// Units of work
    pub units: u64,
    /// A checksum, or `skipped`
    pub result: String,
    /// Host CPU time; of a memory row, bytes; of a program with several threads, time
    pub cost: u64,
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
    /// A machine that takes longer is killed
    pub limit: Duration,
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
                let mut command = host::command(binary);
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
                let mut command = host::command("qemu-system-x86_64");
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

/// Runs the programs on the host, one after the other, `repeat` times each: native runs are short.
pub fn run_native(programs: &[(Program, u64)], folder: &Path, repeat: u32) -> Outcome<Vec<Sample>> {
    let mut samples = Vec::new();
    for (program, units) in programs {
        let words = program.words(*units);
        progress(&program.name);
        for _ in 0..repeat {
            let mut command = host::command(folder.join(words[0].trim_start_matches("./")));
            let text = host::text(command.args(&words[1..]).current_dir(folder).stdin(Stdio::null()))?;
            let own_time = text.lines().filter_map(parse_end).next_back();
            samples.push(own_time.ok_or_else(|| Failure::new(format!("{}: no end mark", program.name)))?);
        }
    }
    progress("");
    Ok(samples)
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
    let mut watch = Watch::of(&child);
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
struct Watch {
    pid: u32,
    time: CpuTime,
    start: Instant,
    begun: Option<(String, u64)>,
    finished: bool,
    last_line: String,
    run: MachineRun,
}

impl Watch {
    fn of(child: &Child) -> Self {
        Self {
            pid: child.id(),
            time: CpuTime::of(child.id()),
            start: Instant::now(),
            begun: None,
            finished: false,
            last_line: String::new(),
            run: MachineRun::default(),
        }
    }

    /// Reads to the end; `false` when the limit is reached first.
    fn follow(&mut self, lines: &Receiver<String>, limit: Duration) -> bool {
        loop {
            match lines.recv_timeout(limit.saturating_sub(self.start.elapsed())) {
                Ok(line) => self.line(line.trim()),
                Err(RecvTimeoutError::Disconnected) => return true,
                Err(RecvTimeoutError::Timeout) => return false,
            }
        }
    }

    fn line(&mut self, line: &str) {
        let now = self.time.look();
        let wall = self.start.elapsed().as_nanos() as u64;
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
        let bytes = footprint::beyond_ram(self.pid, MEGABYTES << 20);
        self.run.samples.extend(bytes.map(|bytes| machine_sample(name, bytes)));
    }

    fn end(&mut self, sample: Sample, now: u64) {
        match self.begun.take() {
            Some((name, begun)) if name == sample.name => {
                self.run.samples.push(Sample { cost: now.saturating_sub(begun), ..sample });
            }
            _ => self.problem(&format!("{} ended without having begun", sample.name), ""),
        }
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
fn progress(name: &str) {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K{name}{}", if name.is_empty() { "" } else { " ..." });
    }
}

fn machine_sample(name: &str, cost: u64) -> Sample {
    Sample { name: name.into(), units: 1, result: "none".into(), cost }
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

/// `@@end NAME UNITS RESULT CPU_NANOSECONDS`, perhaps behind a kernel message.
fn parse_end(line: &str) -> Option<Sample> {
    let (_, rest) = line.split_once("@@end ")?;
    let mut words = rest.split_whitespace();
    Some(Sample {
        name: words.next()?.to_owned(),
        units: words.next()?.parse().ok()?,
        result: words.next()?.to_owned(),
        cost: words.next()?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_tells_more_than_the_last_line() {
        assert_eq!(telling("warning\n\nno such file\n").as_deref(), Some("no such file"));
        let panic = "thread 'vcpu0' panicked at a.rs:1:2:\nout of range\nstack backtrace:\n";
        assert_eq!(telling(panic).as_deref(), Some("thread 'vcpu0' panicked at a.rs:1:2: out of range"));
        assert_eq!(telling("\n"), None);
    }

    #[test]
    fn end_marks() {
        let sample = parse_end("[ 1.0] x@@end sort 20 d3944189044d9c7f 18115000\r\n").unwrap();
        assert_eq!((sample.name.as_str(), sample.units, sample.cost), ("sort", 20, 18_115_000));
        assert_eq!(sample.result, "d3944189044d9c7f");
        assert!(parse_end("@@end sort").is_none() && parse_end("@@begin sort").is_none());
    }
}

//! `cargo xtask boots`: a guest boots again and again, to its power-off. What hangs is looked at before it is ended: by gdb
//! through `--gdb` (how every vCPU came to where it is, the interrupt controllers), and by gdb from outside (the threads).

use crate::guests;
use crate::host::{self, Context, Failure, Outcome};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Which guest boots, how often, and what is suspicious.
#[derive(clap::Args)]
pub struct Options {
    /// Processors
    #[arg(long, value_name = "N", default_value_t = 2)]
    cpus: u32,
    /// Boots in a row
    #[arg(long, value_name = "N", default_value_t = 100)]
    times: u32,
    /// Seconds after which a boot counts as hung
    #[arg(long, value_name = "N", default_value_t = 60)]
    limit: u64,
    /// A guest of `cargo xtask guests`
    #[arg(long, value_name = "NAME", default_value = "cloud")]
    guest: String,
    /// The paravane binary [default: the release build, made first]
    #[arg(long, value_name = "FILE")]
    paravane: Option<PathBuf>,
    /// More options for `paravane run`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

/// What a kernel says when something is wrong, in lower case.
const COMPLAINTS: [&str; 9] = [
    "unsynchronized",
    "warning:",
    "bug:",
    "oops",
    "kernel panic",
    "call trace",
    "lockup",
    "stall",
    "failed to come online",
];
/// `no_timer_check`: a host with too much to do may keep the thread that fires timers waiting for 40 ms, in which the kernel
/// would conclude that there is no timer.
const APPEND: &str = "console=ttyS0 panic=-1 no_timer_check pv.run=poweroff";
/// How often a boot is looked at.
const TICK: Duration = Duration::from_millis(50);
/// How long a debugger may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Boots as often as asked; the first that goes wrong ends it, with what is known about it in a folder.
pub fn run(options: &Options) -> Outcome<()> {
    let manifest = guests::bring(false)?;
    let known = || manifest.guests.keys().cloned().collect::<Vec<_>>().join(", ");
    let guest = manifest
        .guests
        .get(&options.guest)
        .ok_or_else(|| Failure::new(format!("no guest '{}'; there are {}", options.guest, known())))?;
    let binary = match &options.paravane {
        Some(path) => fs::canonicalize(path).context(path.display())?,
        None => host::release_build()?,
    };
    let folder = std::env::temp_dir().join(format!("paravane-boots-{}", std::process::id()));
    fs::create_dir_all(&folder).context(folder.display())?;
    let files = [guests::folder().join(&guest.kernel), guests::folder().join(&guest.initrd)];
    let mut slowest = Duration::ZERO;
    for number in 1..=options.times {
        let boot = Boot::start(&binary, &files, options, &folder)?;
        match boot.end(options) {
            Ok(took) => slowest = slowest.max(took),
            Err(why) => {
                let what = format!("boot {number} of {}: {why}; see {}", options.times, folder.display());
                return Err(Failure::new(what));
            }
        }
    }
    fs::remove_dir_all(&folder).context(folder.display())?;
    println!(
        "{} boots of {} with {} processors, the slowest {:.1} s",
        options.times,
        options.guest,
        options.cpus,
        slowest.as_secs_f64()
    );
    Ok(())
}

struct Boot {
    child: Child,
    started: Instant,
    log: PathBuf,
    socket: PathBuf,
    folder: PathBuf,
}

impl Boot {
    fn start(binary: &Path, files: &[PathBuf; 2], options: &Options, folder: &Path) -> Outcome<Boot> {
        let (log, socket) = (folder.join("log"), folder.join("gdb"));
        let output = File::create(&log).context(log.display())?;
        let mut command = Command::new(binary);
        command.args(["run", "--append", APPEND, "--no-reboot"]);
        command.arg("--kernel").arg(&files[0]).arg("--initrd").arg(&files[1]);
        command.args(["--cpus", &options.cpus.to_string()]);
        if !options.rest.iter().any(|word| word == "instructions") {
            command.arg("--gdb").arg(format!("unix={}", socket.display()));
        }
        command.args(&options.rest).stdin(Stdio::null());
        command.stderr(output.try_clone().context(log.display())?).stdout(output);
        let child = command.spawn().context(binary.display())?;
        Ok(Boot { child, started: Instant::now(), log, socket, folder: folder.to_owned() })
    }

    /// Waits for the end: how long it took, or what is wrong.
    fn end(mut self, options: &Options) -> Result<Duration, String> {
        let limit = Duration::from_secs(options.limit);
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if self.started.elapsed() < limit => std::thread::sleep(TICK),
                Ok(None) => {
                    self.examine();
                    self.child.kill().ok();
                    self.child.wait().ok();
                    return Err(format!("it hung: no end after {} seconds", options.limit));
                }
                Err(e) => return Err(e.to_string()),
            }
        };
        let said = fs::read(&self.log).map_err(|e| e.to_string())?;
        match complaint(&String::from_utf8_lossy(&said), options.cpus) {
            _ if !status.success() => Err(status.to_string()),
            Some(what) => Err(what),
            None => Ok(self.started.elapsed()),
        }
    }

    /// Writes down how things stand.
    fn examine(&self) {
        let guest =
            ["info threads", "monitor vcpus all", "monitor apic", "monitor ioapic", "monitor counters"];
        let target = format!("target remote {}", self.socket.display());
        self.gdb("guest", &[&[target.as_str()][..], &guest].concat());
        self.gdb("host", &[&format!("attach {}", self.child.id()), "thread apply all backtrace 16"]);
    }

    fn gdb(&self, name: &str, commands: &[&str]) {
        let Ok(output) = File::create(self.folder.join(name)) else { return };
        let Ok(errors) = output.try_clone() else { return };
        let mut gdb = Command::new("gdb");
        gdb.args(["-nx", "-batch", "-ex", "set pagination off"]);
        for command in commands {
            gdb.args(["-ex", command]);
        }
        gdb.stdin(Stdio::null()).stdout(output).stderr(errors);
        let Ok(mut gdb) = gdb.spawn() else {
            eprintln!("gdb is not installed (Debian package gdb): nothing is known about the hang");
            return;
        };
        let until = Instant::now() + PATIENCE;
        while matches!(gdb.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(TICK);
        }
        gdb.kill().ok();
        gdb.wait().ok();
    }
}

/// What is wrong with what the guest said.
fn complaint(said: &str, cpus: u32) -> Option<String> {
    let wrong = |line: &&str| COMPLAINTS.iter().any(|what| line.to_lowercase().contains(what));
    if let Some(line) = said.lines().find(wrong) {
        return Some(format!("the guest complains: {}", line.trim()));
    }
    if !said.contains("paravane: init reached") {
        return Some("it ended before its /init".into());
    }
    let up = if cpus == 1 { "1 node, 1 CPU".to_owned() } else { format!("1 node, {cpus} CPUs") };
    (!said.contains(&up)).then(|| format!("not all {cpus} processors were brought up"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_seen() {
        let good = "smp: Brought up 1 node, 2 CPUs\nparavane: init reached\n";
        assert_eq!(complaint(good, 2), None);
        assert!(complaint(good, 4).is_some_and(|what| what.contains("4 processors")));
        let bad = good.to_owned() + "[ 1.0] TSC found unsynchronized\n";
        assert!(complaint(&bad, 2).is_some_and(|what| what.contains("TSC")));
        assert!(complaint("smp: Brought up 1 node, 1 CPU\n", 1).is_some_and(|what| what.contains("/init")));
    }
}

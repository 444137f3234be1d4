//! `paravane doctor`: what this host offers, which engine runs, what is missing.

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

/// How a finding is marked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verdict {
    /// As it should be.
    Good,
    /// Worth knowing.
    Note,
    /// The translator cannot run.
    Bad,
}

struct Finding {
    verdict: Verdict,
    what: &'static str,
    text: String,
}

fn finding(verdict: Verdict, what: &'static str, text: impl Into<String>) -> Finding {
    Finding { verdict, what, text: text.into() }
}

fn good_if(ok: bool, what: &'static str, yes: &str, no: &str) -> Finding {
    if ok { finding(Verdict::Good, what, yes) } else { finding(Verdict::Bad, what, no) }
}

/// Runs the command: a line for each finding; fails if the translator cannot run.
pub fn command() -> Result<ExitCode, Box<dyn Error>> {
    let findings =
        [processor(), features(), vectors(), address_space(), translator(), kvm(), memory(), terminal()];
    let mut out = io::stdout().lock();
    for f in &findings {
        let mark = match f.verdict {
            Verdict::Good => "ok  ",
            Verdict::Note => "note",
            Verdict::Bad => "BAD ",
        };
        writeln!(out, "{mark}  {:<14} {}", f.what, f.text)?;
    }
    let runs = findings.iter().all(|f| f.verdict != Verdict::Bad);
    let verdict = if runs {
        "the translator runs here (--engine jit, the default)"
    } else {
        "the translator cannot run here: use --engine interp (slow)"
    };
    writeln!(out, "{verdict}")?;
    Ok(ExitCode::from(u8::from(!runs)))
}

/// The value of `key` in a file of `key: value` lines.
fn proc_value(file: &str, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let line = text.lines().find(|l| l.split(':').next().is_some_and(|k| k.trim() == key))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn processor() -> Finding {
    let name = proc_value("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown".into());
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let text = format!(
        "{name}, {threads} threads for us: as many of a guest's processors (--cpus) run side by side"
    );
    finding(if threads > 1 { Verdict::Good } else { Verdict::Note }, "processor", text)
}

fn features() -> Finding {
    good_if(
        std::arch::is_x86_feature_detected!("bmi2"),
        "BMI2",
        "there (SHLX, SHRX: every translated memory access)",
        "missing: translated code needs SHLX and SHRX (Intel Haswell, AMD Excavator or later)",
    )
}

fn vectors() -> Finding {
    let all = [
        ("SSE4.2", std::arch::is_x86_feature_detected!("sse4.2")),
        ("AVX2", std::arch::is_x86_feature_detected!("avx2")),
        ("FMA", std::arch::is_x86_feature_detected!("fma")),
        ("AES", std::arch::is_x86_feature_detected!("aes")),
        ("SHA", std::arch::is_x86_feature_detected!("sha")),
    ];
    let named = |have: bool| all.iter().filter(|f| f.1 == have).map(|f| f.0).collect::<Vec<_>>().join(", ");
    match (named(true), named(false)) {
        (have, missing) if missing.is_empty() => finding(Verdict::Good, "for guests", have),
        (have, missing) => {
            finding(Verdict::Note, "for guests", format!("{have}; the host lacks {missing}, so guests do"))
        }
    }
}

fn address_space() -> Finding {
    let limit = rustix::process::getrlimit(rustix::process::Resource::As).current;
    match limit {
        None => finding(
            Verdict::Good,
            "address space",
            "unlimited (the translator reserves some TiB of it, untouched)",
        ),
        Some(n) => finding(
            Verdict::Bad,
            "address space",
            format!(
                "limited to {} MiB: the translator reserves some TiB of it; run `ulimit -v unlimited`",
                n >> 20
            ),
        ),
    }
}

fn translator() -> Finding {
    match crate::machine::probe_translator() {
        Ok(()) => finding(Verdict::Good, "code cache", "executable memory mapped, translator built"),
        Err(e) => finding(Verdict::Bad, "code cache", e),
    }
}

/// Looked at, never opened: paravane does not use it.
fn kvm() -> Finding {
    let there = std::path::Path::new("/dev/kvm").exists();
    finding(
        Verdict::Note,
        "/dev/kvm",
        if there { "there, and not used" } else { "not there, and not needed" },
    )
}

fn memory() -> Finding {
    let text = proc_value("/proc/meminfo", "MemAvailable").unwrap_or_default();
    match text.split(' ').next().and_then(|n| n.parse::<u64>().ok()) {
        Some(kib) if kib >= 1 << 20 => {
            finding(Verdict::Good, "memory", format!("{} MiB available", kib >> 10))
        }
        Some(kib) => finding(Verdict::Note, "memory", format!("only {} MiB available", kib >> 10)),
        None => finding(Verdict::Note, "memory", "unknown: /proc/meminfo cannot be read"),
    }
}

fn terminal() -> Finding {
    let (input, output) = (rustix::termios::isatty(io::stdin()), rustix::termios::isatty(io::stdout()));
    let text = match (input, output) {
        (true, true) => "standard input and output: made raw while a guest runs; Ctrl-A x quits",
        (false, _) => "standard input is no terminal: its bytes go to the guest as they are",
        (true, false) => "standard output is no terminal: it receives the guest's bytes as they are",
    };
    finding(Verdict::Note, "terminal", text)
}

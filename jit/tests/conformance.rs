//! Engines against the host CPU: random instructions of every form, and sequences of them.
//!
//! `PARAVANE_FUZZ_ROUNDS` cases per form (default few, for the test suite), `PARAVANE_FUZZ_SEED` to start from,
//! `PARAVANE_FUZZ_SEQUENCES` sequences, `PARAVANE_FUZZ_SKIP` and `PARAVANE_FUZZ_ONLY` forms to
//! leave out and the only ones to take (beginnings of names, by commas),
//! `PARAVANE_FUZZ_REPORT` a file for all findings.

use paravane_cpu::{Attention, CpuModel, Engine, HostFeatures, Interpreter, VpIndex, model_by_name};
use paravane_jit::fuzz::{Bench, Campaign, Leave};
use paravane_jit::host::{HostVectorUnit, NativeMode};
use paravane_jit::{JitOptions, Translator};
use std::io::Write;
use std::sync::Mutex;
use std::time::Duration;

/// Benches map the same addresses.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

fn names(name: &str) -> Vec<String> {
    std::env::var(name).map(|names| names.split(',').map(str::to_owned).collect()).unwrap_or_default()
}

fn model() -> CpuModel {
    model_by_name("max", &HostFeatures::detect()).unwrap()
}

fn interpreter(_: &Bench) -> Box<dyn Engine> {
    let vector = Box::new(HostVectorUnit::new().unwrap());
    Box::new(Interpreter::new(model(), vector, Attention::default(), VpIndex(0)))
}

fn translator(bench: &Bench) -> Box<dyn Engine> {
    let memory = bench.guest().memory();
    let options = JitOptions::default();
    Box::new(Translator::new(model(), memory, Attention::default(), VpIndex(0), options).unwrap())
}

fn conform(name: &str, mode: NativeMode, sequences: u64, engine: impl Fn(&Bench) -> Box<dyn Engine>) {
    let _guard = ONE_AT_A_TIME.lock();
    let leave = if name == "translator" { Leave::DeadFlags } else { Leave::Nothing };
    let mut bench = Bench::new(mode, leave).unwrap();
    let mut engine = engine(&bench);
    let campaign = Campaign {
        seed: setting("PARAVANE_FUZZ_SEED", 1),
        rounds: setting("PARAVANE_FUZZ_ROUNDS", 4),
        sequences: setting("PARAVANE_FUZZ_SEQUENCES", sequences),
        length: 8,
        skip: names("PARAVANE_FUZZ_SKIP"),
        only: names("PARAVANE_FUZZ_ONLY"),
        time: Duration::from_secs(setting("PARAVANE_FUZZ_SECONDS", 60)),
    };
    let report = campaign.run(&mut bench, &mut *engine);
    println!("{name} {mode:?} from seed {}: {}", campaign.seed, report.summary());
    let texts: Vec<String> = report.failures.iter().map(|f| f.text(bench.bits())).collect();
    if let Ok(path) = std::env::var("PARAVANE_FUZZ_REPORT") {
        let mut file = std::fs::File::options().create(true).append(true).open(path).unwrap();
        writeln!(file, "# {name} {mode:?}: {}\n{}", report.summary(), texts.join("\n")).unwrap();
    }
    let shown = texts.iter().take(10).map(String::as_str).collect::<Vec<_>>().join("\n");
    assert!(texts.is_empty(), "{} findings:\n{shown}", texts.len());
}

#[test]
fn interpreter_in_64_bit_mode() {
    conform("interpreter", NativeMode::Long, 50, interpreter);
}

#[test]
fn interpreter_in_32_bit_mode() {
    conform("interpreter", NativeMode::Protected32, 50, interpreter);
}

#[test]
fn translator_in_64_bit_mode() {
    conform("translator", NativeMode::Long, 500, translator);
}

#[test]
fn translator_in_32_bit_mode() {
    conform("translator", NativeMode::Protected32, 500, translator);
}

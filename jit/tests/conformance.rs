//! Engines against the host CPU: random instructions of every form, and sequences of them.
//!
//! In the test suite there are few cases, half from a fixed seed, half from a fresh one, which a failure prints.
//! `cargo xtask fuzz cpu` runs more; its options arrive as `PARAVANE_FUZZ_ROUNDS` (cases per form), `_SEQUENCES`,
//! `_SEED` (the only one then), `_SECONDS`, `_ONLY` and `_SKIP` (beginnings of forms' names, by commas), and
//! `_REPORT` (a file for all findings).

use paravane_cpu::{Attention, CpuModel, Engine, HostFeatures, Interpreter, VpIndex, model_by_name};
use paravane_jit::fuzz::{Bench, Campaign, Leave};
use paravane_jit::host::{HostVectorUnit, NativeMode};
use paravane_jit::{JitOptions, Translator};
use std::io::Write;
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

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

fn interpreter(_: &Bench, attention: Attention) -> Box<dyn Engine> {
    let vector = Box::new(HostVectorUnit::new().unwrap());
    Box::new(Interpreter::new(model(), vector, attention, VpIndex(0)))
}

fn translator(bench: &Bench, attention: Attention) -> Box<dyn Engine> {
    let memory = bench.guest().memory();
    let options = JitOptions::default();
    Box::new(Translator::new(model(), memory, attention, VpIndex(0), options).unwrap())
}

/// The seed that was asked for; or a fixed one, so that what passed keeps passing, and one that nobody saw before.
fn seeds() -> Vec<u64> {
    if let Ok(seed) = std::env::var("PARAVANE_FUZZ_SEED") {
        return vec![seed.parse().expect("PARAVANE_FUZZ_SEED is a number")];
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    vec![1, now.as_nanos() as u64 >> 16 & 0xFFFF_FFFF]
}

fn conform(
    name: &str,
    mode: NativeMode,
    sequences: u64,
    engine: impl Fn(&Bench, Attention) -> Box<dyn Engine>,
) {
    let _guard = ONE_AT_A_TIME.lock();
    let leave = if name == "translator" { Leave::DeadFlags } else { Leave::Nothing };
    let mut bench = Bench::new(mode, leave).unwrap();
    let attention = Attention::default();
    let mut engine = engine(&bench, attention.clone());
    bench.watch(attention);
    let mut texts = Vec::new();
    for seed in seeds() {
        let campaign = Campaign {
            seed,
            rounds: setting("PARAVANE_FUZZ_ROUNDS", 6),
            sequences: setting("PARAVANE_FUZZ_SEQUENCES", sequences),
            length: 8,
            skip: names("PARAVANE_FUZZ_SKIP"),
            only: names("PARAVANE_FUZZ_ONLY"),
            time: Duration::from_secs(setting("PARAVANE_FUZZ_SECONDS", 30)),
        };
        let report = campaign.run(&mut bench, &mut *engine);
        println!("{name} {mode:?} from seed {seed}: {}", report.summary());
        let found: Vec<String> = report.failures.iter().map(|f| f.text(bench.bits())).collect();
        if let Ok(path) = std::env::var("PARAVANE_FUZZ_REPORT") {
            let mut file = std::fs::File::options().create(true).append(true).open(path).unwrap();
            let title = format!("# {name} {mode:?} from seed {seed}: {}", report.summary());
            writeln!(file, "{title}\n{}", found.join("\n")).unwrap();
        }
        texts.extend(found);
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

//! Every target over its corpus and a slice of random inputs: what CI runs of the fuzzers.

use paravane_fuzz::{Random, names, run};
use std::path::Path;
use std::time::{Duration, Instant};
use std::{env, fs, panic, thread};

/// Random inputs for each target, and the time after which there are no more.
const SLICE: u64 = 150;
const SLICE_TIME: Duration = Duration::from_millis(700);
const LONGEST_INPUT: usize = 400;
/// What a single input may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);
/// Resident memory that all targets together never need.
const MOST_MEMORY_KIB: u64 = 1 << 20;

fn play(name: &str, what: &str, input: &[u8]) {
    let started = Instant::now();
    if let Err(panic) = panic::catch_unwind(|| run(name, input)) {
        eprintln!("{name}: {what}: {input:02x?}");
        panic::resume_unwind(panic);
    }
    assert!(started.elapsed() < PATIENCE, "{name}: {what} takes {:?}", started.elapsed());
}

/// `corpus/NAME.hex`: an input per line.
fn corpus(name: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(format!("{name}.hex"));
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let byte =
        |pair: &[u8]| u8::from_str_radix(str::from_utf8(pair).expect("ASCII"), 16).expect("hexadecimal");
    assert!(!text.is_empty(), "{} is empty", path.display());
    for (number, line) in text.lines().enumerate() {
        let input: Vec<u8> = line.as_bytes().chunks(2).map(byte).collect();
        play(name, &format!("{}:{}", path.display(), number + 1), &input);
    }
}

fn slice(name: &str) {
    let end = Instant::now() + SLICE_TIME;
    for seed in (0..SLICE).take_while(|_| Instant::now() < end) {
        play(name, &format!("seed {seed}"), &Random::new(seed).input(LONGEST_INPUT));
    }
}

/// Most memory this process ever had (VmHWM of proc(5)).
fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("status");
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).expect("VmHWM");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
fn every_target_survives_its_corpus_and_a_random_slice() {
    let all: Vec<_> = names().map(|name| thread::spawn(move || (corpus(name), slice(name)))).collect();
    let failed = all.into_iter().filter_map(|target| target.join().err()).count();
    assert_eq!(failed, 0, "targets with findings");
    assert!(peak_kib() < MOST_MEMORY_KIB, "{} KiB of memory", peak_kib());
}

/// A file given as `PARAVANE_FUZZ_INPUT=target:path` is played alone: how a finding is reproduced in a debugger.
#[test]
fn the_input_that_is_asked_for() {
    if let Some(asked) = env::var("PARAVANE_FUZZ_INPUT").ok().filter(|asked| !asked.is_empty()) {
        let (name, path) = asked.split_once(':').expect("target:path");
        play(name, path, &fs::read(path).expect("input"));
    }
}

/// The corpus belongs to targets that exist, and libFuzzer has a binary for each.
#[test]
fn corpus_and_binaries_match_the_targets() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut expected: Vec<_> = names().map(str::to_owned).collect();
    expected.sort();
    let list = |folder: &Path| {
        let entries = fs::read_dir(folder).expect("folder");
        let mut found: Vec<String> = entries
            .map(|entry| {
                entry.expect("entry").path().file_stem().unwrap_or_default().to_string_lossy().into_owned()
            })
            .collect();
        found.sort();
        found
    };
    assert_eq!(list(&here.join("corpus")), expected);
    assert_eq!(list(&here.join("libfuzzer/targets")), expected);
}

#[test]
fn a_target_that_is_not_there_is_named() {
    let message = panic::catch_unwind(|| run("nonsense", &[])).expect_err("no such target");
    assert!(message.downcast_ref::<String>().is_some_and(|m| m.contains("nonsense")));
}

//! libFuzzer over the targets of `tests/fuzz`, through cargo-fuzz.
//!
//! No sanitizer: these crates forbid `unsafe`, guest memory is one mapping that a sanitizer does not know, and the
//! translator's own signal handler and reservations do not go with one. Without it the stable toolchain will do.

use crate::host::{self, Context, Failure, Outcome};
use std::fs;

/// The package that cargo-fuzz builds, relative to the root.
const PACKAGE: &str = "tests/fuzz/libfuzzer";
/// Longer inputs find nothing that shorter ones do not.
const LONGEST_INPUT: u32 = 512;
/// An input that takes this many seconds hangs.
const HANG: u32 = 20;
/// Memory that no target needs, in MiB.
const MOST_MEMORY: u32 = 1024;

/// The names of all targets, in order.
pub fn all() -> Outcome<Vec<String>> {
    let files = host::files_under(&host::root().join(PACKAGE).join("targets"))?;
    let mut names: Vec<String> =
        files.iter().filter_map(|f| Some(f.file_stem()?.to_string_lossy().into_owned())).collect();
    names.sort();
    Ok(names)
}

/// Fuzzes target `name`. New inputs go to `fuzz/corpus` in the target folder, the committed ones are the seeds.
pub fn run(name: &str, seconds: u64) -> Outcome<()> {
    if !host::installed("cargo-fuzz") {
        return Err(Failure::new("cargo-fuzz is missing: cargo install cargo-fuzz"));
    }
    let root = host::root();
    let work = host::target_folder().join("fuzz");
    let (found, artifacts) = (work.join("corpus").join(name), work.join("artifacts").join(name));
    for folder in [&found, &artifacts] {
        fs::create_dir_all(folder).context(folder.display())?;
    }
    println!("fuzz {name}: {seconds} s");
    let mut fuzz = host::cargo();
    fuzz.args(["fuzz", "run", "--sanitizer", "none", "--fuzz-dir"]).arg(root.join(PACKAGE)).arg(name);
    fuzz.arg(found).arg(root.join("tests/fuzz/corpus").join(name)).arg("--");
    fuzz.args([
        format!("-max_total_time={seconds}"),
        format!("-max_len={LONGEST_INPUT}"),
        format!("-timeout={HANG}"),
        format!("-rss_limit_mb={MOST_MEMORY}"),
        format!("-artifact_prefix={}/", artifacts.display()),
        "-print_final_stats=1".into(),
    ]);
    // libFuzzer's package is a workspace of its own; its build must not mix with ours.
    fuzz.env("CARGO_TARGET_DIR", work);
    host::run(&mut fuzz)
}

//! libFuzzer over the targets of `tests/fuzz`, through cargo-fuzz.
//!
//! No sanitizer: these crates forbid `unsafe`, guest memory is one mapping that a sanitizer does not know, and the
//! translator's own signal handler and reservations do not go with one. Without it the stable toolchain will do.

use super::corpus;
use crate::host::{self, Context, Failure, Outcome};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

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

/// libFuzzer with target `name`, and what it may not exceed.
fn libfuzzer(name: &str, folders: &[&Path], options: &[String]) -> Command {
    let mut fuzz = host::cargo();
    fuzz.args(["fuzz", "run", "--sanitizer", "none", "--fuzz-dir"]).arg(host::root().join(PACKAGE)).arg(name);
    fuzz.args(folders).arg("--").args(options);
    fuzz.args([
        format!("-max_len={LONGEST_INPUT}"),
        format!("-timeout={HANG}"),
        format!("-rss_limit_mb={MOST_MEMORY}"),
    ]);
    // libFuzzer's package is a workspace of its own; its build must not mix with ours.
    fuzz.env("CARGO_TARGET_DIR", work());
    fuzz
}

fn work() -> PathBuf {
    host::target_folder().join("fuzz")
}

/// A folder of target `name` under the work folder.
fn folder(what: &str, name: &str) -> Outcome<PathBuf> {
    let path = work().join(what).join(name);
    fs::create_dir_all(&path).context(path.display())?;
    Ok(path)
}

/// Fuzzes target `name` from the committed corpus; what it finds new stays in the target folder.
pub fn run(name: &str, seconds: u64) -> Outcome<()> {
    if !host::installed("cargo-fuzz") {
        return Err(Failure::new("cargo-fuzz is missing: cargo install cargo-fuzz"));
    }
    let (found, artifacts) = (folder("corpus", name)?, folder("artifacts", name)?);
    corpus::unpack(name, &found)?;
    println!("fuzz {name}: {seconds} s");
    let options = [
        format!("-max_total_time={seconds}"),
        format!("-artifact_prefix={}/", artifacts.display()),
        "-print_final_stats=1".into(),
    ];
    host::run(&mut libfuzzer(name, &[&found], &options))
}

/// Makes the fewest inputs that reach all code reached so far the committed corpus of target `name`.
pub fn keep(name: &str) -> Outcome<()> {
    let (found, kept) = (folder("corpus", name)?, folder("kept", name)?);
    fs::remove_dir_all(&kept).context(kept.display())?;
    fs::create_dir_all(&kept).context(kept.display())?;
    host::run(&mut libfuzzer(name, &[&kept, &found], &["-merge=1".into(), "-use_counters=0".into()]))?;
    corpus::pack(name, &kept)
}

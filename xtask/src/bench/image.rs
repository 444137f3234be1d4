//! Builds the programs, and the initramfs that carries them into a guest.
//!
//! The same folder serves native runs: what the guest runs is byte for byte what the host runs.

use super::suite::{COLD_FUNCTIONS, COUNTED_FUNCTIONS, Kind, Program, SCRIPTS, TEXT_BYTES};
use crate::guests::cpio::Archive;
use crate::guests::{self, Manifest};
use crate::host::{self, Context, Failure, Outcome};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Compiles what the programs need into `guests/bench`, and returns that folder.
pub fn build(programs: &[Program], manifest: &Manifest) -> Outcome<PathBuf> {
    let folder = folder();
    fs::create_dir_all(&folder).context(folder.display())?;
    let own = [("gentext".to_owned(), "gentext", false), ("distinct".to_owned(), "distinct", false)];
    let files: BTreeSet<_> = programs.iter().map(source).chain(own).collect();
    if files.iter().any(|&(_, _, narrow)| narrow) {
        check_narrow(&host::text(host::command("gcc").args(["-m32", "-print-file-name=crt1.o"]))?)?;
    }
    for (file, source, narrow) in files {
        compile(&folder.join(file), source, narrow, &folder)?;
    }
    let text = host::output(host::command(folder.join("gentext")).arg(TEXT_BYTES))?;
    host::write(&folder.join("text"), &text)?;
    for script in SCRIPTS {
        host::write(&folder.join(script), &host::read(&host::root().join("tests/bench").join(script))?)?;
    }
    place_program(&guests::folder().join(&manifest.busybox), &folder.join("busybox"))?;
    Ok(folder)
}

/// Where the programs are.
pub fn folder() -> PathBuf {
    guests::folder().join("bench")
}

/// Puts the interpreter that hosts seldom have beside the programs.
pub fn bring_lua() -> Outcome<()> {
    let content = guests::package("lua5.4", false)?;
    fs::create_dir_all(folder()).context(folder().display())?;
    place_program(&content.join("usr/bin/lua5.4"), &folder().join("lua"))
}

fn place_program(from: &Path, to: &Path) -> Outcome<()> {
    host::write(to, &host::read(from)?)?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o755)).context(to.display())
}

/// A program's file, its source, and whether it is 32-bit code.
fn source(program: &Program) -> (String, &'static str, bool) {
    match program.kind {
        Kind::Compiled { source, narrow, .. } => (program.file(), source, narrow),
        Kind::Tool(_) => (program.file(), "tool", false),
    }
}

/// Whether gcc can make 32-bit programs: where it finds a file of its 32-bit C library it says where (`found`), else it repeats the name.
fn check_narrow(found: &str) -> Outcome<()> {
    if Path::new(found.trim()).is_absolute() {
        return Ok(());
    }
    Err(Failure::new(
        "gcc makes no 32-bit programs for the rows of 32-bit guests; apt-get install gcc-multilib",
    ))
}

fn compile(program: &Path, source: &str, narrow: bool, folder: &Path) -> Outcome<()> {
    let harness = host::root().join("tests/bench");
    let (input, optimize) = if source == "cold" {
        let input = folder.join("cold.c");
        let text = cold_source(COLD_FUNCTIONS);
        if fs::read(&input).ok().as_deref() != Some(text.as_bytes()) {
            host::write(&input, text.as_bytes())?;
        }
        (input, "-O1")
    } else {
        (harness.join(format!("{source}.c")), "-O2")
    };
    if newer(program, &[&input, &harness.join("bench.h")]) {
        return Ok(());
    }
    println!("bench: compiling {}", program.file_name().unwrap_or_default().to_string_lossy());
    let mut gcc = host::command("gcc");
    gcc.args(["-std=gnu17", "-march=x86-64", "-Wall", "-Wextra", "-static", "-s", optimize, "-I"])
        .arg(&harness);
    if narrow {
        gcc.args(["-m32", "-mfpmath=sse"]);
    }
    host::run(gcc.arg("-o").arg(program).arg(&input).arg("-lm"))
}

/// Instructions that a function of class `cold` executes for the first time, on average: counted once, by single steps.
pub fn cold_instructions(folder: &Path) -> Outcome<f64> {
    let (cold, count) = (folder.join("cold"), folder.join("cold.count"));
    if !newer(&count, &[&cold]) {
        println!("bench: counting the instructions of cold");
        let mut distinct = host::command(folder.join("distinct"));
        host::write(&count, &host::output(distinct.arg(&cold).arg(COUNTED_FUNCTIONS.to_string()))?)?;
    }
    let text = String::from_utf8_lossy(&host::read(&count)?).into_owned();
    let instructions: f64 = text.trim().parse().context(count.display())?;
    Ok(instructions / COUNTED_FUNCTIONS as f64)
}

/// Whether a file is there and newer than all that it is made from.
fn newer(made: &Path, from: &[&Path]) -> bool {
    let age = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    let Some(made) = age(made) else { return false };
    from.iter().all(|path| age(path).is_some_and(|age| age < made))
}

/// Class `cold`: thousands of small functions, no two alike, each called once.
fn cold_source(count: u64) -> String {
    let mut text = String::from(
        "/* Cold code: one unit is one function that has not run before. */\n#include \"bench.h\"\n",
    );
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    for n in 0..count {
        // xorshift64: any sequence that is the same everywhere will do.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let (a, b, shift) = (random & 0xffff, random >> 48 | 1, random >> 20 & 31);
        let step = match random >> 32 & 3 {
            0 => format!("x = x * {b} + {a}; if (x & {}) x ^= x >> {};", 1 << shift, shift + 1),
            1 => format!("for (int i = 0; i < {}; i++) x += x << {} ^ {a};", 1 + shift % 3, 1 + shift % 7),
            2 => format!("if (x % {b} < {}) x -= {a}; else x = (x ^ {b}) + (x >> {shift});", b / 2 + 1),
            _ => format!("uint32_t y = (uint32_t)x; y = y << {} | y >> 9; x += y ^ {a};", 1 + shift % 20),
        };
        writeln!(text, "static __attribute__((noinline)) uint64_t f{n}(uint64_t x) {{ {step} return x; }}")
            .ok();
    }
    text.push_str("static uint64_t (*const all[])(uint64_t) = {");
    for n in 0..count {
        write!(text, "{}f{n},", if n % 16 == 0 { "\n" } else { "" }).ok();
    }
    text.push_str(
        "\n};\nstatic uint64_t work(uint64_t units, const char *variant) {\n    (void)variant;\n    uint64_t x = 1;\n\
         \x20   for (uint64_t i = 0; i < units && i < sizeof all / sizeof *all; i++)\n        x = all[i](x);\n\
         \x20   return x;\n}\nBENCH(\"cold\", bench_nothing, work)\n",
    );
    text
}

/// The second half of the initrd: the programs, their input, and the list of what to run, compressed.
pub fn archive(programs: &[(Program, u64)], folder: &Path) -> Outcome<Vec<u8>> {
    let mut archive = Archive::default();
    let mut list = String::new();
    let mut files: BTreeSet<String> =
        SCRIPTS.iter().chain(&["text", "busybox"]).map(|&file| file.to_owned()).collect();
    for (program, units) in programs {
        let words = program.words(*units);
        if let Some(blank) = words.iter().find(|word| word.contains(char::is_whitespace)) {
            return Err(Failure::new(format!("{}: the guest's list cannot hold `{blank}`", program.name)));
        }
        writeln!(list, "{} {}", program.name, words.join(" ")).ok();
        files.insert(program.file());
        files.extend(words.iter().filter(|word| *word == "./lua").map(|_| "lua".to_owned()));
    }
    for file in &files {
        archive.file(&format!("bench/{file}"), true, &host::read(&folder.join(file))?);
    }
    archive.file("bench/list", false, list.as_bytes());
    let tools: BTreeSet<&str> = programs.iter().filter_map(|(program, _)| program.host_program()).collect();
    let python =
        tools.iter().find(|tool| tool.ends_with("python3")).map(|tool| python_files(tool)).transpose()?;
    let lua = files.contains("lua").then(|| folder.join("lua").display().to_string());
    let libraries = libraries(tools.iter().map(|tool| (*tool).to_owned()).chain(lua))?;
    let tools = tools.into_iter().map(str::to_owned);
    for file in tools.chain(libraries).chain(python.into_iter().flatten()) {
        archive.file(file.trim_start_matches('/'), true, &host::read(Path::new(&file))?);
    }
    guests::compress(&archive.finish())
}

/// The shared libraries and the loader of programs, as `ldd` names them.
fn libraries(programs: impl Iterator<Item = String>) -> Outcome<BTreeSet<String>> {
    let mut all = BTreeSet::new();
    for program in programs {
        let listed = host::text(host::command("ldd").arg(program))?;
        // "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)" or "/lib64/ld-linux-x86-64.so.2 (0x…)"
        let words = listed.split_whitespace().filter(|word| word.starts_with('/'));
        all.extend(words.map(str::to_owned));
    }
    Ok(all)
}

/// What Python reads before it runs a program without modules: a landmark, and the codecs it begins with.
fn python_files(python: &str) -> Outcome<Vec<String>> {
    let program = fs::canonicalize(python).context(python)?;
    let version = program.file_name().unwrap_or_default().to_string_lossy();
    let files = ["os", "encodings/__init__", "encodings/aliases", "encodings/utf_8", "encodings/ascii"];
    Ok(files.map(|file| format!("/usr/lib/{version}/{file}.py")).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compiler_without_32_bit_libraries_is_told_by_name() {
        assert!(check_narrow("/usr/lib/gcc/x86_64-linux-gnu/12/../../../../lib32/crt1.o\n").is_ok());
        let told = check_narrow("crt1.o\n").expect_err("no library").to_string();
        assert!(told.contains("apt-get install gcc-multilib"), "{told}");
    }
}

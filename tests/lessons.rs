//! The sessions in `docs/lessons`: what the pages show is what happens. With PARAVANE_WRITE_LESSONS set the pages are written anew.

mod common;

use common::{Running, Scratch};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Seconds for a session on a busy host.
const SOON: u64 = 120;
/// Printed between two commands' output.
const MARK: &str = "@@@@";

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/lessons")
}

/// A page, in pieces: text, and fenced blocks with their language.
struct Page {
    path: PathBuf,
    pieces: Vec<(Option<String>, String)>,
}

impl Page {
    fn read(name: &str) -> Page {
        let path = folder().join(name);
        let text = fs::read_to_string(&path).expect("lesson");
        let mut pieces = vec![(None, String::new())];
        for line in text.lines() {
            let inside = pieces.last().is_some_and(|p| p.0.is_some());
            match line.strip_prefix("```") {
                Some(_) if inside => pieces.push((None, String::new())),
                Some(language) => pieces.push((Some(language.to_owned()), String::new())),
                None => {
                    let piece = pieces.last_mut().expect("a piece");
                    piece.1.push_str(line);
                    piece.1.push('\n');
                }
            }
        }
        Page { path, pieces }
    }

    fn blocks<'a>(&'a self, language: &'a str) -> impl Iterator<Item = &'a str> {
        self.pieces.iter().filter(move |p| p.0.as_deref() == Some(language)).map(|p| p.1.as_str())
    }

    fn write(&self) {
        let mut text = String::new();
        for (language, piece) in &self.pieces {
            match language {
                Some(language) => {
                    let _infallible = write!(text, "```{language}\n{piece}```\n");
                }
                None => text.push_str(piece),
            }
        }
        fs::write(&self.path, text).expect("lesson written");
    }

    /// Compares what blocks of `language` say with what happened, or takes it over.
    #[track_caller]
    fn settle(&mut self, language: &str, happened: &[String]) {
        let blocks: Vec<_> = self.pieces.iter_mut().filter(|p| p.0.as_deref() == Some(language)).collect();
        assert_eq!(blocks.len(), happened.len());
        let writing = std::env::var_os("PARAVANE_WRITE_LESSONS").is_some();
        let mut wrong = Vec::new();
        for (block, happened) in blocks.into_iter().zip(happened) {
            if !matches(&lines(&block.1), &lines(happened)) {
                wrong.push(format!("the page says:\n{}\nbut it is:\n{happened}", block.1));
                block.1.clone_from(happened);
            }
        }
        if writing && !wrong.is_empty() {
            self.write();
        } else {
            assert!(wrong.is_empty(), "{}:\n{}", self.path.display(), wrong.join("\n"));
        }
    }
}

fn lines(text: &str) -> Vec<&str> {
    text.lines().map(str::trim_end).collect()
}

/// Whether `text` is as `pattern` says; a line of three dots stands for any lines, three dots in a line for any text.
fn matches(pattern: &[&str], text: &[&str]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some((&"...", rest)) => (0..=text.len()).any(|n| matches(rest, &text[n..])),
        Some((first, rest)) => {
            text.split_first().is_some_and(|(line, more)| line_matches(first, line) && matches(rest, more))
        }
    }
}

fn line_matches(pattern: &str, line: &str) -> bool {
    let mut parts = pattern.split("...");
    let Some(mut rest) = parts.next().and_then(|first| line.strip_prefix(first)) else { return false };
    let mut last = "";
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
        last = part;
    }
    rest.is_empty() || (pattern.contains("...") && (last.is_empty() || rest.ends_with(last)))
}

/// The commands of the page's `sh` block in a scratch directory that holds the lessons' sources: all but the last are run, the
/// last is paravane's and is returned, its debugger's address replaced by that of a socket.
fn prepare(page: &Page, dir: &Scratch, socket: &Path) -> Command {
    for entry in fs::read_dir(folder()).expect("lessons") {
        let path = entry.expect("entry").path();
        if path.extension().is_some_and(|e| e == "S" || e == "inc") {
            fs::copy(&path, dir.path(path.file_name().and_then(|n| n.to_str()).expect("name")))
                .expect("copy");
        }
    }
    let here = dir.path("");
    let all: Vec<&str> = page.blocks("sh").flat_map(str::lines).collect();
    let (run, before) = all.split_last().expect("the page runs something");
    for line in before {
        let done = Command::new("sh").args(["-c", line]).current_dir(&here).status().expect("sh");
        assert!(done.success(), "{line}");
    }
    let words = run.strip_prefix("paravane ").expect("the last command is paravane's").split_whitespace();
    let address = format!("unix={}", socket.display());
    let mut command = Command::new(env!("CARGO_BIN_EXE_paravane"));
    command.args(words.map(|word| if word == ":1234" { address.as_str() } else { word })).current_dir(&here);
    command
}

/// What gdb says to the commands of each block of the page.
fn session(page: &Page, dir: &Scratch, socket: &Path) -> Vec<String> {
    let until = Instant::now() + Duration::from_secs(SOON);
    while !socket.exists() {
        assert!(Instant::now() < until, "no socket");
        std::thread::sleep(Duration::from_millis(5));
    }
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-batch", "-ex", "set pagination off", "-ex", "set confirm off", "-ex", "set width 0"]);
    for block in page.blocks("gdb") {
        for command in block.lines().filter_map(|l| l.strip_prefix("(gdb) ")) {
            let real = command.replace(":1234", &socket.display().to_string());
            gdb.arg("-ex")
                .arg(format!("echo (gdb) {}\\n", command.replace('\\', "\\\\")))
                .arg("-ex")
                .arg(real);
        }
        gdb.arg("-ex").arg(format!("echo {MARK}\\n"));
    }
    let (mut from, to) = std::io::pipe().expect("pipe");
    gdb.stdin(Stdio::null()).stdout(to.try_clone().expect("pipe")).stderr(to).current_dir(dir.path(""));
    let mut child = gdb.spawn().expect("gdb is installed (Debian package gdb)");
    drop(gdb);
    let mut said = Vec::new();
    std::io::Read::read_to_end(&mut from, &mut said).expect("output");
    child.wait().expect("gdb");
    let said = String::from_utf8_lossy(&said).replace(&socket.display().to_string(), ":1234");
    let said = without_host_addresses(&said);
    let mut blocks: Vec<String> = said.split(&format!("{MARK}\n")).map(str::to_owned).collect();
    let rest = blocks.pop().unwrap_or_default();
    assert!(rest.trim().is_empty(), "gdb went on: {rest}");
    blocks
}

/// Where the host put the code is another place in every run.
fn without_host_addresses(said: &str) -> String {
    const BEFORE: &str = "host code at 0x";
    let mut pieces = said.split(BEFORE);
    let mut out = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let _infallible =
            write!(out, "{BEFORE}...{}", piece.trim_start_matches(|c: char| c.is_ascii_hexdigit()));
    }
    out
}

#[track_caller]
fn with_gdb(name: &str, code: i32) {
    let dir = Scratch::new(&format!("lesson-{name}"));
    let mut page = Page::read(&format!("{name}.md"));
    let socket = dir.path("gdb");
    let running = Running::start(prepare(&page, &dir, &socket));
    let said = session(&page, &dir, &socket);
    assert_eq!(running.finish(SOON).0, Some(code));
    page.settle("gdb", &said);
}

#[test]
fn the_switch_to_long_mode() {
    with_gdb("long-mode", 1);
}

#[test]
fn a_page_fault() {
    with_gdb("page-fault", 1);
}

#[test]
fn who_overwrote_this_variable() {
    with_gdb("corrupted", 1);
}

#[test]
fn what_the_translator_makes() {
    with_gdb("hot-loop", 1);
}

#[test]
fn a_triple_fault() {
    let dir = Scratch::new("lesson-triple-fault");
    let mut page = Page::read("triple-fault.md");
    let output = prepare(&page, &dir, Path::new("")).output().expect("paravane");
    assert_eq!(output.status.code(), Some(3));
    page.settle("dossier", &[String::from_utf8_lossy(&output.stderr).into_owned()]);
}

#[test]
fn dots_stand_for_anything() {
    assert!(matches(&["a", "...", "d"], &["a", "b", "c", "d"]));
    assert!(!matches(&["a", "...", "d"], &["a", "b", "c"]));
    assert!(matches(&["at 0x...: 7 ..."], &["at 0x12: 7 bytes"]));
    assert!(!matches(&["at 0x...: 7"], &["at 0x12: 8"]));
}

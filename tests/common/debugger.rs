//! A stock gdb at a running paravane.

use super::{Running, Scratch};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Seconds for anything short on a busy host.
pub const SOON: u64 = 120;

/// Runs gdb on `commands` against the socket; what it said.
pub fn gdb(socket: &Path, commands: &[&str]) -> String {
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-batch", "-ex", "set pagination off", "-ex", "set confirm off"]);
    gdb.arg("-ex").arg(format!("target remote {}", socket.display()));
    for c in commands {
        gdb.args(["-ex", c]);
    }
    say(gdb)
}

/// Everything gdb says, errors in their place.
pub fn say(mut gdb: Command) -> String {
    let (mut from, to) = std::io::pipe().expect("pipe");
    gdb.stdin(Stdio::null()).stdout(to.try_clone().expect("pipe")).stderr(to);
    let mut child = gdb.spawn().expect("gdb is installed (Debian package gdb)");
    drop(gdb);
    let mut said = Vec::new();
    from.read_to_end(&mut said).expect("output");
    child.wait().expect("gdb");
    String::from_utf8_lossy(&said).into_owned()
}

#[track_caller]
pub fn has(text: &str, parts: &[&str]) {
    let mut rest = text;
    for part in parts {
        let Some(at) = rest.find(part) else { panic!("no '{part}' (in this order) in:\n{text}") };
        rest = &rest[at + part.len()..];
    }
}

pub fn wait_for(socket: &Path) {
    let until = Instant::now() + Duration::from_secs(SOON);
    while !socket.exists() {
        assert!(Instant::now() < until, "no socket");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// paravane with `--gdb`; the socket.
pub fn start(dir: &Scratch, arguments: &[&str]) -> (Running, PathBuf) {
    let socket = dir.path("gdb");
    let _old = fs::remove_file(&socket);
    let mut command = Command::new(env!("CARGO_BIN_EXE_paravane"));
    command.arg("run").args(arguments).arg("--gdb").arg(format!("unix={}", socket.display()));
    let running = Running::start(command);
    wait_for(&socket);
    (running, socket)
}

/// A boot sector: 16-bit code at 0:7C00H.
pub fn sector(dir: &Scratch, code: &[u8]) -> String {
    let mut sector = code.to_vec();
    sector.resize(510, 0);
    sector.extend([0x55, 0xAA]);
    let path = dir.path("sector");
    fs::write(&path, sector).expect("sector");
    path.display().to_string()
}

/// A small machine that a guest ends by port F4H.
pub const SMALL: [&str; 6] = ["--memory", "64M", "--serial", "none", "--debug-exit", "0xf4"];

/// Such a machine with `--gdb`; the socket.
pub fn small(dir: &Scratch, kernel: &str, engine: &str, more: &[&str]) -> (Running, PathBuf) {
    let mut arguments = vec!["--kernel", kernel, "--engine", engine];
    arguments.extend(SMALL);
    arguments.extend(more);
    start(dir, &arguments)
}

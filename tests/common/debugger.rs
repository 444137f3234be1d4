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

/// A boot sector that has the first IDE disk's bus master read its first sector to 1000H, by one region described at 600H, and ends with
/// exit code 11.
///
/// ```text
/// 7C00 xor ax, ax; mov ds, ax; PCI 0:1.1: COMMAND = 5; bx = BAR 4
/// 7C28 mov dword [600h], 1000h; mov dword [604h], 80000200h; BMIDTP = 600h
/// 7C45 device 0, LBA 0, 1 sector; 7C5A READ DMA (C8h)
/// 7C60 mov dx, bx; mov al, 9         7C65 mov dx, 1F7h
/// 7C64 out dx, al                    7C68 in al, dx; test al, 88h; jnz 7C68
/// 7C6D nop; mov al, 5; out F4h, al
/// ```
#[allow(dead_code, reason = "not every test has disks")]
pub const BUS_MASTER: [u8; 116] = [
    0x31, 0xC0, 0x8E, 0xD8, 0x66, 0xB8, 0x04, 0x09, 0x00, 0x80, 0xBA, 0xF8, 0x0C, 0x66, 0xEF, 0xBA, 0xFC,
    0x0C, 0xB0, 0x05, 0xEE, 0x66, 0xB8, 0x20, 0x09, 0x00, 0x80, 0xBA, 0xF8, 0x0C, 0x66, 0xEF, 0xBA, 0xFC,
    0x0C, 0xED, 0x24, 0xF0, 0x89, 0xC3, 0x66, 0xC7, 0x06, 0x00, 0x06, 0x00, 0x10, 0x00, 0x00, 0x66, 0xC7,
    0x06, 0x04, 0x06, 0x00, 0x02, 0x00, 0x80, 0x8D, 0x57, 0x04, 0x66, 0xB8, 0x00, 0x06, 0x00, 0x00, 0x66,
    0xEF, 0xBA, 0xF6, 0x01, 0xB0, 0xE0, 0xEE, 0xBA, 0xF2, 0x01, 0xB0, 0x01, 0xEE, 0x30, 0xC0, 0x42, 0xEE,
    0x80, 0xFA, 0xF5, 0x72, 0xF9, 0xBA, 0xF7, 0x01, 0xB0, 0xC8, 0xEE, 0x89, 0xDA, 0xB0, 0x09, 0xEE, 0xBA,
    0xF7, 0x01, 0xEC, 0xA8, 0x88, 0x75, 0xFB, 0x90, 0xB0, 0x05, 0xE6, 0xF4, 0xEB, 0xFE,
];

/// An image that begins with `PARAVANE`, for [`BUS_MASTER`].
#[allow(dead_code, reason = "not every test has disks")]
pub fn marked_disk(dir: &Scratch) -> String {
    let path = dir.image("disk", 1 << 20);
    let file = fs::File::options().write(true).open(&path).expect("image");
    std::os::unix::fs::FileExt::write_all_at(&file, b"PARAVANE", 0).expect("image");
    format!("{},snapshot=on", path.display())
}

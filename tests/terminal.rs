//! The terminal and the ways out: raw mode and its restoration, our keys, signals, readers that leave.

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A boot sector with this code, in a file of its own.
struct Sector(PathBuf);

impl Sector {
    fn new(name: &str, code: &[u8]) -> Sector {
        let mut sector = code.to_vec();
        sector.resize(510, 0);
        sector.extend([0x55, 0xAA]);
        let path = std::env::temp_dir().join(format!("paravane-terminal-{}-{name}", std::process::id()));
        std::fs::write(&path, sector).expect("boot sector");
        Sector(path)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_paravane"));
        command.args(["run", "--memory", "16M", "--kernel"]).arg(&self.0);
        command
    }
}

impl Drop for Sector {
    fn drop(&mut self) {
        let _gone = std::fs::remove_file(&self.0);
    }
}

/// cli; hlt; jmp $-1: nothing happens, for ever.
const IDLE: [u8; 4] = [0xFA, 0xF4, 0xEB, 0xFD];
/// mov dx, 0x3f8; mov al, 'x'; out dx, al; jmp $-1: talks for ever.
const CHATTER: [u8; 8] = [0xBA, 0xF8, 0x03, 0xB0, b'x', 0xEE, 0xEB, 0xFD];

/// Our end of a terminal, and the end that paravane gets.
fn terminal() -> (File, File) {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("pseudo-terminal");
    unlockpt(&ours).expect("pseudo-terminal");
    let name = ptsname(&ours, Vec::new()).expect("its name");
    let theirs = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).expect("its other end");
    (File::from(ours), File::from(theirs))
}

fn is_raw(terminal: &File) -> bool {
    !tcgetattr(terminal).expect("terminal modes").local_modes.contains(LocalModes::ICANON)
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < until, "{what}: not within a minute");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The exit code, or 128 + the signal.
fn end_of(child: &mut Child) -> i32 {
    let mut code = None;
    wait_until("the end of paravane", || {
        code = child.try_wait().expect("status").map(|s| s.code().unwrap_or(-1));
        code.is_some()
    });
    code.expect("waited for")
}

fn on_terminal(sector: &Sector, theirs: &File) -> Child {
    let end = || Stdio::from(theirs.try_clone().expect("descriptor"));
    let child = sector.command().stdin(end()).stdout(end()).stderr(end()).spawn().expect("paravane starts");
    wait_until("raw mode", || is_raw(theirs));
    child
}

#[test]
fn ctrl_a_x_quits_and_the_terminal_is_as_it_was() {
    let sector = Sector::new("keys", &IDLE);
    let (mut ours, theirs) = terminal();
    assert!(!is_raw(&theirs));
    let mut child = on_terminal(&sector, &theirs);
    ours.write_all(b"\x01h").expect("typed");
    let mut said = Vec::new();
    let mut buf = [0; 256];
    while !String::from_utf8_lossy(&said).contains("send Ctrl-A to the guest") {
        let n = ours.read(&mut buf).expect("help");
        said.extend(&buf[..n]);
    }
    ours.write_all(b"\x01x").expect("typed");
    assert_eq!(end_of(&mut child), 0);
    assert!(!is_raw(&theirs), "the terminal is still raw");
}

#[test]
fn signals_end_the_run_and_restore_the_terminal() {
    let sector = Sector::new("signals", &IDLE);
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 129)] {
        let (_ours, theirs) = terminal();
        let mut child = on_terminal(&sector, &theirs);
        kill_process(Pid::from_child(&child), signal).expect("signal");
        assert_eq!(end_of(&mut child), code);
        assert!(!is_raw(&theirs), "the terminal is still raw after {signal:?}");
    }
}

#[test]
fn a_busy_guest_hears_signals_too() {
    // jmp $
    let sector = Sector::new("busy", &[0xEB, 0xFE]);
    for engine in ["jit", "interp"] {
        let mut child = sector
            .command()
            .args(["--engine", engine])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("paravane starts");
        std::thread::sleep(Duration::from_millis(200));
        kill_process(Pid::from_child(&child), Signal::TERM).expect("signal");
        assert_eq!(end_of(&mut child), 143, "{engine}");
    }
}

#[test]
fn a_reader_that_leaves_ends_the_run() {
    let sector = Sector::new("chatter", &CHATTER);
    let mut child = sector
        .command()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("paravane starts");
    let mut stdout = child.stdout.take().expect("pipe");
    let mut buf = [0; 16];
    stdout.read_exact(&mut buf).expect("output");
    assert_eq!(buf, [b'x'; 16]);
    drop(stdout);
    assert_eq!(end_of(&mut child), 1);
    let mut told = String::new();
    child.stderr.take().expect("pipe").read_to_string(&mut told).expect("message");
    assert!(told.contains("standard output"), "{told}");
}

#[test]
fn a_reader_that_does_not_read_does_not_keep_us() {
    let sector = Sector::new("blocked", &CHATTER);
    let mut child =
        sector.command().stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("paravane starts");
    std::thread::sleep(Duration::from_millis(500));
    kill_process(Pid::from_child(&child), Signal::TERM).expect("signal");
    assert_eq!(end_of(&mut child), 143);
}

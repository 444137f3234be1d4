//! Runs that repeat: state hashes, recordings and their replay.

mod common;

use common::{Running, Scratch, debugger, guest, run};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

/// Seconds for a boot on a busy host.
const BOOT: u64 = 300;
/// Seconds for anything short.
const SOON: u64 = 120;

/// A boot sector that sends back what it receives at COM1, sums it up at 500H, and ends with exit code 11 after a 'q'. It counts its
/// rounds at 504H.
///
/// ```text
/// 7C00 xor ax, ax          7C11 in al, dx          7C1D add [500h], ax
/// 7C02 mov ds, ax          7C12 test al, 1         7C21 cmp al, 'q'
/// 7C04 inc dword [504h]    7C14 jz 7C04            7C23 jnz 7C04
/// 7C09 mov cx, 4000h       7C16 mov dx, 3F8h       7C25 mov al, 5
/// 7C0C loop 7C0C           7C19 in al, dx          7C27 out F4h, al
/// 7C0E mov dx, 3FDh        7C1A out dx, al         7C29 jmp $
///                          7C1B mov ah, 0
/// ```
const ECHO: [u8; 43] = [
    0x31, 0xC0, 0x8E, 0xD8, 0x66, 0xFF, 0x06, 0x04, 0x05, 0xB9, 0x00, 0x40, 0xE2, 0xFE, 0xBA, 0xFD, 0x03,
    0xEC, 0xA8, 0x01, 0x74, 0xEE, 0xBA, 0xF8, 0x03, 0xEC, 0xEE, 0xB4, 0x00, 0x01, 0x06, 0x00, 0x05, 0x3C,
    0x71, 0x75, 0xDF, 0xB0, 0x05, 0xE6, 0xF4, 0xEB, 0xFE,
];

fn echo(dir: &Scratch) -> PathBuf {
    let mut sector = ECHO.to_vec();
    sector.resize(510, 0);
    sector.extend([0x55, 0xAA]);
    let path = dir.path("echo");
    fs::write(&path, sector).expect("sector");
    path
}

/// `paravane run` with the echo guest.
fn command(kernel: &Path, engine: &str, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_paravane"));
    command.arg("run").arg("--kernel").arg(kernel).args(["--engine", engine, "--memory", "16M"]);
    command.args(["--debug-exit", "0xf4", "--clock", "instructions"]).args(more);
    command
}

fn output(mut command: Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command.stdin(Stdio::null()).output().expect("paravane runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (status.code(), text(&stdout), text(&stderr))
}

/// Records a run of the echo guest that hears `lines`, some time apart.
fn record(dir: &Scratch, kernel: &Path, engine: &str, lines: &[&str]) -> (PathBuf, String) {
    let (file, stats) = (dir.path("recording"), dir.path("recorded.json"));
    let (f, s) = (file.display().to_string(), stats.display().to_string());
    let mut running = Running::start(command(kernel, engine, &["--record", &f, "--stats", &s]));
    let mut heard = String::new();
    for line in lines {
        std::thread::sleep(Duration::from_millis(300));
        running.type_in(line);
        heard.push_str(line);
        running.expect(&heard, SOON);
    }
    let (code, said) = running.finish(SOON);
    assert_eq!((code, said.as_str()), (Some(11), heard.as_str()));
    (file, state(&stats))
}

/// The state's hash in a file of statistics.
fn state(stats: &Path) -> String {
    let text = fs::read_to_string(stats).expect("statistics");
    let stats: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let state = &stats["state"];
    assert!(state["hash_low"].is_u64() && state["hash_high"].is_u64(), "{stats}");
    format!("{state} after {}", stats["cpu0"]["instructions"])
}

#[test]
fn the_debian_boot_ends_in_the_same_state_twice() {
    let dir = Scratch::new("hash");
    let [first, second] = ["first", "second"].map(|name| {
        let path = dir.path(name);
        let stats = path.display().to_string();
        let more = ["--clock", "instructions", "--hash-at", "100000000", "--stats", &stats];
        let (code, said) = run(&guest("cloud"), "console=ttyS0 pv.run=poweroff", &more).finish(BOOT);
        assert_eq!(code, Some(0), "{said}");
        let at = said.find("state after 1000").expect("a hash on the way");
        let line = said[at..].lines().next().expect("a line").to_owned();
        assert_eq!(line.rsplit(' ').next().map(str::len), Some(32), "{line}");
        (line, state(&path), said)
    });
    assert_eq!(first, second);
    // It says something: another command line is another state.
    let path = dir.path("third");
    let stats = path.display().to_string();
    let more = ["--clock", "instructions", "--stats", &stats];
    run(&guest("cloud"), "console=ttyS0 pv.run=poweroff other", &more).finish(BOOT);
    assert_ne!(state(&path), first.1);
}

#[test]
fn a_replay_is_the_recorded_run_again() {
    for engine in ["jit", "interp"] {
        let dir = Scratch::new(&format!("replay-{engine}"));
        let kernel = echo(&dir);
        let (file, recorded) = record(&dir, &kernel, engine, &["one\n", "two\n", "three q"]);
        let stats = dir.path("replayed.json");
        let (f, s) = (file.display().to_string(), stats.display().to_string());
        let replayed = output(command(&kernel, engine, &["--replay", &f, "--stats", &s]));
        assert_eq!(replayed, (Some(11), "one\ntwo\nthree q".to_owned(), String::new()), "{engine}");
        assert_eq!(state(&stats), recorded, "{engine}");
        // The other engine runs it just so.
        let other = if engine == "jit" { "interp" } else { "jit" };
        let replayed = output(command(&kernel, other, &["--replay", &f, "--stats", &s]));
        assert_eq!(replayed.0, Some(11), "{engine}: {}", replayed.2);
        assert_eq!(state(&stats), recorded, "{engine}");
    }
}

#[test]
fn a_boot_with_a_conversation_is_replayed() {
    for cpus in ["1", "2"] {
        replay_a_conversation(cpus);
    }
}

fn replay_a_conversation(cpus: &str) {
    let dir = Scratch::new(&format!("replay-boot-{cpus}"));
    let image = dir.image("disk", 16 << 20).display().to_string();
    let disk = format!("{image},bus=virtio,snapshot=on");
    let [file, first, second] = ["recording", "first", "second"].map(|n| dir.path(n).display().to_string());
    let guest = guest("cloud");
    let machine = ["--clock", "instructions", "--cpus", cpus, "--disk", &disk];
    let more = [&machine[..], &["--record", &file, "--stats", &first]].concat();
    let mut running = run(&guest, "console=ttyS0", &more);
    running.expect("/ #", BOOT);
    running.type_in("dd if=/dev/urandom of=/dev/vda bs=4096 count=100; sync; cksum /dev/vda\n");
    running.expect_times("/ #", 2, SOON);
    running.type_in("poweroff -f\n");
    let (code, said) = running.finish(SOON);
    assert_eq!(code, Some(0), "{said}");
    let more = [&machine[..], &["--replay", &file, "--stats", &second]].concat();
    let (code, again) = run(&guest, "console=ttyS0", &more).finish(BOOT);
    assert_eq!((code, again), (Some(0), said));
    assert_eq!(state(Path::new(&first)), state(Path::new(&second)));
}

/// Resets the machine once, which leaves memory alone; then sends back one byte and ends with exit code 11.
///
/// ```text
/// 7C00 xor ax, ax; mov ds, ax; cmp byte [600h], 1; je 7C16h      7C16 mov dx, 3FDh
/// 7C0B mov byte [600h], 1                                        7C19 in al, dx; test al, 1; jz 7C19h
/// 7C10 mov al, FEh; out 64h, al; jmp $                           7C1E mov dx, 3F8h; in al, dx; out dx, al
///                                                                7C23 mov al, 5; out F4h, al; jmp $
/// ```
const RESETS: [u8; 41] = [
    0x31, 0xC0, 0x8E, 0xD8, 0x80, 0x3E, 0x00, 0x06, 0x01, 0x74, 0x0B, 0xC6, 0x06, 0x00, 0x06, 0x01, 0xB0,
    0xFE, 0xE6, 0x64, 0xEB, 0xFE, 0xBA, 0xFD, 0x03, 0xEC, 0xA8, 0x01, 0x74, 0xFB, 0xBA, 0xF8, 0x03, 0xEC,
    0xEE, 0xB0, 0x05, 0xE6, 0xF4, 0xEB, 0xFE,
];

#[test]
fn what_comes_in_after_a_reset_comes_in_again() {
    let dir = Scratch::new("replay-reset");
    let kernel = PathBuf::from(debugger::sector(&dir, &RESETS));
    let (file, _) = record(&dir, &kernel, "jit", &["x"]);
    let f = file.display().to_string();
    let replayed = output(command(&kernel, "jit", &["--replay", &f]));
    assert_eq!(replayed, (Some(11), "x".to_owned(), String::new()));
    // With a debugger, who keeps a history that begins at the reset.
    let more =
        ["--clock", "instructions", "--memory", "16M", "--debug-exit", "0xf4", "--wait", "--replay", &f];
    let k = kernel.display().to_string();
    let (running, socket) = debugger::start(&dir, &[&["--kernel", &k], &more[..]].concat());
    let at = "printf \"at %#lx\\n\", $pc";
    let said = debugger::gdb(&socket, &["continue", at, "reverse-continue", at, "continue", at, "continue"]);
    debugger::has(&said, &["at 0x7c27", "at 0x7c00", "at 0x7c27", "exited with code 013"]);
    assert_eq!(running.finish(SOON), (Some(11), "x".to_owned()));
}

#[test]
fn a_replay_that_differs_says_where() {
    let dir = Scratch::new("differs");
    let kernel = echo(&dir);
    let (file, _) = record(&dir, &kernel, "jit", &["one\n", "two\n", "three q"]);
    let f = file.display().to_string();
    let recorded = fs::read_to_string(&file).expect("recording");
    assert!(recorded.matches("\"check\"").count() > 1, "it ran for a while:\n{recorded}");
    let replay = |text: &str, kernel: &Path, more: &[&str]| {
        fs::write(&file, text).expect("recording");
        output(command(kernel, "jit", &[&["--replay", &f], more].concat()))
    };
    // Another letter: the guest's sum is another one at the next checkpoint.
    let (code, _, told) = replay(&recorded.replacen("6f6e650a", "6f6e640a", 1), &kernel, &[]);
    assert_eq!(code, Some(1), "{told}");
    // The sum is in the first page.
    let parts = [
        "the replay differs from the recorded run",
        "expected",
        "found",
        "rip 0x7c",
        "memory (RAM page 0x0)",
    ];
    for part in parts {
        assert!(told.contains(part), "no '{part}' in: {told}");
    }
    assert!(!told.contains("rtc"), "what agrees is not named: {told}");
    // A field of the processor's, which the recording holds as it was.
    let (changed, was, is) = with_another_rax(&recorded);
    let (code, _, told) = replay(&changed, &kernel, &[]);
    let expected = format!("what differs: cpu0 (rax was {was:#x}, is {is:#x})");
    assert!(code == Some(1) && told.contains(&expected), "no '{expected}' in: {told}");
    // Another machine, other files.
    let (code, _, told) = replay(&recorded, &kernel, &["--cpu", "i486"]);
    assert!(code == Some(1) && told.contains("this is another machine: processor was max"), "{told}");
    let changed = dir.path("changed");
    let mut bytes = fs::read(&kernel).expect("kernel");
    bytes[300] ^= 1;
    fs::write(&changed, bytes).expect("kernel");
    let (code, _, told) = replay(&recorded, &changed, &[]);
    assert!(code == Some(1) && told.contains("kernel was 512 bytes, "), "{told}");
    // A recording that was cut off is replayed to where it goes.
    let half = &recorded[..recorded.rfind("{\"end\"").expect("an end")];
    let (code, said, told) = replay(half, &kernel, &[]);
    // How much of the last line is known depends on when the last checkpoint was.
    assert!(code == Some(0) && said.starts_with("one\ntwo\n"), "{said}: {told}");
    assert!(told.contains("the recording ends after") && told.contains("cut off"), "{told}");
}

/// The recording with another RAX in its first check; the value it has there now, and before.
fn with_another_rax(recorded: &str) -> (String, u64, u64) {
    let line = recorded.lines().find(|l| l.starts_with("{\"check\"")).expect("a check");
    let mut check: serde_json::Value = serde_json::from_str(line).expect("JSON");
    check["check"]["parts"]["cpu0"] = "0".into();
    // The first eight bytes are RAX, little-endian.
    let bytes = check["check"]["bytes"]["cpu0"].as_str().expect("bytes").to_owned();
    let rax = u64::from_str_radix(&bytes[..16], 16).expect("a number").swap_bytes();
    let other = rax ^ 0x1234;
    check["check"]["bytes"]["cpu0"] = format!("{:016x}{}", other.swap_bytes(), &bytes[16..]).into();
    (recorded.replacen(line, &check.to_string(), 1), other, rax)
}

#[test]
fn what_cannot_be_recorded_or_replayed_is_refused() {
    let dir = Scratch::new("refused");
    let kernel = echo(&dir);
    let image = dir.image("disk.img", 1 << 20).display().to_string();
    let there = dir.path("there").display().to_string();
    fs::write(&there, "something else\n").expect("file");
    let nowhere = dir.path("no/where").display().to_string();
    let refused = |more: &[&str], part: &str| {
        let (code, _, told) = output(command(&kernel, "jit", more));
        assert!(code == Some(1) && told.contains(part), "{more:?}: {told}");
    };
    refused(&["--record", &nowhere], "No such file");
    refused(&["--record", "/dev/full"], "No space left");
    refused(&["--replay", &nowhere], "No such file");
    refused(&["--replay", &there], "is no recording");
    refused(&["--record", &there, "--disk", &image], "snapshot=on");
    refused(&["--record", &there, "--clock", "host"], "cannot be used multiple times");
    let mut host = Command::new(env!("CARGO_BIN_EXE_paravane"));
    host.arg("run").arg("--kernel").arg(&kernel).args(["--record", &there]);
    let (code, _, told) = output(host);
    assert!(code == Some(1) && told.contains("--clock instructions"), "{told}");
}

#[test]
fn a_recording_that_cannot_be_written_ends_and_the_guest_does_not() {
    let dir = Scratch::new("full");
    let kernel = echo(&dir);
    let pipe = dir.path("recording");
    assert!(Command::new("mkfifo").arg(&pipe).status().expect("mkfifo").success());
    let mut command = command(&kernel, "jit", &["--record", &pipe.display().to_string()]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("paravane starts");
    // Takes the first line, and no more.
    let mut reader = BufReader::new(fs::File::open(&pipe).expect("pipe"));
    reader.read_line(&mut String::new()).expect("header");
    drop(reader);
    let mut stdin = child.stdin.take().expect("pipe");
    std::thread::sleep(Duration::from_secs(1));
    stdin.write_all(b"still there q").expect("typed");
    let ended = child.wait_with_output().expect("end");
    let (said, told) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
    assert_eq!((ended.status.code(), &*said), (Some(11), "still there q"), "{told}");
    assert_eq!(told.matches("the recording ends after").count(), 1, "{told}");
}

/// A boot sector that asks an IDE disk to verify 65536 sectors, sleeps, and ends with exit code 11 by its interrupt if all is well.
/// No timer is armed meanwhile.
///
/// ```text
/// 7C00 cli; vector 76h leads to 7C5Ch; 8259A: vectors from 8 and 70h, IRQ 2 and 14 alone
/// 7C32 mov dx, 1F2h: count 0 (65536); LBA 0; device 0, LBA
/// 7C49 mov al, 42h; out dx, al                        (READ VERIFY SECTORS EXT)
/// 7C4C mov al, 30h; out 43h, al                       (8254: counter 0 waits for a count)
/// 7C50 mov al, 0Bh; out 70h, al; mov al, 82h; out 71h, al   (clock: SET, no updates)
/// 7C58 sti
/// 7C59 hlt; jmp 7C59                7C5C mov dx, 1F7h; in al, dx; test al, 81h; jnz 7C68
///                                   7C64 mov al, 5; out F4h, al
/// ```
const VERIFY: [u8; 106] = [
    0xFA, 0x31, 0xC0, 0x8E, 0xD8, 0xC7, 0x06, 0xD8, 0x01, 0x5C, 0x7C, 0xA3, 0xDA, 0x01, 0xB0, 0x11, 0xE6,
    0x20, 0xE6, 0xA0, 0xB0, 0x08, 0xE6, 0x21, 0xB0, 0x70, 0xE6, 0xA1, 0xB0, 0x04, 0xE6, 0x21, 0xB0, 0x02,
    0xE6, 0xA1, 0xB0, 0x01, 0xE6, 0x21, 0xE6, 0xA1, 0xB0, 0xFB, 0xE6, 0x21, 0xB0, 0xBF, 0xE6, 0xA1, 0xBA,
    0xF2, 0x01, 0xB0, 0x00, 0xEE, 0x30, 0xC0, 0xEE, 0x42, 0xEE, 0xEE, 0x42, 0x81, 0xFA, 0xF6, 0x01, 0x72,
    0xF7, 0xB0, 0x40, 0xEE, 0x42, 0xB0, 0x42, 0xEE, 0xB0, 0x30, 0xE6, 0x43, 0xB0, 0x0B, 0xE6, 0x70, 0xB0,
    0x82, 0xE6, 0x71, 0xFB, 0xF4, 0xEB, 0xFD, 0xBA, 0xF7, 0x01, 0xEC, 0xA8, 0x81, 0x75, 0x04, 0xB0, 0x05,
    0xE6, 0xF4, 0xEB, 0xFE,
];

#[test]
fn a_disk_goes_on_by_itself_while_everybody_sleeps() {
    for engine in ["jit", "interp"] {
        let dir = Scratch::new(&format!("verify-{engine}"));
        let kernel = PathBuf::from(debugger::sector(&dir, &VERIFY));
        let disk = format!("{},snapshot=on", dir.image("disk", 32 << 20).display());
        let run = |name: &str| {
            let stats = dir.path(name);
            let more = ["--disk", &disk, "--serial", "none", "--stats", &stats.display().to_string()];
            let (code, _) = Running::start(command(&kernel, engine, &more)).finish(SOON);
            assert_eq!(code, Some(11), "{engine}");
            state(&stats)
        };
        assert_eq!(run("first"), run("second"), "{engine}");
    }
}

//! Going back: reverse-stepi, reverse-continue and reverse watchpoints with the stock gdb, in both engines.

mod common;
#[path = "smp/guest.rs"]
mod smp_guest;

use common::debugger::{BUS_MASTER, SOON, gdb, has, marked_disk, sector, start};
use common::{Running, Scratch, guest};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

const ENGINES: [&str; 2] = ["jit", "interp"];

fn small(dir: &Scratch, kernel: &str, engine: &str, more: &[&str]) -> (Running, PathBuf) {
    let mut arguments =
        vec!["--kernel", kernel, "--engine", engine, "--memory", "64M", "--debug-exit", "0xf4"];
    arguments.extend(["--clock", "instructions"]);
    arguments.extend(more);
    start(dir, &arguments)
}

/// A program that counts to 1000, stores, loads and ends with exit code 11.
///
/// ```text
/// 7C00 xor ax, ax      7C09 mov [500h], ax      7C11 mov al, 5
/// 7C02 mov cx, 1000    7C0C mov bx, [500h]      7C13 out F4h, al
/// 7C05 inc ax          7C10 nop                 7C15 jmp $
/// 7C06 dec cx
/// 7C07 jnz 7C05
/// ```
const COUNTER: [u8; 23] = [
    0x31, 0xC0, 0xB9, 0xE8, 0x03, 0x40, 0x49, 0x75, 0xFC, 0xA3, 0x00, 0x05, 0x8B, 0x1E, 0x00, 0x05, 0x90,
    0xB0, 0x05, 0xE6, 0xF4, 0xEB, 0xFE,
];

#[test]
fn back_by_instructions_to_breakpoints_and_to_writes() {
    for engine in ENGINES {
        let dir = Scratch::new(&format!("reverse-{engine}"));
        let kernel = sector(&dir, &COUNTER);
        let (running, socket) = small(&dir, &kernel, engine, &["--wait", "--serial", "none"]);
        let said = gdb(
            &socket,
            &[
                "hbreak *0x7c10",
                "continue",
                "watch *(unsigned short *)0x500",
                "reverse-continue",
                "printf \"writer %#lx\\n\", $pc",
                "reverse-stepi",
                "printf \"before %#lx, ax %d, cx %d\\n\", $pc, $rax & 0xffff, $rcx & 0xffff",
                "reverse-stepi",
                "reverse-stepi",
                "printf \"before %#lx, ax %d, cx %d\\n\", $pc, $rax & 0xffff, $rcx & 0xffff",
                "delete",
                // cx counts down from 1000.
                "hbreak *0x7c06",
                "reverse-continue",
                "reverse-continue",
                "printf \"loop %#lx, ax %d, cx %d\\n\", $pc, $rax & 0xffff, $rcx & 0xffff",
                "delete",
                "reverse-continue",
                "printf \"start %#lx\\n\", $pc",
                "reverse-stepi",
                "printf \"start %#lx\\n\", $pc",
                // And forward again, to the same end.
                "hbreak *0x7c11",
                "continue",
                "printf \"end %#lx, ax %d, bx %d\\n\", $pc, $rax & 0xffff, $rbx & 0xffff",
                "continue",
            ],
        );
        has(
            &said,
            &[
                "Old value = 1000",
                "New value = 0",
                "writer 0x7c09",
                "before 0x7c07, ax 1000, cx 0",
                "before 0x7c05, ax 999, cx 1",
                "loop 0x7c06, ax 998, cx 3",
                "No more reverse-execution history",
                "start 0x7c00",
                "No more reverse-execution history",
                "start 0x7c00",
                "end 0x7c11, ax 1000, bx 1000",
                "exited with code 013",
            ],
        );
        assert_eq!(running.finish(SOON).0, Some(11), "{engine}");
    }
}

/// A boot sector with a timer interrupt every millisecond, which is a million instructions: the handler at 7C41H counts ticks at
/// 600H, the loop counts its rounds at 604H, and the 20th tick ends it with exit code 11.
///
/// ```text
/// 7C00 cli; vector 8 leads to 7C41h; 8259A: vectors from 8, IRQ 0 alone; 8254: counter 0, mode 2, 1193
/// 7C2E sti
/// 7C2F inc dword [604h]          7C41 push ax
/// 7C34 cmp word [600h], 20       7C42 inc word [600h]
/// 7C39 jb 7C2F                   7C46 mov al, 20h; out 20h, al
/// 7C3B mov al, 5; out F4h, al    7C4A pop ax; iret
/// ```
const TICKS: [u8; 76] = [
    0xFA, 0x31, 0xC0, 0x8E, 0xD8, 0xC7, 0x06, 0x20, 0x00, 0x41, 0x7C, 0xA3, 0x22, 0x00, 0xB0, 0x11, 0xE6,
    0x20, 0xB0, 0x08, 0xE6, 0x21, 0xB0, 0x04, 0xE6, 0x21, 0xB0, 0x01, 0xE6, 0x21, 0xB0, 0xFE, 0xE6, 0x21,
    0xB0, 0x34, 0xE6, 0x43, 0xB0, 0xA9, 0xE6, 0x40, 0xB0, 0x04, 0xE6, 0x40, 0xFB, 0x66, 0xFF, 0x06, 0x04,
    0x06, 0x83, 0x3E, 0x00, 0x06, 0x14, 0x72, 0xF4, 0xB0, 0x05, 0xE6, 0xF4, 0xEB, 0xFE, 0x50, 0xFF, 0x06,
    0x00, 0x06, 0xB0, 0x20, 0xE6, 0x20, 0x58, 0xCF,
];

/// Prints the ticks and rounds so far.
const SHOW: &str = "printf \"at %#lx: %d ticks, %u rounds\\n\", $pc, *(short *)0x600, *(unsigned *)0x604";

/// What [`SHOW`] said, each time.
fn shown(said: &str) -> Vec<&str> {
    said.lines().filter(|l| l.starts_with("at 0x")).collect()
}

/// The last who wrote is a device; while it works there is a way back too.
#[test]
fn back_to_what_a_device_wrote() {
    for engine in ENGINES {
        let dir = Scratch::new(&format!("reverse-dma-{engine}"));
        let (kernel, disk) = (sector(&dir, &BUS_MASTER), marked_disk(&dir));
        let (running, socket) =
            small(&dir, &kernel, engine, &["--wait", "--serial", "none", "--disk", &disk]);
        let said = gdb(
            &socket,
            &[
                "hbreak *0x7c6d",
                "continue",
                "watch *(unsigned int *)0x1000",
                "reverse-continue",
                "printf \"value %#x\\n\", *(unsigned int *)0x1000",
                "delete",
                // The drive is busy here.
                "reverse-continue",
                "printf \"start %#lx\\n\", $pc",
                "watch *(unsigned int *)0x1000",
                "continue",
                "delete",
                "continue",
            ],
        );
        let value = u32::from_le_bytes(*b"PARA");
        has(
            &said,
            &[
                "write to linear 0x1000 by disk0 (DMA)",
                &format!("Old value = {value}"),
                "New value = 0",
                "value 0\n",
                "No more reverse-execution history",
                "start 0x7c00",
                "write to linear 0x1000 by disk0 (DMA)",
                &format!("New value = {value}"),
                "exited with code 013",
            ],
        );
        assert_eq!(running.finish(SOON).0, Some(11), "{engine}");
    }
}

#[test]
fn devices_go_back_too() {
    for engine in ENGINES {
        let dir = Scratch::new(&format!("reverse-ticks-{engine}"));
        let kernel = sector(&dir, &TICKS);
        let (running, socket) = small(&dir, &kernel, engine, &["--wait", "--serial", "none"]);
        let mut commands = vec!["hbreak *0x7c41"];
        commands.extend(["continue"; 19]);
        commands.push(SHOW); // 18 ticks, beyond a checkpoint
        for _ in 0..3 {
            commands.extend(["reverse-continue", SHOW]);
        }
        // The instruction before the handler is one of the loop's.
        commands.extend(["reverse-stepi", SHOW, "stepi", SHOW]);
        // Back before the first tick, and forward again: the same.
        commands.extend(["hbreak *0x7c2e", "reverse-continue", "delete 1", "reverse-continue", SHOW]);
        commands.extend(["delete", "hbreak *0x7c41"]);
        commands.extend(["continue"; 19]);
        commands.push(SHOW);
        commands.extend(["delete", "continue"]);
        let said = gdb(&socket, &commands);
        let shown = shown(&said);
        assert_eq!(shown.len(), 8, "{engine}: {said}");
        for (n, ticks) in [(0, 18), (1, 17), (2, 16), (3, 15)] {
            assert!(shown[n].starts_with(&format!("at 0x7c41: {ticks} ticks")), "{engine}: {said}");
        }
        assert!(
            ["0x7c2f", "0x7c34", "0x7c39"].iter().any(|at| shown[4].starts_with(&format!("at {at}: 15")))
        );
        assert_eq!(shown[5], shown[3], "{engine}: into the handler again");
        assert_eq!(shown[6], "at 0x7c2e: 0 ticks, 0 rounds", "{engine}: {said}");
        assert_eq!(shown[7], shown[0], "{engine}: the same rounds at the same tick");
        has(&said, &["exited with code 013"]);
        assert_eq!(running.finish(SOON).0, Some(11), "{engine}");
    }
}

/// Sends back what it receives at COM1, with the sum of it at 500H, until a 'q'; tests/replay.rs has the listing.
const ECHO: [u8; 43] = [
    0x31, 0xC0, 0x8E, 0xD8, 0x66, 0xFF, 0x06, 0x04, 0x05, 0xB9, 0x00, 0x40, 0xE2, 0xFE, 0xBA, 0xFD, 0x03,
    0xEC, 0xA8, 0x01, 0x74, 0xEE, 0xBA, 0xF8, 0x03, 0xEC, 0xEE, 0xB4, 0x00, 0x01, 0x06, 0x00, 0x05, 0x3C,
    0x71, 0x75, 0xDF, 0xB0, 0x05, 0xE6, 0xF4, 0xEB, 0xFE,
];

#[test]
fn a_replay_is_kept_at_its_end_and_tells_who_wrote() {
    for engine in ENGINES {
        let dir = Scratch::new(&format!("reverse-replay-{engine}"));
        let kernel = sector(&dir, &ECHO);
        let recording = dir.path("recording").display().to_string();
        let mut command = Command::new(env!("CARGO_BIN_EXE_paravane"));
        command.args(["run", "--kernel", &kernel, "--engine", engine, "--memory", "64M"]);
        command.args(["--debug-exit", "0xf4", "--clock", "instructions", "--record", &recording]);
        let mut running = Running::start(command);
        for (text, heard) in [("ab", "ab"), ("c", "abc"), ("q", "abcq")] {
            std::thread::sleep(Duration::from_millis(500));
            running.type_in(text);
            running.expect(heard, SOON);
        }
        assert_eq!(running.finish(SOON).0, Some(11));
        let (running, socket) = small(&dir, &kernel, engine, &["--wait", "--replay", &recording]);
        let letter = "printf \"letter %c at %#lx, sum %d\\n\", $rax & 0xff, $pc, *(unsigned short *)0x500";
        let mut commands =
            vec!["continue", "printf \"kept at %#lx\\n\", $pc", "watch *(unsigned short *)0x500"];
        for _ in 0..4 {
            commands.extend(["reverse-continue", letter]);
        }
        // Nothing can be changed.
        commands.extend(["set variable *(char *)0x700 = 1", "set variable $rbx = 1", "delete", "continue"]);
        commands.extend(["printf \"kept at %#lx\\n\", $pc", "continue"]);
        let said = gdb(&socket, &commands);
        let sum = |text: &str| text.bytes().map(u32::from).sum::<u32>();
        let lines = ["q abc", "c ab", "b a", "a "].map(|l| {
            let (letter, before) = l.split_once(' ').expect("two parts");
            format!("letter {letter} at 0x7c1d, sum {}", sum(before))
        });
        let mut parts = vec!["No more reverse-execution history", "kept at 0x7c29"];
        parts.extend(lines.iter().map(String::as_str));
        parts.extend([
            "Cannot access memory at address 0x700",
            "Could not write register",
            "kept at 0x7c29",
            "exited",
        ]);
        has(&said, &parts);
        // What was said before is not said again.
        assert_eq!(running.finish(SOON), (Some(11), "abcq".to_owned()), "{engine}");
    }
}

/// The guest for several processors as a file.
fn several(dir: &Scratch) -> String {
    let path = dir.path("several");
    std::fs::write(&path, smp_guest::image()).expect("kernel");
    path.display().to_string()
}

#[test]
fn several_processors_go_back_together() {
    let places = smp_guest::places();
    let everything = "thread apply all -q printf \"state %lx %lx %lx %lx\\n\", $rip, $rsp, $rcx, $rax";
    let online = format!("watch *(int *){:#x}", places.online);
    let writer = format!("printf \"writer %d, up %d\\n\", $_thread, *(int *){:#x}", places.online);
    for engine in ENGINES {
        let dir = Scratch::new(&format!("reverse-smp-{engine}"));
        let kernel = several(&dir);
        let more = ["--cpus", "3", "--wait", "--serial", "none"];
        let (running, socket) = small(&dir, &kernel, engine, &more);
        let handler = format!("hbreak *{:#x}", places.handler);
        let mut commands = vec![handler.as_str(), "continue", everything];
        commands.extend(["continue"; 5]);
        commands.extend([everything, "thread 1", "stepi 7", "reverse-stepi 7", "thread 3", everything]);
        // The sixth is behind again.
        commands.extend(["reverse-continue"; 6]);
        commands.extend([everything, "delete", &online]);
        for _ in 0..3 {
            commands.extend(["reverse-continue", &writer, "x/i $pc"]);
        }
        commands.extend([
            "reverse-continue",
            "delete",
            &handler,
            "continue",
            everything,
            "delete",
            "continue",
        ]);
        let said = gdb(&socket, &commands);
        let shown: Vec<&str> = said.lines().filter(|l| l.starts_with("state ")).collect();
        let [first, sixth, stepped, back, again] = [0, 1, 2, 3, 4].map(|n| shown.get(3 * n..3 * n + 3));
        assert!(first.is_some() && first != sixth && (back, again) == (first, first), "{engine}: {said}");
        // Threads are told from the last to the first.
        assert_eq!(stepped.map(|s| s[2]), sixth.map(|s| s[2]), "{engine}: {said}");
        has(
            &said,
            &["writer ", "up 2", "lock incl", "writer ", "up 1", "lock incl", "writer 1, up 0", "lock incl"],
        );
        let mut writers: Vec<&str> = said.lines().filter(|l| l.starts_with("writer ")).collect();
        writers.sort_unstable();
        let thread = |line: &str| line.as_bytes().get(7).copied();
        assert_eq!(writers.iter().filter_map(|l| thread(l)).collect::<Vec<_>>(), *b"123", "{engine}: {said}");
        has(&said, &["No more reverse-execution history", "exited with code 013"]);
        assert_eq!(running.finish(SOON).0, Some(11), "{engine}");
    }
}

#[test]
fn a_replayed_boot_of_two_processors_goes_back_and_on_to_the_same_end() {
    let dir = Scratch::new("reverse-linux-smp");
    let g = guest("cloud");
    let (kernel, initrd) = (g.kernel.display().to_string(), g.initrd.display().to_string());
    let recording = dir.path("recording").display().to_string();
    let append = "console=ttyS0 nokaslr pv.run=poweroff";
    let arguments = ["--kernel", &kernel, "--initrd", &initrd, "--append", append, "--cpus", "2"];
    let arguments = [&arguments[..], &["--clock", "instructions"]].concat();
    let mut command = Command::new(env!("CARGO_BIN_EXE_paravane"));
    command.arg("run").args(&arguments).args(["--record", &recording]);
    let (code, recorded) = Running::start(command).finish(300);
    assert_eq!(code, Some(0), "{recorded}");
    let (running, socket) = start(&dir, &[&arguments[..], &["--wait", "--replay", &recording]].concat());
    let state = "thread apply all -q printf \"state %lx %lx %lx %lx\\n\", $rip, $rsp, $rax, $cr3";
    let said = gdb(
        &socket,
        &[
            "continue",
            state,
            "thread 2",
            "reverse-stepi 5",
            "thread 1",
            "reverse-stepi 3",
            "continue",
            state,
            // All the way, through every comparison again.
            "reverse-continue",
            "continue",
            state,
            "continue",
        ],
    );
    let shown: Vec<&str> = said.lines().filter(|l| l.starts_with("state ")).collect();
    assert!(shown.len() == 6 && shown[..2] == shown[2..4] && shown[..2] == shown[4..], "{said}");
    let (code, said) = running.finish(300);
    assert_eq!((code, said), (Some(0), recorded));
}

/// A boot sector in protected mode whose NMI handler at 7C7EH counts at 500H, and the first time sends itself another NMI, which waits for the
/// IRET at 7C9BH while 20 million instructions pass. The second ends it with exit code 11; without one it ends with 3.
///
/// ```text
/// 7C17 flat segments, vector 2 leads to 7C7Eh, local APIC on      7C7E inc dword [500h]
/// 7C49 call 7C69h                                                 7C84 cmp dword [500h], 1; jne 7C9Bh
/// 7C4E mov ecx, 1000                                              7C8D call 7C69h
/// 7C53 cmp dword [500h], 2; jae 7C63h                             7C92 mov ecx, 10000000
/// 7C5C dec ecx; jnz 7C53h; mov al, 1; out F4h, al                 7C97 dec ecx; jnz 7C97h
/// 7C63 mov al, 5; out F4h, al; jmp $                              7C9A nop
/// 7C69 the interrupt command register: NMI to APIC 0; ret         7C9B iretd
/// ```
const NMI: [u8; 196] = [
    0xFA, 0x31, 0xC0, 0x8E, 0xD8, 0x0F, 0x01, 0x16, 0xB8, 0x7C, 0x0F, 0x20, 0xC0, 0x0C, 0x01, 0x0F, 0x22,
    0xC0, 0xEA, 0x17, 0x7C, 0x08, 0x00, 0x66, 0xB8, 0x10, 0x00, 0x8E, 0xD8, 0x8E, 0xD0, 0xBC, 0x00, 0x70,
    0x00, 0x00, 0x0F, 0x01, 0x1D, 0xBE, 0x7C, 0x00, 0x00, 0xC7, 0x05, 0x10, 0x06, 0x00, 0x00, 0x7E, 0x7C,
    0x08, 0x00, 0xC7, 0x05, 0x14, 0x06, 0x00, 0x00, 0x00, 0x8E, 0x00, 0x00, 0xC7, 0x05, 0xF0, 0x00, 0xE0,
    0xFE, 0xFF, 0x01, 0x00, 0x00, 0xE8, 0x1B, 0x00, 0x00, 0x00, 0xB9, 0xE8, 0x03, 0x00, 0x00, 0x83, 0x3D,
    0x00, 0x05, 0x00, 0x00, 0x02, 0x73, 0x07, 0x49, 0x75, 0xF4, 0xB0, 0x01, 0xE6, 0xF4, 0xB0, 0x05, 0xE6,
    0xF4, 0xEB, 0xFE, 0xC7, 0x05, 0x10, 0x03, 0xE0, 0xFE, 0x00, 0x00, 0x00, 0x00, 0xC7, 0x05, 0x00, 0x03,
    0xE0, 0xFE, 0x00, 0x44, 0x00, 0x00, 0xC3, 0xFF, 0x05, 0x00, 0x05, 0x00, 0x00, 0x83, 0x3D, 0x00, 0x05,
    0x00, 0x00, 0x01, 0x75, 0x0E, 0xE8, 0xD7, 0xFF, 0xFF, 0xFF, 0xB9, 0x80, 0x96, 0x98, 0x00, 0x49, 0x75,
    0xFD, 0x90, 0xCF, 0x8D, 0x74, 0x26, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xFF, 0xFF,
    0x00, 0x00, 0x00, 0x9B, 0xCF, 0x00, 0xFF, 0xFF, 0x00, 0x00, 0x00, 0x93, 0xCF, 0x00, 0x17, 0x00, 0xA0,
    0x7C, 0x00, 0x00, 0xFF, 0x07, 0x00, 0x06, 0x00, 0x00,
];

#[test]
fn an_nmi_that_waits_goes_back_with_the_rest() {
    for engine in ENGINES {
        let dir = Scratch::new(&format!("reverse-nmi-{engine}"));
        let kernel = sector(&dir, &NMI);
        let (running, socket) = small(&dir, &kernel, engine, &["--wait", "--serial", "none"]);
        let taken = "printf \"%d taken at %#lx\\n\", *(int *)0x500, $pc";
        let said = gdb(
            &socket,
            &[
                // Behind a checkpoint, in the handler of the first.
                "hbreak *0x7c9a",
                "continue",
                taken,
                "reverse-stepi",
                taken,
                "delete",
                "hbreak *0x7c7e",
                "continue",
                taken,
                // Before the first.
                "reverse-continue",
                taken,
                "delete",
                "continue",
            ],
        );
        has(
            &said,
            &[
                "1 taken at 0x7c9a",
                "1 taken at 0x7c98",
                "1 taken at 0x7c7e",
                "0 taken at 0x7c7e",
                "exited with code 013",
            ],
        );
        assert_eq!(running.finish(SOON).0, Some(11), "{engine}");
    }
}

#[test]
fn where_nothing_is_kept_going_back_is_refused() {
    let dir = Scratch::new("reverse-refused");
    let kernel = sector(&dir, &COUNTER);
    let arguments =
        ["--kernel", &kernel, "--memory", "64M", "--serial", "none", "--debug-exit", "0xf4", "--wait"];
    let (running, socket) = start(&dir, &arguments);
    let said = gdb(&socket, &["stepi", "reverse-stepi", "reverse-continue", "continue"]);
    assert_eq!(said.matches("Target remote does not support this command").count(), 2, "{said}");
    has(&said, &["exited with code 013"]);
    assert_eq!(running.finish(SOON).0, Some(11));
}

#[test]
fn what_the_debugger_changes_begins_a_history_of_its_own() {
    let dir = Scratch::new("reverse-changed");
    let kernel = sector(&dir, &COUNTER);
    let (running, socket) = small(&dir, &kernel, "jit", &["--wait", "--serial", "none"]);
    let said = gdb(
        &socket,
        &[
            "hbreak *0x7c05",
            "continue",
            "continue",
            "set variable $rax = 100",
            "stepi",
            "stepi",
            "printf \"ax %d\\n\", $rax",
            "reverse-continue",
            "printf \"ax %d at %#lx\\n\", $rax, $pc",
            "hbreak *0x7c10",
            "delete 1",
            "continue",
            "printf \"ax %d\\n\", $rax",
            "reverse-continue",
            "printf \"ax %d\\n\", $rax",
            "delete",
            "continue",
        ],
    );
    // One round was done, 999 are left: 100 + 999.
    has(
        &said,
        &["ax 101", "No more reverse-execution history", "ax 1", "ax 1099", "ax 1", "exited with code 013"],
    );
    assert_eq!(running.finish(SOON).0, Some(11));
}

#[test]
fn back_inside_the_debian_kernel() {
    let dir = Scratch::new("reverse-linux");
    let g = guest("cloud");
    let (kernel, initrd) = (g.kernel.display().to_string(), g.initrd.display().to_string());
    let append = "console=ttyS0 nokaslr pv.run=poweroff";
    let arguments = ["--kernel", &kernel, "--initrd", &initrd, "--append", append, "--clock", "instructions"];
    let (running, socket) = start(&dir, &[&arguments[..], &["--wait"]].concat());
    let state = "printf \"state %lx %lx %lx %lx\\n\", $rip, $rsp, $rax, $cr3";
    let said = gdb(
        &socket,
        &[
            "hbreak *0x1000000",
            "continue",
            "stepi 300",
            state,
            "stepi 20",
            "reverse-stepi 20",
            state,
            "delete",
            "reverse-continue",
            "hbreak *0x1000000",
            "continue",
            "stepi 300",
            state,
            "delete",
            "continue",
        ],
    );
    let shown: Vec<&str> = said.lines().filter(|l| l.starts_with("state ")).collect();
    assert_eq!(shown.len(), 3, "{said}");
    assert_eq!((shown[1], shown[2]), (shown[0], shown[0]), "{said}");
    has(&said, &["No more reverse-execution history", "0x0000000001000200"]);
    let (code, said) = running.finish(300);
    assert_eq!(code, Some(0), "{said}");
}

//! The debugger's way in, with the stock gdb and with packets made by hand, in both engines.

mod common;

use common::debugger::{BUS_MASTER, SMALL, SOON, gdb, has, marked_disk, say, sector, small, start};
use common::{Guest, Running, Scratch, guest};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const ENGINES: [&str; 2] = ["jit", "interp"];
/// Both, by both clocks.
const CLOCKS: [(&str, &str); 4] =
    [("jit", "host"), ("interp", "host"), ("jit", "instructions"), ("interp", "instructions")];

/// The lab guest as a file; it powers off by itself.
fn lab(dir: &Scratch) -> String {
    let path = dir.path("lab.elf");
    fs::write(&path, paravane_firmware::lab::LAB_ELF).expect("lab guest");
    path.display().to_string()
}

/// A program that counts, stores, loads and ends with exit code 11.
///
/// ```text
/// 7C00 mov cx, 1000    7C07 mov [500h], ax    7C0D nop
/// 7C03 inc ax          7C0A mov bx, [500h]    7C0E mov al, 5
/// 7C04 dec cx                                 7C10 out F4h, al
/// 7C05 jnz 7C03                               7C12 jmp $
/// ```
const COUNTER: [u8; 21] = [
    0xB9, 0xE8, 0x03, 0x40, 0x49, 0x75, 0xFC, 0xA3, 0x00, 0x05, 0x8B, 0x1E, 0x00, 0x05, 0x90, 0xB0, 0x05,
    0xE6, 0xF4, 0xEB, 0xFE,
];

/// xor ax, ax before [`COUNTER`], so that it counts from zero: everything lies two bytes further.
fn counter(dir: &Scratch) -> String {
    let code: Vec<u8> = [0x31, 0xC0].into_iter().chain(COUNTER).collect();
    sector(dir, &code)
}

#[test]
fn one_register_file_from_reset_to_long_mode() {
    for engine in ENGINES {
        let dir = Scratch::new(&format!("gdb-modes-{engine}"));
        let lab = lab(&dir);
        let (running, socket) = small(&dir, &lab, engine, &["--wait"]);
        let said = gdb(
            &socket,
            &[
                &format!("file {lab}"),
                // Not loaded where the debugger is concerned, 32-bit, no paging.
                "printf \"entry %d\\n\", $rip == (long)&lab_start",
                "info registers cr0 efer cs eflags",
                "hbreak *&lab_long",
                "break lab_main",
                "continue",
                "info registers efer cr0 cs",
                "info registers",
                "p $st0",
                "p $xmm3.uint128",
                "p $ymm3.v8_int32",
                "continue",
                "p $efer",
                "x/2i $pc",
                "info threads",
                "delete",
                "continue",
            ],
        );
        has(
            &said,
            &[
                "entry 1",
                "cr0            0x11                [ PE ET ]",
                "efer           0x0",
                "cs             0x10",
                "Breakpoint 1,",
                "in lab_long",
                "efer           0x500               [ LME LMA ]",
                "PG ]",
                "gs_base",
                "dr7",
                "tss_base",
                "$1 = 0",
                "$2 = 0",
                "Breakpoint 2,",
                "in lab_main",
                "[ LME LMA ]",
                "64-bit mode, CPL 0",
                "exited normally",
            ],
        );
        assert!(!said.contains("too long"), "{said}");
        assert_eq!(running.finish(SOON).0, Some(0), "{engine}");
    }
}

#[test]
fn watchpoints_of_every_kind_stop_after_the_access() {
    for engine in ENGINES {
        let dir = Scratch::new(&format!("gdb-watch-{engine}"));
        let kernel = counter(&dir);
        let (running, socket) = small(&dir, &kernel, engine, &["--wait"]);
        let said = gdb(
            &socket,
            &[
                "watch *(unsigned short *)0x500",
                "continue",
                "printf \"after %#lx, value %d\\n\", $pc, *(unsigned short *)0x500",
                "delete",
                "rwatch *(char *)0x501",
                "continue",
                "printf \"then %#lx, ebx %d\\n\", $pc, $rbx",
                "delete",
                "monitor iowatch 0xf4 1",
                "continue",
                "printf \"port %#lx\\n\", $pc",
            ],
        );
        has(
            &said,
            &[
                "Hardware watchpoint 1",
                "Old value = 0",
                "New value = 1000",
                "after 0x7c0c, value 1000",
                "Hardware read watchpoint 2",
                "then 0x7c10, ebx 1000",
                "1: watch writes of port 0xf4, 1 long",
                // The access itself ends the run: the guest is stopped for good.
                "exited with code 013",
            ],
        );
        assert_eq!(running.finish(SOON).0, Some(11), "{engine}");
    }
}

/// The guest reads its time-stamp counter on both sides of a breakpoint.
///
/// ```text
/// 7C00 rdtsc            7C09 rdtsc           7C10 mov al, 5
/// 7C02 mov ebx, eax     7C0B sub eax, ebx    7C12 out F4h, al
/// 7C05 mov ecx, edx     7C0E sbb edx, ecx    7C14 jmp $
/// 7C08 nop
/// ```
const STOPWATCH: [u8; 24] = [
    0x0F, 0x31, 0x66, 0x89, 0xC3, 0x66, 0x89, 0xD1, 0x90, 0x0F, 0x31, 0x66, 0x29, 0xD8, 0x66, 0x19, 0xCA,
    0x90, 0xB0, 0x05, 0xE6, 0xF4, 0xEB, 0xFE,
];

/// An access by a device stops the guest before its next instruction; linear addresses are physical here.
#[test]
fn watchpoints_see_what_devices_do_to_memory() {
    for (engine, clock) in ENGINES.iter().flat_map(|&e| [(e, "host"), (e, "instructions")]) {
        let dir = Scratch::new(&format!("gdb-dma-{engine}-{clock}"));
        let (kernel, disk) = (sector(&dir, &BUS_MASTER), marked_disk(&dir));
        let more = ["--wait", "--clock", clock, "--disk", &disk];
        let (running, socket) = small(&dir, &kernel, engine, &more);
        let said = gdb(
            &socket,
            &[
                "monitor pwatch 0x604 4 read",
                "monitor pwatch 0x11fe 4 access",
                "continue",
                "printf \"table read, at %#lx\\n\", $pc",
                "continue",
                "monitor why",
                "monitor delete 1",
                "monitor delete 2",
                "continue",
            ],
        );
        let parts = [
            "read of physical 0x604 by ide0 (DMA)",
            "table read, at 0x7c65",
            "write to physical 0x11fe by disk0 (DMA)",
            "a write to physical 0x11fe by disk0 (DMA); how",
            "exited with code 013",
        ];
        has(&said, &parts);
        assert_eq!(running.finish(SOON).0, Some(11), "{engine} {clock}");

        let (running, socket) = small(&dir, &kernel, engine, &more);
        let watch = "watch *(unsigned int *)0x1004";
        let said = gdb(&socket, &["hbreak *0x7c64", "continue", watch, "continue", "delete", "continue"]);
        // "VANE", little-endian.
        let new = format!("New value = {}", u32::from_le_bytes(*b"VANE"));
        has(&said, &["write to linear 0x1004 by disk0 (DMA)", "Old value = 0", &new, "exited with code 013"]);
        assert_eq!(running.finish(SOON).0, Some(11), "{engine} {clock}");
    }
}

#[test]
fn time_stands_still_while_the_debugger_holds_the_guest() {
    for engine in ENGINES {
        let dir = Scratch::new(&format!("gdb-time-{engine}"));
        let kernel = sector(&dir, &STOPWATCH);
        let (running, socket) = small(&dir, &kernel, engine, &["--wait"]);
        let stop_and_wait = ["break *0x7c08", "continue", "shell sleep 4", "break *0x7c11", "continue"];
        let ticks = "printf \"%lu ticks\\n\", ((unsigned long)$rdx << 32) | ($rax & 0xffffffff)";
        let said = gdb(&socket, &[&stop_and_wait[..], &[ticks, "detach"]].concat());
        let before = &said[..said.find(" ticks").expect("ticks")];
        let ticks: u64 = before.rsplit('\n').next().and_then(|n| n.parse().ok()).expect("a number");
        // The slowest counters run at a GHz.
        assert!(ticks < 4_000_000_000, "{engine}: {said}");
        assert_eq!(running.finish(SOON).0, Some(11), "{engine}");
    }
}

#[test]
fn conditions_are_evaluated_without_the_debugger() {
    for engine in ENGINES {
        let dir = Scratch::new(&format!("gdb-if-{engine}"));
        let kernel = counter(&dir);
        let (running, socket) = small(&dir, &kernel, engine, &["--wait"]);
        let said = gdb(
            &socket,
            &[
                "monitor break 0x7c06 if rax == 700 && w[0x7c00] == 0xc031",
                "monitor pbreak 0x7c09",
                "monitor info",
                "continue",
                "printf \"ax %d cx %d pc %#lx\\n\", $rax, $rcx, $pc",
                "monitor info",
                "continue",
                "printf \"pc %#lx\\n\", $pc",
                "monitor delete 1",
                "monitor delete 7",
                "monitor break 12 if nonsense == 1",
                "monitor walk $rip",
                "monitor registers segment",
                "monitor idt",
                "monitor memory",
                "monitor devices pit",
                "monitor counters engine",
                "monitor frobnicate",
                "monitor why",
                "detach",
            ],
        );
        has(
            &said,
            &[
                "1: break at linear 0x7c06 if rax == 700",
                "2: break at physical 0x7c09",
                "monitor breakpoint 1 at 0x7c06",
                "ax 700 cx 301 pc 0x7c06",
                "reached 700 times",
                "monitor breakpoint 2 at 0x7c09",
                "pc 0x7c09",
                "1 is forgotten",
                "'7' is the number of nothing",
                "'nonsense' is neither a number nor a register",
                "paging is off, physical 0x7c09",
                "cs  0000",
                "idt at 0x0",
                "RAM",
                "pit",
                "engine.",
                "'frobnicate' is no monitor command",
                "a breakpoint at 0x7c09",
            ],
        );
        assert_eq!(running.finish(SOON).0, Some(11), "{engine}");
    }
}

#[test]
fn registers_and_memory_are_written_and_nothing_else_is_touched() {
    for engine in ENGINES {
        let dir = Scratch::new(&format!("gdb-write-{engine}"));
        let kernel = counter(&dir);
        let (running, socket) = small(&dir, &kernel, engine, &["--wait"]);
        let said = gdb(
            &socket,
            &[
                "break *0x7c10",
                "continue",
                // Exit code (6 << 1) | 1 instead of 11, and the code itself as the guest wrote it.
                "x/2xb 0x7c10",
                "set *(char *)0x7c12 = 6",
                "p $xmm15.uint128 = 77",
                "p $xmm15.uint128",
                "p $ymm3.v8_int32[5] = 78",
                "p $ymm3.v8_int32",
                "p $st1 = 2.5",
                "p $st1",
                "p $cr0 = $cr0 | 8",
                "p $cr0",
                "p $cr0 = $cr0 | 0x80000000",
                "p $cs = 3",
                "p $k_gs_base = 0x1234",
                "p/x $k_gs_base",
                "p $ax",
                "x/4xb 0xfee00000",
                "p *(int *)0xffff800000000000",
                "monitor phys on",
                "x/2xb 0x7c10",
                "set $pc = 0x7c11",
                "continue",
            ],
        );
        has(
            &said,
            &[
                "Breakpoint 1, 0x0000000000007c10",
                "0x7c10:\t0x90\t0xb0",
                "= 77",
                "= 77",
                "= 78",
                "= {0, 0, 0, 0, 0, 78, 0, 0}",
                "= 2.5",
                "= 2.5",
                "TS ",
                "Could not write register \"cr0\"",
                "0x1234",
                "= 1000",
                "Cannot access memory at address 0xfee00000",
                "Cannot access memory at address 0xffff800000000000",
                "memory addresses are physical",
                "0x7c10:\t0x90\t0xb0",
                "exited with code 015",
            ],
        );
        assert_eq!(running.finish(SOON).0, Some(13), "{engine}");
    }
}

#[test]
fn the_debian_kernel_from_its_entry_to_its_system_calls() {
    for engine in ENGINES {
        let dir = Scratch::new(&format!("gdb-debian-{engine}"));
        let Guest { kernel, initrd } = guest("cloud");
        let (kernel, initrd) = (kernel.display().to_string(), initrd.display().to_string());
        let (mut running, socket) = start(
            &dir,
            &[
                "--kernel",
                &kernel,
                "--initrd",
                &initrd,
                "--append",
                "console=ttyS0 nokaslr quiet",
                "--engine",
                engine,
                "--wait",
            ],
        );
        // The kernel decompresses itself over the breakpoint before it gets there.
        let said = gdb(
            &socket,
            &[
                "hbreak *0x1000000",
                "continue",
                "x/i $pc",
                "monitor walk $rip",
                "monitor gdt",
                "stepi",
                "stepi",
                "p $cr4",
                "detach",
            ],
        );
        has(
            &said,
            &[
                "Breakpoint 1, 0x0000000001000000",
                "=> 0x1000000:",
                "PML4E",
                "PDE",
                "RAM",
                "64-bit code",
                "PAE",
            ],
        );
        running.expect("paravane: init reached", if engine == "jit" { 300 } else { 1200 });
        // Attached to a running system: a system call's entry, from user mode.
        let msr = gdb(&socket, &["monitor registers msr", "detach"]);
        let lstar = msr.lines().find_map(|l| l.strip_prefix("lstar")).expect(&msr).trim().to_owned();
        running.type_in("while :; do :; done & for i in 1 2 3 4 5 6 7 8 9; do cat /proc/uptime >/dev/null; sleep 1; done; kill %1; echo st''ill here\n");
        let said = gdb(
            &socket,
            &[
                &format!("monitor break {lstar} if rax == 1"),
                "continue",
                "printf \"cpl %d, number %d\\n\", $cpl, $rax",
                "p $cr0",
                "monitor walk rcx",
                "monitor tss",
                "monitor apic",
                "monitor ioapic",
                "monitor pic",
                "monitor pci",
                "monitor delete 1",
                "break *$rcx",
                "continue",
                "printf \"back at cpl %d\\n\", $cpl",
                "watch -l *(long *)($rsp - 8)",
                "continue",
                "delete",
                "detach",
            ],
        );
        has(
            &said,
            &[
                "cpl 0, number 1",
                "PG ]",
                "PTE",
                "rsp0",
                "lapic0",
                "pin",
                "master",
                "virtio-rng0",
                "Breakpoint 1",
                "back at cpl 3",
                "Hardware watchpoint 2",
            ],
        );
        running.expect("still here", 600);
        running.type_in("poweroff -f\n");
        assert_eq!(running.finish(300).0, Some(0), "{engine}");
    }
}

#[test]
fn whoever_looks_in_again_and_again_does_not_disturb_a_boot() {
    let dir = Scratch::new("gdb-look");
    let Guest { kernel, initrd } = guest("cloud");
    let (kernel, initrd) = (kernel.display().to_string(), initrd.display().to_string());
    let append = "console=ttyS0 pv.run=poweroff";
    let (running, socket) = start(&dir, &["--kernel", &kernel, "--initrd", &initrd, "--append", append]);
    for _ in 0..20 {
        if !socket.exists() {
            break;
        }
        let said = gdb(&socket, &["x/2i $pc", "monitor walk $rsp", "monitor devices", "stepi 20", "detach"]);
        // The end of the guest may come in between.
        let ends = ["detached", "exited", "refused", "closed", "E05", "No such file"];
        assert!(ends.iter().any(|end| said.contains(end)), "{said}");
    }
    let (code, said) = running.finish(300);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("paravane: init reached"), "{said}");
}

#[test]
fn a_triple_fault_is_kept_for_the_debugger() {
    for engine in ENGINES {
        let dir = Scratch::new(&format!("gdb-triple-{engine}"));
        // lidt [zero]; int3, with a limit of 0: no gate, no double fault, no way out.
        let kernel = sector(&dir, &[0x0F, 0x01, 0x1E, 0x10, 0x7C, 0xCC]);
        let (mut running, socket) = small(&dir, &kernel, engine, &[]);
        let said =
            gdb(&socket, &["printf \"at %#lx\\n\", $pc", "x/i $pc", "monitor why", "p $idt_limit", "detach"]);
        has(&said, &["at 0x7c05", "int3", "triple fault", "1. #BP", "rip 0x7c05", "last blocks"]);
        // Still there for the next who looks; going on is the end.
        let said = gdb(&socket, &["p $idt_limit", "continue"]);
        has(&said, &["= 0", "exited with code 03"]);
        running.stdin = None;
        assert_eq!(running.finish(SOON).0, Some(3), "{engine}");
    }
}

/// Packets by hand.
struct Raw(UnixStream);

impl Raw {
    fn connect(socket: &Path) -> Raw {
        let stream = UnixStream::connect(socket).expect("connection");
        stream.set_read_timeout(Some(Duration::from_secs(SOON))).expect("time limit");
        Raw(stream)
    }

    fn send(&mut self, body: &str) {
        let sum = body.bytes().fold(0u8, u8::wrapping_add);
        self.0.write_all(format!("${body}#{sum:02x}").as_bytes()).expect("sent");
    }

    /// The next packet's body, or a lone `-`; empty at the end of the connection.
    fn answer(&mut self) -> String {
        let mut text = String::new();
        let mut byte = [0];
        while matches!(self.0.read(&mut byte), Ok(1)) {
            match (byte[0], text.is_empty()) {
                (b'-', true) => return "-".into(),
                (b'+', true) => {}
                (b'#', _) => {
                    self.0.read_exact(&mut [0; 2]).expect("checksum");
                    self.0.write_all(b"+").expect("acknowledged");
                    // Console output goes before the answer.
                    if !text.starts_with("$O") || text == "$OK" {
                        return text[1..].to_owned();
                    }
                    text.clear();
                }
                (b, _) => text.push(char::from(b)),
            }
        }
        text
    }

    fn ask(&mut self, body: &str) -> String {
        self.send(body);
        self.answer()
    }
}

#[test]
fn bad_input_gets_an_answer_and_the_guest_lives_on() {
    for engine in ENGINES {
        let dir = Scratch::new(&format!("gdb-bad-{engine}"));
        let kernel = counter(&dir);
        let (running, socket) = small(&dir, &kernel, engine, &["--wait"]);
        let mut first = Raw::connect(&socket);
        assert!(first.ask("?").starts_with('T') || first.ask("?").starts_with('S'));
        // A second debugger hears why, the first does not notice.
        let said = gdb(&socket, &["p 1"]);
        assert!(said.contains("another debugger is connected"), "{said}");
        let mut silent = Raw::connect(&socket);
        assert_eq!(silent.answer(), "");
        first.0.write_all(b"$m7c00,4#00").expect("sent");
        assert_eq!(first.answer(), "-");
        assert_eq!(first.ask("m7c00,4"), "31c0b9e8");
        for nonsense in [
            "vCont;x",
            "vCont;s:zz",
            "Zq,1,2",
            "Z0,zz,1",
            "m",
            "mzz,4",
            "m0",
            "G00",
            "P999=00",
            "P10=1",
            "qRcmd,zz",
            "Hgzz",
            "\u{7f}\u{1}",
        ] {
            let answer = first.ask(nonsense);
            assert!(answer.is_empty() || answer.starts_with('E'), "{nonsense}: {answer}");
        }
        let long = format!("m{}", "0".repeat(200_000));
        assert!(first.ask(&long).starts_with("E."), "too long");
        assert!(first.ask("mffff800000000000,4").starts_with('E'), "not canonical");
        assert!(first.ask("mfee00000,4").starts_with('E'), "a device");
        // Two bytes of zero, run-length encoded: memory ends there.
        assert_eq!(first.ask("m3fffffe,8"), "0* ");
        assert!(first.ask("m0,ffffffffffffffff").starts_with("E."), "more than a packet holds");
        assert!(first.ask("M3fffffe,4:01020304").starts_with('E'));
        assert_eq!(first.ask("m7c00,4"), "31c0b9e8");
        // A range of steps by hand: out of the loop at last.
        assert!(first.ask("vCont;r7c00,7c09:1").starts_with("T05"));
        assert_eq!(first.ask("p10"), "097c0*(");
        // Gone in the middle of a step, with a breakpoint armed that would hold the guest.
        assert_eq!(first.ask("Z0,7c09,1"), "OK");
        assert_eq!(first.ask("Z0,7c10,1"), "OK");
        first.send("vCont;s:1");
        drop(first);
        assert_eq!(running.finish(SOON).0, Some(11), "{engine}");
    }
}

/// Packets changed at random, from a fixed seed: each is answered or ignored, and the machine stays what it was.
#[test]
fn packets_changed_at_random_do_no_harm() {
    let dir = Scratch::new("gdb-random");
    let kernel = counter(&dir);
    let (running, socket) = small(&dir, &kernel, "jit", &["--wait"]);
    let mut raw = Raw::connect(&socket);
    let seeds = [
        "qSupported:multiprocess+;swbreak+",
        "qXfer:features:read:target.xml:0,ffb",
        "qXfer:memory-map:read::0,100",
        "Hg1",
        "g",
        "m7c00,20",
        "Z0,7c10,1",
        "z0,7c10,1",
        "Z2,500,2",
        "p10",
        "qRcmd,77616c6b2030",
        "qfThreadInfo",
        "T1",
        "vCont?",
        "qThreadExtraInfo,1",
        "?",
        "qAttached",
        "X500,2:ab",
        "qRcmd,627265616b20307831206966203078",
    ];
    let mut state = 0x1234_5678_9ABC_DEF1u64;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 20) as usize % below
    };
    for _ in 0..5000 {
        let mut body = seeds[random(seeds.len())].as_bytes().to_vec();
        for _ in 0..random(4) {
            let at = random(body.len());
            match random(3) {
                0 => body[at] = b"0123456789abcdef,:;-+ffff"[random(25)],
                1 => drop(body.remove(at)),
                _ => body.insert(at, b"0f,:;x~"[random(7)]),
            }
            if body.is_empty() {
                body.push(b'g');
            }
        }
        // What would rightly change the guest, let it go on, or end the session.
        if matches!(
            body[0],
            b'k' | b'D' | b'c' | b's' | b'C' | b'S' | b'M' | b'X' | b'G' | b'P' | b'R' | b'v'
        ) {
            continue;
        }
        raw.ask(std::str::from_utf8(&body).expect("ASCII"));
    }
    for at in ["7c10", "500"] {
        raw.ask(&format!("z0,{at},1"));
        raw.ask(&format!("z2,{at},2"));
    }
    assert_eq!(raw.ask("m7c00,4"), "31c0b9e8");
    drop(raw);
    assert_eq!(running.finish(SOON).0, Some(11));
}

/// REP LODSB over 3 GiB of RAM and nothing, in protected mode, again and again.
///
/// ```text
/// 7C00 cli; xor ax, ax; mov ds, ax; lgdt [..]; CR0.PE; jmp 8:7C17h
/// 7C17 mov ax, 16; mov ds, ax; mov es, ax; mov ecx, C0000000h; xor esi, esi; rep lodsb; jmp
/// ```
const REPEAT: [u8; 78] = [
    0xFA, 0x31, 0xC0, 0x8E, 0xD8, 0x0F, 0x01, 0x16, 0x48, 0x7C, 0x0F, 0x20, 0xC0, 0x0C, 0x01, 0x0F, 0x22,
    0xC0, 0xEA, 0x17, 0x7C, 0x08, 0x00, 0x66, 0xB8, 0x10, 0x00, 0x8E, 0xD8, 0x8E, 0xC0, 0xB9, 0x00, 0x00,
    0x00, 0xC0, 0x31, 0xF6, 0xF3, 0xAC, 0xEB, 0xF5, 0x8D, 0xB6, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    0x00, 0x00, 0x00, 0x00, 0x00, 0xFF, 0xFF, 0x00, 0x00, 0x00, 0x9B, 0xCF, 0x00, 0xFF, 0xFF, 0x00, 0x00,
    0x00, 0x93, 0xCF, 0x00, 0x17, 0x00, 0x30, 0x7C, 0x00, 0x00,
];

#[test]
fn ctrl_c_stops_a_guest_that_spins_repeats_or_sleeps_for_good() {
    // jmp $, and cli; hlt.
    for (name, code) in [("spin", &[0xEB, 0xFE][..]), ("sleep", &[0xFA, 0xF4]), ("repeat", &REPEAT)] {
        for (engine, clock) in CLOCKS {
            let dir = Scratch::new(&format!("gdb-{name}-{engine}-{clock}"));
            let kernel = sector(&dir, code);
            // A second processor that waits to be started stops no less.
            let cpus = if engine == "jit" { "2" } else { "1" };
            let (running, socket) = small(&dir, &kernel, engine, &["--cpus", cpus, "--clock", clock]);
            let mut raw = Raw::connect(&socket);
            for _ in 0..3 {
                raw.send("vCont;c");
                std::thread::sleep(Duration::from_millis(100));
                let asked = Instant::now();
                raw.0.write_all(&[3]).expect("Ctrl-C");
                assert!(raw.answer().starts_with("T02"), "{name}, {engine}, {clock}");
                assert!(asked.elapsed() < Duration::from_secs(10), "at once, on a busy host");
            }
            // A step in HLT waits for what wakes the processor, and for Ctrl-C.
            if name == "sleep" {
                raw.send("vCont;s:1");
                raw.0.write_all(&[3]).expect("Ctrl-C");
                assert!(raw.answer().starts_with("T02"), "{engine}");
            }
            raw.send("k");
            assert_eq!(running.finish(SOON).0, Some(0), "{name}, {engine}, {clock}");
        }
    }
}

#[test]
fn ctrl_c_stops_a_guest_that_goes_back() {
    for cpus in ["1", "2"] {
        let dir = Scratch::new(&format!("gdb-back-{cpus}"));
        let kernel = sector(&dir, &[0x90, 0xEB, 0xFD]);
        let more = ["--cpus", cpus, "--clock", "instructions", "--wait"];
        let (running, socket) = small(&dir, &kernel, "jit", &more);
        let mut raw = Raw::connect(&socket);
        assert!(raw.ask("?").starts_with("T05"));
        raw.send("vCont;c");
        std::thread::sleep(Duration::from_secs(1));
        raw.0.write_all(&[3]).expect("Ctrl-C");
        assert!(raw.answer().starts_with("T02"));
        // Nobody writes there: it is looked for all the way.
        assert_eq!(raw.ask("Z2,500,2"), "OK");
        raw.send("bc");
        raw.0.write_all(&[3]).expect("Ctrl-C");
        assert!(raw.answer().starts_with("T02"), "{cpus}");
        assert!(raw.ask("bc").contains("replaylog:begin"), "{cpus}");
        assert_eq!(raw.ask("p10"), "007c0*(", "{cpus}");
        raw.send("k");
        assert_eq!(running.finish(SOON).0, Some(0), "{cpus}");
    }
}

/// A register of up to eight bytes in the debugger's own form: digits of bytes, the lowest first, with runs (GDB manual, E.1).
fn register(answer: &str) -> u64 {
    let mut digits = String::new();
    let mut rest = answer.chars();
    while let Some(c) = rest.next() {
        match c {
            '*' => {
                let (last, times) = (digits.chars().last().expect("a digit"), rest.next().expect("a count"));
                digits.extend(std::iter::repeat_n(last, times as usize - 29));
            }
            digit => digits.push(digit),
        }
    }
    let bytes: Vec<u8> =
        (0..8).map(|i| u8::from_str_radix(&digits[2 * i..2 * i + 2], 16).expect("digits")).collect();
    u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
}

#[test]
fn back_from_inside_a_repetition_nothing_later_is_found() {
    for engine in ENGINES {
        let dir = Scratch::new(&format!("gdb-repetition-{engine}"));
        let kernel = sector(&dir, &REPEAT);
        let (running, socket) = small(&dir, &kernel, engine, &["--clock", "instructions", "--wait"]);
        let mut raw = Raw::connect(&socket);
        assert!(raw.ask("?").starts_with("T05"));
        raw.send("vCont;c");
        std::thread::sleep(Duration::from_millis(300));
        raw.0.write_all(&[3]).expect("Ctrl-C");
        assert!(raw.answer().starts_with("T02"));
        // RSI counts up from 0: the last byte that was read.
        let here = register(&raw.ask("p4"));
        assert!(here > 0);
        let last = format!("3,{:x},1", here - 1);
        assert_eq!(raw.ask(&format!("Z{last}")), "OK");
        assert!(raw.ask("bc").contains("rwatch"), "{engine}");
        // An access is undone with the step that made it: here that is all of the repetition so far.
        assert_eq!(register(&raw.ask("p4")), 0, "{engine}");
        assert!(raw.ask("vCont;c").contains("rwatch"), "{engine}");
        assert_eq!(register(&raw.ask("p4")), here, "{engine}");
        assert_eq!(raw.ask(&format!("z{last}")), "OK");
        // What it will read next it has not read yet.
        assert_eq!(raw.ask(&format!("Z3,{here:x},1")), "OK");
        assert!(raw.ask("bc").contains("replaylog:begin"), "{engine}");
        raw.send("k");
        assert_eq!(running.finish(SOON).0, Some(0), "{engine}");
    }
}

#[test]
fn breakpoints_survive_a_reset_and_tcp_works() {
    let dir = Scratch::new("gdb-reset");
    // Port 64H, command FEH: reset.
    let kernel = sector(&dir, &[0x90, 0xB0, 0xFE, 0xE6, 0x64, 0xEB, 0xFE]);
    let port =
        std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
    let address = format!("127.0.0.1:{port}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_paravane"));
    command.args(["run", "--kernel", &kernel, "--gdb", &address, "--wait"]).args(SMALL);
    let running = Running::start(command);
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-batch", "-ex", "set confirm off", "-ex", "set tcp connect-timeout 60"]);
    let commands = ["hbreak *0x7c01", "continue", "p $pc", "continue", "p $pc", "kill"];
    gdb.arg("-ex").arg(format!("target remote {address}"));
    for c in commands {
        gdb.args(["-ex", c]);
    }
    let said = say(gdb);
    has(&said, &["Breakpoint 1, 0x0000000000007c01", "Breakpoint 1, 0x0000000000007c01", "0x7c01"]);
    assert_eq!(running.finish(SOON).0, Some(0));
}

#[test]
fn addresses_that_are_none_are_refused() {
    let dir = Scratch::new("gdb-address");
    let kernel = counter(&dir);
    for address in ["nonsense", "1234", "host:99999", "unix=", "unix=/nonexistent/dir/x"] {
        let output = Command::new(env!("CARGO_BIN_EXE_paravane"))
            .args(["run", "--kernel", &kernel, "--serial", "none", "--gdb", address])
            .stdin(Stdio::null())
            .output()
            .expect("paravane starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{address}: {said}");
        assert!(said.contains("--gdb") && said.lines().count() == 1, "{address}: {said}");
    }
}

//! `--trace`: what is written about small guests is what they were built to do.

mod common;

use common::debugger::{BUS_MASTER, SOON, gdb, has, marked_disk, sector, start};
use common::{Scratch, guest, run};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

const ENGINES: [&str; 2] = ["jit", "interp"];

/// Counts to 1000, stores, loads and ends with exit code 11; tests/reverse.rs has the listing.
const COUNTER: [u8; 23] = [
    0x31, 0xC0, 0xB9, 0xE8, 0x03, 0x40, 0x49, 0x75, 0xFC, 0xA3, 0x00, 0x05, 0x8B, 0x1E, 0x00, 0x05, 0x90,
    0xB0, 0x05, 0xE6, 0xF4, 0xEB, 0xFE,
];

/// 20 timer interrupts; tests/reverse.rs has the listing.
const TICKS: [u8; 76] = [
    0xFA, 0x31, 0xC0, 0x8E, 0xD8, 0xC7, 0x06, 0x20, 0x00, 0x41, 0x7C, 0xA3, 0x22, 0x00, 0xB0, 0x11, 0xE6,
    0x20, 0xB0, 0x08, 0xE6, 0x21, 0xB0, 0x04, 0xE6, 0x21, 0xB0, 0x01, 0xE6, 0x21, 0xB0, 0xFE, 0xE6, 0x21,
    0xB0, 0x34, 0xE6, 0x43, 0xB0, 0xA9, 0xE6, 0x40, 0xB0, 0x04, 0xE6, 0x40, 0xFB, 0x66, 0xFF, 0x06, 0x04,
    0x06, 0x83, 0x3E, 0x00, 0x06, 0x14, 0x72, 0xF4, 0xB0, 0x05, 0xE6, 0xF4, 0xEB, 0xFE, 0x50, 0xFF, 0x06,
    0x00, 0x06, 0xB0, 0x20, 0xE6, 0x20, 0x58, 0xCF,
];

/// UD2 at 7C0DH, whose handler at 7C0FH ends the run with exit code 11.
const UNDEFINED: [u8; 21] = [
    0x31, 0xC0, 0x8E, 0xD8, 0xC7, 0x06, 0x18, 0x00, 0x0F, 0x7C, 0xA3, 0x1A, 0x00, 0x0F, 0x0B, 0xB0, 0x05,
    0xE6, 0xF4, 0xEB, 0xFE,
];

/// MOV AL, 7 and VMCALL at 7C0FH, which is #UD, whose handler at 7C12H ends the run with exit code 11.
const HYPERCALL: [u8; 24] = [
    0x31, 0xC0, 0x8E, 0xD8, 0xC7, 0x06, 0x18, 0x00, 0x12, 0x7C, 0xA3, 0x1A, 0x00, 0xB0, 0x07, 0x0F, 0x01,
    0xC1, 0xB0, 0x05, 0xE6, 0xF4, 0xEB, 0xFE,
];

fn command(kernel: &str, engine: &str, trace: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_paravane"));
    command.args(["run", "--kernel", kernel, "--engine", engine, "--memory", "16M", "--serial", "none"]);
    command.args(["--debug-exit", "0xf4", "--clock", "instructions", "--trace", trace]);
    command.stdin(Stdio::null());
    command
}

/// The events of a guest that ends with exit code 11, and what the last line says of them.
fn traced(dir: &Scratch, code: &[u8], engine: &str, spec: &str) -> (Vec<Value>, (u64, u64)) {
    let (kernel, file) = (sector(dir, code), dir.path("trace"));
    let spec = format!("{},{spec}", file.display());
    let out = command(&kernel, engine, &spec).output().expect("paravane runs");
    assert_eq!(out.status.code(), Some(11), "{}", String::from_utf8_lossy(&out.stderr));
    events(&file)
}

fn events(file: &Path) -> (Vec<Value>, (u64, u64)) {
    let text = fs::read_to_string(file).expect("trace");
    let mut events: Vec<Value> =
        text.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect();
    let end = events.pop().expect("a last line");
    assert_eq!(end["kind"], "end");
    let counts = (end["written"].as_u64().expect("number"), end["dropped"].as_u64().expect("number"));
    assert_eq!(events.len() as u64, counts.0);
    (events, counts)
}

/// `port=value` of each write.
fn writes(events: &[Value]) -> Vec<String> {
    let text = |v: &Value| v.as_str().expect("text").to_owned();
    events.iter().filter(|e| e["write"] == true).map(|e| text(&e["at"]) + "=" + &text(&e["value"])).collect()
}

#[test]
fn ports_are_told_with_their_place_and_device() {
    for engine in ENGINES {
        let dir = Scratch::new(&format!("trace-port-{engine}"));
        let (events, _) = traced(&dir, &COUNTER, engine, "port");
        let [event] = &events[..] else { panic!("{engine}: {events:?}") };
        // xor, mov; 1000 rounds of three; mov, mov, nop, mov come before the OUT.
        let expected = serde_json::json!({
            "kind": "port", "vcpu": 0, "instructions": 2 + 3000 + 4, "rip": "0x7c13", "cpl": 0, "cr3": "0x0",
            "device": "debug-exit", "at": "0xf4", "size": 1, "write": true, "value": "0x5"
        });
        assert_eq!(*event, expected, "{engine}");

        let (events, _) = traced(&dir, &TICKS, engine, "port,interrupt");
        let ports: Vec<Value> = events.iter().filter(|e| e["kind"] == "port").cloned().collect();
        let setup = [
            "0x20=0x11",
            "0x21=0x8",
            "0x21=0x4",
            "0x21=0x1",
            "0x21=0xfe",
            "0x43=0x34",
            "0x40=0xa9",
            "0x40=0x4",
        ];
        let expected: Vec<&str> =
            setup.into_iter().chain(std::iter::repeat_n("0x20=0x20", 20)).chain(["0xf4=0x5"]).collect();
        assert_eq!(writes(&ports), expected, "{engine}");
        assert!(ports[0]["device"] == "pic" && ports[5]["device"] == "pit", "{engine}: {ports:?}");
        let interrupts: Vec<&Value> = events.iter().filter(|e| e["kind"] == "interrupt").collect();
        assert_eq!(interrupts.len(), 20, "{engine}");
        assert!(interrupts.iter().all(|e| e["vector"] == 8), "{engine}");

        let (events, _) = traced(&dir, &TICKS, engine, "port,device=pit");
        assert_eq!(writes(&events), setup[5..], "{engine}");
        let (events, _) = traced(&dir, &TICKS, engine, "port,addr=0x21-0x40,cpl=0,vcpu=0");
        assert_eq!(events.len(), 6, "{engine}");
        assert!(traced(&dir, &TICKS, engine, "port,cpl=3").0.is_empty(), "{engine}");
    }
}

#[test]
fn instructions_and_blocks_are_told_one_by_one() {
    for engine in ENGINES {
        let dir = Scratch::new(&format!("trace-insn-{engine}"));
        let (events, counts) = traced(&dir, &COUNTER, engine, "insn,addr=0x7c05-0x7c08,wait");
        assert_eq!(counts, (3000, 0), "{engine}");
        let texts: Vec<&str> = events[..4].iter().map(|e| e["text"].as_str().expect("text")).collect();
        assert_eq!(texts, ["inc ax", "dec cx", "jne short 7C05h", "inc ax"], "{engine}");
        assert_eq!((&events[1]["bytes"], &events[2]["rip"]), (&"49".into(), &"0x7c07".into()), "{engine}");
        // The first round follows the instruction before it; 999 come from the jump.
        let (events, counts) = traced(&dir, &COUNTER, engine, "block,addr=0x7c05,wait");
        assert_eq!((events.len(), counts.1), (999, 0), "{engine}");
    }
}

#[test]
fn exceptions_control_registers_and_walks_are_told() {
    for engine in ENGINES {
        let dir = Scratch::new(&format!("trace-system-{engine}"));
        let (events, _) = traced(&dir, &UNDEFINED, engine, "exception");
        let [event] = &events[..] else { panic!("{engine}: {events:?}") };
        assert!(event["vector"] == 6 && event["rip"] == "0x7c0d", "{engine}: {event}");

        // The lab guest switches to long mode: PAE, CR3, EFER.LME, PG, in this order (SDM 3A, 10.8.5).
        let lab = dir.path("lab.elf");
        fs::write(&lab, paravane_firmware::lab::LAB_ELF).expect("lab guest");
        let file = dir.path("lab-trace");
        let spec = format!("{},cr,msr,walk,flush", file.display());
        let status = command(&lab.display().to_string(), engine, &spec).status().expect("paravane runs");
        assert_eq!(status.code(), Some(0), "{engine}");
        let (events, _) = self::events(&file);
        let number = |v: &Value| {
            let text = v.as_str().unwrap_or("0x0");
            u64::from_str_radix(text.trim_start_matches("0x"), 16).expect("number")
        };
        let at = |what: &str, register: &str, bit: u64| {
            let found =
                events.iter().position(|e| e["register"] == register && number(&e["value"]) & bit != 0);
            found.unwrap_or_else(|| panic!("{engine}: no {what}"))
        };
        let (pae, lme) = (at("CR4.PAE", "cr4", 1 << 5), at("EFER.LME", "0xc0000080", 1 << 8));
        let pg = at("CR0.PG", "cr0", 1 << 31);
        assert!(pae < pg && lme < pg, "{engine}");
        // The lab guest maps the first addresses to themselves.
        let walks: Vec<&Value> =
            events.iter().filter(|e| e["kind"] == "walk" && !e["to"].is_null()).collect();
        assert!(!walks.is_empty() && walks.iter().all(|e| e["at"] == e["to"]), "{engine}: {walks:?}");
    }
}

#[test]
fn hypercalls_are_told_with_their_number() {
    for engine in ENGINES {
        let dir = Scratch::new(&format!("trace-hypercall-{engine}"));
        let (events, _) = traced(&dir, &HYPERCALL, engine, "hypercall,exception");
        let kinds: Vec<&str> = events.iter().map(|e| e["kind"].as_str().expect("text")).collect();
        assert_eq!(kinds, ["hypercall", "exception"], "{engine}");
        assert_eq!((&events[0]["value"], &events[0]["rip"]), (&"0x7".into(), &"0x7c0f".into()), "{engine}");
    }
}

/// What `paravane trace` makes of a file: exit code, lines, errors.
fn read(file: &Path, filters: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_paravane"));
    let out = command.arg("trace").arg(file).args(filters).output().expect("paravane runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (out.status.code(), text(&out.stdout), text(&out.stderr))
}

#[test]
fn the_compact_form_is_read_as_the_lines_it_would_have_been() {
    let dir = Scratch::new("trace-binary");
    let (file, lab) = (dir.path("binary"), dir.path("lab.elf"));
    fs::write(&lab, paravane_firmware::lab::LAB_ELF).expect("lab guest");
    let [ticks, counter] = [("ticks", &TICKS[..]), ("counter", &COUNTER)].map(|(name, code)| {
        fs::rename(sector(&dir, code), dir.path(name)).expect("sector");
        dir.path(name).display().to_string()
    });
    for (kernel, code, kinds) in
        [(counter, 11, "all,block,insn"), (ticks, 11, "all"), (lab.display().to_string(), 0, "all")]
    {
        let write = |form: &str, kinds: &str, to: &Path| {
            let status = command(&kernel, "jit", &format!("{},{kinds},wait{form}", to.display())).status();
            assert_eq!(status.expect("paravane runs").code(), Some(code), "{kinds}");
        };
        let lines = dir.path("lines");
        write("", kinds, &lines);
        write(",binary", kinds, &file);
        let expected = fs::read_to_string(&lines).expect("lines");
        assert!(expected.lines().count() > 50, "{expected}");
        let (code, said, told) = read(&file, &[]);
        assert!((code, said == expected, told.as_str()) == (Some(0), true, ""), "{told}");
        let size = |path: &Path| fs::metadata(path).expect("file").len();
        assert!(size(&file) * 5 < size(&lines), "{} of {} bytes", size(&file), size(&lines));
        // Filters choose what a trace with them would have held.
        write("", "port,device=pit", &lines);
        let expected = fs::read_to_string(&lines).expect("lines");
        let events = |text: &str| {
            text.lines().filter(|l| !l.contains("\"end\"")).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(events(&read(&file, &["port", "device=pit"]).1), events(&expected));
    }
}

#[test]
fn what_is_no_trace_or_not_all_of_one_is_told() {
    let dir = Scratch::new("trace-cut");
    let (kernel, file) = (sector(&dir, &COUNTER), dir.path("trace"));
    let told = |filters: &[&str], part: &str, lines: usize| {
        let (code, said, told) = read(&file, filters);
        assert!(code == Some(1) && told.contains(part) && told.lines().count() == 1, "{part}: {told}");
        assert_eq!(said.lines().count(), lines, "{said}");
    };
    told(&[], "No such file", 0);
    command(&kernel, "jit", &format!("{},port", file.display())).status().expect("paravane runs");
    told(&[], "no binary trace", 0);
    command(&kernel, "jit", &format!("{},port,binary", file.display())).status().expect("paravane runs");
    told(&["ports"], "'ports' is none of", 0);
    told(&["wait"], "'wait' is for writing", 0);
    assert_eq!(read(&file, &[]).1.lines().count(), 2);
    let whole = fs::read(&file).expect("trace");
    fs::write(&file, &whole[..whole.len() - 3]).expect("trace");
    told(&[], "cut off", 1);
}

#[test]
fn disks_and_queues_are_told() {
    let dir = Scratch::new("trace-dma");
    let (image, file) = (dir.image("disk", 1 << 20).display().to_string(), dir.path("trace"));
    let disk = format!("{image},bus=virtio");
    let spec = format!("{},dma,doorbell", file.display());
    let mut running = run(&guest("cloud"), "console=ttyS0 quiet", &["--disk", &disk, "--trace", &spec]);
    running.expect("/ #", 300);
    running.type_in("dd if=/dev/zero of=/dev/vda bs=4096 count=3 && sync && echo done; poweroff -f\n");
    assert_eq!(running.finish(SOON).0, Some(0));
    let (events, _) = self::events(&file);
    let sum: u64 = events
        .iter()
        .filter(|e| e["kind"] == "dma" && e["device"] == "disk0" && e["write"] == false)
        .map(|e| e["size"].as_u64().expect("size"))
        .sum();
    assert_eq!(sum, 3 * 4096, "what the disk read from guest memory");
    let rung = |device: &str| events.iter().any(|e| e["kind"] == "doorbell" && e["device"] == device);
    assert!(rung("virtio-blk0"), "{events:?}");
    // VIRTIO 1.2, 2.7.5, 2.7.8 and 5.2.6: descriptors have 16 bytes, elements of the used ring 8, a request's header 16, its status 1.
    let moved = |what: &str, size: u64, write: bool| {
        let of = |e: &&Value| e["what"] == what && e["size"] == size && e["write"] == write;
        let all = events.iter().filter(|e| e["kind"] == "dma" && e["device"] == "virtio-blk0");
        all.filter(of).count()
    };
    let requests = moved("request", 1, true);
    assert!(requests >= 1, "{requests}");
    assert_eq!(moved("request", 16, false), requests);
    assert_eq!(moved("ring", 8, true), requests);
    assert!(moved("descriptor", 16, false) > 2 * requests);
    assert_eq!(moved("descriptor", 16, true), 0, "drivers own descriptors");
}

#[test]
fn a_bus_master_is_told_with_its_descriptors() {
    for engine in ENGINES {
        let dir = Scratch::new(&format!("trace-prd-{engine}"));
        let (kernel, file) = (sector(&dir, &BUS_MASTER), dir.path("trace"));
        let mut command = command(&kernel, engine, &format!("{},dma", file.display()));
        let status = command.args(["--disk", &marked_disk(&dir)]).status().expect("paravane runs");
        assert_eq!(status.code(), Some(11), "{engine}");
        let expected = serde_json::json!([
            {"kind": "dma", "device": "ide0", "at": "0x600", "size": 8, "write": false, "what": "prd"},
            {"kind": "dma", "device": "disk0", "at": "0x1000", "size": 512, "write": true, "what": "data"},
        ]);
        assert_eq!(Value::Array(events(&file).0), expected, "{engine}");
    }
}

#[test]
fn what_cannot_be_traced_is_refused_and_a_full_disk_ends_the_trace_alone() {
    let dir = Scratch::new("trace-refused");
    let kernel = sector(&dir, &TICKS);
    let told = |spec: &str| {
        let out = command(&kernel, "jit", spec).output().expect("paravane runs");
        (out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    for (spec, part) in [
        ("port", "names no file"),
        ("t.jsonl,ports", "'ports' is none of"),
        ("t.jsonl,addr=here", "'here' is no number"),
        ("/no/where/t.jsonl,port", "No such file"),
    ] {
        let (code, text) = told(spec);
        assert!(code == Some(1) && text.contains(part), "{spec}: {text}");
    }
    let (code, text) = told("/dev/full,insn,wait");
    assert_eq!(code, Some(11), "{text}");
    assert!(text.contains("No space left") && text.contains("the guest runs on"), "{text}");
}

#[test]
fn the_debugger_switches_tracing_on_and_off() {
    for engine in ENGINES {
        let dir = Scratch::new(&format!("trace-monitor-{engine}"));
        let (kernel, file) = (sector(&dir, &COUNTER), dir.path("trace"));
        let arguments = ["--kernel", &kernel, "--engine", engine, "--memory", "64M", "--serial", "none"];
        let (running, socket) = start(&dir, &[&arguments[..], &["--debug-exit", "0xf4", "--wait"]].concat());
        let on = format!("monitor trace on {},insn,addr=0x7c05-0x7c06", file.display());
        let said = gdb(
            &socket,
            &[
                "hbreak *0x7c10",
                "stepi",
                "stepi",
                &on,
                "stepi",
                "stepi",
                "stepi",
                "monitor trace off",
                "continue",
                "continue",
            ],
        );
        has(&said, &["events go to", "nothing is traced", "Breakpoint 1", "exited with code 013"]);
        let (events, _) = self::events(&file);
        let texts: Vec<&str> = events.iter().map(|e| e["text"].as_str().expect("text")).collect();
        assert_eq!(texts, ["inc ax", "dec cx"], "{engine}");
        assert_eq!(running.finish(SOON).0, Some(11), "{engine}");
    }
}

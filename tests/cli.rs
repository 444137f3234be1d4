//! The command line as a user meets it: one clear line and exit code 1 for what cannot be, and no image touched.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

fn paravane(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_paravane"))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .expect("paravane starts")
}

/// The one line on standard error of a refused command.
fn refusal(args: &[&str]) -> String {
    let output = paravane(args);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{args:?}: {text}");
    assert_eq!(text.lines().count(), 1, "{args:?}: {text}");
    assert!(text.starts_with("paravane: "), "{args:?}: {text}");
    text
}

/// A directory of our own, removed afterwards.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let dir = std::env::temp_dir().join(format!("paravane-cli-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).expect("scratch directory");
        Scratch(dir)
    }

    fn file(&self, name: &str, content: &[u8]) -> String {
        let path = self.0.join(name);
        fs::write(&path, content).expect("scratch file");
        path.display().to_string()
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.0);
    }
}

/// A boot sector that powers nothing off but writes 5 to the debug-exit port: exit code 11.
fn exit_11() -> Vec<u8> {
    // mov al, 5; out 0xf4, al; hlt; jmp $-1
    let mut sector = vec![0xB0, 5, 0xE6, 0xF4, 0xF4, 0xEB, 0xFD];
    sector.resize(510, 0);
    sector.extend([0x55, 0xAA]);
    sector
}

#[test]
fn help_and_version_succeed() {
    for args in [&["--help"][..], &["run", "--help"], &["compare", "--help"], &["--version"]] {
        let output = paravane(args);
        assert!(output.status.success(), "{args:?}");
        assert!(!output.stdout.is_empty() && output.stderr.is_empty(), "{args:?}");
    }
    let help = String::from_utf8(paravane(&["run", "--help"]).stdout).expect("text");
    for option in ["--kernel", "--disk", "--serial", "--debug-exit", "Ctrl-A x", "Exit status"] {
        assert!(help.contains(option), "{option}");
    }
}

#[test]
fn nonsense_is_refused() {
    for args in [&[][..], &["fly"], &["run", "--wings"], &["run", "--cpus", "many"], &["run"]] {
        refusal(args);
    }
    assert!(refusal(&["run", "--initrd", "x"]).contains("--kernel"));
}

#[test]
fn lockstep_refuses_what_it_would_not_do() {
    for (more, name) in [
        (&["--engine", "interp"][..], "--engine"),
        (&["--serial", "stdio"], "--serial"),
        (&["--gdb", ":0"], "--gdb"),
        (&["--stats", "x"], "--stats"),
        (&["--symbols", "x"], "--symbols"),
        (&["--reboot"], "--reboot"),
        (&["--stride", "0"], "--stride"),
        (&["--cpus", "2"], "--cpus"),
    ] {
        let args = [&["lockstep", "--kernel", "k"][..], more].concat();
        assert!(refusal(&args).contains(name), "{args:?}");
    }
}

#[test]
fn what_is_not_there_yet_is_refused_by_name() {
    let with_kernel = |more: &[&'static str]| {
        let mut args = vec!["run", "--kernel", "k"];
        args.extend(more);
        refusal(&args)
    };
    for (args, name) in [
        (&["--net", "user"][..], "--net user"),
        (&["--cdrom", "x"], "--cdrom"),
        (&["--floppy", "x"], "--floppy"),
        (&["--bios", "x"], "--bios"),
        (&["--console", "x"], "--console"),
        (&["--display", "vnc=127.0.0.1:5900"], "--display vnc"),
        (&["--screenshot", "x.png"], "--screenshot"),
        (&["--control", "unix=x"], "--control"),
        (&["--personality", "kvm"], "--personality kvm"),
        (&["--disk", "a,bus=pvscsi"], "bus=pvscsi"),
        (&["--disk", "a,format=qcow2"], "format=qcow2"),
    ] {
        let text = with_kernel(args);
        assert!(text.contains(name) && text.contains("not there yet"), "{text}");
    }
    assert!(refusal(&["image", "create", "--size", "1G"]).contains("image: not there yet"));
    assert!(refusal(&["compare", "net"]).contains("compare net: not there yet"));
    assert!(refusal(&["run", "--disk", "a"]).contains("booting from a disk"));
}

#[test]
fn bad_kernels_and_initrds_are_told_from_each_other() {
    let dir = Scratch::new("kernels");
    let empty = dir.file("empty", b"");
    let text = dir.file("text", b"This is not a kernel.");
    let elf = dir.file("elf", b"\x7FELF");
    let mut header = vec![0; 0x1000];
    header[0x1F1] = 4;
    header[0x1FE..0x200].copy_from_slice(&[0x55, 0xAA]);
    header[0x201..0x206].copy_from_slice(b"\x6aHdrS");
    header[0x206..0x208].copy_from_slice(&0x20Fu16.to_le_bytes());
    header[0x1F4..0x1F8].copy_from_slice(&0x1_0000u32.to_le_bytes());
    header[0x211] = 1;
    let cut = dir.file("cut", &header);
    let good = dir.file("good", &exit_11());
    for (kernel, word) in [
        (dir.path("missing"), "cannot read"),
        (empty.clone(), "empty"),
        (text, "not a kernel"),
        (elf, "truncated"),
        (cut, "truncated"),
        (dir.0.display().to_string(), "cannot read"),
    ] {
        let line = refusal(&["run", "--kernel", &kernel]);
        assert!(line.contains(&kernel) && line.contains(word), "{line}");
    }
    for (initrd, word) in [(dir.path("missing"), "cannot read"), (empty, "empty")] {
        let line = refusal(&["run", "--kernel", &good, "--initrd", &initrd]);
        assert!(line.contains(&initrd) && line.contains(word), "{line}");
    }
}

#[test]
fn absurd_machines_are_refused() {
    let dir = Scratch::new("machines");
    let kernel = dir.file("kernel", &exit_11());
    for memory in ["1", "0", "900T", "99999999T", "lots", "-5M"] {
        let option = format!("--memory={memory}");
        assert!(refusal(&["run", "--kernel", &kernel, &option]).contains("--memory"), "{memory}");
    }
    let line = refusal(&["run", "--kernel", &kernel, "--cpu", "z80"]);
    assert!(line.contains("z80") && line.contains("max"), "{line}");
    assert!(refusal(&["run", "--kernel", &kernel, "--engine", "steam"]).contains("steam"));
    for cpus in ["0", "17", "4294967295"] {
        let line = refusal(&["run", "--kernel", &kernel, "--cpus", cpus]);
        assert!(line.contains("--cpus") && line.contains("1 to 16"), "{line}");
    }
    assert!(refusal(&["run", "--kernel", &kernel, "--debug-exit", "high"]).contains("--debug-exit"));
}

#[test]
fn bad_images_are_refused_and_left_alone() {
    let dir = Scratch::new("images");
    let kernel = dir.file("kernel", &exit_11());
    let disk = |spec: &str| refusal(&["run", "--kernel", &kernel, "--serial", "none", "--disk", spec]);
    assert!(disk(&dir.path("missing")).contains("missing"));
    assert!(disk(&dir.file("empty", b"")).contains("empty"));
    assert!(disk(&dir.file("odd", &[0; 700])).contains("512"));
    assert!(disk(&dir.0.display().to_string()).contains("directory"));
    let held = dir.file("held", &[7; 1024]);
    let lock = File::options().read(true).write(true).open(&held).expect("image");
    lock.lock().expect("lock");
    assert!(disk(&held).contains("in use"));
    assert!(disk(&format!("{held},bus=virtio")).contains("in use"));
    assert_eq!(fs::read(&held).expect("image"), [7; 1024]);
    for name in ["a", "b", "c", "d", "e"] {
        dir.file(name, &[0; 512]);
    }
    let mut args = vec!["run".to_owned(), "--kernel".into(), kernel.clone()];
    args.extend(["a", "b", "c", "d", "e"].iter().flat_map(|n| ["--disk".to_owned(), dir.path(n)]));
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    assert!(refusal(&args).contains("four"));
}

#[test]
fn a_refused_run_changes_no_file() {
    let dir = Scratch::new("untouched");
    let log = dir.file("log", b"keep me");
    let image = dir.file("image", &[9; 1024]);
    let serial = format!("file={log}");
    refusal(&["run", "--kernel", &dir.path("none"), "--serial", &serial, "--disk", &image]);
    assert_eq!(fs::read(&log).expect("log"), b"keep me");
    assert_eq!(fs::read(&image).expect("image"), [9; 1024]);
}

#[test]
fn the_debug_exit_port_gives_the_exit_code() {
    let dir = Scratch::new("exit");
    let kernel = dir.file("kernel", &exit_11());
    for engine in ["jit", "interp"] {
        let stats = dir.path("stats.json");
        let args = [
            "run",
            "--kernel",
            &kernel,
            "--engine",
            engine,
            "--debug-exit",
            "0xf4",
            "--memory",
            "16M",
            "--stats",
            &stats,
        ];
        let output = paravane(&args);
        assert_eq!(output.status.code(), Some(11), "{engine}: {}", String::from_utf8_lossy(&output.stderr));
        let text = fs::read_to_string(&stats).expect("stats");
        assert!(text.contains("\"exits_pio\": 1"), "{text}");
    }
}

/// A real-mode program with an unmasked x87 error, as on a PC/AT: FERR# is IRQ 13, whose handler writes port F0h, computes with the
/// error pending (IGNNE#), clears it and returns to the instruction that waited. Twice, adding 2 each time.
#[test]
fn x87_errors_go_through_irq_13() {
    let dir = Scratch::new("irq13");
    //          cli; DS = SS = 0; SP = 7000h; INT 75h is the handler
    //          8259As: vectors 8 and 70h, inputs 2 and 13 open; CR0: NE, EM, TS and MP clear
    //          fninit; fldcw 37Bh; sti; fld1; fldz; fdivp; fld1; fldz; fdivp; fldz
    //          mov al, [500h]; out F4h, al; hlt
    // handler: out F0h, al; fld1; fld1; faddp; fistp [502h]; fnclex; mov al, [502h]; add [500h], al; EOIs; iret
    let mut sector = vec![
        0xFA, 0x31, 0xC0, 0x8E, 0xD8, 0x8E, 0xD0, 0xBC, 0x00, 0x70, 0xC7, 0x06, 0xD4, 0x01, 0x48, 0x7C, 0xC7,
        0x06, 0xD6, 0x01, 0x00, 0x00, 0xBE, 0x64, 0x7C, 0xB9, 0x0A, 0x00, 0xAD, 0x0F, 0xB6, 0xD0, 0x86, 0xC4,
        0xEE, 0xE2, 0xF7, 0x0F, 0x20, 0xC0, 0x24, 0xD3, 0x0F, 0x22, 0xC0, 0xDB, 0xE3, 0xD9, 0x2E, 0x78, 0x7C,
        0xFB, 0xD9, 0xE8, 0xD9, 0xEE, 0xDE, 0xF9, 0xD9, 0xE8, 0xD9, 0xEE, 0xDE, 0xF9, 0xD9, 0xEE, 0xA0, 0x00,
        0x05, 0xE6, 0xF4, 0xF4, 0xE6, 0xF0, 0xD9, 0xE8, 0xD9, 0xE8, 0xDE, 0xC1, 0xDF, 0x1E, 0x02, 0x05, 0xDB,
        0xE2, 0xA0, 0x02, 0x05, 0x00, 0x06, 0x00, 0x05, 0xB0, 0x20, 0xE6, 0xA0, 0xE6, 0x20, 0xCF, 0x20, 0x11,
        0x21, 0x08, 0x21, 0x04, 0x21, 0x01, 0xA0, 0x11, 0xA1, 0x70, 0xA1, 0x02, 0xA1, 0x01, 0x21, 0xFB, 0xA1,
        0xDF, 0x7B, 0x03,
    ];
    sector.resize(510, 0);
    sector.extend([0x55, 0xAA]);
    let kernel = dir.file("kernel", &sector);
    for engine in ["jit", "interp"] {
        let args =
            ["run", "--kernel", &kernel, "--engine", engine, "--debug-exit", "0xf4", "--memory", "16M"];
        let output = paravane(&args);
        let code = 4 << 1 | 1;
        assert_eq!(output.status.code(), Some(code), "{engine}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// A run with `args` ends in a triple fault on both engines, and what is said of it has these parts.
fn explained(args: &[&str], parts: &[&str]) {
    for engine in ["jit", "interp"] {
        let output = paravane(&[&["run", "--engine", engine], args].concat());
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{engine}: {text}");
        for part in parts {
            assert!(text.contains(part), "{engine}: {part} in\n{text}");
        }
    }
}

#[test]
fn a_perf_map_names_stubs_and_blocks_of_the_code_that_ran() {
    let dir = Scratch::new("perf");
    let kernel = dir.file("kernel", &exit_11());
    let run = ["run", "--kernel", &kernel, "--debug-exit", "0xf4", "--memory", "16M", "--perf-map"];
    let child = Command::new(env!("CARGO_BIN_EXE_paravane")).args(run).stdin(Stdio::null()).spawn();
    let mut child = child.expect("paravane starts");
    let map = PathBuf::from(format!("/tmp/perf-{}.map", child.id()));
    assert_eq!(child.wait().expect("its end").code(), Some(11));
    let text = fs::read_to_string(&map).expect("the map");
    fs::remove_file(&map).expect("the map");
    let mut pieces = Vec::new();
    for line in text.lines() {
        let [at, len, name] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
        let [at, len] = [at, len].map(|n| u64::from_str_radix(n, 16).expect("hexadecimal"));
        assert!(len > 0 && (name.starts_with("paravane_") || name.contains('@')), "{line}");
        pieces.push(at..at + len);
    }
    pieces.sort_by_key(|piece| piece.start);
    assert!(pieces.windows(2).all(|pair| pair[0].end <= pair[1].start), "{text}");
    for name in ["paravane_enter", "paravane_exit", "paravane_miss", "guest_kernel@7c00"] {
        assert!(text.lines().any(|line| line.ends_with(&format!(" {name}"))), "{name}: {text}");
    }
}

#[test]
fn a_triple_fault_ends_with_3_and_a_dossier() {
    let dir = Scratch::new("triple");
    // lidt [zero]; int3, with a limit of 0: no gate, no double fault, no way out.
    let mut sector = vec![0x0F, 0x01, 0x1E, 0x10, 0x7C, 0xCC];
    sector.resize(510, 0);
    sector.extend([0x55, 0xAA]);
    let kernel = dir.file("kernel", &sector);
    let parts = [
        "triple fault",
        "rip 0x7c05",
        "1. #BP at rip 0x7c05 could not be delivered: the vector lies beyond",
        "vector table entry 3: beyond the limit, 0x0",
        "which raised #GP",
        "#DF",
        "after a double fault that is the end",
        "last blocks",
        "int3",
    ];
    explained(&["--kernel", &kernel, "--memory", "16M"], &parts);
}

#[test]
fn a_triple_fault_in_long_mode_is_explained() {
    let dir = Scratch::new("explained");
    // The lab guest has no IDT yet where its main function starts: a #UD there has no way out.
    let mut elf = paravane_firmware::lab::LAB_ELF.to_vec();
    let fninit_call = elf.windows(3).position(|w| w == [0xDB, 0xE3, 0xE8]).expect("FNINIT; CALL");
    elf[fninit_call..fninit_call + 2].copy_from_slice(&[0x0F, 0x0B]);
    let kernel = dir.file("broken.elf", &elf);
    let parts = [
        "1. #UD at rip 0x2000",
        "<lab_long+0x",
        "beyond the IDT's limit",
        "2. #GP(0x33)",
        "3. #DF(0x0)",
        "64-bit mode, CPL 0",
        "ud2",
    ];
    let args = ["--kernel", &kernel, "--memory", "64M", "--serial", "none", "--symbols", &kernel];
    explained(&args, &parts);
    let line = refusal(&["run", "--kernel", &kernel, "--symbols", &dir.file("none", b"MZ")]);
    assert!(line.contains("--symbols") && line.contains("ELF"), "{line}");
}

#[test]
fn a_triple_fault_resets_the_machine_if_that_is_wanted() {
    let dir = Scratch::new("reset");
    // The first time: mark memory, then no IDT and INT3. After the reset, which keeps memory: out F4h, 5.
    //   cmp byte [600h], 77h; je 7C12h; mov byte [600h], 77h; lidt [7C20h]; int3; 7C12h: mov al, 5; out F4h, al
    let mut sector = vec![
        0x80, 0x3E, 0x00, 0x06, 0x77, 0x74, 0x0B, 0xC6, 0x06, 0x00, 0x06, 0x77, 0x0F, 0x01, 0x1E, 0x20, 0x7C,
        0xCC,
    ];
    sector.extend([0xB0, 5, 0xE6, 0xF4, 0xEB, 0xFE]);
    sector.resize(510, 0);
    sector.extend([0x55, 0xAA]);
    let kernel = dir.file("kernel", &sector);
    for engine in ["jit", "interp"] {
        let args = [
            "run",
            "--kernel",
            &kernel,
            "--engine",
            engine,
            "--memory",
            "16M",
            "--debug-exit",
            "0xf4",
            "--reboot",
        ];
        let output = paravane(&args);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(11), "{engine}: {text}");
        assert!(text.contains("is reset") && text.contains("#BP"), "{engine}: {text}");
    }
    assert!(refusal(&["run", "--kernel", &kernel, "--reboot", "--no-reboot"]).contains("--no-reboot"));
}

#[test]
fn doctor_says_what_runs_here() {
    let output = paravane(&["doctor"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(matches!(output.status.code(), Some(0 | 1)), "{text}");
    for word in ["BMI2", "address space", "/dev/kvm", "memory", "terminal", "translator"] {
        assert!(text.contains(word), "{word} in {text}");
    }
}

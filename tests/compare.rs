//! `compare disk` and the lab guest, whole: the program's main job on a small scale.

use paravane_firmware::lab::{Bus, Job, LAB_ELF, Op, Transfer, command_line, pattern};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn paravane(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_paravane"))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .expect("paravane starts")
}

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let dir = std::env::temp_dir().join(format!("paravane-compare-test-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).expect("scratch directory");
        Scratch(dir)
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

#[test]
fn a_quick_comparison_has_every_line_and_its_costs() {
    let dir = Scratch::new("quick");
    let json = dir.path("result.json");
    let output = paravane(&["compare", "disk", "--quick", "--runs", "1", "--json", &json]);
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for word in ["IDE PIO", "IDE DMA", "virtio-blk", "depth 32", "all data verified"] {
        assert!(table.contains(word), "{word} in\n{table}");
    }
    let text = fs::read_to_string(json).expect("results");
    let all: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(all["verified"], true);
    let lines = all["results"].as_array().expect("lines");
    // Three devices, four tests at depth 1; two more where there is a queue.
    assert_eq!(lines.len(), 3 * 4 + 2);
    for line in lines {
        let cost = |name: &str| line["per_operation"][name].as_f64().expect("number");
        assert!(line["median"].as_f64().is_some_and(|m| m > 0.0), "{line}");
        assert!(cost("guest_instructions") > 10.0 && cost("host_cpu_us") > 0.0, "{line}");
        let virtio = line["device"] == "virtio-blk";
        assert_eq!(cost("doorbells") > 0.0, virtio, "{line}");
        assert_eq!(cost("pio") >= 1.0, !virtio, "{line}");
        assert_eq!(cost("bytes_copied") > 0.0, line["device"] == "ide-pio", "{line}");
    }
}

/// One lab guest under the instruction clock: what it said and every counter but the host's.
fn deterministic_run(
    dir: &Scratch,
    kernel: &str,
    image: &Path,
    append: &str,
) -> (Vec<u8>, serde_json::Value) {
    let stats = dir.path("stats.json");
    let disk = format!("{},bus=virtio,snapshot=on", image.display());
    let args = [
        "run",
        "--kernel",
        kernel,
        "--append",
        append,
        "--memory",
        "64M",
        "--disk",
        &disk,
        "--clock",
        "instructions",
        "--stats",
        &stats,
    ];
    let output = paravane(&args);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let mut all: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(stats).expect("stats")).expect("JSON");
    let groups = all.as_object_mut().expect("groups");
    groups.remove("host");
    // How often a sleeping worker was woken is the host's affair.
    groups["disk0"].as_object_mut().expect("disk").remove("wakes");
    (output.stdout, all)
}

#[test]
fn the_instruction_clock_makes_runs_identical() {
    let dir = Scratch::new("deterministic");
    let kernel = dir.path("lab.elf");
    fs::write(&kernel, LAB_ELF).expect("lab guest");
    let mut image = vec![0; 4 << 20];
    for (lba, sector) in image.as_chunks_mut::<512>().0.iter_mut().enumerate() {
        pattern(lba as u64, 1, sector);
    }
    let path = dir.0.join("image");
    fs::write(&path, &image).expect("image");
    let job = |op, depth, seed, start| Job {
        bus: Bus::Virtio,
        index: 0,
        transfer: Transfer::Virtio,
        op,
        size: 4096,
        depth,
        count: 100,
        seed,
        start,
        span: 2 << 20,
    };
    let append = command_line(&[job(Op::RandRead, 8, 1, 0), job(Op::RandWrite, 32, 2, 2 << 20)]);
    let first = deterministic_run(&dir, &kernel, &path, &append);
    let second = deterministic_run(&dir, &kernel, &path, &append);
    assert_eq!(String::from_utf8_lossy(&first.0), String::from_utf8_lossy(&second.0));
    assert!(String::from_utf8_lossy(&first.0).contains("status=ok"));
    assert_eq!(first.1, second.1);
    assert_eq!(fs::read(&path).expect("image"), image, "snapshot=on");
}

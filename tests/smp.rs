//! Several processors: started, interrupted, reset and counted, in both engines and by both clocks; Linux on 2 and 4.

mod common;
#[path = "smp/guest.rs"]
mod smp_guest;

use common::{Running, Scratch, guest, run};
use std::process::Command;

/// Seconds for the small guest on a busy host, and for a boot.
const SOON: u64 = 120;
const BOOT: u64 = 300;

/// Runs the small guest; its exit code.
fn small(dir: &Scratch, more: &[&str]) -> Option<i32> {
    run_image(dir, &smp_guest::image(), more)
}

fn run_image(dir: &Scratch, image: &[u8], more: &[&str]) -> Option<i32> {
    let kernel = dir.path("smp");
    std::fs::write(&kernel, image).expect("kernel");
    let mut command = Command::new(env!("CARGO_BIN_EXE_paravane"));
    command.args(["run", "--memory", "64M", "--serial", "none", "--debug-exit", "0xf4", "--kernel"]);
    command.arg(kernel).args(more);
    Running::start(command).finish(SOON).0
}

const RIGHT: Option<i32> = Some((smp_guest::RIGHT << 1 | 1) as i32);

#[test]
fn processors_start_count_are_interrupted_and_lose_pages() {
    let dir = Scratch::new("smp-small");
    // By the host's clock all of them want a host processor at once; taking turns they do not.
    for more in [
        &["--cpus", "2"][..],
        &["--cpus", "4"],
        &["--cpus", "3", "--engine", "interp"],
        &["--cpus", "3", "--clock", "instructions", "--engine", "interp"],
        &["--cpus", "4", "--clock", "instructions"],
        &["--cpus", "16", "--clock", "instructions"],
    ] {
        assert_eq!(small(&dir, more), RIGHT, "{more:?}");
    }
}

#[test]
fn tsc_deadlines_go_by_the_adjusted_tsc() {
    let dir = Scratch::new("smp-deadline");
    for engine in ["jit", "interp"] {
        assert_eq!(run_image(&dir, &smp_guest::deadline(), &["--engine", engine]), RIGHT, "{engine}");
    }
}

#[test]
fn linux_brings_all_processors_up_and_uses_them() {
    for cpus in ["2", "4"] {
        let mut running = run(&guest("cloud"), "console=ttyS0 no_timer_check", &["--cpus", cpus]);
        // Words are put together so that their echo on the terminal does not count.
        running.type_in(
            "echo n''proc $(nproc) of $(grep -c ^processor /proc/cpuinfo)\n\
             spin() { i=0; while [ $i -lt 150 ]; do i=$((i+1)); /bin/busybox true; done; echo spun; }\n\
             for n in 1 2 3 4; do spin & done; wait\n\
             echo d''one; poweroff -f\n",
        );
        let (code, said) = running.finish(BOOT);
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains(&format!("nproc {cpus} of {cpus}")), "{said}");
        assert_eq!(said.lines().filter(|l| l.trim_end().ends_with("spun")).count(), 4, "{said}");
        let lower = said.to_lowercase();
        for complaint in ["unsynchronized", "warning:", "bug:", "call trace", "lockup", "stall"] {
            assert!(!lower.contains(complaint), "{complaint}:\n{said}");
        }
        assert!(said.contains("done"), "{said}");
    }
}

#[test]
fn a_reset_starts_all_processors_again() {
    let running = run(&guest("cloud"), "console=ttyS0 no_timer_check pv.run=reboot", &["--cpus", "2"]);
    running.expect_times("Brought up 1 node, 2 CPUs", 2, 2 * BOOT);
}

#[test]
fn two_processors_do_the_same_twice_by_the_instruction_clock() {
    let dir = Scratch::new("smp-twice");
    let [first, second] = ["first", "second"].map(|name| {
        let stats = dir.path(name).display().to_string();
        let more = ["--cpus", "2", "--clock", "instructions", "--stats", &stats];
        let (code, said) = run(&guest("cloud"), "console=ttyS0 pv.run=poweroff", &more).finish(BOOT);
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("Brought up 1 node, 2 CPUs"), "{said}");
        let text = std::fs::read_to_string(&stats).expect("statistics");
        let stats: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        for cpu in ["cpu0", "cpu1"] {
            let counted = |name| stats[cpu][name].as_u64().is_some_and(|n| n > 0);
            assert!(counted("instructions") && counted("interrupts_taken"), "{cpu} in {text}");
        }
        (said, stats["cpu0"].clone(), stats["cpu1"].clone())
    });
    assert_eq!(first, second);
}

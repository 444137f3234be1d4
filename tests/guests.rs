//! Real guests, whole machine: the Debian kernels boot, use their disks, power off and reboot, and do the same in both
//! engines and in every run by the instruction clock.

mod common;

use common::{Guest, Scratch, guest, run};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

/// Seconds a boot may take on a busy host, by engine.
const BOOT: u64 = 300;
const SLOW_BOOT: u64 = 1200;

/// `yes "paravane disktest DEVICE" | head -c BYTES`.
fn disktest_pattern(device: &str, bytes: usize) -> Vec<u8> {
    format!("paravane disktest {device}\n").bytes().cycle().take(bytes).collect()
}

fn disk(path: &Path, more: &str) -> String {
    format!("{}{more}", path.display())
}

fn boots_and_powers_off(name: &str, more: &[&str], seconds: u64) {
    let (code, said) = run(&guest(name), "console=ttyS0 pv.run=poweroff", more).finish(seconds);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("paravane: init reached"), "{said}");
}

#[test]
fn the_cloud_kernel_boots_and_powers_off() {
    boots_and_powers_off("cloud", &[], BOOT);
}

#[test]
fn the_cloud_kernel_boots_in_the_interpreter() {
    boots_and_powers_off("cloud", &["--engine", "interp"], SLOW_BOOT);
}

#[test]
fn the_generic_kernel_boots_and_powers_off() {
    boots_and_powers_off("amd64", &[], BOOT);
}

#[test]
fn what_linux_writes_to_either_disk_is_in_the_image() {
    let dir = Scratch::new("disks");
    let (a, b) = (dir.image("a", 16 << 20), dir.image("b", 16 << 20));
    let more = ["--disk", &disk(&a, ""), "--disk", &disk(&b, ",bus=virtio")];
    let append = "console=ttyS0 pv.run=disktest pv.wait=sda,vda pv.megabytes=4";
    let (code, said) = run(&guest("cloud"), append, &more).finish(BOOT);
    assert_eq!(code, Some(0), "{said}");
    for (device, image) in [("sda", &a), ("vda", &b)] {
        let line = said.lines().find(|l| l.starts_with(&format!("disktest: device={device} ")));
        assert!(line.is_some_and(|l| l.trim_end().ends_with("same")), "{device}:\n{said}");
        let data = fs::read(image).expect("image");
        assert!(data[..4 << 20] == disktest_pattern(device, 4 << 20), "{device}: wrong data in the image");
        assert!(data[4 << 20..].iter().all(|&x| x == 0), "{device}: written past the end of the test");
    }
}

#[test]
fn a_snapshot_leaves_the_image_alone() {
    let dir = Scratch::new("snapshot");
    let a = dir.image("a", 8 << 20);
    let append = "console=ttyS0 quiet pv.run=disktest pv.disktest=vda pv.wait=vda pv.megabytes=1";
    let (code, said) =
        run(&guest("cloud"), append, &["--disk", &disk(&a, ",bus=virtio,snapshot=on")]).finish(BOOT);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("same"), "{said}");
    assert!(fs::read(&a).expect("image").iter().all(|&x| x == 0));
}

#[test]
fn reboot_boots_again_and_no_reboot_ends() {
    let guest = guest("cloud");
    let running = run(&guest, "console=ttyS0 quiet pv.run=reboot", &[]);
    running.expect_times("paravane: init reached", 2, 2 * BOOT);
    drop(running);
    let (code, said) = run(&guest, "console=ttyS0 quiet pv.run=reboot", &["--no-reboot"]).finish(BOOT);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(said.matches("paravane: init reached").count(), 1, "{said}");
}

#[test]
fn the_shell_listens_to_what_is_piped_in() {
    let mut running = run(&guest("cloud"), "console=ttyS0 quiet", &[]);
    running.type_in("echo answer $((6 * 7))\npoweroff -f\n");
    running.stdin = None;
    let (code, said) = running.finish(BOOT);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("answer 42"), "{said}");
}

#[test]
fn serial_ports_go_to_sockets_and_files() {
    let dir = Scratch::new("serial");
    let (socket, log) = (dir.path("com1"), dir.path("com2"));
    let serial = [format!("unix={}", socket.display()), format!("file={}", log.display())];
    let running =
        run(&guest("cloud"), "console=ttyS0 quiet", &["--serial", &serial[0], "--serial", &serial[1]]);
    let mut line = None;
    for _ in 0..1000 {
        line = UnixStream::connect(&socket).ok();
        if line.is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut line = line.expect("the socket is there");
    line.set_read_timeout(Some(Duration::from_secs(BOOT))).expect("time limit");
    line.write_all(b"echo to the file >/dev/ttyS1; echo answer $((6 * 7)); poweroff -f\n").expect("typed");
    let mut said = Vec::new();
    // The end of the run closes the line.
    let _closed = line.read_to_end(&mut said);
    assert_eq!(running.finish(BOOT).0, Some(0));
    assert!(String::from_utf8_lossy(&said).contains("answer 42"), "{}", String::from_utf8_lossy(&said));
    assert!(fs::read_to_string(&log).expect("log").contains("to the file"));
    assert!(!socket.exists(), "the socket is given up");
}

#[test]
fn what_was_flushed_survives_a_kill() {
    let dir = Scratch::new("kill");
    for (bus, device) in [("ide", "sda"), ("virtio", "vda")] {
        let image = dir.image(bus, 16 << 20);
        let append = format!("console=ttyS0 quiet pv.wait={device}");
        let mut running = run(&guest("cloud"), &append, &["--disk", &disk(&image, &format!(",bus={bus}"))]);
        let write = "yes flushed | dd bs=64k count=16 iflag=fullblock";
        // The word is put together so that its echo on the terminal does not count.
        running.type_in(&format!(
            "{write} of=/dev/{device} conv=fsync && echo fl''ushed-now; dd if=/dev/zero of=/dev/{device} bs=64k seek=16 count=200\n"
        ));
        running.expect("flushed-now", BOOT);
        running.kill();
        let data = fs::read(&image).expect("image");
        let wanted: Vec<u8> = b"flushed\n".iter().copied().cycle().take(1 << 20).collect();
        assert!(data[..1 << 20] == wanted, "{bus}: flushed data is not in the image");
    }
}

#[test]
fn the_installer_reaches_its_first_screen() {
    let running =
        run(&guest("installer-i386"), "console=ttyS0 TERM=vt102 priority=low", &["--cpu", "pentium3"]);
    running.expect("installer", 2 * BOOT);
}

#[test]
fn statistics_are_written_at_the_end() {
    let dir = Scratch::new("stats");
    let stats = dir.path("stats.json").display().to_string();
    let (code, said) =
        run(&guest("cloud"), "console=ttyS0 quiet pv.run=poweroff", &["--stats", &stats]).finish(BOOT);
    assert_eq!(code, Some(0), "{said}");
    let text = fs::read_to_string(&stats).expect("stats");
    let all: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    for (group, name) in [("cpu0", "exits_pio"), ("cpu0", "interrupts_taken"), ("serial0", "bytes_sent")] {
        assert!(all[group][name].as_u64().is_some_and(|n| n > 0), "{group}.{name} in {text}");
    }
}

fn lockstep(guest: &Guest, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_paravane"))
        .args(["lockstep", "--append", "console=ttyS0", "--kernel"])
        .arg(&guest.kernel)
        .arg("--initrd")
        .arg(&guest.initrd)
        .args(more)
        .output()
        .expect("paravane")
}

fn agree(guest: &Guest, more: &[&str]) {
    let output = lockstep(guest, more);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("agree over"), "{said}");
}

#[test]
fn the_engines_agree_on_every_block_of_an_amd64_boot() {
    agree(&guest("cloud"), &["--instructions", "40000000"]);
}

#[test]
fn the_engines_agree_on_every_block_of_an_i386_boot() {
    agree(&guest("installer-i386"), &["--instructions", "40000000"]);
}

#[test]
fn the_engines_agree_where_chained_blocks_are_cut_by_the_budget() {
    agree(&guest("cloud"), &["--instructions", "40000000", "--stride", "997"]);
}

#[test]
fn a_guest_does_the_same_twice_by_the_instruction_clock() {
    let dir = Scratch::new("twice");
    let [first, second] = ["first", "second"].map(|name| {
        let stats = dir.path(name).display().to_string();
        let more = ["--clock", "instructions", "--stats", &stats];
        let (code, said) = run(&guest("cloud"), "console=ttyS0 pv.run=poweroff", &more).finish(BOOT);
        assert_eq!(code, Some(0), "{said}");
        let text = std::fs::read_to_string(&stats).expect("statistics");
        let stats: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        (said, stats["cpu0"].clone(), stats["engine"].clone())
    });
    assert_eq!(first.0, second.0, "the console");
    assert_eq!(first.1, second.1, "instructions and exits");
    assert_eq!(first.2, second.2, "what the translator did");
}

//! The lab guest on an independent machine: `qemu-system-x86_64`, where it is installed.

use paravane_firmware::lab::{Bus, Job, LAB_ELF, Op, Report, SECTOR, Status, Transfer};
use paravane_firmware::lab::{command_line, parse_report, pattern};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

const SEED: u64 = 11;
const DISK: u64 = 32 << 20;
const QEMU: &str = "qemu-system-x86_64";

/// A disk with the pattern on all of it, or with one wrong byte.
fn make_disk(path: &Path, flaw: Option<u64>) {
    let mut file = BufWriter::new(File::create(path).unwrap());
    for lba in 0..DISK / SECTOR {
        let mut sector = [0; 512];
        pattern(lba, SEED, &mut sector);
        if flaw == Some(lba) {
            sector[100] ^= 1;
        }
        file.write_all(&sector).unwrap();
    }
}

fn have_qemu() -> bool {
    let found = Command::new(QEMU).arg("--version").output().is_ok();
    if !found {
        // Past the capture of passing tests.
        let _ = writeln!(
            std::io::stderr(),
            "NOT RUN: {QEMU} is not installed, the lab guest was not tried on a second machine"
        );
    }
    found
}

fn directory(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(&path).unwrap();
    path
}

fn boot(dir: &Path, disk_args: &[&str], jobs: &[Job]) -> Vec<Report> {
    let kernel = dir.join("lab.elf");
    fs::write(&kernel, LAB_ELF).unwrap();
    let output = Command::new("timeout")
        .args(["120", QEMU, "-machine", "pc", "-accel", "tcg", "-m", "64", "-nodefaults", "-display", "none"])
        .args(["-serial", "stdio", "-no-reboot", "-kernel"])
        .arg(&kernel)
        .args(["-append", &command_line(jobs)])
        .args(disk_args)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    eprintln!("{text}");
    text.lines().filter_map(parse_report).collect()
}

fn job(bus: Bus, transfer: Transfer, op: Op, size: u32, depth: u32) -> Job {
    let writes = op.writes();
    Job {
        bus,
        index: 0,
        transfer,
        op,
        size,
        depth,
        count: 300,
        seed: if writes { SEED + 1 } else { SEED },
        start: if writes { DISK / 2 } else { 0 },
        span: DISK / 2,
    }
}

const OPS: [Op; 4] = [Op::SeqRead, Op::RandRead, Op::SeqWrite, Op::RandWrite];

fn expect_clean(jobs: &[Job], reports: &[Report]) {
    assert_eq!(reports.len(), jobs.len());
    for (job, report) in jobs.iter().zip(reports) {
        assert_eq!(report.status, Status::Ok, "{job}: {report}");
        assert_eq!((report.ops, report.bytes), (300, 300 * u64::from(job.size)), "{job}");
        if job.depth == 1 && job.transfer != Transfer::Pio {
            assert_eq!(report.interrupts, report.ops, "{job}: one interrupt for each operation");
        }
    }
}

/// What the guest says it wrote is in the image.
fn expect_written(image: &Path, jobs: &[Job]) {
    let bytes = fs::read(image).unwrap();
    for job in jobs.iter().filter(|j| j.op.writes()) {
        let blocks = job.blocks(DISK / SECTOR);
        for i in 0..job.count {
            for s in 0..u64::from(job.size) / SECTOR {
                let lba = job.lba(i, blocks) + s;
                let mut want = [0; 512];
                pattern(lba, job.seed, &mut want);
                assert_eq!(bytes[(lba * SECTOR) as usize..][..512], want, "{job}: sector {lba}");
            }
        }
    }
}

#[test]
fn ide_by_pio_and_dma() {
    if !have_qemu() {
        return;
    }
    let dir = directory("ide");
    let image = dir.join("disk.img");
    make_disk(&image, None);
    let mut jobs = Vec::new();
    for transfer in [Transfer::Pio, Transfer::Dma] {
        for op in OPS {
            jobs.push(job(Bus::Ide, transfer, op, 4096, 1));
        }
        jobs.push(job(Bus::Ide, transfer, Op::SeqRead, 256 << 10, 1));
        jobs.push(job(Bus::Ide, transfer, Op::SeqWrite, 64 << 10, 1));
    }
    let drive = format!("file={},if=ide,format=raw", image.display());
    expect_clean(&jobs, &boot(&dir, &["-drive", &drive], &jobs));
    expect_written(&image, &jobs);
}

#[test]
fn virtio_with_msix_with_a_line_and_without_options() {
    if !have_qemu() {
        return;
    }
    let dir = directory("virtio");
    let image = dir.join("disk.img");
    let mut jobs = Vec::new();
    for depth in [1, 32] {
        for op in OPS {
            jobs.push(job(Bus::Virtio, Transfer::Virtio, op, 4096, depth));
        }
        jobs.push(job(Bus::Virtio, Transfer::Virtio, Op::SeqRead, 256 << 10, depth));
    }
    for options in [
        "disable-legacy=on",
        "disable-legacy=off",
        "disable-legacy=on,vectors=0",
        "disable-legacy=on,event_idx=off,indirect_desc=off",
        "disable-legacy=on,queue-size=16,indirect_desc=off",
    ] {
        make_disk(&image, None);
        let drive = format!("file={},if=none,id=d,format=raw", image.display());
        let device = format!("virtio-blk-pci,drive=d,{options}");
        expect_clean(&jobs, &boot(&dir, &["-drive", &drive, "-device", &device], &jobs));
        expect_written(&image, &jobs);
    }
}

#[test]
fn wrong_data_and_missing_disks_are_reported() {
    if !have_qemu() {
        return;
    }
    let dir = directory("flaw");
    let image = dir.join("disk.img");
    make_disk(&image, Some(8 * 299 + 3));
    let jobs = [
        job(Bus::Ide, Transfer::Dma, Op::SeqRead, 4096, 1),
        job(Bus::Virtio, Transfer::Virtio, Op::SeqRead, 4096, 1),
        Job { index: 1, ..job(Bus::Ide, Transfer::Dma, Op::SeqRead, 4096, 1) },
    ];
    let drive = format!("file={},if=ide,format=raw", image.display());
    let reports = boot(&dir, &["-drive", &drive], &jobs);
    let outcome: Vec<_> = reports.iter().map(|r| (r.status, r.mismatches)).collect();
    assert_eq!(outcome, [(Status::Mismatch, 1), (Status::NoDevice, 0), (Status::NoDevice, 0)]);
}

//! The lab guest: runs the jobs of its command line on IDE and virtio-blk disks, verifies the data, reports.
//!
//! A freestanding program on one processor without any OS. All of it is `unsafe` at heart: it owns every port and every
//! byte of memory. The invariants it relies on: memory below 4 GiB is mapped to itself; interrupts are enabled nowhere but in
//! [`irq::wait`]; statics are touched by one thread, and by interrupt handlers only while that thread waits.
#![no_std]
#![no_main]

#[path = "../src/lab/shared.rs"]
#[allow(dead_code)]
mod shared;

mod boot;
mod cell;
mod ide;
mod irq;
mod pci;
mod port;
mod rt;
mod serial;
mod virtio;
mod work;

use serial::println;
use shared::{Bus, Job, LAB_PORT, MARK_DONE, MARK_FAILED, MARK_JOB, Report, Status};

/// PM1a control: SLP_EN with the SLP_TYP of S5 on paravane, and on QEMU's PIIX4.
const POWER_OFF: [u16; 2] = [1 << 13 | 5 << 10, 1 << 13];
const PM1A_CNT: u16 = 0x604;

/// Called by the boot stub in 64-bit mode with the physical address of `hvm_start_info`.
#[unsafe(no_mangle)]
extern "C" fn lab_main(start_info: u64) -> ! {
    serial::init();
    let info = boot::StartInfo::read(start_info);
    let cmdline = info.cmdline();
    println!("lab: {} MiB at {:#x} for data", info.arena_len() >> 20, info.arena_start());
    irq::init();
    pci::init();
    let mut failed = false;
    for (number, job) in shared::jobs(cmdline).enumerate() {
        let number = number as u32;
        let report = match job {
            Ok(job) => run(&job, &info, number),
            Err(reason) => {
                println!("lab: job {number}: {reason}");
                failed = true;
                break;
            }
        };
        println!("{report}");
        port::out8(LAB_PORT, MARK_JOB);
        failed |= report.status != Status::Ok;
    }
    finish(failed)
}

fn run(job: &Job, info: &boot::StartInfo, number: u32) -> Report {
    let none = work::empty_report(number, Status::NoDevice);
    let arena = (info.arena_start(), info.arena_len());
    match job.bus {
        Bus::Ide => ide::Disk::open(job.index, job.transfer)
            .map_or(none, |mut disk| work::run(&mut disk, job, arena, number)),
        Bus::Virtio => {
            virtio::Disk::open(job.index).map_or(none, |mut disk| work::run(&mut disk, job, arena, number))
        }
    }
}

/// Tells the host how it went and powers off.
fn finish(failed: bool) -> ! {
    port::out8(LAB_PORT, if failed { MARK_FAILED } else { MARK_DONE });
    serial::drain();
    for value in POWER_OFF {
        port::out16(PM1A_CNT, value);
    }
    loop {
        irq::halt_for_good();
    }
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    println!("lab: {info}");
    finish(true)
}

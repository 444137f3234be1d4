//! Steps, device registers and several processors under the stock gdb, in both engines.

mod common;
#[path = "smp/guest.rs"]
mod smp_guest;

use common::Scratch;
use common::debugger::{SOON, gdb, has, sector, small};
use std::fs;

const ENGINES: [&str; 2] = ["jit", "interp"];
/// Both, by both clocks.
const CLOCKS: [(&str, &str); 4] =
    [("jit", "host"), ("interp", "host"), ("jit", "instructions"), ("interp", "instructions")];

/// Waits with interrupts off until the 8254's is pending, then lets it in; fills 100 bytes; runs into UD2.
///
/// ```text
/// 7C00 cli; vector 8 leads to 7C50h, vector 6 to 7C56h; 8259A: vectors from 8, IRQ 0 alone; 8254: counter 0, mode 2, 1193
/// 7C37 mov al, 0Ah; out 20h, al; in al, 20h; test al, 1; jz 7C3B         7C50 nop
/// 7C41 sti                 7C44 mov cx, 100       7C4A rep stosb         7C51 mov al, 20h; out 20h, al; iret
/// 7C42 nop; nop            7C47 mov di, 600h      7C4C ud2               7C56 mov al, 5; out F4h, al; jmp $
/// ```
const STEPS: [u8; 92] = [
    0xFA, 0x31, 0xC0, 0x8E, 0xD8, 0xC7, 0x06, 0x20, 0x00, 0x50, 0x7C, 0xA3, 0x22, 0x00, 0xC7, 0x06, 0x18,
    0x00, 0x56, 0x7C, 0xA3, 0x1A, 0x00, 0xB0, 0x11, 0xE6, 0x20, 0xB0, 0x08, 0xE6, 0x21, 0xB0, 0x04, 0xE6,
    0x21, 0xB0, 0x01, 0xE6, 0x21, 0xB0, 0xFE, 0xE6, 0x21, 0xB0, 0x34, 0xE6, 0x43, 0xB0, 0xA9, 0xE6, 0x40,
    0xB0, 0x04, 0xE6, 0x40, 0xB0, 0x0A, 0xE6, 0x20, 0xE4, 0x20, 0xA8, 0x01, 0x74, 0xFA, 0xFB, 0x90, 0x90,
    0xB9, 0x64, 0x00, 0xBF, 0x00, 0x06, 0xF3, 0xAA, 0x0F, 0x0B, 0xEB, 0xFE, 0x90, 0xB0, 0x20, 0xE6, 0x20,
    0xCF, 0xB0, 0x05, 0xE6, 0xF4, 0xEB, 0xFE,
];

#[test]
fn steps_go_over_sti_and_repetitions_and_into_handlers() {
    for engine in ENGINES {
        let dir = Scratch::new(&format!("gdb-steps-{engine}"));
        let kernel = sector(&dir, &STEPS);
        let (running, socket) = small(&dir, &kernel, engine, &["--wait"]);
        let at = "printf \"at %#lx, cx %d\\n\", $pc, $rcx & 0xffff";
        let said = gdb(
            &socket,
            &[
                "hbreak *0x7c41",
                "continue",
                "stepi",
                at,
                // The interrupt is pending all the time.
                "stepi",
                at,
                "monitor step-interrupts on",
                "stepi",
                at,
                "printf \"back to %#x\\n\", *(unsigned short *)$rsp",
                "monitor step-interrupts off",
                "hbreak *0x7c4a",
                "continue",
                at,
                "stepi",
                at,
                "stepi",
                at,
                "printf \"back to %#x\\n\", *(unsigned short *)$rsp",
                "continue",
            ],
        );
        has(
            &said,
            &[
                "at 0x7c42",
                "at 0x7c43",
                "at 0x7c50",
                "back to 0x7c43",
                "at 0x7c4a, cx 100",
                "at 0x7c4c, cx 0",
                "at 0x7c56",
                "back to 0x7c4c",
                "exited with code 013",
            ],
        );
        assert_eq!(running.finish(SOON).0, Some(11), "{engine}");
    }
}

#[test]
fn watchpoints_on_device_registers_stop_after_the_access() {
    for engine in ENGINES {
        let dir = Scratch::new(&format!("gdb-mmio-{engine}"));
        let kernel = several(&dir);
        let (running, socket) = small(&dir, &kernel, engine, &["--cpus", "2", "--wait"]);
        let said = gdb(
            &socket,
            &[
                // The boot processor switches its APIC on, then reads its identity.
                "monitor pwatch 0xfee000f0 4 write",
                "monitor pwatch 0xfee00022 1 access",
                "continue",
                "x/i $pc",
                "continue",
                "x/i $pc",
                "monitor why",
                "kill",
            ],
        );
        has(
            &said,
            &[
                "monitor watchpoint 1: write to physical 0xfee000f0",
                "push",
                "monitor watchpoint 2: read of physical 0xfee00022",
                "shr    $0x18,%eax",
                "a read of physical 0xfee00022",
                "load  0xfee00020",
            ],
        );
        assert_eq!(running.finish(SOON).0, Some(0), "{engine}");
    }
}

/// The guest for several processors as a file.
fn several(dir: &Scratch) -> String {
    let path = dir.path("several");
    fs::write(&path, smp_guest::image()).expect("kernel");
    path.display().to_string()
}

#[test]
fn every_processor_is_a_thread() {
    for (engine, clock) in CLOCKS {
        let dir = Scratch::new(&format!("gdb-smp-{engine}-{clock}"));
        let kernel = several(&dir);
        let (running, socket) = small(&dir, &kernel, engine, &["--cpus", "3", "--wait", "--clock", clock]);
        let places = smp_guest::places();
        let said = gdb(
            &socket,
            &[
                "info threads",
                // That looked at the others.
                "monitor vcpu 0",
                "monitor gdt",
                "monitor vcpu 9",
                &format!("hbreak *{:#x}", places.watching),
                "continue",
                "set $hit = $_thread",
                &format!("printf \"at %d, other %d\\n\", $rip == {:#x}, $hit != 1", places.watching),
                "monitor vcpus",
                "thread 1",
                "set $there = $rip",
                // Only the one that stopped goes on.
                "set scheduler-locking on",
                "thread $hit",
                "stepi",
                &format!("printf \"stepped %d %d\\n\", $_thread == $hit, $rip == {:#x}", places.watching),
                "thread 1",
                "printf \"stayed %d\\n\", $rip == $there",
                "set scheduler-locking off",
                "delete",
                // The boot processor steps while the others run.
                "stepi",
                "printf \"first %d\\n\", $_thread",
                &format!("hbreak *{:#x}", places.handler),
                "continue",
                "printf \"in the handler %d\\n\", $_thread != 1",
                "monitor registers general",
                &format!("printf \"up %d\\n\", *(int *){:#x}", places.online),
                "delete",
                "continue",
            ],
        );
        has(
            &said,
            &[
                "Thread 1.1 (vcpu0: 32-bit protected mode, CPL 0)",
                "Thread 1.3 (vcpu2: real mode, CPL 0, waits for a start-up IPI)",
                "the monitor speaks of vcpu0",
                "of vcpu0:\ngdt at",
                "'9' is the number of no vCPU",
                "at 1, other 1",
                "vcpu0: 32-bit",
                "vcpu1: ",
                "vcpu2: ",
                "stepped 1 0",
                "stayed 1",
                "first 1",
                "in the handler 1",
                &format!("rip {:#x}", places.handler),
                "up 3",
                "exited with code 013",
            ],
        );
        assert_eq!(running.finish(SOON).0, Some(11), "{engine}, {clock}");
    }
}

#[test]
fn a_triple_fault_names_its_processor() {
    for engine in ENGINES {
        let dir = Scratch::new(&format!("gdb-smp-fault-{engine}"));
        let kernel = several(&dir);
        let (running, socket) = small(&dir, &kernel, engine, &["--cpus", "2", "--wait"]);
        let places = smp_guest::places();
        let said = gdb(
            &socket,
            &[
                &format!("hbreak *{:#x}", places.watching),
                "continue",
                "delete",
                // UD2, for which there is no gate.
                &format!("set *(unsigned short *){:#x} = 0x0b0f", places.watching),
                "continue",
                "info threads",
                "monitor why",
                "kill",
            ],
        );
        has(
            &said,
            &["triple fault", "SIGSEGV", "* 2", "vcpu1: 32-bit", "#UD", "registers of vcpu1", "vcpu0 "],
        );
        assert_eq!(running.finish(SOON).0, Some(0), "{engine}");
    }
}

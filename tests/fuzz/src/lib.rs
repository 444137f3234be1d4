//! Fuzz targets: what a hostile guest or a hostile file may do, as functions of a byte string.
//!
//! A target returns, whatever it is given: it does not panic, does not hang (an input is a script of bounded steps), does
//! not take memory without bound, and does not reach what is not the guest's. `libfuzzer/` gives the targets to libFuzzer;
//! `tests/replay.rs` runs them over the committed corpus and a slice of random inputs on any toolchain.
#![forbid(unsafe_code)]

mod code;
mod disk;
mod ide;
mod image;
mod kernel;
mod pc;
mod random;
mod script;
mod traffic;
mod virtio;

pub use random::Random;

use pc::{BUS_MASTER, VIRTIO_SLOTS, virtio_bar, virtio_msix, virtio_ports};
use traffic::Window::{Config, Everywhere, Lapic, Mmio, Ports};
use traffic::{Traffic, Window};

/// What is attacked.
#[derive(Clone, Copy)]
enum Kind {
    Traffic(Traffic),
    Bytes(fn(&[u8])),
}

const fn traffic(windows: &'static [Window], structures: &'static [u64]) -> Kind {
    Kind::Traffic(Traffic { windows, structures })
}

const IOAPIC: Window = Mmio(0xFEC0_0000, 0x80);
const HPET: Window = Mmio(0xFED0_0000, 0x180);
const PICS: [Window; 3] = [Ports(0x20, 2), Ports(0xA0, 2), Ports(0x4D0, 2)];
const PM: Window = Ports(0x600, 64);
const IDE: [Window; 5] =
    [Ports(0x1F0, 8), Ports(0x3F6, 1), Ports(0x170, 8), Ports(0x376, 1), Ports(BUS_MASTER, 16)];

const fn virtio_windows(slot: u8) -> [Window; 4] {
    [
        Mmio(virtio_bar(slot), 0x4000),
        Ports(virtio_ports(slot), 64),
        Mmio(virtio_msix(slot), 0x1000),
        Config(slot, 0),
    ]
}

const RNG: [Window; 4] = virtio_windows(VIRTIO_SLOTS[0]);
const LEGACY_BLK: [Window; 4] = virtio_windows(VIRTIO_SLOTS[1]);
const MODERN_BLK: [Window; 4] = virtio_windows(VIRTIO_SLOTS[2]);

/// All targets by name.
const TARGETS: [(&str, Kind); 18] = [
    ("pic", traffic(&PICS, &[])),
    ("pit", traffic(&[Ports(0x40, 4), Ports(0x61, 1)], &[])),
    ("rtc", traffic(&[Ports(0x70, 2)], &[])),
    ("hpet", traffic(&[HPET], &[])),
    ("apic", traffic(&[Lapic(0), Lapic(1), IOAPIC, Ports(0x20, 2)], &[])),
    ("timers", traffic(&[Ports(0x40, 4), Ports(0x70, 2), HPET, Lapic(0), IOAPIC, Ports(0x20, 2)], &[])),
    ("uart", traffic(&[Ports(0x3F8, 8)], &[])),
    ("i8042", traffic(&[Ports(0x60, 1), Ports(0x64, 1), Ports(0x92, 1)], &[])),
    ("acpi-pm", traffic(&[PM, Ports(0xB2, 2)], &[])),
    (
        "pci",
        traffic(
            &[
                Ports(0xCF8, 8),
                Config(0, 0),
                Config(1, 0),
                Config(1, 1),
                Config(1, 3),
                Config(3, 0),
                Config(4, 0),
            ],
            &[],
        ),
    ),
    ("ide", traffic(&IDE, &ide::STRUCTURES)),
    ("virtio-rng", traffic(&RNG, &virtio::STRUCTURES)),
    ("virtio-blk-legacy", traffic(&LEGACY_BLK, &virtio::STRUCTURES)),
    ("virtio-blk", traffic(&MODERN_BLK, &virtio::STRUCTURES)),
    (
        "bus",
        traffic(
            &[Everywhere, Ports(0xCF8, 8), Lapic(0), IOAPIC, HPET, PM, Config(4, 0), Ports(0xC000, 0x600)],
            &virtio::STRUCTURES,
        ),
    ),
    ("kernel", Kind::Bytes(kernel::run)),
    ("image", Kind::Bytes(image::run)),
    ("code", Kind::Bytes(code::run)),
];

/// The names of all targets.
pub fn names() -> impl Iterator<Item = &'static str> {
    TARGETS.iter().map(|(name, _)| *name)
}

/// Plays `input` against target `name`; returning is passing.
///
/// # Panics
/// On a finding, and if there is no such target.
pub fn run(name: &str, input: &[u8]) {
    let target = TARGETS.iter().find(|(n, _)| *n == name);
    match target.unwrap_or_else(|| panic!("no target is called {name}")).1 {
        Kind::Traffic(traffic) => traffic.run(input),
        Kind::Bytes(target) => target(input),
    }
}

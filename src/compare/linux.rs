//! Linux at work: its own drivers, and the program `diskbench` in the initial RAM disk that `cargo xtask guests` makes.

use super::image::ScratchImage;
use super::marks::{Mark, Marks, Section};
use super::result::{Key, Path, Sample, Test};
use super::session::{self, GuestRun};
use super::{CompareConfig, CompareError, lines::Lines};
use crate::machine::{Boot, ClockKind, DiskBus, DiskConfig, MachineConfig, WindowUse};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

const MEMORY: u64 = 512 << 20;

/// Tests of one device: four at depth 1, two at depth 32.
const TESTS: u64 = 6;

/// How many tests all devices make.
pub(super) fn steps() -> u64 {
    TESTS * Path::ALL.len() as u64
}

/// Bytes of the disk.
pub(super) fn image_size(quick: bool) -> u64 {
    if quick { 8 << 20 } else { 64 << 20 }
}

/// One line of `key=value` pairs from the guest.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Pairs(Vec<(String, String)>);

impl Pairs {
    fn parse(line: &str) -> Option<Pairs> {
        let words = line.strip_prefix("diskbench ")?.split_ascii_whitespace();
        let pairs = words.filter_map(|w| w.split_once('=')).map(|(k, v)| (k.to_owned(), v.to_owned()));
        Some(Pairs(pairs.collect()))
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|p| p.0 == key).map(|p| p.1.as_str())
    }

    fn number(&self, key: &str) -> Option<u64> {
        self.text(key)?.parse().ok()
    }
}

#[derive(Default)]
struct Told {
    tests: Vec<Pairs>,
    verified: Option<(u64, u64)>,
    /// The last words, for a guest that fails.
    last: String,
}

/// Turns the guest's lines into marks and results.
fn hear(told: &Mutex<Told>, marks: &Marks, line: &str) {
    let line = line.trim();
    if line.starts_with("@@begin ") {
        return marks.mark(Mark::Begin);
    }
    if let Some(rest) = line.strip_prefix("@@end ") {
        marks.mark(Mark::End);
        return marks.mark(Mark::Job(rest.to_owned()));
    }
    let mut told = told.lock().expect("lines");
    if !line.is_empty() {
        line.clone_into(&mut told.last);
    }
    let Some(pairs) = Pairs::parse(line) else { return };
    if let Some(verified) = pairs.number("verified") {
        told.verified = Some((verified, pairs.number("mismatches").unwrap_or(u64::MAX)));
    } else if pairs.text("test").is_some() && told.tests.len() < 1000 {
        told.tests.push(pairs);
    }
}

fn config(
    settings: &CompareConfig,
    files: (&PathBuf, &PathBuf),
    path: Path,
    image: &ScratchImage,
) -> MachineConfig {
    let (kernel, initrd) = files;
    let (megabytes, operations) = if settings.quick { (8, 200) } else { (32, 2000) };
    let dma = if path == Path::IdePio { " libata.dma=0" } else { "" };
    let (bus, name) = if path == Path::VirtioBlk { (DiskBus::Virtio, "vda") } else { (DiskBus::Ide, "sda") };
    let append = format!(
        "console=ttyS0 quiet pv.run=compare pv.compare={name} pv.wait={name} pv.megabytes={megabytes} \
         pv.operations={operations}{dma}"
    );
    MachineConfig {
        memory: MEMORY,
        cpus: 1,
        model: "max".into(),
        engine: settings.engine,
        windows: WindowUse::Auto,
        clock: ClockKind::Host,
        boot: Boot::Kernel { kernel: kernel.clone(), initrd: Some(initrd.clone()), append },
        disks: vec![DiskConfig { file: image.path(), bus, readonly: false, snapshot: false }],
        serial: Vec::new(),
        debug_exit: None,
        reboot: false,
    }
}

/// Boots Linux once with the disk behind `path`.
pub(super) fn run(
    settings: &CompareConfig,
    files: (&PathBuf, &PathBuf),
    path: Path,
    image: &ScratchImage,
    step: &(dyn Fn() + Send + Sync),
) -> Result<Vec<(Key, Sample)>, CompareError> {
    let told: Arc<Mutex<Told>> = Arc::default();
    let marks = Arc::new(Marks::default());
    let (log, to_mark) = (Arc::clone(&told), Arc::clone(&marks));
    let run = GuestRun {
        config: config(settings, files, path, image),
        lines: Arc::new(Lines::new(move |line| hear(&log, &to_mark, line))),
        lab_port: None,
        marks: Arc::clone(&marks),
    };
    session::run(run, step)?;
    let told = told.lock().expect("lines");
    match told.verified {
        Some((_, 0)) => {}
        Some((_, sectors)) => return Err(CompareError::Mismatch { device: path.name(), sectors }),
        None => {
            let text = format!(
                "{}: Linux ended without a verified result; its last words: '{}'",
                path.name(),
                told.last
            );
            return Err(CompareError::Guest(text));
        }
    }
    Ok(samples(path, &told.tests, &marks.take()))
}

fn samples(path: Path, tests: &[Pairs], sections: &[Section]) -> Vec<(Key, Sample)> {
    tests.iter().zip(sections).filter_map(|(pairs, section)| sample(path, pairs, section)).collect()
}

fn sample(path: Path, pairs: &Pairs, section: &Section) -> Option<(Key, Sample)> {
    let test = Test::by_name(pairs.text("test")?)?;
    let depth = u32::try_from(pairs.number("depth")?).ok()?;
    let key = Key { test, depth, path };
    let sample = Sample {
        operations: pairs.number("operations")?,
        bytes: pairs.number("bytes")?,
        // The guest's own clock: the marks include printing them.
        seconds: pairs.number("micros")? as f64 / 1e6,
        cost: section.cost,
    };
    Some((key, sample))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_guest_become_samples() {
        let (told, marks) = (Mutex::new(Told::default()), Marks::default());
        for line in [
            "[    1.0] something else",
            "@@begin sda/randread/1",
            "diskbench device=sda test=randread depth=1 block=4096 operations=2000 bytes=8192000 micros=130712",
            "@@end sda/randread/1 2000 0 123",
            "diskbench device=sda verified=33554432 mismatches=0",
        ] {
            hear(&told, &marks, line);
        }
        marks.settle(&paravane_cpu::CpuState::reset(0), crate::stats::Snapshot::new);
        let told = told.lock().expect("told");
        assert_eq!(told.verified, Some((33_554_432, 0)));
        let samples = samples(Path::IdeDma, &told.tests, &marks.take());
        let (key, sample) = samples[0];
        assert_eq!(key, Key { test: Test::RandomRead, depth: 1, path: Path::IdeDma });
        assert_eq!((sample.operations, sample.seconds), (2000, 0.130712));
    }
}

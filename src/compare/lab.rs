//! The lab guest at work: its jobs, and what they measured.

use super::image::ScratchImage;
use super::marks::{End, Mark, Marks, Section};
use super::result::{Key, Path, Sample, Test};
use super::session::{self, GuestRun};
use super::{CompareConfig, CompareError, lines::Lines};
use crate::machine::{Boot, ClockKind, DiskBus, DiskConfig, MachineConfig, WindowUse};
use paravane_firmware::lab::{
    self, Bus, Job, MARK_BEGIN, MARK_DONE, MARK_END, MARK_FAILED, MARK_JOB, Op, Report, Status, Transfer,
};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// RAM of the lab machine.
const MEMORY: u64 = 64 << 20;
/// Bytes of a sequential operation.
const PIECE: u32 = 128 << 10;
/// Bytes of a random operation.
const BLOCK: u32 = 4096;
/// Requests in flight where the device has a queue.
const DEEP: u32 = 32;

/// How much is done. The disk has three areas of `span` bytes: read, written in order, written at random.
#[derive(Clone, Copy, Debug)]
pub(super) struct Amount {
    span: u64,
    random: u64,
    /// What the area that is read holds. Jobs that write count on from here: no two of a run, and no two runs, write the
    /// same pattern, so that data which never arrived cannot look as if it had.
    seed: u64,
}

impl Amount {
    /// For run `run` of a full or a quick comparison.
    pub(super) fn of(quick: bool, run: u32) -> Amount {
        let (span, random) = if quick { (4 << 20, 200) } else { (32 << 20, 2000) };
        Amount { span, random, seed: (u64::from(run) + 1) << 8 }
    }

    /// The image that the jobs work on.
    pub(super) fn image(&self) -> std::io::Result<ScratchImage> {
        ScratchImage::new(self.span * 3, self.span, self.seed)
    }

    fn job(&self, path: Path, op: Op, depth: u32) -> Job {
        let (bus, transfer) = match path {
            Path::IdePio => (Bus::Ide, Transfer::Pio),
            Path::IdeDma => (Bus::Ide, Transfer::Dma),
            Path::VirtioBlk => (Bus::Virtio, Transfer::Virtio),
        };
        let (size, count) = match op {
            Op::SeqRead | Op::SeqWrite => (PIECE, self.span / u64::from(PIECE)),
            Op::RandRead | Op::RandWrite => (BLOCK, self.random),
        };
        let area = match op {
            Op::SeqRead | Op::RandRead => 0,
            Op::SeqWrite => 1,
            Op::RandWrite => 2,
        };
        Job {
            bus,
            index: 0,
            transfer,
            op,
            size,
            depth,
            count,
            seed: self.seed,
            start: area * self.span,
            span: self.span,
        }
    }

    /// The measured jobs of `path`.
    fn jobs(&self, path: Path) -> Vec<Job> {
        let depths: &[u32] = if path == Path::VirtioBlk { &[1, DEEP] } else { &[1] };
        let mut jobs = vec![self.job(path, Op::SeqRead, 1), self.job(path, Op::SeqWrite, 1)];
        for &depth in depths {
            jobs.push(self.job(path, Op::RandRead, depth));
            jobs.push(self.job(path, Op::RandWrite, depth));
        }
        jobs
    }
}

/// Every measured job follows an unmeasured one of the same kind, which finds its code translated. Those that write get a
/// pattern each.
fn with_warm_up(jobs: &[Job]) -> Vec<Job> {
    let warm = |j: &Job| Job { count: (j.count / 16).clamp(1, u64::from(j.depth) * 4 + 16), ..*j };
    let mut all: Vec<Job> = jobs.iter().flat_map(|j| [warm(j), *j]).collect();
    for (job, n) in all.iter_mut().zip(1..).filter(|(job, _)| job.op.writes()) {
        job.seed += n;
    }
    all
}

/// How many jobs one guest runs, for the progress bar.
pub(super) fn steps(amount: Amount) -> u64 {
    Path::ALL.iter().map(|&p| amount.jobs(p).len() as u64 * 2).sum()
}

fn key(path: Path, job: &Job) -> Key {
    let test = match job.op {
        Op::SeqRead => Test::SequentialRead,
        Op::SeqWrite => Test::SequentialWrite,
        Op::RandRead => Test::RandomRead,
        Op::RandWrite => Test::RandomWrite,
    };
    Key { test, depth: job.depth, path }
}

fn config(config: &CompareConfig, path: Path, image: &ScratchImage, jobs: &[Job]) -> MachineConfig {
    let append = jobs.iter().map(Job::to_string).collect::<Vec<_>>().join("; ");
    let bus = if path == Path::VirtioBlk { DiskBus::Virtio } else { DiskBus::Ide };
    MachineConfig {
        memory: MEMORY,
        cpus: 1,
        model: "max".into(),
        engine: config.engine,
        windows: WindowUse::Auto,
        clock: ClockKind::Host,
        boot: Boot::Image { image: lab::LAB_ELF, append },
        disks: vec![DiskConfig { file: image.path(), bus, readonly: false, snapshot: false }],
        serial: Vec::new(),
        debug_exit: None,
        reboot: false,
    }
}

/// Runs every job of `path` once.
pub(super) fn run(
    settings: &CompareConfig,
    amount: Amount,
    path: Path,
    image: &ScratchImage,
    step: &(dyn Fn() + Send + Sync),
) -> Result<Vec<(Key, Sample)>, CompareError> {
    let jobs = with_warm_up(&amount.jobs(path));
    let reports: Arc<Mutex<Vec<Report>>> = Arc::default();
    let log = Arc::clone(&reports);
    let lines = Lines::new(move |line| {
        if let Some(report) = lab::parse_report(line) {
            let mut log = log.lock().expect("reports");
            // A guest gone wild may talk for ever.
            if log.len() < 1000 {
                log.push(report);
            }
        }
    });
    let marks = Arc::new(Marks::default());
    let to_mark = Arc::clone(&marks);
    let run = GuestRun {
        config: config(settings, path, image, &jobs),
        lines: Arc::new(lines),
        lab_port: Some(Arc::new(move |value| lab_mark(&to_mark, value))),
        marks: Arc::clone(&marks),
    };
    let end = session::run(run, step)?;
    let reports = reports.lock().expect("reports").clone();
    check(path, &jobs, &reports, end)?;
    verify_image(amount, path, image, &jobs)?;
    let sections = marks.take();
    Ok(samples(path, &jobs, &reports, &sections))
}

fn lab_mark(marks: &Marks, value: u8) {
    match value {
        MARK_BEGIN => marks.mark(Mark::Begin),
        MARK_END => marks.mark(Mark::End),
        MARK_JOB => marks.mark(Mark::Job(String::new())),
        MARK_DONE => marks.mark(Mark::Done),
        MARK_FAILED => marks.mark(Mark::Failed),
        _ => {}
    }
}

/// Every job must have ended well, with every byte verified by the guest.
fn check(path: Path, jobs: &[Job], reports: &[Report], end: Option<End>) -> Result<(), CompareError> {
    for report in reports {
        if report.status == Status::Mismatch || report.mismatches > 0 {
            return Err(CompareError::Mismatch { device: path.name(), sectors: report.mismatches.max(1) });
        }
        if report.status != Status::Ok {
            let job = jobs.get(report.job as usize).map(Job::to_string).unwrap_or_default();
            return Err(CompareError::Guest(format!("{}: {:?} in job '{job}'", path.name(), report.status)));
        }
    }
    if end != Some(End::Done) || reports.len() != jobs.len() {
        let text =
            format!("{}: the lab guest ended after {} of {} jobs", path.name(), reports.len(), jobs.len());
        return Err(CompareError::Guest(text));
    }
    Ok(())
}

/// What the image holds after `jobs`: at each place what was written last.
fn written(jobs: &[Job], sectors: u64) -> BTreeMap<u64, (u64, u64)> {
    let mut places = BTreeMap::new();
    for job in jobs.iter().filter(|j| j.op.writes()) {
        let blocks = job.blocks(sectors);
        for i in 0..job.count {
            places.insert(job.lba(i, blocks) * lab::SECTOR, (u64::from(job.size), job.seed));
        }
    }
    places
}

/// What the guest wrote is in the image, and what it only read is as it was.
fn verify_image(amount: Amount, path: Path, image: &ScratchImage, jobs: &[Job]) -> Result<(), CompareError> {
    let mut wrong = image.wrong_sectors(0, amount.span, amount.seed).map_err(CompareError::Image)?;
    for (at, (len, seed)) in written(jobs, amount.span * 3 / lab::SECTOR) {
        wrong += image.wrong_sectors(at, len, seed).map_err(CompareError::Image)?;
    }
    if wrong > 0 {
        return Err(CompareError::Mismatch { device: path.name(), sectors: wrong });
    }
    Ok(())
}

fn samples(path: Path, jobs: &[Job], reports: &[Report], sections: &[Section]) -> Vec<(Key, Sample)> {
    let all = jobs.iter().zip(reports).zip(sections);
    // Every second one was the warm-up.
    all.skip(1)
        .step_by(2)
        .map(|((job, report), section)| {
            let sample = Sample {
                operations: report.ops,
                bytes: report.bytes,
                seconds: section.seconds,
                cost: section.cost,
            };
            (key(path, job), sample)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_survive_the_command_line() {
        for path in Path::ALL {
            let jobs = with_warm_up(&Amount::of(false, 1).jobs(path));
            let append = jobs.iter().map(Job::to_string).collect::<Vec<_>>().join("; ");
            let parsed: Result<Vec<Job>, _> = lab::jobs(&append).collect();
            assert_eq!(parsed, Ok(jobs), "{path:?}");
        }
        assert_eq!(steps(Amount::of(true, 1)), 2 * (4 + 4 + 6));
    }

    #[test]
    fn no_two_jobs_write_the_same_pattern_and_the_last_one_counts() {
        let jobs = |run| with_warm_up(&Amount::of(true, run).jobs(Path::VirtioBlk));
        let mut seeds: Vec<u64> =
            [jobs(1), jobs(2)].concat().iter().filter(|j| j.op.writes()).map(|j| j.seed).collect();
        let count = seeds.len();
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!((seeds.len(), count), (12, 12), "warm-up and measured, three writing tests, two runs");
        let one = jobs(1);
        assert!(
            one.iter().filter(|j| !j.op.writes()).all(|j| j.seed == one[0].seed),
            "as the image is filled"
        );
        let amount = Amount::of(true, 1);
        let written = written(&one, amount.span * 3 / lab::SECTOR);
        let sequential = one.iter().rfind(|j| j.op == Op::SeqWrite).expect("job");
        assert_eq!(written[&amount.span], (u64::from(PIECE), sequential.seed), "not the warm-up's");
    }
}

//! The lab guest at work: its jobs, and what they measured.

use super::image::ScratchImage;
use super::marks::{End, Mark, Marks, Section};
use super::result::{Key, Path, Sample, Test};
use super::session::{self, GuestRun};
use super::{CompareConfig, CompareError, lines::Lines};
use crate::machine::{Boot, ClockKind, DiskBus, DiskConfig, MachineConfig};
use paravane_firmware::lab::{
    self, Bus, Job, MARK_BEGIN, MARK_DONE, MARK_END, MARK_FAILED, MARK_JOB, Op, Report, Status, Transfer,
};
use std::sync::{Arc, Mutex};

/// RAM of the lab machine.
const MEMORY: u64 = 64 << 20;
/// Bytes of a sequential operation.
const PIECE: u32 = 128 << 10;
/// Bytes of a random operation.
const BLOCK: u32 = 4096;
/// Requests in flight where the device has a queue.
const DEEP: u32 = 32;

/// Pattern seeds: what reads expect, and what the two kinds of writes leave.
const READ_SEED: u64 = 1;
const SEQUENTIAL_SEED: u64 = 2;
const RANDOM_SEED: u64 = 3;

/// How much is done. The disk has three areas of `span` bytes: read, written in order, written at random.
#[derive(Clone, Copy, Debug)]
pub(super) struct Amount {
    span: u64,
    random: u64,
}

impl Amount {
    /// For a full or a quick comparison.
    pub(super) fn of(quick: bool) -> Amount {
        if quick { Amount { span: 4 << 20, random: 200 } } else { Amount { span: 32 << 20, random: 2000 } }
    }

    /// The image that the jobs work on.
    pub(super) fn image(&self) -> std::io::Result<ScratchImage> {
        ScratchImage::new(self.span * 3, self.span, READ_SEED)
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
        let (seed, area) = match op {
            Op::SeqRead | Op::RandRead => (READ_SEED, 0),
            Op::SeqWrite => (SEQUENTIAL_SEED, 1),
            Op::RandWrite => (RANDOM_SEED, 2),
        };
        Job {
            bus,
            index: 0,
            transfer,
            op,
            size,
            depth,
            count,
            seed,
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

/// Every measured job follows an unmeasured one of the same kind, which finds its code translated.
fn with_warm_up(jobs: &[Job]) -> Vec<Job> {
    let warm = |j: &Job| Job { count: (j.count / 16).clamp(1, u64::from(j.depth) * 4 + 16), ..*j };
    jobs.iter().flat_map(|j| [warm(j), *j]).collect()
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
        model: "max".into(),
        engine: config.engine,
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
    let measured = amount.jobs(path);
    let jobs = with_warm_up(&measured);
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
    verify_image(amount, path, image, &measured)?;
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

/// What the guest wrote is in the image, and what it only read is as it was.
fn verify_image(amount: Amount, path: Path, image: &ScratchImage, jobs: &[Job]) -> Result<(), CompareError> {
    let mut wrong = image.wrong_sectors(0, amount.span, READ_SEED).map_err(CompareError::Image)?;
    wrong += image.wrong_sectors(amount.span, amount.span, SEQUENTIAL_SEED).map_err(CompareError::Image)?;
    for job in jobs.iter().filter(|j| j.op == Op::RandWrite) {
        let blocks = job.blocks(amount.span * 3 / lab::SECTOR);
        for i in 0..job.count {
            let at = job.lba(i, blocks) * lab::SECTOR;
            wrong += image.wrong_sectors(at, u64::from(job.size), job.seed).map_err(CompareError::Image)?;
        }
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
            let jobs = with_warm_up(&Amount::of(false).jobs(path));
            let append = jobs.iter().map(Job::to_string).collect::<Vec<_>>().join("; ");
            let parsed: Result<Vec<Job>, _> = lab::jobs(&append).collect();
            assert_eq!(parsed, Ok(jobs), "{path:?}");
        }
        assert_eq!(steps(Amount::of(true)), 2 * (4 + 4 + 6));
    }
}

//! Runs one job: in portions that fit into memory, each a measured section between two unmeasured ones that prepare and
//! verify the data.
//!
//! Invariant: every operation's buffer lies inside the arena, which nothing else uses.

use crate::shared::{Job, LAB_PORT, MARK_BEGIN, MARK_END, Report, SECTOR, Status, pattern_word};
use crate::{irq, port};

/// Which way data goes, seen from memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Read = 0,
    Write = 1,
}

/// One transfer.
pub struct Operation {
    pub lba: u64,
    pub sectors: u64,
    /// Physical address of its own buffer.
    pub buffer: u64,
}

/// A portion of a job's operations.
pub struct Plan<'a> {
    job: &'a Job,
    blocks: u64,
    first: u64,
    len: u64,
    arena: u64,
}

impl Plan<'_> {
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn operation(&self, i: u64) -> Operation {
        let size = u64::from(self.job.size);
        Operation {
            lba: self.job.lba(self.first + i, self.blocks),
            sectors: size / SECTOR,
            buffer: self.arena + i * size,
        }
    }

    /// Every sector with its place in memory.
    fn sectors(&self) -> impl Iterator<Item = (u64, *mut u64)> + '_ {
        (0..self.len)
            .map(|i| self.operation(i))
            .flat_map(|op| (0..op.sectors).map(move |s| (op.lba + s, (op.buffer + s * SECTOR) as *mut u64)))
    }

    fn fill_with_pattern(&self) {
        for (lba, at) in self.sectors() {
            for i in 0..64 {
                // SAFETY: within the arena.
                unsafe { at.add(i).write(pattern_word(lba, self.job.seed, i as u64)) };
            }
        }
    }

    /// Leaves nothing behind that could pass for data.
    fn poison(&self) {
        let bytes = (self.len * u64::from(self.job.size)) as usize;
        // SAFETY: within the arena.
        unsafe { core::ptr::write_bytes(self.arena as *mut u8, 0xA5, bytes) };
    }

    fn verify(&self, report: &mut Report) {
        for (lba, at) in self.sectors() {
            let mut same = true;
            for i in 0..64 {
                // SAFETY: within the arena; volatile, because devices wrote it.
                let word = unsafe { at.add(i).read_volatile() };
                same &= word == pattern_word(lba, self.job.seed, i as u64);
                report.checksum = report.checksum.wrapping_add(word);
            }
            report.mismatches += u64::from(!same);
        }
    }
}

/// A disk that carries out plans.
pub trait Storage {
    /// Capacity.
    fn sectors(&self) -> u64;
    /// Carries out all operations with at most `depth` in flight; returns how many failed.
    fn run(&mut self, plan: &Plan<'_>, direction: Direction, depth: u32) -> u64;
}

/// A report of nothing done.
pub fn empty_report(job: u32, status: Status) -> Report {
    Report { job, status, ops: 0, bytes: 0, errors: 0, mismatches: 0, interrupts: 0, cycles: 0, checksum: 0 }
}

fn cycles() -> u64 {
    // SAFETY: no preconditions.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Runs `job` with buffers in `arena` (start, length).
pub fn run(disk: &mut impl Storage, job: &Job, arena: (u64, u64), number: u32) -> Report {
    let mut report = empty_report(number, Status::Ok);
    let blocks = job.blocks(disk.sectors());
    let per_portion = arena.1 / u64::from(job.size);
    if blocks == 0 || per_portion == 0 {
        return Report { status: Status::NoRoom, ..report };
    }
    let mut first = 0;
    while first < job.count {
        let len = per_portion.min(job.count - first);
        portion(disk, &Plan { job, blocks, first, len, arena: arena.0 }, &mut report);
        first += len;
    }
    if report.errors > 0 {
        report.status = Status::IoError;
    } else if report.mismatches > 0 {
        report.status = Status::Mismatch;
    }
    report
}

fn portion(disk: &mut impl Storage, plan: &Plan<'_>, report: &mut Report) {
    let depth = plan.job.depth;
    let direction = if plan.job.op.writes() { Direction::Write } else { Direction::Read };
    match direction {
        Direction::Read => plan.poison(),
        Direction::Write => plan.fill_with_pattern(),
    }
    let interrupts = irq::taken();
    port::out8(LAB_PORT, MARK_BEGIN);
    let start = cycles();
    report.errors += disk.run(plan, direction, depth);
    report.cycles += cycles().wrapping_sub(start);
    port::out8(LAB_PORT, MARK_END);
    report.interrupts += irq::taken() - interrupts;
    report.ops += plan.len();
    report.bytes += plan.len() * u64::from(plan.job.size);
    if direction == Direction::Write {
        plan.poison();
        report.errors += disk.run(plan, Direction::Read, depth);
    }
    plan.verify(report);
}

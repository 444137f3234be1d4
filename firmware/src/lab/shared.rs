//! What the lab guest and the host agree on: the job grammar, the report line, the data pattern, the order of accesses.
//!
//! This file is compiled into both sides and uses `core` alone.

use core::fmt;

/// The port at which the guest tells the host where it is.
pub const LAB_PORT: u16 = 0x510;
/// A measured section begins. One job may have several: counters add up over them.
pub const MARK_BEGIN: u8 = 1;
/// A measured section ends.
pub const MARK_END: u8 = 2;
/// All jobs are done; the guest powers off.
pub const MARK_DONE: u8 = 3;
/// A job failed (its report says how); the guest powers off.
pub const MARK_FAILED: u8 = 4;
/// A job is complete and its report line is out.
pub const MARK_JOB: u8 = 5;

/// Bytes in a sector.
pub const SECTOR: u64 = 512;
/// The largest operation.
pub const MAX_SIZE: u32 = 4 << 20;
/// The largest queue depth.
pub const MAX_DEPTH: u32 = 32;

/// Kind of disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bus {
    /// PIIX IDE: 0 primary master, 1 primary slave, 2 and 3 secondary.
    Ide,
    /// virtio-blk on PCI, numbered in bus order.
    Virtio,
}

/// How data moves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transfer {
    /// IDE, by the processor (READ and WRITE MULTIPLE).
    Pio,
    /// IDE, by the bus master.
    Dma,
    /// virtqueue.
    Virtio,
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// Reads one block after the other.
    SeqRead,
    /// Writes one block after the other.
    SeqWrite,
    /// Reads blocks in random order.
    RandRead,
    /// Writes blocks in random order.
    RandWrite,
}

impl Op {
    /// True if data goes to the disk.
    pub const fn writes(self) -> bool {
        matches!(self, Op::SeqWrite | Op::RandWrite)
    }
}

/// One measurement.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Job {
    /// Kind of disk.
    pub bus: Bus,
    /// Which of its kind.
    pub index: u8,
    /// How data moves.
    pub transfer: Transfer,
    /// What is measured.
    pub op: Op,
    /// Bytes per operation, whole sectors.
    pub size: u32,
    /// Operations in flight; IDE does one at a time.
    pub depth: u32,
    /// Number of operations.
    pub count: u64,
    /// Seed of the pattern that reads expect and writes leave, and of random offsets.
    pub seed: u64,
    /// First byte of the disk that is used, a whole sector.
    pub start: u64,
    /// Bytes used from there on; 0 means up to the end.
    pub span: u64,
}

fn name_of<T: Copy + PartialEq>(table: &[(&'static str, T)], value: T) -> &'static str {
    table.iter().find(|(_, v)| *v == value).map_or("?", |(n, _)| n)
}

fn value_of<T: Copy>(table: &[(&'static str, T)], name: &str) -> Option<T> {
    table.iter().find(|(n, _)| *n == name).map(|(_, v)| *v)
}

const BUSES: [(&str, Bus); 2] = [("ide", Bus::Ide), ("virtio", Bus::Virtio)];
const TRANSFERS: [(&str, Transfer); 3] =
    [("pio", Transfer::Pio), ("dma", Transfer::Dma), ("virtio", Transfer::Virtio)];
const OPS: [(&str, Op); 4] = [
    ("seqread", Op::SeqRead),
    ("seqwrite", Op::SeqWrite),
    ("randread", Op::RandRead),
    ("randwrite", Op::RandWrite),
];

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Job { bus, index, transfer, op, size, depth, count, seed, start, span } = *self;
        let (bus, mode, op) = (name_of(&BUSES, bus), name_of(&TRANSFERS, transfer), name_of(&OPS, op));
        write!(f, "device={bus}{index} mode={mode} op={op} size={size} depth={depth} ")?;
        write!(f, "count={count} seed={seed} start={start} span={span}")
    }
}

impl Job {
    /// Reads what [`Display`](fmt::Display) writes; the order of keys is free, `depth`, `seed`, `start` and `span` may
    /// be left out.
    pub fn parse(text: &str) -> Result<Job, &'static str> {
        let (mut device, mut transfer, mut op) = (None, None, None);
        let (mut size, mut depth, mut count, mut seed, mut start, mut span) = (None, 1, None, 0, 0, 0);
        for word in text.split_ascii_whitespace() {
            let (key, value) = word.split_once('=').ok_or("a word without '='")?;
            match key {
                "device" => device = parse_device(value),
                "mode" => transfer = value_of(&TRANSFERS, value),
                "op" => op = value_of(&OPS, value),
                "size" => size = value.parse().ok(),
                "depth" => depth = value.parse().map_err(|_| "bad depth")?,
                "count" => count = value.parse().ok(),
                "seed" => seed = value.parse().map_err(|_| "bad seed")?,
                "start" => start = value.parse().map_err(|_| "bad start")?,
                "span" => span = value.parse().map_err(|_| "bad span")?,
                _ => return Err("unknown key"),
            }
        }
        let (bus, index) = device.ok_or("device= must be ideN or virtioN")?;
        Job {
            bus,
            index,
            transfer: transfer.ok_or("mode= must be pio, dma or virtio")?,
            op: op.ok_or("op= must be seqread, seqwrite, randread or randwrite")?,
            size: size.ok_or("size= must be a number")?,
            depth,
            count: count.ok_or("count= must be a number")?,
            seed,
            start,
            span,
        }
        .checked()
    }

    fn checked(self) -> Result<Job, &'static str> {
        if (self.bus == Bus::Virtio) != (self.transfer == Transfer::Virtio) {
            return Err("mode= does not suit device=");
        }
        if self.size == 0 || !u64::from(self.size).is_multiple_of(SECTOR) || self.size > MAX_SIZE {
            return Err("size= must be whole sectors, 4 MiB at most");
        }
        if self.depth == 0 || self.depth > MAX_DEPTH || (self.bus == Bus::Ide && self.depth > 1) {
            return Err("depth= must be 1 for ide and 1 to 32 for virtio");
        }
        if !self.start.is_multiple_of(SECTOR) {
            return Err("start= must be a whole sector");
        }
        Ok(self)
    }

    /// Number of operation-sized blocks within the used part of a disk of `sectors`.
    pub fn blocks(&self, sectors: u64) -> u64 {
        let rest = sectors.saturating_mul(SECTOR).saturating_sub(self.start);
        let span = if self.span == 0 { rest } else { rest.min(self.span) };
        span / u64::from(self.size)
    }

    /// First sector of operation `i` when `blocks` blocks are used.
    pub fn lba(&self, i: u64, blocks: u64) -> u64 {
        let block = match self.op {
            Op::SeqRead | Op::SeqWrite => i % blocks.max(1),
            Op::RandRead | Op::RandWrite => mix(i ^ mix(self.seed ^ 0x6C61_6221)) % blocks.max(1),
        };
        self.start / SECTOR + block.wrapping_mul(u64::from(self.size) / SECTOR)
    }
}

fn parse_device(value: &str) -> Option<(Bus, u8)> {
    let digits = value.find(|c: char| c.is_ascii_digit())?;
    Some((value_of(&BUSES, &value[..digits])?, value[digits..].parse().ok()?))
}

/// The jobs of a command line: separated by `;`, empty ones skipped.
pub fn jobs(cmdline: &str) -> impl Iterator<Item = Result<Job, &'static str>> + '_ {
    cmdline.split(';').map(str::trim).filter(|j| !j.is_empty()).map(Job::parse)
}

/// A bijection that spreads every input bit.
pub const fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 32)).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    let x = (x ^ (x >> 32)).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    x ^ (x >> 32)
}

/// Word `i` (of 64) of sector `lba`'s pattern.
#[inline]
pub const fn pattern_word(lba: u64, seed: u64, i: u64) -> u64 {
    let x = (lba << 6 | i).wrapping_add(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let x = (x ^ (x >> 32)).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    x ^ (x >> 29)
}

/// The content of sector `lba` under `seed`.
pub fn pattern(lba: u64, seed: u64, sector: &mut [u8; 512]) {
    for (i, word) in sector.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *word = pattern_word(lba, seed, i as u64).to_le_bytes();
    }
}

/// How a job ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    /// All operations went well and all data is right.
    Ok,
    /// There is no such disk.
    NoDevice,
    /// The disk or memory has no room for one operation.
    NoRoom,
    /// The device failed operations.
    IoError,
    /// Data is wrong.
    Mismatch,
}

const STATUSES: [(&str, Status); 5] = [
    ("ok", Status::Ok),
    ("no-device", Status::NoDevice),
    ("no-room", Status::NoRoom),
    ("io-error", Status::IoError),
    ("mismatch", Status::Mismatch),
];

/// What the guest says about a job.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Report {
    /// Number of the job, from 0.
    pub job: u32,
    /// How it ended.
    pub status: Status,
    /// Operations done.
    pub ops: u64,
    /// Bytes moved by them.
    pub bytes: u64,
    /// Operations that the device failed.
    pub errors: u64,
    /// Sectors with wrong content.
    pub mismatches: u64,
    /// Interrupts that the guest took in measured sections.
    pub interrupts: u64,
    /// Time-stamp counter ticks in measured sections.
    pub cycles: u64,
    /// Sum of all words of data that were verified.
    pub checksum: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { job, status, ops, bytes, errors, mismatches, interrupts, cycles, checksum } = *self;
        let status = name_of(&STATUSES, status);
        write!(f, "lab job={job} status={status} ops={ops} bytes={bytes} errors={errors} ")?;
        write!(f, "mismatches={mismatches} interrupts={interrupts} cycles={cycles} checksum={checksum}")
    }
}

/// Reads a report line; `None` for every other line.
pub fn parse_report(line: &str) -> Option<Report> {
    let words = line.trim().strip_prefix("lab ")?;
    let field =
        |name: &str| words.split_ascii_whitespace().find_map(|w| w.strip_prefix(name)?.strip_prefix('='));
    let number = |name: &str| field(name)?.parse::<u64>().ok();
    Some(Report {
        job: u32::try_from(number("job")?).ok()?,
        status: value_of(&STATUSES, field("status")?)?,
        ops: number("ops")?,
        bytes: number("bytes")?,
        errors: number("errors")?,
        mismatches: number("mismatches")?,
        interrupts: number("interrupts")?,
        cycles: number("cycles")?,
        checksum: number("checksum")?,
    })
}

//! What was measured, and what is said about it: medians, spreads, ratios.

use serde::Serialize;
use std::collections::BTreeMap;

/// How the guest reaches the disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Path {
    /// IDE, every word through the data port.
    IdePio,
    /// IDE with bus-master DMA.
    IdeDma,
    /// virtio-blk on PCI.
    VirtioBlk,
}

impl Path {
    /// All of them, in the order measured.
    pub const ALL: [Path; 3] = [Path::IdePio, Path::IdeDma, Path::VirtioBlk];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Path::IdePio => "IDE PIO",
            Path::IdeDma => "IDE DMA",
            Path::VirtioBlk => "virtio-blk",
        }
    }
}

/// What is done.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Test {
    SequentialRead,
    SequentialWrite,
    RandomRead,
    RandomWrite,
}

impl Test {
    /// Whether the figure is bytes per second (otherwise operations per second).
    pub fn is_sequential(self) -> bool {
        matches!(self, Test::SequentialRead | Test::SequentialWrite)
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Test::SequentialRead => "sequential read",
            Test::SequentialWrite => "sequential write",
            Test::RandomRead => "random 4 KiB read",
            Test::RandomWrite => "random 4 KiB write",
        }
    }

    /// By the names the guests use.
    pub fn by_name(name: &str) -> Option<Test> {
        match name {
            "seqread" => Some(Test::SequentialRead),
            "seqwrite" => Some(Test::SequentialWrite),
            "randread" => Some(Test::RandomRead),
            "randwrite" => Some(Test::RandomWrite),
            _ => None,
        }
    }
}

/// One line of the comparison.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Key {
    /// What is done.
    pub test: Test,
    /// Requests in flight.
    pub depth: u32,
    /// By which device.
    pub path: Path,
}

/// What it cost, counted over a whole test.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Cost {
    /// Port accesses that left guest code.
    pub pio: u64,
    /// Memory-mapped register accesses that left guest code, doorbells not among them.
    pub mmio: u64,
    /// Notifications of a queue.
    pub doorbells: u64,
    /// Interrupts delivered to the processor.
    pub interrupts: u64,
    /// Bytes the device model copied (transfers between image and guest memory need none).
    pub copied: u64,
    /// Guest instructions retired.
    pub instructions: u64,
    /// CPU time of the whole process.
    pub cpu_ns: u64,
}

impl Cost {
    /// Adds another section's cost.
    pub fn add(&mut self, more: &Cost) {
        self.pio += more.pio;
        self.mmio += more.mmio;
        self.doorbells += more.doorbells;
        self.interrupts += more.interrupts;
        self.copied += more.copied;
        self.instructions += more.instructions;
        self.cpu_ns += more.cpu_ns;
    }
}

/// One run of one test.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Sample {
    /// Operations done.
    pub operations: u64,
    /// Bytes moved.
    pub bytes: u64,
    /// Machine time taken.
    pub seconds: f64,
    /// What it cost.
    pub cost: Cost,
}

impl Sample {
    /// MB/s of a sequential test, operations/s of a random one.
    pub fn rate(&self, test: Test) -> f64 {
        let amount = if test.is_sequential() { self.bytes as f64 / 1e6 } else { self.operations as f64 };
        amount / self.seconds.max(1e-9)
    }
}

/// Everything measured, by line.
pub type Samples = BTreeMap<Key, Vec<Sample>>;

/// Cost for each operation.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
#[expect(missing_docs, reason = "as in `Cost`")]
pub struct CostEach {
    pub pio: f64,
    pub mmio: f64,
    pub doorbells: f64,
    pub interrupts: f64,
    pub bytes_copied: f64,
    pub guest_instructions: f64,
    pub host_cpu_us: f64,
}

/// One line as reported.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Line {
    /// What is done.
    pub test: Test,
    /// Requests in flight.
    pub depth: u32,
    /// By which device.
    pub device: Path,
    /// Unit of the rates.
    pub unit: &'static str,
    /// Median rate.
    pub median: f64,
    /// Lowest rate.
    pub min: f64,
    /// Highest rate.
    pub max: f64,
    /// Operations in one run.
    pub operations: u64,
    /// Bytes of one operation.
    pub operation_bytes: u64,
    /// Medians of what each operation cost.
    pub per_operation: CostEach,
    /// Median over the median of IDE PIO at the same test.
    pub over_ide_pio: Option<f64>,
    /// Median over the median of IDE DMA at the same test: paravirtual / emulated for virtio-blk.
    pub over_ide_dma: Option<f64>,
}

/// The middle value; the mean of the two middle ones of an even number.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

fn median_rate(samples: &Samples, key: Key) -> Option<f64> {
    let runs = samples.get(&key)?;
    Some(median(runs.iter().map(|s| s.rate(key.test))))
}

/// The rate of `path` at the same work: at the same depth, or at depth 1 where the device has no queue.
fn peer_rate(samples: &Samples, key: Key, path: Path) -> Option<f64> {
    let peer = Key { path, ..key };
    median_rate(samples, peer).or_else(|| median_rate(samples, Key { depth: 1, ..peer }))
}

fn line(samples: &Samples, key: Key, runs: &[Sample]) -> Line {
    let each = |value: fn(&Cost) -> u64| {
        median(runs.iter().map(|s| value(&s.cost) as f64 / s.operations.max(1) as f64))
    };
    let rates = || runs.iter().map(|s| s.rate(key.test));
    let own = median(rates());
    let over = |path| peer_rate(samples, key, path).filter(|&r| r > 0.0).map(|r| own / r);
    let first = runs.first();
    Line {
        test: key.test,
        depth: key.depth,
        device: key.path,
        unit: if key.test.is_sequential() { "MB/s" } else { "op/s" },
        median: own,
        min: rates().fold(f64::INFINITY, f64::min),
        max: rates().fold(0.0, f64::max),
        operations: first.map_or(0, |s| s.operations),
        operation_bytes: first.map_or(0, |s| s.bytes / s.operations.max(1)),
        per_operation: CostEach {
            pio: each(|c| c.pio),
            mmio: each(|c| c.mmio),
            doorbells: each(|c| c.doorbells),
            interrupts: each(|c| c.interrupts),
            bytes_copied: each(|c| c.copied),
            guest_instructions: each(|c| c.instructions),
            host_cpu_us: each(|c| c.cpu_ns) / 1000.0,
        },
        over_ide_pio: over(Path::IdePio),
        over_ide_dma: over(Path::IdeDma),
    }
}

/// The lines of the report, by test, depth and device.
pub fn lines(samples: &Samples) -> Vec<Line> {
    samples.iter().map(|(&key, runs)| line(samples, key, runs)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median([]), 0.0);
    }

    #[test]
    fn lines_carry_ratios_and_cost_per_operation() {
        let sample = |seconds, instructions| Sample {
            operations: 100,
            bytes: 409_600,
            seconds,
            cost: Cost { instructions, cpu_ns: 1_000_000, ..Cost::default() },
        };
        let key = |path, depth| Key { test: Test::RandomRead, depth, path };
        let samples = Samples::from([
            (key(Path::IdeDma, 1), vec![sample(1.0, 1000), sample(2.0, 3000), sample(4.0, 2000)]),
            (key(Path::VirtioBlk, 1), vec![sample(0.5, 100)]),
            (key(Path::VirtioBlk, 32), vec![sample(0.1, 100)]),
        ]);
        let lines = lines(&samples);
        assert_eq!(lines.len(), 3);
        let dma = &lines[0];
        assert_eq!((dma.median, dma.min, dma.max, dma.unit), (50.0, 25.0, 100.0, "op/s"));
        assert_eq!((dma.per_operation.guest_instructions, dma.per_operation.host_cpu_us), (20.0, 10.0));
        assert_eq!(lines[1].over_ide_dma, Some(4.0));
        assert_eq!(lines[2].over_ide_dma, Some(20.0), "against depth 1, as IDE has no queue");
        assert_eq!(lines[1].over_ide_pio, None);
    }
}

//! The comparison for people (a table) and for programs (JSON).

use super::result::{Line, Path};
use serde::Serialize;
use std::io;

/// What `--json` writes.
#[derive(Serialize, Debug)]
pub struct Report<'a> {
    /// Our version.
    pub paravane: &'static str,
    /// What was compared.
    pub what: &'static str,
    /// Which guest did the work.
    pub guest: &'static str,
    /// Measured runs of each device.
    pub runs: u32,
    /// Whether every byte that went through each device was verified.
    pub verified: bool,
    /// The lines.
    pub results: &'a [Line],
}

/// Writes the report as JSON.
pub fn write_json(path: &std::path::Path, report: &Report<'_>) -> io::Result<()> {
    let mut text = serde_json::to_string_pretty(report)?;
    text.push('\n');
    std::fs::write(path, text)
}

const HEADINGS: [&str; 12] = [
    "test",
    "device",
    "median",
    "spread",
    "PIO",
    "MMIO",
    "doorbell",
    "irq",
    "copied B",
    "guest instr",
    "host us",
    "x IDE DMA",
];

/// The table: one block for each test and depth, cost columns for each operation.
pub fn table(lines: &[Line]) -> String {
    let mut rows: Vec<[String; 12]> = vec![HEADINGS.map(str::to_owned)];
    let mut block = None;
    for line in lines {
        let test = (line.test, line.depth);
        let first = block.replace(test) != Some(test);
        rows.push(row(line, first));
    }
    layout(&rows)
}

fn row(line: &Line, first: bool) -> [String; 12] {
    let title = match (first, line.test.is_sequential()) {
        (false, _) => String::new(),
        (true, true) => format!("{}, {} KiB", line.test.name(), line.operation_bytes >> 10),
        (true, false) => format!("{}, depth {}", line.test.name(), line.depth),
    };
    let c = &line.per_operation;
    [
        title,
        line.device.name().to_owned(),
        format!("{} {}", number(line.median), line.unit),
        spread(line),
        number(c.pio),
        number(c.mmio),
        number(c.doorbells),
        number(c.interrupts),
        number(c.bytes_copied),
        number(c.guest_instructions),
        number(c.host_cpu_us),
        match line.over_ide_dma {
            Some(ratio) if line.device != Path::IdeDma => format!("{ratio:.2}"),
            _ => "-".to_owned(),
        },
    ]
}

/// Half the range, in percent of the median.
fn spread(line: &Line) -> String {
    if line.median > 0.0 {
        format!("+-{:.0}%", (line.max - line.min) / 2.0 / line.median * 100.0)
    } else {
        "-".into()
    }
}

/// Three figures that matter.
fn number(v: f64) -> String {
    match v {
        0.0 => "0".into(),
        v if v < 0.01 => format!("{v:.0e}"),
        v if v < 10.0 => format!("{v:.2}"),
        v if v < 100.0 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

fn layout(rows: &[[String; 12]]) -> String {
    let width = |column: usize| rows.iter().map(|r| r[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 12] = std::array::from_fn(width);
    let mut text = String::new();
    for (i, row) in rows.iter().enumerate() {
        if i > 1 && !row[0].is_empty() {
            text.push('\n');
        }
        let cells: Vec<String> = row
            .iter()
            .zip(widths)
            .enumerate()
            .map(|(column, (cell, w))| if column < 2 { format!("{cell:<w$}") } else { format!("{cell:>w$}") })
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::result::{Cost, Key, Sample, Samples, Test, lines};
    use super::*;

    #[test]
    fn the_table_has_a_row_for_each_line_and_names_units() {
        let sample = Sample {
            operations: 10,
            bytes: 1_310_720,
            seconds: 0.01,
            cost: Cost { pio: 1_000, ..Cost::default() },
        };
        let key = |path| Key { test: Test::SequentialRead, depth: 1, path };
        let samples = Samples::from([
            (key(Path::IdeDma), vec![sample; 3]),
            (key(Path::VirtioBlk), vec![Sample { seconds: 0.005, ..sample }]),
        ]);
        let text = table(&lines(&samples));
        assert!(text.contains("sequential read, 128 KiB  IDE DMA"), "{text}");
        assert!(text.contains("131 MB/s") && text.contains("262 MB/s"), "{text}");
        assert!(text.lines().nth(2).is_some_and(|l| l.ends_with("2.00")), "{text}");
    }

    #[test]
    fn numbers_keep_three_figures() {
        for (v, text) in [(0.0, "0"), (0.001, "1e-3"), (0.25, "0.25"), (12.34, "12.3"), (98765.4, "98765")] {
            assert_eq!(number(v), text);
        }
    }
}

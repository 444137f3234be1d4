//! Medians, ratios, geometric means, and the table.

use super::engine::Sample;
use super::suite::{self, CLASSES, DISK, MACHINE_ROWS};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

/// All that was measured, by engine and program.
#[derive(Default)]
pub struct Measured(BTreeMap<String, BTreeMap<String, Vec<Sample>>>);

/// The same, ready for people and programs.
#[derive(Serialize)]
pub struct Report {
    /// Host, versions and the command that made it
    pub about: BTreeMap<String, String>,
    /// Engines in the order of the columns
    pub engines: Vec<String>,
    /// One per program
    pub rows: Vec<Row>,
    /// One per class
    pub classes: Vec<ClassMean>,
    /// Disk tests: geometric mean of paravane's time over that of the better QEMU model
    pub disk_over_qemu: Option<f64>,
    /// By engine: what two threads on two processors do in the time one does a unit
    pub two_threads: BTreeMap<String, f64>,
    /// Programs whose results differ, engines that failed
    pub problems: Vec<String>,
}

/// One program.
#[derive(Serialize)]
pub struct Row {
    /// The program
    pub name: String,
    /// Its class
    pub class: String,
    /// What is counted: `ns` of host CPU time (of a row `…-wall`, of time), or `bytes`
    pub counts: &'static str,
    /// By engine
    pub cells: BTreeMap<String, Cell>,
}

/// One program on one engine.
#[derive(Serialize)]
pub struct Cell {
    /// Median per unit of work
    pub per_unit: f64,
    /// (largest - smallest) / median
    pub spread: f64,
    /// Multiples of native
    pub ratio: Option<f64>,
    /// Every sample
    pub samples: Vec<f64>,
    /// What the program computed
    pub result: String,
}

/// One class: geometric means of the ratios to native.
#[derive(Serialize)]
pub struct ClassMean {
    /// The class
    pub class: String,
    /// By engine
    pub ratios: BTreeMap<String, f64>,
    /// The lowest ratio of the QEMU models, each program by itself
    pub best_qemu: Option<f64>,
}

const NATIVE: &str = "native";

impl Measured {
    /// Adds what one run gave.
    pub fn add(&mut self, engine: &str, samples: Vec<Sample>) {
        for sample in samples {
            self.0.entry(engine.into()).or_default().entry(sample.name.clone()).or_default().push(sample);
        }
    }

    /// Computes the report.
    pub fn report(
        &self,
        engines: Vec<String>,
        about: BTreeMap<String, String>,
        problems: Vec<String>,
    ) -> Report {
        let suite = suite::suite();
        let programs = suite.iter().map(|program| (program.name.as_str(), program.class));
        let machines = MACHINE_ROWS.iter().copied().chain(DISK.iter().map(|name| (*name, "disk")));
        let rows = programs.chain(machines).filter_map(|(name, class)| self.row(name, class, &engines));
        let rows: Vec<Row> = rows.collect();
        let over_qemu: Vec<f64> = rows.iter().filter_map(Row::over_qemu).collect();
        let disk_over_qemu = geometric_mean(over_qemu.iter().copied());
        let problems = problems.into_iter().chain(rows.iter().filter_map(disagreement)).collect();
        let classes = CLASSES.iter().filter_map(|class| class_mean(class, &rows, &engines)).collect();
        let two_threads = two_threads(&rows, &engines);
        Report { about, engines, rows, classes, disk_over_qemu, two_threads, problems }
    }

    fn row(&self, name: &str, class: &str, engines: &[String]) -> Option<Row> {
        let mut cells = BTreeMap::new();
        for engine in engines {
            if let Some(samples) = self.0.get(engine).and_then(|programs| programs.get(name)) {
                cells.insert(engine.clone(), cell(samples));
            }
        }
        let native = cells.get(NATIVE).filter(|cell| cell.measured()).map(|cell| cell.per_unit);
        for cell in cells.values_mut().filter(|cell| cell.measured()) {
            cell.ratio = native.filter(|native| *native > 0.0).map(|native| cell.per_unit / native);
        }
        let counts = if class == "host" { "bytes" } else { "ns" };
        (!cells.is_empty()).then(|| Row { name: name.into(), class: class.into(), counts, cells })
    }
}

impl Cell {
    fn measured(&self) -> bool {
        self.result != "skipped"
    }
}

fn cell(samples: &[Sample]) -> Cell {
    let mut values: Vec<f64> =
        samples.iter().map(|sample| sample.cost as f64 / sample.units.max(1) as f64).collect();
    values.sort_by(f64::total_cmp);
    let results: BTreeSet<&str> = samples.iter().map(|sample| sample.result.as_str()).collect();
    let per_unit = median(&values);
    let range = values.last().unwrap_or(&0.0) - values.first().unwrap_or(&0.0);
    Cell {
        per_unit,
        spread: if per_unit > 0.0 { range / per_unit } else { 0.0 },
        ratio: None,
        samples: values,
        result: results.into_iter().collect::<Vec<_>>().join("|"),
    }
}

fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        length if length % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

fn disagreement(row: &Row) -> Option<String> {
    let results: BTreeSet<&str> =
        row.cells.values().filter(|cell| cell.measured()).map(|cell| cell.result.as_str()).collect();
    if results.len() < 2 {
        return None;
    }
    let each = row.cells.iter().map(|(engine, cell)| format!("{engine} {}", cell.result));
    Some(format!("{}: results differ: {}", row.name, each.collect::<Vec<_>>().join(", ")))
}

fn class_mean(class: &str, rows: &[Row], engines: &[String]) -> Option<ClassMean> {
    let rows: Vec<&Row> = rows.iter().filter(|row| row.class == class).collect();
    let mut ratios = BTreeMap::new();
    for engine in engines.iter().filter(|engine| *engine != NATIVE) {
        let of_engine = rows.iter().filter_map(|row| row.cells.get(engine)?.ratio);
        if let Some(mean) = geometric_mean(of_engine) {
            ratios.insert(engine.clone(), mean);
        }
    }
    let best_qemu = geometric_mean(rows.iter().filter_map(|row| row.best_qemu()));
    (!ratios.is_empty()).then(|| ClassMean { class: class.into(), ratios, best_qemu })
}

fn two_threads(rows: &[Row], engines: &[String]) -> BTreeMap<String, f64> {
    let per_unit = |name: &str, engine: &String| {
        let cell = rows.iter().find(|row| row.name == name)?.cells.get(engine)?;
        Some(cell.per_unit).filter(|time| *time > 0.0)
    };
    let ratio = |engine| Some(per_unit("threads-one", engine)? / per_unit("threads-two", engine)?);
    engines.iter().filter_map(|engine| Some((engine.clone(), ratio(engine)?))).collect()
}

fn geometric_mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0_u32), |(sum, count), value| (sum + value.ln(), count + 1));
    (count > 0).then(|| (sum / f64::from(count)).exp())
}

impl Row {
    /// A disk test has no native run: paravane's time over that of the better QEMU model.
    fn over_qemu(&self) -> Option<f64> {
        let time = |prefix: &str| {
            let engines = self.cells.iter().filter(|(engine, _)| engine.starts_with(prefix));
            engines.map(|(_, cell)| cell.per_unit).min_by(f64::total_cmp).filter(|time| *time > 0.0)
        };
        (self.class == "disk").then(|| Some(time("paravane")? / time("qemu-")?)).flatten()
    }

    fn best_qemu(&self) -> Option<f64> {
        let models = self.cells.iter().filter(|(engine, _)| engine.starts_with("qemu-"));
        models.filter_map(|(_, cell)| cell.ratio).min_by(f64::total_cmp)
    }
}

impl Report {
    /// The tables in Markdown, aligned so that they read well on a terminal too.
    pub fn markdown(&self) -> String {
        let mut text = String::new();
        for (key, value) in &self.about {
            writeln!(text, "- {key}: {value}").ok();
        }
        let mut table = vec![self.header("program", "class")];
        table.extend(self.rows.iter().map(|row| self.row_cells(row)));
        writeln!(text, "\nHost CPU time per unit of work, median; in brackets the multiple of native.\n")
            .ok();
        text.push_str(&align(&table));
        if !self.classes.is_empty() {
            writeln!(text, "\nGeometric mean of the multiples of native.\n").ok();
            text.push_str(&align(&self.class_table()));
        }
        if let Some(mean) = self.disk_over_qemu {
            let each = self
                .rows
                .iter()
                .filter_map(|row| Some(vec![row.name.clone(), format!("{:.2}", row.over_qemu()?)]));
            let mut table = vec![vec!["disk test".to_owned(), "paravane / better qemu".to_owned()]];
            table.extend(each);
            table.push(vec!["geometric mean".into(), format!("{mean:.2}")]);
            writeln!(
                text,
                "\nHost CPU time per disk operation against QEMU, same image, both with cache=writeback.\n"
            )
            .ok();
            text.push_str(&align(&table));
        }
        if !self.two_threads.is_empty() {
            let each: Vec<_> =
                self.two_threads.iter().map(|(engine, n)| format!("{engine} {n:.2}")).collect();
            writeln!(
                text,
                "\nTwo threads on two processors do so many times the work of one: {}.",
                each.join(", ")
            )
            .ok();
        }
        for problem in &self.problems {
            writeln!(text, "\n**{problem}**").ok();
        }
        text
    }

    fn header(&self, first: &str, second: &str) -> Vec<String> {
        [first.to_owned(), second.to_owned()].into_iter().chain(self.engines.iter().cloned()).collect()
    }

    fn row_cells(&self, row: &Row) -> Vec<String> {
        let cells = self.engines.iter().map(|engine| match row.cells.get(engine) {
            None => "-".to_owned(),
            Some(cell) if !cell.measured() => "not offered".to_owned(),
            Some(cell) => match cell.ratio.filter(|_| engine != NATIVE) {
                Some(ratio) => format!("{} ({ratio:.1})", duration(cell.per_unit)),
                None if row.counts == "bytes" => format!("{:.1} MiB", cell.per_unit / f64::from(1 << 20)),
                None => duration(cell.per_unit),
            },
        });
        [row.name.clone(), row.class.clone()].into_iter().chain(cells).collect()
    }

    fn class_table(&self) -> Vec<Vec<String>> {
        let engines: Vec<&String> = self.engines.iter().filter(|engine| *engine != NATIVE).collect();
        let show = |ratio: Option<f64>| ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}"));
        let mut header: Vec<String> = vec!["class".into()];
        header.extend(engines.iter().map(|engine| (*engine).clone()));
        header.push("best qemu".into());
        let mut table = vec![header];
        for mean in &self.classes {
            let mut line = vec![mean.class.clone()];
            line.extend(engines.iter().map(|engine| show(mean.ratios.get(*engine).copied())));
            line.push(show(mean.best_qemu));
            table.push(line);
        }
        table
    }
}

fn duration(ns: f64) -> String {
    match ns {
        ns if ns >= 1e9 => format!("{:.2} s", ns / 1e9),
        ns if ns >= 1e6 => format!("{:.2} ms", ns / 1e6),
        ns if ns >= 1e3 => format!("{:.2} us", ns / 1e3),
        ns => format!("{ns:.1} ns"),
    }
}

fn align(table: &[Vec<String>]) -> String {
    let columns = table.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |column: usize| table.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (at, row) in table.iter().enumerate() {
        for (cell, width) in row.iter().zip(&widths) {
            write!(text, "| {cell:width$} ").ok();
        }
        text.push_str("|\n");
        if at == 0 {
            for (column, width) in widths.iter().enumerate() {
                let colon = if column == 0 { "-" } else { ":" };
                write!(text, "|{}{colon}", "-".repeat(width + 1)).ok();
            }
            text.push_str("|\n");
        }
    }
    text
}

const BEGIN: &str = "<!-- bench:begin -->";
const END: &str = "<!-- bench:end -->";

/// Puts the table between the markers of a document, which is begun or extended where it has none.
pub fn insert(document: &str, table: &str) -> String {
    let block = format!("{BEGIN}\n\n{}\n\n{END}", table.trim());
    match (document.find(BEGIN), document.find(END)) {
        (Some(begin), Some(end)) if begin < end => {
            format!("{}{block}{}", &document[..begin], &document[end + END.len()..])
        }
        _ if document.trim().is_empty() => format!("# Benchmarks\n\n{block}\n"),
        _ => format!("{}\n\n{block}\n", document.trim_end()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(name: &str, cost: u64, result: &str) -> Sample {
        Sample { name: name.into(), units: 2, result: result.into(), cost }
    }

    #[test]
    fn medians_ratios_and_means() {
        let mut measured = Measured::default();
        measured.add(
            "native",
            vec![sample("sort", 200, "1"), sample("sort", 400, "1"), sample("sort", 210, "1")],
        );
        measured.add("native", vec![sample("hash", 100, "2")]);
        measured.add("qemu-max", vec![sample("sort", 840, "1"), sample("hash", 900, "3")]);
        let report = measured.report(vec!["native".into(), "qemu-max".into()], BTreeMap::new(), Vec::new());
        let sort = &report.rows[0].cells["qemu-max"];
        assert_eq!((sort.per_unit, sort.ratio), (420.0, Some(4.0)));
        let mean = report.classes[0].ratios["qemu-max"];
        assert!((mean - 6.0).abs() < 1e-9, "{mean}");
        assert_eq!(report.disk_over_qemu, None);
        assert!(report.two_threads.is_empty());
        assert_eq!(report.problems, ["hash: results differ: native 2, qemu-max 3"]);
    }

    #[test]
    fn disk_tests_are_held_against_the_better_qemu() {
        let mut measured = Measured::default();
        for (engine, one, two) in [("paravane", 100, 400), ("qemu-max", 200, 800), ("qemu-qemu64", 400, 200)]
        {
            measured
                .add(engine, vec![sample("ide/randread/1", one, "0"), sample("virtio/randread/1", two, "0")]);
        }
        let engines = ["paravane", "qemu-max", "qemu-qemu64"].map(str::to_owned).to_vec();
        let report = measured.report(engines, BTreeMap::new(), Vec::new());
        assert!(report.classes.is_empty() && report.problems.is_empty());
        assert_eq!(report.disk_over_qemu, Some(1.0), "0.5 and 2");
        let text = report.markdown();
        assert!(
            text.contains("| ide/randread/1") && text.contains("| 0.50") && text.contains("| geometric mean"),
            "{text}"
        );
    }

    #[test]
    fn two_threads_do_twice_the_work() {
        let mut measured = Measured::default();
        measured.add("paravane", vec![sample("threads-one", 400, "1"), sample("threads-two", 210, "1")]);
        let report = measured.report(vec!["paravane".into()], BTreeMap::new(), Vec::new());
        assert!((report.two_threads["paravane"] - 400.0 / 210.0).abs() < 1e-9);
        assert!(report.markdown().contains("paravane 1.90."), "{}", report.markdown());
    }

    #[test]
    fn the_table_replaces_the_old_one() {
        let once = insert("# B\n\ntext\n", "one");
        let twice = insert(&format!("{once}tail\n"), "two");
        assert!(
            twice.contains("text")
                && twice.contains("two")
                && twice.contains("tail")
                && !twice.contains("one")
        );
    }
}

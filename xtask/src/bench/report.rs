//! Medians, ratios, geometric means, and the table.

use super::sample::Sample;
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
    /// By engine: what two threads on two processors do in the time one does a unit, median over the runs
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
    /// Multiples of native: the median of `ratios`
    pub ratio: Option<f64>,
    /// Every sample, in the order they were taken
    pub samples: Vec<f64>,
    /// Those with native samples beside them, each over their median; in the same order
    pub ratios: Vec<f64>,
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
        let two_threads =
            engines.iter().filter_map(|engine| Some((engine.clone(), self.two_threads(engine)?)));
        let two_threads = two_threads.collect();
        Report { about, engines, rows, classes, disk_over_qemu, two_threads, problems }
    }

    fn row(&self, name: &str, class: &str, engines: &[String]) -> Option<Row> {
        let of_engine = |engine: &String| {
            let samples = if engine == NATIVE { self.native(name) } else { self.of(engine, name).collect() };
            (!samples.is_empty()).then(|| (engine.clone(), cell(&samples)))
        };
        let cells: BTreeMap<_, _> = engines.iter().filter_map(of_engine).collect();
        let counts = if class == "host" { "bytes" } else { "ns" };
        (!cells.is_empty()).then(|| Row { name: name.into(), class: class.into(), counts, cells })
    }

    /// The samples of a program on an engine.
    fn of(&self, engine: &str, name: &str) -> impl Iterator<Item = &Sample> {
        self.0.get(engine).and_then(|programs| programs.get(name)).into_iter().flatten()
    }

    /// A program's native samples: those without a machine, and those beside each machine's.
    fn native(&self, name: &str) -> Vec<&Sample> {
        let beside = self.0.keys().flat_map(|engine| self.of(engine, name)).flat_map(|sample| &sample.beside);
        self.of(NATIVE, name).chain(beside).collect()
    }

    /// The two programs are neighbours in the suite, so each run of a machine gives a figure by itself, and another one
    /// for what ran natively beside them.
    fn two_threads(&self, engine: &str) -> Option<f64> {
        let mut figures = self.one_over_two(engine, |sample| Some(per_unit(sample)));
        if engine == NATIVE {
            figures.extend(self.0.keys().flat_map(|machine| self.one_over_two(machine, native_per_unit)));
        }
        (!figures.is_empty()).then(|| median(&figures))
    }

    fn one_over_two(&self, engine: &str, time: fn(&Sample) -> Option<f64>) -> Vec<f64> {
        let times = |name| self.of(engine, name).map(move |sample| time(sample).filter(|time| *time > 0.0));
        times("threads-one").zip(times("threads-two")).filter_map(|(one, two)| Some(one? / two?)).collect()
    }
}

impl Cell {
    fn measured(&self) -> bool {
        self.result != "skipped"
    }
}

fn cell(samples: &[&Sample]) -> Cell {
    let values: Vec<f64> = samples.iter().map(|sample| per_unit(sample)).collect();
    let ratios: Vec<f64> = samples.iter().filter_map(|sample| ratio(sample)).collect();
    let results: BTreeSet<&str> = samples.iter().map(|sample| sample.result.as_str()).collect();
    let per_unit = median(&values);
    let largest = values.iter().copied().max_by(f64::total_cmp).unwrap_or(0.0);
    let smallest = values.iter().copied().min_by(f64::total_cmp).unwrap_or(0.0);
    Cell {
        per_unit,
        spread: if per_unit > 0.0 { (largest - smallest) / per_unit } else { 0.0 },
        ratio: (!ratios.is_empty()).then(|| median(&ratios)),
        samples: values,
        ratios,
        result: results.into_iter().collect::<Vec<_>>().join("|"),
    }
}

fn per_unit(sample: &Sample) -> f64 {
    sample.cost as f64 / sample.units.max(1) as f64
}

/// The median of what ran natively beside a sample.
fn native_per_unit(sample: &Sample) -> Option<f64> {
    let native = sample.beside.iter().filter(|native| native.measured());
    Some(median(&native.map(per_unit).collect::<Vec<_>>())).filter(|native| *native > 0.0)
}

/// A sample as a multiple of what ran natively beside it.
fn ratio(sample: &Sample) -> Option<f64> {
    native_per_unit(sample).filter(|_| sample.measured()).map(|native| per_unit(sample) / native)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
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
        let brackets =
            "the multiple of native, median over the samples, each held against the native runs beside it";
        writeln!(text, "\nHost CPU time per unit of work, median; in brackets {brackets}.\n").ok();
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
            Some(cell) => match cell.ratio {
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
        Sample { name: name.into(), units: 2, result: result.into(), cost, beside: Vec::new() }
    }

    fn beside(sample: Sample, native: &[u64]) -> Sample {
        let of_cost = |cost: &u64| Sample { cost: *cost, ..sample.clone() };
        Sample { beside: native.iter().map(of_cost).collect(), ..sample }
    }

    #[test]
    fn medians_ratios_and_means() {
        let mut measured = Measured::default();
        let sort = beside(sample("sort", 840, "1"), &[200, 400, 210]);
        let mut hash = beside(sample("hash", 900, "3"), &[100]);
        hash.beside[0].result = "2".into();
        measured.add("qemu-max", vec![sort, hash]);
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
    fn a_sample_is_held_against_what_ran_beside_it() {
        let mut measured = Measured::default();
        // The host is twice as fast in the second round, and slow again when it is the other machine's turn.
        let slow = beside(sample("sort", 800, "1"), &[400, 390, 480]);
        let fast = beside(sample("sort", 440, "1"), &[200, 180]);
        measured.add("paravane", vec![slow]);
        measured.add("paravane", vec![fast, sample("hash", 10, "1")]);
        measured.add("qemu-max", vec![beside(sample("sort", 1200, "1"), &[400])]);
        let engines = ["native", "paravane", "qemu-max"].map(str::to_owned).to_vec();
        let report = measured.report(engines, BTreeMap::new(), Vec::new());
        let [sort, hash] = report.rows.as_slice() else { panic!("two rows") };
        let paravane = &sort.cells["paravane"];
        assert_eq!(paravane.samples, [400.0, 220.0]);
        assert_eq!(paravane.ratios, [2.0, 440.0 / 190.0]);
        assert_eq!(paravane.ratio, Some(f64::midpoint(2.0, 440.0 / 190.0)));
        assert_eq!(sort.cells["qemu-max"].ratio, Some(3.0));
        let native = &sort.cells["native"];
        assert_eq!((native.samples.len(), native.per_unit, native.ratio), (6, 197.5, None));
        assert!((native.spread - 150.0 / 197.5).abs() < 1e-9);
        assert!(hash.cells["paravane"].ratio.is_none() && !hash.cells.contains_key("native"));
    }

    #[test]
    fn what_a_processor_lacks_has_no_ratio() {
        let mut measured = Measured::default();
        let mut natively = beside(sample("avx2", 800, "1"), &[400]);
        natively.beside[0].result = "skipped".into();
        measured.add("paravane", vec![natively]);
        measured.add("qemu-qemu64", vec![sample("avx2", 0, "skipped")]);
        let engines = ["native", "paravane", "qemu-qemu64"].map(str::to_owned).to_vec();
        let report = measured.report(engines, BTreeMap::new(), Vec::new());
        assert!(report.rows[0].cells.values().all(|cell| cell.ratio.is_none()));
        assert!(report.classes.is_empty() && report.problems.is_empty());
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
    fn each_run_of_two_threads_counts_by_itself() {
        let mut measured = Measured::default();
        for speed in [1, 2, 7] {
            let one = beside(sample("threads-one", 400 * speed, "1"), &[110 * speed]);
            let two =
                beside(sample("threads-two", 200 * speed, "1"), &[100 * speed, 90 * speed, 100 * speed]);
            measured.add("paravane", vec![one, two]);
        }
        let engines = ["native", "paravane"].map(str::to_owned).to_vec();
        let report = measured.report(engines, BTreeMap::new(), Vec::new());
        let expected = [("native".to_owned(), 1.1), ("paravane".to_owned(), 2.0)];
        assert_eq!(report.two_threads, BTreeMap::from(expected));
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

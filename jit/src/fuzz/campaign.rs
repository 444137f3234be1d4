//! Many cases: every form in turn, then sequences, and a report of what was covered.

use super::forms::{LeftOut, forms};
use super::{Bench, Failure, Verdict};
use iced_x86::{Code, Formatter, IntelFormatter};
use paravane_cpu::Engine;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::{Duration, Instant};

/// How much to run.
#[derive(Clone, Debug)]
pub struct Campaign {
    /// The first seed; each round takes the next.
    pub seed: u64,
    /// Cases per form.
    pub rounds: u64,
    /// Sequences, after the single instructions.
    pub sequences: u64,
    /// Steps of a sequence.
    pub length: usize,
    /// Stop starting new rounds after this long.
    pub time: Duration,
    /// Beginnings of the names of forms to leave out.
    pub skip: Vec<String>,
    /// If not empty, the same of the only forms to take.
    pub only: Vec<String>,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    /// Cases run by form; a form that was never exercised has zero.
    pub exercised: BTreeMap<String, u64>,
    /// Forms left out, by reason.
    pub left_out: BTreeMap<LeftOut, Vec<Code>>,
    /// Sequences run.
    pub sequences: u64,
    /// At most one failure for each form, and a few of sequences.
    pub failures: Vec<Failure>,
    /// Failing cases, by form.
    pub failing: BTreeMap<String, u64>,
}

/// Failing sequences shown at most.
const SEQUENCES_SHOWN: usize = 20;

impl Campaign {
    fn skips(&self, form: Code) -> bool {
        let name = format!("{form:?}");
        let listed = |list: &[String]| list.iter().any(|beginning| name.starts_with(beginning));
        listed(&self.skip) || !(self.only.is_empty() || listed(&self.only))
    }

    /// Runs the campaign on `engine`.
    pub fn run(&self, bench: &mut Bench, engine: &mut dyn Engine) -> Report {
        let mut report = Report::default();
        let mut admitted = Vec::new();
        for (form, verdict) in forms(bench.bits()) {
            match verdict {
                Ok(()) if self.skips(form) => {}
                Ok(()) => admitted.push(form),
                Err(reason) => report.left_out.entry(reason).or_default().push(form),
            }
        }
        let start = Instant::now();
        for seed in (self.seed..).take(self.rounds as usize) {
            if start.elapsed() > self.time {
                break;
            }
            for &form in &admitted {
                // Hangs cost seconds each.
                if start.elapsed() > self.time * 3 {
                    break;
                }
                report.count(form, bench.check(engine, form, seed));
            }
        }
        let mut shown = 0;
        for seed in (self.seed..).take(self.sequences as usize) {
            if start.elapsed() > self.time || shown >= SEQUENCES_SHOWN {
                break;
            }
            match bench.check_sequence(engine, &admitted, self.length, seed) {
                Verdict::Nothing => {}
                Verdict::Same => report.sequences += 1,
                Verdict::Different(failure) => {
                    report.sequences += 1;
                    report.failures.push(*failure);
                    shown += 1;
                }
            }
        }
        report
    }
}

impl Report {
    fn count(&mut self, form: Code, verdict: Verdict) {
        let name = format!("{form:?}");
        let count = self.exercised.entry(name.clone()).or_default();
        match verdict {
            Verdict::Nothing => {}
            Verdict::Same => *count += 1,
            Verdict::Different(failure) => {
                *count += 1;
                let failing = self.failing.entry(name).or_default();
                *failing += 1;
                if *failing == 1 {
                    self.failures.push(*failure);
                }
            }
        }
    }

    /// Forms, cases and what was not covered, in a few lines.
    pub fn summary(&self) -> String {
        let cases: u64 = self.exercised.values().sum();
        let never: Vec<&str> =
            self.exercised.iter().filter(|(_, n)| **n == 0).map(|(form, _)| form.as_str()).collect();
        let mut text = format!(
            "{} forms, {cases} cases, {} sequences, {} forms fail\n",
            self.exercised.len() - never.len(),
            self.sequences,
            self.failing.len()
        );
        let _ = writeln!(text, "never exercised: {never:?}");
        for (reason, forms) in &self.left_out {
            let _ = writeln!(text, "left out, {reason:?}: {} forms", forms.len());
        }
        text
    }
}

impl Failure {
    /// Bytes, disassembly, state and differences.
    pub fn text(&self, bits: u32) -> String {
        let mut text = format!("seed {} form {:?}\n", self.seed, self.form);
        let ip = self.case.instruction.ip();
        let length = self.case.code.len() as u64;
        let start = if length > 15 { ip & !4095 | super::OFFSET } else { ip };
        let mut decoder = iced_x86::Decoder::with_ip(bits, &self.case.code, start, 0);
        while decoder.can_decode() {
            let at = decoder.position();
            let instruction = decoder.decode();
            let bytes = &self.case.code[at..decoder.position()];
            let bytes: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
            let mut line = String::new();
            IntelFormatter::new().format(&instruction, &mut line);
            let _ = writeln!(text, "    {bytes:<24} {line}");
        }
        for difference in &self.differences {
            let _ = writeln!(text, "  {difference}");
        }
        let registers: Vec<String> = self
            .case
            .state
            .gpr
            .iter()
            .enumerate()
            .filter(|(_, v)| **v != 0)
            .map(|(n, v)| format!("{n}={v:#x}"))
            .collect();
        let _ = writeln!(text, "  before: rflags {:#x} gpr {}", self.case.state.rflags, registers.join(" "));
        text
    }
}

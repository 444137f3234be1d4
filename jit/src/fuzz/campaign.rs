//! Many cases: every form in turn, then programs, and a report of what was covered.

use super::forms::{LeftOut, forms, offered_by};
use super::{Bench, Failure, Pools, Verdict};
use iced_x86::{Code, Formatter, IntelFormatter};
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
    /// Programs, after the single instructions.
    pub programs: u64,
    /// Steps of the longest program; at least two.
    pub length: usize,
    /// Stop starting new rounds after this long.
    pub time: Duration,
    /// Beginnings of the names of forms to leave out.
    pub skip: Vec<String>,
    /// If not empty, the same of the only forms to take, in programs too. No form, no case.
    pub only: Vec<String>,
}

/// What came of it.
#[derive(Debug)]
pub struct Report {
    /// Times executed, by form: alone, and in programs.
    pub exercised: Vec<u64>,
    /// The forms that could be drawn.
    pub admitted: Vec<Code>,
    /// Cases of one instruction.
    pub cases: u64,
    /// Programs run.
    pub programs: u64,
    /// Page faults that were mended, and the instruction resumed.
    pub mends: u64,
    /// Hot loops that the engines made traces of.
    pub traces: u64,
    /// At most one failure for each form, and a few of programs.
    pub failures: Vec<Failure>,
    /// Failing cases, by form.
    pub failing: BTreeMap<String, u64>,
    /// How long it took.
    pub time: Duration,
}

/// Failing programs shown at most.
const PROGRAMS_SHOWN: usize = 20;

impl Campaign {
    fn skips(&self, form: Code) -> bool {
        let name = format!("{form:?}");
        let listed = |list: &[String]| list.iter().any(|beginning| name.starts_with(beginning));
        listed(&self.skip) || !(self.only.is_empty() || listed(&self.only))
    }

    /// Runs the campaign.
    pub fn run(&self, bench: &mut Bench) -> Report {
        let admitted = forms(bench.bits()).into_iter().filter(|(form, v)| v.is_ok() && !self.skips(*form));
        let mut admitted: Vec<Code> = admitted.map(|(form, _)| form).collect();
        if !self.skips(Code::INVALID) {
            admitted.push(Code::INVALID);
        }
        let mut report = Report::new(admitted.clone());
        let (mends, traces) = (bench.mends, bench.counter("traces"));
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
                report.count(form, bench.check(form, seed));
            }
        }
        if admitted.is_empty() {
            return report;
        }
        let pools = Pools::new(admitted);
        let mut shown = 0;
        for seed in (self.seed..).take(self.programs as usize) {
            if start.elapsed() > self.time || shown >= PROGRAMS_SHOWN {
                break;
            }
            let length = 2 + (seed % (self.length as u64 - 1)) as usize;
            match bench.check_program(&pools, length, seed) {
                Verdict::Nothing => {}
                Verdict::Same(executed) => {
                    report.programs += 1;
                    report.add(&executed);
                }
                Verdict::Different(failure) => {
                    report.programs += 1;
                    report.failures.push(*failure);
                    shown += 1;
                }
            }
        }
        report.time = start.elapsed();
        report.mends = bench.mends - mends;
        report.traces = bench.counter("traces") - traces;
        report
    }
}

impl Report {
    fn new(admitted: Vec<Code>) -> Report {
        Report {
            exercised: vec![0; Code::values().len()],
            admitted,
            cases: 0,
            programs: 0,
            mends: 0,
            traces: 0,
            failures: Vec::new(),
            failing: BTreeMap::new(),
            time: Duration::ZERO,
        }
    }

    fn add(&mut self, executed: &[Code]) {
        for &form in executed {
            self.exercised[form as usize] += 1;
        }
    }

    fn count(&mut self, form: Code, verdict: Verdict) {
        match verdict {
            Verdict::Nothing => {}
            Verdict::Same(executed) => {
                self.cases += 1;
                self.add(&executed);
            }
            Verdict::Different(failure) => {
                self.cases += 1;
                let failing = self.failing.entry(format!("{form:?}")).or_default();
                *failing += 1;
                if *failing == 1 {
                    self.failures.push(*failure);
                }
            }
        }
    }

    /// Instructions executed, on the host and in each engine.
    pub fn instructions(&self) -> u64 {
        self.exercised.iter().sum()
    }

    /// A line for every form that some model offers in code of `bits`: how often it was executed, or why never; and in
    /// which models it is.
    pub fn coverage(&self, bits: u32) -> String {
        let mut text = String::new();
        for (form, verdict) in forms(bits) {
            let note = match verdict {
                Err(LeftOut::Mode | LeftOut::Encoding | LeftOut::NotOffered(_)) => continue,
                Err(reason) => reason.reason(),
                Ok(()) => format!("{} times", self.exercised[form as usize]),
            };
            let _ = writeln!(text, "{bits}\t{form:?}\t{note}\t{}", offered_by(form).join(" "));
        }
        text
    }

    /// Forms that could be drawn and never ran.
    pub fn missing(&self) -> Vec<Code> {
        self.admitted.iter().copied().filter(|&c| self.exercised[c as usize] == 0).collect()
    }

    /// Takes over what another campaign executed.
    pub fn join(&mut self, other: &Report) {
        for (sum, n) in self.exercised.iter_mut().zip(&other.exercised) {
            *sum += n;
        }
        self.cases += other.cases;
        self.programs += other.programs;
        self.mends += other.mends;
        self.traces += other.traces;
    }

    /// Forms, cases and what was not covered, in a few lines.
    pub fn summary(&self) -> String {
        let seconds = self.time.as_secs_f64();
        format!(
            "{} instructions of {} forms in {seconds:.1} s ({:.0}/s): {} alone, {} faults mended, {} programs, {} traces; \
             {} forms fail; never drawn: {:?}",
            self.instructions(),
            self.exercised.iter().filter(|&&n| n > 0).count(),
            self.instructions() as f64 / seconds.max(0.001),
            self.cases,
            self.mends,
            self.programs,
            self.traces,
            self.failing.len(),
            self.missing(),
        )
    }
}

impl Failure {
    /// Bytes, disassembly, state and differences.
    pub fn text(&self, bits: u32) -> String {
        let mut text = format!("seed {} form {:?}\n", self.seed, self.form);
        let start = (self.case.instruction.ip() & !0xFFF) + super::OFFSET;
        let mut decoder = iced_x86::Decoder::with_ip(bits, &self.case.code, start, 0);
        while decoder.can_decode() {
            let at = decoder.position();
            let instruction = decoder.decode();
            if matches!(instruction.code(), Code::Int3 | Code::Nopd | Code::Nopw) && self.case.code.len() > 15
            {
                // A gap in a program, or what remains of a step that does not matter.
                continue;
            }
            let bytes = &self.case.code[at..decoder.position()];
            let bytes: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
            let mut line = String::new();
            IntelFormatter::new().format(&instruction, &mut line);
            let _ = writeln!(text, "    {:x} {bytes:<24} {line}", instruction.ip());
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

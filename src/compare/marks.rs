//! Marks that the guest sets around what is measured, and the counters read at them.
//!
//! A mark arrives on the vCPU's thread inside a device access. It is stamped, the vCPU is asked to stop, and between
//! two instructions, where every counter is current, the counters are read.

use super::result::Cost;
use crate::run::Vcpu;
use crate::stats::{self, Snapshot};
use paravane_cpu::CpuState;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

/// What the guest says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Mark {
    /// A measured section begins.
    Begin,
    /// It ends.
    End,
    /// The job is complete; sections since the last one belong to it.
    Job(String),
    /// All is done.
    Done,
    /// The guest gives up.
    Failed,
}

struct Stamped {
    mark: Mark,
    at: Instant,
    cpu_ns: u64,
}

/// Sections of one job, added up.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Section {
    /// What `Mark::Job` said.
    pub(super) job: String,
    /// Host time between begin and end.
    pub(super) seconds: f64,
    /// What it cost.
    pub(super) cost: Cost,
}

/// How a guest's measuring ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum End {
    Done,
    Failed,
}

struct Open {
    at: Instant,
    cpu_ns: u64,
    instructions: u64,
    counters: Snapshot,
}

#[derive(Default)]
struct State {
    arrived: Vec<Stamped>,
    open: Option<Open>,
    seconds: f64,
    cost: Cost,
    sections: Vec<Section>,
    end: Option<End>,
}

/// Where marks arrive and sections are kept.
#[derive(Default)]
pub(super) struct Marks {
    state: Mutex<State>,
    vcpu: OnceLock<Arc<Vcpu>>,
}

impl Marks {
    /// Whom to stop at a mark; may be set once.
    pub(super) fn attach(&self, vcpu: Arc<Vcpu>) {
        let _already_set = self.vcpu.set(vcpu);
    }

    /// The guest sets a mark.
    pub(super) fn mark(&self, mark: Mark) {
        let stamped = Stamped { mark, at: Instant::now(), cpu_ns: stats::process_cpu_ns() };
        self.state.lock().expect("marks").arrived.push(stamped);
        if let Some(vcpu) = self.vcpu.get() {
            vcpu.stop();
        }
    }

    /// Reads the counters for the marks that arrived; called between two instructions. Returns how it ended, if it did.
    pub(super) fn settle(&self, cpu: &CpuState, counters: impl Fn() -> Snapshot) -> Option<End> {
        let mut state = self.state.lock().expect("marks");
        for stamped in std::mem::take(&mut state.arrived) {
            match stamped.mark {
                Mark::Begin => {
                    let counters = counters();
                    let instructions = cpu.instructions;
                    let cpu_ns = stats::process_cpu_ns();
                    state.open = Some(Open { at: Instant::now(), cpu_ns, instructions, counters });
                }
                Mark::End => state.close(&stamped, cpu, &counters()),
                Mark::Job(job) => {
                    let section = Section {
                        job,
                        seconds: std::mem::take(&mut state.seconds),
                        cost: std::mem::take(&mut state.cost),
                    };
                    state.sections.push(section);
                }
                Mark::Done => state.end = Some(End::Done),
                Mark::Failed => state.end = Some(End::Failed),
            }
        }
        state.end
    }

    /// What was measured.
    pub(super) fn take(&self) -> Vec<Section> {
        std::mem::take(&mut self.state.lock().expect("marks").sections)
    }

    /// How it ended, if it did.
    pub(super) fn end(&self) -> Option<End> {
        self.state.lock().expect("marks").end
    }

    /// Jobs complete so far.
    pub(super) fn progress(&self) -> usize {
        self.state.lock().expect("marks").sections.len()
    }
}

/// The sum of all counters called `name`.
fn sum(counters: &Snapshot, name: &str) -> u64 {
    counters.values().filter_map(|group| group.get(name)).sum()
}

impl State {
    /// Ends a section; an end without a beginning measures nothing.
    fn close(&mut self, stamped: &Stamped, cpu: &CpuState, after: &Snapshot) {
        let Some(open) = self.open.take() else { return };
        let counted = stats::difference(&open.counters, after);
        let doorbells = sum(&counted, "doorbells");
        let add = Cost {
            pio: sum(&counted, "exits_pio"),
            mmio: sum(&counted, "exits_mmio").saturating_sub(doorbells),
            doorbells,
            interrupts: sum(&counted, "interrupts_taken"),
            copied: sum(&counted, "bytes_copied"),
            instructions: cpu.instructions.saturating_sub(open.instructions),
            cpu_ns: stamped.cpu_ns.saturating_sub(open.cpu_ns),
        };
        self.seconds += stamped.at.saturating_duration_since(open.at).as_secs_f64();
        self.cost.add(&add);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn sections_of_a_job_add_up() {
        let marks = Marks::default();
        let mut cpu = CpuState::reset(0);
        let counters = |pio: u64| {
            move || Snapshot::from([("cpu0".to_owned(), BTreeMap::from([("exits_pio".to_owned(), pio)]))])
        };
        for round in 0..2 {
            marks.mark(Mark::Begin);
            marks.settle(&cpu, counters(10));
            cpu.instructions += 100;
            marks.mark(Mark::End);
            marks.settle(&cpu, counters(13 + round));
        }
        marks.mark(Mark::Job("a".into()));
        marks.mark(Mark::Done);
        assert_eq!(marks.settle(&cpu, counters(0)), Some(End::Done));
        let sections = marks.take();
        assert_eq!(sections.len(), 1);
        assert_eq!((sections[0].cost.pio, sections[0].cost.instructions), (3 + 4, 200));
        assert!(sections[0].seconds > 0.0);
    }

    #[test]
    fn a_wild_guest_measures_nothing() {
        let marks = Marks::default();
        marks.mark(Mark::End);
        marks.mark(Mark::Job("x".into()));
        marks.settle(&CpuState::reset(0), Snapshot::new);
        assert_eq!(marks.take()[0].cost, Cost::default());
    }
}

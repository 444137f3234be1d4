//! Conformance with the host CPU: random user-mode instructions of every form, run natively and in the engines.
//!
//! A case is one instruction ([`generate`], [`place`], [`encode`]) or a program of some thirty ([`program`]) with random
//! registers, flags and memory, all derived from a 64-bit seed; it runs in [`Native`] and, at the same addresses, in a guest
//! ([`Guest`]) under each [`Engine`]. What the manual leaves undefined (SDM 2, each instruction's "Flags Affected") is
//! masked where it is not known how this host leaves it; everything else must be equal: registers, flags, x87, SSE and
//! AVX state, the arena, the exception with error code and address; then, where a page fault can be mended, the same
//! once more when the instruction went on. What AMD's processors do differently from that manual is listed in
//! [`vendor`].
//!
//! Invariant of the unsafe calls: what runs natively passed [`safety`], so it stays in user mode, and its
//! accesses and branches end inside the arena and the code page, or in a fault that [`Native`] catches.

mod campaign;
mod compare;
mod encode;
mod flow;
mod forms;
mod generate;
mod guest;
mod place;
mod program;
mod random;
mod safety;
mod siege;
mod state;
mod trace;
mod vendor;
mod watch;

pub use campaign::{Campaign, Report};
pub use compare::Leave;
pub use forms::{LeftOut, admit, forms, offered_by};
pub use generate::{Case, Generator, OFFSET, TraceEnd};
pub use guest::{Guest, GuestCase};
pub use program::{Pools, Program};
pub use random::Random;
pub use safety::{Accesses, Exits, Situation};
pub use siege::Siege;

use watch::Watch;

use crate::host::{Native, NativeLayout, NativeMode, NativeState, NativeStop};
use iced_x86::{Code, InstructionInfoFactory};
use paravane_cpu::{Attention, Engine, Exit, FpuState};
use std::io;
use std::sync::Arc;

/// Where a case ended.
#[derive(Clone, PartialEq, Debug)]
pub struct Outcome {
    /// The exception that ended it; `#BP` behind the instruction if all went well.
    pub stop: NativeStop,
    /// Registers after.
    pub state: NativeState,
    /// The arena after.
    pub arena: Vec<u8>,
}

impl Outcome {
    fn empty() -> Outcome {
        let state = NativeState { gpr: [0; 16], rflags: 0, fpu: FpuState::initial() };
        Outcome { stop: NativeStop::default(), state, arena: Vec::new() }
    }
}

/// A case in which engine and host disagree.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The seed that makes the case again.
    pub seed: u64,
    /// The form it was drawn for; of a program the one that it ends with.
    pub form: Code,
    /// The case, reduced.
    pub case: Case,
    /// What differs, one line each: the engine, host's value, engine's value.
    pub differences: Vec<String>,
}

/// How one case went.
#[derive(Debug)]
pub enum Verdict {
    /// Host and engines agree; what was executed.
    Same(Vec<Code>),
    /// The dice produced nothing that may run.
    Nothing,
    /// They disagree.
    Different(Box<Failure>),
}

/// An engine under test.
struct Subject {
    name: &'static str,
    engine: Box<dyn Engine>,
    leave: Leave,
}

/// Host and guest side by side.
pub struct Bench {
    native: Native,
    guest: Guest,
    mode: NativeMode,
    generator: Generator,
    subjects: Vec<Subject>,
    watch: Option<Watch>,
    factory: InstructionInfoFactory,
    /// Memory of the tracer's.
    spare: Vec<u8>,
    /// Where the last case ended, natively and in the last engine.
    host: Outcome,
    guests: Outcome,
    /// Where it ended natively after its page fault was mended, if it was.
    mended: Outcome,
    is_mended: bool,
    /// Faults mended so far.
    mends: u64,
    /// Whether programs do without locked operands on two cache lines, which this host makes slow. Cases of one instruction
    /// have them.
    avoids_split_locks: bool,
}

/// The only difference of a case that the watch had to end.
const HANG: &str = "the engine does not come to an end";

impl Bench {
    /// Maps code and arena here and lays out the same in a guest. One at a time per process: see [`Native::new`].
    pub fn new(mode: NativeMode) -> io::Result<Bench> {
        let layout =
            NativeLayout { code: 0x4000_0000, data: 0x5000_0000, writable_pages: 2, read_only_pages: 1 };
        let mut native = Native::new(layout)?;
        if mode == NativeMode::Protected16 {
            native.allow_sixteen_bits()?;
        }
        Ok(Bench {
            native,
            guest: Guest::new(layout)?,
            mode,
            generator: Generator::new(mode.bits(), mode.seen(layout)),
            subjects: Vec::new(),
            watch: None,
            factory: InstructionInfoFactory::new(),
            spare: Vec::new(),
            host: Outcome::empty(),
            guests: Outcome::empty(),
            mended: Outcome::empty(),
            is_mended: false,
            mends: 0,
            avoids_split_locks: paravane_memory::split_locks_are_dear(),
        })
    }

    /// Adds an engine, built on the memory of [`Self::guest`]; every case runs in all of them.
    pub fn add(&mut self, name: &'static str, engine: Box<dyn Engine>, leave: Leave) {
        self.subjects.push(Subject { name, engine, leave });
    }

    /// From now on, an engine that listens to `attention` and does not end a case is stopped, and that is a finding.
    pub fn watch(&mut self, attention: Attention) {
        self.watch = Some(Watch::start(attention));
    }

    /// The guest, whose memory engines are built on.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// 16, 32 or 64.
    pub fn bits(&self) -> u32 {
        self.generator.bits
    }

    /// The sum of the engines' counters of this name.
    pub fn counter(&self, name: &str) -> u64 {
        let counters = self.subjects.iter().flat_map(|s| s.engine.counters());
        counters.filter(|(counter, _)| counter == name).map(|(_, value)| value).sum()
    }

    /// Draws the case of `form` and `seed` and runs it on all sides.
    pub fn check(&mut self, form: Code, seed: u64) -> Verdict {
        let mut random = Random::new(seed ^ ((form as u64) << 40));
        let Some(case) = (0..16).find_map(|_| self.generator.case(form, &mut random)) else {
            return Verdict::Nothing;
        };
        let differences = self.differences(&case);
        if differences.is_empty() {
            return Verdict::Same(case.executed);
        }
        if is_hang(&differences) {
            // Every try would take as long again.
            return Verdict::Different(Box::new(Failure { seed, form, case, differences }));
        }
        let case = self.reduce(case);
        let differences = self.again(&case, differences);
        Verdict::Different(Box::new(Failure { seed, form, case, differences }))
    }

    /// Draws a program of up to `length` steps from `pools` and runs it on all sides.
    pub fn check_program(&mut self, pools: &Pools, length: usize, seed: u64) -> Verdict {
        let mut random = Random::new(seed);
        let Some(program) = Program::draw(self, pools, length, &mut random) else {
            return Verdict::Nothing;
        };
        let differences = self.differences(program.case());
        if differences.is_empty() {
            program.expect(&self.host, seed);
            return Verdict::Same(program.case().executed.clone());
        }
        let program = if is_hang(&differences) { program } else { program.shorten(self) };
        let case = program.case().clone();
        let differences = self.again(&case, differences);
        Verdict::Different(Box::new(Failure { seed, form: case.instruction.code(), case, differences }))
    }

    /// What differs when `case` is repeated; `first`, what did before, if nothing does.
    fn again(&mut self, case: &Case, first: Vec<String>) -> Vec<String> {
        let again = self.differences(case);
        if again.is_empty() {
            first.into_iter().map(|line| format!("not again: {line}")).collect()
        } else {
            again
        }
    }

    /// What differs between host and engines; empty if nothing does.
    pub fn differences(&mut self, case: &Case) -> Vec<String> {
        self.run_on_host(case);
        self.mend_on_host(case);
        let mut all = Vec::new();
        for number in 0..self.subjects.len() {
            if let Some(watch) = &self.watch {
                watch.next_case();
            }
            let guest_case = GuestCase {
                code_page: self.native.code_page(),
                arena: &case.arena,
                state: &case.state,
                rip: self.generator.layout.code + OFFSET,
            };
            let subject = &mut self.subjects[number];
            let ended = self.guest.run(&mut *subject.engine, self.mode, &guest_case, &mut self.guests);
            let (bits, leave) = (self.generator.bits, subject.leave);
            let mut lines = match &ended {
                Ok(()) => compare::differences(case, bits, leave, &self.host, &self.guests),
                Err(exit) => vec![stopped(*exit, &self.guests)],
            };
            // Not where the engine was allowed to end otherwise.
            if self.is_mended && lines.is_empty() && self.guests.stop.vector == 14 {
                let ended = self.guest.mend(&mut *subject.engine, self.mode, &mut self.guests);
                let after = match ended {
                    Ok(()) => compare::differences(case, bits, leave, &self.mended, &self.guests),
                    Err(exit) => vec![stopped(exit, &self.guests)],
                };
                lines.extend(after.into_iter().map(|line| format!("the fault mended: {line}")));
            }
            all.extend(lines.into_iter().map(|line| format!("{}: {line}", subject.name)));
        }
        all
    }

    /// Runs `case` natively.
    pub fn on_host(&mut self, case: &Case) -> Outcome {
        self.run_on_host(case);
        self.host.clone()
    }

    fn run_on_host(&mut self, case: &Case) {
        self.native.set_code(OFFSET as usize, &case.code);
        self.native.arena().copy_from_slice(&case.arena);
        self.host.state.clone_from(&case.state);
        let exits = match &case.end {
            Some(end) => end.exits,
            None => self.exits(case),
        };
        let (mode, state) = (self.mode, &mut self.host.state);
        // SAFETY: the generator lets only forms pass that stay in user mode, and cases whose accesses and branches
        // cannot reach anything of this process but the arena (`safety`); programs were traced.
        self.host.stop = unsafe { self.native.run(mode, OFFSET as usize, exits.offsets(), state) };
        self.host.arena.clear();
        self.host.arena.extend_from_slice(self.native.arena_bytes());
    }

    /// A single instruction that faulted on the arena's read-only pages goes on with these writable.
    fn mend_on_host(&mut self, case: &Case) {
        self.is_mended = false;
        let stop = self.host.stop;
        let arena = self.native.layout().data..self.native.layout().data + self.generator.layout.data_len();
        let mendable = stop.vector == 14 && stop.error_code & 3 == 3 && arena.contains(&stop.address);
        if !mendable || case.end.is_some() || case.code.len() > 15 {
            return;
        }
        let mut rest = case.clone();
        rest.state.clone_from(&self.host.state);
        rest.arena = self.host.arena.as_slice().into();
        if !self.generator.is_acceptable(&rest) || self.native.protect(true).is_err() {
            return;
        }
        std::mem::swap(&mut self.host, &mut self.mended);
        self.run_on_host(&rest);
        std::mem::swap(&mut self.host, &mut self.mended);
        self.native.protect(false).expect("as it was before");
        self.is_mended = true;
        self.mends += 1;
    }

    /// Where a case of one instruction ends without signals.
    fn exits(&mut self, case: &Case) -> Exits {
        let now = self.generator.situation(case);
        if now.accesses(&mut self.factory, &[]).code { Exits::default() } else { now.exits() }
    }

    /// Zeroes everything the disagreement does not need.
    fn reduce(&mut self, mut case: Case) -> Case {
        let keep = |bench: &mut Bench, smaller: Case, case: &mut Case| {
            if bench.generator.is_acceptable(&smaller) && !bench.differences(&smaller).is_empty() {
                *case = smaller;
            }
        };
        for register in 0..16 {
            let mut smaller = case.clone();
            smaller.state.gpr[register] = 0;
            keep(self, smaller, &mut case);
        }
        for part in [32..160, 160..416, 576..832] {
            let mut smaller = case.clone();
            smaller.state.fpu.0[part].fill(0);
            keep(self, smaller, &mut case);
        }
        let mut smaller = case.clone();
        Arc::make_mut(&mut smaller.arena).fill(0);
        keep(self, smaller, &mut case);
        let mut smaller = case.clone();
        smaller.state.rflags = 0x202;
        keep(self, smaller, &mut case);
        case
    }
}

/// Why an engine did not come to the exception that ends a case.
fn stopped(exit: Exit, at: &Outcome) -> String {
    match exit {
        Exit::Stop => format!("{HANG}: at {:#x}, registers {:x?}", at.stop.rip, at.state.gpr),
        Exit::Unsupported => "the engine does not support it".into(),
        exit => format!("the engine stopped with {exit:?}"),
    }
}

/// Whether an engine had to be stopped.
fn is_hang(differences: &[String]) -> bool {
    differences.iter().any(|d| d.contains(HANG))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Benches map the same addresses.
    static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());

    fn compare_twice(bench: &mut Bench, case: &Case) {
        let bits = bench.bits();
        let (first, second) = (bench.on_host(case), bench.on_host(case));
        let differences = compare::differences(case, bits, Leave::Nothing, &first, &second);
        assert!(differences.is_empty(), "{:?} {:x?} {differences:?}", case.instruction.code(), case.code);
    }

    fn admitted(bits: u32) -> Vec<Code> {
        forms(bits).into_iter().filter(|(_, v)| v.is_ok()).map(|(c, _)| c).collect()
    }

    /// The oracle answers the same question twice alike, for every form, and survives all of them.
    #[test]
    fn the_host_is_repeatable() {
        let _guard = ONE_AT_A_TIME.lock();
        for mode in [NativeMode::Long, NativeMode::Protected32] {
            let mut bench = Bench::new(mode).unwrap();
            let mut ran = 0;
            for form in admitted(bench.bits()) {
                for seed in 0..20 {
                    let mut random = Random::new(seed);
                    let Some(case) = bench.generator.case(form, &mut random) else { continue };
                    compare_twice(&mut bench, &case);
                    ran += 1;
                }
            }
            assert!(ran > 10_000, "only {ran} cases ran in {mode:?}");
        }
    }

    /// Programs are what was asked for, and run in one piece as they did step by step.
    #[test]
    fn programs_grow_and_are_repeatable() {
        let _guard = ONE_AT_A_TIME.lock();
        for mode in [NativeMode::Long, NativeMode::Protected32] {
            let mut bench = Bench::new(mode).unwrap();
            let pools = Pools::new(admitted(bench.bits()));
            let (mut steps, mut executed, mut through, mut loops) = (0, 0, 0, 0);
            for seed in 0..300 {
                let mut random = Random::new(seed);
                let program = Program::draw(&mut bench, &pools, 20, &mut random).unwrap();
                let case = program.case();
                compare_twice(&mut bench, case);
                program.expect(&bench.on_host(case), seed);
                steps += program.steps.len();
                executed += case.executed.len();
                through += usize::from(bench.on_host(case).stop.vector == 3);
                loops += usize::from(case.executed.len() > program.steps.len() + 8);
            }
            assert!(steps > 300 * 10, "{steps} steps");
            assert!(executed > steps, "{executed} instructions in {steps} steps");
            assert!((50..300).contains(&through), "{through} programs came to their ends");
            assert!(loops > 5, "{loops} loops");
        }
    }
}

//! Conformance with the host CPU: random user-mode instructions of every form, run natively and in an engine.
//!
//! A case is one instruction with random registers, flags and memory, all derived from a 64-bit seed; it runs in
//! [`Native`] and, at the same linear addresses, in a guest ([`Guest`]) under any [`Engine`]. What the manual
//! leaves undefined (SDM 2, each instruction's "Flags Affected") is masked; everything else must be equal:
//! registers, flags, x87, SSE and AVX state, the arena, the exception with error code and address.
//!
//! Invariant of the one unsafe call: what runs natively passed [`safety`], so it stays in user mode, and its
//! accesses and branches end inside the arena and the code page, or in a fault that [`Native`] catches.

mod campaign;
mod compare;
mod forms;
mod generate;
mod guest;
mod random;
mod safety;
mod sequence;
mod vendor;
mod watch;

pub use campaign::{Campaign, Report};
pub use compare::Leave;
pub use forms::{LeftOut, admit, forms};
pub use generate::{Case, Generator, OFFSET};
pub use guest::{Guest, GuestCase};
pub use random::Random;

use sequence::Sequence;
use watch::Watch;

use crate::host::{Native, NativeLayout, NativeMode, NativeState, NativeStop};
use iced_x86::Code;
use paravane_cpu::{Attention, Engine, Exit};
use std::io;

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

/// A case in which engine and host disagree.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The form and the seed that make the case again.
    pub seed: u64,
    /// The form it was drawn for.
    pub form: Code,
    /// The case, reduced.
    pub case: Case,
    /// What differs, one line each: host's value, engine's value.
    pub differences: Vec<String>,
}

/// How one case went.
#[derive(Debug)]
pub enum Verdict {
    /// Host and engine agree.
    Same,
    /// The dice produced nothing that may run.
    Nothing,
    /// They disagree.
    Different(Box<Failure>),
}

/// Host and guest side by side.
pub struct Bench {
    native: Native,
    guest: Guest,
    mode: NativeMode,
    generator: Generator,
    leave: Leave,
    watch: Option<Watch>,
}

/// The only difference of a case that the watch had to end.
const HANG: &str = "the engine does not come to an end";

impl Bench {
    /// Maps code and arena here and lays out the same in a guest. One at a time per process: see [`Native::new`].
    pub fn new(mode: NativeMode, leave: Leave) -> io::Result<Bench> {
        let layout =
            NativeLayout { code: 0x4000_0000, data: 0x5000_0000, writable_pages: 2, read_only_pages: 1 };
        let bits = if mode == NativeMode::Long { 64 } else { 32 };
        Ok(Bench {
            native: Native::new(layout)?,
            guest: Guest::new(layout)?,
            mode,
            generator: Generator { bits, layout },
            leave,
            watch: None,
        })
    }

    /// From now on, an engine that listens to `attention` and does not end a case is stopped, and that is a finding.
    pub fn watch(&mut self, attention: Attention) {
        self.watch = Some(Watch::start(attention));
    }

    /// The guest, whose memory engines are built on.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// 32 or 64.
    pub fn bits(&self) -> u32 {
        self.generator.bits
    }

    /// Draws the case of `form` and `seed` and runs it on both sides.
    pub fn check(&mut self, engine: &mut dyn Engine, form: Code, seed: u64) -> Verdict {
        let mut random = Random::new(seed ^ ((form as u64) << 40));
        let Some(case) = (0..16).find_map(|_| self.generator.case(form, &mut random)) else {
            return Verdict::Nothing;
        };
        let differences = self.differences(engine, &case);
        if differences.is_empty() {
            return Verdict::Same;
        }
        if differences == [HANG] {
            // Every try would take as long again.
            return Verdict::Different(Box::new(Failure { seed, form, case, differences }));
        }
        let case = self.reduce(engine, case);
        let differences = self.differences(engine, &case);
        Verdict::Different(Box::new(Failure { seed, form, case, differences }))
    }

    /// Draws a sequence of up to `length` instructions from `forms` and runs it on both sides.
    pub fn check_sequence(
        &mut self,
        engine: &mut dyn Engine,
        forms: &[Code],
        length: usize,
        seed: u64,
    ) -> Verdict {
        let mut random = Random::new(seed);
        let Some(sequence) = Sequence::draw(self, forms, length, &mut random) else {
            return Verdict::Nothing;
        };
        if self.differences(engine, &sequence.case()).is_empty() {
            return Verdict::Same;
        }
        let sequence = sequence.shorten(self, engine);
        let case = sequence.case();
        let differences = self.differences(engine, &case);
        let form = case.instruction.code();
        Verdict::Different(Box::new(Failure { seed, form, case, differences }))
    }

    /// What differs between host and engine; empty if nothing does.
    pub fn differences(&mut self, engine: &mut dyn Engine, case: &Case) -> Vec<String> {
        let host = self.on_host(case);
        let guest_case = GuestCase {
            code_page: self.native.code_page(),
            arena: &case.arena,
            state: &case.state,
            rip: self.generator.layout.code + OFFSET,
        };
        if let Some(watch) = &self.watch {
            watch.next_case();
        }
        match self.guest.run(engine, self.mode, &guest_case) {
            Ok(engine) => compare::differences(case, self.generator.bits, self.leave, &host, &engine),
            Err(Exit::Stop) => vec![HANG.into()],
            Err(Exit::Unsupported) => vec!["the engine does not support it".into()],
            Err(exit) => vec![format!("the engine stopped with {exit:?}")],
        }
    }

    /// Runs `case` natively.
    pub fn on_host(&mut self, case: &Case) -> Outcome {
        self.native.set_code(OFFSET as usize, &case.code);
        self.native.arena().copy_from_slice(&case.arena);
        let mut state = case.state.clone();
        // SAFETY: the generator lets only forms pass that stay in user mode, and cases whose accesses and branches
        // cannot reach anything of this process but the arena (`safety`).
        let stop = unsafe { self.native.run(self.mode, OFFSET as usize, &mut state) };
        Outcome { stop, state, arena: self.native.arena().to_vec() }
    }

    /// Zeroes everything the disagreement does not need.
    fn reduce(&mut self, engine: &mut dyn Engine, mut case: Case) -> Case {
        let mut keep = |bench: &mut Bench, smaller: Case, case: &mut Case| {
            let harmless = safety::is_harmless(&smaller, bench.generator.bits);
            if harmless && !bench.differences(engine, &smaller).is_empty() {
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
        smaller.arena.fill(0);
        keep(self, smaller, &mut case);
        let mut smaller = case.clone();
        smaller.state.rflags = 0x202;
        keep(self, smaller, &mut case);
        case
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Benches map the same addresses.
    static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());

    /// The oracle answers the same question twice alike, for every form, and survives all of them.
    #[test]
    fn the_host_is_repeatable() {
        let _guard = ONE_AT_A_TIME.lock();
        for mode in [NativeMode::Long, NativeMode::Protected32] {
            let mut bench = Bench::new(mode, Leave::Nothing).unwrap();
            let bits = bench.bits();
            let mut ran = 0;
            for (form, admitted) in forms(bits) {
                for seed in 0..if admitted.is_ok() { 20 } else { 0 } {
                    let mut random = Random::new(seed);
                    let Some(case) = bench.generator.case(form, &mut random) else { continue };
                    let (first, second) = (bench.on_host(&case), bench.on_host(&case));
                    let differences = compare::differences(&case, bits, Leave::Nothing, &first, &second);
                    assert!(differences.is_empty(), "{form:?} {:x?} {differences:?}", case.code);
                    ran += 1;
                }
            }
            assert!(ran > 10_000, "only {ran} cases ran in {mode:?}");
        }
    }

    #[test]
    fn sequences_grow_and_are_repeatable() {
        let _guard = ONE_AT_A_TIME.lock();
        let mut bench = Bench::new(NativeMode::Long, Leave::Nothing).unwrap();
        let admitted: Vec<Code> = forms(64).into_iter().filter(|(_, v)| v.is_ok()).map(|(c, _)| c).collect();
        let mut bytes = 0;
        for seed in 0..200 {
            let mut random = Random::new(seed);
            let sequence = Sequence::draw(&mut bench, &admitted, 8, &mut random).unwrap();
            let case = sequence.case();
            let (first, second) = (bench.on_host(&case), bench.on_host(&case));
            assert_eq!(
                compare::differences(&case, 64, Leave::Nothing, &first, &second),
                Vec::<String>::new()
            );
            bytes += case.code.len();
        }
        assert!(bytes > 200 * 30, "{bytes}");
    }
}

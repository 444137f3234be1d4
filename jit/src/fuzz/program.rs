//! Programs of some thirty instructions: what a translator may get wrong between instructions (flag liveness, groups of
//! accesses, register allocation, block ends) shows only there.
//!
//! A program grows where it runs. The host executes it one instruction at a time ([`Tracer`]), so that the registers in
//! front of the next one are known; where its operands want other values, MOVs of constants set them. Branches, calls,
//! returns and loops ([`super::flow`]) are traced like everything else: nothing is executed that was not found harmless
//! with just these registers, in every turn of a loop. No instruction reads a flag or a byte
//! of memory that depends on the processor.

use super::Bench;
use super::generate::{Case, OFFSET};
use super::random::Random;
use super::trace::{Refused, Step, Tracer};
use crate::host::NativeState;
use iced_x86::{Code, Mnemonic};
use paravane_cpu::FpuState;
use std::sync::Arc;

/// Where in its page a program may lie.
pub(super) const END: u64 = 0xE00;
/// Room that is kept behind every step for a jump to somewhere else.
const WAY_OUT: u64 = 6;
/// What a longest step may need.
const STEP: u64 = 96;

/// Forms to draw from.
pub struct Pools {
    /// All of them.
    pub all: Vec<Code>,
    /// The integer core.
    core: Vec<Code>,
    /// What reads flags.
    consumers: Vec<Code>,
}

impl Pools {
    /// Sorts `all`, of which there must be one at least; where a kind is missing, others take its place.
    pub fn new(all: Vec<Code>) -> Pools {
        use iced_x86::CpuidFeature as F;
        let is_core = |c: &Code| {
            let features = c.cpuid_features();
            features.iter().all(|f| {
                matches!(
                    f,
                    F::INTEL8086 | F::INTEL186 | F::INTEL286 | F::INTEL386 | F::INTEL486 | F::X64 | F::CMOV
                )
            })
        };
        let or = |some: Vec<Code>, others: &[Code]| if some.is_empty() { others.to_vec() } else { some };
        let core = or(all.iter().copied().filter(is_core).collect(), &all);
        let consumers = or(core.iter().copied().filter(|&c| reads_flags(c)).collect(), &core);
        Pools { all, core, consumers }
    }
}

fn reads_flags(code: Code) -> bool {
    use Mnemonic as M;
    let name = format!("{:?}", code.mnemonic());
    let conditional = ["Set", "Cmov", "Pushf"].iter().any(|beginning| name.starts_with(beginning));
    conditional || matches!(code.mnemonic(), M::Adc | M::Sbb | M::Rcl | M::Rcr | M::Lahf | M::Cmc | M::Salc)
}

/// A return that is outstanding: where it goes, and the stack pointer it needs.
#[derive(Clone, Copy)]
pub(super) struct Return {
    pub to: u64,
    pub rsp: u64,
}

/// A loop whose end was not written yet.
#[derive(Clone, Copy)]
pub(super) struct Loop {
    pub counter: usize,
    pub head: u64,
}

/// Steps, and the state they start from.
#[derive(Clone)]
pub struct Program {
    state: NativeState,
    arena: Arc<[u8]>,
    pub(super) steps: Vec<Step>,
    pub(super) returns: Vec<Return>,
    pub(super) loops: Vec<Loop>,
    /// How its last trace went.
    case: Option<Case>,
}

impl Program {
    /// Grows a program of about `length` steps; none if not even one was found.
    pub fn draw(bench: &mut Bench, pools: &Pools, length: usize, random: &mut Random) -> Option<Program> {
        let state = bench.generator.random_state(random);
        let arena = bench.generator.random_arena(random);
        let mut program =
            Program { state, arena, steps: Vec::new(), returns: Vec::new(), loops: Vec::new(), case: None };
        let mut tracer = Tracer::new(bench, &program.state, &program.arena);
        for _ in 0..length * 2 {
            if tracer.has_ended() || program.steps.len() >= length {
                break;
            }
            tracer.save();
            tracer.may_end = random.one_in(4);
            let (steps, returns, loops) =
                (program.steps.len(), program.returns.clone(), program.loops.clone());
            let before = tracer.now.gpr;
            let grown = program.grow(&tracer, pools, random);
            let traced = grown.then(|| tracer.go(&program.steps));
            let good = match traced {
                None | Some(Err(Refused)) => false,
                // Most exceptions would leave programs short: try another.
                Some(Ok(())) if tracer.has_ended() => tracer.may_end,
                Some(Ok(())) => program.spares_counters(&before, &tracer.now, loops.len(), random),
            };
            if !good {
                program.steps.truncate(steps);
                program.returns = returns;
                program.loops = loops;
                tracer.restore();
            }
        }
        program.case = tracer.finish(&program.steps);
        program.case.is_some().then_some(program)
    }

    /// The instructions `code`, from registers `gpr` (RSP is a good idea) and an arena of zeros; none if that could do harm.
    pub fn of(bench: &mut Bench, code: &[u8], gpr: [u64; 16]) -> Option<Program> {
        let mut state = bench.generator.random_state(&mut Random::new(0));
        state.gpr = gpr;
        state.rflags = 0x202;
        state.fpu = FpuState::initial();
        let arena = vec![0; bench.generator.layout.data_len() as usize].into();
        let mut program =
            Program { state, arena, steps: Vec::new(), returns: Vec::new(), loops: Vec::new(), case: None };
        let mut at = 0;
        while at < code.len() {
            let offset = START + at as u64;
            let instruction = bench.generator.decode(&code[at..], bench.generator.layout.code + offset);
            let length = if instruction.is_invalid() { code.len() - at } else { instruction.len() };
            let bytes = code.get(at..at + length)?.to_vec();
            at += bytes.len();
            program.steps.push(Step::new(offset, Vec::new(), &bytes, instruction, bench.bits()));
        }
        program.trace(bench).then_some(program)
    }

    /// Whether counters of open loops are as before, or the dice allow it.
    fn spares_counters(
        &self,
        before: &[u64; 16],
        now: &NativeState,
        open: usize,
        random: &mut Random,
    ) -> bool {
        let still_open = self.loops.iter().take(open);
        still_open.clone().all(|l| before[l.counter] == now.gpr[l.counter]) || random.one_in(8)
    }

    /// Writes the next step, or several that belong together; false if the dice were not good.
    fn grow(&mut self, tracer: &Tracer<'_>, pools: &Pools, random: &mut Random) -> bool {
        let at = tracer.rip;
        if self.room(at) < STEP + WAY_OUT {
            return self.leave(tracer, at);
        }
        if !self.loops.is_empty() && random.one_in(6) {
            return self.begin_or_end_loop(tracer, random);
        }
        match random.below(16) {
            0 => self.branch(tracer, random),
            1 => self.jump(tracer, random),
            2 => self.call_or_return(tracer, random),
            3 => self.begin_or_end_loop(tracer, random),
            4 | 5 => self.draw_step(tracer, random.pick(&pools.consumers), random),
            6..=11 => self.draw_step(tracer, random.pick(&pools.core), random),
            _ => self.draw_step(tracer, random.pick(&pools.all), random),
        }
    }

    fn draw_step(&mut self, tracer: &Tracer<'_>, form: Code, random: &mut Random) -> bool {
        let at = tracer.rip;
        let generator = tracer.generator();
        let mut wanted = tracer.now.clone();
        let Some(drawn) = generator.draw(form, at, &mut wanted, random) else { return false };
        let moves = Step::moves(&tracer.now, &wanted);
        let setup = Step::setup_len(&moves, generator.bits);
        let Some((bytes, instruction)) = generator.finish(form, drawn, at + setup, random) else {
            return false;
        };
        let step = Step::new(at, moves, &bytes, instruction, generator.bits);
        let fits = step.end() + WAY_OUT <= at + self.room(at);
        self.steps.push(step);
        fits
    }

    /// Bytes free at `at`.
    pub(super) fn room(&self, at: u64) -> u64 {
        let next = self.steps.iter().map(|s| s.at).filter(|&s| s >= at).min().unwrap_or(END);
        next.min(END).saturating_sub(at)
    }

    /// The first byte behind everything written, and a few left free.
    pub(super) fn behind(&self, at: u64, random: &mut Random) -> u64 {
        self.steps.iter().map(Step::end).max().unwrap_or(at).max(at) + random.below(40)
    }

    /// Out of room: a jump behind everything else, if the page has not come to its end.
    fn leave(&mut self, tracer: &Tracer<'_>, at: u64) -> bool {
        let to = self.steps.iter().map(Step::end).max().unwrap_or(at);
        if self.room(at) < WAY_OUT || to + STEP + 2 * WAY_OUT > END || to <= at + WAY_OUT {
            return false;
        }
        self.write(tracer, at, &super::flow::jump(tracer.generator().bits, at, to))
    }

    /// Adds a step without setup.
    pub(super) fn write(&mut self, tracer: &Tracer<'_>, at: u64, bytes: &[u8]) -> bool {
        self.write_with(tracer, at, Vec::new(), bytes)
    }

    /// Adds a step of known bytes; `moves` come first.
    pub(super) fn write_with(
        &mut self,
        tracer: &Tracer<'_>,
        at: u64,
        moves: Vec<(usize, u64)>,
        bytes: &[u8],
    ) -> bool {
        let generator = tracer.generator();
        let setup = Step::setup_len(&moves, generator.bits);
        let instruction = generator.decode(bytes, generator.layout.code + at + setup);
        self.steps.push(Step::new(at, moves, bytes, instruction, generator.bits));
        true
    }

    /// The whole program as one case.
    pub fn case(&self) -> &Case {
        self.case.as_ref().expect("a program that was drawn ran")
    }

    /// Panics if `whole` is not where the trace ended: the host would not do the same thing twice.
    pub(super) fn expect(&self, whole: &super::Outcome, seed: u64) {
        let case = self.case();
        let Some(traced) = case.end.as_ref().map(|end| &end.state) else { return };
        let fpu = traced.fpu.0.iter().zip(&whole.state.fpu.0).enumerate();
        let fpu: Vec<_> = fpu.filter(|(_, (a, b))| a != b).map(|(at, (a, b))| (at, *a, *b)).collect();
        assert_eq!(Some(traced), Some(&whole.state), "seed {seed}, FPU {fpu:x?}, {:x?}", case.code);
    }

    /// Leaves out every step that the disagreement does not need: NOPs take its place.
    pub fn shorten(mut self, bench: &mut Bench) -> Program {
        for number in (0..self.steps.len()).rev() {
            let mut shorter = self.clone();
            let bits = bench.generator.bits;
            shorter.steps[number].empty(&bench.generator, bits);
            if shorter.trace(bench) && !bench.differences(shorter.case()).is_empty() {
                self = shorter;
            }
        }
        self
    }

    /// Runs it once more from the beginning; false if that would do harm or never end.
    fn trace(&mut self, bench: &mut Bench) -> bool {
        let mut tracer = Tracer::new(bench, &self.state, &self.arena);
        let through = tracer.go(&self.steps).is_ok();
        self.case = tracer.finish(&self.steps).filter(|_| through);
        self.case.is_some()
    }
}

/// Where a program begins.
pub(super) const START: u64 = OFFSET;

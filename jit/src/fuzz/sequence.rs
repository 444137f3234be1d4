//! Straight-line sequences: what a translator may get wrong between instructions (flag liveness, groups of
//! accesses, register allocation) shows only there.
//!
//! A sequence grows one step at a time. The host runs what there is so far, so that the registers in front of the
//! next instruction are known; where its operands want other values, MOVs of constants set them. No
//! instruction reads a flag that the manual leaves undefined.

use super::generate::{Case, OFFSET, random_state};
use super::random::Random;
use super::{Bench, Outcome, compare, safety};
use crate::host::NativeState;
use iced_x86::{Code, FlowControl, Mnemonic, OpKind, RflagsBits};
use paravane_cpu::{Engine, flags};

/// Room for code in its page.
const ROOM: u64 = 0x800;

/// One instruction and the MOVs that prepare its registers.
#[derive(Clone)]
struct Step {
    setup: Vec<u8>,
    code: Vec<u8>,
    case: Case,
}

/// Steps that run one after the other.
pub struct Sequence {
    state: NativeState,
    arena: Vec<u8>,
    steps: Vec<Step>,
}

impl Sequence {
    /// Draws a sequence; none if not even one step was found.
    pub fn draw(bench: &mut Bench, forms: &[Code], length: usize, random: &mut Random) -> Option<Sequence> {
        let state = random_state(bench.bits(), random);
        let arena = bench.generator.random_arena(random);
        let mut sequence = Sequence { state, arena, steps: Vec::new() };
        let mut now = sequence.beginning();
        let mut ended = false;
        for _ in 0..length * 3 {
            if ended || sequence.steps.len() >= length || sequence.length() > ROOM {
                break;
            }
            let step = if random.one_in(5) {
                sequence.hop(bench, &now, random)
            } else {
                sequence.step(bench, random.pick(forms), &now, random)
            };
            let Some(step) = step else { continue };
            sequence.steps.push(step);
            let after = bench.on_host(&sequence.case());
            ended = after.stop.vector != 3 || after.stop.rip != sequence.end(bench) + 1;
            if ended && !random.one_in(4) {
                // Most exceptions and branches would leave sequences short: try another.
                sequence.steps.pop();
                ended = false;
                continue;
            }
            now = after;
        }
        (!sequence.steps.is_empty()).then_some(sequence)
    }

    fn beginning(&self) -> Outcome {
        Outcome { stop: Default::default(), state: self.state.clone(), arena: self.arena.clone() }
    }

    fn length(&self) -> u64 {
        self.steps.iter().map(|s| (s.setup.len() + s.code.len()) as u64).sum()
    }

    fn end(&self, bench: &Bench) -> u64 {
        bench.generator.layout.code + OFFSET + self.length()
    }

    fn open(&self) -> u64 {
        self.steps.last().map_or(0, |s| s.case.open)
    }

    /// An instruction of `form` to come next, from the registers `now`.
    fn step(&self, bench: &Bench, form: Code, now: &Outcome, random: &mut Random) -> Option<Step> {
        // The setup's length is not known yet, and addresses relative to RIP depend on it: draw once to learn it,
        // then the same again at the right place.
        let bits = bench.bits();
        let draw = |offset: u64| {
            let state = now.state.clone();
            bench.generator.case_in(form, offset, state, now.arena.clone(), &mut random.clone())
        };
        let offset = OFFSET + self.length();
        let setup = setup(bits, &now.state, &draw(offset)?.state);
        let mut case = draw(offset + setup.len() as u64)?;
        random.bits();
        // What the generator put into memory or vector registers is not there when the sequence runs.
        case.arena.clone_from(&now.arena);
        case.state.fpu = now.state.fpu.clone();
        case.state.rflags = now.state.rflags;
        if !safety::is_harmless(&case, bits) || !self.is_determined(&case) {
            return None;
        }
        case.open_before = self.open();
        case.open = open_after(&case, self.open());
        Some(Step { setup, code: case.code.clone(), case })
    }

    /// A branch to the instruction behind it: nothing changes, but a block ends here.
    fn hop(&self, bench: &Bench, now: &Outcome, random: &mut Random) -> Option<Step> {
        let opcode = random.pick(&[0xEB, 0x70 + random.clone().below(16) as u8]);
        let code = vec![opcode, 0];
        let ip = bench.generator.layout.code + OFFSET + self.length();
        let open = self.open();
        let case = Case {
            instruction: bench.generator.decode(&code, ip),
            code: code.clone(),
            state: now.state.clone(),
            arena: now.arena.clone(),
            open_before: open,
            open,
        };
        self.is_determined(&case).then_some(Step { setup: Vec::new(), code, case })
    }

    /// Whether `case` depends on nothing undefined.
    fn is_determined(&self, case: &Case) -> bool {
        let i = &case.instruction;
        let open_result = compare::is_open_result(i) || super::vendor::differs(i, &case.code, &case.state);
        // The last x87 instruction's address and opcode are not tracked by engines.
        let environment =
            matches!(i.mnemonic(), Mnemonic::Fnsave | Mnemonic::Fnstenv | Mnemonic::Fsave | Mnemonic::Fstenv);
        // TF and AC from the stack change what every later instruction does.
        let popf = matches!(i.mnemonic(), Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq);
        !open_result && !environment && !popf && from_iced(i.rflags_read()) & self.open() == 0
    }

    /// The whole sequence as one case.
    pub fn case(&self) -> Case {
        let last = &self.steps[self.steps.len() - 1].case;
        let code = self.steps.iter().flat_map(|s| s.setup.iter().chain(&s.code)).copied().collect();
        Case { code, state: self.state.clone(), arena: self.arena.clone(), ..last.clone() }
    }

    /// Leaves out every step that the disagreement does not need.
    pub fn shorten(mut self, bench: &mut Bench, engine: &mut dyn Engine) -> Sequence {
        let mut at = 0;
        while at < self.steps.len() && self.steps.len() > 1 {
            match self.without(at, bench) {
                Some(shorter) if !bench.differences(engine, &shorter.case()).is_empty() => self = shorter,
                _ => at += 1,
            }
        }
        self
    }

    /// The sequence without step `at`, if what remains is harmless and still goes through to its last step.
    fn without(&self, at: usize, bench: &mut Bench) -> Option<Sequence> {
        let mut shorter =
            Sequence { state: self.state.clone(), arena: self.arena.clone(), steps: Vec::new() };
        let mut now = shorter.beginning();
        for (number, step) in self.steps.iter().enumerate().filter(|(n, _)| *n != at) {
            let mut step = step.clone();
            let offset = OFFSET + shorter.length() + step.setup.len() as u64;
            step.case.instruction = bench.generator.decode(&step.code, bench.generator.layout.code + offset);
            let prepared = step.case.state.clone();
            step.case.state = now.state.clone();
            apply_setup(&self.steps[number].setup, bench.bits(), &prepared, &mut step.case.state);
            step.case.arena = now.arena.clone();
            if !safety::is_harmless(&step.case, bench.bits()) || !shorter.is_determined(&step.case) {
                return None;
            }
            step.case.open_before = shorter.open();
            step.case.open = open_after(&step.case, shorter.open());
            shorter.steps.push(step);
            now = bench.on_host(&shorter.case());
            let through = now.stop.vector == 3 && now.stop.rip == shorter.end(bench) + 1;
            if !through && number + 1 < self.steps.len() {
                return None;
            }
        }
        (!shorter.steps.is_empty()).then_some(shorter)
    }
}

/// MOVs that turn the general registers `from` into `to`; they leave flags alone.
fn setup(bits: u32, from: &NativeState, to: &NativeState) -> Vec<u8> {
    let mut code = Vec::new();
    let count = if bits == 64 { 16 } else { 8 };
    for n in 0..count {
        if from.gpr[n] == to.gpr[n] {
            continue;
        }
        if bits == 64 {
            code.push(if n < 8 { 0x48 } else { 0x49 });
            code.push(0xB8 + (n as u8 & 7));
            code.extend(to.gpr[n].to_le_bytes());
        } else {
            code.push(0xB8 + n as u8);
            code.extend((to.gpr[n] as u32).to_le_bytes());
        }
    }
    code
}

/// Does to `state` what the MOVs in `setup` do; their values are in `prepared`.
fn apply_setup(setup: &[u8], bits: u32, prepared: &NativeState, state: &mut NativeState) {
    let length = if bits == 64 { 10 } else { 5 };
    for mov in setup.chunks_exact(length) {
        let number = if bits == 64 {
            usize::from(mov[1] - 0xB8) + if mov[0] == 0x49 { 8 } else { 0 }
        } else {
            usize::from(mov[0] - 0xB8)
        };
        state.gpr[number] = prepared.gpr[number];
    }
}

/// Undefined flags behind an instruction, given those before it.
fn open_after(case: &Case, before: u64) -> u64 {
    let i = &case.instruction;
    let own = compare::undefined_flags(i, case.state.gpr[1]);
    let last = i.op_count().saturating_sub(1);
    // A count of zero leaves all flags as they were; a REP that does nothing too.
    let conditional = i.op_count() > 0 && i.op_kind(last) == OpKind::Register && is_shift(i.mnemonic());
    if conditional || i.has_rep_prefix() || i.has_repne_prefix() || i.flow_control() != FlowControl::Next {
        return before | own;
    }
    let defined = from_iced(i.rflags_modified()) & !own;
    (before & !defined) | own
}

fn is_shift(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    )
}

/// iced-x86's flag bits as EFLAGS bits.
pub fn from_iced(bits: u32) -> u64 {
    [
        (RflagsBits::OF, flags::OF),
        (RflagsBits::SF, flags::SF),
        (RflagsBits::ZF, flags::ZF),
        (RflagsBits::AF, flags::AF),
        (RflagsBits::CF, flags::CF),
        (RflagsBits::PF, flags::PF),
    ]
    .iter()
    .filter(|(bit, _)| bits & bit != 0)
    .map(|(_, flag)| flag)
    .sum()
}

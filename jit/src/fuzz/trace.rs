//! Executes a program on the host one instruction at a time, each only after it was found harmless.
//!
//! Invariant of the one unsafe call: the step passed [`Situation::accesses`] with the registers and the arena it starts
//! from, and does not branch into itself, so that it ends in the arena and the code page, or in a fault.

use super::Bench;
use super::compare;
use super::generate::{Case, Generator, OFFSET, TraceEnd};
use super::program::{END, START};
use super::safety::{Exits, Situation};
use crate::host::{NativeState, NativeStop};
use iced_x86::{Code, FlowControl, Instruction, Mnemonic, OpKind};
use std::ops::Range;
use std::sync::Arc;

/// Instructions that a program may execute, all turns of its loops together.
const LIMIT: usize = 1_500;

/// One instruction and the MOVs that prepare its registers.
#[derive(Clone)]
pub struct Step {
    /// Offset in the code page.
    pub at: u64,
    moves: Vec<(usize, u64)>,
    setup: usize,
    bytes: Vec<u8>,
    instruction: Instruction,
}

impl Step {
    pub(super) fn new(
        at: u64,
        moves: Vec<(usize, u64)>,
        code: &[u8],
        instruction: Instruction,
        bits: u32,
    ) -> Step {
        let setup = Step::setup_len(&moves, bits) as usize;
        let mut bytes = Vec::with_capacity(setup + code.len());
        Step::write_setup(&moves, bits, &mut bytes);
        bytes.extend_from_slice(code);
        Step { at, moves, setup, bytes, instruction }
    }

    /// Registers that differ.
    pub(super) fn moves(from: &NativeState, to: &NativeState) -> Vec<(usize, u64)> {
        (0..16).filter(|&n| from.gpr[n] != to.gpr[n]).map(|n| (n, to.gpr[n])).collect()
    }

    /// Bytes of the MOVs of `moves`.
    pub(super) fn setup_len(moves: &[(usize, u64)], bits: u32) -> u64 {
        let each = match bits {
            64 => 10,
            32 => 5,
            _ => 6,
        };
        moves.len() as u64 * each
    }

    /// MOVs of constants; they leave flags alone.
    fn write_setup(moves: &[(usize, u64)], bits: u32, code: &mut Vec<u8>) {
        for &(number, value) in moves {
            match bits {
                64 => code.push(if number < 8 { 0x48 } else { 0x49 }),
                16 => code.push(0x66),
                _ => {}
            }
            code.push(0xB8 + (number as u8 & 7));
            code.extend_from_slice(&value.to_le_bytes()[..if bits == 64 { 8 } else { 4 }]);
        }
    }

    /// The byte behind it.
    pub fn end(&self) -> u64 {
        self.at + self.bytes.len() as u64
    }

    /// Makes NOPs of it.
    pub(super) fn empty(&mut self, generator: &Generator, bits: u32) {
        let nops = vec![0x90; self.bytes.len()];
        let instruction = generator.decode(&nops, generator.layout.code + self.at);
        *self = Step::new(self.at, Vec::new(), &nops, instruction, bits);
    }
}

/// An instruction would do harm or depend on something undefined, or the program does not end.
pub(super) struct Refused;

/// Where a trace stood.
struct Checkpoint {
    now: NativeState,
    rip: u64,
    open: u64,
    open_before: u64,
    open_memory: usize,
    executed: usize,
    last: usize,
}

/// A program under way. The arena is the bench's own, as it is now.
pub(super) struct Tracer<'a> {
    bench: &'a mut Bench,
    start: NativeState,
    arena: Arc<[u8]>,
    saved: Checkpoint,
    /// Whether the arena may differ from the saved one, which is the bench's spare memory.
    wrote: bool,
    /// Whether an exception may end it now; if not, what surely faults is refused at once, which saves a signal.
    pub(super) may_end: bool,
    /// Registers now.
    pub(super) now: NativeState,
    /// Offset in the code page of what comes next.
    pub(super) rip: u64,
    open: u64,
    open_before: u64,
    /// Addresses whose bytes depend on the processor.
    open_memory: Vec<Range<u64>>,
    stop: Option<NativeStop>,
    executed: Vec<Code>,
    last: usize,
}

impl<'a> Tracer<'a> {
    pub(super) fn new(bench: &'a mut Bench, state: &NativeState, arena: &Arc<[u8]>) -> Tracer<'a> {
        bench.native.arena().copy_from_slice(arena);
        let saved = Checkpoint {
            now: state.clone(),
            rip: START,
            open: 0,
            open_before: 0,
            open_memory: 0,
            executed: 0,
            last: 0,
        };
        Tracer {
            bench,
            start: state.clone(),
            arena: Arc::clone(arena),
            saved,
            wrote: true,
            may_end: true,
            now: state.clone(),
            rip: START,
            open: 0,
            open_before: 0,
            open_memory: Vec::new(),
            stop: None,
            executed: Vec::new(),
            last: 0,
        }
    }

    pub(super) fn generator(&self) -> &Generator {
        &self.bench.generator
    }

    /// Whether an exception ended the program.
    pub(super) fn has_ended(&self) -> bool {
        self.stop.is_some()
    }

    /// Marks where [`Self::restore`] goes back to.
    pub(super) fn save(&mut self) {
        if std::mem::take(&mut self.wrote) {
            self.bench.spare.clear();
            self.bench.spare.extend_from_slice(self.bench.native.arena_bytes());
        }
        self.saved.now.clone_from(&self.now);
        self.saved.rip = self.rip;
        self.saved.open = self.open;
        self.saved.open_before = self.open_before;
        self.saved.open_memory = self.open_memory.len();
        self.saved.executed = self.executed.len();
        self.saved.last = self.last;
    }

    pub(super) fn restore(&mut self) {
        if std::mem::take(&mut self.wrote) {
            self.bench.native.arena().copy_from_slice(&self.bench.spare);
        }
        self.now.clone_from(&self.saved.now);
        self.rip = self.saved.rip;
        self.open = self.saved.open;
        self.open_before = self.saved.open_before;
        self.open_memory.truncate(self.saved.open_memory);
        self.last = self.saved.last;
        self.executed.truncate(self.saved.executed);
        self.stop = None;
    }

    /// Executes steps until there is none where RIP stands, or an exception.
    pub(super) fn go(&mut self, steps: &[Step]) -> Result<(), Refused> {
        while self.stop.is_none() {
            let Some(number) = steps.iter().position(|s| s.at == self.rip) else {
                let inside = steps.iter().any(|s| s.at < self.rip && self.rip < s.end());
                return if inside { Err(Refused) } else { Ok(()) };
            };
            if self.executed.len() >= LIMIT {
                return Err(Refused);
            }
            self.execute(&steps[number])?;
            self.last = number;
        }
        Ok(())
    }

    fn execute(&mut self, step: &Step) -> Result<(), Refused> {
        for &(number, value) in &step.moves {
            self.now.gpr[number] = value;
        }
        let bits = self.bench.generator.bits;
        let now = Situation {
            instruction: &step.instruction,
            bytes: &step.bytes[step.setup..],
            state: &self.now,
            arena: self.bench.native.arena_bytes(),
            layout: self.bench.generator.layout,
            bits,
        };
        // One that goes back into its own step would run on unchecked.
        let own = self.bench.generator.layout.code + step.at;
        let turns = now.target().is_some_and(|t| t.wrapping_sub(own) < step.bytes.len() as u64);
        let too_slow = self.bench.avoids_split_locks && now.splits_a_lock();
        let determined = !turns
            && !too_slow
            && !now.sets_trap()
            && is_determined(&step.instruction, self.open)
            && !super::vendor::differs(&now);
        if !determined {
            return Err(Refused);
        }
        let accesses = now.accesses(&mut self.bench.factory, &self.open_memory);
        let faults = accesses.faults || step.instruction.is_invalid() || step.instruction.is_privileged();
        if accesses.code || accesses.open || !accesses.harmless || (faults && !self.may_end) {
            return Err(Refused);
        }
        let pointers = environment_pointers(&now);
        let exits = now.exits();
        self.wrote |= accesses.writes;
        let after = open_after(&step.instruction, self.now.gpr[1], self.open);
        self.open_before = self.open;
        self.bench.native.set_code(step.at as usize, &step.bytes);
        // SAFETY: harmless, as just checked with these very registers; the MOVs in front only set them.
        let stop = unsafe {
            self.bench.native.run(self.bench.mode, step.at as usize, exits.offsets(), &mut self.now)
        };
        self.executed.push(step.instruction.code());
        self.open_memory.extend(pointers);
        let next = stop.rip.wrapping_sub(self.bench.generator.layout.code + 1);
        if stop.vector == 3 && (OFFSET..END + 64).contains(&next) && next != step.at + step.setup as u64 {
            self.rip = next;
            self.open = after;
        } else {
            self.stop = Some(stop);
        }
        Ok(())
    }

    /// The program as one case.
    pub(super) fn finish(self, steps: &[Step]) -> Option<Case> {
        if self.executed.is_empty() {
            return None;
        }
        let end = steps.iter().map(Step::end).max()?;
        let mut code = vec![0xCC; (end - START) as usize];
        for step in steps {
            let at = (step.at - START) as usize;
            code[at..at + step.bytes.len()].copy_from_slice(&step.bytes);
        }
        let mut exits = Exits::default();
        if self.stop.is_none() {
            exits.add(self.rip);
        }
        let data = self.bench.generator.layout.data;
        let offset = |address: u64| address.saturating_sub(data) as usize;
        let in_arena = |open: Range<u64>| offset(open.start)..offset(open.end);
        let open_memory = self.open_memory.into_iter().map(in_arena).collect();
        Some(Case {
            code,
            instruction: steps[self.last].instruction,
            state: self.start,
            arena: self.arena,
            open_before: self.open_before,
            open: self.open,
            open_memory,
            followed: is_followed(steps, &steps[self.last]),
            executed: self.executed,
            end: Some(TraceEnd { state: self.now, exits }),
        })
    }
}

/// Whether more of the program lies behind `last`, or where it branches to.
fn is_followed(steps: &[Step], last: &Step) -> bool {
    last.instruction.near_branch_target() != 0 || steps.iter().any(|s| s.at == last.end())
}

/// Whether `i` depends on nothing undefined, given the flags that are.
fn is_determined(i: &Instruction, open: u64) -> bool {
    let read = compare::from_iced(i.rflags_read());
    !compare::is_open_result(i) && read & open == 0
}

/// Where an x87 environment that is stored tells of the last instruction: its address, operand and opcode, which
/// processors track by rules of their own, and engines by others (`cpu/DEVIATIONS.md`).
fn environment_pointers(now: &Situation<'_>) -> Option<Range<u64>> {
    let stores = matches!(now.instruction.mnemonic(), Mnemonic::Fnsave | Mnemonic::Fnstenv);
    let at = now.address(0).filter(|_| stores)?;
    // SDM 1, figures 8-9 to 8-12.
    Some(match now.instruction.memory_size().size() {
        14 | 94 => at + 6..at + 14,
        _ => at + 12..at + 28,
    })
}

/// Undefined flags behind an instruction, given those before it.
fn open_after(i: &Instruction, rcx: u64, before: u64) -> u64 {
    let own = compare::undefined_flags(i, rcx);
    let last = i.op_count().saturating_sub(1);
    // A count of zero leaves all flags as they were; a REP that does nothing too.
    let conditional = i.op_count() > 0 && i.op_kind(last) == OpKind::Register && is_shift(i.mnemonic());
    if conditional || i.has_rep_prefix() || i.has_repne_prefix() || i.flow_control() != FlowControl::Next {
        return before | own;
    }
    let defined = compare::from_iced(i.rflags_modified()) & !own;
    (before & !defined) | own
}

fn is_shift(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    )
}

//! Traces: what a hot loop does, in one block.
//!
//! A jump that leads backwards inside a page is counted at first. When it becomes hot the interpreter core runs the
//! instructions from its target on, and their addresses are recorded: the path that the loop takes most likely. A pass that
//! happens to leave the loop says little about it, so that a few more are looked at for one that comes back. That path
//! is translated as one block, which takes the place of the one at the target: branches on it become side exits,
//! base groups and the liveness of flags reach beyond them, and short loops are unrolled. A trace stays on one page; it ends
//! where control goes backwards, but to its own beginning, so that every cycle of blocks still polls.

use super::Translator;
use crate::block::{BlockId, BlockKey, Mode};
use crate::classify::Class;
use crate::context::HEAT;
use iced_x86::Instruction;
use paravane_cpu::CpuState;
use paravane_memory::RamOffset;

/// Instructions of a trace at most.
const MAX: usize = 104;
/// A loop shorter than this is unrolled.
const UNROLL: usize = 48;
/// Passes that are recorded at most, and instructions to wait for the next one.
const PASSES: u32 = 3;
const WAIT: u32 = 64;
/// Space that must be free before a trace is translated.
const RESERVE: usize = 64 << 10;

/// The cell of `JitContext::heat` of a link.
pub(super) fn heat_cell(link: u32) -> usize {
    link as usize % HEAT
}

/// A path that begins at code address `start`.
pub(super) struct Recorder {
    start: u64,
    mode: Mode,
    /// RIPs.
    path: Vec<u64>,
    last: Option<Instruction>,
    /// The longest path of earlier passes, which did not come back.
    longest: Vec<u64>,
    passes: u32,
    /// Instructions that may come before the next pass begins.
    wait: u32,
}

impl Recorder {
    pub(super) fn new(start: u64, mode: Mode) -> Recorder {
        let path = Vec::with_capacity(MAX);
        Recorder { start, mode, path, last: None, longest: Vec::new(), passes: 0, wait: 0 }
    }

    /// A pass ended before the instruction at `address`; whether another one shall be recorded, since a branch led away.
    fn again(&mut self, address: u64) -> bool {
        self.passes += 1;
        let led_away = address != self.start && self.last.is_some_and(|last| branches(&last));
        if !led_away || self.path.len() == MAX || self.passes == PASSES {
            return false;
        }
        if self.path.len() > self.longest.len() {
            self.longest = std::mem::take(&mut self.path);
        }
        self.path.clear();
        (self.last, self.wait) = (None, WAIT);
        true
    }

    /// Whether to go on waiting for the next pass, before the instruction at `address`.
    fn waits(&mut self, address: u64) -> bool {
        let waits = self.path.is_empty() && address != self.start && self.wait > 0;
        self.wait = self.wait.saturating_sub(1);
        waits
    }

    /// Whether the path may go on with the instruction at `rip`.
    fn continues(&self, rip: u64) -> bool {
        let (Some(last), Some(&first)) = (&self.last, self.path.first()) else { return true };
        let next = if self.mode.code64() { last.next_ip() } else { last.next_ip() & 0xFFFF_FFFF };
        if rip != next && !(branches(last) && rip == last.near_branch_target()) {
            return false;
        }
        let backwards = rip <= last.ip();
        let whole = rip == first && self.path.len() >= UNROLL;
        (!backwards || rip == first) && !whole && self.path.len() < MAX
    }
}

/// A branch that a path may follow.
fn branches(instr: &Instruction) -> bool {
    instr.is_jcc_short_or_near() || instr.is_jmp_short_or_near()
}

impl Translator {
    /// Whether link `number`, about to be chained to block `to`, is to be counted.
    pub(super) fn counts(&self, number: u32, to: BlockId) -> bool {
        let (link, block) = (&self.blocks.links[number as usize], &self.blocks.blocks[to as usize]);
        let excluded = Mode::COUNTED | Mode::SEGMENTED | Mode::LEGACY | Mode::CODE16 | Mode::UNGROUPED;
        link.back
            && link.same_page
            && !link.counted
            && !block.trace
            && block.crosses_into.is_none()
            && block.key.mode.0 & excluded == 0
            && !self.core.plan().breaks()
    }

    /// Whether link `number`, which came back to the run loop, was counted down: block `to` begins a hot loop.
    pub(super) fn is_hot(&mut self, number: u32, to: BlockId) -> bool {
        let link = &self.blocks.links[number as usize];
        let was_counted = link.counted && !self.blocks.blocks[to as usize].trace;
        was_counted && self.context().heat[heat_cell(number)] == 0 && !self.core.plan().breaks()
    }

    /// Takes down the instruction at RIP; true if the interpreter shall execute it. At the path's end makes the trace.
    pub(super) fn record(&mut self, cpu: &CpuState, mode: Mode) -> bool {
        let Some(mut r) = self.recorder.take() else { return false };
        if mode != r.mode {
            return false;
        }
        let address = self.code_address(cpu);
        if r.waits(address) || self.take_down(cpu, &mut r, address) || r.again(address) {
            self.recorder = Some(r);
            return true;
        }
        if address != r.start && r.longest.len() > r.path.len() {
            r.path = std::mem::take(&mut r.longest);
        }
        self.make_trace(cpu, &r);
        false
    }

    /// Adds the instruction at RIP to the path; whether that goes on behind it.
    fn take_down(&mut self, cpu: &CpuState, r: &mut Recorder, address: u64) -> bool {
        let begins = !r.path.is_empty() || address == r.start;
        if !begins || address >> 12 != r.start >> 12 || !r.continues(cpu.rip) {
            return false;
        }
        let Some((mut instr, _)) = self.instruction_at(cpu, r.mode, address) else { return false };
        instr.set_ip(cpu.rip);
        let class = self.forms.form(&instr).class;
        let repeated = class == Class::String && (instr.has_rep_prefix() || instr.has_repne_prefix());
        let inside = (address & 0xFFF) as usize + instr.len() <= 4096;
        if !inside || repeated || class == Class::Interpret {
            return false;
        }
        r.path.push(cpu.rip);
        r.last = Some(instr);
        class.straight() || matches!(class, Class::Jcc | Class::Jmp)
    }

    /// Puts the trace of a recorded path in the place of the block at its beginning.
    fn make_trace(&mut self, cpu: &CpuState, r: &Recorder) {
        if r.path.len() < 3 || self.core.plan().breaks() || self.cache.free() < RESERVE {
            return;
        }
        let Some((page, _)) = self.fetch_page(cpu, r.mode.linear(r.start)) else { return };
        let key = BlockKey { at: RamOffset(page.0 + (r.start & 0xFFF)), address: r.start, mode: r.mode };
        let Some(old) = self.blocks.find(&key) else { return };
        if self.blocks.blocks[old as usize].trace {
            return;
        }
        self.drop_block(old);
        if self.translate_block(cpu, key, page, &r.path).is_some() {
            self.stats.traces += 1;
        }
    }
}

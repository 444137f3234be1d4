//! Guest bytes to a block: decodes a basic block, and those behind forward branches, and drives the emitter over them.

use crate::block::{Granules, InstructionSite, Mode};
use crate::classify::{Class, Form, Forms, stack_word};
use crate::emit::recipe::is_recipe;
use crate::emit::{Emitter, Site};
use crate::flags::{FlagSet, FlagsOut};
use crate::groups::{self, Planner};
use iced_x86::{Decoder, EncodingKind, Instruction};

/// Instructions in a block at most.
const MAX_INSTRUCTIONS: usize = 64;
/// Instructions of a block behind which it does not go on beyond another branch.
const EXTENDED: usize = 24;
/// Conditional branches beyond which a block goes on.
const MAX_BRANCHES: usize = 3;
/// Bytes of code behind which no instruction begins: far more than a block has, and less than can be told of one by what one takes.
const MAX_CODE: usize = InstructionSite::MAX_HOST - 4096;
/// Instructions looked at beyond a direct exit to find which flags are live there.
const LOOK_AHEAD: usize = 12;

/// What the decoder sees: the bytes of the page from the block's first instruction on.
pub(crate) struct Source<'a> {
    /// The whole page, followed by the first bytes of the next page when `crossing`.
    pub(crate) bytes: &'a [u8],
    /// Offset of the block in `bytes`.
    pub(crate) at: usize,
    /// Code address of the block (see `segments`).
    pub(crate) address: u64,
    /// RIP at its beginning: what the decoder counts from.
    pub(crate) rip: u64,
    /// The largest RIP.
    pub(crate) limit: u64,
    pub(crate) mode: Mode,
    /// Decoder options of the processor model.
    pub(crate) options: u32,
    /// Bytes from `address` to the next breakpoint on its page, where there is one: no block goes on past it.
    pub(crate) stop: Option<u32>,
    /// For a trace: RIP of each of its instructions, beginning with the block's. It follows these beyond branches.
    pub(crate) path: &'a [u64],
}

/// What became of the source.
pub(crate) struct Translated {
    /// Guest bytes translated.
    pub(crate) len: u32,
    /// What of the page the translation depends on.
    pub(crate) granules: Granules,
    /// Host offsets of the direct entries: with the status flags in EFLAGS, and put aside.
    pub(crate) entry: u32,
    pub(crate) saved_entry: u32,
    /// Instructions translated.
    pub(crate) instructions: u32,
    /// Instructions counted at the entry.
    pub(crate) counted: u32,
}

/// An instruction that crosses into a page, with the cell and value that validate that page.
pub(crate) struct Crossing {
    pub(crate) slot: u32,
    pub(crate) page: u32,
}

/// Reusable buffers of the front end.
#[derive(Default)]
pub(crate) struct Frontend {
    instrs: Vec<Instruction>,
    /// What each of them is.
    forms: Vec<Form>,
    live: Vec<FlagSet>,
    /// At each conditional branch that the block goes on behind, how flags go where it does not.
    aside: Vec<FlagsOut>,
    /// Before which instruction status flags are put aside.
    save: Option<usize>,
    /// Where the code of each instruction of the block translated last begins.
    pub(crate) sites: Vec<InstructionSite>,
    /// What of the page was decoded.
    seen: Granules,
    planner: Planner,
}

/// What looking ahead tells of the status flags at some place: those that an instruction reads, and those of which it stays
/// unknown.
#[derive(Clone, Copy)]
struct Ahead {
    read: FlagSet,
    open: FlagSet,
}

impl Ahead {
    const NOTHING_KNOWN: Ahead = Ahead { read: FlagSet::NONE, open: FlagSet::ALL };

    fn live(self) -> FlagSet {
        self.read.or(self.open)
    }

    /// Nobody is known to read flags, but somebody may.
    fn is_doubtful(self) -> bool {
        self.read.is_empty() && !self.open.is_empty()
    }
}

/// How status flags leave a block.
struct LiveOut {
    /// What EFLAGS must hold behind the last instruction.
    after: FlagSet,
    /// They must have been put aside by then.
    saved: bool,
    /// At a taken branch, and at the fall-through.
    taken: FlagsOut,
    next: FlagsOut,
}

impl LiveOut {
    fn live(after: FlagSet, taken: FlagSet, next: FlagSet) -> LiveOut {
        LiveOut { after, saved: false, taken: FlagsOut::Live(taken), next: FlagsOut::Live(next) }
    }

    const SAVED: LiveOut =
        LiveOut { after: FlagSet::NONE, saved: true, taken: FlagsOut::Saved, next: FlagsOut::Saved };
}

impl Source<'_> {
    /// Whether a direct jump from `last` to `target` has something to check, which would have to keep flags: attention, or
    /// the translation of another page.
    fn jump_is_checked(&self, last: &Instruction, target: u64) -> bool {
        target <= last.ip() || self.code_address(target) >> 12 != self.address >> 12
    }

    /// The code address of `rip`.
    pub(crate) fn code_address(&self, rip: u64) -> u64 {
        self.mode.advance(self.address, rip.wrapping_sub(self.rip))
    }

    /// A near branch may lead to `target` (SDM 2A, JMP); 64-bit branches are checked elsewhere.
    fn reaches(&self, target: u64) -> bool {
        target <= self.limit
    }

    /// RIP behind `instr`.
    fn next_rip(&self, instr: &Instruction) -> u64 {
        if self.mode.code64() { instr.next_ip() } else { instr.next_ip() & 0xFFFF_FFFF }
    }
}

impl Frontend {
    /// Status flags that instructions at `target` or after read, as far as the page shows.
    fn live_at(
        &mut self,
        source: &Source<'_>,
        decoder: &mut Decoder<'_>,
        forms: &mut Forms,
        target: u64,
    ) -> Ahead {
        let at = source.code_address(target);
        let whole_page = source.at as u64 == source.address & 0xFFF;
        // A debugger sees the flags at its breakpoints, and at whatever leads to them.
        if at & !0xFFF != source.address & !0xFFF || !whole_page || source.stop.is_some() {
            return Ahead::NOTHING_KNOWN;
        }
        let at = (at & 0xFFF) as usize;
        seek(decoder, at, target);
        let mut instr = Instruction::default();
        let (mut read, mut open) = (0, FlagSet::ALL.0);
        for _ in 0..LOOK_AHEAD {
            decoder.decode_out(&mut instr);
            let form = forms.form(&instr);
            let effect = form.effect(&instr);
            read |= effect.reads.0 & open;
            let leaves = instr.flow_control() != iced_x86::FlowControl::Next;
            if instr.is_invalid() || leaves || form.class.leaves() {
                break;
            }
            open &= !effect.kills.0;
            if open & !read == 0 {
                break;
            }
        }
        self.seen.add(Granules::of(at, decoder.position().max(at + 1)));
        Ahead { read: FlagSet(read), open: FlagSet(open) }
    }

    /// Decodes the instructions of a trace; returns their bytes.
    fn decode_path(&mut self, source: &Source<'_>, decoder: &mut Decoder<'_>, forms: &mut Forms) -> u32 {
        self.instrs.clear();
        self.forms.clear();
        let mut len = 0;
        for &rip in source.path {
            let at = (source.code_address(rip) & 0xFFF) as usize;
            seek(decoder, at, rip);
            let instr = decoder.decode();
            if instr.is_invalid() {
                break;
            }
            self.forms.push(*forms.form(&instr));
            self.instrs.push(instr);
            self.seen.add(Granules::of(at, at + instr.len()));
            len += instr.len() as u32;
        }
        len
    }

    /// Decodes up to the end of the block; returns bytes consumed. The last instruction may be one that ends it.
    fn decode(
        &mut self,
        source: &Source<'_>,
        decoder: &mut Decoder<'_>,
        forms: &mut Forms,
        crossing: bool,
    ) -> u32 {
        self.instrs.clear();
        self.forms.clear();
        // Nothing beyond the segment's limit is fetched.
        let room = if source.reaches(source.rip) { (source.limit - source.rip).saturating_add(1) } else { 0 };
        seek(decoder, source.at, source.rip);
        let (mut len, mut branches) = (0, 0);
        while self.instrs.len() < MAX_INSTRUCTIONS && source.stop.is_none_or(|stop| len < stop) {
            let instr = self.instrs.push_mut(Instruction::default());
            decoder.decode_out(instr);
            let next = len + instr.len() as u32;
            if instr.is_invalid() || u64::from(next) > room {
                self.instrs.pop();
                break;
            }
            let form = *forms.form(instr);
            len = next;
            self.forms.push(form);
            if crossing || !form.class.straight() && !self.goes_on(source, branches) {
                break;
            }
            branches += usize::from(form.class == Class::Jcc);
        }
        len
    }

    /// Whether a block goes on behind its last instruction, a branch, as `branches` were passed already: where compilers put
    /// what is likelier.
    fn goes_on(&self, source: &Source<'_>, branches: usize) -> bool {
        let (Some(last), Some(form)) = (self.instrs.last(), self.forms.last()) else { return false };
        let ends = Mode::COUNTED | Mode::UNGROUPED | Mode::SEGMENTED | Mode::LEGACY;
        form.class == Class::Jcc
            && branches < MAX_BRANCHES
            && self.instrs.len() < EXTENDED
            && last.near_branch_target() > last.ip()
            && source.mode.0 & ends == 0
    }

    /// Where conditional branch `i`, behind which the block goes on, leads otherwise; `true` if it is taken then.
    fn branch_aside(&self, source: &Source<'_>, i: usize) -> Option<(u64, bool)> {
        if self.forms[i].class != Class::Jcc {
            return None;
        }
        let (target, next) = (self.instrs[i].near_branch_target(), source.next_rip(&self.instrs[i]));
        let on = self.instrs.get(i + 1)?.ip();
        Some(if on == next { (target, true) } else { (next, false) })
    }

    /// Flags that EFLAGS must hold before each instruction, given what is wanted behind the last; all of them if they must be
    /// `exact`. Also finds where they are put aside: behind the last instruction that changes some, or at the beginning.
    fn liveness(
        &mut self,
        source: &Source<'_>,
        decoder: &mut Decoder<'_>,
        forms: &mut Forms,
        out: &LiveOut,
        exact: bool,
    ) {
        let LiveOut { mut after, mut saved, .. } = *out;
        self.live.clear();
        self.live.resize(self.instrs.len(), FlagSet::NONE);
        self.aside.clear();
        self.aside.resize(self.instrs.len(), FlagsOut::Live(FlagSet::NONE));
        self.save = None;
        for i in (0..self.instrs.len()).rev() {
            if let Some((target, _)) = self.branch_aside(source, i) {
                let ahead = self.live_at(source, decoder, forms, target);
                if saved && ahead.is_doubtful() {
                    self.aside[i] = FlagsOut::Saved;
                } else {
                    self.aside[i] = FlagsOut::Live(ahead.live());
                    after = after.or(ahead.live());
                }
            }
            let (instr, form) = (&self.instrs[i], &self.forms[i]);
            let (leaves, effect) = (form.class.leaves(), form.effect(instr));
            if saved && !leaves && effect.writes {
                self.save = Some(i + 1);
                (after, saved) = (FlagSet::ALL, false);
            }
            after = match leaves {
                _ if exact => FlagSet::ALL,
                true if saved => FlagSet::NONE,
                true => FlagSet::ALL,
                false => effect.before(after),
            };
            self.live[i] = after;
        }
        if saved {
            self.save = Some(0);
        }
    }

    /// Translates the block at `source`. The caller finishes and places the emitter's code.
    pub(crate) fn translate(
        &mut self,
        source: &Source<'_>,
        forms: &mut Forms,
        emitter: &mut Emitter,
        first_link: u32,
        crossing: Option<Crossing>,
    ) -> Translated {
        let code64 = source.mode.code64();
        self.seen = Granules::default();
        // Made once: that costs as much as decoding an instruction or two.
        let mut decoder = Decoder::with_ip(source.mode.bits(), source.bytes, source.rip, source.options);
        let decoded = if source.path.is_empty() {
            let decoded = self.decode(source, &mut decoder, forms, crossing.is_some());
            let at = (source.address & 0xFFF) as usize;
            self.seen.add(Granules::of(at, at + decoded.max(1) as usize));
            decoded
        } else {
            self.decode_path(source, &mut decoder, forms)
        };
        emitter.start(source.address, source.rip, source.mode, first_link);
        let out_flags = self.live_out(source, &mut decoder, forms, decoded);
        self.liveness(source, &mut decoder, forms, &out_flags, exact_flags(source.mode));
        let LiveOut { taken, next, .. } = out_flags;
        let live_in = self.live.first().copied().unwrap_or(FlagSet::ALL);
        let (saved_entry, entry);
        if let Some(c) = &crossing {
            // Where the second page is another one now, other code follows, which may want any flag.
            (saved_entry, entry) = emitter.direct_entries(FlagSet::ALL, false);
            emitter.check_page(c.slot, c.page, source.rip, FlagSet::ALL);
            if self.save == Some(0) {
                emitter.save_flags();
            }
        } else {
            (saved_entry, entry) = emitter.direct_entries(live_in, self.save == Some(0));
        }
        let mut counted = 0;
        if source.mode.has(Mode::COUNTED) {
            counted = self.forms.iter().filter(|f| f.class != Class::Interpret).count() as u32;
            if source.mode.has(Mode::BUDGETED) {
                emitter.check_budget(counted, source.rip, live_in);
            }
            emitter.count(counted);
        }
        let mut out = Translated {
            len: decoded.max(1),
            granules: Granules::default(),
            entry,
            saved_entry,
            instructions: self.instrs.len() as u32,
            counted,
        };
        let ungrouped = Mode::UNGROUPED | Mode::SEGMENTED;
        self.planner.plans.clear();
        if source.mode.0 & ungrouped == 0 && crossing.is_none() {
            self.planner.plan(&self.instrs, &self.forms, &self.live, source.mode);
        }
        let probing = source.mode.has(Mode::WINDOW) && code64;
        let mut ended = false;
        self.sites.clear();
        for i in 0..self.instrs.len() {
            let (instr, form) = (&self.instrs[i], &self.forms[i]);
            self.sites.push(site_at(emitter, instr.ip().wrapping_sub(source.rip)));
            emitter.at(instr.ip(), counted.saturating_sub(i as u32));
            let site = Site { before: self.live[i] };
            if i > 0 && self.save == Some(i) {
                emitter.save_flags_of(&self.instrs[i - 1]);
            }
            for p in self.planner.plans.iter().filter(|p| p.check == i) {
                emitter.sync_rsp();
                emitter.group(p, site.before);
            }
            if emitter.rsp_is_pending() && !emitter.tolerates_pending_rsp(instr, form.class) {
                emitter.sync_rsp();
            }
            if let Some(site) = self.sites.last_mut() {
                *site = site.with_pending(emitter.delayed_words());
            }
            if emitter.hot_len() > MAX_CODE {
                emitter.interpret(instr.ip());
                ended = true;
                break;
            }
            if i + 1 < self.instrs.len() && matches!(form.class, Class::Jcc | Class::Jmp) {
                if !self.go_on(source, emitter, i) {
                    emitter.interpret(instr.ip());
                    ended = true;
                    break;
                }
                continue;
            }
            let start = emitter.mark();
            if emit_one(instr, form, source, emitter, site, (taken, next), &mut ended).is_err() {
                emitter.rewind(start);
                emitter.sync_rsp();
                emitter.interpret(instr.ip());
                ended = true;
            }
            if ended {
                break;
            }
            let step = if form.steps { groups::adjustment(instr, code64) } else { None };
            if let Some((register, n)) = step {
                emitter.adjusted(register, n);
            }
            if probing {
                let followed = step.map_or(0, |(register, _)| 1 << register);
                emitter.forget_probes(groups::modified(instr, form) & !followed);
            }
            for p in self.planner.plans.iter().filter(|p| p.last == i) {
                emitter.sync_rsp();
                emitter.end_group(p);
            }
        }
        emitter.sync_rsp();
        if !ended {
            if let Some(last) = self.instrs.last()
                && self.save == Some(self.instrs.len())
            {
                emitter.save_flags_of(last);
            }
            let next_rip = self.end(source, decoded);
            self.sites.push(site_at(emitter, next_rip.wrapping_sub(source.rip)));
            let whole =
                !source.path.is_empty() || crossing.is_some() || self.instrs.len() == MAX_INSTRUCTIONS;
            if !whole && self.ran_out(source, decoded) {
                // An undecodable or page-crossing instruction: a block of its own, or the interpreter's #UD or #PF.
                emitter.at(next_rip, 0);
                if self.instrs.is_empty() {
                    emitter.interpret(next_rip);
                } else {
                    emitter.direct_exit(next_rip, next, false);
                }
            } else if self.instrs.is_empty() {
                emitter.interpret(next_rip);
            } else {
                emitter.direct_exit(next_rip, next, false);
            }
        }
        out.granules = self.seen;
        out
    }

    /// Emits branch `i`, behind which the block goes on; false if it may leave the segment.
    fn go_on(&self, source: &Source<'_>, emitter: &mut Emitter, i: usize) -> bool {
        let Some((target, taken)) = self.branch_aside(source, i) else { return true };
        let cc = self.instrs[i].condition_code() as u8 - 1;
        if source.reaches(target) {
            emitter.side_exit(if taken { cc } else { cc ^ 1 }, target, self.aside[i]);
        }
        source.reaches(target)
    }

    /// RIP behind the last instruction.
    fn end(&self, source: &Source<'_>, decoded: u32) -> u64 {
        self.instrs.last().map_or(source.rip.wrapping_add(u64::from(decoded)), |i| source.next_rip(i))
    }

    /// The decoder stopped although the block was not full.
    fn ran_out(&self, source: &Source<'_>, decoded: u32) -> bool {
        source.at + (decoded as usize) < source.bytes.len() || self.instrs.is_empty()
    }

    /// How flags leave the block.
    fn live_out(
        &mut self,
        source: &Source<'_>,
        decoder: &mut Decoder<'_>,
        forms: &mut Forms,
        decoded: u32,
    ) -> LiveOut {
        let next_rip = self.end(source, decoded);
        let last = match self.instrs.last().copied() {
            Some(last) if !exact_flags(source.mode) => last,
            _ => return LiveOut::live(FlagSet::ALL, FlagSet::ALL, FlagSet::ALL),
        };
        match self.forms[self.instrs.len() - 1].class {
            class @ (Class::Jcc | Class::Loop | Class::JumpIfCountZero) => {
                let target = last.near_branch_target();
                let (t, n) = (
                    self.live_at(source, decoder, forms, target),
                    self.live_at(source, decoder, forms, next_rip),
                );
                let dear = |to, ahead: Ahead| ahead.is_doubtful() && source.jump_is_checked(&last, to);
                if class == Class::Jcc && (dear(target, t) || dear(next_rip, n)) && self.saves_by_recipe() {
                    return LiveOut::SAVED;
                }
                let (t, n) = (t.live(), n.live());
                LiveOut::live(t.or(n), t, n)
            }
            Class::Ret | Class::JmpIndirect | Class::CallIndirect => LiveOut::SAVED,
            Class::Syscall | Class::Sysret | Class::Iret => LiveOut::SAVED,
            Class::Interpret if self.accesses_behind_flags() => LiveOut::SAVED,
            Class::Interpret => LiveOut::live(FlagSet::ALL, FlagSet::ALL, FlagSet::ALL),
            class => {
                let target = if matches!(class, Class::Jmp | Class::Call) {
                    last.near_branch_target()
                } else {
                    next_rip
                };
                let ahead = self.live_at(source, decoder, forms, target);
                let dear = || source.jump_is_checked(&last, target) && self.saves_by_recipe();
                if ahead.is_doubtful() && (self.accesses_behind_flags() || dear()) {
                    return LiveOut::SAVED;
                }
                LiveOut::live(ahead.live(), ahead.live(), ahead.live())
            }
        }
    }

    /// Whether the last instruction that changes flags leaves what they come from.
    fn saves_by_recipe(&self) -> bool {
        let writes = |i: &usize| self.forms[*i].effect(&self.instrs[*i]).writes;
        (0..self.instrs.len()).rev().find(writes).is_some_and(|i| is_recipe(&self.instrs[i]))
    }

    /// Whether an access behind the last instruction that changes flags would have to keep them for the block's end.
    fn accesses_behind_flags(&self) -> bool {
        let accesses = |(_, form): (&Instruction, &Form)| form.class.uses_stack() || form.memory.is_some();
        let behind =
            |&(instr, form): &(&Instruction, &Form)| form.class.leaves() || !form.effect(instr).writes;
        self.instrs.iter().zip(&self.forms).rev().take_while(behind).any(accesses)
    }
}

/// What is decoded next is at `at` of the source's bytes, where RIP is `rip`.
fn seek(decoder: &mut Decoder<'_>, at: usize, rip: u64) {
    decoder.set_position(at).expect("a place on the page");
    decoder.set_ip(rip);
}

/// The instruction that comes next, `guest` bytes behind the block's first, but for whole turns of an IP of 16 or 32 bits.
fn site_at(emitter: &Emitter, guest: u64) -> InstructionSite {
    InstructionSite::new(emitter.hot_len(), guest as i16)
}

/// Emits one instruction; sets `ended` if it ends the block.
fn emit_one(
    instr: &Instruction,
    form: &Form,
    source: &Source<'_>,
    emitter: &mut Emitter,
    site: Site,
    (taken, next): (FlagsOut, FlagsOut),
    ended: &mut bool,
) -> Result<(), crate::emit::Unfit> {
    let mode = source.mode;
    let next_rip = source.next_rip(instr);
    let unprivileged = mode.has(Mode::USER) || mode.has(Mode::MIDDLE);
    // 16-bit words on the stack of 64-bit code are the interpreter's.
    if mode.code64() && form.class.uses_stack() && stack_word(instr) != 8 {
        return Err(crate::emit::Unfit);
    }
    // What it reads and what lives on after it must both survive the checks before it executes.
    match form.class {
        Class::Identity(needs) => {
            let missing = mode.0 & u32::from(needs) != u32::from(needs);
            if missing || differs(instr, mode) {
                return Err(crate::emit::Unfit);
            }
            let at = instr.ip().wrapping_sub(source.rip).wrapping_add(source.at as u64) as usize;
            emitter.identity(instr, &source.bytes[at..at + instr.len()], form, site)
        }
        Class::Nop => Ok(()),
        Class::Prefetch => {
            emitter.prefetch(instr);
            Ok(())
        }
        Class::Pause => {
            emitter.pause(site);
            Ok(())
        }
        // In translated code DF is as the mode has it.
        Class::Cld if mode.has(Mode::DOWN) => Err(crate::emit::Unfit),
        Class::Cld => Ok(()),
        Class::BitString => emitter.bit_string(instr, form, site),
        Class::String => emitter.string(instr, site),
        // Virtual-8086 mode has its own rules for IF.
        Class::Pushf if mode.has(Mode::LEGACY) && mode.has(Mode::USER) => Err(crate::emit::Unfit),
        Class::Pushf => {
            emitter.pushf(instr, site);
            Ok(())
        }
        // Only CPL 0 may always change IF: the interpreter knows the rules.
        Class::Popf | Class::Cli | Class::Sti | Class::Stac | Class::Clac | Class::Swapgs if unprivileged => {
            Err(crate::emit::Unfit)
        }
        Class::Popf => {
            emitter.popf(instr, site);
            Ok(())
        }
        Class::Cli => {
            emitter.set_interrupt_flag(false, site);
            Ok(())
        }
        // The engine may have to stop in the shadow of STI.
        Class::Sti if source.mode.has(Mode::BUDGETED) => Err(crate::emit::Unfit),
        Class::Sti => {
            emitter.set_interrupt_flag(true, site);
            Ok(())
        }
        Class::Stac | Class::Clac if !mode.has(Mode::SMAP) => Err(crate::emit::Unfit),
        Class::Stac => {
            emitter.set_access_flag(true);
            Ok(())
        }
        Class::Clac => {
            emitter.set_access_flag(false);
            Ok(())
        }
        Class::Swapgs => {
            emitter.swapgs();
            Ok(())
        }
        Class::ReadBase | Class::WriteBase if !mode.has(Mode::FSGSBASE) => Err(crate::emit::Unfit),
        Class::ReadBase => {
            emitter.read_base(instr);
            Ok(())
        }
        Class::WriteBase => {
            emitter.write_base(instr, site);
            Ok(())
        }
        Class::Rdtsc if !mode.has(Mode::TSC) => Err(crate::emit::Unfit),
        Class::Rdtsc => {
            emitter.rdtsc(instr, site);
            Ok(())
        }
        Class::Selector => {
            emitter.selector(instr);
            Ok(())
        }
        Class::ReadControl if unprivileged => Err(crate::emit::Unfit),
        Class::ReadControl => emitter.read_control(instr),
        Class::LoadSegment => emitter.load_segment(instr, site),
        // Those of 64-bit code; the rest is the interpreter's.
        Class::Syscall if mode.has(Mode::USER) && mode.code64() => {
            *ended = true;
            emitter.syscall(next_rip);
            Ok(())
        }
        Class::Sysret if !unprivileged && mode.code64() => {
            *ended = true;
            emitter.sysret();
            Ok(())
        }
        Class::Iret if !unprivileged && mode.code64() => {
            *ended = true;
            emitter.iret();
            Ok(())
        }
        Class::Syscall | Class::Sysret | Class::Iret => Err(crate::emit::Unfit),
        Class::Lea => emitter.lea_instruction(instr),
        Class::Push => emitter.push(instr, site),
        Class::Pop => {
            emitter.pop(instr, site);
            Ok(())
        }
        Class::Leave => {
            emitter.leave(instr, site);
            Ok(())
        }
        // A branch beyond the limit raises its fault in the interpreter, if it is taken.
        Class::Call | Class::Jmp | Class::Jcc | Class::Loop | Class::JumpIfCountZero
            if !source.reaches(instr.near_branch_target()) =>
        {
            Err(crate::emit::Unfit)
        }
        Class::Call => {
            *ended = true;
            emitter.call(instr, next_rip, site, taken);
            Ok(())
        }
        Class::CallIndirect => {
            *ended = true;
            emitter.jump_indirect(instr, Some(next_rip), site)
        }
        Class::JmpIndirect => {
            *ended = true;
            emitter.jump_indirect(instr, None, site)
        }
        Class::Ret => {
            *ended = true;
            emitter.ret(instr, site);
            Ok(())
        }
        Class::Jmp => {
            *ended = true;
            emitter.direct_exit(instr.near_branch_target(), taken, false);
            Ok(())
        }
        Class::Jcc => {
            *ended = true;
            let cc = instr.condition_code() as u8 - 1;
            emitter.jcc(cc, instr.near_branch_target(), next_rip, taken, next);
            Ok(())
        }
        Class::Loop => {
            *ended = true;
            emitter.loop_(instr, next_rip, taken, next);
            Ok(())
        }
        Class::JumpIfCountZero => {
            *ended = true;
            emitter.jump_if_count_zero(instr, next_rip, taken, next);
            Ok(())
        }
        Class::Interpret => {
            *ended = true;
            emitter.interpret(instr.ip());
            Ok(())
        }
    }
}

/// Whether flags that nothing reads must be right all the same. An exception or an interrupt puts them into memory; a
/// repeatable run cannot have what the checks before an access left there, which depends on host addresses.
fn exact_flags(mode: Mode) -> bool {
    mode.has(Mode::BUDGETED)
}

/// Instructions that are not the same here as in 64-bit code.
fn differs(instr: &Instruction, mode: Mode) -> bool {
    use iced_x86::Mnemonic as M;
    // VZEROUPPER and VZEROALL leave registers 8–15 alone outside 64-bit mode.
    let upper = !mode.code64() && matches!(instr.mnemonic(), M::Vzeroupper | M::Vzeroall);
    // There is no VEX encoding in real-address and virtual-8086 mode.
    upper || mode.has(Mode::LEGACY) && instr.encoding() == EncodingKind::VEX
}

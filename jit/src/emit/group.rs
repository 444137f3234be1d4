//! Base groups: one check, and the host address of its beginning at hand for all accesses (planned by
//! [`crate::groups`]): in r9 for the most useful group of a block, in the context for others. Where the check fails the block goes on in its ungrouped copy.

use super::access::{Keep, fixed_entry};
use super::flow::give_back;
use super::window::Spot;
use super::word::{Op, word};
use super::{Emitter, PendingLink, Pos, Target, load, store};
use crate::context::ctx;
use crate::flags::FlagSet;
use crate::groups::{self, Key, Plan};
use crate::regs::{R9, R10, R11};
use crate::stubs::MissInfo;
use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Instruction, Register};

/// A base group in force.
#[derive(Clone, Copy)]
pub(super) struct Group {
    key: Key,
    anchor: u64,
    lo: i32,
    hi: i32,
    write: bool,
    /// How far the address moved since the check.
    moved: i32,
    /// Where the host address of `lo` is: r9, or a slot of the context.
    slot: Option<usize>,
    last: usize,
}

/// A memory operand that a group covers.
#[derive(Clone, Copy)]
pub(super) struct Member {
    slot: Option<usize>,
    /// Behind the host address in the slot.
    pub(super) offset: i32,
}

/// The check of a group.
#[derive(Clone, Copy)]
struct Check<'a> {
    plan: &'a Plan,
    /// Has the host address.
    pointer: u8,
    /// Flags that were saved.
    keep: Keep,
    /// Where to try again.
    retry: Pos,
    /// The linear address, if it is fixed.
    fixed: Option<u64>,
}

impl Group {
    fn member(&self, disp: i32, size: i32, write: bool) -> Option<Member> {
        let lo = self.moved.wrapping_add(disp);
        let covers = lo >= self.lo && lo.saturating_add(size) <= self.hi && (self.write || !write);
        covers.then_some(Member { slot: self.slot, offset: lo - self.lo })
    }
}

impl Emitter {
    /// Starts a group: one check before the members, which leaves to the ungrouped copy of the rest if it fails.
    pub(crate) fn group(&mut self, plan: &Plan, live: FlagSet) {
        let keep = Self::keep(live);
        let retry = self.hot_here();
        let dead = keep == Keep::Nothing;
        let pointer = if plan.slot.is_some() { R11 } else { R9 };
        let fixed = self.group_pointer(plan, pointer, dead);
        Self::save(&mut self.hot, keep, true);
        let check = Check { plan, pointer, keep, retry, fixed };
        match plan.hi - plan.lo {
            _ if fixed.is_some() => drop(self.check_poison(check)),
            // Accesses to one word, usually aligned, so that one test tells poison and what crosses.
            span @ (2 | 4 | 8) if span == plan.widest => self.check_word(check),
            _ => self.check_span(check),
        }
        if let Some(slot) = plan.slot {
            store(&mut self.hot, slot_offset(slot), R11);
        }
        Self::restore(&mut self.hot, keep, true);
        self.r9_busy |= plan.slot.is_none();
        self.groups.push(Group {
            key: plan.key,
            anchor: plan.anchor,
            lo: plan.lo,
            hi: plan.hi,
            write: plan.write,
            moved: 0,
            slot: plan.slot,
            last: plan.last,
        });
    }

    /// The host address of the range's beginning in `pointer`. Returns its linear address if that is fixed and the range known
    /// to lie on one page.
    fn group_pointer(&mut self, plan: &Plan, pointer: u8, dead: bool) -> Option<u64> {
        let Key { base, index, scale, relative } = plan.key;
        if base.is_none() && index.is_none() {
            let ea = plan.anchor.wrapping_add(i64::from(plan.lo) as u64);
            let moves = relative && self.movable;
            if !moves && let Some(entry) = fixed_entry(ea, (plan.hi - plan.lo) as u64, plan.write) {
                self.translate_fixed(pointer, ea, entry, dead);
                return Some(ea);
            }
            self.fixed(pointer, ea, relative);
        } else {
            let base = base.map(|r| self.guest(r, R10));
            let index = index.map(|r| self.guest(r, R11));
            self.lea(pointer, base, index, u32::from(scale), plan.lo, !self.code64);
        }
        self.translate(pointer, plan.write, dead);
        None
    }

    /// Leaves if the host address is poison. Returns the way to the ungrouped copy.
    fn check_poison(&mut self, check: Check<'_>) -> Pos {
        let Check { pointer, keep, .. } = check;
        if keep != Keep::Nothing {
            dynasm!(self.hot ; .arch x64 ; test Rq(pointer), Rq(pointer));
        }
        let poison = self.cold_here();
        self.hot_jcc(8, poison);
        self.cold_poison(check)
    }

    /// Leaves unless the host address is that of a range on one page.
    fn check_span(&mut self, check: Check<'_>) {
        let Check { plan, pointer, keep, .. } = check;
        let ungrouped = self.check_poison(check);
        let last = plan.hi - plan.lo - 1;
        if last > 0 {
            // A sum with less than a page changes bit 12 if and only if it leaves the page.
            word(&mut self.hot, Op::Lea, 4, R10, pointer, last);
            dynasm!(self.hot ; .arch x64 ; xor r10d, Rd(pointer) ; test r10d, 0x1000);
            let cross = self.cold_here();
            self.hot_jcc(5, cross);
            Self::restore(&mut self.cold, keep, true);
            self.cold_jmp(Target::Here(ungrouped));
        }
    }

    /// The same for a word.
    fn check_word(&mut self, check: Check<'_>) {
        let Check { plan, pointer, keep, .. } = check;
        let last = plan.hi - plan.lo - 1;
        dynasm!(self.hot ; .arch x64 ; test Rb(pointer), last as i8);
        let cold = self.cold_here();
        self.hot_jcc(5, cold);
        let back = self.hot_here();
        dynasm!(self.cold ; .arch x64 ; test Rq(pointer), Rq(pointer) ; .u8 0x0F, 0x88); // js
        let poison = self.cold_site();
        word(&mut self.cold, Op::Lea, 4, R10, pointer, last);
        dynasm!(self.cold ; .arch x64 ; xor r10d, Rd(pointer) ; test r10d, 0x1000);
        self.cold_jcc(4, back);
        Self::restore(&mut self.cold, keep, true);
        self.cold.push(0xE9);
        let cross = self.cold_site();
        self.cold_land(poison);
        let ungrouped = self.cold_poison(check);
        self.fixups.push((cross, Target::Here(ungrouped)));
    }

    /// Cold code for poison: fills the entry if that has no effect the guest did not ask for. Returns the way to the
    /// ungrouped copy.
    fn cold_poison(&mut self, check: Check<'_>) -> Pos {
        let Check { plan, pointer, keep, retry, fixed } = check;
        match fixed {
            Some(ea) => Self::constant(&mut self.cold, R10, ea),
            None => self.cold_undo(pointer, plan.write, keep == Keep::Nothing),
        }
        Self::restore(&mut self.cold, keep, true);
        let info = 1 | MissInfo::SOFT | if plan.write { MissInfo::WRITE } else { 0 };
        dynasm!(self.cold ; .arch x64 ; mov r11d, info as i32);
        self.cold.push(0xE8);
        self.cold_rel32(Target::Cache(self.stubs.miss));
        let leave = Pos::Cold(self.cold.ops.len() + 10);
        self.cold_jmp(Target::Here(leave));
        self.cold_jmp(Target::Here(retry));
        debug_assert_eq!(leave, self.cold_here());
        self.ungrouped_exit()
    }

    /// Cold code that leaves for the ungrouped copy at the current instruction.
    fn ungrouped_exit(&mut self) -> Pos {
        let here = self.cold_here();
        give_back(&mut self.cold, self.remaining);
        self.cold.push(0xE9);
        let site = self.cold_here();
        self.cold.push_i32(0);
        let stub = self.cold_here();
        self.fixups.push((site, Target::Here(stub)));
        let target = self.code_address(self.rip);
        let flags = self.flags_here(FlagSet::ALL);
        self.cold_link(PendingLink {
            target,
            site,
            stub,
            flags,
            same_page: true,
            ungrouped: true,
            back: false,
        });
        here
    }

    /// No member of `plan` follows.
    pub(crate) fn end_group(&mut self, plan: &Plan) {
        self.groups.retain(|g| (g.slot, g.last) != (plan.slot, plan.last));
        self.r9_busy &= plan.slot.is_some();
    }

    /// The host register that holds the address a member counts from: r9, or r11, loaded here.
    fn pointer(&mut self, m: Member) -> u8 {
        let Some(slot) = m.slot else { return R9 };
        load(&mut self.hot, R11, slot_offset(slot));
        R11
    }

    /// Where the word on the stack is that is the member.
    pub(super) fn spot(&mut self, m: Member) -> Spot {
        Spot { base: self.pointer(m), disp: m.offset, window: false }
    }

    /// The memory operand, if a group covers it.
    pub(super) fn member(&self, instr: &Instruction, size: u32, write: bool) -> Option<Member> {
        let operand = groups::operand(instr, size, self.code64)?;
        let covered = |g: &Group| g.member(operand.behind(g.key, g.anchor)?, size as i32, write);
        self.groups.iter().find_map(covered)
    }

    /// The word at RSP + `disp`, if a group covers it.
    pub(super) fn stack_member(&self, disp: i32, size: i32, write: bool) -> Option<Member> {
        let stack = |g: &&Group| g.key.base == Some(4) && g.key.index.is_none();
        self.groups.iter().filter(stack).find_map(|g| g.member(disp, size, write))
    }

    /// Makes the memory operand the member; uses r11 at most.
    pub(super) fn address_member(&mut self, instr: &mut Instruction, m: Member) {
        let pointer = self.pointer(m);
        instr.set_memory_base(Register::RAX + u32::from(pointer));
        instr.set_memory_index(Register::None);
        instr.set_memory_index_scale(1);
        instr.set_memory_displacement64(m.offset as u64);
        instr.set_memory_displ_size(1);
    }

    /// RSP changed by `n` with an instruction of the block.
    pub(crate) fn rsp_adjusted(&mut self, n: i32) {
        self.adjusted(4, n);
    }

    /// Guest register `register` changed by `n` with an instruction of the block.
    pub(crate) fn adjusted(&mut self, register: u8, n: i32) {
        for g in &mut self.groups {
            g.moved += g.key.step(register, n);
        }
        for p in &mut self.probed {
            p.at = p.at.saturating_sub(p.key.step(register, n));
        }
        self.stack_adjusted(register, n);
    }
}

/// Offset of a slot from host RSP.
fn slot_offset(slot: usize) -> i32 {
    ctx!(group_slots) + slot as i32 * 8
}

//! Base groups: one check, and the page's delta at hand for all accesses off one base register (planned by
//! [`crate::groups`]): in r13 for the most useful group of a block, in the context for others. Where the check fails the block goes on in its ungrouped copy.

use super::access::Keep;
use super::flow::give_back;
use super::{Emitter, PendingLink, Pos, Target, load, store};
use crate::context::ctx;
use crate::flags::FlagSet;
use crate::groups::{self, Plan};
use crate::regs::{self, Place, R10, R11, R13};
use crate::stubs::MissInfo;
use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Instruction, Register};

/// A base group in force.
#[derive(Clone, Copy)]
pub(super) struct Group {
    base: u8,
    lo: i32,
    hi: i32,
    write: bool,
    /// How far the base moved since the check.
    moved: i32,
    /// Where the page's delta is: r13, or a slot of the context.
    slot: Option<usize>,
    last: usize,
}

/// A memory operand that a group covers.
#[derive(Clone, Copy)]
pub(super) struct Member {
    /// Guest register number.
    pub(super) base: u8,
    pub(super) disp: i32,
    pub(super) slot: Option<usize>,
}

impl Group {
    fn covers(&self, disp: i32, size: i32, write: bool) -> bool {
        let lo = self.moved.wrapping_add(disp);
        lo >= self.lo && lo.saturating_add(size) <= self.hi && (self.write || !write)
    }
}

impl Emitter {
    /// Starts a group: one check before the members, which leaves to the ungrouped copy of the rest if it fails.
    pub(crate) fn group(&mut self, plan: &Plan, live: FlagSet) {
        let keep = Self::keep(live);
        let retry = self.hot_here();
        let base = self.guest(plan.base, R10);
        let lo = plan.lo;
        let delta = if plan.slot.is_some() { R11 } else { R13 };
        self.lea(R10, Some(base), None, 1, lo, false);
        self.look_up(delta, R10, plan.write, keep == Keep::Nothing);
        Self::save(&mut self.hot, keep, true);
        dynasm!(self.hot ; .arch x64 ; test Rb(delta), 1);
        let poison = self.cold_here();
        self.hot_jcc(5, poison);
        // Poison: fill the entry if that has no effect the guest did not ask for.
        Self::restore(&mut self.cold, keep, true);
        let info = 1 | MissInfo::SOFT | if plan.write { MissInfo::WRITE } else { 0 };
        dynasm!(self.cold ; .arch x64 ; mov r11d, info as i32);
        self.cold.push(0xE8);
        self.cold_rel32(Target::Cache(self.stubs.miss));
        let leave = Pos::Cold(self.cold.ops.len() + 10);
        self.cold_jmp(Target::Here(leave));
        self.cold_jmp(Target::Here(retry));
        debug_assert_eq!(leave, self.cold_here());
        let ungrouped = self.ungrouped_exit();
        if let Some(slot) = plan.slot {
            store(&mut self.hot, delta_offset(slot), R11);
        }
        let last = plan.hi - plan.lo - 1;
        dynasm!(self.hot ; .arch x64 ; lea r11, [r10 + last] ; xor r11, r10 ; test r11, !0xFFF);
        let cross = self.cold_here();
        self.hot_jcc(5, cross);
        Self::restore(&mut self.cold, keep, true);
        self.cold_jmp(Target::Here(ungrouped));
        Self::restore(&mut self.hot, keep, true);
        self.r13_busy |= plan.slot.is_none();
        self.groups.push(Group {
            base: plan.base,
            lo: plan.lo,
            hi: plan.hi,
            write: plan.write,
            moved: 0,
            slot: plan.slot,
            last: plan.last,
        });
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
        self.cold_link(PendingLink {
            target,
            site,
            stub,
            flags_live: true,
            same_page: true,
            ungrouped: true,
            back: false,
        });
        here
    }

    /// No member of `plan` follows.
    pub(crate) fn end_group(&mut self, plan: &Plan) {
        self.groups.retain(|g| (g.slot, g.last) != (plan.slot, plan.last));
        self.r13_busy &= plan.slot.is_some();
    }

    /// The host register that holds the delta: r13, or r11, loaded here.
    pub(super) fn delta(&mut self, slot: Option<usize>) -> u8 {
        let Some(slot) = slot else { return R13 };
        load(&mut self.hot, R11, delta_offset(slot));
        R11
    }

    /// The memory operand, if a group covers it.
    pub(super) fn member(&self, instr: &Instruction, size: u32, write: bool) -> Option<Member> {
        let base = groups::operand_base(instr, self.code64)?;
        let disp = instr.memory_displacement64() as i32;
        let g = self.groups.iter().find(|g| g.base == base && g.covers(disp, size as i32, write))?;
        Some(Member { base, disp, slot: g.slot })
    }

    /// Where the delta for the word at RSP + `disp` is, if a group covers it.
    pub(super) fn stack_member(&self, disp: i32, size: i32, write: bool) -> Option<Option<usize>> {
        self.groups.iter().find(|g| g.base == 4 && g.covers(disp, size, write)).map(|g| g.slot)
    }

    /// Makes the memory operand `[base + delta + disp]`; uses r11 at most.
    pub(super) fn address_member(&mut self, instr: &mut Instruction, m: Member) {
        let host = |n: u8| Register::RAX + u32::from(n);
        let (base, index) = match (regs::place(m.base), m.slot) {
            (Place::Host(h), _) => (h, Some(self.delta(m.slot))),
            (Place::Home(_), None) => (self.guest(m.base, R11), Some(R13)),
            (Place::Home(_), Some(_)) => {
                let (b, d) = (self.guest(m.base, R10), self.delta(m.slot));
                dynasm!(self.hot ; .arch x64 ; lea r11, [Rq(b) + Rq(d)]);
                (R11, None)
            }
        };
        instr.set_memory_base(host(base));
        instr.set_memory_index(index.map_or(Register::None, host));
        instr.set_memory_index_scale(1);
        instr.set_memory_displacement64(i64::from(m.disp) as u64);
        instr.set_memory_displ_size(if m.disp == 0 { 0 } else { 1 });
    }

    /// RSP changed by `n` with an instruction of the block.
    pub(crate) fn rsp_adjusted(&mut self, n: i32) {
        self.adjusted(4, n);
    }

    /// Guest register `base` changed by `n` with an instruction of the block.
    pub(crate) fn adjusted(&mut self, base: u8, n: i32) {
        for g in self.groups.iter_mut().filter(|g| g.base == base) {
            g.moved += n;
        }
    }
}

/// Offset of a delta slot from host RSP.
fn delta_offset(slot: usize) -> i32 {
    ctx!(group_deltas) + slot as i32 * 8
}

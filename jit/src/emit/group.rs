//! Base groups: one check, and the page's delta in r13 for all accesses off one base register (planned by
//! [`crate::groups`]). Where the check fails the block goes on in its ungrouped copy.

use super::{Emitter, PendingLink, Pos, Target};
use crate::context::{Reason, ctx};
use crate::flags::FlagSet;
use crate::groups::{self, Plan};
use crate::regs::R10;
use crate::stubs::MissInfo;
use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Instruction, Register};

/// The base group in force: r13 holds the page's delta.
#[derive(Clone, Copy)]
pub(super) struct Group {
    base: u8,
    lo: i32,
    hi: i32,
    write: bool,
    /// How far RSP moved since the check, where it is the base.
    moved: i32,
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
        dynasm!(self.hot
            ; .arch x64
            ; lea r10, [Rq(base) + lo]
            ; rorx r11, r10, 48
            ; shrx r11, r11, r15
        );
        if plan.write {
            dynasm!(self.hot ; .arch x64 ; mov r13, [r14 + r11 * 8 - 28]);
        } else {
            dynasm!(self.hot ; .arch x64 ; mov r13, [r15 + r11 * 8 - 28]);
        }
        Self::save(&mut self.hot, keep, true);
        dynasm!(self.hot ; .arch x64 ; test r13b, 1);
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
        let last = plan.hi - plan.lo - 1;
        dynasm!(self.hot ; .arch x64 ; lea r11, [r10 + last] ; xor r11, r10 ; test r11, !0xFFF);
        let cross = self.cold_here();
        self.hot_jcc(5, cross);
        Self::restore(&mut self.cold, keep, true);
        self.cold_jmp(Target::Here(ungrouped));
        Self::restore(&mut self.hot, keep, true);
        self.group = Some(Group { base: plan.base, lo: plan.lo, hi: plan.hi, write: plan.write, moved: 0 });
    }

    /// Cold code that leaves for the ungrouped copy at the current instruction.
    fn ungrouped_exit(&mut self) -> Pos {
        let here = self.cold_here();
        let number = self.first_link + self.links.len() as u32;
        self.cold.push(0xE9);
        let site = self.cold_here();
        self.cold.push_i32(0);
        let stub = self.cold_here();
        self.fixups.push((site, Target::Here(stub)));
        dynasm!(self.cold ; .arch x64 ; mov DWORD [rsp + ctx!(link)], number as i32);
        self.cold_leave(self.rip, Reason::Link);
        self.links.push(PendingLink { site, stub, flags_live: true, same_page: true, ungrouped: true });
        here
    }

    /// No member follows: r13 is free again.
    pub(crate) fn end_group(&mut self) {
        self.group = None;
    }

    /// The base and displacement of a memory operand that the group covers.
    pub(super) fn member(&self, instr: &Instruction, size: u32, write: bool) -> Option<(u8, i32)> {
        let g = self.group?;
        if groups::operand_base(instr, self.code64) != Some(g.base) {
            return None;
        }
        let disp = instr.memory_displacement64() as i32;
        g.covers(disp, size as i32, write).then_some((g.base, disp))
    }

    /// Whether the word at RSP + `disp` is covered by the group.
    pub(super) fn stack_member(&self, disp: i32, write: bool) -> bool {
        self.group.is_some_and(|g| g.base == 4 && g.covers(disp, self.stack_size(), write))
    }

    /// RSP changed by `n` with an instruction of the block.
    pub(crate) fn rsp_adjusted(&mut self, n: i32) {
        if let Some(g) = &mut self.group
            && g.base == 4
        {
            g.moved += n;
        }
    }
}

/// Makes the memory operand `[base + r13 + disp]`.
pub(super) fn address_by_group(instr: &mut Instruction, base: u8, disp: i32) {
    instr.set_memory_base(Register::RAX + u32::from(base));
    instr.set_memory_index(Register::R13);
    instr.set_memory_index_scale(1);
    instr.set_memory_displacement64(i64::from(disp) as u64);
    instr.set_memory_displ_size(if disp == 0 { 0 } else { 1 });
}

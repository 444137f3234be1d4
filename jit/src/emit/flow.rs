//! Ways into and out of a block: direct exits that are chained later, indirect jumps through the jump cache, exits to
//! the run loop and the interpreter, and the checks at the entries.

use super::{Emitter, PendingLink, Pos, Site, Target, Unfit, load, recipe, store, word};
use crate::assembler::SimpleAssembler;
use crate::block::Link;
use crate::classify::stack_word;
use crate::code_cache::CodeOffset;
use crate::context::{JitContext, Reason, ctx};
use crate::flags::{FlagSet, FlagsOut};
use crate::regs::{self, R9, R10, R11};
use crate::stubs;
use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

impl Emitter {
    /// Puts the status flags aside: from here to the end of the block no instruction changes them, and EFLAGS are free for
    /// the checks before accesses.
    pub(crate) fn save_flags(&mut self) {
        stubs::save_flags(&mut self.hot);
        self.flags_saved = Some(self.hot_len() as u32);
    }

    /// The same right behind `instr`, which changed some.
    pub(crate) fn save_flags_of(&mut self, instr: &Instruction) {
        let Some(recipe) = recipe::recipe(instr) else { return self.save_flags() };
        self.sync_rsp();
        self.put_aside(&recipe);
        self.flags_saved = Some(self.hot_len() as u32);
    }

    /// The same, unless they are there.
    pub(super) fn put_flags_aside(&mut self) {
        if self.flags_saved.is_none() {
            self.save_flags();
        }
    }

    /// Where status flags are at this point, of which some later instruction may read `live`.
    pub(super) fn flags_here(&self, live: FlagSet) -> FlagsOut {
        if self.flags_saved.is_some() { FlagsOut::Saved } else { FlagsOut::Live(live) }
    }

    /// Jumps to `target`; polls for attention first when it may close a loop.
    pub(crate) fn direct_exit(&mut self, target: u64, flags: FlagsOut, polled: bool) {
        self.settle_stack();
        if polled || target <= self.rip {
            self.poll(target, flags.live());
        }
        self.hot.push(0xE9);
        self.link_here(target, flags);
    }

    /// Conditional jump; ends the block with two exits.
    pub(crate) fn jcc(
        &mut self,
        cc: u8,
        target: u64,
        next: u64,
        taken_flags: FlagsOut,
        next_flags: FlagsOut,
    ) {
        self.side_exit(cc, target, taken_flags);
        self.direct_exit(next, next_flags, false);
    }

    /// An exit that is taken if condition `cc` holds.
    pub(crate) fn side_exit(&mut self, cc: u8, target: u64, live_taken: FlagsOut) {
        self.settle_stack();
        if target <= self.rip {
            self.hot.push(0x0F);
            self.hot.push(0x80 | (cc ^ 1));
            let site = self.hot_here();
            self.hot.push_i32(0);
            self.direct_exit(target, live_taken, true);
            let over = self.hot_here();
            self.fixups.push((site, Target::Here(over)));
        } else {
            self.hot.push(0x0F);
            self.hot.push(0x80 | cc);
            self.link_here(target, live_taken);
        }
    }

    /// LOOP, LOOPE, LOOPNE: two exits.
    pub(crate) fn loop_(
        &mut self,
        instr: &Instruction,
        next: u64,
        taken_flags: FlagsOut,
        next_flags: FlagsOut,
    ) {
        self.settle_stack();
        match count_size(instr) {
            2 => dynasm!(self.hot ; .arch x64 ; lea r10d, [rcx - 1] ; mov cx, r10w),
            4 => dynasm!(self.hot ; .arch x64 ; lea ecx, [rcx - 1]),
            _ => dynasm!(self.hot ; .arch x64 ; lea rcx, [rcx - 1]),
        }
        let mut over = vec![self.jump_if_zero(count_size(instr))];
        let opposite = match instr.mnemonic() {
            Mnemonic::Loope => Some(5),
            Mnemonic::Loopne => Some(4),
            _ => None,
        };
        if let Some(cc) = opposite {
            self.hot.push(0x0F);
            self.hot.push(0x80 | cc);
            over.push(self.hot_here());
            self.hot.push_i32(0);
        }
        self.direct_exit(instr.near_branch_target(), taken_flags, true);
        let here = self.hot_here();
        self.fixups.extend(over.into_iter().map(|site| (site, Target::Here(here))));
        self.direct_exit(next, next_flags, false);
    }

    /// JCXZ, JECXZ, JRCXZ: two exits.
    pub(crate) fn jump_if_count_zero(
        &mut self,
        instr: &Instruction,
        next: u64,
        taken_flags: FlagsOut,
        next_flags: FlagsOut,
    ) {
        self.settle_stack();
        let site = self.jump_if_zero(count_size(instr));
        self.direct_exit(next, next_flags, false);
        let here = self.hot_here();
        self.fixups.push((site, Target::Here(here)));
        self.direct_exit(instr.near_branch_target(), taken_flags, false);
    }

    /// A jump that is taken if the count register of `size` bytes is zero; keeps flags. Returns where its displacement is.
    pub(super) fn jump_if_zero(&mut self, size: u32) -> Pos {
        match size {
            // CX alone: the host tests ECX, so with the count there for a moment.
            2 => dynasm!(self.hot
                ; .arch x64
                ; mov r10, rcx
                ; movzx ecx, cx
                ; .u8 0xE3, 5 // to the jump: over the next two
                ; mov rcx, r10
                ; .u8 0xEB, 8
                ; mov rcx, r10
            ),
            4 => dynasm!(self.hot ; .arch x64 ; .u8 0x67, 0xE3, 2, 0xEB, 5),
            _ => dynasm!(self.hot ; .arch x64 ; .u8 0xE3, 2, 0xEB, 5),
        }
        self.hot.push(0xE9);
        let site = self.hot_here();
        self.hot.push_i32(0);
        site
    }

    /// Near JMP or CALL through a register or memory.
    pub(crate) fn jump_indirect(
        &mut self,
        instr: &Instruction,
        call: Option<u64>,
        site: Site,
    ) -> Result<(), Unfit> {
        let target = instr.op0_register();
        if instr.op0_kind() == OpKind::Memory {
            self.load_operand(instr, instr.memory_size().size() as i32, site.before)?;
        } else {
            let r = self.guest(regs::number(target), R11);
            match target.size() {
                2 => dynasm!(self.hot ; .arch x64 ; movzx r11d, Rw(r)),
                4 => dynasm!(self.hot ; .arch x64 ; mov r11d, Rd(r)),
                _ if r != R11 => dynasm!(self.hot ; .arch x64 ; mov r11, Rq(r)),
                _ => {}
            }
        }
        if let Some(next) = call {
            store(&mut self.hot, ctx!(tmp), R11);
            self.push_return(next, stack_word(instr) as i32, site.before);
            self.sync_rsp();
            load(&mut self.hot, R11, ctx!(tmp));
        }
        self.indirect_exit();
        Ok(())
    }

    /// Leaves to interpret the instruction at `rip`.
    pub(crate) fn interpret(&mut self, rip: u64) {
        give_back(&mut self.hot, self.remaining);
        let address = self.code_address(rip);
        self.hot_address(R10, address);
        store(&mut self.hot, ctx!(rip), R10);
        self.hot.push(0xE9);
        let stub = self.interpret_stub();
        self.hot_rel32(Target::Cache(stub));
    }

    /// The displacement of a chainable jump, and its stub.
    fn link_here(&mut self, target: u64, flags: FlagsOut) {
        let stub = self.cold_here();
        let site = self.hot_rel32(Target::Here(stub));
        let back = target <= self.rip;
        let target = self.code_address(target);
        let same_page = target >> 12 == self.address >> 12;
        self.cold_link(PendingLink { target, site, stub, flags, same_page, ungrouped: false, back });
    }

    /// The stub of a link: where the link leads is in its record.
    pub(super) fn cold_link(&mut self, link: PendingLink) {
        debug_assert_eq!(link.stub, self.cold_here());
        let number = self.first_link + self.links.len() as u32;
        dynasm!(self.cold ; .arch x64 ; mov r10d, number as i32);
        let saved = link.flags == FlagsOut::Saved;
        self.cold_jmp(Target::Cache(if saved { self.stubs.link_saved } else { self.stubs.link }));
        self.links.push(link);
    }

    fn poll(&mut self, target: u64, live: FlagSet) {
        load(&mut self.hot, R10, ctx!(attention));
        if live.is_empty() {
            word::compare_with_zero(&mut self.hot, R10);
            let cold = self.cold_here();
            self.hot_jcc(5, cold);
        } else {
            dynasm!(self.hot ; .arch x64 ; mov r10d, [r10]);
            self.jump_unless_zero();
        }
        self.cold_leave(target, Reason::Attention);
    }

    /// Goes on if r10 is zero, to the cold code that follows otherwise; keeps flags. Uses r9.
    fn jump_unless_zero(&mut self) {
        dynasm!(self.hot ; .arch x64 ; mov r9, rcx ; mov rcx, r10 ; .u8 0xE3, 8);
        // jrcxz over `mov rcx, r9; jmp cold`: 3 + 5 bytes.
        dynasm!(self.hot ; .arch x64 ; mov rcx, r9);
        self.hot.push(0xE9);
        let cold = self.cold_here();
        self.hot_rel32(Target::Here(cold));
        dynasm!(self.hot ; .arch x64 ; mov rcx, r9);
    }

    /// Jumps to the offset in r11 through the jump cache, with the status flags put aside; polls for attention.
    pub(super) fn indirect_exit(&mut self) {
        self.settle_stack();
        self.put_flags_aside();
        self.look_up_target(self.stubs.second, |_| {});
        load(&mut self.hot, R9, ctx!(attention));
        word::compare_with_zero(&mut self.hot, R9);
        self.hot.push(0x0F);
        self.hot.push(0x85);
        self.hot_rel32(Target::Cache(self.stubs.attention));
        self.jump_to_target();
    }

    /// Finds the entry of the jump cache for the offset in r11: what follows runs with its address in r10. Without an entry it
    /// leaves by way of `stub`, after what `leaving` emits.
    pub(super) fn look_up_target(&mut self, stub: CodeOffset, leaving: impl FnOnce(&mut SimpleAssembler)) {
        let start = self.code_address(0);
        if !self.code64 && start != 0 {
            // The code address: base added, and the number of the code segment.
            let (base, number) = (start as i32, start & !0xFFFF_FFFF);
            dynasm!(self.hot ; .arch x64 ; lea r11d, [r11 + base]);
            if number != 0 {
                Self::constant(&mut self.hot, R10, number);
                dynasm!(self.hot ; .arch x64 ; lea r11, [r11 + r10]);
            }
        }
        dynasm!(self.hot
            ; .arch x64
            ; imul r10d, r11d, BYTE 17
            ; and r10d, 0xF_FFF0
            ; add r10, [BYTE rsp + ctx!(jump_cache) as i8]
            ; cmp r11, [r10]
        );
        let unknown = self.cold_here();
        self.hot_jcc(5, unknown);
        leaving(&mut self.cold);
        // lea r9, [rip + …]: where from.
        self.cold.extend([0x4C, 0x8D, 0x0D]);
        let here = self.hot_here();
        self.cold_rel32(Target::Here(here));
        self.cold_jmp(Target::Cache(stub));
    }

    /// Goes where the entry at r10 says.
    pub(super) fn jump_to_target(&mut self) {
        dynasm!(self.hot ; .arch x64 ; jmp QWORD [r10 + 8]);
    }

    /// The direct entries: the one for status flags that are put aside, then the one for flags in EFLAGS, where all are put
    /// aside if `save`. What follows wants `live` in EFLAGS. Returns where they begin.
    pub(crate) fn direct_entries(&mut self, live: FlagSet, save: bool) -> (u32, u32) {
        let saved_entry = self.hot_len() as u32;
        if !live.is_empty() {
            let call = stubs::restore_flags(&mut self.hot, R10);
            self.fixups.push((Pos::Hot(call), Target::Cache(self.stubs.flags)));
        }
        let over = save.then(|| {
            dynasm!(self.hot ; .arch x64 ; .u8 0xEB, 0); // jmp short
            self.hot_len()
        });
        let entry = self.hot_len() as u32;
        if let Some(over) = over {
            self.save_flags();
            self.hot.ops[over - 1] = (self.hot_len() - over) as u8;
        }
        (saved_entry, entry)
    }

    /// At the direct entry: leaves to look the block up again unless cell `slot` holds `page` (for an instruction
    /// that crosses into a page whose mapping may have changed).
    pub(crate) fn check_page(&mut self, slot: u32, page: u32, rip: u64, live: FlagSet) {
        let keep = Self::keep(live);
        Self::save(&mut self.hot, keep, self.r9_busy);
        let at = xslot_offset(slot);
        dynasm!(self.hot ; .arch x64 ; cmp DWORD [rsp + at], page as i32);
        let cold = self.cold_here();
        self.hot_jcc(5, cold);
        Self::restore(&mut self.cold, keep, self.r9_busy);
        self.cold_leave(rip, Reason::Indirect);
        Self::restore(&mut self.hot, keep, self.r9_busy);
    }

    /// Adds to the retired-instruction counter.
    pub(crate) fn count(&mut self, instructions: u32) {
        let n = instructions as i32;
        dynasm!(self.hot
            ; .arch x64
            ; mov r10, [rsp + ctx!(instructions)]
            ; lea r10, [r10 + n]
            ; mov [rsp + ctx!(instructions)], r10
        );
    }

    /// At the direct entry: leaves if the `instructions` of this block are more than the budget has left.
    pub(crate) fn check_budget(&mut self, instructions: u32, lin: u64, live: FlagSet) {
        let (n, keep) = (instructions as i32, Self::keep(live));
        Self::save(&mut self.hot, keep, self.r9_busy);
        dynasm!(self.hot
            ; .arch x64
            ; mov r10, [rsp + ctx!(instructions)]
            ; add r10, n
            ; cmp r10, [rsp + ctx!(budget)]
        );
        let cold = self.cold_here();
        self.hot_jcc(7, cold);
        Self::restore(&mut self.cold, keep, self.r9_busy);
        self.cold_leave(lin, Reason::Budget);
        Self::restore(&mut self.hot, keep, self.r9_busy);
    }

    /// A jump to `to`, to be placed at `start`, that first checks page-validation cell `slot` and leaves by `link` unless it
    /// holds `page`: chains blocks of different pages.
    pub(crate) fn link_thunk(
        &mut self,
        start: CodeOffset,
        link: &Link,
        (slot, page): (u32, u32),
        to: CodeOffset,
    ) -> &[u8] {
        let ops = &mut self.cold;
        ops.ops.clear();
        let at = xslot_offset(slot);
        let rel = |ops: &mut SimpleAssembler, to: CodeOffset| {
            let site = start.0 as i32 + ops.offset().0 as i32;
            ops.push_i32(to.0 as i32 - (site + 4));
        };
        if !link.flags.live().is_empty() {
            let minus = (page as i32).wrapping_neg();
            dynasm!(ops
                ; .arch x64
                ; mov r9, rcx
                ; mov ecx, [rsp + at]
                ; lea ecx, [rcx + minus]
                ; .u8 0xE3, 8 // jrcxz over the next two
                ; mov rcx, r9
            );
            ops.push(0xE9);
            rel(ops, link.stub);
            dynasm!(ops ; .arch x64 ; mov rcx, r9);
        } else {
            dynasm!(ops ; .arch x64 ; cmp DWORD [rsp + at], page as i32);
            ops.push(0x0F);
            ops.push(0x85);
            rel(ops, link.stub);
        }
        ops.push(0xE9);
        rel(ops, to);
        &ops.ops
    }

    /// A jump to `to`, to be placed at `start`, that counts cell `cell` of `heat` down and leaves by `link` when that is zero.
    pub(crate) fn count_thunk(
        &mut self,
        start: CodeOffset,
        link: &Link,
        cell: usize,
        to: CodeOffset,
    ) -> &[u8] {
        let ops = &mut self.cold;
        ops.ops.clear();
        let at = std::mem::offset_of!(JitContext, heat) as i32 + cell as i32 * 4;
        let rel = |ops: &mut SimpleAssembler, to: CodeOffset| {
            let site = start.0 as i32 + ops.offset().0 as i32;
            ops.push_i32(to.0 as i32 - (site + 4));
        };
        if !link.flags.live().is_empty() {
            dynasm!(ops
                ; .arch x64
                ; mov r9, rcx
                ; mov ecx, [rsp + at]
                ; lea ecx, [rcx - 1]
                ; mov [rsp + at], ecx
                ; .u8 0xE3, 8 // jrcxz over the next two
                ; mov rcx, r9
            );
            ops.push(0xE9);
            rel(ops, to);
            dynasm!(ops ; .arch x64 ; mov rcx, r9);
            ops.push(0xE9);
            rel(ops, link.stub);
        } else {
            dynasm!(ops ; .arch x64 ; sub DWORD [rsp + at], 1);
            ops.push(0x0F);
            ops.push(0x86);
            rel(ops, link.stub);
            ops.push(0xE9);
            rel(ops, to);
        }
        &ops.ops
    }

    pub(super) fn cold_leave(&mut self, rip: u64, reason: Reason) {
        let address = self.code_address(rip);
        self.cold_address(address);
        store(&mut self.cold, ctx!(rip), R10);
        dynasm!(self.cold ; .arch x64 ; mov r10d, reason as i32);
        let saved = self.flags_saved.is_some();
        self.cold_jmp(Target::Cache(if saved { self.stubs.exit_saved } else { self.stubs.exit }));
    }

    pub(super) fn cold_interpret(&mut self, rip: u64) {
        give_back(&mut self.cold, self.remaining);
        let address = self.code_address(rip);
        self.cold_address(address);
        store(&mut self.cold, ctx!(rip), R10);
        let stub = self.interpret_stub();
        self.cold_jmp(Target::Cache(stub));
    }

    fn interpret_stub(&self) -> CodeOffset {
        if self.flags_saved.is_some() { self.stubs.interpret_saved } else { self.stubs.interpret }
    }
}

/// Bytes of the count register of LOOP and JCXZ.
fn count_size(instr: &Instruction) -> u32 {
    use Code::*;
    match instr.code() {
        Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX | Loopne_rel8_16_CX
        | Loopne_rel8_32_CX | Jcxz_rel8_16 | Jcxz_rel8_32 => 2,
        Loop_rel8_16_RCX | Loop_rel8_64_RCX | Loope_rel8_16_RCX | Loope_rel8_64_RCX | Loopne_rel8_16_RCX
        | Loopne_rel8_64_RCX | Jrcxz_rel8_16 | Jrcxz_rel8_64 => 8,
        _ => 4,
    }
}

/// Offset of a page-validation cell from host RSP.
fn xslot_offset(slot: u32) -> i32 {
    std::mem::offset_of!(JitContext, xslots) as i32 + slot as i32 * 4
}

/// Takes `n` instructions, counted when the block was entered, off the counter: they are not executed here after all.
pub(super) fn give_back(ops: &mut SimpleAssembler, n: u32) {
    if n > 0 {
        let minus = -(n as i32);
        dynasm!(ops
            ; .arch x64
            ; mov r10, [rsp + ctx!(instructions)]
            ; lea r10, [r10 + minus]
            ; mov [rsp + ctx!(instructions)], r10
        );
    }
}

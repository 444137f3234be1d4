//! Words on the stack: PUSH, POP, LEAVE, near CALL and RET (SDM vol. 1, 6.2), with RSP moved once for a run of them in
//! a base group.

use super::window::Spot;
use super::word::{Op, store_constant, word};
use super::{Emitter, Site, Unfit};
use crate::block::{InstructionSite, Mode};
use crate::classify::{Class, stack_word};
use crate::context::ctx;
use crate::flags::{FlagSet, FlagsOut};
use crate::regs::{self, HOST_RSP, Place, R10, R11};
use crate::stubs::MissInfo;
use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

/// Guest RSP and RBP.
const RSP: u8 = 4;
const RBP: u8 = 5;

impl Emitter {
    /// Makes the stack address `disp` behind host register `from` (RSP, RBP) accessible.
    fn access_stack(&mut self, from: u8, disp: i32, size: i32, write: bool, live: FlagSet) -> Spot {
        let size = size as u32;
        if self.window {
            self.probe_register(if from == HOST_RSP { RSP } else { RBP }, disp);
            return Spot { base: from, disp, window: true };
        }
        if !self.mode.has(Mode::SEGMENTED) {
            if disp == 0 {
                return self.access(from, size, write, live);
            }
            let width = self.width();
            word(&mut self.hot, Op::Lea, width, R11, from, disp);
            return self.access(R11, size, write, live);
        }
        let narrow = self.mode.has(Mode::STACK16);
        match (disp, narrow) {
            (0, true) => dynasm!(self.hot ; .arch x64 ; movzx r10d, Rw(from)),
            (_, narrow) => {
                word(&mut self.hot, Op::Lea, 4, R10, from, disp);
                if narrow {
                    dynasm!(self.hot ; .arch x64 ; movzx r10d, r10w);
                }
            }
        }
        self.access_segment(Register::SS, narrow, MissInfo::of(size, write), live)
    }

    /// Pushes `n` bytes of what `value` puts into the register it returns; it may use `scratch` only.
    pub(super) fn push_word(&mut self, n: i32, live: FlagSet, value: impl FnOnce(&mut Emitter, u8) -> u8) {
        self.push_by(n, live, |e, at| {
            let r = value(e, R10);
            e.through(at);
            word(&mut e.hot, Op::Store, n, r, at.base, at.disp);
        });
    }

    /// Pushes `n` bytes, which `store` stores; it may use r10.
    fn push_by(&mut self, n: i32, live: FlagSet, store: impl FnOnce(&mut Emitter, Spot)) {
        if let Some(m) = self.stack_member(-n, n, true) {
            let at = self.spot(m);
            store(self, at);
            self.rsp_pending -= n;
        } else if self.delays_rsp(n) {
            let at = self.delayed_spot(-n);
            store(self, at);
            self.rsp_pending -= n;
        } else {
            self.sync_rsp();
            let at = self.access_stack(HOST_RSP, -n, n, true, live);
            store(self, at);
            self.add_rsp(HOST_RSP, -n);
        }
        self.rsp_adjusted(-n);
    }

    /// Loads the `n` bytes at the top of the stack into host register `r`; RSP stays. A word of 16 bits is zero-extended
    /// in r11 and leaves the rest of other registers alone.
    pub(super) fn load_top(&mut self, r: u8, n: i32, live: FlagSet) {
        let at = if let Some(m) = self.stack_member(0, n, false) {
            self.spot(m)
        } else if self.delays_rsp(n) {
            self.delayed_spot(0)
        } else {
            self.sync_rsp();
            self.access_stack(HOST_RSP, 0, n, false, live)
        };
        self.load_word(r, at, n);
    }

    /// Whether a word of `n` bytes is reached in the window wherever RSP is to move later, with other words. A host fault finds out how
    /// far it is by then (see [`InstructionSite`]).
    fn delays_rsp(&self, n: i32) -> bool {
        self.window && n == self.width() && !self.mode.has(Mode::STACK16)
    }

    /// The place `disp` behind guest RSP, through the window.
    fn delayed_spot(&mut self, disp: i32) -> Spot {
        self.probe_rsp(self.rsp_pending, disp);
        self.accessed_stack(disp);
        Spot { base: HOST_RSP, disp: self.rsp_pending + disp, window: true }
    }

    /// How many words guest RSP is from its host register, where host faults must know that.
    pub(crate) fn delayed_words(&self) -> i32 {
        if self.window { self.rsp_pending / self.width() } else { 0 }
    }

    fn load_word(&mut self, r: u8, at: Spot, n: i32) {
        self.through(at);
        if n == 2 && r == R11 {
            dynasm!(self.hot ; .arch x64 ; movzx r11d, WORD [Rq(at.base) + at.disp]);
        } else {
            word(&mut self.hot, Op::Load, n, r, at.base, at.disp);
        }
    }

    /// Bytes of an address.
    fn width(&self) -> i32 {
        if self.code64 { 8 } else { 4 }
    }

    /// Loads the `n` bytes of the memory operand of PUSH, CALL or JMP into r11.
    pub(super) fn load_operand(&mut self, instr: &Instruction, n: i32, live: FlagSet) -> Result<(), Unfit> {
        let at = match self.member(instr, n as u32, false) {
            Some(m) => self.spot(m),
            _ => self.address(instr, MissInfo::of(n as u32, false), live)?,
        };
        self.load_word(R11, at, n);
        Ok(())
    }

    /// Sets guest RSP, under the stack's address size, to host register `from` plus `n`. May overwrite r10.
    pub(super) fn add_rsp(&mut self, from: u8, n: i32) {
        if self.code64 || !self.mode.has(Mode::STACK16) {
            let width = self.width();
            word(&mut self.hot, Op::Lea, width, HOST_RSP, from, n);
        } else {
            word(&mut self.hot, Op::Lea, 4, R10, from, n);
            dynasm!(self.hot ; .arch x64 ; mov r8w, r10w);
        }
    }

    /// Brings the host register of guest RSP up to date.
    pub(crate) fn sync_rsp(&mut self) {
        let n = std::mem::take(&mut self.rsp_pending);
        if n != 0 {
            self.add_rsp(HOST_RSP, n);
        }
    }

    /// Guest RSP is ahead of its host register.
    pub(crate) fn rsp_is_pending(&self) -> bool {
        self.rsp_pending != 0
    }

    /// Whether the instruction can be emitted while RSP is behind: a PUSH or POP of another register, in a group or through a window, or a plain
    /// register operation that can neither fault nor name RSP.
    pub(crate) fn tolerates_pending_rsp(&self, instr: &Instruction, class: Class) -> bool {
        let names_rsp = (0..instr.op_count()).any(|i| {
            let r = instr.op_register(i);
            r.is_gpr() && regs::number(r) == 4
        });
        let memory = (0..instr.op_count()).any(|i| instr.op_kind(i) == OpKind::Memory);
        let n = stack_word(instr) as i32;
        let delays = self.delays_rsp(n) && self.delayed_words().abs() < InstructionSite::MAX_PENDING;
        let pushes = || delays || self.stack_member(-n, n, true).is_some();
        let pops = || delays || self.stack_member(0, n, false).is_some();
        match class {
            Class::Push => !names_rsp && !memory && pushes(),
            Class::Pop => !names_rsp && pops(),
            Class::Call => pushes(),
            Class::Ret => pops(),
            Class::Nop | Class::Prefetch | Class::Cld => true,
            Class::Identity(0) => {
                !names_rsp
                    && !memory
                    && !instr.has_lock_prefix()
                    && !matches!(instr.mnemonic(), M::Div | M::Idiv)
            }
            _ => false,
        }
    }

    /// PUSH of a register, immediate or memory.
    pub(crate) fn push(&mut self, instr: &Instruction, site: Site) -> Result<(), Unfit> {
        let word = stack_word(instr) as i32;
        match instr.op0_kind() {
            OpKind::Register if instr.op0_register().is_segment_register() => {
                let at = ctx!(selectors) + instr.op0_register().number() as i32 * 2;
                self.push_word(word, site.before, |e, scratch| {
                    dynasm!(e.hot ; .arch x64 ; movzx Rd(scratch), WORD [rsp + at]);
                    scratch
                });
            }
            OpKind::Register => {
                let n = regs::number(instr.op0_register());
                self.push_word(word, site.before, |e, scratch| e.guest(n, scratch));
            }
            OpKind::Memory => {
                self.load_operand(instr, word, site.before)?;
                dynasm!(self.hot ; .arch x64 ; mov [rsp + ctx!(tmp)], r11);
                self.push_word(word, site.before, |e, scratch| {
                    dynasm!(e.hot ; .arch x64 ; mov Rq(scratch), [rsp + ctx!(tmp)]);
                    scratch
                });
            }
            _ => {
                let value = instr.immediate(0);
                let value = if self.code64 { value } else { value & 0xFFFF_FFFF };
                self.push_constant(value, word, site.before);
            }
        }
        Ok(())
    }

    pub(super) fn push_return(&mut self, next: u64, word: i32, live: FlagSet) {
        if !self.movable {
            return self.push_constant(next, word, live);
        }
        self.push_word(word, live, |e, scratch| {
            e.hot_address(scratch, next);
            scratch
        });
    }

    /// Pushes `n` bytes of `value`.
    fn push_constant(&mut self, value: u64, n: i32, live: FlagSet) {
        let short = match n {
            4 => Some(value as i32),
            8 => i32::try_from(value as i64).ok(),
            _ => None,
        };
        let Some(short) = short else {
            return self.push_word(n, live, |e, scratch| {
                Self::constant(&mut e.hot, scratch, value);
                scratch
            });
        };
        self.push_by(n, live, |e, at| {
            e.through(at);
            store_constant(&mut e.hot, n, at.base, at.disp, short);
        });
    }

    /// POP into a register.
    pub(crate) fn pop(&mut self, instr: &Instruction, site: Site) {
        let n = regs::number(instr.op0_register());
        let word = stack_word(instr) as i32;
        match regs::place(n) {
            Place::Host(HOST_RSP) if word == 2 => {
                // The upper half of ESP is that of the incremented one.
                self.load_top(R11, word, site.before);
                self.rsp_pending += word;
                self.sync_rsp();
                dynasm!(self.hot ; .arch x64 ; mov r8w, r11w);
                return;
            }
            Place::Host(HOST_RSP) => return self.load_top(HOST_RSP, word, site.before),
            Place::Host(h) => self.load_top(h, word, site.before),
            Place::Home(_) => {
                self.load_top(R11, word, site.before);
                self.set_guest(n, R11);
            }
        }
        self.rsp_pending += word;
        if !self.delays_rsp(word) && (!self.code64 || self.groups.is_empty()) {
            self.sync_rsp();
        }
        self.rsp_adjusted(word);
    }

    /// LEAVE.
    pub(crate) fn leave(&mut self, instr: &Instruction, site: Site) {
        let word = stack_word(instr) as i32;
        let at = self.access_stack(RBP, 0, word, false, site.before);
        self.load_word(R11, at, word);
        self.add_rsp(RBP, word);
        if word == 2 {
            dynasm!(self.hot ; .arch x64 ; mov bp, r11w);
        } else {
            self.set_guest(RBP, R11);
        }
    }

    /// Near CALL to a constant: pushes `next`, exits to the target.
    pub(crate) fn call(&mut self, instr: &Instruction, next: u64, site: Site, flags: FlagsOut) {
        self.push_return(next, stack_word(instr) as i32, site.before);
        self.sync_rsp();
        self.direct_exit(instr.near_branch_target(), flags, false);
    }

    /// Near RET.
    pub(crate) fn ret(&mut self, instr: &Instruction, site: Site) {
        let released = if instr.op_count() > 0 { i32::from(instr.immediate16()) } else { 0 };
        let word = stack_word(instr) as i32;
        self.load_top(R11, word, site.before);
        self.rsp_pending += word + released;
        self.sync_rsp();
        self.indirect_exit();
    }
}

//! Words on the stack: PUSH, POP, LEAVE, near CALL and RET (SDM vol. 1, 6.2), with RSP moved once for a run of them in
//! a base group.

use super::{Emitter, Site, Unfit};
use crate::classify::Class;
use crate::context::ctx;
use crate::flags::FlagSet;
use crate::regs::{self, Place, R10, R11};
use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Instruction, Mnemonic as M, OpKind};

impl Emitter {
    pub(super) fn stack_size(&self) -> i32 {
        if self.code64 { 8 } else { 4 }
    }

    /// Pushes what `value` puts into the register it returns; it may use `scratch` only.
    pub(super) fn push_word(&mut self, live: FlagSet, value: impl FnOnce(&mut Emitter, u8) -> u8) {
        let n = self.stack_size();
        if let Some(m) = self.stack_member(-n, true) {
            let at = self.rsp_pending - n;
            let r = value(self, R10);
            let d = self.delta(m);
            if self.code64 {
                dynasm!(self.hot ; .arch x64 ; mov [r12 + Rq(d) + at], Rq(r));
            } else {
                dynasm!(self.hot ; .arch x64 ; mov [r12 + Rq(d) + at], Rd(r));
            }
            self.rsp_pending -= n;
        } else {
            self.sync_rsp();
            if self.code64 {
                dynasm!(self.hot ; .arch x64 ; lea r10, [r12 - n]);
            } else {
                dynasm!(self.hot ; .arch x64 ; lea r10d, [r12 - n]);
            }
            self.access(R10, n as u32, true, live);
            let r = value(self, R10);
            if self.code64 {
                dynasm!(self.hot ; .arch x64 ; mov [r11], Rq(r));
            } else {
                dynasm!(self.hot ; .arch x64 ; mov [r11], Rd(r));
            }
            self.add_rsp(regs::HOST_RSP, -n);
        }
        self.rsp_adjusted(-n);
    }

    /// Loads the word at the top of the stack into host register `r`; RSP stays.
    pub(super) fn load_top(&mut self, r: u8, live: FlagSet) {
        if let Some(m) = self.stack_member(0, false) {
            let at = self.rsp_pending;
            let d = self.delta(m);
            if self.code64 {
                dynasm!(self.hot ; .arch x64 ; mov Rq(r), [r12 + Rq(d) + at]);
            } else {
                dynasm!(self.hot ; .arch x64 ; mov Rd(r), [r12 + Rq(d) + at]);
            }
        } else {
            self.sync_rsp();
            self.access(regs::HOST_RSP, self.stack_size() as u32, false, live);
            self.load_stack(r);
        }
    }

    fn load_stack(&mut self, r: u8) {
        if self.code64 {
            dynasm!(self.hot ; .arch x64 ; mov Rq(r), [r11]);
        } else {
            dynasm!(self.hot ; .arch x64 ; mov Rd(r), [r11]);
        }
    }

    /// Loads the word-sized memory operand of PUSH, CALL or JMP into r11.
    pub(super) fn load_operand(&mut self, instr: &Instruction, live: FlagSet) -> Result<(), Unfit> {
        let n = self.stack_size();
        if let Some(m) = self.member(instr, n as u32, false) {
            let (b, d, disp) = (self.guest(m.base, R10), self.delta(m.slot), m.disp);
            if self.code64 {
                dynasm!(self.hot ; .arch x64 ; mov r11, [Rq(b) + Rq(d) + disp]);
            } else {
                dynasm!(self.hot ; .arch x64 ; mov r11d, [Rq(b) + Rq(d) + disp]);
            }
        } else {
            let ea = self.effective_address(instr, true)?;
            self.access(ea, n as u32, false, live);
            self.load_stack(R11);
        }
        Ok(())
    }

    pub(super) fn add_rsp(&mut self, from: u8, n: i32) {
        if self.code64 {
            dynasm!(self.hot ; .arch x64 ; lea r12, [Rq(from) + n]);
        } else {
            dynasm!(self.hot ; .arch x64 ; lea r12d, [Rq(from) + n]);
        }
    }

    /// Brings the host register of guest RSP up to date.
    pub(crate) fn sync_rsp(&mut self) {
        let n = std::mem::take(&mut self.rsp_pending);
        if n != 0 {
            self.add_rsp(regs::HOST_RSP, n);
        }
    }

    /// Whether the instruction can be emitted while RSP is behind: a grouped PUSH or POP of another register, or a plain
    /// register operation that can neither fault nor name RSP.
    pub(crate) fn tolerates_pending_rsp(&self, instr: &Instruction, class: Class) -> bool {
        let n = self.stack_size();
        let names_rsp = (0..instr.op_count()).any(|i| {
            let r = instr.op_register(i);
            r.is_gpr() && regs::number(r) == 4
        });
        let memory = (0..instr.op_count()).any(|i| instr.op_kind(i) == OpKind::Memory);
        match class {
            Class::Push => !names_rsp && !memory && self.stack_member(-n, true).is_some(),
            Class::Pop => !names_rsp && self.stack_member(0, false).is_some(),
            Class::Call => self.stack_member(-n, true).is_some(),
            Class::Ret => self.stack_member(0, false).is_some(),
            Class::Nop => true,
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
        match instr.op0_kind() {
            OpKind::Register => {
                let n = regs::number(instr.op0_register());
                self.push_word(site.before, |e, scratch| e.guest(n, scratch));
            }
            OpKind::Memory => {
                self.load_operand(instr, site.before)?;
                dynasm!(self.hot ; .arch x64 ; mov [rsp + ctx!(tmp)], r11);
                self.push_word(site.before, |e, scratch| {
                    dynasm!(e.hot ; .arch x64 ; mov Rq(scratch), [rsp + ctx!(tmp)]);
                    scratch
                });
            }
            _ => {
                let value = instr.immediate(0);
                let value = if self.code64 { value } else { value & 0xFFFF_FFFF };
                self.push_word(site.before, |e, scratch| {
                    Self::constant(&mut e.hot, scratch, value);
                    scratch
                });
            }
        }
        Ok(())
    }

    pub(super) fn push_return(&mut self, next: u64, live: FlagSet) {
        self.push_word(live, |e, scratch| {
            Self::constant(&mut e.hot, scratch, next);
            scratch
        });
    }

    /// POP into a register.
    pub(crate) fn pop(&mut self, instr: &Instruction, site: Site) {
        let n = regs::number(instr.op0_register());
        let word = self.stack_size();
        match regs::place(n) {
            Place::Host(regs::HOST_RSP) => return self.load_top(regs::HOST_RSP, site.before),
            Place::Host(h) => self.load_top(h, site.before),
            Place::Home(_) => {
                self.load_top(R11, site.before);
                self.set_guest(n, R11);
            }
        }
        self.rsp_pending += word;
        if !self.code64 || self.groups.is_empty() {
            self.sync_rsp();
        }
        self.rsp_adjusted(word);
    }

    /// LEAVE.
    pub(crate) fn leave(&mut self, site: Site) {
        self.access(5, self.stack_size() as u32, false, site.before);
        self.load_stack(R11);
        self.add_rsp(5, self.stack_size());
        self.set_guest(5, R11);
    }

    /// Near CALL to a constant: pushes `next`, exits to `target`.
    pub(crate) fn call(&mut self, next: u64, target: u64, site: Site, live_out: FlagSet) {
        self.push_return(next, site.before);
        self.sync_rsp();
        self.direct_exit(target, live_out, false);
    }

    /// Near RET, popping `extra` bytes of arguments.
    pub(crate) fn ret(&mut self, extra: u32, site: Site) {
        self.load_top(R11, site.before);
        self.rsp_pending += self.stack_size() + extra as i32;
        self.sync_rsp();
        self.indirect_exit();
    }
}

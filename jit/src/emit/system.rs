//! System instructions of hot kernel paths: PUSHF and POPF, CLI and STI, STAC and CLAC, SWAPGS, MOV from a segment
//! register or a control register, RDTSC, and PAUSE. The flags beyond the status flags live in the context.

use super::access::Keep;
use super::{Emitter, Site, Unfit};
use crate::block::Mode;
use crate::classify::stack_word;
use crate::context::ctx;
use crate::regs::{self, Place, R10, R11};
use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Instruction, Mnemonic};

impl Emitter {
    /// PAUSE. Where there are several vCPUs it leaves every so often: whom the guest waits for may need the host's processor.
    pub(crate) fn pause(&mut self, site: Site) {
        dynasm!(self.hot ; .arch x64 ; pause);
        if !self.mode.has(Mode::YIELDS) || !site.before.is_empty() {
            return;
        }
        dynasm!(self.hot ; .arch x64 ; sub DWORD [rsp + ctx!(pauses)], 1);
        let cold = self.cold_here();
        self.hot_jcc(8, cold);
        self.cold_interpret(self.rip);
    }

    /// PUSHFQ, PUSHFD, PUSHF.
    pub(crate) fn pushf(&mut self, instr: &Instruction, site: Site) {
        dynasm!(self.hot
            ; .arch x64
            ; mov [rsp + ctx!(tmp)], rax
            ; lahf
            ; seto al
            ; mov r11, rax
            ; mov r10d, eax
            ; shr r10d, 8
            ; and r10d, 0xFF
            ; movzx eax, al
            ; shl eax, 11
            ; or r10d, eax
            ; movzx eax, BYTE [rsp + ctx!(interrupt_flag)]
            ; shl eax, 9
            ; or r10d, eax
            ; movzx eax, BYTE [rsp + ctx!(access_flag)]
            ; shl eax, 18
            ; or r10d, eax
            ; mov eax, [rsp + ctx!(system_flags)]
            ; and eax, !0x3_0000 // RF and VM read as zero
            ; or r10d, eax
            ; mov [rsp + ctx!(flags_image)], r10
            ; mov rax, r11
            ; add al, 127
            ; sahf
            ; mov rax, [rsp + ctx!(tmp)]
        );
        self.push_word(stack_word(instr) as i32, site.before, |e, scratch| {
            dynasm!(e.hot ; .arch x64 ; mov Rq(scratch), [rsp + ctx!(flags_image)]);
            scratch
        });
    }

    /// POPFQ, POPFD, POPF at CPL 0, where only IF and the status flags change; else the interpreter.
    pub(crate) fn popf(&mut self, instr: &Instruction, site: Site) {
        let word = stack_word(instr) as i32;
        let others = if word == 2 { 0x7500 } else { 0x3F_7500 };
        self.load_top(R11, word, site.before);
        let slow = self.cold_here();
        self.cold_interpret(self.rip);
        // IF may become set while an interrupt waits: the interpreter takes it at the right moment.
        dynasm!(self.hot
            ; .arch x64
            ; movzx r10d, BYTE [rsp + ctx!(access_flag)]
            ; shl r10d, 18
            ; or r10d, [rsp + ctx!(system_flags)]
            ; xor r10d, r11d
            ; and r10d, others
            ; or r10d, [rsp + ctx!(interrupt_pending)]
        );
        self.hot_jcc(5, slow);
        dynasm!(self.hot
            ; .arch x64
            ; mov r10d, r11d
            ; shr r10d, 9
            ; and r10d, 1
            ; mov [rsp + ctx!(interrupt_flag)], r10b
            ; mov [rsp + ctx!(tmp)], rax
            ; mov eax, r11d
            ; shr r11d, 11
            ; and r11d, 1
            ; mov ah, al
            ; mov al, r11b
            ; add al, 127
            ; sahf
            ; mov rax, [rsp + ctx!(tmp)]
        );
        self.add_rsp(regs::HOST_RSP, word);
        self.rsp_adjusted(word);
    }

    /// CLI and STI at CPL 0.
    pub(crate) fn set_interrupt_flag(&mut self, on: bool, site: Site) {
        if on {
            let keep = Self::keep(site.before);
            let grouped = self.r9_busy;
            Self::save(&mut self.hot, keep, grouped);
            dynasm!(self.hot ; .arch x64 ; cmp DWORD [rsp + ctx!(interrupt_pending)], BYTE 0);
            let slow = self.cold_here();
            self.hot_jcc(5, slow);
            Self::restore(&mut self.cold, keep, grouped);
            self.cold_interpret(self.rip);
            Self::restore(&mut self.hot, keep, grouped);
        }
        let value = i8::from(on);
        dynasm!(self.hot ; .arch x64 ; mov BYTE [rsp + ctx!(interrupt_flag)], value);
    }

    /// STAC and CLAC at CPL 0 under SMAP: another supervisor view.
    pub(crate) fn set_access_flag(&mut self, on: bool) {
        let value = i8::from(on);
        let at = ctx!(views) + i32::from(on) * 16;
        dynasm!(self.hot
            ; .arch x64
            ; mov BYTE [rsp + ctx!(access_flag)], value
            ; mov r15, [rsp + at]
            ; mov r14, [rsp + at + 8]
        );
    }

    /// SWAPGS at CPL 0 (64-bit code only; elsewhere it does not decode).
    pub(crate) fn swapgs(&mut self) {
        let gs_base = ctx!(seg_base) + 40;
        dynasm!(self.hot
            ; .arch x64
            ; mov r10, [rsp + gs_base]
            ; mov r11, [rsp + ctx!(kernel_gs_base)]
            ; mov [rsp + gs_base], r11
            ; mov [rsp + ctx!(kernel_gs_base)], r10
        );
    }

    /// RDFSBASE, RDGSBASE.
    pub(crate) fn read_base(&mut self, instr: &Instruction) {
        let at = base_offset(instr);
        if instr.op0_register().size() == 4 {
            dynasm!(self.hot ; .arch x64 ; mov r10d, [rsp + at]);
        } else {
            dynasm!(self.hot ; .arch x64 ; mov r10, [rsp + at]);
        }
        self.set_guest(regs::number(instr.op0_register()), R10);
    }

    /// WRFSBASE, WRGSBASE; a base that is not canonical is the interpreter's #GP.
    pub(crate) fn write_base(&mut self, instr: &Instruction, site: Site) {
        let at = base_offset(instr);
        let r = self.guest(regs::number(instr.op0_register()), R11);
        if instr.op0_register().size() == 4 {
            dynasm!(self.hot ; .arch x64 ; mov r10d, Rd(r) ; mov [rsp + at], r10);
            return;
        }
        // Saving flags may use RAX.
        if r != R11 {
            dynasm!(self.hot ; .arch x64 ; mov r11, Rq(r));
        }
        let keep = Self::keep(site.before);
        let grouped = self.r9_busy;
        Self::save(&mut self.hot, keep, grouped);
        dynasm!(self.hot ; .arch x64 ; mov r10, r11 ; shl r10, 16 ; sar r10, 16 ; cmp r10, r11);
        let slow = self.cold_here();
        self.hot_jcc(5, slow);
        Self::restore(&mut self.cold, keep, grouped);
        self.cold_interpret(self.rip);
        Self::restore(&mut self.hot, keep, grouped);
        dynasm!(self.hot ; .arch x64 ; mov [rsp + at], r11);
    }

    /// MOV r, Sreg.
    pub(crate) fn selector(&mut self, instr: &Instruction) {
        let at = ctx!(selectors) + instr.op1_register().number() as i32 * 2;
        let (n, size) = (regs::number(instr.op0_register()), instr.op0_register().size());
        dynasm!(self.hot ; .arch x64 ; movzx r10d, WORD [rsp + at]);
        match regs::place(n) {
            Place::Host(h) if size == 2 => dynasm!(self.hot ; .arch x64 ; mov Rw(h), r10w),
            Place::Home(h) if size == 2 => {
                let at = Self::home_offset(h);
                dynasm!(self.hot ; .arch x64 ; mov [rsp + at], r10w);
            }
            _ => self.set_guest(n, R10),
        }
    }

    /// MOV from CR0, CR2, CR3 or CR4 at CPL 0.
    pub(crate) fn read_control(&mut self, instr: &Instruction) -> Result<(), Unfit> {
        let n = instr.op1_register().number() as i32;
        if !matches!(n, 0 | 2..=4) {
            return Err(Unfit);
        }
        let at = ctx!(control) + n * 8;
        if instr.op0_register().size() == 4 {
            dynasm!(self.hot ; .arch x64 ; mov r10d, [rsp + at]);
        } else {
            dynasm!(self.hot ; .arch x64 ; mov r10, [rsp + at]);
        }
        self.set_guest(regs::number(instr.op0_register()), R10);
        Ok(())
    }

    /// RDTSC and RDTSCP: the host's counter plus an offset.
    pub(crate) fn rdtsc(&mut self, instr: &Instruction, site: Site) {
        let keep = Self::keep(site.before);
        let grouped = true;
        Self::save(&mut self.hot, keep, grouped);
        let aux = instr.mnemonic() == Mnemonic::Rdtscp;
        if keep == Keep::All {
            // RAX holds the flags, and its old value is not wanted any more.
            dynasm!(self.hot ; .arch x64 ; mov [rsp + ctx!(tmp)], rax);
        }
        if aux {
            // As RDTSCP does: not before earlier instructions are done.
            dynasm!(self.hot ; .arch x64 ; lfence);
        }
        dynasm!(self.hot
            ; .arch x64
            ; rdtsc
            ; shl rdx, 32
            ; or rax, rdx
            ; add rax, [rsp + ctx!(tsc_offset)]
            ; mov rdx, rax
            ; shr rdx, 32
            ; mov eax, eax
        );
        if aux {
            dynasm!(self.hot ; .arch x64 ; mov ecx, [rsp + ctx!(tsc_aux)]);
        }
        match keep {
            Keep::All => dynasm!(self.hot
                ; .arch x64
                ; mov r10, rax
                ; mov rax, [rsp + ctx!(tmp)]
                ; add al, 127
                ; sahf
                ; mov rax, r10
            ),
            _ => Self::restore(&mut self.hot, keep, grouped),
        }
    }
}

/// Where the base is that `instr` reads or writes.
fn base_offset(instr: &Instruction) -> i32 {
    let fs = matches!(instr.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Wrfsbase);
    ctx!(seg_base) + if fs { 32 } else { 40 }
}

//! SYSCALL, SYSRET and IRET in 64-bit code, to where the jump cache of the other privilege level leads. What is unusual
//! (flags, EFER, segments that were not loaded before) is left to the run loop or to the interpreter.

use super::flow::give_back;
use super::recipe::MARK;
use super::{Emitter, Pos, Target, load, word};
use crate::context::{Level, RETURNS, Reason, Return, ctx};
use crate::flags::FlagSet;
use crate::regs::{HOST_RSP, R10, RCX};
use dynasmrt::{DynasmApi, dynasm};
use paravane_cpu::flags;

/// What SYSRET and IRET may load into RFLAGS here; RF is gone behind the next instruction.
const PLAIN: u64 = flags::STATUS | flags::IF | flags::FIXED;
/// Where guest R11 is.
const R11_HOME: i32 = Emitter::home_offset(1);
/// The frame of IRETQ: RIP, CS, RFLAGS, RSP, SS.
const FRAME: i32 = 40;
/// Offset in `JitContext::levels` of CPL 0 and of CPL 3.
const KERNEL: i32 = 0;
const USER: i32 = size_of::<Level>() as i32;

/// Where a level says which RSP code may have.
const STACK_MASK: i32 = std::mem::offset_of!(Level, stack_mask) as i32;
const STACK: i32 = std::mem::offset_of!(Level, stack) as i32;

impl Emitter {
    /// SYSCALL at CPL 3 (SDM 2B).
    pub(crate) fn syscall(&mut self, next: u64) {
        self.put_flags_aside();
        let slow = self.leaves_for(Reason::Syscall);
        self.slow_if_zero(ctx!(system_calls), slow);
        self.flags_from_recipe();
        self.hot_address(RCX, next);
        // Of the flags beyond the status flags only IF may be set, and it is cleared.
        dynasm!(self.hot
            ; .arch x64
            ; movzx r10d, WORD [rsp + ctx!(saved_flags)]
            ; mov r11d, r10d
            ; shr r10d, 8
            ; and r11d, 1
            ; shl r11d, 11
            ; lea r10d, [r10 + r11]
            ; movzx r11d, BYTE [rsp + ctx!(interrupt_flag)]
            ; shl r11d, 9
            ; lea r10d, [r10 + r11]
            ; or r10d, flags::FIXED as i32
            ; mov [rsp + R11_HOME], r10
            ; mov r10d, [rsp + ctx!(syscall_keeps)]
            ; and [rsp + ctx!(saved_flags)], r10w
            ; mov BYTE [rsp + ctx!(interrupt_flag)], 0
        );
        self.load_call_segments(0);
        dynasm!(self.hot ; .arch x64 ; mov r11d, KERNEL);
        self.change_level();
        dynasm!(self.hot ; .arch x64 ; mov r11, [rsp + ctx!(lstar)]);
        self.indirect_exit();
    }

    /// The flags that were put aside are there as LAHF and SETO AL leave them, from here on.
    fn flags_from_recipe(&mut self) {
        dynasm!(self.hot ; .arch x64 ; test BYTE [rsp + ctx!(saved_flags)], MARK);
        let recipe = self.cold_here();
        self.hot_jcc(5, recipe);
        let back = self.hot_here();
        dynasm!(self.cold ; .arch x64 ; mov r10, rax ; mov eax, [rsp + ctx!(saved_flags)] ; .u8 0xE8);
        self.cold_rel32(Target::Cache(self.stubs.flags));
        dynasm!(self.cold ; .arch x64 ; mov [rsp + ctx!(saved_flags)], ax ; mov rax, r10);
        self.cold_jmp(Target::Here(back));
    }

    /// SYSRETQ at CPL 0 (SDM 2B).
    pub(crate) fn sysret(&mut self) {
        self.put_flags_aside();
        let slow = self.leaves_for(Reason::Sysret);
        self.slow_if_zero(ctx!(system_calls), slow);
        dynasm!(self.hot ; .arch x64 ; mov r10, [rsp + R11_HOME]);
        self.slow_if_unusual(!(PLAIN as i32), slow);
        dynasm!(self.hot ; .arch x64 ; mov r11, rcx);
        self.slow_unless_canonical(slow);
        let user = ctx!(levels) + USER;
        dynasm!(self.hot ; .arch x64 ; mov r10, r8 ; and r10, [rsp + user + STACK_MASK] ; cmp r10, [rsp + user + STACK]);
        self.hot_jcc(5, slow);
        dynasm!(self.hot ; .arch x64 ; mov r10, [rsp + R11_HOME]);
        self.load_flags();
        self.load_call_segments(1);
        dynasm!(self.hot ; .arch x64 ; mov r11d, USER);
        self.change_level();
        dynasm!(self.hot ; .arch x64 ; mov r11, rcx);
        self.indirect_exit();
    }

    /// IRETQ at CPL 0 (SDM 2A), to segments that it loaded before and whose descriptors are the same as then. Polls before it
    /// changes anything, since an interrupt that comes right behind it sees RF.
    pub(crate) fn iret(&mut self) {
        self.put_flags_aside();
        let slow = self.cold_here();
        self.cold_interpret(self.rip);
        load(&mut self.hot, R10, ctx!(attention));
        word::compare_with_zero(&mut self.hot, R10);
        self.hot_jcc(5, slow);
        self.slow_if_zero(ctx!(interrupt_returns), slow);
        dynasm!(self.hot ; .arch x64 ; test DWORD [rsp + ctx!(system_flags)], flags::NT as i32);
        self.hot_jcc(5, slow);
        self.find_frame(slow);
        self.find_return(slow);
        for n in 0..2 {
            self.check_descriptor(n, slow);
        }
        dynasm!(self.hot
            ; .arch x64
            ; mov [rsp + ctx!(tmp)], r11
            ; mov r11d, [r11 + std::mem::offset_of!(Return, level) as i32]
            ; lea r11, [rsp + r11 + ctx!(levels)]
            ; mov r10, [r9 + 24]
            ; and r10, [r11 + STACK_MASK]
            ; cmp r10, [r11 + STACK]
        );
        self.hot_jcc(5, slow);
        dynasm!(self.hot ; .arch x64 ; mov r10, [r9 + 16]);
        self.slow_if_unusual(!((PLAIN | flags::RF) as i32), slow);
        dynasm!(self.hot ; .arch x64 ; mov r11, [r9]);
        self.slow_unless_canonical(slow);
        self.load_flags();
        let (level, number) = (std::mem::offset_of!(Return, level), std::mem::offset_of!(Return, number));
        dynasm!(self.hot
            ; .arch x64
            ; mov r11, [rsp + ctx!(tmp)]
            ; mov r10d, [r11]
            ; mov [rsp + ctx!(selectors) + 2], r10d
            ; mov r10d, [r11 + number as i32]
            ; mov [rsp + ctx!(loaded)], r10d
            ; mov r11d, [r11 + level as i32]
            ; mov r8, [r9 + 24]
        );
        self.change_level();
        dynasm!(self.hot ; .arch x64 ; mov r11, [r9]);
        self.look_up_target(self.stubs.indirect, |cold| {
            dynasm!(cold
                ; .arch x64
                ; mov r9d, [r9 + 16]
                ; and r9d, flags::RF as i32
                ; or [rsp + ctx!(system_flags)], r9d
            );
        });
        self.jump_to_target();
    }

    /// The host address of the frame in r9; it must lie on one page.
    fn find_frame(&mut self, slow: Pos) {
        let last = 4096 - FRAME;
        dynasm!(self.hot ; .arch x64 ; mov r10d, r8d ; and r10d, 0xFFF ; cmp r10d, last);
        self.hot_jcc(7, slow);
        self.by_table(|e| e.access(HOST_RSP, 8, false, FlagSet::NONE));
        dynasm!(self.hot ; .arch x64 ; mov r9, r11);
    }

    /// The address of the [`Return`] for the frame at r9 in r11.
    fn find_return(&mut self, slow: Pos) {
        dynasm!(self.hot
            ; .arch x64
            ; movzx r10d, WORD [r9 + 8]
            ; movzx r11d, WORD [r9 + 32]
            ; shl r11d, 16
            ; or r10d, r11d
            ; lea r11, [rsp + ctx!(returns)]
        );
        let mut found = Vec::with_capacity(RETURNS);
        for n in 0..RETURNS {
            if n > 0 {
                dynasm!(self.hot ; .arch x64 ; add r11, size_of::<Return>() as i32);
            }
            dynasm!(self.hot ; .arch x64 ; cmp r10, [r11]);
            if n + 1 < RETURNS {
                let next = self.hot_here();
                found.push(self.hot_jcc(4, next));
            }
        }
        self.hot_jcc(5, slow);
        let here = self.hot_here();
        self.fixups.extend(found.into_iter().map(|site| (site, Target::Here(here))));
    }

    /// Whether descriptor `n` of the [`Return`] at r11 is what it was.
    fn check_descriptor(&mut self, n: i32, slow: Pos) {
        let at = std::mem::offset_of!(Return, descriptors) as i32 + n * 24;
        dynasm!(self.hot
            ; .arch x64
            ; mov r10, [r11 + at]
            ; mov r10, [r10]
            ; add r10, [r11 + at + 8]
            ; test r10b, 7
        );
        self.hot_jcc(5, slow);
        dynasm!(self.hot ; .arch x64 ; mov r10, [r10] ; cmp r10, [r11 + at + 16]);
        self.hot_jcc(5, slow);
    }

    /// Goes to `slow` if the field at `at` is 0.
    fn slow_if_zero(&mut self, at: i32, slow: Pos) {
        dynasm!(self.hot ; .arch x64 ; cmp DWORD [rsp + at], BYTE 0);
        self.hot_jcc(4, slow);
    }

    /// Goes to `slow` if the flags image in r10 has any of these bits, or an interrupt waits for IF.
    fn slow_if_unusual(&mut self, bits: i32, slow: Pos) {
        dynasm!(self.hot ; .arch x64 ; test r10, bits);
        self.hot_jcc(5, slow);
        dynasm!(self.hot ; .arch x64 ; cmp DWORD [rsp + ctx!(interrupt_pending)], BYTE 0);
        self.hot_jcc(5, slow);
    }

    /// Goes to `slow` if bits 47 to 63 of r11 are not all equal. Changes r11.
    fn slow_unless_canonical(&mut self, slow: Pos) {
        dynasm!(self.hot ; .arch x64 ; sar r11, 47 ; inc r11 ; cmp r11, 1);
        self.hot_jcc(7, slow);
    }

    /// The flags image in r10 becomes the flags. Changes r10 and r11.
    fn load_flags(&mut self) {
        dynasm!(self.hot
            ; .arch x64
            ; mov r11d, r10d
            ; shr r11d, 9
            ; and r11d, 1
            ; mov [rsp + ctx!(interrupt_flag)], r11b
            ; mov BYTE [rsp + ctx!(access_flag)], 0
            ; mov QWORD [rsp + ctx!(system_flags)], flags::FIXED as i32
            ; mov r11d, r10d
            ; shr r11d, 11
            ; and r11d, 1
            ; shl r10d, 8
            ; lea r10d, [r10 + r11]
            ; mov [rsp + ctx!(saved_flags)], r10w
        );
    }

    /// CS and SS of SYSCALL (`n` 0) or SYSRET (1).
    fn load_call_segments(&mut self, n: i32) {
        // The selectors of CS and SS lie side by side.
        dynasm!(self.hot
            ; .arch x64
            ; mov r10d, [rsp + ctx!(call_selectors) + n * 4]
            ; mov [rsp + ctx!(selectors) + 2], r10d
            ; mov DWORD [rsp + ctx!(loaded)], n + 1
        );
    }

    /// View and jump cache of the level at offset r11. Uses r10.
    fn change_level(&mut self) {
        let (write, cache) =
            (std::mem::offset_of!(Level, write_base), std::mem::offset_of!(Level, jump_cache));
        dynasm!(self.hot
            ; .arch x64
            ; lea r11, [rsp + r11 + ctx!(levels)]
            ; mov r15, [r11]
            ; mov r14, [r11 + write as i32]
            ; mov r10, [r11 + cache as i32]
            ; mov [rsp + ctx!(jump_cache)], r10
        );
    }

    /// Cold code that leaves for `reason` at the present instruction.
    fn leaves_for(&mut self, reason: Reason) -> Pos {
        let cold = self.cold_here();
        give_back(&mut self.cold, self.remaining);
        self.cold_leave(self.rip, reason);
        cold
    }
}

//! SYSCALL and SYSRET in 64-bit code, to where the jump caches of the other privilege level lead. What is unusual
//! (flags, EFER) is left to the run loop.

use super::flow::give_back;
use super::{Emitter, Pos};
use crate::context::{Reason, USER, ctx};
use crate::regs::RCX;
use dynasmrt::{DynasmApi, dynasm};
use paravane_cpu::flags;

/// What SYSRET may load into RFLAGS here.
const PLAIN: u64 = flags::STATUS | flags::IF | flags::FIXED;
/// Where guest R11 is.
const R11_HOME: i32 = Emitter::home_offset(3);

impl Emitter {
    /// SYSCALL at CPL 3 (SDM 2B).
    pub(crate) fn syscall(&mut self, next: u64) {
        self.put_flags_aside();
        let slow = self.leaves_for(Reason::Syscall);
        dynasm!(self.hot ; .arch x64 ; cmp DWORD [rsp + ctx!(system_calls)], 0);
        self.hot_jcc(4, slow);
        Self::constant(&mut self.hot, RCX, next);
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
            ; or r10d, 2
            ; mov [rsp + R11_HOME], r10
            ; mov r10d, [rsp + ctx!(syscall_keeps)]
            ; and [rsp + ctx!(saved_flags)], r10w
            ; mov BYTE [rsp + ctx!(interrupt_flag)], 0
        );
        self.change_level(0);
        dynasm!(self.hot ; .arch x64 ; mov r11, [rsp + ctx!(lstar)]);
        self.indirect_exit();
    }

    /// SYSRETQ at CPL 0 (SDM 2B).
    pub(crate) fn sysret(&mut self) {
        self.put_flags_aside();
        let slow = self.leaves_for(Reason::Sysret);
        dynasm!(self.hot
            ; .arch x64
            ; mov r10, [rsp + R11_HOME]
            ; test r10, !(PLAIN as i32)
        );
        self.hot_jcc(5, slow);
        // An interrupt that waits for IF is the run loop's; so is an address that is not canonical.
        dynasm!(self.hot ; .arch x64 ; cmp DWORD [rsp + ctx!(system_calls)], 0);
        self.hot_jcc(4, slow);
        dynasm!(self.hot ; .arch x64 ; cmp DWORD [rsp + ctx!(interrupt_pending)], 0);
        self.hot_jcc(5, slow);
        dynasm!(self.hot ; .arch x64 ; mov r11, rcx ; shl r11, 16 ; sar r11, 16 ; cmp r11, rcx);
        self.hot_jcc(5, slow);
        dynasm!(self.hot
            ; .arch x64
            ; mov r11d, r10d
            ; shr r11d, 9
            ; and r11d, 1
            ; mov [rsp + ctx!(interrupt_flag)], r11b
            ; mov BYTE [rsp + ctx!(access_flag)], 0
            ; mov DWORD [rsp + ctx!(system_flags)], flags::FIXED as i32
            ; mov r11d, r10d
            ; shr r11d, 11
            ; shl r10d, 8
            ; lea r10d, [r10 + r11]
            ; mov [rsp + ctx!(saved_flags)], r10w
        );
        self.change_level(3);
        dynasm!(self.hot ; .arch x64 ; mov r11, rcx);
        self.indirect_exit();
    }

    /// CPL, CS, SS, view and jump cache of the other level.
    fn change_level(&mut self, cpl: i32) {
        let level = cpl & 1;
        let view = ctx!(views) + if cpl == 3 { USER as i32 * 16 } else { 0 };
        // The selectors of CS and SS lie side by side.
        dynasm!(self.hot
            ; .arch x64
            ; mov DWORD [rsp + ctx!(cpl)], cpl
            ; mov r10d, [rsp + ctx!(level_selectors) + level * 4]
            ; mov [rsp + ctx!(selectors) + 2], r10d
            ; mov r10, [rsp + ctx!(jump_caches) + level * 8]
            ; mov [rsp + ctx!(jump_cache)], r10
            ; mov r15, [rsp + view]
            ; mov r14, [rsp + view + 8]
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

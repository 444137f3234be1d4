//! Accesses through a window (see [`crate::windows`]): the address is the guest's own, the instruction gets a GS prefix, and what is
//! checked is that the region around the address is one of the window's. Whether the page may be accessed the host's page tables tell.
//! In 32-bit code nothing is checked: another prefix cuts addresses to 32 bits, as the guest's mode does.

use super::access::{Keep, NEED_FS_GS, address16};
use super::shape::Memory;
use super::{Emitter, Pos, Target, Unfit};
use crate::block::Mode;
use crate::flags::FlagSet;
use crate::groups::{Key, Plan};
use crate::regs::{self, Place, R10, R11};
use crate::stubs::MissInfo;
use crate::windows::{REACH, REGION_SHIFT};
use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Instruction, Register};

/// Host register of guest RAX: AH and AL hold flags that are saved.
const RAX: u8 = 0;

/// Where host code finds bytes of the guest: behind a host register.
#[derive(Clone, Copy)]
pub(super) struct Spot {
    pub(super) base: u8,
    pub(super) disp: i32,
    /// The register holds an address of the guest.
    pub(super) window: bool,
}

impl Spot {
    /// What look-ups in tables leave.
    pub(super) const R11: Spot = Spot { base: R11, disp: 0, window: false };
}

/// In a window.
impl Memory {
    fn behind(base: u8, disp: i32) -> Memory {
        Memory { base: Some(base), index: None, scale: 1, disp }
    }

    /// Makes it the memory operand of `instr`, with addresses of 32 bits if `narrow`.
    pub(super) fn put(self, instr: &mut Instruction, narrow: bool) {
        let first = if narrow { Register::EAX } else { Register::RAX };
        let register = |r: Option<u8>| r.map_or(Register::None, |r| first + u32::from(r));
        instr.set_segment_prefix(Register::GS);
        instr.set_memory_base(register(self.base));
        instr.set_memory_index(register(self.index));
        instr.set_memory_index_scale(self.scale);
        let disp = if narrow { u64::from(self.disp as u32) } else { i64::from(self.disp) as u64 };
        instr.set_memory_displacement64(disp);
        let size = match self {
            Memory { base: None, .. } if narrow => 4,
            Memory { base: None, .. } => 8,
            Memory { disp: 0, .. } => 0,
            _ => 1,
        };
        instr.set_memory_displ_size(size);
    }
}

/// Whether an operand `disp` behind an address in a region of the window is harmless.
fn reaches(disp: i64) -> bool {
    disp.unsigned_abs() < REACH
}

impl Emitter {
    /// Whether the block has a window, if this access uses it or not.
    pub(super) fn has_window(&self) -> bool {
        self.mode.has(Mode::WINDOW)
    }

    /// Lets `access` use tables.
    pub(super) fn by_table<R>(&mut self, access: impl FnOnce(&mut Emitter) -> R) -> R {
        let window = std::mem::take(&mut self.window);
        let result = access(self);
        self.window = window;
        result
    }

    /// The next instruction accesses `at`.
    pub(super) fn through(&mut self, at: Spot) {
        const GS: u8 = 0x65;
        const ADDRESS_SIZE: u8 = 0x67;
        if at.window {
            self.hot.push(GS);
            if !self.code64 {
                self.hot.push(ADDRESS_SIZE);
            }
        }
    }

    /// [`Emitter::access_as`] through the window.
    pub(super) fn access_in_window(&mut self, mut ea: u8, info: u64, live: FlagSet) -> Spot {
        if ea == R10 {
            dynasm!(self.hot ; .arch x64 ; mov r11, r10);
            ea = R11;
        }
        self.check_access(ea, info, live);
        Spot { base: ea, disp: 0, window: true }
    }

    /// The memory operand of `instr`, checked unless a group covers it. It uses r11 at most.
    pub(super) fn operand_in_window(
        &mut self,
        instr: &Instruction,
        info: u64,
        live: FlagSet,
    ) -> Result<Memory, Unfit> {
        if !self.code64 {
            return self.operand_of_32(instr, info, live);
        }
        let (size, write) = (info as u32 & 0xFF, info & MissInfo::WRITE != 0);
        let covered = self.member(instr, size, write).is_some();
        let aligned = self.must_be_aligned_in_window(info);
        if let Some(operand) = self.plain_operand(instr).filter(|_| !aligned) {
            let Memory { base, index, disp, .. } = operand;
            match (base, index) {
                _ if covered => return Ok(self.loaded(operand)),
                (Some(_), None) if reaches(i64::from(disp)) => {
                    let operand = self.loaded(operand);
                    self.check_access(operand.base.unwrap_or(R11), info, live);
                    return Ok(operand);
                }
                _ => {}
            }
        }
        let near = self.near(instr);
        if let Some(at) = near.filter(|_| !self.movable)
            && let Ok(disp) = i32::try_from(at)
            && !aligned
        {
            return Ok(Memory { base: None, index: None, scale: 1, disp });
        }
        let ea = self.effective_address(instr, true)?;
        if near.is_none() && !covered || aligned {
            self.check_access(ea, info, live);
        }
        Ok(Memory::behind(ea, 0))
    }

    /// [`Self::operand_in_window`] of 32-bit code, in a flat segment.
    fn operand_of_32(&mut self, instr: &Instruction, info: u64, live: FlagSet) -> Result<Memory, Unfit> {
        let direct = !address16(instr) && !NEED_FS_GS.contains(&instr.memory_segment());
        if direct && !self.must_be_aligned_in_window(info) {
            // All registers that 32-bit code has are the host's.
            let [base, index] = [instr.memory_base(), instr.memory_index()]
                .map(|r| (r != Register::None).then(|| self.guest(regs::number(r), R11)));
            let scale = if index.is_none() { 1 } else { instr.memory_index_scale() };
            let disp = instr.memory_displacement64() as i32;
            return Ok(Memory { base, index, scale, disp });
        }
        let ea = self.effective_address(instr, true)?;
        let Spot { base, disp, .. } = self.access_in_window(ea, info, live);
        Ok(Memory::behind(base, disp))
    }

    /// Whether misaligned accesses of the kind `info` says leave for the interpreter: those that would not raise the guest's own fault.
    fn must_be_aligned_in_window(&self, info: u64) -> bool {
        info & 0xFF <= 8 && self.must_be_aligned(info)
    }

    /// The place of an operand, by a register and a constant: r11, if need be.
    pub(super) fn spot_of(&mut self, operand: Memory) -> Spot {
        match operand {
            Memory { base: Some(base), index: None, disp, .. } => Spot { base, disp, window: true },
            Memory { base, index, scale, disp } => {
                self.lea(R11, base, index, scale, disp, !self.code64);
                Spot { base: R11, disp: 0, window: true }
            }
        }
    }

    /// The memory operand as the guest has it, where the host can have it likewise: guest registers, of which the base may be in
    /// the context.
    fn plain_operand(&self, instr: &Instruction) -> Option<Memory> {
        let wide = |r: Register| r == Register::None || r.is_gpr64();
        let (base, index) = (instr.memory_base(), instr.memory_index());
        let flat = !NEED_FS_GS.contains(&instr.memory_segment());
        if !flat || !wide(base) || !wide(index) || base == Register::None && index == Register::None {
            return None;
        }
        let number = |r: Register| (r != Register::None).then(|| regs::number(r));
        let at_home = |r: u8| matches!(regs::place(r), Place::Home(_));
        if number(index).is_some_and(at_home) {
            return None;
        }
        let (scale, disp) = (instr.memory_index_scale(), instr.memory_displacement64() as i32);
        let scale = if index == Register::None { 1 } else { scale };
        Some(Memory { base: number(base), index: number(index), scale, disp })
    }

    /// `operand` of guest registers with host registers; the base may be loaded into r11.
    fn loaded(&mut self, operand: Memory) -> Memory {
        let base = operand.base.map(|r| self.guest(r, R11));
        let index = operand.index.map(|r| self.guest(r, R10));
        debug_assert_ne!(index, Some(R10), "an index in the context");
        Memory { base, index, ..operand }
    }

    /// The address of an operand that names no register, if it is so near the code that it needs no check: the code's own region is
    /// one of the window's.
    fn near(&self, instr: &Instruction) -> Option<u64> {
        let named = !matches!(instr.memory_base(), Register::None | Register::RIP)
            || instr.memory_index() != Register::None
            || NEED_FS_GS.contains(&instr.memory_segment());
        let relative = instr.memory_base() == Register::RIP;
        (!named).then(|| instr.memory_displacement64()).filter(|&at| self.is_near(at, relative))
    }

    /// Whether `at` is, and stays so should the code move; `relative` if it counts from RIP.
    fn is_near(&self, at: u64, relative: bool) -> bool {
        self.address >> 47 == 0
            && (relative || !self.movable)
            && reaches(at.wrapping_sub(self.address) as i64)
    }

    /// Leaves unless the address in host register `ea` lies in a region of the window, in 64-bit code, and is a multiple of the access's size where
    /// it must be. Uses r10 and, while flags are live, r9 or the context.
    fn check_access(&mut self, ea: u8, info: u64, live: FlagSet) {
        let keep = Self::keep(live);
        let aligned = self.must_be_aligned_in_window(info);
        if !self.code64 && !aligned {
            return;
        }
        if aligned && ea == RAX && keep == Keep::All {
            dynasm!(self.hot ; .arch x64 ; mov r11, rax);
            return self.check_in_register(R11, info, keep, aligned);
        }
        self.check_in_register(ea, info, keep, aligned);
    }

    fn check_in_register(&mut self, ea: u8, info: u64, keep: Keep, aligned: bool) {
        if self.code64 {
            self.check_and_admit(ea, info, keep);
        } else {
            Self::save(&mut self.hot, keep, self.r9_busy);
        }
        if aligned {
            let mask = (info & 0xFF) as i8 - 1;
            dynasm!(self.hot ; .arch x64 ; test Rb(ea), mask);
            let cold = self.cold_here();
            self.hot_jcc(5, cold);
            Self::restore(&mut self.cold, keep, self.r9_busy);
            self.cold_interpret(self.rip);
        }
        Self::restore(&mut self.hot, keep, self.r9_busy);
    }

    /// Saves the flags of `keep`, and goes on where `ea` lies in a region of the window, or in one that can be made one.
    fn check_and_admit(&mut self, ea: u8, info: u64, keep: Keep) {
        let retry = self.hot_here();
        self.check_region(ea, keep);
        let fail = self.cold_admit(ea, info, keep);
        if ea == R11 {
            dynasm!(self.cold ; .arch x64 ; mov r11, r10);
        }
        self.cold_jmp(Target::Here(retry));
        self.cold_land(fail);
        self.cold_interpret(self.rip);
    }

    /// Saves the flags of `keep` and leaves for cold code, which begins here, unless `ea` lies in a region of the window.
    fn check_region(&mut self, ea: u8, keep: Keep) {
        const TABLE: i32 = -(REGION_SHIFT as i32);
        dynasm!(self.hot ; .arch x64 ; shrx r10, Rq(ea), r14);
        if keep == Keep::All {
            // Beyond the lower half the table faults: before flags are in RAX.
            dynasm!(self.hot ; .arch x64 ; movzx r10d, BYTE [r14 + r10 + TABLE]);
            Self::save(&mut self.hot, keep, self.r9_busy);
            dynasm!(self.hot ; .arch x64 ; test r10d, r10d);
        } else {
            Self::save(&mut self.hot, keep, self.r9_busy);
            dynasm!(self.hot ; .arch x64 ; cmp BYTE [r14 + r10 + TABLE], 0);
        }
        let cold = self.cold_here();
        self.hot_jcc(4, cold);
    }

    /// Cold code that makes the region of `ea` one of the window's, with flags as they were; goes on, with the address in r10, if it
    /// is one now. Returns the jump that is taken else.
    fn cold_admit(&mut self, ea: u8, info: u64, keep: Keep) -> Pos {
        Self::restore(&mut self.cold, keep, self.r9_busy);
        dynasm!(self.cold ; .arch x64 ; mov r10, Rq(ea) ; mov r11d, (info | MissInfo::REGION) as i32);
        self.cold.push(0xE8);
        self.cold_rel32(Target::Cache(self.stubs.miss));
        self.cold.push(0xE9);
        self.cold_site()
    }

    /// [`Emitter::group`] in a window: where one of its addresses lies in a region of the window all may be used.
    pub(super) fn group_in_window(&mut self, plan: &Plan, live: FlagSet) {
        self.begin_group(plan);
        let Key { base, index, scale, relative } = plan.key;
        let keep = Self::keep(live);
        let retry = self.hot_here();
        let ea = match (base, index) {
            (None, None) => {
                let at = plan.anchor.wrapping_add(i64::from(plan.lo) as u64);
                if self.is_near(at, relative) {
                    return;
                }
                self.fixed(R11, at, relative);
                R11
            }
            (Some(base), None) if reaches(i64::from(plan.lo)) && reaches(i64::from(plan.hi)) => {
                self.guest(base, R11)
            }
            _ => {
                let base = base.map(|r| self.guest(r, R10));
                let index = index.map(|r| self.guest(r, R11));
                self.lea(R11, base, index, u32::from(scale), plan.lo, false);
                R11
            }
        };
        self.check_region(ea, keep);
        let fail = self.cold_admit(ea, 1 | MissInfo::SOFT, keep);
        self.cold_jmp(Target::Here(retry));
        self.cold_land(fail);
        self.ungrouped_exit();
        Self::restore(&mut self.hot, keep, self.r9_busy);
    }
}

//! Accesses through a window (see [`crate::windows`]): the address is the guest's own, the instruction gets a GS prefix, and what is
//! probed is that the region around the address is one of the window's. Whether the page may be accessed the host's page tables tell.
//! In 32-bit code nothing is probed: another prefix cuts addresses to 32 bits, as the guest's mode does.

use super::access::{Keep, NEED_FS_GS, address16};
use super::shape::Memory;
use super::{Emitter, Unfit};
use crate::block::Mode;
use crate::classify::Form;
use crate::flags::FlagSet;
use crate::groups::Key;
use crate::regs::{self, HOST_RSP, Place, R10, R11};
use crate::windows::{PROBE_SHIFT, REACH, STACK_REACH};
use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Instruction, OpAccess, Register};

/// Host register of guest RAX: AH and AL hold flags that are saved.
const RAX: u8 = 0;
/// Guest RSP.
const RSP: u8 = 4;
/// An operand closer to its base register than this is taken for a field of what the register points to, so that the register is
/// probed. One with a larger displacement may be an element of a table there, with an index in the register, which is no address.
const FIELD: u32 = 1 << 16;

/// Where host code finds bytes of the guest: behind a host register.
#[derive(Clone, Copy)]
pub(super) struct Spot {
    pub(super) base: u8,
    pub(super) disp: i32,
    /// The register holds an address of the guest.
    pub(super) window: bool,
}

/// An address that was probed in the block.
pub(super) struct Probed {
    pub(super) key: Key,
    /// How far behind the registers as they are now.
    pub(super) at: i32,
}

/// What is known of where RSP is: `at` behind it is an address in an admitted region.
#[derive(Clone, Copy)]
pub(super) struct Stack {
    at: i32,
    /// It may be up to [`STACK_REACH`] from one: RSP as it was when the block was entered.
    entry: bool,
}

impl Stack {
    pub(super) const ENTRY: Stack = Stack { at: 0, entry: true };

    /// Whether the next block may be entered with RSP as it is.
    fn is_settled(self) -> bool {
        if self.entry { self.at == 0 } else { u64::from(self.at.unsigned_abs()) <= STACK_REACH }
    }
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
        self.probe(ea);
        self.check_alignment(ea, info, live);
        Spot { base: ea, disp: 0, window: true }
    }

    /// The memory operand of `instr`, probed if it must be. It uses r10, and r11 at most.
    pub(super) fn operand_in_window(
        &mut self,
        instr: &Instruction,
        info: u64,
        live: FlagSet,
    ) -> Result<Memory, Unfit> {
        if !self.code64 {
            return self.operand_of_32(instr, info, live);
        }
        let aligned = self.must_be_aligned_in_window(info);
        if let Some(operand) = self.plain_operand(instr).filter(|_| !aligned) {
            return Ok(self.probed_operand(operand));
        }
        let near = self.near(instr);
        if let Some(at) = near.filter(|_| !self.movable)
            && let Ok(disp) = i32::try_from(at)
            && !aligned
        {
            return Ok(Memory { base: None, index: None, scale: 1, disp });
        }
        let ea = self.effective_address(instr, true)?;
        if near.is_none() {
            self.probe(ea);
        }
        self.check_alignment(ea, info, live);
        Ok(Memory::behind(ea, 0))
    }

    /// An operand of guest registers with host registers, probed if none close to it was.
    fn probed_operand(&mut self, operand: Memory) -> Memory {
        let Memory { base, index, scale, disp } = operand;
        let key = Key { base, index, scale: scale as u8, relative: false };
        if self.is_probed(key, disp) {
            return self.loaded(operand);
        }
        let operand = self.loaded(operand);
        let Memory { base: Some(base), index: None, .. } = operand else {
            self.lea(R11, operand.base, operand.index, scale, disp, false);
            return self.probed_behind(R11, key, disp);
        };
        if disp.unsigned_abs() >= FIELD {
            self.lea(R11, Some(base), None, 1, disp, false);
            return self.probed_behind(R11, key, disp);
        }
        self.probe(base);
        self.passed(key, 0);
        operand
    }

    /// Probes host register `ea`, which is `disp` behind the registers of `key`.
    fn probed_behind(&mut self, ea: u8, key: Key, disp: i32) -> Memory {
        self.probe(ea);
        self.passed(key, disp);
        Memory::behind(ea, 0)
    }

    /// Probes guest register `register`, one with a host register of its own, for an operand `disp` behind it, if need be.
    pub(super) fn probe_register(&mut self, register: u8, disp: i32) {
        let key = Key { base: Some(register), index: None, scale: 1, relative: false };
        if !self.is_probed(key, disp) {
            let ea = self.guest(register, R11);
            self.probe(ea);
            self.passed(key, 0);
        }
    }

    /// The same for RSP, which is `pending` behind its host register.
    pub(super) fn probe_rsp(&mut self, pending: i32, disp: i32) {
        if !self.is_probed(Key::STACK, disp) {
            self.probe(HOST_RSP);
            self.passed(Key::STACK, -pending);
        }
    }

    /// The address `at` behind the registers of `key` was probed.
    fn passed(&mut self, key: Key, at: i32) {
        match &mut self.stack {
            stack if key == Key::STACK => *stack = Some(Stack { at, entry: false }),
            _ => self.probed.push(Probed { key, at }),
        }
    }

    /// Guest `register` changed by `n`.
    pub(super) fn stack_adjusted(&mut self, register: u8, n: i32) {
        if let Some(stack) = self.stack.as_mut().filter(|_| register == RSP) {
            stack.at = stack.at.saturating_sub(n);
        }
    }

    /// A word `disp` behind RSP is accessed through the window, which shows pages of admitted regions only.
    pub(super) fn accessed_stack(&mut self, disp: i32) {
        if self.code64 {
            self.stack = Some(Stack { at: disp, entry: false });
        }
    }

    /// Likewise by `instr`, if it surely accesses memory behind RSP.
    pub(super) fn accessed_stack_by(&mut self, instr: &Instruction, form: &Form) {
        use OpAccess as A;
        let plain = instr.memory_base() == Register::RSP
            && instr.memory_index() == Register::None
            && !NEED_FS_GS.contains(&instr.memory_segment());
        let surely = |n: u8| matches!(form.access[usize::from(n)], A::Read | A::Write | A::ReadWrite);
        if self.window && self.code64 && plain && form.memory.is_some_and(surely) {
            self.accessed_stack(instr.memory_displacement64() as i32);
        }
    }

    /// Behind this point blocks may be entered, which expect RSP where it is known to be.
    pub(super) fn settle_stack(&mut self) {
        let probing = self.window && self.code64;
        if probing && !self.stack.is_some_and(Stack::is_settled) {
            debug_assert_eq!(self.rsp_pending, 0);
            self.probe(HOST_RSP);
            self.passed(Key::STACK, 0);
        }
    }

    /// Faults unless the address in host register `ea` lies in a region of the window, in 64-bit code. Uses r10.
    fn probe(&mut self, ea: u8) {
        const PROBES: i32 = -(PROBE_SHIFT as i32);
        if self.code64 {
            dynasm!(self.hot ; .arch x64 ; shrx r10, Rq(ea), r14 ; movzx r10d, BYTE [r14 + r10 + PROBES]);
        }
    }

    /// Whether what is `disp` behind the registers of `key` is close enough to an address that was probed.
    fn is_probed(&self, key: Key, disp: i32) -> bool {
        let close = |at: i32| reaches(i64::from(disp) - i64::from(at));
        match self.stack {
            _ if !self.code64 => true,
            stack if key == Key::STACK => stack.is_some_and(|stack| close(stack.at)),
            _ => self.probed.iter().any(|p| p.key == key && close(p.at)),
        }
    }

    /// An instruction of the block wrote some guest registers, one bit each.
    pub(crate) fn forget_probes(&mut self, registers: u16) {
        if registers != 0 {
            self.probed.retain(|p| !p.key.names_any(registers));
        }
        if registers & 1 << RSP != 0 {
            self.stack = None;
        }
    }

    /// [`Self::operand_in_window`] of 32-bit code, in a flat segment.
    fn operand_of_32(&mut self, instr: &Instruction, info: u64, live: FlagSet) -> Result<Memory, Unfit> {
        if let Some(operand) = self.direct_operand_of_32(instr)
            && !self.must_be_aligned_in_window(info)
        {
            return Ok(self.loaded(operand));
        }
        let ea = self.effective_address(instr, true)?;
        let Spot { base, disp, .. } = self.access_in_window(ea, info, live);
        Ok(Memory::behind(base, disp))
    }

    /// The memory operand of 32-bit code as it is, of guest registers: all that it has are the host's.
    fn direct_operand_of_32(&self, instr: &Instruction) -> Option<Memory> {
        let direct = !address16(instr) && !NEED_FS_GS.contains(&instr.memory_segment());
        let [base, index] = [instr.memory_base(), instr.memory_index()]
            .map(|r| (direct && r != Register::None).then(|| regs::number(r)));
        let scale = if index.is_none() { 1 } else { instr.memory_index_scale() };
        let disp = instr.memory_displacement64() as i32;
        direct.then_some(Memory { base, index, scale, disp })
    }

    /// PREFETCHh and PREFETCHW: through a window as the guest has them, where that takes no more than their own operand. They neither
    /// fault nor say what is there, so that nothing is probed. Where look-ups would be needed they are left out.
    pub(crate) fn prefetch(&mut self, instr: &Instruction) {
        let mut new = *instr;
        if !self.window || super::normalize(&mut new).is_err() {
            return;
        }
        let operand = match self.code64 {
            true => self.plain_operand(instr),
            false => self.direct_operand_of_32(instr),
        };
        if let Some(operand) = operand {
            self.loaded(operand).put(&mut new, !self.code64);
            // What cannot be encoded was none worth having.
            let _ = self.encode(&new);
        }
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

    /// Leaves unless the address in host register `ea` is a multiple of the access's size where it must be. Uses r9 or the context while
    /// flags are live.
    fn check_alignment(&mut self, mut ea: u8, info: u64, live: FlagSet) {
        if !self.must_be_aligned_in_window(info) {
            return;
        }
        let keep = Self::keep(live);
        if ea == RAX && keep == Keep::All {
            dynasm!(self.hot ; .arch x64 ; mov r11, rax);
            ea = R11;
        }
        Self::save(&mut self.hot, keep, self.r9_busy);
        let mask = (info & 0xFF) as i8 - 1;
        dynasm!(self.hot ; .arch x64 ; test Rb(ea), mask);
        let cold = self.cold_here();
        self.hot_jcc(5, cold);
        Self::restore(&mut self.cold, keep, self.r9_busy);
        self.cold_interpret(self.rip);
        Self::restore(&mut self.hot, keep, self.r9_busy);
    }
}

//! Memory operands: effective addresses (SDM vol. 1, 3.7.5), and the delta-table access that turns a linear address
//! into a host address or leaves for the miss stub.

use super::segment::Bound;
use super::shape::{self, Memory};
use super::window::Spot;
use super::{Emitter, Pos, Target, Unfit, load};
use crate::assembler::SimpleAssembler;
use crate::context::ctx;
use crate::delta::{READ_BIAS, WRITE_BIAS};
use crate::flags::FlagSet;
use crate::regs::{self, Place, R10, R11, READ_BASE, WRITE_BASE};
use crate::stubs::MissInfo;
use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Instruction, OpKind, Register};

pub(super) const NEED_FS_GS: [Register; 2] = [Register::FS, Register::GS];

/// Whether the memory operand of an instruction outside 64-bit code has 16-bit address size.
pub(super) fn address16(instr: &Instruction) -> bool {
    let (base, index) = (instr.memory_base(), instr.memory_index());
    match (base, index) {
        (Register::None, Register::None) => instr.memory_displ_size() == 2,
        (Register::None, r) | (r, _) => r.size() == 2,
    }
}

/// Whether the memory operand has an address size of 32 bits.
fn is_narrow(instr: &Instruction) -> bool {
    [instr.memory_base(), instr.memory_index()].iter().any(|r| *r != Register::None && r.size() == 4)
}

/// The address of an operand that names no register, in a flat segment.
fn fixed_address(instr: &Instruction) -> Option<u64> {
    let named = !matches!(instr.memory_base(), Register::None | Register::RIP | Register::EIP)
        || instr.memory_index() != Register::None;
    (!named && !NEED_FS_GS.contains(&instr.memory_segment())).then(|| instr.memory_displacement64())
}

/// Where the entry of a fixed address is in a delta table: its displacement from the base in host register `base`.
#[derive(Clone, Copy)]
pub(super) struct FixedEntry {
    base: u8,
    disp: i32,
}

/// The entry for `size` bytes on one page of the first 4 GiB.
pub(super) fn fixed_entry(ea: u64, size: u64, write: bool) -> Option<FixedEntry> {
    let page = u32::try_from(ea).ok()? >> 12;
    let (base, bias) = if write { (WRITE_BASE, WRITE_BIAS) } else { (READ_BASE, READ_BIAS) };
    let within = (ea & 0xFFF) + size <= 4096;
    within.then_some(FixedEntry { base, disp: page as i32 * 8 - bias as i32 })
}

/// An access to a linear address.
#[derive(Clone, Copy)]
pub(super) struct Access {
    /// Size and kind (see [`MissInfo`]).
    pub(super) info: u64,
    /// Flags to keep.
    pub(super) keep: Keep,
    /// They are saved already.
    pub(super) saved: bool,
    /// Where misaligned accesses must end.
    pub(super) bound: Option<Bound>,
}

/// How live flags are kept over a check that destroys them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    Nothing,
    Carry,
    Zero,
    All,
}

impl Emitter {
    /// Makes the memory operand accessible for the kind `info` says, as [`Self::access`] does.
    pub(super) fn address(&mut self, instr: &Instruction, info: u64, live: FlagSet) -> Result<Spot, Unfit> {
        let segment = instr.memory_segment();
        let flat = self.code64 || self.is_flat(segment);
        if self.window && flat {
            let operand = self.operand_in_window(instr, info, live)?;
            return Ok(self.spot_of(operand));
        }
        if flat {
            let moves = self.movable && matches!(instr.memory_base(), Register::RIP | Register::EIP);
            if !moves
                && !self.has_window()
                && let Some(ea) = fixed_address(instr)
                && self.access_fixed(ea, info, live)
            {
                return Ok(Spot::R11);
            }
            let ea = self.effective_address(instr, true)?;
            return Ok(self.access_as(ea, info, live));
        }
        let ea = self.effective_address(instr, false)?;
        if ea != R10 {
            dynasm!(self.hot ; .arch x64 ; mov r10d, Rd(ea));
        }
        Ok(self.access_segment(segment, address16(instr), info, live))
    }

    /// [`Self::access_as`] at a fixed address; false if that takes the usual way.
    fn access_fixed(&mut self, ea: u64, info: u64, live: FlagSet) -> bool {
        let (size, write) = (info & 0xFF, info & MissInfo::WRITE != 0);
        let Some(entry) = fixed_entry(ea, size, write) else { return false };
        if self.must_be_aligned(info) && ea & (size - 1) != 0 {
            return false;
        }
        let keep = Self::keep(live);
        let retry = self.hot_here();
        self.translate_fixed(R11, ea, entry, keep == Keep::Nothing);
        Self::save(&mut self.hot, keep, self.r9_busy);
        if keep != Keep::Nothing {
            dynasm!(self.hot ; .arch x64 ; test r11, r11);
        }
        let cold = self.cold_here();
        self.hot_jcc(8, cold);
        Self::constant(&mut self.cold, R10, ea);
        self.cold_miss(R10, Access { info, keep, saved: false, bound: None }, retry);
        Self::restore(&mut self.hot, keep, self.r9_busy);
        true
    }

    /// The host address of fixed address `ea` in `place`. Uses r10; keeps flags unless they are `dead`.
    pub(super) fn translate_fixed(&mut self, place: u8, ea: u64, entry: FixedEntry, dead: bool) {
        Self::constant(&mut self.hot, place, ea);
        let FixedEntry { base, disp } = entry;
        if dead {
            dynasm!(self.hot ; .arch x64 ; add Rq(place), [Rq(base) + disp]);
        } else {
            dynasm!(self.hot ; .arch x64 ; mov r10, [Rq(base) + disp] ; lea Rq(place), [Rq(place) + r10]);
        }
    }

    /// Effective address of an operand with 16-bit address size, in r10.
    fn effective_address_16(&mut self, instr: &Instruction) -> u8 {
        let register = |r: Register| (r != Register::None).then(|| regs::number(r));
        let (base, index) = (register(instr.memory_base()), register(instr.memory_index()));
        let disp = instr.memory_displacement64() as i16;
        match (base, index, disp) {
            (None, None, _) => Self::constant(&mut self.hot, R10, u64::from(disp as u16)),
            (Some(r), None, 0) => dynasm!(self.hot ; .arch x64 ; movzx r10d, Rw(r)),
            _ => {
                self.lea(R10, base, index, 1, i32::from(disp), true);
                dynasm!(self.hot ; .arch x64 ; movzx r10d, r10w);
            }
        }
        R10
    }

    /// Computes the linear address of the memory operand, or its offset in the segment; returns the host register that
    /// holds it.
    pub(super) fn effective_address(&mut self, instr: &Instruction, linear: bool) -> Result<u8, Unfit> {
        if !self.code64 && address16(instr) {
            return Ok(self.effective_address_16(instr));
        }
        self.check_registers(instr)?;
        let (base, index) = (instr.memory_base(), instr.memory_index());
        let narrow = is_narrow(instr);
        let segment = instr.memory_segment();
        let based = linear && NEED_FS_GS.contains(&segment);
        let disp = instr.memory_displacement64();
        let b = (!matches!(base, Register::None | Register::RIP | Register::EIP)).then(|| regs::number(base));
        let x = (index != Register::None).then(|| regs::number(index));
        if based {
            return Ok(self.based_address(instr, b, x));
        }
        if b.is_none() && x.is_none() {
            self.fixed(R11, disp, base == Register::RIP);
            return Ok(R11);
        }
        if let (Some(b), None, 0, false) = (b, x, disp, narrow && self.code64)
            && let Place::Host(h) = regs::place(b)
        {
            return Ok(h);
        }
        let b = b.map(|b| self.guest(b, R11));
        let x = x.map(|x| self.guest(x, R10));
        let loaded = (b, x, disp) == (Some(R11), None, 0) && !(narrow && self.code64);
        if !loaded {
            self.lea(R11, b, x, instr.memory_index_scale(), disp as i32, narrow);
        }
        Ok(R11)
    }

    /// The linear address of an operand in FS or GS, of guest registers `b` and `x`, in r11.
    fn based_address(&mut self, instr: &Instruction, b: Option<u8>, x: Option<u8>) -> u8 {
        let at = ctx!(seg_base) + if instr.memory_segment() == Register::FS { 32 } else { 40 };
        let disp = instr.memory_displacement64();
        let (code64, relative) = (self.code64, instr.memory_base() == Register::RIP);
        let load_base = |ops: &mut SimpleAssembler, to| load(ops, to, at);
        match (b, x, i32::try_from(disp as i64)) {
            (None, None, Ok(0)) if !relative => load_base(&mut self.hot, R11),
            (None, None, Ok(disp)) if !relative => {
                load_base(&mut self.hot, R11);
                self.lea(R11, Some(R11), None, 1, disp, !code64);
            }
            (Some(b), None, Ok(disp)) if !(is_narrow(instr) && code64) => {
                let b = self.guest(b, R11);
                load_base(&mut self.hot, R10);
                self.lea(R11, Some(b), Some(R10), 1, disp, !code64);
            }
            (None, None, _) => {
                self.fixed(R11, disp, relative);
                load_base(&mut self.hot, R10);
                self.lea(R11, Some(R11), Some(R10), 1, 0, !code64);
            }
            _ => {
                let b = b.map(|b| self.guest(b, R11));
                let x = x.map(|x| self.guest(x, R10));
                self.lea(R11, b, x, instr.memory_index_scale(), disp as i32, is_narrow(instr));
                load_base(&mut self.hot, R10);
                self.lea(R11, Some(R11), Some(R10), 1, 0, !code64);
            }
        }
        R11
    }

    /// Refuses what is not made of registers of the code's size, or of 32 bits.
    fn check_registers(&self, instr: &Instruction) -> Result<(), Unfit> {
        let wanted = if self.code64 { 8 } else { 4 };
        let fits = |r: Register| {
            matches!(r, Register::None | Register::RIP) || r.size() == wanted || self.code64 && r.size() == 4
        };
        // The lower half of an address cannot be moved.
        if self.movable && instr.memory_base() == Register::EIP {
            return Err(Unfit);
        }
        if fits(instr.memory_base()) && fits(instr.memory_index()) { Ok(()) } else { Err(Unfit) }
    }

    pub(super) fn lea(
        &mut self,
        dst: u8,
        base: Option<u8>,
        index: Option<u8>,
        scale: u32,
        disp: i32,
        narrow: bool,
    ) {
        shape::lea(&mut self.hot, dst, Memory { base, index, scale, disp }, narrow);
    }

    /// LEA.
    pub(crate) fn lea_instruction(&mut self, instr: &Instruction) -> Result<(), Unfit> {
        let dst = instr.op0_register();
        let n = regs::number(dst);
        let size = dst.size();
        let (base, index) = (instr.memory_base(), instr.memory_index());
        let constant = matches!(base, Register::RIP | Register::EIP)
            || base == Register::None && index == Register::None;
        if size >= 4 && !constant && (self.code64 || !address16(instr)) {
            self.check_registers(instr)?;
            let to = if let Place::Host(h) = regs::place(n) { h } else { R10 };
            let b = (base != Register::None).then(|| self.guest(regs::number(base), R10));
            let x = (index != Register::None).then(|| self.guest(regs::number(index), R11));
            let disp = instr.memory_displacement64() as i32;
            self.lea(to, b, x, instr.memory_index_scale(), disp, size == 4 || is_narrow(instr));
            self.set_guest(n, to);
            return Ok(());
        }
        if size >= 4 && constant && self.code64 && (!self.movable || size == 8 && base == Register::RIP) {
            let disp = instr.memory_displacement64();
            let to = if let Place::Host(h) = regs::place(n) { h } else { R10 };
            self.hot_address(to, if size == 8 { disp } else { disp & 0xFFFF_FFFF });
            self.set_guest(n, to);
            return Ok(());
        }
        let ea = self.effective_address(instr, false)?;
        let Place::Host(h) = regs::place(n) else {
            return match size {
                8 => {
                    self.set_guest(n, ea);
                    Ok(())
                }
                4 => {
                    dynasm!(self.hot ; .arch x64 ; mov r10d, Rd(ea));
                    self.set_guest(n, R10);
                    Ok(())
                }
                _ => Err(Unfit),
            };
        };
        match size {
            8 => dynasm!(self.hot ; .arch x64 ; mov Rq(h), Rq(ea)),
            4 => dynasm!(self.hot ; .arch x64 ; mov Rd(h), Rd(ea)),
            _ => dynasm!(self.hot ; .arch x64 ; mov Rw(h), Rw(ea)),
        }
        Ok(())
    }

    pub(super) fn keep(live: FlagSet) -> Keep {
        if live.is_empty() {
            Keep::Nothing
        } else if live.within(FlagSet::CF) {
            Keep::Carry
        } else if live.within(FlagSet::ZF) {
            Keep::Zero
        } else {
            Keep::All
        }
    }

    /// Saves the flags of `keep`, in r9 or, while a group owns it, in the context.
    pub(super) fn save(ops: &mut SimpleAssembler, keep: Keep, grouped: bool) {
        let tmp = ctx!(tmp) + 8;
        match keep {
            Keep::Nothing => {}
            Keep::Carry if grouped => dynasm!(ops ; .arch x64 ; setb [rsp + tmp]),
            Keep::Zero if grouped => dynasm!(ops ; .arch x64 ; setz [rsp + tmp]),
            Keep::All if grouped => dynasm!(ops ; .arch x64 ; mov [rsp + tmp], rax ; lahf ; seto al),
            Keep::Carry => dynasm!(ops ; .arch x64 ; setb r9b),
            Keep::Zero => dynasm!(ops ; .arch x64 ; setz r9b),
            Keep::All => dynasm!(ops ; .arch x64 ; mov r9, rax ; lahf ; seto al),
        }
    }

    pub(super) fn restore(ops: &mut SimpleAssembler, keep: Keep, grouped: bool) {
        let tmp = ctx!(tmp) + 8;
        match keep {
            Keep::Nothing => {}
            Keep::Carry if grouped => dynasm!(ops ; .arch x64 ; add BYTE [rsp + tmp], -1),
            Keep::Zero if grouped => dynasm!(ops ; .arch x64 ; cmp BYTE [rsp + tmp], 1),
            Keep::All if grouped => dynasm!(ops ; .arch x64 ; add al, 127 ; sahf ; mov rax, [rsp + tmp]),
            Keep::Carry => dynasm!(ops ; .arch x64 ; add r9b, -1),
            Keep::Zero => dynasm!(ops ; .arch x64 ; cmp r9b, 1),
            Keep::All => dynasm!(ops ; .arch x64 ; add al, 127 ; sahf ; mov rax, r9),
        }
    }

    /// Makes `size` bytes at the linear address in host register `ea`, best r11, accessible: by table at a host address in r11,
    /// in a window where `ea` says; keeps `live`. Uses r9 (while flags are live and no group owns it) and may overwrite r10.
    pub(super) fn access(&mut self, ea: u8, size: u32, write: bool, live: FlagSet) -> Spot {
        self.access_as(ea, MissInfo::of(size, write), live)
    }

    /// [`Self::access`] of the kind `info` says.
    pub(super) fn access_as(&mut self, ea: u8, info: u64, live: FlagSet) -> Spot {
        if self.window {
            return self.access_in_window(ea, info, live);
        }
        self.access_linear(ea, Access { info, keep: Self::keep(live), saved: false, bound: None });
        Spot::R11
    }

    /// [`Self::access`] by table, with the flags saved already if `access.saved`, and a limit to look at if the access is misaligned.
    pub(super) fn access_linear(&mut self, ea: u8, access: Access) {
        let Access { info, keep, saved, bound } = access;
        let (size, write) = (info as u32 & 0xFF, info & MissInfo::WRITE != 0);
        let retry = self.hot_here();
        let dead = self.is_dead(keep, saved);
        if ea == R11 {
            self.translate(R11, write, dead);
        } else {
            self.index(R11, ea, dead);
            self.load_delta(R11, R11, write);
            if dead {
                dynasm!(self.hot ; .arch x64 ; add r11, Rq(ea));
            } else {
                dynasm!(self.hot ; .arch x64 ; lea r11, [r11 + Rq(ea)]);
            }
        }
        if !saved {
            Self::save(&mut self.hot, keep, self.r9_busy);
        }
        let last = size as i32 - 1;
        match size {
            1 => {
                if !dead {
                    dynasm!(self.hot ; .arch x64 ; test r11, r11);
                }
                let cold = self.cold_here();
                self.hot_jcc(8, cold);
                self.cold_miss(ea, access, retry);
            }
            // Misaligned ones of these are the interpreter's: they raise #GP, or would be punished by the host.
            _ if self.must_be_aligned(info) => {
                let mask = size as i8 - 1;
                dynasm!(self.hot ; .arch x64 ; test r11b, mask);
                let cold = self.cold_here();
                self.hot_jcc(5, cold);
                dynasm!(self.cold ; .arch x64 ; test r11, r11);
                let miss = self.cold_js(false);
                Self::restore(&mut self.cold, keep, self.r9_busy);
                self.cold_interpret(self.rip);
                if let Err(site) = miss {
                    self.cold_land(site);
                }
                self.cold_miss(ea, access, retry);
            }
            2..=10 => {
                let mask = size.next_power_of_two() as i8 - 1;
                dynasm!(self.hot ; .arch x64 ; test r11b, mask);
                let cold = self.cold_here();
                self.hot_jcc(5, cold);
                let back = self.hot_here();
                // Unaligned but inside the page is common: back to the access unless it is poison or crosses. EA may
                // be overwritten now: an access that crosses goes to the interpreter.
                dynasm!(self.cold ; .arch x64 ; test r11, r11);
                let miss = self.cold_js(bound.is_none());
                let outside = bound.map(|b| self.cold_check_bound(b, last));
                dynasm!(self.cold ; .arch x64 ; lea r10d, [r11 + last] ; xor r10d, r11d ; test r10d, !0xFFF);
                self.cold_jcc(4, back);
                if let Some(site) = outside {
                    self.cold_land(site);
                }
                Self::restore(&mut self.cold, keep, self.r9_busy);
                self.cold_interpret(self.rip);
                match miss {
                    Ok(short) => self.cold.ops[short] = (self.cold.ops.len() - short - 1) as u8,
                    Err(site) => self.cold_land(site),
                }
                self.cold_miss(ea, access, retry);
            }
            _ => {
                // Vectors are seldom aligned: tell poison by its sign, then whether the access leaves the page.
                if !dead {
                    dynasm!(self.hot ; .arch x64 ; test r11, r11);
                }
                let cold = self.cold_here();
                self.hot_jcc(8, cold);
                self.cold_miss(ea, access, retry);
                dynasm!(self.hot ; .arch x64 ; lea r10d, [r11 + last] ; xor r10d, r11d ; test r10d, !0xFFF);
                let cross = self.cold_here();
                self.hot_jcc(5, cross);
                Self::restore(&mut self.cold, keep, self.r9_busy);
                self.cold_interpret(self.rip);
            }
        }
        Self::restore(&mut self.hot, keep, self.r9_busy);
    }

    /// Whether a look-up in a table may change flags.
    fn is_dead(&self, keep: Keep, saved: bool) -> bool {
        // Look-ups that may have BEXTR's control in r14.
        (saved || keep == Keep::Nothing) && !self.has_window()
    }

    /// Whether misaligned accesses of the kind `info` says leave for the interpreter, wherever they lie.
    pub(super) fn must_be_aligned(&self, info: u64) -> bool {
        let (size, kind) = (info & 0xFF, |bit| info & bit != 0);
        size >= 16 && kind(MissInfo::ALIGNED) || size <= 8 && kind(MissInfo::LOCKED) && self.splits_are_dear
    }

    /// The address in `place` becomes its host address; r10 is what [`Self::cold_undo`] needs. Keeps flags unless they are `dead`.
    pub(super) fn translate(&mut self, place: u8, write: bool, dead: bool) {
        self.index(R10, place, dead);
        match (dead, write) {
            (true, true) => {
                dynasm!(self.hot ; .arch x64 ; add Rq(place), [r14 + r10 * 8 - WRITE_BIAS as i32])
            }
            (true, false) => {
                dynasm!(self.hot ; .arch x64 ; add Rq(place), [BYTE r15 + r10 * 8 - READ_BIAS as i8]);
            }
            (false, _) => {
                self.load_delta(R10, R10, write);
                dynasm!(self.hot ; .arch x64 ; lea Rq(place), [Rq(place) + r10]);
            }
        }
    }

    /// In cold code, where nothing else happened since: takes [`Self::translate`] back; the address is in r10, too. Changes flags.
    pub(super) fn cold_undo(&mut self, place: u8, write: bool, dead: bool) {
        match (dead, write) {
            (true, true) => {
                dynasm!(self.cold ; .arch x64 ; sub Rq(place), [r14 + r10 * 8 - WRITE_BIAS as i32]);
            }
            (true, false) => {
                dynasm!(self.cold ; .arch x64 ; sub Rq(place), [BYTE r15 + r10 * 8 - READ_BIAS as i8]);
            }
            (false, _) => dynasm!(self.cold ; .arch x64 ; sub Rq(place), r10),
        }
        dynasm!(self.cold ; .arch x64 ; mov r10, Rq(place));
    }

    /// Bits 12 to 47 of the address in `ea`: by BEXTR with the write base as its control, or without touching flags.
    fn index(&mut self, to: u8, ea: u8, dead: bool) {
        if dead {
            dynasm!(self.hot ; .arch x64 ; bextr Rq(to), Rq(ea), r14);
        } else {
            dynasm!(self.hot ; .arch x64 ; rorx Rq(to), Rq(ea), 48 ; shrx Rq(to), Rq(to), r15);
        }
    }

    /// The entry of the delta table with the index in `index`.
    fn load_delta(&mut self, to: u8, index: u8, write: bool) {
        if write && self.has_window() {
            dynasm!(self.hot
                ; .arch x64
                ; mov r14, [rsp + ctx!(write_table)]
                ; mov Rq(to), [r14 + Rq(index) * 8 - WRITE_BIAS as i32]
                ; mov r14, [rsp + ctx!(window_probes)]
            );
        } else if write {
            dynasm!(self.hot ; .arch x64 ; mov Rq(to), [r14 + Rq(index) * 8 - WRITE_BIAS as i32]);
        } else {
            dynasm!(self.hot ; .arch x64 ; mov Rq(to), [BYTE r15 + Rq(index) * 8 - READ_BIAS as i8]);
        }
    }

    /// JS in cold code: the position of its displacement, of one byte if `short`.
    fn cold_js(&mut self, short: bool) -> Result<usize, Pos> {
        if short {
            self.cold.push(0x78);
            self.cold.push(0);
            return Ok(self.cold.ops.len() - 1);
        }
        self.cold.push(0x0F);
        self.cold.push(0x88);
        Err(self.cold_site())
    }

    /// Cold code of a poisoned access: fills the table and tries again, or leaves to interpret the instruction.
    fn cold_miss(&mut self, ea: u8, access: Access, retry: Pos) {
        let Access { info, keep, saved, .. } = access;
        if ea == R11 {
            self.cold_undo(R11, info & MissInfo::WRITE != 0, self.is_dead(keep, saved));
        }
        Self::restore(&mut self.cold, keep, self.r9_busy);
        if ea != R10 && ea != R11 {
            dynasm!(self.cold ; .arch x64 ; mov r10, Rq(ea));
        }
        dynasm!(self.cold ; .arch x64 ; mov r11d, info as i32);
        self.cold.push(0xE8);
        self.cold_rel32(Target::Cache(self.stubs.miss));
        // After the call: this jump for the interpreter, behind it the way back.
        self.cold.push(0xE9);
        let fail = self.cold_site();
        if saved {
            Self::save(&mut self.cold, keep, self.r9_busy);
        }
        if ea == R11 {
            dynasm!(self.cold ; .arch x64 ; mov r11, r10);
        }
        self.cold_jmp(Target::Here(retry));
        self.cold_land(fail);
        self.cold_interpret(self.rip);
    }

    /// An instruction with AH–BH and memory cannot name r11: borrows a register without REX for the address, after a
    /// probe that faults while all registers are still the guest's.
    pub(super) fn high_byte_access(&mut self, new: &mut Instruction) -> Result<(), Unfit> {
        let used = |n: u8| {
            (0..new.op_count())
                .any(|i| new.op_kind(i) == OpKind::Register && regs::number(new.op_register(i)) == n)
        };
        // RAX is implicit in CMPXCHG; RSI and RDI have no high byte and no such role.
        let t = [6u8, 7].into_iter().find(|&n| !used(n)).ok_or(Unfit)?;
        new.set_memory_base(Register::RAX + u32::from(t));
        dynasm!(self.hot
            ; .arch x64
            ; mov r10b, [r11]
            ; mov [rsp + ctx!(tmp)], Rq(t)
            ; mov Rq(t), r11
        );
        self.encode(new)?;
        dynasm!(self.hot ; .arch x64 ; mov Rq(t), [rsp + ctx!(tmp)]);
        Ok(())
    }
}

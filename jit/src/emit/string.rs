//! String instructions (SDM vol. 1, 7.3.9) and bit strings.

use super::access::{Keep, NEED_FS_GS, address16};
use super::window::Spot;
use super::word::operand;
use super::{Emitter, Site, Unfit};
use crate::block::Mode;
use crate::classify::Form;
use crate::context::ctx;
use crate::flags::FlagSet;
use crate::regs::{self, R10, R11};
use crate::stubs::MissInfo;
use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Instruction, Mnemonic as M, OpAccess, OpKind, Register};

/// RSI or RDI as a string instruction uses it.
#[derive(Clone, Copy)]
pub(super) struct Index {
    pub(super) register: u8,
    /// Bytes of it.
    pub(super) width: u32,
    pub(super) segment: Register,
}

impl Index {
    /// The operand read through RSI.
    fn source(instr: &Instruction) -> Option<Index> {
        let width = Index::width(instr, [OpKind::MemorySegSI, OpKind::MemorySegESI, OpKind::MemorySegRSI])?;
        Some(Index { register: 6, width, segment: instr.memory_segment() })
    }

    /// The operand at RDI.
    fn destination(instr: &Instruction) -> Option<Index> {
        let width = Index::width(instr, [OpKind::MemoryESDI, OpKind::MemoryESEDI, OpKind::MemoryESRDI])?;
        Some(Index { register: 7, width, segment: Register::ES })
    }

    fn width(instr: &Instruction, kinds: [OpKind; 3]) -> Option<u32> {
        let kind = (0..instr.op_count()).find_map(|i| kinds.iter().position(|&k| k == instr.op_kind(i)))?;
        Some(2 << kind)
    }
}

impl Emitter {
    /// A string instruction.
    pub(crate) fn string(&mut self, instr: &Instruction, site: Site) -> Result<(), Unfit> {
        let size = instr.memory_size().size() as u32;
        let (rsi, rdi) = (Index::source(instr), Index::destination(instr));
        if self.code64
            && [rsi, rdi].into_iter().flatten().any(|i| i.width != 8 || NEED_FS_GS.contains(&i.segment))
        {
            return Err(Unfit);
        }
        if instr.has_rep_prefix() || instr.has_repne_prefix() {
            return self.repeated(instr, size, site, (rsi, rdi));
        }
        match (instr.mnemonic(), rsi, rdi) {
            (M::Stosb | M::Stosw | M::Stosd | M::Stosq, _, Some(to)) => {
                let at = self.access_index(to, size, true, site.before);
                self.sized(Sized::Store, at, 0, size);
            }
            (M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq, Some(from), _) => {
                let at = self.access_index(from, size, false, site.before);
                self.sized(Sized::Load, at, 0, size);
            }
            (M::Scasb | M::Scasw | M::Scasd | M::Scasq, _, Some(at)) => {
                let at = self.access_index(at, size, false, site.before);
                self.sized(Sized::Compare, at, 0, size);
            }
            (M::Movsb | M::Movsw | M::Movsd | M::Movsq, Some(from), Some(to)) => {
                self.load_to_tmp(from, size, site.before);
                let at = self.access_index(to, size, true, site.before);
                dynasm!(self.hot ; .arch x64 ; mov r10, [rsp + ctx!(tmp)]);
                self.sized(Sized::Store, at, R10, size);
            }
            (_, Some(from), Some(at)) => {
                self.load_to_tmp(from, size, site.before);
                let at = self.access_index(at, size, false, site.before);
                dynasm!(self.hot ; .arch x64 ; mov r10, [rsp + ctx!(tmp)]);
                self.sized(Sized::Compare, at, R10, size);
            }
            _ => return Err(Unfit),
        }
        let n = if self.mode.has(Mode::DOWN) { -(size as i32) } else { size as i32 };
        for Index { register: r, width, .. } in [rsi, rdi].into_iter().flatten() {
            match width {
                2 => dynasm!(self.hot ; .arch x64 ; lea r10d, [Rq(r) + n] ; mov Rw(r), r10w),
                4 => dynasm!(self.hot ; .arch x64 ; lea Rd(r), [Rq(r) + n]),
                _ => dynasm!(self.hot ; .arch x64 ; lea Rq(r), [Rq(r) + n]),
            }
        }
        Ok(())
    }

    /// Whether the register holds a linear address.
    pub(super) fn is_linear(&self, index: Index) -> bool {
        let flat = self.code64 || index.width == 4 && self.is_flat(index.segment);
        flat && !NEED_FS_GS.contains(&index.segment)
    }

    /// Makes what `index` points to accessible.
    pub(super) fn access_index(&mut self, index: Index, size: u32, write: bool, live: FlagSet) -> Spot {
        let r = index.register;
        match index.width {
            _ if self.is_linear(index) => return self.access(r, size, write, live),
            4 => dynasm!(self.hot ; .arch x64 ; mov r10d, Rd(r)),
            _ => dynasm!(self.hot ; .arch x64 ; movzx r10d, Rw(r)),
        }
        self.access_segment(index.segment, index.width == 2, MissInfo::of(size, write), live)
    }

    /// BT, BTS, BTR, BTC with a register bit offset: the offset picks the word, then the bit in it.
    pub(crate) fn bit_string(&mut self, instr: &Instruction, form: &Form, site: Site) -> Result<(), Unfit> {
        let bit = instr.op1_register();
        let size = bit.size() as u32;
        let atomic = instr.has_lock_prefix();
        if size < 4 || (atomic && !site.before.is_empty()) {
            return Err(Unfit);
        }
        let segment = instr.memory_segment();
        if !self.code64 && (!self.is_flat(segment) || address16(instr)) {
            return Err(Unfit);
        }
        let write = form.access[0] != OpAccess::Read;
        let ea = self.effective_address(instr, true)?;
        if ea != R10 {
            dynasm!(self.hot ; .arch x64 ; mov r10, Rq(ea));
        }
        let n = regs::number(bit);
        let r = self.guest(n, R11);
        let keep = Self::keep(site.before);
        Self::save(&mut self.hot, keep, true);
        // Saving may have replaced RAX.
        let r = if r == 0 && keep == Keep::All {
            dynasm!(self.hot ; .arch x64 ; mov r11, [rsp + ctx!(tmp) + 8]);
            R11
        } else {
            r
        };
        if size == 8 {
            dynasm!(self.hot ; .arch x64 ; mov r11, Rq(r) ; sar r11, 6);
        } else {
            dynasm!(self.hot ; .arch x64 ; movsxd r11, Rd(r) ; sar r11, 5);
        }
        Self::restore(&mut self.hot, keep, true);
        match (size, self.code64) {
            (8, _) => dynasm!(self.hot ; .arch x64 ; lea r10, [r10 + r11 * 8]),
            (_, true) => dynasm!(self.hot ; .arch x64 ; lea r10, [r10 + r11 * 4]),
            (_, false) => dynasm!(self.hot ; .arch x64 ; lea r10d, [r10 + r11 * 4]),
        }
        let locked = if atomic { MissInfo::LOCKED } else { 0 };
        // A store may come behind the flags.
        let at = self.by_table(|e| e.access_as(R10, MissInfo::of(size, write) | locked, site.before));
        let mut new = *instr;
        if atomic {
            let r = self.guest(n, R10);
            let mask = size as i32 * 8 - 1;
            dynasm!(self.hot ; .arch x64 ; mov r10, Rq(r) ; and r10d, mask);
            new.set_memory_base(Register::R11);
            new.set_memory_index(Register::None);
            new.set_memory_index_scale(1);
            new.set_memory_displacement64(0);
            new.set_memory_displ_size(0);
            new.set_segment_prefix(Register::None);
            new.set_op1_register(regs::same_size(bit, R10));
            return self.encode(&new);
        }
        // On a register operand the processor takes the offset modulo the width itself.
        self.sized(Sized::Load, at, R10, size);
        dynasm!(self.hot ; .arch x64 ; mov [rsp + ctx!(tmp)], r11);
        let r = self.guest(n, R11);
        new.set_op0_kind(OpKind::Register);
        new.set_op0_register(regs::same_size(bit, R10));
        new.set_segment_prefix(Register::None);
        new.set_op1_register(regs::same_size(bit, r));
        self.encode(&new)?;
        if write {
            dynasm!(self.hot ; .arch x64 ; mov r11, [rsp + ctx!(tmp)]);
            self.sized(Sized::Store, at, R10, size);
        }
        Ok(())
    }

    fn load_to_tmp(&mut self, from: Index, size: u32, live: FlagSet) {
        let at = self.access_index(from, size, false, live);
        self.sized(Sized::Load, at, R10, size);
        dynasm!(self.hot ; .arch x64 ; mov [rsp + ctx!(tmp)], r10);
    }

    /// `op` with `size` bytes of host register `r` and those at `at`.
    fn sized(&mut self, op: Sized, at: Spot, r: u8, size: u32) {
        self.through(at);
        let opcode = op as u8 - u8::from(size == 1);
        operand(&mut self.hot, opcode, size as i32, r, at.base, at.disp);
    }
}

/// Opcodes of forms with a register for words; those for bytes come before.
#[derive(Clone, Copy)]
enum Sized {
    Store = 0x89,
    Load = 0x8B,
    /// The register with what is in memory.
    Compare = 0x3B,
}

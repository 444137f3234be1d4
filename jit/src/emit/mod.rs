//! Emits the host code of one block: identity for what needs no change, the delta-table access around memory
//! operands, and the jumps out.
//!
//! Code goes to two buffers, `hot` (the straight line) and `cold` (misses, exits), placed apart. Within an instruction
//! all guest registers stay as they were until nothing can fault any more, so that the instruction can be given
//! to the interpreter at any faulting point.
//!
//! Here are the buffers and what every instruction needs; [`access`] turns guest addresses into host addresses, [`group`]
//! shares one check among accesses, [`segment`] applies bases and limits, [`recipe`] puts status flags aside, [`stack`], [`string`], [`repeat`] and [`system`] emit instructions that are not identities,
//! and [`flow`] leaves the block.

mod access;
mod flow;
mod group;
mod level;
pub(crate) mod recipe;
mod repeat;
mod segment;
mod shape;
mod stack;
mod string;
mod system;
mod window;
mod word;

use crate::assembler::SimpleAssembler;
use crate::block::Mode;
use crate::classify::Form;
use crate::code_cache::CodeOffset;
use crate::context::ctx;
use crate::flags::{FlagSet, FlagsOut};
use crate::groups;
use crate::regs::{self, Place, R9, R10, R11};
use crate::stubs::{MissInfo, Stubs};
use dynasmrt::{DynasmApi, dynasm};
use group::Group;
use iced_x86::{Code, Encoder, Instruction, Mnemonic, OpAccess, OpCodeOperandKind, OpKind, Register};
use paravane_cpu::operand_alignment;
use paravane_memory::split_locks_are_dear;
use shape::Shapes;
use window::{Probed, Stack};

/// Where in the block's code something is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Pos {
    Hot(usize),
    Cold(usize),
}

impl Pos {
    /// Where it is once hot code begins at `hot` and cold code at `cold`.
    pub(crate) fn place(self, hot: CodeOffset, cold: CodeOffset) -> CodeOffset {
        match self {
            Pos::Hot(n) => CodeOffset(hot.0 + n as u32),
            Pos::Cold(n) => CodeOffset(cold.0 + n as u32),
        }
    }
}

/// What a fixup's displacement must reach.
#[derive(Clone, Copy, Debug)]
enum Target {
    Here(Pos),
    Cache(CodeOffset),
}

/// A direct exit, resolved to cache offsets when the block is placed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PendingLink {
    /// Code address it leads to.
    pub(crate) target: u64,
    pub(crate) site: Pos,
    pub(crate) stub: Pos,
    pub(crate) flags: FlagsOut,
    pub(crate) same_page: bool,
    pub(crate) ungrouped: bool,
    pub(crate) back: bool,
}

/// The host register that points to the context: RSP.
const CONTEXT: u8 = 4;

/// Why an instruction cannot be emitted: it goes to the interpreter.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unfit;

/// What the emitter knows of the instruction besides the instruction.
#[derive(Clone, Copy)]
pub(crate) struct Site {
    /// Status flags live before it.
    pub(crate) before: FlagSet,
}

/// The emitter of one block; buffers are reused from block to block.
pub(crate) struct Emitter {
    hot: SimpleAssembler,
    cold: SimpleAssembler,
    fixups: Vec<(Pos, Target)>,
    pub(crate) links: Vec<PendingLink>,
    /// Where the code has addresses that move with it.
    pub(crate) constants: Vec<Pos>,
    first_link: u32,
    shapes: Shapes,
    encoder: Encoder,
    stubs: Stubs,
    mode: Mode,
    /// 64-bit code.
    code64: bool,
    /// Memory is accessed through a window.
    window: bool,
    /// The block can be moved to another linear page.
    movable: bool,
    /// Code address and RIP of the block's beginning.
    address: u64,
    start_rip: u64,
    /// RIP of the current instruction.
    rip: u64,
    groups: Vec<Group>,
    /// Addresses that were probed, in a window.
    probed: Vec<Probed>,
    /// What is known of where RSP is, in a window of 64-bit code.
    stack: Option<Stack>,
    /// Locked accesses that cross a cache line are the interpreter's.
    splits_are_dear: bool,
    /// A group keeps its delta in r9.
    r9_busy: bool,
    /// Instructions from the current one on that the block counted when it was entered.
    remaining: u32,
    /// Where in hot code the status flags were put aside, for good.
    pub(crate) flags_saved: Option<u32>,
    /// How far guest RSP is ahead of its host register: runs of PUSH and POP in a group move it once.
    rsp_pending: i32,
}

impl Emitter {
    pub(crate) fn new(stubs: Stubs) -> Emitter {
        Emitter {
            hot: SimpleAssembler::new(),
            cold: SimpleAssembler::new(),
            fixups: Vec::new(),
            links: Vec::new(),
            constants: Vec::new(),
            first_link: 0,
            shapes: Shapes::new(),
            encoder: Encoder::new(64),
            stubs,
            mode: Mode::default(),
            code64: true,
            window: false,
            movable: false,
            address: 0,
            start_rip: 0,
            rip: 0,
            groups: Vec::new(),
            probed: Vec::new(),
            stack: None,
            splits_are_dear: split_locks_are_dear(),
            r9_busy: false,
            remaining: 0,
            flags_saved: None,
            rsp_pending: 0,
        }
    }

    /// Starts a block at code address `address`, where RIP is `rip`; its first link will have number `first_link`.
    pub(crate) fn start(&mut self, address: u64, rip: u64, mode: Mode, first_link: u32) {
        self.hot.ops.clear();
        self.cold.ops.clear();
        self.fixups.clear();
        self.links.clear();
        self.constants.clear();
        self.first_link = first_link;
        self.mode = mode;
        self.code64 = mode.code64();
        self.window = mode.has(Mode::WINDOW);
        self.movable = mode.movable(address);
        self.address = address;
        self.start_rip = rip;
        self.rip = rip;
        self.groups.clear();
        self.probed.clear();
        self.stack = (self.window && self.code64).then_some(Stack::ENTRY);
        self.r9_busy = false;
        self.remaining = 0;
        self.flags_saved = None;
        self.rsp_pending = 0;
    }

    /// Says which instruction comes next, and how many from it on were counted at the block's entry.
    pub(crate) fn at(&mut self, rip: u64, remaining: u32) {
        self.rip = rip;
        self.remaining = remaining;
    }

    /// The code address of `rip`.
    fn code_address(&self, rip: u64) -> u64 {
        self.mode.advance(self.address, rip.wrapping_sub(self.start_rip))
    }

    /// Bytes of hot code so far.
    pub(crate) fn hot_len(&self) -> usize {
        self.hot.ops.len()
    }

    fn hot_rel32(&mut self, target: Target) -> Pos {
        let at = Pos::Hot(self.hot.ops.len());
        self.hot.push_i32(0);
        self.fixups.push((at, target));
        at
    }

    fn cold_rel32(&mut self, target: Target) -> Pos {
        let at = Pos::Cold(self.cold.ops.len());
        self.cold.push_i32(0);
        self.fixups.push((at, target));
        at
    }

    /// `jcc` from hot code; `cc` is the condition number.
    fn hot_jcc(&mut self, cc: u8, target: Pos) -> Pos {
        self.hot.push(0x0F);
        self.hot.push(0x80 | cc);
        self.hot_rel32(Target::Here(target))
    }

    fn cold_jcc(&mut self, cc: u8, target: Pos) {
        self.cold.push(0x0F);
        self.cold.push(0x80 | cc);
        self.cold_rel32(Target::Here(target));
    }

    fn cold_jmp(&mut self, target: Target) {
        self.cold.push(0xE9);
        self.cold_rel32(target);
    }

    fn cold_here(&self) -> Pos {
        Pos::Cold(self.cold.ops.len())
    }

    fn hot_here(&self) -> Pos {
        Pos::Hot(self.hot.ops.len())
    }

    fn constant(ops: &mut SimpleAssembler, reg: u8, value: u64) {
        if let Ok(v) = i32::try_from(value as i64) {
            if v >= 0 {
                dynasm!(ops ; .arch x64 ; mov Rd(reg), v);
            } else {
                dynasm!(ops ; .arch x64 ; mov Rq(reg), v);
            }
        } else if let Ok(v) = u32::try_from(value) {
            dynasm!(ops ; .arch x64 ; mov Rd(reg), v as i32);
        } else {
            dynasm!(ops ; .arch x64 ; mov Rq(reg), QWORD value as i64);
        }
    }

    /// Loads a host register with an address that counts from RIP.
    fn hot_address(&mut self, reg: u8, value: u64) {
        Self::moving(&mut self.hot, reg, value, self.movable);
        if self.movable {
            self.constants.push(Pos::Hot(self.hot.ops.len() - 8));
        }
    }

    /// Likewise r10, in cold code.
    fn cold_address(&mut self, value: u64) {
        Self::moving(&mut self.cold, R10, value, self.movable);
        if self.movable {
            self.constants.push(Pos::Cold(self.cold.ops.len() - 8));
        }
    }

    /// Loads a host register with a fixed address, or one that counts from RIP if it is `relative`.
    fn fixed(&mut self, reg: u8, value: u64, relative: bool) {
        if relative {
            self.hot_address(reg, value);
        } else {
            Self::constant(&mut self.hot, reg, value);
        }
    }

    /// [`Self::constant`]; with room for any other value, at the end, if it `moves`.
    fn moving(ops: &mut SimpleAssembler, reg: u8, value: u64, moves: bool) {
        if moves {
            dynasm!(ops ; .arch x64 ; mov Rq(reg), QWORD value as i64);
        } else {
            Self::constant(ops, reg, value);
        }
    }

    const fn home_offset(n: u8) -> i32 {
        ctx!(home) + n as i32 * 8
    }

    /// Loads guest register `number` into a host register: its own, or `scratch`.
    fn guest(&mut self, number: u8, scratch: u8) -> u8 {
        match regs::place(number) {
            Place::Host(h) => h,
            Place::Home(n) => {
                load(&mut self.hot, scratch, Self::home_offset(n));
                scratch
            }
        }
    }

    /// Writes host register `host` (64 bits) to guest register `number`.
    fn set_guest(&mut self, number: u8, host: u8) {
        match regs::place(number) {
            Place::Host(h) if h == host => {}
            Place::Host(h) => dynasm!(self.hot ; .arch x64 ; mov Rq(h), Rq(host)),
            Place::Home(n) => {
                store(&mut self.hot, Self::home_offset(n), host);
            }
        }
    }

    fn encode(&mut self, instr: &Instruction) -> Result<(), Unfit> {
        if self.shapes.put(instr, &mut self.hot) {
            return Ok(());
        }
        let out = self.encoder.encode(instr, 0);
        let mut bytes = self.encoder.take_buffer();
        if out.is_ok() {
            self.hot.ops.extend_from_slice(&bytes);
        }
        bytes.clear();
        self.encoder.set_buffer(bytes);
        out.map(drop).map_err(|_| Unfit)
    }

    /// Emits an identity-class instruction whose bytes are `raw`.
    pub(crate) fn identity(
        &mut self,
        instr: &Instruction,
        raw: &[u8],
        form: &Form,
        site: Site,
    ) -> Result<(), Unfit> {
        let memory = form.memory;
        if self.constant_at_home(instr) {
            return Ok(());
        }
        if memory.is_none() && self.copyable(instr, raw) {
            self.hot.ops.extend_from_slice(raw);
            return Ok(());
        }
        let mut new = *instr;
        normalize(&mut new)?;
        let grouped = self.r9_busy;
        let mut free: &[u8] = if grouped { &[R10, R11] } else { &[R10, R11, R9] };
        let mut high_byte = false;
        if memory.is_some() {
            let (size, write) = (u32::from(form.memory_size), form.writes_memory);
            if !matches!(size, 1 | 2 | 4 | 8 | 10 | 16 | 32) {
                return Err(Unfit);
            }
            high_byte = groups::has_high_byte(instr, size);
            new.set_segment_prefix(Register::None);
            let mut info = MissInfo::of(size, write);
            info |= if operand_alignment(instr) > 1 { MissInfo::ALIGNED } else { 0 };
            info |= if groups::is_locked(instr) { MissInfo::LOCKED } else { 0 };
            let flat = self.code64 || self.is_flat(instr.memory_segment());
            if self.window && flat && !high_byte {
                self.operand_in_window(instr, info, site.before)?.put(&mut new, !self.code64);
                free = &[R10, R9];
            } else if let Some(m) = self.member(instr, size, write).filter(|_| !high_byte) {
                self.address_member(&mut new, m);
                free = if new.memory_base() == Register::R9 { &[R10, R11] } else { &[R10] };
            } else {
                self.by_table(|e| e.address(instr, info, site.before))?;
                new.set_memory_base(Register::R11);
                new.set_memory_index(Register::None);
                new.set_memory_index_scale(1);
                new.set_memory_displacement64(0);
                new.set_memory_displ_size(0);
                free = if grouped { &[R10] } else { &[R10, R9] };
            }
        }
        if memory.is_none() {
            self.home_as_memory(&mut new, form);
        }
        let mut stores: [(u8, u8); 4] = [(0, 0); 4];
        let mut stored = 0;
        let mut renamed: [(u8, u8); 4] = [(0xFF, 0); 4];
        for i in 0..instr.op_count() {
            if new.op_kind(i) != OpKind::Register || !new.op_register(i).is_gpr() {
                continue;
            }
            let r = instr.op_register(i);
            let n = regs::number(r);
            let host = match regs::place(n) {
                Place::Host(h) => h,
                Place::Home(h) => {
                    let access = form.access[i as usize];
                    let host = match renamed.iter().find(|p| p.0 == n) {
                        Some(p) => p.1,
                        None => {
                            let (&s, rest) = free.split_first().ok_or(Unfit)?;
                            free = rest;
                            renamed[i as usize] = (n, s);
                            if !replaces(&new, i) {
                                load(&mut self.hot, s, Self::home_offset(h));
                            }
                            s
                        }
                    };
                    let pending = stores[..stored].iter().any(|s| s.0 == n);
                    if !pending && !matches!(access, OpAccess::Read | OpAccess::CondRead) {
                        stores[stored] = (n, host);
                        stored += 1;
                    }
                    host
                }
            };
            if host != n {
                new.set_op_register(i, regs::same_size(r, host));
            }
        }
        if high_byte {
            self.high_byte_access(&mut new)?;
        } else {
            self.encode(&new)?;
            self.accessed_stack_by(instr, form);
        }
        for &(n, host) in &stores[..stored] {
            self.set_guest(n, host);
        }
        Ok(())
    }

    /// MOV of a constant to a register in the context.
    fn constant_at_home(&mut self, instr: &Instruction) -> bool {
        if !matches!(instr.code(), Code::Mov_r32_imm32 | Code::Mov_rm32_imm32)
            || instr.op0_kind() != OpKind::Register
        {
            return false;
        }
        let Place::Home(n) = regs::place(regs::number(instr.op0_register())) else { return false };
        let Ok(value) = i32::try_from(instr.immediate32()) else { return false };
        word::store_constant(&mut self.hot, 8, CONTEXT, Self::home_offset(n), value);
        true
    }

    /// Lets an instruction without a memory operand use a guest register in the context as one, where that means the same:
    /// a write must reach all of the register that it would reach.
    fn home_as_memory(&self, new: &mut Instruction, form: &Form) {
        use Mnemonic as M;
        // With memory XCHG locks, and bit offsets are not taken modulo the width. XADD writes both operands, in this order.
        if matches!(new.mnemonic(), M::Xchg | M::Xadd | M::Bt | M::Bts | M::Btr | M::Btc) {
            return;
        }
        // Rotates by constants leave another (undefined) OF on processors of Intel's.
        if matches!(new.mnemonic(), M::Rol | M::Ror) && new.op1_kind() == OpKind::Immediate8 {
            return;
        }
        // A register with itself is read once.
        if new.op_count() == 2 && new.op0_register() == new.op1_register() {
            return;
        }
        if let Some(other) = mirrored(new) {
            *new = other;
        }
        for i in 0..new.op_count() {
            let r = new.op_register(i);
            if new.op_kind(i) != OpKind::Register || !r.is_gpr() {
                continue;
            }
            let Place::Home(n) = regs::place(regs::number(r)) else { continue };
            let kind = new.op_code().op_kind(i);
            let width = match kind {
                OpCodeOperandKind::r8_or_mem => 1,
                OpCodeOperandKind::r16_or_mem => 2,
                OpCodeOperandKind::r32_or_mem => 4,
                OpCodeOperandKind::r64_or_mem => 8,
                _ => continue,
            };
            let read = matches!(form.access[i as usize], OpAccess::Read);
            // A part written would have to be joined with the rest when all of it is read: no store is forwarded then.
            if !read && width < 8 {
                continue;
            }
            let mut changed = *new;
            changed.set_segment_prefix(Register::None);
            changed.set_op_kind(i, OpKind::Memory);
            changed.set_memory_base(Register::RSP);
            changed.set_memory_index(Register::None);
            changed.set_memory_index_scale(1);
            changed.set_memory_displacement64(Self::home_offset(n) as u64);
            changed.set_memory_displ_size(1);
            if changed.memory_size().size() == width {
                *new = changed;
                return;
            }
        }
    }

    /// Whether the bytes mean the same on the host: no RSP, no register without a host register, no F2 and F3 (see
    /// [`normalize`]).
    fn copyable(&self, instr: &Instruction, raw: &[u8]) -> bool {
        if instr.has_rep_prefix() || instr.has_repne_prefix() {
            return false;
        }
        for i in 0..instr.op_count() {
            let r = instr.op_register(i);
            if r.is_gpr() && !matches!(regs::place(regs::number(r)), Place::Host(h) if h == regs::number(r)) {
                return false;
            }
        }
        // In 32-bit code 40–4F are INC and DEC, 82 is another 80, and VEX prefixes ignore bits that matter in 64-bit
        // code. In 16-bit code 66H means the opposite.
        self.code64
            || self.mode.has(Mode::CODE32)
                && !raw.iter().any(|b| matches!(b, 0x40..=0x4F | 0x82 | 0xC4 | 0xC5 | 0x62 | 0x67))
    }

    /// Where the next instruction begins, for [`Self::rewind`].
    pub(crate) fn mark(&self) -> (usize, i32) {
        (self.hot.ops.len(), self.rsp_pending)
    }

    /// Drops hot code from a mark on (an instruction turned out not to fit). Cold code of it stays, unreachable.
    pub(crate) fn rewind(&mut self, (len, rsp_pending): (usize, i32)) {
        self.rsp_pending = rsp_pending;
        self.hot.ops.truncate(len);
        let dropped = |at: &Pos| matches!(at, Pos::Hot(p) if *p >= len);
        self.fixups.retain(|(at, _)| !dropped(at));
        self.constants.retain(|at| !dropped(at));
    }

    /// Bytes of hot and of cold code.
    pub(crate) fn lengths(&self) -> (usize, usize) {
        (self.hot.ops.len(), self.cold.ops.len())
    }

    /// The block's hot and cold code, for placement at `hot` and `cold`.
    pub(crate) fn finish(&mut self, hot: CodeOffset, cold: CodeOffset) -> (&[u8], &[u8]) {
        for &(at, target) in &self.fixups {
            let target = match target {
                Target::Here(p) => p.place(hot, cold),
                Target::Cache(c) => c,
            };
            let rel = target.0.wrapping_sub(at.place(hot, cold).0 + 4);
            let (ops, n) = match at {
                Pos::Hot(n) => (&mut self.hot.ops, n),
                Pos::Cold(n) => (&mut self.cold.ops, n),
            };
            ops[n..n + 4].copy_from_slice(&rel.to_le_bytes());
        }
        (&self.hot.ops, &self.cold.ops)
    }
}

/// Loads host register `r` from the context's word at offset `at`.
fn load(ops: &mut SimpleAssembler, r: u8, at: i32) {
    match i8::try_from(at) {
        // mov r, [rsp + disp8]
        Ok(at) => ops.extend([0x48 | r >> 3 << 2, 0x8B, 0x44 | (r & 7) << 3, 0x24, at as u8]),
        Err(_) => dynasm!(ops ; .arch x64 ; mov Rq(r), [rsp + at]),
    }
}

/// Stores host register `r` to the context's word at offset `at`.
fn store(ops: &mut SimpleAssembler, at: i32, r: u8) {
    match i8::try_from(at) {
        // mov [rsp + disp8], r
        Ok(at) => ops.extend([0x48 | r >> 3 << 2, 0x89, 0x44 | (r & 7) << 3, 0x24, at as u8]),
        Err(_) => dynasm!(ops ; .arch x64 ; mov [rsp + at], Rq(r)),
    }
}

/// The same operation with its second operand, a register in the context, as `r/m`, where the first is a host register.
fn mirrored(instr: &Instruction) -> Option<Instruction> {
    use Code::*;
    let home = |r: Register| r.is_gpr() && matches!(regs::place(regs::number(r)), Place::Home(_));
    let registers =
        instr.op_count() == 2 && instr.op0_kind() == OpKind::Register && instr.op1_kind() == OpKind::Register;
    if !registers || home(instr.op0_register()) || !home(instr.op1_register()) {
        return None;
    }
    let code = match instr.code() {
        Mov_rm32_r32 => Mov_r32_rm32,
        Mov_rm64_r64 => Mov_r64_rm64,
        Add_rm32_r32 => Add_r32_rm32,
        Add_rm64_r64 => Add_r64_rm64,
        Or_rm32_r32 => Or_r32_rm32,
        Or_rm64_r64 => Or_r64_rm64,
        And_rm32_r32 => And_r32_rm32,
        And_rm64_r64 => And_r64_rm64,
        Sub_rm32_r32 => Sub_r32_rm32,
        Sub_rm64_r64 => Sub_r64_rm64,
        Xor_rm32_r32 => Xor_r32_rm32,
        Xor_rm64_r64 => Xor_r64_rm64,
        Cmp_rm32_r32 => Cmp_r32_rm32,
        Cmp_rm64_r64 => Cmp_r64_rm64,
        _ => return None,
    };
    let mut other = *instr;
    other.set_code(code);
    Some(other)
}

/// Whether register operand `i` is overwritten whole, and not read.
fn replaces(instr: &Instruction, i: u32) -> bool {
    i == 0
        && instr.op0_register().size() >= 4
        && matches!(instr.mnemonic(), Mnemonic::Mov | Mnemonic::Movzx | Mnemonic::Movsx | Mnemonic::Movsxd)
        && instr.op1_register() != instr.op0_register()
}

/// Replaces forms that 64-bit mode encodes differently, and drops F2 and F3: they mean nothing to the guest's model, but
/// might to the host (BSR becomes LZCNT).
fn normalize(instr: &mut Instruction) -> Result<(), Unfit> {
    instr.set_has_rep_prefix(false);
    instr.set_has_repne_prefix(false);
    let code = match instr.code() {
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Dec_r32 => Code::Dec_rm32,
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Add_rm8_imm8_82 => Code::Add_rm8_imm8,
        Code::Or_rm8_imm8_82 => Code::Or_rm8_imm8,
        Code::Adc_rm8_imm8_82 => Code::Adc_rm8_imm8,
        Code::Sbb_rm8_imm8_82 => Code::Sbb_rm8_imm8,
        Code::And_rm8_imm8_82 => Code::And_rm8_imm8,
        Code::Sub_rm8_imm8_82 => Code::Sub_rm8_imm8,
        Code::Xor_rm8_imm8_82 => Code::Xor_rm8_imm8,
        Code::Cmp_rm8_imm8_82 => Code::Cmp_rm8_imm8,
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_RAX_moffs64 => Code::Mov_r64_rm64,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        Code::Mov_moffs64_RAX => Code::Mov_rm64_r64,
        _ => return Ok(()),
    };
    instr.set_code(code);
    Ok(())
}

//! Emits the host code of one block: identity for what needs no change, the delta-table access around memory
//! operands, and the jumps out.
//!
//! Code goes to two buffers, `hot` (the straight line) and `cold` (misses, exits), joined at the end. Within an instruction
//! all guest registers stay as they were until nothing can fault any more, so that the instruction can be given
//! to the interpreter at any faulting point.

use crate::classify::Form;
use crate::code_cache::CodeOffset;
use crate::context::{JitContext, Reason, ctx};
use crate::flags::FlagSet;
use crate::regs::{self, Place, R10, R11, R13};
use crate::stubs::{MissInfo, Stubs};
use dynasmrt::{DynasmApi, SimpleAssembler, dynasm};
use iced_x86::{Code, Encoder, Instruction, OpAccess, OpKind, Register};

/// Where in the block's code something is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Pos {
    Hot(usize),
    Cold(usize),
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
    pub(crate) site: Pos,
    pub(crate) stub: Pos,
    pub(crate) flags_live: bool,
    pub(crate) same_page: bool,
    pub(crate) ungrouped: bool,
}

/// The base group in force: r13 holds the page's delta.
#[derive(Clone, Copy)]
struct Group {
    base: u8,
    lo: i32,
    hi: i32,
    write: bool,
    /// How far RSP moved since the check, where it is the base.
    moved: i32,
}

/// Why an instruction cannot be emitted: it goes to the interpreter.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unfit;

/// How live flags are kept over a check that destroys them.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keep {
    Nothing,
    Carry,
    Zero,
    All,
}

/// The emitter of one block; buffers are reused from block to block.
pub(crate) struct Emitter {
    hot: SimpleAssembler,
    cold: SimpleAssembler,
    fixups: Vec<(Pos, Target)>,
    pub(crate) links: Vec<PendingLink>,
    first_link: u32,
    encoder: Encoder,
    stubs: Stubs,
    /// 64-bit code (32-bit otherwise).
    code64: bool,
    /// Linear address of the current instruction.
    rip: u64,
    page: u64,
    group: Option<Group>,
    /// How far guest RSP is ahead of its host register: runs of PUSH and POP in a group move it once.
    rsp_pending: i32,
}

const NEED_FS_GS: [Register; 2] = [Register::FS, Register::GS];

/// What the emitter knows of the instruction besides the instruction.
#[derive(Clone, Copy)]
pub(crate) struct Site {
    /// Status flags live before it.
    pub(crate) before: FlagSet,
}

impl Emitter {
    pub(crate) fn new(stubs: Stubs) -> Emitter {
        Emitter {
            hot: SimpleAssembler::new(),
            cold: SimpleAssembler::new(),
            fixups: Vec::new(),
            links: Vec::new(),
            first_link: 0,
            encoder: Encoder::new(64),
            stubs,
            code64: true,
            rip: 0,
            page: 0,
            group: None,
            rsp_pending: 0,
        }
    }

    /// Starts a block at linear address `lin`; its first link will have number `first_link`.
    pub(crate) fn start(&mut self, lin: u64, code64: bool, first_link: u32) {
        self.hot.ops.clear();
        self.cold.ops.clear();
        self.fixups.clear();
        self.links.clear();
        self.first_link = first_link;
        self.code64 = code64;
        self.rip = lin;
        self.page = lin >> 12;
        self.group = None;
        self.rsp_pending = 0;
    }

    /// Says which instruction comes next.
    pub(crate) fn at(&mut self, rip: u64) {
        self.rip = rip;
    }

    /// Bytes of hot code so far.
    pub(crate) fn hot_len(&self) -> usize {
        self.hot.ops.len()
    }

    // ---- jumps ------------------------------------------------------------------------------------------

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

    // ---- constants and registers ------------------------------------------------------------------------

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

    fn home_offset(n: u8) -> i32 {
        ctx!(home) + i32::from(n) * 8
    }

    /// Loads guest register `number` into a host register: its own, or `scratch`.
    fn guest(&mut self, number: u8, scratch: u8) -> u8 {
        match regs::place(number) {
            Place::Host(h) => h,
            Place::Home(n) => {
                let at = Self::home_offset(n);
                dynasm!(self.hot ; .arch x64 ; mov Rq(scratch), [rsp + at]);
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
                let at = Self::home_offset(n);
                dynasm!(self.hot ; .arch x64 ; mov [rsp + at], Rq(host));
            }
        }
    }

    // ---- effective addresses ----------------------------------------------------------------------------

    /// Computes the linear address of the memory operand; returns the host register that holds it.
    fn effective_address(&mut self, instr: &Instruction, linear: bool) -> Result<u8, Unfit> {
        let base = instr.memory_base();
        let index = instr.memory_index();
        let wanted = if self.code64 { 8 } else { 4 };
        for r in [base, index] {
            if r != Register::None
                && r != Register::RIP
                && r.size() != wanted
                && !(self.code64 && r.size() == 4)
            {
                return Err(Unfit);
            }
        }
        let narrow = [base, index].iter().any(|r| *r != Register::None && r.size() == 4);
        let segment = instr.memory_segment();
        let based = linear && NEED_FS_GS.contains(&segment);
        let disp = instr.memory_displacement64();
        if base == Register::RIP
            || base == Register::EIP
            || (base == Register::None && index == Register::None)
        {
            Self::constant(&mut self.hot, R10, disp);
        } else {
            let b = (base != Register::None).then(|| regs::number(base));
            let x = (index != Register::None).then(|| regs::number(index));
            if let (Some(b), None, 0, false, false) = (b, x, disp, based, narrow && self.code64)
                && let Place::Host(h) = regs::place(b)
            {
                return Ok(h);
            }
            let b = b.map(|b| self.guest(b, R10));
            let x = x.map(|x| self.guest(x, R11));
            self.lea(R10, b, x, instr.memory_index_scale(), disp as i32, narrow);
        }
        if based {
            let at = ctx!(seg_base) + if segment == Register::FS { 32 } else { 40 };
            dynasm!(self.hot ; .arch x64 ; mov r11, [rsp + at]);
            if self.code64 {
                dynasm!(self.hot ; .arch x64 ; lea r10, [r10 + r11]);
            } else {
                dynasm!(self.hot ; .arch x64 ; lea r10d, [r10 + r11]);
            }
        }
        Ok(R10)
    }

    fn lea(&mut self, dst: u8, base: Option<u8>, index: Option<u8>, scale: u32, disp: i32, narrow: bool) {
        let reg = |n: u8| Register::RAX + u32::from(n);
        let memory = iced_x86::MemoryOperand::new(
            base.map_or(Register::None, reg),
            index.map_or(Register::None, reg),
            if index.is_some() { scale } else { 1 },
            i64::from(disp),
            if base.is_none() {
                8
            } else if disp == 0 {
                0
            } else {
                1
            },
            false,
            Register::None,
        );
        let (code, dst) = if narrow {
            (Code::Lea_r32_m, Register::EAX + u32::from(dst))
        } else {
            (Code::Lea_r64_m, reg(dst))
        };
        let instr = Instruction::with2(code, dst, memory).expect("LEA takes a register and memory");
        self.encode(&instr).expect("an address of registers is encodable");
    }

    fn encode(&mut self, instr: &Instruction) -> Result<(), Unfit> {
        let out = self.encoder.encode(instr, 0);
        let mut bytes = self.encoder.take_buffer();
        if out.is_ok() {
            self.hot.ops.extend_from_slice(&bytes);
        }
        bytes.clear();
        self.encoder.set_buffer(bytes);
        out.map(drop).map_err(|_| Unfit)
    }

    // ---- the access -------------------------------------------------------------------------------------

    fn keep(live: FlagSet) -> Keep {
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

    /// Saves the flags of `keep`, in r13 or, while a group owns it, in the context.
    fn save(ops: &mut SimpleAssembler, keep: Keep, grouped: bool) {
        let tmp = ctx!(tmp) + 8;
        match keep {
            Keep::Nothing => {}
            Keep::Carry if grouped => dynasm!(ops ; .arch x64 ; setb [rsp + tmp]),
            Keep::Zero if grouped => dynasm!(ops ; .arch x64 ; setz [rsp + tmp]),
            Keep::All if grouped => dynasm!(ops ; .arch x64 ; mov [rsp + tmp], rax ; lahf ; seto al),
            Keep::Carry => dynasm!(ops ; .arch x64 ; setb r13b),
            Keep::Zero => dynasm!(ops ; .arch x64 ; setz r13b),
            Keep::All => dynasm!(ops ; .arch x64 ; mov r13, rax ; lahf ; seto al),
        }
    }

    fn restore(ops: &mut SimpleAssembler, keep: Keep, grouped: bool) {
        let tmp = ctx!(tmp) + 8;
        match keep {
            Keep::Nothing => {}
            Keep::Carry if grouped => dynasm!(ops ; .arch x64 ; add BYTE [rsp + tmp], -1),
            Keep::Zero if grouped => dynasm!(ops ; .arch x64 ; cmp BYTE [rsp + tmp], 1),
            Keep::All if grouped => dynasm!(ops ; .arch x64 ; add al, 127 ; sahf ; mov rax, [rsp + tmp]),
            Keep::Carry => dynasm!(ops ; .arch x64 ; add r13b, -1),
            Keep::Zero => dynasm!(ops ; .arch x64 ; cmp r13b, 1),
            Keep::All => dynasm!(ops ; .arch x64 ; add al, 127 ; sahf ; mov rax, r13),
        }
    }

    /// Turns the linear address in host register `ea` into a host address in r11 for an access of `size` bytes;
    /// keeps `live`. Uses r13 (while flags are live and no group owns it) and may overwrite r10.
    fn access(&mut self, ea: u8, size: u32, write: bool, live: FlagSet) {
        let keep = Self::keep(live);
        let retry = self.hot_here();
        dynasm!(self.hot
            ; .arch x64
            ; rorx r11, Rq(ea), 48
            ; shrx r11, r11, r15
        );
        if write {
            dynasm!(self.hot ; .arch x64 ; mov r11, [r14 + r11 * 8 - 28]);
        } else {
            dynasm!(self.hot ; .arch x64 ; mov r11, [r15 + r11 * 8 - 28]);
        }
        if keep == Keep::Nothing {
            dynasm!(self.hot ; .arch x64 ; add r11, Rq(ea));
        } else {
            dynasm!(self.hot ; .arch x64 ; lea r11, [r11 + Rq(ea)]);
        }
        Self::save(&mut self.hot, keep, self.group.is_some());
        let last = size as i32 - 1;
        match size {
            1 => {
                dynasm!(self.hot ; .arch x64 ; test r11, r11);
                let cold = self.cold_here();
                self.hot_jcc(8, cold);
                self.cold_miss(ea, size, write, keep, retry);
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
                self.cold.push(0x78);
                let js = self.cold.ops.len();
                self.cold.push(0);
                dynasm!(self.cold ; .arch x64 ; lea r10d, [r11 + last] ; xor r10d, r11d ; test r10d, !0xFFF);
                self.cold_jcc(4, back);
                Self::restore(&mut self.cold, keep, self.group.is_some());
                self.cold_interpret(self.rip);
                self.cold.ops[js] = (self.cold.ops.len() - js - 1) as u8;
                self.cold_miss(ea, size, write, keep, retry);
            }
            _ => {
                // Vectors are seldom aligned: tell poison by its sign, then whether the access leaves the page.
                dynasm!(self.hot ; .arch x64 ; test r11, r11);
                let cold = self.cold_here();
                self.hot_jcc(8, cold);
                self.cold_miss(ea, size, write, keep, retry);
                dynasm!(self.hot ; .arch x64 ; lea r10d, [r11 + last] ; xor r10d, r11d ; test r10d, !0xFFF);
                let cross = self.cold_here();
                self.hot_jcc(5, cross);
                Self::restore(&mut self.cold, keep, self.group.is_some());
                self.cold_interpret(self.rip);
            }
        }
        Self::restore(&mut self.hot, keep, self.group.is_some());
    }

    /// Cold code of a poisoned access: fills the table and tries again, or leaves to interpret the instruction.
    fn cold_miss(&mut self, ea: u8, size: u32, write: bool, keep: Keep, retry: Pos) {
        Self::restore(&mut self.cold, keep, self.group.is_some());
        if ea != R10 {
            dynasm!(self.cold ; .arch x64 ; mov r10, Rq(ea));
        }
        let info = u64::from(size) | if write { MissInfo::WRITE } else { 0 };
        dynasm!(self.cold ; .arch x64 ; mov r11d, info as i32);
        self.cold.push(0xE8);
        self.cold_rel32(Target::Cache(self.stubs.miss));
        // After the call: this jump for the interpreter, behind it the way back.
        let fail = Pos::Cold(self.cold.ops.len() + 10);
        self.cold_jmp(Target::Here(fail));
        self.cold_jmp(Target::Here(retry));
        self.cold_interpret(self.rip);
    }

    fn cold_interpret(&mut self, rip: u64) {
        Self::constant(&mut self.cold, R10, rip);
        dynasm!(self.cold ; .arch x64 ; mov [rsp + ctx!(rip)], r10);
        self.cold_jmp(Target::Cache(self.stubs.interpret));
    }

    // ---- instructions -----------------------------------------------------------------------------------

    /// Emits an identity-class instruction whose bytes are `raw`.
    pub(crate) fn identity(
        &mut self,
        instr: &Instruction,
        raw: &[u8],
        form: &Form,
        site: Site,
    ) -> Result<(), Unfit> {
        let memory = (0..instr.op_count()).find(|&i| instr.op_kind(i) == OpKind::Memory);
        if memory.is_none() && self.copyable(instr, raw) {
            self.hot.ops.extend_from_slice(raw);
            return Ok(());
        }
        let mut new = *instr;
        normalize(&mut new)?;
        let grouped = self.group.is_some();
        let mut free: &[u8] = if grouped { &[R10, R11] } else { &[R10, R11, R13] };
        let mut high_byte = false;
        if let Some(op) = memory {
            let size = instr.memory_size().size() as u32;
            if !matches!(size, 1 | 2 | 4 | 8 | 10 | 16 | 32) {
                return Err(Unfit);
            }
            let write = !matches!(
                form.access[op as usize],
                OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess
            );
            high_byte = (0..instr.op_count()).any(|i| regs::is_high_byte(instr.op_register(i)));
            new.set_segment_prefix(Register::None);
            if let Some((base, disp)) = self.member(instr, size, write).filter(|_| !high_byte) {
                // A group member: the page's delta is in r13, the displacement stays.
                let base = self.guest(base, R11);
                address_by_group(&mut new, base, disp);
                free = &[R10];
            } else {
                let ea = self.effective_address(instr, true)?;
                self.access(ea, size, write, site.before);
                new.set_memory_base(Register::R11);
                new.set_memory_index(Register::None);
                new.set_memory_index_scale(1);
                new.set_memory_displacement64(0);
                new.set_memory_displ_size(0);
                free = if grouped { &[R10] } else { &[R10, R13] };
            }
        }
        let mut stores: [(u8, u8); 4] = [(0, 0); 4];
        let mut stored = 0;
        let mut renamed: [(u8, u8); 4] = [(0xFF, 0); 4];
        for i in 0..instr.op_count() {
            if instr.op_kind(i) != OpKind::Register || !instr.op_register(i).is_gpr() {
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
                            let at = Self::home_offset(h);
                            dynasm!(self.hot ; .arch x64 ; mov Rq(s), [rsp + at]);
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
        }
        for &(n, host) in &stores[..stored] {
            self.set_guest(n, host);
        }
        Ok(())
    }

    /// An instruction with AH–BH and memory cannot name r11: borrows a register without REX for the address, after a
    /// probe that faults while all registers are still the guest's.
    fn high_byte_access(&mut self, new: &mut Instruction) -> Result<(), Unfit> {
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

    /// Whether the bytes mean the same on the host: no RSP, no register without a host register.
    fn copyable(&self, instr: &Instruction, raw: &[u8]) -> bool {
        for i in 0..instr.op_count() {
            let r = instr.op_register(i);
            if r.is_gpr() && !matches!(regs::place(regs::number(r)), Place::Host(h) if h == regs::number(r)) {
                return false;
            }
        }
        // In 32-bit code 40–4F are INC and DEC, and VEX prefixes ignore bits that matter in 64-bit code.
        self.code64 || !raw.iter().any(|b| matches!(b, 0x40..=0x4F | 0xC4 | 0xC5 | 0x62 | 0x67))
    }

    /// LEA.
    pub(crate) fn lea_instruction(&mut self, instr: &Instruction) -> Result<(), Unfit> {
        let dst = instr.op0_register();
        let n = regs::number(dst);
        let size = dst.size();
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

    fn stack_size(&self) -> i32 {
        if self.code64 { 8 } else { 4 }
    }

    /// Whether the word at RSP + `disp` is covered by the group.
    fn stack_member(&self, disp: i32, write: bool) -> bool {
        self.group.is_some_and(|g| g.base == 4 && g.covers(disp, self.stack_size(), write))
    }

    fn moved(&mut self, n: i32) {
        if let Some(g) = &mut self.group
            && g.base == 4
        {
            g.moved += n;
        }
    }

    /// Pushes what `value` puts into the register it returns; it may use `scratch` only.
    fn push_word(&mut self, live: FlagSet, value: impl FnOnce(&mut Emitter, u8) -> u8) {
        let n = self.stack_size();
        if self.stack_member(-n, true) {
            let at = self.rsp_pending - n;
            let r = value(self, R10);
            if self.code64 {
                dynasm!(self.hot ; .arch x64 ; mov [r12 + r13 + at], Rq(r));
            } else {
                dynasm!(self.hot ; .arch x64 ; mov [r12 + r13 + at], Rd(r));
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
        self.moved(-n);
    }

    /// Loads the word at the top of the stack into host register `r`; RSP stays.
    fn load_top(&mut self, r: u8, live: FlagSet) {
        if self.stack_member(0, false) {
            let at = self.rsp_pending;
            if self.code64 {
                dynasm!(self.hot ; .arch x64 ; mov Rq(r), [r12 + r13 + at]);
            } else {
                dynasm!(self.hot ; .arch x64 ; mov Rd(r), [r12 + r13 + at]);
            }
        } else {
            self.sync_rsp();
            self.access(regs::HOST_RSP, self.stack_size() as u32, false, live);
            self.load_stack(r);
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
    pub(crate) fn tolerates_pending_rsp(&self, instr: &Instruction, class: crate::classify::Class) -> bool {
        use crate::classify::Class;
        let n = self.stack_size();
        let names_rsp = (0..instr.op_count()).any(|i| {
            let r = instr.op_register(i);
            r.is_gpr() && regs::number(r) == 4
        });
        let memory = (0..instr.op_count()).any(|i| instr.op_kind(i) == OpKind::Memory);
        match class {
            Class::Push => !names_rsp && !memory && self.stack_member(-n, true),
            Class::Pop => !names_rsp && self.stack_member(0, false),
            Class::Call => self.stack_member(-n, true),
            Class::Ret => self.stack_member(0, false),
            Class::Nop => true,
            Class::Identity(0) => {
                use iced_x86::Mnemonic as M;
                !names_rsp
                    && !memory
                    && !instr.has_lock_prefix()
                    && !matches!(instr.mnemonic(), M::Div | M::Idiv)
            }
            _ => false,
        }
    }

    /// Loads the word-sized memory operand of PUSH, CALL or JMP into r11.
    fn load_operand(&mut self, instr: &Instruction, live: FlagSet) -> Result<(), Unfit> {
        let n = self.stack_size();
        if let Some((base, disp)) = self.member(instr, n as u32, false) {
            let b = self.guest(base, R11);
            if self.code64 {
                dynasm!(self.hot ; .arch x64 ; mov r11, [Rq(b) + r13 + disp]);
            } else {
                dynasm!(self.hot ; .arch x64 ; mov r11d, [Rq(b) + r13 + disp]);
            }
        } else {
            let ea = self.effective_address(instr, true)?;
            self.access(ea, n as u32, false, live);
            self.load_stack(R11);
        }
        Ok(())
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

    fn load_stack(&mut self, r: u8) {
        if self.code64 {
            dynasm!(self.hot ; .arch x64 ; mov Rq(r), [r11]);
        } else {
            dynasm!(self.hot ; .arch x64 ; mov Rd(r), [r11]);
        }
    }

    fn add_rsp(&mut self, from: u8, n: i32) {
        if self.code64 {
            dynasm!(self.hot ; .arch x64 ; lea r12, [Rq(from) + n]);
        } else {
            dynasm!(self.hot ; .arch x64 ; lea r12d, [Rq(from) + n]);
        }
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
        if !self.code64 || self.group.is_none() {
            self.sync_rsp();
        }
        self.moved(word);
    }

    /// LEAVE.
    pub(crate) fn leave(&mut self, site: Site) {
        self.access(5, self.stack_size() as u32, false, site.before);
        self.load_stack(R11);
        self.add_rsp(5, self.stack_size());
        self.set_guest(5, R11);
    }

    // ---- system instructions of hot kernel paths --------------------------------------------------------

    /// PUSHFQ, PUSHFD.
    pub(crate) fn pushf(&mut self, site: Site) {
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
        self.push_word(site.before, |e, scratch| {
            dynasm!(e.hot ; .arch x64 ; mov Rq(scratch), [rsp + ctx!(flags_image)]);
            scratch
        });
    }

    /// POPFQ, POPFD at CPL 0, where only IF and the status flags change; else the interpreter.
    pub(crate) fn popf(&mut self, site: Site) {
        self.load_top(R11, site.before);
        let slow = self.cold_here();
        self.cold_interpret(self.rip);
        // IF may become set while an interrupt waits: the interpreter takes it at the right moment.
        dynasm!(self.hot
            ; .arch x64
            ; movzx r10d, BYTE [rsp + ctx!(access_flag)]
            ; shl r10d, 18
            ; or r10d, [rsp + ctx!(system_flags)]
            ; xor r10d, r11d
            ; and r10d, 0x3F_7500
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
        let word = self.stack_size();
        self.add_rsp(regs::HOST_RSP, word);
        self.moved(word);
    }

    /// CLI and STI at CPL 0.
    pub(crate) fn set_interrupt_flag(&mut self, on: bool, site: Site) {
        if on {
            let keep = Self::keep(site.before);
            let grouped = self.group.is_some();
            Self::save(&mut self.hot, keep, grouped);
            dynasm!(self.hot ; .arch x64 ; cmp DWORD [rsp + ctx!(interrupt_pending)], 0);
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

    /// RDTSC and RDTSCP: the host's counter plus an offset.
    pub(crate) fn rdtsc(&mut self, instr: &Instruction, site: Site) {
        let keep = Self::keep(site.before);
        let grouped = true;
        Self::save(&mut self.hot, keep, grouped);
        let aux = instr.mnemonic() == iced_x86::Mnemonic::Rdtscp;
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

    /// Ends the block: the run loop does what `reason` says at `rip`.
    pub(crate) fn leave_for(&mut self, rip: u64, reason: Reason) {
        let cold = self.cold_here();
        self.cold_leave(rip, reason);
        self.hot.push(0xE9);
        self.hot_rel32(Target::Here(cold));
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

    // ---- strings and bit strings ------------------------------------------------------------------------

    /// A string instruction without REP, DF clear.
    pub(crate) fn string(&mut self, instr: &Instruction, site: Site) -> Result<(), Unfit> {
        use iced_x86::Mnemonic as M;
        let override_ = instr.has_segment_prefix() && NEED_FS_GS.contains(&instr.segment_prefix());
        let wide = if self.code64 { OpKind::MemoryESRDI } else { OpKind::MemoryESEDI };
        let wide_source = if self.code64 { OpKind::MemorySegRSI } else { OpKind::MemorySegESI };
        let fits = |k: OpKind| k == OpKind::Register || k == wide || k == wide_source;
        if override_ {
            return Err(Unfit);
        }
        if !(0..instr.op_count()).all(|i| fits(instr.op_kind(i))) {
            return Err(Unfit);
        }
        let size = instr.memory_size().size() as u32;
        if instr.has_rep_prefix() || instr.has_repne_prefix() {
            return self.repeated(instr, size, site);
        }
        const RSI: u8 = 6;
        const RDI: u8 = 7;
        let (source, destination) = match instr.mnemonic() {
            M::Stosb | M::Stosw | M::Stosd | M::Stosq => {
                self.access(RDI, size, true, site.before);
                self.sized_store(0, size);
                (false, true)
            }
            M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => {
                self.access(RSI, size, false, site.before);
                self.sized_load(0, size);
                (true, false)
            }
            M::Scasb | M::Scasw | M::Scasd | M::Scasq => {
                self.access(RDI, size, false, site.before);
                self.sized_compare(0, size);
                (false, true)
            }
            M::Movsb | M::Movsw | M::Movsd | M::Movsq => {
                self.load_to_tmp(RSI, size, site.before);
                self.access(RDI, size, true, site.before);
                dynasm!(self.hot ; .arch x64 ; mov r10, [rsp + ctx!(tmp)]);
                self.sized_store(R10, size);
                (true, true)
            }
            _ => {
                self.load_to_tmp(RSI, size, site.before);
                self.access(RDI, size, false, site.before);
                dynasm!(self.hot ; .arch x64 ; mov r10, [rsp + ctx!(tmp)]);
                self.sized_compare(R10, size);
                (true, true)
            }
        };
        for (r, moves) in [(RSI, source), (RDI, destination)] {
            let n = size as i32;
            match (moves, self.code64) {
                (true, true) => dynasm!(self.hot ; .arch x64 ; lea Rq(r), [Rq(r) + n]),
                (true, false) => dynasm!(self.hot ; .arch x64 ; lea Rd(r), [Rq(r) + n]),
                _ => {}
            }
        }
        Ok(())
    }

    /// REP STOS and REP MOVS whose operands stay inside a page each: the host's own, on host addresses. Longer ones are
    /// the interpreter's, which goes by page spans.
    fn repeated(&mut self, instr: &Instruction, size: u32, site: Site) -> Result<(), Unfit> {
        use iced_x86::Mnemonic as M;
        let moves = match instr.mnemonic() {
            M::Stosb | M::Stosw | M::Stosd | M::Stosq => false,
            M::Movsb | M::Movsw | M::Movsd | M::Movsq => true,
            _ => return Err(Unfit),
        };
        // Nothing at all happens for a count of zero: jrcxz over a short jump, to a long jump to the end.
        dynasm!(self.hot ; .arch x64 ; .u8 0xE3, 2, 0xEB, 5);
        self.hot.push(0xE9);
        let done = self.hot_here();
        self.hot.push_i32(0);
        let keep = Self::keep(site.before);
        Self::save(&mut self.hot, keep, true);
        let slow = self.cold_here();
        Self::restore(&mut self.cold, keep, true);
        self.cold_interpret(self.rip);
        let shift = size.trailing_zeros() as i8;
        dynasm!(self.hot ; .arch x64 ; cmp rcx, 4096);
        self.hot_jcc(7, slow);
        dynasm!(self.hot ; .arch x64 ; mov r10d, ecx ; shl r10d, shift);
        for r in if moves { [6, 7].as_slice() } else { [7].as_slice() } {
            let r = *r;
            dynasm!(self.hot
                ; .arch x64
                ; lea r11, [Rq(r) + r10 - 1]
                ; xor r11, Rq(r)
                ; test r11, !0xFFF
            );
            self.hot_jcc(5, slow);
        }
        Self::restore(&mut self.hot, keep, true);
        if moves {
            self.access(6, 1, false, site.before);
            dynasm!(self.hot ; .arch x64 ; mov r10b, [r11] ; mov [rsp + ctx!(tmp)], r11);
        }
        self.access(7, 1, true, site.before);
        // The probes fault, if anything does (a non-canonical address), while all registers are the guest's.
        dynasm!(self.hot ; .arch x64 ; mov r10b, [r11]);
        let scale = [1, 2, 4, 8][shift as usize & 3];
        if moves {
            self.lea(R10, Some(6), Some(1), scale, 0, !self.code64);
            dynasm!(self.hot ; .arch x64 ; mov [rsp + ctx!(flags_image)], r10);
        }
        self.lea(R10, Some(7), Some(1), scale, 0, !self.code64);
        dynasm!(self.hot ; .arch x64 ; mov rdi, r11);
        if moves {
            dynasm!(self.hot ; .arch x64 ; mov rsi, [rsp + ctx!(tmp)]);
        }
        let mut host = match (moves, size) {
            (false, 1) => Instruction::with_rep_stosb(64),
            (false, 2) => Instruction::with_rep_stosw(64),
            (false, 4) => Instruction::with_rep_stosd(64),
            (false, _) => Instruction::with_rep_stosq(64),
            (true, 1) => Instruction::with_rep_movsb(64),
            (true, 2) => Instruction::with_rep_movsw(64),
            (true, 4) => Instruction::with_rep_movsd(64),
            (true, _) => Instruction::with_rep_movsq(64),
        }
        .map_err(|_| Unfit)?;
        host.set_segment_prefix(Register::None);
        self.encode(&host)?;
        dynasm!(self.hot ; .arch x64 ; mov rdi, r10);
        if moves {
            dynasm!(self.hot ; .arch x64 ; mov rsi, [rsp + ctx!(flags_image)]);
        }
        let end = self.hot_here();
        self.fixups.push((done, Target::Here(end)));
        Ok(())
    }

    fn load_to_tmp(&mut self, ea: u8, size: u32, live: FlagSet) {
        self.access(ea, size, false, live);
        self.sized_load(R10, size);
        dynasm!(self.hot ; .arch x64 ; mov [rsp + ctx!(tmp)], r10);
    }

    fn sized_store(&mut self, r: u8, size: u32) {
        match size {
            1 => dynasm!(self.hot ; .arch x64 ; mov [r11], Rb(r)),
            2 => dynasm!(self.hot ; .arch x64 ; mov [r11], Rw(r)),
            4 => dynasm!(self.hot ; .arch x64 ; mov [r11], Rd(r)),
            _ => dynasm!(self.hot ; .arch x64 ; mov [r11], Rq(r)),
        }
    }

    fn sized_load(&mut self, r: u8, size: u32) {
        match size {
            1 => dynasm!(self.hot ; .arch x64 ; mov Rb(r), [r11]),
            2 => dynasm!(self.hot ; .arch x64 ; mov Rw(r), [r11]),
            4 => dynasm!(self.hot ; .arch x64 ; mov Rd(r), [r11]),
            _ => dynasm!(self.hot ; .arch x64 ; mov Rq(r), [r11]),
        }
    }

    fn sized_compare(&mut self, r: u8, size: u32) {
        match size {
            1 => dynasm!(self.hot ; .arch x64 ; cmp Rb(r), [r11]),
            2 => dynasm!(self.hot ; .arch x64 ; cmp Rw(r), [r11]),
            4 => dynasm!(self.hot ; .arch x64 ; cmp Rd(r), [r11]),
            _ => dynasm!(self.hot ; .arch x64 ; cmp Rq(r), [r11]),
        }
    }

    /// BT, BTS, BTR, BTC with a register bit offset: the offset picks the word, then the bit in it.
    pub(crate) fn bit_string(&mut self, instr: &Instruction, form: &Form, site: Site) -> Result<(), Unfit> {
        let bit = instr.op1_register();
        let size = bit.size() as u32;
        let atomic = instr.has_lock_prefix();
        if size < 4 || (atomic && !site.before.is_empty()) {
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
        self.access(R10, size, write, site.before);
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
        self.sized_load(R10, size);
        dynasm!(self.hot ; .arch x64 ; mov [rsp + ctx!(tmp)], r11);
        let r = self.guest(n, R11);
        new.set_op0_kind(OpKind::Register);
        new.set_op0_register(regs::same_size(bit, R10));
        new.set_segment_prefix(Register::None);
        new.set_op1_register(regs::same_size(bit, r));
        self.encode(&new)?;
        if write {
            dynasm!(self.hot ; .arch x64 ; mov r11, [rsp + ctx!(tmp)]);
            self.sized_store(R10, size);
        }
        Ok(())
    }

    // ---- base groups ------------------------------------------------------------------------------------

    /// Starts a group: one check before the members, which leaves to the ungrouped copy of the rest if it fails.
    pub(crate) fn group(&mut self, plan: &crate::groups::Plan, live: FlagSet) {
        let keep = Self::keep(live);
        let retry = self.hot_here();
        let base = self.guest(plan.base, R10);
        let lo = plan.lo;
        dynasm!(self.hot
            ; .arch x64
            ; lea r10, [Rq(base) + lo]
            ; rorx r11, r10, 48
            ; shrx r11, r11, r15
        );
        if plan.write {
            dynasm!(self.hot ; .arch x64 ; mov r13, [r14 + r11 * 8 - 28]);
        } else {
            dynasm!(self.hot ; .arch x64 ; mov r13, [r15 + r11 * 8 - 28]);
        }
        Self::save(&mut self.hot, keep, true);
        dynasm!(self.hot ; .arch x64 ; test r13b, 1);
        let poison = self.cold_here();
        self.hot_jcc(5, poison);
        // Poison: fill the entry if that has no effect the guest did not ask for.
        Self::restore(&mut self.cold, keep, true);
        let info = 1 | MissInfo::SOFT | if plan.write { MissInfo::WRITE } else { 0 };
        dynasm!(self.cold ; .arch x64 ; mov r11d, info as i32);
        self.cold.push(0xE8);
        self.cold_rel32(Target::Cache(self.stubs.miss));
        let leave = Pos::Cold(self.cold.ops.len() + 10);
        self.cold_jmp(Target::Here(leave));
        self.cold_jmp(Target::Here(retry));
        debug_assert_eq!(leave, self.cold_here());
        let ungrouped = self.ungrouped_exit();
        let last = plan.hi - plan.lo - 1;
        dynasm!(self.hot ; .arch x64 ; lea r11, [r10 + last] ; xor r11, r10 ; test r11, !0xFFF);
        let cross = self.cold_here();
        self.hot_jcc(5, cross);
        Self::restore(&mut self.cold, keep, true);
        self.cold_jmp(Target::Here(ungrouped));
        Self::restore(&mut self.hot, keep, true);
        self.group = Some(Group { base: plan.base, lo: plan.lo, hi: plan.hi, write: plan.write, moved: 0 });
    }

    /// Cold code that leaves for the ungrouped copy at the current instruction.
    fn ungrouped_exit(&mut self) -> Pos {
        let here = self.cold_here();
        let number = self.first_link + self.links.len() as u32;
        self.cold.push(0xE9);
        let site = self.cold_here();
        self.cold.push_i32(0);
        let stub = self.cold_here();
        self.fixups.push((site, Target::Here(stub)));
        dynasm!(self.cold ; .arch x64 ; mov DWORD [rsp + ctx!(link)], number as i32);
        self.cold_leave(self.rip, Reason::Link);
        self.links.push(PendingLink { site, stub, flags_live: true, same_page: true, ungrouped: true });
        here
    }

    /// No member follows: r13 is free again.
    pub(crate) fn end_group(&mut self) {
        self.group = None;
    }

    /// RSP changed by a known amount in an instruction of its own.
    pub(crate) fn rsp_adjusted(&mut self, n: i32) {
        self.moved(n);
    }

    /// The base and displacement of a memory operand that the group covers.
    fn member(&self, instr: &Instruction, size: u32, write: bool) -> Option<(u8, i32)> {
        let g = self.group?;
        if crate::groups::operand_base(instr, self.code64) != Some(g.base) {
            return None;
        }
        let disp = instr.memory_displacement64() as i32;
        g.covers(disp, size as i32, write).then_some((g.base, disp))
    }

    /// Near CALL to a constant: pushes `next`, exits to `target`.
    pub(crate) fn call(&mut self, next: u64, target: u64, site: Site, live_out: FlagSet) {
        self.push_return(next, site.before);
        self.sync_rsp();
        self.direct_exit(target, live_out, false);
    }

    fn push_return(&mut self, next: u64, live: FlagSet) {
        self.push_word(live, |e, scratch| {
            Self::constant(&mut e.hot, scratch, next);
            scratch
        });
    }

    /// Near RET, popping `extra` bytes of arguments.
    pub(crate) fn ret(&mut self, extra: u32, site: Site) {
        self.load_top(R11, site.before);
        self.rsp_pending += self.stack_size() + extra as i32;
        self.sync_rsp();
        self.indirect_exit();
    }

    /// Near JMP or CALL through a register or memory.
    pub(crate) fn jump_indirect(
        &mut self,
        instr: &Instruction,
        call: Option<u64>,
        site: Site,
    ) -> Result<(), Unfit> {
        if instr.op0_kind() == OpKind::Memory {
            self.load_operand(instr, site.before)?;
        } else {
            let r = self.guest(regs::number(instr.op0_register()), R11);
            if r != R11 {
                dynasm!(self.hot ; .arch x64 ; mov r11, Rq(r));
            }
        }
        if let Some(next) = call {
            dynasm!(self.hot ; .arch x64 ; mov [rsp + ctx!(tmp)], r11);
            self.push_return(next, site.before);
            self.sync_rsp();
            dynasm!(self.hot ; .arch x64 ; mov r11, [rsp + ctx!(tmp)]);
        }
        self.indirect_exit();
        Ok(())
    }

    /// Conditional jump; ends the block with two exits.
    pub(crate) fn jcc(&mut self, cc: u8, target: u64, next: u64, live_taken: FlagSet, live_next: FlagSet) {
        if target <= self.rip {
            self.hot.push(0x0F);
            self.hot.push(0x80 | (cc ^ 1));
            let site = self.hot_here();
            self.hot.push_i32(0);
            self.direct_exit(target, live_taken, true);
            let over = self.hot_here();
            self.fixups.push((site, Target::Here(over)));
        } else {
            self.hot.push(0x0F);
            self.hot.push(0x80 | cc);
            self.link_here(target, live_taken);
        }
        self.direct_exit(next, live_next, false);
    }

    /// Jumps to linear address `target`; polls for attention first when it may close a loop.
    pub(crate) fn direct_exit(&mut self, target: u64, live: FlagSet, polled: bool) {
        if polled || target <= self.rip {
            self.poll(target, live);
        }
        self.hot.push(0xE9);
        self.link_here(target, live);
    }

    /// The displacement of a chainable jump, and its stub.
    fn link_here(&mut self, target: u64, live: FlagSet) {
        let number = self.first_link + self.links.len() as u32;
        let stub = self.cold_here();
        dynasm!(self.cold ; .arch x64 ; mov DWORD [rsp + ctx!(link)], number as i32);
        self.cold_leave(target, Reason::Link);
        let site = self.hot_rel32(Target::Here(stub));
        self.links.push(PendingLink {
            site,
            stub,
            flags_live: !live.is_empty(),
            same_page: target >> 12 == self.page,
            ungrouped: false,
        });
    }

    fn cold_leave(&mut self, rip: u64, reason: Reason) {
        Self::constant(&mut self.cold, R10, rip);
        dynasm!(self.cold
            ; .arch x64
            ; mov [rsp + ctx!(rip)], r10
            ; mov r10d, reason as i32
        );
        self.cold_jmp(Target::Cache(self.stubs.exit));
    }

    fn poll(&mut self, target: u64, live: FlagSet) {
        dynasm!(self.hot ; .arch x64 ; mov r10, [rsp + ctx!(attention)]);
        if live.is_empty() {
            dynasm!(self.hot ; .arch x64 ; cmp DWORD [r10], 0);
            let cold = self.cold_here();
            self.hot_jcc(5, cold);
        } else {
            dynasm!(self.hot ; .arch x64 ; mov r10d, [r10]);
            self.jump_unless_zero();
        }
        self.cold_leave(target, Reason::Attention);
    }

    /// Goes on if r10 is zero, to the cold code that follows otherwise; keeps flags. Uses r13.
    fn jump_unless_zero(&mut self) {
        dynasm!(self.hot ; .arch x64 ; mov r13, rcx ; mov rcx, r10 ; .u8 0xE3, 8);
        // jrcxz over `mov rcx, r13; jmp cold`: 3 + 5 bytes.
        dynasm!(self.hot ; .arch x64 ; mov rcx, r13);
        self.hot.push(0xE9);
        let cold = self.cold_here();
        self.hot_rel32(Target::Here(cold));
        dynasm!(self.hot ; .arch x64 ; mov rcx, r13);
    }

    /// Jumps to the linear address in r11 through the jump cache; r13 tells where from.
    fn indirect_exit(&mut self) {
        dynasm!(self.hot
            ; .arch x64
            ; movzx r10d, r11w
            ; mov r13, [rsp + ctx!(jump_cache)]
            ; lea r10, [r13 + r10 * 8]
            ; lea r13, [rip - 1]
            ; jmp QWORD [r10]
        );
    }

    /// The indirect entry: checks that r11 is this block's address and polls, then falls into the direct entry.
    pub(crate) fn indirect_entry(&mut self, lin: u64, live: FlagSet) {
        // r13 names the source of the jump: flags are kept in memory.
        let keep = Self::keep(live);
        Self::save(&mut self.hot, keep, true);
        Self::constant(&mut self.hot, R10, lin);
        dynasm!(self.hot ; .arch x64 ; cmp r10, r11);
        let miss = self.cold_here();
        self.hot_jcc(5, miss);
        Self::restore(&mut self.cold, keep, true);
        self.cold_jmp(Target::Cache(self.stubs.indirect));
        dynasm!(self.hot ; .arch x64 ; mov r10, [rsp + ctx!(attention)] ; cmp DWORD [r10], 0);
        let attention = self.cold_here();
        self.hot_jcc(5, attention);
        Self::restore(&mut self.cold, keep, true);
        self.cold_leave(lin, Reason::Attention);
        Self::restore(&mut self.hot, keep, true);
    }

    /// At the direct entry: leaves to look the block up again unless cell `slot` holds `page` (for an instruction
    /// that crosses into a page whose mapping may have changed).
    pub(crate) fn check_page(&mut self, slot: u32, page: u32, lin: u64, live: FlagSet) {
        let keep = Self::keep(live);
        Self::save(&mut self.hot, keep, self.group.is_some());
        let at = xslot_offset(slot);
        dynasm!(self.hot ; .arch x64 ; cmp DWORD [rsp + at], page as i32);
        let cold = self.cold_here();
        self.hot_jcc(5, cold);
        Self::restore(&mut self.cold, keep, self.group.is_some());
        self.cold_leave(lin, Reason::Indirect);
        Self::restore(&mut self.hot, keep, self.group.is_some());
    }

    /// Adds to the retired-instruction counter.
    pub(crate) fn count(&mut self, instructions: u32) {
        let n = instructions as i32;
        dynasm!(self.hot
            ; .arch x64
            ; mov r10, [rsp + ctx!(instructions)]
            ; lea r10, [r10 + n]
            ; mov [rsp + ctx!(instructions)], r10
        );
    }

    /// Leaves to interpret the instruction at `rip`.
    pub(crate) fn interpret(&mut self, rip: u64) {
        Self::constant(&mut self.hot, R10, rip);
        dynasm!(self.hot ; .arch x64 ; mov [rsp + ctx!(rip)], r10);
        self.hot.push(0xE9);
        self.hot_rel32(Target::Cache(self.stubs.interpret));
    }

    /// Drops hot code from `len` on (an instruction turned out not to fit). Cold code of it stays, unreachable.
    pub(crate) fn rewind(&mut self, len: usize) {
        self.hot.ops.truncate(len);
        self.fixups.retain(|(at, _)| !matches!(at, Pos::Hot(p) if *p >= len));
    }

    /// Offset in the finished code.
    pub(crate) fn offset(&self, pos: Pos) -> u32 {
        match pos {
            Pos::Hot(n) => n as u32,
            Pos::Cold(n) => (self.hot.ops.len() + n) as u32,
        }
    }

    /// Joins the buffers into `out` for placement at `start`.
    pub(crate) fn finish(&mut self, start: CodeOffset, out: &mut Vec<u8>) {
        out.clear();
        out.extend_from_slice(&self.hot.ops);
        out.extend_from_slice(&self.cold.ops);
        for &(at, target) in &self.fixups {
            let site = self.offset(at);
            let target = match target {
                Target::Here(p) => self.offset(p),
                Target::Cache(c) => c.0.wrapping_sub(start.0),
            };
            let rel = target.wrapping_sub(site + 4);
            out[site as usize..site as usize + 4].copy_from_slice(&rel.to_le_bytes());
        }
    }
}

impl Group {
    fn covers(&self, disp: i32, size: i32, write: bool) -> bool {
        let lo = self.moved.wrapping_add(disp);
        lo >= self.lo && lo.saturating_add(size) <= self.hi && (self.write || !write)
    }
}

/// Makes the memory operand `[base + r13 + disp]`.
fn address_by_group(instr: &mut Instruction, base: u8, disp: i32) {
    instr.set_memory_base(Register::RAX + u32::from(base));
    instr.set_memory_index(Register::R13);
    instr.set_memory_index_scale(1);
    instr.set_memory_displacement64(i64::from(disp) as u64);
    instr.set_memory_displ_size(if disp == 0 { 0 } else { 1 });
}

/// Offset of a page-validation cell from host RSP.
pub(crate) fn xslot_offset(slot: u32) -> i32 {
    std::mem::offset_of!(JitContext, xslots) as i32 + slot as i32 * 4
}

/// A jump to `target` that first checks page-validation cell `slot`; used to chain blocks of different pages.
/// Returns the code and nothing else: positions are `start`-relative.
pub(crate) fn link_thunk(
    start: CodeOffset,
    slot: u32,
    page: u32,
    flags_live: bool,
    stub: CodeOffset,
    target: CodeOffset,
) -> Vec<u8> {
    let mut ops = SimpleAssembler::new();
    let at = xslot_offset(slot);
    let rel = |ops: &mut SimpleAssembler, to: CodeOffset| {
        let site = start.0 as i32 + ops.offset().0 as i32;
        ops.push_i32(to.0 as i32 - (site + 4));
    };
    if flags_live {
        let minus = (page as i32).wrapping_neg();
        dynasm!(ops
            ; .arch x64
            ; mov r13, rcx
            ; mov ecx, [rsp + at]
            ; lea ecx, [rcx + minus]
            ; .u8 0xE3, 8 // jrcxz over the next two
            ; mov rcx, r13
        );
        ops.push(0xE9);
        rel(&mut ops, stub);
        dynasm!(ops ; .arch x64 ; mov rcx, r13);
    } else {
        dynasm!(ops ; .arch x64 ; cmp DWORD [rsp + at], page as i32);
        ops.push(0x0F);
        ops.push(0x85);
        rel(&mut ops, stub);
    }
    ops.push(0xE9);
    rel(&mut ops, target);
    ops.finalize()
}

/// Replaces forms that 64-bit mode encodes differently.
fn normalize(instr: &mut Instruction) -> Result<(), Unfit> {
    let code = match instr.code() {
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Dec_r32 => Code::Dec_rm32,
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Dec_r16 => Code::Dec_rm16,
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

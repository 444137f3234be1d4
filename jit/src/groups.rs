//! Base groups: one check for all accesses of a block whose addresses differ by constants.
//!
//! Struct fields, pushes, pops, stack slots and neighbours in arrays use small displacements off registers that do not change in
//! between, or by constants; so do variables at fixed addresses. A group checks once that the range of its members lies on one
//! page that the view allows, keeps the host address of its beginning in r9, and each member becomes a single instruction with
//! `[r9 + disp]`. Where the check
//! fails the block goes on in its ungrouped copy; a group check never raises the guest's fault.

use crate::block::Mode;
use crate::classify::{Class, Form, stack_word};
use crate::flags::FlagSet;
use crate::regs;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use paravane_memory::split_locks_are_dear;

const RSP: u8 = 4;
/// Groups of a block that keep their delta in the context.
pub(crate) const SLOTS: usize = 4;
/// Members below which a group in the context does not pay.
const SLOT_MEMBERS: u32 = 3;
/// Bytes a group may span.
const MAX_SPAN: i32 = 2048;

/// What the addresses of a group have in common, without a constant: `base + index * scale`, or nothing at all.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Key {
    /// Guest register numbers.
    pub(crate) base: Option<u8>,
    pub(crate) index: Option<u8>,
    pub(crate) scale: u8,
    /// Counts from RIP: such addresses move with the code (see `block::moving`), others at constants do not.
    pub(crate) relative: bool,
}

impl Key {
    pub(crate) const STACK: Key = Key { base: Some(RSP), index: None, scale: 1, relative: false };

    /// By how much addresses move if `register` does by `n`.
    pub(crate) fn step(self, register: u8, n: i32) -> i32 {
        let by_index = if self.index == Some(register) { i32::from(self.scale) } else { 0 };
        n.saturating_mul(i32::from(self.base == Some(register)) + by_index)
    }

    fn names(self, register: u8) -> bool {
        self.base == Some(register) || self.index == Some(register)
    }

    /// Whether it names one of some registers, one bit each.
    pub(crate) fn names_any(self, registers: u16) -> bool {
        [self.base, self.index].into_iter().flatten().any(|r| registers >> r & 1 != 0)
    }
}

/// A memory operand that can be a member.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operand {
    pub(crate) key: Key,
    pub(crate) disp: u64,
}

impl Operand {
    /// How far behind `anchor` it is. Constant addresses belong together only where they are close.
    pub(crate) fn behind(self, key: Key, anchor: u64) -> Option<i32> {
        let disp = i32::try_from(self.disp.wrapping_sub(anchor) as i64).ok()?;
        let close = key.base.is_some() || key.index.is_some() || disp.unsigned_abs() < MAX_SPAN as u32;
        (self.key == key && close).then_some(disp)
    }
}

/// The group of a block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) key: Key,
    /// What displacements count from.
    pub(crate) anchor: u64,
    /// Range of displacements, with the registers as they are at the check.
    pub(crate) lo: i32,
    pub(crate) hi: i32,
    /// Some member writes.
    pub(crate) write: bool,
    /// Bytes of the widest member.
    pub(crate) widest: i32,
    /// The check goes before this instruction.
    pub(crate) check: usize,
    /// The last member.
    pub(crate) last: usize,
    /// Where the host address of `lo` is kept: in r9, or in this slot of the context.
    pub(crate) slot: Option<usize>,
}

/// A run of instructions over which the registers of an address are unchanged or moved by known amounts.
/// Displacements count from their values at its start.
struct Region {
    key: Key,
    anchor: u64,
    /// How far the address moved since the region's start.
    moved: i32,
    /// The first member, or as far as the region went without one, and `moved` before it.
    first: (usize, i32),
    /// The last instruction up to `first` before which no flags are live, and `moved` there.
    free: Option<(usize, i32)>,
    members: u32,
    lo: i32,
    hi: i32,
    write: bool,
    widest: i32,
    last: usize,
    /// A member lies too far from the others: no more are taken.
    full: bool,
}

impl Region {
    fn new(key: Key, anchor: u64, start: usize, upto: usize, live: &[FlagSet]) -> Region {
        let free = (start..=upto).rev().find(|&i| live[i].is_empty());
        Region {
            key,
            anchor,
            moved: 0,
            first: (upto, 0),
            free: free.map(|i| (i, 0)),
            members: 0,
            lo: 0,
            hi: 0,
            write: false,
            widest: 0,
            last: start,
            full: false,
        }
    }

    /// Instruction `i` comes next.
    fn reach(&mut self, i: usize, live: &[FlagSet]) {
        if self.members == 0 && self.first.0 + 1 == i {
            self.first = (i, self.moved);
            if live[i].is_empty() {
                self.free = Some(self.first);
            }
        }
    }

    fn add(&mut self, at: usize, disp: i32, size: i32, write: bool) {
        let lo = self.moved.saturating_add(disp);
        let hi = lo.saturating_add(size);
        let (min, max) = if self.members == 0 { (lo, hi) } else { (self.lo.min(lo), self.hi.max(hi)) };
        if self.full || max.saturating_sub(min) > MAX_SPAN || lo.unsigned_abs() > 1 << 30 {
            self.full = true;
            return;
        }
        (self.lo, self.hi) = (min, max);
        self.write |= write;
        self.widest = self.widest.max(size);
        self.members += 1;
        self.last = at;
    }

    /// The check goes where no flags are live, as late as possible, else right before the first member.
    fn plan(&self) -> Plan {
        let (check, moved) = self.free.unwrap_or(self.first);
        Plan {
            key: self.key,
            anchor: self.anchor,
            lo: self.lo - moved,
            hi: self.hi - moved,
            write: self.write,
            widest: self.widest,
            check,
            last: self.last,
            slot: None,
        }
    }
}

/// Finds the groups of blocks; its buffers are reused.
#[derive(Default)]
pub(crate) struct Planner {
    /// Regions under construction and those finished.
    open: Vec<Region>,
    done: Vec<Region>,
    /// First instruction at which each register has its present value.
    since: [usize; 16],
    pub(crate) plans: Vec<Plan>,
}

impl Planner {
    /// The region that `operand` belongs to, and its displacement there.
    fn region(&mut self, operand: Operand, at: usize, live: &[FlagSet]) -> (&mut Region, i32) {
        let known = |r: &Region| operand.behind(r.key, r.anchor);
        if let Some((k, disp)) = self.open.iter().enumerate().find_map(|(k, r)| Some((k, known(r)?))) {
            return (&mut self.open[k], disp);
        }
        let Operand { key, disp } = operand;
        let registers = [key.base, key.index].into_iter().flatten();
        let since = registers.map(|r| self.since[r as usize]).max();
        let (anchor, disp) = if since.is_some() { (0, disp as i32) } else { (disp, 0) };
        self.open.push(Region::new(key, anchor, since.unwrap_or(0), at, live));
        (self.open.last_mut().expect("just pushed"), disp)
    }

    fn stack(&mut self, at: usize, live: &[FlagSet]) -> &mut Region {
        self.region(Operand { key: Key::STACK, disp: 0 }, at, live).0
    }

    fn close(&mut self, register: u8, at: usize) {
        self.since[register as usize] = at + 1;
        while let Some(k) = self.open.iter().position(|r| r.key.names(register)) {
            let r = self.open.swap_remove(k);
            self.consider(r);
        }
    }

    /// `register` moves by `n` at `at`: whether regions go on. Only that of RSP does before its first member.
    fn follow(&mut self, register: u8, at: usize, n: i32, live: &[FlagSet]) -> bool {
        if register == RSP {
            self.stack(at, live);
        }
        let mut known = false;
        for r in self.open.iter_mut().filter(|r| r.key.names(register)) {
            r.moved = r.moved.saturating_add(r.key.step(register, n));
            known = true;
        }
        // Regions that begin later count from the new value.
        self.since[register as usize] = at + 1;
        known
    }

    /// A group pays if it saves checks.
    fn consider(&mut self, r: Region) {
        if r.members >= 2 {
            self.done.push(r);
        }
    }

    /// Finds the useful groups of a block, the most useful first.
    pub(crate) fn plan(&mut self, instrs: &[Instruction], forms: &[Form], live: &[FlagSet], mode: Mode) {
        self.plans.clear();
        // Windows have probes instead.
        if mode.has(Mode::WINDOW) || candidates(forms) < 2 {
            return;
        }
        self.open.clear();
        self.done.clear();
        self.since = [0; 16];
        self.find_regions(instrs, forms, live, mode.code64());
        let mut open = std::mem::take(&mut self.open);
        open.drain(..).for_each(|r| self.consider(r));
        self.open = open;
        self.done.sort_by_key(|r| std::cmp::Reverse(r.members));
        for r in &self.done {
            self.plans.extend(place(r, &self.plans));
        }
    }

    fn find_regions(&mut self, instrs: &[Instruction], forms: &[Form], live: &[FlagSet], code64: bool) {
        for (i, instr) in instrs.iter().enumerate() {
            let form = &forms[i];
            let ends = matches!(
                form.class,
                Class::Interpret
                    | Class::Syscall
                    | Class::Sysret
                    | Class::Iret
                    | Class::Stac
                    | Class::Clac
                    | Class::LoadSegment
            );
            if ends {
                // Another view or segment begins here: what was checked before need not hold behind it.
                break;
            }
            self.open.iter_mut().for_each(|r| r.reach(i, live));
            if form.memory.is_some()
                && let Some(operand) = grouped_operand(instr, form, code64)
            {
                let size = i32::from(form.memory_size);
                let write = form.writes_memory;
                let (region, disp) = self.region(operand, i, live);
                region.add(i, disp, size, write);
            }
            match form.class {
                Class::Push | Class::Pushf | Class::Call | Class::CallIndirect => {
                    let word = stack_word(instr) as i32;
                    self.stack(i, live).add(i, -word, word, true);
                    self.follow(RSP, i, -word, live);
                }
                Class::Pop | Class::Ret | Class::Popf => {
                    let word = stack_word(instr) as i32;
                    self.stack(i, live).add(i, 0, word, false);
                    self.follow(RSP, i, word, live);
                }
                _ => {}
            }
            let mut modified = modified(instr, form);
            if form.steps
                && let Some((base, n)) = adjustment(instr, code64)
                && self.follow(base, i, n, live)
            {
                modified &= !(1 << base);
            }
            while modified != 0 {
                self.close(modified.trailing_zeros() as u8, i);
                modified &= modified - 1;
            }
        }
    }
}

/// Gives a region r9 or a slot of the context that no other uses in between.
fn place(region: &Region, plans: &[Plan]) -> Option<Plan> {
    let plan = region.plan();
    let free = |slot: &Option<usize>| {
        plans.iter().all(|p| p.slot != *slot || p.last < plan.check || plan.last < p.check)
    };
    let in_context = if region.members >= SLOT_MEMBERS { SLOTS } else { 0 };
    let slot = std::iter::once(None).chain((0..in_context).map(Some)).find(free)?;
    Some(Plan { slot, ..plan })
}

/// Instructions that may become members.
fn candidates(forms: &[Form]) -> usize {
    let stack =
        |c: Class| matches!(c, Class::Push | Class::Pop | Class::Call | Class::CallIndirect | Class::Ret);
    forms.iter().filter(|f| f.memory.is_some() || stack(f.class)).count()
}

/// The memory operand, if it can be a member.
fn grouped_operand(instr: &Instruction, form: &Form, code64: bool) -> Option<Operand> {
    match form.class {
        Class::Identity(_) | Class::Push | Class::CallIndirect | Class::JmpIndirect => {}
        _ => return None,
    }
    operand(instr, u32::from(form.memory_size), code64)
}

/// The memory operand, of `size` bytes, of an instruction that has one, in a flat segment and by registers of the code's size.
pub(crate) fn operand(instr: &Instruction, size: u32, code64: bool) -> Option<Operand> {
    // A member is not checked for alignment.
    if is_locked(instr) && split_locks_are_dear() {
        return None;
    }
    let flat = match instr.memory_segment() {
        Register::FS | Register::GS => false,
        Register::CS => code64,
        _ => true,
    };
    if !flat || size == 0 || has_high_byte(instr, size) {
        return None;
    }
    let disp = instr.memory_displacement64();
    let (base, index) = (instr.memory_base(), instr.memory_index());
    if base == Register::RIP || base == Register::None && index == Register::None {
        let wide = code64 || instr.memory_displ_size() == 4;
        let relative = base == Register::RIP;
        return wide.then_some(Operand { key: Key { base: None, index: None, scale: 1, relative }, disp });
    }
    let wide = |r: Register| r.is_gpr() && r.size() == if code64 { 8 } else { 4 };
    let number = |r: Register| (r != Register::None).then(|| regs::number(r));
    if [base, index].into_iter().any(|r| r != Register::None && !wide(r)) {
        return None;
    }
    let (base, index) = (number(base), number(index));
    let scale = if index.is_some() { instr.memory_index_scale() as u8 } else { 1 };
    let disp = i64::from(disp as i32) as u64;
    Some(Operand { key: Key { base, index, scale, relative: false }, disp })
}

/// Whether a register beside a memory operand of `size` bytes is AH, CH, DH or BH: bytes go with bytes.
pub(crate) fn has_high_byte(instr: &Instruction, size: u32) -> bool {
    size == 1 && (0..instr.op_count()).any(|i| regs::is_high_byte(instr.op_register(i)))
}

/// Whether the access is a locked one; XCHG with memory is, prefix or not.
pub(crate) fn is_locked(instr: &Instruction) -> bool {
    instr.has_lock_prefix() || instr.mnemonic() == Mnemonic::Xchg
}

/// `add r, imm`, `sub r, imm`, `inc r`, `dec r`, `lea r, [r + disp]`: the register and its known change. In 64-bit code a write
/// to 32 bits is none: it clears the upper half, and what a group knew of the register's page no longer holds.
pub(crate) fn adjustment(instr: &Instruction, code64: bool) -> Option<(u8, i32)> {
    let r = instr.op0_register();
    if instr.op0_kind() != OpKind::Register || !r.is_gpr() || r.size() != if code64 { 8 } else { 4 } {
        return None;
    }
    Some((regs::number(r), change(instr, r)?))
}

/// By how much `instr` moves `r`, its first operand.
fn change(instr: &Instruction, r: Register) -> Option<i32> {
    match instr.mnemonic() {
        Mnemonic::Add | Mnemonic::Sub
            if instr.op1_kind() != OpKind::Register && instr.op1_kind() != OpKind::Memory =>
        {
            let n = i32::try_from(instr.immediate(1) as i64).ok().or_else(|| {
                // 32-bit code: the immediate is not sign-extended to 64 bits.
                u32::try_from(instr.immediate(1)).ok().map(|v| v as i32)
            })?;
            let n = if instr.mnemonic() == Mnemonic::Add { n } else { n.checked_neg()? };
            (n.checked_abs()? <= MAX_SPAN).then_some(n)
        }
        Mnemonic::Inc => Some(1),
        Mnemonic::Dec => Some(-1),
        Mnemonic::Lea if instr.memory_base() == r && instr.memory_index() == Register::None => {
            let n = instr.memory_displacement64() as i32;
            (n.checked_abs()? <= MAX_SPAN).then_some(n)
        }
        _ => None,
    }
}

/// Whether [`adjustment`] may find something.
pub(crate) fn may_step(m: Mnemonic) -> bool {
    matches!(m, Mnemonic::Add | Mnemonic::Sub | Mnemonic::Inc | Mnemonic::Dec | Mnemonic::Lea)
}

/// The registers `instr` may change in a way a group does not follow, one bit each.
pub(crate) fn modified(instr: &Instruction, form: &Form) -> u16 {
    let (mut mask, mut written) = (form.implicit, form.written);
    while written != 0 {
        let i = written.trailing_zeros();
        written &= written - 1;
        let r = instr.op_register(i);
        if instr.op_kind(i) == OpKind::Register && r.is_gpr() {
            mask |= 1 << regs::number(r);
        }
    }
    mask
}

/// The registers that an instruction writes without naming them, as far as groups care; RSP is followed elsewhere.
pub(crate) fn implicitly_modified(m: Mnemonic, class: Class) -> u16 {
    const RAX: u16 = 1 << 0;
    const RCX: u16 = 1 << 1;
    const RDX: u16 = 1 << 2;
    const RBX: u16 = 1 << 3;
    match class {
        Class::Leave => 1 << RSP | 1 << 5,
        Class::Rdtsc => RAX | RCX | RDX,
        // RSI, RDI, and what they load or count with.
        Class::String => RAX | RCX | 1 << 6 | 1 << 7,
        _ if writes_accumulators(m) => RAX | RCX | RDX | RBX,
        _ => 0,
    }
}

/// The few instructions that write RAX, RCX, RDX or RBX without naming them.
fn writes_accumulators(m: Mnemonic) -> bool {
    matches!(
        m,
        Mnemonic::Mul
            | Mnemonic::Imul
            | Mnemonic::Div
            | Mnemonic::Idiv
            | Mnemonic::Cbw
            | Mnemonic::Cwde
            | Mnemonic::Cdqe
            | Mnemonic::Cwd
            | Mnemonic::Cdq
            | Mnemonic::Cqo
            | Mnemonic::Cmpxchg
            | Mnemonic::Cmpxchg8b
            | Mnemonic::Cmpxchg16b
            | Mnemonic::Lahf
            | Mnemonic::Pcmpestri
            | Mnemonic::Pcmpistri
            | Mnemonic::Vpcmpestri
            | Mnemonic::Vpcmpistri
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::classify::Forms;
    use iced_x86::{Decoder, DecoderOptions, InstructionInfoFactory, OpAccess};
    use paravane_cpu::{HostFeatures, model_by_name};

    /// What is known of an address ends where the instruction set says that one of its registers is written.
    #[test]
    fn no_register_changes_unseen() {
        let mut forms = Forms::new(model_by_name("max", &HostFeatures::detect()).expect("a model"));
        let mut info = InstructionInfoFactory::new();
        let mut random = 0x2545_F491_4F6C_DD1D_u64;
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        let mut seen = std::collections::HashSet::new();
        for n in 0..2_000_000_u32 {
            let (bits, code64) = if n % 2 == 0 { (64, true) } else { (32, false) };
            let mut bytes = [next().to_le_bytes(), next().to_le_bytes()].concat();
            let start: &[u8] = match n / 2 % 8 {
                0 => &[0x0F],
                1 => &[0x66, 0x0F],
                2 => &[0xF3, 0x0F],
                3 => &[0xF3],
                4 => &[0xF2, 0x0F],
                5 => &[0xC4, 0xE2],
                6 => &[0x0F, 0xAE],
                _ => &[],
            };
            bytes.splice(..0, start.iter().copied());
            let instr = Decoder::with_ip(bits, &bytes, 0x1000, DecoderOptions::NONE).decode();
            let form = *forms.form(&instr);
            if instr.is_invalid() || !form.class.straight() {
                continue;
            }
            let step = if form.steps { adjustment(&instr, code64) } else { None };
            let seen_changes = modified(&instr, &form) | step.map_or(0, |(r, _)| 1 << r);
            for used in info.info(&instr).used_registers() {
                let (r, access) = (used.register(), used.access());
                let reads = matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess);
                // RSP moves with words on the stack, by what the emitter knows.
                let stack = matches!(form.class, Class::Push | Class::Pop | Class::Pushf | Class::Popf)
                    || form.class == Class::LoadSegment && instr.mnemonic() == Mnemonic::Pop;
                if reads || !r.is_gpr() || stack && regs::number(r) == RSP {
                    continue;
                }
                assert!(seen_changes >> regs::number(r) & 1 != 0, "{instr} changes {r:?}");
                seen.insert(instr.mnemonic());
            }
        }
        assert!(seen.len() > 100, "{}", seen.len());
    }
}

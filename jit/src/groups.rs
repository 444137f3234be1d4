//! Base groups: one check for all accesses of a block off one base register.
//!
//! Struct fields, pushes, pops and stack slots use small displacements off a register that does not change in
//! between. A group checks once that `[base + lo, base + hi)` lies on one page that the view allows, keeps the page's
//! delta in r13, and each member becomes a single instruction with `[base + r13 + disp]`. Where the check
//! fails the block goes on in its ungrouped copy; a group check never raises the guest's fault.

use crate::classify::{Class, Form, stack_word};
use crate::flags::FlagSet;
use crate::regs;
use iced_x86::{Instruction, Mnemonic, OpAccess, OpKind, Register};

const RSP: u8 = 4;
/// Groups of a block that keep their delta in the context.
pub(crate) const SLOTS: usize = 4;
/// Members below which a group in the context does not pay.
const SLOT_MEMBERS: u32 = 3;
/// Bytes a group may span.
const MAX_SPAN: i32 = 2048;

/// The group of a block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// Guest register number.
    pub(crate) base: u8,
    /// Range of displacements relative to the base's value at the check.
    pub(crate) lo: i32,
    pub(crate) hi: i32,
    /// Some member writes.
    pub(crate) write: bool,
    /// The check goes before this instruction.
    pub(crate) check: usize,
    /// The last member.
    pub(crate) last: usize,
    /// Where the delta is kept: in r13, or in this slot of the context.
    pub(crate) slot: Option<usize>,
}

/// A run of instructions over which one base register is unchanged or moved by known amounts.
/// Displacements count from the base's value at its start.
struct Region {
    base: u8,
    /// How far the base moved since the region's start.
    moved: i32,
    /// The first member, or as far as the region went without one, and `moved` before it.
    first: (usize, i32),
    /// The last instruction up to `first` before which no flags are live, and `moved` there.
    free: Option<(usize, i32)>,
    members: u32,
    lo: i32,
    hi: i32,
    write: bool,
    last: usize,
    /// A member lies too far from the others: no more are taken.
    full: bool,
}

impl Region {
    fn new(base: u8, start: usize, upto: usize, live: &[FlagSet]) -> Region {
        let free = (start..=upto).rev().find(|&i| live[i].is_empty());
        Region {
            base,
            moved: 0,
            first: (upto, 0),
            free: free.map(|i| (i, 0)),
            members: 0,
            lo: 0,
            hi: 0,
            write: false,
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
        self.members += 1;
        self.last = at;
    }

    /// The check goes where no flags are live, as late as possible, else right before the first member.
    fn plan(&self) -> Plan {
        let (check, moved) = self.free.unwrap_or(self.first);
        Plan {
            base: self.base,
            lo: self.lo - moved,
            hi: self.hi - moved,
            write: self.write,
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
    fn region(&mut self, base: u8, at: usize, live: &[FlagSet]) -> &mut Region {
        if let Some(k) = self.open.iter().position(|r| r.base == base) {
            return &mut self.open[k];
        }
        self.open.push(Region::new(base, self.since[base as usize], at, live));
        self.open.last_mut().expect("just pushed")
    }

    fn close(&mut self, base: u8, at: usize) {
        self.since[base as usize] = at + 1;
        if let Some(k) = self.open.iter().position(|r| r.base == base) {
            let r = self.open.swap_remove(k);
            self.consider(r);
        }
    }

    /// `base` moves by `n` at `at`: whether a region goes on. Only that of RSP does before its first member.
    fn follow(&mut self, base: u8, at: usize, n: i32, live: &[FlagSet]) -> bool {
        let known = base == RSP || self.open.iter().any(|r| r.base == base);
        if known {
            let r = self.region(base, at, live);
            r.moved = r.moved.saturating_add(n);
        }
        known
    }

    fn consider(&mut self, r: Region) {
        if r.members >= 2 {
            self.done.push(r);
        }
    }

    /// Finds the useful groups of a block, the most useful first.
    pub(crate) fn plan(&mut self, instrs: &[Instruction], forms: &[Form], live: &[FlagSet], code64: bool) {
        self.plans.clear();
        if candidates(instrs, forms) < 2 {
            return;
        }
        self.open.clear();
        self.done.clear();
        self.since = [0; 16];
        self.find_regions(instrs, forms, live, code64);
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
            let form = forms[i];
            let ends = matches!(
                form.class,
                Class::Interpret
                    | Class::Syscall
                    | Class::Sysret
                    | Class::Stac
                    | Class::Clac
                    | Class::LoadSegment
            );
            if ends {
                // Another view or segment begins here: what was checked before need not hold behind it.
                break;
            }
            self.open.iter_mut().for_each(|r| r.reach(i, live));
            if let Some(base) = grouped_base(instr, &form.class, code64) {
                let size = instr.memory_size().size() as i32;
                let write = memory_written(instr, &form.access);
                self.region(base, i, live).add(i, instr.memory_displacement64() as i32, size, write);
            }
            match form.class {
                Class::Push | Class::Pushf | Class::Call | Class::CallIndirect => {
                    let word = stack_word(instr) as i32;
                    let r = self.region(RSP, i, live);
                    r.add(i, -word, word, true);
                    r.moved -= word;
                }
                Class::Pop | Class::Ret | Class::Popf => {
                    let word = stack_word(instr) as i32;
                    let r = self.region(RSP, i, live);
                    r.add(i, 0, word, false);
                    r.moved += word;
                }
                _ => {}
            }
            let mut modified = modified(instr, form.class, &form.access);
            if let Some((base, n)) = adjustment(instr, code64)
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

/// Gives a region r13 or a slot of the context that no other uses in between.
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
fn candidates(instrs: &[Instruction], forms: &[Form]) -> usize {
    let stack =
        |c: Class| matches!(c, Class::Push | Class::Pop | Class::Call | Class::CallIndirect | Class::Ret);
    let memory = |i: &Instruction| i.memory_base() != Register::None;
    instrs.iter().zip(forms).filter(|(i, f)| memory(i) || stack(f.class)).count()
}

/// The base register of a memory operand that can be a member.
fn grouped_base(instr: &Instruction, class: &Class, code64: bool) -> Option<u8> {
    match class {
        Class::Identity(_) | Class::Push | Class::CallIndirect | Class::JmpIndirect => {}
        _ => return None,
    }
    operand_base(instr, code64)
}

/// The base register of a memory operand of the form `[base + disp]` in a flat segment.
pub(crate) fn operand_base(instr: &Instruction, code64: bool) -> Option<u8> {
    if !(0..instr.op_count()).any(|i| instr.op_kind(i) == OpKind::Memory) {
        return None;
    }
    let base = instr.memory_base();
    let flat = match instr.memory_segment() {
        Register::FS | Register::GS => false,
        Register::CS => code64,
        _ => true,
    };
    let wide = base.size() == if code64 { 8 } else { 4 };
    let plain = base.is_gpr() && wide && instr.memory_index() == Register::None && flat;
    let high = (0..instr.op_count()).any(|i| regs::is_high_byte(instr.op_register(i)));
    (plain && !high && instr.memory_size().size() > 0).then(|| regs::number(base))
}

fn memory_written(instr: &Instruction, access: &[OpAccess; 5]) -> bool {
    (0..instr.op_count()).any(|i| {
        instr.op_kind(i) == OpKind::Memory
            && !matches!(access[i as usize], OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess)
    })
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

/// The registers `instr` may change in a way a group does not follow, one bit each.
fn modified(instr: &Instruction, class: Class, access: &[OpAccess; 5]) -> u16 {
    const RAX: u16 = 1 << 0;
    const RCX: u16 = 1 << 1;
    const RDX: u16 = 1 << 2;
    const RBX: u16 = 1 << 3;
    let mut mask = match class {
        Class::Leave => 1 << RSP | 1 << 5,
        Class::Rdtsc => RAX | RCX | RDX,
        // RSI, RDI, and what they load or count with.
        Class::String => RAX | RCX | 1 << 6 | 1 << 7,
        _ => implicitly_modified(instr.mnemonic(), RAX | RCX | RDX | RBX),
    };
    for i in 0..instr.op_count() {
        let r = instr.op_register(i);
        if instr.op_kind(i) == OpKind::Register
            && r.is_gpr()
            && !matches!(access[i as usize], OpAccess::Read | OpAccess::CondRead | OpAccess::None)
        {
            mask |= 1 << regs::number(r);
        }
    }
    mask
}

/// `all` for the few instructions that write RAX, RCX, RDX or RBX without naming them.
fn implicitly_modified(m: Mnemonic, all: u16) -> u16 {
    let does = matches!(
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
    );
    if does { all } else { 0 }
}

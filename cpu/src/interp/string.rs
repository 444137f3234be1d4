//! MOVS, STOS, LODS, CMPS, SCAS and their repetitions (SDM 1, section 7.3.9; SDM 2B, REP).
//!
//! Registers always reflect the iterations that are complete, so a fault in the middle restarts there. One call
//! does at most [`BOUND`] bytes; then `next_rip` stays on the instruction and interrupts can be taken. With TF
//! set that is one iteration. REP MOVS and REP STOS upwards in RAM go by page spans, with the result the single
//! iterations would have (overlap included); armed breakpoints (DR7) keep them to single iterations.

use super::alu::{mask, sub};
use super::operand::{memory_segment, set_status, write_sized};
use crate::exec::Exec;
use crate::fault::Fault;
use crate::state::{CpuState, LinAddr, SegReg, flags, gpr};
use iced_x86::{Instruction, OpKind};

/// Bytes of work after which a repetition lets interrupts in.
const BOUND: u64 = 64 << 10;

/// What all string instructions share.
struct Shape {
    /// Bytes per element.
    size: usize,
    /// Address size as a mask.
    mask: u64,
    /// Source segment.
    seg: SegReg,
}

impl Shape {
    fn new(i: &Instruction, size: usize) -> Shape {
        let kind = match i.op0_kind() {
            OpKind::Register => i.op1_kind(),
            kind => kind,
        };
        let mask = match kind {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => 0xFFFF,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => 0xFFFF_FFFF,
            _ => u64::MAX,
        };
        Shape { size, mask, seg: memory_segment(i) }
    }

    fn get(&self, cpu: &CpuState, n: usize) -> u64 {
        cpu.gpr[n] & self.mask
    }

    fn set(&self, cpu: &mut CpuState, n: usize, v: u64) {
        cpu.gpr[n] = if self.mask == 0xFFFF { (cpu.gpr[n] & !0xFFFF) | (v & 0xFFFF) } else { v & self.mask };
    }

    /// Moves index register `n` by `elements` in the direction of DF.
    fn advance(&self, cpu: &mut CpuState, n: usize, elements: u64) {
        let by = elements.wrapping_mul(self.size as u64);
        let by = if cpu.rflags & flags::DF != 0 { by.wrapping_neg() } else { by };
        let v = self.get(cpu, n).wrapping_add(by);
        self.set(cpu, n, v);
    }

    /// Whether spans may be used: upwards and nobody watches.
    fn spans(&self, cpu: &CpuState) -> bool {
        cpu.rflags & (flags::DF | flags::TF) == 0 && cpu.dr[7] & 0xFF == 0
    }

    /// Bytes of `count` elements at index register `n`, short of `bound` and of a wrap of the address.
    fn room(&self, cpu: &CpuState, n: usize, bytes: u64) -> u64 {
        bytes.min((self.mask - self.get(cpu, n)).saturating_add(1))
    }
}

/// What one step of a repetition did.
struct Step {
    elements: u64,
    go_on: bool,
}

const ONE: Step = Step { elements: 1, go_on: true };

/// As [`repeat`], for comparisons: a fault also brings back the flags from before the instruction (SDM 2B, REP).
fn compare(
    ex: &mut Exec<'_>,
    i: &Instruction,
    shape: &Shape,
    step: impl FnMut(&mut Exec<'_>, u64) -> Result<Step, Fault>,
) -> Result<(), Fault> {
    let before = ex.cpu.rflags & flags::STATUS;
    let done = repeat(ex, i, shape, step);
    if done.is_err() {
        set_status(ex.cpu, before);
    }
    done
}

/// Runs `step` once, or under a prefix until rCX is zero, `go_on` is false or the bound is reached. `step` gets the
/// number of elements left to it.
fn repeat(
    ex: &mut Exec<'_>,
    i: &Instruction,
    shape: &Shape,
    mut step: impl FnMut(&mut Exec<'_>, u64) -> Result<Step, Fault>,
) -> Result<(), Fault> {
    if !(i.has_rep_prefix() || i.has_repne_prefix()) {
        return step(ex, 1).map(drop);
    }
    let single = ex.cpu.rflags & flags::TF != 0;
    let mut left = if single { 1 } else { BOUND / shape.size as u64 };
    loop {
        let count = shape.get(ex.cpu, gpr::RCX);
        // A 32-bit count clears the upper half of RCX even if nothing is done.
        shape.set(ex.cpu, gpr::RCX, count);
        if count == 0 {
            return Ok(());
        }
        if left == 0 {
            ex.next_rip = ex.cpu.rip;
            return Ok(());
        }
        let done = step(ex, count.min(left))?;
        shape.set(ex.cpu, gpr::RCX, count - done.elements);
        left -= done.elements.min(left);
        if ex.debug_hits != 0 || ex.watch_hit.is_some() {
            // A data breakpoint traps after the iteration that hit it (SDM 3B, 17.3.1.2).
            left = 0;
        }
        if !done.go_on {
            return Ok(());
        }
    }
}

/// MOVS.
pub(super) fn movs(ex: &mut Exec<'_>, i: &Instruction, size: usize) -> Result<(), Fault> {
    let shape = Shape::new(i, size);
    repeat(ex, i, &shape, |ex, count| {
        let elements = if count > 1 { move_span(ex, &shape, count)? } else { 0 };
        if elements == 0 {
            let v = ex.load(shape.seg, shape.get(ex.cpu, gpr::RSI), size)?;
            ex.store(SegReg::Es, shape.get(ex.cpu, gpr::RDI), size, v)?;
        }
        let elements = elements.max(1);
        shape.advance(ex.cpu, gpr::RSI, elements);
        shape.advance(ex.cpu, gpr::RDI, elements);
        Ok(Step { elements, go_on: true })
    })
}

/// Copies up to `count` elements inside one page of each side; zero if this must go element by element.
fn move_span(ex: &mut Exec<'_>, shape: &Shape, count: u64) -> Result<u64, Fault> {
    if !shape.spans(ex.cpu) {
        return Ok(0);
    }
    let size = shape.size as u64;
    let (from, to) = (shape.get(ex.cpu, gpr::RSI), shape.get(ex.cpu, gpr::RDI));
    let bytes = shape.room(ex.cpu, gpr::RSI, shape.room(ex.cpu, gpr::RDI, count * size));
    let (Ok(from), Ok(to)) =
        (ex.linear(shape.seg, from, bytes as usize, false), ex.linear(SegReg::Es, to, bytes as usize, true))
    else {
        return Ok(0);
    };
    // Elements that straddle a page or fault are left to the single iteration: its faults come in the right order.
    if !begins_well(ex, from, bytes, size) || !begins_well(ex, to, bytes, size) {
        return Ok(0);
    }
    let Some((from, from_len)) = ex.span(from, false)? else { return Ok(0) };
    let Some((to, to_len)) = ex.span(to, true)? else { return Ok(0) };
    let mut n = bytes.min(from_len).min(to_len);
    if to > from {
        // Ascending iterations re-read what they wrote: copy only as far as source and destination are apart.
        n = n.min(to.0 - from.0);
    }
    n -= n % size;
    if n > 0 {
        ex.mem.ram_copy(from, to, n);
        ex.mem.wrote(to, n);
    }
    Ok(n / size)
}

/// Whether the first element of the range lies in one page and is aligned where that is checked.
fn begins_well(ex: &Exec<'_>, at: LinAddr, bytes: u64, size: u64) -> bool {
    bytes.min(4096 - (at.0 & 4095)) >= size && ex.check_alignment(at, size).is_ok()
}

/// STOS.
pub(super) fn stos(ex: &mut Exec<'_>, i: &Instruction, size: usize) -> Result<(), Fault> {
    let shape = Shape::new(i, size);
    let v = ex.cpu.gpr[gpr::RAX] & mask(size);
    repeat(ex, i, &shape, |ex, count| {
        let elements = if count > 1 { store_span(ex, &shape, count, v)? } else { 0 };
        if elements == 0 {
            ex.store(SegReg::Es, shape.get(ex.cpu, gpr::RDI), size, v)?;
        }
        let elements = elements.max(1);
        shape.advance(ex.cpu, gpr::RDI, elements);
        Ok(Step { elements, go_on: true })
    })
}

/// Fills up to `count` elements inside one page; zero if this must go element by element.
fn store_span(ex: &mut Exec<'_>, shape: &Shape, count: u64, v: u64) -> Result<u64, Fault> {
    if !shape.spans(ex.cpu) {
        return Ok(0);
    }
    let size = shape.size as u64;
    let bytes = shape.room(ex.cpu, gpr::RDI, count * size);
    let Ok(to) = ex.linear(SegReg::Es, shape.get(ex.cpu, gpr::RDI), bytes as usize, true) else {
        return Ok(0);
    };
    if !begins_well(ex, to, bytes, size) {
        return Ok(0);
    }
    let Some((to, len)) = ex.span(to, true)? else { return Ok(0) };
    let n = bytes.min(len);
    let n = n - n % size;
    if n == 0 {
        return Ok(0);
    }
    let repeated = (v & 0xFF).wrapping_mul(0x0101_0101_0101_0101) & mask(shape.size);
    if v == repeated {
        ex.mem.ram_fill(to, v as u8, n);
    } else {
        for k in 0..n / size {
            ex.mem.ram_store(paravane_memory::RamOffset(to.0 + k * size), shape.size, v);
        }
    }
    ex.mem.wrote(to, n);
    Ok(n / size)
}

/// LODS.
pub(super) fn lods(ex: &mut Exec<'_>, i: &Instruction, size: usize) -> Result<(), Fault> {
    let shape = Shape::new(i, size);
    repeat(ex, i, &shape, |ex, _| {
        let v = ex.load(shape.seg, shape.get(ex.cpu, gpr::RSI), size)?;
        write_sized(ex.cpu, gpr::RAX, size, v);
        shape.advance(ex.cpu, gpr::RSI, 1);
        Ok(ONE)
    })
}

/// Whether REPE or REPNE (whichever prefix there is) goes on after a comparison with flags `f`.
fn goes_on(i: &Instruction, f: u64) -> bool {
    (f & flags::ZF != 0) != i.has_repne_prefix()
}

/// CMPS: the second operand (ES:rDI) is read first.
pub(super) fn cmps(ex: &mut Exec<'_>, i: &Instruction, size: usize) -> Result<(), Fault> {
    let shape = Shape::new(i, size);
    compare(ex, i, &shape, |ex, _| {
        let b = ex.load(SegReg::Es, shape.get(ex.cpu, gpr::RDI), size)?;
        let a = ex.load(shape.seg, shape.get(ex.cpu, gpr::RSI), size)?;
        let (_, f) = sub(a, b, 0, size);
        set_status(ex.cpu, f);
        shape.advance(ex.cpu, gpr::RSI, 1);
        shape.advance(ex.cpu, gpr::RDI, 1);
        Ok(Step { elements: 1, go_on: goes_on(i, f) })
    })
}

/// SCAS.
pub(super) fn scas(ex: &mut Exec<'_>, i: &Instruction, size: usize) -> Result<(), Fault> {
    let shape = Shape::new(i, size);
    let a = ex.cpu.gpr[gpr::RAX] & mask(size);
    compare(ex, i, &shape, |ex, _| {
        let b = ex.load(SegReg::Es, shape.get(ex.cpu, gpr::RDI), size)?;
        let (_, f) = sub(a, b, 0, size);
        set_status(ex.cpu, f);
        shape.advance(ex.cpu, gpr::RDI, 1);
        Ok(Step { elements: 1, go_on: goes_on(i, f) })
    })
}

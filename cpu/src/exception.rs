//! Interrupt and exception delivery through the IVT or IDT (SDM 3A, chapter 6; 20.1.4; 20.3).

use crate::exec::{Exec, Frame};
use crate::fault::{Fault, Vector};
use crate::mmu::Privilege;
use crate::segment::{self, Descriptor};
use crate::state::{SegReg, Segment, attr, flags, gpr};
use crate::task::{self, Reason};
use crate::transfer;

/// Where an interrupt comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Source {
    /// A fault, trap, NMI, external interrupt or ICEBP: gate privilege is not checked, EXT is set.
    Hardware,
    /// INT n: needs IOPL 3 in virtual-8086 mode.
    Int,
    /// INT3 and INTO.
    Trap,
}

/// One interrupt to deliver.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Event {
    pub vector: u8,
    pub error: Option<u32>,
    pub source: Source,
    /// The RIP to push.
    pub rip: u64,
    /// Push RFLAGS with RF set.
    pub resume: bool,
}

/// SDM 3A, table 6-4 and 6-5.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Class {
    Benign,
    Contributory,
    Page,
}

fn class(v: Vector) -> Class {
    match v {
        Vector::DE | Vector::TS | Vector::NP | Vector::SS | Vector::GP => Class::Contributory,
        Vector::PF => Class::Page,
        _ => Class::Benign,
    }
}

/// What follows when delivering `first` raised `second`; `None` is shutdown.
pub(crate) fn combine(first: Vector, second: Fault) -> Option<Fault> {
    if first == Vector::DF {
        return None;
    }
    let double = match class(first) {
        Class::Benign => false,
        Class::Contributory => class(second.vector) == Class::Contributory,
        Class::Page => class(second.vector) != Class::Benign,
    };
    Some(if double { Fault::with_code(Vector::DF, 0) } else { second })
}

/// Delivers an interrupt. On `Err` the state is as before.
pub(crate) fn deliver(ex: &mut Exec<'_>, event: &Event) -> Result<(), Fault> {
    ex.delivering = Some(event.vector);
    if !ex.cpu.protected() {
        return real(ex, event);
    }
    if ex.cpu.v8086() && event.source == Source::Int && ex.cpu.iopl() < 3 {
        return Err(Fault::GP0);
    }
    let gate = Gate::read(ex, event)?;
    match gate.kind {
        5 => through_task(ex, event, &gate),
        _ if ex.cpu.long_mode() => long(ex, event, &gate),
        _ => legacy(ex, event, &gate),
    }
}

/// What most often fails in delivering.
const PUSHING: &str = "the frame cannot be pushed on the handler's stack";

fn real(ex: &mut Exec<'_>, event: &Event) -> Result<(), Fault> {
    let at = u64::from(event.vector) * 4;
    ex.failing = "the vector lies beyond the limit of the vector table";
    if at + 3 > u64::from(ex.cpu.idtr.limit) {
        return Err(Fault::GP0);
    }
    let entry = ex.sys_load(ex.cpu.idtr.base.wrapping_add(at), 4)?;
    ex.failing = PUSHING;
    let mut frame = Frame::current(ex, Fault::SS0);
    frame.push(ex, 2, ex.cpu.rflags)?;
    frame.push(ex, 2, u64::from(ex.cpu.segment(SegReg::Cs).selector))?;
    frame.push(ex, 2, event.rip)?;
    let cs = transfer::real_code_segment(ex.cpu, (entry >> 16) as u16);
    ex.set_stack_pointer(frame.sp, segment::stack_mask(&frame.ss));
    ex.cpu.seg[SegReg::Cs as usize] = cs;
    ex.cpu.rflags &= !(flags::IF | flags::TF | flags::AC | flags::RF);
    arrive(ex, entry & 0xFFFF);
    Ok(())
}

/// The state after delivery: execution goes on at `rip`.
fn arrive(ex: &mut Exec<'_>, rip: u64) {
    ex.cpu.rip = rip;
    ex.next_rip = rip;
    ex.cpu.halted = false;
    ex.transferred = true;
    ex.delivered = true;
}

/// An IDT gate.
struct Gate {
    kind: u8,
    selector: u16,
    offset: u64,
    ist: u8,
    ext: u32,
}

impl Gate {
    fn read(ex: &mut Exec<'_>, event: &Event) -> Result<Gate, Fault> {
        let hardware = event.source == Source::Hardware;
        let ext = u32::from(hardware);
        let code = u32::from(event.vector) * 8 + 2 + ext;
        let wide = ex.cpu.long_mode();
        let size: u64 = if wide { 16 } else { 8 };
        let at = u64::from(event.vector) * size;
        ex.failing = "the vector lies beyond the IDT's limit";
        if at + size - 1 > u64::from(ex.cpu.idtr.limit) {
            return Err(Fault::with_code(Vector::GP, code));
        }
        ex.failing = "the IDT entry cannot be read";
        let at = ex.cpu.idtr.base.wrapping_add(at);
        let raw = ex.sys_load(at, 8)?;
        let high = if wide { ex.sys_load(at.wrapping_add(8), 8)? & 0xFFFF_FFFF } else { 0 };
        let d = Descriptor { raw, high, at, selector: 0 };
        let kind = d.system_type().unwrap_or(0);
        let known = if wide { matches!(kind, 14 | 15) } else { matches!(kind, 5 | 6 | 7 | 14 | 15) };
        ex.failing = "the IDT entry is no gate of this mode, or its DPL keeps the caller out";
        if !known || (!hardware && d.dpl() < ex.cpu.cpl) {
            return Err(Fault::with_code(Vector::GP, code));
        }
        ex.failing = "the gate is not present";
        if !d.present() {
            return Err(Fault::with_code(Vector::NP, code));
        }
        let offset = if kind < 8 { d.gate_offset() & 0xFFFF } else { d.gate_offset() };
        Ok(Gate { kind, selector: d.gate_selector(), offset, ist: (raw >> 32 & 7) as u8, ext })
    }

    fn is_interrupt(&self) -> bool {
        matches!(self.kind, 6 | 14)
    }

    /// The handler's code segment, checked; with the privilege it runs at.
    fn code(&self, ex: &mut Exec<'_>) -> Result<(Descriptor, u8), Fault> {
        ex.failing = "the gate's code selector is null";
        if segment::is_null(self.selector) {
            return Err(Fault::with_code(Vector::GP, self.ext));
        }
        let bad = |vector| Fault::with_code(vector, u32::from(self.selector & !3) | self.ext);
        ex.failing = "the gate's code descriptor is outside its table, or cannot be read";
        let d = segment::fetch(ex, self.selector, Vector::GP, self.ext)?;
        let long = ex.cpu.long_mode();
        let big = d.segment().big();
        ex.failing = "the gate's selector is no code segment that may handle this";
        if !d.is_code() || d.dpl() > ex.cpu.cpl || (long && (!d.is_long_code() || big)) {
            return Err(bad(Vector::GP));
        }
        ex.failing = "the handler's code segment is not present";
        if !d.present() {
            return Err(bad(Vector::NP));
        }
        ex.failing = "the handler of virtual-8086 mode is not at CPL 0";
        let cpl = if d.is_conforming() { ex.cpu.cpl } else { d.dpl() };
        if ex.cpu.v8086() && cpl != 0 {
            return Err(bad(Vector::GP));
        }
        Ok((d, cpl))
    }
}

/// The stack pointer and selector for privilege `cpl` from a 16- or 32-bit TSS.
pub(crate) fn tss_stack(ex: &mut Exec<'_>, cpl: u8, ext: u32) -> Result<(u16, u64), Fault> {
    let tr = ex.cpu.tr;
    let bad = Fault::with_code(Vector::TS, u32::from(tr.selector & !3) | ext);
    let wide = tr.attributes & 8 != 0;
    let (at, size) = if wide { (4 + u64::from(cpl) * 8, 4) } else { (2 + u64::from(cpl) * 4, 2) };
    if at + size + 1 > u64::from(tr.limit) {
        return Err(bad);
    }
    let sp = ex.sys_load(tr.base.wrapping_add(at), size as usize)?;
    let ss = ex.sys_load(tr.base.wrapping_add(at + size), 2)? as u16;
    Ok((ss, sp))
}

/// A 64-bit stack pointer from the TSS at byte `at`.
pub(crate) fn tss_rsp(ex: &mut Exec<'_>, at: u64, ext: u32) -> Result<u64, Fault> {
    let tr = ex.cpu.tr;
    if at + 7 > u64::from(tr.limit) {
        return Err(Fault::with_code(Vector::TS, u32::from(tr.selector & !3) | ext));
    }
    let rsp = ex.sys_load(tr.base.wrapping_add(at), 8)?;
    if segment::canonical(rsp) { Ok(rsp) } else { Err(Fault::with_code(Vector::SS, ext)) }
}

/// Pushed RFLAGS.
fn image(ex: &Exec<'_>, event: &Event) -> u64 {
    ex.cpu.rflags | if event.resume { flags::RF } else { 0 }
}

fn long(ex: &mut Exec<'_>, event: &Event, gate: &Gate) -> Result<(), Fault> {
    let (mut code, cpl) = gate.code(ex)?;
    ex.failing = "the TSS has no usable stack for the handler";
    let inner = cpl != ex.cpu.cpl;
    let rsp = if gate.ist != 0 {
        tss_rsp(ex, 36 + u64::from(gate.ist - 1) * 8, gate.ext)?
    } else if inner {
        tss_rsp(ex, 4 + u64::from(cpl) * 8, gate.ext)?
    } else {
        ex.cpu.gpr[gpr::RSP]
    };
    ex.failing = "the handler's address is not canonical";
    if !segment::canonical(gate.offset) {
        return Err(Fault::with_code(Vector::GP, gate.ext));
    }
    let old_ss = *ex.cpu.segment(SegReg::Ss);
    let privilege = if cpl == 3 { Privilege::User } else { Privilege::Supervisor };
    let mut frame = Frame {
        ss: Segment::default(),
        sp: rsp & !15,
        wide: true,
        privilege,
        fault: Fault::with_code(Vector::SS, gate.ext),
    };
    ex.failing = PUSHING;
    frame.push(ex, 8, u64::from(old_ss.selector))?;
    frame.push(ex, 8, ex.cpu.gpr[gpr::RSP])?;
    frame.push(ex, 8, image(ex, event))?;
    frame.push(ex, 8, u64::from(ex.cpu.segment(SegReg::Cs).selector))?;
    frame.push(ex, 8, event.rip)?;
    if let Some(error) = event.error {
        frame.push(ex, 8, u64::from(error))?;
    }
    segment::touch(ex, &mut code)?;
    if inner {
        ex.cpu.seg[SegReg::Ss as usize] = segment::null_stack(cpl, u16::from(cpl));
    }
    ex.cpu.gpr[gpr::RSP] = frame.sp;
    enter(ex, &code, cpl, gate);
    Ok(())
}

fn legacy(ex: &mut Exec<'_>, event: &Event, gate: &Gate) -> Result<(), Fault> {
    let (mut code, cpl) = gate.code(ex)?;
    let size = if gate.kind & 8 != 0 { 4 } else { 2 };
    let inner = cpl != ex.cpu.cpl || ex.cpu.v8086();
    let from_v86 = ex.cpu.v8086();
    ex.failing = "the TSS has no usable stack for the handler";
    let mut frame = if inner {
        inner_stack(ex, cpl, gate.ext)?
    } else {
        Frame::current(ex, Fault::with_code(Vector::SS, gate.ext))
    };
    ex.failing = PUSHING;
    let new_ss = frame.ss;
    let seg = |ex: &Exec<'_>, s: SegReg| u64::from(ex.cpu.segment(s).selector);
    if from_v86 {
        for s in [SegReg::Gs, SegReg::Fs, SegReg::Ds, SegReg::Es] {
            frame.push(ex, size, seg(ex, s))?;
        }
    }
    if inner {
        frame.push(ex, size, seg(ex, SegReg::Ss))?;
        frame.push(ex, size, ex.cpu.gpr[gpr::RSP])?;
    }
    frame.push(ex, size, image(ex, event))?;
    frame.push(ex, size, seg(ex, SegReg::Cs))?;
    frame.push(ex, size, event.rip)?;
    if let Some(error) = event.error {
        frame.push(ex, size, u64::from(error))?;
    }
    ex.failing = "the handler's address lies beyond its code segment";
    if gate.offset > u64::from(code.segment().limit) {
        return Err(Fault::with_code(Vector::GP, gate.ext));
    }
    segment::touch(ex, &mut code)?;
    if from_v86 {
        for s in [SegReg::Gs, SegReg::Fs, SegReg::Ds, SegReg::Es] {
            ex.cpu.seg[s as usize] = Segment::default();
        }
    }
    ex.cpu.seg[SegReg::Ss as usize] = new_ss;
    ex.set_stack_pointer(frame.sp, segment::stack_mask(&new_ss));
    enter(ex, &code, cpl, gate);
    Ok(())
}

/// The checked stack for a more privileged handler.
pub(crate) fn inner_stack(ex: &mut Exec<'_>, cpl: u8, ext: u32) -> Result<Frame, Fault> {
    let (selector, sp) = tss_stack(ex, cpl, ext)?;
    let ss = segment::stack(ex, selector, cpl, false, Vector::TS, ext)?;
    let fault = Fault::with_code(Vector::SS, u32::from(selector & !3) | ext);
    let privilege = if cpl == 3 { Privilege::User } else { Privilege::Supervisor };
    Ok(Frame { ss, sp, wide: false, privilege, fault })
}

fn enter(ex: &mut Exec<'_>, code: &Descriptor, cpl: u8, gate: &Gate) {
    let mut cs = code.segment();
    cs.selector = (cs.selector & !3) | u16::from(cpl);
    ex.cpu.seg[SegReg::Cs as usize] = cs;
    ex.cpu.cpl = cpl;
    ex.cpu.rflags &= !(flags::TF | flags::NT | flags::RF | flags::VM);
    if gate.is_interrupt() {
        ex.cpu.rflags &= !flags::IF;
    }
    debug_assert!(code.segment().attributes & attr::CODE != 0);
    arrive(ex, gate.offset);
}

fn through_task(ex: &mut Exec<'_>, event: &Event, gate: &Gate) -> Result<(), Fault> {
    if event.resume {
        ex.cpu.rflags |= flags::RF;
    }
    ex.failing = "the task switch fails";
    task::switch(ex, gate.selector, Reason::Interrupt { ext: gate.ext }, event.rip)?;
    if let Some(error) = event.error {
        let size = if ex.cpu.tr.attributes & 8 != 0 { 4 } else { 2 };
        ex.push(size, u64::from(error))?;
    }
    arrive(ex, ex.next_rip);
    Ok(())
}

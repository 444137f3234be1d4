//! Far jumps, calls and returns, call gates and IRET (SDM 3A, 5.8; SDM 2, CALL, JMP, RET, IRET).

use crate::exception::{inner_stack, tss_rsp};
use crate::exec::{Exec, Frame};
use crate::fault::{Fault, Vector};
use crate::mmu::Privilege;
use crate::segment::{self, Descriptor};
use crate::state::{CpuState, SegReg, Segment, attr, flags, gpr};
use crate::task::{self, Reason};
use crate::vme;

/// CS after a real-mode transfer: base and selector change, the limit stays.
pub(crate) fn real_code_segment(cpu: &CpuState, selector: u16) -> Segment {
    let old = cpu.segment(SegReg::Cs);
    let attributes = 0x93 | old.attributes & (attr::DB | attr::G);
    Segment { base: u64::from(selector) << 4, limit: old.limit, attributes, selector }
}

/// CS for real and virtual-8086 mode; the offset must lie within the limit.
fn flat_code(ex: &Exec<'_>, selector: u16, offset: u64) -> Result<Segment, Fault> {
    let cs =
        if ex.cpu.v8086() { segment::virtual8086(selector) } else { real_code_segment(ex.cpu, selector) };
    if offset > u64::from(cs.limit) { Err(Fault::GP0) } else { Ok(cs) }
}

fn operand_mask(size: usize) -> u64 {
    match size {
        2 => 0xFFFF,
        4 => 0xFFFF_FFFF,
        _ => u64::MAX,
    }
}

/// Whether segmentation has no privilege: real and virtual-8086 mode.
fn unprotected(ex: &Exec<'_>) -> bool {
    !ex.cpu.protected() || ex.cpu.v8086()
}

/// The target offset must be canonical or within the limit of the new code segment.
fn check_target(ex: &Exec<'_>, cs: &Segment, offset: u64) -> Result<(), Fault> {
    let ok = if ex.cpu.long_mode() && cs.attributes & attr::L != 0 {
        segment::canonical(offset)
    } else {
        offset <= u64::from(cs.limit)
    };
    if ok { Ok(()) } else { Err(Fault::GP0) }
}

/// Presence and the L/D combination of a code segment.
fn check_code(ex: &Exec<'_>, d: &Descriptor) -> Result<(), Fault> {
    if ex.cpu.long_mode() && d.is_long_code() && d.segment().big() {
        return Err(Fault::gp(d.selector));
    }
    if !d.present() {
        return Err(Fault::with_code(Vector::NP, u32::from(d.selector & !3)));
    }
    Ok(())
}

fn set_code(ex: &mut Exec<'_>, mut cs: Segment, cpl: u8, offset: u64) {
    cs.selector = (cs.selector & !3) | u16::from(cpl);
    ex.cpu.seg[SegReg::Cs as usize] = cs;
    ex.cpu.cpl = cpl;
    ex.next_rip = offset;
}

/// JMP FAR.
pub(crate) fn far_jump(ex: &mut Exec<'_>, selector: u16, offset: u64) -> Result<(), Fault> {
    if unprotected(ex) {
        let cs = flat_code(ex, selector, offset)?;
        ex.cpu.seg[SegReg::Cs as usize] = cs;
        ex.next_rip = offset;
        return Ok(());
    }
    let mut d = far_target(ex, selector)?;
    if d.is_code() {
        direct_rights(ex, &d)?;
        check_code(ex, &d)?;
        check_target(ex, &d.segment(), offset)?;
        segment::touch(ex, &mut d)?;
        let cpl = ex.cpu.cpl;
        set_code(ex, d.segment(), cpl, offset);
        return Ok(());
    }
    match system_target(ex, &d)? {
        Target::Task(tss) => task::switch(ex, tss, Reason::Jump, ex.next_rip),
        Target::Gate => {
            let mut code = gate_code(ex, &d)?;
            if !code.is_conforming() && code.dpl() != ex.cpu.cpl {
                return Err(Fault::gp(code.selector));
            }
            check_code(ex, &code)?;
            let offset = gate_offset(&d);
            check_target(ex, &code.segment(), offset)?;
            segment::touch(ex, &mut code)?;
            let cpl = ex.cpu.cpl;
            set_code(ex, code.segment(), cpl, offset);
            Ok(())
        }
    }
}

/// CALL FAR with `size`-byte pushes.
pub(crate) fn far_call(ex: &mut Exec<'_>, selector: u16, offset: u64, size: usize) -> Result<(), Fault> {
    if unprotected(ex) {
        let cs = flat_code(ex, selector, offset)?;
        push_return(ex, size)?;
        ex.cpu.seg[SegReg::Cs as usize] = cs;
        ex.next_rip = offset;
        return Ok(());
    }
    let mut d = far_target(ex, selector)?;
    if d.is_code() {
        direct_rights(ex, &d)?;
        check_code(ex, &d)?;
        check_target(ex, &d.segment(), offset)?;
        push_return(ex, size)?;
        segment::touch(ex, &mut d)?;
        let cpl = ex.cpu.cpl;
        set_code(ex, d.segment(), cpl, offset);
        return Ok(());
    }
    match system_target(ex, &d)? {
        Target::Task(tss) => task::switch(ex, tss, Reason::Call, ex.next_rip),
        Target::Gate => call_gate(ex, &d),
    }
}

fn push_return(ex: &mut Exec<'_>, size: usize) -> Result<(), Fault> {
    ex.push(size, u64::from(ex.cpu.segment(SegReg::Cs).selector))?;
    ex.push(size, ex.next_rip)
}

fn far_target(ex: &mut Exec<'_>, selector: u16) -> Result<Descriptor, Fault> {
    if segment::is_null(selector) {
        return Err(Fault::GP0);
    }
    segment::fetch_wide(ex, selector, Vector::GP, 0)
}

/// Privilege of a direct transfer to code segment `d`.
fn direct_rights(ex: &Exec<'_>, d: &Descriptor) -> Result<(), Fault> {
    let (cpl, rpl) = (ex.cpu.cpl, (d.selector & 3) as u8);
    let ok = if d.is_conforming() { d.dpl() <= cpl } else { rpl <= cpl && d.dpl() == cpl };
    if ok { Ok(()) } else { Err(Fault::gp(d.selector)) }
}

enum Target {
    Task(u16),
    Gate,
}

/// Checks a TSS, task gate or call gate as the target of a far transfer.
fn system_target(ex: &mut Exec<'_>, d: &Descriptor) -> Result<Target, Fault> {
    let bad = Fault::gp(d.selector);
    let long = ex.cpu.long_mode();
    let kind = d.system_type().ok_or(bad)?;
    let allowed = if long { kind == 12 } else { matches!(kind, 1 | 4 | 5 | 9 | 12) };
    let rpl = (d.selector & 3) as u8;
    if !allowed || d.dpl() < ex.cpu.cpl || d.dpl() < rpl {
        return Err(bad);
    }
    if !d.present() {
        return Err(Fault::with_code(Vector::NP, u32::from(d.selector & !3)));
    }
    Ok(match kind {
        1 | 9 => Target::Task(d.selector),
        5 => Target::Task(d.gate_selector()),
        _ => Target::Gate,
    })
}

fn gate_offset(d: &Descriptor) -> u64 {
    if d.system_type() == Some(4) { d.gate_offset() & 0xFFFF } else { d.gate_offset() }
}

/// The code segment a call gate names, checked but for JMP's stricter rule.
fn gate_code(ex: &mut Exec<'_>, gate: &Descriptor) -> Result<Descriptor, Fault> {
    let selector = gate.gate_selector();
    if segment::is_null(selector) {
        return Err(Fault::GP0);
    }
    let d = segment::fetch(ex, selector, Vector::GP, 0)?;
    let long = ex.cpu.long_mode();
    if !d.is_code() || d.dpl() > ex.cpu.cpl || (long && !d.is_long_code()) {
        return Err(Fault::gp(selector));
    }
    Ok(d)
}

fn call_gate(ex: &mut Exec<'_>, gate: &Descriptor) -> Result<(), Fault> {
    let mut code = gate_code(ex, gate)?;
    check_code(ex, &code)?;
    let offset = gate_offset(gate);
    let long = ex.cpu.long_mode();
    let size = if long {
        8
    } else if gate.system_type() == Some(4) {
        2
    } else {
        4
    };
    let inner = !code.is_conforming() && code.dpl() < ex.cpu.cpl;
    let cpl = if inner { code.dpl() } else { ex.cpu.cpl };
    check_target(ex, &code.segment(), offset)?;
    let mut frame = if !inner {
        let mut frame = Frame::current(ex, Fault::SS0);
        frame.wide = long;
        frame
    } else if long {
        let sp = tss_rsp(ex, 4 + u64::from(cpl) * 8, 0)?;
        let ss = segment::null_stack(cpl, u16::from(cpl));
        Frame { ss, sp, wide: true, privilege: Privilege::Supervisor, fault: Fault::SS0 }
    } else {
        inner_stack(ex, cpl, 0)?
    };
    if inner {
        push_outer_stack(ex, &mut frame, gate, size)?;
    }
    frame.push(ex, size, u64::from(ex.cpu.segment(SegReg::Cs).selector))?;
    frame.push(ex, size, ex.next_rip)?;
    segment::touch(ex, &mut code)?;
    ex.cpu.seg[SegReg::Ss as usize] = frame.ss;
    let mask = if frame.wide { u64::MAX } else { segment::stack_mask(&frame.ss) };
    ex.set_stack_pointer(frame.sp, mask);
    set_code(ex, code.segment(), cpl, offset);
    Ok(())
}

/// Pushes the caller's SS:RSP and copies a legacy gate's parameters.
fn push_outer_stack(
    ex: &mut Exec<'_>,
    frame: &mut Frame,
    gate: &Descriptor,
    size: usize,
) -> Result<(), Fault> {
    let rsp = ex.cpu.gpr[gpr::RSP];
    frame.push(ex, size, u64::from(ex.cpu.segment(SegReg::Ss).selector))?;
    frame.push(ex, size, rsp)?;
    if size == 8 {
        return Ok(());
    }
    let mask = ex.stack_mask();
    for i in (0..gate.raw >> 32 & 31).rev() {
        let value = ex.load(SegReg::Ss, rsp.wrapping_add(i * size as u64) & mask, size)?;
        frame.push(ex, size, value)?;
    }
    Ok(())
}

/// The code segment of a far return or IRET, checked.
fn return_code(ex: &mut Exec<'_>, selector: u16) -> Result<Descriptor, Fault> {
    if segment::is_null(selector) {
        return Err(Fault::GP0);
    }
    let d = segment::fetch(ex, selector, Vector::GP, 0)?;
    let rpl = (selector & 3) as u8;
    let right = d.is_code() && if d.is_conforming() { d.dpl() <= rpl } else { d.dpl() == rpl };
    if rpl < ex.cpu.cpl || !right {
        return Err(Fault::gp(selector));
    }
    check_code(ex, &d)?;
    Ok(d)
}

/// RET FAR, releasing `extra` bytes.
pub(crate) fn far_return(ex: &mut Exec<'_>, size: usize, extra: u64) -> Result<(), Fault> {
    let mut frame = Frame::current(ex, Fault::SS0);
    let offset = frame.pop(ex, size)? & operand_mask(size);
    let selector = frame.pop(ex, size)? as u16;
    let mask = ex.stack_mask();
    if unprotected(ex) {
        let cs = flat_code(ex, selector, offset)?;
        ex.cpu.seg[SegReg::Cs as usize] = cs;
        ex.set_stack_pointer(frame.sp.wrapping_add(extra) & mask, mask);
        ex.next_rip = offset;
        return Ok(());
    }
    let mut code = return_code(ex, selector)?;
    check_target(ex, &code.segment(), offset)?;
    frame.sp = (frame.sp & !mask) | (frame.sp.wrapping_add(extra) & mask);
    let cpl = (selector & 3) as u8;
    if cpl == ex.cpu.cpl {
        segment::touch(ex, &mut code)?;
        ex.set_stack_pointer(frame.sp & mask, mask);
        set_code(ex, code.segment(), cpl, offset);
        return Ok(());
    }
    let sp = frame.pop(ex, size)?;
    let ss_selector = frame.pop(ex, size)? as u16;
    return_outer(ex, &mut code, cpl, offset, ss_selector, sp, extra)
}

/// Commits a return that also loads SS:RSP.
fn return_outer(
    ex: &mut Exec<'_>,
    code: &mut Descriptor,
    cpl: u8,
    offset: u64,
    ss: u16,
    sp: u64,
    extra: u64,
) -> Result<(), Fault> {
    let wide = ex.cpu.long_mode() && code.is_long_code();
    segment::probe_touch(ex, code)?;
    let ss = segment::stack(ex, ss, cpl, wide, Vector::GP, 0)?;
    segment::touch(ex, code)?;
    let outer = cpl != ex.cpu.cpl;
    ex.cpu.seg[SegReg::Ss as usize] = ss;
    let mask = if wide { u64::MAX } else { segment::stack_mask(&ss) };
    ex.set_stack_pointer(sp.wrapping_add(extra) & mask, mask);
    set_code(ex, code.segment(), cpl, offset);
    if outer {
        segment::drop_privileged(ex.cpu);
    }
    Ok(())
}

/// Bits of EFLAGS that IRET and POPF may load at the current privilege.
pub(crate) fn loadable_flags(cpu: &CpuState, size: usize) -> u64 {
    let mut mask = flags::STATUS | flags::TF | flags::DF | flags::NT;
    if size > 2 {
        mask |= flags::AC | flags::ID;
    }
    if cpu.v8086() {
        return mask | flags::IF;
    }
    if cpu.cpl == 0 {
        mask |= flags::IOPL;
    }
    if cpu.cpl <= cpu.iopl() {
        mask |= flags::IF;
    }
    mask
}

/// IRET, IRETD, IRETQ. NMIs are let in again even if it faults (SDM 3A, 6.7.1).
pub(crate) fn iret(ex: &mut Exec<'_>, size: usize) -> Result<(), Fault> {
    ex.transferred = false;
    ex.cpu.nmi_blocked = false;
    let virtual_if = size == 2 && vme::virtual_if(ex.cpu);
    if ex.cpu.v8086() && ex.cpu.iopl() < 3 && !virtual_if {
        return Err(Fault::GP0);
    }
    if ex.cpu.protected() && !ex.cpu.v8086() && ex.cpu.rflags & flags::NT != 0 {
        return iret_task(ex);
    }
    let mut frame = Frame::current(ex, Fault::SS0);
    let offset = frame.pop(ex, size)? & operand_mask(size);
    let selector = frame.pop(ex, size)? as u16;
    let image = frame.pop(ex, size)?;
    if unprotected(ex) {
        let cs = flat_code(ex, selector, offset)?;
        let rflags = if virtual_if { vme::popped(ex.cpu, image)? } else { ex.cpu.rflags };
        ex.cpu.seg[SegReg::Cs as usize] = cs;
        let mask = ex.stack_mask();
        ex.set_stack_pointer(frame.sp & mask, mask);
        ex.next_rip = offset;
        if virtual_if {
            return finish_iret(ex, rflags, u64::MAX, 2);
        }
        return finish_iret(ex, image, loadable_flags(ex.cpu, size), size);
    }
    if size == 4 && image & flags::VM != 0 && ex.cpu.cpl == 0 && !ex.cpu.long_mode() {
        return iret_v8086(ex, frame, offset, selector, image);
    }
    let mut code = return_code(ex, selector)?;
    check_target(ex, &code.segment(), offset)?;
    let cpl = (selector & 3) as u8;
    let mut mask = loadable_flags(ex.cpu, size);
    if ex.cpu.cpl == 0 && size > 2 {
        mask |= flags::VIF | flags::VIP;
    }
    if ex.cpu.code64() || cpl != ex.cpu.cpl {
        let sp = frame.pop(ex, size)?;
        let ss = frame.pop(ex, size)? as u16;
        return_outer(ex, &mut code, cpl, offset, ss, sp, 0)?;
    } else {
        segment::touch(ex, &mut code)?;
        let stack = ex.stack_mask();
        ex.set_stack_pointer(frame.sp & stack, stack);
        set_code(ex, code.segment(), cpl, offset);
    }
    finish_iret(ex, image, mask, size)
}

fn finish_iret(ex: &mut Exec<'_>, image: u64, mut mask: u64, size: usize) -> Result<(), Fault> {
    if size > 2 {
        mask |= flags::RF;
    }
    ex.cpu.rflags = (ex.cpu.rflags & !mask) | (image & mask) | flags::FIXED;
    ex.transferred = true;
    Ok(())
}

fn iret_task(ex: &mut Exec<'_>) -> Result<(), Fault> {
    if ex.cpu.long_mode() {
        return Err(Fault::GP0);
    }
    let link = ex.sys_load(ex.cpu.tr.base, 2)? as u16;
    task::switch(ex, link, Reason::Return, ex.next_rip)
}

fn iret_v8086(ex: &mut Exec<'_>, mut frame: Frame, offset: u64, cs: u16, image: u64) -> Result<(), Fault> {
    let sp = frame.pop(ex, 4)?;
    let mut next = || frame.pop(ex, 4).map(|v| v as u16);
    let (ss, es, ds, fs, gs) = (next()?, next()?, next()?, next()?, next()?);
    if offset > 0xFFFF {
        return Err(Fault::GP0);
    }
    let pairs = [
        (SegReg::Cs, cs),
        (SegReg::Ss, ss),
        (SegReg::Es, es),
        (SegReg::Ds, ds),
        (SegReg::Fs, fs),
        (SegReg::Gs, gs),
    ];
    for (seg, selector) in pairs {
        ex.cpu.seg[seg as usize] = segment::virtual8086(selector);
    }
    ex.cpu.gpr[gpr::RSP] = sp;
    ex.cpu.cpl = 3;
    ex.next_rip = offset;
    ex.cpu.rflags = (image & 0x003F_7FD7) | flags::FIXED;
    ex.transferred = true;
    Ok(())
}

//! IN, OUT, INS and OUTS (SDM 1, chapter 19).

use super::operand::{read_gpr, write_gpr};
use super::system::segment_register;
use crate::debug;
use crate::exec::Exec;
use crate::fault::Fault;
use crate::state::{SegReg, flags, gpr};
use iced_x86::{Instruction, OpKind, Register};
use paravane_memory::{Port, Width};

/// Iterations after which a repetition lets interrupts in.
const BOUND: u32 = 4096;

fn register_size(r: Register) -> usize {
    match r {
        Register::AL => 1,
        Register::AX => 2,
        _ => 4,
    }
}

fn width(size: usize) -> Width {
    Width::from_bytes(size).unwrap_or(Width::W8)
}

/// The port in operand `n`: an immediate or DX.
fn port(ex: &Exec<'_>, i: &Instruction, n: u32) -> u16 {
    if i.op_kind(n) == OpKind::Register { ex.cpu.gpr[gpr::RDX] as u16 } else { u16::from(i.immediate8()) }
}

/// Checks permission and breakpoints.
fn claim(ex: &mut Exec<'_>, port: u16, size: usize, way: Way) -> Result<Port, Fault> {
    ex.check_io(port, size)?;
    ex.debug_hits |= debug::io_hits(ex.cpu, Port(port), size as u64);
    ex.observe_port(port, size, way == Way::Out);
    Ok(Port(port))
}

/// IN.
pub(super) fn port_in(ex: &mut Exec<'_>, i: &Instruction) -> Result<(), Fault> {
    let to = i.op0_register();
    let size = register_size(to);
    let port = port(ex, i, 1);
    let port = claim(ex, port, size, Way::In)?;
    let value = ex.bus.port_in(ex.vp, port, width(size));
    write_gpr(ex.cpu, to, u64::from(value));
    Ok(())
}

/// OUT.
pub(super) fn port_out(ex: &mut Exec<'_>, i: &Instruction) -> Result<(), Fault> {
    let from = i.op1_register();
    let size = register_size(from);
    let port = port(ex, i, 0);
    let port = claim(ex, port, size, Way::Out)?;
    let value = read_gpr(ex.cpu, from) & width(size).mask();
    ex.bus.port_out(ex.vp, port, width(size), value as u32);
    Ok(())
}

/// Mask of the address size of a string operand.
fn address_mask(kind: OpKind) -> u64 {
    match kind {
        OpKind::MemorySegSI | OpKind::MemoryESDI => 0xFFFF,
        OpKind::MemorySegESI | OpKind::MemoryESEDI => 0xFFFF_FFFF,
        _ => u64::MAX,
    }
}

/// Writes the bits of register `n` that an address size covers.
fn set(ex: &mut Exec<'_>, n: usize, mask: u64, v: u64) {
    let r = &mut ex.cpu.gpr[n];
    *r = if mask == 0xFFFF { (*r & !0xFFFF) | (v & mask) } else { v & mask };
}

/// Runs `one` once or as REP says; registers reflect complete iterations.
fn repeat(
    ex: &mut Exec<'_>,
    i: &Instruction,
    index: usize,
    mask: u64,
    size: usize,
    one: impl Fn(&mut Exec<'_>, u64) -> Result<(), Fault>,
) -> Result<(), Fault> {
    let rep = i.has_rep_prefix() || i.has_repne_prefix();
    let step = if ex.cpu.rflags & flags::DF != 0 { (size as u64).wrapping_neg() } else { size as u64 };
    let bound = if ex.cpu.rflags & flags::TF != 0 { 1 } else { BOUND };
    if rep && ex.cpu.gpr[gpr::RCX] & mask == 0 {
        // Permission is checked even where nothing is left to transfer.
        ex.check_io(ex.cpu.gpr[gpr::RDX] as u16, size)?;
    }
    for _ in 0..bound {
        if rep && ex.cpu.gpr[gpr::RCX] & mask == 0 {
            return Ok(());
        }
        let at = ex.cpu.gpr[index] & mask;
        one(ex, at)?;
        set(ex, index, mask, at.wrapping_add(step));
        if !rep {
            return Ok(());
        }
        let left = (ex.cpu.gpr[gpr::RCX] & mask).wrapping_sub(1);
        set(ex, gpr::RCX, mask, left);
        if left == 0 {
            return Ok(());
        }
        if ex.attention.get() != 0 || ex.debug_hits != 0 || ex.watch_hit.is_some() {
            break;
        }
    }
    ex.next_rip = ex.cpu.rip;
    Ok(())
}

/// Which way a repetition moves data.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    In,
    Out,
}

/// Moves what it can of an upward repetition in one go, up to the end of the page: registers reflect it. Whatever is
/// out of the ordinary (breakpoints, faults, memory that is none) moves nothing and is left to the single steps. True
/// if something was moved.
fn in_one_go(ex: &mut Exec<'_>, i: &Instruction, seg: SegReg, mask: u64, size: usize, way: Way) -> bool {
    let plain = ex.cpu.rflags & (flags::DF | flags::TF) == 0 && ex.cpu.dr[7] & 0xFF == 0;
    let index = if way == Way::In { gpr::RDI } else { gpr::RSI };
    let (count, at) = (ex.cpu.gpr[gpr::RCX] & mask, ex.cpu.gpr[index] & mask);
    let port = ex.cpu.gpr[gpr::RDX] as u16;
    let watched = ex.plan.is_some_and(|p| p.port_hit(port, size as u64, way == Way::Out).is_some());
    if !i.has_rep_prefix() || !plain || watched || count < 2 || ex.check_io(port, size).is_err() {
        return false;
    }
    let Ok(lin) = ex.linear(seg, at, size, way == Way::In) else { return false };
    let Ok(Some((ram, room))) = ex.span(lin, way == Way::In) else { return false };
    let len = room.min(count.saturating_mul(size as u64)).min(mask - at) as usize / size * size;
    if len < size || ex.linear(seg, at, len, way == Way::In) != Ok(lin) {
        return false;
    }
    let mut buf = [0; 4096];
    let moved = match way {
        Way::In => {
            let n = ex.bus.port_in_string(ex.vp, Port(port), width(size), &mut buf[..len]).min(len);
            ex.mem.ram_write(ram, &buf[..n]);
            ex.mem.wrote(ram, n as u64);
            n
        }
        Way::Out => {
            ex.mem.ram_read(ram, &mut buf[..len]);
            ex.bus.port_out_string(ex.vp, Port(port), width(size), &buf[..len]).min(len)
        }
    };
    set(ex, index, mask, at.wrapping_add(moved as u64));
    set(ex, gpr::RCX, mask, count - (moved / size) as u64);
    moved > 0
}

/// INS.
pub(super) fn ins(ex: &mut Exec<'_>, i: &Instruction, size: usize) -> Result<(), Fault> {
    let mask = address_mask(i.op0_kind());
    if in_one_go(ex, i, SegReg::Es, mask, size, Way::In) && ex.cpu.gpr[gpr::RCX] & mask != 0 {
        ex.next_rip = ex.cpu.rip;
        return Ok(());
    }
    repeat(ex, i, gpr::RDI, mask, size, |ex, at| {
        let port = claim(ex, ex.cpu.gpr[gpr::RDX] as u16, size, Way::In)?;
        ex.probe_write(SegReg::Es, at, size)?;
        let value = ex.bus.port_in(ex.vp, port, width(size));
        ex.store(SegReg::Es, at, size, u64::from(value))
    })
}

/// OUTS.
pub(super) fn outs(ex: &mut Exec<'_>, i: &Instruction, size: usize) -> Result<(), Fault> {
    let mask = address_mask(i.op1_kind());
    let seg = segment_register(i.memory_segment()).unwrap_or(SegReg::Ds);
    if in_one_go(ex, i, seg, mask, size, Way::Out) && ex.cpu.gpr[gpr::RCX] & mask != 0 {
        ex.next_rip = ex.cpu.rip;
        return Ok(());
    }
    repeat(ex, i, gpr::RSI, mask, size, |ex, at| {
        let port = claim(ex, ex.cpu.gpr[gpr::RDX] as u16, size, Way::Out)?;
        let value = ex.load(seg, at, size)?;
        ex.bus.port_out(ex.vp, port, width(size), value as u32);
        Ok(())
    })
}

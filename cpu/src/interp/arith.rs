//! Execution of integer arithmetic, logic, shifts, multiplication, division, exchange and bit instructions on
//! their operands (SDM 2). The arithmetic itself is in [`alu`], [`shift`] and [`bits`].

use super::operand::{
    address, address_mask, gpr_size, operand_size, read, read_gpr, set_status, update, write, write_gpr,
    write_sized,
};
use super::undefined::{self, Shifted};
use super::vector::misaligned;
use super::{alu, bits, shift};
use crate::cpuid::HostVendor;
use crate::exec::Exec;
use crate::fault::{Fault, Vector};
use crate::state::flags::{CF, STATUS, ZF};
use crate::state::gpr::{RAX, RBX, RCX, RDX};
use iced_x86::{Code, Instruction, OpKind, Register};

type Executed = Result<(), Fault>;

/// Two operands, the first replaced: ADD, ADC, SUB, SBB, AND, OR, XOR. `f(a, b, carry, size)`.
#[inline(always)]
pub(super) fn binary(
    ex: &mut Exec<'_>,
    i: &Instruction,
    f: impl Fn(u64, u64, u64, usize) -> (u64, u64),
) -> Executed {
    let size = operand_size(i, 0);
    let b = read(ex, i, 1, size)?;
    let carry = ex.cpu.rflags & CF;
    update(ex, i, size, |a| f(a, b, carry, size))
}

/// CMP.
#[inline]
pub(super) fn cmp(ex: &mut Exec<'_>, i: &Instruction) -> Executed {
    let size = operand_size(i, 0);
    let a = read(ex, i, 0, size)?;
    let b = read(ex, i, 1, size)?;
    set_status(ex.cpu, alu::sub(a, b, 0, size).1);
    Ok(())
}

/// TEST.
#[inline]
pub(super) fn test(ex: &mut Exec<'_>, i: &Instruction) -> Executed {
    let size = operand_size(i, 0);
    let a = read(ex, i, 0, size)?;
    let b = read(ex, i, 1, size)?;
    set_status(ex.cpu, alu::logic(a & b, size));
    Ok(())
}

/// One operand, replaced: INC, DEC, NEG, NOT. `f(a, old status flags, size)`.
#[inline(always)]
pub(super) fn unary(
    ex: &mut Exec<'_>,
    i: &Instruction,
    f: impl Fn(u64, u64, usize) -> (u64, u64),
) -> Executed {
    let size = operand_size(i, 0);
    let old = ex.cpu.rflags & STATUS;
    update(ex, i, size, |a| f(a, old, size))
}

/// A shift or rotate by an immediate, 1 or CL. `f(value, masked count, old status flags, size)`; `open` is of [`undefined`].
#[inline(always)]
pub(super) fn shift(
    ex: &mut Exec<'_>,
    i: &Instruction,
    f: impl Fn(u64, u32, u64, usize) -> (u64, u64),
    open: impl Fn(HostVendor, Shifted) -> u64,
) -> Executed {
    let size = operand_size(i, 0);
    let n = shift::count(read(ex, i, 1, 1)?, size);
    let (old, host) = (ex.cpu.rflags & STATUS, ex.model.host());
    let constant = i.op0_kind() == OpKind::Register && i.op1_kind() == OpKind::Immediate8;
    update(ex, i, size, |a| {
        let (r, status) = f(a, n, old, size);
        let once = f(a, 1, old, size).1;
        (r, open(host, Shifted { r, f: status, once, old, n, size, constant }))
    })
}

/// SHLD, SHRD.
pub(super) fn double_shift(
    ex: &mut Exec<'_>,
    i: &Instruction,
    f: impl Fn(u64, u64, u32, u64, usize, HostVendor) -> (u64, u64),
    open: impl Fn(HostVendor, u64, u64, u32, usize) -> u64,
) -> Executed {
    let size = operand_size(i, 0);
    let fill = read(ex, i, 1, size)?;
    let n = shift::count(read(ex, i, 2, 1)?, size);
    let (old, host) = (ex.cpu.rflags & STATUS, ex.model.host());
    update(ex, i, size, |a| {
        let (r, status) = f(a, fill, n, old, size, host);
        (r, open(host, r, status, n, size))
    })
}

/// SHLX, SHRX, SARX, RORX: no flags.
pub(super) fn shift_without_flags(
    ex: &mut Exec<'_>,
    i: &Instruction,
    f: impl Fn(u64, u32, u64, usize) -> (u64, u64),
) -> Executed {
    let size = gpr_size(i.op0_register());
    let v = read(ex, i, 1, size)?;
    let n = shift::count(read(ex, i, 2, size)?, size);
    write_gpr(ex.cpu, i.op0_register(), f(v, n, 0, size).0);
    Ok(())
}

/// Writes `size` bytes of rDX:rAX (AX for bytes).
fn set_pair(ex: &mut Exec<'_>, size: usize, low: u64, high: u64) {
    if size == 1 {
        write_sized(ex.cpu, RAX, 2, low | high << 8);
    } else {
        write_sized(ex.cpu, RAX, size, low);
        write_sized(ex.cpu, RDX, size, high);
    }
}

/// MUL and the one-operand IMUL.
pub(super) fn mul(
    ex: &mut Exec<'_>,
    i: &Instruction,
    f: impl Fn(u64, u64, usize) -> (u64, u64, u64),
) -> Executed {
    let size = operand_size(i, 0);
    let b = read(ex, i, 0, size)?;
    let (low, high, status) = f(ex.cpu.gpr[RAX] & alu::mask(size), b, size);
    set_pair(ex, size, low, high);
    set_status(ex.cpu, undefined::mul(ex.model.host(), status, ex.cpu.rflags & STATUS));
    Ok(())
}

/// IMUL in every form.
pub(super) fn imul(ex: &mut Exec<'_>, i: &Instruction) -> Executed {
    if i.op_count() == 1 {
        return mul(ex, i, alu::imul);
    }
    let size = gpr_size(i.op0_register());
    let first = i.op_count() - 2;
    let a = read(ex, i, first, size)?;
    let b = read(ex, i, first + 1, size)?;
    let (low, _, status) = alu::imul(a, b, size);
    write_gpr(ex.cpu, i.op0_register(), low);
    set_status(ex.cpu, undefined::mul(ex.model.host(), status, ex.cpu.rflags & STATUS));
    Ok(())
}

/// DIV and IDIV.
pub(super) fn div(
    ex: &mut Exec<'_>,
    i: &Instruction,
    f: impl Fn(u64, u64, u64, usize) -> Option<(u64, u64)>,
) -> Executed {
    let size = operand_size(i, 0);
    let by = read(ex, i, 0, size)?;
    let m = alu::mask(size);
    let ax = ex.cpu.gpr[RAX];
    let high = if size == 1 { (ax >> 8) & m } else { ex.cpu.gpr[RDX] & m };
    let (quotient, remainder) = f(ax & m, high, by, size).ok_or(Fault::new(Vector::DE))?;
    set_pair(ex, size, quotient, remainder);
    set_status(ex.cpu, undefined::div(ex.model.host(), ex.cpu.rflags & STATUS));
    Ok(())
}

/// MULX: the high half is written last.
pub(super) fn mulx(ex: &mut Exec<'_>, i: &Instruction) -> Executed {
    let size = gpr_size(i.op0_register());
    let b = read(ex, i, 2, size)?;
    let (low, high, _) = alu::mul(ex.cpu.gpr[RDX] & alu::mask(size), b, size);
    write_gpr(ex.cpu, i.op1_register(), low);
    write_gpr(ex.cpu, i.op0_register(), high);
    Ok(())
}

/// ADCX (CF) and ADOX (OF): an addition whose only flag, in and out, is `flag`.
pub(super) fn add_with(ex: &mut Exec<'_>, i: &Instruction, flag: u64) -> Executed {
    let size = gpr_size(i.op0_register());
    let b = read(ex, i, 1, size)?;
    let a = read_gpr(ex.cpu, i.op0_register());
    let (r, f) = alu::add(a, b, u64::from(ex.cpu.rflags & flag != 0), size);
    write_gpr(ex.cpu, i.op0_register(), r);
    ex.cpu.rflags = (ex.cpu.rflags & !flag) | alu::when(f & CF != 0, flag);
    Ok(())
}

/// XCHG: with memory it is locked, prefix or not.
pub(super) fn xchg(ex: &mut Exec<'_>, i: &Instruction) -> Executed {
    let (memory, register) = if i.op1_kind() == OpKind::Memory { (1, 0) } else { (0, 1) };
    let r = i.op_register(register);
    let v = read_gpr(ex.cpu, r);
    let old = if i.op_kind(memory) == OpKind::Memory {
        let (seg, at) = address(ex.cpu, i);
        ex.rmw(seg, at, gpr_size(r), true, &mut |_| v)?
    } else {
        let other = i.op_register(memory);
        let old = read_gpr(ex.cpu, other);
        write_gpr(ex.cpu, other, v);
        old
    };
    write_gpr(ex.cpu, r, old);
    Ok(())
}

/// XADD.
pub(super) fn xadd(ex: &mut Exec<'_>, i: &Instruction) -> Executed {
    let r = i.op1_register();
    let (size, b) = (gpr_size(r), read_gpr(ex.cpu, r));
    let old = if i.op0_kind() == OpKind::Memory {
        let (seg, at) = address(ex.cpu, i);
        let old = ex.rmw(seg, at, size, i.has_lock_prefix(), &mut |a| alu::add(a, b, 0, size).0)?;
        write_gpr(ex.cpu, r, old);
        old
    } else {
        let old = read_gpr(ex.cpu, i.op0_register());
        // The sum is written last: it stays when both operands are one register.
        write_gpr(ex.cpu, r, old);
        write_gpr(ex.cpu, i.op0_register(), alu::add(old, b, 0, size).0);
        old
    };
    set_status(ex.cpu, alu::add(old, b, 0, size).1);
    Ok(())
}

/// CMPXCHG: the destination is written in both cases where it is memory.
pub(super) fn cmpxchg(ex: &mut Exec<'_>, i: &Instruction) -> Executed {
    let r = i.op1_register();
    let (size, new) = (gpr_size(r), read_gpr(ex.cpu, r));
    let expected = ex.cpu.gpr[RAX] & alu::mask(size);
    let old = if i.op0_kind() == OpKind::Memory {
        let (seg, at) = address(ex.cpu, i);
        ex.rmw(seg, at, size, i.has_lock_prefix(), &mut |v| if v == expected { new } else { v })?
    } else {
        let old = read_gpr(ex.cpu, i.op0_register());
        if old == expected {
            write_gpr(ex.cpu, i.op0_register(), new);
        }
        old
    };
    if old != expected {
        write_sized(ex.cpu, RAX, size, old);
    }
    set_status(ex.cpu, alu::sub(expected, old, 0, size).1);
    Ok(())
}

/// Two registers of `size` bytes as one value.
fn pair(ex: &Exec<'_>, high: usize, low: usize, size: usize) -> u128 {
    let m = alu::mask(size);
    u128::from(ex.cpu.gpr[high] & m) << (8 * size) | u128::from(ex.cpu.gpr[low] & m)
}

/// CMPXCHG8B, CMPXCHG16B (which must be aligned).
pub(super) fn cmpxchg_pair(ex: &mut Exec<'_>, i: &Instruction, size: usize) -> Executed {
    let (seg, at) = address(ex.cpu, i);
    let expected = pair(ex, RDX, RAX, size);
    let new = pair(ex, RCX, RBX, size);
    let old = if size == 4 {
        let swap = &mut |v| if u128::from(v) == expected { new as u64 } else { v };
        u128::from(ex.rmw(seg, at, 8, i.has_lock_prefix(), swap)?)
    } else {
        if misaligned(ex, seg, at, 16) {
            return Err(Fault::GP0);
        }
        ex.rmw16b(seg, at, &mut |v| (v == expected).then_some(new))?
    };
    if old == expected {
        ex.cpu.rflags |= ZF;
    } else {
        ex.cpu.rflags &= !ZF;
        write_sized(ex.cpu, RAX, size, old as u64);
        write_sized(ex.cpu, RDX, size, (old >> (8 * size)) as u64);
    }
    Ok(())
}

/// BT, BTS, BTR, BTC: `f(value, bit)`. A register bit offset reaches outside a memory operand, both ways.
pub(super) fn bit_test(ex: &mut Exec<'_>, i: &Instruction, f: Option<fn(u64, u64) -> u64>) -> Executed {
    let size = operand_size(i, 0);
    let index = read(ex, i, 1, size)?;
    let bit = 1u64 << (index & (8 * size as u64 - 1));
    let old = if i.op0_kind() == OpKind::Register {
        let r = i.op0_register();
        let old = read_gpr(ex.cpu, r);
        if let Some(f) = f {
            write_gpr(ex.cpu, r, f(old, bit));
        }
        old
    } else {
        let (seg, mut at) = address(ex.cpu, i);
        if i.op1_kind() == OpKind::Register {
            let shift = (8 * size).trailing_zeros();
            let cells = (alu::sign_extend(index, size) as i64) >> shift;
            at = at.wrapping_add((cells as u64).wrapping_mul(size as u64)) & address_mask(i);
        }
        match f {
            Some(f) => ex.rmw(seg, at, size, i.has_lock_prefix(), &mut |v| f(v, bit))?,
            None => ex.load(seg, at, size)?,
        }
    };
    ex.cpu.rflags = (ex.cpu.rflags & !CF) | u64::from(old & bit != 0);
    Ok(())
}

/// BSF and BSR: a zero source leaves the whole destination register alone.
pub(super) fn bit_scan(ex: &mut Exec<'_>, i: &Instruction, f: fn(u64) -> (Option<u64>, u64)) -> Executed {
    let size = gpr_size(i.op0_register());
    let (r, status) = f(read(ex, i, 1, size)?);
    if let Some(r) = r {
        write_gpr(ex.cpu, i.op0_register(), r);
    }
    set_status(ex.cpu, status);
    Ok(())
}

/// Destination register, one source: TZCNT, LZCNT, POPCNT, BLSI, BLSMSK, BLSR.
pub(super) fn from_source(
    ex: &mut Exec<'_>,
    i: &Instruction,
    f: impl Fn(u64, usize) -> (u64, u64),
    open: impl Fn(HostVendor, u64, u64, u64) -> u64,
) -> Executed {
    let size = gpr_size(i.op0_register());
    let (r, status) = f(read(ex, i, 1, size)?, size);
    write_gpr(ex.cpu, i.op0_register(), r);
    set_status(ex.cpu, open(ex.model.host(), r, status, ex.cpu.rflags));
    Ok(())
}

/// Destination register, two sources: ANDN, BEXTR, BZHI.
pub(super) fn from_sources(
    ex: &mut Exec<'_>,
    i: &Instruction,
    f: impl Fn(u64, u64, usize) -> (u64, u64),
    open: impl Fn(HostVendor, u64, u64, u64) -> u64,
) -> Executed {
    let size = gpr_size(i.op0_register());
    let (a, b) = (read(ex, i, 1, size)?, read(ex, i, 2, size)?);
    let (r, status) = f(a, b, size);
    write_gpr(ex.cpu, i.op0_register(), r);
    set_status(ex.cpu, open(ex.model.host(), r, status, ex.cpu.rflags));
    Ok(())
}

/// PDEP, PEXT.
pub(super) fn scatter(ex: &mut Exec<'_>, i: &Instruction, f: fn(u64, u64) -> u64) -> Executed {
    let size = gpr_size(i.op0_register());
    let (v, m) = (read(ex, i, 1, size)?, read(ex, i, 2, size)?);
    write_gpr(ex.cpu, i.op0_register(), f(v, m));
    Ok(())
}

/// ANDN.
pub(super) fn andn(a: u64, b: u64, size: usize) -> (u64, u64) {
    let r = !a & b & alu::mask(size);
    (r, bits::sz(r, size))
}

/// CRC32.
pub(super) fn crc32(ex: &mut Exec<'_>, i: &Instruction) -> Executed {
    let size = operand_size(i, 1);
    let v = read(ex, i, 1, size)?;
    let r = i.op0_register();
    let crc = bits::crc32c(read_gpr(ex.cpu, r) as u32, v, size);
    write_gpr(ex.cpu, r, u64::from(crc));
    Ok(())
}

/// AL or AX through one of the decimal adjustments.
pub(super) fn decimal(ex: &mut Exec<'_>, i: &Instruction) -> Executed {
    let (ax, f) = (ex.cpu.gpr[RAX] as u16, ex.cpu.rflags);
    let (r, status) = match i.code() {
        Code::Daa => with_ah(ax, alu::daa(ax as u8, f)),
        Code::Das => with_ah(ax, alu::das(ax as u8, f)),
        Code::Aaa => alu::aaa(ax, f),
        Code::Aas => alu::aas(ax, f),
        Code::Aam_imm8 => alu::aam(ax as u8, i.immediate8()).ok_or(Fault::new(Vector::DE))?,
        _ => alu::aad(ax, i.immediate8()),
    };
    write_sized(ex.cpu, RAX, 2, u64::from(r));
    set_status(ex.cpu, undefined::decimal(ex.model.host(), i.code(), ax, r, status));
    Ok(())
}

fn with_ah(ax: u16, (al, f): (u8, u64)) -> (u16, u64) {
    ((ax & 0xFF00) | u16::from(al), f)
}

/// CBW, CWDE, CDQE (`size` is the result's).
pub(super) fn widen(ex: &mut Exec<'_>, size: usize) -> Executed {
    let v = alu::sign_extend(ex.cpu.gpr[RAX], size / 2);
    write_sized(ex.cpu, RAX, size, v);
    Ok(())
}

/// CWD, CDQ, CQO.
pub(super) fn sign_into_dx(ex: &mut Exec<'_>, size: usize) -> Executed {
    let v = alu::sign_extend(ex.cpu.gpr[RAX], size) as i64 >> 63;
    write_sized(ex.cpu, RDX, size, v as u64);
    Ok(())
}

/// MOVSX, MOVSXD (`signed`) and MOVZX.
#[inline]
pub(super) fn extend(ex: &mut Exec<'_>, i: &Instruction, signed: bool) -> Executed {
    let size = operand_size(i, 1);
    let v = read(ex, i, 1, size)?;
    let v = if signed { alu::sign_extend(v, size) } else { v };
    write_gpr(ex.cpu, i.op0_register(), v);
    Ok(())
}

/// CMOVcc: the source is read and a 32-bit destination zero-extended in either case.
#[inline]
pub(super) fn cmov(ex: &mut Exec<'_>, i: &Instruction, cc: u8) -> Executed {
    let r = i.op0_register();
    let v = read(ex, i, 1, gpr_size(r))?;
    let v = if alu::condition(cc, ex.cpu.rflags) { v } else { read_gpr(ex.cpu, r) };
    write_gpr(ex.cpu, r, v);
    Ok(())
}

/// SETcc.
#[inline]
pub(super) fn setcc(ex: &mut Exec<'_>, i: &Instruction, cc: u8) -> Executed {
    let v = u64::from(alu::condition(cc, ex.cpu.rflags));
    write(ex, i, 0, 1, v)
}

/// BSWAP; the 16-bit form (undefined) clears the register.
pub(super) fn bswap(ex: &mut Exec<'_>, i: &Instruction) -> Executed {
    let r = i.op0_register();
    let v = read_gpr(ex.cpu, r);
    let v = match gpr_size(r) {
        8 => v.swap_bytes(),
        4 => u64::from((v as u32).swap_bytes()),
        _ => 0,
    };
    write_gpr(ex.cpu, r, v);
    Ok(())
}

/// MOVBE.
pub(super) fn movbe(ex: &mut Exec<'_>, i: &Instruction) -> Executed {
    let size = operand_size(i, 0);
    let v = read(ex, i, 1, size)?.swap_bytes() >> (64 - 8 * size as u32);
    write(ex, i, 0, size, v)
}

/// BOUND: the upper bound is read only if the lower one is kept.
pub(super) fn bound(ex: &mut Exec<'_>, i: &Instruction) -> Executed {
    let r = i.op0_register();
    let size = gpr_size(r);
    let (seg, at) = address(ex.cpu, i);
    let signed = |v| alu::sign_extend(v, size) as i64;
    let v = signed(read_gpr(ex.cpu, r));
    let outside = Err(Fault::new(Vector::BR));
    if v < signed(ex.load(seg, at, size)?) {
        return outside;
    }
    let upper = ex.load(seg, at.wrapping_add(size as u64) & address_mask(i), size)?;
    if v > signed(upper) { outside } else { Ok(()) }
}

/// RDRAND, RDSEED: CF set, the other status flags cleared. The numbers come from a mixing function (SplitMix64) of
/// the time-stamp counter and the instruction count, so that a run under the instruction clock repeats; they
/// are not fit for keys that must hold against someone who knows both.
pub(super) fn random(ex: &mut Exec<'_>, r: Register) -> Executed {
    let seed = ex.bus.tsc(ex.vp) ^ ex.cpu.instructions.rotate_left(32) ^ u64::from(ex.vp.0).rotate_left(56);
    let mut z = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    write_gpr(ex.cpu, r, z ^ (z >> 31));
    set_status(ex.cpu, CF);
    Ok(())
}

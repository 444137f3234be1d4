//! The interpreter's instruction semantics (SDM 2): everything but the system instructions is here and below,
//! those are in [`system`].
//!
//! [`execute`] runs one decoded instruction. It either completes it, with `next_rip` telling where to go on, or
//! returns the fault with the state as before the instruction (string repetitions: as after the iterations
//! that are complete). Whether the CPU model offers an instruction and whether a LOCK prefix is legal is decided
//! once, when the instruction is decoded, not here.

mod alu;
mod arith;
mod bits;
mod masked;
mod operand;
mod shift;
mod stack;
mod string;
pub(crate) mod system;
mod system_io;
mod undefined;
mod vector;
mod x87;
mod xsave;

#[cfg(test)]
mod tests;

pub(crate) use vector::follow_ignne;
pub use vector::operand_alignment;
pub use x87::opcode as x87_opcode;

use crate::exec::Exec;
use crate::fault::Fault;
use crate::state::{SegReg, flags, gpr};
use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind};
use operand::{address, effective, gpr_size, operand_size, read, read_gpr, set_status, write, write_gpr};

/// Executes `instr`, whose bytes are `bytes`, at `cpu.rip`.
pub(crate) fn execute(ex: &mut Exec<'_>, instr: &Instruction, bytes: &[u8]) -> Result<(), Fault> {
    use Mnemonic::*;
    let i = instr;
    match i.mnemonic() {
        Mov => mov(ex, i),
        Lea => lea(ex, i),
        Add => arith::binary(ex, i, |a, b, _, s| alu::add(a, b, 0, s)),
        Sub => arith::binary(ex, i, |a, b, _, s| alu::sub(a, b, 0, s)),
        And => arith::binary(ex, i, |a, b, _, s| (a & b, alu::logic(a & b, s))),
        Or => arith::binary(ex, i, |a, b, _, s| (a | b, alu::logic(a | b, s))),
        Xor => arith::binary(ex, i, |a, b, _, s| (a ^ b, alu::logic(a ^ b, s))),
        Adc => arith::binary(ex, i, alu::add),
        Sbb => arith::binary(ex, i, alu::sub),
        Cmp => arith::cmp(ex, i),
        Test => arith::test(ex, i),
        Inc => arith::unary(ex, i, alu::inc),
        Dec => arith::unary(ex, i, alu::dec),
        Neg => arith::unary(ex, i, |a, _, s| alu::sub(0, a, 0, s)),
        Not => arith::unary(ex, i, |a, f, s| (!a & alu::mask(s), f)),
        Movzx => arith::extend(ex, i, false),
        Movsx | Movsxd => arith::extend(ex, i, true),
        Push if !segment_operand(i) => stack::push(ex, i),
        Pop if !segment_operand(i) => stack::pop(ex, i),
        Call if !stack::is_far(i) => stack::call(ex, i),
        Jmp if !stack::is_far(i) => stack::jmp(ex, i),
        Ret => stack::ret(ex, i),
        Jo => jcc(ex, i, 0),
        Jno => jcc(ex, i, 1),
        Jb => jcc(ex, i, 2),
        Jae => jcc(ex, i, 3),
        Je => jcc(ex, i, 4),
        Jne => jcc(ex, i, 5),
        Jbe => jcc(ex, i, 6),
        Ja => jcc(ex, i, 7),
        Js => jcc(ex, i, 8),
        Jns => jcc(ex, i, 9),
        Jp => jcc(ex, i, 10),
        Jnp => jcc(ex, i, 11),
        Jl => jcc(ex, i, 12),
        Jge => jcc(ex, i, 13),
        Jle => jcc(ex, i, 14),
        Jg => jcc(ex, i, 15),
        Shl | Sal => arith::shift(ex, i, shift::shl, undefined::shift),
        Shr => arith::shift(ex, i, shift::shr, undefined::shr),
        Sar => arith::shift(ex, i, shift::sar, undefined::shift),
        Nop | Endbr32 | Endbr64 => Ok(()),
        _ => less_common(ex, i, bytes),
    }
}

/// Instructions that do not dominate any program.
fn less_common(ex: &mut Exec<'_>, i: &Instruction, bytes: &[u8]) -> Result<(), Fault> {
    use Mnemonic::*;
    match i.mnemonic() {
        Rol => arith::shift(ex, i, shift::rol, undefined::rotate),
        Ror => arith::shift(ex, i, shift::ror, undefined::rotate),
        Rcl => arith::shift(ex, i, shift::rcl, undefined::rotate_through_carry),
        Rcr => arith::shift(ex, i, shift::rcr, undefined::rotate_through_carry),
        Shld => arith::double_shift(ex, i, shift::shld, undefined::shld),
        Shrd => arith::double_shift(ex, i, shift::shrd, undefined::shrd),
        Mul => arith::mul(ex, i, alu::mul),
        Imul => arith::imul(ex, i),
        Div => arith::div(ex, i, alu::div),
        Idiv => arith::div(ex, i, alu::idiv),
        Xchg => arith::xchg(ex, i),
        Xadd => arith::xadd(ex, i),
        Cmpxchg => arith::cmpxchg(ex, i),
        Cmpxchg8b => arith::cmpxchg_pair(ex, i, 4),
        Cmpxchg16b => arith::cmpxchg_pair(ex, i, 8),
        Bt => arith::bit_test(ex, i, None),
        Bts => arith::bit_test(ex, i, Some(|v, b| v | b)),
        Btr => arith::bit_test(ex, i, Some(|v, b| v & !b)),
        Btc => arith::bit_test(ex, i, Some(|v, b| v ^ b)),
        Bsf => arith::bit_scan(ex, i, bits::bsf),
        Bsr => arith::bit_scan(ex, i, bits::bsr),
        Bswap => arith::bswap(ex, i),
        Cbw => arith::widen(ex, 2),
        Cwde => arith::widen(ex, 4),
        Cdqe => arith::widen(ex, 8),
        Cwd => arith::sign_into_dx(ex, 2),
        Cdq => arith::sign_into_dx(ex, 4),
        Cqo => arith::sign_into_dx(ex, 8),
        Movsb => string::movs(ex, i, 1),
        Movsw => string::movs(ex, i, 2),
        Movsd if is_string(i) => string::movs(ex, i, 4),
        Movsq => string::movs(ex, i, 8),
        Stosb => string::stos(ex, i, 1),
        Stosw => string::stos(ex, i, 2),
        Stosd => string::stos(ex, i, 4),
        Stosq => string::stos(ex, i, 8),
        Lodsb => string::lods(ex, i, 1),
        Lodsw => string::lods(ex, i, 2),
        Lodsd => string::lods(ex, i, 4),
        Lodsq => string::lods(ex, i, 8),
        Cmpsb => string::cmps(ex, i, 1),
        Cmpsw => string::cmps(ex, i, 2),
        Cmpsd if is_string(i) => string::cmps(ex, i, 4),
        Cmpsq => string::cmps(ex, i, 8),
        Scasb => string::scas(ex, i, 1),
        Scasw => string::scas(ex, i, 2),
        Scasd => string::scas(ex, i, 4),
        Scasq => string::scas(ex, i, 8),
        Pusha => stack::pusha(ex, 2),
        Pushad => stack::pusha(ex, 4),
        Popa => stack::popa(ex, 2),
        Popad => stack::popa(ex, 4),
        Enter => stack::enter(ex, i),
        Leave => stack::leave(ex, i),
        Loop => stack::loop_(ex, i, true),
        Loope => stack::loop_(ex, i, ex.cpu.rflags & flags::ZF != 0),
        Loopne => stack::loop_(ex, i, ex.cpu.rflags & flags::ZF == 0),
        Jcxz => stack::jump_if_count_zero(ex, i, 2),
        Jecxz => stack::jump_if_count_zero(ex, i, 4),
        Jrcxz => stack::jump_if_count_zero(ex, i, 8),
        _ => conditional(ex, i).unwrap_or_else(|| rare(ex, i, bytes)),
    }
}

/// CMOVcc and SETcc.
fn conditional(ex: &mut Exec<'_>, i: &Instruction) -> Option<Result<(), Fault>> {
    use Mnemonic::*;
    let m = i.mnemonic();
    let cc = match m {
        Cmovo | Seto => 0,
        Cmovno | Setno => 1,
        Cmovb | Setb => 2,
        Cmovae | Setae => 3,
        Cmove | Sete => 4,
        Cmovne | Setne => 5,
        Cmovbe | Setbe => 6,
        Cmova | Seta => 7,
        Cmovs | Sets => 8,
        Cmovns | Setns => 9,
        Cmovp | Setp => 10,
        Cmovnp | Setnp => 11,
        Cmovl | Setl => 12,
        Cmovge | Setge => 13,
        Cmovle | Setle => 14,
        Cmovg | Setg => 15,
        _ => return None,
    };
    Some(if i.op_count() == 1 { arith::setcc(ex, i, cc) } else { arith::cmov(ex, i, cc) })
}

/// Flag instructions, BCD, bit manipulation extensions, hints; then the vector units and system instructions.
fn rare(ex: &mut Exec<'_>, i: &Instruction, bytes: &[u8]) -> Result<(), Fault> {
    use Mnemonic::*;
    if i.encoding() == EncodingKind::VEX && (!ex.cpu.protected() || ex.cpu.v8086()) {
        return Err(Fault::UD);
    }
    match i.mnemonic() {
        Clc => flag(ex, flags::CF, 0),
        Stc => flag(ex, 0, flags::CF),
        Cmc => flag(ex, 0, 0).map(|()| ex.cpu.rflags ^= flags::CF),
        Cld => flag(ex, flags::DF, 0),
        Std => flag(ex, 0, flags::DF),
        Lahf => lahf(ex),
        Sahf => sahf(ex),
        Salc => salc(ex),
        Xlatb => xlat(ex, i),
        Daa | Das | Aaa | Aas | Aam | Aad => arith::decimal(ex, i),
        Bound => arith::bound(ex, i),
        Movbe => arith::movbe(ex, i),
        Movnti => store_register(ex, i),
        Tzcnt => arith::from_source(ex, i, bits::tzcnt, undefined::count),
        Lzcnt => arith::from_source(ex, i, bits::lzcnt, undefined::count),
        Popcnt => arith::from_source(ex, i, |v, _| bits::popcnt(v), undefined::nothing),
        Blsi => arith::from_source(ex, i, bits::blsi, undefined::lowest),
        Blsmsk => arith::from_source(ex, i, bits::blsmsk, undefined::lowest),
        Blsr => arith::from_source(ex, i, bits::blsr, undefined::lowest),
        Andn => arith::from_sources(ex, i, arith::andn, undefined::lowest),
        Bextr => arith::from_sources(ex, i, |v, c, _| bits::bextr(v, c), undefined::extract),
        Bzhi => arith::from_sources(ex, i, bits::bzhi, undefined::lowest),
        Mulx => arith::mulx(ex, i),
        Pdep => arith::scatter(ex, i, bits::pdep),
        Pext => arith::scatter(ex, i, bits::pext),
        Rorx => arith::shift_without_flags(ex, i, shift::ror),
        Sarx => arith::shift_without_flags(ex, i, shift::sar),
        Shlx => arith::shift_without_flags(ex, i, shift::shl),
        Shrx => arith::shift_without_flags(ex, i, shift::shr),
        Adcx => arith::add_with(ex, i, flags::CF),
        Adox => arith::add_with(ex, i, flags::OF),
        Crc32 => arith::crc32(ex, i),
        Rdrand | Rdseed => arith::random(ex, i.op0_register()),
        Rdpid => rdpid(ex, i),
        Pause | Reservednop | Cldemote | Prefetch | Prefetchnta | Prefetcht0 | Prefetcht1 | Prefetcht2
        | Prefetchw | Prefetchwt1 => Ok(()),
        Clflush | Clflushopt | Clwb => touch(ex, i),
        Lfence | Sfence | Mfence => fence(),
        Ud0 | Ud1 | Ud2 => Err(Fault::UD),
        _ => match vector::execute(ex, i, bytes) {
            Some(done) => done,
            None => system::execute(ex, i).unwrap_or(Err(Fault::UD)),
        },
    }
}

/// MOV of general registers, memory and immediates; segment, control and debug registers are system forms.
#[inline(always)]
fn mov(ex: &mut Exec<'_>, i: &Instruction) -> Result<(), Fault> {
    match (i.op0_kind(), i.op1_kind()) {
        (OpKind::Register, OpKind::Memory) if operand::gpr_number(i.op0_register()).is_some() => {
            let r = i.op0_register();
            let (seg, at) = address(ex.cpu, i);
            let v = ex.load(seg, at, gpr_size(r))?;
            write_gpr(ex.cpu, r, v);
            Ok(())
        }
        (OpKind::Memory, OpKind::Register) if operand::gpr_number(i.op1_register()).is_some() => {
            store_register(ex, i)
        }
        (OpKind::Register, OpKind::Register) => {
            let (to, from) = (i.op0_register(), i.op1_register());
            if operand::gpr_number(to).is_none() || operand::gpr_number(from).is_none() {
                return system::execute(ex, i).unwrap_or(Err(Fault::UD));
            }
            let v = read_gpr(ex.cpu, from);
            write_gpr(ex.cpu, to, v);
            Ok(())
        }
        (OpKind::Register, OpKind::Memory) | (OpKind::Memory, OpKind::Register) => {
            system::execute(ex, i).unwrap_or(Err(Fault::UD))
        }
        _ => {
            let size = operand_size(i, 0);
            let v = read(ex, i, 1, size)?;
            write(ex, i, 0, size, v)
        }
    }
}

/// MOV to memory and MOVNTI.
#[inline(always)]
fn store_register(ex: &mut Exec<'_>, i: &Instruction) -> Result<(), Fault> {
    let r = i.op1_register();
    let (seg, at) = address(ex.cpu, i);
    ex.store(seg, at, gpr_size(r), read_gpr(ex.cpu, r))
}

/// LEA.
#[inline(always)]
fn lea(ex: &mut Exec<'_>, i: &Instruction) -> Result<(), Fault> {
    let at = effective(ex.cpu, i);
    write_gpr(ex.cpu, i.op0_register(), at);
    Ok(())
}

/// Jcc.
#[inline(always)]
fn jcc(ex: &mut Exec<'_>, i: &Instruction, cc: u8) -> Result<(), Fault> {
    if alu::condition(cc, ex.cpu.rflags) { stack::branch_relative(ex, i) } else { Ok(()) }
}

/// The operand is a segment register.
#[inline(always)]
fn segment_operand(i: &Instruction) -> bool {
    i.op0_kind() == OpKind::Register && i.op0_register().is_segment_register()
}

/// MOVSD and CMPSD name a string instruction and an SSE2 one.
fn is_string(i: &Instruction) -> bool {
    i.op0_kind() != OpKind::Register && i.op1_kind() != OpKind::Register
}

fn flag(ex: &mut Exec<'_>, clear: u64, set: u64) -> Result<(), Fault> {
    ex.cpu.rflags = (ex.cpu.rflags & !clear) | set;
    Ok(())
}

/// Flags that LAHF and SAHF move.
const AH_FLAGS: u64 = flags::SF | flags::ZF | flags::AF | flags::PF | flags::CF;

fn lahf(ex: &mut Exec<'_>) -> Result<(), Fault> {
    let ah = (ex.cpu.rflags & AH_FLAGS) | flags::FIXED;
    write_gpr(ex.cpu, iced_x86::Register::AH, ah);
    Ok(())
}

fn sahf(ex: &mut Exec<'_>) -> Result<(), Fault> {
    let ah = read_gpr(ex.cpu, iced_x86::Register::AH);
    let of = ex.cpu.rflags & flags::OF;
    set_status(ex.cpu, (ah & AH_FLAGS) | of);
    Ok(())
}

fn salc(ex: &mut Exec<'_>) -> Result<(), Fault> {
    let al = if ex.cpu.rflags & flags::CF != 0 { 0xFF } else { 0 };
    operand::write_sized(ex.cpu, gpr::RAX, 1, al);
    Ok(())
}

fn xlat(ex: &mut Exec<'_>, i: &Instruction) -> Result<(), Fault> {
    let (seg, at) = address(ex.cpu, i);
    let v = ex.load(seg, at, 1)?;
    operand::write_sized(ex.cpu, gpr::RAX, 1, v);
    Ok(())
}

fn rdpid(ex: &mut Exec<'_>, i: &Instruction) -> Result<(), Fault> {
    let v = u64::from(ex.cpu.msr.tsc_aux as u32);
    write_gpr(ex.cpu, i.op0_register(), v);
    Ok(())
}

/// CLFLUSH and its kin: there is no cache, but the address is checked as for a byte load.
fn touch(ex: &mut Exec<'_>, i: &Instruction) -> Result<(), Fault> {
    let (seg, at): (SegReg, u64) = address(ex.cpu, i);
    let lin = ex.linear(seg, at, 1, false)?;
    ex.span(lin, false).map(drop)
}

fn fence() -> Result<(), Fault> {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Ok(())
}

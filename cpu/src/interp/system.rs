//! System instructions, far transfers, segment registers and port I/O (SDM 2; SDM 3A, chapters 2, 5 and 6).

use super::operand::{address, operand_size, read, read_gpr, write, write_gpr};
use super::system_io as io;
use crate::control;
use crate::exception::{self, Event, Source};
use crate::exec::{Exec, Outcome};
use crate::fault::{Fault, Vector};
use crate::msr;
use crate::segment::{self, canonical};
use crate::state::{DescriptorTable, LinAddr, SegReg, Shadow, cr0, cr4, flags, gpr};
use crate::{syscall, transfer, vme};
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use std::sync::atomic::{Ordering, fence};

type Done = Result<(), Fault>;

/// Executes `instr` if it is a system instruction; `None` if it is not.
pub(crate) fn execute(ex: &mut Exec<'_>, i: &Instruction) -> Option<Done> {
    use Mnemonic::*;
    if serializes(i) {
        // Stores of translated code that the host has not made yet must be seen first (SDM 3A, 8.3).
        fence(Ordering::SeqCst);
    }
    Some(match i.mnemonic() {
        Mov => mov(ex, i)?,
        Push => push_segment(ex, i)?,
        Pop => pop_segment(ex, i)?,
        Les => load_far(ex, i, SegReg::Es),
        Lds => load_far(ex, i, SegReg::Ds),
        Lss => load_far(ex, i, SegReg::Ss),
        Lfs => load_far(ex, i, SegReg::Fs),
        Lgs => load_far(ex, i, SegReg::Gs),
        Pushf | Pushfd | Pushfq => pushf(ex, i),
        Popf | Popfd | Popfq => popf(ex, i),
        Call => far_call(ex, i)?,
        Jmp => far_jump(ex, i)?,
        Retf => far_return(ex, i),
        Int => interrupt(ex, i.immediate8(), Source::Int),
        Int3 => interrupt(ex, Vector::BP.0, Source::Trap),
        Int1 => interrupt(ex, Vector::DB.0, Source::Hardware),
        Into if ex.cpu.rflags & flags::OF == 0 => Ok(()),
        Into => interrupt(ex, Vector::OF.0, Source::Trap),
        Iret => transfer::iret(ex, 2),
        Iretd => transfer::iret(ex, 4),
        Iretq => transfer::iret(ex, 8),
        Syscall => syscall::syscall(ex),
        Sysret => syscall::sysret(ex, false),
        Sysretq => syscall::sysret(ex, true),
        Sysenter => syscall::sysenter(ex),
        Sysexit => syscall::sysexit(ex, false),
        Sysexitq => syscall::sysexit(ex, true),
        In => io::port_in(ex, i),
        Out => io::port_out(ex, i),
        Insb => io::ins(ex, i, 1),
        Insw => io::ins(ex, i, 2),
        Insd => io::ins(ex, i, 4),
        Outsb => io::outs(ex, i, 1),
        Outsw => io::outs(ex, i, 2),
        Outsd => io::outs(ex, i, 4),
        Cli => interrupt_flag(ex, false),
        Sti => interrupt_flag(ex, true),
        Hlt => privileged(ex).map(|()| ex.outcome = Outcome::Halt),
        Stac => access_flag(ex, true),
        Clac => access_flag(ex, false),
        Swapgs => swapgs(ex),
        Rdfsbase => read_base(ex, i, SegReg::Fs),
        Rdgsbase => read_base(ex, i, SegReg::Gs),
        Wrfsbase => write_base(ex, i, SegReg::Fs),
        Wrgsbase => write_base(ex, i, SegReg::Gs),
        _ => return registers(ex, i),
    })
}

/// Serializing instructions (SDM 3A, 8.3).
fn serializes(i: &Instruction) -> bool {
    use Mnemonic::*;
    let to = i.op0_register();
    match i.mnemonic() {
        Mov => to.is_cr() || to.is_dr(),
        Iret | Iretd | Iretq | Cpuid | Wrmsr | Invlpg | Invpcid | Invd | Wbinvd | Lgdt | Lidt | Lldt
        | Ltr => true,
        _ => false,
    }
}

/// Control state: tables, MSRs, caches, CPUID, descriptor queries.
fn registers(ex: &mut Exec<'_>, i: &Instruction) -> Option<Done> {
    use Mnemonic::*;
    Some(match i.mnemonic() {
        Lgdt => load_table(ex, i).map(|t| ex.cpu.gdtr = t),
        Lidt => load_table(ex, i).map(|t| ex.cpu.idtr = t),
        Sgdt => store_table(ex, i, ex.cpu.gdtr),
        Sidt => store_table(ex, i, ex.cpu.idtr),
        Lldt => load_system(ex, i, control::load_ldt),
        Ltr => load_system(ex, i, control::load_task_register),
        Sldt => store_system(ex, i, u64::from(ex.cpu.ldtr.selector)),
        Str => store_system(ex, i, u64::from(ex.cpu.tr.selector)),
        Lmsw => lmsw(ex, i),
        Smsw => smsw(ex, i),
        Clts => privileged(ex).map(|()| ex.cpu.cr0 &= !cr0::TS),
        Invlpg => invlpg(ex, i),
        Invpcid => invpcid(ex, i),
        Invd | Wbinvd => privileged(ex),
        Rdmsr => rdmsr(ex),
        Wrmsr => wrmsr(ex),
        Rdtsc => rdtsc(ex),
        Rdtscp => rdtsc(ex).map(|()| ex.cpu.gpr[gpr::RCX] = ex.cpu.msr.tsc_aux & 0xFFFF_FFFF),
        // No counters are offered, so every index is wrong.
        Rdpmc => Err(Fault::GP0),
        Cpuid => cpuid(ex),
        Xgetbv => xgetbv(ex),
        Xsetbv => xsetbv(ex),
        Lar => query(ex, i, access_rights),
        Lsl => query(ex, i, limit),
        Verr => verify(ex, i, false),
        Verw => verify(ex, i, true),
        Arpl => arpl(ex, i),
        Monitor | Mwait | Rsm => Err(Fault::UD),
        _ => return None,
    })
}

/// `#GP(0)` unless at CPL 0.
fn privileged(ex: &Exec<'_>) -> Done {
    if ex.cpu.cpl == 0 { Ok(()) } else { Err(Fault::GP0) }
}

/// `#UD` in real and virtual-8086 mode.
fn protected_only(ex: &Exec<'_>) -> Done {
    if ex.cpu.protected() && !ex.cpu.v8086() { Ok(()) } else { Err(Fault::UD) }
}

/// CR4.UMIP keeps SGDT, SIDT, SLDT, STR and SMSW from CPL above 0.
fn user_may_look(ex: &Exec<'_>) -> Done {
    if ex.cpu.cr4 & cr4::UMIP != 0 && ex.cpu.cpl > 0 { Err(Fault::GP0) } else { Ok(()) }
}

pub(super) fn segment_register(r: Register) -> Option<SegReg> {
    Some(match r {
        Register::ES => SegReg::Es,
        Register::CS => SegReg::Cs,
        Register::SS => SegReg::Ss,
        Register::DS => SegReg::Ds,
        Register::FS => SegReg::Fs,
        Register::GS => SegReg::Gs,
        _ => return None,
    })
}

/// EDX:EAX, the upper halves cleared.
fn set_pair(ex: &mut Exec<'_>, v: u64) {
    ex.cpu.gpr[gpr::RAX] = v & 0xFFFF_FFFF;
    ex.cpu.gpr[gpr::RDX] = v >> 32;
}

fn pair(ex: &Exec<'_>) -> u64 {
    ex.cpu.gpr[gpr::RDX] << 32 | ex.cpu.gpr[gpr::RAX] & 0xFFFF_FFFF
}

// ---- segment, control and debug registers --------------------------------------------------------------

fn mov(ex: &mut Exec<'_>, i: &Instruction) -> Option<Done> {
    let (to, from) = (i.op0_register(), i.op1_register());
    if i.op0_kind() == OpKind::Register {
        if let Some(seg) = segment_register(to) {
            return Some(to_segment(ex, i, seg));
        }
        if to.is_cr() || to.is_dr() || to.is_tr() {
            return Some(to_special(ex, to, from));
        }
    }
    if i.op1_kind() != OpKind::Register {
        return None;
    }
    if let Some(seg) = segment_register(from) {
        let selector = u64::from(ex.cpu.segment(seg).selector);
        let size = if i.op0_kind() == OpKind::Register { operand_size(i, 0) } else { 2 };
        return Some(write(ex, i, 0, size, selector));
    }
    (from.is_cr() || from.is_dr() || from.is_tr()).then(|| from_special(ex, to, from))
}

fn to_segment(ex: &mut Exec<'_>, i: &Instruction, seg: SegReg) -> Done {
    if seg == SegReg::Cs {
        return Err(Fault::UD);
    }
    let selector = read(ex, i, 1, 2)? as u16;
    ex.set_seg(seg, selector)
}

fn to_special(ex: &mut Exec<'_>, to: Register, from: Register) -> Done {
    control_exists(ex, to)?;
    privileged(ex)?;
    let value = read_gpr(ex.cpu, from);
    if to.is_cr() {
        control::write_cr(ex, to as u32 - Register::CR0 as u32, value)
    } else if to.is_dr() {
        control::write_dr(ex, to as u32 - Register::DR0 as u32, value)
    } else {
        Err(Fault::UD)
    }
}

/// `#UD` for control registers that do not exist, whatever the privilege.
fn control_exists(ex: &Exec<'_>, r: Register) -> Done {
    let known = match r {
        Register::CR0 | Register::CR2 | Register::CR3 | Register::CR4 => true,
        Register::CR8 => ex.cpu.code64() || ex.model.has_long_mode(),
        _ => !r.is_cr(),
    };
    if known { Ok(()) } else { Err(Fault::UD) }
}

fn from_special(ex: &mut Exec<'_>, to: Register, from: Register) -> Done {
    control_exists(ex, from)?;
    privileged(ex)?;
    let value = if from.is_cr() {
        control::read_cr(ex, from as u32 - Register::CR0 as u32)?
    } else if from.is_dr() {
        control::read_dr(ex, from as u32 - Register::DR0 as u32)?
    } else {
        return Err(Fault::UD);
    };
    write_gpr(ex.cpu, to, value);
    Ok(())
}

/// Bytes that a stack instruction moves.
fn stack_size(i: &Instruction) -> usize {
    i.stack_pointer_increment().unsigned_abs() as usize
}

/// PUSH of a segment register. With a 32-bit operand size current processors write the selector only and leave the
/// slot's upper half as it was (SDM 2B, PUSH).
fn push_segment(ex: &mut Exec<'_>, i: &Instruction) -> Option<Done> {
    let seg = segment_register(i.op0_register())?;
    let selector = u64::from(ex.cpu.segment(seg).selector);
    let slot = stack_size(i);
    if slot != 4 {
        return Some(ex.push(slot, selector));
    }
    let mask = ex.stack_mask();
    let sp = ex.cpu.gpr[gpr::RSP].wrapping_sub(4) & mask;
    Some(ex.store(SegReg::Ss, sp, 2, selector).map(|()| ex.set_stack_pointer(sp, mask)))
}

fn pop_segment(ex: &mut Exec<'_>, i: &Instruction) -> Option<Done> {
    let seg = segment_register(i.op0_register())?;
    Some(ex.pop(stack_size(i)).and_then(|v| ex.set_seg(seg, v as u16)))
}

/// LDS, LES, LSS, LFS, LGS.
fn load_far(ex: &mut Exec<'_>, i: &Instruction, seg: SegReg) -> Done {
    let size = operand_size(i, 0);
    let (from, at) = address(ex.cpu, i);
    let mut buf = [0; 10];
    let lin = ex.linear(from, at, size + 2, false)?;
    ex.check_alignment(lin, size as u64)?;
    ex.load_bytes(from, at, &mut buf[..size + 2])?;
    let selector = u16::from_le_bytes([buf[size], buf[size + 1]]);
    segment::load(ex, seg, selector)?;
    buf[size..].fill(0);
    let mut offset = [0; 8];
    offset.copy_from_slice(&buf[..8]);
    write_gpr(ex.cpu, i.op0_register(), u64::from_le_bytes(offset));
    Ok(())
}

fn swapgs(ex: &mut Exec<'_>) -> Done {
    if !ex.cpu.code64() {
        return Err(Fault::UD);
    }
    privileged(ex)?;
    let gs = &mut ex.cpu.seg[SegReg::Gs as usize].base;
    std::mem::swap(gs, &mut ex.cpu.msr.kernel_gs_base);
    Ok(())
}

fn bases_enabled(ex: &Exec<'_>) -> Done {
    if ex.cpu.code64() && ex.cpu.cr4 & cr4::FSGSBASE != 0 { Ok(()) } else { Err(Fault::UD) }
}

fn read_base(ex: &mut Exec<'_>, i: &Instruction, seg: SegReg) -> Done {
    bases_enabled(ex)?;
    let base = ex.cpu.segment(seg).base;
    write_gpr(ex.cpu, i.op0_register(), base);
    Ok(())
}

fn write_base(ex: &mut Exec<'_>, i: &Instruction, seg: SegReg) -> Done {
    bases_enabled(ex)?;
    let base = read_gpr(ex.cpu, i.op0_register());
    if !canonical(base) {
        return Err(Fault::GP0);
    }
    ex.cpu.seg[seg as usize].base = base;
    Ok(())
}

// ---- flags ---------------------------------------------------------------------------------------------

fn pushf(ex: &mut Exec<'_>, i: &Instruction) -> Done {
    let size = stack_size(i);
    if size == 2 && vme::virtual_if(ex.cpu) {
        return ex.push(2, vme::image(ex.cpu));
    }
    if ex.cpu.v8086() && ex.cpu.iopl() < 3 {
        return Err(Fault::GP0);
    }
    ex.push(size, ex.cpu.rflags & !(flags::VM | flags::RF))
}

fn popf(ex: &mut Exec<'_>, i: &Instruction) -> Done {
    let size = stack_size(i);
    if size == 2 && vme::virtual_if(ex.cpu) {
        let image = ex.pop(2)?;
        ex.cpu.rflags = vme::popped(ex.cpu, image)?;
        return Ok(());
    }
    if ex.cpu.v8086() && ex.cpu.iopl() < 3 {
        return Err(Fault::GP0);
    }
    let image = ex.pop(size)?;
    let mask = transfer::loadable_flags(ex.cpu, size);
    let cleared = if size > 2 { flags::RF } else { 0 };
    ex.cpu.rflags = (ex.cpu.rflags & !mask & !cleared) | (image & mask) | flags::FIXED;
    Ok(())
}

/// CLI and STI.
fn interrupt_flag(ex: &mut Exec<'_>, set: bool) -> Done {
    if ex.cpu.protected() && ex.cpu.cpl > ex.cpu.iopl() {
        return vme::set_virtual_if(ex.cpu, set);
    }
    if !set {
        ex.cpu.rflags &= !flags::IF;
    } else if ex.cpu.rflags & flags::IF == 0 {
        ex.cpu.rflags |= flags::IF;
        ex.cpu.shadow = Shadow::Sti;
    }
    Ok(())
}

/// STAC and CLAC.
fn access_flag(ex: &mut Exec<'_>, set: bool) -> Done {
    if ex.cpu.cpl != 0 {
        return Err(Fault::UD);
    }
    if set {
        ex.cpu.rflags |= flags::AC;
    } else {
        ex.cpu.rflags &= !flags::AC;
    }
    Ok(())
}

// ---- transfers -----------------------------------------------------------------------------------------

fn interrupt(ex: &mut Exec<'_>, vector: u8, source: Source) -> Done {
    if source == Source::Int && vme::redirect(ex, vector, ex.next_rip)? {
        return Ok(());
    }
    let event = Event { vector, error: None, source, rip: ex.next_rip, resume: false };
    exception::deliver(ex, &event)
}

/// Selector, offset and operand size of a far pointer; `None` for near forms.
fn far_pointer(ex: &mut Exec<'_>, i: &Instruction) -> Option<Result<(u16, u64, usize), Fault>> {
    let size = match i.code() {
        Code::Call_ptr1616 | Code::Jmp_ptr1616 => {
            return Some(Ok((i.far_branch_selector(), u64::from(i.far_branch16()), 2)));
        }
        Code::Call_ptr1632 | Code::Jmp_ptr1632 => {
            return Some(Ok((i.far_branch_selector(), u64::from(i.far_branch32()), 4)));
        }
        Code::Call_m1616 | Code::Jmp_m1616 => 2,
        Code::Call_m1632 | Code::Jmp_m1632 => 4,
        Code::Call_m1664 | Code::Jmp_m1664 => 8,
        _ => return None,
    };
    let (seg, at) = address(ex.cpu, i);
    let mut buf = [0; 10];
    Some(ex.load_bytes(seg, at, &mut buf[..size + 2]).map(|()| {
        let selector = u16::from_le_bytes([buf[size], buf[size + 1]]);
        let mut offset = [0; 8];
        offset[..size].copy_from_slice(&buf[..size]);
        (selector, u64::from_le_bytes(offset), size)
    }))
}

fn far_call(ex: &mut Exec<'_>, i: &Instruction) -> Option<Done> {
    let pointer = far_pointer(ex, i)?;
    Some(pointer.and_then(|(selector, offset, size)| transfer::far_call(ex, selector, offset, size)))
}

fn far_jump(ex: &mut Exec<'_>, i: &Instruction) -> Option<Done> {
    let pointer = far_pointer(ex, i)?;
    Some(pointer.and_then(|(selector, offset, _)| transfer::far_jump(ex, selector, offset)))
}

fn far_return(ex: &mut Exec<'_>, i: &Instruction) -> Done {
    let size = match i.code() {
        Code::Retfw | Code::Retfw_imm16 => 2,
        Code::Retfd | Code::Retfd_imm16 => 4,
        _ => 8,
    };
    let extra = if i.op_count() == 1 { u64::from(i.immediate16()) } else { 0 };
    transfer::far_return(ex, size, extra)
}

// ---- tables and control --------------------------------------------------------------------------------

fn load_table(ex: &mut Exec<'_>, i: &Instruction) -> Result<DescriptorTable, Fault> {
    privileged(ex)?;
    let (seg, at) = address(ex.cpu, i);
    let size = if ex.cpu.code64() { 10 } else { 6 };
    let mut buf = [0; 10];
    ex.load_bytes(seg, at, &mut buf[..size])?;
    let mut base = [0; 8];
    base.copy_from_slice(&buf[2..]);
    let mut base = u64::from_le_bytes(base);
    if matches!(i.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
        base &= 0xFF_FFFF;
    }
    if !canonical(base) {
        return Err(Fault::GP0);
    }
    Ok(DescriptorTable { base, limit: u16::from_le_bytes([buf[0], buf[1]]) })
}

fn store_table(ex: &mut Exec<'_>, i: &Instruction, table: DescriptorTable) -> Done {
    user_may_look(ex)?;
    let (seg, at) = address(ex.cpu, i);
    let mut buf = [0; 10];
    buf[..2].copy_from_slice(&table.limit.to_le_bytes());
    buf[2..].copy_from_slice(&table.base.to_le_bytes());
    let size = if ex.cpu.code64() { 10 } else { 6 };
    ex.store_bytes(seg, at, &buf[..size])
}

fn load_system(ex: &mut Exec<'_>, i: &Instruction, f: fn(&mut Exec<'_>, u16) -> Done) -> Done {
    protected_only(ex)?;
    privileged(ex)?;
    let selector = read(ex, i, 0, 2)? as u16;
    f(ex, selector)
}

fn store_system(ex: &mut Exec<'_>, i: &Instruction, value: u64) -> Done {
    protected_only(ex)?;
    user_may_look(ex)?;
    let size = if i.op0_kind() == OpKind::Register { operand_size(i, 0) } else { 2 };
    write(ex, i, 0, size, value)
}

fn lmsw(ex: &mut Exec<'_>, i: &Instruction) -> Done {
    privileged(ex)?;
    let low = read(ex, i, 0, 2)? & 0xF;
    // PE can be set but not cleared.
    let value = (ex.cpu.cr0 & !0xE) | low;
    control::write_cr0(ex, value)
}

fn smsw(ex: &mut Exec<'_>, i: &Instruction) -> Done {
    user_may_look(ex)?;
    let size = if i.op0_kind() == OpKind::Register { operand_size(i, 0) } else { 2 };
    write(ex, i, 0, size, ex.cpu.cr0)
}

fn invlpg(ex: &mut Exec<'_>, i: &Instruction) -> Done {
    privileged(ex)?;
    let (seg, at) = address(ex.cpu, i);
    let s = ex.cpu.segment(seg);
    let lin = if !ex.cpu.code64() {
        s.base.wrapping_add(at) & 0xFFFF_FFFF
    } else if matches!(seg, SegReg::Fs | SegReg::Gs) {
        s.base.wrapping_add(at)
    } else {
        at
    };
    if canonical(lin) {
        let pcid = ex.cpu.pcid();
        ex.flushes.page(pcid, LinAddr(lin));
    }
    Ok(())
}

fn invpcid(ex: &mut Exec<'_>, i: &Instruction) -> Done {
    privileged(ex)?;
    let kind = read_gpr(ex.cpu, i.op0_register());
    let (seg, at) = address(ex.cpu, i);
    let mut buf = [0; 16];
    ex.load_bytes(seg, at, &mut buf)?;
    let v = u128::from_le_bytes(buf);
    control::invpcid(ex, kind, v as u64, (v >> 64) as u64)
}

fn rdmsr(ex: &mut Exec<'_>) -> Done {
    privileged(ex)?;
    let v = msr::read(ex, ex.cpu.gpr[gpr::RCX] as u32)?;
    set_pair(ex, v);
    Ok(())
}

fn wrmsr(ex: &mut Exec<'_>) -> Done {
    privileged(ex)?;
    let v = pair(ex);
    msr::write(ex, ex.cpu.gpr[gpr::RCX] as u32, v)
}

fn rdtsc(ex: &mut Exec<'_>) -> Done {
    if ex.cpu.cr4 & cr4::TSD != 0 && ex.cpu.cpl > 0 {
        return Err(Fault::GP0);
    }
    let v = msr::tsc(ex);
    set_pair(ex, v);
    Ok(())
}

fn cpuid(ex: &mut Exec<'_>) -> Done {
    let (leaf, sub) = (ex.cpu.gpr[gpr::RAX] as u32, ex.cpu.gpr[gpr::RCX] as u32);
    let r = ex.model.cpuid(ex.cpu, ex.bus, ex.vp, leaf, sub);
    for (n, v) in [(gpr::RAX, r.eax), (gpr::RBX, r.ebx), (gpr::RCX, r.ecx), (gpr::RDX, r.edx)] {
        ex.cpu.gpr[n] = u64::from(v);
    }
    Ok(())
}

fn xgetbv(ex: &mut Exec<'_>) -> Done {
    if ex.cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Fault::UD);
    }
    // Index 1 (components in use): reporting all enabled ones is allowed and true to how state is kept.
    match ex.cpu.gpr[gpr::RCX] as u32 {
        0 => {}
        1 if ex.model.has_xgetbv1() => {}
        _ => return Err(Fault::GP0),
    }
    let v = ex.cpu.xcr0;
    set_pair(ex, v);
    Ok(())
}

fn xsetbv(ex: &mut Exec<'_>) -> Done {
    if ex.cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Fault::UD);
    }
    privileged(ex)?;
    let v = pair(ex);
    control::xsetbv(ex, ex.cpu.gpr[gpr::RCX] as u32, v)
}

// ---- descriptor queries --------------------------------------------------------------------------------

/// Whether the current privilege and the selector's RPL may see descriptor `d`.
fn visible(ex: &Exec<'_>, d: &segment::Descriptor) -> bool {
    let rpl = (d.selector & 3) as u8;
    d.is_conforming() || d.dpl() >= ex.cpu.cpl.max(rpl)
}

/// LAR and LSL: sets ZF and the destination if `f` finds something.
fn query(ex: &mut Exec<'_>, i: &Instruction, f: fn(&Exec<'_>, &segment::Descriptor) -> Option<u64>) -> Done {
    protected_only(ex)?;
    let selector = read(ex, i, 1, 2)? as u16;
    let found = segment::peek(ex, selector)?.filter(|d| visible(ex, d)).and_then(|d| f(ex, &d));
    set_zero(ex, found.is_some());
    if let Some(v) = found {
        write_gpr(ex.cpu, i.op0_register(), v);
    }
    Ok(())
}

fn access_rights(ex: &Exec<'_>, d: &segment::Descriptor) -> Option<u64> {
    let valid = match d.system_type() {
        None => true,
        Some(kind) if ex.cpu.long_mode() => matches!(kind, 2 | 9 | 11 | 12),
        Some(kind) => matches!(kind, 1..=5 | 9 | 11 | 12),
    };
    valid.then_some(d.raw >> 32 & 0x00F0_FF00)
}

fn limit(ex: &Exec<'_>, d: &segment::Descriptor) -> Option<u64> {
    let valid = match d.system_type() {
        None => true,
        Some(kind) if ex.cpu.long_mode() => matches!(kind, 2 | 9 | 11),
        Some(kind) => matches!(kind, 1 | 2 | 3 | 9 | 11),
    };
    valid.then(|| u64::from(d.segment().limit))
}

/// VERR and VERW.
fn verify(ex: &mut Exec<'_>, i: &Instruction, write: bool) -> Done {
    protected_only(ex)?;
    let selector = read(ex, i, 0, 2)? as u16;
    let ok = segment::peek(ex, selector)?.is_some_and(|d| {
        let kind = if write { d.is_writable_data() } else { d.is_data() || d.is_readable_code() };
        kind && visible(ex, &d)
    });
    set_zero(ex, ok);
    Ok(())
}

fn arpl(ex: &mut Exec<'_>, i: &Instruction) -> Done {
    protected_only(ex)?;
    let rpl = read_gpr(ex.cpu, i.op1_register()) & 3;
    let selector = read(ex, i, 0, 2)?;
    if selector & 3 < rpl {
        write(ex, i, 0, 2, (selector & !3) | rpl)?;
    }
    set_zero(ex, selector & 3 < rpl);
    Ok(())
}

fn set_zero(ex: &mut Exec<'_>, on: bool) {
    ex.cpu.rflags = (ex.cpu.rflags & !flags::ZF) | if on { flags::ZF } else { 0 };
}

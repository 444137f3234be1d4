//! x87, MMX, SSE and AVX instructions (SDM 1, chapters 8 to 14): their checks, their memory operands and their
//! re-encoding. The arithmetic is the host's, through [`VectorUnit::execute`](crate::VectorUnit::execute).
//!
//! Before execution the conditions of SDM 2A tables 2-14 ff. and SDM 3A table 14-1 are tested:
//!
//! | class       | `#UD`                                                     | `#NM`        |
//! |-------------|-----------------------------------------------------------|--------------|
//! | x87         |                                                           | EM or TS     |
//! | WAIT        |                                                           | MP and TS    |
//! | MMX         | EM                                                        | TS           |
//! | legacy SSE  | EM or not OSFXSR                                          | TS           |
//! | VEX         | real or v8086 mode, not OSXSAVE, XCR0 lacks SSE or AVX    | TS           |
//!
//! The code handed to the unit is the guest's instruction in 64-bit encoding: prefixes that mean nothing there
//! are dropped, VEX bits that 32-bit code ignores are normalised, a memory operand becomes `[rax]` (ModRM.mod and
//! rm zero). Only one general register can be named besides; where that is RSP, or RAX next to a memory operand,
//! RBX stands in for it. PCMPESTRx uses RAX itself: with a memory operand it runs on a borrowed XMM register.
//!
//! Memory is loaded before execution and stored after; a store is probed before, so that nothing has happened
//! when it faults. x87 stores also load, for a masked-out store leaves memory as it was. FIP, FDP and FOP are
//! kept apart ([`x87`](super::x87)).

use super::alu::mask;
use super::masked;
use super::operand::{address, address_mask, gpr_number};
use super::x87;
use super::xsave;
use crate::cpuid::HostVendor;
use crate::exec::Exec;
use crate::fault::{Fault, Vector};
use crate::state::{FpuPointers, FpuState, SegReg, cr0, cr4, gpr};
use iced_x86::{CodeSize, CpuidFeature, EncodingKind, Instruction, MemorySize, Mnemonic, OpKind};

/// Which rules an instruction follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Class {
    X87,
    Mmx,
    Sse,
    Vex,
}

/// A memory operand's copy, aligned for every instruction.
#[repr(align(64))]
struct Operand([u8; 512]);

/// Executes `i` if it belongs to the vector units; `None` if it does not.
pub(super) fn execute(ex: &mut Exec<'_>, i: &Instruction, bytes: &[u8]) -> Option<Result<(), Fault>> {
    use Mnemonic::*;
    match i.mnemonic() {
        Wait => return Some(wait(ex)),
        Fxsave | Fxsave64 => return Some(xsave::fxsave(ex, i)),
        Fxrstor | Fxrstor64 => return Some(xsave::fxrstor(ex, i)),
        Xsave | Xsave64 => return Some(xsave::xsave(ex, i, xsave::Form::Standard)),
        Xsaveopt | Xsaveopt64 => return Some(xsave::xsave(ex, i, xsave::Form::Optimized)),
        Xsavec | Xsavec64 => return Some(xsave::xsave(ex, i, xsave::Form::Compacted)),
        Xrstor | Xrstor64 => return Some(xsave::xrstor(ex, i)),
        _ => {}
    }
    let class = classify(i)?;
    let run = |ex: &mut Exec<'_>| match masked::execute(ex, i) {
        Some(done) => done,
        None if class == Class::X87 => x87(ex, i, bytes),
        None => on_host(ex, i, bytes, class),
    };
    Some(
        available(ex, class)
            .and_then(|()| if ex.cpu.ignne { with_errors_aside(ex, i, run) } else { run(ex) }),
    )
}

/// An x87 instruction, and what it means for the instruction and data pointers.
fn x87(ex: &mut Exec<'_>, i: &Instruction, bytes: &[u8]) -> Result<(), Fault> {
    let next = ex.next_rip;
    on_host(ex, i, bytes, Class::X87)?;
    let frozen = ex.next_rip != next;
    if frozen {
        return Ok(());
    }
    match i.mnemonic() {
        Mnemonic::Fninit | Mnemonic::Fnsave => ex.cpu.fpu_pointers = FpuPointers::default(),
        m if is_control(m) => {}
        _ if ex.cpu.fpu.0[2] & FSW_ES != 0 => x87::record(ex, i, bytes),
        _ => {}
    }
    Ok(())
}

/// Control instructions do not count as the last instruction (SDM 1, 8.1.8).
fn is_control(m: Mnemonic) -> bool {
    use Mnemonic::*;
    x87::moves_environment(m)
        || matches!(m, Fnclex | Fclex | Fldcw | Fnstcw | Fstcw | Fnstsw | Fstsw | Fneni | Fndisi | Fnsetpm)
}

/// The class of `i`, by the feature that introduced it and its registers.
fn classify(i: &Instruction) -> Option<Class> {
    use CpuidFeature::*;
    let feature = *i.cpuid_features().first()?;
    match feature {
        FPU | FPU287 | FPU387 => return Some(Class::X87),
        MMX | SSE | SSE2 | SSE3 | SSSE3 | SSE4_1 | SSE4_2 | AES | PCLMULQDQ | SHA | AVX | AVX2 | FMA
        | F16C | VAES | VPCLMULQDQ | GFNI | AVX_VNNI => {}
        _ => return None,
    }
    match i.encoding() {
        EncodingKind::VEX => Some(Class::Vex),
        EncodingKind::Legacy if is_mmx(i, feature) => Some(Class::Mmx),
        EncodingKind::Legacy => Some(Class::Sse),
        _ => None,
    }
}

/// Touches MMX registers and no XMM register or SSE state.
fn is_mmx(i: &Instruction, feature: CpuidFeature) -> bool {
    use Mnemonic::*;
    if feature == CpuidFeature::MMX {
        return true;
    }
    // With a memory operand these name no XMM register, yet use MXCSR.
    if matches!(i.mnemonic(), Cvtps2pi | Cvttps2pi | Cvtpd2pi | Cvttpd2pi) {
        return false;
    }
    has_mm(i) && !names(i, |r| r.is_xmm())
}

/// An operand is an MMX register.
fn has_mm(i: &Instruction) -> bool {
    names(i, |r| r.is_mm())
}

fn names(i: &Instruction, f: fn(iced_x86::Register) -> bool) -> bool {
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && f(i.op_register(n)))
}

/// `#UD` and `#NM` as in the table above.
fn available(ex: &Exec<'_>, class: Class) -> Result<(), Fault> {
    let cpu = &*ex.cpu;
    let undefined = match class {
        Class::X87 => false,
        Class::Mmx => cpu.cr0 & cr0::EM != 0,
        Class::Sse => cpu.cr0 & cr0::EM != 0 || cpu.cr4 & cr4::OSFXSR == 0,
        Class::Vex => !cpu.protected() || cpu.v8086() || cpu.cr4 & cr4::OSXSAVE == 0 || cpu.xcr0 & 6 != 6,
    };
    if undefined {
        return Err(Fault::UD);
    }
    let missing = if class == Class::X87 { cr0::EM | cr0::TS } else { cr0::TS };
    if cpu.cr0 & missing != 0 { Err(Fault::NM) } else { Ok(()) }
}

/// Runs an instruction under IGNNE#, where a pending x87 error stops nothing: it stands aside meanwhile, and joins what the
/// instruction raises. Only FLDENV and FRSTOR, which load other flags, end it.
fn with_errors_aside(
    ex: &mut Exec<'_>,
    i: &Instruction,
    run: impl FnOnce(&mut Exec<'_>) -> Result<(), Fault>,
) -> Result<(), Fault> {
    use Mnemonic::*;
    if matches!(i.mnemonic(), Fnstcw | Fnstsw | Fnstenv | Fnsave | Fnclex | Fninit) {
        return run(ex); // They never wait, and show the error or end it.
    }
    ex.vector.sync(&mut ex.cpu.fpu, ex.vp);
    let pending = ex.cpu.fpu.x87_exceptions();
    ex.cpu.fpu.set_x87_exceptions(0);
    ex.vector.changed(&ex.cpu.fpu, ex.vp);
    let done = run(ex);
    ex.vector.sync(&mut ex.cpu.fpu, ex.vp);
    if done.is_err() || !matches!(i.mnemonic(), Fldenv | Frstor) {
        let raised = ex.cpu.fpu.x87_exceptions();
        ex.cpu.fpu.set_x87_exceptions(pending | raised);
        ex.vector.changed(&ex.cpu.fpu, ex.vp);
    }
    done
}

/// Looks whether IGNNE# is driven, and takes FERR# down where no error is pending.
pub(crate) fn follow_ignne(ex: &mut Exec<'_>) {
    if ex.cpu.ignne || ex.bus.ignne(ex.vp) {
        ex.vector.sync(&mut ex.cpu.fpu, ex.vp);
        ex.cpu.ignne = ex.cpu.fpu.0[2] & FSW_ES != 0;
        if !ex.cpu.ignne {
            ex.bus.set_ferr(ex.vp, false);
        }
    }
}

/// WAIT/FWAIT: a pending x87 error is raised by running FNOP, which waits for it too.
fn wait(ex: &mut Exec<'_>) -> Result<(), Fault> {
    if ex.cpu.cr0 & (cr0::MP | cr0::TS) == cr0::MP | cr0::TS {
        return Err(Fault::NM);
    }
    if ex.cpu.ignne {
        return Ok(());
    }
    run(ex, &[0xD9, 0xD0], &mut Operand([0; 512]))
}

/// Raises a pending x87 error before an operand in memory is looked at. False: frozen, see [`run`].
fn raise_pending(ex: &mut Exec<'_>, i: &Instruction) -> Result<bool, Fault> {
    use Mnemonic::*;
    if matches!(i.mnemonic(), Fnstcw | Fnstsw | Fnstenv | Fnsave) {
        return Ok(true);
    }
    ex.vector.sync(&mut ex.cpu.fpu, ex.vp);
    if ex.cpu.fpu.0[2] & FSW_ES == 0 {
        return Ok(true);
    }
    let next = ex.next_rip;
    run(ex, &[0xD9, 0xD0], &mut Operand([0; 512]))?;
    Ok(ex.next_rip == next)
}

/// Error summary in the low byte of FSW.
const FSW_ES: u8 = 1 << 7;
/// TOP in the high byte of FSW.
const FSW_TOP: u8 = 7 << 3;

/// Puts MMX instructions' state transition in force: x87 TOP zero, all registers valid (SDM 1, 9.5.1). It comes
/// before any access to memory. False: frozen on a pending x87 error, see [`run`].
pub(super) fn enter_mmx(ex: &mut Exec<'_>) -> Result<bool, Fault> {
    ex.vector.sync(&mut ex.cpu.fpu, ex.vp);
    let fpu = &ex.cpu.fpu.0;
    if fpu[2] & FSW_ES == 0 && fpu[3] & FSW_TOP == 0 && fpu[4] == 0xFF {
        return Ok(true);
    }
    let (next, rbx) = (ex.next_rip, ex.cpu.gpr[gpr::RBX]);
    // movd ebx, mm0
    let done = run(ex, &[0x0F, 0x7E, 0xC3], &mut Operand([0; 512]));
    ex.cpu.gpr[gpr::RBX] = rbx;
    done.map(|()| ex.next_rip == next)
}

/// One call of the vector unit, with its exceptions made the guest's.
fn run(ex: &mut Exec<'_>, code: &[u8], operand: &mut Operand) -> Result<(), Fault> {
    let cpu = &mut *ex.cpu;
    let done = ex.vector.execute(code, &mut cpu.fpu, &mut cpu.gpr, &mut cpu.rflags, &mut operand.0);
    match done {
        Err(f) if f.vector == Vector::MF && cpu.cr0 & cr0::NE == 0 => {
            // FERR# is up and the processor freezes until an interrupt arrives (SDM 1, 8.7.2): run it again.
            ex.bus.set_ferr(ex.vp, true);
            ex.next_rip = cpu.rip;
            Ok(())
        }
        Err(f) if f.vector == Vector::XM && cpu.cr4 & cr4::OSXMMEXCPT == 0 => Err(Fault::UD),
        other => other,
    }
}

/// What an instruction does with its memory operand.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Load,
    Store,
    /// A store that may not happen.
    LoadStore,
}

fn memory_use(i: &Instruction, class: Class) -> Use {
    use Mnemonic::*;
    match (class, i.mnemonic()) {
        (
            Class::X87,
            Fst | Fstp | Fist | Fistp | Fisttp | Fbstp | Fnstcw | Fstcw | Fnstsw | Fstsw | Fnstenv | Fstenv
            | Fnsave | Fsave,
        ) => Use::LoadStore,
        (Class::X87, _) => Use::Load,
        _ if i.op0_kind() == OpKind::Memory => Use::Store,
        _ => Use::Load,
    }
}

/// Alignment that a memory operand of `size` bytes must have.
fn alignment(i: &Instruction, class: Class, size: usize) -> usize {
    use Mnemonic::*;
    match (class, i.mnemonic()) {
        (
            Class::Sse,
            Movups | Movupd | Movdqu | Lddqu | Pcmpestri | Pcmpestri64 | Pcmpestrm | Pcmpestrm64 | Pcmpistri
            | Pcmpistrm,
        ) => 1,
        (Class::Sse, _) if size == 16 => 16,
        (Class::Vex, Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa) => size,
        _ => 1,
    }
}

/// Alignment in bytes without which the memory operand of `i` raises `#GP(0)`, whatever its page; one for most.
pub fn operand_alignment(i: &Instruction) -> u64 {
    if i.mnemonic() == Mnemonic::Cmpxchg16b {
        return 16;
    }
    classify(i).map_or(1, |class| alignment(i, class, memory_bytes(i)) as u64)
}

/// Alignment that the memory operand of `i`, of `size` bytes, needs under alignment checking (SDM 3A, table 6-7). Whether 16
/// and 32 bytes need any is left to the processor: Emerald Rapids checks none, Zen 5 that of 16 bytes for both. Half-precision
/// conversions are exempt (SDM 2A, table 2-28), on processors of AMD's they are not.
fn checked_alignment(ex: &Exec<'_>, i: &Instruction, size: usize) -> u64 {
    let amd = ex.model.host() == HostVendor::Amd;
    match size {
        _ if !amd && i.cpuid_features() == [CpuidFeature::F16C] => 1,
        10 => 8,
        14 | 94 => 2,
        28 | 108 => 4,
        ..16 if size.is_power_of_two() => size as u64,
        _ if size.is_power_of_two() && amd => 16,
        _ => 1,
    }
}

/// Bytes of the memory operand. The environment and save images are as long as the operand size says.
fn memory_bytes(i: &Instruction) -> usize {
    match i.memory_size() {
        MemorySize::Unknown => 0,
        size => size.size().min(512),
    }
}

/// Runs `i` on the host.
fn on_host(ex: &mut Exec<'_>, i: &Instruction, bytes: &[u8], class: Class) -> Result<(), Fault> {
    use Mnemonic::*;
    if matches!(i.mnemonic(), Fneni | Fndisi | Fnsetpm) {
        return Ok(()); // 8087 and 80287 control, ignored since the 387.
    }
    let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    if memory && matches!(i.mnemonic(), Pcmpestri | Pcmpestri64 | Pcmpestrm | Pcmpestrm64) {
        return compare_strings(ex, i, bytes);
    }
    if memory && matches!(i.mnemonic(), Vpcmpestri | Vpcmpestri64 | Vpcmpestrm | Vpcmpestrm64) {
        return compare_strings(ex, i, bytes);
    }
    let code = Encoded::new(i, bytes, memory, None).ok_or(Fault::UD)?;
    let mut operand = Operand([0; 512]);
    if !memory {
        if class == Class::Sse && has_mm(i) && !enter_mmx(ex)? {
            return Ok(());
        }
        return match i.mnemonic() {
            Vzeroall | Vzeroupper if i.code_size() != CodeSize::Code64 => zero_eight(ex, &code),
            _ => run_renamed(ex, &code, &mut operand),
        };
    }
    let (seg, at) = address(ex.cpu, i);
    let size = memory_bytes(i);
    let direction = memory_use(i, class);
    if (matches!(class, Class::X87 | Class::Mmx) || has_mm(i)) && !raise_pending(ex, i)? {
        return Ok(());
    }
    let align = alignment(i, class, size) as u64;
    if align > 1 && misaligned(ex, seg, at, align) {
        return Err(Fault::GP0);
    }
    let lin = ex.linear(seg, at, size, direction != Use::Load);
    let aligned = lin.map_or(Ok(()), |lin| ex.check_alignment(lin, checked_alignment(ex, i, size)));
    if direction == Use::Load {
        aligned?;
    } else if let Err(fault) = aligned.and_then(|()| ex.probe_write(seg, at, size)) {
        return store_fault(ex, i, class, &code, size, fault);
    }
    if direction != Use::Store {
        if matches!(i.mnemonic(), Fldenv | Frstor) {
            // The control word is read first, then the last byte, then what is between; each must lie in the segment
            // before it is looked for in memory.
            let word = if matches!(size, 14 | 94) { 2 } else { 4 };
            let byte = |n: u64| at.wrapping_add(n) & address_mask(i);
            for (first, last) in [(0, word - 1), (size as u64 - 1, size as u64 - 1)] {
                let ends = [ex.linear(seg, byte(first), 1, false)?, ex.linear(seg, byte(last), 1, false)?];
                for lin in ends {
                    ex.span(lin, false)?;
                }
            }
        }
        ex.load_bytes(seg, at, &mut operand.0[..size])?;
    }
    if class == Class::Sse && has_mm(i) && !enter_mmx(ex)? {
        return Ok(());
    }
    let next = ex.next_rip;
    run_renamed(ex, &code, &mut operand)?;
    if ex.next_rip == next && class == Class::X87 && x87::moves_environment(i.mnemonic()) {
        let narrow = matches!(size, 14 | 94);
        match direction {
            Use::Load => ex.cpu.fpu_pointers = x87::load_environment(ex.cpu, &operand.0, narrow),
            _ => x87::store_environment(ex.cpu, &mut operand.0, narrow),
        }
    }
    if direction != Use::Load && ex.next_rip == next {
        ex.store_bytes(seg, at, &operand.0[..size])?;
    }
    Ok(())
}

/// A store whose memory raised `fault`, and what the instruction has done by then.
fn store_fault(
    ex: &mut Exec<'_>,
    i: &Instruction,
    class: Class,
    code: &Encoded,
    size: usize,
    fault: Fault,
) -> Result<(), Fault> {
    if class == Class::X87 {
        return store_unless_masked_out(ex, code, size, fault);
    }
    if class == Class::Mmx {
        rotate_to_top_zero(ex);
    }
    if i.mnemonic() == Mnemonic::Vcvtps2ph {
        // The conversion's own exceptions come first, and its MXCSR flags stand.
        run(ex, code.bytes(), &mut Operand([0; 512]))?;
    }
    Err(fault)
}

/// An x87 store that an unmasked error suppresses does not look at its memory: it completes with the error pending.
fn store_unless_masked_out(
    ex: &mut Exec<'_>,
    code: &Encoded,
    size: usize,
    fault: Fault,
) -> Result<(), Fault> {
    ex.vector.sync(&mut ex.cpu.fpu, ex.vp);
    let before = ex.cpu.fpu.clone();
    for pattern in [0, 0xFF] {
        ex.cpu.fpu = before.clone();
        ex.vector.changed(&ex.cpu.fpu, ex.vp);
        let mut operand = Operand([pattern; 512]);
        run(ex, code.bytes(), &mut operand)?;
        ex.vector.sync(&mut ex.cpu.fpu, ex.vp);
        if operand.0[..size].iter().any(|&b| b != pattern) {
            ex.cpu.fpu = before;
            ex.vector.changed(&ex.cpu.fpu, ex.vp);
            return Err(fault);
        }
    }
    Ok(())
}

/// Sets the x87 TOP to zero; the tags stay. That far an MMX store has come when its memory faults.
fn rotate_to_top_zero(ex: &mut Exec<'_>) {
    ex.vector.sync(&mut ex.cpu.fpu, ex.vp);
    let fpu = &mut ex.cpu.fpu.0;
    let top = usize::from(fpu[3] & FSW_TOP) >> 3;
    fpu[3] &= !FSW_TOP;
    fpu[32..160].rotate_right(16 * top);
    ex.vector.changed(&ex.cpu.fpu, ex.vp);
}

/// Whether the linear address is no multiple of `align`; tested before anything else about it.
pub(super) fn misaligned(ex: &Exec<'_>, seg: SegReg, at: u64, align: u64) -> bool {
    let flat = ex.cpu.code64() && !matches!(seg, SegReg::Fs | SegReg::Gs);
    let base = if flat { 0 } else { ex.cpu.segment(seg).base };
    base.wrapping_add(at) & (align - 1) != 0
}

/// VZEROALL and VZEROUPPER outside 64-bit mode leave registers 8 to 15 alone.
fn zero_eight(ex: &mut Exec<'_>, code: &Encoded) -> Result<(), Fault> {
    ex.vector.sync(&mut ex.cpu.fpu, ex.vp);
    let saved = ex.cpu.fpu.clone();
    run(ex, code.bytes(), &mut Operand([0; 512]))?;
    ex.vector.sync(&mut ex.cpu.fpu, ex.vp);
    for n in 8..16 {
        for place in [FpuState::xmm_range(n), FpuState::ymm_high_range(n)] {
            ex.cpu.fpu.0[place.clone()].copy_from_slice(&saved.0[place]);
        }
    }
    ex.vector.changed(&ex.cpu.fpu, ex.vp);
    Ok(())
}

/// Runs `code` with RBX in the place of the register it cannot name.
fn run_renamed(ex: &mut Exec<'_>, code: &Encoded, operand: &mut Operand) -> Result<(), Fault> {
    let Some(renamed) = code.renamed else { return run(ex, code.bytes(), operand) };
    let rbx = ex.cpu.gpr[gpr::RBX];
    ex.cpu.gpr[gpr::RBX] = ex.cpu.gpr[renamed];
    let done = run(ex, code.bytes(), operand);
    if done.is_ok() {
        ex.cpu.gpr[renamed] = ex.cpu.gpr[gpr::RBX];
    }
    ex.cpu.gpr[gpr::RBX] = rbx;
    done
}

/// PCMPESTRI and PCMPESTRM with a memory operand, which is brought into an XMM register they do not name.
fn compare_strings(ex: &mut Exec<'_>, i: &Instruction, bytes: &[u8]) -> Result<(), Fault> {
    let (seg, at) = address(ex.cpu, i);
    let lin = ex.linear(seg, at, 16, false)?;
    ex.check_alignment(lin, checked_alignment(ex, i, 16))?;
    let mut value = [0; 16];
    ex.load_bytes(seg, at, &mut value)?;
    let first = i.op0_register().number();
    let borrowed = if first == 1 { 2 } else { 1 };
    let code = Encoded::new(i, bytes, true, Some(borrowed as u8)).ok_or(Fault::UD)?;
    ex.vector.sync(&mut ex.cpu.fpu, ex.vp);
    let place = FpuState::xmm_range(borrowed);
    let mut saved = [0; 16];
    saved.copy_from_slice(&ex.cpu.fpu.0[place.clone()]);
    ex.cpu.fpu.0[place.clone()].copy_from_slice(&value);
    ex.vector.changed(&ex.cpu.fpu, ex.vp);
    let done = run(ex, code.bytes(), &mut Operand([0; 512]));
    ex.vector.sync(&mut ex.cpu.fpu, ex.vp);
    ex.cpu.fpu.0[place].copy_from_slice(&saved);
    ex.vector.changed(&ex.cpu.fpu, ex.vp);
    if i.code_size() != CodeSize::Code64 {
        ex.cpu.gpr[gpr::RCX] &= mask(4);
    }
    done
}

impl FpuState {
    /// Where XMM register `n` lies.
    pub(super) fn xmm_range(n: usize) -> std::ops::Range<usize> {
        160 + 16 * n..176 + 16 * n
    }

    /// Where the upper half of YMM register `n` lies.
    pub(super) fn ymm_high_range(n: usize) -> std::ops::Range<usize> {
        576 + 16 * n..592 + 16 * n
    }
}

/// One instruction in 64-bit encoding for the vector unit.
struct Encoded {
    code: [u8; 16],
    len: usize,
    /// The general register that RBX stands for.
    renamed: Option<usize>,
}

impl Encoded {
    fn bytes(&self) -> &[u8] {
        &self.code[..self.len]
    }

    fn emit(&mut self, byte: u8) {
        if let Some(place) = self.code.get_mut(self.len) {
            *place = byte;
            self.len += 1;
        }
    }

    /// Re-encodes `i`. A memory operand becomes `[rax]`, or XMM register `borrowed` (below 8).
    fn new(i: &Instruction, bytes: &[u8], memory: bool, borrowed: Option<u8>) -> Option<Encoded> {
        let parts = Parts::parse(i, bytes)?;
        let named = (0..i.op_count())
            .filter(|&n| i.op_kind(n) == OpKind::Register)
            .find_map(|n| gpr_number(i.op_register(n)));
        let renamed = named.filter(|&n| n == gpr::RSP || (n == gpr::RAX && memory));
        let mut code = Encoded { code: [0; 16], len: 0, renamed };
        // A memory operand keeps W and R only: base RAX, no index.
        let extend = if memory { parts.extend & (REX_W | REX_R) } else { parts.extend };
        parts.emit_opcode(&mut code, extend);
        if let Some(mut modrm) = parts.modrm {
            if memory {
                modrm = (modrm & 0x38) | borrowed.map_or(0, |register| 0xC0 | register);
            }
            if renamed.is_some() {
                modrm = match parts.gpr_in_reg() {
                    true => (modrm & 0xC7) | (gpr::RBX as u8) << 3,
                    false => (modrm & 0xF8) | gpr::RBX as u8,
                };
            }
            code.emit(modrm);
        }
        if let Some(imm) = parts.immediate {
            code.emit(imm);
        }
        Some(code)
    }
}

const REX_W: u8 = 8;
const REX_R: u8 = 4;
const REX_X: u8 = 2;
const REX_B: u8 = 1;

/// What identifies a vector instruction, out of its bytes.
struct Parts {
    /// 66H, F2H or F3H for legacy encodings.
    prefix: Option<u8>,
    /// REX.WRXB, for VEX encodings too.
    extend: u8,
    /// Third VEX byte but W: vvvv (inverted), L, pp.
    vex: Option<u8>,
    /// 0: x87; 1: 0F; 2: 0F38; 3: 0F3A.
    map: u8,
    opcode: u8,
    /// Absent in EMMS, VZEROUPPER and VZEROALL.
    modrm: Option<u8>,
    immediate: Option<u8>,
}

/// Legacy prefixes and REX.
fn is_prefix(byte: u8) -> bool {
    matches!(byte, 0x26 | 0x2E | 0x36 | 0x3E | 0x40..=0x4F | 0x64..=0x67 | 0xF0 | 0xF2 | 0xF3)
}

impl Parts {
    /// Takes `bytes` apart; `None` if it has no ModRM byte where it must.
    fn parse(i: &Instruction, bytes: &[u8]) -> Option<Parts> {
        let code64 = i.code_size() == CodeSize::Code64;
        let mut at = 0;
        let (mut operand, mut repeat) = (None, None);
        loop {
            match *bytes.get(at)? {
                0x66 => operand = Some(0x66),
                b @ (0xF2 | 0xF3) => repeat = Some(b),
                0x26 | 0x2E | 0x36 | 0x3E | 0x64 | 0x65 | 0x67 | 0xF0 => {}
                // REX that is not the last prefix counts for nothing (SDM 2A, 2.2.1).
                0x40..=0x4F if code64 && bytes.get(at + 1).is_some_and(|&b| is_prefix(b)) => {}
                _ => break,
            }
            at += 1;
        }
        let mut p = Parts {
            prefix: repeat.or(operand),
            extend: 0,
            vex: None,
            map: 0,
            opcode: 0,
            modrm: None,
            immediate: None,
        };
        if i.encoding() == EncodingKind::VEX {
            at = p.parse_vex(bytes, at, code64)?;
        } else {
            at = p.parse_legacy(bytes, at, code64)?;
        }
        p.opcode = *bytes.get(at)?;
        if p.map != 1 || p.opcode != 0x77 {
            p.modrm = Some(*bytes.get(at + 1)?);
        }
        if p.map == 0 {
            // Only FLDENV, FSTENV, FSAVE and FRSTOR look at the operand size.
            p.prefix = matches!(memory_bytes(i), 14 | 94).then_some(0x66);
        }
        if p.has_immediate() {
            let imm = *bytes.last()?;
            let register = p.vex.is_some() && p.map == 3 && matches!(p.opcode, 0x4A..=0x4C);
            p.immediate = Some(if register && !code64 { imm & 0x7F } else { imm });
        }
        if p.vex.is_some() && !code64 {
            p.ignore_vex_bits();
        }
        Some(p)
    }

    fn parse_vex(&mut self, bytes: &[u8], at: usize, code64: bool) -> Option<usize> {
        let first = *bytes.get(at + 1)?;
        self.prefix = None;
        if bytes[at] == 0xC5 {
            self.map = 1;
            self.extend = (!first >> 5) & REX_R;
            self.vex = Some(first & 0x7F);
            return Some(at + 2);
        }
        let second = *bytes.get(at + 2)?;
        self.map = first & 0x1F;
        self.extend = ((!first >> 5) & 7) | (second >> 4) & REX_W;
        self.vex = Some(second & 0x7F);
        if !code64 {
            self.extend &= REX_W;
        }
        Some(at + 3)
    }

    fn parse_legacy(&mut self, bytes: &[u8], mut at: usize, code64: bool) -> Option<usize> {
        if code64 && bytes.get(at)? & 0xF0 == 0x40 {
            self.extend = bytes[at] & 15;
            at += 1;
        }
        if *bytes.get(at)? == 0x0F {
            (self.map, at) = match *bytes.get(at + 1)? {
                0x38 => (2, at + 2),
                0x3A => (3, at + 2),
                _ => (1, at + 1),
            };
        }
        Some(at)
    }

    /// Bits that code outside 64-bit mode ignores (SDM 2A, 2.3.5): vvvv[3], and W next to a general register.
    fn ignore_vex_bits(&mut self) {
        self.vex = self.vex.map(|v| v | 0x40);
        self.extend &= REX_W;
        let general = match self.map {
            1 => matches!(self.opcode, 0x2A | 0x2C | 0x2D | 0x6E | 0x7E),
            3 => matches!(self.opcode, 0x16 | 0x22),
            _ => false,
        };
        if general {
            self.extend = 0;
        }
    }

    /// An 8-bit immediate follows the operand.
    fn has_immediate(&self) -> bool {
        match self.map {
            1 => matches!(self.opcode, 0x70..=0x73 | 0xC2 | 0xC4 | 0xC5 | 0xC6),
            3 => true,
            _ => false,
        }
    }

    /// A general register operand is in ModRM.reg, not rm.
    fn gpr_in_reg(&self) -> bool {
        self.map == 1 && matches!(self.opcode, 0x50 | 0xD7 | 0xC5 | 0x2C | 0x2D)
    }

    /// Everything up to and including the opcode.
    fn emit_opcode(&self, code: &mut Encoded, extend: u8) {
        if let Some(vex) = self.vex {
            let inverted = !(extend & (REX_R | REX_X | REX_B)) << 5;
            code.emit(0xC4);
            code.emit(inverted | self.map);
            code.emit((extend & REX_W) << 4 | vex);
            code.emit(self.opcode);
            return;
        }
        if let Some(prefix) = self.prefix {
            code.emit(prefix);
        }
        if extend != 0 && self.map != 0 {
            code.emit(0x40 | extend);
        }
        match self.map {
            1 => code.emit(0x0F),
            2 => [0x0F, 0x38].into_iter().for_each(|b| code.emit(b)),
            3 => [0x0F, 0x3A].into_iter().for_each(|b| code.emit(b)),
            _ => {}
        }
        code.emit(self.opcode);
    }
}

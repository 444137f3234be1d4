//! Model-specific registers of the processor core (SDM 4, chapter 2); the rest belong to the machine.

use crate::debug::debugctl;
use crate::exec::Exec;
use crate::fault::Fault;
use crate::segment::canonical;
use crate::state::{SegReg, efer};

/// MSR numbers.
#[allow(missing_docs)]
pub(crate) mod index {
    pub const PLATFORM_ID: u32 = 0x17;
    pub const TSC: u32 = 0x10;
    pub const EBL_CR_POWERON: u32 = 0x2A;
    pub const FEATURE_CONTROL: u32 = 0x3A;
    pub const TSC_ADJUST: u32 = 0x3B;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const PRED_CMD: u32 = 0x49;
    pub const BIOS_UPDT_TRIG: u32 = 0x79;
    pub const BIOS_SIGN_ID: u32 = 0x8B;
    pub const MTRRCAP: u32 = 0xFE;
    pub const ARCH_CAPABILITIES: u32 = 0x10A;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MCG_CAP: u32 = 0x179;
    pub const MCG_STATUS: u32 = 0x17A;
    pub const MISC_ENABLE: u32 = 0x1A0;
    pub const DEBUGCTL: u32 = 0x1D9;
    pub const LAST_BRANCH_FROM: u32 = 0x1DB;
    pub const LAST_INT_TO: u32 = 0x1DE;
    pub const MTRR_VARIABLE: u32 = 0x200;
    pub const MTRR_VARIABLE_LAST: u32 = 0x20F;
    pub const MTRR_FIX64K: u32 = 0x250;
    pub const MTRR_FIX16K: u32 = 0x258;
    pub const MTRR_FIX4K: u32 = 0x268;
    pub const MTRR_FIX4K_LAST: u32 = 0x26F;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2FF;
    pub const EFER: u32 = 0xC000_0080;
    pub const STAR: u32 = 0xC000_0081;
    pub const LSTAR: u32 = 0xC000_0082;
    pub const CSTAR: u32 = 0xC000_0083;
    pub const FMASK: u32 = 0xC000_0084;
    pub const FS_BASE: u32 = 0xC000_0100;
    pub const GS_BASE: u32 = 0xC000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xC000_0102;
    pub const TSC_AUX: u32 = 0xC000_0103;
}
use index::*;

/// Eight variable ranges, fixed ranges, write combining.
const MTRRCAP_VALUE: u64 = 0x508;
/// The revision a guest reads: no update is ever needed.
const MICROCODE: u64 = 0xFFFF_FFFF << 32;
/// IBRS, STIBP, SSBD.
const SPEC_CTRL_BITS: u64 = 7;

/// Time-stamp counter as RDTSC gives it.
pub(crate) fn tsc(ex: &Exec<'_>) -> u64 {
    ex.bus.tsc(ex.vp).wrapping_add(ex.cpu.msr.tsc_adjust)
}

fn fixed_index(n: u32) -> Option<usize> {
    match n {
        MTRR_FIX64K => Some(0),
        MTRR_FIX16K => Some(1),
        0x259 => Some(2),
        MTRR_FIX4K..=MTRR_FIX4K_LAST => Some(3 + (n - MTRR_FIX4K) as usize),
        _ => None,
    }
}

/// RDMSR.
pub(crate) fn read(ex: &mut Exec<'_>, n: u32) -> Result<u64, Fault> {
    if !ex.model.has_msr(n) {
        return Err(Fault::GP0);
    }
    let m = &ex.cpu.msr;
    Ok(match n {
        TSC => tsc(ex),
        PLATFORM_ID | EBL_CR_POWERON | MCG_CAP | MCG_STATUS => 0,
        FEATURE_CONTROL => 1,
        TSC_ADJUST => m.tsc_adjust,
        SPEC_CTRL => m.spec_ctrl,
        BIOS_SIGN_ID => MICROCODE,
        MTRRCAP => MTRRCAP_VALUE,
        ARCH_CAPABILITIES => ex.model.arch_capabilities(),
        SYSENTER_CS => m.sysenter_cs,
        SYSENTER_ESP => m.sysenter_esp,
        SYSENTER_EIP => m.sysenter_eip,
        MISC_ENABLE => m.misc_enable,
        DEBUGCTL => m.debugctl,
        LAST_BRANCH_FROM..=LAST_INT_TO => 0,
        MTRR_VARIABLE..=MTRR_VARIABLE_LAST => m.mtrr_variable[(n - MTRR_VARIABLE) as usize],
        PAT => m.pat,
        MTRR_DEF_TYPE => m.mtrr_def_type,
        EFER => ex.cpu.efer,
        STAR => m.star,
        LSTAR => m.lstar,
        CSTAR => m.cstar,
        FMASK => m.sfmask,
        FS_BASE => ex.cpu.segment(SegReg::Fs).base,
        GS_BASE => ex.cpu.segment(SegReg::Gs).base,
        KERNEL_GS_BASE => m.kernel_gs_base,
        TSC_AUX => m.tsc_aux,
        _ => match fixed_index(n) {
            Some(i) => m.mtrr_fixed[i],
            None => return ex.bus.rdmsr(ex.vp, n).map_err(|_| Fault::GP0),
        },
    })
}

/// Memory types that MTRRs and, with `uc_minus`, PAT entries may name.
fn memory_types(value: u64, uc_minus: bool) -> bool {
    value.to_le_bytes().iter().all(|&t| matches!(t, 0 | 1 | 4 | 5 | 6) || (uc_minus && t == 7))
}

/// WRMSR.
pub(crate) fn write(ex: &mut Exec<'_>, n: u32, v: u64) -> Result<(), Fault> {
    if !ex.model.has_msr(n) {
        return Err(Fault::GP0);
    }
    let check = |ok: bool| if ok { Ok(()) } else { Err(Fault::GP0) };
    match n {
        EFER => return write_efer(ex, v),
        SYSENTER_ESP | SYSENTER_EIP | LSTAR | CSTAR | FS_BASE | GS_BASE | KERNEL_GS_BASE => {
            check(canonical(v))?;
        }
        SPEC_CTRL => check(v & !SPEC_CTRL_BITS == 0)?,
        PRED_CMD => return check(v & !1 == 0),
        PAT => check(memory_types(v, true))?,
        MTRR_DEF_TYPE => check(v & !0xCFF == 0 && memory_types(v & 0xFF, false))?,
        MTRR_VARIABLE..=MTRR_VARIABLE_LAST => {
            let low =
                if n & 1 == 0 { memory_types(v & 0xFF, false) && v & 0xF00 == 0 } else { v & 0x7FF == 0 };
            check(low && v >> ex.model.paging().phys_bits == 0)?;
        }
        FMASK | TSC_AUX => check(v >> 32 == 0)?,
        DEBUGCTL => check(v & !(debugctl::LBR | debugctl::BTF) == 0)?,
        MTRRCAP | ARCH_CAPABILITIES | MCG_CAP | PLATFORM_ID => check(false)?,
        FEATURE_CONTROL => check(false)?,
        BIOS_SIGN_ID | BIOS_UPDT_TRIG | EBL_CR_POWERON | MCG_STATUS => return Ok(()),
        LAST_BRANCH_FROM..=LAST_INT_TO => return Ok(()),
        _ => {}
    }
    let adjusted = ex.cpu.msr.tsc_adjust.wrapping_add(v.wrapping_sub(tsc(ex)));
    let m = &mut ex.cpu.msr;
    match n {
        TSC => m.tsc_adjust = adjusted,
        TSC_ADJUST => m.tsc_adjust = v,
        SPEC_CTRL => m.spec_ctrl = v,
        SYSENTER_CS => m.sysenter_cs = v & 0xFFFF_FFFF,
        SYSENTER_ESP => m.sysenter_esp = v,
        SYSENTER_EIP => m.sysenter_eip = v,
        MISC_ENABLE => m.misc_enable = v,
        DEBUGCTL => m.debugctl = v,
        MTRR_VARIABLE..=MTRR_VARIABLE_LAST => m.mtrr_variable[(n - MTRR_VARIABLE) as usize] = v,
        PAT => m.pat = v,
        MTRR_DEF_TYPE => m.mtrr_def_type = v,
        STAR => m.star = v,
        LSTAR => m.lstar = v,
        CSTAR => m.cstar = v,
        FMASK => m.sfmask = v,
        KERNEL_GS_BASE => m.kernel_gs_base = v,
        TSC_AUX => m.tsc_aux = v,
        FS_BASE => ex.cpu.seg[SegReg::Fs as usize].base = v,
        GS_BASE => ex.cpu.seg[SegReg::Gs as usize].base = v,
        _ => match fixed_index(n) {
            Some(_) if !memory_types(v, false) => return Err(Fault::GP0),
            Some(i) => m.mtrr_fixed[i] = v,
            None => return ex.bus.wrmsr(ex.vp, n, v).map_err(|_| Fault::GP0),
        },
    }
    if matches!(n, TSC | TSC_ADJUST) {
        // TSC deadlines are the machine's, and compared with the sum; a machine without them need not know the register.
        let _unknown = ex.bus.wrmsr(ex.vp, TSC_ADJUST, ex.cpu.msr.tsc_adjust);
    }
    Ok(())
}

fn write_efer(ex: &mut Exec<'_>, v: u64) -> Result<(), Fault> {
    let old = ex.cpu.efer;
    let new = (v & !efer::LMA) | (old & efer::LMA);
    if new & !(ex.model.efer_allowed() | efer::LMA) != 0 || ((old ^ new) & efer::LME != 0 && ex.cpu.paging())
    {
        return Err(Fault::GP0);
    }
    ex.cpu.efer = new;
    if (old ^ new) & efer::NXE != 0 {
        ex.flushes.all = true;
    }
    Ok(())
}

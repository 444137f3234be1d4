//! Control, debug and descriptor-table registers, TLB invalidation (SDM 3A, 2.5; 3B, 17.2).

use crate::debug::{dr6, dr7};
use crate::exec::Exec;
use crate::fault::{Fault, Vector};
use crate::segment;
use crate::state::{LinAddr, SegReg, attr, cr0, cr4, efer};
use paravane_memory::{Mapped, PhysAddr, RamOffset};

const CR0_DEFINED: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;

/// CR4 bits whose change drops every translation.
const CR4_PAGING: u64 = cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP;

/// Reserved bits of a present PDPTE under PAE, whatever the model (SDM 3A, table 4-8).
const PDPTE_RESERVED: u64 = 0x1E6 | 0xFFF << 52;

/// Reads the four PDPTEs that CR3 `cr3` names; `None` if one has reserved bits set.
fn read_pdptes(ex: &Exec<'_>, cr3: u64) -> Option<[u64; 4]> {
    let reserved = PDPTE_RESERVED | ex.model.paging().beyond();
    let mut pdptes = [0; 4];
    for (i, entry) in pdptes.iter_mut().enumerate() {
        let at = PhysAddr(crate::mmu::mask_a20(ex.cpu, (cr3 & 0xFFFF_FFE0) + 8 * i as u64));
        if let Mapped::Ram(page) | Mapped::Rom(page) = ex.mem.resolve(at.page()) {
            *entry = ex.mem.ram_load(RamOffset(page.0 + at.page_offset()), 8);
        }
        if *entry & 1 != 0 && *entry & reserved != 0 {
            return None;
        }
    }
    Some(pdptes)
}

fn pae_paging(cr0: u64, cr4: u64, efer: u64) -> bool {
    cr0 & cr0::PG != 0 && cr4 & cr4::PAE != 0 && efer & efer::LMA == 0
}

/// MOV to CR0 (and LMSW).
pub(crate) fn write_cr0(ex: &mut Exec<'_>, value: u64) -> Result<(), Fault> {
    let old = ex.cpu.cr0;
    let (pe, pg) = (value & cr0::PE != 0, value & cr0::PG != 0);
    if value >> 32 != 0 || (pg && !pe) || (value & cr0::NW != 0 && value & cr0::CD == 0) {
        return Err(Fault::GP0);
    }
    let new = (value & CR0_DEFINED) | cr0::ET;
    let mut lm = ex.cpu.efer;
    if pg && old & cr0::PG == 0 && lm & efer::LME != 0 {
        let sixteen_bit_task = ex.cpu.tr.attributes & 8 == 0 && ex.cpu.tr.present();
        if ex.cpu.cr4 & cr4::PAE == 0
            || ex.cpu.segment(SegReg::Cs).attributes & attr::L != 0
            || sixteen_bit_task
        {
            return Err(Fault::GP0);
        }
        lm |= efer::LMA;
    }
    if !pg && old & cr0::PG != 0 {
        if ex.cpu.code64() || ex.cpu.cr4 & cr4::PCIDE != 0 {
            return Err(Fault::GP0);
        }
        lm &= !efer::LMA;
    }
    if (old ^ new) & (cr0::PG | cr0::CD | cr0::NW) != 0 && pae_paging(new, ex.cpu.cr4, lm) {
        ex.cpu.pdptes = read_pdptes(ex, ex.cpu.cr3).ok_or(Fault::GP0)?;
    }
    ex.cpu.efer = lm;
    ex.cpu.cr0 = new;
    if (old ^ new) & (cr0::PG | cr0::WP | cr0::PE) != 0 {
        ex.flushes.all = true;
    }
    if !pe {
        ex.cpu.cpl = 0;
    }
    Ok(())
}

/// MOV to CR3.
pub(crate) fn write_cr3(ex: &mut Exec<'_>, value: u64) -> Result<(), Fault> {
    let mut new = value;
    let mut keep = false;
    if ex.cpu.cr4 & cr4::PCIDE != 0 {
        keep = new >> 63 != 0;
        new &= !(1 << 63);
    }
    if ex.cpu.code64() {
        if new >> ex.model.paging().phys_bits != 0 {
            return Err(Fault::GP0);
        }
    } else {
        new &= 0xFFFF_FFFF;
    }
    if pae_paging(ex.cpu.cr0, ex.cpu.cr4, ex.cpu.efer) {
        ex.cpu.pdptes = read_pdptes(ex, new).ok_or(Fault::GP0)?;
    }
    let switched = ex.cpu.cr3 != new;
    ex.cpu.cr3 = new;
    let pcid = ex.cpu.pcid();
    if switched {
        ex.flushes.switched = Some(pcid);
    }
    if !keep {
        ex.flushes.space(pcid);
    }
    Ok(())
}

/// CR3 from a TSS: bad PDPTEs make every address not present instead of faulting here.
pub(crate) fn task_cr3(ex: &mut Exec<'_>, value: u64) {
    ex.cpu.cr3 = value;
    if pae_paging(ex.cpu.cr0, ex.cpu.cr4, ex.cpu.efer) {
        ex.cpu.pdptes = read_pdptes(ex, value).unwrap_or_default();
    }
    let pcid = ex.cpu.pcid();
    ex.flushes.switched = Some(pcid);
    ex.flushes.space(pcid);
    // The walk that loads the new task's segments must not find the old task's pages.
    ex.tlb.obey(ex.flushes);
}

/// MOV to CR4.
pub(crate) fn write_cr4(ex: &mut Exec<'_>, value: u64) -> Result<(), Fault> {
    let old = ex.cpu.cr4;
    let long = ex.cpu.long_mode();
    if value & !ex.model.cr4_allowed() != 0 {
        return Err(Fault::GP0);
    }
    if long && value & cr4::PAE == 0 {
        return Err(Fault::GP0);
    }
    if value & !old & cr4::PCIDE != 0 && (!long || ex.cpu.cr3 & 0xFFF != 0) {
        return Err(Fault::GP0);
    }
    if (old ^ value) & (cr4::PAE | cr4::PGE | cr4::PSE | cr4::SMEP) != 0
        && pae_paging(ex.cpu.cr0, value, ex.cpu.efer)
    {
        ex.cpu.pdptes = read_pdptes(ex, ex.cpu.cr3).ok_or(Fault::GP0)?;
    }
    ex.cpu.cr4 = value;
    if (old ^ value) & CR4_PAGING != 0 {
        ex.flushes.all = true;
    }
    if (old ^ value) & cr4::PCIDE != 0 {
        ex.flushes.switched = Some(ex.cpu.pcid());
    }
    Ok(())
}

/// MOV to a control register by number; which exist is checked before.
pub(crate) fn write_cr(ex: &mut Exec<'_>, n: u32, value: u64) -> Result<(), Fault> {
    match n {
        0 => write_cr0(ex, value),
        2 => {
            ex.cpu.cr2 = value;
            Ok(())
        }
        3 => write_cr3(ex, value),
        4 => write_cr4(ex, value),
        8 => {
            if value > 15 {
                return Err(Fault::GP0);
            }
            ex.bus.write_cr8(ex.vp, value);
            Ok(())
        }
        _ => Err(Fault::UD),
    }
}

/// MOV from a control register by number, likewise.
pub(crate) fn read_cr(ex: &Exec<'_>, n: u32) -> Result<u64, Fault> {
    match n {
        0 => Ok(ex.cpu.cr0),
        2 => Ok(ex.cpu.cr2),
        3 => Ok(ex.cpu.cr3),
        4 => Ok(ex.cpu.cr4),
        8 => Ok(ex.bus.read_cr8(ex.vp)),
        _ => Err(Fault::UD),
    }
}

/// The debug register that number `n` names: 4 and 5 alias 6 and 7 unless CR4.DE.
fn debug_number(ex: &mut Exec<'_>, n: u32) -> Result<usize, Fault> {
    let n = match n {
        4 | 5 if ex.cpu.cr4 & cr4::DE == 0 => n + 2,
        4 | 5 | 8.. => return Err(Fault::UD),
        _ => n,
    };
    if ex.cpu.dr[7] & dr7::GD != 0 {
        ex.cpu.dr[6] |= dr6::BD;
        return Err(Fault::new(Vector::DB));
    }
    Ok(n as usize)
}

/// MOV from a debug register.
pub(crate) fn read_dr(ex: &mut Exec<'_>, n: u32) -> Result<u64, Fault> {
    let n = debug_number(ex, n)?;
    Ok(ex.cpu.dr[n])
}

/// MOV to a debug register.
pub(crate) fn write_dr(ex: &mut Exec<'_>, n: u32, value: u64) -> Result<(), Fault> {
    let n = debug_number(ex, n)?;
    if n >= 6 && value >> 32 != 0 {
        return Err(Fault::GP0);
    }
    ex.cpu.dr[n] = match n {
        6 => (value & 0xE00F) | dr6::ONES,
        7 => (value & 0xFFFF_23FF) | dr7::ONE,
        _ => value,
    };
    Ok(())
}

/// LLDT.
pub(crate) fn load_ldt(ex: &mut Exec<'_>, selector: u16) -> Result<(), Fault> {
    if segment::is_null(selector) {
        ex.cpu.ldtr = crate::state::Segment { selector, ..Default::default() };
        return Ok(());
    }
    if selector & 4 != 0 {
        return Err(Fault::gp(selector));
    }
    let d = segment::fetch_wide(ex, selector, Vector::GP, 0)?;
    if d.system_type() != Some(2) {
        return Err(Fault::gp(selector));
    }
    if !d.present() {
        return Err(Fault::with_code(Vector::NP, u32::from(selector & !3)));
    }
    ex.cpu.ldtr = d.segment();
    Ok(())
}

/// LTR.
pub(crate) fn load_task_register(ex: &mut Exec<'_>, selector: u16) -> Result<(), Fault> {
    if segment::is_null(selector) {
        return Err(Fault::GP0);
    }
    if selector & 4 != 0 {
        return Err(Fault::gp(selector));
    }
    let mut d = segment::fetch_wide(ex, selector, Vector::GP, 0)?;
    let available =
        if ex.cpu.long_mode() { d.system_type() == Some(9) } else { matches!(d.system_type(), Some(1 | 9)) };
    if !available {
        return Err(Fault::gp(selector));
    }
    if !d.present() {
        return Err(Fault::with_code(Vector::NP, u32::from(selector & !3)));
    }
    d.raw |= 2 << 40;
    let before = ex.sys_update(d.at.wrapping_add(5), 1, &mut |access| access | 2)?;
    if before & 2 != 0 {
        // Another processor took it since.
        return Err(Fault::gp(selector));
    }
    ex.cpu.tr = d.segment();
    Ok(())
}

/// INVPCID of `kind` with descriptor `low` (PCID) and `high` (linear address).
pub(crate) fn invpcid(ex: &mut Exec<'_>, kind: u64, low: u64, high: u64) -> Result<(), Fault> {
    let pcid = (low & 0xFFF) as u16;
    if kind > 3 || low >> 12 != 0 || (kind < 2 && ex.cpu.cr4 & cr4::PCIDE == 0 && pcid != 0) {
        return Err(Fault::GP0);
    }
    match kind {
        0 if !segment::canonical(high) => return Err(Fault::GP0),
        // Global entries need not go, but may.
        0 => ex.flushes.page(pcid, LinAddr(high)),
        1 => ex.flushes.space(pcid),
        2 => ex.flushes.all = true,
        _ => ex.flushes.all_non_global = true,
    }
    Ok(())
}

/// XSETBV.
pub(crate) fn xsetbv(ex: &mut Exec<'_>, index: u32, value: u64) -> Result<(), Fault> {
    let avx_without_sse = value & 4 != 0 && value & 2 == 0;
    if index != 0 || value & 1 == 0 || avx_without_sse || value & !ex.model.xcr0_allowed() != 0 {
        return Err(Fault::GP0);
    }
    ex.cpu.xcr0 = value;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testbed::Bed;

    #[test]
    fn control_register_rules() {
        let mut bed = Bed::protected();
        bed.with(|ex| {
            let now = ex.cpu.cr0;
            assert_eq!(write_cr0(ex, (now | cr0::PG) & !cr0::PE), Err(Fault::GP0));
            assert_eq!(write_cr0(ex, (now | cr0::NW) & !cr0::CD), Err(Fault::GP0));
            assert_eq!(write_cr4(ex, cr4::LA57), Err(Fault::GP0));
            assert_eq!(write_cr4(ex, cr4::PCIDE), Err(Fault::GP0));
            ex.cpu.efer |= efer::LME;
            assert_eq!(write_cr0(ex, now | cr0::PG), Err(Fault::GP0), "LME without PAE");
            assert_eq!(write_cr4(ex, cr4::PAE), Ok(()));
            assert_eq!(write_cr0(ex, now | cr0::PG), Ok(()));
            assert!(ex.cpu.long_mode() && ex.flushes.all);
            assert_eq!(write_cr4(ex, 0), Err(Fault::GP0), "PAE in long mode");
        });
    }

    #[test]
    fn general_detect_guards_the_debug_registers() {
        let mut bed = Bed::protected();
        bed.with(|ex| {
            assert_eq!(write_dr(ex, 7, 0x2000), Ok(()));
            assert_eq!(read_dr(ex, 0), Err(Fault::new(Vector::DB)));
            assert_eq!(ex.cpu.dr[6], dr6::ONES | dr6::BD);
        });
    }
}

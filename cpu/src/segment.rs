//! Segment limits, descriptors and segment register loads (SDM 3A, chapters 3 and 5).

use crate::exec::Exec;
use crate::fault::{Fault, Vector};
use crate::mmu::Access;
use crate::state::{CpuState, LinAddr, SegReg, Segment, attr};

/// Bits 63–47 all equal.
#[inline]
pub(crate) fn canonical(a: u64) -> bool {
    ((a << 16) as i64 >> 16) as u64 == a
}

/// `size` bytes at `a` in 64-bit mode.
#[inline]
pub(crate) fn canonical_range(a: u64, size: u64) -> Result<LinAddr, ()> {
    let last = a.wrapping_add(size.wrapping_sub(1));
    if canonical(a) && canonical(last) { Ok(LinAddr(a)) } else { Err(()) }
}

/// Checks presence, type and limit for `size` bytes at `offset` outside 64-bit mode.
#[inline]
pub(crate) fn in_limits(s: &Segment, offset: u64, size: u64, write: bool, protected: bool) -> Result<(), ()> {
    let a = s.attributes;
    if !s.present() {
        return Err(());
    }
    if protected {
        let allowed = if write {
            a & (attr::CODE | attr::READ_WRITE) == attr::READ_WRITE
        } else {
            a & (attr::CODE | attr::READ_WRITE) != attr::CODE
        };
        if !allowed {
            return Err(());
        }
    }
    let last = offset.wrapping_add(size.wrapping_sub(1));
    let limit = u64::from(s.limit);
    if a & (attr::CODE | attr::CONFORM_EXPAND) == attr::CONFORM_EXPAND {
        let top = if s.big() { 0xFFFF_FFFF } else { 0xFFFF };
        return if offset > limit && last <= top && last >= offset { Ok(()) } else { Err(()) };
    }
    if last <= limit && last >= offset { Ok(()) } else { Err(()) }
}

/// Bits of the stack pointer that stack segment `ss` uses outside 64-bit mode.
#[inline]
pub(crate) fn stack_mask(ss: &Segment) -> u64 {
    if ss.big() { 0xFFFF_FFFF } else { 0xFFFF }
}

/// A descriptor as it lies in a table, and where.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    pub raw: u64,
    /// Bits 63–32 of the base in 16-byte system descriptors.
    pub high: u64,
    pub at: u64,
    pub selector: u16,
}

impl Descriptor {
    /// As a segment register would hold it.
    pub fn segment(&self) -> Segment {
        let segment = Segment::of_descriptor(self.selector, self.raw);
        Segment { base: segment.base | self.high << 32, ..segment }
    }

    /// Type field with S: 0–15 for system descriptors.
    pub fn system_type(&self) -> Option<u8> {
        (self.attr() & attr::S == 0).then_some((self.attr() & 0xF) as u8)
    }

    fn attr(&self) -> u16 {
        (self.raw >> 40) as u16 & 0xF0FF
    }

    pub fn dpl(&self) -> u8 {
        (self.raw >> 45 & 3) as u8
    }

    pub fn present(&self) -> bool {
        self.attr() & attr::P != 0
    }

    pub fn is_code(&self) -> bool {
        self.attr() & (attr::S | attr::CODE) == attr::S | attr::CODE
    }

    pub fn is_conforming(&self) -> bool {
        self.is_code() && self.attr() & attr::CONFORM_EXPAND != 0
    }

    pub fn is_readable_code(&self) -> bool {
        self.is_code() && self.attr() & attr::READ_WRITE != 0
    }

    pub fn is_data(&self) -> bool {
        self.attr() & (attr::S | attr::CODE) == attr::S
    }

    pub fn is_writable_data(&self) -> bool {
        self.is_data() && self.attr() & attr::READ_WRITE != 0
    }

    pub fn is_long_code(&self) -> bool {
        self.is_code() && self.attr() & attr::L != 0
    }

    /// Selector of a gate.
    pub fn gate_selector(&self) -> u16 {
        (self.raw >> 16) as u16
    }

    /// Offset of a 32- or 64-bit gate (16-bit gates hold zero above bit 15 by rule; masked by the caller).
    pub fn gate_offset(&self) -> u64 {
        self.raw & 0xFFFF | self.raw >> 32 & 0xFFFF_0000 | self.high << 32
    }
}

/// Whether `selector` is null (RPL ignored).
pub(crate) fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// Linear address of the descriptor of `selector`, or `None` outside its table.
fn locate(cpu: &CpuState, selector: u16, size: u64) -> Option<u64> {
    let index = u64::from(selector & !7);
    let (base, limit) = if selector & 4 != 0 {
        if !cpu.ldtr.present() {
            return None;
        }
        (cpu.ldtr.base, u64::from(cpu.ldtr.limit))
    } else {
        (cpu.gdtr.base, u64::from(cpu.gdtr.limit))
    };
    (index + size - 1 <= limit).then(|| base.wrapping_add(index))
}

/// Reads a descriptor; outside its table the fault is `vector(selector + ext)`.
pub(crate) fn fetch(ex: &mut Exec<'_>, selector: u16, vector: Vector, ext: u32) -> Result<Descriptor, Fault> {
    let outside = Fault::with_code(vector, u32::from(selector & !3) | ext);
    let at = locate(ex.cpu, selector, 8).ok_or(outside)?;
    let raw = ex.sys_load(at, 8)?;
    Ok(Descriptor { raw, high: 0, at, selector })
}

/// Reads a descriptor that is 16 bytes long in long mode (LDT, TSS, call gates).
pub(crate) fn fetch_wide(
    ex: &mut Exec<'_>,
    selector: u16,
    vector: Vector,
    ext: u32,
) -> Result<Descriptor, Fault> {
    let mut d = fetch(ex, selector, vector, ext)?;
    if ex.cpu.long_mode() && d.system_type().is_some() {
        let outside = Fault::with_code(vector, u32::from(selector & !3) | ext);
        let at = locate(ex.cpu, selector, 16).ok_or(outside)?;
        let high = ex.sys_load(at.wrapping_add(8), 8)?;
        if high >> 40 & 0x1F != 0 {
            return Err(outside);
        }
        d.high = high & 0xFFFF_FFFF;
    }
    Ok(d)
}

/// Reads a descriptor without raising anything but page faults (LAR, LSL, VERR, VERW).
pub(crate) fn peek(ex: &mut Exec<'_>, selector: u16) -> Result<Option<Descriptor>, Fault> {
    if is_null(selector) || locate(ex.cpu, selector, 8).is_none() {
        return Ok(None);
    }
    fetch(ex, selector, Vector::GP, 0).map(Some)
}

/// Sets the accessed bit of a code or data descriptor in its table.
pub(crate) fn touch(ex: &mut Exec<'_>, d: &mut Descriptor) -> Result<(), Fault> {
    if d.raw & 1 << 40 == 0 {
        d.raw |= 1 << 40;
        ex.sys_update(d.at.wrapping_add(5), 1, &mut |access| access | 1)?;
    }
    Ok(())
}

/// Faults as [`touch`] would, without writing.
pub(crate) fn probe_touch(ex: &mut Exec<'_>, d: &Descriptor) -> Result<(), Fault> {
    if d.raw & 1 << 40 == 0 {
        ex.sys_probe(d.at.wrapping_add(5), 1, Access::Write)?;
    }
    Ok(())
}

/// Segment register contents in virtual-8086 mode.
pub(crate) fn virtual8086(selector: u16) -> Segment {
    Segment { base: u64::from(selector) << 4, limit: 0xFFFF, attributes: 0xF3, selector }
}

/// Loads a data or stack segment register by the rules of the current mode.
pub(crate) fn load(ex: &mut Exec<'_>, seg: SegReg, selector: u16) -> Result<(), Fault> {
    let new = resolve(ex, seg, selector)?;
    ex.cpu.seg[seg as usize] = new;
    Ok(())
}

/// What loading `selector` into `seg` gives, with every check made and the accessed bit set.
pub(crate) fn resolve(ex: &mut Exec<'_>, seg: SegReg, selector: u16) -> Result<Segment, Fault> {
    let cpu = &ex.cpu;
    if !cpu.protected() {
        // Limits survive: "unreal" mode.
        let old = cpu.segment(seg);
        let attributes = 0x93 | old.attributes & (attr::DB | attr::G);
        return Ok(Segment { base: u64::from(selector) << 4, limit: old.limit, attributes, selector });
    }
    if cpu.v8086() {
        return Ok(virtual8086(selector));
    }
    if seg == SegReg::Ss {
        let (cpl, wide) = (cpu.cpl, cpu.code64());
        return stack(ex, selector, cpl, wide, Vector::GP, 0);
    }
    data(ex, selector, ex.cpu.cpl, Vector::GP)
}

/// Checks and reads a data segment for DS, ES, FS or GS at privilege `cpl`.
pub(crate) fn data(ex: &mut Exec<'_>, selector: u16, cpl: u8, vector: Vector) -> Result<Segment, Fault> {
    if is_null(selector) {
        return Ok(Segment { selector, ..Segment::default() });
    }
    let bad = Fault::with_code(vector, u32::from(selector & !3));
    let mut d = fetch(ex, selector, vector, 0)?;
    if !(d.is_data() || d.is_readable_code()) {
        return Err(bad);
    }
    let rpl = (selector & 3) as u8;
    if !d.is_conforming() && (rpl > d.dpl() || cpl > d.dpl()) {
        return Err(bad);
    }
    if !d.present() {
        return Err(Fault::with_code(Vector::NP, u32::from(selector & !3)));
    }
    touch(ex, &mut d)?;
    Ok(d.segment())
}

/// Checks and reads a stack segment for privilege `cpl`; `wide` allows a null selector below CPL 3.
pub(crate) fn stack(
    ex: &mut Exec<'_>,
    selector: u16,
    cpl: u8,
    wide: bool,
    vector: Vector,
    ext: u32,
) -> Result<Segment, Fault> {
    let rpl = (selector & 3) as u8;
    if is_null(selector) {
        if wide && cpl < 3 && rpl == cpl {
            return Ok(null_stack(cpl, selector));
        }
        return Err(Fault::with_code(vector, ext));
    }
    let bad = Fault::with_code(vector, u32::from(selector & !3) | ext);
    let mut d = fetch(ex, selector, vector, ext)?;
    if rpl != cpl || d.dpl() != cpl || !d.is_writable_data() {
        return Err(bad);
    }
    if !d.present() {
        return Err(Fault::with_code(Vector::SS, u32::from(selector & !3) | ext));
    }
    touch(ex, &mut d)?;
    Ok(d.segment())
}

/// SS after a null selector in 64-bit mode: unusable but for its DPL.
pub(crate) fn null_stack(cpl: u8, selector: u16) -> Segment {
    Segment { attributes: u16::from(cpl) << attr::DPL_SHIFT, selector, ..Segment::default() }
}

/// Returning to an outer privilege: data segments that the new level may not use become null.
pub(crate) fn drop_privileged(cpu: &mut CpuState) {
    let cpl = cpu.cpl;
    for seg in [SegReg::Es, SegReg::Ds, SegReg::Fs, SegReg::Gs] {
        let s = &mut cpu.seg[seg as usize];
        let conforming =
            s.attributes & (attr::CODE | attr::CONFORM_EXPAND) == attr::CODE | attr::CONFORM_EXPAND;
        if s.present() && !conforming && s.dpl() < cpl {
            *s = Segment { base: s.base, ..Segment::default() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testbed::Bed;

    #[test]
    fn expand_down_segments_allow_what_lies_above_the_limit() {
        let s = Segment { base: 0, limit: 0xFFF, attributes: 0x97, selector: 8 };
        assert!(in_limits(&s, 0xFFF, 1, true, true).is_err());
        assert!(in_limits(&s, 0x1000, 4, true, true).is_ok());
        assert!(in_limits(&s, 0xFFFE, 4, true, true).is_err());
        let big = Segment { attributes: 0x97 | attr::DB, ..s };
        assert!(in_limits(&big, 0xFFFE, 4, true, true).is_ok());
    }

    #[test]
    fn canonical_addresses() {
        assert!(canonical(0x7FFF_FFFF_FFFF) && canonical(0xFFFF_8000_0000_0000));
        assert!(!canonical(0x8000_0000_0000));
        assert!(canonical_range(0x7FFF_FFFF_FFFE, 4).is_err());
    }

    #[test]
    fn segment_loads_check_type_privilege_and_presence() {
        let mut bed = Bed::protected();
        bed.gdt(4, 0x00CF_1300_0000_FFFF); // data, DPL 0, not present
        bed.gdt(5, 0x00CF_9800_0000_FFFF); // execute-only code
        bed.gdt(6, 0x00CF_9200_0000_FFFF); // data, not accessed
        bed.cpu.cpl = 0;
        bed.with(|ex| {
            assert_eq!(ex.set_seg(SegReg::Ds, 0x20), Err(Fault::with_code(Vector::NP, 0x20)));
            assert_eq!(ex.set_seg(SegReg::Ds, 0x28), Err(Fault::gp(0x28)));
            assert_eq!(ex.set_seg(SegReg::Ss, 0x20), Err(Fault::with_code(Vector::SS, 0x20)));
            assert_eq!(ex.set_seg(SegReg::Ss, 0), Err(Fault::GP0));
            assert_eq!(ex.set_seg(SegReg::Ds, 0xFFF8), Err(Fault::gp(0xFFF8)));
            assert_eq!(ex.set_seg(SegReg::Ds, 0x33), Err(Fault::gp(0x30)));
            assert_eq!(ex.set_seg(SegReg::Ds, 0x30), Ok(()));
            assert_eq!(ex.cpu.segment(SegReg::Ds).limit, u32::MAX);
            assert_eq!(ex.set_seg(SegReg::Fs, 3), Ok(()));
            assert_eq!(ex.load(SegReg::Fs, 0, 1), Err(Fault::GP0));
        });
        assert_eq!(bed.gdt_entry(6), 0x00CF_9300_0000_FFFF);
    }
}

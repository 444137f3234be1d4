//! Task switches through 16- and 32-bit TSSs (SDM 3A, 7.3).

use crate::control;
use crate::debug::dr6;
use crate::exec::Exec;
use crate::fault::{Fault, Vector};
use crate::mmu::Access;
use crate::segment::{self, Descriptor};
use crate::state::{SegReg, Segment, cr0, flags};

/// What causes a task switch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Reason {
    Jump,
    Call,
    Return,
    Interrupt { ext: u32 },
}

impl Reason {
    fn ext(self) -> u32 {
        match self {
            Reason::Interrupt { ext } => ext,
            _ => 0,
        }
    }

    fn nests(self) -> bool {
        matches!(self, Reason::Call | Reason::Interrupt { .. })
    }
}

/// Order of the segment selectors in a TSS.
const SEGMENTS: [SegReg; 6] = [SegReg::Es, SegReg::Cs, SegReg::Ss, SegReg::Ds, SegReg::Fs, SegReg::Gs];

/// A task's state as its TSS holds it.
struct Image {
    cr3: Option<u64>,
    rip: u64,
    rflags: u64,
    gpr: [u64; 8],
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

/// Field positions of the two TSS formats (SDM 3A, figures 7-2 and 7-10).
struct Format {
    wide: bool,
    /// Offset of (E)IP, after which come (E)FLAGS, eight registers and the selectors.
    ip: u64,
    size: usize,
    segments: usize,
    last: u32,
}

impl Format {
    fn of(tss: &Segment) -> Format {
        if tss.attributes & 8 != 0 {
            Format { wide: true, ip: 0x20, size: 4, segments: 6, last: 0x67 }
        } else {
            Format { wide: false, ip: 0x0E, size: 2, segments: 4, last: 0x2B }
        }
    }

    fn field(&self, n: u64) -> u64 {
        self.ip + n * self.size as u64
    }
}

/// Switches to the task of TSS `selector`, saving `rip` as where the old one goes on. Once the new state is
/// committed, faults belong to the new task.
pub(crate) fn switch(ex: &mut Exec<'_>, selector: u16, reason: Reason, rip: u64) -> Result<(), Fault> {
    let tss = target(ex, selector, reason)?;
    let format = Format::of(&tss.segment());
    let old = ex.cpu.tr;
    let new = Segment { attributes: tss.segment().attributes | 2, ..tss.segment() };
    // Every page both tasks need, before anything is changed.
    ex.sys_probe(old.base, Format::of(&old).last as usize + 1, Access::Write)?;
    ex.sys_probe(
        new.base,
        format.last as usize + 1,
        if reason.nests() { Access::Write } else { Access::Read },
    )?;
    let image = read(ex, &new, &format)?;
    save(ex, &old, reason, rip)?;
    if matches!(reason, Reason::Jump | Reason::Return) {
        set_busy(ex, old.selector, false)?;
    }
    if reason.nests() {
        ex.sys_store(new.base, 2, u64::from(old.selector))?;
    }
    if reason != Reason::Return {
        set_busy(ex, selector, true)?;
    }
    commit(ex, new, &image, reason);
    // Faults of the new task's state name the event that switched to it, too.
    load_segments(ex, &image).map_err(|fault| match fault.vector {
        Vector::PF => fault,
        _ => Fault { error_code: fault.error_code.map(|code| code | reason.ext()), ..fault },
    })
}

/// The TSS descriptor, checked.
fn target(ex: &mut Exec<'_>, selector: u16, reason: Reason) -> Result<Descriptor, Fault> {
    let returning = reason == Reason::Return;
    let vector = if returning { Vector::TS } else { Vector::GP };
    let bad = |v| Fault::with_code(v, u32::from(selector & !3) | reason.ext());
    if selector & 4 != 0 || segment::is_null(selector) {
        return Err(bad(vector));
    }
    let d = segment::fetch(ex, selector, vector, reason.ext())?;
    let right = if returning { [3, 11] } else { [1, 9] };
    if !d.system_type().is_some_and(|t| right.contains(&t)) {
        return Err(bad(vector));
    }
    if !d.present() {
        return Err(bad(Vector::NP));
    }
    if d.segment().limit < Format::of(&d.segment()).last {
        return Err(bad(Vector::TS));
    }
    Ok(d)
}

fn set_busy(ex: &mut Exec<'_>, selector: u16, busy: bool) -> Result<(), Fault> {
    let at = ex.cpu.gdtr.base.wrapping_add(u64::from(selector & !7) + 5);
    ex.sys_update(at, 1, &mut |access| if busy { access | 2 } else { access & !2 }).map(|_| ())
}

fn read(ex: &mut Exec<'_>, tss: &Segment, f: &Format) -> Result<Image, Fault> {
    let mut field = |at: u64, size: usize| ex.sys_load(tss.base.wrapping_add(at), size);
    let mut image = Image {
        cr3: if f.wide { Some(field(0x1C, 4)?) } else { None },
        rip: field(f.field(0), f.size)?,
        rflags: field(f.field(1), f.size)?,
        gpr: [0; 8],
        selectors: [0; 6],
        ldt: 0,
        trap: f.wide && field(0x64, 2)? & 1 != 0,
    };
    for i in 0..8 {
        image.gpr[i] = field(f.field(2 + i as u64), f.size)?;
        if !f.wide {
            image.gpr[i] |= 0xFFFF_0000;
        }
    }
    for i in 0..f.segments {
        image.selectors[i] = field(f.field(10 + i as u64), 2)? as u16;
    }
    image.ldt = field(f.field(10 + f.segments as u64), 2)? as u16;
    Ok(image)
}

fn save(ex: &mut Exec<'_>, tss: &Segment, reason: Reason, rip: u64) -> Result<(), Fault> {
    let f = Format::of(tss);
    let mut rflags = ex.cpu.rflags;
    if reason == Reason::Return {
        rflags &= !flags::NT;
    }
    ex.sys_store(tss.base.wrapping_add(f.field(0)), f.size, rip)?;
    ex.sys_store(tss.base.wrapping_add(f.field(1)), f.size, rflags)?;
    for i in 0..8 {
        ex.sys_store(tss.base.wrapping_add(f.field(2 + i as u64)), f.size, ex.cpu.gpr[i])?;
    }
    for (i, &s) in SEGMENTS.iter().enumerate().take(f.segments) {
        let selector = u64::from(ex.cpu.segment(s).selector);
        ex.sys_store(tss.base.wrapping_add(f.field(10 + i as u64)), 2, selector)?;
    }
    Ok(())
}

fn commit(ex: &mut Exec<'_>, tss: Segment, image: &Image, reason: Reason) {
    let cpu = &mut *ex.cpu;
    cpu.tr = tss;
    cpu.cr0 |= cr0::TS;
    // Local breakpoint enables end with the task.
    cpu.dr[7] &= !crate::debug::dr7::LOCAL;
    let kept = if tss.attributes & 8 != 0 { 0 } else { cpu.rflags & 0xFFFF_0000 & !(flags::VM | flags::RF) };
    cpu.rflags = (image.rflags & 0x003F_7FD7) | kept | flags::FIXED;
    if reason.nests() {
        cpu.rflags |= flags::NT;
    }
    cpu.gpr[..8].copy_from_slice(&image.gpr);
    for (i, &s) in SEGMENTS.iter().enumerate() {
        let selector = image.selectors[i];
        cpu.seg[s as usize] = Segment { selector, ..Segment::default() };
    }
    cpu.ldtr = Segment { selector: image.ldt, ..Segment::default() };
    cpu.rip = image.rip;
    ex.next_rip = image.rip;
    ex.transferred = true;
    ex.delivered = true;
    if let Some(cr3) = image.cr3
        && ex.cpu.paging()
        && ex.cpu.cr3 != cr3
    {
        control::task_cr3(ex, cr3);
    }
    if image.trap {
        ex.debug_hits |= dr6::BT;
    }
}

fn load_segments(ex: &mut Exec<'_>, image: &Image) -> Result<(), Fault> {
    let v86 = ex.cpu.v8086();
    ex.cpu.cpl = if v86 { 3 } else { (image.selectors[1] & 3) as u8 };
    load_ldt(ex, image.ldt)?;
    if v86 {
        for (i, &s) in SEGMENTS.iter().enumerate() {
            ex.cpu.seg[s as usize] = segment::virtual8086(image.selectors[i]);
        }
    } else {
        let cs = load_code(ex, image.selectors[1])?;
        ex.cpu.seg[SegReg::Cs as usize] = cs;
        let cpl = ex.cpu.cpl;
        let ss = segment::stack(ex, image.selectors[2], cpl, false, Vector::TS, 0)?;
        ex.cpu.seg[SegReg::Ss as usize] = ss;
        for i in [0, 3, 4, 5] {
            let s = segment::data(ex, image.selectors[i], cpl, Vector::TS)?;
            ex.cpu.seg[SEGMENTS[i] as usize] = s;
        }
    }
    if image.rip > u64::from(ex.cpu.segment(SegReg::Cs).limit) {
        return Err(Fault::GP0);
    }
    Ok(())
}

fn load_ldt(ex: &mut Exec<'_>, selector: u16) -> Result<(), Fault> {
    if segment::is_null(selector) {
        return Ok(());
    }
    let bad = Fault::with_code(Vector::TS, u32::from(selector & !3));
    if selector & 4 != 0 {
        return Err(bad);
    }
    let d = segment::fetch(ex, selector, Vector::TS, 0)?;
    if d.system_type() != Some(2) || !d.present() {
        return Err(bad);
    }
    ex.cpu.ldtr = d.segment();
    Ok(())
}

fn load_code(ex: &mut Exec<'_>, selector: u16) -> Result<Segment, Fault> {
    let bad = |v| Fault::with_code(v, u32::from(selector & !3));
    if segment::is_null(selector) {
        return Err(bad(Vector::TS));
    }
    let mut d = segment::fetch(ex, selector, Vector::TS, 0)?;
    let rpl = (selector & 3) as u8;
    let right = d.is_code() && if d.is_conforming() { d.dpl() <= rpl } else { d.dpl() == rpl };
    if !right {
        return Err(bad(Vector::TS));
    }
    if !d.present() {
        return Err(bad(Vector::NP));
    }
    segment::touch(ex, &mut d)?;
    Ok(d.segment())
}

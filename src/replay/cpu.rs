//! The processor's part of a machine's state.

use paravane_cpu::{CpuState, DescriptorTable, FpuPointers, Msrs, Segment, Shadow};
use paravane_devices::{Snapshot, StateError, StateStream};

type Walked = Result<(), StateError>;

/// A processor's registers as state.
pub(super) struct Registers<'a>(pub(super) &'a mut CpuState);

impl Snapshot for Registers<'_> {
    fn state(&mut self, s: &mut StateStream<'_>) -> Walked {
        let CpuState {
            gpr,
            rip,
            rflags,
            seg,
            ldtr,
            tr,
            gdtr,
            idtr,
            cr0,
            cr2,
            cr3,
            cr4,
            efer,
            xcr0,
            dr,
            pdptes,
            msr,
            fpu,
            fpu_pointers,
            cpl,
            shadow,
            halted,
            nmi_blocked,
            vp: _,
            instructions,
            a20,
            ignne,
        } = &mut *self.0;
        gpr.state(s)?;
        [rip, rflags, cr0, cr2, cr3, cr4, efer, xcr0, instructions]
            .into_iter()
            .try_for_each(|r| r.state(s))?;
        seg.iter_mut().chain([ldtr, tr]).try_for_each(|segment| self::segment(segment, s))?;
        [gdtr, idtr].into_iter().try_for_each(|table| self::table(table, s))?;
        dr.state(s)?;
        pdptes.state(s)?;
        msrs(msr, s)?;
        s.bytes(&mut fpu.0)?;
        pointers(fpu_pointers, s)?;
        cpl.state(s)?;
        self::shadow(shadow, s)?;
        [halted, nmi_blocked, a20, ignne].into_iter().try_for_each(|flag| flag.state(s))?;
        if *cpl > 3 { Err(StateError::Value("CPL")) } else { Ok(()) }
    }
}

fn segment(segment: &mut Segment, s: &mut StateStream<'_>) -> Walked {
    let Segment { base, limit, attributes, selector } = segment;
    base.state(s)?;
    limit.state(s)?;
    attributes.state(s)?;
    selector.state(s)
}

fn table(table: &mut DescriptorTable, s: &mut StateStream<'_>) -> Walked {
    let DescriptorTable { base, limit } = table;
    base.state(s)?;
    limit.state(s)
}

fn msrs(msr: &mut Msrs, s: &mut StateStream<'_>) -> Walked {
    let Msrs {
        star,
        lstar,
        cstar,
        sfmask,
        kernel_gs_base,
        sysenter_cs,
        sysenter_esp,
        sysenter_eip,
        tsc_aux,
        tsc_adjust,
        pat,
        misc_enable,
        spec_ctrl,
        debugctl,
        mtrr_def_type,
        mtrr_fixed,
        mtrr_variable,
        xss,
    } = msr;
    let system = [star, lstar, cstar, sfmask, kernel_gs_base, sysenter_cs, sysenter_esp, sysenter_eip];
    let more = [tsc_aux, tsc_adjust, pat, misc_enable, spec_ctrl, debugctl, mtrr_def_type, xss];
    system.into_iter().chain(more).try_for_each(|r| r.state(s))?;
    mtrr_fixed.state(s)?;
    mtrr_variable.state(s)
}

fn pointers(pointers: &mut FpuPointers, s: &mut StateStream<'_>) -> Walked {
    let FpuPointers { ip, dp, cs, ds, opcode } = pointers;
    ip.state(s)?;
    dp.state(s)?;
    cs.state(s)?;
    ds.state(s)?;
    opcode.state(s)
}

fn shadow(shadow: &mut Shadow, s: &mut StateStream<'_>) -> Walked {
    let mut n = *shadow as u8;
    n.state(s)?;
    *shadow = match n {
        0 => Shadow::None,
        1 => Shadow::Sti,
        2 => Shadow::MovSs,
        _ => return Err(StateError::Value("the interrupt shadow")),
    };
    Ok(())
}

/// What of a processor counts when two runs are compared: not which parts of the vector state are at their initial values, which the
/// host may say or not.
pub(super) fn comparable(cpu: &CpuState) -> CpuState {
    let mut cpu = cpu.clone();
    cpu.fpu.0[512..576].fill(0);
    cpu
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_register_comes_back() {
        let mut cpu = CpuState::reset(0);
        (cpu.gpr[3], cpu.rip, cpu.msr.lstar, cpu.fpu.0[200], cpu.fpu_pointers.opcode) = (1, 2, 3, 4, 5);
        (cpu.shadow, cpu.halted, cpu.instructions, cpu.seg[4].base) = (Shadow::Sti, true, 6, 7);
        let mut bytes = Vec::new();
        Registers(&mut cpu).state(&mut StateStream::save(&mut bytes)).expect("saved");
        let mut other = CpuState::reset(0);
        let mut s = StateStream::load(&bytes);
        Registers(&mut other).state(&mut s).and_then(|()| s.end()).expect("loaded");
        assert_eq!(cpu, other);
    }
}

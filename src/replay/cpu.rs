//! The processor's part of a machine's state.

use crate::run::{Calls, VcpuRunner};
use paravane_cpu::{Attention, CpuState, DescriptorTable, FpuPointers, FpuState, Msrs, Segment, Shadow};
use paravane_devices::{Snapshot, StateError, StateStream};

type Walked = Result<(), StateError>;

/// A processor: its registers, and what is asked of it.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct Processor {
    pub(super) cpu: CpuState,
    /// It received INIT and no start-up IPI since.
    waiting: bool,
    calls: Calls,
}

impl Processor {
    /// `runner` between two instructions.
    pub(super) fn of(runner: &VcpuRunner) -> Processor {
        let mut calls = runner.vcpu.calls();
        if runner.engine.nmi_waits() {
            calls.flags |= Attention::NMI;
        }
        Processor { cpu: runner.cpu.clone(), waiting: runner.waiting, calls }
    }

    /// `runner` becomes this one; its engine has to start over.
    pub(super) fn put(self, runner: &mut VcpuRunner) {
        let Processor { cpu, waiting, calls } = self;
        (runner.cpu, runner.waiting) = (cpu, waiting);
        runner.vcpu.set_calls(calls);
    }

    /// What of a processor counts when two runs are compared: not which parts of the vector state are at their initial values, which
    /// the host may say or not, nor when it looks at what the interrupt controllers offer.
    pub(super) fn comparable(&self) -> Processor {
        let mut one = self.clone();
        one.cpu.fpu.0[512..576].fill(0);
        one.calls.flags &= !Attention::INTERRUPT;
        one
    }
}

impl Snapshot for Processor {
    fn state(&mut self, s: &mut StateStream<'_>) -> Walked {
        let Processor { cpu, waiting, calls } = self;
        registers(cpu, s)?;
        s.field("waiting", waiting)?;
        s.field("calls", calls)
    }
}

/// Walks over `fields`, each under its name.
macro_rules! named {
    ($s:ident: $($field:ident),* $(,)?) => {
        $($s.field(stringify!($field), $field)?;)*
    };
}

fn registers(cpu: &mut CpuState, s: &mut StateStream<'_>) -> Walked {
    const GPR: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
        "r14", "r15",
    ];
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
    } = cpu;
    GPR.iter().zip(gpr).try_for_each(|(name, r)| s.field(name, r))?;
    named!(s: rip, rflags, cr0, cr2, cr3, cr4, efer, xcr0, instructions);
    for (name, segment) in ["es", "cs", "ss", "ds", "fs", "gs"].iter().zip(seg) {
        s.field(name, &mut Part(segment))?;
    }
    s.field("ldtr", &mut Part(ldtr))?;
    s.field("tr", &mut Part(tr))?;
    s.field("gdtr", &mut Part(gdtr))?;
    s.field("idtr", &mut Part(idtr))?;
    named!(s: dr, pdptes);
    s.field("msr", &mut Part(msr))?;
    s.field("fpu", &mut Part(fpu))?;
    s.field("fpu", &mut Part(fpu_pointers))?;
    named!(s: cpl);
    s.field("shadow", &mut Part(shadow))?;
    named!(s: halted, nmi_blocked, a20, ignne);
    if *cpl > 3 { Err(StateError::Value("CPL")) } else { Ok(()) }
}

/// A part of a processor, whose type is the processor's own.
struct Part<'a, T>(&'a mut T);

impl Snapshot for Part<'_, Segment> {
    fn state(&mut self, s: &mut StateStream<'_>) -> Walked {
        let Segment { base, limit, attributes, selector } = &mut *self.0;
        named!(s: base, limit, attributes, selector);
        Ok(())
    }
}

impl Snapshot for Part<'_, DescriptorTable> {
    fn state(&mut self, s: &mut StateStream<'_>) -> Walked {
        let DescriptorTable { base, limit } = &mut *self.0;
        named!(s: base, limit);
        Ok(())
    }
}

impl Snapshot for Part<'_, Msrs> {
    fn state(&mut self, s: &mut StateStream<'_>) -> Walked {
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
        } = &mut *self.0;
        named!(s: star, lstar, cstar, sfmask, kernel_gs_base, sysenter_cs, sysenter_esp, sysenter_eip);
        named!(s: tsc_aux, tsc_adjust, pat, misc_enable, spec_ctrl, debugctl, mtrr_def_type, xss);
        named!(s: mtrr_fixed, mtrr_variable);
        Ok(())
    }
}

/// The XSAVE image: the x87 registers and their environment, XMM, header, the upper halves of YMM (SDM 1, 13.4).
impl Snapshot for Part<'_, FpuState> {
    fn state(&mut self, s: &mut StateStream<'_>) -> Walked {
        let (environment, rest) = self.0.0.split_at_mut(32);
        let (st, rest) = rest.split_at_mut(8 * 16);
        let (xmm, rest) = rest.split_at_mut(16 * 16);
        let (header, ymmh) = rest.split_at_mut(160);
        s.field("environment", &mut Raw(environment))?;
        for (name, registers) in [("st", st), ("xmm", xmm)] {
            numbered(name, registers, s)?;
        }
        s.field("header", &mut Raw(header))?;
        numbered("ymmh", ymmh, s)
    }
}

fn numbered(name: &str, registers: &mut [u8], s: &mut StateStream<'_>) -> Walked {
    let mut each = registers.chunks_mut(16).enumerate();
    each.try_for_each(|(n, bytes)| s.field(format_args!("{name}{n}"), &mut Raw(bytes)))
}

/// Bytes that mean something together.
struct Raw<'a>(&'a mut [u8]);

impl Snapshot for Raw<'_> {
    fn state(&mut self, s: &mut StateStream<'_>) -> Walked {
        s.bytes(self.0)
    }
}

impl Snapshot for Part<'_, FpuPointers> {
    fn state(&mut self, s: &mut StateStream<'_>) -> Walked {
        let FpuPointers { ip, dp, cs, ds, opcode } = &mut *self.0;
        named!(s: ip, dp, cs, ds, opcode);
        Ok(())
    }
}

impl Snapshot for Part<'_, Shadow> {
    fn state(&mut self, s: &mut StateStream<'_>) -> Walked {
        let mut n = *self.0 as u8;
        n.state(s)?;
        *self.0 = match n {
            0 => Shadow::None,
            1 => Shadow::Sti,
            2 => Shadow::MovSs,
            _ => return Err(StateError::Value("the interrupt shadow")),
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::Vcpu;

    #[test]
    fn every_register_comes_back() {
        let mut cpu = CpuState::reset(0);
        (cpu.gpr[3], cpu.rip, cpu.msr.lstar, cpu.fpu.0[200], cpu.fpu_pointers.opcode) = (1, 2, 3, 4, 5);
        (cpu.shadow, cpu.halted, cpu.instructions, cpu.seg[4].base) = (Shadow::Sti, true, 6, 7);
        let calls = Vcpu::new();
        calls.start_up(0x9A);
        let mut one = Processor { cpu, waiting: true, calls: calls.calls() };
        let mut bytes = Vec::new();
        one.state(&mut StateStream::save(&mut bytes)).expect("saved");
        let mut other = Processor { cpu: CpuState::reset(0), waiting: false, calls: Calls::default() };
        let mut s = StateStream::load(&bytes);
        other.state(&mut s).and_then(|()| s.end()).expect("loaded");
        assert_eq!(one, other);
    }
}

//! What a processor does, told to whoever traces it.
//!
//! Events come from the core, which executes everything that is worth one: exceptions, interrupts, system instructions, device
//! accesses. Instructions and blocks are told where the core executes all of them (see [`Tracer::every_instruction`]).

use crate::bus::{CpuBus, CpuidResult, MsrFault};
use crate::core::instruction_address;
use crate::mmu::{Access, Flushes};
use crate::state::CpuState;
use paravane_memory::{PhysAddr, Port, VpIndex, Width};
use std::fmt;

/// Where a processor is.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct TraceContext {
    /// Which processor.
    pub vp: u32,
    /// Instructions it has retired.
    pub instructions: u64,
    /// Linear address of its instruction.
    pub rip: u64,
    /// Its privilege.
    pub cpl: u8,
    /// Its address space.
    pub cr3: u64,
    /// Its code's size: 16, 32 or 64.
    pub bits: u32,
}

impl TraceContext {
    /// Where `cpu` is.
    pub fn of(cpu: &CpuState) -> TraceContext {
        TraceContext {
            vp: cpu.vp,
            instructions: cpu.instructions,
            rip: instruction_address(cpu).0,
            cpl: cpu.cpl,
            cr3: cpu.cr3,
            bits: cpu.code_bits(),
        }
    }
}

/// What it does there.
#[derive(Clone, Copy, Debug)]
pub enum TraceEvent<'a> {
    /// It is about to execute this instruction.
    Instruction(&'a [u8]),
    /// It went on here out of sequence.
    Block,
    /// An exception is raised.
    Exception {
        /// Its vector.
        vector: u8,
        /// Its error code, if it has one.
        error: Option<u32>,
        /// The address of a page fault.
        address: Option<u64>,
    },
    /// An external interrupt or NMI is taken.
    Interrupt(u8),
    /// CR0, CR3, CR4 or CR8 has another value.
    Control(u8, u64),
    /// WRMSR.
    Msr(u32, u64),
    /// VMCALL or VMMCALL, with what is in RAX; whatever becomes of it.
    Hypercall(u64),
    /// Page tables were walked; to where.
    Walk {
        /// From this linear address.
        linear: u64,
        /// For this.
        access: Access,
        /// To this, if it is mapped.
        physical: Option<u64>,
    },
    /// Cached translations were invalidated.
    Flush(&'a Flushes),
    /// A port was accessed.
    Port {
        /// Which.
        port: u16,
        /// Bytes.
        size: u8,
        /// OUT.
        write: bool,
        /// What was read or written.
        value: u64,
    },
    /// A device's memory was accessed.
    Mmio {
        /// Where.
        at: u64,
        /// Bytes.
        size: u8,
        /// A store.
        write: bool,
        /// What was read or written.
        value: u64,
    },
}

/// Who traces.
pub trait Tracer: Send + Sync {
    /// Something happened; called on the processor's thread.
    fn event(&self, at: &TraceContext, event: TraceEvent<'_>);
    /// Every instruction is told, so none may be translated.
    fn every_instruction(&self) -> bool;
}

impl fmt::Debug for dyn Tracer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tracer")
    }
}

/// The bus, with every access told.
pub(crate) struct TracedBus<'a> {
    pub bus: &'a dyn CpuBus,
    pub tracer: &'a dyn Tracer,
    pub at: TraceContext,
}

impl TracedBus<'_> {
    fn port(&self, port: Port, size: usize, write: bool, value: u64) {
        self.tracer.event(&self.at, TraceEvent::Port { port: port.0, size: size as u8, write, value });
    }

    fn mmio(&self, at: PhysAddr, width: Width, write: bool, value: u64) {
        let size = width.bytes() as u8;
        self.tracer.event(&self.at, TraceEvent::Mmio { at: at.0, size, write, value: value & width.mask() });
    }

    /// A string access as the accesses it stands for.
    fn string(&self, port: Port, width: Width, write: bool, buf: &[u8]) {
        for unit in buf.chunks_exact(width.bytes()) {
            let value = unit.iter().rev().fold(0, |v, &b| v << 8 | u64::from(b));
            self.port(port, width.bytes(), write, value);
        }
    }
}

impl CpuBus for TracedBus<'_> {
    fn mmio_load(&self, vp: VpIndex, at: PhysAddr, width: Width) -> u64 {
        let value = self.bus.mmio_load(vp, at, width);
        self.mmio(at, width, false, value);
        value
    }

    fn mmio_store(&self, vp: VpIndex, at: PhysAddr, width: Width, value: u64) {
        self.mmio(at, width, true, value);
        self.bus.mmio_store(vp, at, width, value);
    }

    fn port_in(&self, vp: VpIndex, port: Port, width: Width) -> u32 {
        let value = self.bus.port_in(vp, port, width);
        self.port(port, width.bytes(), false, u64::from(value) & width.mask());
        value
    }

    fn port_out(&self, vp: VpIndex, port: Port, width: Width, value: u32) {
        self.port(port, width.bytes(), true, u64::from(value) & width.mask());
        self.bus.port_out(vp, port, width, value);
    }

    fn port_in_string(&self, vp: VpIndex, port: Port, width: Width, buf: &mut [u8]) -> usize {
        let n = self.bus.port_in_string(vp, port, width, buf);
        self.string(port, width, false, &buf[..n.min(buf.len())]);
        n
    }

    fn port_out_string(&self, vp: VpIndex, port: Port, width: Width, buf: &[u8]) -> usize {
        let n = self.bus.port_out_string(vp, port, width, buf);
        self.string(port, width, true, &buf[..n.min(buf.len())]);
        n
    }

    fn acknowledge(&self, vp: VpIndex) -> Option<u8> {
        self.bus.acknowledge(vp)
    }

    fn cpuid(&self, vp: VpIndex, leaf: u32, sub: u32) -> Option<CpuidResult> {
        self.bus.cpuid(vp, leaf, sub)
    }

    fn rdmsr(&self, vp: VpIndex, msr: u32) -> Result<u64, MsrFault> {
        self.bus.rdmsr(vp, msr)
    }

    fn wrmsr(&self, vp: VpIndex, msr: u32, value: u64) -> Result<(), MsrFault> {
        self.bus.wrmsr(vp, msr, value)
    }

    fn read_cr8(&self, vp: VpIndex) -> u64 {
        self.bus.read_cr8(vp)
    }

    fn write_cr8(&self, vp: VpIndex, value: u64) {
        self.tracer.event(&self.at, TraceEvent::Control(8, value));
        self.bus.write_cr8(vp, value);
    }

    fn tsc(&self, vp: VpIndex) -> u64 {
        self.bus.tsc(vp)
    }

    fn set_ferr(&self, vp: VpIndex, up: bool) {
        self.bus.set_ferr(vp, up);
    }

    fn ignne(&self, vp: VpIndex) -> bool {
        self.bus.ignne(vp)
    }
}

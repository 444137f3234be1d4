//! What an instruction may do to memory, the stack and segment registers: the contract between the stepping
//! core and instruction semantics (SDM 3A, chapters 3 to 5).

use crate::bus::CpuBus;
use crate::cpuid::CpuModel;
use crate::engine::{Attention, VectorUnit};
use crate::fault::Fault;
use crate::mmu::{Flushes, Tlb};
use crate::state::{CpuState, LinAddr, SegReg};
use paravane_memory::{GuestMemory, RamOffset, VpIndex};

/// What an instruction asks of the core beyond its architectural effects.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Outcome {
    /// Nothing: go on.
    #[default]
    Done,
    /// HLT was executed.
    Halt,
    /// No engine implements the instruction.
    Unsupported,
}

/// One instruction in progress.
pub(crate) struct Exec<'a> {
    pub cpu: &'a mut CpuState,
    pub mem: &'a GuestMemory,
    pub bus: &'a dyn CpuBus,
    pub vp: VpIndex,
    pub model: &'a CpuModel,
    pub attention: &'a Attention,
    pub tlb: &'a mut Tlb,
    pub vector: &'a mut dyn VectorUnit,
    /// RIP after the current instruction; branches overwrite it. A REP that stopped early sets it to `cpu.rip`.
    pub next_rip: u64,
    pub flushes: &'a mut Flushes,
    pub outcome: Outcome,
    /// DR6 bits of breakpoints hit by this instruction: a `#DB` trap after it.
    pub debug_hits: u64,
}

#[allow(unused_variables, dead_code)]
impl Exec<'_> {
    pub fn load(&mut self, seg: SegReg, offset: u64, size: usize) -> Result<u64, Fault> { Err(Fault::UD) }
    pub fn store(&mut self, seg: SegReg, offset: u64, size: usize, value: u64) -> Result<(), Fault> { Err(Fault::UD) }
    pub fn load_bytes(&mut self, seg: SegReg, offset: u64, buf: &mut [u8]) -> Result<(), Fault> { Err(Fault::UD) }
    pub fn store_bytes(&mut self, seg: SegReg, offset: u64, buf: &[u8]) -> Result<(), Fault> { Err(Fault::UD) }
    pub fn probe_write(&mut self, seg: SegReg, offset: u64, size: usize) -> Result<(), Fault> { Err(Fault::UD) }
    pub fn rmw(&mut self, seg: SegReg, offset: u64, size: usize, locked: bool, f: &mut dyn FnMut(u64) -> u64) -> Result<u64, Fault> { Err(Fault::UD) }
    pub fn rmw16b(&mut self, seg: SegReg, offset: u64, f: &mut dyn FnMut(u128) -> Option<u128>) -> Result<u128, Fault> { Err(Fault::UD) }
    pub fn linear(&self, seg: SegReg, offset: u64, size: usize, write: bool) -> Result<LinAddr, Fault> { Err(Fault::UD) }
    pub fn span(&mut self, lin: LinAddr, write: bool) -> Result<Option<(RamOffset, u64)>, Fault> { Err(Fault::UD) }
    pub fn push(&mut self, size: usize, value: u64) -> Result<(), Fault> { Err(Fault::UD) }
    pub fn pop(&mut self, size: usize) -> Result<u64, Fault> { Err(Fault::UD) }
    pub fn set_seg(&mut self, seg: SegReg, selector: u16) -> Result<(), Fault> { Err(Fault::UD) }
    pub fn stack_mask(&self) -> u64 { 0 }
    pub fn check_io(&mut self, port: u16, size: usize) -> Result<(), Fault> { Err(Fault::UD) }
}

//! What executes guest instructions: the interpreter and the translator behind one trait.

use crate::bus::CpuBus;
use crate::fault::Fault;
use crate::plan::{DebugPlan, DebugStop};
use crate::post_mortem::PostMortem;
use crate::state::{CpuState, FpuState};
use crate::trace::Tracer;
use paravane_memory::{GuestMemory, RamOffset, VpIndex};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Per-vCPU flags that ask it to leave guest code at the next poll; set by any thread, taken by the vCPU.
#[derive(Clone, Debug, Default)]
pub struct Attention(Arc<AtomicU32>);

impl Attention {
    /// The interrupt controllers may have something for this vCPU.
    pub const INTERRUPT: u32 = 1;
    /// A non-maskable interrupt is pending.
    pub const NMI: u32 = 2;
    /// Pages with translated code were written from outside.
    pub const CODE_WRITTEN: u32 = 4;
    /// The machine wants the vCPU to return (pause, reset, power-off, debugger).
    pub const STOP: u32 = 8;
    /// The physical memory layout changed: drop cached translations.
    pub const LAYOUT: u32 = 16;
    /// INIT was received.
    pub const INIT: u32 = 32;
    /// An SMI-free machine has no SMM; reserved for start-up IPIs.
    pub const STARTUP: u32 = 64;

    /// Sets `flags`.
    pub fn set(&self, flags: u32) {
        self.0.fetch_or(flags, Ordering::SeqCst);
    }

    /// Clears `flags` and returns those that were set.
    pub fn take(&self, flags: u32) -> u32 {
        self.0.fetch_and(!flags, Ordering::SeqCst) & flags
    }

    /// The flags now; zero almost always.
    #[inline]
    pub fn get(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }

    /// The cell itself, for translated code that polls it.
    pub fn cell(&self) -> &AtomicU32 {
        &self.0
    }
}

/// How far `Engine::run` may go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Budget {
    /// Retired instructions after which to return [`Exit::Budget`]; `u64::MAX` for no limit. Where it is not
    /// `u64::MAX` the engine stops exactly there.
    pub instructions: u64,
}

impl Budget {
    /// No limit.
    pub const UNLIMITED: Budget = Budget { instructions: u64::MAX };
}

/// Why `Engine::run` returned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exit {
    /// `HLT` with nothing to do: wait for attention. RIP is after the HLT and `CpuState::halted` is set.
    Halt,
    /// The instruction budget is used up.
    Budget,
    /// [`Attention::STOP`] (or INIT, STARTUP) was seen; it is left set.
    Stop,
    /// Shutdown: a fault while delivering a double fault. The state is as it was then.
    TripleFault,
    /// An instruction no engine implements, named by `CpuState::rip`; never a silent skip.
    Unsupported,
    /// The debugger's plan asked for it.
    Debug(DebugStop),
}

/// Executes guest instructions on one vCPU.
pub trait Engine: Send {
    /// Runs until something needs the machine. Interrupts are acknowledged and delivered inside.
    fn run(&mut self, cpu: &mut CpuState, mem: &GuestMemory, bus: &dyn CpuBus, budget: Budget) -> Exit;
    /// Executes one instruction, all of a REP, whatever breakpoints are armed, and delivers what it raises. With
    /// `interrupts` (or while halted) a pending interrupt is taken first, and taking it is the step. [`Exit::Budget`]: done.
    fn step(&mut self, cpu: &mut CpuState, mem: &GuestMemory, bus: &dyn CpuBus, interrupts: bool) -> Exit;
    /// Stops where `plan` says from now on, in place of what was asked for before.
    fn set_debug(&mut self, plan: &Arc<DebugPlan>);
    /// Forgets everything derived from the page of guest memory holding `page`.
    fn invalidate(&mut self, page: RamOffset);
    /// Forgets every cached address translation (layout change, state loaded from outside).
    fn flush_translations(&mut self);
    /// The processor received INIT: cached translations and interrupts that waited are forgotten.
    fn reset(&mut self);
    /// How the processor came to where it is.
    fn post_mortem(&self) -> PostMortem;
    /// Values of the engine's counters by name.
    fn counters(&self) -> Vec<(String, u64)>;
    /// What the newest block that begins at linear address `lin`, or else has an instruction there, was translated to,
    /// instruction by instruction; empty where there is none, as always in the interpreter.
    fn host_code(&self, lin: u64) -> Vec<HostCode>;
    /// Goes on from `cpu` as an engine would that has run nothing before: what was cached of translations and address spaces is
    /// forgotten, and interrupts that were set aside are back in the attention word. Between two instructions only.
    fn start_over(&mut self, cpu: &CpuState);
    /// Tells `tracer` what happens from now on; nobody, if that is `None`. Between two instructions only.
    fn set_tracer(&mut self, tracer: Option<Arc<dyn Tracer>>);
    /// An NMI was received and not taken yet.
    fn nmi_waits(&self) -> bool;
}

/// Host code of one guest instruction, of a block's entry, or of what a block seldom does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HostCode {
    /// Linear address of the guest instruction; `None` for what comes before the block's first, and for what lies apart.
    pub guest: Option<u64>,
    /// Lies apart from the block: misses and exits.
    pub cold: bool,
    /// Where the code is.
    pub host: u64,
    /// x86-64 machine code.
    pub bytes: Vec<u8>,
}

/// Runs x87, MMX, SSE and AVX instructions on the host's own units, for the interpreter.
pub trait VectorUnit: Send {
    /// Executes one instruction. `code` holds exactly one instruction in 64-bit encoding. A memory operand, if it has
    /// one, is `[rax]` without segment override, and RAX holds the address of `operand` then, whose bytes are the
    /// operand's; without one RAX is a register like the others. `code` never names RSP.
    ///
    /// Before, all of `gpr` except RSP (and RAX beside a memory operand), the six status flags of `rflags` and
    /// `fpu` are loaded; after, they are written back, and `operand` holds what a store left there (bytes it did not
    /// write are as they were). `Err` is the exception the host raised (`#MF`, `#XM`, `#UD`, `#DE`); then `gpr`,
    /// `rflags` and `operand` are as before, MXCSR has its flags.
    ///
    /// The contents of `fpu` always count, whatever the XSTATE_BV of its header says; FIP, FDP and FOP are zero.
    fn execute(
        &mut self,
        code: &[u8],
        fpu: &mut FpuState,
        gpr: &mut [u64; 16],
        rflags: &mut u64,
        operand: &mut [u8; 512],
    ) -> Result<(), Fault>;
    /// Brings `fpu` up to date if the live state is in host registers.
    fn sync(&mut self, fpu: &mut FpuState, vp: VpIndex);
    /// `fpu` was changed in memory: live copies in host registers are stale.
    fn changed(&mut self, fpu: &FpuState, vp: VpIndex);
}

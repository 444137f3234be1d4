//! The translator as an [`Engine`]: finds or makes the block at RIP, runs it, and deals with why it came back.
//!
//! The guest's registers live in the [`JitContext`] between runs of translated code and are copied to the
//! [`CpuState`] only when the interpreter core or the machine must see them.
//!
//! Invariants this unsafe island (this module and those below it) relies on:
//! * `context` points into `_stack` and lives as long as the translator;
//! * `running` is set exactly while translated code may run on this thread, or while [`fill`] stands in for it; the miss
//!   helper and the fault callback reach the translator and the `CpuState` through raw pointers only then, when `run` holds
//!   no other borrow of them.

mod blocks;
mod copies;
mod debug;
mod fill;
mod level;
mod rebase;
mod run;
mod stats;
mod traces;
mod way;
mod window;

use crate::block::{BlockId, BlockTable};
use crate::classify::Forms;
use crate::code_cache::CodeCache;
use crate::context::{ContextStack, JitContext};
use crate::delta::DeltaTables;
use crate::emit::Emitter;
use crate::frontend::Frontend;
use crate::host::HostVectorUnit;
use crate::pages::CodePages;
use crate::perf_map::PerfMap;
use crate::segments::CodeSegments;
use crate::signal;
use crate::spaces::Spaces;
use crate::stubs::{self, Stubs};
use crate::vectors::LiveVectors;
use crate::windows::Windows;
use copies::PageCopies;
use fill::{Writers, miss_helper};
use level::Returns;
use paravane_cpu::{
    Attention, Budget, Core, CpuBus, CpuModel, CpuState, DebugPlan, DescriptorTable, Engine, Exit, Flushes,
    HostCode, PostMortem, Shadow, Step, Tracer, flags,
};
use paravane_memory::{Claims, CodeWatcher, GuestMemory, MAX_TRANSLATORS, PAGE_SHIFT, RamOffset, VpIndex};
use run::Rest;
use stats::Stats;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use traces::Recorder;
use window::Candidates;

/// What the user may choose about the translator.
#[derive(Clone, Debug)]
pub struct JitOptions {
    /// Bytes of code cache.
    pub code_cache: usize,
    /// Count retired instructions in translated code.
    pub count_instructions: bool,
    /// The guest's time-stamp counter is the host's minus this (before IA32_TSC_ADJUST), so that RDTSC can be translated.
    pub tsc_base: Option<Arc<AtomicU64>>,
    /// Return from every block: for comparing engines block by block.
    pub single_blocks: bool,
    /// How often a loop is closed before it is translated once more, as a trace.
    pub hot_loop: u32,
    /// How often a program is found running, by polls, before its address space gets a window (see `windows`); 0: at once;
    /// [`u32::MAX`]: never.
    pub window_after: u32,
    /// Translators in this process, one for each vCPU: they share the host's address space and the number of mappings it
    /// allows.
    pub vcpus: usize,
    /// Tell `perf` where translated code is (see [`crate::perf_map`]).
    pub perf_map: bool,
}

impl Default for JitOptions {
    fn default() -> JitOptions {
        JitOptions {
            code_cache: 32 << 20,
            count_instructions: false,
            tsc_base: None,
            single_blocks: false,
            hot_loop: 1_000,
            window_after: 1,
            vcpus: 1,
            perf_map: false,
        }
    }
}

/// Gets the vCPU's attention for notices.
struct Watcher(Attention);

impl CodeWatcher for Watcher {
    fn code_written(&self) {
        self.0.set(Attention::CODE_WRITTEN);
    }
}

/// The binary translator of one vCPU.
pub struct Translator {
    core: Core,
    attention: Attention,
    mem: GuestMemory,
    /// What this vCPU holds of it.
    claims: Claims,
    cache: CodeCache,
    stubs: Stubs,
    delta: DeltaTables,
    /// Owns what `context` points to.
    _stack: ContextStack,
    context: *mut JitContext,
    forms: Forms,
    emitter: Emitter,
    frontend: Frontend,
    blocks: BlockTable,
    pages: CodePages,
    segments: CodeSegments,
    spaces: Spaces,
    windows: Windows,
    candidates: Candidates,
    returns: Returns,
    /// Room for what the core wants forgotten.
    flushes: Flushes,
    writers: Vec<Writers>,
    options: JitOptions,
    stats: Stats,
    /// Interpreted instructions by mnemonic.
    interpreted: Box<[u64]>,
    layout_generation: u64,
    /// The processor state while translated code runs; null otherwise.
    running: *mut CpuState,
    /// The last exit was a host fault that an unaligned access to a poisoned page explains.
    poison_hit: bool,
    /// An interrupt was signalled but could not be taken yet.
    interrupt_pending: bool,
    /// An NMI likewise.
    nmi_pending: bool,
    /// Retired instructions at which `run` returns; `u64::MAX` for no limit.
    limit: u64,
    /// A tracer wants every instruction.
    interprets_all: bool,
    /// Less is left than the next block needs: the interpreter runs the rest.
    budget_short: bool,
    perf_map: Option<PerfMap>,
    /// Room for the blocks that a write takes.
    taken: Vec<BlockId>,
    /// Room for the links of a block that moves.
    relinked: Vec<u32>,
    /// A loop became hot: the path through it is being found.
    recorder: Option<Recorder>,
    copies: PageCopies,
}

// SAFETY: the raw pointers point into values owned by the translator, or are null while it may move.
unsafe impl Send for Translator {}

impl Translator {
    /// A translator for vCPU `vp` of the given model.
    pub fn new(
        model: CpuModel,
        mem: &GuestMemory,
        attention: Attention,
        vp: VpIndex,
        options: JitOptions,
    ) -> io::Result<Translator> {
        if !std::is_x86_feature_detected!("bmi2") || !std::is_x86_feature_detected!("avx") {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the translator needs a host CPU with BMI2 and AVX; use --engine interp",
            ));
        }
        let watcher = Box::new(Watcher(attention.clone()));
        let claims = mem.claims(watcher).ok_or_else(|| {
            io::Error::other(format!("the translator serves {MAX_TRANSLATORS} processors at most"))
        })?;
        signal::install();
        let mut stack = ContextStack::new()?;
        let context = stack.context();
        let mut cache = CodeCache::new(options.code_cache.clamp(1 << 20, 1 << 30))?;
        let stubs = stubs::emit(&mut cache, miss_helper);
        let vectors = LiveVectors::new(context, HostVectorUnit::new()?);
        let delta = DeltaTables::for_one_of(options.vcpus)?;
        let pages = CodePages::new(delta.spaces());
        let spaces = Spaces::new(delta.spaces());
        let windows = Windows::new(delta.spaces(), u64::from(vp.0), options.vcpus, mem.backing_file())?;
        let candidates = Candidates::new(delta.spaces());
        // SAFETY: freshly mapped zeroed memory of the right size and alignment; all-zero is a valid context.
        unsafe { (*context).mxcsr = 0x1F80 };
        let mut translator = Translator {
            core: Core::new(model.clone(), Box::new(vectors), attention.clone(), vp),
            attention,
            mem: mem.clone(),
            claims,
            stubs,
            delta,
            _stack: stack,
            context,
            forms: Forms::new(model),
            emitter: Emitter::new(stubs),
            frontend: Frontend::default(),
            blocks: BlockTable::default(),
            pages,
            segments: CodeSegments::new(),
            spaces,
            windows,
            candidates,
            returns: Returns::default(),
            flushes: Flushes::default(),
            interprets_all: false,
            writers: vec![[0; 2]; (mem.backing_len() >> PAGE_SHIFT) as usize],
            perf_map: options.perf_map.then(PerfMap::open).transpose()?,
            options,
            stats: Stats::default(),
            interpreted: vec![0; iced_x86::Mnemonic::values().len()].into(),
            layout_generation: mem.layout_generation(),
            running: std::ptr::null_mut(),
            poison_hit: false,
            interrupt_pending: false,
            nmi_pending: false,
            limit: u64::MAX,
            budget_short: false,
            taken: Vec::new(),
            relinked: Vec::new(),
            recorder: None,
            copies: PageCopies::new(),
            cache,
        };
        translator.map_stubs();
        translator.forget_returns(DescriptorTable::default());
        Ok(translator)
    }

    fn context(&mut self) -> &mut JitContext {
        // SAFETY: by the module's invariant; `&mut self` keeps other users away.
        unsafe { &mut *self.context }
    }
}

/// Whether bits 63–47 are all equal.
fn canonical(lin: u64) -> bool {
    ((lin << 16) as i64 >> 16) as u64 == lin
}

impl Engine for Translator {
    fn run(&mut self, cpu: &mut CpuState, _mem: &GuestMemory, bus: &dyn CpuBus, budget: Budget) -> Exit {
        if self.begin(cpu).is_err() {
            return Exit::Unsupported;
        }
        self.limit = cpu.instructions.saturating_add(budget.instructions);
        self.budget_short = false;
        let exit = loop {
            if self.attention.get() != 0
                && let Some(exit) = self.attend()
            {
                break exit;
            }
            let open = cpu.shadow == Shadow::None;
            let interrupt = self.interrupt_pending && cpu.rflags & flags::IF != 0;
            let nmi = self.nmi_pending && !cpu.nmi_blocked;
            if open && (interrupt || nmi) {
                match self.interrupts(cpu, bus) {
                    Step::TripleFault => break Exit::TripleFault,
                    Step::Unsupported => break Exit::Unsupported,
                    Step::Done | Step::Halt => {}
                }
            }
            if cpu.halted {
                break Exit::Halt;
            }
            if self.budgeted() && cpu.instructions >= self.limit {
                break Exit::Budget;
            }
            self.settle_window(cpu);
            let rest = match self.mode(cpu) {
                Some(mode) if !self.budget_short => self.run_translated(cpu, mode),
                _ => Rest::Interpret,
            };
            let step = match rest {
                Rest::Nothing => Step::Done,
                Rest::Again => continue,
                Rest::Raise(fault) => self.raise(cpu, bus, fault),
                // A budget may end exactly where the interpreter takes over.
                Rest::Interpret if cpu.instructions >= self.limit => Step::Done,
                Rest::Interpret => {
                    if let Some(stop) = self.core.breakpoint(cpu, &self.mem) {
                        break Exit::Debug(stop);
                    }
                    self.interpret(cpu, bus)
                }
            };
            match step {
                Step::Done | Step::Halt => {}
                Step::TripleFault => break Exit::TripleFault,
                Step::Unsupported => break Exit::Unsupported,
            }
            if let Some(stop) = self.core.take_hit() {
                break Exit::Debug(stop);
            }
            if self.options.single_blocks && !cpu.halted {
                break Exit::Budget;
            }
        };
        self.end(cpu);
        exit
    }

    fn step(&mut self, cpu: &mut CpuState, _mem: &GuestMemory, bus: &dyn CpuBus, interrupts: bool) -> Exit {
        self.single_step(cpu, bus, interrupts)
    }

    fn set_debug(&mut self, plan: &Arc<DebugPlan>) {
        self.follow_plan(plan);
    }

    fn invalidate(&mut self, page: RamOffset) {
        self.invalidate_page(page);
    }

    fn flush_translations(&mut self) {
        self.flush(false);
        self.core.flush_translations();
    }

    fn reset(&mut self) {
        (self.interrupt_pending, self.nmi_pending) = (false, false);
        self.attention.take(Attention::NMI | Attention::INTERRUPT);
        self.flush_translations();
    }

    fn post_mortem(&self) -> PostMortem {
        self.core.post_mortem_with(|from, to| self.way_between(from, to))
    }

    fn host_code(&self, lin: u64) -> Vec<HostCode> {
        let live = || self.blocks.blocks.iter().rev().filter(|b| b.live);
        let begins = live().find(|b| b.key.linear() == lin);
        let block = begins.or_else(|| live().find(|b| self.blocks.has_instruction(b, lin)));
        block.map(|block| self.listing(block)).unwrap_or_default()
    }

    /// A page that was filled before is accessed without a walk: walks are told where translations are remembered anew.
    fn set_tracer(&mut self, tracer: Option<Arc<dyn Tracer>>) {
        self.interprets_all = tracer.as_ref().is_some_and(|t| t.every_instruction());
        self.core.set_tracer(tracer);
    }

    fn nmi_waits(&self) -> bool {
        self.nmi_pending || self.attention.get() & Attention::NMI != 0
    }

    fn start_over(&mut self, cpu: &CpuState) {
        if std::mem::take(&mut self.interrupt_pending) {
            self.attention.set(Attention::INTERRUPT);
        }
        if std::mem::take(&mut self.nmi_pending) {
            self.attention.set(Attention::NMI);
        }
        self.core.start_over();
        self.forget_windows();
        self.flush(false);
        self.claims.release_all_writing();
        self.spaces = Spaces::new(self.delta.spaces());
        self.switch_space(cpu.pcid());
    }

    fn counters(&self) -> Vec<(String, u64)> {
        self.collect_counters()
    }
}

//! Processors in 64-bit mode over one memory, each on a thread.
//!
//! ```text
//! 1000-C000 page tables   2_0000 GDT   10_0000 code   20_0000 data   100_0000 the end; mapped one to one by 4 KiB pages
//! ```
//!
//! Invariant of the unsafe lines: a program is the read-only bytes between two labels that the assembler put
//! into one section; the tests only copy them into the guest's memory.

use paravane_cpu::{
    Attention, Budget, CpuBus, CpuState, CpuidResult, DescriptorTable, Engine, Exit, HostFeatures,
    Interpreter, MsrFault, SegReg, Segment, cr0, cr4, efer, gpr, model_by_name,
};
use paravane_jit::{HostVectorUnit, JitOptions, Translator};
use paravane_memory::{GuestMemory, MemoryConfig, PhysAddr, Port, VpIndex, Width};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub const CODE: u64 = 0x10_0000;
pub const DATA: u64 = 0x20_0000;
/// Counts those who are ready to race.
const START: u64 = 0x1F_0000;
/// Page tables of the lowest 16 MiB, in order.
pub const PT: u64 = 0x4000;
/// Code and data of 64-bit mode, then room for tests.
pub const GDT: u64 = 0x2_0000;
pub const DESCRIPTORS: u64 = 4096;
const MAPPED: u64 = 16 << 20;
/// Where each processor's stack ends.
const STACKS: u64 = 0xF0_0000;

/// Machine code assembled into this binary; HLT stands behind it.
///
/// `meet CELL, VALUE, JUMP` in it waits until the jump would be taken after a comparison of the two, and lets other host
/// threads run if that takes long; it overwrites R11.
macro_rules! program {
    ($($line:literal),* $(,)?) => {{
        let (start, end): (usize, usize);
        // SAFETY: only takes the addresses of two labels in the read-only data.
        unsafe {
            std::arch::asm!(
                ".macro meet cell, value, jump",
                "mov r11d, 300",
                "771: pause",
                "cmp \\cell, \\value",
                "\\jump 773f",
                "dec r11d",
                "jnz 771b",
                "out 0x80, al",
                "mov r11d, 300",
                "jmp 771b",
                "773:",
                ".endm",
                ".pushsection .rodata", "770:", $($line,)* "hlt", "772:", ".popsection",
                ".purgem meet",
                "lea {start}, [rip + 770b]", "lea {end}, [rip + 772b]",
                start = out(reg) start, end = out(reg) end,
                options(nomem, nostack, preserves_flags),
            );
        }
        // SAFETY: the labels bound bytes that were assembled in one piece and never change.
        unsafe { std::slice::from_raw_parts(start as *const u8, end - start) }
    }};
}

/// A program for [`Bed::race`]: it begins when all are there.
macro_rules! racer {
    ($($line:literal),* $(,)?) => {
        program!("lock inc dword ptr [r8]", "meet [r8], ebp, jae", $($line,)*)
    };
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Translator,
    Interpreter,
}

pub use Kind::{Interpreter as I, Translator as T};

/// A machine without devices; any port lets other host threads run.
struct Nothing;

impl CpuBus for Nothing {
    fn mmio_load(&self, _: VpIndex, _: PhysAddr, width: Width) -> u64 {
        width.mask()
    }
    fn mmio_store(&self, _: VpIndex, _: PhysAddr, _: Width, _: u64) {}
    fn port_in(&self, _: VpIndex, _: Port, _: Width) -> u32 {
        0
    }
    fn port_out(&self, _: VpIndex, _: Port, _: Width, _: u32) {
        std::thread::yield_now();
    }
    fn acknowledge(&self, _: VpIndex) -> Option<u8> {
        None
    }
    fn cpuid(&self, _: VpIndex, _: u32, _: u32) -> Option<CpuidResult> {
        None
    }
    fn rdmsr(&self, _: VpIndex, _: u32) -> Result<u64, MsrFault> {
        Err(MsrFault)
    }
    fn wrmsr(&self, _: VpIndex, _: u32, _: u64) -> Result<(), MsrFault> {
        Err(MsrFault)
    }
    fn read_cr8(&self, _: VpIndex) -> u64 {
        0
    }
    fn write_cr8(&self, _: VpIndex, _: u64) {}
    fn tsc(&self, _: VpIndex) -> u64 {
        0
    }
    fn set_ferr(&self, _: VpIndex, _: bool) {}
    fn ignne(&self, _: VpIndex) -> bool {
        false
    }
}

/// Tests take turns: their processors need the host's.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

struct Processor {
    engine: Box<dyn Engine>,
    attention: Attention,
}

/// The machine.
pub struct Bed {
    pub mem: GuestMemory,
    processors: Vec<Processor>,
    _alone: MutexGuard<'static, ()>,
}

/// What one processor does: a program and its registers.
#[derive(Clone)]
pub struct Job {
    pub code: u64,
    pub gpr: Vec<(usize, u64)>,
}

impl Bed {
    pub fn new(kinds: &[Kind]) -> Bed {
        let mem = GuestMemory::new(MemoryConfig::pc(MAPPED)).expect("memory");
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bed = Bed { mem, processors: Vec::new(), _alone: alone };
        bed.put64(0x1000, 0x2007);
        bed.put64(0x2000, 0x3007);
        for table in 0..MAPPED >> 21 {
            bed.put64(0x3000 + table * 8, (PT + table * 0x1000) | 7);
        }
        for page in 0..MAPPED >> 12 {
            bed.map(page << 12, page << 12);
        }
        bed.put64(GDT + 8, 0x00AF_9B00_0000_FFFF);
        bed.put64(GDT + 16, 0x00CF_9300_0000_FFFF);
        bed.processors =
            kinds.iter().enumerate().map(|(n, &kind)| bed.processor(n as u32, kind, kinds.len())).collect();
        bed
    }

    fn processor(&self, n: u32, kind: Kind, count: usize) -> Processor {
        let model = model_by_name("max", &HostFeatures::detect()).expect("max");
        let (attention, vp) = (Attention::default(), VpIndex(n));
        let engine: Box<dyn Engine> = match kind {
            Kind::Translator => {
                let options = JitOptions {
                    code_cache: 4 << 20,
                    vcpus: count,
                    window_after: 0,
                    ..JitOptions::default()
                };
                let jit = Translator::new(model, &self.mem, attention.clone(), vp, options);
                Box::new(jit.expect("translator"))
            }
            Kind::Interpreter => {
                let vector = Box::new(HostVectorUnit::new().expect("vector unit"));
                Box::new(Interpreter::new(model, vector, attention.clone(), vp))
            }
        };
        Processor { engine, attention }
    }

    // ---- memory -------------------------------------------------------------------------------------------

    pub fn put(&self, at: u64, bytes: &[u8]) {
        self.mem.write(PhysAddr(at), bytes).expect("RAM");
    }

    pub fn put64(&self, at: u64, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    pub fn get64(&self, at: u64) -> u64 {
        self.mem.read_u64(PhysAddr(at)).expect("RAM")
    }

    pub fn get32(&self, at: u64) -> u32 {
        self.mem.read_u32(PhysAddr(at)).expect("RAM")
    }

    pub fn zero(&self, at: u64, len: u64) {
        self.mem.fill(PhysAddr(at), 0, len).expect("RAM");
    }

    /// Address of the entry that maps linear `at`.
    pub fn pte(at: u64) -> u64 {
        PT + (at >> 12) * 8
    }

    /// Maps the page at `at` to `phys`, present, writable, not accessed.
    pub fn map(&self, at: u64, phys: u64) {
        self.put64(Bed::pte(at), phys | 7);
    }

    /// Puts a program at `at` and returns what runs it.
    pub fn job(&self, at: u64, program: &[u8], gpr: &[(usize, u64)]) -> Job {
        self.put(at, program);
        Job { code: at, gpr: gpr.to_vec() }
    }

    // ---- running ------------------------------------------------------------------------------------------

    /// Runs a job on each processor, all at once, to HLT; the states they end in. Panics after a minute.
    pub fn run(&mut self, jobs: &[Job]) -> Vec<CpuState> {
        assert_eq!(jobs.len(), self.processors.len());
        let attentions: Vec<_> = self.processors.iter().map(|p| p.attention.clone()).collect();
        let (mem, over) = (&self.mem, AtomicBool::new(false));
        std::thread::scope(|s| {
            let dog = s.spawn(|| watch(&over, &attentions));
            let threads: Vec<_> = self
                .processors
                .iter_mut()
                .zip(jobs)
                .enumerate()
                .map(|(n, (p, job))| s.spawn(move || p.run(mem, state(n, job))))
                .collect();
            let ends: Vec<_> = threads.into_iter().map(|t| t.join().expect("a processor's thread")).collect();
            over.store(true, Ordering::SeqCst);
            dog.thread().unpark();
            ends.into_iter()
                .enumerate()
                .map(|(n, (exit, cpu))| {
                    assert_eq!(exit, Exit::Halt, "processor {n} at {:#x}", cpu.rip);
                    cpu
                })
                .collect()
        })
    }

    /// [`Self::run`] of programs that wait for each other at their beginning, with R8 and RBP.
    pub fn race(&mut self, jobs: &[Job]) -> Vec<CpuState> {
        self.put64(START, 0);
        let mut jobs = jobs.to_vec();
        let count = jobs.len() as u64;
        jobs.iter_mut().for_each(|job| job.gpr.extend([(8, START), (gpr::RBP, count)]));
        self.run(&jobs)
    }

    /// Sum of a counter over all processors.
    pub fn counter(&self, name: &str) -> u64 {
        let all = self.processors.iter().flat_map(|p| p.engine.counters());
        all.filter(|(n, _)| n == name).map(|(_, v)| v).sum()
    }
}

impl Processor {
    fn run(&mut self, mem: &GuestMemory, mut cpu: CpuState) -> (Exit, CpuState) {
        let exit = self.engine.run(&mut cpu, mem, &Nothing, Budget::UNLIMITED);
        (exit, cpu)
    }
}

/// Stops everybody when a run takes too long.
fn watch(over: &AtomicBool, attentions: &[Attention]) {
    let patience = Instant::now() + Duration::from_secs(60) + 2 * time();
    while !over.load(Ordering::SeqCst) {
        std::thread::park_timeout(Duration::from_secs(1));
        if Instant::now() > patience {
            attentions.iter().for_each(|a| a.set(Attention::STOP));
        }
    }
}

fn state(n: usize, job: &Job) -> CpuState {
    let mut c = CpuState::reset(n as u32);
    c.cr0 = cr0::PE | cr0::PG | cr0::NE | cr0::WP | cr0::ET | cr0::MP;
    c.cr3 = 0x1000;
    c.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
    c.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
    c.seg = [Segment::flat(0x10, 0xC093); 6];
    c.seg[SegReg::Cs as usize] = Segment::flat(8, 0xA09B);
    c.gdtr = DescriptorTable { base: GDT, limit: (DESCRIPTORS * 8 - 1) as u16 };
    c.idtr = DescriptorTable { base: 0, limit: 0 };
    c.rip = job.code;
    c.gpr[gpr::RSP] = STACKS - n as u64 * 0x1_0000;
    for &(r, value) in &job.gpr {
        c.gpr[r] = value;
    }
    c
}

/// How long a test that counts rounds may go on.
pub fn time() -> Duration {
    let seconds = std::env::var("PARAVANE_SMP_SECONDS").ok().and_then(|s| s.parse().ok());
    seconds.map_or(Duration::from_millis(60), Duration::from_secs)
}

/// Calls `round` until the time is over, or `enough`; at least once. How often.
pub fn rounds(enough: impl Fn() -> bool, mut round: impl FnMut()) -> u64 {
    let (start, time) = (Instant::now(), time());
    let mut n = 0;
    while n == 0 || (start.elapsed() < time && !enough()) {
        round();
        n += 1;
    }
    n
}

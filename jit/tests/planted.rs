//! The oracle notices: whatever an engine leaves wrong, one bit of anything, is a finding, alone and in programs.
//!
//! Invariant of the unsafe lines: emitted code is changed only between two runs of its engine, on the thread that runs it,
//! one opcode byte into another that an instruction may have there.

use iced_x86::Code;
use paravane_cpu::{
    Attention, Budget, CpuBus, CpuState, DebugPlan, Engine, Exit, HostCode, HostFeatures, Interpreter,
    PostMortem, Tracer, VpIndex, flags, model_by_name,
};
use paravane_jit::fuzz::{Bench, Leave, Pools, Program, Random, Verdict, admit};
use paravane_jit::host::{HostVectorUnit, NativeMode};
use paravane_jit::{JitOptions, Translator};
use paravane_memory::{GuestMemory, PhysAddr, RamOffset};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

/// Benches map the same addresses.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// An engine that does one thing wrong.
struct Crooked {
    engine: Box<dyn Engine>,
    error: Error,
    /// Traces damaged so far.
    damaged: u64,
}

impl Crooked {
    /// Traces made so far.
    fn traces(&self) -> u64 {
        let counters = self.engine.counters();
        counters.into_iter().find(|(name, _)| name == "traces").map_or(0, |(_, traces)| traces)
    }
}

/// What is changed, and when.
#[derive(Clone, Copy, Debug)]
enum Error {
    Before(fn(&mut CpuState)),
    After(fn(&mut CpuState, &GuestMemory)),
    /// When it goes on after a fault, which RF tells.
    Resuming(fn(&mut CpuState)),
    /// After a loop that became a trace.
    Traced(fn(&mut CpuState)),
    /// In the code of traces: an opcode becomes another.
    InTraces(Opcode),
}

/// Makes another opcode of one.
type Opcode = fn(u8) -> u8;

/// The arena, the last three of the guest's pages.
const ARENA: PhysAddr = PhysAddr((8 << 20) - 0x3000);
/// Linear addresses at which programs have code.
const CODE: std::ops::Range<u64> = 0x4000_0400..0x4000_1000;

impl Crooked {
    /// The code of traces: only there a guest instruction comes twice, where a short loop was unrolled.
    fn unrolled(&self) -> Vec<HostCode> {
        let traces = CODE.map(|lin| self.engine.host_code(lin)).filter(|code| {
            let hot: Vec<u64> = code.iter().filter(|c| !c.cold).filter_map(|c| c.guest).collect();
            let distinct: BTreeSet<u64> = hot.iter().copied().collect();
            distinct.len() < hot.len()
        });
        traces.flatten().collect()
    }

    /// Changes the first opcode that can be changed in a trace; whether there is one.
    fn damage(&self, change: Opcode) -> bool {
        // ADD, OR, ADC, SBB, AND, SUB, XOR, CMP between registers, as they are in the guest's code.
        let arithmetic = |c: &HostCode| match c.bytes[..] {
            [opcode, modrm] | [_, opcode, modrm] => opcode < 0x40 && opcode & 7 < 4 && modrm >= 0xC0,
            _ => false,
        };
        let Some(code) = self.unrolled().into_iter().find(|c| c.guest.is_some() && arithmetic(c)) else {
            return false;
        };
        let at = code.bytes.len() - 2;
        patch(code.host + at as u64, change(code.bytes[at]));
        true
    }

    /// Runs once, and if that made a trace damages it and runs again from the same state.
    fn run_damaged(
        &mut self,
        (cpu, mem, bus, budget): (&mut CpuState, &GuestMemory, &dyn CpuBus, Budget),
        change: Opcode,
    ) -> Exit {
        let (start, traces) = (cpu.clone(), self.traces());
        let mut arena = [0; 0x3000];
        mem.read(ARENA, &mut arena).unwrap();
        let exit = self.engine.run(cpu, mem, bus, budget);
        if self.traces() == traces || !self.damage(change) {
            return exit;
        }
        self.damaged += 1;
        *cpu = start;
        mem.write(ARENA, &arena).unwrap();
        self.engine.run(cpu, mem, bus, budget)
    }
}

/// Writes a byte of emitted code.
fn patch(at: u64, byte: u8) {
    let (page, all) = (at & !0xFFF, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
    // SAFETY: the page is one of the engine's code cache; it gets back what it had.
    let allow = |prot| assert_eq!(unsafe { libc::mprotect(page as *mut _, 4096, prot) }, 0);
    allow(all);
    // SAFETY: the byte lies in that page, and nothing else refers to it now.
    unsafe { (at as *mut u8).write_volatile(byte) };
    allow(libc::PROT_READ | libc::PROT_EXEC);
}

impl Engine for Crooked {
    fn run(&mut self, cpu: &mut CpuState, mem: &GuestMemory, bus: &dyn CpuBus, budget: Budget) -> Exit {
        if let Error::InTraces(change) = self.error {
            return self.run_damaged((cpu, mem, bus, budget), change);
        }
        match self.error {
            Error::Before(change) => change(cpu),
            Error::Resuming(change) if cpu.rflags & flags::RF != 0 => change(cpu),
            _ => {}
        }
        let traces = self.traces();
        let exit = self.engine.run(cpu, mem, bus, budget);
        match self.error {
            Error::After(change) => change(cpu, mem),
            Error::Traced(change) if self.traces() > traces => change(cpu),
            _ => {}
        }
        exit
    }
    fn step(&mut self, cpu: &mut CpuState, mem: &GuestMemory, bus: &dyn CpuBus, interrupts: bool) -> Exit {
        self.engine.step(cpu, mem, bus, interrupts)
    }
    fn set_debug(&mut self, plan: &Arc<DebugPlan>) {
        self.engine.set_debug(plan);
    }
    fn invalidate(&mut self, page: RamOffset) {
        self.engine.invalidate(page);
    }
    fn flush_translations(&mut self) {
        self.engine.flush_translations();
    }
    fn reset(&mut self) {
        self.engine.reset();
    }
    fn post_mortem(&self) -> PostMortem {
        self.engine.post_mortem()
    }
    fn counters(&self) -> Vec<(String, u64)> {
        let mut counters = self.engine.counters();
        counters.push(("damaged".into(), self.damaged));
        counters
    }
    fn host_code(&self, lin: u64) -> Vec<HostCode> {
        self.engine.host_code(lin)
    }
    fn set_tracer(&mut self, tracer: Option<Arc<dyn Tracer>>) {
        self.engine.set_tracer(tracer);
    }

    fn nmi_waits(&self) -> bool {
        self.engine.nmi_waits()
    }
    fn start_over(&mut self, cpu: &CpuState) {
        self.engine.start_over(cpu);
    }
}

/// A byte of the arena that nothing here touches.
fn flip_memory(_: &mut CpuState, mem: &GuestMemory) {
    let at = PhysAddr(ARENA.0 + 0x1F0D);
    let mut byte = [0];
    mem.read(at, &mut byte).unwrap();
    mem.write(at, &[byte[0] ^ 0x10]).unwrap();
}

/// Errors that no case which goes well may hide.
const ERRORS: [Error; 12] = [
    Error::Before(|cpu| cpu.gpr[5] ^= 1),
    Error::Before(|cpu| cpu.rflags ^= flags::AF),
    Error::Before(|cpu| cpu.rflags ^= flags::DF),
    Error::Before(|cpu| cpu.rflags ^= flags::ID),
    Error::After(|cpu, _| cpu.gpr[7] ^= 1 << 31),
    Error::After(|cpu, _| cpu.rip += 16),
    Error::After(|cpu, _| cpu.fpu.0[2] ^= 0x40),
    Error::After(|cpu, _| cpu.fpu.0[24] ^= 1),
    Error::After(|cpu, _| cpu.fpu.0[32 + 16 * 3 + 9] ^= 0x80),
    Error::After(|cpu, _| cpu.fpu.0[160 + 16 * 7 + 15] ^= 1),
    Error::After(|cpu, _| cpu.fpu.0[576 + 16 * 2] ^= 1),
    Error::After(flip_memory),
];

/// None where the host has no 16-bit segments for us.
fn bench(mode: NativeMode, error: Error) -> Option<Bench> {
    let mut bench = Bench::new(mode).ok().or_else(|| {
        println!("NOT RUN: {mode:?}");
        None
    })?;
    let model = model_by_name("max", &HostFeatures::detect()).unwrap();
    let vector = Box::new(HostVectorUnit::new().unwrap());
    let engine = Box::new(Interpreter::new(model, vector, Attention::default(), VpIndex(0)));
    bench.add("crooked", Box::new(Crooked { engine, error, damaged: 0 }), Leave::Nothing);
    Some(bench)
}

/// The same with a translator that makes traces soon.
fn tracing_bench(mode: NativeMode, error: Error) -> Bench {
    let mut bench = Bench::new(mode).unwrap();
    let model = model_by_name("max", &HostFeatures::detect()).unwrap();
    let options = JitOptions { hot_loop: 2, ..JitOptions::default() };
    let memory = bench.guest().memory();
    let engine = Box::new(Translator::new(model, memory, Attention::default(), VpIndex(0), options).unwrap());
    bench.add("crooked", Box::new(Crooked { engine, error, damaged: 0 }), Leave::DeadFlags);
    bench
}

#[test]
fn every_planted_error_is_found() {
    let _guard = ONE_AT_A_TIME.lock();
    for mode in [NativeMode::Long, NativeMode::Protected32, NativeMode::Protected16] {
        for (number, error) in ERRORS.into_iter().enumerate() {
            let Some(mut bench) = bench(mode, error) else { break };
            let found = (0..8).map(|seed| bench.check(Code::Movsx_r32_rm8, seed));
            let missed = found.filter(|verdict| matches!(verdict, Verdict::Same(_)));
            // Alone, a case may overwrite what was changed, or use it and fault.
            assert!(missed.count() <= 1, "error {number} in {mode:?}");
            // nop; jmp +0; mov cl, dl; nop
            let code = [0x90, 0xEB, 0, 0x88, 0xD1, 0x90];
            let mut gpr = [0; 16];
            gpr[4] = 0x5000_0800;
            let program = Program::of(&mut bench, &code, gpr).unwrap();
            assert!(!bench.differences(program.case()).is_empty(), "error {number} in {mode:?}");
        }
    }
}

/// REP STOSB now and then crosses the end of the writable pages, faults there, and goes on when the fault is mended.
#[test]
fn errors_after_a_mended_fault_are_found() {
    let _guard = ONE_AT_A_TIME.lock();
    let errors = [(Error::Resuming(|_| ()), false), (Error::Resuming(|cpu| cpu.gpr[1] ^= 1), true)];
    for (error, found) in errors {
        let mut bench = bench(NativeMode::Long, error).unwrap();
        let different =
            (0..64).any(|seed| matches!(bench.check(Code::Stosb_m8_AL, seed), Verdict::Different(_)));
        assert_eq!(different, found);
    }
}

/// Random programs have loops that turn often enough, and what comes of their traces is compared.
#[test]
fn errors_of_traces_are_found() {
    let _guard = ONE_AT_A_TIME.lock();
    for mode in [NativeMode::Long, NativeMode::Protected32] {
        let forms = paravane_jit::fuzz::forms(mode.bits());
        let pools = Pools::new(forms.into_iter().filter(|(_, v)| v.is_ok()).map(|(form, _)| form).collect());
        for (error, found) in [(Error::Traced(|_| ()), false), (Error::Traced(|cpu| cpu.gpr[5] ^= 1), true)] {
            let mut bench = tracing_bench(mode, error);
            let mut different = 0;
            for seed in 0..300 {
                let program = Program::draw(&mut bench, &pools, 20, &mut Random::new(seed)).unwrap();
                different += usize::from(!bench.differences(program.case()).is_empty());
            }
            let traces = bench.counter("traces");
            assert!(traces > 5, "{traces} traces in {mode:?}");
            assert_eq!(different > 5, found, "{different} found in {mode:?}, {traces} traces");
        }
    }
}

/// One opcode of a trace that is another, and many programs with such a trace are findings (in others nobody reads what it
/// computes); where it is written as it was, none is.
#[test]
fn errors_in_the_code_of_traces_are_found() {
    let _guard = ONE_AT_A_TIME.lock();
    for mode in [NativeMode::Long, NativeMode::Protected32] {
        let forms = paravane_jit::fuzz::forms(mode.bits()).into_iter().map(|(form, _)| form);
        let arithmetic = |form: &Code| {
            let name = format!("{form:?}");
            ["Add_r", "Or_r", "Adc_r", "Sbb_r", "And_r", "Sub_r", "Xor_r"].iter().any(|n| name.starts_with(n))
        };
        let pools = Pools::new(forms.filter(arithmetic).filter(|&f| admit(f, mode.bits()).is_ok()).collect());
        // ADD and OR, ADC and SBB, AND and SUB, XOR and CMP change places.
        let errors: [(Opcode, bool); 2] = [(|opcode| opcode, false), (|opcode| opcode ^ 8, true)];
        for (change, found) in errors {
            let mut bench = tracing_bench(mode, Error::InTraces(change));
            let mut different = 0;
            for seed in 0..400 {
                let program = Program::draw(&mut bench, &pools, 20, &mut Random::new(seed)).unwrap();
                different += u64::from(!bench.differences(program.case()).is_empty());
            }
            let damaged = bench.counter("damaged");
            assert!(damaged >= 5, "{damaged} traces in {mode:?}");
            let enough = if found { different * 4 > damaged } else { different == 0 };
            assert!(enough, "{different} found in {mode:?} of {damaged}");
        }
    }
}

#[test]
fn an_honest_engine_is_not_accused() {
    let _guard = ONE_AT_A_TIME.lock();
    for mode in [NativeMode::Long, NativeMode::Protected32, NativeMode::Protected16] {
        let Some(mut bench) = bench(mode, Error::Before(|_| ())) else { continue };
        for seed in 0..8 {
            assert!(!matches!(bench.check(Code::Movsx_r32_rm8, seed), Verdict::Different(_)));
        }
    }
}

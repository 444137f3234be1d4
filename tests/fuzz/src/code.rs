//! Decoder, translator and interpreter on any bytes, in every processor mode.
//!
//! Both engines run the same start for a bounded number of instructions, and a watchdog bounds the rest (repeated string
//! instructions, faults on the way to a fault). What must hold: they come back, this process lives, and no register of the
//! guest shows what lies beside its memory. Whether they are right is the conformance tests' question.
//!
//! ```text
//! 1000 GDT   2000 IDT   3000 TSS   4000 handlers   6000-7000 stack   9000 code of real mode
//! 3_0000 page tables   7_0000 stack   10_0000 code   12_0000 data   up to 20_0000 mapped one to one
//! ```
//!
//! With paging the last page, which has code too, is also the last of the linear space, and of the lower half.

use crate::script::Script;
use paravane_cpu::{
    Attention, Board, Budget, CpuState, DescriptorTable, Engine, Exit, FpuState, HostFeatures, Interpreter,
    SegReg, Segment, cr0, cr4, efer, flags, gpr, model_by_name,
};
use paravane_jit::{HostVectorUnit, JitOptions, Translator};
use paravane_memory::{GuestMemory, MemoryConfig, PhysAddr, VpIndex};
use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

const RAM: u64 = 2 << 20;
const INSTRUCTIONS: u64 = 3000;
/// When a run that goes on is told to stop, and when the process gives it up.
const PATIENCE: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(20)];

const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
const HANDLERS: u64 = 0x4000;
const REAL_CODE: u64 = 0x9000;
const TABLES: u64 = 0x3_0000;
const STACK: u64 = 0x7_0000;
const CODE: u64 = 0x10_0000;
const DATA: u64 = 0x12_0000;
const CODE_LEN: usize = 0x3000;
/// Bytes of code at the end of memory and of the first 64 KiB.
const TOP: u64 = 0x100;

const CODE32: u16 = 0x08;
const CODE64: u16 = 0x10;
const DATA32: u16 = 0x18;
const USER_CODE32: u16 = 0x23;
const USER_DATA: u16 = 0x2B;
const USER_CODE64: u16 = 0x33;
const TASK: u16 = 0x48;

/// PML4 or page directories, page directory, page table, 32-bit page directory and table.
const PML4: u64 = TABLES;
const PDPT: u64 = TABLES + 0x1000;
const PD: u64 = TABLES + 0x2000;
const PT: u64 = TABLES + 0x3000;
const PD32: u64 = TABLES + 0x4000;
const PT32: u64 = TABLES + 0x5000;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    Real,
    Protected,
    Code16,
    Paged32,
    Pae,
    Compat,
    Long,
}

const MODES: [Mode; 8] = [
    Mode::Long,
    Mode::Compat,
    Mode::Pae,
    Mode::Paged32,
    Mode::Protected,
    Mode::Code16,
    Mode::Real,
    Mode::Long,
];

/// An engine with its memory, kept from input to input: making one costs more than running one.
struct Side {
    memory: GuestMemory,
    attention: Attention,
    engine: Box<dyn Engine>,
    /// Odd while a run is under way.
    runs: &'static AtomicU64,
}

impl Side {
    fn new(translated: bool) -> Side {
        let memory = GuestMemory::new(MemoryConfig::pc(RAM)).expect("guest memory");
        let attention = Attention::default();
        let model = model_by_name("max", &HostFeatures::detect()).expect("model");
        let engine: Box<dyn Engine> = if translated {
            let options =
                JitOptions { code_cache: 2 << 20, count_instructions: true, ..JitOptions::default() };
            Box::new(
                Translator::new(model, &memory, attention.clone(), VpIndex(0), options).expect("translator"),
            )
        } else {
            let vector = Box::new(HostVectorUnit::new().expect("vector unit"));
            Box::new(Interpreter::new(model, vector, attention.clone(), VpIndex(0)))
        };
        let runs: &'static AtomicU64 = Box::leak(Box::default());
        let dog = attention.clone();
        thread::Builder::new().name("watchdog".into()).spawn(move || watch(runs, &dog)).expect("thread");
        Side { memory, attention, engine, runs }
    }

    fn run(&mut self, start: &Start<'_>) {
        start.lay_out(&self.memory);
        self.engine.flush_translations();
        let mut cpu = start.state();
        self.attention.take(Attention::STOP);
        self.runs.fetch_add(1, Ordering::SeqCst);
        let budget = Budget { instructions: INSTRUCTIONS };
        let exit = self.engine.run(&mut cpu, &self.memory, &Board::default(), budget);
        self.runs.fetch_add(1, Ordering::SeqCst);
        assert_ne!(exit, Exit::Unsupported, "at {:#x}: {:x?}", cpu.rip, start.code);
        let base = self.memory.host_base() as u64;
        let host = base - 0x1000..base + self.memory.backing_len() + 0x1000;
        assert!(
            !cpu.gpr.iter().any(|r| host.contains(r)),
            "a register holds a host address: {:x?}",
            start.code
        );
    }
}

/// Tells a run that lasts too long to stop; ends the process if it does not listen.
fn watch(runs: &AtomicU64, attention: &Attention) {
    let (mut seen, mut waited) = (0, Duration::ZERO);
    let tick = PATIENCE[0] / 5;
    loop {
        thread::sleep(tick);
        let run = runs.load(Ordering::SeqCst);
        if run != seen || run.is_multiple_of(2) {
            (seen, waited) = (run, Duration::ZERO);
            continue;
        }
        waited += tick;
        if waited >= PATIENCE[1] {
            eprintln!("a processor does not stop");
            std::process::abort();
        }
        if waited >= PATIENCE[0] {
            attention.set(Attention::STOP);
        }
    }
}

/// Where a run starts.
struct Start<'a> {
    mode: Mode,
    user: bool,
    /// Exceptions go on in the code at this offset; otherwise their handlers halt.
    resume: Option<u16>,
    gpr: [u64; 16],
    rflags: u64,
    entry: u64,
    /// It starts in the last bytes below this.
    below: Option<u64>,
    tables: [(u16, u64); 2],
    code: &'a [u8],
}

impl<'a> Start<'a> {
    fn read(s: &mut Script<'a>) -> Start<'a> {
        let (choice, entry, how) = (s.u8(), s.u8(), s.u8());
        let mut gpr = [0; 16];
        for (i, register) in gpr.iter_mut().enumerate() {
            *register = if how & 1 != 0 { s.wild() } else { DATA + i as u64 * 0x808 };
        }
        let mut tables = [(0, 0); 2];
        if how & 2 != 0 {
            tables = tables.map(|_| (s.u16() % 0xC00, s.wild() | u64::from(s.u8())));
        }
        let rflags = if how & 4 != 0 { u64::from(s.u32()) } else { 0 };
        let mode = MODES[usize::from(choice & 7)];
        let end = match mode {
            Mode::Real | Mode::Code16 => 1 << 16,
            Mode::Long if how & 16 != 0 => 1 << 47,
            Mode::Long => 0,
            _ => 1 << 32,
        };
        Start {
            mode,
            below: (how & 8 != 0).then_some(end),
            user: choice & 8 != 0,
            resume: (choice & 0x10 != 0).then(|| s.u8().into()),
            gpr,
            rflags: rflags & (flags::DF | flags::AC | flags::NT | flags::IOPL | flags::TF | flags::STATUS),
            entry: entry.into(),
            tables,
            code: s.take(CODE_LEN),
        }
    }

    fn code_at(&self) -> u64 {
        if self.mode == Mode::Real { REAL_CODE } else { CODE }
    }

    fn long(&self) -> bool {
        matches!(self.mode, Mode::Long | Mode::Compat)
    }

    /// All of RAM: what the last run left goes away.
    fn lay_out(&self, memory: &GuestMemory) {
        let mut ram = vec![0; RAM as usize];
        let mut put =
            |at: u64, bytes: &[u8]| ram[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        let code = self.code_at();
        put(code, self.code);
        put(DATA, self.code);
        for end in [1 << 16, RAM] {
            put(end - TOP, &self.code[..self.code.len().min(TOP as usize)]);
        }
        for (selector, raw) in [
            (CODE32, 0x00CF_9B00_0000_FFFFu64),
            (CODE64, 0x00AF_9B00_0000_FFFF),
            (DATA32, 0x00CF_9300_0000_FFFF),
            (USER_CODE32, 0x00CF_FB00_0000_FFFF),
            (USER_DATA, 0x00CF_F300_0000_FFFF),
            (USER_CODE64, 0x00AF_FB00_0000_FFFF),
            (0x38, 0x0000_9B00_0000_FFFF),
            (0x40, 0x0000_9300_0000_FFFF),
            (TASK, 0x0000_8B00_3000_0067),
        ] {
            put(GDT + u64::from(selector & !7), &raw.to_le_bytes());
        }
        for vector in 0..256u64 {
            let handler = HANDLERS + vector * 16;
            match self.resume {
                Some(offset) => put(handler, &self.jump(handler, code + u64::from(offset))),
                None => put(handler, &[0xF4]),
            }
            self.gate(&mut put, vector, handler);
        }
        if self.long() {
            put(TSS + 4, &STACK.to_le_bytes());
        } else {
            put(TSS + 4, &(STACK as u32).to_le_bytes());
            put(TSS + 8, &u32::from(DATA32).to_le_bytes());
        }
        put(TSS + 102, &104u16.to_le_bytes());
        for entry in [0, 255, 256, 511] {
            put(PML4 + entry * 8, &(PDPT | 7).to_le_bytes());
        }
        for (table, next) in [(PDPT, PD), (PD, PT)] {
            put(table, &(next | 7).to_le_bytes());
            put(table + 511 * 8, &(next | 7).to_le_bytes());
        }
        for entry in [0, 1023] {
            put(PD32 + entry * 4, &(PT32 as u32 | 7).to_le_bytes());
        }
        for page in 0..RAM >> 12 {
            put(PT + page * 8, &(page << 12 | 7).to_le_bytes());
            put(PT32 + page * 4, &((page << 12) as u32 | 7).to_le_bytes());
        }
        put(PT32 + 1023 * 4, &((RAM - 0x1000) as u32 | 7).to_le_bytes());
        for (slot, entry) in self.tables.iter().filter(|(_, entry)| *entry != 0) {
            put(TABLES + u64::from(*slot) * 8, &entry.to_le_bytes());
        }
        memory.write(PhysAddr(0), &ram).expect("RAM");
    }

    /// JMP from `at` to `to` in the code size of the handlers.
    fn jump(&self, at: u64, to: u64) -> Vec<u8> {
        if self.mode == Mode::Real {
            let distance = to.wrapping_sub(at + 3) as u16;
            return [&[0xE9][..], &distance.to_le_bytes()].concat();
        }
        let distance = to.wrapping_sub(at + 5) as u32;
        [&[0xE9][..], &distance.to_le_bytes()].concat()
    }

    fn gate(&self, put: &mut impl FnMut(u64, &[u8]), vector: u64, handler: u64) {
        if self.mode == Mode::Real {
            return put(vector * 4, &(handler as u32).to_le_bytes());
        }
        let selector = u64::from(if self.long() { CODE64 } else { CODE32 });
        let dpl = if vector.is_multiple_of(3) { 0xEE } else { 0x8E };
        let low = (handler & 0xFFFF) | selector << 16 | dpl << 40 | (handler >> 16 & 0xFFFF) << 48;
        let size = if self.long() { 16 } else { 8 };
        if vector * size < 0x1000 {
            put(IDT + vector * size, &low.to_le_bytes());
        }
    }

    fn state(&self) -> CpuState {
        let mut c = CpuState::reset(0);
        c.xcr0 = 7;
        c.fpu = FpuState::initial();
        c.gdtr = DescriptorTable { base: GDT, limit: 0xFFF };
        c.gpr = self.gpr;
        c.rflags = flags::FIXED | self.rflags;
        c.rip = match self.below {
            Some(end) => end.wrapping_sub(TOP).wrapping_add(self.entry),
            None => self.code_at() + self.entry,
        };
        c.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        if self.mode == Mode::Real {
            c.idtr = DescriptorTable { base: 0, limit: 0x3FF };
            c.seg = [Segment::real(0); 6];
            c.cr0 = cr0::ET;
            c.gpr[gpr::RSP] = 0x7000;
            c.gpr.iter_mut().for_each(|r| *r &= 0xFFFF_FFFF);
            return c;
        }
        c.idtr = DescriptorTable { base: IDT, limit: 0xFFF };
        c.cr0 = cr0::PE | cr0::ET | cr0::NE | cr0::MP | cr0::WP;
        c.tr = Segment { base: TSS, limit: 0x67, attributes: 0x8B, selector: TASK };
        c.gpr[gpr::RSP] = STACK;
        self.segments(&mut c);
        self.paging(&mut c);
        if self.mode != Mode::Long {
            c.gpr.iter_mut().for_each(|r| *r &= 0xFFFF_FFFF);
        }
        c
    }

    fn segments(&self, c: &mut CpuState) {
        let ring = if self.user { 0x60 } else { 0 };
        let of = |user: u16, kernel: u16| if self.user { user } else { kernel };
        c.seg = [Segment::flat(of(USER_DATA, DATA32), 0xC093 | ring); 6];
        c.seg[SegReg::Cs as usize] = match self.mode {
            Mode::Long => Segment::flat(of(USER_CODE64, CODE64), 0xA09B | ring),
            Mode::Code16 => Segment::flat(of(USER_CODE32, CODE32), 0x809B | ring),
            _ => Segment::flat(of(USER_CODE32, CODE32), 0xC09B | ring),
        };
        c.cpl = if self.user { 3 } else { 0 };
    }

    fn paging(&self, c: &mut CpuState) {
        match self.mode {
            Mode::Real | Mode::Protected | Mode::Code16 => {}
            Mode::Paged32 => {
                c.cr0 |= cr0::PG;
                c.cr3 = PD32;
                c.cr4 |= cr4::PSE;
            }
            Mode::Pae => {
                c.cr0 |= cr0::PG;
                c.cr3 = PDPT;
                c.cr4 |= cr4::PAE;
                c.efer = efer::NXE;
                c.pdptes = [PD | 1, 0, 0, PD | 1];
            }
            Mode::Compat | Mode::Long => {
                c.cr0 |= cr0::PG;
                c.cr3 = PML4;
                c.cr4 |= cr4::PAE;
                c.efer = efer::NXE | efer::LME | efer::LMA | efer::SCE;
            }
        }
    }
}

thread_local! {
    static SIDES: RefCell<[Side; 2]> = RefCell::new([Side::new(false), Side::new(true)]);
}

/// Runs `input` as code in both engines.
pub fn run(input: &[u8]) {
    let start = Start::read(&mut Script::new(input));
    SIDES.with_borrow_mut(|sides| sides.iter_mut().for_each(|side| side.run(&start)));
}

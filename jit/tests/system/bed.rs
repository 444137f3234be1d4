//! A machine with memory, descriptor tables, page tables and handlers that halt, in which small programs run.
//!
//! ```text
//! 1000 GDT   2000 IDT   3000 TSS   4000 handlers (16 bytes each: HLT)   6000-7000 stack (real mode)
//! 9000 real-mode code   3_0000 page tables   6_0000 IST stack   7_0000 stack of CPL 0   7_8000 stack of CPL 3
//! 10_0000 code   20_0000 data   up to 100_0000 mapped one to one by 4 KiB pages
//! ```
//!
//! Invariant of the unsafe lines: a program is the read-only bytes between two labels that the assembler put
//! into one section; the tests only copy them into the guest's memory.

use paravane_cpu::{
    Attention, Board, Budget, CpuModel, CpuState, DebugPlan, DescriptorTable, Engine, Exit, FpuState,
    HostCode, HostFeatures, Interpreter, PostMortem, SegReg, Segment, cr0, cr4, efer, flags, gpr,
    model_by_name,
};
use paravane_jit::{HostVectorUnit, JitOptions, Translator};
use paravane_memory::{GuestMemory, MemoryConfig, PhysAddr, VpIndex};
use std::sync::{Arc, mpsc};
use std::time::Duration;

pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
pub const TSS: u64 = 0x3000;
pub const HANDLERS: u64 = 0x4000;
pub const REAL_CODE: u64 = 0x9000;
pub const IST_STACK: u64 = 0x6_0000;
pub const STACK: u64 = 0x7_0000;
pub const USER_STACK: u64 = 0x7_8000;
pub const CODE: u64 = 0x10_0000;
pub const DATA: u64 = 0x20_0000;
/// Below this all is mapped.
pub const MAPPED: u64 = 16 << 20;

pub const PAE_ROOT: u64 = 0x2_F000;
pub const PML4: u64 = 0x3_0000;
pub const PDPT: u64 = 0x3_1000;
pub const PD: u64 = 0x3_2000;
pub const PT: u64 = 0x3_3000;
pub const PD32: u64 = 0x3_C000;
pub const PT32: u64 = 0x3_D000;
/// Page-table pages for tests to use.
pub const SPARE: u64 = 0x4_2000;

/// Selectors.
pub mod sel {
    pub const CODE32: u16 = 0x08;
    pub const CODE64: u16 = 0x10;
    pub const DATA: u16 = 0x18;
    pub const USER_CODE32: u16 = 0x23;
    pub const USER_DATA: u16 = 0x2B;
    pub const USER_CODE64: u16 = 0x33;
    pub const CODE16: u16 = 0x38;
    pub const DATA16: u16 = 0x40;
    pub const TSS: u16 = 0x48;
    /// First of the entries for tests.
    pub const FREE: u16 = 0x58;
}

/// Page-table entry bits (SDM 3A, table 4-20).
pub mod pte {
    pub const P: u64 = 1;
    pub const RW: u64 = 2;
    pub const US: u64 = 4;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    pub const XD: u64 = 1 << 63;
    /// Present, writable, user.
    pub const ALL: u64 = P | RW | US;
}

/// Page-fault error code bits (SDM 3A, figure 4-12).
pub mod pf {
    pub const P: u32 = 1;
    pub const W: u32 = 2;
    pub const U: u32 = 4;
    pub const RSVD: u32 = 8;
    pub const I: u32 = 16;
}

/// Machine code: a program assembled into this binary.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    pub bytes: &'static [u8],
    /// Offset of what follows the semicolon.
    pub at: u64,
}

/// Assembles `bits`-bit code with a HLT behind it. The part behind `;` is the one a test asks about. In the text, label
/// 770 is the program's first byte, so `.long 5f - 770b + 0x100000` is where label 5 will be.
macro_rules! program {
    ($bits:literal: $($line:literal),* $(; $($at:literal),*)?) => {{
        let (start, at, end): (usize, usize, usize);
        // SAFETY: only takes the addresses of three labels in the read-only data.
        unsafe {
            std::arch::asm!(
                ".pushsection .rodata",
                concat!(".code", $bits),
                "770:",
                $($line,)*
                "771:",
                $($($at,)*)?
                "hlt",
                "772:",
                ".code64",
                ".popsection",
                "lea {start}, [rip + 770b]",
                "lea {at}, [rip + 771b]",
                "lea {end}, [rip + 772b]",
                start = out(reg) start,
                at = out(reg) at,
                end = out(reg) end,
                options(nomem, nostack, preserves_flags),
            );
        }
        // SAFETY: the labels bound bytes that were assembled in one piece and never change.
        let bytes = unsafe { std::slice::from_raw_parts(start as *const u8, end - start) };
        crate::bed::Program { bytes, at: (at - start) as u64 }
    }};
}

/// What a handler found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Taken {
    pub vector: u64,
    pub error: Option<u32>,
    pub rip: u64,
    pub cs: u64,
    pub flags: u64,
    /// The interrupted stack pointer and segment, where they were pushed.
    pub sp: u64,
    pub ss: u64,
}

/// Where a test starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Start {
    /// 0:9000H.
    Real,
    /// Flat 32-bit code without paging.
    Protected,
    /// The same with 32-bit paging.
    Paged32,
    /// The same with PAE paging.
    Pae,
    /// Compatibility mode.
    Compat,
    /// 64-bit mode.
    Long,
}

/// A processor on an empty board.
pub struct Bed {
    pub cpu: CpuState,
    pub mem: GuestMemory,
    pub board: Arc<Board>,
    pub attention: Attention,
    pub start: Start,
    model: CpuModel,
    pub kind: Kind,
    engine: Box<dyn Engine>,
    /// Where the last [`Bed::faults`] started and what it left.
    last: Option<(CpuState, CpuState)>,
}

/// The engines: the translator with memory by tables alone, and with windows for programs from their first instruction on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Interpreter,
    Tables,
    Windows,
}

/// Runs `test` in a fresh machine for each engine.
pub fn both(start: Start, test: impl Fn(&mut Bed)) {
    both_as("max", start, test);
}

/// Likewise, on a processor of `model`.
pub fn both_as(model: &str, start: Start, test: impl Fn(&mut Bed)) {
    for engine in [Kind::Interpreter, Kind::Tables, Kind::Windows] {
        eprintln!("{model}, {start:?}, {engine:?}");
        test(&mut Bed::of_kind(model, start, engine));
    }
}

impl Bed {
    pub fn new(start: Start, translated: bool) -> Bed {
        Bed::of_model("max", start, translated)
    }

    pub fn of_model(model: &str, start: Start, translated: bool) -> Bed {
        Bed::of_kind(model, start, if translated { Kind::Windows } else { Kind::Interpreter })
    }

    pub fn of_kind(model: &str, start: Start, kind: Kind) -> Bed {
        Bed::with_code_cache(model, start, kind, 4 << 20)
    }

    /// The translator has `code_cache` bytes for code.
    pub fn with_code_cache(model: &str, start: Start, kind: Kind, code_cache: usize) -> Bed {
        let mem = GuestMemory::new(MemoryConfig::pc(32 << 20)).expect("memory");
        let attention = Attention::default();
        let model = model_by_name(model, &HostFeatures::detect()).expect("a model");
        let engine: Box<dyn Engine> = if kind != Kind::Interpreter {
            let window_after = if kind == Kind::Windows { 0 } else { u32::MAX };
            let options = JitOptions { code_cache, hot_loop: 2, window_after, ..JitOptions::default() };
            let jit = Translator::new(model.clone(), &mem, attention.clone(), VpIndex(0), options);
            Box::new(jit.expect("translator"))
        } else {
            let vector = Box::new(HostVectorUnit::new().expect("vector unit"));
            Box::new(Interpreter::new(model.clone(), vector, attention.clone(), VpIndex(0)))
        };
        let board = Arc::new(Board::default());
        let cpu = CpuState::reset(0);
        let mut bed = Bed { cpu, mem, board, attention, start, model, engine, kind, last: None };
        bed.restore();
        bed
    }

    /// Tables, handlers and state as at the start.
    pub fn restore(&mut self) {
        self.handlers();
        self.descriptors();
        self.page_tables();
        self.reset();
        self.flush();
    }

    // ---- memory -------------------------------------------------------------------------------------------

    pub fn put(&self, at: u64, bytes: &[u8]) {
        self.mem.write(PhysAddr(at), bytes).expect("RAM");
    }

    pub fn put16(&self, at: u64, value: u16) {
        self.put(at, &value.to_le_bytes());
    }

    pub fn put32(&self, at: u64, value: u32) {
        self.put(at, &value.to_le_bytes());
    }

    pub fn put64(&self, at: u64, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    pub fn get16(&self, at: u64) -> u16 {
        self.mem.read_u16(PhysAddr(at)).expect("RAM")
    }

    pub fn get32(&self, at: u64) -> u32 {
        self.mem.read_u32(PhysAddr(at)).expect("RAM")
    }

    pub fn get64(&self, at: u64) -> u64 {
        self.mem.read_u64(PhysAddr(at)).expect("RAM")
    }

    // ---- tables -------------------------------------------------------------------------------------------

    fn handlers(&self) {
        for vector in 0..256 {
            self.put(HANDLERS + vector * 16, &[0xF4]);
        }
    }

    /// GDT entry `selector`.
    pub fn gdt(&self, selector: u16, raw: u64) {
        self.put64(GDT + u64::from(selector & !7), raw);
    }

    fn descriptors(&self) {
        use sel::{CODE16, CODE32, CODE64, DATA16, USER_CODE32, USER_CODE64, USER_DATA};
        for (selector, raw) in [
            (CODE32, 0x00CF_9B00_0000_FFFF),
            (CODE64, 0x00AF_9B00_0000_FFFF),
            (sel::DATA, 0x00CF_9300_0000_FFFF),
            (USER_CODE32, 0x00CF_FB00_0000_FFFF),
            (USER_DATA, 0x00CF_F300_0000_FFFF),
            (USER_CODE64, 0x00AF_FB00_0000_FFFF),
            (CODE16, 0x0000_9B00_0000_FFFF),
            (DATA16, 0x0000_9300_0000_FFFF),
            (sel::TSS, 0x0000_8B00_3000_0067),
        ] {
            self.gdt(selector, raw);
        }
        for vector in 0..256 {
            self.gate(vector, 14, 0, HANDLERS + vector * 16);
        }
        if self.long() {
            self.put64(TSS + 4, STACK);
            self.put64(TSS + 36, IST_STACK);
        } else {
            self.put32(TSS + 4, STACK as u32);
            self.put32(TSS + 8, u32::from(sel::DATA));
        }
        self.put16(TSS + 102, 104);
    }

    fn long(&self) -> bool {
        matches!(self.start, Start::Long | Start::Compat)
    }

    /// A gate of `kind` to CPL 0 code at `offset`, in the IDT of the start mode.
    pub fn gate(&self, vector: u64, kind: u64, dpl: u64, offset: u64) {
        if self.start == Start::Real {
            return self.put32(vector * 4, offset as u32);
        }
        let selector = u64::from(if self.long() { sel::CODE64 } else { sel::CODE32 });
        let low = (offset & 0xFFFF)
            | selector << 16
            | (0x80 | dpl << 5 | kind) << 40
            | (offset >> 16 & 0xFFFF) << 48;
        if self.long() {
            self.put64(IDT + vector * 16, low);
            self.put64(IDT + vector * 16 + 8, offset >> 32);
        } else {
            self.put64(IDT + vector * 8, low);
        }
    }

    /// Has `vector` use IST entry 1.
    pub fn ist(&self, vector: u64) {
        let at = IDT + vector * 16;
        self.put64(at, self.get64(at) | 1 << 32);
    }

    fn page_tables(&self) {
        self.put64(PML4, PDPT | pte::ALL);
        self.put64(PDPT, PD | pte::ALL);
        self.put64(PAE_ROOT, PD | pte::P);
        for i in 0..8 {
            self.put64(PD + i * 8, (PT + i * 4096) | pte::ALL);
        }
        for page in 0..MAPPED >> 12 {
            self.put64(PT + page * 8, page << 12 | pte::ALL);
            self.put32(PT32 + page as u32 as u64 * 4, (page << 12 | pte::ALL) as u32);
        }
        for i in 0..4 {
            self.put32(PD32 + i * 4, ((PT32 + i * 4096) | pte::ALL) as u32);
        }
    }

    /// Physical address of the entry that maps linear page `lin` (below [`MAPPED`]).
    pub fn pte_at(&self, lin: u64) -> u64 {
        if self.start == Start::Paged32 { PT32 + (lin >> 12) * 4 } else { PT + (lin >> 12) * 8 }
    }

    pub fn pte(&self, lin: u64) -> u64 {
        let at = self.pte_at(lin);
        if self.start == Start::Paged32 { u64::from(self.get32(at)) } else { self.get64(at) }
    }

    /// Maps linear page `lin` to `phys` with attributes `bits`, without any flush.
    pub fn map(&self, lin: u64, phys: u64, bits: u64) {
        let at = self.pte_at(lin);
        if self.start == Start::Paged32 {
            self.put32(at, (phys | bits) as u32);
        } else {
            self.put64(at, phys | bits);
        }
    }

    /// The engine forgets all translations, as after MOV CR3 and INVLPG of everything.
    pub fn flush(&mut self) {
        self.engine.flush_translations();
    }

    // ---- state --------------------------------------------------------------------------------------------

    /// The state to start from, at CPL 0.
    pub fn reset(&mut self) {
        let mut c = CpuState::reset(0);
        c.xcr0 = 7;
        c.fpu = FpuState::initial();
        c.gdtr = DescriptorTable { base: GDT, limit: 0xFFF };
        if self.start == Start::Real {
            c.idtr = DescriptorTable { base: 0, limit: 0x3FF };
            c.seg = [Segment::real(0); 6];
            c.cr0 = cr0::ET;
            c.gpr[gpr::RSP] = 0x7000;
        } else {
            c.idtr = DescriptorTable { base: IDT, limit: 0xFFF };
            c.cr0 = cr0::PE | cr0::ET | cr0::NE | cr0::MP | cr0::WP;
            c.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
            c.seg = [Segment::flat(sel::DATA, 0xC093); 6];
            c.seg[SegReg::Cs as usize] = Segment::flat(sel::CODE32, 0xC09B);
            c.tr = Segment { base: TSS, limit: 0x67, attributes: 0x8B, selector: sel::TSS };
            c.gpr[gpr::RSP] = STACK;
        }
        match self.start {
            Start::Real | Start::Protected => {}
            Start::Paged32 => {
                c.cr0 |= cr0::PG;
                c.cr3 = PD32;
                c.cr4 |= cr4::PSE;
            }
            Start::Pae => {
                c.cr0 |= cr0::PG;
                c.cr3 = PAE_ROOT;
                c.cr4 |= cr4::PAE;
                c.efer = efer::NXE;
                c.pdptes = [PD | pte::P, 0, 0, 0];
            }
            Start::Compat | Start::Long => {
                c.cr0 |= cr0::PG;
                c.cr3 = PML4;
                c.cr4 |= cr4::PAE;
                c.efer = efer::NXE | efer::LME | efer::LMA | efer::SCE;
            }
        }
        if self.start == Start::Long {
            c.seg[SegReg::Cs as usize] = Segment::flat(sel::CODE64, 0xA09B);
        }
        c.cr4 &= self.model.cr4_allowed();
        c.efer &= self.model.efer_allowed() | efer::LMA;
        self.cpu = c;
    }

    /// CPL 3 in the flat user segments.
    pub fn user(&mut self) {
        let c = &mut self.cpu;
        c.seg = [Segment::flat(sel::USER_DATA, 0xC0F3); 6];
        c.seg[SegReg::Cs as usize] = if self.start == Start::Long {
            Segment::flat(sel::USER_CODE64, 0xA0FB)
        } else {
            Segment::flat(sel::USER_CODE32, 0xC0FB)
        };
        c.cpl = 3;
        c.gpr[gpr::RSP] = USER_STACK;
    }

    /// Where [`Self::load`] puts programs.
    pub fn code(&self) -> u64 {
        if self.start == Start::Real { REAL_CODE } else { CODE }
    }

    /// An interrupt `vector` arrives when the guest writes port 80H.
    pub fn interrupt_at_port(&self, vector: u8) {
        self.board.raise_at_port(&self.attention, Attention::INTERRUPT, vector);
    }

    /// An NMI arrives when the guest writes port 80H.
    pub fn nmi_at_port(&self) {
        self.board.raise_at_port(&self.attention, Attention::NMI, 0);
    }

    /// FERR# is wired to interrupt `vector`.
    pub fn interrupt_on_fpu_error(&self, vector: u8) {
        self.board.raise_at_fpu_error(&self.attention, vector);
    }

    // ---- running ------------------------------------------------------------------------------------------

    /// Places `program` where the state starts.
    pub fn load(&mut self, program: &Program) {
        self.put(self.code(), program.bytes);
        self.cpu.rip = self.code();
    }

    /// Goes on until the engine returns; a guest that does not stop by itself within seconds is stopped.
    pub fn go(&mut self) -> Exit {
        self.cpu.halted = false;
        self.wait()
    }

    /// Goes on, in HLT if the processor was there.
    pub fn wait(&mut self) -> Exit {
        let (done, stopped) = mpsc::channel::<()>();
        let attention = self.attention.clone();
        let dog = std::thread::spawn(move || {
            if stopped.recv_timeout(Duration::from_secs(20)) == Err(mpsc::RecvTimeoutError::Timeout) {
                attention.set(Attention::STOP);
            }
        });
        let exit = self.engine.run(&mut self.cpu, &self.mem, &*self.board, Budget::UNLIMITED);
        drop(done);
        dog.join().expect("watchdog");
        assert_ne!(exit, Exit::Stop, "the guest did not end: {:x?}", self.cpu);
        exit
    }

    /// Goes on for at most about `time`. A processor that does not hear STOP ends the process: its thread cannot be saved.
    pub fn run_for(&mut self, time: Duration, note: &str) -> Exit {
        self.cpu.halted = false;
        let (done, stopped) = mpsc::channel::<()>();
        let (attention, note) = (self.attention.clone(), note.to_owned());
        let timer = std::thread::spawn(move || {
            let open = || mpsc::RecvTimeoutError::Timeout;
            if stopped.recv_timeout(time) == Err(open()) {
                attention.set(Attention::STOP);
                if stopped.recv_timeout(Duration::from_secs(20)) == Err(open()) {
                    eprintln!("a processor does not stop: {note}");
                    std::process::abort();
                }
            }
        });
        let exit = self.engine.run(&mut self.cpu, &self.mem, &*self.board, Budget::UNLIMITED);
        drop(done);
        timer.join().expect("timer");
        self.attention.take(Attention::STOP);
        exit
    }

    /// Goes on until the engine returns; nobody watches.
    pub fn quick(&mut self) -> Exit {
        self.cpu.halted = false;
        self.engine.run(&mut self.cpu, &self.mem, &*self.board, Budget::UNLIMITED)
    }

    /// A counter of the engine's; the interpreter has other ones.
    pub fn counter(&self, name: &str) -> Option<u64> {
        self.engine.counters().into_iter().find(|(counter, _)| counter == name).map(|(_, value)| value)
    }

    /// What the block at `lin` was translated to; nothing in the interpreter.
    pub fn host_code(&self, lin: u64) -> Vec<HostCode> {
        self.engine.host_code(lin)
    }

    /// What the debugger wants to be told.
    pub fn arm(&mut self, plan: DebugPlan) {
        self.engine.set_debug(&Arc::new(plan));
    }

    /// One step of the debugger.
    pub fn step(&mut self, interrupts: bool) -> Exit {
        self.engine.step(&mut self.cpu, &self.mem, &*self.board, interrupts)
    }

    /// How the processor came to where it is.
    pub fn post_mortem(&self) -> PostMortem {
        self.engine.post_mortem()
    }

    /// Runs `program` to a HLT.
    pub fn run(&mut self, program: &Program) {
        self.load(program);
        let exit = self.go();
        assert_eq!(exit, Exit::Halt, "{}", self.place());
    }

    /// Runs `program`, which must halt by itself.
    pub fn finish(&mut self, program: &Program) {
        self.run(program);
        let end = self.code() + program.bytes.len() as u64;
        assert_eq!(self.cpu.rip, end, "{}", self.place());
    }

    fn place(&self) -> String {
        let c = &self.cpu;
        if self.handler().is_some() {
            return format!("{:x?} CR2 {:#x}", self.taken(), c.cr2);
        }
        format!("at {:#x}, CR2 {:#x}, RSP {:#x}", c.rip, c.cr2, c.gpr[gpr::RSP])
    }

    fn handler(&self) -> Option<u64> {
        let off = self.cpu.rip.checked_sub(HANDLERS + 1)?;
        (off < 0x1000 && off % 16 == 0).then_some(off / 16)
    }

    /// What the handler that halted sees on its stack.
    pub fn taken(&self) -> Taken {
        self.taken_at(self.handler().unwrap_or_else(|| panic!("no handler at {:#x}", self.cpu.rip)))
    }

    /// What the handler of `vector` will see that was just entered.
    pub fn taken_at(&self, vector: u64) -> Taken {
        let has_error = matches!(vector, 8 | 10..=14 | 17) && self.start != Start::Real;
        let sp = self.cpu.gpr[gpr::RSP] & if self.start == Start::Real { 0xFFFF } else { u64::MAX };
        let mut at = self.cpu.segment(SegReg::Ss).base + sp;
        let mut pop = || {
            let (size, value) = match self.start {
                Start::Real => (2, u64::from(self.get16(at))),
                Start::Long | Start::Compat => (8, self.get64(at)),
                _ => (4, u64::from(self.get32(at))),
            };
            at += size;
            value
        };
        let error = has_error.then(|| pop() as u32);
        let (rip, cs, flags) = (pop(), pop() & 0xFFFF, pop());
        let outer = self.long() || cs & 3 != 0 || flags & flags::VM != 0;
        let (sp, ss) = if outer { (pop(), pop() & 0xFFFF) } else { (0, 0) };
        Taken { vector, error, rip, cs, flags, sp, ss }
    }

    /// Runs `program`, whose marked instruction must raise `vector` with `error` as a fault: registers as before it.
    /// Then once more from the same state, which meets translated code and filled tables. A test that changes nothing in
    /// the processor before it asks again starts from that state again, too.
    pub fn faults(&mut self, program: &Program, vector: u64, error: impl Into<Option<u32>>) -> Taken {
        let error = error.into();
        let start = match self.last.take() {
            Some((start, end)) if end == self.cpu => start,
            _ => self.cpu.clone(),
        };
        for _ in 0..2 {
            self.cpu = start.clone();
            self.run(program);
            let t = self.taken();
            assert_eq!((t.vector, t.error), (vector, error), "{}", self.place());
            assert_eq!(t.rip, self.code() + program.at, "the pushed RIP");
            // Faults push RF set (SDM 3B, 17.3.1.1); #DB is several things, #DF an abort.
            if self.start != Start::Real && !matches!(vector, 1 | 8) {
                assert_ne!(t.flags & flags::RF, 0, "the pushed RF");
            }
        }
        self.last = Some((start, self.cpu.clone()));
        self.taken()
    }

    /// [`Self::faults`] for a page fault at `cr2`.
    pub fn page_faults(&mut self, program: &Program, cr2: u64, error: u32) {
        self.faults(program, 14, error);
        assert_eq!(self.cpu.cr2, cr2, "CR2");
    }

    /// Values written to port E9H.
    pub fn reports(&self) -> Vec<u32> {
        self.board.written_to(0xE9)
    }

    /// 16, 32 or 64.
    pub fn bits(&self) -> u32 {
        self.cpu.code_bits()
    }
}

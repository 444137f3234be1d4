//! A guest in which user-mode code sees what it would see in this process: the same linear addresses, flat
//! segments with Linux's selectors, long mode, and an IDT whose handlers halt.

use super::Outcome;
use crate::host::{
    CODE_LIMIT_16, DATA_BASE_16, DATA_LIMIT_16, NativeLayout, NativeMode, NativeState, NativeStop,
    SELECTORS_16,
};
use paravane_cpu::{Board, Budget, CpuState, Engine, Exit, SegReg, Segment, attr, cr0, cr4, efer, flags};
use paravane_memory::{GuestMemory, MemoryConfig, PhysAddr, RamOffset};
use std::io;

const PAGE: u64 = 4096;
/// Where the supervisor's pages (GDT, IDT, TSS, handlers, stack) appear, in this order.
const KERNEL: u64 = 0xFFFF_8000_0000_0000;
const KERNEL_PHYS: u64 = 0x10_0000;
const KERNEL_PAGES: u64 = 6;
const IDT: u64 = KERNEL + PAGE;
const TSS: u64 = KERNEL + 2 * PAGE;
const HANDLERS: u64 = KERNEL + 3 * PAGE;
const STACK_TOP: u64 = KERNEL + KERNEL_PAGES * PAGE;
const CODE_PHYS: u64 = 0x20_0000;
/// The arena is the end of RAM: what crosses it would leave the host's mapping.
const DATA_PHYS: u64 = RAM - 3 * PAGE;
const RAM: u64 = 8 << 20;
const TABLES_PHYS: u64 = 0x1000;
const VECTORS: u64 = 32;

/// Page-table entry bits (SDM 3A, table 4-20).
mod pte {
    pub const P: u64 = 1 << 0;
    pub const RW: u64 = 1 << 1;
    pub const US: u64 = 1 << 2;
    pub const XD: u64 = 1 << 63;
    pub const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
}

/// Guest memory laid out, and the state to start from.
pub struct Guest {
    memory: GuestMemory,
    layout: NativeLayout,
    template: CpuState,
    next_table: u64,
    /// Where the entries of the arena's read-only pages lie.
    read_only: Vec<u64>,
}

impl Guest {
    /// Builds the page tables and descriptor tables.
    pub fn new(layout: NativeLayout) -> io::Result<Guest> {
        assert_eq!(DATA_PHYS + layout.data_len(), RAM, "an arena of three pages");
        let memory = GuestMemory::new(MemoryConfig::pc(RAM))?;
        let template = CpuState::reset(0);
        let mut guest =
            Guest { memory, layout, template, next_table: TABLES_PHYS + PAGE, read_only: Vec::new() };
        let writable = layout.writable_pages;
        guest.map(layout.code, CODE_PHYS, 1, pte::P | pte::US);
        guest.map(layout.data, DATA_PHYS, writable, pte::P | pte::US | pte::RW | pte::XD);
        let rest = writable * PAGE;
        let pages = layout.read_only_pages;
        guest.read_only = guest.map(layout.data + rest, DATA_PHYS + rest, pages, pte::P | pte::US | pte::XD);
        guest.map(KERNEL, KERNEL_PHYS, KERNEL_PAGES, pte::P | pte::RW);
        guest.descriptor_tables();
        guest.template = guest.user_state();
        Ok(guest)
    }

    /// The guest's memory, to build engines on.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Where the host has the arena.
    pub fn host_arena(&self) -> u64 {
        self.memory.host_base() as u64 + DATA_PHYS
    }

    /// Runs `case` until the exception that ends it, and puts into `outcome` where that was; RIP and registers if none does.
    pub fn run(
        &self,
        engine: &mut dyn Engine,
        mode: NativeMode,
        case: &GuestCase<'_>,
        outcome: &mut Outcome,
    ) -> Result<(), Exit> {
        self.write(CODE_PHYS, case.code_page);
        self.write(DATA_PHYS, case.arena);
        engine.invalidate(RamOffset(CODE_PHYS));
        self.go(engine, mode, case.state, case.rip, outcome)
    }

    /// The page fault that [`Self::run`] ended with is mended as an operating system would: the arena's read-only pages
    /// become writable, without a word to the engine, and what faulted goes on. `outcome` is where it was and where it comes.
    pub fn mend(&self, engine: &mut dyn Engine, mode: NativeMode, outcome: &mut Outcome) -> Result<(), Exit> {
        let entries: Vec<u64> = self.read_only.iter().map(|&at| self.read_u64(at)).collect();
        for (&at, entry) in self.read_only.iter().zip(&entries) {
            self.write_u64(at, entry | pte::RW);
        }
        let (state, rip) = (outcome.state.clone(), outcome.stop.rip);
        let ended = self.go(engine, mode, &state, rip, outcome);
        for (&at, &entry) in self.read_only.iter().zip(&entries) {
            self.write_u64(at, entry);
        }
        engine.flush_translations();
        ended
    }

    fn go(
        &self,
        engine: &mut dyn Engine,
        mode: NativeMode,
        state: &NativeState,
        rip: u64,
        outcome: &mut Outcome,
    ) -> Result<(), Exit> {
        let mut cpu = self.template.clone();
        self.set_segments(&mut cpu, mode);
        cpu.gpr = state.gpr;
        cpu.rflags = state.rflags | flags::FIXED | flags::IF;
        cpu.fpu.clone_from(&state.fpu);
        cpu.rip = rip;
        match engine.run(&mut cpu, &self.memory, &Board::default(), Budget::UNLIMITED) {
            Exit::Halt => {
                self.outcome(&cpu, outcome);
                Ok(())
            }
            other => {
                outcome.stop.rip = cpu.rip;
                outcome.state.gpr = cpu.gpr;
                Err(other)
            }
        }
    }

    /// What Linux's GDT, or our LDT, describes.
    fn set_segments(&self, cpu: &mut CpuState, mode: NativeMode) {
        match mode {
            NativeMode::Long => {}
            NativeMode::Protected32 => {
                cpu.seg[SegReg::Cs as usize] = Segment::flat(0x23, 0xFB | attr::DB | attr::G);
            }
            NativeMode::Protected16 => {
                let base = self.layout.data - DATA_BASE_16;
                let data = Segment {
                    base,
                    limit: u32::from(DATA_LIMIT_16),
                    attributes: 0xF3,
                    selector: SELECTORS_16.1,
                };
                for register in [SegReg::Ds, SegReg::Es, SegReg::Ss] {
                    cpu.seg[register as usize] = data;
                }
                cpu.seg[SegReg::Cs as usize] = Segment {
                    base: self.layout.code,
                    limit: u32::from(CODE_LIMIT_16),
                    attributes: 0xFB,
                    selector: SELECTORS_16.0,
                };
            }
        }
    }

    /// What the handler finds: the vector by its address, the interrupted context in its stack frame.
    fn outcome(&self, cpu: &CpuState, outcome: &mut Outcome) {
        let vector = (cpu.rip.wrapping_sub(HANDLERS) / 16) as u8;
        let has_code = matches!(vector, 8 | 10..=14 | 17 | 21);
        let frame = cpu.gpr[4];
        let slot = |n: u64| {
            let at = frame.wrapping_add(n * 8).wrapping_sub(KERNEL).wrapping_add(KERNEL_PHYS);
            self.memory.read_u64(PhysAddr(at)).unwrap_or(0)
        };
        let first = u64::from(has_code);
        outcome.stop = NativeStop {
            vector,
            error_code: if has_code { slot(0) as u32 } else { 0 },
            address: if vector == 14 { cpu.cr2 } else { 0 },
            rip: slot(first),
        };
        outcome.state.gpr = cpu.gpr;
        outcome.state.gpr[4] = slot(first + 3);
        outcome.state.rflags = slot(first + 2);
        outcome.state.fpu.clone_from(&cpu.fpu);
        outcome.state.fpu.0[6..24].fill(0);
        outcome.arena.resize(self.layout.data_len() as usize, 0);
        self.memory.read(PhysAddr(DATA_PHYS), &mut outcome.arena).expect("the arena is RAM");
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write(PhysAddr(at), bytes).expect("the guest's own RAM");
    }

    fn write_u64(&self, at: u64, value: u64) {
        self.write(at, &value.to_le_bytes());
    }

    fn read_u64(&self, at: u64) -> u64 {
        self.memory.read_u64(PhysAddr(at)).expect("the guest's own RAM")
    }

    /// Maps pages and returns where their entries lie.
    fn map(&mut self, linear: u64, phys: u64, pages: u64, bits: u64) -> Vec<u64> {
        let map_one = |page: u64| {
            let mut table = TABLES_PHYS;
            for level in [39, 30, 21] {
                table = self.table_below(table, (linear + page * PAGE) >> level & 511);
            }
            let index = (linear + page * PAGE) >> 12 & 511;
            self.write_u64(table + index * 8, (phys + page * PAGE) | bits);
            table + index * 8
        };
        (0..pages).map(map_one).collect()
    }

    /// The table that entry `index` of `table` points to, made if absent.
    fn table_below(&mut self, table: u64, index: u64) -> u64 {
        let at = table + index * 8;
        let entry = self.read_u64(at);
        if entry & pte::P != 0 {
            return entry & pte::ADDRESS;
        }
        let new = self.next_table;
        self.next_table += PAGE;
        self.write_u64(at, new | pte::P | pte::RW | pte::US);
        new
    }

    fn descriptor_tables(&self) {
        // Linux's order: 0x10 kernel code, 0x18 kernel data, 0x23 user 32, 0x2B user data, 0x33 user 64, 0x40 TSS.
        let gdt: [u64; 10] = [
            0,
            0,
            0x00AF_9B00_0000_FFFF,
            0x00CF_9300_0000_FFFF,
            0x00CF_FB00_0000_FFFF,
            0x00CF_F300_0000_FFFF,
            0x00AF_FB00_0000_FFFF,
            0,
            0x67 | (TSS & 0xFF_FFFF) << 16 | 0x8B << 40 | (TSS >> 24 & 0xFF) << 56,
            TSS >> 32,
        ];
        for (slot, descriptor) in gdt.iter().enumerate() {
            self.write_u64(KERNEL_PHYS + slot as u64 * 8, *descriptor);
        }
        for vector in 0..VECTORS {
            let handler = HANDLERS + vector * 16;
            let dpl = if matches!(vector, 3 | 4) { 0xEE00 } else { 0x8E00 };
            let low = handler & 0xFFFF | 0x10 << 16 | dpl << 32 | (handler >> 16 & 0xFFFF) << 48;
            let gate = KERNEL_PHYS + PAGE + vector * 16;
            self.write_u64(gate, low);
            self.write_u64(gate + 8, handler >> 32);
        }
        // RSP0 at offset 4; the I/O map base lies behind the limit: every port access from user mode faults.
        self.write(KERNEL_PHYS + 2 * PAGE + 4, &STACK_TOP.to_le_bytes());
        self.write(KERNEL_PHYS + 2 * PAGE + 0x66, &0x68u16.to_le_bytes());
        self.write(KERNEL_PHYS + 3 * PAGE, &[0xF4; PAGE as usize]);
    }

    fn user_state(&self) -> CpuState {
        let mut cpu = CpuState::reset(0);
        let data = Segment::flat(0x2B, 0xF3 | attr::DB | attr::G);
        cpu.seg = [data; 6];
        cpu.seg[SegReg::Cs as usize] = Segment::flat(0x33, 0xFB | attr::L | attr::G);
        cpu.seg[SegReg::Fs as usize] = Segment::default();
        cpu.seg[SegReg::Gs as usize] = Segment::default();
        cpu.tr = Segment { base: TSS, limit: 0x67, attributes: 0x8B, selector: 0x40 };
        cpu.ldtr = Segment::default();
        cpu.gdtr.base = KERNEL;
        cpu.gdtr.limit = 79;
        cpu.idtr.base = IDT;
        cpu.idtr.limit = (VECTORS * 16 - 1) as u16;
        cpu.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
        cpu.cr3 = TABLES_PHYS;
        cpu.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        cpu.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
        cpu.xcr0 = 7;
        cpu.cpl = 3;
        cpu
    }
}

/// One case as a guest runs it.
pub struct GuestCase<'a> {
    /// The whole code page.
    pub code_page: &'a [u8],
    /// The whole arena.
    pub arena: &'a [u8],
    /// Registers before.
    pub state: &'a NativeState,
    /// Where to start.
    pub rip: u64,
}

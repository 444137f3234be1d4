//! A bare processor with memory for unit tests.

use crate::board::Board;
use crate::core::{Core, Step, Unit};
use crate::cpuid::{HostFeatures, model_by_name};
use crate::engine::{Attention, VectorUnit};
use crate::exec::Exec;
use crate::fault::Fault;
use crate::mmu::{Flushes, PagingFeatures, Tlb};
use crate::state::{CpuState, DescriptorTable, FpuState, SegReg, Segment, cr0};
use paravane_memory::{GuestMemory, MemoryConfig, PhysAddr, VpIndex};

/// A vector unit that has nothing.
pub(crate) struct NoVector;

impl VectorUnit for NoVector {
    fn execute(
        &mut self,
        _: &[u8],
        _: &mut FpuState,
        _: &mut [u64; 16],
        _: &mut u64,
        _: &mut [u8; 512],
    ) -> Result<(), Fault> {
        Err(Fault::UD)
    }
    fn sync(&mut self, _: &mut FpuState, _: VpIndex) {}
    fn changed(&mut self, _: &FpuState, _: VpIndex) {}
}

/// GDT at 1000H (16 entries), IDT at 2000H, TSS at 3000H, code goes to 8000H, stack below 7000H.
pub(crate) struct Bed {
    pub cpu: CpuState,
    pub mem: GuestMemory,
    pub bus: Board,
    pub core: Core,
    pub attention: Attention,
}

pub(crate) const GDT: u64 = 0x1000;
pub(crate) const IDT: u64 = 0x2000;
pub(crate) const TSS: u64 = 0x3000;
pub(crate) const CODE: u64 = 0x8000;

impl Bed {
    /// Real mode at 0:8000H, stack at 0:7000H.
    pub fn real() -> Bed {
        let mem = GuestMemory::new(MemoryConfig::pc(4 << 20)).expect("memory");
        let model = model_by_name("max", &HostFeatures::everything()).expect("max");
        let attention = Attention::default();
        let core = Core::new(model, Box::new(NoVector), attention.clone(), VpIndex(0));
        let mut cpu = CpuState::reset(0);
        for s in &mut cpu.seg {
            *s = Segment::real(0);
        }
        cpu.rip = CODE;
        cpu.gpr[4] = 0x7000;
        cpu.idtr = DescriptorTable { base: 0, limit: 0x3FF };
        Bed { cpu, mem, bus: Board::default(), core, attention }
    }

    /// Flat 32-bit protected mode without paging at CPL 0. Selectors 8 and 10H are code and data of DPL 0, 1BH and
    /// 3BH of DPL 3, 40H a busy 32-bit TSS with SS0:ESP0 = 10H:6000H.
    pub fn protected() -> Bed {
        let mut bed = Bed::real();
        let cpu = &mut bed.cpu;
        cpu.cr0 |= cr0::PE;
        cpu.gdtr = DescriptorTable { base: GDT, limit: 0x7F };
        cpu.idtr = DescriptorTable { base: IDT, limit: 0x7FF };
        cpu.seg = [Segment::flat(0x10, 0xC093); 6];
        cpu.seg[SegReg::Cs as usize] = Segment::flat(8, 0xC09B);
        cpu.tr = Segment { base: TSS, limit: 0x67, attributes: 0x8B, selector: 0x40 };
        bed.gdt(1, 0x00CF_9B00_0000_FFFF);
        bed.gdt(2, 0x00CF_9300_0000_FFFF);
        bed.gdt(3, 0x00CF_FB00_0000_FFFF);
        bed.gdt(7, 0x00CF_F300_0000_FFFF);
        bed.gdt(8, 0x0000_8B00_3000_0067);
        bed.put(TSS + 4, &0x6000u32.to_le_bytes());
        bed.put(TSS + 8, &0x10u32.to_le_bytes());
        bed
    }

    /// Runs the processor at CPL 3 in the flat segments.
    pub fn user(&mut self) {
        self.cpu.seg = [Segment::flat(0x3B, 0xC0F3); 6];
        self.cpu.seg[SegReg::Cs as usize] = Segment::flat(0x1B, 0xC0FB);
        self.cpu.cpl = 3;
    }

    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        self.mem.write(PhysAddr(at), bytes).expect("RAM");
    }

    pub fn get32(&self, at: u64) -> u32 {
        self.mem.read_u32(PhysAddr(at)).expect("RAM")
    }

    pub fn get64(&self, at: u64) -> u64 {
        self.mem.read_u64(PhysAddr(at)).expect("RAM")
    }

    pub fn gdt(&mut self, i: u64, raw: u64) {
        self.put(GDT + i * 8, &raw.to_le_bytes());
    }

    pub fn gdt_entry(&self, i: u64) -> u64 {
        self.get64(GDT + i * 8)
    }

    /// A gate of `kind` and `dpl` to `selector:offset`.
    pub fn gate(&mut self, vector: u64, kind: u64, dpl: u64, selector: u64, offset: u64) {
        let raw = (offset & 0xFFFF) | selector << 16 | (0x80 | dpl << 5 | kind) << 40 | (offset >> 16) << 48;
        self.put(IDT + vector * 8, &raw.to_le_bytes());
    }

    /// Places `code` at RIP (flat) and executes one instruction.
    pub fn run(&mut self, code: &[u8]) -> Step {
        let at = self.cpu.segment(SegReg::Cs).base + self.cpu.rip;
        self.put(at, code);
        self.step()
    }

    pub fn step(&mut self) -> Step {
        self.core.step(&mut self.cpu, &self.mem, &self.bus)
    }

    pub fn poll(&mut self) -> Step {
        self.core.poll(&mut self.cpu, &self.mem, &self.bus)
    }

    /// Calls `f` with an instruction in progress.
    pub fn with<T>(&mut self, f: impl FnOnce(&mut Exec<'_>) -> T) -> T {
        let mut unit = Unit {
            model: self.core.model().clone(),
            vector: Box::new(NoVector),
            attention: self.attention.clone(),
            vp: VpIndex(0),
            tlb: Tlb::new(PagingFeatures::ALL),
            flushes: Flushes::default(),
            plan: Default::default(),
            tracer: None,
            traced_at: Default::default(),
        };
        let next = self.cpu.rip;
        f(&mut unit.exec(&mut self.cpu, &self.mem, &self.bus, next))
    }
}

//! The processor state in which a kernel starts, as plain data.

/// Processor mode at entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Real mode.
    Real16,
    /// 32-bit protected mode, paging off.
    Protected32,
    /// 64-bit mode, paging on.
    Long64,
}

/// General registers at entry; those not set are zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[expect(missing_docs, reason = "register names")]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rbp: u64,
}

/// A segment register with its descriptor cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Base.
    pub base: u64,
    /// Last offset in bytes.
    pub limit: u32,
    /// Descriptor bits 40-47 (type, S, DPL, P) in bits 7:0 and 52-55 (AVL, L, D/B, G) in bits 15:12.
    pub attributes: u16,
    /// Selector.
    pub selector: u16,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DescriptorTable {
    /// Linear base.
    pub base: u64,
    /// Last byte offset.
    pub limit: u16,
}

/// How the processor starts the loaded program. Interrupts are off, RFLAGS is 2, every other register has its reset value.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Mode.
    pub mode: Mode,
    /// First instruction (offset into `cs`).
    pub rip: u64,
    /// Stack pointer (offset into the data segment).
    pub rsp: u64,
    /// The other general registers.
    pub registers: Registers,
    /// Code segment.
    pub cs: Segment,
    /// DS, ES, SS, FS and GS.
    pub data: Segment,
    /// Task register: a busy 32-bit TSS of limit 0x67 at 0 outside real mode (PVH asks for one).
    pub tr: Segment,
    /// Descriptor table.
    pub gdtr: DescriptorTable,
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
}

/// Selector of the flat code segment, Linux's `__BOOT_CS`.
pub(super) const BOOT_CS: u16 = 0x10;
/// Selector of the flat data segment, Linux's `__BOOT_DS`.
pub(super) const BOOT_DS: u16 = 0x18;
const BOOT_TSS: u16 = 0x20;

const CODE32: u16 = 0xC09B;
const CODE64: u16 = 0xA09B;
const DATA: u16 = 0xC093;
const TSS_BUSY: u16 = 0x008B;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

impl Segment {
    const fn flat(selector: u16, attributes: u16) -> Segment {
        Segment { base: 0, limit: u32::MAX, attributes, selector }
    }

    const fn real(selector: u16) -> Segment {
        Segment { base: (selector as u64) << 4, limit: 0xFFFF, attributes: 0x93, selector }
    }

    const fn tss() -> Segment {
        Segment { base: 0, limit: 0x67, attributes: TSS_BUSY, selector: BOOT_TSS }
    }

    /// The eight bytes of the descriptor (SDM 3A 3.4.5).
    fn descriptor(&self) -> u64 {
        let granular = self.attributes & 0x8000 != 0;
        let limit = u64::from(if granular { self.limit >> 12 } else { self.limit });
        (limit & 0xFFFF)
            | (self.base & 0xFF_FFFF) << 16
            | u64::from(self.attributes & 0xF0FF) << 40
            | (limit >> 16 & 0xF) << 48
            | (self.base >> 24 & 0xFF) << 56
    }
}

/// The descriptor table that [`Entry::protected32`] and [`Entry::long64`] start with.
pub(super) fn gdt(mode: Mode) -> [u64; 5] {
    let code = if mode == Mode::Long64 { CODE64 } else { CODE32 };
    [
        0,
        0,
        Segment::flat(BOOT_CS, code).descriptor(),
        Segment::flat(BOOT_DS, DATA).descriptor(),
        Segment::tss().descriptor(),
    ]
}

impl Entry {
    /// Real mode at the linear address `at`, IP = `at`'s offset into segment 0 where it fits.
    pub(super) fn real16(at: u64) -> Entry {
        let selector = if at < 0x1_0000 { 0 } else { (at >> 4) as u16 };
        Entry {
            mode: Mode::Real16,
            rip: at - (u64::from(selector) << 4),
            rsp: 0x7C00,
            registers: Registers::default(),
            cs: Segment { attributes: 0x9B, ..Segment::real(selector) },
            data: Segment::real(0),
            tr: Segment { base: 0, limit: 0xFFFF, attributes: 0x8B, selector: 0 },
            gdtr: DescriptorTable { base: 0, limit: 0xFFFF },
            cr0: CR0_ET,
            cr3: 0,
            cr4: 0,
            efer: 0,
        }
    }

    /// Flat 32-bit protected mode.
    pub(super) fn protected32(rip: u64, gdtr: DescriptorTable) -> Entry {
        Entry {
            mode: Mode::Protected32,
            rip,
            rsp: super::place::STACK_TOP,
            cs: Segment::flat(BOOT_CS, CODE32),
            data: Segment::flat(BOOT_DS, DATA),
            tr: Segment::tss(),
            gdtr,
            cr0: CR0_PE | CR0_ET,
            ..Entry::real16(0)
        }
    }

    /// 64-bit mode with the page tables at `cr3`.
    pub(super) fn long64(rip: u64, gdtr: DescriptorTable, cr3: u64) -> Entry {
        Entry {
            mode: Mode::Long64,
            cs: Segment::flat(BOOT_CS, CODE64),
            cr0: CR0_PE | CR0_ET | CR0_NE | CR0_PG,
            cr3,
            cr4: CR4_PAE,
            efer: EFER_LME | EFER_LMA,
            ..Entry::protected32(rip, gdtr)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_manual() {
        assert_eq!(gdt(Mode::Protected32)[2..4], [0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF]);
        assert_eq!(gdt(Mode::Long64)[2], 0x00AF_9B00_0000_FFFF);
        assert_eq!(gdt(Mode::Long64)[4], 0x0000_8B00_0000_0067);
    }

    #[test]
    fn real_mode_entry_reaches_its_linear_address() {
        for at in [0x7C00, 0xFFFF, 0x1_0000, 0xF_FFF0] {
            let entry = Entry::real16(at);
            assert_eq!(entry.cs.base + entry.rip, at);
            assert!(entry.rip < 0x1_0000);
        }
    }
}

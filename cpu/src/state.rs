//! The architectural state of one vCPU (SDM 3A, chapters 2 to 4 and 17).
//!
//! Plain data: nothing here is derived, so a snapshot is a copy. Segment registers hold their descriptor
//! caches, as the hardware does.

use std::fmt;

/// A linear address: after segmentation, before paging.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct LinAddr(pub u64);

impl fmt::Debug for LinAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for LinAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Numbers of the general registers in instruction encodings and in [`CpuState::gpr`].
#[expect(missing_docs, reason = "register names")]
pub mod gpr {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
    pub const R8: usize = 8;
    pub const R15: usize = 15;
}

/// EFLAGS bits.
#[expect(missing_docs, reason = "the manual's names")]
pub mod flags {
    pub const CF: u64 = 1 << 0;
    /// Always one.
    pub const FIXED: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The six status flags.
    pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
}

/// CR0 bits.
#[expect(missing_docs, reason = "the manual's names")]
pub mod cr0 {
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// CR4 bits.
#[expect(missing_docs, reason = "the manual's names")]
pub mod cr4 {
    pub const VME: u64 = 1 << 0;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const LA57: u64 = 1 << 12;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
    pub const PKE: u64 = 1 << 22;
}

/// EFER bits.
#[expect(missing_docs, reason = "the manual's names")]
pub mod efer {
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
}

/// Segment registers, numbered as in instruction encodings.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[expect(missing_docs, reason = "register names")]
#[repr(u8)]
pub enum SegReg {
    Es = 0,
    Cs = 1,
    Ss = 2,
    Ds = 3,
    Fs = 4,
    Gs = 5,
}

/// A segment register: visible selector and hidden descriptor cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Segment {
    /// Segment base (zero-extended outside long mode).
    pub base: u64,
    /// Last offset, in bytes (granularity already applied).
    pub limit: u32,
    /// Descriptor bits 40–47 and 52–55 as in the upper double word, shifted right by 8: type 3:0, S 4, DPL 6:5,
    /// P 7, AVL 12, L 13, D/B 14, G 15. All zero after loading a null selector.
    pub attributes: u16,
    /// The selector.
    pub selector: u16,
}

/// Bits of [`Segment::attributes`].
#[expect(missing_docs, reason = "the manual's names")]
pub mod attr {
    /// Type bit 0 of code and data segments.
    pub const ACCESSED: u16 = 1 << 0;
    /// Readable (code) or writable (data).
    pub const READ_WRITE: u16 = 1 << 1;
    /// Conforming (code) or expand-down (data).
    pub const CONFORM_EXPAND: u16 = 1 << 2;
    /// Code segment.
    pub const CODE: u16 = 1 << 3;
    /// Code or data, not a system segment.
    pub const S: u16 = 1 << 4;
    pub const DPL_SHIFT: u32 = 5;
    pub const P: u16 = 1 << 7;
    pub const AVL: u16 = 1 << 12;
    pub const L: u16 = 1 << 13;
    pub const DB: u16 = 1 << 14;
    pub const G: u16 = 1 << 15;
}

impl Segment {
    /// Descriptor privilege level.
    pub const fn dpl(&self) -> u8 {
        ((self.attributes >> attr::DPL_SHIFT) & 3) as u8
    }

    /// Loaded with a present descriptor (false after a null selector).
    pub const fn present(&self) -> bool {
        self.attributes & attr::P != 0
    }

    /// D/B bit.
    pub const fn big(&self) -> bool {
        self.attributes & attr::DB != 0
    }

    /// What `selector` loads if its descriptor in the table is `raw` (SDM 3A, figure 3-8).
    pub const fn of_descriptor(selector: u16, raw: u64) -> Segment {
        let limit = (raw & 0xFFFF | raw >> 32 & 0xF_0000) as u32;
        let attributes = (raw >> 40) as u16 & 0xF0FF;
        let base = raw >> 16 & 0xFF_FFFF | raw >> 32 & 0xFF00_0000;
        let limit = if attributes & attr::G != 0 { limit << 12 | 0xFFF } else { limit };
        Segment { base, limit, attributes, selector }
    }

    /// A flat 4 GiB segment with these attributes.
    pub const fn flat(selector: u16, attributes: u16) -> Segment {
        Segment { base: 0, limit: u32::MAX, attributes, selector }
    }

    /// A real-mode segment: base 16 x selector, 64 KiB, readable and writable.
    pub const fn real(selector: u16) -> Segment {
        Segment { base: (selector as u64) << 4, limit: 0xFFFF, attributes: 0x93, selector }
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct DescriptorTable {
    /// Linear base.
    pub base: u64,
    /// Last byte offset.
    pub limit: u16,
}

/// x87, SSE and AVX state as an XSAVE area in standard format: legacy 512 bytes, header 64, AVX at 576.
#[derive(Clone, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct FpuState(pub [u8; FpuState::SIZE]);

impl FpuState {
    /// Bytes of the area.
    pub const SIZE: usize = 832;

    /// State after FNINIT and power-on: FCW 0x37F here as after FNINIT (power-on gives 0x40), MXCSR 0x1F80.
    pub fn initial() -> FpuState {
        let mut area = [0; Self::SIZE];
        area[0..2].copy_from_slice(&0x37Fu16.to_le_bytes());
        area[24..28].copy_from_slice(&0x1F80u32.to_le_bytes());
        area[28..32].copy_from_slice(&0xFFFFu32.to_le_bytes());
        FpuState(area)
    }

    /// IE to PE and SF of the x87 status word.
    pub(crate) fn x87_exceptions(&self) -> u8 {
        self.0[2] & 0x7F
    }

    /// Sets them, and ES and B as follows from the masks (SDM 1, 8.1.3).
    pub(crate) fn set_x87_exceptions(&mut self, flags: u8) {
        let error = flags & !self.0[0] & 0x3F != 0;
        self.0[2] = flags | u8::from(error) << 7;
        self.0[3] = self.0[3] & 0x7F | u8::from(error) << 7;
    }

    /// MXCSR.
    pub fn mxcsr(&self) -> u32 {
        u32::from_le_bytes(self.0[24..28].try_into().expect("four bytes"))
    }

    /// Sets MXCSR.
    pub fn set_mxcsr(&mut self, v: u32) {
        self.0[24..28].copy_from_slice(&v.to_le_bytes());
    }
}

impl fmt::Debug for FpuState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FpuState {{ mxcsr: {:#x} }}", self.mxcsr())
    }
}

/// The x87 instruction and data pointers and the last opcode, which are not in [`FpuState`]: its bytes 5 to 23 are zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct FpuPointers {
    /// FIP: offset of the instruction.
    pub ip: u64,
    /// FDP: offset of its memory operand.
    pub dp: u64,
    /// FCS: selector of the instruction's segment.
    pub cs: u16,
    /// FDS: selector of the operand's segment.
    pub ds: u16,
    /// FOP: eleven bits of the opcode.
    pub opcode: u16,
}

/// Model-specific registers that are part of the core (others belong to the machine).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[repr(C)]
#[expect(missing_docs, reason = "the manual's names")]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub tsc_aux: u64,
    pub tsc_adjust: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub spec_ctrl: u64,
    pub debugctl: u64,
    pub mtrr_def_type: u64,
    pub mtrr_fixed: [u64; 11],
    pub mtrr_variable: [u64; 16],
    pub xss: u64,
}

/// What keeps the next instruction from being interrupted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum Shadow {
    /// Nothing.
    #[default]
    None = 0,
    /// The instruction before was an STI that enabled interrupts.
    Sti = 1,
    /// The instruction before loaded SS: debug traps are held back too.
    MovSs = 2,
}

/// The complete architectural state of one vCPU.
#[derive(Clone, PartialEq, Debug)]
#[repr(C)]
#[expect(missing_docs, reason = "the manual's names")]
pub struct CpuState {
    /// General registers by encoding number.
    pub gpr: [u64; 16],
    /// Offset in CS of the next instruction.
    pub rip: u64,
    /// EFLAGS, all bits current.
    pub rflags: u64,
    /// By [`SegReg`].
    pub seg: [Segment; 6],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: DescriptorTable,
    pub idtr: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub xcr0: u64,
    /// DR0–DR3, then DR6 at 6 and DR7 at 7 (4 and 5 unused).
    pub dr: [u64; 8],
    /// The four PDPTEs loaded at MOV CR3 under PAE paging.
    pub pdptes: [u64; 4],
    pub msr: Msrs,
    pub fpu: FpuState,
    pub fpu_pointers: FpuPointers,
    /// Current privilege level.
    pub cpl: u8,
    pub shadow: Shadow,
    /// Waiting in HLT (or MWAIT).
    pub halted: bool,
    /// An NMI is being serviced: further ones wait for IRET.
    pub nmi_blocked: bool,
    pub vp: VpIndexRepr,
    /// Retired instructions.
    pub instructions: u64,
    /// Address lines above 19 masked bit 20 when false.
    pub a20: bool,
    /// IGNNE# is driven for an x87 error that is still pending: instructions do not wait for it.
    pub ignne: bool,
}

/// The number of this vCPU as plain data.
pub type VpIndexRepr = u32;

impl CpuState {
    /// State after power-on (SDM 3A, table 10-1): real mode, CS:IP = F000:FFF0, base FFFF0000.
    pub fn reset(vp: u32) -> CpuState {
        let data = Segment { base: 0, limit: 0xFFFF, attributes: 0x93, selector: 0 };
        let mut seg = [data; 6];
        seg[SegReg::Cs as usize] =
            Segment { base: 0xFFFF_0000, limit: 0xFFFF, attributes: 0x9B, selector: 0xF000 };
        let mut dr = [0; 8];
        dr[6] = 0xFFFF_0FF0;
        dr[7] = 0x400;
        CpuState {
            gpr: [0; 16],
            rip: 0xFFF0,
            rflags: flags::FIXED,
            seg,
            ldtr: Segment { base: 0, limit: 0xFFFF, attributes: 0x82, selector: 0 },
            tr: Segment { base: 0, limit: 0xFFFF, attributes: 0x8B, selector: 0 },
            gdtr: DescriptorTable { base: 0, limit: 0xFFFF },
            idtr: DescriptorTable { base: 0, limit: 0xFFFF },
            cr0: cr0::ET | cr0::NW | cr0::CD,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            xcr0: 1,
            dr,
            pdptes: [0; 4],
            msr: Msrs { pat: 0x0007_0406_0007_0406, misc_enable: 1, ..Msrs::default() },
            fpu: FpuState::initial(),
            fpu_pointers: FpuPointers::default(),
            cpl: 0,
            shadow: Shadow::None,
            halted: false,
            nmi_blocked: false,
            vp,
            instructions: 0,
            a20: true,
            ignne: false,
        }
    }

    /// INIT (SDM 3A, table 10-1): as after power-on, but x87, vector and model-specific registers keep their values, as do
    /// CR0.CD and NW, XCR0, and what is no register. EDX says what the processor is: `signature`, as CPUID leaf 1 has it.
    pub fn init(&mut self, signature: u32) {
        let reset = CpuState::reset(self.vp);
        let mut gpr = reset.gpr;
        gpr[gpr::RDX] = signature.into();
        *self = CpuState {
            gpr,
            cr0: self.cr0 & (cr0::CD | cr0::NW) | cr0::ET,
            xcr0: self.xcr0,
            msr: self.msr.clone(),
            fpu: self.fpu.clone(),
            fpu_pointers: self.fpu_pointers,
            instructions: self.instructions,
            a20: self.a20,
            ..reset
        };
    }

    /// A start-up IPI (SDM 3A, 11.4.4.1, step 15): real mode at `vector << 12`.
    pub fn start_up(&mut self, vector: u8) {
        self.seg[SegReg::Cs as usize] = Segment { attributes: 0x9B, ..Segment::real(u16::from(vector) << 8) };
        self.rip = 0;
    }

    /// Segment register `s`.
    pub fn segment(&self, s: SegReg) -> &Segment {
        &self.seg[s as usize]
    }

    /// CR0.PE.
    pub fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }

    /// CR0.PG.
    pub fn paging(&self) -> bool {
        self.cr0 & cr0::PG != 0
    }

    /// The current process-context identifier (SDM 3A, 4.10.1): 0 while CR4.PCIDE is clear.
    pub fn pcid(&self) -> u16 {
        if self.cr4 & cr4::PCIDE != 0 { (self.cr3 & 0xFFF) as u16 } else { 0 }
    }

    /// EFLAGS.VM in protected mode.
    pub fn v8086(&self) -> bool {
        self.rflags & flags::VM != 0
    }

    /// EFER.LMA: long mode, 64-bit or compatibility.
    pub fn long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// 64-bit mode proper.
    pub fn code64(&self) -> bool {
        self.long_mode() && self.segment(SegReg::Cs).attributes & attr::L != 0
    }

    /// Default operand and address size of CS in bits: 16, 32 or 64.
    pub fn code_bits(&self) -> u32 {
        if self.code64() {
            64
        } else if self.segment(SegReg::Cs).big() {
            32
        } else {
            16
        }
    }

    /// EFLAGS.IOPL.
    pub fn iopl(&self) -> u8 {
        ((self.rflags >> 12) & 3) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SDM 3A, table 10-1, column INIT.
    #[test]
    fn init_keeps_what_the_manual_keeps() {
        let mut cpu = CpuState::reset(3);
        cpu.gpr = [7; 16];
        cpu.fpu.set_mxcsr(0x1FA0);
        cpu.msr.tsc_adjust = 5;
        cpu.msr.pat = 0x0106;
        (cpu.xcr0, cpu.cr0, cpu.cr4, cpu.efer, cpu.cr3) = (7, 0x8005_0033, 0x20, efer::LMA, 0x1000);
        (cpu.rip, cpu.cpl, cpu.halted, cpu.nmi_blocked, cpu.a20) = (0x1234, 3, true, true, false);
        cpu.seg = [Segment::flat(8, 0xC093); 6];
        cpu.dr[7] = 0xFF;
        cpu.instructions = 99;
        cpu.init(0x106CA);
        let fresh = CpuState::reset(3);
        assert_eq!((cpu.fpu.mxcsr(), cpu.msr.tsc_adjust, cpu.msr.pat, cpu.xcr0), (0x1FA0, 5, 0x0106, 7));
        assert_eq!((cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer), (0x10, 0, 0, 0), "CD and NW were clear");
        assert_eq!((cpu.rip, cpu.seg, cpu.dr, cpu.rflags), (fresh.rip, fresh.seg, fresh.dr, fresh.rflags));
        assert_eq!((cpu.cpl, cpu.halted, cpu.nmi_blocked, cpu.a20), (0, false, false, false));
        assert_eq!((cpu.gpr[gpr::RDX], cpu.gpr[gpr::RAX], cpu.vp, cpu.instructions), (0x106CA, 0, 3, 99));
        let mut cached = CpuState::reset(0);
        cached.init(0);
        assert_eq!(cached.cr0, 0x6000_0010, "CD and NW were set");
    }

    #[test]
    fn a_start_up_ipi_names_a_page() {
        let mut cpu = CpuState::reset(1);
        cpu.start_up(0x9A);
        let cs = cpu.segment(SegReg::Cs);
        assert_eq!((cs.selector, cs.base, cs.limit, cpu.rip), (0x9A00, 0x9_A000, 0xFFFF, 0));
    }
}

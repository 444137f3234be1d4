//! The register file that the debugger sees: always the one of 64-bit mode, whatever the guest's mode is, so that nothing
//! changes under a debugger when the guest switches modes.
//!
//! RIP is linear (CS base added outside 64-bit mode), because that is what breakpoints and memory reads count in; the offset is
//! in `monitor registers`.

use paravane_cpu::{CpuState, SegReg, Segment, cr0, cr4, efer, gpr, instruction_address};
use std::fmt::Write;
use std::sync::LazyLock;

/// What a register is in [`CpuState`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    Gpr(usize),
    Rip,
    Flags,
    Selector(usize),
    Base(usize),
    /// Bytes of the XSAVE area.
    Fpu(usize),
    /// The full x87 tag word, made from the abridged one.
    Tags,
    KernelGsBase,
    Cr0,
    Cr2,
    Cr3,
    Cr4,
    /// In the local APIC: see [`get`].
    Cr8,
    Efer,
    Xcr0,
    Dr(usize),
    GdtBase,
    GdtLimit,
    IdtBase,
    IdtLimit,
    Ldt(SystemPart),
    Tr(SystemPart),
    Cpl,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum SystemPart {
    Selector,
    Base,
    Limit,
}

/// A register: its name, size and type for the debugger.
#[derive(Debug)]
pub struct Register {
    /// Its name.
    pub name: String,
    /// Bytes.
    pub size: usize,
    kind: &'static str,
    feature: &'static str,
    group: &'static str,
    place: Place,
    /// Where it starts in the `g` packet.
    offset: usize,
}

const CORE: &str = "org.gnu.gdb.i386.core";
const SSE: &str = "org.gnu.gdb.i386.sse";
const AVX: &str = "org.gnu.gdb.i386.avx";
const SEGMENTS: &str = "org.gnu.gdb.i386.segments";
const SYSTEM: &str = "org.paravane.system";

/// All registers in the order of their numbers.
pub static REGISTERS: LazyLock<Vec<Register>> = LazyLock::new(table);

/// Bytes of a `g` packet's content.
pub fn file_size() -> usize {
    REGISTERS.last().map_or(0, |r| r.offset + r.size)
}

fn table() -> Vec<Register> {
    let mut all: Vec<Register> = Vec::new();
    let mut add = |name: &str, size: usize, kind: &'static str, feature, group, place| {
        let offset = all.last().map_or(0, |r: &Register| r.offset + r.size);
        all.push(Register { name: name.to_owned(), size, kind, feature, group, place, offset });
    };
    let pointers = [("rbp", gpr::RBP), ("rsp", gpr::RSP)];
    for (name, n) in
        [("rax", 0), ("rbx", gpr::RBX), ("rcx", 1), ("rdx", 2), ("rsi", gpr::RSI), ("rdi", gpr::RDI)]
    {
        add(name, 8, "int64", CORE, "general", Place::Gpr(n));
    }
    for (name, n) in pointers {
        add(name, 8, "data_ptr", CORE, "general", Place::Gpr(n));
    }
    for n in 8..16 {
        add(&format!("r{n}"), 8, "int64", CORE, "general", Place::Gpr(n));
    }
    add("rip", 8, "code_ptr", CORE, "general", Place::Rip);
    add("eflags", 4, "i386_eflags", CORE, "general", Place::Flags);
    for (name, s) in [("cs", 1), ("ss", 2), ("ds", 3), ("es", 0), ("fs", 4), ("gs", 5)] {
        add(name, 4, "int32", CORE, "general", Place::Selector(s));
    }
    for n in 0..8 {
        add(&format!("st{n}"), 10, "i387_ext", CORE, "float", Place::Fpu(32 + 16 * n));
    }
    // FCW, FSW, FTW, FCS, FIP, FDS, FDP, FOP in the FXSAVE image (SDM 1, table 10-2).
    for (name, at) in [("fctrl", 0), ("fstat", 2)] {
        add(name, 4, "int", CORE, "float", Place::Fpu(at));
    }
    add("ftag", 4, "int", CORE, "float", Place::Tags);
    for (name, at) in [("fiseg", 12), ("fioff", 8), ("foseg", 20), ("fooff", 16), ("fop", 6)] {
        add(name, 4, "int", CORE, "float", Place::Fpu(at));
    }
    for n in 0..16 {
        add(&format!("xmm{n}"), 16, "vec128", SSE, "vector", Place::Fpu(160 + 16 * n));
    }
    add("mxcsr", 4, "i386_mxcsr", SSE, "vector", Place::Fpu(24));
    for n in 0..16 {
        add(&format!("ymm{n}h"), 16, "uint128", AVX, "vector", Place::Fpu(576 + 16 * n));
    }
    add("fs_base", 8, "int64", SEGMENTS, "general", Place::Base(SegReg::Fs as usize));
    add("gs_base", 8, "int64", SEGMENTS, "general", Place::Base(SegReg::Gs as usize));
    let wide = |p| (8, "uint64", p);
    let system = [
        ("k_gs_base", wide(Place::KernelGsBase)),
        ("cr0", (8, "cr0_flags", Place::Cr0)),
        ("cr2", wide(Place::Cr2)),
        ("cr3", wide(Place::Cr3)),
        ("cr4", (8, "cr4_flags", Place::Cr4)),
        ("cr8", wide(Place::Cr8)),
        ("efer", (8, "efer_flags", Place::Efer)),
        ("xcr0", wide(Place::Xcr0)),
        ("dr0", wide(Place::Dr(0))),
        ("dr1", wide(Place::Dr(1))),
        ("dr2", wide(Place::Dr(2))),
        ("dr3", wide(Place::Dr(3))),
        ("dr6", wide(Place::Dr(6))),
        ("dr7", wide(Place::Dr(7))),
        ("gdt_base", wide(Place::GdtBase)),
        ("gdt_limit", (4, "uint32", Place::GdtLimit)),
        ("idt_base", wide(Place::IdtBase)),
        ("idt_limit", (4, "uint32", Place::IdtLimit)),
        ("ldtr", (4, "uint32", Place::Ldt(SystemPart::Selector))),
        ("ldt_base", wide(Place::Ldt(SystemPart::Base))),
        ("ldt_limit", (4, "uint32", Place::Ldt(SystemPart::Limit))),
        ("tr", (4, "uint32", Place::Tr(SystemPart::Selector))),
        ("tss_base", wide(Place::Tr(SystemPart::Base))),
        ("tss_limit", (4, "uint32", Place::Tr(SystemPart::Limit))),
        ("cpl", (4, "uint32", Place::Cpl)),
    ];
    for (name, (size, kind, place)) in system {
        add(name, size, kind, SYSTEM, "system", place);
    }
    all
}

/// The number of the register called `name`.
pub fn by_name(name: &str) -> Option<usize> {
    let name = if name == "rflags" { "eflags" } else { name };
    REGISTERS.iter().position(|r| r.name == name)
}

fn le32(bytes: &[u8]) -> u64 {
    u64::from(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

/// The value of register `n`, its low eight bytes where it is wider.
pub fn value(cpu: &CpuState, n: usize) -> u64 {
    let Some(r) = REGISTERS.get(n) else { return 0 };
    let part = |s: &Segment, p| match p {
        SystemPart::Selector => u64::from(s.selector),
        SystemPart::Base => s.base,
        SystemPart::Limit => u64::from(s.limit),
    };
    match r.place {
        Place::Gpr(n) => cpu.gpr[n],
        Place::Rip => instruction_address(cpu).0,
        Place::Flags => cpu.rflags,
        Place::Selector(s) => u64::from(cpu.seg[s].selector),
        Place::Base(s) => cpu.seg[s].base,
        // 16-bit fields of the image.
        Place::Fpu(at) if at < 8 || at == 12 || at == 20 => {
            u64::from(u16::from_le_bytes([cpu.fpu.0[at], cpu.fpu.0[at + 1]]))
        }
        Place::Fpu(at) if r.size == 4 => le32(&cpu.fpu.0[at..]),
        Place::Fpu(at) => le32(&cpu.fpu.0[at..]) | le32(&cpu.fpu.0[at + 4..]) << 32,
        Place::Tags => u64::from(full_tags(cpu)),
        Place::KernelGsBase => cpu.msr.kernel_gs_base,
        Place::Cr0 => cpu.cr0,
        Place::Cr2 => cpu.cr2,
        Place::Cr3 => cpu.cr3,
        Place::Cr4 => cpu.cr4,
        Place::Cr8 => 0,
        Place::Efer => cpu.efer,
        Place::Xcr0 => cpu.xcr0,
        Place::Dr(n) => cpu.dr[n],
        Place::GdtBase => cpu.gdtr.base,
        Place::GdtLimit => u64::from(cpu.gdtr.limit),
        Place::IdtBase => cpu.idtr.base,
        Place::IdtLimit => u64::from(cpu.idtr.limit),
        Place::Ldt(p) => part(&cpu.ldtr, p),
        Place::Tr(p) => part(&cpu.tr, p),
        Place::Cpl => u64::from(cpu.cpl),
    }
}

/// Two bits for each physical register: 0 valid, 1 zero, 2 special, 3 empty (SDM 1, 8.1.7).
fn full_tags(cpu: &CpuState) -> u16 {
    let top = usize::from(cpu.fpu.0[3] >> 3 & 7);
    (0..8).fold(0, |tags, physical| {
        let at = 32 + 16 * ((physical + 8 - top) & 7);
        let exponent = u16::from_le_bytes([cpu.fpu.0[at + 8], cpu.fpu.0[at + 9]]) & 0x7FFF;
        let mantissa = le32(&cpu.fpu.0[at..]) | le32(&cpu.fpu.0[at + 4..]) << 32;
        let tag = match (cpu.fpu.0[4] >> physical & 1, exponent, mantissa) {
            (0, ..) => 3,
            (_, 0, 0) => 1,
            (_, 0x7FFF, _) => 2,
            (_, _, m) if m >> 63 == 0 => 2,
            _ => 0,
        };
        tags | tag << (2 * physical)
    })
}

/// The bytes of register `n` as the debugger wants them. `cr8` comes from the machine.
pub fn get(cpu: &CpuState, cr8: u64, n: usize) -> Vec<u8> {
    let Some(r) = REGISTERS.get(n) else { return Vec::new() };
    match r.place {
        Place::Fpu(at) if r.size > 8 => cpu.fpu.0[at..at + r.size].to_vec(),
        Place::Cr8 => cr8.to_le_bytes().to_vec(),
        _ => value(cpu, n).to_le_bytes()[..r.size].to_vec(),
    }
}

/// What a register write needs beyond the state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Written {
    /// Nothing.
    Done,
    /// Cached address translations must go.
    Paging,
    /// The machine's task priority becomes this.
    Cr8(u64),
    /// The value makes no sense, or the register is only shown.
    Refused,
}

/// Writes register `n`.
pub fn set(cpu: &mut CpuState, n: usize, bytes: &[u8]) -> Written {
    let Some(r) = REGISTERS.get(n) else { return Written::Refused };
    if bytes.len() != r.size {
        return Written::Refused;
    }
    let mut low = [0; 8];
    let len = r.size.min(8);
    low[..len].copy_from_slice(&bytes[..len]);
    let v = u64::from_le_bytes(low);
    if r.size <= 8
        && v == (value(cpu, n) & if r.size == 4 { 0xFFFF_FFFF } else { u64::MAX })
        && r.place != Place::Cr8
    {
        return Written::Done;
    }
    let canonical = ((v << 16) as i64 >> 16) as u64 == v;
    match r.place {
        Place::Gpr(n) => cpu.gpr[n] = v,
        Place::Rip if cpu.code64() && !canonical => return Written::Refused,
        Place::Rip if cpu.code64() => cpu.rip = v,
        Place::Rip => cpu.rip = v.wrapping_sub(cpu.segment(SegReg::Cs).base) & 0xFFFF_FFFF,
        Place::Flags => return set_flags(cpu, v),
        // A selector alone says nothing of the hidden part, but where both are the same.
        Place::Selector(s) if !cpu.protected() || cpu.v8086() => {
            cpu.seg[s].selector = v as u16;
            cpu.seg[s].base = (v & 0xFFFF) << 4;
        }
        Place::Base(s) if canonical => cpu.seg[s].base = v,
        Place::Fpu(at) if at < 8 || at == 12 || at == 20 => cpu.fpu.0[at..at + 2].copy_from_slice(&low[..2]),
        // MXCSR: reserved bits would fault when it is loaded.
        Place::Fpu(24) if v & !0xFFFF != 0 => return Written::Refused,
        Place::Fpu(at) => cpu.fpu.0[at..at + r.size].copy_from_slice(bytes),
        Place::Tags => {
            cpu.fpu.0[4] = (0..8).fold(0, |tags, n| tags | u8::from(v >> (2 * n) & 3 != 3) << n);
        }
        Place::KernelGsBase if canonical => cpu.msr.kernel_gs_base = v,
        Place::Cr2 => cpu.cr2 = v,
        Place::Cr3 if v >> 40 == 0 => {
            cpu.cr3 = v;
            return Written::Paging;
        }
        Place::Cr0 if legal_cr0(cpu, v) => {
            cpu.cr0 = v;
            return Written::Paging;
        }
        Place::Cr4 if v & !known_cr4() == 0 && (cpu.efer & efer::LMA == 0 || v & cr4::PAE != 0) => {
            cpu.cr4 = v;
            return Written::Paging;
        }
        Place::Efer if (v ^ cpu.efer) & !(efer::SCE | efer::NXE) == 0 => {
            cpu.efer = v;
            return Written::Paging;
        }
        Place::Cr8 if v <= 15 => return Written::Cr8(v),
        Place::Dr(n @ 0..=3) => cpu.dr[n] = v,
        // Fixed bits (SDM 3B, 17.2).
        Place::Dr(6) => cpu.dr[6] = (v & 0xE00F) | 0xFFFF_0FF0,
        Place::Dr(7) => cpu.dr[7] = (v & 0xFFFF_2BFF) | 0x400,
        Place::GdtBase if canonical => cpu.gdtr.base = v,
        Place::GdtLimit if v <= 0xFFFF => cpu.gdtr.limit = v as u16,
        Place::IdtBase if canonical => cpu.idtr.base = v,
        Place::IdtLimit if v <= 0xFFFF => cpu.idtr.limit = v as u16,
        _ => return Written::Refused,
    }
    Written::Done
}

/// VM, and what is reserved, stays as it is.
fn set_flags(cpu: &mut CpuState, v: u64) -> Written {
    const SETTABLE: u64 = 0x003D_7FD5;
    if (v ^ cpu.rflags) & !SETTABLE & 0xFFFF_FFFF != 0 {
        return Written::Refused;
    }
    cpu.rflags = (cpu.rflags & !SETTABLE) | (v & SETTABLE);
    Written::Done
}

/// The mode itself is not switched from outside: PE and PG stay.
fn legal_cr0(cpu: &CpuState, v: u64) -> bool {
    let known = cr0::MP | cr0::EM | cr0::TS | cr0::NE | cr0::WP | cr0::AM | cr0::NW | cr0::CD;
    (v ^ cpu.cr0) & !known == 0
}

fn known_cr4() -> u64 {
    CR4.iter().fold(0, |all, (_, bit)| all | 1 << bit)
}

const CR0: [(&str, u32); 11] = [
    ("PE", 0),
    ("MP", 1),
    ("EM", 2),
    ("TS", 3),
    ("ET", 4),
    ("NE", 5),
    ("WP", 16),
    ("AM", 18),
    ("NW", 29),
    ("CD", 30),
    ("PG", 31),
];
const CR4: [(&str, u32); 17] = [
    ("VME", 0),
    ("PVI", 1),
    ("TSD", 2),
    ("DE", 3),
    ("PSE", 4),
    ("PAE", 5),
    ("MCE", 6),
    ("PGE", 7),
    ("PCE", 8),
    ("OSFXSR", 9),
    ("OSXMMEXCPT", 10),
    ("UMIP", 11),
    ("FSGSBASE", 16),
    ("PCIDE", 17),
    ("OSXSAVE", 18),
    ("SMEP", 20),
    ("SMAP", 21),
];
const EFER: [(&str, u32); 4] = [("SCE", 0), ("LME", 8), ("LMA", 10), ("NXE", 11)];
const EFLAGS: [(&str, u32); 17] = [
    ("CF", 0),
    ("", 1),
    ("PF", 2),
    ("AF", 4),
    ("ZF", 6),
    ("SF", 7),
    ("TF", 8),
    ("IF", 9),
    ("DF", 10),
    ("OF", 11),
    ("NT", 14),
    ("RF", 16),
    ("VM", 17),
    ("AC", 18),
    ("VIF", 19),
    ("VIP", 20),
    ("ID", 21),
];
const MXCSR: [(&str, u32); 14] = [
    ("IE", 0),
    ("DE", 1),
    ("ZE", 2),
    ("OE", 3),
    ("UE", 4),
    ("PE", 5),
    ("DAZ", 6),
    ("IM", 7),
    ("DM", 8),
    ("ZM", 9),
    ("OM", 10),
    ("UM", 11),
    ("PM", 12),
    ("FZ", 15),
];

/// The names of the bits set in CR0, CR4 and EFER.
pub fn bit_names(cpu: &CpuState) -> [String; 3] {
    let names = |table: &[(&str, u32)], v: u64| {
        let set: Vec<&str> = table.iter().filter(|b| v >> b.1 & 1 != 0).map(|b| b.0).collect();
        set.join(" ")
    };
    [names(&CR0, cpu.cr0), names(&CR4, cpu.cr4), names(&EFER, cpu.efer)]
}

/// The target description (GDB manual, appendix G).
pub static TARGET_XML: LazyLock<String> = LazyLock::new(|| {
    let mut xml = String::from(
        "<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\"><target version=\"1.0\">\
         <architecture>i386:x86-64</architecture>",
    );
    let mut feature = "";
    for (n, r) in REGISTERS.iter().enumerate() {
        if r.feature != feature {
            if !feature.is_empty() {
                xml.push_str("</feature>");
            }
            feature = r.feature;
            // Writing to a string never fails.
            let _infallible = write!(xml, "<feature name=\"{feature}\">");
            xml.push_str(&types(feature));
        }
        let _infallible = write!(
            xml,
            "<reg name=\"{}\" bitsize=\"{}\" type=\"{}\" group=\"{}\" regnum=\"{n}\"/>",
            r.name,
            r.size * 8,
            r.kind,
            r.group
        );
    }
    xml.push_str("</feature></target>");
    xml
});

/// The types a feature's registers use.
fn types(feature: &str) -> String {
    let flags = |id: &str, size: u32, bits: &[(&str, u32)]| {
        let fields: String = bits
            .iter()
            .map(|(name, bit)| format!("<field name=\"{name}\" start=\"{bit}\" end=\"{bit}\"/>"))
            .collect();
        format!("<flags id=\"{id}\" size=\"{size}\">{fields}</flags>")
    };
    match feature {
        CORE => flags("i386_eflags", 4, &EFLAGS),
        SSE => {
            let vectors: String = [
                ("v4f", "ieee_single", 4),
                ("v2d", "ieee_double", 2),
                ("v16i8", "int8", 16),
                ("v8i16", "int16", 8),
                ("v4i32", "int32", 4),
                ("v2i64", "int64", 2),
            ]
            .iter()
            .map(|(id, of, count)| format!("<vector id=\"{id}\" type=\"{of}\" count=\"{count}\"/>"))
            .collect();
            let fields = "<field name=\"v4_float\" type=\"v4f\"/><field name=\"v2_double\" type=\"v2d\"/>\
                <field name=\"v16_int8\" type=\"v16i8\"/><field name=\"v8_int16\" type=\"v8i16\"/>\
                <field name=\"v4_int32\" type=\"v4i32\"/><field name=\"v2_int64\" type=\"v2i64\"/>\
                <field name=\"uint128\" type=\"uint128\"/>";
            format!("{vectors}<union id=\"vec128\">{fields}</union>{}", flags("i386_mxcsr", 4, &MXCSR))
        }
        SYSTEM => flags("cr0_flags", 8, &CR0) + &flags("cr4_flags", 8, &CR4) + &flags("efer_flags", 8, &EFER),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_core_features_hold_what_the_debugger_insists_on() {
        let core: Vec<&str> =
            REGISTERS.iter().filter(|r| r.feature == CORE).map(|r| r.name.as_str()).collect();
        assert_eq!(core.len(), 40);
        assert_eq!(
            (core[0], core[7], core[16], core[17], core[24], core[39]),
            ("rax", "rsp", "rip", "eflags", "st0", "fop")
        );
        assert_eq!(file_size(), REGISTERS.iter().map(|r| r.size).sum::<usize>());
    }

    #[test]
    fn rip_is_linear_outside_64_bit_mode() {
        let mut cpu = CpuState::reset(0);
        let rip = by_name("rip").expect("rip");
        assert_eq!(value(&cpu, rip), 0xFFFF_FFF0);
        assert_eq!(set(&mut cpu, rip, &0xFFFF_0010u64.to_le_bytes()), Written::Done);
        assert_eq!(cpu.rip, 0x10);
    }

    #[test]
    fn writes_that_would_make_an_impossible_state_are_refused() {
        let mut cpu = CpuState::reset(0);
        let mut write = |name: &str, v: u64, size: usize| {
            set(&mut cpu, by_name(name).expect("register"), &v.to_le_bytes()[..size])
        };
        assert_eq!(write("rbx", 7, 8), Written::Done);
        assert_eq!(write("cr0", 0x8000_0011, 8), Written::Refused);
        assert_eq!(write("cr0", 0x6000_0018, 8), Written::Paging);
        assert_eq!(write("eflags", 1 << 17 | 2, 4), Written::Refused);
        assert_eq!(write("mxcsr", 1 << 16, 4), Written::Refused);
        assert_eq!(write("fs_base", 1 << 47, 8), Written::Refused);
        assert_eq!(write("cr8", 3, 8), Written::Cr8(3));
        assert_eq!(write("cr8", 16, 8), Written::Refused);
        assert_eq!(write("tr", 8, 4), Written::Refused);
        assert_eq!(write("rbx", 7, 4), Written::Refused);
        assert_eq!(cpu.gpr[gpr::RBX], 7);
    }

    /// SDM 1, 8.1.7: after FNINIT all empty; a loaded 1.0 is valid, a loaded zero is zero.
    #[test]
    fn the_full_tag_word_follows_the_contents() {
        let mut cpu = CpuState::reset(0);
        assert_eq!(full_tags(&cpu), 0xFFFF);
        // TOP = 6: physical 6 is ST0, physical 7 is ST1.
        cpu.fpu.0[3] = 6 << 3;
        cpu.fpu.0[4] = 0xC0;
        cpu.fpu.0[32..42].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0x80, 0xFF, 0x3F]);
        assert_eq!(full_tags(&cpu), 0x4FFF);
    }
}

//! Both engines on random 16-bit and segmented 32-bit code: odd bases and limits, accesses across them, expand-down and
//! unusable segments, wrap-around of IP, SP and offsets (SDM 3A, 5.3; 3B, chapter 20).

use crate::bed::{Bed, DATA, GDT, Start};
use crate::wild::Random;
use paravane_cpu::{Exit, SegReg, Segment, flags, gpr};
use paravane_memory::PhysAddr;
use std::time::Duration;

/// What kind of code runs.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Kind {
    Real,
    Virtual8086,
    Protected16,
    Protected32,
}

/// Bytes compared.
const MEMORY: usize = 0x23_0000;

/// A well-formed ModRM byte with what belongs to it.
fn modrm(r: &mut Random, reg: Option<u8>, address32: bool, memory: bool) -> Vec<u8> {
    let reg = reg.unwrap_or(r.below(8) as u8);
    let mode = if memory { r.below(3) as u8 } else { r.of(&[0, 1, 2, 3, 3]) };
    let rm = r.below(8) as u8;
    let mut code = vec![mode << 6 | reg << 3 | rm];
    if mode == 3 {
        return code;
    }
    let mut displacement = match (mode, address32) {
        (0, false) if rm == 6 => 2,
        (0, true) if rm == 5 => 4,
        (1, _) => 1,
        (2, false) => 2,
        (2, true) => 4,
        _ => 0,
    };
    if address32 && rm == 4 {
        let sib = r.next() as u8;
        code.push(sib);
        if mode == 0 && sib & 7 == 5 {
            displacement = 4;
        }
    }
    match displacement {
        1 => code.push(r.next() as u8),
        2 => code.extend(offset(r).to_le_bytes()),
        4 => code.extend((u32::from(offset(r)) * u32::from(r.below(4) != 0)).to_le_bytes()),
        _ => {}
    }
    code
}

/// Offsets at the ends of segments, and others.
fn offset(r: &mut Random) -> u16 {
    match r.below(8) {
        0 => 0xFFFF - r.below(12) as u16,
        1 => r.below(12) as u16,
        2 => 0xFFF - r.below(12) as u16,
        3 => 0x1000 - r.below(8) as u16,
        _ => r.next() as u16,
    }
}

/// One instruction. Branches are short. Nothing reads a flag or result that the manual leaves undefined.
fn instruction(r: &mut Random, code32: bool) -> Vec<u8> {
    let mut code = Vec::new();
    let mut operand32 = code32;
    let mut address32 = code32;
    if r.below(20) == 0 {
        // A repetition of a few elements.
        let mut code = vec![0xB1, r.below(20) as u8, 0xB5, 0];
        if r.below(3) == 0 {
            code.push(if code32 { 0x67 } else { 0x66 });
        }
        code.extend([r.of(&[0xF2, 0xF3, 0xF3]), r.of(&[0xA4, 0xA5, 0xAA, 0xAB, 0xA6, 0xAE])]);
        return code;
    }
    if r.below(20) == 0 {
        // All flags are defined after CMP.
        let reader = r.of(&[0x9C, 0x9F, 0x27]);
        return vec![0x3C, r.next() as u8, reader, 0x3C, r.next() as u8];
    }
    if r.below(5) == 0 {
        code.push(0x66);
        operand32 = !operand32;
    }
    if r.below(6) == 0 {
        code.push(0x67);
        address32 = !address32;
    }
    if r.below(5) == 0 {
        code.push(r.of(&[0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65]));
    }
    if r.below(50) == 0 {
        code.push(0xF0);
    }
    if r.below(40) == 0 {
        // BT, BTS, BTC, of which only CF and ZF are defined.
        code.extend([0x0F, r.of(&[0xA3, 0xAB, 0xBB])]);
        code.extend(modrm(r, None, address32, false));
        code.extend([0x3C, r.next() as u8]);
        return code;
    }
    let word = |r: &mut Random| {
        if operand32 { r.next().to_le_bytes()[..4].to_vec() } else { offset(r).to_le_bytes().to_vec() }
    };
    match r.below(30) {
        0..4 => {
            code.push(r.below(8) as u8 * 8 + r.below(4) as u8);
            code.extend(modrm(r, None, address32, false));
        }
        4..8 => {
            code.push(r.of(&[0x88, 0x89, 0x8A, 0x8B, 0x84, 0x85, 0x86, 0x87]));
            code.extend(modrm(r, None, address32, false));
        }
        8 => {
            code.push(0x8D);
            code.extend(modrm(r, None, address32, true));
        }
        9 => {
            code.push(r.of(&[0x80, 0x83, 0xC6]));
            let reg = if code.ends_with(&[0xC6]) { Some(0) } else { None };
            code.extend(modrm(r, reg, address32, false));
            code.push(r.next() as u8);
        }
        10 => {
            code.push(r.of(&[0x81, 0xC7]));
            let reg = if code.ends_with(&[0xC7]) { Some(0) } else { None };
            code.extend(modrm(r, reg, address32, false));
            code.extend(word(r));
        }
        11 => {
            let (op, reg) =
                r.of(&[(0xF6, 2), (0xF7, 3), (0xFE, 0), (0xFF, 1), (0xFF, 6), (0xFF, 6), (0xD1, 3)]);
            code.push(op);
            code.extend(modrm(r, Some(reg), address32, false));
        }
        12 | 13 => {
            let op = r.of(&[
                0xB6, 0xB7, 0xBE, 0xBF, 0x44, 0x4C, 0x92, 0x9F, 0xB0, 0xB1, 0xC1, 0x10, 0x11, 0x28, 0x6F,
                0x7F, 0x58,
            ]);
            code.extend([0x0F, op]);
            code.extend(modrm(r, None, address32, false));
        }
        14 => {
            let (op, reg) = r.of(&[
                (0xD9, 0),
                (0xDD, 3),
                (0xDB, 5),
                (0xDB, 7),
                (0xDF, 6),
                (0xD8, 1),
                (0xD9, 5),
                (0xD9, 7),
            ]);
            code.push(op);
            code.extend(modrm(r, Some(reg), address32, true));
        }
        15..18 => code.push(0x40 + r.below(32) as u8),
        18 => {
            code.push(r.of(&[0x68, 0x6A, 0xC8, 0xC8]));
            match code.last() {
                Some(0x68) => code.extend(word(r)),
                Some(0x6A) => code.push(r.next() as u8),
                _ => code.extend([r.below(32) as u8, 0, r.of(&[0, 0, 1, 2, 3])]),
            }
        }
        19 => code.push(r.of(&[0x9D, 0x60, 0x61, 0xC9, 0xC9, 0x06, 0x0E, 0x16, 0x1E])),
        20 => code.push(
            r.of(&[0x98, 0x99, 0x9E, 0xF5, 0xF8, 0xF9, 0xFC, 0xFD, 0xFC, 0x91, 0x96, 0xD7, 0xFA, 0xFB]),
        ),
        21 => {
            code.push(0xB8 + r.below(8) as u8);
            code.extend(word(r));
        }
        22 => {
            code.push(r.of(&[0xA0, 0xA1, 0xA2, 0xA3]));
            let at = offset(r);
            if address32 { code.extend(u32::from(at).to_le_bytes()) } else { code.extend(at.to_le_bytes()) }
        }
        23 | 24 => {
            if r.below(3) == 0 {
                code.push(r.of(&[0xF2, 0xF3]));
            }
            code.push(r.of(&[0xA4, 0xA5, 0xA6, 0xA7, 0xAA, 0xAB, 0xAC, 0xAD, 0xAE, 0xAF]));
        }
        // Branches skip a whole instruction, or go back over one.
        25 | 26 => {
            code.push(0x70 + r.below(16) as u8);
            let over = instruction(r, code32);
            code.push(over.len() as u8);
            code.extend(over);
        }
        27 => {
            code.push(r.of(&[0xE0, 0xE1, 0xE2, 0xE3, 0xEB]));
            let mut over = instruction(r, code32);
            if r.below(3) == 0 && !code.ends_with(&[0xEB]) {
                over.extend(&code);
                over.push((over.len() as u8 + 1).wrapping_neg());
                return over;
            }
            code.push(over.len() as u8);
            code.extend(over);
        }
        28 => match r.below(6) {
            n @ 0..4 => {
                match n {
                    0 => code.push(0xE9),
                    1 | 2 => code.push(0xE8),
                    _ => code.extend([0x0F, 0x80 + r.below(16) as u8]),
                }
                let over = instruction(r, code32);
                let to = (over.len() as u32).to_le_bytes();
                code.extend(if operand32 { &to[..] } else { &to[..2] });
                code.extend(over);
            }
            4 => code.extend(r.of(&[[0xC3, 0x90, 0x90], [0xC2, 4, 0]])),
            _ => {
                code.push(0xFF);
                let reg = r.of(&[2, 4]);
                code.extend(modrm(r, Some(reg), address32, false));
            }
        },
        _ => match r.below(4) {
            0 => {
                code.push(0x8E);
                let reg = r.of(&[0, 2, 3, 4, 5]);
                code.extend(modrm(r, Some(reg), address32, false));
            }
            1 => code.push(r.of(&[0x07, 0x1F, 0x17])),
            2 => {
                code.push(r.of(&[0xC4, 0xC5]));
                code.extend(modrm(r, None, address32, true));
            }
            _ => {
                code.push(0x8C);
                let reg = r.below(6) as u8;
                code.extend(modrm(r, Some(reg), address32, false));
            }
        },
    }
    code
}

/// Where data segments begin: low enough for 16-bit selectors, beside tables, code and stacks.
fn base(r: &mut Random, kind: Kind) -> u64 {
    let low = [0x8_0000, 0x8_0010, 0x8_FFF0, 0x5_0000, 0x9_0000, 0x9_8000, 0x5_0FF0];
    match kind {
        Kind::Real | Kind::Virtual8086 => r.of(&low),
        _ => match r.below(4) {
            0 => r.of(&low),
            1 => DATA + r.below(0x1_0000),
            2 => 0xFFFF_F000,
            _ => DATA + r.below(0x10) * 0x10,
        },
    }
}

/// A data segment of protected mode.
fn segment(r: &mut Random, kind: Kind, cpl: u8) -> Segment {
    let dpl = u16::from(cpl) << 5;
    let limit = match r.below(6) {
        0 => 0xFFF,
        1 => r.below(0x1_0000) as u32,
        2 => 0x1_FFFF,
        3 => u32::MAX,
        _ => 0xFFFF,
    };
    let attributes = match r.below(24) {
        0 => 0x91,       // read-only
        1 => 0x99,       // execute-only code
        2 => 0x9B,       // readable code
        3 => 0,          // null
        4 | 5 => 0x97,   // expand-down
        6 | 7 => 0x4097, // the same up to 4 GiB
        _ => 0x93 | r.of(&[0, 0x4000]),
    };
    let limit = if attributes & 0xFF == 0x97 { limit & 0x3FFF } else { limit };
    let attributes = if attributes == 0 { 0 } else { attributes | dpl };
    let base = base(r, kind);
    // What wraps to low addresses must not reach tables and handlers.
    let (limit, attributes) = match base {
        0xFFFF_F000 => (limit.min(0x1FFF), attributes & !4),
        _ => (limit, attributes),
    };
    Segment { base, limit, attributes, selector: 0x200 | u16::from(cpl) }
}

/// Segment registers, flags and privilege of `kind`; code begins at `code`.
fn segments(bed: &mut Bed, r: &mut Random, kind: Kind, code: u64) {
    // Near the beginning, in the middle, or up to the end of 64 KiB.
    let start = r.of(&[0, 0x100, 0x7FF0, 0xFF00, 0xFF80]);
    let c = &mut bed.cpu;
    c.rip = start;
    match kind {
        Kind::Real | Kind::Virtual8086 => {
            let v86 = kind == Kind::Virtual8086;
            for s in &mut c.seg {
                *s = Segment::real((base(r, kind) >> 4) as u16);
                s.attributes = if v86 { 0xF3 } else { 0x93 };
            }
            if !v86 && r.below(3) == 0 {
                // Unreal mode.
                c.seg[r.of(&[0usize, 3, 4, 5])].limit = u32::MAX;
            }
            let cs = &mut c.seg[SegReg::Cs as usize];
            (cs.base, cs.selector) = (code - start, ((code - start) >> 4) as u16);
            if v86 {
                c.rflags |= flags::VM | if r.below(2) == 0 { flags::IOPL } else { 0 };
                c.cpl = 3;
            }
        }
        Kind::Protected16 | Kind::Protected32 => {
            let cpl = r.of(&[0, 3, 3, 3, 1, 2]);
            c.cpl = cpl;
            for i in 0..6 {
                c.seg[i] = segment(r, kind, cpl);
            }
            let ss = &mut c.seg[SegReg::Ss as usize];
            if ss.attributes & 0xB != 3 || r.below(3) != 0 {
                ss.attributes = 0x93 | u16::from(cpl) << 5 | r.of(&[0, 0x4000]);
                ss.limit = r.of(&[0xFFFF, 0xFFFF, 0x7FFF, u32::MAX]);
            }
            let (d, limit) = match kind {
                Kind::Protected16 => (0, r.of(&[0xFFFF, 0xFFFF, u32::MAX, start as u32 + 0x70])),
                _ => (0x4000, r.of(&[u32::MAX, 0xFFFF, 0x1_FFFF, start as u32 + 0x70])),
            };
            let readable = r.of(&[0x9B, 0x9B, 0x99]);
            c.seg[SegReg::Cs as usize] = Segment {
                base: code.wrapping_sub(start) & 0xFFFF_FFFF,
                limit,
                attributes: readable | d | u16::from(cpl) << 5,
                selector: 0x208 | u16::from(cpl),
            };
            c.rflags |= if r.below(2) == 0 { flags::IOPL } else { 0 };
        }
    }
    if r.below(6) == 0 {
        c.rflags |= flags::DF;
    }
    for i in 0..8 {
        let low = u64::from(offset(r));
        c.gpr[i] = if r.below(3) == 0 { low | r.next() & 0xFFFF_0000 } else { low };
    }
    if r.below(3) == 0 {
        c.gpr[gpr::RCX] &= 0xF;
    }
    if r.below(4) != 0 {
        c.gpr[gpr::RSP] =
            (c.gpr[gpr::RSP] & (0xFFFF_0000 * r.below(2))) | r.of(&[0x6000, 0x7000, 0x7FFF, 4, 2, 0x1004]);
    }
}

/// What a run leaves. Status flags in an exception's frame may be dead ones.
fn remains(bed: &Bed) -> (String, Vec<u8>) {
    let c = &bed.cpu;
    let gpr = c.gpr.map(|v| format!("{v:x}")).join(" ");
    let seg =
        c.seg.map(|s| format!("{:x}:{:x}:{:x}:{:x}", s.selector, s.base, s.limit, s.attributes)).join(" ");
    let system = c.rflags & !flags::STATUS;
    let text = format!("rip {:x} flags {system:x} cr2 {:x} cpl {} gpr {gpr} seg {seg}", c.rip, c.cr2, c.cpl);
    let mut memory = vec![0; MEMORY];
    bed.mem.read(PhysAddr(0), &mut memory).expect("RAM");
    let ss = c.segment(SegReg::Ss);
    let long = matches!(bed.start, Start::Long | Start::Compat);
    let mask = if long || ss.big() { 0xFFFF_FFFF } else { 0xFFFF };
    let base = if long { 0 } else { ss.base };
    let frame = match bed.start {
        Start::Real => [4, 4],
        Start::Long | Start::Compat => [16, 24],
        _ => [8, 12],
    };
    for at in frame {
        let at = base.wrapping_add((c.gpr[gpr::RSP] + at) & mask) & 0xFFFF_FFFF;
        if let Some(flags) = memory.get_mut(at as usize..).and_then(|m| m.get_mut(..2)) {
            flags.fill(0);
        }
    }
    // Accessed and dirty bits may be set early.
    memory[0x2_F000..0x4_2000].iter_mut().step_by(4).for_each(|b| *b &= !0x60);
    (text, memory)
}

/// Places code and state of `seed`; instructions in `without` become NOPs.
fn prepare(bed: &mut Bed, clean: &[u8], seed: u64, kind: Kind, without: &[usize]) -> Vec<Vec<u8>> {
    let mut r = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let code32 = kind == Kind::Protected32;
    let at = 0x2_0000 - r.of(&[0, 0x20, 0x10]);
    let (mut code, mut list) = (Vec::new(), Vec::new());
    while code.len() < 0x100 {
        let mut i = instruction(&mut r, code32);
        if without.contains(&list.len()) {
            i.fill(0x90);
        }
        code.extend(&i);
        list.push(i);
    }
    code.extend([0xF4; 16]);
    bed.put(0, clean);
    bed.reset();
    segments(bed, &mut r, kind, at);
    bed.put(at, &code);
    if kind != Kind::Real && r.below(2) == 0 && bed.start != Start::Protected {
        for page in [0x8_1000, 0x9_1000, DATA + 0x1000, 0x5_F000] {
            bed.map(page, page, r.of(&[0, 5, 7]));
        }
    }
    for n in 0..8 {
        let s = segment(&mut r, kind, bed.cpu.cpl);
        let raw =
            u64::from(s.limit & 0xFFFF) | (s.base & 0xFF_FFFF) << 16 | u64::from(s.attributes & 0xFF) << 40;
        bed.put64(GDT + 0x80 + n * 8, raw);
    }
    bed.flush();
    list
}

/// The code as text.
fn listing(code: &[Vec<u8>], kind: Kind) -> String {
    let bits = if kind == Kind::Protected32 { 32 } else { 16 };
    let mut text = String::new();
    let mut at = 0;
    for bytes in code {
        let instr = iced_x86::Decoder::new(bits, bytes, 0).decode();
        if bytes.iter().any(|&b| b != 0x90) {
            text += &format!("+{at:#x} {bytes:02x?} {instr}\n");
        }
        at += bytes.len();
    }
    text
}

/// Interpreter and translator with the same memory.
struct Pair {
    beds: [Bed; 2],
    clean: Vec<u8>,
    kind: Kind,
}

impl Pair {
    fn new(kind: Kind, start: Start) -> Pair {
        let beds = [Bed::new(start, false), Bed::new(start, true)];
        let mut clean = vec![0; MEMORY];
        beds[0].mem.read(PhysAddr(0), &mut clean).expect("RAM");
        let mut r = Random(99);
        for at in (0x5_0000..0x6_0000).chain(0x8_0000..0xA_0000).chain(DATA as usize..MEMORY) {
            clean[at] = r.next() as u8;
        }
        Pair { beds, clean, kind }
    }

    /// What differs; `None` if an engine did not come to an end.
    fn differences(&mut self, seed: u64, without: &[usize]) -> Option<String> {
        let (clean, kind) = (&self.clean, self.kind);
        let mut code = Vec::new();
        let results = self.beds.each_mut().map(|bed| {
            code = prepare(bed, clean, seed, kind, without);
            let before = format!("{:x?} {:x?}", bed.cpu.gpr, bed.cpu.seg);
            let exit = bed.run_for(Duration::from_millis(100), &format!("{kind:?} seed {seed}"));
            (exit, remains(bed), before)
        });
        let [a, b] = &results;
        if a.0 == Exit::Stop || b.0 == Exit::Stop {
            return None;
        }
        let mut text = String::new();
        if (a.0, &a.1.0) != (b.0, &b.1.0) {
            text += &format!("{:?} {}\n{:?} {}\n", a.0, a.1.0, b.0, b.1.0);
        }
        // A shutdown leaves a part of a frame, with flags in it.
        let whole = a.0 != Exit::TripleFault;
        if let Some(i) = (0..MEMORY).find(|&i| whole && a.1.1[i] != b.1.1[i]) {
            text += &format!("memory at {i:#x}: {:x?} {:x?}\n", &a.1.1[i..i + 8], &b.1.1[i..i + 8]);
        }
        if !text.is_empty() {
            text += &format!("{}before: {}\n", listing(&code, kind), a.2);
        }
        Some(text)
    }

    /// The same with every instruction left out that it does not need.
    fn reduced(&mut self, seed: u64) -> String {
        let mut without = Vec::new();
        let mut text = self.differences(seed, &without).unwrap_or_default();
        for n in (0..256).rev() {
            without.push(n);
            match self.differences(seed, &without) {
                Some(smaller) if !smaller.is_empty() => text = smaller,
                _ => drop(without.pop()),
            }
        }
        text
    }
}

/// Both engines from the same random start to the first exception.
fn agree(kind: Kind, start: Start, seeds: std::ops::Range<u64>) {
    let mut pair = Pair::new(kind, start);
    let mut compared = 0;
    for seed in seeds {
        let Some(text) = pair.differences(seed, &[]) else { continue };
        compared += 1;
        assert!(text.is_empty(), "{kind:?} {start:?} seed {seed}\n{}", pair.reduced(seed));
    }
    assert!(compared > 20, "{kind:?} {start:?}: only {compared} ended by themselves");
}

/// `PARAVANE_SEGMENTED_SEEDS` and `PARAVANE_SEGMENTED_FIRST` for more and others.
fn seeds() -> std::ops::Range<u64> {
    let number =
        |name: &str, default| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    let first = number("PARAVANE_SEGMENTED_FIRST", 1);
    first..first + number("PARAVANE_SEGMENTED_SEEDS", 150)
}

#[test]
fn engines_agree_in_real_mode() {
    agree(Kind::Real, Start::Real, seeds());
}

#[test]
fn engines_agree_in_virtual_8086_mode() {
    agree(Kind::Virtual8086, Start::Paged32, seeds());
}

#[test]
fn engines_agree_on_16_bit_protected_code() {
    for start in [Start::Protected, Start::Paged32, Start::Compat] {
        agree(Kind::Protected16, start, seeds());
    }
}

#[test]
fn engines_agree_on_segmented_32_bit_code() {
    for start in [Start::Protected, Start::Pae, Start::Compat] {
        agree(Kind::Protected32, start, seeds());
    }
}

//! The opcode maps, walked (SDM 2D, appendix A): what a mode or a model does not have is `#UD`, everything else is not.
//!
//! What an encoding is comes from iced-x86's decoder, which features it needs too; which of them a model has is written down
//! here. What the decoder calls undefined is also asked of the host. `PARAVANE_WALK=all` takes every such encoding instead of
//! a part.
//!
//! Invariant of the unsafe call: an encoding that no manual defines touches nothing; the registers point into the arena.

use crate::bed::{Bed, DATA, HANDLERS, REAL_CODE, Start};
use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, EncodingKind, Instruction, Mnemonic, OpCodeTableKind,
};
use paravane_cpu::{FpuState, HostFeatures, cr4, flags, gpr, model_by_name};
use paravane_jit::host::{Native, NativeLayout, NativeMode, NativeState};
use std::collections::HashSet;
use std::sync::OnceLock;

/// Longest encoding that the walk makes, with what follows: NOPs, and HLT.
const SLOT: usize = 24;

/// Calls `visit` with every encoding of one instruction in code of `bits`, NOPs behind it.
fn walk(bits: u32, visit: &mut dyn FnMut(&[u8])) {
    let mut slot = [0x90; SLOT];
    slot[SLOT - 1] = 0xF4;
    let mut put = |prefix: &[u8], modrm: u8| {
        let mut bytes = slot;
        bytes[..prefix.len()].copy_from_slice(prefix);
        bytes[prefix.len()] = modrm;
        visit(&bytes);
    };
    let rex: &[&[u8]] = if bits == 64 { &[&[], &[0x48]] } else { &[&[]] };
    let mandatory: [&[u8]; 8] =
        [&[], &[0x66], &[0xF3], &[0xF2], &[0xF0], &[0x66, 0xF0], &[0x66, 0xF3], &[0x66, 0xF2]];
    for mandatory in mandatory {
        for escape in [&[][..], &[0x0F], &[0x0F, 0x38], &[0x0F, 0x3A]] {
            for opcode in (0..=255).filter(|&o| !leads_on(bits, escape, o)) {
                for rex in rex {
                    let prefix = [mandatory, rex, escape, &[opcode]].concat();
                    for modrm in modrms(has_fine_groups(escape, opcode)) {
                        put(&prefix, modrm);
                    }
                }
            }
        }
    }
    // C5: R and vvvv inverted, L, pp; C4: map, W, vvvv, L, pp; vvvv = 1111B where the form has none.
    for payload in 0..8u8 {
        for opcode in 0..=255 {
            for modrm in modrms(false) {
                put(&[0xC5, 0xF8 | payload, opcode], modrm);
            }
            put(&[0xC5, 0xC0 | payload, opcode], 0xC0);
        }
    }
    let wide: &[u8] = if bits == 16 { &[0x67] } else { &[] };
    for map in 0..32u8 {
        for payload in (0x78..=0x7F).chain(0xF8..=0xFF) {
            for opcode in 0..=255 {
                for modrm in modrms(false).filter(|&m| (1..=3).contains(&map) || m == 0xC0) {
                    put(&[0xC4, 0xE0 | map, payload, opcode], modrm);
                }
                put(&[0xC4, 0xE0 | map, payload & 0xDF, opcode], 0xC0);
                // VSIB wants three registers, and addresses of 32 bits.
                put(&[wide, &[0xC4, 0xE0 | map, payload & 0xDF, opcode]].concat(), 0x04);
            }
        }
    }
    // EVEX: map, W, pp, L'L.
    for map in 0..8u8 {
        for payload in (0..8u8).map(|n| 0x7C | (n & 4) << 5 | n & 3) {
            for length in [0x08, 0x28, 0x48, 0x09, 0x18] {
                for opcode in 0..=255 {
                    for modrm in [0xC0, 0xD0, 0x03] {
                        put(&[0x62, 0xF0 | map, payload, length, opcode], modrm);
                    }
                }
            }
        }
    }
}

/// Members of groups: with a register, all of them if `fine`, and with memory, at `[rBX]` or `[BP + DI]`; one with SIB.
fn modrms(fine: bool) -> impl Iterator<Item = u8> {
    (0..=255).filter(move |m| match m >> 6 {
        0 => m & 7 == 3 || *m == 4,
        3 => fine || m & 7 == 0,
        _ => false,
    })
}

/// Whether all of ModRM tells instructions apart.
fn has_fine_groups(escape: &[u8], opcode: u8) -> bool {
    match escape {
        [] => (0xD8..=0xDF).contains(&opcode),
        [0x0F] => matches!(opcode, 0x01 | 0x1C | 0x1E | 0xAE | 0xC7),
        _ => false,
    }
}

/// Prefixes and escapes, which the walk makes elsewhere.
fn leads_on(bits: u32, escape: &[u8], opcode: u8) -> bool {
    match escape {
        [] => {
            matches!(opcode, 0x0F | 0x26 | 0x2E | 0x36 | 0x3E | 0x64..=0x67 | 0xF0 | 0xF2 | 0xF3)
                || bits == 64 && matches!(opcode, 0x40..=0x4F | 0xC4 | 0xC5 | 0x62)
        }
        [0x0F] => matches!(opcode, 0x38 | 0x3A),
        _ => false,
    }
}

fn decode(bits: u32, bytes: &[u8]) -> Instruction {
    Decoder::with_ip(bits, bytes, 0x1000, DecoderOptions::NONE).decode()
}

/// A valid encoding of each form that is told apart here, and all that are undefined.
struct Encodings {
    valid: Vec<(Instruction, [u8; SLOT])>,
    undefined: Vec<[u8; SLOT]>,
}

fn encodings(bits: u32) -> &'static Encodings {
    static ALL: [OnceLock<Encodings>; 3] = [const { OnceLock::new() }; 3];
    ALL[bits as usize / 32].get_or_init(|| collect(bits))
}

fn collect(bits: u32) -> Encodings {
    let mut all = Encodings { valid: Vec::new(), undefined: Vec::new() };
    let mut seen = HashSet::new();
    walk(bits, &mut |bytes| {
        let instruction = decode(bits, bytes);
        let bytes = bytes.try_into().expect("a slot");
        if instruction.is_invalid() {
            all.undefined.push(bytes);
        } else if seen.insert((instruction.code(), instruction.op0_kind(), instruction.has_lock_prefix())) {
            all.valid.push((instruction, bytes));
        }
    });
    all
}

/// Features by the level that adds them: the manuals of the processors, the x86-64 psABI, and what the models of that level
/// have beyond it (`cpu/src/cpuid/models.rs` offers no others).
fn features(model: &str) -> HashSet<CpuidFeature> {
    use CpuidFeature::*;
    let levels: [(&str, &[CpuidFeature]); 6] = [
        ("i486", &[INTEL8086, INTEL186, INTEL286, INTEL386, INTEL486, CPUID, FPU, FPU287, FPU387]),
        ("pentium3", &[CX8, TSC, MSR, RDPMC, CMOV, MULTIBYTENOP, SEP, MMX, FXSR, SSE]),
        ("x86-64", &[SSE2, SSE3, CMPXCHG16B, SYSCALL, X64, CLFSH, PAUSE]),
        ("x86-64-v2", &[SSSE3, SSE4_1, SSE4_2, POPCNT, INVPCID, RDTSCP, FSGSBASE, SMAP]),
        ("x86-64-v3", &[AVX, AVX2, BMI1, BMI2, F16C, FMA, LZCNT, MOVBE, XSAVE, XSAVEOPT, XSAVEC]),
        ("max", &[PCLMULQDQ, AES, SHA, RDRAND, RDSEED, ADX, CLFLUSHOPT, PREFETCHW, RDPID]),
    ];
    let last = levels.iter().position(|(name, _)| *name == model).expect("a model");
    levels[..=last].iter().flat_map(|(_, features)| features.iter().copied()).collect()
}

/// Whether a processor with `features` has what `i` encodes, where a test starts.
fn is_defined(i: &Instruction, features: &HashSet<CpuidFeature>, start: Start) -> bool {
    use Mnemonic as M;
    let op = i.op_code();
    let hints = op.encoding() == EncodingKind::Legacy
        && op.table() == OpCodeTableKind::T0F
        && matches!(op.op_code(), 0x0D | 0x18..=0x1F | 0x1EFA | 0x1EFB);
    if hints {
        // Whatever they hint at, elsewhere they do nothing (SDM 2D, table A-3).
        return features.contains(&CpuidFeature::MULTIBYTENOP);
    }
    let protected_only = matches!(
        i.mnemonic(),
        M::Sldt | M::Str | M::Lldt | M::Ltr | M::Verr | M::Verw | M::Lar | M::Lsl | M::Arpl
    );
    match i.mnemonic() {
        // They were BSF, BSR, WBINVD and NOP before.
        M::Tzcnt | M::Lzcnt | M::Wbnoinvd | M::Pause => true,
        // Outside system management mode.
        M::Ud0 | M::Ud1 | M::Ud2 | M::Rsm => false,
        // On processors of Intel's.
        M::Syscall | M::Sysret | M::Sysretq if start != Start::Long => false,
        // They came with CMOV (SDM 2A, FCOMI).
        M::Fcomi | M::Fcomip | M::Fucomi | M::Fucomip => features.contains(&CpuidFeature::CMOV),
        _ if start == Start::Real && (protected_only || op.encoding() == EncodingKind::VEX) => false,
        _ => i.cpuid_features().iter().all(|f| features.contains(f)),
    }
}

/// Starts at `bytes` with everything enabled that the model has.
fn begin(bed: &mut Bed, model: &str, bytes: &[u8]) {
    bed.reset();
    let at = bed.code();
    bed.put(at, bytes);
    let data = if bed.start == Start::Real { REAL_CODE - 0x1000 } else { DATA };
    for register in [gpr::RAX, gpr::RBX, gpr::RSI, gpr::RDI] {
        bed.cpu.gpr[register] = data;
    }
    let model = model_by_name(model, &HostFeatures::detect()).expect("a model");
    let enabled = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE;
    bed.cpu.cr4 |= enabled & model.cr4_allowed();
    bed.cpu.rip = at;
    bed.flush();
}

fn is_undefined_to(bed: &mut Bed, translated: bool) -> bool {
    if translated {
        bed.quick();
        bed.cpu.rip == HANDLERS + 6 * 16 + 1 && bed.taken().rip == bed.code()
    } else {
        bed.step(false);
        bed.cpu.rip == HANDLERS + 6 * 16 && bed.taken_at(6).rip == bed.code()
    }
}

/// Which of the undefined encodings are tried: about one in `part`.
fn chosen(undefined: &[[u8; SLOT]], part: usize) -> impl Iterator<Item = &[u8; SLOT]> {
    let part = if std::env::var("PARAVANE_WALK").is_ok_and(|w| w == "all") { 1 } else { part };
    undefined.iter().step_by(part)
}

fn walk_model(model: &str, start: Start, bits: u32, part: usize) {
    let (all, features) = (encodings(bits), features(model));
    assert!(all.valid.len() > 1_000 && all.undefined.len() > 50_000);
    let mut wrong = Vec::new();
    for translated in [false, true] {
        let mut bed = Bed::of_model(model, start, translated);
        for (instruction, bytes) in &all.valid {
            let defined = is_defined(instruction, &features, start);
            // What is defined runs natively elsewhere (`conformance.rs`); here it might never end.
            if translated && defined {
                continue;
            }
            begin(&mut bed, model, bytes);
            if is_undefined_to(&mut bed, translated) == defined {
                wrong.push(format!("{:?} {:02x?} translated {translated}", instruction.code(), &bytes[..8]));
            }
        }
        for bytes in chosen(&all.undefined, part) {
            begin(&mut bed, model, bytes);
            if !is_undefined_to(&mut bed, translated) {
                wrong.push(format!("{:02x?} translated {translated}", &bytes[..8]));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{model}, {start:?}, {} wrong:\n{}",
        wrong.len(),
        wrong[..wrong.len().min(60)].join("\n")
    );
}

#[test]
fn of_64_bit_mode() {
    for model in ["x86-64", "x86-64-v2", "x86-64-v3", "max"] {
        walk_model(model, Start::Long, 64, 61);
    }
}

#[test]
fn of_32_bit_code() {
    for model in ["i486", "pentium3", "x86-64", "x86-64-v2", "x86-64-v3", "max"] {
        walk_model(model, Start::Protected, 32, 61);
    }
    walk_model("max", Start::Compat, 32, 61);
}

#[test]
fn of_real_mode() {
    for model in ["i486", "pentium3", "x86-64-v3", "max"] {
        walk_model(model, Start::Real, 16, 61);
    }
}

/// The host agrees about what is undefined.
#[test]
fn the_host_has_no_more() {
    let layout = NativeLayout { code: 0x4000_0000, data: 0x5000_0000, writable_pages: 2, read_only_pages: 1 };
    let mut native = Native::new(layout).expect("a native bench");
    for mode in [NativeMode::Long, NativeMode::Protected32, NativeMode::Protected16] {
        if mode == NativeMode::Protected16 && native.allow_sixteen_bits().is_err() {
            println!("NOT RUN: this host does not let a process have 16-bit segments");
            break;
        }
        let seen = mode.seen(layout);
        let mut state =
            NativeState { gpr: [0; 16], rflags: flags::FIXED | flags::IF, fpu: FpuState::initial() };
        for register in [gpr::RAX, gpr::RBX, gpr::RSI, gpr::RDI, gpr::RSP] {
            state.gpr[register] = seen.data + 0x800;
        }
        let all = encodings(mode.bits());
        let mut wrong = Vec::new();
        // With a prefix that the manual does not allow there, VMCALL and VMMCALL still call this host's hypervisor.
        let calls = |bytes: &[u8; SLOT]| {
            bytes.windows(3).any(|b| b[..2] == [0x0F, 0x01] && matches!(b[2], 0xC1 | 0xD9))
        };
        for bytes in chosen(&all.undefined, 17).filter(|bytes| !calls(bytes)) {
            native.set_code(0x400, bytes);
            // SAFETY: undefined; nothing it could be reaches beyond the arena with these registers.
            let stop = unsafe { native.run(mode, 0x400, &[], &mut state.clone()) };
            if (stop.vector, stop.rip) != (6, seen.code + 0x400) {
                wrong.push(format!("{:02x?} {stop:x?}", &bytes[..8]));
            }
        }
        assert!(
            wrong.is_empty(),
            "{mode:?}, {} wrong:\n{}",
            wrong.len(),
            wrong[..wrong.len().min(60)].join("\n")
        );
    }
}

/// The walk meets every instruction that a model has, but those that are an assembler's names for two.
#[test]
fn the_walk_is_complete() {
    let offered = features("max");
    for bits in [64, 32, 16] {
        let met: HashSet<Mnemonic> = encodings(bits).valid.iter().map(|(i, _)| i.mnemonic()).collect();
        let is_offered = |code: &Code| {
            let op = code.op_code();
            let mode = match bits {
                64 => op.mode64() && op.intel_decoder64(),
                32 => op.mode32() && op.intel_decoder32(),
                _ => op.mode16() && op.intel_decoder16(),
            };
            let has = code.cpuid_features().iter().all(|f| offered.contains(f));
            // JCXZ and JECXZ: one of them wants an address-size prefix.
            let walked = !matches!(code.mnemonic(), Mnemonic::Jcxz | Mnemonic::Jecxz);
            op.is_instruction() && mode && has && walked && !op.fwait()
        };
        let missing: HashSet<Mnemonic> =
            Code::values().filter(is_offered).map(Code::mnemonic).filter(|m| !met.contains(m)).collect();
        assert!(missing.is_empty(), "{bits}: {missing:?}");
    }
}

//! Engines against the host CPU: random instructions of every form, and programs of them.
//!
//! In the test suite there are few cases, half from a fixed seed, half from a fresh one, which a failure prints.
//! `cargo xtask fuzz cpu` runs more; its options arrive as `PARAVANE_FUZZ_ROUNDS` (cases per form), `_PROGRAMS`,
//! `_SEED` (the only one then), `_SECONDS`, `_ONLY` and `_SKIP` (beginnings of forms' names, by commas), and
//! `_REPORT` (a file for all findings), `_COVERAGE` (a file for a line per
//! form that some model offers), `_ENGINE` (`interpreter`, `translator` or `both`).

use paravane_cpu::{Attention, CpuModel, HostFeatures, HostVendor, Interpreter, VpIndex, model_by_name};
use paravane_jit::fuzz::{Bench, Campaign, Leave, LeftOut, Program, Report, forms};
use paravane_jit::host::{HostVectorUnit, NativeMode};
use paravane_jit::{JitOptions, Translator};
use std::collections::HashSet;
use std::io::Write;
use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Benches map the same addresses.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

fn names(name: &str) -> Vec<String> {
    std::env::var(name).map(|names| names.split(',').map(str::to_owned).collect()).unwrap_or_default()
}

fn model() -> CpuModel {
    model_by_name("max", &HostFeatures::detect()).unwrap()
}

/// None where the host has no 16-bit segments for us, which is said.
fn bench(mode: NativeMode) -> Option<Bench> {
    match Bench::new(mode) {
        Ok(bench) => Some(bench),
        Err(error) if mode == NativeMode::Protected16 => {
            println!("NOT RUN: this host does not let a process have 16-bit segments (modify_ldt): {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Adds the engines that were asked for.
fn add_engines(bench: &mut Bench, attention: &Attention, mode: NativeMode) {
    let asked = std::env::var("PARAVANE_FUZZ_ENGINE").unwrap_or_else(|_| "both".into());
    if asked != "translator" {
        let vector = Box::new(HostVectorUnit::new().unwrap());
        let engine = Interpreter::new(model(), vector, attention.clone(), VpIndex(0));
        bench.add("interpreter", Box::new(engine), Leave::Nothing);
    }
    if asked != "interpreter" {
        // Memory by tables, and where there can be windows through these.
        for (name, window_after) in [("translator", u32::MAX), ("translator with windows", 0)] {
            if window_after == 0 && mode == NativeMode::Protected16 {
                continue;
            }
            let options = JitOptions { hot_loop: 2, window_after, ..JitOptions::default() };
            let memory = bench.guest().memory();
            let engine = Translator::new(model(), memory, attention.clone(), VpIndex(0), options).unwrap();
            bench.add(name, Box::new(engine), Leave::DeadFlags);
        }
    }
}

/// The seed that was asked for; or a fixed one, so that what passed keeps passing, and one that nobody saw before.
fn seeds() -> Vec<u64> {
    if let Ok(seed) = std::env::var("PARAVANE_FUZZ_SEED") {
        return vec![seed.parse().expect("PARAVANE_FUZZ_SEED is a number")];
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    vec![1, now.as_nanos() as u64 >> 16 & 0xFFFF_FFFF]
}

fn conform(mode: NativeMode) {
    let _guard = ONE_AT_A_TIME.lock();
    let Some(mut bench) = bench(mode) else { return };
    let attention = Attention::default();
    add_engines(&mut bench, &attention, mode);
    bench.watch(attention);
    let mut texts = Vec::new();
    let mut whole: Option<Report> = None;
    for seed in seeds() {
        let campaign = Campaign {
            seed,
            rounds: setting("PARAVANE_FUZZ_ROUNDS", 6),
            programs: setting("PARAVANE_FUZZ_PROGRAMS", 500),
            length: 30,
            skip: names("PARAVANE_FUZZ_SKIP"),
            only: names("PARAVANE_FUZZ_ONLY"),
            time: Duration::from_secs(setting("PARAVANE_FUZZ_SECONDS", 30)),
        };
        let report = campaign.run(&mut bench);
        assert!(!report.admitted.is_empty(), "no form that can run in {mode:?} has such a name");
        println!("{mode:?} from seed {seed}: {}", report.summary());
        let found: Vec<String> = report.failures.iter().map(|f| f.text(bench.bits())).collect();
        if let Ok(path) = std::env::var("PARAVANE_FUZZ_REPORT") {
            let mut file = std::fs::File::options().create(true).append(true).open(path).unwrap();
            let title = format!("# {mode:?} from seed {seed}: {}", report.summary());
            writeln!(file, "{title}\n{}", found.join("\n")).unwrap();
        }
        texts.extend(found);
        match &mut whole {
            Some(whole) => whole.join(&report),
            None => whole = Some(report),
        }
    }
    let whole = whole.expect("there is always a seed");
    if let Ok(path) = std::env::var("PARAVANE_FUZZ_COVERAGE") {
        let mut file = std::fs::File::options().create(true).append(true).open(path).unwrap();
        file.write_all(whole.coverage(bench.bits()).as_bytes()).unwrap();
    }
    let shown = texts.iter().take(10).map(String::as_str).collect::<Vec<_>>().join("\n");
    assert!(texts.is_empty(), "{} findings:\n{shown}", texts.len());
    // Nothing that a model offers is silently missing: it ran, or `forms` says why not.
    let complete = names("PARAVANE_FUZZ_ONLY").is_empty() && setting("PARAVANE_FUZZ_ROUNDS", 6) >= 6;
    assert!(!complete || whole.missing().is_empty(), "never drawn: {:?}", whole.missing());
    assert!(!complete || whole.mends > 0, "no fault was mended");
    // 16-bit loops become no traces.
    let traced = complete && mode != NativeMode::Protected16 && whole.programs > 200;
    let interpreted = std::env::var("PARAVANE_FUZZ_ENGINE").is_ok_and(|engine| engine == "interpreter");
    assert!(!traced || interpreted || whole.traces > 0, "no loop became a trace");
    let windowed = mode != NativeMode::Protected16 && !interpreted;
    assert!(!windowed || bench.counter("windows_opened") > 0, "no engine had a window");
}

/// lock sub dword ptr [eax + eax * 4 + disp32], imm32 in 16-bit code.
const SIXTEEN_BYTES: &[u8] = &[0x66, 0x3E, 0x67, 0xF0, 0x67, 0x81, 0xAC, 0x80, 0, 8, 0, 0, 1, 2, 3, 4];

/// lock add dword ptr [edi + eax * 2 + disp32], imm32 in 16-bit code, with F2 and F3.
const PREFIXES_THAT_COUNT: &[u8] = &[0x66, 0xF2, 0xF3, 0xF0, 0x67, 0x81, 0x84, 0x47, 0, 8, 0, 0, 1, 2, 3, 4];

/// The first element that is accessed lies at 0x10000.
const BEYOND_64K: &[u8] = &[
    0xBF, 0xF8, 0xFF, 0, 0, 0xC5, 0xC1, 0x76, 0xFF, 0xC5, 0xC1, 0x73, 0xFF, 0x08, 0x67, 0xC4, 0xE2, 0x41,
    0x2C, 0x1D,
];

/// mov di, 0x7FF1; vpcmpeqd xmm7, xmm7, xmm7; vmaskmovps xmm3, xmm7, [di]: the limit is 0x7FFF, and no page is there.
const MASK_OVER_LIMIT: &[u8] = &[0xBF, 0xF1, 0x7F, 0xC5, 0xC1, 0x76, 0xFF, 0xC4, 0xE2, 0x41, 0x2C, 0x1D];

const ROTATE_R15: &[u8] = &[0xB0, 0x7F, 0x04, 0x01, 0x49, 0xC1, 0xC7, 0x2B, 0x0F, 0x90, 0xC2, 0x9C, 0x59];

/// push 0x40202; popfq; mov ebx, 0x50000013; vcvtps2ph [rbx], xmm1, 0
const HALF_PRECISION: &[u8] =
    &[0x68, 2, 2, 4, 0, 0x9D, 0xBB, 0x13, 0, 0, 0x50, 0xC4, 0xE3, 0x79, 0x1D, 0x0B, 0];

/// push 0x40202; popfq; mov ebx, 0x50000013; movups xmm0, [rbx]; mov edi, 0x50000018; maskmovdqu xmm0, xmm0
const SIXTEEN_UNDER_AC: &[u8] = &[
    0x68, 2, 2, 4, 0, 0x9D, 0xBB, 0x13, 0, 0, 0x50, 0x0F, 0x10, 0x03, 0xBF, 0x18, 0, 0, 0x50, 0x66, 0x0F,
    0xF7, 0xC0,
];

/// A jump to a block to which flags are dead, then one whose target shares its place in the jump cache (16 bits of
/// address + address / 65536), with CF set, and faults.
fn collision() -> Vec<u8> {
    let mut code = vec![0x48, 0xB8, 0x10, 0x04, 0, 0x40, 0, 0, 0, 0, 0xFF, 0xE0]; // mov rax, 0x40000410; jmp rax
    code.resize(0x10, 0x90);
    code.extend([0x31, 0xDB, 0x83, 0xE9, 0x01]); // xor ebx, ebx; sub ecx, 1
    code.extend([0x48, 0xB8, 0x10, 0x14, 0, 0x30, 0, 0, 0, 0, 0xFF, 0xE0]); // mov rax, 0x30001410; jmp rax
    code
}

/// Code that is not there yet while a program grows reads otherwise than in the end.
#[test]
fn programs_that_read_their_own_code_are_refused() {
    let _guard = ONE_AT_A_TIME.lock();
    let Some(mut bench) = bench(NativeMode::Long) else { return };
    let down = -0x1000_0400_i64; // from the arena to the code
    let mut gpr = [0; 16];
    gpr[0] = 0x5000_0800;
    gpr[4] = 0x5000_0800;
    gpr[1] = ((down as u64) & 0xFFFF_FFFF) << 32;
    gpr[3] = (down * 8) as u64;
    // bt [rsp], rbx; vmovq xmm1, rcx; vpcmpeqd xmm2, xmm2, xmm2; vpgatherdd xmm0, [rax + xmm1], xmm2
    let bit_test = [0x48, 0x0F, 0xA3, 0x1C, 0x24];
    let second_element =
        [0xC4, 0xE1, 0xF9, 0x6E, 0xC9, 0xC5, 0xE9, 0x76, 0xD2, 0xC4, 0xE2, 0x69, 0x90, 0x04, 0x08];
    assert!(Program::of(&mut bench, &bit_test, gpr).is_none());
    assert!(Program::of(&mut bench, &second_element, gpr).is_none());
    (gpr[1], gpr[3]) = (0, 0);
    assert!(Program::of(&mut bench, &bit_test, gpr).is_some());
    assert!(Program::of(&mut bench, &second_element, gpr).is_some());
}

/// Behind where code may lie are the harness's own ways out.
#[test]
fn programs_that_jump_to_the_ways_out_are_refused() {
    let _guard = ONE_AT_A_TIME.lock();
    for mode in [NativeMode::Long, NativeMode::Protected32] {
        let Some(mut bench) = bench(mode) else { continue };
        let mut gpr = [0; 16];
        gpr[4] = 0x5000_0800;
        let jump = |from: u32, to: u32| [&[0xE9][..], &(to - from - 5).to_le_bytes()].concat();
        for (to, harmless) in [(0xE80, true), (0xF00, false), (0xF40, false), (0xF83, false), (0x1100, true)]
        {
            let mut code = jump(0x400, 0xC00);
            code.resize(0x800, 0x90);
            code.extend(jump(0xC00, to));
            assert_eq!(Program::of(&mut bench, &code, gpr).is_some(), harmless, "{to:#x}");
        }
    }
}

/// What campaigns found: each of these once ended differently in an engine.
#[test]
fn findings_stay_fixed() {
    let _guard = ONE_AT_A_TIME.lock();
    const LONG: NativeMode = NativeMode::Long;
    const FLAT: NativeMode = NativeMode::Protected32;
    const WORD: NativeMode = NativeMode::Protected16;
    let programs: &[(NativeMode, &str, &[u8])] = &[
        (LONG, "REX that is not last, vector", &[0x4D, 0xF3, 0x0F, 0x53, 0xC1]), // rcpss xmm0, xmm1
        // push 0x68; sbb bh, 0x56 as 82 /3; call +0
        (FLAT, "82 behind PUSH", &[0x6A, 0x68, 0x82, 0xDF, 0x56, 0xE8, 0, 0, 0, 0]),
        (WORD, "too long by a prefix that is there once", SIXTEEN_BYTES),
        (WORD, "too long by prefixes of which each counts", PREFIXES_THAT_COUNT),
        (LONG, "a 16-bit PUSH behind others", &[0x6A, 1, 0x6A, 2, 0x66, 0x6A, 0xA1]),
        // mov edi, 0xFFF8; vpcmpeqd xmm7, xmm7, xmm7; vpslldq xmm7, xmm7, 8; vmaskmovps xmm3, xmm7, [di]
        (FLAT, "VMASKMOV beyond 64 KiB", BEYOND_64K),
        // mov al, 0x7F; add al, 1; ror bl, 7; seto dl
        (LONG, "OF kept by a rotate", &[0xB0, 0x7F, 0x04, 0x01, 0xC0, 0xCB, 0x07, 0x0F, 0x90, 0xC2]),
        // mov al, 0x7F; add al, 1; rol r15, 0x2B; seto dl; pushfq; pop rcx
        (LONG, "OF kept by a rotate of a register in the context", ROTATE_R15),
        (LONG, "half precision under alignment checking", HALF_PRECISION),
        (LONG, "sixteen bytes under alignment checking", SIXTEEN_UNDER_AC),
        (LONG, "flags over a jump whose place in the cache another block has", &collision()),
    ];
    let mut programs = programs.to_vec();
    if HostVendor::detect() == HostVendor::Intel {
        // Which fault comes first was not measured elsewhere.
        programs.push((WORD, "VMASKMOV of elements without a page and beyond the limit", MASK_OVER_LIMIT));
    }
    for (mode, name, code) in programs {
        let Some(mut bench) = bench(mode) else { continue };
        add_engines(&mut bench, &Attention::default(), mode);
        let mut gpr = [0; 16];
        gpr[4] = 0x5000_0800;
        let program = Program::of(&mut bench, code, gpr).expect(name);
        let differences = bench.differences(program.case());
        assert!(differences.is_empty(), "{name}: {differences:?}");
    }
}

/// What cannot be compared with the host runs in the guests of `jit/tests/system`, as the coverage report says.
#[test]
fn what_is_left_out_runs_in_the_system_guests() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/system");
    let sources =
        std::fs::read_dir(folder).unwrap().map(|f| std::fs::read_to_string(f.unwrap().path()).unwrap());
    let text: String = sources.collect();
    let words: HashSet<&str> = text.split(|c: char| !c.is_alphanumeric()).collect();
    // Those that the assembler is given as bytes.
    let in_bytes = ["ud0", "xsavec64", "xsaveopt64"];
    let mut named = 0;
    for (form, verdict) in [16, 32, 64].into_iter().flat_map(forms) {
        if matches!(
            verdict,
            Err(LeftOut::Transfer | LeftOut::Segments | LeftOut::NotReproducible | LeftOut::State)
        ) {
            let name = format!("{:?}", form.mnemonic()).to_lowercase();
            assert!(words.contains(name.as_str()) || in_bytes.contains(&name.as_str()), "{form:?}");
            named += 1;
        }
    }
    assert!(named > 200, "{named}");
}

/// A campaign over a single form finds enough for its programs, one over none says so.
#[test]
fn few_forms_are_enough() {
    let _guard = ONE_AT_A_TIME.lock();
    let mut bench = bench(NativeMode::Long).unwrap();
    let mut campaign = Campaign {
        seed: 1,
        rounds: 2,
        programs: 20,
        length: 30,
        skip: Vec::new(),
        only: vec!["Aesenc_".into()],
        time: Duration::from_secs(30),
    };
    let report = campaign.run(&mut bench);
    assert_eq!((report.admitted.len(), report.cases, report.failures.len()), (1, 2, 0));
    assert!(report.programs > 10);
    campaign.only = vec!["Nonsense".into()];
    let report = campaign.run(&mut bench);
    assert_eq!((report.admitted.len(), report.cases, report.programs), (0, 0, 0));
}

#[test]
fn engines_in_64_bit_mode() {
    conform(NativeMode::Long);
}

#[test]
fn engines_in_32_bit_mode() {
    conform(NativeMode::Protected32);
}

#[test]
fn engines_in_16_bit_mode() {
    conform(NativeMode::Protected16);
}

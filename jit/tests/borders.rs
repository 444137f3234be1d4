//! No guest reaches the host's memory: see [`Siege`]. `PARAVANE_FUZZ_ROUNDS` for more, `PARAVANE_FUZZ_SEED` for others.

use paravane_cpu::{Attention, CpuModel, HostFeatures, Interpreter, VpIndex, model_by_name};
use paravane_jit::fuzz::Siege;
use paravane_jit::host::{HostVectorUnit, NativeMode};
use paravane_jit::{JitOptions, Translator};
use std::sync::Mutex;

/// Canaries lie around everything: one siege at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

fn model() -> CpuModel {
    model_by_name("max", &HostFeatures::detect()).unwrap()
}

fn besiege(mode: NativeMode, window_after: u32) {
    let _guard = ONE_AT_A_TIME.lock();
    let mut siege = Siege::new(mode).unwrap();
    let reference =
        Interpreter::new(model(), Box::new(HostVectorUnit::new().unwrap()), Attention::default(), VpIndex(0));
    let memory = siege.guest().memory();
    let options = JitOptions { window_after, ..JitOptions::default() };
    let subject = Translator::new(model(), memory, Attention::default(), VpIndex(0), options).unwrap();
    siege.begin(Box::new(reference), Box::new(subject)).unwrap();
    let (mut attacks, mut findings) = (0, Vec::new());
    let first = setting("PARAVANE_FUZZ_SEED", 1);
    for form in siege.forms() {
        for seed in (first..).take(setting("PARAVANE_FUZZ_ROUNDS", 12) as usize) {
            let Some(lines) = siege.attack(form, seed) else { continue };
            attacks += 1;
            if !lines.is_empty() {
                findings.push(lines.join("\n    "));
            }
            let hurt = siege.hurt();
            assert!(hurt.is_empty(), "{form:?} seed {seed} wrote {hurt:x?}");
        }
    }
    println!("{mode:?}: {attacks} attacks");
    assert!(attacks > 5_000, "only {attacks}");
    assert_eq!(window_after == 0, siege.counter("windows_opened") > 0);
    let shown = findings.iter().take(10).map(String::as_str).collect::<Vec<_>>().join("\n");
    assert!(findings.is_empty(), "{} findings:\n{shown}", findings.len());
}

#[test]
fn guests_that_aim_at_the_host_in_64_bit_mode() {
    besiege(NativeMode::Long, u32::MAX);
}

#[test]
fn guests_that_aim_at_the_host_through_windows() {
    besiege(NativeMode::Long, 0);
}

#[test]
fn guests_that_aim_at_the_host_in_32_bit_mode() {
    besiege(NativeMode::Protected32, u32::MAX);
}

#[test]
fn guests_that_aim_at_the_host_through_windows_of_32_bit_code() {
    besiege(NativeMode::Protected32, 0);
}

#[test]
fn guests_that_aim_at_the_host_in_16_bit_mode() {
    besiege(NativeMode::Protected16, u32::MAX);
}

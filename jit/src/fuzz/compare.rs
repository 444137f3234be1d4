//! What must be equal, and what the manual leaves open.

use super::Outcome;
use super::generate::Case;
use super::vendor;
use crate::host::NativeStop;
use iced_x86::{Code, Instruction, Mnemonic, OpKind, RflagsBits};
use paravane_cpu::flags;

/// Flags compared: those that user code can see or change.
const COMPARED: u64 =
    flags::STATUS | flags::DF | flags::TF | flags::IF | flags::IOPL | flags::NT | flags::AC | flags::ID;

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

/// What an engine may do differently by design.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Leave {
    /// Nothing.
    Nothing,
    /// A faulting instruction shows flags that it, or code behind it, overwrites unread: liveness analysis takes them for
    /// dead.
    DeadFlags,
}

/// Status flags that `i` writes without reading them.
fn overwritten_flags(i: &Instruction) -> u64 {
    from_iced(i.rflags_modified() & !i.rflags_read())
}

/// One line per difference between what the host did and what an engine did.
pub fn differences(case: &Case, bits: u32, leave: Leave, host: &Outcome, engine: &Outcome) -> Vec<String> {
    let mut lines = Vec::new();
    let latitude = Latitude::of(&case.instruction, host);
    if !same_stop(&host.stop, &engine.stop, latitude) {
        lines.push(format!("exception: host {:x?}, engine {:x?}", host.stop, engine.stop));
        if latitude.may_skip_access && host.stop.vector == 14 {
            return Vec::new();
        }
    }
    let access = matches!(host.stop.vector, 12..=14 | 17);
    if access && vendor::accesses_come_first(&case.instruction) && has_numeric_exception(engine) {
        return Vec::new();
    }
    let width = if bits == 64 { u64::MAX } else { 0xFFFF_FFFF };
    let registers = if bits == 64 { 16 } else { 8 };
    for (n, name) in NAMES.iter().enumerate().take(registers) {
        if latitude.registers && n != 4 {
            continue;
        }
        let counter = latitude.counters && matches!(n, 1 | 6 | 7);
        let width = if counter { 0xFFFF_FFFF } else { width };
        let (a, b) = (host.state.gpr[n] & width, engine.state.gpr[n] & width);
        if a != b && !is_open(&case.instruction, n) {
            lines.push(format!("{name}: host {a:#x}, engine {b:#x} (before {:#x})", case.state.gpr[n]));
        }
    }
    let dead = match leave {
        Leave::Nothing => 0,
        Leave::DeadFlags if case.followed => flags::STATUS,
        Leave::DeadFlags => overwritten_flags(&case.instruction),
    };
    let torn = if vendor::leaves_flags_at_faults(&case.instruction) { flags::STATUS } else { 0 };
    let open = if host.stop.vector == 3 { case.open } else { case.open_before | dead | torn };
    let (a, b) = (host.state.rflags & COMPARED & !open, engine.state.rflags & COMPARED & !open);
    if a != b {
        lines.push(format!("rflags: host {a:#x}, engine {b:#x} (before {:#x})", case.state.rflags));
    }
    extended_state(host, engine, latitude, &mut lines);
    if !is_open_result(&case.instruction) || case.instruction.op0_register().is_gpr() {
        memory(case, host, engine, latitude, &mut lines);
    }
    lines
}

/// Whether an unmasked x87 exception is pending (FSW.ES), or `#XM` was raised.
fn has_numeric_exception(outcome: &Outcome) -> bool {
    outcome.state.fpu.0[2] & 0x80 != 0 || outcome.stop.vector == 19
}

/// What processors do differently where an instruction faults half-way; architecture leaves it open.
#[derive(Clone, Copy, Default)]
struct Latitude {
    /// Any address in the page may be reported: operands of many bytes are not accessed in order.
    address: bool,
    /// A gather's completed elements and mask.
    vectors: bool,
    /// The move to MMX state (TOP, tags) may have happened.
    mmx: bool,
    /// MXCSR flags of a store that faulted after the conversion.
    mxcsr: bool,
    /// A call to a non-canonical address may have written its return address below the stack pointer.
    return_slot: bool,
    /// A store that faulted on its second page may have been made in part on its first.
    torn: bool,
    /// Which of several accesses or checks is the one that faults.
    order: bool,
    /// The upper halves of the registers that a string instruction with 32-bit addresses counts with.
    counters: bool,
    /// The general registers but RSP.
    registers: bool,
    /// With nothing selected by the mask the access may not happen at all.
    may_skip_access: bool,
}

impl Latitude {
    fn of(i: &Instruction, host: &Outcome) -> Latitude {
        use Mnemonic as M;
        if host.stop.vector == 3 {
            return Latitude::default();
        }
        let registers = (0..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Register);
        let mmx = registers.map(|n| i.op_register(n)).any(|r| r.is_mm());
        Latitude {
            address: i.memory_size().size() > 8 || i.memory_size().size() == 0,
            vectors: i.is_vsib(),
            mmx,
            mxcsr: i.mnemonic() == M::Vcvtps2ph,
            return_slot: i.mnemonic() == M::Call,
            torn: host.stop.vector == 14 && vendor::tears_stores(i),
            order: matches!(
                i.mnemonic(),
                M::Call | M::Enter | M::Bound | M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq
            ) || is_x87_environment(i),
            counters: i.has_rep_prefix() || i.has_repne_prefix(),
            registers: vendor::leaves_registers_at_faults(i),
            may_skip_access: matches!(i.mnemonic(), M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu),
        }
    }
}

/// An x87 environment is many accesses, each with its own checks of segment and page.
fn is_x87_environment(i: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(i.mnemonic(), M::Fldenv | M::Frstor | M::Fnstenv | M::Fstenv | M::Fnsave | M::Fsave)
}

fn same_stop(host: &NativeStop, engine: &NativeStop, latitude: Latitude) -> bool {
    let seen = |stop: &NativeStop| {
        let address = if latitude.address { stop.address >> 12 } else { stop.address };
        // Linux tells nothing about its own half: every page there seems present.
        let hidden = if stop.address >> 63 != 0 { 1 } else { 0 };
        NativeStop { address, error_code: stop.error_code & !hidden, ..*stop }
    };
    let either = latitude.order && host.vector != 3 && engine.vector != 3;
    let several = host.rip == engine.rip && (either || vendor::prefers(host.vector, engine.vector));
    several || seen(host) == seen(engine)
}

fn extended_state(host: &Outcome, engine: &Outcome, latitude: Latitude, lines: &mut Vec<String>) {
    let (a, b) = (&host.state.fpu.0, &engine.state.fpu.0);
    if latitude.vectors {
        return;
    }
    let mut part = |name: std::fmt::Arguments<'_>, range: std::ops::Range<usize>| {
        let (a, b) = (&a[range.clone()], &b[range]);
        if a != b {
            lines.push(format!("{name}: host {}, engine {}", hex(a), hex(b)));
        }
    };
    part(format_args!("fcw"), 0..2);
    let x87 = !latitude.mmx;
    if x87 {
        part(format_args!("fsw"), 2..4);
        part(format_args!("ftw"), 4..5);
    }
    if !latitude.mxcsr {
        part(format_args!("mxcsr"), 24..28);
    }
    for n in 0..if x87 { 8 } else { 0 } {
        part(format_args!("st{n}"), 32 + 16 * n..42 + 16 * n);
    }
    for n in 0..16 {
        part(format_args!("xmm{n}"), 160 + 16 * n..176 + 16 * n);
        part(format_args!("ymm{n} high"), 576 + 16 * n..592 + 16 * n);
    }
}

fn memory(case: &Case, host: &Outcome, engine: &Outcome, latitude: Latitude, lines: &mut Vec<String>) {
    let slot = |n: usize| {
        let below = host.state.gpr[4].wrapping_sub(n as u64) & 0xFFF;
        latitude.return_slot && (1..=8).contains(&below)
    };
    // The fault is at the beginning of the second page.
    let torn = |n: usize| {
        let below = host.stop.address.wrapping_sub(n as u64) & 0xFFF;
        latitude.torn && (1..=9).contains(&below)
    };
    if host.arena == engine.arena {
        return;
    }
    let open = |n: usize| case.open_memory.iter().any(|range| range.contains(&n));
    let different = |n: &usize| host.arena[*n] != engine.arena[*n] && !slot(*n) && !torn(*n) && !open(*n);
    let Some(first) = (0..host.arena.len()).find(different) else { return };
    let last = (0..host.arena.len()).rfind(different).unwrap_or(first);
    let shown = first..(last + 1).min(first + 32);
    lines.push(format!(
        "arena {first:#x}..={last:#x}: host {}, engine {}",
        hex(&host.arena[shown.clone()]),
        hex(&engine.arena[shown])
    ));
}

/// Little-endian bytes as one number.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().rev().map(|b| format!("{b:02x}")).collect()
}

/// Status flags that the manual leaves undefined after `i`, where it is not known how this host leaves them.
pub fn undefined_flags(i: &Instruction, rcx: u64) -> u64 {
    if vendor::leaves_known_flags() {
        return 0;
    }
    from_iced(i.rflags_undefined()) | undefined_by_count(i, rcx)
}

/// Shifts and rotates: OF after counts other than 1, AF after shifts, CF after counts beyond the operand.
fn undefined_by_count(i: &Instruction, rcx: u64) -> u64 {
    use Mnemonic as M;
    let (shift, double) = match i.mnemonic() {
        M::Shl | M::Sal | M::Shr | M::Sar => (true, false),
        M::Shld | M::Shrd => (true, true),
        M::Rol | M::Ror | M::Rcl | M::Rcr => (false, false),
        _ => return 0,
    };
    let last = i.op_count() - 1;
    let raw = if i.op_kind(last) == OpKind::Immediate8 { u64::from(i.immediate8()) } else { rcx };
    let size = operand_bits(i);
    let count = raw & if size == 64 { 63 } else { 31 };
    let mut open = 0;
    if count == 0 {
        return 0;
    }
    if count != 1 {
        open |= flags::OF;
    }
    if shift {
        open |= flags::AF;
    }
    if shift && count >= size && i.mnemonic() != M::Sar {
        open |= flags::CF;
    }
    if double && count > size {
        open |= flags::STATUS;
    }
    open
}

fn operand_bits(i: &Instruction) -> u64 {
    match i.op0_kind() {
        OpKind::Register => i.op0_register().size() as u64 * 8,
        _ => i.memory_size().size() as u64 * 8,
    }
}

/// Whether the manual leaves the destination undefined: BSWAP of 16 bits, double shifts that may exceed 16 bits, and the
/// upper half of what PUSH of a segment register writes with a 32-bit operand size.
pub fn is_open_result(i: &Instruction) -> bool {
    use Code as C;
    if matches!(i.code(), C::Pushd_ES | C::Pushd_CS | C::Pushd_SS | C::Pushd_DS | C::Pushd_FS | C::Pushd_GS) {
        return true;
    }
    let listed = matches!(i.mnemonic(), Mnemonic::Bswap | Mnemonic::Shld | Mnemonic::Shrd);
    listed && operand_bits(i) == 16 && !vendor::leaves_known_flags()
}

fn is_open(i: &Instruction, register: usize) -> bool {
    is_open_result(i) && i.op0_register().is_gpr() && i.op0_register().full_register().number() == register
}

/// iced-x86's flag bits as EFLAGS bits.
pub fn from_iced(bits: u32) -> u64 {
    [
        (RflagsBits::OF, flags::OF),
        (RflagsBits::SF, flags::SF),
        (RflagsBits::ZF, flags::ZF),
        (RflagsBits::AF, flags::AF),
        (RflagsBits::CF, flags::CF),
        (RflagsBits::PF, flags::PF),
    ]
    .iter()
    .filter(|(bit, _)| bits & bit != 0)
    .map(|(_, flag)| flag)
    .sum()
}

//! Status-flag liveness: which flags some later instruction may read.

use iced_x86::{Instruction, Mnemonic, OpKind, RflagsBits};

/// A set of status flags in iced's bit layout.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct FlagSet(pub u32);

impl FlagSet {
    pub(crate) const NONE: FlagSet = FlagSet(0);
    pub(crate) const CF: FlagSet = FlagSet(RflagsBits::CF);
    pub(crate) const ZF: FlagSet = FlagSet(RflagsBits::ZF);
    pub(crate) const ALL: FlagSet = FlagSet(
        RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF,
    );

    pub(crate) fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(crate) fn or(self, other: FlagSet) -> FlagSet {
        FlagSet(self.0 | other.0)
    }

    /// Whether all flags of `self` are in `other`.
    pub(crate) fn within(self, other: FlagSet) -> bool {
        self.0 & !other.0 == 0
    }
}

/// What an instruction does to the status flags.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effect {
    pub(crate) reads: FlagSet,
    /// It may change some.
    pub(crate) writes: bool,
    /// It certainly replaces these, whatever its operands are at run time.
    pub(crate) kills: FlagSet,
}

impl Effect {
    pub(crate) fn of(instr: &Instruction) -> Effect {
        Effect {
            reads: FlagSet(instr.rflags_read() & FlagSet::ALL.0),
            writes: instr.rflags_modified() & FlagSet::ALL.0 != 0,
            kills: FlagSet(killed(instr)),
        }
    }

    /// The effect of all instructions of the form of `instr`, if it is the same: it may depend on REP or the count of a shift.
    pub(crate) fn of_form(instr: &Instruction) -> Option<Effect> {
        use Mnemonic as M;
        let shifts = matches!(
            instr.mnemonic(),
            M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
        );
        (!shifts && !instr.is_string_instruction()).then(|| Effect::of(instr))
    }

    /// Flags live before the instruction, given those live after it.
    pub(crate) fn before(self, after: FlagSet) -> FlagSet {
        FlagSet(after.0 & !self.kills.0).or(self.reads)
    }
}

/// Flags that `instr` certainly replaces, whatever its operands are at run time.
fn killed(instr: &Instruction) -> u32 {
    let modified = instr.rflags_modified() & FlagSet::ALL.0;
    // Left undefined by the manual, and as they were by some processors (`paravane_cpu`, undefined flags): what follows sees
    // what came before.
    let kept = instr.rflags_undefined();
    match instr.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal | Mnemonic::Shr | Mnemonic::Sar | Mnemonic::Shld | Mnemonic::Shrd
            if counts_something(instr) =>
        {
            modified
        }
        Mnemonic::Rol | Mnemonic::Ror | Mnemonic::Rcl | Mnemonic::Rcr if counts_something(instr) => {
            if instr.immediate8() == 1 { modified } else { modified & !RflagsBits::OF }
        }
        Mnemonic::Shl
        | Mnemonic::Sal
        | Mnemonic::Shr
        | Mnemonic::Sar
        | Mnemonic::Rol
        | Mnemonic::Ror
        | Mnemonic::Rcl
        | Mnemonic::Rcr
        | Mnemonic::Shld
        | Mnemonic::Shrd => 0,
        // A count of zero compares nothing and leaves the flags as they are (SDM 2B, REP).
        Mnemonic::Cmpsb
        | Mnemonic::Cmpsw
        | Mnemonic::Cmpsd
        | Mnemonic::Cmpsq
        | Mnemonic::Scasb
        | Mnemonic::Scasw
        | Mnemonic::Scasd
        | Mnemonic::Scasq
            if instr.has_rep_prefix() || instr.has_repne_prefix() =>
        {
            0
        }
        Mnemonic::Mul
        | Mnemonic::Imul
        | Mnemonic::Div
        | Mnemonic::Idiv
        | Mnemonic::Bt
        | Mnemonic::Bts
        | Mnemonic::Btr
        | Mnemonic::Btc
        | Mnemonic::Tzcnt
        | Mnemonic::Lzcnt
        | Mnemonic::Mov => modified & !kept,
        _ => modified,
    }
}

/// Whether a shift or rotate surely is by more than nothing.
fn counts_something(instr: &Instruction) -> bool {
    instr.op_kind(instr.op_count() - 1) == OpKind::Immediate8 && instr.immediate8() & 0x1F != 0
}

/// How status flags leave a block by one of its exits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FlagsOut {
    /// In EFLAGS, as far as some later instruction may read them.
    Live(FlagSet),
    /// All of them in [`crate::context::JitContext::saved_flags`]; EFLAGS may hold anything.
    Saved,
}

impl FlagsOut {
    /// What EFLAGS must hold.
    pub(crate) fn live(self) -> FlagSet {
        match self {
            FlagsOut::Live(flags) => flags,
            FlagsOut::Saved => FlagSet::NONE,
        }
    }
}

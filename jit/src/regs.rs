//! Where guest registers live on the host.

use iced_x86::Register;

/// Host register of guest RSP.
pub(crate) const HOST_RSP: u8 = 8;
/// The host registers with the bases of the delta tables.
pub(crate) const WRITE_BASE: u8 = 14;
pub(crate) const READ_BASE: u8 = 15;
/// Scratch registers, in the order operands get them.
pub(crate) const R10: u8 = 10;
pub(crate) const R11: u8 = 11;
pub(crate) const R9: u8 = 9;
/// Host and guest RCX.
pub(crate) const RCX: u8 = 1;

/// Where a guest general register is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// In the host register of this number.
    Host(u8),
    /// In `JitContext::home[n]`.
    Home(u8),
}

/// Guest registers in `JitContext::home`, in this order: those that hot loops use least.
pub(crate) const HOMES: [usize; 6] = [10, 11, 12, 13, 14, 15];
/// Guest registers with a host register other than that of RSP, and that.
pub(crate) const PINNED: [(u8, u8); 9] =
    [(0, 0), (1, 1), (2, 2), (3, 3), (5, 5), (6, 6), (7, 7), (8, 12), (9, 13)];

/// The place of guest register `number` (0–15).
pub(crate) fn place(number: u8) -> Place {
    match number {
        4 => Place::Host(HOST_RSP),
        n @ 8..=9 => Place::Host(n + 4),
        n @ 10..=15 => Place::Home(n - 10),
        n => Place::Host(n),
    }
}

/// Encoding number of a general register of any size; AH–BH count as their full register.
pub(crate) fn number(r: Register) -> u8 {
    r.full_register().number() as u8
}

/// AH, CH, DH or BH.
pub(crate) fn is_high_byte(r: Register) -> bool {
    matches!(r, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// Register `n` of the same size as `like`.
pub(crate) fn same_size(like: Register, n: u8) -> Register {
    const R8: [Register; 16] = [
        Register::AL,
        Register::CL,
        Register::DL,
        Register::BL,
        Register::SPL,
        Register::BPL,
        Register::SIL,
        Register::DIL,
        Register::R8L,
        Register::R9L,
        Register::R10L,
        Register::R11L,
        Register::R12L,
        Register::R13L,
        Register::R14L,
        Register::R15L,
    ];
    match like.size() {
        1 => R8[n as usize],
        2 => Register::AX + u32::from(n),
        4 => Register::EAX + u32::from(n),
        _ => Register::RAX + u32::from(n),
    }
}

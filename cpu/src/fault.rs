//! Guest faults as values (SDM 3A, chapter 6).

use crate::state::LinAddr;

/// An IDT index.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Vector(pub u8);

#[expect(missing_docs, reason = "the manual's mnemonics")]
impl Vector {
    pub const DE: Vector = Vector(0);
    pub const DB: Vector = Vector(1);
    pub const NMI: Vector = Vector(2);
    pub const BP: Vector = Vector(3);
    pub const OF: Vector = Vector(4);
    pub const BR: Vector = Vector(5);
    pub const UD: Vector = Vector(6);
    pub const NM: Vector = Vector(7);
    pub const DF: Vector = Vector(8);
    pub const TS: Vector = Vector(10);
    pub const NP: Vector = Vector(11);
    pub const SS: Vector = Vector(12);
    pub const GP: Vector = Vector(13);
    pub const PF: Vector = Vector(14);
    pub const MF: Vector = Vector(16);
    pub const AC: Vector = Vector(17);
    pub const MC: Vector = Vector(18);
    pub const XM: Vector = Vector(19);
}

/// An exception raised by an instruction: a value, never a panic.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    /// Which exception.
    pub vector: Vector,
    /// The error code pushed, where the exception has one.
    pub error_code: Option<u32>,
    /// The faulting linear address (page faults only), loaded into CR2 at delivery.
    pub cr2: Option<LinAddr>,
}

impl Fault {
    /// A fault without error code.
    pub const fn new(vector: Vector) -> Fault {
        Fault { vector, error_code: None, cr2: None }
    }

    /// A fault with an error code.
    pub const fn with_code(vector: Vector, code: u32) -> Fault {
        Fault { vector, error_code: Some(code), cr2: None }
    }

    /// `#UD`.
    pub const UD: Fault = Fault::new(Vector::UD);
    /// `#NM`.
    pub const NM: Fault = Fault::new(Vector::NM);
    /// `#GP(0)`.
    pub const GP0: Fault = Fault::with_code(Vector::GP, 0);
    /// `#SS(0)`.
    pub const SS0: Fault = Fault::with_code(Vector::SS, 0);

    /// `#GP(selector)`: RPL bits cleared.
    pub const fn gp(selector: u16) -> Fault {
        Fault::with_code(Vector::GP, (selector & !3) as u32)
    }

    /// `#PF(code)` at `cr2`.
    pub const fn page(cr2: LinAddr, code: u32) -> Fault {
        Fault { vector: Vector::PF, error_code: Some(code), cr2: Some(cr2) }
    }
}

//! What `dynasm!` emits into: bytes in a vector. dynasmrt has the same, but its functions are called for every byte; these are
//! inlined, and translation is mostly that.

use dynasmrt::{AssemblyOffset, DynasmApi};

/// Bytes of code under construction.
#[derive(Default)]
pub(crate) struct SimpleAssembler {
    /// The code so far.
    pub(crate) ops: Vec<u8>,
}

impl SimpleAssembler {
    pub(crate) fn new() -> SimpleAssembler {
        SimpleAssembler::default()
    }

    /// The code.
    pub(crate) fn finalize(self) -> Vec<u8> {
        self.ops
    }
}

impl Extend<u8> for SimpleAssembler {
    #[inline]
    fn extend<T: IntoIterator<Item = u8>>(&mut self, bytes: T) {
        self.ops.extend(bytes);
    }
}

impl<'a> Extend<&'a u8> for SimpleAssembler {
    #[inline]
    fn extend<T: IntoIterator<Item = &'a u8>>(&mut self, bytes: T) {
        self.ops.extend(bytes);
    }
}

impl DynasmApi for SimpleAssembler {
    #[inline]
    fn offset(&self) -> AssemblyOffset {
        AssemblyOffset(self.ops.len())
    }

    #[inline]
    fn push(&mut self, byte: u8) {
        self.ops.push(byte);
    }

    #[inline]
    fn align(&mut self, alignment: usize, with: u8) {
        self.ops.resize(self.ops.len().next_multiple_of(alignment), with);
    }
}

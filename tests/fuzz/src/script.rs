//! An input read as a script: every operation takes at least one byte, so a script ends.

/// What is left of an input. Values past its end are zero.
pub struct Script<'a> {
    rest: &'a [u8],
}

impl<'a> Script<'a> {
    /// Reads `bytes` from their start.
    pub fn new(bytes: &'a [u8]) -> Script<'a> {
        Script { rest: bytes }
    }

    /// The next operation's first byte; `None` at the end.
    pub fn next(&mut self) -> Option<u8> {
        let (&first, rest) = self.rest.split_first()?;
        self.rest = rest;
        Some(first)
    }

    /// One byte.
    pub fn u8(&mut self) -> u8 {
        self.next().unwrap_or(0)
    }

    /// Two bytes, little-endian.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// Four bytes, little-endian.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// A little-endian number of `bytes` (at most 8) bytes.
    pub fn number(&mut self, bytes: usize) -> u64 {
        (0..bytes.min(8)).fold(0, |n, i| n | u64::from(self.u8()) << (8 * i))
    }

    /// Up to `len` bytes.
    pub fn take(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.rest.split_at(len.min(self.rest.len()));
        self.rest = rest;
        taken
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// One of `list`, which is not empty.
    pub fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[usize::from(self.u8()) % list.len()]
    }

    /// An address or a number such as hostile guests use: near the borders of RAM, of the hole, of a width, of everything.
    pub fn wild(&mut self) -> u64 {
        const BASES: [u64; 16] = [
            0,
            0x1000,
            0x9_FC00,
            0x10_0000,
            0x1F_F000,
            0x20_0000,
            0x7FFF_FFFF,
            0xBFFF_FFF0,
            0xE000_0000,
            0xFEE0_0000,
            0xFFFF_FFFF,
            1 << 32,
            1 << 46,
            i64::MAX as u64,
            0u64.wrapping_sub(0x1000),
            u64::MAX,
        ];
        let base = self.of(&BASES);
        base.wrapping_add(i64::from(self.u16() as i16) as u64)
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.u8())
    }
}

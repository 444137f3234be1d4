//! Translated blocks, the jumps between them, and how to find both.

use crate::code_cache::CodeOffset;
use hashbrown::HashMap;
use paravane_memory::{PAGE_SHIFT, RamOffset};

/// Everything the translation of a block depends on besides its bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) struct Mode(pub u32);

impl Mode {
    /// 32-bit code.
    pub(crate) const CODE32: u32 = 1 << 0;
    /// CPL 3.
    pub(crate) const USER: u32 = 1 << 1;
    /// x87 and MMX usable (CR0.EM and TS clear).
    pub(crate) const X87: u32 = 1 << 2;
    /// SSE usable.
    pub(crate) const SSE: u32 = 1 << 3;
    /// AVX usable.
    pub(crate) const AVX: u32 = 1 << 4;
    /// 16-bit code.
    pub(crate) const CODE16: u32 = 1 << 5;
    /// DF is set.
    pub(crate) const DOWN: u32 = 1 << 6;
    /// Count retired instructions.
    pub(crate) const COUNTED: u32 = 1 << 7;
    /// Leave before more instructions are counted than the budget has.
    pub(crate) const BUDGETED: u32 = 1 << 22;
    /// The copy of a block that uses no base group.
    pub(crate) const UNGROUPED: u32 = 1 << 8;
    /// CR4.SMAP.
    pub(crate) const SMAP: u32 = 1 << 9;
    /// RDTSC may be translated.
    pub(crate) const TSC: u32 = 1 << 10;
    /// CR4.FSGSBASE.
    pub(crate) const FSGSBASE: u32 = 1 << 23;
    /// CPL 1 or 2.
    pub(crate) const MIDDLE: u32 = 1 << 11;
    /// Real-address or virtual-8086 mode.
    pub(crate) const LEGACY: u32 = 1 << 12;
    /// Not 64-bit code, and ES, SS or DS are not the flat, writable segments of 32-bit systems.
    pub(crate) const SEGMENTED: u32 = 1 << 13;
    /// The stack pointer is SP.
    pub(crate) const STACK16: u32 = 1 << 14;
    /// Some segment expands down.
    pub(crate) const EXPAND_DOWN: u32 = 1 << 15;

    /// Accesses through segment register `number` need few checks. 32-bit code: readable and writable up to 4 GiB. 16-bit
    /// code: readable and writable up to 64 KiB at least, with a base that keeps the alignment of offsets; in real-address and
    /// virtual-8086 mode also after other selectors are loaded. Not used for what is flat anyway.
    pub(crate) const fn plain(number: u8) -> u32 {
        1 << (16 + number)
    }

    /// Operand and address size of the code.
    pub(crate) fn bits(self) -> u32 {
        match self.0 & (Mode::CODE16 | Mode::CODE32) {
            0 => 64,
            Mode::CODE16 => 16,
            _ => 32,
        }
    }

    /// 64-bit code.
    pub(crate) fn code64(self) -> bool {
        self.bits() == 64
    }

    /// The linear address of a code address (see `segments`).
    pub(crate) fn linear(self, address: u64) -> u64 {
        if self.code64() { address } else { address & 0xFFFF_FFFF }
    }

    /// The code address `n` bytes behind `address`; linear addresses have 32 bits outside 64-bit code.
    pub(crate) fn advance(self, address: u64, n: u64) -> u64 {
        let sum = address.wrapping_add(n);
        if self.code64() { sum } else { address & !0xFFFF_FFFF | sum & 0xFFFF_FFFF }
    }

    /// Whether `bit` is set.
    pub(crate) fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }
}

/// Identifies a block: its bytes, where they are seen, and how.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct BlockKey {
    pub(crate) at: RamOffset,
    /// Code address (see `segments`).
    pub(crate) address: u64,
    pub(crate) mode: Mode,
}

impl BlockKey {
    /// Linear address of the first byte.
    pub(crate) fn linear(&self) -> u64 {
        self.mode.linear(self.address)
    }
}

/// Index into the block list.
pub(crate) type BlockId = u32;

/// One jump out of a block that can be chained.
pub(crate) struct Link {
    /// The 32-bit displacement of the jump.
    pub(crate) site: CodeOffset,
    /// Where it goes while unchained.
    pub(crate) stub: CodeOffset,
    /// Guest status flags may be live across it.
    pub(crate) flags_live: bool,
    /// Source and target lie on one page.
    pub(crate) same_page: bool,
    /// Leads to the ungrouped copy of its target.
    pub(crate) ungrouped: bool,
}

/// A translated block.
pub(crate) struct Block {
    pub(crate) key: BlockKey,
    /// Code: the indirect entry, which checks the code address in r11.
    pub(crate) start: CodeOffset,
    /// Code: the direct entry.
    pub(crate) entry: CodeOffset,
    pub(crate) code_len: u32,
    /// Host offset from `start` of each instruction's code, and its offset from the block's first byte.
    pub(crate) sites: Box<[(u32, u32)]>,
    /// Links that jump here, to be unchained when the block goes.
    pub(crate) incoming: Vec<u32>,
    /// Jump-cache tables hold this block.
    pub(crate) cached: bool,
    pub(crate) live: bool,
    /// The second page of an instruction that crosses (backing page number).
    pub(crate) crosses_into: Option<u64>,
    /// Instructions counted at the entry.
    pub(crate) counted: u32,
}

impl Block {
    /// Code address of the instruction whose code holds `at`, and how many from it on were counted.
    pub(crate) fn rip_at(&self, at: CodeOffset) -> Option<(u64, u32)> {
        let off = at.0 - self.start.0;
        let i = self.sites.partition_point(|s| s.0 <= off).checked_sub(1)?;
        Some((
            self.key.mode.advance(self.key.address, u64::from(self.sites[i].1)),
            self.counted.saturating_sub(i as u32),
        ))
    }
}

/// All blocks of a vCPU.
#[derive(Default)]
pub(crate) struct BlockTable {
    map: HashMap<BlockKey, BlockId>,
    pages: HashMap<u64, Vec<BlockId>>,
    pub(crate) blocks: Vec<Block>,
    pub(crate) links: Vec<Link>,
}

impl BlockTable {
    pub(crate) fn find(&self, key: &BlockKey) -> Option<BlockId> {
        self.map.get(key).copied()
    }

    /// Adds a block.
    pub(crate) fn insert(&mut self, block: Block) -> BlockId {
        let id = self.blocks.len() as BlockId;
        self.map.insert(block.key, id);
        let first = block.key.at.0 >> PAGE_SHIFT;
        for page in std::iter::once(first).chain(block.crosses_into) {
            self.pages.entry(page).or_default().push(id);
        }
        self.blocks.push(block);
        id
    }

    /// Blocks with bytes on the page, removed from it.
    pub(crate) fn take_page(&mut self, page: u64) -> Vec<BlockId> {
        self.pages.remove(&page).unwrap_or_default()
    }

    /// Marks a block dead and forgets its key.
    pub(crate) fn retire(&mut self, id: BlockId) {
        let block = &mut self.blocks[id as usize];
        block.live = false;
        let key = block.key;
        if self.map.get(&key) == Some(&id) {
            self.map.remove(&key);
        }
    }

    /// The block whose code holds `at`.
    pub(crate) fn by_code(&self, at: CodeOffset) -> Option<&Block> {
        let i = self.blocks.partition_point(|b| b.start <= at).checked_sub(1)?;
        let b = &self.blocks[i];
        (at.0 - b.start.0 < b.code_len).then_some(b)
    }

    /// All pages with blocks.
    pub(crate) fn pages(&self) -> impl Iterator<Item = u64> + '_ {
        self.pages.keys().copied()
    }

    pub(crate) fn clear(&mut self) {
        *self = BlockTable::default();
    }
}

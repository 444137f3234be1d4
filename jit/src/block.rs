//! Translated blocks, the jumps between them, and how to find both.

mod mode;
mod moving;

use crate::code_cache::CodeOffset;
use crate::flags::FlagsOut;
use hashbrown::{DefaultHashBuilder, HashMap, HashTable};
pub(crate) use mode::Mode;
use moving::Instances;
use paravane_memory::{PAGE_SHIFT, RamOffset};
use std::hash::BuildHasher;
use std::num::NonZeroU32;
use std::ops::Range;

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

    /// What the validation cell of its page holds while it is there.
    pub(crate) fn cell(&self) -> u32 {
        (self.at.0 >> PAGE_SHIFT) as u32 + 1
    }
}

/// Index into the block list.
pub(crate) type BlockId = u32;

/// Ends the lists inside [`BlockTable`].
const NONE: u32 = u32::MAX;

/// One jump out of a block that can be chained.
pub(crate) struct Link {
    /// Code address it leads to.
    pub(crate) target: u64,
    /// The 32-bit displacement of the jump.
    pub(crate) site: CodeOffset,
    /// Where it goes while unchained.
    pub(crate) stub: CodeOffset,
    /// Where the guest's status flags are meanwhile.
    pub(crate) flags: FlagsOut,
    /// Source and target lie on one page.
    pub(crate) same_page: bool,
    /// Leads to the ungrouped copy of its target.
    pub(crate) ungrouped: bool,
    /// Leads backwards: may close a loop.
    pub(crate) back: bool,
    /// Was counted, or is.
    pub(crate) counted: bool,
    /// The block it was chained to last.
    pub(crate) to: Option<BlockId>,
    /// It jumps there, uncounted.
    pub(crate) chained: bool,
    /// Code on its way to another page.
    pub(crate) thunk: Option<CodeOffset>,
}

/// Parts of a page, of 64 bytes each: one bit per part.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Granules(pub u64);

impl Granules {
    pub(crate) const ALL: Granules = Granules(u64::MAX);
    /// Where instructions end that cross into the page: the first 15 bytes.
    const HEAD: Granules = Granules(1);
    const SHIFT: u32 = PAGE_SHIFT - 6;

    /// Those with bytes `from..to` of a page, which are not none.
    pub(crate) fn of(from: usize, to: usize) -> Granules {
        let (first, last) = (from.min(4095) >> Self::SHIFT, (to - 1).min(4095) >> Self::SHIFT);
        Granules(u64::MAX << first & u64::MAX >> (63 - last))
    }

    pub(crate) fn add(&mut self, other: Granules) {
        self.0 |= other.0;
    }

    /// Where in the page they lie.
    pub(crate) fn parts(self) -> impl Iterator<Item = std::ops::Range<usize>> {
        let bytes = 1 << Self::SHIFT;
        (0..64).filter(move |n| self.0 & 1 << n != 0).map(move |n| n * bytes..(n + 1) * bytes)
    }

    fn meets(self, other: Granules) -> bool {
        self.0 & other.0 != 0
    }
}

/// One instruction of a block, in four bytes: where its code begins, its offset from the block's first byte, and how far the guest's
/// stack pointer is from its host register, which moves once for a run of words.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct InstructionSite(u32);

impl InstructionSite {
    const HOST: u32 = 14;
    const GUEST: u32 = 14;
    /// Where the code of an instruction begins at most.
    pub(crate) const MAX_HOST: usize = (1 << Self::HOST) - 1;
    /// By how many words the stack pointer may be behind.
    pub(crate) const MAX_PENDING: i32 = (1 << (31 - Self::HOST - Self::GUEST)) - 1;

    /// In a trace, which stays on its page but for what comes behind it, `guest` may be negative.
    pub(crate) fn new(host: usize, guest: i16) -> InstructionSite {
        debug_assert!(host <= Self::MAX_HOST && guest.unsigned_abs() < 1 << (Self::GUEST - 1));
        let guest = guest as u32 & ((1 << Self::GUEST) - 1);
        InstructionSite(guest << Self::HOST | host.min(Self::MAX_HOST) as u32)
    }

    /// With the stack pointer `words` from its host register.
    pub(crate) fn with_pending(self, words: i32) -> InstructionSite {
        debug_assert!(words.abs() <= Self::MAX_PENDING);
        let rest = Self::HOST + Self::GUEST;
        InstructionSite(self.0 & ((1 << rest) - 1) | (words as u32) << rest)
    }

    pub(crate) fn host(self) -> u32 {
        self.0 & ((1 << Self::HOST) - 1)
    }

    pub(crate) fn pending(self) -> i32 {
        self.0 as i32 >> (Self::HOST + Self::GUEST)
    }

    /// Its code address in a block at `key`.
    pub(crate) fn address(self, key: &BlockKey) -> u64 {
        let guest = (self.0 << (32 - Self::HOST - Self::GUEST)) as i32 >> (32 - Self::GUEST);
        key.mode.advance(key.address, i64::from(guest) as u64)
    }
}

/// A translated block.
pub(crate) struct Block {
    pub(crate) key: BlockKey,
    /// Code that does what the block does.
    pub(crate) start: CodeOffset,
    /// Code: where direct jumps enter.
    pub(crate) entry: CodeOffset,
    /// Code: where jumps enter that leave the status flags in `JitContext::saved_flags`, all indirect ones among them.
    pub(crate) saved_entry: CodeOffset,
    /// From here on in the code the status flags are in `JitContext::saved_flags`.
    pub(crate) flags_saved: CodeOffset,
    pub(crate) code_len: u32,
    /// Code: misses and exits.
    pub(crate) cold: Range<u32>,
    /// Instructions counted at the entry.
    pub(crate) counted: u8,
    /// Jump-cache tables hold this block.
    pub(crate) cached: bool,
    pub(crate) live: bool,
    /// It follows a path that was taken, beyond branches.
    pub(crate) trace: bool,
    /// The second page of an instruction that crosses: its backing page number.
    pub(crate) crosses_into: Option<NonZeroPage>,
    /// Its instructions in [`BlockTable::sites`].
    sites: (u32, u16),
    /// Its jumps in [`BlockTable::links`].
    links: (u32, u16),
    /// What moves with it in [`BlockTable::constants`].
    constants: (u32, u16),
    /// First of the links that jump here, in `incoming`.
    incoming: u32,
}

/// A backing page number, plus one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct NonZeroPage(NonZeroU32);

impl NonZeroPage {
    /// The page with this number; pages beyond 2^32 - 2 are none of ours.
    pub(crate) fn new(page: u64) -> Option<NonZeroPage> {
        u32::try_from(page + 1).ok().and_then(NonZeroU32::new).map(NonZeroPage)
    }

    pub(crate) fn number(self) -> u64 {
        u64::from(self.0.get() - 1)
    }
}

/// What a new block is made of.
pub(crate) struct NewBlock<'a> {
    pub(crate) key: BlockKey,
    pub(crate) start: CodeOffset,
    pub(crate) entry: CodeOffset,
    pub(crate) saved_entry: CodeOffset,
    pub(crate) flags_saved: CodeOffset,
    pub(crate) code_len: u32,
    pub(crate) cold: Range<u32>,
    /// What of its page it was made from: its bytes, and those that were looked at to see which flags matter behind it.
    pub(crate) granules: Granules,
    pub(crate) counted: u8,
    pub(crate) crosses_into: Option<NonZeroPage>,
    pub(crate) trace: bool,
    pub(crate) sites: &'a [InstructionSite],
    /// How many of the last links and constants are its own.
    pub(crate) links: u16,
    pub(crate) constants: u16,
}

/// The live blocks made from a page, and what of it they were made from: each of them, and at most all together.
#[derive(Default)]
struct PageBlocks {
    granules: Granules,
    blocks: Vec<(Granules, BlockId)>,
    /// Of blocks that use tables, and of those that use a window.
    instances: [Instances; 2],
}

impl PageBlocks {
    fn add(&mut self, granules: Granules, id: BlockId) {
        self.granules.add(granules);
        self.blocks.push((granules, id));
    }
}

/// A link that jumps to a block, and the next of the block's.
struct Incoming {
    link: u32,
    next: u32,
}

/// A live block, and what its key hashes to: most look-ups are for blocks that are yet to be made, and need not touch others.
struct Known {
    hash: u32,
    id: BlockId,
}

impl Known {
    /// The hash as the table wants it: it uses both ends.
    fn spread(hash: u32) -> u64 {
        u64::from(hash) << 32 | u64::from(hash)
    }
}

/// All blocks of a vCPU. What belongs to blocks lies in lists and slices of a few large vectors: blocks are made one by one
/// and go all at once.
#[derive(Default)]
pub(crate) struct BlockTable {
    /// Live blocks by key.
    map: HashTable<Known>,
    hasher: DefaultHashBuilder,
    /// By backing page.
    pages: HashMap<u64, PageBlocks>,
    pub(crate) blocks: Vec<Block>,
    pub(crate) links: Vec<Link>,
    /// Where code holds addresses, of 64 bits, that move with it.
    pub(crate) constants: Vec<CodeOffset>,
    sites: Vec<InstructionSite>,
    incoming: Vec<Incoming>,
}

impl Block {
    /// Where a jump enters that brings the status flags as `flags` says.
    pub(crate) fn entry_for(&self, flags: FlagsOut) -> CodeOffset {
        if flags == FlagsOut::Saved { self.saved_entry } else { self.entry }
    }
}

impl BlockTable {
    pub(crate) fn find(&self, key: &BlockKey) -> Option<BlockId> {
        let hash = self.hash(key);
        let is_it = |known: &Known| known.hash == hash && self.blocks[known.id as usize].key == *key;
        self.map.find(Known::spread(hash), is_it).map(|known| known.id)
    }

    fn hash(&self, key: &BlockKey) -> u32 {
        self.hasher.hash_one(key) as u32
    }

    /// Lets block `id` be found by `key`.
    fn know(&mut self, key: &BlockKey, id: BlockId) {
        let hash = self.hash(key);
        self.map.insert_unique(Known::spread(hash), Known { hash, id }, |known| Known::spread(known.hash));
    }

    /// Block `id` is not found by its key any more.
    fn forget(&mut self, id: BlockId) {
        let hash = self.hash(&self.blocks[id as usize].key);
        if let Ok(entry) = self.map.find_entry(Known::spread(hash), |known| known.id == id) {
            entry.remove();
        }
    }

    /// Adds a block.
    pub(crate) fn insert(&mut self, new: NewBlock<'_>) -> BlockId {
        let NewBlock { key, granules, crosses_into, sites, .. } = new;
        let id = self.blocks.len() as BlockId;
        self.know(&key, id);
        let on_page = self.pages.entry(key.at.0 >> PAGE_SHIFT).or_default();
        on_page.add(granules, id);
        on_page.note_instance(&key);
        if let Some(second) = crosses_into {
            self.pages.entry(second.number()).or_default().add(Granules::HEAD, id);
        }
        let at = self.sites.len() as u32;
        self.sites.extend_from_slice(sites);
        self.blocks.push(Block {
            key,
            start: new.start,
            entry: new.entry,
            saved_entry: new.saved_entry,
            flags_saved: new.flags_saved,
            code_len: new.code_len,
            cold: new.cold,
            counted: new.counted,
            cached: false,
            live: true,
            trace: new.trace,
            crosses_into,
            sites: (at, sites.len() as u16),
            links: (self.links.len() as u32 - u32::from(new.links), new.links),
            constants: (self.constants.len() as u32 - u32::from(new.constants), new.constants),
            incoming: NONE,
        });
        id
    }

    /// The instructions of a block.
    pub(crate) fn sites(&self, block: &Block) -> &[InstructionSite] {
        let (at, n) = block.sites;
        &self.sites[at as usize..at as usize + usize::from(n)]
    }

    /// Whether an instruction of `block` begins at linear address `lin`.
    pub(crate) fn has_instruction(&self, block: &Block, lin: u64) -> bool {
        self.sites(block).iter().any(|site| block.key.mode.linear(site.address(&block.key)) == lin)
    }

    /// The instruction of `block` whose code holds `at`, and its number.
    fn site_at(&self, block: &Block, at: CodeOffset) -> Option<(usize, InstructionSite)> {
        let off = at.0 - block.start.0;
        let sites = self.sites(block);
        let i = sites.partition_point(|s| s.host() <= off).checked_sub(1)?;
        Some((i, sites[i]))
    }

    /// Code address of the instruction of `block` whose code holds `at`, and how many from it on were counted.
    pub(crate) fn rip_at(&self, block: &Block, at: CodeOffset) -> Option<(u64, u32)> {
        let (i, site) = self.site_at(block, at)?;
        Some((site.address(&block.key), u32::from(block.counted).saturating_sub(i as u32)))
    }

    /// How far the guest's stack pointer is from its host register at `at`, where a host instruction of `block` faults.
    pub(crate) fn pending_rsp_at(&self, block: &Block, at: CodeOffset) -> i64 {
        let width = if block.key.mode.code64() { 8 } else { 4 };
        self.site_at(block, at).map_or(0, |(_, site)| i64::from(site.pending()) * width)
    }

    /// Records that link `link` jumps to block `to`.
    pub(crate) fn add_incoming(&mut self, to: BlockId, link: u32) {
        if self.links[link as usize].to.replace(to) == Some(to) {
            return;
        }
        let first = &mut self.blocks[to as usize].incoming;
        let at = self.incoming.len() as u32;
        self.incoming.push(Incoming { link, next: *first });
        *first = at;
    }

    /// The links that jump to block `to`, or did.
    pub(crate) fn incoming(&self, to: BlockId) -> impl Iterator<Item = &Link> {
        let first = self.incoming.get(self.blocks[to as usize].incoming as usize);
        let list = std::iter::successors(first, |link| self.incoming.get(link.next as usize));
        list.filter_map(|incoming| self.links.get(incoming.link as usize))
    }

    /// Takes one link off those that jump to block `to`.
    pub(crate) fn take_incoming(&mut self, to: BlockId) -> Option<&Link> {
        let first = &mut self.blocks[to as usize].incoming;
        loop {
            let Incoming { link, next } = self.incoming.get(*first as usize)?;
            *first = *next;
            let number = *link as usize;
            if self.links[number].to == Some(to) {
                let link = &mut self.links[number];
                (link.to, link.chained) = (None, false);
                return Some(link);
            }
        }
    }

    /// Takes the blocks made from some of `written` of the page off their pages, to be retired, and says whether the page has
    /// others.
    pub(crate) fn take(&mut self, page: u64, written: Granules, taken: &mut Vec<BlockId>) -> bool {
        let Some(on_page) = self.pages.get_mut(&page) else { return false };
        if !on_page.granules.meets(written) {
            return true;
        }
        let mut left = Granules::default();
        on_page.blocks.retain(|&(granules, id)| {
            if granules.meets(written) {
                taken.push(id);
            } else {
                left.add(granules);
            }
            !granules.meets(written)
        });
        on_page.granules = left;
        let others = !on_page.blocks.is_empty();
        if !others {
            self.pages.remove(&page);
        }
        for &id in &*taken {
            if self.blocks[id as usize].crosses_into.is_some() {
                self.unlist(id);
            }
        }
        others
    }

    /// Takes a block off its pages.
    fn unlist(&mut self, id: BlockId) {
        let block = &self.blocks[id as usize];
        for page in [Some(block.key.at.0 >> PAGE_SHIFT), block.crosses_into.map(NonZeroPage::number)] {
            let Some((page, on_page)) = page.and_then(|p| Some((p, self.pages.get_mut(&p)?))) else {
                continue;
            };
            on_page.blocks.retain(|&(_, other)| other != id);
            if on_page.blocks.is_empty() {
                self.pages.remove(&page);
            }
        }
    }

    /// Takes a live block off its pages, to be retired.
    pub(crate) fn take_one(&mut self, id: BlockId) -> bool {
        let live = self.blocks[id as usize].live;
        if live {
            self.unlist(id);
        }
        live
    }

    /// Marks a block dead that was taken, and forgets its key.
    pub(crate) fn retire(&mut self, id: BlockId) {
        self.blocks[id as usize].live = false;
        self.forget(id);
    }

    /// The block whose hot code holds `at`: no other touches the guest's memory.
    pub(crate) fn by_code(&self, at: CodeOffset) -> Option<&Block> {
        let i = self.blocks.partition_point(|b| b.start <= at).checked_sub(1)?;
        let b = &self.blocks[i];
        (at.0 - b.start.0 < b.code_len).then_some(b)
    }

    /// The block with the jump whose displacement is at `site`, in its hot or its cold code. Later blocks have theirs further up, and
    /// further down.
    pub(crate) fn by_site(&self, site: CodeOffset) -> Option<&Block> {
        let cold = || {
            let b = self.blocks.get(self.blocks.partition_point(|b| b.cold.start > site.0))?;
            b.cold.contains(&site.0).then_some(b)
        };
        self.by_code(site).or_else(cold)
    }

    /// All pages with blocks.
    pub(crate) fn pages(&self) -> impl Iterator<Item = u64> + '_ {
        self.pages.keys().copied()
    }

    pub(crate) fn clear(&mut self) {
        *self = BlockTable::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::FlagSet;

    fn insert(table: &mut BlockTable, at: u64, granules: Granules, crosses_into: Option<u64>) -> BlockId {
        let key = BlockKey { at: RamOffset(at), address: at, mode: Mode(0) };
        insert_at(table, key, granules, crosses_into)
    }

    pub(super) fn insert_at(
        table: &mut BlockTable,
        key: BlockKey,
        granules: Granules,
        crosses_into: Option<u64>,
    ) -> BlockId {
        let n = table.blocks.len() as u32;
        let start = CodeOffset(n * 64);
        let sites = [InstructionSite::new(4, 0), InstructionSite::new(9, 3)];
        table.insert(NewBlock {
            key,
            start,
            entry: start,
            saved_entry: start,
            flags_saved: CodeOffset(u32::MAX),
            code_len: 20,
            cold: 4096 - n * 64 - 10..4096 - n * 64,
            granules,
            counted: 2,
            crosses_into: crosses_into.and_then(NonZeroPage::new),
            trace: false,
            sites: &sites,
            links: 0,
            constants: 0,
        })
    }

    pub(super) fn link(target: u64, same_page: bool) -> Link {
        let (site, stub) = (CodeOffset(0), CodeOffset(0));
        Link {
            target,
            site,
            stub,
            flags: FlagsOut::Live(FlagSet::NONE),
            same_page,
            ungrouped: false,
            back: false,
            counted: false,
            to: None,
            chained: false,
            thunk: None,
        }
    }

    fn take(table: &mut BlockTable, page: u64, written: Granules) -> (Vec<BlockId>, bool) {
        let mut taken = Vec::new();
        let left = table.take(page, written, &mut taken);
        taken.iter().for_each(|&id| table.retire(id));
        (taken, left)
    }

    #[test]
    fn sites_keep_what_they_were_made_of() {
        let key = BlockKey { at: RamOffset(0), address: 0x7FFF_0000_1000, mode: Mode(0) };
        for host in [0, 1, InstructionSite::MAX_HOST] {
            for guest in [0, 1, 960, 4095, 4096, -1, -4096] {
                for words in [0, 1, -1, InstructionSite::MAX_PENDING, -InstructionSite::MAX_PENDING] {
                    let site = InstructionSite::new(host, guest).with_pending(words);
                    let address = key.address.wrapping_add_signed(i64::from(guest));
                    let seen = (site.host() as usize, site.address(&key), site.pending());
                    assert_eq!(seen, (host, address, words));
                    assert_eq!(site.with_pending(0), InstructionSite::new(host, guest));
                }
            }
        }
    }

    #[test]
    fn granules_of_bytes() {
        assert_eq!(Granules::of(0, 1), Granules(1));
        assert_eq!(Granules::of(63, 65), Granules(3));
        assert_eq!(Granules::of(0, 4096), Granules::ALL);
        assert_eq!(Granules::of(4095, 4200), Granules(1 << 63));
        assert_eq!(Granules(1 | 1 << 63).parts().collect::<Vec<_>>(), [0..64, 4032..4096]);
    }

    #[test]
    fn only_blocks_made_from_what_was_written_are_taken() {
        let mut t = BlockTable::default();
        let [a, b, c] = [0x1000, 0x1040, 0x1080].map(|at: u64| {
            insert(&mut t, at, Granules::of(at as usize & 0xFFF, (at as usize & 0xFFF) + 65), None)
        });
        assert_eq!(take(&mut t, 1, Granules(1 << 60)), (vec![], true));
        let (taken, left) = take(&mut t, 1, Granules(1 << 1));
        assert!(left && taken.len() == 2 && taken.contains(&a) && taken.contains(&b));
        let key = |t: &BlockTable, id: BlockId| t.blocks[id as usize].key;
        assert_eq!((t.find(&key(&t, a)), t.find(&key(&t, c))), (None, Some(c)));
        assert_eq!(take(&mut t, 1, Granules::ALL), (vec![c], false));
        assert_eq!(take(&mut t, 1, Granules::ALL), (vec![], false));
        assert_eq!(t.pages().count(), 0);
    }

    #[test]
    fn a_block_on_two_pages_is_found_from_both() {
        for written in [1, 2] {
            let mut t = BlockTable::default();
            let beside = insert(&mut t, 0x2100, Granules::of(0x100, 0x110), None);
            let crossing = insert(&mut t, 0x1FFE, Granules::of(0xFFE, 0x1000), Some(2));
            assert_eq!(take(&mut t, 2, Granules::of(64, 128)), (vec![], true));
            assert_eq!(take(&mut t, written, Granules(1 | 1 << 63)), (vec![crossing], written == 2));
            assert_eq!(t.pages().collect::<Vec<_>>(), [2], "neither page lists it any more");
            assert_eq!(take(&mut t, 2, Granules::ALL).0, [beside]);
            assert_eq!(take(&mut t, 1, Granules::ALL), (vec![], false));
        }
    }

    #[test]
    fn links_into_a_block_are_given_back_once() {
        let mut t = BlockTable::default();
        let [a, b] = [0x1000, 0x1040].map(|at| insert(&mut t, at, Granules(1), None));
        t.links.extend((0..3).map(|target| link(target, true)));
        for (to, link) in [(a, 0), (b, 1), (a, 2)] {
            t.add_incoming(to, link);
        }
        let mut of =
            |block| std::iter::from_fn(|| t.take_incoming(block).map(|l| l.target)).collect::<Vec<_>>();
        assert_eq!((of(a), of(b), of(a)), (vec![2, 0], vec![1], vec![]));
    }

    #[test]
    fn instructions_by_their_code() {
        let mut t = BlockTable::default();
        insert(&mut t, 0x1000, Granules(1), None);
        let id = insert(&mut t, 0x1040, Granules(1), None);
        let block = t.by_code(CodeOffset(64 + 10)).expect("code of the second block");
        assert_eq!(block.key, t.blocks[id as usize].key);
        assert_eq!(t.rip_at(block, CodeOffset(64 + 10)), Some((0x1043, 1)));
        assert_eq!(t.rip_at(block, CodeOffset(64 + 2)), None);
        assert!(t.by_code(CodeOffset(64 + 20)).is_none());
    }

    #[test]
    fn jumps_by_where_they_are() {
        let mut t = BlockTable::default();
        for n in 0..5 {
            insert(&mut t, 0x1000 + n * 64, Granules(1), None);
        }
        // One without cold code, as its last jump.
        t.blocks[2].cold = t.blocks[1].cold.start..t.blocks[1].cold.start;
        let of = |at| t.by_site(CodeOffset(at)).map(|b| b.key.address);
        for n in [0, 1, 3, 4] {
            let (hot, cold) = (n * 64 + 19, 4096 - n * 64 - 10);
            let block = Some(0x1000 + u64::from(n) * 64);
            assert_eq!((of(hot), of(cold), of(cold + 9)), (block, block, block), "block {n}");
            assert_eq!((of(hot + 1), of(cold + 10), of(cold - 1)), (None, None, None), "block {n}");
        }
        assert_eq!(of(2 * 64), Some(0x1080));
    }
}

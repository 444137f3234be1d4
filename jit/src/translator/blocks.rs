//! Blocks: finding the page of code, translating, chaining, and taking blocks back when their bytes change or the code cache
//! is full.

use super::fill::miss_helper;
use super::traces::heat_cell;
use super::{Translator, canonical};
use crate::block::{Block, BlockId, BlockKey, Granules, Link, Mode, NewBlock, NonZeroPage};
use crate::code_cache::{ALIGNMENT, CodeOffset};
use crate::frontend::{Crossing, Source};
use crate::stubs;
use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};
use paravane_cpu::{Access, CpuState, LinAddr, Privilege, translate};
use paravane_memory::{Mapped, PAGE_SHIFT, RamOffset};

/// Space that must be free before a block is translated.
const BLOCK_RESERVE: usize = 64 << 10;
/// Blocks kept at most; bounds the tables beside the code.
const MAX_BLOCKS: usize = 1 << 20;

impl Translator {
    /// The backing page of code at `lin` and its validation cell; `None` if fetching faults or is not from memory.
    pub(super) fn fetch_page(&mut self, cpu: &CpuState, lin: u64) -> Option<(RamOffset, u32)> {
        let user = cpu.cpl == 3;
        let slot = match self.pages.slot(lin, user) {
            Some(s) => s,
            None => {
                self.reset_cache();
                self.pages.slot(lin, user)?
            }
        };
        let cell = self.context().xslots[slot as usize];
        if cell != 0 {
            return Some((RamOffset(u64::from(cell - 1) << PAGE_SHIFT), slot));
        }
        if !canonical(lin) {
            return None;
        }
        let privilege = if user { Privilege::User } else { Privilege::Supervisor };
        let t =
            translate(cpu, &self.mem, self.core.paging(), LinAddr(lin), Access::Execute, privilege).ok()?;
        let (Mapped::Ram(o) | Mapped::Rom(o)) = self.mem.resolve(t.phys.page()) else { return None };
        if user && !self.admit_code(lin, t.global) {
            return None;
        }
        self.context().xslots[slot as usize] = (o.0 >> PAGE_SHIFT) as u32 + 1;
        self.pages.validated(slot, t.global, t.page_shift);
        Some((o, slot))
    }

    /// The block at code address `address`, translated if need be, and the validation cell of its page.
    pub(super) fn block_at(&mut self, cpu: &CpuState, address: u64, mode: Mode) -> Option<(BlockId, u32)> {
        let lin = mode.linear(address);
        let (page, slot) = self.fetch_page(cpu, lin)?;
        let key = BlockKey { at: RamOffset(page.0 + (lin & 0xFFF)), address, mode };
        if self.breaks_at(&key) {
            return None;
        }
        if let Some(id) = self.blocks.find(&key) {
            let Some(second) = self.blocks.blocks[id as usize].crosses_into else { return Some((id, slot)) };
            // An instruction on two pages: the second must still be what it was.
            let (next, _) = self.fetch_page(cpu, mode.advance(lin & !0xFFF, 4096))?;
            if next.0 >> PAGE_SHIFT == second.number() {
                return Some((id, slot));
            }
            self.drop_block(id);
        }
        if let Some(id) = self.rebase(&key) {
            return Some((id, slot));
        }
        if self.cache.free() < BLOCK_RESERVE || self.blocks.blocks.len() >= MAX_BLOCKS {
            self.reset_cache();
            return self.block_at(cpu, address, mode);
        }
        self.translate_block(cpu, key, page, &[]).map(|id| (id, slot))
    }

    /// Translates the block at `key`, or the trace that follows `path`.
    pub(super) fn translate_block(
        &mut self,
        cpu: &CpuState,
        key: BlockKey,
        page: RamOffset,
        path: &[u64],
    ) -> Option<BlockId> {
        // The copy stays good while the claim stands: writes to the page take it away.
        let known = self.copies.find(page).filter(|_| self.claims.has_code(page));
        let copy = match known {
            Some(copy) => copy,
            None if self.protect(page) => self.copies.copy(page, &self.mem),
            None => return None,
        };
        let at = (key.address & 0xFFF) as usize;
        let mut crossing = None;
        let mut extra = None;
        let mut joined = [0u8; 32];
        let mut source_at = at;
        let crosses =
            path.is_empty() && at > 4096 - 15 && !complete(&self.copies.bytes(copy)[at..], key.mode);
        if crosses {
            let next_lin = key.mode.advance(key.mode.linear(key.address) & !0xFFF, 4096);
            let resets = self.stats.cache_flushes;
            let (next, slot) = self.fetch_page(cpu, next_lin)?;
            // Where that was one page too many, what is known of the first one is gone.
            if resets != self.stats.cache_flushes || !self.protect(next) {
                return None;
            }
            let head = 4096 - at;
            joined[..head].copy_from_slice(&self.copies.bytes(copy)[at..]);
            self.mem.ram_read(next, &mut joined[head..head + 15]);
            source_at = 0;
            crossing = Some(Crossing { slot, page: (next.0 >> PAGE_SHIFT) as u32 + 1 });
            extra = Some(NonZeroPage::new(next.0 >> PAGE_SHIFT)?);
        }
        let bytes = if crosses { &joined[..4096 - at + 15] } else { &self.copies.bytes(copy)[..] };
        let options = self.core.model().decoder_options();
        let stop = self.next_breakpoint(&key);
        let (rip, limit) = self.place(&key);
        let source = Source {
            bytes,
            at: source_at,
            address: key.address,
            rip,
            limit,
            mode: key.mode,
            options,
            stop,
            path,
        };
        let first_link = self.blocks.links.len() as u32;
        let t = self.frontend.translate(&source, &mut self.forms, &mut self.emitter, first_link, crossing);
        let (hot_len, cold_len) = self.emitter.lengths();
        if hot_len.next_multiple_of(ALIGNMENT) + cold_len > self.cache.free() {
            return None;
        }
        let (start, cold) = (self.cache.next(), self.cache.next_cold(cold_len));
        let (hot_code, cold_code) = self.emitter.finish(start, cold);
        self.cache.append(hot_code);
        self.cache.append_cold(cold_code);
        for l in &self.emitter.links {
            self.blocks.links.push(Link {
                target: l.target,
                site: l.site.place(start, cold),
                stub: l.stub.place(start, cold),
                flags: l.flags,
                same_page: l.same_page && extra.is_none(),
                ungrouped: l.ungrouped,
                back: l.back,
                counted: false,
                to: None,
                chained: false,
                thunk: None,
            });
        }
        self.blocks.constants.extend(self.emitter.constants.iter().map(|at| at.place(start, cold)));
        self.stats.blocks += 1;
        self.stats.instructions += u64::from(t.instructions);
        self.stats.guest_bytes += u64::from(t.len);
        self.stats.code_bytes += (hot_len + cold_len) as u64;
        let block = NewBlock {
            key,
            start,
            entry: CodeOffset(start.0 + t.entry),
            saved_entry: CodeOffset(start.0 + t.saved_entry),
            flags_saved: CodeOffset(self.emitter.flags_saved.map_or(u32::MAX, |at| start.0 + at)),
            code_len: hot_len as u32,
            cold: cold.0..cold.0 + cold_len as u32,
            granules: t.granules,
            counted: t.counted as u8,
            crosses_into: extra,
            trace: !path.is_empty(),
            sites: &self.frontend.sites,
            links: self.emitter.links.len() as u16,
            constants: self.emitter.constants.len() as u16,
        };
        let id = self.blocks.insert(block);
        self.tell_perf(id);
        Some(id)
    }

    /// Tells `perf` where block `id` is, if it wants to know.
    pub(super) fn tell_perf(&mut self, id: BlockId) {
        let Some(map) = &mut self.perf_map else { return };
        let Block { key, start, code_len, cold, .. } = &self.blocks.blocks[id as usize];
        let side = if key.mode.has(Mode::USER) { "user" } else { "kernel" };
        map.block(self.cache.address(*start), *code_len as usize, key.linear(), side);
        let at = self.cache.address(CodeOffset(cold.start));
        map.block(at, cold.len(), key.linear(), &format!("{side}_cold"));
    }

    /// The instruction at code address `address`, and its bytes, if fetching it does not fault.
    pub(super) fn instruction_at(
        &mut self,
        cpu: &CpuState,
        mode: Mode,
        address: u64,
    ) -> Option<(Instruction, [u8; 15])> {
        let lin = mode.linear(address);
        let mut bytes = [0; 15];
        let mut have = 0;
        while have < bytes.len() {
            let at = mode.advance(lin, have as u64);
            let Some((page, _)) = self.fetch_page(cpu, at) else { break };
            let n = (4096 - (at & 0xFFF) as usize).min(bytes.len() - have);
            self.mem.ram_read(RamOffset(page.0 + (at & 0xFFF)), &mut bytes[have..have + n]);
            have += n;
        }
        let options = self.core.model().decoder_options();
        let instr = Decoder::with_ip(mode.bits(), &bytes[..have], lin, options).decode();
        (!instr.is_invalid()).then_some((instr, bytes))
    }

    /// RIP at the beginning of a block, and the largest it may become.
    fn place(&self, key: &BlockKey) -> (u64, u64) {
        if key.mode.code64() {
            return (key.address, u64::MAX);
        }
        let segment = self.segments.of(key.address);
        (u64::from((key.address as u32).wrapping_sub(segment.base)), u64::from(segment.limit))
    }

    /// Chains link `number` to block `to`, whose page cell `slot` validates.
    pub(super) fn chain(&mut self, number: u32, to: BlockId, slot: u32) {
        let counts = self.counts(number, to);
        let link = &mut self.blocks.links[number as usize];
        // Its page was not valid for a moment.
        if link.chained && link.to == Some(to) {
            return;
        }
        let block = &self.blocks.blocks[to as usize];
        let entry = block.entry_for(link.flags);
        let target = if counts {
            link.counted = true;
            let cell = heat_cell(number);
            let thunk = self.emitter.count_thunk(self.cache.next(), link, cell, entry);
            if thunk.len() + 64 > self.cache.free() {
                return;
            }
            let target = self.cache.append(thunk);
            self.context().heat[cell] = self.options.hot_loop.max(1);
            target
        } else if link.same_page {
            entry
        } else {
            let thunk = self.emitter.link_thunk(self.cache.next(), link, (slot, block.key.cell()), entry);
            if thunk.len() + 64 > self.cache.free() {
                return;
            }
            let thunk = self.cache.append(thunk);
            link.thunk = Some(thunk);
            thunk
        };
        let link = &mut self.blocks.links[number as usize];
        link.chained = !counts;
        self.cache.patch_rel32(link.site, target);
        self.blocks.add_incoming(to, number);
        self.stats.links += 1;
    }

    /// Removes a block.
    pub(super) fn drop_block(&mut self, id: BlockId) {
        if self.blocks.take_one(id) {
            self.retire(id);
        }
    }

    /// Ends a block that its pages do not list any more: nothing jumps to it.
    fn retire(&mut self, id: BlockId) {
        while let Some(link) = self.blocks.take_incoming(id) {
            self.cache.patch_rel32(link.site, link.stub);
        }
        self.uncache(id);
        self.blocks.retire(id);
        self.stats.invalidated += 1;
    }

    /// No indirect jump finds block `id` any more.
    pub(super) fn uncache(&mut self, id: BlockId) {
        let block = &mut self.blocks.blocks[id as usize];
        if std::mem::take(&mut block.cached) {
            let entry = self.cache.address(block.saved_entry);
            self.pages.uncache(block.key.mode, block.key.address, entry);
        }
    }

    /// Removes the blocks made from some of `written` of the page at `ram`. Without blocks it is an ordinary page again.
    pub(super) fn invalidate(&mut self, ram: RamOffset, written: Granules) {
        let page = ram.0 >> PAGE_SHIFT;
        let mut taken = std::mem::take(&mut self.taken);
        let left = self.blocks.take(page, written, &mut taken);
        for id in taken.drain(..) {
            self.retire(id);
        }
        self.taken = taken;
        let page = RamOffset(page << PAGE_SHIFT);
        if !left {
            self.claims.release_code(page);
        }
        self.copies.refresh(page, written, &self.mem);
        self.core.invalidate_code(page);
    }

    /// Removes all blocks with bytes on the page at `ram`; the page is an ordinary page again.
    pub(super) fn invalidate_page(&mut self, ram: RamOffset) {
        self.invalidate(ram, Granules::ALL);
    }

    /// Tells `perf` the names of the stubs, if it wants to know.
    pub(super) fn map_stubs(&mut self) {
        let Some(map) = &mut self.perf_map else { return };
        let ends = self.stubs.all().into_iter().skip(1).map(|(at, _)| at).chain([self.cache.next()]);
        for ((at, name), end) in self.stubs.all().into_iter().zip(ends) {
            map.stub(self.cache.address(at), u64::from(end.0 - at.0), name);
        }
    }

    /// Starts over with an empty code cache.
    pub(super) fn reset_cache(&mut self) {
        let pages: Vec<u64> = self.blocks.pages().collect();
        for p in pages {
            self.claims.release_code(RamOffset(p << PAGE_SHIFT));
        }
        self.blocks.clear();
        let (pages, cells) = self.code_pages();
        pages.clear(cells);
        self.cache.clear();
        self.stubs = stubs::emit(&mut self.cache, miss_helper);
        self.stats.cache_flushes += 1;
    }
}

/// Whether the first instruction in `bytes` is whole.
fn complete(bytes: &[u8], mode: Mode) -> bool {
    let mut d = Decoder::new(mode.bits(), bytes, DecoderOptions::NONE);
    let _ = d.decode();
    d.last_error() != DecoderError::NoMoreBytes
}

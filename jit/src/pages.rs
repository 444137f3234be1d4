//! How control finds blocks: validated code pages, and jump caches for indirect transfers.
//!
//! Each linear code page in use owns a cell of `JitContext::xslots`, which holds its backing page number + 1 while
//! that translation is known to hold. Jumps chained across pages compare it; whatever drops translations (CR3, INVLPG, …)
//! clears it. A jump cache maps 16 bits made from a linear address to a block's indirect entry, which checks the
//! whole address; it holds only blocks whose page is validated.

use crate::block::Mode;
use crate::context::XSLOTS;
use hashbrown::HashMap;

/// Where `lin` is in a jump cache: translated code computes the same (`emit::flow`). Addresses 64 KiB apart differ.
fn index(lin: u64) -> usize {
    usize::from(lin.wrapping_add(lin.rotate_right(16)) as u16)
}

/// Entries of a jump cache.
const ENTRIES: usize = 1 << 16;
/// Jump caches kept at a time; modes beyond share by eviction.
const MAX_CACHES: usize = 12;

/// Blocks by the low bits of their linear address, for one mode.
struct JumpCache {
    mode: Mode,
    table: Box<[u64]>,
    filled: [Vec<(u16, u64)>; 2],
}

impl JumpCache {
    fn clear(&mut self, miss: u64) {
        self.table.fill(miss);
        self.filled.iter_mut().for_each(Vec::clear);
    }
}

/// A code page as instruction fetch sees it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct PageKey {
    page: u64,
    user: bool,
}

/// Validation cells and jump caches of one vCPU.
pub(crate) struct CodePages {
    slots: HashMap<PageKey, u32>,
    global: Vec<bool>,
    valid: [Vec<u32>; 2],
    caches: Vec<JumpCache>,
    miss: u64,
    next_victim: usize,
}

impl CodePages {
    /// `miss` is the executable address an empty jump-cache entry leads to.
    pub(crate) fn new(miss: u64) -> CodePages {
        CodePages {
            slots: HashMap::new(),
            global: Vec::new(),
            valid: [Vec::new(), Vec::new()],
            caches: Vec::new(),
            miss,
            next_victim: 0,
        }
    }

    /// The cell of a linear page; `None` when all cells are taken (the caller starts over).
    pub(crate) fn slot(&mut self, lin: u64, user: bool) -> Option<u32> {
        let key = PageKey { page: lin >> 12, user };
        if let Some(&s) = self.slots.get(&key) {
            return Some(s);
        }
        let s = self.global.len();
        if s >= XSLOTS {
            return None;
        }
        self.global.push(false);
        self.slots.insert(key, s as u32);
        Some(s as u32)
    }

    /// Records that `slot` was validated.
    pub(crate) fn validated(&mut self, slot: u32, global: bool) {
        self.global[slot as usize] = global;
        let valid = &mut self.valid[usize::from(global)];
        if valid.len() >= 4 * XSLOTS {
            // Single pages were dropped and validated again and again.
            valid.sort_unstable();
            valid.dedup();
        }
        valid.push(slot);
    }

    /// Address of the jump cache for `mode`.
    pub(crate) fn jump_cache(&mut self, mode: Mode) -> u64 {
        if let Some(c) = self.caches.iter().find(|c| c.mode == mode) {
            return c.table.as_ptr() as u64;
        }
        let cache =
            JumpCache { mode, table: vec![self.miss; ENTRIES].into(), filled: [Vec::new(), Vec::new()] };
        if self.caches.len() < MAX_CACHES {
            self.caches.push(cache);
            return self.caches.last().expect("just pushed").table.as_ptr() as u64;
        }
        let v = self.next_victim;
        self.next_victim = (v + 1) % MAX_CACHES;
        self.caches[v] = cache;
        self.caches[v].table.as_ptr() as u64
    }

    /// Where an indirect jump to `lin` goes now.
    pub(crate) fn lookup(&mut self, mode: Mode, lin: u64) -> u64 {
        let at = index(lin);
        self.caches.iter().find(|c| c.mode == mode).map_or(self.miss, |c| c.table[at])
    }

    /// Lets indirect jumps to `lin` go straight to `entry`; `slot` validates its page.
    pub(crate) fn cache(&mut self, mode: Mode, lin: u64, entry: u64, slot: u32) {
        let global = self.global[slot as usize];
        let Some(c) = self.caches.iter_mut().find(|c| c.mode == mode) else { return };
        if c.filled[usize::from(global)].len() >= 2 * ENTRIES {
            // Targets that share entries took turns: start over, so that the record stays bounded.
            c.clear(self.miss);
        }
        c.table[index(lin)] = entry;
        c.filled[usize::from(global)].push((index(lin) as u16, lin >> 12));
    }

    /// Removes `entry` wherever indirect jumps to `lin` may find it.
    pub(crate) fn uncache(&mut self, lin: u64, entry: u64) {
        for c in &mut self.caches {
            let e = &mut c.table[index(lin)];
            if *e == entry {
                *e = self.miss;
            }
        }
    }

    /// Address translations were dropped; `keep_global` spares global pages.
    pub(crate) fn flush(&mut self, cells: &mut [u32; XSLOTS], keep_global: bool) {
        for g in 0..if keep_global { 1 } else { 2 } {
            for slot in self.valid[g].drain(..) {
                cells[slot as usize] = 0;
            }
            for c in &mut self.caches {
                for (at, _) in c.filled[g].drain(..) {
                    c.table[at as usize] = self.miss;
                }
            }
        }
    }

    /// The translation of one page was dropped.
    pub(crate) fn flush_page(&mut self, cells: &mut [u32; XSLOTS], lin: u64) {
        for user in [false, true] {
            let Some(&slot) = self.slots.get(&PageKey { page: lin >> 12, user }) else { continue };
            if cells[slot as usize] == 0 {
                continue;
            }
            cells[slot as usize] = 0;
            for c in &mut self.caches {
                for filled in &mut c.filled {
                    filled.retain(|&(at, page)| {
                        let hit = page == lin >> 12;
                        if hit {
                            c.table[at as usize] = self.miss;
                        }
                        !hit
                    });
                }
            }
        }
    }

    /// Forgets everything (the code cache starts over).
    pub(crate) fn clear(&mut self, cells: &mut [u32; XSLOTS]) {
        self.flush(cells, false);
        self.slots.clear();
        self.global.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MISS: u64 = 7;

    #[test]
    fn targets_that_take_turns_do_not_grow_the_record() {
        let mut p = CodePages::new(MISS);
        let mode = Mode(0);
        p.jump_cache(mode);
        let slot = p.slot(0x1000, false).expect("slot");
        p.validated(slot, false);
        let taking_turns = [0x1000, 0x1_0FFF];
        assert_eq!(index(taking_turns[0]), index(taking_turns[1]));
        for i in 0..3 * ENTRIES {
            p.cache(mode, taking_turns[i & 1], 100, slot);
        }
        assert!(p.caches[0].filled.iter().map(Vec::len).sum::<usize>() <= 2 * ENTRIES);
    }

    #[test]
    fn a_flushed_page_is_found_no_more_and_others_are() {
        let mut p = CodePages::new(MISS);
        let (mode, mut cells) = (Mode(0), [0u32; XSLOTS]);
        p.jump_cache(mode);
        for lin in [0x1000, 0x2000] {
            let slot = p.slot(lin, false).expect("slot");
            cells[slot as usize] = 1;
            p.validated(slot, false);
            p.cache(mode, lin + 4, lin, slot);
        }
        p.flush_page(&mut cells, 0x1000);
        assert_eq!((p.lookup(mode, 0x1004), p.lookup(mode, 0x2004)), (MISS, 0x2000));
        p.flush(&mut cells, false);
        assert_eq!(p.lookup(mode, 0x2004), MISS);
    }
}

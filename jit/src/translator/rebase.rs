//! Moving the blocks of a page to another linear address (see [`crate::block`], `moving`): new addresses in their code, and jumps
//! across pages where they still lead. Jumps inside the page stay: both their ends move.

use super::Translator;
use crate::block::{BlockId, BlockKey};

impl Translator {
    /// The block at `key`, if there is one after the blocks of its page that some other linear page does not need any more
    /// were moved.
    pub(super) fn rebase(&mut self, key: &BlockKey) -> Option<BlockId> {
        // Those that were translated end nowhere in particular: not at breakpoints elsewhere.
        if self.core.plan().breaks() {
            return None;
        }
        let mut moved = std::mem::take(&mut self.taken);
        let pages = &self.pages;
        let by = self.blocks.replace_instance(key, |page| pages.used(page), &mut moved);
        self.stats.rebased_pages += u64::from(by.is_some());
        for id in moved.drain(..) {
            // What its second page is there is unknown.
            if self.blocks.blocks[id as usize].crosses_into.is_some() {
                self.drop_block(id);
            } else {
                self.move_block(id, by.unwrap_or(0));
            }
        }
        self.taken = moved;
        self.blocks.find(key)
    }

    fn move_block(&mut self, id: BlockId, by: u64) {
        self.stats.rebased += 1;
        self.uncache(id);
        self.blocks.rekey(id, by);
        for &at in self.blocks.constants(id) {
            self.cache.add(at, by);
        }
        let mut links = std::mem::take(&mut self.relinked);
        links.extend(self.blocks.blocks[id as usize].links());
        self.blocks.incoming_from_pages(id, &mut links);
        for number in links.drain(..) {
            self.relink(number);
        }
        self.relinked = links;
        self.tell_perf(id);
    }

    /// Link `number`, or the block that it was chained to, was moved: across pages it jumps there only if it leads there.
    fn relink(&mut self, number: u32) {
        let link = &self.blocks.links[number as usize];
        let (Some(to), Some(thunk), false) = (link.to, link.thunk, link.same_page) else { return };
        let to = &self.blocks.blocks[to as usize];
        let leads = to.key.address == link.target;
        let slot = if leads { self.pages.slot(to.key.linear(), true) } else { None };
        if let Some(slot) = slot {
            let code = self.emitter.link_thunk(thunk, link, (slot, to.key.cell()), to.entry_for(link.flags));
            self.cache.replace(thunk, code);
        }
        let link = &mut self.blocks.links[number as usize];
        link.chained = slot.is_some();
        self.cache.patch_rel32(link.site, if link.chained { thunk } else { link.stub });
    }
}

//! The debugger's plan in translated code. An armed address never gets a block and ends the blocks that lead to it, so that
//! control comes back there; the pages around watched bytes stay poison in the views concerned, so that their accesses come to
//! `Core`, which looks at each.

use super::Translator;
use crate::block::{Block, BlockId, BlockKey};
use crate::code_cache::CodeOffset;
use paravane_cpu::{CpuBus, CpuState, DebugPlan, Exit, HostCode};
use paravane_memory::{Mapped, PAGE_SHIFT, PhysAddr, RamOffset};
use std::collections::BTreeSet;
use std::sync::Arc;

impl Translator {
    /// Obeys `plan` instead of the one before: drops what was translated without regard to the difference.
    pub(super) fn follow_plan(&mut self, plan: &Arc<DebugPlan>) {
        let old = self.core.set_plan(plan);
        if old.watch != plan.watch {
            self.flush(false);
        }
        let page = |at: &u64| at >> PAGE_SHIFT;
        let linear: BTreeSet<u64> = old.linear.symmetric_difference(&plan.linear).map(page).collect();
        let physical: BTreeSet<u64> = old
            .physical
            .symmetric_difference(&plan.physical)
            .filter_map(|&at| self.backing(at).map(|at| at.0 >> PAGE_SHIFT))
            .collect();
        if linear.is_empty() && physical.is_empty() {
            return;
        }
        for id in 0..self.blocks.blocks.len() {
            let block = &self.blocks.blocks[id];
            let (lin, at) = (block.key.linear() >> PAGE_SHIFT, block.key.at.0 >> PAGE_SHIFT);
            let next = block.crosses_into;
            let concerned = linear.contains(&lin)
                || physical.contains(&at)
                || next.is_some_and(|next| linear.contains(&(lin + 1)) || physical.contains(&next.number()));
            if concerned {
                self.drop_block(id as BlockId);
            }
        }
    }

    /// The code of `block`: its entries, its instructions, and the ways out of it.
    pub(super) fn listing(&self, block: &Block) -> Vec<HostCode> {
        let sites = self.blocks.sites(block).iter();
        let sites = sites.map(|site| (site.host(), Some(block.key.mode.linear(site.address(&block.key)))));
        let pieces: Vec<_> = std::iter::once((0, None)).chain(sites).collect();
        let ends = pieces.iter().skip(1).map(|p| p.0).chain([block.code_len]);
        let piece = |guest, at: u32, len, cold| {
            let at = CodeOffset(at);
            HostCode { guest, cold, host: self.cache.address(at), bytes: self.cache.bytes(at, len) }
        };
        let hot = pieces
            .iter()
            .zip(ends)
            .map(|(&(from, guest), to)| piece(guest, block.start.0 + from, to.saturating_sub(from), false));
        let cold = piece(None, block.cold.start, block.cold.len() as u32, true);
        hot.chain([cold]).filter(|c| !c.bytes.is_empty()).collect()
    }

    /// The backing of a physical address.
    fn backing(&self, at: u64) -> Option<RamOffset> {
        match self.mem.resolve(PhysAddr(at).page()) {
            Mapped::Ram(page) | Mapped::Rom(page) => Some(RamOffset(page.0 + PhysAddr(at).page_offset())),
            Mapped::Mmio => None,
        }
    }

    /// Whether a breakpoint is armed where `key` begins.
    pub(super) fn breaks_at(&self, key: &BlockKey) -> bool {
        let plan = self.core.plan();
        plan.breaks()
            && (plan.linear.contains(&key.linear())
                || plan.physical.iter().any(|&at| self.backing(at) == Some(key.at)))
    }

    /// Bytes from the start of `key` to the next breakpoint on the page; more than a page can hold where the only ones are
    /// before it.
    pub(super) fn next_breakpoint(&self, key: &BlockKey) -> Option<u32> {
        let plan = self.core.plan();
        if !plan.breaks() {
            return None;
        }
        let (page, offset) = (key.linear() & !0xFFF, key.linear() & 0xFFF);
        let linear = plan.linear.range(page..=page | 0xFFF).map(|at| at & 0xFFF);
        let backing = |at: &u64| self.backing(*at).filter(|at| at.0 & !0xFFF == key.at.0 & !0xFFF);
        let physical = plan.physical.iter().filter_map(backing).map(|at| at.0 & 0xFFF);
        let distance = |at: u64| if at > offset { (at - offset) as u32 } else { u32::MAX };
        linear.chain(physical).map(distance).min()
    }

    /// See [`paravane_cpu::Engine::step`].
    pub(super) fn single_step(&mut self, cpu: &mut CpuState, bus: &dyn CpuBus, interrupts: bool) -> Exit {
        if self.begin(cpu).is_err() {
            return Exit::Unsupported;
        }
        self.follow_attention(self.attention.get());
        let step = self.offering_interrupts(|this| this.core.single_step(cpu, &this.mem, bus, interrupts));
        self.end(cpu);
        self.core.step_exit(step)
    }
}

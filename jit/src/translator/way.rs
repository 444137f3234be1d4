//! By what blocks translated code went that jumps straight from one to the next, told from the jumps there are.
//!
//! Chained blocks write nothing down. Afterwards it is known where translated code was entered and where it was left, and which jumps
//! lead to a block; where there is one for each, back to the entry, there was only one way.

use super::Translator;
use crate::block::{Block, BlockId};
use paravane_cpu::{Evidence, Visit};

/// Blocks that are inferred in a row at most.
const FAR: usize = 16;

impl Translator {
    /// What is known of how translated code came from linear `from`, where it was entered, to `to`, where it was left.
    pub(super) fn way_between(&self, from: u64, to: u64) -> Vec<Visit> {
        let mut way = Vec::new();
        let mut at = to;
        // Left in the middle of a block: that block was entered at its beginning.
        if self.live(|block| block.key.linear() == to).next().is_none() {
            let mut holding: Vec<u64> =
                self.live(|b| self.blocks.has_instruction(b, to)).map(|b| b.1).collect();
            holding.sort_unstable();
            holding.dedup();
            match holding[..] {
                [_, _, ..] if !holding.contains(&from) => return vec![one_of(holding)],
                [only] => at = only,
                _ => return Vec::new(),
            }
            if at != from {
                way.push(Visit { at, evidence: Evidence::Inferred });
            }
        }
        while at != from && way.len() < FAR {
            match self.sources(at)[..] {
                [] => break,
                [only] if only == from => break,
                _ if self.leads_only_to(from, at) => break,
                [only] if only != at && way.iter().all(|v| v.at != only) => {
                    at = only;
                    way.push(Visit { at, evidence: Evidence::Inferred });
                }
                ref several => {
                    way.push(one_of(several.to_vec()));
                    break;
                }
            }
        }
        way.reverse();
        way
    }

    fn live(&self, wanted: impl Fn(&Block) -> bool) -> impl Iterator<Item = (BlockId, u64)> {
        let blocks = self.blocks.blocks.iter().enumerate();
        blocks.filter(move |(_, b)| b.live && wanted(b)).map(|(id, b)| (id as BlockId, b.key.linear()))
    }

    /// Whether what begins at `from` ends with one jump, and that leads to `to`.
    fn leads_only_to(&self, from: u64, to: u64) -> bool {
        self.live(|block| block.key.linear() == from).all(|(id, _)| {
            let block = &self.blocks.blocks[id as usize];
            let code = block.start.0..block.start.0 + block.code_len;
            let links =
                self.blocks.links.iter().filter(|link| !link.ungrouped && code.contains(&link.site.0));
            links.map(|link| block.key.mode.linear(link.target)).eq([to])
        })
    }

    /// Where the blocks begin that jump straight to the code at linear `at`; nothing where it is also reached in other ways.
    fn sources(&self, at: u64) -> Vec<u64> {
        let mut sources = Vec::new();
        for (id, _) in self.live(|block| block.key.linear() == at) {
            if self.blocks.blocks[id as usize].cached {
                return Vec::new();
            }
            let links = self.blocks.incoming(id);
            let jumping = links.filter_map(|link| Some((link.ungrouped, self.blocks.by_site(link.site)?)));
            let jumping = jumping.filter(|(_, block)| block.live);
            let jumping = jumping.map(|(ungrouped, block)| (ungrouped, block.key.linear()));
            // The ungrouped copy of a block is no other place.
            sources.extend(jumping.filter(|&(same, from)| !(same && from == at)).map(|j| j.1));
        }
        sources.sort_unstable();
        sources.dedup();
        sources
    }
}

fn one_of(places: Vec<u64>) -> Visit {
    Visit { at: 0, evidence: Evidence::OneOf(places) }
}

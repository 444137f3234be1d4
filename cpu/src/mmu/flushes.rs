//! What cached translations the guest asked to forget (SDM 3A, 4.10.4).

use crate::state::LinAddr;

/// Pages remembered one by one before a record falls back to dropping everything.
const MAX_PAGES: usize = 64;

/// Invalidations since the record was last taken. A cache without PCID tags treats `switched` like
/// `non_global`, and forgets `tagged` pages and `spaces` of other tags as it never holds them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flushes {
    /// Everything, global entries and all PCIDs included.
    pub all: bool,
    /// Non-global entries of the address space CR3 names now.
    pub non_global: bool,
    /// CR3 names another address space (base or PCID); its entries stay valid unless `non_global` is set too.
    pub switched: bool,
    /// Non-global entries of every PCID.
    pub all_non_global: bool,
    /// Single pages of the current address space, global or not.
    pub pages: Vec<LinAddr>,
    /// PCIDs whose non-global entries are gone.
    pub spaces: Vec<u16>,
    /// Single non-global pages of other PCIDs.
    pub tagged: Vec<(u16, LinAddr)>,
}

impl Flushes {
    /// Nothing to drop.
    #[inline]
    pub fn is_empty(&self) -> bool {
        !(self.all || self.non_global || self.switched || self.all_non_global)
            && self.pages.is_empty()
            && self.spaces.is_empty()
            && self.tagged.is_empty()
    }

    /// Returns the record and starts an empty one.
    pub fn take(&mut self) -> Flushes {
        std::mem::take(self)
    }

    /// Adds one page of the current space.
    pub fn page(&mut self, lin: LinAddr) {
        if self.pages.len() < MAX_PAGES {
            self.pages.push(lin);
        } else {
            self.all = true;
        }
    }

    /// Adds one page of the space tagged `pcid`.
    pub fn tagged_page(&mut self, pcid: u16, lin: LinAddr) {
        if self.tagged.len() < MAX_PAGES {
            self.tagged.push((pcid, lin));
        } else {
            self.all = true;
        }
    }

    /// Adds the non-global entries of `pcid`.
    pub fn space(&mut self, pcid: u16) {
        if self.spaces.len() < MAX_PAGES {
            self.spaces.push(pcid);
        } else {
            self.all = true;
        }
    }

    /// Adds everything in `other`.
    pub fn merge(&mut self, other: &Flushes) {
        self.all |= other.all;
        self.non_global |= other.non_global;
        self.switched |= other.switched;
        self.all_non_global |= other.all_non_global;
        other.pages.iter().for_each(|&p| self.page(p));
        other.spaces.iter().for_each(|&s| self.space(s));
        other.tagged.iter().for_each(|&(s, p)| self.tagged_page(s, p));
    }
}

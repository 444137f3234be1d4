//! What cached translations the guest asked to forget (SDM 3A, 4.10.4), and which address space is current.

use crate::state::LinAddr;

/// Pages, or spaces, remembered one by one before a record falls back to dropping everything.
const MAX_LISTED: usize = 64;

/// Invalidations since the record was last taken. Each names its address space by PCID (0 while CR4.PCIDE is clear), so
/// that their order, among each other and with switches, does not matter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flushes {
    /// Everything, global entries and all PCIDs included.
    pub all: bool,
    /// Non-global entries of every PCID.
    pub all_non_global: bool,
    /// PCIDs whose non-global entries are gone.
    pub spaces: Vec<u16>,
    /// Single pages: entries of this PCID, and global ones.
    pub pages: Vec<(u16, LinAddr)>,
    /// CR3 names another address space now: this PCID. Its entries stay valid unless they are flushed too.
    pub switched: Option<u16>,
}

impl Flushes {
    /// Nothing to drop, and no switch.
    #[inline]
    pub fn is_empty(&self) -> bool {
        !(self.all || self.all_non_global || self.switched.is_some())
            && self.pages.is_empty()
            && self.spaces.is_empty()
    }

    /// Starts an empty record; the lists keep their memory.
    pub fn clear(&mut self) {
        (self.all, self.all_non_global, self.switched) = (false, false, None);
        self.spaces.clear();
        self.pages.clear();
    }

    /// Adds one page of `pcid`, global or not.
    pub fn page(&mut self, pcid: u16, lin: LinAddr) {
        if self.pages.len() < MAX_LISTED {
            self.pages.push((pcid, lin));
        } else {
            self.all = true;
        }
    }

    /// Adds the non-global entries of `pcid`.
    pub fn space(&mut self, pcid: u16) {
        if self.spaces.len() < MAX_LISTED {
            self.spaces.push(pcid);
        } else {
            self.all_non_global = true;
        }
    }

    /// Adds everything in `later`.
    pub fn merge(&mut self, later: &Flushes) {
        self.all |= later.all;
        self.all_non_global |= later.all_non_global;
        self.switched = later.switched.or(self.switched);
        later.pages.iter().for_each(|&(pcid, lin)| self.page(pcid, lin));
        later.spaces.iter().for_each(|&pcid| self.space(pcid));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_record_drops_more_rather_than_growing() {
        let mut f = Flushes::default();
        for n in 0..1000u16 {
            f.space(n);
        }
        assert!(f.all_non_global && !f.all && f.spaces.len() <= MAX_LISTED);
        for n in 0..1000 {
            f.page(1, LinAddr(n << 12));
        }
        assert!(f.all && f.pages.len() <= MAX_LISTED);
    }

    #[test]
    fn the_last_switch_counts() {
        let mut f = Flushes { switched: Some(1), ..Flushes::default() };
        f.merge(&Flushes { switched: Some(2), ..Flushes::default() });
        f.merge(&Flushes { all: true, ..Flushes::default() });
        assert_eq!((f.switched, f.all), (Some(2), true));
        f.clear();
        assert!(f.is_empty());
    }
}

//! What a debugger asks of an engine: addresses to stop at and accesses to report.
//!
//! Nothing of it is in guest memory or in guest registers, so no guest can see or overwrite it. The engine holds one plan at
//! a time; an empty one costs nothing.

use crate::core::instruction_address;
use crate::mmu::peek;
use crate::state::{CpuState, LinAddr};
use paravane_memory::{GuestMemory, PAGE_SHIFT, PAGE_SIZE, PhysAddr};
use std::collections::BTreeSet;
use std::fmt;

/// Pages of a linear watchpoint that are compared with accesses of devices: 16 MiB.
pub const DEVICE_PAGES: usize = 4096;

/// What a watchpoint's addresses count.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Space {
    /// Linear addresses, whatever they are mapped to.
    Linear,
    /// Physical addresses, RAM or device registers, whatever they are mapped at.
    Physical,
    /// I/O ports.
    Port,
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Space::Linear => "linear",
            Space::Physical => "physical",
            Space::Port => "port",
        })
    }
}

/// Which accesses a watchpoint reports.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum WatchKind {
    /// Loads and the reading half of read-modify-write.
    Read,
    /// Stores, whatever is stored.
    Write,
    /// Both.
    Access,
}

impl WatchKind {
    fn reports(self, write: bool) -> bool {
        match self {
            WatchKind::Read => !write,
            WatchKind::Write => write,
            WatchKind::Access => true,
        }
    }
}

/// A watched range. At least one byte long; it may cross pages.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Watchpoint {
    /// What `first` counts.
    pub space: Space,
    /// First address.
    pub first: u64,
    /// Bytes (or ports).
    pub len: u64,
    /// Which accesses.
    pub kind: WatchKind,
}

impl Watchpoint {
    /// The last address, inclusive.
    pub fn last(&self) -> u64 {
        self.first.saturating_add(self.len.max(1) - 1)
    }

    /// The first byte of `len` bytes at `at` that is watched.
    fn overlap(&self, at: u64, len: u64) -> Option<u64> {
        let last = at.saturating_add(len.max(1) - 1);
        (self.first <= last && at <= self.last()).then(|| at.max(self.first))
    }

    /// The first linear address in here that is mapped to one of `len` bytes at `phys`.
    fn mapped(&self, cpu: &CpuState, mem: &GuestMemory, phys: PhysAddr, len: u64) -> Option<u64> {
        let pages = (self.first >> PAGE_SHIFT)..=(self.last() >> PAGE_SHIFT);
        pages.take(DEVICE_PAGES).find_map(|page| {
            let first = self.first.max(page << PAGE_SHIFT);
            let bytes = self.last().min(page << PAGE_SHIFT | (PAGE_SIZE - 1)) - first + 1;
            let here = Watchpoint { first: peek(cpu, mem, LinAddr(first)).phys()?.0, len: bytes, ..*self };
            here.overlap(phys.0, len).map(|at| first + (at - here.first))
        })
    }
}

/// A watched access that was made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WatchHit {
    /// The watchpoint.
    pub watch: Watchpoint,
    /// The first watched byte of the access, in the watchpoint's space.
    pub at: u64,
    /// A store (a load otherwise).
    pub write: bool,
    /// The machine's number of the device that made it; `None`: the processor did.
    pub device: Option<u16>,
}

/// Why an engine stopped for the debugger.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DebugStop {
    /// The instruction at this linear address is next; nothing of it was done.
    Breakpoint(LinAddr),
    /// The instruction just executed (or, with RIP still on it, one iteration of a REP) did this.
    Watch(WatchHit),
}

/// Breakpoints and watchpoints of one vCPU.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DebugPlan {
    /// Breakpoints by linear address of the instruction.
    pub linear: BTreeSet<u64>,
    /// Breakpoints by physical address of the instruction's first byte.
    pub physical: BTreeSet<u64>,
    /// Watchpoints.
    pub watch: BTreeSet<Watchpoint>,
}

impl DebugPlan {
    /// Whether any breakpoint is armed.
    pub fn breaks(&self) -> bool {
        !(self.linear.is_empty() && self.physical.is_empty())
    }

    /// The breakpoint at the instruction that is next, if one is armed there.
    pub fn stops_at(&self, cpu: &CpuState, mem: &GuestMemory) -> Option<LinAddr> {
        let lin = instruction_address(cpu);
        if self.linear.contains(&lin.0) {
            return Some(lin);
        }
        let physical = !self.physical.is_empty()
            && peek(cpu, mem, lin).phys().is_some_and(|p| self.physical.contains(&p.0));
        physical.then_some(lin)
    }

    /// Which accesses to the page at `lin`, backed by `phys`, must be looked at one by one: (loads, stores).
    pub fn watches_page(&self, lin: LinAddr, phys: PhysAddr) -> (bool, bool) {
        let page = |at: u64| at >> PAGE_SHIFT << PAGE_SHIFT;
        let (lin, phys) = (page(lin.0), page(phys.0));
        let mut watched = (false, false);
        for w in &self.watch {
            let at = match w.space {
                Space::Linear => lin,
                Space::Physical => phys,
                Space::Port => continue,
            };
            if w.overlap(at, 1 << PAGE_SHIFT).is_some() {
                // A read-modify-write uses the write view only.
                watched.0 |= w.kind != WatchKind::Write;
                watched.1 = true;
            }
        }
        watched
    }

    /// The watchpoint that an access of `len` bytes inside one page hits.
    pub(crate) fn hit(&self, lin: LinAddr, phys: PhysAddr, len: u64, write: bool) -> Option<WatchHit> {
        self.find(write, |w| match w.space {
            Space::Linear => w.overlap(lin.0, len),
            Space::Physical => w.overlap(phys.0, len),
            Space::Port => None,
        })
    }

    /// The watchpoint that an access to ports hits.
    pub(crate) fn port_hit(&self, port: u16, len: u64, write: bool) -> Option<WatchHit> {
        self.find(write, |w| match w.space {
            Space::Port => w.overlap(u64::from(port), len),
            Space::Linear | Space::Physical => None,
        })
    }

    /// Whether memory is watched, and not ports alone.
    pub fn watches_memory(&self) -> bool {
        self.watch.iter().any(|w| w.space != Space::Port)
    }

    /// Whether a device's access to `len` bytes at `phys` may hit a watchpoint: where a linear one lies only a processor knows.
    pub fn may_watch(&self, phys: PhysAddr, len: u64, write: bool) -> bool {
        self.watch.iter().filter(|w| w.kind.reports(write)).any(|w| match w.space {
            Space::Linear => true,
            Space::Physical => w.overlap(phys.0, len).is_some(),
            Space::Port => false,
        })
    }

    /// The watchpoint that a device's access to `len` bytes at `phys` hits; linear ones lie where the page tables of `cpu` have
    /// them now, the first [`DEVICE_PAGES`] pages of each.
    pub fn device_hit(
        &self,
        cpu: Option<&CpuState>,
        mem: &GuestMemory,
        phys: PhysAddr,
        len: u64,
        write: bool,
    ) -> Option<WatchHit> {
        self.find(write, |w| match w.space {
            Space::Linear => w.mapped(cpu?, mem, phys, len),
            Space::Physical => w.overlap(phys.0, len),
            Space::Port => None,
        })
    }

    fn find(&self, write: bool, overlap: impl Fn(&Watchpoint) -> Option<u64>) -> Option<WatchHit> {
        self.watch
            .iter()
            .filter(|w| w.kind.reports(write))
            .find_map(|w| overlap(w).map(|at| WatchHit { watch: *w, at, write, device: None }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(space: Space, first: u64, len: u64, kind: WatchKind) -> DebugPlan {
        let watch = BTreeSet::from([Watchpoint { space, first, len, kind }]);
        DebugPlan { watch, ..DebugPlan::default() }
    }

    #[test]
    fn hits_name_the_first_watched_byte() {
        let p = plan(Space::Linear, 0x1004, 3, WatchKind::Write);
        let hit = |at, len, write| p.hit(LinAddr(at), PhysAddr(0), len, write).map(|h| h.at);
        assert_eq!(hit(0x1000, 8, true), Some(0x1004));
        assert_eq!(hit(0x1006, 1, true), Some(0x1006));
        assert_eq!(hit(0x1007, 8, true), None);
        assert_eq!(hit(0x1000, 4, true), None);
        assert_eq!(hit(0x1004, 1, false), None);
        assert_eq!(p.port_hit(0x1004, 1, true), None);
    }

    #[test]
    fn read_watchpoints_also_close_the_write_view() {
        let p = plan(Space::Physical, 0x5FFF, 2, WatchKind::Read);
        let at = |phys| p.watches_page(LinAddr(0), PhysAddr(phys));
        assert_eq!((at(0x5000), at(0x6000), at(0x7000)), ((true, true), (true, true), (false, false)));
        let p = plan(Space::Linear, 0x5000, 1, WatchKind::Write);
        assert_eq!(p.watches_page(LinAddr(0x5FFF), PhysAddr(0)), (false, true));
    }
}

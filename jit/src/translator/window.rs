//! Which address spaces get a window (see [`crate::windows`]), what it shows, and when it goes.
//!
//! A page that is shown costs a host fault and a mapping, some microseconds, once; a look-up in a table that is not needed saves
//! a nanosecond or two, and code without it is smaller, which counts while it is being translated. So a space gets a window when its
//! program is first found running, which is some milliseconds old by then, and loses it when it faults too often for that.

use super::Translator;
use crate::stubs::MissInfo;
use crate::windows::Reach;
use paravane_cpu::{CpuState, LinAddr, PageTable, gpr, page_table};
use paravane_memory::{Mapped, PAGE_SHIFT, PhysAddr, RamOffset};

/// Pages that are looked at around one that is shown.
const AROUND: u64 = 16;
/// Host faults that a window may take before the next poll finds its program running: how many may be saved up, which a window begins
/// with, and how many more each poll allows. A poll is some milliseconds away.
const CREDIT: i32 = 2_500;
const EARNED: i32 = 200;
/// What a fault counts that shows nothing.
const IN_VAIN: i32 = 3;
/// Pages that may be compared with page tables for what a fault costs.
const COMPARED: i32 = 512;
/// Polls that a space waits for another window at most.
const MAX_WAIT: u32 = 1 << 12;
/// Bits of CR3 that are the root's address.
const ROOT: u64 = 0x000F_FFFF_FFFF_F000;

/// What is known of an address space.
#[derive(Clone, Copy, Default)]
struct Candidate {
    root: u64,
    /// Polls that found its program running, and how many there must be beyond [`super::JitOptions::window_after`].
    polls: u32,
    wait: u32,
    credit: i32,
    /// A window had too small a reach.
    everywhere: bool,
}

impl Candidate {
    /// What is spent beyond the credit closes the window, but where tests want one at any price.
    fn spend(&mut self, cost: i32) {
        self.credit = self.credit.saturating_sub(cost);
    }
}

/// The address spaces that may get windows.
pub(super) struct Candidates {
    spaces: Vec<Candidate>,
    /// The current window must be looked after before its program goes on.
    due: bool,
    /// A host fault in translated code: at which address, by a write.
    pub(super) fault: Option<(u64, bool)>,
    /// The page of this address was not there: the guest will see to that.
    expected: Option<u64>,
}

impl Candidates {
    pub(super) fn new(spaces: usize) -> Candidates {
        Candidates { spaces: vec![Candidate::default(); spaces], due: false, fault: None, expected: None }
    }

    /// Whether programs may be returned to only by way of [`Translator::settle_window`].
    pub(super) fn is_due(&self) -> bool {
        self.due
    }
}

/// Whether what runs may use a window, if there is one.
fn may_have_window(cpu: &CpuState) -> bool {
    cpu.cpl == 3 && (cpu.code64() || cpu.code_bits() == 32)
}

impl Translator {
    fn candidate(&mut self) -> &mut Candidate {
        &mut self.candidates.spaces[self.spaces.current()]
    }

    /// A poll found the guest running.
    pub(super) fn found_running(&mut self, cpu: &CpuState) {
        if !may_have_window(cpu) || self.budgeted() {
            return;
        }
        let (root, open, after) = (cpu.cr3 & ROOT, self.windows.is_open(), self.options.window_after);
        let c = self.candidate();
        if c.root != root {
            *c = Candidate { root, ..Candidate::default() };
        }
        if open {
            c.credit = (c.credit + EARNED).min(CREDIT);
            return;
        }
        c.polls = c.polls.saturating_add(1);
        if after != u32::MAX && c.polls >= after.saturating_add(c.wait) {
            self.candidates.due = true;
        }
    }

    /// Looks after the current window before a program goes on.
    #[inline]
    pub(super) fn settle_window(&mut self, cpu: &mut CpuState) {
        let at_once = self.options.window_after == 0 && !self.windows.is_open();
        if (self.candidates.due || at_once) && may_have_window(cpu) {
            self.look_after_window(cpu);
        }
    }

    #[cold]
    fn look_after_window(&mut self, cpu: &mut CpuState) {
        let due = std::mem::take(&mut self.candidates.due);
        let expected = self.candidates.expected.take();
        let root = cpu.cr3 & ROOT;
        if !cpu.paging() {
            // There are no page tables that it could show.
            if self.windows.is_open() {
                self.close_window();
            }
            return;
        }
        if !self.windows.is_open() {
            let c = self.candidate();
            if c.root != root {
                *c = Candidate { root, ..Candidate::default() };
            }
            let at_once = self.options.window_after == 0;
            if due || at_once {
                self.open_window(cpu, root);
            }
            return;
        }
        if self.windows.is_stale() && !self.windows.belongs_to(root) {
            self.close_window();
            return;
        }
        let dear = self.candidate().credit < 0 && self.options.window_after != 0;
        if self.windows.unfit || dear {
            self.close_window();
            let c = self.candidate();
            c.wait = (4 * c.wait + 64).min(MAX_WAIT);
            return;
        }
        if self.windows.is_stale() {
            self.compare_window(cpu);
            let pages = self.windows.pages() as i32;
            self.candidate().spend(pages / COMPARED);
        }
        if let Some(lin) = expected {
            self.show_around(cpu, lin);
        }
    }

    fn open_window(&mut self, cpu: &CpuState, root: u64) {
        let code64 = cpu.code64();
        if code64 && cpu.gpr[gpr::RSP] >> 47 != 0 {
            return;
        }
        let mut known = vec![cpu.rip, cpu.gpr[gpr::RSP]];
        self.delta.known(&mut known);
        known.retain(|lin| lin >> if code64 { 47 } else { 32 } == 0);
        let c = self.candidate();
        (c.polls, c.credit) = (0, CREDIT);
        let reach = match code64 {
            false => Reach::All32,
            true if c.everywhere => Reach::Everywhere,
            true => Reach::of(&known),
        };
        // There is one for all processors.
        let possible =
            (reach != Reach::Everywhere || self.options.vcpus == 1) && self.windows.is_roomy_for(known.len());
        if !possible || !self.windows.open(root, reach, &[cpu.rip]) {
            let c = self.candidate();
            c.wait = (2 * c.wait + 16).min(MAX_WAIT);
            return;
        }
        self.forget_code();
        for lin in known {
            if !self.windows.shows(lin) && self.windows.admit(lin) {
                self.show_around(cpu, lin);
            }
        }
    }

    fn close_window(&mut self) {
        let space = self.spaces.current();
        self.windows.close(space);
        self.forget_code();
    }

    /// Code of the current space is looked up anew: it is in another mode.
    fn forget_code(&mut self) {
        let space = self.spaces.current();
        let (pages, cells) = self.code_pages();
        pages.flush_space(cells, space);
    }

    /// Closes all windows and forgets who deserved them.
    pub(super) fn forget_windows(&mut self) {
        self.windows.close_all();
        self.candidates = Candidates::new(self.delta.spaces());
    }

    /// The guest flushed the translations of `space`.
    pub(super) fn spoil_window(&mut self, space: usize) {
        self.windows.spoil(space);
        self.candidates.due |= self.windows.is_stale();
    }

    /// `space` is the current one now; it held another tag's translations before if it was `replaced`.
    pub(super) fn switch_window(&mut self, space: usize, replaced: bool) {
        if replaced {
            self.windows.close(space);
            self.candidates.spaces[space] = Candidate::default();
        }
        self.windows.switch(space);
        self.candidates.expected = None;
        self.candidates.due = self.windows.is_stale();
    }

    /// Lets the current window, if there is one, be used for code at `lin`, on a page that is `global` or not: what lies near code is
    /// not checked. What is known of a global page is known in all spaces, whichever regions their windows have, so that a guest with global
    /// pages of programs has no windows.
    pub(super) fn admit_code(&mut self, lin: u64, global: bool) -> bool {
        if global {
            let open = self.windows.is_open();
            self.windows.forbid();
            return !open;
        }
        if !self.windows.is_probed() || lin >> 47 != 0 || self.windows.admit(lin) {
            return true;
        }
        self.unfit();
        false
    }

    /// A region that was not admitted is accessed: whether it is now.
    pub(super) fn admit_region(&mut self, ea: u64, info: u64) -> bool {
        if self.windows.admit(ea) {
            return true;
        }
        if !self.windows.is_probed() {
            return false;
        }
        // Where there is nothing it does not matter.
        if ea >> 47 == 0 && self.fill(ea, info) {
            self.unfit();
        }
        false
    }

    /// Whether 64-bit code may use the current window with `rsp` in RSP. If not it goes without one.
    pub(super) fn admit_stack(&mut self, rsp: u64) -> bool {
        let admitted = self.windows.admit_stack(rsp);
        if !admitted {
            self.unfit();
        }
        admitted
    }

    fn unfit(&mut self) {
        self.windows.unfit = true;
        self.candidates.due = true;
        self.candidate().everywhere = true;
    }

    /// A host fault in code that uses the window: whether the page is shown now.
    pub(super) fn fill_window(&mut self, cpu: &mut CpuState) -> bool {
        let Some((at, write)) = self.candidates.fault.take() else { return false };
        if let Some(lin) = self.windows.probed(at) {
            return self.fill_probe(cpu, lin);
        }
        let Some(lin) = self.windows.linear(at) else { return false };
        self.stats.window_faults += 1;
        let info = 1 | if write { MissInfo::WRITE } else { 0 };
        self.running = cpu;
        let filled = self.admit_region(lin, info) && self.fill(lin, info);
        self.running = std::ptr::null_mut();
        let shown = filled && self.show_around(cpu, lin);
        let c = self.candidate();
        c.spend(if shown { 1 } else { IN_VAIN });
        if !shown {
            self.candidates.expected = Some(lin);
        }
        self.candidates.due |= !shown || self.windows.unfit || self.candidate().credit < 0;
        shown
    }

    /// A probe of `lin` faulted: whether its region is admitted now.
    fn fill_probe(&mut self, cpu: &mut CpuState, lin: u64) -> bool {
        self.stats.window_probes += 1;
        self.running = cpu;
        let admitted = self.admit_region(lin, 1);
        self.running = std::ptr::null_mut();
        let c = self.candidate();
        c.spend(if admitted { 1 } else { IN_VAIN });
        self.candidates.due |= self.windows.unfit || self.candidate().credit < 0;
        admitted
    }

    /// Shows the page of `lin`, and pages around it that the guest has accessed before; whether that of `lin` is shown now.
    fn show_around(&mut self, cpu: &CpuState, lin: u64) -> bool {
        let mem = self.mem.clone();
        let Some(table) = page_table(cpu, &mem, self.core.paging(), LinAddr(lin)) else { return false };
        let wanted = lin & !0xFFF;
        let first = wanted & !(AROUND * 4096 - 1);
        let mut shown = false;
        // Where the run of pages begins that comes next: in the window and in guest memory, how many, and whether to be written.
        let mut run: Option<(u64, u64, u64, bool)> = None;
        for page in (0..AROUND).map(|n| first + n * 4096) {
            let found =
                if page != wanted && self.windows.shows(page) { None } else { self.showable(&table, page) };
            match (&mut run, found) {
                (Some((from, ram, n, write)), Some((next, writable)))
                    if *from + *n * 4096 == page && *ram + *n == next && *write == writable =>
                {
                    *n += 1;
                }
                (_, found) => {
                    shown |= self.show_run(run, wanted);
                    run = found.map(|(ram, write)| (page, ram, 1, write));
                }
            }
        }
        shown | self.show_run(run, wanted)
    }

    /// Shows a run of pages; whether that at `wanted` is one of them.
    fn show_run(&mut self, run: Option<(u64, u64, u64, bool)>, wanted: u64) -> bool {
        let Some((lin, ram, n, write)) = run else { return false };
        self.windows.show(lin, ram, n, write) && (lin..lin + n * 4096).contains(&wanted)
    }

    /// What a window may show at `lin`, which `table` translates: a page of guest memory, and whether it may be written; then the
    /// claim on that is made.
    fn showable(&mut self, table: &PageTable<'_>, lin: u64) -> Option<(u64, bool)> {
        let (phys, writable) = table.page((lin >> 12) as usize & 511)?;
        let Mapped::Ram(ram) = self.mem.resolve(phys.page()) else { return None };
        let (watch_reads, watch_writes) = self.core.watches_page(LinAddr(lin), phys);
        if watch_reads {
            return None;
        }
        let write = writable && !watch_writes && self.claims.claim_write(ram);
        if write {
            self.remember_writer(ram, lin);
        }
        Some((ram.0 >> PAGE_SHIFT, write))
    }

    /// Compares what the current window shows with the guest's page tables.
    fn compare_window(&mut self, cpu: &CpuState) {
        let Translator { windows, core, mem, .. } = self;
        let mut known: Option<(u64, Option<PageTable<'_>>)> = None;
        windows.compare(|base, i| {
            if known.as_ref().is_none_or(|(of, _)| *of != base) {
                known = Some((base, page_table(cpu, mem, core.paging(), LinAddr(base))));
            }
            let table = known.as_ref().and_then(|(_, table)| table.as_ref())?;
            let (phys, writable): (PhysAddr, bool) = table.page(i)?;
            let Mapped::Ram(RamOffset(ram)) = mem.resolve(phys.page()) else { return None };
            let (watch_reads, watch_writes) = core.watches_page(LinAddr(base + i as u64 * 4096), phys);
            (!watch_reads).then_some((ram >> PAGE_SHIFT, writable && !watch_writes))
        });
    }
}

//! What an instruction may do to memory, the stack and segment registers: the contract between the stepping
//! core and instruction semantics (SDM 3A, chapters 3 to 5).
//!
//! Offsets arrive truncated to the address size. Segmentation, paging, alignment checks and data breakpoints
//! happen here. Nothing is written if any byte of an access faults.

use crate::bus::CpuBus;
use crate::cpuid::CpuModel;
use crate::debug;
use crate::engine::{Attention, VectorUnit};
use crate::fault::{Fault, Vector};
use crate::mmu::{Access, Entry, Flushes, Privilege, Tlb};
use crate::plan::{DebugPlan, WatchHit};
use crate::segment;
use crate::state::{CpuState, LinAddr, SegReg, Segment, cr0, flags, gpr};
use paravane_memory::{
    GuestMemory, Mapped, PAGE_SIZE, PhysAddr, RamOffset, VpIndex, Width, crosses_line, split_locks_are_dear,
};

/// What an instruction asks of the core beyond its architectural effects.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Outcome {
    /// Nothing: go on.
    #[default]
    Done,
    /// HLT was executed.
    Halt,
    /// No engine implements the instruction.
    Unsupported,
}

/// One instruction in progress.
pub(crate) struct Exec<'a> {
    pub cpu: &'a mut CpuState,
    pub mem: &'a GuestMemory,
    pub bus: &'a dyn CpuBus,
    pub vp: VpIndex,
    pub model: &'a CpuModel,
    pub attention: &'a Attention,
    pub tlb: &'a mut Tlb,
    pub vector: &'a mut dyn VectorUnit,
    /// RIP after the current instruction; branches overwrite it. A REP that stopped early sets it to `cpu.rip`.
    pub next_rip: u64,
    pub flushes: &'a mut Flushes,
    pub outcome: Outcome,
    /// DR6 bits of breakpoints hit by this instruction: a `#DB` trap after it.
    pub debug_hits: u64,
    /// The debugger's plan, if it watches anything.
    pub plan: Option<&'a DebugPlan>,
    /// The first watched access.
    pub watch_hit: Option<WatchHit>,
    /// The vector an INT n, INT3 or INTO is being delivered through.
    pub delivering: Option<u8>,
    /// What fails where delivering an exception fails now; told when that ends in a shutdown.
    pub failing: &'static str,
    /// RIP and RFLAGS were loaded as a whole (delivery, IRET, task switch): nothing is rolled back, RF stays.
    pub transferred: bool,
    /// A near branch was taken, be it to the next instruction.
    pub branched: bool,
    /// An interrupt was delivered or a task switched: no single-step trap follows.
    pub delivered: bool,
}

/// One in-page part of an access.
#[derive(Clone, Copy)]
struct Piece {
    entry: Entry,
    in_page: u64,
    len: usize,
}

impl Exec<'_> {
    /// Segmentation alone: the linear address of `size` bytes at `offset`.
    #[inline]
    pub fn linear(&self, seg: SegReg, offset: u64, size: usize, write: bool) -> Result<LinAddr, Fault> {
        let fault = if seg == SegReg::Ss { Fault::SS0 } else { Fault::GP0 };
        let s = &self.cpu.seg[seg as usize];
        if self.cpu.code64() {
            let base = if matches!(seg, SegReg::Fs | SegReg::Gs) { s.base } else { 0 };
            return segment::canonical_range(base.wrapping_add(offset), size as u64).map_err(|()| fault);
        }
        segment::in_limits(s, offset, size as u64, write, self.cpu.protected())
            .map(|()| LinAddr(s.base.wrapping_add(offset) & 0xFFFF_FFFF))
            .map_err(|()| fault)
    }

    /// Whose rights the current instruction's operands have.
    #[inline]
    fn privilege(&self) -> Privilege {
        if self.cpu.cpl == 3 { Privilege::User } else { Privilege::Supervisor }
    }

    /// `#AC` if alignment is checked and `lin` is no multiple of `align`, a power of two (SDM 3A, 6.15, interrupt 17).
    #[inline]
    pub fn check_alignment(&self, lin: LinAddr, align: u64) -> Result<(), Fault> {
        let cpu = &self.cpu;
        let misaligned = lin.0 & (align - 1) != 0;
        if misaligned && cpu.cpl == 3 && cpu.rflags & flags::AC != 0 && cpu.cr0 & cr0::AM != 0 {
            return Err(Fault::with_code(Vector::AC, 0));
        }
        Ok(())
    }

    /// `#AC` and data breakpoints.
    #[inline]
    fn watch(&mut self, lin: LinAddr, size: usize, write: bool) -> Result<(), Fault> {
        self.check_alignment(lin, size as u64)?;
        if self.cpu.dr[7] & 0xFF != 0 {
            self.debug_hits |= debug::data_hits(self.cpu, lin, size as u64, write);
        }
        Ok(())
    }

    /// Loads 1, 2, 4 or 8 bytes.
    #[inline]
    pub fn load(&mut self, seg: SegReg, offset: u64, size: usize) -> Result<u64, Fault> {
        let lin = self.linear(seg, offset, size, false)?;
        self.watch(lin, size, false)?;
        self.load_linear(lin, size, self.privilege())
    }

    /// Stores 1, 2, 4 or 8 bytes.
    #[inline]
    pub fn store(&mut self, seg: SegReg, offset: u64, size: usize, value: u64) -> Result<(), Fault> {
        let lin = self.linear(seg, offset, size, true)?;
        self.watch(lin, size, true)?;
        self.store_linear(lin, size, value, self.privilege())
    }

    /// Loads up to 4096 bytes.
    pub fn load_bytes(&mut self, seg: SegReg, offset: u64, buf: &mut [u8]) -> Result<(), Fault> {
        let lin = self.linear(seg, offset, buf.len(), false)?;
        if self.cpu.dr[7] & 0xFF != 0 {
            self.debug_hits |= debug::data_hits(self.cpu, lin, buf.len() as u64, false);
        }
        self.load_bytes_linear(lin, buf, self.privilege())
    }

    /// Stores up to 4096 bytes; nothing is written if any byte faults.
    pub fn store_bytes(&mut self, seg: SegReg, offset: u64, buf: &[u8]) -> Result<(), Fault> {
        let lin = self.linear(seg, offset, buf.len(), true)?;
        if self.cpu.dr[7] & 0xFF != 0 {
            self.debug_hits |= debug::data_hits(self.cpu, lin, buf.len() as u64, true);
        }
        self.store_bytes_linear(lin, buf, self.privilege())
    }

    /// Faults as a store would.
    pub fn probe_write(&mut self, seg: SegReg, offset: u64, size: usize) -> Result<(), Fault> {
        let lin = self.linear(seg, offset, size, true)?;
        self.pieces(lin, size, Access::Write, self.privilege()).map(|_| ())
    }

    /// Read-modify-write, atomic if `locked` (see [`Self::rmw_linear`]). Returns the old value. `f` may be called several times.
    pub fn rmw(
        &mut self,
        seg: SegReg,
        offset: u64,
        size: usize,
        locked: bool,
        f: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, Fault> {
        let lin = self.linear(seg, offset, size, true)?;
        self.watch(lin, size, true)?;
        self.rmw_linear(lin, size, self.privilege(), locked, f)
    }

    /// Read-modify-write at a linear address. If `locked`, one locked access of the host, so that it is atomic towards all
    /// processors and devices at any alignment. Only an operand on two pages that do not follow each other in the host's memory
    /// takes two accesses: then it is atomic towards other locked accesses to such operands. On two cache lines it is
    /// [`GuestMemory::ram_update_split`] where the host punishes split locks.
    fn rmw_linear(
        &mut self,
        lin: LinAddr,
        size: usize,
        privilege: Privilege,
        locked: bool,
        f: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, Fault> {
        let in_page = lin.0 & (PAGE_SIZE - 1);
        if in_page + size as u64 <= PAGE_SIZE {
            let entry = self.tlb.lookup(self.cpu, self.mem, lin, Access::Write, privilege)?;
            if let Some(at) = entry.ram(in_page) {
                self.observe(lin, &entry, size, false);
                self.observe(lin, &entry, size, true);
                return Ok(self.rmw_ram(at, size, locked, f));
            }
            return self.rmw_in_pieces(lin, size, privilege, f);
        }
        let pieces = self.pieces(lin, size, Access::Write, privilege)?;
        if !locked {
            return self.rmw_in_pieces(lin, size, privilege, f);
        }
        if let [Some(first), Some(second)] = pieces
            && let (Some(at), Some(next)) = (first.entry.ram(first.in_page), second.entry.ram(0))
            && next.0 == at.0 + first.len as u64
        {
            let rest = self.wrap(lin.0.wrapping_add(first.len as u64));
            for write in [false, true] {
                self.observe(lin, &first.entry, first.len, write);
                self.observe(rest, &second.entry, second.len, write);
            }
            return Ok(self.rmw_ram(at, size, true, f));
        }
        let mem = self.mem;
        mem.exclusive(|| self.rmw_in_pieces(lin, size, privilege, f))
    }

    /// Loads, then stores. What may fault was tried before, or is the first thing here.
    fn rmw_in_pieces(
        &mut self,
        lin: LinAddr,
        size: usize,
        privilege: Privilege,
        f: &mut dyn FnMut(u64) -> u64,
    ) -> Result<u64, Fault> {
        let old = self.load_linear(lin, size, privilege)?;
        self.store_linear(lin, size, f(old), privilege)?;
        Ok(old)
    }

    #[inline]
    fn rmw_ram(&mut self, at: RamOffset, size: usize, locked: bool, f: &mut dyn FnMut(u64) -> u64) -> u64 {
        if locked && crosses_line(at.0, size as u64) && split_locks_are_dear() {
            let old = self.mem.ram_update_split(at, size, f);
            self.mem.wrote(at, size as u64);
            return old;
        }
        let mut old = self.mem.ram_load(at, size);
        if locked {
            while let Err(now) = self.mem.ram_compare_exchange(at, size, old, f(old)) {
                old = now;
            }
        } else {
            self.mem.ram_store(at, size, f(old));
        }
        self.mem.wrote(at, size as u64);
        old
    }

    /// CMPXCHG16B on an aligned operand, always atomic: stores what `f` returns, or the old value back.
    pub fn rmw16b(
        &mut self,
        seg: SegReg,
        offset: u64,
        f: &mut dyn FnMut(u128) -> Option<u128>,
    ) -> Result<u128, Fault> {
        let lin = self.linear(seg, offset, 16, true)?;
        let entry = self.tlb.lookup(self.cpu, self.mem, lin, Access::Write, self.privilege())?;
        let Some(at) = entry.ram(lin.0 & (PAGE_SIZE - 1)) else {
            return self.rmw16b_elsewhere(seg, offset, f);
        };
        if self.cpu.dr[7] & 0xFF != 0 {
            self.debug_hits |= debug::data_hits(self.cpu, lin, 16, true);
        }
        self.observe(lin, &entry, 16, false);
        self.observe(lin, &entry, 16, true);
        let mut buf = [0; 16];
        self.mem.ram_read(at, &mut buf);
        let mut old = u128::from_le_bytes(buf);
        while let Err(now) = self.mem.ram_compare_exchange_16(at, old, f(old).unwrap_or(old)) {
            old = now;
        }
        self.mem.wrote(at, 16);
        Ok(old)
    }

    /// [`Self::rmw16b`] where there is no RAM.
    #[cold]
    fn rmw16b_elsewhere(
        &mut self,
        seg: SegReg,
        offset: u64,
        f: &mut dyn FnMut(u128) -> Option<u128>,
    ) -> Result<u128, Fault> {
        let mut buf = [0; 16];
        self.load_bytes(seg, offset, &mut buf)?;
        let old = u128::from_le_bytes(buf);
        self.store_bytes(seg, offset, &f(old).unwrap_or(old).to_le_bytes())?;
        Ok(old)
    }

    /// The memory behind `lin` and the bytes up to the end of its page; `None` if it is not plain memory or a
    /// data breakpoint needs every access seen.
    pub fn span(&mut self, lin: LinAddr, write: bool) -> Result<Option<(RamOffset, u64)>, Fault> {
        let access = if write { Access::Write } else { Access::Read };
        let entry = self.tlb.lookup(self.cpu, self.mem, lin, access, self.privilege())?;
        let in_page = lin.0 & (PAGE_SIZE - 1);
        let watched = |p: &DebugPlan| p.watches_page(lin, entry.phys(in_page)) != (false, false);
        if self.cpu.dr[7] & 0xFF != 0 || self.plan.is_some_and(watched) {
            return Ok(None);
        }
        Ok(entry.ram(in_page).map(|at| (at, PAGE_SIZE - in_page)))
    }

    /// Tells the debugger of an access inside one page that is about to be made.
    #[inline]
    fn observe(&mut self, lin: LinAddr, entry: &Entry, size: usize, write: bool) {
        if let Some(plan) = self.plan
            && self.watch_hit.is_none()
        {
            self.watch_hit = plan.hit(lin, entry.phys(lin.0 & (PAGE_SIZE - 1)), size as u64, write);
        }
    }

    /// Likewise of an access to ports.
    pub fn observe_port(&mut self, port: u16, size: usize, write: bool) {
        if let Some(plan) = self.plan
            && self.watch_hit.is_none()
        {
            self.watch_hit = plan.port_hit(port, size as u64, write);
        }
    }

    /// Mask of the stack pointer's bits in use.
    #[inline]
    pub fn stack_mask(&self) -> u64 {
        if self.cpu.code64() { u64::MAX } else { segment::stack_mask(&self.cpu.seg[SegReg::Ss as usize]) }
    }

    /// Pushes 2, 4 or 8 bytes.
    #[inline]
    pub fn push(&mut self, size: usize, value: u64) -> Result<(), Fault> {
        let mask = self.stack_mask();
        let sp = self.cpu.gpr[gpr::RSP].wrapping_sub(size as u64) & mask;
        self.store(SegReg::Ss, sp, size, value)?;
        self.set_stack_pointer(sp, mask);
        Ok(())
    }

    /// Pops 2, 4 or 8 bytes.
    #[inline]
    pub fn pop(&mut self, size: usize) -> Result<u64, Fault> {
        let mask = self.stack_mask();
        let sp = self.cpu.gpr[gpr::RSP] & mask;
        let value = self.load(SegReg::Ss, sp, size)?;
        self.set_stack_pointer(sp.wrapping_add(size as u64) & mask, mask);
        Ok(value)
    }

    /// Replaces the bits of RSP that `mask` covers; a 32-bit stack pointer zero-extends.
    #[inline]
    pub fn set_stack_pointer(&mut self, sp: u64, mask: u64) {
        let rsp = &mut self.cpu.gpr[gpr::RSP];
        *rsp = if mask == 0xFFFF { (*rsp & !0xFFFF) | (sp & 0xFFFF) } else { sp & mask };
    }

    /// MOV or POP to a segment register other than CS, the interrupt shadow of SS included.
    pub fn set_seg(&mut self, seg: SegReg, selector: u16) -> Result<(), Fault> {
        segment::load(self, seg, selector)?;
        if seg == SegReg::Ss {
            self.cpu.shadow = crate::state::Shadow::MovSs;
        }
        Ok(())
    }

    /// Whether the current privilege may use `size` ports from `port` (SDM 1, 19.5).
    pub fn check_io(&mut self, port: u16, size: usize) -> Result<(), Fault> {
        let cpu = &self.cpu;
        if !cpu.protected() || (!cpu.v8086() && cpu.cpl <= cpu.iopl()) {
            return Ok(());
        }
        let tr = cpu.tr;
        let kind = tr.attributes & 0xF;
        if !tr.present() || !matches!(kind, 9 | 11) || tr.limit < 103 {
            return Err(Fault::GP0);
        }
        let map = self.sys_load(tr.base.wrapping_add(102), 2)?;
        let first = map + u64::from(port / 8);
        if first + 1 > u64::from(tr.limit) {
            return Err(Fault::GP0);
        }
        let bits = self.sys_load(tr.base.wrapping_add(first), 2)? >> (port % 8);
        if bits & ((1 << size) - 1) != 0 {
            return Err(Fault::GP0);
        }
        Ok(())
    }

    // ---- by linear address ----------------------------------------------------------------------------

    /// Loads on the processor's own behalf (descriptor tables, TSS).
    pub fn sys_load(&mut self, lin: u64, size: usize) -> Result<u64, Fault> {
        self.load_linear(self.wrap(lin), size, Privilege::Implicit)
    }

    /// Stores on the processor's own behalf.
    pub fn sys_store(&mut self, lin: u64, size: usize, value: u64) -> Result<(), Fault> {
        self.store_linear(self.wrap(lin), size, value, Privilege::Implicit)
    }

    /// Locked read-modify-write on the processor's own behalf (descriptors' accessed and busy bits).
    pub fn sys_update(&mut self, lin: u64, size: usize, f: &mut dyn FnMut(u64) -> u64) -> Result<u64, Fault> {
        self.rmw_linear(self.wrap(lin), size, Privilege::Implicit, true, f)
    }

    /// Faults as [`Self::sys_load`] or [`Self::sys_store`] of `len` bytes would.
    pub fn sys_probe(&mut self, lin: u64, len: usize, access: Access) -> Result<(), Fault> {
        self.pieces(self.wrap(lin), len, access, Privilege::Implicit).map(|_| ())
    }

    /// Linear addresses have 32 bits outside long mode.
    fn wrap(&self, lin: u64) -> LinAddr {
        LinAddr(if self.cpu.long_mode() { lin } else { lin & 0xFFFF_FFFF })
    }

    /// Loads 1, 2, 4 or 8 bytes at a linear address.
    #[inline]
    pub fn load_linear(&mut self, lin: LinAddr, size: usize, privilege: Privilege) -> Result<u64, Fault> {
        let in_page = lin.0 & (PAGE_SIZE - 1);
        if in_page + size as u64 <= PAGE_SIZE {
            let entry = self.tlb.lookup(self.cpu, self.mem, lin, Access::Read, privilege)?;
            self.observe(lin, &entry, size, false);
            return Ok(match entry.ram(in_page) {
                Some(at) => self.mem.ram_load(at, size),
                None => self.mmio_load(entry.phys(in_page), size),
            });
        }
        let mut buf = [0; 8];
        self.load_bytes_linear(lin, &mut buf[..size], privilege)?;
        Ok(u64::from_le_bytes(buf))
    }

    /// Stores 1, 2, 4 or 8 bytes at a linear address.
    #[inline]
    pub fn store_linear(
        &mut self,
        lin: LinAddr,
        size: usize,
        value: u64,
        privilege: Privilege,
    ) -> Result<(), Fault> {
        let in_page = lin.0 & (PAGE_SIZE - 1);
        if in_page + size as u64 <= PAGE_SIZE {
            let entry = self.tlb.lookup(self.cpu, self.mem, lin, Access::Write, privilege)?;
            self.observe(lin, &entry, size, true);
            match entry.ram(in_page) {
                Some(at) => {
                    self.mem.ram_store(at, size, value);
                    self.mem.wrote(at, size as u64);
                }
                None => self.mmio_store(entry.phys(in_page), &value.to_le_bytes()[..size]),
            }
            return Ok(());
        }
        self.store_bytes_linear(lin, &value.to_le_bytes()[..size], privilege)
    }

    /// Splits an access of at most a page into its in-page parts, all of them translated.
    fn pieces(
        &mut self,
        lin: LinAddr,
        len: usize,
        access: Access,
        privilege: Privilege,
    ) -> Result<[Option<Piece>; 2], Fault> {
        let in_page = lin.0 & (PAGE_SIZE - 1);
        let first = len.min((PAGE_SIZE - in_page) as usize);
        let entry = self.tlb.lookup(self.cpu, self.mem, lin, access, privilege)?;
        let mut pieces = [Some(Piece { entry, in_page, len: first }), None];
        if first < len {
            let next = self.wrap(lin.0.wrapping_add(first as u64));
            let entry = self.tlb.lookup(self.cpu, self.mem, next, access, privilege)?;
            pieces[1] = Some(Piece { entry, in_page: 0, len: (len - first).min(PAGE_SIZE as usize) });
        }
        Ok(pieces)
    }

    /// Loads bytes at a linear address.
    pub fn load_bytes_linear(
        &mut self,
        mut lin: LinAddr,
        mut buf: &mut [u8],
        privilege: Privilege,
    ) -> Result<(), Fault> {
        for p in self.pieces(lin, buf.len(), Access::Read, privilege)?.into_iter().flatten() {
            let (now, rest) = buf.split_at_mut(p.len);
            self.observe(lin, &p.entry, p.len, false);
            lin = self.wrap(lin.0.wrapping_add(p.len as u64));
            match p.entry.ram(p.in_page) {
                Some(at) => self.mem.ram_read(at, now),
                None => self.mmio_load_bytes(p.entry.phys(p.in_page), now),
            }
            buf = rest;
        }
        Ok(())
    }

    /// Stores bytes at a linear address.
    pub fn store_bytes_linear(
        &mut self,
        mut lin: LinAddr,
        mut buf: &[u8],
        privilege: Privilege,
    ) -> Result<(), Fault> {
        for p in self.pieces(lin, buf.len(), Access::Write, privilege)?.into_iter().flatten() {
            let (now, rest) = buf.split_at(p.len);
            self.observe(lin, &p.entry, p.len, true);
            lin = self.wrap(lin.0.wrapping_add(p.len as u64));
            match p.entry.ram(p.in_page) {
                Some(at) => {
                    self.mem.ram_write(at, now);
                    self.mem.wrote(at, now.len() as u64);
                }
                None => self.mmio_store(p.entry.phys(p.in_page), now),
            }
            buf = rest;
        }
        Ok(())
    }

    // ---- the bus --------------------------------------------------------------------------------------

    #[cold]
    fn mmio_load(&mut self, at: PhysAddr, size: usize) -> u64 {
        let mut buf = [0; 8];
        self.mmio_load_bytes(at, &mut buf[..size]);
        u64::from_le_bytes(buf)
    }

    fn mmio_load_bytes(&mut self, mut at: PhysAddr, mut buf: &mut [u8]) {
        while !buf.is_empty() {
            let width = natural(at, buf.len());
            let n = width.bytes();
            let value = self.bus.mmio_load(self.vp, at, width);
            buf[..n].copy_from_slice(&value.to_le_bytes()[..n]);
            at.0 += n as u64;
            buf = &mut buf[n..];
        }
    }

    #[cold]
    fn mmio_store(&mut self, mut at: PhysAddr, mut buf: &[u8]) {
        if matches!(self.mem.resolve(at.page()), Mapped::Rom(_)) {
            return;
        }
        while !buf.is_empty() {
            let width = natural(at, buf.len());
            let n = width.bytes();
            let mut value = [0; 8];
            value[..n].copy_from_slice(&buf[..n]);
            self.bus.mmio_store(self.vp, at, width, u64::from_le_bytes(value));
            at.0 += n as u64;
            buf = &buf[n..];
        }
    }
}

/// The widest naturally aligned access at `at` of at most `len` bytes.
fn natural(at: PhysAddr, len: usize) -> Width {
    [Width::W64, Width::W32, Width::W16]
        .into_iter()
        .find(|w| w.bytes() <= len && at.0.is_multiple_of(w.bytes() as u64))
        .unwrap_or(Width::W8)
}

/// A stack that is being built in another segment or privilege than the current one: interrupt frames, call gates.
pub(crate) struct Frame {
    pub ss: Segment,
    pub sp: u64,
    /// 64-bit frames ignore the segment.
    pub wide: bool,
    pub privilege: Privilege,
    /// The fault of a limit violation.
    pub fault: Fault,
}

impl Frame {
    /// Pushes one value; `self.sp` moves only if it succeeds.
    pub fn push(&mut self, ex: &mut Exec<'_>, size: usize, value: u64) -> Result<(), Fault> {
        let mask = if self.wide { u64::MAX } else { segment::stack_mask(&self.ss) };
        let sp = (self.sp & !mask) | (self.sp.wrapping_sub(size as u64) & mask);
        let lin = self.linear(ex, sp & mask, size, true)?;
        ex.store_linear(lin, size, value, self.privilege)?;
        self.sp = sp;
        Ok(())
    }

    /// Pops one value.
    pub fn pop(&mut self, ex: &mut Exec<'_>, size: usize) -> Result<u64, Fault> {
        let mask = if self.wide { u64::MAX } else { segment::stack_mask(&self.ss) };
        let lin = self.linear(ex, self.sp & mask, size, false)?;
        let value = ex.load_linear(lin, size, self.privilege)?;
        self.sp = (self.sp & !mask) | (self.sp.wrapping_add(size as u64) & mask);
        Ok(value)
    }

    fn linear(&self, ex: &Exec<'_>, sp: u64, size: usize, write: bool) -> Result<LinAddr, Fault> {
        if self.wide {
            return segment::canonical_range(sp, size as u64).map_err(|()| self.fault);
        }
        segment::in_limits(&self.ss, sp, size as u64, write, ex.cpu.protected()).map_err(|()| self.fault)?;
        Ok(LinAddr(self.ss.base.wrapping_add(sp) & 0xFFFF_FFFF))
    }

    /// The current stack.
    pub fn current(ex: &Exec<'_>, fault: Fault) -> Frame {
        Frame {
            ss: *ex.cpu.segment(SegReg::Ss),
            sp: ex.cpu.gpr[gpr::RSP],
            wide: ex.cpu.code64(),
            privilege: ex.privilege(),
            fault,
        }
    }
}

//! The native oracle: user-mode code run by the host CPU itself, with every register given and returned.
//!
//! The code lies at a fixed linear address in a page of INT3, its operands in an arena at another; both are mapped
//! at just these addresses in this process, with guard pages around the arena, so that the same code sees the same
//! addresses in an engine. Control comes back by an exception, the INT3 behind the code at the latest; or, where the caller
//! says that this INT3 is where the code will arrive, by a jump in its place, which is the faster way ([`super::gate`]).
//!
//! 32-bit code runs in compatibility mode, through the flat code segment that Linux keeps in every GDT; 16-bit code through
//! segments in this process's LDT, with a 16-bit stack (the kernel brings back all of ESP: espfix64).
//!
//! Invariants the `unsafe` code relies on: both mappings are ours alone and live as long as [`Native`]. The code itself is
//! the caller's responsibility ([`Native::run`] is unsafe): it must not enter the kernel, change FS or GS, or reach memory
//! of this process outside the arena.

use super::area::memfd;
use super::gate::{End, Gate, Start, USER_CS, USER_DS};
use super::ldt::{self, Content};
use super::mapping::Mapping;
use crate::signal::{self, SignalStack};
use paravane_cpu::FpuState;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// Linux's selector of 32-bit user code.
const USER32_CS: u16 = 0x23;

const PAGE: u64 = 4096;

/// In 16-bit mode: what DS, ES and SS show below the arena, and how far they reach. CS starts at the code page.
pub const DATA_BASE_16: u64 = 0x2000;
/// Their limit, behind the arena of three pages and what is unmapped there.
pub const DATA_LIMIT_16: u16 = 0x7FFF;
/// The limit of CS.
pub const CODE_LIMIT_16: u16 = 0xFFFF;
/// Selectors of CS and of DS, ES and SS.
pub const SELECTORS_16: (u16, u16) = (0x7, 0xF);

/// Where the jump to the code under test lies in its page.
const PROLOGUE: usize = 0x20;
/// Where code under test may lie, as offsets in its page. Behind it are the stubs that exits jump to.
pub const CODE_ROOM: Range<usize> = 0x40..0xF00;
const STUB: usize = 0x40;
/// Exits of one run.
const EXITS: usize = 2;
/// The longest jump to a stub.
const JUMP: usize = 8;

/// Where code and operands lie. Page-aligned, below 2 GiB, apart from each other by more than a page.
#[derive(Clone, Copy, Debug)]
pub struct NativeLayout {
    /// Linear address of the code page.
    pub code: u64,
    /// Linear address of the arena.
    pub data: u64,
    /// Pages of the arena that may be read and written.
    pub writable_pages: u64,
    /// Pages behind these that may only be read.
    pub read_only_pages: u64,
}

impl NativeLayout {
    /// Bytes of the arena.
    pub fn data_len(&self) -> u64 {
        (self.writable_pages + self.read_only_pages) * PAGE
    }
}

/// In which mode the code runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NativeMode {
    /// 64-bit mode.
    Long,
    /// Compatibility mode with a 32-bit code segment.
    Protected32,
    /// Compatibility mode with 16-bit code, data and stack segments.
    Protected16,
}

impl NativeMode {
    /// 64, 32 or 16.
    pub fn bits(self) -> u32 {
        match self {
            NativeMode::Long => 64,
            NativeMode::Protected32 => 32,
            NativeMode::Protected16 => 16,
        }
    }

    /// `layout` as the code addresses it: offsets into its segments.
    pub fn seen(self, layout: NativeLayout) -> NativeLayout {
        match self {
            NativeMode::Protected16 => NativeLayout { code: 0, data: DATA_BASE_16, ..layout },
            _ => layout,
        }
    }
}

/// Registers before and after.
#[derive(Clone, PartialEq, Debug)]
pub struct NativeState {
    /// By encoding number; RSP may hold anything.
    pub gpr: [u64; 16],
    /// Status flags, DF, NT, AC and ID are loaded; all of RFLAGS is returned.
    pub rflags: u64,
    /// x87, SSE and AVX state.
    pub fpu: FpuState,
}

/// The exception that ended a run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NativeStop {
    /// Its vector.
    pub vector: u8,
    /// Its error code; zero for exceptions that have none.
    pub error_code: u32,
    /// CR2, for page faults: linear.
    pub address: u64,
    /// RIP as the exception pushes it: an offset into CS.
    pub rip: u64,
}

/// Code and arena at fixed addresses, and the way in and out.
pub struct Native {
    layout: NativeLayout,
    /// The code page and the arena as one sees them from Rust, writable.
    code: Mapping,
    data: Mapping,
    _executable: Mapping,
    arena: Mapping,
    _stack: SignalStack,
    gate: Gate,
    /// What of the code page is not INT3.
    used: Range<usize>,
    has_ldt: bool,
}

impl Native {
    /// Maps code and arena. Fails where these addresses are taken.
    pub fn new(layout: NativeLayout) -> io::Result<Native> {
        signal::install();
        let read = libc::PROT_READ;
        let write = libc::PROT_READ | libc::PROT_WRITE;
        let code_file = memfd()?;
        code_file.set_len(PAGE)?;
        let data_file = memfd()?;
        data_file.set_len(layout.data_len())?;
        let code = Mapping::anywhere(code_file.as_raw_fd(), PAGE, write)?;
        let executable = Mapping::fixed(code_file.as_raw_fd(), layout.code, PAGE, read | libc::PROT_EXEC)?;
        let data = Mapping::anywhere(data_file.as_raw_fd(), layout.data_len(), write)?;
        let guarded = layout.data_len() + 2 * PAGE;
        let arena = Mapping::reserve(layout.data - PAGE, guarded)?;
        arena.show(data_file.as_raw_fd(), PAGE, layout.data_len(), read)?;
        arena.show(data_file.as_raw_fd(), PAGE, layout.writable_pages * PAGE, write)?;
        let stack = SignalStack::new()?;
        let mut native = Native {
            layout,
            code,
            data,
            _executable: executable,
            arena,
            _stack: stack,
            gate: Gate::new(),
            used: 0..0,
            has_ldt: false,
        };
        native.code_page_mut().fill(0xCC);
        for number in 0..EXITS {
            let stub = native.gate.stub(number as u8);
            let at = CODE_ROOM.end + number * STUB;
            native.code_page_mut()[at..at + STUB][..stub.len()].copy_from_slice(&stub);
        }
        Ok(native)
    }

    /// Makes the segments that 16-bit code needs. The error tells that this host does not allow them.
    pub fn allow_sixteen_bits(&mut self) -> io::Result<()> {
        let code = ldt::set_sixteen_bit(0, Content::Code, self.layout.code as u32, CODE_LIMIT_16)?;
        let base = (self.layout.data - DATA_BASE_16) as u32;
        let data = ldt::set_sixteen_bit(1, Content::Data, base, DATA_LIMIT_16)?;
        assert_eq!((code, data), SELECTORS_16, "selectors follow from the entries");
        self.has_ldt = true;
        Ok(())
    }

    /// Where things lie.
    pub fn layout(&self) -> NativeLayout {
        self.layout
    }

    /// Makes the read-only pages of the arena writable, or read-only again.
    pub fn protect(&mut self, writable: bool) -> io::Result<()> {
        let protection = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let (skipped, length) = (self.layout.writable_pages * PAGE, self.layout.read_only_pages * PAGE);
        self.arena.protect(PAGE + skipped, length, protection)
    }

    /// The arena's bytes, read-only pages included.
    pub fn arena(&mut self) -> &mut [u8] {
        // SAFETY: our own mapping of the arena's file; code under test runs only inside `run`, which borrows all.
        unsafe { std::slice::from_raw_parts_mut(self.data.start.cast(), self.data.length) }
    }

    /// The same, to look at.
    pub fn arena_bytes(&self) -> &[u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.data.start.cast(), self.data.length) }
    }

    /// Puts `code` at `offset` in a page of INT3. Both must lie in [`CODE_ROOM`].
    pub fn set_code(&mut self, offset: usize, code: &[u8]) {
        let end = offset + code.len();
        assert!(offset >= CODE_ROOM.start && end <= CODE_ROOM.end, "code outside its page");
        let used = std::mem::replace(&mut self.used, offset..end);
        let page = self.code_page_mut();
        page[used].fill(0xCC);
        page[offset..end].copy_from_slice(code);
    }

    fn code_page_mut(&mut self) -> &mut [u8] {
        // SAFETY: our own writable mapping of the code page, borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.code.start.cast::<u8>(), self.code.length) }
    }

    /// The code page as it was last executed.
    pub fn code_page(&self) -> &[u8] {
        // SAFETY: our own mapping; only `set_code` and `run` write to it, which borrow it exclusively.
        unsafe { std::slice::from_raw_parts(self.code.start.cast(), self.code.length) }
    }

    /// Runs what [`Self::set_code`] put at `offset` until an exception, and returns it.
    ///
    /// `exits` are offsets of INT3s to which the code is expected to come: there a jump takes its place and nothing else
    /// changes, except that code which reads its own page would see it. Where there is no room it remains an INT3.
    ///
    /// # Safety
    ///
    /// The code must not enter the kernel otherwise, must not change FS or GS, must not run forever, and with
    /// these registers must not reach memory of this process outside the arena.
    pub unsafe fn run(
        &mut self,
        mode: NativeMode,
        offset: usize,
        exits: &[usize],
        state: &mut NativeState,
    ) -> NativeStop {
        assert!(mode != NativeMode::Protected16 || self.has_ldt, "16-bit code needs its segments");
        let start = Start {
            rip: self.prologue(mode, offset, state.gpr[4]),
            cs: match mode {
                NativeMode::Long => 0,
                NativeMode::Protected32 => USER32_CS,
                NativeMode::Protected16 => SELECTORS_16.0,
            },
            data: if mode == NativeMode::Protected16 { SELECTORS_16.1 } else { USER_DS },
        };
        super::vector::loadable(&mut state.fpu);
        let open = self.has_room(exits);
        if open {
            self.open(mode, exits);
        }
        // SAFETY: the caller vouches for the code; the jumps of exits lead to the gate's own stubs.
        let end = unsafe { self.gate.pass(start, state) };
        if open {
            self.close(exits);
        }
        if mode != NativeMode::Long {
            // What the kernel or a mode switch leaves in the upper halves is not the code's.
            state.gpr.iter_mut().for_each(|register| *register &= 0xFFFF_FFFF);
        }
        // Addresses of ours, and which components happen to have their initial values.
        state.fpu.0[6..24].fill(0);
        state.fpu.0[512..576].fill(0);
        match end {
            End::Stop(stop) => stop,
            End::Exit(number) => {
                // To a stub that is no exit now the code went by itself.
                let at = exits.get(number).copied().unwrap_or(CODE_ROOM.end + number * STUB);
                let rip = mode.seen(self.layout).code + at as u64 + 1;
                NativeStop { vector: 3, rip, ..NativeStop::default() }
            }
        }
    }

    /// Whether all of `exits` can become jumps.
    fn has_room(&self, exits: &[usize]) -> bool {
        let page = self.code_page();
        let idle = |&at: &usize| {
            CODE_ROOM.contains(&at)
                && at + JUMP <= CODE_ROOM.end
                && page[at..at + JUMP].iter().all(|&byte| byte == 0xCC)
        };
        let apart = exits.windows(2).all(|pair| pair[0].abs_diff(pair[1]) >= JUMP);
        exits.len() <= EXITS && apart && exits.iter().all(idle)
    }

    fn open(&mut self, mode: NativeMode, exits: &[usize]) {
        for (number, &at) in exits.iter().enumerate() {
            let stub = CODE_ROOM.end + number * STUB;
            let linear = self.layout.code as u32 + stub as u32;
            let slot = &mut self.code_page_mut()[at..at + JUMP];
            // JMP rel32, or a far JMP to 64-bit code.
            let opcode: &[u8] = match mode {
                NativeMode::Long => &[0xE9],
                NativeMode::Protected32 => &[0xEA],
                NativeMode::Protected16 => &[0x66, 0xEA],
            };
            let (prefix, rest) = slot.split_at_mut(opcode.len());
            prefix.copy_from_slice(opcode);
            if mode == NativeMode::Long {
                rest[..4].copy_from_slice(&(stub as u32).wrapping_sub(at as u32 + 5).to_le_bytes());
            } else {
                rest[..4].copy_from_slice(&linear.to_le_bytes());
                rest[4..6].copy_from_slice(&USER_CS.to_le_bytes());
            }
        }
    }

    fn close(&mut self, exits: &[usize]) {
        for &at in exits {
            self.code_page_mut()[at..at + JUMP].fill(0xCC);
        }
    }

    /// Writes `mov rsp, value` and a jump to the code at `offset`, and returns where CS has it.
    fn prologue(&mut self, mode: NativeMode, offset: usize, value: u64) -> u64 {
        let (opcode, width, displacement): (&[u8], usize, usize) = match mode {
            NativeMode::Long => (&[0x48, 0xBC], 8, 4),
            NativeMode::Protected32 => (&[0xBC], 4, 4),
            NativeMode::Protected16 => (&[0x66, 0xBC], 4, 2),
        };
        let jump = opcode.len() + width;
        let distance = (offset - (PROLOGUE + jump + 1 + displacement)) as u32;
        let code = &mut self.code_page_mut()[PROLOGUE..];
        code[..opcode.len()].copy_from_slice(opcode);
        code[opcode.len()..jump].copy_from_slice(&value.to_le_bytes()[..width]);
        code[jump] = 0xE9;
        code[jump + 1..][..displacement].copy_from_slice(&distance.to_le_bytes()[..displacement]);
        mode.seen(self.layout).code + PROLOGUE as u64
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        if self.has_ldt {
            // Nothing uses the segments any more; if they stayed, the next user would overwrite them.
            ldt::clear(0).and_then(|()| ldt::clear(1)).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use paravane_cpu::flags;

    fn native(slot: u64) -> Native {
        let base = 0x6000_0000 + 0x100_0000 * slot;
        let layout =
            NativeLayout { code: base, data: base + 0x10_0000, writable_pages: 2, read_only_pages: 1 };
        Native::new(layout).unwrap()
    }

    fn state() -> NativeState {
        let gpr = std::array::from_fn(|n| 0x1111_1111_1111_1111 * n as u64);
        NativeState { gpr, rflags: flags::FIXED, fpu: FpuState::initial() }
    }

    /// Runs `code` to the INT3 behind it and to a jump there, which must not make a difference.
    fn run(native: &mut Native, mode: NativeMode, code: &[u8], state: &mut NativeState) -> NativeStop {
        native.set_code(64, code);
        let arena = native.arena().to_vec();
        let mut other = state.clone();
        // SAFETY: the tests' code computes, touches the arena and guard pages, and ends.
        let stop = unsafe { native.run(mode, 64, &[], &mut other) };
        let after = native.arena().to_vec();
        native.arena().copy_from_slice(&arena);
        // SAFETY: likewise.
        let jumped = unsafe { native.run(mode, 64, &[64 + code.len(), 0x200], state) };
        assert_eq!((jumped, &*state), (stop, &other), "{code:x?}");
        assert_eq!(native.arena(), after, "{code:x?}");
        stop
    }

    #[test]
    fn exits_are_told_apart_and_leave_nothing_behind() {
        let mut n = native(5);
        n.set_code(64, &[0xEB, 0x0E]); // jmp +14
        let page = n.code_page().to_vec();
        let at = |exits: &[usize], n: &mut Native| {
            let mut s = state();
            s.rflags |= flags::DF | flags::CF;
            // SAFETY: one jump, inside the page.
            let stop = unsafe { n.run(NativeMode::Long, 64, exits, &mut s) };
            assert_eq!((s.gpr, s.rflags & (flags::DF | flags::STATUS)), (state().gpr, flags::DF | flags::CF));
            assert_eq!(n.code_page()[CODE_ROOM], page[CODE_ROOM]);
            (stop.vector, stop.rip - n.layout().code)
        };
        for exits in [&[66, 80][..], &[80, 66], &[80], &[66], &[], &[79, 80], &[65, 80]] {
            assert_eq!(at(exits, &mut n), (3, 81), "{exits:?}");
        }
    }

    #[test]
    fn all_registers_go_in_and_out() {
        let mut n = native(0);
        let mut s = state();
        let stop = run(&mut n, NativeMode::Long, &[0x4C, 0x01, 0xFC], &mut s); // add rsp, r15
        assert_eq!(stop, NativeStop { vector: 3, rip: n.layout().code + 64 + 4, ..Default::default() });
        let mut expected = state().gpr;
        expected[4] = expected[4].wrapping_add(expected[15]);
        assert_eq!(s.gpr, expected);
        // 0x44… + 0xFF…: carry, sign clear (0x4444444444444443), odd low-byte parity.
        assert_eq!(s.rflags & flags::STATUS, flags::CF | flags::AF);
    }

    #[test]
    fn the_arena_is_read_written_and_guarded() {
        let mut n = native(1);
        let data = n.layout().data;
        n.arena()[8..16].copy_from_slice(&5u64.to_le_bytes());
        let mut s = state();
        s.gpr[3] = data;
        let stop = run(&mut n, NativeMode::Long, &[0x48, 0xFF, 0x43, 0x08], &mut s); // inc qword [rbx+8]
        assert_eq!((stop.vector, n.arena()[8]), (3, 6));
        s.gpr[3] = data + 2 * PAGE; // read-only
        let stop = run(&mut n, NativeMode::Long, &[0x48, 0xFF, 0x03], &mut s);
        let here = n.layout().code + 64;
        assert_eq!(stop, NativeStop { vector: 14, error_code: 7, address: data + 2 * PAGE, rip: here });
        s.gpr[3] = data - 8;
        let stop = run(&mut n, NativeMode::Long, &[0x48, 0xFF, 0x03], &mut s);
        assert_eq!((stop.vector, stop.error_code & !2, stop.address), (14, 4, data - 8));
        s.gpr[3] = 1 << 63;
        let stop = run(&mut n, NativeMode::Long, &[0x48, 0xFF, 0x03], &mut s);
        assert_eq!((stop.vector, stop.error_code), (13, 0));
    }

    #[test]
    fn floating_point_state_goes_in_and_out() {
        let mut n = native(2);
        let mut s = state();
        s.fpu.0[160] = 9;
        let code = [0xD9, 0xEB, 0x66, 0x0F, 0x6F, 0xC8]; // fldpi; movdqa xmm1, xmm0
        assert_eq!(run(&mut n, NativeMode::Long, &code, &mut s).vector, 3);
        assert_eq!((s.fpu.0[32], s.fpu.0[176]), (0x35, 9));
        s.fpu.set_mxcsr(0);
        let stop = run(&mut n, NativeMode::Long, &[0x0F, 0x5E, 0xC9], &mut s); // divps xmm1, xmm1: 0/0
        assert_eq!((stop.vector, s.fpu.mxcsr() & 0x3F), (19, 3));
    }

    #[test]
    fn thirty_two_bit_code_runs_in_compatibility_mode() {
        let mut n = native(3);
        let mut s = state();
        s.gpr = [0; 16];
        s.gpr[4] = n.layout().data + 64;
        s.gpr[0] = 0x19;
        let code = [0x40, 0x50, 0x27]; // inc eax; push eax; daa
        let stop = run(&mut n, NativeMode::Protected32, &code, &mut s);
        assert_eq!((stop.vector, stop.rip), (3, n.layout().code + 64 + 4));
        assert_eq!((s.gpr[0] & 0xFFFF_FFFF, s.gpr[4] & 0xFFFF_FFFF), (0x20, n.layout().data + 60));
        assert_eq!(n.arena()[60..64], [0x1A, 0, 0, 0]);
    }

    #[test]
    fn sixteen_bit_code_runs_in_segments_of_the_ldt() {
        let mut n = native(4);
        if let Err(error) = n.allow_sixteen_bits() {
            println!("NOT RUN: this host refuses modify_ldt: {error}");
            return;
        }
        let mut s = state();
        s.gpr = [0; 16];
        s.gpr[0] = 0x1234_5678;
        s.gpr[3] = DATA_BASE_16 + 8;
        // The upper half of ESP is garbage that a 16-bit stack does not look at.
        s.gpr[4] = 0xABCD_0000 | (DATA_BASE_16 + 64);
        // push ax; mov [bx], eax; push cs; push ss; add sp, bx
        let code = [0x50, 0x66, 0x89, 0x07, 0x0E, 0x16, 0x01, 0xDC];
        let stop = run(&mut n, NativeMode::Protected16, &code, &mut s);
        assert_eq!((stop.vector, stop.rip), (3, 64 + 9));
        assert_eq!(n.arena()[8..12], [0x78, 0x56, 0x34, 0x12]);
        assert_eq!(n.arena()[58..64], [0xF, 0, 0x7, 0, 0x78, 0x56]);
        assert_eq!(s.gpr[4], 0xABCD_0000 | (2 * DATA_BASE_16 + 64 - 6 + 8));
        // Beyond the limit: #GP through DS, #SS through the stack.
        s.gpr[3] = u64::from(DATA_LIMIT_16);
        let stop = run(&mut n, NativeMode::Protected16, &[0x89, 0x07], &mut s);
        assert_eq!((stop.vector, stop.error_code), (13, 0));
        s.gpr[4] = 0x9000;
        let stop = run(&mut n, NativeMode::Protected16, &[0x50], &mut s);
        assert_eq!((stop.vector, stop.error_code), (12, 0));
        // A page fault reports the linear address.
        s.gpr[3] = DATA_BASE_16 - 8;
        let stop = run(&mut n, NativeMode::Protected16, &[0x8B, 0x07], &mut s);
        assert_eq!((stop.vector, stop.address), (14, n.layout().data - 8));
    }
}

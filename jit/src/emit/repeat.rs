//! REP STOS and REP MOVS by the host's own (SDM vol. 1, 7.3.9).

use super::string::Index;
use super::{Emitter, Pos, Site, Target, Unfit, load};
use crate::block::Mode;
use crate::context::ctx;
use crate::regs::R10;
use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Instruction, Mnemonic as M, Register};

const RCX: u8 = 1;
const RSI: u8 = 6;
const RDI: u8 = 7;

/// Where the count of a turn is kept.
const COUNT: i32 = ctx!(flags_image);

/// Where the value is kept that host register `r` has after a turn: in the area where exits put registers.
fn after(r: u8) -> i32 {
    ctx!(spill) + i32::from(r) * 8
}

impl Emitter {
    /// REP STOS and REP MOVS: the host's own on host addresses, from page to page: each turn does what source and destination have
    /// up to the end of their pages. An element on two pages is the interpreter's.
    pub(super) fn repeated(
        &mut self,
        instr: &Instruction,
        size: u32,
        site: Site,
        (rsi, rdi): (Option<Index>, Option<Index>),
    ) -> Result<(), Unfit> {
        let moves = match instr.mnemonic() {
            M::Stosb | M::Stosw | M::Stosd | M::Stosq => false,
            M::Movsb | M::Movsw | M::Movsd | M::Movsq => true,
            _ => return Err(Unfit),
        };
        let Some(rdi) = rdi else { return Err(Unfit) };
        if !self.is_linear(rdi) || rsi.is_some_and(|i| !self.is_linear(i)) {
            return self.repeated_in_segments(rsi, rdi, size, site);
        }
        let registers: &[u8] = if moves { &[RDI, RSI] } else { &[RDI] };
        // Nothing at all happens for a count of zero.
        let turn = self.hot_here();
        let done = self.jump_if_zero(rdi.width);
        let keep = Self::keep(site.before);
        Self::save(&mut self.hot, keep, true);
        let slow = self.cold_here();
        Self::restore(&mut self.cold, keep, true);
        self.cold_interpret(self.rip);
        self.elements_on_pages(registers, size, slow);
        dynasm!(self.hot ; .arch x64 ; mov [rsp + COUNT], r10);
        Self::restore(&mut self.hot, keep, true);
        if moves {
            self.by_table(|e| e.access(RSI, 1, false, site.before));
            dynasm!(self.hot ; .arch x64 ; mov r10b, [r11] ; mov [rsp + ctx!(tmp)], r11);
        }
        self.by_table(|e| e.access(RDI, 1, true, site.before));
        // The host's own must not fault, and does not on pages in tables. The probes fault, if anything does (a non-canonical address), while all registers are the guest's.
        dynasm!(self.hot ; .arch x64 ; mov r10b, [r11]);
        self.next_turn(registers, size);
        dynasm!(self.hot ; .arch x64 ; mov rdi, r11 ; mov rcx, [rsp + COUNT]);
        if moves {
            dynasm!(self.hot ; .arch x64 ; mov rsi, [rsp + ctx!(tmp)]);
        }
        let down = self.mode.has(Mode::DOWN);
        if down {
            dynasm!(self.hot ; .arch x64 ; std);
        }
        self.host_repeat(moves, size)?;
        if down {
            dynasm!(self.hot ; .arch x64 ; cld);
        }
        for &r in registers {
            let at = after(r);
            dynasm!(self.hot ; .arch x64 ; mov Rq(r), [rsp + at]);
        }
        let at = after(RCX);
        dynasm!(self.hot ; .arch x64 ; mov rcx, [rsp + at]);
        let ended = self.jump_if_zero(rdi.width);
        self.poll_repeated();
        self.hot.push(0xE9);
        self.hot_rel32(Target::Here(turn));
        let end = self.hot_here();
        self.fixups.extend([done, ended].map(|site| (site, Target::Here(end))));
        Ok(())
    }

    /// In r10 how many elements, at most RCX, lie on the pages that `registers` point to; leaves for `slow` where the first
    /// lies on two. Flags are saved.
    fn elements_on_pages(&mut self, registers: &[u8], size: u32, slow: Pos) {
        let shift = size.trailing_zeros() as i8;
        if self.code64 {
            dynasm!(self.hot ; .arch x64 ; mov r10, rcx);
        } else {
            dynasm!(self.hot ; .arch x64 ; mov r10d, ecx);
        }
        for &r in registers {
            if self.mode.has(Mode::DOWN) {
                let last = 4096 - size as i32;
                dynasm!(self.hot ; .arch x64 ; mov r11d, Rd(r) ; and r11d, 0xFFF ; cmp r11d, last);
                self.hot_jcc(7, slow);
                dynasm!(self.hot ; .arch x64 ; shr r11d, shift ; inc r11d);
            } else {
                dynasm!(self.hot ; .arch x64 ; mov r11d, Rd(r) ; or r11d, !0xFFF ; neg r11d ; shr r11d, shift);
                self.hot_jcc(4, slow);
            }
            dynasm!(self.hot ; .arch x64 ; cmp r11, r10 ; cmovb r10, r11);
        }
    }

    /// Puts what RCX and `registers` are after this turn into the context. Uses r10; keeps flags.
    fn next_turn(&mut self, registers: &[u8], size: u32) {
        let down = self.mode.has(Mode::DOWN);
        for &r in registers {
            dynasm!(self.hot ; .arch x64 ; mov r10, [rsp + COUNT]);
            if down {
                dynasm!(self.hot ; .arch x64 ; not r10 ; lea r10, [r10 + 1]);
            }
            self.lea(R10, Some(r), Some(R10), size, 0, !self.code64);
            let at = after(r);
            dynasm!(self.hot ; .arch x64 ; mov [rsp + at], r10);
        }
        let at = after(RCX);
        dynasm!(self.hot ; .arch x64 ; mov r10, [rsp + COUNT] ; not r10);
        if self.code64 {
            dynasm!(self.hot ; .arch x64 ; lea r10, [rcx + r10 + 1]);
        } else {
            dynasm!(self.hot ; .arch x64 ; lea r10d, [rcx + r10 + 1]);
        }
        dynasm!(self.hot ; .arch x64 ; mov [rsp + at], r10);
    }

    /// Between two turns: if something wants attention the interpreter goes on, which knows how a repetition is interrupted. Keeps
    /// flags.
    fn poll_repeated(&mut self) {
        load(&mut self.hot, R10, ctx!(attention));
        dynasm!(self.hot ; .arch x64 ; mov ecx, [r10]);
        let quiet = self.jump_if_zero(8);
        let at = after(RCX);
        dynasm!(self.hot ; .arch x64 ; mov rcx, [rsp + at]);
        let cold = self.cold_here();
        self.cold_interpret(self.rip);
        self.hot.push(0xE9);
        self.hot_rel32(Target::Here(cold));
        let here = self.hot_here();
        self.fixups.push((quiet, Target::Here(here)));
        dynasm!(self.hot ; .arch x64 ; mov rcx, [rsp + at]);
    }

    /// The host's instruction.
    fn host_repeat(&mut self, moves: bool, size: u32) -> Result<(), Unfit> {
        let mut host = match (moves, size) {
            (false, 1) => Instruction::with_rep_stosb(64),
            (false, 2) => Instruction::with_rep_stosw(64),
            (false, 4) => Instruction::with_rep_stosd(64),
            (false, _) => Instruction::with_rep_stosq(64),
            (true, 1) => Instruction::with_rep_movsb(64),
            (true, 2) => Instruction::with_rep_movsw(64),
            (true, 4) => Instruction::with_rep_movsd(64),
            (true, _) => Instruction::with_rep_movsq(64),
        }
        .map_err(|_| Unfit)?;
        host.set_segment_prefix(Register::None);
        self.encode(&host)
    }

    /// [`Self::repeated`] upwards with offsets, inside a page: nothing may reach the end of a segment either, nor wrap.
    fn repeated_in_segments(
        &mut self,
        rsi: Option<Index>,
        rdi: Index,
        size: u32,
        site: Site,
    ) -> Result<(), Unfit> {
        if self.mode.has(Mode::EXPAND_DOWN) || self.mode.has(Mode::DOWN) {
            return Err(Unfit);
        }
        let width = rdi.width;
        let done = self.jump_if_zero(width);
        let keep = Self::keep(site.before);
        Self::save(&mut self.hot, keep, true);
        let slow = self.cold_here();
        Self::restore(&mut self.cold, keep, true);
        self.cold_interpret(self.rip);
        self.repeated_bytes(width, size);
        dynasm!(self.hot ; .arch x64 ; cmp r10, 4096);
        self.hot_jcc(7, slow);
        for (index, write) in rsi.map(|i| (i, false)).into_iter().chain([(rdi, true)]) {
            self.check_range(index, write, slow);
        }
        Self::restore(&mut self.hot, keep, true);
        if let Some(rsi) = rsi {
            self.by_table(|e| e.access_index(rsi, 1, false, site.before));
            dynasm!(self.hot ; .arch x64 ; mov [rsp + ctx!(tmp)], r11);
        }
        self.by_table(|e| e.access_index(rdi, 1, true, site.before));
        // Nothing can fault any more. The guest's registers as they will be: RSI, RDI, and RCX but for the count.
        self.repeated_bytes_lea(width, size);
        let (new_rsi, new_rdi) = (ctx!(flags_image), ctx!(tmp) + 8);
        dynasm!(self.hot ; .arch x64 ; mov [rsp + new_rsi], rsi ; mov [rsp + new_rdi], rdi);
        for (r, at) in [(6u8, new_rsi), (7u8, new_rdi)] {
            if r == 6 && rsi.is_none() {
                continue;
            }
            dynasm!(self.hot ; .arch x64 ; lea Rd(r), [Rq(r) + r10]);
            if width == 2 {
                dynasm!(self.hot ; .arch x64 ; mov [rsp + at], Rw(r));
            } else {
                dynasm!(self.hot ; .arch x64 ; mov [rsp + at], Rq(r));
            }
        }
        dynasm!(self.hot ; .arch x64 ; mov rdi, r11);
        if rsi.is_some() {
            dynasm!(self.hot ; .arch x64 ; mov rsi, [rsp + ctx!(tmp)]);
        }
        dynasm!(self.hot ; .arch x64 ; mov r10, rcx);
        if width == 2 {
            dynasm!(self.hot ; .arch x64 ; movzx ecx, cx);
        } else {
            dynasm!(self.hot ; .arch x64 ; mov ecx, ecx);
        }
        self.host_repeat(rsi.is_some(), size)?;
        if width == 2 {
            dynasm!(self.hot ; .arch x64 ; mov rcx, r10 ; mov cx, 0);
        }
        dynasm!(self.hot ; .arch x64 ; mov rsi, [rsp + new_rsi] ; mov rdi, [rsp + new_rdi]);
        let end = self.hot_here();
        self.fixups.push((done, Target::Here(end)));
        Ok(())
    }

    /// Bytes of all iterations in r10. Flags are saved.
    fn repeated_bytes(&mut self, width: u32, size: u32) {
        let shift = size.trailing_zeros() as i8;
        if width == 2 {
            dynasm!(self.hot ; .arch x64 ; movzx r10d, cx ; shl r10d, shift);
        } else {
            dynasm!(self.hot ; .arch x64 ; mov r10d, ecx ; shl r10, shift);
        }
    }

    /// The same, flags kept.
    fn repeated_bytes_lea(&mut self, width: u32, size: u32) {
        if width == 2 {
            dynasm!(self.hot ; .arch x64 ; movzx r10d, cx);
        } else {
            dynasm!(self.hot ; .arch x64 ; mov r10d, ecx);
        }
        self.lea(R10, None, Some(R10), size, 0, false);
    }

    /// Leaves for `slow` unless r10 bytes from `index` on lie in the segment, on one page, and do not wrap. Flags are saved.
    fn check_range(&mut self, index: Index, write: bool, slow: Pos) {
        let r = index.register;
        if index.width == 2 {
            dynasm!(self.hot ; .arch x64 ; movzx r11d, Rw(r) ; lea r11, [r11 + r10] ; cmp r11d, 0x1_0000);
            self.hot_jcc(7, slow);
        } else {
            dynasm!(self.hot ; .arch x64 ; mov r11d, Rd(r) ; lea r11, [r11 + r10]);
        }
        let (base, end) = self.segment_cells(index.segment, write);
        dynasm!(self.hot ; .arch x64 ; cmp r11, [rsp + end]);
        self.hot_jcc(7, slow);
        // The last byte's offset in its page, plus one, is the room before the end.
        dynasm!(self.hot
            ; .arch x64
            ; add r11d, [rsp + base]
            ; dec r11d
            ; and r11d, 0xFFF
            ; inc r11d
            ; cmp r11d, r10d
        );
        self.hot_jcc(2, slow);
    }
}

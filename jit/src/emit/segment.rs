//! Accesses through segments that are not flat (SDM 3A, 3.4 and 5.3): the base is added, the limit checked, both from the
//! context. Where a segment is plain (see `Mode::plain`) the limit costs nothing on the fast path: in 16-bit code an
//! access at a 16-bit offset reaches beyond 64 KiB only if it is misaligned, and those leave the fast path anyway.

use super::access::{Access, Keep};
use super::window::Spot;
use super::{Emitter, Pos, Site, Target, Unfit};
use crate::block::Mode;
use crate::context::ctx;
use crate::flags::FlagSet;
use crate::regs::{self, Place, R10, R11};
use crate::segments::Bounds;
use crate::stubs::MissInfo;
use dynasmrt::{DynasmApi, dynasm};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

/// The end of a segment, for reads or writes.
#[derive(Clone, Copy)]
pub(super) struct Bound {
    /// Offset of the segment's base from host RSP.
    base: i32,
    /// The same of the first offset beyond.
    end: i32,
}

fn number(segment: Register) -> u8 {
    segment.number() as u8
}

/// Offset of the base of segment register `n` from host RSP.
fn base_offset(n: u8) -> i32 {
    ctx!(seg_base) + i32::from(n) * 8
}

fn bounds_offset(n: u8) -> i32 {
    ctx!(bounds) + i32::from(n) * size_of::<Bounds>() as i32
}

fn end_offset(n: u8, write: bool) -> i32 {
    let field =
        if write { std::mem::offset_of!(Bounds, write_end) } else { std::mem::offset_of!(Bounds, read_end) };
    bounds_offset(n) + field as i32
}

impl Emitter {
    /// Whether offsets in `segment` are linear addresses (but for the bases of FS and GS) that need no check.
    pub(super) fn is_flat(&self, segment: Register) -> bool {
        !self.mode.has(Mode::SEGMENTED)
            && match segment {
                Register::CS => false,
                Register::FS | Register::GS => self.mode.has(Mode::plain(number(segment))),
                _ => true,
            }
    }

    /// Offsets from host RSP of the base and the end of `segment`, for reads or writes.
    pub(super) fn segment_cells(&self, segment: Register, write: bool) -> (i32, i32) {
        (base_offset(number(segment)), end_offset(number(segment), write))
    }

    /// Turns the zero-extended offset in r10 into a host address in r11 for an access of the kind `info` says through
    /// `segment`; `narrow` if it has 16 bits. Keeps `live`, as [`Self::access`] does; what the segment does not allow leaves for the
    /// interpreter.
    pub(super) fn access_segment(
        &mut self,
        segment: Register,
        narrow: bool,
        info: u64,
        live: FlagSet,
    ) -> Spot {
        if self.is_flat(segment) && !matches!(segment, Register::FS | Register::GS) {
            return self.access_as(R10, info, live);
        }
        let (size, write) = (info as u32 & 0xFF, info & MissInfo::WRITE != 0);
        let n = number(segment);
        let keep = Self::keep(live);
        let (base, end) = (base_offset(n), end_offset(n, write));
        let plain = self.mode.has(Mode::plain(n));
        // A misaligned vector would stay on the fast path.
        let free = plain && (self.mode.has(Mode::CODE32) || narrow && size <= 10);
        if !free {
            Self::save(&mut self.hot, keep, self.r9_busy);
            self.check_bounds(n, size, end, keep);
        }
        if !free || keep == Keep::Nothing {
            dynasm!(self.hot ; .arch x64 ; add r10d, [rsp + base]);
        } else {
            dynasm!(self.hot ; .arch x64 ; mov r11d, [rsp + base] ; lea r10d, [r10 + r11]);
        }
        let bound = (free && self.mode.has(Mode::CODE16)).then_some(Bound { base, end });
        self.access_linear(R10, Access { info, keep, saved: !free, bound });
        Spot::R11
    }

    /// MOV, POP, LES and the like into ES, DS, FS and GS, in real-address and virtual-8086 mode: where the mode stays what it
    /// is, a selector and a base in the context.
    pub(crate) fn load_segment(&mut self, instr: &Instruction, site: Site) -> Result<(), Unfit> {
        let segment = match instr.mnemonic() {
            Mnemonic::Les => Register::ES,
            Mnemonic::Lds => Register::DS,
            Mnemonic::Lfs => Register::FS,
            Mnemonic::Lgs => Register::GS,
            _ => instr.op0_register(),
        };
        let n = number(segment);
        let simple = Mode::LEGACY | Mode::CODE16 | Mode::plain(n);
        if self.mode.0 & simple != simple || matches!(segment, Register::CS | Register::SS) {
            return Err(Unfit);
        }
        match (instr.mnemonic(), instr.op1_kind()) {
            (Mnemonic::Pop, _) => {
                self.load_top(R11, 2, site.before);
                self.rsp_pending += 2;
                self.sync_rsp();
                self.rsp_adjusted(2);
            }
            (Mnemonic::Mov, OpKind::Register) => {
                let r = self.guest(regs::number(instr.op1_register()), R11);
                dynasm!(self.hot ; .arch x64 ; movzx r11d, Rw(r));
            }
            (Mnemonic::Mov, _) => {
                self.address(instr, MissInfo::of(2, false), site.before)?;
                dynasm!(self.hot ; .arch x64 ; movzx r11d, WORD [r11]);
            }
            _ => {
                self.address(instr, MissInfo::of(4, false), site.before)?;
                let Place::Host(to) = regs::place(regs::number(instr.op0_register())) else {
                    return Err(Unfit);
                };
                dynasm!(self.hot
                    ; .arch x64
                    ; mov r11d, [r11]
                    ; mov Rw(to), r11w
                    ; rorx r11d, r11d, 16
                    ; movzx r11d, r11w
                );
            }
        }
        let (selector, base) = (ctx!(selectors) + i32::from(n) * 2, base_offset(n));
        dynasm!(self.hot
            ; .arch x64
            ; mov [rsp + selector], r11w
            ; lea r11d, [r11 * 8]
            ; lea r11d, [r11 + r11]
            ; mov [rsp + base], r11
        );
        Ok(())
    }

    /// Leaves for the interpreter unless segment register `n` allows `size` bytes at the offset in r10. Flags are saved.
    fn check_bounds(&mut self, n: u8, size: u32, end: i32, keep: Keep) {
        let last = size as i32 - 1;
        if last == 0 {
            dynasm!(self.hot ; .arch x64 ; cmp r10, [rsp + end]);
        } else {
            dynasm!(self.hot ; .arch x64 ; lea r11, [r10 + last] ; cmp r11, [rsp + end]);
        }
        let slow = self.cold_here();
        self.hot_jcc(3, slow);
        if self.mode.has(Mode::EXPAND_DOWN) {
            let lower = bounds_offset(n) + std::mem::offset_of!(Bounds, lower) as i32;
            dynasm!(self.hot ; .arch x64 ; cmp r10, [rsp + lower]);
            self.hot_jcc(2, slow);
        }
        Self::restore(&mut self.cold, keep, self.r9_busy);
        self.cold_interpret(self.rip);
    }

    /// Compares the last offset of an access, whose linear address is in r10, with the segment's end: the jump that is
    /// taken beyond it.
    pub(super) fn cold_check_bound(&mut self, bound: Bound, last: i32) -> Pos {
        let Bound { base, end } = bound;
        dynasm!(self.cold
            ; .arch x64
            ; sub r10d, [rsp + base]
            ; lea r10, [r10 + last]
            ; cmp r10, [rsp + end]
            ; .u8 0x0F, 0x83
        );
        self.cold_site()
    }

    /// Space for a displacement in cold code.
    pub(super) fn cold_site(&mut self) -> Pos {
        let site = self.cold_here();
        self.cold.push_i32(0);
        site
    }

    /// Makes the jump with displacement at `site` lead here.
    pub(super) fn cold_land(&mut self, site: Pos) {
        let here = self.cold_here();
        self.fixups.push((site, Target::Here(here)));
    }
}

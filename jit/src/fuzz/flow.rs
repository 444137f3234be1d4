//! Control flow of programs: branches forward, indirect jumps, calls, returns, and loops.

use super::program::{END, Loop, Program, Return};
use super::random::Random;
use super::trace::Tracer;

/// Jumps have to land at least this much before the page's end.
const LANDING: u64 = 128;

/// JMP from `at` to `to`, with a displacement of the mode's size.
pub(super) fn jump(bits: u32, at: u64, to: u64) -> Vec<u8> {
    relative(bits, &[0xE9], at, to)
}

/// `opcode` with a displacement of the mode's size.
fn relative(bits: u32, opcode: &[u8], at: u64, to: u64) -> Vec<u8> {
    let size = if bits == 16 { 2 } else { 4 };
    let distance = to.wrapping_sub(at + (opcode.len() + size) as u64);
    [opcode, &distance.to_le_bytes()[..size]].concat()
}

/// `opcode` with a displacement of one byte, if it is near enough.
fn short(opcode: &[u8], at: u64, to: u64) -> Option<Vec<u8>> {
    let distance = to.wrapping_sub(at + opcode.len() as u64 + 1) as i64;
    i8::try_from(distance).ok().map(|d| [opcode, &[d as u8]].concat())
}

/// `FF /extension` with an absolute address.
fn through_memory(bits: u32, extension: u8, slot: u64) -> Vec<u8> {
    let slot = slot.to_le_bytes();
    match bits {
        64 => [&[0xFF, extension << 3 | 4, 0x25], &slot[..4]].concat(),
        32 => [&[0xFF, extension << 3 | 5], &slot[..4]].concat(),
        _ => [&[0xFF, extension << 3 | 6], &slot[..2]].concat(),
    }
}

/// MOV of a constant of the mode's size to an absolute address.
fn store(bits: u32, slot: u64, value: u64) -> Vec<u8> {
    let (slot, value) = (slot.to_le_bytes(), value.to_le_bytes());
    match bits {
        64 => [&[0x48, 0xC7, 0x04, 0x25], &slot[..4], &value[..4]].concat(),
        32 => [&[0xC7, 0x05], &slot[..4], &value[..4]].concat(),
        _ => [&[0xC7, 0x06], &slot[..2], &value[..2]].concat(),
    }
}

/// How often a loop turns: a few times, or so often that a translator takes it for hot.
fn turns(random: &mut Random) -> u64 {
    match random.below(4) {
        0 => 16 + random.below(48),
        1 => 6 + random.below(10),
        _ => 1 + random.below(5),
    }
}

impl Program {
    /// Where something new may begin behind everything else.
    fn landing(&self, at: u64, random: &mut Random) -> Option<u64> {
        let to = self.behind(at + 16, random);
        (to + LANDING < END).then_some(to)
    }

    /// A conditional or unconditional direct branch forward, or one to the instruction behind it.
    pub(super) fn branch(&mut self, tracer: &Tracer<'_>, random: &mut Random) -> bool {
        let (at, bits) = (tracer.rip, tracer.generator().bits);
        let condition = random.below(16) as u8;
        if random.one_in(3) {
            let opcode = random.pick(&[0xEB, 0x70 | condition, 0x70 | condition]);
            return self.write(tracer, at, &[opcode, 0]);
        }
        let Some(to) = self.landing(at, random) else { return false };
        let near = match random.below(6) {
            0 => short(&[0xE3], at, to),
            1 => short(&[0xEB], at, to),
            2 => None,
            _ => short(&[0x70 | condition], at, to),
        };
        let bytes = near.unwrap_or_else(|| relative(bits, &[0x0F, 0x80 | condition], at, to));
        self.write(tracer, at, &bytes)
    }

    /// A jump through a register or memory.
    pub(super) fn jump(&mut self, tracer: &Tracer<'_>, random: &mut Random) -> bool {
        match self.landing(tracer.rip, random) {
            Some(to) => self.go_indirectly(tracer, 4, to, random).is_some(),
            None => false,
        }
    }

    /// JMP (`extension` 4) or CALL (2) to `to`; the address behind it.
    fn go_indirectly(
        &mut self,
        tracer: &Tracer<'_>,
        extension: u8,
        to: u64,
        random: &mut Random,
    ) -> Option<u64> {
        let (at, generator) = (tracer.rip, tracer.generator());
        let (bits, target) = (generator.bits, generator.layout.code + to);
        if random.one_in(2) {
            let register = random.pick(&[0usize, 1, 2, 3, 5, 6, 7]);
            let value = if bits == 16 { tracer.now.gpr[register] & 0xFFFF_0000 | target } else { target };
            let bytes = [0xFF, 0xC0 | extension << 3 | register as u8];
            self.write_with(tracer, at, vec![(register, value)], &bytes);
        } else {
            let slot = generator.layout.data + random.below(generator.layout.writable_pages * 4096 - 8);
            self.write(tracer, at, &store(bits, slot, target));
            let next = self.steps.last()?.end();
            self.write(tracer, next, &through_memory(bits, extension, slot));
        }
        self.steps.last().map(|s| s.end())
    }

    /// CALL forward; or RET, if a call is outstanding.
    pub(super) fn call_or_return(&mut self, tracer: &Tracer<'_>, random: &mut Random) -> bool {
        if random.one_in(2)
            && let Some(back) = self.returns.pop()
        {
            return self.go_back(tracer, back, random);
        }
        let (at, generator) = (tracer.rip, tracer.generator());
        let bits = generator.bits;
        let Some(to) = self.landing(at + 64, random) else { return false };
        let to = to + 64;
        let size = u64::from(bits / 8);
        let mut state = tracer.now.clone();
        let wanted = generator.layout.data + 0x400 + random.below(0x100) * 8;
        let offset = if bits == 16 { state.gpr[4] & 0xFFFF } else { state.gpr[4] };
        let inside =
            offset.wrapping_sub(generator.layout.data + 64) < generator.layout.writable_pages * 4096 - 128;
        if !inside {
            state.gpr[4] = wanted;
        }
        let behind = if random.one_in(2) {
            let moves = super::trace::Step::moves(&tracer.now, &state);
            let setup = super::trace::Step::setup_len(&moves, bits);
            let bytes = relative(bits, &[0xE8], at + setup, to);
            self.write_with(tracer, at, moves, &bytes);
            self.steps.last().map(|s| s.end())
        } else if inside {
            self.go_indirectly(tracer, 2, to, random)
        } else {
            None
        };
        let Some(behind) = behind else { return false };
        self.returns.push(Return { to: behind, rsp: state.gpr[4].wrapping_sub(size) });
        true
    }

    /// RET, with the stack pointer where the return address should lie.
    fn go_back(&mut self, tracer: &Tracer<'_>, back: Return, random: &mut Random) -> bool {
        let at = tracer.rip;
        let mut state = tracer.now.clone();
        state.gpr[4] = back.rsp;
        let moves = super::trace::Step::moves(&tracer.now, &state);
        let bytes = match random.below(3) {
            0 => vec![0xC2, random.below(8) as u8 * 4, 0],
            _ => vec![0xC3],
        };
        back.to < END && self.write_with(tracer, at, moves, &bytes)
    }

    /// Begins a loop, at most one in another, or ends the inner one that is open.
    pub(super) fn begin_or_end_loop(&mut self, tracer: &Tracer<'_>, random: &mut Random) -> bool {
        let open = self.loops.len();
        if open == 2 || (open == 1 && !random.one_in(4)) {
            return self.loops.pop().is_some_and(|open| self.end_loop(tracer, open, random));
        }
        let counter = random.pick(&[1usize, 1, 1, 0, 2, 3, 6]);
        if self.loops.iter().any(|l| l.counter == counter) {
            return false;
        }
        self.write_with(tracer, tracer.rip, vec![(counter, turns(random))], &[0x90]);
        let Some(head) = self.steps.last().map(|s| s.end()) else { return false };
        self.loops.push(Loop { counter, head });
        true
    }

    fn end_loop(&mut self, tracer: &Tracer<'_>, open: Loop, random: &mut Random) -> bool {
        let (at, bits) = (tracer.rip, tracer.generator().bits);
        let Loop { counter, head } = open;
        if counter == 1 && random.one_in(2) {
            // LOOPNE, LOOPE, LOOP; with the other address size now and then.
            let opcode = random.pick(&[0xE0, 0xE1, 0xE2, 0xE2]);
            let opcode = if random.one_in(4) { vec![0x67, opcode] } else { vec![opcode] };
            return short(&opcode, at, head).is_some_and(|bytes| self.write(tracer, at, &bytes));
        }
        if counter == 1 && random.one_in(3) {
            // DEC leaves CF alone; JrCXZ leaves over a jump back.
            self.write(tracer, at, &[0xFF, 0xC9]);
            let exit = at + 2;
            let back = jump(bits, exit + 2, head);
            self.write(tracer, exit, &[0xE3, back.len() as u8]);
            return self.write(tracer, exit + 2, &back);
        }
        self.write(tracer, at, &[0xFF, 0xC8 | counter as u8]);
        // JNZ, JG, JNS.
        let condition = random.pick(&[0x5, 0x5, 0xF, 0x9]);
        let near = if random.one_in(2) { short(&[0x70 | condition], at + 2, head) } else { None };
        let bytes = near.unwrap_or_else(|| relative(bits, &[0x0F, 0x80 | condition], at + 2, head));
        self.write(tracer, at + 2, &bytes)
    }
}

//! Guests that aim at the host: the translator's own borders.
//!
//! Instructions of every form with memory or stack operands are pointed at the host's addresses (delta tables, code cache,
//! stacks, heap: everything this process maps), at what would become such an address if a delta were added that belongs
//! to another page, beyond the canonical range, across its ends, around 4 GiB and 2^64, and across the end of guest RAM.
//! Nothing runs natively. The interpreter, which reaches guest memory through bounds checks only, says what must
//! happen; canary pages lie around every mapping of the host.

use super::compare::{self, Leave};
use super::generate::{Case, Generator, OFFSET};
use super::guest::{Guest, GuestCase};
use super::random::Random;
use super::{Outcome, forms};
use crate::host::{Canaries, NativeLayout, NativeMode, host_mappings};
use iced_x86::Code;
use paravane_cpu::{Engine, Exit};
use std::io;

/// Two engines on one guest, and what to aim at.
pub struct Siege {
    guest: Guest,
    mode: NativeMode,
    generator: Generator,
    engines: Option<[Box<dyn Engine>; 2]>,
    canaries: Option<Canaries>,
    outcomes: [Outcome; 2],
}

impl Siege {
    /// The same layout as a bench's, but nothing is mapped at its addresses here; its arena is the end of guest RAM.
    pub fn new(mode: NativeMode) -> io::Result<Siege> {
        let layout =
            NativeLayout { code: 0x4000_0000, data: 0x5000_0000, writable_pages: 2, read_only_pages: 1 };
        Ok(Siege {
            guest: Guest::new(layout)?,
            mode,
            generator: Generator::new(mode.bits(), mode.seen(layout)),
            engines: None,
            canaries: None,
            outcomes: [Outcome::empty(), Outcome::empty()],
        })
    }

    /// The guest, whose memory the engines are built on.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// Begins: `reference` says what must happen to `subject`. Canaries are put around all that is mapped now.
    pub fn begin(&mut self, reference: Box<dyn Engine>, subject: Box<dyn Engine>) -> io::Result<()> {
        self.engines = Some([reference, subject]);
        let mut aims = Vec::new();
        let arena = self.generator.layout.data;
        for mapping in host_mappings()? {
            let middle = mapping.start.midpoint(mapping.end);
            for at in [mapping.start, mapping.start.wrapping_sub(8), middle, mapping.end - 16, mapping.end] {
                aims.push(at);
                // As an offset from any mapping that may be guest RAM.
                aims.push(at.wrapping_sub(mapping.start).wrapping_add(arena));
            }
        }
        let host_ram = self.guest.host_arena();
        let deltas: Vec<u64> = aims.iter().map(|a| a.wrapping_sub(host_ram).wrapping_add(arena)).collect();
        aims.extend(deltas);
        aims.extend(edges(arena, self.generator.layout.data_len()));
        self.generator.aims = aims;
        self.canaries = Some(Canaries::new()?);
        Ok(())
    }

    /// The forms that access memory.
    pub fn forms(&self) -> Vec<Code> {
        let admitted = forms(self.generator.bits).into_iter().filter(|(_, v)| v.is_ok()).map(|(c, _)| c);
        admitted.filter(|&c| accesses_memory(c)).collect()
    }

    /// Runs the case of `form` and `seed` in both engines: what differs, or none if the dice produced nothing.
    pub fn attack(&mut self, form: Code, seed: u64) -> Option<Vec<String>> {
        let mut random = Random::new(seed ^ ((form as u64) << 40));
        let case = self.case(form, &mut random)?;
        let mut page = vec![0xCC; 4096];
        page[OFFSET as usize..OFFSET as usize + case.code.len()].copy_from_slice(&case.code);
        let guest_case = GuestCase {
            code_page: &page,
            arena: &case.arena,
            state: &case.state,
            rip: self.generator.layout.code + OFFSET,
        };
        let engines = self.engines.as_mut().expect("the siege has begun");
        for (engine, outcome) in engines.iter_mut().zip(&mut self.outcomes) {
            match self.guest.run(&mut **engine, self.mode, &guest_case, outcome) {
                Ok(()) => {}
                Err(Exit::Stop) => return Some(vec!["stopped".into()]),
                Err(exit) => return Some(vec![format!("{form:?}: {exit:?}")]),
            }
        }
        let [reference, subject] = &self.outcomes;
        let mut lines =
            compare::differences(&case, self.generator.bits, Leave::DeadFlags, reference, subject);
        if !lines.is_empty() {
            lines.insert(0, format!("{form:?} seed {seed} {:x?} gpr {:x?}", case.code, case.state.gpr));
        }
        Some(lines)
    }

    /// The subject's counter of this name.
    pub fn counter(&self, name: &str) -> u64 {
        let counters = self.engines.iter().flat_map(|[_, subject]| subject.counters());
        counters.filter(|(counter, _)| counter == name).map(|(_, value)| value).sum()
    }

    /// Canary bytes that were written.
    pub fn hurt(&self) -> Vec<u64> {
        self.canaries.as_ref().map(Canaries::hurt).unwrap_or_default()
    }

    fn case(&self, form: Code, random: &mut Random) -> Option<Case> {
        let mut state = self.generator.random_state(random);
        let arena = self.generator.random_arena(random);
        if random.one_in(2) {
            state.gpr[4] = random.pick(&self.generator.aims);
        }
        let drawn = self.generator.draw(form, OFFSET, &mut state, random)?;
        if random.one_in(4) {
            state.gpr[4] = random.pick(&self.generator.aims);
        }
        if self.generator.bits != 64 {
            state.gpr.iter_mut().for_each(|r| *r &= 0xFFFF_FFFF);
        }
        let (code, instruction) = self.generator.finish(form, drawn, OFFSET, random)?;
        let case = Case::alone(code, instruction, state, arena);
        // The translator leaves alignment checks to the host.
        (!super::vendor::differs(&self.generator.situation(&case))).then_some(case)
    }
}

/// Ends of the address space and of the arena, and the arena's alias in every non-canonical part.
fn edges(arena: u64, length: u64) -> Vec<u64> {
    let ends =
        [0, 1 << 32, 1 << 47, 0xFFFF << 47, 1 << 48, 0xFFFF << 48, arena, arena + 4096, arena + length];
    let around = ends.iter().flat_map(|&end| [1u64, 2, 3, 7, 8, 15, 16, 31, 33].map(|n| end.wrapping_sub(n)));
    let aliases = (48..64).flat_map(|bit| [arena | 1 << bit, (arena + length - 4) | 1 << bit]);
    let negative = (1..8u64).map(|n| (arena + 64 * n) | 0xFFFF << 48);
    ends.iter().copied().chain(around).chain(aliases).chain(negative).collect()
}

fn accesses_memory(code: Code) -> bool {
    use iced_x86::{Instruction, OpCodeOperandKind as K};
    let op = code.op_code();
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    let named = op.op_kinds().iter().any(|k| {
        let name = format!("{k:?}");
        name.contains("mem") || matches!(k, K::seg_rSI | K::es_rDI | K::seg_rDI | K::seg_rBX_al)
    });
    named || instruction.is_stack_instruction()
}

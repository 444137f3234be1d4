//! The high precision event timers (IA-PC HPET specification 1.0a): one 64-bit counter of 100 MHz and three
//! comparators, each one-shot or periodic, level or edge; no FSB (message) delivery.

mod legacy;
pub mod spec;

#[cfg(test)]
mod tests;

pub use legacy::LegacyRoute;

use crate::device::{Device, Inspect, MmioDevice, ResetKind, TimedDevice};
use crate::irq::{IrqLine, IrqSink};
use crate::snapshot::{Snapshot, StateError, StateStream};
use crate::time::{Clock, Timer, VmTime};
use paravane_memory::Width;
use spec::*;
use std::fmt::Display;
use std::sync::Arc;

/// Where the comparators' interrupts go.
pub struct HpetWiring {
    /// I/O APIC inputs a comparator may choose, by number: the register names them, so this device must too.
    pub routes: Vec<(u8, IrqLine)>,
    /// The switch for IRQ 0 and 8.
    pub legacy: Arc<LegacyRoute>,
}

#[derive(Clone, Copy, Default, Debug)]
struct Comparator {
    config: u64,
    compare: u64,
    period: u64,
    /// The counter value up to which matches were taken.
    seen: u64,
}

impl Comparator {
    fn is_periodic(&self) -> bool {
        self.config & TN_TYPE_CNF != 0
    }

    fn mask(&self) -> u64 {
        if self.config & TN_32MODE_CNF != 0 { 0xFFFF_FFFF } else { u64::MAX }
    }

    /// Counts from `seen` to the next match, at least 1; `None` if that is the whole 64-bit range away.
    fn distance(&self) -> Option<u64> {
        let mask = self.mask();
        match self.compare.wrapping_sub(self.seen) & mask {
            0 if mask == u64::MAX => None,
            0 => Some(mask + 1),
            n => Some(n),
        }
    }

    /// Moves on to counter value `counter`; returns whether there was a match on the way.
    fn run_to(&mut self, counter: u64) -> bool {
        let passed = counter.wrapping_sub(self.seen);
        let matched = self.distance().filter(|&d| d <= passed);
        if let Some(first) = matched
            && self.is_periodic()
        {
            let period = (self.period & self.mask()).max(1);
            let steps = (passed - first) / period + 1;
            self.compare = self.compare.wrapping_add(steps.wrapping_mul(period)) & self.mask();
        }
        self.seen = counter;
        matched.is_some()
    }
}

/// The timer block; claim `spec::LEN` bytes at `spec::BASE` with `Width::W64`.
pub struct Hpet {
    // wiring
    clock: Arc<dyn Clock>,
    timer: Timer,
    wiring: HpetWiring,
    // bookkeeping
    /// When the counter was `counter`, while it runs.
    since: VmTime,
    // guest-visible state
    config: u64,
    status: u64,
    counter: u64,
    comparators: [Comparator; TIMERS],
}

impl Hpet {
    /// An HPET with the counter halted; bind `timer` to it with [`crate::bind_timer`].
    pub fn new(clock: Arc<dyn Clock>, timer: Timer, wiring: HpetWiring) -> Hpet {
        let comparators = Self::power_on();
        Hpet { since: clock.now(), clock, timer, wiring, config: 0, status: 0, counter: 0, comparators }
    }

    fn power_on() -> [Comparator; TIMERS] {
        [Comparator { compare: u64::MAX, ..Comparator::default() }; TIMERS]
    }

    fn runs(&self) -> bool {
        self.config & ENABLE_CNF != 0
    }

    fn counter_at(&self, now: VmTime) -> u64 {
        let passed = if self.runs() { VmTime(now.since(self.since)).ticks(HZ) } else { 0 };
        self.counter.wrapping_add(passed)
    }

    fn sync(&mut self, now: VmTime) {
        if !self.runs() {
            return;
        }
        let counter = self.counter_at(now);
        for n in 0..TIMERS {
            if self.comparators[n].run_to(counter) {
                self.raise(n);
            }
        }
    }

    /// The legacy switch's input of comparator `n`, if it drives one now.
    fn legacy_input(&self, n: usize) -> Option<u32> {
        (self.config & LEG_RT_CNF != 0 && n < 2).then_some(LegacyRoute::HPET0 + n as u32)
    }

    /// The I/O APIC input that comparator `n` is set to.
    fn route(&self, n: usize) -> u64 {
        self.comparators[n].config >> TN_INT_ROUTE_SHIFT & 0x1F
    }

    fn is_level(&self, n: usize) -> bool {
        self.comparators[n].config & TN_INT_TYPE_CNF != 0
    }

    /// Comparator `n` matched. A level is driven by [`Self::finish`]; an edge is a pulse, which in legacy mode lasts
    /// until the next one, because the 8259A forgets a request whose input falls.
    fn raise(&mut self, n: usize) {
        if self.is_level(n) {
            self.status |= 1 << n;
        } else if self.comparators[n].config & TN_INT_ENB_CNF != 0 {
            match self.legacy_input(n) {
                Some(input) => {
                    self.wiring.legacy.set_level(input, false);
                    self.wiring.legacy.set_level(input, true);
                }
                None => self.line_to(self.route(n)).into_iter().for_each(IrqLine::pulse),
            }
        }
    }

    fn line_to(&self, route: u64) -> Option<&IrqLine> {
        self.wiring.routes.iter().find(|(gsi, _)| u64::from(*gsi) == route).map(|(_, line)| line)
    }

    /// Ends what comparator `n` drives into the legacy switch.
    fn lower_legacy(&self, n: usize) {
        if let Some(input) = self.legacy_input(n) {
            self.wiring.legacy.set_level(input, false);
        }
    }

    /// Drives level wires as status and enables say, and waits for the next match that interrupts.
    fn finish(&mut self) {
        let requests = |n: usize| {
            let enabled = self.comparators[n].config & TN_INT_ENB_CNF != 0 && self.runs();
            self.is_level(n) && enabled && self.status & 1 << n != 0
        };
        for n in (0..TIMERS).filter(|&n| self.is_level(n)) {
            if let Some(input) = self.legacy_input(n) {
                self.wiring.legacy.set_level(input, requests(n));
            }
        }
        for (gsi, line) in &self.wiring.routes {
            let here = |n: &usize| self.legacy_input(*n).is_none() && self.route(*n) == u64::from(*gsi);
            line.set((0..TIMERS).filter(here).any(requests));
        }
        let next = self.runs().then(|| self.comparators.iter().filter_map(|c| self.next_match(c)).min());
        self.timer.set(next.flatten());
    }

    fn next_match(&self, c: &Comparator) -> Option<VmTime> {
        if c.config & TN_INT_ENB_CNF == 0 {
            return None;
        }
        let ticks = c.seen.wrapping_sub(self.counter).checked_add(c.distance()?)?;
        // 10 ns per tick: beyond a range that VmTime holds there is nothing to wait for.
        let ns = ticks.checked_mul(1_000_000_000 / HZ)?;
        Some(self.since.plus(ns))
    }

    // --- registers ---

    fn read(&self, register: u64, now: VmTime) -> u64 {
        match register {
            GCAP_ID => GCAP,
            GEN_CONF => self.config,
            GINTR_STA => self.status,
            MAIN_CNT => self.counter_at(now),
            _ => match Self::comparator_of(register) {
                Some((n, 0x00)) => self.comparators[n].config | self.capabilities(),
                Some((n, 0x08)) => self.comparators[n].compare,
                _ => 0,
            },
        }
    }

    fn capabilities(&self) -> u64 {
        let routes = self.wiring.routes.iter().fold(0u64, |m, (gsi, _)| m | 1 << (gsi & 0x1F));
        routes << TN_ROUTE_CAP_SHIFT | TN_PER_INT_CAP | TN_SIZE_CAP
    }

    fn comparator_of(register: u64) -> Option<(usize, u64)> {
        let n = register.checked_sub(TIMER0)? / 0x20;
        ((n as usize) < TIMERS).then_some((n as usize, register & 0x1F))
    }

    /// Writes the bits of `mask` in a register.
    fn write(&mut self, register: u64, value: u64, mask: u64, now: VmTime) {
        let merge = |old: u64| old & !mask | value & mask;
        match register {
            GEN_CONF => self.configure(merge(self.config) & (ENABLE_CNF | LEG_RT_CNF), now),
            GINTR_STA => self.status &= !(value & mask),
            MAIN_CNT if !self.runs() => {
                self.counter = merge(self.counter);
                self.comparators.iter_mut().for_each(|c| c.seen = self.counter);
            }
            _ => match Self::comparator_of(register) {
                Some((n, 0x00)) => self.configure_comparator(n, merge(self.comparators[n].config)),
                Some((n, 0x08)) => self.write_comparator(n, value, mask, now),
                _ => {} // capabilities, FSB routes and reserved space: read-only
            },
        }
    }

    fn configure(&mut self, config: u64, now: VmTime) {
        let changed = self.config ^ config;
        if changed & LEG_RT_CNF != 0 {
            (0..TIMERS).for_each(|n| self.lower_legacy(n));
        }
        self.counter = self.counter_at(now);
        self.since = now;
        self.comparators.iter_mut().for_each(|c| c.seen = self.counter);
        self.config = config;
        self.wiring.legacy.set_replaced(config & LEG_RT_CNF != 0);
    }

    fn configure_comparator(&mut self, n: usize, value: u64) {
        let was_level = self.is_level(n);
        // A route that the timer does not have reads back as the old one (2.3.8): so software finds out.
        let route = value & TN_INT_ROUTE_CNF;
        let exists = self.line_to(route >> TN_INT_ROUTE_SHIFT).is_some();
        let c = &mut self.comparators[n];
        let route = if exists { route } else { c.config & TN_INT_ROUTE_CNF };
        c.config = value & TN_WRITABLE & !TN_INT_ROUTE_CNF | route;
        if c.config & TN_32MODE_CNF != 0 {
            (c.compare, c.period) = (c.compare & c.mask(), c.period & c.mask());
        }
        if !self.is_level(n) {
            self.status &= !(1 << n);
            if was_level {
                self.lower_legacy(n);
            }
        }
    }

    /// In periodic mode a write sets the period, and the accumulator too while VAL_SET is on (2.3.9.2.2).
    fn write_comparator(&mut self, n: usize, value: u64, mask: u64, now: VmTime) {
        let counter = self.counter_at(now);
        let c = &mut self.comparators[n];
        let merge = |old: u64| old & !mask | value & mask;
        if !c.is_periodic() || c.config & TN_VAL_SET_CNF != 0 {
            c.compare = merge(c.compare) & c.mask();
            c.seen = counter;
        }
        if c.is_periodic() {
            c.period = merge(c.period) & c.mask();
        }
        c.config &= !TN_VAL_SET_CNF;
    }
}

crate::snapshot!(Comparator { config, compare, period, seen });
crate::snapshot!(Hpet { timer, wiring, since, config, status, counter, comparators | clock });

impl Snapshot for HpetWiring {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        let HpetWiring { routes, legacy } = self;
        routes.iter_mut().try_for_each(|(_, line)| line.state(s))?;
        legacy.shared_state(s)
    }
}

impl Inspect for Hpet {
    fn inspect(&self, field: &mut dyn FnMut(&str, &dyn Display)) {
        field("config", &format_args!("{:x}", self.config));
        field("status", &format_args!("{:x}", self.status));
        field("counter", &self.counter_at(self.clock.now()));
        for (n, c) in self.comparators.iter().enumerate() {
            field(&format!("timer{n}"), &format_args!("{c:x?}"));
        }
    }
}

impl Device for Hpet {
    fn label(&self) -> &str {
        "hpet"
    }

    fn reset(&mut self, _kind: ResetKind) {
        (0..TIMERS).for_each(|n| self.lower_legacy(n));
        (self.config, self.status, self.counter) = (0, 0, 0);
        self.comparators = Self::power_on();
        self.wiring.legacy.set_replaced(false);
        self.finish();
    }

    fn as_snapshot(&mut self) -> Option<&mut dyn Snapshot> {
        Some(self)
    }

    fn as_mmio(&mut self) -> Option<&mut dyn MmioDevice> {
        Some(self)
    }

    fn as_timed(&mut self) -> Option<&mut dyn TimedDevice> {
        Some(self)
    }
}

impl MmioDevice for Hpet {
    fn mmio_load(&mut self, offset: u64, width: Width) -> u64 {
        let now = self.clock.now();
        if offset & !7 != MAIN_CNT {
            self.sync(now);
            self.finish();
        }
        self.read(offset & !7, now) >> ((offset & 7) * 8) & width.mask()
    }

    fn mmio_store(&mut self, offset: u64, width: Width, value: u64) {
        let now = self.clock.now();
        self.sync(now);
        let shift = (offset & 7) * 8;
        self.write(offset & !7, value << shift, width.mask() << shift, now);
        self.finish();
    }
}

impl TimedDevice for Hpet {
    fn expired(&mut self, now: VmTime) {
        self.sync(now);
        self.finish();
    }
}

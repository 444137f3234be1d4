//! The 8254 programmable interval timer (Intel 231164-005) and system control port B (61h).

mod counter;
pub mod spec;

#[cfg(test)]
mod tests;

use crate::device::{Device, Inspect, PioDevice, ResetKind, TimedDevice};
use crate::irq::IrqLine;
use crate::snapshot::Snapshot;
use crate::time::{Clock, Timer, VmTime};
use counter::Counter;
use paravane_memory::{Port, Width};
use spec::*;
use std::fmt::Display;
use std::sync::Arc;

/// The timer chip; claim [`Pit::RANGES`] with `Width::W8`.
pub struct Pit {
    // wiring
    clock: Arc<dyn Clock>,
    timer: Timer,
    out0: IrqLine,
    // guest-visible state
    counters: [Counter; 3],
    port_b: u8,
}

impl Pit {
    /// (first port, count) of the ranges to claim.
    pub const RANGES: [(Port, u32); 2] = [(Port(COUNTER0), 4), (Port(PORT_B), 1)];

    /// A PIT whose OUT0 is `out0`; bind `timer` to it with [`crate::bind_timer`].
    pub fn new(clock: Arc<dyn Clock>, timer: Timer, out0: IrqLine) -> Pit {
        Pit { clock, timer, out0, counters: Self::power_on(), port_b: 0 }
    }

    fn power_on() -> [Counter; 3] {
        [Counter::new(true), Counter::new(true), Counter::new(false)]
    }

    /// The level the speaker is driven with: port B's data bit and OUT2.
    pub fn speaker(&mut self) -> bool {
        self.sync(self.clock.now());
        self.port_b & B_SPEAKER != 0 && self.counters[2].out
    }

    /// Brings all counters to `now` and drives OUT0.
    fn sync(&mut self, now: VmTime) {
        let tick = now.ticks(HZ);
        let [c0, c1, c2] = &mut self.counters;
        if c0.advance(tick) {
            self.out0.set(false); // it may have fallen, risen and fallen again since the last look
            self.out0.set(true);
        }
        self.out0.set(c0.out);
        c1.advance(tick);
        c2.advance(tick);
    }

    /// Drives OUT0 after an access and waits for its next rising edge.
    fn finish(&mut self) {
        self.out0.set(self.counters[0].out);
        self.timer.set(self.counters[0].next_rise().map(|clock| VmTime::from_ticks(clock, HZ)));
    }

    fn control(&mut self, word: u8) {
        match word >> 6 {
            3 => self.read_back(word),
            n => self.counters[usize::from(n)].control(word),
        }
    }

    fn read_back(&mut self, word: u8) {
        for (i, counter) in self.counters.iter_mut().enumerate() {
            if word & 2 << i == 0 {
                continue;
            }
            if word & READBACK_NO_COUNT == 0 {
                counter.latch_count();
            }
            if word & READBACK_NO_STATUS == 0 {
                counter.latch_status();
            }
        }
    }

    fn read_port_b(&self, now: VmTime) -> u8 {
        let refresh = if !(now.0 / REFRESH_NS).is_multiple_of(2) { B_REFRESH } else { 0 };
        let out2 = if self.counters[2].out { B_OUT2 } else { 0 };
        self.port_b | refresh | out2
    }
}

crate::snapshot!(Pit { timer, out0, counters, port_b | clock });

impl Inspect for Pit {
    fn inspect(&self, field: &mut dyn FnMut(&str, &dyn Display)) {
        for (i, counter) in self.counters.iter().enumerate() {
            field(&format!("counter{i}"), &format_args!("{counter:?}"));
        }
        field("port_b", &format_args!("{:02x}", self.port_b));
    }
}

impl Device for Pit {
    fn label(&self) -> &str {
        "pit"
    }

    fn reset(&mut self, _kind: ResetKind) {
        self.counters = Self::power_on();
        self.port_b = 0;
        self.timer.disarm();
        self.sync(self.clock.now());
    }

    fn as_snapshot(&mut self) -> Option<&mut dyn Snapshot> {
        Some(self)
    }

    fn as_pio(&mut self) -> Option<&mut dyn PioDevice> {
        Some(self)
    }

    fn as_timed(&mut self) -> Option<&mut dyn TimedDevice> {
        Some(self)
    }
}

impl PioDevice for Pit {
    fn port_in(&mut self, port: Port, _width: Width) -> u32 {
        let now = self.clock.now();
        self.sync(now);
        let value = match port.0 {
            PORT_B => self.read_port_b(now),
            CONTROL => 0xFF, // write-only
            n => self.counters.get_mut(usize::from(n.wrapping_sub(COUNTER0))).map_or(0xFF, Counter::read),
        };
        value.into()
    }

    fn port_out(&mut self, port: Port, _width: Width, value: u32) {
        let value = value as u8;
        self.sync(self.clock.now());
        match port.0 {
            PORT_B => {
                self.port_b = value & B_WRITABLE;
                self.counters[2].set_gate(value & B_GATE2 != 0);
            }
            CONTROL => self.control(value),
            n => {
                if let Some(counter) = self.counters.get_mut(usize::from(n.wrapping_sub(COUNTER0))) {
                    counter.write(value);
                }
            }
        }
        self.finish();
    }
}

impl TimedDevice for Pit {
    fn expired(&mut self, now: VmTime) {
        self.sync(now);
        self.finish();
    }
}

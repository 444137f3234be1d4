//! One counter of the 8254, as a function of its input clock.
//!
//! [`Counter::advance`] moves by whole phases, so its cost does not grow with the time that passed.

use super::spec::{STATUS_NULL, STATUS_OUT};

/// Where in its mode's diagram a counter is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Waits for a count or for a trigger.
    Waiting,
    /// The next clock loads the counting element.
    Load,
    /// Counts; `left` clocks to the next event.
    Count,
    /// The one clock that OUT is low in modes 2, 4 and 5.
    Strobe,
    /// Past the event; the element counts on from zero, `left` clocks so far.
    Wrapped,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Access {
    Low,
    High,
    Both,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Counter {
    // bookkeeping
    at: u64,
    phase: Phase,
    left: u64,
    /// The count the current period was loaded with.
    current: u32,
    // guest-visible state
    /// Bits 5:0 of the control word as written; the status byte gives them back.
    control: u8,
    mode: u8,
    access: Access,
    bcd: bool,
    gate: bool,
    pub(super) out: bool,
    null: bool,
    /// A count was written since the control word.
    has_count: bool,
    count: u32,
    written_low: Option<u8>,
    read_high_next: bool,
    latched: Option<u16>,
    status: Option<u8>,
}

crate::snapshot_enum!(Phase { Waiting, Load, Count, Strobe, Wrapped });
crate::snapshot_enum!(Access { Low, High, Both });
crate::snapshot!(Counter {
    at,
    phase,
    left,
    current,
    control,
    mode,
    access,
    bcd,
    gate,
    out,
    null,
    has_count,
    count,
    written_low,
    read_high_next,
    latched,
    status,
});

impl Counter {
    pub(super) fn new(gate: bool) -> Counter {
        Counter {
            at: 0,
            phase: Phase::Waiting,
            left: 0,
            current: 0x1_0000,
            control: 0x30,
            mode: 0,
            access: Access::Both,
            bcd: false,
            gate,
            out: false,
            null: true,
            has_count: false,
            count: 0x1_0000,
            written_low: None,
            read_high_next: false,
            latched: None,
            status: None,
        }
    }

    fn modulus(&self) -> u32 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    /// The count, at least the mode's minimum (2 in modes 2 and 3).
    fn loaded(&self) -> u32 {
        if matches!(self.mode, 2 | 3) { self.count.max(2) } else { self.count }
    }

    /// GATE low stops the counting, but neither the loading nor a pulse that has begun.
    fn is_paused(&self) -> bool {
        !self.gate && matches!(self.mode, 0 | 2 | 3 | 4) && !matches!(self.phase, Phase::Load | Phase::Strobe)
    }

    /// Runs to clock `to`; returns whether OUT rose on the way.
    pub(super) fn advance(&mut self, to: u64) -> bool {
        let mut clocks = to.saturating_sub(self.at);
        self.at = self.at.max(to);
        let mut rose = false;
        while clocks > 0 && !self.is_paused() {
            match self.phase {
                Phase::Waiting => break,
                Phase::Wrapped => {
                    self.left = (self.left + clocks) % u64::from(self.modulus());
                    break;
                }
                _ => {}
            }
            if matches!(self.mode, 2 | 3) && self.phase == Phase::Count && self.current == self.loaded() {
                let period = u64::from(self.current);
                rose |= clocks >= period;
                clocks %= period;
            }
            if clocks < self.left {
                self.left -= clocks;
                break;
            }
            clocks -= self.left;
            rose |= self.event();
        }
        rose
    }

    /// The phase ends; returns whether OUT rose.
    fn event(&mut self) -> bool {
        let was = self.out;
        match (self.phase, self.mode) {
            (Phase::Load, _) => self.load(),
            (Phase::Count, 2 | 4 | 5) => {
                self.out = false;
                (self.phase, self.left) = (Phase::Strobe, 1);
            }
            (Phase::Count, 3) => {
                self.out = !self.out;
                self.load_half();
            }
            (Phase::Strobe, 2) => {
                self.out = true;
                self.load();
            }
            (Phase::Strobe, _) => {
                self.out = true;
                (self.phase, self.left) = (Phase::Wrapped, 1);
            }
            _ => {
                self.out = true;
                (self.phase, self.left) = (Phase::Wrapped, 0);
            }
        }
        !was && self.out
    }

    /// The counting element takes the count register.
    fn load(&mut self) {
        self.current = self.loaded();
        self.null = false;
        self.phase = Phase::Count;
        match self.mode {
            1 => {
                self.out = false;
                self.left = self.current.into();
            }
            2 => self.left = u64::from(self.current) - 1,
            3 => {
                self.out = true;
                self.load_half();
            }
            4 | 5 => {
                self.out = true; // a strobe that was under way ends
                self.left = self.current.into();
            }
            _ => self.left = self.current.into(),
        }
    }

    /// Half a square wave: with an odd count the high half is one clock longer.
    fn load_half(&mut self) {
        self.current = self.loaded();
        self.null = false;
        self.phase = Phase::Count;
        let n = u64::from(self.current);
        self.left = if self.out { n.div_ceil(2) } else { n / 2 };
    }

    /// The counting element.
    fn element(&self) -> u32 {
        let modulus = self.modulus();
        let left = self.left as u32;
        match (self.phase, self.mode) {
            (Phase::Waiting | Phase::Load, _) => self.current % modulus,
            (Phase::Wrapped, _) => (modulus - left % modulus) % modulus,
            (Phase::Strobe, 2) => 1,
            (Phase::Strobe, _) => 0,
            (Phase::Count, 2) => (left + 1) % modulus,
            (Phase::Count, 3) if self.current & 1 != 0 && self.out => (left.max(1) - 1) * 2 % modulus,
            (Phase::Count, 3) => left * 2 % modulus,
            (Phase::Count, _) => left % modulus,
        }
    }

    fn element_as_read(&self) -> u16 {
        let e = self.element();
        if !self.bcd {
            return e as u16;
        }
        (0..4).fold(0, |bcd, i| bcd | ((e / 10u32.pow(i) % 10) << (4 * i)) as u16)
    }

    /// The clock at which OUT rises next, if nothing is written before.
    pub(super) fn next_rise(&self) -> Option<u64> {
        let mut ahead = *self;
        let mut clock = self.at;
        for _ in 0..4 {
            if ahead.is_paused() || matches!(ahead.phase, Phase::Waiting | Phase::Wrapped) {
                return None;
            }
            clock += ahead.left;
            if ahead.event() {
                return Some(clock);
            }
        }
        None
    }

    /// A control word for this counter. The caller advanced it first.
    pub(super) fn control(&mut self, word: u8) {
        let access = match word >> 4 & 3 {
            0 => {
                self.latched.get_or_insert(self.element_as_read());
                return;
            }
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        };
        let mode = match word >> 1 & 7 {
            m @ 0..=5 => m,
            m => m - 4,
        };
        *self = Counter {
            at: self.at,
            current: self.element(),
            control: word & 0x3F,
            mode,
            access,
            bcd: word & 1 != 0,
            out: mode != 0,
            count: self.count,
            ..Counter::new(self.gate)
        };
    }

    pub(super) fn latch_count(&mut self) {
        self.latched.get_or_insert(self.element_as_read());
    }

    pub(super) fn latch_status(&mut self) {
        let out = if self.out { STATUS_OUT } else { 0 };
        let null = if self.null { STATUS_NULL } else { 0 };
        self.status.get_or_insert(out | null | self.control);
    }

    pub(super) fn read(&mut self) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        let value = self.latched.unwrap_or_else(|| self.element_as_read());
        let [low, high] = value.to_le_bytes();
        let (byte, done) = match self.access {
            Access::Low => (low, true),
            Access::High => (high, true),
            Access::Both => {
                self.read_high_next = !self.read_high_next;
                if self.read_high_next { (low, false) } else { (high, true) }
            }
        };
        if done {
            self.latched = None;
        }
        byte
    }

    pub(super) fn write(&mut self, value: u8) {
        let count = match (self.access, self.written_low.take()) {
            (Access::Low, _) => value.into(),
            (Access::High, _) => u16::from(value) << 8,
            (Access::Both, Some(low)) => u16::from_le_bytes([low, value]),
            (Access::Both, None) => {
                self.written_low = Some(value);
                if self.mode == 0 {
                    self.out = false;
                    self.current = self.element();
                    self.phase = Phase::Waiting;
                }
                return;
            }
        };
        self.count = self.binary(count);
        let first = !self.has_count;
        (self.null, self.has_count) = (true, true);
        match self.mode {
            0 => {
                self.out = false;
                self.start();
            }
            4 => self.start(),
            2 | 3 if first => self.start(),
            _ => {} // 1 and 5 wait for the gate; 2 and 3 take a new count at the end of the period or at a trigger
        }
    }

    fn start(&mut self) {
        self.current = self.element();
        (self.phase, self.left) = (Phase::Load, 1);
    }

    /// The count register's value; 0 is the largest count.
    fn binary(&self, raw: u16) -> u32 {
        let value = if self.bcd {
            (0..4).map(|i| u32::from(raw >> (4 * i) & 0xF) * 10u32.pow(i)).sum::<u32>() % 10_000
        } else {
            raw.into()
        };
        if value == 0 { self.modulus() } else { value }
    }

    /// Drives the GATE pin. The caller advanced the counter first.
    pub(super) fn set_gate(&mut self, gate: bool) {
        let rising = gate && !self.gate;
        let falling = !gate && self.gate;
        self.gate = gate;
        match self.mode {
            1 | 5 if rising && self.has_count => self.start(),
            2 | 3 if falling => {
                self.out = true;
                self.current = self.element();
                self.phase = Phase::Waiting;
            }
            2 | 3 if rising && self.has_count => self.start(),
            _ => {}
        }
    }
}

//! The 16550A serial port (National Semiconductor PC16550D).
//!
//! Characters leave at once: the transmitter is busy only while the back end takes none. Input waits at the
//! back end until the guest listens (it enabled the received-data interrupt, or polls the line status), as a
//! sender with flow control would wait; a FIFO the guest clears is sent again. So no input is lost to probing.

pub mod spec;

#[cfg(test)]
mod tests;

use crate::counters::Counter;
use crate::device::{Device, Inspect, PioDevice, ResetKind, TimedDevice};
use crate::irq::IrqLine;
use crate::snapshot::Snapshot;
use crate::time::{Clock, Timer, VmTime};
use paravane_memory::{Port, Width};
use spec::*;
use std::collections::VecDeque;
use std::fmt::Display;
use std::sync::Arc;

/// Takes characters from the guest; must not block.
pub trait CharSink: Send {
    /// Takes as many of `bytes` as there is room for and returns how many; the rest is offered again.
    fn write(&mut self, bytes: &[u8]) -> usize;
}

impl<F: FnMut(&[u8]) + Send> CharSink for F {
    fn write(&mut self, bytes: &[u8]) -> usize {
        self(bytes);
        bytes.len()
    }
}

/// Gives characters to the guest; must not block. Whoever fills it calls [`Uart::input_ready`].
pub trait CharSource: Send {
    /// Fills the start of `buf` and returns how much.
    fn read(&mut self, buf: &mut [u8]) -> usize;
}

/// A source that never has anything.
#[derive(Clone, Copy, Debug)]
pub struct NoInput;

impl CharSource for NoInput {
    fn read(&mut self, _buf: &mut [u8]) -> usize {
        0
    }
}

/// The back end and the wires of one port.
pub struct UartWiring {
    /// `serial0`, …
    pub label: String,
    /// Interrupt.
    pub irq: IrqLine,
    /// Output.
    pub sink: Box<dyn CharSink>,
    /// Input.
    pub source: Box<dyn CharSource>,
    /// Characters sent.
    pub sent: Counter,
    /// Characters received.
    pub received: Counter,
}

/// How many line status reads in a row, with nothing sent between, mean that the guest waits for input.
const POLLS_TO_LISTEN: u8 = 8;
/// When a full back end is tried again.
const RETRY_NS: u64 = 1_000_000;

#[derive(Clone, Copy, Debug, Default)]
struct Received {
    byte: u8,
    errors: u8,
    /// It came over the wire, not from the loop.
    from_line: bool,
}

/// One serial port; claim [`PORTS`] ports at a multiple of it with `Width::W8`.
pub struct Uart {
    // wiring
    clock: Arc<dyn Clock>,
    timer: Timer,
    wiring: UartWiring,
    // bookkeeping
    polls: u8,
    /// Input cleared out of the FIFO, to be received again; at most one FIFO.
    again: VecDeque<u8>,
    /// No input before this time: the FIFO was just cleared.
    quiet_until: VmTime,
    timeout_at: Option<VmTime>,
    // guest-visible state
    rx: VecDeque<Received>,
    tx: VecDeque<u8>,
    overrun: bool,
    thre_pending: bool,
    timeout: bool,
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    msr_delta: u8,
    scr: u8,
    divisor: u16,
}

impl Uart {
    /// A port in its reset state; bind `timer` to it with [`crate::bind_timer`].
    pub fn new(clock: Arc<dyn Clock>, timer: Timer, wiring: UartWiring) -> Uart {
        Uart {
            clock,
            timer,
            wiring,
            polls: 0,
            again: VecDeque::new(),
            quiet_until: VmTime(0),
            timeout_at: None,
            rx: VecDeque::with_capacity(FIFO),
            tx: VecDeque::with_capacity(FIFO),
            overrun: false,
            thre_pending: false,
            timeout: false,
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            msr_delta: 0,
            scr: 0,
            divisor: 12,
        }
    }

    /// The source has something; call it from any thread, with the device locked and the source not.
    pub fn input_ready(&mut self) {
        let now = self.clock.now();
        self.pull(now);
        self.finish(now);
    }

    /// Receives `bytes` as far as the FIFO has room and the guest listens; returns how many were taken.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        let now = self.clock.now();
        let room = if self.listens(now) { self.depth() - self.rx.len().min(self.depth()) } else { 0 };
        let taken = room.min(bytes.len());
        bytes[..taken].iter().for_each(|&b| self.push_line(b, now));
        self.finish(now);
        taken
    }

    fn fifo_enabled(&self) -> bool {
        self.fcr & FCR_ENABLE != 0
    }

    fn depth(&self) -> usize {
        if self.fifo_enabled() { FIFO } else { 1 }
    }

    fn loops(&self) -> bool {
        self.mcr & MCR_LOOP != 0
    }

    /// Time of four characters, after which a partly filled FIFO interrupts.
    fn four_characters(&self) -> u64 {
        let data = 5 + u64::from(self.lcr & 3);
        let parity = u64::from(self.lcr >> 3 & 1);
        let stop = 1 + u64::from(self.lcr >> 2 & 1);
        let clocks = (1 + data + parity + stop) * 16 * u64::from(self.divisor.max(1)) * 4;
        VmTime::from_ticks(clocks, CLOCK_HZ).0
    }

    // --- receiver ---

    fn listens(&self, now: VmTime) -> bool {
        let waits = self.ier & IER_RDA != 0 || self.polls >= POLLS_TO_LISTEN;
        waits && !self.loops() && now >= self.quiet_until
    }

    fn pull(&mut self, now: VmTime) {
        while self.listens(now) && self.rx.len() < self.depth() {
            if let Some(byte) = self.again.pop_front() {
                self.push_line(byte, now);
                continue;
            }
            let mut buf = [0; FIFO];
            let room = self.depth() - self.rx.len();
            let n = self.wiring.source.read(&mut buf[..room]).min(room);
            if n == 0 {
                return;
            }
            buf[..n].iter().for_each(|&b| self.push_line(b, now));
        }
    }

    fn push_line(&mut self, byte: u8, now: VmTime) {
        self.wiring.received.add(1);
        self.push(Received { byte, errors: 0, from_line: true }, now);
    }

    /// A full FIFO loses the new character; without FIFOs the old one is overwritten.
    fn push(&mut self, character: Received, now: VmTime) {
        if self.rx.len() >= self.depth() {
            self.overrun = true;
            if self.fifo_enabled() {
                return;
            }
            self.rx.clear();
        }
        self.rx.push_back(character);
        self.restart_timeout(now);
    }

    fn restart_timeout(&mut self, now: VmTime) {
        self.timeout = false;
        let waits = self.fifo_enabled() && !self.rx.is_empty();
        self.timeout_at = waits.then(|| now.plus(self.four_characters()));
    }

    fn read_rbr(&mut self, now: VmTime) -> u8 {
        let byte = self.rx.pop_front().map_or(0, |r| r.byte);
        self.pull(now);
        self.restart_timeout(now);
        byte
    }

    /// What the guest throws away unread, the line sends again.
    fn clear_rx(&mut self, now: VmTime) {
        let unread: Vec<u8> = self.rx.drain(..).filter(|r| r.from_line).map(|r| r.byte).collect();
        for byte in unread.into_iter().rev() {
            self.again.push_front(byte);
        }
        self.again.truncate(2 * FIFO);
        self.quiet_until = now.plus(self.four_characters());
        self.polls = 0;
        self.restart_timeout(now);
    }

    // --- transmitter ---

    fn write_thr(&mut self, value: u8, now: VmTime) {
        self.polls = 0;
        self.thre_pending = false;
        if self.loops() {
            self.push(Received { byte: value, errors: 0, from_line: false }, now);
            self.thre_pending = true;
            return;
        }
        if self.tx.len() >= self.depth() {
            self.tx.pop_back(); // the guest did not wait for THRE
        }
        self.tx.push_back(value);
        self.drain();
    }

    fn drain(&mut self) {
        if self.tx.is_empty() {
            return;
        }
        let bytes = self.tx.make_contiguous();
        let taken = self.wiring.sink.write(bytes).min(bytes.len());
        self.tx.drain(..taken);
        self.wiring.sent.add(taken as u64);
        if self.tx.is_empty() {
            self.thre_pending = true;
        }
    }

    // --- status and interrupts ---

    fn line_errors(&self) -> u8 {
        let overrun = if self.overrun { LSR_OE } else { 0 };
        self.rx.front().map_or(0, |r| r.errors) | overrun
    }

    fn read_lsr(&mut self, now: VmTime) -> u8 {
        self.drain();
        if self.tx.is_empty() {
            self.polls = self.polls.saturating_add(1);
            self.pull(now);
        }
        let mut lsr = self.line_errors();
        if self.fifo_enabled() && self.rx.iter().any(|r| r.errors != 0) {
            lsr |= LSR_FIFO_ERROR;
        }
        if !self.rx.is_empty() {
            lsr |= LSR_DR;
        }
        if self.tx.is_empty() {
            lsr |= LSR_THRE | LSR_TEMT;
        }
        self.overrun = false;
        if let Some(first) = self.rx.front_mut() {
            first.errors = 0;
        }
        lsr
    }

    /// CTS, DSR, RI and DCD: the terminal's, or in the loop RTS, DTR, OUT1 and OUT2.
    fn modem_lines(&self) -> u8 {
        if !self.loops() {
            return MSR_CONNECTED;
        }
        (self.mcr & 2) << 3 | (self.mcr & 1) << 5 | (self.mcr & 0xC) << 4
    }

    fn write_mcr(&mut self, value: u8) {
        let before = self.modem_lines();
        self.mcr = value & 0x1F;
        let after = self.modem_lines();
        self.msr_delta |= (before ^ after) >> 4 & !MSR_TERI;
        if before & !after & MSR_RI != 0 {
            self.msr_delta |= MSR_TERI;
        }
    }

    /// The interrupt of highest priority.
    fn interrupt(&self) -> u8 {
        let data = if self.fifo_enabled() { TRIGGERS[usize::from(self.fcr >> 6)] } else { 1 };
        if self.ier & IER_RLS != 0 && self.line_errors() != 0 {
            IIR_RLS
        } else if self.ier & IER_RDA != 0 && self.rx.len() >= data {
            IIR_RDA
        } else if self.ier & IER_RDA != 0 && self.timeout {
            IIR_TIMEOUT
        } else if self.ier & IER_THRE != 0 && self.thre_pending {
            IIR_THRE
        } else if self.ier & IER_MS != 0 && self.msr_delta != 0 {
            IIR_MS
        } else {
            IIR_NONE
        }
    }

    fn read_iir(&mut self) -> u8 {
        let id = self.interrupt();
        if id == IIR_THRE {
            self.thre_pending = false;
        }
        id | if self.fifo_enabled() { IIR_FIFO } else { 0 }
    }

    fn write_ier(&mut self, value: u8, now: VmTime) {
        let enabled = value & !self.ier;
        self.ier = value & 0x0F;
        if enabled & IER_THRE != 0 && self.tx.is_empty() {
            self.thre_pending = true; // enabling it while the register is empty interrupts at once
        }
        self.pull(now);
    }

    fn write_fcr(&mut self, value: u8, now: VmTime) {
        let toggled = (value ^ self.fcr) & FCR_ENABLE != 0;
        if value & FCR_CLEAR_RX != 0 || toggled {
            self.clear_rx(now);
        }
        if value & FCR_CLEAR_TX != 0 || toggled {
            self.drain();
            self.tx.clear();
        }
        // The other bits stick only while FIFOs are enabled.
        self.fcr = if value & FCR_ENABLE != 0 { value & 0xC1 } else { 0 };
    }

    fn write_lcr(&mut self, value: u8, now: VmTime) {
        let broke = value & !self.lcr & LCR_BREAK != 0;
        self.lcr = value;
        if broke && self.loops() {
            self.push(Received { byte: 0, errors: LSR_BI | LSR_FE, from_line: false }, now);
        }
    }

    /// Drives the interrupt and waits for the next thing that time brings.
    fn finish(&mut self, now: VmTime) {
        let connected = self.mcr & MCR_OUT2 != 0;
        self.wiring.irq.set(connected && self.interrupt() != IIR_NONE);
        let retry = (!self.tx.is_empty()).then(|| now.plus(RETRY_NS));
        let quiet = (self.quiet_until > now).then_some(self.quiet_until);
        let timeout = self.timeout_at.filter(|_| self.ier & IER_RDA != 0);
        self.timer.set(retry.into_iter().chain(quiet).chain(timeout).min());
    }

    fn latch(&self) -> bool {
        self.lcr & LCR_DLAB != 0
    }
}

crate::snapshot!(Received { byte, errors, from_line });
crate::snapshot!(UartWiring { irq | label, sink, source, sent, received });
crate::snapshot!(Uart {
    timer,
    wiring,
    polls,
    again,
    quiet_until,
    timeout_at,
    rx,
    tx,
    overrun,
    thre_pending,
    timeout,
    ier,
    fcr,
    lcr,
    mcr,
    msr_delta,
    scr,
    divisor
    | clock
});

impl Inspect for Uart {
    fn inspect(&self, field: &mut dyn FnMut(&str, &dyn Display)) {
        let registers = [("ier", self.ier), ("fcr", self.fcr), ("lcr", self.lcr), ("mcr", self.mcr)];
        for (name, value) in registers {
            field(name, &format_args!("{value:02x}"));
        }
        field("divisor", &self.divisor);
        field("rx", &self.rx.len());
        field("tx", &self.tx.len());
    }
}

impl Device for Uart {
    fn label(&self) -> &str {
        &self.wiring.label
    }

    /// Master reset; the divisor and the scratch register are not touched by it.
    fn reset(&mut self, _kind: ResetKind) {
        let now = self.clock.now();
        self.drain();
        self.tx.clear();
        self.clear_rx(now);
        (self.ier, self.fcr, self.lcr, self.mcr, self.msr_delta) = (0, 0, 0, 0, 0);
        (self.overrun, self.thre_pending) = (false, false);
        self.finish(now);
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

impl PioDevice for Uart {
    fn port_in(&mut self, port: Port, _width: Width) -> u32 {
        let now = self.clock.now();
        let value = match port.0 & 7 {
            RBR if self.latch() => self.divisor as u8,
            IER if self.latch() => (self.divisor >> 8) as u8,
            RBR => self.read_rbr(now),
            IER => self.ier,
            IIR => self.read_iir(),
            LCR => self.lcr,
            MCR => self.mcr,
            LSR => self.read_lsr(now),
            MSR => self.modem_lines() | std::mem::take(&mut self.msr_delta),
            _ => self.scr,
        };
        self.finish(now);
        value.into()
    }

    fn port_out(&mut self, port: Port, _width: Width, value: u32) {
        let now = self.clock.now();
        let value = value as u8;
        match port.0 & 7 {
            RBR if self.latch() => self.divisor = self.divisor & 0xFF00 | u16::from(value),
            IER if self.latch() => self.divisor = self.divisor & 0xFF | u16::from(value) << 8,
            RBR => self.write_thr(value, now),
            IER => self.write_ier(value, now),
            IIR => self.write_fcr(value, now),
            LCR => self.write_lcr(value, now),
            MCR => {
                self.write_mcr(value);
                self.pull(now);
            }
            SCR => self.scr = value,
            _ => {} // LSR and MSR are read-only
        }
        self.finish(now);
    }
}

impl TimedDevice for Uart {
    fn expired(&mut self, now: VmTime) {
        self.drain();
        self.pull(now);
        if self.timeout_at.is_some_and(|at| at <= now) {
            self.timeout_at = None;
            self.timeout = true;
        }
        self.finish(now);
    }
}

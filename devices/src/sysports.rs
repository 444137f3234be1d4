//! Small system ports: fast A20 and reset (92h), POST code (80h), coprocessor error (F0h), debug console (E9h) and debug
//! exit (IBM PS/2 technical reference). Reset control (CF9h) is a byte of the PCI configuration address and lives there.

use crate::control::{A20Gate, A20Source, MachineControl};
use crate::device::{Device, Inspect, PioDevice, ResetKind};
use crate::irq::IrqLine;
use crate::snapshot::{Snapshot, StateError, StateStream};
use paravane_memory::{Port, Width};
use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// System control port A.
const PORT_A: u16 = 0x92;
/// Port A: pulse the processor's reset line.
const PORT_A_RESET: u8 = 1 << 0;
/// Port A: enable address line 20.
const PORT_A_A20: u8 = 1 << 1;
/// POST code and I/O delay.
const POST: u16 = 0x80;
/// Ports 80h and 92h; claim [`SystemPorts::RANGES`] with `Width::W8`.
pub struct SystemPorts {
    // wiring
    control: Arc<dyn MachineControl>,
    a20: Arc<A20Gate>,
    // guest-visible state
    post: u8,
    port_a: u8,
}

impl SystemPorts {
    /// (first port, count) of the ranges to claim.
    pub const RANGES: [(Port, u32); 2] = [(Port(POST), 1), (Port(PORT_A), 1)];

    /// The ports, with A20 under control of `a20`.
    pub fn new(control: Arc<dyn MachineControl>, a20: Arc<A20Gate>) -> SystemPorts {
        SystemPorts { control, a20, post: 0, port_a: 0 }
    }

    /// The last POST code written.
    pub fn post_code(&self) -> u8 {
        self.post
    }

    fn write_port_a(&mut self, value: u8) {
        let reset = value & PORT_A_RESET != 0 && self.port_a & PORT_A_RESET == 0;
        self.port_a = value;
        self.a20.set(A20Source::Port92, value & PORT_A_A20 != 0);
        if reset {
            self.control.reset("port 92h");
        }
    }
}

impl Snapshot for SystemPorts {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        let SystemPorts { control: _, a20, post, port_a } = self;
        a20.shared_state(s)?;
        s.field("post", post)?;
        s.field("port_a", port_a)
    }
}

impl Inspect for SystemPorts {
    fn inspect(&self, field: &mut dyn FnMut(&str, &dyn Display)) {
        field("post", &format_args!("{:02x}", self.post));
        field("port_a", &format_args!("{:02x}", self.port_a));
        field("a20", &self.a20.is_enabled());
    }
}

impl Device for SystemPorts {
    fn label(&self) -> &str {
        "system-ports"
    }

    fn reset(&mut self, _kind: ResetKind) {
        self.port_a = 0;
        self.a20.set(A20Source::Port92, false);
    }

    fn as_snapshot(&mut self) -> Option<&mut dyn Snapshot> {
        Some(self)
    }

    fn as_pio(&mut self) -> Option<&mut dyn PioDevice> {
        Some(self)
    }
}

impl PioDevice for SystemPorts {
    fn port_in(&mut self, port: Port, _width: Width) -> u32 {
        match port.0 {
            POST => self.post.into(),
            PORT_A => (self.port_a & !PORT_A_A20
                | if self.a20.is_set(A20Source::Port92) { PORT_A_A20 } else { 0 })
            .into(),
            _ => 0xFF,
        }
    }

    fn port_out(&mut self, port: Port, _width: Width, value: u32) {
        match port.0 {
            POST => self.post = value as u8,
            PORT_A => self.write_port_a(value as u8),
            _ => {}
        }
    }
}

/// Where the debug console's bytes go; must not block.
pub type ByteSink = Box<dyn FnMut(&[u8]) + Send>;

/// The debug console: bytes written to its port appear outside; it reads as its own port number (E9h).
pub struct DebugConsole {
    sink: ByteSink,
    line: Vec<u8>,
}

impl DebugConsole {
    /// (first port, count) of the range to claim, with `Width::W8`.
    pub const RANGE: (Port, u32) = (Port(0xE9), 1);
    const LINE_MAX: usize = 512;

    /// A console that hands whole lines (or 512 bytes) to `sink`.
    pub fn new(sink: ByteSink) -> DebugConsole {
        DebugConsole { sink, line: Vec::new() }
    }

    /// Hands over what is buffered.
    pub fn flush(&mut self) {
        if !self.line.is_empty() {
            (self.sink)(&self.line);
            self.line.clear();
        }
    }
}

crate::snapshot!(DebugConsole { line | sink });

impl Inspect for DebugConsole {
    fn inspect(&self, field: &mut dyn FnMut(&str, &dyn Display)) {
        field("buffered", &self.line.len());
    }
}

impl Device for DebugConsole {
    fn label(&self) -> &str {
        "debug-console"
    }

    fn reset(&mut self, _kind: ResetKind) {
        self.flush();
    }

    fn as_snapshot(&mut self) -> Option<&mut dyn Snapshot> {
        Some(self)
    }

    fn as_pio(&mut self) -> Option<&mut dyn PioDevice> {
        Some(self)
    }
}

impl PioDevice for DebugConsole {
    fn port_in(&mut self, _port: Port, _width: Width) -> u32 {
        0xE9
    }

    fn port_out(&mut self, _port: Port, _width: Width, value: u32) {
        self.line.push(value as u8);
        if value as u8 == b'\n' || self.line.len() >= Self::LINE_MAX {
            self.flush();
        }
    }
}

impl Drop for DebugConsole {
    fn drop(&mut self) {
        self.flush();
    }
}

/// The pins between the processor and the coprocessor error latch (82371SB, FERR#, IGNNE# and the CERR register): FERR#
/// going up raises IRQ 13; a write to the register lowers it, and drives IGNNE# for as long as FERR# stays up.
pub struct CoprocessorPins {
    irq: IrqLine,
    ferr: AtomicBool,
    ignne: AtomicBool,
}

impl CoprocessorPins {
    /// A latch before `irq`.
    pub fn new(irq: IrqLine) -> CoprocessorPins {
        CoprocessorPins { irq, ferr: AtomicBool::new(false), ignne: AtomicBool::new(false) }
    }

    /// The processor drives FERR#.
    pub fn set_ferr(&self, up: bool) {
        if self.ferr.swap(up, Ordering::SeqCst) != up {
            if up {
                self.irq.set(true);
            } else {
                self.ignne.store(false, Ordering::SeqCst);
            }
        }
    }

    /// Whether IGNNE# is driven.
    pub fn ignne(&self) -> bool {
        self.ignne.load(Ordering::SeqCst)
    }

    fn written(&self) {
        self.irq.set(false);
        self.ignne.store(self.ferr.load(Ordering::SeqCst), Ordering::SeqCst);
    }

    fn state(&self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        let CoprocessorPins { irq, ferr, ignne } = self;
        irq.shared_state(s)?;
        for pin in [ferr, ignne] {
            let mut up = pin.load(Ordering::SeqCst);
            up.state(s)?;
            pin.store(up, Ordering::SeqCst);
        }
        Ok(())
    }

    fn reset(&self) {
        self.irq.set(false);
        self.ferr.store(false, Ordering::SeqCst);
        self.ignne.store(false, Ordering::SeqCst);
    }
}

/// The CERR register, at ports F0h and F1h. Claim [`CoprocessorError::RANGE`] with `Width::W8`.
pub struct CoprocessorError {
    pins: Arc<CoprocessorPins>,
}

impl CoprocessorError {
    /// (first port, count) of the range to claim.
    pub const RANGE: (Port, u32) = (Port(0xF0), 2);

    /// The register behind `pins`.
    pub fn new(pins: Arc<CoprocessorPins>) -> CoprocessorError {
        CoprocessorError { pins }
    }
}

impl Snapshot for CoprocessorError {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        self.pins.state(s)
    }
}

impl Inspect for CoprocessorError {
    fn inspect(&self, field: &mut dyn FnMut(&str, &dyn Display)) {
        field("irq13", &self.pins.irq.is_high());
        field("ferr", &self.pins.ferr.load(Ordering::SeqCst));
        field("ignne", &self.pins.ignne());
    }
}

impl Device for CoprocessorError {
    fn label(&self) -> &str {
        "coprocessor-error"
    }

    fn reset(&mut self, _kind: ResetKind) {
        self.pins.reset();
    }

    fn as_snapshot(&mut self) -> Option<&mut dyn Snapshot> {
        Some(self)
    }

    fn as_pio(&mut self) -> Option<&mut dyn PioDevice> {
        Some(self)
    }
}

impl PioDevice for CoprocessorError {
    fn port_in(&mut self, _port: Port, _width: Width) -> u32 {
        0xFF // write-only
    }

    fn port_out(&mut self, _port: Port, _width: Width, _value: u32) {
        self.pins.written();
    }
}

/// The debug-exit port: a write ends the run with the value; claim 4 ports with `Width::W32`.
pub struct DebugExit {
    control: Arc<dyn MachineControl>,
}

impl DebugExit {
    /// Number of ports to claim.
    pub const PORTS: u32 = 4;

    /// A port that reports to `control`.
    pub fn new(control: Arc<dyn MachineControl>) -> DebugExit {
        DebugExit { control }
    }
}

crate::snapshot!(DebugExit { | control });

impl Inspect for DebugExit {
    fn inspect(&self, _field: &mut dyn FnMut(&str, &dyn Display)) {}
}

impl Device for DebugExit {
    fn label(&self) -> &str {
        "debug-exit"
    }

    fn reset(&mut self, _kind: ResetKind) {}

    fn as_snapshot(&mut self) -> Option<&mut dyn Snapshot> {
        Some(self)
    }

    fn as_pio(&mut self) -> Option<&mut dyn PioDevice> {
        Some(self)
    }
}

impl PioDevice for DebugExit {
    fn port_in(&mut self, _port: Port, width: Width) -> u32 {
        width.mask() as u32 // nothing to read: open bus
    }

    fn port_out(&mut self, _port: Port, _width: Width, value: u32) {
        self.control.debug_exit(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::RecordedControl;
    use std::sync::Mutex;

    #[test]
    fn resets_are_edges_and_a20_has_two_sources() {
        let control = Arc::new(RecordedControl::default());
        let a20 = A20Gate::new(control.clone());
        let mut ports = SystemPorts::new(control.clone(), a20.clone());
        assert!(a20.is_enabled(), "after power-on");
        a20.set(A20Source::KeyboardController, false);
        ports.port_out(Port(0x92), Width::W8, 2);
        a20.set(A20Source::KeyboardController, true);
        ports.port_out(Port(0x92), Width::W8, 0);
        a20.set(A20Source::KeyboardController, false);
        assert_eq!(control.take(), ["a20 false", "a20 true", "a20 false"]);
        for value in [0, 1, 1] {
            ports.port_out(Port(0x92), Width::W8, value);
        }
        assert_eq!(control.take(), ["reset port 92h"]);
        ports.port_out(Port(0x80), Width::W8, 0x55);
        assert_eq!(ports.post_code(), 0x55);
    }

    /// 82371SB, FERR#, IGNNE# and CERR.
    #[test]
    fn coprocessor_errors() {
        let pins = Arc::new(CoprocessorPins::new(IrqLine::unconnected()));
        let mut latch = CoprocessorError::new(pins.clone());
        let state = || (pins.irq.is_high(), pins.ignne());
        latch.port_out(Port(0xF0), Width::W8, 0);
        assert_eq!(state(), (false, false), "IGNNE# needs FERR#");
        pins.set_ferr(true);
        assert_eq!(latch.port_in(Port(0xF0), Width::W8), 0xFF);
        assert_eq!(state(), (true, false), "until the register is written");
        latch.port_out(Port(0xF0), Width::W8, 0);
        assert_eq!(state(), (false, true));
        pins.set_ferr(true);
        assert_eq!(state(), (false, true), "only the edge of FERR# counts");
        pins.set_ferr(false);
        assert_eq!(state(), (false, false), "IGNNE# falls with FERR#");
        // The handler clears the error first.
        pins.set_ferr(true);
        pins.set_ferr(false);
        assert_eq!(state(), (true, false), "IRQ 13 is latched");
        latch.port_out(Port(0xF1), Width::W8, 0);
        assert_eq!(state(), (false, false));
        pins.set_ferr(true);
        latch.port_out(Port(0xF0), Width::W8, 0);
        pins.set_ferr(true);
        latch.reset(ResetKind::PowerOn);
        assert_eq!(state(), (false, false));
    }

    #[test]
    fn debug_console_gives_lines_and_exit_gives_the_value() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        let mut console = DebugConsole::new(Box::new(move |b| log.lock().unwrap().push(b.to_vec())));
        for b in b"hi\nyou" {
            console.port_out(Port(0xE9), Width::W8, (*b).into());
        }
        assert_eq!(console.port_in(Port(0xE9), Width::W8), 0xE9);
        drop(console);
        assert_eq!(*seen.lock().unwrap(), [b"hi\n".to_vec(), b"you".to_vec()]);
        let control = Arc::new(RecordedControl::default());
        DebugExit::new(control.clone()).port_out(Port(0x501), Width::W32, 21);
        assert_eq!(control.take(), ["exit 21"]);
    }
}

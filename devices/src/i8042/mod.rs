//! The keyboard controller (8042) with an MF2 keyboard and, if the machine has one, a PS/2 mouse.
//!
//! A missing mouse answers as an unplugged one does: RESEND with the timeout bit, so that probing ends at once.

mod ps2;
pub mod spec;

#[cfg(test)]
mod tests;

use crate::control::{A20Gate, A20Source, MachineControl};
use crate::device::{Device, Inspect, PioDevice, ResetKind};
use crate::irq::IrqLine;
use crate::snapshot::Snapshot;
use paravane_memory::{Port, Width};
use ps2::{Keyboard, Mouse};
use spec::*;
use std::collections::VecDeque;
use std::fmt::Display;
use std::sync::Arc;

/// How the controller is built into the machine.
pub struct I8042Wiring {
    /// IRQ 1.
    pub keyboard_irq: IrqLine,
    /// IRQ 12.
    pub aux_irq: IrqLine,
    /// The reset line.
    pub control: Arc<dyn MachineControl>,
    /// A20.
    pub a20: Arc<A20Gate>,
    /// Whether a mouse is plugged in.
    pub mouse: bool,
}

/// Who put a byte into the output buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Origin {
    #[default]
    Controller,
    Keyboard,
    Aux,
}

#[derive(Clone, Copy, Debug, Default)]
struct Output {
    byte: u8,
    from: Origin,
    timeout: bool,
}

/// Bytes a device keeps while the output buffer is full.
const QUEUE: usize = 16;

/// The controller; claim [`I8042::RANGES`] with `Width::W8`.
pub struct I8042 {
    // wiring
    wiring: I8042Wiring,
    // guest-visible state
    keyboard: Keyboard,
    mouse: Option<Mouse>,
    keys: VecDeque<u8>,
    moves: VecDeque<u8>,
    answers: VecDeque<Output>,
    buffer: Option<Output>,
    /// What port 60h reads while the buffer is empty.
    last: u8,
    released: bool,
    status: u8,
    ram: [u8; 32],
    /// The controller command whose data byte comes next.
    expects: Option<u8>,
}

impl I8042 {
    /// (first port, count) of the ranges to claim.
    pub const RANGES: [(Port, u32); 2] = [(Port(DATA), 1), (Port(STATUS), 1)];

    /// A controller as a BIOS that did its self-test leaves it: interrupts off, translation on.
    pub fn new(wiring: I8042Wiring) -> I8042 {
        let mouse = wiring.mouse.then(Mouse::new);
        let mut ram = [0; 32];
        ram[0] = CTR_SYS | CTR_TRANSLATE;
        I8042 {
            wiring,
            keyboard: Keyboard::new(),
            mouse,
            keys: VecDeque::with_capacity(QUEUE),
            moves: VecDeque::with_capacity(QUEUE),
            answers: VecDeque::with_capacity(QUEUE),
            buffer: None,
            last: 0,
            released: false,
            status: STS_SYS | STS_UNLOCKED,
            ram,
            expects: None,
        }
    }

    /// Types: scan codes of set 2, whole or not at all; returns whether they were taken.
    pub fn press(&mut self, set2: &[u8]) -> bool {
        if !self.keyboard.scanning || self.keys.len() + set2.len() > QUEUE {
            return false;
        }
        self.keys.extend(set2);
        self.refill();
        true
    }

    /// Moves the mouse: one packet, whole or not at all; returns whether it was taken.
    pub fn move_mouse(&mut self, packet: [u8; 3]) -> bool {
        let reporting = self.mouse.as_ref().is_some_and(|m| m.reporting);
        if !reporting || self.moves.len() + packet.len() > QUEUE {
            return false;
        }
        self.moves.extend(packet);
        self.refill();
        true
    }

    fn ctr(&self) -> u8 {
        self.ram[0]
    }

    /// Fills the output buffer from whoever has something: controller, keyboard, auxiliary device.
    fn refill(&mut self) {
        while self.buffer.is_none() {
            let next = if let Some(answer) = self.answers.pop_front() {
                Some(answer)
            } else if self.ctr() & CTR_KBD_OFF == 0 && !self.keys.is_empty() {
                match self.next_key() {
                    Some(byte) => Some(Output { byte, from: Origin::Keyboard, timeout: false }),
                    None => continue,
                }
            } else if self.ctr() & CTR_AUX_OFF == 0 {
                self.moves.pop_front().map(|byte| Output { byte, from: Origin::Aux, timeout: false })
            } else {
                None
            };
            if next.is_none() {
                break;
            }
            self.buffer = next;
        }
        self.drive_irqs();
    }

    /// The next keyboard byte after translation; a release prefix is swallowed by it.
    fn next_key(&mut self) -> Option<u8> {
        let byte = self.keys.pop_front()?;
        if self.ctr() & CTR_TRANSLATE == 0 {
            return Some(byte);
        }
        if byte == 0xF0 {
            self.released = true;
            return None;
        }
        let release = if std::mem::take(&mut self.released) { 0x80 } else { 0 };
        Some(SET2_TO_SET1.get(usize::from(byte)).copied().unwrap_or(byte) | release)
    }

    fn drive_irqs(&mut self) {
        let from = self.buffer.map(|b| b.from);
        let aux = from == Some(Origin::Aux);
        let keyboard = matches!(from, Some(Origin::Keyboard | Origin::Controller));
        self.wiring.keyboard_irq.set(keyboard && self.ctr() & CTR_KBD_INT != 0);
        self.wiring.aux_irq.set(aux && self.ctr() & CTR_AUX_INT != 0);
    }

    /// A controller answer; it overtakes what the devices have queued.
    fn answer(&mut self, byte: u8) {
        self.put(Output { byte, from: Origin::Controller, timeout: false });
    }

    fn put(&mut self, output: Output) {
        if self.answers.len() < QUEUE {
            self.answers.push_back(output);
        }
        self.refill();
    }

    fn status(&self) -> u8 {
        let mut s = self.status;
        if let Some(output) = self.buffer {
            s |= STS_OBF;
            s |= if output.from == Origin::Aux { STS_AUX } else { 0 };
            s |= if output.timeout { STS_TIMEOUT } else { 0 };
        }
        s
    }

    fn read_data(&mut self) -> u8 {
        if let Some(output) = self.buffer.take() {
            self.last = output.byte;
            // Both lines fall, so that a byte that follows at once is a new edge.
            self.drive_irqs();
            self.refill();
        }
        self.last
    }

    fn output_port(&self) -> u8 {
        let from = self.buffer.map(|b| b.from);
        let a20 = if self.wiring.a20.is_set(A20Source::KeyboardController) { OUT_A20 } else { 0 };
        let keyboard = if from.is_some_and(|f| f != Origin::Aux) { OUT_KBD_INT } else { 0 };
        let aux = if from == Some(Origin::Aux) { OUT_AUX_INT } else { 0 };
        0xC0 | OUT_RESET | a20 | keyboard | aux
    }

    fn write_output_port(&mut self, value: u8) {
        self.wiring.a20.set(A20Source::KeyboardController, value & OUT_A20 != 0);
        if value & OUT_RESET == 0 {
            self.wiring.control.reset("keyboard controller output port");
        }
    }

    fn command(&mut self, command: u8) {
        self.status |= STS_COMMAND;
        self.expects = None;
        match command {
            0x20..=0x3F => self.answer(self.ram[usize::from(command & 0x1F)]),
            0x60..=0x7F | 0xD1..=0xD4 => self.expects = Some(command),
            0xA1 => self.answer(0),    // firmware version
            0xA4 => self.answer(0xF1), // no password installed
            0xA7 => self.set_ctr(self.ctr() | CTR_AUX_OFF),
            0xA8 => self.set_ctr(self.ctr() & !CTR_AUX_OFF),
            0xA9 | 0xAB => self.answer(0), // port tests: no error
            0xAA => self.self_test(),
            0xAD => self.set_ctr(self.ctr() | CTR_KBD_OFF),
            0xAE => self.set_ctr(self.ctr() & !CTR_KBD_OFF),
            0xC0 => self.answer(0xA0), // input port: not locked, color display
            0xD0 => self.answer(self.output_port()),
            0xDD => self.wiring.a20.set(A20Source::KeyboardController, false),
            0xDF => self.wiring.a20.set(A20Source::KeyboardController, true),
            0xE0 => self.answer(0), // test inputs
            0xF0..=0xFF if command & OUT_RESET == 0 => {
                self.wiring.control.reset("keyboard controller reset pulse");
            }
            _ => {} // pulses of unconnected lines, and commands that no AT controller has
        }
    }

    fn self_test(&mut self) {
        self.answers.clear();
        self.buffer = None;
        self.status |= STS_SYS;
        self.ram[0] = CTR_SYS | CTR_KBD_OFF | CTR_AUX_OFF | CTR_TRANSLATE;
        self.answer(0x55);
    }

    fn set_ctr(&mut self, value: u8) {
        self.ram[0] = value;
        self.refill();
    }

    fn write_data(&mut self, value: u8) {
        self.status &= !STS_COMMAND;
        match self.expects.take() {
            Some(0x60) => {
                self.status = self.status & !STS_SYS | value & CTR_SYS;
                self.set_ctr(value & 0x7F);
            }
            Some(command @ 0x61..=0x7F) => self.ram[usize::from(command & 0x1F)] = value,
            Some(0xD1) => self.write_output_port(value),
            Some(0xD2) => self.put(Output { byte: value, from: Origin::Keyboard, timeout: false }),
            Some(0xD3) => self.put(Output { byte: value, from: Origin::Aux, timeout: false }),
            Some(0xD4) => self.write_aux(value),
            _ => self.write_keyboard(value),
        }
    }

    /// A byte for the keyboard also switches its clock on.
    fn write_keyboard(&mut self, value: u8) {
        self.ram[0] &= !CTR_KBD_OFF;
        if matches!(value, 0xF4 | 0xF5 | 0xF6 | 0xFF) {
            self.keys.clear();
            self.released = false;
        }
        let answer = self.keyboard.write(value);
        if self.keys.len() + answer.len() > QUEUE {
            self.keys.clear();
        }
        // Answers come before keys typed earlier, as the keyboard sends them first.
        answer.into_iter().rev().for_each(|b| self.keys.push_front(b));
        self.refill();
    }

    fn write_aux(&mut self, value: u8) {
        self.ram[0] &= !CTR_AUX_OFF;
        let Some(mouse) = &mut self.mouse else {
            self.put(Output { byte: RESEND, from: Origin::Aux, timeout: true });
            return;
        };
        if matches!(value, 0xF4 | 0xF5 | 0xF6 | 0xFF) {
            self.moves.clear();
        }
        let answer = mouse.write(value);
        if self.moves.len() + answer.len() > QUEUE {
            self.moves.clear();
        }
        answer.into_iter().rev().for_each(|b| self.moves.push_front(b));
        self.refill();
    }
}

crate::snapshot_enum!(Origin { Controller, Keyboard, Aux });
crate::snapshot!(Output { byte, from, timeout });
crate::snapshot!(I8042Wiring { keyboard_irq, aux_irq | control, a20, mouse });
crate::snapshot!(I8042 {
    wiring,
    keyboard,
    mouse,
    keys,
    moves,
    answers,
    buffer,
    last,
    released,
    status,
    ram,
    expects
});

impl Inspect for I8042 {
    fn inspect(&self, field: &mut dyn FnMut(&str, &dyn Display)) {
        field("status", &format_args!("{:02x}", self.status()));
        field("command_byte", &format_args!("{:02x}", self.ctr()));
        field("keyboard", &format_args!("{:?}", self.keyboard));
        field("mouse", &format_args!("{:?}", self.mouse));
        field("queued", &(self.keys.len() + self.moves.len() + self.answers.len()));
    }
}

impl Device for I8042 {
    fn label(&self) -> &str {
        "i8042"
    }

    fn reset(&mut self, _kind: ResetKind) {
        self.keyboard = Keyboard::new();
        self.mouse = self.wiring.mouse.then(Mouse::new);
        self.keys.clear();
        self.moves.clear();
        self.answers.clear();
        (self.buffer, self.last, self.released, self.expects) = (None, 0, false, None);
        self.status = STS_SYS | STS_UNLOCKED;
        self.ram = [0; 32];
        self.ram[0] = CTR_SYS | CTR_TRANSLATE;
        self.wiring.a20.set(A20Source::KeyboardController, true); // the output port's pins reset high
        self.drive_irqs();
    }

    fn as_snapshot(&mut self) -> Option<&mut dyn Snapshot> {
        Some(self)
    }

    fn as_pio(&mut self) -> Option<&mut dyn PioDevice> {
        Some(self)
    }
}

impl PioDevice for I8042 {
    fn port_in(&mut self, port: Port, _width: Width) -> u32 {
        match port.0 {
            DATA => self.read_data().into(),
            _ => self.status().into(),
        }
    }

    fn port_out(&mut self, port: Port, _width: Width, value: u32) {
        match port.0 {
            DATA => self.write_data(value as u8),
            _ => self.command(value as u8),
        }
    }
}

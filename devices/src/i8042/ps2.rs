//! The devices behind the controller: an MF2 keyboard and a three-button mouse (IBM PS/2 technical reference,
//! "101-key keyboard", "Mouse").

use super::spec::{ACK, BAT_OK, RESEND};

/// What a device answers, in order.
pub(super) type Answer = Vec<u8>;

/// The keyboard.
#[derive(Debug)]
pub(super) struct Keyboard {
    pub(super) scanning: bool,
    leds: u8,
    set: u8,
    /// The command whose parameter comes next.
    expects: Option<u8>,
    last: u8,
}

crate::snapshot!(Keyboard { scanning, leds, set, expects, last });

impl Keyboard {
    pub(super) fn new() -> Keyboard {
        Keyboard { scanning: true, leds: 0, set: 2, expects: None, last: ACK }
    }

    /// A byte from the system.
    pub(super) fn write(&mut self, value: u8) -> Answer {
        let answer = match self.expects.take() {
            Some(command) if value < 0x80 => self.parameter(command, value),
            _ => self.command(value),
        };
        if let Some(&last) = answer.last() {
            self.last = last;
        }
        answer
    }

    fn parameter(&mut self, command: u8, value: u8) -> Answer {
        match (command, value) {
            (0xED, _) => self.leds = value & 7,
            (0xF0, 0) => return vec![ACK, self.set],
            (0xF0, 1..=3) => self.set = value,
            (0xF0, _) => return vec![RESEND],
            _ => {} // F3: the repeat rate belongs to whoever types
        }
        vec![ACK]
    }

    fn command(&mut self, value: u8) -> Answer {
        match value {
            0xED | 0xF0 | 0xF3 => self.expects = Some(value),
            0xEE => return vec![0xEE],
            0xF2 => return vec![ACK, 0xAB, 0x83],
            0xF4 => self.scanning = true,
            0xF5 => {
                *self = Keyboard { scanning: false, leds: self.leds, ..Keyboard::new() };
            }
            0xF6 => *self = Keyboard { leds: self.leds, ..Keyboard::new() },
            0xF7..=0xFA => {} // typematic and make/break of set 3
            0xFE => return vec![self.last],
            0xFF => {
                *self = Keyboard::new();
                return vec![ACK, BAT_OK];
            }
            _ => return vec![RESEND],
        }
        vec![ACK]
    }
}

/// The mouse.
#[derive(Debug)]
pub(super) struct Mouse {
    pub(super) reporting: bool,
    remote: bool,
    wrap: bool,
    scaling: bool,
    rate: u8,
    resolution: u8,
    expects: Option<u8>,
}

crate::snapshot!(Mouse { reporting, remote, wrap, scaling, rate, resolution, expects });

impl Default for Mouse {
    fn default() -> Mouse {
        Mouse::new()
    }
}

impl Mouse {
    pub(super) fn new() -> Mouse {
        Mouse {
            reporting: false,
            remote: false,
            wrap: false,
            scaling: false,
            rate: 100,
            resolution: 2,
            expects: None,
        }
    }

    /// A byte from the system.
    pub(super) fn write(&mut self, value: u8) -> Answer {
        if let Some(command) = self.expects.take() {
            match command {
                0xF3 => self.rate = value,
                _ => self.resolution = value & 3,
            }
            return vec![ACK];
        }
        if self.wrap && !matches!(value, 0xEC | 0xFF) {
            return vec![value];
        }
        self.command(value)
    }

    fn command(&mut self, value: u8) -> Answer {
        match value {
            0xE6 => self.scaling = false,
            0xE7 => self.scaling = true,
            0xE8 | 0xF3 => self.expects = Some(value),
            0xE9 => return vec![ACK, self.status(), self.resolution, self.rate],
            0xEA => self.remote = false,
            0xEB => return vec![ACK, 0x08, 0, 0], // no movement, no button
            0xEC => self.wrap = false,
            0xEE => self.wrap = true,
            0xF0 => self.remote = true,
            0xF2 => return vec![ACK, 0x00],
            0xF4 => self.reporting = true,
            0xF5 => self.reporting = false,
            0xF6 => *self = Mouse::new(),
            0xFF => {
                *self = Mouse::new();
                return vec![ACK, BAT_OK, 0x00];
            }
            _ => return vec![RESEND],
        }
        vec![ACK]
    }

    fn status(&self) -> u8 {
        u8::from(self.remote) << 6 | u8::from(self.reporting) << 5 | u8::from(self.scaling) << 4
    }
}

//! The user's terminal: raw while the guest has it, as it was on every way out.

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};
use std::io;
use std::sync::{Mutex, Once};

/// How the terminal was before. A process has one terminal, and the panic hook and the signal path must find it:
/// the only changing static of the project.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// The terminal is raw while this lives.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Makes the terminal on standard input raw; `None` if there is none.
    pub fn enter() -> io::Result<Option<RawMode>> {
        let stdin = io::stdin();
        if !isatty(&stdin) {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        restore_on_panic();
        *BEFORE.lock().expect("terminal state") = Some(before);
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Some(RawMode(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal back as it was; harmless when nothing was changed, or a second time.
pub fn restore() {
    let Ok(mut before) = BEFORE.try_lock() else { return };
    if let Some(before) = before.take() {
        // Nothing better can be done on the way out if the terminal is gone.
        let _gone = tcsetattr(io::stdin(), OptionalActions::Now, &before);
    }
}

fn restore_on_panic() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let next = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            next(info);
        }));
    });
}

/// What a keystroke means to us.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Key {
    /// A byte for the guest.
    Guest(u8),
    /// Ctrl-A x.
    Quit,
    /// Ctrl-A h.
    Help,
}

const CTRL_A: u8 = 1;

/// The text for Ctrl-A h, for a raw terminal.
pub const HELP: &str = "\r\n\
Ctrl-A x       quit\r\n\
Ctrl-A h       this help\r\n\
Ctrl-A Ctrl-A  send Ctrl-A to the guest\r\n";

/// Finds our own keys in what is typed.
#[derive(Default, Debug)]
pub struct Keys {
    escaped: bool,
}

impl Keys {
    /// The meaning of the next byte, if it is complete. Ctrl-A and a key without a meaning are dropped.
    pub fn next(&mut self, byte: u8) -> Option<Key> {
        match (std::mem::take(&mut self.escaped), byte) {
            (false, CTRL_A) => {
                self.escaped = true;
                None
            }
            (false, b) => Some(Key::Guest(b)),
            (true, CTRL_A | b'a') => Some(Key::Guest(CTRL_A)),
            (true, b'x' | b'X') => Some(Key::Quit),
            (true, b'h' | b'H' | b'?') => Some(Key::Help),
            (true, _) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_keys_and_the_guests() {
        let mut keys = Keys::default();
        let seen: Vec<Key> = b"a\x01\x01b\x01h\x01z\x01x".iter().filter_map(|&b| keys.next(b)).collect();
        let expected = [Key::Guest(b'a'), Key::Guest(1), Key::Guest(b'b'), Key::Help, Key::Quit];
        assert_eq!(seen, expected);
    }
}

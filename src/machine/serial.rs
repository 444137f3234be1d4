//! The two ends of a serial line: what a UART writes to and reads from, and what the host puts there.

use paravane_devices::uart::{CharSink, CharSource};
use paravane_devices::{Snapshot, StateError, StateStream};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};

/// Bytes typed ahead that are kept.
const CAPACITY: usize = 4096;

type Ready = Box<dyn Fn() + Send + Sync>;

#[derive(Default)]
struct State {
    waiting: VecDeque<u8>,
    ready: Option<Arc<Ready>>,
}

/// Bytes on their way into the guest.
#[derive(Clone, Default)]
pub struct SerialInput(Arc<(Mutex<State>, Condvar)>);

impl SerialInput {
    /// Appends `bytes`, waiting for room where the guest is slow to read.
    pub fn push(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let mut state = self.0.0.lock().expect("serial input");
            while state.waiting.len() >= CAPACITY {
                state = self.0.1.wait(state).expect("serial input");
            }
            let n = bytes.len().min(CAPACITY - state.waiting.len());
            state.waiting.extend(&bytes[..n]);
            drop(state);
            self.tell();
            bytes = &bytes[n..];
        }
    }

    /// Appends `bytes` as far as there is room: what a person types is lost at a guest that does not listen.
    pub fn offer(&self, bytes: &[u8]) {
        let mut state = self.0.0.lock().expect("serial input");
        let room = CAPACITY - state.waiting.len().min(CAPACITY);
        state.waiting.extend(bytes.iter().take(room));
        drop(state);
        self.tell();
    }

    /// Takes up to `buf.len()` bytes; returns how many.
    pub fn take(&self, buf: &mut [u8]) -> usize {
        let mut state = self.0.0.lock().expect("serial input");
        let n = buf.len().min(state.waiting.len());
        for (slot, byte) in buf.iter_mut().zip(state.waiting.drain(..n)) {
            *slot = byte;
        }
        if n > 0 {
            self.0.1.notify_all();
        }
        n
    }

    /// How many more bytes are kept.
    pub fn room(&self) -> usize {
        CAPACITY.saturating_sub(self.0.0.lock().expect("serial input").waiting.len())
    }

    /// Walks over what is waiting.
    pub(crate) fn shared_state(&self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        self.0.0.lock().expect("serial input").waiting.state(s)
    }

    /// Calls `ready` whenever bytes arrived, with no lock held.
    pub(super) fn on_ready(&self, ready: impl Fn() + Send + Sync + 'static) {
        self.0.0.lock().expect("serial input").ready = Some(Arc::new(Box::new(ready)));
    }

    fn tell(&self) {
        let ready = self.0.0.lock().expect("serial input").ready.clone();
        if let Some(ready) = ready {
            ready();
        }
    }
}

impl CharSource for SerialInput {
    fn read(&mut self, buf: &mut [u8]) -> usize {
        self.take(buf)
    }
}

/// The host's end of a serial port.
pub struct SerialEnd {
    pub(super) output: Box<dyn CharSink>,
    pub(super) input: SerialInput,
}

impl SerialEnd {
    /// Output goes to `output`, input comes from `input`.
    pub fn new(output: impl CharSink + 'static, input: SerialInput) -> SerialEnd {
        SerialEnd { output: Box::new(output), input }
    }

    /// Output only.
    pub fn sink(output: impl FnMut(&[u8]) + Send + 'static) -> SerialEnd {
        SerialEnd::new(output, SerialInput::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_in_order_and_the_guest_is_told() {
        let input = SerialInput::default();
        let told = Arc::new(Mutex::new(0));
        let count = Arc::clone(&told);
        input.on_ready(move || *count.lock().expect("count") += 1);
        input.push(b"abc");
        input.offer(&[b'x'; 2 * CAPACITY]);
        let mut buf = [0; 4];
        assert_eq!((input.take(&mut buf), &buf), (4, b"abcx"));
        let mut rest = vec![0; 2 * CAPACITY];
        assert_eq!(input.take(&mut rest), CAPACITY - 4);
        assert_eq!(*told.lock().expect("count"), 2);
    }
}

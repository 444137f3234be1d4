//! The ends of a serial port in a run that can be repeated: input waits here until the timeline lets it in, and output that was shown
//! before is not shown again.

use super::journal::Journal;
use crate::machine::SerialInput;
use crate::run::Lifecycle;
use paravane_devices::uart::CharSink;
use paravane_devices::{Snapshot, StateError, StateStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How long a full host buffer is waited for at a time.
const WAIT: Duration = Duration::from_millis(1);

/// One serial port's gate.
pub struct SerialGate {
    /// What the host has for the guest.
    host: SerialInput,
    /// What the guest may read.
    guest: SerialInput,
    /// Bytes the guest has sent so far: state.
    sent: AtomicU64,
    /// Bytes that left paravane: no state.
    shown: AtomicU64,
}

impl SerialGate {
    /// A gate behind `host`.
    pub fn new(host: SerialInput) -> Arc<SerialGate> {
        let (sent, shown) = (AtomicU64::new(0), AtomicU64::new(0));
        Arc::new(SerialGate { host, guest: SerialInput::default(), sent, shown })
    }

    /// The guest's end of the input.
    pub fn guest(&self) -> &SerialInput {
        &self.guest
    }

    /// The host's end of the input.
    pub fn host(&self) -> &SerialInput {
        &self.host
    }

    /// The guest's output goes to `sink`, which is waited for: how fast the host reads makes no difference to the guest.
    pub fn sink(self: &Arc<Self>, sink: Box<dyn CharSink>, lifecycle: Lifecycle) -> Box<dyn CharSink> {
        Box::new(GatedSink { gate: Arc::clone(self), sink, lifecycle })
    }

    /// Takes what the host has, as far as the guest's end has room.
    pub(super) fn take(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.guest.room()];
        let n = self.host.take(&mut bytes);
        bytes.truncate(n);
        bytes
    }

    /// What the host says is not heard.
    pub(super) fn ignore(&self) {
        let mut bytes = [0; 256];
        while self.host.take(&mut bytes) > 0 {}
    }

    /// From now on everything that is sent is new.
    pub(super) fn forget_future(&self) {
        self.shown.store(self.sent.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Walks over what the guest has not read yet, and how much it sent.
    pub fn shared_state(&self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        let mut sent = self.sent.load(Ordering::Relaxed);
        sent.state(s)?;
        self.sent.store(sent, Ordering::Relaxed);
        self.guest.shared_state(s)
    }
}

struct GatedSink {
    gate: Arc<SerialGate>,
    sink: Box<dyn CharSink>,
    lifecycle: Lifecycle,
}

impl CharSink for GatedSink {
    fn write(&mut self, bytes: &[u8]) -> usize {
        let (sent, shown) = (&self.gate.sent, &self.gate.shown);
        let before = sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let old = shown.load(Ordering::Relaxed).saturating_sub(before).min(bytes.len() as u64);
        shown.fetch_max(before + bytes.len() as u64, Ordering::Relaxed);
        let mut new = &bytes[old as usize..];
        while !new.is_empty() && !self.lifecycle.user_wants_out() {
            let n = self.sink.write(new);
            new = &new[n.min(new.len())..];
            if n == 0 {
                std::thread::sleep(WAIT);
            }
        }
        bytes.len()
    }
}

/// What comes into a machine from outside, and when.
pub struct Outside {
    ports: Vec<Arc<SerialGate>>,
    journal: Mutex<Journal>,
}

impl Outside {
    /// Input through `ports`; nothing is recorded.
    pub fn new(ports: Vec<Arc<SerialGate>>) -> Outside {
        Outside { ports, journal: Mutex::default() }
    }

    /// The journal.
    pub(super) fn journal(&self) -> std::sync::MutexGuard<'_, Journal> {
        self.journal.lock().expect("journal")
    }

    /// The gates.
    pub(super) fn ports(&self) -> &[Arc<SerialGate>] {
        &self.ports
    }

    /// Between two slices: lets in what is due, by the journal or by the host.
    pub(crate) fn deliver(&self, at: super::Stamp) {
        let mut journal = self.journal();
        while let Some(input) = journal.due(at) {
            if let Some(port) = self.ports.get(input.port) {
                port.guest.offer(&input.bytes);
            }
        }
        for (number, port) in self.ports.iter().enumerate() {
            if !journal.is_live() {
                port.ignore();
                continue;
            }
            // What comes while the past is run again waits for the present.
            let bytes = if journal.is_present() { port.take() } else { Vec::new() };
            if !bytes.is_empty() {
                port.guest.offer(&bytes);
                journal.note(super::Input { at, port: number, bytes });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Stamp;
    use super::*;

    #[test]
    fn output_that_was_shown_is_not_shown_again() {
        let gate = SerialGate::new(SerialInput::default());
        let shown = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&shown);
        let sink = move |bytes: &[u8]| log.lock().expect("log").extend_from_slice(bytes);
        let mut sink = gate.sink(Box::new(sink), Lifecycle::new());
        sink.write(b"ab");
        let mut then = Vec::new();
        gate.shared_state(&mut StateStream::save(&mut then)).expect("saved");
        sink.write(b"cd");
        gate.shared_state(&mut StateStream::load(&then)).expect("loaded");
        sink.write(b"c");
        sink.write(b"def");
        assert_eq!(*shown.lock().expect("log"), b"abcdef");
    }

    #[test]
    fn input_comes_in_between_slices_and_again_at_the_same_time() {
        let gate = SerialGate::new(SerialInput::default());
        let outside = Outside::new(vec![Arc::clone(&gate)]);
        outside.journal().keep();
        gate.host().push(b"x");
        let mut buf = [0; 4];
        assert_eq!(gate.guest().take(&mut buf), 0, "not yet");
        let (one, two) = (Stamp { instructions: 5, ns: 7 }, Stamp { instructions: 9, ns: 12 });
        outside.deliver(one);
        gate.host().push(b"y");
        outside.deliver(two);
        assert_eq!((gate.guest().take(&mut buf), &buf[..2]), (2, &b"xy"[..]));
        // Back to the first: what came in there does so again; what the host says meanwhile waits for the present.
        outside.journal().rewind(one);
        gate.host().push(b"z");
        outside.deliver(one);
        assert_eq!((gate.guest().take(&mut buf), buf[0]), (1, b'x'));
        outside.deliver(Stamp { instructions: 8, ns: 11 });
        assert_eq!(gate.guest().take(&mut buf), 0);
        outside.deliver(two);
        assert_eq!((gate.guest().take(&mut buf), &buf[..2]), (2, &b"yz"[..]));
    }
}

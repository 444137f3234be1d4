//! Output of the guest on its way to a host file: handed over by the vCPU, written by a thread of its own.

use paravane_devices::uart::CharSink;
use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes that may wait; a guest that writes faster than the host reads finds its transmitter busy.
const CAPACITY: usize = 1 << 20;

#[derive(Default)]
struct State {
    waiting: VecDeque<u8>,
    /// The thread holds bytes it has not written yet.
    writing: bool,
    /// Nobody reads any more: everything is dropped.
    dead: bool,
    closed: bool,
}

struct Shared {
    state: Mutex<State>,
    /// There is something to write, or to end.
    work: Condvar,
    /// Something was written.
    written: Condvar,
}

/// A buffered output; ends its thread when dropped.
pub struct Output {
    handle: OutputHandle,
    thread: Option<JoinHandle<()>>,
}

/// What a device writes to.
#[derive(Clone)]
pub struct OutputHandle(Arc<Shared>);

impl Output {
    /// Starts a thread that writes to `sink`; `failed` is told the first error, after which everything is dropped.
    pub fn start(
        name: &str,
        mut sink: impl Write + Send + 'static,
        failed: impl FnOnce(io::Error) + Send + 'static,
    ) -> io::Result<Output> {
        let shared =
            Arc::new(Shared { state: Mutex::default(), work: Condvar::new(), written: Condvar::new() });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            if let Err(e) = of_thread.drain(&mut sink) {
                of_thread.die();
                failed(e);
            }
        })?;
        Ok(Output { handle: OutputHandle(shared), thread: Some(thread) })
    }

    /// The device's end.
    pub fn handle(&self) -> OutputHandle {
        self.handle.clone()
    }

    /// Waits until everything is written, for `limit` at most.
    pub fn flush(&self, limit: Duration) {
        let until = Instant::now() + limit;
        let shared = &self.handle.0;
        let mut state = shared.state.lock().expect("output");
        while state.writing || !state.waiting.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = shared.written.wait_timeout(state, left).expect("output").0;
        }
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.handle.0.state.lock().expect("output").closed = true;
        self.handle.0.work.notify_all();
        let stuck = self.handle.0.state.lock().expect("output").writing;
        if let Some(thread) = self.thread.take()
            && !stuck
        {
            let _panicked = thread.join();
        }
    }
}

impl OutputHandle {
    /// Appends as many of `bytes` as there is room for; returns how many.
    pub fn offer(&self, bytes: &[u8]) -> usize {
        let mut state = self.0.state.lock().expect("output");
        if state.dead {
            return bytes.len();
        }
        let n = bytes.len().min(CAPACITY - state.waiting.len().min(CAPACITY));
        let was_empty = state.waiting.is_empty();
        state.waiting.extend(&bytes[..n]);
        if was_empty && n > 0 {
            self.0.work.notify_one();
        }
        n
    }
}

impl CharSink for OutputHandle {
    fn write(&mut self, bytes: &[u8]) -> usize {
        self.offer(bytes)
    }
}

impl Shared {
    /// Nothing can be written any more.
    fn die(&self) {
        let mut state = self.state.lock().expect("output");
        state.dead = true;
        state.writing = false;
        state.waiting.clear();
        self.written.notify_all();
    }

    fn drain(&self, sink: &mut impl Write) -> io::Result<()> {
        let mut batch = Vec::new();
        loop {
            {
                let mut state = self.state.lock().expect("output");
                state.writing = false;
                self.written.notify_all();
                while state.waiting.is_empty() {
                    if state.closed {
                        return Ok(());
                    }
                    state = self.work.wait(state).expect("output");
                }
                batch.clear();
                batch.extend(state.waiting.drain(..));
                state.writing = true;
            }
            sink.write_all(&batch)?;
            sink.flush()?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};

    struct Gate(Receiver<()>, Sender<Vec<u8>>);

    impl Write for Gate {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.0.recv().map_err(|_| io::ErrorKind::BrokenPipe)?;
            self.1.send(buf.to_vec()).map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(buf.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_blocked_sink_blocks_nobody_and_what_does_not_fit_is_not_taken() {
        let ((open, gate), (sent, got)) = (channel(), channel());
        let output = Output::start("test", Gate(gate, sent), |_| ()).expect("thread");
        let handle = output.handle();
        assert_eq!(handle.offer(b"abc"), 3);
        assert_eq!(handle.offer(b"def"), 3);
        assert!(handle.offer(&vec![b'x'; 2 * CAPACITY]) <= CAPACITY);
        let mut all = Vec::new();
        while all.len() < 6 {
            open.send(()).expect("gate");
            all.extend(got.recv().expect("batch"));
        }
        assert_eq!(all[..6], *b"abcdef");
        (0..4).for_each(|_| open.send(()).expect("gate"));
        output.flush(Duration::from_secs(10));
    }

    #[test]
    fn after_an_error_output_is_dropped_and_told_once() {
        let ((open, gate), (sent, _got)) = (channel::<()>(), channel());
        drop(open);
        let (told, error) = channel();
        let failed = move |e: io::Error| told.send(e.kind()).expect("told");
        let output = Output::start("test", Gate(gate, sent), failed).expect("thread");
        output.handle().offer(b"x");
        assert_eq!(error.recv().expect("error"), io::ErrorKind::BrokenPipe);
        for _ in 0..3 {
            assert_eq!(output.handle().offer(&vec![0; CAPACITY]), CAPACITY);
        }
        output.flush(Duration::from_secs(10));
    }
}

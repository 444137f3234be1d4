//! Output of the guest on its way to a host file: handed over by the vCPU, written by a thread of its own.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes that may wait; a guest that writes faster than the host reads is held up here.
const CAPACITY: usize = 1 << 20;

#[derive(Default)]
struct State {
    waiting: VecDeque<u8>,
    /// The thread holds bytes it has not written yet.
    writing: bool,
    /// Nobody reads any more, or nobody cares: drop what does not fit.
    open_ended: bool,
    closed: bool,
}

struct Shared {
    state: Mutex<State>,
    /// There is something to write, or to end.
    work: Condvar,
    /// Something was written.
    room: Condvar,
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
        let shared = Arc::new(Shared { state: Mutex::default(), work: Condvar::new(), room: Condvar::new() });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            let result = of_thread.drain(&mut sink);
            of_thread.open_end();
            if let Err(e) = result {
                failed(e);
                // Nothing can be written any more: keep the buffer empty.
                let _never_fails = of_thread.drain(&mut io::sink());
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
            state = shared.room.wait_timeout(state, left).expect("output").0;
        }
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.handle.release();
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
    /// Appends `bytes`; waits while the buffer is full.
    pub fn push(&self, bytes: &[u8]) {
        let mut state = self.0.state.lock().expect("output");
        while state.waiting.len() + bytes.len() > CAPACITY && !state.open_ended {
            state = self.0.room.wait(state).expect("output");
        }
        if state.waiting.len() + bytes.len() > CAPACITY {
            return;
        }
        let was_empty = state.waiting.is_empty();
        state.waiting.extend(bytes);
        if was_empty {
            self.0.work.notify_one();
        }
    }

    /// From now on a full buffer drops what comes instead of holding up the guest.
    pub fn release(&self) {
        self.0.open_end();
    }
}

impl Shared {
    fn open_end(&self) {
        self.state.lock().expect("output").open_ended = true;
        self.room.notify_all();
    }

    fn drain(&self, sink: &mut impl Write) -> io::Result<()> {
        let mut batch = Vec::new();
        loop {
            {
                let mut state = self.state.lock().expect("output");
                state.writing = false;
                self.room.notify_all();
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
    fn a_blocked_sink_does_not_block_the_guest_until_the_buffer_is_full() {
        let ((open, gate), (sent, got)) = (channel(), channel());
        let output = Output::start("test", Gate(gate, sent), |_| ()).expect("thread");
        let handle = output.handle();
        handle.push(b"abc");
        handle.push(b"def");
        open.send(()).expect("gate");
        open.send(()).expect("gate");
        let mut all = got.recv().expect("first batch");
        if all.len() < 6 {
            all.extend(got.recv().expect("second batch"));
        }
        assert_eq!(all, b"abcdef");
        output.flush(Duration::from_secs(10));
    }

    #[test]
    fn after_an_error_output_is_dropped_and_told_once() {
        let ((open, gate), (sent, _got)) = (channel::<()>(), channel());
        drop(open);
        let (told, error) = channel();
        let output = Output::start("test", Gate(gate, sent), move |e| told.send(e.kind()).expect("told"))
            .expect("thread");
        output.handle().push(b"x");
        assert_eq!(error.recv().expect("error"), io::ErrorKind::BrokenPipe);
        for _ in 0..3 {
            output.handle().push(&vec![0; CAPACITY]);
        }
        output.flush(Duration::from_secs(10));
    }
}

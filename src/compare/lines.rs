//! Serial output as lines.

use std::sync::Mutex;

/// Longer lines are cut: a wild guest fills no memory.
const MAX_LINE: usize = 4096;

type OnLine = Box<dyn FnMut(&str) + Send>;

/// Collects bytes and calls back for every complete line.
pub(super) struct Lines(Mutex<(Vec<u8>, OnLine)>);

impl Lines {
    /// Calls `on_line` with each line, its end taken off.
    pub(super) fn new(on_line: impl FnMut(&str) + Send + 'static) -> Lines {
        Lines(Mutex::new((Vec::new(), Box::new(on_line))))
    }

    /// The guest wrote `bytes`.
    pub(super) fn push(&self, bytes: &[u8]) {
        let mut guard = self.0.lock().expect("lines");
        let (line, on_line) = &mut *guard;
        for &b in bytes {
            match b {
                b'\n' => {
                    on_line(String::from_utf8_lossy(line).trim_end_matches('\r'));
                    line.clear();
                }
                b if line.len() < MAX_LINE => line.push(b),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn lines_come_whole_and_bounded() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        let lines = Lines::new(move |l| log.lock().expect("log").push(l.len()));
        lines.push(b"ab");
        lines.push(b"c\r\n\nx");
        lines.push(&vec![b'y'; 10 * MAX_LINE]);
        lines.push(b"\n");
        assert_eq!(*seen.lock().expect("log"), [3, 0, MAX_LINE]);
    }
}

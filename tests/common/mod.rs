//! What whole-machine tests share: guests made by `cargo xtask guests`, and a running paravane.

#[allow(dead_code, reason = "not every test has a debugger")]
pub mod debugger;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// A kernel and its initial RAM disk.
pub struct Guest {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
}

/// The guest called `name` in guests/manifest.json.
#[allow(dead_code, reason = "not every test runs a guest of its own")]
pub fn guest(name: &str) -> Guest {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("guests");
    let missing = "guests/manifest.json is missing or incomplete: run `cargo xtask guests` first";
    let text = std::fs::read_to_string(dir.join("manifest.json")).expect(missing);
    let manifest: serde_json::Value = serde_json::from_str(&text).expect(missing);
    let file = |key| dir.join(manifest["guests"][name][key].as_str().expect(missing));
    Guest { kernel: file("kernel"), initrd: file("initrd") }
}

/// A directory of our own, removed afterwards.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Scratch {
        let dir = std::env::temp_dir().join(format!("paravane-test-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("scratch directory");
        Scratch(dir)
    }

    /// A sparse image of `size` bytes.
    #[allow(dead_code, reason = "not every test has disks")]
    pub fn image(&self, name: &str, size: u64) -> PathBuf {
        let path = self.path(name);
        std::fs::File::create(&path).and_then(|f| f.set_len(size)).expect("image");
        path
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _gone = std::fs::remove_dir_all(&self.0);
    }
}

type Shared = Arc<(Mutex<(String, bool)>, Condvar)>;

/// A paravane under way; killed when dropped.
pub struct Running {
    child: Child,
    #[allow(dead_code, reason = "not every test talks to its guest")]
    pub stdin: Option<ChildStdin>,
    output: Shared,
}

/// `paravane run` with a kernel, a command line and more options.
#[allow(dead_code, reason = "not every test runs a guest of its own")]
pub fn run(guest: &Guest, append: &str, more: &[&str]) -> Running {
    let mut command = Command::new(env!("CARGO_BIN_EXE_paravane"));
    command.arg("run").arg("--kernel").arg(&guest.kernel).arg("--initrd").arg(&guest.initrd);
    command.args(["--append", append]).args(more);
    Running::start(command)
}

impl Running {
    pub fn start(mut command: Command) -> Running {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().expect("paravane starts");
        let output: Shared = Arc::default();
        let (mut stdout, sink) = (child.stdout.take().expect("pipe"), Arc::clone(&output));
        std::thread::spawn(move || {
            let mut buf = [0; 4096];
            while let Ok(n @ 1..) = stdout.read(&mut buf) {
                sink.0.lock().expect("output").0.push_str(&String::from_utf8_lossy(&buf[..n]));
                sink.1.notify_all();
            }
            sink.0.lock().expect("output").1 = true;
            sink.1.notify_all();
        });
        let stdin = child.stdin.take();
        Running { child, stdin, output }
    }

    /// Everything said so far.
    pub fn said(&self) -> String {
        self.output.0.lock().expect("output").0.clone()
    }

    fn wait_while(&self, seconds: u64, pending: impl Fn(&(String, bool)) -> bool) -> bool {
        let until = Instant::now() + Duration::from_secs(seconds);
        let mut state = self.output.0.lock().expect("output");
        while pending(&state) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.output.1.wait_timeout(state, left).expect("output").0;
        }
        true
    }

    /// Waits until `text` was said `times` times.
    #[allow(dead_code, reason = "not every test talks to its guest")]
    pub fn expect_times(&self, text: &str, times: usize, seconds: u64) {
        self.wait_while(seconds, |(said, ended)| said.matches(text).count() < times && !ended);
        let said = self.said();
        assert!(said.matches(text).count() >= times, "no '{text}' within {seconds} s:\n{said}");
    }

    /// Waits until `text` was said.
    #[allow(dead_code, reason = "not every test talks to its guest")]
    pub fn expect(&self, text: &str, seconds: u64) {
        self.expect_times(text, 1, seconds);
    }

    /// Types `text`.
    #[allow(dead_code, reason = "not every test talks to its guest")]
    pub fn type_in(&mut self, text: &str) {
        let stdin = self.stdin.as_mut().expect("standard input");
        stdin.write_all(text.as_bytes()).and_then(|()| stdin.flush()).expect("typed");
    }

    /// Waits for the end; the exit code and everything said.
    pub fn finish(mut self, seconds: u64) -> (Option<i32>, String) {
        let ended = self.wait_while(seconds, |(_, ended)| !ended);
        assert!(ended, "still running after {seconds} s:\n{}", self.said());
        let status = self.child.wait().expect("exit status");
        (status.code(), self.said())
    }

    /// SIGKILL.
    #[allow(dead_code, reason = "not every test is that hard")]
    pub fn kill(&mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("exit status");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

//! The host's ends of the serial ports: the terminal or pipes, files, UNIX sockets.

use super::lifecycle::{Lifecycle, Request};
use super::output::{Output, OutputHandle};
use super::terminal::{HELP, Key, Keys};
use crate::machine::{MachineError, SerialConfig, SerialEnd, SerialInput};
use paravane_devices::ByteSink;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How long the last words of a guest may take to be written.
const LAST_WORDS: Duration = Duration::from_secs(10);
/// The same when the user wants to leave.
const IN_A_HURRY: Duration = Duration::from_millis(200);

/// What has to be started once the machine is known to be good.
enum Host {
    Stdio { input: SerialInput, echo: OutputHandle },
    File(File),
    Socket { listener: UnixListener, input: SerialInput, client: Arc<Mutex<Option<UnixStream>>> },
}

/// All serial ports of a run.
pub struct Serial {
    ends: Vec<Option<SerialEnd>>,
    hosts: Vec<Host>,
    outputs: Vec<Output>,
    sockets: Vec<PathBuf>,
    lifecycle: Lifecycle,
}

impl Serial {
    /// Opens what `config` names; nothing is read, and nothing that exists is changed yet.
    pub fn open(config: &[SerialConfig], lifecycle: &Lifecycle) -> Result<Serial, MachineError> {
        let mut serial = Serial {
            ends: Vec::new(),
            hosts: Vec::new(),
            outputs: Vec::new(),
            sockets: Vec::new(),
            lifecycle: lifecycle.clone(),
        };
        for port in config {
            let end = match port {
                SerialConfig::None => None,
                SerialConfig::Stdio => Some(serial.stdio()?),
                SerialConfig::File(path) => Some(serial.file(path)?),
                SerialConfig::Unix(path) => Some(serial.socket(path)?),
            };
            serial.ends.push(end);
        }
        Ok(serial)
    }

    /// The ends for the machine, once.
    pub fn ends(&mut self) -> Vec<Option<SerialEnd>> {
        std::mem::take(&mut self.ends)
    }

    /// Port 0xE9 appears on standard error.
    pub fn debug_console(&mut self) -> Result<ByteSink, MachineError> {
        let handle = self.output("standard error".into(), io::stderr())?;
        Ok(Box::new(move |bytes| {
            // A debug console has no way to say "later": what does not fit is lost.
            handle.offer(bytes);
        }))
    }

    /// An output thread that ends the run when nobody takes its bytes any more.
    fn output(
        &mut self,
        name: String,
        sink: impl Write + Send + 'static,
    ) -> Result<OutputHandle, MachineError> {
        let lifecycle = self.lifecycle.clone();
        let told = name.clone();
        let failed = move |e: io::Error| lifecycle.request(Request::Host(format!("{told}: {e}")));
        let output = Output::start("serial-output", sink, failed)
            .map_err(|e| MachineError::Host("a serial port's thread", e))?;
        let handle = output.handle();
        self.outputs.push(output);
        Ok(handle)
    }

    fn stdio(&mut self) -> Result<SerialEnd, MachineError> {
        let handle = self.output("standard output".into(), io::stdout())?;
        let input = SerialInput::default();
        self.hosts.push(Host::Stdio { input: input.clone(), echo: handle.clone() });
        Ok(SerialEnd::new(handle, input))
    }

    fn file(&mut self, path: &Path) -> Result<SerialEnd, MachineError> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path);
        let file = file.map_err(|e| MachineError::File(path.to_owned(), e))?;
        let again = file.try_clone().map_err(|e| MachineError::File(path.to_owned(), e))?;
        self.hosts.push(Host::File(again));
        let handle = self.output(path.display().to_string(), file)?;
        Ok(SerialEnd::new(handle, SerialInput::default()))
    }

    /// A socket that one client at a time may connect to; output without a client is lost, as on an open line.
    fn socket(&mut self, path: &Path) -> Result<SerialEnd, MachineError> {
        remove_stale_socket(path);
        let listener = UnixListener::bind(path).map_err(|e| MachineError::File(path.to_owned(), e))?;
        self.sockets.push(path.to_owned());
        let client: Arc<Mutex<Option<UnixStream>>> = Arc::default();
        let input = SerialInput::default();
        let handle = self.output(path.display().to_string(), Line(Arc::clone(&client)))?;
        self.hosts.push(Host::Socket { listener, input: input.clone(), client });
        Ok(SerialEnd::new(handle, input))
    }

    /// Starts reading, and empties the files that are written. `terminal`: our own keys are obeyed.
    pub fn start(&mut self, terminal: bool) -> Result<(), MachineError> {
        for host in std::mem::take(&mut self.hosts) {
            let lifecycle = self.lifecycle.clone();
            let started = match host {
                Host::File(file) => file.set_len(0).or(Ok(())),
                Host::Stdio { input, echo } if terminal => {
                    spawn(move || read_terminal(&input, &echo, &lifecycle))
                }
                Host::Stdio { input, .. } => spawn(move || read_all(io::stdin(), &input)),
                Host::Socket { listener, input, client } => spawn(move || serve(&listener, &input, &client)),
            };
            started.map_err(|e| MachineError::Host("a serial port", e))?;
        }
        Ok(())
    }

    /// Writes what is left (`patient`: all of it) and gives up the sockets.
    pub fn finish(self, patient: bool) {
        for output in &self.outputs {
            output.flush(if patient { LAST_WORDS } else { IN_A_HURRY });
        }
        for path in &self.sockets {
            let _gone = std::fs::remove_file(path);
        }
    }
}

fn spawn(reader: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new().name("serial-input".into()).spawn(reader).map(drop)
}

/// A socket file that nobody listens on any more is in our way.
pub fn remove_stale_socket(path: &Path) {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    if is_socket && UnixStream::connect(path).is_err() {
        let _still_there = std::fs::remove_file(path);
    }
}

/// Bytes go to the guest as they are, until the end of the file.
fn read_all(mut from: impl Read, input: &SerialInput) {
    let mut buf = [0; 4096];
    loop {
        match from.read(&mut buf) {
            Ok(0) => return,
            Ok(n) => input.push(&buf[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Keys go to the guest, but for our own.
fn read_terminal(input: &SerialInput, echo: &OutputHandle, lifecycle: &Lifecycle) {
    let mut keys = Keys::default();
    let mut buf = [0; 256];
    let mut stdin = io::stdin();
    loop {
        let n = match stdin.read(&mut buf) {
            Ok(0) => return,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let mut typed = Vec::with_capacity(n);
        for key in buf[..n].iter().filter_map(|&b| keys.next(b)) {
            match key {
                Key::Guest(b) => typed.push(b),
                Key::Quit => lifecycle.request(Request::Quit),
                Key::Help => {
                    echo.offer(HELP.as_bytes());
                }
            }
        }
        if !typed.is_empty() {
            input.offer(&typed);
        }
    }
}

/// One client after the other.
fn serve(listener: &UnixListener, input: &SerialInput, client: &Mutex<Option<UnixStream>>) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else { return };
        *client.lock().expect("serial client") = stream.try_clone().ok();
        read_all(stream, input);
        *client.lock().expect("serial client") = None;
    }
}

/// Writes to whoever is connected.
struct Line(Arc<Mutex<Option<UnixStream>>>);

impl Write for Line {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let stream = self.0.lock().expect("serial client").as_ref().map(UnixStream::try_clone);
        if let Some(Ok(mut stream)) = stream {
            // A client that left is no error.
            let _left = stream.write_all(buf);
        }
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

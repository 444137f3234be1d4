//! Where the debugger connects: one session at a time; whoever comes second is told so and leaves the first alone.

use super::link::Link;
use super::session::Session;
use super::wire::{Frame, Framer, Stream, frame};
use crate::machine::Inspector;
use crate::run::Lifecycle;
use std::io::{self, Read, Write};
use std::net::{TcpListener, ToSocketAddrs};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// Where the debugger may connect.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum GdbAddress {
    /// HOST:PORT.
    Tcp(String),
    /// A UNIX socket.
    Unix(PathBuf),
}

/// How long the end of the machine waits for the debugger to hear of it.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long a second debugger may take to hear that it is one too many.
const REFUSAL: Duration = Duration::from_secs(2);

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    fn accept(&self) -> io::Result<Stream> {
        match self {
            Listener::Tcp(l) => {
                let stream = l.accept()?.0;
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
            Listener::Unix(l) => Ok(Stream::Unix(l.accept()?.0)),
        }
    }
}

/// What sessions share.
pub(super) struct Shared {
    pub(super) link: Arc<Link>,
    pub(super) lifecycle: Lifecycle,
    pub(super) inspector: Arc<Inspector>,
    busy: AtomicBool,
}

/// A place where a debugger may connect, for as long as this lives.
pub struct Debugger {
    shared: Arc<Shared>,
    socket: Option<PathBuf>,
}

impl Debugger {
    /// Listens at `address`.
    pub fn listen(
        address: &GdbAddress,
        link: Arc<Link>,
        lifecycle: Lifecycle,
        inspector: Arc<Inspector>,
    ) -> io::Result<Debugger> {
        let (listener, socket) = match address {
            GdbAddress::Tcp(at) => {
                let at = at.to_socket_addrs()?.next();
                let at = at.ok_or_else(|| io::Error::other("the name has no address"))?;
                (Listener::Tcp(TcpListener::bind(at)?), None)
            }
            GdbAddress::Unix(path) => {
                crate::run::remove_stale_socket(path);
                // Under its own name only once it listens: whoever waits for the file may connect.
                let new = path.with_added_extension("new");
                crate::run::remove_stale_socket(&new);
                let listener = UnixListener::bind(&new)?;
                std::fs::rename(&new, path)?;
                (Listener::Unix(listener), Some(path.clone()))
            }
        };
        let shared = Arc::new(Shared { link, lifecycle, inspector, busy: AtomicBool::new(false) });
        let of_thread = Arc::clone(&shared);
        thread::Builder::new().name("gdb".into()).spawn(move || accept_all(&listener, &of_thread))?;
        Ok(Debugger { shared, socket })
    }

    /// The machine ended with `code`: a debugger that is connected hears of it.
    pub fn finish(self, code: u8) {
        self.shared.link.end(code);
        let until = Instant::now() + LAST_WORDS;
        while self.shared.busy.load(Ordering::Acquire) && Instant::now() < until {
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Debugger {
    fn drop(&mut self) {
        if let Some(path) = &self.socket {
            let _gone = std::fs::remove_file(path);
        }
    }
}

fn accept_all(listener: &Listener, shared: &Arc<Shared>) {
    let refusing = Arc::new(Mutex::new(()));
    loop {
        let Ok(stream) = listener.accept() else {
            // Out of descriptors, perhaps: it may pass.
            thread::sleep(Duration::from_millis(100));
            continue;
        };
        if shared.busy.swap(true, Ordering::AcqRel) {
            let refusing = Arc::clone(&refusing);
            let _no_thread = thread::Builder::new().name("gdb-refused".into()).spawn(move || {
                // One at a time: whoever knocks a thousand times gets no thousand threads at work.
                let _one = refusing.lock();
                refuse(stream);
            });
            continue;
        }
        let of_session = Arc::clone(shared);
        let started = thread::Builder::new().name("gdb-session".into()).spawn(move || {
            let free = Free(Arc::clone(&of_session));
            Session::serve(stream, &of_session);
            drop(free);
        });
        if started.is_err() {
            shared.busy.store(false, Ordering::Release);
        }
    }
}

/// Gives the place free, whatever happened to the session.
struct Free(Arc<Shared>);

impl Drop for Free {
    fn drop(&mut self) {
        self.0.link.detach();
        self.0.busy.store(false, Ordering::Release);
    }
}

/// Answers everything a second debugger asks with the reason, which it shows before it leaves.
fn refuse(mut stream: Stream) {
    if stream.limit(REFUSAL).is_err() {
        return;
    }
    let answer = [b"+", frame(b"E.another debugger is connected to this machine").as_slice()].concat();
    let until = Instant::now() + REFUSAL;
    let (mut framer, mut buf) = (Framer::default(), [0; 512]);
    while let Ok(n @ 1..) = stream.read(&mut buf) {
        let asked = buf[..n].iter().filter(|&&b| matches!(framer.next(b), Some(Frame::Packet(_)))).count();
        if (0..asked).any(|_| stream.write_all(&answer).is_err()) || Instant::now() > until {
            break;
        }
    }
    stream.close();
}

//! How a run ends or starts again: the first request wins, every thread hears of it.

use super::park::Vcpu;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex};

/// Why the machine stops.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// The guest switched the power off (ACPI S5).
    PowerOff,
    /// The guest pulsed the reset line, by the named way.
    Reset(&'static str),
    /// A value was written to the debug-exit port.
    DebugExit(u32),
    /// Ctrl-A x.
    Quit,
    /// A terminating signal.
    Signal(i32),
    /// Shutdown: a fault while delivering a double fault; the dossier.
    TripleFault(String),
    /// The host, or something paravane cannot do, ended the run.
    Host(String),
    /// Whoever drives this machine from inside the process has what he wanted.
    Done,
}

impl Request {
    /// The exit code of the process (DESIGN section 7).
    pub fn exit_code(&self) -> u8 {
        match self {
            Request::PowerOff | Request::Reset(_) | Request::Quit | Request::Done => 0,
            Request::DebugExit(value) => (value << 1 | 1) as u8,
            Request::Signal(n) => 128u8.wrapping_add(*n as u8),
            Request::TripleFault(_) => 3,
            Request::Host(_) => 1,
        }
    }
}

/// In a few words.
impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Request::PowerOff => f.write_str("the guest switched the power off"),
            Request::Reset(how) => write!(f, "the guest asked for a reset ({how})"),
            Request::DebugExit(value) => write!(f, "the guest wrote {value} to the debug-exit port"),
            Request::Quit => f.write_str("the user quit"),
            Request::Signal(n) => write!(f, "signal {n}"),
            Request::TripleFault(_) => f.write_str("triple fault"),
            Request::Host(text) => f.write_str(text),
            Request::Done => f.write_str("everything was done"),
        }
    }
}

#[derive(Default)]
struct State {
    request: Option<Request>,
    vcpus: Vec<Arc<Vcpu>>,
}

/// Shared by everything that may end the run.
#[derive(Clone, Default)]
pub struct Lifecycle(Arc<(Mutex<State>, Condvar)>);

impl Lifecycle {
    /// A running machine.
    pub fn new() -> Lifecycle {
        Lifecycle::default()
    }

    /// Registers a vCPU to be stopped by the next request.
    pub fn watch(&self, vcpu: Arc<Vcpu>) {
        self.0.0.lock().expect("lifecycle").vcpus.push(vcpu);
    }

    /// Asks for the end (or a reset); a request that is already there stays, except that nothing outlives the
    /// user's own wish to quit.
    pub fn request(&self, request: Request) {
        let mut state = self.0.0.lock().expect("lifecycle");
        let user = matches!(request, Request::Quit | Request::Signal(_));
        if state.request.is_none() || user {
            state.request = Some(request);
        }
        for vcpu in &state.vcpus {
            vcpu.stop();
        }
        self.0.1.notify_all();
    }

    /// Whether somebody asked for the end.
    pub fn requested(&self) -> bool {
        self.0.0.lock().expect("lifecycle").request.is_some()
    }

    /// Waits for a request, for `limit` at most; whether there is one.
    pub fn wait(&self, limit: std::time::Duration) -> bool {
        let state = self.0.0.lock().expect("lifecycle");
        let waited = self.0.1.wait_timeout_while(state, limit, |s| s.request.is_none());
        waited.expect("lifecycle").0.request.is_some()
    }

    /// Whether the request is the user's own wish to end.
    pub fn user_wants_out(&self) -> bool {
        matches!(self.peek(), Some(Request::Quit | Request::Signal(_)))
    }

    /// The request, left in place.
    pub fn peek(&self) -> Option<Request> {
        self.0.0.lock().expect("lifecycle").request.clone()
    }

    /// Takes back a request for the end, but for the user's own wish, so that the run can go on from before it.
    pub fn withdraw(&self) -> Option<Request> {
        let mut state = self.0.0.lock().expect("lifecycle");
        match state.request {
            None | Some(Request::Quit | Request::Signal(_) | Request::Host(_) | Request::Reset(_)) => None,
            Some(_) => state.request.take(),
        }
    }

    /// Takes a reset request, so that the machine can start again; anything else stays.
    pub fn take_reset(&self) -> Option<&'static str> {
        let mut state = self.0.0.lock().expect("lifecycle");
        let Some(Request::Reset(how)) = state.request else { return None };
        state.request = None;
        Some(how)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes() {
        assert_eq!(Request::PowerOff.exit_code(), 0);
        assert_eq!(Request::DebugExit(0x10).exit_code(), 33);
        assert_eq!(Request::TripleFault(String::new()).exit_code(), 3);
        assert_eq!(Request::Signal(15).exit_code(), 143);
    }

    #[test]
    fn the_first_request_wins_but_for_the_user() {
        let l = Lifecycle::new();
        l.request(Request::PowerOff);
        l.request(Request::Reset("keyboard controller"));
        assert_eq!(l.peek(), Some(Request::PowerOff));
        assert_eq!(l.take_reset(), None);
        l.request(Request::Quit);
        assert_eq!(l.peek(), Some(Request::Quit));
    }

    #[test]
    fn a_reset_is_taken_once() {
        let l = Lifecycle::new();
        l.request(Request::Reset("port 0xcf9"));
        assert_eq!(l.take_reset(), Some("port 0xcf9"));
        assert!(!l.requested());
    }
}

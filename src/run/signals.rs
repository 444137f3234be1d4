//! Terminating signals become lifecycle requests.
//!
//! Unsafe island. Invariants: the signal sets are initialised by `sigemptyset` before use; the set is blocked in the
//! calling thread before any other thread exists, so that every thread inherits the mask and only `sigwait` takes
//! them; no code runs in signal context.

use super::lifecycle::{Lifecycle, Request};
use std::io;
use std::mem::MaybeUninit;

const TERMINATING: [libc::c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

fn set_of(signals: &[libc::c_int]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: `sigemptyset` initialises the set it is given; `sigaddset` then changes an initialised set.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for &signal in signals {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    }
}

/// Turns SIGINT, SIGTERM, SIGHUP and SIGQUIT into requests to `lifecycle` from now on. Call it before the first
/// other thread starts.
pub fn watch(lifecycle: Lifecycle) -> io::Result<()> {
    let set = set_of(&TERMINATING);
    // SAFETY: `set` is initialised; the old mask is not asked for.
    let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        loop {
            let mut signal = 0;
            // SAFETY: `set` is initialised and blocked in this thread; `signal` is a valid place.
            if unsafe { libc::sigwait(&raw const set, &raw mut signal) } == 0 {
                lifecycle.request(Request::Signal(signal));
            }
        }
    })?;
    Ok(())
}

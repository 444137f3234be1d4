//! A machine that stands still while the host runs something else.

use crate::host::{self, Context, Outcome};
use rustix::io::retry_on_intr;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use std::ffi::OsStr;
use std::process::Command;
use std::time::{Duration, Instant};

/// Keeps a child stopped; it goes on when this is dropped.
pub struct Pause {
    child: Pid,
    since: Instant,
}

impl Pause {
    /// Stops a child that nobody has waited for yet, and returns when no thread of it runs any more. One that has
    /// ended is fine.
    pub fn of(child: Pid) -> Outcome<Self> {
        let pause = Self { child, since: Instant::now() };
        kill_process(child, Signal::STOP).context("stopping a machine")?;
        // Only looked at: the status of a child that has ended belongs to whoever waits for it.
        let stopped_or_ended = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        retry_on_intr(|| waitid(WaitId::Pid(child), stopped_or_ended)).context("stopping a machine")?;
        Ok(pause)
    }

    /// How long it has stood still.
    pub fn lasted(&self) -> Duration {
        self.since.elapsed()
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        kill_process(self.child, Signal::CONT).ok();
    }
}

/// A command whose process is killed when the thread that started it ends, however that ends: a stopped machine
/// would wait for ever for us to let it go on. `setpriv` (util-linux) becomes the program, so the process is the child
/// itself; a host without it has no such guard.
pub fn tied(program: impl AsRef<OsStr>) -> Command {
    if !host::installed("setpriv") {
        return host::command(program);
    }
    let mut command = host::command("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

#[cfg(test)]
mod tests {
    use super::super::cputime::CpuTime;
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Child;
    use std::thread;

    struct Killed(Child);

    impl Drop for Killed {
        fn drop(&mut self) {
            self.0.kill().ok();
            self.0.wait().ok();
        }
    }

    #[test]
    fn a_stopped_child_uses_no_time_and_goes_on_afterwards() {
        let spin = host::command("sh").args(["-c", "while :; do :; done"]).spawn().expect("sh");
        let spin = Killed(spin);
        let mut time = CpuTime::of(spin.0.id());
        for _ in 0..2 {
            let pause = Pause::of(Pid::from_child(&spin.0)).expect("a child");
            let stopped = time.look();
            thread::sleep(Duration::from_millis(50));
            assert_eq!(time.look(), stopped);
            assert!(pause.lasted().as_millis() >= 50);
            drop(pause);
            let start = Instant::now();
            while time.look() == stopped {
                assert!(start.elapsed().as_secs() < 10, "it still stands");
                thread::yield_now();
            }
        }
    }

    #[test]
    fn a_child_that_has_ended_keeps_its_status() {
        let mut child = host::command("sh").args(["-c", "exit 3"]).spawn().expect("sh");
        drop(Pause::of(Pid::from_child(&child)).expect("a child"));
        drop(Pause::of(Pid::from_child(&child)).expect("a child"));
        assert_eq!(child.wait().expect("status").code(), Some(3));
    }

    #[test]
    fn a_stopped_machine_ends_with_whoever_started_it() {
        assert!(host::installed("setpriv"), "this host lacks setpriv, of util-linux");
        let starter = thread::spawn(|| {
            let child = tied("sleep").arg("60").spawn().expect("sleep");
            let name = format!("/proc/{}/comm", child.id());
            while std::fs::read_to_string(&name).expect("proc") != "sleep\n" {
                thread::yield_now();
            }
            // As if we were killed: nothing is dropped.
            std::mem::forget(Pause::of(Pid::from_child(&child)).expect("a child"));
            child
        });
        let mut child = starter.join().expect("a child");
        assert_eq!(child.wait().expect("status").signal(), Some(9));
    }
}

//! How the debugger and a vCPU talk.
//!
//! ```text
//!   session thread                          vCPU thread
//!   --------------                          -----------
//!   pause()      -- flag + STOP ---------->  leaves guest code between two instructions
//!                <-- Event::Stopped -------  parks and serves
//!   ask(command) -- queue + STOP --------->  runs the command on itself, answers
//!   go(resume)   -- queue + STOP --------->  runs on, or steps
//!                <-- Event::Stopped -------  breakpoint, watchpoint, step done, triple fault
//! ```
//!
//! Everything that touches the processor is a command run by its own thread, so nothing of the guest's state is shared or
//! locked. While no debugger is connected there is nothing here for the vCPU to look at.

use super::armed::{Armed, Owner};
use crate::run::{Vcpu, VcpuRunner};
use paravane_cpu::{Attention, LinAddr, WatchHit};
use std::collections::VecDeque;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Why the vCPU stands still.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stop {
    /// Somebody asked for it.
    Paused,
    /// A step, or a range of steps, is done.
    Stepped,
    /// At a breakpoint; nothing of the instruction was done.
    Breakpoint(LinAddr, Owner),
    /// After a watched access.
    Watch(WatchHit),
    /// Shutdown; what there is to tell. Nothing can run on.
    TripleFault(Arc<str>),
}

/// How it goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resume {
    /// Until something stops it.
    Continue,
    /// One instruction, and on while RIP is in the range. `interrupts`: they may come in between.
    Step {
        /// First address of the range.
        start: u64,
        /// The address after it; an empty range is one step.
        end: u64,
        /// Whether pending interrupts are taken.
        interrupts: bool,
    },
}

/// What a session hears.
#[derive(Debug)]
pub enum Event {
    /// Bytes from the debugger.
    Bytes(Vec<u8>),
    /// The debugger is gone.
    Hangup,
    /// The vCPU stands still.
    Stopped(Stop),
    /// The machine ended with this exit code.
    Ended(u8),
}

/// The machine is gone, or going.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gone;

type Command = Box<dyn FnOnce(&mut VcpuRunner) -> Option<Resume> + Send>;

#[derive(Default)]
struct State {
    commands: VecDeque<Command>,
    pause: bool,
    session: Option<Sender<Event>>,
    stopped: Option<Stop>,
    ended: Option<u8>,
}

/// The connection of one vCPU with whoever debugs it.
pub struct Link {
    vcpu: Arc<Vcpu>,
    state: Mutex<State>,
}

impl Link {
    /// A link nobody uses yet. `wait`: the vCPU stops before its first instruction.
    pub fn new(vcpu: Arc<Vcpu>, wait: bool) -> Arc<Link> {
        Arc::new(Link { vcpu, state: Mutex::new(State { pause: wait, ..State::default() }) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A command that panicked leaves the queue whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- the session's side ---------------------------------------------------------------------------

    /// Events go to `events` from now on; the vCPU stops.
    pub fn attach(&self, events: Sender<Event>) {
        let mut state = self.state();
        match (state.ended, state.stopped.clone()) {
            (Some(code), _) => drop(events.send(Event::Ended(code))),
            (_, Some(stop)) => drop(events.send(Event::Stopped(stop))),
            _ => state.pause = true,
        }
        state.session = Some(events);
        drop(state);
        self.vcpu.stop();
    }

    /// The session is over: nothing is armed any more, and the guest runs on, unless it is beyond that.
    pub fn detach(&self) {
        let frozen = {
            let mut state = self.state();
            state.session = None;
            matches!(state.stopped, Some(Stop::TripleFault(_)))
        };
        let resume = (!frozen).then_some(Resume::Continue);
        self.command(Box::new(move |runner| {
            runner.arm_for(&Arc::default(), Resume::Continue);
            resume
        }));
    }

    /// Stops the vCPU; an [`Event::Stopped`] follows.
    pub fn pause(&self) {
        self.state().pause = true;
        self.vcpu.stop();
    }

    /// Runs `f` on the vCPU's thread, between two instructions.
    pub fn ask<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut VcpuRunner) -> R + Send + 'static,
    ) -> Result<R, Gone> {
        let (answer, answered) = mpsc::channel();
        self.command(Box::new(move |runner| {
            // The session may have given up.
            let _nobody = answer.send(f(runner));
            None
        }));
        answered.recv().map_err(|_| Gone)
    }

    /// Arms `armed` and lets the vCPU go on.
    pub fn go(&self, armed: Arc<Armed>, resume: Resume) {
        self.command(Box::new(move |runner| {
            runner.arm_for(&armed, resume);
            Some(resume)
        }));
    }

    fn command(&self, command: Command) {
        let mut state = self.state();
        if state.ended.is_some() {
            return;
        }
        state.commands.push_back(command);
        state.pause |= state.stopped.is_none();
        drop(state);
        self.vcpu.stop();
    }

    /// The machine ended: whoever waits hears of it.
    pub fn end(&self, code: u8) {
        let mut state = self.state();
        state.ended = Some(code);
        state.commands.clear();
        if let Some(events) = &state.session {
            let _gone = events.send(Event::Ended(code));
        }
    }

    // ---- the vCPU's side ------------------------------------------------------------------------------

    /// Whether the vCPU is to stop.
    pub fn wants_stop(&self) -> bool {
        self.state().pause
    }

    /// The vCPU stopped: tells the session.
    pub fn stopped(&self, stop: Stop) {
        let mut state = self.state();
        state.pause = false;
        if let Some(events) = &state.session {
            let _gone = events.send(Event::Stopped(stop.clone()));
        }
        state.stopped = Some(stop);
    }

    /// Runs commands until one says how to go on; `None`: the run is to end.
    pub fn serve(&self, runner: &mut VcpuRunner) -> Option<Resume> {
        loop {
            runner.vcpu.attention().take(Attention::STOP);
            while let Some(command) = self.next() {
                if let Some(resume) = command(runner) {
                    let mut state = self.state();
                    state.stopped = None;
                    if state.pause {
                        // Asked for behind the command, and the flag was just taken.
                        self.vcpu.stop();
                    }
                    return Some(resume);
                }
            }
            if runner.lifecycle.requested() {
                self.state().stopped = None;
                return None;
            }
            runner.vcpu.park(Attention::STOP, None);
        }
    }

    fn next(&self) -> Option<Command> {
        self.state().commands.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_attaches_late_hears_how_things_stand() {
        let link = Link::new(Arc::new(Vcpu::new()), false);
        link.stopped(Stop::TripleFault("told".into()));
        let (sender, events) = mpsc::channel();
        link.attach(sender);
        assert!(matches!(events.try_recv(), Ok(Event::Stopped(Stop::TripleFault(_)))));
        link.end(3);
        assert!(matches!(events.try_recv(), Ok(Event::Ended(3))));
        assert_eq!(link.ask(|_| ()), Err(Gone));
    }

    #[test]
    fn a_pause_asked_for_before_the_first_instruction_is_not_lost() {
        let vcpu = Arc::new(Vcpu::new());
        let link = Link::new(Arc::clone(&vcpu), true);
        vcpu.forget();
        assert!(link.wants_stop());
    }
}

//! How the debugger and the vCPUs talk.
//!
//! ```text
//!   session thread                          vCPU threads
//!   --------------                          ------------
//!   pause()      -- flag + STOP ---------->  leave guest code between two instructions
//!                <-- Event::Stopped -------  park and serve; the last to come tells it
//!   ask(command) -- queue + STOP --------->  one runs the command on itself, answers
//!   go(resume)   -- queue + STOP --------->  run on, or step; those held back stay
//!                <-- Event::Stopped -------  breakpoint, watchpoint, step done, triple fault: one stops, and so do all
//! ```
//!
//! Everything that touches the processor is a command run by its own thread, so nothing of the guest's state is shared or
//! locked. While no debugger is connected there is nothing here for the vCPU to look at.

use super::armed::{Armed, Owner};
use crate::run::{Request, Vcpu, VcpuRunner};
use paravane_cpu::{Attention, LinAddr, WatchHit};
use paravane_memory::VpIndex;
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
    /// Gone back as far as it is possible.
    Beginning,
    /// The end of a recorded run.
    End(Request),
}

impl Stop {
    /// Whether it is about what has happened, and will not happen again by itself.
    fn is_past(&self) -> bool {
        matches!(self, Stop::Watch(_) | Stop::TripleFault(_))
    }
}

/// How it goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resume {
    /// Until something stops it.
    Continue,
    /// Back, until where something would have stopped it.
    ReverseContinue,
    /// Back by one instruction.
    ReverseStep,
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
    /// The vCPUs stand still, because of this one.
    Stopped(VpIndex, Stop),
    /// The machine ended with this exit code.
    Ended(u8),
}

/// The machine is gone, or going.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gone;

type Command = Box<dyn FnOnce(&mut VcpuRunner) -> Option<Resume> + Send>;

/// What the link knows of one vCPU.
#[derive(Default)]
struct Seat {
    commands: VecDeque<Command>,
    /// It is to stop.
    wanted: bool,
    /// Why it stands still; `None` while it runs.
    stopped: Option<Stop>,
    /// Its last stop was told.
    told: bool,
    /// A stop that was not told because another vCPU's was; it is told when this one is to go on.
    untold: Option<Stop>,
}

#[derive(Default)]
struct State {
    seats: Vec<Seat>,
    /// The stop that is told of: of all that stop together, the first that nobody asked for.
    told: Option<(VpIndex, Stop)>,
    session: Option<Sender<Event>>,
    ended: Option<u8>,
    /// Machine time stands still.
    still: bool,
}

impl State {
    fn all_stopped(&self) -> bool {
        self.seats.iter().all(|seat| seat.stopped.is_some())
    }

    fn seat(&mut self, vp: VpIndex) -> &mut Seat {
        &mut self.seats[vp.0 as usize]
    }

    /// Every vCPU that runs is to stop.
    fn want_all(&mut self) {
        for seat in self.seats.iter_mut().filter(|seat| seat.stopped.is_none()) {
            seat.wanted = true;
        }
    }
}

/// The connection of the vCPUs with whoever debugs them. They stop together and go on together, but for those the debugger
/// holds back.
pub struct Link {
    vcpus: Vec<Arc<Vcpu>>,
    state: Mutex<State>,
    time: StandStill,
}

/// Makes machine time stand still (true), or go on.
pub type StandStill = Box<dyn Fn(bool) + Send + Sync>;

impl Link {
    /// A link nobody uses yet. `wait`: the vCPUs stop before their first instruction.
    pub fn new(vcpus: &[Arc<Vcpu>], wait: bool, time: StandStill) -> Arc<Link> {
        let seat = |_| Seat { wanted: wait, ..Seat::default() };
        let state = State { seats: vcpus.iter().map(seat).collect(), ..State::default() };
        Arc::new(Link { vcpus: vcpus.to_vec(), state: Mutex::new(state), time })
    }

    /// How many vCPUs there are.
    pub fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A command that panicked leaves the queue whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// While all vCPUs stand still, so does time. Called with the lock held, so that none goes on before time does.
    fn follow(&self, state: &mut State) {
        let still = state.all_stopped();
        if still != state.still {
            state.still = still;
            (self.time)(still);
        }
    }

    fn call_all(&self) {
        self.vcpus.iter().for_each(|vcpu| vcpu.stop());
    }

    // ---- the session's side ---------------------------------------------------------------------------

    /// Events go to `events` from now on; the vCPUs stop.
    pub fn attach(&self, events: Sender<Event>) {
        let mut state = self.state();
        match (state.ended, state.told.clone().filter(|_| state.all_stopped())) {
            (Some(code), _) => drop(events.send(Event::Ended(code))),
            (_, Some((vp, stop))) => drop(events.send(Event::Stopped(vp, stop))),
            _ => state.want_all(),
        }
        state.session = Some(events);
        drop(state);
        self.call_all();
    }

    /// The session is over: nothing is armed any more, and the guest runs on, unless it is beyond that.
    pub fn detach(&self) {
        let frozen = {
            let mut state = self.state();
            state.session = None;
            state.seats.iter().any(|seat| matches!(seat.stopped, Some(Stop::TripleFault(_))))
        };
        let armed = Arc::default();
        let resume = (!frozen).then_some(Resume::Continue);
        self.send(&armed, &vec![Some(resume); self.vcpus.len()]);
    }

    /// Stops the vCPUs; an [`Event::Stopped`] follows.
    pub fn pause(&self) {
        self.state().want_all();
        self.call_all();
    }

    /// Runs `f` on the thread of `vp`, between two instructions.
    pub fn ask<R: Send + 'static>(
        &self,
        vp: VpIndex,
        f: impl FnOnce(&mut VcpuRunner) -> R + Send + 'static,
    ) -> Result<R, Gone> {
        let (answer, answered) = mpsc::channel();
        let mut state = self.state();
        if state.ended.is_some() {
            return Err(Gone);
        }
        let seat = state.seat(vp);
        seat.wanted |= seat.stopped.is_none();
        seat.commands.push_back(Box::new(move |runner| {
            // The session may have given up.
            let _nobody = answer.send(f(runner));
            None
        }));
        drop(state);
        self.vcpus[vp.0 as usize].stop();
        answered.recv().map_err(|_| Gone)
    }

    /// Arms `armed` and lets those vCPUs go on that `resume` says how.
    pub fn go(&self, armed: &Arc<Armed>, resume: &[Option<Resume>]) {
        let commands: Vec<_> = resume.iter().map(|r| r.map(Some)).collect();
        self.send(armed, &commands);
    }

    /// Arms `armed` on every vCPU that `commands` has something for, which then goes on as it says, or stays.
    fn send(&self, armed: &Arc<Armed>, commands: &[Option<Option<Resume>>]) {
        let mut state = self.state();
        if state.ended.is_some() {
            return;
        }
        if commands.iter().any(|c| matches!(c, Some(Some(_))))
            && let Some((vp, _)) = state.told.take()
        {
            state.seat(vp).told = true;
        }
        for (seat, command) in state.seats.iter_mut().zip(commands) {
            let Some(resume) = *command else { continue };
            let armed = Arc::clone(armed);
            seat.commands.push_back(Box::new(move |runner| {
                runner.arm_for(&armed, resume.unwrap_or(Resume::Continue));
                resume
            }));
            seat.wanted |= seat.stopped.is_none();
            if resume.is_some() {
                // From now on it counts as running: whoever stops next waits for it.
                seat.stopped = None;
            }
        }
        self.follow(&mut state);
        drop(state);
        self.call_all();
    }

    /// The machine ended: whoever waits hears of it.
    pub fn end(&self, code: u8) {
        let mut state = self.state();
        state.ended = Some(code);
        state.seats.iter_mut().for_each(|seat| seat.commands.clear());
        if let Some(events) = &state.session {
            let _gone = events.send(Event::Ended(code));
        }
    }

    // ---- the vCPU's side ------------------------------------------------------------------------------

    /// Whether `vp` is to stop.
    pub fn wants_stop(&self, vp: VpIndex) -> bool {
        self.state().seat(vp).wanted
    }

    /// Whether any vCPU is to stop.
    pub fn wants_any_stop(&self) -> bool {
        self.state().seats.iter().any(|seat| seat.wanted)
    }

    /// `vp` stopped, and so do the others; the last of them tells the session.
    pub fn stopped(&self, vp: VpIndex, stop: Stop) {
        let mut state = self.state();
        let asked_for = |stop: &Stop| matches!(stop, Stop::Paused);
        let first = state.told.as_ref().is_none_or(|(_, told)| asked_for(told) && !asked_for(&stop));
        let seat = state.seat(vp);
        (seat.wanted, seat.told) = (false, false);
        seat.untold = (!first && stop.is_past()).then(|| stop.clone());
        seat.stopped = Some(stop.clone());
        if first {
            state.told = Some((vp, stop));
        }
        state.want_all();
        self.follow(&mut state);
        if state.all_stopped() {
            let told = state.told.clone();
            if let (Some(events), Some((vp, stop))) = (&state.session, told) {
                let _gone = events.send(Event::Stopped(vp, stop));
            }
            return;
        }
        drop(state);
        self.call_all();
    }

    /// Whether the last stop of `vp`, which goes on, was told.
    pub fn was_told(&self, vp: VpIndex) -> bool {
        self.state().seat(vp).told
    }

    /// What `vp` has still to tell, once.
    pub fn take_untold(&self, vp: VpIndex) -> Option<Stop> {
        self.state().seat(vp).untold.take()
    }

    /// All vCPUs, which share a thread, stopped because of `vp`.
    pub fn stopped_together(&self, vp: VpIndex, stop: &Stop) {
        let mut state = self.state();
        for (n, seat) in state.seats.iter_mut().enumerate() {
            (seat.wanted, seat.told, seat.untold) = (false, false, None);
            seat.stopped = Some(if n == vp.0 as usize { stop.clone() } else { Stop::Paused });
        }
        state.told = Some((vp, stop.clone()));
        self.follow(&mut state);
        if let Some(events) = &state.session {
            let _gone = events.send(Event::Stopped(vp, stop.clone()));
        }
    }

    /// Runs commands for `runners`, which share this thread, until they say how to go on: each, or not at all. `None`: the run is to
    /// end.
    pub fn serve(&self, runners: &mut [VcpuRunner]) -> Option<Vec<Option<Resume>>> {
        let first = runners.first()?.vcpu.clone();
        loop {
            for runner in runners.iter() {
                runner.vcpu.attention().take(Attention::STOP);
            }
            let mut resume = vec![None; runners.len()];
            self.serve_once(runners, &mut resume);
            if resume.iter().any(Option::is_some) {
                // Whoever goes on with it heard of it under the same lock.
                self.serve_once(runners, &mut resume);
                self.going_on(runners, &resume);
                return Some(resume);
            }
            if runners.iter().any(|r| r.lifecycle.requested()) {
                let mut state = self.state();
                state.told = None;
                runners.iter().for_each(|r| *state.seat(r.vp) = Seat::default());
                self.follow(&mut state);
                return None;
            }
            let called = |r: &VcpuRunner| r.vcpu.attention().get() & Attention::STOP != 0;
            first.sleep_until(|| runners.iter().any(called));
        }
    }

    /// Runs what waits for each of `runners` that does not go on yet.
    fn serve_once(&self, runners: &mut [VcpuRunner], resume: &mut [Option<Resume>]) {
        for (runner, resume) in runners.iter_mut().zip(resume) {
            while resume.is_none()
                && let Some(command) = self.next(runner.vp)
            {
                *resume = command(runner);
            }
        }
    }

    /// Those that `resume` says go on.
    fn going_on(&self, runners: &[VcpuRunner], resume: &[Option<Resume>]) {
        let mut state = self.state();
        for (runner, _) in runners.iter().zip(resume).filter(|(_, resume)| resume.is_some()) {
            let seat = state.seat(runner.vp);
            seat.stopped = None;
            if seat.wanted {
                // Asked for behind the command, and the flag was just taken.
                runner.vcpu.stop();
            }
        }
        self.follow(&mut state);
    }

    fn next(&self, vp: VpIndex) -> Option<Command> {
        self.state().seat(vp).commands.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VP0: VpIndex = VpIndex(0);
    const VP1: VpIndex = VpIndex(1);

    fn link(count: usize, wait: bool) -> Arc<Link> {
        let vcpus: Vec<Arc<Vcpu>> = (0..count).map(|_| Arc::default()).collect();
        Link::new(&vcpus, wait, Box::new(|_| {}))
    }

    #[test]
    fn whoever_attaches_late_hears_how_things_stand() {
        let link = link(1, false);
        link.stopped(VP0, Stop::TripleFault("told".into()));
        let (sender, events) = mpsc::channel();
        link.attach(sender);
        assert!(matches!(events.try_recv(), Ok(Event::Stopped(VP0, Stop::TripleFault(_)))));
        link.end(3);
        assert!(matches!(events.try_recv(), Ok(Event::Ended(3))));
        assert_eq!(link.ask(VP0, |_| ()), Err(Gone));
    }

    #[test]
    fn a_pause_asked_for_before_the_first_instruction_is_not_lost() {
        let link = link(2, true);
        link.vcpus.iter().for_each(|vcpu| vcpu.forget());
        assert!(link.wants_stop(VP0) && link.wants_stop(VP1));
    }

    #[test]
    fn one_stop_stops_all_and_the_last_to_come_tells_the_first_reason() {
        let link = link(2, false);
        let (sender, events) = mpsc::channel();
        link.attach(sender);
        link.stopped(VP1, Stop::Paused);
        assert!(events.try_recv().is_err(), "one still runs");
        link.stopped(VP0, Stop::Stepped);
        assert!(matches!(events.try_recv(), Ok(Event::Stopped(VP0, Stop::Stepped))));
        // One is held back: it stands still already.
        link.go(&Arc::default(), &[None, Some(Resume::Continue)]);
        assert!(!link.wants_stop(VP0));
        link.stopped(VP1, Stop::Stepped);
        assert!(matches!(events.try_recv(), Ok(Event::Stopped(VP1, Stop::Stepped))));
    }

    #[test]
    fn time_stands_still_while_all_do() {
        let (tell, told) = mpsc::channel();
        let vcpus: Vec<Arc<Vcpu>> = (0..2).map(|_| Arc::default()).collect();
        let link = Link::new(&vcpus, false, Box::new(move |still| tell.send(still).expect("told")));
        link.stopped(VP1, Stop::Paused);
        assert!(told.try_recv().is_err(), "one still runs");
        link.stopped(VP0, Stop::Paused);
        assert_eq!(told.try_recv(), Ok(true));
        // One steps, the other is held back.
        link.go(&Arc::default(), &[Some(Resume::Continue), None]);
        assert_eq!(told.try_recv(), Ok(false));
        link.stopped(VP0, Stop::Stepped);
        assert_eq!(told.try_recv(), Ok(true));
        assert!(told.try_recv().is_err());
    }

    #[test]
    fn what_cannot_happen_again_is_told_when_its_turn_comes() {
        let link = link(2, false);
        link.stopped(VP0, Stop::Stepped);
        assert!(link.wants_stop(VP1));
        link.stopped(VP1, Stop::TripleFault("told".into()));
        link.go(&Arc::default(), &[Some(Resume::Continue); 2]);
        assert!(link.was_told(VP0) && !link.was_told(VP1));
        assert!(matches!(link.take_untold(VP1), Some(Stop::TripleFault(_))));
        assert_eq!(link.take_untold(VP1), None);
    }
}

//! The threads of the vCPUs: one each; by the instruction clock one for all.

use super::rounds;
use super::vcpu::{Lockstep, PanicGuard, TimeKeeper, VcpuRunner};
use super::{PATIENCE, TICK};
use crate::machine::MachineError;
use crate::run::{Lifecycle, Request};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};

/// Who shares a thread.
enum Crew {
    One(Box<VcpuRunner>),
    All(Vec<VcpuRunner>, Lockstep),
}

impl Crew {
    /// The threads that `vcpus` need.
    fn muster(vcpus: Vec<VcpuRunner>) -> Vec<Crew> {
        match vcpus.first().map(|first| &first.time) {
            Some(TimeKeeper::Instructions(time)) if vcpus.len() > 1 => {
                let time = time.clone();
                let sleeper = vcpus[0].vcpu.clone();
                vcpus[1..].iter().for_each(|other| other.vcpu.sleep_with(&sleeper));
                vec![Crew::All(vcpus, time)]
            }
            _ => vcpus.into_iter().map(|vcpu| Crew::One(Box::new(vcpu))).collect(),
        }
    }

    fn name(&self) -> String {
        match self {
            Crew::One(vcpu) => format!("vcpu{}", vcpu.vp.0),
            Crew::All(..) => "vcpus".into(),
        }
    }

    /// Runs to the end and gives the vCPUs back.
    fn run(self, give_back: &Sender<VcpuRunner>) {
        let vcpus = match self {
            Crew::One(mut vcpu) => {
                vcpu.run();
                vec![*vcpu]
            }
            Crew::All(mut vcpus, time) => {
                // Nobody moves time in his own turn.
                let keeper = std::mem::replace(&mut vcpus[0].time, TimeKeeper::Elsewhere);
                vcpus.iter_mut().for_each(|vcpu| vcpu.time = TimeKeeper::Elsewhere);
                rounds::run(&mut vcpus, &time);
                vcpus.iter_mut().for_each(|vcpu| vcpu.time = keeper.clone());
                vcpus
            }
        };
        for vcpu in vcpus {
            // Nobody waits any more if we were too late.
            let _late = give_back.send(vcpu);
        }
    }
}

/// Runs `vcpus` on threads of their own and gives them back in their order; `None` if one does not hear that the user wants
/// to leave.
pub(super) fn run(
    vcpus: Vec<VcpuRunner>,
    lifecycle: &Lifecycle,
) -> Result<Option<Vec<VcpuRunner>>, MachineError> {
    let wanted = vcpus.len();
    let (give_back, given_back) = mpsc::channel();
    for crew in Crew::muster(vcpus) {
        let (guard, give_back) = (PanicGuard(lifecycle.clone()), give_back.clone());
        let spawned = std::thread::Builder::new().name(crew.name()).spawn(move || {
            let _guard = guard;
            crew.run(&give_back);
        });
        if let Err(e) = spawned {
            lifecycle.request(Request::Host("there is no thread for every vCPU".into()));
            return Err(MachineError::Host("a vCPU's thread", e));
        }
    }
    drop(give_back);
    let mut back: Vec<VcpuRunner> = Vec::with_capacity(wanted);
    let mut patience = PATIENCE;
    while back.len() < wanted {
        match given_back.recv_timeout(TICK) {
            Ok(vcpu) => back.push(vcpu),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(MachineError::Wiring("a vCPU's thread panicked: please report this".into()));
            }
            Err(RecvTimeoutError::Timeout) if lifecycle.user_wants_out() => {
                patience = patience.saturating_sub(TICK);
                if patience.is_zero() {
                    return Ok(None);
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
    back.sort_by_key(|vcpu| vcpu.vp.0);
    Ok(Some(back))
}

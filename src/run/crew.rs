//! The threads of the vCPUs: one each; by the instruction clock one for all.

use super::rota::{Lockstep, Rota};
use super::vcpu::{PanicGuard, VcpuRunner};
use super::{PATIENCE, TICK};
use crate::machine::MachineError;
use crate::run::{Lifecycle, Request};
use std::sync::mpsc::{self, RecvTimeoutError};

/// Who shares a thread.
enum Crew {
    One(Box<VcpuRunner>),
    All(Box<Rota>),
}

/// vCPUs, and what they need where they share a thread.
pub(super) type Crews = (Vec<VcpuRunner>, Option<Lockstep>);

impl Crew {
    /// The threads that `vcpus` need.
    fn muster((vcpus, lockstep): Crews) -> Vec<Crew> {
        match lockstep {
            Some(lockstep) => vec![Crew::All(Box::new(Rota::new(vcpus, lockstep)))],
            None => vcpus.into_iter().map(|vcpu| Crew::One(Box::new(vcpu))).collect(),
        }
    }

    fn name(&self) -> String {
        match self {
            Crew::One(vcpu) => format!("vcpu{}", vcpu.vp.0),
            Crew::All(..) => "vcpus".into(),
        }
    }

    /// Runs to the end and gives the vCPUs back.
    fn run(self) -> Crews {
        match self {
            Crew::One(mut vcpu) => {
                vcpu.run();
                (vec![*vcpu], None)
            }
            Crew::All(mut rota) => {
                rota.run();
                (rota.vcpus, Some(rota.time))
            }
        }
    }
}

/// Runs `vcpus` on threads of their own and gives them back in their order; `None` if one does not hear that the user wants
/// to leave.
pub(super) fn run(crews: Crews, lifecycle: &Lifecycle) -> Result<Option<Crews>, MachineError> {
    let wanted = crews.0.len();
    let (give_back, given_back) = mpsc::channel();
    for crew in Crew::muster(crews) {
        let (guard, give_back) = (PanicGuard(lifecycle.clone()), give_back.clone());
        let spawned = std::thread::Builder::new().name(crew.name()).spawn(move || {
            let _guard = guard;
            // Nobody waits any more if we were too late.
            let _late = give_back.send(crew.run());
        });
        if let Err(e) = spawned {
            lifecycle.request(Request::Host("there is no thread for every vCPU".into()));
            return Err(MachineError::Host("a vCPU's thread", e));
        }
    }
    drop(give_back);
    let (mut back, mut lockstep) = (Vec::with_capacity(wanted), None);
    let mut patience = PATIENCE;
    while back.len() < wanted {
        match given_back.recv_timeout(TICK) {
            Ok((vcpus, its)) => {
                back.extend(vcpus);
                lockstep = its;
            }
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
    back.sort_by_key(|vcpu: &VcpuRunner| vcpu.vp.0);
    Ok(Some((back, lockstep)))
}

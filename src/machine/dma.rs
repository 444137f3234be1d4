//! Accesses of devices to guest memory, as a trace and the debugger's watchpoints hear of them.
//!
//! A device tells its tap. While anything is watched an access that may matter is kept, and every vCPU is called: between two
//! instructions it compares what is kept with its watchpoints, linear ones through its page tables as they are then.

use crate::run::Vcpu;
use crate::trace::Switch;
use paravane_cpu::{CpuState, DebugPlan, WatchHit};
use paravane_devices::{DmaAccess, DmaTap, DmaWatch};
use paravane_memory::{GuestMemory, VpIndex};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Accesses kept for vCPUs that do not come to look: held back, or asleep for good.
const KEPT: usize = 1 << 16;

/// An access, and who compared it.
struct Kept {
    device: u16,
    access: DmaAccess,
    /// A bit for each vCPU.
    seen: u32,
}

#[derive(Default)]
struct State {
    /// What each vCPU watches.
    plans: Vec<Arc<DebugPlan>>,
    kept: VecDeque<Kept>,
    /// Devices' names, by number.
    devices: Vec<Arc<str>>,
}

impl State {
    /// Whether the access may be a watched one.
    fn matters(&self, access: &DmaAccess) -> bool {
        self.plans.iter().any(|plan| plan.may_watch(access.at, access.len, access.write))
    }
}

/// Who listens to devices' accesses.
pub struct Dma {
    trace: Arc<Switch>,
    vcpus: Vec<Arc<Vcpu>>,
    watching: AtomicBool,
    /// Something is kept.
    waiting: AtomicBool,
    state: Mutex<State>,
}

impl Dma {
    pub(super) fn new(trace: &Arc<Switch>, vcpus: &[Arc<Vcpu>]) -> Arc<Dma> {
        let state = State { plans: vec![Arc::default(); vcpus.len()], ..State::default() };
        Arc::new(Dma {
            trace: Arc::clone(trace),
            vcpus: vcpus.to_vec(),
            watching: AtomicBool::new(false),
            waiting: AtomicBool::new(false),
            state: Mutex::new(state),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the device called `label` tells of its accesses.
    pub(super) fn tap(self: &Arc<Dma>, label: &str) -> DmaTap {
        let devices = &mut self.state().devices;
        let label: Arc<str> = label.into();
        devices.push(Arc::clone(&label));
        DmaTap::new(Arc::new(Tap { dma: Arc::clone(self), number: devices.len() as u16 - 1, label }))
    }

    /// The name of device `number`.
    pub fn device(&self, number: u16) -> Arc<str> {
        self.state().devices.get(usize::from(number)).cloned().unwrap_or_else(|| "a device".into())
    }

    /// From now on `vp` watches what `plan` says.
    pub fn watch(&self, vp: VpIndex, plan: &Arc<DebugPlan>) {
        let mut state = self.state();
        state.plans[vp.0 as usize] = Arc::clone(plan);
        self.watching.store(state.plans.iter().any(|plan| plan.watches_memory()), Ordering::Relaxed);
    }

    /// What is kept belongs to another run.
    pub fn forget(&self) {
        self.state().kept.clear();
        self.waiting.store(false, Ordering::Relaxed);
    }

    /// The first kept access that `vp` watches, once for all vCPUs. `cpu`: its state, where it has an address space of its own.
    pub fn hit(&self, vp: VpIndex, cpu: Option<&CpuState>, mem: &GuestMemory) -> Option<WatchHit> {
        if !self.waiting.load(Ordering::Relaxed) {
            return None;
        }
        let mut state = self.state();
        let (plan, everybody) = (Arc::clone(&state.plans[vp.0 as usize]), (1 << state.plans.len()) - 1);
        let mut found = None;
        state.kept.retain_mut(|kept| {
            if found.is_some() || kept.seen >> vp.0 & 1 != 0 {
                return true;
            }
            kept.seen |= 1 << vp.0;
            let access = &kept.access;
            let hit = plan.device_hit(cpu, mem, access.at, access.len, access.write);
            found = hit.map(|hit| WatchHit { device: Some(kept.device), ..hit });
            found.is_none() && kept.seen != everybody
        });
        self.waiting.store(!state.kept.is_empty(), Ordering::Relaxed);
        found
    }

    fn keep(&self, device: u16, access: DmaAccess) {
        let mut state = self.state();
        if !state.matters(&access) {
            return;
        }
        if state.kept.len() == KEPT {
            state.kept.pop_front();
        }
        state.kept.push_back(Kept { device, access, seen: 0 });
        self.waiting.store(true, Ordering::Relaxed);
        drop(state);
        self.vcpus.iter().for_each(|vcpu| vcpu.stop());
    }
}

/// One device's way here.
struct Tap {
    dma: Arc<Dma>,
    number: u16,
    label: Arc<str>,
}

impl DmaWatch for Tap {
    fn listens(&self) -> bool {
        self.dma.watching.load(Ordering::Relaxed) || self.dma.trace.on()
    }

    fn accessed(&self, access: DmaAccess) {
        self.dma.trace.dma(&self.label, access);
        if self.dma.watching.load(Ordering::Relaxed) {
            self.dma.keep(self.number, access);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use paravane_cpu::{Space, WatchKind, Watchpoint};
    use paravane_devices::DmaPurpose;
    use paravane_memory::{MemoryConfig, PhysAddr};
    use std::collections::BTreeSet;

    #[test]
    fn an_access_is_told_once_and_to_whom_it_concerns() {
        let mem = GuestMemory::new(MemoryConfig::pc(4 << 20)).expect("memory");
        let dma = Dma::new(&Arc::default(), &[Arc::default(), Arc::default()]);
        let tap = dma.tap("disk0");
        let (vp0, vp1) = (VpIndex(0), VpIndex(1));
        tap.wrote(DmaPurpose::Data, PhysAddr(0x1000), 512);
        assert!(dma.hit(vp0, None, &mem).is_none());

        let watch = Watchpoint { space: Space::Physical, first: 0x1100, len: 4, kind: WatchKind::Write };
        let plan = Arc::new(DebugPlan { watch: BTreeSet::from([watch]), ..DebugPlan::default() });
        dma.watch(vp1, &plan);
        tap.read(DmaPurpose::Data, PhysAddr(0x1000), 512);
        tap.wrote(DmaPurpose::Data, PhysAddr(0x2000), 512);
        tap.wrote(DmaPurpose::Data, PhysAddr(0x1000), 512);
        assert!(dma.hit(vp0, None, &mem).is_none());
        let hit = dma.hit(vp1, None, &mem).expect("the last of them");
        assert_eq!(
            (hit.at, hit.write, hit.device.map(|n| dma.device(n))),
            (0x1100, true, Some("disk0".into()))
        );
        assert!(dma.hit(vp1, None, &mem).is_none());

        tap.wrote(DmaPurpose::Data, PhysAddr(0x1000), 512);
        dma.forget();
        assert!(dma.hit(vp1, None, &mem).is_none());
    }
}

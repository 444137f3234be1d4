//! Several vCPUs by the instruction clock: they take turns on one thread, always in the same order, so that every run is
//! the same.
//!
//! In a round every vCPU has a slice from the same machine time on; then time moves by the longest of them.

use super::vcpu::{Lockstep, Turn, VcpuRunner};

/// Runs `vcpus`, of which there is at least one, until a lifecycle request is there.
pub(super) fn run(vcpus: &mut [VcpuRunner], time: &Lockstep) {
    vcpus.iter_mut().for_each(VcpuRunner::begin);
    while let Some(idle) = round(vcpus, time) {
        if idle && !vcpus.iter().any(VcpuRunner::called) && !time.skip() {
            vcpus[0].vcpu.sleep_until(|| vcpus.iter().any(VcpuRunner::called));
        }
    }
}

/// Gives everyone a turn; whether nobody has anything to do, or `None` at the end of the run.
fn round(vcpus: &mut [VcpuRunner], time: &Lockstep) -> Option<bool> {
    let budget = time.budget();
    let (mut idle, mut longest) = (true, 0);
    for vcpu in vcpus {
        let before = vcpu.cpu.instructions;
        match vcpu.turn(budget) {
            Turn::On => idle = false,
            Turn::Idle => {}
            Turn::Ended => return None,
        }
        longest = longest.max(vcpu.cpu.instructions.wrapping_sub(before));
    }
    time.passed(longest, true);
    Some(idle)
}

//! Disks of a deterministic machine: requests run on the workers as ever, and are completed between two slices of
//! execution, in the order they were submitted. So what the guest sees depends on instruction counts alone.

use paravane_devices::block::{BlockBackend, BlockCounters, BlockError, BlockRequest, Completion};
use std::sync::{Arc, Condvar, Mutex};

type Done = (u64, BlockRequest, Result<(), BlockError>);

#[derive(Default)]
struct State {
    submitted: u64,
    under_way: usize,
    done: Vec<Done>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    all_done: Condvar,
}

/// A back end whose completions wait for [`LockstepDisk::settle`].
pub struct LockstepDisk {
    inner: Arc<dyn BlockBackend>,
    shared: Arc<Shared>,
}

/// Stands in for the front end until `settle`.
struct Collector {
    number: u64,
    front_end: Arc<dyn Completion>,
    shared: Arc<Shared>,
}

impl Completion for Collector {
    fn complete(&self, mut request: BlockRequest, result: Result<(), BlockError>) {
        request.completion = Arc::clone(&self.front_end);
        let mut state = self.shared.state.lock().expect("lockstep disk");
        state.done.push((self.number, request, result));
        state.under_way -= 1;
        if state.under_way == 0 {
            self.shared.all_done.notify_all();
        }
    }
}

impl LockstepDisk {
    pub(super) fn new(inner: Arc<dyn BlockBackend>) -> LockstepDisk {
        LockstepDisk { inner, shared: Arc::default() }
    }

    /// Waits for everything submitted and completes it; called with no device locked.
    pub fn settle(&self) {
        let mut done = {
            let mut state = self.shared.state.lock().expect("lockstep disk");
            while state.under_way > 0 {
                state = self.shared.all_done.wait(state).expect("lockstep disk");
            }
            std::mem::take(&mut state.done)
        };
        done.sort_by_key(|d| d.0);
        for (_, request, result) in done {
            let front_end = Arc::clone(&request.completion);
            front_end.complete(request, result);
        }
    }
}

impl BlockBackend for LockstepDisk {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn read_only(&self) -> bool {
        self.inner.read_only()
    }

    fn can_discard(&self) -> bool {
        self.inner.can_discard()
    }

    fn serial(&self) -> &str {
        self.inner.serial()
    }

    fn submit(&self, mut request: BlockRequest) {
        let number = {
            let mut state = self.shared.state.lock().expect("lockstep disk");
            state.submitted += 1;
            state.under_way += 1;
            state.submitted
        };
        let front_end = Arc::clone(&request.completion);
        request.completion = Arc::new(Collector { number, front_end, shared: Arc::clone(&self.shared) });
        self.inner.submit(request);
    }

    fn drain(&self) {
        self.settle();
    }

    fn counters(&self) -> &BlockCounters {
        self.inner.counters()
    }
}

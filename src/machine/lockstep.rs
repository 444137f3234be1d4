//! Disks of a deterministic machine: what the guest asks for waits until the end of the round, between two slices of execution,
//! and is done and completed there, one request after the other in the order they were submitted. So what the guest sees, in its memory
//! too, depends on instruction counts alone.
//!
//! What such a disk holds can be put back: before a cluster is written for the first time since the last look, its old content is
//! kept.

use paravane_devices::block::{
    BlockBackend, BlockCounters, BlockData, BlockError, BlockOp, BlockRequest, Completion,
};
use paravane_devices::{Snapshot, StateError, StateStream};
use paravane_memory::{GuestMemory, PhysAddr};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use xxhash_rust::xxh3::Xxh3;

/// What is put back at a time.
const CLUSTER: u64 = 4096;

#[derive(Default)]
struct State {
    /// What was submitted and is not done yet.
    waiting: VecDeque<BlockRequest>,
    /// A hash of all writes so far, in order.
    written: u64,
    /// Old content by cluster, if it is kept.
    undo: Option<DiskUndo>,
}

/// What clusters of a disk held before they were written.
#[derive(Default, Debug)]
pub struct DiskUndo(BTreeMap<u64, Vec<u8>>);

impl DiskUndo {
    /// How much it holds.
    pub fn bytes(&self) -> usize {
        self.0.values().map(Vec::len).sum()
    }

    /// Reaches back to where `older` does.
    pub fn merge_older(&mut self, older: DiskUndo) {
        self.0.extend(older.0);
    }
}

/// A back end that does its work in [`LockstepDisk::settle`].
pub struct LockstepDisk {
    inner: Arc<dyn BlockBackend>,
    mem: GuestMemory,
    state: Mutex<State>,
}

/// Stands in for the front end until a request is done.
#[derive(Default)]
struct Waiter(Mutex<Option<(BlockRequest, Result<(), BlockError>)>>, Condvar);

impl Completion for Waiter {
    fn complete(&self, request: BlockRequest, result: Result<(), BlockError>) {
        *self.0.lock().expect("waiter") = Some((request, result));
        self.1.notify_all();
    }
}

impl LockstepDisk {
    pub(super) fn new(inner: Arc<dyn BlockBackend>, mem: &GuestMemory) -> LockstepDisk {
        LockstepDisk { inner, mem: mem.clone(), state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("lockstep disk")
    }

    /// Does and completes what was submitted; what completions submit waits for the next time. Called with no device locked.
    pub fn settle(&self) {
        let waiting = std::mem::take(&mut self.state().waiting);
        for request in waiting {
            self.note(&request);
            let front_end = Arc::clone(&request.completion);
            let (mut request, result) = self.wait_for(request);
            request.completion = Arc::clone(&front_end);
            front_end.complete(request, result);
        }
    }

    /// What was submitted belongs to another run.
    pub fn forget(&self) {
        self.state().waiting.clear();
    }

    /// Nothing was submitted that is not completed.
    pub fn idle(&self) -> bool {
        self.state().waiting.is_empty()
    }

    /// Walks over the hash of what was written.
    pub fn shared_state(&self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        self.state().written.state(s)
    }

    /// From now on old content is kept.
    pub fn keep_undo(&self) {
        self.state().undo = Some(DiskUndo::default());
    }

    /// What was overwritten since the last call, if it is kept.
    pub fn take_undo(&self) -> DiskUndo {
        self.state().undo.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Puts old content back. The disk is idle.
    pub fn put_back(&self, undo: &DiskUndo) {
        for (cluster, bytes) in &undo.0 {
            // What could be written once can be written again; where not, the guest sees its own later data.
            let _failed = self.now(BlockOp::Write, cluster * CLUSTER, bytes.clone());
        }
    }

    /// One request of our own, waited for.
    fn now(&self, op: BlockOp, offset: u64, buffer: Vec<u8>) -> Result<Vec<u8>, BlockError> {
        let mut request = BlockRequest::new(op, 0, Arc::new(Waiter::default()));
        (request.data, request.offset, request.buffer) = (BlockData::Owned, offset, buffer);
        let (request, result) = self.wait_for(request);
        result.map(|()| request.buffer)
    }

    /// Has the inner back end do `request`.
    fn wait_for(&self, mut request: BlockRequest) -> (BlockRequest, Result<(), BlockError>) {
        if self.inner.serve_now(&mut request) {
            return (request, Ok(()));
        }
        let waiter = Arc::new(Waiter::default());
        request.completion = Arc::clone(&waiter) as Arc<dyn Completion>;
        self.inner.submit(request);
        let mut done = waiter.0.lock().expect("waiter");
        loop {
            match done.take() {
                Some(done) => return done,
                None => done = waiter.1.wait(done).expect("waiter"),
            }
        }
    }

    /// Before a request changes the disk: what it writes is hashed, what it overwrites is kept.
    fn note(&self, request: &BlockRequest) {
        let len = request.total();
        let end = request.offset.saturating_add(len);
        if matches!(request.op, BlockOp::Read | BlockOp::Flush) || end > self.size() || len == 0 {
            return;
        }
        let hash = self.hash(request);
        let mut missing = Vec::new();
        {
            let mut state = self.state();
            let mut hasher = Xxh3::with_seed(state.written);
            hasher.update(&hash.to_le_bytes());
            state.written = hasher.digest();
            if let Some(undo) = &state.undo {
                let clusters = request.offset / CLUSTER..=(end - 1) / CLUSTER;
                missing.extend(clusters.filter(|c| !undo.0.contains_key(c)));
            }
        }
        for cluster in missing {
            let at = cluster * CLUSTER;
            let buffer = vec![0; CLUSTER.min(self.size() - at) as usize];
            if let Ok(old) = self.now(BlockOp::Read, at, buffer)
                && let Some(undo) = &mut self.state().undo
            {
                undo.0.insert(cluster, old);
            }
        }
    }

    fn hash(&self, request: &BlockRequest) -> u64 {
        let mut hasher = Xxh3::new();
        let op = match request.op {
            BlockOp::Read => 0,
            BlockOp::Write => 1,
            BlockOp::Flush => 2,
            BlockOp::Discard => 3,
            BlockOp::WriteZeroes { .. } => 4u8,
        };
        hasher.update(&[op]);
        hasher.update(&request.offset.to_le_bytes());
        hasher.update(&request.total().to_le_bytes());
        if request.op == BlockOp::Write {
            match request.data {
                BlockData::Owned => hasher.update(&request.buffer),
                BlockData::Guest => {
                    let mut page = [0; CLUSTER as usize];
                    for segment in &request.segments {
                        let mut done = 0;
                        while done < segment.len {
                            let part = &mut page[..CLUSTER.min(segment.len - done) as usize];
                            if self.mem.read(PhysAddr(segment.at.0.saturating_add(done)), part).is_ok() {
                                hasher.update(part);
                            }
                            done += part.len() as u64;
                        }
                    }
                }
            }
        }
        hasher.digest()
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

    fn submit(&self, request: BlockRequest) {
        self.state().waiting.push_back(request);
    }

    fn drain(&self) {
        while !self.idle() {
            self.settle();
        }
    }

    fn counters(&self) -> &BlockCounters {
        self.inner.counters()
    }
}

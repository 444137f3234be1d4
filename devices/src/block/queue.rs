//! The queue between front ends and the worker threads of one image.
//!
//! A worker sleeps on a condition variable; a submitter wakes one only when none is awake to take the request, so that a
//! burst costs one wake. Requests that wait for the host's disk (flush, discard) do not count as awake.
//!
//! An idle worker sleeps at once. Spinning first was measured, in host CPU time per 4 KiB read at depth 1 (medians of interleaved
//! runs, busy 2-CPU host): a guest that computes 5 us between reads pays 3.9 us without spinning, 6.3 us with 5 us and 8.0 us with
//! 20 us of it; one that computes 20 us pays 4.3, 9.8 and 32 us.

use super::{
    BlockBackend, BlockCounters, BlockData, BlockError, BlockOp, BlockRequest, Fault, FaultInjector, RawImage,
};
use crate::dma::{DmaPurpose, DmaTap};
use paravane_memory::GuestMemory;
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

/// A backlog that is worth a second worker.
const BACKLOG: usize = 16;

/// Bytes up to which a transfer is short enough for the submitter's own thread.
const SHORT: u64 = 128 << 10;

/// How a queue runs.
#[derive(Clone, Debug)]
pub struct QueueOptions {
    /// Worker threads, at least one.
    pub workers: usize,
    /// Names the disk to guests: up to 20 bytes of ASCII.
    pub serial: String,
    /// Who hears of accesses to guest memory.
    pub dma: DmaTap,
}

impl Default for QueueOptions {
    fn default() -> QueueOptions {
        QueueOptions { workers: 2, serial: String::new(), dma: DmaTap::nobody() }
    }
}

#[derive(Default)]
struct State {
    waiting: VecDeque<BlockRequest>,
    sleeping: usize,
    /// Workers awake that will soon look at `waiting` again.
    prompt: usize,
    /// Requests with a worker or its completion.
    running: usize,
    /// Threads in [`BlockBackend::drain`].
    draining: usize,
    closed: bool,
}

struct Shared {
    image: RawImage,
    memory: GuestMemory,
    faults: Option<Arc<dyn FaultInjector>>,
    counters: BlockCounters,
    dma: DmaTap,
    state: Mutex<State>,
    work: Condvar,
    idle: Condvar,
}

/// An image with its workers: the [`BlockBackend`] of every front end.
pub struct BlockQueue {
    shared: Arc<Shared>,
    serial: String,
    workers: Vec<JoinHandle<()>>,
}

impl BlockQueue {
    /// Starts the workers of `image`.
    pub fn new(
        image: RawImage,
        memory: GuestMemory,
        counters: BlockCounters,
        faults: Option<Arc<dyn FaultInjector>>,
        options: QueueOptions,
    ) -> io::Result<BlockQueue> {
        let state = State { waiting: VecDeque::with_capacity(256), ..State::default() };
        let (state, work, idle) = (Mutex::new(state), Condvar::new(), Condvar::new());
        let shared =
            Arc::new(Shared { image, memory, faults, counters, dma: options.dma, state, work, idle });
        let workers = (0..options.workers.max(1))
            .map(|_| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new().name("block".into()).spawn(move || shared.work())
            })
            .collect::<io::Result<_>>()?;
        Ok(BlockQueue { shared, serial: options.serial, workers })
    }
}

impl BlockBackend for BlockQueue {
    fn size(&self) -> u64 {
        self.shared.image.size()
    }

    fn read_only(&self) -> bool {
        self.shared.image.read_only()
    }

    fn can_discard(&self) -> bool {
        !self.read_only()
    }

    fn serial(&self) -> &str {
        &self.serial
    }

    fn serve_now(&self, request: &mut BlockRequest) -> bool {
        let s = &self.shared;
        if s.faults.is_some() || is_slow(request.op) || request.total() > SHORT {
            return false;
        }
        let done = s.image.run_now(request, &s.memory);
        if done {
            s.tell(request);
            s.counters.count(request, &Ok(()));
            s.counters.served_now.add(1);
        }
        done
    }

    fn submit(&self, request: BlockRequest) {
        let mut s = self.shared.state.lock().expect("block queue");
        s.waiting.push_back(request);
        self.shared.wake_for(s);
    }

    fn submit_all(&self, requests: &mut Vec<BlockRequest>) {
        let mut s = self.shared.state.lock().expect("block queue");
        s.waiting.extend(requests.drain(..));
        self.shared.wake_for(s);
    }

    fn drain(&self) {
        let mut s = self.shared.state.lock().expect("block queue");
        s.draining += 1;
        while s.running > 0 || !s.waiting.is_empty() {
            s = self.shared.idle.wait(s).expect("block queue");
        }
        s.draining -= 1;
    }

    fn counters(&self) -> &BlockCounters {
        &self.shared.counters
    }
}

impl Drop for BlockQueue {
    /// Finishes what was submitted, then ends the workers. If a completion drops the last handle, the image stays locked until
    /// that worker is through: [`BlockBackend::drain`] before dropping rules this out.
    fn drop(&mut self) {
        self.shared.state.lock().expect("block queue").closed = true;
        self.shared.work.notify_all();
        let me = std::thread::current().id();
        for w in self.workers.drain(..) {
            // The last handle may be dropped inside a completion: a worker cannot wait for itself.
            if w.thread().id() != me {
                let _panicked = w.join();
            }
        }
    }
}

fn is_slow(op: BlockOp) -> bool {
    !matches!(op, BlockOp::Read | BlockOp::Write)
}

impl Shared {
    /// Wakes a worker if what waits would wait for long otherwise.
    fn wake_for(&self, s: MutexGuard<'_, State>) {
        let waiting = s.waiting.len();
        let wake = waiting > 0 && s.sleeping > 0 && (s.prompt == 0 || waiting >= BACKLOG);
        drop(s);
        if wake {
            self.counters.wakes.add(1);
            self.work.notify_one();
        }
    }

    fn work(&self) {
        let mut s = self.state.lock().expect("block queue");
        s.prompt += 1;
        loop {
            if let Some(mut request) = s.waiting.pop_front() {
                s.running += 1;
                let slow = is_slow(request.op);
                let wake = slow && self.give_up_turn(&mut s);
                drop(s);
                if wake {
                    self.work.notify_one();
                }
                let result = self.run(&mut request);
                let completion = Arc::clone(&request.completion);
                completion.complete(request, result);
                s = self.state.lock().expect("block queue");
                s.prompt += usize::from(slow);
                s.running -= 1;
            } else if s.closed {
                s.prompt -= 1;
                return;
            } else {
                if s.running == 0 && s.draining > 0 {
                    self.idle.notify_all();
                }
                s.prompt -= 1;
                s.sleeping += 1;
                s = self.work.wait(s).expect("block queue");
                s.sleeping -= 1;
                s.prompt += 1;
            }
        }
    }

    /// This worker will be away for long; whether another must be woken for what is waiting.
    fn give_up_turn(&self, s: &mut State) -> bool {
        s.prompt -= 1;
        s.prompt == 0 && s.sleeping > 0 && !s.waiting.is_empty()
    }

    fn transfer(&self, request: &mut BlockRequest) -> Result<(), BlockError> {
        let result = self.image.run(request, &self.memory);
        // What the host's storage fails at may have moved in part.
        if matches!(result, Ok(()) | Err(BlockError::Io(_) | BlockError::NoSpace)) {
            self.tell(request);
        }
        result
    }

    /// Tells of the guest memory that `request` read or wrote.
    fn tell(&self, request: &BlockRequest) {
        if request.data != BlockData::Guest {
            return;
        }
        for s in &request.segments {
            match request.op {
                BlockOp::Read => self.dma.wrote(DmaPurpose::Data, s.at, s.len),
                BlockOp::Write => self.dma.read(DmaPurpose::Data, s.at, s.len),
                _ => {}
            }
        }
    }

    fn run(&self, request: &mut BlockRequest) -> Result<(), BlockError> {
        let result = match self.faults.as_ref().and_then(|f| f.fault(request)) {
            Some(Fault::Error(e)) => Err(e),
            Some(Fault::Delay(d)) => {
                std::thread::sleep(d);
                self.transfer(request)
            }
            None => self.transfer(request),
        };
        self.counters.count(request, &result);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Completion, Counters, ImageOptions, Segment};
    use super::*;
    use paravane_memory::{MemoryConfig, PhysAddr};
    use std::sync::mpsc;
    use std::time::Duration;

    struct Channel(Mutex<mpsc::Sender<(BlockRequest, Result<(), BlockError>)>>);

    impl Completion for Channel {
        fn complete(&self, request: BlockRequest, result: Result<(), BlockError>) {
            let _closed = self.0.lock().unwrap().send((request, result));
        }
    }

    struct Rig {
        queue: Option<BlockQueue>,
        memory: GuestMemory,
        done: mpsc::Receiver<(BlockRequest, Result<(), BlockError>)>,
        completion: Arc<Channel>,
        path: std::path::PathBuf,
    }

    fn rig(name: &str, size: u64, faults: Option<Arc<dyn FaultInjector>>) -> Rig {
        let path = std::env::temp_dir().join(format!("paravane-queue-{}-{name}", std::process::id()));
        std::fs::File::create(&path).and_then(|f| f.set_len(size)).expect("image");
        let image = RawImage::open(&path, ImageOptions::default()).expect("open");
        let memory = GuestMemory::new(MemoryConfig::pc(4 << 20)).expect("memory");
        let counters = BlockCounters::new(&Counters::default(), "disk");
        let queue =
            BlockQueue::new(image, memory.clone(), counters, faults, QueueOptions::default()).expect("queue");
        let (tx, done) = mpsc::channel();
        let queue = Some(queue);
        Rig { queue, memory, done, completion: Arc::new(Channel(Mutex::new(tx))), path }
    }

    impl Rig {
        fn queue(&self) -> &BlockQueue {
            self.queue.as_ref().expect("queue")
        }

        fn guest(&self, op: BlockOp, offset: u64, segments: &[(u64, u64)]) -> Result<(), BlockError> {
            let mut r = BlockRequest::new(op, 1, Arc::clone(&self.completion) as Arc<dyn Completion>);
            r.offset = offset;
            r.segments.extend(segments.iter().map(|&(at, len)| Segment { at: PhysAddr(at), len }));
            self.queue().submit(r);
            self.done.recv_timeout(Duration::from_secs(10)).expect("completion").1
        }
    }

    impl Drop for Rig {
        fn drop(&mut self) {
            let _gone = std::fs::remove_file(&self.path);
        }
    }

    #[test]
    fn scatter_lists_go_straight_to_the_file_and_back() {
        let rig = rig("scatter", 1 << 20, None);
        let data: Vec<u8> = (0..4096).map(|i| (i / 7) as u8).collect();
        rig.memory.write(PhysAddr(0x10FFE), &data).unwrap();
        assert_eq!(rig.guest(BlockOp::Write, 512, &[(0x10FFE, 1000), (0x10FFE + 1000, 3096)]), Ok(()));
        assert_eq!(rig.guest(BlockOp::Flush, 0, &[]), Ok(()));
        assert_eq!(rig.guest(BlockOp::Read, 512, &[(0x2_0000, 4000), (0x3_0000, 96)]), Ok(()));
        let mut back = vec![0; 4096];
        rig.memory.read(PhysAddr(0x2_0000), &mut back[..4000]).unwrap();
        rig.memory.read(PhysAddr(0x3_0000), &mut back[4000..]).unwrap();
        assert_eq!(back, data);
        assert_eq!(&std::fs::read(&rig.path).unwrap()[512..4608], data);
        assert_eq!(rig.guest(BlockOp::Read, 0, &[((4 << 20) - 256, 512)]), Err(BlockError::BadAddress));
        assert_eq!(rig.queue().counters().bytes_copied.get(), 0);
        assert_eq!(rig.queue().counters().bytes_written.get(), 4096);
    }

    struct EveryWriteFails;

    impl FaultInjector for EveryWriteFails {
        fn fault(&self, request: &BlockRequest) -> Option<Fault> {
            (request.op == BlockOp::Write).then_some(Fault::Error(BlockError::NoSpace))
        }
    }

    #[test]
    fn faults_are_reported_and_counted() {
        let rig = rig("fault", 4096, Some(Arc::new(EveryWriteFails)));
        assert_eq!(rig.guest(BlockOp::Write, 0, &[(0, 512)]), Err(BlockError::NoSpace));
        assert_eq!(rig.guest(BlockOp::Read, 0, &[(0, 512)]), Ok(()));
        assert_eq!(rig.queue().counters().errors.get(), 1);
    }

    #[test]
    fn what_was_submitted_is_done_before_the_queue_ends() {
        let mut rig = rig("drop", 64 << 10, None);
        for i in 0..64 {
            let mut r =
                BlockRequest::new(BlockOp::Write, i, Arc::clone(&rig.completion) as Arc<dyn Completion>);
            (r.data, r.offset, r.buffer) = (BlockData::Owned, i * 512, vec![i as u8; 512]);
            rig.queue().submit(r);
        }
        let path = rig.path.clone();
        drop(rig.queue.take());
        let data = std::fs::read(&path).unwrap();
        assert!((0..64).all(|i| data[i * 512] == i as u8));
    }
}

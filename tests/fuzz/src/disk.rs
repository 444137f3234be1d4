//! A disk in memory whose requests end when the script says so.

use paravane_devices::Counters;
use paravane_devices::block::{
    BlockBackend, BlockCounters, BlockData, BlockError, BlockOp, BlockRequest, SECTOR_SIZE,
};
use paravane_memory::{GuestMemory, PhysAddr};
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

const SECTORS: u64 = 64;
/// A front end may have this much under way; a real one is bounded by its queue, this says when it is not.
const MOST_WAITING: usize = 4096;
/// What one request may own.
const LARGEST_BUFFER: usize = 64 << 20;

/// The disk.
pub struct ScriptedDisk {
    memory: GuestMemory,
    content: Mutex<Vec<u8>>,
    waiting: Mutex<VecDeque<BlockRequest>>,
    counters: BlockCounters,
}

impl ScriptedDisk {
    /// A small disk full of zeroes.
    pub fn new(memory: &GuestMemory, counters: &Counters) -> ScriptedDisk {
        ScriptedDisk {
            memory: memory.clone(),
            content: Mutex::new(vec![0; (SECTORS * SECTOR_SIZE) as usize]),
            waiting: Mutex::default(),
            counters: BlockCounters::new(counters, "disk"),
        }
    }

    /// Ends the oldest request, or the newest; with an error if `fails`. Call it with no device locked.
    pub fn complete_one(&self, newest: bool, fails: bool) -> bool {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let next = if newest { waiting.pop_back() } else { waiting.pop_front() };
        drop(waiting);
        let Some(mut request) = next else { return false };
        let result = if fails { Err(BlockError::NoSpace) } else { self.run(&mut request) };
        let completion = request.completion.clone();
        completion.complete(request, result);
        true
    }

    fn run(&self, request: &mut BlockRequest) -> Result<(), BlockError> {
        assert!(request.buffer.len() <= LARGEST_BUFFER, "a request owns {} bytes", request.buffer.len());
        let mut content = self.content.lock().unwrap_or_else(PoisonError::into_inner);
        let len = request.total();
        let end = request.offset.checked_add(len).filter(|&end| end <= content.len() as u64);
        let end = end.ok_or(BlockError::OutOfRange)?;
        let range = &mut content[request.offset as usize..end as usize];
        match (request.op, request.data) {
            (BlockOp::Flush, _) => {}
            (BlockOp::Discard | BlockOp::WriteZeroes { .. }, _) => range.fill(0),
            (BlockOp::Read, BlockData::Owned) => request.buffer.copy_from_slice(range),
            (BlockOp::Write, BlockData::Owned) => range.copy_from_slice(&request.buffer),
            (op, BlockData::Guest) => {
                let mut rest = range;
                for segment in &request.segments {
                    let (part, behind) = rest.split_at_mut(segment.len as usize);
                    self.transfer(op, segment.at, part)?;
                    rest = behind;
                }
            }
        }
        Ok(())
    }

    fn transfer(&self, op: BlockOp, at: PhysAddr, part: &mut [u8]) -> Result<(), BlockError> {
        let done = if op == BlockOp::Read { self.memory.write(at, part) } else { self.memory.read(at, part) };
        done.map_err(|_| BlockError::BadAddress)
    }
}

impl BlockBackend for ScriptedDisk {
    fn size(&self) -> u64 {
        SECTORS * SECTOR_SIZE
    }

    fn read_only(&self) -> bool {
        false
    }

    fn can_discard(&self) -> bool {
        true
    }

    fn serial(&self) -> &str {
        "scripted"
    }

    /// Small reads end at once, as those that the host has cached.
    fn serve_now(&self, request: &mut BlockRequest) -> bool {
        request.op == BlockOp::Read && request.total() <= 2 * SECTOR_SIZE && self.run(request).is_ok()
    }

    fn submit(&self, request: BlockRequest) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(waiting.len() < MOST_WAITING, "a front end submits without end");
        waiting.push_back(request);
    }

    fn drain(&self) {
        while self.complete_one(false, false) {}
    }

    fn counters(&self) -> &BlockCounters {
        &self.counters
    }
}

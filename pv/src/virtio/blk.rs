//! Block device (VIRTIO 1.2, section 5.2).

use super::VirtioDevice;
use super::rings::{Chain, Piece, Rings};
use super::spec::{blk, device_type};
use paravane_devices::block::{
    BlockBackend, BlockData, BlockError, BlockOp, BlockRequest, Completion, SECTOR_SIZE, Segment,
};
use paravane_devices::{DmaPurpose, Snapshot, StateError, StateStream};
use paravane_memory::PhysAddr;
use std::sync::Arc;

const QUEUE: usize = 0;
const QUEUE_SIZE: u16 = 256;
/// Bytes that one doorbell may move on the vCPU's thread.
const SERVED_AT_ONCE: u64 = 256 << 10;
const HEADER_LEN: usize = 16;
const MAX_DISCARD_SECTORS: u32 = 1 << 22;
const BLOCK_SIZE: u32 = 512;
/// Physical block of 4 KiB: 2^3 logical ones.
const PHYSICAL_BLOCK_EXP: u8 = 3;

/// One request with the back end.
#[derive(Clone, Copy)]
struct Slot {
    head: u16,
    status_at: PhysAddr,
    /// Bytes that the device writes besides the status.
    data_written: u32,
    /// A write that must be on the disk before it is done.
    then_flush: bool,
}

/// virtio-blk.
pub struct VirtioBlk {
    // wiring
    backend: Arc<dyn BlockBackend>,
    completion: Option<Arc<dyn Completion>>,
    // bookkeeping
    chain: Chain,
    spare: Vec<BlockRequest>,
    /// What one doorbell brought, submitted together.
    batch: Vec<BlockRequest>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    epoch: u32,
    in_flight: usize,
    write_through: bool,
    // guest-visible state
    config: [u8; blk::CONFIG_LEN],
}

/// What a chain asks for.
enum Asked {
    Submit(BlockRequest),
    /// Done already: status and bytes written besides it.
    Done(u8, u32),
    /// No place for a status.
    Malformed,
}

/// Saved while nothing is in flight: all slots are free then, and which is taken next nobody sees. Loading abandons what is.
impl Snapshot for VirtioBlk {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        let VirtioBlk {
            backend: _,
            completion: _,
            chain: _,
            spare: _,
            batch: _,
            slots,
            free,
            epoch: _,
            in_flight,
            write_through,
            config,
        } = self;
        if s.loads() {
            slots.clear();
            free.clear();
            *in_flight = 0;
        }
        s.field("write_through", write_through)?;
        s.field("config", config)
    }
}

impl VirtioBlk {
    /// A disk over `backend`.
    pub fn new(backend: Arc<dyn BlockBackend>) -> VirtioBlk {
        let mut d = VirtioBlk {
            config: config(backend.size() / SECTOR_SIZE),
            backend,
            completion: None,
            chain: Chain::default(),
            spare: Vec::new(),
            batch: Vec::new(),
            slots: Vec::new(),
            free: Vec::new(),
            epoch: 0,
            in_flight: 0,
            write_through: false,
        };
        d.chain.readable.reserve(usize::from(QUEUE_SIZE));
        d.chain.writable.reserve(usize::from(QUEUE_SIZE));
        d
    }

    fn writeback(&self) -> bool {
        self.config[blk::CONFIG_WRITEBACK as usize] != 0
    }

    /// Without FLUSH the driver cannot ask for durability, so each write must have it (section 5.2.6.2).
    fn set_write_through(&mut self, rings: &Rings) {
        self.write_through =
            if rings.has(blk::F_CONFIG_WCE) { !self.writeback() } else { !rings.has(blk::F_FLUSH) };
    }

    fn request(&mut self, op: BlockOp) -> Option<BlockRequest> {
        let mut r = match self.spare.pop() {
            Some(r) => r,
            None => BlockRequest::new(op, 0, Arc::clone(self.completion.as_ref()?)),
        };
        (r.op, r.data, r.offset, r.len) = (op, BlockData::Guest, 0, 0);
        r.segments.clear();
        Some(r)
    }

    fn parse(&mut self, rings: &mut Rings) -> (Asked, PhysAddr) {
        let mut header = [0; HEADER_LEN];
        let status_at = split_status(&mut self.chain.writable);
        let (Some(status_at), true) = (status_at, take(rings, &mut self.chain.readable, &mut header)) else {
            return (Asked::Malformed, PhysAddr(0));
        };
        let word =
            |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let sector = u64::from(word(8)) | u64::from(word(12)) << 32;
        let asked = match word(0) {
            blk::T_IN => self.data(BlockOp::Read, sector),
            blk::T_OUT => self.data(BlockOp::Write, sector),
            blk::T_FLUSH => self.request(BlockOp::Flush).map(Asked::Submit),
            blk::T_GET_ID => Some(self.get_id(rings)),
            kind @ (blk::T_DISCARD | blk::T_WRITE_ZEROES) => self.range(rings, kind),
            _ => Some(Asked::Done(blk::S_UNSUPP, 0)),
        };
        (asked.unwrap_or(Asked::Done(blk::S_IOERR, 0)), status_at)
    }

    fn data(&mut self, op: BlockOp, sector: u64) -> Option<Asked> {
        let mut r = self.request(op)?;
        let pieces = if op == BlockOp::Read { &self.chain.writable } else { &self.chain.readable };
        for p in pieces.iter().filter(|p| p.len > 0) {
            match r.segments.last_mut() {
                Some(s) if s.at.checked_add(s.len) == Some(p.at) => s.len += p.len,
                _ => r.segments.push(Segment { at: p.at, len: p.len }),
            }
        }
        let total = r.total();
        let offset = sector.checked_mul(SECTOR_SIZE);
        if total == 0 || !total.is_multiple_of(SECTOR_SIZE) || total > u64::from(u32::MAX) {
            self.spare.push(r);
            return Some(Asked::Done(blk::S_IOERR, 0));
        }
        match offset {
            Some(offset) => {
                r.offset = offset;
                Some(Asked::Submit(r))
            }
            None => {
                self.spare.push(r);
                Some(Asked::Done(blk::S_IOERR, 0))
            }
        }
    }

    fn get_id(&mut self, rings: &Rings) -> Asked {
        let mut id = [0; blk::ID_BYTES];
        id.iter_mut().zip(self.backend.serial().bytes()).for_each(|(to, from)| *to = from);
        let mut done = 0;
        for p in &self.chain.writable {
            let n = (p.len as usize).min(id.len() - done);
            if rings.write(DmaPurpose::Data, p.at, &id[done..done + n]).is_err() {
                return Asked::Done(blk::S_IOERR, 0);
            }
            done += n;
        }
        Asked::Done(blk::S_OK, done as u32)
    }

    /// Discard and write-zeroes with one segment: sector, sectors, flags.
    fn range(&mut self, rings: &mut Rings, kind: u32) -> Option<Asked> {
        let mut s = [0; 16];
        if !take(rings, &mut self.chain.readable, &mut s) || self.chain.readable.iter().any(|p| p.len > 0) {
            return Some(Asked::Done(blk::S_IOERR, 0));
        }
        let word = |at: usize| u32::from_le_bytes([s[at], s[at + 1], s[at + 2], s[at + 3]]);
        let (sectors, flags) = (word(8), word(12));
        let unmap = flags & blk::WRITE_ZEROES_FLAG_UNMAP != 0;
        if flags & !blk::WRITE_ZEROES_FLAG_UNMAP != 0 || (unmap && kind == blk::T_DISCARD) {
            return Some(Asked::Done(blk::S_UNSUPP, 0));
        }
        let offset = (u64::from(word(0)) | u64::from(word(4)) << 32).checked_mul(SECTOR_SIZE)?;
        if sectors > MAX_DISCARD_SECTORS {
            return None;
        }
        let op = if kind == blk::T_DISCARD { BlockOp::Discard } else { BlockOp::WriteZeroes { unmap } };
        let mut r = self.request(op)?;
        (r.offset, r.len) = (offset, u64::from(sectors) * SECTOR_SIZE);
        Some(Asked::Submit(r))
    }

    fn enqueue(&mut self, mut request: BlockRequest, status_at: PhysAddr) {
        let data_written = if request.op == BlockOp::Read { request.total() as u32 } else { 0 };
        let then_flush =
            self.write_through && matches!(request.op, BlockOp::Write | BlockOp::WriteZeroes { .. });
        let slot = Slot { head: self.chain.head, status_at, data_written, then_flush };
        let index = self.free.pop().unwrap_or(self.slots.len() as u32);
        match self.slots.get_mut(index as usize) {
            Some(s) => *s = slot,
            None => self.slots.push(slot),
        }
        request.token = u64::from(self.epoch) << 32 | u64::from(index);
        self.in_flight += 1;
        self.batch.push(request);
    }

    /// Completes what needs no waiting for the host, up to `budget` bytes; the rest stays in the batch.
    fn serve_now(&mut self, rings: &mut Rings, budget: &mut u64) {
        let mut kept = 0;
        while kept < self.batch.len() {
            let bytes = self.batch[kept].total();
            if bytes <= *budget && self.backend.serve_now(&mut self.batch[kept]) {
                *budget -= bytes;
                let request = self.batch.remove(kept);
                self.completed(rings, request, Ok(()));
            } else {
                kept += 1;
            }
        }
    }

    fn finish(&mut self, rings: &mut Rings, head: u16, status_at: PhysAddr, status: u8, written: u32) {
        if rings.write(DmaPurpose::Request, status_at, &[status]).is_err() {
            rings.ask_for_reset();
            return;
        }
        rings.push(QUEUE, head, written.saturating_add(1));
    }
}

impl VirtioDevice for VirtioBlk {
    fn device_type(&self) -> u16 {
        device_type::BLOCK
    }

    fn class(&self) -> u32 {
        0x01_00_00
    }

    fn transitional_id(&self) -> u16 {
        0x1001
    }

    fn features(&self) -> u64 {
        let common = blk::F_SEG_MAX | blk::F_BLK_SIZE | blk::F_TOPOLOGY | blk::F_FLUSH;
        if self.backend.read_only() {
            return common | blk::F_RO;
        }
        let discard = if self.backend.can_discard() { blk::F_DISCARD } else { 0 };
        common | blk::F_CONFIG_WCE | blk::F_WRITE_ZEROES | discard
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn config_store(&mut self, rings: &Rings, offset: u64, value: u8) {
        if offset == blk::CONFIG_WRITEBACK && !self.backend.read_only() {
            self.config[blk::CONFIG_WRITEBACK as usize] = value & 1;
            self.set_write_through(rings);
        }
    }

    fn connect(&mut self, completion: Arc<dyn Completion>) {
        self.completion = Some(completion);
    }

    fn start(&mut self, rings: &Rings) {
        self.set_write_through(rings);
    }

    fn doorbell(&mut self, rings: &mut Rings, queue: usize) {
        if queue != QUEUE {
            return;
        }
        let mut budget = SERVED_AT_ONCE;
        loop {
            while rings.pop(QUEUE, &mut self.chain) {
                match self.parse(rings) {
                    (Asked::Submit(request), status_at) => self.enqueue(request, status_at),
                    (Asked::Done(status, written), at) => {
                        self.finish(rings, self.chain.head, at, status, written)
                    }
                    (Asked::Malformed, _) => rings.ask_for_reset(),
                }
            }
            self.serve_now(rings, &mut budget);
            if !self.batch.is_empty() {
                self.backend.submit_all(&mut self.batch);
            }
            if !rings.rearm(QUEUE) {
                return;
            }
        }
    }

    fn completed(&mut self, rings: &mut Rings, mut request: BlockRequest, result: Result<(), BlockError>) {
        let (epoch, index) = ((request.token >> 32) as u32, request.token as u32);
        let slot = self.slots.get_mut(index as usize).filter(|_| epoch == self.epoch);
        if let Some(slot) = slot {
            if result.is_ok() && std::mem::take(&mut slot.then_flush) {
                rings.counters().bytes.add(request.total());
                request.op = BlockOp::Flush;
                self.backend.submit(request);
                return;
            }
            let slot = *slot;
            self.free.push(index);
            let status = if result.is_ok() { blk::S_OK } else { blk::S_IOERR };
            if result.is_ok() && matches!(request.op, BlockOp::Read | BlockOp::Write) {
                rings.counters().bytes.add(request.total());
            }
            self.finish(rings, slot.head, slot.status_at, status, slot.data_written);
        }
        self.in_flight = self.in_flight.saturating_sub(1);
        self.spare.push(request);
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn reset(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
        self.slots.clear();
        self.free.clear();
        self.config[blk::CONFIG_WRITEBACK as usize] = 1;
    }
}

/// Takes the last byte, the status, off the device-writable part.
fn split_status(writable: &mut Vec<Piece>) -> Option<PhysAddr> {
    while writable.last().is_some_and(|p| p.len == 0) {
        writable.pop();
    }
    let last = writable.last_mut()?;
    last.len -= 1;
    last.at.checked_add(last.len)
}

/// Reads `out.len()` bytes off the front of the device-readable part; false if there are not that many.
fn take(rings: &Rings, readable: &mut [Piece], out: &mut [u8]) -> bool {
    let mut done = 0;
    for p in readable {
        let n = (out.len() - done).min(p.len as usize);
        if rings.read(DmaPurpose::Request, p.at, &mut out[done..done + n]).is_err() {
            return false;
        }
        let Some(rest) = p.at.checked_add(n as u64) else { return false };
        (p.at, p.len, done) = (rest, p.len - n as u64, done + n);
        if done == out.len() {
            return true;
        }
    }
    done == out.len()
}

fn config(sectors: u64) -> [u8; blk::CONFIG_LEN] {
    let mut c = [0; blk::CONFIG_LEN];
    let mut put = |at: usize, bytes: &[u8]| c[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &sectors.to_le_bytes());
    put(12, &(u32::from(QUEUE_SIZE) - 2).to_le_bytes()); // seg_max
    put(20, &BLOCK_SIZE.to_le_bytes());
    put(24, &[PHYSICAL_BLOCK_EXP, 0]); // physical_block_exp, alignment_offset
    put(26, &(1u16 << PHYSICAL_BLOCK_EXP).to_le_bytes()); // min_io_size
    put(32, &[1]); // writeback
    put(34, &1u16.to_le_bytes()); // num_queues
    put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
    put(40, &1u32.to_le_bytes()); // max_discard_seg
    put(44, &(1u32 << PHYSICAL_BLOCK_EXP).to_le_bytes()); // discard_sector_alignment
    put(48, &MAX_DISCARD_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
    put(52, &1u32.to_le_bytes()); // max_write_zeroes_seg
    put(56, &[1]); // write_zeroes_may_unmap
    c
}

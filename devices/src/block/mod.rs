//! The block back end: one, for every front end, emulated or paravirtual.
//!
//! A front end submits a [`BlockRequest`] and hears of its end through [`Completion`], always on a worker
//! thread, never inside [`BlockBackend::submit`]. Data moves between the image and guest memory by one host call per
//! contiguous run, or into a buffer that the request owns. A request comes back to its front end when it is done, so
//! its vectors are reused and a steady state allocates nothing here.

mod fault;
mod image;
mod overlay;
mod queue;

pub use fault::{Fault, FaultInjector};
pub use image::{ImageError, ImageOptions, RawImage};
pub use queue::{BlockQueue, QueueOptions};

use crate::counters::{Counter, Counters};
use paravane_memory::PhysAddr;
use std::fmt;
use std::io;
use std::sync::Arc;

/// The unit in which guests address disks.
pub const SECTOR_SIZE: u64 = 512;

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BlockOp {
    /// Image to memory.
    Read,
    /// Memory to image.
    Write,
    /// Everything completed before is on stable storage when this completes.
    Flush,
    /// The range's contents are no longer needed; a hint.
    Discard,
    /// The range reads as zeroes afterwards.
    WriteZeroes {
        /// The host may free the range's storage.
        unmap: bool,
    },
}

/// Where a read's or write's data lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BlockData {
    /// In guest memory, at `segments`.
    Guest,
    /// In `buffer`.
    Owned,
}

/// A piece of guest memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// First byte.
    pub at: PhysAddr,
    /// Bytes.
    pub len: u64,
}

/// One operation on its way to the back end and back.
pub struct BlockRequest {
    /// What to do.
    pub op: BlockOp,
    /// First byte of the image.
    pub offset: u64,
    /// Bytes of discard and write-zeroes; reads and writes take the length of their data.
    pub len: u64,
    /// Where the data lies.
    pub data: BlockData,
    /// Scatter list of [`BlockData::Guest`].
    pub segments: Vec<Segment>,
    /// Data of [`BlockData::Owned`].
    pub buffer: Vec<u8>,
    /// The front end's own name for the request.
    pub token: u64,
    /// Who is told.
    pub completion: Arc<dyn Completion>,
}

impl BlockRequest {
    /// A request without data; fill in the rest.
    pub fn new(op: BlockOp, token: u64, completion: Arc<dyn Completion>) -> BlockRequest {
        let (segments, buffer) = (Vec::new(), Vec::new());
        BlockRequest { op, offset: 0, len: 0, data: BlockData::Guest, segments, buffer, token, completion }
    }

    /// Bytes of the image that the operation touches; saturating.
    pub fn total(&self) -> u64 {
        match (self.op, self.data) {
            (BlockOp::Flush, _) => 0,
            (BlockOp::Discard | BlockOp::WriteZeroes { .. }, _) => self.len,
            (_, BlockData::Owned) => self.buffer.len() as u64,
            (_, BlockData::Guest) => self.segments.iter().fold(0, |n, s| n.saturating_add(s.len)),
        }
    }
}

/// A front end waiting for its requests.
pub trait Completion: Send + Sync {
    /// `request` is done; called on a worker thread. What it holds is the front end's again.
    fn complete(&self, request: BlockRequest, result: Result<(), BlockError>);
}

/// Why an operation failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BlockError {
    /// Some byte lies past the end of the image.
    OutOfRange,
    /// The image may not be written.
    ReadOnly,
    /// A segment is not guest memory.
    BadAddress,
    /// The host's storage is full.
    NoSpace,
    /// The host reports an error.
    Io(io::ErrorKind),
    /// The back end was shut down.
    Closed,
}

impl fmt::Display for BlockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BlockError::OutOfRange => f.write_str("past the end of the image"),
            BlockError::ReadOnly => f.write_str("the image is read-only"),
            BlockError::BadAddress => f.write_str("a segment is not guest memory"),
            BlockError::NoSpace => f.write_str("no space left on the host"),
            BlockError::Io(kind) => write!(f, "host error: {kind}"),
            BlockError::Closed => f.write_str("the back end is shut down"),
        }
    }
}

impl std::error::Error for BlockError {}

impl From<io::Error> for BlockError {
    fn from(e: io::Error) -> BlockError {
        match e.kind() {
            // `GuestMemory` answers so for a range that is not all memory.
            io::ErrorKind::InvalidInput => BlockError::BadAddress,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => BlockError::NoSpace,
            kind => BlockError::Io(kind),
        }
    }
}

/// A disk as front ends use it.
pub trait BlockBackend: Send + Sync {
    /// Bytes, a multiple of [`SECTOR_SIZE`].
    fn size(&self) -> u64;
    /// Writes, discards and write-zeroes fail.
    fn read_only(&self) -> bool;
    /// Whether discarding is worth a guest's while.
    fn can_discard(&self) -> bool;
    /// Up to 20 bytes of ASCII that name the disk to guests.
    fn serial(&self) -> &str;
    /// Does `request` on the caller's thread if that takes no waiting for the host's storage, and says whether it did: the
    /// front end then completes it itself. False: it may be done in part or not at all; submit it.
    ///
    /// This is the one host call a vCPU thread makes. It is a copy out of or into the host's page cache, it never waits
    /// (RWF_NOWAIT), and it saves two thread switches and the guest's way into its idle loop and back.
    fn serve_now(&self, request: &mut BlockRequest) -> bool {
        let _ = request;
        false
    }
    /// Starts `request`; never blocks on host I/O, never completes before it returned.
    fn submit(&self, request: BlockRequest);
    /// Starts all of `requests` in order, and empties it; waking workers once where it can.
    fn submit_all(&self, requests: &mut Vec<BlockRequest>) {
        requests.drain(..).for_each(|r| self.submit(r));
    }
    /// Waits until nothing is waiting or under way. For a machine that stops or resets; call it with no device locked and
    /// no vCPU running.
    fn drain(&self);
    /// What was done.
    fn counters(&self) -> &BlockCounters;
}

/// Counters of one back end.
#[derive(Clone, Debug)]
pub struct BlockCounters {
    /// Reads done.
    pub reads: Counter,
    /// Writes done.
    pub writes: Counter,
    /// Flushes done.
    pub flushes: Counter,
    /// Discards and write-zeroes done.
    pub discards: Counter,
    /// Bytes read.
    pub bytes_read: Counter,
    /// Bytes written.
    pub bytes_written: Counter,
    /// Bytes that went through an owned buffer: copied once more on their way to or from the guest.
    pub bytes_copied: Counter,
    /// Operations that failed.
    pub errors: Counter,
    /// Times a sleeping worker was woken.
    pub wakes: Counter,
    /// Operations done on the submitter's thread ([`BlockBackend::serve_now`]).
    pub served_now: Counter,
}

impl BlockCounters {
    /// The counters of `group`.
    pub fn new(counters: &Counters, group: &str) -> BlockCounters {
        let c = |name| counters.counter(group, name);
        BlockCounters {
            reads: c("reads"),
            writes: c("writes"),
            flushes: c("flushes"),
            discards: c("discards"),
            bytes_read: c("bytes_read"),
            bytes_written: c("bytes_written"),
            bytes_copied: c("bytes_copied"),
            errors: c("errors"),
            wakes: c("wakes"),
            served_now: c("served_now"),
        }
    }

    fn count(&self, request: &BlockRequest, result: &Result<(), BlockError>) {
        if result.is_err() {
            self.errors.add(1);
            return;
        }
        let bytes = request.total();
        match request.op {
            BlockOp::Read => {
                self.reads.add(1);
                self.bytes_read.add(bytes);
            }
            BlockOp::Write => {
                self.writes.add(1);
                self.bytes_written.add(bytes);
            }
            BlockOp::Flush => self.flushes.add(1),
            BlockOp::Discard | BlockOp::WriteZeroes { .. } => self.discards.add(1),
        }
        if request.data == BlockData::Owned {
            self.bytes_copied.add(bytes);
        }
    }
}

//! A hostile disk image, and hostile requests for it.

use crate::script::Script;
use paravane_devices::Counters;
use paravane_devices::block::{
    BlockBackend, BlockCounters, BlockData, BlockError, BlockOp, BlockQueue, BlockRequest, Completion,
    ImageOptions, QueueOptions, RawImage, Segment,
};
use paravane_memory::{GuestMemory, MemoryConfig, PhysAddr};
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

const RAM: u64 = 8 << 20;

#[derive(Default)]
struct Done(Mutex<Vec<Result<(), BlockError>>>);

impl Completion for Done {
    fn complete(&self, _request: BlockRequest, result: Result<(), BlockError>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(result);
    }
}

/// Opens a file of the given length as an image and asks for anything anywhere.
pub fn run(input: &[u8]) {
    let mut s = Script::new(input);
    let (options, bytes) = (s.u8(), u64::from(s.u16()) << (s.u8() & 7));
    let mut file = File::from(memfd_create("image", MemfdFlags::CLOEXEC).expect("memfd"));
    file.set_len(bytes).expect("length");
    file.write_all(&input[..input.len().min(bytes as usize)]).expect("content");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let options = ImageOptions { read_only: options & 1 != 0, snapshot: options & 2 != 0 };
    let image = match RawImage::open(&path, options) {
        Ok(image) => image,
        Err(error) => return assert!(!error.to_string().contains('\n'), "{error}"),
    };
    let memory = GuestMemory::new(MemoryConfig::pc(RAM)).expect("guest memory");
    let counters = BlockCounters::new(&Counters::default(), "disk");
    let queue = BlockQueue::new(image, memory, counters, None, QueueOptions::default()).expect("workers");
    let done = Arc::new(Done::default());
    let mut asked = 0;
    while let Some(op) = s.next() {
        let mut request = request(&mut s, op, done.clone());
        if op & 0x80 == 0 || !queue.serve_now(&mut request) {
            queue.submit(request);
            asked += 1;
        }
    }
    queue.drain();
    let answers = done.0.lock().unwrap_or_else(PoisonError::into_inner).len();
    assert_eq!(answers, asked, "every request ends once");
}

fn request(s: &mut Script<'_>, op: u8, done: Arc<Done>) -> BlockRequest {
    let kind = match op & 7 {
        0..3 => BlockOp::Read,
        3..5 => BlockOp::Write,
        5 => BlockOp::Flush,
        6 => BlockOp::Discard,
        _ => BlockOp::WriteZeroes { unmap: op & 8 != 0 },
    };
    let mut request = BlockRequest::new(kind, 0, done);
    request.offset = if op & 0x10 != 0 { s.wild() } else { u64::from(s.u16()) * 512 };
    request.len = if op & 0x10 != 0 { s.wild() } else { u64::from(s.u8()) * 512 };
    if op & 0x20 != 0 {
        request.data = BlockData::Owned;
        request.buffer = vec![op; usize::from(s.u16())];
    } else {
        for _ in 0..s.u8() & 7 {
            let at = PhysAddr(if op & 0x40 != 0 { s.wild() } else { u64::from(s.u16()) * 512 });
            let len = if op & 0x40 != 0 { s.wild() } else { u64::from(s.u16()) };
            request.segments.push(Segment { at, len });
        }
    }
    request
}

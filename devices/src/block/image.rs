//! Raw images: opening, locking, and the blocking operations that workers run.

use super::overlay::Overlay;
use super::{BlockData, BlockError, BlockOp, BlockRequest, SECTOR_SIZE};
use paravane_memory::{GuestMemory, Patience, PhysAddr};
use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use rustix::io::{Errno, ReadWriteFlags, preadv2, pwritev2};
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// How an image is opened.
#[derive(Clone, Copy, Default, Debug)]
pub struct ImageOptions {
    /// Never written; others may read it too.
    pub read_only: bool,
    /// Writes go to private storage that vanishes with us.
    pub snapshot: bool,
}

/// Why an image cannot be used; each message is one line that names the file.
#[derive(Debug)]
pub enum ImageError {
    /// The host refuses.
    Open(PathBuf, io::Error),
    /// Neither a regular file nor a block device.
    NotAnImage(PathBuf, &'static str),
    /// Not a whole number of sectors, or none.
    Size(PathBuf, u64),
    /// Locked by another process.
    InUse(PathBuf),
    /// No private storage for a snapshot.
    Snapshot(PathBuf, io::Error),
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ImageError::Open(p, e) if e.kind() == io::ErrorKind::PermissionDenied => {
                write!(f, "cannot open disk image {}: {e}; readonly=on opens it for reading", p.display())
            }
            ImageError::Open(p, e) => write!(f, "cannot open disk image {}: {e}", p.display()),
            ImageError::NotAnImage(p, what) => {
                write!(f, "{} is a {what}, not a disk image or block device", p.display())
            }
            ImageError::Size(p, 0) => write!(f, "disk image {} is empty", p.display()),
            ImageError::Size(p, n) => {
                write!(f, "disk image {} has {n} bytes, which is not a multiple of 512", p.display())
            }
            ImageError::InUse(p) => {
                write!(
                    f,
                    "disk image {} is in use by another process; snapshot=on or readonly=on can share it only with readers",
                    p.display()
                )
            }
            ImageError::Snapshot(p, e) => {
                write!(f, "cannot make private storage for the snapshot of {}: {e}", p.display())
            }
        }
    }
}

impl std::error::Error for ImageError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ImageError::Open(_, e) | ImageError::Snapshot(_, e) => Some(e),
            _ => None,
        }
    }
}

/// An open, locked raw image.
#[derive(Debug)]
pub struct RawImage {
    file: File,
    size: u64,
    read_only: bool,
    overlay: Option<Overlay>,
    /// The file system knows no reads, or writes, that never wait: found out at the first one.
    no_prompt_reads: AtomicBool,
    no_prompt_writes: AtomicBool,
}

impl RawImage {
    /// Opens and locks `path`: exclusively when it will be written, shared with other readers otherwise.
    pub fn open(path: &Path, options: ImageOptions) -> Result<RawImage, ImageError> {
        let name = || path.to_owned();
        let writes_file = !options.read_only && !options.snapshot;
        // Without NONBLOCK a FIFO would keep us waiting for a writer.
        let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        let mut file =
            OpenOptions::new().read(true).write(writes_file).custom_flags(flags).open(path).map_err(|e| {
                match e.kind() {
                    io::ErrorKind::IsADirectory => ImageError::NotAnImage(name(), "directory"),
                    _ => ImageError::Open(name(), e),
                }
            })?;
        check_type(&file)
            .map_err(|e| ImageError::Open(name(), e))?
            .map_or(Ok(()), |what| Err(ImageError::NotAnImage(name(), what)))?;
        let mode = if writes_file {
            FlockOperation::NonBlockingLockExclusive
        } else {
            FlockOperation::NonBlockingLockShared
        };
        flock(&file, mode).map_err(|e| match e {
            Errno::WOULDBLOCK => ImageError::InUse(name()),
            e => ImageError::Open(name(), e.into()),
        })?;
        let size = file.seek(SeekFrom::End(0)).map_err(|e| ImageError::Open(name(), e))?;
        if size == 0 || !size.is_multiple_of(SECTOR_SIZE) {
            return Err(ImageError::Size(name(), size));
        }
        let overlay = (options.snapshot && !options.read_only)
            .then(|| Overlay::new(size))
            .transpose()
            .map_err(|e| ImageError::Snapshot(name(), e))?;
        Ok(RawImage {
            file,
            size,
            read_only: options.read_only,
            overlay,
            no_prompt_reads: AtomicBool::new(false),
            no_prompt_writes: AtomicBool::new(false),
        })
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Runs `request` to its end on this thread.
    pub(super) fn run(&self, request: &mut BlockRequest, memory: &GuestMemory) -> Result<(), BlockError> {
        let end = request.offset.checked_add(request.total()).ok_or(BlockError::OutOfRange)?;
        if end > self.size {
            return Err(BlockError::OutOfRange);
        }
        if self.read_only && !matches!(request.op, BlockOp::Read | BlockOp::Flush) {
            return Err(BlockError::ReadOnly);
        }
        match request.op {
            BlockOp::Read => self.transfer(request, memory, true),
            BlockOp::Write => self.transfer(request, memory, false),
            BlockOp::Flush => self.flush(),
            BlockOp::Discard => self.discard(request.offset, request.len),
            BlockOp::WriteZeroes { unmap } => self.write_zeroes(request.offset, request.len, unmap),
        }
    }

    /// Runs a read or write on this thread if no byte of it has to wait for the host's disk (RWF_NOWAIT). False: it may
    /// be done in part or not at all; [`Self::run`] it.
    pub(super) fn run_now(&self, request: &mut BlockRequest, memory: &GuestMemory) -> bool {
        let read = request.op == BlockOp::Read;
        let unsupported = if read { &self.no_prompt_reads } else { &self.no_prompt_writes };
        let plain = self.overlay.is_none() && (read || request.op == BlockOp::Write && !self.read_only);
        let end = request.offset.checked_add(request.total());
        if !plain || end.is_none_or(|end| end > self.size) || unsupported.load(Ordering::Relaxed) {
            return false;
        }
        let pos = request.offset;
        let moved = match (request.data, read) {
            (BlockData::Guest, _) => self
                .scatter(&self.file, pos, request, memory, Patience::Never)
                .map(|()| request.total() as usize),
            (BlockData::Owned, true) => {
                let buffer = &mut [IoSliceMut::new(&mut request.buffer)];
                preadv2(&self.file, buffer, pos, ReadWriteFlags::NOWAIT).map_err(io::Error::from)
            }
            (BlockData::Owned, false) => {
                let buffer = &[IoSlice::new(&request.buffer)];
                pwritev2(&self.file, buffer, pos, ReadWriteFlags::NOWAIT).map_err(io::Error::from)
            }
        };
        if moved.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::Unsupported) {
            unsupported.store(true, Ordering::Relaxed);
        }
        moved.is_ok_and(|n| n as u64 == request.total())
    }

    fn scatter(
        &self,
        file: &File,
        pos: u64,
        r: &BlockRequest,
        memory: &GuestMemory,
        patience: Patience,
    ) -> io::Result<()> {
        let ranges = r.segments.iter().map(|s| (s.at, s.len));
        if r.op == BlockOp::Read {
            memory.read_from_file(file, pos, ranges, patience)
        } else {
            memory.write_to_file(file, pos, ranges, patience)
        }
    }

    fn transfer(&self, r: &mut BlockRequest, memory: &GuestMemory, read: bool) -> Result<(), BlockError> {
        let mut pos = r.offset;
        if r.data == BlockData::Owned {
            let buffer = r.buffer.as_mut_slice();
            let len = buffer.len() as u64;
            return self.pieces(pos, len, read, |file, pos, done, n| {
                let part = &mut buffer[done as usize..(done + n) as usize];
                if read { file.read_exact_at(part, pos) } else { file.write_all_at(part, pos) }
            });
        }
        if self.overlay.is_none() {
            return self.scatter(&self.file, pos, r, memory, Patience::Wait).map_err(BlockError::from);
        }
        for s in &r.segments {
            self.pieces(pos, s.len, read, |file, pos, done, n| {
                let range = std::iter::once((PhysAddr(s.at.0.wrapping_add(done)), n));
                if read {
                    memory.read_from_file(file, pos, range, Patience::Wait)
                } else {
                    memory.write_to_file(file, pos, range, Patience::Wait)
                }
            })?;
            pos += s.len;
        }
        Ok(())
    }

    /// Calls `each` with every run of `len` bytes at `pos` that lies in one file: file, position, bytes before, bytes.
    fn pieces(
        &self,
        pos: u64,
        len: u64,
        read: bool,
        mut each: impl FnMut(&File, u64, u64, u64) -> io::Result<()>,
    ) -> Result<(), BlockError> {
        let Some(overlay) = &self.overlay else {
            return each(&self.file, pos, 0, len).map_err(BlockError::from);
        };
        if !read {
            overlay.prepare(&self.file, self.size, pos, len)?;
            each(overlay.file(), pos, 0, len)?;
            overlay.written(pos, len);
            return Ok(());
        }
        let mut done = 0;
        while done < len {
            let (private, n) = overlay.run_at(pos + done, len - done);
            each(if private { overlay.file() } else { &self.file }, pos + done, done, n)?;
            done += n;
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), BlockError> {
        if self.read_only || self.overlay.is_some() {
            return Ok(());
        }
        self.file.sync_data().map_err(BlockError::from)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        if self.overlay.is_some() || len == 0 {
            return Ok(());
        }
        match fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len) {
            // A hint that the host cannot take is taken nonetheless.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            Err(e) => Err(io::Error::from(e).into()),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), BlockError> {
        if len == 0 {
            return Ok(());
        }
        if self.overlay.is_none() {
            let how = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
            match fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, offset, len) {
                Ok(()) => return Ok(()),
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
                Err(e) => return Err(io::Error::from(e).into()),
            }
        }
        const ZEROES: &[u8] = &[0; 65536];
        let mut done = 0;
        while done < len {
            let n = (len - done).min(ZEROES.len() as u64);
            self.pieces(offset + done, n, false, |file, pos, before, n| {
                file.write_all_at(&ZEROES[before as usize..(before + n) as usize], pos)
            })?;
            done += n;
        }
        Ok(())
    }
}

/// Names what `file` is if it cannot be an image.
fn check_type(file: &File) -> io::Result<Option<&'static str>> {
    let kind = file.metadata()?.file_type();
    Ok(if kind.is_file() || kind.is_block_device() {
        None
    } else if kind.is_dir() {
        Some("directory")
    } else if kind.is_char_device() {
        Some("character device")
    } else {
        Some("pipe or socket")
    })
}

#[cfg(test)]
mod tests {
    use super::super::{Completion, Segment};
    use super::*;
    use paravane_memory::MemoryConfig;
    use std::sync::Arc;

    struct Nobody;

    impl Completion for Nobody {
        fn complete(&self, _request: BlockRequest, _result: Result<(), BlockError>) {}
    }

    fn request(op: BlockOp, offset: u64, buffer: Vec<u8>) -> BlockRequest {
        let mut r = BlockRequest::new(op, 0, Arc::new(Nobody));
        (r.offset, r.len, r.data) = (offset, buffer.len() as u64, BlockData::Owned);
        r.buffer = buffer;
        r
    }

    fn path(name: &str, len: u64) -> PathBuf {
        let p = std::env::temp_dir().join(format!("paravane-image-{}-{name}", std::process::id()));
        File::create(&p).and_then(|f| f.set_len(len)).expect("image");
        p
    }

    fn refusal(path: &Path, options: ImageOptions) -> String {
        RawImage::open(path, options).expect_err("refused").to_string()
    }

    #[test]
    fn an_image_is_written_by_one_process_at_a_time() {
        let p = path("lock", 1024);
        let read_only = ImageOptions { read_only: true, ..ImageOptions::default() };
        let snapshot = ImageOptions { snapshot: true, ..ImageOptions::default() };
        let writer = RawImage::open(&p, ImageOptions::default()).expect("first");
        for o in [ImageOptions::default(), read_only, snapshot] {
            assert!(refusal(&p, o).contains("in use"), "{o:?}");
        }
        drop(writer);
        let _reader = RawImage::open(&p, read_only).expect("reader");
        let _second = RawImage::open(&p, snapshot).expect("second reader");
        assert!(refusal(&p, ImageOptions::default()).contains("in use"));
        std::fs::remove_file(p).expect("remove");
    }

    #[test]
    fn what_is_no_image_is_refused_by_name() {
        let o = ImageOptions::default();
        let (odd, empty) = (path("odd", 1000), path("empty", 0));
        assert!(refusal(&odd, o).contains("1000 bytes"));
        assert!(refusal(&empty, o).contains("empty"));
        assert!(refusal(&std::env::temp_dir(), o).contains("directory"));
        assert!(refusal(Path::new("/nonexistent/image"), o).contains("/nonexistent/image"));
        assert!(refusal(Path::new("/dev/null"), o).contains("character device"));
        [odd, empty].iter().for_each(|p| std::fs::remove_file(p).expect("remove"));
    }

    #[test]
    fn a_snapshot_keeps_its_writes_to_itself() {
        let p = path("snapshot", 64 << 10);
        std::fs::write(&p, vec![7u8; 64 << 10]).expect("fill");
        let memory = GuestMemory::new(MemoryConfig::pc(1 << 20)).expect("memory");
        let image =
            RawImage::open(&p, ImageOptions { snapshot: true, ..ImageOptions::default() }).expect("open");
        image.run(&mut request(BlockOp::Write, 5 * 512, vec![9; 20 * 512]), &memory).expect("write");
        let mut zero = request(BlockOp::WriteZeroes { unmap: true }, 40 * 512, vec![]);
        zero.len = 512;
        image.run(&mut zero, &memory).expect("write zeroes");
        let mut all = request(BlockOp::Read, 0, vec![0; 64 << 10]);
        image.run(&mut all, &memory).expect("read");
        for (sector, data) in all.buffer.chunks(512).enumerate() {
            let expected = match sector {
                5..25 => 9,
                40 => 0,
                _ => 7,
            };
            assert!(data.iter().all(|&b| b == expected), "sector {sector}");
        }
        assert_eq!(std::fs::read(&p).expect("read"), vec![7; 64 << 10]);
        std::fs::remove_file(p).expect("remove");
    }

    #[test]
    fn what_is_done_now_is_done_whole_and_nothing_else_is_said_to_be() {
        let p = path("now", 4096);
        std::fs::write(&p, [5; 4096]).expect("fill");
        let memory = GuestMemory::new(MemoryConfig::pc(1 << 20)).expect("memory");
        let image = RawImage::open(&p, ImageOptions::default()).expect("open");
        // Whether the file system can do it at once is its own affair.
        let mut owned = request(BlockOp::Read, 512, vec![0; 1024]);
        if image.run_now(&mut owned, &memory) {
            assert_eq!(owned.buffer, [5; 1024]);
        }
        let mut scattered = request(BlockOp::Read, 0, Vec::new());
        scattered.data = BlockData::Guest;
        scattered.segments =
            [(0x800, 512), (0x3000, 512)].map(|(at, len)| Segment { at: PhysAddr(at), len }).to_vec();
        if image.run_now(&mut scattered, &memory) {
            assert_eq!(memory.read_u8(PhysAddr(0x31FF)), Ok(5));
        }
        let mut write = request(BlockOp::Write, 1024, vec![6; 512]);
        if image.run_now(&mut write, &memory) {
            assert_eq!(std::fs::read(&p).expect("read")[1024..1536], [6; 512]);
        }
        for mut never in [
            request(BlockOp::Read, 3584, vec![0; 1024]),
            request(BlockOp::Write, u64::MAX, vec![0; 512]),
            request(BlockOp::Flush, 0, Vec::new()),
            request(BlockOp::Discard, 0, Vec::new()),
        ] {
            assert!(!image.run_now(&mut never, &memory), "{:?}", never.op);
        }
        std::fs::remove_file(p).expect("remove");
    }

    #[test]
    fn ranges_and_read_only_are_enforced() {
        let p = path("range", 4096);
        let memory = GuestMemory::new(MemoryConfig::pc(1 << 20)).expect("memory");
        let image =
            RawImage::open(&p, ImageOptions { read_only: true, ..ImageOptions::default() }).expect("open");
        let read = |offset| image.run(&mut request(BlockOp::Read, offset, vec![0; 512]), &memory);
        assert_eq!(read(3584), Ok(()));
        assert_eq!(read(4096), Err(BlockError::OutOfRange));
        assert_eq!(read(u64::MAX), Err(BlockError::OutOfRange));
        let write = image.run(&mut request(BlockOp::Write, 0, vec![0; 512]), &memory);
        assert_eq!(write, Err(BlockError::ReadOnly));
        std::fs::remove_file(p).expect("remove");
    }
}

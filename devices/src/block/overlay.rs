//! Private storage over an image that stays as it is: an unlinked sparse file and a bitmap of written clusters.

use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create, open};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

/// As large as guests' pages: their usual writes cover whole clusters, so nothing is copied up.
const CLUSTER: u64 = 4096;

#[derive(Debug)]
pub(super) struct Overlay {
    file: File,
    present: Box<[AtomicU64]>,
    /// Held while partly written clusters are copied up.
    copying: Mutex<()>,
}

impl Overlay {
    /// Storage for an image of `size` bytes.
    pub(super) fn new(size: u64) -> io::Result<Overlay> {
        let file = unnamed_file()?;
        file.set_len(size)?;
        let words = size.div_ceil(CLUSTER).div_ceil(64);
        Ok(Overlay {
            file,
            present: (0..words).map(|_| AtomicU64::new(0)).collect(),
            copying: Mutex::new(()),
        })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    fn has(&self, cluster: u64) -> bool {
        self.present[(cluster / 64) as usize].load(Ordering::Acquire) & (1 << (cluster % 64)) != 0
    }

    fn set(&self, cluster: u64) {
        self.present[(cluster / 64) as usize].fetch_or(1 << (cluster % 64), Ordering::AcqRel);
    }

    /// Whether the byte at `pos` is private, and for how many of the next `len` bytes that holds.
    pub(super) fn run_at(&self, pos: u64, len: u64) -> (bool, u64) {
        let private = self.has(pos / CLUSTER);
        let mut end = (pos / CLUSTER + 1) * CLUSTER;
        while end < pos + len && self.has(end / CLUSTER) == private {
            end += CLUSTER;
        }
        (private, end.min(pos + len) - pos)
    }

    /// Copies up what a write of `len` bytes at `pos` leaves of its first and last clusters.
    pub(super) fn prepare(&self, base: &File, size: u64, pos: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let end = pos + len;
        for (cluster, whole) in [
            (pos / CLUSTER, pos.is_multiple_of(CLUSTER) && (end - pos >= CLUSTER || end == size)),
            (
                (end - 1) / CLUSTER,
                end.is_multiple_of(CLUSTER) && end - pos >= CLUSTER
                    || end == size && pos <= (end - 1) / CLUSTER * CLUSTER,
            ),
        ] {
            if !whole && !self.has(cluster) {
                self.copy_up(base, size, cluster)?;
            }
        }
        Ok(())
    }

    fn copy_up(&self, base: &File, size: u64, cluster: u64) -> io::Result<()> {
        let _copying: MutexGuard<'_, ()> = self.copying.lock().expect("overlay");
        if self.has(cluster) {
            return Ok(());
        }
        let at = cluster * CLUSTER;
        let mut data = [0; CLUSTER as usize];
        let part = &mut data[..(size - at).min(CLUSTER) as usize];
        base.read_exact_at(part, at)?;
        self.file.write_all_at(part, at)?;
        self.set(cluster);
        Ok(())
    }

    /// Declares `len` bytes at `pos` private.
    pub(super) fn written(&self, pos: u64, len: u64) {
        if len > 0 {
            (pos / CLUSTER..=(pos + len - 1) / CLUSTER).for_each(|c| self.set(c));
        }
    }
}

/// A file that no name leads to: on disk where the temporary directory allows it, in memory otherwise.
fn unnamed_file() -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match open(std::env::temp_dir(), flags, Mode::RUSR | Mode::WUSR) {
        Ok(fd) => Ok(File::from(fd)),
        Err(_) => Ok(File::from(memfd_create("paravane-snapshot", MemfdFlags::CLOEXEC)?)),
    }
}

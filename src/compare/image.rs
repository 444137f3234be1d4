//! The disk image that a comparison works on: filled with the lab pattern, gone when the process is.

use paravane_firmware::lab::{SECTOR, pattern};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

/// Bytes handled at once.
const PIECE: usize = 1 << 20;

/// An image without a name in any directory, reachable through this process' descriptor table.
pub(super) struct ScratchImage {
    file: File,
}

impl ScratchImage {
    /// Makes an image of `size` bytes; its first `filled` bytes hold the pattern of `seed`.
    pub(super) fn new(size: u64, filled: u64, seed: u64) -> io::Result<ScratchImage> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = std::env::temp_dir().join(format!("paravane-compare-{}-{number}.img", std::process::id()));
        let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(&name)?;
        std::fs::remove_file(&name)?;
        let mut piece = vec![0; PIECE];
        let mut at = 0;
        while at < size {
            if at < filled {
                fill(&mut piece, at, seed);
            } else {
                // Zeroes are written too: no run pays for the allocation of the file's blocks.
                piece.fill(0);
            }
            let n = (size - at).min(PIECE as u64);
            file.write_all(&piece[..n as usize])?;
            at += n;
        }
        Ok(ScratchImage { file })
    }

    /// A path by which this process opens it.
    pub(super) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }

    /// Counts the sectors among `len` bytes at `start` that do not hold the pattern of `seed`.
    pub(super) fn wrong_sectors(&self, start: u64, len: u64, seed: u64) -> io::Result<u64> {
        let mut file = &self.file;
        let (mut have, mut want) = (vec![0; PIECE], vec![0; PIECE]);
        let mut wrong = 0;
        let mut at = start;
        while at < start + len {
            let n = (start + len - at).min(PIECE as u64) as usize;
            file.seek(SeekFrom::Start(at))?;
            file.read_exact(&mut have[..n])?;
            fill(&mut want, at, seed);
            let sectors = have[..n].chunks(SECTOR as usize).zip(want[..n].chunks(SECTOR as usize));
            wrong += sectors.filter(|(h, w)| h != w).count() as u64;
            at += n as u64;
        }
        Ok(wrong)
    }
}

/// Fills whole sectors with the pattern from byte `at` of the disk on.
fn fill(piece: &mut [u8], at: u64, seed: u64) {
    for (i, sector) in piece.as_chunks_mut::<512>().0.iter_mut().enumerate() {
        pattern(at / SECTOR + i as u64, seed, sector);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_holds_the_pattern_and_has_no_name() {
        let image = ScratchImage::new(3 << 20, 2 << 20, 7).expect("image");
        assert_eq!(image.wrong_sectors(0, 2 << 20, 7).expect("read"), 0);
        assert_eq!(image.wrong_sectors(512, 1024, 8).expect("read"), 2);
        let mut again = File::open(image.path()).expect("open");
        let mut first = [0; 512];
        again.read_exact(&mut first).expect("read");
        let mut want = [0; 512];
        pattern(0, 7, &mut want);
        assert_eq!(first, want);
    }
}

//! Transfers between files and guest memory without a copy in between (preadv2(2), pwritev2(2)).
//!
//! A scatter list goes to the host in as few calls as it has batches of [`PIECES`]; neighbouring pages count as one
//! piece. Nothing here allocates.

use crate::addr::{PAGE_SIZE, PhysAddr, RamOffset};
use crate::backing::Direction;
use crate::guest::{GuestMemory, MemoryError};
use crate::layout::Mapped;
use std::fs::File;
use std::io;

/// Pieces that one host call moves.
pub(crate) const PIECES: usize = 64;

/// Whether a transfer may wait for the host's disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Patience {
    /// It is complete when the call returns.
    Wait,
    /// Where some byte would have to wait the call fails with `WouldBlock` or `Unsupported`, having moved any part of the
    /// data (RWF_NOWAIT).
    Never,
}

/// Where a transfer goes in its file, and what is collected for the next host call.
struct Batch<'a> {
    memory: &'a GuestMemory,
    file: &'a File,
    direction: Direction,
    patience: Patience,
    /// Where in the file the first piece goes.
    pos: u64,
    pieces: [(RamOffset, u64); PIECES],
    count: usize,
}

impl Batch<'_> {
    fn push(&mut self, at: RamOffset, len: u64) -> io::Result<()> {
        if let Some((last, n)) = self.pieces[..self.count].last_mut()
            && last.0 + *n == at.0
        {
            *n += len;
            return Ok(());
        }
        if self.count == PIECES {
            self.flush()?;
        }
        self.pieces[self.count] = (at, len);
        self.count += 1;
        Ok(())
    }

    /// Moves what was collected.
    fn flush(&mut self) -> io::Result<()> {
        let backing = self.memory.backing();
        let mut first = 0;
        while first < self.count {
            let pieces = &mut self.pieces[first..self.count];
            let now = self.patience == Patience::Never;
            let moved = backing.transfer(self.file, self.pos, pieces, self.direction, now)?;
            if moved == 0 {
                self.ended(first)?;
                break;
            }
            self.pos += moved;
            first += self.moved(first, moved);
            if first < self.count && self.patience == Patience::Never {
                return Err(io::ErrorKind::WouldBlock.into());
            }
        }
        self.count = 0;
        Ok(())
    }

    /// Takes `moved` bytes off the pieces from `first` on; how many of them are through.
    fn moved(&mut self, first: usize, mut moved: u64) -> usize {
        let mut through = 0;
        for (at, len) in &mut self.pieces[first..self.count] {
            let n = moved.min(*len);
            if self.direction == Direction::ToMemory {
                self.memory.wrote(*at, n);
            }
            (at.0, *len, moved) = (at.0 + n, *len - n, moved - n);
            if *len > 0 {
                break;
            }
            through += 1;
        }
        through
    }

    /// The file moves no more bytes: what lies past its end reads as zeroes.
    fn ended(&mut self, first: usize) -> io::Result<()> {
        if self.direction == Direction::ToFile {
            return Err(io::ErrorKind::WriteZero.into());
        }
        for &(at, len) in &self.pieces[first..self.count] {
            self.memory.backing().fill(at, 0, len);
            self.memory.wrote(at, len);
            self.pos += len;
        }
        Ok(())
    }
}

impl GuestMemory {
    /// Reads from `file` at byte `pos` straight into the `ranges` of guest memory, one after the other; bytes past the
    /// end of the file read as zero. ROM is left alone. Nothing is moved and the error is `InvalidInput` if some byte is not
    /// memory.
    pub fn read_from_file(
        &self,
        file: &File,
        pos: u64,
        ranges: impl Iterator<Item = (PhysAddr, u64)> + Clone,
        patience: Patience,
    ) -> io::Result<()> {
        self.transfer(file, pos, ranges, Direction::ToMemory, patience)
    }

    /// Writes the `ranges` of guest memory to `file` at byte `pos`, as [`Self::read_from_file`] reads.
    pub fn write_to_file(
        &self,
        file: &File,
        pos: u64,
        ranges: impl Iterator<Item = (PhysAddr, u64)> + Clone,
        patience: Patience,
    ) -> io::Result<()> {
        self.transfer(file, pos, ranges, Direction::ToFile, patience)
    }

    fn transfer(
        &self,
        file: &File,
        pos: u64,
        ranges: impl Iterator<Item = (PhysAddr, u64)> + Clone,
        direction: Direction,
        patience: Patience,
    ) -> io::Result<()> {
        ranges.clone().try_for_each(|(at, len)| self.check(at, len)).map_err(not_memory)?;
        let pieces = [(RamOffset(0), 0); PIECES];
        let mut batch = Batch { memory: self, file, direction, patience, pos, pieces, count: 0 };
        for (at, len) in ranges {
            let mut done = 0;
            while done < len {
                let here = PhysAddr(at.0 + done);
                let n = (PAGE_SIZE - here.page_offset()).min(len - done);
                done += n;
                match (self.resolve(here.page()), direction) {
                    (Mapped::Ram(o), _) | (Mapped::Rom(o), Direction::ToFile) => {
                        batch.push(RamOffset(o.0 + here.page_offset()), n)?;
                    }
                    (Mapped::Rom(_), Direction::ToMemory) => {
                        batch.flush()?;
                        batch.pos += n;
                    }
                    // The layout changed since the check.
                    (Mapped::Mmio, _) => return Err(not_memory(MemoryError::OutOfRange { at, len })),
                }
            }
        }
        batch.flush()
    }

    /// Whether all of `len` bytes at `at` are RAM or ROM.
    fn check(&self, at: PhysAddr, len: u64) -> Result<(), MemoryError> {
        let error = MemoryError::OutOfRange { at, len };
        let end = at.0.checked_add(len).ok_or(error)?;
        let mut pos = at.0;
        while pos < end {
            let here = PhysAddr(pos);
            if self.resolve(here.page()) == Mapped::Mmio {
                return Err(error);
            }
            pos = (pos - here.page_offset()).checked_add(PAGE_SIZE).unwrap_or(end);
        }
        Ok(())
    }
}

fn not_memory(error: MemoryError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CodeWatcher, MemoryConfig, Notice, PhysPage};
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn file(data: &[u8]) -> File {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name =
            format!("paravane-transfer-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        let file = File::options().read(true).write(true).create_new(true).open(&path).expect("file");
        std::fs::remove_file(path).expect("its name");
        file.write_all_at(data, 0).expect("fill");
        file
    }

    struct Nobody;

    impl CodeWatcher for Nobody {
        fn code_written(&self) {}
    }

    fn memory() -> GuestMemory {
        GuestMemory::new(MemoryConfig { ram: 4 << 20, hole_start: 2 << 20 }).expect("memory")
    }

    #[test]
    fn many_ranges_take_several_calls_and_keep_their_order() {
        let (m, data) = (memory(), (0..200 * 512).map(|i| (i / 512) as u8).collect::<Vec<_>>());
        let from = file(&data);
        // Every second sector, backwards: no two of them are neighbours.
        let ranges = (0..200u64).rev().map(|i| (PhysAddr(0x1000 + i * 1024), 512));
        m.read_from_file(&from, 0, ranges.clone(), Patience::Wait).expect("read");
        for (i, (at, _)) in ranges.clone().enumerate() {
            assert_eq!(m.read_u8(at), Ok(i as u8));
        }
        assert_eq!(m.read_u8(PhysAddr(0x1000 + 512)), Ok(0));
        let to = file(&[]);
        m.write_to_file(&to, 512, ranges, Patience::Wait).expect("write");
        let mut back = vec![1; data.len() + 512];
        to.read_exact_at(&mut back, 0).expect("all of it");
        assert!(back[..512].iter().all(|&b| b == 0) && back[512..] == data);
    }

    #[test]
    fn the_end_of_the_file_reads_as_zeroes_and_rom_stays() {
        let m = memory();
        m.write(PhysAddr(0x4000), &[9; 0x3000]).expect("RAM");
        m.map_rom(PhysPage(5), &[7; 4096]).expect("ROM");
        let claims = m.claims(Box::new(Nobody)).expect("a slot");
        assert!(claims.claim_code(RamOffset(0x4000)));
        let ranges = [(PhysAddr(0x4000), 0x3000)];
        m.read_from_file(&file(&[1; 0x2800]), 0, ranges.into_iter(), Patience::Wait).expect("read");
        let bytes =
            [0x4000, 0x4FFF, 0x5000, 0x6000, 0x67FF, 0x6800, 0x6FFF].map(|at| m.read_u8(PhysAddr(at)));
        assert_eq!(bytes, [1, 1, 7, 1, 1, 0, 0].map(Ok));
        assert_eq!(claims.take_notices().collect::<Vec<_>>(), [Notice::Written(RamOffset(0x4000), u64::MAX)]);
    }

    #[test]
    fn a_range_that_leaves_memory_moves_nothing() {
        let (m, f) = (memory(), file(&[1; 4096]));
        for bad in [(PhysAddr((2 << 20) - 256), 512), (PhysAddr(u64::MAX), 512)] {
            let ranges = [(PhysAddr(0), 512), bad];
            let e = m.read_from_file(&f, 0, ranges.into_iter(), Patience::Wait).expect_err("refused");
            assert_eq!(e.kind(), io::ErrorKind::InvalidInput);
            assert_eq!(m.read_u8(PhysAddr(0)), Ok(0));
        }
    }
}

//! ELF executables of both classes, as far as loading needs them (System V ABI, chapters 4 and 5).

use super::file::le;
use super::{BootError, NamedFile, place};
use vm_memory::GuestMemoryBackend;

const PT_LOAD: u64 = 1;
const PT_NOTE: u64 = 4;
const EM_386: u64 = 3;
const EM_X86_64: u64 = 62;

/// A segment of the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    kind: u64,
    offset: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
}

/// The parsed headers.
#[derive(Debug)]
pub(super) struct Elf {
    pub(super) entry: u64,
    segments: Vec<Segment>,
}

pub(super) fn is_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7FELF")
}

impl Elf {
    pub(super) fn parse(file: &NamedFile) -> Result<Elf, BootError> {
        let ident = file.slice(0, 52, "the ELF header")?;
        let (wide, little) = (ident[4], ident[5]);
        if little != 1 || !matches!(wide, 1 | 2) || !matches!(le::<2>(ident, 18), EM_386 | EM_X86_64) {
            return Err(file.wrong("an ELF file for another processor; give an x86 kernel"));
        }
        if wide == 2 {
            let h = file.slice(0, 64, "the ELF header")?;
            let table = (le::<8>(h, 32), le::<2>(h, 54), le::<2>(h, 56));
            Ok(Elf { entry: le::<8>(h, 24), segments: segments(file, table, 56, segment64)? })
        } else {
            let table = (le::<4>(ident, 28), le::<2>(ident, 42), le::<2>(ident, 44));
            Ok(Elf { entry: le::<4>(ident, 24), segments: segments(file, table, 32, segment32)? })
        }
    }

    /// The notes' bytes.
    pub(super) fn notes<'a>(&self, file: &'a NamedFile) -> Result<Vec<&'a [u8]>, BootError> {
        let notes = self.segments.iter().filter(|s| s.kind == PT_NOTE);
        notes.map(|s| file.slice(s.offset, s.filesz, "an ELF note")).collect()
    }

    /// Copies every loadable segment to its physical address; returns the end of the highest.
    pub(super) fn load<M: GuestMemoryBackend>(&self, mem: &M, file: &NamedFile) -> Result<u64, BootError> {
        let mut end = 0;
        for s in self.segments.iter().filter(|s| s.kind == PT_LOAD) {
            let bytes = file.slice(s.offset, s.filesz, "an ELF segment")?;
            if s.memsz < s.filesz {
                return Err(
                    file.wrong("an ELF segment larger in the file than in memory; the file is damaged")
                );
            }
            place::put_image(mem, file, s.paddr, bytes, s.memsz)?;
            end = end.max(s.paddr.saturating_add(s.memsz));
        }
        Ok(end)
    }
}

fn segments(
    file: &NamedFile,
    (offset, size, count): (u64, u64, u64),
    least: u64,
    parse: fn(&[u8]) -> Segment,
) -> Result<Vec<Segment>, BootError> {
    if size < least {
        return Err(file.wrong("an ELF file without program headers; give a linked kernel"));
    }
    let table = file.slice(offset, size * count, "the ELF program header table")?;
    Ok(table.chunks_exact(size as usize).map(parse).collect())
}

fn segment64(p: &[u8]) -> Segment {
    Segment {
        kind: le::<4>(p, 0),
        offset: le::<8>(p, 8),
        paddr: le::<8>(p, 24),
        filesz: le::<8>(p, 32),
        memsz: le::<8>(p, 40),
    }
}

fn segment32(p: &[u8]) -> Segment {
    Segment {
        kind: le::<4>(p, 0),
        offset: le::<4>(p, 4),
        paddr: le::<4>(p, 12),
        filesz: le::<4>(p, 16),
        memsz: le::<4>(p, 20),
    }
}

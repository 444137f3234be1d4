//! A file's content with the name it is reported by, and bounded little-endian reads from it.

use super::error::BootError;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// The largest file that is read: more than any initrd in use, less than what would hurt the host.
pub const MAX_FILE: u64 = 2 << 30;

/// A file's content and its name for messages.
#[derive(Clone, Debug)]
pub struct NamedFile {
    name: String,
    bytes: Vec<u8>,
}

impl NamedFile {
    /// Content that is already in memory.
    pub fn new(name: impl Into<String>, bytes: Vec<u8>) -> NamedFile {
        NamedFile { name: name.into(), bytes }
    }

    /// Reads `path`; refuses what is missing, empty, no regular file, or larger than [`MAX_FILE`].
    pub fn read(path: &Path) -> Result<NamedFile, BootError> {
        let name = path.display().to_string();
        let fail = |source: io::Error| BootError::Read { file: path.display().to_string(), source };
        if path.is_dir() {
            return Err(fail(io::ErrorKind::IsADirectory.into()));
        }
        let mut bytes = Vec::new();
        let file = File::open(path).map_err(fail)?;
        file.take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(fail)?;
        let size = bytes.len() as u64;
        if size == 0 {
            return Err(BootError::Empty { file: name });
        }
        if size > MAX_FILE {
            return Err(BootError::TooLarge { file: name, size });
        }
        Ok(NamedFile { name, bytes })
    }

    /// The name for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The content.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes `at..at + len`, or a refusal that says `what` is missing.
    pub(super) fn slice(&self, at: u64, len: u64, what: &'static str) -> Result<&[u8], BootError> {
        let range = usize::try_from(at).ok().zip(at.checked_add(len).and_then(|e| usize::try_from(e).ok()));
        range.and_then(|(start, end)| self.bytes.get(start..end)).ok_or_else(|| self.truncated(what))
    }

    pub(super) fn truncated(&self, what: &'static str) -> BootError {
        BootError::Truncated { file: self.name.clone(), what }
    }

    pub(super) fn wrong(&self, hint: &'static str) -> BootError {
        BootError::WrongFormat { file: self.name.clone(), hint }
    }

    pub(super) fn no_room(&self, need: u64, hint: &'static str) -> BootError {
        BootError::NoRoom { file: self.name.clone(), need, hint }
    }

    /// The refusal for a kernel of no known kind, with the best hint its first bytes give.
    pub(super) fn unknown_format(&self) -> BootError {
        let bytes = &self.bytes[..];
        if bytes.is_empty() {
            return BootError::Empty { file: self.name.clone() };
        }
        self.wrong(match bytes {
            [0x7F, b'E', b'L', b'F', ..] => {
                "an ELF file without PVH note or Multiboot header; build Linux with CONFIG_PVH or give the bzImage"
            }
            [0x1F, 0x8B, ..] | [0xFD, b'7', b'z', ..] | [0x28, 0xB5, 0x2F, 0xFD, ..] => {
                "a compressed file, not a kernel; unpack it first (an initrd goes to --initrd)"
            }
            [b'0', b'7', b'0', b'7', b'0', ..] => "a cpio archive, not a kernel; give it as --initrd",
            [b'M', b'Z', ..] => "an EFI program without Linux boot header; give an x86 bzImage",
            _ if has_multiboot2(bytes) => "a Multiboot 2 kernel, which is not supported; build it for Multiboot 1 or PVH",
            _ => "not a kernel: neither bzImage, ELF, Multiboot 1 nor boot sector",
        })
    }
}

fn has_multiboot2(bytes: &[u8]) -> bool {
    bytes[..bytes.len().min(32768)].as_chunks::<8>().0.iter().any(|c| c[..4] == 0xE852_50D6u32.to_le_bytes())
}

/// The little-endian number of `N` bytes at `at`, 0 beyond the end.
pub(super) fn le<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    if let Some(field) = at.checked_add(N).and_then(|end| bytes.get(at..end)) {
        value[..N].copy_from_slice(field);
    }
    u64::from_le_bytes(value)
}

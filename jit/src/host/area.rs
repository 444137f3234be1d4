//! Memory that is written at one address and executed at another.
//!
//! Invariant: the writable and the executable mapping show the same memfd pages and neither is ever both.
//! Whoever writes does so through [`CodeArea::write`], from the one owner; whoever jumps into the executable
//! mapping vouches for what was written there.

use memmap2::{Mmap, MmapOptions, MmapRaw};
use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;

/// One memfd mapped twice: read-write for us, read-execute for the CPU.
pub struct CodeArea {
    writable: MmapRaw,
    executable: Mmap,
}

impl CodeArea {
    /// Maps `length` zero bytes.
    pub fn new(length: usize) -> io::Result<CodeArea> {
        let file = memfd()?;
        file.set_len(length as u64)?;
        let writable = MmapOptions::new().len(length).map_raw(&file)?;
        // SAFETY: the file is private to this process and nobody truncates it; all writes go through `write`.
        let executable = unsafe { MmapOptions::new().len(length).map_exec(&file)? };
        Ok(CodeArea { writable, executable })
    }

    /// Bytes in the area.
    pub fn len(&self) -> usize {
        self.writable.len()
    }

    /// Whether the area has no bytes; never.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Host address at which the byte at `offset` is executed.
    pub fn address(&self, offset: usize) -> u64 {
        self.executable.as_ptr() as u64 + offset as u64
    }

    /// Whether `address` lies in the executable mapping.
    pub fn contains(&self, address: u64) -> bool {
        address.wrapping_sub(self.address(0)) < self.len() as u64
    }

    /// Puts `code` at `offset`. Panics when it does not fit.
    pub fn write(&mut self, offset: usize, code: &[u8]) {
        let room = self.len().checked_sub(offset).is_some_and(|room| room >= code.len());
        assert!(room, "code outside its area");
        // SAFETY: in bounds as just checked; `&mut self` makes this the only writer.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.writable.as_mut_ptr().add(offset), code.len());
        }
    }
}

/// An anonymous file that may be mapped executable (kernels since 6.3 want to be told so).
pub(super) fn memfd() -> io::Result<File> {
    let name = c"paravane-code";
    // SAFETY: a valid name; the descriptor returned is new and ours.
    unsafe {
        let mut fd = libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_EXEC);
        if fd < 0 {
            fd = libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC);
        }
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(File::from_raw_fd(fd))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_can_be_executed() {
        let mut area = CodeArea::new(4096).unwrap();
        area.write(16, &[0xB8, 42, 0, 0, 0, 0xC3]); // mov eax, 42; ret
        // SAFETY: a complete function of this type was just written there.
        let answer: extern "C" fn() -> u32 = unsafe { std::mem::transmute(area.address(16)) };
        assert_eq!(answer(), 42);
        assert!(area.contains(area.address(4095)) && !area.contains(area.address(4096)));
    }
}

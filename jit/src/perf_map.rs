//! `/tmp/perf-PID.map`: names for translated code, as `perf report` looks them up (perf-report(1); one line `START SIZE NAME`
//! per piece, in hexadecimal). All translators of a process add to one file, line by line.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

/// Text kept before it is written.
const KEPT: usize = 64 << 10;

/// The file of this process.
pub fn path() -> PathBuf {
    PathBuf::from(format!("/tmp/perf-{}.map", std::process::id()))
}

/// Replaces what an earlier process with our number left. Call before the first translator is made.
pub fn begin() -> io::Result<()> {
    match std::fs::remove_file(path()) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    OpenOptions::new().write(true).create_new(true).open(path()).map(drop)
}

/// One translator's way to the file.
pub(crate) struct PerfMap {
    file: File,
    kept: String,
}

impl PerfMap {
    pub(crate) fn open() -> io::Result<PerfMap> {
        let file = OpenOptions::new().append(true).custom_flags(libc::O_NOFOLLOW).open(path())?;
        Ok(PerfMap { file, kept: String::with_capacity(KEPT + 128) })
    }

    /// A piece of code that belongs to no guest address.
    pub(crate) fn stub(&mut self, at: u64, len: u64, name: &str) {
        self.line(at, len, format_args!("paravane_{name}"));
    }

    /// Code of the block translated from linear address `lin`, if there is any; `part` says which.
    pub(crate) fn block(&mut self, at: u64, len: usize, lin: u64, part: &str) {
        if len > 0 {
            self.line(at, len as u64, format_args!("guest_{part}@{lin:x}"));
        }
    }

    fn line(&mut self, at: u64, len: u64, name: std::fmt::Arguments<'_>) {
        let _infallible = writeln!(self.kept, "{at:x} {len:x} {name}");
        if self.kept.len() >= KEPT {
            self.flush();
        }
    }

    /// Whole lines in one call, so that those of other translators do not fall between.
    fn flush(&mut self) {
        // A full disk costs names, not the guest.
        let _best_effort = self.file.write_all(self.kept.as_bytes());
        self.kept.clear();
    }
}

impl Drop for PerfMap {
    fn drop(&mut self) {
        self.flush();
    }
}

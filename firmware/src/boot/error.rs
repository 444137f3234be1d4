//! Why a kernel cannot be booted: one line each, naming the file and what to do.

use std::{error, fmt, io};

/// A refusal.
#[derive(Debug)]
pub enum BootError {
    /// The file cannot be opened or read.
    Read {
        /// File name.
        file: String,
        /// The host's reason.
        source: io::Error,
    },
    /// The file is empty.
    Empty {
        /// File name.
        file: String,
    },
    /// The file is larger than anything that is loaded.
    TooLarge {
        /// File name.
        file: String,
        /// Its size in bytes.
        size: u64,
    },
    /// The file ends before what its own headers promise.
    Truncated {
        /// File name.
        file: String,
        /// What is missing.
        what: &'static str,
    },
    /// The file is nothing that can be booted.
    WrongFormat {
        /// File name.
        file: String,
        /// What it looks like and what to give instead.
        hint: &'static str,
    },
    /// The file or a part of it does not fit into guest memory.
    NoRoom {
        /// File name.
        file: String,
        /// Bytes needed.
        need: u64,
        /// Where it has to be, and what to do.
        hint: &'static str,
    },
    /// The command line is longer than the kernel accepts.
    CommandLine {
        /// Name of the kernel file.
        file: String,
        /// Its length.
        len: usize,
        /// The kernel's limit.
        max: usize,
    },
    /// The kernel has no entry point of the kind asked for.
    NoSuchEntry {
        /// Name of the kernel file.
        file: String,
        /// Which.
        what: &'static str,
    },
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BootError::Read { file, source } => write!(f, "{file}: cannot read: {source}"),
            BootError::Empty { file } => write!(f, "{file}: the file is empty; give a complete one"),
            BootError::TooLarge { file, size } => {
                write!(f, "{file}: {size} bytes is more than the {} that can be loaded", super::MAX_FILE)
            }
            BootError::Truncated { file, what } => {
                write!(f, "{file}: truncated: {what} is missing; fetch the file again")
            }
            BootError::WrongFormat { file, hint } => write!(f, "{file}: {hint}"),
            BootError::NoRoom { file, need, hint } => {
                write!(f, "{file}: {need} bytes do not fit {hint}")
            }
            BootError::CommandLine { file, len, max } => {
                write!(
                    f,
                    "{file}: the command line has {len} bytes, this kernel takes {max}; shorten --append"
                )
            }
            BootError::NoSuchEntry { file, what } => write!(f, "{file}: this kernel has no {what}"),
        }
    }
}

impl error::Error for BootError {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            BootError::Read { source, .. } => Some(source),
            _ => None,
        }
    }
}

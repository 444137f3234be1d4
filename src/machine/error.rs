//! Why a machine cannot be built: one line each, saying what to do.

use paravane_devices::block::ImageError;
use paravane_firmware::boot::BootError;
use std::path::PathBuf;
use std::{error, fmt, io};

/// A refusal.
#[derive(Debug)]
pub enum MachineError {
    /// The amount of RAM makes no sense.
    Memory {
        /// Bytes asked for.
        bytes: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The host gives no memory.
    NoHostMemory(io::Error),
    /// The processor model is unknown, or the host cannot carry it.
    Model(String),
    /// The engine cannot run on this host.
    Engine(io::Error),
    /// The kernel or initial RAM disk cannot be booted.
    Boot(BootError),
    /// A disk image cannot be used.
    Image(ImageError),
    /// A disk has no place.
    Disk(PathBuf, String),
    /// A file or socket of ours cannot be opened.
    File(PathBuf, io::Error),
    /// The host refuses a thread or another resource.
    Host(&'static str, io::Error),
    /// Parts of the machine are in each other's way.
    Wiring(String),
}

impl fmt::Display for MachineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MachineError::Memory { bytes, problem } => write!(f, "--memory: {bytes} bytes: {problem}"),
            MachineError::NoHostMemory(e) => write!(f, "no memory for the guest: {e}; give less --memory"),
            MachineError::Model(text) => write!(f, "--cpu: {text}"),
            MachineError::Engine(e) => write!(f, "the engine cannot run here: {e} (see `paravane doctor`)"),
            MachineError::Boot(e) => e.fmt(f),
            MachineError::Image(e) => e.fmt(f),
            MachineError::Disk(path, problem) => write!(f, "--disk {}: {problem}", path.display()),
            MachineError::File(path, e) => write!(f, "{}: {e}", path.display()),
            MachineError::Host(what, e) => write!(f, "{what}: {e}"),
            MachineError::Wiring(text) => f.write_str(text),
        }
    }
}

impl error::Error for MachineError {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            MachineError::NoHostMemory(e)
            | MachineError::Engine(e)
            | MachineError::File(_, e)
            | MachineError::Host(_, e) => Some(e),
            MachineError::Boot(e) => Some(e),
            MachineError::Image(e) => Some(e),
            _ => None,
        }
    }
}

impl From<BootError> for MachineError {
    fn from(e: BootError) -> MachineError {
        MachineError::Boot(e)
    }
}

impl From<ImageError> for MachineError {
    fn from(e: ImageError) -> MachineError {
        MachineError::Image(e)
    }
}

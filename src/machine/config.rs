//! What a machine is made of, as asked for: plain data, no file opened yet.

use std::path::PathBuf;

/// What executes guest code.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum EngineKind {
    /// The binary translator.
    #[default]
    Jit,
    /// The interpreter: complete and slow.
    Interp,
}

/// When the translator lets the host's page tables show a program's memory instead of looking addresses up in tables.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum WindowUse {
    /// For programs that run for more than some milliseconds, 64-bit or 32-bit in flat segments.
    #[default]
    Auto,
    /// For these programs from their first instruction on; for testing.
    Always,
    /// Never.
    Never,
}

/// Where machine time comes from.
#[derive(clap::ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ClockKind {
    /// The host's monotonic clock.
    #[default]
    Host,
    /// Retired instructions, one nanosecond each: the same run every time.
    Instructions,
}

/// What is started.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Boot {
    /// A kernel file, loaded by us.
    Kernel {
        /// bzImage, PVH or multiboot ELF, or flat image.
        kernel: PathBuf,
        /// Initial RAM disk or module.
        initrd: Option<PathBuf>,
        /// Command line.
        append: String,
    },
    /// A kernel in memory (the lab guest).
    Image {
        /// The ELF file's bytes.
        image: &'static [u8],
        /// Command line.
        append: String,
    },
}

/// Which front end a disk appears behind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskBus {
    /// PIIX3 IDE, channel 0 master first.
    Ide,
    /// virtio-blk on PCI.
    Virtio,
}

/// One disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskConfig {
    /// The raw image.
    pub file: PathBuf,
    /// Its front end.
    pub bus: DiskBus,
    /// The guest sees a write-protected disk.
    pub readonly: bool,
    /// Writes stay in memory and are gone afterwards.
    pub snapshot: bool,
}

/// The host side of one serial port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SerialConfig {
    /// Our own terminal or pipes.
    Stdio,
    /// Output to a file.
    File(PathBuf),
    /// A UNIX socket we listen on.
    Unix(PathBuf),
    /// The port is there, nothing is plugged in.
    None,
}

/// The most processors: each takes some TiB of address space for the translator's tables, of which there are 128.
pub const MAX_CPUS: u32 = 16;

/// A whole machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MachineConfig {
    /// Bytes of RAM.
    pub memory: u64,
    /// Processors, 1 to [`MAX_CPUS`].
    pub cpus: u32,
    /// Processor model by name.
    pub model: String,
    /// Engine.
    pub engine: EngineKind,
    /// Windows of the translator.
    pub windows: WindowUse,
    /// Clock.
    pub clock: ClockKind,
    /// What is started.
    pub boot: Boot,
    /// Disks in the order given.
    pub disks: Vec<DiskConfig>,
    /// COM1, COM2, ….
    pub serial: Vec<SerialConfig>,
    /// Port whose writes end the process.
    pub debug_exit: Option<u16>,
    /// Whether a reset boots again (otherwise it ends the run).
    pub reboot: bool,
}

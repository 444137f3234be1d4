//! The suite: which programs there are, in which class, and how many units of each make a run of about half a
//! second in the slowest emulator.

/// One row of the table.
pub struct Program {
    /// What the marks and the table call it
    pub name: &'static str,
    /// The class whose geometric mean it enters
    pub class: &'static str,
    /// Units of work in one run, before `--scale`
    pub units: u64,
    /// What is run
    pub kind: Kind,
}

/// How a program is started, in its folder.
pub enum Kind {
    /// `./SOURCE UNITS VARIANT`, compiled from `tests/bench/SOURCE.c`
    Compiled {
        /// The source's name without `.c`
        source: &'static str,
        /// The second argument, or nothing
        variant: &'static str,
    },
    /// A command that `tool` runs UNITS times
    Tool(&'static [&'static str]),
}

/// The classes in the order of the table.
pub const CLASSES: &[&str] = &["integer", "memory", "fp", "kernel", "real", "cold", "boot", "disk"];

/// What `diskbench` measures behind each bus, in the order of the table: an operation is one transfer (128 KiB in order,
/// 4 KiB at random) of a guest's own driver, with O_DIRECT, at this depth.
pub const DISK: &[&str] = &[
    "ide/seqread/1",
    "ide/seqwrite/1",
    "ide/randread/1",
    "ide/randwrite/1",
    "ide/randread/32",
    "ide/randwrite/32",
    "virtio/seqread/1",
    "virtio/seqwrite/1",
    "virtio/randread/1",
    "virtio/randwrite/1",
    "virtio/randread/32",
    "virtio/randwrite/32",
];

/// Random operations of one disk test, before `--scale`.
pub const DISK_OPERATIONS: u64 = 4_000;

/// Megabytes of the disk that the tests use, and of its image.
pub const DISK_MEGABYTES: u64 = 32;

/// Functions of the generated program of class `cold`.
pub const COLD_FUNCTIONS: u64 = 20_000;

/// Bytes of text that the real programs work on.
pub const TEXT_BYTES: &str = "400000";

const fn c(class: &'static str, name: &'static str, units: u64) -> Program {
    v(class, name, name, "", units)
}

const fn v(
    class: &'static str,
    name: &'static str,
    source: &'static str,
    variant: &'static str,
    units: u64,
) -> Program {
    Program { name, class, units, kind: Kind::Compiled { source, variant } }
}

const fn t(name: &'static str, units: u64, command: &'static [&'static str]) -> Program {
    Program { name, class: "real", units, kind: Kind::Tool(command) }
}

/// Input files beside the programs, from `tests/bench/`.
pub const SCRIPTS: &[&str] = &["words.awk", "words.pl"];

/// Every program but the boot itself.
pub const SUITE: &[Program] = &[
    c("integer", "sort", 200),
    c("integer", "parse", 1_000),
    c("integer", "hash", 60),
    c("integer", "state", 800),
    c("integer", "recurse", 3_000),
    c("integer", "interp", 500),
    c("integer", "strings", 60),
    c("integer", "bignum", 6_000),
    c("integer", "sha", 500),
    c("memory", "memcpy", 500),
    c("memory", "repmov", 50_000),
    c("memory", "stream", 10),
    v("memory", "chase-l1", "chase", "l1", 100_000),
    v("memory", "chase-l2", "chase", "l2", 50_000),
    v("memory", "chase-dram", "chase", "dram", 1_000),
    c("memory", "unaligned", 80_000),
    c("memory", "atomics", 30_000),
    c("fp", "nbody", 200),
    c("fp", "matmul", 50),
    c("fp", "avx2", 4000),
    c("fp", "convert", 3_000),
    c("fp", "x87", 600),
    v("kernel", "syscall-getpid", "syscall", "getpid", 1_000),
    v("kernel", "syscall-read", "syscall", "read", 80),
    v("kernel", "syscall-stat", "syscall", "stat", 50),
    v("kernel", "pages-fault", "pages", "fault", 400),
    v("kernel", "pages-protect", "pages", "protect", 200),
    c("kernel", "pipe", 50),
    v("kernel", "process-fork", "process", "fork", 300),
    v("kernel", "process-exec", "process", "exec", 100),
    v("kernel", "signal-kill", "signal", "kill", 150),
    v("kernel", "signal-fault", "signal", "fault", 80),
    t("gzip", 8, &["./busybox", "gzip", "-c", "text"]),
    t("sha256sum", 40, &["./busybox", "sha256sum", "text"]),
    t("awk", 1, &["./busybox", "awk", "-f", "words.awk", "text"]),
    t("xz", 1, &["/usr/bin/xz", "-1", "-T1", "-c", "text"]),
    t("perl", 1, &["/usr/bin/perl", "words.pl", "text"]),
    c("cold", "cold", COLD_FUNCTIONS),
];

impl Program {
    /// The command line as separate words, for this many units.
    pub fn words(&self, units: u64) -> Vec<String> {
        let units = units.to_string();
        match self.kind {
            Kind::Compiled { source, variant: "" } => vec![format!("./{source}"), units],
            Kind::Compiled { source, variant } => vec![format!("./{source}"), units, variant.into()],
            Kind::Tool(command) => {
                let start = ["./tool".into(), self.name.into(), units];
                start.into_iter().chain(command.iter().map(|word| (*word).to_owned())).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_has_its_class_and_its_own_name() {
        for (at, program) in SUITE.iter().enumerate() {
            assert!(CLASSES.contains(&program.class), "{}", program.name);
            assert!(SUITE[..at].iter().all(|other| other.name != program.name), "{}", program.name);
        }
    }
}

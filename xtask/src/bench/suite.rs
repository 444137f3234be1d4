//! The suite: which programs there are, in which class, and how many units of each make a run of about half a
//! second in the slowest emulator.

/// One row of the table.
#[derive(Clone)]
pub struct Program {
    /// What the marks and the table call it
    pub name: String,
    /// The class whose geometric mean it enters
    pub class: &'static str,
    /// Units of work in one run, before `--scale`
    pub units: u64,
    /// What is run
    pub kind: Kind,
}

/// How a program is started, in its folder.
#[derive(Clone, Copy)]
pub enum Kind {
    /// `./SOURCE UNITS VARIANT`, compiled from `tests/bench/SOURCE.c`
    Compiled {
        /// The source's name without `.c`
        source: &'static str,
        /// The second argument, or nothing
        variant: &'static str,
        /// Whether it is compiled for 32-bit x86
        narrow: bool,
    },
    /// A command that `tool` runs UNITS times
    Tool(&'static [&'static str]),
}

/// The classes in the order of the table.
pub const CLASSES: &[&str] = &[
    "integer",
    "memory",
    "fp",
    "kernel",
    "real",
    "integer-32",
    "memory-32",
    "fp-32",
    "kernel-32",
    "cold",
    "smc",
    "threads",
    "boot",
    "host",
    "disk",
];

/// The classes whose programs are run as 32-bit code too, and what those rows' class is.
const NARROW: &[(&str, &str)] =
    &[("integer", "integer-32"), ("memory", "memory-32"), ("fp", "fp-32"), ("kernel", "kernel-32")];

/// The guests whose boot is measured, by their names in the manifest.
pub const BOOTS: &[&str] = &["cloud", "amd64"];

/// Rows that no program prints: class `boot` is host CPU time and wall time up to `/init`, class `host` the bytes of host
/// memory beyond guest RAM, when `/init` runs and when the whole suite has run.
pub const MACHINE_ROWS: &[(&str, &str)] = &[
    ("cloud-cpu", "boot"),
    ("cloud-wall", "boot"),
    ("amd64-cpu", "boot"),
    ("amd64-wall", "boot"),
    ("cloud-memory", "host"),
    ("amd64-memory", "host"),
    ("suite-memory", "host"),
];

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

/// Those of them whose instructions are counted; one unit of the row `cold` is an instruction.
pub const COUNTED_FUNCTIONS: u64 = 2_000;

/// Bytes of text that the real programs work on.
pub const TEXT_BYTES: &str = "400000";

/// One program as it is listed below.
struct Row {
    name: &'static str,
    class: &'static str,
    units: u64,
    kind: Kind,
}

const fn c(class: &'static str, name: &'static str, units: u64) -> Row {
    v(class, name, name, "", units)
}

const fn v(
    class: &'static str,
    name: &'static str,
    source: &'static str,
    variant: &'static str,
    units: u64,
) -> Row {
    Row { name, class, units, kind: Kind::Compiled { source, variant, narrow: false } }
}

const fn t(name: &'static str, units: u64, command: &'static [&'static str]) -> Row {
    Row { name, class: "real", units, kind: Kind::Tool(command) }
}

/// Input files beside the programs, from `tests/bench/`.
pub const SCRIPTS: &[&str] = &["words.awk", "words.pl", "words.py", "words.lua", "words.sql"];

/// 2^521 - 1, a prime.
const MERSENNE_521: &str = "1FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF\
    FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF";

const ROWS: &[Row] = &[
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
    t("zstd", 4, &["/usr/bin/zstd", "-9", "-c", "--single-thread", "text"]),
    t("openssl", 2, &["/usr/bin/openssl", "prime", "-hex", MERSENNE_521]),
    t("lua", 1, &["./lua", "words.lua", "text"]),
    t("python", 1, &["/usr/bin/python3", "-I", "-S", "words.py", "text"]),
    t("sqlite", 1, &["/usr/bin/sqlite3", "-batch", "-init", "words.sql", ":memory:", ".exit"]),
    c("cold", "cold", COLD_FUNCTIONS),
    v("smc", "smc-patch", "smc", "patch", 30_000),
    v("smc", "smc-crowd", "smc", "crowd", 10_000),
    v("smc", "smc-data", "smc", "data", 50_000),
    v("threads", "threads-one", "threads", "one", 20_000),
    v("threads", "threads-two", "threads", "two", 20_000),
];

/// Every program.
pub fn suite() -> Vec<Program> {
    let plain = ROWS.iter().map(|row| Program {
        name: row.name.into(),
        class: row.class,
        units: row.units,
        kind: row.kind,
    });
    plain.chain(ROWS.iter().filter_map(narrowed)).collect()
}

/// The same program as 32-bit code, half as long a run.
fn narrowed(row: &Row) -> Option<Program> {
    let (_, class) = NARROW.iter().find(|(wide, _)| *wide == row.class)?;
    let Kind::Compiled { source, variant, .. } = row.kind else { return None };
    Some(Program {
        name: format!("{}-32", row.name),
        class,
        units: (row.units / 2).max(1),
        kind: Kind::Compiled { source, variant, narrow: true },
    })
}

impl Program {
    /// Whether it measures time instead of CPU time, in a machine with two processors.
    pub fn is_threaded(&self) -> bool {
        self.class == "threads"
    }

    /// The compiled program's file in its folder.
    pub fn file(&self) -> String {
        match self.kind {
            Kind::Compiled { source, narrow: true, .. } => format!("{source}-32"),
            Kind::Compiled { source, .. } => source.into(),
            Kind::Tool(_) => "tool".into(),
        }
    }

    /// The host's program behind it, if it is one that the host must have.
    pub fn host_program(&self) -> Option<&'static str> {
        match self.kind {
            Kind::Tool(command) => command.first().copied().filter(|program| program.starts_with('/')),
            Kind::Compiled { .. } => None,
        }
    }

    /// The command line as separate words, for this many units.
    pub fn words(&self, units: u64) -> Vec<String> {
        let (program, units) = (format!("./{}", self.file()), units.to_string());
        match self.kind {
            Kind::Compiled { variant: "", .. } => vec![program, units],
            Kind::Compiled { variant, .. } => vec![program, units, variant.into()],
            Kind::Tool(command) => {
                let start = [program, self.name.clone(), units];
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
        let suite = suite();
        for (at, program) in suite.iter().enumerate() {
            assert!(CLASSES.contains(&program.class), "{}", program.name);
            assert!(suite[..at].iter().all(|other| other.name != program.name), "{}", program.name);
        }
        assert!(suite.iter().any(|program| program.name == "sort-32" && program.file() == "sort-32"));
    }
}

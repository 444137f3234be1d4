//! The file of a recorded run: JSON lines.
//!
//! ```text
//! {"paravane-recording":2,"version":"0.1.0","machine":{"memory":"536870912","kernel":"vmlinuz, 8MiB, 6f3c…",…}}
//! {"input":{"ns":81230000,"instructions":80110000,"port":0,"bytes":"6c730a"}}
//! {"check":{"ns":16780000,"instructions":16777216,"rip":"ffffffff81000110","parts":{"cpu0":"…","memory":"…"},
//!           "bytes":{"cpu0":"…"},"pages":[[7,3735928559]]}}
//! {"end":{"ns":912300000,"instructions":900120000,"why":"the guest switched the power off"}}
//! ```
//!
//! `parts` has a hash for each part of the machine. So that a difference can be named, `bytes` holds those parts that changed since the
//! check before, and `pages` the pages of RAM that did, with 32 bits of their hashes.
//!
//! `machine` is everything that decides about the run beside its input: a replay is refused where one of these differs. The
//! last line is missing, or cut off, where paravane was killed; what is there is replayed.

use super::journal::{Input, Stamp};
use super::ram::Changed;
use super::state::Digest;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

/// The format's number: another one is refused.
const FORMAT: u32 = 2;

/// What decides about a run, by name.
pub type Identity = BTreeMap<String, String>;

#[derive(Serialize, Deserialize)]
struct Header {
    #[serde(rename = "paravane-recording")]
    format: u32,
    version: String,
    machine: Identity,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Line {
    Input(InputLine),
    Check(CheckLine),
    End(EndLine),
}

#[derive(Serialize, Deserialize)]
struct InputLine {
    ns: u64,
    instructions: u64,
    port: usize,
    bytes: String,
}

#[derive(Serialize, Deserialize)]
struct CheckLine {
    ns: u64,
    instructions: u64,
    rip: String,
    parts: BTreeMap<String, String>,
    bytes: BTreeMap<String, String>,
    pages: Vec<Changed>,
}

#[derive(Serialize, Deserialize)]
struct EndLine {
    ns: u64,
    instructions: u64,
    why: String,
}

/// The state of a recorded run at one point.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Check {
    pub(super) at: Stamp,
    /// Of the first processor.
    pub(super) rip: u64,
    /// Hashes.
    pub(super) parts: BTreeMap<String, String>,
    /// What the parts are made of; in a recording only those that changed.
    pub(super) bytes: BTreeMap<String, Vec<u8>>,
    /// Pages of RAM that changed since the check before.
    pub(super) pages: Vec<Changed>,
}

impl Check {
    pub(super) fn new(at: Stamp, rip: u64, digest: &Digest) -> Check {
        let parts = digest.iter().map(|(name, hash)| (name.clone(), format!("{hash:016x}"))).collect();
        Check { at, rip, parts, bytes: BTreeMap::new(), pages: Vec::new() }
    }

    /// Whether both are the same state.
    pub(super) fn agrees(&self, other: &Check) -> bool {
        (self.at, self.rip, &self.parts) == (other.at, other.rip, &other.parts)
    }
}

/// How a recorded run ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct End {
    /// When.
    pub at: Stamp,
    /// Why, for people.
    pub why: String,
}

/// Writes a recording.
pub struct Recorder {
    path: PathBuf,
    /// `None`: it could not be written any more.
    file: Option<BufWriter<File>>,
    /// The hashes of parts that were written last.
    known: BTreeMap<String, String>,
}

impl Recorder {
    /// Begins a recording, in place of what `path` held.
    pub fn create(path: &Path, machine: Identity) -> Result<Recorder, RecordError> {
        let file = File::create(path).map_err(|e| RecordError::Host(path.to_owned(), e))?;
        let file = Some(BufWriter::new(file));
        let mut recorder = Recorder { path: path.to_owned(), file, known: BTreeMap::new() };
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let header = serde_json::to_string(&Header { format: FORMAT, version, machine });
        let written = header.map_err(io::Error::from).and_then(|header| recorder.write(&header));
        written.map_err(|e| RecordError::Host(path.to_owned(), e))?;
        Ok(recorder)
    }

    fn write(&mut self, line: &str) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        writeln!(file, "{line}")?;
        file.flush()
    }

    /// A recording that cannot go on ends; the guest does not.
    fn line(&mut self, line: &Line, at: Stamp) {
        let written = serde_json::to_string(line).map_err(io::Error::from).and_then(|l| self.write(&l));
        if let Err(e) = written {
            self.file = None;
            eprintln!(
                "paravane: --record {}: {e}: the recording ends after {} instructions, the guest runs on",
                self.path.display(),
                at.instructions
            );
        }
    }

    pub(super) fn input(&mut self, input: &Input) {
        let bytes = hex(&input.bytes);
        let Stamp { ns, instructions } = input.at;
        self.line(&Line::Input(InputLine { ns, instructions, port: input.port, bytes }), input.at);
    }

    pub(super) fn check(&mut self, check: &Check) {
        let Stamp { ns, instructions } = check.at;
        let (rip, parts) = (format!("{:x}", check.rip), check.parts.clone());
        let new = |part: &&String| self.known.get(*part) != parts.get(*part);
        let bytes = check.bytes.keys().filter(new).map(|part| (part.clone(), hex(&check.bytes[part])));
        let (bytes, pages) = (bytes.collect(), check.pages.clone());
        self.known = parts.clone();
        self.line(&Line::Check(CheckLine { ns, instructions, rip, parts, bytes, pages }), check.at);
    }

    /// The run is over.
    pub(super) fn end(&mut self, end: &End) {
        let Stamp { ns, instructions } = end.at;
        self.line(&Line::End(EndLine { ns, instructions, why: end.why.clone() }), end.at);
    }
}

/// A recording that was read.
#[derive(Debug, Default)]
pub struct Recording {
    pub(super) machine: Identity,
    pub(super) inputs: Vec<Input>,
    pub(super) checks: Vec<Check>,
    pub(super) end: Option<End>,
}

/// Why there is no recording, or not this one.
#[derive(Debug)]
pub enum RecordError {
    /// The host refuses.
    Host(PathBuf, io::Error),
    /// The file holds something else.
    NotARecording(PathBuf),
    /// A line makes no sense.
    Damaged(PathBuf, usize),
    /// It was made by another version of paravane.
    Version(PathBuf, String),
    /// It is of another machine: the name of what differs, what was recorded, what there is.
    Differs(String, String, String),
}

impl fmt::Display for RecordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RecordError::Host(path, e) => write!(f, "{}: {e}", path.display()),
            RecordError::NotARecording(path) => write!(f, "{} is no recording of paravane's", path.display()),
            RecordError::Damaged(path, line) => write!(f, "{}: line {line} is damaged", path.display()),
            RecordError::Version(path, version) => {
                write!(f, "{} was made by {version}: only the same version can replay it", path.display())
            }
            RecordError::Differs(what, recorded, here) => {
                write!(f, "this is another machine: {what} was {recorded}, and is {here}")
            }
        }
    }
}

impl std::error::Error for RecordError {}

impl Recording {
    /// Reads `path`.
    pub fn read(path: &Path) -> Result<Recording, RecordError> {
        let file = File::open(path).map_err(|e| RecordError::Host(path.to_owned(), e))?;
        let mut lines = BufReader::new(file).lines();
        let none = || RecordError::NotARecording(path.to_owned());
        let first = lines.next().and_then(Result::ok).ok_or_else(none)?;
        let header: Header = serde_json::from_str(&first).map_err(|_| none())?;
        if header.format != FORMAT || header.version != env!("CARGO_PKG_VERSION") {
            let version = format!("paravane {} (format {})", header.version, header.format);
            return Err(RecordError::Version(path.to_owned(), version));
        }
        let mut recording = Recording { machine: header.machine, ..Recording::default() };
        let mut lines = lines.enumerate().peekable();
        while let Some((n, line)) = lines.next() {
            let line = line.map_err(|e| RecordError::Host(path.to_owned(), e))?;
            match serde_json::from_str(&line).ok().and_then(|line| recording.add(line)) {
                Some(()) => {}
                // Cut off in the middle.
                None if lines.peek().is_none() => break,
                None => return Err(RecordError::Damaged(path.to_owned(), n + 2)),
            }
        }
        Ok(recording)
    }

    fn add(&mut self, line: Line) -> Option<()> {
        match line {
            Line::Input(InputLine { ns, instructions, port, bytes }) => {
                let bytes = unhex(&bytes)?;
                self.inputs.push(Input { at: Stamp { ns, instructions }, port, bytes });
            }
            Line::Check(CheckLine { ns, instructions, rip, parts, bytes, pages }) => {
                let rip = u64::from_str_radix(&rip, 16).ok()?;
                let bytes =
                    bytes.into_iter().map(|(part, hex)| Some((part, unhex(&hex)?))).collect::<Option<_>>()?;
                self.checks.push(Check { at: Stamp { ns, instructions }, rip, parts, bytes, pages });
            }
            Line::End(EndLine { ns, instructions, why }) => {
                self.end = Some(End { at: Stamp { ns, instructions }, why });
            }
        }
        Some(())
    }

    /// The last point the recording tells of.
    pub(super) fn last(&self) -> Stamp {
        let inputs = self.inputs.last().map(|i| i.at);
        let checks = self.checks.last().map(|c| c.at);
        self.end.as_ref().map(|e| e.at).into_iter().chain(inputs).chain(checks).max().unwrap_or_default()
    }

    /// Refuses a machine that is not the recorded one.
    pub fn belongs_to(&self, machine: &Identity) -> Result<(), RecordError> {
        let nothing = "not there".to_owned();
        for what in self.machine.keys().chain(machine.keys()) {
            let (recorded, here) = (self.machine.get(what), machine.get(what));
            if recorded != here {
                let text = |value: Option<&String>| value.unwrap_or(&nothing).clone();
                return Err(RecordError::Differs(what.clone(), text(recorded), text(here)));
            }
        }
        Ok(())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        return None;
    }
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            Scratch(std::env::temp_dir().join(format!("paravane-record-{}-{name}", std::process::id())))
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _gone = std::fs::remove_file(&self.0);
        }
    }

    fn identity(memory: &str) -> Identity {
        Identity::from([("memory".to_owned(), memory.to_owned())])
    }

    #[test]
    fn what_is_read_is_what_was_written() {
        let file = Scratch::new("all");
        let mut recorder = Recorder::create(&file.0, identity("64M")).expect("file");
        let at = |n| Stamp { ns: 2 * n, instructions: n };
        let input = Input { at: at(3), port: 1, bytes: vec![0, 0xFF, 0x0A] };
        let mut check = Check::new(at(4), 0xFFFF_FFFF_8100_0000, &vec![("cpu0".to_owned(), 5)]);
        (check.bytes, check.pages) =
            (BTreeMap::from([("cpu0".to_owned(), vec![1, 0xF2])]), vec![(7, u32::MAX)]);
        // The same again: its bytes are known.
        let again = Check { bytes: BTreeMap::new(), ..check.clone() };
        let end = End { at: at(9), why: "power off".into() };
        recorder.input(&input);
        recorder.check(&check);
        recorder.check(&check);
        recorder.end(&end);
        let read = Recording::read(&file.0).expect("recording");
        assert_eq!((read.inputs.as_slice(), read.checks.as_slice()), (&[input][..], &[check, again][..]));
        assert_eq!((read.end.clone(), read.last()), (Some(end), at(9)));
        assert!(read.belongs_to(&identity("64M")).is_ok());
        let other = read.belongs_to(&identity("65M")).expect_err("another").to_string();
        assert_eq!(other, "this is another machine: memory was 64M, and is 65M");
    }

    #[test]
    fn a_cut_off_recording_is_used_and_a_damaged_one_refused() {
        let file = Scratch::new("cut");
        let mut recorder = Recorder::create(&file.0, identity("64M")).expect("file");
        (1..3).for_each(|n| {
            let at = Stamp { ns: n, instructions: n };
            recorder.input(&Input { at, port: 0, bytes: vec![n as u8] });
        });
        drop(recorder);
        let whole = std::fs::read_to_string(&file.0).expect("file");
        std::fs::write(&file.0, &whole[..whole.len() - 10]).expect("file");
        assert_eq!(Recording::read(&file.0).expect("recording").inputs.len(), 1);
        std::fs::write(&file.0, whole.replacen("\"ns\":1", "\"ns\":x", 1)).expect("file");
        assert!(matches!(Recording::read(&file.0), Err(RecordError::Damaged(_, 2))));
        std::fs::write(&file.0, whole.replacen("g\":2", "g\":3", 1)).expect("file");
        assert!(matches!(Recording::read(&file.0), Err(RecordError::Version(..))));
        std::fs::write(&file.0, "hello\n").expect("file");
        assert!(matches!(Recording::read(&file.0), Err(RecordError::NotARecording(_))));
    }
}

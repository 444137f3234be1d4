//! Running host programs and reading host files, with errors that say which program or file it was.

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// One line that says what went wrong and, where it can, what to do.
#[derive(Debug)]
pub struct Failure(String);

/// The result of every habit.
pub type Outcome<T> = Result<T, Failure>;

impl Failure {
    /// A failure with this message.
    pub fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failure {}

/// Adds "what" in front of an error's own text.
pub trait Context<T> {
    /// `Err` becomes a [`Failure`] that reads `what: error`.
    fn context(self, what: impl fmt::Display) -> Outcome<T>;
}

impl<T, E: fmt::Display> Context<T> for Result<T, E> {
    fn context(self, what: impl fmt::Display) -> Outcome<T> {
        self.map_err(|error| Failure(format!("{what}: {error}")))
    }
}

/// The repository's root.
pub fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_path_buf()
}

/// Where cargo builds.
pub fn target_folder() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Makes the release build of paravane; where it is.
pub fn release_build() -> Outcome<PathBuf> {
    run(cargo().args(["build", "--release", "--quiet", "--package", "paravane", "--bin", "paravane"]))?;
    let path = root().join(target_folder()).join("release/paravane");
    if path.is_file() { Ok(path) } else { Err(Failure::new(format!("{} is missing", path.display()))) }
}

/// A command that starts in the repository's root.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(root());
    command
}

/// The cargo that runs us, or the one on the path.
pub fn cargo() -> Command {
    command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

fn name(command: &Command) -> String {
    Path::new(command.get_program())
        .file_name()
        .unwrap_or(command.get_program())
        .to_string_lossy()
        .into_owned()
}

fn describe(command: &Command) -> String {
    let arguments = command.get_args().map(|argument| argument.to_string_lossy().into_owned());
    std::iter::once(name(command)).chain(arguments).collect::<Vec<_>>().join(" ")
}

fn cannot_start(command: &Command, error: &std::io::Error) -> Failure {
    let program = name(command);
    if error.kind() != std::io::ErrorKind::NotFound {
        return Failure(format!("{program}: {error}"));
    }
    let advice = match program.as_str() {
        "apt-get" | "apt-cache" | "dpkg-deb" => {
            "; the guests are Debian packages, so this step needs a Debian or Ubuntu host"
        }
        "gcc" => "; apt-get install gcc libc6-dev",
        "xz" => "; apt-get install xz-utils",
        _ => "",
    };
    Failure(format!("{program} is not installed{advice}"))
}

/// Runs a command whose output goes to the terminal; anything but exit status 0 is a failure.
pub fn run(command: &mut Command) -> Outcome<()> {
    let status = command.status().map_err(|error| cannot_start(command, &error))?;
    if status.success() { Ok(()) } else { Err(Failure(format!("`{}` failed: {status}", describe(command)))) }
}

/// Runs a command and returns what it wrote to standard output.
pub fn output(command: &mut Command) -> Outcome<Vec<u8>> {
    command.stderr(Stdio::inherit());
    let output = command.output().map_err(|error| cannot_start(command, &error))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(Failure(format!("`{}` failed: {}", describe(command), output.status)))
}

/// Like [`output`], as text.
pub fn text(command: &mut Command) -> Outcome<String> {
    Ok(String::from_utf8_lossy(&output(command)?).into_owned())
}

/// Runs a filter: `input` goes in, what comes out is returned.
pub fn filter(command: &mut Command, input: &[u8]) -> Outcome<Vec<u8>> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().map_err(|error| cannot_start(command, &error))?;
    let mut stdin = child.stdin.take().ok_or_else(|| Failure::new("no pipe to the child"))?;
    let output = std::thread::scope(|scope| {
        scope.spawn(move || {
            // A filter that stops reading early reports it through its exit status.
            stdin.write_all(input).ok();
        });
        child.wait_with_output()
    });
    let output = output.context(name(command))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(Failure(format!("`{}` failed: {}", describe(command), output.status)))
}

/// Whether a program can be found on the path.
pub fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// The whole file.
pub fn read(path: &Path) -> Outcome<Vec<u8>> {
    fs::read(path).context(path.display())
}

/// Replaces a file in one step, so that a reader never sees half of it.
pub fn write(path: &Path, bytes: &[u8]) -> Outcome<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).context(folder.display())?;
    }
    let partial = path.with_extension(format!("partial.{}", std::process::id()));
    fs::write(&partial, bytes).context(partial.display())?;
    fs::rename(&partial, path).context(path.display())
}

/// All regular files under a folder, sorted; symbolic links are not followed.
pub fn files_under(folder: &Path) -> Outcome<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).context(folder.display())? {
            let entry = entry.context(folder.display())?;
            let kind = entry.file_type().context(entry.path().display())?;
            if kind.is_dir() {
                open.push(entry.path());
            } else if kind.is_file() {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    Ok(found)
}

//! The committed corpus: `tests/fuzz/corpus/TARGET.hex`, one input per line, so that a change of it is a diff.

use crate::host::{self, Context, Failure, Outcome};
use std::fs;
use std::path::{Path, PathBuf};

/// The file of target `name`.
pub fn file(name: &str) -> PathBuf {
    host::root().join("tests/fuzz/corpus").join(format!("{name}.hex"))
}

/// Writes each input of target `name` to a file of its own in `folder`, as libFuzzer wants them.
pub fn unpack(name: &str, folder: &Path) -> Outcome<()> {
    let path = file(name);
    if !path.is_file() {
        return Ok(());
    }
    let text = String::from_utf8(host::read(&path)?).context(path.display())?;
    for (number, line) in text.lines().enumerate() {
        let input = decode(line)
            .ok_or_else(|| Failure::new(format!("{}:{}: not hexadecimal", path.display(), number + 1)))?;
        host::write(&folder.join(format!("seed{number}")), &input)?;
    }
    Ok(())
}

/// Makes the inputs in `folder` the corpus of target `name`.
pub fn pack(name: &str, folder: &Path) -> Outcome<()> {
    let mut lines = Vec::new();
    for entry in host::files_under(folder)? {
        lines.push(encode(&fs::read(&entry).context(entry.display())?));
    }
    lines.sort_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
    lines.dedup();
    host::write(&file(name), (lines.join("\n") + "\n").as_bytes())
}

fn encode(input: &[u8]) -> String {
    input.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn decode(line: &str) -> Option<Vec<u8>> {
    let pairs = line.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).ok());
    pairs.map(|pair| pair.filter(|p| p.len() == 2).and_then(|p| u8::from_str_radix(p, 16).ok())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_bytes() {
        assert_eq!(encode(&[0, 0x7F, 0xFF]), "007fff");
        assert_eq!(decode("007fff"), Some(vec![0, 0x7F, 0xFF]));
        assert_eq!(decode(""), Some(vec![]));
        assert_eq!([decode("0"), decode("0g"), decode("µ0")], [None, None, None]);
    }
}

//! What the sources say: where `unsafe` lives, what was left behind, what has grown long.

use super::mask::mask;
use crate::host::{self, Failure, Outcome};

/// A file over this many lines is listed.
const LONG_FILE: usize = 900;

/// `unsafe` may live under these folders and in these files; each such file opens with its invariants.
const UNSAFE_PLACES: &[&str] = &[
    "memory/",
    "jit/",
    "src/terminal.rs",
    "src/run/terminal.rs",
    "src/signals.rs",
    "src/run/signals.rs",
    "src/machine/tsc.rs",
    // Guest code: it runs inside the machine, and touching ports and physical memory is all it does.
    "firmware/lab/",
    "firmware/guest/",
    "tests/smp/guest.rs",
];

/// Macros and attributes that mark unfinished work.
const LEFTOVERS: &[&str] = &["todo!", "unimplemented!", "#[ignore"];

/// One source file, with its comments and literals blanked out beside it.
pub struct Source {
    path: String,
    text: String,
    masked: String,
}

/// Every Rust source of the repository.
pub fn load() -> Outcome<Vec<Source>> {
    let root = host::root();
    let listed = host::text(host::command("git").args(["ls-files", "-co", "--exclude-standard", "*.rs"]))?;
    let mut sources = Vec::new();
    for path in listed.lines().filter(|path| root.join(path).is_file()) {
        let text = String::from_utf8_lossy(&host::read(&root.join(path))?).into_owned();
        sources.push(Source { path: path.to_owned(), masked: mask(&text), text });
    }
    Ok(sources)
}

/// Lists each file with `unsafe`; fails where it has no business or does not say what it relies on.
pub fn unsafe_inventory(sources: &[Source]) -> Outcome<()> {
    let mut wrong = Vec::new();
    let mut total = 0;
    for source in sources {
        let count = words(&source.masked, "unsafe");
        if count == 0 {
            continue;
        }
        total += count;
        println!("        {count:4} unsafe  {}", source.path);
        if !UNSAFE_PLACES.iter().any(|place| source.path.starts_with(place)) {
            wrong.push(format!("{}: `unsafe` outside its islands", source.path));
        } else if !opens_with_invariants(&source.text) {
            wrong.push(format!("{}: the `//!` header does not state the invariants", source.path));
        }
    }
    println!("        {total:4} unsafe  in all");
    if wrong.is_empty() { Ok(()) } else { Err(Failure::new(wrong.join("\n"))) }
}

fn opens_with_invariants(text: &str) -> bool {
    let header = text.lines().take_while(|line| line.starts_with("//!") || line.trim().is_empty());
    header.into_iter().any(|line| {
        let line = line.to_lowercase();
        line.contains("invariant") || line.contains("safety")
    })
}

fn words(masked: &str, word: &str) -> usize {
    let part = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let bytes = masked.as_bytes();
    masked
        .match_indices(word)
        .filter(|(at, _)| *at == 0 || !part(bytes[at - 1]))
        .filter(|(at, _)| bytes.get(at + word.len()).is_none_or(|&byte| !part(byte)))
        .count()
}

/// Fails on unfinished work and on tests that are switched off.
pub fn leftovers(sources: &[Source]) -> Outcome<()> {
    let mut found = Vec::new();
    for source in sources {
        for (number, line) in source.masked.lines().enumerate() {
            for leftover in LEFTOVERS.iter().filter(|leftover| line.contains(**leftover)) {
                found.push(format!("{}:{}: {leftover}", source.path, number + 1));
            }
        }
    }
    if found.is_empty() { Ok(()) } else { Err(Failure::new(found.join("\n"))) }
}

/// Lists files that should be split, or say in their header why not.
pub fn print_long_files(sources: &[Source]) {
    let long = sources.iter().map(|source| (source.text.lines().count(), &source.path));
    for (lines, path) in long.filter(|(lines, _)| *lines > LONG_FILE) {
        println!("        {lines:4} lines   {path}");
    }
}

/// Lists the ten longest functions.
pub fn print_longest_functions(sources: &[Source]) {
    let mut all: Vec<(usize, String)> = sources
        .iter()
        .flat_map(|source| {
            functions(&source.masked).into_iter().map(|function| {
                (function.lines, format!("{}:{} {}", source.path, function.first_line, function.name))
            })
        })
        .collect();
    all.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
    println!("        the longest functions:");
    for (lines, place) in all.iter().take(10) {
        println!("        {lines:4} lines   {place}");
    }
}

struct Function<'a> {
    name: &'a str,
    first_line: usize,
    lines: usize,
}

fn functions(masked: &str) -> Vec<Function<'_>> {
    let mut found = Vec::new();
    for (at, _) in masked.match_indices("fn ") {
        if at > 0 && is_name(masked.as_bytes()[at - 1] as char) {
            continue;
        }
        let rest = &masked[at + 3..];
        let name = rest.split(|c| !is_name(c)).next().unwrap_or_default();
        let Some(length) = body_length(&rest[name.len()..]).filter(|_| !name.is_empty()) else { continue };
        let body = &rest[..name.len() + length];
        let first_line = masked[..at].matches('\n').count() + 1;
        found.push(Function { name, first_line, lines: body.matches('\n').count() + 1 });
    }
    found
}

fn is_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Bytes up to the end of the body; `None` for a declaration that has none.
fn body_length(signature: &str) -> Option<usize> {
    let (mut braces, mut parentheses) = (0_i32, 0_i32);
    for (at, c) in signature.char_indices() {
        match c {
            '(' | '[' => parentheses += 1,
            ')' | ']' => parentheses -= 1,
            ';' if braces == 0 && parentheses == 0 => return None,
            '{' => braces += 1,
            '}' => {
                braces -= 1;
                if braces == 0 {
                    return Some(at + 1);
                }
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str, text: &str) -> Source {
        Source { path: path.into(), text: text.into(), masked: mask(text) }
    }

    #[test]
    fn unsafe_is_bound_to_its_islands() {
        let body = "unsafe { x() }";
        assert!(unsafe_inventory(&[source("devices/src/pit.rs", body)]).is_err());
        assert!(unsafe_inventory(&[source("memory/src/ram.rs", body)]).is_err());
        let told = format!("//! Invariants: the mapping outlives the pointer.\n{body}");
        assert!(unsafe_inventory(&[source("memory/src/ram.rs", &told)]).is_ok());
        assert!(unsafe_inventory(&[source("cpu/src/lib.rs", "#![forbid(unsafe_code)] // unsafe")]).is_ok());
    }

    #[test]
    fn leftovers_in_code_only() {
        assert!(leftovers(&[source("a.rs", "fn f() { todo!() }")]).is_err());
        assert!(leftovers(&[source("a.rs", "#[ignore = \"slow\"]")]).is_err());
        assert!(leftovers(&[source("a.rs", "// todo!()\nlet a = \"todo!()\";")]).is_ok());
    }

    #[test]
    fn functions_are_measured_by_their_braces() {
        let masked =
            mask("trait T { fn a(&self) -> [u8; 2]; }\nfn b() {\n  if x { y }\n}\nlet f: fn (u8) = g;");
        let found = functions(&masked);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].name, found[0].first_line, found[0].lines), ("b", 2, 3));
    }
}

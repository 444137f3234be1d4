//! What the manifests say: the arrows between our crates (DESIGN section 1), and the licences of everybody else's.

use crate::host::{self, Context, Failure, Outcome};
use serde::Deserialize;

/// A uses B; any other arrow between our crates is an error, in tests and build scripts too.
const ARROWS: &[(&str, &[&str])] = &[
    ("paravane-memory", &[]),
    ("paravane-cpu", &["paravane-memory"]),
    ("paravane-jit", &["paravane-cpu", "paravane-memory"]),
    ("paravane-devices", &["paravane-memory"]),
    ("paravane-pv", &["paravane-devices", "paravane-memory"]),
    ("paravane-firmware", &[]),
    (
        "paravane",
        &[
            "paravane-memory",
            "paravane-cpu",
            "paravane-jit",
            "paravane-devices",
            "paravane-pv",
            "paravane-firmware",
        ],
    ),
    (
        "paravane-fuzz",
        &[
            "paravane-memory",
            "paravane-cpu",
            "paravane-jit",
            "paravane-devices",
            "paravane-pv",
            "paravane-firmware",
        ],
    ),
    ("xtask", &[]),
];

/// Licences that may enter the tree (CRATES.md 2.4).
const LICENCES: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "MPL-2.0",
    "Unicode-3.0",
    "Unicode-DFS-2016",
    "Unlicense",
    "Zlib",
];

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    path: Option<String>,
}

fn metadata(extra: &[&str]) -> Outcome<Metadata> {
    let json =
        host::output(host::cargo().args(["metadata", "--format-version", "1", "--quiet"]).args(extra))?;
    serde_json::from_slice(&json).context("cargo metadata")
}

/// Fails on any arrow that DESIGN does not draw.
pub fn arrows() -> Outcome<()> {
    let packages = metadata(&["--no-deps"])?.packages;
    let wrong: Vec<String> = packages.iter().flat_map(wrong_arrows).collect();
    if wrong.is_empty() { Ok(()) } else { Err(Failure::new(wrong.join("\n"))) }
}

fn wrong_arrows(package: &Package) -> Vec<String> {
    let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| *name == package.name) else {
        return vec![format!("{}: this crate has no place in the list of arrows", package.name)];
    };
    // A crate may name itself to give its own tests a feature: that is no arrow.
    let ours = package
        .dependencies
        .iter()
        .filter(|dependency| dependency.path.is_some() && dependency.name != package.name);
    ours.filter(|dependency| !allowed.contains(&dependency.name.as_str()))
        .map(|dependency| format!("{} -> {}: not an allowed arrow", package.name, dependency.name))
        .collect()
}

/// Fails on a package whose licence is not on the list.
pub fn licences() -> Outcome<()> {
    let packages = metadata(&["--locked"])?.packages;
    let refused = packages.iter().filter(|package| !package.license.as_deref().is_some_and(allowed));
    let lines: Vec<String> = refused
        .map(|package| {
            let licence = package.license.as_deref().unwrap_or("no licence named");
            format!("{} {}: {licence}", package.name, package.version)
        })
        .collect();
    if lines.is_empty() { Ok(()) } else { Err(Failure::new(lines.join("\n"))) }
}

/// Whether an SPDX expression can be satisfied from the list: AND binds tighter than OR.
fn allowed(expression: &str) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let tokens: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    any(&tokens, &mut at) && at == tokens.len()
}

fn any(tokens: &[&str], at: &mut usize) -> bool {
    let mut satisfied = all(tokens, at);
    while tokens.get(*at) == Some(&"OR") {
        *at += 1;
        satisfied |= all(tokens, at);
    }
    satisfied
}

fn all(tokens: &[&str], at: &mut usize) -> bool {
    let mut satisfied = one(tokens, at);
    while tokens.get(*at) == Some(&"AND") {
        *at += 1;
        satisfied &= one(tokens, at);
    }
    satisfied
}

fn one(tokens: &[&str], at: &mut usize) -> bool {
    let Some(token) = tokens.get(*at) else { return false };
    *at += 1;
    if *token == "(" {
        let inner = any(tokens, at);
        let closed = tokens.get(*at) == Some(&")");
        *at += 1;
        return inner && closed;
    }
    if tokens.get(*at) == Some(&"WITH") {
        let exception = tokens.get(*at + 1).copied().unwrap_or_default();
        *at += 2;
        return LICENCES.contains(&format!("{token} WITH {exception}").as_str());
    }
    LICENCES.contains(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spdx_expressions() {
        assert!(allowed("MIT OR Apache-2.0"));
        assert!(allowed("MIT/Apache-2.0"));
        assert!(allowed("(MIT OR GPL-3.0-only) AND Unicode-3.0"));
        assert!(allowed("Apache-2.0 WITH LLVM-exception OR GPL-2.0"));
        assert!(!allowed("GPL-2.0-only"));
        assert!(!allowed("MIT AND GPL-2.0-only"));
        assert!(!allowed("Apache-2.0 WITH Classpath-exception"));
        assert!(!allowed("(MIT"));
        assert!(!allowed(""));
    }

    #[test]
    fn the_workspace_keeps_its_arrows() {
        arrows().unwrap();
    }

    #[test]
    fn an_arrow_that_is_not_drawn_is_named() {
        let dependency = |name: &str| Dependency { name: name.into(), path: Some("/x".into()) };
        let package = Package {
            name: "paravane-devices".into(),
            version: "0".into(),
            license: None,
            dependencies: vec![dependency("paravane-memory"), dependency("paravane-cpu")],
        };
        assert_eq!(wrong_arrows(&package), ["paravane-devices -> paravane-cpu: not an allowed arrow"]);
    }
}

//! Debian packages: which one is the newest, its archive in the cache, its content unpacked.

use crate::host::{self, Context, Failure, Outcome};
use std::fs;
use std::path::{Path, PathBuf};

/// Debian 12's kernel series: package `linux-image-6.1.0-<ABI>-<flavour>`.
const SERIES: &str = "linux-image-6.1.0-";

/// The newest kernel package of a flavour (`cloud-amd64`, `amd64`), never `-unsigned`, `-rt` or `-dbg`.
pub fn newest_kernel(flavour: &str) -> Outcome<String> {
    let names = host::text(host::command("apt-cache").args(["pkgnames", SERIES]))?;
    newest(&names, flavour).ok_or_else(|| {
        Failure::new(format!(
            "no package {SERIES}*-{flavour} is known; run `apt-get update` on a Debian 12 host"
        ))
    })
}

fn newest(names: &str, flavour: &str) -> Option<String> {
    let suffix = format!("-{flavour}");
    let abi = |name: &str| name.strip_prefix(SERIES)?.strip_suffix(&suffix)?.parse::<u32>().ok();
    let (_, name) = names.lines().filter_map(|name| Some((abi(name)?, name))).max()?;
    Some(name.to_owned())
}

/// The package's archive: from the cache, or by `apt-get download`, which shows its progress.
pub fn archive(name: &str, cache: &Path, refresh: bool) -> Outcome<PathBuf> {
    fs::create_dir_all(cache).context(cache.display())?;
    if let Some(found) = cached(name, cache)?.filter(|_| !refresh) {
        return Ok(found);
    }
    println!("guests: downloading {name}");
    // The sandbox user could not write into a folder of ours, and says so at length.
    let mut apt = host::command("apt-get");
    host::run(apt.args(["-o", "APT::Sandbox::User=root", "download", name]).current_dir(cache))?;
    cached(name, cache)?.ok_or_else(|| Failure::new(format!("apt-get download {name} left no archive")))
}

/// The newest archive of this package in the cache.
fn cached(name: &str, cache: &Path) -> Outcome<Option<PathBuf>> {
    let prefix = format!("{name}_");
    let mut newest = None;
    for entry in fs::read_dir(cache).context(cache.display())? {
        let entry = entry.context(cache.display())?;
        let file = entry.file_name().to_string_lossy().into_owned();
        if !file.starts_with(&prefix) || !file.ends_with(".deb") {
            continue;
        }
        let age = entry.metadata().and_then(|metadata| metadata.modified()).context(&file)?;
        if newest.as_ref().is_none_or(|(best, _)| *best < age) {
            newest = Some((age, entry.path()));
        }
    }
    Ok(newest.map(|(_, path)| path))
}

/// The archive's content, unpacked once.
pub fn unpacked(archive: &Path, into: &Path) -> Outcome<PathBuf> {
    let name = archive.file_stem().unwrap_or_default();
    let folder = into.join(name);
    if folder.is_dir() {
        return Ok(folder);
    }
    println!("guests: unpacking {}", name.to_string_lossy());
    fs::create_dir_all(into).context(into.display())?;
    let partial = into.join(format!("partial.{}", std::process::id()));
    host::run(host::command("dpkg-deb").arg("-x").arg(archive).arg(&partial))?;
    fs::rename(&partial, &folder).context(folder.display())?;
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::newest;

    #[test]
    fn the_newest_signed_kernel_of_a_flavour() {
        let names = "linux-image-6.1.0-9-amd64\nlinux-image-6.1.0-10-cloud-amd64\nlinux-image-6.1.0-10-rt-amd64\n\
                     linux-image-6.1.0-10-amd64-unsigned\nlinux-image-6.1.0-10-amd64-dbg\nlinux-image-6.1.0-10-amd64\n";
        assert_eq!(newest(names, "amd64").as_deref(), Some("linux-image-6.1.0-10-amd64"));
        assert_eq!(newest(names, "cloud-amd64").as_deref(), Some("linux-image-6.1.0-10-cloud-amd64"));
        assert_eq!(newest("", "amd64"), None);
    }
}

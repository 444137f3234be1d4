//! `cargo xtask guests`: the guests that tests and benchmarks boot.
//!
//! Everything lands in `guests/`, which git ignores: the archives as downloaded, their content, and for each guest
//! a folder with its kernel and initrd. `guests/manifest.json` names them for the tests (see [`Manifest`]).

pub mod cpio;
mod initramfs;
mod modules;
mod packages;

pub use initramfs::compress;

use crate::host::{self, Context, Failure, Outcome};
use modules::Modules;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// What to do.
#[derive(clap::Args)]
pub struct Options {
    /// Only print the paths of what is there
    #[arg(long)]
    list: bool,
    /// Look for newer packages even if all guests are there
    #[arg(long)]
    refresh: bool,
}

/// `guests/manifest.json`: paths are relative to the folder that holds it.
#[derive(Serialize, Deserialize, Default)]
pub struct Manifest {
    /// By name: `cloud`, `amd64` (Debian 12 kernels with our initramfs), `installer-i386`
    pub guests: BTreeMap<String, Guest>,
    /// The static busybox that the images hold
    pub busybox: PathBuf,
}

/// A kernel and its initrd.
#[derive(Serialize, Deserialize, Clone)]
pub struct Guest {
    /// The bzImage
    pub kernel: PathBuf,
    /// The compressed initramfs
    pub initrd: PathBuf,
    /// The kernel's release, or the installer's version
    pub release: String,
    /// The Debian package that the kernel comes from
    pub package: String,
}

/// The Debian kernels that get our initramfs, and their package's flavour.
const KERNELS: &[(&str, &str)] = &[("cloud", "cloud-amd64"), ("amd64", "amd64")];
const INSTALLER: &str = "debian-installer-12-netboot-i386";
const INSTALLER_IMAGES: &str = "usr/lib/debian-installer/images/12/i386/text/debian-installer/i386";

/// Where the guests are.
pub fn folder() -> PathBuf {
    host::root().join("guests")
}

/// Brings the guests, or lists them.
pub fn run(options: &Options) -> Outcome<()> {
    if !options.list {
        bring(options.refresh)?;
    }
    let manifest = load().ok_or_else(|| Failure::new("no guests yet; run `cargo xtask guests`"))?;
    for (name, guest) in &manifest.guests {
        println!("{name:15} {:25} {}", guest.release, guest.package);
        println!("    kernel  {}", folder().join(&guest.kernel).display());
        println!("    initrd  {}", folder().join(&guest.initrd).display());
    }
    println!("busybox\n    program {}", folder().join(&manifest.busybox).display());
    Ok(())
}

/// The manifest, if there is one.
pub fn load() -> Option<Manifest> {
    serde_json::from_slice(&fs::read(folder().join("manifest.json")).ok()?).ok()
}

/// Downloads what is missing, builds the images anew (they hold our own programs), writes the manifest.
pub fn bring(refresh: bool) -> Outcome<Manifest> {
    let known = load().filter(|_| !refresh).unwrap_or_default();
    let busybox = package("busybox-static", refresh)?.join("bin/busybox");
    let diskbench = compile_diskbench()?;
    let mut manifest = Manifest { busybox: relative(&busybox), ..Manifest::default() };
    for (name, flavour) in KERNELS {
        let package = match known.guests.get(*name) {
            Some(guest) => guest.package.clone(),
            None => packages::newest_kernel(flavour)?,
        };
        manifest.guests.insert((*name).into(), kernel(name, &package, refresh, &busybox, &diskbench)?);
    }
    manifest.guests.insert("installer-i386".into(), installer(refresh)?);
    let json = serde_json::to_vec_pretty(&manifest).context("manifest")?;
    host::write(&folder().join("manifest.json"), &json)?;
    println!("guests: {} ready in {}", manifest.guests.len(), folder().display());
    Ok(manifest)
}

/// The content of a Debian package, brought if it is not there.
pub fn package(name: &str, refresh: bool) -> Outcome<PathBuf> {
    let archive = packages::archive(name, &folder().join("downloads"), refresh)?;
    packages::unpacked(&archive, &folder().join("unpacked"))
}

fn relative(path: &Path) -> PathBuf {
    path.strip_prefix(folder()).unwrap_or(path).to_path_buf()
}

fn compile_diskbench() -> Outcome<PathBuf> {
    let program = folder().join("diskbench");
    let source = host::root().join("tests/bench/diskbench.c");
    fs::create_dir_all(folder()).context(folder().display())?;
    let mut gcc = host::command("gcc");
    host::run(gcc.args(["-O2", "-Wall", "-Wextra", "-static", "-o"]).arg(&program).arg(&source))?;
    Ok(program)
}

fn kernel(name: &str, package_name: &str, refresh: bool, busybox: &Path, diskbench: &Path) -> Outcome<Guest> {
    let content = package(package_name, refresh)?;
    let release = package_name.trim_start_matches("linux-image-").to_owned();
    let modules = Modules::index(&content.join("lib/modules").join(&release))?;
    println!("guests: building the initramfs of {name} ({release})");
    let image = initramfs::compress(&initramfs::build(busybox, diskbench, &modules)?)?;
    let initrd = folder().join(name).join("initrd.gz");
    host::write(&initrd, &image)?;
    let kernel = content.join("boot").join(format!("vmlinuz-{release}"));
    Ok(Guest {
        kernel: relative(&placed(&kernel, name, "vmlinuz")?),
        initrd: relative(&initrd),
        release,
        package: package_name.to_owned(),
    })
}

fn installer(refresh: bool) -> Outcome<Guest> {
    let content = package(INSTALLER, refresh)?;
    let images = content.join(INSTALLER_IMAGES);
    let version = content.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(Guest {
        kernel: relative(&placed(&images.join("linux"), "installer-i386", "vmlinuz")?),
        initrd: relative(&placed(&images.join("initrd.gz"), "installer-i386", "initrd.gz")?),
        release: version.split('_').nth(1).unwrap_or("unknown").to_owned(),
        package: INSTALLER.to_owned(),
    })
}

/// The same file under a short, stable name in the guest's own folder.
fn placed(from: &Path, guest: &str, name: &str) -> Outcome<PathBuf> {
    let to = folder().join(guest).join(name);
    host::write(&to, &host::read(from)?)?;
    Ok(to)
}

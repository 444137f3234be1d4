//! The initramfs images: busybox, our `/init`, the disk benchmark and the kernel's own drivers.

use super::cpio::Archive;
use super::modules::Modules;
use crate::host::{self, Outcome};
use std::path::Path;

const INIT: &str = include_str!("init.sh");

/// Loaded at every boot, with what they depend on; those that a kernel has built in are left out.
const DEFAULT: &[&str] = &["virtio_pci", "virtio_blk", "virtio_rng", "ata_piix", "ahci", "sd_mod"];

/// Loaded on demand by `pv.modules=`. (ext4 asks the crypto API for crc32c, which `.modinfo` does not name.)
const EXTRA: &[(&str, &[&str])] =
    &[("ext4", &["crc32c_generic", "ext4"]), ("net", &["virtio_net", "e1000", "8139cp"])];

/// Builds the image for one kernel, not yet compressed.
pub fn build(busybox: &Path, diskbench: &Path, modules: &Modules) -> Outcome<Vec<u8>> {
    let mut archive = Archive::default();
    // The kernel opens /dev/console before /init can mount anything.
    archive.device("dev/console", 5, 1);
    for folder in ["proc", "sys", "tmp", "etc", "root"] {
        archive.folder(folder);
    }
    archive.file("init", true, INIT.as_bytes());
    add_busybox(&mut archive, busybox)?;
    archive.file("bin/diskbench", true, &host::read(diskbench)?);
    add_modules(&mut archive, modules)?;
    Ok(archive.finish())
}

fn add_busybox(archive: &mut Archive, busybox: &Path) -> Outcome<()> {
    archive.file("bin/busybox", true, &host::read(busybox)?);
    let applets = host::text(host::command(busybox).arg("--list"))?;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    Ok(())
}

fn add_modules(archive: &mut Archive, modules: &Modules) -> Outcome<()> {
    let default = modules.load_order(DEFAULT, &[])?;
    let mut stored: Vec<String> = Vec::new();
    let extra = EXTRA.iter().map(|(group, drivers)| Ok((*group, modules.load_order(drivers, &default)?)));
    let extra = extra.collect::<Outcome<Vec<_>>>()?;
    for (group, order) in std::iter::once(("default", default)).chain(extra) {
        let mut list = String::new();
        for module in order {
            list.push_str(&module.name);
            list.push('\n');
            if !stored.contains(&module.name) {
                archive.file(&format!("lib/modules/{}.ko", module.name), false, &module.object);
                stored.push(module.name);
            }
        }
        archive.file(&format!("lib/modules/{group}.order"), false, list.as_bytes());
    }
    Ok(())
}

/// gzip without name and time, so that equal input gives equal bytes.
pub fn compress(archive: &[u8]) -> Outcome<Vec<u8>> {
    host::filter(host::command("gzip").args(["-n", "-6"]), archive)
}

//! Kernel modules: which files a driver needs, in load order.
//!
//! A Debian package has no `modules.dep` (depmod writes it at installation), so the dependencies are read from
//! each module's own `.modinfo` section: zero-terminated `key=value` strings.

use crate::host::{self, Failure, Outcome};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The modules of one kernel package, by module name.
pub struct Modules(BTreeMap<String, PathBuf>);

/// A module that is ready to be put into an initramfs.
pub struct Module {
    /// Its name, with `_` for `-`
    pub name: String,
    /// The uncompressed object
    pub object: Vec<u8>,
}

impl Modules {
    /// Finds all modules under `lib/modules/RELEASE` of an unpacked package.
    pub fn index(folder: &Path) -> Outcome<Self> {
        let files = host::files_under(folder)?.into_iter();
        let named = files.filter_map(|path| Some((module_name(&path)?, path)));
        Ok(Self(named.collect()))
    }

    /// What must be loaded for these drivers, each after what it needs. A driver that is not a module of this
    /// kernel (built in, or not configured) is left out, and so is what `already` holds.
    pub fn load_order(&self, drivers: &[&str], already: &[Module]) -> Outcome<Vec<Module>> {
        let mut order = Vec::new();
        for driver in drivers {
            self.visit(driver, already, &mut order, 0)?;
        }
        Ok(order)
    }

    fn visit(&self, name: &str, already: &[Module], order: &mut Vec<Module>, depth: u32) -> Outcome<()> {
        let Some(path) = self.0.get(name) else { return Ok(()) };
        if order.iter().chain(already).any(|module| module.name == name) {
            return Ok(());
        }
        if depth > 32 {
            return Err(Failure::new(format!(
                "{}: modules depend on each other in a circle",
                path.display()
            )));
        }
        let object = load(path)?;
        for needed in dependencies(&object) {
            self.visit(&needed, already, order, depth + 1)?;
        }
        order.push(Module { name: name.to_owned(), object });
        Ok(())
    }
}

fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let stem = file.strip_suffix(".ko").or_else(|| file.strip_suffix(".ko.xz"))?;
    Some(stem.replace('-', "_"))
}

fn load(path: &Path) -> Outcome<Vec<u8>> {
    if path.extension().is_some_and(|extension| extension == "xz") {
        return host::output(host::command("xz").arg("-dc").arg(path));
    }
    host::read(path)
}

fn dependencies(object: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = object.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = object[at + KEY.len()..].split(|&byte| byte == 0).next().unwrap_or_default();
    let value = String::from_utf8_lossy(value);
    value.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_from_modinfo() {
        let object = b"\x7fELF..license=GPL\0depends=libata,scsi-mod\0retpoline=Y\0";
        assert_eq!(dependencies(object), ["libata", "scsi_mod"]);
        assert!(dependencies(b"license=GPL\0depends=\0name=x\0").is_empty());
        assert!(dependencies(b"").is_empty());
    }

    #[test]
    fn names_of_module_files() {
        assert_eq!(module_name(Path::new("/a/virtio-rng.ko")).as_deref(), Some("virtio_rng"));
        assert_eq!(module_name(Path::new("/a/ahci.ko.xz")).as_deref(), Some("ahci"));
        assert_eq!(module_name(Path::new("/a/modules.builtin")), None);
    }
}

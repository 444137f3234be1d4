//! What decides about a run beside its input, in words that can be compared and shown.

use super::record::{Identity, RecordError};
use crate::machine::{Boot, DiskBus, Machine, MachineConfig};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

/// The identity of `machine`, which was made by `config`. Every file is read once.
pub fn identity(machine: &Machine, config: &MachineConfig) -> Result<Identity, RecordError> {
    let mut identity = Identity::new();
    let mut add = |name: &str, value: String| drop(identity.insert(name.to_owned(), value));
    add("memory", config.memory.to_string());
    add("processor", format!("{}, {:016x}", config.model, machine.model_digest()));
    add("processors", config.cpus.to_string());
    add("serial ports", config.serial.len().to_string());
    add("debug-exit port", format!("{:?}", config.debug_exit));
    add("resets", if config.reboot { "start again" } else { "end the run" }.to_owned());
    match &config.boot {
        Boot::Kernel { kernel, initrd, append } => {
            add("kernel", file(kernel)?);
            if let Some(initrd) = initrd {
                add("initrd", file(initrd)?);
            }
            add("command line", append.clone());
        }
        Boot::Image { image, append } => {
            add("kernel", format!("{:032x}", xxh3_128(image)));
            add("command line", append.clone());
        }
    }
    for (n, disk) in config.disks.iter().enumerate() {
        let bus = match disk.bus {
            DiskBus::Ide => "ide",
            DiskBus::Virtio => "virtio",
        };
        let access = if disk.readonly { "read-only" } else { "writable" };
        add(&format!("disk {n}"), format!("{bus}, {access}, {}", file(&disk.file)?));
    }
    Ok(identity)
}

/// Length and hash.
fn file(path: &Path) -> Result<String, RecordError> {
    let host = |e| RecordError::Host(path.to_owned(), e);
    let mut file = File::open(path).map_err(host)?;
    let (mut hasher, mut len) = (Xxh3::new(), 0);
    let mut buf = vec![0; 1 << 20];
    loop {
        match file.read(&mut buf) {
            Ok(0) => return Ok(format!("{len} bytes, {:032x}", hasher.digest128())),
            Ok(n) => {
                hasher.update(&buf[..n]);
                len += n;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(host(e)),
        }
    }
}

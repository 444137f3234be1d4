//! The small languages inside option values: sizes, ports, disks, serial ports.

use super::{CliError, bad};
use crate::debug::GdbAddress;
use crate::machine::{DiskBus, DiskConfig, SerialConfig};
use std::path::PathBuf;

/// Serial ports of the PC.
const COM_PORTS: usize = 4;

/// `512M`, `2G`, `64K`, `1T`; a bare number is MiB.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
        Some(i) => text.split_at(i),
        None => (text, "M"),
    };
    let shift = match unit.to_ascii_uppercase().trim_end_matches('B').trim_end_matches('I') {
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(format!("'{text}' is no size: write for example 512M or 2G")),
    };
    let n: u64 = digits.parse().map_err(|_| format!("'{text}' is no size: write for example 512M or 2G"))?;
    n.checked_mul(1 << shift).ok_or_else(|| format!("'{text}' is too large for any machine"))
}

/// An I/O port number, decimal or 0x….
pub fn parse_port(text: &str) -> Result<u16, CliError> {
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u16::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| bad("--debug-exit", format!("'{text}' is no I/O port: write for example 0xf4")))
}

/// `HOST:PORT`, `:PORT` (this host only) or `unix=F`.
pub(super) fn parse_gdb(text: &str) -> Result<GdbAddress, CliError> {
    if let Some(path) = text.strip_prefix("unix=").filter(|p| !p.is_empty()) {
        return Ok(GdbAddress::Unix(PathBuf::from(path)));
    }
    match text.rsplit_once(':') {
        Some((host, port)) if port.parse::<u16>().is_ok() => {
            let host = if host.is_empty() { "127.0.0.1" } else { host };
            Ok(GdbAddress::Tcp(format!("{host}:{port}")))
        }
        _ => Err(bad(
            "--gdb",
            format!("'{text}' is no address: write for example 127.0.0.1:1234 or unix=/tmp/gdb"),
        )),
    }
}

/// The answer to a value that is either planned or unknown.
pub(super) fn not_yet(option: &'static str, value: &str, planned: &[&str]) -> CliError {
    let word = value.split([',', '=']).next().unwrap_or(value);
    if planned.contains(&word) {
        CliError::NotYet(format!("{option} {word}"))
    } else {
        bad(option, format!("'{value}' is none of none, {}", planned.join(", ")))
    }
}

/// Splits at single commas; two commas stand for one that belongs to the text.
fn split_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let doubled = c == ',' && chars.peek() == Some(&',');
        if doubled {
            chars.next();
        }
        match parts.last_mut() {
            Some(part) if c != ',' || doubled => part.push(c),
            _ => parts.push(String::new()),
        }
    }
    parts
}

fn on_off(key: &str, value: &str) -> Result<bool, CliError> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(bad("--disk", format!("{key}={value}: write on or off"))),
    }
}

/// `FILE[,bus=…][,format=…][,readonly=on][,snapshot=on]`.
pub(super) fn parse_disk(spec: &str) -> Result<DiskConfig, CliError> {
    let mut parts = split_commas(spec).into_iter();
    let file = parts.next().filter(|f| !f.is_empty()).ok_or_else(|| bad("--disk", "needs a file name"))?;
    let mut disk =
        DiskConfig { file: PathBuf::from(file), bus: DiskBus::Ide, readonly: false, snapshot: false };
    for part in parts {
        let (key, value) = part.split_once('=').ok_or_else(|| {
            bad("--disk", format!("'{part}' is no key=value (a comma in a name is written ',,')"))
        })?;
        match (key, value) {
            ("bus", "ide") => disk.bus = DiskBus::Ide,
            ("bus", "virtio") => disk.bus = DiskBus::Virtio,
            ("bus", "ahci" | "xen" | "hyperv" | "pvscsi") => {
                return Err(CliError::NotYet(format!("--disk bus={value}")));
            }
            ("bus", _) => return Err(bad("--disk", format!("bus={value} is none of ide, virtio"))),
            ("format", "raw") => {}
            ("format", "qcow2") => return Err(CliError::NotYet("--disk format=qcow2".into())),
            ("format", _) => return Err(bad("--disk", format!("format={value} is not raw"))),
            ("readonly", v) => disk.readonly = on_off("readonly", v)?,
            ("snapshot", v) => disk.snapshot = on_off("snapshot", v)?,
            _ => {
                return Err(bad(
                    "--disk",
                    format!("unknown key '{key}'; known: bus, format, readonly, snapshot"),
                ));
            }
        }
    }
    Ok(disk)
}

/// All `--serial` values; none given means COM1 on the terminal.
pub(super) fn parse_serials(specs: &[String]) -> Result<Vec<SerialConfig>, CliError> {
    if specs.is_empty() {
        return Ok(super::default_serial());
    }
    if specs.len() > COM_PORTS {
        return Err(bad(
            "--serial",
            format!("a PC has {COM_PORTS} serial ports, {} are asked for", specs.len()),
        ));
    }
    let serial = specs.iter().map(|s| parse_serial(s)).collect::<Result<Vec<_>, _>>()?;
    if serial.iter().filter(|s| **s == SerialConfig::Stdio).count() > 1 {
        return Err(bad("--serial", "stdio is given twice: there is one terminal"));
    }
    Ok(serial)
}

fn parse_serial(spec: &str) -> Result<SerialConfig, CliError> {
    match spec.split_once('=') {
        None if spec == "stdio" => Ok(SerialConfig::Stdio),
        None if spec == "none" => Ok(SerialConfig::None),
        Some(("file", f)) if !f.is_empty() => Ok(SerialConfig::File(f.into())),
        Some(("unix", f)) if !f.is_empty() => Ok(SerialConfig::Unix(f.into())),
        _ => Err(bad("--serial", format!("'{spec}' is none of stdio, file=F, unix=F, none"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [("512M", 512 << 20), ("2g", 2 << 30), ("64KiB", 64 << 10), ("512", 512 << 20)] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "M", "-1", "5x", "99999999999999T", "1.5G"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn disks() {
        let d = parse_disk("a,,b.img,bus=virtio,readonly=on,format=raw").expect("disk");
        assert_eq!(d.file, PathBuf::from("a,b.img"));
        assert!(d.bus == DiskBus::Virtio && d.readonly && !d.snapshot);
        assert_eq!(parse_disk("a").expect("disk").bus, DiskBus::Ide);
        assert_eq!(parse_disk("a,bus=ahci"), Err(CliError::NotYet("--disk bus=ahci".into())));
        for spec in ["", ",bus=ide", "a,bus", "a,bus=scsi", "a,readonly=yes", "a,colour=red"] {
            assert!(parse_disk(spec).is_err(), "{spec}");
        }
    }

    #[test]
    fn serial_ports() {
        assert_eq!(parse_serials(&[]), Ok(vec![SerialConfig::Stdio]));
        let both = ["none".to_owned(), "file=x".to_owned()];
        assert_eq!(parse_serials(&both), Ok(vec![SerialConfig::None, SerialConfig::File("x".into())]));
        for specs in [vec!["stdio", "stdio"], vec!["file="], vec!["pty"], vec!["none"; 5]] {
            let specs: Vec<String> = specs.into_iter().map(str::to_owned).collect();
            assert!(parse_serials(&specs).is_err(), "{specs:?}");
        }
    }

    #[test]
    fn ports() {
        assert_eq!(parse_port("0xf4"), Ok(0xF4));
        assert_eq!(parse_port("244"), Ok(244));
        assert!(parse_port("0x10000").is_err());
    }
}

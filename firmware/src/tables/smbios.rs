//! SMBIOS 3.0 (DMTF DSP0134 3.0): the 64-bit entry point and the structures that tools look for.

use super::{Config, checksum};

const MEMORY_ARRAY: u16 = 0x1000;
const UNKNOWN: u8 = 2;

/// One structure: formatted bytes after the header, then strings.
struct Structure<'a> {
    kind: u8,
    handle: u16,
    body: Vec<u8>,
    strings: &'a [&'a str],
}

impl Structure<'_> {
    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&[self.kind, self.body.len() as u8 + 4]);
        out.extend_from_slice(&self.handle.to_le_bytes());
        out.extend_from_slice(&self.body);
        for text in self.strings {
            out.extend_from_slice(text.as_bytes());
            out.push(0);
        }
        if self.strings.is_empty() {
            out.push(0);
        }
        out.push(0);
    }
}

/// Entry point at `base`, structures 32 bytes behind.
pub(super) fn build(config: &Config, base: u64) -> Vec<u8> {
    let mut structures = Vec::new();
    for s in [firmware(), system(), chassis()] {
        s.write(&mut structures);
    }
    for cpu in 0..config.cpus {
        processor(cpu).write(&mut structures);
    }
    for s in [memory_array(config.memory), memory_device(config.memory)] {
        s.write(&mut structures);
    }
    Structure { kind: 127, handle: 0x7F00, body: Vec::new(), strings: &[] }.write(&mut structures);
    let mut out = entry_point(base + 32, structures.len() as u32);
    out.resize(32, 0);
    out.extend_from_slice(&structures);
    out
}

/// 5.2.2.
fn entry_point(table: u64, size: u32) -> Vec<u8> {
    let mut p = b"_SM3_\0".to_vec();
    // Length, version 3.0.0, entry point revision 1, reserved.
    p.extend_from_slice(&[24, 3, 0, 0, 1, 0]);
    p.extend_from_slice(&size.to_le_bytes());
    p.extend_from_slice(&table.to_le_bytes());
    p[5] = checksum(&p);
    p
}

/// 7.1.
fn firmware() -> Structure<'static> {
    const CHARACTERISTICS_NOT_SUPPORTED: u64 = 1 << 3;
    const ACPI: u8 = 1 << 0;
    const VIRTUAL_MACHINE: u8 = 1 << 4;
    let mut body = vec![1, 2, 0x00, 0xE0, 3, 1];
    body.extend_from_slice(&CHARACTERISTICS_NOT_SUPPORTED.to_le_bytes());
    body.extend_from_slice(&[ACPI, VIRTUAL_MACHINE, 0, 1, 0xFF, 0xFF]);
    Structure { kind: 0, handle: 0, body, strings: &["paravane", env!("CARGO_PKG_VERSION"), "01/01/2026"] }
}

/// 7.2: a UUID of zeros means that there is none; woken by the power switch.
fn system() -> Structure<'static> {
    let mut body = vec![1, 2, 3, 0];
    body.extend_from_slice(&[0; 16]);
    body.extend_from_slice(&[6, 0, 0]);
    Structure { kind: 1, handle: 0x100, body, strings: &["paravane", "PC", env!("CARGO_PKG_VERSION")] }
}

/// 7.4: "other" chassis, all states safe.
fn chassis() -> Structure<'static> {
    let body = vec![1, 1, 0, 0, 0, 3, 3, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    Structure { kind: 3, handle: 0x300, body, strings: &["paravane"] }
}

/// 7.5: a central processor in its socket; CPUID tells the rest.
fn processor(number: u8) -> Structure<'static> {
    const POPULATED_ENABLED: u8 = 0x41;
    const NO_CACHE: [u8; 6] = [0xFF; 6];
    let mut body = vec![1, 3, UNKNOWN, 2];
    body.extend_from_slice(&[0; 8]);
    body.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, POPULATED_ENABLED, 1]);
    body.extend_from_slice(&NO_CACHE);
    body.extend_from_slice(&[0, 0, 0, 1, 1, 1, 4, 0]);
    body.extend_from_slice(&[UNKNOWN, 0, 1, 0, 1, 0, 1, 0]);
    Structure { kind: 4, handle: 0x400 | u16::from(number), body, strings: &["CPU", "paravane"] }
}

/// 7.17: system memory on the system board, no error correction.
fn memory_array(bytes: u64) -> Structure<'static> {
    let mut body = vec![3, 3, 3];
    body.extend_from_slice(&0x8000_0000u32.to_le_bytes());
    body.extend_from_slice(&[0xFE, 0xFF, 1, 0]);
    body.extend_from_slice(&bytes.to_le_bytes());
    Structure { kind: 16, handle: MEMORY_ARRAY, body, strings: &[] }
}

/// 7.18: one DIMM with everything; 0x7FFF refers to the extended size in MiB.
fn memory_device(bytes: u64) -> Structure<'static> {
    const EXTENDED: u64 = 0x7FFF;
    let mib = bytes >> 20;
    let mut body = MEMORY_ARRAY.to_le_bytes().to_vec();
    body.extend_from_slice(&[0xFE, 0xFF, 64, 0, 64, 0]);
    body.extend_from_slice(&(mib.min(EXTENDED) as u16).to_le_bytes());
    // DIMM, no set, locator 1, bank 0, RAM, no detail; speed unknown.
    body.extend_from_slice(&[9, 0, 1, 0, 7, 4, 0, 0, 0, 0, 0, 0, 0, 0]);
    let extended = if mib >= EXTENDED { (mib as u32) & 0x7FFF_FFFF } else { 0 };
    body.extend_from_slice(&extended.to_le_bytes());
    body.extend_from_slice(&[0; 8]);
    Structure { kind: 17, handle: 0x1100, body, strings: &["DIMM 0"] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_follow_each_other_to_the_end_marker() {
        let bytes = build(&Config { cpus: 2, memory: 64 << 30, com2: false }, 0xF_0000);
        assert_eq!(checksum(&bytes[..24]), 0);
        let size = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
        assert_eq!(bytes.len(), 32 + size);
        let (mut at, mut seen) = (32, Vec::new());
        while at < bytes.len() {
            seen.push((bytes[at], bytes[at + 1]));
            at += usize::from(bytes[at + 1]);
            at += bytes[at..].windows(2).position(|w| w == [0, 0]).unwrap() + 2;
        }
        // Lengths of version 3.0, tables of chapter 7.
        let want = [(0, 24), (1, 27), (3, 22), (4, 48), (4, 48), (16, 23), (17, 40), (127, 4)];
        assert_eq!(seen, want);
    }
}

use super::*;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::{env, fs};

const BASE: u64 = 0xE_0000;

fn config() -> Config {
    Config { cpus: 2, memory: 512 << 20, com2: true }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// The table at physical `at`.
fn table_at(area: &[u8], at: u64) -> &[u8] {
    let start = (at - BASE) as usize;
    &area[start..][..u32_at(area, start + 4) as usize]
}

/// What a reader finds from the root pointer, through the XSDT; the DSDT last.
fn found(area: &[u8]) -> Vec<&[u8]> {
    let xsdt = table_at(area, u64::from(u32_at(area, 24)));
    let mut tables: Vec<_> =
        (36..xsdt.len()).step_by(8).map(|i| table_at(area, u64::from(u32_at(xsdt, i)))).collect();
    tables.push(table_at(area, u64::from(u32_at(tables[0], 40))));
    tables
}

#[test]
fn every_table_is_found_and_sums_to_zero() {
    let area = build(&config(), BASE);
    assert_eq!(checksum(&area[..20]), 0, "ACPI 1.0 part of the root pointer");
    assert_eq!(checksum(&area[..36]), 0);
    let tables = found(&area);
    let names: Vec<_> = tables.iter().map(|t| &t[..4]).collect();
    assert_eq!(names, [b"FACP", b"APIC", b"HPET", b"DSDT"]);
    for t in tables {
        assert_eq!(checksum(t), 0, "{:?}", &t[..4]);
    }
    let rsdt = table_at(&area, u64::from(u32_at(&area, 16)));
    let xsdt = table_at(&area, u64::from(u32_at(&area, 24)));
    assert_eq!((checksum(rsdt), checksum(xsdt)), (0, 0));
    assert_eq!(rsdt.len() - 36, (xsdt.len() - 36) / 2);
    assert_eq!(u32_at(rsdt, 36), u32_at(xsdt, 36));
}

#[test]
fn facs_is_aligned_and_named_by_the_fadt() {
    let area = build(&config(), BASE);
    let facs = u64::from(u32_at(found(&area)[0], 36));
    assert_eq!(facs % 64, 0);
    assert_eq!(&area[(facs - BASE) as usize..][..4], b"FACS");
}

#[test]
fn fadt_fields_are_at_the_offsets_of_the_specification() {
    let area = build(&config(), BASE);
    let f = found(&area)[0];
    assert_eq!(f[46], 9, "SCI_INT");
    assert_eq!(u32_at(f, 48), 0xB2, "SMI_CMD");
    assert_eq!(f[52..54], [0xF1, 0xF0], "ACPI_ENABLE, ACPI_DISABLE");
    assert_eq!([56, 64, 76, 80].map(|at| u32_at(f, at)), [0x600, 0x604, 0x608, 0x60C]);
    assert_eq!(f[88..93], [4, 2, 0, 4, 4], "block lengths");
    assert_eq!(f[109], 3, "IAPC_BOOT_ARCH");
    assert_eq!(u32_at(f, 112) & 1 << 10, 1 << 10, "RESET_REG_SUP");
    assert_eq!(f[116..129], [1, 8, 0, 1, 0xF9, 0x0C, 0, 0, 0, 0, 0, 0, 6], "RESET_REG, RESET_VALUE");
}

#[test]
fn madt_lists_processors_io_apic_and_overrides() {
    let area = build(&config(), BASE);
    let m = found(&area)[1];
    let want = [
        &[0u8, 8, 0, 0, 1, 0, 0, 0][..],
        &[0, 8, 1, 1, 1, 0, 0, 0],
        &[1, 12, 2, 0, 0, 0, 0xC0, 0xFE, 0, 0, 0, 0],
        &[2, 10, 0, 0, 2, 0, 0, 0, 0, 0],
        &[2, 10, 0, 9, 9, 0, 0, 0, 0x0D, 0],
    ]
    .concat();
    assert_eq!(m[44..44 + want.len()], want);
}

/// Disassembles every table, and compiles the DSDT's text again, with ACPICA's `iasl`.
#[test]
fn acpica_understands_every_table() {
    if Command::new("iasl").arg("-v").output().is_err() {
        // Past the capture of passing tests.
        let _ = writeln!(
            std::io::stderr(),
            "NOT RUN: iasl (acpica-tools) is not installed, the ACPI tables were not checked by it"
        );
        return;
    }
    let dir = env::temp_dir().join(format!("paravane-acpi-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let area = build(&config(), BASE);
    let mut all = found(&area);
    all.push(&area[FACS_OFFSET as usize..][..64]);
    for t in all {
        let name = String::from_utf8_lossy(&t[..4]).to_lowercase();
        let file = dir.join(format!("{name}.dat"));
        fs::write(&file, t).unwrap();
        iasl(&["-d"], &file);
        if name == "dsdt" {
            iasl(&["-p", "again"], &dir.join("dsdt.dsl"));
        }
    }
    fs::remove_dir_all(&dir).unwrap();
}

fn iasl(arguments: &[&str], file: &Path) {
    let output =
        Command::new("iasl").args(arguments).arg(file).current_dir(file.parent().unwrap()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    let clean = |line: &&str| {
        let line = line.to_lowercase();
        let counts = line.contains("0 errors") || line.contains("0 warnings");
        !counts && ["error", "warning", "invalid", "incorrect", "failure"].iter().any(|w| line.contains(w))
    };
    let complaints: Vec<_> = text.lines().filter(clean).collect();
    assert!(complaints.is_empty(), "{}:\n{text}", file.display());
    if let Ok(dsl) = fs::read_to_string(file.with_extension("dsl")) {
        assert!(!dsl.contains("Incorrect checksum") && !dsl.contains("Invalid"), "{dsl}");
    }
}

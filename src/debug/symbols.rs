//! Names for addresses, from the symbol table of an ELF file (`--symbols`; System V ABI, chapter 4).

use std::fmt;
use std::path::Path;

/// Functions and labels by address.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Symbols(Vec<(u64, String)>);

/// Why a file has no symbols for us.
#[derive(Debug)]
pub enum SymbolError {
    /// It cannot be read.
    Io(std::io::Error),
    /// It is no ELF file, or its tables lie outside of it.
    NotElf,
    /// It was stripped.
    None,
}

impl fmt::Display for SymbolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SymbolError::Io(e) => write!(f, "{e}"),
            SymbolError::NotElf => f.write_str("not a whole ELF file"),
            SymbolError::None => f.write_str("it has no symbol table; take the file before it was stripped"),
        }
    }
}

impl std::error::Error for SymbolError {}

const SHT_SYMTAB: u64 = 2;
/// STT_SECTION, STT_FILE.
const NO_ADDRESS: [u8; 2] = [3, 4];

/// Little-endian fields of a file that nobody vouches for.
struct File<'a> {
    bytes: &'a [u8],
    wide: bool,
}

impl File<'_> {
    fn get(&self, at: u64, size: u64) -> Option<u64> {
        let at = usize::try_from(at).ok()?;
        let field = self.bytes.get(at..at.checked_add(size as usize)?)?;
        Some(field.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b)))
    }

    /// A field at `narrow` in 32-bit files, at `wide` in 64-bit ones; of address size.
    fn word(&self, base: u64, narrow: u64, wide: u64) -> Option<u64> {
        let (at, size) = if self.wide { (wide, 8) } else { (narrow, 4) };
        self.get(base.checked_add(at)?, size)
    }

    fn name(&self, at: u64) -> Option<String> {
        let rest = self.bytes.get(usize::try_from(at).ok()?..)?;
        let end = rest.iter().position(|&b| b == 0)?;
        Some(String::from_utf8_lossy(&rest[..end]).into_owned())
    }
}

impl Symbols {
    /// Reads the table of the ELF file at `path`.
    pub fn read(path: &Path) -> Result<Symbols, SymbolError> {
        Symbols::parse(&std::fs::read(path).map_err(SymbolError::Io)?)
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Symbols, SymbolError> {
        if !bytes.starts_with(b"\x7FELF") || bytes.get(5) != Some(&1) {
            return Err(SymbolError::NotElf);
        }
        let file = File { bytes, wide: bytes.get(4) == Some(&2) };
        let mut all = Symbols::tables(&file).ok_or(SymbolError::NotElf)?;
        if all.is_empty() {
            return Err(SymbolError::None);
        }
        all.sort();
        Ok(Symbols(all))
    }

    fn tables(file: &File<'_>) -> Option<Vec<(u64, String)>> {
        let sections = file.word(0, 0x20, 0x28)?;
        let (entry, count) = if file.wide {
            (file.get(0x3A, 2)?, file.get(0x3C, 2)?)
        } else {
            (file.get(0x2E, 2)?, file.get(0x30, 2)?)
        };
        let section = |n: u64| sections.checked_add(entry * n);
        let mut all = Vec::new();
        for n in 0..count {
            let at = section(n)?;
            if file.get(at.checked_add(4)?, 4)? != SHT_SYMTAB {
                continue;
            }
            let (first, len) = (file.word(at, 0x10, 0x18)?, file.word(at, 0x14, 0x20)?);
            let strings = section(file.get(at + if file.wide { 0x28 } else { 0x18 }, 4)?)?;
            let strings = file.word(strings, 0x10, 0x18)?;
            let size = if file.wide { 24 } else { 16 };
            if len > file.bytes.len() as u64 {
                return None;
            }
            for i in 0..len / size {
                let symbol = first.checked_add(i * size)?;
                let value = file.word(symbol, 4, 8)?;
                let (info, index) = if file.wide { (4, 6) } else { (12, 14) };
                let kind = file.get(symbol + info, 1)? as u8 & 0xF;
                let named = file.get(symbol, 4)?;
                if named == 0 || file.get(symbol + index, 2)? == 0 || NO_ADDRESS.contains(&kind) {
                    continue;
                }
                all.push((value, file.name(strings.checked_add(named)?)?));
            }
        }
        Some(all)
    }

    /// `name+0xoffset` for `at`.
    pub fn name(&self, at: u64) -> Option<String> {
        let i = self.0.partition_point(|s| s.0 <= at).checked_sub(1)?;
        // Several names for one address: the first is as good as any.
        let i = self.0.partition_point(|s| s.0 < self.0[i].0);
        let (start, name) = &self.0[i];
        let offset = at - start;
        // Far from any symbol is in none of them.
        match offset {
            0 => Some(name.clone()),
            1..0x10_0000 => Some(format!("{name}+{offset:#x}")),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lab_guest_has_names() {
        let symbols = Symbols::parse(paravane_firmware::lab::LAB_ELF).expect("symbols");
        let (start, _) = symbols.0.iter().find(|s| s.1 == "lab_start").expect("its entry");
        assert_eq!(symbols.name(start + 2).as_deref(), Some("lab_start+0x2"));
        assert_eq!(symbols.name(0), None);
        assert_eq!(symbols.name(u64::MAX), None);
    }

    #[test]
    fn files_cut_short_anywhere_are_refused_or_read() {
        let elf = paravane_firmware::lab::LAB_ELF;
        assert!(matches!(Symbols::parse(b"MZ"), Err(SymbolError::NotElf)));
        for len in (0..elf.len()).step_by(97) {
            let _no_panic = Symbols::parse(&elf[..len]);
        }
        let mut wild = elf.to_vec();
        for at in 0..64 {
            let old = std::mem::replace(&mut wild[at], 0xFF);
            let _no_panic = Symbols::parse(&wild);
            wild[at] = old;
        }
    }
}

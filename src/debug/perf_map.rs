//! Names of symbols for the translated code in a perf map (`--perf-map` with `--symbols`).

use super::symbols::Symbols;
use std::fs;
use std::io;
use std::path::Path;

/// Puts symbols before the addresses in the map at `path`.
pub fn name(path: &Path, symbols: &Symbols) -> io::Result<()> {
    let text = fs::read_to_string(path)?;
    fs::write(path, named(&text, symbols))
}

fn named(map: &str, symbols: &Symbols) -> String {
    let line = |line: &str| {
        let place = line.split_once('@').and_then(|(_, address)| u64::from_str_radix(address, 16).ok());
        match (place.and_then(|address| symbols.name(address)), line.rsplit_once(' ')) {
            (Some(symbol), Some((range, block))) => format!("{range} {symbol} {block}\n"),
            _ => format!("{line}\n"),
        }
    };
    map.lines().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_get_their_symbols_and_stubs_stay() {
        let symbols = Symbols::parse(paravane_firmware::lab::LAB_ELF).expect("symbols");
        let start = (0..u64::MAX).step_by(0x1000).find(|&at| symbols.name(at).is_some()).expect("an address");
        let name = symbols.name(start).expect("found above");
        let map = format!("7f00 20 paravane_exit\n7f20 30 guest_kernel@{start:x}\n7f50 30 guest_user@0\n");
        let wanted =
            format!("7f00 20 paravane_exit\n7f20 30 {name} guest_kernel@{start:x}\n7f50 30 guest_user@0\n");
        assert_eq!(named(&map, &symbols), wanted);
    }
}

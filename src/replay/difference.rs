//! What differs between two states of a machine, in words: parts, the fields in them, and pages of RAM.

use super::ram::Changed;
use super::record::Check;
use paravane_devices::Named;
use paravane_memory::PAGE_SIZE;
use std::collections::BTreeMap;

/// Names told of one part at most.
const TOLD: usize = 8;
/// Bytes of a field that is shown as a number at most.
const NUMBER: usize = 16;

/// The bytes of parts as they were recorded last, by name.
pub(super) type Recorded = BTreeMap<String, Vec<u8>>;

/// What is different in `found`, whose parts are `now`, from `expected`, whose parts are `then`.
pub(super) fn parts(expected: &Check, found: &Check, then: &Recorded, now: &[(String, Named)]) -> String {
    let differs = |name: &String| found.parts.get(name) != expected.parts.get(name);
    let mut told: Vec<String> = Vec::new();
    for (name, _) in expected.parts.iter().filter(|(name, _)| differs(name)) {
        let details = match (then.get(name), now.iter().find(|part| part.0 == *name)) {
            (Some(then), Some((_, now))) => fields(then, now),
            _ if name == "memory" => pages(&expected.pages, &found.pages),
            _ => Vec::new(),
        };
        told.push(if details.is_empty() { name.clone() } else { format!("{name} ({})", some(details)) });
    }
    if told.is_empty() { "nothing but the time".to_owned() } else { told.join("; ") }
}

/// The first of `all`, and how many more there are.
fn some(mut all: Vec<String>) -> String {
    let more = all.len().saturating_sub(TOLD);
    all.truncate(TOLD);
    if more > 0 {
        all.push(format!("{more} more"));
    }
    all.join(", ")
}

/// The fields of `now` that were others in the bytes `then`, with both values.
fn fields(then: &[u8], now: &Named) -> Vec<String> {
    let differ = now.fields.iter().filter_map(|(name, at)| {
        let (old, new) = (then.get(at.clone()), &now.bytes[at.clone()]);
        match old {
            Some(old) if old == new => None,
            Some(old) => Some(changed(name, old, new)),
            None => Some(format!("{name} is {}", number(new))),
        }
    });
    if then.len() == now.bytes.len() {
        differ.collect()
    } else {
        // A sequence has another length: what comes behind it lies elsewhere.
        let mut first: Vec<String> = differ.take(1).collect();
        first.push(format!("{} bytes were {}", now.bytes.len(), then.len()));
        first
    }
}

fn changed(name: &str, old: &[u8], new: &[u8]) -> String {
    if new.len() <= NUMBER {
        return format!("{name} was {}, is {}", number(old), number(new));
    }
    let at = old.iter().zip(new).position(|(a, b)| a != b).unwrap_or(0);
    format!("byte {at} of {name} was {:#x}, is {:#x}", old[at], new[at])
}

/// A little-endian number; bytes where it is too long for one.
fn number(bytes: &[u8]) -> String {
    if bytes.len() > NUMBER {
        return format!("{} bytes", bytes.len());
    }
    format!("{:#x}", bytes.iter().rev().fold(0u128, |v, &b| v << 8 | u128::from(b)))
}

/// Pages that changed in one run only, or to something else.
fn pages(expected: &[Changed], found: &[Changed]) -> Vec<String> {
    let [then, now]: [BTreeMap<u32, u32>; 2] = [expected, found].map(|list| list.iter().copied().collect());
    let mut all: Vec<u32> =
        then.keys().chain(now.keys()).copied().filter(|n| then.get(n) != now.get(n)).collect();
    all.sort_unstable();
    all.dedup();
    all.iter().map(|&n| format!("RAM page {:#x}", u64::from(n) * PAGE_SIZE)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::journal::Stamp;

    fn named(fields: &[(&str, &[u8])]) -> Named {
        let mut named = Named::default();
        for (name, bytes) in fields {
            let from = named.bytes.len();
            named.bytes.extend_from_slice(bytes);
            named.fields.push(((*name).to_owned(), from..named.bytes.len()));
        }
        named
    }

    #[test]
    fn fields_are_told_with_both_values() {
        let now = named(&[("rax", &[5, 1]), ("rip", &[9]), ("buffer", &[0; 20])]);
        assert_eq!(fields(&now.bytes, &now), [""; 0]);
        let mut then = now.bytes.clone();
        (then[0], then[3 + 7]) = (4, 3);
        assert_eq!(fields(&then, &now), ["rax was 0x104, is 0x105", "byte 7 of buffer was 0x3, is 0x0"]);
        then.pop();
        assert_eq!(fields(&then, &now), ["rax was 0x104, is 0x105", "23 bytes were 22"]);
    }

    #[test]
    fn parts_that_agree_are_not_named() {
        let check = |cpu: u64, ram: u64, pages: &[Changed]| {
            let digest = vec![("cpu0".to_owned(), cpu), ("pit".to_owned(), 7), ("memory".to_owned(), ram)];
            Check { pages: pages.to_vec(), ..Check::new(Stamp::default(), 0, &digest) }
        };
        let now = [("cpu0".to_owned(), named(&[("rax", &[5])]))];
        let then = Recorded::from([("cpu0".to_owned(), vec![4])]);
        let told = |a: &Check, b: &Check| parts(a, b, &then, &now);
        let one = check(1, 1, &[(7, 1), (8, 1)]);
        assert_eq!(told(&one, &check(2, 1, &[])), "cpu0 (rax was 0x4, is 0x5)");
        assert_eq!(
            told(&one, &check(1, 2, &[(7, 2), (8, 1), (9, 1)])),
            "memory (RAM page 0x7000, RAM page 0x9000)"
        );
        assert_eq!(told(&one, &one), "nothing but the time");
    }

    #[test]
    fn long_lists_are_cut() {
        let many: Vec<String> = (0..20).map(|n| n.to_string()).collect();
        assert_eq!(some(many), "0, 1, 2, 3, 4, 5, 6, 7, 12 more");
    }
}

//! `--stats F.json`: every counter at exit, by group and name.

use paravane_devices::Counters;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;

/// Counters by group and name.
pub type Snapshot = BTreeMap<String, BTreeMap<String, u64>>;

/// All counters now: the devices' registry, and `more` (the engine's, memory's, the host's) beside them.
pub fn snapshot(registry: &Counters, more: &[(String, Vec<(String, u64)>)]) -> Snapshot {
    let mut all = registry.snapshot();
    for (group, values) in more {
        let group = all.entry(group.clone()).or_default();
        for (name, value) in values {
            group.insert(name.clone(), *value);
        }
    }
    all
}

/// The sums of counters of the same name.
pub fn sums(all: impl Iterator<Item = Vec<(String, u64)>>) -> Vec<(String, u64)> {
    let mut sums = BTreeMap::<String, u64>::new();
    for (name, value) in all.flatten() {
        let sum = sums.entry(name).or_default();
        *sum = sum.saturating_add(value);
    }
    sums.into_iter().collect()
}

/// What was counted between two snapshots; gauges that fell count as zero.
pub fn difference(before: &Snapshot, after: &Snapshot) -> Snapshot {
    let earlier = |group: &str, name: &str| before.get(group).and_then(|g| g.get(name)).copied().unwrap_or(0);
    after
        .iter()
        .map(|(group, values)| {
            let values =
                values.iter().map(|(n, v)| (n.clone(), v.saturating_sub(earlier(group, n)))).collect();
            (group.clone(), values)
        })
        .collect()
}

/// Writes a snapshot as JSON, replacing the file.
pub fn write(path: &Path, all: &Snapshot) -> io::Result<()> {
    let mut text = serde_json::to_string_pretty(all)?;
    text.push('\n');
    std::fs::write(path, text)
}

/// CPU time of the whole process so far, in nanoseconds.
pub fn process_cpu_ns() -> u64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    (t.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(t.tv_nsec as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_by_name() {
        let one = |name: &str, value| vec![(String::from(name), value), ("same".into(), 1)];
        let sums = sums([one("a", 2), one("b", 3), one("a", u64::MAX)].into_iter());
        assert_eq!(sums, [("a".into(), u64::MAX), ("b".into(), 3), ("same".into(), 3)]);
    }

    #[test]
    fn difference_counts_what_is_new_and_never_wraps() {
        let one = |n, v| Snapshot::from([("g".to_owned(), BTreeMap::from([(String::from(n), v)]))]);
        assert_eq!(difference(&one("a", 3), &one("a", 10)), one("a", 7));
        assert_eq!(difference(&one("a", 10), &one("a", 3)), one("a", 0));
        assert_eq!(difference(&Snapshot::new(), &one("a", 3)), one("a", 3));
    }
}

//! The registry of everything that is counted.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// One counter; clones count into the same cell.
#[derive(Clone, Debug)]
pub struct Counter(Arc<AtomicU64>);

impl Counter {
    /// A counter nobody will read.
    pub fn detached() -> Counter {
        Counter(Arc::new(AtomicU64::new(0)))
    }

    /// Adds `n`.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// All counters by `group` (a device label, `cpu0`, `jit`, …) and name.
#[derive(Clone, Default, Debug)]
pub struct Counters(Arc<Mutex<BTreeMap<(String, String), Counter>>>);

impl Counters {
    /// The counter `group.name`, made at first use.
    pub fn counter(&self, group: &str, name: &str) -> Counter {
        let mut map = self.0.lock().expect("counter registry");
        map.entry((group.to_owned(), name.to_owned())).or_insert_with(Counter::detached).clone()
    }

    /// Every counter's value, sorted by group and name.
    pub fn snapshot(&self) -> BTreeMap<String, BTreeMap<String, u64>> {
        let mut all: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
        for ((group, name), counter) in self.0.lock().expect("counter registry").iter() {
            all.entry(group.clone()).or_default().insert(name.clone(), counter.get());
        }
        all
    }
}

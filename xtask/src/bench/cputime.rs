//! The CPU time of a whole process, read from outside (proc(5)).

use std::collections::BTreeMap;
use std::fs;

/// Follows one process. A thread that ends keeps what it had at the last look.
pub struct CpuTime {
    tasks: String,
    threads: BTreeMap<String, u64>,
}

impl CpuTime {
    /// For the process with this id.
    pub fn of(pid: u32) -> Self {
        Self { tasks: format!("/proc/{pid}/task"), threads: BTreeMap::new() }
    }

    /// Nanoseconds that all threads have run so far, in user and in system mode.
    ///
    /// `schedstat` counts nanoseconds where `stat` counts hundredths of a second; a kernel without it leaves
    /// `stat`. The value is exact for a thread that sleeps, as a vCPU does while its guest drains a mark.
    pub fn look(&mut self) -> u64 {
        for entry in fs::read_dir(&self.tasks).into_iter().flatten().flatten() {
            let path = entry.path();
            let scheduled =
                fs::read_to_string(path.join("schedstat")).ok().and_then(|text| first_number(&text));
            let ran = scheduled.filter(|ns| *ns > 0).or_else(|| {
                fs::read_to_string(path.join("stat"))
                    .ok()
                    .and_then(|text| ticks(&text))
                    .map(|ticks| ticks * 10_000_000)
            });
            if let Some(ran) = ran {
                self.threads.insert(entry.file_name().to_string_lossy().into_owned(), ran);
            }
        }
        self.threads.values().sum()
    }
}

fn first_number(text: &str) -> Option<u64> {
    text.split_whitespace().next()?.parse().ok()
}

/// utime + stime, fields 14 and 15; the name in field 2 may hold blanks and parentheses.
fn ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_proc_stat() {
        let stat = "77 (a (b) c) S 1 77 77 0 -1 4194304 100 0 0 0 12 34 0 0 20 0 1 0 5 0 0";
        assert_eq!(ticks(stat), Some(46));
        assert_eq!(first_number("496693055 71710 5\n"), Some(496_693_055));
    }

    #[test]
    fn our_own_time_grows() {
        let mut time = CpuTime::of(std::process::id());
        let before = time.look();
        let start = std::time::Instant::now();
        while start.elapsed().as_millis() < 60 {
            std::hint::spin_loop();
        }
        assert!(time.look() > before);
    }
}

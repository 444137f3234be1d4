//! The lab guest: a freestanding program (`firmware/lab/`) that drives IDE and virtio-blk disks by itself and reports what
//! it did. It is a PVH ELF; its command line is a list of [`Job`]s.
//!
//! Around every measured section it writes [`MARK_BEGIN`] and [`MARK_END`] to [`LAB_PORT`]; after each job comes one line
//! on COM1 ([`parse_report`]) and [`MARK_JOB`]; at the end [`MARK_DONE`] or [`MARK_FAILED`] and a power-off through
//! PM1a. Reads expect [`pattern`] under the job's seed on the disk; writes leave it there and are read back afterwards.

mod shared;

pub use shared::*;

/// The program: a 64-bit PVH ELF linked at 2 MiB, see [`crate::boot`].
pub const LAB_ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/lab.elf"));

impl Job {
    /// The job as the guest reads it.
    pub fn to_arg(&self) -> String {
        self.to_string()
    }
}

/// The command line for several jobs in one boot.
pub fn command_line(jobs: &[Job]) -> String {
    jobs.iter().map(Job::to_arg).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> Job {
        Job {
            bus: Bus::Virtio,
            index: 1,
            transfer: Transfer::Virtio,
            op: Op::RandWrite,
            size: 4096,
            depth: 32,
            count: 1000,
            seed: 7,
            start: 1 << 20,
            span: 64 << 20,
        }
    }

    #[test]
    fn jobs_survive_the_command_line() {
        let ide = Job { bus: Bus::Ide, transfer: Transfer::Dma, depth: 1, op: Op::SeqRead, ..job() };
        let line = command_line(&[job(), ide]);
        assert_eq!(jobs(&line).collect::<Vec<_>>(), [Ok(job()), Ok(ide)]);
    }

    #[test]
    fn contradictory_jobs_are_refused() {
        for text in [
            "device=ide0 mode=virtio op=seqread size=4096 count=1",
            "device=ide0 mode=dma op=seqread size=4096 count=1 depth=2",
            "device=virtio0 mode=virtio op=seqread size=100 count=1",
            "device=virtio0 mode=virtio op=seqread size=4096",
            "device=floppy0 mode=dma op=seqread size=4096 count=1",
            "device=virtio0 mode=virtio op=seqread size=4096 count=1 colour=red",
        ] {
            assert!(Job::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn reports_survive_the_serial_line() {
        let report = Report {
            job: 3,
            status: Status::Mismatch,
            ops: 1000,
            bytes: 4_096_000,
            errors: 0,
            mismatches: 1,
            interrupts: 900,
            cycles: u64::MAX,
            checksum: 0xDEAD,
        };
        assert_eq!(parse_report(&format!("{report}\r\n")), Some(report));
        assert_eq!(parse_report("lab: hello"), None);
        assert_eq!(parse_report(""), None);
    }

    #[test]
    fn offsets_stay_inside_the_span() {
        let job = job();
        let blocks = job.blocks(1 << 20);
        assert_eq!(blocks, 16384);
        for i in 0..10_000 {
            let at = job.lba(i, blocks) * SECTOR;
            assert!(at >= job.start && at + u64::from(job.size) <= job.start + job.span);
        }
        assert_eq!(Job { span: 0, ..job }.blocks(4096), 256, "limited by the disk");
        assert_eq!(job.blocks(2048), 0, "nothing left after start");
    }

    #[test]
    fn pattern_depends_on_sector_and_seed() {
        let make = |lba, seed| {
            let mut sector = [0; 512];
            pattern(lba, seed, &mut sector);
            sector
        };
        assert_ne!(make(1, 0), make(2, 0));
        assert_ne!(make(1, 0), make(1, 1));
        assert_eq!(make(1, 0)[8..16], pattern_word(1, 0, 1).to_le_bytes());
    }

    #[test]
    fn the_guest_is_a_pvh_kernel() {
        use crate::boot::{Format, NamedFile, detect};
        assert_eq!(detect(&NamedFile::new("lab.elf", LAB_ELF.to_vec())).ok(), Some(Format::Pvh));
    }
}

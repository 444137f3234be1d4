//! Points of a run that can be gone back to: the state of every part, and of RAM and disks what changed between two points.
//!
//! A page is kept once for each point at which it was different from the point before. Points are thinned out, the more the older they
//! are, so that a long run costs bounded memory, and going back far costs more execution.

use super::cpu::Processor;
use super::journal::Stamp;
use super::ram::{Changed, Page, Ram};
use super::state::{PartError, Parts, Sections};
use crate::machine::DiskUndo;
use paravane_memory::PAGE_SIZE;
use std::collections::HashMap;
use std::sync::Arc;

/// Bytes of pages and disk clusters that are kept.
const BUDGET: usize = 1 << 30;
/// The most points that are kept.
const POINTS: usize = 256;

struct Point {
    /// Its number: points are numbered as they are taken.
    id: u64,
    at: Stamp,
    sections: Sections,
    /// What disks held at the point before, where that was overwritten since.
    undo: Vec<DiskUndo>,
}

struct Version {
    /// The point from which on the page is so.
    since: u64,
    hash: u128,
    page: Arc<Page>,
}

/// See the module's documentation.
#[derive(Default)]
pub(super) struct History {
    points: Vec<Point>,
    /// Of each page that ever was not zero, the latest last.
    pages: HashMap<u32, Vec<Version>>,
    next_id: u64,
    kept: usize,
}

impl History {
    /// When points were taken, the oldest first.
    pub(super) fn stamps(&self) -> impl DoubleEndedIterator<Item = Stamp> + '_ {
        self.points.iter().map(|p| p.at)
    }

    /// The last point at or before `instructions`, or the oldest; `None` if there is none.
    pub(super) fn at_or_before(&self, instructions: u64) -> Option<usize> {
        let after = self.points.partition_point(|p| p.at.instructions <= instructions);
        (!self.points.is_empty()).then(|| after.saturating_sub(1))
    }

    /// The run is at `at`: takes a point, unless there is one. What changed in RAM since the last look.
    pub(super) fn take(
        &mut self,
        at: Stamp,
        processors: &[Processor],
        parts: &Parts,
        ram: &mut Ram,
    ) -> Result<Vec<Changed>, PartError> {
        let undo: Vec<DiskUndo> = parts.disks.iter().map(|disk| disk.take_undo()).collect();
        if self.points.last().is_some_and(|last| at <= last.at) {
            return Ok(ram.changes());
        }
        let sections = parts.save(processors)?;
        let id = self.next_id;
        self.next_id += 1;
        let mut changes = Vec::new();
        ram.look(|n, page, hash| {
            let version = Version { since: id, hash, page: Arc::new(*page) };
            self.pages.entry(n).or_default().push(version);
            self.kept += PAGE_SIZE as usize;
            changes.push((n, hash as u32));
        });
        self.kept += undo.iter().map(DiskUndo::bytes).sum::<usize>();
        self.points.push(Point { id, at, sections, undo });
        self.thin(at);
        Ok(changes)
    }

    /// Gives up points until what is left is within bounds.
    fn thin(&mut self, now: Stamp) {
        while self.points.len() > 2 && (self.kept > BUDGET || self.points.len() > POINTS) {
            // Of all points that have neighbours the one whose loss matters least for its age.
            let cost = |i: &usize| {
                let gap = self.points[i + 1].at.ns - self.points[i - 1].at.ns;
                let age = (now.ns - self.points[*i].at.ns).max(1);
                (u128::from(gap) << 32) / u128::from(age)
            };
            let Some(i) = (1..self.points.len() - 1).min_by_key(cost) else { return };
            self.remove(i);
        }
    }

    fn remove(&mut self, i: usize) {
        let gone = self.points.remove(i);
        let next = &mut self.points[i];
        let before: usize = next.undo.iter().chain(&gone.undo).map(DiskUndo::bytes).sum();
        next.undo.iter_mut().zip(gone.undo).for_each(|(undo, older)| undo.merge_older(older));
        self.kept -= before - next.undo.iter().map(DiskUndo::bytes).sum::<usize>();
        for versions in self.pages.values_mut() {
            let Some(v) = versions.iter().position(|v| v.since == gone.id) else { continue };
            if versions.get(v + 1).is_some_and(|after| after.since == next.id) {
                versions.remove(v);
                self.kept -= PAGE_SIZE as usize;
            } else {
                versions[v].since = next.id;
            }
        }
    }

    /// Puts everything into the state of point `i`; the run may not be before it.
    pub(super) fn restore(
        &mut self,
        i: usize,
        now: Stamp,
        processors: &mut [Processor],
        parts: &Parts,
        ram: &mut Ram,
    ) -> Result<Stamp, PartError> {
        parts.disks.iter().for_each(|disk| {
            disk.forget();
            disk.put_back(&disk.take_undo());
        });
        for point in self.points[i + 1..].iter().rev().filter(|p| p.at <= now) {
            parts.disks.iter().zip(&point.undo).for_each(|(disk, undo)| disk.put_back(undo));
        }
        let mut others = Vec::new();
        ram.look(|n, _, _| others.push(n));
        // What was zero at every point, and is not now.
        others.retain(|n| !self.pages.contains_key(n));
        others.into_iter().for_each(|n| ram.restore(n, &[0; PAGE_SIZE as usize]));
        let id = self.points[i].id;
        for (&n, versions) in &self.pages {
            match versions[..versions.partition_point(|v| v.since <= id)].last() {
                Some(v) if ram.is(n, v.hash) => {}
                Some(v) => ram.restore(n, &v.page),
                None => ram.restore(n, &[0; PAGE_SIZE as usize]),
            }
        }
        let point = &self.points[i];
        parts.load(processors, &point.sections)?;
        ram.look(|_, _, _| ());
        Ok(point.at)
    }

    /// The run was changed at `now`: nothing before it can be gone back to any more, and nothing behind it happened.
    pub(super) fn restart(&mut self, now: Stamp) {
        let last = self.points.iter().rev().find(|p| p.at <= now).map(|p| p.id);
        for versions in self.pages.values_mut() {
            versions.retain(|v| Some(v.since) <= last);
            // What is as it was at the last point is so at the next.
            versions.drain(..versions.len().saturating_sub(1));
            versions.iter_mut().for_each(|v| v.since = self.next_id);
        }
        self.pages.retain(|_, versions| !versions.is_empty());
        self.points.clear();
        self.kept = self.pages.len() * PAGE_SIZE as usize;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::{
        Boot, ClockKind, DiskBus, DiskConfig, EngineKind, HostEnds, LockstepDisk, Machine, MachineConfig,
    };
    use crate::run::{Lifecycle, VcpuRunner};
    use paravane_devices::block::{BlockBackend, BlockData, BlockError, BlockOp, BlockRequest, Completion};
    use paravane_memory::PhysAddr;
    use std::sync::Mutex;

    /// Pages and places on the disk that are written in turn.
    const PAGES: u64 = 7;
    const PLACES: u64 = 5;
    const RAM_AT: u64 = 2 << 20;
    const APART: u64 = 64 << 10;

    fn machine() -> Machine {
        let here = std::env::temp_dir();
        let name = |what: &str| here.join(format!("paravane-history-{}-{what}", std::process::id()));
        let (kernel, disk) = (name("kernel"), name("disk"));
        let mut sector = vec![0; 510];
        sector.extend([0x55, 0xAA]);
        std::fs::write(&kernel, sector).expect("kernel");
        std::fs::write(&disk, vec![0; 1 << 20]).expect("disk");
        let config = MachineConfig {
            memory: 16 << 20,
            cpus: 1,
            model: "max".into(),
            engine: EngineKind::Interp,
            windows: crate::machine::WindowUse::Auto,
            clock: ClockKind::Instructions,
            boot: Boot::Kernel { kernel: kernel.clone(), initrd: None, append: String::new() },
            disks: vec![DiskConfig {
                file: disk.clone(),
                bus: DiskBus::Ide,
                readonly: false,
                snapshot: true,
            }],
            serial: Vec::new(),
            debug_exit: None,
            reboot: false,
        };
        let ends = HostEnds {
            serial: Vec::new(),
            lab_port: None,
            count_instructions: true,
            single_blocks: false,
            debug_console: Box::new(|_| ()),
        };
        let machine = Machine::new(&config, Lifecycle::new(), ends).expect("machine");
        [kernel, disk].into_iter().for_each(|file| std::fs::remove_file(file).expect("file"));
        machine
    }

    #[derive(Default)]
    struct Done(Mutex<Vec<u8>>);

    impl Completion for Done {
        fn complete(&self, request: BlockRequest, result: Result<(), BlockError>) {
            result.expect("done");
            *self.0.lock().expect("buffer") = request.buffer;
        }
    }

    /// Eight bytes at the place `n`, written or read.
    fn disk(disk: &LockstepDisk, op: BlockOp, n: u64, value: u64) -> u64 {
        let done = Arc::new(Done::default());
        let mut request = BlockRequest::new(op, 0, Arc::clone(&done) as Arc<dyn Completion>);
        let mut sector = vec![0; 512];
        sector[..8].copy_from_slice(&value.to_le_bytes());
        (request.data, request.offset, request.buffer) = (BlockData::Owned, n * APART, sector);
        disk.submit(request);
        disk.settle();
        let buffer = done.0.lock().expect("buffer");
        u64::from_le_bytes(buffer[..8].try_into().expect("eight bytes"))
    }

    /// The last of 1, 2, ... `now` that has remainder `n` by `of`; zero if none has.
    fn last(now: u64, n: u64, of: u64) -> u64 {
        (1..=now).rev().find(|k| k % of == n).unwrap_or(0)
    }

    #[test]
    fn points_that_thinning_leaves_hold_what_was() {
        const TAKEN: u64 = 3 * POINTS as u64;
        let machine = machine();
        let runners = VcpuRunner::all(&machine).expect("started");
        let (mut cpus, parts) = (vec![Processor::of(&runners[0])], machine.parts().expect("parts"));
        let (mem, image) = (machine.memory(), Arc::clone(&parts.disks[0]));
        image.keep_undo();
        let (mut ram, mut history) = (Ram::new(mem), History::default());
        for k in 1..=TAKEN {
            mem.write(PhysAddr(RAM_AT + k % PAGES * PAGE_SIZE), &k.to_le_bytes()).expect("RAM");
            disk(&image, BlockOp::Write, k % PLACES, k);
            let at = Stamp { ns: k * 1000, instructions: k };
            history.take(at, &cpus, &parts, &mut ram).expect("a point");
        }
        let kept: Vec<Stamp> = history.stamps().collect();
        assert_eq!(kept.len(), POINTS);
        assert_eq!((kept[0].instructions, kept[POINTS - 1].instructions), (1, TAKEN));
        // The later, the closer together.
        let gap = |i: usize| kept[i + 1].instructions - kept[i].instructions;
        assert!(gap(0) > 4 * gap(POINTS - 2), "{kept:?}");
        let mut now = kept[POINTS - 1];
        for i in (0..POINTS).rev() {
            now = history.restore(i, now, &mut cpus, &parts, &mut ram).expect("back");
            assert_eq!(now, kept[i]);
            for n in 0..PAGES {
                let page = mem.read_u64(PhysAddr(RAM_AT + n * PAGE_SIZE));
                assert_eq!(page, Ok(last(now.instructions, n, PAGES)), "page {n} at {now:?}");
            }
            for n in 0..PLACES {
                let place = disk(&image, BlockOp::Read, n, 0);
                assert_eq!(place, last(now.instructions, n, PLACES), "place {n} at {now:?}");
            }
        }
    }
}

//! The stub's operations in terms of the machine: every one is a command run by a vCPU's own thread.

use super::armed::{Armed, Owner};
use super::link::{Gone, Link, Resume, Stop};
use super::registers::{self, REGISTERS, TARGET_XML, Written};
use super::{memory, monitor, show};
use crate::machine::Inspector;
use crate::run::{BOOT_VP, VcpuRunner};
use gdbstub::arch::{Arch, RegId, Registers};
use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadRangeStepping, MultiThreadRangeSteppingOps, MultiThreadResume,
    MultiThreadResumeOps, MultiThreadSchedulerLocking, MultiThreadSchedulerLockingOps, MultiThreadSingleStep,
    MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::reverse_exec::{
    ReplayLogPosition, ReverseCont, ReverseContOps, ReverseStep, ReverseStepOps,
};
use gdbstub::target::ext::base::single_register_access::{SingleRegisterAccess, SingleRegisterAccessOps};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint,
    SwBreakpointOps, WatchKind as GdbKind,
};
use gdbstub::target::ext::memory_map::{MemoryMap, MemoryMapOps};
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target as GdbTarget, TargetError, TargetResult};
use paravane_cpu::{CpuBus, Space, WatchHit, WatchKind, Watchpoint};
use paravane_memory::VpIndex;
use std::num::NonZeroUsize;
use std::sync::Arc;

/// What the debugger is told of a stop.
pub(super) type Reason = MultiThreadStopReason<u64>;

/// EFAULT, EIO.
const NO_MEMORY: u8 = 14;
const IO_ERROR: u8 = 5;
/// EINVAL.
const INVALID: u8 = 22;

/// A 64-bit PC: the architecture never changes, whatever mode the guest is in.
#[derive(Debug)]
pub(super) enum Pc64 {}

/// The whole register file as bytes.
#[derive(Clone, PartialEq, Debug)]
pub(super) struct File(Vec<u8>);

/// A register by number.
#[derive(Clone, Copy, Debug)]
pub(super) struct Number(usize);

impl Default for File {
    fn default() -> File {
        File(vec![0; registers::file_size()])
    }
}

impl Registers for File {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        0
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        self.0.iter().for_each(|b| write_byte(Some(*b)));
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        if bytes.len() != registers::file_size() {
            return Err(());
        }
        self.0 = bytes.to_vec();
        Ok(())
    }
}

impl RegId for Number {
    fn from_raw_id(id: usize) -> Option<(Number, Option<NonZeroUsize>)> {
        Some((Number(id), NonZeroUsize::new(REGISTERS.get(id)?.size)))
    }
}

impl Arch for Pc64 {
    type Usize = u64;
    type Registers = File;
    type BreakpointKind = usize;
    type RegId = Number;

    fn target_description_xml() -> Option<&'static str> {
        Some(&TARGET_XML)
    }
}

/// What a session operates on.
pub(super) struct Target {
    link: Arc<Link>,
    pub(super) inspector: Arc<Inspector>,
    armed: Armed,
    /// What the debugger said of single vCPUs.
    resume: Vec<Option<Resume>>,
    /// Those it said nothing of stay where they are.
    locked: bool,
    /// The vCPU that stopped last, or that the debugger chose since: whom the monitor speaks of.
    pub(super) current: VpIndex,
    /// Why the guest stands still.
    pub(super) stop: Option<Stop>,
    /// Memory reads and writes are physical.
    pub(super) physical: bool,
    /// Steps let interrupts in.
    pub(super) step_interrupts: bool,
    /// What ran can be gone back in.
    goes_back: bool,
}

impl Target {
    pub(super) fn new(link: Arc<Link>, inspector: Arc<Inspector>) -> Target {
        Target {
            resume: vec![None; link.vcpus()],
            locked: false,
            current: BOOT_VP,
            link,
            inspector,
            armed: Armed::default(),
            stop: None,
            physical: false,
            step_interrupts: false,
            goes_back: false,
        }
    }

    pub(super) fn armed(&self) -> &Armed {
        &self.armed
    }

    pub(super) fn armed_mut(&mut self) -> &mut Armed {
        &mut self.armed
    }

    pub(super) fn stopped(&mut self, vp: VpIndex, stop: &Stop) {
        self.current = vp;
        self.goes_back = self.ask(|runner| runner.goes_back()).unwrap_or(false);
        self.stop = Some(stop.clone());
    }

    /// The debugger chooses a thread for what follows by `Hg`, which the stub keeps to itself.
    pub(super) fn follow_selection(&mut self, packet: &[u8]) {
        let Some(thread) = packet.strip_prefix(b"$Hg") else { return };
        let thread = thread.split(|&b| b == b'#').next().unwrap_or_default();
        let thread = thread.rsplit(|&b| b == b'.').next().unwrap_or_default();
        let thread = std::str::from_utf8(thread).ok().and_then(|text| usize::from_str_radix(text, 16).ok());
        if let Some(vp) = thread.and_then(NonZeroUsize::new).and_then(|tid| self.vcpu(tid)) {
            self.current = vp;
        }
    }

    /// All vCPUs.
    pub(super) fn vcpus(&self) -> impl Iterator<Item = VpIndex> + use<> {
        (0..self.link.vcpus() as u32).map(VpIndex)
    }

    /// The vCPU that is thread `tid`.
    fn vcpu(&self, tid: Tid) -> Option<VpIndex> {
        self.vcpus().find(|vp| thread(*vp) == tid)
    }

    /// Runs `f` on the current vCPU's thread.
    pub(super) fn ask<R: Send + 'static>(
        &self,
        f: impl FnOnce(&mut VcpuRunner) -> R + Send + 'static,
    ) -> Result<R, Gone> {
        self.link.ask(self.current, f)
    }

    /// Runs `f` on the thread of `vp`.
    pub(super) fn ask_vcpu<R: Send + 'static>(
        &self,
        vp: VpIndex,
        f: impl FnOnce(&mut VcpuRunner) -> R + Send + 'static,
    ) -> Result<R, Gone> {
        self.link.ask(vp, f)
    }

    /// Runs `f` on the vCPU that the debugger knows as `tid`.
    fn ask_thread<R: Send + 'static>(
        &self,
        tid: Tid,
        f: impl FnOnce(&mut VcpuRunner) -> R + Send + 'static,
    ) -> TargetResult<R, Target> {
        let vp = self.vcpu(tid).ok_or(TargetError::Errno(INVALID))?;
        self.link.ask(vp, f).map_err(gone)
    }

    fn set_resume(&mut self, tid: Tid, resume: Resume) -> Result<(), &'static str> {
        let vp = self.vcpu(tid).ok_or("there is no such vCPU")?;
        self.resume[vp.0 as usize] = Some(resume);
        Ok(())
    }
}

/// `vp` as a thread.
fn thread(vp: VpIndex) -> Tid {
    NonZeroUsize::MIN.saturating_add(vp.0 as usize)
}

/// The stop of `vp` as the protocol has it. A breakpoint or watchpoint that the debugger did not set itself is a plain trap: it would
/// take it for one it has removed, and go on.
pub(super) fn reason(vp: VpIndex, stop: &Stop, armed: &Armed) -> Reason {
    let tid = thread(vp);
    let trap = Reason::SignalWithThread { tid, signal: Signal::SIGTRAP };
    match stop {
        Stop::Paused => Reason::SignalWithThread { tid, signal: Signal::SIGINT },
        Stop::Stepped | Stop::Breakpoint(_, Owner::Monitor(_)) => trap,
        Stop::Breakpoint(_, Owner::Software) => Reason::SwBreak(tid),
        Stop::Breakpoint(_, Owner::Hardware) => Reason::HwBreak(tid),
        Stop::Watch(hit) => match armed.debuggers(hit) {
            Some(kind) => Reason::Watch { tid, kind: gdb_kind(kind), addr: hit.at },
            None => trap,
        },
        Stop::TripleFault(_) => Reason::SignalWithThread { tid, signal: Signal::SIGSEGV },
        Stop::Beginning => Reason::ReplayLog { tid: Some(tid), pos: ReplayLogPosition::Begin },
        Stop::End(_) => Reason::ReplayLog { tid: Some(tid), pos: ReplayLogPosition::End },
    }
}

/// What the debugger's console shows of a stop that the protocol has no words for.
pub(super) fn told(stop: &Stop, armed: &Armed, inspector: &Inspector) -> Option<String> {
    match stop {
        Stop::Watch(hit) if hit.device.is_some() => Some(format!("{}\n", accessed(hit, inspector))),
        Stop::Breakpoint(at, Owner::Monitor(number)) => Some(format!("monitor breakpoint {number} at {at}\n")),
        Stop::Watch(hit) if armed.debuggers(hit).is_none() => {
            let number = armed.watches.iter().find(|w| w.watch == hit.watch).map_or(0, |w| w.number);
            Some(format!("monitor watchpoint {number}: {}\n", accessed(hit, inspector)))
        }
        Stop::TripleFault(_) => Some(
            "triple fault: the processor shut down and is kept as it was; 'monitor why' tells how it came to it\n".into(),
        ),
        _ => None,
    }
}

/// A watched access in words.
pub(super) fn accessed(hit: &WatchHit, inspector: &Inspector) -> String {
    let what = if hit.write { "write to" } else { "read of" };
    let by = hit.device.map_or(String::new(), |n| format!(" by {} (DMA)", inspector.dma().device(n)));
    format!("{what} {} {:#x}{by}", hit.watch.space, hit.at)
}

fn gdb_kind(kind: WatchKind) -> GdbKind {
    match kind {
        WatchKind::Read => GdbKind::Read,
        WatchKind::Write => GdbKind::Write,
        WatchKind::Access => GdbKind::ReadWrite,
    }
}

fn watchpoint(first: u64, len: u64, kind: GdbKind) -> Watchpoint {
    let kind = match kind {
        GdbKind::Read => WatchKind::Read,
        GdbKind::Write => WatchKind::Write,
        GdbKind::ReadWrite => WatchKind::Access,
    };
    Watchpoint { space: Space::Linear, first, len, kind }
}

fn gone<E>(_: Gone) -> TargetError<E> {
    TargetError::Errno(IO_ERROR)
}

/// Writes a register and does what follows from it; false if it is refused.
fn write_register(runner: &mut VcpuRunner, n: usize, bytes: &[u8]) -> bool {
    if !runner.change() {
        return false;
    }
    match registers::set(&mut runner.cpu, n, bytes) {
        Written::Done => true,
        Written::Paging => {
            runner.engine.flush_translations();
            true
        }
        Written::Cr8(v) => {
            runner.bus.write_cr8(runner.vp, v);
            true
        }
        Written::Refused => false,
    }
}

/// All registers, one after the other.
fn whole_file(runner: &VcpuRunner) -> Vec<u8> {
    let cr8 = runner.bus.read_cr8(runner.vp);
    (0..REGISTERS.len()).flat_map(|n| registers::get(&runner.cpu, cr8, n)).collect()
}

impl GdbTarget for Target {
    type Arch = Pc64;
    type Error = &'static str;

    fn base_ops(&mut self) -> BaseOps<'_, Pc64, &'static str> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }

    fn support_memory_map(&mut self) -> Option<MemoryMapOps<'_, Self>> {
        Some(self)
    }

    /// Breakpoints are in no memory that the stub could write.
    fn guard_rail_implicit_sw_breakpoints(&self) -> bool {
        true
    }
}

impl MultiThreadBase for Target {
    fn read_registers(&mut self, regs: &mut File, tid: Tid) -> TargetResult<(), Self> {
        regs.0 = self.ask_thread(tid, |runner| whole_file(runner))?;
        Ok(())
    }

    /// What did not change is not written; what cannot be written and did change makes the whole an error.
    fn write_registers(&mut self, regs: &File, tid: Tid) -> TargetResult<(), Self> {
        let new = regs.0.clone();
        let written = self.ask_thread(tid, move |runner| {
            let old = whole_file(runner);
            let mut at = 0;
            let mut all = true;
            for (n, r) in REGISTERS.iter().enumerate() {
                let part = at..at + r.size;
                at += r.size;
                if old.get(part.clone()) != new.get(part.clone()) {
                    all &= new.get(part).is_some_and(|bytes| write_register(runner, n, bytes));
                }
            }
            all
        });
        if written? { Ok(()) } else { Err(TargetError::Errno(INVALID)) }
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let (len, physical) = (data.len(), self.physical);
        let read = self.ask_thread(tid, move |runner| {
            let mut buf = vec![0; len];
            let n = memory::read(&runner.cpu, &runner.mem, start, &mut buf, physical);
            buf.truncate(n);
            buf
        });
        let read = read?;
        if read.is_empty() && len > 0 {
            return Err(TargetError::Errno(NO_MEMORY));
        }
        data[..read.len()].copy_from_slice(&read);
        Ok(read.len())
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let (data, physical) = (data.to_vec(), self.physical);
        let written = self.ask_thread(tid, move |runner| {
            runner.change() && memory::write(&runner.cpu, &runner.mem, start, &data, physical)
        });
        if written? { Ok(()) } else { Err(TargetError::Errno(NO_MEMORY)) }
    }

    fn list_active_threads(&mut self, active: &mut dyn FnMut(Tid)) -> Result<(), &'static str> {
        self.vcpus().map(thread).for_each(active);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl ThreadExtraInfo for Target {
    fn thread_extra_info(&self, tid: Tid, buf: &mut [u8]) -> Result<usize, &'static str> {
        let text = self.ask_thread(tid, |runner| show::vcpu(runner)).unwrap_or_else(|_| "gone".into());
        let n = text.len().min(buf.len());
        buf[..n].copy_from_slice(&text.as_bytes()[..n]);
        Ok(n)
    }
}

impl SingleRegisterAccess<Tid> for Target {
    fn read_register(&mut self, tid: Tid, number: Number, buf: &mut [u8]) -> TargetResult<usize, Self> {
        let n = number.0;
        let bytes = self.ask_thread(tid, move |r| registers::get(&r.cpu, r.bus.read_cr8(r.vp), n))?;
        let to = buf.get_mut(..bytes.len()).ok_or(TargetError::Errno(INVALID))?;
        to.copy_from_slice(&bytes);
        Ok(bytes.len())
    }

    fn write_register(&mut self, tid: Tid, number: Number, val: &[u8]) -> TargetResult<(), Self> {
        let bytes = val.to_vec();
        let written = self.ask_thread(tid, move |runner| write_register(runner, number.0, &bytes));
        if written? { Ok(()) } else { Err(TargetError::Errno(INVALID)) }
    }
}

impl MultiThreadResume for Target {
    fn resume(&mut self) -> Result<(), &'static str> {
        self.stop = None;
        let others = (!self.locked).then_some(Resume::Continue);
        let resume: Vec<_> = self.resume.iter().map(|r| r.or(others)).collect();
        self.link.go(&Arc::new(self.armed.clone()), &resume);
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), &'static str> {
        self.resume.fill(None);
        self.locked = false;
        Ok(())
    }

    /// Signals mean nothing to a machine.
    fn set_resume_action_continue(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), &'static str> {
        self.set_resume(tid, Resume::Continue)
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_range_step(&mut self) -> Option<MultiThreadRangeSteppingOps<'_, Self>> {
        Some(self)
    }

    fn support_reverse_step(&mut self) -> Option<ReverseStepOps<'_, Tid, Self>> {
        if self.goes_back { Some(self) } else { None }
    }

    fn support_reverse_cont(&mut self) -> Option<ReverseContOps<'_, Tid, Self>> {
        if self.goes_back { Some(self) } else { None }
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Target {
    fn set_resume_action_step(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), &'static str> {
        self.set_resume_action_range_step(tid, 0, 0)
    }
}

impl MultiThreadRangeStepping for Target {
    fn set_resume_action_range_step(&mut self, tid: Tid, start: u64, end: u64) -> Result<(), &'static str> {
        self.set_resume(tid, Resume::Step { start, end, interrupts: self.step_interrupts })
    }
}

impl ReverseCont<Tid> for Target {
    fn reverse_cont(&mut self) -> Result<(), &'static str> {
        self.set_resume(thread(BOOT_VP), Resume::ReverseContinue)?;
        self.resume()
    }
}

impl ReverseStep<Tid> for Target {
    fn reverse_step(&mut self, tid: Tid) -> Result<(), &'static str> {
        self.set_resume(tid, Resume::ReverseStep)?;
        self.resume()
    }
}

impl MultiThreadSchedulerLocking for Target {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), &'static str> {
        self.locked = true;
        Ok(())
    }
}

impl Breakpoints for Target {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Target {
    fn add_sw_breakpoint(&mut self, at: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.armed.software.insert(at);
        Ok(true)
    }

    fn remove_sw_breakpoint(&mut self, at: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.armed.software.remove(&at);
        Ok(true)
    }
}

impl HwBreakpoint for Target {
    fn add_hw_breakpoint(&mut self, at: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.armed.hardware.insert(at);
        Ok(true)
    }

    fn remove_hw_breakpoint(&mut self, at: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.armed.hardware.remove(&at);
        Ok(true)
    }
}

impl HwWatchpoint for Target {
    fn add_hw_watchpoint(&mut self, at: u64, len: u64, kind: GdbKind) -> TargetResult<bool, Self> {
        Ok(len > 0 && self.armed.watch.insert(watchpoint(at, len, kind)))
    }

    fn remove_hw_watchpoint(&mut self, at: u64, len: u64, kind: GdbKind) -> TargetResult<bool, Self> {
        self.armed.watch.remove(&watchpoint(at, len, kind));
        Ok(true)
    }
}

/// Linear addresses, all of which may be memory: what is, the page tables say, and they change. The physical map is
/// `monitor memory`.
const MEMORY_MAP: &str = "<?xml version=\"1.0\"?><!DOCTYPE memory-map PUBLIC \
    \"+//IDN gnu.org//DTD GDB Memory Map V1.0//EN\" \"http://sourceware.org/gdb/gdb-memory-map.dtd\"><memory-map>\
    <memory type=\"ram\" start=\"0x0\" length=\"0x8000000000000000\"/>\
    <memory type=\"ram\" start=\"0x8000000000000000\" length=\"0x8000000000000000\"/></memory-map>";

impl MemoryMap for Target {
    fn memory_map_xml(&self, offset: u64, length: usize, buf: &mut [u8]) -> TargetResult<usize, Self> {
        let rest = usize::try_from(offset).ok().and_then(|at| MEMORY_MAP.as_bytes().get(at..)).unwrap_or(&[]);
        let n = rest.len().min(length).min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }
}

impl MonitorCmd for Target {
    fn handle_monitor_cmd(&mut self, cmd: &[u8], mut out: ConsoleOutput<'_>) -> Result<(), &'static str> {
        let text = monitor::command(self, &String::from_utf8_lossy(cmd));
        out.write_raw(text.as_bytes());
        Ok(())
    }
}

//! What is armed: by the debugger's own packets and by monitor commands. The vCPU gets one immutable copy for each change.

use super::expr::Expr;
use paravane_cpu::{CpuState, DebugPlan, LinAddr, Space, WatchHit, WatchKind, Watchpoint, peek};
use paravane_memory::GuestMemory;
use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A breakpoint made by `monitor break`.
#[derive(Clone, Debug)]
pub struct MonitorBreak {
    /// Its number, for `monitor delete`.
    pub number: u32,
    /// Linear or physical.
    pub space: Space,
    /// Where.
    pub at: u64,
    /// Stops only where this is not zero; and its text.
    pub condition: Option<(Expr, String)>,
    /// How often it was reached, whatever the condition said.
    pub reached: Arc<AtomicU64>,
}

/// A watchpoint made by `monitor watch`.
#[derive(Clone, Copy, Debug)]
pub struct MonitorWatch {
    /// Its number, for `monitor delete`.
    pub number: u32,
    /// The range.
    pub watch: Watchpoint,
}

/// Everything that is armed.
#[derive(Clone, Default, Debug)]
pub struct Armed {
    /// The debugger's software breakpoints (linear).
    pub software: BTreeSet<u64>,
    /// Its hardware breakpoints (linear); here no less unlimited.
    pub hardware: BTreeSet<u64>,
    /// Its watchpoints.
    pub watch: BTreeSet<Watchpoint>,
    /// `monitor break`.
    pub breaks: Vec<MonitorBreak>,
    /// `monitor watch`.
    pub watches: Vec<MonitorWatch>,
    /// Numbers given so far.
    pub numbers: u32,
}

/// Whose breakpoint was reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Owner {
    /// A software breakpoint of the debugger.
    Software,
    /// A hardware breakpoint of the debugger.
    Hardware,
    /// `monitor break` with that number.
    Monitor(u32),
}

impl Armed {
    /// What the engine must know of it.
    pub fn plan(&self) -> DebugPlan {
        let of = |space| self.breaks.iter().filter(move |b| b.space == space).map(|b| b.at);
        DebugPlan {
            linear: self.software.iter().chain(&self.hardware).copied().chain(of(Space::Linear)).collect(),
            physical: of(Space::Physical).collect(),
            watch: self.watch.iter().copied().chain(self.watches.iter().map(|w| w.watch)).collect(),
        }
    }

    /// Whether the breakpoint at `lin` stops the guest now, and whose it is.
    pub fn stops(&self, lin: LinAddr, cpu: &CpuState, mem: &GuestMemory) -> Option<Owner> {
        if self.software.contains(&lin.0) {
            return Some(Owner::Software);
        }
        if self.hardware.contains(&lin.0) {
            return Some(Owner::Hardware);
        }
        let phys = peek(cpu, mem, lin).phys();
        self.breaks.iter().find_map(|b| {
            let here = match b.space {
                Space::Physical => phys.is_some_and(|p| p.0 == b.at),
                _ => b.at == lin.0,
            };
            if !here {
                return None;
            }
            b.reached.fetch_add(1, Ordering::Relaxed);
            // A condition that cannot be evaluated stops: silence would look like "never reached".
            let quiet = b.condition.as_ref().is_some_and(|(c, _)| c.value(cpu, mem) == Ok(0));
            (!quiet).then_some(Owner::Monitor(b.number))
        })
    }

    /// The watchpoint of the debugger itself that `hit` belongs to.
    pub fn debuggers(&self, hit: &WatchHit) -> Option<WatchKind> {
        self.watch.contains(&hit.watch).then_some(hit.watch.kind)
    }

    /// The next free number.
    pub fn number(&mut self) -> u32 {
        self.numbers += 1;
        self.numbers
    }

    /// Forgets `monitor` item `number`; whether there was one.
    pub fn delete(&mut self, number: u32) -> bool {
        let before = self.breaks.len() + self.watches.len();
        self.breaks.retain(|b| b.number != number);
        self.watches.retain(|w| w.number != number);
        before != self.breaks.len() + self.watches.len()
    }
}

impl fmt::Display for MonitorBreak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: break at {} {:#x}", self.number, self.space, self.at)?;
        if let Some((_, text)) = &self.condition {
            write!(f, " if {text}")?;
        }
        write!(f, ", reached {} times", self.reached.load(Ordering::Relaxed))
    }
}

impl fmt::Display for MonitorWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let w = &self.watch;
        let kind = match w.kind {
            WatchKind::Read => "reads",
            WatchKind::Write => "writes",
            WatchKind::Access => "reads and writes",
        };
        write!(f, "{}: watch {kind} of {} {:#x}, {} long", self.number, w.space, w.first, w.len)
    }
}

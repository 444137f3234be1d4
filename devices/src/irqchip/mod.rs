//! All interrupt controllers of the PC in one place: the 8259A pair, the I/O APIC and the local APICs.
//!
//! One mutex guards them all, so there is no lock order between them to get wrong. Whatever concerns a vCPU
//! (an interrupt to take, NMI, INIT, start-up) is told through [`VcpuKick`] after the mutex is released.
//!
//! Wiring: GSI 0 (the PIT) is 8259A input 0 and I/O APIC input 2; GSI 1 and 3–15 are both chips' inputs of
//! that number; 16–23 are the I/O APIC's alone. The 8259A's INT is LINT0 of every local APIC and I/O APIC
//! input 0 (ExtINT); NMI is LINT1.

mod ioapic;
mod lapic;
mod pic;
mod ports;
pub mod spec;
mod timer;
mod wired_or;

#[cfg(test)]
mod tests;

pub use ioapic::Message;
pub use lapic::{Outgoing, Refused, Shorthand};
pub use ports::{IoApicWindow, PicPorts};
pub use timer::{TimerMode, TscClock};
pub use wired_or::WiredOr;

use crate::counters::{Counter, Counters};
use crate::irq::{IrqSink, MsiSink};
use crate::snapshot::{StateError, StateStream};
use crate::time::{Clock, Timer, TimerQueue, VmTime};
use ioapic::IoApic;
use lapic::LocalApic;
use paravane_memory::VpIndex;
use pic::PicPair;
use spec::lapic as reg;
use std::fmt;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

/// How the fabric reaches vCPUs. Called with no lock of the fabric held; calls may come from any thread, more
/// than once for one event, and must not wait for the vCPU.
pub trait VcpuKick: Send + Sync {
    /// There is (or may be) an interrupt to acknowledge.
    fn interrupt(&self, vp: VpIndex);
    /// A non-maskable interrupt.
    fn nmi(&self, vp: VpIndex);
    /// INIT: the processor resets and waits for a start-up IPI (the bootstrap processor starts at the reset
    /// vector). Its local APIC is reset already.
    fn init(&self, vp: VpIndex);
    /// A start-up IPI for `vector << 12`; ignored by a processor that does not wait for it.
    fn startup(&self, vp: VpIndex, vector: u8);
}

/// What the machine decides about its interrupt controllers.
#[derive(Clone, Copy, Debug)]
pub struct FabricConfig {
    /// Number of virtual processors; APIC ID n is VP n.
    pub vcpus: u32,
    /// Clock of the local APIC timers before the divider.
    pub apic_hz: u64,
    /// The time-stamp counter.
    pub tsc: TscClock,
}

#[derive(Clone, Copy, Debug)]
enum Action {
    Nmi(VpIndex),
    Init(VpIndex),
    Startup(VpIndex, u8),
}

/// No interrupt is offered.
const NONE: u16 = 0;
/// The 8259A offers one.
const EXTINT: u16 = 0x100;
/// A local APIC offers the vector in the low byte.
const LOCAL: u16 = 0x200;

/// Everything under the mutex.
struct Chips {
    pic: PicPair,
    ioapic: IoApic,
    lapics: Vec<LocalApic>,
    /// INT pin of the 8259A as last seen by the APICs.
    int: bool,
    /// What each local APIC timer was armed for.
    armed: Vec<Option<VmTime>>,
    actions: Vec<Action>,
    counts: Counts,
}

struct Counts {
    pic: Counter,
    ioapic: Counter,
    msi: Counter,
    ipi: Counter,
    eoi_broadcast: Counter,
    timer: Counter,
    unsupported: Counter,
}

impl Counts {
    fn new(counters: &Counters) -> Counts {
        Counts {
            pic: counters.counter("pic", "acknowledged"),
            ioapic: counters.counter("ioapic", "messages"),
            msi: counters.counter("msi", "messages"),
            ipi: counters.counter("lapic", "ipis"),
            eoi_broadcast: counters.counter("lapic", "eoi_broadcasts"),
            timer: counters.counter("lapic", "timer_expiries"),
            unsupported: counters.counter("lapic", "unsupported_smi_or_reserved_delivery"),
        }
    }
}

impl Chips {
    fn set_input(&mut self, input: u32, high: bool) {
        let pin = match input {
            0 => 2,
            2 => return, // the cascade input has no wire of its own
            n => n as usize,
        };
        if input < 16 {
            self.pic.set_line(input as u8, high);
        }
        if let Some(message) = self.ioapic.set_line(pin, high) {
            self.counts.ioapic.add(1);
            self.deliver(&message, None);
        }
    }

    /// Carries a message to the addressed local APICs, all but `except`.
    fn deliver(&mut self, message: &Message, except: Option<usize>) {
        use spec::delivery;
        if message.delivery == delivery::LOWEST_PRIORITY {
            let takes = |l: &LocalApic| l.is_software_enabled() && l.is_addressed(message);
            let addressed = (0..self.lapics.len()).filter(|&i| Some(i) != except && takes(&self.lapics[i]));
            if let Some(i) = addressed.min_by_key(|&i| self.lapics[i].arbitration_priority()) {
                self.lapics[i].accept(message.vector, message.level);
            }
            return;
        }
        for i in 0..self.lapics.len() {
            if Some(i) != except && self.lapics[i].is_addressed(message) {
                self.deliver_to(i, message);
            }
        }
    }

    fn deliver_to(&mut self, i: usize, message: &Message) {
        use spec::delivery;
        let vp = VpIndex(i as u32);
        match message.delivery {
            delivery::FIXED | delivery::LOWEST_PRIORITY => {
                self.lapics[i].accept(message.vector, message.level);
            }
            delivery::NMI => self.actions.push(Action::Nmi(vp)),
            delivery::INIT => self.init(vp),
            delivery::STARTUP => self.actions.push(Action::Startup(vp, message.vector)),
            delivery::EXTINT => self.lapics[i].accept_extint(),
            _ => self.counts.unsupported.add(1),
        }
    }

    fn init(&mut self, vp: VpIndex) {
        self.lapics[vp.0 as usize].init();
        self.actions.push(Action::Init(vp));
    }

    fn send_ipi(&mut self, from: usize, shorthand: Shorthand, message: Message) {
        self.counts.ipi.add(1);
        let everyone = Message { destination: u32::MAX, logical: false, ..message };
        match shorthand {
            Shorthand::Myself => self.deliver_to(from, &message),
            Shorthand::Destination => self.deliver(&message, None),
            Shorthand::All => self.deliver(&everyone, None),
            Shorthand::Others => self.deliver(&everyone, Some(from)),
        }
    }

    /// The 8259A's INT pin reaches LINT0 everywhere and I/O APIC input 0.
    fn propagate_int(&mut self) {
        let int = self.pic.int();
        if int == self.int {
            return;
        }
        self.int = int;
        for lapic in &mut self.lapics {
            lapic.set_lint(0, int);
        }
        if let Some(message) = self.ioapic.set_line(0, int) {
            self.deliver(&message, None);
        }
    }

    /// Carries out what the chips asked of each other until all is quiet.
    fn settle(&mut self) {
        self.propagate_int();
        let mut i = 0;
        while i < self.lapics.len() {
            if self.lapics[i].outbox.is_empty() {
                i += 1;
                continue;
            }
            for outgoing in std::mem::take(&mut self.lapics[i].outbox) {
                self.carry_out(i, outgoing);
            }
            i = 0; // an error LVT may have filled an earlier outbox
        }
    }

    fn carry_out(&mut self, from: usize, outgoing: Outgoing) {
        match outgoing {
            Outgoing::Ipi(shorthand, message) => self.send_ipi(from, shorthand, message),
            Outgoing::EoiBroadcast(vector) => {
                self.counts.eoi_broadcast.add(1);
                for message in self.ioapic.end_of_interrupt(vector) {
                    self.deliver(&message, None);
                }
            }
            Outgoing::Nmi => self.actions.push(Action::Nmi(VpIndex(from as u32))),
            Outgoing::Init => self.init(VpIndex(from as u32)),
        }
    }

    /// What the controllers offer processor `i`.
    fn offer(&self, i: usize) -> u16 {
        let lapic = &self.lapics[i];
        if self.int && lapic.passes_extint() {
            return EXTINT;
        }
        lapic.pending().map_or(NONE, |v| LOCAL | u16::from(v))
    }

    fn acknowledge(&mut self, i: usize) -> Option<u8> {
        if self.offer(i) == EXTINT {
            self.lapics[i].extint_taken();
            self.counts.pic.add(1);
            let vector = self.pic.acknowledge();
            // INT drops during INTA: a further request is a new edge for the APICs.
            self.int = false;
            self.lapics.iter_mut().for_each(|l| l.set_lint(0, false));
            self.ioapic.set_line(0, false);
            return Some(vector);
        }
        self.lapics[i].acknowledge()
    }
}

/// The interrupt controllers of one machine.
pub struct InterruptFabric {
    chips: Mutex<Chips>,
    /// What is offered to each processor, readable without the mutex.
    offers: Vec<AtomicU16>,
    timers: Vec<Timer>,
    clock: Arc<dyn Clock>,
    kick: Arc<dyn VcpuKick>,
}

impl InterruptFabric {
    /// Builds the controllers in their power-on state and binds their timers in `queue`.
    pub fn new(
        config: FabricConfig,
        clock: Arc<dyn Clock>,
        queue: &Arc<TimerQueue>,
        kick: Arc<dyn VcpuKick>,
        counters: &Counters,
    ) -> Arc<InterruptFabric> {
        let count = config.vcpus.max(1);
        let chips = Chips {
            pic: PicPair::new(),
            ioapic: IoApic::new(),
            lapics: (0..count).map(|id| LocalApic::new(id, config.apic_hz, config.tsc)).collect(),
            int: false,
            armed: vec![None; count as usize],
            actions: Vec::new(),
            counts: Counts::new(counters),
        };
        let fabric = Arc::new(InterruptFabric {
            chips: Mutex::new(chips),
            offers: (0..count).map(|_| AtomicU16::new(NONE)).collect(),
            timers: (0..count).map(|_| queue.timer()).collect(),
            clock,
            kick,
        });
        for (i, timer) in fabric.timers.iter().enumerate() {
            let weak: Weak<InterruptFabric> = Arc::downgrade(&fabric);
            queue.bind(timer.key(), move |now| {
                if let Some(fabric) = weak.upgrade() {
                    fabric.timer_expired(i, now);
                }
            });
        }
        fabric
    }

    /// Walks over all controllers, their timers and what each processor is offered. Nobody is told: whoever loads it gets the
    /// processors' attention.
    pub fn shared_state(&self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        let InterruptFabric { chips, offers, timers, clock: _, kick: _ } = self;
        let mut chips = chips.lock().unwrap_or_else(PoisonError::into_inner);
        let Chips { pic, ioapic, lapics, int, armed, actions, counts: _ } = &mut *chips;
        if !actions.is_empty() {
            return Err(StateError::Busy("the interrupt controllers"));
        }
        s.field("pic", pic)?;
        s.field("ioapic", ioapic)?;
        s.field("lapic", lapics.as_mut_slice())?;
        s.field("int", int)?;
        s.field("armed", armed.as_mut_slice())?;
        for offer in offers {
            let mut value = offer.load(Ordering::Acquire);
            s.field("offer", &mut value)?;
            offer.store(value, Ordering::Release);
        }
        timers.iter().try_for_each(|timer| timer.shared_state(s))
    }

    fn lock(&self) -> MutexGuard<'_, Chips> {
        self.chips.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `f` on the chips, lets them settle, and tells the vCPUs afterwards what it came to.
    fn with<R>(&self, f: impl FnOnce(&mut Chips) -> R) -> R {
        let mut chips = self.lock();
        let result = f(&mut chips);
        chips.settle();
        let actions = std::mem::take(&mut chips.actions);
        if actions.iter().any(|a| matches!(a, Action::Init(_))) {
            let now = self.clock.now();
            (0..self.offers.len()).for_each(|i| self.run_timer(&mut chips, i, now));
        }
        let mut kicked = Kicked::default();
        for (i, seen) in self.offers.iter().enumerate() {
            let offer = chips.offer(i);
            if seen.swap(offer, Ordering::AcqRel) != offer && offer != NONE {
                kicked.add(i);
            }
        }
        drop(chips);
        for action in actions {
            match action {
                Action::Nmi(vp) => self.kick.nmi(vp),
                Action::Init(vp) => self.kick.init(vp),
                Action::Startup(vp, vector) => self.kick.startup(vp, vector),
            }
        }
        kicked.for_each(|i| self.kick.interrupt(VpIndex(i as u32)));
        result
    }

    /// Lets timer `i` catch up and arms it again if its next expiry moved.
    fn run_timer(&self, chips: &mut Chips, i: usize, now: VmTime) {
        let next = chips.lapics[i].run_timer(now);
        if chips.armed[i] != next {
            chips.armed[i] = next;
            self.timers[i].set(next);
        }
    }

    fn timer_expired(&self, i: usize, now: VmTime) {
        self.with(|chips| {
            chips.armed[i] = None;
            chips.counts.timer.add(1);
            self.run_timer(chips, i, now);
        });
    }

    fn index(&self, vp: VpIndex) -> Option<usize> {
        let i = vp.0 as usize;
        (i < self.offers.len()).then_some(i)
    }

    // --- what a processor asks ---

    /// Whether the controllers offer `vp` an interrupt; never takes the mutex.
    #[inline]
    pub fn has_interrupt(&self, vp: VpIndex) -> bool {
        self.offers.get(vp.0 as usize).is_some_and(|o| o.load(Ordering::Acquire) != NONE)
    }

    /// INTA: takes the interrupt of highest priority; one from the 8259A comes before the local APIC's.
    pub fn acknowledge(&self, vp: VpIndex) -> Option<u8> {
        let i = self.index(vp).filter(|_| self.has_interrupt(vp))?;
        self.with(|chips| {
            // Whatever is offered after this is news, even if it looks the same.
            self.offers[i].store(NONE, Ordering::Release);
            chips.acknowledge(i)
        })
    }

    /// Loads from the local APIC page; only aligned 32-bit accesses reach registers.
    pub fn lapic_load(&self, vp: VpIndex, offset: u64) -> u32 {
        let Some(i) = self.index(vp) else { return u32::MAX };
        if offset & 0xF != 0 {
            return 0;
        }
        let offset = offset as u32 & 0xFF0;
        let now = self.time_for(offset);
        self.with(|chips| chips.lapics[i].load(offset, now))
    }

    /// Stores to the local APIC page.
    pub fn lapic_store(&self, vp: VpIndex, offset: u64, value: u32) {
        let Some(i) = self.index(vp).filter(|_| offset & 0xF == 0) else { return };
        let offset = offset as u32 & 0xFF0;
        let now = self.time_for(offset);
        self.with(|chips| {
            chips.lapics[i].store(offset, value, now);
            if concerns_timer(offset) {
                self.run_timer(chips, i, now);
            }
        });
    }

    /// The time, for registers that need it.
    fn time_for(&self, offset: u32) -> VmTime {
        if concerns_timer(offset) { self.clock.now() } else { VmTime(0) }
    }

    /// Whether `msr` is one of [`InterruptFabric::read_msr`]'s.
    pub fn owns_msr(msr: u32) -> bool {
        matches!(msr, reg::MSR_APIC_BASE | reg::MSR_TSC_DEADLINE | reg::MSR_X2APIC..=reg::MSR_X2APIC_LAST)
    }

    /// RDMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE and the x2APIC registers.
    pub fn read_msr(&self, vp: VpIndex, msr: u32) -> Result<u64, Refused> {
        let i = self.index(vp).ok_or(Refused)?;
        let now = self.time_for(msr_offset(msr));
        self.with(|chips| {
            let lapic = &mut chips.lapics[i];
            match msr {
                reg::MSR_APIC_BASE => Ok(lapic.base()),
                reg::MSR_TSC_DEADLINE => Ok(lapic.timer.deadline()),
                reg::MSR_X2APIC..=reg::MSR_X2APIC_LAST => lapic.read_msr(msr, now),
                _ => Err(Refused),
            }
        })
    }

    /// WRMSR of the same.
    pub fn write_msr(&self, vp: VpIndex, msr: u32, value: u64) -> Result<(), Refused> {
        let i = self.index(vp).ok_or(Refused)?;
        let offset = msr_offset(msr);
        let now = self.time_for(offset);
        self.with(|chips| {
            let lapic = &mut chips.lapics[i];
            let result = match msr {
                reg::MSR_APIC_BASE => lapic.set_base(value),
                reg::MSR_TSC_DEADLINE => {
                    lapic.timer.set_deadline(value);
                    Ok(())
                }
                reg::MSR_X2APIC..=reg::MSR_X2APIC_LAST => lapic.write_msr(msr, value, now),
                _ => Err(Refused),
            };
            if concerns_timer(offset) {
                self.run_timer(chips, i, now);
            }
            result
        })
    }

    /// CR8.
    pub fn cr8(&self, vp: VpIndex) -> u64 {
        self.index(vp).map_or(0, |i| self.lock().lapics[i].cr8())
    }

    /// Writes CR8.
    pub fn set_cr8(&self, vp: VpIndex, value: u64) {
        if let Some(i) = self.index(vp) {
            self.with(|chips| chips.lapics[i].set_cr8(value));
        }
    }

    /// What `vp` adds to the machine's TSC (IA32_TSC_ADJUST): TSC deadlines are compared with the sum.
    pub fn set_tsc_offset(&self, vp: VpIndex, offset: u64) {
        let Some(i) = self.index(vp) else { return };
        let now = self.clock.now();
        self.with(|chips| {
            chips.lapics[i].timer.tsc_offset = offset;
            self.run_timer(chips, i, now);
        });
    }

    // --- what the machine does ---

    /// Sends `vp` an NMI.
    pub fn nmi(&self, vp: VpIndex) {
        if self.index(vp).is_some() {
            self.kick.nmi(vp);
        }
    }

    /// Drives the NMI line (SERR#, IOCHK#, a debugger's button): LINT1 of every local APIC.
    pub fn set_nmi_line(&self, high: bool) {
        self.with(|chips| chips.lapics.iter_mut().for_each(|l| l.set_lint(1, high)));
    }

    /// Raises the performance-counter event of `vp`'s local APIC.
    pub fn performance_event(&self, vp: VpIndex) {
        if let Some(i) = self.index(vp) {
            self.with(|chips| chips.lapics[i].raise_lvt(reg::LVT_PERF));
        }
    }

    /// Raises the thermal event of `vp`'s local APIC.
    pub fn thermal_event(&self, vp: VpIndex) {
        if let Some(i) = self.index(vp) {
            self.with(|chips| chips.lapics[i].raise_lvt(reg::LVT_THERMAL));
        }
    }

    /// Puts the local APICs into the state a BIOS leaves them in (virtual wire mode): a machine that starts a
    /// kernel without firmware calls this after reset.
    pub fn enter_virtual_wire_mode(&self) {
        self.with(|chips| chips.lapics.iter_mut().for_each(LocalApic::enter_virtual_wire_mode));
    }

    /// Resets all controllers; the levels of their inputs stay as the devices drive them.
    pub fn reset(&self) {
        self.reset_pic();
        self.reset_ioapic();
        let now = self.clock.now();
        self.with(|chips| {
            for i in 0..chips.lapics.len() {
                chips.lapics[i].reset();
                self.run_timer(chips, i, now);
            }
        });
    }

    fn reset_pic(&self) {
        self.with(|chips| chips.pic.reset());
    }

    fn reset_ioapic(&self) {
        self.with(|chips| chips.ioapic.reset());
    }

    /// Shows the state of every controller.
    pub fn inspect(&self, field: &mut dyn FnMut(&str, &dyn fmt::Display)) {
        let chips = self.lock();
        chips.pic.inspect(field);
        chips.ioapic.inspect(field);
        for (i, lapic) in chips.lapics.iter().enumerate() {
            lapic.inspect(&format!("lapic{i}"), field);
        }
    }
}

impl IrqSink for InterruptFabric {
    fn set_level(&self, input: u32, high: bool) {
        self.with(|chips| chips.set_input(input, high));
    }
}

impl MsiSink for InterruptFabric {
    /// SDM 3A 11.11: destination in address bits 19:12, redirection hint 3, logical 2; vector, delivery mode
    /// and trigger in the data.
    fn msi(&self, address: u64, data: u32) {
        let hint = address & 1 << 3 != 0;
        let delivery = match (hint, data >> 8 & 7) {
            (true, spec::delivery::FIXED) => spec::delivery::LOWEST_PRIORITY,
            (_, mode) => mode,
        };
        let level = data & 1 << 15 != 0;
        let rest = Message { destination: 0, logical: false, delivery, vector: data as u8, level };
        let message = Message::with_8bit_destination((address >> 12) as u8, address & 1 << 2 != 0, rest);
        self.with(|chips| {
            chips.counts.msi.add(1);
            chips.deliver(&message, None);
        });
    }
}

impl fmt::Debug for InterruptFabric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InterruptFabric").field("vcpus", &self.offers.len()).finish_non_exhaustive()
    }
}

/// Whether the register at `offset` needs the time or may move the timer's expiry.
fn concerns_timer(offset: u32) -> bool {
    matches!(offset, reg::LVT_TIMER | reg::INITIAL_COUNT | reg::CURRENT_COUNT | reg::DIVIDE)
}

/// The register behind an x2APIC MSR; the two other MSRs act on the timer.
fn msr_offset(msr: u32) -> u32 {
    match msr {
        reg::MSR_X2APIC..=reg::MSR_X2APIC_LAST => (msr - reg::MSR_X2APIC) << 4,
        _ => reg::LVT_TIMER,
    }
}

/// The processors to tell, without allocating for the usual few.
#[derive(Default)]
struct Kicked {
    low: u64,
    rest: Vec<usize>,
}

impl Kicked {
    fn add(&mut self, i: usize) {
        match i {
            0..64 => self.low |= 1 << i,
            _ => self.rest.push(i),
        }
    }

    fn for_each(self, f: impl FnMut(usize)) {
        (0..64).filter(|i| self.low & 1 << i != 0).chain(self.rest).for_each(f);
    }
}

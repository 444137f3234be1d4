//! The virtqueues of one device, and how it interrupts its driver (VIRTIO 1.2, sections 2.6 and 2.7).
//!
//! Ring arithmetic is the virtio-queue crate's. What it passes over in silence is checked here: a chain that breaks off, that
//! is longer than the queue, or that has device-readable parts behind device-writable ones is malformed, and a device that sees
//! one asks for a reset.

use super::memory::RingMemory;
use super::spec::{AVAIL_F_NO_INTERRUPT, NO_VECTOR, feature, isr, status};
use paravane_devices::pci::MsixTable;
use paravane_devices::{Counter, Counters, DmaPurpose, DmaTap, IrqLine};
use paravane_devices::{Snapshot, StateError, StateStream};
use paravane_memory::{GuestMemory, MemoryError, PhysAddr};
use virtio_queue::{Queue, QueueOwnedT, QueueT};

/// One piece of a chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// First byte.
    pub at: PhysAddr,
    /// Bytes.
    pub len: u64,
}

/// A descriptor chain, copied out of guest memory once.
#[derive(Default, Debug)]
pub struct Chain {
    /// Index of its first descriptor: its name on the used ring.
    pub head: u16,
    /// What the driver wrote for the device.
    pub readable: Vec<Piece>,
    /// What the device fills.
    pub writable: Vec<Piece>,
}

/// Counters of one device.
#[derive(Clone, Debug)]
pub struct VirtioCounters {
    /// Queue notifications from the driver.
    pub doorbells: Counter,
    /// Chains taken off the available rings.
    pub requests: Counter,
    /// Interrupts sent.
    pub interrupts: Counter,
    /// Chains returned without an interrupt.
    pub interrupts_suppressed: Counter,
    /// Payload bytes.
    pub bytes: Counter,
}

impl VirtioCounters {
    fn new(counters: &Counters, group: &str) -> VirtioCounters {
        let c = |name| counters.counter(group, name);
        VirtioCounters {
            doorbells: c("doorbells"),
            requests: c("requests"),
            interrupts: c("interrupts"),
            interrupts_suppressed: c("interrupts_suppressed"),
            bytes: c("bytes"),
        }
    }
}

pub(super) struct Ring {
    pub queue: Queue,
    pub vector: u16,
}

/// The queues, the interrupt and the device status: what a device type works with.
pub struct Rings {
    // wiring
    memory: GuestMemory,
    vm: RingMemory,
    pub(super) intx: IrqLine,
    pub(super) msix: MsixTable,
    counters: VirtioCounters,
    // guest-visible state
    pub(super) rings: Box<[Ring]>,
    pub(super) status: u8,
    pub(super) isr: u8,
    pub(super) intx_disabled: bool,
    pub(super) config_vector: u16,
    pub(super) driver_features: u64,
}

paravane_devices::snapshot!(Rings {
    intx,
    msix,
    rings,
    status,
    isr,
    intx_disabled,
    config_vector,
    driver_features
    | memory, vm, counters
});

/// The number of rings is not state.
impl Snapshot for Ring {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        let Ring { queue, vector } = self;
        let mut q = queue.state();
        s.field("next_avail", &mut q.next_avail)?;
        s.field("next_used", &mut q.next_used)?;
        s.field("event_idx_enabled", &mut q.event_idx_enabled)?;
        s.field("size", &mut q.size)?;
        s.field("ready", &mut q.ready)?;
        s.field("desc_table", &mut q.desc_table)?;
        s.field("avail_ring", &mut q.avail_ring)?;
        s.field("used_ring", &mut q.used_ring)?;
        if s.loads() {
            *queue = Queue::try_from(q).map_err(|_| StateError::Value("a virtqueue"))?;
        }
        s.field("vector", vector)
    }
}

impl Rings {
    pub(super) fn new(
        sizes: &[u16],
        memory: &GuestMemory,
        tap: DmaTap,
        intx: IrqLine,
        msix: MsixTable,
        counters: &Counters,
        group: &str,
    ) -> Rings {
        let ring = |&size: &u16| Ring { queue: Queue::new(size).expect("a power of two"), vector: NO_VECTOR };
        Rings {
            memory: memory.clone(),
            vm: RingMemory::new(memory, tap),
            intx,
            msix,
            counters: VirtioCounters::new(counters, group),
            rings: sizes.iter().map(ring).collect(),
            status: 0,
            isr: 0,
            intx_disabled: false,
            config_vector: NO_VECTOR,
            driver_features: 0,
        }
    }

    pub(super) fn reset(&mut self) {
        for r in &mut self.rings {
            r.queue.reset();
            r.vector = NO_VECTOR;
        }
        (self.status, self.isr, self.config_vector, self.driver_features) = (0, 0, NO_VECTOR, 0);
        self.intx.set(false);
    }

    /// Reads guest memory for `purpose`; on error nothing was read.
    pub fn read(&self, purpose: DmaPurpose, at: PhysAddr, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(at, buf)?;
        self.vm.tap().read(purpose, at, buf.len() as u64);
        Ok(())
    }

    /// Writes guest memory for `purpose`; on error nothing was written.
    pub fn write(&self, purpose: DmaPurpose, at: PhysAddr, buf: &[u8]) -> Result<(), MemoryError> {
        self.memory.write(at, buf)?;
        self.vm.tap().wrote(purpose, at, buf.len() as u64);
        Ok(())
    }

    /// What is counted for this device.
    pub fn counters(&self) -> &VirtioCounters {
        &self.counters
    }

    /// Whether the driver accepted all of `bits`.
    pub fn has(&self, bits: u64) -> bool {
        self.driver_features & bits == bits
    }

    /// Whether the driver is up and nothing is broken.
    pub fn running(&self) -> bool {
        self.status & (status::DRIVER_OK | status::NEEDS_RESET | status::FAILED) == status::DRIVER_OK
    }

    /// Checks queue `index` and puts it to use.
    pub(super) fn enable(&mut self, index: usize) {
        let event_idx = self.has(feature::EVENT_IDX);
        let Some(r) = self.rings.get_mut(index) else { return };
        r.queue.set_event_idx(event_idx);
        r.queue.set_ready(true);
        if !r.queue.is_valid(&self.vm) {
            r.queue.set_ready(false);
            self.ask_for_reset();
        }
    }

    /// The driver broke the rules: sets DEVICE_NEEDS_RESET and says so.
    pub fn ask_for_reset(&mut self) {
        if self.status & status::NEEDS_RESET != 0 {
            return;
        }
        let running = self.running();
        self.status |= status::NEEDS_RESET;
        if running {
            self.interrupt(self.config_vector, isr::CONFIG);
        }
    }

    /// Takes the next chain off queue `index` into `chain`; false if there is none or the ring is malformed.
    pub fn pop(&mut self, index: usize, chain: &mut Chain) -> bool {
        if !self.running() {
            return false;
        }
        match self.take(index, chain) {
            Ok(taken) => {
                self.counters.requests.add(u64::from(taken));
                taken
            }
            Err(Malformed) => {
                self.ask_for_reset();
                false
            }
        }
    }

    fn take(&mut self, index: usize, chain: &mut Chain) -> Result<bool, Malformed> {
        let Some(r) = self.rings.get_mut(index).filter(|r| r.queue.ready()) else { return Ok(false) };
        let limit = usize::from(r.queue.size());
        let Some(descriptors) = r.queue.iter(&self.vm).map_err(|_| Malformed)?.next() else {
            return Ok(false);
        };
        chain.head = descriptors.head_index();
        chain.readable.clear();
        chain.writable.clear();
        let mut more = true;
        for (n, d) in descriptors.enumerate() {
            if n >= limit || (!d.is_write_only() && !chain.writable.is_empty()) {
                return Err(Malformed);
            }
            let pieces = if d.is_write_only() { &mut chain.writable } else { &mut chain.readable };
            pieces.push(Piece { at: PhysAddr(d.addr().0), len: u64::from(d.len()) });
            more = d.has_next();
        }
        // The iterator ends early where a link leads nowhere: `more` is then still set.
        if more { Err(Malformed) } else { Ok(true) }
    }

    /// Asks the driver for notifications on queue `index`; true if chains came meanwhile.
    pub fn rearm(&mut self, index: usize) -> bool {
        if !self.running() {
            return false;
        }
        let Some(r) = self.rings.get_mut(index).filter(|r| r.queue.ready()) else { return false };
        // Without event index the flag that stops notifications is never set, so there is nothing to undo.
        if !r.queue.event_idx_enabled() {
            return false;
        }
        match r.queue.enable_notification(&self.vm) {
            Ok(more) => more,
            Err(_) => {
                self.ask_for_reset();
                false
            }
        }
    }

    /// Returns the chain `head` of queue `index` with `len` bytes written, and interrupts if the driver wants it.
    pub fn push(&mut self, index: usize, head: u16, len: u32) {
        if !self.running() {
            return;
        }
        let Some(r) = self.rings.get_mut(index).filter(|r| r.queue.ready()) else { return };
        let wanted = r.queue.add_used(&self.vm, head, len).and_then(|()| {
            let wanted = r.queue.needs_notification(&self.vm)?;
            Ok(wanted
                && (r.queue.event_idx_enabled() || !no_interrupt(&self.memory, self.vm.tap(), &r.queue)))
        });
        match wanted {
            Ok(true) => {
                let vector = r.vector;
                self.interrupt(vector, isr::QUEUE);
            }
            Ok(false) => self.counters.interrupts_suppressed.add(1),
            Err(_) => self.ask_for_reset(),
        }
    }

    fn interrupt(&mut self, vector: u16, bit: u8) {
        if self.msix.enabled() {
            if vector != NO_VECTOR && self.msix.notify(vector) {
                self.counters.interrupts.add(1);
            }
            return;
        }
        self.counters.interrupts.add(1);
        self.isr |= bit;
        self.drive_intx();
    }

    pub(super) fn drive_intx(&self) {
        self.intx.set(self.isr != 0 && !self.intx_disabled && !self.msix.enabled());
    }

    /// Reading the ISR status clears it and lowers INTx.
    pub(super) fn take_isr(&mut self) -> u8 {
        let value = std::mem::take(&mut self.isr);
        self.drive_intx();
        value
    }
}

/// The driver broke the rules of the ring.
struct Malformed;

fn no_interrupt(memory: &GuestMemory, tap: &DmaTap, queue: &Queue) -> bool {
    let at = PhysAddr(queue.avail_ring());
    tap.read(DmaPurpose::Ring, at, 2);
    memory.read_u16(at).is_ok_and(|flags| flags & AVAIL_F_NO_INTERRUPT != 0)
}

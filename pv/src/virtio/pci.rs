//! PCI transport (VIRTIO 1.2, section 4.1): modern capabilities in memory BAR 4, the legacy interface in I/O BAR 0, MSI-X in BAR 1.
//!
//! A reset that meets requests in flight is finished by the last of them: until then the status reads as it was, which
//! modern drivers wait for (4.1.4.3.1). A legacy driver does not wait; its next status write abandons what is in
//! flight, whose completions then touch no ring.

use super::VirtioDevice;
use super::rings::Rings;
use super::spec::{MODERN_DEVICE_BASE, NO_VECTOR, VENDOR, capability, common, feature, legacy, status};
use paravane_devices::block::{BlockError, BlockRequest, Completion};
use paravane_devices::pci::{BarKind, MsixTable, PciConfig, PciDevice, PciIdentity, command};
use paravane_devices::{Counters, Device, DmaTap, Inspect, IrqLine, MsiSink, ResetKind, Width};
use paravane_devices::{Snapshot, StateError, StateStream};
use paravane_memory::GuestMemory;
use std::fmt;
use std::sync::{Arc, Mutex, Weak};
use virtio_queue::QueueT;

const LEGACY_BAR: u8 = 0;
const MSIX_BAR: u8 = 1;
const MODERN_BAR: u8 = 4;

const LEGACY_LEN: u64 = 128;
const MSIX_LEN: u64 = 0x1000;
const PBA_AT: u64 = 0x800;
const MODERN_LEN: u64 = 0x4000;
/// Each structure of the modern BAR has a page of its own.
const PAGE: u64 = 0x1000;
const COMMON_AT: u64 = 0;
const ISR_AT: u64 = PAGE;
const DEVICE_AT: u64 = 2 * PAGE;
const NOTIFY_AT: u64 = 3 * PAGE;
const NOTIFY_MULTIPLIER: u32 = 4;

const VENDOR_CAPABILITY: u8 = 0x09;
/// In the PCI configuration access capability: bar, offset, length, data.
const PCI_CAP_BAR: u8 = 4;
const PCI_CAP_OFFSET: u8 = 8;
const PCI_CAP_LENGTH: u8 = 12;
const PCI_CAP_DATA: u8 = 16;

/// How a virtio function presents itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VirtioPciOptions {
    /// No legacy interface, modern device ID.
    pub modern_only: bool,
}

/// What a virtio function is wired to.
pub struct VirtioWiring<'a> {
    /// Unique name: `virtio-blk0`.
    pub label: &'a str,
    /// Guest memory.
    pub memory: &'a GuestMemory,
    /// Its INTA# wire.
    pub intx: IrqLine,
    /// Where its messages go.
    pub msi: Arc<dyn MsiSink>,
    /// Where it counts.
    pub counters: &'a Counters,
    /// Who hears of doorbells, by queue.
    pub doorbell: Option<DoorbellWatch>,
    /// Who hears of accesses to guest memory, but for a disk's data.
    pub dma: DmaTap,
}

/// Hears the number of the queue that was rung.
pub type DoorbellWatch = Box<dyn Fn(u64) + Send>;

/// A virtio device as a PCI function.
pub struct VirtioPci {
    label: String,
    config: PciConfig,
    rings: Rings,
    device: Box<dyn VirtioDevice>,
    features: u64,
    legacy: bool,
    pci_capability: u8,
    reset_waits: bool,
    doorbell_watch: Option<DoorbellWatch>,
    // guest-visible selectors
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
}

struct Done(Weak<Mutex<VirtioPci>>);

impl Completion for Done {
    fn complete(&self, request: BlockRequest, result: Result<(), BlockError>) {
        if let Some(function) = self.0.upgrade() {
            function.lock().expect("virtio device").completed(request, result);
        }
    }
}

impl VirtioPci {
    /// Puts `device` behind the PCI transport.
    pub fn new(
        mut device: Box<dyn VirtioDevice>,
        wiring: VirtioWiring<'_>,
        options: VirtioPciOptions,
    ) -> Arc<Mutex<VirtioPci>> {
        let queues = device.queue_sizes().len() as u16;
        let sent = wiring.counters.counter(wiring.label, "msi");
        let mut msix = MsixTable::new(queues + 1, wiring.msi, sent);
        let (config, pci_capability) = configuration(device.as_ref(), options, &mut msix);
        let sizes = device.queue_sizes();
        let (memory, counters) = (wiring.memory, wiring.counters);
        let rings = Rings::new(sizes, memory, wiring.dma, wiring.intx, msix, counters, wiring.label);
        let generic = feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC | feature::ANY_LAYOUT;
        let features = device.features() | generic;
        let (label, doorbell_watch) = (wiring.label.to_owned(), wiring.doorbell);
        Arc::new_cyclic(|me: &Weak<Mutex<VirtioPci>>| {
            device.connect(Arc::new(Done(Weak::clone(me))));
            Mutex::new(VirtioPci {
                label,
                config,
                rings,
                device,
                features,
                legacy: !options.modern_only,
                pci_capability,
                reset_waits: false,
                doorbell_watch,
                device_feature_select: 0,
                driver_feature_select: 0,
                queue_select: 0,
            })
        })
    }

    /// The device's counters.
    pub fn counters(&self) -> &super::VirtioCounters {
        self.rings.counters()
    }

    fn completed(&mut self, request: BlockRequest, result: Result<(), BlockError>) {
        self.device.completed(&mut self.rings, request, result);
        if self.reset_waits && self.device.in_flight() == 0 {
            self.finish_reset();
        }
    }

    fn doorbell(&mut self, queue: u64) {
        self.rings.counters().doorbells.add(1);
        if let Some(heard) = &self.doorbell_watch {
            heard(queue);
        }
        if self.rings.running() && queue < self.rings.rings.len() as u64 {
            self.device.doorbell(&mut self.rings, queue as usize);
        }
    }

    // ---- status -----------------------------------------------------------------------------------------

    fn write_status(&mut self, value: u8) {
        if value == 0 {
            self.start_reset();
            return;
        }
        if self.reset_waits {
            self.finish_reset();
        }
        let set = value & !self.rings.status;
        self.rings.status |= value & !status::NEEDS_RESET;
        if set & status::FEATURES_OK != 0 && !self.features_agree() {
            self.rings.status &= !status::FEATURES_OK;
        }
        if set & status::DRIVER_OK != 0 {
            // A legacy driver never says FEATURES_OK: what it wrote is what it took.
            self.device.start(&self.rings);
        }
    }

    fn features_agree(&self) -> bool {
        self.rings.driver_features & !self.features == 0 && self.rings.has(feature::VERSION_1)
    }

    fn start_reset(&mut self) {
        for r in &mut self.rings.rings {
            r.queue.set_ready(false);
        }
        if self.device.in_flight() == 0 {
            self.finish_reset();
        } else {
            self.reset_waits = true;
        }
    }

    fn finish_reset(&mut self) {
        self.reset_waits = false;
        self.rings.reset();
        self.device.reset();
        (self.device_feature_select, self.driver_feature_select, self.queue_select) = (0, 0, 0);
        self.config.set_interrupt_status(false);
    }

    // ---- modern interface -------------------------------------------------------------------------------

    fn modern_load(&mut self, offset: u64, width: Width) -> u64 {
        match offset & !(PAGE - 1) {
            COMMON_AT => self.common_load(offset, width),
            ISR_AT if offset == ISR_AT => u64::from(self.rings.take_isr()),
            DEVICE_AT => self.device_config(offset - DEVICE_AT, width),
            _ => 0,
        }
    }

    fn modern_store(&mut self, offset: u64, width: Width, value: u64) {
        match offset & !(PAGE - 1) {
            NOTIFY_AT => self.doorbell((offset - NOTIFY_AT) / u64::from(NOTIFY_MULTIPLIER)),
            COMMON_AT => self.common_store(offset, width, value),
            DEVICE_AT => self.store_device_config(offset - DEVICE_AT, width, value),
            _ => {}
        }
    }

    fn selected(&mut self) -> Option<&mut super::rings::Ring> {
        self.rings.rings.get_mut(usize::from(self.queue_select))
    }

    fn common_load(&mut self, offset: u64, width: Width) -> u64 {
        use common::*;
        match offset {
            DEVICE_FEATURE_SELECT => u64::from(self.device_feature_select),
            DEVICE_FEATURE => half(self.features, self.device_feature_select),
            DRIVER_FEATURE_SELECT => u64::from(self.driver_feature_select),
            DRIVER_FEATURE => half(self.rings.driver_features, self.driver_feature_select),
            CONFIG_MSIX_VECTOR => u64::from(self.rings.config_vector),
            NUM_QUEUES => self.rings.rings.len() as u64,
            DEVICE_STATUS => u64::from(self.rings.status),
            // The configuration never changes behind the driver's back.
            CONFIG_GENERATION => 0,
            QUEUE_SELECT => u64::from(self.queue_select),
            _ => self.queue_load(offset, width),
        }
    }

    fn queue_load(&mut self, offset: u64, width: Width) -> u64 {
        use common::*;
        let notify_off = u64::from(self.queue_select);
        let Some(r) = self.selected() else { return 0 };
        let q = &r.queue;
        let address = |base: u64, value: u64| value >> (8 * (offset - base)) & width.mask();
        match offset {
            QUEUE_SIZE => u64::from(q.size()),
            QUEUE_MSIX_VECTOR => u64::from(r.vector),
            QUEUE_ENABLE => u64::from(q.ready()),
            QUEUE_NOTIFY_OFF => notify_off,
            QUEUE_DESC..QUEUE_DRIVER => address(QUEUE_DESC, q.desc_table()),
            QUEUE_DRIVER..QUEUE_DEVICE => address(QUEUE_DRIVER, q.avail_ring()),
            QUEUE_DEVICE..56 => address(QUEUE_DEVICE, q.used_ring()),
            _ => 0,
        }
    }

    fn common_store(&mut self, offset: u64, width: Width, value: u64) {
        use common::*;
        match offset {
            DEVICE_FEATURE_SELECT => self.device_feature_select = value as u32,
            DRIVER_FEATURE_SELECT => self.driver_feature_select = value as u32,
            DRIVER_FEATURE => self.store_features(self.driver_feature_select, value as u32),
            CONFIG_MSIX_VECTOR => self.rings.config_vector = self.vector(value as u16),
            DEVICE_STATUS => self.write_status(value as u8),
            QUEUE_SELECT => self.queue_select = value as u16,
            QUEUE_ENABLE if value as u16 == 1 && !self.reset_waits => {
                self.rings.enable(usize::from(self.queue_select));
            }
            QUEUE_MSIX_VECTOR => {
                let vector = self.vector(value as u16);
                if let Some(r) = self.selected() {
                    r.vector = vector;
                }
            }
            _ => self.queue_store(offset, width, value),
        }
    }

    /// Size and addresses may change only while the queue is off.
    fn queue_store(&mut self, offset: u64, width: Width, value: u64) {
        use common::*;
        let Some(r) = self.selected().filter(|r| !r.queue.ready()) else { return };
        let q = &mut r.queue;
        let low = (offset & 4 == 0).then_some(value as u32);
        let high = match width {
            Width::W64 => Some((value >> 32) as u32),
            _ => (offset & 4 != 0).then_some(value as u32),
        };
        match (offset & !7, width) {
            (QUEUE_SIZE, _) if offset == QUEUE_SIZE => q.set_size(value as u16),
            (QUEUE_DESC, Width::W32 | Width::W64) => q.set_desc_table_address(low, high),
            (QUEUE_DRIVER, Width::W32 | Width::W64) => q.set_avail_ring_address(low, high),
            (QUEUE_DEVICE, Width::W32 | Width::W64) => q.set_used_ring_address(low, high),
            _ => {}
        }
    }

    fn store_features(&mut self, select: u32, value: u32) {
        if self.rings.status & (status::FEATURES_OK | status::DRIVER_OK) != 0 || select > 1 {
            return;
        }
        let shift = 32 * select;
        let kept = self.rings.driver_features & !(0xFFFF_FFFF << shift);
        self.rings.driver_features = kept | u64::from(value) << shift;
    }

    fn vector(&self, value: u16) -> u16 {
        if value < self.rings.msix.vectors() { value } else { NO_VECTOR }
    }

    fn device_config(&self, offset: u64, width: Width) -> u64 {
        let c = self.device.config();
        (0..width.bytes()).fold(0, |v, i| {
            let b = c.get(offset as usize + i).copied().unwrap_or(0);
            v | u64::from(b) << (8 * i)
        })
    }

    fn store_device_config(&mut self, offset: u64, width: Width, value: u64) {
        for i in 0..width.bytes() as u64 {
            self.device.config_store(&self.rings, offset + i, (value >> (8 * i)) as u8);
        }
    }

    // ---- legacy interface -------------------------------------------------------------------------------

    fn legacy_config_at(&self) -> u64 {
        legacy::CONFIG + if self.rings.msix.enabled() { 4 } else { 0 }
    }

    fn legacy_load(&mut self, offset: u64, width: Width) -> u64 {
        let config = self.legacy_config_at();
        if offset >= config {
            return self.device_config(offset - config, width);
        }
        match offset {
            legacy::DEVICE_FEATURES => self.features & 0xFFFF_FFFF,
            legacy::GUEST_FEATURES => self.rings.driver_features & 0xFFFF_FFFF,
            legacy::QUEUE_ADDRESS => self
                .selected()
                .map_or(0, |r| if r.queue.ready() { r.queue.desc_table() >> legacy::PAGE_SHIFT } else { 0 }),
            legacy::QUEUE_SIZE => self.selected().map_or(0, |r| u64::from(r.queue.max_size())),
            legacy::QUEUE_SELECT => u64::from(self.queue_select),
            legacy::DEVICE_STATUS => u64::from(self.rings.status),
            legacy::ISR_STATUS => u64::from(self.rings.take_isr()),
            legacy::CONFIG_MSIX_VECTOR => u64::from(self.rings.config_vector),
            legacy::QUEUE_MSIX_VECTOR => {
                self.selected().map_or(u64::from(NO_VECTOR), |r| u64::from(r.vector))
            }
            _ => 0,
        }
    }

    fn legacy_store(&mut self, offset: u64, width: Width, value: u64) {
        let config = self.legacy_config_at();
        if offset >= config {
            self.store_device_config(offset - config, width, value);
            return;
        }
        match offset {
            // What was not offered cannot be taken; there is no FEATURES_OK to say so.
            legacy::GUEST_FEATURES => self.store_features(0, value as u32 & self.features as u32),
            legacy::QUEUE_ADDRESS => self.legacy_queue(value as u32),
            legacy::QUEUE_SELECT => self.queue_select = value as u16,
            legacy::QUEUE_NOTIFY => self.doorbell(value & 0xFFFF),
            legacy::DEVICE_STATUS => self.write_status(value as u8),
            legacy::CONFIG_MSIX_VECTOR => self.rings.config_vector = self.vector(value as u16),
            legacy::QUEUE_MSIX_VECTOR => {
                let vector = self.vector(value as u16);
                if let Some(r) = self.selected() {
                    r.vector = vector;
                }
            }
            _ => {}
        }
    }

    /// Descriptors, available ring, and on the next page the used ring (section 2.7.2).
    fn legacy_queue(&mut self, page: u32) {
        if self.reset_waits {
            self.finish_reset();
        }
        let index = usize::from(self.queue_select);
        let Some(r) = self.selected() else { return };
        let q = &mut r.queue;
        q.set_ready(false);
        if page == 0 {
            q.reset();
            return;
        }
        let size = u64::from(q.max_size());
        let descriptors = u64::from(page) << legacy::PAGE_SHIFT;
        let available = descriptors + 16 * size;
        let used = (available + 6 + 2 * size).next_multiple_of(1 << legacy::PAGE_SHIFT);
        let halves = |a: u64| (Some(a as u32), Some((a >> 32) as u32));
        let (low, high) = halves(descriptors);
        q.set_desc_table_address(low, high);
        let (low, high) = halves(available);
        q.set_avail_ring_address(low, high);
        let (low, high) = halves(used);
        q.set_used_ring_address(low, high);
        self.rings.enable(index);
    }

    // ---- configuration access capability ----------------------------------------------------------------

    /// The BAR access that the capability describes now.
    fn window(&self) -> Option<(u8, u64, Width)> {
        let at = self.pci_capability;
        let offset = u64::from(self.config.load(at + PCI_CAP_OFFSET, Width::W32));
        let length = self.config.load(at + PCI_CAP_LENGTH, Width::W32) as usize;
        let width = Width::from_bytes(length).filter(|w| *w != Width::W64)?;
        let bar = self.config.byte(at + PCI_CAP_BAR);
        let inside = self.config.bar_len(bar).is_some_and(|len| offset + length as u64 <= len);
        (inside && offset.is_multiple_of(length as u64)).then_some((bar, offset, width))
    }

    fn is_window(&self, offset: u8) -> bool {
        let at = self.pci_capability + PCI_CAP_DATA;
        (at..at + 4).contains(&offset)
    }
}

/// One 32-bit half of a feature set.
fn half(features: u64, select: u32) -> u64 {
    if select > 1 { 0 } else { features >> (32 * select) & 0xFFFF_FFFF }
}

fn configuration(
    device: &dyn VirtioDevice,
    options: VirtioPciOptions,
    msix: &mut MsixTable,
) -> (PciConfig, u8) {
    let kind = device.device_type();
    let (id, revision, subsystem) = if options.modern_only {
        (MODERN_DEVICE_BASE + kind, 1, 0x40 | kind)
    } else {
        (device.transitional_id(), 0, kind)
    };
    let mut c = PciConfig::new(PciIdentity {
        vendor: VENDOR,
        device: id,
        class: device.class(),
        revision,
        subsystem: (VENDOR, subsystem),
    });
    if !options.modern_only {
        c.set_bar(LEGACY_BAR, BarKind::Io, LEGACY_LEN);
    }
    c.set_bar(MSIX_BAR, BarKind::Memory32, MSIX_LEN);
    c.set_bar(MODERN_BAR, BarKind::Memory64 { prefetchable: true }, MODERN_LEN);
    c.set_interrupt_pin(0);
    msix.add_capability(&mut c, MSIX_BAR, 0, PBA_AT as u32);
    let mut add = |kind, at: u64, len: u64, extra: &[u8]| {
        let mut body = vec![16 + extra.len() as u8, kind, MODERN_BAR, 0, 0, 0];
        body.extend_from_slice(&(at as u32).to_le_bytes());
        body.extend_from_slice(&(len as u32).to_le_bytes());
        body.extend_from_slice(extra);
        c.add_capability(VENDOR_CAPABILITY, &body)
    };
    add(capability::COMMON, COMMON_AT, PAGE, &[]);
    add(capability::ISR, ISR_AT, PAGE, &[]);
    if !device.config().is_empty() {
        add(capability::DEVICE, DEVICE_AT, PAGE, &[]);
    }
    add(capability::NOTIFY, NOTIFY_AT, PAGE, &NOTIFY_MULTIPLIER.to_le_bytes());
    let at = add(capability::PCI, 0, 0, &[0; 4]);
    c.allow_writes(at + PCI_CAP_BAR, &[0xFF]);
    c.allow_writes(at + PCI_CAP_OFFSET, &[0xFF; 8]);
    (c, at)
}

impl Inspect for VirtioPci {
    fn inspect(&self, field: &mut dyn FnMut(&str, &dyn fmt::Display)) {
        field("status", &format_args!("{:#04x}", self.rings.status));
        field("features", &format_args!("{:#x}", self.rings.driver_features));
        field("in flight", &self.device.in_flight());
        for (i, r) in self.rings.rings.iter().enumerate() {
            let (next_avail, next_used) = (r.queue.next_avail(), r.queue.next_used());
            let state = format!("ready {} avail {next_avail} used {next_used}", r.queue.ready());
            field(&format!("queue {i}"), &state);
        }
    }
}

/// Saved while the back end has nothing in hand.
impl Snapshot for VirtioPci {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        let VirtioPci {
            label: _,
            config,
            rings,
            device,
            features: _,
            legacy: _,
            pci_capability: _,
            doorbell_watch: _,
            reset_waits,
            device_feature_select,
            driver_feature_select,
            queue_select,
        } = self;
        if device.in_flight() != 0 && !s.loads() {
            return Err(StateError::Busy("a virtio device"));
        }
        s.field("config", config)?;
        s.field("rings", rings)?;
        s.field("device", device)?;
        s.field("reset_waits", reset_waits)?;
        s.field("device_feature_select", device_feature_select)?;
        s.field("driver_feature_select", driver_feature_select)?;
        s.field("queue_select", queue_select)
    }
}

impl Device for VirtioPci {
    fn label(&self) -> &str {
        &self.label
    }

    /// Abandons what is in flight: drain the back end first, so that no data lands in memory afterwards.
    fn reset(&mut self, _kind: ResetKind) {
        self.config.reset();
        self.rings.msix.reset();
        self.finish_reset();
    }

    fn as_snapshot(&mut self) -> Option<&mut dyn Snapshot> {
        Some(self)
    }
}

impl PciDevice for VirtioPci {
    fn config(&self) -> &PciConfig {
        &self.config
    }

    fn config_mut(&mut self) -> &mut PciConfig {
        &mut self.config
    }

    fn bar_load(&mut self, bar: u8, offset: u64, width: Width) -> u64 {
        match bar {
            MODERN_BAR => self.modern_load(offset, width),
            LEGACY_BAR if self.legacy => self.legacy_load(offset, width),
            MSIX_BAR if offset >= PBA_AT => self.rings.msix.pba_load(offset - PBA_AT, width),
            MSIX_BAR => self.rings.msix.load(offset, width),
            _ => width.mask(),
        }
    }

    fn bar_store(&mut self, bar: u8, offset: u64, width: Width, value: u64) {
        match bar {
            MODERN_BAR => self.modern_store(offset, width, value),
            LEGACY_BAR if self.legacy => self.legacy_store(offset, width, value),
            MSIX_BAR if offset < PBA_AT => self.rings.msix.store(offset, width, value),
            _ => {}
        }
    }

    fn config_load(&mut self, offset: u8, width: Width) -> u32 {
        if self.is_window(offset) {
            return self.window().map_or(0, |(bar, at, width)| self.bar_load(bar, at, width) as u32);
        }
        self.config.set_interrupt_status(self.rings.isr != 0);
        self.config.load(offset, width)
    }

    fn config_store(&mut self, offset: u8, width: Width, value: u32) {
        if self.is_window(offset) {
            if let Some((bar, at, width)) = self.window() {
                self.bar_store(bar, at, width, u64::from(value) & width.mask());
            }
            return;
        }
        self.config.store(offset, width, value);
        self.rings.msix.config_written(&self.config);
        self.rings.intx_disabled = self.config.command() & command::INTX_DISABLE != 0;
        self.rings.drive_intx();
    }
}

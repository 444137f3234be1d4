//! virtio-blk over PCI, the modern interface (virtio 1.2: 2.7 split virtqueues, 4.1 PCI, 5.2 block device).
//!
//! Invariants: the device sees no memory but [`SHARED`] and the buffers of a [`Plan`]; a slot's header, status and descriptors
//! change only while the device does not own them; all shared fields are read and written by volatile accesses.

use crate::cell::Fixed;
use crate::shared::MAX_DEPTH;
use crate::work::{Direction, Operation, Plan, Storage};
use crate::{irq, pci};
use core::sync::atomic::{Ordering, fence};

const VENDOR: u32 = 0x1AF4;
const BLOCK_TRANSITIONAL: u32 = 0x1001;
const BLOCK: u32 = 0x1042;

const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;
const MSIX_ENABLE: u32 = 1 << 31;
const MSIX_FUNCTION_MASK: u32 = 1 << 30;
const MSI_ADDRESS: u32 = 0xFEE0_0000;

const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;

const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0C;
const CONFIG_MSIX_VECTOR: u64 = 0x10;
const DEVICE_STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_MSIX_VECTOR: u64 = 0x1A;
const QUEUE_ENABLE: u64 = 0x1C;
const QUEUE_NOTIFY_OFF: u64 = 0x1E;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;
const NO_VECTOR: u16 = 0xFFFF;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;

/// VIRTIO_BLK_F_FLUSH: the disk has a write cache, as an IDE disk has; without it every write would go to stable storage.
const F_FLUSH: u64 = 1 << 9;
const F_INDIRECT_DESC: u64 = 1 << 28;
const F_EVENT_IDX: u64 = 1 << 29;
const F_VERSION_1: u64 = 1 << 32;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;
const USED_NO_NOTIFY: u16 = 1;

const BLK_IN: u32 = 0;
const BLK_OUT: u32 = 1;
const BLK_OK: u8 = 0;

const RING: usize = 128;
const SLOTS: usize = MAX_DEPTH as usize;
/// Descriptors per request: header, data, status.
const CHAIN: usize = 3;

#[derive(Clone, Copy)]
#[repr(C)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct UsedElement {
    id: u32,
    len: u32,
}

#[repr(C)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

/// Everything that the device reads or writes besides the data. Descriptors `3 * slot..` belong to request `slot`.
#[repr(C)]
struct Shared {
    desc: [Descriptor; RING],
    avail_flags: u16,
    avail_idx: u16,
    avail_ring: [u16; RING],
    used_event: u16,
    _pad: u16,
    used_flags: u16,
    used_idx: u16,
    used_ring: [UsedElement; RING],
    avail_event: u16,
    header: [Header; SLOTS],
    indirect: [[Descriptor; CHAIN]; SLOTS],
    status: [u8; SLOTS],
}

const NO_DESC: Descriptor = Descriptor { addr: 0, len: 0, flags: 0, next: 0 };

static SHARED: Fixed<Shared> = Fixed::new(Shared {
    desc: [NO_DESC; RING],
    avail_flags: 0,
    avail_idx: 0,
    avail_ring: [0; RING],
    used_event: 0,
    _pad: 0,
    used_flags: 0,
    used_idx: 0,
    used_ring: [UsedElement { id: 0, len: 0 }; RING],
    avail_event: 0,
    header: [const { Header { kind: 0, reserved: 0, sector: 0 } }; SLOTS],
    indirect: [[NO_DESC; CHAIN]; SLOTS],
    status: [0; SLOTS],
});

const _: () = assert!(core::mem::offset_of!(Shared, avail_flags).is_multiple_of(2));
const _: () = assert!(core::mem::offset_of!(Shared, used_flags).is_multiple_of(4));
const _: () = assert!(core::mem::offset_of!(Shared, header).is_multiple_of(8));

/// Volatile access to a field of [`SHARED`].
macro_rules! shared {
    ($($field:tt)+) => {
        (&raw mut (*SHARED.get()).$($field)+)
    };
}

/// A register block of the device.
#[derive(Clone, Copy)]
struct Registers(u64);

macro_rules! register {
    ($read:ident, $write:ident, $type:ty) => {
        fn $read(self, at: u64) -> $type {
            // SAFETY: a BAR's memory, mapped one to one.
            unsafe { ((self.0 + at) as *const $type).read_volatile() }
        }
        fn $write(self, at: u64, value: $type) {
            // SAFETY: as above.
            unsafe { ((self.0 + at) as *mut $type).write_volatile(value) }
        }
    };
}

impl Registers {
    register!(read8, write8, u8);
    register!(read16, write16, u16);
    register!(read32, write32, u32);

    fn write64(self, at: u64, value: u64) {
        self.write32(at, value as u32);
        self.write32(at + 4, (value >> 32) as u32);
    }
}

/// A virtio block device.
pub struct Disk {
    common: Registers,
    notify: Registers,
    vector: u8,
    sectors: u64,
    ring: u16,
    indirect: bool,
    event_idx: bool,
    /// Our copies of the indices.
    avail: u16,
    used: u16,
}

impl Disk {
    /// Block device `index` in bus order, reset and set up with one queue.
    pub fn open(index: u8) -> Option<Disk> {
        let is_block =
            |f: &pci::Function| f.id() == BLOCK << 16 | VENDOR || f.id() == BLOCK_TRANSITIONAL << 16 | VENDOR;
        let function = pci::functions().filter(is_block).nth(usize::from(index))?;
        let common = Registers(block(function, CFG_COMMON)?.0);
        let (notify, multiplier) = block(function, CFG_NOTIFY)?;
        let config = Registers(block(function, CFG_DEVICE)?.0);
        let features = negotiate(common)?;
        let (vector, queue_vector) = route_interrupt(function)?;
        common.write16(CONFIG_MSIX_VECTOR, NO_VECTOR);
        let ring = set_up_queue(common, queue_vector)?;
        let offset = u64::from(common.read16(QUEUE_NOTIFY_OFF)) * u64::from(multiplier);
        common.write8(DEVICE_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        let sectors = u64::from(config.read32(0)) | u64::from(config.read32(4)) << 32;
        irq::forget(vector);
        Some(Disk {
            common,
            notify: Registers(notify + offset),
            vector,
            sectors,
            ring,
            indirect: features & F_INDIRECT_DESC != 0,
            event_idx: features & F_EVENT_IDX != 0,
            avail: 0,
            used: 0,
        })
    }

    /// Offers operation `op` in `slot` to the device.
    fn submit(&mut self, slot: usize, op: &Operation, direction: Direction) {
        let kind = if direction == Direction::Read { BLK_IN } else { BLK_OUT };
        let len = (op.sectors * crate::shared::SECTOR) as u32;
        let data_flags = if direction == Direction::Read { DESC_NEXT | DESC_WRITE } else { DESC_NEXT };
        // SAFETY: `slot` is free, so the device does not look at its header, status or descriptors.
        unsafe {
            shared!(header[slot]).write_volatile(Header { kind, reserved: 0, sector: op.lba });
            shared!(status[slot]).write_volatile(0xFF);
            let header = shared!(header[slot]) as u64;
            let status = shared!(status[slot]) as u64;
            let base = if self.indirect { 0 } else { CHAIN * slot };
            let chain = [
                Descriptor { addr: header, len: 16, flags: DESC_NEXT, next: base as u16 + 1 },
                Descriptor { addr: op.buffer, len, flags: data_flags, next: base as u16 + 2 },
                Descriptor { addr: status, len: 1, flags: DESC_WRITE, next: 0 },
            ];
            let head = if self.indirect {
                shared!(indirect[slot]).write_volatile(chain);
                let table = Descriptor {
                    addr: shared!(indirect[slot]) as u64,
                    len: size_of_val(&chain) as u32,
                    flags: DESC_INDIRECT,
                    next: 0,
                };
                shared!(desc[slot]).write_volatile(table);
                slot
            } else {
                for (i, descriptor) in chain.into_iter().enumerate() {
                    shared!(desc[base + i]).write_volatile(descriptor);
                }
                base
            };
            shared!(avail_ring[usize::from(self.avail % self.ring)]).write_volatile(head as u16);
        }
        self.avail = self.avail.wrapping_add(1);
    }

    /// Publishes everything submitted since `old` and rings the doorbell if the device wants it.
    fn publish(&self, old: u16) {
        fence(Ordering::Release);
        // SAFETY: the index is ours; the others are only read.
        let wanted = unsafe {
            shared!(avail_idx).write_volatile(self.avail);
            fence(Ordering::SeqCst);
            if self.event_idx {
                let event = self.avail_event().read_volatile();
                self.avail.wrapping_sub(event).wrapping_sub(1) < self.avail.wrapping_sub(old)
            } else {
                shared!(used_flags).read_volatile() & USED_NO_NOTIFY == 0
            }
        };
        if wanted {
            self.notify.write16(0, 0);
        }
    }

    /// The event index fields lie behind the ring in use, which may be shorter than the array.
    fn used_event(&self) -> *mut u16 {
        // SAFETY: the fields follow each other; `ring` is at most the array's length.
        unsafe { shared!(avail_ring).cast::<u16>().add(usize::from(self.ring)) }
    }

    fn avail_event(&self) -> *mut u16 {
        // SAFETY: as above.
        unsafe { shared!(used_ring).cast::<UsedElement>().add(usize::from(self.ring)).cast() }
    }

    /// The next finished slot and whether it went well.
    fn finished(&mut self) -> Option<(usize, bool)> {
        // SAFETY: reads what the device wrote.
        unsafe {
            if shared!(used_idx).read_volatile() == self.used {
                return None;
            }
            fence(Ordering::Acquire);
            let element = shared!(used_ring[usize::from(self.used % self.ring)]).read_volatile();
            self.used = self.used.wrapping_add(1);
            let per_slot = if self.indirect { 1 } else { CHAIN };
            let slot = element.id as usize / per_slot % SLOTS;
            Some((slot, shared!(status[slot]).read_volatile() == BLK_OK))
        }
    }

    /// Asks for an interrupt at the next finished request; true if nothing was finished in the meantime.
    fn arm(&self) -> bool {
        if self.event_idx {
            // SAFETY: ours to write.
            unsafe { self.used_event().write_volatile(self.used) };
        }
        fence(Ordering::SeqCst);
        // SAFETY: reads what the device wrote.
        unsafe { shared!(used_idx).read_volatile() == self.used }
    }
}

/// Takes the rings away from the device: the next one uses the same memory.
impl Drop for Disk {
    fn drop(&mut self) {
        reset(self.common);
    }
}

impl Storage for Disk {
    fn sectors(&self) -> u64 {
        self.sectors
    }

    fn run(&mut self, plan: &Plan<'_>, direction: Direction, depth: u32) -> u64 {
        let fitting = if self.indirect { self.ring } else { self.ring / CHAIN as u16 };
        let depth = u64::from(depth.min(u32::from(fitting)).max(1));
        let (mut next, mut done, mut failed) = (0, 0, 0);
        let mut free: [usize; SLOTS] = core::array::from_fn(|slot| slot);
        let mut free_count = depth as usize;
        self.arm();
        while done < plan.len() {
            let old = self.avail;
            while free_count > 0 && next < plan.len() {
                free_count -= 1;
                self.submit(free[free_count], &plan.operation(next), direction);
                next += 1;
            }
            if self.avail != old {
                self.publish(old);
            }
            // As in an operating system: completions are looked for after an interrupt, until none is left, and what
            // they make room for is submitted when the interrupt is over.
            irq::wait(self.vector);
            loop {
                while let Some((slot, ok)) = self.finished() {
                    done += 1;
                    failed += u64::from(!ok);
                    free[free_count % SLOTS] = slot;
                    free_count += 1;
                }
                if self.arm() {
                    break;
                }
            }
        }
        failed
    }
}

/// The register block of type `kind` (4.1.4): its address, and the notify multiplier that follows the capability.
fn block(function: pci::Function, kind: u8) -> Option<(u64, u32)> {
    let at = function.capabilities(CAP_VENDOR).find(|&at| (function.read(at) >> 24) as u8 == kind)?;
    let bar = function.read(at + 4) as u8;
    if bar > 5 {
        return None;
    }
    let address = function.bar(bar) + u64::from(function.read(at + 8));
    Some((address, function.read(at + 16)))
}

fn reset(common: Registers) {
    common.write8(DEVICE_STATUS, 0);
    while common.read8(DEVICE_STATUS) != 0 {}
}

/// Reset and feature negotiation (3.1.1).
fn negotiate(common: Registers) -> Option<u64> {
    reset(common);
    common.write8(DEVICE_STATUS, ACKNOWLEDGE | DRIVER);
    let mut offered = 0;
    for half in 0..2 {
        common.write32(DEVICE_FEATURE_SELECT, half);
        offered |= u64::from(common.read32(DEVICE_FEATURE)) << (32 * half);
    }
    let wanted = offered & (F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC | F_FLUSH);
    for half in 0..2 {
        common.write32(DRIVER_FEATURE_SELECT, half);
        common.write32(DRIVER_FEATURE, (wanted >> (32 * half)) as u32);
    }
    common.write8(DEVICE_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    (common.read8(DEVICE_STATUS) & FEATURES_OK != 0).then_some(wanted)
}

/// MSI-X vector 0 where there is MSI-X, else the PCI line. Returns the CPU vector and the queue's MSI-X vector.
fn route_interrupt(function: pci::Function) -> Option<(u8, u16)> {
    let Some(msix) = function.capabilities(CAP_MSIX).next() else {
        let line = function.interrupt_line();
        irq::set_level_triggered(line);
        irq::set_isr(block(function, CFG_ISR)?.0);
        return Some((irq::unmask(line), NO_VECTOR));
    };
    let table = function.read(msix + 4);
    let entry = Registers(function.bar(table as u8 & 7) + u64::from(table & !7));
    let control = function.read(msix);
    function.write(msix, control & !MSIX_FUNCTION_MASK | MSIX_ENABLE);
    entry.write32(0, MSI_ADDRESS);
    entry.write32(4, 0);
    entry.write32(8, u32::from(irq::MSI_VECTOR));
    entry.write32(12, 0);
    Some((irq::MSI_VECTOR, 0))
}

/// Queue 0, all zero, as long as device and memory allow; returns its length.
fn set_up_queue(common: Registers, vector: u16) -> Option<u16> {
    common.write16(QUEUE_SELECT, 0);
    let ring = common.read16(QUEUE_SIZE).min(RING as u16);
    if ring < CHAIN as u16 {
        return None;
    }
    common.write16(QUEUE_SIZE, ring);
    common.write16(QUEUE_MSIX_VECTOR, vector);
    if common.read16(QUEUE_MSIX_VECTOR) != vector {
        return None;
    }
    // SAFETY: the device was reset and uses none of it; an all-zero `Shared` is valid.
    unsafe {
        SHARED.get().write_bytes(0, 1);
        common.write64(QUEUE_DESC, shared!(desc) as u64);
        common.write64(QUEUE_DRIVER, shared!(avail_flags) as u64);
        common.write64(QUEUE_DEVICE, shared!(used_flags) as u64);
    }
    common.write16(QUEUE_ENABLE, 1);
    Some(ring)
}

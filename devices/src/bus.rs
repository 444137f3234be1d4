//! The bus: which device answers at a port or a physical address.
//!
//! Claims come and go while vCPUs run (a guest moves a BAR). A look-up takes the map's read lock, copies one
//! `Arc` and lets go before the device runs, so a device access may itself remap the bus. Where claims overlap
//! the earliest one answers; the others show through once it is released.

use crate::counters::{Counter, Counters};
use crate::device::DeviceHandle;
use paravane_memory::{PhysAddr, Port, Width};
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

const PORTS: usize = 0x1_0000;

/// A device as attached to the bus: its handle and its counters.
#[derive(Clone)]
pub struct BusDevice {
    handle: DeviceHandle,
    counts: Arc<AccessCounts>,
    label: Arc<str>,
}

impl BusDevice {
    /// The device.
    pub fn handle(&self) -> &DeviceHandle {
        &self.handle
    }
}

impl fmt::Debug for BusDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BusDevice").finish_non_exhaustive()
    }
}

struct AccessCounts {
    pio_in: Counter,
    pio_out: Counter,
    mmio_load: Counter,
    mmio_store: Counter,
}

impl AccessCounts {
    fn new(counters: &Counters, group: &str, prefix: &str) -> AccessCounts {
        let counter = |name: &str| counters.counter(group, &format!("{prefix}{name}"));
        AccessCounts {
            pio_in: counter("pio_in"),
            pio_out: counter("pio_out"),
            mmio_load: counter("mmio_load"),
            mmio_store: counter("mmio_store"),
        }
    }
}

/// Names a claimed range, to release it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Claim(u64);

/// One claimed range of one address space.
struct Range {
    id: u64,
    /// First address.
    first: u64,
    /// Last address, inclusive.
    last: u64,
    /// What the device sees is `address - first + offset`.
    offset: u64,
    /// The widest access the device takes here.
    widest: Width,
    device: BusDevice,
}

impl Range {
    fn covers(&self, at: u64) -> bool {
        (self.first..=self.last).contains(&at)
    }
}

/// A piece of the address space and who answers there; pieces are disjoint and sorted.
#[derive(Clone)]
struct Piece {
    first: u64,
    last: u64,
    range: Arc<Range>,
}

struct Maps {
    next_id: u64,
    ports: Vec<Arc<Range>>,
    /// For each port: 0, or 1 + the index in `ports` of the claim that answers.
    port_index: Vec<u16>,
    mmio: Vec<Arc<Range>>,
    pieces: Vec<Piece>,
}

impl Maps {
    fn take_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn index_ports(&mut self) {
        self.port_index.fill(0);
        for (i, range) in self.ports.iter().enumerate().rev() {
            let (first, last) = (range.first as usize, range.last as usize);
            self.port_index[first..=last].fill(i as u16 + 1);
        }
    }

    fn index_mmio(&mut self) {
        let mut edges: Vec<u64> = Vec::with_capacity(self.mmio.len() * 2);
        for range in &self.mmio {
            edges.push(range.first);
            edges.extend(range.last.checked_add(1));
        }
        edges.sort_unstable();
        edges.dedup();
        self.pieces.clear();
        for (i, &first) in edges.iter().enumerate() {
            let last = edges.get(i + 1).map_or(u64::MAX, |next| next - 1);
            let Some(range) = self.mmio.iter().find(|r| r.covers(first)) else { continue };
            match self.pieces.last_mut() {
                Some(p) if p.last.checked_add(1) == Some(first) && Arc::ptr_eq(&p.range, range) => {
                    p.last = last
                }
                _ => self.pieces.push(Piece { first, last, range: Arc::clone(range) }),
            }
        }
    }
}

/// What a look-up found: who answers, or nobody.
enum Found {
    /// The claim, and the port or offset as its device sees it.
    Device(Arc<Range>, u64),
    Nobody,
}

/// The ports and the physical addresses that are neither RAM nor ROM.
pub struct Bus {
    maps: RwLock<Maps>,
    counters: Counters,
    unclaimed: AccessCounts,
}

impl Bus {
    /// An empty bus that counts into `counters`.
    pub fn new(counters: &Counters) -> Arc<Bus> {
        let maps = Maps {
            next_id: 0,
            ports: Vec::new(),
            port_index: vec![0; PORTS],
            mmio: Vec::new(),
            pieces: Vec::new(),
        };
        Arc::new(Bus {
            maps: RwLock::new(maps),
            counters: counters.clone(),
            unclaimed: AccessCounts::new(counters, "bus", "unclaimed_"),
        })
    }

    /// Makes `device` known to the bus. Locks it once, for its label: call this outside of any device access.
    pub fn attach(&self, device: DeviceHandle) -> BusDevice {
        let label = device.lock().unwrap_or_else(PoisonError::into_inner).label().to_owned();
        self.attach_as(device, &label)
    }

    /// Like [`Bus::attach`], counting under `label` and never locking the device.
    pub fn attach_as(&self, device: DeviceHandle, label: &str) -> BusDevice {
        BusDevice {
            handle: device,
            counts: Arc::new(AccessCounts::new(&self.counters, label, "")),
            label: label.into(),
        }
    }

    /// Claims `count` ports from `first` (cut at the end of the port space); the device takes accesses up to
    /// `widest`, at most 32 bits.
    pub fn claim_ports(&self, device: &BusDevice, first: Port, count: u32, widest: Width) -> Claim {
        let first = u64::from(first.0);
        let last = (first + u64::from(count.max(1)) - 1).min(PORTS as u64 - 1);
        let mut maps = self.maps.write().unwrap_or_else(PoisonError::into_inner);
        let id = maps.take_id();
        maps.ports.push(Arc::new(Range { id, first, last, offset: first, widest, device: device.clone() }));
        maps.index_ports();
        Claim(id)
    }

    /// Claims `len` bytes of physical address space from `base`; the device sees offsets from 0.
    pub fn claim_mmio(&self, device: &BusDevice, base: PhysAddr, len: u64, widest: Width) -> Claim {
        self.claim_mmio_at(device, base, len, 0, widest)
    }

    /// Like [`Bus::claim_mmio`], but the device sees offsets from `offset`: how a device tells its regions apart.
    pub fn claim_mmio_at(
        &self,
        device: &BusDevice,
        base: PhysAddr,
        len: u64,
        offset: u64,
        widest: Width,
    ) -> Claim {
        let (first, last) = (base.0, base.0.saturating_add(len.max(1) - 1));
        let mut maps = self.maps.write().unwrap_or_else(PoisonError::into_inner);
        let id = maps.take_id();
        maps.mmio.push(Arc::new(Range { id, first, last, offset, widest, device: device.clone() }));
        maps.index_mmio();
        Claim(id)
    }

    /// Gives up a range; releasing twice does nothing.
    pub fn release(&self, claim: Claim) {
        let mut maps = self.maps.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(i) = maps.ports.iter().position(|r| r.id == claim.0) {
            maps.ports.remove(i);
            maps.index_ports();
        } else if let Some(i) = maps.mmio.iter().position(|r| r.id == claim.0) {
            maps.mmio.remove(i);
            maps.index_mmio();
        }
    }

    /// IN. Nobody there reads as all ones.
    pub fn port_in(&self, port: Port, width: Width) -> u32 {
        let mut value = 0u64;
        let mut done = 0;
        while done < width.bytes().min(4) {
            let at = (usize::from(port.0) + done) % PORTS;
            let left = width.bytes().min(4) - done;
            let (found, chunk) = self.find_port(at, left);
            let part = match found {
                Found::Device(range, seen) => {
                    range.device.counts.pio_in.add(1);
                    let mut device = range.device.handle.lock().unwrap_or_else(PoisonError::into_inner);
                    let pio = device.as_pio();
                    pio.map_or(u64::MAX, |p| u64::from(p.port_in(Port(seen as u16), chunk)))
                }
                Found::Nobody => {
                    self.unclaimed.pio_in.add(1);
                    u64::MAX
                }
            };
            value |= (part & chunk.mask()) << (done * 8);
            done += chunk.bytes();
        }
        value as u32
    }

    /// OUT. Nobody there: the value is lost.
    pub fn port_out(&self, port: Port, width: Width, value: u32) {
        let mut done = 0;
        while done < width.bytes().min(4) {
            let at = (usize::from(port.0) + done) % PORTS;
            let left = width.bytes().min(4) - done;
            let (found, chunk) = self.find_port(at, left);
            match found {
                Found::Device(range, seen) => {
                    range.device.counts.pio_out.add(1);
                    let part = (u64::from(value) >> (done * 8) & chunk.mask()) as u32;
                    let mut device = range.device.handle.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(pio) = device.as_pio() {
                        pio.port_out(Port(seen as u16), chunk, part);
                    }
                }
                Found::Nobody => self.unclaimed.pio_out.add(1),
            }
            done += chunk.bytes();
        }
    }

    /// REP INS: lets the device at `port` fill part of `buf` at once; the bytes filled, 0 if it cannot.
    pub fn port_in_string(&self, port: Port, width: Width, buf: &mut [u8]) -> usize {
        let Some((range, seen)) = self.find_string_port(port, width) else { return 0 };
        let mut device = range.device.handle.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(string) = device.as_string_pio() else { return 0 };
        let filled = string.pio_in_string(seen, width, buf).min(buf.len());
        range.device.counts.pio_in.add((filled / width.bytes()) as u64);
        filled
    }

    /// REP OUTS: lets the device at `port` take part of `buf` at once; the bytes taken, 0 if it cannot.
    pub fn port_out_string(&self, port: Port, width: Width, buf: &[u8]) -> usize {
        let Some((range, seen)) = self.find_string_port(port, width) else { return 0 };
        let mut device = range.device.handle.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(string) = device.as_string_pio() else { return 0 };
        let taken = string.pio_out_string(seen, width, buf).min(buf.len());
        range.device.counts.pio_out.add((taken / width.bytes()) as u64);
        taken
    }

    /// Who answers a whole unsplit access of `width` at `port`.
    fn find_string_port(&self, port: Port, width: Width) -> Option<(Arc<Range>, Port)> {
        match self.find_port(port.0.into(), width.bytes()) {
            (Found::Device(range, seen), chunk) if chunk == width => Some((range, Port(seen as u16))),
            _ => None,
        }
    }

    /// A load that no RAM or ROM answers. Nobody there reads as all ones.
    pub fn mmio_load(&self, at: PhysAddr, width: Width) -> u64 {
        let mut value = 0u64;
        let mut done = 0;
        while done < width.bytes() {
            let (found, chunk) = self.find_mmio(at.0.wrapping_add(done as u64), width.bytes() - done);
            let part = match found {
                Found::Device(range, seen) => {
                    range.device.counts.mmio_load.add(1);
                    let mut device = range.device.handle.lock().unwrap_or_else(PoisonError::into_inner);
                    device.as_mmio().map_or(u64::MAX, |m| m.mmio_load(seen, chunk))
                }
                Found::Nobody => {
                    self.unclaimed.mmio_load.add(1);
                    u64::MAX
                }
            };
            value |= (part & chunk.mask()) << (done * 8);
            done += chunk.bytes();
        }
        value
    }

    /// A store that no RAM or ROM takes. Nobody there: the value is lost.
    pub fn mmio_store(&self, at: PhysAddr, width: Width, value: u64) {
        let mut done = 0;
        while done < width.bytes() {
            let (found, chunk) = self.find_mmio(at.0.wrapping_add(done as u64), width.bytes() - done);
            match found {
                Found::Device(range, seen) => {
                    range.device.counts.mmio_store.add(1);
                    let mut device = range.device.handle.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(mmio) = device.as_mmio() {
                        mmio.mmio_store(seen, chunk, value >> (done * 8) & chunk.mask());
                    }
                }
                Found::Nobody => self.unclaimed.mmio_store.add(1),
            }
            done += chunk.bytes();
        }
    }

    /// The label of whoever answers at `port`.
    pub fn port_owner(&self, port: Port) -> Option<String> {
        match self.find_port(port.0.into(), 1).0 {
            Found::Device(range, _) => Some(range.device.label.to_string()),
            Found::Nobody => None,
        }
    }

    /// The label of whoever answers at `at`.
    pub fn mmio_owner(&self, at: PhysAddr) -> Option<String> {
        match self.find_mmio(at.0, 1).0 {
            Found::Device(range, _) => Some(range.device.label.to_string()),
            Found::Nobody => None,
        }
    }

    /// Whether some device answers at `at`.
    pub fn is_mmio_claimed(&self, at: PhysAddr) -> bool {
        matches!(self.find_mmio(at.0, 1).0, Found::Device(..))
    }

    fn find_port(&self, at: usize, left: usize) -> (Found, Width) {
        let maps = self.maps.read().unwrap_or_else(PoisonError::into_inner);
        let owner = maps.port_index[at];
        if owner == 0 {
            let same = maps.port_index[at..(at + left).min(PORTS)].iter().take_while(|&&o| o == 0).count();
            return (Found::Nobody, chunk(at as u64, same, Width::W32));
        }
        let range = &maps.ports[usize::from(owner) - 1];
        let same = maps.port_index[at..(at + left).min(PORTS)].iter().take_while(|&&o| o == owner).count();
        let width = chunk(at as u64, same, range.widest);
        (Found::Device(Arc::clone(range), at as u64 - range.first + range.offset), width)
    }

    fn find_mmio(&self, at: u64, left: usize) -> (Found, Width) {
        let maps = self.maps.read().unwrap_or_else(PoisonError::into_inner);
        let next = maps.pieces.partition_point(|p| p.first <= at);
        if let Some(piece) = next.checked_sub(1).map(|i| &maps.pieces[i]).filter(|p| at <= p.last) {
            let room = (piece.last - at).saturating_add(1).min(left as u64) as usize;
            let range = &piece.range;
            let seen = (at - range.first).wrapping_add(range.offset);
            return (Found::Device(Arc::clone(range), seen), chunk(at, room, range.widest));
        }
        let gap = maps.pieces.get(next).map_or(u64::MAX, |p| p.first - at);
        (Found::Nobody, chunk(at, gap.min(left as u64) as usize, Width::W64))
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let maps = self.maps.read().unwrap_or_else(PoisonError::into_inner);
        f.debug_struct("Bus").field("ports", &maps.ports.len()).field("mmio", &maps.mmio.len()).finish()
    }
}

/// The widest naturally aligned access at `at` of at most `room` bytes and `widest`.
fn chunk(at: u64, room: usize, widest: Width) -> Width {
    [Width::W64, Width::W32, Width::W16]
        .into_iter()
        .find(|w| w.bytes() <= room && *w <= widest && at.is_multiple_of(w.bytes() as u64))
        .unwrap_or(Width::W8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Device, Inspect, MmioDevice, PioDevice, ResetKind, share};

    /// Answers reads with the low byte of each address, logs what it sees, and may remap itself.
    #[derive(Default)]
    struct Probe {
        log: Vec<(u64, Width, u64)>,
        remap: Option<(Arc<Bus>, Claim)>,
    }

    impl Inspect for Probe {
        fn inspect(&self, _field: &mut dyn FnMut(&str, &dyn fmt::Display)) {}
    }

    impl Device for Probe {
        fn label(&self) -> &str {
            "probe"
        }
        fn reset(&mut self, _kind: ResetKind) {}
        fn as_pio(&mut self) -> Option<&mut dyn PioDevice> {
            Some(self)
        }
        fn as_mmio(&mut self) -> Option<&mut dyn MmioDevice> {
            Some(self)
        }
    }

    impl MmioDevice for Probe {
        fn mmio_load(&mut self, offset: u64, width: Width) -> u64 {
            self.log.push((offset, width, 0));
            (0..8).fold(0, |v, i| v | (offset.wrapping_add(i) & 0xFF) << (8 * i)) & width.mask()
        }
        fn mmio_store(&mut self, offset: u64, width: Width, value: u64) {
            self.log.push((offset, width, value));
            if let Some((bus, claim)) = self.remap.take() {
                bus.release(claim);
            }
        }
    }

    impl PioDevice for Probe {
        fn port_in(&mut self, port: Port, width: Width) -> u32 {
            self.mmio_load(u64::from(port.0), width) as u32
        }
        fn port_out(&mut self, port: Port, width: Width, value: u32) {
            self.mmio_store(u64::from(port.0), width, u64::from(value));
        }
    }

    #[test]
    fn wide_port_access_is_split_and_open_bus_is_ones() {
        let counters = Counters::default();
        let bus = Bus::new(&counters);
        let probe = share(Probe::default());
        let dev = bus.attach(probe.clone());
        let claim = bus.claim_ports(&dev, Port(0x60), 2, Width::W8);
        assert_eq!(bus.port_in(Port(0x60), Width::W32), 0xFFFF_6160);
        assert_eq!(bus.port_in(Port(0x5F), Width::W16), 0x60FF);
        assert_eq!(probe.lock().unwrap().log.len(), 3);
        bus.release(claim);
        assert_eq!(bus.port_in(Port(0x60), Width::W8), 0xFF);
        assert_eq!(bus.port_in(Port(0xFFFF), Width::W32), 0xFFFF_FFFF);
        let all = counters.snapshot();
        assert_eq!(all["probe"]["pio_in"], 3);
        assert_eq!(all["bus"]["unclaimed_pio_in"], 6);
    }

    #[test]
    fn mmio_goes_to_the_earliest_claim_and_shows_through_after_release() {
        let bus = Bus::new(&Counters::default());
        let (a, b) = (share(Probe::default()), share(Probe::default()));
        let (da, db) = (bus.attach(a.clone()), bus.attach_as(b.clone(), "b"));
        let first = bus.claim_mmio(&da, PhysAddr(0x1000), 0x10, Width::W64);
        bus.claim_mmio_at(&db, PhysAddr(0xFF8), 0x100, 0x40, Width::W32);
        assert_eq!(bus.mmio_load(PhysAddr(0x1008), Width::W64), 0x0F0E_0D0C_0B0A_0908);
        assert_eq!(bus.mmio_load(PhysAddr(0xFFC), Width::W64), 0x0302_0100_4746_4544);
        assert_eq!(b.lock().unwrap().log, [(0x44, Width::W32, 0)]);
        bus.release(first);
        assert_eq!(bus.mmio_load(PhysAddr(0x1000), Width::W16), 0x4948);
        assert_eq!(bus.mmio_load(PhysAddr(u64::MAX), Width::W64), u64::MAX);
    }

    #[test]
    fn a_device_may_remap_the_bus_while_it_runs() {
        let bus = Bus::new(&Counters::default());
        let probe = share(Probe::default());
        let dev = bus.attach(probe.clone());
        let claim = bus.claim_mmio(&dev, PhysAddr(0x2000), 0x1000, Width::W64);
        probe.lock().unwrap().remap = Some((Arc::clone(&bus), claim));
        bus.mmio_store(PhysAddr(0x2004), Width::W32, 0xABCD);
        assert!(!bus.is_mmio_claimed(PhysAddr(0x2004)));
        assert_eq!(probe.lock().unwrap().log, [(4, Width::W32, 0xABCD)]);
    }

    #[test]
    fn a_range_up_to_the_end_of_the_address_space_is_legal() {
        let bus = Bus::new(&Counters::default());
        let dev = bus.attach(share(Probe::default()));
        bus.claim_mmio(&dev, PhysAddr(u64::MAX - 0xFFF), u64::MAX, Width::W64);
        assert_eq!(bus.mmio_load(PhysAddr(u64::MAX), Width::W8), 0xFF);
        assert!(bus.is_mmio_claimed(PhysAddr(u64::MAX)));
    }
}

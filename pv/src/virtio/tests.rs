//! A hand-made driver against the devices, through the PCI function as the bus would use it.

use super::*;
use paravane_devices::block::{
    BlockCounters, BlockOp, BlockQueue, Fault, FaultInjector, ImageOptions, QueueOptions, RawImage,
};
use paravane_devices::pci::PciDevice;
use paravane_devices::{
    Counters, Device, DmaAccess, DmaPurpose, DmaTap, DmaWatch, IrqLine, IrqSink, MsiSink, ResetKind,
    StateError, StateStream, Width,
};
use paravane_memory::{GuestMemory, MemoryConfig, PhysAddr};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

const SIZE: u64 = 256;
const DESC: u64 = 0x1_0000;
const AVAIL: u64 = 0x1_1000;
const USED: u64 = 0x1_2000;
const HEADER: u64 = 0x2_0000;
const STATUS: u64 = 0x2_1000;
const DATA: u64 = 0x3_0000;
const INDIRECT: u64 = 0x4_0000;

const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;
const INDIRECT_DESC: u64 = 1 << 28;
const FLUSH: u64 = 1 << 9;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT_FLAG: u16 = 4;

#[derive(Default)]
struct Wires {
    level: AtomicBool,
    messages: AtomicU32,
}

impl IrqSink for Wires {
    fn set_level(&self, _input: u32, high: bool) {
        self.level.store(high, Ordering::SeqCst);
    }
}

impl MsiSink for Wires {
    fn msi(&self, _address: u64, _data: u32) {
        self.messages.fetch_add(1, Ordering::SeqCst);
    }
}

struct Driver {
    function: Arc<Mutex<VirtioPci>>,
    memory: GuestMemory,
    wires: Arc<Wires>,
    path: PathBuf,
    avail: u16,
}

fn wiring<'a>(memory: &'a GuestMemory, wires: &Arc<Wires>, counters: &'a Counters) -> VirtioWiring<'a> {
    let intx = IrqLine::new(Arc::clone(wires) as Arc<dyn IrqSink>, 0, counters.counter("virtio", "intx"));
    VirtioWiring {
        label: "virtio-test",
        memory,
        intx,
        msi: Arc::clone(wires) as Arc<dyn MsiSink>,
        counters,
        doorbell: None,
        dma: DmaTap::nobody(),
    }
}

fn disk_with(name: &str, faults: Option<Arc<dyn FaultInjector>>, modern_only: bool) -> Driver {
    let path = std::env::temp_dir().join(format!("paravane-virtio-{}-{name}", std::process::id()));
    let data: Vec<u8> = (0..2048 * 512).map(|i| (i / 512) as u8).collect();
    std::fs::write(&path, data).expect("image");
    let image = RawImage::open(&path, ImageOptions::default()).expect("open");
    let memory = GuestMemory::new(MemoryConfig::pc(4 << 20)).expect("memory");
    let counters = Counters::default();
    let options = QueueOptions { serial: "disk-1".into(), ..QueueOptions::default() };
    let queue =
        BlockQueue::new(image, memory.clone(), BlockCounters::new(&counters, "disk"), faults, options)
            .expect("queue");
    let wires = Arc::new(Wires::default());
    let device = Box::new(VirtioBlk::new(Arc::new(queue)));
    let function =
        VirtioPci::new(device, wiring(&memory, &wires, &counters), VirtioPciOptions { modern_only });
    Driver { function, memory, wires, path, avail: 0 }
}

fn disk(name: &str) -> Driver {
    disk_with(name, None, true)
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _gone = std::fs::remove_file(&self.path);
    }
}

impl Driver {
    fn store(&self, offset: u64, width: Width, value: u64) {
        self.function.lock().unwrap().bar_store(4, offset, width, value);
    }

    fn load(&self, offset: u64, width: Width) -> u64 {
        self.function.lock().unwrap().bar_load(4, offset, width)
    }

    fn status(&self) -> u8 {
        self.load(20, Width::W8) as u8
    }

    fn negotiate(&self, features: u64) -> u8 {
        self.store(20, Width::W8, 0);
        assert_eq!(self.status(), 0);
        self.store(20, Width::W8, 1);
        self.store(20, Width::W8, 3);
        for select in 0..2 {
            self.store(8, Width::W32, select);
            self.store(12, Width::W32, features >> (32 * select) & 0xFFFF_FFFF);
        }
        self.store(20, Width::W8, 11);
        self.status()
    }

    /// The whole modern initialization, section 3.1.1.
    fn start(&mut self, features: u64) {
        assert_eq!(self.negotiate(features | VERSION_1), 11);
        self.store(22, Width::W16, 0);
        assert_eq!(self.load(24, Width::W16), SIZE);
        for (at, address) in [(32, DESC), (40, AVAIL), (48, USED)] {
            self.store(at, Width::W32, address);
            self.store(at + 4, Width::W32, 0);
        }
        self.memory.fill(PhysAddr(AVAIL), 0, 0x2000).unwrap();
        self.avail = 0;
        self.store(28, Width::W16, 1);
        assert_eq!(self.load(28, Width::W16), 1);
        self.store(20, Width::W8, 15);
        assert_eq!(self.status(), 15);
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write(PhysAddr(at), bytes).unwrap();
    }

    fn descriptor(&self, table: u64, i: u64, address: u64, len: u32, flags: u16, next: u16) {
        let raw =
            u128::from(address) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
        self.put(table + 16 * i, &raw.to_le_bytes());
    }

    /// Writes a chain of (address, length, writable) from descriptor `first` on.
    fn chain(&self, table: u64, first: u16, pieces: &[(u64, u32, bool)]) {
        for (i, &(address, len, writable)) in pieces.iter().enumerate() {
            let (here, last) = (first + i as u16, i + 1 == pieces.len());
            let flags = if writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.descriptor(table, here.into(), address, len, flags, here + 1);
        }
    }

    fn offer(&mut self, head: u16) {
        self.put(AVAIL + 4 + 2 * (u64::from(self.avail) % SIZE), &head.to_le_bytes());
        self.avail = self.avail.wrapping_add(1);
        self.put(AVAIL + 2, &self.avail.to_le_bytes());
    }

    fn ring(&self) {
        self.store(0x3000, Width::W16, 0);
    }

    fn used(&self) -> u16 {
        self.memory.read_u16(PhysAddr(USED + 2)).unwrap()
    }

    fn wait_for(&self, what: &str, done: impl Fn() -> bool) {
        let end = Instant::now() + Duration::from_secs(10);
        while !done() {
            assert!(Instant::now() < end, "{what}: nothing for ten seconds");
            std::thread::yield_now();
        }
    }

    fn header(&self, kind: u32, sector: u64) {
        self.put(HEADER, &(u128::from(kind) | u128::from(sector) << 64).to_le_bytes());
        self.put(STATUS, &[0xEE]);
    }

    /// Runs one request; returns its status and the used length.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
        self.header(kind, sector);
        let mut pieces = vec![(HEADER, 16, false)];
        pieces.extend_from_slice(data);
        pieces.push((STATUS, 1, true));
        self.chain(DESC, 0, &pieces);
        self.go(0)
    }

    fn go(&mut self, head: u16) -> (u8, u32) {
        self.offer(head);
        self.ring();
        let expected = self.avail;
        self.wait_for("used ring", || self.used() == expected);
        let element = USED + 4 + 8 * (u64::from(expected.wrapping_sub(1)) % SIZE);
        assert_eq!(self.memory.read_u32(PhysAddr(element)), Ok(head.into()));
        (self.memory.read_u8(PhysAddr(STATUS)).unwrap(), self.memory.read_u32(PhysAddr(element + 4)).unwrap())
    }

    fn image(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }
}

#[test]
fn features_are_agreed_on_or_refused() {
    let d = disk("features");
    assert_eq!(d.negotiate(VERSION_1 | 1 << 35), 3, "IN_ORDER was not offered");
    assert_eq!(d.negotiate(FLUSH), 3, "a modern driver must take VERSION_1");
    assert_eq!(d.negotiate(VERSION_1 | FLUSH | EVENT_IDX), 11);
    let config = |at: u64| d.load(0x2000 + at, Width::W32);
    assert_eq!((config(0), config(12), config(20)), (2048, 254, 512));
    let f = d.function.lock().unwrap();
    assert_eq!(f.config().load(0, Width::W32), 0x1042_1AF4);
}

#[test]
fn read_write_flush_and_id() {
    let mut d = disk("requests");
    d.start(FLUSH);
    assert_eq!(d.request(0, 5, &[(DATA, 1000, true), (DATA + 4096, 24, true)]), (0, 1025));
    assert_eq!(d.memory.read_u8(PhysAddr(DATA + 999)), Ok(6), "byte 999 of sectors 5 and 6");
    d.put(DATA, &[0x5A; 1024]);
    assert_eq!(d.request(1, 9, &[(DATA, 1024, false)]), (0, 1));
    assert_eq!(d.request(4, 0, &[]), (0, 1));
    assert!(d.image()[9 * 512..11 * 512].iter().all(|&b| b == 0x5A));
    assert_eq!(d.request(8, 0, &[(DATA, 20, true)]), (0, 21));
    let mut id = [0; 20];
    d.memory.read(PhysAddr(DATA), &mut id).unwrap();
    assert_eq!(&id, b"disk-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(d.request(0x99, 0, &[]), (2, 1), "unsupported");
    assert_eq!(d.request(0, 2047, &[(DATA, 1024, true)]).0, 1, "past the end");
    assert_eq!(d.request(0, 0, &[(DATA, 100, true)]).0, 1, "not a sector");
    assert_eq!(d.request(0, 0, &[(3 << 30, 512, true)]).0, 1, "not RAM");
    assert_eq!(d.request(1, u64::MAX / 256, &[(DATA, 512, false)]).0, 1, "a sector that overflows");
    assert_eq!(d.status(), 15, "all of this is legal");
}

#[test]
fn discard_and_write_zeroes() {
    let mut d = disk("discard");
    d.start(FLUSH | 1 << 13 | 1 << 14);
    let range = |sector: u64, sectors: u32, flags: u32| {
        (u128::from(sector) | u128::from(sectors) << 64 | u128::from(flags) << 96).to_le_bytes()
    };
    d.put(DATA, &range(16, 8, 1));
    assert_eq!(d.request(13, 0, &[(DATA, 16, false)]), (0, 1));
    let image = d.image();
    assert!(image[16 * 512..24 * 512].iter().all(|&b| b == 0));
    assert_eq!((image[16 * 512 - 1], image[24 * 512]), (15, 24));
    d.put(DATA, &range(32, 8, 0));
    assert_eq!(d.request(11, 0, &[(DATA, 16, false)]), (0, 1));
    d.put(DATA, &range(32, 8, 1));
    assert_eq!(d.request(11, 0, &[(DATA, 16, false)]).0, 2, "unmap means nothing to discard");
    d.put(DATA, &range(2040, 9, 0));
    assert_eq!(d.request(13, 0, &[(DATA, 16, false)]).0, 1, "past the end");
    assert_eq!(d.request(13, 0, &[(DATA, 8, false)]).0, 1, "half a segment");
}

#[test]
fn indirect_descriptors() {
    let mut d = disk("indirect");
    d.start(FLUSH | INDIRECT_DESC);
    d.header(0, 7);
    d.chain(INDIRECT, 0, &[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    d.descriptor(DESC, 3, INDIRECT, 48, INDIRECT_FLAG, 0);
    assert_eq!(d.go(3), (0, 513));
    assert_eq!(d.memory.read_u8(PhysAddr(DATA)), Ok(7));
}

#[test]
fn several_requests_in_flight_each_complete_once() {
    let mut d = disk("depth");
    d.start(FLUSH | EVENT_IDX);
    for i in 0..64u16 {
        let base = DATA + 0x1000 * u64::from(i);
        let header = (u128::from(u64::from(i) * 3) << 64).to_le_bytes();
        d.put(base + 0x800, &header);
        d.chain(DESC, i * 3, &[(base + 0x800, 16, false), (base, 512, true), (base + 0x900, 1, true)]);
        d.offer(i * 3);
    }
    d.ring();
    d.wait_for("64 requests", || d.used() == 64);
    for i in 0..64u64 {
        assert_eq!(d.memory.read_u8(PhysAddr(DATA + 0x1000 * i)), Ok((i * 3) as u8));
    }
    let mut heads: Vec<_> = (0..64).map(|i| d.memory.read_u32(PhysAddr(USED + 4 + 8 * i)).unwrap()).collect();
    heads.sort_unstable();
    assert_eq!(heads, (0..64).map(|i| i * 3).collect::<Vec<_>>());
}

fn enable_msix(d: &Driver) {
    let mut f = d.function.lock().unwrap();
    f.config_store(0x42, Width::W16, 0x8000);
    for v in 0..2 {
        f.bar_store(1, 16 * v, Width::W64, 0xFEE0_0000);
        f.bar_store(1, 16 * v + 8, Width::W64, 0x40 + v);
    }
    drop(f);
    d.store(22, Width::W16, 0);
    d.store(26, Width::W16, 1);
    assert_eq!(d.load(26, Width::W16), 1);
    d.store(16, Width::W16, 7);
    assert_eq!(d.load(16, Width::W16), 0xFFFF, "no such vector");
}

#[test]
fn event_index_suppresses_interrupts_and_doorbells_are_rearmed() {
    let mut d = disk("event");
    d.start(FLUSH | EVENT_IDX);
    enable_msix(&d);
    let messages = || d.wires.messages.load(Ordering::SeqCst);
    assert_eq!(messages(), 0);
    d.put(AVAIL + 4 + 2 * SIZE, &2u16.to_le_bytes()); // used_event: interrupt when index 2 is used
    for expected in [0, 0, 1, 1] {
        d.header(4, 0);
        d.chain(DESC, 0, &[(HEADER, 16, false), (STATUS, 1, true)]);
        d.offer(0);
        d.ring();
        d.wait_for("used", || d.used() == d.avail);
        d.wait_for("interrupt", || d.wires.messages.load(Ordering::SeqCst) == expected);
        let avail_event = d.memory.read_u16(PhysAddr(USED + 4 + 8 * SIZE)).unwrap();
        assert_eq!(avail_event, d.avail, "ring again for the next");
    }
    // Every completion has been counted one way or the other once the function's lock is free.
    let f = d.function.lock().unwrap();
    assert_eq!((f.counters().interrupts.get(), f.counters().interrupts_suppressed.get()), (1, 3));
    assert_eq!((f.counters().doorbells.get(), f.counters().requests.get()), (4, 4));
}

#[test]
fn intx_and_isr_follow_the_used_ring() {
    let mut d = disk("intx");
    d.start(FLUSH);
    d.request(4, 0, &[]);
    d.wait_for("INTx", || d.wires.level.load(Ordering::SeqCst));
    assert_eq!(d.load(0x1000, Width::W8), 1);
    assert!(!d.wires.level.load(Ordering::SeqCst));
    assert_eq!(d.load(0x1000, Width::W8), 0);
    d.put(AVAIL, &1u16.to_le_bytes()); // NO_INTERRUPT
    d.request(4, 0, &[]);
    let _settled = d.function.lock().unwrap();
    assert!(!d.wires.level.load(Ordering::SeqCst));
}

#[test]
fn malformed_chains_ask_for_a_reset() {
    let mut d = disk("malformed");
    type Case = (&'static str, fn(&mut Driver));
    let cases: [Case; 9] = [
        ("a loop", |d| d.descriptor(DESC, 0, DATA, 16, NEXT, 0)),
        ("a link out of the table", |d| d.descriptor(DESC, 0, DATA, 16, NEXT, 0xFFFF)),
        ("readable behind writable", |d| {
            d.chain(DESC, 0, &[(DATA, 16, true), (DATA, 16, false)]);
        }),
        ("no status", |d| d.chain(DESC, 0, &[(HEADER, 16, false)])),
        ("a short header", |d| d.chain(DESC, 0, &[(HEADER, 8, false), (STATUS, 1, true)])),
        ("lengths that overflow", |d| {
            d.chain(DESC, 0, &[(HEADER, 16, false), (DATA, u32::MAX, true), (DATA, u32::MAX, true)]);
        }),
        ("a nested table", |d| {
            d.descriptor(INDIRECT, 0, INDIRECT, 16, INDIRECT_FLAG, 0);
            d.descriptor(DESC, 0, INDIRECT, 16, INDIRECT_FLAG, 0);
        }),
        ("a table out of memory", |d| d.descriptor(DESC, 0, 3 << 30, 4096, INDIRECT_FLAG, 0)),
        ("a status out of memory", |d| d.chain(DESC, 0, &[(HEADER, 16, false), (3 << 30, 1, true)])),
    ];
    for (name, prepare) in cases {
        d.start(FLUSH | INDIRECT_DESC);
        d.header(0x99, 0);
        prepare(&mut d);
        d.offer(0);
        d.ring();
        assert_eq!(d.status(), 0x4F, "{name}");
        assert_eq!(d.load(0x1000, Width::W8), 2, "{name}: configuration interrupt");
    }
    d.start(FLUSH);
    d.put(AVAIL + 2, &1000u16.to_le_bytes());
    d.ring();
    assert_eq!(d.status(), 0x4F, "an available index too far ahead");
    d.start(FLUSH);
    d.offer(300);
    d.ring();
    assert_eq!(d.status(), 0x4F, "a head out of the table");
    d.start(FLUSH);
    assert_eq!(d.request(4, 0, &[]), (0, 1), "the device lives on");
}

#[test]
fn queues_outside_memory_are_refused() {
    let d = disk("queue");
    assert_eq!(d.negotiate(VERSION_1), 11);
    d.store(48, Width::W64, 3 << 30);
    d.store(28, Width::W16, 1);
    assert_eq!(d.load(28, Width::W16), 0);
    assert_eq!(d.status(), 0x4B);
    d.store(22, Width::W16, 9);
    assert_eq!(d.load(24, Width::W16), 0, "no such queue");
    d.store(0x3000 + 4 * 9, Width::W16, 9);
}

struct Slow;

impl FaultInjector for Slow {
    fn fault(&self, request: &BlockRequest) -> Option<Fault> {
        (request.op == BlockOp::Read).then_some(Fault::Delay(Duration::from_millis(40)))
    }
}

#[test]
fn reset_in_mid_io_waits_and_leaves_the_rings_alone() {
    let mut d = disk_with("reset", Some(Arc::new(Slow)), true);
    d.start(FLUSH);
    d.header(0, 3);
    d.chain(DESC, 0, &[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    d.offer(0);
    d.ring();
    d.store(20, Width::W8, 0);
    assert_eq!(d.status(), 15, "not yet");
    d.wait_for("reset", || d.status() == 0);
    assert_eq!(d.used(), 0);
    d.start(FLUSH);
    d.offer(0);
    d.ring();
    d.function.lock().unwrap().reset(ResetKind::Bus);
    assert_eq!(d.status(), 0);
    d.start(FLUSH);
    assert_eq!(d.request(4, 0, &[]), (0, 1));
    assert_eq!(d.request(0, 3, &[(DATA, 512, true)]), (0, 513));
    assert_eq!(d.used(), 2, "nothing of the abandoned request");
}

#[test]
fn the_legacy_interface_works_alone() {
    let mut d = disk_with("legacy", None, false);
    let out = |d: &Driver, at, width, value| d.function.lock().unwrap().bar_store(0, at, width, value);
    let input = |d: &Driver, at, width| d.function.lock().unwrap().bar_load(0, at, width);
    assert_eq!(d.function.lock().unwrap().config().load(0x2C, Width::W32), 0x0002_1AF4);
    assert_eq!(d.function.lock().unwrap().config().load(0, Width::W32), 0x1001_1AF4);
    out(&d, 18, Width::W8, 3);
    assert_ne!(input(&d, 0, Width::W32) & FLUSH, 0);
    out(&d, 4, Width::W32, FLUSH);
    assert_eq!(input(&d, 12, Width::W16), SIZE);
    out(&d, 8, Width::W32, DESC >> 12);
    assert_eq!(input(&d, 8, Width::W32), DESC >> 12);
    out(&d, 18, Width::W8, 7);
    assert_eq!(input(&d, 20, Width::W64), 2048, "capacity");
    // Legacy layout: the available ring follows the descriptors, the used ring starts the next page: as here.
    d.header(0, 4);
    d.chain(DESC, 0, &[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    d.put(AVAIL, &[0, 0, 1, 0, 0, 0]);
    out(&d, 16, Width::W16, 0);
    d.avail = 1;
    d.wait_for("used", || d.used() == 1);
    assert_eq!(d.memory.read_u8(PhysAddr(DATA)), Ok(4));
    d.wait_for("INTx", || d.wires.level.load(Ordering::SeqCst));
    assert_eq!(input(&d, 19, Width::W8), 1);
    out(&d, 18, Width::W8, 0);
    assert_eq!(input(&d, 8, Width::W32), 0);
}

#[test]
fn the_configuration_window_reaches_the_registers() {
    let d = disk("window");
    let mut f = d.function.lock().unwrap();
    let mut at = f.config_load(0x34, Width::W8) as u8;
    while f.config_load(at, Width::W8) != 9 || f.config_load(at + 3, Width::W8) != 5 {
        at = f.config_load(at + 1, Width::W8) as u8;
        assert_ne!(at, 0, "no window");
    }
    f.config_store(at + 4, Width::W8, 4);
    f.config_store(at + 8, Width::W32, 0x2000);
    f.config_store(at + 12, Width::W32, 4);
    assert_eq!(f.config_load(at + 16, Width::W32), 2048);
    f.config_store(at + 8, Width::W32, 0xFFFF_FFFC);
    assert_eq!(f.config_load(at + 16, Width::W32), 0, "outside of the BAR");
}

struct Counting(u8);

impl Snapshot for Counting {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        self.0.state(s)
    }
}

impl EntropySource for Counting {
    fn fill(&mut self, buf: &mut [u8]) -> std::io::Result<()> {
        buf.iter_mut().for_each(|b| {
            self.0 = self.0.wrapping_add(1);
            *b = self.0;
        });
        Ok(())
    }
}

/// Writes down what a device does in memory.
#[derive(Default)]
struct Listener(Mutex<Vec<DmaAccess>>);

impl DmaWatch for Listener {
    fn listens(&self) -> bool {
        true
    }

    fn accessed(&self, access: DmaAccess) {
        self.0.lock().unwrap().push(access);
    }
}

impl Listener {
    /// Where accesses for `purpose` were, how long, and which of them wrote.
    fn heard(&self, purpose: DmaPurpose) -> Vec<(u64, u64, bool)> {
        let all = self.0.lock().unwrap();
        all.iter().filter(|a| a.purpose == purpose).map(|a| (a.at.0, a.len, a.write)).collect()
    }
}

#[test]
fn entropy_fills_what_the_driver_offers() {
    let memory = GuestMemory::new(MemoryConfig::pc(4 << 20)).expect("memory");
    let (wires, counters) = (Arc::new(Wires::default()), Counters::default());
    let listener = Arc::new(Listener::default());
    let dma = DmaTap::new(Arc::clone(&listener) as Arc<dyn DmaWatch>);
    let wiring = VirtioWiring { dma, ..wiring(&memory, &wires, &counters) };
    let device = Box::new(VirtioRng::new(Box::new(Counting(0))));
    let function = VirtioPci::new(device, wiring, VirtioPciOptions { modern_only: true });
    let mut d = Driver { function, memory, wires, path: PathBuf::new(), avail: 0 };
    assert_eq!(d.negotiate(VERSION_1), 11);
    d.store(24, Width::W16, 64);
    for (at, address) in [(32, DESC), (40, AVAIL), (48, USED)] {
        d.store(at, Width::W64, address);
    }
    d.store(28, Width::W16, 1);
    d.store(20, Width::W8, 15);
    d.chain(DESC, 0, &[(DATA, 3, true), (DATA + 8, 2, true)]);
    d.offer(0);
    d.ring();
    assert_eq!(d.used(), 1);
    let mut bytes = [0; 10];
    d.memory.read(PhysAddr(DATA), &mut bytes).unwrap();
    assert_eq!(bytes, [1, 2, 3, 0, 0, 0, 0, 0, 4, 5]);
    assert_eq!(listener.heard(DmaPurpose::Data), [(DATA, 3, true), (DATA + 8, 2, true)]);
    // VIRTIO 1.2, 2.7.5, 2.7.6 and 2.7.8: two descriptors of 16 bytes; the index and the first entry of the available ring; the first
    // element of the used ring, then its index.
    assert_eq!(listener.heard(DmaPurpose::Descriptor), [(DESC, 16, false), (DESC + 16, 16, false)]);
    let ring = listener.heard(DmaPurpose::Ring);
    assert!(ring.contains(&(AVAIL + 2, 2, false)) && ring.contains(&(AVAIL + 4, 2, false)), "{ring:x?}");
    let written: Vec<_> = ring.iter().filter(|a| a.2).collect();
    assert_eq!(written, [&(USED + 4, 8, true), &(USED + 2, 2, true)]);
    assert!(HostEntropy::new().and_then(|mut s| s.fill(&mut [0; 5000])).is_ok());
}

/// Random register accesses and random rings: no panic, no hang, and a reset always comes through.
#[test]
fn no_sequence_of_accesses_breaks_the_device() {
    let mut d = disk_with("random", None, false);
    let mut seed = 0x2545_F491_4F6C_DD1Du64;
    let mut next = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for round in 0..200 {
        d.start(FLUSH | INDIRECT_DESC | if round & 1 == 0 { EVENT_IDX } else { 0 });
        for _ in 0..100 {
            let r = next();
            let (offset, value) = (r >> 16 & 0x3F, next());
            let width = [Width::W8, Width::W16, Width::W32, Width::W64][(r >> 8) as usize % 4];
            match r % 8 {
                0 => d.store(offset, width, value),
                1 => d.function.lock().unwrap().bar_store(0, offset, width, value),
                2 => {
                    d.function.lock().unwrap().bar_load((value % 6) as u8, offset, width);
                }
                3 => d.function.lock().unwrap().config_store(
                    (value & 0xFF) as u8,
                    Width::W32,
                    (value >> 32) as u32,
                ),
                4 => d.put(DESC + (value & 0xFF0), &next().to_le_bytes()),
                5 => {
                    let (address, flags) = (DATA + (value & 0xFFFF), (value >> 20) as u16 & 7);
                    d.descriptor(
                        DESC,
                        value >> 32 & 7,
                        address,
                        16 << (value >> 40 & 7),
                        flags,
                        (value >> 50) as u16 & 7,
                    );
                }
                6 => d.put(AVAIL + (value & 0x1F), &[(value >> 8) as u8 & 7]),
                _ => d.store(0x3000, Width::W16, 0),
            }
        }
        d.store(20, Width::W8, 0);
        d.wait_for("reset", || d.status() == 0);
        d.function.lock().unwrap().reset(ResetKind::Bus);
    }
    d.start(FLUSH);
    assert_eq!(d.request(4, 0, &[]), (0, 1));
}

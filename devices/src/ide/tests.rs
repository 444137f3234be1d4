use super::spec::{command as c, error, status};
use super::*;
use crate::block::{BlockCounters, BlockError, BlockOp, BlockQueue, BlockRequest, QueueOptions};
use crate::block::{Fault, FaultInjector, ImageOptions, RawImage};
use crate::device::{PioDevice, StringPio};
use crate::irq::IrqSink;
use paravane_memory::{MemoryConfig, PhysAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const SECTORS: u64 = 4096;

#[derive(Default)]
struct Pic(AtomicBool);

impl IrqSink for Pic {
    fn set_level(&self, _input: u32, high: bool) {
        self.0.store(high, Ordering::SeqCst);
    }
}

struct Rig {
    ide: IdeController,
    channel: Arc<Mutex<Channel>>,
    memory: GuestMemory,
    pic: Arc<Pic>,
    path: PathBuf,
}

fn rig_with(name: &str, faults: Option<Arc<dyn FaultInjector>>, read_only: bool) -> Rig {
    let path = std::env::temp_dir().join(format!("paravane-ide-{}-{name}", std::process::id()));
    let data: Vec<u8> = (0..SECTORS * 512).map(|i| (i / 512 + i % 512) as u8).collect();
    std::fs::write(&path, data).expect("image");
    let image = RawImage::open(&path, ImageOptions { read_only, ..ImageOptions::default() }).expect("open");
    let memory = GuestMemory::new(MemoryConfig::pc(4 << 20)).expect("memory");
    let counters = Counters::default();
    let queue = BlockQueue::new(
        image,
        memory.clone(),
        BlockCounters::new(&counters, "disk"),
        faults,
        QueueOptions { serial: "ABC123".into(), ..QueueOptions::default() },
    );
    let pic = Arc::new(Pic::default());
    let line = |n| IrqLine::new(Arc::clone(&pic) as Arc<dyn IrqSink>, n, counters.counter("ide", "irq"));
    let mut ide =
        IdeController::new(&memory, [line(14), IrqLine::unconnected()], Default::default(), &counters);
    ide.attach(0, 0, Arc::new(queue.expect("queue"))).expect("attach");
    let channel = ide.channel(0);
    Rig { ide, channel, memory, pic, path }
}

fn rig(name: &str) -> Rig {
    rig_with(name, None, false)
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _gone = std::fs::remove_file(&self.path);
    }
}

impl Rig {
    fn out(&self, port: u16, value: u8) {
        self.channel.lock().unwrap().port_out(Port(port), Width::W8, value.into());
    }

    fn inb(&self, port: u16) -> u8 {
        self.channel.lock().unwrap().port_in(Port(port), Width::W8) as u8
    }

    fn irq(&self) -> bool {
        self.pic.0.load(Ordering::SeqCst)
    }

    /// Waits for BSY to clear; the alternate status leaves INTRQ alone.
    fn wait(&self) -> u8 {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let s = self.inb(0x3F6);
            if s & status::BSY == 0 {
                return s;
            }
            assert!(Instant::now() < end, "BSY for ten seconds");
            std::thread::yield_now();
        }
    }

    fn lba28(&self, code: u8, lba: u32, count: u8) {
        self.out(0x1F6, 0xE0 | (lba >> 24) as u8);
        self.out(0x1F2, count);
        for i in 0..3 {
            self.out(0x1F3 + i, (lba >> (8 * i)) as u8);
        }
        self.out(0x1F7, code);
    }

    fn lba48(&self, code: u8, lba: u64, count: u16) {
        self.out(0x1F6, 0xE0);
        self.out(0x1F2, (count >> 8) as u8);
        (0..3).for_each(|i| self.out(0x1F3 + i, (lba >> (24 + 8 * i)) as u8));
        self.out(0x1F2, count as u8);
        (0..3).for_each(|i| self.out(0x1F3 + i, (lba >> (8 * i)) as u8));
        self.out(0x1F7, code);
    }

    fn read_words(&self, n: usize) -> Vec<u8> {
        let mut c = self.channel.lock().unwrap();
        (0..n).flat_map(|_| (c.port_in(Port(0x1F0), Width::W16) as u16).to_le_bytes()).collect()
    }

    fn write_words(&self, data: &[u8]) {
        let mut c = self.channel.lock().unwrap();
        for w in data.chunks_exact(4) {
            c.port_out(Port(0x1F0), Width::W32, u32::from_le_bytes([w[0], w[1], w[2], w[3]]));
        }
    }

    fn bm_out(&mut self, offset: u64, width: Width, value: u64) {
        self.ide.bar_store(4, offset, width, value);
    }

    fn bm_status(&mut self) -> u8 {
        self.ide.bar_load(4, 2, Width::W8) as u8
    }

    /// Writes a PRDT and runs a DMA command over it; returns (drive status, bus master status).
    fn dma(&mut self, code: u8, lba: u32, count: u8, prdt: &[(u32, u32)]) -> (u8, u8) {
        for (i, &(base, word)) in prdt.iter().enumerate() {
            let raw = u64::from(base) | u64::from(word) << 32;
            self.memory.write(PhysAddr(0x8000 + 8 * i as u64), &raw.to_le_bytes()).unwrap();
        }
        let direction = if code == c::READ_DMA { 8 } else { 0 };
        self.bm_out(0, Width::W8, direction);
        self.bm_out(2, Width::W8, 6);
        self.bm_out(4, Width::W32, 0x8000);
        self.lba28(code, lba, count);
        assert_eq!(self.inb(0x3F6) & status::DRQ, status::DRQ, "waits for the bus master");
        self.bm_out(0, Width::W8, direction | 1);
        let s = self.wait();
        assert!(self.irq());
        let bm = self.bm_status();
        self.bm_out(0, Width::W8, 0);
        (s, bm)
    }
}

fn sector(n: u64) -> Vec<u8> {
    (0..512).map(|i| (n + i) as u8).collect()
}

const READY: u8 = status::DRDY | status::DSC;

#[test]
fn signature_and_absent_drives() {
    let rig = rig("signature");
    assert_eq!(rig.inb(0x1F7), READY);
    assert_eq!([1, 2, 3, 4, 5].map(|r| rig.inb(0x1F0 + r)), [1, 1, 1, 0, 0]);
    rig.out(0x1F6, 0xB0);
    assert_eq!(rig.inb(0x1F7), 0, "no slave");
    rig.out(0x1F7, c::IDENTIFY);
    assert!(!rig.irq());
    let mut second = rig.ide.channels[1].lock().unwrap();
    assert_eq!(second.port_in(Port(0x177), Width::W8), 0x7F, "an empty channel");
}

#[test]
fn identify_tells_capacity_and_modes() {
    let rig = rig("identify");
    rig.out(0x1F6, 0xE0);
    rig.out(0x1F7, c::IDENTIFY);
    assert!(rig.irq());
    assert_eq!(rig.inb(0x1F7), READY | status::DRQ);
    assert!(!rig.irq(), "reading status clears INTRQ");
    let data = rig.read_words(256);
    let w = |i: usize| u16::from_le_bytes([data[2 * i], data[2 * i + 1]]);
    assert_eq!((w(60), w(61), w(100)), (4096, 0, 4096));
    assert_eq!(w(49) & 0x300, 0x300, "LBA and DMA");
    assert_eq!(w(83) & 0x7400, 0x7400, "48-bit addresses, FLUSH CACHE (EXT)");
    assert_eq!(w(63), 0x0407, "MWDMA 2 selected");
    assert_eq!((w(10), w(11), w(13)), (0x4142, 0x4331, 0x2020));
    assert_eq!(data.iter().fold(0u8, |s, &b| s.wrapping_add(b)), 0, "checksum");
    assert_eq!(rig.inb(0x1F7), READY);
}

#[test]
fn pio_read_interrupts_once_per_sector_and_multiple_once_per_block() {
    let rig = rig("pio-read");
    rig.lba28(c::READ_SECTORS, 7, 2);
    assert_eq!(rig.wait(), READY | status::DRQ);
    for n in [7, 8] {
        assert!(rig.irq());
        rig.inb(0x1F7);
        assert_eq!(rig.read_words(256), sector(n));
    }
    assert!(!rig.irq(), "no interrupt after the last block");
    assert_eq!(rig.inb(0x1F7), READY);
    rig.out(0x1F2, 4);
    rig.out(0x1F7, c::SET_MULTIPLE);
    rig.lba48(c::READ_MULTIPLE_EXT, 100, 6);
    for sectors in [100..104, 104..106] {
        assert_eq!(rig.wait(), READY | status::DRQ);
        assert!(rig.irq());
        rig.inb(0x1F7);
        assert_eq!(
            rig.read_words(256 * sectors.clone().count()),
            sectors.flat_map(sector).collect::<Vec<_>>()
        );
    }
    assert_eq!(rig.inb(0x1F7), READY);
}

#[test]
fn pio_write_reaches_the_image() {
    let rig = rig("pio-write");
    for (code, block) in [(c::WRITE_SECTORS, 1), (c::WRITE_MULTIPLE, 16)] {
        rig.lba28(code, 20, 0);
        let mut left = 256;
        while left > 0 {
            assert_eq!(rig.inb(0x1F7), READY | status::DRQ);
            rig.write_words(&vec![0xA0 | block as u8; block * 512]);
            left -= block;
            assert!(left == 0 || rig.irq(), "{left} sectors left");
        }
        assert_eq!(rig.wait(), READY);
        assert!(rig.irq());
        rig.lba28(c::FLUSH_CACHE, 0, 0);
        assert_eq!(rig.wait(), READY);
        let image = std::fs::read(&rig.path).unwrap();
        assert!(image[20 * 512..276 * 512].iter().all(|&b| b == 0xA0 | block as u8));
        assert_eq!(&image[276 * 512..277 * 512], sector(276));
    }
}

#[test]
fn string_pio_moves_a_block_in_one_call() {
    let rig = rig("string");
    rig.lba28(c::READ_SECTORS, 3, 1);
    rig.wait();
    let mut buf = [0; 1024];
    let n = rig.channel.lock().unwrap().pio_in_string(Port(0x1F0), Width::W16, &mut buf);
    assert_eq!((n, &buf[..512]), (512, sector(3).as_slice()));
}

#[test]
fn chs_addresses_follow_the_geometry() {
    let rig = rig("chs");
    for (cylinder, head, sector_number, lba) in [(0, 0, 1, 0), (1, 2, 3, (16 + 2) * 63 + 2)] {
        rig.out(0x1F6, 0xA0 | head);
        [1, sector_number, cylinder, 0].iter().zip(0x1F2..).for_each(|(&v, p)| rig.out(p, v));
        rig.out(0x1F7, c::READ_SECTORS);
        rig.wait();
        assert_eq!(rig.read_words(256), sector(lba));
    }
    rig.out(0x1F3, 0);
    rig.out(0x1F7, c::READ_SECTORS);
    assert_eq!((rig.inb(0x1F7), rig.inb(0x1F1)), (READY | status::ERR, error::IDNF), "sector 0");
}

#[test]
fn bad_commands_and_addresses_are_refused() {
    let rig = rig("refuse");
    rig.lba28(c::READ_SECTORS, 4095, 2);
    assert_eq!((rig.inb(0x1F7), rig.inb(0x1F1)), (READY | status::ERR, error::IDNF));
    rig.lba48(c::READ_DMA_EXT, 1 << 40, 1);
    assert_eq!((rig.inb(0x1F7), rig.inb(0x1F1)), (READY | status::ERR, error::IDNF));
    for code in [0xA1, 0xB0, c::NOP, c::DEVICE_RESET, 0xFF] {
        rig.out(0x1F7, code);
        assert_eq!((rig.inb(0x1F7), rig.inb(0x1F1)), (READY | status::ERR, error::ABRT), "{code:#x}");
    }
    rig.out(0x1F2, 3);
    rig.out(0x1F7, c::SET_MULTIPLE);
    assert_eq!(rig.inb(0x1F7), READY | status::ERR);
}

#[test]
fn nien_holds_the_wire_and_srst_gives_the_signature() {
    let rig = rig("control");
    rig.out(0x3F6, 2);
    rig.out(0x1F7, c::IDENTIFY);
    assert!(!rig.irq());
    rig.out(0x3F6, 0);
    assert!(rig.irq(), "INTRQ was pending");
    rig.out(0x3F6, 4);
    assert_eq!(rig.inb(0x3F6), status::BSY);
    rig.out(0x3F6, 0);
    assert_eq!(rig.wait(), READY);
    assert!(!rig.irq());
    assert_eq!([1, 2, 3, 4, 5].map(|r| rig.inb(0x1F0 + r)), [1, 1, 1, 0, 0]);
}

#[test]
fn native_max_power_and_features() {
    let rig = rig("misc");
    rig.lba48(c::READ_NATIVE_MAX_EXT, 0, 0);
    assert_eq!([3, 4, 5].map(|r| rig.inb(0x1F0 + r)), [0xFF, 0x0F, 0]);
    rig.out(0x1F7, c::STANDBY_IMMEDIATE);
    rig.out(0x1F7, c::CHECK_POWER_MODE);
    assert_eq!(rig.inb(0x1F2), 0);
    rig.lba28(c::READ_VERIFY, 0, 0);
    assert_eq!(rig.wait(), READY);
    rig.out(0x1F7, c::CHECK_POWER_MODE);
    assert_eq!(rig.inb(0x1F2), 0xFF);
    for (mode, expected) in [(0x22, READY), (0x45, READY), (0x0C, READY), (0x23, READY | status::ERR)] {
        rig.out(0x1F1, 3);
        rig.out(0x1F2, mode);
        rig.out(0x1F7, c::SET_FEATURES);
        assert_eq!(rig.inb(0x1F7), expected, "mode {mode:#x}");
    }
}

#[test]
fn dma_moves_scattered_regions() {
    let mut rig = rig("dma");
    let (s, bm) = rig.dma(c::READ_DMA, 50, 3, &[(0x10000, 1024), (0x20002, 0x8000_0200)]);
    assert_eq!((s, bm & 7), (READY, 4), "interrupt, not active: exact");
    let mut got = vec![0; 1536];
    rig.memory.read(PhysAddr(0x10000), &mut got[..1024]).unwrap();
    rig.memory.read(PhysAddr(0x20002), &mut got[1024..]).unwrap();
    assert_eq!(got, (50..53).flat_map(sector).collect::<Vec<_>>());
    let (s, bm) = rig.dma(c::WRITE_DMA, 60, 128, &[(0x10000, 0x8000_0000)]);
    assert_eq!((s, bm & 7), (READY, 4), "count 0 is 64 KiB");
    let image = std::fs::read(&rig.path).unwrap();
    assert_eq!(&image[60 * 512..62 * 512], &got[..1024]);
}

#[test]
fn hostile_tables_end_in_errors_or_leave_the_rest() {
    let mut rig = rig("prdt");
    let (s, bm) = rig.dma(c::READ_DMA, 0, 1, &[(0x10000, 0x8000_1000)]);
    assert_eq!((s, bm & 7), (READY, 5), "longer than the data: still active");
    let (s, bm) = rig.dma(c::READ_DMA, 0, 2, &[(0x10000, 0x8000_0200)]);
    assert_eq!((s, bm & 3), (READY | status::ERR, 2), "too short");
    let (s, bm) = rig.dma(c::READ_DMA, 0, 1, &[(0xF000_0000, 0x8000_0200)]);
    assert_eq!((s, bm & 3), (READY | status::ERR, 2), "not RAM");
    let (s, bm) = rig.dma(c::WRITE_DMA, 0, 2, &[((4 << 20) - 512, 0x8000_0400)]);
    assert_eq!((s, bm & 3), (READY | status::ERR, 2), "runs off RAM");
    let endless: Vec<_> = (0..4096).map(|_| (0x2_0000, 2)).collect();
    let (s, _) = rig.dma(c::READ_DMA, 0, 255, &endless);
    assert_eq!(s & status::BSY, 0, "no end of table");
    rig.bm_out(4, Width::W32, 0xFFFF_FFFC);
    rig.bm_out(0, Width::W8, 9);
    rig.lba28(c::READ_DMA, 0, 1);
    assert_eq!(rig.wait(), READY | status::ERR, "the table itself is not RAM");
    rig.lba28(c::READ_SECTORS, 0, 1);
    assert_eq!(rig.wait(), READY | status::DRQ, "the drive lives on");
}

#[test]
fn trim_discards_the_listed_ranges() {
    let mut rig = rig("trim");
    let mut list = [0; 512];
    list[..16].copy_from_slice(&[8, 0, 0, 0, 0, 0, 16, 0, 40, 0, 0, 0, 0, 0, 8, 0]);
    rig.memory.write(PhysAddr(0x10000), &list).unwrap();
    rig.memory.write(PhysAddr(0x8000), &(0x10000 | 0x8000_0200u64 << 32).to_le_bytes()).unwrap();
    rig.bm_out(4, Width::W32, 0x8000);
    rig.bm_out(0, Width::W8, 1);
    rig.out(0x1F1, 1);
    rig.lba48(c::DATA_SET_MANAGEMENT, 0, 1);
    assert_eq!(rig.wait(), READY);
    let image = std::fs::read(&rig.path).unwrap();
    assert_eq!(&image[7 * 512..8 * 512], sector(7));
    assert_eq!(&image[24 * 512..25 * 512], sector(24));
    // A host file system without holes keeps the data; then all of it is there.
    let zero = |n: usize| image[n * 512..(n + 1) * 512].iter().all(|&b| b == 0);
    assert!(
        (8..24).chain(40..48).all(zero) || (8..24).all(|n| image[n * 512..(n + 1) * 512] == sector(n as u64))
    );
}

struct Slow(Option<Fault>);

impl FaultInjector for Slow {
    fn fault(&self, request: &BlockRequest) -> Option<Fault> {
        self.0.filter(|_| request.op != BlockOp::Flush)
    }
}

#[test]
fn media_errors_show_as_unc_and_device_fault() {
    let fault = Fault::Error(BlockError::Io(std::io::ErrorKind::Other));
    let mut rig = rig_with("fault", Some(Arc::new(Slow(Some(fault)))), false);
    rig.lba28(c::READ_SECTORS, 77, 1);
    assert_eq!((rig.wait(), rig.inb(0x1F1), rig.inb(0x1F3)), (READY | status::ERR, error::UNC, 77));
    let (s, bm) = rig.dma(c::WRITE_DMA, 0, 1, &[(0x10000, 0x8000_0200)]);
    assert_eq!((s & (status::DF | status::ERR), bm & 1), (status::DF | status::ERR, 0));
}

#[test]
fn a_read_only_image_aborts_writes() {
    let rig = rig_with("read-only", None, true);
    rig.lba28(c::WRITE_SECTORS, 0, 1);
    assert_eq!((rig.inb(0x1F7), rig.inb(0x1F1)), (READY | status::ERR, error::ABRT));
}

#[test]
fn reset_in_mid_transfer_waits_for_the_back_end() {
    let slow = Slow(Some(Fault::Delay(Duration::from_millis(50))));
    let mut rig = rig_with("reset", Some(Arc::new(slow)), false);
    rig.lba28(c::READ_SECTORS, 0, 4);
    assert_eq!(rig.inb(0x3F6) & status::BSY, status::BSY);
    rig.out(0x1F7, c::IDENTIFY);
    rig.out(0x3F6, 4);
    rig.out(0x3F6, 0);
    assert_eq!(rig.wait(), READY);
    assert_eq!(rig.inb(0x1F1), 1, "diagnostic code, not data");
    rig.lba28(c::READ_SECTORS, 0, 1);
    rig.ide.reset(ResetKind::Bus);
    assert_eq!(rig.wait(), READY);
    rig.out(0x1F7, c::IDENTIFY);
    assert_eq!(rig.wait(), READY | status::DRQ);
}

#[test]
fn reset_is_busy_even_where_an_absent_device_was_selected() {
    let slow = Slow(Some(Fault::Delay(Duration::from_millis(50))));
    let mut rig = rig_with("reset-absent", Some(Arc::new(slow)), false);
    rig.memory.write(PhysAddr(0x8000), &0x8000_0200_0001_0000u64.to_le_bytes()).unwrap();
    rig.bm_out(4, Width::W32, 0x8000);
    rig.lba28(c::READ_DMA, 0, 1);
    rig.out(0x1F6, 0xF0);
    rig.bm_out(0, Width::W8, 9);
    assert_eq!(rig.inb(0x3F6), 0, "device 1 is absent");
    rig.out(0x3F6, 4);
    rig.out(0x3F6, 0);
    assert_eq!(rig.inb(0x3F6) & status::BSY, status::BSY);
    assert_eq!(rig.wait(), READY);
}

/// Random accesses to every register, with a bias to commands and to tables that exist.
#[test]
fn no_sequence_of_accesses_breaks_the_channel() {
    let mut rig = rig("random");
    let mut seed = 0x9E37_79B9_7F4A_7C15u64;
    let mut next = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for _ in 0..30_000 {
        let r = next();
        let (value, width) = ((r >> 32) as u32, [Width::W8, Width::W16, Width::W32][(r >> 8) as usize % 3]);
        match r % 8 {
            0 => rig.out(
                0x1F7,
                [0x20, 0x29, 0x30, 0x39, 0xC5, 0xC8, 0xCA, 0x25, 0xEC, 0x06][value as usize % 10],
            ),
            1 => rig.out(0x3F6, value as u8 & 0x86),
            2 => rig.bm_out(u64::from(value & 8), Width::W8, u64::from(value >> 8)),
            3 => rig.bm_out(4, Width::W32, u64::from(value & 0xFF_FFFF)),
            4 => rig.memory.write(PhysAddr(u64::from(value & 0x3F_FFF8)), &next().to_le_bytes()).unwrap(),
            5 => {
                let port = Port(0x1F0 + (value & 7) as u16);
                rig.channel.lock().unwrap().port_in(port, width);
            }
            6 => {
                rig.channel.lock().unwrap().pio_in_string(Port(0x1F0), width, &mut [0; 700]);
                rig.channel.lock().unwrap().pio_out_string(Port(0x1F0), width, &[1; 700]);
            }
            _ => {
                let port = Port(0x1F0 + (value & 7) as u16);
                rig.channel.lock().unwrap().port_out(port, width, value >> 3);
            }
        }
    }
    rig.out(0x3F6, 4);
    rig.out(0x3F6, 0);
    assert_eq!(rig.wait(), READY);
}

//! Entropy device (VIRTIO 1.2, section 5.4).

use super::VirtioDevice;
use super::rings::{Chain, Rings};
use super::spec::device_type;
use paravane_devices::block::{BlockError, BlockRequest, Completion};
use paravane_devices::{DmaPurpose, Snapshot, StateError, StateStream};
use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;

const QUEUE: usize = 0;
/// Most bytes that one request is given; a driver asks again for more.
const MOST: usize = 256;

/// Where random bytes come from; a reproducible run gives a seeded generator.
pub trait EntropySource: Snapshot + Send {
    /// Fills `buf` without blocking.
    fn fill(&mut self, buf: &mut [u8]) -> io::Result<()>;
}

/// The host's generator. Read a page at a time; never blocks once the host is up.
pub struct HostEntropy {
    source: File,
    pool: Box<[u8; 4096]>,
    left: usize,
}

impl HostEntropy {
    /// Opens the host's generator.
    pub fn new() -> io::Result<HostEntropy> {
        Ok(HostEntropy { source: File::open("/dev/urandom")?, pool: Box::new([0; 4096]), left: 0 })
    }
}

/// What the host gives is nobody's state.
impl Snapshot for HostEntropy {
    fn state(&mut self, _s: &mut StateStream<'_>) -> Result<(), StateError> {
        Ok(())
    }
}

impl EntropySource for HostEntropy {
    fn fill(&mut self, buf: &mut [u8]) -> io::Result<()> {
        for b in buf {
            if self.left == 0 {
                self.source.read_exact(&mut self.pool[..])?;
                self.left = self.pool.len();
            }
            self.left -= 1;
            *b = std::mem::take(&mut self.pool[self.left]);
        }
        Ok(())
    }
}

/// virtio-rng.
pub struct VirtioRng {
    source: Box<dyn EntropySource>,
    chain: Chain,
}

paravane_devices::snapshot!(VirtioRng { source | chain });

impl VirtioRng {
    /// A device that hands out `source`.
    pub fn new(source: Box<dyn EntropySource>) -> VirtioRng {
        VirtioRng { source, chain: Chain::default() }
    }

    fn serve(&mut self, rings: &mut Rings) {
        let mut bytes = [0; MOST];
        let mut done = 0;
        for p in &self.chain.writable {
            let n = (p.len as usize).min(MOST - done);
            let part = &mut bytes[..n];
            if self.source.fill(part).is_err() || rings.write(DmaPurpose::Data, p.at, part).is_err() {
                break;
            }
            done += n;
        }
        rings.counters().bytes.add(done as u64);
        rings.push(QUEUE, self.chain.head, done as u32);
    }
}

impl VirtioDevice for VirtioRng {
    fn device_type(&self) -> u16 {
        device_type::ENTROPY
    }

    fn class(&self) -> u32 {
        0xFF_00_00
    }

    fn transitional_id(&self) -> u16 {
        0x1005
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    /// There is no configuration to write.
    fn config_store(&mut self, _rings: &Rings, _offset: u64, _value: u8) {}

    /// Requests are served at once; no back end completes anything.
    fn connect(&mut self, _completion: Arc<dyn Completion>) {}

    fn start(&mut self, _rings: &Rings) {}

    fn doorbell(&mut self, rings: &mut Rings, _queue: usize) {
        loop {
            while rings.pop(QUEUE, &mut self.chain) {
                self.serve(rings);
            }
            if !rings.rearm(QUEUE) {
                return;
            }
        }
    }

    fn completed(&mut self, _rings: &mut Rings, _request: BlockRequest, _result: Result<(), BlockError>) {}

    fn in_flight(&self) -> usize {
        0
    }

    fn reset(&mut self) {}
}

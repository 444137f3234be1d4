//! MSI-X: table, pending bits and masking (PCI 3.0, section 6.8.2).

use super::config::PciConfig;
use crate::Width;
use crate::counters::Counter;
use crate::irq::MsiSink;
use std::sync::Arc;

const CAPABILITY_ID: u8 = 0x11;
/// Bytes of the MSI-X capability.
pub const MSIX_CAPABILITY_LEN: u8 = 12;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
const VECTOR_MASKED: u32 = 1;
const ENTRY_LEN: u64 = 16;

#[derive(Clone, Copy)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
}

const RESET_ENTRY: Entry = Entry { address: 0, data: 0, control: VECTOR_MASKED };

crate::snapshot!(Entry { address, data, control });
crate::snapshot!(MsixTable { entries, pending, control | sink, sent, capability });

/// The MSI-X vectors of one function.
pub struct MsixTable {
    sink: Arc<dyn MsiSink>,
    sent: Counter,
    entries: Box<[Entry]>,
    pending: Box<[u64]>,
    capability: u8,
    control: u16,
}

impl MsixTable {
    /// `vectors` vectors (1 to 2048), delivered through `sink`, deliveries counted in `sent`.
    pub fn new(vectors: u16, sink: Arc<dyn MsiSink>, sent: Counter) -> MsixTable {
        assert!((1..=2048).contains(&vectors), "1 to 2048 vectors");
        MsixTable {
            sink,
            sent,
            entries: vec![RESET_ENTRY; usize::from(vectors)].into(),
            pending: vec![0; usize::from(vectors).div_ceil(64)].into(),
            capability: 0,
            control: 0,
        }
    }

    /// Adds the capability to `config`: the table and the pending bits lie in BAR `bar` at these offsets.
    pub fn add_capability(&mut self, config: &mut PciConfig, bar: u8, table: u32, pba: u32) -> u8 {
        let control = (self.entries.len() - 1) as u16;
        let mut body = [0; 10];
        body[..2].copy_from_slice(&control.to_le_bytes());
        body[2..6].copy_from_slice(&(table | u32::from(bar)).to_le_bytes());
        body[6..].copy_from_slice(&(pba | u32::from(bar)).to_le_bytes());
        let at = config.add_capability(CAPABILITY_ID, &body);
        config.allow_writes(at + 2, &(CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_le_bytes());
        self.capability = at;
        at
    }

    /// To be called after each write to `config`: takes over enable and function mask.
    pub fn config_written(&mut self, config: &PciConfig) {
        let control = config.word(self.capability.wrapping_add(2));
        if control != self.control {
            self.control = control;
            (0..self.entries.len()).for_each(|v| self.deliver_pending(v));
        }
    }

    /// All vectors masked, nothing pending.
    pub fn reset(&mut self) {
        self.entries.fill(RESET_ENTRY);
        self.pending.fill(0);
        self.control = 0;
    }

    /// Whether the function signals by messages (INTx is then silent).
    pub fn enabled(&self) -> bool {
        self.control & CONTROL_ENABLE != 0
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.entries.len() as u16
    }

    /// Signals `vector`, or makes it pending while masked; false if MSI-X is off or there is no such vector.
    pub fn notify(&mut self, vector: u16) -> bool {
        let v = usize::from(vector);
        let Some(entry) = self.entries.get(v) else { return false };
        if !self.enabled() {
            return false;
        }
        if self.control & CONTROL_FUNCTION_MASK != 0 || entry.control & VECTOR_MASKED != 0 {
            self.pending[v / 64] |= 1 << (v % 64);
            return true;
        }
        self.sent.add(1);
        self.sink.msi(entry.address, entry.data);
        true
    }

    fn deliver_pending(&mut self, v: usize) {
        let masked =
            self.control & CONTROL_FUNCTION_MASK != 0 || self.entries[v].control & VECTOR_MASKED != 0;
        if self.pending[v / 64] & (1 << (v % 64)) != 0 && self.enabled() && !masked {
            self.pending[v / 64] &= !(1 << (v % 64));
            self.notify(v as u16);
        }
    }

    fn dword(&self, offset: u64) -> u32 {
        let Some(e) = self.entries.get((offset / ENTRY_LEN) as usize) else { return 0 };
        match offset % ENTRY_LEN / 4 {
            0 => e.address as u32,
            1 => (e.address >> 32) as u32,
            2 => e.data,
            _ => e.control,
        }
    }

    /// Reads the table: aligned dwords or quadwords, as the specification asks; others read zero.
    pub fn load(&self, offset: u64, width: Width) -> u64 {
        match width {
            Width::W32 if offset.is_multiple_of(4) => u64::from(self.dword(offset)),
            Width::W64 if offset.is_multiple_of(8) => {
                u64::from(self.dword(offset)) | (u64::from(self.dword(offset + 4)) << 32)
            }
            _ => 0,
        }
    }

    /// Writes the table: aligned dwords or quadwords; others are ignored.
    pub fn store(&mut self, offset: u64, width: Width, value: u64) {
        match width {
            Width::W32 if offset.is_multiple_of(4) => self.store_dword(offset, value as u32),
            Width::W64 if offset.is_multiple_of(8) => {
                self.store_dword(offset, value as u32);
                self.store_dword(offset + 4, (value >> 32) as u32);
            }
            _ => {}
        }
    }

    fn store_dword(&mut self, offset: u64, value: u32) {
        let v = (offset / ENTRY_LEN) as usize;
        let Some(e) = self.entries.get_mut(v) else { return };
        match offset % ENTRY_LEN / 4 {
            0 => e.address = (e.address & !0xFFFF_FFFF) | u64::from(value & !3),
            1 => e.address = (e.address & 0xFFFF_FFFF) | (u64::from(value) << 32),
            2 => e.data = value,
            _ => {
                e.control = value & VECTOR_MASKED;
                self.deliver_pending(v);
            }
        }
    }

    /// Reads the pending bits; writes to them are ignored by the specification.
    pub fn pba_load(&self, offset: u64, width: Width) -> u64 {
        let word = self.pending.get((offset / 8) as usize).copied().unwrap_or(0);
        (word >> (8 * (offset % 8))) & width.mask()
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::PciIdentity;
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Messages(Mutex<Vec<(u64, u32)>>);

    impl MsiSink for Messages {
        fn msi(&self, address: u64, data: u32) {
            self.0.lock().unwrap().push((address, data));
        }
    }

    #[test]
    fn masked_vectors_wait_in_the_pending_bits() {
        let sink = Arc::new(Messages::default());
        let id = PciIdentity { vendor: 1, device: 2, class: 0, revision: 0, subsystem: (0, 0) };
        let mut config = PciConfig::new(id);
        let mut t = MsixTable::new(3, Arc::clone(&sink) as Arc<dyn MsiSink>, Counter::detached());
        let cap = t.add_capability(&mut config, 1, 0, 0x800);
        assert_eq!(config.load(cap, Width::W32), 0x0002_0011);
        assert_eq!(config.load(cap + 8, Width::W32), 0x801);
        assert!(!t.notify(1), "not enabled");
        config.store(cap + 2, Width::W16, 0x8000);
        t.config_written(&config);
        t.store(16, Width::W64, 0xFEE0_1000);
        t.store(24, Width::W32, 0x41);
        assert!(t.notify(1), "masked after reset");
        assert_eq!(t.pba_load(0, Width::W64), 2);
        t.store(28, Width::W32, 0);
        assert_eq!(*sink.0.lock().unwrap(), [(0xFEE0_1000, 0x41)]);
        assert_eq!(t.pba_load(0, Width::W64), 0);
        config.store(cap + 2, Width::W16, 0xC000);
        t.config_written(&config);
        t.notify(1);
        assert_eq!(sink.0.lock().unwrap().len(), 1, "function mask");
        config.store(cap + 2, Width::W16, 0x8000);
        t.config_written(&config);
        assert_eq!(sink.0.lock().unwrap().len(), 2);
        assert!(!t.notify(3), "no such vector");
    }
}

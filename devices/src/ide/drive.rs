//! One ATA disk: task file, geometry, settings, identification.

use super::spec::{device, status};
use crate::block::{BlockBackend, SECTOR_SIZE};
use std::sync::Arc;

/// Sectors per DRQ block that SET MULTIPLE MODE may ask for.
pub(super) const MAX_MULTIPLE: u8 = 16;
/// Sectors of ranges that one TRIM may carry.
pub(super) const MAX_TRIM_SECTORS: u32 = 8;

const HEADS: u16 = 16;
const SECTORS_PER_TRACK: u16 = 63;

/// Command block registers; `[0]` is the last value written, `[1]` the one before (read with HOB).
#[derive(Clone, Copy, Default)]
pub(super) struct TaskFile {
    pub features: [u8; 2],
    pub count: [u8; 2],
    pub lba: [[u8; 2]; 3],
    pub device: u8,
}

/// Pushes a byte into a two-deep register.
pub(super) fn push(register: &mut [u8; 2], value: u8) {
    *register = [value, register[0]];
}

/// Where a command addresses the disk, or that it does not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Address {
    Range { lba: u64, sectors: u32 },
    NotFound,
}

pub(super) struct Drive {
    // configuration and wiring
    pub backend: Arc<dyn BlockBackend>,
    unit: u8,
    // guest-visible state
    pub regs: TaskFile,
    pub status: u8,
    pub error: u8,
    pub multiple: u8,
    pub write_cache: bool,
    pub standby: bool,
    pub sleeping: bool,
    heads: u16,
    sectors_per_track: u16,
    multiword_dma: Option<u8>,
    ultra_dma: Option<u8>,
}

crate::snapshot!(TaskFile { features, count, lba, device });
crate::snapshot!(Drive {
    regs,
    status,
    error,
    multiple,
    write_cache,
    standby,
    sleeping,
    heads,
    sectors_per_track,
    multiword_dma,
    ultra_dma
    | backend, unit
});

impl Drive {
    pub(super) fn new(unit: u8, backend: Arc<dyn BlockBackend>) -> Drive {
        let mut d = Drive {
            backend,
            unit,
            regs: TaskFile::default(),
            status: 0,
            error: 0,
            multiple: 0,
            write_cache: true,
            standby: false,
            sleeping: false,
            heads: HEADS,
            sectors_per_track: SECTORS_PER_TRACK,
            multiword_dma: Some(2),
            ultra_dma: None,
        };
        d.hardware_reset();
        d
    }

    /// Power-on and RESET-: settings too.
    pub(super) fn hardware_reset(&mut self) {
        (self.multiple, self.write_cache) = (MAX_MULTIPLE, true);
        (self.heads, self.sectors_per_track) = (HEADS, SECTORS_PER_TRACK);
        (self.multiword_dma, self.ultra_dma) = (Some(2), None);
        self.software_reset();
    }

    /// SRST and EXECUTE DEVICE DIAGNOSTIC: the signature of an ATA disk, diagnostic code "passed".
    pub(super) fn software_reset(&mut self) {
        (self.standby, self.sleeping) = (false, false);
        let lba = [[1, 0], [0, 0], [0, 0]];
        self.regs = TaskFile { count: [1, 0], lba, ..TaskFile::default() };
        self.error = 1;
        self.status = status::DRDY | status::DSC;
    }

    pub(super) fn sectors(&self) -> u64 {
        self.backend.size() / SECTOR_SIZE
    }

    /// Decodes the address and count of a command; `ext` is a 48-bit command.
    pub(super) fn address(&self, ext: bool) -> Address {
        let r = &self.regs;
        let (sectors, lba) = if ext {
            let count = u32::from(u16::from_le_bytes(r.count));
            (if count == 0 { 65536 } else { count }, self.lba48())
        } else {
            let count = u32::from(r.count[0]);
            let Some(lba) = self.lba28() else { return Address::NotFound };
            (if count == 0 { 256 } else { count }, lba)
        };
        match lba.checked_add(u64::from(sectors)) {
            Some(end) if end <= self.sectors() => Address::Range { lba, sectors },
            _ => Address::NotFound,
        }
    }

    fn lba48(&self) -> u64 {
        let l = &self.regs.lba;
        u64::from_le_bytes([l[0][0], l[1][0], l[2][0], l[0][1], l[1][1], l[2][1], 0, 0])
    }

    /// The 28-bit or cylinder-head-sector address; `None` for a sector that the geometry does not have.
    fn lba28(&self) -> Option<u64> {
        let (r, head) = (&self.regs, self.regs.device & 0xF);
        if r.device & device::LBA != 0 {
            return Some(u64::from(u32::from_le_bytes([r.lba[0][0], r.lba[1][0], r.lba[2][0], head])));
        }
        let (sector, head) = (u64::from(r.lba[0][0]), u64::from(head));
        let (heads, track) = (u64::from(self.heads), u64::from(self.sectors_per_track));
        let cylinder = u64::from(u16::from_le_bytes([r.lba[1][0], r.lba[2][0]]));
        (sector >= 1 && sector <= track && head < heads)
            .then(|| (cylinder * heads + head) * track + sector - 1)
    }

    /// Shows `lba` in the task file, as the kind of command wants it.
    pub(super) fn show_lba(&mut self, lba: u64, ext: bool) {
        let r = &mut self.regs;
        let chs = !ext && r.device & device::LBA == 0;
        let bytes = if chs {
            let (heads, track) = (u64::from(self.heads), u64::from(self.sectors_per_track));
            let (cylinder, rest) = (lba / (heads * track), lba % (heads * track));
            r.device = (r.device & 0xF0) | (rest / track) as u8 & 0xF;
            [(rest % track + 1) as u8, cylinder as u8, (cylinder >> 8) as u8, 0, 0, 0]
        } else {
            let b = lba.to_le_bytes();
            if !ext {
                r.device = (r.device & 0xF0) | b[3] & 0xF;
            }
            [b[0], b[1], b[2], b[3], b[4], b[5]]
        };
        for i in 0..3 {
            r.lba[i] = [bytes[i], if ext { bytes[i + 3] } else { r.lba[i][1] }];
        }
    }

    /// INITIALIZE DEVICE PARAMETERS; false if the geometry makes no sense.
    pub(super) fn set_geometry(&mut self) -> bool {
        let track = u16::from(self.regs.count[0]);
        if track == 0 {
            return false;
        }
        self.sectors_per_track = track;
        self.heads = u16::from(self.regs.device & 0xF) + 1;
        true
    }

    /// SET FEATURES, set transfer mode; false if the mode is not offered.
    pub(super) fn set_transfer_mode(&mut self, mode: u8) -> bool {
        match (mode >> 3, mode & 7) {
            (0, 0 | 1) | (1, 0..=4) => {}
            (4, n @ 0..=2) => (self.multiword_dma, self.ultra_dma) = (Some(n), None),
            (8, n @ 0..=6) => (self.multiword_dma, self.ultra_dma) = (None, Some(n)),
            _ => return false,
        }
        true
    }

    /// IDENTIFY DEVICE data (ATA/ATAPI-7, clause 6.17).
    pub(super) fn identify(&self) -> [u8; 512] {
        let mut w = [0u16; 256];
        self.identify_geometry(&mut w);
        ascii(&mut w[10..20], if self.backend.serial().is_empty() { "PV" } else { self.backend.serial() });
        ascii(&mut w[23..27], env!("CARGO_PKG_VERSION"));
        ascii(&mut w[27..47], "PARAVANE HARDDISK");
        w[47] = 0x8000 | u16::from(MAX_MULTIPLE);
        w[59] = if self.multiple > 0 { 0x100 | u16::from(self.multiple) } else { 0 };
        w[49] = 0x0F00; // IORDY, LBA, DMA
        w[50] = 0x4000;
        (w[51], w[53]) = (0x0200, 0x0007);
        w[63] = 0x07 | self.multiword_dma.map_or(0, |n| 0x100 << n);
        (w[64], w[65], w[66], w[67], w[68]) = (3, 120, 120, 120, 120);
        w[80] = 0x00F0; // ATA/ATAPI-4 to -7
        let cache = if self.write_cache { 0x20 } else { 0 };
        (w[82], w[83], w[84]) = (0x4028, 0x7400, 0x4000);
        (w[85], w[86], w[87]) = (0x4008 | cache, 0x3400, 0x4000);
        w[88] = 0x7F | self.ultra_dma.map_or(0, |n| 0x100 << n);
        w[93] = if self.unit == 0 { 0x600B } else { 0x6B00 }; // 80-conductor cable, reset passed
        if self.backend.can_discard() {
            (w[105], w[169]) = (MAX_TRIM_SECTORS as u16, 1);
        }
        w[217] = 1; // non-rotating
        self.identify_checksum(&w)
    }

    fn identify_geometry(&self, w: &mut [u16; 256]) {
        let total = self.sectors();
        let cylinders = |h: u16, s: u16| (total / (u64::from(h) * u64::from(s))).min(16383) as u16;
        (w[0], w[1], w[3], w[6]) = (0x0040, cylinders(HEADS, SECTORS_PER_TRACK), HEADS, SECTORS_PER_TRACK);
        let (h, s) = (self.heads, self.sectors_per_track);
        (w[54], w[55], w[56]) = (cylinders(h, s), h, s);
        let words = |w: &mut [u16], n: u64| (0..w.len()).for_each(|i| w[i] = (n >> (16 * i)) as u16);
        let current = u64::from(w[54]) * u64::from(h) * u64::from(s);
        words(&mut w[57..59], current);
        words(&mut w[60..62], total.min(0x0FFF_FFFF));
        words(&mut w[100..104], total.min((1 << 48) - 1));
    }

    fn identify_checksum(&self, w: &[u16; 256]) -> [u8; 512] {
        let mut b = [0; 512];
        for (pair, word) in b.chunks_exact_mut(2).zip(w) {
            pair.copy_from_slice(&word.to_le_bytes());
        }
        b[510] = 0xA5;
        b[511] = b[..511].iter().fold(0u8, |sum, &x| sum.wrapping_sub(x));
        b
    }
}

/// ATA strings: padded with spaces, the first character in the high byte of each word.
fn ascii(words: &mut [u16], text: &str) {
    let mut bytes = text.bytes().filter(|b| (0x20..0x7F).contains(b)).chain(std::iter::repeat(b' '));
    for w in words {
        let (high, low) = (bytes.next().unwrap_or(b' '), bytes.next().unwrap_or(b' '));
        *w = u16::from_be_bytes([high, low]);
    }
}

//! IDE disks: PIO by READ and WRITE MULTIPLE, and bus-master DMA, both driven by interrupts (ATA/ATAPI-6; SFF-8038i,
//! "Programming Interface for Bus Master IDE Controller"; Intel 82371SB).
//!
//! Safety: transfers stay inside the buffers that a [`Plan`] names, and the PRDT changes only between commands.

use crate::cell::Fixed;
use crate::port::{in8, in16, ins16, out8, out32, outs16};
use crate::shared::{SECTOR, Transfer};
use crate::work::{Direction, Operation, Plan, Storage};
use crate::{irq, pci};

const CLASS_IDE: u16 = 0x0101;
const INTEL: u32 = 0x8086;
/// PIIX timing registers; bit 15 lets the channel decode its ports.
const IDETIM: u8 = 0x40;
const IDETIM_DECODE: u32 = 1 << 31 | 1 << 15;

const SECTOR_COUNT: u16 = 2;
const LBA_LOW: u16 = 3;
const LBA_MID: u16 = 4;
const LBA_HIGH: u16 = 5;
const DEVICE: u16 = 6;
const STATUS: u16 = 7;
const COMMAND: u16 = 7;

const BSY: u8 = 1 << 7;
const DF: u8 = 1 << 5;
const DRQ: u8 = 1 << 3;
const ERR: u8 = 1 << 0;
const DEVICE_LBA: u8 = 0xE0;
const CONTROL_NIEN: u8 = 1 << 1;

const IDENTIFY_DEVICE: u8 = 0xEC;
const SET_MULTIPLE_MODE: u8 = 0xC6;
/// Commands by [read, write] and [28-bit, 48-bit].
const PIO_SINGLE: [[u8; 2]; 2] = [[0x20, 0x24], [0x30, 0x34]];
const PIO_MULTIPLE: [[u8; 2]; 2] = [[0xC4, 0x29], [0xC5, 0x39]];
const DMA: [[u8; 2]; 2] = [[0xC8, 0x25], [0xCA, 0x35]];

const BMICOM_START: u8 = 1 << 0;
/// Direction as seen from memory: set for reads from the disk.
const BMICOM_READ: u8 = 1 << 3;
const BMISTA_ERROR: u8 = 1 << 1;
const BMISTA_INTERRUPT: u8 = 1 << 2;

const PATIENCE: u32 = 10_000_000;
const PRD_MAX: usize = 128;
const PRD_LAST: u32 = 1 << 31;
const PRD_BYTES: u64 = 64 << 10;
static PRDT: Fixed<[[u32; 2]; PRD_MAX]> = Fixed::new([[0; 2]; PRD_MAX]);

/// An IDE disk.
pub struct Disk {
    ports: u16,
    control: u16,
    bus_master: u16,
    vector: u8,
    device: u8,
    sectors: u64,
    /// Sectors per interrupt in PIO.
    block: u64,
    transfer: Transfer,
}

impl Disk {
    /// Disk `index`: 0 and 1 on the primary channel, 2 and 3 on the secondary.
    pub fn open(index: u8, transfer: Transfer) -> Option<Disk> {
        if index > 3 {
            return None;
        }
        let controller = pci::functions().find(|f| f.class() == CLASS_IDE)?;
        if controller.id() & 0xFFFF == INTEL {
            controller.write(IDETIM, controller.read(IDETIM) | IDETIM_DECODE);
        }
        let secondary = u16::from(index >> 1);
        let (ports, control, line) = if secondary == 0 { (0x1F0, 0x3F6, 14) } else { (0x170, 0x376, 15) };
        let mut disk = Disk {
            ports,
            control,
            bus_master: controller.bar(4) as u16 + 8 * secondary,
            vector: irq::unmask(line),
            device: DEVICE_LBA | (index & 1) << 4,
            sectors: 0,
            block: 1,
            transfer,
        };
        disk.identify()?;
        out8(disk.control, 0);
        in8(disk.ports + STATUS);
        irq::forget(disk.vector);
        Some(disk)
    }

    /// Reads capacity and block size, with the device's interrupts off.
    fn identify(&mut self) -> Option<()> {
        out8(self.control, CONTROL_NIEN);
        out8(self.ports + DEVICE, self.device);
        if in8(self.ports + STATUS) == 0xFF {
            return None;
        }
        self.until_ready()?;
        out8(self.ports + COMMAND, IDENTIFY_DEVICE);
        if in8(self.ports + STATUS) == 0 || self.until_ready()? & (DRQ | ERR) != DRQ {
            return None;
        }
        let words: [u16; 256] = core::array::from_fn(|_| in16(self.ports));
        let number = |at: usize, n: usize| (0..n).fold(0, |v, i| v | u64::from(words[at + i]) << (16 * i));
        self.sectors = if words[83] & 1 << 10 != 0 { number(100, 4) } else { number(60, 2) };
        let multiple = words[47] as u8;
        if multiple > 1 {
            out8(self.ports + SECTOR_COUNT, multiple);
            out8(self.ports + COMMAND, SET_MULTIPLE_MODE);
            if self.until_ready()? & ERR == 0 {
                self.block = u64::from(multiple);
            }
        }
        Some(())
    }

    fn until_ready(&self) -> Option<u8> {
        (0..PATIENCE).map(|_| in8(self.ports + STATUS)).find(|s| s & BSY == 0)
    }

    /// Writes the task file and the command: 28-bit where the address and length allow it, as Linux does.
    fn command(&self, op: &Operation, direction: Direction, codes: &[[u8; 2]; 2]) {
        let wide = op.lba + op.sectors > 1 << 28 || op.sectors > 256;
        let lba = op.lba.to_le_bytes();
        let count = op.sectors.to_le_bytes();
        if wide {
            out8(self.ports + DEVICE, self.device);
            self.address(count[1], lba[3], lba[4], lba[5]);
        } else {
            out8(self.ports + DEVICE, self.device | lba[3]);
        }
        self.address(count[0], lba[0], lba[1], lba[2]);
        out8(self.ports + COMMAND, codes[direction as usize][usize::from(wide)]);
    }

    fn address(&self, count: u8, low: u8, mid: u8, high: u8) {
        out8(self.ports + SECTOR_COUNT, count);
        out8(self.ports + LBA_LOW, low);
        out8(self.ports + LBA_MID, mid);
        out8(self.ports + LBA_HIGH, high);
    }

    fn pio(&self, op: &Operation, direction: Direction) -> bool {
        let codes = if self.block > 1 { &PIO_MULTIPLE } else { &PIO_SINGLE };
        self.command(op, direction, codes);
        let mut at = op.buffer;
        let mut left = op.sectors;
        // The first block of a write is asked for without an interrupt.
        let mut status = match direction {
            Direction::Read => self.wait(),
            Direction::Write => self.until_ready().unwrap_or(ERR),
        };
        while left > 0 {
            if status & (BSY | DF | DRQ | ERR) != DRQ {
                return false;
            }
            let sectors = left.min(self.block);
            // SAFETY: within the operation's buffer.
            unsafe {
                match direction {
                    Direction::Read => ins16(self.ports, at, sectors * SECTOR / 2),
                    Direction::Write => outs16(self.ports, at, sectors * SECTOR / 2),
                }
            }
            at += sectors * SECTOR;
            left -= sectors;
            if left > 0 || direction == Direction::Write {
                status = self.wait();
            }
        }
        direction == Direction::Read || status & (BSY | DF | ERR) == 0
    }

    /// Sleeps until the device interrupts; reading the status takes the interrupt back.
    fn wait(&self) -> u8 {
        irq::wait(self.vector);
        in8(self.ports + STATUS)
    }

    fn dma(&self, op: &Operation, direction: Direction) -> bool {
        fill_prdt(op.buffer, op.sectors * SECTOR);
        let command = if direction == Direction::Read { BMICOM_READ } else { 0 };
        out32(self.bus_master + 4, PRDT.address() as u32);
        out8(self.bus_master, command);
        out8(self.bus_master + 2, in8(self.bus_master + 2) | BMISTA_ERROR | BMISTA_INTERRUPT);
        self.command(op, direction, &DMA);
        out8(self.bus_master, command | BMICOM_START);
        let mut state;
        loop {
            irq::wait(self.vector);
            state = in8(self.bus_master + 2);
            if state & BMISTA_INTERRUPT != 0 {
                break;
            }
        }
        out8(self.bus_master, command);
        let status = in8(self.ports + STATUS);
        out8(self.bus_master + 2, state | BMISTA_ERROR | BMISTA_INTERRUPT);
        state & BMISTA_ERROR == 0 && status & (BSY | DF | DRQ | ERR) == 0
    }
}

/// Describes `len` bytes at `at` by pieces that cross no 64 KiB boundary.
fn fill_prdt(mut at: u64, len: u64) {
    let end = at + len;
    let mut i = 0;
    while at < end && i < PRD_MAX {
        let next = end.min((at | (PRD_BYTES - 1)) + 1);
        let last = if next == end { PRD_LAST } else { 0 };
        // SAFETY: within the table; the bus master reads it only after the command that follows.
        unsafe { (*PRDT.get())[i] = [at as u32, (next - at) as u32 & 0xFFFE | last] };
        at = next;
        i += 1;
    }
}

impl Storage for Disk {
    fn sectors(&self) -> u64 {
        self.sectors
    }

    fn run(&mut self, plan: &Plan<'_>, direction: Direction, _depth: u32) -> u64 {
        let ok = |op: &Operation| match self.transfer {
            Transfer::Dma => self.dma(op, direction),
            _ => self.pio(op, direction),
        };
        (0..plan.len()).filter(|&i| !ok(&plan.operation(i))).count() as u64
    }
}

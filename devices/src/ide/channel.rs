//! One channel: registers, interrupt, data transfer, and the bus master half that belongs to it.
//!
//! The channel's mutex is its only lock; back-end completions take it on the worker thread, or
//! come at once, on the vCPU's thread that holds it (`BlockBackend::serve_now`). While the back end works
//! the drive is BSY. A software reset that meets such work waits for it, so that no data lands in guest memory after the
//! guest saw the drive ready again.

use super::dma;
use super::drive::{Drive, push};
use super::spec::{bus_master, control, device, error, status};
use crate::block::{BlockBackend, BlockData, BlockError, BlockOp, BlockRequest, Completion, SECTOR_SIZE};
use crate::counters::{Counter, Counters};
use crate::device::{Device, Inspect, PioDevice, ResetKind, StringPio};
use crate::dma::{DmaPurpose, DmaTap};
use crate::irq::IrqLine;
use crate::snapshot::{Snapshot, StateError, StateStream};
use crate::{Port, Width};
use paravane_memory::GuestMemory;
use std::sync::{Arc, Mutex, Weak};

/// Sectors that one back-end request of a PIO command moves.
const CHUNK: u32 = 256;
const SECTOR: usize = SECTOR_SIZE as usize;

/// What the command in progress does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum Kind {
    #[default]
    PioRead,
    PioWrite,
    DmaRead,
    DmaWrite,
    Verify,
    Flush,
    /// The ranges to discard are fetched by DMA.
    Trim,
}

/// The command in progress.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Job {
    pub unit: usize,
    pub kind: Kind,
    pub ext: bool,
    /// Next sector for the back end.
    pub lba: u64,
    /// Sectors not yet done by the back end.
    pub left: u32,
    /// Sectors per DRQ block.
    pub block: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Idle,
    /// The guest reads the buffer.
    DataIn,
    /// The guest fills the buffer.
    DataOut,
    /// The drive requests DMA; the bus master is not started.
    DmaWait,
    /// The back end works.
    Busy,
}

struct ChannelCounters {
    commands: Counter,
    bytes_copied: Counter,
}

/// One IDE channel with up to two disks; also the device behind its legacy ports.
pub struct Channel {
    // wiring
    label: String,
    memory: GuestMemory,
    tap: DmaTap,
    irq: IrqLine,
    completion: Arc<dyn Completion>,
    pub(super) drives: [Option<Drive>; 2],
    counters: ChannelCounters,
    // bookkeeping
    spare: Option<BlockRequest>,
    buffer: Vec<u8>,
    position: usize,
    block_end: usize,
    phase: Phase,
    pub(super) job: Option<Job>,
    prd_longer: bool,
    trims: Vec<(u64, u64)>,
    reset_waits: bool,
    // guest-visible state
    selected: u8,
    control: u8,
    intrq: bool,
    bm_command: u8,
    bm_status: u8,
    bm_table: u32,
}

struct Done(Weak<Mutex<Channel>>);

impl Completion for Done {
    fn complete(&self, request: BlockRequest, result: Result<(), BlockError>) {
        if let Some(channel) = self.0.upgrade() {
            channel.lock().expect("IDE channel").back_end_done(request, result);
        }
    }
}

impl Channel {
    pub(super) fn new(
        label: &str,
        memory: GuestMemory,
        tap: DmaTap,
        irq: IrqLine,
        counters: &Counters,
    ) -> Arc<Mutex<Channel>> {
        Arc::new_cyclic(|me: &Weak<Mutex<Channel>>| {
            let count = |name| counters.counter(label, name);
            Mutex::new(Channel {
                label: label.to_owned(),
                memory,
                tap,
                irq,
                completion: Arc::new(Done(Weak::clone(me))),
                drives: [None, None],
                counters: ChannelCounters {
                    commands: count("commands"),
                    bytes_copied: count("bytes_copied"),
                },
                spare: None,
                buffer: Vec::new(),
                position: 0,
                block_end: 0,
                phase: Phase::Idle,
                job: None,
                prd_longer: false,
                trims: Vec::new(),
                reset_waits: false,
                selected: 0,
                control: 0,
                intrq: false,
                bm_command: 0,
                bm_status: 0,
                bm_table: 0,
            })
        })
    }

    pub(super) fn attach(&mut self, unit: u8, backend: Arc<dyn BlockBackend>) {
        self.drives[usize::from(unit & 1)] = Some(Drive::new(unit & 1, backend));
        self.bm_status |= 0x20 << (unit & 1);
    }

    pub(super) fn unit(&self) -> usize {
        usize::from(self.selected & device::DEV != 0)
    }

    fn drive_of(&mut self, job: Job) -> Option<&mut Drive> {
        self.drives[job.unit].as_mut()
    }

    fn set_status(&mut self, unit: usize, value: u8) {
        if let Some(d) = &mut self.drives[unit] {
            d.status = value;
        }
    }

    // ---- interrupt --------------------------------------------------------------------------------------

    fn set_intrq(&mut self, high: bool) {
        if high {
            self.bm_status |= bus_master::INTERRUPT;
        }
        self.intrq = high;
        self.drive_irq();
    }

    fn drive_irq(&mut self) {
        self.irq.set(self.intrq && self.control & control::NIEN == 0);
    }

    // ---- ends of commands -------------------------------------------------------------------------------

    fn end(&mut self, unit: usize, status: u8, error: u8) {
        self.phase = Phase::Idle;
        self.job = None;
        if let Some(d) = &mut self.drives[unit] {
            (d.status, d.error) = (status, error);
        }
    }

    /// The command ended well: interrupt.
    pub(super) fn succeed(&mut self, unit: usize) {
        self.end(unit, status::DRDY | status::DSC, 0);
        self.set_intrq(true);
    }

    /// The command ended with `error`: interrupt.
    pub(super) fn fail(&mut self, unit: usize, error: u8) {
        self.end(unit, status::DRDY | status::DSC | status::ERR, error);
        self.set_intrq(true);
    }

    fn fail_job(&mut self, job: Job, cause: BlockError) {
        if let Some(d) = self.drive_of(job) {
            d.show_lba(job.lba, job.ext);
        }
        let dma = matches!(job.kind, Kind::DmaRead | Kind::DmaWrite | Kind::Trim);
        if dma && cause == BlockError::BadAddress {
            self.bm_status |= bus_master::ERROR;
        }
        if dma {
            self.bm_status &= !bus_master::ACTIVE;
        }
        let read = matches!(job.kind, Kind::PioRead | Kind::DmaRead | Kind::Verify);
        match cause {
            BlockError::OutOfRange => self.fail(job.unit, error::IDNF),
            BlockError::ReadOnly | BlockError::BadAddress | BlockError::Closed => {
                self.fail(job.unit, error::ABRT)
            }
            BlockError::NoSpace | BlockError::Io(_) if read => self.fail(job.unit, error::UNC),
            BlockError::NoSpace | BlockError::Io(_) => {
                self.end(job.unit, status::DRDY | status::DF | status::ERR, error::ABRT);
                self.set_intrq(true);
            }
        }
    }

    // ---- the back end -----------------------------------------------------------------------------------

    fn request(&mut self, op: BlockOp, data: BlockData, job: Job) -> BlockRequest {
        let mut r =
            self.spare.take().unwrap_or_else(|| BlockRequest::new(op, 0, Arc::clone(&self.completion)));
        (r.op, r.data, r.offset, r.len) = (op, data, job.lba * SECTOR_SIZE, 0);
        r
    }

    fn submit(&mut self, job: Job, mut request: BlockRequest) {
        self.phase = Phase::Busy;
        self.job = Some(job);
        self.set_status(job.unit, status::BSY);
        let Some(d) = &self.drives[job.unit] else { return self.end(job.unit, 0, 0) };
        // VERIFY moves nothing to the guest and may be long: it starts itself again for every chunk.
        if job.kind != Kind::Verify && d.backend.serve_now(&mut request) {
            self.back_end_done(request, Ok(()));
        } else {
            d.backend.submit(request);
        }
    }

    /// Starts the back end on `job` or its next chunk, or asks for data or DMA first.
    pub(super) fn start(&mut self, job: Job) {
        match job.kind {
            Kind::PioRead | Kind::Verify => {
                let mut r = self.request(BlockOp::Read, BlockData::Owned, job);
                std::mem::swap(&mut r.buffer, &mut self.buffer);
                r.buffer.resize(job.left.min(CHUNK) as usize * SECTOR, 0);
                self.submit(job, r);
            }
            Kind::PioWrite => {
                self.buffer.resize(job.left.min(CHUNK) as usize * SECTOR, 0);
                self.offer_data(job, Phase::DataOut);
            }
            Kind::Flush => {
                let r = self.request(BlockOp::Flush, BlockData::Guest, job);
                self.submit(job, r);
            }
            Kind::DmaRead | Kind::DmaWrite | Kind::Trim => {
                (self.phase, self.job) = (Phase::DmaWait, Some(job));
                self.set_status(job.unit, status::DRDY | status::DSC | status::DRQ);
                if self.bm_command & bus_master::START != 0 {
                    self.run_dma(job);
                }
            }
        }
    }

    /// Lets the guest read `data` as the result of a command without back-end work.
    pub(super) fn give(&mut self, unit: usize, data: &[u8]) {
        self.buffer.clear();
        self.buffer.extend_from_slice(data);
        self.offer_data(
            Job { unit, kind: Kind::PioRead, ext: false, lba: 0, left: 0, block: 1 },
            Phase::DataIn,
        );
        self.set_intrq(true);
    }

    fn offer_data(&mut self, job: Job, phase: Phase) {
        (self.phase, self.job, self.position) = (phase, Some(job), 0);
        self.block_end = (job.block as usize * SECTOR).min(self.buffer.len());
        self.set_status(job.unit, status::DRDY | status::DSC | status::DRQ);
    }

    fn back_end_done(&mut self, mut request: BlockRequest, result: Result<(), BlockError>) {
        let moved = (request.total() / SECTOR_SIZE) as u32;
        if request.data == BlockData::Owned {
            std::mem::swap(&mut self.buffer, &mut request.buffer);
        }
        let op = request.op;
        self.spare = Some(request);
        if std::mem::take(&mut self.reset_waits) {
            self.reset_drives();
            return;
        }
        let Some(mut job) = self.job.filter(|_| self.phase == Phase::Busy) else { return };
        if let Err(cause) = result {
            self.fail_job(job, cause);
            return;
        }
        if job.kind == Kind::Trim {
            self.trim_next(job);
            return;
        }
        if op != BlockOp::Flush {
            job.lba += u64::from(moved);
            job.left = job.left.saturating_sub(moved);
        }
        self.advance(job, op);
    }

    /// The back end moved a chunk of `job`, or flushed.
    fn advance(&mut self, job: Job, op: BlockOp) {
        let through = self.drives[job.unit].as_ref().is_some_and(|d| !d.write_cache);
        match job.kind {
            Kind::PioRead => {
                self.offer_data(job, Phase::DataIn);
                self.set_intrq(true);
            }
            Kind::PioWrite | Kind::Verify if job.left > 0 => {
                self.start(job);
                if job.kind == Kind::PioWrite {
                    self.set_intrq(true);
                }
            }
            Kind::PioWrite | Kind::DmaWrite if through && op != BlockOp::Flush => {
                let r = self.request(BlockOp::Flush, BlockData::Guest, job);
                self.submit(job, r);
            }
            Kind::DmaRead | Kind::DmaWrite => {
                if !self.prd_longer {
                    self.bm_status &= !bus_master::ACTIVE;
                }
                self.succeed(job.unit);
            }
            Kind::PioWrite | Kind::Verify | Kind::Flush | Kind::Trim => self.succeed(job.unit),
        }
    }

    // ---- DMA --------------------------------------------------------------------------------------------

    fn run_dma(&mut self, job: Job) {
        let (op, to_memory) = match job.kind {
            Kind::DmaRead => (BlockOp::Read, true),
            _ => (BlockOp::Write, false),
        };
        let mut r = self.request(op, BlockData::Guest, job);
        let bytes = u64::from(job.left) * SECTOR_SIZE;
        let fit = dma::regions(&self.memory, &self.tap, self.bm_table, bytes, &mut r.segments);
        if fit == dma::Fit::Short || (self.bm_command & bus_master::TO_MEMORY != 0) != to_memory {
            self.spare = Some(r);
            self.fail_job(job, BlockError::BadAddress);
            return;
        }
        self.prd_longer = fit == dma::Fit::Longer;
        if job.kind == Kind::Trim {
            self.fetch_trims(job, r);
        } else {
            self.submit(job, r);
        }
    }

    /// DATA SET MANAGEMENT data: 48 bits of LBA and 16 bits of length per range (ACS-2, 7.10).
    fn fetch_trims(&mut self, job: Job, request: BlockRequest) {
        let mut data = Vec::with_capacity(job.left as usize * SECTOR);
        for s in &request.segments {
            let at = data.len();
            data.resize(at + s.len as usize, 0);
            if self.memory.read(s.at, &mut data[at..]).is_err() {
                self.spare = Some(request);
                self.fail_job(job, BlockError::BadAddress);
                return;
            }
            self.tap.read(DmaPurpose::Request, s.at, s.len);
        }
        self.counters.bytes_copied.add(data.len() as u64);
        self.spare = Some(request);
        self.trims.clear();
        for range in data.chunks_exact(8) {
            let raw = range.iter().rev().fold(0u64, |n, &b| (n << 8) | u64::from(b));
            if raw >> 48 != 0 {
                self.trims.push((raw & ((1 << 48) - 1), raw >> 48));
            }
        }
        self.trim_next(job);
    }

    fn trim_next(&mut self, job: Job) {
        let Some((lba, sectors)) = self.trims.pop() else {
            if !self.prd_longer {
                self.bm_status &= !bus_master::ACTIVE;
            }
            self.succeed(job.unit);
            return;
        };
        let job = Job { lba, ..job };
        let mut r = self.request(BlockOp::Discard, BlockData::Guest, job);
        r.len = sectors * SECTOR_SIZE;
        self.submit(job, r);
    }

    /// Reads bus master register `offset` (0-7).
    pub(super) fn bus_master_load(&self, offset: u8) -> u8 {
        match offset {
            0 => self.bm_command,
            2 => self.bm_status,
            4..=7 => self.bm_table.to_le_bytes()[usize::from(offset) - 4],
            _ => 0,
        }
    }

    /// Writes bus master register `offset` (0-7).
    pub(super) fn bus_master_store(&mut self, offset: u8, value: u8) {
        match offset {
            0 => self.bus_master_command(value & (bus_master::START | bus_master::TO_MEMORY)),
            2 => {
                let cleared = value & (bus_master::ERROR | bus_master::INTERRUPT);
                self.bm_status =
                    (self.bm_status & !cleared & !bus_master::CAPABLE) | (value & bus_master::CAPABLE);
            }
            4..=7 => {
                let mut b = self.bm_table.to_le_bytes();
                b[usize::from(offset) - 4] = value;
                self.bm_table = u32::from_le_bytes(b) & !3;
            }
            _ => {}
        }
    }

    fn bus_master_command(&mut self, value: u8) {
        let rising = value & !self.bm_command & bus_master::START != 0;
        self.bm_command = value;
        if value & bus_master::START == 0 {
            self.bm_status &= !bus_master::ACTIVE;
        } else if rising {
            self.bm_status |= bus_master::ACTIVE;
            if let (Phase::DmaWait, Some(job)) = (self.phase, self.job) {
                self.run_dma(job);
            }
        }
    }

    // ---- reset ------------------------------------------------------------------------------------------

    fn reset_drives(&mut self) {
        (self.phase, self.job) = (Phase::Idle, None);
        self.selected = 0;
        self.set_intrq(false);
        // Bit 2 of the control register still set: the drives stay in reset.
        let held = self.control & control::SRST != 0;
        for d in self.drives.iter_mut().flatten() {
            d.software_reset();
            if held {
                d.status = status::BSY;
            }
        }
    }

    fn software_reset(&mut self) {
        // Device 0 is selected from the start and answers BSY, whichever was selected (ATA-7, 9.2 and 9.3).
        self.selected = 0;
        self.drives.iter_mut().flatten().for_each(|d| d.status = status::BSY);
        if self.phase == Phase::Busy {
            self.reset_waits = true;
        } else {
            self.reset_drives();
        }
    }

    /// EXECUTE DEVICE DIAGNOSTIC: both devices take part, device 0 interrupts.
    pub(super) fn diagnose(&mut self) {
        self.reset_drives();
        self.set_intrq(true);
    }

    // ---- registers --------------------------------------------------------------------------------------

    fn status(&self) -> u8 {
        match (&self.drives[self.unit()], &self.drives[1 - self.unit()]) {
            (Some(d), _) => d.status,
            (None, Some(_)) => 0,
            // Nobody drives the bus; DD7 is pulled down.
            (None, None) => 0x7F,
        }
    }

    fn busy(&self) -> bool {
        self.drives.iter().flatten().any(|d| d.status & status::BSY != 0)
    }

    fn register_in(&mut self, register: u8) -> u8 {
        if register == 7 {
            let value = self.status();
            if self.drives[self.unit()].is_some() {
                self.set_intrq(false);
            }
            return value;
        }
        let hob = usize::from(self.control & control::HOB != 0);
        let Some(d) = &self.drives[self.unit()] else { return self.status() };
        if d.status & status::BSY != 0 {
            return d.status;
        }
        match register {
            1 => d.error,
            2 => d.regs.count[hob],
            3..=5 => d.regs.lba[usize::from(register) - 3][hob],
            _ => d.regs.device | self.selected & device::DEV | device::OBSOLETE,
        }
    }

    fn register_out(&mut self, register: u8, value: u8) {
        if register != 7 && self.busy() {
            return;
        }
        self.control &= !control::HOB;
        if register == 6 {
            self.selected = value;
        }
        for d in self.drives.iter_mut().flatten() {
            match register {
                1 => push(&mut d.regs.features, value),
                2 => push(&mut d.regs.count, value),
                3..=5 => push(&mut d.regs.lba[usize::from(register) - 3], value),
                6 => d.regs.device = value & !device::OBSOLETE,
                _ => {}
            }
        }
        if register == 7 {
            self.command_out(value);
        }
    }

    fn command_out(&mut self, code: u8) {
        let unit = self.unit();
        let Some(d) = &mut self.drives[unit] else { return };
        if d.status & status::BSY != 0 || d.sleeping || self.phase == Phase::Busy {
            return;
        }
        self.counters.commands.add(1);
        (self.phase, self.job) = (Phase::Idle, None);
        d.error = 0;
        self.set_intrq(false);
        self.execute(unit, code);
    }

    fn control_out(&mut self, value: u8) {
        let before = self.control;
        self.control = value;
        if (before ^ value) & control::SRST != 0 {
            self.software_reset();
        }
        self.drive_irq();
    }

    // ---- data port --------------------------------------------------------------------------------------

    fn data_in(&mut self, out: &mut [u8]) -> usize {
        if self.phase != Phase::DataIn {
            return 0;
        }
        let n = out.len().min(self.block_end - self.position);
        out[..n].copy_from_slice(&self.buffer[self.position..self.position + n]);
        self.moved(n);
        n
    }

    fn data_out(&mut self, data: &[u8]) -> usize {
        if self.phase != Phase::DataOut {
            return 0;
        }
        let n = data.len().min(self.block_end - self.position);
        self.buffer[self.position..self.position + n].copy_from_slice(&data[..n]);
        self.moved(n);
        n
    }

    fn moved(&mut self, n: usize) {
        self.position += n;
        if self.position < self.block_end {
            return;
        }
        let Some(job) = self.job else { return };
        // Counted by the block: an atomic for each word would cost as much as moving it.
        let block = (self.block_end - 1) % (job.block as usize * SECTOR) + 1;
        self.counters.bytes_copied.add(block as u64);
        if self.position < self.buffer.len() {
            self.block_end = (self.block_end + job.block as usize * SECTOR).min(self.buffer.len());
            self.set_intrq(true);
        } else if self.phase == Phase::DataOut {
            let mut r = self.request(BlockOp::Write, BlockData::Owned, job);
            std::mem::swap(&mut r.buffer, &mut self.buffer);
            self.submit(job, r);
        } else if job.left > 0 {
            self.start(job);
        } else {
            self.end(job.unit, status::DRDY | status::DSC, 0);
        }
    }
}

/// Ports 0x3F6 and 0x376 differ from 0x1F0-7 and 0x170-7 in bit 9.
const CONTROL_BLOCK: u16 = 0x200;

impl PioDevice for Channel {
    fn port_in(&mut self, port: Port, width: Width) -> u32 {
        if port.0 & CONTROL_BLOCK != 0 {
            return u32::from(self.status());
        }
        let mut bytes = [0; 4];
        let n = width.bytes().min(4);
        if port.0 & 7 == 0 {
            self.data_in(&mut bytes[..n]);
        } else {
            for (i, b) in bytes[..n].iter_mut().enumerate() {
                *b = self.register_in(((port.0 as usize + i) & 7).max(1) as u8);
            }
        }
        u32::from_le_bytes(bytes)
    }

    fn port_out(&mut self, port: Port, width: Width, value: u32) {
        let bytes = value.to_le_bytes();
        let n = width.bytes().min(4);
        if port.0 & CONTROL_BLOCK != 0 {
            self.control_out(bytes[0]);
        } else if port.0 & 7 == 0 {
            self.data_out(&bytes[..n]);
        } else {
            for (i, &b) in bytes[..n].iter().enumerate() {
                let register = usize::from(port.0 & 7) + i;
                if register <= 7 {
                    self.register_out(register as u8, b);
                }
            }
        }
    }
}

impl StringPio for Channel {
    fn pio_in_string(&mut self, port: Port, _width: Width, buf: &mut [u8]) -> usize {
        if port.0 & (CONTROL_BLOCK | 7) == 0 { self.data_in(buf) } else { 0 }
    }

    fn pio_out_string(&mut self, port: Port, _width: Width, buf: &[u8]) -> usize {
        if port.0 & (CONTROL_BLOCK | 7) == 0 { self.data_out(buf) } else { 0 }
    }
}

crate::snapshot_enum!(Kind { PioRead, PioWrite, DmaRead, DmaWrite, Verify, Flush, Trim });
crate::snapshot_enum!(Phase { Idle, DataIn, DataOut, DmaWait, Busy });
crate::snapshot!(Job { unit, kind, ext, lba, left, block });

/// Saved while no back end works; loading abandons what one was asked for.
impl Snapshot for Channel {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        let Channel {
            label: _,
            memory: _,
            tap: _,
            irq,
            completion: _,
            drives,
            counters: _,
            spare: _,
            buffer,
            position,
            block_end,
            phase,
            job,
            prd_longer,
            trims,
            reset_waits,
            selected,
            control,
            intrq,
            bm_command,
            bm_status,
            bm_table,
        } = self;
        if *phase == Phase::Busy && !s.loads() {
            return Err(StateError::Busy("an IDE disk"));
        }
        s.field("irq", irq)?;
        drives.iter_mut().flatten().try_for_each(|drive| drive.state(s))?;
        s.field("phase", phase)?;
        s.field("position", position)?;
        s.field("block_end", block_end)?;
        buffer_state(*phase, *position, buffer, s)?;
        s.field("job", job)?;
        s.field("prd_longer", prd_longer)?;
        s.field("trims", trims)?;
        s.field("reset_waits", reset_waits)?;
        s.field("selected", selected)?;
        s.field("control", control)?;
        s.field("intrq", intrq)?;
        s.field("bm_command", bm_command)?;
        s.field("bm_status", bm_status)?;
        s.field("bm_table", bm_table)?;
        // What was loaded must be as the registers' code relies on.
        let sound = *position <= *block_end && *block_end <= buffer.len();
        let job_sound = job.is_none_or(|job| job.unit < 2);
        if sound && job_sound { Ok(()) } else { Err(StateError::Value("the IDE buffer")) }
    }
}

/// Of the buffer only what the guest reads, or has written so far, is state: the rest is left over from former commands.
fn buffer_state(
    phase: Phase,
    position: usize,
    buffer: &mut Vec<u8>,
    s: &mut StateStream<'_>,
) -> Result<(), StateError> {
    let mut len = if matches!(phase, Phase::DataIn | Phase::DataOut) { buffer.len() as u32 } else { 0 };
    len.state(s)?;
    if len as usize > CHUNK as usize * SECTOR {
        return Err(StateError::Value("the length of the IDE buffer"));
    }
    if s.loads() {
        buffer.clear();
        buffer.resize(len as usize, 0);
    }
    let end = if phase == Phase::DataOut { position.min(len as usize) } else { len as usize };
    s.bytes(&mut buffer[..end])
}

impl Inspect for Channel {
    fn inspect(&self, field: &mut dyn FnMut(&str, &dyn std::fmt::Display)) {
        field("selected", &self.unit());
        field("status", &format_args!("{:#04x}", self.status()));
        field("phase", &format_args!("{:?}", self.phase));
        field("intrq", &self.intrq);
        field("bus master", &format_args!("{:#04x} {:#04x}", self.bm_command, self.bm_status));
        if let Some(job) = &self.job {
            field("job", &format_args!("{job:?}"));
        }
    }
}

impl Device for Channel {
    fn label(&self) -> &str {
        &self.label
    }

    fn reset(&mut self, _kind: ResetKind) {
        (self.control, self.bm_command, self.bm_table) = (0, 0, 0);
        self.bm_status &= bus_master::CAPABLE;
        self.drives.iter_mut().flatten().for_each(Drive::hardware_reset);
        self.software_reset();
    }

    fn as_snapshot(&mut self) -> Option<&mut dyn Snapshot> {
        Some(self)
    }

    fn as_pio(&mut self) -> Option<&mut dyn PioDevice> {
        Some(self)
    }

    fn as_string_pio(&mut self) -> Option<&mut dyn StringPio> {
        Some(self)
    }
}

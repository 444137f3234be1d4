//! The compact form of a trace.
//!
//! ```text
//! "paravane trace 2\n", then records: a tag, and numbers as LEB128 (signed ones zigzag, DWARF 5, 7.6)
//!
//! 0 end          written, dropped
//! 1 name         length, bytes: the next free number, from 1 on, means this device
//! 2 place        of the records that follow: which fields are new (a bit each), then these: vcpu, CPL, bits, CR3, and the differences of
//!                instructions and RIP to the place before
//! 3 … 15         events, in the order of the kinds; `lines::What` has their fields
//! ```

use super::lines::{DeviceEvent, Owned, Record, What};
use paravane_cpu::TraceContext;
use paravane_cpu::mmu::Access;
use paravane_devices::{DmaAccess, DmaPurpose};
use paravane_memory::PhysAddr;
use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read, Write};

/// What a file begins with.
const MAGIC: &[u8] = b"paravane trace 2\n";
/// Bytes of a device's name at most.
const MAX_NAME: u64 = 256;
/// Devices at most.
const MAX_NAMES: usize = 4096;

/// Tags.
mod tag {
    pub const END: u8 = 0;
    pub const NAME: u8 = 1;
    pub const PLACE: u8 = 2;
    pub const EXCEPTION: u8 = 3;
    pub const INTERRUPT: u8 = 4;
    pub const CR: u8 = 5;
    pub const MSR: u8 = 6;
    pub const WALK: u8 = 7;
    pub const FLUSH: u8 = 8;
    pub const PORT: u8 = 9;
    pub const MMIO: u8 = 10;
    pub const DMA: u8 = 11;
    pub const DOORBELL: u8 = 12;
    pub const HYPERCALL: u8 = 13;
    pub const BLOCK: u8 = 14;
    pub const INSN: u8 = 15;
}

/// What a place has that the place before had not.
mod field {
    pub const VCPU: u8 = 1;
    pub const CPL: u8 = 2;
    pub const BITS: u8 = 4;
    pub const CR3: u8 = 8;
    pub const INSTRUCTIONS: u8 = 16;
    pub const RIP: u8 = 32;
}

/// What invalidations are called.
const FLUSHES: [&str; 4] = ["all", "all but global pages", "address space", "page"];

fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A difference: small ones, of either sign, are short.
fn put_difference(out: &mut Vec<u8>, from: u64, to: u64) {
    let difference = to.wrapping_sub(from) as i64;
    put(out, (difference << 1 ^ difference >> 63) as u64);
}

fn put_option(out: &mut Vec<u8>, value: Option<u64>) {
    out.push(u8::from(value.is_some()));
    if let Some(value) = value {
        put(out, value);
    }
}

/// Writes records.
pub(super) struct Encoder {
    place: TraceContext,
    names: HashMap<String, u64>,
    bytes: Vec<u8>,
}

impl Encoder {
    /// Begins a file.
    pub(super) fn begin(to: &mut impl Write) -> io::Result<Encoder> {
        to.write_all(MAGIC)?;
        Ok(Encoder { place: TraceContext::default(), names: HashMap::new(), bytes: Vec::new() })
    }

    /// Writes `record`; `owner` finds out who answers at a port (or address).
    pub(super) fn record(
        &mut self,
        record: &Record,
        owner: impl FnOnce(u32, bool, u64) -> Option<String>,
        to: &mut impl Write,
    ) -> io::Result<()> {
        self.bytes.clear();
        match record {
            Record::Processor(at, what) => {
                self.place(at);
                self.processor(at, what, owner);
            }
            Record::Device(device, event) => self.device(device, event),
        }
        to.write_all(&self.bytes)
    }

    /// Ends the file.
    pub(super) fn end(&mut self, written: u64, dropped: u64, to: &mut impl Write) -> io::Result<()> {
        self.bytes.clear();
        self.event(tag::END, &[written, dropped]);
        to.write_all(&self.bytes)
    }

    fn event(&mut self, tag: u8, numbers: &[u64]) {
        self.bytes.push(tag);
        numbers.iter().for_each(|&n| put(&mut self.bytes, n));
    }

    /// The number of a device; 0 for none.
    fn name(&mut self, name: &str) -> u64 {
        if let Some(&number) = self.names.get(name) {
            return number;
        }
        let bytes = &name.as_bytes()[..name.len().min(MAX_NAME as usize)];
        self.event(tag::NAME, &[bytes.len() as u64]);
        self.bytes.extend_from_slice(bytes);
        let number = self.names.len() as u64 + 1;
        self.names.insert(name.to_owned(), number);
        number
    }

    fn place(&mut self, at: &TraceContext) {
        let TraceContext { vp, instructions, rip, cpl, cr3, bits } = *at;
        let before = std::mem::replace(&mut self.place, *at);
        let new = [
            (field::VCPU, vp != before.vp),
            (field::CPL, cpl != before.cpl),
            (field::BITS, bits != before.bits),
            (field::CR3, cr3 != before.cr3),
            (field::INSTRUCTIONS, instructions != before.instructions),
            (field::RIP, rip != before.rip),
        ];
        let new = new.iter().filter(|n| n.1).fold(0, |all, n| all | n.0);
        if new == 0 {
            return;
        }
        self.bytes.extend([tag::PLACE, new]);
        let numbers = [
            (field::VCPU, u64::from(vp)),
            (field::CPL, u64::from(cpl)),
            (field::BITS, u64::from(bits)),
            (field::CR3, cr3),
        ];
        numbers.iter().filter(|n| new & n.0 != 0).for_each(|n| put(&mut self.bytes, n.1));
        if new & field::INSTRUCTIONS != 0 {
            put_difference(&mut self.bytes, before.instructions, instructions);
        }
        if new & field::RIP != 0 {
            put_difference(&mut self.bytes, before.rip, rip);
        }
    }

    fn processor(
        &mut self,
        at: &TraceContext,
        what: &What,
        owner: impl FnOnce(u32, bool, u64) -> Option<String>,
    ) {
        match *what {
            What::Instruction { bytes, len } => {
                self.event(tag::INSN, &[u64::from(len)]);
                self.bytes.extend_from_slice(&bytes[..usize::from(len).min(bytes.len())]);
            }
            What::Block => self.event(tag::BLOCK, &[]),
            What::Exception { vector, error, address } => {
                self.event(tag::EXCEPTION, &[u64::from(vector)]);
                put_option(&mut self.bytes, error.map(u64::from));
                put_option(&mut self.bytes, address);
            }
            What::Interrupt { vector } => self.event(tag::INTERRUPT, &[u64::from(vector)]),
            What::Control { register, value } => self.event(tag::CR, &[u64::from(register), value]),
            What::Msr { index, value } => self.event(tag::MSR, &[u64::from(index), value]),
            What::Hypercall { number } => self.event(tag::HYPERCALL, &[number]),
            What::Walk { linear, access, physical } => {
                let access = match access {
                    Access::Read => 0,
                    Access::Write => 1,
                    Access::Execute => 2,
                };
                self.event(tag::WALK, &[linear, access]);
                put_option(&mut self.bytes, physical);
            }
            What::Flush { what, pcid, linear } => {
                let kind = FLUSHES.iter().position(|name| *name == what).unwrap_or_default();
                self.event(tag::FLUSH, &[kind as u64]);
                put_option(&mut self.bytes, pcid.map(u64::from));
                put_option(&mut self.bytes, linear);
            }
            What::Access { port, at: place, size, write, value } => {
                let device = owner(at.vp, port, place).map_or(0, |name| self.name(&name));
                let tag = if port { tag::PORT } else { tag::MMIO };
                self.event(tag, &[device, place, u64::from(size) << 1 | u64::from(write), value]);
            }
        }
    }

    fn device(&mut self, device: &str, event: &DeviceEvent) {
        let device = self.name(device);
        match *event {
            DeviceEvent::Dma(DmaAccess { at, len, write, purpose }) => {
                let purpose = DmaPurpose::ALL.iter().position(|p| *p == purpose).unwrap_or_default() as u64;
                self.event(tag::DMA, &[device, at.0, len, purpose << 1 | u64::from(write)]);
            }
            DeviceEvent::Doorbell { queue } => self.event(tag::DOORBELL, &[device, queue]),
        }
    }
}

/// Why a file cannot be read on.
#[derive(Debug)]
pub enum TraceError {
    /// The host refuses.
    Host(io::Error),
    /// It is something else.
    NotATrace,
    /// It ends in the middle.
    Cut,
    /// A record makes no sense.
    Damaged,
}

impl fmt::Display for TraceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TraceError::Host(e) => e.fmt(f),
            TraceError::NotATrace => f.write_str("this is no binary trace of paravane's"),
            TraceError::Cut => f.write_str("the trace is cut off here"),
            TraceError::Damaged => f.write_str("the trace is damaged here"),
        }
    }
}

impl std::error::Error for TraceError {}

impl From<io::Error> for TraceError {
    fn from(e: io::Error) -> TraceError {
        match e.kind() {
            io::ErrorKind::UnexpectedEof => TraceError::Cut,
            _ => TraceError::Host(e),
        }
    }
}

/// What a file holds.
pub(super) enum Entry {
    /// An event.
    Event(Owned),
    /// The end: events written, and dropped.
    End(u64, u64),
}

/// Reads records.
pub(super) struct Decoder<R> {
    from: R,
    place: TraceContext,
    names: Vec<String>,
}

impl<R: Read> Decoder<R> {
    /// Begins to read a file.
    pub(super) fn begin(mut from: R) -> Result<Decoder<R>, TraceError> {
        let mut magic = [0; MAGIC.len()];
        match from.read_exact(&mut magic) {
            Ok(()) if magic == MAGIC => {}
            Err(e) if e.kind() != io::ErrorKind::UnexpectedEof => return Err(TraceError::Host(e)),
            _ => return Err(TraceError::NotATrace),
        }
        Ok(Decoder { from, place: TraceContext::default(), names: Vec::new() })
    }

    /// The next event, or the end.
    pub(super) fn next(&mut self) -> Result<Entry, TraceError> {
        loop {
            match self.byte()? {
                tag::END => return Ok(Entry::End(self.number()?, self.number()?)),
                tag::NAME => self.new_name()?,
                tag::PLACE => self.new_place()?,
                tag => return Ok(Entry::Event(self.event(tag)?)),
            }
        }
    }

    fn byte(&mut self) -> Result<u8, TraceError> {
        let mut byte = [0];
        self.from.read_exact(&mut byte)?;
        Ok(byte[0])
    }

    fn number(&mut self) -> Result<u64, TraceError> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(TraceError::Damaged)
    }

    /// A number that fits the type.
    fn small<T: TryFrom<u64>>(&mut self) -> Result<T, TraceError> {
        T::try_from(self.number()?).map_err(|_| TraceError::Damaged)
    }

    fn flag(&mut self) -> Result<bool, TraceError> {
        match self.number()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(TraceError::Damaged),
        }
    }

    fn option(&mut self) -> Result<Option<u64>, TraceError> {
        Ok(if self.flag()? { Some(self.number()?) } else { None })
    }

    fn difference(&mut self, from: u64) -> Result<u64, TraceError> {
        let n = self.number()?;
        Ok(from.wrapping_add(n >> 1 ^ (n & 1).wrapping_neg()))
    }

    fn new_name(&mut self) -> Result<(), TraceError> {
        let len = self.number()?;
        if len > MAX_NAME || self.names.len() >= MAX_NAMES {
            return Err(TraceError::Damaged);
        }
        let mut name = vec![0; len as usize];
        self.from.read_exact(&mut name)?;
        self.names.push(String::from_utf8(name).map_err(|_| TraceError::Damaged)?);
        Ok(())
    }

    fn new_place(&mut self) -> Result<(), TraceError> {
        let new = self.byte()?;
        let mut place = self.place;
        if new & field::VCPU != 0 {
            place.vp = self.small()?;
        }
        if new & field::CPL != 0 {
            place.cpl = self.small()?;
        }
        if new & field::BITS != 0 {
            place.bits = self.small()?;
        }
        if new & field::CR3 != 0 {
            place.cr3 = self.number()?;
        }
        if new & field::INSTRUCTIONS != 0 {
            place.instructions = self.difference(place.instructions)?;
        }
        if new & field::RIP != 0 {
            place.rip = self.difference(place.rip)?;
        }
        if !matches!(place.bits, 0 | 16 | 32 | 64) {
            return Err(TraceError::Damaged);
        }
        self.place = place;
        Ok(())
    }

    /// A device that was named before.
    fn device(&mut self) -> Result<Option<String>, TraceError> {
        match self.small::<usize>()?.checked_sub(1) {
            None => Ok(None),
            Some(n) => self.names.get(n).cloned().map(Some).ok_or(TraceError::Damaged),
        }
    }

    fn event(&mut self, tag: u8) -> Result<Owned, TraceError> {
        if matches!(tag, tag::DMA | tag::DOORBELL) {
            let device = self.device()?.ok_or(TraceError::Damaged)?;
            let event = match tag {
                tag::DMA => {
                    let (at, len) = (self.number()?, self.number()?);
                    let shape = self.small::<usize>()?;
                    let purpose = *DmaPurpose::ALL.get(shape >> 1).ok_or(TraceError::Damaged)?;
                    DeviceEvent::Dma(DmaAccess { at: PhysAddr(at), len, write: shape & 1 != 0, purpose })
                }
                _ => DeviceEvent::Doorbell { queue: self.number()? },
            };
            return Ok(Owned { record: Record::Device(device.clone(), event), owner: Some(device) });
        }
        let mut owner = None;
        let what = match tag {
            tag::EXCEPTION => {
                let vector = self.small()?;
                let error = self.option()?.map(u32::try_from).transpose().map_err(|_| TraceError::Damaged)?;
                What::Exception { vector, error, address: self.option()? }
            }
            tag::INTERRUPT => What::Interrupt { vector: self.small()? },
            tag::CR => What::Control { register: self.small()?, value: self.number()? },
            tag::MSR => What::Msr { index: self.small()?, value: self.number()? },
            tag::HYPERCALL => What::Hypercall { number: self.number()? },
            tag::WALK => self.walk()?,
            tag::FLUSH => self.flush()?,
            tag::PORT | tag::MMIO => {
                owner = self.device()?;
                let (at, shape) = (self.number()?, self.small::<u8>()?);
                let value = self.number()?;
                What::Access { port: tag == tag::PORT, at, size: shape >> 1, write: shape & 1 != 0, value }
            }
            tag::BLOCK => What::Block,
            tag::INSN => self.instruction()?,
            _ => return Err(TraceError::Damaged),
        };
        Ok(Owned { record: Record::Processor(self.place, what), owner })
    }

    fn walk(&mut self) -> Result<What, TraceError> {
        let linear = self.number()?;
        let access = match self.number()? {
            0 => Access::Read,
            1 => Access::Write,
            2 => Access::Execute,
            _ => return Err(TraceError::Damaged),
        };
        Ok(What::Walk { linear, access, physical: self.option()? })
    }

    fn flush(&mut self) -> Result<What, TraceError> {
        let what = FLUSHES.get(self.small::<usize>()?).copied().ok_or(TraceError::Damaged)?;
        let pcid = self.option()?.map(u16::try_from).transpose().map_err(|_| TraceError::Damaged)?;
        Ok(What::Flush { what, pcid, linear: self.option()? })
    }

    fn instruction(&mut self) -> Result<What, TraceError> {
        let (len, mut bytes) = (self.small::<u8>()?, [0; 15]);
        if self.place.bits == 0 {
            return Err(TraceError::Damaged);
        }
        let code = bytes.get_mut(..usize::from(len)).ok_or(TraceError::Damaged)?;
        self.from.read_exact(code)?;
        Ok(What::Instruction { bytes, len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One of everything, twice, from two processors.
    fn all() -> Vec<Record> {
        let flush = |what, pcid, linear| What::Flush { what, pcid, linear };
        let access = |port, write| What::Access { port, at: 0x43, size: 8, write, value: u64::MAX };
        let walk = |access, physical| What::Walk { linear: 0x7FFF_FFFF_F000, access, physical };
        let mut code = [0; 15];
        code[..2].copy_from_slice(&[0x0F, 0x0B]);
        let whats = [
            What::Instruction { bytes: code, len: 2 },
            What::Block,
            What::Exception { vector: 14, error: Some(2), address: Some(u64::MAX) },
            What::Exception { vector: 6, error: None, address: None },
            What::Interrupt { vector: 255 },
            What::Control { register: 4, value: 0x20 },
            What::Msr { index: u32::MAX, value: 1 << 63 },
            What::Hypercall { number: 7 },
            walk(Access::Read, Some(0x1000)),
            walk(Access::Write, None),
            walk(Access::Execute, Some(0)),
            flush(FLUSHES[0], None, None),
            flush(FLUSHES[1], None, None),
            flush(FLUSHES[2], Some(4095), None),
            flush(FLUSHES[3], Some(0), Some(0x1000)),
            access(true, true),
            access(false, false),
        ];
        let mut records = Vec::new();
        for (n, what) in whats.iter().chain(&whats).enumerate() {
            let n = n as u64;
            let (cpl, bits) = ((n % 4) as u8, [16, 32, 64][n as usize % 3]);
            let rip = if n.is_multiple_of(2) { 0x7C00 + n } else { 0xFFFF_FFFF_8100_0000 - n };
            let at = TraceContext { vp: n as u32 % 3, instructions: 3 * n, rip, cpl, cr3: n << 12, bits };
            records.push(Record::Processor(at, what.clone()));
        }
        for (n, purpose) in DmaPurpose::ALL.into_iter().enumerate() {
            let access = DmaAccess { at: PhysAddr(0x1000), len: 512, write: n % 2 == 0, purpose };
            records.push(Record::device("disk0", DeviceEvent::Dma(access)));
        }
        records.push(Record::device("disk1", DeviceEvent::Doorbell { queue: 3 }));
        records
    }

    fn owner(vp: u32, port: bool, at: u64) -> Option<String> {
        port.then(|| format!("device{vp} at {at:x}"))
    }

    fn encoded(records: &[Record]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut encoder = Encoder::begin(&mut bytes).expect("memory");
        for record in records {
            encoder.record(record, owner, &mut bytes).expect("memory");
        }
        encoder.end(records.len() as u64, 5, &mut bytes).expect("memory");
        bytes
    }

    fn line(record: &Record, owner: impl FnOnce(u32, bool, u64) -> Option<String>) -> String {
        serde_json::to_string(&record.line(owner)).expect("JSON")
    }

    #[test]
    fn what_is_read_makes_the_lines_of_what_was_written() {
        let records = all();
        let bytes = encoded(&records);
        let mut decoder = Decoder::begin(bytes.as_slice()).expect("a trace");
        for record in &records {
            let Ok(Entry::Event(Owned { record: read, owner: named })) = decoder.next() else {
                panic!("an event")
            };
            assert_eq!(line(&read, |_, _, _| named), line(record, owner));
        }
        assert!(matches!(decoder.next(), Ok(Entry::End(n, 5)) if n == records.len() as u64));
        let json: usize = records.iter().map(|r| line(r, owner).len() + 1).sum();
        assert!(bytes.len() * 4 < json, "{} of {json} bytes", bytes.len());
    }

    fn read(bytes: &[u8]) -> Result<usize, TraceError> {
        let mut decoder = Decoder::begin(bytes)?;
        let mut n = 0;
        while let Entry::Event(Owned { record, owner }) = decoder.next()? {
            let _text = line(&record, |_, _, _| owner);
            n += 1;
        }
        Ok(n)
    }

    #[test]
    fn cut_off_and_damaged_traces_are_told() {
        let bytes = encoded(&all());
        for n in 0..bytes.len() {
            let told = read(&bytes[..n]).expect_err("no end");
            let expected = n < MAGIC.len();
            assert!(if expected {
                matches!(told, TraceError::NotATrace)
            } else {
                matches!(told, TraceError::Cut)
            });
        }
        // Whatever a byte becomes, it is read or refused.
        for at in MAGIC.len()..bytes.len() {
            for value in [0, 1, 0x0F, 0x10, 0x7F, 0x80, 0xFF] {
                let mut changed = bytes.clone();
                changed[at] = value;
                let _read_or_refused = read(&changed);
            }
        }
        assert!(matches!(read(b"{\"kind\":\"cr\"}, and more"), Err(TraceError::NotATrace)));
    }
}

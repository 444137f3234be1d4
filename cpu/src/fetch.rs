//! Instruction fetch and the cache of decoded instructions (SDM 2A, chapter 2).

use crate::bus::CpuBus;
use crate::core::{Unit, instruction_address};
use crate::fault::Fault;
use crate::mmu::{Access, Entry, Privilege};
use crate::segment::canonical;
use crate::state::{CpuState, LinAddr, SegReg, gpr};
use crate::trace::TraceEvent;
use iced_x86::{Decoder, DecoderError, Instruction, Mnemonic};
use paravane_memory::{GuestMemory, PAGE_SIZE, Width};

/// Longest instruction.
const MAX_LEN: usize = 15;
const SLOTS: usize = 8192;

/// A decoded instruction.
#[derive(Clone, Copy)]
pub(crate) struct Decoded {
    pub instr: Instruction,
    rip: u64,
    pub raw: [u8; 16],
    pub len: usize,
    pub bits: u32,
}

/// Fetches and decodes.
pub(crate) struct Fetcher {
    slots: Box<[Decoded]>,
    options: u32,
    decodes: u64,
}

impl Fetcher {
    /// With `options` for the decoder.
    pub(crate) fn new(options: u32) -> Fetcher {
        let empty = Decoded { instr: Instruction::default(), rip: 0, raw: [0; 16], len: 0, bits: 0 };
        Fetcher { slots: vec![empty; SLOTS].into_boxed_slice(), options, decodes: 0 }
    }

    pub(crate) fn decodes(&self) -> u64 {
        self.decodes
    }

    /// The instruction at CS:RIP.
    #[inline]
    pub(crate) fn fetch(
        &mut self,
        unit: &mut Unit,
        cpu: &mut CpuState,
        mem: &GuestMemory,
        bus: &dyn CpuBus,
    ) -> Result<&Decoded, Fault> {
        let bits = cpu.code_bits();
        let lin = instruction_address(cpu);
        let room = if bits == 64 {
            if !canonical(cpu.rip) {
                return Err(Fault::GP0);
            }
            MAX_LEN
        } else {
            let limit = u64::from(cpu.segment(SegReg::Cs).limit);
            if cpu.rip > limit {
                return Err(Fault::GP0);
            }
            (limit - cpu.rip + 1).min(MAX_LEN as u64) as usize
        };
        let privilege = if cpu.cpl == 3 { Privilege::User } else { Privilege::Supervisor };
        let entry = unit.tlb.lookup(cpu, mem, lin, Access::Execute, privilege)?;
        let in_page = lin.0 & (PAGE_SIZE - 1);
        let slot = (cpu.rip ^ cpu.rip >> 13) as usize & (SLOTS - 1);
        if in_page <= PAGE_SIZE - 16
            && let Some(at) = entry.ram(in_page)
        {
            let mut raw = [0; 16];
            mem.ram_read(at, &mut raw);
            let cached = &self.slots[slot];
            if cached.rip == cpu.rip && cached.bits == bits && cached.len <= room && same(cached, &raw) {
                return Ok(&self.slots[slot]);
            }
            return self.decode(unit, cpu, &raw[..MAX_LEN.min(room)], slot);
        }
        let (raw, have) = assemble(unit, cpu, mem, bus, &entry, lin, self.options)?;
        self.decode(unit, cpu, &raw[..have.min(room)], slot)
    }

    /// Decodes `bytes`, all that lie within the code segment, into `slot`.
    #[cold]
    fn decode(&mut self, unit: &Unit, cpu: &CpuState, bytes: &[u8], slot: usize) -> Result<&Decoded, Fault> {
        self.decodes += 1;
        let bits = cpu.code_bits();
        let mut decoder = Decoder::with_ip(bits, bytes, cpu.rip, self.options);
        let instr = decoder.decode();
        if instr.is_invalid() {
            // Past the segment limit or longer than 15 bytes.
            let short = decoder.last_error() == DecoderError::NoMoreBytes;
            let beyond = short || self.too_long(bits, bytes);
            return Err(if beyond { Fault::GP0 } else { Fault::UD });
        }
        if !unit.model.allows(&instr) {
            // No model offers hypercalls; that a guest tried one is worth telling.
            if let (Some(tracer), Mnemonic::Vmcall | Mnemonic::Vmmcall) = (&unit.tracer, instr.mnemonic()) {
                tracer.event(&unit.traced_at, TraceEvent::Hypercall(cpu.gpr[gpr::RAX]));
            }
            return Err(Fault::UD);
        }
        let mut raw = [0; 16];
        raw[..instr.len()].copy_from_slice(&bytes[..instr.len()]);
        self.slots[slot] = Decoded { instr, rip: cpu.rip, raw, len: instr.len(), bits };
        Ok(&self.slots[slot])
    }

    /// Whether an invalid instruction goes on behind its 15th byte. The decoder does not tell, but it does at the end of
    /// what it is given: a byte less, without a prefix that means nothing.
    fn too_long(&self, bits: u32, bytes: &[u8]) -> bool {
        if bytes.len() < MAX_LEN {
            return false;
        }
        let mut rest = [0; MAX_LEN - 1];
        let idle = idle_prefix(bytes);
        rest[..idle].copy_from_slice(&bytes[..idle]);
        rest[idle..].copy_from_slice(&bytes[idle + 1..MAX_LEN]);
        let mut decoder = Decoder::new(bits, &rest, self.options);
        decoder.decode().is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes
    }
}

/// Position of a prefix that does not change the length: a segment's, one that is there twice, F2 or F3 before another of
/// them (the last counts), or LOCK. (An instruction of 15 bytes has several prefixes.)
fn idle_prefix(bytes: &[u8]) -> usize {
    let is_prefix = |b: &u8| matches!(b, 0x26 | 0x2E | 0x36 | 0x3E | 0x64..=0x67 | 0xF0 | 0xF2 | 0xF3);
    let prefixes = bytes.iter().take_while(|b| is_prefix(b)).count();
    let is_repeat = |b: &u8| matches!(b, 0xF2 | 0xF3);
    let is_idle = |&n: &usize| match bytes[n] {
        b if bytes[..n].contains(&b) => true,
        0x66 | 0x67 => false,
        0xF2 | 0xF3 => bytes[n + 1..prefixes].iter().any(is_repeat),
        _ => true,
    };
    (0..prefixes).find(is_idle).unwrap_or(0)
}

/// Whether the bytes of `cached` are the first of `raw`.
#[inline]
fn same(cached: &Decoded, raw: &[u8; 16]) -> bool {
    let (a, b) = (u128::from_le_bytes(cached.raw), u128::from_le_bytes(*raw));
    cached.len != 0 && (a ^ b) << (128 - 8 * cached.len) == 0
}

/// Collects an instruction's bytes near the end of a page or outside plain memory. The next page is touched only
/// if the instruction goes on there.
#[cold]
fn assemble(
    unit: &mut Unit,
    cpu: &mut CpuState,
    mem: &GuestMemory,
    bus: &dyn CpuBus,
    entry: &Entry,
    lin: LinAddr,
    options: u32,
) -> Result<([u8; 16], usize), Fault> {
    let mut raw = [0; 16];
    let in_page = lin.0 & (PAGE_SIZE - 1);
    let first = MAX_LEN.min((PAGE_SIZE - in_page) as usize);
    read(unit, mem, bus, entry, in_page, &mut raw[..first]);
    if first == MAX_LEN {
        return Ok((raw, MAX_LEN));
    }
    let mut decoder = Decoder::with_ip(cpu.code_bits(), &raw[..first], cpu.rip, options);
    if !decoder.decode().is_invalid() || decoder.last_error() != DecoderError::NoMoreBytes {
        return Ok((raw, first));
    }
    let mut next = lin.0.wrapping_add(first as u64);
    if !cpu.code64() {
        let limit = u64::from(cpu.segment(SegReg::Cs).limit);
        if cpu.rip + first as u64 > limit {
            return Ok((raw, first));
        }
        next &= 0xFFFF_FFFF;
    } else if !canonical(next) {
        return Err(Fault::GP0);
    }
    let privilege = if cpu.cpl == 3 { Privilege::User } else { Privilege::Supervisor };
    let entry = unit.tlb.lookup(cpu, mem, LinAddr(next), Access::Execute, privilege)?;
    read(unit, mem, bus, &entry, 0, &mut raw[first..MAX_LEN]);
    Ok((raw, MAX_LEN))
}

fn read(unit: &Unit, mem: &GuestMemory, bus: &dyn CpuBus, entry: &Entry, in_page: u64, buf: &mut [u8]) {
    match entry.ram(in_page) {
        Some(at) => mem.ram_read(at, buf),
        None => {
            for (i, byte) in buf.iter_mut().enumerate() {
                *byte = bus.mmio_load(unit.vp, entry.phys(in_page + i as u64), Width::W8) as u8;
            }
        }
    }
}

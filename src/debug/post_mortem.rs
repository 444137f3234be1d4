//! The dossier of a processor that shut down: what it tried, why that failed, and how it came there.

use super::symbols::Symbols;
use super::{memory, show};
use crate::machine::DeviceAccess;
use crate::run::dossier;
use iced_x86::{Decoder, DecoderOptions, FlowControl, Formatter, IntelFormatter};
use paravane_cpu::{Attempt, CpuState, Evidence, PostMortem, Vector, Visit, instruction_address};
use paravane_memory::GuestMemory;
use std::fmt::Write;

/// Blocks shown, and instructions of each.
const BLOCKS: usize = 12;
const INSTRUCTIONS: usize = 6;
/// Places named that translated code may have come from.
const WAYS: usize = 4;
/// Device accesses shown.
const ACCESSES: usize = 12;

/// Everything there is to tell.
pub fn dossier(
    cpu: &CpuState,
    mem: &GuestMemory,
    history: &PostMortem,
    accesses: &[DeviceAccess],
    symbols: &Symbols,
) -> String {
    let mut out = String::new();
    for (n, attempt) in history.attempts.iter().enumerate() {
        let _infallible = write_attempt(&mut out, cpu, mem, n, attempt, symbols);
    }
    let _infallible = writeln!(out, "registers of vcpu{}", cpu.vp);
    out.push_str(&dossier::registers(cpu));
    let addresses = history.attempts.iter().flat_map(|a| [a.fault.cr2, a.second.cr2]).flatten();
    let mut walked = Vec::new();
    for at in addresses.filter(|_| cpu.paging()) {
        if !walked.contains(&at) {
            walked.push(at);
            let _infallible = writeln!(out, "page walk for {at}");
            out.push_str(&show::walk(cpu, mem, at.0));
        }
    }
    out.push_str(&blocks(cpu, mem, &history.trail, symbols));
    if !accesses.is_empty() {
        out.push_str("last device accesses, the latest last\n");
        for access in &accesses[accesses.len().saturating_sub(ACCESSES)..] {
            let _infallible = writeln!(out, "  {access}");
        }
    }
    out
}

fn name(fault: &paravane_cpu::Fault) -> String {
    let vector = u64::from(fault.vector.0);
    let mut text = match show::vector_name(vector) {
        "" => format!("interrupt {vector}"),
        name => name.to_owned(),
    };
    if let Some(code) = fault.error_code {
        let _infallible = write!(text, "({code:#x})");
    }
    if let Some(at) = fault.cr2 {
        let _infallible = write!(text, " at {at}");
    }
    text
}

fn write_attempt(
    out: &mut String,
    cpu: &CpuState,
    mem: &GuestMemory,
    n: usize,
    a: &Attempt,
    symbols: &Symbols,
) -> std::fmt::Result {
    let base = if cpu.code64() { 0 } else { cpu.seg[1].base };
    let place = symbols.name(base.wrapping_add(a.rip)).map_or(String::new(), |s| format!(" <{s}>"));
    writeln!(
        out,
        "{}. {} at rip {:#x}{place} could not be delivered: {}",
        n + 1,
        name(&a.fault),
        a.rip,
        a.failed
    )?;
    out.push_str(&gate(cpu, mem, a.fault.vector));
    let then = if a.fault.vector == Vector::DF { "; after a double fault that is the end" } else { "" };
    writeln!(out, "   which raised {}{then}", name(&a.second))
}

/// The IDT entry that was used, and the descriptor it names.
fn gate(cpu: &CpuState, mem: &GuestMemory, vector: Vector) -> String {
    let size = match (cpu.protected(), cpu.long_mode()) {
        (false, _) => 4,
        (true, false) => 8,
        (true, true) => 16,
    };
    let offset = u64::from(vector.0) * size;
    let at = cpu.idtr.base.wrapping_add(offset);
    let what = if size == 4 { "vector table" } else { "IDT" };
    if offset + size - 1 > u64::from(cpu.idtr.limit) {
        return format!("   {what} entry {}: beyond the limit, {:#x}\n", vector.0, cpu.idtr.limit);
    }
    let Some(low) = memory::value(cpu, mem, at, size.min(8) as usize) else {
        return format!("   {what} entry {} at {at:#x}: not mapped\n", vector.0);
    };
    if size == 4 {
        return format!("   {what} entry {} at {at:#x}: {:04x}:{:04x}\n", vector.0, low >> 16, low & 0xFFFF);
    }
    let high = if size == 16 { memory::value(cpu, mem, at.wrapping_add(8), 8).unwrap_or(0) } else { 0 };
    let present = if low >> 47 & 1 == 0 { ", NOT PRESENT" } else { "" };
    let text = show::gate_text(low, high, cpu.long_mode());
    let mut out = format!("   IDT entry {} at {at:#x}: {low:016x} {text}{present}\n", vector.0);
    let selector = low >> 16 & 0xFFFF;
    if low != 0 && selector & 4 == 0 {
        let at = cpu.gdtr.base.wrapping_add(selector & !7);
        let text = match memory::value(cpu, mem, at, 8) {
            _ if (selector & !7) + 7 > u64::from(cpu.gdtr.limit) => {
                format!("beyond the limit, {:#x}", cpu.gdtr.limit)
            }
            Some(raw) => format!("{raw:016x} {}", show::descriptor(raw, 0, cpu.long_mode())),
            None => "not mapped".into(),
        };
        let _infallible = writeln!(out, "   GDT entry {:#x} at {at:#x}: {text}", selector & !7);
    }
    out
}

/// The last blocks, with their instructions as they are in memory now.
fn blocks(cpu: &CpuState, mem: &GuestMemory, trail: &[Visit], symbols: &Symbols) -> String {
    let mut visits = trail.to_vec();
    visits.dedup();
    let here = instruction_address(cpu).0;
    if visits.last().is_none_or(|visit| visit.at != here) {
        visits.push(Visit { at: here, evidence: Evidence::Recorded });
    }
    let mut out = String::from("last blocks, the latest last\n");
    for visit in &visits[visits.len().saturating_sub(BLOCKS)..] {
        let place = place(visit.at, symbols);
        let _infallible = match &visit.evidence {
            Evidence::Recorded => writeln!(out, "  {place}"),
            Evidence::Inferred => writeln!(out, "  {place}, by the only way in translated code"),
            Evidence::OneOf(places) => {
                let named: Vec<String> =
                    places.iter().take(WAYS).map(|&at| self::place(at, symbols)).collect();
                let more = match places.len() - named.len() {
                    0 => String::new(),
                    n => format!(" and {n} more"),
                };
                writeln!(out, "  … in translated code, at last one of {}{more}", named.join(", "))
            }
        };
        if !matches!(visit.evidence, Evidence::OneOf(_)) {
            out.push_str(&disassembly(cpu, mem, visit.at, INSTRUCTIONS));
        }
    }
    out
}

fn place(at: u64, symbols: &Symbols) -> String {
    let name = symbols.name(at).map_or(String::new(), |s| format!(" <{s}>"));
    format!("{at:#x}{name}")
}

/// Up to `count` instructions at linear `at`, to the end of the block.
pub(super) fn disassembly(cpu: &CpuState, mem: &GuestMemory, at: u64, count: usize) -> String {
    let mut bytes = [0; 128];
    let len = memory::read(cpu, mem, at, &mut bytes, false);
    let mut decoder = Decoder::with_ip(cpu.code_bits(), &bytes[..len], at, DecoderOptions::NONE);
    let mut formatter = IntelFormatter::new();
    let mut out = String::new();
    for _ in 0..count {
        let start = decoder.position();
        let instr = decoder.decode();
        if instr.is_invalid() {
            out.push_str(if start >= len { "    not mapped\n" } else { "    no instruction\n" });
            break;
        }
        let mut text = String::new();
        formatter.format(&instr, &mut text);
        let hex: String = bytes[start..decoder.position()].iter().map(|b| format!("{b:02x}")).collect();
        let _infallible = writeln!(out, "    {:x}  {hex:<20} {text}", instr.ip());
        if instr.flow_control() != FlowControl::Next {
            break;
        }
    }
    out
}

//! What the processor's tables say, as text (SDM 3A, 3.4.5, 4.5, 6.11, 7.2).

use super::{memory, registers};
use crate::run::VcpuRunner;
use crate::run::mode;
use paravane_cpu::{CpuState, LinAddr, PeekEnd, PeekStep, SegReg, peek};
use paravane_memory::GuestMemory;
use std::fmt::Write;

/// Entries of a descriptor table shown at most: a limit is the guest's word.
const MAX_ENTRIES: u64 = 8192;

/// One line about the processor.
pub fn vcpu(runner: &VcpuRunner) -> String {
    let cpu = &runner.cpu;
    let still = match (runner.waiting, cpu.halted) {
        (true, _) => ", waits for a start-up IPI",
        (_, true) => ", halted",
        _ => "",
    };
    format!("vcpu{}: {}, CPL {}{still}", runner.vp.0, mode(cpu), cpu.cpl)
}

/// Registers of a group: general, segment, control, debug, fpu, vector, msr; empty if there is no such group.
pub fn registers(cpu: &CpuState, group: &str) -> String {
    let mut out = String::new();
    // Writing to a string never fails.
    let _infallible = write_registers(&mut out, cpu, group);
    out
}

fn write_registers(out: &mut String, cpu: &CpuState, group: &str) -> std::fmt::Result {
    match group {
        "general" => write!(out, "{}", crate::run::general_registers(cpu)),
        "segment" => write!(out, "{}", crate::run::segment_registers(cpu)),
        "control" => {
            let [cr0, cr4, efer] = registers::bit_names(cpu);
            writeln!(out, "cr0  {:#018x}  {cr0}", cpu.cr0)?;
            writeln!(out, "cr2  {:#018x}", cpu.cr2)?;
            writeln!(out, "cr3  {:#018x}  PCID {}", cpu.cr3, cpu.cr3 & 0xFFF)?;
            writeln!(out, "cr4  {:#018x}  {cr4}", cpu.cr4)?;
            writeln!(out, "efer {:#018x}  {efer}", cpu.efer)?;
            writeln!(out, "xcr0 {:#018x}", cpu.xcr0)?;
            writeln!(out, "a20 {}  nmi {}", gate(cpu.a20), if cpu.nmi_blocked { "blocked" } else { "open" })
        }
        "debug" => (0..8)
            .filter(|n| !matches!(n, 4 | 5))
            .try_for_each(|n| writeln!(out, "dr{n} {:#018x}", cpu.dr[n])),
        "fpu" => named(out, cpu, &["fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop"])
            .and_then(|()| {
                (0..8).try_for_each(|n| {
                    let b = &cpu.fpu.0[32 + 16 * n..][..10];
                    let hex: String = b.iter().rev().map(|b| format!("{b:02x}")).collect();
                    writeln!(out, "st{n} {hex}")
                })
            }),
        "vector" => {
            named(out, cpu, &["mxcsr"])?;
            (0..16).try_for_each(|n| {
                let hex = |at: usize| -> String {
                    cpu.fpu.0[at..at + 16].iter().rev().map(|b| format!("{b:02x}")).collect()
                };
                writeln!(out, "ymm{n:<2} {} {}", hex(576 + 16 * n), hex(160 + 16 * n))
            })
        }
        "msr" => {
            let m = &cpu.msr;
            let all = [
                ("star", m.star),
                ("lstar", m.lstar),
                ("cstar", m.cstar),
                ("sfmask", m.sfmask),
                ("fs_base", cpu.segment(SegReg::Fs).base),
                ("gs_base", cpu.segment(SegReg::Gs).base),
                ("kernel_gs_base", m.kernel_gs_base),
                ("sysenter_cs", m.sysenter_cs),
                ("sysenter_esp", m.sysenter_esp),
                ("sysenter_eip", m.sysenter_eip),
                ("tsc_aux", m.tsc_aux),
                ("tsc_adjust", m.tsc_adjust),
                ("pat", m.pat),
            ];
            all.iter().try_for_each(|(name, v)| writeln!(out, "{name:<14} {v:#018x}"))
        }
        _ => Ok(()),
    }
}

fn gate(open: bool) -> &'static str {
    if open { "open" } else { "held low" }
}

fn named(out: &mut String, cpu: &CpuState, names: &[&str]) -> std::fmt::Result {
    for name in names {
        let v = registers::by_name(name).map_or(0, |n| registers::value(cpu, n));
        write!(out, "{name} {v:#x}  ")?;
    }
    out.push('\n');
    Ok(())
}

/// The page walk for `lin`, level by level.
pub fn walk(cpu: &CpuState, mem: &GuestMemory, lin: u64) -> String {
    let seen = peek(cpu, mem, LinAddr(lin));
    let mut out = String::new();
    if cpu.paging() {
        let _infallible = writeln!(out, "linear {lin:#x}, CR3 {:#x}", cpu.cr3);
    }
    for step in seen.steps() {
        out.push_str(&entry(step));
    }
    out.push_str(&match seen.end {
        PeekEnd::Mapped { phys, page_shift: 0 } => format!("{lin:#x}: paging is off, physical {phys}\n"),
        PeekEnd::Mapped { phys, page_shift } => {
            let size = if page_shift < 20 {
                format!("{} KiB", 1u32 << (page_shift - 10))
            } else {
                format!("{} MiB", 1u32 << (page_shift - 20))
            };
            let what = match mem.resolve(phys.page()) {
                paravane_memory::Mapped::Ram(_) => "RAM",
                paravane_memory::Mapped::Rom(_) => "ROM",
                paravane_memory::Mapped::Mmio => "no memory: a device, or nothing",
            };
            format!("{lin:#x} is physical {phys} in a page of {size} ({what})\n")
        }
        PeekEnd::NotPresent => format!("{lin:#x} is not mapped: the last entry is not present\n"),
        PeekEnd::Reserved => {
            format!("{lin:#x}: reserved bits are set in the last entry, which is a page fault\n")
        }
        PeekEnd::NoMemory(at) => format!("{lin:#x}: the table at physical {at} is outside memory\n"),
        PeekEnd::NotCanonical if !cpu.long_mode() => {
            format!("{lin:#x} has more than the 32 bits there are in this mode\n")
        }
        PeekEnd::NotCanonical => format!("{lin:#x} is not canonical: no walk, but #GP or #SS\n"),
    });
    out
}

fn entry(step: &PeekStep) -> String {
    let name = ["PTE", "PDE", "PDPTE", "PML4E"][usize::from(step.level.clamp(1, 4)) - 1];
    let v = step.value;
    let bits = [
        (0, "P"),
        (1, "W"),
        (2, "U"),
        (3, "PWT"),
        (4, "PCD"),
        (5, "A"),
        (6, "D"),
        (7, if step.level == 1 { "PAT" } else { "PS" }),
        (8, "G"),
        (63, "XD"),
    ];
    let names: Vec<&str> = bits.iter().filter(|(bit, _)| v >> bit & 1 != 0).map(|b| b.1).collect();
    let at = step.at.map_or("in the processor".into(), |at| format!("at {at}"));
    format!("  {name:<5} {v:#018x} {at:<16} {}\n", names.join(" "))
}

/// A segment or system descriptor, decoded (SDM 3A, figures 3-8 and 7-4).
pub fn descriptor(low: u64, high: u64, long: bool) -> String {
    let kind = low >> 40 & 0xF;
    let present = if low >> 47 & 1 != 0 { "" } else { ", NOT PRESENT" };
    let dpl = low >> 45 & 3;
    let base = (low >> 16 & 0xFF_FFFF) | (low >> 56 & 0xFF) << 24;
    let limit = (low & 0xFFFF) | (low >> 48 & 0xF) << 16;
    let limit = if low >> 55 & 1 != 0 { limit << 12 | 0xFFF } else { limit };
    if low >> 44 & 1 == 0 {
        let name = system_name(kind, long);
        if matches!(kind, 4..=7 | 12 | 14 | 15) {
            return format!("{}{present}", gate_text(low, high, long));
        }
        let base = if long { base | (high & 0xFFFF_FFFF) << 32 } else { base };
        return format!("{name} base {base:#x} limit {limit:#x} DPL {dpl}{present}");
    }
    let code = kind & 8 != 0;
    let size = match (low >> 53 & 1, low >> 54 & 1) {
        (1, _) if code => "64-bit",
        (_, 1) => "32-bit",
        _ => "16-bit",
    };
    let rights = match (code, kind & 2 != 0, kind & 4 != 0) {
        (true, true, true) => "readable, conforming",
        (true, true, false) => "readable",
        (true, false, true) => "execute only, conforming",
        (true, false, false) => "execute only",
        (false, true, true) => "writable, expand down",
        (false, true, false) => "writable",
        (false, false, true) => "read only, expand down",
        (false, false, false) => "read only",
    };
    let what = if code { "code" } else { "data" };
    format!("{size} {what} {rights} base {base:#x} limit {limit:#x} DPL {dpl}{present}")
}

fn system_name(kind: u64, long: bool) -> &'static str {
    match (kind, long) {
        (2, _) => "LDT",
        (9, true) => "TSS (64-bit, available)",
        (11, true) => "TSS (64-bit, busy)",
        (12, true) => "call gate",
        (14, true) => "interrupt gate",
        (15, true) => "trap gate",
        (_, true) => "reserved type",
        (1, _) => "TSS (16-bit, available)",
        (3, _) => "TSS (16-bit, busy)",
        (4, _) => "call gate (16-bit)",
        (5, _) => "task gate",
        (6, _) => "interrupt gate (16-bit)",
        (7, _) => "trap gate (16-bit)",
        (9, _) => "TSS (32-bit, available)",
        (11, _) => "TSS (32-bit, busy)",
        (12, _) => "call gate (32-bit)",
        (14, _) => "interrupt gate (32-bit)",
        (15, _) => "trap gate (32-bit)",
        _ => "reserved type",
    }
}

/// A gate (SDM 3A, figures 6-2 and 6-8).
pub fn gate_text(low: u64, high: u64, long: bool) -> String {
    let offset = (low & 0xFFFF) | (low >> 48 & 0xFFFF) << 16;
    let offset = if long { offset | (high & 0xFFFF_FFFF) << 32 } else { offset };
    let ist = if long && low >> 32 & 7 != 0 { format!(" IST {}", low >> 32 & 7) } else { String::new() };
    let dpl = low >> 45 & 3;
    format!(
        "{} to {:#06x}:{offset:#x}{ist} DPL {dpl}",
        system_name(low >> 40 & 0xF, long),
        low >> 16 & 0xFFFF
    )
}

/// The GDT or LDT, entries that are not all zero.
pub fn segments(cpu: &CpuState, mem: &GuestMemory, name: &str) -> String {
    let (base, limit) = match name {
        "ldt" if cpu.ldtr.selector & !3 == 0 => return "no LDT is loaded\n".into(),
        "ldt" => (cpu.ldtr.base, u64::from(cpu.ldtr.limit)),
        _ => (cpu.gdtr.base, u64::from(cpu.gdtr.limit)),
    };
    let mut out = format!("{name} at {base:#x}, limit {limit:#x}\n");
    let mut n = 0;
    while n * 8 + 7 <= limit && n < MAX_ENTRIES {
        let at = base.wrapping_add(n * 8);
        let Some(low) = memory::value(cpu, mem, at, 8) else {
            let _infallible = writeln!(out, "  {:#06x}: not mapped", n * 8);
            break;
        };
        let wide = cpu.long_mode() && low >> 44 & 1 == 0 && low >> 40 & 0xF != 0;
        // The first entry is never used, and may hold anything.
        if low != 0 && (n > 0 || name == "ldt") {
            let high = if wide { memory::value(cpu, mem, at.wrapping_add(8), 8).unwrap_or(0) } else { 0 };
            let text = descriptor(low, high, cpu.long_mode());
            let _infallible = writeln!(out, "  {:#06x}: {low:016x}  {text}", n * 8);
        }
        n += if wide { 2 } else { 1 };
    }
    out
}

/// The names of the exceptions (SDM 3A, table 6-1).
pub fn vector_name(vector: u64) -> &'static str {
    const NAMES: [&str; 22] = [
        "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "", "#TS", "#NP", "#SS", "#GP", "#PF",
        "", "#MF", "#AC", "#MC", "#XM", "#VE", "#CP",
    ];
    NAMES.get(vector as usize).copied().unwrap_or("")
}

/// The IDT, or in real mode the vector table; entries that are not all zero.
pub fn idt(cpu: &CpuState, mem: &GuestMemory) -> String {
    let (base, limit) = (cpu.idtr.base, u64::from(cpu.idtr.limit));
    let mut out = format!("idt at {base:#x}, limit {limit:#x}\n");
    let size = match (cpu.protected(), cpu.long_mode()) {
        (false, _) => 4,
        (true, false) => 8,
        (true, true) => 16,
    };
    for vector in (0..256).take_while(|v| v * size + size - 1 <= limit) {
        let at = base.wrapping_add(vector * size);
        let Some(low) = memory::value(cpu, mem, at, size.min(8) as usize) else {
            let _infallible = writeln!(out, "  {vector:3}: not mapped");
            break;
        };
        if low == 0 {
            continue;
        }
        let high = if size == 16 { memory::value(cpu, mem, at.wrapping_add(8), 8).unwrap_or(0) } else { 0 };
        let text = match size {
            4 => format!("{:04x}:{:04x}", low >> 16, low & 0xFFFF),
            _ if low >> 47 & 1 == 0 => "not present".into(),
            _ => gate_text(low, high, cpu.long_mode()),
        };
        let _infallible = writeln!(out, "  {vector:3} {:<4} {text}", vector_name(vector));
    }
    out
}

/// The task state segment's stacks (SDM 3A, figures 7-2 and 7-11).
pub fn tss(cpu: &CpuState, mem: &GuestMemory) -> String {
    let tr = &cpu.tr;
    let mut out = format!("tr {:#06x}, TSS at {:#x}, limit {:#x}\n", tr.selector, tr.base, tr.limit);
    let mut field = |name: &str, at: u64, size: usize| {
        if at + size as u64 - 1 > u64::from(tr.limit) {
            return;
        }
        let text = match memory::value(cpu, mem, tr.base.wrapping_add(at), size) {
            Some(v) => format!("{v:#x}"),
            None => "not mapped".into(),
        };
        let _infallible = writeln!(out, "  {name:<10} {text}");
    };
    if cpu.long_mode() {
        (0..3).for_each(|n| field(&format!("rsp{n}"), 4 + 8 * n, 8));
        (0..7).for_each(|n| field(&format!("ist{}", n + 1), 36 + 8 * n, 8));
        field("io map", 102, 2);
    } else if tr.attributes & 8 != 0 {
        for n in 0..3 {
            field(&format!("esp{n}"), 4 + 8 * n, 4);
            field(&format!("ss{n}"), 8 + 8 * n, 2);
        }
        for (name, at, size) in [("link", 0, 2), ("cr3", 28, 4), ("eip", 32, 4), ("io map", 102, 2)] {
            field(name, at, size);
        }
    } else {
        for n in 0..3 {
            field(&format!("sp{n}"), 2 + 4 * n, 2);
            field(&format!("ss{n}"), 4 + 4 * n, 2);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The flat segments every tutorial has, as Intel's figures decode them.
    #[test]
    fn descriptors_are_told_as_the_manual_draws_them() {
        for (low, expected) in [
            (0x00AF_9B00_0000_FFFF, "64-bit code readable base 0x0 limit 0xffffffff DPL 0"),
            (0x00CF_9300_0000_FFFF, "32-bit data writable base 0x0 limit 0xffffffff DPL 0"),
            (0x00CF_FA00_0000_FFFF, "32-bit code readable base 0x0 limit 0xffffffff DPL 3"),
            (0x0000_9A00_0000_FFFF, "16-bit code readable base 0x0 limit 0xffff DPL 0"),
            (0x1240_1634_5678_0FFF, "32-bit data expand"),
        ] {
            let text = descriptor(low, 0, true);
            let said = text.starts_with(expected) || text.contains("NOT PRESENT");
            assert!(said, "{low:#x}: {text}");
        }
        assert_eq!(
            descriptor(0x0000_8B00_3000_0067, 0, true),
            "TSS (64-bit, busy) base 0x3000 limit 0x67 DPL 0"
        );
        assert_eq!(
            descriptor(0x8100_8E01_0008_1234, 0xFFFF_FFFF, true),
            "interrupt gate to 0x0008:0xffffffff81001234 IST 1 DPL 0"
        );
    }
}

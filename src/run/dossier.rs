//! What is told about a processor that shut down.

use paravane_cpu::CpuState;
use std::fmt::Write;

const GPR_NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];
const SEGMENT_NAMES: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];

/// Which of the processor's modes this is.
pub fn mode(cpu: &CpuState) -> &'static str {
    match (cpu.protected(), cpu.long_mode(), cpu.v8086(), cpu.code_bits()) {
        (false, ..) => "real mode",
        (_, true, _, 64) => "64-bit mode",
        (_, true, ..) => "compatibility mode",
        (_, _, true, _) => "virtual-8086 mode",
        (_, _, _, 32) => "32-bit protected mode",
        _ => "16-bit protected mode",
    }
}

/// Registers, one topic a line.
pub fn registers(cpu: &CpuState) -> String {
    let mut text = general_registers(cpu) + &segment_registers(cpu);
    // Writing to a string never fails.
    let _infallible = writeln!(
        text,
        "  cr0 {:#x}  cr2 {:#x}  cr3 {:#x}  cr4 {:#x}  efer {:#x}",
        cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4, cpu.efer
    );
    text
}

/// Mode, RIP and the general registers.
pub fn general_registers(cpu: &CpuState) -> String {
    let mut out = format!(
        "  {}, CPL {}, rip {:#x}, rflags {:#x}, {} instructions counted\n",
        mode(cpu),
        cpu.cpl,
        cpu.rip,
        cpu.rflags,
        cpu.instructions
    );
    for (four, names) in cpu.gpr.chunks(4).zip(GPR_NAMES.chunks(4)) {
        for (value, name) in four.iter().zip(names) {
            let _infallible = write!(out, "  {name:<3} {value:016x}");
        }
        out.push('\n');
    }
    out
}

/// Segment and table registers with their hidden parts.
pub fn segment_registers(cpu: &CpuState) -> String {
    let mut out = String::new();
    let all = cpu.seg.iter().zip(SEGMENT_NAMES).chain([(&cpu.ldtr, "ldt"), (&cpu.tr, "tr")]);
    for (s, name) in all {
        let _infallible = writeln!(
            out,
            "  {name:<3} {:04x}  base {:#x}  limit {:#x}  attributes {:#06x}",
            s.selector, s.base, s.limit, s.attributes
        );
    }
    let _infallible = writeln!(
        out,
        "  gdt {:#x}+{:#x}  idt {:#x}+{:#x}",
        cpu.gdtr.base, cpu.gdtr.limit, cpu.idtr.base, cpu.idtr.limit
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reset_state_is_told_in_full() {
        let text = registers(&CpuState::reset(0));
        for part in ["real mode", "rip 0xfff0", "cs  f000  base 0xffff0000", "cr0 0x60000010"] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }
}

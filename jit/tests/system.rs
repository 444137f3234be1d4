//! Small self-checking guests for what the host CPU cannot be asked: modes, exceptions, paging, tasks, debugging.
//!
//! Every test runs in the interpreter and in the translator. What it expects is written down from the SDM; the
//! chapter is named at each module's top.
//!
//! | subject                                                                            | modules                       |
//! |------------------------------------------------------------------------------------|-------------------------------|
//! | every exception: vector, code, CR2, pushed RIP, flags and RF                        | exceptions, `Bed::faults`     |
//! | invalid opcodes, LOCK, 15 bytes, the first of several faults                        | illegal                       |
//! | every invalid opcode by mode and model                                              | opcodes                       |
//! | what older models lack: instructions, control bits, MSRs, paging                    | models                        |
//! | gates, privilege changes, IST, IRET                                                 | gates, returns                |
//! | faults in delivery, double faults, shutdown, inner stacks, order of interrupts      | delivery, post_mortem         |
//! | IF, shadows of STI and MOV SS, HLT, NMI, interrupted repetitions                    | interrupts, delivery          |
//! | far transfers, call gates, conforming segments, LDT                                 | transfers, tasks              |
//! | tasks, task gates, nesting                                                          | tasks, switches               |
//! | limits, types, expand-down, null selectors, 16-bit code                             | segments, segmented           |
//! | privileged instructions, loads by CPL, RPL and DPL, LAR, LSL, VERR, VERW            | privilege                     |
//! | virtual-8086 mode, VME, PVI, the I/O bitmap                                         | tasks, v8086, vme             |
//! | SYSCALL, SYSENTER, segment bases, addresses that are not canonical                  | syscalls                      |
//! | page permissions, SMEP, SMAP, accessed and dirty bits, large pages                  | paging                        |
//! | reserved bits of entries, PDPTEs, CRs, MSRs, CPUID, TSC, RDPMC, RDRAND              | registers                     |
//! | what must be forgotten: INVLPG, CR3, PCIDs, INVPCID, global pages                   | tlb, spaces                   |
//! | accesses and instructions on two pages                                              | crossing                      |
//! | single-stepping, breakpoints, DR6, DR7, RF, BTF                                     | debug, debug_registers        |
//! | x87 and SSE: #NM, #MF, IRQ 13, IGNNE#, #XM, pointers, rounding, denormals           | fpu                           |
//! | XSAVE areas, compaction, XCR0                                                       | xsave                         |
//! | alignment checking                                                                  | alignment                     |
//! | hot loops: their ways out, faults in them, changes of them                          | traces                        |
//! | the same code at other linear addresses                                            | moving                        |
//! | modified code (by other processors: `smp.rs`)                                       | modified                      |
//! | mode switches, unreal mode; A20, the first megabyte's end                           | modes, wraps                  |
//! | all of it at once, drawn from pieces; engine against engine                        | mixed, mixed32, segmented     |
//! | guests that aim at the host                                                         | wild                          |
//! | the debugger's own breakpoints and steps                                            | plan                          |
//! | `cpu/DEVIATIONS.md`                                                                 | deviations                    |

#[path = "system/bed.rs"]
#[macro_use]
mod bed;
#[path = "system/alignment.rs"]
mod alignment;
#[path = "system/crossing.rs"]
mod crossing;
#[path = "system/debug.rs"]
mod debug;
#[path = "system/debug_registers.rs"]
mod debug_registers;
#[path = "system/delivery.rs"]
mod delivery;
#[path = "system/deviations.rs"]
mod deviations;
#[path = "system/exceptions.rs"]
mod exceptions;
#[path = "system/fpu.rs"]
mod fpu;
#[path = "system/gates.rs"]
mod gates;
#[path = "system/illegal.rs"]
mod illegal;
#[path = "system/interrupts.rs"]
mod interrupts;
#[path = "system/jumps.rs"]
mod jumps;
#[path = "system/mixed.rs"]
mod mixed;
#[path = "system/mixed32.rs"]
mod mixed32;
#[path = "system/models.rs"]
mod models;
#[path = "system/modes.rs"]
mod modes;
#[path = "system/modified.rs"]
mod modified;
#[path = "system/moving.rs"]
mod moving;
#[path = "system/opcodes.rs"]
mod opcodes;
#[path = "system/paging.rs"]
mod paging;
#[path = "system/plan.rs"]
mod plan;
#[path = "system/post_mortem.rs"]
mod post_mortem;
#[path = "system/privilege.rs"]
mod privilege;
#[path = "system/registers.rs"]
mod registers;
#[path = "system/returns.rs"]
mod returns;
#[path = "system/segmented.rs"]
mod segmented;
#[path = "system/segments.rs"]
mod segments;
#[path = "system/spaces.rs"]
mod spaces;
#[path = "system/stacks_away.rs"]
mod stacks_away;
#[path = "system/switches.rs"]
mod switches;
#[path = "system/syscalls.rs"]
mod syscalls;
#[path = "system/tasks.rs"]
mod tasks;
#[path = "system/tlb.rs"]
mod tlb;
#[path = "system/traces.rs"]
mod traces;
#[path = "system/transfers.rs"]
mod transfers;
#[path = "system/v8086.rs"]
mod v8086;
#[path = "system/vme.rs"]
mod vme;
#[path = "system/wild.rs"]
mod wild;
#[path = "system/windows.rs"]
mod windows;
#[path = "system/wraps.rs"]
mod wraps;
#[path = "system/xsave.rs"]
mod xsave;

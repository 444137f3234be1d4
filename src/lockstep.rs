//! `paravane lockstep`: the same guest in two machines, one on the translator and one on the interpreter, compared
//! after every block. Both go by the instruction clock, so they are the same machine twice until an engine errs.

use crate::cli::LockstepArgs;
use crate::debug::listing;
use crate::machine::{ClockKind, EngineKind, HostEnds, Machine, MachineConfig, MachineError, SerialConfig};
use crate::replay::Wishes;
use crate::run::{Lifecycle, Rota, VcpuRunner, dossier};
use iced_x86::{Decoder, DecoderOptions};
use indicatif::ProgressBar;
use paravane_cpu::{Budget, CpuState, HostVendor, LinAddr, SegReg, flags, peek};
use paravane_memory::RamOffset;
use std::error::Error;
use std::process::ExitCode;

/// Instructions between two comparisons of memory.
const MEMORY_STRIDE: u64 = 20_000_000;
/// Bytes of memory compared at a time.
const CHUNK: usize = 1 << 20;
/// Comparisons between two steps of the progress bar.
const TICK: u64 = 1 << 16;
/// Instructions of guest code shown before a difference.
const SHOWN: usize = 24;

/// Runs the command.
pub fn command(args: &LockstepArgs) -> Result<ExitCode, Box<dyn Error>> {
    let config = args.config()?;
    let mut pair = Pair {
        translator: Side::new(&config, EngineKind::Jit, args.stride.is_none())?,
        interpreter: Side::new(&config, EngineKind::Interp, false)?,
        stride: args.stride.unwrap_or(u64::MAX),
        strict: HostVendor::undefined_flags_are_measured(),
        comparisons: 0,
    };
    let bar = ProgressBar::new(args.instructions);
    let outcome = pair.run(args.instructions, &bar);
    bar.finish_and_clear();
    let retired = pair.translator.runner().cpu.instructions;
    match outcome {
        Ok(()) => {
            println!(
                "translator and interpreter agree over {retired} instructions ({} comparisons)",
                pair.comparisons
            );
            Ok(ExitCode::SUCCESS)
        }
        Err(report) => {
            print!("{report}");
            Err(format!("the engines differ after {retired} instructions").into())
        }
    }
}

/// One of the two machines.
struct Side {
    machine: Machine,
    rota: Rota,
}

impl Side {
    fn new(config: &MachineConfig, engine: EngineKind, single_blocks: bool) -> Result<Side, MachineError> {
        let config = MachineConfig {
            engine,
            clock: ClockKind::Instructions,
            serial: vec![SerialConfig::None],
            reboot: false,
            ..config.clone()
        };
        let ends = HostEnds {
            serial: vec![None],
            lab_port: None,
            count_instructions: true,
            single_blocks,
            debug_console: Box::new(|_| ()),
        };
        let machine = Machine::new(&config, Lifecycle::new(), ends)?;
        let runner = VcpuRunner::new(&machine)?;
        let time =
            machine.lockstep(Wishes::default()).ok_or(MachineError::Wiring("no instruction clock".into()))?;
        Ok(Side { machine, rota: Rota::new(vec![runner], time) })
    }

    fn runner(&self) -> &VcpuRunner {
        &self.rota.vcpus[0]
    }

    fn runner_mut(&mut self) -> &mut VcpuRunner {
        &mut self.rota.vcpus[0]
    }

    /// The bytes from linear address `lin` to the end of the next page, as far as they are mapped.
    fn code(&self, lin: u64) -> Vec<u8> {
        let (cpu, mem) = (&self.runner().cpu, self.machine.memory());
        let mut code = Vec::new();
        for lin in [lin, (lin | 0xFFF).wrapping_add(1)] {
            let Some(at) = peek(cpu, mem, LinAddr(lin)).phys() else { break };
            let mut bytes = vec![0; 4096 - (lin & 0xFFF) as usize];
            if mem.read(at, &mut bytes).is_err() {
                break;
            }
            code.append(&mut bytes);
        }
        code
    }
}

struct Pair {
    translator: Side,
    interpreter: Side,
    stride: u64,
    /// Whether flags that the manual leaves undefined must be equal too.
    strict: bool,
    comparisons: u64,
}

impl Pair {
    /// Runs both for `instructions`, or to the end of the guest; the first difference is the error.
    fn run(&mut self, instructions: u64, bar: &ProgressBar) -> Result<(), String> {
        let mut memory_due = MEMORY_STRIDE;
        let mut ended = false;
        while !ended && self.translator.runner().cpu.instructions < instructions {
            let before = self.take_interrupts();
            ended = self.step();
            self.comparisons += 1;
            self.settle_undefined_flags(&before);
            self.same_processor(&before)?;
            let retired = self.translator.runner().cpu.instructions;
            if retired >= memory_due {
                memory_due = retired + MEMORY_STRIDE;
                self.same_memory()?;
            }
            if self.comparisons.is_multiple_of(TICK) {
                bar.set_position(retired);
            }
        }
        self.same_memory()
    }

    /// Lets the interpreter's pending interrupt in, as the translator's step begins with it; the state that the step's
    /// instructions start from.
    fn take_interrupts(&mut self) -> CpuState {
        let b = self.interpreter.runner_mut();
        b.engine.run(&mut b.cpu, &b.mem, &*b.bus, Budget { instructions: 0 });
        b.cpu.clone()
    }

    /// Where the engines differ in flags that the manual leaves undefined, and nobody measured how this host leaves them, the
    /// interpreter gets the translator's.
    fn settle_undefined_flags(&mut self, before: &CpuState) {
        let (a, b) = (&self.translator.runner().cpu, &self.interpreter.runner().cpu);
        let differing = (a.rflags ^ b.rflags) & flags::STATUS;
        if differing == 0 || self.strict || self.stride != u64::MAX {
            return;
        }
        let retired = b.instructions.wrapping_sub(before.instructions);
        let lin = linear(before);
        let mut undefined = 0;
        let code = self.interpreter.code(lin);
        let mut decoder = Decoder::with_ip(before.code_bits(), &code, before.rip, DecoderOptions::NONE);
        for instr in decoder.iter().take(retired as usize) {
            undefined &= !(instr.rflags_written() | instr.rflags_cleared() | instr.rflags_set());
            undefined |= instr.rflags_undefined();
        }
        let settled = differing & status(undefined);
        self.interpreter.runner_mut().cpu.rflags ^= settled;
    }

    /// The translator goes one step, the interpreter as many instructions; true if the guest ended.
    fn step(&mut self) -> bool {
        let (a, b) = (&mut self.translator, &mut self.interpreter);
        let before = a.runner().cpu.instructions;
        let mut ended = a.rota.slice(self.stride);
        // Inside a repeated string instruction the engines need not be equally far.
        while !ended && !a.runner().cpu.halted && a.runner().cpu.rflags & flags::RF != 0 {
            ended = a.rota.slice(self.stride);
        }
        ended |= b.rota.slice(a.runner().cpu.instructions.wrapping_sub(before));
        // The translator may have gone on into an exception, which retires nothing: both take one instruction more.
        if !ended && a.runner().cpu.rip != b.runner().cpu.rip {
            ended = a.rota.slice(1) | b.rota.slice(1);
        }
        ended
    }

    fn same_processor(&self, before: &CpuState) -> Result<(), String> {
        let (a, b) = (&self.translator.runner().cpu, &self.interpreter.runner().cpu);
        // After many instructions it is not known which flags the manual leaves undefined.
        let ignored = if self.strict || self.stride == u64::MAX { 0 } else { flags::STATUS };
        let registers = (a.gpr, a.rip) == (b.gpr, b.rip) && (a.rflags ^ b.rflags) & !ignored == 0;
        let system = a.seg == b.seg
            && (a.cr0, a.cr2, a.cr3, a.cr4, a.efer) == (b.cr0, b.cr2, b.cr3, b.cr4, b.efer)
            && (a.cpl, a.shadow, a.halted, a.nmi_blocked) == (b.cpl, b.shadow, b.halted, b.nmi_blocked)
            && (a.gdtr, a.idtr, a.ldtr, a.tr) == (b.gdtr, b.idtr, b.ldtr, b.tr)
            && a.msr == b.msr
            && a.instructions == b.instructions;
        if registers && system && vectors(a) == vectors(b) {
            return Ok(());
        }
        Err(self.report(before))
    }

    /// What differs, and the guest's code from where the step began.
    fn report(&self, before: &CpuState) -> String {
        let (a, b) = (&self.translator.runner().cpu, &self.interpreter.runner().cpu);
        let mut out = String::new();
        let (ours, theirs) = (dossier::registers(a), dossier::registers(b));
        out.push_str("before the step:\n");
        out.push_str(&dossier::registers(before));
        out.push_str("after it, the translator:\n");
        out.push_str(&ours);
        out.push_str("the interpreter, where it differs:\n");
        for (x, y) in ours.lines().zip(theirs.lines()) {
            if x != y {
                out.push_str(y);
                out.push('\n');
            }
        }
        if vectors(a) != vectors(b) {
            out.push_str("  x87 or vector state differs\n");
        }
        out.push_str("guest code from where the step began:\n");
        let code = self.interpreter.code(linear(before));
        out.push_str(&listing::disassembly(before.code_bits(), before.rip, &code, SHOWN));
        out.push_str("what the translator made of it (the ways out of the block last):\n");
        let runner = self.translator.runner();
        let (mem, engine) = (&runner.mem, &*runner.engine);
        let block = listing::translated(before, mem, engine, &runner.symbols, linear(before));
        out.push_str(&block.unwrap_or_else(|| "  nothing: the interpreter core executed it\n".into()));
        out
    }

    fn same_memory(&self) -> Result<(), String> {
        let (a, b) = (self.translator.machine.memory(), self.interpreter.machine.memory());
        let (mut x, mut y) = (vec![0; CHUNK], vec![0; CHUNK]);
        let len = a.backing_len().min(b.backing_len());
        let mut at = 0;
        while at < len {
            let n = CHUNK.min((len - at) as usize);
            a.ram_read(RamOffset(at), &mut x[..n]);
            b.ram_read(RamOffset(at), &mut y[..n]);
            if let Some(i) = (0..n).find(|&i| x[i] != y[i]) {
                return Err(format!(
                    "memory differs first at offset {:#x} of RAM: translator {:#04x}, interpreter {:#04x}\n",
                    at + i as u64,
                    x[i],
                    y[i]
                ));
            }
            at += n as u64;
        }
        Ok(())
    }
}

/// x87 control, status, tags and registers, MXCSR, and the whole vector registers; not the pointers to the last x87
/// instruction, nor the header, which says what an XSAVE may leave out.
fn vectors(cpu: &CpuState) -> [&[u8]; 4] {
    let area = &cpu.fpu.0;
    [&area[0..5], &area[24..28], &area[32..416], &area[576..832]]
}

/// Linear address of the next instruction.
fn linear(cpu: &CpuState) -> u64 {
    cpu.rip.wrapping_add(if cpu.code64() { 0 } else { cpu.segment(SegReg::Cs).base })
}

/// EFLAGS bits of `bits`, which are iced's.
fn status(bits: u32) -> u64 {
    use iced_x86::RflagsBits as R;
    let pairs = [
        (R::OF, flags::OF),
        (R::SF, flags::SF),
        (R::ZF, flags::ZF),
        (R::AF, flags::AF),
        (R::CF, flags::CF),
        (R::PF, flags::PF),
    ];
    pairs.iter().filter(|p| bits & p.0 != 0).map(|p| p.1).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Boot;

    /// A loop of three blocks in a boot sector.
    const LOOP: &[u8] = &[
        0x40, // inc ax
        0x01, 0xC3, // add bx, ax
        0xEB, 0xFB, // jmp to the start
    ];

    fn pair(name: &str) -> Pair {
        let kernel = std::env::temp_dir().join(format!("paravane-lockstep-{}-{name}", std::process::id()));
        let mut image = LOOP.to_vec();
        image.resize(510, 0);
        image.extend([0x55, 0xAA]);
        std::fs::write(&kernel, image).expect("image");
        let config = MachineConfig {
            memory: 16 << 20,
            cpus: 1,
            model: "max".into(),
            engine: EngineKind::Jit,
            windows: crate::machine::WindowUse::Auto,
            clock: ClockKind::Instructions,
            boot: Boot::Kernel { kernel: kernel.clone(), initrd: None, append: String::new() },
            disks: Vec::new(),
            serial: Vec::new(),
            debug_exit: None,
            reboot: false,
        };
        let side = |kind, single| Side::new(&config, kind, single).expect("machine");
        let pair = Pair {
            translator: side(EngineKind::Jit, true),
            interpreter: side(EngineKind::Interp, false),
            stride: u64::MAX,
            strict: HostVendor::undefined_flags_are_measured(),
            comparisons: 0,
        };
        std::fs::remove_file(kernel).expect("image");
        pair
    }

    #[test]
    fn engines_that_agree_go_on_and_a_difference_is_told_with_both_codes() {
        let mut pair = pair("step");
        pair.run(300, &ProgressBar::hidden()).expect("the same");
        assert!(pair.comparisons >= 100);
        let before = pair.interpreter.runner().cpu.clone();
        pair.step();
        pair.translator.runner_mut().cpu.gpr[3] ^= 1;
        let report = pair.same_processor(&before).expect_err("different");
        let (guest, host) = report.split_once("what the translator made of it").expect("host code");
        for (part, text) in [("where it differs", guest), ("add bx,ax", guest), ("add bx,ax", host)] {
            assert!(text.contains(part), "{part} in\n{report}");
        }
    }

    #[test]
    fn memory_is_compared() {
        let pair = pair("memory");
        pair.same_memory().expect("the same");
        let (mem, at) = (pair.interpreter.machine.memory(), RamOffset(0x9000));
        mem.ram_write(at, &[mem.ram_load(at, 1) as u8 ^ 1]);
        let report = pair.same_memory().expect_err("different");
        assert!(report.contains("0x9000"), "{report}");
    }
}

//! `monitor …`: what the debugger's own protocol has no words for.

use super::armed::{MonitorBreak, MonitorWatch};
use super::expr::Expr;
use super::link::Stop;
use super::listing;
use super::show;
use super::target::{Target, accessed};
use crate::machine::{Fields, PciFunction};
use crate::stats;
use crate::trace::Trace;
use paravane_cpu::{Space, WatchKind, Watchpoint};
use paravane_memory::VpIndex;
use std::fmt::Write;

const HELP: &str = "\
registers [GROUP]     general, segment, control, debug, fpu, vector, msr; all without a group
walk ADDR             the page walk, level by level
gdt, ldt, idt, tss    descriptor tables
apic, ioapic, pic     interrupt controllers
pci                   functions, BARs, interrupts
devices [NAME]        what devices say of themselves
memory                the physical memory map
counters [GROUP]      everything that is counted
break ADDR [if EXPR]  a breakpoint, its condition evaluated here; pbreak: at a physical address
watch ADDR LEN [read|write|access]   a watchpoint; pwatch: physical, device registers too; iowatch: ports
info                  what the monitor armed; delete N: forget it
phys on|off           memory reads and writes of the debugger are physical
step-interrupts on|off   whether a step takes pending interrupts (off: it steps past them)
blocks [ADDR]         what the translator made of the block there: guest code beside host code
trace on FILE[,KIND]…[,FILTER]…, trace off   events as JSON lines, as with --trace
why                   why the guest stands still, and how it came there
last                  the registers, the last blocks executed and the last device accesses
vcpus [all]           a line for each vCPU; all: and how it came to where it is
vcpu N                the monitor speaks of this one, until the next stop or until gdb looks at another
EXPR, ADDR: numbers, registers, [e] b[e] w[e] d[e] for memory, C's operators
";

/// Runs a command; what it says.
pub(super) fn command(target: &mut Target, line: &str) -> String {
    let line = line.trim();
    let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let rest = rest.trim();
    // gdb looks at all threads for 'info threads', and does not say when it is back.
    let whose = target.current.0;
    match run(target, word, rest) {
        Ok(text) if target.vcpus().count() > 1 && OF_A_VCPU.contains(&word) => {
            format!("of vcpu{whose}:\n{text}")
        }
        Ok(text) => text,
        Err(text) => format!("{text}\n"),
    }
}

/// What is about the state of one vCPU.
const OF_A_VCPU: [&str; 10] =
    ["registers", "regs", "walk", "gdt", "ldt", "idt", "tss", "blocks", "why", "last"];

type Said = Result<String, String>;

fn run(target: &mut Target, word: &str, rest: &str) -> Said {
    match word {
        "" | "help" => Ok(HELP.into()),
        "registers" | "regs" => registers(target, rest),
        "walk" => {
            let at = address(target, rest)?;
            looked(target, move |cpu, mem| show::walk(cpu, mem, at))
        }
        "gdt" | "ldt" => {
            let word = word.to_owned();
            looked(target, move |cpu, mem| show::segments(cpu, mem, &word))
        }
        "idt" => looked(target, show::idt),
        "tss" => looked(target, show::tss),
        "apic" => Ok(fields(target.inspector.interrupts(), |name| name.starts_with("lapic"))),
        "ioapic" => {
            Ok(fields(target.inspector.interrupts(), |name| name == "lines" || name.starts_with("pin")))
        }
        "pic" => Ok(fields(target.inspector.interrupts(), |name| name == "master" || name == "slave")),
        "pci" => Ok(target.inspector.pci().iter().map(pci).collect()),
        "devices" => devices(target, rest),
        "memory" => memory_map(target),
        "counters" => counters(target, rest),
        "break" => arm_break(target, Space::Linear, rest),
        "pbreak" => arm_break(target, Space::Physical, rest),
        "watch" => arm_watch(target, Space::Linear, rest),
        "pwatch" => arm_watch(target, Space::Physical, rest),
        "iowatch" => arm_watch(target, Space::Port, rest),
        "info" => Ok(armed(target)),
        "delete" => match rest.parse() {
            Ok(n) if target.armed_mut().delete(n) => Ok(format!("{n} is forgotten\n")),
            _ => Err(format!("'{rest}' is the number of nothing the monitor armed (see 'monitor info')")),
        },
        "phys" => {
            target.physical = switch(rest)?;
            Ok(format!("memory addresses are {}\n", if target.physical { "physical" } else { "linear" }))
        }
        "step-interrupts" => {
            target.step_interrupts = switch(rest)?;
            let what = if target.step_interrupts {
                "takes pending interrupts"
            } else {
                "steps past pending interrupts"
            };
            Ok(format!("a step {what}\n"))
        }
        "blocks" => blocks(target, if rest.is_empty() { "rip" } else { rest }),
        "trace" => trace(target, rest),
        "why" => why(target),
        "last" => history(target),
        "vcpus" => vcpus(target, rest),
        "vcpu" => choose(target, rest),
        _ => Err(format!("'{word}' is no monitor command; 'monitor help' lists them")),
    }
}

/// Begins a trace, in place of the one before, or ends it.
fn trace(target: &Target, rest: &str) -> Said {
    let (word, spec) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let (begun, said) = match word {
        "on" => {
            let (file, filter) = crate::trace::parse(spec.trim())?;
            let begun = Trace::begin(&file, filter, target.inspector.bus());
            let begun = begun.map_err(|e| format!("{}: {e}", file.display()))?;
            (Some(begun), format!("events go to {}\n", file.display()))
        }
        "off" => (None, "nothing is traced\n".to_owned()),
        _ => return Err("say: on FILE[,KIND]…[,FILTER]…, or off".into()),
    };
    for vp in 0..target.inspector.vcpus() {
        let begun = begun.clone();
        target.ask_vcpu(VpIndex(vp), move |runner| runner.trace(begun)).map_err(|_| GONE)?;
    }
    if let Some(before) = target.inspector.trace().set(begun) {
        before.end();
    }
    Ok(said)
}

const GONE: &str = "the machine has ended";

fn looked(
    target: &Target,
    f: impl FnOnce(&paravane_cpu::CpuState, &paravane_memory::GuestMemory) -> String + Send + 'static,
) -> Said {
    target.ask(move |runner| f(&runner.cpu, &runner.mem)).map_err(|_| GONE.into())
}

fn switch(word: &str) -> Result<bool, String> {
    match word {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("say on or off".into()),
    }
}

/// The value of an expression now.
fn address(target: &Target, text: &str) -> Result<u64, String> {
    let expr = Expr::parse(text).map_err(|e| e.to_string())?;
    let value = target.ask(move |runner| expr.value(&runner.cpu, &runner.mem));
    value.map_err(|_| GONE.to_owned())?.map_err(|e| e.to_string())
}

fn registers(target: &Target, group: &str) -> Said {
    const GROUPS: [&str; 7] = ["general", "segment", "control", "debug", "fpu", "vector", "msr"];
    let chosen: Vec<&str> = GROUPS.into_iter().filter(|g| group.is_empty() || *g == group).collect();
    if chosen.is_empty() {
        return Err(format!("'{group}' is none of {}", GROUPS.join(", ")));
    }
    looked(target, move |cpu, _| chosen.iter().map(|g| show::registers(cpu, g)).collect())
}

fn fields(all: Fields, wanted: impl Fn(&str) -> bool) -> String {
    all.into_iter().filter(|f| wanted(&f.0)).map(|(name, value)| format!("{name:<8} {value}\n")).collect()
}

fn pci(f: &PciFunction) -> String {
    let mut out = format!(
        "00:{:02x}.{} {:04x}:{:04x} class {:06x} command {:04x} irq {} pin {}  {}\n",
        f.address.0, f.address.1, f.id.0, f.id.1, f.class, f.command, f.interrupt.0, f.interrupt.1, f.label
    );
    for (n, bar) in f.bars.iter().enumerate().filter(|(_, bar)| **bar != 0) {
        let kind = if bar & 1 != 0 { "ports" } else { "memory" };
        let at = bar & if bar & 1 != 0 { !3 } else { !15 };
        let _infallible = writeln!(out, "    BAR{n} {kind} {at:#x}");
    }
    out
}

fn devices(target: &Target, name: &str) -> Said {
    let mut out = String::new();
    for (label, state) in target.inspector.devices() {
        if !name.is_empty() && label != name {
            continue;
        }
        let _infallible = writeln!(out, "{label}");
        for (field, value) in state {
            let _infallible = writeln!(out, "  {field} {value}");
        }
    }
    if out.is_empty() { Err(format!("no device is called '{name}'")) } else { Ok(out) }
}

fn memory_map(target: &Target) -> Said {
    target
        .ask(|runner| {
            let ranges = runner.mem.ram_ranges();
            let mut out = String::new();
            for (first, len) in ranges {
                let _infallible = writeln!(out, "{:#014x} - {:#014x} RAM", first.0, first.0 + len);
            }
            out.push_str("everything else: devices, or nothing (see 'monitor pci')\n");
            out
        })
        .map_err(|_| GONE.into())
}

fn counters(target: &Target, group: &str) -> Said {
    let mut all = target.inspector.counters();
    let mut engines = Vec::new();
    for vp in target.vcpus() {
        let asked = target.ask_vcpu(vp, |runner| (runner.engine.counters(), runner.cpu.instructions));
        let (engine, instructions) = asked.map_err(|_| GONE)?;
        engines.push(engine);
        all.entry(format!("cpu{}", vp.0)).or_default().insert("instructions".into(), instructions);
    }
    all.entry("engine".into()).or_default().extend(stats::sums(engines.into_iter()));
    let mut out = String::new();
    for (name, values) in all.iter().filter(|g| group.is_empty() || g.0 == group) {
        for (counter, value) in values {
            let _infallible = writeln!(out, "{name}.{counter} {value}");
        }
    }
    if out.is_empty() { Err(format!("nothing is counted under '{group}'")) } else { Ok(out) }
}

fn arm_break(target: &mut Target, space: Space, rest: &str) -> Said {
    let (at, condition) = match rest.split_once(" if ") {
        Some((at, condition)) => (at, Some(condition.trim())),
        None => (rest, None),
    };
    let at = address(target, at)?;
    let condition = match condition {
        Some(text) => Some((Expr::parse(text).map_err(|e| e.to_string())?, text.to_owned())),
        None => None,
    };
    let number = target.armed_mut().number();
    let made = MonitorBreak { number, space, at, condition, reached: Default::default() };
    let text = format!("{made}\n");
    target.armed_mut().breaks.push(made);
    Ok(text)
}

fn arm_watch(target: &mut Target, space: Space, rest: &str) -> Said {
    const USAGE: &str = "say: ADDR LEN [read|write|access], each without blanks";
    let mut words = rest.split_whitespace();
    let (at, len) = (words.next().ok_or(USAGE)?, words.next().unwrap_or("1"));
    let kind = match words.next() {
        None | Some("write") => WatchKind::Write,
        Some("read") => WatchKind::Read,
        Some("access") => WatchKind::Access,
        Some(_) => return Err(USAGE.into()),
    };
    let (first, len) = (address(target, at)?, address(target, len)?);
    if len == 0 || first.checked_add(len - 1).is_none() {
        return Err(format!("{len} bytes from {first:#x} are no range"));
    }
    let number = target.armed_mut().number();
    let made = MonitorWatch { number, watch: Watchpoint { space, first, len, kind } };
    target.armed_mut().watches.push(made);
    Ok(format!("{made}\n"))
}

fn armed(target: &Target) -> String {
    let armed = target.armed();
    let mut out = String::new();
    for b in &armed.breaks {
        let _infallible = writeln!(out, "{b}");
    }
    for w in &armed.watches {
        let _infallible = writeln!(out, "{w}");
    }
    if out.is_empty() { "the monitor armed nothing\n".into() } else { out }
}

/// All vCPUs, briefly or with all that the engines remember.
fn vcpus(target: &Target, rest: &str) -> Said {
    let full = match rest {
        "" => false,
        "all" => true,
        _ => return Err("say nothing, or all".into()),
    };
    let mut out = String::new();
    for vp in target.vcpus() {
        let text = target.ask_vcpu(vp, move |runner| {
            let more = if full { runner.dossier() } else { String::new() };
            format!("{}, rip {:#x}\n{more}", show::vcpu(runner), runner.cpu.rip)
        });
        out.push_str(&text.map_err(|_| GONE)?);
    }
    Ok(out)
}

/// Whom the monitor speaks of.
fn choose(target: &mut Target, rest: &str) -> Said {
    let chosen = rest.parse().ok().map(VpIndex).filter(|vp| target.vcpus().any(|v| v == *vp));
    let none = || format!("'{rest}' is the number of no vCPU (see 'monitor vcpus')");
    target.current = chosen.ok_or_else(none)?;
    Ok(format!("the monitor speaks of vcpu{}\n", target.current.0))
}

fn blocks(target: &Target, at: &str) -> Said {
    let at = address(target, at)?;
    let text = target.ask(move |r| listing::translated(&r.cpu, &r.mem, &*r.engine, &r.symbols, at));
    text.map_err(|_| GONE)?.ok_or_else(|| {
        format!(
            "there is no translated block at {at:#x}: it did not run yet, was written since, holds a breakpoint, \
             or the interpreter executes it"
        )
    })
}

/// What the engine remembers.
fn history(target: &Target) -> Said {
    target.ask(|runner| runner.dossier()).map_err(|_| GONE.into())
}

fn why(target: &Target) -> Said {
    let reason = match &target.stop {
        // Its dossier has all of the rest.
        Some(Stop::TripleFault(dossier)) => {
            return Ok(format!("triple fault: the processor shut down\n{dossier}"));
        }
        Some(Stop::Paused) | None => "it was interrupted".into(),
        Some(Stop::Stepped) => "a step is done".into(),
        Some(Stop::End(why)) => format!("the recorded run ends here: {why}"),
        Some(Stop::Beginning) => "what came before is not known: this is as far back as it goes".into(),
        Some(Stop::Breakpoint(at, _)) => format!("a breakpoint at {at}"),
        Some(Stop::Watch(hit)) => format!("a {}", accessed(hit, &target.inspector)),
    };
    Ok(format!("{reason}; how it came here:\n{}", history(target)?))
}

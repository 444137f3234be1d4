//! `paravane run`.

use super::serial::Serial;
use super::terminal::RawMode;
use super::{Finished, Lifecycle, Request, Watchers, drive, signals};
use crate::cli::RunArgs;
use crate::debug::{self, Debugger, Link, Symbols};
use crate::machine::{ClockKind, HostEnds, Machine, MachineConfig, SerialConfig};
use crate::replay::{Recorder, Recording, Wishes, identity};
use crate::stats;
use crate::trace::Trace;
use paravane_jit::perf_map;
use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;

/// Runs the command.
pub fn command(args: &RunArgs) -> Result<ExitCode, Box<dyn Error>> {
    let config = args.config()?;
    let lifecycle = Lifecycle::new();
    // First of all: every thread inherits the signal mask.
    signals::watch(lifecycle.clone())?;
    let mut serial = Serial::open(&config.serial, &lifecycle)?;
    let ends = HostEnds {
        serial: serial.ends(),
        lab_port: None,
        count_instructions: false,
        single_blocks: false,
        debug_console: serial.debug_console()?,
    };
    let mut machine = Machine::new(&config, lifecycle, ends)?;
    machine.tune(args.code_cache()?, args.perf_map);
    // Refused before the terminal changes.
    let mut wishes = wishes(args, &machine, &config)?;
    wishes.history = args.gdb.is_some()
        && config.clock == ClockKind::Instructions
        && config.disks.iter().all(|d| d.snapshot || d.readonly);
    let trace = match args.trace()? {
        Some((file, filter)) => {
            let begun = Trace::begin(&file, filter, &machine.bus());
            let trace = begun.map_err(|e| format!("--trace {}: {e}", file.display()))?;
            machine.trace().set(Some(Arc::clone(&trace)));
            Some(trace)
        }
        None => None,
    };
    if args.perf_map {
        perf_map::begin().map_err(|e| format!("--perf-map {}: {e}", perf_map::path().display()))?;
    }
    let raw = match config.serial.contains(&SerialConfig::Stdio) {
        true => RawMode::enter()?,
        false => None,
    };
    serial.start(raw.is_some())?;
    let symbols = match &args.symbols {
        Some(path) => Symbols::read(path).map_err(|e| format!("--symbols {}: {e}", path.display()))?,
        None => Symbols::default(),
    };
    let symbols = Arc::new(symbols);
    let (debugger, debug) = match args.gdb_address()? {
        Some(address) => {
            let link = Link::new(machine.vcpus(), args.wait, machine.stand_still());
            let inspector = Arc::new(machine.inspector());
            let opened =
                Debugger::listen(&address, Arc::clone(&link), machine.lifecycle().clone(), inspector);
            let debugger =
                opened.map_err(|e| format!("--gdb {}: {e}", args.gdb.as_deref().unwrap_or_default()))?;
            (Some(debugger), Some(link))
        }
        None => (None, None),
    };
    let watchers = Watchers {
        probe: None,
        debug,
        symbols: Arc::clone(&symbols),
        reset_at_shutdown: args.reboot,
        wishes,
        trace,
    };
    let finished = drive(&mut machine, watchers);
    if let Some(trace) = machine.trace().set(None) {
        trace.end();
    }
    if let Some(debugger) = debugger {
        debugger.finish(finished.as_ref().map_or(1, |f| f.request.exit_code()));
    }
    serial.finish(finished.as_ref().is_ok_and(|f| !matches!(f.request, Request::Quit | Request::Signal(_))));
    drop(raw);
    let finished = finished?;
    if let Some(path) = &args.stats {
        stats::write(path, &finished.stats).map_err(|e| format!("--stats {}: {e}", path.display()))?;
    }
    if args.perf_map {
        debug::perf_map::name(&perf_map::path(), &symbols).map_err(|e| format!("--perf-map: {e}"))?;
    }
    told(&finished)?;
    Ok(ExitCode::from(finished.request.exit_code()))
}

/// What is asked of a run by the instruction clock.
fn wishes(args: &RunArgs, machine: &Machine, config: &MachineConfig) -> Result<Wishes, Box<dyn Error>> {
    let mut wishes = Wishes { hash_at: args.hash_at, ..Wishes::default() };
    if let Some(path) = &args.record {
        let made = identity(machine, config).and_then(|identity| Recorder::create(path, identity));
        wishes.record = Some(made.map_err(|e| format!("--record: {e}"))?);
    }
    if let Some(path) = &args.replay {
        let read = Recording::read(path).and_then(|recording| {
            recording.belongs_to(&identity(machine, config)?)?;
            Ok(recording)
        });
        wishes.replay = Some(read.map_err(|e| format!("--replay: {e}"))?);
    }
    Ok(wishes)
}

/// Says what the user must know about the end.
fn told(finished: &Finished) -> Result<(), Box<dyn Error>> {
    match &finished.request {
        Request::Host(text) => Err(text.clone().into()),
        Request::TripleFault(dossier) => {
            eprintln!("paravane: triple fault: the guest's processor shut down\n{}", dossier.trim_end());
            Ok(())
        }
        _ => Ok(()),
    }
}

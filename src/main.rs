//! The command `paravane`.

use clap::Parser;
use paravane::cli::{Cli, Command};
use std::error::Error;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return usage(&e),
    };
    let result = match cli.command {
        Command::Run(args) => paravane::run::command(&args),
        Command::Compare(args) => paravane::compare::command(&args),
        Command::Image { .. } => Err("image: not there yet".into()),
        Command::Lockstep(args) => paravane::lockstep::command(&args),
        Command::Trace(args) => paravane::trace::command(&args),
        Command::Doctor => paravane::doctor::command(),
    };
    paravane::run::terminal::restore();
    result.unwrap_or_else(|e| fail(&*e))
}

/// Help goes to standard output; a wrong command line is told in one line.
fn usage(e: &clap::Error) -> ExitCode {
    if !e.use_stderr() {
        let _closed_pipe = e.print();
        return ExitCode::SUCCESS;
    }
    let text = e.to_string();
    let lines: Vec<&str> = text.lines().map(str::trim).take_while(|l| !l.starts_with("Usage:")).collect();
    let line = lines.join(" ");
    let line = line.trim().trim_start_matches("error: ");
    if line.is_empty() || e.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        eprintln!("paravane: say what to do: run, compare, lockstep, trace, image or doctor (see --help)");
    } else {
        eprintln!("paravane: {line} (see --help)");
    }
    ExitCode::from(1)
}

/// One line: the error and what caused it.
fn fail(e: &dyn Error) -> ExitCode {
    let mut line = e.to_string();
    let mut cause = e.source();
    while let Some(c) = cause {
        let text = c.to_string();
        if !line.contains(&text) {
            line = format!("{line}: {text}");
        }
        cause = c.source();
    }
    eprintln!("paravane: {}", line.replace('\n', " "));
    ExitCode::from(1)
}

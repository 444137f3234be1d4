//! `paravane trace`: a binary trace as the JSON lines it would have been.

use super::binary::{Decoder, Entry, TraceError};
use super::lines::Owned;
use super::spec::Filter;
use super::{EndLine, write_line};
use crate::cli::TraceArgs;
use std::error::Error;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write};
use std::process::ExitCode;

/// Runs the command.
pub fn command(args: &TraceArgs) -> Result<ExitCode, Box<dyn Error>> {
    let filter = args.filter()?;
    let told = |e: &dyn Error| format!("{}: {e}", args.file.display());
    let file = File::open(&args.file).map_err(|e| told(&e))?;
    let mut to = BufWriter::new(io::stdout().lock());
    match print(BufReader::new(file), &filter, &mut to) {
        Ok(()) => {}
        // Whoever reads has seen enough.
        Err(Stopped::Written(e)) if e.kind() == io::ErrorKind::BrokenPipe => {}
        Err(Stopped::Written(e)) => return Err(e.into()),
        Err(Stopped::Read(e)) => {
            to.flush()?;
            return Err(told(&e).into());
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Why there are no more lines.
enum Stopped {
    Read(TraceError),
    Written(io::Error),
}

fn print(from: impl io::Read, filter: &Filter, to: &mut impl Write) -> Result<(), Stopped> {
    let mut decoder = Decoder::begin(from).map_err(Stopped::Read)?;
    loop {
        match decoder.next().map_err(Stopped::Read)? {
            Entry::Event(Owned { record, owner }) => {
                if filter.takes_record(&record, owner.as_deref()) {
                    write_line(to, &record.line(|_, _, _| owner)).map_err(Stopped::Written)?;
                }
            }
            Entry::End(written, dropped) => {
                let end = write_line(to, &EndLine::new(written, dropped)).and_then(|()| to.flush());
                return end.map_err(Stopped::Written);
            }
        }
    }
}

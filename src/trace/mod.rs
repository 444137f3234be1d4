//! `--trace`: events of processors and devices as JSON lines, or in a compact form that `paravane trace` makes these lines of.
//!
//! A vCPU or a worker filters, copies what counts into a record, and puts that into a bounded channel; a thread of its own writes. Where the
//! channel is full the record is dropped and counted, or with `wait` the guest waits. Nothing traces until somebody asks for it: the
//! processors have no tracer then, and devices look at one flag.

mod binary;
mod lines;
mod read;
mod spec;

pub use read::command;
pub use spec::{Filter, KINDS, parse};

use crate::machine::MachineBus;
use binary::Encoder;
use lines::{DeviceEvent, Record};
use paravane_cpu::{TraceContext, TraceEvent, Tracer, VpIndex};
use paravane_devices::DmaAccess;
use serde::Serialize;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;

/// Records that may wait for the writer.
const CAPACITY: usize = 1 << 16;

/// One trace.
pub struct Trace {
    filter: Filter,
    records: Mutex<Option<SyncSender<Record>>>,
    bus: Weak<MachineBus>,
    dropped: Arc<AtomicU64>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl Trace {
    /// Begins to write `file`, in place of what it held.
    pub fn begin(file: &Path, filter: Filter, bus: &Arc<MachineBus>) -> io::Result<Arc<Trace>> {
        let mut sink = BufWriter::new(File::create(file)?);
        let encoder = if filter.binary { Some(Encoder::begin(&mut sink)?) } else { None };
        let (sender, receiver) = mpsc::sync_channel(CAPACITY);
        let dropped = Arc::new(AtomicU64::new(0));
        let writer = Writer {
            file: file.to_owned(),
            sink,
            encoder,
            dropped: Arc::clone(&dropped),
            bus: Arc::downgrade(bus),
            written: 0,
        };
        let thread = std::thread::Builder::new().name("trace".into()).spawn(move || writer.run(&receiver))?;
        Ok(Arc::new(Trace {
            filter,
            records: Mutex::new(Some(sender)),
            bus: Arc::downgrade(bus),
            dropped,
            writer: Mutex::new(Some(thread)),
        }))
    }

    fn put(&self, record: Record) {
        let sender = self.records.lock().expect("trace").clone();
        let Some(sender) = sender else { return };
        if self.filter.wait {
            // Nobody writes any more: the trace has ended, as was told.
            let _ended = sender.send(record);
        } else if let Err(TrySendError::Full(_)) = sender.try_send(record) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Writes what waits, and how much was dropped.
    pub fn end(&self) {
        drop(self.records.lock().expect("trace").take());
        if let Some(thread) = self.writer.lock().expect("trace").take() {
            let _panicked = thread.join();
        }
    }
}

impl Tracer for Trace {
    fn event(&self, at: &TraceContext, event: TraceEvent<'_>) {
        let owner = |port, address| self.bus.upgrade()?.owner(VpIndex(at.vp), port, address);
        if self.filter.takes(at, &event, owner) {
            Record::of(at, &event, &mut |record| self.put(record));
        }
    }

    fn every_instruction(&self) -> bool {
        self.filter.every_instruction()
    }
}

/// The last line.
#[derive(Serialize)]
struct EndLine {
    kind: &'static str,
    written: u64,
    dropped: u64,
}

impl EndLine {
    fn new(written: u64, dropped: u64) -> EndLine {
        EndLine { kind: "end", written, dropped }
    }
}

/// Writes `line` as JSON.
fn write_line(to: &mut impl Write, line: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *to, line)?;
    to.write_all(b"\n")
}

struct Writer {
    file: PathBuf,
    sink: BufWriter<File>,
    /// Writes the compact form.
    encoder: Option<Encoder>,
    dropped: Arc<AtomicU64>,
    bus: Weak<MachineBus>,
    written: u64,
}

impl Writer {
    fn run(mut self, records: &Receiver<Record>) {
        if let Err(e) = self.all(records) {
            eprintln!(
                "paravane: trace {}: {e}: it ends after {} events, the guest runs on",
                self.file.display(),
                self.written
            );
        }
    }

    fn all(&mut self, records: &Receiver<Record>) -> io::Result<()> {
        while let Ok(record) = records.recv() {
            let bus = self.bus.upgrade();
            let owner = |vp, port, at| bus.as_ref()?.owner(VpIndex(vp), port, at);
            match &mut self.encoder {
                Some(encoder) => encoder.record(&record, owner, &mut self.sink)?,
                None => write_line(&mut self.sink, &record.line(owner))?,
            }
            self.written += 1;
        }
        let (written, dropped) = (self.written, self.dropped.load(Ordering::Relaxed));
        match &mut self.encoder {
            Some(encoder) => encoder.end(written, dropped, &mut self.sink)?,
            None => write_line(&mut self.sink, &EndLine::new(written, dropped))?,
        }
        self.sink.flush()?;
        if dropped > 0 {
            eprintln!("paravane: trace {}: {dropped} events were dropped", self.file.display());
        }
        Ok(())
    }
}

/// Where devices find the trace, if there is one.
#[derive(Default)]
pub struct Switch {
    on: AtomicBool,
    trace: Mutex<Option<Arc<Trace>>>,
}

impl Switch {
    /// `trace` from now on; the one before, which is to be ended.
    pub fn set(&self, trace: Option<Arc<Trace>>) -> Option<Arc<Trace>> {
        let mut now = self.trace.lock().expect("trace");
        self.on.store(trace.is_some(), Ordering::Release);
        std::mem::replace(&mut *now, trace)
    }

    /// Whether there is one.
    pub fn on(&self) -> bool {
        self.on.load(Ordering::Acquire)
    }

    fn device(&self, kind: usize, device: &str, at: u64, event: impl FnOnce() -> DeviceEvent) {
        if !self.on() {
            return;
        }
        let trace = self.trace.lock().expect("trace").clone();
        if let Some(trace) = trace.filter(|t| t.filter.takes_device(kind, device, at)) {
            trace.put(Record::device(device, event()));
        }
    }

    /// `device` accessed guest memory.
    pub fn dma(&self, device: &str, access: DmaAccess) {
        self.device(spec::DMA, device, access.at.0, || DeviceEvent::Dma(access));
    }

    /// The guest rang `queue` of `device`.
    pub fn doorbell(&self, device: &str, queue: u64) {
        self.device(spec::DOORBELL, device, queue, || DeviceEvent::Doorbell { queue });
    }
}

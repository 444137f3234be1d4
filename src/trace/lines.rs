//! Events as records, and records as lines.

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
use paravane_cpu::mmu::Access;
use paravane_cpu::{TraceContext, TraceEvent};
use paravane_devices::DmaAccess;
use serde::Serialize;

/// An event as it waits for the writer.
pub(super) enum Record {
    Processor(TraceContext, What),
    Device(String, DeviceEvent),
}

/// An event, and who answers at the port or address that it is about.
pub(super) struct Owned {
    pub(super) record: Record,
    pub(super) owner: Option<String>,
}

/// What a device did.
pub(super) enum DeviceEvent {
    Dma(DmaAccess),
    Doorbell { queue: u64 },
}

/// What a processor did.
#[derive(Clone)]
pub(super) enum What {
    Instruction { bytes: [u8; 15], len: u8 },
    Block,
    Exception { vector: u8, error: Option<u32>, address: Option<u64> },
    Interrupt { vector: u8 },
    Control { register: u8, value: u64 },
    Msr { index: u32, value: u64 },
    Hypercall { number: u64 },
    Walk { linear: u64, access: Access, physical: Option<u64> },
    Flush { what: &'static str, pcid: Option<u16>, linear: Option<u64> },
    Access { port: bool, at: u64, size: u8, write: bool, value: u64 },
}

/// A line; what does not belong to its kind is left out.
#[derive(Serialize, Default)]
pub(super) struct Line {
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    vcpu: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    instructions: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    rip: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpl: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cr3: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    write: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vector: Option<u8>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    register: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    what: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pcid: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    queue: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
}

impl Record {
    pub(super) fn device(device: &str, event: DeviceEvent) -> Record {
        Record::Device(device.to_owned(), event)
    }

    /// Gives `put` what `event` comes to: one record, but for invalidations.
    pub(super) fn of(at: &TraceContext, event: &TraceEvent<'_>, put: &mut dyn FnMut(Record)) {
        let mut put = |what| put(Record::Processor(*at, what));
        match *event {
            TraceEvent::Instruction(code) => {
                let mut bytes = [0; 15];
                let len = code.len().min(15);
                bytes[..len].copy_from_slice(&code[..len]);
                put(What::Instruction { bytes, len: len as u8 });
            }
            TraceEvent::Block => put(What::Block),
            TraceEvent::Exception { vector, error, address } => {
                put(What::Exception { vector, error, address });
            }
            TraceEvent::Interrupt(vector) => put(What::Interrupt { vector }),
            TraceEvent::Control(register, value) => put(What::Control { register, value }),
            TraceEvent::Msr(index, value) => put(What::Msr { index, value }),
            TraceEvent::Hypercall(number) => put(What::Hypercall { number }),
            TraceEvent::Walk { linear, access, physical } => put(What::Walk { linear, access, physical }),
            TraceEvent::Flush(flushes) => {
                let mut flush = |what, pcid, linear| put(What::Flush { what, pcid, linear });
                if flushes.all {
                    flush("all", None, None);
                }
                if flushes.all_non_global {
                    flush("all but global pages", None, None);
                }
                flushes.spaces.iter().for_each(|&pcid| flush("address space", Some(pcid), None));
                flushes.pages.iter().for_each(|&(pcid, lin)| flush("page", Some(pcid), Some(lin.0)));
            }
            TraceEvent::Port { port, size, write, value } => {
                put(What::Access { port: true, at: u64::from(port), size, write, value });
            }
            TraceEvent::Mmio { at, size, write, value } => {
                put(What::Access { port: false, at, size, write, value });
            }
        }
    }

    /// The line; `owner` finds out who answers at a port (or address).
    pub(super) fn line(&self, owner: impl FnOnce(u32, bool, u64) -> Option<String>) -> Line {
        match self {
            Record::Processor(at, what) => Line {
                vcpu: Some(at.vp),
                instructions: Some(at.instructions),
                rip: hex(at.rip),
                cpl: Some(at.cpl),
                cr3: hex(at.cr3),
                ..processor(at, what, owner)
            },
            Record::Device(device, DeviceEvent::Dma(access)) => Line {
                kind: "dma",
                device: Some(device.clone()),
                at: hex(access.at.0),
                size: Some(access.len),
                write: Some(access.write),
                what: Some(access.purpose.name().into()),
                ..Line::default()
            },
            Record::Device(device, DeviceEvent::Doorbell { queue }) => {
                let device = Some(device.clone());
                Line { kind: "doorbell", device, queue: Some(*queue), ..Line::default() }
            }
        }
    }
}

fn hex(value: u64) -> Option<String> {
    Some(format!("{value:#x}"))
}

fn processor(at: &TraceContext, what: &What, owner: impl FnOnce(u32, bool, u64) -> Option<String>) -> Line {
    let line = Line::default();
    match *what {
        What::Instruction { bytes, len } => {
            let code = &bytes[..usize::from(len)];
            let bytes = Some(code.iter().map(|b| format!("{b:02x}")).collect());
            Line { kind: "insn", bytes, text: Some(text(at, code)), ..line }
        }
        What::Block => Line { kind: "block", ..line },
        What::Exception { vector, error, address } => {
            let error = error.map(|e| format!("{e:#x}"));
            Line { kind: "exception", vector: Some(vector), error, at: address.and_then(hex), ..line }
        }
        What::Interrupt { vector } => Line { kind: "interrupt", vector: Some(vector), ..line },
        What::Control { register, value } => {
            Line { kind: "cr", register: Some(format!("cr{register}")), value: hex(value), ..line }
        }
        What::Msr { index, value } => {
            Line { kind: "msr", register: Some(format!("{index:#x}")), value: hex(value), ..line }
        }
        What::Hypercall { number } => Line { kind: "hypercall", value: hex(number), ..line },
        What::Walk { linear, access, physical } => {
            let what = match access {
                Access::Read => "read",
                Access::Write => "write",
                Access::Execute => "execute",
            };
            Line {
                kind: "walk",
                at: hex(linear),
                what: Some(what.into()),
                to: physical.and_then(hex),
                ..line
            }
        }
        What::Flush { what, pcid, linear } => {
            Line { kind: "flush", what: Some(what.into()), pcid, at: linear.and_then(hex), ..line }
        }
        What::Access { port, at: place, size, write, value } => Line {
            kind: if port { "port" } else { "mmio" },
            at: hex(place),
            size: Some(size.into()),
            write: Some(write),
            value: hex(value),
            device: owner(at.vp, port, place),
            ..line
        },
    }
}

fn text(at: &TraceContext, code: &[u8]) -> String {
    let mut out = String::new();
    let instr = Decoder::with_ip(at.bits, code, at.rip, DecoderOptions::NONE).decode();
    IntelFormatter::new().format(&instr, &mut out);
    out
}

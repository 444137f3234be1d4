//! What is traced: `KIND[,KIND]…[,FILTER]…`.

use super::lines::{DeviceEvent, Record, What};
use paravane_cpu::{TraceContext, TraceEvent};
use std::path::PathBuf;

/// The kinds, by name; the last two are told only where they are asked for by name.
pub const KINDS: [&str; 13] = [
    "exception",
    "interrupt",
    "cr",
    "msr",
    "walk",
    "flush",
    "port",
    "mmio",
    "dma",
    "doorbell",
    "hypercall",
    "block",
    "insn",
];
const EXCEPTION: usize = 0;
const INTERRUPT: usize = 1;
const CR: usize = 2;
const MSR: usize = 3;
const WALK: usize = 4;
const FLUSH: usize = 5;
const PORT: usize = 6;
const MMIO: usize = 7;
/// Devices' accesses to guest memory.
pub const DMA: usize = 8;
/// Virtio queue notifications.
pub const DOORBELL: usize = 9;
const HYPERCALL: usize = 10;
const BLOCK: usize = 11;
const INSN: usize = 12;
/// What `all` stands for.
const ALL: u16 = (1 << BLOCK) - 1;
/// Those too that are told where they are asked for only.
const EVERY: u16 = (1 << KINDS.len()) - 1;

/// Which events are written.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Filter {
    kinds: u16,
    /// Only those of this device.
    device: Option<String>,
    /// Only where the event's address lies in here: both ends belong to it.
    addr: Option<(u64, u64)>,
    cpl: Option<u8>,
    cr3: Option<u64>,
    vcpu: Option<u32>,
    /// The guest waits for the writer, and nothing is dropped.
    pub wait: bool,
    /// The file has the compact form.
    pub binary: bool,
}

/// `FILE,KIND,…` as `--trace` has it.
pub fn parse(spec: &str) -> Result<(PathBuf, Filter), String> {
    let (file, rest) = spec.split_once(',').unwrap_or((spec, "all"));
    if file.is_empty() || KINDS.contains(&file) || file.contains('=') {
        return Err(format!("'{spec}' names no file: write for example trace.jsonl,port,device=pit"));
    }
    Ok((PathBuf::from(file), Filter::parse(rest)?))
}

impl Filter {
    /// What is read of a trace that was written: `words` as in `--trace`, and everything that is there without any kind.
    pub fn for_reading(words: &[String]) -> Result<Filter, String> {
        let mut filter = Filter::default();
        for word in words.iter().flat_map(|w| w.split(',')).filter(|w| !w.is_empty()) {
            if matches!(word, "wait" | "binary") {
                return Err(format!("'{word}' is for writing a trace"));
            }
            filter.word(word)?;
        }
        if filter.kinds == 0 {
            filter.kinds = EVERY;
        }
        Ok(filter)
    }

    fn parse(text: &str) -> Result<Filter, String> {
        let mut filter = Filter::default();
        for word in text.split(',').filter(|w| !w.is_empty()) {
            filter.word(word)?;
        }
        if filter.kinds == 0 {
            filter.kinds = ALL;
        }
        Ok(filter)
    }

    fn word(&mut self, word: &str) -> Result<(), String> {
        match word.split_once('=') {
            None if word == "all" => self.kinds |= ALL,
            None if word == "wait" => self.wait = true,
            None if word == "binary" => self.binary = true,
            None => {
                let kind = KINDS.iter().position(|k| *k == word);
                let unknown = || format!("'{word}' is none of all, {}, wait, binary", KINDS.join(", "));
                self.kinds |= 1 << kind.ok_or_else(unknown)?;
            }
            Some(("device", name)) => self.device = Some(name.to_owned()),
            Some(("addr", range)) => {
                let (first, last) = range.split_once('-').unwrap_or((range, range));
                self.addr = Some((number(first)?, number(last)?));
            }
            Some(("cpl", n)) => self.cpl = Some(number(n)? as u8),
            Some(("cr3", n)) => self.cr3 = Some(number(n)?),
            Some(("vcpu", n)) => self.vcpu = Some(number(n)? as u32),
            Some((key, _)) => return Err(format!("'{key}' is none of device, addr, cpl, cr3, vcpu")),
        }
        Ok(())
    }

    /// Whether every instruction must be looked at.
    pub fn every_instruction(&self) -> bool {
        self.has(BLOCK) || self.has(INSN)
    }

    /// Whether this kind is wanted at all.
    pub fn has(&self, kind: usize) -> bool {
        self.kinds & 1 << kind != 0
    }

    /// Whether a device's event at `at` is wanted.
    pub fn takes_device(&self, kind: usize, device: &str, at: u64) -> bool {
        self.has(kind)
            && self.device.as_ref().is_none_or(|d| d == device)
            && self.addr.is_none_or(|(first, last)| (first..=last).contains(&at))
            && (self.cpl, self.cr3, self.vcpu) == (None, None, None)
    }

    /// Whether a processor's event is wanted; `owner` finds out who answers at a port (or address).
    pub fn takes(
        &self,
        at: &TraceContext,
        event: &TraceEvent<'_>,
        owner: impl FnOnce(bool, u64) -> Option<String>,
    ) -> bool {
        let (kind, address, device) = match *event {
            TraceEvent::Exception { address, .. } => (EXCEPTION, address.unwrap_or(at.rip), None),
            TraceEvent::Interrupt(_) => (INTERRUPT, at.rip, None),
            TraceEvent::Control(..) => (CR, at.rip, None),
            TraceEvent::Msr(index, _) => (MSR, u64::from(index), None),
            TraceEvent::Hypercall(_) => (HYPERCALL, at.rip, None),
            TraceEvent::Walk { linear, .. } => (WALK, linear, None),
            TraceEvent::Flush(_) => (FLUSH, at.rip, None),
            TraceEvent::Port { port, .. } => (PORT, u64::from(port), Some(true)),
            TraceEvent::Mmio { at, .. } => (MMIO, at, Some(false)),
            TraceEvent::Block => (BLOCK, at.rip, None),
            TraceEvent::Instruction(_) => (INSN, at.rip, None),
        };
        self.takes_processor(kind, at, address)
            && self
                .device
                .as_ref()
                .is_none_or(|name| device.and_then(|port| owner(port, address)).as_ref() == Some(name))
    }

    /// Whether an event that was written is wanted; `owner` answers at its port or address, or is the device itself.
    pub(super) fn takes_record(&self, record: &Record, owner: Option<&str>) -> bool {
        let (at, what) = match record {
            Record::Processor(at, what) => (at, what),
            Record::Device(device, DeviceEvent::Dma(access)) => {
                return self.takes_device(DMA, device, access.at.0);
            }
            Record::Device(device, DeviceEvent::Doorbell { queue }) => {
                return self.takes_device(DOORBELL, device, *queue);
            }
        };
        let (kind, address) = match *what {
            What::Exception { address, .. } => (EXCEPTION, address.unwrap_or(at.rip)),
            What::Interrupt { .. } => (INTERRUPT, at.rip),
            What::Control { .. } => (CR, at.rip),
            What::Msr { index, .. } => (MSR, u64::from(index)),
            What::Hypercall { .. } => (HYPERCALL, at.rip),
            What::Walk { linear, .. } => (WALK, linear),
            What::Flush { .. } => (FLUSH, at.rip),
            What::Access { port, at, .. } => (if port { PORT } else { MMIO }, at),
            What::Block => (BLOCK, at.rip),
            What::Instruction { .. } => (INSN, at.rip),
        };
        self.takes_processor(kind, at, address)
            && self.device.as_deref().is_none_or(|name| owner == Some(name))
    }

    fn takes_processor(&self, kind: usize, at: &TraceContext, address: u64) -> bool {
        self.has(kind)
            && self.cpl.is_none_or(|n| n == at.cpl)
            && self.cr3.is_none_or(|n| n & !0xFFF == at.cr3 & !0xFFF)
            && self.vcpu.is_none_or(|n| n == at.vp)
            && self.addr.is_none_or(|(first, last)| (first..=last).contains(&address))
    }
}

fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("'{text}' is no number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specifications() {
        let (file, filter) = parse("t.jsonl,port,msr,device=pit,addr=0x40-0x43,cpl=0,wait").expect("good");
        assert_eq!(file, PathBuf::from("t.jsonl"));
        assert!(filter.has(PORT) && filter.has(MSR) && !filter.has(MMIO) && filter.wait);
        let (_, all) = parse("t.jsonl").expect("good");
        assert!(all.has(EXCEPTION) && all.has(DOORBELL) && !all.every_instruction());
        assert!(parse("t.jsonl,block").expect("good").1.every_instruction());
        for bad in ["", "port", "addr=1", "t,ports", "t,addr=x", "t,colour=red"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn filters_hold_together() {
        let at = TraceContext { cpl: 3, rip: 0x1000, cr3: 0x5001, ..TraceContext::default() };
        let takes = |spec: &str, event: TraceEvent<'_>| {
            let (_, filter) = parse(&format!("t,{spec}")).expect("good");
            filter.takes(&at, &event, |port, at| (port && at == 0x40).then(|| "pit".to_owned()))
        };
        let port = |port| TraceEvent::Port { port, size: 1, write: true, value: 0 };
        assert!(takes("port", port(0x40)) && takes("port,device=pit", port(0x40)));
        assert!(!takes("port,device=pit", port(0x41)) && !takes("mmio", port(0x40)));
        assert!(takes("port,addr=0x40-0x43", port(0x43)) && !takes("port,addr=0x40-0x43", port(0x44)));
        assert!(takes("port,cpl=3,cr3=0x5000,vcpu=0", port(0x40)) && !takes("port,cpl=0", port(0x40)));
        assert!(!takes("all", TraceEvent::Block) && takes("block", TraceEvent::Block));
    }
}

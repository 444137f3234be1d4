//! A hostile guest: accesses anywhere in some windows, structures in memory, time, and what happens outside.

use crate::pc::{Pc, RAM, VCPUS};
use crate::script::Script;
use paravane_devices::{IrqSink, MsiSink};
use paravane_memory::{PhysAddr, Port, VpIndex, Width};
use std::sync::Arc;

/// Where accesses of a target go.
#[derive(Clone, Copy, Debug)]
pub enum Window {
    /// Ports from the first on.
    Ports(u16, u16),
    /// Physical addresses.
    Mmio(u64, u64),
    /// Configuration space of a PCI slot and function, through ports CF8h and CFCh.
    Config(u8, u8),
    /// The local APIC page of a processor, CR8, and its MSRs.
    Lapic(u32),
    /// Any port, any address.
    Everywhere,
}

/// One device under attack.
#[derive(Clone, Copy, Debug)]
pub struct Traffic {
    /// Where accesses go.
    pub windows: &'static [Window],
    /// Where in RAM the device finds its structures.
    pub structures: &'static [u64],
}

const WIDTHS: [Width; 4] = [Width::W8, Width::W16, Width::W32, Width::W64];

/// The local APIC's MSRs: base, deadline, x2APIC.
const MSRS: [u32; 4] = [0x1B, 0x6E0, 0x800, 0x820];

impl Traffic {
    /// Plays `input` against a new machine.
    pub fn run(&self, input: &[u8]) {
        let pc = Pc::new();
        let mut script = Script::new(input);
        while let Some(op) = script.next() {
            self.step(&pc, &mut script, op);
        }
        pc.inspect();
        pc.reset();
        pc.inspect();
        let bus = Arc::downgrade(&pc.bus);
        drop(pc);
        assert!(bus.upgrade().is_none(), "devices keep each other alive");
    }

    fn step(&self, pc: &Pc, s: &mut Script<'_>, op: u8) {
        match op >> 4 {
            0..6 => {
                let window = self.windows[usize::from(op & 0xF) % self.windows.len()];
                access(pc, s, window);
            }
            6..8 => pc.advance(duration(op & 0x1F, s)),
            8 => {
                let bytes = s.u8().min(32);
                let at = self.place(s, op);
                _ = pc.memory.write(PhysAddr(at), s.take(bytes.into()));
            }
            9 => {
                let at = self.place(s, op);
                let value = s.wild().to_le_bytes();
                _ = pc.memory.write(PhysAddr(at), &value);
            }
            10 => {
                let at = self.place(s, op);
                let value = (self.place(s, op) as u32).to_le_bytes();
                _ = pc.memory.write(PhysAddr(at), &value);
            }
            11 => _ = pc.disks[usize::from(op & 3) % pc.disks.len()].complete_one(op & 4 != 0, op & 8 != 0),
            12 => interrupt(pc, s, op),
            13 => string_io(pc, s, op),
            14 => outside(pc, s, op),
            _ if op == 0xFF => pc.reset(),
            _ => pc.disks.iter().for_each(|d| _ = d.complete_one(false, false)),
        }
    }

    /// An address near one of the device's structures, or a wild one.
    fn place(&self, s: &mut Script<'_>, op: u8) -> u64 {
        let which = usize::from(op & 0xF);
        if which == 0xF || self.structures.is_empty() {
            return s.wild();
        }
        (self.structures[which % self.structures.len()] + u64::from(s.u8()) * 2) % RAM
    }
}

/// Bits 1:0 of the first byte are the width, bit 2 says store, bit 3 asks for a wild value.
fn access(pc: &Pc, s: &mut Script<'_>, window: Window) {
    let how = s.u8();
    let (width, store, wild) = (WIDTHS[usize::from(how & 3)], how & 4 != 0, how & 8 != 0);
    let at = if how & 0x10 != 0 { s.u16() } else { s.u8().into() };
    let mut value = |width: Width| if wild { s.wild() } else { s.number(width.bytes()) };
    match window {
        Window::Ports(first, count) => {
            let port = Port(first.wrapping_add(at % count));
            let value = if store { Some(value(width)) } else { None };
            port_access(pc, port, width, value);
        }
        Window::Mmio(base, len) => {
            let at = PhysAddr(base + u64::from(at) % len);
            if store {
                pc.bus.mmio_store(at, width, value(width));
            } else {
                pc.bus.mmio_load(at, width);
            }
        }
        Window::Config(slot, function) => {
            let function = u32::from(slot) << 11 | u32::from(function) << 8;
            let address = 0x8000_0000 | function | u32::from(at & 0xFC);
            pc.bus.port_out(Port(0xCF8), Width::W32, address);
            let value = if store { Some(value(width)) } else { None };
            port_access(pc, Port(0xCFC + (at & 3)), width, value);
        }
        Window::Lapic(vp) => {
            let value = if store { Some(value(Width::W64)) } else { None };
            lapic_access(pc, VpIndex(vp % VCPUS), how >> 5, at, value);
        }
        Window::Everywhere if how & 0x20 != 0 => {
            let value = if store { Some(value(width)) } else { None };
            port_access(pc, Port(at), width, value);
        }
        Window::Everywhere => {
            let at = PhysAddr(s.wild());
            if store {
                pc.bus.mmio_store(at, width, s.number(width.bytes()));
            } else {
                pc.bus.mmio_load(at, width);
            }
        }
    }
}

fn port_access(pc: &Pc, port: Port, width: Width, value: Option<u64>) {
    match value {
        Some(value) => pc.bus.port_out(port, width, value as u32),
        None => _ = pc.bus.port_in(port, width),
    }
}

fn lapic_access(pc: &Pc, vp: VpIndex, kind: u8, at: u16, value: Option<u64>) {
    let msr = MSRS[usize::from(at >> 5 & 3)] + if at & 0x40 != 0 { u32::from(at & 0x1F) } else { 0 };
    match (kind, value) {
        (0, Some(value)) => pc.fabric.set_cr8(vp, value),
        (0, None) => _ = pc.fabric.cr8(vp),
        (1 | 2, Some(value)) => _ = pc.fabric.write_msr(vp, msr, value),
        (1 | 2, None) => _ = pc.fabric.read_msr(vp, msr),
        (3, Some(value)) => pc.fabric.set_tsc_offset(vp, value),
        (_, Some(value)) => pc.fabric.lapic_store(vp, u64::from(at) << 4 & 0xFFF, value as u32),
        (_, None) => _ = pc.fabric.lapic_load(vp, u64::from(at) << 4 & 0xFFF),
    }
}

/// From nanoseconds to centuries.
fn duration(exponent: u8, s: &mut Script<'_>) -> u64 {
    let unit = 1u64 << (2 * u32::from(exponent)).min(58);
    unit.saturating_mul(u64::from(s.u8()) + 1)
}

fn interrupt(pc: &Pc, s: &mut Script<'_>, op: u8) {
    let vp = VpIndex(u32::from(op & 1));
    match op & 0xF {
        0..4 => _ = pc.fabric.acknowledge(vp),
        4..6 => pc.fabric.lapic_store(vp, 0xB0, 0),
        6..9 => pc.fabric.set_level(u32::from(s.u8() & 31), true),
        9..12 => pc.fabric.set_level(u32::from(s.u8() & 31), false),
        12 => pc.fabric.set_nmi_line(s.u8() & 1 != 0),
        13 => pc.fabric.performance_event(vp),
        14 => pc.fabric.msi(0xFEE0_0000 | u64::from(s.u32()), s.u32()),
        _ => pc.fabric.thermal_event(vp),
    }
}

/// REP INS and REP OUTS at the data ports of both IDE channels.
fn string_io(pc: &Pc, s: &mut Script<'_>, op: u8) {
    let port = Port(if op & 1 != 0 { 0x1F0 } else { 0x170 });
    let width = WIDTHS[usize::from(op >> 1 & 3)];
    let mut buf = vec![0x5A; usize::from(s.u16() % 1025)];
    if op & 8 != 0 {
        pc.bus.port_in_string(port, width, &mut buf);
    } else {
        pc.bus.port_out_string(port, width, &buf);
    }
}

/// People, and drivers that do by the book what random traffic would take long to find.
fn outside(pc: &Pc, s: &mut Script<'_>, op: u8) {
    match op & 3 {
        _ if op & 8 != 0 => crate::ide::command(pc, s),
        0 => pc.type_serial(s.take(usize::from(op >> 2 & 1) * 20 + 1)),
        1 => pc.press([s.u8(), s.u8(), s.u8()]),
        2 => crate::virtio::start(pc, s),
        _ => crate::virtio::offer(pc, s),
    }
}

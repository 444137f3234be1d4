//! The PC's board: every device, where it answers and which wires it drives.
//!
//! | what                          | where                                    | wires            |
//! |-------------------------------|------------------------------------------|------------------|
//! | 8259A pair                    | 0x20, 0xA0, 0x4D0                        | INTR             |
//! | 8254, port B                  | 0x40-0x43, 0x61                          | IRQ 0            |
//! | i8042                         | 0x60, 0x64                               | IRQ 1, 12        |
//! | MC146818                      | 0x70-0x71                                | IRQ 8            |
//! | port 92, POST code, 0xE9      | 0x92, 0x80, 0xE9                         |                  |
//! | coprocessor error (FERR#)     | 0xF0-0xF1                                | IRQ 13           |
//! | 16550A COM1-COM4              | 0x3F8, 0x2F8, 0x3E8, 0x2E8               | IRQ 4, 3, 4, 3   |
//! | ACPI power management         | 0x600, 0xB2                              | IRQ 9            |
//! | PCI configuration, reset      | 0xCF8-0xCFF                              |                  |
//! | local APIC, I/O APIC, HPET    | 0xFEE00000, 0xFEC00000, 0xFED00000       | GSI 0-23         |
//!
//! PCI: slot 0 host bridge; slot 1 PIIX (0 ISA bridge, 1 IDE, 3 power management); virtio from slot 3 on.

use super::config::{ClockKind, MachineConfig};
use super::cpubus::{Control, Kick, MachineBus};
use super::dma::Dma;
use super::entropy::SeededEntropy;
use super::error::MachineError;
use super::lab_port::LabDevice;
use super::lockstep::LockstepDisk;
use super::serial::SerialEnd;
use super::storage::{self, Disk, IdeSlots};
use super::{HostEnds, post};
use crate::replay::SerialGate;
use crate::run::{Lifecycle, Vcpu};
use crate::trace::Switch;
use paravane_devices::acpi_pm::spec as acpi_pm;
use paravane_devices::block::BlockBackend;
use paravane_devices::hpet::{self, Hpet, HpetWiring, LegacyRoute};
use paravane_devices::i8042::{I8042, I8042Wiring};
use paravane_devices::ide::IdeController;
use paravane_devices::pci::{HostBridge, IsaBridge, PciBus, PirqRouter, PowerFunction};
use paravane_devices::uart::{self, CharSink, CharSource, NoInput, Uart, UartWiring};
use paravane_devices::{
    A20Gate, A20Source, AcpiPm, AcpiPmWiring, Bus, ByteSink, Clock, CoprocessorError, CoprocessorPins,
    Counters, DebugConsole, DebugExit, Device, DeviceHandle, FabricConfig, InterruptFabric, IoApicWindow,
    IrqLine, IrqSink, MachineControl, MsiSink, PicPorts, Pit, ResetKind, Rtc, SystemPorts, TimerQueue,
    TscClock, WiredOr, bind_timer, share,
};
use paravane_memory::{GuestMemory, PhysAddr, Port, Width};
use paravane_pv::virtio::{
    DoorbellWatch, EntropySource, HostEntropy, VirtioBlk, VirtioDevice, VirtioPci, VirtioPciOptions,
    VirtioRng, VirtioWiring,
};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

/// Input clock of the local APIC timers, told to guests in CPUID leaf 15H.
pub(super) const APIC_HZ: u64 = 100_000_000;

/// ISA interrupts.
mod irq {
    pub(super) const PIT: u32 = 0;
    pub(super) const KEYBOARD: u32 = 1;
    pub(super) const RTC: u32 = 8;
    pub(super) const SCI: u32 = 9;
    pub(super) const MOUSE: u32 = 12;
    pub(super) const FERR: u32 = 13;
    pub(super) const IDE: [u32; 2] = [14, 15];
    /// COM1 and COM3 share one, COM2 and COM4 the other.
    pub(super) const SERIAL: [u32; 2] = [4, 3];
    /// The I/O APIC's own inputs.
    pub(super) const IOAPIC_ONLY: std::ops::Range<u32> = 16..24;
}

/// PCI slots.
mod slot {
    pub(super) const HOST_BRIDGE: u8 = 0;
    pub(super) const PIIX: u8 = 1;
    pub(super) const VIRTIO: u8 = 3;
    pub(super) const LAST: u8 = 31;
}

const COM_PORTS: [Port; 4] = [Port(0x3F8), Port(0x2F8), Port(0x3E8), Port(0x2E8)];

/// ELCR for IRQ 8-15: SCI and the PCI interrupts 10 and 11 are level triggered.
const ELCR_HIGH: u32 = 0x0E;

/// What a deterministic machine's clock shows at power-on: 2026-01-01 00:00:00 UTC.
const FIXED_DATE: i64 = 1_767_225_600;

/// What the board is built from.
pub(super) struct Wiring<'a> {
    pub(super) config: &'a MachineConfig,
    pub(super) mem: &'a GuestMemory,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) tsc: TscClock,
    pub(super) timers: &'a Arc<TimerQueue>,
    pub(super) counters: &'a Counters,
    pub(super) lifecycle: &'a Lifecycle,
    pub(super) trace: &'a Arc<Switch>,
    pub(super) dma: &'a Arc<Dma>,
    pub(super) vcpus: &'a [Arc<Vcpu>],
}

/// All devices of a machine.
pub(super) struct Board {
    pub(super) cpu_bus: Arc<MachineBus>,
    bus: Arc<Bus>,
    pub(super) fabric: Arc<InterruptFabric>,
    a20: Arc<A20Gate>,
    pub(super) pci: Arc<Mutex<PciBus>>,
    router: Arc<PirqRouter>,
    /// In the order they are reset; the PCI bus resets its functions itself.
    pub(super) devices: Vec<DeviceHandle>,
    /// Kept for the draining at reset.
    backends: Vec<Arc<dyn BlockBackend>>,
    /// Those of them that complete between slices.
    pub(super) lockstep: Vec<Arc<LockstepDisk>>,
    pub(super) wires: Vec<Arc<WiredOr>>,
    /// The serial ports' ends, where input waits for the end of a slice.
    pub(super) gates: Vec<Arc<SerialGate>>,
}

/// A board that grows.
struct Builder<'a> {
    w: &'a Wiring<'a>,
    bus: Arc<Bus>,
    fabric: Arc<InterruptFabric>,
    sink: Arc<dyn IrqSink>,
    control: Arc<dyn MachineControl>,
    a20: Arc<A20Gate>,
    devices: Vec<DeviceHandle>,
    lockstep: Vec<Arc<LockstepDisk>>,
    wires: Vec<Arc<WiredOr>>,
    gates: Vec<Arc<SerialGate>>,
}

impl Board {
    /// Builds and wires everything.
    pub(super) fn build(w: Wiring<'_>, disks: Vec<Disk>, ends: HostEnds) -> Result<Board, MachineError> {
        let mut b = Builder::new(&w);
        b.interrupt_controllers();
        b.timers();
        b.super_io(ends.debug_console);
        b.serial_ports(ends.serial);
        if let Some(heard) = ends.lab_port {
            b.ports(share(LabDevice::new(heard)), &[(LabDevice::PORT, 1)], Width::W8);
        }
        let ferr = Arc::new(CoprocessorPins::new(b.line(irq::FERR, "fpu")));
        b.ports(share(CoprocessorError::new(Arc::clone(&ferr))), &[CoprocessorError::RANGE], Width::W8);
        let cpu_bus = MachineBus::new(
            Arc::clone(&b.bus),
            Arc::clone(&b.fabric),
            Arc::clone(&w.clock),
            w.tsc,
            ferr,
            w.vcpus.len() as u32,
            w.counters,
        );
        let (pci, router, backends) = b.pci(disks)?;
        let Builder { bus, fabric, a20, devices, lockstep, wires, gates, .. } = b;
        let cpu_bus = Arc::new(cpu_bus);
        Ok(Board { cpu_bus, bus, fabric, a20, pci, router, devices, backends, lockstep, wires, gates })
    }

    /// What a BIOS does between reset and the start of an operating system.
    pub(super) fn post(&self) {
        self.a20.set(A20Source::Port92, true);
        self.fabric.enter_virtual_wire_mode();
        self.cpu_bus.reset();
        self.bus.port_out(Port(0x4D1), Width::W8, ELCR_HIGH);
        // Counter 0: mode 3, 18.2 Hz.
        for (port, value) in [(0x43, 0x36), (0x40, 0), (0x40, 0)] {
            self.bus.port_out(Port(port), Width::W8, value);
        }
        post::assign(&mut self.pci.lock().expect("PCI bus"), &self.router);
    }

    /// The reset line.
    pub(super) fn reset(&self) {
        for backend in &self.backends {
            backend.drain();
        }
        for device in &self.devices {
            device.lock().expect("device").reset(ResetKind::Bus);
        }
        self.fabric.reset();
        self.cpu_bus.reset();
    }
}

impl<'a> Builder<'a> {
    fn new(w: &'a Wiring<'a>) -> Builder<'a> {
        let bus = Bus::new(w.counters);
        let config = FabricConfig { vcpus: w.vcpus.len() as u32, apic_hz: APIC_HZ, tsc: w.tsc };
        let kick = Arc::new(Kick(w.vcpus.to_vec()));
        let fabric = InterruptFabric::new(config, Arc::clone(&w.clock), w.timers, kick, w.counters);
        let sink = Arc::clone(&fabric) as Arc<dyn IrqSink>;
        let control: Arc<dyn MachineControl> =
            Arc::new(Control { lifecycle: w.lifecycle.clone(), vcpus: w.vcpus.to_vec() });
        let a20 = A20Gate::new(Arc::clone(&control));
        let (devices, lockstep, wires, gates) = Default::default();
        Builder { w, bus, fabric, sink, control, a20, devices, lockstep, wires, gates }
    }

    /// The wire to ISA interrupt `n`, counted under `label`.
    fn line(&self, n: u32, label: &str) -> IrqLine {
        IrqLine::new(Arc::clone(&self.sink), n, self.w.counters.counter(label, "irqs"))
    }

    /// Puts a device on the bus at `ranges`.
    fn ports<D: Device + 'static>(&mut self, device: Arc<Mutex<D>>, ranges: &[(Port, u32)], widest: Width) {
        let handle: DeviceHandle = device;
        let on_bus = self.bus.attach(Arc::clone(&handle));
        for &(first, count) in ranges {
            self.bus.claim_ports(&on_bus, first, count, widest);
        }
        self.devices.push(handle);
    }

    fn mmio<D: Device + 'static>(&mut self, device: Arc<Mutex<D>>, base: u64, len: u64, widest: Width) {
        let handle: DeviceHandle = device;
        let on_bus = self.bus.attach(Arc::clone(&handle));
        self.bus.claim_mmio(&on_bus, PhysAddr(base), len, widest);
        self.devices.push(handle);
    }

    fn interrupt_controllers(&mut self) {
        let pic = share(PicPorts::new(Arc::clone(&self.fabric)));
        self.ports(pic, &PicPorts::RANGES, Width::W8);
        let ioapic = share(IoApicWindow::new(Arc::clone(&self.fabric)));
        self.mmio(ioapic, IoApicWindow::BASE, IoApicWindow::LEN, Width::W32);
    }

    /// PIT, RTC and HPET, whose wires cross in the legacy replacement switch.
    fn timers(&mut self) {
        let (clock, queue) = (|| Arc::clone(&self.w.clock), Arc::clone(self.w.timers));
        let legacy = LegacyRoute::new(self.line(irq::PIT, "pit"), self.line(irq::RTC, "rtc"));
        let to_legacy = |input| {
            let sink = Arc::clone(&legacy) as Arc<dyn IrqSink>;
            IrqLine::new(sink, input, paravane_devices::Counter::detached())
        };

        let timer = queue.timer();
        let key = timer.key();
        let pit = share(Pit::new(clock(), timer, to_legacy(LegacyRoute::PIT)));
        bind_timer(&queue, key, &pit);

        let timer = queue.timer();
        let key = timer.key();
        let mut rtc = Rtc::new(clock(), timer, to_legacy(LegacyRoute::RTC), self.date());
        let (low, high) = self.ram_sizes();
        rtc.set_memory_size(low, high);
        rtc.update_checksum();
        let rtc = share(rtc);
        bind_timer(&queue, key, &rtc);

        let timer = queue.timer();
        let key = timer.key();
        let routes = irq::IOAPIC_ONLY.map(|n| (n as u8, self.line(n, "hpet"))).collect();
        let hpet = share(Hpet::new(clock(), timer, HpetWiring { routes, legacy: Arc::clone(&legacy) }));
        bind_timer(&queue, key, &hpet);

        self.ports(pit, &Pit::RANGES, Width::W8);
        self.ports(rtc, &[Rtc::RANGE], Width::W8);
        self.mmio(hpet, hpet::spec::BASE, hpet::spec::LEN, Width::W64);
    }

    /// Seconds since 1970 for the real-time clock.
    fn date(&self) -> i64 {
        match self.w.config.clock {
            ClockKind::Instructions => FIXED_DATE,
            ClockKind::Host => {
                SystemTime::now().duration_since(UNIX_EPOCH).map_or(FIXED_DATE, |d| d.as_secs() as i64)
            }
        }
    }

    /// RAM below and above 4 GiB.
    fn ram_sizes(&self) -> (u64, u64) {
        let ranges = self.w.mem.ram_ranges();
        let sum = |low: bool| ranges.iter().filter(|r| (r.0.0 == 0) == low).map(|r| r.1).sum();
        (sum(true), sum(false))
    }
}

/// What [`Builder::pci`] leaves for the board.
type PciParts = (Arc<Mutex<PciBus>>, Arc<PirqRouter>, Vec<Arc<dyn BlockBackend>>);

impl Builder<'_> {
    /// COM1 to as many as are asked for; one wire for COM1 and COM3, one for COM2 and COM4.
    fn serial_ports(&mut self, ends: Vec<Option<SerialEnd>>) {
        let wires = irq::SERIAL.map(|n| WiredOr::new(self.line(n, "serial")));
        self.wires.extend(wires.iter().map(Arc::clone));
        for (number, (end, base)) in ends.into_iter().zip(COM_PORTS).enumerate() {
            let end = self.gated(end);
            let label = format!("serial{number}");
            let wire = Arc::clone(&wires[number % 2]) as Arc<dyn IrqSink>;
            let counter = |name| self.w.counters.counter(&label, name);
            let irq = IrqLine::new(wire, number as u32, counter("irqs"));
            let input = end.as_ref().map(|e| e.input.clone());
            let (sink, source): (Box<dyn CharSink>, Box<dyn CharSource>) = match end {
                Some(end) => (end.output, Box::new(end.input)),
                None => (Box::new(|_: &[u8]| ()), Box::new(NoInput)),
            };
            let (sent, received) = (counter("bytes_sent"), counter("bytes_received"));
            let wiring = UartWiring { label, irq, sink, source, sent, received };
            let timer = self.w.timers.timer();
            let key = timer.key();
            let uart = share(Uart::new(Arc::clone(&self.w.clock), timer, wiring));
            bind_timer(self.w.timers, key, &uart);
            if let Some(input) = input {
                let weak = Arc::downgrade(&uart);
                input.on_ready(move || {
                    if let Some(uart) = weak.upgrade() {
                        uart.lock().expect("UART").input_ready();
                    }
                });
            }
            self.ports(uart, &[(base, uart::spec::PORTS)], Width::W8);
        }
    }

    /// In a run that can be repeated, input waits for the end of a slice.
    fn gated(&mut self, end: Option<SerialEnd>) -> Option<SerialEnd> {
        let vcpu = Arc::clone(self.w.vcpus.first()?);
        if self.w.config.clock == ClockKind::Host {
            return end;
        }
        // A port that nothing is plugged into keeps its number.
        let end = end.unwrap_or_else(|| SerialEnd::sink(|_| ()));
        let gate = SerialGate::new(end.input);
        self.gates.push(Arc::clone(&gate));
        // All of them may sleep.
        gate.host().on_ready(move || vcpu.stop());
        Some(SerialEnd {
            output: gate.sink(end.output, self.w.lifecycle.clone()),
            input: gate.guest().clone(),
        })
    }

    /// Power management and the small system ports.
    fn super_io(&mut self, debug_console: ByteSink) {
        let system = share(SystemPorts::new(Arc::clone(&self.control), Arc::clone(&self.a20)));
        self.ports(system, &SystemPorts::RANGES, Width::W8);
        let keyboard = share(I8042::new(I8042Wiring {
            keyboard_irq: self.line(irq::KEYBOARD, "i8042"),
            aux_irq: self.line(irq::MOUSE, "i8042"),
            control: Arc::clone(&self.control),
            a20: Arc::clone(&self.a20),
            mouse: true,
        }));
        self.ports(keyboard, &I8042::RANGES, Width::W8);
        self.ports(share(DebugConsole::new(debug_console)), &[DebugConsole::RANGE], Width::W8);
        if let Some(port) = self.w.config.debug_exit {
            let exit = share(DebugExit::new(Arc::clone(&self.control)));
            self.ports(exit, &[(Port(port), DebugExit::PORTS)], Width::W32);
        }

        let timer = self.w.timers.timer();
        let key = timer.key();
        let wiring = AcpiPmWiring {
            sci: self.line(irq::SCI, "acpi-pm"),
            control: Arc::clone(&self.control),
            timer_32bit: true,
            unsupported_sleep: self.w.counters.counter("acpi-pm", "unsupported_sleep"),
        };
        let pm = share(AcpiPm::new(Arc::clone(&self.w.clock), timer, wiring));
        bind_timer(self.w.timers, key, &pm);
        let handle: DeviceHandle = pm;
        let on_bus = self.bus.attach(Arc::clone(&handle));
        let base = Port(PowerFunction::PM_BASE);
        self.bus.claim_ports(&on_bus, base, acpi_pm::BLOCK_LEN, Width::W32);
        let (first, count) = AcpiPm::SMI_RANGE;
        self.bus.claim_ports(&on_bus, first, count, Width::W8);
        self.devices.push(handle);
    }

    /// The PCI bus with the chipset's functions, IDE, and every virtio device.
    fn pci(&mut self, disks: Vec<Disk>) -> Result<PciParts, MachineError> {
        let mut pci = PciBus::new(&self.bus, Arc::clone(&self.control));
        let router = PirqRouter::new(&self.sink);
        let occupied = |e: paravane_devices::pci::PciError| MachineError::Wiring(e.to_string());

        pci.insert(slot::HOST_BRIDGE, 0, share(HostBridge::new())).map_err(occupied)?;
        pci.insert(slot::PIIX, 0, share(IsaBridge::new(Arc::clone(&router)))).map_err(occupied)?;
        pci.insert(slot::PIIX, 3, share(PowerFunction::new())).map_err(occupied)?;

        let irqs = irq::IDE.map(|n| self.line(n, "ide"));
        let mut ide = IdeController::new(
            self.w.mem,
            irqs,
            ["ide0", "ide1"].map(|name| self.w.dma.tap(name)),
            self.w.counters,
        );
        let mut units = IdeSlots::new();
        let mut backends = Vec::new();
        let mut next_slot = slot::VIRTIO;
        let label = "virtio-rng0";
        let entropy = self.entropy()?;
        self.virtio(&mut pci, &router, &mut next_slot, label, entropy)?;
        for (number, disk) in disks.into_iter().enumerate() {
            let config = disk.config.clone();
            let mut backend = storage::back_end(disk, number, self.w.mem, self.w.counters, self.w.dma)?;
            if self.w.config.clock == ClockKind::Instructions {
                let disk = Arc::new(LockstepDisk::new(backend, self.w.mem));
                self.lockstep.push(Arc::clone(&disk));
                backend = disk;
            }
            backends.push(Arc::clone(&backend));
            if storage::is_ide(&config) {
                units.attach(&mut ide, &config, backend)?;
            } else {
                let label = format!("virtio-blk{number}");
                let device = Box::new(VirtioBlk::new(backend));
                self.virtio(&mut pci, &router, &mut next_slot, &label, device)?;
            }
        }
        ide.claim_ports(&self.bus);
        pci.insert(slot::PIIX, 1, share(ide)).map_err(occupied)?;

        let pci = share(pci);
        let (first, count) = PciBus::PORTS;
        self.ports(Arc::clone(&pci), &[(first, u32::from(count))], Width::W32);
        Ok((pci, router, backends))
    }

    fn entropy(&self) -> Result<Box<dyn VirtioDevice>, MachineError> {
        let source: Box<dyn EntropySource> = match self.w.config.clock {
            ClockKind::Instructions => Box::new(SeededEntropy::new()),
            ClockKind::Host => {
                Box::new(HostEntropy::new().map_err(|e| MachineError::Host("/dev/urandom", e))?)
            }
        };
        Ok(Box::new(VirtioRng::new(source)))
    }

    /// Tells the trace, if there is one, of the doorbells of `label`.
    fn heard(&self, label: &str) -> DoorbellWatch {
        let (trace, label) = (Arc::clone(self.w.trace), label.to_owned());
        Box::new(move |queue| trace.doorbell(&label, queue))
    }

    /// Puts a virtio device into the next free slot.
    fn virtio(
        &self,
        pci: &mut PciBus,
        router: &Arc<PirqRouter>,
        next_slot: &mut u8,
        label: &str,
        device: Box<dyn VirtioDevice>,
    ) -> Result<(), MachineError> {
        let slot = *next_slot;
        if slot > slot::LAST {
            return Err(MachineError::Wiring(format!("no PCI slot is left for {label}")));
        }
        *next_slot += 1;
        let wiring = VirtioWiring {
            label,
            memory: self.w.mem,
            intx: router.intx(slot, 0, self.w.counters.counter(label, "irqs")),
            msi: Arc::clone(&self.fabric) as Arc<dyn MsiSink>,
            counters: self.w.counters,
            doorbell: Some(self.heard(label)),
            dma: self.w.dma.tap(label),
        };
        let function = VirtioPci::new(device, wiring, VirtioPciOptions::default());
        pci.insert(slot, 0, function).map_err(|e| MachineError::Wiring(e.to_string()))
    }
}

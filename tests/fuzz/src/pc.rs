//! Every device, wired as on the machine's board, with a clock and a disk that the script moves.

use crate::disk::ScriptedDisk;
use paravane_devices::acpi_pm::spec as acpi_pm;
use paravane_devices::i8042::I8042Wiring;
use paravane_devices::ide::IdeController;
use paravane_devices::pci::{HostBridge, IsaBridge, PciBus, PirqRouter, PowerFunction};
use paravane_devices::uart::spec as uart;
use paravane_devices::{
    A20Gate, AcpiPm, AcpiPmWiring, Bus, CharSource, Clock, CoprocessorError, CoprocessorPins, Counter,
    Counters, DebugConsole, Device, DeviceHandle, DmaTap, FabricConfig, Hpet, HpetWiring, I8042,
    InterruptFabric, IoApicWindow, IrqLine, IrqSink, LegacyRoute, MachineControl, ManualClock, MsiSink,
    PicPorts, Pit, ResetKind, Rtc, SystemPorts, Timer, TimerQueue, TscClock, Uart, UartWiring, VcpuKick,
    VmTime, bind_timer, hpet, share,
};
use paravane_memory::{GuestMemory, MemoryConfig, PhysAddr, Port, VpIndex, Width};
use paravane_pv::virtio::{
    EntropySource, VirtioBlk, VirtioDevice, VirtioPci, VirtioPciOptions, VirtioRng, VirtioWiring,
};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of RAM.
pub const RAM: u64 = 2 << 20;
/// Processors.
pub const VCPUS: u32 = 2;
/// PCI slots of the three virtio functions: entropy, transitional disk, modern disk.
pub const VIRTIO_SLOTS: [u8; 3] = [3, 4, 5];
/// Where the bus master registers of the IDE function lie at first.
pub const BUS_MASTER: u16 = 0xC000;
/// Where the modern registers of the virtio function in `slot` lie at first.
pub const fn virtio_bar(slot: u8) -> u64 {
    0xE000_0000 + slot as u64 * 0x1_0000
}
/// Where its legacy registers lie at first.
pub const fn virtio_ports(slot: u8) -> u16 {
    0xC000 + slot as u16 * 0x100
}
/// Where its MSI-X table lies at first.
pub const fn virtio_msix(slot: u8) -> u64 {
    0xE100_0000 + slot as u64 * 0x1_0000
}

/// Machine time ends with 64 bits of nanoseconds, after 584 years; scripts stop after a quarter of that.
const LATEST: VmTime = VmTime(1 << 62);

/// A real-time clock that starts on the last day of a leap year's February.
const START: i64 = 1_709_164_790;

/// Processors that are never anywhere.
struct Nobody;

impl VcpuKick for Nobody {
    fn interrupt(&self, _vp: VpIndex) {}
    fn nmi(&self, _vp: VpIndex) {}
    fn init(&self, _vp: VpIndex) {}
    fn startup(&self, _vp: VpIndex, _vector: u8) {}
}

impl MachineControl for Nobody {
    fn power_off(&self) {}
    fn reset(&self, _reason: &'static str) {}
    fn debug_exit(&self, _value: u32) {}
    fn set_a20(&self, _on: bool) {}
}

/// What is typed at a serial port.
#[derive(Clone, Default)]
struct Typed(Arc<Mutex<Vec<u8>>>);

impl CharSource for Typed {
    fn read(&mut self, buf: &mut [u8]) -> usize {
        let mut typed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let n = buf.len().min(typed.len());
        buf.iter_mut().zip(typed.drain(..n)).for_each(|(to, from)| *to = from);
        n
    }
}

struct Zeroes;

paravane_devices::snapshot!(Zeroes {});

impl EntropySource for Zeroes {
    fn fill(&mut self, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0);
        Ok(())
    }
}

/// The machine.
pub struct Pc {
    /// Guest memory.
    pub memory: GuestMemory,
    /// Machine time.
    pub clock: Arc<ManualClock>,
    /// Timers.
    pub timers: Arc<TimerQueue>,
    /// Ports and physical addresses.
    pub bus: Arc<Bus>,
    /// Interrupt controllers.
    pub fabric: Arc<InterruptFabric>,
    /// All disks.
    pub disks: Vec<Arc<ScriptedDisk>>,
    counters: Counters,
    devices: Vec<DeviceHandle>,
    uart: Arc<Mutex<Uart>>,
    typed: Typed,
    keyboard: Arc<Mutex<I8042>>,
}

impl Pc {
    /// A machine as firmware leaves it: BARs assigned and decoded, local APICs enabled.
    pub fn new() -> Pc {
        let memory = GuestMemory::new(MemoryConfig::pc(RAM)).expect("guest memory");
        let (clock, timers, counters) =
            (Arc::new(ManualClock::default()), TimerQueue::new(), Counters::default());
        let config = FabricConfig { vcpus: VCPUS, apic_hz: 1_000_000_000, tsc: TscClock::new(2_000_000_000) };
        let fabric = InterruptFabric::new(
            config,
            clock.clone() as Arc<dyn Clock>,
            &timers,
            Arc::new(Nobody),
            &counters,
        );
        let typed = Typed::default();
        let wiring = UartWiring {
            label: "serial0".into(),
            irq: IrqLine::new(fabric.clone(), 4, Counter::detached()),
            sink: Box::new(|_: &[u8]| ()),
            source: Box::new(typed.clone()),
            sent: Counter::detached(),
            received: Counter::detached(),
        };
        let uart = with_timer(&timers, |timer| Uart::new(clock.clone(), timer, wiring));
        let control: Arc<dyn MachineControl> = Arc::new(Nobody);
        let a20 = A20Gate::new(control.clone());
        let keyboard = share(I8042::new(I8042Wiring {
            keyboard_irq: IrqLine::new(fabric.clone(), 1, Counter::detached()),
            aux_irq: IrqLine::new(fabric.clone(), 12, Counter::detached()),
            control: control.clone(),
            a20: a20.clone(),
            mouse: true,
        }));
        let bus = Bus::new(&counters);
        let mut pc = Pc {
            memory,
            clock,
            timers,
            bus,
            fabric,
            disks: Vec::new(),
            counters,
            devices: Vec::new(),
            uart: uart.clone(),
            typed,
            keyboard: keyboard.clone(),
        };
        pc.ports(keyboard, &I8042::RANGES, Width::W8);
        pc.ports(uart, &[(Port(0x3F8), uart::PORTS)], Width::W8);
        pc.ports(share(SystemPorts::new(control.clone(), a20)), &SystemPorts::RANGES, Width::W8);
        pc.ports(share(DebugConsole::new(Box::new(|_: &[u8]| ()))), &[DebugConsole::RANGE], Width::W8);
        let pins = Arc::new(CoprocessorPins::new(pc.line(13)));
        pc.ports(share(CoprocessorError::new(pins)), &[CoprocessorError::RANGE], Width::W8);
        pc.interrupts_and_timers();
        pc.power(control.clone());
        pc.pci(control);
        for vp in 0..VCPUS {
            pc.fabric.lapic_store(VpIndex(vp), 0xF0, 0x1FF);
        }
        pc
    }

    fn line(&self, n: u32) -> IrqLine {
        IrqLine::new(self.fabric.clone(), n, Counter::detached())
    }

    fn ports<D: Device + 'static>(&mut self, device: Arc<Mutex<D>>, ranges: &[(Port, u32)], widest: Width) {
        let on_bus = self.bus.attach(device.clone());
        for &(first, count) in ranges {
            self.bus.claim_ports(&on_bus, first, count, widest);
        }
        self.devices.push(device);
    }

    fn mmio<D: Device + 'static>(&mut self, device: Arc<Mutex<D>>, base: u64, len: u64, widest: Width) {
        let on_bus = self.bus.attach(device.clone());
        self.bus.claim_mmio(&on_bus, PhysAddr(base), len, widest);
        self.devices.push(device);
    }

    fn interrupts_and_timers(&mut self) {
        self.ports(share(PicPorts::new(self.fabric.clone())), &PicPorts::RANGES, Width::W8);
        let window = share(IoApicWindow::new(self.fabric.clone()));
        self.mmio(window, IoApicWindow::BASE, IoApicWindow::LEN, Width::W32);
        let legacy = LegacyRoute::new(self.line(0), self.line(8));
        let to_legacy = |input| IrqLine::new(legacy.clone() as Arc<dyn IrqSink>, input, Counter::detached());
        let clock = || self.clock.clone() as Arc<dyn Clock>;
        let pit = with_timer(&self.timers, |t| Pit::new(clock(), t, to_legacy(LegacyRoute::PIT)));
        let rtc = with_timer(&self.timers, |t| Rtc::new(clock(), t, to_legacy(LegacyRoute::RTC), START));
        let routes = (16..24).map(|n| (n as u8, self.line(n))).collect();
        let wiring = HpetWiring { routes, legacy: legacy.clone() };
        let hpet = with_timer(&self.timers, |t| Hpet::new(clock(), t, wiring));
        self.ports(pit, &Pit::RANGES, Width::W8);
        self.ports(rtc, &[Rtc::RANGE], Width::W8);
        self.mmio(hpet, hpet::spec::BASE, hpet::spec::LEN, Width::W64);
    }

    fn power(&mut self, control: Arc<dyn MachineControl>) {
        let wiring = AcpiPmWiring {
            sci: self.line(9),
            control,
            timer_32bit: true,
            unsupported_sleep: Counter::detached(),
        };
        let pm = with_timer(&self.timers, |t| AcpiPm::new(self.clock.clone(), t, wiring));
        let block = (Port(PowerFunction::PM_BASE), acpi_pm::BLOCK_LEN);
        self.ports(pm.clone(), &[block], Width::W32);
        let on_bus = self.bus.attach(pm);
        self.bus.claim_ports(&on_bus, AcpiPm::SMI_RANGE.0, AcpiPm::SMI_RANGE.1, Width::W8);
    }

    fn disk(&mut self) -> Arc<ScriptedDisk> {
        let disk = Arc::new(ScriptedDisk::new(&self.memory, &self.counters));
        self.disks.push(disk.clone());
        disk
    }

    fn pci(&mut self, control: Arc<dyn MachineControl>) {
        let sink: Arc<dyn IrqSink> = self.fabric.clone();
        let router = PirqRouter::new(&sink);
        let mut pci = PciBus::new(&self.bus, control);
        pci.insert(0, 0, share(HostBridge::new())).expect("free slot");
        pci.insert(1, 0, share(IsaBridge::new(router.clone()))).expect("free slot");
        pci.insert(1, 3, share(PowerFunction::new())).expect("free slot");
        let mut ide = IdeController::new(
            &self.memory,
            [self.line(14), self.line(15)],
            Default::default(),
            &self.counters,
        );
        for (channel, unit) in [(0, 0), (0, 1), (1, 0)] {
            ide.attach(channel, unit, self.disk()).expect("free unit");
        }
        ide.claim_ports(&self.bus);
        pci.insert(1, 1, share(ide)).expect("free slot");
        let entropy: Box<dyn VirtioDevice> = Box::new(VirtioRng::new(Box::new(Zeroes)));
        let disks: [Box<dyn VirtioDevice>; 2] =
            [Box::new(VirtioBlk::new(self.disk())), Box::new(VirtioBlk::new(self.disk()))];
        for (slot, device) in VIRTIO_SLOTS.into_iter().zip(std::iter::once(entropy).chain(disks)) {
            let wiring = VirtioWiring {
                label: &format!("virtio{slot}"),
                memory: &self.memory,
                intx: router.intx(slot, 0, Counter::detached()),
                msi: self.fabric.clone() as Arc<dyn MsiSink>,
                counters: &self.counters,
                doorbell: None,
                dma: DmaTap::nobody(),
            };
            let options = VirtioPciOptions { modern_only: slot == VIRTIO_SLOTS[2] };
            pci.insert(slot, 0, VirtioPci::new(device, wiring, options)).expect("free slot");
        }
        assign(&mut pci);
        let (first, count) = PciBus::PORTS;
        self.ports(share(pci), &[(first, count.into())], Width::W32);
    }

    /// Machine time moves by `ns`, within [`LATEST`]; timers that are due fire.
    pub fn advance(&self, ns: u64) {
        let now = self.clock.now().plus(ns).min(LATEST);
        self.clock.set(now);
        self.timers.run_expired(now);
    }

    /// Somebody types at the serial port.
    pub fn type_serial(&self, bytes: &[u8]) {
        self.typed.0.lock().unwrap_or_else(PoisonError::into_inner).extend(bytes);
        self.uart.lock().expect("UART").input_ready();
    }

    /// Somebody presses keys and moves the mouse.
    pub fn press(&self, codes: [u8; 3]) {
        let mut keyboard = self.keyboard.lock().expect("i8042");
        keyboard.press(&codes);
        keyboard.move_mouse(codes);
    }

    /// The machine's reset line, as the board pulses it.
    pub fn reset(&self) {
        self.disks.iter().for_each(|d| paravane_devices::block::BlockBackend::drain(d.as_ref()));
        for device in &self.devices {
            device.lock().expect("device").reset(ResetKind::Bus);
        }
        self.fabric.reset();
    }

    /// Everything that can be shown is shown.
    pub fn inspect(&self) {
        let mut field = |_: &str, value: &dyn std::fmt::Display| drop(value.to_string());
        for device in &self.devices {
            device.lock().expect("device").inspect(&mut field);
        }
        self.fabric.inspect(&mut field);
    }
}

impl Default for Pc {
    fn default() -> Pc {
        Pc::new()
    }
}

fn with_timer<D: Device + 'static>(timers: &Arc<TimerQueue>, make: impl FnOnce(Timer) -> D) -> Arc<Mutex<D>> {
    let timer = timers.timer();
    let key = timer.key();
    let device = share(make(timer));
    bind_timer(timers, key, &device);
    device
}

/// Gives BARs their addresses and lets functions decode and master, as firmware does.
fn assign(pci: &mut PciBus) {
    const COMMAND: u8 = 4;
    const ALL: u32 = 7;
    pci.config_store(1, 1, 0x20, Width::W32, BUS_MASTER.into());
    pci.config_store(1, 1, COMMAND, Width::W16, ALL);
    for slot in VIRTIO_SLOTS {
        pci.config_store(slot, 0, 0x10, Width::W32, virtio_ports(slot).into());
        pci.config_store(slot, 0, 0x14, Width::W32, virtio_msix(slot) as u32);
        pci.config_store(slot, 0, 0x20, Width::W32, virtio_bar(slot) as u32);
        pci.config_store(slot, 0, COMMAND, Width::W16, ALL);
    }
}

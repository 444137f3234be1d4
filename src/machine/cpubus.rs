//! What a processor sees of the machine: the bus, the interrupt controllers, time.

use paravane_cpu::{Attention, CpuBus, CpuidResult, MsrFault};
use paravane_devices::{
    Bus, Clock, CoprocessorPins, Counter, Counters, InterruptFabric, MachineControl, TscClock, VcpuKick,
};
use paravane_memory::{PAGE_SIZE, PhysAddr, Port, VpIndex, Width};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::access_log::{AccessLog, DeviceAccess};
use crate::run::{BOOT_VP, Lifecycle, Request, Vcpu};

/// IA32_APIC_BASE and its bits (SDM 3A 11.4.4).
const MSR_APIC_BASE: u32 = 0x1B;
/// IA32_TSC_ADJUST, of which the core tells us.
const MSR_TSC_ADJUST: u32 = 0x3B;
const APIC_BASE_X2APIC: u64 = 1 << 10;
const APIC_BASE_ENABLE: u64 = 1 << 11;
const APIC_BASE_ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;

/// What left guest code, and what came in.
struct Counts {
    pio: Counter,
    mmio: Counter,
    interrupts: Counter,
}

/// The machine behind the processors.
pub struct MachineBus {
    bus: Arc<Bus>,
    fabric: Arc<InterruptFabric>,
    clock: Arc<dyn Clock>,
    tsc: TscClock,
    /// IA32_APIC_BASE of each processor as last written: where its APIC answers.
    apic_bases: Vec<AtomicU64>,
    /// FERR# and IGNNE# of the bootstrap processor; those of the others lead nowhere.
    ferr: Arc<CoprocessorPins>,
    /// Of each processor.
    counts: Vec<Counts>,
    log: AccessLog,
}

impl Counts {
    fn new(vp: u32, counters: &Counters) -> Counts {
        let group = format!("cpu{vp}");
        let count = |name| counters.counter(&group, name);
        Counts { pio: count("exits_pio"), mmio: count("exits_mmio"), interrupts: count("interrupts_taken") }
    }
}

impl MachineBus {
    /// Joins the parts for `cpus` processors; `ferr` leads to the coprocessor error latch.
    pub(super) fn new(
        bus: Arc<Bus>,
        fabric: Arc<InterruptFabric>,
        clock: Arc<dyn Clock>,
        tsc: TscClock,
        ferr: Arc<CoprocessorPins>,
        cpus: u32,
        counters: &Counters,
    ) -> MachineBus {
        let this = MachineBus {
            bus,
            fabric,
            clock,
            tsc,
            apic_bases: (0..cpus).map(|_| AtomicU64::new(0)).collect(),
            ferr,
            counts: (0..cpus).map(|vp| Counts::new(vp, counters)).collect(),
            log: AccessLog::default(),
        };
        this.reset();
        this
    }

    /// Who answers at a port, or at a physical address that is no memory, for `vp`.
    pub fn owner(&self, vp: VpIndex, port: bool, at: u64) -> Option<String> {
        if port {
            return self.bus.port_owner(Port(at as u16));
        }
        match self.lapic_offset(vp, PhysAddr(at)) {
            Some(_) => Some(format!("lapic{}", vp.0)),
            None => self.bus.mmio_owner(PhysAddr(at)),
        }
    }

    /// The interrupt controllers have another state now.
    pub fn follow_state(&self) {
        self.reset();
    }

    /// The last accesses to devices, the latest last.
    pub fn last_accesses(&self) -> Vec<DeviceAccess> {
        self.log.list()
    }

    /// Follows the local APICs' reset.
    pub(super) fn reset(&self) {
        for vp in (0..self.apic_bases.len() as u32).map(VpIndex) {
            self.follow_apic_base(vp);
            self.fabric.set_tsc_offset(vp, 0);
        }
    }

    fn follow_apic_base(&self, vp: VpIndex) {
        let base = self.fabric.read_msr(vp, MSR_APIC_BASE).unwrap_or(0);
        self.apic_bases[vp.0 as usize].store(base, Ordering::Relaxed);
    }

    fn counts(&self, vp: VpIndex) -> &Counts {
        &self.counts[vp.0 as usize]
    }

    /// The offset into the local APIC's page, if `at` is there and the APIC answers.
    fn lapic_offset(&self, vp: VpIndex, at: PhysAddr) -> Option<u64> {
        let base = self.apic_bases[vp.0 as usize].load(Ordering::Relaxed);
        let answers = base & (APIC_BASE_ENABLE | APIC_BASE_X2APIC) == APIC_BASE_ENABLE;
        let offset = at.0.wrapping_sub(base & APIC_BASE_ADDRESS);
        (answers && offset < PAGE_SIZE).then_some(offset)
    }
}

impl CpuBus for MachineBus {
    fn mmio_load(&self, vp: VpIndex, at: PhysAddr, width: Width) -> u64 {
        self.counts(vp).mmio.add(1);
        let value = match self.lapic_offset(vp, at) {
            Some(offset) => u64::from(self.fabric.lapic_load(vp, offset)) & width.mask(),
            None => self.bus.mmio_load(at, width),
        };
        self.log.mmio(vp, at.0, width, false, value);
        value
    }

    fn mmio_store(&self, vp: VpIndex, at: PhysAddr, width: Width, value: u64) {
        self.counts(vp).mmio.add(1);
        self.log.mmio(vp, at.0, width, true, value);
        match self.lapic_offset(vp, at) {
            Some(offset) => self.fabric.lapic_store(vp, offset, value as u32),
            None => self.bus.mmio_store(at, width, value),
        }
    }

    fn port_in(&self, vp: VpIndex, port: Port, width: Width) -> u32 {
        self.counts(vp).pio.add(1);
        let value = self.bus.port_in(port, width);
        self.log.port(vp, port.0, width, false, value);
        value
    }

    fn port_out(&self, vp: VpIndex, port: Port, width: Width, value: u32) {
        self.counts(vp).pio.add(1);
        self.log.port(vp, port.0, width, true, value);
        self.bus.port_out(port, width, value);
    }

    fn port_in_string(&self, vp: VpIndex, port: Port, width: Width, buf: &mut [u8]) -> usize {
        let filled = self.bus.port_in_string(port, width, buf);
        self.counts(vp).pio.add(u64::from(filled > 0));
        filled
    }

    fn port_out_string(&self, vp: VpIndex, port: Port, width: Width, buf: &[u8]) -> usize {
        let taken = self.bus.port_out_string(port, width, buf);
        self.counts(vp).pio.add(u64::from(taken > 0));
        taken
    }

    fn acknowledge(&self, vp: VpIndex) -> Option<u8> {
        let vector = self.fabric.acknowledge(vp);
        if vector.is_some() {
            self.counts(vp).interrupts.add(1);
        }
        vector
    }

    /// No personality: the hypervisor range is empty.
    fn cpuid(&self, _vp: VpIndex, _leaf: u32, _sub: u32) -> Option<CpuidResult> {
        None
    }

    fn rdmsr(&self, vp: VpIndex, msr: u32) -> Result<u64, MsrFault> {
        if !InterruptFabric::owns_msr(msr) {
            return Err(MsrFault);
        }
        self.fabric.read_msr(vp, msr).map_err(|_| MsrFault)
    }

    fn wrmsr(&self, vp: VpIndex, msr: u32, value: u64) -> Result<(), MsrFault> {
        if msr == MSR_TSC_ADJUST {
            self.fabric.set_tsc_offset(vp, value);
            return Ok(());
        }
        if !InterruptFabric::owns_msr(msr) {
            return Err(MsrFault);
        }
        self.fabric.write_msr(vp, msr, value).map_err(|_| MsrFault)?;
        if msr == MSR_APIC_BASE {
            self.follow_apic_base(vp);
        }
        Ok(())
    }

    fn read_cr8(&self, vp: VpIndex) -> u64 {
        self.fabric.cr8(vp)
    }

    fn write_cr8(&self, vp: VpIndex, value: u64) {
        self.fabric.set_cr8(vp, value);
    }

    fn tsc(&self, _vp: VpIndex) -> u64 {
        self.tsc.at(self.clock.now())
    }

    fn set_ferr(&self, vp: VpIndex, up: bool) {
        if vp == BOOT_VP {
            self.ferr.set_ferr(up);
        }
    }

    fn ignne(&self, vp: VpIndex) -> bool {
        vp == BOOT_VP && self.ferr.ignne()
    }
}

/// Interrupt controllers reach a vCPU through its mailbox.
pub(super) struct Kick(pub(super) Vec<Arc<Vcpu>>);

impl Kick {
    fn vcpu(&self, vp: VpIndex) -> &Vcpu {
        &self.0[vp.0 as usize]
    }
}

impl VcpuKick for Kick {
    fn interrupt(&self, vp: VpIndex) {
        self.vcpu(vp).notify(Attention::INTERRUPT);
    }

    fn nmi(&self, vp: VpIndex) {
        self.vcpu(vp).notify(Attention::NMI);
    }

    fn init(&self, vp: VpIndex) {
        self.vcpu(vp).init();
    }

    fn startup(&self, vp: VpIndex, vector: u8) {
        self.vcpu(vp).start_up(vector);
    }
}

/// Devices ask for power-off, reset and A20.
pub(super) struct Control {
    pub(super) lifecycle: Lifecycle,
    pub(super) vcpus: Vec<Arc<Vcpu>>,
}

impl MachineControl for Control {
    fn power_off(&self) {
        self.lifecycle.request(Request::PowerOff);
    }

    fn reset(&self, reason: &'static str) {
        self.lifecycle.request(Request::Reset(reason));
    }

    fn debug_exit(&self, value: u32) {
        self.lifecycle.request(Request::DebugExit(value));
    }

    fn set_a20(&self, on: bool) {
        self.vcpus.iter().for_each(|vcpu| vcpu.set_a20(on));
    }
}

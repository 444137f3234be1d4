//! What a processor needs of the machine around it.

use paravane_memory::{PhysAddr, Port, VpIndex, Width};

/// Registers returned by CPUID.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[expect(missing_docs, reason = "register names")]
pub struct CpuidResult {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// The machine does not know the MSR, or refuses the value: `#GP(0)`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MsrFault;

/// The machine as seen by a processor. RAM never comes here; calls may come from any vCPU thread.
pub trait CpuBus: Sync {
    /// Loads from physical memory that is neither RAM nor ROM.
    fn mmio_load(&self, vp: VpIndex, at: PhysAddr, width: Width) -> u64;
    /// Stores to physical memory that is neither RAM nor ROM.
    fn mmio_store(&self, vp: VpIndex, at: PhysAddr, width: Width, value: u64);
    /// IN.
    fn port_in(&self, vp: VpIndex, port: Port, width: Width) -> u32;
    /// OUT.
    fn port_out(&self, vp: VpIndex, port: Port, width: Width, value: u32);
    /// REP INS: fills part of `buf` in one go, as if by IN after IN; the bytes filled, whole units of `width`. 0: the
    /// device has no such way, do it one by one.
    fn port_in_string(&self, _vp: VpIndex, _port: Port, _width: Width, _buf: &mut [u8]) -> usize {
        0
    }
    /// REP OUTS: takes part of `buf` in one go; the bytes taken. 0: one by one.
    fn port_out_string(&self, _vp: VpIndex, _port: Port, _width: Width, _buf: &[u8]) -> usize {
        0
    }
    /// INTA: takes the highest-priority interrupt the controllers offer this processor, if any.
    fn acknowledge(&self, vp: VpIndex) -> Option<u8>;
    /// CPUID leaves of the machine (hypervisor range 0x4000_0000…); `None`: the model's own leaf stands.
    fn cpuid(&self, vp: VpIndex, leaf: u32, sub: u32) -> Option<CpuidResult>;
    /// MSRs that are not the processor core's (APIC base, x2APIC, TSC deadline, hypervisor ranges).
    fn rdmsr(&self, vp: VpIndex, msr: u32) -> Result<u64, MsrFault>;
    /// Writes such an MSR.
    fn wrmsr(&self, vp: VpIndex, msr: u32, value: u64) -> Result<(), MsrFault>;
    /// CR8: the local APIC's task priority class.
    fn read_cr8(&self, vp: VpIndex) -> u64;
    /// Writes CR8 (0–15).
    fn write_cr8(&self, vp: VpIndex, value: u64);
    /// The time-stamp counter before the guest's own TSC_ADJUST offset.
    fn tsc(&self, vp: VpIndex) -> u64;
    /// Drives FERR#: up where an x87 instruction waits for an unmasked error with CR0.NE clear.
    fn set_ferr(&self, vp: VpIndex, up: bool);
    /// Whether IGNNE# is driven: the chipset does that only while FERR# is up, on a write to one of its ports.
    fn ignne(&self, vp: VpIndex) -> bool;
}

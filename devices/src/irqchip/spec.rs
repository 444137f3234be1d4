//! Register names of the 8259A (Intel 231468), the 82093AA I/O APIC (Intel 290566) and the local APIC
//! (SDM volume 3, chapter 11 "Advanced Programmable Interrupt Controller").

/// 8259A initialization and operation command words.
pub mod pic {
    /// ICW1: the bit that makes a write to A0=0 an ICW1.
    pub const ICW1_INIT: u8 = 1 << 4;
    /// ICW1 LTIM: all inputs level triggered.
    pub const ICW1_LTIM: u8 = 1 << 3;
    /// ICW1 SNGL: no cascade, no ICW3.
    pub const ICW1_SNGL: u8 = 1 << 1;
    /// ICW1 IC4: ICW4 follows.
    pub const ICW1_IC4: u8 = 1 << 0;
    /// ICW4 SFNM: special fully nested mode.
    pub const ICW4_SFNM: u8 = 1 << 4;
    /// ICW4 AEOI: automatic end of interrupt.
    pub const ICW4_AEOI: u8 = 1 << 1;
    /// OCW3: the bit that tells it from OCW2.
    pub const OCW3: u8 = 1 << 3;
    /// OCW3 ESMM: SMM is meant.
    pub const OCW3_ESMM: u8 = 1 << 6;
    /// OCW3 SMM: special mask mode.
    pub const OCW3_SMM: u8 = 1 << 5;
    /// OCW3 P: poll command.
    pub const OCW3_P: u8 = 1 << 2;
    /// OCW3 RR: RIS is meant.
    pub const OCW3_RR: u8 = 1 << 1;
    /// OCW3 RIS: read the in-service register.
    pub const OCW3_RIS: u8 = 1 << 0;
    /// What INTA reads where no chip drives the data bus.
    pub const FLOATING: u8 = 0xFF;
    /// Master input the slave is wired to.
    pub const CASCADE: u8 = 2;
    /// ELCR bits that exist, master: IRQ 0, 1 and 2 are always edge triggered.
    pub const ELCR_MASTER: u8 = 0xF8;
    /// ELCR bits that exist, slave: IRQ 8 and 13 are always edge triggered.
    pub const ELCR_SLAVE: u8 = 0xDE;
}

/// I/O APIC registers and redirection entry fields.
pub mod ioapic {
    /// Number of inputs.
    pub const PINS: usize = 24;
    /// Register select.
    pub const IOREGSEL: u64 = 0x00;
    /// Register window.
    pub const IOWIN: u64 = 0x10;
    /// EOI register (version 0x20).
    pub const EOI: u64 = 0x40;
    /// Identification.
    pub const ID: u8 = 0x00;
    /// Version and highest entry.
    pub const VER: u8 = 0x01;
    /// Arbitration identification.
    pub const ARB: u8 = 0x02;
    /// First redirection entry.
    pub const REDTBL: u8 = 0x10;
    /// Version reported.
    pub const VERSION: u32 = 0x20;
    /// Entry: destination mode is logical.
    pub const LOGICAL: u64 = 1 << 11;
    /// Entry: remote IRR, read-only.
    pub const REMOTE_IRR: u64 = 1 << 14;
    /// Entry: level triggered.
    pub const LEVEL: u64 = 1 << 15;
    /// Entry: masked.
    pub const MASKED: u64 = 1 << 16;
    /// Bits software can write.
    pub const WRITABLE: u64 = 0xFF00_0000_0001_AFFF;
}

/// Local APIC registers (offsets in the MMIO page; x2APIC MSR = 0x800 + offset / 16).
pub mod lapic {
    /// Identification.
    pub const ID: u32 = 0x020;
    /// Version.
    pub const VERSION: u32 = 0x030;
    /// Task priority.
    pub const TPR: u32 = 0x080;
    /// Arbitration priority.
    pub const APR: u32 = 0x090;
    /// Processor priority.
    pub const PPR: u32 = 0x0A0;
    /// End of interrupt.
    pub const EOI: u32 = 0x0B0;
    /// Remote read.
    pub const RRD: u32 = 0x0C0;
    /// Logical destination.
    pub const LDR: u32 = 0x0D0;
    /// Destination format.
    pub const DFR: u32 = 0x0E0;
    /// Spurious-interrupt vector.
    pub const SVR: u32 = 0x0F0;
    /// In-service, eight registers.
    pub const ISR: u32 = 0x100;
    /// Trigger mode, eight registers.
    pub const TMR: u32 = 0x180;
    /// Interrupt request, eight registers.
    pub const IRR: u32 = 0x200;
    /// Error status.
    pub const ESR: u32 = 0x280;
    /// LVT corrected machine check.
    pub const LVT_CMCI: u32 = 0x2F0;
    /// Interrupt command, low half.
    pub const ICR_LOW: u32 = 0x300;
    /// Interrupt command, high half.
    pub const ICR_HIGH: u32 = 0x310;
    /// LVT timer.
    pub const LVT_TIMER: u32 = 0x320;
    /// LVT thermal sensor.
    pub const LVT_THERMAL: u32 = 0x330;
    /// LVT performance counters.
    pub const LVT_PERF: u32 = 0x340;
    /// LVT LINT0.
    pub const LVT_LINT0: u32 = 0x350;
    /// LVT LINT1.
    pub const LVT_LINT1: u32 = 0x360;
    /// LVT error.
    pub const LVT_ERROR: u32 = 0x370;
    /// Timer initial count.
    pub const INITIAL_COUNT: u32 = 0x380;
    /// Timer current count.
    pub const CURRENT_COUNT: u32 = 0x390;
    /// Timer divide configuration.
    pub const DIVIDE: u32 = 0x3E0;
    /// x2APIC self IPI.
    pub const SELF_IPI: u32 = 0x3F0;

    /// Version 0x14 (integrated APIC), six LVT entries (highest index 5).
    pub const VERSION_VALUE: u32 = 0x0005_0014;
    /// SVR: software enable.
    pub const SVR_ENABLE: u32 = 1 << 8;
    /// SVR bits that exist.
    pub const SVR_WRITABLE: u32 = 0x3FF;
    /// LVT: masked.
    pub const LVT_MASKED: u32 = 1 << 16;
    /// LVT: level triggered (LINT only).
    pub const LVT_LEVEL: u32 = 1 << 15;
    /// LVT: remote IRR (LINT only).
    pub const LVT_REMOTE_IRR: u32 = 1 << 14;
    /// ESR: an illegal vector was to be sent.
    pub const ESR_SEND_ILLEGAL: u32 = 1 << 5;
    /// ESR: an illegal vector was received.
    pub const ESR_RECEIVE_ILLEGAL: u32 = 1 << 6;
    /// ESR: an illegal register was addressed.
    pub const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;
    /// LVT: delivery status, read-only.
    pub const LVT_DELIVERY_STATUS: u32 = 1 << 12;
    /// Divide configuration bits that exist.
    pub const DIVIDE_WRITABLE: u32 = 0xB;
    /// ICR bits that software can write in the low half.
    pub const ICR_WRITABLE: u32 = 0x000C_CFFF;
    /// ICR: delivery status, read-only.
    pub const ICR_DELIVERY_STATUS: u32 = 1 << 12;
    /// ICR: level assert.
    pub const ICR_ASSERT: u32 = 1 << 14;
    /// ICR: trigger mode level.
    pub const ICR_LEVEL: u32 = 1 << 15;

    /// IA32_APIC_BASE.
    pub const MSR_APIC_BASE: u32 = 0x1B;
    /// IA32_TSC_DEADLINE.
    pub const MSR_TSC_DEADLINE: u32 = 0x6E0;
    /// First x2APIC MSR.
    pub const MSR_X2APIC: u32 = 0x800;
    /// Last x2APIC MSR.
    pub const MSR_X2APIC_LAST: u32 = 0x83F;
    /// Where the page lies.
    pub const DEFAULT_BASE: u64 = 0xFEE0_0000;
    /// APIC_BASE: bootstrap processor.
    pub const BASE_BSP: u64 = 1 << 8;
    /// APIC_BASE EXTD: x2APIC mode.
    pub const BASE_EXTD: u64 = 1 << 10;
    /// APIC_BASE EN: globally enabled.
    pub const BASE_EN: u64 = 1 << 11;
}

/// Delivery modes of ICR, LVT, redirection entries and MSI data.
pub mod delivery {
    /// The vector, to every addressed processor.
    pub const FIXED: u32 = 0;
    /// The vector, to the one of lowest priority.
    pub const LOWEST_PRIORITY: u32 = 1;
    /// System management interrupt.
    pub const SMI: u32 = 2;
    /// Non-maskable interrupt.
    pub const NMI: u32 = 4;
    /// INIT.
    pub const INIT: u32 = 5;
    /// Start-up IPI.
    pub const STARTUP: u32 = 6;
    /// The vector comes from the 8259A.
    pub const EXTINT: u32 = 7;
}

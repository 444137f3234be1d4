//! ACPI power management: PM1 event and control, PM timer, GPE0, the SCI, and the SMI command port that
//! switches ACPI mode on (ACPI 6.x chapter 4.8; PIIX4 datasheet, Intel 290562).
//!
//! Sleep types other than S5 are not offered: entering one has no effect and is counted.

pub mod spec;

#[cfg(test)]
mod tests;

use crate::control::MachineControl;
use crate::counters::Counter;
use crate::device::{Device, Inspect, PioDevice, ResetKind, TimedDevice};
use crate::irq::IrqLine;
use crate::snapshot::Snapshot;
use crate::time::{Clock, Timer, VmTime};
use paravane_memory::{Port, Width};
use spec::*;
use std::fmt::Display;
use std::sync::Arc;

/// How the block is built into the machine.
pub struct AcpiPmWiring {
    /// System control interrupt (level).
    pub sci: IrqLine,
    /// Power-off.
    pub control: Arc<dyn MachineControl>,
    /// The timer counts 32 bits, not 24 (FADT TMR_VAL_EXT).
    pub timer_32bit: bool,
    /// Counts requests for sleep states that do not exist.
    pub unsupported_sleep: Counter,
}

/// The power management block. Claim [`BLOCK_LEN`] ports at a multiple of it with `Width::W32`, and
/// [`AcpiPm::SMI_RANGE`] with `Width::W8`.
pub struct AcpiPm {
    // wiring
    clock: Arc<dyn Clock>,
    timer: Timer,
    wiring: AcpiPmWiring,
    // bookkeeping
    /// How often the timer's top bit had changed at the last look.
    carries: u64,
    // guest-visible state
    pm1_sts: u16,
    pm1_en: u16,
    pm1_cnt: u16,
    gpe_sts: u16,
    gpe_en: u16,
    smi: [u8; 2],
}

impl AcpiPm {
    /// (first port, count) of the SMI command and status ports.
    pub const SMI_RANGE: (Port, u32) = (Port(SMI_CMD), 2);

    /// A block in legacy mode; bind `timer` to it with [`crate::bind_timer`].
    pub fn new(clock: Arc<dyn Clock>, timer: Timer, wiring: AcpiPmWiring) -> AcpiPm {
        AcpiPm {
            clock,
            timer,
            wiring,
            carries: 0,
            pm1_sts: 0,
            pm1_en: 0,
            pm1_cnt: 0,
            gpe_sts: 0,
            gpe_en: 0,
            smi: [0; 2],
        }
    }

    /// Starts the machine in ACPI mode, as firmware that enables it itself would leave it.
    pub fn enable_acpi_mode(&mut self) {
        self.pm1_cnt |= SCI_EN;
        self.finish();
    }

    /// Somebody pressed the power button.
    pub fn press_power_button(&mut self) {
        self.pm1_sts |= PWRBTN;
        self.finish();
    }

    /// A general purpose event (0–15).
    pub fn raise_gpe(&mut self, event: u8) {
        self.gpe_sts |= 1 << (event & 15);
        self.finish();
    }

    fn timer_bits(&self) -> u32 {
        if self.wiring.timer_32bit { 32 } else { 24 }
    }

    fn timer_value(&self, now: VmTime) -> u32 {
        (now.ticks(TIMER_HZ) & ((1 << self.timer_bits()) - 1)) as u32
    }

    /// The status bit is set whenever the timer's top bit changes.
    fn sync(&mut self, now: VmTime) {
        let carries = now.ticks(TIMER_HZ) >> (self.timer_bits() - 1);
        if carries != self.carries {
            self.pm1_sts |= TMR;
        }
        self.carries = carries;
    }

    fn finish(&mut self) {
        let request = self.pm1_sts & self.pm1_en != 0 || self.gpe_sts & self.gpe_en != 0;
        self.wiring.sci.set(request && self.pm1_cnt & SCI_EN != 0);
        let waits = self.pm1_en & TMR != 0 && self.pm1_sts & TMR == 0;
        let next = (self.carries + 1) << (self.timer_bits() - 1);
        self.timer.set(waits.then(|| VmTime::from_ticks(next, TIMER_HZ)));
    }

    fn read_byte(&self, offset: u16, now: VmTime) -> u8 {
        let byte = |value: u16| value.to_le_bytes()[usize::from(offset & 1)];
        match offset & !1 {
            PM1_STS => byte(self.pm1_sts),
            PM1_EN => byte(self.pm1_en),
            PM1_CNT => byte(self.pm1_cnt),
            PM_TMR | 0x0A => self.timer_value(now).to_le_bytes()[usize::from(offset & 3)],
            GPE0_STS => byte(self.gpe_sts),
            GPE0_EN => byte(self.gpe_en),
            _ => 0,
        }
    }

    /// Writes `value` to the bits of `mask` in a 16-bit register.
    fn write_register(&mut self, register: u16, value: u16, mask: u16) {
        let merge = |old: u16| old & !mask | value & mask;
        match register {
            PM1_STS => self.pm1_sts &= !(value & mask),
            PM1_EN => self.pm1_en = merge(self.pm1_en) & PM1_EN_WRITABLE,
            PM1_CNT => self.write_control(merge(self.pm1_cnt)),
            GPE0_STS => self.gpe_sts &= !(value & mask),
            GPE0_EN => self.gpe_en = merge(self.gpe_en),
            _ => {} // the timer is read-only
        }
    }

    fn write_control(&mut self, value: u16) {
        self.pm1_cnt = value & PM1_CNT_WRITABLE | self.pm1_cnt & SCI_EN;
        if value & SLP_EN == 0 {
            return;
        }
        match value >> SLP_TYP_SHIFT & 7 {
            S5_SLEEP_TYPE => self.wiring.control.power_off(),
            _ => self.wiring.unsupported_sleep.add(1),
        }
    }

    fn write_smi(&mut self, port: u16, value: u8) {
        self.smi[usize::from(port & 1)] = value;
        match (port, value) {
            (SMI_CMD, ACPI_ENABLE) => self.pm1_cnt |= SCI_EN,
            (SMI_CMD, ACPI_DISABLE) => self.pm1_cnt &= !SCI_EN,
            _ => {} // other commands are for a BIOS in system management mode; there is none
        }
    }

    fn is_smi_port(port: Port) -> bool {
        port.0 & !1 == SMI_CMD
    }
}

crate::snapshot!(AcpiPmWiring { sci | control, timer_32bit, unsupported_sleep });
crate::snapshot!(AcpiPm { timer, wiring, carries, pm1_sts, pm1_en, pm1_cnt, gpe_sts, gpe_en, smi | clock });

impl Inspect for AcpiPm {
    fn inspect(&self, field: &mut dyn FnMut(&str, &dyn Display)) {
        let registers = [
            ("pm1_sts", self.pm1_sts),
            ("pm1_en", self.pm1_en),
            ("pm1_cnt", self.pm1_cnt),
            ("gpe_sts", self.gpe_sts),
            ("gpe_en", self.gpe_en),
        ];
        for (name, value) in registers {
            field(name, &format_args!("{value:04x}"));
        }
        field("pm_tmr", &self.timer_value(self.clock.now()));
    }
}

impl Device for AcpiPm {
    fn label(&self) -> &str {
        "acpi-pm"
    }

    fn reset(&mut self, _kind: ResetKind) {
        self.sync(self.clock.now());
        (self.pm1_sts, self.pm1_en, self.pm1_cnt) = (0, 0, 0);
        (self.gpe_sts, self.gpe_en) = (0, 0);
        self.smi = [0; 2];
        self.finish();
    }

    fn as_snapshot(&mut self) -> Option<&mut dyn Snapshot> {
        Some(self)
    }

    fn as_pio(&mut self) -> Option<&mut dyn PioDevice> {
        Some(self)
    }

    fn as_timed(&mut self) -> Option<&mut dyn TimedDevice> {
        Some(self)
    }
}

impl PioDevice for AcpiPm {
    fn port_in(&mut self, port: Port, width: Width) -> u32 {
        if Self::is_smi_port(port) {
            return self.smi[usize::from(port.0 & 1)].into();
        }
        let now = self.clock.now();
        let offset = port.0 & (BLOCK_LEN as u16 - 1);
        if offset == PM_TMR && width == Width::W32 {
            return self.timer_value(now); // the hot path of a clock source
        }
        self.sync(now);
        self.finish();
        let bytes = width.bytes().min(4) as u16;
        (0..bytes).fold(0, |v, i| v | u32::from(self.read_byte((offset + i) & 0xF, now)) << (8 * i))
    }

    fn port_out(&mut self, port: Port, width: Width, value: u32) {
        self.sync(self.clock.now());
        if Self::is_smi_port(port) {
            self.write_smi(port.0, value as u8);
        } else {
            let offset = port.0 & (BLOCK_LEN as u16 - 1);
            let shift = u32::from(offset & 1) * 8;
            let (value, mask) = (value << shift, (width.mask() as u32) << shift);
            self.write_register(offset & !1, value as u16, mask as u16);
            if mask >> 16 != 0 {
                self.write_register((offset & !1) + 2, (value >> 16) as u16, (mask >> 16) as u16);
            }
        }
        self.finish();
    }
}

impl TimedDevice for AcpiPm {
    fn expired(&mut self, now: VmTime) {
        self.sync(now);
        self.finish();
    }
}

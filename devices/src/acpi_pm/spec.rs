//! ACPI fixed hardware (ACPI 6.x, 4.8.3) laid out as in the PIIX4 power management block (Intel 290562).

/// Bytes of the block; its base must be a multiple of this.
pub const BLOCK_LEN: u32 = 0x10;
/// PM1 status, in the block.
pub const PM1_STS: u16 = 0x00;
/// PM1 enable.
pub const PM1_EN: u16 = 0x02;
/// PM1 control.
pub const PM1_CNT: u16 = 0x04;
/// PM timer.
pub const PM_TMR: u16 = 0x08;
/// General purpose event status (16 bits).
pub const GPE0_STS: u16 = 0x0C;
/// General purpose event enable (16 bits).
pub const GPE0_EN: u16 = 0x0E;
/// SMI command port; the status port follows.
pub const SMI_CMD: u16 = 0xB2;

/// Value for [`SMI_CMD`] that enables ACPI mode (FADT ACPI_ENABLE).
pub const ACPI_ENABLE: u8 = 0xF1;
/// Value that disables it (FADT ACPI_DISABLE).
pub const ACPI_DISABLE: u8 = 0xF0;
/// SLP_TYP of soft-off, for the `\_S5` package.
pub const S5_SLEEP_TYPE: u16 = 5;

/// PM1: timer carry.
pub const TMR: u16 = 1 << 0;
/// PM1: global lock released.
pub const GBL: u16 = 1 << 5;
/// PM1: power button.
pub const PWRBTN: u16 = 1 << 8;
/// PM1: sleep button.
pub const SLPBTN: u16 = 1 << 9;
/// PM1: RTC alarm.
pub const RTC: u16 = 1 << 10;
/// PM1_STS: wake.
pub const WAK: u16 = 1 << 15;
/// PM1_EN bits that exist.
pub const PM1_EN_WRITABLE: u16 = TMR | GBL | PWRBTN | SLPBTN | RTC;
/// PM1_CNT: SCI, not SMI; set by the SMI command.
pub const SCI_EN: u16 = 1 << 0;
/// PM1_CNT: SLP_TYP field.
pub const SLP_TYP_SHIFT: u16 = 10;
/// PM1_CNT: enter the sleep state; reads as 0.
pub const SLP_EN: u16 = 1 << 13;
/// PM1_CNT bits that software keeps (BM_RLD and SLP_TYP).
pub const PM1_CNT_WRITABLE: u16 = 1 << 1 | 7 << SLP_TYP_SHIFT;

/// PM timer clock.
pub const TIMER_HZ: u64 = 3_579_545;

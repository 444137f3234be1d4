//! Registers of the PC16550D (National Semiconductor TL/C/8652).

/// Ports of one UART; its base must be a multiple of this.
pub const PORTS: u32 = 8;
/// Clock of the baud rate generator.
pub const CLOCK_HZ: u64 = 1_843_200;
/// Depth of each FIFO.
pub const FIFO: usize = 16;

/// Receiver buffer, transmitter holding, divisor low (DLAB).
pub const RBR: u16 = 0;
/// Interrupt enable, divisor high (DLAB).
pub const IER: u16 = 1;
/// Interrupt identification (read), FIFO control (write).
pub const IIR: u16 = 2;
/// Line control.
pub const LCR: u16 = 3;
/// Modem control.
pub const MCR: u16 = 4;
/// Line status.
pub const LSR: u16 = 5;
/// Modem status.
pub const MSR: u16 = 6;
/// Scratch.
pub const SCR: u16 = 7;

/// IER: received data available.
pub const IER_RDA: u8 = 1 << 0;
/// IER: transmitter holding register empty.
pub const IER_THRE: u8 = 1 << 1;
/// IER: receiver line status.
pub const IER_RLS: u8 = 1 << 2;
/// IER: modem status.
pub const IER_MS: u8 = 1 << 3;

/// IIR: nothing pending.
pub const IIR_NONE: u8 = 0x01;
/// IIR: receiver line status.
pub const IIR_RLS: u8 = 0x06;
/// IIR: received data available.
pub const IIR_RDA: u8 = 0x04;
/// IIR: character timeout.
pub const IIR_TIMEOUT: u8 = 0x0C;
/// IIR: transmitter holding register empty.
pub const IIR_THRE: u8 = 0x02;
/// IIR: modem status.
pub const IIR_MS: u8 = 0x00;
/// IIR: FIFOs are enabled.
pub const IIR_FIFO: u8 = 0xC0;

/// FCR: enable FIFOs.
pub const FCR_ENABLE: u8 = 1 << 0;
/// FCR: clear the receiver FIFO.
pub const FCR_CLEAR_RX: u8 = 1 << 1;
/// FCR: clear the transmitter FIFO.
pub const FCR_CLEAR_TX: u8 = 1 << 2;
/// Trigger levels by FCR bits 7:6.
pub const TRIGGERS: [usize; 4] = [1, 4, 8, 14];

/// LCR: send a break.
pub const LCR_BREAK: u8 = 1 << 6;
/// LCR: divisor latch access.
pub const LCR_DLAB: u8 = 1 << 7;

/// MCR: OUT2, which connects the interrupt on a PC.
pub const MCR_OUT2: u8 = 1 << 3;
/// MCR: loopback.
pub const MCR_LOOP: u8 = 1 << 4;

/// LSR: data ready.
pub const LSR_DR: u8 = 1 << 0;
/// LSR: overrun.
pub const LSR_OE: u8 = 1 << 1;
/// LSR: framing error.
pub const LSR_FE: u8 = 1 << 3;
/// LSR: break.
pub const LSR_BI: u8 = 1 << 4;
/// LSR: transmitter holding register empty.
pub const LSR_THRE: u8 = 1 << 5;
/// LSR: transmitter empty.
pub const LSR_TEMT: u8 = 1 << 6;
/// LSR: an error somewhere in the receiver FIFO.
pub const LSR_FIFO_ERROR: u8 = 1 << 7;

/// MSR: CTS, DSR and DCD as a connected terminal drives them.
pub const MSR_CONNECTED: u8 = 0xB0;
/// MSR: RI.
pub const MSR_RI: u8 = 1 << 6;
/// MSR: trailing edge of RI.
pub const MSR_TERI: u8 = 1 << 2;

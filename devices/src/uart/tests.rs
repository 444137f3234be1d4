//! The PC16550D datasheet, and what Linux's 8250 driver tries out.

use super::*;
use crate::time::{ManualClock, TimerQueue};
use std::sync::Mutex;

#[derive(Default)]
struct Wire {
    sent: Vec<u8>,
    room: usize,
    input: VecDeque<u8>,
}

struct End(Arc<Mutex<Wire>>);
impl CharSink for End {
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut w = self.0.lock().unwrap();
        let n = bytes.len().min(w.room);
        w.room -= n;
        w.sent.extend(&bytes[..n]);
        n
    }
}
impl CharSource for End {
    fn read(&mut self, buf: &mut [u8]) -> usize {
        let mut w = self.0.lock().unwrap();
        let n = buf.len().min(w.input.len());
        buf.iter_mut().zip(w.input.drain(..n)).for_each(|(slot, b)| *slot = b);
        n
    }
}

struct Rig {
    clock: Arc<ManualClock>,
    queue: Arc<TimerQueue>,
    wire: Arc<Mutex<Wire>>,
    uart: Arc<Mutex<Uart>>,
}

impl Rig {
    fn new() -> Rig {
        let clock = Arc::new(ManualClock::default());
        let queue = TimerQueue::new();
        let wire = Arc::new(Mutex::new(Wire { room: usize::MAX, ..Wire::default() }));
        let timer = queue.timer();
        let key = timer.key();
        let wiring = UartWiring {
            label: "serial0".into(),
            irq: IrqLine::unconnected(),
            sink: Box::new(End(wire.clone())),
            source: Box::new(End(wire.clone())),
            sent: Counter::detached(),
            received: Counter::detached(),
        };
        let uart = crate::share(Uart::new(clock.clone(), timer, wiring));
        crate::bind_timer(&queue, key, &uart);
        Rig { clock, queue, wire, uart }
    }
    fn read(&self, register: u16) -> u8 {
        self.uart.lock().unwrap().port_in(Port(0x3F8 + register), Width::W8) as u8
    }
    fn write(&self, register: u16, value: u8) {
        self.uart.lock().unwrap().port_out(Port(0x3F8 + register), Width::W8, value.into());
    }
    fn type_in(&self, bytes: &[u8]) {
        self.wire.lock().unwrap().input.extend(bytes);
        self.uart.lock().unwrap().input_ready();
    }
    fn advance(&self, ns: u64) {
        self.clock.advance(ns);
        self.queue.run_expired(self.clock.now());
    }
    fn irq(&self) -> bool {
        self.uart.lock().unwrap().wiring.irq.is_high()
    }
    /// 115200 8N1, FIFO with trigger 8, interrupts connected.
    fn open(&self, ier: u8) {
        self.write(LCR, 0x83);
        self.write(0, 1);
        self.write(1, 0);
        self.write(LCR, 0x03);
        self.write(IIR, 0x87);
        self.advance(1_000_000);
        self.write(MCR, 0x0B);
        self.write(IER, ier);
    }
}

#[test]
fn linux_autoconfig_finds_a_16550a() {
    let r = Rig::new();
    r.write(IER, 0);
    assert_eq!(r.read(IER), 0);
    r.write(IER, 0x0F);
    assert_eq!(r.read(IER), 0x0F);
    r.write(IER, 0);
    r.write(MCR, 0x1A);
    assert_eq!(r.read(MSR) & 0xF0, 0x90, "loopback: RTS is CTS, OUT2 is DCD");
    r.write(MCR, 0);
    r.write(LCR, 0xBF);
    r.write(IIR, 0);
    r.write(LCR, 0);
    r.write(IIR, 1);
    assert_eq!(r.read(IIR) >> 6, 3, "FIFO works: 16550A");
    r.write(IER, 0x40);
    assert_eq!(r.read(IER), 0, "no sleep or UUE bits");
    r.write(SCR, 0xA5);
    assert_eq!(r.read(SCR), 0xA5);
}

#[test]
fn thre_interrupt_comes_when_enabled_and_goes_when_read() {
    let r = Rig::new();
    r.open(0);
    r.write(IER, IER_THRE);
    assert!(r.irq());
    assert_eq!(r.read(IIR), 0xC0 | IIR_THRE);
    assert!(!r.irq());
    assert_eq!(r.read(IIR), 0xC0 | IIR_NONE);
    r.write(IER, 0);
    r.write(IER, IER_THRE);
    assert_eq!(r.read(IIR), 0xC0 | IIR_THRE, "Linux's THRE test");
    r.write(RBR, b'x');
    assert!(r.irq());
    assert_eq!(r.wire.lock().unwrap().sent, b"x");
}

#[test]
fn a_full_back_end_keeps_thre_low_and_loses_nothing() {
    let r = Rig::new();
    r.open(IER_THRE);
    r.wire.lock().unwrap().room = 1;
    r.read(IIR);
    for b in b"abcd" {
        r.write(RBR, *b);
    }
    assert_eq!(r.read(LSR) & LSR_THRE, 0);
    assert!(!r.irq());
    r.wire.lock().unwrap().room = 100;
    r.advance(RETRY_NS);
    assert_eq!(r.read(LSR) & (LSR_THRE | LSR_TEMT), LSR_THRE | LSR_TEMT);
    assert_eq!(r.wire.lock().unwrap().sent, b"abcd");
    assert!(r.irq());
}

#[test]
fn trigger_level_then_timeout() {
    let r = Rig::new();
    r.open(IER_RDA);
    r.type_in(b"1234567");
    assert!(!r.irq());
    let four = 4 * 10 * 16 * 1_000_000_000u64 / CLOCK_HZ;
    r.advance(four - 1);
    assert!(!r.irq());
    r.advance(2);
    assert_eq!(r.read(IIR), 0xC0 | IIR_TIMEOUT);
    assert_eq!(r.read(RBR), b'1');
    assert!(!r.irq(), "reading restarts the timeout");
    r.type_in(b"89");
    assert_eq!(r.read(IIR), 0xC0 | IIR_RDA);
    for expected in b"23456789" {
        assert_eq!(r.read(LSR) & LSR_DR, 1);
        assert_eq!(r.read(RBR), *expected);
    }
    assert_eq!(r.read(LSR) & LSR_DR, 0);
    assert!(!r.irq());
}

#[test]
fn input_waits_until_the_guest_listens_and_survives_a_fifo_clear() {
    let r = Rig::new();
    let text: Vec<u8> = (0..100).collect();
    r.type_in(&text);
    assert_eq!(r.read(RBR), 0, "probing reads find nothing");
    assert_eq!(r.read(LSR), LSR_THRE | LSR_TEMT);
    r.open(IER_RDA);
    assert!(r.irq());
    r.write(IIR, 0x87);
    assert_eq!(r.read(LSR) & LSR_DR, 0, "cleared");
    r.advance(1_000_000);
    let mut got = Vec::new();
    while r.read(LSR) & LSR_DR != 0 {
        got.push(r.read(RBR));
    }
    assert_eq!(got, text);
}

#[test]
fn a_polling_guest_gets_input_too() {
    let r = Rig::new();
    r.type_in(b"k");
    let polls = (1..100).find(|_| r.read(LSR) & LSR_DR != 0);
    assert_eq!(polls, Some(usize::from(POLLS_TO_LISTEN)));
    assert_eq!(r.read(RBR), b'k');
    assert_eq!(r.uart.lock().unwrap().receive(b"ab"), 1, "one register without FIFOs");
}

#[test]
fn loopback_data_overrun_break_and_modem_deltas() {
    let r = Rig::new();
    r.open(0);
    r.write(MCR, 0x18);
    r.read(MSR);
    r.write(IER, IER_RLS | IER_MS);
    for i in 0..=FIFO {
        r.write(RBR, i as u8);
    }
    assert!(r.wire.lock().unwrap().sent.is_empty());
    assert_eq!(r.read(IIR), 0xC0 | IIR_RLS);
    assert_eq!(r.read(LSR) & (LSR_OE | LSR_DR), LSR_OE | LSR_DR);
    assert_eq!(r.read(IIR), 0xC0 | IIR_NONE);
    assert_eq!((0..FIFO).map(|_| r.read(RBR)).collect::<Vec<_>>(), (0..FIFO as u8).collect::<Vec<_>>());
    r.write(LCR, 0x43);
    assert_eq!(r.read(LSR) & 0x9F, LSR_FIFO_ERROR | LSR_BI | LSR_FE | LSR_DR);
    r.write(MCR, 0x1A);
    assert_eq!(r.read(IIR), 0xC0 | IIR_MS);
    assert_eq!(r.read(MSR), 0x91, "DCTS");
    assert_eq!(r.read(MSR), 0x90);
    r.write(MCR, 0x1E);
    assert_eq!(r.read(MSR), 0xD0, "RI rising is no delta");
    r.write(MCR, 0x1A);
    assert_eq!(r.read(MSR), 0x94, "its trailing edge is");
}

#[test]
fn interrupts_need_out2_and_divisor_is_behind_dlab() {
    let r = Rig::new();
    r.write(IER, IER_THRE);
    assert!(!r.irq());
    r.write(MCR, MCR_OUT2);
    assert!(r.irq());
    r.write(LCR, 0x80);
    r.write(0, 0x34);
    r.write(1, 0x12);
    assert_eq!([r.read(0), r.read(1)], [0x34, 0x12]);
    r.write(LCR, 0);
    assert_eq!(r.read(IER), IER_THRE);
}

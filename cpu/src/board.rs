//! The machine that tests put around a processor (feature `testbed`): nothing but a port log, a queue of interrupts,
//! two wires and the coprocessor error latch.

use crate::bus::{CpuBus, CpuidResult, MsrFault};
use crate::engine::Attention;
use paravane_memory::{PhysAddr, Port, VpIndex, Width};
use std::collections::VecDeque;
use std::sync::Mutex;

/// Port writes that are remembered.
const LOG: usize = 1 << 16;

/// What a wire raises: the processor's attention word, which of its flags, and the vector of an interrupt.
type Wire = Mutex<Option<(Attention, u32, u8)>>;

/// A machine without devices. Ports answer with their own numbers, memory that is none with ones, every MSR of the machine
/// with `#GP`; time stands at 1000.
#[derive(Default)]
pub struct Board {
    /// Port numbers and values, in order; the first 65,536.
    pub written: Mutex<Vec<(u16, u32)>>,
    /// Vectors that wait to be acknowledged.
    pub pending: Mutex<VecDeque<u8>>,
    /// How often FERR# went up.
    pub fpu_errors: Mutex<u32>,
    /// FERR# and IGNNE#.
    coprocessor: Mutex<(bool, bool)>,
    cr8: Mutex<u64>,
    at_port: Wire,
    at_fpu_error: Wire,
}

fn pull(board: &Board, wire: &Wire) {
    let Some((attention, what, vector)) = wire.lock().expect("wire").take() else { return };
    if what == Attention::INTERRUPT {
        board.pending.lock().expect("queue").push_back(vector);
    }
    attention.set(what);
}

impl Board {
    /// Interrupt `vector` arrives now.
    pub fn interrupt(&self, attention: &Attention, vector: u8) {
        self.pending.lock().expect("queue").push_back(vector);
        attention.set(Attention::INTERRUPT);
    }

    /// `what` (an NMI, or interrupt `vector`) arrives at the next write to port 80H.
    pub fn raise_at_port(&self, attention: &Attention, what: u32, vector: u8) {
        *self.at_port.lock().expect("wire") = Some((attention.clone(), what, vector));
    }

    /// Interrupt `vector` arrives at the next x87 error.
    pub fn raise_at_fpu_error(&self, attention: &Attention, vector: u8) {
        *self.at_fpu_error.lock().expect("wire") = Some((attention.clone(), Attention::INTERRUPT, vector));
    }

    /// Values written to `port`.
    pub fn written_to(&self, port: u16) -> Vec<u32> {
        let log = self.written.lock().expect("log");
        log.iter().filter(|(p, _)| *p == port).map(|&(_, v)| v).collect()
    }
}

impl CpuBus for Board {
    fn mmio_load(&self, _: VpIndex, _: PhysAddr, width: Width) -> u64 {
        width.mask()
    }
    fn mmio_store(&self, _: VpIndex, _: PhysAddr, _: Width, _: u64) {}
    fn port_in(&self, _: VpIndex, port: Port, width: Width) -> u32 {
        u32::from(port.0) & width.mask() as u32
    }
    fn port_out(&self, _: VpIndex, port: Port, _: Width, value: u32) {
        let mut log = self.written.lock().expect("log");
        if log.len() < LOG {
            log.push((port.0, value));
        }
        match port.0 {
            0x80 => pull(self, &self.at_port),
            0xF0 => {
                let mut pins = self.coprocessor.lock().expect("pins");
                pins.1 = pins.0;
            }
            _ => {}
        }
    }
    fn acknowledge(&self, _: VpIndex) -> Option<u8> {
        self.pending.lock().expect("queue").pop_front()
    }
    fn cpuid(&self, _: VpIndex, _: u32, _: u32) -> Option<CpuidResult> {
        None
    }
    fn rdmsr(&self, _: VpIndex, _: u32) -> Result<u64, MsrFault> {
        Err(MsrFault)
    }
    fn wrmsr(&self, _: VpIndex, _: u32, _: u64) -> Result<(), MsrFault> {
        Err(MsrFault)
    }
    fn read_cr8(&self, _: VpIndex) -> u64 {
        *self.cr8.lock().expect("CR8")
    }
    fn write_cr8(&self, _: VpIndex, value: u64) {
        *self.cr8.lock().expect("CR8") = value;
    }
    fn tsc(&self, _: VpIndex) -> u64 {
        1000
    }
    fn set_ferr(&self, _: VpIndex, up: bool) {
        let mut pins = self.coprocessor.lock().expect("pins");
        if up && !pins.0 {
            *self.fpu_errors.lock().expect("count") += 1;
            pull(self, &self.at_fpu_error);
        }
        *pins = (up, up && pins.1);
    }
    fn ignne(&self, _: VpIndex) -> bool {
        self.coprocessor.lock().expect("pins").1
    }
}

//! The local APIC (SDM volume 3A, chapter 11), xAPIC and x2APIC.
//!
//! A pure state machine: what it wants of the rest of the machine (IPIs, EOI broadcasts, NMI, INIT) it leaves
//! in its outbox; the fabric carries it out.

use super::ioapic::Message;
use super::spec::delivery;
use super::spec::lapic::*;
use super::timer::{ApicTimer, TimerMode, TscClock};
use crate::snapshot::{Snapshot, StateError, StateStream};
use crate::time::VmTime;

/// Who gets an IPI.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shorthand {
    /// The destination field decides.
    Destination,
    /// The sender.
    Myself,
    /// Everybody.
    All,
    /// Everybody but the sender.
    Others,
}

/// What a local APIC asks the fabric to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outgoing {
    /// Send an inter-processor interrupt.
    Ipi(Shorthand, Message),
    /// Tell the I/O APIC that a level interrupt is finished.
    EoiBroadcast(u8),
    /// NMI for this processor (LINT pin or LVT entry).
    Nmi,
    /// INIT for this processor (LINT pin).
    Init,
}

/// A register access the processor must answer with `#GP(0)` in x2APIC mode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refused;

/// The LVT entries by register offset.
const LVTS: [u32; 7] = [LVT_TIMER, LVT_THERMAL, LVT_PERF, LVT_LINT0, LVT_LINT1, LVT_ERROR, LVT_CMCI];

/// Bits that software can write in the LVT entry at `offset` (SDM figure 11-8).
const fn lvt_writable(offset: u32) -> u32 {
    match offset {
        LVT_TIMER => 0x0007_00FF,
        LVT_LINT0 | LVT_LINT1 => 0x0001_A7FF,
        LVT_ERROR => 0x0001_00FF,
        _ => 0x0001_07FF,
    }
}

/// Bits that may be set in a write to the x2APIC register at `offset`: those that can be written, and those that hardware
/// writes and software may write back (delivery status, remote IRR).
const fn x2apic_bits(offset: u32) -> u64 {
    let bits = match offset {
        EOI | ESR => 0,
        TPR | SELF_IPI => 0xFF,
        SVR => SVR_WRITABLE,
        DIVIDE => DIVIDE_WRITABLE,
        LVT_LINT0 | LVT_LINT1 => lvt_writable(offset) | LVT_DELIVERY_STATUS | LVT_REMOTE_IRR,
        LVT_TIMER | LVT_THERMAL | LVT_PERF | LVT_ERROR => lvt_writable(offset) | LVT_DELIVERY_STATUS,
        ICR_LOW => return 0xFFFF_FFFF << 32 | (ICR_WRITABLE | ICR_DELIVERY_STATUS) as u64,
        _ => u32::MAX,
    };
    bits as u64
}

/// Eight 32-bit registers: one bit per vector.
#[derive(Clone, Copy, Default, Debug)]
struct Bitmap([u32; 8]);

impl Bitmap {
    fn set(&mut self, vector: u8, on: bool) {
        let (word, bit) = (usize::from(vector >> 5), 1 << (vector & 31));
        self.0[word] = if on { self.0[word] | bit } else { self.0[word] & !bit };
    }

    fn get(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 5)] & 1 << (vector & 31) != 0
    }

    fn highest(&self) -> Option<u8> {
        let word = (0..8).rev().find(|&i| self.0[i] != 0)?;
        Some((word as u32 * 32 + 31 - self.0[word].leading_zeros()) as u8)
    }
}

/// One local APIC.
#[derive(Debug)]
pub struct LocalApic {
    // configuration
    id: u32,
    bootstrap: bool,
    // bookkeeping
    pub(super) outbox: Vec<Outgoing>,
    lint_high: [bool; 2],
    /// An ExtINT message arrived; INTA goes to the 8259A.
    extint_latched: bool,
    pub(super) timer: ApicTimer,
    // guest-visible state
    base: u64,
    xapic_id: u8,
    tpr: u8,
    ldr: u32,
    dfr: u32,
    svr: u32,
    isr: Bitmap,
    tmr: Bitmap,
    irr: Bitmap,
    esr: u32,
    esr_pending: u32,
    icr: u64,
    lvt: [u32; 7],
}

impl Snapshot for Bitmap {
    fn state(&mut self, s: &mut StateStream<'_>) -> Result<(), StateError> {
        self.0.state(s)
    }
}

crate::snapshot!(LocalApic {
    lint_high,
    extint_latched,
    timer,
    base,
    xapic_id,
    tpr,
    ldr,
    dfr,
    svr,
    isr,
    tmr,
    irr,
    esr,
    esr_pending,
    icr,
    lvt
    | id, bootstrap, outbox
});

impl LocalApic {
    pub(super) fn new(id: u32, hz: u64, tsc: TscClock) -> LocalApic {
        let bootstrap = id == 0;
        LocalApic {
            id,
            bootstrap,
            outbox: Vec::new(),
            lint_high: [false; 2],
            extint_latched: false,
            timer: ApicTimer::new(hz, tsc),
            base: DEFAULT_BASE | BASE_EN | if bootstrap { BASE_BSP } else { 0 },
            xapic_id: id as u8,
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xFF,
            isr: Bitmap::default(),
            tmr: Bitmap::default(),
            irr: Bitmap::default(),
            esr: 0,
            esr_pending: 0,
            icr: 0,
            lvt: [LVT_MASKED; 7],
        }
    }

    /// Power-up or RESET.
    pub(super) fn reset(&mut self) {
        self.base = DEFAULT_BASE | BASE_EN | if self.bootstrap { BASE_BSP } else { 0 };
        self.xapic_id = self.id as u8;
        self.init();
    }

    /// INIT: like reset, but the APIC ID, the mode and the base survive.
    pub(super) fn init(&mut self) {
        self.timer.reset();
        self.extint_latched = false;
        (self.tpr, self.ldr, self.dfr, self.svr) = (0, 0, u32::MAX, 0xFF);
        (self.isr, self.tmr, self.irr) = Default::default();
        (self.esr, self.esr_pending, self.icr) = (0, 0, 0);
        self.lvt = [LVT_MASKED; 7];
    }

    /// What a BIOS leaves behind: APIC enabled, 8259A through LINT0 (bootstrap processor), NMI on LINT1.
    pub(super) fn enter_virtual_wire_mode(&mut self) {
        self.svr = SVR_ENABLE | 0xFF;
        if self.bootstrap {
            self.lvt[3] = delivery::EXTINT << 8;
        }
        self.lvt[4] = delivery::NMI << 8;
    }

    fn is_enabled(&self) -> bool {
        self.base & BASE_EN != 0
    }

    fn is_x2apic(&self) -> bool {
        self.base & BASE_EXTD != 0
    }

    /// Whether fixed interrupts are accepted.
    pub(super) fn is_software_enabled(&self) -> bool {
        self.is_enabled() && self.svr & SVR_ENABLE != 0
    }

    // --- priorities, acknowledge, EOI ---

    fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0) & 0xF0;
        if self.tpr & 0xF0 >= in_service { self.tpr } else { in_service }
    }

    /// The vector this APIC would deliver now. What was accepted before the APIC was disabled by software is still
    /// delivered (SDM 11.4.7.2: "held and require masking or handling by the CPU").
    pub(super) fn pending(&self) -> Option<u8> {
        if !self.is_enabled() {
            return None;
        }
        self.irr.highest().filter(|v| v & 0xF0 > self.ppr() & 0xF0)
    }

    pub(super) fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.pending()?;
        self.irr.set(vector, false);
        self.isr.set(vector, true);
        Some(vector)
    }

    fn end_of_interrupt(&mut self) {
        let Some(vector) = self.isr.highest() else { return };
        self.isr.set(vector, false);
        if self.tmr.get(vector) {
            self.outbox.push(Outgoing::EoiBroadcast(vector));
        }
        if self.lvt[3] as u8 == vector && self.lvt[3] & LVT_REMOTE_IRR != 0 {
            self.lvt[3] &= !LVT_REMOTE_IRR;
            self.raise_lint(0);
        }
    }

    /// A vector arrives from a message or from the LVT.
    pub(super) fn accept(&mut self, vector: u8, level: bool) {
        if vector < 16 {
            self.error(ESR_RECEIVE_ILLEGAL);
        } else if self.is_software_enabled() {
            self.irr.set(vector, true);
            self.tmr.set(vector, level);
        }
    }

    /// An ExtINT message arrives.
    pub(super) fn accept_extint(&mut self) {
        self.extint_latched = self.is_software_enabled();
    }

    /// Whether the 8259A's INT reaches the processor: no APIC in between, LINT0 as ExtINT, or a message.
    pub(super) fn passes_extint(&self) -> bool {
        if !self.is_enabled() {
            return self.bootstrap;
        }
        self.extint_latched || self.lvt[3] & (LVT_MASKED | 0x700) == delivery::EXTINT << 8
    }

    pub(super) fn extint_taken(&mut self) {
        self.extint_latched = false;
    }

    /// Priority used to arbitrate lowest-priority messages.
    pub(super) fn arbitration_priority(&self) -> u8 {
        self.ppr().max(self.irr.highest().unwrap_or(0) & 0xF0)
    }

    pub(super) fn cr8(&self) -> u64 {
        u64::from(self.tpr >> 4)
    }

    pub(super) fn set_cr8(&mut self, value: u64) {
        self.tpr = (value as u8 & 0xF) << 4;
    }

    // --- destinations ---

    /// Whether a message is addressed to this APIC.
    pub(super) fn is_addressed(&self, message: &Message) -> bool {
        if !self.is_enabled() {
            return false;
        }
        match (message.logical, self.is_x2apic()) {
            (false, true) => message.destination == u32::MAX || message.destination == self.id,
            (false, false) => {
                message.destination == u32::MAX || message.destination == u32::from(self.xapic_id)
            }
            (true, true) => {
                let ldr = self.x2apic_ldr();
                message.destination == u32::MAX
                    || message.destination >> 16 == ldr >> 16 && message.destination & ldr & 0xFFFF != 0
            }
            (true, false) => self.is_addressed_xapic_logical(message.destination as u8),
        }
    }

    fn is_addressed_xapic_logical(&self, mda: u8) -> bool {
        let ldr = (self.ldr >> 24) as u8;
        match self.dfr >> 28 {
            0xF => mda & ldr != 0,
            _ => (mda >> 4 == ldr >> 4 || mda >> 4 == 0xF) && mda & ldr & 0xF != 0,
        }
    }

    fn x2apic_ldr(&self) -> u32 {
        (self.id >> 4) << 16 | 1 << (self.id & 0xF)
    }

    // --- LVT, LINT pins, errors, timer ---

    fn lvt_index(offset: u32) -> Option<usize> {
        LVTS.iter().position(|&o| o == offset)
    }

    /// Raises the event of the LVT entry at register `offset`.
    pub(super) fn raise_lvt(&mut self, offset: u32) {
        let Some(entry) = Self::lvt_index(offset).map(|i| self.lvt[i]) else { return };
        if entry & LVT_MASKED != 0 || !self.is_enabled() {
            return;
        }
        if offset == LVT_PERF {
            self.lvt[2] |= LVT_MASKED; // SDM 11.5.1: set when the interrupt is handled
        }
        let has_mode = !matches!(offset, LVT_TIMER | LVT_ERROR);
        match if has_mode { entry >> 8 & 7 } else { delivery::FIXED } {
            delivery::FIXED => self.accept(entry as u8, false),
            delivery::NMI => self.outbox.push(Outgoing::Nmi),
            delivery::INIT => self.outbox.push(Outgoing::Init),
            _ => {} // ExtINT is a level, see passes_extint; SMI: no system management mode here
        }
    }

    /// Drives LINT0 (the 8259A's INT) or LINT1 (NMI).
    pub(super) fn set_lint(&mut self, pin: usize, high: bool) {
        let rising = high && !self.lint_high[pin];
        self.lint_high[pin] = high;
        if rising {
            self.raise_lint(pin);
        }
    }

    fn raise_lint(&mut self, pin: usize) {
        if !self.is_enabled() {
            // The pins are INTR (see passes_extint) and NMI again (SDM 11.4.3).
            if pin == 1 && self.bootstrap && self.lint_high[1] {
                self.outbox.push(Outgoing::Nmi);
            }
            return;
        }
        let entry = self.lvt[3 + pin];
        // LINT1 knows edges only (SDM 11.5.1, trigger mode).
        let level = pin == 0 && entry & LVT_LEVEL != 0 && entry >> 8 & 7 == delivery::FIXED;
        if !level {
            if self.lint_high[pin] {
                self.raise_lvt(LVTS[3 + pin]);
            }
        } else if self.lint_high[pin] && entry & (LVT_MASKED | LVT_REMOTE_IRR) == 0 {
            self.lvt[3 + pin] |= LVT_REMOTE_IRR;
            self.raise_lvt(LVTS[3 + pin]);
        }
    }

    fn error(&mut self, bit: u32) {
        // One interrupt until the next write to ESR, which arms it again (SDM 11.5.3).
        let armed = self.esr_pending == 0;
        self.esr_pending |= bit;
        let vector = self.lvt[5] as u8;
        if armed && self.lvt[5] & LVT_MASKED == 0 && vector >= 16 {
            self.accept(vector, false);
        }
    }

    /// Lets the timer catch up with `now`; returns when it wants to be looked at again.
    pub(super) fn run_timer(&mut self, now: VmTime) -> Option<VmTime> {
        if self.timer.take_expired(now) {
            self.raise_lvt(LVT_TIMER);
        }
        self.timer.next_expiry()
    }

    // --- registers ---

    /// Loads a register through the MMIO page.
    pub(super) fn load(&mut self, offset: u32, now: VmTime) -> u32 {
        if !self.is_enabled() || self.is_x2apic() {
            return u32::MAX;
        }
        let value = match offset {
            ID => Some(u32::from(self.xapic_id) << 24),
            LDR => Some(self.ldr),
            DFR => Some(self.dfr),
            ICR_HIGH => Some((self.icr >> 32) as u32),
            APR => Some(self.arbitration_priority().into()),
            RRD | EOI => Some(0),
            _ => self.read(offset, now),
        };
        value.unwrap_or_else(|| {
            self.error(ESR_ILLEGAL_REGISTER);
            0
        })
    }

    /// Stores a register through the MMIO page.
    pub(super) fn store(&mut self, offset: u32, value: u32, now: VmTime) {
        if !self.is_enabled() || self.is_x2apic() {
            return;
        }
        match offset {
            ID => self.xapic_id = (value >> 24) as u8,
            LDR => self.ldr = value & 0xFF00_0000,
            DFR => self.dfr = value | 0x0FFF_FFFF,
            ICR_HIGH => self.icr = self.icr & 0xFFFF_FFFF | u64::from(value & 0xFF00_0000) << 32,
            ICR_LOW => {
                self.icr = self.icr & !0xFFFF_FFFF | u64::from(value & ICR_WRITABLE);
                let rest = Message { destination: 0, logical: false, delivery: 0, vector: 0, level: false };
                let logical = value & 1 << 11 != 0;
                let to = Message::with_8bit_destination((self.icr >> 56) as u8, logical, rest);
                self.send(value, to.destination);
            }
            EOI => self.end_of_interrupt(),
            ESR => self.latch_errors(),
            VERSION | APR | PPR | RRD | CURRENT_COUNT | ISR..0x280 => {} // read-only: ignored
            _ => {
                if !self.write(offset, value, now) {
                    self.error(ESR_ILLEGAL_REGISTER);
                }
            }
        }
    }

    /// RDMSR of an x2APIC register.
    pub(super) fn read_msr(&mut self, msr: u32, now: VmTime) -> Result<u64, Refused> {
        let offset = msr.wrapping_sub(MSR_X2APIC) << 4;
        if !self.is_x2apic() {
            return Err(Refused);
        }
        match offset {
            ID => Ok(self.id.into()),
            LDR => Ok(self.x2apic_ldr().into()),
            ICR_LOW => Ok(self.icr),
            _ => self.read(offset, now).map(u64::from).ok_or(Refused),
        }
    }

    /// WRMSR of an x2APIC register; a reserved bit is refused (SDM 11.12.1.3).
    pub(super) fn write_msr(&mut self, msr: u32, value: u64, now: VmTime) -> Result<(), Refused> {
        let offset = msr.wrapping_sub(MSR_X2APIC) << 4;
        if !self.is_x2apic() || value & !x2apic_bits(offset) != 0 {
            return Err(Refused);
        }
        let low = value as u32;
        match offset {
            ICR_LOW => {
                self.icr = value & !u64::from(ICR_DELIVERY_STATUS);
                self.send(low, (value >> 32) as u32);
            }
            SELF_IPI => self.send(low | 1 << 18, 0),
            EOI => self.end_of_interrupt(),
            ESR => self.latch_errors(),
            _ => return self.write(offset, low, now).then_some(()).ok_or(Refused),
        }
        Ok(())
    }

    /// Registers that read alike in both modes.
    fn read(&self, offset: u32, now: VmTime) -> Option<u32> {
        let word = (offset >> 4 & 7) as usize;
        Some(match offset {
            VERSION => VERSION_VALUE,
            TPR => self.tpr.into(),
            PPR => self.ppr().into(),
            SVR => self.svr,
            ISR..0x180 => self.isr.0[word],
            TMR..0x200 => self.tmr.0[word],
            IRR..0x280 => self.irr.0[word],
            ESR => self.esr,
            ICR_LOW => self.icr as u32,
            INITIAL_COUNT => self.timer.initial_count(),
            CURRENT_COUNT => self.timer.current_count(now),
            DIVIDE => self.timer.divide(),
            _ => return Self::lvt_index(offset).filter(|_| offset != LVT_CMCI).map(|i| self.lvt[i]),
        })
    }

    /// Registers that are written alike in both modes; false if there is no such register.
    fn write(&mut self, offset: u32, value: u32, now: VmTime) -> bool {
        match offset {
            TPR => self.tpr = value as u8,
            SVR => self.set_svr(value & SVR_WRITABLE),
            INITIAL_COUNT => self.timer.set_initial_count(value, now),
            DIVIDE => self.timer.set_divide(value, now),
            LVT_CMCI => return false,
            _ => match Self::lvt_index(offset) {
                Some(i) => self.set_lvt(i, offset, value),
                None => return false,
            },
        }
        true
    }

    fn set_svr(&mut self, value: u32) {
        self.svr = value;
        if value & SVR_ENABLE == 0 {
            self.lvt.iter_mut().for_each(|l| *l |= LVT_MASKED);
        }
    }

    fn set_lvt(&mut self, index: usize, offset: u32, value: u32) {
        let mut entry = value & lvt_writable(offset) | self.lvt[index] & LVT_REMOTE_IRR;
        if entry & LVT_LEVEL == 0 {
            entry &= !LVT_REMOTE_IRR;
        }
        if self.svr & SVR_ENABLE == 0 {
            entry |= LVT_MASKED;
        }
        self.lvt[index] = entry;
        match offset {
            LVT_TIMER => self.timer.set_mode(TimerMode::of_lvt(entry)),
            LVT_LINT0 if entry & LVT_LEVEL != 0 => self.raise_lint(0),
            _ => {}
        }
    }

    /// A write to ESR makes the errors since the last write readable.
    fn latch_errors(&mut self) {
        self.esr = std::mem::take(&mut self.esr_pending);
    }

    /// A write to ICR: an IPI (SDM 11.6).
    fn send(&mut self, low: u32, destination: u32) {
        let mode = low >> 8 & 7;
        let vector = low as u8;
        let carries_vector = matches!(mode, delivery::FIXED | delivery::LOWEST_PRIORITY);
        if carries_vector && vector < 16 {
            self.error(ESR_SEND_ILLEGAL);
            return;
        }
        let deassert = mode == delivery::INIT && low & (ICR_ASSERT | ICR_LEVEL) == ICR_LEVEL;
        if deassert {
            return; // INIT level de-assert: only arbitration IDs on old buses
        }
        let shorthand = match low >> 18 & 3 {
            0 => Shorthand::Destination,
            1 => Shorthand::Myself,
            2 => Shorthand::All,
            _ => Shorthand::Others,
        };
        // IPIs are edge triggered whatever the trigger bit says (SDM 11.6.1).
        let message =
            Message { destination, logical: low & 1 << 11 != 0, delivery: mode, vector, level: false };
        self.outbox.push(Outgoing::Ipi(shorthand, message));
    }

    pub(super) fn base(&self) -> u64 {
        self.base
    }

    /// IA32_APIC_BASE; the page cannot be moved here.
    pub(super) fn set_base(&mut self, value: u64) -> Result<(), Refused> {
        let mode = |b: u64| (b & BASE_EN != 0, b & BASE_EXTD != 0);
        let legal = match (mode(self.base), mode(value)) {
            (_, (false, true)) => false,             // EXTD needs EN
            ((true, true), (true, false)) => false,  // x2APIC leaves only through disabled
            ((false, false), (true, true)) => false, // and is entered only from xAPIC
            _ => true,
        };
        if !legal || value & !(BASE_BSP | BASE_EXTD | BASE_EN) != DEFAULT_BASE {
            return Err(Refused);
        }
        let was_enabled = self.is_enabled();
        self.base = value;
        if was_enabled && !self.is_enabled() {
            self.init();
        }
        Ok(())
    }

    pub(super) fn inspect(&self, name: &str, field: &mut dyn FnMut(&str, &dyn std::fmt::Display)) {
        let text = format!(
            "id {:x} base {:x} tpr {:02x} ppr {:02x} svr {:03x} irr {:?} isr {:?} icr {:x} esr {:x} lvt {:x?}",
            self.id,
            self.base,
            self.tpr,
            self.ppr(),
            self.svr,
            self.irr.highest(),
            self.isr.highest(),
            self.icr,
            self.esr,
            self.lvt
        );
        field(name, &text);
    }
}

#[cfg(test)]
mod tests;

//! Interrupts: IDT, 8259 pair, local APIC. They are taken in [`wait`] and nowhere else, with the processor halted.
//!
//! Invariants: interrupts are enabled for the one HLT of [`wait`], whose assembly names every register that a handler may
//! change; handlers touch atomics alone; the local APIC's page is mapped to itself.

use crate::cell::Fixed;
use crate::port::{in8, out8};
use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

/// Vector of ISA interrupt 0.
const PIC_BASE: u8 = 0x20;
/// Vector of message-signalled interrupts.
pub const MSI_VECTOR: u8 = 0x40;
const SPURIOUS: u8 = 0x4F;
const VECTORS: usize = 0x50;

const PIC1: u16 = 0x20;
const PIC2: u16 = 0xA0;
const EOI: u8 = 0x20;
const CASCADE: u8 = 2;

const LAPIC: u64 = 0xFEE0_0000;
const LAPIC_TPR: u64 = 0x80;
const LAPIC_EOI: u64 = 0xB0;
const LAPIC_SVR: u64 = 0xF0;
const LAPIC_LVT_LINT0: u64 = 0x350;
const LAPIC_LVT_LINT1: u64 = 0x360;
const SVR_ENABLE: u32 = 1 << 8;
const DELIVERY_EXTINT: u32 = 7 << 8;
const DELIVERY_NMI: u32 = 4 << 8;

static SEEN: [AtomicU32; VECTORS] = [const { AtomicU32::new(0) }; VECTORS];
static TAKEN: AtomicU64 = AtomicU64::new(0);
/// Port or address of the interrupt status register that must be read to lower a shared PCI line, if any.
static ISR_ADDRESS: AtomicU64 = AtomicU64::new(0);
static UNMASKED: AtomicU16 = AtomicU16::new(1 << CASCADE);
static IDT: Fixed<[[u64; 2]; VECTORS]> = Fixed::new([[0; 2]; VECTORS]);

// Entry points of 16 bytes each: push the vector (and a zero where the processor pushes no error code), go on. No register
// need be saved around `lab_interrupt`: `wait` expects them all to be lost. Exceptions do not return.
global_asm!(
    r#"
    .section .text.vectors, "ax"
    .align 16
lab_vectors:
    .set vector, 0
    .rept 0x50
    .align 16
    .if (vector == 8) | ((vector >= 10) & (vector <= 14)) | (vector == 17) | (vector == 21)
    .else
    push 0
    .endif
    push vector
    jmp lab_common
    .set vector, vector + 1
    .endr
lab_common:
    cld
    pop rdi
    pop rsi
    mov rdx, [rsp]
    mov rbx, rsp
    and rsp, -16
    call lab_interrupt
    mov rsp, rbx
    iretq
    "#
);

unsafe extern "C" {
    static lab_vectors: u8;
}

#[unsafe(no_mangle)]
extern "C" fn lab_interrupt(vector: u64, error_code: u64, rip: u64) {
    let vector = vector as u8;
    if vector < PIC_BASE {
        let cr2: u64;
        // SAFETY: reads a register.
        unsafe { asm!("mov {}, cr2", out(reg) cr2) };
        panic!("exception {vector} at {rip:#x}, error code {error_code:#x}, cr2 {cr2:#x}");
    }
    if vector == SPURIOUS {
        return;
    }
    let isr = ISR_ADDRESS.load(Ordering::Relaxed);
    if vector < PIC_BASE + 16 && isr != 0 {
        // SAFETY: a device register that was found by `virtio`; the read lowers its line.
        unsafe { (isr as *const u8).read_volatile() };
    }
    SEEN[usize::from(vector)].fetch_add(1, Ordering::Relaxed);
    TAKEN.fetch_add(1, Ordering::Relaxed);
    end_of_interrupt(vector);
}

fn end_of_interrupt(vector: u8) {
    if vector >= MSI_VECTOR {
        lapic_write(LAPIC_EOI, 0);
        return;
    }
    if vector >= PIC_BASE + 8 {
        out8(PIC2, EOI);
    }
    out8(PIC1, EOI);
}

fn lapic_write(register: u64, value: u32) {
    // SAFETY: the local APIC's page.
    unsafe { ((LAPIC + register) as *mut u32).write_volatile(value) };
}

/// Sets up IDT, PICs (all but the cascade masked) and the local APIC as a virtual wire.
pub fn init() {
    let first = (&raw const lab_vectors) as u64;
    for vector in 0..VECTORS {
        let at = first + 16 * vector as u64;
        let low = (at & 0xFFFF) | 8 << 16 | 0x8E00 << 32 | (at >> 16 & 0xFFFF) << 48;
        // SAFETY: within the table.
        unsafe { (*IDT.get())[vector] = [low, at >> 32] };
    }
    let limit = (size_of::<[[u64; 2]; VECTORS]>() - 1) as u16;
    let mut idtr = [0u8; 10];
    idtr[..2].copy_from_slice(&limit.to_le_bytes());
    idtr[2..].copy_from_slice(&IDT.address().to_le_bytes());
    // SAFETY: the table is complete and stays.
    unsafe { asm!("lidt [{}]", in(reg) &idtr) };
    init_pics();
    lapic_write(LAPIC_TPR, 0);
    lapic_write(LAPIC_LVT_LINT0, DELIVERY_EXTINT);
    lapic_write(LAPIC_LVT_LINT1, DELIVERY_NMI);
    lapic_write(LAPIC_SVR, SVR_ENABLE | u32::from(SPURIOUS));
}

/// ICW1 to ICW4 of both (8259A data sheet).
fn init_pics() {
    for (command, base, wiring) in [(PIC1, PIC_BASE, 1 << CASCADE), (PIC2, PIC_BASE + 8, CASCADE)] {
        out8(command, 0x11);
        out8(command + 1, base);
        out8(command + 1, wiring);
        out8(command + 1, 0x01);
    }
    write_masks();
}

fn write_masks() {
    let masked = !UNMASKED.load(Ordering::Relaxed);
    out8(PIC1 + 1, masked as u8);
    out8(PIC2 + 1, (masked >> 8) as u8);
}

/// Lets ISA interrupt `line` through; returns its vector.
pub fn unmask(line: u8) -> u8 {
    UNMASKED.fetch_or(1 << (line & 15), Ordering::Relaxed);
    write_masks();
    PIC_BASE + (line & 15)
}

/// Makes `line` level-triggered (ELCR).
pub fn set_level_triggered(line: u8) {
    let elcr = if line < 8 { 0x4D0 } else { 0x4D1 };
    out8(elcr, in8(elcr) | 1 << (line & 7));
}

/// Names the register whose read lowers a PCI line.
pub fn set_isr(address: u64) {
    ISR_ADDRESS.store(address, Ordering::Relaxed);
}

/// Interrupts taken so far.
pub fn taken() -> u64 {
    TAKEN.load(Ordering::Relaxed)
}

/// Forgets interrupts of `vector` that nobody waited for.
pub fn forget(vector: u8) {
    SEEN[usize::from(vector)].store(0, Ordering::Relaxed);
}

/// Sleeps until `vector` came at least once since the last call.
pub fn wait(vector: u8) {
    let seen = &SEEN[usize::from(vector)];
    while seen.swap(0, Ordering::Relaxed) == 0 {
        // SAFETY: STI takes effect after HLT began, so nothing is missed; handlers may change every register that a call
        // may change, and RBX, which they restore by their own `iretq` frame no more than the others.
        unsafe { asm!("push rbx", "sti", "hlt", "cli", "pop rbx", clobber_abi("C")) };
    }
}

/// Stops the processor.
pub fn halt_for_good() {
    // SAFETY: nothing is left to do.
    unsafe { asm!("cli", "hlt") };
}

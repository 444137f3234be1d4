//! A guest for several processors: a Multiboot kernel at 1 MiB that starts all others, lets them count, interrupts them and
//! takes pages away from them, and tells by the debug-exit port how that went.
//!
//! ```text
//! 0000_8000 start-up code of the others                 0030_0000, 0030_1000 two pages, one of which is shown at 4000_0000
//! 0020_0000 page directory, page table, IDT             0040_0000 a page of stack for each processor, by APIC id
//! ```
//!
//! Invariant of the unsafe lines: an image is the read-only bytes between two labels that the assembler put into one
//! section; they are only copied.

/// Where the image is loaded.
const BASE: u32 = 0x10_0000;
/// What the guest says if everything was right.
pub const RIGHT: u32 = 5;
/// Where the table of places lies in the image.
const PLACES: usize = 32;

std::arch::global_asm!(
    ".pushsection .rodata.smp_guest, \"a\"",
    ".balign 16",
    "smp_base: .code32",
    // Multiboot 1 with addresses: magic, flags, checksum, header, load, load end, bss end, entry.
    ".long 0x1BADB002, 0x10000, -(0x1BADB002 + 0x10000)",
    ".long {B}, {B}, {B} + smp_end - smp_base, 0, {B} + smp_start - smp_base",
    ".long {B} + smp_watching - smp_base, {B} + smp_handler - smp_base, {B} + smp_online - smp_base",
    ".balign 8",
    "smp_gdt: .quad 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF",
    "smp_gdtr: .word 23",
    ".long {B} + smp_gdt - smp_base",
    "smp_idtr: .word 0x7FF",
    ".long 0x202000",
    ".balign 4",
    "smp_online: .long 0",
    "smp_counter: .long 0",
    "smp_finished: .long 0",
    "smp_ids: .long 0",
    "smp_taken: .long 0",
    "smp_acks: .long 0",
    // The generation of the page that is shown; -1 while it changes.
    "smp_shown: .long 0",
    "smp_looks: .long 0",
    "smp_wrong: .long 0",
    ".set smp_Online, {B} + smp_online - smp_base",
    ".set smp_Counter, {B} + smp_counter - smp_base",
    ".set smp_Finished, {B} + smp_finished - smp_base",
    ".set smp_Ids, {B} + smp_ids - smp_base",
    ".set smp_Taken, {B} + smp_taken - smp_base",
    ".set smp_Acks, {B} + smp_acks - smp_base",
    ".set smp_Shown, {B} + smp_shown - smp_base",
    ".set smp_Looks, {B} + smp_looks - smp_base",
    ".set smp_Wrong, {B} + smp_wrong - smp_base",
    // Waits until the cell holds the register's value.
    ".macro smp_await cell, register",
    "77: pause",
    "cmp \\register, \\cell",
    "jne 77b",
    ".endm",
    // Sends what the interrupt command register says.
    ".macro smp_send command",
    "movl $\\command, 0xFEE00300",
    ".endm",
    // ---- the boot processor ----
    "smp_start: cli",
    "lgdt {B} + smp_gdtr - smp_base",
    "mov $16, %ax",
    "mov %ax, %ds",
    "mov %ax, %es",
    "mov %ax, %ss",
    "mov $0x400FF0, %esp",
    // Page directory: 4-MiB pages one to one, but for 4000_0000, where a table is.
    "cld",
    "mov $0x200000, %edi",
    "mov $0x83, %eax",
    "2: stosl",
    "add $0x400000, %eax",
    "cmp $0x201000, %edi",
    "jne 2b",
    "movl $0x201003, 0x200400",
    "movl $0x300003, 0x201000",
    "movl $0, 0x300000",
    "movl $1, 0x301000",
    "mov $({B} + smp_handler - smp_base), %eax",
    "mov $0x202200, %ebx",
    "call smp_gate",
    "mov $({B} + smp_shootdown - smp_base), %eax",
    "mov $0x202208, %ebx",
    "call smp_gate",
    // The number of processors: CPUID leaf 0BH, level 1. EBP keeps it, EBX the number of the others.
    "mov $0xB, %eax",
    "mov $1, %ecx",
    "cpuid",
    "movzwl %bx, %ebp",
    "lea -1(%ebp), %ebx",
    "mov $({B} + smp_trampoline - smp_base), %esi",
    "mov $0x8000, %edi",
    "mov $(smp_trampoline_end - smp_trampoline), %ecx",
    "rep movsb",
    "call smp_processor",
    // INIT, start-up, start-up, to all others.
    "smp_send 0xC4500",
    "smp_send 0xC4608",
    "smp_send 0xC4608",
    "smp_await smp_Online, %ebp",
    "call smp_count",
    "smp_await smp_Finished, %ebp",
    "imul $20000, %ebp, %eax",
    "mov $1, %edi",
    "cmp %eax, smp_Counter",
    "jne smp_say",
    // Everybody's APIC has the id that CPUID says, and they differ.
    "mov %ebp, %ecx",
    "mov $1, %eax",
    "shl %cl, %eax",
    "dec %eax",
    "mov $2, %edi",
    "cmp %eax, smp_Ids",
    "jne smp_say",
    // 40 interrupts to all others, each waited for.
    "mov $40, %esi",
    "4: movl $0, smp_Taken",
    "smp_send 0xC4040",
    "smp_await smp_Taken, %ebx",
    "dec %esi",
    "jnz 4b",
    // 60 shootdowns: generation n shows page n mod 2.
    "mov $1, %esi",
    "5: movl $0, smp_Acks",
    "movl $-1, smp_Shown",
    "xorl $0x1000, 0x201000",
    "invlpg 0x40000000",
    "smp_send 0xC4041",
    "smp_await smp_Acks, %ebx",
    "mov %esi, smp_Shown",
    "inc %esi",
    "cmp $61, %esi",
    "jne 5b",
    "mov $3, %edi",
    "cmpl $0, smp_Wrong",
    "jne smp_say",
    "mov $4, %edi",
    "cmpl $0, smp_Looks",
    "je smp_say",
    // INIT in the middle of their work, and up again.
    "movl $1, smp_Online",
    "smp_send 0xC4500",
    "smp_send 0xC4608",
    "smp_await smp_Online, %ebp",
    "mov ${RIGHT}, %edi",
    "smp_say: mov %edi, %eax",
    "out %al, $0xF4",
    "6: hlt",
    "jmp 6b",
    // A gate at EBX, to EAX.
    "smp_gate: mov %eax, %ecx",
    "and $0xFFFF, %eax",
    "or $0x80000, %eax",
    "mov %eax, (%ebx)",
    "and $0xFFFF0000, %ecx",
    "or $0x8E00, %ecx",
    "mov %ecx, 4(%ebx)",
    "ret",
    // Paging, IDT and APIC of this processor, which notes its id and counts itself.
    "smp_processor: mov $0x200000, %eax",
    "mov %eax, %cr3",
    "mov %cr4, %eax",
    "or $0x10, %eax",
    "mov %eax, %cr4",
    "mov %cr0, %eax",
    "or $0x80010000, %eax",
    "mov %eax, %cr0",
    "lidt {B} + smp_idtr - smp_base",
    "movl $0x1FF, 0xFEE000F0",
    "push %ebx",
    "mov $1, %eax",
    "cpuid",
    "shr $24, %ebx",
    "mov 0xFEE00020, %eax",
    "shr $24, %eax",
    "cmp %ebx, %eax",
    "pop %ebx",
    "jne 7f",
    "lock bts %eax, smp_Ids",
    "7: lock incl smp_Online",
    "ret",
    "smp_count: mov $20000, %ecx",
    "8: lock incl smp_Counter",
    "dec %ecx",
    "jnz 8b",
    "lock incl smp_Finished",
    "ret",
    "smp_handler: lock incl smp_Taken",
    "movl $0, 0xFEE000B0",
    "iretl",
    "smp_shootdown: invlpg 0x40000000",
    "lock incl smp_Acks",
    "movl $0, 0xFEE000B0",
    "iretl",
    // ---- the others ----
    ".code16",
    "smp_trampoline: cli",
    "mov %cs, %ax",
    "mov %ax, %ds",
    "lgdtl smp_low_gdtr - smp_trampoline",
    "mov %cr0, %eax",
    "and $0x9FFFFFFF, %eax",
    "or $1, %al",
    "mov %eax, %cr0",
    "ljmpl $8, $({B} + smp_other - smp_base)",
    "smp_low_gdtr: .word 23",
    ".long {B} + smp_gdt - smp_base",
    "smp_trampoline_end: .code32",
    "smp_other: mov $16, %ax",
    "mov %ax, %ds",
    "mov %ax, %es",
    "mov %ax, %ss",
    "mov 0xFEE00020, %eax",
    "shr $12, %eax",
    "lea 0x400FF0(%eax), %esp",
    "call smp_processor",
    "call smp_count",
    "sti",
    // If the generation does not change while we look, it is its page that we see.
    "smp_watching: mov smp_Shown, %eax",
    "mov 0x40000000, %ebx",
    "cmp smp_Shown, %eax",
    "jne smp_watching",
    "cmp $-1, %eax",
    "je smp_watching",
    "and $1, %eax",
    "cmp %eax, %ebx",
    "je 9f",
    "lock incl smp_Wrong",
    "9: lock incl smp_Looks",
    "jmp smp_watching",
    ".purgem smp_await",
    ".purgem smp_send",
    ".balign 16",
    "smp_end: .code64",
    ".popsection",
    // ---- a boot sector: a TSC deadline under an adjusted TSC, by x2APIC ----
    ".pushsection .rodata.smp_deadline, \"a\"",
    "smp_deadline: .code16",
    "mov $0x1B, %ecx",
    "rdmsr",
    "or $0xC00, %eax",
    "wrmsr",
    "xor %edx, %edx",
    "mov $0x80F, %ecx",
    "mov $0x1FF, %eax",
    "wrmsr",
    "mov $0x832, %ecx",
    "mov $0x40040, %eax",
    "wrmsr",
    // The TSC is hours ahead of the machine's.
    "mov $0x3B, %ecx",
    "mov $0x10000, %edx",
    "wrmsr",
    "movw $(0x7C00 + 2f - smp_deadline), 0x100",
    "movw $0, 0x102",
    "rdtsc",
    "add $1000000, %eax",
    "adc $0, %edx",
    "mov $0x6E0, %ecx",
    "wrmsr",
    "sti",
    "3: hlt",
    "jmp 3b",
    "2: mov ${RIGHT}, %al",
    "out %al, $0xF4",
    ".org smp_deadline + 510",
    ".word 0xAA55",
    "smp_deadline_end: .code64",
    ".popsection",
    ".globl smp_base",
    ".globl smp_end",
    ".globl smp_deadline",
    ".globl smp_deadline_end",
    B = const BASE,
    RIGHT = const RIGHT,
    options(att_syntax),
);

unsafe extern "C" {
    static smp_base: u8;
    static smp_end: u8;
    static smp_deadline: u8;
    static smp_deadline_end: u8;
}

/// A boot sector that sees a TSC deadline come, or not.
#[allow(dead_code, reason = "not every test is about time")]
pub fn deadline() -> Vec<u8> {
    let (start, end) = (&raw const smp_deadline, &raw const smp_deadline_end);
    // SAFETY: as in `image`.
    unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }.to_vec()
}

/// The kernel's file.
pub fn image() -> Vec<u8> {
    let (start, end) = (&raw const smp_base, &raw const smp_end);
    // SAFETY: the labels bound bytes of one section that never change.
    unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }.to_vec()
}

/// Addresses that a debugger wants.
#[allow(dead_code, reason = "not every test has a debugger")]
pub struct Places {
    /// The loop in which the others look at a page.
    pub watching: u32,
    /// The handler of the counted interrupt.
    pub handler: u32,
    /// A double word: how many processors are up.
    pub online: u32,
}

/// Where things are in [`image`].
#[allow(dead_code, reason = "not every test has a debugger")]
pub fn places() -> Places {
    let image = image();
    let word = |n: usize| {
        let at = PLACES + 4 * n;
        u32::from_le_bytes(image[at..at + 4].try_into().expect("four bytes"))
    };
    Places { watching: word(0), handler: word(1), online: word(2) }
}

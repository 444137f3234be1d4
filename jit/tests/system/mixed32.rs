//! Pieces of 32-bit kernels and programs for [`crate::mixed`]: SYSENTER, interrupts, call gates, segments, page tables.

use crate::bed::{Bed, CODE, DATA, HANDLERS, Program, STACK, Start, pte, sel};
use crate::mixed::{KERNEL, Kind, agree};
use crate::segments::descriptor;
use crate::wild::Random;

/// Where the call gate leads, in the supervisor's page; its stack is the interrupts'.
const ROUTINE: u64 = KERNEL + 0x800;
/// Code of SYSENTER; stack, and the program's code and stack follow in the table.
const ENTRY_CODE: u16 = sel::DATA - 8;
/// Stack of SYSENTER.
const ENTRY_STACK: u64 = 0x6_E000;

/// Pieces for everybody. ESI is DATA.
fn common() -> Vec<Program> {
    vec![
        program!(32: "lea eax, [eax + ebx + 3]", "add edx, eax", "adc ebx, edx"),
        program!(32: "mov [esi + 0x10], eax", "add ebx, [esi + 0x18]", "sub [esi + 0x18], edx"),
        program!(32: "push eax", "push ebx", "pop eax", "pop ebx"),
        program!(32: "push ax", "pop dx"),
        program!(32: "call 2f", "jmp 3f", "2: inc edx", "ret", "3:"),
        program!(32: "mov ecx, 7", "2: add ebx, ecx", "mov [esi + ecx * 4 + 0x100], ebx", "dec ecx", "jnz 2b"),
        program!(32: "mov edi, 0x200200", "mov ecx, 9", "rep stosb"),
        program!(32: "std", "mov edi, 0x200300", "stosd", "cld"),
        program!(32: "cmp eax, ebx", "pushfd", "pop eax"),
        program!(32: "pushad", "popad"),
        program!(32: "movups xmm0, [esi + 0x20]", "paddq xmm0, xmm1", "movups [esi + 0x30], xmm0", "movaps xmm1, xmm0"),
        program!(32: "add ebx, [esi + 0x1008]"),
        program!(32: "mov eax, [esi + 0x3008]", "inc eax", "mov [esi + 0x3008], eax"),
        program!(32: "int 0x40"),
        program!(32: "lock xadd [esi + 0x40], eax", "lock cmpxchg [esi + 0x48], ebx", "xchg [esi + 0x50], edx"),
        program!(32: "mov edx, [esi + 0x61]", "add [esi + 0x67], dx"),
        program!(32: "mov edx, [esi + 0xFFE]"),
        program!(32: "cmp eax, ebx", "cmovb edx, eax", "setc cl", "sbb ebx, 0"),
        program!(32: "call 2f", "2: pop edi", "inc byte ptr [edi + 5]", "mov cl, 3"),
        program!(32: "pushfd", "btc dword ptr [esp], 18", "popfd"), // AC
        program!(32: "pushfd", "btc dword ptr [esp], 21", "popfd"), // ID
        program!(32: "pushfd", "btc dword ptr [esp], 10", "popfd"), // DF
        program!(32: "pushfd", "btc dword ptr [esp], 9", "popfd"),  // IF
        program!(32: "mov eax, ss", "mov edx, cs"),
        program!(32: "mov eax, 0x2B", "mov es, eax"),
        program!(32: "mov eax, 0x5B", "mov fs, eax", "add ebx, fs:[0x10]"),
        program!(32: "mov eax, 0x63", "mov gs, eax", "mov gs:[0xFF8], edx"),
        program!(32: "add edx, fs:[0x20]", "mov fs:[0x24], dl"),
        program!(32: "add edx, gs:[0xFF0]"),
        program!(32: "mov eax, 0x5B", "mov es, eax", "mov edi, 0x300", "mov ecx, 5", "rep stosd", "push ds", "pop es"),
        program!(32: "push fs", "pop gs"),
        program!(32: "mov dword ptr [esi + 0x90], 0x80", "mov word ptr [esi + 0x94], 0x5B", "les edi, [esi + 0x90]", "add ebx, es:[edi]", "push ss", "pop es"),
        program!(32: "fld1", "fadd st, st", "fstp qword ptr [esi + 0x58]"),
        program!(32: "lar eax, ebx", "lsl ecx, eax"),
        program!(32: "mov ecx, 0x5B", "lsl eax, ecx", "verw cx", "setz dl"),
        program!(32: "mov [esi + 0x7C], si", "arpl [esi + 0x7C], ax"),
    ]
}

/// Pieces that fault, always or mostly, for everybody.
fn faulting() -> Vec<Program> {
    vec![
        program!(32: "add ebx, [esi + 0x2008]"),
        program!(32: "mov [esi + 0x1008], eax"),
        program!(32: "mov [esi + 0xFFE], edx"),
        program!(32: "mov eax, fs:[0xFFE]"),
        program!(32: "mov gs:[0xFFD], eax"),
        program!(32: "ud2"),
        program!(32: "mov eax, [0x104000]"),
        program!(32: "mov eax, 0x40000000", "jmp eax"),
        program!(32: "xor eax, eax", "mov fs, eax", "mov al, fs:[0]"),
        program!(32: "mov eax, 0x18", "mov ds, eax"),
        program!(32: "hlt"),
        program!(32: "cli"),
        program!(32: "bound ebx, [esi + 0x98]"),
    ]
}

/// Pieces for programs.
fn user() -> Vec<Program> {
    vec![
        program!(32: "call 2f", "2: pop edx", "add edx, 9", "mov ecx, esp", "nop", "sysenter"),
        program!(32: "stc", "call 2f", "2: pop edx", "lea edx, [edx + 9]", "mov ecx, esp", "nop", "sysenter", "adc eax, 0"),
        program!(32: ".byte 0x9A", ".long 0", ".word 0x73"), // CALL through the gate
        program!(32: "mov edi, 3", "2: .byte 0x9A", ".long 0", ".word 0x73", "dec edi", "jnz 2b"),
        program!(32: "int 0x41"),
    ]
}

/// Pieces for the kernel. What changes an entry flushes everything.
fn kernel() -> Vec<Program> {
    vec![
        program!(32: "mov eax, cr3", "mov cr3, eax"),
        program!(32: "invlpg [esi + 0x3000]"),
        program!(32: "mov edi, [0x202F08]", "btc dword ptr [edi], 0", "mov eax, cr4", "btc eax, 7", "mov cr4, eax", "btc eax, 7", "mov cr4, eax"),
        program!(32: "mov edi, [0x202F08]", "btc dword ptr [edi], 1", "mov eax, cr4", "btc eax, 7", "mov cr4, eax", "btc eax, 7", "mov cr4, eax"),
        program!(32: "mov edi, [0x202F08]", "btc dword ptr [edi], 2", "mov eax, cr4", "btc eax, 7", "mov cr4, eax", "btc eax, 7", "mov cr4, eax"),
        program!(32: "mov edi, [0x202F08]", "xor dword ptr [edi], 0x3000", "mov eax, cr4", "btc eax, 7", "mov cr4, eax", "btc eax, 7", "mov cr4, eax"),
        program!(32: "mov eax, cr4", "btc eax, 21", "mov cr4, eax"), // SMAP
        program!(32: "mov eax, cr4", "btc eax, 20", "mov cr4, eax"), // SMEP
        program!(32: "mov eax, cr0", "btc eax, 16", "mov cr0, eax"), // WP
        program!(32: "mov eax, cr0", "btc eax, 18", "mov cr0, eax"), // AM
        program!(32: "mov eax, cr0", "btc eax, 3", "mov cr0, eax"),  // TS
        program!(32: "clts"),
        program!(32: "stac"),
        program!(32: "clac"),
        program!(32: "sti"),
        program!(32: "cli"),
        program!(32: "pushfd", "push 8", "call 2f", "2: add dword ptr [esp], 5", "iretd"),
        program!(32: "mov eax, 0x2B", "mov ds, eax", "mov es, eax"),
        program!(32: "mov eax, 0x18", "mov ss, eax"),
        program!(32: "lea eax, [esi + 0x10]", "mov dr0, eax", "mov eax, 0xD0401", "mov dr7, eax"),
        program!(32: "mov eax, 0x400", "mov dr7, eax"),
        program!(32: "pushfd", "btc dword ptr [esp], 12", "popfd"), // IOPL
        program!(32: "out 0x80, al"),
        program!(32: "btc dword ptr [0x202F00], 3"), // where SYSEXIT leads
        // The limit and the base of FS, as soon as it is loaded.
        program!(32: "xor byte ptr [0x1059], 0x80"),
        program!(32: "xor byte ptr [0x105A], 0x01"),
        program!(32: "xor byte ptr [0x105E], 0x40"),
        program!(32: "mov eax, 0x5B", "mov fs, eax", "mov gs, eax"),
    ]
}

fn prepare(bed: &mut Bed, _: &mut Random) {
    bed.put(HANDLERS + 0x400, program!(32: "lea edx, [edx + 5]", "iretd").bytes);
    // Interrupts show status flags that nobody reads: they are cleared.
    let handler = program!(32: "and dword ptr [esp + 8], ~0x8D5", "lea ebx, [ebx + 7]", "iretd");
    bed.put(HANDLERS + 0x600, handler.bytes);
    bed.put(HANDLERS + 0x20, handler.bytes);
    bed.gate(0x41, 15, 3, HANDLERS + 0x400);
    // What SYSENTER loads by arithmetic is what the table has.
    bed.gdt(ENTRY_CODE, descriptor(0, 0xF_FFFF, 0xC09B));
    // A small segment at DATA, one that expands down, and a call gate.
    bed.gdt(sel::FREE, descriptor(DATA, 0xFFF, 0x40F3));
    bed.gdt(sel::FREE + 8, descriptor(DATA, 0xDFF, 0x00F7));
    bed.gdt(sel::FREE + 0x18, ROUTINE & 0xFFFF | 0x08 << 16 | 0xEC00 << 32 | (ROUTINE >> 16) << 48);
    bed.put(ROUTINE, program!(32: "add ebx, [esp + 8]", "mov edx, cs", "retf").bytes);
    bed.put32(DATA + 0x2F08, (bed.pte_at(DATA) + if bed.start == Start::Paged32 { 12 } else { 24 }) as u32);
    bed.map(CODE + 0x1000, CODE + 0x1000, pte::P);
    bed.cpu.msr.sysenter_cs = ENTRY_CODE.into();
    bed.cpu.msr.sysenter_eip = KERNEL;
    bed.cpu.msr.sysenter_esp = ENTRY_STACK;
}

fn enter(bed: &mut Bed) {
    // Frames of earlier exceptions hold flags that nobody reads.
    for stack in [STACK, ENTRY_STACK] {
        bed.put(stack - 0x200, &[0; 0x200]);
    }
    bed.user();
}

fn kind(start: Start) -> Kind {
    Kind {
        start,
        places: vec![CODE],
        lists: [common(), faulting(), user(), kernel()],
        turn: vec![0xFF, 0x0D, 0, 8, 0x20, 0, 0x0F, 0x85], // DEC DWORD [TURNS]; JNZ
        enter_kernel: program!(32: "mov [0x202F00], edx", "mov [0x202F04], ecx"),
        may_access: program!(32: "stac"),
        leave_kernel: program!(32: "mov edx, [0x202F00]", "mov ecx, [0x202F04]", "sysexit"),
        prepare,
        enter,
    }
}

#[test]
fn engines_agree_on_32_bit_kernels_and_programs() {
    agree(&kind(Start::Paged32));
}

#[test]
fn engines_agree_on_kernels_and_programs_with_pae() {
    agree(&kind(Start::Pae));
}

//! Kernels and programs drawn from pieces: system calls, interrupts, page tables and control bits that change under
//! translated code, stores into code, segment bases, flags, breakpoints. Both engines from the same start, and again from
//! each exception on: everything that is defined must be equal. Of the pages at DATA the first is the program's, the next
//! read-only, then comes one of the supervisor's, and one whose entry changes.

use crate::bed::{
    Bed, CODE, DATA, HANDLERS, IST_STACK, PAE_ROOT, Program, SPARE, STACK, Start, USER_STACK, pte,
};
use crate::moving::{AT, PLACES, only_at};
use crate::wild::{Random, remains};
use paravane_cpu::{Exit, SegReg, cr4, flags, gpr};
use std::time::Duration;

/// Where SYSCALL and SYSENTER lead: a page of the supervisor's.
pub const KERNEL: u64 = CODE + 0x4000;
/// How often the program still turns.
const TURNS: u64 = DATA + 0x800;
/// Pieces for everybody. RSI is DATA.
fn common() -> Vec<Program> {
    vec![
        program!(64: "lea rax, [rax + rbx + 3]", "add rdx, rax", "adc rbx, rdx"),
        program!(64: "mov [rsi + 0x10], rax", "add rbx, [rsi + 0x18]", "sub [rsi + 0x18], edx"),
        program!(64: "push rax", "push rbx", "pop rax", "pop rbx"),
        program!(64: "call 2f", "jmp 3f", "2: inc rdx", "ret", "3:"),
        program!(64: "mov ecx, 7", "2: add rbx, rcx", "mov [rsi + rcx * 8 + 0x100], rbx", "dec ecx", "jnz 2b"),
        program!(64: "mov edi, 0x200200", "mov ecx, 9", "rep stosb"),
        program!(64: "std", "mov edi, 0x200300", "stosq", "cld"),
        program!(64: "cmp rax, rbx", "pushfq", "pop rax"),
        program!(64: "movups xmm0, [rsi + 0x20]", "paddq xmm0, xmm1", "movups [rsi + 0x30], xmm0", "movaps xmm1, xmm0"),
        program!(64: "add rbx, [rsi + 0x1008]"),
        program!(64: "mov rax, [rsi + 0x3008]", "inc rax", "mov [rsi + 0x3008], rax"),
        program!(64: "int 0x40"),
        program!(64: "rdfsbase rax", "wrgsbase rsi", "mov rbx, gs:[0x28]"),
        program!(64: "add rdx, fs:[0x10]", "mov fs:[0x18], edx"),
        program!(64: "lock xadd [rsi + 0x40], rax", "lock cmpxchg [rsi + 0x48], rbx", "xchg [rsi + 0x50], rdx"),
        program!(64: "mov rdx, [rsi + 0x61]", "add [rsi + 0x67], dx"),
        program!(64: "mov rdx, [rsi + 0xFFC]"),
        program!(64: "cmp rax, rbx", "cmovb rdx, rax", "setc cl", "sbb rbx, 0"),
        program!(64: "lea rdi, [rip + 2f]", "inc byte ptr [rdi + 1]", "2: mov cl, 3"),
        program!(64: "pushfq", "btc dword ptr [rsp], 18", "popfq"), // AC
        program!(64: "pushfq", "btc dword ptr [rsp], 21", "popfq"), // ID
        program!(64: "pushfq", "btc dword ptr [rsp], 14", "popfq"), // NT
        program!(64: "pushfq", "btc dword ptr [rsp], 10", "popfq"), // DF
        program!(64: "pushfq", "btc dword ptr [rsp], 9", "popfq"),  // IF
        program!(64: "mov eax, 7", "xor ecx, ecx", "cpuid"),
        program!(64: "mov eax, ss", "mov edx, cs"),
        program!(64: "xor eax, eax", "mov fs, eax"),
        program!(64: "mov eax, 0x2B", "mov es, eax"),
        program!(64: "vpaddd ymm2, ymm2, ymm1"),
        program!(64: "fld1", "fadd st, st", "fstp qword ptr [rsi + 0x58]"),
    ]
}

/// Pieces that fault, always or mostly, for everybody.
fn faulting() -> Vec<Program> {
    vec![
        program!(64: "add rbx, [rsi + 0x2008]"),
        program!(64: "mov [rsi + 0x1008], rax"),
        program!(64: "mov [rsi + 0xFFC], rdx"),
        program!(64: "bts rax, 63", "btr rax, 62", "mov rbx, [rax]"),
        program!(64: "ud2"),
        program!(64: "mov rax, [0x104000]"),
        program!(64: "mov eax, 0x40000000", "jmp rax"),
        program!(64: "hlt"),
    ]
}

/// Pieces for programs.
fn user() -> Vec<Program> {
    vec![
        program!(64: "syscall"),
        program!(64: "stc", "syscall", "adc rax, 0"),
        program!(64: "cmp rax, rbx", "syscall", "setc dl"),
        program!(64: "mov ecx, 3", "2: push rcx", "syscall", "pop rcx", "dec ecx", "jnz 2b"),
    ]
}

/// Pieces for the kernel. What changes an entry flushes everything.
fn kernel() -> Vec<Program> {
    vec![
        program!(64: "mov rax, cr3", "mov cr3, rax"),
        program!(64: "mov rax, cr3", "xor rax, 1", "bts rax, 63", "mov cr3, rax"),
        program!(64: "mov rax, cr3", "xor rax, 2", "mov cr3, rax"),
        program!(64: "invlpg [rsi + 0x3000]"),
        program!(64: "btc qword ptr [0x34018], 0", "call 9f", "jmp 8f", "9: mov rax, cr4", "btc rax, 7", "mov cr4, rax", "btc rax, 7", "mov cr4, rax", "ret", "8:"),
        program!(64: "btc qword ptr [0x34018], 1", "call 9f", "jmp 8f", "9: mov rax, cr4", "btc rax, 7", "mov cr4, rax", "btc rax, 7", "mov cr4, rax", "ret", "8:"),
        program!(64: "btc qword ptr [0x34018], 2", "call 9f", "jmp 8f", "9: mov rax, cr4", "btc rax, 7", "mov cr4, rax", "btc rax, 7", "mov cr4, rax", "ret", "8:"),
        program!(64: "xor qword ptr [0x34018], 0x3000", "call 9f", "jmp 8f", "9: mov rax, cr4", "btc rax, 7", "mov cr4, rax", "btc rax, 7", "mov cr4, rax", "ret", "8:"),
        program!(64: "mov rax, cr4", "btc rax, 21", "mov cr4, rax"), // SMAP
        program!(64: "mov rax, cr4", "btc rax, 20", "mov cr4, rax"), // SMEP
        program!(64: "mov rax, cr0", "btc rax, 16", "mov cr0, rax"), // WP
        program!(64: "mov rax, cr0", "btc rax, 18", "mov cr0, rax"), // AM
        program!(64: "mov rax, cr0", "btc rax, 3", "mov cr0, rax"),  // TS
        program!(64: "clts"),
        program!(64: "stac"),
        program!(64: "clac"),
        program!(64: "stac", "add rbx, [rsi]", "clac"),
        program!(64: "sti"),
        program!(64: "cli"),
        program!(64: "swapgs"),
        program!(64: "swapgs", "mov rbx, gs:[0x10]", "swapgs"),
        program!(64: "lea rdx, [rsp]", "push 0x18", "push rdx", "pushfq", "push 0x10", "lea rax, [rip + 2f]", "push rax", "iretq", "2:"),
        program!(64: "mov ecx, 0xC0000101", "mov eax, 0x202100", "xor edx, edx", "wrmsr"),
        program!(64: "mov ecx, 0xC0000102", "mov eax, 0x200080", "xor edx, edx", "wrmsr"),
        program!(64: "mov ecx, 0xC0000084", "mov eax, 0x47700", "xor edx, edx", "wrmsr"),
        program!(64: "mov ecx, 0xC0000084", "mov eax, 0x201", "xor edx, edx", "wrmsr"),
        program!(64: "mov ecx, 0xC0000084", "xor eax, eax", "xor edx, edx", "wrmsr"),
        program!(64: "mov ecx, 0xC0000080", "rdmsr", "btc eax, 0", "wrmsr"), // EFER.SCE
        program!(64: "mov eax, 0x18", "mov ss, eax"),
        program!(64: "lea rax, [rsi + 0x10]", "mov dr0, rax", "mov eax, 0xD0401", "mov dr7, rax"),
        program!(64: "mov eax, 0x400", "mov dr7, rax"),
        program!(64: "pushfq", "btc dword ptr [rsp], 12", "popfq"), // IOPL
        program!(64: "btc r15, 12"),                                // in R11 for SYSRET: IOPL, AC, TF, NT
        program!(64: "btc r15, 18"),
        program!(64: "btc r15, 8"),
        program!(64: "btc r15, 14"),
        program!(64: "btc r15, 9"),
        program!(64: "btc r14, 47"), // in RCX
        program!(64: "out 0x80, al"),
        program!(64: "out 0x80, al"),
        // Back by IRET: as SYSRET would, with RF, with IF changed; to CPL 0 with a null SS and with RF.
        program!(64: "push 0x2B", "push r12", "push r15", "push 0x33", "push r14", "iretq"),
        program!(64: "push 0x2B", "push r12", "push r15", "push 0x33", "push r14", "iretq"),
        program!(64: "push 0x2B", "push r12", "push r15", "bts qword ptr [rsp], 16", "push 0x33", "push r14", "iretq"),
        program!(64: "push 0x2B", "push r12", "push r15", "btc qword ptr [rsp], 9", "push 0x33", "push r14", "iretq"),
        program!(64: "push 0x2B", "push r12", "push r15", "push 0x23", "push r14", "iretq"),
        program!(64: "mov rdx, rsp", "push 0", "push rdx", "pushfq", "push 0x10", "lea rax, [rip + 2f]", "push rax", "iretq", "2:"),
        program!(64: "mov rdx, rsp", "push 0x18", "push rdx", "pushfq", "bts qword ptr [rsp], 16", "push 0x10", "lea rax, [rip + 2f]", "push rax", "iretq", "2: mov eax, ss"),
        // Segments that IRET takes away; descriptors of the program's code and stack that change under it.
        program!(64: "mov eax, 0x18", "mov ds, eax", "mov fs, eax"),
        program!(64: "mov eax, 0x2B", "mov ds, eax", "mov es, eax"),
        program!(64: "xor byte ptr [0x1036], 0x80"),
        program!(64: "xor byte ptr [0x102E], 0x80"),
        program!(64: "xor byte ptr [0x1035], 0x80"),
        program!(64: "xor byte ptr [0x1035], 0x80", "xor byte ptr [0x1035], 0x80"),
        program!(64: "mov eax, 9", "mov cr8, rax", "mov rdx, cr8"),
        program!(64: "lea rdi, [rip + 2f]", "inc byte ptr [rdi + 1]", "2: mov dl, 3"),
    ]
}

/// A piece without the HLT behind it.
fn body(p: &Program) -> &'static [u8] {
    &p.bytes[..p.bytes.len() - 1]
}

/// What programs and kernels of one kind are made of, and where they run.
pub struct Kind {
    pub start: Start,
    /// Where programs begin; each round at one of these linear addresses.
    pub places: Vec<u64>,
    /// For everybody; that fault, mostly; for programs; for kernels.
    pub lists: [Vec<Program>; 4],
    /// Jumps back to the beginning of the program while it turns; the distance is missing.
    pub turn: Vec<u8>,
    pub enter_kernel: Program,
    pub may_access: Program,
    pub leave_kernel: Program,
    /// Tables and registers before the first run.
    pub prepare: fn(&mut Bed, &mut Random),
    /// CPL 3, before every run.
    pub enter: fn(&mut Bed),
}

/// Draws a program and a kernel; offsets at which the program's pieces begin.
fn draw(kind: &Kind, random: &mut Random) -> (Vec<u8>, Vec<u8>, Vec<u64>) {
    let [common, faulting, user, kernel] = &kind.lists;
    let mut code = Vec::new();
    let mut starts = Vec::new();
    for _ in 0..6 + random.below(14) {
        starts.push(code.len() as u64);
        let list = match random.below(24) {
            0 => faulting,
            1..8 => user,
            _ => common,
        };
        code.extend(body(&list[random.below(list.len() as u64) as usize]));
    }
    code.extend(&kind.turn);
    let back = -(code.len() as i32 + 4);
    code.extend(back.to_le_bytes());
    code.push(0xF4);
    let mut handler = body(&kind.enter_kernel).to_vec();
    if random.below(4) != 0 {
        handler.extend(body(&kind.may_access));
    }
    for _ in 0..1 + random.below(9) {
        let list = match random.below(40) {
            0 => faulting,
            1..28 => kernel,
            _ => common,
        };
        handler.extend(body(&list[random.below(list.len() as u64) as usize]));
    }
    handler.extend(body(&kind.leave_kernel));
    (code, handler, starts)
}

/// Programs of 64-bit code and their kernel behind SYSCALL.
fn long() -> Kind {
    Kind {
        start: Start::Long,
        places: vec![CODE],
        lists: [common(), faulting(), user(), kernel()],
        turn: vec![0x48, 0xFF, 0x0C, 0x25, 0, 8, 0x20, 0, 0x0F, 0x85], // DEC QWORD [TURNS]; JNZ
        enter_kernel: program!(64: "mov r14, rcx", "mov r15, r11", "mov r12, rsp", "mov esp, 0x70000"),
        may_access: program!(64: "stac"),
        leave_kernel: program!(64: "mov rsp, r12", "mov rcx, r14", "mov r11, r15", "sysretq"),
        prepare: prepare_long,
        enter: enter_long,
    }
}

/// What depends on where the program is. Label 770 is the piece's beginning; 1 MiB behind the code is data.
fn relative() -> Vec<Program> {
    vec![
        program!(64: "lea rax, [rip + 2f]", "jmp rax", "2: lea r10, [rip + 2b]", "lea ebx, [rip + 2b]", "lea dx, [rip + 2b]"),
        program!(64: "mov rbx, [rip + 770b + 0x100480]"),
        program!(64: "cmp rax, [rip + 770b + 0x100480]", "mov r11, [rip + 770b + 0x100488]", "adc [rip + 770b + 0x100490], r11"),
        program!(64: "add qword ptr [rip + 770b + 0x1004F1], 5", "inc byte ptr [rip + 770b + 0x1004FF]"),
        program!(64: "movups xmm0, [rip + 770b + 0x100480]", "movaps [rip + 770b + 0x100490], xmm0"),
        program!(64: "push [rip + 770b + 0x100480]", "lea rax, [rip + 2f]", "mov [rip + 770b + 0x1004A0], rax",
            "call [rip + 770b + 0x1004A0]", "jmp 3f", "2: pop rdx", "push rdx", "ret", "3: pop rbx"),
        program!(64: "lea rdx, [rip + 2f]", "mov [rip + 770b + 0x1004A0], rdx", "jmp [rip + 770b + 0x1004A0]", "2:"),
        program!(64: "lock bts dword ptr [rip + 770b + 0x1004A4], eax", "mov eax, 100", "bt [rip + 770b + 0x1004A4], eax", "setc bl"),
        program!(64: "lea rbx, [eip + 770b]", "mov eax, [eip + 770b + 0x100480]"),
        program!(64: "mov rbx, fs:[rip + 770b + 0x100480]", "add gs:[rip + 770b + 0x100488], rbx"),
        program!(64: "mov ecx, 5", "2: add [rip + 770b + 0x1004C8], rcx", "call 3f", "loop 2b", "jmp 4f", "3: ret", "4:"),
        program!(64: "mov rbx, [rip + 770b + 0x102480]"),
        program!(64: "mov rbx, [rip + 770b + 0x103480]"),
        program!(64: "mov rbx, [rip + 770b + 0x100BFC]", "add [rip + 770b + 0x100C00], rbx"),
        program!(64: "call 2f", "2: pop rax", "syscall", "add rax, rcx"),
        program!(64: "ud2"),
    ]
}

/// The program is seen at many linear addresses, on two pages, and comes back now at one, now at another.
fn moving() -> Kind {
    let mut lists = [common(), faulting(), relative(), kernel()];
    lists[2].extend(user());
    let places = [0].into_iter().chain(PLACES).map(|place| place + AT).collect();
    Kind { places, lists, enter: enter_moving, ..long() }
}

fn enter_moving(bed: &mut Bed) {
    only_at(bed, bed.cpu.rip & !0x3FFF_FFFF);
    enter_long(bed);
}

fn prepare_long(bed: &mut Bed, random: &mut Random) {
    bed.put(HANDLERS + 0x400, program!(64: "lea rdx, [rdx + 5]", "iretq").bytes);
    // Interrupts show status flags that nobody reads: they are cleared.
    let handler = program!(64: "and dword ptr [rsp + 16], ~0x8D5", "lea rbx, [rbx + 7]", "iretq");
    bed.put(HANDLERS + 0x600, handler.bytes);
    bed.put(HANDLERS + 0x20, handler.bytes);
    for vector in [1, 6, 7, 8, 10, 11, 12, 13, 14, 17] {
        bed.ist(vector);
    }
    bed.cpu.cr4 |= cr4::FSGSBASE | if random.below(2) == 0 { cr4::PCIDE } else { 0 };
    bed.cpu.msr.star = 0x0023_0010 << 32;
    bed.cpu.msr.lstar = KERNEL;
    bed.cpu.msr.sfmask = random.of(&[0x4_7700, 0x700, 0x200, 0]);
    bed.cpu.msr.kernel_gs_base = DATA + 0x2000;
}

/// Bases of FS and GS stay.
fn enter_long(bed: &mut Bed) {
    // Frames of earlier exceptions hold flags that nobody reads.
    for stack in [IST_STACK, STACK] {
        bed.put(stack - 0x100, &[0; 0x100]);
    }
    let bases = [SegReg::Fs, SegReg::Gs].map(|s| bed.cpu.segment(s).base);
    bed.user();
    bed.cpu.seg[SegReg::Fs as usize].base = if bases[0] == 0 { DATA } else { bases[0] };
    bed.cpu.seg[SegReg::Gs as usize].base = bases[1];
}

/// Memory, tables and registers before the first run.
fn prepare(kind: &Kind, bed: &mut Bed, clean: &[u8], code: &[u8], handler: &[u8], random: &mut Random) {
    bed.put(0, clean);
    bed.put(kind.places[0], code);
    bed.put(KERNEL, handler);
    bed.gate(0x40, 14, 3, HANDLERS + 0x400);
    bed.reset();
    let supervisor = pte::P | pte::RW;
    // A program that changed page tables without a word could tell what is cached.
    let tables = (PAE_ROOT..SPARE).step_by(0x1000);
    for page in
        [0x1000, 0x2000, 0x3000, 0x4000, 0x6_D000, 0x6_F000, 0x5_F000, KERNEL].into_iter().chain(tables)
    {
        bed.map(page, page, supervisor);
    }
    bed.map(DATA + 0x1000, DATA + 0x1000, pte::P | pte::US);
    bed.map(DATA + 0x2000, DATA + 0x2000, supervisor | pte::G);
    let words: Vec<u8> =
        (0..0x4000 / 8).flat_map(|_| (random.next() >> random.below(64)).to_le_bytes()).collect();
    bed.put(DATA, &words);
    bed.cpu.cr4 |= cr4::PGE;
    for (bit, on) in [(cr4::SMEP, 1), (cr4::SMAP, 2)] {
        bed.cpu.cr4 |= if random.below(on + 1) == 0 { bit } else { 0 };
    }
    for r in [gpr::RAX, gpr::RBX, gpr::RDX] {
        bed.cpu.gpr[r] = random.next() >> random.below(64);
        if bed.bits() != 64 {
            bed.cpu.gpr[r] &= 0xFFFF_FFFF;
        }
    }
    (kind.prepare)(bed, random);
    bed.flush();
}

/// The program at `rip`, at CPL 3.
fn enter(kind: &Kind, bed: &mut Bed, rip: u64, rflags: u64) {
    bed.put64(TURNS, 12);
    bed.cpu.rip = rip;
    (kind.enter)(bed);
    bed.cpu.gpr[gpr::RSI] = DATA;
    bed.cpu.gpr[gpr::RSP] = USER_STACK;
    bed.cpu.rflags = rflags | flags::FIXED;
}

/// Everything that is defined and [`remains`] leaves out.
fn rest(bed: &Bed) -> String {
    let c = &bed.cpu;
    let xmm = &c.fpu.0[160..160 + 48];
    format!(
        "{:x?} {:x?} {:x} {:x} {:x?} {:x?}",
        c.dr,
        c.msr,
        c.efer,
        c.xcr0,
        xmm,
        &c.fpu.0[576 + 32..576 + 48]
    )
}

/// Runs seed `seed` in both; how many ends were compared.
fn compare(kind: &Kind, beds: &mut [Bed; 2], clean: &[u8], seed: u64) -> usize {
    let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let (code, handler, starts) = draw(kind, &mut random);
    let data = random.next() | 1;
    for bed in beds.iter_mut() {
        prepare(kind, bed, clean, &code, &handler, &mut Random(data));
    }
    let mut rip = kind.places[0];
    for round in 0..8 {
        let plain = random.below(3) != 0;
        let rflags = if plain { random.of(&[0, flags::IF]) } else { random.next() & 0x24_4AD5 };
        let nmi = random.below(3) == 0;
        let results = beds.each_mut().map(|bed| {
            enter(kind, bed, rip, rflags);
            if nmi {
                bed.nmi_at_port()
            } else {
                bed.interrupt_at_port(0x60)
            }
            let exit = bed.run_for(Duration::from_millis(300), &format!("seed {seed}"));
            (exit, remains(bed), rest(bed))
        });
        let [a, b] = &results;
        if a.0 == Exit::Stop || b.0 == Exit::Stop {
            return round;
        }
        let note = format!("seed {seed} round {round}\n{:?} {}\n{:?} {}", a.0, a.1.0, b.0, b.1.0);
        assert_eq!((a.0, &a.1.0), (b.0, &b.1.0), "{note}");
        assert_eq!(a.2, b.2, "{note}");
        if let Some(i) = (0..a.1.1.len()).find(|&i| a.1.1[i] != b.1.1[i]) {
            panic!("memory at {i:#x}: {:x?} {:x?} {note}", &a.1.1[i..i + 8], &b.1.1[i..i + 8]);
        }
        if a.0 != Exit::Halt {
            return round + 1;
        }
        rip = random.of(&starts) + random.of(&kind.places);
    }
    8
}

/// Both engines over many seeds. `PARAVANE_MIXED_SEEDS` and `PARAVANE_MIXED_FIRST` for more and others.
pub fn agree(kind: &Kind) -> Bed {
    let number =
        |name: &str, default| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    let (first, count) = (number("PARAVANE_MIXED_FIRST", 1), number("PARAVANE_MIXED_SEEDS", 40));
    let mut beds = [Bed::new(kind.start, false), Bed::new(kind.start, true)];
    let mut clean = vec![0; 0x22_0000];
    beds[0].mem.read(paravane_memory::PhysAddr(0), &mut clean).expect("RAM");
    let ends: usize = (first..first + count).map(|seed| compare(kind, &mut beds, &clean, seed)).sum();
    assert!(ends as u64 > count * 4, "only {ends} ends");
    assert!(beds[1].counter("traces").is_some_and(|traces| traces > count / 20), "loops are hot");
    let [_, translated] = beds;
    translated
}

#[test]
fn engines_agree_on_64_bit_kernels_and_programs() {
    agree(&long());
}

#[test]
fn engines_agree_on_programs_that_move() {
    let moved = agree(&moving()).counter("blocks_rebased");
    assert!(moved.is_some_and(|moved| moved > 200), "{moved:?} blocks moved");
}

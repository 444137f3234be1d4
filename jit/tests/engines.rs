//! Small long-mode programs run to HLT by the translator and by the interpreter: both must end in the same state.
//!
//! Invariant of the unsafe lines: a program is the read-only bytes between two labels that the assembler put
//! into one section; the tests only copy them into the guest's memory.

use paravane_cpu::{
    Attention, Board, Budget, CpuState, Engine, Exit, HostFeatures, Interpreter, SegReg, Segment, cr0, cr4,
    efer, flags, gpr, model_by_name,
};
use paravane_jit::{HostVectorUnit, JitOptions, Translator};
use paravane_memory::{GuestMemory, MemoryConfig, PhysAddr, VpIndex};

const CODE: u64 = 0x10_0000;
const STACK: u64 = 0x20_0000;

/// 16 MiB identity-mapped by 4 KiB pages, so that page borders matter, plus the program at [`CODE`].
fn memory(program: &[u8]) -> GuestMemory {
    let m = GuestMemory::new(MemoryConfig::pc(16 << 20)).expect("memory");
    let w = |at: u64, v: u64| m.write(PhysAddr(at), &v.to_le_bytes()).expect("RAM");
    w(0x1000, 0x2000 | 7);
    // The same once more, from FFFF_8000_0000_0000H on.
    w(0x1000 + 256 * 8, 0x2000 | 7);
    w(0x2000, 0x3000 | 7);
    for i in 0..8 {
        w(0x3000 + i * 8, (0x4000 + i * 0x1000) | 7);
        for j in 0..512 {
            w(0x4000 + i * 0x1000 + j * 8, (i << 21 | j << 12) | 7);
        }
    }
    m.write(PhysAddr(CODE), program).expect("RAM");
    for i in 0..0x8000u64 {
        m.write(PhysAddr(0x30_0000 + i), &[(i * 7 + (i >> 8) * 13) as u8]).expect("RAM");
    }
    m
}

fn state() -> CpuState {
    let mut c = CpuState::reset(0);
    c.cr0 = cr0::PE | cr0::PG | cr0::NE | cr0::WP | cr0::ET | cr0::MP;
    c.cr3 = 0x1000;
    c.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    c.xcr0 = 7;
    c.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
    c.seg = [Segment::flat(0x10, 0xC093); 6];
    c.seg[SegReg::Cs as usize] = Segment::flat(8, 0xA09B);
    c.rip = CODE;
    c.gpr[gpr::RSP] = STACK;
    c.gpr[gpr::RSI] = 0x30_0000;
    c.gpr[gpr::RDI] = 0x40_0000;
    c
}

fn run(engine: &mut dyn Engine, mem: &GuestMemory) -> CpuState {
    let mut c = state();
    let exit = engine.run(&mut c, mem, &Board::default(), Budget::UNLIMITED);
    assert_eq!(exit, Exit::Halt, "at {:#x}", c.rip);
    c
}

/// An interpreter, and a translator for `mem` that counts instructions or makes traces.
fn engines(mem: &GuestMemory, count_instructions: bool) -> (Interpreter, Translator) {
    let model = model_by_name("max", &HostFeatures::detect()).expect("model");
    let vector = Box::new(HostVectorUnit::new().expect("vector unit"));
    let interp = Interpreter::new(model.clone(), vector, Attention::default(), VpIndex(0));
    let options = JitOptions { count_instructions, hot_loop: 3, ..JitOptions::default() };
    let jit = Translator::new(model, mem, Attention::default(), VpIndex(0), options).expect("translator");
    (interp, jit)
}

/// Runs `program` in both engines by budgets of 1 to 40 instructions: both stop exactly there, in the same state.
fn agree_in_slices(program: &[u8]) {
    let (a, b) = (memory(program), memory(program));
    let (mut interp, mut jit) = engines(&b, true);
    let (mut x, mut y) = (state(), state());
    let mut random = 1u64;
    loop {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let budget = Budget { instructions: 1 + (random >> 33) % 40 };
        let until = x.instructions + budget.instructions;
        let exits = [
            interp.run(&mut x, &a, &Board::default(), budget),
            jit.run(&mut y, &b, &Board::default(), budget),
        ];
        assert_eq!(exits[0], exits[1], "exits at {:#x} and {:#x}", x.rip, y.rip);
        assert_eq!(x.instructions, y.instructions, "retired instructions at {:#x} and {:#x}", x.rip, y.rip);
        assert_eq!(x.rip, y.rip, "rip after {} instructions", x.instructions);
        assert_eq!(x.gpr, y.gpr, "registers at {:#x}", x.rip);
        if exits[0] == Exit::Halt {
            return;
        }
        assert_eq!(exits[0], Exit::Budget);
        assert_eq!(x.instructions, until, "the budget is exact");
    }
}

/// Runs `program` in both engines and compares registers (flags in `mask`), vector state and memory.
fn agree(program: &[u8], mask: u64) -> CpuState {
    agree_in_slices(program);
    let (counting, tracing) = (agree_at_end(program, mask, true), agree_at_end(program, mask, false));
    assert_eq!(counting.gpr, tracing.gpr);
    tracing
}

fn agree_at_end(program: &[u8], mask: u64, count_instructions: bool) -> CpuState {
    let (a, b) = (memory(program), memory(program));
    let (mut interp, mut jit) = engines(&b, count_instructions);
    let (x, y) = (run(&mut interp, &a), run(&mut jit, &b));
    assert_eq!(x.gpr.map(|v| format!("{v:x}")), y.gpr.map(|v| format!("{v:x}")), "registers");
    assert_eq!(x.rip, y.rip, "rip");
    if count_instructions {
        assert_eq!(x.instructions, y.instructions, "retired instructions");
    }
    assert_eq!(x.rflags & mask, y.rflags & mask, "flags {:#x} {:#x}", x.rflags, y.rflags);
    for i in 0..256 {
        assert_eq!(x.fpu.0[160 + i], y.fpu.0[160 + i], "XMM byte {i}");
    }
    let (mut p, mut q) = (vec![0; 16 << 20], vec![0; 16 << 20]);
    a.read(PhysAddr(0), &mut p).expect("RAM");
    b.read(PhysAddr(0), &mut q).expect("RAM");
    if let Some(i) = (0x10_0000..p.len()).find(|&i| p[i] != q[i]) {
        panic!("memory differs at {i:#x}: {:#x} {:#x}", p[i], q[i]);
    }
    y
}

/// Defines a function that returns the bytes of an assembly program, HLT appended.
macro_rules! program {
    ($name:ident, $($line:literal),+ $(,)?) => {
        mod $name {
            std::arch::global_asm!(
                ".pushsection .rodata",
                concat!(".globl ", stringify!($name), "_start"),
                concat!(".globl ", stringify!($name), "_end"),
                concat!(stringify!($name), "_start:"),
                $($line,)+
                "hlt",
                concat!(stringify!($name), "_end:"),
                ".popsection",
            );
            unsafe extern "C" {
                #[link_name = concat!(stringify!($name), "_start")]
                static START: u8;
                #[link_name = concat!(stringify!($name), "_end")]
                static END: u8;
            }
            pub(super) fn bytes() -> &'static [u8] {
                let (start, end) = (&raw const START, &raw const END);
                // SAFETY: both labels lie in one section, `end` after `start`.
                unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
            }
        }
    };
}

program!(
    t_sum,
    "xor eax, eax",
    "mov ecx, 1000",
    "2: add rax, [rsi + rcx*8]",
    "mov [rdi + rcx*8 + 3], rax",
    "adc r10, [rsi + rcx*8 + 1]",
    "xor r15, r10",
    "dec ecx",
    "jnz 2b",
);

#[test]
fn sums_and_copies() {
    agree(t_sum::bytes(), flags::STATUS);
}

program!(
    t_calls,
    "mov edi, 12",
    "call 3f",
    "mov r13, rax",
    "lea r14, [rip + 3f]",
    "mov edi, 9",
    "call r14",
    "push r13",
    "push 0x12345678",
    "pop r12",
    "pop r11",
    "jmp 9f",
    "3: push rbp",
    "mov rbp, rsp",
    "push rbx",
    "sub rsp, 24",
    "mov ebx, edi",
    "mov eax, edi",
    "cmp edi, 1",
    "jle 4f",
    "lea edi, [rbx - 1]",
    "call 3b",
    "mov [rsp + 8], rax",
    "lea edi, [rbx - 2]",
    "call 3b",
    "add rax, [rsp + 8]",
    "4: add rsp, 24",
    "pop rbx",
    "leave",
    "ret",
    "9:",
);

#[test]
fn calls_stack_and_memory_homed_registers() {
    let s = agree(t_calls::bytes(), flags::STATUS);
    assert_eq!(s.gpr[13], 144);
    assert_eq!(s.gpr[0], 34);
}

program!(
    t_flags,
    "mov ecx, 300",
    "xor ebx, ebx",
    "2: mov rax, [rsi + rcx*4]",
    "add rax, [rsi + rcx*8]",
    "mov rdx, [rsi + rcx]",
    "mov [rdi + rcx*2], rdx",
    "adc rbx, 0",
    "call 3f",
    "setc r8b",
    "sbb r9, [rsi + rcx*4 + 5]",
    "lea rcx, [rcx - 1]",
    "jrcxz 5f",
    "jmp 2b",
    "3: cmp rdx, rax",
    "push rdx",
    "pop r15",
    "ret",
    "5:",
);

#[test]
fn flags_live_across_memory_and_calls() {
    agree(t_flags::bytes(), flags::STATUS);
}

program!(
    t_vec,
    "mov ecx, 4100",
    "2: movdqu xmm1, [rsi + rcx]",
    "vmovdqu ymm2, [rsi + rcx + 7]",
    "paddd xmm0, xmm1",
    "vpaddq ymm3, ymm3, ymm2",
    "movdqu [rdi + rcx], xmm0",
    "movq xmm4, [rsi + rcx]",
    "cvtsi2sd xmm5, qword ptr [rsi + rcx]",
    "addsd xmm6, xmm5",
    "fild qword ptr [rsi + rcx]",
    "fstp tbyte ptr [rdi + rcx + 3]",
    "dec ecx",
    "jnz 2b",
);

#[test]
fn vectors_cross_pages_unaligned() {
    agree(t_vec::bytes(), flags::STATUS);
}

program!(
    t_smc,
    "mov ecx, 50",
    "xor eax, eax",
    "lea rbx, [rip + 3f]",
    "2: mov [rbx + 1], ecx",
    "3: mov edx, 0x11111111",
    "add eax, edx",
    "dec ecx",
    "jnz 2b",
);

#[test]
fn code_that_patches_itself() {
    let s = agree(t_smc::bytes(), flags::STATUS);
    assert_eq!(s.gpr[0], (1..=50).sum::<u64>());
}

program!(
    t_revived,
    "lea rbx, [rip + 3f]",
    "mov ecx, 0x7FFFFFFF",
    "add ecx, 1",
    "mov word ptr [rbx], 0x5A9C", // pushfq; pop rdx
    "3: sub edx, edx",
);

/// Flags are dead before a SUB; then their own block overwrites it with what reads them. Under a budget, as by the
/// instruction clock and in lockstep, they are right; otherwise they are a known deviation (`cpu/DEVIATIONS.md`), and all
/// else is right.
#[test]
fn code_that_overwrites_what_made_flags_dead() {
    let program = t_revived::bytes();
    agree_in_slices(program);
    let but_flags = |c: &CpuState| {
        let mut gpr = c.gpr;
        gpr[2] &= !flags::STATUS;
        (gpr, c.rip)
    };
    for count_instructions in [true, false] {
        let (a, b) = (memory(program), memory(program));
        let (mut interp, mut jit) = engines(&b, count_instructions);
        let (x, y) = (run(&mut interp, &a), run(&mut jit, &b));
        // 7FFFFFFFH + 1.
        assert_eq!(x.gpr[2] & flags::STATUS, flags::OF | flags::SF | flags::AF | flags::PF);
        assert_eq!(but_flags(&x), but_flags(&y));
    }
}

program!(
    t_beside,
    "lea rsi, [rip + 30f]",
    "mov ecx, 300",
    "2: mov [rsi], rcx",
    "call 3f",
    "dec ecx",
    "jnz 2b",
    "jmp 77f",
    "3: add rax, [rsi]",
    "ret",
    ".skip 128",
    "30: .quad 0",
    "77:",
);

#[test]
fn a_store_beside_code_leaves_it_alone() {
    let s = agree(t_beside::bytes(), flags::STATUS);
    assert_eq!(s.gpr[0], (1..=300).sum::<u64>());
    let mem = memory(t_beside::bytes());
    let (_, mut jit) = engines(&mem, true);
    run(&mut jit, &mem);
    let counter = |name: &str| jit.counters().into_iter().find(|(n, _)| n == name).expect("counted").1;
    assert_eq!(counter("blocks_invalidated"), 0);
    assert!(counter("delta_miss_code") >= 300, "the stores did go to a page of code");
}

program!(
    t_high,
    "mov ecx, 200",
    "2: mov ah, [rsi + rcx]",
    "add [rdi + rcx], ah",
    "xor bh, ah",
    "mov dh, [rsi + rcx*2 + 1]",
    "cmp dh, [rsi]",
    "adc al, dh",
    "mov r12w, [rsi + rcx]",
    "movzx r13d, r12b",
    "xchg [rdi + rcx*4], r13",
    "lock xadd [rdi + rcx*8], r14",
    "bts qword ptr [rdi], 5",
    "cmpxchg [rdi + rcx], r11b",
    "dec ecx",
    "jnz 2b",
);

#[test]
fn high_bytes_and_partial_registers() {
    agree(t_high::bytes(), flags::STATUS);
}

program!(
    t_str,
    "mov ecx, 5000",
    "rep movsb",
    "mov ecx, 100",
    "mov eax, 0x5A5A",
    "rep stosq",
    "mov rax, 0x123456789ABCDEF",
    "xor edx, edx",
    "mov r12d, 977",
    "div r12",
    "mov r10, rdx",
    "idiv qword ptr [rip + 4f]",
    "jmp 5f",
    "4: .quad 12345",
    "5: bsf r9, rax",
    "popcnt r8, rax",
    "pdep r11, rax, r12",
    "mulx r14, r15, [rsi]",
);

#[test]
fn string_instructions_and_division() {
    agree(t_str::bytes(), flags::CF | flags::ZF | flags::SF);
}

program!(
    t_system,
    "mov ecx, 300",
    "2: pushfq",
    "pop rax",
    "add rbx, rax",
    "cmp rcx, 77",
    "pushfq",
    "sti",
    "cli",
    "popfq",
    "setb dl",
    "adc r9, 0",
    "stosb",
    "lodsd",
    "movsq",
    "scasd",
    "cmpsb",
    "adc r10, 1",
    "mov r11, rcx",
    "imul r11, r11, 13",
    "xor eax, eax",
    "bts [rdi + 100], r11",
    "adc r8, 0",
    "xor eax, eax",
    "lock btr dword ptr [rdi + 64], ecx",
    "adc r8, r8",
    "cmp rcx, 100",
    "bt [rdi + 64], rax",
    "cmovz r13, rcx",
    "adc r8, 3",
    "cmp rcx, 130",
    "btc dword ptr [rdi + 72], r11d",
    "cmovz r14, rcx",
    "dec ecx",
    "jnz 2b",
);

#[test]
fn flag_images_strings_and_bit_strings() {
    agree(t_system::bytes(), flags::STATUS);
}

program!(
    t_rep,
    "mov r8d, 700",
    "2: mov rsi, 0x300000",
    "lea rsi, [rsi + r8*4]",
    "mov rdi, 0x400F00",
    "add rdi, r8",
    "mov ecx, r8d",
    "and ecx, 127",
    "cmp r8d, 350",
    "rep movsb",
    "setb r10b",
    "mov ecx, r8d",
    "and ecx, 63",
    "lea rdi, [rdi + r8*8]",
    "mov rax, 0x1122334455667788",
    "rep stosq",
    "mov ecx, 3",
    "mov rsi, rdi",
    "sub rsi, 17",
    "rep movsw",
    "adc r9, rdi",
    "dec r8d",
    "jns 2b",
);

#[test]
fn repeated_strings_inside_and_across_pages() {
    agree(t_rep::bytes(), flags::STATUS);
}

program!(
    t_rep_none,
    "mov ebx, 200",
    "2: xor ecx, ecx",
    "cmp rbx, 100",
    "mov rdx, [rdi + rbx*8 + 1]",
    "repe cmpsw",
    "adc r8, 0",
    "lea rax, [rbx - 50]",
    "cmp rax, rbx",
    "mov [rdi + rbx*8], rdx",
    "repne scasb",
    "adc r9, rdx",
    "dec ebx",
    "jnz 2b",
);

#[test]
fn comparing_nothing_leaves_the_flags() {
    let s = agree(t_rep_none::bytes(), flags::STATUS);
    // CMP RBX, 100 borrows for 1 to 99.
    assert_eq!(s.gpr[8], 99);
}

program!(
    t_esp,
    "mov rsp, 0xFFFF800000200F00",
    "mov ecx, 50",
    "mov [rsp + 16], rcx",
    "mov rax, [rsp + 16]",
    "add esp, 8",
    "mov rbx, [rsp + 8]",
    "mov rdx, [rsp + 16]",
    "add [rsp + 32], rbx",
    "mov rsp, 0xFFFF800000200F00",
    "mov rsi, [rsp]",
    "lea rsp, [esp + 8]",
    "mov r8, [rsp + 8]",
    "mov [rsp + 40], r8",
    "add rsp, -0x80000000",
);

#[test]
fn writing_esp_moves_the_stack_to_another_page() {
    let s = agree(t_esp::bytes(), flags::STATUS);
    assert_eq!((s.gpr[3], s.gpr[8]), (50, 50));
    assert_eq!(s.gpr[4], 0x20_0F08u64.wrapping_sub(0x8000_0000));
}

program!(
    t_collision,
    "mov ecx, 100",
    "lea r8, [rip + 3f]",
    "lea r9, [rip + 4f]",
    "2: lea r15, [rip + 5f]",
    "jmp r8",
    "5: cmp al, al",
    "lea rdx, [rbx + 1]",
    "lea r15, [rip + 6f]",
    "jmp r9",
    "6: dec ecx",
    "jnz 2b",
    "jmp 9f",
    "3: xor eax, eax",
    "jmp r15",
    // Where the jump cache has one place for both: 17 times as much is 2^20 + 1.
    ".skip 61676",
    "4: cmovz rbx, rdx",
    "jmp r15",
    "9:",
);

#[test]
fn flags_live_through_a_jump_cache_collision() {
    let at = t_collision::bytes().windows(5).position(|w| w == [0x31, 0xC0, 0x41, 0xFF, 0xE7]).expect("3:");
    assert_ne!(at % 16, 15, "the next multiple of 16 has another place");
    let s = agree(t_collision::bytes(), flags::STATUS);
    assert_eq!(s.gpr[gpr::RBX], 100);
}

program!(
    t_recipes,
    "mov r15d, 24",
    "2:",
    // Each instruction leaves its flags behind in a register; an indirect jump leads to who reads them.
    ".macro read_flags",
    "lea r11, [rip + 1f]",
    "jmp r11",
    "1: pushfq",
    "pop qword ptr [rdi]",
    "lea rdi, [rdi + 8]",
    ".endm",
    ".irp register, al, dl, bpl, ax, r12w, ebx, r13d, rcx, r8, r14",
    "mov rax, [rsi]",
    "mov rbx, [rsi + 8]",
    "mov rcx, [rsi + 16]",
    "mov rdx, [rsi + 24]",
    "mov rbp, [rsi + 32]",
    "mov r8, [rsi + 40]",
    "mov r12, [rsi + 48]",
    "mov r13, [rsi + 56]",
    "mov r14, [rsi + 64]",
    ".irp operation, add, sub, cmp, and, or, xor",
    ".irp operand, 1, -1, 0x7F, -0x80, 0",
    "\\operation \\register, \\operand",
    "read_flags",
    ".endr",
    ".endr",
    "test \\register, \\register",
    "read_flags",
    "xor \\register, \\register",
    "read_flags",
    ".endr",
    ".irp operation, add, sub, cmp, and, test",
    ".irp operand, 0x7FFF, -0x8000, 0x8000, -0x8001, 0x7FFFFFFF, -0x80000000",
    ".irp register, rax, r13",
    "\\operation \\register, \\operand",
    "read_flags",
    ".endr",
    ".endr",
    ".endr",
    ".irp operation, add, sub, cmp, or, test",
    "\\operation rax, rbx",
    "read_flags",
    "\\operation r12d, ecx",
    "read_flags",
    "\\operation bp, r13w",
    "read_flags",
    "\\operation r14b, bl",
    "read_flags",
    "\\operation cl, ch",
    "read_flags",
    "\\operation r8, r8",
    "read_flags",
    ".endr",
    "sub rsp, 24",
    "read_flags",
    "add rsp, 24",
    "read_flags",
    "add ah, 1",
    "read_flags",
    "add rax, rbx",
    "read_flags",
    "test al, 4",
    "read_flags",
    "inc ecx",
    "read_flags",
    ".purgem read_flags",
    "lea rsi, [rsi + 72]",
    "dec r15d",
    "jnz 2b",
);

/// Flags that are put aside as what they come from, and made when somebody reads them.
#[test]
fn flags_from_recipes() {
    agree(t_recipes::bytes(), flags::STATUS);
}

program!(
    t_homes,
    "mov r10, 0x123456789ABCDEF0",
    "mov r12, r10",
    "mov r13, r10",
    "mov r14, r10",
    "mov r15, r10",
    "xor al, al", // what a form does is remembered from its first sight
    "xor r12b, r12b",
    "xor r13b, r12b",
    "sub rbx, rbx",
    "sub r14, r13",
    "xor r15d, r15d",
    "mov r11, r14",
    "mov r8d, 0x1234",
    "mov r11w, r8w",
    "add r10, r11",
    "xadd r10b, r10b",
    "xchg r10, r11",
    "bts r10, r11",
    "lea r12, [r10 + r11*4 + 7]",
    "lea r13d, [r12 + r12]",
    "lea ebx, [r13*2 - 1]",
    "movzx r14d, r13w",
    "cmovs r14d, r12d",
    "movsxd r9, r14d",
    "shl r14, 3",
    "rcr r12b, 1",
    "setc r13b",
    "imul r15, r14, 77",
    "neg r15",
    "movq xmm3, r15",
    "pextrw r12d, xmm3, 1",
    "cvtsi2sd xmm4, r13",
);

#[test]
fn registers_in_memory_as_operands() {
    agree(t_homes::bytes(), flags::STATUS);
}

program!(
    t_traces,
    "mov r9d, 40",
    "1: mov ecx, 700",
    "2: mov rax, [rsi + 8]",
    "add rsi, 24",
    "movzx ebx, byte ptr [rsi - 1]",
    "inc rdi",
    "mov [rdi + 7], bl",
    "add [rdi + 8], rax",
    "dec rcx",
    "test bl, 1",
    "jz 3f",
    "lea rdi, [rdi + 2]",
    "add r10, [rdi - 9]",
    "adc r11, [rsi - 40]",
    "jmp 4f",
    "3: xor rdx, rax",
    "cmp bl, 77",
    "ja 4f",
    "push rdx",
    "sub rsp, 16",
    "mov [rsp + 3], rbx",
    "add rsp, 16",
    "pop rbp",
    "4: setc r8b",
    "sbb r15, [rdi - 3]",
    "test ecx, ecx",
    "jg 2b",
    "sub rsi, 16800",
    "sub rdi, 900",
    "dec r9d",
    "jnz 1b",
);

#[test]
fn loops_with_branches_become_traces() {
    agree(t_traces::bytes(), flags::STATUS);
    let m = memory(t_traces::bytes());
    let (_, mut jit) = engines(&m, false);
    run(&mut jit, &m);
    let traces = jit.counters().into_iter().find(|c| c.0 == "traces").map(|c| c.1);
    assert!(traces > Some(1), "{traces:?}");
}

//! Guests that run wild: whatever they do, they are answered from their own memory or by a fault.
//!
//! The host must not be harmed, read, or kept busy for ever: no crash of this process, canaries around stay as they
//! are, a secret in this process never shows up in the guest, and STOP is always heard.

use crate::bed::{Bed, CODE, DATA, HANDLERS, MAPPED, PD, PT, Program, Start, both};
use paravane_cpu::{SegReg, flags, gpr};
use paravane_memory::PhysAddr;
use std::time::Duration;

const STARTS: [Start; 6] =
    [Start::Long, Start::Compat, Start::Pae, Start::Paged32, Start::Protected, Start::Real];
const MEMORY: usize = 32 << 20;
const CANARY: usize = 64 << 10;

/// xorshift64*.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    pub fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }
}

/// Host memory beside the guest's, filled with what no guest can know.
struct Canaries {
    blocks: Vec<Box<[u64]>>,
    secret: u64,
}

impl Canaries {
    fn new() -> Canaries {
        let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
        let secret = Random(time.as_nanos() as u64 | 1).next() | 0x8100_0000_0000_0081;
        let blocks = (0..4).map(|_| vec![secret; CANARY / 8].into_boxed_slice()).collect();
        Canaries { blocks, secret }
    }

    fn addresses(&self) -> Vec<u64> {
        self.blocks.iter().map(|b| b.as_ptr() as u64 + CANARY as u64 / 2).collect()
    }

    /// Nothing was written here, and the guest knows nothing.
    fn check(&self, bed: &Bed, note: &str) {
        assert!(self.blocks.iter().flatten().all(|&v| v == self.secret), "a canary died: {note}");
        assert!(!bed.cpu.gpr.contains(&self.secret), "a register holds host memory: {note}");
    }

    /// [`Self::check`], with a search through all guest memory.
    fn check_memory(&self, bed: &Bed, note: &str) {
        self.check(bed, note);
        let mut all = vec![0; MEMORY];
        bed.mem.read(PhysAddr(0), &mut all).expect("RAM");
        let secret = self.secret.to_le_bytes();
        let mut rest = &all[..];
        while let Some(at) = rest.iter().position(|&b| b == secret[0]) {
            assert!(!rest[at..].starts_with(&secret), "guest memory holds host memory: {note}");
            rest = &rest[at + 1..];
        }
    }
}

/// Addresses in this process: of every mapping the first, a middle and the last bytes.
fn host_addresses() -> Vec<u64> {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    let mut list = Vec::new();
    for line in maps.lines() {
        let range = line.split(' ').next().unwrap_or_default();
        let Some((a, b)) = range.split_once('-') else { continue };
        let (Ok(a), Ok(b)) = (u64::from_str_radix(a, 16), u64::from_str_radix(b, 16)) else { continue };
        list.extend([a, a + (b - a) / 2, b.wrapping_sub(16)]);
    }
    list
}

/// Addresses for 64-bit guests: this process's, what would reach it with the delta of a guest page, and oddities.
fn targets(bed: &Bed, canaries: &Canaries) -> Vec<u64> {
    let base = bed.mem.host_base() as u64;
    let mut list = host_addresses();
    list.extend(canaries.addresses());
    let stack = 0u64;
    list.push(&raw const stack as u64);
    for at in list.clone() {
        list.push(at.wrapping_sub(base));
        list.push(at.wrapping_sub(base) | 0xFFFF << 48);
        list.push(at | 1 << 63);
        list.push(at ^ 0xFFFF << 48);
    }
    for bit in 24..64 {
        list.extend([
            1 << bit,
            (1 << bit) - 1,
            (1 << bit) - 8,
            DATA | 1 << bit,
            !(1u64 << bit),
            u64::MAX << bit,
        ]);
    }
    list.extend([u64::MAX, u64::MAX - 7, u64::MAX - 4096, 0x7FFF_FFFF_FFFF, 0xFFFF_7FFF_FFFF_FFF8]);
    // Not what the guest has.
    list.retain(|at| (MAPPED + 0x200..=u64::MAX - 0x10_0000).contains(at));
    list
}

/// Accesses at RSI, each in another form. The marked instruction is the one that must fault.
fn forms() -> Vec<Program> {
    vec![
        program!(64: ; "mov rax, [rsi]"),
        program!(64: ; "mov [rsi], rax"),
        program!(64: ; "mov al, [rsi]"),
        program!(64: ; "mov [rsi], ah"),
        program!(64: ; "movzx eax, word ptr [rsi]"),
        program!(64: "xor ecx, ecx"; "mov eax, [rsi + rcx * 8]"),
        program!(64: "mov rcx, rsi", "mov ebx, 0"; "add [rbx + rcx], eax"),
        program!(64: "lea rbx, [rsi - 0x70000000]"; "mov rax, [rbx + 0x70000000]"),
        program!(64: "lea rbx, [rsi + 0x70000000]"; "mov [rbx - 0x70000000], rax"),
        program!(64: "mov r12, rsi", "stc"; "adc rax, [r12]"),
        program!(64: "mov r13, rsi", "stc"; "adc [r13], rax"),
        program!(64: ; "xchg [rsi], rax"),
        program!(64: ; "lock xadd [rsi], rax"),
        program!(64: ; "lock cmpxchg [rsi], rcx"),
        program!(64: ; "movups xmm0, [rsi]"),
        program!(64: ; "movups [rsi], xmm0"),
        program!(64: ; "vmovdqu ymm0, [rsi]"),
        program!(64: ; "vpaddd ymm1, ymm0, [rsi]"),
        program!(64: ; "movnti [rsi], rax"),
        program!(64: "fldz"; "fstp tbyte ptr [rsi]"),
        program!(64: ; "fld qword ptr [rsi]"),
        program!(64: ; "bts dword ptr [rsi], 3"),
        program!(64: "mov rdi, rsi", "mov al, 0", "mov ecx, 16"; "repne scasb"),
        program!(64: "mov rbx, rsi", "xor eax, eax"; "xlatb"),
        program!(64: ; "push qword ptr [rsi]"),
        program!(64: ; "pop qword ptr [rsi]"),
        program!(64: ; "call qword ptr [rsi]"),
        program!(64: ; "jmp qword ptr [rsi]"),
        program!(64: ; "fnsave [rsi]"),
        program!(64: ; "fldenv [rsi]"),
        program!(64: ; "stmxcsr [rsi]"),
        program!(64: "mov rdi, rsi", "pcmpeqd xmm1, xmm1"; "maskmovdqu xmm0, xmm1"),
        program!(64: "vpcmpeqd ymm1, ymm1, ymm1"; "vmaskmovps [rsi], ymm1, ymm0"),
        program!(64: ; "crc32 eax, byte ptr [rsi]"),
        program!(64: ; "mulx rax, rbx, [rsi]"),
        program!(64: ; "prefetcht0 [rsi]"),
        // One check for several accesses, with margins on both sides.
        program!(64: ; "mov rax, [rsi]", "mov rbx, [rsi + 8]", "mov [rsi + 0x40], rcx", "mov [rsi - 0x100], edx", "movups xmm0, [rsi + 0x1F0]"),
        program!(64: ; "mov [rsi], rax", "mov [rsi + 0x7F8], rbx", "mov rcx, [rsi - 0x7F8]", "add [rsi + 0x10], edx"),
        program!(64: "lea rbx, [rsi - 0x1000]"; "mov eax, [rbx + 0x1000]", "mov [rbx + 0x1800], eax", "mov [rbx + 0x800], rax"),
        program!(64: "lea rdx, [rsi]", "xor ecx, ecx"; "mov rax, [rdx + rcx * 4]", "mov [rdx + rcx * 4 + 8], rax", "mov [rdx + rcx * 4 + 0x30], rax"),
        // A hot loop whose base becomes one of the host's addresses.
        program!(64: "mov edi, 0x200800", "mov ecx, 40", "2: cmp ecx, 5", "cmove rdi, rsi"; "mov rax, [rdi]", "mov [rdi + 8], rax", "mov [rdi + 0x20], rbx",
            "dec ecx", "jnz 2b"),
        program!(64: "mov edi, 0x200800", "mov ecx, 40", "2: cmp ecx, 5", "cmove rdi, rsi"; "mov [rdi], rax", "add rdi, 8", "mov rbx, [rdi - 0x10]", "movups [rdi + 0x60], xmm0",
            "dec ecx", "jnz 2b"),
    ]
}

#[test]
fn host_addresses_are_nothing_to_a_guest() {
    at_host_addresses(&forms(), |_| true);
}

/// Runs each program with RSI at addresses of the host that are `reached`, after one round at a good address.
fn at_host_addresses(programs: &[Program], reached: impl Fn(u64) -> bool) {
    both(Start::Long, |bed| {
        let canaries = Canaries::new();
        let targets = targets(bed, &canaries);
        let mut random = Random(77);
        for program in programs {
            let hint = program.bytes.starts_with(&[0x0F, 0x18]);
            // The guest knows a page there, and the code is translated.
            bed.reset();
            bed.cpu.gpr[gpr::RSI] = DATA + 0x800;
            bed.load(program);
            bed.go();
            for &at in targets.iter().filter(|&&at| reached(at) && random.below(4) == 0) {
                bed.reset();
                bed.cpu.gpr[gpr::RSI] = at;
                let note = format!("{:02x?} at {at:#x}", program.bytes);
                bed.run(program);
                canaries.check(bed, &note);
                if hint {
                    continue;
                }
                let t = bed.taken();
                assert_eq!(t.rip, CODE + program.at, "{note}");
                match t.vector {
                    14 => {
                        assert!(bed.cpu.cr2.wrapping_sub(at & !7) < 0x208, "{note}: CR2 {:#x}", bed.cpu.cr2)
                    }
                    13 => {
                        assert!(!is_canonical(at) || !is_canonical(at.wrapping_add(0x200)), "{note}: {t:x?}")
                    }
                    _ => panic!("{note}: {t:x?}"),
                }
            }
        }
        canaries.check_memory(bed, "accesses");
    });
}

fn is_canonical(at: u64) -> bool {
    ((at << 16) as i64 >> 16) as u64 == at
}

#[test]
fn stacks_and_branches_at_host_addresses() {
    both(Start::Long, |bed| {
        let canaries = Canaries::new();
        // Faults come with a good stack.
        for v in [12, 13, 14] {
            bed.ist(v);
        }
        let programs = [
            program!(64: "mov rsp, rsi"; "push rax"),
            program!(64: "mov rsp, rsi"; "pop rax"),
            program!(64: "mov rsp, rsi"; "call 2f", "2:"),
            program!(64: "mov rsp, rsi"; "ret"),
            program!(64: "mov rsp, rsi"; "pushfq"),
            program!(64: "mov rbp, rsi"; "leave"),
            program!(64: "mov rsp, rsi"; "enter 16, 0"),
            program!(64: "mov rsp, rsi"; "mov rax, [rsp + 8]"),
            program!(64: "mov rsp, rsi"; "iretq"),
        ];
        for at in targets(bed, &canaries) {
            for program in &programs {
                bed.reset();
                bed.cpu.gpr[gpr::RSI] = at;
                let note = format!("{:02x?} at {at:#x}", program.bytes);
                bed.run(program);
                canaries.check(bed, &note);
                let t = bed.taken();
                assert!(matches!(t.vector, 12 | 14), "{note}: {t:x?}");
                assert_eq!(t.rip, CODE + program.at, "{note}");
            }
            bed.reset();
            bed.cpu.gpr[gpr::RSI] = at;
            bed.run(&program!(64: "nop"; "jmp rsi"));
            let t = bed.taken();
            match t.vector {
                13 => assert_eq!(t.rip, CODE + 1, "{at:#x}"),
                14 => assert_eq!((t.rip, bed.cpu.cr2), (at, at)),
                _ => panic!("{at:#x}: {t:x?}"),
            }
        }
        canaries.check_memory(bed, "stacks");
    });
}

#[test]
fn segment_bases_at_host_addresses() {
    both(Start::Long, |bed| {
        let canaries = Canaries::new();
        for at in targets(bed, &canaries).into_iter().filter(|&at| is_canonical(at)) {
            for program in [
                program!(64: ; "mov rax, gs:[0x10]"),
                program!(64: ; "mov gs:[rcx], rax"),
                program!(64: "mov ecx, 8"; "add gs:[rcx * 8 + 0x20], eax"),
                program!(64: ; "lock inc dword ptr gs:[0x70]"),
            ] {
                bed.reset();
                bed.cpu.seg[SegReg::Gs as usize].base = at;
                bed.run(&program);
                canaries.check(bed, "GS");
                assert!(matches!(bed.taken().vector, 13 | 14), "{at:#x}: {:x?}", bed.taken());
            }
        }
        canaries.check_memory(bed, "GS");
    });
}

#[test]
fn addresses_of_32_bit_code_stay_below_4_gib() {
    for start in [Start::Pae, Start::Paged32, Start::Compat] {
        both(start, |bed| {
            let canaries = Canaries::new();
            let mut random = Random(5);
            for _ in 0..300 {
                let at = (random.next() as u32 | 0x0200_0000) & 0xFFFF_0FFF;
                for program in [
                    program!(32: "lea ebx, [esi + 0x70000000]"; "mov eax, [ebx - 0x70000000]"),
                    program!(32: "lea ebx, [esi - 0x70000000]"; "mov [ebx + 0x70000000], eax"),
                    program!(32: "mov ecx, esi", "shr ecx, 3", "and esi, 7"; "mov eax, [esi + ecx * 8]"),
                    program!(32: "mov ecx, 0x30000000", "sub esi, 0x80000000", "sub esi, 0x40"; "movups xmm0, [esi + ecx * 8 + 0x40]"),
                ] {
                    bed.reset();
                    bed.cpu.gpr[gpr::RSI] = u64::from(at);
                    bed.run(&program);
                    canaries.check(bed, "32-bit");
                    let t = bed.taken();
                    assert_eq!((t.vector, t.rip), (14, CODE + program.at), "{at:#x} {:02x?}", program.bytes);
                    assert!(
                        bed.cpu.cr2 as u32 == at || bed.cpu.cr2 & 0xFFF == 0,
                        "{at:#x} {:#x}",
                        bed.cpu.cr2
                    );
                }
            }
            canaries.check_memory(bed, "32-bit");
        });
    }
}

/// Opcodes with a ModRM byte that reach memory.
const MEMORY_OPCODES: [&[u8]; 24] = [
    &[0x8B],
    &[0x89],
    &[0x88],
    &[0x8A],
    &[0x01],
    &[0x03],
    &[0x11],
    &[0x39],
    &[0x87],
    &[0x63],
    &[0x8D],
    &[0xFF],
    &[0xC7],
    &[0x81],
    &[0xD9],
    &[0xDD],
    &[0xDB],
    &[0x0F, 0x10],
    &[0x0F, 0x11],
    &[0x0F, 0xB6],
    &[0x0F, 0xAB],
    &[0x0F, 0xC1],
    &[0x0F, 0xAE],
    &[0x0F, 0xC7],
];
/// System instructions and others that change much.
const HEAVY: [&[u8]; 28] = [
    &[0x0F, 0x22, 0xC0],
    &[0x0F, 0x22, 0xD8],
    &[0x0F, 0x22, 0xE0],
    &[0x0F, 0x01],
    &[0x0F, 0x00],
    &[0x0F, 0x30],
    &[0x0F, 0x23],
    &[0x0F, 0x05],
    &[0x0F, 0x07],
    &[0x0F, 0x34],
    &[0x0F, 0x35],
    &[0xCF],
    &[0x48, 0xCF],
    &[0xCB],
    &[0xCD],
    &[0x8E],
    &[0x9D],
    &[0xF3, 0xA4],
    &[0xF3, 0xAB],
    &[0xF2, 0xAE],
    &[0xFB],
    &[0x0F, 0x01, 0xF8],
    &[0xEA],
    &[0xFF],
    &[0xE8],
    &[0xE9],
    &[0xC3],
    &[0xF4],
];

fn wild_code(random: &mut Random, len: usize) -> Vec<u8> {
    let mut code = Vec::with_capacity(len + 16);
    while code.len() < len {
        match random.below(10) {
            0 => code.extend(&random.next().to_le_bytes()[..4]),
            1 => code.extend(random.of(&HEAVY)),
            2 => code.push(random.of(&[0x66, 0x67, 0xF0, 0xF2, 0xF3, 0x64, 0x65, 0x2E, 0x48, 0x4F, 0x36])),
            3 => code.extend([0x70 | random.below(16) as u8, random.next() as u8]),
            4 => code.extend([0x50 | random.below(16) as u8]),
            _ => {
                if random.below(2) == 0 {
                    code.push(0x48 | random.below(8) as u8);
                }
                code.extend(random.of(&MEMORY_OPCODES));
                code.push(random.next() as u8 & 0xBF);
                code.extend(&random.next().to_le_bytes()[..random.below(5) as usize]);
            }
        }
    }
    code.truncate(len);
    code
}

/// Where registers, tables and handlers may point to.
fn wild_value(random: &mut Random, hosts: &[u64]) -> u64 {
    match random.below(8) {
        0 => random.next(),
        1 => random.of(hosts),
        2 => random.next() & 0xFFFF,
        3 => PT + random.below(0x9000),
        4 => CODE + random.below(0x1_0000),
        5 => u64::MAX - random.below(0x2000),
        _ => DATA + random.below(0x2_0000),
    }
}

/// Bytes of code from [`Bed::code`] on.
fn code_len(start: Start) -> u64 {
    if start == Start::Real { 0x6000 } else { 0x1_0000 }
}

/// Fresh random code and handlers that go on somewhere in it.
fn scatter(bed: &mut Bed, random: &mut Random) {
    let (code, len) = (bed.code(), code_len(bed.start));
    bed.put(code, &wild_code(random, len as usize));
    bed.put(DATA, &wild_code(random, 0x1_0000));
    for v in 0..256 {
        let at = HANDLERS + v * 16;
        let to = code + random.below(len);
        bed.put(at, &[0xE9]);
        bed.put32(at + 1, to.wrapping_sub(at + 5) as u32);
    }
}

/// Frame of the IRET that goes back to wild user code.
const FRAME: u64 = 0x5F00;

/// Wild code at CPL 3 with all below 1 MiB out of its reach; handlers return to another place in it.
fn user_that_goes_on(bed: &mut Bed) {
    let long = matches!(bed.start, Start::Long | Start::Compat);
    let back = if long {
        program!(64: "add dword ptr [0x5F00], 0x35", "and dword ptr [0x5F00], 0xFFFF", "or dword ptr [0x5F00], 0x100000",
            "mov esp, 0x5F00", "iretq")
    } else {
        program!(32: "add dword ptr ss:[0x5F00], 0x35", "and dword ptr ss:[0x5F00], 0xFFFF", "or dword ptr ss:[0x5F00], 0x100000",
            "mov esp, 0x5F00", "iretd")
    };
    bed.put(0x5000, back.bytes);
    for v in 0..256 {
        let at = HANDLERS + v * 16;
        bed.put(at, &[0xE9]);
        bed.put32(at + 1, 0x5000u64.wrapping_sub(at + 5) as u32);
    }
    bed.user();
    let c = &bed.cpu;
    let frame =
        [CODE, u64::from(c.seg[1].selector), flags::FIXED, c.gpr[gpr::RSP], u64::from(c.seg[2].selector)];
    for (i, v) in frame.into_iter().enumerate() {
        if long {
            bed.put64(FRAME + i as u64 * 8, v);
        } else {
            bed.put32(FRAME + i as u64 * 4, v as u32);
        }
    }
    for page in 0..0x100 {
        bed.map(page << 12, page << 12, 3);
    }
    bed.flush();
}

/// Random registers and segment bases; the stack stays good mostly.
fn wild_registers(bed: &mut Bed, random: &mut Random, hosts: &[u64]) {
    for i in 0..16 {
        if i != gpr::RSP || random.below(4) == 0 {
            bed.cpu.gpr[i] = wild_value(random, hosts);
        }
    }
    for s in [SegReg::Fs, SegReg::Gs] {
        bed.cpu.seg[s as usize].base = wild_value(random, hosts) & 0x7FFF_FFFF_FFFF;
    }
    if random.below(4) == 0 {
        bed.cpu.rflags |= random.next() & (flags::DF | flags::AC | flags::NT | flags::IOPL | flags::TF);
    }
    bed.cpu.rip = bed.code() + random.below(code_len(bed.start));
}

fn scramble_tables(bed: &mut Bed, random: &mut Random) {
    for _ in 0..200 {
        bed.put64(PT + random.below(0x1000) * 8, random.next() | random.below(8));
        bed.put64(PD + random.below(8 + 64) * 8, (random.next() & !0xFFF) | PT | random.below(256));
    }
    bed.map(CODE, CODE, 7);
    bed.flush();
}

fn go_wild(start: Start, translated: bool, seed: u64) {
    let canaries = Canaries::new();
    let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut bed = Bed::new(start, translated);
    let mut hosts = host_addresses();
    hosts.extend(canaries.addresses());
    let note = format!("{start:?} {} seed {seed}", if translated { "translator" } else { "interpreter" });
    for round in 0..4u64 {
        bed.restore();
        scatter(&mut bed, &mut random);
        if seed % 3 == 1 && round == 0 {
            scramble_tables(&mut bed, &mut random);
        }
        if round % 2 == 1 && !matches!(start, Start::Real | Start::Protected) {
            user_that_goes_on(&mut bed);
        }
        let template = bed.cpu.clone();
        let mut time = Duration::from_millis(60);
        for _ in 0..50 {
            bed.cpu = template.clone();
            wild_registers(&mut bed, &mut random, &hosts);
            let begun = std::time::Instant::now();
            bed.run_for(time, &note);
            canaries.check(&bed, &note);
            time = time.saturating_sub(begun.elapsed());
            if time.is_zero() {
                break;
            }
        }
    }
    canaries.check_memory(&bed, &note);
}

/// Seeds per mode and engine; `PARAVANE_WILD_SEEDS` and `PARAVANE_WILD_FIRST` for more and others.
fn wild(start: Start) {
    let number =
        |name: &str, default| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    let (first, count) = (number("PARAVANE_WILD_FIRST", 1u64), number("PARAVANE_WILD_SEEDS", 6));
    for seed in first..first + count {
        for translated in [false, true] {
            eprintln!("{start:?} translated {translated} seed {seed}");
            go_wild(start, translated, seed);
        }
    }
}

#[test]
fn random_code_in_64_bit_mode() {
    wild(STARTS[0]);
}

#[test]
fn random_code_in_compatibility_mode() {
    wild(STARTS[1]);
}

#[test]
fn random_code_with_pae() {
    wild(STARTS[2]);
}

#[test]
fn random_code_with_32_bit_tables() {
    wild(STARTS[3]);
}

#[test]
fn random_code_without_paging() {
    wild(STARTS[4]);
}

#[test]
fn random_code_in_real_mode() {
    wild(STARTS[5]);
}

#[test]
fn page_tables_overwritten_by_the_guest() {
    both(Start::Long, |bed| {
        // The guest fills its own tables with the addresses of everything, then walks through them.
        let canaries = Canaries::new();
        let mut random = Random(31);
        for _ in 0..30 {
            let hosts = targets(bed, &canaries);
            bed.reset();
            bed.put64(DATA, random.of(&hosts) & 0x000F_FFFF_FFFF_F000 | 0x87 & random.next() | 1);
            bed.cpu.gpr[gpr::RBX] = random.next();
            let p = program!(64: "mov esi, 0x200000", "mov edi, 0x33000", "add edi, 0x2000", "mov ecx, 512", "mov rax, [rsi]",
                "2: stosq", "add rax, rbx", "dec ecx", "jnz 2b", "mov r8, cr3", "mov cr3, r8",
                "mov esi, 0x400000", "mov ecx, 512", "3: mov rax, [rsi]", "mov [rsi + 8], rax", "add esi, 0x1000", "dec ecx", "jnz 3b");
            bed.load(&p);
            bed.run_for(Duration::from_millis(200), "page tables");
            canaries.check(bed, "page tables");
            for page in 0..512 {
                bed.put64(0x3_5000 + page * 8, (0x40_0000 + page * 4096) | 7);
            }
            bed.flush();
        }
        canaries.check_memory(bed, "page tables");
    });
}

#[test]
fn bit_strings_at_host_addresses() {
    // RCX counts bits: the offset loses its three upper bits.
    let programs = [
        program!(64: "lea rcx, [rsi - 0x200000]", "shl rcx, 3", "mov ebx, 0x200000"; "bt [rbx], rcx"),
        program!(64: "lea rcx, [rsi - 0x200000]", "shl rcx, 3", "mov ebx, 0x200000"; "btc [rbx], rcx"),
    ];
    at_host_addresses(&programs, |at| {
        ((at.wrapping_sub(DATA) << 3) as i64 >> 3) as u64 == at.wrapping_sub(DATA)
    });
}

#[test]
fn repeats_at_host_addresses() {
    let programs = [
        program!(64: "mov rdi, rsi", "mov ecx, 16"; "rep stosb"),
        program!(64: "mov edi, 0x200000", "mov ecx, 16"; "rep movsb"),
        program!(64: "mov rdi, rsi", "mov esi, 0x200000", "mov ecx, 16"; "rep movsq"),
    ];
    at_host_addresses(&programs, |_| true);
}

/// What a run leaves: everything of the processor that is defined, and the memory it most likely touched.
pub fn remains(bed: &Bed) -> (String, Vec<u8>) {
    let c = &bed.cpu;
    let gpr = c.gpr.map(|v| format!("{v:x}")).join(" ");
    let seg = c.seg.map(|s| format!("{:x}:{:x}:{:x}", s.selector, s.base, s.limit)).join(" ");
    let flags = c.rflags & !flags::STATUS;
    let text = format!(
        "rip {:x} flags {flags:x} cr {:x} {:x} {:x} {:x} cpl {} gpr {gpr} seg {seg}",
        c.rip, c.cr0, c.cr2, c.cr3, c.cr4, c.cpl
    );
    let mut memory = vec![0; 0x22_0000];
    bed.mem.read(PhysAddr(0), &mut memory).expect("RAM");
    // The status flags pushed by the exception may be dead ones.
    let word = if matches!(bed.start, Start::Long | Start::Compat) { 8 } else { 4 };
    for slot in [2, 3] {
        if let Some(byte) =
            memory.get_mut((c.gpr[gpr::RSP] + slot * word) as usize..).and_then(|m| m.get_mut(..2))
        {
            byte.fill(0);
        }
    }
    // Accessed bits may be set early (SDM 3A, 4.8). So are dirty bits here, where a misaligned CMPXCHG16B or MOVAPS
    // raises #GP after its page was looked up.
    memory[0x2_F000..0x4_2000].iter_mut().step_by(4).for_each(|b| *b &= !0x60);
    (text, memory)
}

/// Both engines from the same random start to the first exception: they must agree.
fn agree(start: Start, seeds: std::ops::Range<u64>) {
    let mut beds = [Bed::new(start, false), Bed::new(start, true)];
    let mut clean = vec![0; 0x22_0000];
    beds[0].mem.read(PhysAddr(0), &mut clean).expect("RAM");
    let mut compared = 0;
    for seed in seeds {
        let mut results = Vec::new();
        for bed in &mut beds {
            let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
            bed.put(0, &clean);
            bed.put(CODE, &wild_code(&mut random, 0x400));
            bed.reset();
            if seed % 2 == 1 {
                bed.user();
            }
            wild_registers(bed, &mut random, &[0x7FFF_0000_0000]);
            bed.cpu.rip = CODE + random.below(0x100);
            bed.flush();
            let exit = bed.run_for(Duration::from_millis(100), &format!("{start:?} seed {seed}"));
            results.push((exit, remains(bed)));
        }
        let (a, b) = (&results[0], &results[1]);
        if a.0 == paravane_cpu::Exit::Stop || b.0 == paravane_cpu::Exit::Stop {
            continue;
        }
        compared += 1;
        let note = format!("{start:?} seed {seed}\n{:?} {}\n{:?} {}", a.0, a.1.0, b.0, b.1.0);
        assert_eq!((a.0, &a.1.0), (b.0, &b.1.0), "{note}");
        if let Some(i) = (0..a.1.1.len()).find(|&i| a.1.1[i] != b.1.1[i]) {
            panic!("memory at {i:#x}: {:x?} {:x?} {note}", &a.1.1[i..i + 8], &b.1.1[i..i + 8]);
        }
    }
    assert!(compared > 20, "{start:?}: only {compared} ended by themselves");
}

#[test]
fn engines_agree_on_random_code() {
    for start in STARTS {
        agree(start, 1..80);
    }
}

//! Expected values from the manual's definitions of the operations.

use super::*;

struct Bench {
    unit: HostVectorUnit,
    fpu: FpuState,
    gpr: [u64; 16],
    rflags: u64,
    operand: [u8; 512],
}

impl Bench {
    fn new() -> Bench {
        let unit = HostVectorUnit::new().unwrap();
        Bench { unit, fpu: FpuState::initial(), gpr: [0; 16], rflags: 2, operand: [0; 512] }
    }

    fn run(&mut self, code: &[u8]) -> Result<(), Fault> {
        self.unit.execute(code, &mut self.fpu, &mut self.gpr, &mut self.rflags, &mut self.operand)
    }

    fn xmm(&self, number: usize) -> u128 {
        u128::from_le_bytes(self.fpu.0[160 + number * 16..][..16].try_into().unwrap())
    }

    fn set_xmm(&mut self, number: usize, value: u128) {
        self.fpu.0[160 + number * 16..][..16].copy_from_slice(&value.to_le_bytes());
    }
}

#[test]
fn sse_reads_memory_and_writes_registers() {
    let mut b = Bench::new();
    b.set_xmm(1, 0x0000_0005_0000_0006_0000_0007_0000_0008);
    b.operand[..16].copy_from_slice(&0x0000_0001_0000_0001_0000_0001_FFFF_FFFFu128.to_le_bytes());
    b.gpr[0] = 0x1234;
    b.run(&[0x66, 0x0F, 0xFE, 0x08]).unwrap(); // paddd xmm1, [rax]
    assert_eq!(b.xmm(1), 0x0000_0006_0000_0007_0000_0008_0000_0007);
    assert_eq!(b.gpr[0], 0x1234);
}

#[test]
fn general_registers_and_flags_go_in_and_out() {
    let mut b = Bench::new();
    b.gpr = std::array::from_fn(|n| n as u64 * 0x1111);
    b.rflags = flags::FIXED | flags::CF | flags::IF;
    b.run(&[0x4D, 0x11, 0xFE]).unwrap(); // adc r14, r15
    assert_eq!(b.gpr[14], 14 * 0x1111 + 15 * 0x1111 + 1);
    assert_eq!(b.rflags & (flags::CF | flags::IF), flags::IF);
    assert_eq!((b.gpr[4], b.gpr[5], b.gpr[7], b.gpr[3]), (4 * 0x1111, 5 * 0x1111, 7 * 0x1111, 3 * 0x1111));
    b.set_xmm(0, 1.0f64.to_bits().into());
    b.set_xmm(1, 2.0f64.to_bits().into());
    b.run(&[0x66, 0x0F, 0x2F, 0xC1]).unwrap(); // comisd xmm0, xmm1: less sets CF
    assert_eq!(b.rflags & flags::STATUS, flags::CF);
}

#[test]
fn avx_zeroes_the_upper_half() {
    if !std::is_x86_feature_detected!("avx") {
        return;
    }
    let mut b = Bench::new();
    b.fpu.0[576..592].fill(0xFF);
    b.set_xmm(0, 7);
    b.run(&[0xC5, 0xFD, 0x6F, 0xC8]).unwrap(); // vmovdqa ymm1, ymm0
    assert!(b.fpu.0[592..608].iter().all(|&byte| byte == 0xFF));
    b.run(&[0xC5, 0xF8, 0x28, 0xC0]).unwrap(); // vmovaps xmm0, xmm0
    assert!(b.fpu.0[576..592].iter().all(|&byte| byte == 0));
    assert_eq!((b.xmm(0), b.xmm(1)), (7, 7));
}

#[test]
fn x87_keeps_eighty_bits_and_no_host_address() {
    let mut b = Bench::new();
    b.run(&[0xD9, 0xEB]).unwrap(); // fldpi
    assert_eq!(b.fpu.0[32..42], [0x35, 0xC2, 0x68, 0x21, 0xA2, 0xDA, 0x0F, 0xC9, 0x00, 0x40]);
    assert!(b.fpu.0[6..24].iter().all(|&byte| byte == 0));
    b.run(&[0xDB, 0x38]).unwrap(); // fstp tbyte [rax]
    assert_eq!(b.operand[..10], [0x35, 0xC2, 0x68, 0x21, 0xA2, 0xDA, 0x0F, 0xC9, 0x00, 0x40]);
    assert_eq!(b.fpu.0[4], 0, "the stack is empty again");
}

#[test]
fn x87_errors_are_raised_by_the_next_waiting_instruction() {
    let mut b = Bench::new();
    b.fpu.0[0] = 0x7B; // unmask #Z
    b.run(&[0xD9, 0xE8]).unwrap(); // fld1
    b.run(&[0xD9, 0xEE]).unwrap(); // fldz
    b.run(&[0xDE, 0xF9]).unwrap(); // fdivp: pends
    assert_eq!(b.fpu.0[2] & 0x84, 0x84, "ZE and ES");
    assert_eq!(b.run(&[0xD9, 0xE8]), Err(Fault::new(Vector::MF)));
    b.run(&[0xDF, 0xE0]).unwrap(); // fnstsw ax does not wait
    assert_eq!(b.gpr[0] & 0x84, 0x84);
    assert_eq!(b.run(&[0x9B]), Err(Fault::new(Vector::MF)));
    b.run(&[0xDB, 0xE2]).unwrap(); // fnclex
    b.run(&[0x9B]).unwrap();
}

#[test]
fn simd_errors_leave_operands_alone_but_set_their_flag() {
    let mut b = Bench::new();
    b.fpu.set_mxcsr(0x1F80 & !(1 << 9)); // unmask #Z
    b.set_xmm(0, 1.0f64.to_bits().into());
    assert_eq!(b.run(&[0xF2, 0x0F, 0x5E, 0xC1]), Err(Fault::new(Vector::XM))); // divsd xmm0, xmm1
    assert_eq!(b.xmm(0), 1.0f64.to_bits().into());
    assert_eq!(b.fpu.mxcsr() & 0x3F, 1 << 2);
    // The host's own MXCSR still masks it.
    assert!((1.0 / std::hint::black_box(0.0f64)).is_infinite());
}

#[test]
fn divide_error_and_undefined_opcode_are_faults() {
    let mut b = Bench::new();
    assert_eq!(b.run(&[0xF7, 0xF1]), Err(Fault::new(Vector::DE))); // div ecx
    assert_eq!(b.run(&[0x0F, 0x0B]), Err(Fault::UD));
}

#[test]
fn instructions_that_reach_outside_are_refused() {
    let refused: &[&[u8]] = &[
        &[0x0F, 0xF7, 0xC1],             // maskmovq mm0, mm1: [rdi]
        &[0x8B, 0x01],                   // mov eax, [rcx]
        &[0x8B, 0x40, 0x08],             // mov eax, [rax+8]
        &[0x64, 0x8B, 0x00],             // mov eax, fs:[rax]
        &[0x50],                         // push rax
        &[0xC3],                         // ret
        &[0x0F, 0x05],                   // syscall
        &[0x8E, 0xD8],                   // mov ds, eax
        &[0x89, 0xC4],                   // mov esp, eax
        &[0xF3, 0x48, 0x0F, 0xAE, 0xD0], // wrfsbase rax
        &[0xA4],                         // movsb
        &[0x0F, 0xC7, 0x08, 0x90],       // two instructions
        &[0x0F, 0xAE, 0x28],             // xrstor [rax]
        &[0xCC],
        &[],
    ];
    let mut b = Bench::new();
    for code in refused {
        assert_eq!(b.run(code), Err(Fault::UD), "{code:x?}");
    }
}

#[test]
fn many_different_instructions_recycle_their_slots() {
    let mut b = Bench::new();
    for n in 0..2 * STUBS as u32 + 5 {
        let mut code = vec![0xB9]; // mov ecx, n
        code.extend(n.to_le_bytes());
        b.run(&code).unwrap();
        assert_eq!(b.gpr[1], u64::from(n));
    }
}

#[test]
fn a_header_with_garbage_does_no_harm() {
    let mut b = Bench::new();
    b.fpu.0[512..576].fill(0xAB);
    b.fpu.set_mxcsr(u32::MAX);
    b.run(&[0x0F, 0x57, 0xC0]).unwrap(); // xorps xmm0, xmm0
    assert_eq!(b.fpu.mxcsr() & 0xFFFF, 0xFFFF);
}

//! Whole instructions through [`execute`] on a small flat machine; expected values from SDM 2.

use super::execute;
use crate::board::Board;
use crate::cpuid::{HostFeatures, model_by_name};
use crate::engine::{Attention, VectorUnit};
use crate::exec::{Exec, Outcome};
use crate::fault::{Fault, Vector};
use crate::mmu::{Flushes, PagingFeatures, Tlb};
use crate::state::flags::{AF, CF, DF, FIXED, OF, PF, SF, ZF};
use crate::state::gpr::{R8, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP};
use crate::state::{CpuState, FpuState, SegReg, Segment, cr0, cr4, efer};
use iced_x86::{Decoder, DecoderOptions};
use paravane_memory::{GuestMemory, MemoryConfig, PhysAddr, VpIndex};

/// Records what it was given; adds one to RBX and answers memory operands with AAH bytes.
#[derive(Default)]
struct Recorder {
    code: Vec<u8>,
    operand: Vec<u8>,
    rbx: u64,
    xmm: Vec<u8>,
    fault: Option<Fault>,
}

impl VectorUnit for Recorder {
    fn execute(
        &mut self,
        code: &[u8],
        fpu: &mut FpuState,
        gpr: &mut [u64; 16],
        _: &mut u64,
        operand: &mut [u8; 512],
    ) -> Result<(), Fault> {
        self.code = code.to_vec();
        self.operand = operand.to_vec();
        self.rbx = gpr[RBX];
        self.xmm = fpu.0[160..416].to_vec();
        gpr[RBX] = gpr[RBX].wrapping_add(1);
        operand.fill(0xAA);
        self.fault.map_or(Ok(()), Err)
    }
    fn sync(&mut self, _: &mut FpuState, _: VpIndex) {}
    fn changed(&mut self, _: &FpuState, _: VpIndex) {}
}

/// 1 MiB of RAM, flat segments, no paging.
struct Pc {
    bits: u32,
    cpu: CpuState,
    mem: GuestMemory,
    tlb: Tlb,
    unit: Recorder,
}

impl Pc {
    fn new(bits: u32) -> Pc {
        let mut cpu = CpuState::reset(0);
        if bits != 16 {
            cpu.cr0 |= cr0::PE;
            cpu.seg = [Segment::flat(0x10, 0xC093); 6];
        } else {
            cpu.seg = [Segment::real(0); 6];
        }
        let code = if bits == 64 { 0xA09B } else { 0xC09B };
        if bits != 16 {
            cpu.seg[SegReg::Cs as usize] = Segment::flat(8, code);
        }
        if bits == 64 {
            cpu.efer = efer::LME | efer::LMA;
        }
        cpu.cr0 &= !cr0::TS;
        cpu.cr0 |= cr0::NE;
        cpu.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        cpu.xcr0 = 7;
        cpu.rip = 0x1000;
        cpu.gpr[RSP] = 0x8000;
        let mem = GuestMemory::new(MemoryConfig::pc(1 << 20)).expect("memory");
        Pc { bits, cpu, mem, tlb: Tlb::new(PagingFeatures::ALL), unit: Recorder::default() }
    }

    fn with(mut self, n: usize, v: u64) -> Pc {
        self.cpu.gpr[n] = v;
        self
    }

    /// Executes one instruction; RIP moves on unless it faults.
    fn run(&mut self, code: &[u8]) -> Result<(), Fault> {
        let mut decoder = Decoder::with_ip(self.bits, code, self.cpu.rip, DecoderOptions::NONE);
        let instr = decoder.decode();
        assert!(!instr.is_invalid() && instr.len() == code.len(), "{code:02x?} is not one instruction");
        let model = model_by_name("max", &HostFeatures::everything()).expect("model");
        let mut ex = Exec {
            next_rip: instr.next_ip(),
            cpu: &mut self.cpu,
            mem: &self.mem,
            bus: &Board::default(),
            vp: VpIndex(0),
            model: &model,
            attention: &Attention::default(),
            tlb: &mut self.tlb,
            vector: &mut self.unit,
            flushes: &mut Flushes::default(),
            outcome: Outcome::Done,
            debug_hits: 0,
            plan: None,
            watch_hit: None,
            delivering: None,
            failing: "",
            transferred: false,
            branched: false,
            delivered: false,
        };
        execute(&mut ex, &instr, code)?;
        let next = ex.next_rip;
        self.cpu.rip = next;
        Ok(())
    }

    fn ok(&mut self, code: &[u8]) -> &mut Pc {
        assert_eq!(self.run(code), Ok(()), "{code:02x?}");
        self
    }

    fn status(&self) -> u64 {
        self.cpu.rflags & crate::state::flags::STATUS
    }

    fn poke(&self, at: u64, bytes: &[u8]) {
        self.mem.write(PhysAddr(at), bytes).expect("in RAM");
    }

    fn peek(&self, at: u64, len: usize) -> Vec<u8> {
        let mut v = vec![0; len];
        self.mem.read(PhysAddr(at), &mut v).expect("in RAM");
        v
    }
}

#[test]
fn arithmetic_on_registers_and_memory() {
    let mut pc = Pc::new(64).with(RAX, 0xFFFF_FFFF_FFFF_FFFF).with(RBX, 0x2000);
    pc.ok(&[0x83, 0xC0, 0x01]); // add eax,1
    assert_eq!((pc.cpu.gpr[RAX], pc.status()), (0, CF | ZF | PF | AF));
    pc.ok(&[0x80, 0x13, 0x7F]); // adc byte [rbx],7Fh
    assert_eq!((pc.peek(0x2000, 1)[0], pc.status()), (0x80, OF | SF | AF));
    pc.ok(&[0xF0, 0xFF, 0x0B]); // lock dec dword [rbx]
    assert_eq!(pc.peek(0x2000, 4), [0x7F, 0, 0, 0]);
    pc.ok(&[0xF6, 0x13]); // not byte [rbx]: no flags
    assert_eq!((pc.peek(0x2000, 1)[0], pc.status()), (0x80, AF));
    pc.ok(&[0x00, 0xE4]).ok(&[0xB4, 0x12]); // add ah,ah; mov ah,12h
    assert_eq!(pc.cpu.gpr[RAX], 0x1200);
}

#[test]
fn divide_errors_leave_registers_alone() {
    let mut pc = Pc::new(32).with(RAX, 5).with(RDX, 7);
    assert_eq!(pc.run(&[0xF7, 0xF1]), Err(Fault::new(Vector::DE))); // div ecx
    assert_eq!((pc.cpu.gpr[RAX], pc.cpu.gpr[RDX]), (5, 7));
}

#[test]
fn bit_strings_reach_outside_the_operand() {
    let mut pc = Pc::new(64).with(RBX, 0x2000).with(RAX, 100).with(RCX, -1i64 as u64);
    pc.ok(&[0x0F, 0xAB, 0x03]); // bts [rbx],eax
    assert_eq!(pc.peek(0x200C, 4), [0x10, 0, 0, 0]);
    pc.ok(&[0x0F, 0xBB, 0x0B]); // btc [rbx],ecx
    assert_eq!(pc.peek(0x1FFC, 4), [0, 0, 0, 0x80]);
    pc.ok(&[0x0F, 0xBA, 0x23, 0x24]); // bt dword [rbx],24h: bit 4 of the same cell
    assert_eq!(pc.cpu.rflags & CF, 0);
}

#[test]
fn exchanges() {
    let mut pc = Pc::new(64).with(RBX, 0x2000).with(RAX, 0xAAAA_AAAA_0000_0001).with(RCX, 9);
    pc.ok(&[0x0F, 0xB1, 0x0B]); // cmpxchg [rbx],ecx fails: 0 is there
    assert_eq!((pc.cpu.gpr[RAX], pc.status() & ZF), (0, 0));
    pc.ok(&[0xF0, 0x0F, 0xB1, 0x0B]);
    assert_eq!((pc.peek(0x2000, 1)[0], pc.status() & ZF), (9, ZF));
    pc.ok(&[0x0F, 0xC1, 0x0B]).ok(&[0x0F, 0xC1, 0xC9]); // xadd [rbx],ecx; xadd ecx,ecx
    assert_eq!((pc.peek(0x2000, 1)[0], pc.cpu.gpr[RCX]), (18, 18));
    let mut pc = Pc::new(64).with(RSI, 0x2008);
    assert_eq!(pc.run(&[0x48, 0x0F, 0xC7, 0x0E]), Err(Fault::GP0)); // cmpxchg16b, unaligned
    pc.cpu.gpr[RSI] = 0x2010;
    pc.cpu.gpr[RBX] = 7;
    pc.cpu.gpr[RCX] = 8;
    pc.ok(&[0x48, 0x0F, 0xC7, 0x0E]);
    assert_eq!((pc.peek(0x2010, 1)[0], pc.peek(0x2018, 1)[0], pc.status()), (7, 8, ZF));
}

#[test]
fn stack_forms() {
    let mut pc = Pc::new(64).with(RAX, 0x1234);
    pc.ok(&[0x54]); // push rsp: the old value
    assert_eq!(pc.peek(0x7FF8, 2), [0x00, 0x80]);
    pc.ok(&[0x6A, 0xFF]).ok(&[0x66, 0x6A, 0xFE]); // push -1; push word -2
    assert_eq!((pc.cpu.gpr[RSP], pc.peek(0x7FEE, 4)), (0x7FEE, vec![0xFE, 0xFF, 0xFF, 0xFF]));
    pc.ok(&[0x66, 0x58]).ok(&[0x8F, 0x44, 0x24, 0x08]); // pop ax; pop [rsp+8] by the new rsp
    assert_eq!((pc.cpu.gpr[RAX], pc.peek(0x8000, 8)), (0xFFFE, vec![0xFF; 8]));
    pc.ok(&[0x5C]); // pop rsp
    assert_eq!(pc.cpu.gpr[RSP], 0x8000);
    let mut pc = Pc::new(32).with(RBP, 0x9000).with(RAX, 1).with(RDI, 7);
    pc.ok(&[0x60]);
    assert_eq!((pc.cpu.gpr[RSP], pc.peek(0x7FEC, 2)), (0x7FE0, vec![0x00, 0x80]));
    pc.ok(&[0x61]);
    assert_eq!((pc.cpu.gpr[RSP], pc.cpu.gpr[RAX], pc.cpu.gpr[RDI]), (0x8000, 1, 7));
    pc.poke(0x8FFC, &[0x44, 0x33, 0x22, 0x11]);
    pc.ok(&[0xC8, 0x10, 0x00, 0x02]); // enter 16,2
    assert_eq!((pc.cpu.gpr[RBP], pc.cpu.gpr[RSP]), (0x7FFC, 0x7FE4));
    assert_eq!(pc.peek(0x7FF4, 8), [0xFC, 0x7F, 0, 0, 0x44, 0x33, 0x22, 0x11]);
    pc.ok(&[0xC9]);
    assert_eq!((pc.cpu.gpr[RBP], pc.cpu.gpr[RSP]), (0x9000, 0x8000));
}

#[test]
fn near_transfers() {
    let mut pc = Pc::new(64);
    pc.ok(&[0xE8, 0x00, 0x01, 0, 0]); // call +100h
    assert_eq!((pc.cpu.rip, pc.peek(0x7FF8, 2)), (0x1105, vec![0x05, 0x10]));
    pc.ok(&[0xC2, 0x08, 0x00]); // ret 8
    assert_eq!((pc.cpu.rip, pc.cpu.gpr[RSP]), (0x1005, 0x8008));
    pc.cpu.gpr[RAX] = 1 << 47;
    assert_eq!(pc.run(&[0xFF, 0xE0]), Err(Fault::GP0)); // jmp rax
    assert_eq!(pc.run(&[0xFF, 0xD0]), Err(Fault::GP0)); // call rax
    assert_eq!(pc.cpu.gpr[RSP], 0x8008);
    // 16-bit code wraps at 64 KiB, and the limit is checked.
    let mut pc = Pc::new(16);
    pc.cpu.rip = 0xFFF0;
    pc.ok(&[0xEB, 0x20]);
    assert_eq!(pc.cpu.rip, 0x12);
    pc.cpu.seg[SegReg::Cs as usize].limit = 0xFF;
    assert_eq!(pc.run(&[0xE9, 0x00, 0x02]), Err(Fault::GP0));
    let mut pc = Pc::new(64).with(RCX, 0x1_0000_0001);
    pc.ok(&[0x67, 0xE2, 0x10]); // loop on ECX
    assert_eq!((pc.cpu.rip, pc.cpu.gpr[RCX]), (0x1003, 0));
    pc.ok(&[0xE3, 0x10]); // jrcxz
    assert_eq!(pc.cpu.rip, 0x1015);
}

#[test]
fn repeated_moves_match_single_ones() {
    for distance in [1i64, 3, 4, 8, 5000, -1, -3, -4096] {
        for (size, op) in [(1, &[0xF3, 0xA4][..]), (4, &[0xF3, 0xA5]), (8, &[0xF3, 0x48, 0xA5])] {
            let start: Vec<u8> = (0..16384u32).map(|n| (n * 7 % 251) as u8).collect();
            let (from, count) = (0x5003u64, 5000 / size as u64);
            let to = from.wrapping_add_signed(distance);
            let mut want = start.clone();
            for k in 0..count as usize * size {
                // Whole elements are read before they are written.
                let (at, n) = (k / size * size, size);
                if k % size == 0 {
                    let element = want[(from - 0x4000) as usize + at..][..n].to_vec();
                    want[(to - 0x4000) as usize + at..][..n].copy_from_slice(&element);
                }
            }
            let mut pc = Pc::new(64).with(RSI, from).with(RDI, to).with(RCX, count);
            pc.poke(0x4000, &start);
            pc.ok(op);
            assert_eq!(pc.cpu.gpr[RCX], 0);
            assert_eq!(pc.cpu.gpr[RDI], to + count * size as u64);
            assert!(pc.peek(0x4000, 16384) == want, "distance {distance}, size {size}");
        }
    }
}

#[test]
fn a_long_repetition_lets_interrupts_in() {
    let mut pc = Pc::new(64).with(RDI, 0x10000).with(RCX, 0x18000).with(RAX, 0x5A);
    pc.ok(&[0xF3, 0xAA]);
    assert_eq!((pc.cpu.rip, pc.cpu.gpr[RCX], pc.cpu.gpr[RDI]), (0x1000, 0x8000, 0x20000));
    pc.ok(&[0xF3, 0xAA]);
    assert_eq!((pc.cpu.rip, pc.cpu.gpr[RCX], pc.cpu.gpr[RDI]), (0x1002, 0, 0x28000));
    assert!(pc.peek(0x10000, 0x18000).iter().all(|&b| b == 0x5A));
    pc.cpu.rflags |= crate::state::flags::TF;
    pc.cpu.gpr[RCX] = 2;
    pc.ok(&[0xF3, 0xAB]);
    assert_eq!((pc.cpu.rip, pc.cpu.gpr[RCX]), (0x1002, 1));
}

#[test]
fn a_fault_keeps_completed_iterations() {
    // 16-bit addressing: a word at FFFFh is past the limit.
    let mut pc = Pc::new(16).with(RDI, 0xFFFB).with(RCX, 0x1_0005).with(RAX, 0xBEEF);
    let fault = pc.run(&[0xF3, 0xAB]);
    assert_eq!(fault, Err(Fault::GP0));
    assert_eq!((pc.cpu.gpr[RDI], pc.cpu.gpr[RCX]), (0xFFFF, 0x1_0003));
    assert_eq!(pc.peek(0xFFFB, 4), [0xEF, 0xBE, 0xEF, 0xBE]);
}

#[test]
fn string_comparisons() {
    let mut pc = Pc::new(32).with(RSI, 0x2000).with(RDI, 0x3000).with(RCX, 10);
    pc.poke(0x2000, b"abcdef");
    pc.poke(0x3000, b"abcxef");
    pc.ok(&[0xF3, 0xA6]); // repe cmpsb
    assert_eq!((pc.cpu.gpr[RCX], pc.cpu.gpr[RSI], pc.status() & ZF), (6, 0x2004, 0));
    pc.cpu.rflags |= DF;
    pc.cpu.gpr[RAX] = u64::from(b'a');
    pc.ok(&[0xF2, 0xAE]); // repne scasb downwards from 'e'
    assert_eq!((pc.cpu.gpr[RDI], pc.status() & ZF), (0x2FFF, ZF));
    assert_eq!(pc.cpu.gpr[RCX], 1);
}

#[test]
fn flag_instructions() {
    let mut pc = Pc::new(64).with(RAX, 0xFF00);
    pc.cpu.rflags = FIXED | OF;
    pc.ok(&[0x9E]); // sahf keeps OF
    assert_eq!(pc.status(), OF | SF | ZF | AF | PF | CF);
    pc.ok(&[0xF5]).ok(&[0x9F]).ok(&[0xFD]); // cmc; lahf; std
    assert_eq!((pc.cpu.gpr[RAX], pc.cpu.rflags & DF), (0xD600, DF));
}

#[test]
fn boundaries_and_translation_tables() {
    let mut pc = Pc::new(32).with(RBX, 0x2000).with(RAX, 5).with(RCX, 4);
    pc.poke(0x2000, &[0xFE, 0xFF, 0xFF, 0xFF, 4, 0, 0, 0]);
    assert_eq!(pc.run(&[0x62, 0x03]), Err(Fault::new(Vector::BR)));
    pc.ok(&[0x62, 0x0B]).ok(&[0xD7]); // bound ecx,[ebx]; xlat
    assert_eq!(pc.cpu.gpr[RAX], 0);
}

#[test]
fn vector_availability() {
    let addps = [0x0F, 0x58, 0xC1];
    let mut pc = Pc::new(64);
    pc.cpu.cr0 |= cr0::TS;
    assert_eq!(pc.run(&addps), Err(Fault::NM));
    assert_eq!(pc.run(&[0x9B]), Ok(())); // fwait with MP clear
    pc.cpu.cr0 |= cr0::MP;
    assert_eq!(pc.run(&[0x9B]), Err(Fault::NM));
    pc.cpu.cr0 = cr0::PE | cr0::EM;
    assert_eq!(pc.run(&addps), Err(Fault::UD));
    assert_eq!(pc.run(&[0x0F, 0x77]), Err(Fault::UD)); // emms
    assert_eq!(pc.run(&[0xD9, 0xEE]), Err(Fault::NM)); // fldz
    pc.cpu.cr0 = cr0::PE;
    pc.cpu.cr4 = 0;
    assert_eq!(pc.run(&addps), Err(Fault::UD));
    assert_eq!(pc.run(&[0x0F, 0x77]), Ok(()));
    pc.cpu.cr4 = cr4::OSXSAVE;
    pc.cpu.xcr0 = 3;
    assert_eq!(pc.run(&[0xC5, 0xFC, 0x58, 0xC1]), Err(Fault::UD)); // vaddps
    pc.cpu.xcr0 = 7;
    assert_eq!(pc.run(&[0xC5, 0xFC, 0x58, 0xC1]), Ok(()));
}

#[test]
fn vector_operands_are_re_encoded() {
    // (code size, guest bytes, what the unit must get)
    let rows: &[(u32, &[u8], &[u8])] = &[
        (64, &[0x0F, 0x58, 0xC1], &[0x0F, 0x58, 0xC1]),
        // addps xmm9,[r12+r9*2+64h] with FS
        (64, &[0x64, 0x47, 0x0F, 0x58, 0x4C, 0x4C, 0x60], &[0x44, 0x0F, 0x58, 0x08]),
        // addsd xmm1,[bx+si] in 16-bit code
        (16, &[0xF2, 0x0F, 0x58, 0x08], &[0xF2, 0x0F, 0x58, 0x08]),
        // pshufd xmm2,[disp32],1Bh in 32-bit code
        (32, &[0x66, 0x0F, 0x70, 0x15, 0, 0x20, 0, 0, 0x1B], &[0x66, 0x0F, 0x70, 0x10, 0x1B]),
        // vaddps ymm1,ymm2,[eax] with vvvv[3] clear in 32-bit code
        (32, &[0xC5, 0xEC, 0x58, 0x08], &[0xC4, 0xE1, 0x6C, 0x58, 0x08]),
        (64, &[0xC4, 0x41, 0x2C, 0x58, 0xC9], &[0xC4, 0x41, 0x2C, 0x58, 0xC9]),
        (64, &[0xC5, 0xF8, 0x77], &[0xC4, 0xE1, 0x78, 0x77]),
        (64, &[0xD8, 0x44, 0x24, 0x08], &[0xD8, 0x00]),
        // fnstenv [bx] in 16-bit code has the 14-byte format, with 66h the 28-byte one
        (16, &[0xD9, 0x37], &[0x66, 0xD9, 0x30]),
        (16, &[0x66, 0xD9, 0x37], &[0xD9, 0x30]),
        // movd esp,xmm1 and pmovmskb esp,xmm2: RBX stands in
        (64, &[0x66, 0x0F, 0x7E, 0xCC], &[0x66, 0x0F, 0x7E, 0xCB]),
        (64, &[0x66, 0x0F, 0xD7, 0xE2], &[0x66, 0x0F, 0xD7, 0xDA]),
        // cvttsd2si rax,[rcx]
        (64, &[0xF2, 0x48, 0x0F, 0x2C, 0x01], &[0xF2, 0x48, 0x0F, 0x2C, 0x18]),
        // pcmpestri xmm1,[rcx],0: through xmm2
        (64, &[0x66, 0x0F, 0x3A, 0x61, 0x09, 0x00], &[0x66, 0x0F, 0x3A, 0x61, 0xCA, 0x00]),
    ];
    for (bits, guest, host) in rows {
        let mut pc = Pc::new(*bits).with(RAX, 0x2000).with(RBX, 0x2000).with(RCX, 0x2000).with(12, 0x2000);
        pc.cpu.cr0 |= cr0::PE;
        pc.cpu.gpr[9] = 0;
        pc.cpu.gpr[RSI] = 0;
        pc.cpu.seg[SegReg::Fs as usize].base = 0x10;
        pc.cpu.gpr[12] -= 0x70;
        pc.ok(guest);
        assert_eq!(pc.unit.code, *host, "{guest:02x?}");
    }
}

#[test]
fn renamed_registers_come_back() {
    let mut pc = Pc::new(64).with(RBX, 77);
    pc.ok(&[0x66, 0x0F, 0x7E, 0xCC]); // movd esp,xmm1
    assert_eq!((pc.unit.rbx, pc.cpu.gpr[RSP], pc.cpu.gpr[RBX]), (0x8000, 0x8001, 77));
    pc.unit.fault = Some(Fault::new(Vector::XM));
    assert_eq!(pc.run(&[0x66, 0x0F, 0x7E, 0xCC]), Err(Fault::new(Vector::XM)));
    pc.cpu.cr4 &= !cr4::OSXMMEXCPT;
    assert_eq!(pc.run(&[0x66, 0x0F, 0x7E, 0xCC]), Err(Fault::UD));
    assert_eq!((pc.cpu.gpr[RSP], pc.cpu.gpr[RBX]), (0x8001, 77));
}

#[test]
fn vector_memory_operands() {
    let mut pc = Pc::new(64).with(RCX, 0x2008);
    assert_eq!(pc.run(&[0x0F, 0x28, 0x01]), Err(Fault::GP0)); // movaps xmm0,[rcx]
    assert_eq!(pc.run(&[0x0F, 0x58, 0x01]), Err(Fault::GP0)); // addps xmm0,[rcx]
    pc.poke(0x2008, &[1, 2, 3]);
    pc.ok(&[0x0F, 0x10, 0x01]); // movups
    assert_eq!(pc.unit.operand[..4], [1, 2, 3, 0]);
    pc.ok(&[0xC5, 0xFC, 0x58, 0x01]); // vaddps ymm0,ymm0,[rcx] may be unaligned
    assert_eq!(pc.run(&[0xC5, 0xFC, 0x28, 0x01]), Err(Fault::GP0)); // vmovaps ymm0,[rcx]
    pc.cpu.gpr[RCX] = 0x2010;
    assert_eq!(pc.run(&[0xC5, 0xFC, 0x29, 0x01]), Err(Fault::GP0));
    pc.ok(&[0x0F, 0x29, 0x01]); // movaps [rcx],xmm0
    assert_eq!(pc.peek(0x2000, 0x21)[15..], [[0].as_slice(), &[0xAA; 16], &[0]].concat());
    // fstp qword [rcx] hands the old memory to the unit
    pc.poke(0x2010, &[9]);
    pc.ok(&[0xDD, 0x19]);
    assert_eq!(pc.unit.operand[0], 9);
}

#[test]
fn gathers_and_masked_moves() {
    let mut pc = Pc::new(64).with(RBX, 0x2000);
    pc.poke(0x2000, &(0..64).collect::<Vec<u8>>());
    pc.cpu.fpu.0[176..192].copy_from_slice(&[0, 0, 0, 0, 4, 0, 0, 0, 0xFC, 0xFF, 0xFF, 0xFF, 8, 0, 0, 0]);
    pc.cpu.fpu.0[192..208].copy_from_slice(&[0, 0, 0, 0x80, 0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0, 0x80]);
    pc.ok(&[0xC4, 0xE2, 0x69, 0x92, 0x04, 0x4B]); // vgatherdps xmm0,[rbx+xmm1*2],xmm2
    assert_eq!(pc.cpu.fpu.0[160..176], [0, 1, 2, 3, 8, 9, 10, 11, 0, 0, 0, 0, 16, 17, 18, 19]);
    assert_eq!(pc.cpu.fpu.0[192..208], [0; 16]);
    pc.cpu.fpu.0[160] = 0xEE;
    pc.cpu.fpu.0[192..208].copy_from_slice(&[0, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    pc.ok(&[0xC4, 0xE2, 0x69, 0x2E, 0x03]); // vmaskmovps [rbx],xmm2,xmm0
    assert_eq!(pc.peek(0x2000, 6), [0xEE, 1, 2, 3, 4, 5]);
    pc.cpu.gpr[RDI] = 0x2020;
    pc.ok(&[0x66, 0x0F, 0xF7, 0xC2]); // maskmovdqu xmm0,xmm2
    assert_eq!(pc.peek(0x2020, 5), [0x20, 0x21, 0x22, 3, 0x24]);
}

#[test]
fn mxcsr_moves() {
    let mut pc = Pc::new(64).with(RBX, 0x2000);
    pc.poke(0x2000, &[0x80, 0x9F, 0, 0, 0, 0, 1, 0]);
    pc.ok(&[0x0F, 0xAE, 0x13]);
    assert_eq!(pc.cpu.fpu.mxcsr(), 0x9F80);
    assert_eq!(pc.run(&[0x0F, 0xAE, 0x53, 0x04]), Err(Fault::GP0));
    pc.ok(&[0x0F, 0xAE, 0x5B, 0x08]);
    assert_eq!(pc.peek(0x2008, 4), [0x80, 0x9F, 0, 0]);
}

#[test]
fn state_saves() {
    let mut pc = Pc::new(64).with(RBX, 0x2000).with(RAX, 7);
    pc.cpu.fpu.0[160] = 0x11;
    pc.cpu.fpu.0[400] = 0x22;
    pc.cpu.fpu.0[576] = 0x33;
    pc.ok(&[0x0F, 0xAE, 0x23]); // xsave [rbx]
    assert_eq!(pc.peek(0x2200, 16), [6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(
        (pc.peek(0x2240, 1), pc.peek(0x2190, 1), pc.peek(0x2000, 2)),
        (vec![0x33], vec![0x22], vec![0x7F, 3])
    );
    pc.cpu.fpu = FpuState::initial();
    pc.ok(&[0x0F, 0xAE, 0x2B]); // xrstor [rbx]
    assert_eq!((pc.cpu.fpu.0[160], pc.cpu.fpu.0[400], pc.cpu.fpu.0[576]), (0x11, 0x22, 0x33));
    // Without its XSTATE_BV bit a component is initialised.
    pc.poke(0x2200, &[2]);
    pc.ok(&[0x0F, 0xAE, 0x2B]);
    assert_eq!((pc.cpu.fpu.0[160], pc.cpu.fpu.0[576]), (0x11, 0));
    // Header: a component outside XCR0, a reserved byte, an unaligned area.
    pc.poke(0x2200, &[8]);
    assert_eq!(pc.run(&[0x0F, 0xAE, 0x2B]), Err(Fault::GP0));
    pc.poke(0x2200, &[3, 0, 0, 0, 0, 0, 0, 0, 1]);
    assert_eq!(pc.run(&[0x0F, 0xAE, 0x2B]), Err(Fault::GP0));
    assert_eq!(pc.run(&[0x0F, 0xAE, 0x63, 0x20]), Err(Fault::GP0));
    // xsavec writes XCOMP_BV; xrstor takes it back.
    pc.poke(0x2200, &[0; 64]);
    pc.ok(&[0x0F, 0xC7, 0x23]);
    assert_eq!(pc.peek(0x2200, 16), [2, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0x80]);
    pc.cpu.fpu = FpuState::initial();
    pc.ok(&[0x0F, 0xAE, 0x2B]);
    assert_eq!(pc.cpu.fpu.0[160], 0x11);
    // fxrstor checks MXCSR; 32-bit code keeps its hands off XMM8-15.
    pc.poke(0x201B, &[1]);
    assert_eq!(pc.run(&[0x0F, 0xAE, 0x0B]), Err(Fault::GP0));
    let mut pc = Pc::new(32).with(RBX, 0x2000);
    pc.cpu.fpu.0[400] = 0x22;
    pc.poke(0x2190, &[0x99]);
    pc.ok(&[0x0F, 0xAE, 0x0B]);
    assert_eq!(pc.cpu.fpu.0[400], 0x22);
    pc.ok(&[0x0F, 0xAE, 0x03]);
    assert_eq!(pc.peek(0x2190, 1), [0x99]);
}

#[test]
fn a_masked_x87_error_without_ne_freezes() {
    let mut pc = Pc::new(64);
    pc.cpu.cr0 &= !cr0::NE;
    pc.unit.fault = Some(Fault::new(Vector::MF));
    pc.ok(&[0xD9, 0xE8]); // fld1
    assert_eq!(pc.cpu.rip, 0x1000);
    pc.cpu.cr0 |= cr0::NE;
    assert_eq!(pc.run(&[0xD9, 0xE8]), Err(Fault::new(Vector::MF)));
}

#[test]
fn wide_registers_of_bmi2() {
    let mut pc = Pc::new(64).with(RDX, u64::MAX).with(RBX, u64::MAX);
    pc.ok(&[0xC4, 0xE2, 0xF3, 0xF6, 0xC3]); // mulx rax,rcx,rbx
    assert_eq!((pc.cpu.gpr[RAX], pc.cpu.gpr[RCX]), (u64::MAX - 1, 1));
    pc.ok(&[0xC4, 0x63, 0x7B, 0xF0, 0xC3, 0x04]); // rorx r8d,ebx,4
    assert_eq!(pc.cpu.gpr[R8], 0xFFFF_FFFF);
    pc.cpu.cr0 &= !cr0::PE;
    assert_eq!(pc.run(&[0xC4, 0xE2, 0xF3, 0xF6, 0xC3]), Err(Fault::UD));
}

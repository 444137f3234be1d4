//! The interpreter's vector unit: x87, MMX, SSE and AVX instructions run by the host (SDM 1, chapters 8–14).
//!
//! A stub is the instruction and a RET; [`enter`] loads extended state, flags and general registers, calls it,
//! and stores everything back. An instruction that names a few vector registers and no x87 state gets code that
//! moves just these, which takes two thirds of the time of XRSTOR and XSAVE (measured: 150 ns against 220 ns).
//!
//! Extended state lives in [`FpuState`] between instructions, whose contents always count (the header's
//! XSTATE_BV is not consulted, so a component can be written there without setting its bit).
//!
//! Invariants the `unsafe` code relies on: [`admit`] lets only instructions pass that go on to the next, leave
//! RSP and segment registers alone, and touch no memory but at most 512 bytes at [RAX]; stubs are 256 bytes at
//! multiples of 256, complete before their address is handed out; `Frame` is laid out as the assembly expects.

use super::area::CodeArea;
use crate::signal::{self, FaultContext, FaultScope};
use hashbrown::HashMap;
use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, EncodingKind, FlowControl, Instruction,
    InstructionInfoFactory, OpAccess, Register,
};
use paravane_cpu::{Fault, FpuState, Vector, VectorUnit, VpIndex, flags};
use std::arch::naked_asm;
use std::io;
use std::mem::offset_of;

/// Bytes of a stub: the instruction (at most 15) and a RET, then what loads and what stores its registers.
const STUB: usize = 256;
const LOAD: usize = 16;
const STORE: usize = 128;
/// Vector registers moved one by one at most; each takes 18 bytes of code.
const DIRECT_REGISTERS: usize = 6;
/// Distinct instructions kept; then everything is forgotten and emitted anew.
const STUBS: usize = 4096;

/// XSAVE state components.
const X87: u32 = 1 << 0;
const SSE: u32 = 1 << 1;
const AVX: u32 = 1 << 2;
/// Instead of components: the stub itself loads and stores its registers.
const DIRECT: u32 = 1 << 31;

/// MXCSR bits that exist on every CPU with SSE2 and DAZ; others raise `#GP` when loaded.
const MXCSR_BITS: u32 = 0xFFFF;

/// What a stub needs loaded.
#[derive(Clone, Copy)]
struct Stub {
    /// Number of its slot; none for an instruction that [`admit`] refuses.
    slot: Option<u32>,
    /// State components it may touch, or [`DIRECT`].
    components: u32,
    /// It has a memory operand.
    memory: bool,
}

/// Instructions on the host's own units. Each vCPU owns one.
pub struct HostVectorUnit {
    area: CodeArea,
    stubs: HashMap<Box<[u8]>, Stub>,
    used: u32,
    /// State components the host enables: `X87 | SSE`, or with `AVX`; zero means FXSAVE only.
    enabled: u32,
    bounce: Box<Bounce>,
}

/// An aligned copy of an operand that is not aligned where the caller keeps it.
#[repr(C, align(64))]
struct Bounce([u8; 512]);

/// What [`enter`] and [`leave`] work on.
#[repr(C)]
struct Frame {
    /// The guest's registers, read and written in place; RAX comes from `rax`.
    gpr: *mut [u64; 16],
    rax: u64,
    rflags: u64,
    fpu: *mut FpuState,
    stub: u64,
    rsp: u64,
    /// Where a [`DIRECT`] stub's registers are loaded and stored.
    load: u64,
    store: u64,
    /// Components for XRSTOR and XSAVE; [`DIRECT`]: the stub does it; zero: FXRSTOR and FXSAVE.
    components: u32,
    /// VZEROUPPER is needed before Rust code runs again.
    avx: u32,
    host_mxcsr: u32,
    host_fcw: u32,
}

/// Where the fault hook leaves word.
struct Hook {
    stubs: std::ops::Range<u64>,
    frame: *mut Frame,
    fault: Option<Fault>,
    /// FSW and tags, MXCSR as a SIMD exception leaves them.
    status: Option<([u8; 3], u32)>,
}

impl HostVectorUnit {
    /// Maps the stub memory and takes over the fault signals.
    pub fn new() -> io::Result<HostVectorUnit> {
        signal::install();
        Ok(HostVectorUnit {
            area: CodeArea::new(STUB * STUBS)?,
            stubs: HashMap::new(),
            used: 0,
            enabled: enabled_components(),
            bounce: Box::new(Bounce([0; 512])),
        })
    }

    /// The stub for `code`, emitted at first sight.
    fn stub(&mut self, code: &[u8]) -> Stub {
        if let Some(&stub) = self.stubs.get(code) {
            return stub;
        }
        if self.stubs.len() >= STUBS {
            self.forget();
        }
        let stub = match admit(code) {
            Some(traits) => self.emit(code, traits),
            None => Stub { slot: None, components: 0, memory: false },
        };
        self.stubs.insert(code.into(), stub);
        stub
    }

    fn emit(&mut self, code: &[u8], traits: Traits) -> Stub {
        let slot = self.used;
        let avx = self.enabled & AVX != 0;
        let mut bytes = [0xCC; STUB];
        let mut put = |at: usize, code: &[u8]| {
            bytes[at..at + code.len()].copy_from_slice(code);
            bytes[at + code.len()] = 0xC3;
        };
        put(0, code);
        let direct = traits.components & X87 == 0 && traits.registers.len() <= DIRECT_REGISTERS;
        if direct {
            put(LOAD, &moves(&traits.registers, avx, false));
            put(STORE, &moves(&traits.registers, avx, true));
        }
        self.area.write(slot as usize * STUB, &bytes);
        self.used += 1;
        let components = if direct { DIRECT } else { traits.components & self.enabled };
        Stub { slot: Some(slot), components, memory: traits.memory }
    }

    /// Drops all stubs. CPUID serialises, so that none of the old bytes are executed (SDM 3A, 9.1.3).
    fn forget(&mut self) {
        self.stubs.clear();
        self.used = 0;
        std::hint::black_box(std::arch::x86_64::__cpuid(0));
    }
}

impl VectorUnit for HostVectorUnit {
    fn execute(
        &mut self,
        code: &[u8],
        fpu: &mut FpuState,
        gpr: &mut [u64; 16],
        rflags: &mut u64,
        operand: &mut [u8; 512],
    ) -> Result<(), Fault> {
        let stub = self.stub(code);
        let Some(slot) = stub.slot else { return Err(Fault::UD) };
        let aligned = (operand.as_ptr() as usize).is_multiple_of(64);
        if !stub.memory || aligned {
            return self.run(slot, stub, fpu, gpr, rflags, operand.as_mut_ptr());
        }
        self.bounce.0 = *operand;
        let pointer = self.bounce.0.as_mut_ptr();
        let result = self.run(slot, stub, fpu, gpr, rflags, pointer);
        *operand = self.bounce.0;
        result
    }

    fn sync(&mut self, _fpu: &mut FpuState, _vp: VpIndex) {
        // Nothing stays in host registers between instructions: `FpuState` is always current.
    }

    fn changed(&mut self, _fpu: &FpuState, _vp: VpIndex) {
        // As above: the next instruction loads what is in memory.
    }
}

impl HostVectorUnit {
    fn run(
        &self,
        slot: u32,
        stub: Stub,
        fpu: &mut FpuState,
        gpr: &mut [u64; 16],
        rflags: &mut u64,
        operand: *mut u8,
    ) -> Result<(), Fault> {
        if stub.components == DIRECT {
            fpu.set_mxcsr(fpu.mxcsr() & MXCSR_BITS);
        } else {
            loadable(fpu);
        }
        let start = self.area.address(slot as usize * STUB);
        let mut frame = Frame {
            gpr,
            rax: if stub.memory { operand as u64 } else { gpr[0] },
            rflags: (*rflags & flags::STATUS) | flags::FIXED,
            fpu,
            stub: start,
            rsp: 0,
            load: start + LOAD as u64,
            store: start + STORE as u64,
            components: stub.components,
            avx: self.enabled & AVX,
            host_mxcsr: 0,
            host_fcw: 0,
        };
        let rax = gpr[0];
        let stubs = self.area.address(0)..self.area.address(self.area.len());
        let mut hook = Hook { stubs, frame: &raw mut frame, fault: None, status: None };
        let mut scope = FaultScope::new(recover, (&raw mut hook).cast());
        // SAFETY: `recover` only reads and writes `hook`, and redirects from a stub to `leave`, whose stack frame is
        // `enter`'s. The stub passed `admit`; the memory it may touch is `operand`, and `fpu` is exclusively ours.
        unsafe { scope.enter(|| enter(hook.frame)) };
        let (fault, status) = (hook.fault.take(), hook.status);
        if let Some(fault) = fault {
            if let Some((x87, mxcsr)) = status {
                fpu.set_mxcsr(mxcsr);
                if stub.components & X87 != 0 {
                    // CVTPS2PI and its kin have gone over to MMX state by then.
                    fpu.0[2..5].copy_from_slice(&x87);
                }
            }
            return Err(fault);
        }
        if stub.components & X87 != 0 || stub.components == 0 {
            fpu.0[6..24].fill(0);
        }
        if stub.memory {
            gpr[0] = rax;
        }
        *rflags = (*rflags & !flags::STATUS) | (frame.rflags & flags::STATUS);
        Ok(())
    }
}

/// Makes the area fit for XRSTOR: its contents count, header bits that would raise `#GP` are zero.
pub(super) fn loadable(fpu: &mut FpuState) {
    fpu.set_mxcsr(fpu.mxcsr() & MXCSR_BITS);
    fpu.0[512..576].fill(0);
    fpu.0[512] = (X87 | SSE | AVX) as u8;
}

/// The components the operating system enabled, of those the guest may have; zero without XSAVE.
pub(super) fn enabled_components() -> u32 {
    if !std::is_x86_feature_detected!("xsave") {
        return 0;
    }
    // SAFETY: with XSAVE enabled XGETBV exists.
    let xcr0 = unsafe { xgetbv() };
    xcr0 & (X87 | SSE | AVX)
}

#[target_feature(enable = "xsave")]
fn xgetbv() -> u32 {
    // SAFETY: XCR0 always exists where XGETBV does.
    unsafe { std::arch::x86_64::_xgetbv(0) as u32 }
}

/// Code that moves vector registers between the state at RCX and the CPU.
fn moves(registers: &[u8], avx: bool, store: bool) -> Vec<u8> {
    let mut code = Vec::new();
    for &register in registers {
        let low = 160 + 16 * u32::from(register);
        let high = 576 + 16 * u32::from(register);
        // ModRM: [rcx + disp32].
        let modrm = 0x81 | (register & 7) << 3;
        let upper = register >= 8;
        if avx {
            // VMOVUPS xmm
            code.extend([0xC5, if upper { 0x78 } else { 0xF8 }, 0x10 | u8::from(store), modrm]);
            code.extend(low.to_le_bytes());
            // VINSERTF128 ymm, ymm, [high], 1 or VEXTRACTF128 [high], ymm, 1
            let source = if store { 0 } else { register };
            code.extend([
                0xC4,
                if upper { 0x63 } else { 0xE3 },
                (!source & 15) << 3 | 5,
                0x18 | u8::from(store),
            ]);
            code.push(modrm);
            code.extend(high.to_le_bytes());
            code.push(1);
        } else {
            // MOVUPS
            if upper {
                code.push(0x44);
            }
            code.extend([0x0F, 0x10 | u8::from(store), modrm]);
            code.extend(low.to_le_bytes());
        }
    }
    code
}

/// What is known of an admitted instruction.
struct Traits {
    /// Vector registers it names, each once.
    registers: Vec<u8>,
    components: u32,
    memory: bool,
}

/// Looks at `code`: `None` unless it is one instruction that keeps to the contract of [`VectorUnit::execute`].
fn admit(code: &[u8]) -> Option<Traits> {
    if code.is_empty() || code.len() >= STUB {
        return None;
    }
    let instruction = Decoder::new(64, code, DecoderOptions::NONE).decode();
    let encoding = matches!(instruction.encoding(), EncodingKind::Legacy | EncodingKind::VEX);
    let plain = encoding
        && instruction.len() == code.len()
        && instruction.flow_control() == FlowControl::Next
        && !instruction.is_privileged()
        && !instruction.is_stack_instruction()
        && !instruction.has_rep_prefix()
        && !instruction.has_repne_prefix()
        && instruction.cpuid_features().iter().all(|&f| is_user_feature(f));
    if !plain {
        return None;
    }
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(&instruction);
    if info.used_registers().iter().any(|r| is_forbidden(r.register(), r.access())) {
        return None;
    }
    let memory = match info.used_memory() {
        [] => false,
        all => {
            let at_rax = all.iter().all(|m| {
                m.base() == Register::RAX
                    && m.index() == Register::None
                    && m.displacement() == 0
                    && m.segment() != Register::FS
                    && m.segment() != Register::GS
                    && m.access() != OpAccess::NoMemAccess
            });
            let fits = (1..=512).contains(&instruction.memory_size().size());
            if !at_rax || !fits {
                return None;
            }
            true
        }
    };
    let used = || info.used_registers().iter().map(|r| r.register());
    let mut registers: Vec<u8> =
        used().filter(|r| r.is_vector_register()).map(|r| r.number() as u8).collect();
    registers.sort_unstable();
    registers.dedup();
    Some(Traits { registers, components: components(&instruction, used()), memory })
}

/// RSP, segment registers and RIP are not the stub's.
fn is_forbidden(register: Register, access: OpAccess) -> bool {
    let segment = register.is_segment_register() && access != OpAccess::Read && access != OpAccess::CondRead;
    let full = register.full_register();
    full == Register::RSP
        || full == Register::RIP
        || segment
        || register.is_cr()
        || register.is_dr()
        || register == Register::FS
        || register == Register::GS
        || register.is_tmm()
        || register.is_k()
}

/// Extensions whose instructions compute and do nothing else.
fn is_user_feature(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        feature,
        F::INTEL8086
            | F::INTEL186
            | F::INTEL386
            | F::INTEL486
            | F::X64
            | F::CMOV
            | F::FPU
            | F::FPU287
            | F::FPU387
            | F::MMX
            | F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::SSE4A
            | F::POPCNT
            | F::LZCNT
            | F::AES
            | F::PCLMULQDQ
            | F::AVX
            | F::AVX2
            | F::F16C
            | F::FMA
            | F::FMA4
            | F::XOP
            | F::BMI1
            | F::BMI2
            | F::ADX
            | F::MOVBE
            | F::SHA
            | F::GFNI
            | F::VAES
            | F::VPCLMULQDQ
            | F::AVX_VNNI
            | F::AVX_IFMA
    )
}

/// The state components `instruction` may read or write.
fn components(instruction: &Instruction, registers: impl Iterator<Item = Register>) -> u32 {
    let mut components = 0;
    for register in registers {
        if register.is_st() || register.is_mm() {
            components |= X87;
        } else if register.is_vector_register() {
            components |= SSE | AVX;
        }
    }
    for feature in instruction.cpuid_features() {
        components |= match feature {
            CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 | CpuidFeature::MMX => X87,
            CpuidFeature::INTEL8086 | CpuidFeature::INTEL186 | CpuidFeature::INTEL386 | CpuidFeature::X64 => {
                0
            }
            _ => SSE | AVX,
        };
    }
    match instruction.code() {
        // WAIT raises what is pending.
        Code::Wait => X87,
        Code::VEX_Vzeroall | Code::VEX_Vzeroupper => SSE | AVX,
        _ => components,
    }
}

/// Claims exceptions raised by the instruction in a stub; the RET after it cannot fault.
unsafe fn recover(data: *mut (), context: &mut FaultContext) -> bool {
    // SAFETY: `run` passes its live hook and nothing else touches it meanwhile.
    let hook = unsafe { &mut *data.cast::<Hook>() };
    let Some(fault) = guest_fault(context.vector()) else { return false };
    if !hook.stubs.contains(&context.rip()) {
        return false;
    }
    hook.fault = Some(fault);
    if fault.vector == Vector::XM {
        // SAFETY: every frame of a CPU with SSE has the 512 legacy bytes: FSW and tags at 2, MXCSR at 24.
        hook.status = Some(unsafe {
            let area = context.xsave_area();
            (area.add(2).cast::<[u8; 3]>().read(), area.add(24).cast::<u32>().read_unaligned())
        });
    }
    context.set_gpr(7, hook.frame as u64);
    context.set_rip(leave as *const () as u64);
    true
}

/// The exceptions that an admitted instruction may raise; a page fault is none of them.
fn guest_fault(vector: u8) -> Option<Fault> {
    match Vector(vector) {
        Vector::GP => Some(Fault::GP0),
        Vector::AC => Some(Fault::with_code(Vector::AC, 0)),
        v @ (Vector::DE | Vector::UD | Vector::NM | Vector::MF | Vector::XM) => Some(Fault::new(v)),
        _ => None,
    }
}

/// Loads the frame's state, calls the stub, stores the state.
///
/// # Safety
///
/// `frame` is complete, its stub admitted; see the module's invariants.
#[unsafe(naked)]
unsafe extern "C" fn enter(frame: *mut Frame) {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "mov [rdi + {rsp}], rsp",
        "stmxcsr [rdi + {mxcsr}]",
        "fnstcw [rdi + {fcw}]",
        "mov rcx, [rdi + {fpu}]",
        "mov eax, [rdi + {components}]",
        "xor edx, edx",
        "test eax, eax",
        "js 7f",
        "jz 2f",
        "xrstor64 [rcx]",
        "jmp 3f",
        "2: fxrstor64 [rcx]",
        "jmp 3f",
        "7: ldmxcsr [rcx + 24]",
        "call [rdi + {load}]",
        "3: push rdi",
        "push qword ptr [rdi + {stub}]",
        "push qword ptr [rdi + {rflags}]",
        "popfq",
        "mov rax, [rdi + {rax}]",
        "mov rdi, [rdi + {gpr}]",
        "mov rcx, [rdi + 8]", "mov rdx, [rdi + 16]", "mov rbx, [rdi + 24]",
        "mov rbp, [rdi + 40]", "mov rsi, [rdi + 48]",
        "mov r8, [rdi + 64]", "mov r9, [rdi + 72]", "mov r10, [rdi + 80]", "mov r11, [rdi + 88]",
        "mov r12, [rdi + 96]", "mov r13, [rdi + 104]", "mov r14, [rdi + 112]", "mov r15, [rdi + 120]",
        "mov rdi, [rdi + 56]",
        "call [rsp]",
        "push rdi",
        "pushfq",
        "mov rdi, [rsp + 24]",
        "mov rdi, [rdi + {gpr}]",
        "mov [rdi], rax", "mov [rdi + 8], rcx", "mov [rdi + 16], rdx", "mov [rdi + 24], rbx",
        "mov [rdi + 40], rbp", "mov [rdi + 48], rsi",
        "mov [rdi + 64], r8", "mov [rdi + 72], r9", "mov [rdi + 80], r10", "mov [rdi + 88], r11",
        "mov [rdi + 96], r12", "mov [rdi + 104], r13", "mov [rdi + 112], r14", "mov [rdi + 120], r15",
        "pop rcx", "pop rax", "mov [rdi + 56], rax",
        "mov rdi, [rsp + 8]",
        "mov [rdi + {rflags}], rcx",
        "mov rcx, [rdi + {fpu}]",
        "mov eax, [rdi + {components}]",
        "xor edx, edx",
        "test eax, eax",
        "js 5f",
        "jz 4f",
        "xsave64 [rcx]",
        "jmp {leave}",
        "4: fxsave64 [rcx]",
        "jmp {leave}",
        "5: stmxcsr [rcx + 24]",
        "call [rdi + {store}]",
        "jmp {leave}",
        gpr = const offset_of!(Frame, gpr),
        rax = const offset_of!(Frame, rax),
        rsp = const offset_of!(Frame, rsp),
        mxcsr = const offset_of!(Frame, host_mxcsr),
        fcw = const offset_of!(Frame, host_fcw),
        fpu = const offset_of!(Frame, fpu),
        components = const offset_of!(Frame, components),
        stub = const offset_of!(Frame, stub),
        load = const offset_of!(Frame, load),
        store = const offset_of!(Frame, store),
        rflags = const offset_of!(Frame, rflags),
        leave = sym leave,
    )
}

/// Puts the host's own state back and returns from [`enter`]; RDI is the frame, RSP does not matter.
///
/// # Safety
///
/// Only for code that [`enter`] called.
#[unsafe(naked)]
unsafe extern "C" fn leave(frame: *mut Frame) {
    naked_asm!(
        "cld",
        "mov eax, [rdi + {components}]",
        "test eax, eax",
        "jz 2f",
        "test al, 1",
        "jz 3f",
        "2: fninit",
        "fldcw [rdi + {fcw}]",
        "3: ldmxcsr [rdi + {mxcsr}]",
        "cmp dword ptr [rdi + {avx}], 0",
        "jz 4f",
        "vzeroupper",
        "4: mov rsp, [rdi + {rsp}]",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        components = const offset_of!(Frame, components),
        fcw = const offset_of!(Frame, host_fcw),
        mxcsr = const offset_of!(Frame, host_mxcsr),
        avx = const offset_of!(Frame, avx),
        rsp = const offset_of!(Frame, rsp),
    )
}

#[cfg(test)]
mod tests;

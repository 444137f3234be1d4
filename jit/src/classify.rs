//! Which instructions the translator handles itself: an allow-list by instruction form. What is not listed goes to
//! the interpreter, so that nothing touches host state that is not the guest's.

use crate::block::Mode;
use crate::flags::Effect;
use crate::groups;
use crate::regs;
use iced_x86::{Code, CpuidFeature, EncodingKind, FlowControl, Instruction, Mnemonic, OpAccess};
use paravane_cpu::CpuModel;

/// How an instruction is translated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Class {
    /// Re-encoded as itself, memory operand translated; needs these [`Mode`] bits.
    Identity(u8),
    /// No effect at all.
    Nop,
    /// PREFETCHh, PREFETCHW: no effect but on caches.
    Prefetch,
    Lea,
    Push,
    Pop,
    Leave,
    Call,
    CallIndirect,
    Ret,
    Jmp,
    JmpIndirect,
    Jcc,
    /// LOOP, LOOPE, LOOPNE.
    Loop,
    /// JCXZ, JECXZ, JRCXZ.
    JumpIfCountZero,
    /// BT, BTS, BTR, BTC of a bit string in memory.
    BitString,
    /// STOS, LODS, MOVS, SCAS or CMPS without REP.
    String,
    Pushf,
    Popf,
    Cld,
    Cli,
    Sti,
    Stac,
    Clac,
    Swapgs,
    /// RDFSBASE, RDGSBASE.
    ReadBase,
    /// WRFSBASE, WRGSBASE.
    WriteBase,
    Syscall,
    Sysret,
    /// IRETQ.
    Iret,
    /// MOV of a segment selector to a register.
    Selector,
    /// MOV of a control register to a general one.
    ReadControl,
    /// MOV, POP, LES and the like into ES, DS, FS or GS, with a 16-bit operand size.
    LoadSegment,
    /// RDTSC, RDTSCP.
    Rdtsc,
    Pause,
    /// Everything else.
    Interpret,
}

impl Class {
    /// Control goes on to the next instruction of the block.
    pub(crate) fn straight(self) -> bool {
        !matches!(
            self,
            Class::Call
                | Class::CallIndirect
                | Class::Ret
                | Class::Jmp
                | Class::JmpIndirect
                | Class::Jcc
                | Class::Loop
                | Class::JumpIfCountZero
                | Class::Syscall
                | Class::Sysret
                | Class::Iret
                | Class::Interpret
        )
    }
}

impl Class {
    /// The block ends with it, and it may be left to the run loop or the interpreter.
    pub(crate) fn leaves(self) -> bool {
        matches!(self, Class::Syscall | Class::Sysret | Class::Iret | Class::Interpret)
    }

    /// Pushes or pops words.
    pub(crate) fn uses_stack(self) -> bool {
        matches!(
            self,
            Class::Push
                | Class::Pop
                | Class::Leave
                | Class::Pushf
                | Class::Popf
                | Class::Call
                | Class::CallIndirect
                | Class::Ret
        )
    }
}

/// Bytes of the words that a stack instruction pushes or pops (without those that RET releases).
pub(crate) fn stack_word(instr: &Instruction) -> u32 {
    use Code as C;
    match instr.code() {
        C::Retnw | C::Retnw_imm16 | C::Leavew => 2,
        C::Retnd | C::Retnd_imm16 | C::Leaved => 4,
        C::Retnq | C::Retnq_imm16 | C::Leaveq => 8,
        _ => instr.stack_pointer_increment().unsigned_abs(),
    }
}

/// What is remembered per instruction form.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Form {
    pub(crate) class: Class,
    pub(crate) access: [OpAccess; 5],
    /// What it does to flags, if that is the same for all instructions of the form.
    flags: Option<Effect>,
    /// The operand that is memory, its bytes (0: not the same for all), and whether it is written.
    pub(crate) memory: Option<u8>,
    pub(crate) memory_size: u16,
    pub(crate) writes_memory: bool,
    /// Operands that may be written, one bit each.
    pub(crate) written: u8,
    /// General registers that it writes without naming them, one bit each (see [`groups`]).
    pub(crate) implicit: u16,
    /// It may move a register by a constant.
    pub(crate) steps: bool,
}

impl Form {
    /// What `instr`, of this form, does to the status flags.
    pub(crate) fn effect(&self, instr: &Instruction) -> Effect {
        self.flags.unwrap_or_else(|| Effect::of(instr))
    }
}

/// Classification by `Code` and operand kind, filled as forms are met.
pub(crate) struct Forms {
    known: Vec<Option<Form>>,
    info: iced_x86::InstructionInfoFactory,
    model: CpuModel,
}

impl Forms {
    /// What `model` does not offer is left to the interpreter.
    pub(crate) fn new(model: CpuModel) -> Forms {
        Forms {
            known: vec![None; Code::values().len() * 2],
            info: iced_x86::InstructionInfoFactory::new(),
            model,
        }
    }

    pub(crate) fn form(&mut self, instr: &Instruction) -> &Form {
        // Some forms differ by whether their register-or-memory operand is memory.
        let memory = memory_operand(instr);
        let slot = instr.code() as usize * 2 + usize::from(memory.is_some());
        if self.known[slot].is_none() {
            self.known[slot] = Some(self.meet(instr, memory));
        }
        self.known[slot].as_ref().expect("just met")
    }

    #[cold]
    fn meet(&mut self, instr: &Instruction, memory: Option<u8>) -> Form {
        // What zeroes a register, as `xor al, al` does, is said not to read it: not what the form does in general.
        let mut general = *instr;
        let (first, second) = (instr.op0_register(), instr.op1_register());
        if first == second && first.is_gpr() {
            general.set_op1_register(regs::same_size(first, regs::number(first) ^ 1));
        }
        let info = self.info.info(&general);
        let access = [0, 1, 2, 3, 4].map(|i| info.op_access(i));
        let class = if self.model.allows(instr) { classify(instr) } else { Class::Interpret };
        Form {
            class,
            access,
            flags: Effect::of_form(&general),
            memory,
            // EVEX may broadcast an element.
            memory_size: if instr.is_broadcast() { 0 } else { instr.memory_size().size() as u16 },
            writes_memory: memory.is_some_and(|i| may_write(access[usize::from(i)])),
            written: (0..5).map(|i| u8::from(may_write(access[i]) && access[i] != OpAccess::None) << i).sum(),
            implicit: groups::implicitly_modified(instr.mnemonic(), class),
            steps: groups::may_step(instr.mnemonic()),
        }
    }
}

/// The operand that is memory.
fn memory_operand(instr: &Instruction) -> Option<u8> {
    let kinds = [instr.op0_kind(), instr.op1_kind(), instr.op2_kind(), instr.op3_kind()];
    kinds.iter().position(|kind| *kind == iced_x86::OpKind::Memory).map(|i| i as u8)
}

/// Whether nothing says of an operand that it is only read.
fn may_write(access: OpAccess) -> bool {
    !matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess)
}

fn classify(instr: &Instruction) -> Class {
    use FlowControl as F;
    match instr.code() {
        Code::Syscall => return Class::Syscall,
        Code::Sysretq => return Class::Sysret,
        Code::Iretq => return Class::Iret,
        _ => {}
    }
    match instr.flow_control() {
        F::Next => classify_straight(instr),
        F::UnconditionalBranch if instr.is_jmp_short_or_near() => Class::Jmp,
        F::IndirectBranch if instr.is_jmp_near_indirect() => Class::JmpIndirect,
        F::ConditionalBranch if instr.is_jcc_short_or_near() => Class::Jcc,
        F::ConditionalBranch => match instr.mnemonic() {
            Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne => Class::Loop,
            Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => Class::JumpIfCountZero,
            _ => Class::Interpret,
        },
        F::Return if instr.mnemonic() == Mnemonic::Ret => Class::Ret,
        F::Call if instr.is_call_near() => Class::Call,
        F::IndirectCall if instr.is_call_near_indirect() => Class::CallIndirect,
        _ => Class::Interpret,
    }
}

fn classify_straight(instr: &Instruction) -> Class {
    use Mnemonic as M;
    if is_string(instr.code()) {
        return Class::String;
    }
    if loads_segment(instr) {
        return Class::LoadSegment;
    }
    match instr.mnemonic() {
        M::Nop | M::Endbr64 | M::Endbr32 => Class::Nop,
        M::Reservednop if is_prefetch(instr) => Class::Prefetch,
        M::Reservednop => Class::Nop,
        M::Lea => Class::Lea,
        M::Push | M::Pop | M::Leave => classify_stack(instr),
        M::Mov => {
            let plain = (0..instr.op_count()).all(|i| {
                let r = instr.op_register(i);
                !(r.is_segment_register() || r.is_cr() || r.is_dr() || r.is_tr())
            });
            let selector = instr.op0_register().is_gpr() && instr.op1_register().is_segment_register();
            if plain {
                Class::Identity(0)
            } else if selector {
                Class::Selector
            } else if instr.op1_register().is_cr() {
                Class::ReadControl
            } else {
                Class::Interpret
            }
        }
        M::Bt | M::Bts | M::Btr | M::Btc
            if instr.op0_kind() == iced_x86::OpKind::Memory
                && instr.op1_kind() == iced_x86::OpKind::Register =>
        {
            Class::BitString
        }
        M::Cld => Class::Cld,
        M::Cli => Class::Cli,
        M::Sti => Class::Sti,
        M::Stac => Class::Stac,
        M::Clac => Class::Clac,
        M::Swapgs => Class::Swapgs,
        M::Rdfsbase | M::Rdgsbase => Class::ReadBase,
        M::Wrfsbase | M::Wrgsbase => Class::WriteBase,
        M::Rdtsc | M::Rdtscp => Class::Rdtsc,
        M::Pause => Class::Pause,
        M::Pushfq | M::Pushfd | M::Pushf => Class::Pushf,
        M::Popfq | M::Popfd | M::Popf => Class::Popf,
        m if general(m) => Class::Identity(0),
        _ => classify_vector(instr),
    }
}

/// PREFETCHh and PREFETCHW, which are decoded as the reserved NOPs that older processors take them for (SDM vol. 2).
fn is_prefetch(instr: &Instruction) -> bool {
    use Code as C;
    let hint = matches!(
        instr.code(),
        C::Reservednop_rm32_r32_0F18
            | C::Reservednop_rm64_r64_0F18
            | C::Reservednop_rm32_r32_0F0D
            | C::Reservednop_rm64_r64_0F0D
    );
    hint && instr.op0_kind() == iced_x86::OpKind::Memory
}

/// String instructions; REP is a prefix, not part of the form, so the emitter refuses it.
fn is_string(code: Code) -> bool {
    use Code::*;
    matches!(
        code,
        Stosb_m8_AL
            | Stosw_m16_AX
            | Stosd_m32_EAX
            | Stosq_m64_RAX
            | Lodsb_AL_m8
            | Lodsw_AX_m16
            | Lodsd_EAX_m32
            | Lodsq_RAX_m64
            | Movsb_m8_m8
            | Movsw_m16_m16
            | Movsd_m32_m32
            | Movsq_m64_m64
            | Scasb_AL_m8
            | Scasw_AX_m16
            | Scasd_EAX_m32
            | Scasq_RAX_m64
            | Cmpsb_m8_m8
            | Cmpsw_m16_m16
            | Cmpsd_m32_m32
            | Cmpsq_m64_m64
    )
}

fn loads_segment(instr: &Instruction) -> bool {
    use Code as C;
    matches!(
        instr.code(),
        C::Mov_Sreg_rm16
            | C::Popw_ES
            | C::Popw_DS
            | C::Popw_FS
            | C::Popw_GS
            | C::Les_r16_m1616
            | C::Lds_r16_m1616
            | C::Lfs_r16_m1616
            | C::Lgs_r16_m1616
    )
}

fn classify_stack(instr: &Instruction) -> Class {
    use Code as C;
    match instr.code() {
        C::Push_r64
        | C::Push_r32
        | C::Push_r16
        | C::Pushq_imm8
        | C::Pushq_imm32
        | C::Pushd_imm8
        | C::Pushd_imm32
        | C::Pushw_imm8
        | C::Push_imm16
        | C::Push_rm64
        | C::Push_rm32
        | C::Push_rm16
        | C::Pushw_ES
        | C::Pushw_CS
        | C::Pushw_SS
        | C::Pushw_DS
        | C::Pushw_FS
        | C::Pushw_GS => Class::Push,
        C::Pop_r64 | C::Pop_r32 | C::Pop_r16 => Class::Pop,
        C::Leaveq | C::Leaved | C::Leavew => Class::Leave,
        _ => Class::Interpret,
    }
}

/// General-purpose instructions that are the same on the host.
fn general(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Add | Or
            | Adc
            | Sbb
            | And
            | Sub
            | Xor
            | Cmp
            | Test
            | Movzx
            | Movsx
            | Movsxd
            | Xchg
            | Xadd
            | Cmpxchg
            | Cmpxchg8b
            | Cmpxchg16b
            | Bswap
            | Inc
            | Dec
            | Neg
            | Not
            | Rol
            | Ror
            | Rcl
            | Rcr
            | Shl
            | Sal
            | Shr
            | Sar
            | Shld
            | Shrd
            | Mul
            | Imul
            | Div
            | Idiv
            | Cbw
            | Cwde
            | Cdqe
            | Cwd
            | Cdq
            | Cqo
            | Bt
            | Bts
            | Btr
            | Btc
            | Bsf
            | Bsr
            | Tzcnt
            | Lzcnt
            | Popcnt
            | Andn
            | Bextr
            | Blsi
            | Blsmsk
            | Blsr
            | Bzhi
            | Mulx
            | Pdep
            | Pext
            | Rorx
            | Sarx
            | Shlx
            | Shrx
            | Adcx
            | Adox
            | Crc32
            | Movbe
            | Movnti
            | Clc
            | Stc
            | Cmc
            | Lahf
            | Sahf
            | Lfence
            | Mfence
            | Sfence
            | Cmova
            | Cmovae
            | Cmovb
            | Cmovbe
            | Cmove
            | Cmovg
            | Cmovge
            | Cmovl
            | Cmovle
            | Cmovne
            | Cmovno
            | Cmovnp
            | Cmovns
            | Cmovo
            | Cmovp
            | Cmovs
            | Seta
            | Setae
            | Setb
            | Setbe
            | Sete
            | Setg
            | Setge
            | Setl
            | Setle
            | Setne
            | Setno
            | Setnp
            | Setns
            | Seto
            | Setp
            | Sets
    )
}

/// x87, MMX, SSE and AVX forms that touch nothing but their operands and their own control words.
fn classify_vector(instr: &Instruction) -> Class {
    use CpuidFeature as C;
    use Mnemonic as M;
    match instr.mnemonic() {
        // They move or end what the guest's FIP and FDP say; masked and gathered accesses fault element by element.
        M::Fnstenv
        | M::Fstenv
        | M::Fldenv
        | M::Fnsave
        | M::Fsave
        | M::Fninit
        | M::Finit
        | M::Fnclex
        | M::Fclex
        | M::Frstor
        | M::Fxsave
        | M::Fxsave64
        | M::Fxrstor
        | M::Fxrstor64
        | M::Maskmovq
        | M::Maskmovdqu
        | M::Vmaskmovdqu
        | M::Vmaskmovps
        | M::Vmaskmovpd
        | M::Vpmaskmovd
        | M::Vpmaskmovq
        | M::Vpgatherdd
        | M::Vpgatherdq
        | M::Vpgatherqd
        | M::Vpgatherqq
        | M::Vgatherdps
        | M::Vgatherdpd
        | M::Vgatherqps
        | M::Vgatherqpd
        | M::Wait => {
            return Class::Interpret;
        }
        _ => {}
    }
    let mut needs = 0;
    for f in instr.cpuid_features() {
        needs |= match f {
            C::FPU | C::FPU287 | C::FPU387 | C::MMX => Mode::X87,
            C::SSE
            | C::SSE2
            | C::SSE3
            | C::SSSE3
            | C::SSE4_1
            | C::SSE4_2
            | C::AES
            | C::PCLMULQDQ
            | C::SHA => Mode::SSE,
            C::AVX | C::AVX2 | C::FMA | C::F16C => Mode::AVX,
            C::CMOV => 0,
            _ => return Class::Interpret,
        };
    }
    match instr.encoding() {
        EncodingKind::Legacy => {}
        EncodingKind::VEX => needs = Mode::AVX,
        _ => return Class::Interpret,
    }
    for i in 0..instr.op_count() {
        if instr.op_register(i).is_mm() {
            needs |= Mode::X87;
        }
    }
    if needs == 0 { Class::Interpret } else { Class::Identity(needs as u8) }
}

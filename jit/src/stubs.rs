//! Hand-written code every block relies on: entering and leaving translated code, and the miss path.
//!
//! Invariant: the stubs run only with host RSP at the translator's live `JitContext`, as `context` describes.

use crate::assembler::SimpleAssembler;
use crate::code_cache::{CodeCache, CodeOffset};
use crate::context::{Reason, ctx};
use crate::emit::recipe::{KINDS, Kind, MARK, NUMBERED, OPERAND};
use crate::pages::{ENTRIES, Entry, SECOND_ENTRIES, SECOND_FACTOR};
use crate::regs::{PINNED, R11};
use dynasmrt::{DynasmApi, dynasm};

/// Where the stubs are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stubs {
    /// `extern "sysv64" fn(*mut JitContext)`: runs from `entry` until an exit.
    pub(crate) enter: CodeOffset,
    /// Leaves translated code; `reason` is in r10d, `rip` is stored.
    pub(crate) exit: CodeOffset,
    /// Leaves by the link with the number in r10d.
    pub(crate) link: CodeOffset,
    /// Leaves before an indirect jump to the code address in r11, because of attention.
    pub(crate) attention: CodeOffset,
    /// Called with EA in r10 and [`MissInfo`] in r11, guest flags restored: fills the delta table. Returns behind the
    /// [`JMP_BYTES`] byte jump after the call to try again, and to that jump if the access is for the interpreter.
    pub(crate) miss: CodeOffset,
    /// Jumped to with the target in r11 and the source in r9 when the jump cache has no block for it.
    pub(crate) indirect: CodeOffset,
    /// The same where nothing is left to do but to jump, when the target is not in its first place in the jump cache.
    pub(crate) second: CodeOffset,
    /// Leaves to interpret the instruction at the stored `rip`.
    pub(crate) interpret: CodeOffset,
    /// `exit`, `link` and `interpret` where the status flags are in `saved_flags` (as they are at `attention` and `indirect`).
    pub(crate) exit_saved: CodeOffset,
    pub(crate) link_saved: CodeOffset,
    pub(crate) interpret_saved: CodeOffset,
    /// Called with a recipe for status flags in EAX (see `emit::recipe`): returns them in AX, as LAHF and SETO AL do.
    pub(crate) flags: CodeOffset,
}

impl Stubs {
    /// All of them, by where they begin.
    pub(crate) fn all(&self) -> [(CodeOffset, &'static str); 12] {
        let Stubs { enter, exit, link, attention, miss, indirect, second, interpret, .. } = *self;
        let Stubs { exit_saved, link_saved, interpret_saved, flags, .. } = *self;
        let mut all = [
            (enter, "enter"),
            (exit, "exit"),
            (link, "link"),
            (attention, "attention"),
            (miss, "miss"),
            (indirect, "indirect"),
            (second, "second"),
            (interpret, "interpret"),
            (exit_saved, "exit_saved"),
            (link_saved, "link_saved"),
            (interpret_saved, "interpret_saved"),
            (flags, "flags"),
        ];
        all.sort_unstable();
        all
    }
}

/// Bytes of the `jmp rel32` that follows every call of the miss stub.
pub(crate) const JMP_BYTES: u64 = 5;

/// What kind of access missed: size in bits 0–7 and the bits below.
pub(crate) struct MissInfo;

impl MissInfo {
    pub(crate) const WRITE: u64 = 1 << 8;
    /// Only if the guest could not tell: the page is accessed (and dirty) already, nothing faults.
    pub(crate) const SOFT: u64 = 1 << 9;
    /// #GP unless a multiple of its size, before its page is looked at.
    pub(crate) const ALIGNED: u64 = 1 << 10;
    /// A locked access: it must not cross a cache line where the host punishes that.
    pub(crate) const LOCKED: u64 = 1 << 11;

    /// An access of `size` bytes.
    pub(crate) fn of(size: u32, write: bool) -> u64 {
        u64::from(size) | if write { MissInfo::WRITE } else { 0 }
    }
}

/// Called by the miss stub: [`JMP_BYTES`] = filled, try again; 0 = for the interpreter.
pub(crate) type MissHelper = unsafe extern "sysv64" fn(*mut crate::context::JitContext) -> u64;

fn save_vectors(ops: &mut SimpleAssembler) {
    for i in 0..16u8 {
        let at = ctx!(ymm) + i32::from(i) * 32;
        dynasm!(ops ; .arch x64 ; vmovdqu [rsp + at], Ry(i));
    }
}

fn load_vectors(ops: &mut SimpleAssembler) {
    for i in 0..16u8 {
        let at = ctx!(ymm) + i32::from(i) * 32;
        dynasm!(ops ; .arch x64 ; vmovdqu Ry(i), [rsp + at]);
    }
}

fn save_gprs(ops: &mut SimpleAssembler) {
    for (guest, host) in PINNED {
        let at = ctx!(spill) + i32::from(guest) * 8;
        dynasm!(ops ; .arch x64 ; mov [rsp + at], Rq(host));
    }
    dynasm!(ops ; .arch x64 ; mov [rsp + ctx!(spill) + 32], r8);
}

fn load_gprs(ops: &mut SimpleAssembler) {
    for (guest, host) in PINNED {
        let at = ctx!(spill) + i32::from(guest) * 8;
        dynasm!(ops ; .arch x64 ; mov Rq(host), [rsp + at]);
    }
    dynasm!(ops ; .arch x64 ; mov r8, [rsp + ctx!(spill) + 32]);
}

/// `jmp` to another place of the cache, emitted for code that will start at `start`.
fn jmp_to(ops: &mut SimpleAssembler, start: CodeOffset, target: CodeOffset) {
    let site = start.0 as i32 + ops.offset().0 as i32 + 1;
    ops.push(0xE9);
    ops.push_i32(target.0 as i32 - (site + 4));
}

/// Puts the status flags aside, in `saved_flags`; uses r10.
pub(crate) fn save_flags(ops: &mut SimpleAssembler) {
    let at = ctx!(saved_flags) as i8;
    dynasm!(ops ; .arch x64 ; mov r10, rax ; lahf ; seto al ; mov [BYTE rsp + at], ax ; mov rax, r10);
}

/// Brings the status flags back from `saved_flags`; uses host register `scratch`. Returns where the displacement of a call of
/// the stub `flags` belongs.
#[must_use]
pub(crate) fn restore_flags(ops: &mut SimpleAssembler, scratch: u8) -> usize {
    let at = ctx!(saved_flags) as i8;
    dynasm!(ops
        ; .arch x64
        ; mov Rq(scratch), rax
        ; mov eax, [BYTE rsp + at]
        ; test al, MARK
        ; .u8 0x74, 5 // jz over the call
        ; .u8 0xE8
    );
    let call = ops.offset().0;
    ops.push_i32(0);
    dynasm!(ops ; .arch x64 ; add al, 127 ; sahf ; mov rax, Rq(scratch));
    call
}

/// The same in a stub that will start at `start`.
fn restore_flags_here(ops: &mut SimpleAssembler, scratch: u8, start: CodeOffset, flags: CodeOffset) {
    let call = restore_flags(ops, scratch);
    let rel = flags.0 as i32 - (start.0 as i32 + call as i32 + 4);
    ops.ops[call..call + 4].copy_from_slice(&rel.to_le_bytes());
}

/// Follows the recipe in EAX: flags as by LAHF and SETO AL, in AX. Keeps all other registers.
fn emit_flags() -> SimpleAssembler {
    /// Bytes for each kind and size: four times what lies between two numbers.
    const STRIDE: usize = 32;
    let mut ops = SimpleAssembler::new();
    // The return address and three registers lie below the context.
    dynasm!(ops
        ; .arch x64
        ; push rcx ; push rdx ; push rbx
        ; movsxd rdx, eax
        ; sar rdx, 16
        ; mov rcx, [rsp + 32 + ctx!(flags_value)]
        ; test al, OPERAND
        ; cmovnz rdx, [rsp + 32 + ctx!(flags_operand)]
        ; and eax, NUMBERED
        ; .u8 0x48, 0x8D, 0x1D, 0, 0, 0, 0 // lea rbx, [rip + …]
    );
    let from = ops.offset().0;
    dynasm!(ops ; .arch x64 ; lea rbx, [rbx + rax * 4] ; jmp rbx);
    let table = (ops.offset().0 - from) as i32;
    ops.ops[from - 4..from].copy_from_slice(&table.to_le_bytes());
    for (kind, size) in KINDS.into_iter().flat_map(|kind| [1, 2, 4, 8].map(|size| (kind, size))) {
        let start = ops.offset().0;
        match kind {
            Kind::Sum => dynasm!(ops ; .arch x64 ; sub rcx, rdx),
            Kind::Difference => dynasm!(ops ; .arch x64 ; add rcx, rdx),
            Kind::Logic | Kind::Compared => {}
        }
        match (kind, size) {
            (Kind::Logic, 1) => dynasm!(ops ; .arch x64 ; test cl, cl),
            (Kind::Logic, 2) => dynasm!(ops ; .arch x64 ; test cx, cx),
            (Kind::Logic, 4) => dynasm!(ops ; .arch x64 ; test ecx, ecx),
            (Kind::Logic, _) => dynasm!(ops ; .arch x64 ; test rcx, rcx),
            (Kind::Sum, 1) => dynasm!(ops ; .arch x64 ; add cl, dl),
            (Kind::Sum, 2) => dynasm!(ops ; .arch x64 ; add cx, dx),
            (Kind::Sum, 4) => dynasm!(ops ; .arch x64 ; add ecx, edx),
            (Kind::Sum, _) => dynasm!(ops ; .arch x64 ; add rcx, rdx),
            (_, 1) => dynasm!(ops ; .arch x64 ; cmp cl, dl),
            (_, 2) => dynasm!(ops ; .arch x64 ; cmp cx, dx),
            (_, 4) => dynasm!(ops ; .arch x64 ; cmp ecx, edx),
            (_, _) => dynasm!(ops ; .arch x64 ; cmp rcx, rdx),
        }
        dynasm!(ops ; .arch x64 ; lahf ; seto al ; pop rbx ; pop rdx ; pop rcx ; ret);
        ops.ops.resize(start + STRIDE, 0xCC);
    }
    ops
}

fn emit_enter() -> SimpleAssembler {
    let mut ops = SimpleAssembler::new();
    dynasm!(ops
        ; .arch x64
        ; push rbx ; push rbp ; push r12 ; push r13 ; push r14 ; push r15
        ; mov [rdi + ctx!(host_rsp)], rsp
        ; stmxcsr [rdi + ctx!(host_mxcsr)]
        ; mov rsp, rdi
        ; ldmxcsr [rsp + ctx!(mxcsr)]
        ; mov r14, [rsp + ctx!(write_base)]
        ; mov r15, [rsp + ctx!(read_base)]
    );
    load_vectors(&mut ops);
    // Status flags: OF from bit 11 by an addition, the others by SAHF.
    dynasm!(ops
        ; .arch x64
        ; mov rax, [rsp + ctx!(status)]
        ; mov ecx, eax
        ; shr ecx, 11
        ; and ecx, 1
        ; mov ah, al
        ; mov al, cl
        ; mov [rsp + ctx!(saved_flags)], ax
        ; add al, 127
        ; sahf
    );
    load_gprs(&mut ops);
    // Where the target is not known the way to look it up wants it in r11; r9 names no source.
    dynasm!(ops
        ; .arch x64
        ; mov r11, [rsp + ctx!(rip)]
        ; mov r9d, 0
        ; jmp QWORD [rsp + ctx!(entry)]
    );
    ops
}

fn emit_exit() -> SimpleAssembler {
    let mut ops = SimpleAssembler::new();
    // STAC and CLAC may have changed the view.
    dynasm!(ops
        ; .arch x64
        ; mov [rsp + ctx!(reason)], r10d
        ; mov [rsp + ctx!(write_base)], r14
        ; mov [rsp + ctx!(read_base)], r15
    );
    save_gprs(&mut ops);
    dynasm!(ops
        ; .arch x64
        ; lahf
        ; seto al
        ; movzx ecx, ah
        ; movzx eax, al
        ; shl eax, 11
        ; or eax, ecx
        ; mov [rsp + ctx!(status)], rax
    );
    save_vectors(&mut ops);
    dynasm!(ops
        ; .arch x64
        ; vzeroupper
        ; stmxcsr [rsp + ctx!(mxcsr)]
        ; ldmxcsr [rsp + ctx!(host_mxcsr)]
        ; mov rsp, [rsp + ctx!(host_rsp)]
        ; pop r15 ; pop r14 ; pop r13 ; pop r12 ; pop rbp ; pop rbx
        ; ret
    );
    ops
}

/// The way to `target` where the status flags are in `saved_flags`; keeps r10.
fn emit_saved(start: CodeOffset, target: CodeOffset, flags: CodeOffset) -> SimpleAssembler {
    let mut ops = SimpleAssembler::new();
    restore_flags_here(&mut ops, R11, start, flags);
    jmp_to(&mut ops, start, target);
    ops
}

fn emit_link(start: CodeOffset, exit: CodeOffset) -> SimpleAssembler {
    let mut ops = SimpleAssembler::new();
    dynasm!(ops ; .arch x64 ; mov [rsp + ctx!(link)], r10d ; mov r10d, Reason::Link as i32);
    jmp_to(&mut ops, start, exit);
    ops
}

fn emit_attention(start: CodeOffset, exit: CodeOffset, flags: CodeOffset) -> SimpleAssembler {
    let mut ops = SimpleAssembler::new();
    dynasm!(ops ; .arch x64 ; mov [rsp + ctx!(rip)], r11 ; mov r10d, Reason::Attention as i32);
    restore_flags_here(&mut ops, R11, start, flags);
    jmp_to(&mut ops, start, exit);
    ops
}

fn emit_interpret(start: CodeOffset, exit: CodeOffset) -> SimpleAssembler {
    let mut ops = SimpleAssembler::new();
    dynasm!(ops ; .arch x64 ; mov r10d, Reason::Interpret as i32);
    jmp_to(&mut ops, start, exit);
    ops
}

/// The return address into the block's cold code waits in the context, so that field offsets from RSP stay plain and
/// the stack is aligned for the call. r9 (a group's host address) survives.
fn emit_miss(helper: MissHelper) -> SimpleAssembler {
    let mut ops = SimpleAssembler::new();
    dynasm!(ops
        ; .arch x64
        ; mov [rsp + 8 + ctx!(miss_info)], r11
        ; pop r11
        ; mov [rsp + ctx!(miss_return)], r11
        ; mov [rsp + ctx!(miss_ea)], r10
    );
    save_gprs(&mut ops);
    dynasm!(ops
        ; .arch x64
        ; mov [rsp + ctx!(miss_group)], r9
        ; lahf
        ; seto al
        ; mov [rsp + ctx!(miss_flags)], rax
    );
    save_vectors(&mut ops);
    dynasm!(ops
        ; .arch x64
        ; vzeroupper
        ; mov rdi, rsp
        ; mov rax, QWORD helper as usize as i64
        ; call rax
        ; add [rsp + ctx!(miss_return)], rax
    );
    load_vectors(&mut ops);
    dynasm!(ops
        ; .arch x64
        ; mov rax, [rsp + ctx!(miss_flags)]
        ; add al, 127
        ; sahf
    );
    load_gprs(&mut ops);
    dynasm!(ops
        ; .arch x64
        ; mov r9, [rsp + ctx!(miss_group)]
        ; mov r10, [rsp + ctx!(miss_ea)]
        ; jmp QWORD [rsp + ctx!(miss_return)]
    );
    ops
}

fn emit_indirect(start: CodeOffset, exit: CodeOffset, flags: CodeOffset) -> SimpleAssembler {
    let mut ops = SimpleAssembler::new();
    dynasm!(ops
        ; .arch x64
        ; mov [rsp + ctx!(rip)], r11
        ; mov [rsp + ctx!(source)], r9
        ; mov r10d, Reason::Indirect as i32
    );
    restore_flags_here(&mut ops, R11, start, flags);
    jmp_to(&mut ops, start, exit);
    ops
}

/// Looks in the target's second place in the jump cache (see `pages`), and for attention, as `emit::flow` does at the first.
fn emit_second(start: CodeOffset, indirect: CodeOffset, attention: CodeOffset) -> SimpleAssembler {
    const PLACES: i32 = ((SECOND_ENTRIES - 1) * size_of::<Entry>()) as i32;
    const BEHIND: i32 = (ENTRIES * size_of::<Entry>()) as i32;
    const _: () = assert!(SECOND_FACTOR <= i32::MAX as u64 && size_of::<Entry>() == 16);
    let mut ops = SimpleAssembler::new();
    dynasm!(ops
        ; .arch x64
        ; imul r10, r11, SECOND_FACTOR as i32
        ; shr r10, 28
        ; and r10d, PLACES
        ; add r10, [rsp + ctx!(jump_cache)]
        ; cmp r11, [r10 + BEHIND]
        ; .u8 0x74, 5 // je over the jump
    );
    jmp_to(&mut ops, start, indirect);
    dynasm!(ops
        ; .arch x64
        ; mov r9, [rsp + ctx!(attention)]
        ; cmp DWORD [r9], 0
        ; .u8 0x74, 5
    );
    jmp_to(&mut ops, start, attention);
    dynasm!(ops ; .arch x64 ; jmp QWORD [r10 + BEHIND + 8]);
    ops
}

/// Emits all stubs at the start of `cache`.
pub(crate) fn emit(cache: &mut CodeCache, helper: MissHelper) -> Stubs {
    let enter = cache.append(&emit_enter().finalize());
    let exit = cache.append(&emit_exit().finalize());
    let miss = cache.append(&emit_miss(helper).finalize());
    let flags = cache.append(&emit_flags().finalize());
    let mut append = |stub: &dyn Fn(CodeOffset) -> SimpleAssembler| {
        let start = cache.next();
        cache.append(&stub(start).finalize())
    };
    let interpret = append(&|at| emit_interpret(at, exit));
    let link = append(&|at| emit_link(at, exit));
    let attention = append(&|at| emit_attention(at, exit, flags));
    let indirect = append(&|at| emit_indirect(at, exit, flags));
    let second = append(&|at| emit_second(at, indirect, attention));
    let [exit_saved, link_saved, interpret_saved] =
        [exit, link, interpret].map(|to| append(&|at| emit_saved(at, to, flags)));
    Stubs {
        enter,
        exit,
        link,
        attention,
        miss,
        indirect,
        second,
        interpret,
        exit_saved,
        link_saved,
        interpret_saved,
        flags,
    }
}

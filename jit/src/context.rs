//! What translated code reaches through the host's RSP: homes of guest registers without a host register,
//! spill space, and everything the stubs exchange with the run loop.
//!
//! While translated code runs, host RSP points to this structure, which lies at the top of a private stack, so that
//! stubs can push and call. Host registers then hold:
//!
//! | host | holds |
//! |---|---|
//! | rax rcx rdx rbx rbp rsi rdi | the guest register of that name |
//! | r12, r13 | guest R8, R9 |
//! | r8 | guest RSP |
//! | r14, r15 | write view, read view (address of the delta table plus a constant, see `delta`); r14 the probes of a window (see `windows`) |
//! | GS base | what a window adds to addresses |
//! | r9, r10, r11 | scratch |
//! | EFLAGS status bits | the guest's, unless they are in [`JitContext::saved_flags`] |
//! | x87, MMX, XMM/YMM, MXCSR | the guest's |
//!
//! Guest R10 to R15 live in [`JitContext::home`].

use crate::segments::Bounds;

/// Why translated code came back; in [`JitContext::reason`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum Reason {
    /// A direct exit that is not chained yet: `link` names it.
    Link = 0,
    /// An indirect transfer whose target is not in the jump cache: `rip` is the target.
    Indirect = 1,
    /// The instruction at `rip` is for the interpreter.
    Interpret = 2,
    /// The attention word was set; go on at `rip`.
    Attention = 3,
    /// SYSCALL at `rip`, from CPL 3 in 64-bit mode, not to be done in translated code.
    Syscall = 4,
    /// SYSRETQ at `rip`, at CPL 0 in 64-bit mode, likewise.
    Sysret = 5,
    /// The block at `rip` has more instructions than the budget has left.
    Budget = 6,
}

/// See the module documentation. Offsets are taken with `offset_of!`.
#[repr(C, align(64))]
pub(crate) struct JitContext {
    /// Guest registers, by [`crate::regs::HOMES`].
    pub(crate) home: [u64; 6],
    pub(crate) tmp: [u64; 2],
    /// Address of the vCPU's attention word.
    pub(crate) attention: u64,
    /// Base of the current jump cache.
    pub(crate) jump_cache: u64,
    pub(crate) rip: u64,
    /// Status flags that were put aside: they travel here across indirect transfers, and where a block's checks would have to
    /// keep them for who knows whom (see `frontend`). As LAHF and SETO AL leave them in AX, or the recipe (see
    /// `emit::recipe`) to make them from `flags_value` and `flags_operand`.
    pub(crate) saved_flags: u64,
    pub(crate) flags_value: u64,
    pub(crate) flags_operand: u64,
    /// Host addresses of the base groups beyond the one in r9.
    pub(crate) group_slots: [u64; crate::groups::SLOTS],
    /// Linear bases of ES, CS, SS, DS, FS, GS.
    pub(crate) seg_base: [u64; 6],
    /// Guest status flags on entry and exit (host layout).
    pub(crate) status: u64,
    pub(crate) reason: u32,
    pub(crate) link: u32,
    /// RFLAGS without the status flags, IF, AC.
    pub(crate) system_flags: u64,
    /// IF and AC, a byte each so that they change without touching flags.
    pub(crate) interrupt_flag: u8,
    pub(crate) access_flag: u8,
    /// An interrupt waits for IF.
    pub(crate) interrupt_pending: u32,
    pub(crate) kernel_gs_base: u64,
    /// Selectors of ES, CS, SS, DS, FS, GS.
    pub(crate) selectors: [u16; 6],
    pub(crate) flags_image: u64,
    /// CR0 to CR4.
    pub(crate) control: [u64; 5],
    /// Guest time-stamp counter minus the host's.
    pub(crate) tsc_offset: u64,
    pub(crate) tsc_aux: u32,
    /// PAUSEs before the next one leaves.
    pub(crate) pauses: i32,
    /// An address in the code of the indirect jump that found no block.
    pub(crate) source: u64,
    /// What r14 holds in code that uses a window, and the base of the write table, which it does not hold then.
    pub(crate) window_probes: u64,
    pub(crate) write_table: u64,
    /// Read and write bases of the supervisor views without and with EFLAGS.AC.
    pub(crate) views: [[u64; 2]; 2],
    /// Whether SYSCALL and SYSRET, and whether IRET may be done in translated code; what follows is for them.
    pub(crate) system_calls: u32,
    pub(crate) interrupt_returns: u32,
    /// CPL 0 and CPL 3.
    pub(crate) levels: [Level; 2],
    /// Selectors of CS and SS behind SYSCALL and SYSRET.
    pub(crate) call_selectors: [u32; 2],
    /// Whose segments CS and SS are now: 0 as on entry, 1 of SYSCALL, 2 of SYSRET, above that of `returns`.
    pub(crate) loaded: u32,
    /// The status flags that SYSCALL keeps, laid out as in `saved_flags`.
    pub(crate) syscall_keeps: u32,
    /// Where SYSCALL leads.
    pub(crate) lstar: u64,
    /// What IRET may load into CS and SS.
    pub(crate) returns: [Return; RETURNS],
    /// Retired instructions, counted at block entry when the mode asks for it.
    pub(crate) instructions: u64,
    /// What `instructions` may reach.
    pub(crate) budget: u64,
    /// What host registers hold, by guest number, while translated code does not run.
    pub(crate) spill: [u64; 16],
    pub(crate) host_rsp: u64,
    pub(crate) host_mxcsr: u32,
    pub(crate) mxcsr: u32,
    pub(crate) read_base: u64,
    pub(crate) write_base: u64,
    /// Address of the code to enter.
    pub(crate) entry: u64,
    /// `self` of the translator, for helpers.
    pub(crate) engine: u64,
    /// EA, access size and kind of a miss.
    pub(crate) miss_ea: u64,
    pub(crate) miss_info: u64,
    pub(crate) miss_return: u64,
    pub(crate) miss_flags: u64,
    /// r9 at a miss.
    pub(crate) miss_group: u64,
    pub(crate) ymm: [[u8; 32]; 16],
    /// For each linear code page in use: its backing page number + 1 while that translation is known to hold.
    pub(crate) xslots: [u32; XSLOTS],
    /// Passes that are left before a loop is hot, by the number of the link that closes it.
    pub(crate) heat: [u32; HEAT],
    /// Bounds of ES, CS, SS, DS, FS, GS (current outside 64-bit code).
    pub(crate) bounds: [Bounds; 6],
}

/// Privilege levels as translated code changes them: bases of the views and of the jump cache.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Level {
    pub(crate) read_base: u64,
    pub(crate) write_base: u64,
    pub(crate) jump_cache: u64,
    /// Bits of RSP, and what they must be: else the run loop looks whether code may run with it (see `windows`).
    pub(crate) stack_mask: u64,
    pub(crate) stack: u64,
}

/// Segments that IRET loaded before, and the descriptors that must be in their places still.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Return {
    /// Selectors of CS and, from bit 16 on, SS; [`Return::NONE`] where nothing was loaded yet.
    pub(crate) selectors: u64,
    /// Offset of the level in [`JitContext::levels`].
    pub(crate) level: u32,
    /// For [`JitContext::loaded`].
    pub(crate) number: u32,
    /// For CS and SS: host address of the cell of the supervisor's read table, linear address, and the descriptor.
    pub(crate) descriptors: [[u64; 3]; 2],
}

impl Return {
    /// No selectors that a frame may hold.
    pub(crate) const NONE: u64 = u64::MAX;
}

/// To CPL 3, to CPL 0, and to CPL 0 with a null SS.
pub(crate) const RETURNS: usize = 3;

/// Offset of a field from host RSP.
macro_rules! ctx {
    ($($field:tt)+) => {
        std::mem::offset_of!($crate::context::JitContext, $($field)+) as i32
    };
}
pub(crate) use ctx;

// Emitted code reaches these with displacements of one byte.
const _: () = assert!(ctx!(flags_operand) < 128 && ctx!(jump_cache) < 128);

/// Bytes of private stack below the context.
const STACK: usize = 256 * 1024;

/// A private stack with the context on top.
pub(crate) struct ContextStack {
    memory: memmap2::MmapMut,
}

impl ContextStack {
    pub(crate) fn new() -> std::io::Result<ContextStack> {
        let len = STACK + size_of::<JitContext>().next_multiple_of(4096);
        Ok(ContextStack { memory: memmap2::MmapMut::map_anon(len)? })
    }

    /// The context; valid as long as `self`.
    pub(crate) fn context(&mut self) -> *mut JitContext {
        // The mapping is page-aligned, so the context is 64-aligned.
        self.memory[STACK..].as_mut_ptr().cast()
    }
}

/// Page-validation cells; see `pages`.
pub(crate) const XSLOTS: usize = 65_536;

/// Links that are counted at a time; more share.
pub(crate) const HEAT: usize = 4_096;

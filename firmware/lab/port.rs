//! I/O ports.
//!
//! Safety: the program owns every port; what a port access makes a device do to memory is its driver's concern.

use core::arch::asm;

macro_rules! access {
    ($input:ident, $output:ident, $type:ty, $reg:tt, $in:literal, $out:literal) => {
        pub fn $input(port: u16) -> $type {
            let value: $type;
            // SAFETY: the program owns every port.
            unsafe { asm!($in, out($reg) value, in("dx") port, options(nomem, nostack, preserves_flags)) };
            value
        }
        pub fn $output(port: u16, value: $type) {
            // SAFETY: the program owns every port; bus masters may read memory on this.
            unsafe { asm!($out, in("dx") port, in($reg) value, options(nostack, preserves_flags)) };
        }
    };
}

access!(in8, out8, u8, "al", "in al, dx", "out dx, al");
access!(in16, out16, u16, "ax", "in ax, dx", "out dx, ax");
access!(in32, out32, u32, "eax", "in eax, dx", "out dx, eax");

/// `rep insw`: `words` words from `port` to memory at `to`.
///
/// # Safety
/// `to` must be writable for `2 * words` bytes.
pub unsafe fn ins16(port: u16, to: u64, words: u64) {
    // SAFETY: by the caller.
    unsafe {
        asm!("rep insw", in("dx") port, inout("rdi") to => _, inout("rcx") words => _,
            options(nostack, preserves_flags))
    };
}

/// `rep outsw`: `words` words of memory at `from` to `port`.
///
/// # Safety
/// `from` must be readable for `2 * words` bytes.
pub unsafe fn outs16(port: u16, from: u64, words: u64) {
    // SAFETY: by the caller.
    unsafe {
        asm!("rep outsw", in("dx") port, inout("rsi") from => _, inout("rcx") words => _,
            options(nostack, preserves_flags))
    };
}

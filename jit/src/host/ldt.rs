//! Segments of this process's own: Linux lets any process fill its LDT (`modify_ldt`, where the kernel was built with it).
//!
//! Invariant: entries describe user segments only (the kernel refuses others), and 64-bit code ignores their bases and
//! limits, so that Rust code is never affected.

use std::io;

/// `struct user_desc` of `<asm/ldt.h>`.
#[repr(C)]
struct UserDesc {
    entry: u32,
    base: u32,
    limit: u32,
    flags: u32,
}

/// `modify_ldt`'s function that writes an entry and knows the `useable` bit.
const WRITE: libc::c_long = 0x11;

/// Bits of [`UserDesc::flags`].
const CONTENTS_CODE: u32 = 2 << 1;
const NOT_PRESENT: u32 = 1 << 5;
const USEABLE: u32 = 1 << 6;
const EMPTY: u32 = 1 << 3 | NOT_PRESENT;

/// What a 16-bit segment holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Content {
    /// Readable code.
    Code,
    /// Writable data, upwards from the base.
    Data,
}

/// Puts a 16-bit segment (descriptor bit D/B clear) into entry `entry` and returns its selector.
pub(super) fn set_sixteen_bit(entry: u16, content: Content, base: u32, limit: u16) -> io::Result<u16> {
    let content = if content == Content::Code { CONTENTS_CODE } else { 0 };
    write(&UserDesc { entry: u32::from(entry), base, limit: u32::from(limit), flags: content | USEABLE })?;
    Ok(entry << 3 | 7)
}

/// Empties entry `entry`.
pub(super) fn clear(entry: u16) -> io::Result<()> {
    write(&UserDesc { entry: u32::from(entry), base: 0, limit: 0, flags: EMPTY })
}

fn write(description: &UserDesc) -> io::Result<()> {
    // SAFETY: a valid structure of this size, which the kernel only reads.
    let done =
        unsafe { libc::syscall(libc::SYS_modify_ldt, WRITE, &raw const *description, size_of::<UserDesc>()) };
    // The kernel returns the value as an unsigned int: errors arrive as small negative 32-bit numbers.
    match done as i32 {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

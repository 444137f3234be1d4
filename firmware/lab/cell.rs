//! A static that one thread owns.
//!
//! Invariant: one processor runs one thread; interrupt handlers touch no [`Fixed`].

use core::cell::UnsafeCell;

/// Storage at a fixed address, aligned for page tables, rings and descriptor tables.
#[repr(C, align(4096))]
pub struct Fixed<T>(UnsafeCell<T>);

// SAFETY: there is one processor, and handlers run only while it waits.
unsafe impl<T> Sync for Fixed<T> {}

impl<T> Fixed<T> {
    pub const fn new(value: T) -> Fixed<T> {
        Fixed(UnsafeCell::new(value))
    }

    pub const fn get(&self) -> *mut T {
        self.0.get()
    }

    pub fn address(&self) -> u64 {
        self.0.get() as u64
    }
}

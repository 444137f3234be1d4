//! Guest memory as the vm-memory traits see it, for crates that are written against them (virtio-queue).
//!
//! One region per RAM range of the machine; what is not RAM (the hole below 4 GiB) is not there. ROM and overlay pages
//! are not modelled: an access under them reaches the RAM beneath. Stores through the traits
//! are reported to [`GuestMemory::wrote`] by way of the bitmap hook, so translated code is invalidated.
//!
//! Invariants this unsafe island relies on:
//! * a region's `offset..offset + len` lies inside the backing, which lives as long as the [`GuestMemory`] the region holds;
//! * other users of guest memory make no Rust references into it, only raw copies and atomics.

use crate::addr::RamOffset;
use crate::guest::GuestMemory;
use crate::layout::Mapped;
use std::fmt;
use std::sync::Arc;
use vm_memory::bitmap::{BS, Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    MemoryRegionAddress, VolatileSlice,
};

/// Reports stores to part of a region.
#[derive(Clone, Copy)]
pub struct WriteHook<'a> {
    memory: &'a GuestMemory,
    base: RamOffset,
}

impl fmt::Debug for WriteHook<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriteHook").field("base", &self.base).finish()
    }
}

impl<'b> WithBitmapSlice<'b> for WriteHook<'_> {
    type S = Self;
}

impl BitmapSlice for WriteHook<'_> {}

impl Bitmap for WriteHook<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.memory.wrote(RamOffset(self.base.0 + offset as u64), len as u64);
    }

    /// The dirty log is kept by [`GuestMemory`]; it cannot be asked page by page.
    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> Self {
        WriteHook { memory: self.memory, base: RamOffset(self.base.0 + offset as u64) }
    }
}

/// The region's own form of [`WriteHook`].
pub struct RegionHook {
    memory: GuestMemory,
    base: RamOffset,
}

impl<'a> WithBitmapSlice<'a> for RegionHook {
    type S = WriteHook<'a>;
}

impl Bitmap for RegionHook {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.slice_at(0).mark_dirty(offset, len);
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> WriteHook<'_> {
        WriteHook { memory: &self.memory, base: RamOffset(self.base.0 + offset as u64) }
    }
}

/// One contiguous range of RAM.
pub struct VmRegion {
    start: u64,
    len: u64,
    hook: RegionHook,
}

impl GuestMemoryRegion for VmRegion {
    type B = RegionHook;

    fn len(&self) -> u64 {
        self.len
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.start)
    }

    fn bitmap(&self) -> BS<'_, RegionHook> {
        self.hook.slice_at(0)
    }

    fn get_slice(
        &self,
        at: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, RegionHook>>, GuestMemoryError> {
        let end = at.0.checked_add(count as u64).filter(|&end| end <= self.len);
        if end.is_none() {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        let hook = self.hook.slice_at(at.0 as usize);
        // SAFETY: `at + count <= len`, and the region lies inside the backing, which `self.hook.memory` keeps alive for
        // the slice's lifetime; everyone else uses raw copies and atomics.
        Ok(unsafe {
            let host = self.hook.memory.host_base().add((self.hook.base.0 + at.0) as usize);
            VolatileSlice::with_bitmap(host, count, hook, None)
        })
    }
}

impl GuestMemoryRegionBytes for VmRegion {}

/// All RAM of a machine for the vm-memory traits; clones share it.
#[derive(Clone)]
pub struct VmMemory(Arc<[VmRegion]>);

impl VmMemory {
    /// The RAM of `memory`.
    pub fn new(memory: &GuestMemory) -> VmMemory {
        let ranges = memory.ram_ranges().into_iter().filter(|&(_, len)| len > 0);
        let mut offset = 0;
        let regions = ranges.map(|(start, len)| {
            let base = RamOffset(offset);
            offset += len;
            debug_assert!(matches!(memory.resolve(start.page()), Mapped::Ram(_) | Mapped::Rom(_)));
            VmRegion { start: start.0, len, hook: RegionHook { memory: memory.clone(), base } }
        });
        VmMemory(regions.collect())
    }
}

impl fmt::Debug for VmMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|r| (r.start, r.len))).finish()
    }
}

impl GuestMemoryBackend for VmMemory {
    type R = VmRegion;

    fn iter(&self) -> impl Iterator<Item = &VmRegion> {
        self.0.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::PhysAddr;
    use crate::claims::{CodeWatcher, Notice};
    use crate::guest::MemoryConfig;
    use vm_memory::Bytes;

    struct Nobody;

    impl CodeWatcher for Nobody {
        fn code_written(&self) {}
    }

    #[test]
    fn both_ram_ranges_are_there_and_the_hole_is_not() {
        let m = GuestMemory::new(MemoryConfig { ram: 16 << 20, hole_start: 8 << 20 }).expect("memory");
        let vm = VmMemory::new(&m);
        vm.write_obj(0x1234_5678u32, GuestAddress((4 << 30) + 8)).expect("high RAM");
        assert_eq!(m.read_u32(PhysAddr((4 << 30) + 8)), Ok(0x1234_5678));
        assert!(vm.write_obj(1u32, GuestAddress(8 << 20)).is_err());
        assert!(vm.write_obj(1u32, GuestAddress((8 << 20) - 2)).is_err());
        assert!(!vm.check_range(GuestAddress(u64::MAX - 8), 4096));
        assert!(vm.check_range(GuestAddress(0), 8 << 20));
    }

    #[test]
    fn stores_are_reported() {
        let m = GuestMemory::new(MemoryConfig { ram: 16 << 20, hole_start: 8 << 20 }).expect("memory");
        let vm = VmMemory::new(&m);
        let claims = m.claims(Box::new(Nobody)).expect("a slot");
        claims.enter();
        assert!(claims.claim_code(RamOffset((8 << 20) + 0x1000)));
        vm.write_slice(&[1; 8], GuestAddress((4 << 30) + 0xFFC)).expect("high RAM");
        vm.store(7u16, GuestAddress(0x3000), std::sync::atomic::Ordering::Release).expect("RAM");
        let told: Vec<_> = claims.take_notices().collect();
        assert_eq!(told, [Notice::Written(RamOffset((8 << 20) + 0x1000), 1)]);
        assert_eq!(m.take_dirty().len(), 3);
    }
}

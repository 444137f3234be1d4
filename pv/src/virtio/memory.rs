//! Guest memory as rings and descriptors are accessed in it: whoever listens hears of each access.

use paravane_devices::{DmaPurpose, DmaTap};
use paravane_memory::{GuestMemory, PhysAddr, RegionHook, VmMemory};
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryResult, Permissions};

/// Bytes of a descriptor (VIRTIO 1.2, 2.7.5): nothing else on a ring is as long.
const DESCRIPTOR_LEN: usize = 16;

/// All RAM, for the virtqueues of one device.
pub(super) struct RingMemory {
    memory: VmMemory,
    tap: DmaTap,
}

impl RingMemory {
    pub(super) fn new(memory: &GuestMemory, tap: DmaTap) -> RingMemory {
        RingMemory { memory: VmMemory::new(memory), tap }
    }

    pub(super) fn tap(&self) -> &DmaTap {
        &self.tap
    }

    fn tell(&self, at: GuestAddress, len: usize, access: Permissions) {
        let purpose = if len == DESCRIPTOR_LEN { DmaPurpose::Descriptor } else { DmaPurpose::Ring };
        match access.has_write() {
            true => self.tap.wrote(purpose, PhysAddr(at.0), len as u64),
            false => self.tap.read(purpose, PhysAddr(at.0), len as u64),
        }
    }
}

impl vm_memory::GuestMemory for RingMemory {
    type PhysicalMemory = VmMemory;
    type Bitmap = RegionHook;

    fn check_range(&self, at: GuestAddress, len: usize, _access: Permissions) -> bool {
        GuestMemoryBackend::check_range(&self.memory, at, len)
    }

    fn get_slices<'a>(
        &'a self,
        at: GuestAddress,
        len: usize,
        access: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, BS<'a, RegionHook>>> {
        if self.tap.listener().is_some() && GuestMemoryBackend::check_range(&self.memory, at, len) {
            self.tell(at, len, access);
        }
        Ok(GuestMemoryBackend::get_slices(&self.memory, at, len))
    }
}

//! Accesses of devices to guest memory, for whoever wants to hear of them.
//!
//! A device tells after the access; where nobody listens that is one test.

use paravane_memory::PhysAddr;
use std::fmt;
use std::sync::Arc;

/// What a device wants in guest memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DmaPurpose {
    /// What it is all about: sectors, entropy.
    Data,
    /// A request's header, its operands or its status.
    Request,
    /// Physical region descriptors of a bus master.
    Prd,
    /// A virtqueue's available or used ring.
    Ring,
    /// A virtqueue's descriptors.
    Descriptor,
}

impl DmaPurpose {
    /// All of them.
    pub const ALL: [DmaPurpose; 5] =
        [DmaPurpose::Data, DmaPurpose::Request, DmaPurpose::Prd, DmaPurpose::Ring, DmaPurpose::Descriptor];

    /// As a word.
    pub const fn name(self) -> &'static str {
        match self {
            DmaPurpose::Data => "data",
            DmaPurpose::Request => "request",
            DmaPurpose::Prd => "prd",
            DmaPurpose::Ring => "ring",
            DmaPurpose::Descriptor => "descriptor",
        }
    }
}

/// One access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DmaAccess {
    /// First byte.
    pub at: PhysAddr,
    /// Bytes.
    pub len: u64,
    /// Into guest memory.
    pub write: bool,
    /// What for.
    pub purpose: DmaPurpose,
}

/// Who hears of one device's accesses.
pub trait DmaWatch: Send + Sync {
    /// Whether anybody listens now.
    fn listens(&self) -> bool;
    /// The device did this.
    fn accessed(&self, access: DmaAccess);
}

/// Where a device tells of its accesses.
#[derive(Clone, Default)]
pub struct DmaTap(Option<Arc<dyn DmaWatch>>);

impl DmaTap {
    /// `watch` hears of everything.
    pub fn new(watch: Arc<dyn DmaWatch>) -> DmaTap {
        DmaTap(Some(watch))
    }

    /// Nobody will ever listen.
    pub fn nobody() -> DmaTap {
        DmaTap(None)
    }

    /// Whoever listens now.
    pub fn listener(&self) -> Option<&dyn DmaWatch> {
        self.0.as_deref().filter(|watch| watch.listens())
    }

    /// The device read `len` bytes at `at`.
    pub fn read(&self, purpose: DmaPurpose, at: PhysAddr, len: u64) {
        self.tell(DmaAccess { at, len, write: false, purpose });
    }

    /// The device wrote `len` bytes at `at`.
    pub fn wrote(&self, purpose: DmaPurpose, at: PhysAddr, len: u64) {
        self.tell(DmaAccess { at, len, write: true, purpose });
    }

    fn tell(&self, access: DmaAccess) {
        if let Some(watch) = self.listener().filter(|_| access.len > 0) {
            watch.accessed(access);
        }
    }
}

impl fmt::Debug for DmaTap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaTap").field("listens", &self.listener().is_some()).finish()
    }
}

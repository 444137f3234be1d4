//! Names and numbers of VIRTIO 1.2 (OASIS) and of its legacy interfaces.

/// PCI vendor of virtio devices.
pub(super) const VENDOR: u16 = 0x1AF4;
/// Modern device IDs count from here by device type.
pub(super) const MODERN_DEVICE_BASE: u16 = 0x1040;

/// Device types (section 5).
pub(super) mod device_type {
    pub const BLOCK: u16 = 2;
    pub const ENTROPY: u16 = 4;
}

/// Device status bits (section 2.1).
pub(super) mod status {
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 0x40;
    pub const FAILED: u8 = 0x80;
}

/// Device-independent feature bits (section 6).
pub(super) mod feature {
    pub const ANY_LAYOUT: u64 = 1 << 27;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
}

/// Types of vendor-specific PCI capabilities (section 4.1.4).
pub(super) mod capability {
    pub const COMMON: u8 = 1;
    pub const NOTIFY: u8 = 2;
    pub const ISR: u8 = 3;
    pub const DEVICE: u8 = 4;
    pub const PCI: u8 = 5;
}

/// Common configuration structure (section 4.1.4.3).
pub(super) mod common {
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    pub const DEVICE_FEATURE: u64 = 4;
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 12;
    pub const CONFIG_MSIX_VECTOR: u64 = 16;
    pub const NUM_QUEUES: u64 = 18;
    pub const DEVICE_STATUS: u64 = 20;
    pub const CONFIG_GENERATION: u64 = 21;
    pub const QUEUE_SELECT: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_MSIX_VECTOR: u64 = 26;
    pub const QUEUE_ENABLE: u64 = 28;
    pub const QUEUE_NOTIFY_OFF: u64 = 30;
    pub const QUEUE_DESC: u64 = 32;
    pub const QUEUE_DRIVER: u64 = 40;
    pub const QUEUE_DEVICE: u64 = 48;
}

/// Legacy interface in I/O BAR 0 (section 4.1.4.10).
pub(super) mod legacy {
    pub const DEVICE_FEATURES: u64 = 0;
    pub const GUEST_FEATURES: u64 = 4;
    pub const QUEUE_ADDRESS: u64 = 8;
    pub const QUEUE_SIZE: u64 = 12;
    pub const QUEUE_SELECT: u64 = 14;
    pub const QUEUE_NOTIFY: u64 = 16;
    pub const DEVICE_STATUS: u64 = 18;
    pub const ISR_STATUS: u64 = 19;
    pub const CONFIG_MSIX_VECTOR: u64 = 20;
    pub const QUEUE_MSIX_VECTOR: u64 = 22;
    /// Device configuration starts here, four bytes later while MSI-X is on.
    pub const CONFIG: u64 = 20;
    pub const PAGE_SHIFT: u32 = 12;
}

/// ISR status bits (section 4.1.4.5).
pub(super) mod isr {
    pub const QUEUE: u8 = 1;
    pub const CONFIG: u8 = 2;
}

/// No MSI-X vector is assigned.
pub(super) const NO_VECTOR: u16 = 0xFFFF;
/// Available ring flag: the driver wants no interrupts.
pub(super) const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// Block device (section 5.2).
pub(super) mod blk {
    pub const F_SEG_MAX: u64 = 1 << 2;
    pub const F_RO: u64 = 1 << 5;
    pub const F_BLK_SIZE: u64 = 1 << 6;
    pub const F_FLUSH: u64 = 1 << 9;
    pub const F_TOPOLOGY: u64 = 1 << 10;
    pub const F_CONFIG_WCE: u64 = 1 << 11;
    pub const F_DISCARD: u64 = 1 << 13;
    pub const F_WRITE_ZEROES: u64 = 1 << 14;

    pub const T_IN: u32 = 0;
    pub const T_OUT: u32 = 1;
    pub const T_FLUSH: u32 = 4;
    pub const T_GET_ID: u32 = 8;
    pub const T_DISCARD: u32 = 11;
    pub const T_WRITE_ZEROES: u32 = 13;

    pub const S_OK: u8 = 0;
    pub const S_IOERR: u8 = 1;
    pub const S_UNSUPP: u8 = 2;

    pub const WRITE_ZEROES_FLAG_UNMAP: u32 = 1;
    pub const ID_BYTES: usize = 20;
    /// Offset of the writeback byte in the configuration.
    pub const CONFIG_WRITEBACK: u64 = 32;
    pub const CONFIG_LEN: usize = 60;
}

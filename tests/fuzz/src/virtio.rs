//! The regular half of a hostile virtio driver: initialization (VIRTIO 1.2, 3.1.1) and ring entries that lead somewhere.

use crate::pc::{Pc, VIRTIO_SLOTS, virtio_bar, virtio_ports};
use crate::script::Script;
use paravane_memory::{PhysAddr, Port, Width};

/// Descriptor table, available ring, used ring, request headers, data, indirect table.
pub const STRUCTURES: [u64; 6] = [0x1_0000, 0x1_1000, 0x1_2000, 0x2_0000, 0x3_0000, 0x4_0000];

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Resets a device, accepts some of its features, sets up queue 0 and sets DRIVER_OK.
pub fn start(pc: &Pc, s: &mut Script<'_>) {
    let slot = s.of(&VIRTIO_SLOTS);
    let features = s.u32() | 1 << 29;
    let [table, avail, used, ..] = STRUCTURES;
    _ = pc.memory.fill(PhysAddr(avail), 0, 0x2000);
    if slot == VIRTIO_SLOTS[1] {
        let out = |offset, width, value| pc.bus.port_out(Port(virtio_ports(slot) + offset), width, value);
        for (offset, width, value) in [
            (18, Width::W8, 0),
            (18, Width::W8, 3),
            (4, Width::W32, features),
            (14, Width::W16, 0),
            (8, Width::W32, (table >> 12) as u32),
            (18, Width::W8, 7),
        ] {
            out(offset, width, value);
        }
        return;
    }
    let store = |offset, width, value| {
        pc.bus.mmio_store(PhysAddr(virtio_bar(slot) + offset), width, value);
    };
    for (offset, value) in [(20, 0), (20, 1), (20, 3)] {
        store(offset, Width::W8, value);
    }
    for (select, bits) in [(0, features.into()), (1, 1)] {
        store(8, Width::W32, select);
        store(12, Width::W32, bits);
    }
    store(20, Width::W8, 11);
    store(22, Width::W16, 0);
    for (offset, address) in [(32, table), (40, avail), (48, used)] {
        store(offset, Width::W64, address);
    }
    store(28, Width::W16, 1);
    store(20, Width::W8, 15);
}

/// Writes a chain of up to eight descriptors with a block header, offers it, and rings.
pub fn offer(pc: &Pc, s: &mut Script<'_>) {
    let slot = s.of(&VIRTIO_SLOTS);
    let [table, avail, _, header, data, indirect] = STRUCTURES;
    let (shape, first) = (s.u8(), u16::from(s.u8()));
    let count = u16::from(shape & 7) + 1;
    let through = shape & 8 != 0;
    let base = if through { indirect } else { table + u64::from(first) * 16 };
    for i in 0..count {
        let kind = s.u8();
        let address = match kind & 7 {
            0 => s.wild(),
            _ if i == 0 => header,
            n => data + u64::from(n) * 0x800,
        };
        let len = match kind >> 3 & 3 {
            0 if i == 0 => 16,
            0 => 1,
            1 => 512,
            2 => s.u16().into(),
            _ => s.u32(),
        };
        let flags = if i + 1 < count { NEXT } else { 0 } | if kind & 0x20 != 0 { WRITE } else { 0 };
        let flags = if kind >> 6 == 3 { flags ^ u16::from(s.u8()) } else { flags };
        let next = if through { i + 1 } else { first + i + 1 };
        descriptor(pc, base + u64::from(i) * 16, address, len, flags, next);
    }
    if through {
        descriptor(pc, table + u64::from(first) * 16, indirect, u32::from(count) * 16, INDIRECT, 0);
    }
    let request =
        [&u32::from(s.u8() & 15).to_le_bytes()[..], &[0; 4], &u64::from(s.u8()).to_le_bytes()].concat();
    _ = pc.memory.write(PhysAddr(header), &request);
    let index = pc.memory.read_u16(PhysAddr(avail + 2)).unwrap_or(0);
    _ = pc.memory.write(PhysAddr(avail + 4 + 2 * u64::from(index % 256)), &first.to_le_bytes());
    _ = pc.memory.write(PhysAddr(avail + 2), &index.wrapping_add(1).to_le_bytes());
    if slot == VIRTIO_SLOTS[1] {
        pc.bus.port_out(Port(virtio_ports(slot) + 16), Width::W16, 0);
    } else {
        pc.bus.mmio_store(PhysAddr(virtio_bar(slot) + 0x3000), Width::W16, 0);
    }
}

fn descriptor(pc: &Pc, at: u64, address: u64, len: u32, flags: u16, next: u16) {
    let raw = u128::from(address) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
    _ = pc.memory.write(PhysAddr(at), &raw.to_le_bytes());
}

//! The regular half of a hostile IDE driver: a command with its parameters, a PRD table, and the bus master's start.

use crate::pc::{BUS_MASTER, Pc};
use crate::script::Script;
use paravane_memory::{PhysAddr, Port, Width};

/// Where PRD tables lie: in the middle of RAM, across a 64 KiB border, at the end of RAM.
pub const STRUCTURES: [u64; 4] = [0x1_0000, 0x1_FFF8, 0x2_0000, 0x1F_FFF0];

/// Reads, writes and multiples by PIO and DMA in 28 and 48 bits, and what drivers send besides (ATA/ATAPI-7, 6).
const COMMANDS: [u8; 24] = [
    0x20, 0x24, 0x29, 0x30, 0x34, 0x39, 0xC4, 0xC5, 0xC6, 0xC8, 0xCA, 0x25, 0x35, 0x06, 0x40, 0x42, 0x91,
    0xE0, 0xE6, 0xE7, 0xEA, 0xEC, 0xEF, 0x90,
];
const COMMAND_BLOCKS: [u16; 2] = [0x1F0, 0x170];
/// End of table, in the last word of a PRD.
const EOT: u64 = 1 << 63;

/// Issues one command; half of the time the bus master starts.
pub fn command(pc: &Pc, s: &mut Script<'_>) {
    let how = s.u8();
    let channel = usize::from(how & 1);
    let base = COMMAND_BLOCKS[channel];
    let out = |register: u16, value: u8| pc.bus.port_out(Port(base + register), Width::W8, value.into());
    let table = STRUCTURES[usize::from(how >> 1 & 3)];
    if how & 8 != 0 {
        prd_table(pc, s, table);
    }
    out(6, 0x40 | how & 0x90);
    // Twice: 48-bit commands take the older values too.
    for _ in 0..2 {
        for (register, value) in
            [(1, s.u8() & 7), (2, s.u8() & 15), (3, s.u8() & 63), (4, s.u8() & 1), (5, 0)]
        {
            out(register, value);
        }
    }
    out(7, s.of(&COMMANDS));
    if how & 0x20 != 0 {
        let bus_master = BUS_MASTER + 8 * channel as u16;
        pc.bus.port_out(Port(bus_master + 4), Width::W32, table as u32);
        pc.bus.port_out(Port(bus_master), Width::W8, u32::from(how >> 3 & 8) | 1);
    }
}

fn prd_table(pc: &Pc, s: &mut Script<'_>, table: u64) {
    let entries = u64::from(s.u8() & 7) + 1;
    for i in 0..entries {
        let kind = s.u8();
        let address = if kind & 1 != 0 { s.wild() } else { 0x4_0000 + u64::from(s.u8()) * 512 };
        let len = if kind & 2 != 0 { s.u16() } else { 512 };
        let last = if i + 1 == entries && kind & 4 == 0 { EOT } else { 0 };
        let entry = (address & 0xFFFF_FFFF) | u64::from(len) << 32 | last;
        _ = pc.memory.write(PhysAddr(table + i * 8), &entry.to_le_bytes());
    }
}

//! The 8259A datasheet (Intel 231468-003), command word by command word. Master base 30h, slave base 38h.

use super::*;

/// ICW1-4 as BIOSes and Linux write them: bases 30h and 38h, everything unmasked.
fn initialized() -> PicPair {
    let mut p = PicPair::new();
    for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0xA0, 0x11), (0xA1, 0x38)] {
        p.write(port, value);
    }
    for (port, value) in [(0xA1, 2), (0xA1, 1), (0x21, 0), (0xA1, 0)] {
        p.write(port, value);
    }
    p
}

#[test]
fn fixed_priorities_nest_and_slave_sits_at_ir2() {
    let mut p = initialized();
    p.set_line(3, true);
    assert_eq!(p.acknowledge(), 0x33);
    p.set_line(4, true);
    assert!(!p.int(), "IR4 waits for IR3");
    p.set_line(12, true);
    assert_eq!(p.acknowledge(), 0x3C, "IR2 beats IR3");
    p.set_line(8, true);
    assert!(!p.int(), "the slave's own IR2 blocks it in fully nested mode");
    p.write(0xA0, 0x20);
    p.write(0x20, 0x20);
    assert_eq!(p.acknowledge(), 0x38);
    p.write(0xA0, 0x20);
    p.write(0x20, 0x20);
    p.write(0x20, 0x63); // specific EOI of IR3
    assert_eq!(p.acknowledge(), 0x34);
}

#[test]
fn special_fully_nested_mode_lets_the_slave_nest() {
    let mut p = initialized();
    for (port, v) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 0x11)] {
        p.write(port, v);
    }
    p.set_line(12, true);
    assert_eq!(p.acknowledge(), 0x3C);
    p.set_line(8, true);
    assert!(p.int());
    assert_eq!(p.acknowledge(), 0x38);
}

#[test]
fn level_line_that_drops_gives_spurious_7_without_isr() {
    let mut p = initialized();
    p.write(0x4D0, 0xFF);
    assert_eq!(p.read(0x4D0), 0xF8);
    p.set_line(5, true);
    assert!(p.int());
    p.set_line(5, false);
    assert!(!p.int());
    assert_eq!(p.acknowledge(), 0x37);
    p.write(0x20, 0x0B);
    assert_eq!(p.read(0x20), 0);
}

#[test]
fn level_line_that_stays_high_requests_again_after_eoi() {
    let mut p = initialized();
    p.write(0x4D1, 0xFF);
    assert_eq!(p.read(0x4D1), 0xDE);
    p.set_line(10, true);
    assert_eq!(p.acknowledge(), 0x3A);
    assert!(!p.int());
    p.write(0xA0, 0x20);
    p.write(0x20, 0x20);
    assert_eq!(p.acknowledge(), 0x3A);
}

#[test]
fn rotation_moves_the_lowest_priority() {
    let mut p = initialized();
    p.write(0x20, 0xC0 | 3); // IR3 lowest, so IR4 highest
    p.set_line(1, true);
    p.set_line(4, true);
    assert_eq!(p.acknowledge(), 0x34);
    p.write(0x20, 0xA0); // rotate on non-specific EOI: IR4 lowest
    assert_eq!(p.master.lowest, 4);
    assert_eq!(p.acknowledge(), 0x31);
}

#[test]
fn special_mask_mode_lets_lower_priorities_through() {
    let mut p = initialized();
    p.set_line(1, true);
    assert_eq!(p.acknowledge(), 0x31);
    p.write(0x21, 0x02);
    p.set_line(6, true);
    assert!(!p.int());
    p.write(0x20, 0x68);
    assert_eq!(p.acknowledge(), 0x36);
    p.write(0x20, 0x20); // non-specific: must skip the masked IR1
    p.write(0x20, 0x0B);
    assert_eq!(p.read(0x20), 0x02);
}

#[test]
fn poll_and_automatic_eoi() {
    let mut p = initialized();
    p.write(0x20, 0x0C);
    assert_eq!(p.read(0x20), 0);
    p.set_line(6, true);
    p.write(0x20, 0x0C);
    assert_eq!(p.read(0x20), 0x86);
    p.write(0x20, 0x20);
    for (port, v) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 3)] {
        p.write(port, v);
    }
    p.set_line(0, true);
    assert_eq!(p.acknowledge(), 0x30);
    p.write(0x20, 0x0B);
    assert_eq!(p.read(0x20), 0, "AEOI leaves nothing in service");
}

#[test]
fn imr_reads_back_as_linux_probes_it() {
    let mut p = initialized();
    p.write(0xA1, 0xFF);
    p.write(0x21, 0xFB);
    assert_eq!(p.read(0x21), 0xFB);
}

/// Non-specific EOI, as OCW2 has it.
const EOI: u8 = 0x20;

fn pulse(p: &mut PicPair, irq: u8) {
    p.set_line(irq, true);
    p.set_line(irq, false);
}

fn irr(p: &mut PicPair, port: u16) -> u8 {
    p.write(port, 0x0A);
    p.read(port)
}

fn isr(p: &mut PicPair, port: u16) -> u8 {
    p.write(port, 0x0B);
    p.read(port)
}

/// The master initialized once more, with this ICW4.
fn with_icw4(icw4: u8) -> PicPair {
    let mut p = initialized();
    for (port, v) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, icw4)] {
        p.write(port, v);
    }
    p
}

/// "Initialization command words 1 and 2": what ICW1 does by itself.
#[test]
fn icw1_clears_mask_service_priority_and_edges() {
    let mut p = initialized();
    p.set_line(6, true);
    assert_eq!(p.acknowledge(), 0x36);
    p.set_line(3, true);
    p.write(0x21, 0xF0);
    p.write(0x20, 0xC5); // IR5 lowest
    p.write(0x20, 0x68); // special mask
    p.write(0x20, 0x0B); // status read is ISR
    p.write(0x20, 0x11);
    for v in [0x30, 4, 1] {
        p.write(0x21, v);
    }
    assert_eq!(p.read(0x21), 0, "IMR is cleared");
    assert_eq!(p.read(0x20), 0, "status read is IRR, and IR3 needs a new edge");
    assert_eq!(isr(&mut p, 0x20), 0);
    assert!(!p.int());
    p.set_line(3, false);
    p.set_line(3, true);
    p.set_line(6, false);
    p.set_line(6, true);
    assert_eq!(p.acknowledge(), 0x33, "IR7 is lowest again");
    p.write(0x21, 0x08);
    assert!(!p.int(), "special mask mode is off: the masked IR3 in service still blocks");
}

#[test]
fn icw3_and_icw4_come_only_where_icw1_says_so() {
    let mut p = PicPair::new();
    for (port, v) in [(0x20, 0x12), (0x21, 0x50), (0x21, 0xFE)] {
        p.write(port, v);
    }
    assert_eq!(p.read(0x21), 0xFE, "single and no ICW4: the third byte is the mask");
    p.set_line(0, true);
    assert_eq!(p.acknowledge(), 0x50);
    for (port, v) in [(0x20, 0x13), (0x21, 0x60), (0x21, 0x03), (0x21, 0xFC)] {
        p.write(port, v);
    }
    assert_eq!(p.read(0x21), 0xFC, "single with ICW4");
    p.set_line(1, true);
    assert_eq!(p.acknowledge(), 0x61);
    assert_eq!(isr(&mut p, 0x20), 0, "and its AEOI holds");
    p.write(0x20, 0x12);
    p.write(0x21, 0x50);
    p.set_line(1, false);
    p.set_line(1, true);
    assert_eq!(p.acknowledge(), 0x51);
    assert_eq!(isr(&mut p, 0x20), 2, "IC4 = 0 clears all functions of ICW4");
}

#[test]
fn icw1_in_mid_sequence_starts_again() {
    let mut p = PicPair::new();
    for (port, v) in
        [(0x20, 0x11), (0x21, 0x90), (0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0x21, 0xEF)]
    {
        p.write(port, v);
    }
    assert_eq!(p.read(0x21), 0xEF);
    p.set_line(4, true);
    assert_eq!(p.acknowledge(), 0x34);
}

/// ICW2: T7-T3 are the vector's upper bits, the level its lower ones.
#[test]
fn the_low_bits_of_icw2_are_the_level() {
    let mut p = initialized();
    p.write(0x20, 0x11);
    for v in [0xAF, 4, 1] {
        p.write(0x21, v);
    }
    p.set_line(5, true);
    assert_eq!(p.acknowledge(), 0xA8 | 5);
}

/// "Edge and level triggered modes".
#[test]
fn an_edge_requests_once_and_only_while_its_input_is_high() {
    let mut p = initialized();
    p.set_line(4, true);
    assert_eq!(irr(&mut p, 0x20), 0x10);
    assert_eq!(p.acknowledge(), 0x34);
    assert_eq!(irr(&mut p, 0x20), 0, "INTA resets the latch");
    p.write(0x20, EOI);
    assert!(!p.int(), "still high: no further request");
    p.set_line(4, false);
    pulse(&mut p, 4);
    assert_eq!(irr(&mut p, 0x20), 0, "a pulse that ended is gone");
    assert!(!p.int());
    assert_eq!(p.acknowledge(), 0x37, "INTA all the same: default IR7");
    assert_eq!(isr(&mut p, 0x20), 0, "which is not in service");
}

#[test]
fn a_masked_edge_waits_in_irr_as_long_as_its_input_is_high() {
    let mut p = initialized();
    p.write(0x21, 0x10);
    p.set_line(4, true);
    assert_eq!((p.int(), irr(&mut p, 0x20)), (false, 0x10), "IMR works on IRR's output");
    p.write(0x21, 0);
    assert!(p.int());
    p.write(0x21, 0x10);
    assert!(!p.int(), "masking withdraws the request");
    p.set_line(4, false);
    p.write(0x21, 0);
    assert!(!p.int(), "as does the device, which was served by polling");
}

/// ICW1, LTIM; and the edge/level registers of the chipset (82371SB, ELCR).
#[test]
fn levels_by_ltim_and_by_elcr() {
    let mut p = initialized();
    p.set_line(3, true);
    assert_eq!(p.acknowledge(), 0x33);
    p.write(0x20, EOI);
    assert!(!p.int());
    p.write(0x4D0, 0x08);
    assert!(p.int(), "level triggered from now on, and high");
    p.write(0x4D0, 0);
    assert!(!p.int(), "edge triggered again, and no edge came");
    for (port, v) in [(0x20, 0x19), (0x21, 0x30), (0x21, 4), (0x21, 1)] {
        p.write(port, v);
    }
    assert_eq!(p.acknowledge(), 0x33, "LTIM makes every input level triggered");
    p.write(0x20, EOI);
    assert_eq!(p.acknowledge(), 0x33, "as long as it is high");
    p.set_line(3, false);
    p.write(0x20, EOI);
    assert!(!p.int());
}

/// OCW2, all eight codes of R, SL, EOI.
#[test]
fn ocw2_rotates_and_ends_as_its_table_says() {
    let mut p = initialized();
    let take = |p: &mut PicPair, irq: u8| {
        p.set_line(irq, false);
        p.set_line(irq, true);
        assert_eq!(p.acknowledge(), 0x30 | irq);
    };
    take(&mut p, 5);
    take(&mut p, 1);
    p.write(0x20, 0x40); // no operation
    assert_eq!(isr(&mut p, 0x20), 0x22);
    p.write(0x20, 0x65); // specific EOI, not the highest
    assert_eq!(isr(&mut p, 0x20), 0x02);
    p.write(0x20, 0x20); // non-specific
    assert_eq!(isr(&mut p, 0x20), 0);
    take(&mut p, 4);
    p.write(0x20, 0xE4); // rotate on specific EOI: IR4 lowest
    assert_eq!(isr(&mut p, 0x20), 0);
    p.set_line(4, false);
    p.set_line(3, false);
    p.set_line(4, true);
    p.set_line(3, true);
    assert_eq!(p.acknowledge(), 0x33, "IR5 IR6 IR7 IR0 .. IR3 IR4");
    p.write(0x20, 0xC2); // set priority: IR2 lowest, IR3 highest
    assert!(!p.int(), "IR4 waits for IR3");
    p.write(0x20, 0x20);
    assert_eq!(p.acknowledge(), 0x34);
    p.write(0x20, 0xA0); // rotate on non-specific EOI
    assert_eq!((isr(&mut p, 0x20), p.master.lowest), (0, 4));
}

/// "Automatic rotation": in AEOI mode by 80h, until 00h.
#[test]
fn rotation_in_automatic_eoi_mode() {
    let mut p = with_icw4(3);
    p.write(0x20, 0x80);
    for irq in [0, 1, 3] {
        p.set_line(irq, true);
    }
    assert_eq!([p.acknowledge(), p.acknowledge(), p.acknowledge()], [0x30, 0x31, 0x33]);
    p.set_line(0, false);
    p.set_line(0, true);
    p.set_line(4, true);
    assert_eq!(p.acknowledge(), 0x34, "IR3 was lowest, so IR4 is highest");
    assert_eq!(p.acknowledge(), 0x30);
    p.write(0x20, 0x00);
    p.set_line(7, true);
    assert_eq!(p.acknowledge(), 0x37);
    assert_eq!(p.master.lowest, 0, "rotation is off: IR0 stays lowest");
}

#[test]
fn a_level_in_automatic_eoi_mode_asks_again_at_once() {
    let mut p = with_icw4(3);
    p.write(0x4D0, 0x20);
    p.set_line(5, true);
    assert_eq!([p.acknowledge(), p.acknowledge()], [0x35, 0x35]);
    p.set_line(5, false);
    assert!(!p.int());
}

/// "The special fully nested mode".
#[test]
fn in_special_fully_nested_mode_lower_inputs_still_wait_for_the_slave() {
    let mut p = with_icw4(0x11);
    p.set_line(12, true);
    assert_eq!(p.acknowledge(), 0x3C);
    p.set_line(3, true);
    assert!(!p.int(), "IR3 is below IR2, which is in service");
    p.set_line(14, true);
    assert!(!p.int(), "and IR14 below IR12 inside the slave");
    p.set_line(9, true);
    assert_eq!(p.acknowledge(), 0x39);
    p.set_line(1, true);
    assert_eq!(p.acknowledge(), 0x31);
    // Software checks whether it was the slave's only one before it ends the master's.
    p.write(0xA0, EOI);
    assert_eq!(isr(&mut p, 0xA0), 0x10);
    p.write(0xA0, EOI);
    assert_eq!(isr(&mut p, 0xA0), 0);
    p.write(0x20, 0x61);
    p.write(0x20, 0x62);
    assert_eq!(p.acknowledge(), 0x3E);
}

/// "Special mask mode": a masked input in service blocks nobody, lower or higher.
#[test]
fn special_mask_mode_ends_with_its_command() {
    let mut p = initialized();
    p.set_line(2 + 1, true);
    assert_eq!(p.acknowledge(), 0x33);
    p.write(0x21, 0x08);
    p.write(0x20, 0x68);
    p.set_line(6, true);
    assert!(p.int());
    p.write(0x20, 0x28); // ESMM = 0: SMM does not matter
    assert!(p.int());
    p.write(0x20, 0x48); // ESMM = 1, SMM = 0
    assert!(!p.int());
}

/// "Poll command": the next read is an INTA whose byte is I, 0000, W2-W0.
#[test]
fn polling_takes_one_request_of_one_chip() {
    let mut p = initialized();
    p.set_line(10, true);
    p.write(0x20, 0x0C);
    assert_eq!(p.read(0x20), 0x82);
    assert_eq!(isr(&mut p, 0x20), 0x04, "in service");
    p.write(0xA0, 0x0C);
    assert_eq!(p.read(0xA0), 0x82);
    assert_eq!(isr(&mut p, 0xA0), 0x04);
    p.set_line(1, true);
    p.write(0x20, 0x0A);
    p.write(0x20, 0x0F); // poll and read ISR: polling overrides
    assert_eq!(p.read(0x20), 0x81);
    assert_eq!(p.read(0x20), 0x06, "then the status that was asked for with it");
}

#[test]
fn status_selection_stays_and_reading_changes_nothing() {
    let mut p = initialized();
    p.set_line(6, true);
    p.write(0x20, 0x0A);
    assert_eq!([p.read(0x20), p.read(0x20)], [0x40, 0x40]);
    p.write(0x20, 0x08); // RR = 0: no action
    assert_eq!(p.read(0x20), 0x40);
    assert_eq!(p.acknowledge(), 0x36);
    p.write(0x20, 0x0B);
    assert_eq!([p.read(0x20), p.read(0x21), p.read(0x20)], [0x40, 0, 0x40]);
}

/// "Cascade mode": the slave's address on the cascade lines.
#[test]
fn slaves_answer_to_their_own_address_only() {
    let mut p = initialized();
    p.write(0xA0, 0x11);
    for v in [0x38, 5, 1] {
        p.write(0xA1, v);
    }
    p.set_line(9, true);
    assert_eq!(p.acknowledge(), 0xFF, "nobody drives the bus");
    let mut p = initialized();
    for (port, v) in [(0x20, 0x11), (0x21, 0x30), (0x21, 0), (0x21, 1)] {
        p.write(port, v);
    }
    p.set_line(9, true);
    assert_eq!(p.acknowledge(), 0x32, "no slave at IR2 in ICW3: the master answers itself");
    assert_eq!(isr(&mut p, 0xA0), 0);
}

#[test]
fn a_slave_with_two_requests_is_two_edges_for_the_master() {
    let mut p = initialized();
    p.set_line(8, true);
    p.set_line(15, true);
    assert_eq!(p.acknowledge(), 0x38);
    for port in [0xA0, 0x20] {
        p.write(port, EOI);
    }
    assert_eq!(p.acknowledge(), 0x3F);
    for port in [0xA0, 0x20] {
        p.write(port, EOI);
    }
    assert!(!p.int());
    pulse(&mut p, 10);
    assert_eq!(irr(&mut p, 0x20), 0, "what the slave withdraws the master forgets");
}

#[test]
fn reset_keeps_the_levels_and_forgets_the_rest() {
    let mut p = initialized();
    p.write(0x4D0, 0xFF);
    p.set_line(5, true);
    p.reset();
    assert_eq!((p.read(0x4D0), p.read(0x21), p.int()), (0, 0xFF, false));
    for (port, v) in [(0x20, 0x19), (0x21, 0x30), (0x21, 4), (0x21, 1)] {
        p.write(port, v);
    }
    assert_eq!(p.acknowledge(), 0x35, "the input was high all the time");
}

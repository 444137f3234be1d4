//! What BIOSes and Linux's i8042, atkbd and psmouse drivers send.

use super::*;
use crate::control::RecordedControl;

struct Rig {
    control: Arc<RecordedControl>,
    kbc: I8042,
}

impl Rig {
    fn new(mouse: bool) -> Rig {
        let control = Arc::new(RecordedControl::default());
        let kbc = I8042::new(I8042Wiring {
            keyboard_irq: IrqLine::unconnected(),
            aux_irq: IrqLine::unconnected(),
            control: control.clone(),
            a20: A20Gate::new(control.clone()),
            mouse,
        });
        Rig { control, kbc }
    }
    fn command(&mut self, v: u8) {
        self.kbc.port_out(Port(STATUS), Width::W8, v.into());
    }
    fn data(&mut self, v: u8) {
        self.kbc.port_out(Port(DATA), Width::W8, v.into());
    }
    fn status(&mut self) -> u8 {
        self.kbc.port_in(Port(STATUS), Width::W8) as u8
    }
    /// Everything in the output buffer, one byte after the other.
    fn drain(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        while self.status() & STS_OBF != 0 {
            all.push(self.kbc.port_in(Port(DATA), Width::W8) as u8);
        }
        all
    }
}

#[test]
fn self_test_and_port_tests() {
    let mut r = Rig::new(false);
    for (command, answer) in [(0xAA, 0x55), (0xAB, 0x00), (0xA9, 0x00)] {
        r.command(command);
        assert_eq!(r.drain(), [answer]);
    }
    r.command(0x20);
    assert_eq!(r.drain(), [CTR_SYS | CTR_KBD_OFF | CTR_AUX_OFF | CTR_TRANSLATE]);
}

#[test]
fn linux_aux_probe() {
    let mut r = Rig::new(false);
    r.command(0xD3);
    r.data(0x5A);
    assert_ne!(r.status() & STS_AUX, 0);
    assert_eq!(r.drain(), [0x5A], "AUX loop");
    r.command(0xA7);
    r.command(0x20);
    assert_eq!(r.drain()[0] & CTR_AUX_OFF, CTR_AUX_OFF);
    r.command(0xA8);
    r.command(0x20);
    assert_eq!(r.drain()[0] & CTR_AUX_OFF, 0);
    r.command(0xD4);
    r.data(0xF2);
    assert_eq!(r.status() & (STS_AUX | STS_TIMEOUT), STS_AUX | STS_TIMEOUT, "nothing is plugged in");
    assert_eq!(r.drain(), [RESEND]);
}

#[test]
fn mouse_identifies_and_reports() {
    let mut r = Rig::new(true);
    for (command, answer) in [
        (0xFF, vec![0xFA, 0xAA, 0]),
        (0xF2, vec![0xFA, 0]),
        (0xE9, vec![0xFA, 0, 2, 100]),
        (0xF4, vec![0xFA]),
    ] {
        r.command(0xD4);
        r.data(command);
        assert_eq!(r.drain(), answer);
    }
    r.command(0x60);
    r.data(CTR_AUX_INT | CTR_TRANSLATE);
    assert!(r.kbc.move_mouse([8, 1, 2]));
    assert!(r.kbc.wiring.aux_irq.is_high() && !r.kbc.wiring.keyboard_irq.is_high());
    assert_eq!(r.drain(), [8, 1, 2]);
    assert!(!r.kbc.wiring.aux_irq.is_high());
}

#[test]
fn keyboard_commands_and_identity() {
    let mut r = Rig::new(false);
    r.command(0x60);
    r.data(0x01); // no translation
    for (send, answer) in [
        (vec![0xFF], vec![0xFA, 0xAA]),
        (vec![0xF2], vec![0xFA, 0xAB, 0x83]),
        (vec![0xED, 0x02], vec![0xFA, 0xFA]),
        (vec![0xEE], vec![0xEE]),
        (vec![0xF0, 0x00], vec![0xFA, 0xFA, 0x02]),
        (vec![0xF3, 0x00], vec![0xFA, 0xFA]),
        (vec![0xF5], vec![0xFA]),
        (vec![0x10], vec![0xFE]),
        (vec![0xFE], vec![0xFE]),
    ] {
        let mut got = Vec::new();
        for b in send {
            r.data(b);
            got.extend(r.drain());
        }
        assert_eq!(got, answer);
    }
    assert!(!r.kbc.press(&[0x1C]), "F5 stopped scanning");
    r.data(0xF4);
    r.drain();
    assert!(r.kbc.press(&[0x1C, 0xF0, 0x1C]));
    assert_eq!(r.drain(), [0x1C, 0xF0, 0x1C]);
}

#[test]
fn translation_to_set_1_and_irq_1() {
    let mut r = Rig::new(false);
    r.command(0x60);
    r.data(CTR_KBD_INT | CTR_TRANSLATE);
    r.kbc.press(&[0x1C, 0xF0, 0x1C, 0xE0, 0x75, 0xE0, 0xF0, 0x75]); // A, cursor up
    assert!(r.kbc.wiring.keyboard_irq.is_high());
    assert_eq!(r.drain(), [0x1E, 0x9E, 0xE0, 0x48, 0xE0, 0xC8]);
    assert!(!r.kbc.wiring.keyboard_irq.is_high());
    r.data(0xF2);
    assert_eq!(r.drain(), [0xFA, 0xAB, 0x41], "translated like everything else");
    r.command(0xAD);
    r.kbc.press(&[0x1C]);
    assert_eq!(r.status() & STS_OBF, 0, "clock off");
    r.command(0xAE);
    assert_eq!(r.drain(), [0x1E]);
}

#[test]
fn a20_and_reset() {
    let mut r = Rig::new(false);
    r.command(0xD1);
    r.data(0xDF);
    r.command(0xD0);
    assert_eq!(r.drain()[0] & 3, 3);
    r.command(0xDD);
    r.command(0xFF);
    assert_eq!(r.control.take(), ["a20 false"]);
    r.command(0xFE);
    r.command(0xD1);
    r.data(0xDE);
    assert_eq!(
        r.control.take(),
        ["reset keyboard controller reset pulse", "a20 true", "reset keyboard controller output port"]
    );
    r.command(0xDD);
    r.kbc.reset(ResetKind::Bus);
    assert_eq!(r.control.take(), ["a20 false", "a20 true"], "a reset enables A20");
}

#[test]
fn queues_are_bounded() {
    let mut r = Rig::new(true);
    for i in 0..=255u8 {
        for _ in 0..40 {
            r.command(i);
            r.data(i);
            r.kbc.press(&[i]);
            r.kbc.move_mouse([i; 3]);
        }
    }
    let queued = r.kbc.keys.len() + r.kbc.moves.len() + r.kbc.answers.len();
    assert!(queued <= 3 * QUEUE);
}

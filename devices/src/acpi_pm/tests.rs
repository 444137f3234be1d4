//! Fixed hardware as ACPICA and Linux use it.

use super::*;
use crate::control::RecordedControl;
use crate::time::{ManualClock, TimerQueue};

struct Rig {
    clock: Arc<ManualClock>,
    queue: Arc<TimerQueue>,
    control: Arc<RecordedControl>,
    pm: Arc<std::sync::Mutex<AcpiPm>>,
}

const BASE: u16 = 0x600;

impl Rig {
    fn new(timer_32bit: bool) -> Rig {
        let clock = Arc::new(ManualClock::default());
        let queue = TimerQueue::new();
        let control = Arc::new(RecordedControl::default());
        let timer = queue.timer();
        let key = timer.key();
        let wiring = AcpiPmWiring {
            sci: IrqLine::unconnected(),
            control: control.clone(),
            timer_32bit,
            unsupported_sleep: Counter::detached(),
        };
        let pm = crate::share(AcpiPm::new(clock.clone(), timer, wiring));
        crate::bind_timer(&queue, key, &pm);
        Rig { clock, queue, control, pm }
    }
    fn read(&self, port: u16, width: Width) -> u32 {
        self.pm.lock().unwrap().port_in(Port(port), width)
    }
    fn write(&self, port: u16, width: Width, value: u32) {
        self.pm.lock().unwrap().port_out(Port(port), width, value);
    }
    fn sci(&self) -> bool {
        self.pm.lock().unwrap().wiring.sci.is_high()
    }
}

#[test]
fn timer_counts_at_3_579545_mhz() {
    for (wide, after) in [(false, 3_579_545 * 10 % (1 << 24)), (true, 3_579_545 * 10)] {
        let r = Rig::new(wide);
        r.clock.set(VmTime(1_000_000_000));
        assert_eq!(r.read(BASE + PM_TMR, Width::W32), 3_579_545);
        r.clock.set(VmTime(10_000_000_000));
        assert_eq!(r.read(BASE + PM_TMR, Width::W32), after);
        assert_eq!(r.read(BASE + PM_TMR + 1, Width::W8), after >> 8 & 0xFF);
    }
}

#[test]
fn timer_carry_raises_sci_only_in_acpi_mode() {
    let r = Rig::new(false);
    r.write(BASE + PM1_EN, Width::W16, TMR.into());
    let at = VmTime::from_ticks(1 << 23, TIMER_HZ);
    assert_eq!(r.queue.next_deadline(), Some(at));
    r.clock.set(at);
    r.queue.run_expired(at);
    assert!(!r.sci());
    r.write(SMI_CMD, Width::W8, ACPI_ENABLE.into());
    assert_eq!(r.read(BASE + PM1_CNT, Width::W16) & 1, 1);
    assert!(r.sci());
    r.write(BASE + PM1_STS, Width::W16, TMR.into());
    assert!(!r.sci());
    r.write(SMI_CMD, Width::W8, ACPI_DISABLE.into());
    assert_eq!(r.read(BASE + PM1_CNT, Width::W16) & 1, 0);
}

#[test]
fn power_button_and_s5() {
    let r = Rig::new(true);
    r.write(SMI_CMD, Width::W8, ACPI_ENABLE.into());
    r.write(BASE + PM1_EN + 1, Width::W8, u32::from(PWRBTN >> 8));
    r.pm.lock().unwrap().press_power_button();
    assert!(r.sci());
    r.write(BASE + PM1_STS, Width::W32, PWRBTN.into());
    assert!(!r.sci());
    r.write(BASE + PM1_CNT, Width::W16, u32::from(S5_SLEEP_TYPE << SLP_TYP_SHIFT));
    assert!(r.control.take().is_empty(), "SLP_TYP alone does nothing");
    r.write(BASE + PM1_CNT, Width::W16, u32::from(3 << SLP_TYP_SHIFT | SLP_EN));
    assert!(r.control.take().is_empty(), "no such state");
    r.write(BASE + PM1_CNT, Width::W16, u32::from(S5_SLEEP_TYPE << SLP_TYP_SHIFT | SLP_EN));
    assert_eq!(r.control.take(), ["power-off"]);
    assert_eq!(r.read(BASE + PM1_CNT, Width::W16) & u32::from(SLP_EN), 0);
}

#[test]
fn general_purpose_events() {
    let r = Rig::new(true);
    r.pm.lock().unwrap().enable_acpi_mode();
    r.pm.lock().unwrap().raise_gpe(9);
    assert_eq!(r.read(BASE + GPE0_STS, Width::W32), 0x0200);
    r.write(BASE + GPE0_EN + 1, Width::W8, 2);
    assert!(r.sci());
    r.write(BASE + GPE0_STS + 1, Width::W8, 2);
    assert!(!r.sci());
}

//! The chipset wired as in a PC and driven through the bus, as kernels do it.

use paravane_devices::{
    Bus, Claim, Clock, Counter, Counters, FabricConfig, Hpet, HpetWiring, InterruptFabric, IoApicWindow,
    IrqLine, IrqSink, LegacyRoute, ManualClock, PicPorts, Pit, Port, TimerQueue, TscClock, VcpuKick, VpIndex,
    Width, bind_timer, hpet, share,
};
use paravane_memory::PhysAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

const BSP: VpIndex = VpIndex(0);

#[derive(Default)]
struct Kicks(AtomicU32);

impl VcpuKick for Kicks {
    fn interrupt(&self, _vp: VpIndex) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn nmi(&self, _vp: VpIndex) {}
    fn init(&self, _vp: VpIndex) {}
    fn startup(&self, _vp: VpIndex, _vector: u8) {}
}

struct Pc {
    clock: Arc<ManualClock>,
    queue: Arc<TimerQueue>,
    bus: Arc<Bus>,
    fabric: Arc<InterruptFabric>,
    kicks: Arc<Kicks>,
}

impl Pc {
    fn new() -> Pc {
        let (clock, queue, counters) =
            (Arc::new(ManualClock::default()), TimerQueue::new(), Counters::default());
        let (bus, kicks) = (Bus::new(&counters), Arc::new(Kicks::default()));
        let config = FabricConfig { vcpus: 1, apic_hz: 1_000_000_000, tsc: TscClock::new(1_000_000_000) };
        let fabric = InterruptFabric::new(config, clock.clone(), &queue, kicks.clone(), &counters);
        let line = |n| IrqLine::new(fabric.clone(), n, Counter::detached());
        let legacy = LegacyRoute::new(line(0), line(8));
        let out0 = IrqLine::new(legacy.clone() as Arc<dyn IrqSink>, LegacyRoute::PIT, Counter::detached());
        let (pit_timer, hpet_timer) = (queue.timer(), queue.timer());
        let (pit_key, hpet_key) = (pit_timer.key(), hpet_timer.key());
        let pit = share(Pit::new(clock.clone(), pit_timer, out0));
        let wiring = HpetWiring { routes: vec![(20, line(20))], legacy };
        let hpet = share(Hpet::new(clock.clone(), hpet_timer, wiring));
        bind_timer(&queue, pit_key, &pit);
        bind_timer(&queue, hpet_key, &hpet);
        let on_bus = bus.attach(pit);
        for (first, n) in Pit::RANGES {
            bus.claim_ports(&on_bus, first, n, Width::W8);
        }
        let on_bus = bus.attach(share(PicPorts::new(fabric.clone())));
        for (first, n) in PicPorts::RANGES {
            bus.claim_ports(&on_bus, first, n, Width::W8);
        }
        let on_bus = bus.attach(share(IoApicWindow::new(fabric.clone())));
        bus.claim_mmio(&on_bus, PhysAddr(IoApicWindow::BASE), IoApicWindow::LEN, Width::W32);
        let on_bus = bus.attach(hpet);
        bus.claim_mmio(&on_bus, PhysAddr(hpet::spec::BASE), hpet::spec::LEN, Width::W64);
        fabric.enter_virtual_wire_mode();
        Pc { clock, queue, bus, fabric, kicks }
    }

    fn out(&self, port: u16, value: u8) {
        self.bus.port_out(Port(port), Width::W8, value.into());
    }

    fn init_pics(&self, icw4: u8) {
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, icw4)] {
            self.out(port, value);
        }
        for (port, value) in [(0xA0, 0x11), (0xA1, 0x38), (0xA1, 2), (0xA1, 1), (0xA1, 0xFF)] {
            self.out(port, value);
        }
    }

    fn start_tick(&self) {
        for (port, value) in [(0x43, 0x34), (0x40, 0x9C), (0x40, 0x2E)] {
            self.out(port, value);
        }
    }

    fn redirect(&self, pin: u64, entry: u32) {
        for (select, value) in [(0x11 + pin * 2, 0), (0x10 + pin * 2, entry)] {
            self.bus.mmio_store(PhysAddr(IoApicWindow::BASE), Width::W32, select);
            self.bus.mmio_store(PhysAddr(IoApicWindow::BASE + 0x10), Width::W32, value.into());
        }
    }

    /// Runs `ms` milliseconds in small steps, taking interrupts at once; the vectors taken.
    fn run(&self, ms: u64, eoi: impl Fn(&Pc)) -> Vec<u8> {
        let mut taken = Vec::new();
        for _ in 0..ms * 10 {
            self.clock.advance(100_000);
            self.queue.run_expired(self.clock.now());
            while let Some(vector) = self.fabric.acknowledge(BSP) {
                taken.push(vector);
                eoi(self);
            }
        }
        taken
    }
}

#[test]
fn ticks_through_the_8259a_then_through_the_io_apic() {
    let pc = Pc::new();
    pc.init_pics(1);
    pc.out(0x21, 0xFE);
    pc.start_tick();
    let ticks = pc.run(100, |pc| pc.out(0x20, 0x20));
    assert!(ticks.len().abs_diff(10) <= 1 && ticks.iter().all(|v| *v == 0x30), "{ticks:x?}");
    // As check_timer() in Linux: PIC masked, LINT0 masked, pin 2 opened.
    pc.out(0x21, 0xFF);
    pc.fabric.lapic_store(BSP, 0x350, 0x1_0700);
    pc.redirect(2, 0x31);
    let ticks = pc.run(100, |pc| pc.fabric.lapic_store(BSP, 0xB0, 0));
    assert!(ticks.len().abs_diff(10) <= 1 && ticks.iter().all(|v| *v == 0x31), "{ticks:x?}");
    assert!(pc.kicks.0.load(Ordering::Relaxed) >= 20);
}

#[test]
fn hpet_takes_over_irq_0() {
    let pc = Pc::new();
    pc.start_tick();
    pc.redirect(2, 0x31);
    let at = |offset| PhysAddr(hpet::spec::BASE + offset);
    pc.bus.mmio_store(at(0x10), Width::W32, 3);
    for (offset, value) in [(0x100, 0x14C), (0x108, 100_000), (0x108, 100_000)] {
        pc.bus.mmio_store(at(offset), Width::W32, value);
    }
    let ticks = pc.run(100, |pc| pc.fabric.lapic_store(BSP, 0xB0, 0));
    assert!(ticks.len().abs_diff(100) <= 1, "1 kHz from the HPET alone, not 1.1: {}", ticks.len());
}

#[test]
fn ranges_move_while_others_access_them() {
    let pc = Pc::new();
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                pc.bus.port_in(Port(0x300), Width::W32);
                pc.bus.mmio_load(PhysAddr(0xE000_0000), Width::W64);
            }
        });
        let device = pc.bus.attach(share(PicPorts::new(pc.fabric.clone())));
        for i in 0..500u64 {
            let claims: [Claim; 2] = [
                pc.bus.claim_ports(&device, Port(0x300), 4, Width::W8),
                pc.bus.claim_mmio(&device, PhysAddr(0xE000_0000 + (i & 7)), 8, Width::W32),
            ];
            claims.into_iter().for_each(|c| pc.bus.release(c));
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(pc.bus.port_in(Port(0x300), Width::W16), 0xFFFF);
}

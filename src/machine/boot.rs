//! Puts tables and a kernel into guest memory and the processor at its entry, as firmware would.

use super::config::{Boot, MAX_CPUS, MachineConfig};
use paravane_cpu::{CpuState, DescriptorTable, Segment, gpr};
use paravane_firmware::boot::{self, BootError, Entry, NamedFile, Request};
use paravane_firmware::e820::E820;
use paravane_firmware::tables::{self, Tables};
use paravane_memory::{GuestMemory, PhysAddr, VmMemory};

/// What is started, read into memory once: a reset starts the same.
pub(super) struct Payload {
    kernel: NamedFile,
    initrd: Option<NamedFile>,
    append: String,
}

impl Payload {
    /// Reads the files, and refuses what cannot be booted.
    pub(super) fn read(boot: &Boot) -> Result<Payload, BootError> {
        let payload = match boot {
            Boot::Kernel { kernel, initrd, append } => Payload {
                kernel: NamedFile::read(kernel)?,
                initrd: initrd.as_deref().map(NamedFile::read).transpose()?,
                append: append.clone(),
            },
            Boot::Image { image, append } => Payload {
                kernel: NamedFile::new("the lab guest", image.to_vec()),
                initrd: None,
                append: append.clone(),
            },
        };
        boot::detect(&payload.kernel)?;
        Ok(payload)
    }

    /// Loads everything into `mem`; returns the processor as the kernel expects it.
    pub(super) fn load(&self, mem: &GuestMemory, config: &MachineConfig) -> Result<CpuState, BootError> {
        let ranges = mem.ram_ranges();
        let low = ranges.first().map_or(0, |r| r.1);
        let high = ranges.iter().filter(|r| r.0 != PhysAddr(0)).map(|r| r.1).sum();
        let memory = E820::pc(low, high);
        let tables = Tables::build(&tables::Config {
            cpus: config.cpus.min(MAX_CPUS) as u8,
            memory: mem.ram_size(),
            com2: config.serial.len() > 1,
        });
        let ram = VmMemory::new(mem);
        // Every machine has the first megabyte: `MachineConfig::memory` is checked for it.
        let _always_fits = tables.write(&ram);
        let request = Request {
            initrd: self.initrd.as_ref(),
            cmdline: &self.append,
            rsdp: tables.rsdp(),
            ..Request::new(&self.kernel, &memory)
        };
        boot::load(&ram, &request).map(|entry| processor(&entry))
    }
}

/// The processor at `entry`: everything not named there is as after reset.
fn processor(entry: &Entry) -> CpuState {
    let segment = |s: &boot::Segment| Segment {
        base: s.base,
        limit: s.limit,
        attributes: s.attributes,
        selector: s.selector,
    };
    let mut cpu = CpuState::reset(0);
    let r = &entry.registers;
    cpu.gpr[gpr::RAX] = r.rax;
    cpu.gpr[gpr::RBX] = r.rbx;
    cpu.gpr[gpr::RCX] = r.rcx;
    cpu.gpr[gpr::RDX] = r.rdx;
    cpu.gpr[gpr::RSI] = r.rsi;
    cpu.gpr[gpr::RDI] = r.rdi;
    cpu.gpr[gpr::RBP] = r.rbp;
    cpu.gpr[gpr::RSP] = entry.rsp;
    cpu.rip = entry.rip;
    cpu.seg = [segment(&entry.data); 6];
    cpu.seg[paravane_cpu::SegReg::Cs as usize] = segment(&entry.cs);
    cpu.tr = segment(&entry.tr);
    cpu.gdtr = DescriptorTable { base: entry.gdtr.base, limit: entry.gdtr.limit };
    cpu.idtr = DescriptorTable { base: 0, limit: if cpu_is_real(entry) { 0x3FF } else { 0 } };
    cpu.cr0 = entry.cr0;
    cpu.cr3 = entry.cr3;
    cpu.cr4 = entry.cr4;
    cpu.efer = entry.efer;
    cpu
}

fn cpu_is_real(entry: &Entry) -> bool {
    entry.mode == boot::Mode::Real16
}

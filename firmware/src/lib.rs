//! Everything that runs inside the guest and that we wrote, and the tables it reads.
//!
//! * [`e820`] the map of physical memory as firmware reports it;
//! * [`tables`] ACPI, MP and SMBIOS tables;
//! * [`boot`] loaders that put a kernel into guest memory and say how the processor starts it;
//! * [`lab`] the lab guest: the measuring program of `compare`, its jobs and its reports.
#![forbid(unsafe_code)]

pub mod boot;
pub mod e820;
pub mod lab;
pub mod tables;

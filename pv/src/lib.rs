//! Paravirtual device families: devices made for guests that know they are guests.
//!
//! They share their back ends with the emulated devices of `paravane-devices`, so that comparing the two measures
//! the front ends alone.
#![forbid(unsafe_code)]

pub mod virtio;

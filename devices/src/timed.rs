//! Joins a device's timer to the device.

use crate::device::Device;
use crate::time::TimerQueue;
use std::sync::{Arc, Mutex, PoisonError};

/// Makes timer `key` call [`crate::TimedDevice::expired`] of `device` for as long as the device exists.
pub fn bind_timer<D: Device + 'static>(queue: &TimerQueue, key: usize, device: &Arc<Mutex<D>>) {
    let weak = Arc::downgrade(device);
    queue.bind(key, move |now| {
        if let Some(device) = weak.upgrade()
            && let Some(timed) = device.lock().unwrap_or_else(PoisonError::into_inner).as_timed()
        {
            timed.expired(now);
        }
    });
}

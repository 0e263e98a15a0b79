//! The legacy interface of virtio-pci: 20 ports, and the configuration space behind them (virtio 1.2, 4.1.4.10), as drivers
//! from before virtio 1.0 know it, and nothing else.
//!
//! A queue is one address, in pages; its size is the device's choice, and its three parts follow each other (2.7.2). There
//! is no FEATURES_OK, so that what was not offered and is accepted all the same does not count. All fields are
//! little-endian, as our guests are (2.4.3 in its legacy part).

use super::Interface;
use super::pci::VirtioPci;

/// Ports of it: 24 registers and as much configuration space as any legacy device has.
pub(super) const SIZE: u64 = 128;
/// Bytes of a page, for addresses of queues and for the alignment of the used ring.
const PAGE: u64 = 4096;

/// Offsets of the registers.
pub mod register {
    #![allow(missing_docs, reason = "the specification's names")]
    pub const DEVICE_FEATURES: u64 = 0;
    pub const DRIVER_FEATURES: u64 = 4;
    pub const QUEUE_ADDRESS: u64 = 8;
    pub const QUEUE_SIZE: u64 = 12;
    pub const QUEUE_SELECT: u64 = 14;
    pub const QUEUE_NOTIFY: u64 = 16;
    pub const DEVICE_STATUS: u64 = 18;
    pub const ISR_STATUS: u64 = 19;
    /// Only while MSI-X is on.
    pub const CONFIG_MSIX_VECTOR: u64 = 20;
    /// Only while MSI-X is on.
    pub const QUEUE_MSIX_VECTOR: u64 = 22;
}

/// Where configuration space begins.
fn config_offset(function: &VirtioPci) -> u64 {
    if function.messages() { 24 } else { 20 }
}

fn width(offset: u64) -> Option<usize> {
    Some(match offset {
        0 | 4 | 8 => 4,
        12 | 14 | 16 | 20 | 22 => 2,
        18 | 19 => 1,
        _ => return None,
    })
}

/// Answers a read; `data` is zero.
pub(super) fn read(function: &VirtioPci, offset: u64, data: &mut [u8]) {
    let device = function.front_end();
    if let Some(offset) = offset.checked_sub(config_offset(function)) {
        return device.read_config(offset, data);
    }
    if width(offset) != Some(data.len()) {
        return;
    }
    let value = match offset {
        register::DEVICE_FEATURES => device.parameters().features as u32,
        register::DRIVER_FEATURES => {
            device.select_driver_features(0);
            device.driver_features()
        }
        register::QUEUE_ADDRESS => {
            device.queue().map_or(0, |(queue, _)| if queue.enabled { (queue.descriptor / PAGE) as u32 } else { 0 })
        }
        register::QUEUE_SIZE => device.queue().map_or(0, |(_, most)| u32::from(most)),
        register::QUEUE_SELECT => device.queue_select(),
        register::DEVICE_STATUS => u32::from(device.status()),
        register::ISR_STATUS => u32::from(function.take_isr()),
        register::CONFIG_MSIX_VECTOR => u32::from(function.vector(device.events().len())),
        register::QUEUE_MSIX_VECTOR => match device.queue() {
            Some(_) => u32::from(function.vector(device.queue_select() as usize)),
            None => u32::from(super::pci::NO_VECTOR),
        },
        _ => 0,
    };
    data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
}

/// Takes a write.
pub(super) fn write(function: &VirtioPci, offset: u64, data: &[u8]) {
    let device = function.front_end();
    if let Some(offset) = offset.checked_sub(config_offset(function)) {
        return device.write_config(offset, data);
    }
    if width(offset) != Some(data.len()) {
        return;
    }
    let mut bytes = [0; 4];
    bytes[..data.len()].copy_from_slice(data);
    let value = u32::from_le_bytes(bytes);
    match offset {
        register::DRIVER_FEATURES => {
            device.select_driver_features(0);
            device.accept_features(value);
        }
        register::QUEUE_ADDRESS => set_queue(function, u64::from(value) * PAGE),
        register::QUEUE_SELECT => device.select_queue(value),
        register::QUEUE_NOTIFY => device.notify(value),
        register::DEVICE_STATUS => function.write_status(value as u8, Interface::Legacy),
        register::CONFIG_MSIX_VECTOR => function.set_vector(device.events().len(), value as u16),
        register::QUEUE_MSIX_VECTOR => {
            let index = device.queue_select() as usize;
            if index < device.events().len() {
                function.set_vector(index, value as u16);
            }
        }
        _ => {}
    }
}

/// The three parts of a queue at one address; 0: there is none.
fn set_queue(function: &VirtioPci, address: u64) {
    let device = function.front_end();
    device.enable_queue(false);
    let Some((_, most)) = device.queue().filter(|_| address != 0) else { return };
    let size = u64::from(most);
    device.change_queue(|queue| {
        queue.size = u32::from(most);
        queue.descriptor = address;
        queue.driver = address + 16 * size;
        // Flags, index, entries, and the event index, which is there whether it is used or not.
        queue.device = (queue.driver + 6 + 2 * size).next_multiple_of(PAGE);
    });
    device.enable_queue(true);
}

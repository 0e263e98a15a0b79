//! The common configuration structure of virtio-pci (virtio 1.2, 4.1.4.3): registers of 8, 16 and 32 bits, each accessed
//! in its own width, and those of 64 in two halves or as a whole.

use super::pci::VirtioPci;
use super::{Interface, QueueRegisters};

/// Bytes of it: without the fields that features of which we have none bring.
pub(super) const SIZE: u64 = 0x38;

/// Offsets of the registers.
pub mod register {
    #![allow(missing_docs, reason = "the specification's names")]
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub const DEVICE_FEATURE: u64 = 0x04;
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0C;
    pub const CONFIG_MSIX_VECTOR: u64 = 0x10;
    pub const NUM_QUEUES: u64 = 0x12;
    pub const DEVICE_STATUS: u64 = 0x14;
    pub const CONFIG_GENERATION: u64 = 0x15;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_MSIX_VECTOR: u64 = 0x1A;
    pub const QUEUE_ENABLE: u64 = 0x1C;
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1E;
    pub const QUEUE_DESC: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
}

/// Bytes of the register at `offset`.
fn width(offset: u64) -> Option<usize> {
    Some(match offset {
        0x00 | 0x04 | 0x08 | 0x0C => 4,
        0x10 | 0x12 | 0x16..=0x1E if offset.is_multiple_of(2) => 2,
        register::DEVICE_STATUS | register::CONFIG_GENERATION => 1,
        _ => return None,
    })
}

/// The 64-bit register in which `offset` is, and whether it is the upper half.
fn wide(offset: u64, len: usize) -> Option<(u64, bool)> {
    let inside = (register::QUEUE_DESC..SIZE).contains(&offset);
    let aligned = matches!(len, 4 | 8) && offset.is_multiple_of(len as u64);
    (inside && aligned).then_some((offset & !7, offset & 4 != 0))
}

fn wide_field(queue: &mut QueueRegisters, register: u64) -> &mut u64 {
    match register {
        register::QUEUE_DESC => &mut queue.descriptor,
        register::QUEUE_DRIVER => &mut queue.driver,
        _ => &mut queue.device,
    }
}

/// Answers a read; `data` is zero.
pub(super) fn read(function: &VirtioPci, offset: u64, data: &mut [u8]) {
    let device = function.front_end();
    let queue = device.queue();
    if let Some((register, upper)) = wide(offset, data.len()) {
        let value = queue.map_or(0, |(mut queue, _)| *wide_field(&mut queue, register));
        let bytes = (if upper { value >> 32 } else { value }).to_le_bytes();
        return data.copy_from_slice(&bytes[..data.len()]);
    }
    if width(offset) != Some(data.len()) {
        return;
    }
    let index = device.queue_select();
    let value = match offset {
        register::DEVICE_FEATURE_SELECT => device.device_features_select(),
        register::DEVICE_FEATURE => device.device_features(),
        register::DRIVER_FEATURE_SELECT => device.driver_features_select(),
        register::DRIVER_FEATURE => device.driver_features(),
        register::CONFIG_MSIX_VECTOR => u32::from(function.vector(device.events().len())),
        register::NUM_QUEUES => device.events().len() as u32,
        register::DEVICE_STATUS => u32::from(device.status()),
        register::CONFIG_GENERATION => device.generation(),
        register::QUEUE_SELECT => index,
        register::QUEUE_SIZE => queue.map_or(0, |(queue, _)| queue.size),
        register::QUEUE_MSIX_VECTOR => match queue {
            Some(_) => u32::from(function.vector(index as usize)),
            None => u32::from(super::pci::NO_VECTOR),
        },
        register::QUEUE_ENABLE => queue.map_or(0, |(queue, _)| u32::from(queue.enabled)),
        // Each queue has a place of its own.
        register::QUEUE_NOTIFY_OFF => queue.map_or(0, |_| index),
        _ => 0,
    };
    data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
}

/// Takes a write.
pub(super) fn write(function: &VirtioPci, offset: u64, data: &[u8]) {
    let device = function.front_end();
    let mut bytes = [0; 8];
    bytes[..data.len()].copy_from_slice(data);
    let value = u64::from_le_bytes(bytes);
    if let Some((register, upper)) = wide(offset, data.len()) {
        return device.change_queue(|queue| {
            let field = wide_field(queue, register);
            *field = match (data.len(), upper) {
                (8, _) => value,
                (_, false) => *field & !u64::from(u32::MAX) | value,
                (_, true) => *field & u64::from(u32::MAX) | value << 32,
            };
        });
    }
    if width(offset) != Some(data.len()) {
        return;
    }
    let value = value as u32;
    match offset {
        register::DEVICE_FEATURE_SELECT => device.select_device_features(value),
        register::DRIVER_FEATURE_SELECT => device.select_driver_features(value),
        register::DRIVER_FEATURE => device.accept_features(value),
        register::CONFIG_MSIX_VECTOR => function.set_vector(device.events().len(), value as u16),
        register::DEVICE_STATUS => function.write_status(value as u8, Interface::Modern),
        register::QUEUE_SELECT => device.select_queue(value),
        register::QUEUE_SIZE => device.change_queue(|queue| queue.size = value),
        register::QUEUE_MSIX_VECTOR => {
            let index = device.queue_select() as usize;
            // Behind the last queue is the configuration's vector, which is not a queue's.
            if index < device.events().len() {
                function.set_vector(index, value as u16);
            }
        }
        // Writing 0 is not allowed (4.1.4.3.2) and means nothing.
        register::QUEUE_ENABLE if value == 1 => device.enable_queue(true),
        _ => {}
    }
}

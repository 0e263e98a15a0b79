//! What a driver writes about one queue, and when that makes a queue.

use serde::{Deserialize, Serialize};

use super::feature;

/// A queue as the driver has set it up so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    /// Number of descriptors.
    pub size: u32,
    /// Whether it is to run.
    pub enabled: bool,
    /// Guest-physical address of the descriptor table or ring.
    pub descriptor: u64,
    /// Guest-physical address of the available ring or the driver's event suppression structure.
    pub driver: u64,
    /// Guest-physical address of the used ring or the device's event suppression structure.
    pub device: u64,
}

impl QueueRegisters {
    /// Its size, if the queue can be one: of at most `most` descriptors, with `features` agreed upon.
    ///
    /// # Errors
    /// What is wrong with it. Whether its parts lie in memory is the device's to find out.
    pub fn check(&self, most: u16, features: u64) -> Result<u16, String> {
        let packed = features & feature::RING_PACKED != 0;
        let size = u16::try_from(self.size).ok().filter(|&size| size != 0 && size <= most);
        let Some(size) = size.filter(|size| packed || size.is_power_of_two()) else {
            let kind = if packed { "a size" } else { "a power of two" };
            return Err(format!("{} descriptors; allowed is {kind} up to {most} (virtio 1.2, 2.7 and 2.8)", self.size));
        };
        // Bytes and alignment of the three parts (2.7 and 2.8.10).
        let count = u64::from(size);
        let parts = if packed {
            [
                ("descriptor ring", self.descriptor, 16 * count, 16),
                ("driver area", self.driver, 4, 4),
                ("device area", self.device, 4, 4),
            ]
        } else {
            [
                ("descriptor table", self.descriptor, 16 * count, 16),
                ("available ring", self.driver, 6 + 2 * count, 2),
                ("used ring", self.device, 6 + 8 * count, 4),
            ]
        };
        for (what, address, bytes, alignment) in parts {
            if address % alignment != 0 || address.checked_add(bytes).is_none() {
                return Err(format!(
                    "its {what} of {bytes} bytes at {address:#x}; allowed are multiples of {alignment} inside the address space \
                     (virtio 1.2, 2.7 and 2.8.10)"
                ));
            }
        }
        Ok(size)
    }
}

//! The log of what the device writes into its ring, for a live migration (vhost-user, "Migration").
//!
//! Two kinds of writes are told apart. The device part (used ring, or device event suppression structure) is logged at the
//! address that the front-end gives for it, which need not be one of the guest's, and only if it gives one. The descriptors
//! of a packed ring, which the device overwrites, are guest memory like buffers and are logged where they lie.
//!
//! Marks come after the writes, see [`DirtyLog`]. A queue that gets a log marks all that it ever writes in its ring at once:
//! whoever served the ring before may have been killed between a write and its mark.

use viaduct_memory::{DirtyLog, GuestMemory};

use crate::QueueConfig;
use crate::descriptor::{BYTES, Position};
use crate::layout::{Layout, Parts, RingLayout};

#[derive(Debug)]
pub(super) struct RingLog {
    log: DirtyLog,
    /// Guest-physical address of the descriptor ring, if it is one that is written.
    descriptor: Option<u64>,
    /// Where writes to the device part are logged.
    device: Option<u64>,
    size: u16,
}

impl RingLog {
    /// The log of a ring at `parts`, if `memory` has one. Marks everything in it that the device may have written.
    pub fn attach(
        memory: &GuestMemory,
        parts: &Parts,
        config: &QueueConfig,
        device: Option<u64>,
    ) -> Option<Box<RingLog>> {
        let packed = config.layout == Layout::Packed;
        let descriptor = if packed { memory.logged_addr(parts.descriptor) } else { None };
        // The size was checked to be at most 32768.
        let log = RingLog { log: memory.log()?.clone(), descriptor, device, size: config.size as u16 };
        if let Ok(layout) = RingLayout::new(config.layout, config.size, config.event_idx) {
            log.device_part(0, layout.device.size);
            if let Some(start) = descriptor {
                log.log.mark(start, layout.descriptor.size);
            }
        }
        Some(Box::new(log))
    }

    /// Marks `len` bytes at `offset` of the device part.
    #[cold]
    pub fn device_part(&self, offset: usize, len: u64) {
        if let Some(addr) = self.device.and_then(|start| start.checked_add(offset as u64)) {
            self.log.mark(addr, len);
        }
    }

    /// Marks the entries that a split ring's index passes from `old` to `new`, and the index (virtio 1.2, 2.7.8).
    #[cold]
    pub fn used_elements(&self, old: u16, new: u16) {
        const HEAD: usize = 4;
        let mask = self.size - 1;
        let (first, end) = (old & mask, u32::from(old & mask) + u32::from(new.wrapping_sub(old)).min(self.size.into()));
        let element = |slot: u16| HEAD + 8 * usize::from(slot);
        // Up to the end of the ring, and the rest from its beginning.
        let (above, below) = (end.min(self.size.into()) - u32::from(first), end.saturating_sub(self.size.into()));
        self.device_part(element(first), 8 * u64::from(above));
        self.device_part(element(0), 8 * u64::from(below));
        self.device_part(0, HEAD as u64);
    }

    /// Marks `slots` descriptors of a packed ring from `at` on.
    #[cold]
    pub fn descriptors(&self, at: Position, slots: u32) {
        let Some(start) = self.descriptor else { return };
        let (first, end) = (u32::from(at.index), u32::from(at.index) + slots.min(self.size.into()));
        let bytes = |count: u32| u64::from(count) * BYTES as u64;
        let (above, below) = (end.min(self.size.into()) - first, end.saturating_sub(self.size.into()));
        self.log.mark(start + bytes(first), bytes(above));
        self.log.mark(start, bytes(below));
    }
}

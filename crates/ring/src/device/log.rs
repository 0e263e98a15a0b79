//! The log of what the device writes into its ring, for a live migration (vhost-user, "Migration").
//!
//! Two kinds of writes are told apart. The device part (used ring, or device event suppression structure) is logged at the
//! address that the front-end gives for it, which need not be one of the guest's, and only if it gives one. The descriptors
//! of a packed ring, which the device overwrites, are guest memory like buffers and are logged where they lie.
//!
//! Marks come after the writes, see [`DirtyLog`]. A queue that gets a log marks all that it ever writes in its ring at once:
//! whoever served the ring before may have been killed between a write and its mark.

use viaduct_memory::{DirtyLog, GuestMemory, RingPart};

use crate::QueueConfig;
use crate::descriptor::{BYTES, Position};
use crate::layout::{Layout, RingLayout};

#[derive(Debug)]
pub(super) struct RingLog {
    log: DirtyLog,
    /// The descriptor ring, if it is one that is written.
    descriptor: Place,
    /// Where writes to the device part are logged.
    device: Place,
    size: u16,
}

/// Where the pieces of a part lie in guest-physical memory: offset in the part, address and length of each. Behind an IOMMU
/// there may be several.
#[derive(Debug, Default)]
struct Place(Vec<(u64, u64, u64)>);

impl Place {
    fn of(part: &RingPart, memory: &GuestMemory) -> Place {
        let mut offset = 0;
        let mut pieces = Vec::new();
        for span in part.pieces() {
            pieces.extend(memory.logged_addr(span.as_ptr()).map(|addr| (offset, addr, span.len().into())));
            offset += u64::from(span.len());
        }
        Place(pieces)
    }
}

impl RingLog {
    /// The log of a ring with these parts, if `memory` has one. Marks everything in it that the device may have written.
    pub fn attach(
        memory: &GuestMemory,
        [descriptor, _, device]: &[RingPart; 3],
        config: &QueueConfig,
        device_addr: Option<u64>,
    ) -> Option<Box<RingLog>> {
        let log = memory.log()?.clone();
        let packed = config.layout == Layout::Packed;
        let descriptor = if packed { Place::of(descriptor, memory) } else { Place::default() };
        let device = match device_addr {
            // Behind an IOMMU the address given is I/O virtual like that of the part itself.
            Some(_) if memory.iotlb().is_some() => Place::of(device, memory),
            Some(addr) => Place(vec![(0, addr, u64::MAX)]),
            None => Place::default(),
        };
        // The size was checked to be at most 32768.
        let log = RingLog { log, descriptor, device, size: config.size as u16 };
        if let Ok(layout) = RingLayout::new(config.layout, config.size, config.event_idx) {
            log.device_part(0, layout.device.size);
            log.mark(&log.descriptor, 0, layout.descriptor.size);
        }
        Some(Box::new(log))
    }

    /// Marks `len` bytes at `offset` of a part.
    fn mark(&self, place: &Place, offset: u64, len: u64) {
        for &(start, addr, size) in &place.0 {
            let first = offset.max(start);
            let end = (offset + len).min(start.saturating_add(size));
            if first < end
                && let Some(addr) = addr.checked_add(first - start)
            {
                self.log.mark(addr, end - first);
            }
        }
    }

    /// Marks `len` bytes at `offset` of the device part.
    #[cold]
    pub fn device_part(&self, offset: usize, len: u64) {
        self.mark(&self.device, offset as u64, len);
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
        let (first, end) = (u32::from(at.index), u32::from(at.index) + slots.min(self.size.into()));
        let bytes = |count: u32| u64::from(count) * BYTES as u64;
        let (above, below) = (end.min(self.size.into()) - first, end.saturating_sub(self.size.into()));
        self.mark(&self.descriptor, bytes(first), bytes(above));
        self.mark(&self.descriptor, 0, bytes(below));
    }
}

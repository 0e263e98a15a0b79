//! The driver's indirect tables: one for each buffer id, in an area that the caller gives.

use viaduct_memory::GuestMemory;

use super::segments::Segments;
use crate::RingError;
use crate::descriptor::{BYTES, Descriptor, NEXT};

/// An area of guest memory cut into as many tables as the queue has descriptors.
#[derive(Debug)]
pub(super) struct Tables {
    /// Guest-physical address.
    addr: u64,
    host: *mut u8,
    /// Descriptors in one table.
    entries: u16,
}

// SAFETY: an address in memory that the queue keeps alive, written atomically.
unsafe impl Send for Tables {}
// SAFETY: as above.
unsafe impl Sync for Tables {}

impl Tables {
    /// Cuts `len` bytes at guest-physical `addr` into `size` tables.
    pub fn new(memory: &GuestMemory, addr: u64, len: u32, size: u16) -> Result<Tables, RingError> {
        let unmapped = RingError::IndirectAddress { addr, len };
        let host = memory.translate(&mut Default::default(), addr, len).ok_or(unmapped)?.as_ptr();
        let align = BYTES as u64;
        if !addr.is_multiple_of(align) || !(host as u64).is_multiple_of(align) {
            return Err(RingError::Alignment { part: "area of indirect tables", addr, align });
        }
        let entries = len as usize / BYTES / usize::from(size);
        Ok(Tables { addr, host, entries: entries.min(u16::MAX.into()) as u16 })
    }

    /// Descriptors in one table.
    pub fn entries(&self) -> u16 {
        self.entries
    }

    /// Fills the table of buffer `id` and returns its guest-physical address and length. `segments` fit into a table.
    pub fn fill(&self, id: u16, segments: Segments, packed: bool) -> (u64, u32) {
        debug_assert!(segments.len() <= self.entries.into());
        let first = usize::from(id) * usize::from(self.entries);
        let count = segments.len();
        for (i, (addr, len, write)) in segments.iter().enumerate() {
            let descriptor = match (packed, i + 1 == count) {
                // The order is the link, and WRITE the only flag (virtio 1.2, 2.8.7).
                (true, _) => Descriptor::packed(addr, len, 0, write),
                (false, true) => Descriptor::split(addr, len, write, 0),
                (false, false) => Descriptor::split(addr, len, write | NEXT, i as u16 + 1),
            };
            // SAFETY: ids are below the queue's size and the segments fit, so the entry lies in the area, which is
            // mapped, aligned to 16, and alive with the queue.
            unsafe { descriptor.store(self.host, first + i) };
        }
        (self.addr + (first * BYTES) as u64, (count * BYTES) as u32)
    }
}

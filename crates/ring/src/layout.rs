//! Where the parts of a virtqueue lie: sizes, alignments, addresses.

use viaduct_memory::iotlb::{Access, Unreachable};
use viaduct_memory::{GuestMemory, RingPart};

use crate::RingError;

/// The largest queue of either layout (virtio 1.2, 2.7 and 2.8).
pub const MAX_SIZE: u32 = 32768;

/// How the queue lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// virtio 1.2, 2.7.
    Split,
    /// virtio 1.2, 2.8.
    Packed,
}

/// What has to be known to start a queue; addresses are as in SET_VRING_ADDR, front-end-virtual, or I/O virtual behind an
/// IOMMU.
#[derive(Clone, Copy, Debug)]
pub struct QueueConfig {
    /// Layout, from VIRTIO_F_RING_PACKED.
    pub layout: Layout,
    /// Number of descriptors: split a power of two up to 32768, packed 1 to 32768.
    pub size: u32,
    /// Descriptor table or descriptor ring.
    pub descriptor_addr: u64,
    /// Available ring, or driver event suppression structure.
    pub driver_addr: u64,
    /// Used ring, or device event suppression structure.
    pub device_addr: u64,
    /// Where to start, as in SET_VRING_BASE. Split: available index. Packed: bits 0-14 available index, bit 15 its wrap
    /// counter, bits 16-30 used index, bit 31 its wrap counter; a packed ring never used before starts at
    /// [`PACKED_START`].
    pub base: u32,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// VIRTIO_F_IN_ORDER was negotiated.
    pub in_order: bool,
}

/// The base of a packed ring that was never used: both positions 0, both wrap counters 1 (virtio 1.2, 2.8.1).
pub const PACKED_START: u32 = 0x8000_8000;

/// Size and alignment of one part of a queue, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// What the specification calls it.
    pub name: &'static str,
    /// Bytes it occupies.
    pub size: u64,
    /// What its address must be a multiple of.
    pub align: u64,
}

/// How much memory the three parts of a queue need (virtio 1.2, 2.7 and 2.8.10.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingLayout {
    /// Descriptor table or descriptor ring.
    pub descriptor: Part,
    /// Available ring, or driver event suppression structure.
    pub driver: Part,
    /// Used ring, or device event suppression structure.
    pub device: Part,
}

impl RingLayout {
    /// The parts of a queue of `size` descriptors.
    ///
    /// The two bytes for `used_event` and `avail_event` are counted when `event_idx` is set; whoever allocates should
    /// always set it, whoever checks what another allocated must not ask for more than is used.
    ///
    /// # Errors
    /// [`RingError::Size`].
    pub fn new(layout: Layout, size: u32, event_idx: bool) -> Result<RingLayout, RingError> {
        if size == 0 || size > MAX_SIZE || (layout == Layout::Split && !size.is_power_of_two()) {
            return Err(RingError::Size(size));
        }
        let n = u64::from(size);
        let event = if event_idx { 2 } else { 0 };
        Ok(match layout {
            Layout::Split => RingLayout {
                descriptor: Part { name: "descriptor table", size: 16 * n, align: 16 },
                driver: Part { name: "available ring", size: 4 + 2 * n + event, align: 2 },
                device: Part { name: "used ring", size: 4 + 8 * n + event, align: 4 },
            },
            Layout::Packed => RingLayout {
                descriptor: Part { name: "descriptor ring", size: 16 * n, align: 16 },
                driver: Part { name: "driver event suppression structure", size: 4, align: 4 },
                device: Part { name: "device event suppression structure", size: 4, align: 4 },
            },
        })
    }

    /// Places the parts one after the other from `start`, each on its own cache lines, because the two sides write
    /// different parts. Returns the addresses of descriptor, driver and device part and the first free one.
    pub fn place(&self, start: u64) -> (u64, u64, u64, u64) {
        const LINE: u64 = 64;
        let descriptor = start.next_multiple_of(LINE);
        let driver = (descriptor + self.descriptor.size).next_multiple_of(LINE);
        let device = (driver + self.driver.size).next_multiple_of(LINE);
        (descriptor, driver, device, (device + self.device.size).next_multiple_of(LINE))
    }
}

/// The three parts in this process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parts {
    pub descriptor: *mut u8,
    pub driver: *mut u8,
    pub device: *mut u8,
}

// SAFETY: addresses; whoever reads or writes through them keeps the memory alive and uses atomic or volatile access.
unsafe impl Send for Parts {}
// SAFETY: as above.
unsafe impl Sync for Parts {}

impl Parts {
    /// Finds the parts of `config` in `memory` and checks size, alignment and that each can be reached. What is returned
    /// beside them has to live as long as they are used, like the memory.
    pub fn locate(memory: &GuestMemory, config: &QueueConfig) -> Result<(Parts, [RingPart; 3]), RingError> {
        let layout = RingLayout::new(config.layout, config.size, config.event_idx)?;
        let find = |part: Part, addr: u64, accesses: &[Access]| {
            let misaligned = RingError::Alignment { part: part.name, addr, align: part.align };
            if !addr.is_multiple_of(part.align) {
                return Err(misaligned);
            }
            let unmapped = RingError::Unmapped { part: part.name, addr, len: part.size };
            // The largest part, a used ring of 32768 elements, has 262150 bytes.
            let len = u32::try_from(part.size).map_err(|_| unmapped.clone())?;
            let found = memory.ring_part(addr, len, accesses).map_err(|why| match why {
                Unreachable::Outside => unmapped,
                // What was refused may be mapped later.
                Unreachable::Missing(_) | Unreachable::Refused => RingError::Untranslated { addr },
                Unreachable::Forbidden => RingError::Forbidden { part: part.name, addr, len: part.size },
            })?;
            // A region may be mapped from any offset of its file; the accesses need the alignment in this process.
            if !(found.as_ptr() as u64).is_multiple_of(part.align) {
                return Err(misaligned);
            }
            Ok(found)
        };
        let descriptor: &[Access] = match config.layout {
            Layout::Split => &[Access::Read],
            Layout::Packed => &[Access::Read, Access::Write],
        };
        // All three before the first error counts, so that all missing translations are asked for together.
        let (descriptor, driver, device) = (
            find(layout.descriptor, config.descriptor_addr, descriptor),
            find(layout.driver, config.driver_addr, &[Access::Read]),
            find(layout.device, config.device_addr, &[Access::Write]),
        );
        let found = [descriptor?, driver?, device?];
        let [descriptor, driver, device] = found.each_ref().map(RingPart::as_ptr);
        Ok((Parts { descriptor, driver, device }, found))
    }
}

//! The device side of a virtqueue, either layout.

use viaduct_memory::GuestMemory;

use crate::{Batch, Chain};

/// How the queue lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// virtio 1.2, 2.7.
    Split,
    /// virtio 1.2, 2.8.
    Packed,
}

/// What has to be known to start a queue; addresses are front-end-virtual, as in SET_VRING_ADDR.
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
    /// counter, bits 16-30 used index, bit 31 its wrap counter.
    pub base: u32,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// VIRTIO_F_IN_ORDER was negotiated.
    pub in_order: bool,
}

/// What a driver did wrong. The queue is broken from then on: the owner stops it and tells the front-end.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// The size is not one the layout allows.
    #[error(
        "queue size {0} is not allowed: a split ring takes a power of two up to 32768, a packed one 1 to 32768 (virtio 1.2, 2.6)"
    )]
    Size(u32),
}

/// The device side of one virtqueue.
#[derive(Debug)]
pub struct DeviceQueue {}

impl DeviceQueue {
    /// Starts a queue. Checks size, alignment and that all three parts lie in `memory`.
    pub fn new(_memory: GuestMemory, _config: &QueueConfig) -> Result<DeviceQueue, RingError> {
        todo!()
    }

    /// Goes on with a new memory table; the ring's parts are found anew.
    pub fn set_memory(&mut self, _memory: GuestMemory) -> Result<(), RingError> {
        todo!()
    }

    /// The memory in which the queue lives.
    pub fn memory(&self) -> &GuestMemory {
        todo!()
    }

    /// Appends up to `max` available chains to `batch`, from the first one not yet consumed, and takes none of them.
    /// Returns how many. Descriptors are read once and checked; spans are translated. An error breaks the queue, and
    /// chains before the bad one are returned first: the error comes with the next call.
    pub fn peek(&mut self, _batch: &mut Batch, _max: usize) -> Result<usize, RingError> {
        todo!()
    }

    /// Takes the first chains that the last [`peek`](DeviceQueue::peek) returned, which must be `chains`.
    pub fn consume(&mut self, _chains: &[Chain]) {
        todo!()
    }

    /// Stages a used element: `written` bytes went into the writable spans. Chains may be completed in any order unless
    /// IN_ORDER was negotiated. Nothing is visible to the driver before [`publish`](DeviceQueue::publish).
    pub fn complete(&mut self, _chain: &Chain, _written: u32) {
        todo!()
    }

    /// Stages `chains` with nothing written: a transmit batch.
    pub fn complete_all(&mut self, _chains: &[Chain]) {
        todo!()
    }

    /// Makes the staged elements visible, in one go. Returns whether the driver wants to be notified.
    pub fn publish(&mut self) -> bool {
        todo!()
    }

    /// Asks the driver for notifications (kicks). Returns whether chains are available already: then one must look
    /// again before sleeping (virtio 1.2, 2.7.13.3.1 and 2.8.21.3.1).
    pub fn enable_notifications(&mut self) -> bool {
        todo!()
    }

    /// Asks the driver not to notify: we poll.
    pub fn disable_notifications(&mut self) {
        todo!()
    }

    /// Where the queue stands, as in GET_VRING_BASE (encoding as in [`QueueConfig::base`]).
    pub fn base(&self) -> u32 {
        todo!()
    }
}

//! Buffers of our own for frames that come from the host: shaped like a virtqueue's chains, so that forwarding need not
//! know where a frame came from.

use std::alloc::Layout;
use std::ptr::NonNull;

use viaduct_memory::Span;
use viaduct_ring::{Batch, Chain};

use crate::frame::MAX_FRAME;
use crate::net_header::NetHeader;

/// Frames that may wait in a pool.
pub(crate) const SLOTS: usize = 64;
/// Room for the longest frame with its header, in whole cache lines.
pub(crate) const SLOT_SIZE: usize = (MAX_FRAME as usize + NetHeader::LEN).next_multiple_of(64);

/// A queue of received frames, each with its virtio-net header, oldest first.
#[derive(Debug)]
pub(crate) struct FramePool {
    memory: NonNull<u8>,
    lengths: [u32; SLOTS],
    oldest: usize,
    filled: usize,
}

// SAFETY: the pool owns its memory, and spans of it are used only by the thread that has the pool.
unsafe impl Send for FramePool {}

impl FramePool {
    const LAYOUT: Layout = match Layout::from_size_align(SLOTS * SLOT_SIZE, 4096) {
        Ok(layout) => layout,
        Err(_) => panic!("a valid layout"),
    };

    /// An empty pool. Its pages are taken from the system when they are first used.
    pub fn new() -> FramePool {
        // SAFETY: the layout is not empty.
        let memory = unsafe { std::alloc::alloc_zeroed(FramePool::LAYOUT) };
        let Some(memory) = NonNull::new(memory) else { std::alloc::handle_alloc_error(FramePool::LAYOUT) };
        FramePool { memory, lengths: [0; SLOTS], oldest: 0, filled: 0 }
    }

    fn slot(&self, index: usize) -> NonNull<u8> {
        // SAFETY: the index is taken modulo the number of slots, all of which lie inside the allocation.
        unsafe { self.memory.add((index % SLOTS) * SLOT_SIZE) }
    }

    /// Appends up to `max` frames to the batch: those that wait, then new ones for as long as `read` fills a slot with
    /// one and returns its length. An error of `read` is returned if there is no frame to go on with.
    pub fn receive<E>(
        &mut self,
        batch: &mut Batch,
        max: usize,
        mut read: impl FnMut(&mut [u8]) -> Result<Option<usize>, E>,
    ) -> Result<usize, E> {
        let max = max.min(SLOTS);
        while self.filled < max {
            let index = (self.oldest + self.filled) % SLOTS;
            // SAFETY: the slot is ours, zeroed or written before, and no span of a free slot is in use.
            let slot = unsafe { std::slice::from_raw_parts_mut(self.slot(index).as_ptr(), SLOT_SIZE) };
            match read(slot) {
                Ok(Some(len)) => self.lengths[index] = len.min(SLOT_SIZE) as u32,
                Ok(None) => break,
                Err(error) if self.filled == 0 => return Err(error),
                Err(_) => break,
            }
            self.filled += 1;
        }
        let count = self.filled.min(max);
        for index in self.oldest..self.oldest + count {
            let len = self.lengths[index % SLOTS];
            let first = batch.spans.len() as u32;
            batch.spans.push(Span::new(self.slot(index), len));
            batch.chains.push(Chain { first, readable: 1, readable_len: len, slots: 1, ..Chain::default() });
        }
        Ok(count)
    }

    /// Frees the `count` oldest frames.
    pub fn release(&mut self, count: usize) {
        self.oldest = (self.oldest + count) % SLOTS;
        self.filled -= count;
    }
}

impl Drop for FramePool {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with the same layout.
        unsafe { std::alloc::dealloc(self.memory.as_ptr(), FramePool::LAYOUT) }
    }
}

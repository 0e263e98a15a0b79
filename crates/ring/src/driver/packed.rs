//! The driver side of a packed virtqueue (virtio 1.2, 2.8).
//!
//! The mirror image of the device side: descriptors are written as they are added, all but the second word of the very
//! first one, at which the device is looking; that word is stored with release when the batch is published.

use std::sync::atomic::Ordering;

use viaduct_memory::access::{load_u64, store_u64};

use super::fifo::Fifo;
use super::held::{Holdings, Returned};
use super::segments::Segments;
use super::tables::Tables;
use crate::descriptor::{AVAIL, BYTES, Descriptor, INDIRECT, NEXT, Position, USED, WRITE, packed_word};
use crate::event::{Suppression, full_fence};
use crate::layout::Parts;
use crate::{QueueConfig, RingError};

#[derive(Debug)]
pub(super) struct Packed {
    parts: Parts,
    size: u16,
    event_idx: bool,
    /// Where the next available descriptor goes.
    available: Position,
    /// Where the first staged one goes.
    published: Position,
    /// Where the device writes the next used descriptor.
    next: Position,
    /// Descriptors staged.
    staged: u32,
    /// The second word of the first staged descriptor.
    first: u64,
    /// Descriptors of the ring that the device does not hold.
    free: u16,
    ids: Fifo,
    holdings: Holdings,
}

impl Packed {
    /// Starts with nothing outstanding, and says so in the ring.
    pub fn new(parts: Parts, config: &QueueConfig) -> Result<Packed, RingError> {
        let size = config.size as u16;
        let position = Position::decode(config.base as u16);
        if position.index >= size || config.base >> 16 != u32::from(position.encode()) {
            return Err(RingError::Base { found: config.base, size: config.size });
        }
        for index in 0..size {
            // As if the ring had gone round to this place and all had come back used: for a new ring all zero (2.8.13).
            let lap = Position { index, wrap: position.wrap ^ (index >= position.index) };
            // SAFETY: the index is below the size.
            unsafe { Descriptor::packed(0, 0, 0, lap.used()).store(parts.descriptor, index.into()) };
        }
        // SAFETY: the two event suppression structures.
        unsafe {
            Suppression::Enable.store(parts.driver);
            Suppression::Enable.store(parts.device);
        }
        Ok(Packed {
            parts,
            size,
            event_idx: config.event_idx,
            available: position,
            published: position,
            next: position,
            staged: 0,
            first: 0,
            free: size,
            ids: Fifo::full(size),
            holdings: Holdings::new(size, config.in_order),
        })
    }

    pub fn base(&self) -> u32 {
        u32::from(self.published.encode()) | u32::from(self.next.encode()) << 16
    }

    pub fn free(&self) -> usize {
        self.free.into()
    }

    /// Writes the next available descriptor.
    #[inline(always)]
    fn put(&mut self, addr: u64, len: u32, id: u16, flags: u16) {
        let word = packed_word(len, id, flags | self.available.available());
        // SAFETY: a position's index is below the size.
        unsafe {
            let at = self.parts.descriptor.add(usize::from(self.available.index) * BYTES).cast::<u64>();
            store_u64(at, addr, Ordering::Relaxed);
            if self.staged == 0 {
                self.first = word;
            } else {
                store_u64(at.add(1), word, Ordering::Relaxed);
            }
        }
        self.staged += 1;
        self.available.advance(1, self.size);
        self.free -= 1;
    }

    /// One direct descriptor.
    #[inline]
    pub fn add_single(&mut self, addr: u64, len: u32, write: u16, token: u64) -> bool {
        if self.free == 0 {
            return false;
        }
        let Some(id) = self.ids.pop() else { return false };
        self.put(addr, len, id, write);
        self.holdings.give(id, token, if write != 0 { len } else { 0 }, 1);
        true
    }

    /// A list of direct descriptors (2.8.6).
    pub fn add_chain(&mut self, segments: Segments, room: u32, token: u64) -> bool {
        let count = segments.len();
        if usize::from(self.free) < count {
            return false;
        }
        let Some(id) = self.ids.pop() else { return false };
        for (i, (addr, len, write)) in segments.iter().enumerate() {
            self.put(addr, len, id, write | if i + 1 == count { 0 } else { NEXT });
        }
        self.holdings.give(id, token, room, count as u16);
        true
    }

    /// One indirect descriptor (2.8.7).
    pub fn add_indirect(&mut self, tables: &Tables, segments: Segments, room: u32, token: u64) -> bool {
        if self.free == 0 {
            return false;
        }
        let Some(id) = self.ids.pop() else { return false };
        let (addr, len) = tables.fill(id, segments, true);
        self.put(addr, len, id, INDIRECT);
        self.holdings.give(id, token, room, 1);
        true
    }

    #[inline]
    pub fn publish(&mut self) -> bool {
        if self.staged == 0 {
            return false;
        }
        // Release: buffers and all other descriptors before the first one's flags (2.8.21.1).
        // SAFETY: a position's index is below the size.
        unsafe {
            let at = self.parts.descriptor.add(usize::from(self.published.index) * BYTES + 8);
            store_u64(at.cast(), self.first, Ordering::Release);
        }
        let (old, slots) = (self.published, self.staged);
        self.published = self.available;
        self.staged = 0;
        // The flags are written before we read what the device wants (2.8.21.3.1).
        full_fence();
        // SAFETY: the device event suppression structure.
        match unsafe { Suppression::load(self.parts.device) } {
            event @ Suppression::At(_) if self.event_idx => event.wants(old, slots, self.size),
            Suppression::Disable => false,
            _ => true,
        }
    }

    /// The second word of the descriptor in which the device says that it is done. Acquire: what the device wrote is
    /// read after it. Length, id and flags share the word and come with one load.
    #[inline(always)]
    fn load_word(&self) -> u64 {
        // SAFETY: a position's index is below the size.
        unsafe {
            load_u64(self.parts.descriptor.add(usize::from(self.next.index) * BYTES + 8).cast(), Ordering::Acquire)
        }
    }

    #[inline]
    pub fn take(&mut self) -> Result<Option<(u64, u32)>, RingError> {
        if let Some(returned) = self.holdings.take_batched() {
            return Ok(Some(self.release(returned)));
        }
        let used = Descriptor::from_words(0, self.load_word());
        let flags = used.packed_flags();
        if flags & (AVAIL | USED) != self.next.used() {
            return Ok(None);
        }
        // The length means nothing without WRITE (2.8.4).
        let written = if flags & WRITE != 0 { used.len() } else { 0 };
        let returned = self.holdings.take(used.id().into(), written, self.size.into())?;
        Ok(Some(self.release(returned)))
    }

    #[inline]
    fn release(&mut self, returned: Returned) -> (u64, u32) {
        self.next.advance(returned.descriptors, self.size);
        self.free += returned.descriptors;
        self.ids.push(returned.id);
        (returned.token, returned.written)
    }

    pub fn enable_notifications(&mut self) -> bool {
        let event = if self.event_idx { Suppression::At(self.next) } else { Suppression::Enable };
        // SAFETY: the driver event suppression structure.
        unsafe { event.store(self.parts.driver) };
        full_fence();
        (self.load_word() >> 48) as u16 & (AVAIL | USED) == self.next.used()
    }

    pub fn disable_notifications(&mut self) {
        // SAFETY: the driver event suppression structure.
        unsafe { Suppression::Disable.store(self.parts.driver) };
    }
}

//! The driver side of a split virtqueue (virtio 1.2, 2.7).

use std::sync::atomic::Ordering;

use viaduct_memory::access::{load_u16, load_u32, store_u16};

use super::fifo::Fifo;
use super::held::{Holdings, Returned};
use super::segments::Segments;
use super::tables::Tables;
use crate::descriptor::{Descriptor, INDIRECT, NEXT};
use crate::event::{SUPPRESS, full_fence, need_event};
use crate::layout::Parts;
use crate::{QueueConfig, RingError};

#[derive(Debug)]
pub(super) struct Split {
    parts: Parts,
    size: u16,
    mask: u16,
    event_idx: bool,
    /// Our `idx` with the staged buffers.
    available: u16,
    /// Our `idx` as the device sees it.
    published: u16,
    /// Index in the used ring of the next element.
    next: u16,
    /// The device's `idx` as last seen.
    used: u16,
    free: Fifo,
    holdings: Holdings,
}

impl Split {
    /// Starts with nothing outstanding, and says so in the rings.
    pub fn new(parts: Parts, config: &QueueConfig) -> Split {
        let size = config.size as u16;
        let base = config.base as u16;
        for ring in [parts.driver, parts.device] {
            // SAFETY: `flags` and `idx` of either ring (2.7.6, 2.7.8; the driver clears the device's flags, 2.7.10.1).
            unsafe {
                store_u16(ring.cast(), 0, Ordering::Relaxed);
                store_u16(ring.cast::<u16>().add(1), base, Ordering::Release);
            }
        }
        Split {
            parts,
            size,
            mask: size.wrapping_sub(1),
            event_idx: config.event_idx,
            available: base,
            published: base,
            next: base,
            used: base,
            free: Fifo::full(size),
            holdings: Holdings::new(size, config.in_order),
        }
    }

    pub fn base(&self) -> u32 {
        self.published.into()
    }

    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// One direct descriptor.
    #[inline]
    pub fn add_single(&mut self, addr: u64, len: u32, write: u16, token: u64) -> bool {
        let Some(head) = self.free.pop() else { return false };
        // SAFETY: indexes in the free list are below the size.
        unsafe { Descriptor::split(addr, len, write, 0).store(self.parts.descriptor, head.into()) };
        self.make_available(head, token, if write != 0 { len } else { 0 }, 1);
        true
    }

    /// A chain of direct descriptors.
    pub fn add_chain(&mut self, segments: Segments, room: u32, token: u64) -> bool {
        let count = segments.len();
        if self.free.len() < count {
            return false;
        }
        let Some(head) = self.free.pop() else { return false };
        let mut index = head;
        for (i, (addr, len, write)) in segments.iter().enumerate() {
            let last = i + 1 == count;
            let next = if last { 0 } else { self.free.pop().unwrap_or(0) };
            let flags = write | if last { 0 } else { NEXT };
            // SAFETY: indexes in the free list are below the size.
            unsafe { Descriptor::split(addr, len, flags, next).store(self.parts.descriptor, index.into()) };
            self.holdings.link(index, next);
            index = next;
        }
        self.make_available(head, token, room, count as u16);
        true
    }

    /// One indirect descriptor (2.7.5.3).
    pub fn add_indirect(&mut self, tables: &Tables, segments: Segments, room: u32, token: u64) -> bool {
        let Some(head) = self.free.pop() else { return false };
        let (addr, len) = tables.fill(head, segments, false);
        // SAFETY: indexes in the free list are below the size.
        unsafe { Descriptor::split(addr, len, INDIRECT, 0).store(self.parts.descriptor, head.into()) };
        self.make_available(head, token, room, 1);
        true
    }

    #[inline]
    fn make_available(&mut self, head: u16, token: u64, room: u32, descriptors: u16) {
        self.holdings.give(head, token, room, descriptors);
        let entry = 2 + usize::from(self.available & self.mask);
        // SAFETY: the masked index lies in the available ring, which begins after `flags` and `idx`.
        unsafe { store_u16(self.parts.driver.cast::<u16>().add(entry), head, Ordering::Relaxed) };
        self.available = self.available.wrapping_add(1);
    }

    #[inline]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.available);
        if old == new {
            return false;
        }
        // Release: buffers, descriptors and entries before `idx` (2.7.13.3.1).
        // SAFETY: `idx` of the available ring.
        unsafe { store_u16(self.parts.driver.cast::<u16>().add(1), new, Ordering::Release) };
        self.published = new;
        // `idx` is written before we read what the device wants (2.7.13.4.1).
        full_fence();
        if self.event_idx {
            let event = 2 + 4 * usize::from(self.size);
            // SAFETY: `avail_event` follows the last element of the used ring.
            need_event(unsafe { load_u16(self.parts.device.cast::<u16>().add(event), Ordering::Relaxed) }, new, old)
        } else {
            // SAFETY: `flags` of the used ring.
            unsafe { load_u16(self.parts.device.cast::<u16>(), Ordering::Relaxed) & SUPPRESS == 0 }
        }
    }

    /// `idx` of the used ring. Acquire: elements and what the device wrote are read after it (2.7.14).
    #[inline]
    fn load_used(&self) -> u16 {
        // SAFETY: the field lies in the device part.
        unsafe { load_u16(self.parts.device.cast::<u16>().add(1), Ordering::Acquire) }
    }

    #[inline]
    pub fn take(&mut self) -> Result<Option<(u64, u32)>, RingError> {
        if let Some(returned) = self.holdings.take_batched() {
            return Ok(Some(self.release(returned)));
        }
        if self.next == self.used {
            let used = self.load_used();
            let found = used.wrapping_sub(self.next);
            let allowed = self.published.wrapping_sub(self.next);
            if found > allowed {
                return Err(RingError::UsedJump { found: found.into(), allowed: allowed.into() });
            }
            self.used = used;
            if found == 0 {
                return Ok(None);
            }
        }
        let slot = usize::from(self.next & self.mask);
        // SAFETY: the masked index lies in the used ring, which is aligned to 4 and begins after `flags` and `idx`.
        let (id, written) = unsafe {
            let element = self.parts.device.cast::<u32>().add(1 + 2 * slot);
            (load_u32(element, Ordering::Relaxed), load_u32(element.add(1), Ordering::Relaxed))
        };
        let known = self.used.wrapping_sub(self.next);
        let returned = self.holdings.take(id, written, known.into())?;
        Ok(Some(self.release(returned)))
    }

    #[inline]
    fn release(&mut self, returned: Returned) -> (u64, u32) {
        self.next = self.next.wrapping_add(1);
        let mut index = returned.id;
        self.free.push(index);
        for _ in 1..returned.descriptors {
            index = self.holdings.next(index);
            self.free.push(index);
        }
        (returned.token, returned.written)
    }

    pub fn enable_notifications(&mut self) -> bool {
        if self.event_idx {
            let event = 2 + usize::from(self.size);
            // SAFETY: `used_event` follows the last entry of the available ring (2.7.7).
            unsafe { store_u16(self.parts.driver.cast::<u16>().add(event), self.next, Ordering::Relaxed) };
        } else {
            // SAFETY: `flags` of the available ring.
            unsafe { store_u16(self.parts.driver.cast(), 0, Ordering::Relaxed) };
        }
        full_fence();
        self.load_used() != self.next
    }

    pub fn disable_notifications(&mut self) {
        // With EVENT_IDX `flags` stays 0 (2.7.7.1) and a `used_event` that stays behind is silence enough.
        if !self.event_idx {
            // SAFETY: `flags` of the available ring.
            unsafe { store_u16(self.parts.driver.cast(), SUPPRESS, Ordering::Relaxed) };
        }
    }
}

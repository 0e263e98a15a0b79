//! The device side of a split virtqueue (virtio 1.2, 2.7).
//!
//! The driver writes head indexes into the available ring and moves its `idx`; we write used elements into the used ring
//! and move ours. Both run freely modulo 2^16. Three loads make an ordinary chain: its entry in the available ring and
//! the two words of its descriptor; one store returns it. The two `idx` fields, which the other side's processor keeps
//! writing or reading, are touched once for a batch: the available one only when fewer chains than asked for are known.

use std::sync::atomic::Ordering;

use viaduct_memory::access::{load_u16, prefetch_read, store_u16, store_u64_unaligned};
use viaduct_memory::{GuestMemory, RegionCache, Window};

use super::WORK;
use super::gather::Gather;
use super::log::RingLog;
use crate::descriptor::{BYTES, Descriptor, INDIRECT, NEXT, WRITE};
use crate::event::{SUPPRESS, full_fence, need_event};
use crate::inflight::split::SplitRecord;
use crate::inflight::{Region, may_die};
use crate::layout::Parts;
use crate::{Batch, Chain, QueueConfig, RingError};

/// How many chains ahead the descriptors are asked for.
const AHEAD: u16 = 8;

#[derive(Debug)]
pub(super) struct Split {
    parts: Parts,
    size: u16,
    mask: u16,
    event_idx: bool,
    indirect: bool,
    /// Whether the driver has been told about everything up to `published`, as far as it wants to know.
    told: bool,
    /// Index in the available ring of the first chain not consumed.
    next: u16,
    /// The driver's `idx` as last seen.
    available: u16,
    /// Our `idx` with the staged elements.
    used: u16,
    /// Our `idx` as the driver sees it.
    published: u16,
    record: Option<Box<SplitRecord>>,
    pub log: Option<Box<RingLog>>,
}

impl Split {
    pub fn new(parts: Parts, config: &QueueConfig) -> Split {
        // A used ring that somebody served before goes on where it stands: the base says only where the available ring
        // stands, and the two differ when chains are outstanding (vhost-user, "Inflight I/O tracking").
        // SAFETY: `parts` lie in memory that the queue keeps alive.
        let used = unsafe { load_u16(parts.device.cast::<u16>().add(1), Ordering::Acquire) };
        // SAFETY: as before.
        let offered = unsafe { load_u16(parts.driver.cast::<u16>().add(1), Ordering::Acquire) };
        let base = config.base as u16;
        // What was taken lies between what was used and what was made available. A base that does not is that of a new
        // queue, which DPDK's listening driver gives whoever connects again: then the used ring says how far we were.
        let next = if base.wrapping_sub(used) <= offered.wrapping_sub(used) { base } else { used };
        Split {
            parts,
            size: config.size as u16,
            mask: (config.size - 1) as u16,
            event_idx: config.event_idx,
            indirect: config.indirect,
            told: false,
            next,
            available: next,
            used,
            published: used,
            record: None,
            log: None,
        }
    }

    /// Records chains in flight from now on, and takes up what an earlier process left: returns how many chains.
    pub fn attach(&mut self, region: Region) -> Result<usize, RingError> {
        let resumed = !region.is_new()?;
        let record = SplitRecord::attach(region, self.published)?;
        let again = record.again.len();
        if resumed {
            // Each chain taken so far is either back or in flight; there are at most 32768 of them.
            self.next = self.published.wrapping_add(again as u16);
            self.available = self.next;
        }
        self.record = Some(Box::new(record));
        Ok(again)
    }

    pub fn is_recorded(&self) -> bool {
        self.record.is_some()
    }

    pub fn relocate(&mut self, parts: Parts) {
        self.parts = parts;
    }

    pub fn base(&self) -> u32 {
        self.next.into()
    }

    /// Chains that are available and not consumed.
    pub fn waiting(&self) -> u32 {
        u32::from(self.load_available().wrapping_sub(self.next)).min(self.size.into())
    }

    /// The place in the available ring of the chain that is `ahead` of the next one.
    pub fn position(&self, ahead: u16) -> u16 {
        self.next.wrapping_add(ahead) & self.mask
    }

    /// Entry `index`, modulo the size, of the descriptor table.
    pub fn descriptor(&self, index: u16) -> Descriptor {
        // SAFETY: the masked index lies in the table.
        unsafe { Descriptor::load(self.parts.descriptor, (index & self.mask).into()) }
    }

    /// `idx` of the available ring. Acquire: the entries and descriptors it covers are read after it (2.7.13.3).
    #[inline(always)]
    fn load_available(&self) -> u16 {
        // SAFETY: the field lies in the driver part.
        unsafe { load_u16(self.parts.driver.cast::<u16>().add(1), Ordering::Acquire) }
    }

    /// Entry `index`, modulo the size, of the available ring.
    #[inline(always)]
    fn head(&self, index: u16) -> u16 {
        // SAFETY: the masked index lies in the ring, which begins after `flags` and `idx`.
        unsafe { load_u16(self.parts.driver.cast::<u16>().add(2 + usize::from(index & self.mask)), Ordering::Relaxed) }
    }

    #[inline]
    pub fn peek(
        &mut self,
        memory: &GuestMemory,
        cache: &mut RegionCache,
        batch: &mut Batch,
        max: usize,
    ) -> Result<(), RingError> {
        if self.record.as_ref().is_some_and(|record| !record.again.is_empty()) {
            return self.peek_again(memory, cache, batch, max);
        }
        let mut known = self.available.wrapping_sub(self.next);
        if usize::from(known) < max {
            self.available = self.load_available();
            known = self.available.wrapping_sub(self.next);
            if known > self.size {
                return Err(RingError::AvailableJump { found: known.into(), allowed: self.size.into() });
            }
        }
        let count = usize::from(known).min(max) as u16;
        for ahead in 0..count.min(AHEAD) {
            self.prefetch(self.head(self.next.wrapping_add(ahead)));
        }
        let (mut index, end) = (self.next, self.next.wrapping_add(count));
        let mut work = 0;
        while index != end && work < WORK {
            index = index.wrapping_add(self.peek_run(memory.window(cache), batch, index, end.wrapping_sub(index)));
            if index == end {
                break;
            }
            // Another region, or a chain of another shape.
            let head = self.head(index);
            if head >= self.size {
                return Err(RingError::Index { found: head, allowed: self.size.into() });
            }
            // SAFETY: the index is below the size of the table.
            let descriptor = unsafe { Descriptor::load(self.parts.descriptor, head.into()) };
            work += self.gather(Gather::new(memory, cache, batch), head, descriptor)?;
            index = index.wrapping_add(1);
        }
        Ok(())
    }

    /// Reads up to `max` > 0 available chains of one direct descriptor each, in one direction and in one region: what
    /// nearly all of them are. Returns how many there were.
    #[inline(always)]
    fn peek_run(&self, window: Window, batch: &mut Batch, index: u16, max: u16) -> u16 {
        let first = self.head(index) & self.mask;
        // SAFETY: the masked index is below the size of the table.
        let first = unsafe { Descriptor::load(self.parts.descriptor, first.into()) };
        let expected = first.split_flags() & WRITE;
        let mut singles = batch.singles(max.into(), expected != 0);
        let mut run = 0;
        while run < max {
            // Past the end of what is available this reads an old entry: as good a hint as none.
            self.prefetch(self.head(index.wrapping_add(run + AHEAD)));
            let head = self.head(index.wrapping_add(run));
            if head >= self.size {
                break;
            }
            // SAFETY: the index is below the size of the table.
            let descriptor = unsafe { Descriptor::load(self.parts.descriptor, head.into()) };
            if descriptor.split_flags() & (NEXT | INDIRECT | WRITE) != expected {
                break;
            }
            let Some(span) = window.span(descriptor.addr, descriptor.len()) else { break };
            // SAFETY: fewer than `max` have been pushed.
            unsafe { singles.push(head, span) };
            run += 1;
        }
        singles.finish();
        run
    }

    /// Chains that an earlier process took: their descriptors are still as they were, the driver cannot reuse them yet.
    #[cold]
    fn peek_again(
        &self,
        memory: &GuestMemory,
        cache: &mut RegionCache,
        batch: &mut Batch,
        max: usize,
    ) -> Result<(), RingError> {
        for &head in self.record.iter().flat_map(|record| &record.again).take(max) {
            // SAFETY: the record's heads were checked to be below the size.
            let descriptor = unsafe { Descriptor::load(self.parts.descriptor, head.into()) };
            self.gather(Gather::new(memory, cache, batch), head, descriptor)?;
        }
        Ok(())
    }

    /// A chain of any shape that begins with `descriptor`. Returns how many descriptors it has.
    #[inline(never)]
    fn gather(&self, mut gather: Gather, head: u16, mut descriptor: Descriptor) -> Result<u32, RingError> {
        for _ in 0..self.size {
            let flags = descriptor.split_flags();
            if flags & INDIRECT != 0 {
                if !self.indirect {
                    return Err(RingError::IndirectNotNegotiated);
                }
                if flags & NEXT != 0 {
                    return Err(RingError::IndirectInChain);
                }
                // Direct descriptors followed by one indirect descriptor are legal (2.7.5.3.2).
                gather.add_split_table(descriptor, self.size.into())?;
                return Ok(gather.finish(head, 1));
            }
            gather.add(descriptor.addr, descriptor.len(), flags & WRITE != 0)?;
            if flags & NEXT == 0 {
                return Ok(gather.finish(head, 1));
            }
            let next = descriptor.next();
            if next >= self.size {
                return Err(RingError::Index { found: next, allowed: self.size.into() });
            }
            // SAFETY: the index is below the size of the table.
            descriptor = unsafe { Descriptor::load(self.parts.descriptor, next.into()) };
        }
        Err(RingError::ChainLength { allowed: self.size.into() })
    }

    #[inline(always)]
    fn prefetch(&self, head: u16) {
        prefetch_read(self.parts.descriptor.wrapping_add(usize::from(head) * BYTES));
    }

    #[inline]
    pub fn consume(&mut self, chains: &[Chain]) -> Result<(), RingError> {
        let mut fresh = chains.len();
        if let Some(record) = &mut self.record {
            for chain in chains {
                // Those that an earlier process took come first; they are in the record and behind `next`.
                if record.again.pop_front().is_some() {
                    fresh -= 1;
                } else {
                    record.take(chain.id);
                }
            }
        }
        self.next = self.next.wrapping_add(fresh as u16);
        Ok(())
    }

    #[inline]
    pub fn complete(&mut self, chain: &Chain, written: u32) {
        self.complete_each([(chain, written)].into_iter());
    }

    /// Stages used elements. The index is a local in the loop: the compiler cannot know that the stores to the ring leave
    /// the queue's own fields alone.
    #[inline(always)]
    pub fn complete_each<'a>(&mut self, done: impl Iterator<Item = (&'a Chain, u32)>) {
        if self.record.is_some() {
            return self.complete_recorded(done);
        }
        let mut used = self.used;
        for (chain, written) in done {
            let slot = usize::from(used & self.mask);
            let element = u64::from(written) << 32 | u64::from(chain.id);
            may_die();
            // The ring begins after `flags` and `idx` and is aligned to 4 only, so an element may cross a cache line; it
            // need not be atomic, because the driver reads it after `idx` (2.7.8.2).
            // SAFETY: the masked index lies in the used ring.
            unsafe { store_u64_unaligned(self.parts.device.add(4 + 8 * slot), element) };
            used = used.wrapping_add(1);
        }
        self.used = used;
    }

    #[inline(never)]
    fn complete_recorded<'a>(&mut self, done: impl Iterator<Item = (&'a Chain, u32)>) {
        let Some(mut record) = self.record.take() else { return };
        for (chain, written) in done {
            self.complete_each(std::iter::once((chain, written)));
            record.stage(chain.id);
        }
        self.record = Some(record);
    }

    #[inline]
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.used);
        if old == new {
            return false;
        }
        if let Some(record) = &mut self.record {
            record.before_publish();
        }
        may_die();
        // Release: the elements, and what was written into the buffers, before `idx` (2.7.8.2).
        // SAFETY: `idx` of the used ring.
        unsafe { store_u16(self.parts.device.cast::<u16>().add(1), new, Ordering::Release) };
        self.published = new;
        if let Some(record) = &mut self.record {
            record.after_publish(new);
        }
        if let Some(log) = &self.log {
            log.used_elements(old, new);
        }
        // `idx` is written before we read what the driver wants (2.7.7.2), once for the batch.
        full_fence();
        let told = std::mem::replace(&mut self.told, true);
        if self.event_idx {
            // SAFETY: `used_event` follows the last entry of the available ring.
            let event =
                unsafe { load_u16(self.parts.driver.cast::<u16>().add(2 + usize::from(self.size)), Ordering::Relaxed) };
            // Whoever served the ring before us may have published without notifying.
            !told || need_event(event, new, old)
        } else {
            // SAFETY: `flags` of the available ring.
            unsafe { load_u16(self.parts.driver.cast::<u16>(), Ordering::Relaxed) & SUPPRESS == 0 }
        }
    }

    pub fn enable_notifications(&mut self) -> bool {
        if self.event_idx {
            // `flags` stays 0 (2.7.10.2); `avail_event` follows the last element of the used ring.
            self.store_word(2 + 4 * usize::from(self.size), self.next);
        } else {
            self.store_word(0, 0);
        }
        full_fence();
        self.load_available() != self.next
    }

    pub fn disable_notifications(&mut self) {
        // With EVENT_IDX an `avail_event` that stays behind is silence enough: it is passed once in 65536 chains.
        if !self.event_idx {
            self.store_word(0, SUPPRESS);
        }
    }

    /// Writes one of the words by which we ask for notifications: `flags`, or `avail_event` with EVENT_IDX.
    #[inline(always)]
    fn store_word(&self, at: usize, value: u16) {
        // SAFETY: `flags` is the used ring's first word, and its last one is counted when EVENT_IDX is negotiated.
        unsafe { store_u16(self.parts.device.cast::<u16>().add(at), value, Ordering::Relaxed) };
        if let Some(log) = &self.log {
            log.device_part(2 * at, 2);
        }
    }
}

//! From descriptors to a chain: what happens to every buffer that is not one direct descriptor, or lies behind an IOMMU.
//!
//! Behind an IOMMU an address may have no translation yet. The chain is walked to its end all the same, so that everything it
//! needs is asked for together; then it *blocks*: neither it nor one behind it is taken until the answers have come. A
//! chain that the device may not reach does not block: it is given out as a refused one, without spans.

use viaduct_memory::iotlb::{self, Access, Unreachable};
use viaduct_memory::{GuestMemory, RegionCache, Span};

use crate::descriptor::{BYTES, Descriptor, INDIRECT, NEXT, WRITE};
use crate::{Batch, Chain, RingError};

/// An indirect table may have this many descriptors even in a smaller queue.
///
/// The specification allows no more than the queue has (virtio 1.2, 2.7.5.3.1), but Linux fills tables with as many
/// descriptors as a packet has fragments, whatever the size of the queue, and QEMU accepts 1024 of them.
const INDIRECT_AT_LEAST: u32 = 1024;

/// Misses that one batch remembers: more are found when these have been answered.
const MISSES: usize = 256;

/// Collects the spans of one chain at the end of a batch.
#[derive(Debug)]
pub(super) struct Gather<'a> {
    memory: &'a GuestMemory,
    cache: &'a mut RegionCache,
    batch: &'a mut Batch,
    first: usize,
    readable: usize,
    readable_len: u64,
    writable_len: u64,
    writing: bool,
    descriptors: u32,
    /// Misses of the chains before.
    misses: usize,
    missing: bool,
    refused: bool,
}

impl<'a> Gather<'a> {
    pub fn new(memory: &'a GuestMemory, cache: &'a mut RegionCache, batch: &'a mut Batch) -> Gather<'a> {
        let (first, misses) = (batch.spans.len(), batch.misses.len());
        Gather {
            memory,
            cache,
            batch,
            first,
            misses,
            missing: false,
            refused: false,
            readable: 0,
            readable_len: 0,
            writable_len: 0,
            writing: false,
            descriptors: 0,
        }
    }

    /// Adds a buffer element. One without bytes has no span, and its address means nothing.
    #[inline]
    pub fn add(&mut self, addr: u64, len: u32, write: bool) -> Result<(), RingError> {
        self.descriptors += 1;
        if !write && self.writing {
            return Err(RingError::Order);
        }
        self.writing = write;
        let direction = if write { &mut self.writable_len } else { &mut self.readable_len };
        *direction += u64::from(len);
        let total = self.readable_len + self.writable_len;
        if total > 1 << 32 || self.readable_len.max(self.writable_len) > u64::from(u32::MAX) {
            return Err(RingError::TotalLength { found: total });
        }
        if let Some(span) = self.memory.translate(self.cache, addr, len).filter(|span| !span.is_empty()) {
            self.batch.spans.push(span);
        } else {
            self.add_pieces(addr, len, if write { Access::Write } else { Access::Read })?;
        }
        if !write {
            self.readable = self.batch.spans.len() - self.first;
        }
        if self.batch.spans.len() - self.first > usize::from(u16::MAX) {
            return Err(RingError::Pieces { allowed: u16::MAX.into() });
        }
        Ok(())
    }

    /// Adds a buffer element that crosses from one region into the next, one span for each, or lies behind an IOMMU.
    #[inline(never)]
    fn add_pieces(&mut self, mut addr: u64, mut left: u32, access: Access) -> Result<(), RingError> {
        let element = self.batch.spans.len();
        while left > 0 && !self.refused {
            // Each piece is work like a descriptor: a guest may have 4 GB in one element, behind pages that lie apart.
            self.descriptors += 1;
            let outside = RingError::Address { addr, len: left };
            let done = match self.memory.reach(self.cache, addr, left, access) {
                Ok(span) => {
                    self.push(element, span);
                    span.len()
                }
                Err(Unreachable::Outside) => return Err(outside),
                Err(why) => self.stop(why, addr, left),
            };
            left -= done;
            addr = addr.checked_add(u64::from(done)).ok_or(outside)?;
        }
        Ok(())
    }

    /// Appends a span to those from `element` on; two that lie together become one.
    fn push(&mut self, element: usize, span: Span) {
        if let Some(last) = self.batch.spans[element..].last_mut()
            && last.as_ptr().wrapping_add(last.len() as usize) == span.as_ptr()
            && let Some(len) = last.len().checked_add(span.len())
        {
            *last = Span::new(last.start(), len);
        } else {
            self.batch.spans.push(span);
        }
    }

    /// Notes why `addr` cannot be reached. Returns how many of `left` bytes are to be passed over: all, if as many misses are
    /// known as a batch remembers, so that a guest cannot have a million pages looked up.
    #[inline(never)]
    fn stop(&mut self, why: Unreachable, addr: u64, left: u32) -> u32 {
        if let Unreachable::Missing(miss) = why {
            self.missing = true;
            if self.batch.misses.len() >= MISSES {
                return left;
            }
            self.batch.misses.push(miss);
            left.min((iotlb::PAGE - addr % iotlb::PAGE) as u32)
        } else {
            self.refused = true;
            left
        }
    }

    /// Adds the elements of a split indirect table (virtio 1.2, 2.7.5.3): a chain of its own through `next`.
    pub fn add_split_table(&mut self, head: Descriptor, size: u32) -> Result<(), RingError> {
        let Some(table) = self.table(head)? else { return Ok(()) };
        let allowed = table.entries.min(size.max(INDIRECT_AT_LEAST));
        let mut index = 0;
        for _ in 0..allowed {
            let descriptor = table.read(self, index)?;
            let flags = descriptor.split_flags();
            if flags & INDIRECT != 0 {
                return Err(RingError::IndirectNested);
            }
            self.add(descriptor.addr, descriptor.len(), flags & WRITE != 0)?;
            if flags & NEXT == 0 {
                return Ok(());
            }
            index = u32::from(descriptor.next());
            if index >= table.entries {
                return Err(RingError::Index { found: descriptor.next(), allowed: table.entries });
            }
        }
        Err(RingError::ChainLength { allowed })
    }

    /// Adds the elements of a packed indirect table (virtio 1.2, 2.8.7): all of them, one after the other. With
    /// `read_only` they are taken for device-readable, see [`DeviceQueue::set_read_only`](super::DeviceQueue::set_read_only).
    pub fn add_packed_table(&mut self, head: Descriptor, size: u32, read_only: bool) -> Result<(), RingError> {
        let Some(table) = self.table(head)? else { return Ok(()) };
        let allowed = size.max(INDIRECT_AT_LEAST);
        if table.entries > allowed {
            return Err(RingError::ChainLength { allowed });
        }
        for index in 0..table.entries {
            let descriptor = table.read(self, index)?;
            let flags = descriptor.packed_flags();
            // The device ignores all flags but WRITE here, yet a driver must not set this one (2.8.19).
            if flags & INDIRECT != 0 {
                return Err(RingError::IndirectNested);
            }
            self.add(descriptor.addr, descriptor.len(), flags & WRITE != 0 && !read_only)?;
        }
        Ok(())
    }

    /// The chain, appended to the batch; returns how many descriptors and pieces were walked.
    pub fn finish(self, id: u16, slots: u16) -> u32 {
        if self.missing || self.refused {
            return self.finish_stopped(id, slots);
        }
        let writable = self.batch.spans.len() - self.first - self.readable;
        // The casts lose nothing: `add` has checked each sum.
        self.batch.chains.push(Chain {
            id,
            slots,
            first: self.first as u32,
            readable: self.readable as u16,
            writable: writable as u16,
            readable_len: self.readable_len as u32,
            writable_len: self.writable_len as u32,
        });
        self.descriptors
    }

    /// The same for a chain that blocks or is refused. One that blocks is appended too, because the packed ring's walk goes
    /// on from its number of slots; it is taken off the batch in the end.
    #[inline(never)]
    fn finish_stopped(self, id: u16, slots: u16) -> u32 {
        self.batch.spans.truncate(self.first);
        if self.refused {
            self.batch.misses.truncate(self.misses);
        } else {
            self.batch.blocked.get_or_insert((self.batch.chains.len(), self.first));
        }
        self.batch.chains.push(Chain::refused(id, slots));
        self.descriptors
    }

    /// None if the table cannot be reached.
    fn table(&mut self, head: Descriptor) -> Result<Option<Table>, RingError> {
        let len = head.len();
        if len == 0 || !(len as usize).is_multiple_of(BYTES) {
            return Err(RingError::IndirectLength { found: len });
        }
        // Nearly every table lies in one region and, as an array of structures, on a multiple of 8.
        let mut span = self.memory.translate(self.cache, head.addr, len);
        if span.is_none() {
            let Some(first) = self.check_pieces(head.addr, len)? else { return Ok(None) };
            span = Some(first).filter(|first| first.len() == len);
        }
        let whole = span.filter(|span| span.as_ptr().cast::<u64>().is_aligned());
        Ok(Some(Table { addr: head.addr, len, entries: len / BYTES as u32, whole }))
    }

    /// Checks that a table lies in adjacent regions, or can be reached through the IOMMU; returns its first piece, if so.
    #[inline(never)]
    fn check_pieces(&mut self, addr: u64, len: u32) -> Result<Option<Span>, RingError> {
        let outside = RingError::IndirectAddress { addr, len };
        let (mut first, mut done, mut stopped) = (None, 0, false);
        while done < len {
            self.descriptors += 1;
            let at = addr.checked_add(u64::from(done)).ok_or(outside.clone())?;
            match self.memory.reach(self.cache, at, len - done, Access::Read) {
                Ok(piece) => {
                    first.get_or_insert(piece);
                    done += piece.len();
                }
                Err(Unreachable::Outside) => return Err(outside),
                Err(why) => {
                    stopped = true;
                    done += self.stop(why, at, len - done);
                }
            }
        }
        Ok(first.filter(|_| !stopped))
    }
}

/// An indirect table.
#[derive(Debug)]
struct Table {
    addr: u64,
    len: u32,
    entries: u32,
    whole: Option<Span>,
}

impl Table {
    /// Reads one entry, once. `index` is below `entries`.
    fn read(&self, gather: &mut Gather, index: u32) -> Result<Descriptor, RingError> {
        if let Some(span) = self.whole {
            // SAFETY: the span covers all entries, is aligned to 8, and lives as long as the gatherer's memory.
            return Ok(unsafe { Descriptor::load(span.as_ptr(), index as usize) });
        }
        // Misaligned or across regions: byte by byte through a copy of our own.
        let outside = RingError::IndirectAddress { addr: self.addr, len: self.len };
        let mut bytes = [0u64; 2];
        let start = self.addr.checked_add(u64::from(index) * BYTES as u64).ok_or(outside.clone())?;
        for i in 0..BYTES {
            let at = start.checked_add(i as u64).ok_or(outside.clone())?;
            let span = match gather.memory.reach(gather.cache, at, 1, Access::Read) {
                Ok(span) => span,
                Err(Unreachable::Outside) => return Err(outside),
                // Invalidated since the table was checked. A descriptor without bytes ends a split chain.
                Err(why) => {
                    gather.stop(why, at, 1);
                    return Ok(Descriptor::from_words(0, 0));
                }
            };
            // SAFETY: one mapped byte of memory that the gatherer keeps alive, read once.
            let byte = unsafe { span.as_ptr().read_volatile() };
            bytes[i / 8] |= u64::from(byte) << (8 * (i % 8));
        }
        Ok(Descriptor::from_words(bytes[0], bytes[1]))
    }
}

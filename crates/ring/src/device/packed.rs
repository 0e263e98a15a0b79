//! The device side of a packed virtqueue (virtio 1.2, 2.8).
//!
//! One ring of descriptors carries both directions. The driver marks a descriptor available, we overwrite it with a used
//! one when its buffer is done, and a wrap counter on each side tells this lap's marks from the last one's. One cache
//! line brings four descriptors with everything there is to know about them.
//!
//! *Reading.* Length, id and flags share an aligned 64-bit word, which one load reads as a whole: if the flags say
//! available, then the length and id beside them, which the driver wrote first, are there too. The load acquires, so the
//! address and the rest of a list are read after it (2.8.6).
//!
//! *Writing.* A used descriptor is one store of the same word. All of a batch but the first are stored as they are
//! completed; the driver looks at them only once the first has changed, so that one waits in [`Packed::first`] until
//! the batch is published, and is stored with release.

use std::sync::atomic::Ordering;
use std::time::Duration;

use viaduct_memory::access::{load_u64, prefetch_read, store_u16, store_u64};
use viaduct_memory::{GuestMemory, RegionCache, Window};

use super::WORK;
use super::gather::Gather;
use super::log::RingLog;
use super::standing::{Standing, Unused, plausible, standing};
use crate::descriptor::{AVAIL, BYTES, Descriptor, INDIRECT, NEXT, Position, USED, WRITE, packed_word};
use crate::event::{Suppression, full_fence};
use crate::inflight::packed::{Again, PackedRecord};
use crate::inflight::{Region, may_die};
use crate::layout::Parts;
use crate::{Batch, Chain, PACKED_START, QueueConfig, RingError};

/// How many descriptors ahead the ring is asked for: two cache lines.
const AHEAD: usize = 8;

/// A driver that is just writing descriptors may make the ring look strange for a moment, see [`standing`](super::standing).
const LOOKS: u32 = if cfg!(feature = "fuzzing") { 1 } else { 40 };
const BETWEEN_LOOKS: Duration = Duration::from_micros(50);

#[derive(Debug)]
pub(super) struct Packed {
    parts: Parts,
    size: u16,
    event_idx: bool,
    indirect: bool,
    /// No buffer of this queue is written, whatever an indirect table says.
    pub read_only: bool,
    /// Whether the driver has been told about everything published, as far as it wants to know.
    told: bool,
    /// The first descriptor not consumed.
    next: Position,
    /// Where the next used descriptor goes.
    used: Position,
    /// Where the first staged used descriptor goes.
    published: Position,
    /// Descriptors that the staged ones cover.
    staged: u32,
    /// Descriptors consumed and not completed.
    /// Chains completed before they are consumed make it negative for a while.
    outstanding: i32,
    /// The first staged used descriptor.
    first: u64,
    /// Descriptors that it stands for.
    first_slots: u16,
    /// Buffers that were left unused in front of others that are used.
    gap: Vec<Unused>,
    record: Option<Box<PackedRecord>>,
    pub log: Option<Box<RingLog>>,
}

impl Packed {
    /// `certain`: the base needs no correction.
    pub fn new(parts: Parts, config: &QueueConfig, certain: bool) -> Result<Packed, RingError> {
        let size = config.size as u16;
        let next = Position::decode(config.base as u16);
        let used = Position::decode((config.base >> 16) as u16);
        let base = RingError::Base { found: config.base, size: config.size };
        if next.index >= size || used.index >= size {
            return Err(base);
        }
        // What lies between the two is outstanding; with equal wrap counters the used position is not ahead.
        let ahead = if next.wrap == used.wrap { 0 } else { i32::from(size) };
        let outstanding = i32::from(next.index) + ahead - i32::from(used.index);
        if !(0..=i32::from(size)).contains(&outstanding) {
            return Err(base);
        }
        let mut ring = Packed {
            parts,
            size,
            event_idx: config.event_idx,
            indirect: config.indirect,
            read_only: false,
            told: false,
            next,
            used,
            published: used,
            staged: 0,
            outstanding,
            first: 0,
            first_slots: 0,
            gap: Vec::new(),
            record: None,
            log: None,
        };
        if !certain {
            ring.correct(config.base);
        }
        Ok(ring)
    }

    /// Goes by the ring where the base cannot be right, or is that of a new queue, which front-ends also say when they do
    /// not know better.
    fn correct(&mut self, base: u32) {
        let load = |index| self.load(index, self.load_word(index));
        // A wrong base may point among the buffers that wait, and look right; where there is a gap it says nothing.
        let is_right = |found: &Standing| {
            let at_used = load(self.used.index);
            base != PACKED_START
                && found.used == self.used
                && (found.gap.is_empty() || found.doubtful)
                && plausible(self.size, self.used, self.next, found.driver, at_used)
        };
        let mut found = standing(self.size, load);
        for _ in 0..LOOKS {
            if found.as_ref().is_some_and(|found| !found.doubtful || is_right(found)) {
                break;
            }
            std::thread::sleep(BETWEEN_LOOKS);
            found = standing(self.size, load);
        }
        let Some(found) = found.filter(|found| !is_right(found)) else { return };
        self.gap = found.gap;
        (self.next, self.used, self.published, self.outstanding) = (found.next, found.next, found.next, 0);
    }

    /// Gives back the buffers in a gap, and with them those behind, all of them empty: the killed device had not shown them,
    /// and what was to be in them may come again. Their lengths as the driver made them available are overwritten, so they
    /// cannot be used. Returns whether there was a gap.
    #[cold]
    pub fn close_gap(&mut self) -> bool {
        let gap = std::mem::take(&mut self.gap);
        let Some(&(first, _, slots)) = gap.first() else { return false };
        let (mut behind, mut changed) = (first, u32::from(slots));
        behind.advance(slots, self.size);
        while behind != self.next {
            may_die();
            let emptied = self.load_word(behind.index) & !(u64::from(WRITE) << 48) >> 32 << 32;
            self.store_word(behind.index, emptied, Ordering::Relaxed);
            behind.advance(1, self.size);
            changed += 1;
        }
        // The first comes last: the driver sees all of them at once.
        for (at, id, slots) in gap.into_iter().rev() {
            self.mark_rest(at, slots);
            may_die();
            self.store_word(at.index, packed_word(0, id, at.used()), Ordering::Release);
        }
        // Those between the lists have been emptied too.
        if let Some(log) = &self.log {
            log.descriptors(first, changed);
        }
        true
    }

    /// Records chains in flight from now on, and takes up what an earlier process left: returns how many chains.
    pub fn attach(&mut self, region: Region) -> Result<usize, RingError> {
        let resumed = !region.is_new()?;
        let marks = |at: Position| (self.load_word(at.index) >> 48) as u16 & (AVAIL | USED);
        let record = PackedRecord::attach(region, self.published, |at| marks(at) == at.available())?;
        let again = record.again.len();
        if resumed {
            // It knows better than the ring. Each descriptor taken so far is either back or in flight.
            self.gap.clear();
            let (used, slots) = record.position();
            (self.used, self.published, self.next, self.outstanding) = (used, used, used, slots as i32);
            for _ in 0..slots {
                // The killed process may have prepared used descriptors behind one that it did not publish. They are ours
                // to change, and must not be taken for used when the one before them is published.
                let word = self.load_word(self.next.index);
                let unused = word & !(u64::from(AVAIL | USED) << 48) | u64::from(self.next.available()) << 48;
                self.store_word(self.next.index, unused, Ordering::Release);
                self.next.advance(1, self.size);
            }
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
        u32::from(self.next.encode()) | u32::from(self.published.encode()) << 16
    }

    /// Descriptors that are available and not consumed.
    pub fn waiting(&self) -> u32 {
        let mut at = self.next;
        let mut found = 0;
        while found < u32::from(self.size) && (self.load_word(at.index) >> 48) as u16 & (AVAIL | USED) == at.available()
        {
            found += 1;
            at.advance(1, self.size);
        }
        found
    }

    /// The place in the ring of the descriptor that is `ahead` of the next one.
    pub fn position(&self, ahead: u32) -> u16 {
        ((u32::from(self.next.index) + ahead) % u32::from(self.size)) as u16
    }

    /// The descriptor at `index`, which is below the size.
    pub fn descriptor(&self, index: u16) -> Descriptor {
        self.load(index, self.load_word(index))
    }

    /// The second word of the descriptor at `index`. Acquire: everything else is read after the flags (2.8.6).
    #[inline(always)]
    fn load_word(&self, index: u16) -> u64 {
        // SAFETY: a position's index is below the size.
        unsafe { load_u64(self.parts.descriptor.add(usize::from(index) * BYTES + 8).cast(), Ordering::Acquire) }
    }

    /// The descriptor whose second word has been read.
    #[inline(always)]
    fn load(&self, index: u16, word: u64) -> Descriptor {
        // SAFETY: a position's index is below the size.
        let addr = unsafe { load_u64(self.parts.descriptor.add(usize::from(index) * BYTES).cast(), Ordering::Relaxed) };
        Descriptor::from_words(addr, word)
    }

    #[inline]
    pub fn peek(
        &mut self,
        memory: &GuestMemory,
        cache: &mut RegionCache,
        batch: &mut Batch,
        max: usize,
    ) -> Result<(), RingError> {
        if !self.gap.is_empty() {
            self.close_gap();
        }
        if self.record.as_ref().is_some_and(|record| !record.again.is_empty()) {
            return self.peek_again(memory, cache, batch, max);
        }
        // No more can be outstanding than the ring has, whatever the flags say while we look.
        let mut room = u32::from(self.size).saturating_sub(self.outstanding.max(0) as u32);
        let mut left = max.min(room as usize);
        let mut at = self.next;
        let mut work = 0;
        while left > 0 {
            let run = self.peek_run(memory.window(cache), batch, at, left);
            at.advance(run, self.size);
            room -= u32::from(run);
            left -= usize::from(run);
            if left == 0 {
                break;
            }
            // The ring's end, nothing more, another region, or a list of another shape.
            let word = self.load_word(at.index);
            if (word >> 48) as u16 & (AVAIL | USED) != at.available() {
                break;
            }
            work += self.gather(Gather::new(memory, cache, batch), at, self.load(at.index, word), room)?;
            let slots = batch.chains.last().map_or(1, |chain| chain.slots);
            at.advance(slots, self.size);
            room -= u32::from(slots);
            left = (left - 1).min(room as usize);
            if work >= WORK {
                break;
            }
        }
        Ok(())
    }

    /// Reads up to `max` available lists of one direct descriptor each, in one direction and in one region, up to the
    /// ring's end: what nearly all of them are. Returns how many there were.
    #[inline(always)]
    fn peek_run(&self, window: Window, batch: &mut Batch, at: Position, max: usize) -> u16 {
        let max = max.min(usize::from(self.size - at.index));
        let first = (self.load_word(at.index) >> 48) as u16;
        let expected = u64::from(at.available() | first & WRITE) << 48;
        let mut singles = batch.singles(max, first & WRITE != 0);
        let mut run = 0;
        while usize::from(run) < max {
            let index = at.index + run;
            let word = self.load_word(index);
            if word & u64::from(AVAIL | USED | NEXT | INDIRECT | WRITE) << 48 != expected {
                break;
            }
            if index & 3 == 0 {
                prefetch_read(self.parts.descriptor.wrapping_add((usize::from(index) + AHEAD) * BYTES));
            }
            let descriptor = self.load(index, word);
            let Some(span) = window.span(descriptor.addr, descriptor.len()) else { break };
            // SAFETY: fewer than `max` have been pushed.
            unsafe { singles.push(descriptor.id(), span) };
            run += 1;
        }
        singles.finish();
        run
    }

    /// Chains that an earlier process took, from the copies in the record: the ring may have been overwritten.
    #[cold]
    fn peek_again(
        &self,
        memory: &GuestMemory,
        cache: &mut RegionCache,
        batch: &mut Batch,
        max: usize,
    ) -> Result<(), RingError> {
        for Again { descriptors } in self.record.iter().flat_map(|record| &record.again).take(max) {
            let mut gather = Gather::new(memory, cache, batch);
            let mut id = 0;
            for &descriptor in descriptors {
                let flags = descriptor.packed_flags();
                match flags & INDIRECT {
                    0 => gather.add(descriptor.addr, descriptor.len(), flags & WRITE != 0)?,
                    _ if !self.indirect => return Err(RingError::IndirectNotNegotiated),
                    _ if descriptors.len() > 1 => return Err(RingError::IndirectInChain),
                    _ => gather.add_packed_table(descriptor, self.size.into(), self.read_only)?,
                }
                id = descriptor.id();
            }
            gather.finish(id, descriptors.len() as u16);
        }
        Ok(())
    }

    /// A list of any shape that begins with `descriptor`, in at most `room` descriptors. Returns how many it has.
    #[inline(never)]
    fn gather(
        &self,
        mut gather: Gather,
        mut at: Position,
        mut descriptor: Descriptor,
        room: u32,
    ) -> Result<u32, RingError> {
        if descriptor.packed_flags() & INDIRECT != 0 {
            if !self.indirect {
                return Err(RingError::IndirectNotNegotiated);
            }
            if descriptor.packed_flags() & NEXT != 0 {
                return Err(RingError::IndirectInChain);
            }
            gather.add_packed_table(descriptor, self.size.into(), self.read_only)?;
            return Ok(gather.finish(descriptor.id(), 1));
        }
        // At most 32768, so the count fits.
        for slots in 1..=room as u16 {
            let flags = descriptor.packed_flags();
            // A list is either direct or indirect throughout (2.8.5, 2.8.19).
            if flags & INDIRECT != 0 {
                return Err(RingError::IndirectInChain);
            }
            gather.add(descriptor.addr, descriptor.len(), flags & WRITE != 0)?;
            if flags & NEXT == 0 {
                // The id is in the last descriptor (2.8.6).
                return Ok(gather.finish(descriptor.id(), slots));
            }
            at.advance(1, self.size);
            let word = self.load_word(at.index);
            descriptor = self.load(at.index, word);
            // The first is made available after all others, so they are available too (2.8.6) unless the list has come
            // round to what is outstanding.
            if u32::from(slots) < room && descriptor.packed_flags() & (AVAIL | USED) != at.available() {
                return Err(RingError::NotAvailable { index: at.index });
            }
        }
        Err(RingError::ChainLength { allowed: room })
    }

    #[inline]
    pub fn consume(&mut self, chains: &[Chain]) -> Result<(), RingError> {
        if self.record.is_some() {
            return self.consume_recorded(chains);
        }
        let slots: u32 = chains.iter().map(|chain| u32::from(chain.slots)).sum();
        self.outstanding += slots as i32;
        // `peek` has given no more than fit into the ring.
        self.next.advance(slots as u16, self.size);
        Ok(())
    }

    #[inline(never)]
    fn consume_recorded(&mut self, chains: &[Chain]) -> Result<(), RingError> {
        let Some(mut record) = self.record.take() else { return Ok(()) };
        let result = chains.iter().try_for_each(|chain| {
            // Those that an earlier process took come first; they are in the record and behind `next`.
            if record.again.pop_front().is_some() {
                return Ok(());
            }
            let mut at = self.next;
            let taken = record.take(
                chain,
                (0..chain.slots).map(|_| {
                    let descriptor = self.load(at.index, self.load_word(at.index));
                    at.advance(1, self.size);
                    descriptor
                }),
            );
            self.outstanding += i32::from(chain.slots);
            self.next.advance(chain.slots, self.size);
            taken
        });
        self.record = Some(record);
        result
    }

    #[inline]
    pub fn complete(&mut self, chain: &Chain, written: u32) {
        self.complete_each([(chain, written)].into_iter());
    }

    /// Stages used descriptors. The positions are locals in the loop: the compiler cannot know that the stores to the
    /// ring leave the queue's own fields alone.
    #[inline(always)]
    pub fn complete_each<'a>(&mut self, mut done: impl Iterator<Item = (&'a Chain, u32)>) {
        if self.record.is_some() {
            return self.complete_recorded(done);
        }
        let (mut used, mut staged) = (self.used, self.staged);
        if staged == 0 {
            let Some((chain, written)) = done.next() else { return };
            (self.first, self.first_slots) = (used_word(used, chain, written), chain.slots);
            staged = chain.slots.into();
            used.advance(chain.slots, self.size);
        }
        let (size, ring) = (self.size, self.parts.descriptor);
        for (chain, written) in done {
            if chain.slots > 1 {
                self.mark_rest(used, chain.slots);
            }
            may_die();
            let word = used_word(used, chain, written);
            // SAFETY: a position's index is below the size.
            unsafe { store_u64(ring.add(usize::from(used.index) * BYTES + 8).cast(), word, Ordering::Relaxed) };
            staged += u32::from(chain.slots);
            used.advance(chain.slots, size);
        }
        self.outstanding -= (staged - self.staged) as i32;
        (self.used, self.staged) = (used, staged);
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

    #[inline(always)]
    fn store_word(&self, index: u16, word: u64, order: Ordering) {
        // SAFETY: a position's index is below the size.
        unsafe { store_u64(self.parts.descriptor.add(usize::from(index) * BYTES + 8).cast(), word, order) };
    }

    /// Marks all but the first descriptor of a list used, see [`standing`](super::standing).
    #[inline(always)]
    fn mark_rest(&self, mut at: Position, slots: u16) {
        for left in (0..slots.saturating_sub(1)).rev() {
            at.advance(1, self.size);
            may_die();
            // SAFETY: a position's index is below the size; `flags` are the last two bytes of a descriptor.
            unsafe {
                let flags = self.parts.descriptor.add(usize::from(at.index) * BYTES + 14);
                store_u16(flags.cast(), at.used() | if left > 0 { NEXT } else { 0 }, Ordering::Relaxed);
            }
        }
    }

    #[inline]
    pub fn publish(&mut self) -> bool {
        if self.staged == 0 {
            return false;
        }
        if let Some(record) = &mut self.record {
            record.before_publish(self.used);
        }
        self.mark_rest(self.published, self.first_slots);
        may_die();
        // Release: the other used descriptors, and what was written into the buffers, before the first one's flags.
        self.store_word(self.published.index, self.first, Ordering::Release);
        let (old, slots) = (self.published, self.staged);
        self.published = self.used;
        self.staged = 0;
        if let Some(record) = &mut self.record {
            record.after_publish();
        }
        if let Some(log) = &self.log {
            log.descriptors(old, slots);
        }
        // The descriptors are written before we read what the driver wants (2.8.10, 2.8.22), once for the batch.
        full_fence();
        let told = std::mem::replace(&mut self.told, true);
        // SAFETY: the driver event suppression structure.
        match unsafe { Suppression::load(self.parts.driver) } {
            // Whoever served the ring before us may have published without notifying.
            event @ Suppression::At(_) if self.event_idx => !told || event.wants(old, slots, self.size),
            Suppression::Disable => false,
            _ => true,
        }
    }

    pub fn enable_notifications(&mut self) -> bool {
        let event = if self.event_idx { Suppression::At(self.next) } else { Suppression::Enable };
        self.suppress(event);
        full_fence();
        let flags = (self.load_word(self.next.index) >> 48) as u16;
        flags & (AVAIL | USED) == self.next.available() && self.outstanding < self.size.into()
    }

    pub fn disable_notifications(&mut self) {
        self.suppress(Suppression::Disable);
    }

    /// Says which notifications we want.
    #[inline(always)]
    fn suppress(&self, event: Suppression) {
        // SAFETY: the device event suppression structure.
        unsafe { event.store(self.parts.device) };
        if let Some(log) = &self.log {
            log.device_part(0, 4);
        }
    }
}

/// The second word of the used descriptor for a list.
#[inline(always)]
const fn used_word(at: Position, chain: &Chain, written: u32) -> u64 {
    packed_word(written, chain.id, at.used()) | (WRITE as u64 * (written != 0) as u64) << 48
}

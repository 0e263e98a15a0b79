//! The record of a packed queue (vhost-user, `QueueRegionPacked`).
//!
//! Descriptors are copied into the record as they are taken, into entries from a list of free ones. The list has two
//! heads. `free_head` runs ahead while entries are filled; `old_free_head` follows when a chain is complete, and that
//! store is the one that counts. Giving chains back puts their entries in front of the list and moves `used_idx`; then the
//! first used descriptor's flags change in the ring, which is the store that counts; then the `old_` fields follow. When
//! they have not, the next process looks at the ring: if the descriptor at `old_used_idx` is no longer the available one
//! that was there, the driver has been shown the batch and the new values hold, otherwise the old ones.
//!
//! The used index with its wrap counter, old and new, share a word and are written at once, and so do the free heads: no
//! kill leaves one half of such a pair behind.

use std::collections::VecDeque;

use super::Region;
use crate::descriptor::{Descriptor, Position};
use crate::{Chain, RingError};

/// `free_head` and `old_free_head`.
const FREE_HEADS: usize = 12;
/// `used_idx`, `old_used_idx`, `used_wrap_counter`, `old_used_wrap_counter`.
const USED: usize = 16;
/// In an entry: `inflight`, in a word with padding.
const INFLIGHT: usize = 0;
const NEXT: usize = 2;
const LAST: usize = 4;
const NUM: usize = 6;
const COUNTER: usize = 8;
/// `id`, `flags`, `len` in one word, then `addr`.
const ID: usize = 16;
const ADDR: usize = 24;

/// No entry.
const NONE: u16 = u16::MAX;

/// A chain that an earlier process took.
#[derive(Debug)]
pub(crate) struct Again {
    pub descriptors: Vec<Descriptor>,
}

#[derive(Debug)]
pub(crate) struct PackedRecord {
    region: Region,
    counter: u64,
    /// The entry that follows each in its list, as in the region, which is not read again.
    next: Box<[u16]>,
    /// The last entry of each chain in flight, by its first.
    last: Box<[u16]>,
    free_head: u16,
    used: Position,
    /// The first entry of the chain that has a buffer id.
    entry: Box<[u16]>,
    /// First entries of chains completed and not published.
    staged: Vec<u16>,
    /// Chains that an earlier process took, in the order in which it did, and that have not been taken again.
    pub again: VecDeque<Again>,
}

fn used_word(new: Position, old: Position) -> u64 {
    u64::from(new.index) | u64::from(old.index) << 16 | u64::from(new.wrap) << 32 | u64::from(old.wrap) << 40
}

impl PackedRecord {
    /// Reads what an earlier process left. `used` is where a queue that was never recorded goes on; `still_available`
    /// says whether the descriptor at a position is marked as the driver made it available.
    pub fn attach(
        region: Region,
        used: Position,
        still_available: impl Fn(Position) -> bool,
    ) -> Result<PackedRecord, RingError> {
        let size = region.size;
        let mut record = PackedRecord {
            counter: 0,
            next: (1..=size).collect(),
            last: vec![NONE; size.into()].into(),
            free_head: 0,
            used,
            entry: vec![NONE; 1 << 16].into(),
            staged: Vec::with_capacity(size.into()),
            again: VecDeque::new(),
            region,
        };
        if record.region.is_new()? {
            for index in 0..size {
                let state = record.region.state(index);
                record.region.put_u64(state, u64::from(index + 1) << (8 * NEXT));
            }
            record.region.put_u32(FREE_HEADS, 0);
            record.region.put_u64(USED, used_word(used, used));
            record.region.finish_new();
        } else {
            record.resume(still_available)?;
        }
        Ok(record)
    }

    fn resume(&mut self, still_available: impl Fn(Position) -> bool) -> Result<(), RingError> {
        let size = self.region.size;
        let wrong = |what, found: u16| RingError::InflightRecord { what, found: found.into(), allowed: size.into() };
        let heads = self.region.get_u32(FREE_HEADS);
        let word = self.region.get_u64(USED);
        let new = Position { index: word as u16, wrap: word >> 32 & 0xff != 0 };
        let old = Position { index: (word >> 16) as u16, wrap: word >> 40 & 0xff != 0 };
        for position in [new, old] {
            if position.index >= size {
                return Err(wrong("used index", position.index));
            }
        }
        // Was the batch under way shown to the driver?
        let shown = new != old && !still_available(old);
        (self.free_head, self.used) = if shown { (heads as u16, new) } else { ((heads >> 16) as u16, old) };
        self.commit();

        // What is free is not in flight, whatever its mark says.
        let mut free = vec![false; size.into()];
        let mut index = self.free_head;
        while index != size {
            match free.get_mut(usize::from(index)) {
                Some(free) if !*free => *free = true,
                _ => return Err(wrong("free list", index)),
            }
            let following = self.region.get_u16(self.region.state(index) + NEXT);
            self.next[usize::from(index)] = following;
            self.region.put_u16(self.region.state(index) + INFLIGHT, 0);
            index = following;
        }
        let mut again = Vec::new();
        for head in 0..size {
            let state = self.region.state(head);
            if free[usize::from(head)] || self.region.get_u8(state + INFLIGHT) != 1 {
                continue;
            }
            let mut descriptors = Vec::new();
            let mut at = head;
            for _ in 0..self.region.get_u16(state + NUM) {
                match free.get_mut(usize::from(at)) {
                    Some(listed) if !*listed => *listed = true,
                    _ => return Err(wrong("chain in flight", at)),
                }
                let entry = self.region.state(at);
                let (addr, word) = (self.region.get_u64(entry + ADDR), self.region.get_u64(entry + ID));
                let (id, flags, len) = (word as u16, (word >> 16) as u16, (word >> 32) as u32);
                descriptors.push(Descriptor::packed(addr, len, id, flags));
                self.last[usize::from(head)] = at;
                at = self.region.get_u16(entry + NEXT);
                self.next[usize::from(self.last[usize::from(head)])] = at;
            }
            let Some(tail) = descriptors.last() else { return Err(wrong("length of a chain", 0)) };
            self.entry[usize::from(tail.id())] = head;
            again.push((self.region.get_u64(state + COUNTER), Again { descriptors }));
        }
        again.sort_unstable_by_key(|(counter, _)| *counter);
        self.counter = again.last().map_or(0, |last| last.0.wrapping_add(1));
        self.again = again.into_iter().map(|(_, chain)| chain).collect();
        Ok(())
    }

    /// Where the queue goes on: the used position, and how many descriptors are in flight.
    pub fn position(&self) -> (Position, u32) {
        (self.used, self.again.iter().map(|chain| chain.descriptors.len() as u32).sum())
    }

    /// A chain is taken, whose descriptors are these. Fails if the driver has given its id to another one.
    pub fn take(&mut self, chain: &Chain, descriptors: impl Iterator<Item = Descriptor>) -> Result<(), RingError> {
        let size = self.region.size;
        let head = self.free_head;
        if self.entry[usize::from(chain.id)] != NONE || head == size {
            return Err(RingError::DuplicateId { id: chain.id });
        }
        let state = self.region.state(head);
        self.region.put_u16(state + NUM, 0);
        self.region.put_u64(state + COUNTER, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.region.put_u16(state + INFLIGHT, 1);
        let (mut at, mut last, mut count) = (head, head, 0);
        for descriptor in descriptors {
            // There is an entry for each descriptor of the ring, and no more are ever outstanding.
            if at == size {
                return Err(RingError::DuplicateId { id: chain.id });
            }
            let entry = self.region.state(at);
            count += 1;
            self.region.put_u16(state + NUM, count);
            self.region.put_u64(entry + ADDR, descriptor.addr);
            let word = u64::from(descriptor.id())
                | u64::from(descriptor.packed_flags()) << 16
                | u64::from(descriptor.len()) << 32;
            self.region.put_u64(entry + ID, word);
            (last, at) = (at, self.next[usize::from(at)]);
        }
        self.region.put_u16(state + LAST, last);
        self.last[usize::from(head)] = last;
        self.entry[usize::from(chain.id)] = head;
        self.free_head = at;
        // The store that counts.
        self.region.put_u32(FREE_HEADS, u32::from(at) | u32::from(at) << 16);
        Ok(())
    }

    /// A chain is completed.
    #[inline]
    pub fn stage(&mut self, id: u16) {
        let head = std::mem::replace(&mut self.entry[usize::from(id)], NONE);
        if head != NONE {
            self.staged.push(head);
        }
    }

    /// Before the first used descriptor's flags change; the used position will be `used` then.
    pub fn before_publish(&mut self, used: Position) {
        let old_free_head = self.free_head;
        for &head in &self.staged {
            let last = self.last[usize::from(head)];
            self.next[usize::from(last)] = self.free_head;
            self.region.put_u16(self.region.state(last) + NEXT, self.free_head);
            self.free_head = head;
        }
        self.region.put_u32(FREE_HEADS, u32::from(self.free_head) | u32::from(old_free_head) << 16);
        self.region.put_u64(USED, used_word(used, self.used));
        self.used = used;
    }

    /// After they have changed.
    pub fn after_publish(&mut self) {
        for head in self.staged.drain(..) {
            self.region.put_u16(self.region.state(head) + INFLIGHT, 0);
        }
        self.commit();
    }

    /// The `old_` fields follow.
    fn commit(&self) {
        self.region.put_u32(FREE_HEADS, u32::from(self.free_head) | u32::from(self.free_head) << 16);
        self.region.put_u64(USED, used_word(self.used, self.used));
    }
}

//! A look at a queue for people: how much waits in it, and the descriptors of chains that were only peeked at.
//!
//! What is read here is shown and nothing else. It is read again, after it was checked and used, so a driver that rewrites
//! its descriptors meanwhile deceives the reader, nobody else.

use viaduct_memory::RegionCache;

use super::{DeviceQueue, Ring};
use crate::descriptor::{BYTES, Descriptor, INDIRECT, NEXT};
use crate::{Batch, Chain};

/// Most descriptors of one chain that are shown.
const SHOWN: usize = 64;

/// A descriptor as it stands in the ring or in an indirect table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DescriptorView {
    /// Its place there.
    pub index: u16,
    /// It stands in the indirect table of the one before.
    pub in_table: bool,
    /// Address of the buffer, as the driver knows it.
    pub addr: u64,
    /// Its length in bytes.
    pub len: u32,
    /// NEXT, WRITE, INDIRECT and, in a packed ring, AVAIL and USED (virtio 1.2, 2.7.5 and 2.8.1).
    pub flags: u16,
}

impl DeviceQueue {
    /// Descriptors (packed) or chains (split) that the driver made available and nobody has taken yet. None are seen while
    /// the ring itself must not be touched: it may not even be mapped any more.
    pub fn waiting(&self) -> u32 {
        if !self.may_touch() {
            return 0;
        }
        match &self.ring {
            Ring::Split(ring) => ring.waiting(),
            Ring::Packed(ring) => ring.waiting(),
        }
    }

    /// Peeks for somebody who shows what is there: nothing is asked for, waited for or found broken because of it. Returns how
    /// many chains of `most` were found.
    pub fn look(&mut self, batch: &mut Batch, most: usize) -> usize {
        if self.broken.is_some() {
            return 0;
        }
        let before = batch.chains.len();
        // Who peeks in earnest hears of an error; chains before the bad one are whole.
        let _ = match &mut self.ring {
            Ring::Split(ring) => ring.peek(&self.memory, &mut self.cache, batch, most),
            Ring::Packed(ring) => ring.peek(&self.memory, &mut self.cache, batch, most),
        };
        batch.misses.clear();
        if let Some((chains, spans)) = batch.blocked.take() {
            batch.chains.truncate(chains);
            batch.spans.truncate(spans);
        }
        batch.chains.len() - before
    }

    /// Where in the available ring (split) or the descriptor ring (packed) the chain stands before which the chains of
    /// `before` were peeked at and not consumed.
    pub fn position(&self, before: &[Chain]) -> u16 {
        match &self.ring {
            Ring::Split(ring) => ring.position(before.len() as u16),
            Ring::Packed(ring) => ring.position(before.iter().map(|chain| u32::from(chain.slots)).sum()),
        }
    }

    /// The descriptors of a chain that was peeked at behind those of `before`.
    pub fn descriptors(&self, before: &[Chain], chain: &Chain) -> Vec<DescriptorView> {
        let mut found = Vec::new();
        if !self.may_touch() {
            return found;
        }
        match &self.ring {
            Ring::Split(ring) => {
                let mut index = chain.id;
                while found.len() < SHOWN && u32::from(index) < self.config.size {
                    let descriptor = ring.descriptor(index);
                    self.show(&mut found, index, descriptor, descriptor.split_flags());
                    if descriptor.split_flags() & NEXT == 0 {
                        break;
                    }
                    index = descriptor.next();
                }
            }
            Ring::Packed(ring) => {
                let first = u32::from(self.position(before));
                for slot in 0..u32::from(chain.slots.max(1)).min(SHOWN as u32) {
                    let index = ((first + slot) % self.config.size) as u16;
                    let descriptor = ring.descriptor(index);
                    self.show(&mut found, index, descriptor, descriptor.packed_flags());
                }
            }
        }
        found
    }

    /// Appends a descriptor, and those of its indirect table (2.7.5.3 and 2.8.7).
    fn show(&self, found: &mut Vec<DescriptorView>, index: u16, descriptor: Descriptor, flags: u16) {
        let (addr, len) = (descriptor.addr, descriptor.len());
        found.push(DescriptorView { index, in_table: false, addr, len, flags });
        if flags & INDIRECT == 0 {
            return;
        }
        let Some(table) = self.memory.translate(&mut RegionCache::default(), addr, len) else { return };
        for entry in 0..(len as usize / BYTES).min(SHOWN) {
            let mut words = [0; BYTES];
            // SAFETY: this queue holds the memory, and the entry lies in the span.
            unsafe { table.read((entry * BYTES) as u32, &mut words) };
            let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| words[at + byte]));
            let descriptor = Descriptor::from_words(word(0), word(8));
            let flags = match &self.ring {
                Ring::Split(_) => descriptor.split_flags(),
                Ring::Packed(_) => descriptor.packed_flags(),
            };
            let (addr, len) = (descriptor.addr, descriptor.len());
            found.push(DescriptorView { index: entry as u16, in_table: true, addr, len, flags });
        }
    }
}

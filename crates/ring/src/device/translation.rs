//! A queue behind an IOMMU (vhost-user, "IOMMU support"): what it does while a translation is missing or taken away.
//!
//! A queue *waits* in two ways. If its next chain cannot be translated, nothing is peeked until that was answered for. If the
//! ring itself was invalidated, its parts must not be touched at all until they are found again; positions stay as they are.
//! Those of a queue that is broken are not looked for.
//! Neither is an error, and the owner is not told: it sees a queue without chains. Whoever changes translations tells the
//! queue, under the lock under which it is used.

use viaduct_memory::iotlb::Miss;

use super::{DeviceQueue, Waiting};
use crate::layout::{Parts, RingLayout};
use crate::{Batch, RingError};

impl DeviceQueue {
    /// Whether the queue waits for a translation.
    #[inline]
    pub fn is_waiting(&self) -> bool {
        matches!(self.waiting, Waiting::Chain(_) | Waiting::Ring)
    }

    /// Whether the ring is where it was found.
    #[inline]
    pub(super) fn may_touch(&self) -> bool {
        !matches!(self.waiting, Waiting::Ring | Waiting::Gone)
    }

    /// The first peek after a refusal: the chain that needed it is refused.
    #[cold]
    pub(super) fn peek_refused(&mut self, miss: Miss, batch: &mut Batch, max: usize) -> Result<usize, RingError> {
        (self.waiting, self.broken) = (Waiting::No, None);
        self.cache.set_refused(Some(miss));
        let found = self.peek(batch, max);
        self.cache.set_refused(None);
        found
    }

    /// Takes off the batch what blocks, asks for the translations, and waits for them if there is nothing before it. Returns
    /// how many chains there are.
    #[cold]
    pub(super) fn wait_for(&mut self, batch: &mut Batch, before: usize) -> usize {
        if let Some((chains, spans)) = batch.blocked.take() {
            batch.chains.truncate(chains);
            batch.spans.truncate(spans);
        }
        let found = batch.chains.len() - before;
        if found == 0
            && let Some(&miss) = batch.misses.first()
        {
            self.wait(Waiting::Chain(miss), miss.iova);
        }
        if let Some(iotlb) = self.memory.iotlb() {
            for &miss in &batch.misses {
                iotlb.request(miss);
            }
        }
        batch.misses.clear();
        found
    }

    /// Waits no longer for the translation that the next chain needs, as if the front-end had refused it. Returns whether the
    /// queue waited for one; a ring that must not be touched has to be waited for.
    pub fn give_up_chain(&mut self) -> bool {
        let Waiting::Chain(miss) = self.waiting else { return false };
        self.waiting = Waiting::Refused(miss);
        true
    }

    pub(super) fn wait(&mut self, what: Waiting, addr: u64) {
        self.waiting = what;
        self.broken = Some(RingError::Untranslated { addr });
    }

    /// The front-end has answered for something. Returns whether a queue that waited goes on.
    pub fn translations_changed(&mut self) -> bool {
        match self.waiting {
            Waiting::No | Waiting::Refused(_) | Waiting::Gone => return false,
            Waiting::Chain(miss) => {
                let Some(iotlb) = self.memory.iotlb() else { return false };
                if iotlb.is_waiting(miss) {
                    return false;
                }
                if iotlb.is_refused(miss) {
                    self.waiting = Waiting::Refused(miss);
                    return true;
                }
            }
            Waiting::Ring => match Parts::locate(&self.memory, &self.config) {
                Ok((parts, held)) => self.relocate(parts, held),
                Err(RingError::Untranslated { .. } | RingError::Forbidden { .. }) => return false,
                Err(error) => {
                    (self.waiting, self.broken) = (Waiting::Gone, Some(error));
                    return true;
                }
            },
        }
        (self.waiting, self.broken) = (Waiting::No, None);
        true
    }

    /// What was known of the I/O virtual addresses from `first` to `last` does not hold any more. Spans from earlier batches
    /// must not be used again. A queue whose ring lies there waits until it is found anew, which is asked for at once.
    pub fn translations_removed(&mut self, first: u64, last: u64) {
        let Some(addr) = self.ring_inside(first, last) else { return };
        if self.broken().is_some() {
            self.waiting = Waiting::Gone;
        } else if self.may_touch() {
            self.wait(Waiting::Ring, addr);
            self.translations_changed();
        }
    }

    /// The address of a part of the ring that has a byte in this range.
    fn ring_inside(&self, first: u64, last: u64) -> Option<u64> {
        let config = &self.config;
        let layout = RingLayout::new(config.layout, config.size, config.event_idx).ok()?;
        let parts = [
            (config.descriptor_addr, layout.descriptor.size),
            (config.driver_addr, layout.driver.size),
            (config.device_addr, layout.device.size),
        ];
        parts.into_iter().find_map(|(addr, size)| (addr <= last && first <= addr + (size - 1)).then_some(addr))
    }
}

//! The guest's transmit queue.

use std::os::fd::OwnedFd;

use viaduct_memory::{Call, GuestMemory, access};
use viaduct_ring::{Batch, Chain, DeviceQueue};

use super::{VhostQueue, Vring, wrong_direction};

/// The guest transmits, we receive.
#[derive(Debug)]
pub(crate) struct VhostInput {
    ring: Vring,
    pub kick: Option<OwnedFd>,
}

impl VhostInput {
    pub fn new(start: VhostQueue) -> VhostInput {
        let VhostQueue { queue, kick, call, enabled, header_len, .. } = start;
        let mut ring = Vring { queue, call, header_len, enabled };
        ring.queue.set_read_only();
        ring.queue.disable_notifications();
        ring.begin();
        VhostInput { ring, kick }
    }

    pub fn queue(&mut self) -> &mut DeviceQueue {
        &mut self.ring.queue
    }

    pub fn memory(&self) -> &GuestMemory {
        self.ring.queue.memory()
    }

    pub fn faulted(&self) -> bool {
        self.ring.queue.faulted()
    }

    pub fn set_call(&mut self, call: Option<Call>) {
        self.ring.call = call;
    }

    pub fn set_enabled(&mut self, enabled: bool) {
        self.ring.enabled = enabled;
    }

    /// Frames of a disabled queue are to be taken and discarded.
    pub fn is_enabled(&self) -> bool {
        self.ring.enabled
    }

    pub fn header_len(&self) -> u32 {
        self.ring.header_len
    }

    /// Appends up to `max` transmitted frames to the batch. The error says what the driver did wrong.
    #[inline(always)]
    pub fn receive(&mut self, batch: &mut Batch, max: usize) -> Result<usize, String> {
        let count = self.ring.queue.peek(batch, max).map_err(|error| error.to_string())?;
        for chain in &batch.chains {
            if chain.writable != 0 || chain.readable == 0 {
                if chain.is_refused() {
                    continue;
                }
                return Err(wrong_direction(chain, "transmit", "device-writable"));
            }
            let start = batch.spans[chain.first as usize].as_ptr();
            access::prefetch_read(start);
            access::prefetch_read(start.wrapping_add(64));
        }
        Ok(count)
    }

    /// Gives the first frames of the batch back to the driver. Returns whether it was notified.
    #[inline(always)]
    pub fn release(&mut self, chains: &[Chain]) -> bool {
        self.ring.queue.consume(chains);
        self.ring.queue.complete_all(chains);
        self.ring.publish()
    }

    /// Asks for notifications. Returns whether there are frames already, or nothing to be notified by.
    pub fn arm(&mut self) -> bool {
        if self.ring.queue.is_waiting() {
            // Whoever brings the translation wakes the poller.
            return false;
        }
        if self.kick.is_none() {
            return true;
        }
        let pending = self.ring.queue.enable_notifications();
        if pending {
            self.disarm();
        }
        pending
    }

    /// Asks for no notifications: the queue is polled again.
    pub fn disarm(&mut self) {
        self.ring.queue.disable_notifications();
    }
}

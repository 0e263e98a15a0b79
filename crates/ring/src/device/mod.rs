//! The device side of a virtqueue, either layout.
//!
//! # Theory of operation
//!
//! A device works in batches: [`peek`](DeviceQueue::peek) reads what the driver made available,
//! [`consume`](DeviceQueue::consume) takes as much of it as there is room for elsewhere,
//! [`complete`](DeviceQueue::complete) stages what goes back, [`publish`](DeviceQueue::publish) shows it to the driver
//! and says whether to notify. Peeking and taking are apart because a switch learns only from a packet where it has to
//! go, and the destination may be full.
//!
//! Everything in the ring is hostile. Each field is read once into a local, checked, and then used, and a ring that
//! breaks a rule is broken until it is started anew: the positions in it cannot be trusted any more.
//!
//! The layout is looked at once for a batch, except by `complete`, where the branch never changes.

mod gather;
mod inspect;
#[cfg(test)]
mod killed;
mod log;
mod packed;
mod split;
mod standing;
mod translation;

use std::sync::Arc;

use viaduct_memory::iotlb::Miss;
use viaduct_memory::{GuestMemory, Mapping, RegionCache, RingPart};

use crate::inflight::Region;
use crate::layout::{Layout, Parts, QueueConfig};
use crate::{Batch, Chain, RingError};
pub use inspect::DescriptorView;
use log::RingLog;
use packed::Packed;
use split::Split;

/// Descriptors that one [`peek`](DeviceQueue::peek) follows in chains of more than one before it stops early, so that a
/// driver cannot hold up the other queues of a poller, or fill its memory, with many chains of many descriptors.
const WORK: u32 = 4096;

#[derive(Debug)]
enum Ring {
    Split(Split),
    Packed(Packed),
}

/// Calls the same method of either ring.
macro_rules! either {
    ($queue:expr, $ring:ident => $call:expr) => {
        match &mut $queue.ring {
            Ring::Split($ring) => $call,
            Ring::Packed($ring) => $call,
        }
    };
}

/// The device side of one virtqueue.
#[derive(Debug)]
pub struct DeviceQueue {
    ring: Ring,
    cache: RegionCache,
    /// Also what it waits for, behind an IOMMU: [`RingError::Untranslated`].
    broken: Option<RingError>,
    waiting: Waiting,
    // The ring's parts point into it: it lives as long as they do.
    memory: GuestMemory,
    held: [RingPart; 3],
    config: QueueConfig,
    /// Where writes to the device part are logged.
    log_addr: Option<u64>,
}

/// Which translation a queue waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waiting {
    No,
    /// The first that the next chain needs.
    Chain(Miss),
    /// For none any more: the front-end has refused it.
    Refused(Miss),
    /// Those of the ring, which must not be touched.
    Ring,
    /// For none, with a ring that must not be touched: the queue is broken anyway.
    Gone,
}

impl DeviceQueue {
    /// Starts a queue. Checks size, alignment and that all three parts lie in `memory`. Behind an IOMMU their translations
    /// have to be there; those that are not are asked for.
    ///
    /// A split queue takes the index of the used ring from the ring itself. A packed one goes by the base unless the ring
    /// shows that it cannot be right: a front-end that lost its back-end may not know the position any more.
    ///
    /// # Errors
    /// [`RingError::Size`], [`RingError::Alignment`], [`RingError::Unmapped`], [`RingError::Base`],
    /// [`RingError::Forbidden`], and [`RingError::Untranslated`], which passes.
    pub fn new(memory: GuestMemory, config: &QueueConfig) -> Result<DeviceQueue, RingError> {
        DeviceQueue::start(memory, config, false)
    }

    /// Starts a queue whose base was told by whoever served it until now ([`leave`](DeviceQueue::leave)), and not by a
    /// front-end: it is right, whatever the ring looks like.
    ///
    /// # Errors
    /// As for [`new`](DeviceQueue::new).
    pub fn resume(memory: GuestMemory, config: &QueueConfig) -> Result<DeviceQueue, RingError> {
        DeviceQueue::start(memory, config, true)
    }

    fn start(memory: GuestMemory, config: &QueueConfig, certain: bool) -> Result<DeviceQueue, RingError> {
        let (parts, held) = Parts::locate(&memory, config)?;
        let ring = match config.layout {
            Layout::Split => Ring::Split(Split::new(parts, config)),
            Layout::Packed => Ring::Packed(Packed::new(parts, config, certain)?),
        };
        let (cache, waiting) = (RegionCache::default(), Waiting::No);
        let mut queue =
            DeviceQueue { ring, cache, broken: None, waiting, memory, held, config: *config, log_addr: None };
        queue.find_log();
        Ok(queue)
    }

    /// Says that the device never writes to this queue's buffers, as those of a network device's transmit queue: then the
    /// WRITE flags in the indirect tables of a packed queue are ignored.
    ///
    /// DPDK's virtio driver (22.11, and newer ones that were looked at) initializes the tables of its packed transmit queues
    /// with that flag in every element and leaves it in the first, against virtio 1.2, 2.8.7. Back-ends that only read never
    /// noticed.
    pub fn set_read_only(&mut self) {
        if let Ring::Packed(ring) = &mut self.ring {
            ring.read_only = true;
        }
    }

    /// Goes on with a new memory table; the ring's parts are found anew. Spans from earlier batches belong to the old
    /// table: whoever still holds some keeps that one alive.
    ///
    /// # Errors
    /// If the ring does not lie in the new memory, the queue is broken and says why; it keeps the old memory.
    pub fn set_memory(&mut self, memory: GuestMemory) -> Result<(), RingError> {
        match Parts::locate(&memory, &self.config) {
            Ok((parts, held)) => {
                self.cache = RegionCache::default();
                self.memory = memory;
                self.relocate(parts, held);
                match self.waiting {
                    Waiting::Ring => (self.waiting, self.broken) = (Waiting::No, None),
                    Waiting::Gone => self.waiting = Waiting::No,
                    _ => {}
                }
                Ok(())
            }
            Err(RingError::Untranslated { addr }) if self.broken().is_none() => {
                self.memory = memory;
                self.wait(Waiting::Ring, addr);
                Ok(())
            }
            Err(error) => {
                (self.waiting, self.broken) = (Waiting::Gone, Some(error.clone()));
                Err(error)
            }
        }
    }

    fn relocate(&mut self, parts: Parts, held: [RingPart; 3]) {
        either!(self, ring => ring.relocate(parts));
        self.held = held;
        self.find_log();
    }

    /// Says where writes to the device part are logged while the memory has a log: as if its first byte lay at this
    /// address (vhost-user, VHOST_VRING_F_LOG in "A vring address description"). `None`: they are not.
    pub fn set_log_addr(&mut self, addr: Option<u64>) {
        self.log_addr = addr;
        self.find_log();
    }

    fn find_log(&mut self) {
        let log = RingLog::attach(&self.memory, &self.held, &self.config, self.log_addr);
        either!(self, ring => ring.log = log);
    }

    /// Records chains in flight in memory that the front-end keeps (vhost-user, "Inflight I/O tracking"): this queue's part
    /// of it begins at `offset` of `mapping` and has [`inflight_bytes`](crate::inflight_bytes) bytes, all zero at first.
    /// Chains that an earlier process took and did not give back are delivered again, before all others; returns how many
    /// there are. Where the record is not new it also says where the queue goes on, instead of the base.
    ///
    /// Call it right after [`new`](DeviceQueue::new). From then on chains are consumed before they are completed.
    ///
    /// # Errors
    /// [`RingError::InflightRange`], [`RingError::InflightVersion`], [`RingError::InflightRecord`]: nothing is attached.
    pub fn attach_inflight(&mut self, mapping: Arc<Mapping>, offset: u64) -> Result<usize, RingError> {
        // The size was checked to be at most 32768.
        let region = Region::new(mapping, offset, self.config.layout, self.config.size as u16)?;
        let again = either!(self, ring => ring.attach(region))?;
        // Taking up what is in flight may have changed descriptors.
        self.set_log_addr(self.log_addr);
        Ok(again)
    }

    /// Whether chains in flight are recorded.
    #[inline]
    pub fn is_recorded(&self) -> bool {
        match &self.ring {
            Ring::Split(ring) => ring.is_recorded(),
            Ring::Packed(ring) => ring.is_recorded(),
        }
    }

    /// The memory in which the queue lives.
    #[inline]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Whether the file behind its memory, or behind the ring where that is mapped once more, was cut.
    pub fn faulted(&self) -> bool {
        self.memory.faulted() || self.held.iter().any(RingPart::faulted)
    }

    /// How the queue was started.
    pub fn config(&self) -> &QueueConfig {
        &self.config
    }

    /// Why the queue is broken, if it is.
    pub fn broken(&self) -> Option<&RingError> {
        self.broken.as_ref().filter(|_| matches!(self.waiting, Waiting::No | Waiting::Gone))
    }

    /// Appends up to `max` available chains to `batch`, from the first one not yet consumed, and takes none of them.
    /// Returns how many. Descriptors are read once and checked; spans are translated. A queue that
    /// [waits](DeviceQueue::is_waiting) gives none.
    ///
    /// # Errors
    /// Any of [`RingError`] that is about chains. An error breaks the queue for good. Chains before the bad one are
    /// returned first: the error comes with the next call, and with every one after that.
    #[inline]
    pub fn peek(&mut self, batch: &mut Batch, max: usize) -> Result<usize, RingError> {
        if let Some(error) = &self.broken {
            return match self.waiting {
                Waiting::No | Waiting::Gone => Err(error.clone()),
                Waiting::Refused(miss) => self.peek_refused(miss, batch, max),
                _ => Ok(0),
            };
        }
        let before = batch.chains.len();
        let result = either!(self, ring => ring.peek(&self.memory, &mut self.cache, batch, max));
        if batch.blocked.is_some() {
            return Ok(self.wait_for(batch, before));
        }
        let found = batch.chains.len() - before;
        match result {
            Ok(()) => Ok(found),
            Err(error) => self.break_with(error, batch, found),
        }
    }

    #[cold]
    fn break_with(&mut self, error: RingError, batch: &mut Batch, found: usize) -> Result<usize, RingError> {
        // The bad chain may have left spans behind.
        let good = batch.chains.iter().rev().find(|chain| !chain.is_refused());
        let spans =
            good.map_or(0, |chain| chain.first as usize + usize::from(chain.readable) + usize::from(chain.writable));
        batch.spans.truncate(spans);
        batch.misses.clear();
        self.broken = Some(error.clone());
        if found > 0 { Ok(found) } else { Err(error) }
    }

    /// Takes the first chains that the last [`peek`](DeviceQueue::peek) returned, which must be `chains`.
    #[inline]
    pub fn consume(&mut self, chains: &[Chain]) {
        if let Err(error) = either!(self, ring => ring.consume(chains)) {
            self.broken = Some(error);
        }
    }

    /// Stages a used element: `written` bytes went into the writable spans. Chains may be completed in any order unless
    /// IN_ORDER was negotiated. Nothing is visible to the driver before [`publish`](DeviceQueue::publish).
    ///
    /// Each consumed chain is completed exactly once; one that was only peeked at may be, if it is consumed before the
    /// next [`peek`](DeviceQueue::peek).
    #[inline]
    pub fn complete(&mut self, chain: &Chain, written: u32) {
        either!(self, ring => ring.complete(chain, written));
    }

    /// Stages `chains` with nothing written: a transmit batch.
    #[inline]
    pub fn complete_all(&mut self, chains: &[Chain]) {
        either!(self, ring => ring.complete_each(chains.iter().map(|chain| (chain, 0))));
    }

    /// Stages `chains` with the bytes written into each: a receive batch. Pairs up until the shorter one ends.
    #[inline]
    pub fn complete_written(&mut self, chains: &[Chain], written: &[u32]) {
        either!(self, ring => ring.complete_each(chains.iter().zip(written.iter().copied())));
    }

    /// Makes the staged elements visible, in one go. Returns whether the driver wants to be notified. While the ring must
    /// not be touched they stay staged.
    #[inline]
    pub fn publish(&mut self) -> bool {
        self.may_touch() && either!(self, ring => ring.publish())
    }

    /// Asks the driver for notifications (kicks). Returns whether chains are available already: then one must look
    /// again before sleeping (virtio 1.2, 2.7.13.4.1 and 2.8.21.3.1).
    #[inline]
    pub fn enable_notifications(&mut self) -> bool {
        !self.is_waiting() && self.may_touch() && either!(self, ring => ring.enable_notifications())
    }

    /// Asks the driver not to notify: we poll.
    #[inline]
    pub fn disable_notifications(&mut self) {
        if !self.is_waiting() && self.may_touch() {
            either!(self, ring => ring.disable_notifications());
        }
    }

    /// Where the queue stands, as in GET_VRING_BASE (encoding as in [`QueueConfig::base`]).
    pub fn base(&self) -> u32 {
        match &self.ring {
            Ring::Split(ring) => ring.base(),
            Ring::Packed(ring) => ring.base(),
        }
    }

    /// The same for somebody who goes on there. Buffers that an earlier device left unused behind that place go back to the
    /// driver first, because the base does not tell of them.
    pub fn leave(&mut self) -> u32 {
        self.close_gap();
        self.base()
    }

    /// Gives back at once what an earlier device left unused when it was killed in the middle of a batch; else the first
    /// [`peek`](DeviceQueue::peek) does that. Returns whether there was something, and the driver is to be notified: it may
    /// have given all its buffers, and have nothing to do until it gets some back.
    pub fn close_gap(&mut self) -> bool {
        let may_touch = self.may_touch();
        match &mut self.ring {
            Ring::Packed(ring) if may_touch => ring.close_gap(),
            _ => false,
        }
    }
}

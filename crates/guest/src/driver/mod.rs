//! A virtio-net driver (virtio 1.2, 5.1) over the driver side of virtqueues, in memory shared with the back-end.
//!
//! # Theory of operation
//!
//! Negotiation is over when this begins: it gets the memory, the queues' places and eventfds, and the features. Each
//! queue has as many buffers as descriptors, at fixed places behind the rings. Receive buffers are posted at once and
//! again as soon as their frame is read; transmit buffers are filled, published in batches and found again by looking
//! into the ring when more are needed, so transmitting needs no interrupt.
//!
//! The back-end may be as hostile as a guest is to it. The rings check what they are told ([`DriverQueue`]); here a length,
//! a header or an offload that was not negotiated makes a frame count as a violation and disappear. Frames are copied out
//! of shared memory before anyone interprets them.

mod link;
mod plan;
mod receive;
mod transmit;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use viaduct_memory::{GuestMemory, RegionCache};
use viaduct_ring::{DriverQueue, QueueConfig, RingError};
use vmm_sys_util::eventfd::EventFd;

use crate::features;
use crate::link::LinkCounters;
pub use link::DriverLink;
use plan::Area;
pub use plan::{BufferPlan, HEADER as HEADER_LEN, required_memory};
pub use receive::{Frame, ReceiveQueue};
pub use transmit::{Offload, TransmitQueue};

/// One virtqueue as the front-end has set it up.
#[derive(Debug)]
pub struct QueueSetup {
    /// Its place and layout.
    pub config: QueueConfig,
    /// Written to when the device has to look.
    pub kick: OwnedFd,
    /// Written by the device when the driver has to look.
    pub call: OwnedFd,
}

/// What the driver needs to know.
#[derive(Debug)]
pub struct DriverConfig {
    /// Shared with the back-end.
    pub memory: GuestMemory,
    /// Guest-physical address behind the rings, where buffers begin.
    pub data_addr: u64,
    /// Guest-physical address where the memory ends.
    pub data_end: u64,
    /// Negotiated features.
    pub features: u64,
    /// Largest IP packet to send, and to receive unless it is segmented.
    pub mtu: usize,
    /// Receive and transmit queues in turn: an even number.
    pub queues: Vec<QueueSetup>,
}

/// Why the driver cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DriverError {
    /// The back-end is a legacy device.
    #[error("VIRTIO_F_VERSION_1 was not negotiated; legacy devices are not driven (virtio 1.2, 6.1)")]
    Legacy,
    /// Queues do not come in pairs.
    #[error("{0} queues are not pairs of a receive and a transmit queue (virtio 1.2, 5.1.2)")]
    Pairs(usize),
    /// The buffers do not fit.
    #[error("buffers end at {needed:#x}, the memory at {available:#x}; give it more memory, or smaller queues or MTU")]
    Memory {
        /// Where they would end.
        needed: u64,
        /// Where the memory ends.
        available: u64,
    },
    /// A ring cannot be used.
    #[error("queue {index}: {source}")]
    Ring {
        /// Which queue.
        index: usize,
        /// What is wrong with it.
        source: RingError,
    },
}

/// A receive and a transmit queue.
pub struct Pair {
    /// Frames from the device.
    pub receive: ReceiveQueue,
    /// Frames to the device.
    pub transmit: TransmitQueue,
}

/// The driver of one network device.
pub struct NetDriver {
    /// The queue pairs.
    pub pairs: Vec<Pair>,
    features: u64,
    mtu: usize,
    memory: GuestMemory,
    counters: Arc<LinkCounters>,
    fds: Vec<std::os::fd::RawFd>,
    broken: Option<String>,
}

impl NetDriver {
    /// Takes the queues over and posts all receive buffers.
    ///
    /// # Errors
    /// [`DriverError`].
    pub fn new(config: DriverConfig, counters: Arc<LinkCounters>) -> Result<NetDriver, DriverError> {
        let DriverConfig { memory, data_addr, data_end, features, mtu, queues } = config;
        if features & features::VERSION_1 == 0 {
            return Err(DriverError::Legacy);
        }
        if queues.is_empty() || queues.len() % 2 != 0 {
            return Err(DriverError::Pairs(queues.len()));
        }
        let sizes: Vec<u32> = queues.iter().map(|queue| queue.config.size).collect();
        let plan = BufferPlan::new(features, mtu);
        let (areas, needed) = plan.place(data_addr, &sizes);
        if needed > data_end {
            return Err(DriverError::Memory { needed, available: data_end });
        }
        let mut started = Vec::new();
        for (index, (setup, area)) in queues.into_iter().zip(areas).enumerate() {
            let ring = |source| DriverError::Ring { index, source };
            let mut queue = DriverQueue::new(memory.clone(), &setup.config).map_err(ring)?;
            if let Some((addr, len)) = area.tables {
                queue.set_indirect_area(addr, len).map_err(ring)?;
            }
            let outside = DriverError::Memory { needed, available: data_end };
            let base = memory.translate(&mut RegionCache::default(), area.start, area.len()).ok_or(outside)?;
            started.push(Queue { queue, area, base, kick: event(setup.kick), call: event(setup.call) });
        }
        let mut pairs = Vec::new();
        let mut started = started.into_iter();
        while let (Some(receive), Some(transmit)) = (started.next(), started.next()) {
            pairs.push(Pair {
                receive: ReceiveQueue::new(receive, features, counters.clone()),
                transmit: TransmitQueue::new(transmit, counters.clone()),
            });
        }
        let mut fds: Vec<_> = pairs.iter().map(|pair| pair.receive.call_fd()).collect();
        fds.extend(pairs.iter().map(|pair| pair.transmit.call_fd()));
        let mut driver = NetDriver { pairs, features, mtu, memory, counters, fds, broken: None };
        for pair in &mut driver.pairs {
            pair.receive.post_all();
            pair.transmit.be_quiet();
        }
        Ok(driver)
    }

    /// Counts of this device.
    pub fn counters(&self) -> &Arc<LinkCounters> {
        &self.counters
    }

    /// What becomes readable when the device has done something, as far as it was asked to tell.
    pub fn call_fds(&self) -> &[std::os::fd::RawFd] {
        &self.fds
    }

    /// Whether the memory's file was cut short under us.
    pub fn faulted(&self) -> bool {
        self.memory.faulted()
    }
}

/// A queue and its buffers.
struct Queue {
    queue: DriverQueue,
    area: Area,
    /// The area in this process.
    base: viaduct_memory::Span,
    kick: EventFd,
    call: EventFd,
}

impl Queue {
    /// Shows the device what was added, and kicks it if it wants that.
    #[inline]
    fn publish(&mut self, counters: &LinkCounters) {
        if self.queue.publish() {
            LinkCounters::add(&counters.kicks, 1);
            // It fails only when it is readable anyway.
            let _ = self.kick.write(1);
        }
    }

    /// Buffer `index` in this process.
    #[inline]
    fn span(&self, index: usize) -> viaduct_memory::Span {
        debug_assert!(index < self.area.count as usize);
        let offset = index * self.area.stride as usize;
        // SAFETY: buffers lie in the area, which was translated as a whole.
        let ptr = unsafe { std::ptr::NonNull::new_unchecked(self.base.as_ptr().add(offset)) };
        viaduct_memory::Span::new(ptr, self.area.size)
    }

    /// Guest-physical address of buffer `index`.
    #[inline]
    fn addr(&self, index: usize) -> u64 {
        self.area.start + index as u64 * u64::from(self.area.stride)
    }
}

fn event(fd: OwnedFd) -> EventFd {
    use std::os::fd::{FromRawFd, IntoRawFd};
    // SAFETY: we own the descriptor, and hand it over.
    unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) }
}

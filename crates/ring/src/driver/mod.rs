//! The driver side of a virtqueue, either layout.
//!
//! # Theory of operation
//!
//! [`add`](DriverQueue::add) writes a buffer's descriptors and stages it, [`publish`](DriverQueue::publish) shows all that
//! is staged to the device and says whether to kick it, [`take`](DriverQueue::take) gives back the tokens of buffers that
//! the device has used. Buffers are named by guest-physical addresses, which go into descriptors as they are: the queue
//! never looks into a buffer.
//!
//! The device may be as hostile as a guest. Nothing that was written into shared memory is read back, a used element is
//! checked against what the driver itself remembers, and a device that breaks a rule breaks the queue for good.

mod fifo;
mod held;
mod packed;
mod segments;
mod split;
mod tables;

use viaduct_memory::{GuestMemory, RingPart};

use crate::RingError;
use crate::descriptor::WRITE;
use crate::layout::{Layout, Parts, QueueConfig};
use packed::Packed;
pub use segments::Segment;
use segments::Segments;
use split::Split;
use tables::Tables;

#[derive(Debug)]
enum Ring {
    Split(Split),
    Packed(Packed),
}

/// Calls the same method of either ring.
macro_rules! either {
    ($queue:expr, $ring:ident => $call:expr) => {
        match $queue {
            Ring::Split($ring) => $call,
            Ring::Packed($ring) => $call,
        }
    };
}

/// The driver side of one virtqueue.
#[derive(Debug)]
pub struct DriverQueue {
    ring: Ring,
    tables: Option<Tables>,
    broken: Option<RingError>,
    size: u32,
    // The ring's parts point into these: they live as long as it.
    memory: GuestMemory,
    _held: [RingPart; 3],
}

impl DriverQueue {
    /// Starts a queue with nothing outstanding: the ring's parts are initialized. The device has to be started after
    /// this, from the same [`QueueConfig::base`].
    ///
    /// # Errors
    /// [`RingError::Size`], [`RingError::Alignment`], [`RingError::Unmapped`], [`RingError::Base`].
    pub fn new(memory: GuestMemory, config: &QueueConfig) -> Result<DriverQueue, RingError> {
        let (parts, held) = Parts::locate(&memory, config)?;
        let ring = match config.layout {
            Layout::Split => Ring::Split(Split::new(parts, config)),
            Layout::Packed => Ring::Packed(Packed::new(parts, config)?),
        };
        Ok(DriverQueue { ring, tables: None, broken: None, size: config.size, memory, _held: held })
    }

    /// Lets buffers of more than one element use indirect tables (VIRTIO_F_INDIRECT_DESC was negotiated), which are kept
    /// in `len` bytes at guest-physical `addr`: one for each descriptor of the queue, of `len / 16 / size` descriptors.
    /// Call it before buffers are added.
    ///
    /// # Errors
    /// [`RingError::IndirectAddress`] if the area is not in one region, [`RingError::Alignment`] if it is not on a
    /// multiple of 16.
    pub fn set_indirect_area(&mut self, addr: u64, len: u32) -> Result<(), RingError> {
        // The size was checked to be at most 32768.
        self.tables = Some(Tables::new(&self.memory, addr, len, self.size as u16)?);
        Ok(())
    }

    /// The memory in which the queue lives.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Number of descriptors.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// Descriptors that the device does not hold.
    pub fn free(&self) -> usize {
        either!(&self.ring, ring => ring.free())
    }

    /// Stages a buffer: elements the device reads, then elements it writes. Returns whether there was room.
    ///
    /// Several elements go into an indirect table if there are tables and they fit, otherwise into a chain.
    ///
    /// # Errors
    /// [`RingError::Segments`] if there are none, or more than could ever fit; [`RingError::TotalLength`] if their bytes
    /// do not fit into 32 bits. The queue stays as it was.
    #[inline]
    pub fn add(&mut self, out: &[Segment], input: &[Segment], token: u64) -> Result<bool, RingError> {
        match (out, input) {
            (&[(addr, len)], []) => Ok(self.add_single(addr, len, false, token)),
            ([], &[(addr, len)]) => Ok(self.add_single(addr, len, true, token)),
            _ => self.add_segments(Segments { out, input }, token),
        }
    }

    /// Stages a buffer of one element, which the device reads, or `write`s. Returns whether there was room.
    #[inline]
    pub fn add_single(&mut self, addr: u64, len: u32, write: bool, token: u64) -> bool {
        let write = if write { WRITE } else { 0 };
        either!(&mut self.ring, ring => ring.add_single(addr, len, write, token))
    }

    fn add_segments(&mut self, segments: Segments, token: u64) -> Result<bool, RingError> {
        let count = segments.len();
        let room = segments.room()?;
        match &self.tables {
            Some(tables) if count > 0 && count <= tables.entries().into() => {
                Ok(either!(&mut self.ring, ring => ring.add_indirect(tables, segments, room, token)))
            }
            _ if count == 0 || count > self.size as usize => {
                Err(RingError::Segments { found: count, allowed: self.size })
            }
            _ => Ok(either!(&mut self.ring, ring => ring.add_chain(segments, room, token))),
        }
    }

    /// Makes the staged buffers available, in one go. Returns whether the device wants to be notified (kicked).
    #[inline]
    pub fn publish(&mut self) -> bool {
        either!(&mut self.ring, ring => ring.publish())
    }

    /// The next buffer that the device has used: its token and how many bytes were written into it.
    ///
    /// # Errors
    /// [`RingError::UsedJump`], [`RingError::NotOutstanding`], [`RingError::UsedLength`]; the queue is broken for good
    /// and every later call returns the same.
    #[inline]
    pub fn take(&mut self) -> Result<Option<(u64, u32)>, RingError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        either!(&mut self.ring, ring => ring.take()).inspect_err(|error| self.broken = Some(error.clone()))
    }

    /// Appends up to `max` used buffers to `used` and returns how many.
    ///
    /// # Errors
    /// As for [`take`](DriverQueue::take). Buffers before the bad one are returned first: the error comes with the next
    /// call.
    #[inline]
    pub fn take_many(&mut self, used: &mut Vec<(u64, u32)>, max: usize) -> Result<usize, RingError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let before = used.len();
        let result = either!(&mut self.ring, ring => {
            let mut step = || -> Result<(), RingError> {
                for _ in 0..max {
                    let Some(buffer) = ring.take()? else { break };
                    used.push(buffer);
                }
                Ok(())
            };
            step()
        });
        let found = used.len() - before;
        match result {
            Err(error) => {
                self.broken = Some(error.clone());
                if found > 0 { Ok(found) } else { Err(error) }
            }
            Ok(()) => Ok(found),
        }
    }

    /// Asks the device for notifications (calls). Returns whether used buffers are there already: then one must look
    /// again before sleeping (virtio 1.2, 2.7.14 and 2.8.22).
    #[inline]
    pub fn enable_notifications(&mut self) -> bool {
        either!(&mut self.ring, ring => ring.enable_notifications())
    }

    /// Asks the device not to notify: we poll.
    #[inline]
    pub fn disable_notifications(&mut self) {
        either!(&mut self.ring, ring => ring.disable_notifications());
    }

    /// Where the queue stands (encoding as in [`QueueConfig::base`]). A device can be started from here, and a driver
    /// when nothing is outstanding.
    pub fn base(&self) -> u32 {
        either!(&self.ring, ring => ring.base())
    }
}

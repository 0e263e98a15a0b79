//! The device as its owner has it: a disk, and the queues that are served.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};

use viaduct_memory::{Call, GuestMemory, Span};

use super::event::{BlockEvent, Events};
use super::image::Image;
use super::pool::Pool;
use super::request::{Disk, F_FLUSH, ID, Kind};
use super::worker::{BlockQueue, Command, Worker};

/// Why something could not be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlockError {
    /// The queue is not started.
    #[error("queue {0} is not started")]
    NotStarted(u16),
    /// The queue is started.
    #[error("queue {0} is started already")]
    Started(u16),
    /// The queue's thread has ended.
    #[error("the thread of queue {0} has ended; this is a fault of the device, please report it")]
    Gone(u16),
    /// The ring does not lie in the memory.
    #[error("{0}")]
    Ring(String),
    /// The system refuses something.
    #[error("queue {0} cannot be served: {1}")]
    System(u16, std::io::Error),
}

/// What a device has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockStats {
    /// Requests to read that succeeded, and their bytes.
    pub reads: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Requests to write that succeeded.
    pub writes: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Flushes that succeeded.
    pub flushes: u64,
    /// Requests to discard or to zero that succeeded.
    pub discards: u64,
    /// Requests that the disk failed.
    pub failed: u64,
    /// Requests that broke the rules.
    pub refused: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    reads: AtomicU64,
    bytes_read: AtomicU64,
    writes: AtomicU64,
    bytes_written: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    failed: AtomicU64,
    pub refused: AtomicU64,
}

impl Counters {
    /// Counts a request that has ended.
    pub fn count(&self, kind: &Kind, data: &[Span], succeeded: bool) {
        let add = |counter: &AtomicU64, count| _ = counter.fetch_add(count, Ordering::Relaxed);
        if !succeeded {
            return add(&self.failed, 1);
        }
        let bytes = || data.iter().map(|span| u64::from(span.len())).sum();
        match kind {
            Kind::In(_) => {
                add(&self.reads, 1);
                add(&self.bytes_read, bytes());
            }
            Kind::Out(_) => {
                add(&self.writes, 1);
                add(&self.bytes_written, bytes());
            }
            Kind::Flush => add(&self.flushes, 1),
            Kind::Discard(_) | Kind::WriteZeroes(_) => add(&self.discards, 1),
            Kind::GetId => {}
        }
    }

    fn read(&self) -> BlockStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BlockStats {
            reads: get(&self.reads),
            bytes_read: get(&self.bytes_read),
            writes: get(&self.writes),
            bytes_written: get(&self.bytes_written),
            flushes: get(&self.flushes),
            discards: get(&self.discards),
            failed: get(&self.failed),
            refused: get(&self.refused),
        }
    }
}

/// What the queues' threads share.
#[derive(Debug)]
pub(super) struct Shared {
    pub image: Arc<dyn Image>,
    pub pool: Pool,
    pub events: Events,
    pub counters: Counters,
    pub serial: [u8; ID],
    pub use_uring: bool,
    read_only: bool,
    features: AtomicU64,
    /// The configuration's `writeback`.
    write_back: AtomicBool,
}

impl Shared {
    pub fn disk(&self) -> Disk {
        Disk { size: self.image.size(), read_only: self.read_only, features: self.features.load(Ordering::Relaxed) }
    }

    /// Whether a write is durable before it is acknowledged (5.2.6.2).
    pub fn is_write_through(&self) -> bool {
        !self.write_back.load(Ordering::Relaxed) || self.features.load(Ordering::Relaxed) & F_FLUSH == 0
    }
}

/// A block device.
#[derive(Debug)]
pub struct BlockDevice {
    shared: Arc<Shared>,
    queues: Mutex<BTreeMap<u16, Worker>>,
}

impl BlockDevice {
    /// A device with the disk `image`. `serial` is what it says to be called, up to 20 bytes; `event_fd` is signalled when
    /// there are events; `use_uring`: use io_uring where it is to be had.
    ///
    /// # Errors
    /// Those of the system about `event_fd`.
    pub fn new(
        image: Arc<dyn Image>,
        read_only: bool,
        serial: &[u8],
        event_fd: OwnedFd,
        use_uring: bool,
    ) -> std::io::Result<BlockDevice> {
        let mut padded = [0; ID];
        padded.iter_mut().zip(serial).for_each(|(to, from)| *to = *from);
        let shared = Shared {
            pool: Pool::new(image.clone()),
            image,
            events: Events::new(event_fd)?,
            counters: Counters::default(),
            serial: padded,
            use_uring,
            read_only,
            features: AtomicU64::new(0),
            write_back: AtomicBool::new(true),
        };
        Ok(BlockDevice { shared: Arc::new(shared), queues: Mutex::default() })
    }

    /// The features in force.
    pub fn set_features(&self, features: u64) {
        self.shared.features.store(features, Ordering::Relaxed);
    }

    /// The configuration's `writeback`. When it becomes false everything written before is made durable first.
    ///
    /// # Errors
    /// Those of the disk; the mode has changed nevertheless.
    pub fn set_write_back(&self, write_back: bool) -> std::io::Result<()> {
        let before = self.shared.write_back.swap(write_back, Ordering::Relaxed);
        if before && !write_back && !self.shared.read_only { self.shared.image.flush() } else { Ok(()) }
    }

    /// Begins to serve a queue, disabled.
    ///
    /// # Errors
    /// [`BlockError::Started`], [`BlockError::System`].
    pub fn start_queue(&self, index: u16, start: BlockQueue) -> Result<(), BlockError> {
        let mut queues = self.lock();
        if queues.contains_key(&index) {
            return Err(BlockError::Started(index));
        }
        let worker = Worker::start(self.shared.clone(), index, start);
        queues.insert(index, worker.map_err(|error| BlockError::System(index, error))?);
        Ok(())
    }

    /// Lets a queue's requests be taken, or not. A disabled queue waits.
    ///
    /// # Errors
    /// [`BlockError::NotStarted`], [`BlockError::Gone`].
    pub fn enable_queue(&self, index: u16, enabled: bool) -> Result<(), BlockError> {
        self.tell(index, Command::Enable(enabled)).map(|_| ())
    }

    /// Replaces what notifies the driver.
    ///
    /// # Errors
    /// [`BlockError::NotStarted`], [`BlockError::Gone`].
    pub fn set_call(&self, index: u16, call: Option<Call>) -> Result<(), BlockError> {
        self.tell(index, Command::SetCall(call)).map(|_| ())
    }

    /// Says where writes to the device part are logged, see [`DeviceQueue::set_log_addr`](viaduct_ring::DeviceQueue).
    ///
    /// # Errors
    /// [`BlockError::NotStarted`], [`BlockError::Gone`].
    pub fn set_log_addr(&self, index: u16, addr: Option<u64>) -> Result<(), BlockError> {
        self.tell(index, Command::SetLogAddr(addr)).map(|_| ())
    }

    /// Puts all queues into a new memory; returns when nothing uses the old one any more.
    ///
    /// # Errors
    /// [`BlockError::Ring`] if a ring does not lie there; the others have moved.
    pub fn set_memory(&self, memory: &GuestMemory) -> Result<(), BlockError> {
        let asked: Vec<_> = self
            .lock()
            .iter()
            .map(|(index, worker)| (*index, worker.ask(Command::SetMemory(memory.clone()))))
            .collect();
        asked.into_iter().map(|(index, answer)| wait(index, &answer).map(|_| ())).fold(Ok(()), Result::and)
    }

    /// Has a queue take no more requests. [`EventKind::Drained`](super::EventKind) tells when those in flight have been given
    /// back.
    ///
    /// # Errors
    /// [`BlockError::NotStarted`].
    pub fn drain_queue(&self, index: u16) -> Result<(), BlockError> {
        drop(self.lock().get(&index).ok_or(BlockError::NotStarted(index))?.ask(Command::Drain));
        Ok(())
    }

    /// Stops a queue; what is in flight is given back first. Returns where it stands
    /// ([`QueueConfig::base`](viaduct_ring::QueueConfig)).
    ///
    /// # Errors
    /// [`BlockError::NotStarted`], [`BlockError::Gone`].
    pub fn stop_queue(&self, index: u16) -> Result<u32, BlockError> {
        let mut worker = self.lock().remove(&index).ok_or(BlockError::NotStarted(index))?;
        let base = wait(index, &worker.ask(Command::Stop));
        worker.join();
        base
    }

    /// What has happened since the last call.
    pub fn take_events(&self) -> Vec<BlockEvent> {
        self.shared.events.take()
    }

    /// What it has done so far.
    pub fn stats(&self) -> BlockStats {
        self.shared.counters.read()
    }

    /// The disk.
    pub fn image(&self) -> &Arc<dyn Image> {
        &self.shared.image
    }

    fn tell(&self, index: u16, command: Command) -> Result<u32, BlockError> {
        // Nobody else is kept waiting for the answer.
        let answer = self.lock().get(&index).ok_or(BlockError::NotStarted(index))?.ask(command);
        wait(index, &answer)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u16, Worker>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wait(index: u16, answer: &Receiver<Result<u32, String>>) -> Result<u32, BlockError> {
    answer.recv().map_err(|_| BlockError::Gone(index))?.map_err(BlockError::Ring)
}

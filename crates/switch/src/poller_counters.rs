//! What a poller counts of its own work: where its time goes, how large its batches are, how often it sleeps and what
//! wakes it.
//!
//! Its thread is the only writer, once for each batch or round and never for each packet; readers stop nobody. Times are
//! in processor ticks ([`clock`](crate::clock)): what is neither busy nor idle was slept.

use std::sync::atomic::AtomicU64;

use crate::counters::Counter;

/// Sizes of batches are counted in classes: 1, 2-3, 4-7, ... 64 and more.
pub const BATCH_CLASSES: usize = 7;

/// What one poller has done.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct PollerCounters {
    /// Ticks spent in rounds that moved frames.
    pub busy_ticks: Counter,
    /// Ticks spent in rounds that found nothing.
    pub idle_ticks: Counter,
    /// Rounds over the active queues.
    pub rounds: Counter,
    /// Frames taken from queues.
    pub frames: Counter,
    /// Batches, by size class.
    pub batches: [Counter; BATCH_CLASSES],
    /// Times it went to sleep.
    pub sleeps: Counter,
    /// Sleeps that ended because a driver or the kernel had a frame for it, not because control had something to say.
    pub wakeups: Counter,
    /// Queues now polled (the others have asked for notification).
    pub active: AtomicU64,
}

impl PollerCounters {
    /// Counts a batch of `n` > 0 frames.
    #[inline]
    pub fn batch(&self, n: usize) {
        self.frames.add(n as u64);
        self.batches[(n.ilog2() as usize).min(BATCH_CLASSES - 1)].add(1);
    }
}

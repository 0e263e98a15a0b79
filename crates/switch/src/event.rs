//! What the pollers have to tell the control side.

use std::collections::VecDeque;
use std::io::Write;
use std::os::fd::OwnedFd;

use parking_lot::Mutex;

/// Something happened to a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Port number.
    pub port: u16,
    /// Virtqueue of the port: receive queues are even, transmit queues odd (virtio 1.2, 5.1.2).
    pub queue: u16,
    /// What went wrong there. The queue is stopped.
    pub message: String,
}

/// A queue of events with an eventfd beside it that an event loop can wait on.
#[derive(Debug)]
pub struct Events {
    waiting: Mutex<VecDeque<Event>>,
    signal: std::fs::File,
}

/// Events beyond this many are dropped, oldest first: each queue breaks once until the control side restarts it.
const LIMIT: usize = 4096;

impl Events {
    /// An empty queue that writes to `signal`, an eventfd.
    pub fn new(signal: OwnedFd) -> Events {
        Events { waiting: Mutex::default(), signal: signal.into() }
    }

    /// Takes all events, oldest first.
    pub fn take(&self) -> Vec<Event> {
        std::mem::take(&mut *self.waiting.lock()).into()
    }

    pub(crate) fn push(&self, event: Event) {
        let mut waiting = self.waiting.lock();
        if waiting.len() >= LIMIT {
            waiting.pop_front();
        }
        waiting.push_back(event);
        drop(waiting);
        let _ = (&self.signal).write(&1u64.to_ne_bytes());
    }
}

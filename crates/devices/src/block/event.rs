//! What a device has to tell its owner.

use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use viaduct_memory::Call;

/// What kind of event it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// The disk failed a request. The device goes on.
    Disk,
    /// The driver made a request that breaks the rules. The device goes on.
    Request,
    /// The queue takes no more requests, and all that were in flight have been given back.
    Drained,
    /// The driver broke the ring. The queue is served no more.
    Ring,
    /// The file behind the guest's memory was cut: the front-end is to be sent away.
    Memory,
}

/// Something that happened on a queue.
#[derive(Clone, Debug)]
pub struct BlockEvent {
    /// What kind of event.
    pub kind: EventKind,
    /// The queue's number.
    pub queue: u16,
    /// What was found, what is allowed, the section.
    pub message: String,
    /// How many events of this kind were left out before it, because nobody took those that were there.
    pub missed: u64,
}

/// Events that wait for someone to take them. A guest can cause as many as it likes, so only so many are kept.
#[derive(Debug)]
pub(super) struct Events {
    waiting: Mutex<Waiting>,
    signal: Call,
}

#[derive(Debug, Default)]
struct Waiting {
    events: Vec<BlockEvent>,
    missed: u64,
}

const KEPT: usize = 16;

impl Events {
    /// `event_fd` is signalled when there is something to take.
    pub fn new(event_fd: OwnedFd) -> std::io::Result<Events> {
        Ok(Events { waiting: Mutex::default(), signal: Call::new(event_fd)? })
    }

    pub fn report(&self, kind: EventKind, queue: u16, message: impl FnOnce() -> String) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that end something are few, at most one for each queue.
        if waiting.events.len() >= KEPT && matches!(kind, EventKind::Disk | EventKind::Request) {
            waiting.missed += 1;
            return;
        }
        let missed = std::mem::take(&mut waiting.missed);
        waiting.events.push(BlockEvent { kind, queue, message: message(), missed });
        drop(waiting);
        self.signal.signal();
    }

    pub fn take(&self) -> Vec<BlockEvent> {
        std::mem::take(&mut self.waiting.lock().unwrap_or_else(PoisonError::into_inner).events)
    }
}

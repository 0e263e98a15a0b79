//! What a guest has said and nobody has read yet.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A bounded buffer between a vCPU that must not wait and an owner who may be slow. When it is full the oldest bytes go, and
/// are counted: of a console that nobody has read, the end is what one wants to see.
pub struct Output {
    limit: usize,
    event: EventFd,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    bytes: VecDeque<u8>,
    lost: u64,
}

impl Output {
    /// A buffer of at most `limit` bytes, at least one.
    ///
    /// # Errors
    /// The system's, if there are no more descriptors.
    pub fn new(limit: usize) -> io::Result<Output> {
        Ok(Output { limit: limit.max(1), event: EventFd::new(EFD_NONBLOCK)?, kept: Mutex::default() })
    }

    /// Adds a byte; signals if it is the first.
    pub fn put(&self, byte: u8) {
        let mut kept = self.kept.lock();
        if kept.bytes.len() >= self.limit {
            kept.bytes.pop_front();
            kept.lost += 1;
        }
        kept.bytes.push_back(byte);
        if kept.bytes.len() == 1 {
            self.signal();
        }
    }

    /// Makes the eventfd readable, until the next [`take`](Output::take).
    pub(super) fn signal(&self) {
        // It fails only when it is readable anyway.
        let _ = self.event.write(1);
    }

    /// Takes all there is, and how many bytes before it were lost since the last call.
    pub fn take(&self) -> (Vec<u8>, u64) {
        let mut kept = self.kept.lock();
        // Under the lock: a byte that comes later signals again.
        let _ = self.event.read();
        (std::mem::take(&mut kept.bytes).into(), std::mem::take(&mut kept.lost))
    }

    /// An eventfd that is readable while there is something to take, and when room for input was awaited. It stays this
    /// buffer's.
    pub fn event_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

//! A look at a port: copies of the frames that pass, for Wireshark. A reader that is too slow loses frames, never the
//! switch time: what does not fit is counted.

use std::collections::VecDeque;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

use crate::frame::Outgoing;

/// Bytes that may wait for the reader.
const LIMIT: usize = 32 << 20;

/// A frame that passed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CapturedFrame {
    /// Nanoseconds since 1970.
    pub time: u64,
    /// True: the port's guest sent it. False: the switch sent it to the port.
    pub from_port: bool,
    /// Its length; `data` may be shorter.
    pub len: u32,
    /// Its first bytes. A checksum that the sender left to an offload is not complete.
    pub data: Vec<u8>,
}

#[derive(Debug, Default)]
struct Waiting {
    frames: VecDeque<CapturedFrame>,
    bytes: usize,
}

/// A capture in progress.
#[derive(Debug)]
pub struct Capture {
    snap: usize,
    waiting: Mutex<Waiting>,
    missed: AtomicU64,
    signal: std::fs::File,
}

impl Capture {
    /// Keeps up to `snap` bytes of each frame; `signal` is an eventfd that is written when frames wait.
    pub fn new(snap: usize, signal: OwnedFd) -> Capture {
        Capture { snap, waiting: Mutex::default(), missed: AtomicU64::new(0), signal: signal.into() }
    }

    /// Takes what waits, oldest first.
    pub fn take(&self) -> Vec<CapturedFrame> {
        let mut waiting = self.waiting.lock();
        waiting.bytes = 0;
        std::mem::take(&mut waiting.frames).into()
    }

    /// Frames that found no room.
    pub fn missed(&self) -> u64 {
        self.missed.load(Relaxed)
    }

    pub(crate) fn record(&self, frame: &Outgoing, from_port: bool) {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        let mut data = Vec::with_capacity(frame.len as usize);
        frame.append_to(&mut data);
        data.truncate(self.snap);
        let mut waiting = self.waiting.lock();
        if waiting.bytes + data.len() > LIMIT {
            self.missed.fetch_add(1, Relaxed);
            return;
        }
        waiting.bytes += data.len();
        let first = waiting.frames.is_empty();
        waiting.frames.push_back(CapturedFrame { time, from_port, len: frame.len, data });
        drop(waiting);
        if first {
            let _ = (&self.signal).write(&1u64.to_ne_bytes());
        }
    }
}
